"""The figures that the paper prints, in its Tables 1 to 7.

Rows go by this package's names of networks (:data:`benchmarks.networks.NETWORKS`), columns by the
fields of :class:`gplws.metrics.DepthMetrics`. A dash in the paper is a figure that is missing here.

Source: "GPLWS-Net: grouping parallelism lightweight real-time microscopic 3D shape reconstruction",
Journal of Software, 2024, section 3.
"""

from __future__ import annotations

from typing import NamedTuple

DIFFERENCES = {
    "ablation": (
        "Printed: trained and tested on 4D Light Field (loss, crop, and the size of the input and "
        "the machine of the timing are not printed), mean of 50 repetitions; the parameters of "
        "Table 2 belong to a smaller layout, which is not printed either."
    ),
    "accuracy": (
        "Printed: trained by the authors on the data sets they name, 720 epochs on a TITAN XP, in "
        "the unit of each set; of the other networks some figures are taken from earlier papers."
    ),
    "latency": "Printed: Intel Xeon Silver 4210, number of threads not printed.",
}
"""What is different about the printed figures, for the notes below tables."""


class Ablation(NamedTuple):
    """One row of Tables 1 to 3."""

    parameters: int
    seconds: float
    mse: float


# Table 1: how equal levels of the two paths are connected.
TABLE_1 = {
    "concat": Ablation(546_321, 2.419, 0.0275),
    "add": Ablation(540_273, 0.437, 0.0275),
}

# Table 2: connection and module.
TABLE_2 = {
    ("concat", "conv"): Ablation(1_213_872, 0.457, 0.0516),
    ("concat", "depthwise"): Ablation(200_400, 0.463, 0.0473),
    ("concat", "group parallel"): Ablation(444_048, 0.399, 0.0534),
    ("add", "conv"): Ablation(754_020, 0.353, 0.0468),
    ("add", "depthwise"): Ablation(106_344, 0.394, 0.0479),
    ("add", "group parallel"): Ablation(260_853, 0.350, 0.0372),
}

# Table 3: three branches in training, or one conv with the configuration of inference.
TABLE_3 = {
    "reparameterised": Ablation(540_273, 0.437, 0.0275),
    "plain": Ablation(540_936, 0.437, 0.0339),
}

Errors = dict[str, float]

# Table 4: trained and tested on the same set.
TABLE_4: dict[str, dict[str, Errors]] = {
    "4D Light Field": {
        "fvnet": {"mse": 0.0301, "rmse": 0.1537},
        "dfvnet": {"mse": 0.0317, "rmse": 0.1549},
        "ddffnet": {"mse": 0.1150, "rmse": 0.3310, "bumpiness": 2.95},
        "defocusnet": {"mse": 0.0593, "rmse": 0.2355, "bumpiness": 2.69},
        "aifdepthnet": {"mse": 0.0472, "rmse": 0.2014, "bumpiness": 1.58},
        "gplws": {"mse": 0.0275, "rmse": 0.1442, "bumpiness": 2.49},
    },
    "DefocusNet": {
        "fvnet": {"mse": 0.0189, "abs_rel": 0.1400},
        "dfvnet": {"mse": 0.0205, "abs_rel": 0.1300},
        "ddffnet": {"mse": 0.0440, "mae": 0.1312, "abs_rel": 0.3556},
        "defocusnet": {"mse": 0.0175, "mae": 0.0637, "abs_rel": 0.1386},
        "aifdepthnet": {"mse": 0.0127, "mae": 0.0549, "abs_rel": 0.1115},
        "gplws": {"mse": 0.0106, "mae": 0.0534, "abs_rel": 0.1394},
    },
}

# Table 5: the same; the paper leaves DefocusNet out.
TABLE_5: dict[str, dict[str, Errors]] = {
    "FlyingThings3D": {
        "fvnet": {"mae": 27.442, "rmse": 35.406, "abs_rel": 2.388, "sq_rel": 78.952},
        "dfvnet": {"mae": 27.951, "rmse": 36.098, "abs_rel": 2.334, "sq_rel": 79.705},
        "ddffnet": {"mae": 17.182, "rmse": 27.077, "abs_rel": 1.654, "sq_rel": 45.132},
        "aifdepthnet": {"mae": 6.838, "rmse": 12.247, "abs_rel": 0.666, "sq_rel": 8.788},
        "gplws": {"mae": 6.053, "rmse": 11.045, "abs_rel": 0.631, "sq_rel": 7.575},
    }
}


