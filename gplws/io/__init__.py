"""Reading focal stacks; writing height maps, pictures, meshes and surface files."""

from .errors import StackReadError
from .meshes import write_mesh
from .pictures import preview_figure, write_preview
from .readers import list_frames, read_frame, read_stack
from .results import read_reconstruction
from .surfaces import write_surface
from .writers import Reconstructed, save_reconstruction, write_height_tiff

__all__ = [
    "Reconstructed",
    "StackReadError",
    "list_frames",
    "preview_figure",
    "read_frame",
    "read_reconstruction",
    "read_stack",
    "save_reconstruction",
    "write_height_tiff",
    "write_mesh",
    "write_preview",
    "write_surface",
]
