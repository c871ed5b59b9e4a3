"""stdout belongs to the answer: with `--json` nothing else reaches it, and a reader who left is no fault."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

from npu_patch.commands.console.result import CommandError


@contextlib.contextmanager
def kept_for_the_answer() -> Iterator[None]:
    """What anything prints meanwhile goes to stderr: Python, libraries in C, and processes that are started."""
    with contextlib.redirect_stdout(sys.stderr):
        _flush()
        try:
            stdout = os.dup(1)
        except OSError:  # closed
            yield
            return
        try:
            os.dup2(2, 1)
            yield
        finally:
            _flush()
            os.dup2(stdout, 1)
            os.close(stdout)


def _flush() -> None:
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    ctypes.CDLL(None).fflush(None)


def write(text: str) -> None:
    """
    Raises:
        CommandError: where it cannot be written: a full disk. A pipe that nobody reads any more is none.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        close()
    except OSError as error:
        close()
        raise CommandError(f"its answer cannot be written to stdout: {error.strerror or error}") from error


def close() -> None:
    """Nothing more is written, nor complained about: what is in buffers, what libraries print at the end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def as_json(content: Any) -> str:
    """Numbers that JSON does not have (infinite, or none) are null."""
    return json.dumps(_in_json(content), indent=2, allow_nan=False)


def _in_json(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _in_json(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_in_json(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
