"""What is kept in the cache, and when it is made again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llmscale.data.cache import FORMAT
from llmscale.data.config import DataConfig, OnCorrupt, Packing, TooLong
from llmscale.data.splits import load_conversations, load_rankings, load_solutions, load_text
from llmscale.data.tokenizer import MIN_VOCAB_SIZE, train_tokenizer

CHATS = [{"prompt": f"Q{i}", "completion": f"A{i} " * i, "text": f"T{i}", "other": f"Q{i}"} for i in range(6)]


def kept(cache: Path) -> set[str]:
    return {p.name for p in cache.iterdir() if p.is_dir() and p.name != "digests"} if cache.exists() else set()


@pytest.fixture
def makes_anew(cache) -> Callable[[Callable[[], object]], bool]:
    """Whether a load puts something new into the cache."""

    def check(load: Callable[[], object]) -> bool:
        before = kept(cache)
        load()
        return kept(cache) != before

    return check


def test_conversations_depend_on_what_renders_them(write, tokenizer, cache, makes_anew):
    path = write("a.jsonl", CHATS)

    def load(path=path, tokenizer=tokenizer, **config):
        return lambda: load_conversations(DataConfig(train=path, **config), tokenizer, cache)

    assert makes_anew(load())
    assert not makes_anew(load())
    assert not makes_anew(load(path=write("same.jsonl", CHATS)))
    assert not makes_anew(load(validation_fraction=0.3))
    assert not makes_anew(load(cache_dir=str(cache)))
    assert not makes_anew(load(packing=Packing.best_fit))
    assert makes_anew(load(path=write("b.jsonl", CHATS[::-1])))
    assert makes_anew(load(path=write("b.json", CHATS)))
    assert makes_anew(load(max_seq_len=20))
    assert makes_anew(load(max_seq_len=20, too_long=TooLong.truncate))
    assert makes_anew(load(system_prompt="S"))
    assert makes_anew(load(columns={"prompt": "other"}))
    assert makes_anew(load(max_records=3))
    assert makes_anew(load(on_corrupt=OnCorrupt.skip))
    tokenizer.chat_template += "{# another #}"
    assert makes_anew(load())
    assert makes_anew(load(tokenizer=train_tokenizer(iter(["another"] * 9), 270, 64)))


def test_raw_text_does_not_depend_on_the_length_of_blocks(write, tokenizer, cache, makes_anew):
    path = write("a.jsonl", CHATS)

    def load(**config):
        return lambda: load_text(DataConfig(train=path, **config), tokenizer, cache)

    assert makes_anew(load())
    assert not makes_anew(load(max_seq_len=7))
    assert not makes_anew(load(max_seq_len=7, packing=Packing.best_fit, validation_fraction=0.5))
    tokenizer.eos_token = "<|user|>"
    assert makes_anew(load())


def test_kinds_are_kept_apart_and_a_folder_of_the_config_is_used(write, tokenizer, cache, makes_anew, tmp_path):
    config = DataConfig(train=write("a.jsonl", CHATS), cache_dir=str(cache))
    for load in (load_text, load_conversations):
        assert makes_anew(lambda load=load: load(config, tokenizer, tmp_path / "not this one"))
    assert not (tmp_path / "not this one").exists()


def test_a_saved_tokenizer_is_the_same_and_use_does_not_change_it(write, tokenizer, cache, makes_anew, tmp_path):
    config = DataConfig(train=write("a.jsonl", CHATS))
    load_text(config, tokenizer, cache)
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    saved(["the cat", "sat"], padding=True, truncation=True, max_length=2)
    assert not makes_anew(lambda: load_text(config, saved, cache))


@pytest.mark.parametrize("damage", ["tokens", "format"])
def test_a_damaged_cache_is_made_again(write, tokenizer, cache, damage):
    config = DataConfig(train=write("a.jsonl", CHATS))
    before = [e.token_ids.tolist() for e in load_conversations(config, tokenizer, cache).train]
    (directory,) = (cache / name for name in kept(cache))
    if damage == "tokens":
        content = (directory / "tokens.bin").read_bytes()
        (directory / "tokens.bin").write_bytes(content[:-2])
    else:
        index = json.loads((directory / "arrays.json").read_text())
        (directory / "arrays.json").write_text(json.dumps(index | {"format": FORMAT + 1}))
    assert [e.token_ids.tolist() for e in load_conversations(config, tokenizer, cache).train] == before


def test_reports_are_written_down_and_are_the_same_from_the_cache(write, tokenizer, cache):
    records = [*CHATS, {"prompt": "Q", "completion": ""}, {"prompt": "Q", "completion": "A" * 99}]
    config = DataConfig(train=write("a.jsonl", records), max_seq_len=40, validation_fraction=0.3)
    first, second = (load_conversations(config, tokenizer, cache) for _ in range(2))
    assert first.report == second.report
    (directory,) = (cache / name for name in kept(cache))
    written = json.loads((directory / "arrays.json").read_text())["facts"]["report"]
    assert (written["records"], written["dropped_empty"], written["dropped_too_long"]) == (8, 2, 1)
    for name in ("records", "tokens", "dropped_empty", "dropped_too_long"):
        assert first.report[name] + first.report[f"validation_{name}"] == written[name]
    for part, prefix in ((first.train, ""), (first.validation, "validation_")):
        assert first.report[f"{prefix}tokens"] == sum(len(e.token_ids) for e in part) == part.lengths.sum()


def test_a_large_vocabulary_is_kept_in_wider_numbers(write, cache):
    tokenizer = train_tokenizer(iter(["the cat"] * 9), MIN_VOCAB_SIZE, 64)
    tokenizer.add_tokens([f"<{i}>" for i in range(1 << 16)])
    config = DataConfig(train=write("a.jsonl", [{"text": f"a<{(1 << 16) - 1}>b"}]))
    (block,) = load_text(config, tokenizer, cache).train
    assert tokenizer.decode(block.token_ids) == f"a<{(1 << 16) - 1}>b<|eos|>" and block.token_ids.max() >= 1 << 16


def test_what_is_stored_changes_only_with_the_format_version(write, cache):
    """If this fails and the change is meant, raise cache.FORMAT, so that nobody trains on what an older version stored."""
    tokenizer = train_tokenizer(iter(["the cat"]), MIN_VOCAB_SIZE, 64)
    rankings = [{"prompt": "Q", "completions": ["A", "B", "A"], "ranks": [2, 1, 2]}, {"prompt": "Q", "chosen": "A"}]
    rankings[1] |= {"rejected": "ü", "margin": 0.5}
    load_text(DataConfig(train=write("t.jsonl", [{"text": "the cat <|eos|>"}, {"text": ""}])), tokenizer, cache)
    talk = [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "<|user|>"), ("assistant", "A"))]
    load_conversations(DataConfig(train=write("c.jsonl", [*CHATS, {"messages": talk}])), tokenizer, cache)
    load_rankings(DataConfig(train=write("r.jsonl", rankings)), tokenizer, cache)
    judged = {"prompt": "Q", "steps": ["a", "b", "c"], "labels": [True, None, 0.25]}
    load_solutions(DataConfig(train=write("s.jsonl", [judged])), tokenizer, cache)
    stored = {}
    for name in kept(cache):
        kind = json.loads((cache / name / "arrays.json").read_text())["facts"]["kind"]
        content = b"".join(p.name.encode() + p.read_bytes() for p in sorted((cache / name).glob("*.bin")))
        stored[kind] = blake2b(content, digest_size=8).hexdigest()
    assert (FORMAT, stored) == (
        2,
        {
            "text": "3efd2970fc5615c1",
            "conversations": "0c7a40df66e9bf6e",
            "rankings": "0e2173a878189d56",
            "solutions": "eeb636ae6f56c936",
        },
    )


# ---------------------------------------------------------------- memory

PEAK = """
import re, sys
from pathlib import Path

