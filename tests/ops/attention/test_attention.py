"""The attention patch on single calls: every kind of mask, forward and backward, against attention by definition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_patch
from npu_patch import Report, simulator
from npu_patch.waiting.masks import PatternMask
from tests.support.attention_cases import BOUNDS, SCALE, Case, errors, exact, leaves

CASES = {
    "causal": Case(),
    "left padding": Case(padding=(3, 0)),
    "right padding": Case(padding=(0, 4), side="right"),
    "no padding": Case(padding=(0, 0)),
    "packed": Case(batch=1, lengths=((4, 1, 6),)),
    "packed rows": Case(lengths=((4, 7), (11,))),
    "window": Case(window=4),
    "window, no padding": Case(window=4, padding=(0, 0)),
    "window, padded": Case(window=4, padding=(2, 0)),
    "window as long as the keys": Case(window=11),
    "packed window": Case(batch=1, window=3, lengths=((5, 6),)),
    "bidirectional": Case(causal=False),
    "bidirectional, padded": Case(causal=False, padding=(0, 5), side="right"),
    "bidirectional window": Case(causal=False, window=2),
    "after a cache": Case(queries=5, past=6),
    "after a cache, windowed": Case(queries=5, past=6, window=7),
    "one query": Case(queries=1, past=9),
    "one query, padded": Case(queries=1, past=9, padding=(4, 0)),
    "1 key head for 8": Case(heads=8, key_heads=1),
    "as many key heads": Case(heads=4, key_heads=4),
    "4 query heads a key head": Case(heads=8, key_heads=2),
    **{f"heads of {dim}": Case(head_dim=dim) for dim in (64, 80, 96, 128, 256)},
    "narrower values": Case(head_dim=24, value_dim=16),
}
NO_WHOLE_MASK = {"packed", "packed rows", "window", "window, no padding", "packed window", "bidirectional window"}
NO_WHOLE_MASK |= {"after a cache", "after a cache, windowed"}


@pytest.fixture
def report() -> Iterator[Report]:
    with npu_patch.applied(device="npu", rms_norm=False, rope=False, swiglu=False) as applied:
        yield applied


def outcome(report: Report, site: str) -> Any:
    return next(o for o in report if o.site == site)


def attend(
    case: Case, mask: Any, tensors: list[Tensor], name: str = "sdpa", scaling: float = SCALE, **keywords: Any
) -> Tensor:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    out, weights = ALL_ATTENTION_FUNCTIONS[name](
        case.module(), *tensors, attention_mask=mask, scaling=scaling, **keywords
    )
    assert weights is None and out.is_contiguous()
    return out


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "implementation, dtype", [("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("npu", torch.float32)], ids=str
)
def test_attention_by_definition(
    implementation: str, name: str, dtype: torch.dtype, report: Report, npu: torch.device
) -> None:
    case = CASES[name]
    given = case.tensors(dtype)
    inputs, expected_inputs = leaves(given, npu), leaves(given, "cpu", torch.float64)
    mask = case.mask(implementation, npu)
    out = attend(case, mask, inputs, implementation)
    seen = case.seen()
    expected = exact(*expected_inputs, seen)
    assert max(errors(out, inputs, expected, expected_inputs, seen.any(-1, keepdim=True))) < BOUNDS[dtype]
    calls = outcome(report, f"AttentionInterface['{implementation}']").calls
    assert calls.ran == 1 and not calls.fell_through
    assert isinstance(mask, PatternMask) == (name in NO_WHOLE_MASK)


@pytest.mark.parametrize("name", sorted(NO_WHOLE_MASK))
def test_no_mask_is_written_out(name: str, report: Report, npu: torch.device) -> None:
    case = CASES[name]
    mask = case.mask("sdpa", npu)
    inputs = leaves(case.tensors(), npu)
    attend(case, mask, inputs).sum().backward()
    assert mask._built is None


@pytest.mark.parametrize("queries, keys", [(5, 9), (9, 5), (7, 7)])
@pytest.mark.parametrize("causal", [True, False])
def test_without_a_mask_causality_is_aligned_as_torch_aligns_it(
    queries: int, keys: int, causal: bool, report: Report, npu: torch.device
) -> None:
    case = Case(queries=queries, past=keys - queries, causal=causal)
    given = case.tensors()
    inputs, expected_inputs = leaves(given, npu), leaves(given, "cpu", torch.float64)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    seen = (seen.tril() if causal else seen).expand(2, 1, -1, -1)
    out = attend(case, None, inputs)
    expected = exact(*expected_inputs, seen)
    assert max(errors(out, inputs, expected, expected_inputs)) < 2e-6
    assert outcome(report, "AttentionInterface['sdpa']").calls.ran == 1


def test_the_module_says_whether_it_is_causal_unless_the_caller_does(report: Report, npu: torch.device) -> None:
    given = Case().tensors()
    inputs = [tensor.to(npu) for tensor in given]
    causal, full = (exact(*given, case.seen()) for case in (Case(), Case(causal=False)))
    for module_is_causal, keywords, expected in (
        (True, {}, causal),
        (False, {}, full),
        (False, {"is_causal": True}, causal),
        (True, {"is_causal": False}, full),
    ):
        torch.testing.assert_close(attend(Case(causal=module_is_causal), None, inputs, **keywords).cpu(), expected)


def test_cross_attention(report: Report, npu: torch.device) -> None:
    case = Case(queries=4, past=5, causal=False, padding=(0, 3), side="right")
    given = case.tensors()
    inputs, expected_inputs = leaves(given, npu), leaves(given, "cpu", torch.float64)
    out = attend(case, case.seen().to(npu), inputs)
    assert max(errors(out, inputs, exact(*expected_inputs, case.seen()), expected_inputs)) < 2e-6
    assert outcome(report, "AttentionInterface['sdpa']").calls.ran == 1


MASK_SHAPES = [(2, 6, 7, 9), (2, 1, 7, 9), (1, 1, 7, 9), (1, 6, 7, 9), (7, 9), (2, 1, 1, 9), (1, 1, 1, 9)]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_bool_masks_of_every_shape(shape: tuple[int, ...], report: Report, npu: torch.device) -> None:
    case = Case(queries=7, past=2)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[..., 0] = True
    given = case.tensors()
    out = attend(case, mask.to(npu), [tensor.to(npu) for tensor in given])
    torch.testing.assert_close(out.cpu(), exact(*given, mask.expand(2, 6, 7, 9)))
    assert outcome(report, "AttentionInterface['sdpa']").calls.ran == 1


def test_rows_that_see_nothing_give_zeros_as_torch_does(report: Report, npu: torch.device) -> None:
    mask = torch.ones(2, 1, 11, 11, dtype=torch.bool).tril()
    mask[0, :, 3] = False
    given = Case().tensors()
    inputs, on_cpu = leaves(given, npu), leaves(given, "cpu")
    out, expected = attend(Case(), mask.to(npu), inputs), attend(Case(), mask, on_cpu)
    assert expected[0, 3].abs().max() == 0.0 and out[0, 3].abs().max() == 0.0
    assert max(errors(out, inputs, expected, on_cpu)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 6, 11, 11), (1, 6, 11, 11), (2, 1, 11, 11), (1, 6, 1, 11)], ids=str)
def test_additive_masks_are_added(
    shape: tuple[int, ...], dtype: torch.dtype, report: Report, npu: torch.device
) -> None:
    """transformers on an NPU takes every element but 0 for "hidden"."""
    generator = torch.Generator().manual_seed(4)
    bias = torch.randn(shape, generator=generator).to(dtype)
    bias[..., -2] = float("-inf")
    bias[..., -3] = torch.finfo(dtype).min
    given = [*Case().tensors(dtype), bias]
    inputs, expected_inputs = leaves(given, npu), leaves(given, "cpu", torch.float64)
    out = attend(Case(), inputs[3], inputs[:3])
    expected = exact(*expected_inputs[:3], torch.ones(1, 1, 1, 11, dtype=torch.bool), expected_inputs[3])
    assert max(errors(out, inputs, expected, expected_inputs)) < BOUNDS[dtype]
    calls = outcome(report, "AttentionInterface['sdpa']").calls
    assert calls.ran == 1 and not calls.fell_through


def test_an_additive_mask_that_the_operator_would_round_is_computed_exactly(report: Report, npu: torch.device) -> None:
    bias = torch.linspace(100.0, 103.0, 121).reshape(1, 1, 11, 11)  # bfloat16 has steps of 0.5 there
    given = Case().tensors(torch.bfloat16)
    out = attend(Case(), bias.to(npu), [tensor.to(npu) for tensor in given])
    expected = exact(*(t.double() for t in given), torch.ones(1, 1, 1, 11, dtype=torch.bool), bias.double())
    torch.testing.assert_close(out.cpu().double(), expected, rtol=2.0**-8, atol=2.0**-8)
    (reason,) = outcome(report, "AttentionInterface['sdpa']").calls.fell_through
    assert "torch.float32" in reason and "round" in reason


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "causal", "causal, more keys"])
def test_position_bias(kind: str, report: Report, npu: torch.device) -> None:
    causal = kind.startswith("causal")
    case = Case(causal=causal, queries=7, past=4 if kind == "causal, more keys" else 0)
    bias = torch.randn(1, 6, case.queries, case.keys, generator=torch.Generator().manual_seed(5))
    mask, seen = None, torch.ones(1, 1, case.queries, case.keys, dtype=torch.bool)
    if kind == "bool":
        mask = seen = Case(queries=7, padding=(2, 0)).seen()
    if kind == "additive":
        mask = torch.randn(2, 1, 7, 7, generator=torch.Generator().manual_seed(6))
    if causal:
        seen = seen.tril()  # aligned to the top left
    given = [*case.tensors(), bias]
    inputs, expected_inputs = leaves(given, npu), leaves(given, "cpu", torch.float64)
    out = attend(case, None if mask is None else mask.to(npu), inputs[:3], position_bias=inputs[3])
    total = expected_inputs[3] + mask.double() if kind == "additive" else expected_inputs[3]
    expected = exact(*expected_inputs[:3], seen, total)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)  # rows that see nothing included
    assert max(errors(out, inputs, expected, expected_inputs, seen.any(-1, keepdim=True))) < 2e-6
    assert outcome(report, "AttentionInterface['sdpa']").calls.ran == 1


@pytest.mark.parametrize("name", ["causal", "left padding", "packed", "window"])
def test_sinks(name: str, report: Report, npu: torch.device) -> None:
    case = CASES[name]
    given = [*case.tensors(), torch.linspace(-1.0, 2.0, 6)]
    inputs, expected_inputs = leaves(given, npu), leaves(given, "cpu", torch.float64)
    out = attend(case, case.mask("npu", npu), inputs[:3], "npu", s_aux=inputs[3])
    seen = case.seen()
    expected = exact(*expected_inputs[:3], seen, sinks=expected_inputs[3])
    assert max(errors(out, inputs, expected, expected_inputs, seen.any(-1, keepdim=True))) < 2e-6
    assert outcome(report, "AttentionInterface['npu']").calls.ran == 1


@pytest.mark.parametrize("name", ["causal", "left padding", "packed", "window", "after a cache"])
@pytest.mark.parametrize("unserved", ["on the CPU", "odd heads"])
def test_sinks_are_kept_where_the_operator_does_not_serve(
    unserved: str, name: str, report: Report, npu: torch.device
) -> None:
    """transformers' sdpa, which the name stands for, would leave them out."""
    device = "cpu" if unserved == "on the CPU" else npu
    case = replace(CASES[name], head_dim=18)  # float32: the operator takes multiples of 4
    given = [*case.tensors(), torch.linspace(-1.0, 2.0, 6)]
    inputs, expected_inputs = leaves(given, device), leaves(given, "cpu", torch.float64)
    out = attend(case, case.mask("npu", device), inputs[:3], "npu", s_aux=inputs[3])
    seen = case.seen()
    expected = exact(*expected_inputs[:3], seen, sinks=expected_inputs[3])
    assert max(errors(out, inputs, expected, expected_inputs, seen.any(-1, keepdim=True))) < 2e-6
    calls = outcome(report, "AttentionInterface['npu']").calls
    assert calls.ran == 0 and len(calls.fell_through) == 1


