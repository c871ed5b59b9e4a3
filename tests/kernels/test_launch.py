"""What triton compiled is launched again for the arguments that it was compiled for, and for no others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from npu_patch.kernels import launch


class FakeKernel:
    """Compiles as triton does: for each launch through it, something that launches itself. `passes_constants`: with the
    constants after its arguments, as tritons from 3.3 do."""

    arg_names = ("x", "y", "rows", "eps", "BLOCK", "STAGES")

    def __init__(self, passes_constants: bool) -> None:
        self.kinds = {"x": "*fp32", "rows": "i32"} | ({"BLOCK": "constexpr"} if passes_constants else {})
        self.compiled = 0
        self.launched: list[tuple[int, tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: Any) -> Any:
            self.compiled += 1
            return Made(self)

        return run


class Made:
    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel, self.src = kernel, SimpleNamespace(signature=kernel.kinds)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.kernel.launched.append((grid[0], arguments))


def run(kernel: FakeKernel, x: torch.Tensor, rows: int = 5, eps: float = 1e-6, block: int = 8, grid: int = 3) -> None:
    launch.launch(kernel, torch.device("cpu"), grid, x, None, rows, eps, STAGES=2, BLOCK=block)


@pytest.mark.parametrize("passes_constants", [True, False])
def test_a_second_launch_goes_to_what_was_compiled(passes_constants: bool) -> None:
    kernel, x = FakeKernel(passes_constants), torch.ones(8)
    run(kernel, x)
    run(kernel, x, rows=7, eps=1e-5, grid=4)
    constants = (8, 2) if passes_constants else ()
    assert kernel.compiled == 1
    (launched,) = kernel.launched
    assert launched == (4, (x, None, 7, 1e-5, *constants))


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.ones(8, dtype=torch.bfloat16)},
        {"x": torch.ones(9)[1:]},  # not aligned to 16 bytes
        {"rows": 1},
        {"rows": 16},
        {"rows": 2**40 + 1},
        {"block": 16},
    ],
    ids=str,
)
def test_what_triton_compiles_anew_for_is_compiled_anew(other: dict[str, Any]) -> None:
    kernel, usual = FakeKernel(True), {"x": torch.ones(8)}
    run(kernel, **usual)
    run(kernel, **usual | other)
    assert (kernel.compiled, kernel.launched) == (2, [])


def test_the_interpreter_compiles_nothing() -> None:
    class Interpreted(FakeKernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*arguments: Any, **constants: Any) -> None:
                self.compiled += 1

            return run

    kernel = Interpreted(True)
    run(kernel, torch.ones(8))
    run(kernel, torch.ones(8))
    assert kernel.compiled == 2
