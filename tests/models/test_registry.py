from __future__ import annotations

import collections
import os

import numpy as np
import pytest
import torch
from networks import randomise_bn

from gplws.models import (
    DDFFNet,
    DefocusNet,
    DFVNet,
    GPLWSNet,
    WeightsError,
    load_model,
    model_names,
    save_weights,
)


@pytest.fixture
def saved(tmp_path):
    model = randomise_bn(GPLWSNet(widths=(4, 8, 16, 32), skip="concat"))
    path = tmp_path / "small.safetensors"
    save_weights(model, path)
    return model, path


def test_saved_weights_rebuild_their_network(saved):
    model, path = saved
    stack = torch.rand(1, 3, 3, 16, 16)
    loaded = load_model("gplws", weights=path, fused=False)
    assert loaded.config == model.config and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(stack), model(stack))
        torch.testing.assert_close(
            load_model("gplws", weights=path)(stack), model(stack), rtol=1e-4, atol=1e-5
        )


def test_an_unknown_name_is_named():
    known = ("gplws", "fvnet", "dfvnet", "aifdepthnet", "ddffnet", "defocusnet")
    assert model_names() == known
    with pytest.raises(ValueError, match="unknown model 'unet'; known: gplws, fvnet"):
        load_model("unet")


def test_missing_damaged_and_foreign_files_are_named(saved, tmp_path):
    from safetensors.torch import save_file

    _, path = saved
    with pytest.raises(WeightsError, match=r"no such file: .*nowhere.safetensors"):
        load_model(weights=tmp_path / "nowhere.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"damaged\.safetensors cannot be read"):
        load_model(weights=damaged)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, foreign)
    with pytest.raises(WeightsError, match=r"foreign\.safetensors belongs to 'an unknown network'"):
        load_model(weights=foreign)
    save_file({"a": torch.zeros(2)}, foreign, metadata={"model": "gplws", "config": "{}"})
    with pytest.raises(WeightsError, match=r"foreign\.safetensors does not fit 'gplws'"):
        load_model(weights=foreign)


def test_a_fused_network_is_not_saved(saved, tmp_path):
    model, _ = saved
    with pytest.raises(ValueError, match="training form"):
        save_weights(model.fuse(), tmp_path / "fused.safetensors")
    assert not list(tmp_path.glob("fused*"))


@pytest.fixture
def peer():
    """A small peer with statistics that are not those of a new one."""
    return randomise_bn(DefocusNet(filters=2, focus_range=(0.1, 1.5)))


def same(loaded, model):
    expected = model.state_dict()
    state = loaded.state_dict()
    assert state.keys() == expected.keys()
    return not loaded.training and all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("fused", [False, True])
def test_saved_weights_of_a_peer_rebuild_it_with_its_configuration(peer, tmp_path, fused):
    save_weights(peer, tmp_path / "peer", name="defocusnet")  # any suffix is told apart
    loaded = load_model("defocusnet", weights=tmp_path / "peer", fused=fused)
    assert type(loaded) is DefocusNet and same(loaded, peer)
    assert loaded.focus_range == (0.1, 1.5)
    with pytest.raises(WeightsError, match="belongs to 'defocusnet', not to 'dfvnet'"):
        load_model("dfvnet", weights=tmp_path / "peer")


@pytest.mark.parametrize("form", ["plain", "nested", "parallel", "model", "legacy"])
def test_published_checkpoints_load_as_they_are(tmp_path, form):
    model = DefocusNet().eval()
    state = model.state_dict()
    parallel = collections.OrderedDict((f"module.{key}", value) for key, value in state.items())
    found = {
        "plain": state,
        "nested": {"epoch": 3, "best": np.float64(0.1), "state_dict": state, "optimizer": {}},
        "parallel": {"state_dict": parallel, "loss": np.float32(2)},
        "model": {"model": state},
        "legacy": parallel,
    }[form]
    path = tmp_path / "published.tar"
    torch.save(found, path, _use_new_zipfile_serialization=form != "legacy")
    assert same(load_model("defocusnet", weights=path), model)


def test_checkpoints_of_older_torch_without_counters_of_batches_load(tmp_path):
    model = DFVNet().eval()
    state = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    torch.save({"state_dict": state}, tmp_path / "old.pth")
    assert same(load_model("dfvnet", weights=tmp_path / "old.pth"), model)


def test_the_number_of_frames_of_ddffnet_comes_from_its_checkpoint(tmp_path):
    model = DDFFNet(n_frames=3).eval()
    torch.save(model.state_dict(), tmp_path / "cc3.pt")
    loaded = load_model("ddffnet", weights=tmp_path / "cc3.pt")
    assert loaded.n_frames == 3 and same(loaded, model)


def test_foreign_and_damaged_checkpoints_are_named(tmp_path):
    path = tmp_path / "published.pth"
    torch.save(DefocusNet().state_dict(), path)
    with pytest.raises(WeightsError, match=r"published\.pth does not fit 'aifdepthnet'"):
        load_model("aifdepthnet", weights=path)
    whole = path.read_bytes()
    for damaged in (whole[:-100], b"not a checkpoint", b""):
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match=r"published\.pth cannot be read"):
            load_model("defocusnet", weights=path)
    for foreign in ([1, 2], {"state_dict": {"a": "b"}}, torch.zeros(3)):
        torch.save(foreign, path)
        with pytest.raises(WeightsError, match=r"published\.pth holds no state dict"):
            load_model("defocusnet", weights=path)


def test_a_checkpoint_runs_no_code(tmp_path):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save({"state_dict": {}, "evil": Evil(str(trace))}, path)
    with pytest.raises(WeightsError, match=r"it holds \S+, and only tensors and numbers are read"):
        load_model("defocusnet", weights=path)
    assert not trace.exists()


class Evil:
    """Unpickling it would make a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["fvnet", "dfvnet", "aifdepthnet", "ddffnet", "defocusnet"])
def test_peers_ship_without_weights(name):
    with pytest.raises(WeightsError, match=f"no trained weights ship for '{name}'.*published"):
        load_model(name)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX")
def test_weights_can_be_read_by_whom_other_new_files_can(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(GPLWSNet(widths=(4, 8), depths=(1, 1), decoder_depths=(1,)), path)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
