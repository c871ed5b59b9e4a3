"""Whether a forward over packed expert weights computes the routed experts of ops/experts/routed.py, and which gate.

The forward runs on a stand-in that has the instance's own settings (limits, scales, its activation), and tiny weights
of three experts whose sides are all different; it must equal the formula, forward and backward, for tokens of ordinary
size and for tokens so large that a clamp anywhere would show. What transformers declares (`is_transposed`, `has_bias`
...) is where the formula starts from, never the end of it; where nothing is declared, each convention is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.numerics.closeness import distance
from npu_patch.numerics.findings import unless_accident
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import values
from npu_patch.ops.experts.grouped_matmul import Weights
from npu_patch.ops.experts.routed import Experts, reference, silu_of_halves
from npu_patch.ops.readings import NotRead
from npu_patch.probe.stand_in import Missing, StandIn, problem_text

# No two alike; sides are multiples of 8, which torch's grouped product needs.
TOKENS, HIDDEN, INNER, EXPERTS, CHOICES = 7, 24, 16, 3, 2
IDENTITIES = 2  # further "experts" that return their token, where there are such
# Sizes by the names under which experts keep them; the stand-in's, in place of the instance's.
SIZES = {
    "num_experts": EXPERTS,
    "num_routed_experts": EXPERTS,
    "total_experts": EXPERTS + IDENTITIES,
    "hidden_size": HIDDEN,
    "hidden_dim": HIDDEN,
    "intermediate_size": INNER,
    "intermediate_dim": INNER,
    "expert_dim": INNER,
}
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
# dtype, scale of the tokens, tolerances: ordinary ones, and ones whose projections reach far beyond any clamp (gpt_oss:
# 7). There the gradient through a saturated gate is ill-conditioned; a clamp that is forgotten is thousands off.
# bfloat16: the original rounds six times on the way, a tolerance is for one.
TRIALS = (
    (torch.float32, 1.0, 2.0),
    (torch.float32, 300.0, 200.0),
    (torch.bfloat16, 1.0, 4.0),
    (torch.bfloat16, 300.0, 4.0),
)
GATE_SCALES = (1.0, 100.0, 1e4)

# What transformers' decorator wrote on an experts module; the defaults are those of versions without the flag.
DECLARATIONS = {"is_transposed": False, "has_bias": False, "has_gate": True, "has_post_expert_norm": False}
SETTINGS = ("act_fn", *DECLARATIONS)  # which are looked at here, whatever a forward asks for


ARGUMENTS = ("tokens", "indices", "router_weights")


@dataclass(frozen=True)
class Convention:
    """How a forward is called and how its weights are stored.

    `arguments`: what its parameters are, of "tokens", "indices" and "router_weights"; `dense`: router weights are
    `[T, E]`, not `[T, k]`; `identities`: indices beyond the experts return the token itself.
    """

    arguments: tuple[str, ...] = ARGUMENTS
    dense: bool = False
    transposed: bool = True  # weights [E, N, K], as nn.Linear stores them
    has_bias: bool = False
    has_gate: bool = True
    has_post_expert_norm: bool = False
    identities: bool = False

    @property
    def up_name(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"


@dataclass(frozen=True)
class ExpertsReading:
    """The convention, and a name in GATES or "SwiGLU". `batched`: the result for tokens `[B, ..., H]` is `[B, -1, H]`,
    also where they are `[T, H]`."""

    convention: Convention
    gate: str
    batched: bool = False


def _apply_gate(module: Any, up: Tensor) -> Tensor:
    return module._apply_gate(up)


def _activation(module: Any, up: Tensor) -> Tensor:
    return module.act_fn(up)


def _activated_half(module: Any, up: Tensor) -> Tensor:
    gate, up = up.chunk(2, -1)
    return module.act_fn(gate) * up


def _clipped(module: Any, up: Tensor) -> Tensor:
    """gpt_oss: gate and up interleaved, clipped, gate * sigmoid(alpha * gate) * (up + 1)."""
    gate, up = up[..., ::2], up[..., 1::2]
    gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)
    return gate * torch.sigmoid(gate * module.alpha) * (up + 1)


# What is between the two products, given the module itself: its own parts stay in effect.
GATES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "its own _apply_gate": _apply_gate,
    "activation": _activation,
    "activation of one half": _activated_half,
    "clipped, interleaved": _clipped,
}


def gate_of(reading: ExpertsReading, module: Any) -> Callable[[Tensor], Tensor] | None:
    """None for SwiGLU, for which there is a kernel."""
    return None if reading.gate == "SwiGLU" else lambda up: GATES[reading.gate](module, up)


def read_experts(
    cls: type, forward: Callable[..., Any], attributes: Mapping[str, Any], conventions: Iterable[Convention]
) -> ExpertsReading | NotRead:
    """The first convention and gate that `forward` was observed to compute, or why none; `attributes` are those of an
    instance."""
    failures: list[_Not] = []
    with quiet_room():  # a forward with jitter draws
        for convention in conventions:
            for gate in _gates(cls, convention):
                observed = _observe(cls, forward, attributes, ExpertsReading(convention, gate))
                if isinstance(observed, ExpertsReading):
                    return replace(observed, gate=_fused_if_silu(cls, attributes, convention, gate))
                if observed.under_any_convention:
                    return NotRead(observed.reason)
                failures.append(observed)
    likeliest = min(failures, key=lambda failure: failure.reading.convention.identities)
    return NotRead(likeliest.reason)


def undeclared_conventions() -> Iterator[Convention]:
    """Those of forwards of three arguments that transformers says nothing about, in all versions."""
    orders = (ARGUMENTS, ("tokens", "router_weights", "indices"))
    # With identities first: without any token that is given to one, both look alike.
    for identities, arguments, dense, transposed, has_bias in product(
        (True, False), orders, (False, True), (True, False), (False, True)
    ):
        yield Convention(arguments, dense, transposed, has_bias, identities=identities)


def _gates(cls: type, convention: Convention) -> Iterator[str]:
    if not convention.has_gate:
        yield "activation"
        return
    if hasattr(cls, "_apply_gate"):
        yield "its own _apply_gate"
    yield "activation of one half"
    yield "clipped, interleaved"


def _fused_if_silu(cls: type, attributes: Mapping[str, Any], convention: Convention, gate: str) -> str:
    """ "SwiGLU" if the gate is silu(first half) * second half, in both dtypes, for small values and very large ones."""
    if not convention.has_gate:
        return gate
    stand_in = StandIn(cls, _settings(attributes))
    for dtype, scale in product((torch.float32, torch.bfloat16), GATE_SCALES):
        observed_input, expected_input = ((values((TOKENS, 2 * INNER), 60) * scale).to(dtype) for _ in range(2))
        for each in (observed_input, expected_input):
            each.requires_grad_(True)
        try:
            observed = GATES[gate](stand_in, observed_input)
        except (Missing, Exception) as error:
            unless_accident(error)
            return gate
        if distance([observed], [silu_of_halves(expected_input)], [observed_input], [expected_input]) > 1.0:
            return gate
    return "SwiGLU"


@dataclass(frozen=True)
class _Not:
    """Why a forward is not that reading, and whether it can be no other either."""

    reason: str
    reading: ExpertsReading
    under_any_convention: bool = False


def _observe(
    cls: type, forward: Callable[..., Any], attributes: Mapping[str, Any], reading: ExpertsReading
) -> ExpertsReading | _Not:
    """The reading with what the result's shape is, or why the forward is not this."""
    for dtype, scale, allowed in TRIALS:
        trial = _trial(cls, attributes, reading.convention, dtype, scale)
        expected_trial = _trial(cls, attributes, reading.convention, dtype, scale)
        try:
            observed = forward(trial.stand_in, *trial.arguments)
        except (Missing, Exception) as problem:
            unless_accident(problem)
            asks = isinstance(problem, Missing) and problem.name not in WEIGHTS
            return _Not(problem_text(problem), reading, under_any_convention=asks)
        try:
            expected = _formula(expected_trial, reading)
        except (Missing, Exception) as error:
            unless_accident(error)
            return _Not(f"its gate is not {reading.gate}", reading)
        if isinstance(observed, Tensor) and observed.shape == (TOKENS, 1, HIDDEN):
            reading, observed = replace(reading, batched=True), observed[:, 0]
        apart = distance([observed], [expected], trial.leaves, expected_trial.leaves)
        if not apart <= allowed:
            return _Not(f"its result is not that of routed experts ({apart:.2g} tolerances apart)", reading)
    return reading


