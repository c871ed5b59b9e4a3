"""The genuine fla-core, where it is installed (scripts/test_fla.sh): its functions are right under the adapter, and its
kernels fit the chip, but for those that are named here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.needs_triton import needs_triton

ROOT = Path(__file__).resolve().parents[3]
UNIFIED_BUFFER = 192 * 1024
# By triton-ascend 3.2.0; fla 0.6.0 asks for 3.6.0.
REFUSED = {"ops.common.backends.triton_ascend.chunk_o.chunk_dqkwg_bwd_kernel_full": "ub overflow"}

pytestmark = [
    needs_triton,
    pytest.mark.skipif(
        importlib.util.find_spec("fla") is None, reason="fla-core is not installed: scripts/test_fla.sh"
    ),
]


def _asked(what: str) -> dict[str, Any]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.fla_core", what]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def ran() -> dict[str, Any]:
    return _asked("run")


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    pytest.importorskip("ascendnpuir")
    return _asked("compile")


def test_its_ascend_backend_is_found(ran: dict[str, Any]) -> None:
    assert ran["missing"] == [None, None]


@pytest.mark.parametrize("function", ["chunk_gated_delta_rule", "fused_recurrent", "causal_conv1d"])
def test_its_functions_are_right(function: str, ran: dict[str, Any]) -> None:
    """Grouped heads, states in and out; but for the recurrent rule, packed sequences and all gradients too."""
    said = {name: what for name, what in ran.items() if name.startswith(f"{function}:")}
    assert len(said) >= 6
    assert {name: what for name, what in said.items() if what != "right"} == {}


def test_a_kernel_that_the_compiler_refuses_is_declined_in_its_words(ran: dict[str, Any]) -> None:
    assert ran["a kernel that does not compile"].startswith("self-check: ")
    assert "ub overflow" in ran["a kernel that does not compile"]


def test_its_kernels_fit_the_chip_but_for_those_named(compiled: dict[str, Any]) -> None:
    refused = {name: plan["refusal"] for name, plan in compiled.items() if plan["refusal"]}
    assert refused.keys() == REFUSED.keys()
    assert all(REFUSED[name] in reason for name, reason in refused.items())
    assert all(plan["on_chip_bytes"] <= UNIFIED_BUFFER for plan in compiled.values())


@pytest.mark.parametrize("part", ["chunk_o_fwd", "h_bwd", "prepare_wy", "fused_recurrent", "conv1d_fwd", "conv1d_bwd"])
def test_the_kernels_of_each_part_were_compiled(part: str, compiled: dict[str, Any]) -> None:
    assert any(part in name for name in compiled)
