"""The paper's ablation, Tables 1 to 3: connections x modules, re-parameterised or plain.

Each variant is the network with one or two of its choices changed:

    connection  add (the network) or concat, with a 1x1x1 conv back to the width
    module      3x3x3 convs in 4 groups (group parallel), dense (conv) or depthwise; then 1x1x1
    form        three branches in training (reparameterised) or one conv with batch norm (plain)

Parameters are those at inference as the paper counts them, with the batch norms behind the 1x1x1
convs. GMAC counts the multiplications of all convs. Seconds are those of the kernels ("gplws") and
of stock torch, all variants taking turns in one run. Then each variant is trained on the simulator
with one recipe and the same batches, and measured on stacks of other seeds; a short training tells
large differences from small ones and no more, and --seeds 0 1 2 shows how much is chance.

Each stage is written to the JSON as soon as it is done; --resume goes on from there, and trainings
go on from their checkpoints in any case. Rows of the earlier run that --variants leaves out stay;
where times are missing or of another shape, all rows are timed anew.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import paper
from benchmarks.accuracy import LEVELS, SEED, TRAINED_ON, figures, level_samples, measured
from benchmarks.networks import in_channels_last, with_statistics
from benchmarks.summary import medians, shape_name
from benchmarks.timing import introduce, resumed_rows, save, show
from benchmarks.trained import FOLDER, Recipe, method_of_network, train_network, trained_network
from gplws.benchmark import take_turns
from gplws.models import GPLWSNet
from gplws.training_config import ModelConfig

MODULES: dict[str, int | str] = {"group parallel": 4, "conv": 1, "depthwise": "depthwise"}
"""Groups of the 3x3x3 convs of a module."""


@dataclass(frozen=True)
class Variant:
    """One network of the ablation.

    Attributes:
        connection: "add" or "concat".
        module: one of :data:`MODULES`.
        form: "reparameterised" or "plain".
    """

    connection: str = "add"
    module: str = "group parallel"
    form: str = "reparameterised"

    @property
    def name(self) -> str:
        """For tables, results and folders."""
        return ", ".join([self.connection, self.module, self.form])

    @property
    def arguments(self) -> dict[str, Any]:
        """Of :class:`gplws.models.GPLWSNet`."""
        return {"skip": self.connection, "groups": MODULES[self.module], "form": self.form}

    def printed(self) -> dict[int, paper.Ablation]:
        """What the paper prints of it, by table."""
        found = {}
        if (self.module, self.form) == ("group parallel", "reparameterised"):
            found[1] = paper.TABLE_1[self.connection]
        if self.form == "reparameterised":
            found[2] = paper.TABLE_2[self.connection, self.module]
        if (self.connection, self.module) == ("add", "group parallel"):
            found[3] = paper.TABLE_3[self.form]
        return found


VARIANTS = (
    Variant(),
    Variant(connection="concat"),
    Variant(form="plain"),
    Variant(module="conv"),
    Variant(module="depthwise"),
    Variant(connection="concat", module="conv"),
    Variant(connection="concat", module="depthwise"),
)

DEFAULT_STEPS = 600  # 0.7 s each on two AVX-512 cores: all variants in less than an hour
ENGINES = ("gplws", "eager", "eager channels_last")


def network(variant: Variant) -> GPLWSNet:
    """A variant in training form and eval mode, with random but lively weights."""
    torch.manual_seed(0)
    model = GPLWSNet(**variant.arguments)
    with_statistics(model)
    return model


def counts(variant: Variant, size: tuple[int, int, int]) -> dict[str, Any]:
    """Parameters at inference and in training, and multiplications of the convs for one stack."""
    with torch.device("meta"):
        training = GPLWSNet(**variant.arguments)
        stack = torch.empty(1, training.in_channels, *size)
    inference = training.reparameterise()
    return {
        "parameters": sum(p.numel() for p in inference.parameters()),
        "training_parameters": sum(p.numel() for p in training.parameters()),
        "gmac": multiplications(inference, stack) / 1e9,
    }


def multiplications(model: nn.Module, stack: torch.Tensor) -> int:
    """Of all convs and matrix products in one pass; tensors may be on "meta"."""
    # It counts an addition for each multiplication, and nothing for batch norms.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(stack)
    return counter.get_total_flops() // 2


def latencies(
    variants: Sequence[Variant], size: tuple[int, int, int], engines: Sequence[str], seconds: float
) -> dict[str, dict[str, list[float]]]:
    """Times of all variants on all engines, taking turns; by name and engine."""
    torch.manual_seed(1)
    stack = torch.rand(1, 3, *size)
    last = stack.contiguous(memory_format=torch.channels_last_3d)
    runs: dict[str, Callable[[], object]] = {}
    for variant in variants:
        trained = network(variant)
        for engine in engines:
            if engine == "gplws":
                model, given = trained.fuse(), stack
            elif engine == "eager":
                model, given = trained.reparameterise(), stack
            else:
                model, given = in_channels_last(trained.reparameterise()), last
            runs[f"{variant.name}: {engine}"] = partial(model, given)
    with torch.inference_mode():
        times = take_turns(runs, seconds=seconds)
    return {v.name: {e: times[f"{v.name}: {e}"] for e in engines} for v in variants}


def measure_training(
    variant: Variant, recipe: Recipe, folder: Path, count: int, side: int
) -> dict[str, Any]:
    """Train a variant and measure it on stacks of other seeds.

    Returns:
        ``steps``, ``minutes`` and the figures of :func:`benchmarks.accuracy.figures`.
    """
    spent = train_network(recipe, folder, ModelConfig("gplws", variant.arguments))
    samples = list(level_samples(LEVELS[TRAINED_ON], count, side, recipe.frames))
    methods = {variant.name: method_of_network(trained_network(folder))}
    evaluation, _ = measured(methods, [(TRAINED_ON, samples)])
    (mean,) = evaluation.means()
    found = figures(mean)
    return {"seed": recipe.seed, **spent, "depth": found["depth"], "frames": found["frames"]}


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the printed table: measured figures, the paper's in brackets."""
    engines = list(dict.fromkeys(engine for row in rows for engine in row.get("seconds", {})))
    is_trained = any(row.get("trained") for row in rows)
    head = ["variant", "table", "parameters", "GMAC", *(f"{engine}, s" for engine in engines)]
    head += ["MSE", "error, frames"] if is_trained else []
    head += ["printed parameters", "printed s", "printed MSE"]
    lines = []
    for row in rows:
        seconds = medians(row.get("seconds", {}))
        measured_cells = [f"{row['parameters']:,}", f"{row['gmac']:.2f}"]
        measured_cells += [f"{seconds[e]:.3f}" if e in seconds else "" for e in engines]
        if is_trained:
            runs = row.get("trained", [])
            measured_cells += [
                _mean_and_range([run["depth"]["mse"] for run in runs]),
                _mean_and_range([run["frames"]["mae_frames"] for run in runs]),
            ]
        # One row of the network stands for all tables that print it.
        for number, (of_table, printed) in enumerate(row["printed"].items()):
            cells = [""] * len(measured_cells) if number else measured_cells
            name = "" if number else row["variant"]
            of_paper = [f"{printed['parameters']:,}", f"{printed['seconds']:.3f}"]
            lines.append([name, of_table, *cells, *of_paper, f"{printed['mse']:.4f}"])
    return head, lines


