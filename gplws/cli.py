"""The command ``gplws``: results on stdout, messages and progress on stderr.

Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
from argparse import SUPPRESS, ArgumentTypeError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from gplws.io.meshes import DEFAULT_MAX_FACES
from gplws.tiling import DEFAULT_MEMORY_MB

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from gplws.data import FocalStack
    from gplws.reconstruct import Reconstruction

_logger = logging.getLogger("gplws")

_FAILURES = (
    *(ValueError, TypeError, OSError, RuntimeError, MemoryError, ArithmeticError),
    ModuleNotFoundError,  # of what an extra installs
)
DEMO_FOLDER = Path("gplws_demo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after ``gplws``; default: those of this process.

    Returns:
        The exit code; wrong usage raises ``SystemExit(2)``.
    """
    parser = _parser()
    words = sys.argv[1:] if arguments is None else list(arguments)
    if "" in words:
        parser.error("an argument is empty; is a variable of the shell not set?")
    words = _with_signed_values(words)
    if words[:1] == ["train"]:
        words = _with_config(parser, words)
    options = parser.parse_args(words)
    command = options.subcommand
    chosen = options[command]
    verbose = bool(getattr(chosen, "verbose", False))
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if verbose else logging.WARNING,
        format="gplws: %(message)s",
    )
    try:
        with _terminable():
            code = _COMMANDS[command](parser, chosen)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # of head and the like, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("gplws: interrupted", file=sys.stderr)
        return 1
    except _FAILURES as error:
        _report_failure(error, "", verbose)
        return 1


def _with_signed_values(words: Sequence[str]) -> list[str]:
    """Joins an option and its list of numbers: the sign of the first looks like an option."""
    joined: list[str] = []
    for word in words:
        if re.fullmatch(r"-[0-9.]+(,[-+0-9.e]+)+", word) and joined[-1:] and joined[-1][:2] == "--":
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: nothing half-written is left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _with_config(parser: ArgumentParser, words: Sequence[str]) -> list[str]:
    """The words of ``gplws train``, with the configuration that it uses where they name none."""
    # To print a configuration ends the parsing: only once it is known which.
    others = [word for word in words if word.partition("=")[0] != "--print_config"]
    chosen = parser.parse_args(others)["train"]
    if chosen.config:
        return list(words)
    # A run that goes on has a configuration; the options of this call go over it. Where there is no
    # such run, the training says that it misses its checkpoint.
    goes_on = chosen.resume and chosen.out.exists()
    return ["train", "--config", str(chosen.out) if goes_on else "default", *words[1:]]


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    from gplws import __version__

    parser = ArgumentParser(
        prog="gplws",
        description="From a focal stack to a calibrated height map.",
        version=__version__,
    )
    commands = parser.add_subcommands(dest="subcommand")

    commands.add_subcommand("reconstruct", _reconstruct_parser(), help="focal stack to height map")
    commands.add_subcommand("convert", _convert_parser(), help="result to mesh, surface file")
    commands.add_subcommand("simulate", _simulate_parser(), help="focal stacks of known depth")
    commands.add_subcommand("train", _train_parser(), help="train a network")
    commands.add_subcommand("export", _export_parser(), help="checkpoint to weights file")
    commands.add_subcommand("evaluate", _evaluate_parser(), help="errors on known depth")
    commands.add_subcommand("benchmark", _benchmark_parser(), help="seconds on this machine")

    info = ArgumentParser(
        description="Say what was compiled and what this machine can use, as JSON."
    )
    commands.add_subcommand("info", info, help="what was built, for which machine")
    return parser


# Options of `gplws reconstruct` that say what `read_stack` is to find.
_OF_STACKS = ("z_step_um", "focus_positions_um", "pixel_size_um", "axes", "channel", "image")

_SHARED: dict[str, dict[str, Any]] = {
    "--z-direction": {
        "choices": ["up", "down"],
        "default": "up",
        "help": "whether the plane in focus rises or sinks from frame to frame",
    },
    "--memory-mb": {
        "type": float,
        "default": DEFAULT_MEMORY_MB,
        "help": "working memory, MiB",
    },
    "--overwrite": {
        "action": "store_true",
        "help": "replace the results in a folder that has some",
    },
    "--quiet": {"action": "store_true", "help": "no progress bar"},
    "--verbose": {
        "action": "store_true",
        "help": "more messages, and a traceback where it fails",
    },
}
"""Options that several commands have."""


def _add_shared(add: Callable[..., Any], *names: str) -> None:
    for name in names:
        add(name, **_SHARED[name])


