"""scripts/bench_lora_kernels.py calls the kernels as they are called in a group."""

from __future__ import annotations

from argparse import Namespace

import pytest

from scripts import bench_lora_kernels as bench

pytestmark = pytest.mark.usefixtures("machine")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_each_kernel_and_each_whole_runs_and_is_exact(dropout: float) -> None:
    options = Namespace(tokens=8, rank=4, adapter="float32", dropout=dropout)
    made = bench.group(options, 16, (8, 24), device="cpu")
    assert all(own <= bench.BAR * theirs + 1e-6 for own, theirs in bench.errors_of(made, dropout))
    for run, size in bench.kernels(made, options).values():
        assert size > 0
        run()
    for run in bench.wholes(made, dropout).values():
        run()
