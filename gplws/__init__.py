"""Shape from focus: a focal stack becomes a microscopic 3-D shape in real time."""

from gplws._extension import __version__, build_info
from gplws.accelerate import accelerate
from gplws.alignment import Alignment, align_frames
from gplws.data import FocalStack
from gplws.models import load_model
from gplws.reconstruct import Reconstruction, reconstruct
from gplws.stream import reconstruct_stream

__all__ = [
    "Alignment",
    "FocalStack",
    "Reconstruction",
    "__version__",
    "accelerate",
    "align_frames",
    "build_info",
    "load_model",
    "reconstruct",
    "reconstruct_stream",
]