def _add_path(add: Callable[..., Any], text: str) -> None:
    """A stack; without a default, which would hide the path of a --config file."""
    add("path", type=_path, nargs="?", default=SUPPRESS, help=text)


def _add_formats(add: Callable[..., Any]) -> None:
    add(
        "--mesh",
        type=_words,
        default=None,
        metavar="ply|stl|glb",
        help="write a mesh as well, or several: ply,glb; needs z-step and pixel size",
    )
    add(
        "--surface",
        type=_words,
        default=None,
        metavar="gwy|sdf|x3p",
        help="write a file for Gwyddion, of ISO 25178-71 or of ISO 25178-72, or several: gwy,x3p; "
        "needs the same",
    )
    add(
        "--max-faces",
        type=int,
        default=DEFAULT_MAX_FACES,
        help="of a mesh; larger ones keep every second, third, ... row and column",
    )


@dataclass(frozen=True, repr=False)
class _Type:
    """What turns the text of an argument into its value; --help calls it by its name."""

    name: str
    parse: Callable[[Any], Any]

    def __call__(self, given: Any) -> Any:
        return self.parse(given)

    def __repr__(self) -> str:
        return self.name


@partial(_Type, "words")
def _words(given: str | Sequence[Any] | None) -> list[str] | None:
    """Words as ``a,b``, ``[a, b]`` or the list of a --config file."""
    if given is None:
        return None
    if isinstance(given, str):
        given = given.strip().removeprefix("[").removesuffix("]").split(",")
    return [str(word).strip(" '\"") for word in given if str(word).strip()]


@partial(_Type, "numbers")
def _positions(given: str | Sequence[float] | None) -> list[float] | str | None:
    """Numbers as words, a text file that holds them, or "names"."""
    if given == "names":
        return "names"
    if isinstance(given, str) and Path(given).is_file():
        try:
            text = Path(given).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentTypeError(f"cannot read {given}: {error}") from error
        given = ",".join(re.split(r"[\s,;]+", text))
    words = _words(None if given == "null" else given)
    try:
        return None if words is None else [float(word) for word in words]
    except ValueError as error:
        raise ArgumentTypeError(
            f"{error}; expected numbers, 'names', or a file of numbers that exists"
        ) from error


@partial(_Type, "path")
def _path(given: str | Path | None) -> str | None:
    """Any text, of which YAML would take some for something else."""
    return None if given is None else str(given)


@partial(_Type, "number or name")
def _image(given: str | int | None) -> str | int | None:
    """Text as it is: 002 may be a name."""
    return given


@partial(_Type, "precisions")
def _precisions(given: str | Sequence[str] | None) -> list[str] | None:
    """Precisions as words."""
    from gplws.reconstruct import Precision

    words = _words(given)
    if not set(words or ()) <= {*get_args(Precision)}:
        raise ArgumentTypeError(f"expected {', '.join(get_args(Precision))}, got {given!r}")
    return words


