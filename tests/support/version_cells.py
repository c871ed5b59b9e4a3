"""What each patch does for each family on the installed transformers: the cells of the compatibility table.

python -m tests.support.version_cells FILE.json
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import sys
import unittest
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

from npu_patch import simulator

if simulator.real_device() is None:
    simulator.start()

import torch
from torch import Tensor

import npu_patch
from npu_patch.kernels import launch
from npu_patch.kernels.readiness import why_not
from npu_patch.patches import CATALOGUE
from npu_patch.patches.patch import Patch
from npu_patch.switches import BY_NAME
from tests.support.gradients import loss_and_gradients
from tests.support.parity import why_unequal
from tests.support.tiny_models import FAMILIES, tiny, tiny_batch
from tests.support.what_ran import why_not_ran

EQUAL, DIFFERENT, SKIPPED, FAILED, NOTHING, NO_FAMILY = (
    "equal",
    "different",
    "skipped",
    "failed",
    "nothing",
    "no family",
)
Results = dict[str, Tensor]


def patches() -> Sequence[Patch]:
    """Those of text models, which the families are. Without those that Triton kernels alone can serve where none can
    run."""
    others = {"vision", "inference", "w8a8"}
    of_text = [patch for patch in CATALOGUE if not {patch.switch, BY_NAME[patch.switch].group} & others]
    if why_not() is None:
        return of_text
    return [patch for patch in of_text if not all(each.optional for each in patch.op.implementations)]


@dataclass(frozen=True)
class Cell:
    """`status` is "equal" (it ran, every call of it; loss and every gradient are the unpatched model's), "different"
    (they are not), "skipped" or "failed" (with the report's reasons, those of calls that fell through included),
    "nothing" (the family has nothing for this patch) or "no family".
    """

    status: str
    reason: str = ""


def cells_of(family: str, device: torch.device) -> dict[str, Cell]:
    """By the name of the patch: a tiny float32 model of `family` trains with that patch, and those that it needs."""
    names = [patch.name for patch in patches()]
    try:
        on_cpu = tiny(family)
    except unittest.SkipTest as missing:
        return dict.fromkeys(names, Cell(NO_FAMILY, str(missing).rsplit(" has ", 1)[-1]))
    batch = tiny_batch()
    original = loss_and_gradients(tiny(family).to(device), batch)
    with _on_two_cores():
        return {patch.name: _cell(patch, on_cpu, original, batch, device) for patch in patches()}


def _on_two_cores() -> AbstractContextManager[object]:
    """triton's interpreter runs the programs of a kernel, as many as there are cores, one by one."""
    if not simulator.is_active():
        return nullcontext()
    few = launch.Machine("npu", 2, launch.UNIFIED_BUFFER, True)
    return mock.patch.object(launch, "machine_of", lambda device: few)


def _cell(patch: Patch, on_cpu: torch.nn.Module, original: Results, batch: Results, device: torch.device) -> Cell:
    model = copy.deepcopy(on_cpu).to(device)
    on = {patch.name, *patch.needs}
    # Among the switches is `triton`: on for the patches that Triton kernels alone can serve, off for every other.
    switched_on = {each.switch for each in CATALOGUE if each.name in on}
    with npu_patch.applied(model, **{each.switch: each.switch in switched_on for each in CATALOGUE}) as report:
        patched = loss_and_gradients(model, batch)
    outcomes = [outcome for outcome in report if outcome.patch == patch.name]
    failed = [outcome.reason for outcome in outcomes if outcome.status == "failed"]
    if failed:
        return Cell(FAILED, failed[0])
    worst = why_unequal(on_cpu, batch, original, patched)
    if worst:
        return Cell(DIFFERENT, worst)
    any_ran, missed = any(outcome.calls.ran for outcome in outcomes), why_not_ran(patch.name, outcomes)
    reasons = [reason for outcome in outcomes for reason in outcome.calls.fell_through]
    if missed is None and not reasons:
        return Cell(EQUAL)
    reasons += [missed] if any_ran and missed and not reasons else []
    reasons += [outcome.reason for outcome in outcomes if outcome.status == "skipped" and outcome.layers != 0]
    return Cell(SKIPPED, "; ".join(dict.fromkeys(reasons))) if reasons else Cell(NOTHING)


def measured(device: torch.device) -> dict[str, object]:
    """Every cell, with the versions that they hold for."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in ("transformers", "torch", "torch_npu")},
        "cells": {
            family: {patch: asdict(cell) for patch, cell in cells_of(family, device).items()} for family in FAMILIES
        },
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measured(torch.device("npu:0")), indent=1))
