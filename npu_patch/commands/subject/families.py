"""The model families of the installed transformers: their names, their modeling files, and which name was meant."""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from npu_patch.commands.console.result import CommandError


def without_broken_torch_npu() -> str | None:
    """Lets torch and transformers be imported where torch_npu is installed and CANN is not; says so, if it was needed.

    For commands that need no device. Does nothing once torch is imported, on the simulated NPU for one.
    """
    from npu_patch import simulator

    installed = importlib.util.find_spec("torch_npu") is not None
    if "torch" in sys.modules or not installed or simulator.real_device() is not None:
        return None
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    # transformers imports it wherever it is installed; None is Python's word for what cannot be imported
    sys.modules["torch_npu"] = None  # type: ignore[assignment]
    return "this machine has no CANN: shown is what a sound installation would use"


def families() -> Mapping[str, tuple[str, ...]]:
    """The modeling modules of each family: {"qwen3": ("transformers.models.qwen3.modeling_qwen3",), ...}."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise CommandError("transformers is not installed: pip install 'transformers>=4.57'")
    found: dict[str, list[str]] = {}
    for file in sorted((Path(spec.origin).parent / "models").glob("*/modeling_*.py")):
        if not file.stem.startswith(("modeling_tf_", "modeling_flax_")):
            found.setdefault(file.parent.name, []).append(f"transformers.models.{file.parent.name}.{file.stem}")
    return {name: tuple(modules) for name, modules in found.items()}


def model_types() -> Mapping[str, str]:
    """The family of each model type: {"qwen3_5_text": "qwen3_5", ...}; families under their own name too."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    known = {name: name for name in families()}
    return known | {name: model_type_to_module_name(name) for name in CONFIG_MAPPING_NAMES}


def family_of(model_type: str) -> str:
    """Raises `CommandError` with the near names for one that is none."""
    known = model_types()
    if model_type not in known:
        raise CommandError(unknown(model_type, known))
    return known[model_type]


def unknown(model_type: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(model_type.lower().replace("-", "_").replace(".", "_"), list(known), 5, 0.7)
    meant = f"; near names: {', '.join(near)}" if near else ""
    return f"MODEL {model_type!r} is no model type of the installed transformers{meant}"
