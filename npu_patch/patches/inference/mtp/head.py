"""The head: transformers' own `MtpModel`, of the model's decoder layer and norms, with the weights that are published
beside the model; kept as long as the model is, and no part of it: `state_dict()` and `save_pretrained` know no head."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from npu_patch.patches.inference.mtp.published import published_beside
from npu_patch.patches.inference.mtp.trunk import FULL, Trunk

EXPERTS = "mlp.experts."
SHARED = ("embed_tokens", "shared_head", "rotary_emb")


@dataclass(frozen=True)
class _Kept:
    """`heads`: one for each number of drafts, of the same weights: several threads may draft."""

    made_of: tuple[Any, ...]
    heads: dict[int, Any]


_HEADS: WeakKeyDictionary[Any, _Kept] = WeakKeyDictionary()


def forget() -> None:
    _HEADS.clear()


def keep(trunk: Trunk, device_map: Any, load: Callable[[type], Any]) -> Any:
    """The head of a model. `load(class)` reads it, the first time and where its files are others.

    Raises:
        ValueError: if its weights are none of such a head.
    """
    published = published_beside(trunk.config.name_or_path)
    made_of = (published.stamp, trunk.config.dtype, str(device_map))
    kept = _HEADS.get(trunk.model)
    if kept is None or kept.made_of != made_of:
        kept = _Kept(made_of, {1: load(_head_class()).eval().requires_grad_(False)})
        _HEADS[trunk.model] = kept
    drafts = trunk.config.get_text_config(decoder=True).num_mtp_layers
    if drafts not in kept.heads:
        kept.heads[drafts] = _asked_again(kept.heads[1], drafts)
    kept.heads[drafts].tie_with_main_model(trunk)
    return kept.heads[drafts]


def _asked_again(head: Any, drafts: int) -> Any:
    """For several drafts its one layer is asked as often, of what it said itself: the same weights, caches apart."""
    of_model = (vars(head)[name] for name in SHARED)
    shared = {id(each): each for each in (*head.parameters(), *head.buffers(), *of_model)}
    again = copy.deepcopy(head, {**shared})
    for number in range(1, drafts):
        layer = copy.deepcopy(again.layers[0], {**shared})
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
        again.layers.append(layer)
    again.config.layer_types = [FULL] * drafts
    return again


def trunk_of(model: Any, drafts: int) -> Trunk:
    """As `keep` takes it, for the head that is published beside it."""
    return Trunk(model, published_beside(model.config.name_or_path).has_experts, drafts)


def new_head(model: Any, sparse: bool | None = None) -> Any:
    """With random weights, as a model's own are made, in its dtype and beside its layers: for who trains one."""
    trunk = Trunk(model, sparse)
    head = _head_class()(trunk, 1)
    for module in head.modules():
        model.get_decoder()._init_weights(module)
    return head.to(_place(trunk), trunk.config.dtype)


def head_to_train(model: Any) -> tuple[Any, bool]:
    """The head that is beside a model, apart from the one that drafts, or a new one; and whether it is new."""
    try:
        trunk = trunk_of(model, 1)
    except ValueError:
        return new_head(model), True
    head, places = new_head(model, published_beside(trunk.config.name_or_path).has_experts), {"": _place(trunk)}
    head.load_state_dict(_head_class().from_pretrained(trunk, device_map=places).state_dict())
    return head, False


def _place(trunk: Trunk) -> torch.device:
    device: torch.device = next(trunk.get_decoder().layers[0].parameters()).device
    return device


@functools.cache
def _head_class() -> Any:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.modeling_layers import MtpModel

    class Head(MtpModel):
        """What it shares with the model is no part of it: neither loaded, nor moved, nor trained."""

        def __init__(self, main_model: Any, num_mtp_layers: int) -> None:
            super().__init__(main_model, 1)

        def tie_with_main_model(self, main_model: Any) -> None:
            super().tie_with_main_model(main_model)
            for name in SHARED:
                vars(self)[name] = self._modules.pop(name, None)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            drafts = getattr(kwargs.get("mtp_cache"), "drafts", None)
            if drafts is None:
                return super().forward(*args, **kwargs)
            return *drafts(kwargs["input_ids"], kwargs["last_hidden_states"], kwargs["position_ids"]), None

        def get_weight_conversions(self, main_model: Any) -> list[Any]:
            conversions: list[Any] = super().get_weight_conversions(main_model)
            published = published_beside(main_model.config.name_or_path)
            of_all = (each for each in conversions if not each.scope_prefix)  # others are for a part of the model
            stacked = any("experts.*." in name for each in of_all for name in each.source_patterns)
            if published.has_single_experts and not stacked:
                conversions += get_checkpoint_conversion_mapping("qwen2_moe")
            return conversions

        def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
            super()._adjust_missing_and_unexpected_keys(loading_info)
            _refuse(self, loading_info)

        def get_input_embeddings(self) -> Any:
            return self.embed_tokens

    Head.__name__, Head.__module__ = MtpModel.__name__, MtpModel.__module__  # by which its names on disk are found
    return Head


def _refuse(head: torch.nn.Module, info: Any) -> None:
    """
    Raises:
        ValueError: if the weights on disk are not all of the head's, and those alone.
    """
    wrong = {
        "missing": sorted(info.missing_keys),
        "of no such head": sorted(info.unexpected_keys),
        "of another shape": [f"{name} {list(found)}, not {list(asked)}" for name, found, asked in info.mismatched_keys],
        "not to be converted": [*info.conversion_errors, *info.error_msgs],
    }
    found = "; ".join(f"{what}: {', '.join(map(str, names[:4]))}" for what, names in wrong.items() if names)
    if found:
        raise ValueError(f"the weights of a head (mtp.*) beside the model do not fit it. {found}")


def published_names(head: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Its weights as they are published: experts one by one."""
    renamed = {"eh_proj": "fc", "enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "post_norm": "norm"}
    found: dict[str, torch.Tensor] = {}
    for name, tensor in head.state_dict().items():
        _, number, part, rest = name.split(".", 3)
        if number != "0":
            continue  # the same weights
        if part in renamed:
            found[f"mtp.{renamed[part]}.{rest}"] = tensor
        elif rest.startswith(EXPERTS):
            found |= _one_by_one(f"mtp.layers.{number}.{rest}", tensor)
        else:
            found[f"mtp.layers.{number}.{rest}"] = tensor
    return found


def _one_by_one(name: str, stacked: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of `mlp.experts.gate_up_proj` `[experts, 2 * intermediate, hidden]`, or `mlp.experts.down_proj`."""
    of_all, part = name.rsplit(".", 1)
    parts = {"gate_proj": 0, "up_proj": 1} if part == "gate_up_proj" else {part: 0}
    return {
        f"{of_all}.{number}.{each}.weight": expert.chunk(len(parts))[at]
        for number, expert in enumerate(stacked)
        for each, at in parts.items()
    }
