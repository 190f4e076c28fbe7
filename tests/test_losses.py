from __future__ import annotations

import math

import pytest
import torch

from gplws.losses import (
    FocusLoss,
    absolute_error,
    expected_index,
    gradient_error,
    smooth_l1,
    soft_cross_entropy,
    soft_target,
    squared_error,
)

NAN = math.nan


@pytest.fixture
def case():
    """Logits, true depths with a NaN that counts and one that does not, and a mask; float64."""
    volume = 2 * torch.randn(2, 6, 3, 4, dtype=torch.float64)
    depth = 5 * torch.rand(2, 3, 4, dtype=torch.float64)
    valid = torch.rand(2, 3, 4) < 0.7
    valid[0, 0, :3] = torch.tensor([True, False, True])
    depth[0, 0, 0] = depth[0, 0, 1] = NAN
    return volume, depth, valid


def pixels(depth, valid):
    """Places that count, one by one."""
    return [
        place
        for place in torch.cartesian_prod(*map(torch.arange, depth.shape)).tolist()
        if valid[tuple(place)] and not math.isnan(depth[tuple(place)])
    ]


def softmax(logits):
    exponentials = [math.exp(v) for v in logits]
    return [e / sum(exponentials) for e in exponentials]


def test_soft_cross_entropy_is_its_formula(case):
    volume, depth, valid = case
    total = 0.0
    places = pixels(depth, valid)
    for b, y, x in places:
        d = depth[b, y, x].item()
        target = [math.exp(-((n - d) ** 2) / (2 * 0.7**2)) for n in range(6)]
        p = softmax(volume[b, :, y, x].tolist())
        total -= sum(t / sum(target) * math.log(q) for t, q in zip(target, p, strict=True))
    got = soft_cross_entropy(volume, depth, valid, sigma=0.7)
    assert got.item() == pytest.approx(total / len(places), rel=1e-12)


@pytest.mark.parametrize("window", [None, 1, 2, 9])
def test_the_expected_index_is_the_mean_over_the_frames_of_the_window(case, window):
    volume, _, _ = case
    got = expected_index(volume, window)
    for b, y, x in torch.cartesian_prod(*map(torch.arange, got.shape)).tolist():
        logits = volume[b, :, y, x].tolist()
        winner = max(range(6), key=lambda n: logits[n])
        frames = [n for n in range(6) if window is None or abs(n - winner) <= window]
        p = softmax([logits[n] for n in frames])
        expected = sum(n * q for n, q in zip(frames, p, strict=True))
        assert got[b, y, x].item() == pytest.approx(expected, rel=1e-12)


def test_a_second_peak_far_away_pulls_only_the_full_expectation():
    volume = torch.tensor([0.0, 5.0, 0.0, 0.0, 0.0, 0.0, 4.0, 0.0]).view(1, 8, 1, 1)
    assert abs(expected_index(volume, 2).item() - 1) < 0.05
    assert expected_index(volume).item() > 2


@pytest.mark.parametrize(
    ("function", "of_one"),
    [
        (absolute_error, abs),
        (squared_error, lambda e: e * e),
        (smooth_l1, lambda e: e * e if abs(e) < 0.5 else abs(e) - 0.25),  # beta = 0.5
    ],
)
def test_errors_are_means_over_the_pixels_that_count(case, function, of_one):
    _, depth, valid = case
    estimate = 5 * torch.rand_like(depth)
    values = [
        of_one(estimate[b, y, x].item() - depth[b, y, x].item()) for b, y, x in pixels(depth, valid)
    ]
    got = function(estimate, depth, valid).item()
    assert got == pytest.approx(sum(values) / len(values), rel=1e-12)


def test_the_gradient_error_is_the_sum_over_pairs_that_count(case):
    _, depth, valid = case
    estimate = 5 * torch.rand_like(depth)
    places = pixels(depth, valid)
    error = estimate - depth
    total = 0.0
    for b, y, x in places:
        for other in ([b, y, x + 1], [b, y + 1, x]):
            if other in places:
                total += abs(error[tuple(other)].item() - error[b, y, x].item())
    assert gradient_error(estimate, depth, valid).item() == pytest.approx(total / len(places))
    moved = depth + 0.3
    assert gradient_error(moved, depth, valid).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", ["soft_target", "l1", "mse"])
