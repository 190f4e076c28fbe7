"""The one function that turns a focal stack into a height map."""

from __future__ import annotations

import math
import numbers
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache, reduce
from operator import add
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from gplws import _extension, tiling
from gplws.alignment import Alignment, align_frames, requested_alignment
from gplws.classical import (
    LOCAL_PART,
    STATISTICS_REACH,
    DepthFromFocus,
    StackStatistics,
    depth_from_focus,
    floats_per_pixel,
    part_statistics,
    position_at,
    receptive_radius,
    regularised,
)
from gplws.classical import METHODS as CLASSICAL_METHODS
from gplws.data import FocalStack
from gplws.devices import usable_device
from gplws.io import read_reconstruction, read_stack, save_reconstruction
from gplws.io.arrays import as_numpy
from gplws.io.meshes import DEFAULT_MAX_FACES
from gplws.io.readers import Positions, StackSource
from gplws.models import GPLWSNet, load_model, model_names
from gplws.models.classical_steps import CLASSICAL_STEPS, ClassicalStep
from gplws.models.frame_bins import bin_size
from gplws.models.prediction import network_output
from gplws.models.registry import load_weights
from gplws.ops.focus_search import focus_search
from gplws.positions import frame_index
from gplws.surface_texture import Form, surface_texture
from gplws.tiling import DEFAULT_MEMORY_MB, Tile

ZDirection = Literal["up", "down"]
Precision = Literal["float32", "bfloat16", "float16"]

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}

_EVERYWHERE = (slice(None), slice(None))

