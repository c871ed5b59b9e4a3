"""What a user can do about a call that went to the original, or a site that was left alone: by the reason's words."""

from __future__ import annotations

import re

# The first that is found in a reason counts. What is the model's own nature has no row: nobody can act on it.
ACTIONS: tuple[tuple[str, str], ...] = (
    (r"\bon cpu\b", "put the model and its inputs on the device"),
    (r"\bfloat64\b", "load the model in bfloat16, float16 or float32"),
    (r"^hooks on all modules", "remove what torch.nn.modules.module.register_module_forward_hook registered"),
    (r"^hooks on ", "remove those hooks where they are not needed"),
    (r" is parametrized", "remove_parametrizations() once it is trained"),
    (r"^a mask for padding", "pack the samples (packing=True, padding_free=True), which needs no mask"),
    (r"^(being compiled|compiling\b)", "leave this part out of torch.compile"),
    (r"asks for the experts implementation", "from_pretrained(..., experts_implementation='grouped_mm')"),
    (r"attention implementation is", "from_pretrained(..., attn_implementation='sdpa')"),
    (r"^several active adapters", "set_adapter() with one, or merge them with add_weighted_adapter()"),
    (r"^an adapter with a bias", "LoraConfig(lora_bias=False)"),
    (r"^its loss is ", "leave the model's loss_function as it is"),
    (r"^casting its input is switched off", "peft's cast_input_dtype_enabled = True"),
    (r"input, weight and adapter in ", "give the adapters and the model one dtype, or autocast the step"),
)


def what_to_do(reason: str) -> str | None:
    return next((action for pattern, action in ACTIONS if re.search(pattern, reason)), None)


def with_action(reason: str) -> str:
    action = what_to_do(reason)
    return reason if action is None else f"{reason} ({action})"
