"""Shape from focus: a focal stack becomes a microscopic 3-D shape in real time."""

from gplws._extension import build_info

__all__ = ["build_info"]
