"""Errors of reading."""

import struct
import tokenize
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
    ArithmeticError,
    SyntaxError,  # ParseError of XML among them
    struct.error,
    tokenize.TokenError,
    zlib.error,
)


class StackReadError(ValueError):
    """A file or folder cannot be read as a focal stack; the message names it."""
