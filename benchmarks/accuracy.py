"""Errors of methods in the form of the paper's Tables 4 to 6, networks trained with one budget.

    python -m benchmarks.accuracy --methods rdf my_net.safetensors
    python -m benchmarks.accuracy --train-steps 2000 --frames 10 --stacks FOLDER

With --train-steps or --train-minutes each of --networks is first trained on the simulator, all
with the same recipe: Adam, L1 of the depth map, the same batches. Their checkpoints stay in
--checkpoints, and the same command goes on where it was stopped. Then all networks and --methods
are measured on the same stacks. Depth is the share of the focus range, 0.1 at the first frame, 1 at
the last.

"gplws" is GPLWS-Net of the paper, "gplws_features" that of the preset `default`. Networks read
their depth as trained (--reading); DDFFNet takes one number of frames, that of --frames, and is
left out elsewhere. The simulated levels have fixed seeds. Give surfaces and pictures that no
weights have seen by --surfaces and --textures; without them all surfaces and textures are drawn by
the simulator, from other seeds than training uses. Levels:

    simulated what training draws
    easy      texture of full contrast everywhere, little noise, gentle relief
    weak      a few grey levels of texture
    noisy     few electrons for each pixel
    wide      blur of 30 to 60 pixels in total, materials of very different brightness
    specular  highlights
    steep     tall surfaces: slopes of several frames a pixel, deep holes
    few       5 frames
    many      40 frames, little blur from one to the next

Each differs from "easy" in what it is named for. That, "weak" and "noisy" are set so that the best
classical method errs by about 0.2, 0.5 and 0.8 frames on surfaces and pictures from files.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import paper
from benchmarks.networks import NETWORKS, frames_of
from benchmarks.summary import FEATURES, NAMES_OF_TRAINED, with_interval
from benchmarks.timing import save, show
from benchmarks.trained import (
    FOLDER,
    UNIT,
    Reading,
    Recipe,
    in_focus_range,
    method_of_network,
    model_configs,
    train_network,
    trained_network,
)
from gplws.classical import METHODS
from gplws.data import DepthSample
from gplws.data.generator import StackGenerator, StackSettings
from gplws.data.topographies import read_textures, read_topographies
from gplws.datasets import FolderStacks, MiddleburyPairs
from gplws.evaluation import Evaluation, Method, Pooled, Result, evaluate, method_of
from gplws.io.writers import jsonable
from gplws.training_config import require_distinct

SEED = 7_000_000  # far from those of training and validation
CALM = StackSettings(
    blur_per_frame_px=(1.0, 2.5),
    texture_contrast=(0.3, 1.0),
    grain=1.0,
    grain_contrast=(0.05, 0.15),
    full_well_electrons=(8_000.0, 40_000.0),
    read_noise_electrons=(1.0, 5.0),
    bit_depths=(8, 12),
    relief=(0.25, 0.7),
    roughness=(0.0005, 0.01),
    out_of_range=0.0,
    strong_materials=0.0,
    gloss=0.0,
    jpeg=0.0,
)


@dataclass(frozen=True)
class Level:
    """What a level draws."""

    settings: StackSettings
    frames: int | None = None  # None: those of --frames


LEVELS = {
    "simulated": Level(StackSettings()),
    "easy": Level(CALM),
    "weak": Level(
        replace(
            CALM,
            texture_contrast=(0.02, 0.08),
            grain_contrast=(0.002, 0.01),
            residual_blur_px=(0.4, 0.9),
        )
    ),
    "noisy": Level(
        replace(CALM, full_well_electrons=(100.0, 400.0), read_noise_electrons=(5.0, 18.0))
    ),
    "wide": Level(
        replace(
            CALM,
            total_blur_px=(30.0, 60.0),
            blur_per_frame_px=(1.0, 6.0),
            relief=(0.4, 0.95),
            two_materials=1.0,
            strong_materials=1.0,
        )
    ),
    "specular": Level(replace(CALM, gloss=1.0, lights=("ring", "oblique"))),
    "steep": Level(
        replace(
            CALM,
            relief=(0.4, 0.95),
            surfaces=("steps", "holes", "spheres", "grooves"),
            measured_share=0.0,
        )
    ),
    "few": Level(CALM, frames=5),
    "many": Level(replace(CALM, blur_per_frame_px=(0.3, 1.0)), frames=40),
}

COLUMNS = {
    "mse": "MSE",
    "mae": "MAE",
    "rmse": "RMSE",
    "log_rmse": "log RMSE",
    "abs_rel": "AbsRel",
    "sq_rel": "SqRel",
    "a1": "a1",
    "a2": "a2",
    "a3": "a3",
    "bumpiness": "bump",
    "mean_uncertainty": "unc.",
    "seconds": "s",
}
"""Figures of the tables, and their titles."""

_FEWEST_FOR_INTERVALS, _DRAWS = 8, 2000

TRAINABLE = (*NETWORKS, FEATURES)
TRAINED_ON = "simulated"
"""The level that is drawn as the training data are."""

Datasets = list[tuple[str, list[DepthSample]]]


def level_samples(
    level: Level,
    count: int,
    side: int,
    frames: int,
    surfaces: Sequence[Path] = (),
    textures: Sequence[Path] = (),
) -> Iterator[DepthSample]:
    """``count`` stacks of a level, one scene each, of ``side`` x ``side`` pixels."""
    generator = StackGenerator(
        level.settings,
        topographies=read_topographies(surfaces) if surfaces else (),
        textures=read_textures(textures) if textures else (),
        seed=SEED,
    )
    for step in range(count):
        yield generator.batch(step, 1, level.frames or frames, side)


def measured(
    methods: Mapping[str, Method],
    datasets: Datasets,
    *,
    only_frames: Mapping[str, int] | None = None,
    pictures: Path | None = None,
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Errors of each method on each stack, and what was left out and why.

    Args:
        methods: functions of a sample of :func:`benchmarks.trained.in_focus_range`.
        datasets: names and samples.
        only_frames: number of frames of methods that take no other.
        pictures: folder for pictures of the errors.
    """
    left_out = []
    results: list[Result] = []
    pooled: list[Pooled] = []
    for name, samples in datasets:
        numbers = {sample.stack.shape[-3] for sample in samples}
        fitting = {}
        for method, run in methods.items():
            only = (only_frames or {}).get(method)
            if only is None or numbers <= {only}:
                fitting[method] = run
                continue
            counts = ", ".join(map(str, sorted(numbers)))
            reason = f"made for {only} frames, the stacks have {counts}"
            left_out.append({"method": method, "data": name, "reason": reason})
        if fitting:
            of_set = [(name, in_focus_range(samples))]
            found = evaluate(fitting, of_set, pictures=pictures, progress=True)
            results += found.results
            pooled += found.pooled
    return Evaluation(tuple(results), tuple(pooled)), left_out


