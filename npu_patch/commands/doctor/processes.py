"""The processes of a doctor's probes, so that a broken installation can crash and hang in them, and be left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROBE = Path(__file__).with_name("probe.py")
ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Answer:
    """Of one probe: what it found, or why not."""

    found: Any = None
    error: str | None = None


def too_long(timeout: float) -> str:
    return f"no answer within {timeout:g} s"


@dataclass
class Processes:
    """Those that run now; each leads a session of its own, and ends with all that it started."""

    _running: set[subprocess.Popen[str]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    def ask(self, python: str, environ: Mapping[str, str], timeout: float, *arguments: str) -> Answer:
        try:
            process = self._start(python, environ, arguments)
        except OSError as error:
            return Answer(error=f"{python} cannot be run: {error}")
        try:
            said, complained = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return Answer(error=too_long(timeout))
        finally:
            with self._lock:
                self._running.discard(process)
            _end(process)
        try:
            return Answer(**json.loads((said.strip().splitlines() or [""])[-1]))
        except (ValueError, TypeError):
            return Answer(error=_death(process.returncode, complained))

    def kill(self) -> None:
        """Those that run, and those that would start from now on."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                _end(process)

    def _start(self, python: str, environ: Mapping[str, str], arguments: tuple[str, ...]) -> subprocess.Popen[str]:
        path = os.pathsep.join(each for each in (environ.get("PYTHONPATH", ""), str(ROOT)) if each)
        with self._lock:
            if self._stopped:
                raise OSError("interrupted")
            process = subprocess.Popen(
                [python, "-W", "ignore", str(PROBE), *arguments],
                env={**environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self._running.add(process)
            return process


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _death(code: int, stderr: str) -> str:
    last = (stderr.strip().splitlines() or ["nothing on stderr"])[-1]
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"the process died ({how}): {last}"