def mib(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def peak_mib(act):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = mib("VmRSS")
    act()
    return mib("VmHWM") - before

small, large, cache = map(Path, sys.argv[1:])
"""
READ = """
from llmscale.data.sources import read_items

read = lambda path: sum(len(item.fields["text"]) for item in read_items(str(path), {}))
read(small)  # everything is imported and has its buffers
print(peak_mib(lambda: read(large)))
"""
LOAD = """
from llmscale.data.config import DataConfig
from llmscale.data.splits import load_text
from llmscale.data.tokenizer import train_tokenizer

tokenizer = train_tokenizer(iter(["the cat sat on the mat"] * 9), 280, 64)
load = lambda path: load_text(DataConfig(train=str(path)), tokenizer, cache)
load(small)
print(peak_mib(lambda: load(large)))
"""


@pytest.mark.parametrize(
    ("act", "suffix", "count"),
    [(READ, "jsonl", 7600), (READ, "csv", 7600), (READ, "parquet", 15000), (LOAD, "jsonl", 7600)],
    ids=["read-jsonl", "read-csv", "read-parquet", "load-jsonl"],
)
def test_memory_does_not_grow_with_the_data(tmp_path, act, suffix, count):
    """Most of each record is another column: the tokenizer would take long over so much text."""
    small, large = tmp_path / f"small.{suffix}", tmp_path / f"large.{suffix}"
    write_table(small, 800)
    write_table(large, count)
    mib = large.stat().st_size / (1 << 20)
    command = [sys.executable, "-c", PEAK + act, str(small), str(large), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True)
    large.unlink()
    assert done.returncode == 0, done.stderr
    assert mib > 57 and float(done.stdout) < mib / 2


def write_table(path: Path, count: int) -> None:
    """Records of 8 kB with a `text` of 0.3 kB."""
    texts, notes = ([f"{i} {'the cat sat ' * 25}"[:300] for i in range(count)], ["x" * 7800] * count)
    with path.open("w") as file:
        if path.suffix == ".jsonl":
            file.writelines(f'{{"text": "{t}", "note": "{n}"}}\n' for t, n in zip(texts, notes, strict=True))
        elif path.suffix == ".csv":
            file.writelines(["text,note\n", *(f"{t},{n}\n" for t, n in zip(texts, notes, strict=True))])
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.table({"text": texts, "note": notes})
        parquet.write_table(table, path, compression="none", use_dictionary=False)
