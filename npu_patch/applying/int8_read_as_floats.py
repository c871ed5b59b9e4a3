"""Models whose int8 weights transformers read as floats, as only a file beside them says that they are int8."""

from __future__ import annotations

from pathlib import Path

import torch

from npu_patch.checkpoints.w8a8 import DESCRIPTION
from npu_patch.reporting.report import Report


def warn(model: torch.nn.Module, report: Report) -> None:
    """msModelSlim's description has no part in config.json, and no loader of transformers looks for it."""
    named = (getattr(getattr(module, "config", None), "name_or_path", None) for module in model.modules())
    folders = {name for name in named if isinstance(name, str) and name}
    described = [name for name in sorted(folders) if Path(name, DESCRIPTION).is_file()]
    if described and not any(each.dtype == torch.int8 for each in model.parameters()):
        report.warnings.append(
            f"{described[0]} has int8 weights ({DESCRIPTION}), and the model that was loaded from there has none: "
            "transformers alone takes them for floats; call apply() with w8a8 before from_pretrained()"
        )
