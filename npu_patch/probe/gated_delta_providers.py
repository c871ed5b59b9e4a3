"""Whether a package's kernel computes on this device what the definition says, found out before it is first used.

apply() must not touch the device, so this runs at the first call of each dtype and head size: a few tokens, forward and
backward, packed and not, compared with float64 on the host. It is the one time that the host waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.gated_delta_calls import ConvolutionCall, RuleCall
from npu_patch.ops.implementation import Implementation
from npu_patch.probe.closeness import difference
from npu_patch.probe.gated_delta_reference import convolution, recurrence
from npu_patch.probe.room import quiet_room, values

TOKENS, HEADS = 70, 2
BOUNDS = (0, 3, 20, TOKENS)  # of packed sequences
# Relative to the largest element. 16-bit kernels round the products of a chunk; a wrong one is off by its own size.
ALLOWED = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-7, torch.float32: 1e-4}
VERDICTS: dict[tuple[Any, ...], str | None] = {}


def why_wrong_rule(implementation: Implementation, call: RuleCall) -> str | None:
    sizes = (call.k.shape[-1], call.v.shape[-1])
    observe = functools.partial(_check_rule, implementation, call.q.device, call.q.dtype, sizes, call.normalize)
    return _verdict((implementation.name, call.q.device, call.q.dtype, sizes, call.normalize), observe)


def why_wrong_convolution(implementation: Implementation, call: ConvolutionCall) -> str | None:
    width = call.weight.shape[-1]
    dtypes = (call.x.dtype, call.weight.dtype)
    observe = functools.partial(_check_convolution, implementation, call.x.device, dtypes, width, call.activation)
    return _verdict((implementation.name, call.x.device, dtypes, width, call.activation), observe)


def _verdict(key: tuple[Any, ...], observe: Callable[[], str | None]) -> str | None:
    if key not in VERDICTS:
        device_type = key[1].type
        try:
            with quiet_room(), torch.autocast(device_type, enabled=False):
                VERDICTS[key] = observe()
        except Exception as error:
            VERDICTS[key] = f"self-check: {type(error).__name__}: {error}"
    return VERDICTS[key]


def _check_rule(
    implementation: Implementation,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    normalize: bool,
) -> str | None:
    key_width, value_width = sizes
    given = {
        "q": values((1, TOKENS, HEADS, key_width), 1),
        "k": values((1, TOKENS, HEADS, key_width), 2),
        "v": values((1, TOKENS, HEADS, value_width), 3),
        "g": -values((1, TOKENS, HEADS), 4).abs(),
        "beta": values((1, TOKENS, HEADS), 5).sigmoid(),
    }
    if not normalize:
        given["k"] = torch.nn.functional.normalize(given["k"], dim=-1)
    rounded = {name: tensor if name == "g" else tensor.to(dtype) for name, tensor in given.items()}
    for bounds in (None, BOUNDS):

        def run(cu_seqlens: Tensor | None, **inputs: Tensor) -> Sequence[Tensor]:
            call = RuleCall(
                **inputs,
                output_final_state=True,
                normalize=normalize,
                cu_seqlens=cu_seqlens,
                bounds_on_host=lambda: torch.tensor(BOUNDS, dtype=torch.int32),
            )
            return None if implementation.unsupported(call) is not None else implementation.run(call)

        def expected(bounds: Sequence[int] | None, **inputs: Tensor) -> Sequence[Tensor]:
            return recurrence(**inputs, normalize=normalize, bounds=bounds)

        reason = _compare(run, expected, rounded, bounds, device)
        if reason is not None:
            return reason
    return None


def _check_convolution(
    implementation: Implementation,
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    width: int,
    activation: str | None,
) -> str | None:
    channels = 64
    given = {
        "x": values((1, TOKENS, channels), 11).to(dtypes[0]).transpose(1, 2),
        "weight": values((channels, width), 12).to(dtypes[1]),
    }
    for bounds in (None, BOUNDS):

        def run(cu_seqlens: Tensor | None, **inputs: Tensor) -> Sequence[Tensor] | None:
            call = ConvolutionCall(
                **inputs,
                activation=activation,
                cu_seqlens=cu_seqlens,
                bounds_on_host=lambda: torch.tensor(BOUNDS, dtype=torch.int32),
            )
            return None if implementation.unsupported(call) is not None else [implementation.run(call)]

        def expected(bounds: Sequence[int] | None, x: Tensor, weight: Tensor) -> Sequence[Tensor]:
            return [convolution(x, weight, None, activation, bounds)]

        reason = _compare(run, expected, given, bounds, device)
        if reason is not None:
            return reason
    return None


def _compare(
    run: Callable[..., Sequence[Tensor] | None],
    expected: Callable[..., Sequence[Tensor]],
    given: dict[str, Tensor],
    bounds: Sequence[int] | None,
    device: torch.device,
) -> str | None:
    """Outputs and the gradients of what the first output is weighted with."""
    inputs = {name: tensor.detach().to(device).requires_grad_() for name, tensor in given.items()}
    exact_inputs = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)
    observed = run(cu_seqlens, **inputs)
    if observed is None:  # such calls do not reach it
        return None
    exact = expected(bounds, **exact_inputs)
    where = "" if bounds is None else " of packed sequences"
    dtype = next(iter(given.values())).dtype
    for name, one, other in zip(("output", "final state"), observed, exact, strict=False):
        far = difference(one.detach().float().cpu(), other.detach().float())
        if not far <= ALLOWED[dtype]:
            return f"self-check: {name}{where} is {far:.2g} of its size off"
    weights = values(exact[0].shape, 90, dtype)
    found = torch.autograd.grad(observed[0], list(inputs.values()), weights.to(device))
    exact_found = torch.autograd.grad(exact[0], list(exact_inputs.values()), weights.double())
    for name, one, other in zip(inputs, found, exact_found, strict=True):
        far = difference(one.float().cpu(), other.float())
        if not far <= 2.0 * ALLOWED[dtype]:
            return f"self-check: gradient of {name}{where} is {far:.2g} of its size off"
    return None
