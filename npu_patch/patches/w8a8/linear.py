"""W8A8: linear layers whose weight is int8, `W8A8Linear` (ops/w8a8/layer.py).

Rebinds    `forward` of that class.
To         products in int8 by the device's operators (on a CPU or GPU by torch), with a gradient of the input. Layers
           that are given one tensor, one after the other, share its quantisation.
Not when   input, weight and scales are on several devices, of tensor subclasses or of other dtypes; the weight is wider
           than the operator takes; within a transform of torch.func. The layer then computes in plain torch.
Delete     when torch has such a layer that the device computes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import partial
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.ops.w8a8.layer import W8A8Linear, computes_in
from npu_patch.ops.w8a8.linear import RowsOf, computed_in, rows_of
from npu_patch.ops.w8a8.op import W8A8, case
from npu_patch.ops.w8a8.shared_rows import shared_rows
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import Case
from npu_patch.serving.changed_later import CALLS_OF_MODULES, Callers
from npu_patch.serving.listeners import listener
from npu_patch.serving.replacement import Unserved, replacement_for, tensors_on
from npu_patch.sites.sites import LiveModules, Site, rebindable_forwards
from npu_patch.waiting.contract import materialised
from npu_patch.waiting.quantised_norms import QuantisedNorm

OWN = W8A8Linear.forward
INPUT = ("input",)


def find(module: ModuleType) -> Iterable[Site]:
    return (site for site in rebindable_forwards(module) if site.owner is W8A8Linear)


def read_site(site: Site) -> AsNamed | NotRead:
    """Ours is known by being that very function."""
    return AsNamed("int8") if site.original is OWN else NotRead("its forward is somebody else's")


def bind_site(site: Site, found: AsNamed, context: Context) -> Replacement | NotRead:
    if context.live is not None and not context.live_modules(site.owner):
        return NotRead("no layer of the model is one", notable=False)
    calls, callers, device_type = Calls(), Callers(), context.device_type
    dispatch = context.dispatch(_cases)

    def serve(self: Any, *args: Any, **kwargs: Any) -> Tensor | Unserved:
        bound = tensors_on(device_type, INPUT, args, kwargs)
        if isinstance(bound, Unserved):
            return bound
        (given,) = bound
        weight, scale, bias = self.weight, self.weight_scale, self.bias
        dtype = computed_in(given)
        rows: RowsOf = rows_of
        x = given
        if not torch.compiler.is_compiling():
            if torch._C._functorch.peek_interpreter_stack() is not None:
                return Unserved("within a transform of torch.func")
            if type(given) is QuantisedNorm and given.is_known_in(dtype):
                x, rows = given.total, given.rows  # of the same kind: what is computed of x itself, nobody needs
            else:
                x = materialised(given, "by a layer that quantises it")
                # Others have a version, which tells.
                trusted = not x.is_inference() or (
                    callers.why_changed_later(self, (given,)) is None and not _heard(given)
                )
                rows = partial(shared_rows, self, trusted)
        serving = dispatch.serving(calls, x, weight, scale, bias, dtype, rows)
        return Unserved(serving) if isinstance(serving, str) else serving.run(x, weight, scale, bias, dtype, rows)

    function = replacement_for(site.original, calls, serve)
    return Replacement(function, found.name, calls, dispatch=dispatch)


def _heard(x: Tensor) -> bool:
    """Whether anybody listens to a module that is given x: this layer, or what is around it."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is CALLS_OF_MODULES[0]:
            called = frame.f_locals
            if not any(each is x for each in (*called["args"], *called["kwargs"].values())):
                return False
            if listener(called["self"], "") is not None:
                return True
        frame = frame.f_back
    return False


def _cases(live: LiveModules) -> Iterator[Case]:
    """In the dtype of a layer, and under autocast to bfloat16."""
    layers: Iterable[Any] = live.of(W8A8Linear)
    for layer in layers:
        bias = None if layer.bias is None else layer.bias.dtype
        for dtype in dict.fromkeys((computes_in(layer, live.dtype), torch.bfloat16)):
            yield case(layer.out_features, layer.in_features, dtype, layer.weight_scale.dtype, bias)


PATCH: Patch[AsNamed, ..., Tensor] = Patch(
    "w8a8", "w8a8", W8A8, find, read_site, bind_site, libraries=("npu_patch.ops.w8a8.layer",)
)
