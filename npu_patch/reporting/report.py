"""The report of an `apply()`: what a user prints, reads and saves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from npu_patch.reporting.outcome import Outcomes
from npu_patch.reporting.page import page_of_report
from npu_patch.reporting.text import headline, text_of_report


class Report(Outcomes):
    """The outcomes of an `apply()`. Counters are live: print it again after a forward pass."""

    def json(self, indent: int | None = 2) -> str:
        content = {
            "device": self.device,
            "nothing_because": self.nothing_because,
            "notes": self.remarks,
            "warnings": self.warnings,
            "outcomes": [outcome.as_dict() for outcome in self.outcomes],
        }
        return json.dumps(content, indent=indent)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as one HTML page that needs nothing else; written to the file `path` too, if there is one."""
        page = page_of_report(self)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def headline(self) -> str:
        """What became of everything, in one line."""
        return headline(self)

    def write(self, path: str | os.PathLike[str]) -> None:
        """To a file, as JSON, as a page or as text: by its ending."""
        forms: dict[str, Callable[[], str]] = {".json": self.json, ".html": self.to_html}
        Path(path).write_text(forms.get(Path(path).suffix.lower(), self.__str__)() + "\n", encoding="utf-8")

    def __str__(self) -> str:
        """A table of at most 100 columns, whatever the model."""
        return text_of_report(self)
