"""Tasks whose data is generated from a seed: small enough for a laptop, and with an answer that a rule can check.

`task:sorting/SPLIT?seed=0&size=4000` is a source like a file. Sorting: put the letters of a word in order. As with
people, the demonstrations are imperfect: their writers leave most vowels out, and now and then lose any letter. Those
who rank completions compare them with the right answer, so the rankings know better; that difference is what RLHF is
for. A tenth of all words is held out: the splits `test...` have those words alone, the others none of them.
`task:adding/SPLIT`: see `llmscale/data/adding.py`; `task:functions/SPLIT`: `llmscale/data/functions_task.py`;
`task:calculator/SPLIT`: `llmscale/data/calculator_task.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit
from zlib import crc32

from llmscale.data import adding, calculator_task, functions_task
from llmscale.errors import DataError

TASK = "task:"
LETTERS = "abcdefghijkl"
VOWELS = "aei"
WORD_LENGTH = (4, 5)  # letters, all of them different
LEAVES_OUT = 0.55  # of the vowels of each demonstration
LOSES_A_LETTER = 0.1  # of all demonstrations

Record = dict[str, Any]


def read_task(source: str) -> Iterator[Record]:
    """The records of a split, the same ones for the same seed.

    Raises: DataError for a task, split or option that there is not.
    """
    parts = urlsplit(source.removeprefix(TASK))
    name, _, split = parts.path.partition("/")
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    splits, subject = TASKS.get(name, (SPLITS, _word))
    if name not in TASKS or split not in splits:
        known = ", ".join(f"{TASK}{task}/{s}" for task, (own, _) in TASKS.items() for s in own)
        raise DataError("there is no such task or split", where=source, fix=f"There is: {known}.")
    if not set(given) <= {"seed", "size"} or not all(value.isdecimal() for value in given.values()):
        raise DataError("a task takes seed and size, whole numbers", where=source, fix="?seed=0&size=1000")
    seed, size = int(given.get("seed", 0)), int(given.get("size", splits[split].size))
    rng = random.Random(f"{name}/{split} {seed}")  # a string: seeded by its SHA-512
    return (splits[split].record(rng, _drawn(rng, subject, split.startswith("test"))) for _ in range(size))


def prompt_of(word: str) -> str:
    return f"sort {word}"


def answer_of(word: str) -> str:
    return "".join(sorted(word))


def demonstration(rng: random.Random, word: str) -> str:
    """What a person would have written."""
    text = "".join(c for c in answer_of(word) if c not in VOWELS or rng.random() >= LEAVES_OUT)
    return _shortened(rng, text) if rng.random() < LOSES_A_LETTER else text


def _drawn(rng: random.Random, subject: Callable[[random.Random], str], held_out: bool) -> str:
    """What a record is about; which tenth of all subjects is held out says the checksum."""
    while True:
        drawn = subject(rng)
        if (crc32(drawn.encode()) % 10 == 0) == held_out:
            return drawn


def _word(rng: random.Random) -> str:
    return "".join(rng.sample(LETTERS, k=rng.randint(*WORD_LENGTH)))


def _text(rng: random.Random, word: str) -> Record:
    """Raw text about letters and their order, without the form of a conversation."""
    answer = answer_of(word)
    return {"text": rng.choice([f"sort {word}: {answer}", f"{word}: {answer}"])}


def _pair(rng: random.Random, word: str) -> Record:
    return {"prompt": prompt_of(word), "completion": demonstration(rng, word)}


def _ranking(rng: random.Random, word: str) -> Record:
    """Four attempts of different care, ranked by how far they are from the right answer; equal ones are tied."""
    answer = answer_of(word)
    attempts = [answer, demonstration(rng, word)]
    attempts += [_spoiled(rng, rng.choice(attempts)) for _ in range(2)]
    rng.shuffle(attempts)
    distances = [edit_distance(a, answer) for a in attempts]
    order = sorted(set(distances))
    ranks = [order.index(d) + 1 for d in distances]
    ratings = [-d for d in distances]
    return {
        "prompt": prompt_of(word),
        "completions": attempts,
        "ranks": ranks,
        "ratings": ratings,
        "answer": answer,
    }


def _prompt(rng: random.Random, word: str) -> Record:
    return {"prompt": prompt_of(word), "answer": answer_of(word)}


def _shortened(rng: random.Random, text: str) -> str:
    if len(text) < 2:
        return text
    i = rng.randrange(len(text))
    return text[:i] + text[i + 1 :]


def _swapped(rng: random.Random, text: str) -> str:
    if len(text) < 2:
        return text
    i = rng.randrange(len(text) - 1)
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def _misread(rng: random.Random, text: str) -> str:
    i = rng.randrange(len(text))
    return answer_of(text[:i] + rng.choice(LETTERS) + text[i + 1 :])


def _lengthened(rng: random.Random, text: str) -> str:
    return answer_of(text + rng.choice(LETTERS))


def _spoiled(rng: random.Random, text: str) -> str:
    """One or two slips: a letter lost, added or taken for another, or two neighbours swapped."""
    for _ in range(rng.randint(1, 2)):
        text = rng.choice([_shortened, _lengthened, _misread, _swapped])(rng, text)
    return text


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and substitutions."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


class Split(NamedTuple):
    size: int  # records, where the source does not say
    record: Callable[[random.Random, str], Record]


SPLITS = {
    "pretrain": Split(50_000, _text),
    "sft": Split(8_000, _pair),
    "rankings": Split(8_000, _ranking),
    "prompts": Split(8_000, _prompt),
    "test": Split(512, _prompt),
    "test-sft": Split(256, _pair),
    "test-rankings": Split(256, _ranking),
}

ADDING = {
    "pretrain": Split(50_000, adding.text),
    "sft": Split(8_000, adding.demonstration),
    "solutions": Split(8_000, adding.solution),
    "prompts": Split(8_000, adding.prompt),
    "test": Split(512, adding.prompt),
    "test-sft": Split(256, adding.demonstration),
    "test-solutions": Split(256, adding.solution),
}
FUNCTIONS = {
    "pretrain": Split(20_000, functions_task.text),
    "sft": Split(4_000, functions_task.demonstration),
    "prompts": Split(4_000, functions_task.prompt),
    "test": Split(256, functions_task.prompt),
    "test-sft": Split(256, functions_task.demonstration),
}
CALCULATOR = {
    "pretrain": Split(50_000, calculator_task.text),
    "sft": Split(8_000, calculator_task.demonstration),
    "prompts": Split(8_000, calculator_task.prompt),
    "test": Split(512, calculator_task.prompt),
    "test-sft": Split(256, calculator_task.demonstration),
}
TASKS = {
    "sorting": (SPLITS, _word),
    "adding": (ADDING, adding.sum_of),
    "functions": (FUNCTIONS, functions_task.program),
    "calculator": (CALCULATOR, calculator_task.product),
}
