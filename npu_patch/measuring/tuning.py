"""The file that `python -m npu_patch tune` writes and `apply()` reads: by site and shape, the fastest right way.

    TWINKLE_NPU_TUNE=tuned.json python train.py

A call of an op whose shapes are in the file, up to their buckets, goes where the file says (`Dispatch.tuned`), another
one where it went anyway; a site whose every measured shape was fastest as the original is not rebound. Times hold for
one chip and one set of versions: a file from another is refused, with the reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from npu_patch.measuring.atomic_file import write_atomically
from npu_patch.measuring.measured_on import here
from npu_patch.serving.implementation import AnyImplementation
from npu_patch.serving.signature import Signature, signature_of

FORMAT = 5
ORIGINAL = "original"
__all__ = ["Decision", "Forced", "Signature", "Tuning", "agreed", "read", "signature_for_json", "signature_of", "write"]
Decided = AnyImplementation | str | None
DTYPES = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}


@dataclass(frozen=True)
class Decision:
    """For an op's calls of one signature at one site: `choice` is an implementation's name or "original". For people:
    the times in ms (medians, and their quartiles), what was refused as wrong, and what declined these shapes."""

    patch: str
    site: str
    variant: str
    signature: Signature
    choice: str
    times: Mapping[str, float] = field(default_factory=dict)
    quartiles: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    declined: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuning:
    """What a file decides, by patch, site and variant. `refused` says why none of it counts here."""

    decisions: Mapping[tuple[str, str, str], Mapping[Signature, str]] = field(default_factory=dict)
    refused: str | None = None

    def of(self, patch: str, site: str, variant: str) -> Mapping[Signature, str]:
        return self.decisions.get((patch, site, variant), {})

    @property
    def count(self) -> int:
        return sum(map(len, self.decisions.values()))

    @property
    def choices(self) -> set[tuple[str, str]]:
        """Each implementation chosen somewhere, as (patch, name)."""
        named = ((key[0], choice) for key, found in self.decisions.items() for choice in found.values())
        return {pair for pair in named if pair[1] != ORIGINAL}


def write(path: str | os.PathLike[str], device_type: str, decisions: Iterable[Decision]) -> None:
    content = {
        "format": FORMAT,
        **asdict(here(torch.device(device_type))),
        "decisions": [{**vars(each), "signature": signature_for_json(each.signature)} for each in decisions],
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def agreed(decisions: Sequence[Decision]) -> list[Decision]:
    """Calls of unlike shapes in one bucket get what is right and faster for all of them: the one choice, or the
    original."""
    choices: dict[tuple[str, str, str, Signature], set[str]] = {}
    for each in decisions:
        choices.setdefault(_call_of(each), set()).add(each.choice)
    return [each if len(choices[_call_of(each)]) == 1 else replace(each, choice=ORIGINAL) for each in decisions]


def _call_of(decision: Decision) -> tuple[str, str, str, Signature]:
    return decision.patch, decision.site, decision.variant, decision.signature


def signature_for_json(signature: Signature) -> list[list[Any]]:
    return [[str(kind), list(shape)] for kind, shape in signature]


def read(
    path: str | os.PathLike[str], device_type: str, accepted: Mapping[str, Collection[str]] | None = None
) -> Tuning:
    """`accepted`: by the names of all patches, the implementations that may be chosen; none where it is not tunable.

    Raises:
        ValueError: for a file that cannot be read or that `tune` did not write; names it.
    """
    try:
        content = _checked(json.loads(Path(path).read_text(encoding="utf-8")))
        if content["format"] != FORMAT:
            return Tuning(refused=f"its format is {content['format']}, this npu_patch reads {FORMAT}")
        decisions: dict[tuple[str, str, str], dict[Signature, str]] = {}
        for each in content["decisions"]:
            key, signature, choice = _decision(each)
            decisions.setdefault(key, {})[signature] = choice
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"TWINKLE_NPU_TUNE={os.fspath(path)!r}: accepted is a file that python -m npu_patch tune wrote "
            f"({type(error).__name__}: {error})"
        ) from error
    refused = here(torch.device(device_type)).why_not(content)
    tuning = Tuning(decisions)
    return replace(tuning, refused=refused or _why_unacceptable(tuning, accepted))


def _why_unacceptable(tuning: Tuning, accepted: Mapping[str, Collection[str]] | None) -> str | None:
    if accepted is None:
        return None
    decided = sorted({patch for patch, _, _ in tuning.decisions})
    unknown = [patch for patch in decided if patch not in accepted]
    if unknown:
        return f"it decides on {', '.join(unknown)}; this npu_patch has {', '.join(accepted)}"
    fixed = [patch for patch in decided if not accepted[patch]]
    if fixed:
        tunable = [patch for patch, choices in accepted.items() if choices]
        return f"it decides on {', '.join(fixed)}, which cannot be tuned; what can is {', '.join(tunable)}"
    for patch, choice in sorted(tuning.choices):
        if choice not in accepted[patch]:
            return f"it chooses {choice} for {patch}; accepted are {', '.join((ORIGINAL, *accepted[patch]))}"
    return None


def _checked(content: Any) -> dict[str, Any]:
    """The content, if it has the parts of a tuning file."""
    if not isinstance(content, dict):
        raise ValueError(f"an object is wanted, not {type(content).__name__}")
    if content["format"] == FORMAT:
        for name, kind in (("chip", str), ("versions", dict), ("decisions", list)):
            if not isinstance(content[name], kind):
                raise ValueError(f"{name!r} is {content[name]!r}")
    return content


def _decision(content: Any) -> tuple[tuple[str, str, str], Signature, str]:
    if not isinstance(content, dict):
        raise ValueError(f"a decision is {content!r}")
    patch, site, variant, choice = texts = [content[name] for name in ("patch", "site", "variant", "choice")]
    if not all(isinstance(each, str) for each in texts):
        raise ValueError(f"a decision has {texts}")
    signature = tuple(
        (DTYPES.get(str(kind), str(kind)), tuple(map(int, shape))) for kind, shape in content["signature"]
    )
    return (patch, site, variant), signature, choice


class Forced(dict[Signature, Decided]):
    """In the place of a file's decisions: one for every call, and then the signatures that were asked for."""

    def __init__(self, decided: Decided) -> None:
        super().__init__()
        self._decided = decided

    def __bool__(self) -> bool:
        return True

    def __contains__(self, signature: Any) -> bool:
        self[signature] = self._decided
        return True
