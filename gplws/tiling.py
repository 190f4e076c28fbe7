"""Cutting an image into tiles that fit into memory and see all that their results depend on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

_LEAST = 16  # pixels of a side that a tile gives, whatever the memory

DEFAULT_MEMORY_MB = 1024.0
"""Working memory of a reconstruction, MiB: with 640, tiles of 20 x 1024 x 1024 for the network that
ships overlap so much that it takes 1.4 times as long, with 4096 0.9 times."""


class Span(NamedTuple):
    """What a tile covers along one axis of the image."""

    given: slice
    """Pixels that the tile gives results for; the spans of an axis form it without overlap."""
    seen: slice
    """Those and what they depend on."""

    @property
    def inner(self) -> slice:
        """``given``, counted from the first pixel that is seen."""
        first = self.seen.start
        return slice(self.given.start - first, self.given.stop - first)

    @property
    def size(self) -> int:
        """Pixels that are seen."""
        return self.seen.stop - self.seen.start


class Tile(NamedTuple):
    """A rectangle of an image."""

    rows: Span
    columns: Span

    @property
    def given(self) -> tuple[slice, slice]:
        """Pixels that the tile gives results for."""
        return self.rows.given, self.columns.given

    @property
    def seen(self) -> tuple[slice, slice]:
        """Those and what they depend on."""
        return self.rows.seen, self.columns.seen

    @property
    def inner(self) -> tuple[slice, slice]:
        """``given``, counted from the first pixel that is seen."""
        return self.rows.inner, self.columns.inner


def tiles(
    height: int, width: int, pixels: int, reach: int | None, alignment: int = 1
) -> list[Tile]:
    """Cuts an image into tiles, so that as little as possible is computed twice.

    Args:
        height, width: of the image.
        pixels: that a tile may see. Tiles that would give less than twice the reach along an axis
            see more than that: else nearly all work were overlap.
        reach: pixels on each side that a result depends on; None: all of the image.
        alignment: tiles see from multiples of it on.

    Returns:
        Tiles in rows from top to bottom, all of nearly the same size.
    """
    if reach is None:
        return [Tile(_whole(height), _whole(width))]
    margin = -(-reach // alignment) * alignment
    least = max(2 * margin, _LEAST)
    layouts = []
    for columns in _finer_and_finer(width, least, margin, alignment):
        across = max(span.size for span in columns)
        fitting_rows = pixels // across // alignment * alignment - 2 * margin
        rows = _spans(height, max(fitting_rows, least), margin, alignment)
        layouts.append((rows, columns))
    fitting = [layout for layout in layouts if _largest(*layout) <= pixels]
    if fitting:
        rows, columns = min(fitting, key=lambda layout: _work(*layout))
    else:
        rows, columns = min(layouts, key=lambda layout: _largest(*layout))
    return [Tile(*pair) for pair in itertools.product(rows, columns)]


def _whole(length: int) -> Span:
    return Span(slice(0, length), slice(0, length))


def _finer_and_finer(length: int, least: int, margin: int, alignment: int) -> Iterator[list[Span]]:
    """One span, two spans and so on, as long as each gives ``least`` pixels."""
    inside = length - 2 * margin
    yield [_whole(length)]
    for count in range(2, inside // least + 1):
        yield _spans(length, -(-inside // count), margin, alignment)


def _spans(length: int, size: int, margin: int, alignment: int) -> list[Span]:
    """Spans that give up to ``size`` pixels each and see ``margin`` more on both sides.

    The first and the last one have a margin on one side only and give as much more, so that all of
    them take the same memory.
    """
    inside = length - 2 * margin
    count = max(-(-inside // size), 1)
    size = max(-(-inside // (count * alignment)), 1) * alignment
    count = max(-(-inside // size), 1)  # fewer may do, now that each gives some more
    edges = [0, *(margin + number * size for number in range(1, count)), length]
    return [
        Span(slice(begin, end), slice(max(begin - margin, 0), min(end + margin, length)))
        for begin, end in itertools.pairwise(edges)
    ]


def _largest(rows: list[Span], columns: list[Span]) -> int:
    return max(row.size for row in rows) * max(column.size for column in columns)


def _work(rows: list[Span], columns: list[Span]) -> int:
    return sum(row.size for row in rows) * sum(column.size for column in columns)
