"""What a patched call costs the host, where it can be counted: Python frames of ours, and views that torch makes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import npu_patch
from npu_patch.ops import rope
from tests.support.tiny_models import tiny

PACKAGE = Path(npu_patch.__file__).parent
SIMULATOR = str(PACKAGE / "simulator")


def frames(call: Callable[[], Any]) -> Counter[str]:
    """Of ours, by the name of their code, generators' at each resumption: in the second call, when all is known."""
    found: Counter[str] = Counter()

    def entered(frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(PACKAGE)) and not file.startswith(SIMULATOR):
            found[frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name] += 1

    try:
        for watching in (None, entered):  # from one place: attention asks who calls it, once
            sys.setprofile(watching)
            call()
    finally:
        sys.setprofile(None)
    return found


def heads(device: torch.device, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`[B, N, S, D]` as projections come."""
    return torch.randn(2, 5, count, 16).to(device, dtype).transpose(1, 2).requires_grad_()


# About as many as Python 3.11 has: newer ones have no frame for a comprehension.
@pytest.mark.parametrize(("what", "most"), [("rope", 38), ("swiglu", 19), ("attention", 37)])
def test_a_call_passes_few_frames_of_ours(what: str, most: int, npu: torch.device, simulated: None) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.qwen3 import modeling_qwen3

    model = tiny("qwen3").to(npu)
    layer = model.model.layers[0]
    with npu_patch.applied(model):
        query, key, value = heads(npu, 4), heads(npu, 2), heads(npu, 2)
        cos, sin = torch.randn(2, 1, 5, 16, device=npu)
        x = torch.randn(2, 5, model.config.hidden_size, device=npu)
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        calls: dict[str, Callable[[], Any]] = {
            "rope": lambda: modeling_qwen3.apply_rotary_pos_emb(query, key, cos, sin),
            "swiglu": lambda: layer.mlp(x),
            "attention": lambda: sdpa(layer.self_attn, query, key, value, None, dropout=0.0, scaling=0.25),
        }
        found = frames(calls[what])
    assert 0 < found.total() <= most, f"{found.total()} frames: {found}"


class Views(TorchDispatchMode):
    """How often a tensor is turned."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.turned += func is torch.ops.aten.transpose.int
        return func(*args, **kwargs or {})


def test_query_and_key_turn_their_tables_once_forward_and_backward(npu: torch.device, simulated: None) -> None:
    """Each tensor there and back, and both tables: not both tables for each tensor."""
    cos, sin = torch.randn(2, 1, 1, 5, 16, device=npu)
    run = next(each for each in rope.ROPE.implementations if "npu" in each.device_types).run
    query, key = heads(npu, 4), heads(npu, 2)
    with Views() as forward:
        rotated = run([query, key], cos, sin, rope.VARIANTS[0])
    with Views() as backward:
        torch.autograd.grad(rotated, [query, key], [torch.ones_like(each) for each in rotated])
    assert (forward.turned, backward.turned) == (6, 6)


@pytest.mark.parametrize("output", ["promoted", "input"])
def test_tensors_of_two_dtypes_are_each_rotated_in_their_own(output: str, npu: torch.device) -> None:
    variant = rope.RoPEVariant("half", rope.TABLES[0], output=output)
    cos, sin = torch.randn(2, 1, 1, 5, 16, device=npu).bfloat16()
    given = [heads(npu, 4, torch.float32), heads(npu, 2, torch.bfloat16)]
    run = next(each for each in rope.ROPE.implementations if "npu" in each.device_types).run
    for y, x in zip(run(given, cos, sin, variant), given, strict=True):
        expected = variant.reference(x, cos, sin)
        assert y.dtype == expected.dtype == x.dtype
        torch.testing.assert_close(y, expected, rtol=2e-2 if x.dtype == torch.bfloat16 else 1e-5, atol=2e-2)
