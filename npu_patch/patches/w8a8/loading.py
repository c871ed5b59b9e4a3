"""W8A8 checkpoints, loaded as what they are: int8 in memory, and computed in int8.

Rebinds    `get_hf_quantizer` in transformers.modeling_utils, by which every `from_pretrained` finds who loads a
           quantised checkpoint.
To         the same, with a quantizer of ours for int8 weights by output channel and dynamic int8 activations by token,
           as compressed-tensors (`quantization_config`) or msModelSlim (quant_model_description.json) describe them.
           Which layers are int8 is what the files have. compressed-tensors itself need not be installed.
Not when   the scheme is another, or the user asks for `CompressedTensorsConfig(dequantize=True)`.
Delete     when transformers keeps int8 weights as they are and computes with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from npu_patch.checkpoints.folder import INDEX, INDEX_ENDING, ONE_FILE, json_of
from npu_patch.checkpoints.safetensors_file import BadCheckpoint
from npu_patch.checkpoints.w8a8 import ASCEND, COMPRESSED_TENSORS, DESCRIPTION, FLOAT, check_config
from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.ops.w8a8.op import W8A8
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.op import of_no_computation
from npu_patch.serving.replacement import TakenOver, Unserved, replacement_for
from npu_patch.sites.sites import Site, innermost

MODULE, NAME = "transformers.modeling_utils", "get_hf_quantizer"
ARGUMENTS = ("config", "quantization_config", "device_map", "weights_only", "user_agent")
CONTENT = "quantization_config"
UNKNOWN = ("kv_cache_scheme", "sparsity_config", "transform_config")  # besides the weights: not known here
LOADING = of_no_computation("int8 checkpoints", "int8 weights as they are", W8A8.device_types)


def find(module: ModuleType) -> Iterable[Site]:
    if module.__name__ == MODULE and NAME in vars(module):
        yield Site(module, NAME, vars(module)[NAME])


def read_site(site: Site) -> AsNamed | NotRead:
    from transformers.quantizers.base import HfQuantizer

    code = getattr(innermost(site.original), "__code__", None)
    if code is None or code.co_varnames[: len(ARGUMENTS)] != ARGUMENTS or not hasattr(HfQuantizer, "serialized_names"):
        return NotRead("this transformers loads quantised checkpoints another way, 5.23 is known", in_order=True)
    return AsNamed("int8 checkpoints")


def bind_site(site: Site, reading: AsNamed, context: Context) -> Replacement | NotRead:
    calls = Calls()
    function = replacement_for(site.original, calls, _serve(site.original), bypassed=Bypassed())
    return Replacement(function, reading.name, calls, unshown=context.live is not None)


def _serve(original: Callable[..., Any]) -> Callable[..., Any]:
    def serve(
        config: Any,
        quantization_config: Any,
        device_map: Any,
        weights_only: Any,
        user_agent: Any,
        gguf_file: Any = None,
    ) -> Any:
        found = _described(config)
        if found is None:
            rest = quantization_config, device_map, weights_only, user_agent
            return TakenOver(original(config, *rest, gguf_file=gguf_file))
        if isinstance(found, str):
            return Unserved(found)
        if gguf_file is not None:
            return Unserved("a file in GGUF")
        if getattr(quantization_config, "dequantize", False):
            return Unserved("dequantised, as the user asks for")
        if quantization_config is not None and quantization_config.quant_method != COMPRESSED_TENSORS:
            return Unserved(f"the user asks for {quantization_config.quant_method}")
        from npu_patch.patches.w8a8.quantizer import W8A8Quantizer

        kind, content = found
        quantizer = W8A8Quantizer(content, kind)
        weights_file = _weights_file(Path(config.name_or_path)) if kind == ASCEND else None
        if weights_file is not None:
            config.transformers_weights = weights_file
        config.quantization_config = quantizer.quantization_config
        user_agent["quant"] = COMPRESSED_TENSORS
        return quantizer, config, device_map

    return serve


def _described(config: Any) -> tuple[str, Mapping[str, Any] | None] | str | None:
    """Who describes the checkpoint and how; or why it is not for us; None where nothing is described."""
    content = getattr(config, CONTENT, None) or getattr(config.get_text_config(decoder=True), CONTENT, None)
    if content is None:
        folder = config.name_or_path
        if not folder or not os.path.isfile(os.path.join(folder, DESCRIPTION)):
            return None
        schemes = {each for name, each in json_of(Path(folder, DESCRIPTION)).items() if name.endswith(".weight")}
        return None if schemes <= {FLOAT} else (ASCEND, None)  # others would be loaded as if they were floats
    content = content if isinstance(content, dict) else content.to_dict()
    if content.get("quant_method") != COMPRESSED_TENSORS:
        return f"the quantisation {content.get('quant_method')}"
    try:
        check_config(content, Path(config.name_or_path or ""))
    except BadCheckpoint as other:
        return str(other)
    further = [name for name in UNKNOWN if content.get(name)]
    groups = (content.get("config_groups") or {}).values()
    if further or not groups or any(group.get("output_activations") for group in groups):
        return f"{', '.join(further) or 'activations of outputs'} besides int8 weights"
    return COMPRESSED_TENSORS, content


def _weights_file(folder: Path) -> str | None:
    """msModelSlim calls its files otherwise than transformers expects them."""
    files = sorted(path.name for path in folder.iterdir())
    if ONE_FILE in files or INDEX in files:
        return None
    indices = [name for name in files if name.endswith(INDEX_ENDING)]
    return next(iter([*indices, *(name for name in files if name.endswith(".safetensors"))]), None)


PATCH = Patch(
    "w8a8_loading",
    "w8a8",
    LOADING,
    find,
    read_site,
    bind_site,
    layers=lambda site, context: None,
    tunable=False,
    libraries=(MODULE,),
)