def test_dropout_keeps_the_mean_and_drops_the_share(report: Report, npu: torch.device) -> None:
    torch.manual_seed(0)
    query = torch.zeros(4, 8, 64, 64, device=npu)  # every weight is 1 / 64
    value = torch.eye(64, device=npu).expand(4, 8, 64, 64)
    weights = attend(Case(causal=False), None, [query, query, value], dropout=0.25).cpu() * 64
    dropped = (weights == 0).double().mean()
    assert abs(dropped - 0.25) < 0.01
    kept = weights[weights != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.75))


def test_autocast_casts_what_torch_would_cast(report: Report, npu: torch.device) -> None:
    inputs = [tensor.to(npu) for tensor in Case().tensors()]
    with torch.autocast("npu", torch.bfloat16):
        out = attend(Case(), None, inputs)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "keywords, reason",
    [({"output_attentions": True}, "the attention weights are asked for"), ({"softcap": 3.0}, "softcap")],
    ids=["output_attentions", "softcap"],
)
def test_what_the_operator_has_not_is_left_to_the_original(
    keywords: dict[str, Any], reason: str, report: Report, npu: torch.device
) -> None:
    given = Case().tensors()
    calls = outcome(report, "AttentionInterface['sdpa']").calls
    if "softcap" in keywords:
        with pytest.raises(ValueError, match="softcap"):
            attend(Case(), None, [tensor.to(npu) for tensor in given], **keywords)
    else:
        out = attend(Case(), None, [tensor.to(npu) for tensor in given], **keywords)
        torch.testing.assert_close(out.cpu(), exact(*given, Case().seen()))
    assert calls.fell_through[reason] == 1 and not calls.ran