@dataclass(frozen=True)
class _Trial:
    """One call of a forward: `leaves` are its tokens, router weights and parameters."""

    stand_in: StandIn
    tokens: Tensor
    indices: Tensor
    router_weights: Tensor  # [T, k], whatever the forward is given
    arguments: list[Tensor]
    leaves: list[Tensor]
    up: Weights
    down: Weights


def _trial(
    cls: type, attributes: Mapping[str, Any], convention: Convention, dtype: torch.dtype, scale: float
) -> _Trial:
    own = _settings(attributes)
    width = 2 * INNER if convention.has_gate else INNER
    beyond = IDENTITIES if convention.identities else 0
    shapes = {convention.up_name: (HIDDEN, width, EXPERTS + beyond), "down_proj": (INNER, HIDDEN, EXPERTS)}
    weights: dict[str, Weights] = {}
    leaves: list[Tensor] = []
    for seed, (name, (width_in, width_out, experts)) in enumerate(shapes.items()):
        sides = (width_out, width_in) if convention.transposed else (width_in, width_out)
        own[name] = values((experts, *sides), 70 + seed, dtype, grad=True)
        leaves.append(own[name])
        bias = None
        if convention.has_bias:
            bias = own[f"{name}_bias"] = values((experts, width_out), 73 + seed, dtype, grad=True)
            leaves.append(bias)
        weights[name] = Weights((own[name][:EXPERTS],), convention.transposed, bias)
    tokens = (values((TOKENS, HIDDEN), 76) * scale).to(dtype).requires_grad_(True)
    # Every expert is chosen by someone, no token chooses one twice.
    indices = torch.tensor(
        [[(t + j * (1 + t % 2)) % (EXPERTS + beyond) for j in range(CHOICES)] for t in range(TOKENS)]
    )
    router_weights = values((TOKENS, CHOICES), 77, dtype, grad=True)
    given = router_weights
    if convention.dense:
        given = torch.zeros(TOKENS, EXPERTS + beyond, dtype=dtype).scatter(1, indices, router_weights)
    leaves += [tokens, router_weights]
    by_role = {"tokens": tokens, "indices": indices, "router_weights": given}
    arguments = [by_role[role] for role in convention.arguments]
    up, down = weights.values()
    return _Trial(StandIn(cls, own), tokens, indices, router_weights, arguments, leaves, up, down)


