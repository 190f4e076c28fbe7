"""Classical depth from focus: focus measures, their aggregation, and depth with validity."""

from gplws.classical.aggregation import aggregate, aggregation_reach, aggregation_sigma
from gplws.classical.focus_measures import ring_difference_filter
from gplws.classical.depth import (
    METHODS,
    DepthFromFocus,
    depth_from_focus,
    focus_validity,
    rdf_volume,
    receptive_radius,
)
from gplws.classical.statistics import StackStatistics, stack_statistics

__all__ = [
    "METHODS",
    "DepthFromFocus",
    "StackStatistics",
    "aggregate",
    "aggregation_reach",
    "aggregation_sigma",
    "depth_from_focus",
    "focus_validity",
    "rdf_volume",
    "receptive_radius",
    "ring_difference_filter",
    "stack_statistics",
]
