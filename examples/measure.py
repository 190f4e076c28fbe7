"""From a folder of microscope frames to a height map, its roughness, a mesh and a surface file.

python examples/measure.py frames/ out/ --z-step 2.0 --pixel-size 0.5
"""

import argparse
from pathlib import Path

import gplws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("frames", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--z-step", type=float, required=True, help="um from frame to frame")
    parser.add_argument("--pixel-size", type=float, required=True, help="um on the object")
    options = parser.parse_args()

    result = gplws.reconstruct(
        options.frames,
        z_step_um=options.z_step,
        pixel_size_um=options.pixel_size,
        align="translation",  # the stage drifts; "none" where it does not
        method="gplws",
        progress=True,
    )
    result.save(options.out, mesh="ply")

    print(f"{100 * result.valid.mean():.1f}% of {result.height.shape} pixels measured")
    for form in ("plane", "quadratic"):  # the tilt, or the curvature as well, is no roughness
        texture = result.surface_texture(form=form)
        print(
            form, *(f"{name} {value:.3g}" for name, value in texture.items() if value is not None)
        )


if __name__ == "__main__":
    main()