def test_cpu_tensors_keep_working(report: Report) -> None:
    given = CASES["window"].tensors()
    mask = CASES["window"].mask("sdpa", torch.device("cpu"))
    assert type(mask) is Tensor
    torch.testing.assert_close(attend(CASES["window"], mask, given), exact(*given, CASES["window"].seen()))
    assert outcome(report, "AttentionInterface['sdpa']").calls.fell_through["input on cpu"] == 1


def test_what_falls_through_is_given_the_whole_mask(report: Report, npu: torch.device) -> None:
    case = Case(window=4, head_dim=6)  # torch_npu keeps the operator from float32 heads that are no multiple of 4
    given, mask = case.tensors(), case.mask("sdpa", npu)
    out = attend(case, mask, [tensor.to(npu) for tensor in given])
    torch.testing.assert_close(out.cpu(), exact(*given, case.seen()))
    assert not outcome(report, "AttentionInterface['sdpa']").calls.ran
    assert mask.pattern is not None  # other layers, of other widths, are still served by it


@pytest.mark.usefixtures("simulated")
def test_one_kernel_forward_and_one_backward(report: Report, npu: torch.device) -> None:
    case = Case(batch=1, lengths=((4, 7),))
    mask = case.mask("sdpa", npu)
    stored = [tensor.transpose(1, 2).contiguous().to(npu) for tensor in case.tensors()]  # as projections store them
    inputs = [tensor.transpose(1, 2).requires_grad_(True) for tensor in stored]
    with simulator.count() as counted:
        out = attend(case, mask, inputs)
    assert {name: launches for name, (launches, _) in counted.by_op.items()} == {"npu::npu_fusion_attention": 1}
    assert counted.host_copies == 0
    gradient = torch.ones_like(out)
    with simulator.count() as counted:
        out.backward(gradient)
    assert counted.by_op["npu::npu_fusion_attention_grad"][0] == 1 and counted.host_copies == 0


def test_restore_puts_the_registries_back() -> None:
    from transformers import masking_utils
    from transformers.modeling_utils import AttentionInterface

    def entries() -> list[Any]:
        mappings = (AttentionInterface._global_mapping, masking_utils.AttentionMaskInterface._global_mapping)
        return [*(list(mapping.items()) for mapping in mappings), masking_utils.find_packed_sequence_indices]

    before = entries()
    with npu_patch.applied(device="npu"):
        assert entries() != before and "npu" in AttentionInterface._global_mapping
    assert entries() == before
