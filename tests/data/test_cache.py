from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmscale.data import cache
from llmscale.data.cache import FORMAT, ArrayWriter, content_digest, digest, stored_once
from llmscale.errors import DataError, RunError

KEY = "key"


def write_seven(directory: Path) -> None:
    writer = ArrayWriter(directory, {"tokens": np.uint16, "mask": np.bool_, "offsets": np.int64})
    writer.append("tokens", [1, 2, 3])
    writer.append("tokens", np.array([40_000, 5, 6, 7], dtype=np.int64))
    writer.append("mask", [True, False])
    writer.finish({"name": "seven"})


def never(directory: Path) -> None:
    raise AssertionError("it was there")


def test_it_is_built_once_and_mapped(tmp_path):
    built = stored_once(tmp_path / "new" / "cache", KEY, write_seven, "f")
    again = stored_once(tmp_path / "new" / "cache", KEY, never, "f")
    for stored in (built, again):
        assert stored.facts == {"name": "seven"}
        assert stored.arrays["tokens"].tolist() == [1, 2, 3, 40_000, 5, 6, 7]
        assert stored.arrays["mask"].tolist() == [True, False]
        assert [a.dtype for a in stored.arrays.values()] == [np.uint16, np.bool_, np.int64]
        assert stored.arrays["offsets"].shape == (0,)
        assert isinstance(stored.arrays["tokens"].base, np.memmap) and not stored.arrays["tokens"].flags.writeable


def test_opening_does_not_read_everything(tmp_path):
    """A file of holes, 64 GiB large: more than the machine's memory."""
    stored_once(tmp_path, KEY, write_seven, "f")
    size = 1 << 36
    os.truncate(tmp_path / KEY / "tokens.bin", size)
    index = json.loads((tmp_path / KEY / "arrays.json").read_text())
    index["arrays"]["tokens"][1] = size // 2
    (tmp_path / KEY / "arrays.json").write_text(json.dumps(index))
    tokens = stored_once(tmp_path, KEY, never, "f").arrays["tokens"]
    assert (len(tokens), tokens[1], tokens[-1]) == (size // 2, 2, 0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: os.truncate(d / "tokens.bin", 12),
        lambda d: (d / "tokens.bin").write_bytes(bytes(16)),
        lambda d: (d / "mask.bin").unlink(),
        lambda d: (d / "arrays.json").unlink(),
        lambda d: (d / "arrays.json").write_text('{"format": 1, "arr'),
        lambda d: (d / "arrays.json").write_text("[]"),
        lambda d: (d / "arrays.json").write_text((d / "arrays.json").read_text().replace(f": {FORMAT}", ": 0")),
    ],
)
def test_what_is_broken_or_of_another_format_is_built_again(tmp_path, damage):
    stored_once(tmp_path, KEY, write_seven, "f")
    damage(tmp_path / KEY)
    assert stored_once(tmp_path, KEY, write_seven, "f").arrays["tokens"].tolist() == [1, 2, 3, 40_000, 5, 6, 7]
    stored_once(tmp_path, KEY, never, "f")


def test_a_builder_that_fails_leaves_nothing(tmp_path):
    def fail(directory: Path) -> None:
        write_seven(directory)
        raise DataError("line 3 is bad")

    with pytest.raises(DataError, match="line 3"):
        stored_once(tmp_path, KEY, fail, "f")
    assert [p.name for p in tmp_path.iterdir()] == [f"{KEY}.lock"]
    stored_once(tmp_path, KEY, write_seven, "f")


# ---------------------------------------------------------------- several processes

PROCESS = """
import sys, os
from pathlib import Path
import numpy as np
from llmscale.data import cache
from llmscale.data.cache import ArrayWriter, stored_once

folder, what = Path(sys.argv[1]), sys.argv[2]
cache._TELL_AFTER_S = 0.0

def build(directory):
    with open(folder / "builds", "a") as file:
        file.write(f"{os.getpid()}\\n")
    writer = ArrayWriter(directory, {"tokens": np.int32})
    writer.append("tokens", range(100_000))
    if what == "hang":
        writer.append("tokens", range(100_000))
        print("half done", flush=True)
        sys.stdin.read()
    writer.finish({})

print("ready", flush=True)
print(stored_once(folder / "cache", "key", build, "the plays").arrays["tokens"].sum())
"""


def start(folder: Path, what: str = "build") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(folder), what]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_one_of_four_processes_builds_and_the_others_wait_for_it(tmp_path):
    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache" / "key.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # so that all four come to stand before it
        lock.write("pid 1 on elsewhere")
        lock.flush()
        processes = [start(tmp_path) for _ in range(4)]
        waiting = [process.stderr.readline() for process in processes if process.stderr]
    assert waiting == ["waiting for pid 1 on elsewhere, which tokenizes the plays\n"] * 4
    answers = [process.communicate(timeout=300)[0] for process in processes]
    assert answers == [f"{sum(range(100_000))}\n"] * 4
    assert len((tmp_path / "builds").read_text().split()) == 1


def test_a_builder_that_is_killed_leaves_nothing_that_looks_complete(tmp_path):
    process = start(tmp_path, "hang")
    assert process.stdout is not None and process.stdout.readline() == "half done\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "cache" / KEY).exists()
    assert start(tmp_path).communicate(timeout=300)[0] == f"{sum(range(100_000))}\n"
    assert len((tmp_path / "builds").read_text().split()) == 2
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [KEY, f"{KEY}.lock"]


def test_a_folder_that_cannot_be_used_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunError, match=re.escape(str(folder))) as caught:
            stored_once(folder, KEY, write_seven, "f")
        assert "data.cache_dir" in str(caught.value)


# ---------------------------------------------------------------- digests


def test_digests_tell_values_apart():
    assert digest("a", {"x": 1, "y": 2}) == digest("a", {"y": 2, "x": 1})
    assert len({digest("a"), digest("a", None), digest(["a"]), digest("a", 1), digest("a", "1")}) == 5


def test_the_digest_of_a_file_is_of_its_content(tmp_path):
    for name, content in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(content)
    made = [content_digest(tmp_path / name, tmp_path / "cache") for name in "abc"]
    assert made[0] == made[1] != made[2]
    (tmp_path / "a").write_text("two")
    assert content_digest(tmp_path / "a", tmp_path / "cache") == made[2]
    with pytest.raises(DataError, match="cannot be read"):
        content_digest(tmp_path, tmp_path / "cache")


def test_the_digest_of_a_file_that_has_settled_is_remembered(tmp_path, monkeypatch):
    path, folder = tmp_path / "a", tmp_path / "cache"
    path.write_text("one")
    found = content_digest(path, folder)
    assert not folder.exists(), "it was written a moment ago and may change again within the same moment"
    monkeypatch.setattr(cache, "_SETTLED_AFTER_S", -60.0)
    assert content_digest(path, folder) == found
    (remembered,) = (folder / "digests").iterdir()
    remembered.write_text("0" * 32)
    assert content_digest(path, folder) == "0" * 32
    remembered.write_text("0" * 7)  # of a crash
    assert content_digest(path, folder) == found
    path.write_text("two")
    assert content_digest(path, folder) not in (found, "0" * 32)
