"""What the names of frames say: their order, their focus positions, and what is odd about them."""

from __future__ import annotations

import itertools
import logging
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gplws.io.calibration import um_per_unit
from gplws.positions import rise_or_fall

_logger = logging.getLogger(__name__)

# Frames of a folder whose names differ by numbers alone; with fewer, names say nothing.
_SHARE_OF_USUAL_NAMES = 0.75

# Of the usual step between the numbers of two frames: from here on one seems to be missing.
_GAP, _SHARE_OF_USUAL_STEPS = 1.5, 0.75

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_EXPONENT = "(?:e[+-][0-9]+)?"
# Before a minus these leave it no other meaning than that of a sign.
_BEFORE_A_SIGN = ("_", "=")


@dataclass(frozen=True)
class Numbers:
    """Numbers in which names differ, at one place of each.

    Attributes:
        values: one for each name.
        dashed: whether a dash stands before each that counts as a separator.
        unit: the letters behind them.
    """

    values: list[float]
    dashed: bool
    unit: str

    def are_distinct(self) -> bool:
        return len(set(self.values)) == len(self.values)

    def count(self) -> bool:
        """Whether they are a counter: each follows the one before by 1."""
        ordered = sorted(self.values)
        return all(b - a == 1 for a, b in itertools.pairwise(ordered))


