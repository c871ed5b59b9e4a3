"""Ranks: processes that torch.distributed connects, each with what torchrun tells it, and what they wrote down."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_ranks(
    script: str, *arguments: str, directory: Path, ranks: int = 2, seconds: float = 180, **environment: str
) -> list[dict[str, Any]]:
    """What each rank that ran a script of `tests/support` wrote to `{rank}.json` in its last argument, `directory`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    told |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / script), *arguments, str(directory)],
            env={**os.environ, **told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        errors = [rank.communicate(timeout=seconds)[1] for rank in started]
    finally:
        for each in started:
            each.kill()
    assert [rank.returncode for rank in started] == [0] * ranks, "\n".join(error[-3000:] for error in errors)
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(ranks)]
