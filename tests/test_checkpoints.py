from __future__ import annotations

import math
import pickle
import random
import signal

import pytest
import torch
from networks import randomise_bn
from toy_data import StopAfter, ToySource, small_config

from gplws import load_model
from gplws.checkpoints import (
    CheckpointError,
    export,
    fused_error,
    load_checkpoint,
    model_of_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from gplws.models import GPLWSNet
from gplws.training import train
from gplws.training_config import CheckpointConfig, DataConfig, OptimiserConfig, SourceConfig


@pytest.fixture
def run(tmp_path):
    """Folder of a short run."""
    train(
        small_config(2),
        tmp_path / "run",
        source=ToySource(),
        validation=[("toy", [ToySource(seed=1)(0)])],
    )
    return tmp_path / "run"


def test_random_numbers_go_on_where_they_were():
    state = random_state()
    drawn = torch.rand(3).tolist(), random.random(), random.gauss(0, 1)
    restore_random_state(state)
    assert (torch.rand(3).tolist(), random.random(), random.gauss(0, 1)) == drawn


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def fail(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_missing_damaged_and_foreign_checkpoints_are_named(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"no such file: .*nowhere\.pt"):
        load_checkpoint(tmp_path / "nowhere.pt")
    damaged = tmp_path / "damaged.pt"
    content = (run / "checkpoint.pt").read_bytes()
    half = content[: len(content) // 2]
    for part in (b"", b"not a checkpoint", half, b"\x80", b"\x80\x02J"):
        damaged.write_bytes(part)
        with pytest.raises(CheckpointError, match=r"damaged\.pt cannot be read"):
            load_checkpoint(damaged)
    torch.save({"weights": torch.zeros(2)}, damaged)
    with pytest.raises(CheckpointError, match=r"damaged\.pt is not a gplws training checkpoint"):
        load_checkpoint(damaged)
    state = load_checkpoint(run / "checkpoint.pt")
    state["average"].pop("head.bn.bias")
    torch.save(state, damaged)
    with pytest.raises(CheckpointError, match=r"damaged\.pt does not fit its network"):
        model_of_checkpoint(damaged)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    path = tmp_path / "evil.pt"
    torch.save({"weights": Evil()}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pt cannot be read"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    (tmp_path / "owned").unlink(missing_ok=True)  # pickling opens nothing, unpickling would
    with pytest.raises(CheckpointError, match=r"evil\.pt cannot be read"):
        load_checkpoint(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("averaged", [True, False])
def test_exported_weights_are_those_of_the_checkpoint_and_the_card_says_so(run, tmp_path, averaged):
    out = tmp_path / "net.safetensors"
    exported = export(run, out, licence="CC-BY-4.0", data="Toys.", averaged=averaged)
    assert exported.error < 1e-4
    stack = ToySource()(5).stack
    expected = model_of_checkpoint(run / "checkpoint.pt", averaged=averaged)(stack)
    assert torch.equal(load_model("gplws", weights=out, fused=False)(stack), expected)
    torch.testing.assert_close(
        load_model("gplws", weights=out)(stack), expected, rtol=1e-4, atol=1e-4
    )
    card = exported.card.read_text()
    for text in ("CC-BY-4.0", "Toys.", "| toy | ", "2 steps", "widths:", "learning_rate"):
        assert text in card
    assert f"| weights | {'moving average' if averaged else 'of the last step'} |" in card


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_the_card_says_of_which_weights_and_step_its_errors_are(tmp_path, decay):
    def source(step):
        if step == 3:
            raise RuntimeError("no more data")
        return ToySource()(step)

    config = small_config(
        5,
        optimiser=OptimiserConfig(average_decay=decay),
        checkpoints=CheckpointConfig(every_steps=1, validate_steps=2),
    )
    sets = [("toy", [ToySource(seed=1)(0)])]
    with pytest.raises(RuntimeError, match="no more data"):
        train(config, tmp_path / "run", source=source, validation=sets)
    card = export(tmp_path / "run", tmp_path / "net.safetensors", averaged=False).card.read_text()
    assert "3 steps" in card and "| weights | of the last step |" in card
    kind = "moving average of the weights" if decay else "weights themselves"
    assert f"Of the {kind}, at step 2:\n\n| validation set |" in card


def test_the_card_tells_a_run_not_validated_yet_from_one_without_sets(tmp_path):
    sets = [SourceConfig("toy_data:ToySource", count=1)]
    for name, validation, said in (("a", sets, "Not validated yet."), ("b", [], "No validation")):
        config = small_config(5, data=DataConfig(workers=0, validation=validation))
        stopped = train(config, tmp_path / name, source=StopAfter(1, signal.SIGTERM))
        assert stopped.reason == "interrupted" and not stopped.validation
        card = export(tmp_path / name, tmp_path / f"{name}.safetensors").card.read_text()
        assert f"## Accuracy\n\n{said}" in card


def test_existing_files_are_replaced_on_request_only(run, tmp_path):
    out = tmp_path / "net.safetensors"
    out.with_suffix(".md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"net\.md exists"):
        export(run, out)
    assert not out.exists()
    export(run, out, overwrite=True)
    assert out.exists() and out.with_suffix(".md").read_text().startswith("# net")
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        export(run, tmp_path / "net.pt")


def test_the_error_of_the_fused_form_is_found():
    model = randomise_bn(GPLWSNet(widths=(4, 8), depths=(1, 1), middle=1, decoder_depths=(1,)))
    assert 0 < fused_error(model) < 1e-4
    wrong = model.fuse()
    wrong.head.bias.data += 1  # a fold that went wrong
    model.fuse = lambda: wrong
    assert fused_error(model) > 1e-3
    assert fused_error(torch.nn.Conv3d(1, 1, 1)) == 0


def test_weights_that_are_not_finite_are_not_exported(run, tmp_path):
    state = load_checkpoint(run / "checkpoint.pt")
    state["average"]["head.bn.bias"].fill_(math.nan)
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=r"broken\.pt: the fused network differs .* by nan"):
        export(tmp_path / "broken.pt", tmp_path / "net.safetensors")
    assert not (tmp_path / "net.safetensors").exists()