def _reconstruct_parser() -> ArgumentParser:
    from jsonargparse import ActionConfigFile, ArgumentParser

    from gplws.reconstruct import Precision

    reconstruct = ArgumentParser(
        description="Reconstruct the surface of a focal stack and write it into a folder. Several "
        "stacks are reconstructed one after the other, with the same options.",
    )
    add = reconstruct.add_argument
    add("--config", action=ActionConfigFile, help="YAML file with these options")
    _add_path(
        add,
        "folder of BMP, PNG, JPEG or TIFF frames, a multipage, ImageJ or OME TIFF, a .czi, .lif or "
        ".nd2 file, or OME-Zarr",
    )
    add("more", type=_path, nargs="*", default=SUPPRESS, help="further stacks")
    add("--stack", type=_path, default=None, help="the same as PATH, for --config files")
    add("--demo", action="store_true", help="render a test piece, reconstruct it, show the error")
    add(
        "-o",
        "--out",
        type=_path,
        default=None,
        help=f"folder to write; of several stacks the folder for their folders NAME; default: "
        f"NAME_gplws for a stack NAME, {DEMO_FOLDER} for the demo",
    )
    add(
        "--z-step-um",
        "--z-step",
        type=float | None,
        default=None,
        metavar="UM",
        help="distance from frame to frame, um; default: from the metadata, else heights in frames",
    )
    add(
        "--focus-positions-um",
        type=_positions,
        default=None,
        metavar="UM,UM,...|FILE|names",
        help="height of the plane in focus in each frame, um, or a text file with these numbers, "
        "or names: the one number in which the names of the frames differ; instead of --z-step",
    )
    add(
        "--pixel-size-um",
        "--pixel-size",
        type=float | None,
        default=None,
        metavar="UM",
        help="side of a pixel on the object, um; default: from the metadata",
    )
    _add_shared(add, "--z-direction")
    add("--axes", type=str | None, default=None, help="axes of a TIFF or array, such as ZYX")
    add(
        "--channel",
        type=int | None,
        default=None,
        metavar="N",
        help="the one to take of several channels or of RGB, counted from 0",
    )
    add(
        "--image",
        type=_image,
        default=None,
        metavar="N|NAME",
        help="the one to read of a file with several (scenes, series, positions), counted from 0; "
        "default: its only stack",
    )
    add(
        "--align",
        type=str,
        default="none",
        metavar="none|translation|similarity|affine|FILE",
        help="register the frames first: translation for microscopes, similarity for macro lenses; "
        "or as info.json of an earlier result has it; the result is cut to what all frames show",
    )
    add(
        "--method",
        type=str,
        default="auto",
        help="auto (rdf), rdf, sml, mdml, tenengrad, glv, wavelet, shearlet, rr, tft, gplws, or a "
        ".safetensors file of a network",
    )
    add(
        "--precision",
        type=Precision,
        default="float32",
        help="of a network; bfloat16 is faster on GPUs and on CPUs with AVX512-BF16",
    )
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    _add_formats(add)
    _add_shared(add, "--memory-mb", "--overwrite", "--quiet", "--verbose")
    return reconstruct


def _convert_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    convert = ArgumentParser(
        description="Write meshes, surface files and a new preview of a finished reconstruction.",
    )
    add = convert.add_argument
    add("result", type=Path, help="folder that gplws reconstruct wrote")
    add(
        "-o",
        "--out",
        type=_path,
        default=None,
        help="folder to write a copy of the result to, with these files alone; default: they are "
        "added to the result",
    )
    _add_formats(add)
    _add_shared(add, "--overwrite", "--verbose")
    return convert


def _simulate_parser() -> ArgumentParser:
    from jsonargparse import ActionConfigFile, ArgumentParser

    from gplws.data.lighting import LIGHTS
    from gplws.data.optics import POINT_SPREADS
    from gplws.data.scenes import SceneSettings
    from gplws.data.surfaces import SURFACES
    from gplws.data.textures import TEXTURES

    usual = SceneSettings()
    simulate = ArgumentParser(
        description="Render focal stacks of surfaces whose true height is written beside them. It "
        "counts from the lowest point. Frames tell of their distance only: what is reconstructed "
        "from them counts from the first, which lies at height_of_first_frame_um of info.json."
    )
    add = simulate.add_argument
    add("--config", action=ActionConfigFile, help="YAML file with these options")
    add("out", type=Path, help="folder to write; with --count K one folder in it for each stack")
    add("--count", type=int, default=1, help="how many stacks; each has the next seed")
    add(
        "--surface",
        type=str,
        default=usual.surface,
        help=f"{', '.join(SURFACES)}, or a height map: .npz with h_um, .npy, TIFF, PNG",
    )
    add(
        "--texture",
        type=str,
        default=usual.texture,
        help=f"{', '.join(TEXTURES)}, or a picture",
    )
    add("--height", type=int, default=usual.height, help="rows of a frame")
    add("--width", type=int, default=usual.width, help="columns of a frame")
    add("--frames", type=int, default=usual.frames, help="focus positions")

    def length(*names: str, default: float | None, text: str) -> None:
        add(*names, type=float | None, default=default, metavar="UM", help=text)

    length(
        "--z-step-um",
        "--z-step",
        default=usual.z_step_um,
        text="distance from frame to frame, um; default: the frames span the surface",
    )
    length(
        "--relief-um",
        "--relief",
        default=usual.relief_um,
        text="lowest to highest point, um; default: of a file that says its pixel size (dx_um of "
        ".npz), else what blurs by 15 pixels",
    )
    length(
        "--pixel-size-um",
        "--pixel-size",
        default=usual.pixel_size_um,
        text="side of a pixel on the object, um",
    )
    length("--wavelength-um", default=usual.wavelength_um, text="of the light, um")
    add("--numerical-aperture", "--na", type=float, default=usual.numerical_aperture, help="NA")
    add("--refractive-index", type=float, default=usual.refractive_index, help="of the medium")
    add("--psf", choices=list(POINT_SPREADS), default=usual.psf, help="model of the blur")
    _add_shared(add, "--z-direction")
    add("--light", choices=list(LIGHTS), default=usual.light, help="illumination")
    add("--gloss", type=float, default=usual.gloss, help="strength of specular highlights")
    add("--contrast", type=float, default=usual.contrast, help="of the texture, 0..1")
    add("--exposure", type=float, default=usual.exposure, help="mean brightness, 0..1")
    add("--vignetting", type=float, default=usual.vignetting, help="darkening of the corners")
    add("--gain-drift", type=float, default=usual.gain_drift, help="relative, frame to frame")
    add("--jitter-px", type=float, default=usual.jitter_px, help="displacement of the frames")
    add(
        "--magnification-change",
        type=float,
        default=usual.magnification_change,
        help="relative growth of the image from the first frame to the last",
    )
    add(
        "--full-well-electrons",
        type=float | None,
        default=usual.full_well_electrons,
        help="electrons at full scale, which set the photon noise; null: no noise",
    )
    add(
        "--read-noise-electrons",
        type=float,
        default=usual.read_noise_electrons,
        help="deviation of the read noise",
    )
    add("--bit-depth", type=int, default=usual.bit_depth, help="8 to 16")
    add("--seed", type=int, default=usual.seed, help="of all that is drawn")
    add("--format", choices=["tiff", "png"], default="tiff", help="of the frames")
    add("--device", type=str, default="cpu", help="cpu, cuda, cuda:1, ...")
    _add_shared(add, "--overwrite", "--quiet", "--verbose")
    return simulate


