from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from networks import mean_error
from torch import nn
from toy_data import (
    ConvNet,
    PairedSource,
    StopAfter,
    ToySource,
    TwoOutputs,
    distributed_config,
    seeded,
    small_config,
)

from gplws.checkpoints import (
    CHECKPOINT,
    CheckpointError,
    load_checkpoint,
    model_of_checkpoint,
)
from gplws.data import collate
from gplws.data.sources import DatasetSource, GeneratorSource
from gplws.data.transforms import Augmentation, split
from gplws.losses import FocusLoss
from gplws.models import WeightsError, save_weights
from gplws.models.prediction import known_positions
from gplws.models.registry import build_model
from gplws.training import error_sum, train
from gplws.training_config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimiserConfig,
    PrecisionConfig,
    ScheduleConfig,
    SourceConfig,
    TrainingConfig,
    build_source,
    build_validation,
    preset_names,
    preset_path,
    read_config,
)

VALIDATION = [("toy", [ToySource(seed=1)(0)])]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def tensors(state):
    """All tensors of a nested state, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state
    nested = [tensors(v) for v in values if isinstance(v, dict | list | tuple | torch.Tensor)]
    return [tensor for part in nested for tensor in part]


def assert_same_state(first, second):
    for part in ("weights", "average", "optimiser", "random"):
        ours, theirs = tensors(first[part]), tensors(second[part])
        assert len(ours) == len(theirs) > 0
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), part


class TimedSource(ToySource):
    """Lets time pass on the clock of training with each batch, and only then."""

    def __init__(self, monkeypatch, seconds):
        super().__init__()
        self.seconds, self.now = seconds, 0.0
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr("gplws.training.time", clock)

    def __call__(self, step):
        self.now += self.seconds
        return super().__call__(step)


def test_the_loss_falls_and_the_error_with_it(tmp_path):
    config = small_config(
        60,
        augmentation=Augmentation.none(),
        optimiser=OptimiserConfig(learning_rate=1e-2, average_decay=0.9),
        checkpoints=CheckpointConfig(log_steps=1, validate_steps=10),
    )
    result = train(config, tmp_path, source=ToySource(), validation=VALIDATION)
    lines = log_of(tmp_path)
    losses = [line["loss"] for line in lines if "loss" in line]
    errors = [line["validation"]["toy"] for line in lines if "validation" in line]
    assert len(losses) == 60 and len(errors) == 6
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    assert errors[-1] < 0.6 * errors[0] and result.validation["toy"] == errors[-1]
    assert result.reason == "done" and result.step == 60
    # What is reported is what the exported network does.
    model = model_of_checkpoint(result.checkpoint)
    again = mean_error(model, VALIDATION[0][1])
    assert again == pytest.approx(errors[-1], rel=1e-5)


@pytest.mark.parametrize("freeze_after", [None, 0.25])
def test_a_run_that_stops_and_goes_on_equals_one_that_does_not(tmp_path, freeze_after):
    config = small_config(8)
    config = replace(config, schedule=replace(config.schedule, freeze_after=freeze_after))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with_worker = replace(config, data=DataConfig(workers=2, ahead=3))
    train(with_worker, whole, source=ToySource(), validation=VALIDATION)
    stopped = train(config, parts, source=StopAfter(3, signal.SIGTERM), validation=VALIDATION)
    assert stopped.reason == "interrupted" and 3 <= stopped.step < 8
    torch.manual_seed(77)  # whatever happens in between
    result = train(config, parts, resume=True, source=ToySource(), validation=VALIDATION)
    assert result.reason == "done" and result.step == 8
    first, second = (load_checkpoint(f / "checkpoint.pt") for f in (whole, parts))
    assert_same_state(first, second)
    assert first["validation"] == second["validation"]
    ours, theirs = ([x.get("loss") for x in log_of(f)] for f in (whole, parts))
    assert ours == theirs


def test_errors_are_of_the_validation_sets_of_today(tmp_path):
    train(small_config(1), tmp_path, source=ToySource(), validation=VALIDATION)
    other = [("other", VALIDATION[0][1])]
    result = train(small_config(2), tmp_path, resume=True, source=ToySource(), validation=other)
    assert list(result.validation) == ["other"]


def test_lines_after_the_checkpoint_are_dropped_from_the_log(tmp_path):
    config = small_config(4)
    train(replace(config, schedule=ScheduleConfig(steps=2)), tmp_path, source=ToySource())
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    train(config, tmp_path, resume=True, source=ToySource())
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_run_with_a_checkpoint_and_handlers_are_put_back(tmp_path, number):
    before = signal.getsignal(number)
    result = train(small_config(50), tmp_path, source=StopAfter(2, number))
    assert result.reason == "interrupted" and result.step == 2
    assert load_checkpoint(result.checkpoint)["step"] == 2
    assert signal.getsignal(number) is before


def test_training_runs_outside_of_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(small_config(2), tmp_path, source=ToySource()))
    )
    thread.start()
    thread.join()
    assert results[0].step == 2


def test_checkpoints_are_written_on_the_way(tmp_path):
    def source(step):
        if step == 5:
            raise RuntimeError("the disk with the data is gone")
        return ToySource()(step)

    config = small_config(9, checkpoints=CheckpointConfig(every_steps=2))
    with pytest.raises(RuntimeError, match="disk with the data"):
        train(config, tmp_path, source=source)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 4
    assert train(config, tmp_path, resume=True, source=ToySource()).step == 9


def test_out_of_time_ends_with_a_checkpoint_and_resume_goes_on(tmp_path, monkeypatch):
    short = small_config(30, schedule=ScheduleConfig(steps=30, max_minutes=0.5))
    source = TimedSource(monkeypatch, seconds=4)
    result = train(short, tmp_path, source=source, validation=VALIDATION)
    assert result.reason == "out of time" and result.step == 7
    # What was reached in the time is measured.
    assert log_of(tmp_path)[-1]["step"] == 7 and result.validation.keys() == {"toy"}
    later = small_config(result.step + 1)
    assert train(later, tmp_path, resume=True, source=ToySource()).reason == "done"


def test_a_schedule_that_follows_the_time_is_down_when_the_time_is_over(tmp_path, monkeypatch):
    schedule = ScheduleConfig(steps=None, max_minutes=1, follow_time=True)
    source = TimedSource(monkeypatch, seconds=4)
    result = train(small_config(0, schedule=schedule), tmp_path, source=source)
    assert result.reason == "done" and result.step == 14
    rates = [line["learning_rate"] for line in log_of(tmp_path) if "loss" in line]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.02 * rates[0]


def test_the_learning_rate_rises_then_falls():
    schedule = ScheduleConfig(warm_up=0.1, final=0.02)
    factors = [schedule.factor(i / 100) for i in range(101)]
    assert factors[0] == pytest.approx(0.04) and factors[10] == pytest.approx(1)
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.02)
    assert factors[55] == pytest.approx(0.51)
    assert replace(schedule, shape="constant").factor(0.9) == 1
    assert ScheduleConfig(warm_up=0).factor(0) == 1
    assert ScheduleConfig(warm_up=1).factor(1) == 1


def test_two_processes_equal_one_with_all_their_batches(tmp_path, repository):
    steps = 2
    worker = Path(__file__).with_name("distributed_training.py")
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(worker, tmp_path / "two", str(steps)),
        ],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)},
        timeout=300,
    )
    # A signal to one process stops both, at the same step.
    assert ran.stdout.count("interrupted at step 1\n") == 2
    assert load_checkpoint(tmp_path / "two_stopped" / "checkpoint.pt")["step"] == 1
    # Three epochs of five batches, two in each step.
    assert ran.stdout.count("epochs done at step 8\n") == 2
    # Networks with parameters that the loss does not reach: both processes have the same weights.
    for name in ("DefocusNet", "TwoOutputs"):
        said = [line for line in ran.stdout.splitlines() if line.startswith(f"{name} has weights")]
        assert len(said) == 2 and said[0] == said[1]
    train(
        distributed_config(steps),
        tmp_path / "one",
        device="cpu",
        model=seeded(ConvNet),
        source=PairedSource(ToySource()),
        validation=[("toy", [ToySource(seed=1)(step) for step in range(3)])],
    )
    train(
        distributed_config(steps),
        tmp_path / "one_TwoOutputs",
        device="cpu",
        model=seeded(TwoOutputs),
        source=PairedSource(ToySource(frames=3, side=32)),
    )
    for name in ("", "_TwoOutputs"):
        two, one = (load_checkpoint(tmp_path / f"{n}{name}" / CHECKPOINT) for n in ("two", "one"))
        # The averages that Adam keeps are sums of the gradients and of their squares.
        for part in ("optimiser", "weights", "average"):
            pairs = list(zip(tensors(two[part]), tensors(one[part]), strict=True))
            assert pairs
            for ours, theirs in pairs:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    for ours, theirs in zip(log_of(tmp_path / "two"), log_of(tmp_path / "one"), strict=True):
        for key in theirs.keys() & {"loss", "cross_entropy", "gradient_norm", "mean"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)


class Depths(NamedTuple):
    depth: torch.Tensor


class DepthNet(nn.Module):
    """Says the depth itself, in the unit of the focus positions."""

    def __init__(self):
        super().__init__()
        self.volume = build_model("gplws", small_config(1).model.arguments)

    def forward(self, stack, focus_positions):
        p = (2 * self.volume(stack)).softmax(1)
        return Depths((p * focus_positions[:, :, None, None]).sum(1))


@pytest.mark.parametrize("kind", ["soft_target", "l1"])
def test_networks_that_return_a_depth_are_trained_too(tmp_path, kind):
    config = small_config(
        25,
        augmentation=Augmentation.none(),
        loss=FocusLoss(kind=kind, beta=0.2),
        optimiser=OptimiserConfig(learning_rate=1e-2, average_decay=0),
    )
    result = train(config, tmp_path, model=DepthNet(), source=ToySource(), validation=VALIDATION)
    losses = [line["loss"] for line in log_of(tmp_path) if "loss" in line]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert 0 < result.validation["toy"] < 1.5


def test_a_published_network_is_trained_by_its_name(tmp_path):
    config = small_config(1, model=ModelConfig(name="defocusnet"))
    source = ToySource(frames=3, side=32)
    validation = [("toy", [source(9)])]
    result = train(config, tmp_path / "run", source=source, validation=validation)
    assert 0 <= result.validation["toy"] <= 2
    model = model_of_checkpoint(result.checkpoint)
    again = mean_error(model, validation[0][1])
    assert again == pytest.approx(result.validation["toy"], rel=1e-4)


def test_a_network_with_a_range_of_its_own_is_given_positions_in_it(tmp_path):
    class Ranged(DepthNet):
        focus_range = (0.0, 1.0)

    model = Ranged()
    losses = {}
    for name, net in (("ranged", model), ("plain", DepthNet())):
        net.load_state_dict(model.state_dict())
        config = small_config(1, loss=FocusLoss(kind="l1"), augmentation=Augmentation.none())
        train(config, tmp_path / name, model=copy.deepcopy(net), source=ToySource())
        losses[name] = log_of(tmp_path / name)[0]["loss"]
    assert losses["ranged"] == pytest.approx(losses["plain"], rel=1e-5)  # in frames, so the same
    positions = known_positions(model, torch.tensor([[10.0, 12, 20], [6, 5, 4]]))
    torch.testing.assert_close(positions, torch.tensor([[0, 0.2, 1], [0, 0.5, 1]]))


@pytest.mark.parametrize(
    "precision",
    [
        PrecisionConfig(dtype="bfloat16"),
        PrecisionConfig(kernels=False),
        PrecisionConfig(kernels=False, channels_last=False),
        PrecisionConfig(compile="static", compile_backend="aot_eager"),
    ],
    ids=["bfloat16", "stock", "contiguous", "compiled"],
)
def test_ways_of_computing_agree_with_the_plain_one(tmp_path, precision):
    losses = {}
    for name, way in (("plain", PrecisionConfig()), ("other", precision)):
        config = small_config(3, augmentation=Augmentation.none(), precision=way)
        train(config, tmp_path / name, source=ToySource())
        losses[name] = [line["loss"] for line in log_of(tmp_path / name)]
        weights = load_checkpoint(tmp_path / name / "checkpoint.pt")["weights"]
        assert all(w.dtype in (torch.float32, torch.int64) for w in weights.values())
    tolerance = 0.03 if precision.dtype == "bfloat16" else 1e-3
    assert losses["other"] == pytest.approx(losses["plain"], rel=tolerance)


def test_batch_norms_keep_the_averaged_statistics_once_they_are_frozen(tmp_path):
    def statistics(steps, folder):
        config = small_config(
            12,
            optimiser=OptimiserConfig(average_decay=0.9),
            precision=PrecisionConfig(dtype="bfloat16"),
            checkpoints=CheckpointConfig(every_steps=1),
        )
        config = replace(config, schedule=replace(config.schedule, freeze_after=6 / 12))
        stop = StopAfter(steps, signal.SIGTERM) if steps < 12 else ToySource()
        train(config, tmp_path / folder, source=stop, validation=VALIDATION)
        state = load_checkpoint(tmp_path / folder / "checkpoint.pt")
        running = [n for n in state["weights"] if "running" in n or "num_batches" in n]
        return [{n: state[part][n] for n in running} for part in ("average", "weights")], state

    (before, raw), early = statistics(6, "begun")
    (average, frozen), late = statistics(12, "done")
    assert early["step"] == 6 and late["step"] == 12
    assert not torch.equal(before["head.bn.running_mean"], raw["head.bn.running_mean"])
    for name, value in before.items():
        assert torch.equal(frozen[name], value) and torch.equal(average[name], value)
    weight = "head.bn.weight"  # what is learnt in a batch norm goes on
    assert not torch.equal(late["weights"][weight], early["weights"][weight])


class Upright:
    """A generator of stacks that are bright at the top, so that they show how they were turned."""

    def batch(self, step, batch_size, frames, crop):
        sample = ToySource(batch_size, frames, crop)(step)
        stack = torch.zeros_like(sample.stack)
        stack[..., 0, :] = 1
        return replace(sample, stack=stack)


class Watching(ConvNet):
    """Keeps the number of frames of each stack, and the side that is bright."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, stack):
        image = stack[0, 0, 0]
        edges = [image[0], image[-1], image[:, 0], image[:, -1]]
        self.seen.append((stack.shape[2], [bool(edge.all()) for edge in edges].index(True)))
        return super().forward(stack)


