"""The cells of the compatibility table, on the installed transformers: nothing differs, nothing fails, and what is
skipped says why."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

from npu_patch.patches.attention import sdpa as attention_sdpa
from npu_patch.patches.gated_delta import serve as gated_delta_serve
from npu_patch.serving.replacement import Unserved
from tests.support.tiny_models import FAMILIES
from tests.support.version_cells import DIFFERENT, EQUAL, FAILED, NO_FAMILY, SKIPPED, Cell, cells_of

TABLE = Path(__file__).parents[2] / "scripts" / "version_table.py"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("version_table", TABLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cells(npu: torch.device) -> dict[str, dict[str, Cell]]:
    return {family: cells_of(family, npu) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_patch_alone_is_equal_or_skipped_with_a_reason(family: str, cells: dict[str, dict[str, Cell]]) -> None:
    found = cells[family]
    assert {patch: cell for patch, cell in found.items() if cell.status in (DIFFERENT, FAILED)} == {}
    assert all(cell.reason for cell in found.values() if cell.status in (SKIPPED, NO_FAMILY))
    if {cell.status for cell in found.values()} != {NO_FAMILY}:
        assert {found[patch].status for patch in ("rms_norm", "rope", "attention")} == {EQUAL}


def test_readme_has_what_is_found_here(cells: dict[str, dict[str, Cell]], table: ModuleType) -> None:
    version = transformers.__version__
    found = {
        (patch, family): {version: table._in_words(vars(cell))}
        for family, of_family in cells.items()
        for patch, cell in of_family.items()
    }
    documented = table.documented()
    if not any(version in by_version for by_version in documented.values()):
        pytest.skip(f"transformers {version} is not in the table")
    assert table.differences(documented, found) == []


def test_a_patch_of_which_only_its_masks_and_checks_ran_is_not_equal(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = Unserved("so")
    monkeypatch.setattr(attention_sdpa, "refused", lambda arguments: refusal)
    monkeypatch.setattr(gated_delta_serve, "_bound", lambda *given: refusal)
    cells = cells_of("qwen3_next", npu)
    assert {patch: cells[patch] for patch in ("attention", "gated_delta_net")} == {
        "attention": Cell(SKIPPED, "so"),
        "gated_delta_net": Cell(SKIPPED, "so"),
    }
    assert cells["rope"] == Cell(EQUAL)


@pytest.mark.parametrize("arguments", [[], ["--check"]])
@pytest.mark.parametrize("status", ["different", "failed"])
def test_a_cell_that_is_wrong_is_never_written(
    status: str,
    arguments: list[str],
    table: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page, file = tmp_path / "versions.md", tmp_path / "9.9.json"
    page.write_text(f"{table.BEGIN}\n{table.END}")
    monkeypatch.setattr(table, "PAGE", page)
    cells = {"qwen3": {"rope": {"status": status, "reason": "so"}, "swiglu": {"status": "equal", "reason": ""}}}
    file.write_text(json.dumps({"versions": {"transformers": "9.9"}, "cells": cells}))
    assert table.main([*arguments, str(file)]) == 1
    assert capsys.readouterr().out == f"transformers 9.9, qwen3, rope: {status}: so\n"
    assert page.read_text() == f"{table.BEGIN}\n{table.END}"


def test_a_table_reads_back_as_it_was_written(table: ModuleType) -> None:
    found = {
        ("rope", "a"): {"4.1.0": "=", "5.0.0": "="},
        ("rope", "b"): {"4.1.0": "skipped: no 1. reason", "5.0.0": "-"},
        ("rope", "c"): {"4.1.0": "=", "5.0.0": "="},
        ("swiglu", "a"): {"4.1.0": "-", "5.0.0": "-"},
    }
    read = table.parse(table.render(found))
    assert read == {key: value for key, value in found.items() if key != ("swiglu", "a")}
    assert table.differences(read, found) == []
    found["rope", "c"]["5.0.0"] = "skipped: gone"
    apart = "transformers 5.0.0, c, rope: docs/versions.md has '=', found 'skipped: gone'"
    assert table.differences(read, found) == [apart]