def _train_parser() -> ArgumentParser:
    from jsonargparse import ActionConfigFile, ArgumentParser

    from gplws.training_config import TrainingConfig, preset_names, preset_path

    class PresetOrFile(ActionConfigFile):
        """Takes the name of a preset or a run folder as well as a file."""

        def __call__(
            self, parser: Any, cfg: Any, values: Any, option_string: str | None = None
        ) -> None:
            if values in preset_names():
                values = str(preset_path(values))
            elif Path(values).is_dir():
                values = str(Path(values) / "config.yaml")
            super().__call__(parser, cfg, values, option_string)

    train = ArgumentParser(
        description="Train a depth-from-focus network; with torchrun on several GPUs.",
    )
    add = train.add_argument
    names = ", ".join(sorted(preset_names(), key="default".__ne__))
    add(
        "--config",
        action=PresetOrFile,
        help=f"YAML file with these options, folder of a run, or a preset: {names} (the first)",
    )
    add("-o", "--out", type=Path, default=Path("gplws_run"), help="folder of the run")
    add(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in --out; without --config with its configuration",
    )
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    _add_shared(add, "--quiet", "--verbose")
    train.add_class_arguments(TrainingConfig, None)
    return train


def _export_parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    export = ArgumentParser(
        description="Write the weights of a checkpoint, and a model card that says what they are.",
    )
    add = export.add_argument
    add("checkpoint", type=Path, help="checkpoint.pt of a run, or the folder of the run")
    add("out", type=Path, help="weights file to write, NAME.safetensors; the card is NAME.md")
    add("--licence", type=str, default="Apache-2.0", help="licence of the weights, for the card")
    add("--data", type=str, default="", help="what they were trained on, for the card")
    add("--raw", action="store_true", help="the weights of the last step, not their average")
    add("--overwrite", action="store_true", help="replace existing files")
    _add_shared(add, "--verbose")
    return export


def _evaluate_parser() -> ArgumentParser:
    from jsonargparse import ActionConfigFile, ArgumentParser

    from gplws.training_config import SourceConfig

    evaluate = ArgumentParser(
        description="Measure the error of methods on focal stacks with known depth.",
    )
    add = evaluate.add_argument
    add("--config", action=ActionConfigFile, help="YAML file with these options")
    add(
        "--methods",
        type=_words,
        default=["rdf"],
        metavar="METHOD,...",
        help="names of methods, .safetensors files, checkpoints (.pt)",
    )
    add(
        "--stacks",
        type=_words,
        default=[],
        metavar="FOLDER,...",
        help="folders of stacks with gt.npz, or that gplws simulate wrote; see "
        "gplws.datasets.FolderStacks",
    )
    add(
        "--data",
        type=list[SourceConfig],
        default=[],
        metavar="[SOURCE, ...]",
        help="any data sets or generators, as data.validation of gplws train",
    )
    add("--frames", type=tuple[int, int], default=(10, 10), help="least, most; of generators")
    add("--crop", type=int, default=256, help="side of the images, pixels; of generators")
    add("-o", "--out", type=_path, default=None, help="folder for evaluation.json")
    add("--pictures", action="store_true", help="pictures of the errors in --out as well")
    add("--device", type=str, default="cpu", help="cpu, cuda, cuda:1, ...")
    _add_shared(add, "--overwrite", "--quiet", "--verbose")
    return evaluate


