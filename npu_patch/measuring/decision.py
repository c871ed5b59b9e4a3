"""What `tune` decides: for the calls of one bucket of shapes at one site, the fastest right way, and by what times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from npu_patch.serving.case import Measured
from npu_patch.serving.signature import Signature

ORIGINAL = "original"
DECLINES = "does not take it: "  # of a way that is not wrong, and no choice for these shapes
DTYPES = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}


@dataclass(frozen=True)
class Decision:
    """`signature`: of an op's calls; `choice`: an implementation's name or "original"; `measured`: by those names."""

    patch: str
    site: str
    variant: str
    signature: Signature
    choice: str
    measured: Mapping[str, Measured] = field(default_factory=dict)

    @property
    def where(self) -> tuple[str, str, str]:
        return self.patch, self.site, self.variant

    @property
    def words(self) -> str:
        """For the report."""
        timed = {name: each.seconds for name, each in self.measured.items() if each.seconds is not None}
        own = timed.pop(ORIGINAL, None)
        if self.choice != ORIGINAL:
            chosen = timed.get(self.choice)
            gain = "" if own is None or chosen is None else f" faster, {own / chosen:.1f} x"
            return f"tuned: {self.choice}{gain}"
        if own is None or not timed:
            return "tuned: original"
        best = min(timed.values())
        return f"tuned: original faster, {best / own:.1f} x" if best > own else "tuned: original, none clearly faster"

    def as_json(self) -> dict[str, Any]:
        signature = [[str(kind), list(shape)] for kind, shape in self.signature]
        return {**vars(self), "signature": signature, "measured": plain(self.measured)}

    @classmethod
    def of_json(cls, content: Any) -> Decision:
        """Raises `ValueError`, `KeyError` or `TypeError` for what is none."""
        if not isinstance(content, dict):
            raise ValueError(f"a decision is {content!r}")
        texts = [content[name] for name in ("patch", "site", "variant", "choice")]
        if not all(isinstance(each, str) for each in texts):
            raise ValueError(f"a decision has {texts}")
        patch, site, variant, choice = texts
        signature = tuple(
            (DTYPES.get(str(kind), str(kind)), tuple(map(int, shape))) for kind, shape in content["signature"]
        )
        return cls(patch, site, variant, signature, choice, measured_of(content["measured"]))


def agreed(decisions: Sequence[Decision]) -> list[Decision]:
    """Calls of unlike shapes in one bucket get what is right and faster for all of them: the one choice, or the
    original."""
    choices: dict[tuple[Any, ...], set[str]] = {}
    for each in decisions:
        choices.setdefault((each.where, each.signature), set()).add(each.choice)
    return [
        each if len(choices[each.where, each.signature]) == 1 else replace(each, choice=ORIGINAL) for each in decisions
    ]


def plain(measured: Mapping[str, Measured]) -> dict[str, Any]:
    return {name: {**vars(each)} for name, each in measured.items()}


def measured_of(content: Mapping[str, Mapping[str, Any]]) -> dict[str, Measured]:
    """Raises `ValueError` and the like for what `plain` did not make."""
    return {name: _measured(**each) for name, each in content.items()}


def _measured(wrong: Any, seconds: Any, quartiles: Any) -> Measured:
    fine = (wrong is None or isinstance(wrong, str)) and not (wrong is not None and seconds is not None)
    fine = fine and all(isinstance(each, float) and 0.0 < each < float("inf") for each in _numbers(seconds, quartiles))
    if not fine or not (quartiles is None or (seconds is not None and len(quartiles) == 2)):
        raise ValueError(f"no measurement: wrong={wrong!r}, seconds={seconds!r}, quartiles={quartiles!r}")
    return Measured(wrong, seconds, None if quartiles is None else (quartiles[0], quartiles[1]))


def _numbers(seconds: Any, quartiles: Any) -> list[Any]:
    return [*([] if seconds is None else [seconds]), *(quartiles or ())]
