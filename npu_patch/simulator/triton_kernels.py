"""Triton kernels on the simulated NPU: triton's interpreter over the npu tensors' own memory.

A kernel counts as one launch that moves every tensor that it was given once: ours read or write each of them once.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from . import counters

INTERPRET = "TRITON_INTERPRET"


def prepare() -> str | None:
    """Makes `npu_patch.kernels` run on the simulated NPU, or says why they cannot. Calling it again does nothing.

    triton reads `TRITON_INTERPRET` where a kernel is defined, its own library's included: at the import of triton, and
    of each module with kernels. `simulator.start()` sets it.
    """
    os.environ.setdefault(INTERPRET, "1")
    if os.environ[INTERPRET] != "1":
        return f"{INTERPRET}={os.environ[INTERPRET]!r}: the simulated device needs triton's interpreter, 1"
    try:
        language = importlib.import_module("triton.language")
        compiled = importlib.import_module("triton.runtime").JITFunction
    except Exception as error:  # a broken installation raises more than ImportError
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    if isinstance(language.sum, compiled):
        return f"triton was imported before {INTERPRET}=1 was set, which the simulated device needs"
    for name, module in list(sys.modules.items()):
        if name.startswith("npu_patch.kernels.") and any(isinstance(each, compiled) for each in vars(module).values()):
            return f"{name} was imported before {INTERPRET}=1 was set, which the simulated device needs"
    from npu_patch.kernels import launch
    from npu_patch.kernels.interpreter import round_to_nearest

    round_to_nearest()
    from . import graph_nodes, graphs

    launch.RUNNERS["npu"] = graphs.leaf("triton", run, graph_nodes.everything)
    return None


def run(kernel: Any, grid: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Runs the `grid` programs of an interpreted kernel one after the other."""
    from torch import Tensor

    from . import memory

    tensors = [value for value in arguments if isinstance(value, Tensor)]
    if counters.is_counting():
        family = kernel.fn.__module__.rsplit(".", 1)[-1]
        counters.launch(f"triton::{family}.{kernel.fn.__name__.lstrip('_')}", tensors, ())
    kernel[(grid,)](*(memory.alias(value) if isinstance(value, Tensor) else value for value in arguments), **constants)