def _benchmark_parser() -> ArgumentParser:
    from jsonargparse import ActionConfigFile, ArgumentParser

    benchmark = ArgumentParser(
        description="Measure how long methods take on this machine, from frames in memory to maps "
        "in memory, the methods taking turns.",
    )
    add = benchmark.add_argument
    add("--config", action=ActionConfigFile, help="YAML file with these options")
    _add_path(add, "a stack, as for gplws reconstruct; default: one that is rendered")
    add(
        "--methods",
        type=_words,
        default=["rdf", "rr", "gplws"],
        metavar="METHOD,...",
        help="names, as --method of gplws reconstruct",
    )
    add(
        "--precisions",
        type=_precisions,
        default=["float32"],
        metavar="PRECISION,...",
        help="of networks: float32, bfloat16, float16 (GPU)",
    )
    add("--frames", type=int | None, default=None, help="of the rendered stack; default: 10")
    add("--height", type=int | None, default=None, help="rows of its frames; default: 512")
    add("--width", type=int | None, default=None, help="columns of its frames; default: 512")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    _add_shared(add, "--memory-mb")
    add("--seconds", type=float, default=10.0, help="for all of it, roughly")
    add("-o", "--out", type=_path, default=None, help="JSON file to write")
    _add_shared(add, "--overwrite", "--quiet", "--verbose")
    return benchmark


def _benchmark(parser: ArgumentParser, options: Namespace) -> int:
    from gplws.benchmark import rendered_stack, time_methods
    from gplws.files import new_file
    from gplws.io import read_stack

    out = None if options.out is None else Path(options.out)
    if out is not None:
        if out.exists() and not options.overwrite:
            raise FileExistsError(f"--out: {out} exists; --overwrite replaces it")
        out.parent.mkdir(parents=True, exist_ok=True)
    path = options.get("path")
    if path is None:
        stack = rendered_stack(
            10 if options.frames is None else options.frames,
            512 if options.height is None else options.height,
            512 if options.width is None else options.width,
            progress=_shows_progress(options),
        )
    else:
        for name in ("frames", "height", "width"):
            if options[name] is not None:
                raise ValueError(f"--{name} is of a rendered stack, it does not go with a path")
        stack = read_stack(path, progress=_shows_progress(options))
    times = time_methods(
        stack,
        options.methods,
        precisions=options.precisions,
        device=options.device,
        memory_mb=options.memory_mb,
        seconds=options.seconds,
        progress=_shows_progress(options),
    )
    print(times.table())
    if out is not None:
        with new_file(out, overwrite=options.overwrite) as file:
            file.write(times.as_json().encode())
        print(out)
    return 0


def _evaluate(parser: ArgumentParser, options: Namespace) -> int:
    from gplws.evaluation import evaluate
    from gplws.files import new_folder_content, write_bytes
    from gplws.training_config import DataConfig, SourceConfig, samples_of, source_names

    out = None if options.out is None else Path(options.out)
    if not options.stacks and not options.data:
        parser.error("give --stacks or --data")
    if options.pictures and out is None:
        parser.error("--pictures needs --out")
    if out is not None:
        _refuse_existing(out, options)
    stacks = [Path(folder) for folder in options.stacks]
    folders = zip(stacks, _path_ends(stacks, "--stacks"), strict=True)
    entries = [
        SourceConfig("gplws.datasets:FolderStacks", {"root": str(folder)}, name=name)
        for folder, name in folders
    ]
    entries += _evaluate_parser().instantiate(options).data
    data = DataConfig(batch_size=1, frames=options.frames, crop=options.crop)
    methods = _path_ends([Path(method) for method in options.methods], "--methods")
    sets = zip(source_names(entries, "--data"), entries, strict=True)
    written = {"evaluation.json", "pictures/"}
    content = new_folder_content(out, written, overwrite=options.overwrite) if out else None
    with content or nullcontext() as folder:
        found = evaluate(
            dict(zip(methods, options.methods, strict=True)),
            [(name, samples_of(entry, data)) for name, entry in sets],
            device=options.device,
            pictures=folder / "pictures" if folder and options.pictures else None,
            progress=_shows_progress(options),
        )
        if folder is not None:
            write_bytes(folder / "evaluation.json", found.as_json().encode())
    print(found.table())
    if out is not None:
        print(out / "evaluation.json")
    return 0


