"""A model whose attention gets whole sequences, while the rest of it has a part of each."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from npu_patch.sequence_parallel.exchange import to_heads, to_tokens

NO_LABEL = -100
KNOWN_LAYERS = ("full_attention", "sliding_attention")
_numbers = itertools.count()


class SequenceParallel:
    """`group`: the ranks that share each sequence (default: all). Raises ValueError where its size does not divide the
    heads, the model's attention is none of transformers' registry, or layers carry a state along the sequence."""

    def __init__(self, model: torch.nn.Module, group: dist.ProcessGroup | None = None) -> None:
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

        self.group = group
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        configuration: Any = model.config
        self.config = configuration.get_text_config()
        self.inner: str = self.config._attn_implementation
        _require_divisible(self.ranks, "attention heads", self.config.num_attention_heads)
        key_heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        if self.ranks % key_heads:
            _require_divisible(self.ranks, "key-value heads", key_heads)
        others = sorted(set(getattr(self.config, "layer_types", None) or ()) - set(KNOWN_LAYERS))
        if others:
            raise ValueError(f"layers of {', '.join(others)}: sequences are divided for {' and '.join(KNOWN_LAYERS)}")
        if self.inner not in ALL_ATTENTION_FUNCTIONS:
            known = ", ".join(sorted(ALL_ATTENTION_FUNCTIONS))
            raise ValueError(f"attention {self.inner!r} is a model's own: accepted is one that all have: {known}")
        self._batch: dict[str, Any] | None = None
        self._masks: dict[bool, Any] = {}
        self.name = f"{self.inner}_over_ranks_{next(_numbers)}"
        AttentionInterface.register(self.name, self._attention)
        AttentionMaskInterface.register(self.name, self._mask)
        self.config._attn_implementation = self.name  # which its layers look up

    def close(self) -> None:
        """The model attends as before."""
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface

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
        """This rank's arguments for the model, of the whole batch's. The backward belongs into the block as well."""
        rows, length = input_ids.shape
        _require_divisible(self.ranks, "tokens of each sequence", length)
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        position_ids = position_ids.expand(rows, length)
        mine = slice(self.rank * length // self.ranks, (self.rank + 1) * length // self.ranks)
        part: dict[str, Any] = {"input_ids": input_ids[:, mine], "position_ids": position_ids[:, mine], **others}
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
        repeats = self.ranks // key.shape[1] if key.shape[1] < self.ranks else 1
        if repeats > 1:
            key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
            module = _WithGroups(module, query.shape[1] // self.ranks)
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
