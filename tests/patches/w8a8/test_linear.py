"""Layers of int8 weights in a model: the same bits as the plain layer's, by the operators, in every mode."""

from __future__ import annotations

import pytest
import torch

import npu_patch
from npu_patch import simulator
from tests.support.tiny_models import tiny, tiny_batch
from tests.support.w8a8 import in_int8

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUANT, PRODUCT = "npu::npu_dynamic_quant", "npu::npu_quant_matmul"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_gives_the_bits_of_the_plain_layers(dtype: torch.dtype, npu: torch.device) -> None:
    model = in_int8(tiny("qwen3").to(dtype)).to(npu)
    ids = tiny_batch()["input_ids"].to(npu)
    with npu_patch.applied(model, w8a8=False, fused_ops=False):
        expected = model(input_ids=ids).logits
    with npu_patch.applied(model, fused_ops=False) as report, simulator.count() as counted:
        found = model(input_ids=ids).logits
    assert torch.equal(found, expected)
    (site,) = [each for each in report.patched if each.patch == "w8a8"]
    assert site.calls.ran == 14 and not site.calls.fell_through and site.layers == 14
    assert counted.by_op[PRODUCT][0] == 14
    assert counted.by_op.get(QUANT, (0,))[0] == (0 if dtype == torch.float32 else 8)