def _path_ends(paths: Sequence[Path], option: str) -> list[str]:
    """Names of paths for a table: the last part of each, and the folders that tell it apart.

    Raises:
        ValueError: a path is given twice; the message names the option.
    """
    every = [path.absolute().parts for path in paths]
    names = []
    for path, parts in zip(paths, every, strict=True):
        if every.count(parts) > 1:
            raise ValueError(f"{option}: {path} is given twice")
        lengths = range(1, len(parts) + 1)
        alone = (n for n in lengths if sum(other[-n:] == parts[-n:] for other in every) == 1)
        names.append(str(Path(*parts[-next(alone) :])))
    return names


def _train(parser: ArgumentParser, options: Namespace) -> int:
    from gplws.training import train
    from gplws.training_config import TrainingConfig

    train_parser = _train_parser()
    made = train_parser.instantiate(options)
    config = TrainingConfig(**{field.name: made[field.name] for field in fields(TrainingConfig)})
    result = train(
        config,
        options.out,
        resume=options.resume,
        device=options.device,
        progress=not options.quiet,  # a line of a log now and then where stderr is a file
    )
    if os.environ.get("RANK", "0") == "0":  # torchrun brings all processes here
        errors = ", ".join(f"{name} {error:.4f}" for name, error in result.validation.items())
        print(f"{result.checkpoint}: {result.reason} at step {result.step}", end="")
        print(f"; mean error in frames: {errors}" if errors else "")
        if result.reason != "done":
            print(f"gplws: to go on: gplws train --resume --out {options.out}", file=sys.stderr)
    return 1 if result.reason == "interrupted" else 0


def _export(parser: ArgumentParser, options: Namespace) -> int:
    from gplws.checkpoints import export

    exported = export(
        options.checkpoint,
        options.out,
        licence=options.licence,
        data=options.data,
        averaged=not options.raw,
        overwrite=options.overwrite,
    )
    print(exported.weights)
    print(exported.card)
    print(f"fused network against training form: largest relative error {exported.error:.1e}")
    return 0


def _simulate(parser: ArgumentParser, options: Namespace) -> int:
    """Renders stacks one by one; each folder is complete or not there."""
    from tqdm import tqdm

    from gplws.data.scenes import SceneSettings, simulate_stack
    from gplws.io.writers import save_simulation

    if options.count < 1:
        raise ValueError(f"--count: expected at least 1, got {options.count}")
    if options.pixel_size_um is None or options.wavelength_um is None:
        raise ValueError("--pixel-size-um and --wavelength-um: expected a number, got none")
    values = {
        field.name: options[field.name] for field in fields(SceneSettings) if field.name in options
    }
    values["falling"] = options.z_direction == "down"
    first = SceneSettings(**values)  # wrong values fail before anything is written
    digits = max(3, len(str(options.count - 1)))
    folders = [options.out]
    if options.count > 1:
        folders = [options.out / f"{index:0{digits}d}" for index in range(options.count)]
    for folder in folders:
        _refuse_existing(folder, options)
    total, hidden = options.count * first.frames, not _shows_progress(options)
    with tqdm(total=total, unit="frame", disable=hidden, leave=False) as bar:
        for index, folder in enumerate(folders):
            settings = SceneSettings(**{**values, "seed": first.seed + index})

            def advance(done: int, total: int, before: int = index * first.frames) -> None:
                bar.update(before + done - bar.n)

            stack = simulate_stack(settings, device=options.device, progress=advance)
            save_simulation(
                stack,
                folder,
                pixel_size_um=settings.pixel_size_um,
                metadata={"scene": asdict(settings)},
                frame_format=options.format,
                overwrite=options.overwrite,
            )
    frames = "stack.tif" if options.format == "tiff" else "frames"
    for folder in folders:
        print(folder / frames)
    return 0


def _info(parser: ArgumentParser, options: Namespace) -> int:
    from gplws import build_info

    print(json.dumps(build_info(), indent=2))
    return 0


