"""Packed sequences whose boundaries a gated delta net is never told: refused, before states leak between samples.

A model knows that it was given packed sequences by `cu_seq_lens_q`, by `seq_idx` or by position ids that start anew.
Whether its linear attention layers hear of it depends on the version of transformers: of position ids never, before 5.9
of nothing, up to 5.14 the convolution of `seq_idx` and the rule of `cu_seq_lens_q`. So what the model was given is
remembered while its forward runs, and a call of the rule or the convolution that comes without boundaries is compared
with it. (Not while checkpointing recomputes in backward: the forward was checked.)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from npu_patch import devices
from npu_patch.ops.readings import AsNamed
from npu_patch.patches.patch import Replacement
from npu_patch.serving.calls import Calls
from npu_patch.serving.implementation import Choice, Implementation
from npu_patch.serving.once_per_step import OncePerTensor
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import Site, forwards, innermost

REMEDY = (
    "Pass both seq_idx and cu_seq_lens_q to a model of transformers 5.9 or newer, as "
    "DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True) does"
)
WATCHED = AsNamed("packed sequences that its layers are not told of")
_REFUSED = Implementation("refused", devices.TYPES, run=lambda: None, unsupported=lambda: None)
# The arguments of the model whose forward is running in this thread.
_GIVEN: ContextVar[Mapping[str, Any] | None] = ContextVar("npu_patch packed sequences", default=None)
_RESTARTS = OncePerTensor()


def find(module: ModuleType, candidates: Iterable[str]) -> Iterator[Site]:
    """The forwards of the models made of layers that use one of the functions `candidates`."""
    classes = {site.owner.__name__: site for site in forwards(module)}
    used = {name: names_used(vars(site.owner).get("__init__")) for name, site in classes.items()}
    candidates = set(candidates)
    nets = {name for name, site in classes.items() if candidates & (used[name] | names_used(innermost(site.original)))}
    layers = {name for name in classes if nets & used[name]}
    for name, site in classes.items():
        parameters = inspect.signature(innermost(site.original)).parameters
        if layers & used[name] and {"position_ids", "inputs_embeds"} <= parameters.keys():
            yield site


def watch(site: Site) -> Replacement:
    """The model's own forward, whose arguments are remembered while it runs."""
    calls = Calls()
    original = site.original
    names = [*inspect.signature(innermost(original)).parameters][1:]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not calls.active or torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        calls.ran += 1
        token = _GIVEN.set({**dict(zip(names, args, strict=False)), **kwargs})
        try:
            return original(self, *args, **kwargs)
        finally:
            _GIVEN.reset(token)

    choice = Choice(_REFUSED, {})
    return Replacement(forward, WATCHED.name, calls, choice)


def refuse_if_untold(op: str) -> None:
    """For a call of `op` that was given no boundaries.

    Raises:
        ValueError: if the model whose forward is running was given packed sequences. Never while being compiled: what
            the model was given is no part of the graph.
    """
    if torch.compiler.is_compiling():
        return
    given = _GIVEN.get()
    sign = None if given is None else sign_of_packing(given)
    if sign is not None:
        raise ValueError(
            f"packed sequences would leak into each other: the model was given some ({sign}), the {op} of its gated "
            f"delta nets is not told where they end. {REMEDY}"
        )


def sign_of_packing(given: Mapping[str, Any]) -> str | None:
    """The host reads at most one flag per step, and none unless position ids or `seq_idx` are given to a call whose
    layers do not receive boundaries."""
    lengths = given.get("cu_seq_lens_q")
    if isinstance(lengths, Tensor) and lengths.shape[0] > 2:
        return "cu_seq_lens_q"
    if _any(given.get("seq_idx"), lambda index: index[..., 1:] != index[..., :-1]):
        return "seq_idx"
    # As in transformers: beside a mask or a cache, position ids do not mean packed sequences.
    alone = given.get("attention_mask") is None and given.get("past_key_values") is None
    return "position_ids" if alone and _any(given.get("position_ids"), _starts_anew) else None


def _any(tensor: Any, where: Callable[[Tensor], Tensor]) -> bool:
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.shape[-1] < 2:
        return False
    return _RESTARTS.of((tensor,), lambda: bool(where(tensor).any()))


def _starts_anew(position_ids: Tensor) -> Tensor:
    """position_ids `[B, T]`, `[4, B, T]` whose first row counts text, or `[3, B, T]` in which an image stands still."""
    if position_ids.dim() == 3:
        position_ids = position_ids[0]
        return position_ids.diff(dim=-1) < 0
    return position_ids.diff(dim=-1) <= 0
