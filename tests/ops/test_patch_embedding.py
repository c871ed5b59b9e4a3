"""Patches as a product beside the convolution that they are: results, gradients, what is declined, what is timed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_patch import simulator
from npu_patch.commands.replay.bars import Error, why_not
from npu_patch.measuring import measure
from npu_patch.measuring.measured_on import MeasuredOn
from npu_patch.measuring.measurements import Measurements
from npu_patch.measuring.measurer import Measurer
from npu_patch.ops.patch_embedding import PATCH_EMBEDDING, cases, convolution
from npu_patch.serving.implementation import Choice, Implementation
from tests.support.gradients import relative_error
from tests.support.made_up_clock import made_up

(PRODUCT,) = PATCH_EMBEDDING.implementations
INPUTS = {  # by name: the input's and the weight's shapes
    "one patch each": ((7, 3, 2, 5, 6), (8, 3, 2, 5, 6)),
    "a frame each": ((7, 3, 5, 6), (8, 3, 5, 6)),
    "a patch and a rest": ((7, 3, 6, 8), (8, 3, 5, 6)),
    "images": ((2, 3, 15, 12), (8, 3, 5, 6)),
    "images with a rest": ((2, 3, 19, 17), (8, 3, 5, 6)),
    "one row": ((2, 3, 5, 12), (8, 3, 5, 6)),
    "one channel": ((2, 1, 4, 9), (8, 1, 2, 3)),
    "videos": ((2, 3, 4, 15, 12), (8, 3, 2, 5, 6)),
    "videos with a rest": ((2, 3, 5, 16, 13), (8, 3, 2, 5, 6)),
}


def tensors(name: str, dtype: torch.dtype, biased: bool = True) -> list[Tensor]:
    shape, weight = INPUTS[name]
    generator = torch.Generator().manual_seed(3)
    shapes = [shape, weight, *([weight[:1]] if biased else [])]
    return [torch.randn(each, generator=generator).to(dtype) for each in shapes]


def results(function: Any, given: list[Tensor], device: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output and the gradient of each tensor, in float64 on the CPU."""
    leaves = [each.to(device, dtype).requires_grad_() for each in given]
    out = function(*leaves, *([None] if len(leaves) == 2 else []))
    seeds = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(given[0].dtype)
    found = [out, *torch.autograd.grad(out, leaves, seeds.to(out))]
    return [each.detach().cpu().double() for each in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", INPUTS)
def test_the_product_and_its_gradients_are_the_convolutions(
    name: str, biased: bool, dtype: torch.dtype, npu: torch.device
) -> None:
    given = tensors(name, dtype, biased)
    assert PRODUCT.unsupported(*given, *([] if biased else [None])) is None
    exact = results(convolution, given, "cpu", torch.float64)
    own, found = (results(function, given, npu) for function in (convolution, PRODUCT.run))
    errors = [
        Error(str(index), relative_error(mine, true), relative_error(its, true))
        for index, (mine, its, true) in enumerate(zip(found, own, exact, strict=True))
    ]
    assert why_not(errors, dtype) is None


@pytest.mark.parametrize("layout", ["channels last", "transposed", "every other", "expanded"])
def test_inputs_that_are_not_contiguous(layout: str, npu: torch.device) -> None:
    x, weight, bias = (each.to(npu) for each in tensors("images", torch.float32))
    strided = {
        "channels last": lambda: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "transposed": lambda: x.mT.contiguous().mT,
        "every other": lambda: x.repeat_interleave(2, -1)[..., ::2],
        "expanded": lambda: x[:1].expand_as(x),
    }[layout]()
    assert not strided.is_contiguous()
    assert torch.equal(PRODUCT.run(strided, weight, bias), PRODUCT.run(strided.contiguous(), weight, bias))


@pytest.mark.parametrize("name", INPUTS)
def test_the_result_lies_in_memory_as_the_convolutions_does(name: str, npu: torch.device) -> None:
    """Models take views of it."""
    given = [each.to(npu) for each in tensors(name, torch.float32)]
    out, expected = PRODUCT.run(*given), convolution(*given)
    assert out.shape == expected.shape and out.is_contiguous()
    assert torch.equal(out.view(-1), out.reshape(-1))


@pytest.mark.parametrize("name", ["one patch each", "images"])
@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (1, 2), (0, 1, 2)], ids=str)
def test_only_the_gradients_that_are_asked_for_cost_a_product(
    asked: tuple[int, ...], name: str, simulated: None, npu: torch.device
) -> None:
    given = [each.to(npu).requires_grad_(index in asked) for index, each in enumerate(tensors(name, torch.float32))]
    out = PRODUCT.run(*given)
    with simulator.count() as counted:
        out.backward(torch.ones_like(out))
    assert [index for index, each in enumerate(given) if each.grad is not None] == list(asked)
    assert counted.by_op.get("aten::mm", (0, 0))[0] == len({0, 1} & set(asked))


