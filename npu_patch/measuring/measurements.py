"""What was measured and checked on this device with these versions, kept between processes in one JSON file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from npu_patch import log
from npu_patch.measuring.atomic_file import write_atomically
from npu_patch.measuring.measured_on import MeasuredOn
from npu_patch.serving.case import Measured

FORMAT = 2


def default_path(measured_on: MeasuredOn) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.sha256(json.dumps(asdict(measured_on), sort_keys=True).encode()).hexdigest()[:12]
    return Path(cache) / "npu_patch" / f"{re.sub('[^A-Za-z0-9]+', '-', measured_on.chip)}-{digest}.json"


@dataclass
class Measurements:
    """By case, by alternative. `read` ignores, with one line of log, a damaged file and one from elsewhere."""

    path: Path
    measured_on: MeasuredOn
    measured: dict[str, dict[str, Measured]] = field(default_factory=dict)
    changed: bool = False  # since it was read or written

    @classmethod
    def read(cls, path: Path, measured_on: MeasuredOn) -> Measurements:
        found = cls(path, measured_on)
        try:
            found.measured = _parsed(json.loads(path.read_text(encoding="utf-8")), measured_on)
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever stands there, it is measured anew
            log.warning(f"{path} is ignored: {error}")
        return found

    def of(self, case: str, alternative: str) -> Measured | None:
        return self.measured.get(case, {}).get(alternative)

    def keep(self, case: str, alternative: str, measured: Measured) -> None:
        self.measured.setdefault(case, {})[alternative] = measured
        self.changed = True

    def content(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self.measured_on), "measured": _plain(self.measured)}

    def take(self, content: Any) -> str | None:
        """Another process's `content()`, before what is here; or why it does not hold here."""
        try:
            taken = _parsed(content, self.measured_on)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return str(error)
        for case, found in taken.items():
            self.measured.setdefault(case, {}).update(found)
        return None

    def write(self) -> None:
        """Atomically: a reader sees the old file or the new one. One that cannot be written is a line of log."""
        if not self.changed:
            return
        self.changed = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(self.content(), indent=1))
        except OSError as error:
            log.warning(f"times are not kept: {error}")


def _plain(measured: Mapping[str, Mapping[str, Measured]]) -> dict[str, Any]:
    return {case: {name: asdict(each) for name, each in found.items()} for case, found in measured.items()}


def _parsed(content: Any, measured_on: MeasuredOn) -> dict[str, dict[str, Measured]]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"not a file of times in format {FORMAT}")
    why_not = measured_on.why_not(content)
    if why_not is not None:
        raise ValueError(why_not)
    return {
        case: {name: _measured(**each) for name, each in found.items()} for case, found in content["measured"].items()
    }


def _measured(wrong: Any, seconds: Any) -> Measured:
    number = seconds is None or (isinstance(seconds, float) and 0.0 < seconds < float("inf"))
    if not number or not (wrong is None or isinstance(wrong, str)) or (seconds is not None and wrong is not None):
        raise ValueError(f"no measurement: wrong={wrong!r}, seconds={seconds!r}")
    return Measured(wrong, seconds)
