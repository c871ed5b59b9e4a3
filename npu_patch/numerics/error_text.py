"""An exception in a reason of the report: its type and its first line, cut between words where that is long."""

from __future__ import annotations

import textwrap

LONGEST = 160


def error_text(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return textwrap.shorten(text, LONGEST, placeholder=" ...")
