"""How much arithmetic a token costs, and how much of what the device could do was done."""

from __future__ import annotations

import time

import torch

from llmscale.models.loading import Model

# Dense bf16 TFLOP/s by the vendors' data sheets (without sparsity), found by a part of the device's name.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
}


def flops_per_token(model: Model, seq_len: int) -> float:
    """Of a forward and backward: 6 N + 12 L d S (Chowdhery et al. 2022, appendix B), N the weights without the input
    embeddings (a tied matrix counts once, as the output layer that multiplies), L layers, d hidden size, S tokens of a
    sequence. A frozen weight counts 4, for its own gradient is not computed. What activation checkpointing computes twice
    is not counted."""
    config = model.hf.config.get_text_config()
    embedding = model.hf.get_input_embeddings().weight
    head = model.hf.get_output_embeddings() if hasattr(model.hf, "lm_head") else None
    tied = head is not None and head.weight is embedding
    multiplied = [p for p in model.parameters() if tied or p is not embedding]
    products = sum((6.0 if p.requires_grad else 4.0) * p.numel() for p in multiplied)
    return products + 12.0 * config.num_hidden_layers * config.hidden_size * seq_len


def peak_flops(device: torch.device, bf16: bool) -> tuple[float, str]:
    """(FLOP/s, where the figure is from). A device without a known figure is measured by a matrix product."""
    if device.type == "cuda" and bf16:
        name = torch.cuda.get_device_name(device)
        known = next((value for part, value in PEAK_TFLOPS.items() if part in name), None)
        if known is not None:
            return known * 1e12, f"{name}, data sheet, bf16 dense"
    dtype = torch.bfloat16 if bf16 else torch.float32
    return _matmul_flops(device, dtype), f"a matrix product of 1024 x 1024 in {dtype} on this {device.type}"


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best of three: interruptions make it slower, never faster."""
    a = torch.randn(1024, 1024, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):  # the first warms up
        started = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best
