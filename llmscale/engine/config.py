"""How a model is trained: by plain PyTorch in one process, or sharded over ranks by DeepSpeed ZeRO."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from llmscale.config import Problem, at_least, option
from llmscale.models.config import Attention


class Offload(Enum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"  # refused, see problems


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"  # forward and backward in bfloat16, optimizer state and master weights in fp32


class RowLayout(Enum):
    """How sequences of different lengths stand in a micro-batch; changes memory and speed, not the loss."""

    auto = "auto"  # packed where attention is made for it (flash or by document), else padded
    padded = "padded"  # a row each, next to others of like length
    packed = "packed"  # several in one row, kept apart by their positions


@dataclass
class EngineConfig:
    """What every engine knows."""

    name: str = MISSING
    precision: Precision = Precision.fp32
    # Full-length sequences (data.max_seq_len) that one forward and backward on one rank may hold; of shorter ones as many
    # more as that many tokens allow. Changes memory and speed, not the loss
    micro_batch_size: int = 8
    rows: RowLayout = RowLayout.auto
    activation_checkpointing: bool = False  # recompute activations in the backward: less memory, a third more time
    attention: Attention = Attention.auto
    liger: bool = False  # Liger's fused kernels; needs the package liger-kernel and CUDA
    compile: bool = False  # torch.compile: a minute or more at the first step, faster ones afterwards

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, micro_batch_size=1)

    def data_shard(self, rank: int, world_size: int) -> tuple[int, int]:
        """Which shard of the examples a rank trains on, and of how many."""
        return rank, world_size

    def needs_weights(self, rank: int) -> bool:
        """Whether a rank has to load the model's weights; else it builds the model without them."""
        return True

    @property
    def whole_sequences(self) -> bool:
        """Whether a rank's attention is given whole sequences."""
        return True

    @property
    def sleeps(self) -> bool:
        """Whether it can leave its device's memory to others for a while."""
        return True


@option("engine", "single", builds="llmscale.engine.single:SingleEngine")
@dataclass
class SingleConfig(EngineConfig):
    """Ordinary PyTorch in one process: the reference that the other engines must equal."""

    name: str = "single"


# Values of DeepSpeed's JSON that the typed config decides, and where to set them instead.
OWNED = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "engine.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and engine.micro_batch_size",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer.device": "engine.offload_optimizer",
    "zero_optimization.offload_param.device": "engine.offload_parameters",
    "tensor_parallel": "engine.tensor_parallel_size",
    "sequence_parallel_size": "engine.sequence_parallel_size",
}


@option("engine", "deepspeed", builds="llmscale.engine.deepspeed:DeepSpeedEngine")
@dataclass
class DeepSpeedConfig(EngineConfig):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020)."""

    name: str = "deepspeed"
    zero_stage: int = 2  # 1 shards optimizer state, 2 gradients too, 3 weights too
    offload_optimizer: Offload = Offload.none  # cpu: fp32 weights, optimizer state and its step in host memory
    offload_parameters: Offload = Offload.none  # cpu: sharded weights wait in host memory; zero_stage=3 only
    tensor_parallel_size: int = 1  # neighbouring ranks that share each layer's matrices (DeepSpeed AutoTP)
    sequence_parallel_size: int = 1  # neighbouring ranks that share each sequence (Ulysses)
    overrides: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's own JSON, merged under what is typed here

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from at_least(self, tensor_parallel_size=1, sequence_parallel_size=1)
        if self.zero_stage not in (1, 2, 3):
            yield "zero_stage", f"must be 1, 2 or 3, is {self.zero_stage}", "Stage 0 is engine=single."
        for name in ("offload_optimizer", "offload_parameters"):
            if getattr(self, name) is Offload.nvme:
                what = "DeepSpeed 0.19 swaps to files of its own format, which no checkpoint of ours can read or resume"
                yield name, what, "Set it to cpu."
        if self.offload_parameters is not Offload.none and self.zero_stage != 3:
            yield "offload_parameters", "only zero_stage=3 shards weights, and can offload them", "Set zero_stage=3."
        if self.tensor_parallel_size > 1 and self.sequence_parallel_size > 1:
            yield "sequence_parallel_size", "cannot be combined with tensor_parallel_size", "Leave one of them at 1."
        for path, instead in OWNED.items():
            node: Any = self.overrides
            for key in path.split("."):
                node = node.get(key) if isinstance(node, dict) else None
            if node is not None:
                yield f"overrides.{path}", "this value belongs to the typed config", f"Set {instead}."

    def data_shard(self, rank: int, world_size: int) -> tuple[int, int]:
        """Ranks that share matrices or sequences train on the same examples."""
        sharing = self.tensor_parallel_size * self.sequence_parallel_size
        return rank // sharing, world_size // sharing

    def needs_weights(self, rank: int) -> bool:
        return rank == 0 or not self.scatters

    @property
    def whole_sequences(self) -> bool:
        return self.sequence_parallel_size == 1

    @property
    def sleeps(self) -> bool:
        # DeepSpeed 0.19 cannot move its optimizer for stage 1 in bf16, and of stage 3 only the state of its own FusedAdam.
        return self.zero_stage == 2

    @property
    def scatters(self) -> bool:
        """Rank 0's weights are cut over the ranks as the engine is built. AutoTP cuts whole matrices first."""
        return self.zero_stage == 3 and self.tensor_parallel_size == 1
