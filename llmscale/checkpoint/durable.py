"""Writes that a crash cannot tear: a file or a directory appears under its name complete and on disk, or not at all.

Each name has one writer at a time: the temporary names are fixed, so that what a crash left is found and replaced.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path


def atomic_write_text(path: Path, text: str) -> None:
    atomic_write_lines(path, [text])


def atomic_write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write `lines`, which end as they are, beside `path`, bring them to disk, and rename them over `path`."""
    partial = path.with_name(f".tmp-{path.name}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def commit_directory(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary sibling of `target`, bring it to disk, and put it in the place of `target`.

    When `write` fails, what stood at `target` still stands there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if replaced(target).exists() and not target.exists():
        replaced(target).rename(target)  # a crash came between the two renames of `replace_directory`
    partial = target.with_name(f".tmp-{target.name}")
    remove(partial)
    partial.mkdir()
    try:
        write(partial)
        fsync_tree(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replace_directory(partial, target)


def replace_directory(new: Path, target: Path) -> None:
    """Rename `new` to `target`. POSIX cannot rename over a directory that holds something: an old one steps aside
    as `replaced(target)` for that moment, and a crash in it leaves the old one there, complete."""
    if target.exists():
        discard(replaced(target))
        target.rename(replaced(target))
    new.rename(target)
    fsync(target.parent)
    discard(replaced(target))


def replaced(target: Path) -> Path:
    return target.with_name(f".replaced-{target.name}")


def fsync(path: Path) -> None:
    """Bring a file's content, or a directory's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """Bring to disk every file and directory that is there now. Other processes may still be at work in it."""
    for path in [*directory.rglob("*"), directory]:
        with suppress(FileNotFoundError):  # a temporary file of another process
            fsync(path)


def discard(directory: Path) -> None:
    """Remove a directory, if it is there, so that a crash leaves no half of it under its name."""
    trash = directory.with_name(f".tmp-{directory.name}")
    remove(trash)
    if directory.exists():
        remove(directory.rename(trash))


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
