"""Where DeepSpeed's ZeRO optimizers keep this rank's part of each parameter.

Stages 1 and 2 lay the parameters of an optimizer group one after another and cut the whole into equal parts, so that a
rank's part begins and ends within parameters; each parameter says where (`deepspeed/utils/tensor_fragment.py`). Stage 3
cuts every parameter into equal parts (`deepspeed/runtime/zero/stage3.py`). All keep their part as flat fp32 tensors,
which are all that the optimizer beneath them sees. What is named here is theirs, and not a public interface: read it again when
the pinned version moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmscale.engine.state import Piece, trained_shapes

Cut = tuple[nn.Parameter, int, int, Tensor, int]  # parameter, start in it, elements, flat tensor, start in that


def pieces(model: nn.Module, zero: Any, stage: int) -> list[Piece]:
    """This rank's part of every trained parameter, as views of what is live."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    shapes = trained_shapes(model)
    return [
        Piece(names[p], shapes[names[p]], start, flat.detach()[at : at + n], zero.optimizer.state.get(flat, {}), at)
        for p, start, n, flat, at in (_stage_3(zero) if stage == 3 else _stage_1_and_2(model, zero))
    ]


def _stage_1_and_2(model: nn.Module, zero: Any) -> Iterator[Cut]:
    for parameter in model.parameters():
        part: Any = getattr(parameter, "_hp_mapping", None)  # a frozen one has none
        if part is not None:  # else all of it lies with other ranks
            (flat,) = zero.optimizer.param_groups[part.param_group_index]["params"]
            there = part.hp_fragment_address
            yield parameter, part.lp_fragment_address.start, there.numel, flat, there.start


def _stage_3(zero: Any) -> Iterator[Cut]:
    for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        offset = 0
        for parameter in parameters:
            start = parameter.partition_numel() * dist.get_rank(parameter.ds_process_group)
            numel = min(parameter.partition_numel(), parameter.ds_numel - start)  # the last part is padded
            if numel > 0:
                yield parameter, start, numel, flat, offset
            offset += parameter.partition_numel()


def make_state(zero: Any, stage: int) -> None:
    """Let the optimizer make its state now and not in its first step: by a step that moves nothing."""
    groups = zero.optimizer.param_groups
    flats = zero.fp32_partitioned_groups_flat if stage == 3 else [group["params"][0] for group in groups]
    gradients = [flat.grad for flat in flats]  # with offload a buffer that stays, otherwise None
    for group in groups:
        group["lr"] = 0.0
    for flat in flats:
        flat.grad = torch.zeros_like(flat)
    if stage == 3:  # which shows the optimizer one of them at a time
        for i in range(len(flats)):
            zero._optimizer_step(i)
    else:
        zero.optimizer.step()
    for flat, gradient in zip(flats, gradients, strict=True):
        flat.grad = gradient


def weights_follow(zero: Any, stage: int) -> None:
    """Collective: give the model the weights that the flat tensors now hold, as the end of a step does."""
    if stage == 3:
        zero.checkpoint_event_prologue()
        for i in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        zero.checkpoint_event_epilogue()
    else:
        zero.update_lp_params()
