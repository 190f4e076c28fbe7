import math

import numpy as np
import pytest
import torch

from gplws.metrics import (
    DepthMetrics,
    bumpiness,
    depth_metrics,
    focus_uncertainty,
    frame_metrics,
    mean_metrics,
    sparsification,
)

NAN = math.nan


def test_metrics_of_three_pixels_are_as_computed_by_hand():
    truth = torch.tensor([[1.0, 2.0, 4.0]])
    guess = torch.tensor([[1.0, 3.0, 2.0]])
    metrics = depth_metrics(guess, truth, seconds=0.25)
    assert metrics.mse == pytest.approx((0 + 1 + 4) / 3)
    assert metrics.mae == pytest.approx((0 + 1 + 2) / 3)
    assert metrics.rmse == pytest.approx(math.sqrt(5 / 3))
    expected = math.sqrt((math.log(1.5) ** 2 + math.log(0.5) ** 2) / 3)
    assert metrics.log_rmse == pytest.approx(expected)
    assert metrics.abs_rel == pytest.approx((0 + 1 / 2 + 2 / 4) / 3)
    assert metrics.sq_rel == pytest.approx((0 + 1 / 2 + 4 / 4) / 3)
    # Ratios 1, 1.5 and 2 against 1.25, 1.5625 and 1.953125.
    assert (metrics.a1, metrics.a2, metrics.a3) == pytest.approx((1 / 3, 2 / 3, 2 / 3))
    assert metrics.seconds == 0.25
    assert metrics.coverage == 1.0 and metrics.pixels == 3.0
    assert math.isnan(metrics.mean_uncertainty)


def test_metrics_of_a_noisy_map_equal_numpy_in_float64():
    random = np.random.default_rng(3)
    truth = random.uniform(0.5, 3.0, (37, 41))
    guess = (truth * random.lognormal(0, 0.3, truth.shape)).astype(np.float32)
    spread = random.uniform(0, 1, truth.shape)
    valid = random.random(truth.shape) > 0.2
    metrics = depth_metrics(guess, truth, valid, uncertainty=spread)
    d, t = guess.astype(np.float64)[valid], truth[valid]
    ratio = np.maximum(d / t, t / d)
    expected = {
        "mse": np.mean((d - t) ** 2),
        "mae": np.mean(np.abs(d - t)),
        "rmse": np.sqrt(np.mean((d - t) ** 2)),
        "log_rmse": np.sqrt(np.mean((np.log(d) - np.log(t)) ** 2)),
        "abs_rel": np.mean(np.abs(d - t) / t),
        "sq_rel": np.mean((d - t) ** 2 / t),
        "a1": np.mean(ratio < 1.25),
        "a2": np.mean(ratio < 1.25**2),
        "a3": np.mean(ratio < 1.25**3),
        "mean_uncertainty": np.mean(spread[valid]),
        "pixels": valid.sum(),
    }
    for name, value in expected.items():
        assert getattr(metrics, name) == pytest.approx(value, rel=1e-12), name


def test_missing_truth_and_missing_predictions_do_not_count_but_lower_the_coverage():
    truth = torch.tensor([[1.0, 2.0, NAN, 4.0, 5.0]])
    guess = torch.tensor([[1.5, NAN, 3.0, 4.5, 99.0]])
    valid = torch.tensor([[True, True, True, True, False]])
    metrics = depth_metrics(guess, truth, valid)
    assert metrics.mae == 0.5
    assert metrics.pixels == 2.0
    assert metrics.coverage == pytest.approx(2 / 3)


def test_relative_errors_ask_for_a_truth_above_zero_and_predictions_below_are_misses():
    truth = torch.tensor([[-1.0, 0.0, 2.0, 4.0]])
    guess = torch.tensor([[-2.0, 1.0, -2.0, 4.0]])
    metrics = depth_metrics(guess, truth)
    assert metrics.abs_rel == pytest.approx((4 / 2 + 0) / 2)
    assert (metrics.a1, metrics.a3) == (0.5, 0.5)
    assert metrics.log_rmse == 0.0
    assert metrics.mae == pytest.approx((1 + 1 + 4 + 0) / 4)


def test_without_a_single_pixel_every_figure_is_nan_and_nothing_is_raised():
    metrics = depth_metrics(torch.zeros(4, 4), torch.full((4, 4), NAN))
    assert metrics.pixels == 0
    for name in ("mse", "mae", "rmse", "log_rmse", "abs_rel", "a1", "bumpiness", "coverage"):
        assert math.isnan(getattr(metrics, name)), name


