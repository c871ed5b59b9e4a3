"""The sines that all layers of a step are given: what is made of them once, and when it is let go of."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers.models.qwen3 import modeling_qwen3

import npu_patch
from npu_patch import simulator
from npu_patch.numerics.rotation import HALF, INTERLEAVE
from npu_patch.ops.rope_tables import sines_back


def tables(device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.linspace(0, 3, 2 * 8 * 16).view(2, 8, 16)
    return angles.cos().to(device), angles.sin().to(device)


def backward_launches(layers: int, npu: torch.device) -> int:
    cos, sin = tables(npu)
    q = torch.randn(2, 8, 4, 16, device=npu, requires_grad=True)
    rotated = q.transpose(1, 2)
    with npu_patch.applied(device="npu"):
        for _ in range(layers):
            rotated, _ = modeling_qwen3.apply_rotary_pos_emb(rotated, rotated, cos, sin)
        with simulator.count() as counted:
            rotated.backward(torch.ones_like(rotated))
    return counted.launches


def test_the_way_back_is_made_by_the_first_layer_alone(npu: torch.device) -> None:
    """A layer more is one rotation more, of a k that nothing is asked of."""
    one, two, three = (backward_launches(layers, npu) for layers in (1, 2, 3))
    assert three - two == two - one == 1
    assert one > 1


@pytest.mark.parametrize("pairing", [HALF, INTERLEAVE])
def test_what_is_written_to_is_turned_anew(pairing: str) -> None:
    _, sin = tables()
    first = sines_back(sin, pairing)
    assert sines_back(sin, pairing) is first
    sin.mul_(2)
    assert torch.equal(sines_back(sin, pairing), first * 2)


def test_each_pairing_and_each_part_of_a_table_has_its_own() -> None:
    _, sin = tables()
    assert not torch.equal(sines_back(sin, HALF), sines_back(sin, INTERLEAVE))
    for part in (sin[:1], sin[1:], sin[:, :4], sin.unsqueeze(1), sin.transpose(0, 1)):
        found = sines_back(part, HALF)
        assert torch.equal(found, -part.roll(8, -1)) and found is sines_back(part, HALF)


def test_they_go_with_what_they_were_made_of() -> None:
    _, sin = tables()
    made = weakref.ref(sines_back(sin.unsqueeze(1), HALF))
    assert made() is not None
    del sin
    gc.collect()
    assert made() is None


@pytest.mark.parametrize("trained", [0, 1])
def test_tables_that_are_trained_get_their_gradients_each_time(trained: int, npu: torch.device) -> None:
    given = [each.requires_grad_() if place == trained else each for place, each in enumerate(tables(npu))]
    x = torch.randn(2, 4, 8, 16, device=npu)
    found = []
    for function in ("original", "patched", "patched"):
        with npu_patch.applied(device="npu", rope=function == "patched"):
            y, _ = modeling_qwen3.apply_rotary_pos_emb(x, x, *given)
        found.append(torch.autograd.grad(y.square().sum(), given[trained])[0])
    for again in found[1:]:
        torch.testing.assert_close(again, found[0])
