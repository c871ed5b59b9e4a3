"""What probing recognises of all modeling files of the installed transformers, as JSON: {op: {"total", "recognised",
"unexplained"}}. A process of its own, for whoever imports them all makes every later `apply()` look at them.

python -m npu_patch.simulator -m tests.support.probe_survey
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from types import ModuleType
from typing import Any

import transformers.models

from npu_patch.ops.readings import NotRead, RoPEReading
from npu_patch.patches import rms_norm, rope, swiglu
from npu_patch.probe.rms_norm import read_rms_norm
from npu_patch.probe.rope import read_rope
from npu_patch.probe.swiglu import SwiGLUReading, read_swiglu


def main() -> None:
    modules = modeling_modules()
    ropes = [read_rope(site.original) for module in modules for site in rope.find(module)]
    mlps = [read_swiglu(site.owner, site.original) for module in modules for site in swiglu.find(module)]
    found = {
        "rms_norm": rms_norms(modules),
        "rope": {"total": len(ropes), "recognised": sum(isinstance(reading, RoPEReading) for reading in ropes)},
        "swiglu": {"total": len(mlps), "recognised": sum(isinstance(reading, SwiGLUReading) for reading in mlps)},
    }
    print(json.dumps(found))


def modeling_modules() -> list[ModuleType]:
    found = []
    for family in pkgutil.iter_modules(transformers.models.__path__):
        package = importlib.import_module(f"transformers.models.{family.name}")
        for file in pkgutil.iter_modules(package.__path__):
            if file.name.startswith("modeling_"):
                try:
                    found.append(importlib.import_module(f"{package.__name__}.{file.name}"))
                except ImportError:  # needs a package that is not installed
                    continue
    return found


def rms_norms(modules: list[ModuleType]) -> dict[str, Any]:
    recognised, unexplained, total = 0, [], 0
    for module in modules:
        for name, cls in vars(module).items():
            own = isinstance(cls, type) and cls.__module__ == module.__name__ and "forward" in vars(cls)
            if not (own and "RMSNorm" in name):
                continue
            total += 1
            (site,) = [site for site in rms_norm.find(module) if site.owner is cls]
            found = read_rms_norm(site.owner, site.original, cls.forward.__code__.co_argcount == 3)
            recognised += not isinstance(found, NotRead)
            if isinstance(found, NotRead) and not found.reason:
                unexplained.append(name)
    return {"total": total, "recognised": recognised, "unexplained": unexplained}


if __name__ == "__main__":
    main()
