"""Published sets of focal stacks with depth, all of one sample type; sets made from other data."""

from gplws.datasets.aifdepthnet import FlyingThings3DStacks, MiddleburyStacks
from gplws.datasets.ddff12 import DDFF12
from gplws.datasets.defocusnet import FoD500
from gplws.datasets.files import DatasetError, DepthDataset, read_depth_map
from gplws.datasets.folder_stacks import FolderStacks
from gplws.datasets.light_field import LightField4D, refocus
from gplws.datasets.micro3d import Micro3D
from gplws.datasets.micro3d_pipeline import (
    FusedHeights,
    Micro3DScene,
    build_micro3d_scene,
    fuse_heights,
)
from gplws.datasets.middlebury import MiddleburyPairs
from gplws.datasets.registration import (
    Registration,
    RegistrationError,
    align_height_map,
    register_height_map,
)

__all__ = [
    "DDFF12",
    "DatasetError",
    "DepthDataset",
    "FlyingThings3DStacks",
    "FoD500",
    "FolderStacks",
    "FusedHeights",
    "LightField4D",
    "Micro3D",
    "Micro3DScene",
    "MiddleburyPairs",
    "MiddleburyStacks",
    "Registration",
    "RegistrationError",
    "align_height_map",
    "build_micro3d_scene",
    "fuse_heights",
    "read_depth_map",
    "refocus",
    "register_height_map",
]
