"""Records of ranked completions (pairs or K of them) as sequences for the reward model.

Ratings say by how much one is better: those of K completions (`ratings`, which rank them where `ranks` do not), or the
difference within a pair (`margin`), of which the loser's rating is 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from llmscale.batch import RankedExample
from llmscale.data.chat import ChatRenderer, Message
from llmscale.data.config import DataConfig, TooLong
from llmscale.data.conversations import question, too_long_error, turn
from llmscale.data.convert import Draft
from llmscale.data.records import Record, columns_hint
from llmscale.data.report import Outcome
from llmscale.errors import DataError

MIN_COMPLETIONS, MAX_COMPLETIONS = 2, 9


def ranking_draft(record: Record, config: DataConfig, renderer: ChatRenderer) -> Draft[RankedExample]:
    """The conversation so far with each of its completions.

    Raises: DataError for a malformed record.
    """
    messages, completions, order = ranking(record, config)
    texts = [renderer.pieces([*messages, Message(role="assistant", content=c)]) for c in completions]
    return Draft(record.where, texts, lambda sequences: _fitted([s.token_ids for s in sequences], order, config))


class Order(NamedTuple):
    """What is known of K completions."""

    ranks: list[int]  # 1 is best, equal ones are tied
    ratings: list[float] | None  # higher is better


def _fitted(sequences: list[np.ndarray], order: Order, config: DataConfig) -> tuple[RankedExample | None, Outcome]:
    ranks, ratings = order
    outcome = Outcome.TIED if len(set(ranks)) == 1 else Outcome(0)
    length, limit = max(map(len, sequences)), config.max_seq_len
    if length > limit:
        if config.too_long is TooLong.error:
            raise too_long_error(length, limit)
        sequences = [sequence[:limit] for sequence in sequences]
        best, worst = (sequences[ranks.index(extreme)] for extreme in (min(ranks), max(ranks)))
        # Cut before they differ, they would be equal sequences of different rank.
        if config.too_long is not TooLong.truncate or (not outcome and np.array_equal(best, worst)):
            return None, Outcome.TOO_LONG
        outcome |= Outcome.TRUNCATED
    return RankedExample(tuple(sequences), tuple(ranks), tuple(ratings) if ratings else None), outcome


def ranking(record: Record, config: DataConfig) -> tuple[list[Message], list[str], Order]:
    """The conversation so far, the completions, and their order.

    Raises: DataError for fewer than 2 or more than 9 completions, or ranks or ratings that do not fit them.
    """
    messages, shape = question(record, config)
    if messages[-1]["role"] == "assistant":
        what = (
            f"the conversation in {shape.question!r} ends with the assistant's turn, so its completions answer nothing"
        )
        raise DataError(what, where=record.where, fix="End it with the user's turn.")
    if "completions" in record.fields:
        completions = [_completion(c, record, f"completions[{i}]") for i, c in enumerate(_list(record, "completions"))]
        return messages, completions, _order(record, len(completions))
    if "chosen" not in record.fields:
        fix = columns_hint("chosen", record.fields)
        raise DataError("there is neither chosen and rejected nor completions and ranks", where=record.where, fix=fix)
    pair = [_completion(record.value(name), record, name) for name in ("chosen", "rejected")]
    return messages, pair, Order([1, 2], _margin(record))


def _order(record: Record, num_completions: int) -> Order:
    if not MIN_COMPLETIONS <= num_completions <= MAX_COMPLETIONS:
        what = f"a ranking needs {MIN_COMPLETIONS} to {MAX_COMPLETIONS} completions, this one has {num_completions}"
        raise DataError(what, where=record.where, fix="Drop or split the record.")
    ratings = _ratings(record, num_completions) if record.fields.get("ratings") is not None else None
    if ratings is not None and record.fields.get("ranks") is None:
        return Order([1 + len({other for other in ratings if other > own}) for own in ratings], ratings)
    ranks = _ranks(record, num_completions)
    if ratings is not None:
        for i, j in zip(*np.nonzero(np.less.outer(ranks, ranks) & np.less.outer(ratings, ratings)), strict=True):
            what = f"completion {i} has rank {ranks[i]} and rating {ratings[i]}, completion {j} {ranks[j]} and {ratings[j]}"
            raise DataError(what, where=record.where, fix="A better rank (1 is best) cannot have a lower rating.")
    return Order(ranks, ratings)


def _ratings(record: Record, num_completions: int) -> list[float]:
    ratings = _list(record, "ratings")
    if len(ratings) != num_completions or not all(map(_is_number, ratings)):
        what = f"ratings must be {num_completions} finite numbers, one for each completion, are {ratings!r:.60}"
        raise DataError(what, where=record.where)
    return [float(rating) for rating in ratings]


def _margin(record: Record) -> list[float] | None:
    margin = record.fields.get("margin")
    if margin is None:
        return None
    if not _is_number(margin) or margin < 0:
        what = f"column 'margin' must be a number from 0: how much better is the chosen one; it is {margin!r:.40}"
        raise DataError(what, where=record.where, fix="Leave it out where it is not known.")
    return [float(margin), 0.0]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _ranks(record: Record, num_completions: int) -> list[int]:
    ranks = _list(record, "ranks")
    if len(ranks) != num_completions:
        what = f"there are {num_completions} completions and {len(ranks)} ranks"
        raise DataError(what, where=record.where, fix="Give one rank to each completion.")
    if any(type(rank) is not int or not 1 <= rank < 1 << 63 for rank in ranks):  # a bool is an int to isinstance
        raise DataError(f"ranks must be whole numbers from 1 (best), are {ranks!r:.60}", where=record.where)
    return ranks


def _list(record: Record, name: str) -> list:
    value = record.value(name)
    if not isinstance(value, list):
        raise DataError(f"column {name!r} must be a list", where=record.where)
    return value


def _completion(value: object, record: Record, name: str) -> str:
    """Text, a turn, or turns of which the last is the completion (some data repeat the conversation in front of it)."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        value = value[-1]
    message = turn(value, record, name)
    if message["role"] != "assistant":
        raise DataError(f"{name} must be the assistant's, is the {message['role']}'s", where=record.where)
    return message["content"]
