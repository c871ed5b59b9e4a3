"""How many launches a group of adapted layers is, beside its frozen products, however many layers it has."""

from __future__ import annotations

import pytest
import torch

from npu_patch import simulator
from npu_patch.kernels import launch
from npu_patch.kernels.lora.adapted_linears import Group, adapted_linears
from npu_patch.simulator import triton_kernels

FORWARD, BACKWARD = {"shrink", "expand"}, {"through", "sum_ups", "input_side"}


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [20, 1024], ids=["few tokens", "more"])
@pytest.mark.parametrize("layers", [1, 3])
def test_sums_of_one_part_in_float32_are_not_added_up(
    layers: int, tokens: int, dtype: torch.dtype, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not simulator.is_active():
        pytest.skip("launches are counted on the simulated NPU")
    monkeypatch.setitem(launch.RUNNERS, "npu", triton_kernels.run)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device=npu, dtype=dtype)

    x = normal(tokens, 40).requires_grad_()
    given = [(normal(24, 40), None, normal(4, 40, dtype=dtype), normal(24, 4, dtype=dtype)) for _ in range(layers)]
    for _, _, down, up in given:
        down.requires_grad_()
        up.requires_grad_()

    def launched() -> dict[str, int]:
        with simulator.count() as counted:
            ys = adapted_linears(x, given, Group(2.0, 0.1, torch.bfloat16))
            torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
        return {name.rsplit(".", 1)[1]: each[0] for name, each in counted.by_op.items() if name.startswith("triton::")}

    added = set() if tokens == 20 and dtype == torch.float32 else {"sum_rows"}
    assert launched() == dict.fromkeys(FORWARD | BACKWARD | added, 1)
