"""A LoRA step on several devices of one machine, patched and unpatched: losses, time, peak memory.

    torchrun --nproc-per-node 2 scripts/bench_parallel.py                       # GPUs, by NCCL
    torchrun --nproc-per-node 8 scripts/bench_parallel.py --engines sequences --tokens 65536
    python -m npu_patch.simulator torchrun --nproc-per-node 2 scripts/bench_parallel.py --device npu --tiny
    ... --nproc-per-node 1 or 2 ... --tiny --tokens 32768 --engines sequences --ways patched   # the peak by ranks

Qwen3 of 1.7 billion random weights in bfloat16, rank 8 on all linear layers. DDP and FSDP2: `--tokens` on each device.
Sequences: `--tokens` on all devices together, of which each has a part. The ways of an engine run in turns on one
model, so their losses, of the same adapters and tokens, are to be equal up to bfloat16; times are medians with the
host's share, the slowest device's. A time on a simulated NPU says nothing.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import npu_patch
from npu_patch.sequence_parallel import SequenceParallel

SIZES: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
BACKENDS = {"cuda": "nccl", "npu": "hccl"}
WAYS: dict[str, dict[str, Any] | None] = {"unpatched": None, "patched": {}, "patched, Triton": {"triton": True}}
WARM_UPS, STEPS = 3, 10
Step = Callable[[], Tensor]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=BACKENDS, default="cuda")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--tokens", type=int, help="8192, or 64 with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a model to try the script with, two steps")
    asked = parser.parse_args()
    asked.tokens = asked.tokens or (64 if asked.tiny else 8192)
    return asked


def made(device: torch.device, tiny: bool) -> nn.Module:
    config = transformers.Qwen3Config(**{**SIZES, **(TINY if tiny else {})})
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False))
    for parameter in model.parameters():  # FSDP2 wants one dtype in a unit
        parameter.data = parameter.data.to(torch.bfloat16)
    return model.train()


def tokens(count: int, model: nn.Module, seed: int, device: torch.device) -> Tensor:
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    return torch.randint(0, vocabulary, (1, count), generator=torch.Generator().manual_seed(seed)).to(device)


def ddp(model: nn.Module, count: int, device: torch.device) -> tuple[nn.Module, Any]:
    ids = tokens(count, model, dist.get_rank(), device)
    wrapped = DistributedDataParallel(model, device_ids=[device.index])
    return wrapped, lambda: contextlib.nullcontext({"input_ids": ids, "labels": ids})


def fsdp2(model: nn.Module, count: int, device: torch.device) -> tuple[nn.Module, Any]:
    ids = tokens(count, model, dist.get_rank(), device)
    for layer in model.base_model.model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    return fully_shard(model), lambda: contextlib.nullcontext({"input_ids": ids, "labels": ids})


def sequences(model: nn.Module, count: int, device: torch.device) -> tuple[nn.Module, Any]:
    ids = tokens(count, model, 0, device)
    parallel = SequenceParallel(model)
    wrapped = DistributedDataParallel(model, device_ids=[device.index])
    return wrapped, lambda: parallel.part(input_ids=ids, labels=ids)


ENGINES = {"ddp": ddp, "fsdp2": fsdp2, "sequences": sequences}


def measured(step: Step, accelerator: Any, warm_ups: int, steps: int) -> tuple[float, float, float]:
    """The loss, milliseconds and GiB."""
    for _ in range(warm_ups):
        loss = step()
    accelerator.synchronize()
    accelerator.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        dist.barrier()
        begun = time.perf_counter()
        loss = step()
        accelerator.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    found = torch.tensor([statistics.median(times), accelerator.max_memory_allocated() / 2**30], device=loss.device)
    mean = loss.float().clone()
    dist.all_reduce(mean, dist.ReduceOp.AVG)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return mean.item(), *found.tolist()


def stepping(model: nn.Module, given: Any, optimizer: torch.optim.Optimizer) -> Step:
    def step() -> Tensor:
        with given() as batch:
            loss: Tensor = model(**batch).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def rows(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    accelerator = torch.get_device_module(options.device)
    timed = (1, 2) if options.tiny else (WARM_UPS, STEPS)
    for engine in options.engines:
        model, given = ENGINES[engine](made(device, options.tiny), options.tokens, device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        step = stepping(model, given, torch.optim.AdamW(trained, lr=0.0))  # every way has the same adapters
        for way in options.ways:
            switches = WAYS[way]
            with npu_patch.applied(model, device=options.device, patch=switches is not None, **(switches or {})):
                loss, milliseconds, gib = measured(step, accelerator, *timed)
            yield f"| {engine} | {way} | {loss:.4f} | {milliseconds:.1f} | {gib:.4g} |"
        del model, given, step, trained
        accelerator.empty_cache()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    asked = arguments()
    own = torch.device(asked.device, int(os.environ["LOCAL_RANK"]))
    torch.get_device_module(asked.device).set_device(own)
    dist.init_process_group(BACKENDS[asked.device], device_id=own)
    if dist.get_rank() == 0:
        name = torch.get_device_module(asked.device).get_device_name(own)
        print(
            f"| {dist.get_world_size()} x {name} | way | loss | ms | GiB |\n| --- | --- | --- | --- | --- |", flush=True
        )
    for row in rows(asked, own):
        if dist.get_rank() == 0:
            print(row, flush=True)
    dist.destroy_process_group()
