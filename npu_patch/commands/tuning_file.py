"""Whether TWINKLE_NPU_TUNE names a file that `apply()` would read, told without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from npu_patch.switches import TUNE


def content_of(path: str) -> Mapping[str, Any]:
    """
    Raises:
        ValueError: for a file that cannot be read or that `tune` did not write; names it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        decisions = [(each["patch"], each["variant"], each["choice"]) for each in content["decisions"]]
        return {
            "format": content["format"],
            "chip": content["chip"],
            "versions": dict(content["versions"]),
            "decisions": decisions,
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{TUNE}={path!r}: accepted is a file that python -m npu_patch tune wrote ({type(error).__name__}: {error})"
        ) from error
