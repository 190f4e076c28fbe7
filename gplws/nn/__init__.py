"""Building blocks of depth-from-focus networks: training form and fused inference form."""

from gplws.nn.blocks import (
    ConvBN3d,
    DownConv3d,
    GroupParallel3d,
    RepConv3d,
    UpConv3d,
    fold_bn,
    freeze_statistics,
    fuse,
    reparameterise,
    train_on_kernels,
)
from gplws.nn.fused import FusedConv3d, FusedGroupParallel3d, FusedUpConv3d
from gplws.nn.group_parallel import to_group_parallel
from gplws.nn.layer_report import LayerReport, ModelReport
from gplws.nn.readout import (
    batch_positions,
    confidence_of,
    deviation_of,
    expected_depth,
    expected_depth_and_deviation,
    is_known,
    median_and_deviation,
)
from gplws.nn.workspace import Workspace, WorkspacePool

__all__ = [
    "ConvBN3d",
    "DownConv3d",
    "FusedConv3d",
    "FusedGroupParallel3d",
    "FusedUpConv3d",
    "GroupParallel3d",
    "LayerReport",
    "ModelReport",
    "RepConv3d",
    "UpConv3d",
    "Workspace",
    "WorkspacePool",
    "batch_positions",
    "confidence_of",
    "deviation_of",
    "expected_depth",
    "expected_depth_and_deviation",
    "fold_bn",
    "freeze_statistics",
    "fuse",
    "is_known",
    "median_and_deviation",
    "reparameterise",
    "to_group_parallel",
    "train_on_kernels",
]
