"""The attention op as a site calls it: what was found wrong on this device is passed by."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from npu_patch.ops.attention.call import Attention
from npu_patch.ops.attention.cases import CallForm, cases
from npu_patch.patches.head_sizes import head_sizes
from npu_patch.serving.case import Case
from npu_patch.serving.dispatch import Selection
from npu_patch.serving.implementation import Implementation
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import LiveModules

REGISTRY = "ALL_ATTENTION_FUNCTIONS"  # as modeling files hold AttentionInterface


@dataclass(frozen=True)
class Attend:
    implementation: Implementation
    selection: Selection

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor | str:
        """The result, or why the call is not served."""
        reason = self.implementation.unsupported(query, key, value, attention)
        if reason is None and self.selection.wrong:
            form = CallForm.of(query, key, value, attention)
            reason = self._why_wrong(form)
            if reason is not None and form.is_single:
                attention = replace(attention, decodes=False)
                reason = self._why_wrong(CallForm.of(query, key, value, attention))
        return self.implementation.run(query, key, value, attention) if reason is None else reason

    def _why_wrong(self, form: CallForm) -> str | None:
        return self.selection.why_wrong(self.implementation.name, form)


def checks(name: str, live: LiveModules) -> Iterator[tuple[Hashable, Case]]:
    """For the layers whose config asks for the attention `name`, in the model's dtype."""
    asking: dict[type, bool] = {}

    def asks(layer: torch.nn.Module) -> bool:
        if type(layer) not in asking:
            asking[type(layer)] = REGISTRY in names_used(type(layer).forward)
        return asking[type(layer)] and getattr(getattr(layer, "config", None), "_attn_implementation", None) == name

    for sizes in head_sizes(filter(asks, live), live):
        yield from cases(sizes.heads, sizes.key_heads, sizes.head_dim, sizes.value_dim, live.dtype, sizes.sinks)
