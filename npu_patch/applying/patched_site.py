"""What stands at a site, and whether it stands there still: others may bind it anew after `apply()`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch

from npu_patch.patches.patch import Replacement
from npu_patch.reporting.outcome import SKIPPED, Outcome
from npu_patch.sites.sites import BoundForward, Site, bound_forward, defining_class
from npu_patch.sites.whose import holds, whose
from npu_patch.switches import Switches

# Where transformers keeps the entries of one process, which come before those of a registry.
OVERRIDES = (
    ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
    ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
    ("transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS"),
)


@dataclass
class PatchedSite:
    """One patch's at a site. `around`: it stands around what it found there, be that another patch's."""

    site: Site
    replacement: Replacement
    outcome: Outcome
    around: bool
    switches: Switches  # it was made under


Stack = Sequence[PatchedSite]  # of one site, the last one around the others


def why_not_run(stack: Stack) -> str | None:
    """Who bound a site anew, if that leaves its replacement out. One that is wrapped may be called still."""
    site, function = stack[-1].site, stack[-1].replacement.function
    present = _present(site)
    present = present.__func__ if isinstance(present, MethodType) else present
    if present is function or holds(present, function):
        return None
    return f"bound anew by {whose(present)}: this patch no longer runs"


def _present(site: Site) -> Any:
    """What is found there now."""
    if not isinstance(site.owner, Mapping):
        return vars(site.owner).get(site.name)
    for module, name in OVERRIDES:
        registry: Any = getattr(sys.modules.get(module), name, None)
        if getattr(registry, "_global_mapping", None) is site.owner and site.name in registry._local_mapping:
            return registry._local_mapping[site.name]
    return site.owner.get(site.name)


def own_forwards(
    model: torch.nn.Module, patched: Mapping[tuple[int, str], Stack]
) -> Iterator[tuple[torch.nn.Module, Stack, BoundForward]]:
    """Live layers that keep a forward in the place of their class's, which is patched."""
    for module in model.modules():
        stack = patched.get((id(defining_class(module)), "forward"))
        if stack is not None:
            bound = bound_forward(module, (stack[0].site.original, stack[-1].replacement.function))
            if bound is not None:
                yield module, stack, bound


def as_they_stand(outcomes: Iterable[Outcome], stacks: Iterable[Stack]) -> list[Outcome]:
    """The outcomes; and of each site that somebody bound anew, found again or not, one that says so."""
    lost = {id(held.outcome): (held.outcome, why) for stack in stacks if (why := why_not_run(stack)) for held in stack}
    found = [each for each in outcomes if id(each) not in lost]
    return found + [replace(each, status=SKIPPED, reason=why) for each, why in lost.values()]