def natural_key(name: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Sort key under which numbers inside names count by value: f2 < f10."""
    parts = re.split(r"([0-9]+)", name.lower())
    key = tuple((0, int(p), "") if i % 2 else (1, 0, p) for i, p in enumerate(parts))
    return key, name


def ordered_by_name(root: Path, paths: Sequence[Path], *, even: bool) -> list[Path]:
    """Files in natural order, with warnings of what is odd about their names.

    Args:
        root: their folder, for messages.
        paths: the files.
        even: whether steps between them count as even, so that a gap is worth a warning.
    """
    paths = sorted(paths, key=lambda path: natural_key(path.name))
    places = varying_numbers([path.stem for path in paths])
    if len(places) == 1:
        values = places[0].values
        order = sorted(range(len(paths)), key=values.__getitem__)
        if even:
            _warn_of_gaps(root, [paths[index].name for index in order], sorted(values))
        return [paths[index] for index in order]
    distinct = [numbers.values for numbers in places if numbers.are_distinct()]
    if distinct:
        order = sorted(range(len(paths)), key=distinct[0].__getitem__)
        paths = [paths[index] for index in order]
        if not all(rise_or_fall([values[index] for index in order]) for values in distinct):
            _logger.warning(
                "%s: the numbers in the names (%s, %s, ...) give different orders; read by the "
                "first of them; pass a list of the frames if that is wrong",
                root,
                paths[0].name,
                paths[1].name,
            )
    _warn_of_names(root, [path.name for path in paths])
    return paths


def positions_of_names(names: Sequence[str], source: str) -> list[float]:
    """Focus positions, um, that the names of frames say.

    They are the one number in which the names differ, or that and a counter; in the unit behind it,
    or in um.

    Args:
        names: of the files, in the order of the frames.
        source: for messages.

    Raises:
        ValueError: the names say none.
    """
    places = varying_numbers([Path(name).stem for name in names])
    if len(places) > 1:
        places = [p for p in places if p.are_distinct() and not p.count()]
    if len(places) != 1:
        raise ValueError(
            f"focus_positions_um='names': the names of {source} ({names[0]}, {names[1]}, ...) do "
            "not differ in one number alone, or in one and a counter"
        )
    if places[0].dashed:
        _logger.warning(
            "%s: the dashes before the numbers of the names (%s, %s, ...) count as separators; "
            "pass focus_positions_um as numbers if they are signs",
            source,
            names[0],
            names[1],
        )
    unit = places[0].unit
    scale = None if unit == "m" else um_per_unit(unit)  # more often "move" than metres
    return [(1.0 if scale is None else scale) * value for value in places[0].values]


def varying_numbers(names: Sequence[str]) -> list[Numbers]:
    """The numbers in which names differ; none where they differ otherwise as well.

    Args:
        names: without suffixes.
    """
    names = [name.lower().replace("\u2212", "-") for name in names]
    if any(re.search("[0-9],[0-9]", name) for name in names) and not any("." in n for n in names):
        names = [re.sub("([0-9]),(?=[0-9])", r"\1.", name) for name in names]
    if any(re.search("[0-9]e[+-][0-9]", name) for name in names):
        with_exponents = _varying(names, _NUMBER + _EXPONENT)
        # Of 1e-1, 1e-2, 1e-3 the e may be part of a word.
        mantissas = {re.sub("e[+-][0-9]+", "", name) for name in names}
        if len(with_exponents) == 1 and len(mantissas) > 1:
            return with_exponents
    return _varying(names, _NUMBER)


def _varying(names: Sequence[str], pattern: str) -> list[Numbers]:
    parts = [re.split(f"({pattern})", name) for name in names]
    if len({len(part) for part in parts}) > 1:
        return []
    columns = list(zip(*parts, strict=True))
    texts, numbers = columns[::2], columns[1::2]
    stems = [{re.sub(r"[+-]$", "", text) for text in column} for column in texts[:-1]]
    if any(len(stem) > 1 for stem in stems) or len(set(texts[-1])) > 1:
        return []
    found = []
    for place, (before, digits) in enumerate(zip(texts[:-1], numbers, strict=True)):
        if len({*zip(before, digits, strict=True)}) == 1:
            continue
        stem, after = stems[place].pop(), texts[place + 1][0]
        fractions = [number.partition(".")[2] for number in digits if "." in number]
        if fractions and (stem.endswith(".") or after == "." or not _are_decimals(fractions)):
            return []
        minus = [text != stem and text.endswith("-") for text in before]
        begins = stem == "" and place == 0
        signed = not all(minus) or begins or stem[-1:] in _BEFORE_A_SIGN
        values = [
            -float(number) if below and signed else float(number)
            for number, below in zip(digits, minus, strict=True)
        ]
        letters = re.match(r"[^\W\d_]*", after)
        found.append(Numbers(values, not signed, letters.group() if letters else ""))
    return found


def _warn_of_names(root: Path, names: Sequence[str]) -> None:
    """Say where images seem to be of several kinds."""
    grid = _grid_of_names([Path(name).stem.lower() for name in names])
    if grid:
        _logger.warning(
            "%s: the names count two things, %s: all are read as frames of one stack; move what is "
            "no frame away, or pass a list of the frames",
            root,
            grid,
        )
    strangers = _named_differently(names)
    if strangers:
        _logger.warning(
            "%s: all images are read as frames, also %s, named unlike the others; move it away, or "
            "pass a list of the frames, if it is none",
            root,
            ", ".join(strangers),
        )


def _warn_of_gaps(root: Path, names: Sequence[str], values: Sequence[float]) -> None:
    """Say which frames seem to be missing: where most steps between numbers are the same."""
    steps = [after - before for before, after in itertools.pairwise(values)]
    if len(steps) < 3:
        return
    usual = statistics.median(steps)
    same = sum(math.isclose(step, usual, rel_tol=1e-6) for step in steps)
    gaps = [k for k, step in enumerate(steps) if step > _GAP * usual]
    if usual <= 0 or not gaps or same < _SHARE_OF_USUAL_STEPS * len(steps):
        return
    places = [f"{names[k]} and {names[k + 1]}" for k in gaps[:3]]
    _logger.warning(
        "%s: no frame between %s, although the others follow each other by %g: if frames are "
        "missing, heights beyond are too small; pass focus_positions_um, 'names' if these numbers "
        "are um",
        root,
        ", ".join(places) + (", ..." if len(gaps) > 3 else ""),
        usual,
    )


def _grid_of_names(names: Sequence[str]) -> str:
    """The two counters of which every pair is a name, such as frame and channel; else empty."""
    parts = [re.split("([0-9]+)", name) for name in names]
    if len({tuple(part[::2]) for part in parts}) > 1:
        return ""
    texts, numbers = parts[0][::2], list(zip(*(part[1::2] for part in parts), strict=True))
    varying = [k for k, column in enumerate(numbers) if len(set(column)) > 1]
    if len(varying) != 2:
        return ""
    counts = [len(set(numbers[k])) for k in varying]
    if math.prod(counts) != len(names) or len(set(names)) != len(names):
        return ""
    return " and ".join(
        f"{texts[k]}{min(numbers[k])} to {texts[k]}{max(numbers[k])}" for k in varying
    )


def _are_decimals(fractions: Sequence[str]) -> bool:
    """Whether digits behind points are fractions, not counters (1.9, 1.10): those come in all
    lengths and may end in zeros."""
    same_length = len({len(digits) for digits in fractions}) == 1
    return same_length or not any(len(digits) > 1 and digits[-1] == "0" for digits in fractions)


def _named_differently(names: Sequence[str]) -> list[str]:
    """The few names that differ from the others by more than numbers; none where many do."""
    patterns = [re.sub(f"[+-]?{_NUMBER}", "0", Path(name).stem.lower()) for name in names]
    usual, count = Counter(patterns).most_common(1)[0]
    if count < 3 or count < _SHARE_OF_USUAL_NAMES * len(names):
        return []
    return [name for name, pattern in zip(names, patterns, strict=True) if pattern != usual]
