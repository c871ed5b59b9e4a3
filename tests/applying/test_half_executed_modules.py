"""Modules that are being imported when `apply()` comes: looked through when they are complete, once, and no sooner."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import npu_patch

SOURCE = """
import torch
import npu_patch
{first}

class HalfNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(6))
        self.eps = 1e-6

    def forward(self, x):
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = HalfNorm()

{last}
"""
NAME = "transformers_modules.half.modeling_half"


@pytest.fixture
def importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A modeling file that calls `apply()` itself, before or after what it defines."""
    package = ModuleType("transformers_modules.half")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "transformers_modules", ModuleType("transformers_modules"))
    monkeypatch.setitem(sys.modules, package.__name__, package)

    def load(**lines: str) -> ModuleType:
        source = SOURCE.format(**{"first": "", "last": ""} | lines)
        (tmp_path / "modeling_half.py").write_text(source)
        return importlib.import_module(NAME)

    yield load
    sys.modules.pop(NAME, None)


def sites(report: npu_patch.Report) -> list[str]:
    return [outcome.site for outcome in report if outcome.site.startswith(NAME)]


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_modeling_file_that_applies_itself_is_patched_once_a_layer_of_it_is_made(
    npu: torch.device, importing: object, where: str
) -> None:
    module = importing(**{where: "report = npu_patch.apply()"})
    assert sites(module.report) == []
    layer = module.Model().to(npu).norm
    assert sites(module.report) == [f"{NAME}.HalfNorm.forward"]
    layer(torch.ones(2, 6, device=npu))
    assert [outcome.calls.ran for outcome in module.report if outcome.site in sites(module.report)] == [1]
    module.Model()
    assert len(sites(module.report)) == 1


def test_it_is_no_longer_waited_for_after_restore(npu: torch.device, importing: object) -> None:
    module = importing(first="report = npu_patch.apply()")
    forward = module.HalfNorm.forward
    npu_patch.restore()
    module.Model()
    assert module.HalfNorm.forward is forward and not npu_patch.report().outcomes


def test_a_model_that_its_file_makes_while_it_is_imported_is_patched_at_once(
    npu: torch.device, importing: object
) -> None:
    module = importing(last="report = npu_patch.apply(Model())")
    assert sites(module.report) == [f"{NAME}.HalfNorm.forward"]
