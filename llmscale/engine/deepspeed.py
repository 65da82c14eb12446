"""DeepSpeed ZeRO behind the same interface as `engine/single.py`, and with its numbers.

DeepSpeed averages gradients over ranks and wants to divide by accumulation steps. Here each micro-batch's loss is
already its share of the step's global mean (`engine/accounting.py`), so it is multiplied by the number of ranks to undo
the first, and the second is switched off.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmscale import distributed

# DeepSpeed compiles with ninja, which lies beside the interpreter: an environment need not be activated to be used.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported; silences a warning

import deepspeed
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from llmscale.batch import Batch
from llmscale.engine.accounting import StepTotals, parameter_buckets, require_finite, same_number_on_all_ranks
from llmscale.engine.averaging import WeightAverage
from llmscale.engine.config import DeepSpeedConfig, Precision
from llmscale.engine.frozen import FrozenEngine
from llmscale.engine.gate import Gate
from llmscale.errors import CheckpointError
from llmscale.models.export import SHARD_BYTES, save_hf
from llmscale.models.loading import Model
from llmscale.optim.build import build_optimizer, set_learning_rate
from llmscale.optim.config import OptimConfig
from llmscale.optim.schedule import learning_rate
from llmscale.phases import phase
from llmscale.protocols import Accept, Objective

TAG = "deepspeed"  # folder of its files inside a checkpoint
deepspeed.utils.logger.setLevel(logging.WARNING)


class DeepSpeedEngine(FrozenEngine):
    """`llmscale.protocols.TrainEngine` sharded over the ranks of the process group."""

    def __init__(self, config: DeepSpeedConfig, model: Model, optim: OptimConfig, total_steps: int):
        super().__init__(config, model)
        self.optim, self.total_steps, self.zero_stage = optim, total_steps, config.zero_stage
        if config.activation_checkpointing:
            self.model.hf.gradient_checkpointing_enable({"use_reentrant": False})
        _join_group(self.device)
        optimizer = build_optimizer(optim, self.model)
        self.gate = Gate(optimizer)
        self.module: Any
        self.module, self.optimizer, _, _ = deepspeed.initialize(
            model=self.model,
            optimizer=optimizer,
            config=deepspeed_json(config, optim, distributed.world_size(), sum(p.numel() for p in model.parameters())),
        )
        distributed.limit_groups()
        if config.compile:
            self.module.compile(compile_kwargs={"dynamic": True})
        self.average = WeightAverage(optim.ema_decay, self.optimizer.optimizer, self._spread_masters)
        self.num_steps = 0

    def step(
        self, micro_batches: Sequence[Batch], objective: Objective, accept: Accept = require_finite
    ) -> dict[str, float]:
        self.module.train()
        micro_batches = same_number_on_all_ranks(micro_batches, partial(objective.prepare, []))
        totals = StepTotals(micro_batches)
        for i, batch in enumerate(micro_batches):
            self.module.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            with phase("forward"):
                loss = totals.add(objective.loss(self._forward, batch.to(self.device)))
            with phase("backward"):
                self.module.backward(loss * distributed.world_size(), scale_wrt_gas=False)
        metrics = totals.metrics()
        metrics["lr"] = learning_rate(self.optim, self.num_steps, self.total_steps)
        set_learning_rate(self.optimizer, metrics["lr"])

        def verdict() -> bool:
            # Where the norm is not finite DeepSpeed calls it inf and discards the step by itself.
            metrics["grad_norm"] = float(self.optimizer._global_grad_norm)
            return accept(metrics)

        with phase("optimizer"):
            if self.gate.run(self.module.step, verdict):
                self.average.update(self.num_steps)
        self.num_steps += 1
        return metrics

    def evaluate(self, micro_batches: Sequence[Batch], objective: Objective) -> dict[str, float]:
        with self.averaged():
            return super().evaluate(micro_batches, objective)

    def averaged(self) -> AbstractContextManager[None]:
        return self.average.swapped_in()

    def full_parameters(self, bucket_bytes: int) -> Iterator[dict[str, Tensor]]:
        for bucket in parameter_buckets(self.model, bucket_bytes):
            sharded = self.zero_stage == 3
            gathered = deepspeed.zero.GatheredParameters(list(bucket.values())) if sharded else nullcontext()
            with gathered:
                yield {n: p.detach() for n, p in bucket.items()} if distributed.rank() == 0 else {}

    def snapshot(self) -> Callable[[Path], None]:
        def write(directory: Path) -> None:
            # save_latest=False: DeepSpeed would write it before every rank is done; our commit protocol has its own.
            state = {"num_steps": self.num_steps, "world_size": distributed.world_size()}
            self.module.save_checkpoint(str(directory), tag=TAG, client_state=state, save_latest=False)

        return write

    def load(self, directory: Path) -> None:
        """DeepSpeed unpickles its files; the caller has checked their digests against the manifest that we wrote."""
        saved = len(list((directory / TAG).glob("*_optim_states.pt")))
        if saved != distributed.world_size():
            raise CheckpointError(
                f"this checkpoint was written by {saved} ranks, the run now has {distributed.world_size()}",
                where=str(directory),
                fix=f"Resume with {saved} ranks.",
            )
        _, state = self.module.load_checkpoint(str(directory), tag=TAG)
        self.num_steps = state["num_steps"]

    def export(self, directory: Path, tokenizer) -> None:
        with self.averaged():
            buckets = self.full_parameters(SHARD_BYTES)
            try:
                if distributed.rank() == 0:
                    save_hf(self.model, tokenizer, directory, buckets)
            finally:
                deque(buckets, maxlen=0)  # the others wait for rank 0 in each bucket, whatever happened to it

    def _spread_masters(self) -> None:
        """The optimizer's own weights (fp32, this rank's part) were changed: bring them to where the forward reads."""
        if self.zero_stage < 3:
            self.optimizer.update_lp_params()
            return
        self.optimizer.checkpoint_event_prologue()  # small weights stay gathered: without it they would keep old values
        for i in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(i)
        self.optimizer.checkpoint_event_epilogue()

    def _call(self, **inputs: Any) -> Any:
        """DeepSpeed has cast the weights itself."""
        return self.module(**inputs)


def deepspeed_json(config: DeepSpeedConfig, optim: OptimConfig, world_size: int, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's config: a few defaults, the user's overrides over them, and what is typed on top. Batch sizes are 1
    because accumulation is steered by hand, a different number of micro-batches each step."""
    # Its own default is a buffer of 2 GB, however small the model.
    defaults = {"zero_optimization": {"reduce_bucket_size": min(num_parameters, 500_000_000)}}
    typed = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "gradient_clipping": optim.grad_clip,
        "bf16": {"enabled": config.precision is Precision.bf16},
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }
    if config.precision is Precision.bf16:  # in bf16 the sum over many micro-batches would lose the small ones
        typed["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merged(_merged(defaults, config.overrides), typed)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _join_group(device: torch.device) -> None:
    """DeepSpeed needs a process group even for one process; that one needs no port."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_SIZE", "1")):
        os.environ.setdefault(name, value)
    with redirect_stdout(sys.stderr):  # it prints; stdout is for results
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def master_weights(directory: Path) -> dict[str, Any]:
    """The fp32 weights in a checkpoint of any ZeRO stage and number of ranks; `.contiguous()` makes a tensor of one. They are
    unpickled: the caller has checked the files' digests against the manifest that we wrote.

    Raises: CheckpointError for ZeRO-1 in bf16, whose files DeepSpeed's own function does not read.
    """
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it tells what it does
        try:
            return get_fp32_state_dict_from_zero_checkpoint(str(directory), tag=TAG, lazy_mode=True)
        except ValueError as error:
            fix = "Let the run end: it writes the model itself."
            raise CheckpointError(f"DeepSpeed finds no weights: {error}", where=str(directory), fix=fix) from error
