"""Runs Hugging Face models on Huawei Ascend NPUs with fused kernels. README.md says how; the public names are here.

Importing this package imports nothing heavy: `npu_patch.simulator` must be able to start before torch is imported.
"""

from __future__ import annotations

import importlib
from typing import Any

from npu_patch.version import __version__

_HOME = {
    "apply": "applying.api",
    "applied": "applying.api",
    "restore": "applying.api",
    "free_decoding": "decoding.kept",
    "report": "applying.api",
    "require_same_on_all_ranks": "applying.ranks",
    "PatchError": "applying.state",
    "Outcome": "reporting.outcome",
    "Report": "reporting.report",
    "Switches": "switches",
}

__all__ = [
    "Outcome",
    "PatchError",
    "Report",
    "Switches",
    "__version__",
    "applied",
    "apply",
    "free_decoding",
    "report",
    "require_same_on_all_ranks",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"npu_patch.{_HOME[name]}"), name)
    raise AttributeError(f"module 'npu_patch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
