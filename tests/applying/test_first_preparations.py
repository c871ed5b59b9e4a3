"""Preparations that come before the walk: patches find what they made, in a dry run too, and of models that they do
not concern nothing is said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import npu_patch
from npu_patch import patches
from npu_patch.applying.dry_run import dry_run
from npu_patch.ops.w8a8.layer import W8A8Linear
from npu_patch.patches.preparation import Change, Preparation
from npu_patch.switches import Switches
from tests.support.w8a8 import int8_layer

NAME = "made_int8"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, dtype=torch.bfloat16) for _ in range(3))


def made_int8(model: nn.Module, device_type: str, switches: Switches) -> Iterator[Change]:
    for layer in model.modules():
        if type(layer) is nn.Linear:
            before, made = dict(vars(layer)), int8_layer(layer)

            def change_back(layer: Any, before: dict[str, Any] = before) -> None:
                layer.__class__ = nn.Linear
                vars(layer).update(before)

            layer.__class__ = W8A8Linear
            vars(layer).update(vars(made))
            yield layer, change_back


FIRST = Preparation(NAME, "rope", lambda *_: None, made_int8, lambda model: hasattr(model, "layers"), first=True)


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Preparation:
    monkeypatch.setattr(patches, "PREPARATIONS", (FIRST,))
    return FIRST


def found(report: Any) -> dict[str, tuple[str, int | None]]:
    return {each.patch: (each.status, each.layers) for each in report if each.patch in (NAME, "w8a8")}


@pytest.mark.usefixtures("first")
@pytest.mark.parametrize("dry", [False, True])
def test_patches_find_what_a_first_preparation_made(dry: bool, npu: torch.device) -> None:
    model = Small().to(npu)
    before = [dict(vars(layer)) for layer in model.layers]
    report = dry_run([], model) if dry else npu_patch.apply(model)
    assert found(report) == {NAME: ("prepared", 3), "w8a8": ("patched", 3)}
    npu_patch.restore()
    assert {type(layer) for layer in model.layers} == {nn.Linear}
    assert [dict(vars(layer)) for layer in model.layers] == before


def test_they_find_nothing_that_is_made_afterwards(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "PREPARATIONS", (replace(FIRST, first=False),))
    assert found(npu_patch.apply(Small().to(npu))) == {NAME: ("prepared", 3)}


@pytest.mark.usefixtures("first")
@pytest.mark.parametrize("switches", [{}, {"rope": False}])
def test_of_what_it_does_not_concern_nothing_is_said(switches: dict[str, bool], npu: torch.device) -> None:
    for model in (nn.Sequential(nn.Linear(8, 8)).to(npu), None):
        with npu_patch.applied(model, **switches) as report:
            assert NAME not in str(report) and not any(NAME in note for note in report.notes)


@pytest.mark.usefixtures("first")
def test_what_fails_in_the_walk_undoes_it_too(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from npu_patch.applying import api

    def fails(*_: Any) -> None:
        raise OSError("no memory left")

    monkeypatch.setattr(api.live_layers, "reach", fails)
    model = Small().to(npu)
    with pytest.raises(OSError, match="no memory left"):
        npu_patch.apply(model)
    assert {type(layer) for layer in model.layers} == {nn.Linear}
