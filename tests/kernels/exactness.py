"""Compares a kernel and the original with float64: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.gradients import relative_error
from tests.support.parity import NEAR, RATIO

MANY = 500
ONE_MACHINE = pytest.mark.parametrize("machine", ["exact widths, many blocks"], indirect=True)


def in_turn(cases: Sequence[Any]) -> list[tuple[Any, torch.dtype]]:
    """Each case in one dtype: the first in float32, the second in bfloat16 and so on. The interpreter is slow."""
    return [(case, (torch.float32, torch.bfloat16)[index % 2]) for index, case in enumerate(cases)]


def assert_exact(
    ours: Callable[..., Any],
    original: Callable[..., Any],
    inputs: Sequence[Tensor],
    needed: Sequence[bool] | None = None,
    seed: int = 0,
) -> None:
    """float32 within NEAR of float64; half precision no further from it than RATIO times what `original` is.

    A few rounded numbers say little: results of under MANY elements get 3 times.

    `needed` says which inputs get a gradient, all by default; the others must get none.
    """
    needed = [True] * len(inputs) if needed is None else needed
    outputs, gradients = run(ours, inputs, needed, seed)
    exact_outputs, exact_gradients = run(original, [x.double() for x in inputs], needed, seed)
    their_outputs, their_gradients = run(original, inputs, needed, seed)
    results = zip(
        (*outputs, *gradients), (*exact_outputs, *exact_gradients), (*their_outputs, *their_gradients), strict=True
    )
    for index, (got, exact, theirs) in enumerate(results):
        assert got.shape == exact.shape, f"result {index}: shape {got.shape} instead of {exact.shape}"
        error, own = relative_error(got.double(), exact), relative_error(theirs.double(), exact)
        bar = NEAR + (0 if inputs[0].dtype == torch.float32 else (RATIO if exact.numel() >= MANY else 3) * own)
        assert error <= bar, f"result {index}: {error:.2e}, allowed {bar:.2e}"
    for x, gradient in zip([x for x, need in zip(inputs, needed, strict=True) if need], gradients, strict=True):
        assert gradient.dtype == x.dtype


def run(
    function: Callable[..., Any], inputs: Sequence[Tensor], needed: Sequence[bool], seed: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    leaves = [x.detach().clone().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients: tuple[Tensor, ...] = ()
    if wanted:
        directions = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in outputs]
        used = [(y, d) for y, d in zip(outputs, directions, strict=True) if y.requires_grad]
        gradients = torch.autograd.grad([y for y, _ in used], wanted, [d for _, d in used])
    return tuple(y.detach() for y in outputs), gradients


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)
