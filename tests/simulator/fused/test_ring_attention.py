"""npu_ring_attention_update: attention over keys in parts, merged, is the attention over all of them."""

import pytest
import torch
import torch_npu
from torch import Tensor

from npu_patch.simulator import Refused

from .test_fused import DTYPES, expect_close, randn

pytestmark = pytest.mark.usefixtures("simulated")

if not hasattr(torch.ops.npu, "npu_ring_attention_update"):
    pytest.skip("this torch_npu has no npu_ring_attention_update", allow_module_level=True)

HEADS, LENGTH, BATCH, SIZE = 3, 5, 2, 16


def part(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """[S, B, N * D] attention over these keys, and its maxima and sums."""
    return list(torch_npu.npu_fusion_attention(q, k, v, HEADS, "SBH", scale=0.25)[:3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_the_keys_are_merged(dtype: torch.dtype, npu: torch.device) -> None:
    q, k, v = (randn(length, BATCH, HEADS * SIZE).to(npu, dtype) for length in (LENGTH, 7, 7))
    whole = part(q, k, v)
    first, second = part(q, k[:4].contiguous(), v[:4].contiguous()), part(q, k[4:].contiguous(), v[4:].contiguous())
    attn_out, softmax_max, softmax_sum = torch_npu.npu_ring_attention_update(*first, *second)
    expect_close(attn_out, whole[0].cpu().double(), dtype)
    torch.testing.assert_close((softmax_max, softmax_sum), (whole[1], whole[2]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_layout": "TND"}, "only input_layout SBH is simulated, not TND"),
        ({1: torch.ones(BATCH, HEADS, LENGTH, 1)}, r"must be \[B, N, S, 8\], not \[2, 3, 5, 1\]"),
        ({2: torch.ones(BATCH, HEADS, LENGTH, 8).half()}, "softmax_max and softmax_sum must be one of float32"),
        ({3: torch.ones(LENGTH, BATCH, HEADS)}, "cur_attn_out must have the shape"),
    ],
)
def test_what_is_not_allowed(change: dict, words: str, npu: torch.device) -> None:
    statistic, out = torch.ones(BATCH, HEADS, LENGTH, 8), torch.ones(LENGTH, BATCH, HEADS * SIZE)
    given = [out, statistic, statistic, out, statistic, statistic]
    for position, value in change.items():
        if isinstance(position, int):
            given[position] = value
    named = {name: value for name, value in change.items() if isinstance(name, str)}
    with pytest.raises(Refused, match=words):
        torch_npu.npu_ring_attention_update(*(each.to(npu) for each in given), **named)
