"""Networks come out of accelerate faster, not different."""

from __future__ import annotations

import copy
import io
import itertools
import operator
import threading
import warnings
from collections.abc import Callable
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from networks import relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import gplws
from gplws.accelerate import tracing, trial
from gplws.models import AiFDepthNet, DDFFNet, DefocusNet, DFVNet, FVNet, GPLWSNet
from gplws.nn.inference import (
    FoldedConv,
    Framewise,
    JoinedUpConv3d,
    UpsampledConv2d,
    max_pool3d,
)


def lively(model: nn.Module) -> nn.Module:
    """The model in eval mode; all batch norms have random statistics and weights."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
            ):
                if tensor is not None:
                    drawn = torch.rand(tensor.shape, generator=generator) * (high - low) + low
                    tensor.data.copy_(drawn)
    return model.eval()


def accelerated(model: nn.Module, *inputs: Tensor, tolerance: float = 1e-5) -> tuple:
    """The fast network and its report, once it has given what the model gives."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast, report = gplws.accelerate(model)
    with torch.no_grad():
        expected = model(*copy.deepcopy(inputs))
        got = fast(*copy.deepcopy(inputs))
    assert relative_error(got, expected) < tolerance
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    return fast, report


def note(report: gplws.nn.ModelReport, name: str) -> str:
    """What the report says of a layer, with its sign."""
    (found,) = [layer for layer in report.layers if layer.name == name]
    return ("+ " if found.swapped else "") + found.note


PEERS = {
    "FVNet": FVNet,
    "DFVNet": DFVNet,
    "AiFDepthNet": AiFDepthNet,
    "DDFFNet": lambda: DDFFNet(n_frames=4),
    "DefocusNet": DefocusNet,
}


def small_gplws() -> nn.Module:
    return GPLWSNet(widths=(4, 8), depths=(1, 1), decoder_depths=(1,), middle=1)


@pytest.mark.parametrize("name", PEERS)
def test_peers_give_the_same_with_all_convs_replaced(name: str) -> None:
    model = lively(PEERS[name]())
    stack, positions = torch.rand(1, 3, 4, 68, 70), torch.linspace(0.1, 1, 4)
    fast, report = gplws.accelerate(model)
    with torch.inference_mode():
        for got, expected in zip(fast(stack, positions), model(stack, positions), strict=True):
            if isinstance(expected, Tensor):
                assert relative_error(got, expected) < 1e-4
        assert relative_error(fast.predict(stack).depth, model.predict(stack).depth) < 1e-3
    kinds = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d
    convs = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    # In eval mode there are convs that nobody asks for.
    unused = {name for name in convs if ".classify." in name or "conv_joint2_4" in name}
    assert convs - {layer.name for layer in report.swapped} <= unused
    assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d) for m in fast.modules())
    assert isinstance(fast, type(model))


def test_gplws_goes_to_its_own_fused_form() -> None:
    model = lively(GPLWSNet())
    fast, report = accelerated(model, torch.rand(1, 3, 4, 32, 40))
    assert {layer.note for layer in report.swapped} == {"kernel"}
    assert isinstance(fast, GPLWSNet)
    again, report = gplws.accelerate(fast)
    assert not report.swapped
    assert isinstance(again, GPLWSNet)


class Branches(nn.Module):
    """Residuals in either order, functional and in-place activations, a shared conv."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm3d(8)
        self.shared = nn.Conv3d(8, 8, 3, padding=1, groups=4)
        self.mixed = nn.Conv3d(8, 6, 1)
        self.down = nn.Conv3d(6, 6, 3, stride=(1, 2, 2), padding=1)
        self.drop = nn.Dropout(0.5)
        self.up = nn.ConvTranspose3d(6, 6, 3, (1, 2, 2), 1, (0, 1, 1), groups=6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        y = self.shared(x)
        y += x
        y = torch.relu(self.shared(F.leaky_relu(y, 0.3)) + y)
        z = self.drop(self.mixed(self.shared(y).relu()))
        return self.up(self.down(z)) + z


def test_branches_residuals_and_shared_modules() -> None:
    _, report = accelerated(lively(Branches()), torch.randn(2, 3, 5, 10, 12))
    assert note(report, "first") == "+ kernel or oneDNN + batch norm + relu"
    assert note(report, "mixed").endswith("in the kernel call of the conv before it")
    assert any("residual" in layer.note for layer in report.swapped)


class HoldsTwice(nn.Module):
    """Its forward is not traced; each conv has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = gplws.nn.RepConv3d(4, 4)
        self.second = self.first
        self.plain = nn.Conv3d(4, 4, 3, padding=1)
        self.same = self.plain
        self.nothing = None

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = self.first(x)
        return self.same(self.plain(self.second(x)))


def test_what_is_held_under_two_names_is_replaced_once() -> None:
    model = nn.Sequential(HoldsTwice())
    model.append(model[0].first)
    fast, report = accelerated(lively(model), torch.rand(1, 4, 3, 6, 8))
    assert fast[0].first is fast[0].second is fast[1] is not model[1]
    assert fast[0].plain is fast[0].same is not model[0].plain
    assert len(report.swapped) == 3  # one of them in two steps
    assert len(list(fast.parameters())) == len(set(fast.parameters())) == 4


class ChangesInBetween(nn.Module):
    """What a conv has seen changes before its result is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.conv(x)
        x.relu_()
        kept = self.conv(x)
        z = F.relu(kept)
        z.mul_(3)
        return F.relu(y) + kept + z + x


def test_changes_in_place_are_seen_when_they_were_before() -> None:
    accelerated(lively(ChangesInBetween()), torch.randn(1, 4, 3, 6, 6))


class AddsInPlace(nn.Module):
    """Sums in place reach other names of the same tensor, not those of the same number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = same = self.conv(x)
        frames = more = x.shape[2]
        more += 1
        first += 1
        first *= more
        x += self.conv(first)
        return x.clone().mul_(frames) + same


def test_operators_in_place_are_recorded_as_such() -> None:
    model, x = lively(AddsInPlace()), torch.randn(1, 4, 3, 6, 6)
    fast, report = accelerated(model, x)
    assert note(report, "conv").startswith("+ ")
    changed, expected = x.clone(), x.clone()
    with torch.no_grad():
        model(expected)
        copy.deepcopy(fast)(changed)
    assert relative_error(changed, expected) < 1e-5
    with torch.no_grad():
        assert torch.equal(from_file(fast)(x.clone()), fast(x.clone()))


