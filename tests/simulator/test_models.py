"""Unpatched models on the simulated NPU compute what they compute on the CPU."""

import copy

import pytest
import torch

from npu_patch.simulator import Refused
from tests.support.gradients import in_float64, loss_and_gradients, relative_error
from tests.support.parity import GROSS, NEAR
from tests.support.tiny_models import FAMILIES, tiny, tiny_batch

pytestmark = pytest.mark.usefixtures("simulated")


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_the_cpu(family: str, npu: torch.device) -> None:
    """To NEAR, or GROSS times the error of the CPU's float32 against float64 where that is larger: some
    gradients (dt_bias of the gated delta rule) are small differences of large numbers."""
    on_cpu = tiny(family)
    batch = tiny_batch()
    actual = loss_and_gradients(copy.deepcopy(on_cpu).to(npu), batch)
    exact = loss_and_gradients(in_float64(on_cpu), batch)
    expected = loss_and_gradients(on_cpu, batch)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        rounding = relative_error(tensor, exact[name])
        assert relative_error(actual[name], tensor) < max(NEAR, GROSS * rounding), name


def why_no_broadcast_masks(npu: torch.device) -> str | None:
    """transformers gives a mask of one row for the query heads of one key head. npu_fusion_attention takes it written
    out only, which an older torch_npu does not do."""
    query, mask = torch.ones(2, 2, 3, 16, device=npu), torch.ones(2, 1, 1, 8, dtype=torch.bool, device=npu)
    key = torch.ones(2, 2, 8, 16, device=npu)
    try:
        torch.nn.functional.scaled_dot_product_attention(query, key, key, mask)
    except Refused as refusal:
        return f"this torch_npu's scaled_dot_product_attention writes no mask out: {refusal}"
    return None


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("family", ["qwen2", "qwen3_5", "qwen3_moe", "gemma3"])
def test_generate_gives_the_same_tokens(family: str, padding: int, npu: torch.device) -> None:
    windowed = family == "gemma3"
    if (padding or windowed) and (reason := why_no_broadcast_masks(npu)):
        pytest.skip(reason)
    on_cpu = tiny(family)
    ids = tiny_batch(length=7)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    arguments = {"max_new_tokens": 12, "do_sample": False}
    expected = on_cpu.generate(ids, attention_mask=mask, **arguments)
    on_npu = copy.deepcopy(on_cpu).to(npu)
    actual = on_npu.generate(ids.to(npu), attention_mask=mask.to(npu), **arguments)
    assert actual.device == npu
    assert torch.equal(actual.cpu(), expected)
