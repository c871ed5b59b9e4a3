"""transformers' continuous batching: `generate_batch`, which trl's trainers call for their rollouts.

Rebinds    in transformers.generation.continuous_batching what decides about graphs, tables of pages, streams and
           memory, and how a manager lives; `AttentionInterface['flash_attention_2']`; what tells whether a stream is
           captured, and what looks for packed sequences.
To         the same, with this device's graphs, its attention over pages, and lengths that the host knows anyway: a
           step of single tokens is one replay. Models with sdpa or eager attention take flash attention meanwhile.
           A manager and its graphs are kept for the next call that asks for the same.
Not when   transformers has other continuous batching than 5.23. The way of all others is taken for sliding windows,
           float32, pages and caches that the operator does not take; the original for softcap and tensor parallelism.
Delete     when transformers has NPUs among the devices of its own graphs and block tables.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from npu_patch.numerics.error_text import error_text
from npu_patch.ops.attention.op import ATTENTION
from npu_patch.ops.attention.paged import DTYPES, PAGED_ATTENTION
from npu_patch.ops.attention.paged_cases import case
from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.patches.attention.checked import Attend
from npu_patch.patches.attention.flash import read_flash
from npu_patch.patches.head_sizes import head_sizes
from npu_patch.patches.inference.continuous_batching import attend, graphs, kept, resolving, step
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.probe.attention import REGISTRY
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import Case
from npu_patch.serving.dispatch import Dispatch
from npu_patch.serving.implementation import choose
from npu_patch.serving.replacement import TakenOver, replacement_for
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import LiveModules, Site, innermost
from npu_patch.sites.whose import OWN, package
from npu_patch.waiting.as_flash import FLASH

PACKAGE = "transformers.generation.continuous_batching"
Serve = Callable[..., Any]


@dataclass(frozen=True)
class Door:
    """`name` in a module, or in a class or mapping of it, by its dotted path. `serve(original, device_type, calls)`
    makes the function that serves it; `value(original, device_type)` what takes its place, where that is none."""

    where: str
    within: str | None
    name: str
    serve: Callable[[Serve, str, Any], Serve] | None = None
    value: Callable[[Any, str], Any] | None = None

    @property
    def described(self) -> str:
        return ".".join(part for part in (self.where, self.within, self.name) if part)

    def owner(self) -> Any:
        module = importlib.import_module(self.where)
        return module if self.within is None else getattr(module, self.within)

    def site(self, device_type: str) -> Site:
        """
        Raises:
            ImportError, AttributeError, KeyError: this transformers has no such door.
        """
        owner = self.owner()
        if isinstance(owner, MutableMapping):
            return Site(owner, device_type, owner.get(device_type), self.described)
        return Site(owner, self.name, vars(owner)[self.name], self.described)


def _steps(original: Serve, device_type: str, calls: Calls) -> Serve:
    def compute_batch(self: Any, model: Any, batch_data: dict[str, Any]) -> Any:
        with step.within(step.step_of(self, batch_data)):
            return original(self, model, batch_data)

    return compute_batch


def _no_packing(original: Serve, device_type: str, calls: Calls) -> Serve:
    """Whose batches are packed has said so: transformers would read the position ids of each step."""
    return lambda position_ids: TakenOver(original(position_ids)) if step.running() is None else None


def _doors() -> tuple[Door, ...]:
    api, runner, inputs, initial, cache, utils = (
        f"{PACKAGE}.{name}"
        for name in ("continuous_api", "model_runner", "input_outputs", "initialization", "cache", "utils")
    )
    manager, runs = "ContinuousBatchingManager", "ModelRunner"
    return (
        Door(runner, runs, "compute_batch", _steps),
        Door(runner, runs, "_capture_graph", graphs.serve_capturing_step),
        Door(utils, "DEVICE_TYPE_TO_GRAPH_NAME", "", value=lambda original, device_type: graphs.NAME),
        Door(
            inputs,
            "ContinuousBatchingAsyncIOs",
            "_supported_device_types",
            value=lambda original, device_type: (*original, device_type),
        ),
        Door(runner, None, "create_accelerator_graph", graphs.serve_graph),
        Door(runner, None, "accelerator_graph_capture_context", graphs.serve_capture),
        Door(initial, None, "ensure_decode_fast_path_is_available", resolving.serve_fast_path),
        Door(initial, None, "decide_use_cuda_graphs", resolving.serve_graphs),
        Door(cache, "PagedAttentionCache", "__init__", resolving.serve_cache),
        Door(cache, None, "get_device_and_memory_breakdown", resolving.serve_memory),
        Door(api, manager, "switch_to_cb_friendly_attn", resolving.serve_switch),
        Door(api, "ContinuousMixin", "continuous_batching_context_manager", kept.serve),
        Door("transformers.utils.import_utils", None, "is_cuda_stream_capturing", graphs.serve_is_capturing),
        Door("transformers.masking_utils", None, "find_packed_sequence_indices", _no_packing),
    )


DOORS = {door.described: door for door in _doors()}
NAMED = AsNamed("continuous batching")  # one line of the report for all of them
ATTENDING = f"AttentionInterface['{FLASH}'] of a paged cache"
(DEVICE_TYPE,) = PAGED_ATTENTION.implementations[0].device_types


def registered() -> Iterable[Site]:
    """All of them or none."""
    from transformers.modeling_utils import AttentionInterface

    try:
        entries = AttentionInterface._global_mapping
        sites = [*(door.site(DEVICE_TYPE) for door in DOORS.values()), Site(entries, FLASH, entries[FLASH], ATTENDING)]
    except (ImportError, AttributeError, KeyError) as absent:
        return (Site(PACKAGE, "", None, f"{PACKAGE}: {error_text(absent)}"),)
    return sites


def read_site(site: Site) -> AsNamed | NotRead:
    if site.owner is PACKAGE:
        return NotRead("this transformers has no such continuous batching, 5.23 does", in_order=True)
    if site.described == ATTENDING:
        found = read_flash(site.original)
        return found if isinstance(found, NotRead) else NAMED
    if DOORS[site.described].value is None and package(innermost(site.original)) not in ("transformers", OWN):
        return NotRead("it is not transformers' own")
    return NAMED


def _checks(live: LiveModules) -> Iterator[Case]:
    """For the layers that look attention up by its name, whatever that is now."""
    layers = [each for each in live if REGISTRY in names_used(type(each).forward)]
    if live.dtype in DTYPES:
        for sizes in head_sizes(layers, live):
            yield case(sizes.heads, sizes.key_heads, sizes.head_dim, live.dtype)


def bind_site(site: Site, reading: AsNamed, context: Context) -> Replacement | NotRead:
    calls = Calls()
    if site.described == ATTENDING:
        packed = Dispatch(ATTENTION, choose(ATTENTION.implementations, context.device_type))
        dispatch = context.dispatch(_checks)
        serving = attend.Serving(dispatch, Attend(packed, calls), calls, context.device_type)
        serve: Serve = attend.serve(site.original, serving)
        function = replacement_for(site.original, calls, serve, bypassed=Bypassed())
        return Replacement(function, NAMED.name, calls, dispatch=dispatch)
    door = DOORS[site.described]
    if door.value is not None:
        return Replacement(door.value(site.original, context.device_type), reading.name, calls)
    assert door.serve is not None
    calls = kept.KeepingCalls() if door.serve is kept.serve else calls
    serve = door.serve(site.original, context.device_type, calls)
    return Replacement(replacement_for(site.original, calls, serve, bypassed=Bypassed()), reading.name, calls)


PATCH = Patch(
    "generate_batch",
    "continuous_batching",
    PAGED_ATTENTION,
    lambda module: (),
    read_site,
    bind_site,
    registered,
    layers=lambda site, context: None,
    tunable=False,
    further_ops=(ATTENTION,),
    around=True,
)
