"""What the package has to say while it runs: through the logger `npu_patch`, each fact once, on the first process only.

logging.getLogger("npu_patch").setLevel(logging.INFO)    # what was patched, in one line
npu_patch.log.EVERY_RANK = True                          # every process speaks
"""

from __future__ import annotations

import logging
import os
import sys

LOGGER = logging.getLogger("npu_patch")
EVERY_RANK = False
_SAID: set[tuple[int, str]] = set()


def info(fact: str) -> None:
    _say(logging.INFO, fact)


def warning(fact: str) -> None:
    _say(logging.WARNING, fact)


def forget() -> None:
    """Facts may be said again."""
    _SAID.clear()


def rank() -> int:
    """Of this process: torch.distributed's where it is initialised, else the launcher's RANK, else 0."""
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def _say(level: int, fact: str) -> None:
    if (EVERY_RANK or rank() == 0) and LOGGER.isEnabledFor(level) and (level, fact) not in _SAID:
        _SAID.add((level, fact))
        LOGGER.log(level, fact)