DEFAULT_METHOD = "rdf"
"""What ``method="auto"`` stands for: fast, and it says which pixels it cannot measure."""


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A reconstructed surface; arrays are numpy, or tensors where the stack was a tensor.

    Attributes:
        height: (H, W) float32 in ``units``, up is positive; NaN where invalid. Far from 0, as with
            absolute positions of a stage, it resolves no more than 1e-7 of its value.
        units: "um", or "frames" where the focus positions are unknown.
        depth_index: (H, W) float32, frame number in best focus, sub-frame; NaN where invalid.
        confidence: (H, W) float32 in 0..1; NaN where the method gives none.
        valid: (H, W) bool; False where nothing comes into focus.
        all_in_focus: (H, W) or (H, W, 3), dtype of the source: each pixel from its sharpest frame.
        pixel_size_um: side of a pixel, um, or None.
        metadata: versions, parameters and timings, as info.json holds them.
    """

    height: np.ndarray | Tensor
    units: str
    depth_index: np.ndarray | Tensor
    confidence: np.ndarray | Tensor
    valid: np.ndarray | Tensor
    all_in_focus: np.ndarray | Tensor
    pixel_size_um: float | None
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        rows, columns = self.height.shape
        share = float(np.mean(as_numpy(self.valid)))
        return (
            f"{type(self).__name__}({rows} x {columns} pixels, {100 * share:.1f}% valid, "
            f"heights in {self.units}, pixel_size_um={self.pixel_size_um})"
        )

    def surface_texture(self, *, form: Form = "plane") -> dict[str, float | None]:
        """Sa, Sq, Sz and more of ISO 25178-2, in ``units``; None where unknown.

        See :func:`gplws.surface_texture.surface_texture`. Slopes need heights in um and
        ``pixel_size_um``.

        Args:
            form: what is taken out first: "none", "plane" or "quadratic".
        """
        pixel_size = self.pixel_size_um if self.units == "um" else None
        return surface_texture(as_numpy(self.height), pixel_size, form=form)

    @classmethod
    def load(cls, folder: str | Path) -> Reconstruction:
        """A result that :meth:`save` wrote, to look at it again or to write other files of it.

        See :func:`gplws.io.read_reconstruction` for the errors.

        Example:
            >>> folder = gplws.reconstruct("stack_folder", z_step_um=2.0).save("result")
            >>> gplws.Reconstruction.load(folder).units
            'um'
        """
        return cls(**read_reconstruction(folder))

    def save(
        self,
        out_dir: str | Path,
        *,
        overwrite: bool = False,
        mesh: str | Sequence[str] | None = None,
        surface: str | Sequence[str] | None = None,
        max_faces: int = DEFAULT_MAX_FACES,
    ) -> Path:
        """Write height.tif, preview.png, all_in_focus.png, info.json and more into a folder.

        See :func:`gplws.io.save_reconstruction` for the files and errors.
        """
        return save_reconstruction(
            self, out_dir, overwrite=overwrite, mesh=mesh, surface=surface, max_faces=max_faces
        )


def reconstruct(
    stack: StackSource,
    *,
    z_step_um: float | None = None,
    focus_positions_um: Positions = None,
    pixel_size_um: float | None = None,
    z_direction: ZDirection = "up",
    axes: str | None = None,
    channel: int | None = None,
    image: int | str | None = None,
    align: str | Path | Alignment = "none",
    method: str | nn.Module = "auto",
    precision: Precision | None = None,
    device: str | torch.device = "auto",
    memory_mb: float = DEFAULT_MEMORY_MB,
    progress: bool = False,
) -> Reconstruction:
    """Height map, confidence and all-in-focus image of a focal stack.

    Args:
        stack: folder of images, multipage TIFF, file of a microscope, list of paths, array, tensor
            or :class:`~gplws.data.FocalStack`; see :func:`gplws.io.read_stack`.
        z_step_um: distance from frame to frame, um, > 0. Without it, without
            ``focus_positions_um`` and without metadata that says it, heights are in frames.
        focus_positions_um: (N,) heights of the plane in focus, um, strictly monotonic; excludes
            ``z_step_um``. "names": the one number in which the names of the frames' files differ.
        pixel_size_um: side of a pixel on the object, um, > 0; default: from the metadata.
        z_direction: "up" if the plane in focus rises from frame to frame, "down" if it sinks (the
            first frame shows the top in focus). Up is positive in the height map. The order of
            focus positions, given or from the metadata, says it already: with "up" they are
            heights, rising or falling; with "down" they are readings that grow as the plane
            sinks, and must rise.
        axes: one letter per axis of the array or file, such as "ZYX", where it is ambiguous.
        channel: number of the one that is taken of several channels or of RGB, from 0.
        image: number, from 0, or name of the one that is read of a file with several.
        align: registers the frames to each other first and cuts them to what all of them show:
            "none", "translation" (microscopes), "similarity" (macro lenses), "affine"; see
            :func:`gplws.align_frames`. Or an alignment that is known already: an
            :class:`~gplws.Alignment`, or info.json of an earlier result or its folder. Takes a
            copy of the stack, on the host.
        method: "auto", the name of a classical method ("rdf", "sml", "mdml", "tenengrad", "glv",
            "wavelet", "shearlet", "rr", "tft"; see :func:`gplws.classical.depth_from_focus`), the
            name of a network with weights ("gplws"), a ``.safetensors`` file of weights (of
            ``gplws export`` or :func:`gplws.models.save_weights`), or a network: a module with
            ``predict(stack, focus_positions)`` like those of :mod:`gplws.models`, with positions
            from that of the first frame on, or one that maps (1, 1, N, H, W) in 0..1, in the dtype
            of its parameters, to a focus volume (1, N, H, W) of logits; where its ``forward`` asks
            for ``focus_positions``, it is given them as (1, N). A network is moved to the device,
            where it stays, and is in eval mode meanwhile.
        precision: of a network that ``method`` names, "float32" (the default), "bfloat16" or, on a
            GPU, "float16". 16 bits move the depth of "gplws" by some 0.01 frames; they are faster
            on GPUs and on CPUs with AVX512-BF16. A module comes in its own precision.
        device: "auto" (the device of a tensor; else a GPU with compiled kernels, else the CPU), or
            any torch device.
        memory_mb: working memory that the method may take, MiB; larger images are cut into tiles.
            They overlap by the method's reach, so the result does not depend on it. A network that
            reaches far takes more where many frames leave room for little but overlap: "gplws" some
            30 MiB for each frame at least. The last step of "rr" takes some 100 bytes for each
            pixel of the image, whatever the limit.
        progress: show progress bars on stderr.

    Returns:
        The surface: numpy arrays, or tensors on the stack's device where ``stack`` is a tensor.

    Raises:
        ValueError: an argument is out of range or does not fit the stack; the message names it.
        TypeError: an argument has the wrong type.
        FileNotFoundError: a path does not exist.
        WeightsError: ``method`` names a network without weights; a ValueError.
        AlignmentError: the frames have too little in common, or ``align`` is of another stack; a
            ValueError.

    Example:
        >>> result = gplws.reconstruct("stack_folder", z_step_um=2.0, pixel_size_um=0.5)
        >>> folder = result.save("out")
    """
    check_options(z_direction, memory_mb)
    alignment = requested_alignment(align)
    place = resolve_device(device, stack)
    engine = engine_of(method, place, precision=precision, shared=True)

    started = time.perf_counter()
    focal_stack = read_stack(
        stack,
        axes=axes,
        channel=channel,
        image=image,
        z_step_um=z_step_um,
        focus_positions_um=focus_positions_um,
        pixel_size_um=pixel_size_um,
        progress=progress,
    )
    check_direction(focal_stack, z_direction)
    read = time.perf_counter()
    if isinstance(alignment, str):
        alignment = align_frames(focal_stack, alignment, progress=progress)
    if alignment is not None:
        focal_stack = alignment.apply(focal_stack)
    aligned = time.perf_counter()
    try:
        maps = reconstructed(focal_stack, engine, place, z_direction, memory_mb, progress)
    finally:
        engine.release()
    seconds = {"read": read - started, "reconstruct": time.perf_counter() - aligned}
    metadata = metadata_of(stack, focal_stack, engine, place, z_direction, seconds)
    if alignment is not None:
        seconds["align"] = aligned - read
        metadata["alignment"] = alignment.to_dict()
    return surface(maps, focal_stack, metadata, tensors=isinstance(stack, Tensor))


def check_options(z_direction: str, memory_mb: float) -> None:
    """Raise ValueError for what no stack could fit."""
    if z_direction not in ("up", "down"):
        raise ValueError(f"z_direction must be 'up' or 'down', got {z_direction!r}")
    if isinstance(memory_mb, bool) or not isinstance(memory_mb, numbers.Real):
        raise TypeError(f"memory_mb must be a number of MiB, got {memory_mb!r}")
    if not 0 < memory_mb < math.inf:
        raise ValueError(f"memory_mb must be positive and finite, got {memory_mb}")


def check_direction(stack: FocalStack, z_direction: ZDirection) -> None:
    """Raise ValueError where falling focus positions would be turned over once more."""
    positions = stack.focus_positions_um
    if z_direction == "down" and positions is not None and positions[-1] < positions[0]:
        raise ValueError(
            "z_direction must be 'up' where focus_positions_um fall, as they are heights and say "
            "themselves that the plane in focus sinks (pass the negatives of readings that grow "
            "downwards), got 'down'"
        )


def reconstructed(
    stack: FocalStack,
    engine: Engine,
    device: torch.device,
    z_direction: ZDirection,
    memory_mb: float,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The maps of a :class:`Reconstruction` by name, on the device of the frames."""
    search = StackSearch(stack, engine, device, memory_mb)
    title = f"gplws {engine.name}"
    with torch.inference_mode():
        with _progress_bar(search.n_parts, f"{title}: whole stack", progress) as advance:
            search.prepare(advance)
        with _progress_bar(search.n_tiles, title, progress) as advance:
            search.search(advance)
            engine.end_search()
            search.finish(advance)
    return search.maps(z_direction)


