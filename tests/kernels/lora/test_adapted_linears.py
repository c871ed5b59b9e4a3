"""Adapted linears in the interpreter, against float64 and against what peft computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from npu_patch.kernels.lora.adapted_linears import Group, adapted_linears
from npu_patch.kernels.lora.seed import drawn_seed
from tests.kernels.exactness import ONE_MACHINE, assert_exact, normal
from tests.kernels.lora.mask_kernel import mask

pytestmark = pytest.mark.usefixtures("machine")
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
SEED = 7


@dataclass(frozen=True)
class Setting:
    """Of a group: the shape of x, the widths of the outputs, the rank, and the dtypes of x and of the adapters."""

    shape: tuple[int, ...]
    outs: tuple[int, ...]
    rank: int
    dropout: float = 0.0
    dtype: torch.dtype = BFLOAT16
    adapter: torch.dtype = FLOAT32
    scaling: float = 0.75

    @property
    def width(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return torch.Size(self.shape[:-1]).numel()


SETTINGS = [
    Setting((2, 35, 200), (150,), 8, 0.1),
    Setting((70, 136), (72, 40, 40), 16, 0.1),
    Setting((33, 200), (150, 150), 4, 0.0, FLOAT32),
    Setting((2, 20, 144), (40, 24), 64, 0.1, FLOAT32),
    Setting((40, 200), (130, 72), 8, 0.1, FLOAT16),
    Setting((35, 136), (72, 40, 8), 8, 0.1, BFLOAT16, BFLOAT16),
    Setting((1, 50), (30,), 16, 0.0, BFLOAT16, BFLOAT16),
    Setting((3, 5, 40), (24, 30, 140), 20, 0.5),
    Setting((300, 40), (24, 30), 4, 0.1),  # of which every sum is of several
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_outputs_and_gradients(setting: Setting) -> None:
    assert_exact(ours(setting), peft(setting), inputs_of(setting))


@ONE_MACHINE
@pytest.mark.parametrize(
    "needed",
    ["x", "down", "up", "x down", "x up", "down up", "weight", "bias", "x weight bias down up"],
)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_asked_for(needed: str, dropout: float) -> None:
    setting = Setting((20, 40), (24, 30), 4, dropout)
    names = ["x", *["weight", "bias", "down", "up"] * len(setting.outs)]
    assert_exact(ours(setting), peft(setting), inputs_of(setting), [name in needed.split() for name in names])


@ONE_MACHINE
def test_gradients_of_one_layer() -> None:
    setting = Setting((20, 40), (24, 30), 4, 0.1)
    needed = [False] * 5 + [False, False, True, True]
    assert_exact(ours(setting), peft(setting), inputs_of(setting), needed)


@ONE_MACHINE
def test_layers_whose_outputs_nothing_uses_get_no_gradient() -> None:
    setting = Setting((20, 40), (24, 30), 4, 0.1, FLOAT32)
    x, *tensors = (tensor.requires_grad_() for tensor in inputs_of(setting))
    found = torch.autograd.grad(ours(setting)(x, *tensors)[1].sum(), [x, *tensors], allow_unused=True)
    expected = torch.autograd.grad(peft(setting)(x, *tensors)[1].sum(), [x, *tensors], allow_unused=True)
    for got, wanted in zip(found, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted)


@ONE_MACHINE
def test_autocast_input() -> None:
    """x in float32, products in bfloat16: its gradient is float32, as its parts are summed."""
    setting = Setting((40, 100), (70, 30), 8, 0.1)
    x, *tensors = inputs_of(setting)
    x = normal(*setting.shape)

    def original(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=BFLOAT16, enabled=x.dtype != torch.float64):
            return peft(setting)(x, *tensors)

    wide = [tensor.float() for tensor in tensors]
    leaves = [each.clone().requires_grad_() for each in (x, *tensors)]
    theirs = [each.clone().requires_grad_() for each in (x, *wide)]
    exact = [each.double().requires_grad_() for each in (x, *tensors)]
    results = []
    for function, given in ((ours(setting), leaves), (original, theirs), (original, exact)):
        ys = function(*given)
        gradients = torch.autograd.grad(ys, [given[0], *given[3::4], *given[4::4]], [torch.ones_like(y) for y in ys])
        results.append([*ys, *gradients])
    for got, other, true in zip(*results, strict=True):
        assert far(got, true) <= 1e-6 + 1.1 * far(other, true)
    assert results[0][2].dtype == FLOAT32


@ONE_MACHINE
def test_rows_that_lie_apart_and_gradients_that_repeat() -> None:
    setting = Setting((20, 40), (24,), 4, 0.1, FLOAT32)
    both, *tensors = inputs_of(setting)
    both = torch.cat((both, both), -1).requires_grad_()
    (found,) = torch.autograd.grad(ours(setting)(both[:, :40], *tensors)[0].sum(), both)
    (expected,) = torch.autograd.grad(peft(setting)(both[:, :40], *tensors)[0].sum(), both)
    torch.testing.assert_close(found, expected)


@ONE_MACHINE
def test_x_is_kept_once_and_no_mask() -> None:
    setting = Setting((64, 200), (150, 100, 100), 8, 0.1)
    x, *tensors = inputs_of(setting)
    given = [x.requires_grad_(), *(each.requires_grad_(index % 4 > 1) for index, each in enumerate(tensors))]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ours(setting)(*given)
    pointers = {each.data_ptr() for each in given}
    assert sum(each.data_ptr() == x.data_ptr() for each in kept) == 1
    others = [each for each in kept if each.data_ptr() not in pointers]
    assert sum(each.numel() for each in others) == 3 * 64 * 8, [each.shape for each in others]


@ONE_MACHINE
def test_a_checkpoint_drops_the_same_again() -> None:
    setting = Setting((20, 40), (24, 30), 4, 0.5, FLOAT32)
    inputs = [tensor.requires_grad_() for tensor in inputs_of(setting)]
    function = group_of(setting)

    def gradients(call: Callable[..., tuple[Tensor, ...]]) -> Sequence[Tensor]:
        torch.manual_seed(SEED)
        return torch.autograd.grad(sum(y.square().sum() for y in call()), inputs)

    once = gradients(lambda: function(*inputs))
    again = gradients(lambda: checkpoint(function, *inputs, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


@ONE_MACHINE
def test_the_same_bits_without_gradients() -> None:
    setting = Setting((20, 40), (24, 30), 4, 0.1)
    inputs = inputs_of(setting)
    with torch.no_grad():
        frozen = ours(setting)(*inputs)
    trained = ours(setting)(*(each.requires_grad_() for each in inputs))
    assert all(torch.equal(one, other) for one, other in zip(frozen, trained, strict=True))


def ours(setting: Setting) -> Callable[..., tuple[Tensor, ...]]:
    def seeded(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(SEED)
        return group_of(setting)(x, *tensors)

    return seeded


def group_of(setting: Setting) -> Callable[..., tuple[Tensor, ...]]:
    group = Group(setting.scaling, setting.dropout, setting.dtype)
    return lambda x, *tensors: adapted_linears(x, list(zip(*[iter(tensors)] * 4, strict=True)), group)


def peft(setting: Setting) -> Callable[..., tuple[Tensor, ...]]:
    """As `peft.tuners.lora.Linear` computes each, with the masks that ours has."""
    torch.manual_seed(SEED)
    seed = drawn_seed(torch.device("cpu"))

    def layers(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = []
        for index, (weight, bias, down, up) in enumerate(zip(*[iter(tensors)] * 4, strict=True)):
            y = F.linear(x, weight, bias)
            dropped = x.to(down.dtype)
            if setting.dropout:
                kept = mask(seed, index, setting.rows, setting.width, setting.dropout)
                dropped = torch.where(kept.view(x.shape), dropped, 0.0) / (1 - setting.dropout)
            results.append((y + F.linear(F.linear(dropped, down), up) * setting.scaling).to(y.dtype))
        return tuple(results)

    return layers


def inputs_of(setting: Setting) -> list[Tensor]:
    tensors = [normal(*setting.shape, dtype=setting.dtype)]
    for index, out in enumerate(setting.outs):
        seed = 10 * index
        tensors += [
            (normal(out, setting.width, seed=seed + 2) / setting.width**0.5).to(setting.dtype),
            normal(out, seed=seed + 3).to(setting.dtype),
            (normal(setting.rank, setting.width, seed=seed + 4) / setting.width**0.5).to(setting.adapter),
            (normal(out, setting.rank, seed=seed + 5) / setting.rank**0.5).to(setting.adapter),
        ]
    return tensors


def far(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())