def _formula(trial: _Trial, reading: ExpertsReading) -> Tensor:
    experts = Experts(
        (trial.up,),
        trial.down,
        lambda up: GATES[reading.gate](trial.stand_in, up),
        trial.stand_in.post_expert_norm if reading.convention.has_post_expert_norm else None,
    )
    if not reading.convention.identities:
        return reference(trial.tokens, trial.indices, trial.router_weights, experts)
    here = trial.indices < EXPERTS
    routed = reference(
        trial.tokens, trial.indices.clamp(max=EXPERTS - 1), trial.router_weights.masked_fill(~here, 0.0), experts
    )
    return routed + trial.tokens * trial.router_weights.masked_fill(here, 0.0).sum(-1, keepdim=True)


def _settings(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What of an instance a stand-in of other sizes can have: its settings, its activation, and a norm."""
    plain = {name: value for name, value in attributes.items() if not isinstance(value, (Tensor, torch.nn.Module))}
    activation = attributes.get("act_fn")
    has_tensors = isinstance(activation, torch.nn.Module) and any(
        True for tensors in (activation.parameters(), activation.buffers()) for _ in tensors
    )
    if isinstance(activation, torch.nn.Module):
        activation = activation.forward  # without the hooks of a live one
    # Where it is applied is what is observed; what it computes is its own business when it runs.
    plain["act_fn"] = _some_activation if has_tensors or activation is None else activation
    return plain | SIZES | {"post_expert_norm": _some_norm, "identity_expert": _identity}


def _some_activation(x: Tensor) -> Tensor:
    return F.silu(1.3 * x) + 0.1


def _some_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1)


def _identity(x: Tensor) -> Tensor:
    return x


def declared(attributes: Mapping[str, Any]) -> Convention:
    """transformers calls weights transposed that nn.Linear would call so if they were not."""
    found = {name: attributes.get(name, default) for name, default in DECLARATIONS.items()}
    return Convention(transposed=not found.pop("is_transposed"), **found)
