"""Layers through which no gradient reaches what is trained before them, and that nobody is told of.

compressed-tensors rounds a layer's input without recording it (`fake_quantize` under `no_grad`), so an adapter in front
of such a layer, or on it where the input is all that connects it to the loss, trains with no gradient, in silence. It
is said when a model is applied to, and asked again before the first step of an optimizer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer

from npu_patch import log
from npu_patch.applying.state import STATE
from npu_patch.reporting.report import Report

BEFORE_STEP = torch_optimizer._global_optimizer_pre_hooks
WHY = "inputs that compressed-tensors rounds without a gradient"
MOST_NAMED = 3


def warn(model: torch.nn.Module, report: Report) -> None:
    """In the report: a warning where adapters are there already, else a note."""
    names = cutting(model)
    if not names:
        return
    text = (
        f"{len(names)} layers have {WHY} ({_some(names)}): what is trained before them gets none; as int8 weights "
        "(w8a8), or loaded with CompressedTensorsConfig(dequantize=True), they pass it on"
    )
    trained = any("lora_" in name and each.requires_grad for name, each in model.named_parameters())
    (report.warnings if trained else report.notes).append(text)
    key = __name__, id(model)
    if not STATE.journal.holds(BEFORE_STEP, key):
        STATE.journal.rebind(BEFORE_STEP, key, _asking_once(weakref.ref(model)))


def cutting(model: torch.nn.Module) -> list[str]:
    """The names of such layers."""
    found = []
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if getattr(scheme, "input_activations", None) is not None and "forward" in vars(module):
            found.append(name)
    return found


def _asking_once(model: Callable[[], Any]) -> Callable[..., None]:
    asked = False

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal asked
        given = None if asked else model()
        if given is None:
            return
        trained = {id(each) for group in optimizer.param_groups for each in group["params"] if each.requires_grad}
        parameters = [(name, each) for name, each in given.named_parameters() if id(each) in trained]
        without = [name for name, each in parameters if each.grad is None]
        asked = bool(parameters)
        if without and cutting(given):
            log.warning(
                f"{len(without)} of {len(parameters)} trained parameters have no gradient ({_some(without)}); "
                f"the model has layers with {WHY}"
            )

    return before_step


def _some(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
