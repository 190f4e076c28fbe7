from __future__ import annotations

import pytest
import torch
from networks import randomise_bn

from gplws.models import GPLWSNet, WeightsError, load_model, model_names, save_weights


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
    assert "gplws" in model_names()
    with pytest.raises(ValueError, match="unknown model 'unet'; known: gplws"):
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
