"""Published sets of focal stacks with depth, all of one sample type; sets made from other data."""

from .aifdepthnet import FlyingThings3DStacks, MiddleburyStacks
from .ddff12 import DDFF12
from .defocusnet import FoD500
from .files import DatasetError, DepthDataset, read_depth_map
from .folder_stacks import FolderStacks
from .light_field import LightField4D, refocus
from .micro3d import Micro3D
from .middlebury import MiddleburyPairs

__all__ = [
    "DDFF12",
    "DatasetError",
    "DepthDataset",
    "FlyingThings3DStacks",
    "FoD500",
    "FolderStacks",
    "LightField4D",
    "Micro3D",
    "MiddleburyPairs",
    "MiddleburyStacks",
    "read_depth_map",
    "refocus",
]
