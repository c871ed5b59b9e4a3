"""The experts' op as a site calls it: what was found wrong on this device is passed by."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from torch import Tensor

from npu_patch.ops.experts.cases import ExpertsForm, case
from npu_patch.ops.experts.routed import Experts
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import Case
from npu_patch.serving.dispatch import Dispatch


def key_of(tokens: Tensor, indices: Tensor, router_weights: Tensor, experts: Experts) -> ExpertsForm:
    return ExpertsForm.of(experts)


def route(dispatch: Dispatch, calls: Calls, *call: Any) -> Tensor | str:
    """The result for tokens, indices, router weights and experts, or why the call is not served."""
    serving = dispatch.serving(calls, *call)
    return serving if isinstance(serving, str) else serving.run(*call)


def checks(layers: Iterable[Experts | None]) -> Iterator[tuple[Hashable, Case]]:
    """Of live layers."""
    for experts in layers:
        if experts is not None:
            form = ExpertsForm.of(experts)
            yield form, case(form)
