"""Whether a package's kernel computes on this device what the definition says, found out before it is first used.

apply() must not touch the device, so this runs at the first call of each kind: a few tokens, forward and backward,
packed and not, compared with float64 on the host; of a step by one token that token, forward. It is the one time that
the host waits for the device. A kind of call of the rule is its dtype and head sizes, how many value heads share a key
head, which states go in and out, and whether it is a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.numerics.closeness import difference
from npu_patch.numerics.error_text import error_text
from npu_patch.numerics.findings import Findings, unless_accident
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import values
from npu_patch.ops.gated_delta.calls import ConvolutionCall, RuleCall
from npu_patch.probe.gated_delta_reference import convolution, recurrence
from npu_patch.serving.implementation import AnyImplementation

TOKENS, ROWS, KEY_HEADS, CHANNELS = 70, 2, 2, 64  # of chunks of 64 at the most: what one leaves to the next is seen
BOUNDS = (0, 3, 20, TOKENS)  # of packed sequences, in one row
DECAYS = (2.0**-5, 4.0)  # of the first and the last value head: a slow one remembers all tokens, a fast one few
# Relative to the largest element. 16-bit kernels round the products of a chunk; a wrong one is off by its own size.
ALLOWED = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-7, torch.float32: 1e-4}
VERDICTS = Findings()


@dataclass(frozen=True)
class RuleKind:
    """What a verdict on the rule holds for: all that a kernel may treat apart, but for the number beyond one token."""

    dtype: torch.dtype
    key_width: int
    value_width: int
    values_per_key: int
    normalize: bool
    from_state: bool
    to_state: bool
    step: bool = False

    @classmethod
    def of(cls, call: RuleCall) -> RuleKind:
        values_per_key = max(1, call.v.shape[2] // call.k.shape[2])
        from_state, widths = call.initial_state is not None, (call.k.shape[-1], call.v.shape[-1])
        step = call.q.shape[1] == 1 and call.cu_seqlens is None
        return cls(call.q.dtype, *widths, values_per_key, call.normalize, from_state, call.output_final_state, step)

    def inputs(self, bounds: Sequence[int] | None) -> dict[str, Tensor]:
        """Two rows of tokens, or packed sequences, with heads that forget at very different speeds."""
        rows, heads, tokens = ROWS if bounds is None else 1, KEY_HEADS * self.values_per_key, 1 if self.step else TOKENS
        first, last = DECAYS
        rates = first * (last / first) ** (torch.arange(heads) / (heads - 1))
        k = values((rows, tokens, KEY_HEADS, self.key_width), 2)
        given = {
            "q": values((rows, tokens, KEY_HEADS, self.key_width), 1),
            "k": k if self.normalize else F.normalize(k, dim=-1),
            "v": values((rows, tokens, heads, self.value_width), 3),
            "beta": values((rows, tokens, heads), 5).sigmoid(),
        }
        in_float32 = {"g": -values((rows, tokens, heads), 4).abs() * rates}
        if self.from_state:
            sequences = rows if bounds is None else len(bounds) - 1
            in_float32["initial_state"] = values((sequences, heads, self.key_width, self.value_width), 6)
        return {name: tensor.to(self.dtype) for name, tensor in given.items()} | in_float32

    def call(self, **given: Any) -> RuleCall:
        return RuleCall(**given, output_final_state=self.to_state, normalize=self.normalize)

    def results(self, returned: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return returned if self.to_state else returned[:1]

    def exact(self, bounds: Sequence[int] | None, **inputs: Tensor) -> tuple[Tensor, ...]:
        return self.results(recurrence(**inputs, normalize=self.normalize, bounds=bounds))


@dataclass(frozen=True)
class ConvolutionKind:
    """The same for the convolution."""

    dtype: torch.dtype
    weight_dtype: torch.dtype
    width: int
    biased: bool
    activation: str | None
    step: ClassVar[bool] = False

    @classmethod
    def of(cls, call: ConvolutionCall) -> ConvolutionKind:
        weight = call.weight
        return cls(call.x.dtype, weight.dtype, weight.shape[-1], call.bias is not None, call.activation)

    def inputs(self, bounds: Sequence[int] | None) -> dict[str, Tensor]:
        rows = ROWS if bounds is None else 1
        bias = {"bias": values((CHANNELS,), 13).to(self.weight_dtype)} if self.biased else {}
        x = values((rows, TOKENS, CHANNELS), 11).to(self.dtype).transpose(1, 2)
        return {"x": x, "weight": values((CHANNELS, self.width), 12).to(self.weight_dtype), **bias}

    def call(self, **given: Any) -> ConvolutionCall:
        return ConvolutionCall(**given, activation=self.activation)

    def results(self, returned: Tensor) -> tuple[Tensor, ...]:
        return (returned,)

    def exact(self, bounds: Sequence[int] | None, **inputs: Tensor) -> tuple[Tensor, ...]:
        given = inputs["x"], inputs["weight"], inputs.get("bias")
        return (convolution(*given, activation=self.activation, bounds=bounds),)


def why_wrong(implementation: AnyImplementation, call: RuleCall | ConvolutionCall) -> str | None:
    kind = RuleKind.of(call) if isinstance(call, RuleCall) else ConvolutionKind.of(call)
    key = implementation.name, call.tensors[0].device, kind
    if key not in VERDICTS:
        try:
            with quiet_room(), torch.autocast(key[1].type, enabled=False):
                layouts = (None,) if kind.step else (None, BOUNDS)
                found = (_compare(implementation, kind, bounds, key[1]) for bounds in layouts)
                VERDICTS[key] = next(filter(None, found), None)
        except Exception as error:
            unless_accident(error)
            VERDICTS[key] = f"self-check: {error_text(error)}"
    return VERDICTS[key]


def _compare(
    implementation: AnyImplementation,
    kind: RuleKind | ConvolutionKind,
    bounds: Sequence[int] | None,
    device: torch.device,
) -> str | None:
    """All outputs, and the gradients that reach the inputs through all of them; those of no step."""
    given = kind.inputs(bounds)
    trained = not kind.step
    inputs = {name: tensor.detach().to(device).requires_grad_(trained) for name, tensor in given.items()}
    exact_inputs = {name: tensor.detach().double().requires_grad_(trained) for name, tensor in given.items()}
    packed: dict[str, Any] = {"bounds_on_host": lambda: torch.tensor(BOUNDS, dtype=torch.int32)}
    if bounds is not None:
        packed["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
    call = kind.call(**inputs, **packed)
    if implementation.unsupported(call) is not None:  # such calls do not reach it
        return None
    observed = kind.results(implementation.run(call))
    exact = kind.exact(bounds, **exact_inputs)
    where = "" if bounds is None else " of packed sequences"
    weights: list[Tensor] = []
    for name, one, other in zip(("output", "final state")[: len(exact)], observed, exact, strict=True):
        far = difference(one.detach().float().cpu(), other.detach().float())
        if not far <= ALLOWED[kind.dtype]:
            return f"self-check: {name}{where} is {far:.2g} of its size off"
        if trained and not one.requires_grad:
            return f"self-check: {name}{where} passes on no gradient"
        weights.append(values(other.shape, 90 + len(weights), one.dtype))
    if not trained:
        return None
    found = torch.autograd.grad(observed, list(inputs.values()), [each.to(device) for each in weights])
    exact_found = torch.autograd.grad(exact, list(exact_inputs.values()), [each.double() for each in weights])
    for name, one, other in zip(inputs, found, exact_found, strict=True):
        far = difference(one.float().cpu(), other.float())
        if not far <= 2.0 * ALLOWED[kind.dtype]:
            return f"self-check: gradient of {name}{where} is {far:.2g} of its size off"
    return None
