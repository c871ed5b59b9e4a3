"""What known tools took is said to be theirs, with the switch that hands it over: before `apply()`, since, at the end.

Stand-ins whose code is in a module of the tool's name.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import npu_patch
from npu_patch import log
from npu_patch.sites.other_tools import TOOLS, OtherTool, of_tool, tool_of
from tests.support.tiny_models import tiny

OF_EACH = pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)


def modeling() -> types.ModuleType:
    return sys.modules["transformers.models.qwen3.modeling_qwen3"]


def of(tool: OtherTool, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, as if it were defined in a module of the tool's."""
    home = f"{tool.packages[0]}.patches"
    theirs = types.FunctionType(function.__code__, {"__name__": home, "torch": torch}, function.__name__)
    theirs.__module__ = home
    return theirs


def their_forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("a kernel that takes no CPU tensors")


def their_rope(q: Any, k: Any, *tables: Any, **others: Any) -> Any:
    raise RuntimeError("a kernel that takes no CPU tensors")


def their_class(tool: OtherTool, name: str, monkeypatch: pytest.MonkeyPatch) -> type[torch.nn.Module]:
    home = f"{tool.packages[0]}.patches"
    cls = type(name, (torch.nn.Module,), {"__module__": home, "forward": of(tool, their_forward)})
    module = types.ModuleType(home)
    vars(module)[name] = cls
    monkeypatch.setitem(sys.modules, home, module)
    return cls


@OF_EACH
@pytest.mark.parametrize("given", [True, False], ids=["a model", "no model"])
def test_what_a_tool_took_before_is_its_own_and_names_the_switch(
    given: bool, tool: OtherTool, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function, a forward, a class under a name of the modeling file."""
    model = tiny("qwen3").to(npu)
    monkeypatch.setattr(modeling(), "apply_rotary_pos_emb", of(tool, their_rope))
    monkeypatch.setattr(modeling().Qwen3MLP, "forward", of(tool, their_forward))
    monkeypatch.setattr(modeling(), "Qwen3RMSNorm", their_class(tool, "Norm", monkeypatch))
    report = npu_patch.apply(model if given else None)
    reasons = {
        outcome.patch: outcome.reason for outcome in report.skipped if of_tool(tool.packages[0]) in outcome.reason
    }
    assert {"rms_norm", "rope", "swiglu"} <= reasons.keys()
    assert all("already " in reason and tool.hands_over in reason for reason in reasons.values())
    assert f"{tool.packages[0]}.patches.Norm" in reasons["rms_norm"]


@pytest.mark.parametrize("tool", [each for each in TOOLS if each.name != "hub kernels"], ids=lambda tool: tool.name)
def test_a_layer_that_was_made_a_tools_own_appears(
    tool: OtherTool, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As twinkle does it, which gives layers another class, called what it likes."""
    model = tiny("qwen3").to(npu)
    model.model.norm.__class__ = their_class(tool, "AscendNorm", monkeypatch)
    report = npu_patch.apply(model)
    (outcome,) = [outcome for outcome in report.skipped if "AscendNorm" in outcome.site]
    assert outcome.patch == "rms_norm" and tool.hands_over in outcome.reason


@OF_EACH
def test_who_came_since_is_named_by_report_and_restore(
    tool: OtherTool, npu: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At a class, and in a registry, which has its name."""
    from transformers.modeling_utils import AttentionInterface

    log.forget()
    model = tiny("qwen3").to(npu)
    npu_patch.apply(model)
    monkeypatch.setattr(modeling().Qwen3RMSNorm, "forward", of(tool, their_forward))
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", of(tool, their_rope))
    by = f"bound anew by {tool.packages[0]}.patches.{{}}{of_tool(tool.packages[0])}"
    warnings = npu_patch.report().warnings
    assert any("Qwen3RMSNorm.forward: " + by.format("their_forward") in line for line in warnings)
    assert any("AttentionInterface['sdpa']: " + by.format("their_rope") in line for line in warnings)
    with caplog.at_level(logging.WARNING):
        npu_patch.restore()
    left = [line for line in caplog.messages if line.endswith(": restore() leaves it so")]
    assert left == [
        f"AttentionInterface['sdpa'] was {by.format('their_rope')}: restore() leaves it so",
        f"{modeling().__name__}.Qwen3RMSNorm.forward was {by.format('their_forward')}: restore() leaves it so",
    ]


@pytest.mark.parametrize(
    ("module", "name"),
    [("swift.model.npu_patch.model", "ms-swift"), ("liger_kernel.transformers.rms_norm", "Liger"),
     ("swiftly.model", None), ("transformers.models.qwen3.modeling_qwen3", None), ("npu_patch.serving", None)],
)  # fmt: skip
def test_a_tool_is_known_by_its_package(module: str, name: str | None) -> None:
    tool = tool_of(module)
    assert (tool.name if tool else None) == name and bool(of_tool(module)) == bool(name)
