"""Focal stacks: frames with their focus positions and lateral scale, measured or rendered."""

from .focal_stack import FocalStack
from .generator import StackGenerator, StackSettings
from .samples import DepthSample, collate
from .scenes import SceneSettings, simulate_stack
from .simulator import DemoScene, SimulatedStack, demo_scene, render_focal_stack
from .topographies import Topography, read_textures, read_topographies, read_topography

__all__ = [
    "DemoScene",
    "DepthSample",
    "FocalStack",
    "SceneSettings",
    "SimulatedStack",
    "StackGenerator",
    "StackSettings",
    "Topography",
    "collate",
    "demo_scene",
    "read_textures",
    "read_topographies",
    "read_topography",
    "render_focal_stack",
    "simulate_stack",
]
