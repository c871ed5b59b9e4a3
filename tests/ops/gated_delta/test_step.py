"""One token of the gated delta rule, as a layer hands it over: q, k and v split from one tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npu_patch import simulator
from npu_patch.ops.gated_delta.calls import RuleCall
from npu_patch.ops.gated_delta.rule import gated_delta_rule
from tests.ops.gated_delta.test_rule import recurrence
from tests.support.gradients import relative_error
from tests.support.parity import NEAR, RATIO


def split(batch: int, key_heads: int, heads: int, width: int, value_width: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, g, beta and the state before."""
    generator = torch.Generator().manual_seed(batch)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    mixed = rand(batch, 1, 2 * key_heads * width + heads * value_width).to(dtype)
    parts = mixed.split((key_heads * width, key_heads * width, heads * value_width), -1)
    q, k, v = (part.reshape(batch, 1, -1, w) for part, w in zip(parts, (width, width, value_width), strict=True))
    beta = torch.rand(batch, 1, heads, generator=generator).to(dtype)
    return [q, k, v, -rand(batch, 1, heads).abs(), beta, rand(batch, heads, width, value_width)]


def moved(arguments: list[Tensor], device: torch.device) -> list[Tensor]:
    """To the device, as parts of one tensor still."""
    q, k, v, *others = arguments
    batch = len(q)
    whole = torch.cat([x.reshape(batch, 1, -1) for x in (q, k, v)], -1).to(device)
    parts = whole.split([x[0].numel() for x in (q, k, v)], -1)
    q, k, v = (part.reshape(x.shape) for part, x in zip(parts, (q, k, v), strict=True))
    return [q, k, v, *(x.to(device) for x in others)]


def stepped(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, norm: bool = True) -> list[Tensor]:
    return [*gated_delta_rule(RuleCall(q, k, v, g, beta, state, output_final_state=True, normalize=norm))]


SHAPES = [(1, 2, 2, 8, 8), (1, 2, 4, 8, 12), (3, 2, 2, 8, 8), (3, 1, 3, 8, 8), (3, 2, 4, 8, 12)]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", "npu:0"])
def test_a_step_is_the_recurrence_whoever_laid_its_arguments_out(
    shape: tuple[int, ...], norm: bool, device: str
) -> None:
    arguments = split(*shape, torch.float32)
    expected = recurrence(*arguments, None, norm)
    on_device = moved(arguments, torch.device(device))
    apart = [x.clone() for x in on_device]
    for given in (on_device, apart):
        for found, wanted in zip(stepped(*given, norm), expected, strict=True):
            assert relative_error(found.double().cpu(), wanted) < NEAR
    assert all(torch.equal(a, b) for a, b in zip(stepped(*on_device, norm), stepped(*apart, norm), strict=True))


def test_parts_of_one_tensor_in_another_order_are_not_taken_for_neighbours() -> None:
    q, k, v, *others = split(2, 2, 2, 8, 8, torch.float32)
    expected = recurrence(k, q, v, *others, None, True)
    assert relative_error(stepped(k, q, v, *others)[0], expected[0]) < NEAR


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_takes_ten_kernels_and_no_copies(batch: int, npu: torch.device, simulated: None) -> None:
    arguments = moved(split(batch, 2, 4, 16, 16, torch.bfloat16), npu)
    stepped(*arguments)  # what is made once
    with simulator.count() as counted:
        stepped(*arguments)
    assert counted.launches == 10 and counted.host_copies == 0, counted


def test_a_step_in_bfloat16_is_no_further_from_float64_than_transformers(npu: torch.device) -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    errors, theirs = [], []
    for batch in range(1, 5):
        q, k, v, g, beta, state = split(batch, 4, 8, 32, 24, torch.bfloat16)
        exact = recurrence(q, k, v, g, beta, state, None, True)
        original = modeling.torch_recurrent_gated_delta_rule(q, k, v, g, beta, state, True, True)
        ours = stepped(*moved([q, k, v, g, beta, state], npu))
        errors += [relative_error(found.double().cpu(), wanted) for found, wanted in zip(ours, exact, strict=True)]
        theirs += [relative_error(found.double(), wanted) for found, wanted in zip(original, exact, strict=True)]
    assert all(ours <= RATIO * their + NEAR for ours, their in zip(errors, theirs, strict=True)), (errors, theirs)


def test_a_first_step_within_inference_mode_can_be_trained_through_later(npu: torch.device) -> None:
    """What is made once for all steps belongs to no mode."""
    width = 48  # of no other test
    arguments = moved(split(1, 1, 1, width, width, torch.float32), npu)
    with torch.inference_mode():
        stepped(*arguments)
    q = arguments[0].clone().requires_grad_()
    stepped(q, *arguments[1:])[0].sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def test_a_first_step_within_a_capture_leaves_nothing_unwritten_behind(npu: torch.device, simulated: None) -> None:
    width = 80  # of no other test
    arguments = moved(split(1, 1, 1, width, width, torch.float32), npu)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        captured = stepped(*arguments)
    eager = stepped(*arguments)
    assert relative_error(eager[0].double().cpu(), recurrence(*(x.cpu() for x in arguments), None, True)[0]) < NEAR
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