@pytest.mark.parametrize("window", [None, 2])
def test_gradients_are_those_of_finite_differences(case, kind, window):
    volume, depth, valid = case
    loss = FocusLoss(kind=kind, window=window, gradient_weight=0.3)
    volume, depth, valid = (t[:1, ..., :2, :3].clone() for t in (volume, depth, valid))
    assert valid.any()
    torch.autograd.gradcheck(
        lambda v: loss(v, depth, valid).total, volume.requires_grad_(), atol=1e-6
    )


@pytest.mark.parametrize("kind", ["soft_target", "l1", "mse"])
def test_what_is_invalid_changes_neither_loss_nor_gradient(case, kind):
    volume, depth, valid = case
    loss = FocusLoss(kind=kind, gradient_weight=0.1)
    results = []
    for filler in (NAN, 1e30, -3.0):
        v = volume.clone().requires_grad_()
        filled = torch.where(valid & depth.isfinite(), depth, filler)
        total = loss(v, filled, valid & depth.isfinite()).total
        total.backward()
        assert v.grad.isfinite().all()
        results.append((total.detach(), v.grad))
    for total, gradient in results[1:]:
        assert torch.equal(total, results[0][0]) and torch.equal(gradient, results[0][1])
    counts = (valid & depth.isfinite())[:, None].expand_as(volume)
    assert (results[0][1][~counts] == 0).all() and (results[0][1][counts] != 0).any()


def test_without_valid_pixels_loss_and_gradient_are_zero(case):
    volume, depth, valid = case
    volume.requires_grad_()
    total = FocusLoss(gradient_weight=1.0)(volume, depth, torch.zeros_like(valid)).total
    total.backward()
    assert total.item() == 0 and (volume.grad == 0).all()


def test_losses_of_parts_add_up_to_the_loss_of_the_whole(case):
    volume, depth, valid = case
    loss = FocusLoss(gradient_weight=0.2)
    whole = loss(volume, depth, valid).total
    count = float((valid & depth.isfinite()).sum())
    parts = [
        loss(volume[i : i + 1], depth[i : i + 1], valid[i : i + 1], count=count) for i in (0, 1)
    ]
    assert sum(p.total for p in parts).item() == pytest.approx(whole.item(), rel=1e-12)


def test_the_soft_target_sums_to_one_far_outside_of_the_stack_too():
    depth = torch.tensor([[[2.3, -40.0, 60.0, NAN]]])
    target = soft_target(depth, 6)
    torch.testing.assert_close(target.sum(1), torch.ones_like(depth))
    assert target.argmax(1).flatten()[:3].tolist() == [2, 0, 5]


def test_the_parts_add_up_with_their_weights(case):
    volume, depth, valid = case
    loss = FocusLoss(depth_weight=0.4, gradient_weight=0.1)
    total, parts = loss(volume, depth, valid)
    assert set(parts) == {"cross_entropy", "smooth_l1", "gradient"}
    expected = parts["cross_entropy"] + 0.4 * parts["smooth_l1"] + 0.1 * parts["gradient"]
    assert total.item() == pytest.approx(expected.item())
    assert set(FocusLoss(kind="l1")(volume, depth, valid).parts) == {"l1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "l2"}, "loss.kind"),
        ({"sigma": 0.0}, "loss.sigma"),
        ({"beta": -1.0}, "loss.beta"),
        ({"window": 0}, "loss.window"),
        ({"depth_weight": -0.1}, "loss.depth_weight"),
    ],
)
def test_values_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        FocusLoss(**changes)


def test_shapes_that_do_not_fit_are_named(case):
    volume, depth, valid = case
    with pytest.raises(ValueError, match="depth_index: expected"):
        FocusLoss()(volume, depth[:1], valid)
    with pytest.raises(ValueError, match="valid: expected"):
        absolute_error(depth, depth, valid[..., 1:])
    with pytest.raises(TypeError, match=r"valid: expected bool, got torch\.float32"):
        FocusLoss()(volume, depth, valid.float())
