"""Focal stacks: frames with their focus positions and lateral scale, measured or rendered."""

from .focal_stack import FocalStack
from .samples import DepthSample, collate
from .simulator import DemoScene, SimulatedStack, demo_scene, render_focal_stack

__all__ = [
    "DemoScene",
    "DepthSample",
    "FocalStack",
    "SimulatedStack",
    "collate",
    "demo_scene",
    "render_focal_stack",
]
