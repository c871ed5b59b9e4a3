"""What was measured and checked on one device with one set of versions, in one JSON file.

`apply()` keeps there what `auto` and the checks of operators found, by case and alternative. `python -m npu_patch tune`
adds what it decided on the calls of each site. Either can be given the other's file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from npu_patch import log
from npu_patch.measuring.atomic_file import write_atomically
from npu_patch.measuring.decision import Decision, measured_of, plain
from npu_patch.measuring.measured_on import MeasuredOn
from npu_patch.serving.case import Measured

FORMAT = 6


class FromElsewhere(ValueError):
    """Its measurements do not hold here."""


def default_path(measured_on: MeasuredOn) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.sha256(json.dumps(asdict(measured_on), sort_keys=True).encode()).hexdigest()[:12]
    return Path(cache) / "npu_patch" / f"{re.sub('[^A-Za-z0-9]+', '-', measured_on.chip)}-{digest}.json"


@dataclass
class Measurements:
    """By case, by alternative; and what was decided. `read` ignores, with one line of log, a damaged file and one from
    elsewhere."""

    path: Path
    measured_on: MeasuredOn
    measured: dict[str, dict[str, Measured]] = field(default_factory=dict)
    decisions: Sequence[Decision] = ()
    changed: bool = False  # since it was read or written

    @classmethod
    def read(cls, path: Path, measured_on: MeasuredOn) -> Measurements:
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")), path, measured_on)
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever stands there, it is measured anew
            log.warning(f"{path} is ignored: {error}")
        return cls(path, measured_on)

    @classmethod
    def of(cls, content: Any, path: Path, measured_on: MeasuredOn) -> Measurements:
        """
        Raises:
            FromElsewhere: where it does not hold.
            ValueError, KeyError, TypeError, AttributeError: for what is none.
        """
        if not isinstance(content, dict):
            raise ValueError(f"an object is wanted, not {type(content).__name__}")
        if content["format"] != FORMAT:
            raise FromElsewhere(f"its format is {content['format']}, this npu_patch reads {FORMAT}")
        for name, kind in (("chip", str), ("versions", dict), ("measured", dict), ("decisions", list)):
            if not isinstance(content[name], kind):
                raise ValueError(f"{name!r} is {content[name]!r}")
        measured = {case: measured_of(found) for case, found in content["measured"].items()}
        decisions = [Decision.of_json(each) for each in content["decisions"]]
        why_not = measured_on.why_not(content)
        if why_not is not None:
            raise FromElsewhere(why_not)
        return cls(path, measured_on, measured, decisions)

    def found(self, case: str, alternative: str) -> Measured | None:
        return self.measured.get(case, {}).get(alternative)

    def keep(self, case: str, alternative: str, measured: Measured) -> None:
        self.measured.setdefault(case, {})[alternative] = measured
        self.changed = True

    def content(self) -> dict[str, Any]:
        measured = {case: plain(found) for case, found in self.measured.items()}
        decisions = [each.as_json() for each in self.decisions]
        return {"format": FORMAT, **asdict(self.measured_on), "measured": measured, "decisions": decisions}

    def take(self, content: Any) -> str | None:
        """What another process measured, before what is here; or why it does not hold here."""
        try:
            taken = self.of(content, self.path, self.measured_on)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return str(error)
        for case, found in taken.measured.items():
            self.measured.setdefault(case, {}).update(found)
        return None

    def save(self) -> None:
        """Atomically: a reader sees the old file or the new one. Raises `OSError` where it cannot be written."""
        write_atomically(self.path, json.dumps(self.content(), indent=1) + "\n")
        self.changed = False

    def save_changes(self) -> None:
        """Where there are any. A file that cannot be written is a line of log."""
        if not self.changed:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.save()
        except OSError as error:
            self.changed = False
            log.warning(f"times are not kept: {error}")
