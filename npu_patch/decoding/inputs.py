"""The arguments of a decode step, at addresses that stay: what generate() lets grow, as it is for one token.

- The newest token is copied to its place before each replay.
- Positions are counted on within the graph.
- The padding mask spans the cache from the start: a token sees nothing behind itself, so what is to come may be shown.
- What else a call has stays as it was at its first step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PLAIN = (int, float, bool, str, type(None))
MASK = "attention_mask"
COUNTED = ("position_ids", "cache_position")
LAST_OF = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
CACHES = ("past_key_values", "cache_params")
# How arguments start that a prefill alone has a use for; a step without them is compared with the model, too.
OF_THE_PROMPT = (
    "inputs_embeds",
    "input_features",
    "input_values",
    "mm_encoder",
    "pixel_",
    "image_",
    "video_",
    "second",
)


@dataclass(frozen=True, eq=False)
class StepInputs:
    """`taken`: given anew for each step, as the tokens are."""

    tokens: Tensor
    tensors: Mapping[str, Tensor]
    others: Mapping[str, Any]
    taken: Collection[str] = ()

    @classmethod
    def of(
        cls, tokens: Tensor, kwargs: Mapping[str, Any], length: int, width: int = 1, taken: Collection[str] = ()
    ) -> StepInputs:
        """For a cache of `length` tokens and steps of `width`."""
        tensors = {name: _as_it_stays(name, value, length, width) for name, value in _tensors(kwargs)}
        others = {name: value for name, value in kwargs.items() if name not in tensors and not _is_apart(name)}
        return cls(tokens[:, -width:].clone(memory_format=torch.contiguous_format), tensors, others, taken)

    @property
    def width(self) -> int:
        return self.tokens.shape[-1]

    def load(self, tokens: Tensor, kwargs: Mapping[str, Any]) -> None:
        """Of a call's first step, or of any other one with all that has grown since."""
        self.take(tokens)
        for name, value in _tensors(kwargs):
            _write(name, self.tensors[name], value)

    def take(self, tokens: Tensor) -> None:
        """The newest ones, where all else counts itself."""
        self.tokens.copy_(tokens[:, -self.width :])

    def take_rows(self, tokens: Tensor, kwargs: Mapping[str, Any], rows: int) -> None:
        """The newest ones, and what is `taken` of them: the first of the step's. Behind them stays what was there."""
        self.tokens[:, :rows].copy_(tokens[:, -rows:])
        for name in self.taken:
            if name in self.tensors:
                self.tensors[name][..., :rows].copy_(kwargs[name][..., -rows:])

    def count_on(self) -> None:
        """At the end of each step."""
        for name in COUNTED:
            if name in self.tensors and name not in self.taken:
                self.tensors[name].add_(1)

    def differ_from(self, kwargs: Mapping[str, Any]) -> str | None:
        """Which argument of the next step is another than what was counted on."""
        for name, value in kwargs.items():
            if name in self.taken:
                continue
            if name in self.tensors:
                place = self.tensors[name]
                if not torch.equal(place, _as_it_stays(name, value, place.shape[-1], self.width)):
                    return name
            elif not _is_apart(name) and (name not in self.others or self.others[name] != value):
                return name
        return None


def why_not(kwargs: Mapping[str, Any]) -> str | None:
    for name, value in kwargs.items():
        if not _is_apart(name) and not isinstance(value, (Tensor, *PLAIN)):
            return f"the argument {name}, a {type(value).__name__}"
    if isinstance(kwargs.get(MASK), Tensor) and kwargs[MASK].dim() != 2:
        return "an attention mask that is not one of tokens"
    return None


def shape_of(tokens: Tensor, kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Equal for calls whose steps have equal arguments, but for the values of tensors."""
    found: list[Any] = [tokens.shape[0], tokens.dtype]
    for name in sorted(kwargs):
        value = kwargs[name]
        if isinstance(value, Tensor) and not _is_apart(name):
            shape = value.shape[:-1] if name in (MASK, *COUNTED, *LAST_OF) else value.shape
            found.append((name, shape, value.dtype, value.device))
        elif not _is_apart(name):
            found.append((name, value if isinstance(value, PLAIN) else None))
    return tuple(found)


def padded(tokens: Tensor, kwargs: Mapping[str, Any], more: int) -> tuple[Tensor, dict[str, Any]]:
    """With so many tokens behind the last one: any, for nothing before them sees them."""
    found = dict(kwargs)
    for name, value in _tensors(kwargs) if more else ():
        last = value[..., -1:].expand(*value.shape[:-1], more)
        if name == MASK:
            found[name] = torch.cat((value, torch.ones_like(last)), -1)
        elif name in COUNTED:
            found[name] = torch.cat((value, last + torch.arange(1, more + 1, device=value.device)), -1)
        elif name in LAST_OF:
            found[name] = torch.cat((value, last), -1)
    return (torch.cat((tokens, tokens[:, -1:].expand(-1, more)), -1) if more else tokens), found


def _is_apart(name: str) -> bool:
    return name in CACHES or name.startswith(OF_THE_PROMPT)


def _tensors(kwargs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in kwargs.items() if isinstance(value, Tensor) and not _is_apart(name)]


def _as_it_stays(name: str, value: Tensor, length: int, width: int) -> Tensor:
    if name == MASK:
        place = value.new_ones((value.shape[0], length))
    elif name in COUNTED or name in LAST_OF:
        place = value.new_empty((*value.shape[:-1], width))
    else:
        place = torch.empty_like(value, memory_format=torch.contiguous_format)
    _write(name, place, value)
    return place


def _write(name: str, place: Tensor, value: Tensor) -> None:
    if name == MASK:
        shown = min(value.shape[-1], place.shape[-1])
        place[:, :shown].copy_(value[:, :shown])
        place[:, shown:].fill_(1)
    elif name in COUNTED or name in LAST_OF:
        place.copy_(value[..., -place.shape[-1] :])
    else:
        place.copy_(value)
