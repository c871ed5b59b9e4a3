"""A patch that names libraries finds its sites in them, imported before `apply()` or after it; no other patch does."""

from __future__ import annotations

import gc
import importlib
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import npu_patch
from npu_patch.applying import api
from npu_patch.applying.dry_run import dry_run
from npu_patch.patches import rms_norm, swiglu
from npu_patch.sites.late_imports import is_within
from tests.support.tiny_models import tiny

LIBRARY = "fake_adapters"
LAYERS = """
import torch

class AdaptedNorm(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.eps = 1e-6

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)
"""
SITE = f"{LIBRARY}.tuners.layers.AdaptedNorm.forward"


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two packages of the same source, importable, and not imported."""
    for package in (LIBRARY, f"{LIBRARY}_too"):
        folder = tmp_path / package / "tuners"
        folder.mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
        (folder / "__init__.py").touch()
        (folder / "layers.py").write_text(LAYERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    npu_patch.restore()
    for name in [name for name in sys.modules if name.startswith(LIBRARY)]:
        del sys.modules[name]


def named_by_a_patch(monkeypatch: pytest.MonkeyPatch, *libraries: str) -> None:
    catalogue = (replace(rms_norm.PATCH, libraries=libraries), swiglu.PATCH)
    monkeypatch.setattr(api, "CATALOGUE", catalogue)
    monkeypatch.setattr("npu_patch.applying.dry_run.CATALOGUE", catalogue)


def layers(package: str = LIBRARY) -> Any:
    return importlib.import_module(f"{package}.tuners.layers")


def in_library(report: npu_patch.Report) -> list[tuple[str, str, str]]:
    return [(each.patch, each.site, each.status) for each in report if each.site.startswith(LIBRARY)]


@pytest.mark.parametrize("with_model", [True, False], ids=["a model", "no model"])
@pytest.mark.parametrize("imported", ["before", "after"])
@pytest.mark.parametrize("named", [LIBRARY, f"{LIBRARY}.tuners", f"{LIBRARY}.tuners.layers"])
def test_a_library_is_patched_whenever_it_is_imported(
    named: str, imported: str, with_model: bool, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    named_by_a_patch(monkeypatch, named)
    if imported == "before":
        layers()
    report = npu_patch.apply(tiny("qwen3").to(npu) if with_model else None)
    module = layers()
    other = layers(f"{LIBRARY}_too")
    assert in_library(report) == [("rms_norm", SITE, "patched")]
    layer = module.AdaptedNorm(16).to(npu)
    x = torch.randn(3, 16).to(npu)
    assert torch.allclose(layer(x), other.AdaptedNorm(16).to(npu)(x), atol=1e-6)
    (outcome,) = (each for each in report if each.site == SITE)
    assert outcome.calls.ran == 1
    forward = module.AdaptedNorm.forward
    npu_patch.restore()
    assert module.AdaptedNorm.forward is forward.__wrapped__
    assert layers() is module and not in_library(npu_patch.report())


def test_what_no_patch_names_is_left_alone_and_no_import_is_watched(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    named_by_a_patch(monkeypatch)
    before = list(sys.meta_path)
    report = npu_patch.apply(tiny("qwen3").to(npu))
    assert sys.meta_path == before
    layers()
    assert not in_library(report)
    npu_patch.restore()
    assert not in_library(npu_patch.apply())


def test_a_library_whose_layers_are_in_the_model_has_each_site_once(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    named_by_a_patch(monkeypatch, LIBRARY)
    model = torch.nn.Sequential(layers().AdaptedNorm(16), layers().AdaptedNorm(16)).to(npu)
    report = npu_patch.apply(model)
    assert [(each.site, each.layers) for each in report.patched] == [(SITE, 2)]


def test_a_dry_run_looks_at_libraries_too(monkeypatch: pytest.MonkeyPatch) -> None:
    named_by_a_patch(monkeypatch, LIBRARY)
    forward = layers().AdaptedNorm.forward
    assert in_library(dry_run([])) == [("rms_norm", SITE, "patched")]
    assert layers().AdaptedNorm.forward is forward


def test_waiting_for_a_library_keeps_no_model_alive(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    named_by_a_patch(monkeypatch, LIBRARY)
    model = tiny("qwen3").to(npu)
    npu_patch.apply(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    layers()
    assert in_library(npu_patch.report()) == [("rms_norm", SITE, "patched")]


def test_undoing_one_apply_undoes_what_was_imported_during_it(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    named_by_a_patch(monkeypatch, LIBRARY)
    with npu_patch.applied(tiny("qwen3").to(npu)):
        forward = layers().AdaptedNorm.forward
    assert layers().AdaptedNorm.forward is forward.__wrapped__


@pytest.mark.parametrize("name, inside", [("peft", True), ("peft.tuners.lora", True), ("peft_extra", False)])
def test_a_library_is_itself_and_what_is_inside_it(name: str, inside: bool) -> None:
    assert is_within(name, ("peft",)) is inside
