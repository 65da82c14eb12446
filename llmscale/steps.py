"""Where the steps of a written solution end: a step is a line, as in the solutions of PRM800K (Lightman et al. 2023,
arXiv:2305.20050) and Math-Shepherd (Wang et al. 2024, arXiv:2312.08935).

Training a process reward model and asking it go by this one rule over tokens, so that it is asked where it was trained.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "\n"


class StepFinder:
    """A step ends at the token that holds its line's break; the last one at the last token, which is mostly the end of the
    turn. Blank lines are no steps."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._text: Callable[[int], str] = cache(
            lambda token: str(tokenizer.decode([token], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        )

    def ends(self, token_ids: np.ndarray, own: np.ndarray) -> list[int]:
        """Positions in the sequence. token_ids: int64 [T]; own: bool [T], the tokens of the solution."""
        found: list[int] = []
        begun = False  # there is text since the last end
        positions = np.flatnonzero(own).tolist()
        for position in positions:
            before, is_end, after = self._text(int(token_ids[position])).rpartition(END)
            begun = begun or bool(before.strip())
            if is_end and begun:
                found.append(position)
                begun = False
            begun = begun or bool(after.strip())
        return [*found, positions[-1]] if begun else found
