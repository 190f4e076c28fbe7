"""The refinement along a surface against stock ops in float64, and what it does to known shapes."""

from __future__ import annotations

import math

import pytest
import torch
from instruction_sets import printed_under_each
from torch import Tensor

from gplws.ops import fit_peak, reference, sample_surface, smooth_surface

TOO_MANY = torch.zeros(1).expand(2**24 + 1, 1, 1)  # frames for float32 to number
SIZES = [(1, 1), (1, 40), (40, 1), (2, 3), (17, 33), (64, 130)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def peaks(vertex: Tensor, width: float = 2.0) -> Tensor:
    """Samples (7, H, W) of Gaussian peaks at ``vertex`` (H, W)."""
    places = torch.arange(-3.0, 4.0).view(-1, 1, 1)
    return torch.exp(-0.5 * ((places - vertex) / width) ** 2)


def surface(height: int, width: int, frames: int) -> Tensor:
    """Slopes, steps and roughness, from the first frame to the last."""
    x = torch.arange(width).expand(height, width) / width
    step = (torch.arange(height)[:, None] > height // 2) * 0.4
    return ((x + step + 0.2 * drawn(height, width)) / 1.6 * (frames - 1)).clamp(0, frames - 1)


@pytest.mark.parametrize("limit", [0.3, 2.0, 1e6])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_smoothing_agrees_with_stock_ops(size, limit):
    depth = surface(*size, frames=10)
    expected = reference.smooth_surface(depth.double(), limit=limit)
    found = smooth_surface(depth, limit=limit)
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_smoothing_keeps_planes_inside_and_steps_beyond_the_limit():
    plane = torch.arange(40.0) * 0.1 + torch.arange(30.0)[:, None] * 0.05
    inside = (slice(3, -3), slice(3, -3))
    torch.testing.assert_close(smooth_surface(plane, limit=2)[inside], plane[inside])
    step = torch.where(torch.arange(40) < 20, 1.0, 3.5).expand(30, 40)
    assert torch.equal(smooth_surface(step, limit=2), step)
    noisy = step + 0.2 * (drawn(30, 40) - 0.5)
    error = (smooth_surface(noisy, limit=2) - step).abs().mean()
    assert error < 0.35 * (noisy - step).abs().mean()


@pytest.mark.parametrize("spacing", [1, 2, 5])
@pytest.mark.parametrize("frames", [1, 2, 3, 10, 40])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_samples_agree_with_stock_ops(size, frames, spacing):
    responses, depth = drawn(frames, *size), surface(*size, frames=frames)
    expected = reference.sample_surface(responses.double(), depth.double(), spacing=spacing)
    samples = sample_surface(responses, depth, spacing=spacing)
    for found, wanted in zip(samples, expected, strict=True):
        assert found.dtype == torch.float32 and found.is_contiguous()
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6 * frames)


def test_samples_are_the_responses_of_frames_and_between_them():
    responses = drawn(12, 4, 5)
    found = sample_surface(responses, torch.full((4, 5), 5.25))
    assert torch.equal(found.distances, torch.arange(-3.0, 4).view(-1, 1, 1).expand(7, 4, 5))
    assert torch.equal(found.weights, torch.ones(7, 4, 5))
    torch.testing.assert_close(found.values, 0.75 * responses[2:9] + 0.25 * responses[3:10])
    # Two samples on the near side of an end, and as many on the far one.
    at_end = sample_surface(responses, torch.full((4, 5), 1.0))
    assert at_end.weights[:, 0, 0].tolist() == [0, 0, 1, 1, 1, 1, 0]


def test_no_surface_reads_outside_the_stack():
    depth = torch.tensor([[-7.0, 100.0, torch.nan, torch.inf, -torch.inf, 2.0]])
    found = sample_surface(drawn(4, 1, 6), depth)
    assert found.values[:, 0, [0, 1, 5]].isfinite().all()
    assert found.weights[:, 0, 5].tolist() == [0, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fits_agree_with_stock_ops(size, weighted):
    values = peaks(4 * drawn(*size) - 2) + 0.02 * drawn(7, *size, seed=1)
    others: list[Tensor] = []
    if weighted:
        weights = 0.2 + 0.8 * drawn(7, *size, seed=2)
        distances = torch.arange(-3.0, 4.0).view(-1, 1, 1) + 0.1 * drawn(7, *size, seed=3)
        middle = weights * values[3] * (0.98 + 0.04 * drawn(7, *size, seed=4))
        values, others = values * weights, [middle, distances * weights, weights]
    expected = reference.fit_peak(values.double(), *(t.double() for t in others))
    found = fit_peak(values, *others)
    assert torch.equal(found.concave, expected.concave) and found.concave.all()
    torch.testing.assert_close(found.vertex.double(), expected.vertex, rtol=0, atol=1e-4)


def test_a_gaussian_peak_is_found_exactly():
    vertex = (6 * drawn(20, 30) - 3).clamp(-2.9, 2.9)
    found = fit_peak(peaks(vertex))
    assert found.concave.all()
    torch.testing.assert_close(found.vertex, vertex, rtol=0, atol=2e-4)
    # The floor beside a narrow peak counts little.
    on_floor = fit_peak(peaks(vertex.clamp(-1, 1), 1.0) + 0.02)
    torch.testing.assert_close(on_floor.vertex, vertex.clamp(-1, 1), rtol=0, atol=0.06)


def test_what_has_no_peak_is_said_to_have_none():
    flat, valley = torch.ones(7, 1), 1 - 0.9 * peaks(torch.zeros(1, 1))[:, 0]
    dark, unknown = torch.zeros(7, 1), torch.full((7, 1), torch.nan)
    values = torch.stack([flat, valley, dark, unknown], 2)
    for found in (fit_peak(values), reference.fit_peak(values)):
        assert not found.concave.any() and not found.vertex.any()
    # Two samples define no parabola.
    weights = torch.tensor([0.0, 0, 0, 1, 1, 0, 0]).view(-1, 1, 1)
    few = peaks(torch.tensor([[0.3]]))
    distances = torch.arange(-3.0, 4.0).view(-1, 1, 1)
    arguments = (few * weights, few[3] * weights, distances * weights, weights)
    assert not fit_peak(*arguments).concave.any()
    assert not reference.fit_peak(*arguments).concave.any()


def test_gradients_are_those_of_stock_ops():
    depth = surface(6, 7, frames=8).requires_grad_()
    responses = drawn(8, 6, 7).requires_grad_()

    def vertex(ops):
        smooth = ops.smooth_surface(depth, limit=2.0)
        samples = ops.sample_surface(responses, smooth)
        middle = samples.values[3] * samples.weights
        fit = ops.fit_peak(samples.values, middle, samples.distances, samples.weights)
        return torch.autograd.grad(fit.vertex.sum(), (depth, responses))

    from gplws import ops

    for found, expected in zip(vertex(ops), vertex(reference), strict=True):
        assert found.abs().max() > 0 and torch.equal(found, expected)


def test_they_pass_the_checks_of_torch():
    depth, responses, values = surface(6, 11, frames=8), drawn(8, 6, 11), drawn(7, 6, 11)
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.gplws
    torch.library.opcheck(ops.smooth_surface.default, (depth, 2.0), test_utils=tests)
    torch.library.opcheck(ops.sample_surface.default, (responses, depth, 2), test_utils=tests)
    for others in ((None,) * 3, tuple(drawn(3, 7, 6, 11))):
        torch.library.opcheck(ops.fit_peak.default, (values, *others), test_utils=tests)
    compiled = torch.compile(lambda x: smooth_surface(x, limit=2.0), backend="aot_eager")
    assert torch.equal(compiled(depth), smooth_surface(depth, limit=2.0))
    mapped = torch.vmap(lambda x: smooth_surface(x, limit=2.0))(torch.stack([depth, depth.flip(0)]))
    torch.testing.assert_close(mapped[0], smooth_surface(depth, limit=2.0))


def test_strides_do_not_matter():
    depth, responses = surface(20, 30, frames=8), drawn(8, 20, 30)
    turned, others = depth.T.contiguous().T, responses.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(smooth_surface(turned, limit=2), smooth_surface(depth, limit=2))
    samples = sample_surface(responses, depth)
    assert all(map(torch.equal, sample_surface(others, turned), samples))
    found, expected = fit_peak(others[:7]), fit_peak(responses[:7].contiguous())
    assert torch.equal(found.vertex, expected.vertex)


@pytest.mark.parametrize("size", [(0, 4), (4, 0)], ids=str)
def test_nothing_gives_nothing(size):
    assert smooth_surface(torch.empty(size), limit=1).shape == size
    samples = sample_surface(torch.empty(3, *size), torch.empty(size))
    assert fit_peak(samples.values).vertex.shape == size


def test_float64_is_computed_as_such():
    depth = surface(5, 6, frames=4).double()
    assert smooth_surface(depth, limit=1).dtype == torch.float64
    assert sample_surface(drawn(4, 5, 6).double(), depth).values.dtype == torch.float64
    assert fit_peak(drawn(7, 5, 6).double()).vertex.dtype == torch.float64


SCRIPT = """
import torch
from gplws.ops import fit_peak, sample_surface, smooth_surface
generator = torch.Generator().manual_seed(0)
depth = torch.rand(40, 61, generator=generator) * 9
surface = smooth_surface(depth, limit=2.0)
samples = sample_surface(torch.rand(10, 40, 61, generator=generator), surface)
fit = fit_peak(samples.values, samples.values[3] * samples.weights, samples.distances,
               samples.weights)
print(float(surface.double().mean()), float(samples.values.double().mean()),
      float(fit.vertex.double().mean()))
"""


def test_instruction_sets_and_numbers_of_threads_agree():
    found = [[float(number) for number in text.split()] for text in printed_under_each(SCRIPT)]
    for numbers in found[1:]:
        assert numbers == pytest.approx(found[0], abs=1e-4)
    depth, responses = surface(70, 91, frames=10), drawn(10, 70, 91)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            samples = sample_surface(responses, smooth_surface(depth, limit=2.0))
            results.append([*samples, fit_peak(samples.values).vertex])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: smooth_surface(drawn(4), limit=1), ValueError, r"depth must be \(H, W\)"),
        (lambda: smooth_surface(drawn(4, 4), limit=0), ValueError, "limit must be positive, got 0"),
        (lambda: smooth_surface(drawn(4, 4), limit=math.nan), ValueError, "limit must be positive"),
        (lambda: smooth_surface(drawn(4, 4).int(), limit=1), TypeError, "depth must be of a float"),
        (lambda: sample_surface(drawn(4, 4), drawn(4, 4)), ValueError, "responses must be"),
        (
            lambda: sample_surface(drawn(0, 4, 4), drawn(4, 4)),
            ValueError,
            "responses must have 1 to 16777216 frames, got 0",
        ),
        (lambda: sample_surface(TOO_MANY, drawn(1, 1)), ValueError, "frames, got 16777217"),
        (lambda: sample_surface(drawn(3, 4, 4), drawn(4, 5)), ValueError, "surface must be"),
        (
            lambda: sample_surface(drawn(3, 4, 4), drawn(4, 4), spacing=0),
            ValueError,
            "spacing must be at least 1, got 0",
        ),
        (
            lambda: sample_surface(drawn(3, 4, 4), drawn(4, 4).double()),
            TypeError,
            "surface must be torch.float32 as responses, got torch.float64",
        ),
        (lambda: fit_peak(drawn(5, 4, 4)), ValueError, r"values must be \(7, H, W\)"),
        (lambda: fit_peak(drawn(7, 4, 4), drawn(7, 4, 4)), ValueError, "go together"),
        (
            lambda: fit_peak(*drawn(3, 7, 4, 4), drawn(7, 4, 5)),
            ValueError,
            "weights must be the shape of values",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_kernels_check_their_own_arguments():
    ops, map_ = torch.ops.gplws, drawn(4, 4)
    for call, message in (
        (lambda: ops.smooth_surface(map_, 0.0), "limit must be positive"),
        (lambda: ops.smooth_surface(drawn(4), 1.0), r"depth must be \(H, W\)"),
        (lambda: ops.smooth_surface(map_.double(), 1.0), "depth must be float32"),
        (lambda: ops.sample_surface(map_, map_, 1), "responses must be"),
        (lambda: ops.sample_surface(drawn(0, 4, 4), map_, 1), "must have 1 to 16777216 frames"),
        (lambda: ops.sample_surface(TOO_MANY, drawn(1, 1), 1), "frames, got 16777217"),
        (lambda: ops.sample_surface(drawn(3, 4, 4), map_, 0), "spacing must be positive"),
        (lambda: ops.sample_surface(drawn(3, 4, 5), map_, 1), "surface has the wrong shape"),
        (lambda: ops.fit_peak(drawn(6, 4, 4), None, None, None), "values must be"),
        (lambda: ops.fit_peak(drawn(7, 4, 4), None, None, drawn(7, 4, 4)), "go together"),
        (lambda: ops.fit_peak(*drawn(3, 7, 4, 4), drawn(7, 4)), "weights has the wrong shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
