"""DeepSpeed ZeRO behind the same interface as `engine/single.py`, and with its numbers.

DeepSpeed averages gradients over ranks and wants to divide by accumulation steps. Here each micro-batch's loss is
already its share of the step's global mean (`engine/accounting.py`), so it is multiplied by the number of ranks to undo
the first, and the second is switched off.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root

from llmscale import distributed

# DeepSpeed compiles with ninja, which lies beside the interpreter: an environment need not be activated to be used.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported; silences a warning

import deepspeed
from deepspeed.comm.torch import build_shm_op

from llmscale.batch import Batch
from llmscale.engine import partitions, state
from llmscale.engine.accounting import StepTotals, parameter_buckets, require_finite, same_number_on_all_ranks
from llmscale.engine.averaging import WeightAverage
from llmscale.engine.config import DeepSpeedConfig, Offload, Precision
from llmscale.engine.frozen import FrozenEngine
from llmscale.engine.gate import Gate
from llmscale.engine.scatter import scatter
from llmscale.engine.sequence_parallel import SequenceParallel
from llmscale.errors import ConfigError
from llmscale.models.export import SHARD_BYTES, save_adapter, save_hf
from llmscale.models.loading import Model, num_parameters
from llmscale.optim.build import build_optimizer, set_learning_rate
from llmscale.optim.config import OptimConfig
from llmscale.optim.schedule import learning_rate
from llmscale.phases import phase
from llmscale.protocols import Accept, Digests, Objective

deepspeed.utils.logger.setLevel(logging.WARNING)


class DeepSpeedEngine(FrozenEngine):
    """`llmscale.protocols.TrainEngine` sharded over the ranks of the process group."""

    @distributed.limited_groups()
    def __init__(self, config: DeepSpeedConfig, model: Model, optim: OptimConfig, total_steps: int):
        _join_group(distributed.device())
        self.settings = deepspeed_json(config, optim, num_parameters(model, trained_only=True))
        super().__init__(config, model)
        self.optim, self.total_steps, self.zero_stage = optim, total_steps, config.zero_stage
        if config.activation_checkpointing:
            self.model.hf.gradient_checkpointing_enable({"use_reentrant": False})
        self.tensor_parallel_size = config.tensor_parallel_size
        self.sequence_parallel_size = config.sequence_parallel_size
        self.num_sharing = self.tensor_parallel_size * self.sequence_parallel_size  # ranks with the same examples
        if distributed.world_size() % self.num_sharing:
            what = f"{distributed.world_size()} ranks cannot share examples {self.num_sharing} by {self.num_sharing}"
            raise ConfigError(what, where="engine", fix="Change tensor_parallel_size or sequence_parallel_size.")
        if self.sequence_parallel_size > 1:
            SequenceParallel(self.model, self.sequence_parallel_size)
        if self.tensor_parallel_size > 1:
            self.model.config = self.model.hf.config  # where AutoTP looks for the plan of the architecture
        optimizer = build_optimizer(optim, self.model)
        self.gate = Gate(optimizer)
        self.module: Any
        with _collecting_little():
            self.module, self.optimizer, _, _ = deepspeed.initialize(
                model=self.model, optimizer=optimizer, config=self.settings
            )
        if config.compile:
            self.module.compile(compile_kwargs={"dynamic": True})
        spread = partial(partitions.weights_follow, self.optimizer, self.zero_stage)
        self.average = WeightAverage(optim.ema_decay, self.optimizer.optimizer, spread)
        self.num_steps = 0

    def _placed(self, model: Model) -> Model:
        if not (isinstance(self.config, DeepSpeedConfig) and self.config.scatters):
            return super()._placed(model)
        dtype = torch.bfloat16 if self.config.precision is Precision.bf16 else torch.float32
        return scatter(model, self.device, dtype, partial(deepspeed.zero.Init, config_dict_or_path=self.settings))

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
                self.module.backward(loss * self._loss_scale, scale_wrt_gas=False)
        metrics = self._of_examples(totals.metrics())
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
            return self._of_examples(super().evaluate(micro_batches, objective))

    def averaged(self) -> AbstractContextManager[None]:
        return self.average.swapped_in()

    def full_parameters(self, bucket_bytes: int, trained_only: bool = False) -> Iterator[dict[str, Tensor]]:
        for bucket in parameter_buckets(self.model, bucket_bytes // self.tensor_parallel_size, trained_only):
            sharded = self.zero_stage == 3
            gathered = deepspeed.zero.GatheredParameters(list(bucket.values())) if sharded else nullcontext()
            with gathered:
                whole = {name: self._whole(parameter) for name, parameter in bucket.items()}
                yield whole if distributed.rank() == 0 else {}
                del whole  # else it would still be there while the next one is gathered

    def snapshot(self) -> Callable[[Path], Digests]:
        return state.snapshot(self._pieces(), self.num_steps, self._part)

    def load(self, directory: Path) -> None:
        partitions.make_state(self.optimizer, self.zero_stage)
        self.average.begin()
        self.num_steps = state.load(directory, self._pieces(), self.model, self._part)
        partitions.weights_follow(self.optimizer, self.zero_stage)

    def export(self, directory: Path, tokenizer) -> None:
        self._write(partial(save_hf, self.model, tokenizer, directory))

    def export_adapter(self, directory: Path) -> None:
        self._write(partial(save_adapter, self.model, directory), trained_only=True)

    def sleep(self) -> None:
        """Where `config.sleeps`."""
        self._move(torch.device("cpu"))
        self.module.offload_states(pin_memory=self.device.type == "cuda")

    def wake(self) -> None:
        self.module.reload_states()
        self._move(self.device)

    def _move(self, device: torch.device) -> None:
        """What is frozen, which DeepSpeed does not know of."""
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(device)

    def _write(self, save: Callable[[Iterator[dict[str, Tensor]]], None], trained_only: bool = False) -> None:
        with self.averaged():
            buckets = self.full_parameters(SHARD_BYTES, trained_only)
            try:
                if distributed.rank() == 0:
                    save(buckets)
            finally:
                deque(buckets, maxlen=0)  # the others wait for rank 0 in each bucket, whatever happened to it

    @property
    def _loss_scale(self) -> int:
        """Undoes DeepSpeed's mean: it averages over the ranks that it knows to have other examples, and takes those that
        share a sequence for such; a loss that several ranks count is a share of it in each."""
        return distributed.world_size() * self.sequence_parallel_size

    def _of_examples(self, metrics: dict[str, float]) -> dict[str, float]:
        return metrics | {"num_tokens": metrics["num_tokens"] / self.num_sharing}

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        """Joined over the ranks that share its matrix."""
        value = parameter.detach()
        if hasattr(parameter, "gather_params"):
            parameter.gather_params([value])  # puts the joined tensor in the place of this view's own
        return value

    @property
    def _part(self) -> state.Part:
        size = self.tensor_parallel_size
        return state.Part(distributed.rank() // size, distributed.world_size() // size, distributed.rank() % size, size)

    def _pieces(self) -> list[state.Piece]:
        return partitions.pieces(self.model, self.optimizer, self.zero_stage)

    def _call(self, **inputs: Any) -> Any:
        """DeepSpeed has cast the weights itself."""
        return self.module(**inputs)


def deepspeed_json(config: DeepSpeedConfig, optim: OptimConfig, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's config: a few defaults, the user's overrides over them, and what is typed on top. Batch sizes are 1
    because accumulation is steered by hand, a different number of micro-batches each step."""
    # Its own default is a buffer of 2 GB, however small the model.
    defaults = {"zero_optimization": {"reduce_bucket_size": min(num_parameters, 500_000_000)}}
    typed: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.grad_clip,
        "bf16": {"enabled": config.precision is Precision.bf16},
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own steps as fast on a CPU and compiles nothing
        "steps_per_print": 1 << 30,
    }
    for key, offload in (("offload_optimizer", config.offload_optimizer), ("offload_param", config.offload_parameters)):
        if offload is not Offload.none:
            typed["zero_optimization"][key] = {"device": offload.value}
    if config.tensor_parallel_size > 1:
        typed["tensor_parallel"] = {"autotp_size": config.tensor_parallel_size, "vocab_parallel_lm_head": False}
    if config.precision is Precision.bf16:  # in bf16 the sum over many micro-batches would lose the small ones
        typed["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merged(_merged(defaults, config.overrides), typed)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


@contextmanager
def _collecting_little() -> Iterator[None]:
    """DeepSpeed collects garbage a dozen times while it starts, each time through every object of every module that is
    imported: 1.7 s in bf16, and 0.03 s without those."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _join_group(device: torch.device) -> None:
    """DeepSpeed needs a process group even for one process; that one needs no port, but a name."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if backend == "gloo":
            distributed.destroy_at_exit(None)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_SIZE", "1")):
        os.environ.setdefault(name, value)
    alone = "MASTER_PORT" not in os.environ
    if alone:  # it names memory by address and port: runs of one process would share it, and crash
        os.environ["MASTER_PORT"] = f"process-{os.getpid()}"
    try:
        with redirect_stdout(sys.stderr):  # it prints; stdout is for results
            if backend == "gloo":
                build_communication()
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        _forget_shared_buffer()
    finally:
        if alone:
            del os.environ["MASTER_PORT"]


def build_communication() -> None:
    """Compile DeepSpeed's communication between ranks of one host, where it has not been, and load it. Torch guards this with
    a file that a killed process leaves behind, for which all others would wait for ever. Whoever holds the lock that the
    system releases knows that such a file is nobody's."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with (root / "llmscale.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left_behind in root.glob("**/deepspeed_shm_comm/lock"):
            left_behind.unlink()
        build_shm_op()


def _forget_shared_buffer() -> None:
    """Ranks of one host speak through files of 69 MB in memory, which DeepSpeed never removes. Mapped, they need no name."""
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    distributed.barrier()  # every rank has opened those of all
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{distributed.rank()}"
    (Path("/dev/shm") / name).unlink(missing_ok=True)
