"""The ops on the device: every variant, forward and backward, against its own formula in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch import simulator
from npu_patch.kernels.gamma import NONE
from npu_patch.numerics import rotation
from npu_patch.ops import rms_norm, rope, swiglu
from npu_patch.serving.implementation import Implementation, choose
from tests.support.gradients import relative_error
from tests.support.parity import NEAR, RATIO

HALF_DTYPES = [torch.bfloat16, torch.float16]


def npu_implementation(implementations: Sequence[Implementation]) -> Implementation:
    return choose(implementations, "npu").chosen


def check_against_float64(
    served: Callable[..., Any],
    original: Callable[..., Any],
    inputs: Sequence[Tensor],
    npu: torch.device,
    bar: float = RATIO,
) -> None:
    """Outputs and gradients: to NEAR in float32, and in half precision no further from float64 than `bar` times what
    the original is. Errors are norms over all elements."""
    seeds: dict[int, Tensor] = {}

    def run(function: Callable[..., Any], dtype: torch.dtype | None, device: Any) -> list[Tensor]:
        leaves = [x.detach().clone().to(dtype or x.dtype).to(device).requires_grad_(True) for x in inputs]
        outputs = function(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        for index, output in enumerate(outputs):
            seeds.setdefault(index, torch.randn(output.shape, generator=torch.Generator().manual_seed(9 + index)))
        grads = torch.autograd.grad(
            outputs, leaves, [seeds[index].to(output.dtype).to(device) for index, output in enumerate(outputs)]
        )
        return [tensor.detach().cpu() for tensor in (*outputs, *grads)]

    exact = run(original, torch.float64, "cpu")
    own = run(original, None, "cpu")
    found = run(served, None, npu)
    for index, (one, other, truth) in enumerate(zip(found, own, exact, strict=True)):
        assert one.dtype == other.dtype and one.shape == other.shape, index
        error, own_error = (relative_error(tensor.double(), truth) for tensor in (one, other))
        assert error <= (NEAR if one.dtype == torch.float32 else 0) + bar * own_error, (index, error, own_error)


@pytest.mark.parametrize("dtypes", itertools.product([torch.float32, *HALF_DTYPES], repeat=2), ids=str)
@pytest.mark.parametrize("variant", rms_norm.PLAIN_VARIANTS, ids=lambda variant: variant.name)
def test_rms_norm(variant: rms_norm.RMSNormVariant, dtypes: tuple[torch.dtype, torch.dtype], npu: torch.device) -> None:
    kernel = npu_implementation(rms_norm.RMS_NORM.implementations).run
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 17, 88, generator=generator) * torch.tensor([1e-3, 1.0, 30.0])[:, None, None]).to(dtypes[0])
    weight = torch.randn(88, generator=generator).to(dtypes[1])
    if variant.gamma == NONE:
        check_against_float64(
            lambda x: kernel(variant, x, None, 1e-6),
            lambda x: variant.reference(x, None, 1e-6),
            [x],
            npu,
        )
    else:
        check_against_float64(
            lambda x, weight: kernel(variant, x, weight, 1e-6),
            lambda x, weight: variant.reference(x, weight, 1e-6),
            [x, weight],
            npu,
        )


@pytest.mark.parametrize("in_float32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("variant", rms_norm.GATED_VARIANTS, ids=lambda variant: variant.name)
def test_gated_rms_norm(
    variant: rms_norm.RMSNormVariant, dtype: torch.dtype, in_float32: bool, npu: torch.device
) -> None:
    kernel = npu_implementation(rms_norm.RMS_NORM.implementations).run
    x, gate = torch.randn(2, 4, 37, 240, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = torch.randn(240, generator=torch.Generator().manual_seed(2)).to(dtype)
    check_against_float64(
        lambda x, weight, gate: kernel(variant, x, weight, 1e-6, gate, in_float32),
        lambda x, weight, gate: variant.reference(x, weight, 1e-6, gate),
        [x, weight, gate],
        npu,
    )


@pytest.mark.parametrize(
    ("x", "weight", "words"),
    [
        (torch.ones(6), torch.ones(6), "1 dimensions"),
        (torch.ones(2, 6, dtype=torch.float64), torch.ones(6), "torch.float64"),
        (torch.ones(0, 6), torch.ones(6), "0 elements"),
        (torch.ones(2, 6), torch.ones(5), r"weight of shape \(5,\)"),
        (torch.ones(2, 6), torch.ones(6, dtype=torch.int64), "weight of dtype torch.int64"),
        (torch.ones(2, 6), torch.ones(6, device="meta"), "on meta"),
    ],
)
def test_rms_norm_names_what_it_does_not_support(x: Tensor, weight: Tensor, words: str) -> None:
    import re

    for implementation in rms_norm.RMS_NORM.implementations:
        assert re.search(words, implementation.unsupported(rms_norm.PLAIN_VARIANTS[0], x, weight, 1e-6))


LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {  # query, key, table
    "BNSD": ((2, 6, 9, 32), (2, 2, 9, 32), (2, 1, 9, 32)),
    "BNSD, one table": ((2, 6, 9, 32), (2, 2, 9, 32), (1, 1, 9, 32)),
    "BNSD, short with one table": ((7, 12, 3, 32), (7, 2, 3, 32), (1, 1, 3, 32)),  # B * N > 8 * S
    "BNSD, unaligned": ((3, 4, 5, 20), (3, 4, 5, 20), (1, 1, 5, 20)),
    "BNSD, one token": ((5, 4, 1, 32), (5, 2, 1, 32), (5, 1, 1, 32)),
    "BNSD, batch larger than length": ((9, 2, 3, 32), (9, 2, 3, 32), (9, 1, 3, 32)),
    "BSND": ((2, 9, 6, 32), (2, 9, 2, 32), (2, 9, 1, 32)),
    "TND": ((11, 6, 32), (11, 3, 32), (11, 1, 32)),
    "TND, D 80": ((11, 4, 80), (11, 4, 80), (11, 1, 80)),
}


@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_in_every_layout(
    layout: str, dtypes: tuple[torch.dtype, torch.dtype], turned: bool, npu: torch.device
) -> None:
    query, key, table = LAYOUTS[layout]
    check_rope(rope.VARIANTS[0], query, key, table, dtypes, npu, turned and len(query) == 4)


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("output", ["promoted", "input"])
@pytest.mark.parametrize("index", range(len(rope.VARIANTS)))
def test_rope_in_every_variant(index: int, output: str, width: int, npu: torch.device) -> None:
    import dataclasses

    variant = dataclasses.replace(rope.VARIANTS[index], output=output)
    batch = 1 if variant.pairing == rotation.INTERLEAVE else 2
    table = (batch, 1, 9, variant.table.width(width))
    check_rope(variant, (2, 6, 9, 24), (2, 2, 9, 24), table, (torch.bfloat16, torch.float32), npu, False)


def check_rope(
    variant: rope.RoPEVariant,
    query: tuple[int, ...],
    key: tuple[int, ...],
    table: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    npu: torch.device,
    turned: bool,
) -> None:
    implementation = npu_implementation(rope.ROPE.implementations)
    generator = torch.Generator().manual_seed(3)
    cos, sin = torch.randn(2, *table, generator=generator).to(dtypes[1])  # no angles: nothing may depend on symmetry

    def served(q: Tensor, k: Tensor) -> list[Tensor]:
        if turned:
            q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
        tables = cos.to(npu), sin.to(npu)
        assert implementation.unsupported([q, k], *tables, variant) is None
        return implementation.run([q, k], *tables, variant)

    def original(q: Tensor, k: Tensor) -> list[Tensor]:
        tables = (cos.double(), sin.double()) if q.dtype == torch.float64 else (cos, sin)
        return [variant.reference(x, *tables) for x in (q, k)]

    tensors = [torch.randn(*shape, generator=generator).to(dtypes[0]) for shape in (query, key)]
    check_against_float64(served, original, tensors, npu)


def test_rope_keeps_only_its_tables_for_the_backward(npu: torch.device) -> None:
    kept: list[tuple[int, ...]] = []
    q, k = (torch.randn(2, heads, 9, 32, device=npu, requires_grad=True) for heads in (6, 2))
    cos, sin = torch.randn(2, 2, 1, 9, 32, device=npu)
    run = npu_implementation(rope.ROPE.implementations).run
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tuple(tensor.shape)), lambda _: None):
        run([q, k], cos, sin, rope.VARIANTS[0])
    assert kept == [(2, 1, 9, 32)] * 2


def test_rope_computes_no_gradient_that_is_not_asked_for(npu: torch.device, simulated: None) -> None:
    q = torch.randn(2, 6, 9, 32, device=npu, requires_grad=True)
    k = torch.randn(2, 2, 9, 32, device=npu)
    cos, sin = torch.randn(2, 2, 1, 9, 32, device=npu)
    run = npu_implementation(rope.ROPE.implementations).run
    rotated, _ = run([q, k], cos, sin, rope.VARIANTS[0])
    with simulator.count() as counted:
        rotated.backward(torch.ones_like(rotated))
    assert counted.by_op["npu::npu_rotary_mul"][0] == 1


def test_rope_copies_no_transposed_projection(npu: torch.device, simulated: None) -> None:
    """`[B, S, N, D]` seen as `[B, N, S, D]`: one launch, no hidden copy."""
    q = torch.randn(2, 9, 6, 32, device=npu).transpose(1, 2)
    cos, sin = torch.randn(2, 2, 1, 9, 32, device=npu)
    run = npu_implementation(rope.ROPE.implementations).run
    with simulator.count() as counted:
        run([q], cos, sin, rope.VARIANTS[0])
    assert counted.launches == 1, counted.by_op


@pytest.mark.parametrize(
    ("shape", "table", "pairing", "words"),
    [
        ((2, 1000, 4, 32), (2, 1, 4, 32), "half", "1000 heads"),
        ((1, 2, 4, 1024), (1, 1, 4, 1024), "half", "fewer than 896"),
        ((2, 3, 4, 32), (2, 1, 4, 32), "interleave", "a table for each sample"),
        ((2, 3, 4, 32), (3, 1, 4, 32), "half", "tables of another shape"),
        ((2, 3, 4, 32), (2, 1, 1, 32), "half", "tables of another shape"),
        ((2, 3, 4, 32), (2, 1, 4, 31), "half", "tables of another shape"),
        ((2, 3, 4, 32), (2, 1, 4, 64), "half", "tables of another shape"),
        ((3, 32), (3, 32), "half", "tables of another shape"),
        ((0, 3, 4, 32), (1, 1, 4, 32), "half", "0 elements"),
    ],
)
def test_rope_names_what_it_does_not_support(
    shape: tuple[int, ...], table: tuple[int, ...], pairing: str, words: str
) -> None:
    variant = next(variant for variant in rope.VARIANTS if variant.pairing == pairing)
    implementation = npu_implementation(rope.ROPE.implementations)
    reason = implementation.unsupported([torch.ones(shape)], torch.ones(table), torch.ones(table), variant)
    assert words in reason


def test_m_rope_sections_follow_their_positions() -> None:
    table = torch.arange(3.0)[:, None, None, None].expand(3, 1, 1, 8).contiguous()
    assert rope.mix_sections(table, [1, 2, 1]).flatten().tolist() == [0, 1, 1, 2, 0, 1, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 24), (1, 1, 3), (5, 17)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype, npu: torch.device) -> None:
    kernel = npu_implementation(swiglu.SWIGLU.implementations).run
    gate, up = (torch.randn(2, *shape, generator=torch.Generator().manual_seed(4)) * 3).to(dtype)
    check_against_float64(lambda gate, up: kernel(gate, up), swiglu.reference, [gate, up], npu)
    check_against_float64(
        lambda gate_up: kernel(gate_up),
        lambda gate_up: swiglu.reference(*gate_up.chunk(2, -1)),
        [torch.cat((gate, up), -1)],
        npu,
    )


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([torch.ones(2, 3), torch.ones(2, 4)], "4 wide"),
        ([torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16)], "torch.bfloat16"),
        ([torch.ones(0, 4)], "0 elements"),
        ([torch.ones(2, 3)], "odd last dimension 3"),
    ],
)
def test_swiglu_names_what_it_does_not_support(tensors: list[Tensor], words: str) -> None:
    assert words in npu_implementation(swiglu.SWIGLU.implementations).unsupported(*tensors)


def test_silu_reference_is_torchs() -> None:
    gate, up = torch.randn(2, 5)
    assert torch.equal(swiglu.reference(gate, up), F.silu(gate) * up)


OPS = (rms_norm.RMS_NORM, rope.ROPE, swiglu.SWIGLU)
RMS_NORM, ROPE, SWIGLU = (npu_implementation(op.implementations).unsupported for op in OPS)


@pytest.mark.parametrize(
    ("unsupported", "call"),
    [
        (RMS_NORM, lambda x: (rms_norm.PLAIN_VARIANTS[0], x, None, 1e-6)),
        (RMS_NORM, lambda x: (rms_norm.GATED_VARIANTS[0], x.float(), None, 1e-6, x[1:])),
        (ROPE, lambda x: ([x[None]], x[None], x[None], rope.VARIANTS[0])),
        (SWIGLU, lambda x: (x,)),
        (SWIGLU, lambda x: (x.float(), x[1:].float())),
    ],
)
def test_a_reason_is_the_same_for_every_length(unsupported: Callable[..., Any], call: Callable[..., Any]) -> None:
    """Reasons are counted: one for each length of a training would be many."""
    reasons = {unsupported(*call(torch.ones(length, 6, dtype=torch.float64))) for length in (3, 4)}
    assert len(reasons) == 1 and None not in reasons
