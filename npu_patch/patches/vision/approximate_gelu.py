"""GELU: every activation that computes one of its approximations in parts, as the towers of Qwen2-VL and CLIP do.

Rebinds    `forward` of the class, in `transformers.activations` and in modeling modules.
To         `npu_fast_gelu` for `x * sigmoid(1.702 x)`, torch's own for the one by tanh: one operator each way.
Not when   it has parts or settings of its own. A call falls through for tensors on another device.
Delete     when transformers computes them by one operator.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.approximate_gelu import BY_APPROXIMATION, GELU_BY_SIGMOID, GELU_BY_TANH, Approximation, case
from npu_patch.ops.readings import NotRead
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.probe.approximate_gelu import read_gelu
from npu_patch.serving.calls import Calls
from npu_patch.serving.dispatch import Dispatch
from npu_patch.serving.implementation import choose
from npu_patch.serving.replacement import Unserved, replacement_for, tensors_on
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import Site, parameter_names, rebindable_forwards

ACTIVATIONS = "transformers.activations"
IN_PARTS = {"sigmoid", "tanh"}


def find(module: ModuleType) -> Iterable[Site]:
    """Forwards of one tensor that take a sigmoid or a tanh."""
    for site in rebindable_forwards(module):
        names = parameter_names(site.original)
        if names is not None and len(names) == 1 and IN_PARTS & names_used(site.original):
            yield site


def read_site(site: Site) -> Approximation | NotRead:
    return read_gelu(site.owner, site.original)


def bind_site(site: Site, approximation: Approximation, context: Context) -> Replacement | NotRead:
    op, calls, device_type = BY_APPROXIMATION[approximation], Calls(), context.device_type
    if context.live is not None and not context.live_modules(site.owner):
        return NotRead("no layer of the model is one", notable=False)
    choice = choose(op.implementations, device_type)
    if choice.chosen is None:
        return NotRead(choice.why_none(), in_order=True)
    dispatch = Dispatch(op, choice, lambda live: [case(approximation, live.dtype)])
    names = parameter_names(site.original) or ()

    def serve(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor | Unserved:
        bound = tensors_on(device_type, names, args, kwargs)
        if isinstance(bound, Unserved):
            return bound
        serving = dispatch.serving(calls, bound[0], approximation)
        return Unserved(serving) if isinstance(serving, str) else serving.run(bound[0], approximation)

    function = replacement_for(site.original, calls, serve)
    return Replacement(function, approximation.name, calls, choice=choice, dispatch=dispatch)


PATCH = Patch(
    "approximate_gelu",
    "approximate_gelu",
    GELU_BY_SIGMOID,
    find,
    read_site,
    bind_site,
    libraries=(ACTIVATIONS,),
    further_ops=(GELU_BY_TANH,),
)