@pytest.mark.parametrize("number", [0, 1])
def test_how_a_stack_is_turned_does_not_depend_on_its_number_of_frames(tmp_path, as_module, number):
    weights = [1e-9, 1e-9]
    weights[number] = 1.0  # the only source that is used
    sources = [of("Upright", weight=weight) for weight in weights]
    turn = replace(Augmentation.none(), rotate=True)
    data = DataConfig(sources=sources, batch_size=1, frames=(8, 11), crop=4, workers=0)
    model = Watching()
    config = small_config(100, data=data, augmentation=turn)
    config = replace(config, optimiser=OptimiserConfig(average_decay=0))
    train(config, tmp_path, model=model)
    assert len(set(model.seen)) == 16  # each number of frames with each side


def test_the_average_follows_the_weights(tmp_path):
    config = small_config(1, optimiser=OptimiserConfig(average_decay=0.05))
    train(config, tmp_path, source=ToySource())
    torch.manual_seed(config.seed)
    start = build_model("gplws", config.model.arguments).state_dict()
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    name = "encoders.0.0.grouped.conv.weight"
    expected = start[name] + 0.95 * (state["weights"][name] - start[name])
    torch.testing.assert_close(state["average"][name], expected)
    assert not torch.equal(state["weights"][name], start[name])
    assert state["average"]["head.bn.num_batches_tracked"] == 1


