"""An op's one key, of a model's call and of the case that stands for it; and the names that tell its parts apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator

import pytest
import torch

import npu_patch
from npu_patch.applying.state import patched_sites
from npu_patch.ops.attention.cases import cases
from npu_patch.ops.attention.op import ATTENTION, SINGLE
from npu_patch.ops.experts.cases import case
from npu_patch.ops.experts.grouped_matmul import Weights
from npu_patch.ops.experts.routed import EXPERTS, Experts
from npu_patch.ops.rms_norm import RMS_NORM
from npu_patch.serving.dispatch import Dispatch
from npu_patch.serving.implementation import Choice
from npu_patch.sites.sites import LiveModules
from tests.support.tiny_models import tiny, tiny_batch

CALLED = {
    "qwen3": {"rms_norm", "rope", "swiglu", "attention"},
    "qwen3_moe": {"rms_norm", "rope", "attention", "experts"},
    "gpt_oss": {"rms_norm", "rope", "experts"},
}


@pytest.fixture(autouse=True)
def nothing_left_applied() -> Iterator[None]:
    yield
    npu_patch.restore()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", CALLED)
def test_what_a_model_calls_is_what_was_checked(family: str, dtype: torch.dtype, npu: torch.device) -> None:
    """The key of each call is that of a case, though cases are of meta tensors and of fewer heads and experts."""
    model = tiny(family).to(npu, dtype)
    report = npu_patch.apply(model, self_check=True)
    called: dict[int, set[Hashable]] = {}
    dispatches = {}
    for held in patched_sites(report):
        dispatch = held.replacement.dispatch
        if dispatch is None or not dispatch.verdicts:
            continue
        keys, of_op = called.setdefault(id(dispatch), set()), dispatch.op.key

        def noting(*call: object, keys: set[Hashable] = keys, of_op: object = of_op) -> Hashable:
            keys.add(of_op(*call))
            return of_op(*call)

        dispatch.op, dispatch.wrong = dataclasses.replace(dispatch.op, key=noting), {("nobody", None): ""}
        dispatches[id(dispatch)] = dispatch
    model(**{name: tensor.to(npu) for name, tensor in tiny_batch().items()})
    ops = {dispatches[each].op.name for each, keys in called.items() if keys}
    assert ops >= CALLED[family]
    for each, keys in called.items():
        assert keys <= dispatches[each].verdicts.keys(), dispatches[each].op.name


@pytest.mark.parametrize("inner", [16, 4096, 14336, 10_000_000])
def test_large_experts_are_what_their_narrower_case_is(inner: int) -> None:
    def weights(wide: int, narrow: int) -> Weights:
        return Weights((torch.empty(8, wide, narrow, dtype=torch.bfloat16, device="meta"),), transposed=False)

    experts = Experts((weights(4096, 2 * inner),), weights(inner, 4096))
    tokens, router_weights = torch.empty(5, 4096, device="meta"), torch.empty(5, 2, device="meta")
    indices = torch.empty(5, 2, dtype=torch.int64, device="meta")
    its_case = case(experts)
    assert its_case.key() == EXPERTS.key(tokens, indices, router_weights, experts)
    assert max(torch.Size(shape).numel() for shape, _ in its_case.inputs(5)) <= 3 * max(2**22, 2 * 16 * 4096)


@pytest.mark.parametrize(("dtype", "single"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_a_case_that_is_served_as_another_does_not_take_its_place(
    dtype: torch.dtype, single: bool, npu: torch.device
) -> None:
    """In float32 the inference operator serves no single query: those are full attention, which is checked as such."""
    dispatch = Dispatch(
        ATTENTION, Choice(ATTENTION.implementations[0], {}), lambda live: cases(4, 2, 16, 16, dtype, False)
    )
    undecided = dispatch.undecided(LiveModules(torch.nn.Linear(1, 1)), checked=True)
    names = {key[0]: each.name for key, each in undecided.items()}
    assert names["full"].startswith("full, ") and (SINGLE in names) == single


@pytest.mark.parametrize("what", ["implementations", "variants"])
def test_two_of_one_name_are_an_error_that_names_them(what: str) -> None:
    first = getattr(RMS_NORM, what)[0]
    with pytest.raises(ValueError, match=f"op 'rms_norm': two {what} are called '{first.name}'"):
        dataclasses.replace(RMS_NORM, **{what: (first, first)})
