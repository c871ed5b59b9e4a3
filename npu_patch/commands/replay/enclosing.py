"""Calls of a site that come to an end elsewhere, as calls of the layer that they are within."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from npu_patch.applying.patched_site import PatchedSite
from npu_patch.commands.replay.recording import Call, Recording, note
from npu_patch.measuring.decision import ORIGINAL
from npu_patch.measuring.tuning import Forced
from npu_patch.serving.dispatch import AnyDispatch

Known = dict[tuple[Any, ...], Call]


@contextlib.contextmanager
def layers_recorded(model: torch.nn.Module, sites: Iterable[PatchedSite]) -> Iterator[Recording]:
    """What the layers around each site are called with; complete at the end."""
    recording = Recording()
    by_class: list[tuple[PatchedSite, dict[type, Known]]] = []
    with contextlib.ExitStack() as hooks:
        for held in sites:
            known: dict[type, Known] = {}
            by_class.append((held, known))
            for layer in filter(partial(_is_around, held), model.modules()):
                hook = partial(_record, known.setdefault(type(layer), {}))
                hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield recording
    for held, known in by_class:
        recording.calls[id(held)] = {(cls, *key): call for cls, of in known.items() for key, call in of.items()}


def _is_around(held: PatchedSite, layer: torch.nn.Module) -> bool:
    within = held.replacement.within
    if within is None:
        return any(isinstance(each, held.site.owner) for each in layer.children())
    return isinstance(layer, within)


def _record(known: Known, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    note(known, (layer, *args), kwargs)


def as_layer(held: PatchedSite, dispatch: AnyDispatch) -> PatchedSite:
    """The site by calls of the layer around it: its replacement there, or for the original another decision."""

    def replaced(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return layer(*args, **kwargs)

    def original(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        before, dispatch.tuned = dispatch.tuned, Forced(ORIGINAL)
        try:
            return layer(*args, **kwargs)
        finally:
            dispatch.tuned = before

    replacement = replace(held.replacement, function=replaced, definition=None, alone=True)
    return replace(held, site=replace(held.site, original=original), replacement=replacement)
