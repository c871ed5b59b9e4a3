"""npu_patch as an installed distribution, for processes that a test starts: what setup.cfg declares, on their path."""

from __future__ import annotations

import configparser
import os
import sys
from pathlib import Path

from npu_patch import simulator
from npu_patch.simulator.inherit import OPTIONS
from npu_patch.version import __version__

ROOT = Path(__file__).parents[2]
ON_NPU = ("-m", "npu_patch.simulator") if simulator.real_device() is None else ()
PYTHON = (sys.executable, *ON_NPU)


def installed(folder: Path, *, declared: bool = True) -> dict[str, str]:
    """The environment. `declared`: with the entry points."""
    information = folder / f"npu_patch-{__version__}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: npu_patch\nVersion: {__version__}\n")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    groups = setup.items("options.entry_points") if declared else []
    (information / "entry_points.txt").write_text("".join(f"[{group}]{names}\n" for group, names in groups))
    path = os.pathsep.join([str(folder), str(ROOT)])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TWINKLE_NPU_")}
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", OPTIONS: ""}
