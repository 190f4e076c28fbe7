"""The ops everything rests on: compiled kernels behind ``torch.ops.gplws``.

:mod:`gplws.ops.reference` holds the same functions in plain torch.
"""

from torch.utils import _pytree

from gplws.ops.conv3d_input_gradient import conv3d_input_gradient
from gplws.ops.conv3d_weight_gradient import conv3d_weight_gradient
from gplws.ops.focus_search import focus_search
from gplws.ops.group_pointwise_conv3d import group_pointwise_conv3d, pack_weights
from gplws.ops.local_filters import second_differences, symmetric_filter
from gplws.ops.reference import FocusSearchResult, PeakFit, Refinement, SurfaceSamples
from gplws.ops.regularise_surface import regularise_surface
from gplws.ops.spline_smooth import spline_smooth
from gplws.ops.surface_refinement import fit_peak, sample_surface, smooth_surface
from gplws.ops.up_conv3d import up_conv3d

# torch.export can then save programs that return it.
_pytree._register_namedtuple(FocusSearchResult, serialized_type_name="gplws.ops.FocusSearchResult")

__all__ = [
    "FocusSearchResult",
    "PeakFit",
    "Refinement",
    "SurfaceSamples",
    "conv3d_input_gradient",
    "conv3d_weight_gradient",
    "fit_peak",
    "focus_search",
    "group_pointwise_conv3d",
    "pack_weights",
    "regularise_surface",
    "sample_surface",
    "second_differences",
    "smooth_surface",
    "spline_smooth",
    "symmetric_filter",
    "up_conv3d",
]
