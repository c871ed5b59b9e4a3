"""What weight formats and prefetch change of a program: launches and bytes of a LoRA step and of a decoded token.

    python -m npu_patch.simulator scripts/bench_formats.py

A tiny Qwen3 in bfloat16 with LoRA, unpatched, patched, with weight_nz, with prefetch and with both; counts are those of
the simulated NPU, losses and tokens must be equal to those of the patched model. What blocks and the cache gain in time
only an NPU can say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

import npu_patch
from npu_patch import simulator
from npu_patch.ops import weight_format

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS, PROMPT = 8, 16
WAYS: dict[str, dict[str, bool] | None] = {
    "unpatched": None,
    "patched": {},
    "weight_nz": {"weight_nz": True},
    "prefetch": {"prefetch": True},
    "both": {"weight_nz": True, "prefetch": True},
}


@dataclass(frozen=True)
class Measured:
    step: simulator.Counted
    token: simulator.Counted
    stored: int  # bytes of all weights, with what pads them
    laid_out: int
    loss: float
    tokens: list[int]


def main() -> None:
    if not simulator.is_active():
        raise SystemExit("counts are of the simulated NPU: python -m npu_patch.simulator scripts/bench_formats.py")
    measured = {way: measure(switches) for way, switches in WAYS.items()}
    print(f"{'':<10} {'LoRA step':>20} {'decoded token':>38}   weights")
    for way, found in measured.items():
        step, token = found.step, found.token
        print(
            f"{way:<10} {step.launches:>6} launches {step.bytes:>9} B"
            f" {token.launches / TOKENS:>6.0f} launches {token.bytes // TOKENS:>9} B"
            f" {token.prefetches / TOKENS:>4.0f} fetched, {token.prefetched_bytes // TOKENS} B"
            f"   {found.stored} B, {found.laid_out} layers in blocks"
        )
    for way in ("weight_nz", "prefetch", "both"):
        same = measured[way].loss == measured["patched"].loss and measured[way].tokens == measured["patched"].tokens
        print(f"{way}: loss and tokens {'equal to' if same else 'DIFFER from'} the patched model's")


def measure(switches: dict[str, bool] | None) -> Measured:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SIZES, **HEADS)
    base = transformers.AutoModelForCausalLM.from_config(config).to("npu", torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    ids = torch.randint(2, 128, (2, PROMPT), generator=torch.Generator().manual_seed(1)).to("npu")
    if switches is not None:
        npu_patch.apply(model, **switches)
    try:
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
        for _ in range(2):  # the first one makes the optimizer's state
            with simulator.count() as step:
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        model.eval()
        tokens = decoded(model, ids)
        next(tokens)
        with simulator.count() as token:
            found = list(tokens)
        stored = sum(each.untyped_storage().nbytes() for each in model.parameters())
        laid_out = len(weight_format.HELD)
        return Measured(step, token, stored, laid_out, float(loss), torch.cat(found).tolist())
    finally:
        npu_patch.restore()


@torch.no_grad()
def decoded(model: Any, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Greedy tokens; the first of them is that of the prompt."""
    out = model(input_ids=ids, use_cache=True)
    for _ in range(TOKENS + 1):
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        yield token.flatten()
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)


if __name__ == "__main__":
    main()
