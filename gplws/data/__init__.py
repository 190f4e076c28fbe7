"""Focal stacks: frames with their focus positions and lateral scale, measured or rendered."""

from .focal_stack import FocalStack
from .simulator import DemoScene, SimulatedStack, demo_scene, render_focal_stack

__all__ = ["DemoScene", "FocalStack", "SimulatedStack", "demo_scene", "render_focal_stack"]
