"""What a walk says beyond the outcomes of its sites: in the report's warnings, and in the log."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from npu_patch import log
from npu_patch.patches.patch import AnyPatch
from npu_patch.reporting.outcome import PATCHED
from npu_patch.reporting.report import Report
from npu_patch.reporting.text import headline


def warn_of_what_serves_nothing(report: Report, patches: Iterable[AnyPatch], model: torch.nn.Module) -> None:
    """Of patches that found something they should serve in this model, and serve none of it."""
    for patch in patches:
        found = [each for each in report if each.patch == patch.name and each.layers != 0]
        outcomes = [each for each in found if not each.in_order]
        if outcomes and not any(outcome.status == PATCHED for outcome in outcomes):
            report.warnings.append(
                f"{patch.name}: nothing in {type(model).__name__} is served; {len(outcomes)} sites were found"
            )


def tell(report: Report) -> None:
    """In the log: one line, and what the user should know without asking for the report."""
    log.info(headline(report))
    for message in report.warnings:
        log.warning(message)
    for outcome in report.failed:
        log.warning(f"{outcome.patch}: {outcome.site} failed: {outcome.reason}")
