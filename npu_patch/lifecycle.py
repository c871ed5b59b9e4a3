"""The place of `applying` until the package had rooms, for scripts that import from here."""

from npu_patch.applying.api import applied, apply, report, restore
from npu_patch.applying.state import PatchError, patched_sites

__all__ = ["PatchError", "applied", "apply", "patched_sites", "report", "restore"]
