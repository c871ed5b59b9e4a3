"""The experts' op as a site calls it: what was found wrong on this device is passed by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from npu_patch.ops.experts.cases import case
from npu_patch.ops.experts.routed import Experts
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import Case
from npu_patch.serving.dispatch import Dispatch


def route(
    dispatch: Dispatch, calls: Calls, tokens: Tensor, indices: Tensor, router_weights: Tensor, experts: Experts
) -> Tensor | str:
    """The result, or why the call is not served."""
    serving = dispatch.serving(calls, tokens, indices, router_weights, experts)
    return serving if isinstance(serving, str) else serving.run(tokens, indices, router_weights, experts)


def checks(layers: Iterable[Experts | None]) -> Iterator[Case]:
    return (case(experts) for experts in layers if experts is not None)
