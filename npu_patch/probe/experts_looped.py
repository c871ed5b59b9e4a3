"""Whether a block of transformers 4 routes its tokens through a list of expert modules, and how it chooses them.

The block runs on a stand-in whose experts are three known functions. Every other module it asks for is a recorder that
answers with fresh numbers: one column for each expert (a router), its input's shape (a shared expert) or one column (a
gate). Which answers which way is not read from a name: each assignment is tried until the result is the formula's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.closeness import distance
from npu_patch.numerics.findings import unless_accident
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import values
from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.probe.stand_in import Missing, StandIn, problem_text

BATCH, LENGTH, HIDDEN, EXPERTS, CHOICES = 2, 4, 6, 3, 2
SETTINGS = {
    "num_experts": EXPERTS,
    "top_k": CHOICES,
    "num_experts_per_tok": CHOICES,
    "experts_per_rank": EXPERTS,
    "ep_rank": 0,
}
# bfloat16: the originals round after each expert and after each weight, the tolerance is for one rounding.
ALLOWED = {torch.float32: 2.0, torch.bfloat16: 4.0}
ROLES = ("router", "shared", "shared_gate")
NAME = "looped experts"
NO_EXPERTS = NotRead("it has no experts")


@dataclass(frozen=True)
class Part:
    """A module that a block calls: its attribute's name, and whether it is given tokens `[T, H]` or `[B, S, H]`."""

    name: str
    flat: bool


@dataclass(frozen=True)
class BlockReading:
    """`softmax(router)`, the `top_k` largest, `normalised` or not, times the experts, plus what all tokens share."""

    router: Part
    normalised: bool
    shared: Part | None
    shared_gate: Part | None
    returns_logits: bool

    @property
    def name(self) -> str:
        return NAME


