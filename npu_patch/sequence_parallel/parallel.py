"""A model whose attention and gated delta nets get whole sequences, while the rest of it has a part of each."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from npu_patch.applying.ranks import in_place, require_same
from npu_patch.patches.gated_delta.packing import REMEDY, sign_of_packing
from npu_patch.sequence_parallel.exchange import Group, to_heads, to_tokens
from npu_patch.sequence_parallel.gated_delta import hooked
from npu_patch.sites.journal import Journal
from npu_patch.switches import resolve

NO_LABEL = -100
KNOWN_LAYERS = ("full_attention", "sliding_attention")
GATED_DELTA = "linear_attention"
LATE_S = 300.0  # the first step of a rank after that of another
_numbers = itertools.count()


class SequenceParallel:
    """`group`: the ranks that share each sequence (default: all). `sequence_parallel=False`, before the switch of that
    name: every rank has whole sequences, with the same losses and gradients. Raises ValueError where the group's size
    does not divide the heads, attention is none of transformers' registry, or other layers look along the sequence."""

    def __init__(self, model: torch.nn.Module, group: Group = None, **switch: bool) -> None:
        self.group = group
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        configuration: Any = model.config
        self.config = configuration.get_text_config()
        self.inner: str = self.config._attn_implementation
        self.divides: bool = resolve(switch, of="SequenceParallel()")["sequence_parallel"]
        self._batch: dict[str, Any] | None = None
        self._masks: dict[bool, Any] = {}
        self._hooks: list[Any] = []
        self._alike = self.ranks == 1
        self.name = f"{self.inner}_over_ranks_{next(_numbers)}"
        if self.divides:
            self._attach(model)

    def _attach(self, model: torch.nn.Module) -> None:
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

        _require_divisible(self.ranks, "attention heads", self.config.num_attention_heads)
        if self.inner not in ALL_ATTENTION_FUNCTIONS:
            known = ", ".join(sorted(ALL_ATTENTION_FUNCTIONS))
            raise ValueError(f"attention {self.inner!r} is a model's own: accepted is one that all have: {known}")
        kinds = list(getattr(self.config, "layer_types", None) or ())
        others = set(kinds) - set(KNOWN_LAYERS)
        if GATED_DELTA in kinds:
            journal, divided = Journal(), lambda: self._batch is not None
            of_nets = [hooked(layer, journal, divided, self.ranks, self.rank, self.group) for layer in model.modules()]
            self._hooks = [hook for hooks in of_nets for hook in hooks]
            if sum(map(bool, of_nets)) == kinds.count(GATED_DELTA):
                others -= {GATED_DELTA}
        try:
            if others:
                known = f"{', '.join(KNOWN_LAYERS)} and gated delta nets (of transformers 5.15 or newer)"
                raise ValueError(f"layers of {', '.join(sorted(others))}: sequences are divided for {known}")
            if self._hooks:
                _require_divisible(self.ranks, "value heads of gated delta nets", self.config.linear_num_value_heads)
        except ValueError:
            self._unhook()
            raise
        AttentionInterface.register(self.name, self._attention)
        AttentionMaskInterface.register(self.name, self._mask)
        self.config._attn_implementation = self.name  # which its layers look up

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def close(self) -> None:
        """The model attends as before."""
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface

        self._unhook()
        self.config._attn_implementation = self.inner
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(self.name, None)

    @contextmanager
    def part(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> Iterator[dict[str, Any]]:
        """This rank's arguments for the model, of the whole batch's. The backward belongs into the block as well.

        Raises ValueError for tokens that the ranks do not divide; PatchError where the ranks are not patched alike."""
        self._require_alike()
        batch = {"attention_mask": attention_mask, "position_ids": position_ids}
        if not self.divides:
            given = {"input_ids": input_ids, "labels": labels, **batch, **others, "use_cache": False}
            yield {name: each for name, each in given.items() if each is not None}
            return
        rows, length = input_ids.shape
        _require_divisible(self.ranks, "tokens of each sequence", length)
        if self._hooks:
            others = _told(length, batch, others)
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        position_ids = position_ids.expand(rows, length)
        mine = slice(self.rank * length // self.ranks, (self.rank + 1) * length // self.ranks)
        part: dict[str, Any] = {"input_ids": input_ids[:, mine], "position_ids": position_ids[:, mine], **others}
        if attention_mask is not None:
            part["attention_mask"] = attention_mask[:, mine]
        if labels is not None:
            following = F.pad(labels, (0, 1), value=NO_LABEL)[:, 1:]
            each = (following != NO_LABEL).sum() / self.ranks  # the mean over ranks is that over tokens then
            own = following[:, mine].contiguous()  # which is viewed
            part |= {"labels": own, "shift_labels": own, "num_items_in_batch": each}
        self._batch = {"attention_mask": attention_mask, "position_ids": position_ids}
        try:
            yield {**part, "use_cache": False}
        finally:
            self._batch = None
            self._masks.clear()

    def _require_alike(self) -> None:
        """Once: ranks that call other collectives would wait for each other."""
        if not self._alike:
            own = {"divides": "on" if self.divides else "off", "attention": self.inner}
            state = {**in_place(), "sequence_parallel": own}
            require_same("sequences", dist.get_process_group_ranks(self.group), state, LATE_S)
            self._alike = True

    def _mask(self, *args: Any, **kwargs: Any) -> Any:
        """Of the model, which knows a part of the tokens only: none."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        return ALL_MASK_ATTENTION_FUNCTIONS[self.inner](*args, **kwargs) if self._batch is None else None

    def _whole_mask(self, batch: dict[str, Any], windowed: bool, query: Tensor) -> Any:
        if windowed not in self._masks:
            from transformers import masking_utils

            config = copy.copy(self.config)
            config._attn_implementation = self.inner
            rows, length = batch["position_ids"].shape
            embeds = query.new_empty(rows, length, 1)
            make = masking_utils.create_sliding_window_causal_mask if windowed else masking_utils.create_causal_mask
            self._masks[windowed] = make(config=config, inputs_embeds=embeds, past_key_values=None, **batch)
        return self._masks[windowed]

    def _attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        inner, batch = ALL_ATTENTION_FUNCTIONS[self.inner], self._batch
        if batch is None:  # the whole sequence is here
            return inner(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("position_bias") is not None:
            raise ValueError("position_bias: attention with a bias by position is not divided among ranks")
        repeats = self.ranks // math.gcd(self.ranks, key.shape[1])
        if repeats > 1:
            key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
            module = _WithGroups(module, query.shape[1] // key.shape[1])
        query, key, value = (to_tokens(tensor, self.ranks, self.group) for tensor in (query, key, value))
        if kwargs.get("s_aux") is not None:
            kwargs["s_aux"] = kwargs["s_aux"].chunk(self.ranks)[self.rank]
        if "position_ids" in kwargs:
            kwargs["position_ids"] = batch["position_ids"]
        mask = self._whole_mask(batch, kwargs.get("sliding_window") is not None, query)
        out, _ = inner(module, query, key, value, mask, **kwargs)
        return to_heads(out, self.ranks, self.group), None


class _WithGroups:
    """A layer as attention looks at it, with another number of query heads for each key-value head."""

    def __init__(self, module: Any, groups: int) -> None:
        self._module, self.num_key_value_groups = module, groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _require_divisible(ranks: int, what: str, number: int) -> None:
    if number % ranks:
        raise ValueError(f"{number} {what} over {ranks} ranks: accepted is a multiple of {ranks}")


def _told(length: int, batch: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """With the number of the sequence of each token, if some are packed. Refused on every rank, if that is not said:
    position ids start anew in the parts of some ranks only."""
    bounds = others.get("cu_seq_lens_q")
    if others.get("seq_idx") is None and bounds is not None:
        tokens = torch.arange(length, device=bounds.device, dtype=bounds.dtype)
        return {**others, "seq_idx": torch.searchsorted(bounds[1:].contiguous(), tokens, right=True)[None]}
    if others.get("seq_idx") is None and sign_of_packing(batch) is not None:
        raise ValueError(
            "packed sequences would leak into each other: position_ids start anew, and gated delta nets are not told "
            f"where sequences end. {REMEDY}"
        )
    return others
