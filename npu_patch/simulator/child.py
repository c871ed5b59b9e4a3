"""What a simulated process started simulates too, while it imports torch."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable

from npu_patch.simulator.inherit import OPTIONS


def start_in_child(import_torch: Callable[[], None]) -> None:
    """Called while torch is being imported. Where torch would not load torch_npu there is no NPU, simulated or not."""
    from . import start

    try:
        importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError:
        import_torch()
        return
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        import_torch()
        return
    start(**json.loads(os.environ[OPTIONS]), import_torch=import_torch)