def test_bumpiness_of_a_parabola_is_its_second_derivative_times_four():
    error = (0.001 * torch.arange(16.0).double() ** 2).repeat(16, 1)
    error[:, :2] = error[:, -2:] = torch.nan  # repeated borders would bend it more
    # d2/dx2 is 0.002, and each of the two Scharr differences spans two pixels.
    assert bumpiness(error, torch.zeros(16, 16)) == pytest.approx(100 * 0.008, rel=1e-9)


def test_bumpiness_equals_scharr_filters_of_scipy_and_is_clipped():
    ndimage = pytest.importorskip("scipy.ndimage")
    random = np.random.default_rng(0)
    truth, guess = random.normal(0, 1, (2, 20, 24))
    guess = truth + 0.003 * guess
    error = guess - truth
    across = np.array([[3, 10, 3], [0, 0, 0], [-3, -10, -3]]) / 16.0

    def derivatives(image):
        return ndimage.convolve(image, across), ndimage.convolve(image, across.T)

    parts = [second for first in derivatives(error) for second in derivatives(first)]
    norm = np.sqrt(sum(part**2 for part in parts))
    expected = 100 * np.minimum(norm, 0.05).mean()
    assert bumpiness(guess, truth) == pytest.approx(expected, rel=1e-9)
    assert bumpiness(truth + 100 * (guess - truth), truth) <= 5.0


def test_bumpiness_ignores_a_tilted_error_and_whatever_lies_around_holes():
    rows, columns = torch.meshgrid(
        torch.arange(12.0).double(), torch.arange(14.0).double(), indexing="ij"
    )
    plane = 3 + 0.5 * rows - 0.2 * columns
    plane[:, 5] = 1e6
    valid = torch.ones(12, 14, dtype=torch.bool)
    valid[:, 5] = False
    inner = torch.full_like(plane, torch.nan)
    inner[2:-2, 2:-2] = plane[2:-2, 2:-2]  # repeated borders would bend a plane
    assert bumpiness(inner, torch.zeros_like(plane), valid) == pytest.approx(0, abs=1e-9)
    assert math.isnan(bumpiness(inner[:4], torch.zeros(4, 14)))


def test_frame_metrics_count_frames_between_uneven_positions():
    positions = torch.tensor([0.0, 10.0, 30.0, 40.0])
    truth = torch.tensor([[0.0, 10.0, 20.0, 40.0, 50.0]])  # frames 0, 1, 1.5, 3, outside
    guess = torch.tensor([[0.0, 20.0, 40.0, -5.0, 50.0]])  # frames 0, 1.5, 3, 0 (at the end)
    metrics = frame_metrics(guess, truth, positions)
    assert metrics.mae_frames == pytest.approx((0 + 0.5 + 1.5 + 3) / 4)
    assert metrics.rmse_frames == pytest.approx(math.sqrt((0.25 + 2.25 + 9) / 4))
    assert metrics.bias_frames == pytest.approx((0.5 + 1.5 - 3) / 4)
    assert metrics.median_frames == 1.0
    assert (metrics.off_by_1, metrics.off_by_2) == (0.5, 0.25)
    assert metrics.mae_um == pytest.approx((0 + 10 + 20 + 45) / 4)
    assert metrics.pixels == 4


def test_frame_metrics_are_the_same_for_falling_positions_and_know_um_from_other_units():
    positions = torch.tensor([0.0, 10.0, 30.0, 40.0])
    truth, guess = torch.rand(5, 6) * 40, torch.rand(5, 6) * 40
    rising = frame_metrics(guess, truth, positions)
    falling = frame_metrics(guess, truth, positions.flip(0), unit="px")
    assert falling.mae_frames == pytest.approx(rising.mae_frames)
    assert falling.bias_frames == pytest.approx(-rising.bias_frames)
    assert math.isnan(falling.mae_um) and not math.isnan(rising.mae_um)


def test_sparsification_of_a_perfect_confidence_is_its_own_oracle():
    error = torch.rand(50, 40)
    truth = torch.zeros(50, 40)
    found = sparsification(error, truth, -error)
    np.testing.assert_allclose(found.rmse, found.oracle_rmse, rtol=1e-12)
    assert found.ause == pytest.approx(0, abs=1e-12)
    kept = error.flatten().sort().values[:1600].double()
    assert found.rmse_after_20_percent == pytest.approx(float(kept.square().mean().sqrt()))
    assert found.oracle_rmse_after_20_percent == pytest.approx(found.rmse_after_20_percent)
    assert found.rmse[0] == pytest.approx(float(error.double().square().mean().sqrt()))


