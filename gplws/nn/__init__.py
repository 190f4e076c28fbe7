"""Building blocks of depth-from-focus networks: training form and fused inference form."""

from gplws.nn.blocks import ConvBN3d, GroupParallel3d, RepConv3d, fold_bn, fuse, reparameterise
from gplws.nn.fused import FusedConv3d, FusedGroupParallel3d
from gplws.nn.readout import expected_depth

__all__ = [
    "ConvBN3d",
    "FusedConv3d",
    "FusedGroupParallel3d",
    "GroupParallel3d",
    "RepConv3d",
    "expected_depth",
    "fold_bn",
    "fuse",
    "reparameterise",
]
