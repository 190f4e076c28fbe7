"""Reading focal stacks; writing height maps, pictures, meshes and surface files."""

from gplws.io.errors import StackReadError
from gplws.io.meshes import write_mesh
from gplws.io.pictures import preview_figure, write_preview
from gplws.io.readers import list_frames, read_frame, read_stack
from gplws.io.results import read_reconstruction
from gplws.io.surfaces import write_surface
from gplws.io.writers import Reconstructed, save_reconstruction, write_height_tiff

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
