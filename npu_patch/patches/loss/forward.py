"""A language model's own forward, with a head whose logits wait for the loss."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from npu_patch.numerics.room import in_quiet_room
from npu_patch.ops.readings import AsNamed
from npu_patch.patches.loss.losses import ends_here
from npu_patch.patches.loss.takers import any_without_labels
from npu_patch.patches.patch import Context, Replacement
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.replacement import TakenOver, Unfused, Unserved, replacement_for
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import Site, rebindable_forwards
from npu_patch.waiting.head_call import layers_of, put_off

LABELS, LOSS, HEAD = "labels", "loss_function", "get_output_embeddings"


def find(module: ModuleType) -> Iterator[Site]:
    """Forwards that take labels, and look up the loss of their model."""
    for site in rebindable_forwards(module):
        takes_labels = LABELS in inspect.signature(site.original).parameters
        if takes_labels and LOSS in names_used(site.original) and hasattr(site.owner, HEAD):
            yield site


def read_site(site: Site) -> AsNamed:
    """Whatever it computes: it computes it still, and logits that wait are the original's to whoever uses them."""
    return AsNamed("with a head whose logits wait")


def bind_site(site: Site, reading: AsNamed, context: Context) -> Replacement:
    original, device_type, calls = site.original, context.device_type, Calls()
    at = list(inspect.signature(original).parameters).index(LABELS) - 1  # among the arguments after self

    def looked_at(by: str) -> None:
        calls.ran -= 1
        calls.fell_through[f"the logits are looked at: {by}"] += 1

    def serve(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return Unserved("being compiled")
        if in_quiet_room():
            return TakenOver(original(self, *args, **kwargs))
        labels = kwargs.get(LABELS, args[at] if len(args) > at else None)
        if labels is None and not any_without_labels():
            return TakenOver(original(self, *args, **kwargs))  # its logits are what is asked for: no call of this patch
        if labels is not None and not ends_here(self.loss_function):
            return Unserved(f"its loss is {getattr(self.loss_function, '__qualname__', 'another')}, which is not known")
        head = getattr(self, HEAD)()
        layers = "it has no head" if head is None else layers_of(head)
        if isinstance(layers, str):
            return Unserved(layers)
        with put_off(head, layers, device_type, looked_at, _embeddings_of(self)) as call:
            result = original(self, *args, **kwargs)
        return result if call.waited else Unfused(result, call.why_not or "it does not call its head")

    function = replacement_for(original, calls, serve, bypassed=Bypassed())
    return Replacement(function, reading.name, calls, alone=False)


def _embeddings_of(model: torch.nn.Module) -> Any:
    found: Any = getattr(model, "get_input_embeddings", lambda: None)
    try:
        return found()
    except NotImplementedError:
        return None