def _mean_and_range(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--variants", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument(
        "--shape", type=int, nargs=3, default=(10, 256, 256), metavar=("N", "H", "W")
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=("gplws", ENGINES[2]))
    parser.add_argument("--seconds", type=float, default=50.0, help="of all timings, roughly")
    parser.add_argument("--no-latency", action="store_true", help="leave the timings out")
    parser.add_argument("--no-training", action="store_true", help="what needs no training, only")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, help=f"of each training; default: {DEFAULT_STEPS}")
    budget.add_argument("--minutes", type=float, help="of each training, in place of --steps")
    parser.add_argument("--loss", choices=("l1", "mse", "soft_target"), default="l1")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--crop", type=int, default=64, help="of training images, pixels")
    parser.add_argument("--frames", type=int, default=10, help="of training and test stacks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and data")
    parser.add_argument("--count", type=int, default=24, help="stacks of the test")
    parser.add_argument("--side", type=int, default=128, help="of test images, pixels")
    parser.add_argument("--checkpoints", type=Path, default=FOLDER / "ablation", help="folder")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run")
    parser.add_argument("--out", type=Path, help="folder of the result; benchmarks/results")
    options = parser.parse_args()
    introduce()
    size = (options.shape[0], options.shape[1], options.shape[2])
    earlier = resumed_rows("ablation", options.out) if options.resume else []
    by_name = {row["variant"]: row for row in earlier}
    variants = [v for v in VARIANTS if v.name in options.variants or v.name in by_name]
    rows: list[dict[str, Any]] = [
        {
            **by_name.get(variant.name, {}),
            "variant": variant.name,
            "printed": {str(of): row._asdict() for of, row in variant.printed().items()},
            **counts(variant, size),
        }
        for variant in variants
    ]
    shape = shape_name(size)
    for row in rows:
        if row.get("shape") != shape:
            row.pop("shape", None)
            row.pop("seconds", None)
    steps = DEFAULT_STEPS if options.steps is None and options.minutes is None else options.steps
    recipes = [
        Recipe(
            steps,
            options.minutes,
            loss=options.loss,
            learning_rate=options.learning_rate,
            batch_size=options.batch_size,
            frames=options.frames,
            crop=options.crop,
            seed=seed,
        )
        for seed in options.seeds
    ]
    # The seed is that of the run; a training of another recipe does not count as done.
    recipe = {key: value for key, value in asdict(recipes[0]).items() if key != "seed"}
    recipe |= {"count": options.count, "side": options.side}
    others = [row for row in rows if row["variant"] not in options.variants]
    if not options.no_training and any(row.get("recipe", recipe) != recipe for row in others):
        raise SystemExit(
            "ablation.json has errors of another recipe, of variants that --variants leaves out: "
            "ask for all of them, or give another folder by --out"
        )

    def write() -> Path:
        content = {"shape": shape, "seed": SEED, "rows": rows}
        return save("ablation", content, options.out)

    same_times = all(set(options.engines) <= set(row.get("seconds", {})) for row in rows)
    if not options.no_latency and not same_times:
        times = latencies(variants, size, options.engines, options.seconds)
        for row in rows:
            row |= {"shape": shape, "seconds": times[row["variant"]]}
    write()
    if not options.no_training:
        asked = [
            (variant, row)
            for variant, row in zip(variants, rows, strict=True)
            if variant.name in options.variants
        ]
        for _, row in asked:
            if row.get("recipe") != recipe:
                row |= {"recipe": recipe, "trained": []}
        # Seed by seed, so that all variants are there early.
        for one in recipes:
            for variant, row in asked:
                if any(run["seed"] == one.seed for run in row["trained"]):
                    continue
                folder = options.checkpoints / variant.name.replace(", ", "_").replace(" ", "-")
                folder = folder / f"seed_{one.seed}"
                print(f"{variant.name}, seed {one.seed}: training in {folder}", flush=True)
                run = measure_training(variant, one, folder, options.count, options.side)
                row["trained"].append(run)
                write()
    path = write()
    print(f"\n{shape}; {note(rows)}")
    show(*table(rows))
    print(f"\n{paper.DIFFERENCES['ablation']}\n{path}")


def note(rows: Sequence[dict[str, Any]]) -> str:
    """What the measured errors are of."""
    trained = [row for row in rows if row.get("trained")]
    if not trained:
        return "no training"
    runs = [run for row in trained for run in row["trained"]]
    recipe = trained[0]["recipe"]
    steps = sorted({run["steps"] for run in runs})
    length = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    seeds = sorted({run["seed"] for run in runs})
    return (
        f"errors after {length} steps of {recipe['batch_size']} simulated stacks "
        f"{recipe['frames']}x{recipe['crop']}x{recipe['crop']}, loss {recipe['loss']}, "
        f"seeds {', '.join(map(str, seeds))}, on {recipe['count']} other stacks; MSE with depth as "
        f"share of the focus range"
    )


if __name__ == "__main__":
    main()