def from_file(module: nn.Module) -> nn.Module:
    """A module after it was written to a file."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class ActivatesItsInput(nn.Module):
    """A pre-activated block, whose first layer changes what the shortcut sees afterwards."""

    def __init__(self, conv: type[nn.Conv2d | nn.Conv3d]) -> None:
        super().__init__()
        self.before, self.short = conv(2, 2, 1), conv(2, 4, 1)
        self.block = nn.Sequential(nn.ReLU(inplace=True), conv(2, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.short(x) + self.block(x)


def test_blocks_that_are_not_looked_into_may_change_their_input() -> None:
    x = torch.randn(1, 2, 3, 8, 8)
    for change in (
        lambda block: block.register_forward_hook(lambda *given: None),
        lambda block: block.train(),
    ):
        model = lively(ActivatesItsInput(nn.Conv3d))
        change(model.block)
        accelerated(model, x)

    class OfFrames(ActivatesItsInput):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(1, 2).flatten(0, 1))

    fast, _ = accelerated(lively(OfFrames(nn.Conv2d)), x)
    assert any(isinstance(m, Framewise) for m in fast.modules())


class Controlled(nn.Module):
    """A branch that depends on values, with plain parts."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU())
        self.flat = nn.Sequential(nn.Sequential(nn.Conv3d(8, 2, 1)), nn.Identity())
        self.alone = nn.Conv3d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        y = self.flat(self.block(x))
        if y.mean() > 0 or x.shape[0] > 1:
            y = -y
        return self.alone(y if scale is None else y * scale)


def test_python_that_depends_on_values_stays_and_its_parts_are_replaced() -> None:
    model = lively(Controlled())
    fast, report = accelerated(model, torch.randn(1, 3, 4, 8, 9))
    assert "Python depends on values" in note(report, "")
    assert note(report, "block.0") == "+ kernel or oneDNN + batch norm + relu"
    assert note(report, "alone") == "+ kernel or oneDNN"
    x = torch.randn(1, 3, 4, 8, 9)
    with torch.no_grad():
        assert relative_error(fast(x, scale=2.0), model(x, scale=2.0)) < 1e-5


class TakesLayers(nn.Module):
    """Its Python takes layers out of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, 3, padding=1), nn.ReLU()
        )

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        found = [self.layers[0](x).mean(), self.layers[2:](self.layers[:2](x) * scale).mean()]
        for layer in self.layers:
            x = layer(x)
            found.append(x.mean())
        return torch.stack([*found, self.layers(x[:, :2]).mean(), found[0] * len(self.layers)])


def test_layers_of_a_sequence_can_be_taken_one_by_one() -> None:
    model, x = lively(TakesLayers()), torch.randn(1, 2, 3, 6, 6)
    fast, _ = accelerated(model, x)
    assert isinstance(fast.layers.get_submodule("accelerated"), nn.Module)
    with torch.no_grad():
        again = copy.deepcopy(fast).double()
        assert relative_error(again(x.double()).float(), model(x)) < 1e-5
        whole, _ = gplws.accelerate(model.layers)
        assert len(whole) == 4
        assert relative_error(whole[:2](x), model.layers[:2](x)) < 1e-5


class ReadsConvs(nn.Module):
    """Python that is not traced uses what convs have beside ``forward(x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(2, 4, 3, (1, 2, 2), 1)
        self.up = nn.ConvTranspose3d(4, 2, 3, (1, 2, 2), 1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        assert self.down.padding_mode == "zeros"
        assert self.down.in_channels == x.shape[1]
        y = self.down(x).unflatten(1, (self.down.out_channels, 1)).flatten(1, 2)
        return self.up(y, output_size=x.shape[2:]) + self.up(y, x.shape[2:]) * scale


def test_convs_in_python_that_is_not_traced_are_used_as_before() -> None:
    fast, report = accelerated(lively(ReadsConvs()), torch.randn(1, 2, 3, 8, 8))
    assert isinstance(fast.down, FoldedConv)
    assert "output size" in note(report, "up")


class NamesCore(nn.Module):
    """Its ``core`` is a method, and names no other one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 2, 3, padding=1)

    def core(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x).relu()


def test_a_method_called_core_is_none_of_ours() -> None:
    _, report = accelerated(lively(NamesCore()), torch.randn(1, 2, 3, 6, 6))
    assert note(report, "conv").endswith("relu")


def test_graph_modules_are_networks_like_others() -> None:
    x = torch.randn(1, 3, 3, 6, 8)
    graph = torch.fx.symbolic_trace(lively(Branches())).eval()
    for node in graph.graph.nodes:
        node.type = None  # annotations that are strings cannot be written to a file
    graph.recompile()
    for model in (graph, nn.Sequential(graph, nn.Conv3d(6, 2, 1)).eval()):
        fast, report = accelerated(model, x)
        assert any("residual" in layer.note for layer in report.swapped)
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(fast)(x), fast(x))
            assert torch.equal(from_file(fast)(x), fast(x))
            assert relative_error(fast.train().eval()(x), model(x)) < 1e-5


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.conv(x) if mask is None else self.conv(x) * mask


def test_optional_arguments_keep_their_meaning() -> None:
    model = lively(Optional())
    x, mask = torch.randn(2, 2, 3, 6, 6), torch.rand(2, 1, 3, 6, 6)
    fast, report = accelerated(model, x)
    assert "optional" in note(report, "")
    with torch.no_grad():
        assert relative_error(fast(x, mask), model(x, mask)) < 1e-5


class HasSeveral(Optional):
    def forward(self, x: Tensor, size: tuple[int, ...] = (1, 2)) -> Tensor:
        return F.max_pool3d(self.conv(x), (1, *size))


def test_defaults_of_several_values_are_not_fixed() -> None:
    model, x = lively(HasSeveral()), torch.randn(1, 2, 3, 6, 6)
    fast, _ = gplws.accelerate(model, x)
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 1e-5
        assert relative_error(fast(x, (2, 3)), model(x, (2, 3))) < 1e-5


class ChangesInput(Optional):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.sub_(0.5).div_(0.25))


def test_an_example_is_not_changed() -> None:
    x = torch.rand(1, 2, 3, 6, 6)
    before = x.clone()
    _, report = gplws.accelerate(lively(ChangesInput()), x)
    assert torch.equal(x, before)
    assert report.error is not None and report.error < 1e-5


class FreezesItself(nn.Module):
    """Its ``train()`` looks for a part."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv3d(2, 2, 3, padding=1), nn.BatchNorm3d(2))

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.part.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


def test_eval_works_where_the_class_looks_for_parts() -> None:
    fast, _ = gplws.accelerate(lively(FreezesItself()))
    assert not fast.eval().training
    assert not fast.train().part.training


class AsksForTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if isinstance(x, Tensor) else x


class AsksTorch(AsksForTypes):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if torch.is_tensor(x) else x


class ComparesTypes(AsksForTypes):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if type(x) is Tensor else x


class AsksForRecording(AsksForTypes):
    def forward(self, x: Tensor) -> Tensor:
        return x if isinstance(x, torch.fx.Proxy) else self.conv(x)


class AsksForTracing(AsksForTypes):
    def forward(self, x: Tensor) -> Tensor:
        return x if torch.fx._symbolic_trace.is_fx_symbolic_tracing() else self.conv(x)


class MatchesTypes(AsksForTypes):
    def forward(self, x: Tensor) -> Tensor:
        match x:
            case Tensor():
                return self.conv(x)
        return x


class CatchesErrors(AsksForTypes):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.conv(x) if isinstance(x, Tensor) else x
        except Exception:
            return x


class DrawsNumbers(AsksForTypes):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + torch.rand(1)


class KeepsResults(AsksForTypes):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        return self.last.relu()


class KeepsResultsInLists(AsksForTypes):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, list[Tensor]] = {"results": []}

    def forward(self, x: Tensor) -> Tensor:
        self.kept["results"].append(self.conv(x))
        return self.kept["results"][-1].relu()


class AsksForModes(AsksForTypes):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if torch.is_grad_enabled() else -self.conv(x)


class MakesTensors(AsksForTypes):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * torch.arange(1, 7)


class ChangesAutocast(AsksForTypes):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.conv(x).float()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (AsksForTypes, "asks for the type"),
        (AsksTorch, "asks for the type"),
        (ComparesTypes, "asks for the type"),
        (AsksForRecording, "whether it is recorded"),
        (AsksForTracing, "whether it is recorded"),
        (MatchesTypes, "asks for the type"),
        (CatchesErrors, "asks for the type"),
        (DrawsNumbers, "random"),
        (KeepsResults, "keeps results"),
        (KeepsResultsInLists, "keeps results"),
        (AsksForModes, "asks for the gradient"),
        (MakesTensors, "tensors of its own"),
        (ChangesAutocast, "autocast"),
    ],
)
def test_what_a_recording_would_get_wrong_is_not_recorded(kind: type, reason: str) -> None:
    model = lively(kind())
    fast, report = gplws.accelerate(model)
    assert reason in note(report, "")
    x = torch.randn(1, 2, 3, 6, 6)
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    assert relative_error(fast(x), expected) < 1e-2  # autocast rounds to bfloat16
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 1e-2 or kind is DrawsNumbers
    if kind is KeepsResults:
        assert isinstance(fast.last, Tensor)
    if kind is KeepsResultsInLists:
        assert all(isinstance(result, Tensor) for result in fast.kept["results"])
        assert len(fast.kept["results"]) == 2


