"""The experts' op as a site calls it: what was found wrong on this device is passed by."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

from torch import Tensor

from npu_patch.ops.experts.cases import ExpertsForm, case
from npu_patch.ops.experts.routed import Experts
from npu_patch.serving.case import Case
from npu_patch.serving.dispatch import Selection
from npu_patch.serving.implementation import Implementation


def route(
    implementation: Implementation,
    selection: Selection,
    tokens: Tensor,
    indices: Tensor,
    router_weights: Tensor,
    experts: Experts,
) -> Tensor | str:
    """The result, or why the call is not served."""
    reason = implementation.unsupported(tokens, indices, router_weights, experts)
    if reason is None and selection.wrong:
        reason = selection.why_wrong(implementation.name, ExpertsForm.of(experts))
    return implementation.run(tokens, indices, router_weights, experts) if reason is None else reason


def checks(layers: Iterable[Experts | None]) -> Iterator[tuple[Hashable, Case]]:
    """Of live layers."""
    for experts in layers:
        if experts is not None:
            form = ExpertsForm.of(experts)
            yield form, case(form)
