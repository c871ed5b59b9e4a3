"""`apply()` once transformers is there, and its report when the process ends. Imports no torch: it may come later."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from npu_patch import log
from npu_patch.sites.late_imports import LateImports, is_half_executed, is_modeling_module
from npu_patch.switches import UNASKED, Unasked

if TYPE_CHECKING:
    from npu_patch.reporting.report import Report

AWAITED = "transformers.modeling_utils"


@dataclass
class Door:
    """Open until `apply()` ran. `searched`: modules whose import it is told the end of."""

    wanted: Unasked
    searched: set[str] = field(default_factory=set)
    hook: LateImports = field(init=False)

    def __post_init__(self) -> None:
        self.hook = LateImports(self._is_wanted, self._go_through)

    def _is_wanted(self, name: str) -> bool:
        """Modeling files too: torch, and this with it, may be imported while what is awaited is half executed."""
        wanted = name == AWAITED or is_modeling_module(name)
        if wanted:
            self.searched.add(name)
        return wanted

    def _go_through(self, imported: ModuleType) -> None:
        """Not before the modeling files are complete whose import led to this one."""
        waiting = [sys.modules[name] for name in self.searched if name in sys.modules]
        if AWAITED not in sys.modules or any(is_half_executed(each) for each in waiting):
            return
        try:
            sys.meta_path.remove(self.hook)
        except ValueError:  # another thread went first
            return
        _apply(self.wanted)


_opened: list[Door] = []


def open_door(wanted: Unasked) -> None:
    """A second call does nothing."""
    if not _opened:
        _opened.append(Door(wanted))
        sys.meta_path.insert(0, _opened[0].hook)


def _apply(wanted: Unasked) -> None:
    try:
        from npu_patch.applying.api import apply

        first = apply()
    except Exception as error:  # the import that led here goes on
        log.warning(f"{UNASKED}: nothing is patched: {type(error).__name__}: {error}")
        return
    if wanted.printed or wanted.file is not None:
        atexit.register(_tell, wanted, first, os.getpid(), time.time())


def _tell(wanted: Unasked, first: Report, process: int, since: float) -> None:
    """Once on the first rank. A process in which nothing ran says little, and leaves the file of one that did."""
    if os.getpid() != process or (log.rank() != 0 and not log.EVERY_RANK):
        return
    from npu_patch.applying.api import report

    found = report() if first.nothing_because is None else first
    used = any(each.reached or each.called for each in found)
    printed = wanted.printed
    try:
        if wanted.file is not None and (used or not _is_newer(wanted.file, since)):
            found.write(wanted.file)
    except Exception as error:
        log.warning(f"{UNASKED}: the report could not be written: {type(error).__name__}: {error}")
        printed = True
    if printed and (used or not _is_worker()):
        print(found if used else f"{found.headline()}; no layer was made in this process", file=sys.stderr)


def _is_newer(file: str, since: float) -> bool:
    with contextlib.suppress(OSError):
        return Path(file).stat().st_mtime >= since
    return False


def _is_worker() -> bool:
    """Of multiprocessing: data loaders and the like."""
    multiprocessing = sys.modules.get("multiprocessing.process")
    return multiprocessing is not None and multiprocessing.parent_process() is not None