class Normalises(nn.Module):
    """Views its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 2, 3, padding=1)
        self.register_buffer("mean", torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x - self.mean.view(1, 3, 1, 1, 1)).relu()


def test_buffers_are_recorded() -> None:
    x = torch.randn(1, 3, 3, 6, 6)
    fast, report = accelerated(lively(Normalises()), x)
    assert note(report, "conv").endswith("relu")
    assert not report.kept
    with torch.no_grad():
        assert relative_error(copy.deepcopy(fast).double()(x.double()).float(), fast(x)) < 1e-5


class LooksAside(nn.Module):
    """While it computes, another thread uses a network of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        other = threading.Thread(target=lambda: FOUND.append(OTHER(torch.ones(1, 2))))
        other.start()
        other.join()
        return self.conv(x)


OTHER = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
FOUND: list[Tensor] = []


def test_networks_in_other_threads_work_while_one_is_recorded() -> None:
    fast, report = gplws.accelerate(lively(LooksAside()))
    assert note(report, "conv").startswith("+ ")
    fast(torch.ones(1, 2, 2, 4, 4))
    model = lively(LooksAside())
    FOUND.clear()
    graph = tracing.trace(model, set(), "forward", given=None)
    assert isinstance(graph, torch.fx.Graph)
    assert all(torch.equal(found, OTHER(torch.ones(1, 2))) for found in FOUND)
    assert FOUND


