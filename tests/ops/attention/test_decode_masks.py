"""A padded batch's mask on its way to the operator for decoding: once a step, not once a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npu_patch import simulator
from npu_patch.ops.attention.band import in_operator_shape
from npu_patch.ops.attention.call import Attention
from npu_patch.ops.attention.decode import LONGEST_MASK, decode
from tests.support.gradients import relative_error

BATCH, HEADS, KEY_HEADS, WIDTH = 3, 4, 2, 32


def attended(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    shaped = in_operator_shape(hidden, BATCH, HEADS, 1, key.shape[2])  # each layer's own view
    return decode(query, key, value, Attention(WIDTH**-0.5, hidden=shaped, decodes=True))


def heads(count: int, length: int, device: torch.device) -> Tensor:
    return torch.randn(BATCH, count, length, WIDTH).to(device, torch.bfloat16)


@pytest.mark.parametrize("keys", [40, LONGEST_MASK + 16])
def test_layers_of_a_step_share_what_is_made_of_their_mask(keys: int, npu: torch.device, simulated: None) -> None:
    torch.manual_seed(0)
    query, key, value = heads(HEADS, 1, npu), heads(KEY_HEADS, keys, npu), heads(KEY_HEADS, keys, npu)
    hidden = (torch.arange(keys) < torch.tensor([0, 5, 9])[:, None])[:, None, None].to(npu)
    with torch.no_grad():
        first = attended(query, key, value, hidden)
        with simulator.count() as counted:
            second = attended(query, key, value, hidden)
        assert counted.launches == 1, counted
        hidden[:, :, :, 20:] = True  # the same tensor with other contents
        changed = attended(query, key, value, hidden)
    wide = [x.double().cpu() for x in (query, key, value)]
    for found, until in ((first, keys), (second, keys), (changed, 20)):
        seen = (torch.arange(keys) >= torch.tensor([0, 5, 9])[:, None]) & (torch.arange(keys) < until)
        exact = torch.nn.functional.scaled_dot_product_attention(*wide, seen[:, None, None], enable_gqa=True)
        assert relative_error(found.double().cpu(), exact.transpose(1, 2)) < 1e-2