@pytest.mark.parametrize("name", ["one patch each", "images"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_are_the_same_with_gradients_and_without(name: str, dtype: torch.dtype, npu: torch.device) -> None:
    given = [each.to(npu) for each in tensors(name, dtype)]
    watched = PRODUCT.run(*(each.clone().requires_grad_() for each in given))
    with torch.no_grad():
        assert torch.equal(PRODUCT.run(*given), watched)
    with torch.inference_mode():
        assert torch.equal(PRODUCT.run(*given), watched)


def test_of_one_patch_each_the_backward_keeps_the_input_and_the_weight_themselves(npu: torch.device) -> None:
    given = [each.to(npu).requires_grad_() for each in tensors("one patch each", torch.float32)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        PRODUCT.run(*given)
    storages = {each.untyped_storage().data_ptr() for each in kept}
    assert storages == {each.untyped_storage().data_ptr() for each in given[:2]}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda x, w, b: (x.half(), w, b), "input, weight and bias of torch.float16"),
        (lambda x, w, b: (x, w, b.bfloat16()), "torch.bfloat16"),
        (lambda x, w, b: (x.double(), w.double(), b.double()), "torch.float64"),
        (lambda x, w, b: (x.to("meta"), w, b), "on meta"),
        (lambda x, w, b: (x[0], w, b), "an input of 3 dimensions"),
        (lambda x, w, b: (x[:0], w, b), "0 elements"),
        (lambda x, w, b: (x[..., :5], w, b), "no whole patch"),
        (lambda x, w, b: (x[:, :2], w, b), "no whole patch: 2 channels"),
        (lambda x, w, b: (x, w.to(memory_format=torch.channels_last), b), "a weight that is not contiguous"),
        (lambda x, w, b: (x.as_subclass(Odd), w, b), "tensor subclass"),
    ],
)
def test_what_is_declined(changed: Any, words: str) -> None:
    reason = PRODUCT.unsupported(*changed(*tensors("images", torch.float32)))
    assert reason is not None and words in reason


class Odd(Tensor):
    """Somebody's tensors."""


SHAPES = {"Qwen2-VL": (16, 3, 2, 4, 4), "SigLIP": (16, 3, 4, 4)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("npu_patch.ops.patch_embedding.TIMED_APART", 12)
    monkeypatch.setattr("npu_patch.ops.patch_embedding.PATCHES", 12)
    yield


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_ways_pass_every_case(name: str, dtype: torch.dtype, small: None) -> None:
    for case in cases(SHAPES[name], True, dtype):
        for each in (case.original, measure.Alternative(PRODUCT.name, PRODUCT.run, PRODUCT.unsupported)):
            found = measure.check(case, each, torch.device("cpu"))
            assert found.wrong is None, case.name


@pytest.mark.parametrize("name", SHAPES)
def test_a_case_has_the_key_of_the_calls_that_it_stands_for(name: str) -> None:
    shape = SHAPES[name]
    apart, images = (case.key() for case in cases(shape, True, torch.float32))
    weight, bias = torch.empty(shape), torch.empty(shape[:1])
    assert apart == PATCH_EMBEDDING.key(torch.empty(9, *shape[1:]), weight, bias)
    sizes = [3 * width for width in shape[2:]]
    assert images == PATCH_EMBEDDING.key(torch.empty(1, shape[1], *sizes), weight, bias)
    assert apart != images


def test_a_case_is_timed_at_some_images_of_full_size() -> None:
    for case in cases((1280, 3, 2, 14, 14), False, torch.bfloat16):
        (shape, _), *_ = case.inputs(measure._timed_tokens(case))
        patches = math.prod(shape) / (3 * 2 * 14 * 14)
        assert patches == 4096


@pytest.mark.parametrize(("product_ms", "taken"), [(1.0, True), (3.0, False), (2.0, False)])
def test_it_is_taken_where_the_clock_says_that_it_is_faster_than_the_convolution(
    product_ms: float, taken: bool, small: None, tmp_path: Path
) -> None:
    ran: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def run(*call: Any) -> Tensor:
            ran.append(name)
            return function(*call)

        return run

    product = replace(PRODUCT, run=noted("product", PRODUCT.run))
    original = noted("convolution", convolution)
    times = {"product": product_ms * 1e-3, "convolution": 2e-3}
    stopwatch = lambda function: function() or times[ran[-1]]  # noqa: E731
    kept = Measurements.read(tmp_path / "times.json", MeasuredOn("made up", {}))
    of_cpu = Measurer(torch.device("cpu"), kept, made_up(stopwatch))
    for case in cases(SHAPES["Qwen2-VL"], False, torch.float32):
        case = replace(case, original=replace(case.original, run=original))
        verdict = of_cpu.judge(case, Choice(None, {}, (product,)))
        assert (verdict.taken is product) is taken
        assert verdict.words(product.name) == f"{product_ms:.3g} ms against 2 ms"


def test_one_that_is_wrong_is_never_taken(small: None, tmp_path: Path) -> None:
    wrong: Implementation = replace(PRODUCT, run=lambda *call: PRODUCT.run(*call) * 1.01)
    kept = Measurements.read(tmp_path / "times.json", MeasuredOn("made up", {}))
    of_cpu = Measurer(torch.device("cpu"), kept, made_up(lambda form: 1.0))
    for case in cases(SHAPES["SigLIP"], True, torch.float32):
        verdict = of_cpu.judge(case, Choice(None, {}, (wrong,)))
        assert verdict.taken is None and "of its size off" in verdict.words(wrong.name)
