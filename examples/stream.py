"""Height maps of parts that pass a camera one after the other, each judged by its depth.

python examples/stream.py --parts 5
"""

import argparse
from collections.abc import Iterator

import numpy as np

import gplws
from gplws.data import SceneSettings, simulate_stack


def camera(parts: int) -> Iterator[np.ndarray]:
    """Stands for a camera: one stack (N, H, W) uint8 for each part, the third with deeper holes."""
    for number in range(parts):
        relief = 30.0 if number == 2 else 20.0
        scene = SceneSettings(
            surface="holes", texture="grain", height=128, width=128, frames=12,
            z_step_um=4.0, relief_um=relief, seed=number,
        )  # fmt: skip
        yield simulate_stack(scene).frames.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=int, default=5)
    options = parser.parse_args()

    # While one part is computed, the next one is already asked for.
    for result in gplws.reconstruct_stream(camera(options.parts), z_step_um=4.0):
        low, high = np.nanpercentile(result.height, (2, 98))
        number, latency = result.metadata["number"], result.metadata["seconds"]["latency"]
        verdict = "REJECT" if high - low > 25 else "ok"
        print(f"part {number}: {high - low:.1f} um deep, {verdict}, after {latency:.2f} s")


if __name__ == "__main__":
    main()