def _five(mae: float, mse: float, rmse: float, abs_rel: float, sq_rel: float) -> Errors:
    """A row of Table 6."""
    return {"mae": mae, "mse": mse, "rmse": rmse, "abs_rel": abs_rel, "sq_rel": sq_rel}


# Table 6: trained on FlyingThings3D, tested on other sets.
TABLE_6: dict[str, dict[str, Errors]] = {
    "Middlebury": {
        "fvnet": _five(11.276, 177.649, 13.147, 0.360, 5.011),
        "dfvnet": _five(11.407, 183.267, 13.302, 0.344, 4.711),
        "ddffnet": _five(32.499, 1480.444, 37.544, 1.197, 52.169),
        "aifdepthnet": _five(3.825, 58.570, 5.936, 0.165, 3.039),
        "gplws": _five(2.539, 17.497, 4.062, 0.100, 0.642),
    },
    "DefocusNet": {
        "fvnet": _five(0.271, 0.144, 0.353, 0.555, 0.198),
        "dfvnet": _five(0.271, 0.152, 0.360, 0.529, 0.204),
        "ddffnet": _five(89.351, 9305.360, 95.214, 331.124, 3357.152),
        "aifdepthnet": _five(0.183, 0.080, 0.261, 0.725, 0.404),
        "gplws": _five(0.126, 0.053, 0.234, 2.011, 1.826),
    },
    "4D Light Field": {
        "fvnet": _five(1.485, 3.053, 1.704, 2.421, 5.676),
        "dfvnet": _five(1.352, 2.432, 1.552, 1.780, 3.377),
        "ddffnet": _five(94.106, 9806.356, 95.715, 77.899, 7464.454),
        "aifdepthnet": _five(0.205, 0.106, 0.313, 0.198, 0.151),
        "gplws": _five(0.021, 0.042, 0.036, 0.010, 0.036),
    },
}


class Latency(NamedTuple):
    """One network of Table 7 at one shape."""

    seconds: float
    lower_by: float | None = None  # percent that GPLWS-Net needs less, as printed


# Table 7, by frames x height x width. The paper prints 540 x 960 as that, and 600 x 800. At
# 10x512x512 the percentage of DefocusNet does not follow from its seconds (it would be 49.00).
TABLE_7: dict[str, dict[str, Latency]] = {
    "5x256x256": {
        "fvnet": Latency(3.100, 15.56),
        "dfvnet": Latency(3.020, 13.34),
        "ddffnet": Latency(4.491, 41.73),
        "defocusnet": Latency(5.906, 55.69),
        "aifdepthnet": Latency(4.405, 40.60),
        "gplws": Latency(2.617),
    },
    "10x512x512": {
        "fvnet": Latency(14.330, 33.71),
        "dfvnet": Latency(13.850, 31.42),
        "ddffnet": Latency(23.489, 59.57),
        "defocusnet": Latency(18.624, 46.59),
        "aifdepthnet": Latency(11.987, 20.77),
        "gplws": Latency(9.498),
    },
    "15x540x960": {
        "fvnet": Latency(42.614, 28.56),
        "dfvnet": Latency(42.776, 28.83),
        "ddffnet": Latency(79.165, 61.55),
        "defocusnet": Latency(70.076, 56.57),
        "aifdepthnet": Latency(64.441, 52.77),
        "gplws": Latency(30.440),
    },
    "10x600x800": {
        "fvnet": Latency(39.580, 55.02),
        "dfvnet": Latency(36.980, 51.87),
        "ddffnet": Latency(38.780, 54.11),
        "defocusnet": Latency(34.328, 48.15),
        "aifdepthnet": Latency(31.567, 43.62),
        "gplws": Latency(17.800),
    },
}