class Decoder(nn.Module):
    """Its ``up`` and ``scale`` are used by others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)
        self.up = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4))
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class DecoderOfTypes(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if isinstance(x, Tensor) else x


class UsesParts(nn.Module):
    def __init__(self, decoder: nn.Module, *, asks: bool) -> None:
        super().__init__()
        self.decoder, self.asks = decoder, asks

    def forward(self, x: Tensor) -> Tensor:
        if self.asks:
            assert isinstance(x, Tensor)
        return self.decoder.up(self.decoder(x)) * self.decoder.scale


@pytest.mark.parametrize("kind", [Decoder, DecoderOfTypes])
@pytest.mark.parametrize("asks", [False, True])
def test_parts_of_parts_can_be_used_from_outside(kind: type, *, asks: bool) -> None:
    _, report = accelerated(lively(UsesParts(kind(), asks=asks)), torch.randn(1, 3, 3, 6, 6))
    assert note(report, "decoder.conv").startswith("+ ")
    assert note(report, "decoder.up.0").endswith("batch norm")


def odd_layers() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=2, dilation=2),
        nn.BatchNorm3d(4, track_running_stats=False),
        nn.Conv3d(4, 4, 3, padding=1, padding_mode="replicate"),
        nn.BatchNorm3d(4, affine=False),
        nn.Conv3d(4, 4, (1, 3, 5), padding="same"),
        nn.LeakyReLU(0.2, inplace=True),
        nn.ConvTranspose3d(4, 6, 3, (1, 2, 2), 1, output_padding=(0, 1, 0), groups=2),
        nn.BatchNorm3d(6),
        nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        nn.MaxPool3d(2, ceil_mode=True),
        nn.Conv3d(6, 3, 2),
        nn.Softmax(1),
    )


def test_odd_layers_are_kept_or_fused_and_named() -> None:
    _, report = accelerated(lively(odd_layers()), torch.randn(2, 2, 6, 9, 11))
    assert note(report, "0").startswith("+ oneDNN")
    assert note(report, "2") == "padding_mode replicate"
    assert note(report, "4") == "+ oneDNN + leaky relu"
    assert note(report, "6").endswith("batch norm")
    assert note(report, "9") == "dilation or ceil_mode"
    assert note(report, "1") == "no conv known before it"


def test_hooks_keep_their_layers_and_are_called() -> None:
    model = lively(nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 1)))
    seen = []
    model[0].register_forward_hook(lambda m, inputs, output: seen.append(1) or output * 2)
    fast, report = accelerated(model, torch.randn(1, 2, 3, 5, 5))
    assert note(report, "0") == "a hook is attached"
    assert len(seen) == 2
    assert note(report, "2").startswith("+ oneDNN")


def test_tied_and_parametrised_weights() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = nn.Sequential(
        nn.Conv3d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, 3, padding=1), nn.Conv3d(4, 4, 1)
    )
    model[2].weight = model[0].weight
    parametrize.register_parametrization(model[3], "weight", Doubled())
    parametrizations.weight_norm(model[0], "weight")
    _, report = accelerated(lively(model), torch.randn(1, 4, 3, 6, 6))
    assert len(report.swapped) >= 3


def pruned(conv: nn.Module) -> nn.Module:
    return prune.random_unstructured(conv, "weight", 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("normed", [weight_norm, spectral_norm, pruned])
def test_weights_made_before_each_forward_stay_as_they_are(normed: Callable) -> None:
    conv = nn.Conv3d(3, 4, 3, padding=1)
    model = lively(nn.Sequential(normed(conv), nn.ReLU(), nn.Conv3d(4, 2, 1)))
    x = torch.rand(1, 3, 4, 8, 8)
    expected = model(x)  # with autograd: conv.weight is a result of it now
    assert not conv.weight.is_leaf
    for copy_of in (gplws.nn.fuse, gplws.nn.reparameterise):
        assert torch.equal(copy_of(model)(x), expected)
    gplws.nn.to_group_parallel(model)
    fast, report = accelerated(model, x)
    assert note(report, "0") == "a hook is attached"
    assert note(report, "2").startswith("+ ")
    fast(x.requires_grad_()).sum().backward()
    trained = fast.train()
    trained(x).sum().backward()
    assert any(p.grad is not None for p in trained[0].parameters())
    _, report = gplws.accelerate(model.eval(), x)
    assert report.error is not None


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(3, 6, 3, padding=1),
            nn.ReLU(),
            gplws.nn.GroupParallel3d(6, 6, 2),
            nn.Conv3d(6, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def of_itself(body: Body) -> None:
    body.forward = MethodType(lambda self, x: 3 * self.body(x).relu(), body)


def around_the_class(body: Body) -> None:
    forward = body.forward
    body.forward = lambda x: 3 * forward(x)


def around_the_class_as_method(body: Body) -> None:
    forward = body.forward
    body.forward = MethodType(lambda self, x: 3 * forward(x), body)


def of_a_part(body: Body) -> None:
    body.forward = body.body.forward


FOREIGN = (around_the_class, around_the_class_as_method, of_a_part)


def test_a_forward_replaced_on_the_instance_is_used_and_its_parts_are_replaced() -> None:
    whole, x = lively(Body()), torch.rand(1, 3, 4, 8, 8)
    of_itself(whole)
    fast, report = accelerated(whole, x)
    assert note(report, "") == "its forward was replaced; its parts were replaced"
    assert note(report, "body.0").startswith("+ ")
    assert note(report, "body.2") == "+ kernel"
    with torch.no_grad():
        for tensor in (*whole.parameters(), *whole.buffers()):
            tensor.zero_()
    assert fast(x).any()
    trained = fast.train()
    assert trained.forward.__self__ is trained
    trained(x).sum().backward()

    whole = lively(nn.Sequential(Body(), nn.Conv3d(3, 3, 3, padding=1)))
    of_itself(whole[0])
    _, report = accelerated(whole, x)
    assert note(report, "0") == "its forward was replaced; its parts were replaced"
    assert note(report, "0.body.2") == "+ kernel"
    assert note(report, "1").startswith("+ ")


@pytest.mark.parametrize("replace", FOREIGN)
def test_where_a_replaced_forward_may_use_the_original_nothing_is_replaced(
    replace: Callable[[Body], None],
) -> None:
    whole, x = lively(Body()), torch.rand(1, 3, 4, 8, 8)
    replace(whole)
    _, report = accelerated(whole, x)
    assert [layer.name for layer in report.layers] == [""]
    assert note(report, "") == "its forward was replaced, and may use the original"

    whole = lively(nn.Sequential(Body(), nn.Conv3d(3, 3, 3, padding=1)))
    replace(whole[0])
    _, report = accelerated(whole, x)
    assert [layer.name for layer in report.layers] == ["0", "1"]
    assert note(report, "0") == "its forward was replaced, and may use the original"
    assert note(report, "1").startswith("+ ")


def test_layers_whose_forward_was_replaced_are_kept() -> None:
    model = lively(nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), gplws.nn.GroupParallel3d(4, 4)))
    model[0].forward = MethodType(
        lambda self, x: self._conv_forward(x, 2 * self.weight, None), model[0]
    )
    of_block = type(model[1]).forward
    model[1].forward = MethodType(lambda self, x: 2 * of_block(self, x), model[1])
    _, report = accelerated(model, torch.rand(1, 3, 4, 8, 8))
    assert [layer.note for layer in report.layers] == ["its forward was replaced"] * 2


class ScalesItself(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def test_a_conv_of_a_class_of_its_own_is_not_taken_for_a_plain_one() -> None:
    model = lively(nn.Sequential(ScalesItself(2, 2, 3, padding=1), nn.BatchNorm3d(2)))
    accelerated(model, torch.randn(1, 2, 3, 5, 5))


class Encoder(nn.Module):
    """2-D network with two results, and pixels doubled in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        )
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(8, 5, 3, padding=1), nn.ReLU()
        )
        self.side = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        return {
            "up": self.up(x),
            "side": self.side(F.interpolate(x, scale_factor=2, mode="nearest")),
        }


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Conv3d(9, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.encoder(x.transpose(1, 2).flatten(0, 1))
        joined = torch.cat([found["up"], found["side"]], 1)
        return self.head(joined.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2))


