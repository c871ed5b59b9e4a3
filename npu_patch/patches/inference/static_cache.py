"""Static caches: a single token's keys and values written where the cache's own count says.

Rebinds    `update` of every cache layer of transformers that counts its tokens on the device.
To         two `index_copy_` at the count itself: the original makes a range of one number and adds the count to it, for
           each layer and token.
Not when   the layer keeps anything else (a sliding window's count on the host), before its first use, for several
           tokens, with gradients, under compilation, for a cache on another device.
Delete     when transformers takes the count for the place.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.ops.static_cache import STATIC_CACHE
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.probe.static_cache import COUNT, KEYS, READY, VALUES, read
from npu_patch.serving.calls import Calls
from npu_patch.serving.replacement import Unserved, replacement_for
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import Site

CACHES = "transformers.cache_utils"


def find(module: ModuleType) -> Iterable[Site]:
    """Methods of its classes that write by an index to what they count on the device."""
    for cls in list(vars(module).values()):
        if not isinstance(cls, type) or cls.__module__ != module.__name__:
            continue
        update = vars(cls).get("update")
        if update is not None and {COUNT, "index_copy_"} <= names_used(update):
            yield Site(cls, "update", update)


def read_site(site: Site) -> AsNamed | NotRead:
    return read(site.owner, site.original)


def bind_site(site: Site, reading: AsNamed, context: Context) -> Replacement:
    calls, dispatch, device_type = Calls(), context.dispatch(), context.device_type

    def serve(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = vars(self)
        if not held.get(READY):
            return Unserved("before its first use")
        given = [*args[:2], *(kwargs[name] for name in ("key_states", "value_states")[len(args) :] if name in kwargs)]
        call = [held.get(KEYS), held.get(VALUES), held.get(COUNT), *given]
        if len(call) != 5 or not all(isinstance(each, Tensor) for each in call):
            return Unserved("arguments that are no tensors")
        if call[0].device.type != device_type:
            return Unserved(f"a cache on {call[0].device.type}")
        if torch.compiler.is_compiling():
            return Unserved("being compiled")
        serving = dispatch.serving(calls, *call)
        if isinstance(serving, str):
            return Unserved(serving)
        serving.run(*call)
        return call[0], call[1]

    return Replacement(replacement_for(site.original, calls, serve), "one token", calls, dispatch=dispatch, within=None)


PATCH = Patch(
    "static_cache",
    "inference",
    STATIC_CACHE,
    find,
    read_site,
    bind_site,
    layers=lambda site, context: None,
    tunable=False,
    libraries=(CACHES,),
    called=("StaticLayer",),
)
