"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def write_bytes(path: Path, payload: bytes) -> None:
    """Write a new file and wait until the storage has taken it.

    Raises:
        OSError: the file exists, or cannot be written.
    """
    with path.open("xb") as file:
        file.write(payload)
        _wait_for_storage(file)


def kind_of(path: Path, formats: Sequence[str]) -> str:
    """The format, such as "ply", that the suffix of a file names.

    Raises:
        ValueError: it names none of ``formats``.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in formats:
        *others, last = (f".{name}" for name in formats)
        raise ValueError(f"path must end in {', '.join(others)} or {last}, got {path.name!r}")
    return kind


@contextmanager
def new_file(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """File that is written under a temporary name, and renamed when the block succeeds.

    Args:
        path: file to write; its folder exists.
        overwrite: whether an existing file is replaced.

    Yields:
        The file, to be written to.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False.
        OSError: the file cannot be written; what was there before is unchanged.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a file name is expected")
    part = temporary_sibling(path)
    try:
        with part.open("xb") as file:
            yield file
            _wait_for_storage(file)
        os.replace(part, path)
    except OSError as error:
        raise explained(error, f"cannot write {path}", "nothing was changed") from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def new_folder_content(folder: Path, names: Collection[str], *, overwrite: bool) -> Iterator[Path]:
    """Temporary folder whose files become the content of ``folder`` when the block succeeds.

    A folder that does not exist yet is filled under a temporary name beside its place, and renamed.
    An existing one may be a mount point, or its parent read-only; so the files wait in a temporary
    folder inside it, and then replace the old files called ``names``. All other files stay. If
    anything fails, ``folder`` is as it was and nothing temporary is left.

    Args:
        folder: the folder to fill.
        names: all files that this writer may ever write there, and all folders, with a slash at the
            end; old ones among them are removed.
        overwrite: whether a folder with content is accepted.

    Yields:
        The temporary folder.

    Raises:
        FileExistsError: ``folder`` has content and ``overwrite`` is False, or is a file.
        OSError: something cannot be written.
    """
    folder = folder.resolve()
    existed = folder.exists()
    require_free_folder(folder, overwrite=overwrite)
    created = _make_parents(folder.parent)
    part = temporary_sibling(folder / "new" if existed else folder)
    try:
        part.mkdir()
        yield part
        if existed:
            require_free_folder(folder, overwrite=overwrite, part=part)
            _exchange(part, folder, names)
        else:
            part.rename(folder)
        created.clear()
    except FileExistsError:
        raise
    except OSError as error:
        raise explained(error, f"cannot write {folder}", "nothing was changed") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for parent in created:
            with suppress(OSError):
                parent.rmdir()


def _wait_for_storage(file: BinaryIO) -> None:
    """Without the wait, some file systems report a full disk only after the file was renamed."""
    file.flush()
    os.fsync(file.fileno())


def temporary_sibling(path: Path) -> Path:
    """Unused hidden name beside ``path``, on the same file system, so that a rename is atomic."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def explained(error: OSError, what: str, consequence: str) -> OSError:
    """Error of the same kind whose message says what failed and what follows."""
    message = f"{what}: {error.strerror or error}; {consequence}"
    # From a number, OSError picks the subclass (PermissionError, ...).
    return OSError(message) if error.errno is None else OSError(error.errno, message)


def require_free_folder(folder: Path, *, overwrite: bool, part: Path | None = None) -> None:
    """What `new_folder_content` checks; before the work whose results it is to take, too.

    Args:
        folder: the folder to fill.
        overwrite: whether a folder with content is accepted.
        part: does not count as content.

    Raises:
        FileExistsError: ``folder`` has content and ``overwrite`` is False, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; out_dir must be a folder")
    if not overwrite and folder.exists() and any(path != part for path in folder.iterdir()):
        raise FileExistsError(
            f"{folder} exists and is not empty; pass overwrite=True to replace its results"
        )


def _make_parents(parent: Path) -> list[Path]:
    """Creates missing parents; returns those created, innermost first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
    except OSError as error:
        raise explained(error, f"cannot create the folder {path}", "nothing written") from error
    return missing


def _exchange(part: Path, folder: Path, names: Collection[str]) -> None:
    """Moves the files of ``part`` into ``folder`` in place of the old files called ``names``.

    Only renames within one file system: no space is needed. If one fails, all are undone; the old
    files are deleted only after everything else succeeded.
    """
    backup = temporary_sibling(folder / "old")
    backup.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for name in sorted(names):
            old = folder / name
            if old.is_dir() if name.endswith("/") else old.is_file():
                _move(old, backup / name, moved)
        for path in sorted(part.iterdir()):
            _move(path, folder / path.name, moved)
    except BaseException:
        for source, target in reversed(moved):
            os.rename(target, source)
        backup.rmdir()
        raise
    shutil.rmtree(backup, ignore_errors=True)


def _move(source: Path, target: Path, moved: list[tuple[Path, Path]]) -> None:
    os.rename(source, target)
    moved.append((source, target))
