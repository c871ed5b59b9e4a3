"""Every kernel, at every shape of five models, fits an Ascend 910B3, double-buffered, in vector instructions alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ascendnpuir")
ROOT = Path(__file__).resolve().parent.parent.parent
UNIFIED_BUFFER = 192 * 1024
RECORD = ROOT / "out" / "kernels" / "ascend.json"


FAMILIES = ("qk_norm_rope", "swiglu", "add_rms_norm", "gated_rms_norm", "lora", "cross_entropy")


@pytest.fixture(scope="module")
def plans() -> dict[str, list[dict[str, Any]]]:
    """Of every family, of the widest rows, and of two kernels that must not pass; from a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.ascend_cases", *FAMILIES, "widest", "oversized", "scalar"],
        cwd=ROOT,
        env=kept | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps({family: found[family] for family in FAMILIES}, indent=1))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_fits_the_chip(family: str, plans: dict[str, list[dict[str, Any]]]) -> None:
    assert plans[family]
    for plan in plans[family]:
        where = f"{plan['kernel']} for {', '.join(plan['models'])} with {plan['constants']}"
        assert plan["refusal"] is None, f"{where}: {plan['refusal']}"
        assert plan["scalar_loops"] == [], f"{where}: scalar loops, {plan['scalar_loops'][:3]}"
        assert 0 < plan["on_chip_bytes"] <= UNIFIED_BUFFER, f"{where}: {plan['on_chip_bytes']} bytes"
        assert plan["double_buffered"], f"{where}: no room to overlap copies with arithmetic"


def test_the_widest_row_that_is_taken_fits(plans: dict[str, list[dict[str, Any]]]) -> None:
    """Of kernels that hold whole rows: `launch.why_too_wide` declines the next one. Copies need not overlap there."""
    families = {plan["kernel"].split(".")[0] for plan in plans["widest"]}
    assert {"rms_norm", "qk_norm_rope_forward", "qk_norm_rope_backward"} <= families
    gated = [plan for plan in plans["widest"] if plan["constants"].get("GATE")]
    assert {plan["kernel"] for plan in gated} == {"rms_norm._forward", "rms_norm._backward"}
    for plan in plans["widest"]:
        where = f"{plan['kernel']} with {plan['constants']}"
        assert plan["refusal"] is None, f"{where}: {plan['refusal']}"
        assert plan["scalar_loops"] == [], f"{where}: scalar loops, {plan['scalar_loops'][:3]}"
        assert 0 < plan["on_chip_bytes"] <= UNIFIED_BUFFER, f"{where}: {plan['on_chip_bytes']} bytes"


def test_an_oversized_tile_is_refused(plans: dict[str, list[dict[str, Any]]]) -> None:
    (plan,) = plans["oversized"]
    assert "ub overflow" in plan["refusal"]


def test_scalar_loops_are_seen(plans: dict[str, list[dict[str, Any]]]) -> None:
    (plan,) = plans["scalar"]
    assert plan["refusal"] is None
    assert plan["scalar_loops"]
