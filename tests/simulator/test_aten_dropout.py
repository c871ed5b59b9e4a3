"""`native_dropout` of the simulated NPU: what torch_npu's returns and keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.usefixtures("simulated")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_its_mask_has_a_bit_for_each_element(dtype: torch.dtype, npu: torch.device) -> None:
    x = torch.randn(3, 67, device=npu, dtype=dtype)
    torch.manual_seed(0)
    dropped, mask = torch.native_dropout(x, 0.3, True)
    assert mask.dtype == torch.uint8 and mask.shape == (2 * 128 // 8,)
    torch.manual_seed(0)
    assert torch.equal(F.dropout(x, 0.3), dropped)
    again = torch.ops.aten.native_dropout_backward(x, mask, 1 / 0.7)
    assert torch.equal(again, dropped)
    assert 0.1 < (dropped == 0).float().mean().item() < 0.5


@pytest.mark.parametrize("p, train, kept", [(0.0, True, 1.0), (0.5, False, 1.0), (1.0, True, 0.0)])
def test_what_drops_nothing_or_everything_draws_nothing(p: float, train: bool, kept: float, npu: torch.device) -> None:
    x = torch.randn(3, 5, device=npu)
    before = torch.npu.get_rng_state()
    dropped, mask = torch.native_dropout(x, p, train)
    assert torch.equal(dropped, x * kept) and torch.equal(mask, torch.full_like(x, kept))
    assert torch.equal(torch.npu.get_rng_state(), before)
    assert torch.equal(torch.ops.aten.native_dropout_backward(x, mask, kept), x * kept)


def test_a_scale_that_no_dropout_has_is_refused(npu: torch.device) -> None:
    x = torch.randn(3, 5, device=npu)
    _, mask = torch.native_dropout(x, 0.5, True)
    with pytest.raises(RuntimeError, match=r"scale has to be 0 or at least 1, but got 0\.5"):
        torch.ops.aten.native_dropout_backward(x, mask, 0.5)


def test_autograd_keeps_the_bits(npu: torch.device) -> None:
    x = torch.randn(4, 1000, device=npu, requires_grad=True)
    kept = []

    def pack(saved: torch.Tensor) -> torch.Tensor:
        kept.append(saved.nbytes)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = F.dropout(x, 0.5)
    y.sum().backward()
    assert sum(kept) == -(-4000 // 128) * 16
    assert torch.equal(x.grad, (y.detach() != 0) * 2.0)
