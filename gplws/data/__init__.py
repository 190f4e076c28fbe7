"""Focal stacks: frames with their focus positions and lateral scale, measured or rendered."""

from gplws.data.focal_stack import FocalStack
from gplws.data.generator import StackGenerator, StackSettings
from gplws.data.samples import DepthSample, collate
from gplws.data.scenes import SceneSettings, simulate_stack
from gplws.data.simulator import DemoScene, SimulatedStack, demo_scene, render_focal_stack
from gplws.data.topographies import Topography, read_textures, read_topographies, read_topography

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
