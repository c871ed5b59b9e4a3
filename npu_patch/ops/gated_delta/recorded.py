"""The gated delta rule token by token, the state after each kept: what was drafted can be taken back, exactly.

Each token is computed as a single one is, so a few tokens at once give what as many steps give, bit for bit. It is a
loop over tokens, but over those of a draft: checking them takes no more kernels than decoding them would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from npu_patch.ops.gated_delta import recurrent
from npu_patch.ops.gated_delta.calls import RuleCall
from npu_patch.ops.gated_delta.rule import gated_delta_rule, several_tokens
from npu_patch.serving.implementation import AnyImplementation

OneToken = Callable[[RuleCall], tuple[Tensor, Tensor | None]]
NOT_KEPT = (
    "{asked} tokens cannot be taken back from a recurrent state: the states after the last {kept} were kept. Those "
    "within a prompt, the first forward, are not, nor those of layers that are compiled"
)


@dataclass
class Recording:
    """Of one state of a cache. `states[0]`: before the tokens that can be taken back, `states[n]`: after n of them.
    `new`: after those of a call whose last state the cache was not given yet. `known`: all that it was given is of the
    gated delta rule, as it is served here."""

    states: list[Tensor] = field(default_factory=list)
    new: list[Tensor] = field(default_factory=list)
    known: bool = True

    def go_on(self, given: Tensor, held: Tensor) -> None:
        """The cache was `given` a state, which it `held` since: after the tokens of a recorded call, or of a prompt."""
        if self.new and self.new[-1] is given:
            self.states += self.new
        else:
            self.states = [held.clone()]
            self.known &= given in _MADE
        self.new = []
        record(held, self)

    def taken(self, given: Tensor) -> list[Tensor] | None:
        """The states after each token of a recorded call that ended in this one, for who keeps them elsewhere."""
        new, self.new = self.new, []
        return new if new and new[-1] is given else None

    def before(self, tokens: int) -> Tensor:
        """The state before the last so many tokens, from which it goes on.

        Raises:
            RuntimeError: if they were not recorded.
        """
        kept = len(self.states) - 1
        if tokens > kept:
            raise RuntimeError(NOT_KEPT.format(asked=tokens, kept=max(kept, 0)))
        self.states = [self.states[kept - tokens]]
        return self.states[0]


_OF_STATE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_MADE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# Of each layer of a cache that records, by the number of its state.
RECORDINGS: WeakKeyDictionary[Any, dict[int, Recording]] = WeakKeyDictionary()


def note(state: Tensor | None) -> None:
    """That it is one of the gated delta rule, if anybody may ask."""
    if RECORDINGS and state is not None:
        _MADE[state] = True


def record(state: Tensor, recording: Recording) -> None:
    """Calls that start from it are recorded."""
    _OF_STATE[state] = recording


def forget(state: Tensor | None) -> None:
    """Calls that start from it are recorded no longer."""
    if state is not None:
        _OF_STATE.pop(state, None)


def recording_of(state: Tensor | None) -> Recording | None:
    """Where the states of a call that starts from this one are to be kept, if anywhere."""
    found: Recording | None = _OF_STATE.get(state) if _OF_STATE and state is not None else None
    return found


def recorded(call: RuleCall, recording: Recording, serving: AnyImplementation) -> tuple[Tensor, Tensor]:
    """The output `[B, T, Hv, V]` and the state after all. `serving`: who computes a single token."""
    if serving.run is recurrent.run and call.q.shape[1] <= recurrent.MOST_TOKENS:
        output, states = recurrent.run_several(call)
    elif serving.run is gated_delta_rule:
        output, states = several_tokens(call)
    else:
        output, states = _token_by_token(call, serving.run)
    recording.new = states
    return output, states[-1]


def part(call: RuleCall, at: int, state: Tensor | None) -> RuleCall:
    """A token of a call, after this state."""
    q, k, v, g, beta = (each[:, at : at + 1] for each in (call.q, call.k, call.v, call.g, call.beta))
    return replace(call, q=q, k=k, v=v, g=g, beta=beta, initial_state=state, output_final_state=True)


def _token_by_token(call: RuleCall, one: OneToken) -> tuple[Tensor, list[Tensor]]:
    outputs, states = [], []
    state = call.initial_state
    for at in range(call.q.shape[1]):
        output, state = one(part(call, at, state))
        assert state is not None
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], states
