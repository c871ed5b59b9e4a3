"""The attention op as a site calls it: what was found wrong on this device is passed by."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from npu_patch.ops.attention.call import Attention
from npu_patch.ops.attention.cases import cases
from npu_patch.patches.head_sizes import head_sizes
from npu_patch.probe.attention import REGISTRY
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import Case
from npu_patch.serving.dispatch import Dispatch
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import LiveModules
from npu_patch.waiting.as_flash import FLASH, SEGMENTS


@dataclass(frozen=True)
class Attend:
    dispatch: Dispatch
    calls: Calls

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor | str:
        """The result, or why the call is not served."""
        serving = self.dispatch.serving(self.calls, query, key, value, attention)
        if isinstance(serving, str) and attention.decodes and self.dispatch.wrong:  # by the operator for training, then
            attention = replace(attention, decodes=False)
            serving = self.dispatch.serving(self.calls, query, key, value, attention)
        return serving if isinstance(serving, str) else serving.run(query, key, value, attention)


def checks(name: str, live: LiveModules) -> Iterator[Case]:
    """For the layers whose config asks for the attention `name`, in the model's dtype; under flash attention's also for
    those that are seen as if they did (npu_patch/patches/vision/attention.py)."""
    asking: dict[type, tuple[bool, bool]] = {}  # the registry; and of segments

    def asks(layer: torch.nn.Module) -> bool:
        forward = type(layer).forward
        if type(layer) not in asking:
            by_segments = name == FLASH and SEGMENTS in inspect.signature(forward).parameters
            asking[type(layer)] = REGISTRY in names_used(forward), by_segments
        registry, by_segments = asking[type(layer)]
        asked = getattr(getattr(layer, "config", None), "_attn_implementation", None)
        return registry and (by_segments or asked == name)

    for sizes in head_sizes(filter(asks, live), live):
        yield from cases(sizes.heads, sizes.key_heads, sizes.head_dim, sizes.value_dim, live.dtype, sizes.sinks)
