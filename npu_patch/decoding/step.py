"""One decode step of a model, captured over static inputs and a static cache, and shown to do what the model does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_patch.decoding.cache import Before
from npu_patch.decoding.graph import Graph, captured
from npu_patch.decoding.inputs import CACHES, StepInputs
from npu_patch.numerics.error_text import error_text
from npu_patch.waiting.contract import materialised

# Twice, for what a capture has frozen shows at the next step only.
PROOFS = 2
# Of the logits' norm. The same kernels run, but libraries may choose others for a capture's workspace.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-10}
CLOSE_OTHERS = 2e-2

Run = Callable[[Tensor, Mapping[str, Any]], Any]  # of the newest tokens, and what generate() has for the model
InputsOf = Callable[[Tensor, Mapping[str, Any]], StepInputs]


@dataclass(eq=False)
class Step:
    """`inputs` are None until it is captured. `proofs`: how often its replay was compared with the model. The cache is
    not held here: who owns it decides how long it lives."""

    inputs: StepInputs | None = None
    graph: Graph | None = None
    proofs: int = 0

    @property
    def is_proven(self) -> bool:
        return self.proofs >= PROOFS

    def outputs_with(self, cache_name: str, cache: Any) -> Any:
        """What a replay returns. Its tensors hold what the last one computed."""
        assert self.graph is not None
        kind, values = self.graph.result
        return kind(**values, **{cache_name: cache})


def prove(
    step: Step,
    run: Run,
    tokens: Tensor,
    kwargs: Mapping[str, Any],
    inputs_of: InputsOf,
    changed: Callable[[], bool],
    pool: Any,
) -> tuple[Any, str | None]:
    """The result of `run(tokens, kwargs)`, one step of the model, after which `step` is captured and did the same; or
    the reason why that cannot be. The cache, the random numbers and the host are as the eager step leaves them.
    `changed()`: whether the model is another to the host than before."""

    def eager() -> Any:
        return run(tokens, kwargs)

    cache_name = cache_name_of(kwargs)
    cache, device = kwargs[cache_name], tokens.device
    if step.inputs is not None and (differing := step.inputs.differ_from(kwargs)) is not None:
        return eager(), f"the argument {differing} changes with each token"
    random, before = _RandomNumbers.of(device), Before.of(cache)
    outputs = eager()
    random_after, after = _RandomNumbers.of(device), Before.of(cache)
    frozen = before.counted_by_the_host(cache) or ("a step changes what the model keeps" if changed() else None)
    if frozen is not None:
        return outputs, frozen
    if step.graph is None:
        step.inputs = inputs = inputs_of(tokens, kwargs)
        try:
            step.graph = captured(lambda: _run(run, inputs, {cache_name: cache}), device.type, pool)
            failed = after.counted_by_the_host(cache)
        except Exception as error:  # whatever the model does that a device cannot capture
            failed = f"a capture fails: {error_text(_first(error))}"
        if failed is not None:
            after.put_back(cache)
            random_after.put_back()
            return outputs, failed
    assert step.inputs is not None and step.graph is not None
    expected = [each.clone() for each in _compared(outputs)]
    step.inputs.load(tokens, kwargs)
    before.put_back(cache)
    random.put_back()
    step.graph.replay()
    differences = map(_difference, _compared(step.graph.result[1]), expected)
    wrong = next(filter(None, differences), None)
    if wrong is None and random_after != _RandomNumbers.of(device):
        wrong = "it draws other random numbers"
    if wrong is not None:  # then what it wrote to the cache is not to be trusted either
        before.put_back(cache)
        random.put_back()
        return eager(), f"a replay is not what the model does: {wrong}"
    step.proofs += 1
    return outputs, None


def _first(error: BaseException) -> BaseException:
    """What ended the capture, of which its end then complains."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def cache_name_of(kwargs: Mapping[str, Any]) -> str:
    return next(name for name in CACHES if kwargs.get(name) is not None)


def _run(run: Run, inputs: StepInputs, cache: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    outputs = run(inputs.tokens, {**inputs.others, **inputs.tensors, **cache})
    inputs.count_on()
    # What waits would be computed outside of the graph, once.
    found = {name: materialised(value, "a graph") for name, value in outputs.items() if name not in CACHES}
    return type(outputs), found


def _compared(outputs: Mapping[str, Any]) -> list[Tensor]:
    hidden = outputs.get("hidden_states") or ()
    return [outputs["logits"], *(each for each in hidden if each is not None)]


def _difference(found: Tensor, expected: Tensor) -> str | None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{list(found.shape)} of {found.dtype} for {list(expected.shape)} of {expected.dtype}"
    if torch.equal(found, expected):
        return None
    distance = torch.linalg.vector_norm((found - expected).float())
    error = float(distance / torch.linalg.vector_norm(expected.float()))
    return None if error <= CLOSE.get(expected.dtype, CLOSE_OTHERS) else f"other numbers ({error:.0e} of their norm)"


@dataclass(frozen=True, eq=False)
class _RandomNumbers:
    """The state of a device's generator."""

    state: Tensor
    device: torch.device

    @classmethod
    def of(cls, device: torch.device) -> _RandomNumbers:
        return cls(torch.get_device_module(device.type).get_rng_state(device), device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _RandomNumbers) and torch.equal(self.state, other.state)

    def put_back(self) -> None:
        if self != _RandomNumbers.of(self.device):
            torch.get_device_module(self.device.type).set_rng_state(self.state, self.device)
