"""What a simulated process starts is simulated too: spawned workers, DataLoaders, torchrun, compile workers.

The options travel in an environment variable, and `children/`, first on PYTHONPATH, has a sitecustomize that waits
for the import of torch. Not reached: processes started with `python -I`, `-E` or `-S`, or with an environment of their
own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

OPTIONS = "NPU_PATCH_SIMULATOR_OPTIONS"  # also in children/sitecustomize.py
WAITING = "SimulateOnImport"  # children/sitecustomize.py's
FOLDER = str(Path(__file__).with_name("children"))


def let_children_simulate(options: Mapping[str, object] | None) -> None:
    """Processes started from here on call `start(**options)` when they import torch; None: they do not."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != FOLDER]
    sys.path[:] = [path for path in sys.path if path != FOLDER]
    if options is None:
        os.environ.pop(OPTIONS, None)
    else:
        os.environ[OPTIONS] = json.dumps(options)
        paths.insert(0, FOLDER)
        sys.path.insert(1, FOLDER)  # inductor's compile workers get sys.path as their PYTHONPATH
    if paths:
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    else:
        os.environ.pop("PYTHONPATH", None)


def is_inherited() -> bool:
    """Whether this process has a simulated NPU as soon as it imports torch."""
    return any(type(finder).__name__ == WAITING for finder in sys.meta_path)


def stop_waiting_for_torch() -> None:
    """A script that calls `start()` itself has its own options."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != WAITING]
