"""Classical depth from focus: focus measures, their aggregation, and depth with validity."""

from gplws.classical.aggregation import aggregate, aggregation_reach, aggregation_sigma
from gplws.classical.depth import (
    LOCAL_PART,
    METHODS,
    DepthFromFocus,
    depth_from_focus,
    floats_per_pixel,
    focus_validity,
    position_at,
    rdf_volume,
    receptive_radius,
    refine_depth,
    refining_radius,
    regularised,
)
from gplws.classical.focus_measures import ring_difference_filter
from gplws.classical.focus_volume import MEASURES, FocusMeasure, focus_volume
from gplws.classical.local_measures import (
    gray_level_deviation,
    multi_directional_modified_laplacian,
    sum_modified_laplacian,
    tenengrad,
)
from gplws.classical.regularisation import regularise_depth
from gplws.classical.statistics import (
    STATISTICS_REACH,
    StackStatistics,
    part_statistics,
    stack_statistics,
)
from gplws.classical.transform_measures import shearlet_energy, wavelet_energy

__all__ = [
    "LOCAL_PART",
    "MEASURES",
    "METHODS",
    "STATISTICS_REACH",
    "DepthFromFocus",
    "FocusMeasure",
    "StackStatistics",
    "aggregate",
    "aggregation_reach",
    "aggregation_sigma",
    "depth_from_focus",
    "floats_per_pixel",
    "focus_validity",
    "focus_volume",
    "gray_level_deviation",
    "multi_directional_modified_laplacian",
    "part_statistics",
    "position_at",
    "rdf_volume",
    "receptive_radius",
    "refine_depth",
    "refining_radius",
    "regularise_depth",
    "regularised",
    "ring_difference_filter",
    "shearlet_energy",
    "stack_statistics",
    "sum_modified_laplacian",
    "tenengrad",
    "wavelet_energy",
]
