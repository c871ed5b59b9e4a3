"""Other tools that rebind transformers, known by the package that their code is in, and how each is told to stop.

A site that one of them took stays theirs; the report says whose it is, and what hands it over.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OtherTool:
    """`packages`: dotted names of its modules, or of packages around them. `hands_over`: what is set or left out so
    that it leaves transformers alone."""

    name: str
    packages: tuple[str, ...]
    hands_over: str


TOOLS: tuple[OtherTool, ...] = (
    OtherTool("Liger", ("liger_kernel",), "use_liger_kernel=False, in LLaMA-Factory enable_liger_kernel: false"),
    OtherTool("ms-swift", ("swift",), "--enable_npu_model_patch false"),
    OtherTool("LLaMA-Factory", ("llamafactory",), "use_v1_kernels: false, in its v1 no kernel_config"),
    OtherTool("twinkle", ("twinkle",), "no kernelize(model)"),
    OtherTool(
        "VeOmni", ("veomni",), "eager for rms_norm_, rotary_pos_emb_, swiglu_mlp_ and moe_implementation in its ops"
    ),
    OtherTool("MindSpeed", ("mindspeed", "mindspeed_llm", "mindspeed_mm"), "no import of its megatron_adaptor"),
    OtherTool("verl", ("verl",), "no import of verl.models.transformers.npu_patch"),
    OtherTool("hub kernels", ("kernels", "kernels_community"), "use_kernels=False, or USE_HUB_KERNELS=0"),
)


def tool_of(module: str) -> OtherTool | None:
    """Whose a module is, by its name."""
    return next((tool for tool in TOOLS if module.split(".", 1)[0] in tool.packages), None)


def of_tool(module: str) -> str:
    """To follow the name of something in that module: " (Liger; to hand it over: ...)", or nothing."""
    tool = tool_of(module)
    return f" ({tool.name}; to hand it over: {tool.hands_over})" if tool is not None else ""
