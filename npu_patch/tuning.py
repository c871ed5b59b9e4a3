"""The file that `python -m npu_patch tune` writes and `apply()` reads: by site and shape, the fastest right way.

    TWINKLE_NPU_TUNE=tuned.json python train.py

A call whose shapes are in the file goes where the file says, another one where it went anyway. Times hold for one chip
and one set of versions: a file from another is refused, with the reason.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npu_patch.measured_on import here
from npu_patch.outcome import Calls

FORMAT = 1
ORIGINAL = "original"
Signature = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Decision:
    """For calls of one signature: `choice` is an implementation's name or "original". For people: the times in ms, what
    was refused as wrong, and what declined these shapes."""

    patch: str
    variant: str
    signature: Signature
    choice: str
    times: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    declined: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuning:
    """What a file decides. `refused` says why none of it counts here."""

    decisions: Mapping[tuple[str, str], Mapping[Signature, str]] = field(default_factory=dict)
    refused: str | None = None

    def of(self, patch: str, variant: str) -> Mapping[Signature, str]:
        return self.decisions.get((patch, variant), {})


def write(path: str | os.PathLike[str], device_type: str, decisions: Iterable[Decision]) -> None:
    content = {
        "format": FORMAT,
        **asdict(here(torch.device(device_type))),
        "decisions": [_as_dict(each) for each in decisions],
    }
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _as_dict(decision: Decision) -> dict[str, Any]:
    return {**vars(decision), "signature": [[kind, list(shape)] for kind, shape in decision.signature]}


def read(path: str | os.PathLike[str], device_type: str) -> Tuning:
    """
    Raises:
        ValueError: for a file that cannot be read or that `tune` did not write; names it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return Tuning(refused=f"its format is {content['format']}, this npu_patch reads {FORMAT}")
        why_not = here(torch.device(device_type)).why_not(content)
        decisions: dict[tuple[str, str], dict[Signature, str]] = {}
        for each in content["decisions"]:
            signature = tuple((str(kind), tuple(map(int, shape))) for kind, shape in each["signature"])
            decisions.setdefault((each["patch"], each["variant"]), {})[signature] = str(each["choice"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"TWINKLE_NPU_TUNE={os.fspath(path)!r}: accepted is a file that python -m npu_patch tune wrote "
            f"({type(error).__name__}: {error})"
        ) from error
    return Tuning(decisions, why_not)


def signature_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Signature:
    """Of one call: dtype and shape of each tensor and of each layer's own parameters, the widths of a layer's
    projections, and whether gradients are on."""
    found: list[tuple[str, tuple[int, ...]]] = [("grad" if torch.is_grad_enabled() else "no grad", ())]
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append((str(value.dtype), tuple(value.shape)))
        elif isinstance(value, torch.nn.Module):
            own = (parameter for parameter in value._parameters.values() if parameter is not None)
            found += [(str(parameter.dtype), tuple(parameter.shape)) for parameter in own]
            found += [("projection", widths) for widths in projections_of(value)]
    return tuple(found)


def projections_of(layer: torch.nn.Module) -> list[tuple[int, int]]:
    """The widths in and out of the linear layers directly in `layer`, adapted ones too. A feed-forward layer and a
    wider one of its class are given the same tensors."""
    widths = [
        (vars(each).get("in_features"), vars(each).get("out_features")) for each in layer._modules.values() if each
    ]
    return [pair for pair in widths if isinstance(pair[0], int) and isinstance(pair[1], int)]


def tuned(
    usual: Callable[..., Any],
    original: Callable[..., Any],
    calls: Calls,
    choices: Mapping[Signature, str],
    others: Mapping[str, tuple[Callable[..., Any], Calls]],
) -> Callable[..., Any]:
    """`usual`, but for calls of a signature in `choices` what is chosen there. `others`: by name, implementations that
    are not the usual one, with their counters."""

    @functools.wraps(usual)
    def function(*args: Any, **kwargs: Any) -> Any:
        if not calls.active or torch.compiler.is_compiling():
            return usual(*args, **kwargs)
        choice = choices.get(signature_of(args, kwargs))
        if choice == ORIGINAL:
            calls.fell_through["tuned: the original is the fastest for these shapes"] += 1
            return original(*args, **kwargs)
        if choice not in others:
            return usual(*args, **kwargs)
        other, its_calls = others[choice]
        before = its_calls.fell_through.copy()
        result = other(*args, **kwargs)
        if its_calls.fell_through == before:
            calls.ran += 1
            calls.ran_by[choice] += 1
        calls.fell_through.update(its_calls.fell_through - before)
        return result

    return function
