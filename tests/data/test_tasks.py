from __future__ import annotations

import random
from functools import cache
from itertools import permutations

import pytest

from llmscale.data.sources import read_records
from llmscale.data.tasks import (
    LEAVES_OUT,
    LETTERS,
    LOSES_A_LETTER,
    SPLITS,
    VOWELS,
    WORD_LENGTH,
    answer_of,
    demonstration,
    edit_distance,
    read_task,
)
from llmscale.errors import DataError

TRAINING = [split for split in SPLITS if not split.startswith("test")]
TESTS = [split for split in SPLITS if split.startswith("test")]


def records(split: str, **options: int) -> list[dict]:
    return list(read_task(f"task:sorting/{split}?" + "&".join(f"{name}={value}" for name, value in options.items())))


def word_of(record: dict) -> str:
    """The word that a record of any split is about."""
    return record.get("prompt", record.get("text", "").split(":")[0]).removeprefix("sort ")


@pytest.mark.parametrize("split", SPLITS)
def test_a_seed_says_everything(split):
    assert records(split, seed=3, size=50) == records(split, seed=3, size=50)
    assert records(split, seed=3, size=50) != records(split, seed=4, size=50)
    assert records(split, seed=3, size=50)[:20] == records(split, seed=3, size=20)


def test_a_seed_means_the_same_tomorrow():
    """Published numbers hang on these words."""
    assert [r["prompt"] for r in records("test", seed=0, size=3)] == ["sort jhkd", "sort hclk", "sort lkdfa"]


@pytest.mark.parametrize("split", SPLITS)
def test_left_out_options_have_defaults(split):
    found = list(read_task(f"task:sorting/{split}"))
    assert len(found) == SPLITS[split].size
    assert found[:5] == records(split, seed=0, size=5)


def test_splits_of_one_seed_are_about_other_words():
    first = [tuple(word_of(r) for r in records(split, seed=0, size=20)) for split in SPLITS]
    assert len(set(first)) == len(first)


@cache
def words(split: str) -> frozenset[str]:
    return frozenset(word_of(r) for seed in (0, 1) for r in records(split, seed=seed, size=8_000))


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("training", TRAINING)
def test_no_training_split_has_a_word_of_a_test_split(training, test):
    assert not words(training) & words(test)


def test_a_tenth_of_all_words_is_held_out():
    """Any word is in the test splits or in the others, so over many draws of the shortest both are complete."""
    shortest = {"".join(p) for p in permutations(LETTERS, WORD_LENGTH[0])}
    held_out = {w for seed in range(4) for r in records("test", seed=seed, size=8_000) if (w := word_of(r)) in shortest}
    assert len(held_out) / len(shortest) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("split", SPLITS)
def test_words_are_different_letters_of_the_alphabet(split):
    for word in words(split):
        assert set(word) <= set(LETTERS) and len(set(word)) == len(word)
        assert WORD_LENGTH[0] <= len(word) <= WORD_LENGTH[1]


def test_raw_text_is_right():
    for record in records("pretrain", size=200):
        assert record["text"].endswith(f"{word_of(record)}: {''.join(sorted(word_of(record)))}")


@pytest.mark.parametrize("split", ["prompts", "test", "rankings", "test-rankings"])
def test_answers_are_sorted_words(split):
    for record in records(split, size=200):
        assert record["answer"] == "".join(sorted(word_of(record)))


def test_demonstrations_err_as_documented():
    """Of the vowels, LEAVES_OUT and what a lost letter takes; of words without vowels, LOSES_A_LETTER. Standard errors
    here are below 0.01."""
    pairs = [(word_of(r), r["completion"]) for r in records("sft", size=20_000)]
    vowels = [(v in text) for word, text in pairs for v in VOWELS if v in word]
    without = [text == answer_of(word) for word, text in pairs if not set(word) & set(VOWELS)]
    assert 1 - sum(vowels) / len(vowels) == pytest.approx(
        LEAVES_OUT + LOSES_A_LETTER * (1 - LEAVES_OUT) / 3.5, abs=0.02
    )
    assert 1 - sum(without) / len(without) == pytest.approx(LOSES_A_LETTER, abs=0.02)


def test_demonstrations_never_hold_another_letter_or_order():
    rng = random.Random(0)
    for record in records("prompts", size=500):
        text = demonstration(rng, word_of(record))
        assert text and list(text) == sorted(text) and set(text) <= set(word_of(record))


def test_greedy_imitation_of_the_demonstrations_errs():
    """More often than not a vowel is left out: the likeliest demonstration is not the right answer."""
    assert LEAVES_OUT > 0.5


@pytest.mark.parametrize("split", ["rankings", "test-rankings"])
def test_rankings_follow_the_distance_to_the_answer(split):
    for record in records(split, size=500):
        distances = [edit_distance(c, record["answer"]) for c in record["completions"]]
        assert record["answer"] in record["completions"] and all(record["completions"])
        for i, rank in enumerate(record["ranks"]):
            assert rank == 1 + len({d for d in distances if d < distances[i]})  # 1 is best, equal ones tied, no gaps
            assert (rank == 1) == (record["completions"][i] == record["answer"])


def test_the_right_answer_is_no_place_in_the_ranking():
    places = [r["completions"].index(r["answer"]) for r in records("rankings", size=400)]
    assert {places.count(i) > 40 for i in range(4)} == {True}


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("abc", "acb", 2), ("kitten", "sitting", 3)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    "source", ["task:sorting/train", "task:sums/sft", "task:sorting", "task:", "task:sorting/sft/x"]
)
def test_an_unknown_task_or_split_names_those_that_there_are(source):
    with pytest.raises(DataError, match="no such task or split") as caught:
        read_task(source)
    assert caught.value.where == source
    assert all(f"task:sorting/{split}" in str(caught.value) for split in SPLITS)


@pytest.mark.parametrize(
    "options", ["length=3", "seed=x", "seed=-1", "size=1.5", "size=", "seed", "seed=0&sizes=3", "seed=²"]
)
def test_a_wrong_option_says_what_is_right(options):
    with pytest.raises(DataError, match="whole numbers") as caught:
        read_task(f"task:sorting/sft?{options}")
    assert "?seed=0&size=1000" in str(caught.value)


def test_a_task_is_a_source_like_a_file():
    found = list(read_records("task:sorting/sft?size=2", {}, None))
    assert [r.fields for r in found] == records("sft", size=2)
    assert found[1].where == "task:sorting/sft?size=2:item 2"