def chosen(logits: Tensor, top_k: int, normalised: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Indices and weights `[T, k]` of the largest of softmax(logits `[T, E]`)."""
    weights, indices = torch.softmax(logits, 1, dtype=torch.float).topk(top_k, -1)
    if normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return indices, weights.to(dtype)


def read_method(cls: type, method: Callable[..., Any]) -> AsNamed | NotRead:
    """`method(self, tokens [T, H], indices, router_weights [T, k])`, which should be the sum over experts."""
    with quiet_room():
        for dtype in ALLOWED:
            runs = []
            for _ in range(2):
                experts = _Experts(dtype)
                tokens = values((BATCH * LENGTH, HIDDEN), 80, dtype, grad=True)
                weights = values((BATCH * LENGTH, CHOICES), 81, dtype, grad=True)
                runs.append((experts, tokens, weights))
            (experts, tokens, weights), (own_experts, own_tokens, own_weights) = runs
            indices = torch.tensor([[t % EXPERTS, (t + 1 + t % 2) % EXPERTS] for t in range(BATCH * LENGTH)])
            try:
                stand_in = StandIn(cls, SETTINGS | {"experts": experts.functions})
                observed = method(stand_in, tokens, indices, weights)
            except (Missing, Exception) as problem:
                unless_accident(problem)
                return NotRead(problem_text(problem))
            expected = own_experts.sum(own_tokens, indices, own_weights)
            apart = distance(
                [observed],
                [expected],
                [tokens, weights, *experts.matrices],
                [own_tokens, own_weights, *own_experts.matrices],
            )
            if not apart <= ALLOWED[dtype]:
                return NotRead(f"its result is not that of routed experts ({apart:.2g} tolerances apart)")
    return AsNamed(NAME)


def read_block(cls: type, forward: Callable[..., Any], attributes: Mapping[str, Any]) -> BlockReading | NotRead:
    """A part of the block is whatever is asked for that `attributes` does not hold as a plain value."""
    with quiet_room():  # jitter draws
        parts = _parts_of(cls, forward, attributes)
        if isinstance(parts, NotRead):
            return parts
        for roles in _assignments(parts):
            reading = _observe(cls, forward, attributes, roles)
            if reading is not None:
                return reading
    return NotRead(f"with parts {', '.join(parts)} its result is not that of routed experts")


def _parts_of(cls: type, forward: Callable[..., Any], attributes: Mapping[str, Any]) -> list[str] | NotRead:
    """The names that the forward asks for beside its experts, found by giving every one a shape that fits."""
    why: str | None = None
    for answers in product((EXPERTS, HIDDEN, 1), repeat=3):
        asked: list[str] = []
        saw_experts = False

        def on_missing(name: str, answers: tuple[int, ...] = answers, asked: list[str] = asked) -> Any:
            nonlocal saw_experts
            if name == "experts":
                saw_experts = True
                return _ExpertList(_Experts(torch.float32).functions)
            if len(asked) == len(answers):
                raise Missing(name)
            asked.append(name)
            width = answers[len(asked) - 1]
            return lambda x: _answer(x, width, 85 + len(asked))

        try:
            forward(StandIn(cls, _plain(attributes) | SETTINGS, on_missing), values((BATCH, LENGTH, HIDDEN), 82))
        except _CalledWhole:
            return NO_EXPERTS
        except (Missing, Exception) as problem:
            unless_accident(problem)
            why = why or problem_text(problem)
            continue
        return asked if saw_experts else NO_EXPERTS
    return NO_EXPERTS if why is None else NotRead(why)


def _assignments(parts: list[str]) -> Iterator[dict[str, str]]:
    """Part -> role; one router, at most one shared expert, a gate only beside one."""
    for roles in product(ROLES, repeat=len(parts)):
        if (
            roles.count("router") == 1
            and len(set(roles)) == len(roles)
            and not ("shared_gate" in roles and "shared" not in roles)
        ):
            yield dict(zip(parts, roles, strict=True))


def _observe(
    cls: type, forward: Callable[..., Any], attributes: Mapping[str, Any], roles: Mapping[str, str]
) -> BlockReading | None:
    readings: list[BlockReading | None] = []
    for dtype in ALLOWED:
        experts, own_experts = _Experts(dtype), _Experts(dtype)
        x, own_x = (values((BATCH, LENGTH, HIDDEN), 82, dtype, grad=True) for _ in range(2))
        recorders = {name: _Recorder(role) for name, role in roles.items()}
        own = _plain(attributes) | SETTINGS | {"experts": experts.functions} | recorders
        try:
            observed = forward(StandIn(cls, own), x)
        except (Missing, Exception) as problem:
            unless_accident(problem)
            return None
        logits = None
        if isinstance(observed, tuple):
            if len(observed) != 2:
                return None
            observed, logits = observed
        by_role = {recorder.role: (name, recorder) for name, recorder in recorders.items()}
        if any(recorder.flat is None for recorder in recorders.values()):
            return None
        router = by_role["router"][1]
        if logits is not None and logits is not router.answered:
            return None
        matched = None
        for normalised in (True, False):
            own_x.grad = None
            expected = _formula(own_x, own_experts, {role: r for role, (_, r) in by_role.items()}, normalised)
            leaves = [x, *experts.matrices], [own_x, *own_experts.matrices]
            if distance([observed], [expected], *leaves) <= ALLOWED[dtype]:
                called = {role: Part(name, bool(recorder.flat)) for role, (name, recorder) in by_role.items()}
                shared, shared_gate = called.get("shared"), called.get("shared_gate")
                matched = BlockReading(called["router"], normalised, shared, shared_gate, logits is not None)
                break
        readings.append(matched)
    return readings[0] if None not in readings and len(set(readings)) == 1 else None


def _formula(x: Tensor, experts: _Experts, parts: Mapping[str, _Recorder], normalised: bool) -> Tensor:
    flat = x.flatten(0, 1)
    answers = {role: _answer(flat if part.flat else x, part.width, part.seed) for role, part in parts.items()}
    indices, weights = chosen(answers["router"].view(-1, EXPERTS), CHOICES, normalised, x.dtype)
    y = experts.sum(flat, indices, weights)
    if "shared" in parts:
        shared = answers["shared"].view(flat.shape)
        y = y + (torch.sigmoid(answers["shared_gate"]) * shared if "shared_gate" in parts else shared)
    return y.view(x.shape)


class _CalledWhole(Exception):
    """The experts are one module, not a list."""


class _ExpertList(list):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _CalledWhole


class _Recorder:
    """A part of a block: answers by its role, and remembers how it was asked."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.width = {"router": EXPERTS, "shared": HIDDEN, "shared_gate": 1}[role]
        self.seed = 85 + ROLES.index(role)
        self.flat: bool | None = None
        self.answered: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        self.flat = x.dim() == 2
        self.answered = _answer(x, self.width, self.seed)
        return self.answered


def _answer(x: Tensor, width: int, seed: int) -> Tensor:
    """A projection of x; that of a router is `[T, E]` for `[B, S, H]` too."""
    answer = x @ values((HIDDEN, width), seed, x.dtype)
    return answer.flatten(0, -2) if width == EXPERTS else answer


class _Experts:
    """Three functions of `[n, H]`, each with a matrix of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.matrices = [values((HIDDEN, HIDDEN), 90 + index, dtype, grad=True) for index in range(EXPERTS)]
        self.functions = [lambda x, matrix=matrix: torch.tanh(x @ matrix) for matrix in self.matrices]

    def sum(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        every = torch.stack([function(x) for function in self.functions])
        return (every[indices, torch.arange(x.shape[0])[:, None]] * weights[..., None]).sum(1).to(x.dtype)


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in attributes.items() if value is None or isinstance(value, (bool, int, float, str))
    }