def test_training_starts_from_given_weights(tmp_path):
    arguments = small_config(1).model.arguments
    path = tmp_path / "start.safetensors"
    start = build_model("gplws", arguments)
    save_weights(start, path)
    config = small_config(
        1,
        model=ModelConfig(weights=str(path), arguments=arguments),
        optimiser=OptimiserConfig(learning_rate=0.0, average_decay=0.0),
    )
    train(config, tmp_path / "run", source=ToySource())
    weights = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["weights"]
    assert torch.equal(
        weights["head.pointwise.weight"], start.state_dict()["head.pointwise.weight"]
    )
    other = replace(config, model=ModelConfig(weights=str(path), arguments={"widths": [8] * 4}))
    with pytest.raises(ValueError, match=r"start\.safetensors holds a network with"):
        train(other, tmp_path / "other", source=ToySource())
    checkpoint = tmp_path / "run" / CHECKPOINT
    of_a_run = replace(config, model=ModelConfig(weights=str(checkpoint)))
    with pytest.raises(WeightsError, match=rf"training checkpoint; 'gplws export {checkpoint} out"):
        train(of_a_run, tmp_path / "other", source=ToySource())
    missing = replace(config, model=ModelConfig(weights=str(tmp_path / "nowhere.safetensors")))
    with pytest.raises(WeightsError, match=r"nowhere\.safetensors"):
        train(missing, tmp_path / "other", source=ToySource())


