"""A script, a program that is one (torchrun, accelerate) or a module, run in this process as `python` runs it."""

from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


class NoProgram(Exception):
    """There is none of that name, or it is not Python's."""


def found(script: str) -> str:
    """Where the script is, or the program of that name.

    Raises:
        NoProgram: naming it.
    """
    if Path(script).is_file():
        return script
    program = shutil.which(script, path=str(Path(sys.executable).parent)) or shutil.which(script)
    if program is None:
        raise NoProgram(f"no such script: {script}")
    with open(program, "rb") as file:
        first = file.read(200)
    if not first.startswith(b"#!") or b"python" not in first:
        raise NoProgram(f"{program} is no Python script")
    return program


def run_script(script: str, arguments: Sequence[str]) -> None:
    """`script`: as given by `found`."""
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


def run_module(module: str, arguments: Sequence[str]) -> None:
    sys.argv = [module, *arguments]
    sys.path[0] = str(Path.cwd())
    runpy.run_module(module, run_name="__main__", alter_sys=True)
