"""Add, RMSNorm and quantisation in one operator: nearer than one after the other, and a check that finds wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_patch.measuring.measure import check
from npu_patch.ops.rms_norm import GATED_VARIANTS, PLAIN_VARIANTS, RMSNormVariant
from npu_patch.ops.w8a8.add_rms_norm import W8A8_ADD_RMS_NORM, case, why_unsupported
from npu_patch.ops.w8a8.quantised import Quantised, by_token
from npu_patch.serving.case import Alternative

(BY_NPU,) = W8A8_ADD_RMS_NORM.implementations
WEIGHT = PLAIN_VARIANTS[0]
HALF_DTYPES = (torch.bfloat16, torch.float16)
SERVED = [each for each in PLAIN_VARIANTS if each.gamma is WEIGHT.gamma]
every_dtype = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
Fused = tuple[Quantised, Tensor]


@every_dtype
@pytest.mark.parametrize("variant", SERVED, ids=[each.name for each in SERVED])
def test_the_operator_passes_its_check(variant: RMSNormVariant, dtype: torch.dtype, npu: torch.device) -> None:
    wanted = case(variant, 96, dtype, dtype)
    assert wanted.why_not_by(BY_NPU) is None
    assert check(wanted, Alternative(BY_NPU.name, BY_NPU.run, BY_NPU.unsupported), npu).wrong is None


def right(variant: RMSNormVariant, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Fused:
    total = x.float() + residual.float()
    return by_token(variant.exact(total, weight.float(), eps)), total.to(x.dtype)


def changed(change: Callable[[Quantised, Tensor], tuple[Any, Tensor]]) -> Callable[..., Fused]:
    return lambda *call: change(*right(*call))


WRONG: dict[str, Callable[..., Fused]] = {
    "scales of 128": changed(lambda rows, total: (Quantised(rows.values, rows.scale * (127 / 128)), total)),
    "one step off": changed(lambda rows, total: (Quantised(rows.values - rows.values.sign(), rows.scale), total)),
    "rows in another order": changed(lambda rows, total: (Quantised(rows.values.flip(0), rows.scale), total)),
    "scales in another order": changed(lambda rows, total: (Quantised(rows.values, rows.scale.flip(0)), total)),
    "the branch for the sum": lambda variant, x, *others: (right(variant, x, *others)[0], x),
    "no weight": lambda variant, x, residual, weight, eps: right(variant, x, residual, torch.ones_like(weight), eps),
    "no residual": lambda variant, x, residual, *others: right(variant, x, torch.zeros_like(x), *others),
    "1 + weight": lambda variant, x, residual, weight, eps: right(variant, x, residual, 1 + weight, eps),
}


@every_dtype
@pytest.mark.parametrize("mistake", [None, *WRONG])
def test_a_wrong_operator_is_found(mistake: str | None, dtype: torch.dtype) -> None:
    run = right if mistake is None else WRONG[mistake]
    found = check(case(WEIGHT, 96, dtype, dtype), Alternative("another", run), torch.device("cpu")).wrong
    assert found is None if mistake is None else found is not None and "of its size off" in found


@every_dtype
def test_it_is_nearer_to_the_exact_norm_than_one_after_the_other(dtype: torch.dtype, npu: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(64, 256, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(256, generator=generator).to(dtype)
    exact, _ = W8A8_ADD_RMS_NORM.exact(WEIGHT, x.double(), residual.double(), weight.double(), 1e-6)
    rows, total = BY_NPU.run(WEIGHT, x.to(npu), residual.to(npu), weight.to(npu), 1e-6)
    assert torch.equal(total.cpu(), x + residual)
    one_after_the_other = by_token(WEIGHT.reference(x + residual, weight, 1e-6))

    def apart(found: Quantised) -> float:
        return float((found.values.cpu() * found.scale.cpu()[:, None] - exact).norm() / exact.norm())

    assert apart(rows) < apart(one_after_the_other)


def call(**changed: Any) -> tuple[Any, ...]:
    given = {
        "variant": WEIGHT,
        "x": torch.ones(2, 1, 8, dtype=torch.bfloat16),
        "residual": torch.ones(2, 1, 8, dtype=torch.bfloat16),
        "weight": torch.ones(8, dtype=torch.bfloat16),
        "eps": 1e-6,
    }
    return tuple({**given, **changed}.values())


class Kind(Tensor):
    pass


NO = torch.ones(0, 8, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, None),
        *[({"variant": each}, f"the norm is {each.name!r}") for each in (PLAIN_VARIANTS[2], GATED_VARIANTS[0])],
        ({"weight": None}, "the norm is 'weight'"),
        ({"residual": torch.ones(2, 1, 8, dtype=torch.bfloat16).as_subclass(Kind)}, "tensor subclass"),
        ({"x": torch.ones(2, 1, 8)}, "input of dtype float32"),
        ({"x": torch.ones(8, dtype=torch.bfloat16)}, "input of dtype bfloat16, 1 dimensions"),
        ({"x": NO, "residual": NO}, "input of dtype bfloat16, 0 elements"),
        ({"residual": torch.ones(1, 1, 8, dtype=torch.bfloat16)}, "a residual of another shape"),
        ({"residual": torch.ones(2, 1, 8, dtype=torch.float16)}, "a residual of another shape"),
        ({"weight": torch.ones(8)}, "weight of 1 dimensions, 8 wide, float32, on cpu"),
        (
            {"weight": torch.ones(8, dtype=torch.bfloat16, device="meta")},
            "weight of 1 dimensions, 8 wide, bfloat16, on m",
        ),
        ({"eps": 0.0}, "eps 0.0: rows of zeros need a positive one"),
    ],
)
def test_what_the_operator_does_not_take_is_said(given: dict[str, Any], reason: str | None) -> None:
    found = why_unsupported(*call(**given))
    assert found is None if reason is None else found is not None and found.startswith(reason)