def surface(
    maps: dict[str, Tensor], stack: FocalStack, metadata: dict[str, Any], *, tensors: bool
) -> Reconstruction:
    """The result: numpy arrays, or the tensors themselves."""
    return Reconstruction(
        **{name: value if tensors else value.cpu().numpy() for name, value in maps.items()},
        units="frames" if stack.focus_positions_um is None else "um",
        pixel_size_um=stack.pixel_size_um,
        metadata=metadata,
    )


def metadata_of(
    source: StackSource,
    stack: FocalStack,
    engine: Engine,
    device: torch.device,
    z_direction: ZDirection,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """What info.json says of how a result was made."""
    path = str(source) if isinstance(source, str | Path) else type(source).__name__
    if isinstance(source, FocalStack):
        path = stack.metadata.get("source", path)
    return {
        "method": engine.name,
        "parameters": {
            "z_direction": z_direction,
            "focus_positions_um": stack.focus_positions_um,
            "n_frames": stack.n_frames,
            "device": str(device),
            **engine.parameters,
        },
        "source": {
            "path": path,
            **stack.metadata,
        },
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": seconds,
        "versions": _versions(),
    }


class _Part(NamedTuple):
    """What a method finds in a part of the image, (h, w) each."""

    depth: Tensor  # unit of the positions given to the method
    frame: Tensor  # int64, the frame with the highest response
    confidence: Tensor
    valid: Tensor  # bool
    guide: Tensor | None = None  # gray all-in-focus image, for methods that regularise


class Engine(Protocol):
    """A method bound to its parameters: it looks at a stack once, then searches tiles of it."""

    name: str
    parameters: dict[str, Any]  # for info.json
    reach: int | None  # pixels on each side that a pixel depends on; None: all of them
    alignment: int  # tiles start at multiples of it

    def floats_per_pixel(self, n_frames: int) -> float:
        """Working memory for each pixel of a tile, all frames together; once prepared."""

    def prepare(self, parts: Iterator[tuple[Tensor, Tile]]) -> None:
        """Gather what depends on the whole stack from tiles that form it and the frames (N, h, w)
        float32 that they see."""

    def search(self, frames: Tensor, positions: Tensor) -> _Part:
        """Find the focus in a tile (N, h, w) float32 that includes the pixels within reach."""

    last_steps: list[_LastStep]  # with the whole depth map; ``search`` finds frame numbers then
    capturable: bool  # ``search`` depends on nothing that the host reads from this stack but
    plan: int  # what ``prepare`` settles

    def end_search(self) -> None:
        """Free the working memory of ``search``: the last steps may take as much."""

    def regularise(self, found: _Part, positions: Tensor) -> _Part | None:
        """The whole image (H, W) once more, now that all tiles are known; None: as it is."""

    def release(self) -> None:
        """Leave a model that outlives the engine in its former mode and without working memory."""


class _LastStep:
    """What a classical method adds to the depth map of a network; in tiles of its own."""

    alignment = 1

    def __init__(self, step: ClassicalStep) -> None:
        self._step = step
        self.reach: int | None = step.reach
        self.statistics: StackStatistics | None = None

    def floats_per_pixel(self, n_frames: int) -> float:
        """Working memory for each pixel of a tile, all frames together."""
        return self._step.floats_per_pixel(n_frames)

    def apply(self, frames: Tensor, index: Tensor, confidence: Tensor, positions: Tensor) -> Tensor:
        """Frame numbers (h, w) from frames (N, h, w) and the frame numbers before."""
        assert self.statistics is not None
        return self._step.apply(frames, index, confidence, positions, self.statistics)


class _ClassicalEngine:
    alignment = 1
    capturable = False
    plan = 0

    def __init__(self, method: str) -> None:
        self.name = method
        self.parameters: dict[str, Any] = {}
        self.last_steps: list[_LastStep] = []
        self.reach: int | None = receptive_radius(method)
        self._statistics: StackStatistics | None = None

    def floats_per_pixel(self, n_frames: int) -> float:
        return floats_per_pixel(n_frames)

    def prepare(self, parts: Iterator[tuple[Tensor, Tile]]) -> None:
        self._statistics = _statistics(parts)

    def search(self, frames: Tensor, positions: Tensor) -> _Part:
        local = LOCAL_PART.get(self.name, self.name)
        found = depth_from_focus(frames, positions, method=local, statistics=self._statistics)
        if local == self.name:
            return _Part(found.depth, found.index, found.confidence, found.valid)
        # Regularisation works on frame numbers, and brings back depths.
        guide = frames.gather(0, found.index[None])[0]
        return _Part(found.depth_index, found.index, found.confidence, found.valid, guide)

    def end_search(self) -> None:
        pass

    def regularise(self, found: _Part, positions: Tensor) -> _Part | None:
        if found.guide is None:
            return None
        searched = DepthFromFocus(
            depth=found.depth,
            depth_index=found.depth,
            confidence=found.confidence,
            valid=found.valid,
            peak=found.confidence,
            index=found.frame,
        )
        smooth = regularised(searched, found.guide, positions)
        return _Part(smooth.depth, smooth.index, smooth.confidence, smooth.valid)

    def release(self) -> None:
        pass


def _statistics(parts: Iterator[tuple[Tensor, Tile]]) -> StackStatistics:
    """Statistics of the whole stack from its tiles and the frames that they see."""
    return reduce(add, (part_statistics(frames, tile.inner) for frames, tile in parts))


class _Prediction(Protocol):
    """What a network says of each pixel, (1, H, W) each."""

    @property
    def depth(self) -> Tensor: ...  # unit of the positions given to the network
    @property
    def index(self) -> Any: ...  # int64, frame in best focus; named tuples hide a method by it
    @property
    def confidence(self) -> Tensor: ...  # 0..1, NaN where the network gives none


class _Predicts(Protocol):
    """A network that reads its depth itself."""

    def predict(self, stack: Tensor, focus_positions: Tensor) -> _Prediction:
        """Depth of a stack (1, 1, N, H, W) with positions (N,)."""


class _ReadByFocusSearch:
    """Any other network: it maps a stack to a focus volume of logits, read by focus search."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self._model, self._name = model, name

    def predict(self, stack: Tensor, focus_positions: Tensor) -> _Prediction:
        volume = network_output(self._model, stack, focus_positions[None])
        expected = (1, *stack.shape[2:])
        if not isinstance(volume, Tensor) or tuple(volume.shape) != expected:
            got = tuple(volume.shape) if isinstance(volume, Tensor) else type(volume).__name__
            raise ValueError(
                f"method: {self._name} must return a focus volume (1, N, H, W) = {expected}, "
                f"got {got}"
            )
        return focus_search(volume.float(), focus_positions, log_scale=True)


class _NetworkEngine:
    capturable = True

    def __init__(
        self, model: nn.Module, name: str, device: torch.device, shared: bool = False
    ) -> None:
        self.name = name
        self.parameters: dict[str, Any] = {"network": type(model).__name__}
        self._model = model.to(device)
        self._modes: dict[nn.Module, bool] = {}  # of its parts, before the first stack
        self._is_shared = shared
        # Asked of the class: what torch.compile returns passes on attributes of the module inside,
        # and with them its forward that is not compiled.
        reads_itself = callable(getattr(type(model), "predict", None))
        self._reader: _Predicts = (
            cast(_Predicts, model) if reads_itself else _ReadByFocusSearch(model, name)
        )
        refines = reads_itself and getattr(model, "refines", False)
        self.last_steps = [_LastStep(step) for step in CLASSICAL_STEPS] if refines else []
        # A network of unknown reach sees the whole image at once.
        self.reach: int | None = getattr(model, "reach", None)
        self.alignment: int = getattr(model, "coarsest", 1)
        self._floats_per_voxel: float = getattr(model, "floats_per_voxel", 64.0)
        self.plan = 1  # frames that are averaged
        floating = (p.dtype for p in model.parameters() if p.dtype.is_floating_point)
        own = next(floating, torch.float32)
        self.parameters["precision"] = str(own).removeprefix("torch.")
        self._dtype = getattr(model, "input_dtype", own)

    def floats_per_pixel(self, n_frames: int) -> float:
        floats = self._floats_per_voxel * -(-n_frames // self.plan)
        floats *= self._dtype.itemsize / torch.float32.itemsize
        if self._dtype.itemsize < torch.float32.itemsize:
            # Beside the tile and the focus volume in 16 bits there are those in float32.
            floats += 2.0 * -(-n_frames // self.plan)
        return floats if self.plan == 1 else floats + n_frames

    def prepare(self, parts: Iterator[tuple[Tensor, Tile]]) -> None:
        if not self._modes:
            self._modes = {part: part.training for part in self._model.modules()}
        self._model.eval()
        if self.last_steps:
            statistics = _statistics(parts)
            for step in self.last_steps:
                step.statistics = statistics
            self.plan = bin_size(statistics)
            self.parameters["frames_averaged"] = self.plan

    def search(self, frames: Tensor, positions: Tensor) -> _Part:
        stack = frames[None, None].to(self._dtype)
        if self.last_steps:
            network = cast(GPLWSNet, self._reader)
            own = network.predict(stack, refine=False, bin_size=self.plan)
            valid = network.valid(own, frames.shape[0])[0]
            return _Part(own.depth[0], own.index[0], own.confidence[0], valid)
        found = self._reader.predict(stack, positions)
        depth, index, confidence = found.depth[0], found.index[0], found.confidence[0]
        return _Part(depth, index, confidence, depth.isfinite())

    def end_search(self) -> None:
        if isinstance(self._model, GPLWSNet):
            self._model.release_memory()

    def regularise(self, found: _Part, positions: Tensor) -> _Part | None:
        return None

    def release(self) -> None:
        for part, training in self._modes.items():
            part.training = training
        self._modes = {}
        if self._is_shared and isinstance(self._model, GPLWSNet):
            self._model.release_memory()


@lru_cache(maxsize=4)
def _shared_model(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The network with its own weights, read once for all calls of :func:`reconstruct`."""
    with torch.inference_mode(False):  # whatever the first caller works in
        return load_model(name, device=device).to(dtype)


def engine_of(
    method: str | nn.Module,
    device: torch.device,
    *,
    precision: Precision | None = None,
    shared: bool = False,
) -> Engine:
    """The method, bound to a device.

    ``shared``: a network with weights is the same object in every call, to be released in the end;
    else the engine has its own, which keeps its memory from stack to stack.

    Raises:
        ValueError: an unknown name or precision, or one that the method or device does not have.
        TypeError: neither a name nor a module.
        WeightsError: weights are missing, damaged or foreign; a ValueError.
    """
    if precision is not None and precision not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise ValueError(f"precision must be one of {known}, got {precision!r}")
    if isinstance(method, nn.Module):
        if precision is not None:
            raise ValueError("precision goes with a name or a file; a module has its own")
        return _NetworkEngine(method, type(method).__name__, device)
    if not isinstance(method, str):
        raise TypeError(f"method must be a name or a module, got {type(method).__name__}")
    name = DEFAULT_METHOD if method == "auto" else method
    if name in CLASSICAL_METHODS:
        if precision not in (None, "float32"):
            raise ValueError(f"precision of method {name!r} is float32, got {precision!r}")
        return _ClassicalEngine(name)
    if name.endswith(".safetensors"):
        return _NetworkEngine(network_of_file(name, device, precision), Path(name).stem, device)
    if name in model_names():
        dtype = _dtype_of(precision, device)
        model = _shared_model(name, device, dtype) if shared else load_model(name).to(dtype)
        return _NetworkEngine(model, name, device, shared)
    known = ", ".join(["auto", *CLASSICAL_METHODS, *model_names(), "a .safetensors file"])
    raise ValueError(f"method must be one of {known}, got {method!r}")


def network_of_file(
    path: str | Path, device: torch.device, precision: Precision | None = None
) -> nn.Module:
    """The network of a ``.safetensors`` file in a precision that the device has kernels for."""
    return load_weights(path).to(_dtype_of(precision, device))


def _dtype_of(precision: Precision | None, device: torch.device) -> torch.dtype:
    if precision == "float16" and device.type == "cpu":
        raise ValueError("precision float16 needs a GPU; on the CPU there is bfloat16")
    return cast(torch.dtype, getattr(torch, precision or "float32"))


def resolve_device(device: str | torch.device, stack: object) -> torch.device:
    """Where a stack is computed: "auto" is the device of a tensor, else a GPU with kernels, if any.

    Raises:
        ValueError: a device that cannot be used.
    """
    if isinstance(device, str) and device == "auto":
        frames = stack.frames if isinstance(stack, FocalStack) else stack
        if isinstance(frames, Tensor):
            return frames.device
        has_kernels = torch.cuda.is_available() and _extension.build_info()["cuda"]
        return torch.device("cuda" if has_kernels else "cpu")
    return usable_device(device)


class _Found(NamedTuple):
    """What a method finds in the whole image, (H, W) each."""

    depth: Tensor
    confidence: Tensor
    valid: Tensor
    all_in_focus: Tensor


class StackSearch:
    """What a method does with one stack, step by step: :meth:`prepare`, :meth:`search` and
    :meth:`finish` in inference mode, then :meth:`maps`.

    It may be repeated where the frames are overwritten by others. :meth:`search` waits for no
    result where the engine is ``capturable``, so that a CUDA graph can hold it.

    Args:
        stack: its frames decide where the results are.
        engine: the method.
        device: where it computes.
        memory_mb: working memory, MiB.
    """

    def __init__(
        self, stack: FocalStack, engine: Engine, device: torch.device, memory_mb: float
    ) -> None:
        self._stack, self._engine, self._device = stack, engine, device
        self._memory_mb = memory_mb
        frames = stack.frames if isinstance(stack.frames, Tensor) else None
        self._home = torch.device("cpu") if frames is None else frames.device
        # From the first frame on: float32 would not tell absolute positions of a stage apart.
        self._start = 0.0
        self._known: np.ndarray | None = None
        self._positions = torch.empty(stack.n_frames, dtype=torch.float32, device=device)
        self._levels = torch.empty(2, dtype=torch.float32, device=self._home)
        self.set_scales(stack.focus_positions_um, stack.levels)
        self._parts = _parts(stack, memory_mb)
        self._tiles: list[Tile] = []
        self._last_tiles: list[list[Tile]] = []  # of each last step
        shape = (stack.height, stack.width)
        self._found = _Found(
            depth=torch.empty(shape, dtype=torch.float32, device=self._home),
            confidence=torch.empty(shape, dtype=torch.float32, device=self._home),
            valid=torch.empty(shape, dtype=torch.bool, device=self._home),
            all_in_focus=_like_frames(stack),
        )
        self._whole: _Part | None = None  # of methods that regularise

    @property
    def n_parts(self) -> int:
        """How often :meth:`prepare` tells of its progress."""
        return len(self._parts)

    @property
    def n_tiles(self) -> int:
        """How often :meth:`search` and :meth:`finish` tell of their progress; once prepared."""
        return len(self._tiles) + sum(map(len, self._last_tiles))

    def set_scales(
        self, focus_positions_um: np.ndarray | None, levels: tuple[float, float]
    ) -> None:
        """Focus positions (N,) of the frames, um, None: unknown; and their levels."""
        if focus_positions_um is None:
            self._start, self._known = 0.0, None
            distances = np.arange(self._stack.n_frames)
        else:
            self._start = float(focus_positions_um[0])
            distances = self._known = focus_positions_um - focus_positions_um[0]
        self._positions.copy_(torch.tensor(distances, dtype=torch.float32))
        self._levels.copy_(torch.tensor(levels))

    @property
    def plan(self) -> int:
        """A recorded :meth:`search` fits as long as this is the same."""
        return self._engine.plan

    def prepare(self, advance: Callable[[], None] = lambda: None) -> None:
        """Gather what depends on the whole stack."""
        stack, engine = self._stack, self._engine

        def parts() -> Iterator[tuple[Tensor, Tile]]:
            for tile in self._parts:
                yield self._gray(*tile.seen), tile
                advance()

        engine.prepare(parts())
        self._tiles = _tiles(stack, engine, self._memory_mb)
        self._last_tiles = [_tiles(stack, step, self._memory_mb) for step in engine.last_steps]

    def search(self, advance: Callable[[], None] = lambda: None) -> None:
        """Search all tiles."""
        found, home, engine = self._found, self._home, self._engine
        for tile in self._tiles:
            part = engine.search(self._gray(*tile.seen), self._positions)
            inner, given = tile.inner, tile.given
            found.valid[given] = part.valid[inner].to(home)
            depth = part.depth
            if not engine.last_steps:  # which also look at what lies around
                depth = depth.where(part.valid, torch.nan)
            found.depth[given] = depth[inner].to(home)
            found.confidence[given] = part.confidence[inner].to(home)
            found.all_in_focus[given] = _sharpest(self._stack, given, part.frame[inner].to(home))
            if part.guide is not None:
                maps = cast(tuple[Tensor, ...], tuple(part))
                if self._whole is None:
                    shape = found.depth.shape
                    self._whole = _Part(*(values.new_empty(shape) for values in maps))
                for values, target in zip(maps, cast(Any, self._whole), strict=True):
                    target[given] = values[inner]
            del part, depth  # before the next tile is searched
            advance()

    def finish(self, advance: Callable[[], None] = lambda: None) -> None:
        """The last steps of methods that have some."""
        found = self._found
        if self._whole is not None:
            _regularise(self._stack, self._engine, self._positions, self._whole, found)
        steps = self._engine.last_steps
        if not steps:
            return
        index = found.depth.nan_to_num(0)
        for step, its_tiles in zip(steps, self._last_tiles, strict=True):
            before = index.clone()  # tiles overlap
            for tile in its_tiles:
                index[tile.given] = self._after(step, tile, before)
                advance()
        beyond = index.isnan()
        found.valid.logical_and_(~beyond)
        found.confidence.masked_fill_(beyond, 0)
        index = torch.where(beyond, found.depth.nan_to_num(0), index)
        found.all_in_focus.copy_(_sharpest(self._stack, _EVERYWHERE, index.round().long()))
        depth = position_at(self._positions, index.to(self._device)).to(index.device)
        found.depth.copy_(depth.where(found.valid, torch.nan))

    def _after(self, step: _LastStep, tile: Tile, index: Tensor) -> Tensor:
        """Frame numbers of a tile after a last step, from those of the whole image (H, W)."""
        seen = tile.seen
        nearby, confidence = (
            values[seen].to(self._device) for values in (index, self._found.confidence)
        )
        changed = step.apply(self._gray(*seen), nearby, confidence, self._positions)
        return changed[tile.inner].to(index.device)

    def _gray(self, rows: slice, columns: slice = slice(None)) -> Tensor:
        """Gray frames of a rectangle, where the method computes."""
        return self._stack.gray(rows, columns, self._levels).to(self._device)

    def maps(self, z_direction: ZDirection) -> dict[str, Tensor]:
        """What was found, under the names of :class:`Reconstruction`; some of it is not copied."""
        found = self._found
        depth = found.depth
        if self._start != 0:
            depth = (depth.to(torch.float64) + self._start).to(torch.float32)
        return {
            "height": (1.0 if z_direction == "up" else -1.0) * depth,
            "depth_index": _frame_number(found.depth, self._known),
            "confidence": found.confidence,
            "valid": found.valid,
            "all_in_focus": found.all_in_focus,
        }


def _regularise(
    stack: FocalStack, engine: Engine, positions: Tensor, searched: _Part, found: _Found
) -> None:
    """Puts depth and all-in-focus image in ``found`` after the last step of the method."""
    result = engine.regularise(searched, positions)
    if result is None:
        return
    home = found.depth.device
    found.depth.copy_(torch.where(result.valid, result.depth, torch.nan))
    found.all_in_focus.copy_(_sharpest(stack, _EVERYWHERE, result.frame.to(home)))


def _pixels(floats: float, memory_mb: float) -> int:
    """Pixels, of ``floats`` of working memory each, that may be worked on at a time."""
    return int(memory_mb * 2**20 / (4 * floats))


def _tiles(stack: FocalStack, engine: Engine | _LastStep, memory_mb: float) -> list[Tile]:
    """Tiles of the image that a method can take."""
    pixels = _pixels(engine.floats_per_pixel(stack.n_frames), memory_mb)
    return tiling.tiles(stack.height, stack.width, pixels, engine.reach, engine.alignment)


def _parts(stack: FocalStack, memory_mb: float) -> list[Tile]:
    """Tiles of the image in which statistics of the whole stack are gathered.

    They take less for each pixel than the search of the classical methods.
    """
    pixels = _pixels(floats_per_pixel(stack.n_frames), memory_mb)
    return tiling.tiles(stack.height, stack.width, pixels, STATISTICS_REACH)


def _like_frames(stack: FocalStack) -> Tensor:
    """An uninitialised image of the size, dtype and device of one frame."""
    frame = stack.frames[0]
    if isinstance(frame, Tensor):
        return torch.empty_like(frame, memory_format=torch.contiguous_format)
    native = np.empty(frame.shape, frame.dtype.newbyteorder("="))
    return torch.from_numpy(native)


def _sharpest(stack: FocalStack, place: tuple[slice, slice], index: Tensor) -> Tensor:
    """Each pixel of a rectangle from the frame ``index`` (h, w); dtype of the source."""
    rows, columns = place
    frames = stack.frames[:, rows, columns]
    if isinstance(frames, Tensor):
        chosen = index.view(1, *index.shape, *[1] * (frames.ndim - 3)).expand(1, *frames.shape[1:])
        # Not all devices gather unsigned integers of more than 8 bits; bits are bits.
        signed = _SIGNED.get(frames.dtype, frames.dtype)
        return frames.view(signed).gather(0, chosen)[0].view(frames.dtype)
    wanted = index.numpy()[None]
    wanted = wanted[..., None] if frames.ndim == 4 else wanted
    picked = np.take_along_axis(frames, wanted, 0)[0]
    return torch.from_numpy(picked.astype(picked.dtype.newbyteorder("="), copy=False))


_ROUNDING = 1e-12  # of positions in float64


def _frame_number(depth: Tensor, positions_um: np.ndarray | None) -> Tensor:
    """Sub-frame number of a focus position, by interpolation between the frames' positions."""
    if positions_um is None:
        return depth.clone()
    last = len(positions_um) - 1
    step = (positions_um[-1] - positions_um[0]) / last
    even = positions_um[0] + step * np.arange(last + 1)
    if np.abs(positions_um - even).max() <= _ROUNDING * abs(positions_um).max():
        # What rounding of float32 depths moves is more.
        return ((depth.to(torch.float64) - positions_um[0]) / step).clamp_(0, last).float()
    known = torch.from_numpy(positions_um.astype(np.float64)).to(depth.device)
    return frame_index(depth.to(torch.float64), known, extrapolate=True).clamp_(0, last).float()


@contextmanager
def _progress_bar(total: int, title: str, shown: bool) -> Iterator[Callable[[], None]]:
    if not shown:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=title, unit="tile", leave=False) as bar:
        yield lambda: bar.update() and None


def _versions() -> dict[str, Any]:
    info = _extension.build_info()
    return {
        "gplws": info["version"],
        "commit": info["commit"],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "cpu_isa": info["cpu_isa"],
        "cuda": info["cuda"],
    }