def test_sparsification_of_a_constant_confidence_is_flat_whatever_the_order_of_pixels():
    error = torch.arange(100.0).reshape(10, 10)
    found = sparsification(error, torch.zeros(10, 10), torch.ones(10, 10))
    np.testing.assert_allclose(found.rmse, found.rmse[0])
    assert found.ause > 0.2


def test_sparsification_ranks_confidences_by_how_much_they_know():
    error = torch.rand(60, 60)
    truth = torch.zeros_like(error)
    knowing = sparsification(error, truth, -error + 0.1 * torch.randn_like(error))
    guessing = sparsification(error, truth, torch.rand_like(error))
    misled = sparsification(error, truth, error)
    assert knowing.ause < guessing.ause < misled.ause
    assert knowing.rmse_after_20_percent < guessing.rmse_after_20_percent


def test_sparsification_area_of_four_pixels_is_as_computed_by_hand():
    error = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    confidence = torch.tensor([[0.9, 0.1, 0.8, 0.5]])  # dropped: 2, 4, 3; the oracle: 4, 3, 2
    found = sparsification(error, torch.zeros(1, 4), confidence, points=4)
    curve = [math.sqrt(30 / 4), math.sqrt(26 / 3), math.sqrt(10 / 2), 1.0]
    oracle = [math.sqrt(30 / 4), math.sqrt(14 / 3), math.sqrt(5 / 2), 1.0]
    np.testing.assert_allclose(found.rmse, curve)
    np.testing.assert_allclose(found.oracle_rmse, oracle)
    gap = (curve[1] - oracle[1] + curve[2] - oracle[2]) / 4
    assert found.ause == pytest.approx(gap / curve[0])


def test_focus_uncertainty_is_the_deviation_of_the_focus_position():
    probabilities = torch.tensor([0.25, 0.5, 0.25]).reshape(1, 3, 1, 1)
    positions = torch.tensor([0.0, 2.0, 4.0])
    assert float(focus_uncertainty(probabilities, positions)) == pytest.approx(math.sqrt(2.0))
    assert focus_uncertainty(probabilities, positions[None]).shape == (1, 1, 1)
    with pytest.raises(ValueError, match="focus_positions"):
        focus_uncertainty(probabilities, positions[:2])


def test_mean_metrics_average_images_and_leave_nan_out():
    first = depth_metrics(torch.tensor([[1.0]]), torch.tensor([[2.0]]), seconds=1.0)
    second = depth_metrics(torch.tensor([[2.0]]), torch.tensor([[-1.0]]))
    mean = mean_metrics([first, second])
    assert isinstance(mean, DepthMetrics)
    assert mean.mae == 2.0
    assert mean.abs_rel == 0.5 and mean.seconds == 1.0
    with pytest.raises(ValueError, match="metrics"):
        mean_metrics([])


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ((torch.zeros(3, 4), torch.zeros(3, 5)), ValueError, "truth"),
        ((torch.zeros(4), torch.zeros(4)), ValueError, "prediction"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(3, 4)), TypeError, "valid"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(3, 3) > 0), ValueError, "valid"),
        ((torch.zeros(3, 4, dtype=torch.cfloat), torch.zeros(3, 4)), TypeError, "prediction"),
    ],
)
def test_what_does_not_fit_is_named(arguments, error, name):
    with pytest.raises(error, match=name):
        depth_metrics(*arguments)


def test_focus_positions_that_turn_back_are_refused():
    with pytest.raises(ValueError, match="focus_positions"):
        frame_metrics(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([0.0, 2.0, 1.0]))


def test_arrays_of_any_strides_and_byte_order_are_read():
    truth = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    valid = truth > 3
    expected = depth_metrics(truth[::-1].copy(), truth, valid[::-1].copy())
    for order in ("<f4", ">f4", ">f8"):
        found = depth_metrics(truth.astype(order)[::-1], truth, valid[::-1])
        assert repr(found) == repr(expected)


def test_masked_arrays_are_refused_as_their_hidden_values_would_count():
    values = np.ma.masked_greater(np.ones((3, 4)), 0)
    with pytest.raises(TypeError, match="prediction: expected no masked array; pass valid="):
        depth_metrics(values, np.ones((3, 4)))
