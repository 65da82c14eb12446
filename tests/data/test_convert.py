from __future__ import annotations

from itertools import count, islice

import pytest

from llmscale.data.chat import Piece
from llmscale.data.convert import Draft, converted
from llmscale.data.report import Outcome
from llmscale.errors import DataError


def endless(text: str, drawn: list[int]):
    """Drafts that become their number and their token count; `drawn` notes how many were asked for."""
    for number in count():
        drawn.append(number)
        pieces = [Piece(text, is_content=True, is_target=True), Piece("<|eos|>", is_content=False, is_target=False)]
        yield Draft(f"f:{number}", [pieces], lambda made, n=number: ((n, made[0]), Outcome(0)))


@pytest.mark.parametrize(("text", "at_most"), [("the cat", 512), ("the cat " * 20_000, 7)])
def test_records_are_tokenized_some_at_a_time(tokenizer, text, at_most):
    """As many as are one batch, by number or by characters; nothing is read further ahead."""
    drawn: list[int] = []
    made = list(islice(converted(endless(text, drawn), tokenizer), 9))
    assert [example[0] for example, _ in made] == list(range(9))
    assert len(drawn) == at_most * -(-9 // at_most)
    for (_, example), _ in made:
        assert tokenizer.decode(example.token_ids) == f"{text}<|eos|>"
        assert example.loss_mask.tolist() == [True] * (len(example.token_ids) - 1) + [False]


def test_drafts_of_several_sequences_and_of_none(tokenizer):
    def pieces(text: str) -> list[Piece]:
        return [Piece(text, is_content=True, is_target=True)]

    def texts_of(made):
        return [tokenizer.decode(example.token_ids) for example in made], Outcome.TIED

    drafts = [
        Draft("f:1", [pieces("the cat"), pieces("the dog")], texts_of),
        Draft("f:2", [], lambda made: (None, Outcome.EMPTY)),
        Draft("f:3", [pieces("a log"), pieces("the cat"), pieces("the mat")], texts_of),
    ]
    assert list(converted(drafts, tokenizer)) == [
        (["the cat", "the dog"], Outcome.TIED),
        (None, Outcome.EMPTY),
        (["a log", "the cat", "the mat"], Outcome.TIED),
    ]


def test_an_error_gets_the_place_of_its_record(tokenizer):
    def fail(made):
        raise DataError("too long")

    with pytest.raises(DataError) as caught:
        list(converted([Draft("f:7", [], fail)], tokenizer))
    assert caught.value.where == "f:7"
