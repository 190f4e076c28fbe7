"""Errors of reading."""

import struct
import zlib

# What decoders and the packages around them raise on files that are damaged or not supported.
DECODE_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    NotImplementedError,
    EOFError,
    struct.error,
    zlib.error,
)


class StackReadError(ValueError):
    """A file or folder cannot be read as a focal stack; the message names it."""