@pytest.mark.parametrize("given", [True, False], ids=["arguments", "no arguments"])
def test_a_run_goes_on_without_the_weights_that_it_started_from(tmp_path, given):
    arguments = small_config(1).model.arguments
    path = tmp_path / "start.safetensors"
    save_weights(build_model("gplws", arguments), path)
    model = ModelConfig(weights=str(path), arguments=arguments if given else {})
    train(small_config(1, model=model), tmp_path / "run", source=ToySource())
    path.unlink()
    config = small_config(2, model=model)
    assert train(config, tmp_path / "run", resume=True, source=ToySource()).step == 2
    other = replace(config, model=replace(model, arguments={"widths": [8, 16, 32, 64]}))
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is of GPLWSNet with .*, not of"):
        train(other, tmp_path / "run", resume=True, source=ToySource())
    other = replace(config, model=replace(model, name="defocusnet", arguments={}))
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is of GPLWSNet .* not of Defocus"):
        train(other, tmp_path / "run", resume=True, source=ToySource())


def test_a_folder_with_a_checkpoint_is_not_trained_over(tmp_path):
    train(small_config(1), tmp_path, source=ToySource())
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError, match=r"checkpoint\.pt exists: pass resume=True"):
        train(small_config(1), tmp_path, source=ToySource())
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_checkpoints_that_do_not_fit_are_named(tmp_path):
    config = small_config(2)
    with pytest.raises(CheckpointError, match=r"no such file: .*checkpoint\.pt"):
        train(config, tmp_path, resume=True, source=ToySource())
    train(config, tmp_path, source=ToySource())
    wider = replace(config, model=ModelConfig(arguments={"widths": [8, 16, 32, 64]}))
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is of GPLWSNet with .*, not of"):
        train(wider, tmp_path, resume=True, source=ToySource())
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is of GPLWSNet .* not of ConvNet"):
        train(config, tmp_path, resume=True, model=ConvNet(), source=ToySource())
    adam = replace(config, optimiser=OptimiserConfig(kind="adam"))
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt was trained with .*'adamw'"):
        train(adam, tmp_path, resume=True, source=ToySource())


