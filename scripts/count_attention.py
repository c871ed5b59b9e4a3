"""Counts what attention costs, with the patch and without: launches and bytes per layer, peak memory, host copies.

    python scripts/count_attention.py [--length 8192]

Runs on the simulated NPU; the kernels of both sides are torch_npu's. Each row is one training step (forward and
backward) of the attention of a model with LAYERS layers in bfloat16, made as transformers makes it: one mask for all
layers, then one attention call per layer. "Peak" is the most memory that was allocated beyond what the step was given.
Bytes count a mask that an operator is given as read once, whole: those of the compressed mask, 4 MiB a call, are more
than the kernel reads.
"""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass
from typing import Any

from npu_patch import simulator

simulator.start()

import torch  # noqa: E402

import npu_patch  # noqa: E402

LAYERS, HEADS, KEY_HEADS, HEAD_DIM = 2, 2, 1, 64
NPU = torch.device("npu:0")


@dataclass(frozen=True)
class Batch:
    """`window`: of the mask; `pieces`: packed sequences in the row; `padding`: tokens at the left."""

    name: str
    window: int | None = None
    pieces: int = 0
    padding: int = 0


BATCHES = (
    Batch("causal"),
    Batch("window of 1024", window=1024),
    Batch("packed, 8 sequences", pieces=8),
    Batch("left padding", padding=100),
)


def step(batch: Batch, length: int, implementation: str) -> None:
    """Masks and attention of one training step, LAYERS deep."""
    from transformers import LlamaConfig, masking_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = LlamaConfig(hidden_size=8, num_attention_heads=1, attn_implementation=implementation)
    config.sliding_window = batch.window
    create = masking_utils.create_sliding_window_causal_mask if batch.window else masking_utils.create_causal_mask
    arguments: dict[str, Any] = {"attention_mask": None, "past_key_values": None}
    if batch.pieces:
        arguments["position_ids"] = torch.arange(length // batch.pieces, device=NPU).repeat(batch.pieces)[None]
    if batch.padding:
        arguments["attention_mask"] = (torch.arange(length, device=NPU) >= batch.padding).long()[None]
    mask = create(config, torch.empty(1, length, 8, device=NPU, dtype=torch.bfloat16), **arguments)
    module = torch.nn.Linear(1, 1)  # any module with the attributes that attention looks at
    module.num_key_value_groups, module.is_causal, module.config = HEADS // KEY_HEADS, True, config
    keywords = {"position_ids": arguments.get("position_ids"), "sliding_window": batch.window}
    attend, outs = ALL_ATTENTION_FUNCTIONS[implementation], []
    for layer in range(LAYERS):
        query, key, value = inputs(length, layer)
        outs.append(attend(module, query, key, value, attention_mask=mask, scaling=HEAD_DIM**-0.5, **keywords)[0])
    torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])


def inputs(length: int, layer: int) -> list[torch.Tensor]:
    """query, key and value [1, N, S, D], stored as projections store them."""
    generator = torch.Generator().manual_seed(layer)
    shapes = [(1, length, heads, HEAD_DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    tensors = (torch.randn(shape, generator=generator).to(NPU, torch.bfloat16) for shape in shapes)
    return [tensor.requires_grad_(True).transpose(1, 2) for tensor in tensors]


def measured(batch: Batch, length: int, implementation: str) -> dict[str, int]:
    inputs_bytes = LAYERS * length * HEAD_DIM * 2 * (HEADS + 2 * KEY_HEADS)
    before = torch.npu.memory_allocated()
    torch.npu.reset_peak_memory_stats()
    with simulator.count() as counted:
        step(batch, length, implementation)
    peak = torch.npu.max_memory_allocated() - before - inputs_bytes
    return {
        "launches": counted.launches // LAYERS,
        "bytes": counted.bytes // LAYERS,
        "peak": peak,
        "host copies": counted.host_copies,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    length = parser.parse_args().length
    print(f"sequence length {length}, {LAYERS} layers, {HEADS} heads ({KEY_HEADS} key heads) of {HEAD_DIM}, bfloat16")
    print(f"a bool mask [{length}, {length}] is {length * length >> 20} MiB")
    header = ("attention", "batch", "launches/layer", "MiB moved/layer", "peak MiB", "host copies")
    print("  ".join(f"{name:<26}" for name in header))
    for implementation in ("sdpa", "flash_attention_2"):
        for batch in BATCHES:
            for patched in (False, True):
                switched = {"rms_norm": False, "rope": False, "swiglu": False}
                with npu_patch.applied(device="npu", **switched) if patched else contextlib.nullcontext():
                    measured(batch, 256, implementation)  # constant masks are made once in a process
                    found = measured(batch, length, implementation)
                name = f"{implementation}{', patched' if patched else ''}"
                row = (
                    name,
                    batch.name,
                    str(found["launches"]),
                    f"{found['bytes'] / 2**20:.1f}",
                    f"{found['peak'] / 2**20:.1f}",
                    str(found["host copies"]),
                )
                print("  ".join(f"{cell:<26}" for cell in row), flush=True)


if __name__ == "__main__":
    main()
