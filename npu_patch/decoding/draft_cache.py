"""A static cache that takes drafted tokens back, at addresses that a graph may know. Imported once transformers is.

A check runs several tokens in rows, as many as graphs of its width have; what lies behind the accepted one is undone at
the start of the next check, by one number on the device: lengths go back, and each recurrent state goes on from the one
that was kept after that row, its convolution from the columns that were before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer, StaticCache, StaticLayer

from npu_patch.decoding import cache as caches
from npu_patch.ops.gated_delta.recorded import Recording, forget, record


class StatesLayer(LinearAttentionLayer):
    """From a first check on: `states[i]`: `[rows, *]`, the recurrent state after each row of the last one;
    `columns[i]`: what its convolution saw, the state before the rows and then theirs. At first: as after one row."""

    recurrent_states: dict[int, Any]
    conv_states: dict[int, Any]
    conv_kernel_size: dict[int, Any]

    def __init__(self, number_of_states: int) -> None:
        super().__init__(number_of_states)
        self.states: dict[int, Tensor] = {}
        self.columns: dict[int, Tensor] = {}
        self.recordings = {index: Recording() for index in range(number_of_states)}
        self.checks = False

    def begin(self, rows: int) -> bool:
        """A check of so many. Whether it has other addresses than the last one: there was less room."""
        wider = False
        for index, state in self.recurrent_states.items():
            if state is not None:
                wider |= _grown(self.states, index, state, (rows, *state.shape), 0)
        for index, state in self.conv_states.items():
            if state is not None:
                shape = *state.shape[:-1], self.conv_kernel_size[index] + rows
                wider |= _grown(self.columns, index, state, shape, -1)
        if not self.checks:
            for index, states in self.states.items():
                states[0] = self.recurrent_states[index]
                record(self.recurrent_states[index], self.recordings[index])
            for index, columns in self.columns.items():
                columns[..., 1 : self.conv_kernel_size[index] + 1] = self.conv_states[index]
            self.checks = True
        return wider

    def go_on(self, at: Tensor, columns_before: Tensor) -> None:
        for index, states in self.states.items():
            torch.index_select(states, 0, at.to(states.device), out=self.recurrent_states[index].unsqueeze(0))
        for index, columns in self.columns.items():
            before = columns_before[: self.conv_kernel_size[index]].to(columns.device)
            torch.index_select(columns, -1, before, out=self.conv_states[index])

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        if not self.checks:
            seen: Tensor = super().update_conv_state(conv_states, state_idx, conv_kernel_size, **kwargs)
            return seen
        seen = torch.cat((self.conv_states[state_idx], conv_states), -1)
        self.columns[state_idx][..., : seen.shape[-1]] = seen
        return seen

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        if not self.checks:
            held: Tensor = super().update_recurrent_state(recurrent_states, state_idx, **kwargs)
            return held
        after_each = self.recordings[state_idx].taken(recurrent_states)
        if after_each is None:
            raise RuntimeError("drafts cannot be taken back: nothing of npu_patch computed the recurrent state")
        kept = self.states[state_idx][: len(after_each)]
        if after_each[0].dtype == kept.dtype:
            torch.stack(after_each, out=kept)
        else:
            kept.copy_(torch.stack(after_each))
        going_on: Tensor = self.recurrent_states[state_idx]
        return going_on

    def end(self) -> None:
        """From here on it is as any other."""
        self.checks = False
        for state in self.recurrent_states.values():
            forget(state)

    def reset(self) -> None:
        super().reset()
        self.end()


def _grown(kept: dict[int, Tensor], index: int, like: Tensor, shape: tuple[int, ...], dim: int) -> bool:
    """Has `kept[index]` be as long as this shape at least; whether it was shorter."""
    before = kept.get(index)
    if before is not None and before.shape[dim] >= shape[dim]:
        return False
    kept[index] = like.new_zeros(shape)
    if before is not None:
        kept[index].narrow(dim, 0, before.shape[dim]).copy_(before)
    return True


class DraftCache(StaticCache):
    """`at`: the row of the last check that the next one goes on from; `width`: how many tokens it wrote. `rows`: how
    many of those the loop knows of. `serves`: a call of generate() whose steps know it. `why_eager`: why its checks,
    and what goes with them, are not captured."""

    layers: list[Any]
    serves = False
    why_eager: str | None = None

    def __init__(self, layers: list[Any], device: torch.device) -> None:
        Cache.__init__(self, layers=[_with_states(each) for each in layers])
        self.at, self.width = (torch.full((1,), value, device=device) for value in (0, 1))
        self.rows, self._at = 1, 0
        self.with_states = [each for each in self.layers if isinstance(each, StatesLayer)]
        self.numbers = torch.arange(1, 1, device=device)
        for layer in self.layers:
            layer.of_rows = {"at": self.at, "width": self.width}  # with what a step changes

    def activate_past_recording(self) -> None:
        """
        Raises:
            ValueError: where an earlier call returned it, and a loop of drafts is given it as it is.
        """
        if not self.serves:
            raise ValueError(
                "assisted generate is not supported with Static cache classes: this one is of another call"
            )

    def crop(self, tokens_to_remove: int) -> None:
        if (self.rows > 1 or self.with_states) and not -self.rows < tokens_to_remove <= 0:
            raise ValueError(f"crop({tokens_to_remove}): accepted are 0 to {1 - self.rows}, those of the last check")
        at = self.rows - 1 + tokens_to_remove
        if at != self._at:
            self.at.fill_(at)
            self._at = at

    def begin(self, rows: int) -> bool:
        """A check of so many. Whether it has other addresses than the last one."""
        kernels = [each or 0 for layer in self.with_states for each in layer.conv_kernel_size.values()]
        if len(self.numbers) < max(kernels, default=0):
            self.numbers = torch.arange(1, 1 + max(kernels), device=self.at.device)
        return any([layer.begin(rows) for layer in self.with_states])

    def go_on(self, width: int) -> None:
        """Before a check writes so many tokens: after what was accepted of the last one."""
        forward = (self.at + 1 - self.width).view(())
        columns = self.numbers + self.at
        for layer in self.layers:
            if isinstance(layer, StatesLayer):
                layer.go_on(self.at, columns)
            else:
                layer.cumulative_length.add_(forward.to(layer.cumulative_length.device))
        self.width.fill_(width)

    def end(self) -> None:
        """Of the call: it holds what was accepted, and goes to the caller."""
        self.go_on(1)
        self._begin_anew()
        for layer in self.with_states:
            layer.end()

    def reset(self) -> None:
        super().reset()
        self._begin_anew()
        self.width.fill_(1)

    def _begin_anew(self) -> None:
        self.serves, self.rows, self._at = False, 1, 0
        self.at.fill_(0)


def _with_states(layer: Any) -> Any:
    return StatesLayer(layer.number_of_states) if type(layer) is LinearAttentionLayer else layer


def made(config: Any, length: int, device: torch.device) -> DraftCache | str:
    """One of so many tokens; or why there is none."""
    cache = caches.made(config, length)
    if isinstance(cache, str):
        return cache
    others = {type(each).__name__ for each in cache.layers if type(each) not in (StaticLayer, LinearAttentionLayer)}
    if others:
        return f"drafts over a static cache with layers of the kind {', '.join(sorted(others))}"
    return DraftCache(cache.layers, device)
