"""Counts what one LoRA step costs on the simulated NPU: unpatched, and with each switch.

    python scripts/count_lora.py                         # qwen3, qwen3_moe and qwen3_5
    python scripts/count_lora.py --families llama gemma3_text --by-operator 15

Launches, megabytes moved and waits of the host in one forward and backward of a small model in bfloat16 with float32
adapters on all linear layers, dropout 0.05; and the highest device memory of it beyond the model's. Launches are those
of a model of any width with as many layers; bytes and memory belong to these sizes. The rules of counting are those of
npu_patch/simulator/counters.py.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

from npu_patch import simulator

if not simulator.is_active():
    simulator.start()

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import npu_patch
from npu_patch.commands.subject import models

OFF = {"lora": False, "loss": False}
ALONE = {"fused_ops": False, "moe_patch": False, "fla": False}
WAYS: dict[str, dict[str, Any]] = {
    "unpatched": {"patch": False},
    "kernels": OFF,
    "lora": {**ALONE, "loss": False},
    "loss": {**ALONE, "lora": False},
    "all": {},
    "all, remade": {"swiglu_recompute": True},  # by itself only where the products are large: these are not
    "all, triton": {"triton": True},
    "  and remade": {"triton": True, "swiglu_recompute": True},
}


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["qwen3", "qwen3_moe", "qwen3_5"], metavar="TYPE")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--by-operator", type=int, default=0, metavar="N", help="the N operators launched most often")
    options = parser.parse_args()
    print(f"One LoRA step of {options.tokens} tokens, bfloat16 with float32 adapters, counted on the simulated NPU\n")
    print(
        f"{'':<12}{'':<12}{'launches':>10}{'of unp.':>9}{'MB moved':>10}{'of unp.':>9}{'host waits':>12}{'peak MB':>9}"
    )
    for family in options.families:
        base: tuple[int, int] | None = None
        for way, switches in WAYS.items():
            counted, peak = counts(family, options.tokens, switches)
            base = base or (counted.launches, counted.bytes)
            cells = (
                f"{counted.launches}",
                f"{counted.launches / base[0]:.2f}",
                f"{counted.bytes / 1e6:.2f}",
                f"{counted.bytes / base[1]:.2f}",
                f"{counted.host_copies}",
                f"{peak / 1e6:.2f}",
            )
            print(f"{family:<12}{way:<14}" + "".join(f"{cell:>11}" for cell in cells), flush=True)
            often = sorted(counted.by_op.items(), key=lambda each: -each[1][0])[: options.by_operator]
            for name, (launches, moved) in often:
                print(f"    {launches:>8} {moved / 1e6:>10.3f} MB  {name}")


def counts(family: str, tokens: int, switches: dict[str, Any]) -> tuple[simulator.Counted, int]:
    """Of one step after another one, and the bytes of device memory that it needs at most beyond the model's."""
    model = models.source_of(family).make(0, False).bfloat16()
    batch = {name: each.to("npu") for name, each in models.batch_for(model, batch=1, length=tokens).items()}
    linear = [name for name, each in model.named_modules() if type(each) is torch.nn.Linear]
    targets = sorted({name.rsplit(".", 1)[-1] for name in linear} - {"lm_head"})  # "all-linear" means experts, too
    adapters = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets)
    model = get_peft_model(model, adapters).train().to("npu")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    with npu_patch.applied(model, **switches):
        step(model, batch)
        torch.npu.empty_cache()
        before = torch.npu.memory_allocated()
        torch.npu.reset_peak_memory_stats()
        with simulator.count() as counted:
            step(model, batch)
        peak = torch.npu.max_memory_allocated() - before
    return counted, peak


def step(model: torch.nn.Module, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
