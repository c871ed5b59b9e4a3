"""Two ranks on NPUs that communicate by HCCL: under each parallel engine a patched model has the loss and the gradients
of one unpatched process with the whole batch. The table is that of scripts/engines.py, each cell in one order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_patch import simulator
from scripts.parallel import plans, sequences, torchs
from scripts.parallel.case import Engine

ROOT = Path(__file__).parents[2]
ENGINES = {engine.name: engine for engine in (*torchs.ENGINES, *plans.ENGINES, *sequences.ENGINES)}
# What the engine itself refuses, of an unpatched model too; (engine, family, LoRA): why.
REFUSED = {
    ("FSDP1", "qwen3_moe", True): "is a view and its base or another view of its base has been modified inplace",
    ("accelerate, context parallel", "qwen3_5", False): "does not support attention layers of type",
    ("accelerate, context parallel", "qwen3_5", True): "does not support attention layers of type",
}
SERVED = {
    "qwen3": {"rms_norm", "swiglu"},
    "qwen3_moe": {"rms_norm", "experts"},
    "qwen3_5": {"gated_delta_net", "swiglu"},
}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not simulator.is_active() and torch.npu.device_count() < 2:
        pytest.skip("one NPU")
    file = tmp_path_factory.mktemp("engines") / "cells.json"
    command = [sys.executable, str(ROOT / "scripts/engines.py"), "--half", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert file.exists(), done.stdout + done.stderr[-5000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", ENGINES)
def test_a_patched_model_trains_as_one_unpatched_process(name: str, cells: list[dict[str, Any]]) -> None:
    engine: Engine = ENGINES[name]
    mine = [cell for cell in cells if cell["engine"] == name]
    assert len(mine) == len(engine.families) * (2 if engine.adapters else 1)
    for cell in mine:
        refused = REFUSED.get((name, cell["family"], cell["lora"]))
        if refused:
            assert cell["status"] == "as unpatched" and refused in cell["reason"]
            continue
        assert cell["status"] == "equal", cell
        assert SERVED[cell["family"]] <= set(cell["ran"])
        assert {"lora"} <= set(cell["ran"]) or not cell["lora"]


def test_gradients_of_adapters_are_reduced_at_once(cells: list[dict[str, Any]]) -> None:
    mine = [cell for cell in cells if cell["engine"] == "DDP" and cell["lora"]]
    assert [cell["collectives"]["HcclAllReduce"][0] for cell in mine] == [1, 1, 1]


def test_attention_is_left_to_torchs_context_parallelism(cells: list[dict[str, Any]]) -> None:
    """torch's stands in the place of F.scaled_dot_product_attention: a local one would be silently wrong."""
    mine = [cell for cell in cells if cell["engine"] == "accelerate, context parallel" and cell["status"] == "equal"]
    assert {cell["family"] for cell in mine} == {"qwen3", "qwen3_moe"}
    for cell in mine:
        assert any("scaled_dot_product_attention was bound anew by torch" in reason for reason in cell["left"])


def test_norms_of_heads_are_served_under_tensor_parallelism(cells: list[dict[str, Any]]) -> None:
    """transformers binds forwards to them that close over the class's."""
    mine = [cell for cell in cells if cell["engine"] == "transformers, tp_plan"]
    assert {cell["when"] for cell in mine} == {"before", "after"}
    assert [reason for cell in mine for reason in cell["left"] if reason.startswith("rms_norm")] == []


@pytest.mark.parametrize(
    "name", ["transformers, FSDP2", "accelerate, FSDP2", "FSDP2, two forwards before two backwards"]
)
def test_the_loss_of_a_head_that_is_a_unit_of_its_own_is_served(name: str, cells: list[dict[str, Any]]) -> None:
    mine = [cell for cell in cells if cell["engine"] == name]
    assert mine and all("cross_entropy" in cell["ran"] for cell in mine)


def test_both_orders_are_there(cells: list[dict[str, Any]]) -> None:
    assert {cell["when"] for cell in cells} == {"before", "after"}
