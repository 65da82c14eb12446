"""The output layer of a decoder that can also score given tokens, without ever holding the logits of all of them.

Legend: N scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Of fp32 logits held at once; more tokens than that are scored in parts, recomputed in the backward.
CHUNK_BYTES = 256 << 20


class TokenHead(nn.Linear):
    """A linear output layer. With `targets` it returns their log-probabilities instead of logits.

    All parts are scored within one call of this module: ZeRO-3 gathers a module's weights once a call, and ranks with
    different numbers of tokens would otherwise wait for each other.
    """

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor | None = None, temperature: float = 1.0, entropy: str = "none"
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden: [..., H]; targets: [N] (then hidden is [N, H]). `entropy` is none (zeros), value, or grad.

        Returns logits [..., V]; or log p of each target and the entropy of its distribution in nats, fp32 [N] each.
        """
        if targets is None:
            return super().forward(hidden)
        rows = max(1, CHUNK_BYTES // (4 * self.out_features))
        if len(targets) <= rows:
            return self._score(hidden, targets, temperature, entropy)
        parts = [
            checkpoint(self._score, h, t, temperature, entropy, use_reentrant=False, preserve_rng_state=False)
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _score(self, hidden: Tensor, targets: Tensor, temperature: float, entropy: str) -> tuple[Tensor, Tensor]:
        return score_logits(super().forward(hidden), targets, temperature, entropy)


def score_logits(logits: Tensor, targets: Tensor, temperature: float, entropy: str) -> tuple[Tensor, Tensor]:
    """log p of each target and the entropy of its distribution in nats, fp32 [N] each. logits: [N, V]; targets: [N]."""
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    every = torch.log_softmax(logits, dim=-1)
    logprobs = -nn.functional.nll_loss(every, targets, reduction="none")
    if entropy == "none":
        return logprobs, torch.zeros_like(logprobs)
    with torch.set_grad_enabled(entropy == "grad" and torch.is_grad_enabled()):
        return logprobs, -(every.exp() * every).sum(-1)


def has_plain_head(hf: PreTrainedModel) -> bool:
    """Whether a linear layer is all that a model does between its last hidden state and its logits (no soft-capping, no
    scaling). One without weights cannot be tried."""
    head = hf.get_output_embeddings()
    return type(head) is nn.Linear and not head.weight.is_meta and _is_all_there_is(hf, head)


def install_token_head(hf: PreTrainedModel) -> TokenHead:
    """Replace a plain output layer by a TokenHead with the same weights."""
    old: Any = hf.get_output_embeddings()
    head = TokenHead(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
    head.weight, head.bias = old.weight, old.bias  # the same parameters: tied ones stay tied
    hf.set_output_embeddings(head)
    return head


@torch.no_grad()
def _is_all_there_is(hf: PreTrainedModel, head: nn.Linear) -> bool:
    was_training = hf.training
    hf.eval()
    ids = torch.arange(1, 5, device=head.weight.device).unsqueeze(0)
    logits = hf(input_ids=ids, use_cache=False).logits
    own = head(hf.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    hf.train(was_training)
    return logits.shape == own.shape and torch.allclose(logits, own)


def scored(
    head: Callable[..., tuple[Tensor, Tensor]],
    hidden: Tensor,
    targets: Tensor,
    wanted: Tensor,
    temperature: float,
    entropy: str,
) -> tuple[Tensor, Tensor]:
    """(log p, entropy) of `targets` [B, T] where they are `wanted`, each [B, T] and 0 elsewhere. `head` is
    called as `score_logits` is, with rows of `hidden` [B, T, H] (or of logits)."""
    values = head(hidden[wanted], targets[wanted], temperature, entropy)
    empty = torch.zeros(wanted.shape, device=hidden.device)
    logprobs, entropies = (empty.masked_scatter(wanted, value) for value in values)
    return logprobs, entropies