def _reconstruct(parser: ArgumentParser, options: Namespace) -> int:
    sources = (options.get("path"), options.stack)
    given = [Path(source) for source in sources if source is not None]
    if len(given) + options.demo != 1:
        parser.error("give either the path of a stack or --demo")
    given += [Path(path) for path in options.get("more") or ()]

    from gplws.io.meshes import require_max_faces
    from gplws.io.writers import mesh_kinds, surface_kinds

    calibrated = bool(mesh_kinds(options.mesh) + surface_kinds(options.surface))
    require_max_faces(options.max_faces)
    if options.demo:
        return _demo(options)
    targets = _targets(given, options.out)
    for path, out in zip(given, targets, strict=True):
        _refuse_target(path, out, options)
    failed = 0
    for path, out in zip(given, targets, strict=True):
        try:
            _reconstruct_one(path, out, calibrated, options)
        except _FAILURES as error:
            if len(given) == 1:
                raise
            failed += 1
            _report_failure(error, "" if str(path) in str(error) else f"{path}: ", options.verbose)
    if failed:
        print(f"gplws: {failed} of {len(given)} stacks failed", file=sys.stderr)
    return 1 if failed else 0


def _targets(stacks: Sequence[Path], out: str | None) -> list[Path]:
    """Folders of the results: of one stack ``out``, of several the folders NAME in it.

    Raises:
        ValueError: two would be the same.
    """
    if len(stacks) == 1 and out is not None:
        return [Path(out)]
    suffix, parent = ("_gplws", Path()) if out is None else ("", Path(out))
    ends = [Path(end).parent for end in _path_ends([path.resolve() for path in stacks], "path")]
    names = [f"{_name_of(path.resolve())}{suffix}" for path in stacks]
    targets = [parent / end / name for end, name in zip(ends, names, strict=True)]
    for target in targets:
        if targets.count(target) > 1:
            raise ValueError(f"path: results of two stacks would be in {target}")
    return targets


def _refuse_target(stack: Path, out: Path, options: Namespace) -> None:
    """Fail before the work where a folder holds the frames, or results that have to stay."""
    from gplws.io.writers import RESULT_FILES

    if out.resolve() in (stack.resolve(), stack.resolve().parent) and (
        stack.is_dir() or stack.name in RESULT_FILES
    ):
        raise ValueError(f"--out: {out} holds the frames; results belong into another folder")
    _refuse_existing(out, options)


def _reconstruct_one(path: Path, out: Path, calibrated: bool, options: Namespace) -> None:
    """Reconstruct a stack; ``calibrated`` results need its z-step and pixel size."""
    from gplws.reconstruct import reconstruct

    stack: Path | FocalStack = path
    scales = {name: options[name] for name in _OF_STACKS if options[name] is not None}
    has_positions = "z_step_um" in scales or "focus_positions_um" in scales
    if calibrated and not (has_positions and "pixel_size_um" in scales):
        # The file has to say the rest; without it all the work would be in vain.
        stack, scales = _read_calibrated(path, scales, options), {}
    result = reconstruct(stack, z_direction=options.z_direction, **scales, **_common(options))
    _save(result, out, options)


def _convert(parser: ArgumentParser, options: Namespace) -> int:
    """Writes a result once more, in its own folder with the formats that are there already."""
    from gplws.io.meshes import MESH_FORMATS
    from gplws.io.surfaces import SURFACE_FORMATS
    from gplws.reconstruct import Reconstruction

    folder = options.result
    result = Reconstruction.load(folder)
    out = folder if options.out is None else Path(options.out)
    in_place = out.resolve() == folder.resolve()
    if in_place:
        options.overwrite = True
        options.mesh = _with_present(options.mesh, folder, "mesh", MESH_FORMATS)
        options.surface = _with_present(options.surface, folder, "height", SURFACE_FORMATS)
    else:
        _refuse_existing(out, options)
    _save(result, out, options)
    return 0


def _with_present(
    asked: list[str] | None, folder: Path, stem: str, formats: Sequence[str]
) -> list[str]:
    """The formats that are asked for, and those of which a folder has the file."""
    present = [kind for kind in formats if (folder / f"{stem}.{kind}").exists()]
    return list(dict.fromkeys([*(asked or []), *present]))


def _read_calibrated(path: Path, scales: dict[str, Any], options: Namespace) -> FocalStack:
    """The stack, if a mesh or a surface file can be made of it."""
    from gplws.io import read_stack
    from gplws.io.meshes import require_calibration

    stack = read_stack(path, **scales, progress=_shows_progress(options))
    units = "frames" if stack.focus_positions_um is None else "um"
    what = "a mesh" if options.mesh else "a surface file"
    require_calibration(units, stack.pixel_size_um, what)
    return stack