def against_classical(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Errors of networks as shares of those of the best classical method, data set by data set.

    The best is that with the least mean over the stacks, found anew for each figure. Intervals hold
    95% of the shares on stacks drawn anew, with repetition, from those measured (bootstrap; the
    best is that on what is drawn). Data sets of fewer than eight stacks have none. Stacks in which
    no depth is known do not count.

    Returns:
        For each data set and network: ``data``, ``method``, and for "mae_frames" and "rmse_frames"
        the best classical method ``best``, the ``share`` and its ``interval``.
    """
    groups = evaluation.grouped()
    rows = []
    for data, method in groups:
        classical = [name for of, name in groups if of == data and name in METHODS]
        if method in METHODS or not classical:
            continue
        row: dict[str, Any] = {"data": data, "method": method}
        for figure in ("mae_frames", "rmse_frames"):
            table = torch.tensor(
                [
                    [getattr(result.frames, figure) for result in groups[data, name]]
                    for name in (method, *classical)
                ],
                dtype=torch.float64,
            )  # (1 + classical methods, stacks)
            row[figure] = _share(table[:, table.isfinite().all(0)], classical)
        rows.append(row)
    return rows


def _share(table: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Mean of the first row as a share of the least mean of the others, which have names."""
    stacks = table.shape[1]
    means = table.mean(1)
    found: dict[str, Any] = {
        "best": names[int(means[1:].argmin())],
        "share": float(means[0] / means[1:].min()),
        "interval": None,
    }
    if stacks >= _FEWEST_FOR_INTERVALS:
        drawn = torch.randint(
            stacks, (_DRAWS, stacks), generator=torch.Generator().manual_seed(SEED)
        )
        means = table[:, drawn].mean(2)  # (methods, draws)
        shares = means[0] / means[1:].min(0).values
        ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
        found["interval"] = shares.quantile(ends).tolist()
    return found


def figures(result: Result) -> dict[str, Any]:
    """A row of the JSON."""
    keys = ("depth", "frames", "ause", "rmse_left", "least_rmse_left")
    row = {"data": result.dataset, "method": result.method}
    return jsonable({**row, **{key: getattr(result, key) for key in keys}})


def report(means: list[Result], left_out: list[dict[str, Any]], note: str) -> None:
    """All figures, then those of the paper's tables beside the printed ones."""
    rows = [
        [
            r.dataset,
            NAMES_OF_TRAINED.get(r.method, r.method),
            _number(r.frames.mae_frames),
            *(_number(getattr(r.depth, key)) for key in COLUMNS),
        ]
        for r in means
    ]
    print(f"\nmean error in frames; the others with depth as {UNIT}")
    show(["data", "method", "frames", *COLUMNS.values()], rows)
    for entry in left_out:
        print(f"left out: {entry['method']} on {entry['data']}: {entry['reason']}")
    comparison = [r for r in means if r.dataset == TRAINED_ON]
    others = [r for r in means if r.dataset != TRAINED_ON]
    for title, printed, of_table in (
        ("Table 4, trained and tested on one kind of data", paper.TABLE_4, comparison),
        ("Table 5, trained and tested on one kind of data", paper.TABLE_5, comparison),
        ("Table 6, tested on other data than trained on", paper.TABLE_6, others),
    ):
        if of_table:
            print(f"\n{title}")
            show(*beside_printed(printed, of_table))
    print(f"\n{paper.DIFFERENCES['accuracy']}\nMeasured: {note}, depth as {UNIT}.")


def report_shares(shares: list[dict[str, Any]]) -> None:
    """Table of :func:`against_classical`; nothing where there is none."""
    if not shares:
        return
    print("\nerrors as shares of those of the best classical method, 95% intervals over the stacks")
    rows = [
        [row["data"], NAMES_OF_TRAINED.get(row["method"], row["method"])]
        + [
            text
            for found in (row["mae_frames"], row["rmse_frames"])
            for text in (with_interval(found, 3), found["best"])
        ]
        for row in shares
    ]
    show(["data", "method", "mean error", "best", "RMSE", "best"], rows)


def beside_printed(
    printed: Mapping[str, Mapping[str, paper.Errors]], means: list[Result]
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of the paper, the measured rows of each network below its printed.

    Args:
        printed: by data set and network.
        means: what was measured; methods that the paper's table does not have come last.
    """
    having = {key for rows in printed.values() for errors in rows.values() for key in errors}
    keys = [key for key in COLUMNS if key in having]
    methods = dict.fromkeys([*TRAINABLE, *(result.method for result in means)])
    rows = []
    for method in methods:
        shown = NAMES_OF_TRAINED.get(method, method)
        for dataset, errors in ((of, r[method]) for of, r in printed.items() if method in r):
            cells = [f"{errors[key]:g}" if key in errors else "" for key in keys]
            rows.append([shown, f"printed: {dataset}", *cells])
        for result in (r for r in means if r.method == method):
            cells = [_number(getattr(result.depth, key)) for key in keys]
            rows.append([shown, result.dataset, *cells])
    return ["", "data", *(COLUMNS[key] for key in keys)], rows


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def trained(
    names: list[str], recipe: Recipe, folder: Path, reading: Reading, device: str
) -> tuple[dict[str, Method], list[dict[str, Any]]]:
    """Networks by name, trained one after the other, and how their runs went."""
    methods: dict[str, Method] = {}
    configs = model_configs(recipe.frames)
    runs = []
    for name in names:
        print(f"{name}: training in {folder / name}", flush=True)
        try:
            spent = train_network(recipe, folder / name, configs[name], device=device)
        except FloatingPointError as error:  # the others shall be measured all the same
            runs.append({"network": name, "failed": str(error)})
            print(f"left out: {name}: {error}")
            continue
        runs.append({"network": name, **spent})
        methods[name] = method_of_network(trained_network(folder / name), reading, device)
    return methods, runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods",
        nargs="*",
        default=["rdf"],
        help=f"weights files or names, among them {', '.join(METHODS)}",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--train-steps", type=int, help="steps of the training of each network")
    budget.add_argument("--train-minutes", type=float, help="time of it, for each network")
    parser.add_argument("--networks", nargs="+", choices=TRAINABLE, default=list(TRAINABLE))
    parser.add_argument("--checkpoints", type=Path, default=FOLDER / "accuracy", help="folder")
    parser.add_argument("--loss", choices=("l1", "mse", "soft_target"), default="l1")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--crop", type=int, default=96, help="of training images, pixels")
    parser.add_argument("--reading", choices=("expectation", "search"), default="expectation")
    parser.add_argument("--seed", type=int, default=0, help="of weights and training data")
    parser.add_argument("--frames", type=int, default=16, help="of training, levels, Middlebury")
    parser.add_argument("--levels", nargs="*", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--count", type=int, default=48, help="stacks of each level")
    parser.add_argument("--side", type=int, default=192, help="of simulated images, pixels")
    parser.add_argument("--surfaces", nargs="*", type=Path, default=[], help="files, folders")
    parser.add_argument("--textures", nargs="*", type=Path, default=[], help="files, folders")
    parser.add_argument("--stacks", nargs="*", type=Path, default=[], help="folders with gt.npz")
    parser.add_argument("--middlebury", type=Path, help="folder of scenes, to render stacks from")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=Path, help="folder for pictures of the errors")
    parser.add_argument("--out", type=Path, help="folder of the result; benchmarks/results")
    options = parser.parse_args()
    trains = options.train_steps is not None or options.train_minutes is not None
    stems = [Path(name).stem for name in options.methods]
    refuse_same_names(parser, "methods", [*(options.networks if trains else ()), *stems])
    folders = [folder.name for folder in options.stacks]
    refuse_same_names(parser, "sets of stacks", [*options.levels, *folders])

    methods: dict[str, Method] = {}
    runs: list[dict[str, Any]] = []
    recipe: Recipe | None = None
    note = "weights as given"
    if trains:
        recipe = Recipe(
            options.train_steps,
            options.train_minutes,
            loss=options.loss,
            learning_rate=options.learning_rate,
            batch_size=options.batch_size,
            frames=options.frames,
            crop=options.crop,
            seed=options.seed,
        )
        methods, runs = trained(
            options.networks, recipe, options.checkpoints, options.reading, options.device
        )
        steps = ", ".join(f"{run['network']} {run['steps']}" for run in runs if "steps" in run)
        note = f"networks trained on the simulator, steps: {steps}; {options.frames} frames"
    only_frames = {name: options.frames for name in methods if name in NETWORKS and frames_of(name)}
    given = zip(stems, options.methods, strict=True)
    methods |= {stem: method_of(name, options.device) for stem, name in given}

    datasets: Datasets = []
    for name in options.levels:
        samples = level_samples(
            LEVELS[name],
            options.count,
            options.side,
            options.frames,
            options.surfaces,
            options.textures,
        )
        shown = tqdm(samples, desc=f"rendering {name}", total=options.count, unit="stack")
        datasets.append((name, list(shown)))
    datasets += [(folder.name, list(_all(FolderStacks(folder)))) for folder in options.stacks]
    if options.middlebury:
        pairs = MiddleburyPairs(options.middlebury, frames=options.frames)
        shown = tqdm(_all(pairs), desc="rendering Middlebury", total=len(pairs), unit="stack")
        datasets.append(("Middlebury, rendered", list(shown)))
    with torch.inference_mode():
        evaluation, left_out = measured(
            methods, datasets, only_frames=only_frames, pictures=options.pictures
        )
    means, shares = evaluation.means(), against_classical(evaluation)
    report(means, left_out, note)
    report_shares(shares)
    content = {
        **drawn_from(options),
        "unit": UNIT,
        "recipe": None if recipe is None else asdict(recipe),
        "reading": options.reading,
        "runs": runs,
        "means": [figures(result) for result in means],
        "pooled": jsonable(evaluation.pooled),
        "against_classical": jsonable(shares),
        "left_out": left_out,
    }
    name = "accuracy" if recipe is None else "accuracy_trained"
    print(f"\n{save(name, content, options.out)}")


def refuse_same_names(parser: argparse.ArgumentParser, what: str, names: Sequence[str]) -> None:
    """End with wrong usage where results of two would stand under one name."""
    try:
        require_distinct(names, what)
    except ValueError as error:
        parser.error(f"{error}: measure them one by one")


def drawn_from(options: argparse.Namespace) -> dict[str, Any]:
    """What the stacks of a level follow from, for the JSON; files without where they lie here."""

    def named(paths: Sequence[Path]) -> list[str]:
        return [f"{path.parent.name}/{path.name}" for path in map(Path.resolve, paths)]

    return {
        "seed": SEED,
        "count": options.count,
        "side": options.side,
        "frames": options.frames,
        "surfaces": named(options.surfaces),
        "textures": named(options.textures),
    }


def _all(dataset: FolderStacks | MiddleburyPairs) -> Iterator[DepthSample]:
    return (dataset[index] for index in range(len(dataset)))


if __name__ == "__main__":
    main()
