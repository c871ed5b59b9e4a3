"""Which tensors of a checkpoint become int8, and why the others do not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from npu_patch.checkpoints.safetensors_file import Entry

FLOATS = ("BF16", "F16", "F32")
WIDEST = 65535  # of a factor of npu_quant_matmul
WEIGHT = ".weight"
CONV1D = ("gpt2", "openai-gpt", "decision_transformer", "imagegpt", "clvp")  # families of such layers
LEFT_ALONE: Mapping[str, str] = {  # what it is -> the beginning of a module's name, as `re.match` has it
    "head": r".*lm_head$",
    "embedding": r".*embed",
    "router or gate of experts": r".*(\.|^)((gate|router|shared_expert_gate)$|router\.)",
    "norm": r".*norm",
    "convolution": r".*conv",
    "gate of a gated delta net": r".*linear_attn\.in_proj_(a|b|ba)$",
    "tower of images or sound": r".*(visual|vision|image|audio|multi_modal_projector|mm_projector)",
    "multi-token prediction": r"(.*\.)?mtp\.",
    "head of a reward or a class": r".*(score|classifier|v_head)$",
}


PACKED: Mapping[str, tuple[str, ...]] = {  # the end of a packed tensor's name -> projections, one above the other
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}


@dataclass(frozen=True)
class Selected:
    """`summed_over`: the dimension of the inputs, each other index of which has a scale of its own. `apart`: the
    projections that packed experts are written as, each a matrix of its own; none where the tensor keeps its name."""

    entry: Entry
    summed_over: int
    apart: tuple[str, ...] = ()

    def names(self, expert: int) -> list[str]:
        """Of the matrices of one expert, as checkpoints have them that were never packed."""
        experts = self.entry.name.rpartition(".")[0]
        return [f"{experts}.{expert}.{projection}{WEIGHT}" for projection in self.apart]


@dataclass(frozen=True)
class Selection:
    """`left`: names of tensors -> why; `ignored`: what a loader is told of linear layers that are no int8."""

    selected: Mapping[str, Selected]
    left: Mapping[str, str]
    ignored: list[str]


def select(
    tensors: Mapping[str, Entry],
    config: Mapping[str, Any],
    ignore: Sequence[str] = (),
    also: Sequence[str] = (),
    keep_packed: bool = False,
) -> Selection:
    """Matrices `NAME.weight`, those of experts among them, and experts that are packed in one tensor.

    `ignore`, `also`: beginnings of modules' names, as LEFT_ALONE has them, that are left alone as well, or taken even
    so.
    """
    selected: dict[str, Selected] = {}
    left: dict[str, str] = {}
    matched: list[str] = []
    named: list[str] = []
    for name, entry in tensors.items():
        module = name.removesuffix(WEIGHT)
        found = _what_may_be_int8(entry, config)
        if isinstance(found, str):
            left[name] = found
            continue
        pattern, reason = _pattern_for(module, ignore, also)
        if reason is None and max(entry.shape[-2:]) > WIDEST:
            reason = f"wider than {WIDEST}"
        if reason is None and len(entry.shape) == 3 and (_bias(name, tensors) or (_kind(name) not in PACKED)):
            reason = "packed experts of an unknown kind"
        if reason is None:
            apart = PACKED[_kind(name)] if len(entry.shape) == 3 and not keep_packed else ()
            selected[name] = Selected(entry, found, apart)
            continue
        left[name] = reason
        (matched if pattern else named).append(pattern or module)
        if also and pattern:  # the pattern would name what is taken too
            named.append(module)
    patterns = [] if also else [f"re:{pattern}" for pattern in dict.fromkeys(matched)]
    return Selection(selected, left, sorted({*patterns, *named, "lm_head"}))


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _bias(name: str, tensors: Mapping[str, Entry]) -> bool:
    """Experts with biases are packed in other ways too (every other row, as gpt-oss has them)."""
    return f"{name}_bias" in tensors


def _pattern_for(module: str, ignore: Sequence[str], also: Sequence[str]) -> tuple[str | None, str | None]:
    if any(re.match(pattern, module) for pattern in also):
        return None, None
    for pattern in ignore:
        if re.match(pattern, module):
            return pattern, f"--ignore {pattern}"
    return next(((p, what) for what, p in LEFT_ALONE.items() if re.match(p, module)), (None, None))


def _what_may_be_int8(entry: Entry, config: Mapping[str, Any]) -> int | str:
    """The dimension that a product sums over, or why there is none."""
    if entry.dtype not in FLOATS:
        return f"of dtype {entry.dtype}"
    if not entry.size:
        return "empty"
    if len(entry.shape) == 2 and entry.name.endswith(WEIGHT):
        if config.get("model_type") in CONV1D and entry.name.split(".")[-2].startswith(("c_", "q_attn")):
            return "a Conv1D, whose weights lie the other way"
        return 1
    packed = len(entry.shape) == 3 and "experts" in entry.name.split(".") and "bias" not in entry.name
    if not packed:
        return "no matrix"
    sizes = {**config, **(config.get("text_config") or {})}
    inner = [sizes.get(name) for name in ("moe_intermediate_size", "intermediate_size") if sizes.get(name)]
    inputs = set(inner[:1]) if "down" in _kind(entry.name) else {sizes.get("hidden_size")}
    summed_over = [dimension for dimension in (1, 2) if entry.shape[dimension] in inputs]
    if len(summed_over) == 1:
        return summed_over[0]
    return f"packed experts {list(entry.shape)} of which side, of {sorted(map(str, inputs))}, the inputs are is unclear"
