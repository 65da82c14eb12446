"""The account of draws: what became of every prompt that was taken from the data.

A draw is one taking of a prompt, with all its samples; its number is its place in the order of the data. It ends once, trained
or dropped for a reason, whatever dies meanwhile. One that is under way when a run stops is requeued when the run resumes: it
is sampled again under its own number, so by the same randomness. A new number would leave out what takes long more
often than what is short.

    draws.jsonl   {"step", "draw_id", "end", "begun", ...}   a record for each end; a requeued draw has another one later

`step` is the step that trained or dropped it, `begun` how many updates were done when it was handed to the workers. What else
there is: `why` it was not trained, or the `staleness` of its oldest token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from llmscale.errors import RunError

if TYPE_CHECKING:
    from llmscale.protocols import State

DRAWS = "draws.jsonl"


class End(Enum):
    """What becomes of a draw."""

    trained = "trained"
    dropped = "dropped"
    requeued = "requeued"  # not for good


class Ledger:
    """`write` takes the records of ends in order. `open` has the draws that are begun and have not ended, with the updates done
    when each began."""

    def __init__(self, write: Callable[[Sequence[Mapping[str, Any]]], object]):
        self.write = write
        self.num_draws = 0  # begun so far; a draw's number is its id
        self.open: dict[int, int] = {}

    def begin(self, num: int, updates: int) -> list[int]:
        """The next `num` draws."""
        draws = list(range(self.num_draws, self.num_draws + num))
        self.num_draws += num
        self.open |= dict.fromkeys(draws, updates)
        return draws

    def end(self, step: int, end: End, draws: Mapping[int, Mapping[str, Any]]) -> None:
        """`draws`: what else is known of each, such as `why`.

        Raises: RunError for a draw that has not begun or has ended before."""
        for draw in draws:
            if draw not in self.open:
                what = "ends a second time" if 0 <= draw < self.num_draws else "ends and was never begun"
                raise RunError(
                    f"draw {draw} {what} ({end.value})", where=DRAWS, fix="Report this: the loop lost count."
                )
        begun = [self.open.pop(draw) for draw in draws]
        rows = zip(draws.items(), begun, strict=True)
        self.write([{"step": step, "draw_id": d, "end": end.value, "begun": at, **about} for (d, about), at in rows])

    def requeue(self, step: int, draws: Sequence[int], updates: int, why: str) -> None:
        """They end, and begin again."""
        self.end(step, End.requeued, {draw: {"why": why} for draw in draws})
        self.open |= dict.fromkeys(draws, updates)

    def state_dict(self) -> State:
        return {"num_draws": self.num_draws, "open": dict(self.open)}

    def load_state_dict(self, state: State) -> None:
        self.num_draws, self.open = state["num_draws"], dict(state["open"])
