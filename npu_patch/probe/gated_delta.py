"""Which op of a gated delta net a function computes: the gated delta rule, the causal convolution or its update.

Functions are called as transformers calls them, on tiny CPU inputs, and compared with the definition in float64:
outputs, final states and all gradients, in float32 and bfloat16. Inside transformers' wrappers, which choose between
packages, it is the function of the modeling file that is observed.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.closeness import difference, gradients
from npu_patch.numerics.error_text import error_text
from npu_patch.numerics.findings import remembered, unless_accident
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import values
from npu_patch.ops.readings import NotRead
from npu_patch.probe.gated_delta_reference import convolution, recurrence

RULE, CONVOLUTION, UPDATE = "gated delta rule", "causal convolution", "causal convolution's update"
LEADING = {RULE: ("q", "k", "v", "g", "beta"), CONVOLUTION: ("x", "weight"), UPDATE: ("x", "conv_state", "weight")}
# Against float64, relative to the largest element. bfloat16: q and k are rounded again where they are normalised.
BOUNDS = {torch.float32: 4e-6, torch.bfloat16: 2.0**-6}
BOUNDARY = 3  # where two packed sequences meet


@dataclass(frozen=True)
class Reading:
    """What a function computes. `names` are its parameters in order, the leading ones by the names of the op.

    `activations`: those that a convolution was observed to apply when asked to. `leaks`: given the boundaries of packed
    sequences, it ran them into each other (otherwise it kept them apart, or refused).
    """

    kind: str
    names: tuple[str, ...]
    spellings: Mapping[str, str]
    activations: tuple[str | None, ...] = ()
    leaks: bool = False


def kind_of(function: Callable[..., Any]) -> str | None:
    """Which op the parameters look like: what to try, not what it is."""
    names = parameters_of(function)
    if len(names) > 5 and names[3:5] == ("g", "beta"):
        return RULE
    if len(names) < 4 or "weight" not in names[1:3] or "activation" not in names:
        return None
    if names[1] == "weight":
        return CONVOLUTION
    return UPDATE if "state" in names[1] else None


@remembered
def read(original: Callable[..., Any], function: Callable[..., Any]) -> Reading | NotRead:
    """What `function`, found inside `original`, computes, if it is one of the ops."""
    kind = kind_of(function)
    names = parameters_of(function)
    if kind is None:
        return NotRead("its parameters are those of no known op")
    leading = LEADING[kind]
    spellings = dict(zip(names, (*leading, *names[len(leading) :]), strict=True))
    with quiet_room():
        try:
            found = _OBSERVERS[kind](function)
        except Exception as error:
            unless_accident(error)
            return NotRead(f"cannot be observed as {kind}: {error_text(error)}")
        if isinstance(found, NotRead):
            return found
        return Reading(kind, tuple(spellings.values()), spellings, found, _leaks(kind, original, found))


def parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


@dataclass(frozen=True)
class RuleCase:
    tokens: int
    key_heads: int = 2
    heads: int = 2
    dtype: torch.dtype = torch.float32
    normalize: bool = True
    state: bool = False

    def inputs(self) -> list[Tensor]:
        batch, key_width, value_width = 2, 5, 7
        q = values((batch, self.tokens, self.key_heads, key_width), 1)
        k = values((batch, self.tokens, self.key_heads, key_width), 2)
        if not self.normalize:
            k = torch.nn.functional.normalize(k, dim=-1)
        v = values((batch, self.tokens, self.heads, value_width), 3)
        g = -values((batch, self.tokens, self.heads), 4).abs() * 0.3
        beta = values((batch, self.tokens, self.heads), 5).sigmoid()
        given = [q.to(self.dtype), k.to(self.dtype), v.to(self.dtype), g, beta.to(self.dtype)]
        if self.state:
            given.append(values((batch, self.heads, key_width, value_width), 6))
        return [tensor.detach().requires_grad_() for tensor in given]


RULE_CASES = (
    RuleCase(3, normalize=False),
    RuleCase(5, dtype=torch.bfloat16),
    RuleCase(70, state=True),
    RuleCase(1, state=True),
)
GROUPED = RuleCase(4, key_heads=2, heads=6)


def _observe_rule(function: Callable[..., Any]) -> tuple[()] | NotRead:
    for case in RULE_CASES:
        try:
            far = _distance_of_rule(function, case)
        except Exception as error:
            unless_accident(error)
            return NotRead(_why_no_rule(function, error_text(error)))
        if far > 1.0:
            return NotRead(_why_no_rule(function, f"{far:.3g} tolerances away"))
    try:
        far = _distance_of_rule(function, GROUPED)
    except Exception as error:  # it wants q and k repeated
        unless_accident(error)
        return ()
    return NotRead("its value heads share the heads of q and k in another order") if far > 1.0 else ()


def _why_no_rule(function: Callable[..., Any], reason: str) -> str:
    case = RuleCase(3)
    q, k, v, _, beta = (tensor.detach() for tensor in case.inputs())
    g = -values((*v.shape[:3], k.shape[-1]), 7).abs() * 0.3
    try:
        observed = function(q, k, v, g=g, beta=beta, **_options(case, None))[0]
    except Exception:
        return f"computes no gated delta rule: {reason}"
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    expected = recurrence(q, k, v, g, beta, normalize=True)[0].float()
    if difference(observed, expected) > BOUNDS[torch.float32]:
        return f"computes no gated delta rule: {reason}"
    return "decays each channel of the key by its own gate (Kimi delta attention), for which there is no kernel here"


def _distance_of_rule(function: Callable[..., Any], case: RuleCase) -> float:
    inputs = case.inputs()
    q, k, v, g, beta, *state = inputs
    observed = function(q, k, v, g=g, beta=beta, **_options(case, state[0] if state else None))
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    q, k, v, g, beta, *state = exact_inputs
    expected = recurrence(q, k, v, g, beta, state[0] if state else None, case.normalize)
    if not isinstance(observed, tuple) or len(observed) != 2 or (observed[1] is None) == case.state:
        return float("inf")
    count = 2 if case.state else 1
    return _distance(observed[:count], expected[:count], (case.dtype, torch.float32), inputs, exact_inputs)


def _options(case: RuleCase, state: Tensor | None) -> dict[str, Any]:
    return {
        "initial_state": state,
        "output_final_state": case.state,
        "use_qk_l2norm_in_kernel": case.normalize,
    }


def _distance(
    observed: Sequence[Tensor],
    expected: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    inputs: Sequence[Tensor],
    exact_inputs: Sequence[Tensor],
) -> float:
    """Of all outputs and gradients, in units of the tolerance of the input's dtype."""
    bound = BOUNDS[inputs[0].dtype]
    worst = max(
        difference(one, other.to(dtype)) / bound for one, other, dtype in zip(observed, expected, dtypes, strict=False)
    )
    if worst > 1.0:
        return worst
    ours = gradients(observed, inputs)
    exact = torch.autograd.grad(
        list(expected),
        list(exact_inputs),
        [values(one.shape, 90 + index, one.dtype).double() for index, one in enumerate(observed)],
    )
    for one, other, of in zip(ours, exact, inputs, strict=True):
        worst = max(worst, difference(one, other.to(of.dtype)) / (4.0 * bound))
    return worst