def test_a_gradient_that_is_not_finite_ends_the_run_and_leaves_the_checkpoint(tmp_path):
    def source(step):
        sample = ToySource()(step)
        return sample if step < 2 else replace(sample, stack=sample.stack * math.nan)

    config = small_config(
        4, augmentation=Augmentation.none(), checkpoints=CheckpointConfig(every_steps=1)
    )
    with pytest.raises(FloatingPointError, match="not finite at step 2"):
        train(config, tmp_path, source=source)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == 2
    assert all(t.isfinite().all() for t in tensors(state["weights"]))


def test_nan_predictions_count_as_the_largest_error():
    sample = ToySource(frames=5)(0)
    shape = sample.depth.shape
    known = int(sample.valid.sum())
    assert known > 0
    assert error_sum(lambda s: torch.full(shape, math.nan), [sample]) == (4 * known, known)
    total, count = error_sum(lambda s: s.depth_index().nan_to_num() + 0.25, [sample, sample])
    assert total / count == pytest.approx(0.25) and count == 2 * known
    nothing = replace(sample, valid=torch.zeros_like(sample.valid))
    assert error_sum(lambda s: s.depth_index(), [nothing]) == (0, 0)


def test_figures_that_do_not_exist_are_null_in_the_log(tmp_path):
    sample = ToySource()(0)
    nothing = replace(sample, valid=torch.zeros_like(sample.valid))
    train(small_config(1), tmp_path, source=ToySource(), validation=[("nothing", [nothing])])
    text = (tmp_path / "log.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [line["validation"] for line in lines if "validation" in line] == [{"nothing": None}]


def test_a_finished_run_is_validated_once(tmp_path):
    for resume in (False, True):
        result = train(
            small_config(2), tmp_path, resume=resume, source=ToySource(), validation=VALIDATION
        )
    assert sum("validation" in line for line in log_of(tmp_path)) == 1
    assert result.validation.keys() == {"toy"}


def toy_set(length):
    """Single samples, as a data set has them."""

    class Samples:
        def __len__(self):
            return length

        def __getitem__(self, index):
            return split(ToySource(batch_size=1, side=24)(index))[0]

    return Samples()


class ToyGenerator:
    def batch(self, step, batch_size, frames, crop):
        return ToySource(batch_size, frames, crop)(step)


def of(factory, **changes):
    return SourceConfig(f"{__name__}:{factory}", **changes)


@pytest.fixture
def as_module(monkeypatch):
    """This module, importable by its name."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or this_module())


def this_module():
    module = type(sys)(__name__)
    module.__dict__.update(globals())
    return module


def test_data_sets_generators_and_functions_become_sources(as_module):
    config = DataConfig(batch_size=3, frames=(4, 4), crop=16)
    dataset = of("toy_set", arguments={"length": 5})
    source = build_source(replace(config, sources=[dataset]))
    assert isinstance(source, DatasetSource) and len(source) == 2
    assert source(0).stack.shape == (3, 1, 4, 16, 16)
    generator = build_source(replace(config, sources=[of("ToyGenerator")]))
    assert isinstance(generator, GeneratorSource) and generator(0).stack.shape == (3, 1, 4, 16, 16)
    function = of("ToySource", arguments={"batch_size": 3, "frames": 4}, weight=2)
    mixed = build_source(replace(config, sources=[dataset, function]))
    assert all(mixed(step).stack.shape == (3, 1, 4, 16, 16) for step in range(6))


def test_generators_without_a_seed_have_one_of_the_run_and_of_their_own(tmp_path):
    factory = "gplws.data.generator:StackGenerator"
    bare = SourceConfig(factory)
    seeded = SourceConfig(factory, arguments={"seed": 3})

    def stacks(seed, *entries):
        """The first batch of each entry as the only source used, and of the validation set."""
        found = []
        for number in range(len(entries)):
            sources = [
                replace(e, weight=1.0 if i == number else 1e-9) for i, e in enumerate(entries)
            ]
            data = DataConfig(sources=sources, batch_size=1, frames=(3, 3), crop=8)
            found.append(build_source(data, seed)(0).stack)
        data = replace(data, validation=[replace(bare, count=1)])
        return [*found, build_validation(data, seed)[0][1][0].stack]

    first, second, fixed, validation = stacks(0, bare, bare, seeded)
    assert not torch.equal(first, second) and not torch.equal(first, validation)
    again, _, fixed_again, other = stacks(1, bare, bare, seeded)
    assert not torch.equal(again, first) and not torch.equal(other, validation)
    assert torch.equal(fixed, fixed_again)
    assert torch.equal(stacks(0, bare)[0], first)


def test_validation_sets_are_fixed_and_whole(as_module):
    config = DataConfig(
        batch_size=2,
        frames=(5, 5),
        crop=16,
        validation=[
            of("toy_set", arguments={"length": 3}, name="files"),
            of("ToyGenerator", count=2),
        ],
    )
    (files, stacks), (generator, batches) = build_validation(config)
    assert (files, generator) == ("files", "ToyGenerator")
    assert [s.stack.shape for s in stacks] == [(1, 1, 5, 24, 24)] * 3
    assert [s.stack.shape for s in batches] == [(2, 1, 5, 16, 16)] * 2
    again = build_validation(config)[1][1]
    assert torch.equal(collate(split(batches[1])).stack, again[1].stack)


def test_validation_sets_without_names_are_told_apart_and_a_name_given_twice_is_refused(
    as_module, tmp_path
):
    sets = [of("ToySource", arguments={"seed": seed}, count=1) for seed in (1, 2)]
    sets.append(of("ToySource", name="ToySource_1", count=1))
    found = build_validation(DataConfig(validation=sets))
    assert [name for name, _ in found] == ["ToySource_2", "ToySource_3", "ToySource_1"]
    result = train(small_config(1), tmp_path / "run", source=ToySource(), validation=found)
    assert len(result.validation) == 3
    named = [of("ToySource", name="toy", count=1)] * 2
    with pytest.raises(ValueError, match=r"data\.validation: several have the name 'toy'"):
        build_validation(DataConfig(validation=named))
    with pytest.raises(ValueError, match="validation: several have the name 'toy'"):
        train(small_config(1), tmp_path / "b", source=ToySource(), validation=VALIDATION * 2)


def test_arguments_may_be_made_by_factories_themselves(as_module):
    source = {"factory": f"{__name__}:ToySource", "arguments": {"frames": 3}}
    paired = build_source(DataConfig(sources=[of("PairedSource", arguments={"source": source})]))
    assert paired(0).stack.shape == (4, 1, 3, 16, 16)
    source["factory"] = "nowhere:ToySource"
    with pytest.raises(ValueError, match="No module named 'nowhere'"):
        build_source(DataConfig(sources=[of("PairedSource", arguments={"source": source})]))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (SourceConfig("nowhere.at_all:thing"), "nowhere.at_all:thing cannot be used: No module"),
        (SourceConfig("gplws.data"), "expected package.module:name"),
        (of("missing"), "has no attribute 'missing'"),
        (of("ToySource", arguments={"colour": 1}), "unexpected keyword argument 'colour'"),
        (of("toy_set", arguments={"length": 0}), "is empty"),
        (SourceConfig("builtins:int"), "returned a int; expected"),
    ],
)
def test_sources_that_cannot_be_used_are_named(as_module, entry, message):
    with pytest.raises(ValueError, match=message):
        build_source(DataConfig(sources=[entry]))


def test_no_data_is_an_error(tmp_path, as_module):
    with pytest.raises(ValueError, match=r"data\.sources: expected at least one"):
        train(small_config(1), tmp_path)
    empty = DataConfig(validation=[of("toy_set", arguments={"length": 0})])
    with pytest.raises(ValueError, match=r"data\.validation\[0\]: .*toy_set has no samples"):
        build_validation(empty)


def test_epochs_are_counted_by_the_data_or_by_the_configuration(tmp_path):
    dataset = DatasetSource([toy_set(4)], batch_size=2, crop=8, frames=(4, 4))
    config = small_config(0, schedule=ScheduleConfig(steps=None, epochs=2))
    assert train(config, tmp_path / "a", source=dataset).step == 4
    with pytest.raises(ValueError, match="steps_per_epoch"):
        train(config, tmp_path / "b", source=ToySource())
    counted = replace(config, data=DataConfig(workers=0, steps_per_epoch=1))
    assert train(counted, tmp_path / "c", source=ToySource()).step == 2


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (ScheduleConfig(steps=3, epochs=3), "steps or epochs, not both"),
        (ScheduleConfig(steps=None), "give steps, epochs, or max_minutes"),
        (ScheduleConfig(follow_time=True), "needs schedule.max_minutes"),
    ],
)
def test_schedules_without_an_end_are_refused(tmp_path, schedule, message):
    with pytest.raises(ValueError, match=message):
        train(small_config(0, schedule=schedule), tmp_path, source=ToySource())


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelConfig, {"head_gain": 0.0}, "model.head_gain must be positive, got 0.0"),
        (SourceConfig, {"factory": "a:b", "weight": -1.0}, "a:b.weight must be positive"),
        (SourceConfig, {"factory": "a:b", "count": 0}, "a:b.count must be at least 1"),
        (DataConfig, {"batch_size": 0}, "data.batch_size must be at least 1"),
        (DataConfig, {"frames": (5, 4)}, r"data.frames must be \(least, most\).* got \(5, 4\)"),
        (DataConfig, {"frames": (1, 4)}, "data.frames must be .* at least 2"),
        (DataConfig, {"workers": -1}, "data.workers must be at least 0"),
        (DataConfig, {"worker_kind": "fibre"}, "data.worker_kind must be one of .* 'fibre'"),
        (OptimiserConfig, {"kind": "sgd"}, "optimiser.kind must be one of"),
        (OptimiserConfig, {"learning_rate": -1e-3}, "optimiser.learning_rate must be at least 0"),
        (OptimiserConfig, {"learning_rate": math.nan}, "optimiser.learning_rate must be"),
        (OptimiserConfig, {"betas": (0.9, 1.0)}, "optimiser.betas must be in 0..1, below 1"),
        (OptimiserConfig, {"clip": -1.0}, "optimiser.clip must be positive, got -1.0"),
        (OptimiserConfig, {"clip": 0.0}, "optimiser.clip must be positive"),
        (OptimiserConfig, {"average_decay": 1.5}, "optimiser.average_decay must be in 0..1"),
        (ScheduleConfig, {"steps": -5}, "schedule.steps must be at least 0, got -5"),
        (ScheduleConfig, {"max_minutes": -1}, "schedule.max_minutes must be positive"),
        (ScheduleConfig, {"shape": "foo"}, "schedule.shape must be one of .* 'foo'"),
        (ScheduleConfig, {"warm_up": 3.0}, "schedule.warm_up must be in 0..1"),
        (ScheduleConfig, {"freeze_after": -1.0}, "schedule.freeze_after must be in 0..1"),
        (PrecisionConfig, {"dtype": "float16"}, "precision.dtype must be one of .* 'float16'"),
        (PrecisionConfig, {"compile": "always"}, "precision.compile must be one of"),
        (CheckpointConfig, {"log_steps": 0}, "checkpoints.log_steps must be at least 1"),
        (CheckpointConfig, {"every_steps": 0}, "checkpoints.every_steps must be at least 1"),
        (TrainingConfig, {"seed": -1}, "seed must be at least 0"),
    ],
)
def test_values_out_of_range_are_named(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)


@pytest.mark.parametrize("preset", preset_names())
def test_a_configuration_is_read_as_the_command_line_reads_it(preset):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(TrainingConfig, "config")
    text = preset_path(preset).read_text(encoding="utf-8")
    indented = "config:\n" + "".join(f"  {line}\n" for line in text.splitlines())
    expected = parser.instantiate(parser.parse_string(indented)).config
    assert read_config(preset_path(preset)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dta: {}", "unknown key dta; known: .*data.*"),
        ("data: {crops: 3}", "unknown key data.crops"),
        ("data: {sources: [{factory: 3}]}", r"data.sources\[0\].factory: expected str, got 3"),
        ("data: {frames: [1, 2, 3]}", r"data.frames: expected .* got \[1, 2, 3\]"),
        ("data: {worker_kind: fairy}", "data.worker_kind: expected .* got 'fairy'"),
        ("schedule: {steps: many}", "schedule.steps: expected .* got 'many'"),
        ("optimiser: {learning_rate: true}", "learning_rate: expected float, got True"),
        ("model: 3", "model: expected keys with values, got 3"),
    ],
)
def test_what_a_configuration_does_not_know_is_named(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(path)


def test_the_presets_are_those_that_ship():
    assert preset_names() == ("default", "paper")
    assert TrainingConfig().optimiser.learning_rate == 2.5e-3