def test_2d_parts_run_few_frames_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gplws.nn.inference.PIXELS_AT_ONCE", 3 * 12 * 16)
    fast, report = accelerated(lively(Stacked()), torch.randn(2, 3, 4, 12, 16))
    assert sum(isinstance(m, Framewise) for m in fast.modules()) == 1
    assert sum(isinstance(m, UpsampledConv2d) for m in fast.modules()) == 2
    assert note(report, "encoder").startswith("+ few frames")


class Views(nn.Module):
    """Sizes are given by ``view``, which works for contiguous tensors only."""

    def __init__(self, kernel: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, kernel, padding=kernel // 2)
        self.frames = nn.Conv2d(4 * 5, 2, 3, padding=1)
        self.last = nn.Linear(2 * 6 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        y = self.frames(y.view(y.size(0), -1, y.size(3), y.size(4)))
        return self.last(y.view(x.shape[0], -1))


class ViewsOfTypes(Views):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) if isinstance(x, Tensor) else x
        return self.frames(y.view(y.size(0), -1, y.size(3), y.size(4)))


class ViewsOfBlocks(nn.Module):
    """Views what parts give: a sequence, and, traced, one that asks for types."""

    def __init__(self, *, asks: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.inner = ViewsOfTypes()
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        if self.asks:
            assert isinstance(x, Tensor)
        y = self.block(x.transpose(1, 2).flatten(0, 1))
        y = y.view(x.shape[0], x.shape[2], -1).view(x.shape[0], 5, 4, 6, 8)
        return self.inner(y[:, :, :3].transpose(1, 2).contiguous()).view(x.shape[0], -1)


@pytest.mark.parametrize(
    "model", [Views(), Views(1), ViewsOfBlocks(asks=True), ViewsOfBlocks(asks=False)]
)
def test_views_that_worked_on_stock_layers_work(model: nn.Module) -> None:
    x = torch.randn(2, 3, 5, 6, 8)
    fast, _ = accelerated(lively(model), x)
    with torch.no_grad():
        assert torch.equal(from_file(fast)(x), fast(x))
        several = torch.func.vmap(fast)(torch.stack([x, 2 * x]))
        assert relative_error(several[1], model(2 * x)) < 1e-5


class ChangesViews(nn.Module):
    def __init__(self, *, of_view: bool) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1))
        self.of_view = of_view

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = y.view(y.shape[0], -1)
        changed = z[:, 3:] if self.of_view else y
        changed.mul_(2)
        return y.sum() + z.square().sum()


@pytest.mark.parametrize("of_view", [False, True])
def test_views_that_are_changed_in_place_stay_views(*, of_view: bool) -> None:
    model, x = lively(ChangesViews(of_view=of_view)), torch.randn(1, 2, 3, 6, 6)
    fast, _ = gplws.accelerate(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="view"):
        fast(x)
    fast, report = gplws.accelerate(model, x)
    assert note(report, "conv").startswith("fails on the example: view size")
    assert torch.equal(fast(x), model(x))


def test_results_are_laid_out_as_those_of_stock_layers() -> None:
    for model, x, last in (
        (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 8), torch.channels_last),
        (nn.Conv3d(3, 4, (1, 3, 3)), torch.randn(2, 3, 5, 6, 8), torch.channels_last_3d),
    ):
        fast, _ = accelerated(lively(nn.Sequential(model, nn.ReLU())), x)
        with torch.no_grad():
            assert fast(x).is_contiguous()
            assert fast(x.repeat(1, 2, *[1] * (x.dim() - 2))[:, :3]).is_contiguous()
            assert fast(x.to(memory_format=last)).is_contiguous(memory_format=last)


def test_2d_parts_that_take_statistics_of_all_images_are_not_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gplws.nn.inference.PIXELS_AT_ONCE", 8 * 8)
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm, nn.ReLU()))
    x = torch.randn(4, 3, 8, 8) * torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1)
    fast, _ = accelerated(lively(model), x)
    assert not any(isinstance(m, Framewise) for m in fast.modules())


