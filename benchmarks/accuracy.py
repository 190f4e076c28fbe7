"""Errors of methods in frames: simulated stacks of rising difficulty, and stacks with known depth.

The simulated levels have fixed seeds. Give surfaces and pictures that no weights have seen by
--surfaces and --textures; without them all surfaces and textures are drawn by the simulator, from
other seeds than training uses. Levels:

    easy      full contrast, little noise
    weak      a few grey levels of texture
    noisy     few electrons for each pixel
    wide      blur of 30 to 60 pixels in total, materials of very different brightness
    specular  highlights
    steep     tall surfaces: slopes of several frames a pixel, deep holes
    few       5 frames
    many      40 frames
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import save
from gplws.data import DepthSample
from gplws.data.generator import StackGenerator, StackSettings
from gplws.data.topographies import read_textures, read_topographies
from gplws.datasets import FolderStacks
from gplws.evaluation import evaluate

SEED = 7_000_000  # far from those of training and validation
CALM = StackSettings(
    blur_per_frame_px=(0.5, 2.0),
    texture_contrast=(0.3, 1.0),
    full_well_electrons=(8_000.0, 40_000.0),
    read_noise_electrons=(1.0, 5.0),
    bit_depths=(8, 12),
    relief=(0.4, 0.95),
    out_of_range=0.0,
    strong_materials=0.1,
    gloss=0.0,
    jpeg=0.0,
)


@dataclass(frozen=True)
class Level:
    """What a level draws."""

    settings: StackSettings
    frames: int = 16


LEVELS = {
    "easy": Level(CALM),
    "weak": Level(replace(CALM, texture_contrast=(0.01, 0.05), residual_blur_px=(0.4, 0.9))),
    "noisy": Level(
        replace(CALM, full_well_electrons=(200.0, 1_000.0), read_noise_electrons=(5.0, 20.0))
    ),
    "wide": Level(
        replace(
            CALM,
            total_blur_px=(30.0, 60.0),
            blur_per_frame_px=(1.0, 6.0),
            two_materials=1.0,
            strong_materials=1.0,
        )
    ),
    "specular": Level(replace(CALM, gloss=1.0, lights=("ring", "oblique"))),
    "steep": Level(
        replace(CALM, surfaces=("steps", "holes", "spheres", "grooves"), measured_share=0.0)
    ),
    "few": Level(CALM, frames=5),
    "many": Level(replace(CALM, blur_per_frame_px=(0.3, 1.0)), frames=40),
}


def level_samples(
    level: Level, count: int, side: int, surfaces: list[Path], textures: list[Path]
) -> Iterator[DepthSample]:
    """``count`` stacks of a level, one scene each, of ``side`` x ``side`` pixels."""
    generator = StackGenerator(
        level.settings,
        topographies=read_topographies(surfaces) if surfaces else (),
        textures=read_textures(textures) if textures else (),
        seed=SEED,
    )
    for step in range(count):
        yield generator.batch(step, 1, level.frames, side)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=["rdf"], help="names or weights files")
    parser.add_argument("--levels", nargs="*", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--count", type=int, default=12, help="stacks of each level")
    parser.add_argument("--side", type=int, default=192, help="of simulated images, pixels")
    parser.add_argument("--surfaces", nargs="*", type=Path, default=[], help="files, folders")
    parser.add_argument("--textures", nargs="*", type=Path, default=[], help="files, folders")
    parser.add_argument("--stacks", nargs="*", type=Path, default=[], help="folders with gt.npz")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=Path, help="folder for pictures of the errors")
    parser.add_argument("--out", type=Path, help="folder of the result; benchmarks/results")
    options = parser.parse_args()
    methods: dict[str, Any] = {Path(name).stem: name for name in options.methods}
    datasets: list[tuple[str, Any]] = [
        (
            name,
            level_samples(
                LEVELS[name], options.count, options.side, options.surfaces, options.textures
            ),
        )
        for name in options.levels
    ]
    datasets += [(folder.name, FolderStacks(folder)) for folder in options.stacks]
    with torch.inference_mode():
        found = evaluate(
            methods, datasets, device=options.device, pictures=options.pictures, progress=True
        )
    print(found.table())
    means = [
        {
            "data": result.dataset,
            "method": result.method,
            "frames": asdict(result.frames),
            "ause": result.ause,
        }
        for result in found.means()
    ]
    print(save("accuracy", {"seed": SEED, "count": options.count, "means": means}, options.out))


if __name__ == "__main__":
    main()
