"""The decisions of `python -m npu_patch tune`, in a file of measurements (measurements.py), as `apply()` follows them.

    TWINKLE_NPU_TUNE=tuned.json python train.py

A call of an op whose shapes are in the file, up to their buckets, goes where the file says (`Dispatch.tuned`), another
one where it went anyway. Times hold for one chip and one set of versions: a file from another is refused, with the
reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from npu_patch.measuring.decision import ORIGINAL, Decision, agreed
from npu_patch.measuring.measured_on import here
from npu_patch.measuring.measurements import FromElsewhere, Measurements
from npu_patch.serving.implementation import AnyImplementation
from npu_patch.serving.signature import Signature, signature_of

__all__ = ["Decision", "Forced", "Signature", "agreed", "content_of", "followed", "signature_of", "write"]
Decided = AnyImplementation | str | None


def write(path: str | os.PathLike[str], device_type: str, decisions: Iterable[Decision]) -> None:
    """What else the file holds of this device stays. Raises `OSError` where it cannot be written."""
    file = Measurements.read(Path(path), here(torch.device(device_type)))
    file.decisions = list(decisions)
    file.save()


def content_of(path: str) -> Any:
    """Raises `ValueError` for a file that cannot be read as JSON; names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _no_tuning_file(path, error) from error


def followed(
    path: str, content: Any, device_type: str, accepted: Mapping[str, Collection[str]] | None = None
) -> Measurements | str:
    """The file with that content, or why it is not followed here. `accepted`: by the names of all patches, the
    implementations that may be chosen; none where it is not tunable.

    Raises:
        ValueError: for what `tune` did not write; names it.
    """
    try:
        found = Measurements.of(content, Path(path), here(torch.device(device_type)))
    except FromElsewhere as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_tuning_file(path, error) from error
    return found if accepted is None else _why_unacceptable(found.decisions, accepted) or found


def _no_tuning_file(path: str, error: Exception) -> ValueError:
    return ValueError(
        f"TWINKLE_NPU_TUNE={path!r}: accepted is a file that python -m npu_patch tune wrote "
        f"({type(error).__name__}: {error})"
    )


def _why_unacceptable(decisions: Iterable[Decision], accepted: Mapping[str, Collection[str]]) -> str | None:
    decided = sorted({(each.patch, each.choice) for each in decisions})
    patches = list(dict.fromkeys(patch for patch, _ in decided))
    unknown = [patch for patch in patches if patch not in accepted]
    if unknown:
        return f"it decides on {', '.join(unknown)}; this npu_patch has {', '.join(accepted)}"
    fixed = [patch for patch in patches if not accepted[patch]]
    if fixed:
        tunable = [patch for patch, choices in accepted.items() if choices]
        return f"it decides on {', '.join(fixed)}, which cannot be tuned; what can is {', '.join(tunable)}"
    for patch, choice in decided:
        if choice not in (ORIGINAL, *accepted[patch]):
            return f"it chooses {choice} for {patch}; accepted are {', '.join((ORIGINAL, *accepted[patch]))}"
    return None


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
