"""Whether torch, once imported, calls `autoload` in this installation and environment; and what keeps it from that."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence

GROUP, NAME = "torch.backends", "npu_patch"
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
FIRST_TORCH = (2, 5)  # that calls the group's entry points


def why_no_entry(entries: Sequence[str], torch: tuple[int, ...] | None, environ: Mapping[str, str]) -> str | None:
    """`entries`: names in the group, as installed distributions declare them; `torch`: its release."""
    if environ.get(AUTOLOAD, "1") != "1":
        return f"{AUTOLOAD}={environ[AUTOLOAD]!r} keeps torch from calling it"
    if NAME not in entries:
        return f"no installed distribution declares the entry point {NAME} of {GROUP}: pip install npu_patch"
    if torch is not None and torch[:2] < FIRST_TORCH:
        return f"torch {'.'.join(map(str, torch))} calls no entry points; {'.'.join(map(str, FIRST_TORCH))} does"
    return None


def why_no_entry_here() -> str | None:
    entries = [entry.name for entry in importlib.metadata.entry_points(group=GROUP)]
    try:
        numbers = importlib.metadata.version("torch").split("+")[0].split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        numbers = []
    torch = tuple(int(number) for number in numbers if number.isdecimal())
    return why_no_entry(entries, torch or None, os.environ)