class NamedEncoder(nn.Module):
    """Called by the name of its argument; not all that it returns are tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images: Tensor) -> dict[str, object]:
        return {"map": self.conv(images).relu(), "stride": 1, "more": None}


class CallsByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = NamedEncoder()

    def forward(self, x: Tensor) -> Tensor:
        found = self.encoder(images=x.transpose(1, 2).flatten(0, 1))
        return found["map"] * found["stride"]


def test_2d_parts_have_named_arguments_and_constant_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gplws.nn.inference.PIXELS_AT_ONCE", 3 * 8 * 8)
    fast, report = accelerated(lively(CallsByName()), torch.randn(2, 3, 4, 8, 8))
    assert note(report, "encoder").startswith("+ few frames")
    fast, _ = gplws.accelerate(lively(NamedEncoder()))
    found = fast(images=torch.randn(5, 3, 8, 8))
    assert (found["map"].shape, found["stride"], found["more"]) == ((5, 4, 8, 8), 1, None)


@pytest.mark.parametrize("side", [1, 2, 7])
@pytest.mark.parametrize("size", [(3, 1, 1), ((1, 3, 3), (1, 2, 2), (0, 1, 1)), (2,), (3, 2, 1)])
def test_max_pool3d_equals_the_stock_one(size: tuple, side: int) -> None:
    x = torch.randn(2, 3, 4, side + 1, side + 2)
    x[0, 0, 1, 0, 1] = torch.nan
    x[1] = -torch.inf
    for given in (x, x.contiguous(memory_format=torch.channels_last_3d)):
        with torch.no_grad():
            got = max_pool3d(given, *size)
        expected = F.max_pool3d(given, *size)
        assert torch.equal(got.nan_to_num(9, 8, 7), expected.nan_to_num(9, 8, 7))


def test_gradients_reach_the_input() -> None:
    model = lively(Branches())
    fast, _ = gplws.accelerate(model)
    x = torch.randn(1, 3, 3, 6, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (got,) = torch.autograd.grad(fast(x).square().sum(), x)
    assert relative_error(got, expected) < 1e-4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_any_engine_gives_the_same(layout: torch.memory_format) -> None:
    torch.manual_seed(1)
    for kernel, groups, stride in ((3, 1, 1), (3, 4, 1), (3, 1, (1, 2, 2)), (1, 1, 1)):
        conv = nn.Conv3d(8, 12, kernel, stride, kernel // 2, groups=groups)
        layer = FoldedConv(conv, conv.weight, conv.bias, slope=0.0, residual_slope=0.3)
        x = torch.randn(2, 8, 3, 6, 7).contiguous(memory_format=layout)
        with torch.no_grad():
            residual = torch.randn_like(conv(x))
            expected = F.leaky_relu(conv(x).relu() + residual, 0.3)
            for planar in (True, False):
                layer.planar = planar
                for engine in {*layer.engines(x), "stock"}:
                    got = layer._compute(engine, x, residual)
                    assert relative_error(got, expected) < 1e-5, engine


def test_2d_convs_of_many_channels_lose_less_to_rounding_than_in_one_sum() -> None:
    torch.manual_seed(4)
    for kernel, dilation in ((3, 1), (3, 2), (1, 1)):
        padding = dilation * (kernel // 2)
        conv = nn.Conv2d(520, 64, kernel, padding=padding, dilation=dilation)
        x = torch.rand(2, 520, 8, 8).contiguous(memory_format=torch.channels_last)
        layer = FoldedConv(conv, conv.weight, conv.bias)
        with torch.no_grad():
            whole = layer._by_stock(x)
            expected = conv.double()(x.double())
            error = (layer(x).double() - expected).abs().mean()
            assert error < (whole.double() - expected).abs().mean()
            assert error < 1e-6 * expected.abs().max()


def test_an_example_chooses_engines_and_checks_the_result() -> None:
    model = lively(nn.Sequential(nn.Conv3d(4, 32, 3, padding=1), nn.BatchNorm3d(32), nn.ReLU()))
    x = torch.randn(1, 4, 4, 24, 24)
    fast, report = gplws.accelerate(model, x)
    assert report.error is not None and report.error < 1e-4
    assert report.seconds is not None
    if report.swapped:  # else another process held the machine in the trial
        assert any(m.chosen for m in fast.modules() if isinstance(m, FoldedConv))
    else:
        assert {layer.note for layer in report.kept} == {"no faster on the example"}


def test_a_different_result_on_the_example_gives_the_model_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial, "_difference", lambda a, b: 1.0)
    model = lively(nn.Sequential(nn.Conv3d(2, 4, 3, padding=1)))
    fast, report = gplws.accelerate(model, torch.randn(1, 2, 3, 5, 5))
    assert type(fast[0]) is nn.Conv3d
    assert fast is not model
    assert "differ" in note(report, "0")


def test_bfloat16_networks_stay_in_bfloat16() -> None:
    model = lively(Branches()).to(torch.bfloat16)
    x = torch.randn(1, 3, 4, 8, 10, dtype=torch.bfloat16)
    fast, _ = gplws.accelerate(model)
    with torch.no_grad():
        got = fast(x)
        assert got.dtype == torch.bfloat16
        assert relative_error(got.float(), model(x).float()) < 0.05


class Adds(nn.Module):
    def __init__(self, add: Callable[[Tensor, Tensor, float], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 2, 3, padding=1)
        self.add = add

    def forward(self, x: Tensor, offset: float) -> Tensor:
        return self.add(self.conv(x), x, offset).relu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_added_as_residuals_are(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 3, 6, 6, dtype=dtype)
    for add in (
        lambda y, x, offset: y + offset,
        lambda y, x, offset: y.add_(offset),
        lambda y, x, offset: offset + y,
        lambda y, x, offset: y + x.shape[2] * 2,
    ):
        model = lively(Adds(add)).to(dtype)
        fast, report = gplws.accelerate(model)
        assert "residual" in note(report, "conv")
        with torch.no_grad():
            for offset in (0.5, 1, True):
                got, expected = fast(x, offset), model(x, offset)
                assert got.dtype == dtype
                assert relative_error(got, expected) < (1e-5 if dtype == torch.float32 else 0.02)
        x.requires_grad_()
        assert relative_error(fast(x, 2).detach(), model(x, 2).detach()) < 0.02
        x.requires_grad_(False)


@pytest.mark.parametrize("grad", [False, True])
def test_sums_have_the_dtype_of_stock_ones(*, grad: bool) -> None:
    x = torch.randn(1, 2, 3, 6, 6, dtype=torch.bfloat16, requires_grad=grad)
    for add, dtype in (
        (lambda y, x, _: operator.iadd(y, x.float()), torch.bfloat16),
        (lambda y, x, _: y.add_(x.float()), torch.bfloat16),
        (lambda y, x, _: y + x.float(), torch.float32),
    ):
        model = lively(Adds(add)).bfloat16()
        fast, report = gplws.accelerate(model)
        assert "residual" in note(report, "conv")
        got, expected = fast(x, 0), model(x, 0)
        assert got.dtype == expected.dtype == dtype
        assert relative_error(got.detach().float(), expected.detach().float()) < 0.02


def test_autocast_and_a_later_change_of_dtype_work() -> None:
    model = lively(Branches())
    fast, _ = gplws.accelerate(model)
    x = torch.randn(1, 3, 4, 8, 10)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert relative_error(fast(x).float(), model(x).float()) < 0.05
    with torch.no_grad():
        assert relative_error(fast.double()(x.double()), model.double()(x.double())) < 1e-6


def test_a_conv_to_few_channels_joins_the_transposed_conv_before_it() -> None:
    sizes = itertools.product((1, 2, 3, 6), (1, 2, 5), (1, 3), (1, 2), (True, False))
    for frames, height, width, results, bias in sizes:
        model = nn.Sequential(
            nn.ConvTranspose3d(8, 24, (3, 4, 4), (1, 2, 2), 1, bias=bias),
            nn.Conv3d(24, results, 3, padding=1, bias=bias),
            nn.LeakyReLU(0.1),
        )
        fast, report = gplws.accelerate(lively(model))
        assert "transposed conv before it" in note(report, "1")
        assert any(isinstance(module, JoinedUpConv3d) for module in fast.modules())
        x = torch.randn(2, 8, frames, height, width)
        with torch.no_grad():
            assert relative_error(fast(x), model.double()(x.double()).float()) < 1e-5


def test_wide_or_nonlinear_neighbours_of_transposed_convs_stay_apart() -> None:
    for between, results in ((nn.ReLU(), 1), (nn.Identity(), 16)):
        up = nn.ConvTranspose3d(8, 8, (3, 4, 4), (1, 2, 2), 1)
        model = nn.Sequential(up, between, nn.Conv3d(8, results, 3, padding=1))
        fast, _ = accelerated(lively(model), torch.randn(1, 8, 2, 4, 4))
        assert not any(isinstance(module, JoinedUpConv3d) for module in fast.modules())


def test_on_other_devices_batch_norms_are_folded_and_nothing_else() -> None:
    model = nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.MaxPool3d(2), nn.Conv3d(4, 4, 1)
    )
    fast, report = gplws.accelerate(lively(model).to("meta"))
    assert note(report, "0") == "+ stock conv + batch norm"
    assert note(report, "2") == "not on the CPU"
    assert note(report, "3") == "on meta"
    assert fast(torch.empty(1, 2, 4, 6, 8, device="meta")).shape == (1, 4, 2, 3, 4)


def test_inputs_of_another_dtype_are_refused_as_by_the_network() -> None:
    fast, _ = gplws.accelerate(lively(Branches()))
    with pytest.raises(RuntimeError, match="type"):
        fast(torch.randn(1, 3, 3, 6, 8, dtype=torch.float64))


class Expectation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 1, 3, padding=1)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return (self.conv(x)[:, 0].softmax(1) * positions[:, None, None]).sum(1)


def test_a_softmax_expectation_stays_and_the_report_says_so() -> None:
    model = lively(Expectation())
    _, report = accelerated(model, torch.randn(1, 2, 4, 6, 8), torch.linspace(0, 1, 4))
    assert [layer.kind for layer in report.kept] == ["softmax expectation"]


def test_other_dtypes_are_left_alone() -> None:
    model = lively(Branches()).double()
    fast, report = accelerated(model, torch.randn(1, 3, 4, 8, 10, dtype=torch.float64))
    assert note(report, "first") == "weights of float64"
    assert not any(isinstance(m, FoldedConv) for m in fast.modules())


class InBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.up = gplws.nn.GroupParallel3d(4, 4), gplws.nn.UpConv3d(4, 2)
        self.conv = gplws.nn.RepConv3d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.up(self.block(x)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_blocks_in_other_dtypes_are_left_alone(dtype: torch.dtype) -> None:
    for model, channels, names in (
        (InBlocks(), 4, ("block", "up", "conv")),
        (small_gplws(), 3, ("encoders.0.0", "head")),
    ):
        x = torch.randn(1, channels, 3, 8, 8, dtype=dtype)
        fast, report = accelerated(lively(model).to(dtype), x)
        assert not report.swapped
        kept = f"weights of {str(dtype).removeprefix('torch.')}"
        assert {note(report, name) for name in names} == {kept}
        assert isinstance(fast, type(model))


def test_blocks_that_were_derived_from_are_taken_apart() -> None:
    class Twice(gplws.nn.GroupParallel3d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Twice(4, 4), gplws.nn.GroupParallel3d(4, 4))
    x = torch.randn(2, 4, 3, 6, 6)
    fast, report = gplws.accelerate(lively(model[:1]))
    with torch.no_grad():
        assert relative_error(fast(x), model[:1](x)) < 1e-5
    assert report.swapped
    model.eval()[1].bn.train()
    fast, report = gplws.accelerate(model)
    assert note(report, "1") == "it is in training mode"
    with torch.no_grad():
        assert relative_error(fast(x), copy.deepcopy(model)(x)) < 1e-5


def test_accelerated_parts_are_left_alone() -> None:
    inner, _ = gplws.accelerate(lively(Branches()))
    model = nn.Sequential(inner, nn.Conv3d(6, 2, 3, padding=1)).eval()
    _, report = accelerated(model, torch.randn(1, 3, 3, 6, 8))
    assert note(report, "0") == "is accelerated already"
    assert [layer.name for layer in report.layers] == ["0", "1"]


def test_scripted_parts_are_left_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.ReLU()))
    model = lively(nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), scripted))
    _, report = accelerated(model, torch.randn(1, 2, 3, 5, 5))
    assert note(report, "1") == "it is scripted"
    with pytest.raises(TypeError, match="before it was scripted"):
        gplws.accelerate(scripted)


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="eval mode"):
        gplws.accelerate(Branches())


@pytest.mark.parametrize(
    "kind",
    [
        Branches,
        Controlled,
        AiFDepthNet,
        small_gplws,
        lambda: nn.Conv3d(3, 4, 3, padding=1),
    ],
)
def test_train_gives_the_network_back_to_be_trained(kind: Callable[[], nn.Module]) -> None:
    model = lively(kind())
    fast, _ = gplws.accelerate(model)
    x = torch.randn(2, 3, 3, 32, 32)
    outer = nn.Sequential(fast).train()
    assert type(fast) is type(model)
    assert fast.training
    state = model.state_dict()
    assert fast.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in fast.state_dict().items())

    optimiser = torch.optim.SGD(outer.parameters(), lr=1e-2)
    torch.manual_seed(2)
    outcome = first_tensor(outer(x))
    torch.manual_seed(2)
    assert torch.equal(outcome, first_tensor(copy.deepcopy(model).train()(x)))
    outcome.square().mean().backward()
    optimiser.step()
    trained = outer.eval()[0]
    again, report = gplws.accelerate(trained)
    assert report.swapped
    with torch.no_grad():
        got, expected = first_tensor(again(x)), first_tensor(trained(x))
        assert relative_error(got, expected) < 1e-4
        assert not torch.equal(got, first_tensor(model(x)))  # weights have moved


def first_tensor(result: object) -> Tensor:
    """A result, or the first one of several."""
    return result if isinstance(result, Tensor) else result[0]


def test_a_part_alone_cannot_be_trained() -> None:
    fast, _ = gplws.accelerate(lively(Controlled()))
    with pytest.raises(RuntimeError, match="of the whole"):
        fast.block.train()
    assert not fast.eval().training


def test_a_network_given_back_has_the_later_dtype() -> None:
    fast, _ = gplws.accelerate(lively(Branches()))
    assert all(p.dtype == torch.float64 for p in fast.double().train().parameters())


def test_a_part_in_training_mode_is_left_alone() -> None:
    model = lively(nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4)))
    model[1].train()
    x = torch.randn(2, 2, 3, 5, 5)
    fast, report = gplws.accelerate(model)
    assert note(report, "1") == "it is in training mode"
    assert any(module.training for module in fast.modules())
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 1e-5


@pytest.mark.parametrize("wrong", [None, 3, lambda x: x])
def test_what_is_no_module_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="model: expected"):
        gplws.accelerate(wrong)


def test_a_compiled_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"before torch\.compile"):
        gplws.accelerate(torch.compile(Branches().eval()))


def test_copies_and_files_of_the_result_compute_the_same() -> None:
    model = lively(AiFDepthNet())
    fast, _ = gplws.accelerate(model)
    x = torch.rand(1, 1, 2, 32, 32)
    with torch.no_grad():
        expected = fast.focus_volume(x)
        assert torch.equal(copy.deepcopy(fast).focus_volume(x), expected)
        assert torch.equal(from_file(fast).focus_volume(x), expected)
    with pytest.raises(AttributeError, match="merged into the accelerated"):
        _ = fast.conv3d_1a
    again, report = gplws.accelerate(fast)
    assert not report.swapped
    assert type(again) is type(fast)


def symmetric_gplws() -> nn.Module:
    sizes: dict = {"widths": (4, 8), "depths": (1, 1), "decoder_depths": (1,), "middle": 1}
    return GPLWSNet(**sizes, stem="features", symmetric=True)


def test_networks_of_symmetric_kernels_go_to_files_and_back_to_training() -> None:
    model = lively(symmetric_gplws())
    fast, _ = gplws.accelerate(model)
    x = torch.rand(1, 3, 4, 16, 16)
    with torch.no_grad():
        expected = model(x)
        assert relative_error(from_file(fast)(x), expected) < 1e-5
        assert torch.equal(from_file(from_file(model))(x), expected)
    trained = from_file(from_file(fast)).train().eval()
    assert type(trained) is GPLWSNet
    state = trained.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    outcome = trained(x)
    assert torch.equal(outcome, expected)
    outcome.square().mean().backward()
    assert all(p.grad is not None for p in trained.parameters())
    conv = trained.downs[0]
    parametrize.remove_parametrizations(conv, "weight")
    assert type(conv) is gplws.nn.DownConv3d
    assert torch.equal(conv.weight, conv.weight.flip(2))


def test_a_network_that_cannot_be_pickled_stays_out_of_files() -> None:
    conv = parametrizations.weight_norm(nn.Conv3d(3, 4, 3, padding=1))
    model = lively(nn.Sequential(conv, nn.ReLU()))
    fast, _ = accelerated(model, torch.randn(1, 3, 4, 16, 16))
    x = torch.randn(1, 3, 4, 16, 16)
    read = from_file(fast)
    with torch.no_grad():
        for copied in (read, from_file(read), copy.copy(read), copy.deepcopy(read)):
            assert torch.equal(copied(x), fast(x))
            with pytest.raises(RuntimeError, match="could not be pickled"):
                copied.train()
            with pytest.raises(RuntimeError, match="could not be pickled"):
                copied[0]
        assert not read.eval().double().training
    for copied in (copy.copy(fast), copy.deepcopy(fast), fast):
        assert len(copied) == 2
        assert type(copied.train()) is nn.Sequential


PORTABLE = {"Branches": Branches, "Stacked": Stacked, "GPLWSNet": small_gplws, **PEERS}
"""All networks of which the fast form is exported and compiled."""
SIDE = 32  # of their images, the least that all of them take without padding


@pytest.mark.parametrize("name", PORTABLE)
def test_results_can_be_exported(name: str) -> None:
    model = lively(PORTABLE[name]())
    fast, _ = gplws.accelerate(model)
    x = torch.rand(1, 3, 4, SIDE, SIDE)
    program = torch.export.export(fast, (x,))
    with torch.no_grad():
        got, expected = first_tensor(program.module()(x)), first_tensor(model(x))
        assert relative_error(got, expected) < 1e-4


def test_arguments_keep_their_names() -> None:
    model, x = lively(Branches()), torch.rand(2, 3, 4, 16, 16)
    fast, _ = gplws.accelerate(model)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {"x": {0: dynamic, 2: dynamic, 3: dynamic, 4: dynamic}}
    program = torch.export.export(fast, (x,), dynamic_shapes=shapes)
    y = torch.rand(3, 3, 5, 12, 20)
    with torch.no_grad():
        assert relative_error(program.module()(y), model(y)) < 1e-5


class Shrinks(nn.Module):
    """Pools, doubled pixels and frames, of which each takes a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.up = nn.ConvTranspose3d(9, 9, (3, 4, 4), (1, 2, 2), 1)
        self.head = nn.Conv3d(9, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.encoder(x.transpose(1, 2).flatten(0, 1))
        joined = torch.cat([found["up"], found["side"]], 1)
        y = joined.unflatten(0, (-1, x.shape[2])).transpose(1, 2)
        return self.head(self.up(self.pool(y)))


@pytest.mark.parametrize("kind", [Shrinks, small_gplws])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_results_can_be_traced_for_other_sizes(
    kind: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gplws.nn.inference.PIXELS_AT_ONCE", 2 * 16 * 16)
    model = lively(kind())
    fast, _ = gplws.accelerate(model)
    x = torch.rand(1, 3, 6, 24, 20)
    with torch.no_grad():
        traced = torch.jit.trace(fast, torch.rand(1, 3, 4, 16, 16))
        assert relative_error(traced(x), model(x)) < 1e-5


@pytest.mark.parametrize("name", PORTABLE)
def test_results_can_be_compiled_without_a_break(name: str) -> None:
    torch._dynamo.reset()
    model = lively(PORTABLE[name]())
    fast, _ = gplws.accelerate(model)
    x = torch.rand(1, 3, 4, SIDE, SIDE)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_error(first_tensor(compiled(x)), first_tensor(model(x))) < 1e-4