def _demo(options: Namespace) -> int:
    """Renders a stack of known height, reconstructs it, and reports the error."""
    import numpy as np

    from gplws.data import FocalStack, demo_scene, render_focal_stack
    from gplws.reconstruct import reconstruct

    for name, unset in {**dict.fromkeys(_OF_STACKS), "align": "none"}.items():
        if options[name] != unset:
            raise ValueError(f"--{name.replace('_', '-')} does not go with --demo")
    out = Path(options.out or DEMO_FOLDER)
    # The demo may be run again; a folder that someone chose is not replaced unasked.
    options.overwrite = options.overwrite or options.out is None
    _refuse_existing(out, options)
    scene = demo_scene()
    count = len(scene.focus_positions_um)
    print(f"gplws: rendering a test piece in {count} frames ...", file=sys.stderr)
    rendered = render_focal_stack(
        **scene._asdict(),
        full_well_electrons=20_000,
        read_noise_electrons=8,
    )
    stack = FocalStack.from_frames(
        rendered.frames.numpy(),
        focus_positions_um=rendered.focus_positions_um.numpy(),
        pixel_size_um=scene.pixel_size_um,
    )
    result = reconstruct(stack, z_direction=options.z_direction, **_common(options))
    _save(result, out, options)
    sign = 1 if options.z_direction == "up" else -1
    error_um = np.abs(sign * np.asarray(result.height) - scene.height_um.numpy())[result.valid]
    positions_um = rendered.focus_positions_um.numpy()
    step_um = float(np.diff(positions_um).mean())
    print(
        f"error against the known surface: mean {error_um.mean():.2f} um, median "
        f"{np.median(error_um):.2f} um (frames are {step_um:.2f} um apart: mean "
        f"{error_um.mean() / step_um:.2f} frames)"
    )
    return 0


def _name_of(stack: Path) -> str:
    """Name of a folder or file without the suffix that says its format."""
    suffixes = "zarr" if stack.is_dir() else "tiff?|npy|npz|czi|lif|nd2"
    return re.sub(rf"(\.ome)?\.({suffixes})$", "", stack.name, flags=re.IGNORECASE)


def _common(options: Namespace) -> dict[str, Any]:
    return {
        "align": options.align,
        "method": options.method,
        "precision": options.precision,
        "device": options.device,
        "memory_mb": options.memory_mb,
        "progress": _shows_progress(options),
    }


def _shows_progress(options: Namespace) -> bool:
    return not options.quiet and sys.stderr.isatty()


def _refuse_existing(out: Path, options: Namespace) -> None:
    """Fail before the work, not after it; the writer checks again."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out: {out} is a file")
    if not options.overwrite and out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"--out: {out} is not empty; --overwrite replaces the results in it")


def _save(result: Reconstruction, out: Path, options: Namespace) -> None:
    """Writes a result with the files that the options ask for, and says so."""
    result.save(
        out,
        overwrite=options.overwrite,
        mesh=options.mesh,
        surface=options.surface,
        max_faces=options.max_faces,
    )
    _report(out)


def _report(out: Path) -> None:
    info = json.loads((out / "info.json").read_text(encoding="utf-8"))
    stats, units = info["statistics"], info["units"]
    height, width = info["shape"]
    print(f"{out}: height map {width} x {height}, {100 * stats['valid_share']:.1f}% valid", end="")
    if stats["height_min"] is not None:
        low, high, mean = (stats[f"height_{k}"] for k in ("min", "max", "mean"))
        print(f", {low:.4g} to {high:.4g} {units}, mean {mean:.4g} {units}", end="")
    print(f"; method {info['method']}, {info['seconds']['reconstruct']:.2f} s")
    for name in info["files"]:
        print(out / name)
    if stats["valid_share"] == 0:
        print(
            "gplws: no pixel is valid: nothing comes into focus in these frames, or they show no "
            "texture",
            file=sys.stderr,
        )
    if units == "frames":
        print(
            "gplws: the focus positions are unknown, so heights are in frames: pass --z-step",
            file=sys.stderr,
        )


def _report_failure(error: BaseException, what: str, verbose: bool) -> None:
    if verbose:
        _logger.error("failed", exc_info=error)
    print(f"gplws: error: {what}{_one_paragraph(error)}", file=sys.stderr)


def _one_paragraph(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_COMMANDS = {
    "reconstruct": _reconstruct,
    "convert": _convert,
    "simulate": _simulate,
    "train": _train,
    "export": _export,
    "evaluate": _evaluate,
    "benchmark": _benchmark,
    "info": _info,
}


if __name__ == "__main__":
    sys.exit(main())
