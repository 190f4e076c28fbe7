"""Errors of reading."""


class StackReadError(ValueError):
    """A file or folder cannot be read as a focal stack; the message names it."""
