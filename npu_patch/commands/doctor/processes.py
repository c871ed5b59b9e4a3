"""The processes of a doctor's probes, so that a broken installation can crash and hang in them, and be left behind."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROBE = Path(__file__).with_name("probe.py")
ROOT = Path(__file__).parents[3]
Question = tuple[str, ...]


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

    def ask(self, python: str, environ: Mapping[str, str], timeout: float, *question: str) -> Answer:
        """In a process of its own."""
        try:
            process = self._start(python, environ, [question])
        except OSError as error:
            return Answer(error=f"{python} cannot be run: {error}")
        try:
            said, complained = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return Answer(error=too_long(timeout))
        finally:
            self._ended(process)
        answers = [answer for _, answer in filter(None, map(_answer, said.splitlines()))]
        return answers[-1] if answers else Answer(error=_death(process.returncode, complained))

    def ask_in_turn(
        self,
        python: str,
        environ: Mapping[str, str],
        timeout: float,
        questions: Sequence[Question],
        answered: Callable[[], None],
    ) -> dict[Question, Answer]:
        """In one process, up to the first that has no good answer: that one may be to blame for what follows."""
        found: dict[Question, Answer] = {}
        try:
            process = self._start(python, environ, questions, subprocess.DEVNULL)
        except OSError:
            return found
        try:
            for number, answer in filter(None, map(_answer, _lines(process, timeout))):
                if answer.error is not None:
                    break
                found[questions[number]] = answer
                answered()
                if len(found) == len(questions):
                    break
        finally:
            self._ended(process)
        return found

    def kill(self) -> None:
        """Those that run, and those that would start from now on."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                _end(process)

    def _start(
        self, python: str, environ: Mapping[str, str], questions: Sequence[Question], stderr: int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        path = os.pathsep.join(each for each in (environ.get("PYTHONPATH", ""), str(ROOT)) if each)
        with self._lock:
            if self._stopped:
                raise OSError("interrupted")
            process = subprocess.Popen(
                [python, "-W", "ignore", str(PROBE), json.dumps(questions)],
                env={**environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self._running.add(process)
            return process

    def _ended(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._running.discard(process)
        _end(process)
        process.wait()


def _lines(process: subprocess.Popen[str], timeout: float) -> Iterator[str]:
    """What the process says, until it ends or says nothing for `timeout` seconds."""
    said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    out = process.stdout
    assert out is not None

    def read() -> None:
        with out:
            for line in out:
                said.put(line)
        said.put(None)

    threading.Thread(target=read, daemon=True).start()
    with contextlib.suppress(queue.Empty):
        while (line := said.get(timeout=timeout)) is not None:
            yield line


def _answer(line: str) -> tuple[int, Answer] | None:
    """The number of a question and its answer; None for what an import prints."""
    try:
        given = json.loads(line)
        return int(given.pop("question")), Answer(**given)
    except (ValueError, TypeError, AttributeError, KeyError):
        return None


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _death(code: int, stderr: str) -> str:
    last = (stderr.strip().splitlines() or ["nothing on stderr"])[-1]
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"the process died ({how}): {last}"