def _convolution_inputs(tokens: int, bias: bool, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((2, 5, tokens), (5, 4), *([(5,)] if bias else []))
    return [values(shape, 11 + index, dtype, grad=True) for index, shape in enumerate(shapes)]


def _observe_activations(
    far: Callable[[str | None, int, bool, torch.dtype], float], tokens: tuple[int, int]
) -> tuple[str | None, ...] | NotRead:
    """Those for which `far` is small, for one number of `tokens` with a bias, and for the other without."""
    biased, plain = tokens
    cases = ((biased, True, torch.float32), (plain, False, torch.float32), (biased, True, torch.bfloat16))
    distances = {activation: max(far(activation, *case) for case in cases) for activation in (None, "silu")}
    served = tuple(activation for activation, worst in distances.items() if worst <= 1.0)
    if not served:
        return NotRead(f"computes no causal convolution: {min(distances.values()):.3g} tolerances away")
    return (*served, "swish") if "silu" in served else served


def _observe_convolution(function: Callable[..., Any]) -> tuple[str | None, ...] | NotRead:
    def far(activation: str | None, tokens: int, bias: bool, dtype: torch.dtype) -> float:
        inputs = _convolution_inputs(tokens, bias, dtype)
        exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
        x, weight, *biases = inputs
        observed = function(x, weight, biases[0] if bias else None, activation=activation)
        x, weight, *biases = exact_inputs
        expected = convolution(x, weight, biases[0] if bias else None, activation)
        return _distance([observed], [expected], [dtype], inputs, exact_inputs)

    return _observe_activations(far, (6, 2))


def _observe_update(function: Callable[..., Any]) -> tuple[str | None, ...] | NotRead:
    def far(activation: str | None, tokens: int, bias: bool, dtype: torch.dtype) -> float:
        x, weight, *biases = (tensor.detach() for tensor in _convolution_inputs(tokens, bias, dtype))
        state = values((2, 5, 4), 14, dtype)
        seen = torch.cat((state, x), -1)
        observed = function(x, state, weight, biases[0] if bias else None, activation)
        exact = [tensor.double() for tensor in (seen, weight, *biases)]
        expected = convolution(exact[0], exact[1], exact[2] if bias else None, activation)[..., -tokens:]
        if not torch.equal(state, seen[..., -4:]):
            return float("inf")
        return difference(observed, expected.to(dtype)) / BOUNDS[dtype]

    return _observe_activations(far, (1, 3))


_OBSERVERS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    RULE: _observe_rule,
    CONVOLUTION: _observe_convolution,
    UPDATE: _observe_update,
}


def _leaks(kind: str, original: Callable[..., Any], activations: tuple[str | None, ...]) -> bool:
    """Whether the second of two packed sequences depends on the first, though the boundary between them is given.

    `original` is called with all that transformers put around the function: some of it refuses. It would also say
    in the log that a package is missing, which says nothing here.
    """
    if kind == UPDATE:
        return False
    bounds = torch.tensor((0, BOUNDARY, 6), dtype=torch.int32)

    def last_token(first: int) -> Tensor:
        if kind == CONVOLUTION:
            x, weight = values((1, 5, 6), 21).clone(), values((5, 4), 12)
            x[..., BOUNDARY - 1] += first
            seq_idx = torch.tensor([[0] * BOUNDARY + [1] * (6 - BOUNDARY)], dtype=torch.int32)
            return original(x, weight, None, activation=activations[0], seq_idx=seq_idx)[..., BOUNDARY:]
        q, k, v, g, beta = (tensor.detach()[:1].clone() for tensor in RuleCase(6).inputs())
        v[:, :BOUNDARY] += first
        return original(q, k, v, g=g, beta=beta, cu_seqlens=bounds, **_options(RuleCase(6), None))[0][:, BOUNDARY:]

    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        return not torch.equal(last_token(0), last_token(1))
    except Exception as error:
        unless_accident(error)  # it refuses, takes no boundaries, or runs on its own device only
        return False
    finally:
        logging.disable(disabled)
