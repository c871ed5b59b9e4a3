"""A patch's two halves: reading a site observes and leaves everything as it was, binding is given what was read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import npu_patch
from npu_patch.applying import api
from npu_patch.applying.state import STATE
from npu_patch.ops.readings import NotRead
from npu_patch.patches import CATALOGUE
from npu_patch.patches.patch import Patch
from npu_patch.serving.calls import Calls
from npu_patch.sites.sites import Site
from npu_patch.waiting.heads import NORMS, ROTATIONS
from tests.support.tiny_models import tiny


@pytest.fixture(autouse=True)
def nothing_left_applied() -> Iterator[None]:
    yield
    npu_patch.restore()


def everything(site: Site) -> tuple[Any, ...]:
    """That a patch could write to: the owner's names, the journal, who takes part."""
    names = vars(site.owner) if isinstance(site.owner, (type, ModuleType, torch.nn.Module)) else site.owner
    return dict(names), len(STATE.journal), dict(STATE.patched), len(NORMS), len(ROTATIONS)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next", "gpt_oss", "qwen3_moe"])
def test_reading_writes_nothing_and_binding_is_given_what_was_read(
    family: str, npu: torch.device, two_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, int] = {}
    bound: dict[str, int] = {}
    made: list[object] = []
    monkeypatch.setattr(Calls, "__init__", _noting(Calls.__init__, made))

    def watched(patch: Patch) -> Patch:
        readings: dict[int, Any] = {}

        def reads(site: Site) -> Any:
            before, counters = everything(site), len(made)
            readings[id(site)] = found = patch.read(site)
            assert everything(site) == before, f"{patch.name} writes while it reads {site.label}"
            assert len(made) == counters, f"{patch.name} makes a replacement's counters while it reads {site.label}"
            read[patch.name] = read.get(patch.name, 0) + 1
            return found

        def binds(site: Site, reading: Any, context: Any) -> Any:
            assert reading is readings[id(site)] and not isinstance(reading, NotRead)
            bound[patch.name] = bound.get(patch.name, 0) + 1
            return patch.bind(site, reading, context)

        return dataclasses.replace(patch, read=reads, bind=binds)

    monkeypatch.setattr(api, "CATALOGUE", tuple(map(watched, CATALOGUE)))
    report = npu_patch.apply(tiny(family).to(npu), triton=True, strict=True)
    assert {each.patch for each in report.patched} <= bound.keys() <= read.keys()
    assert bound["rms_norm"] > 0 and bound["attention"] > 0
    assert sum(bound.values()) < sum(read.values())  # what is not known is not bound


def _noting(original: Any, made: list[object]) -> Any:
    def init(self: Calls, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        original(self, *args, **kwargs)

    return init
