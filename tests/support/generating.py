"""Tokens of generate() on the NPU, step by step or replayed, and how many steps were replays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import npu_patch
from npu_patch.serving.calls import Calls

# A random model would say one word again and again.
GREEDY: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.5}
STATIC: dict[str, Any] = {"cache_implementation": "static"}
# Of a step that is captured, the first two are compared with the model and count as none.
COMPARED = 2


def prompt(*, batch: int = 2, length: int = 9, padding: int = 4, seed: int = 1) -> dict[str, Tensor]:
    """The first row is padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :padding] = 0
    return {"input_ids": torch.randint(2, 101, (batch, length), generator=generator), "attention_mask": mask}


def tokens(model: Any, count: int = 8, batch: dict[str, Tensor] | None = None, **how: Any) -> Tensor:
    """`count` new ones, on the CPU."""
    given = {name: tensor.to(model.device) for name, tensor in (batch or prompt()).items()}
    how = {**GREEDY, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0, **how}
    return model.generate(**given, **how)[:, given["input_ids"].shape[1] :].cpu()


def calls_of(name: str = "_sample") -> Calls:
    """Of the method of transformers' mixin."""
    return next(
        each.calls
        for each in npu_patch.report().outcomes
        if each.patch == "captured_decode" and each.site.endswith(f".{name}")
    )


def reasons() -> list[str]:
    return list(calls_of().fell_through)
