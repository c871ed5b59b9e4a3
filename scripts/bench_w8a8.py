"""What int8 weights change of a program: the memory of a model that is loaded, and the launches of its steps.

    python -m npu_patch.simulator scripts/bench_w8a8.py

Models of several families with random weights are saved in bfloat16, quantised by `python -m npu_patch quantize`,
loaded as int8, and run on the simulated NPU beside the bfloat16 ones, both patched: bytes that are allocated once they
were run, and launches of a prompt, of a token and of a step with LoRA on every linear layer. What that is in time only
an NPU can say. Of the sizes that models have, memory follows from shapes; embeddings and head stay in bfloat16, which
decides for small models.
"""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

import npu_patch
from npu_patch import simulator
from npu_patch.commands import main as command

TINY = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 64}
DEEP = {**TINY, "num_hidden_layers": 28, "head_dim": 32}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
SHARED = {"shared_expert_intermediate_size": 128}
DELTA = {f"linear_{what}": number for what, number in (("num_key_heads", 4), ("num_value_heads", 4))}
DELTA |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": False}
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "qwen3, 28 layers": ("qwen3", DEEP),
    "qwen3_moe, 4 layers": ("qwen3_moe", {**TINY, **EXPERTS}),
    "qwen3_5_text, 4 layers": ("qwen3_5_text", {**TINY, **DELTA}),
    "qwen3_next, 4 layers": ("qwen3_next", {**TINY, **EXPERTS, **SHARED, **DELTA}),
}
SIZES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen3-1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen3-8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "Qwen3-32B": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
}
TIED = ("Qwen3-0.6B", "Qwen3-1.7B")
PROMPT, MOST = 16, 0.55


@dataclass(frozen=True)
class Measured:
    memory: int  # bytes, of the model
    prompt: simulator.Counted
    token: simulator.Counted
    lora: simulator.Counted
    of_w8a8: int  # calls


def main() -> None:
    if not simulator.is_active():
        raise SystemExit("counts are of the simulated NPU: python -m npu_patch.simulator scripts/bench_w8a8.py")
    npu_patch.apply()
    for name, (family, sizes) in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            half, int8 = saved(family, sizes, Path(folder))
            measure(half)  # what the first run of all allocates is no model's
            measured = [measure(each) for each in (half, int8)]
        shown(name, *measured)
    print("\nfrom shapes alone, head and embeddings in bfloat16:")
    for name, sizes in SIZES.items():
        print(f"  {name:<12} {of_shapes(name, sizes):.3f} of the bytes in bfloat16")


def saved(family: str, sizes: dict[str, int], folder: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **sizes, **HEADS, eos_token_id=None, pad_token_id=0)
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder / "half")
    if command(["quantize", str(folder / "half"), str(folder / "int8")]):
        raise SystemExit("the model was not quantised")
    return folder / "half", folder / "int8"


def measure(folder: Path) -> Measured:
    gc.collect()
    before = torch.npu.memory_allocated()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("npu").eval()
    ids = torch.arange(PROMPT, device="npu")[None]
    with npu_patch.applied(model) as report, torch.no_grad():
        cache = model(input_ids=ids).past_key_values
        with simulator.count() as prompt:
            model(input_ids=ids)
        with simulator.count() as token:
            model(input_ids=ids[:, :1], past_key_values=cache)
        calls = sum(each.calls.ran for each in npu_patch.report() if each.patch == "w8a8")
        del cache, report
        gc.collect()
        memory = torch.npu.memory_allocated() - before
    return Measured(memory, prompt, token, a_lora_step(model, ids), calls)


def a_lora_step(model: Any, ids: torch.Tensor) -> simulator.Counted:
    """The second one, as of a job."""
    targets = [
        name for name, each in model.named_modules() if isinstance(each, torch.nn.Linear) and "lm_head" not in name
    ]
    wanted = [name for name in targets if not name.endswith(("gate", "in_proj_ba", "in_proj_a", "in_proj_b"))]
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=wanted)).train()
    npu_patch.apply(adapted)
    for _ in range(2):
        with simulator.count() as counted:
            adapted(input_ids=ids, labels=ids).loss.backward()
    return counted


def shown(name: str, half: Measured, int8: Measured) -> None:
    ratio = int8.memory / half.memory
    print(f"{name}: {half.memory} bytes in bfloat16, {int8.memory} in int8: {ratio:.3f}, at most {MOST}")
    if ratio > MOST or not int8.of_w8a8:
        raise SystemExit("more than that, or nothing was computed in int8")
    for what in ("prompt", "token", "lora"):
        ours, theirs = getattr(int8, what), getattr(half, what)
        more = ours.launches / theirs.launches
        print(f"  {what:<7} {ours.launches:>5} launches against {theirs.launches:>5}: {more:.3f}")
        for op in ("npu_dynamic_quant", "npu_quant_matmul"):
            print(f"  {'':<7} {ours.by_op.get(f'npu::{op}', (0,))[0]:>5} of {op}")


def of_shapes(name: str, sizes: dict[str, Any]) -> float:
    with torch.device("meta"):
        config = transformers.Qwen3Config(
            **sizes, head_dim=128, num_key_value_heads=8, vocab_size=151936, tie_word_embeddings=name in TIED
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
    half = int8 = 0
    for module_name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            taken = isinstance(module, torch.nn.Linear) and not module_name.endswith("lm_head")
            if module_name.endswith("lm_head") and name in TIED:
                continue
            half += 2 * parameter.numel()
            int8 += parameter.numel() + 2 * len(parameter) if taken else 2 * parameter.numel()
    return int8 / half


if __name__ == "__main__":
    main()
