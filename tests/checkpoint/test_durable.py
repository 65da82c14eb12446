"""Files and directories that appear complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmscale.checkpoint.durable import (
    atomic_write_lines,
    atomic_write_text,
    commit_directory,
    discard,
    remove,
    replaced,
)


def _write(text: str):
    def write(directory: Path) -> None:
        (directory / "inner").mkdir()
        (directory / "inner" / "file").write_text(text)

    return write


def test_a_text_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path):
    atomic_write_text(tmp_path / "a", "old, and longer")
    atomic_write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    atomic_write_text(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(tmp_path / "a", "half \udc00")
    assert (tmp_path / "a").read_text() == "old"


def test_lines_whose_source_fails_leave_the_old_ones(tmp_path: Path):
    def lines():
        yield "new\n"
        raise ValueError("no more")

    atomic_write_lines(tmp_path / "a", ["old\n", "lines\n"])
    with pytest.raises(ValueError, match="no more"):
        atomic_write_lines(tmp_path / "a", lines())
    assert (tmp_path / "a").read_text() == "old\nlines\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_directory_replaces_the_old_one(tmp_path: Path):
    target = tmp_path / "run" / "hf"
    commit_directory(target, _write("old"))
    commit_directory(target, _write("new"))
    assert (target / "inner" / "file").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["hf"]


def test_a_failed_write_keeps_the_old_directory(tmp_path: Path):
    def fail(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise ValueError("no more")

    commit_directory(tmp_path / "hf", _write("old"))
    with pytest.raises(ValueError, match="no more"):
        commit_directory(tmp_path / "hf", fail)
    assert (tmp_path / "hf" / "inner" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_crash_between_the_two_renames_is_mended_by_the_next_commit(tmp_path: Path):
    target = tmp_path / "hf"
    commit_directory(target, _write("old"))
    target.rename(replaced(target))
    seen: list[bool] = []
    commit_directory(target, lambda directory: seen.append(target.exists()))
    assert seen == [True]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_discard_leaves_nothing_even_after_a_crash_in_an_earlier_one(tmp_path: Path):
    for name in ("old", ".tmp-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    discard(tmp_path / "old")
    discard(tmp_path / "old")
    assert list(tmp_path.iterdir()) == []


def test_remove_takes_a_link_and_not_what_it_points_to(tmp_path: Path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to("kept")
    remove(tmp_path / "link")
    remove(tmp_path / "never was")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
