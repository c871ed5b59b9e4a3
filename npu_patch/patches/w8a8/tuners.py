"""Which of peft's methods compute beside a layer, and so beside one of int8 weights; and which read its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TUNERS = "peft.tuners."
NO_LINEAR = ("ln_tuning", "trainable_tokens", "xlora")  # they have no adapters of linear layers themselves
BESIDE = (
    *("lora", "adalora", "beft", "boft", "c3a", "fourierft", "gralora", "ia3", "lily", "loha", "lokr", "miss", "oft"),
    *("poly", "pvera", "randlora", "road", "vblora", "vera", "waveft"),
)
# By the method, settings with which it does read weights, or is in their dtype; and what such layers hold.
READING: Mapping[str, tuple[tuple[str, Any], ...]] = {
    "lora": (("kasa_config", ...), ("velora_config", ...), ("use_bdlora", ...)),  # set to whatever
    "miss": (("init_weights", "bat"),),
}
VARIANTS = ("KasaLinearVariant", "VeloraLinearVariant", "BdLoraLinearVariant")


def why_not_on(layer: Any) -> str | None:
    """Why the adapters of a layer that there is are wrong on int8 weights."""
    variants = {type(each).__name__ for each in getattr(layer, "lora_variant", {}).values()}
    read = next((name for name in VARIANTS if name in variants), None)
    return why_not(type(layer)) if read is None else f"a {read} reads weights, which without their scales are others"


def why_not(tuner_or_layer: type, config: Any = None) -> str | None:
    """Why adapters of this tuner's class, or of this layer's, cannot be put on int8 weights. Of a class of somebody
    else nothing is known, nor said. Each name in BESIDE was seen to compute what it does on the dequantised weight."""
    module = tuner_or_layer.__module__
    method = module.removeprefix(TUNERS).partition(".")[0]
    if not module.startswith(TUNERS) or method == "tuners_utils" or method in NO_LINEAR:
        return None
    for name, value in READING.get(method, ()):
        given = getattr(config, name, None)
        if given == value or (value is ... and given):
            return f"{method} with {name}={given!r} reads weights, which without their scales are others"
    if method not in BESIDE:
        return (
            f"{method} is not known to leave weights to their layers, and without their scales they are others; known "
            f"are {', '.join(BESIDE)}"
        )
    return None
