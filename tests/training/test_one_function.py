"""One function, whoever watches: a patched model gives the same bits with gradients and without, in train and in eval,
and when a checkpoint computes it again; what serves a call follows from shapes, dtypes and devices."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

import npu_patch
from npu_patch import simulator
from npu_patch.kernels.gamma import NONE
from npu_patch.measuring import tuning
from npu_patch.numerics import rotation
from npu_patch.ops import qk_norm_rope, rms_norm, rope
from npu_patch.ops.rope import TABLES, VARIANTS
from npu_patch.serving.once_per_step import OncePerTensor
from tests.support.gradients import relative_error
from tests.support.needs_triton import needs_triton
from tests.support.tiny_models import COMMON, FAMILIES, tiny, tiny_batch

DTYPES = [torch.float32, torch.bfloat16]
WATCHERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "with gradients": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def logits_by_watcher(model: torch.nn.Module, ids: Tensor, **given: Any) -> dict[str, Tensor]:
    found = {}
    for watcher, mode in WATCHERS.items():
        for training in (False, True):
            model.train(training)
            with mode():
                found[f"{watcher}, {'train' if training else 'eval'}"] = model(input_ids=ids, **given).logits
    return {name: each.detach().cpu() for name, each in found.items()}


def others(found: dict[str, Tensor]) -> list[str]:
    """Who sees something else than the first one."""
    first, *rest = found
    return [name for name in rest if not torch.equal(found[name], found[first])]


def with_lora(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_whatever_the_grad_mode(family: str, dtype: torch.dtype, npu: torch.device) -> None:
    model = tiny(family).to(dtype).to(npu)
    with npu_patch.applied(model) as report:
        found = logits_by_watcher(model, tiny_batch()["input_ids"].to(npu))
        assert any(outcome.calls.ran for outcome in report.patched)
    assert others(found) == []


ELSEWHERE: dict[str, tuple[str, dict[str, Any]]] = {
    "one projection for gate and up": ("Phi3Config", {"hidden_size": 96}),
    "experts in a registry": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "experts with another gate, and biases": ("GptOssConfig", {"num_local_experts": 5, "num_experts_per_tok": 2}),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_the_same_bits_of_other_kinds_of_layers(kind: str, autocast: bool, npu: torch.device) -> None:
    name, arguments = ELSEWHERE[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**COMMON, **arguments}))
    model = model.float().to(npu) if autocast else model.bfloat16().to(npu)
    with npu_patch.applied(model), torch.autocast("npu", torch.bfloat16, enabled=autocast):
        assert others(logits_by_watcher(model, tiny_batch()["input_ids"].to(npu))) == []


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_a_mask_first_seen_in_inference_mode_serves_every_other(attention: str, npu: torch.device) -> None:
    """What is worked out from a padding mask is kept for as long as the mask is there."""
    model = tiny("qwen3").bfloat16().to(npu)
    batch = {name: tensor.to(npu) for name, tensor in tiny_batch().items()}
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :4] = 0
    with npu_patch.applied(model):
        model.set_attn_implementation(attention)
        with torch.inference_mode():
            first = model(**batch, attention_mask=mask).logits[mask.bool()].cpu()
        again = model(**batch, attention_mask=mask)
        again.loss.backward()
    assert torch.equal(again.logits[mask.bool()].detach().cpu(), first)


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "options",
    [{"swiglu_recompute": True}, pytest.param({"triton": True}, marks=needs_triton)],
    ids=lambda options: next(iter(options)),
)
def test_the_same_bits_with_every_switch(options: dict[str, bool], lora: bool, npu: torch.device) -> None:
    model = tiny("qwen3").bfloat16().to(npu)
    model = with_lora(model) if lora else model
    ids = tiny_batch(length=5)["input_ids"].to(npu)
    with npu_patch.applied(model, **options):
        assert others(logits_by_watcher(model, ids, use_cache=False)) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_implementations_of_torch_alone_give_the_same_bits(dtype: torch.dtype) -> None:
    model = tiny("qwen3_5_moe").to(dtype)
    with npu_patch.applied(model, device="cpu") as report:
        found = logits_by_watcher(model, tiny_batch()["input_ids"])
        assert any(outcome.calls.ran for outcome in report.patched)
    assert others(found) == []


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_5"])
def test_the_ratio_of_a_policy_to_itself_is_one(family: str, npu: torch.device) -> None:
    """As GRPO computes it: log-probabilities with gradients over those without."""
    model = tiny(family).bfloat16().to(npu).train()
    ids = tiny_batch(length=33)["input_ids"].to(npu)

    def log_probabilities() -> Tensor:
        logits = model(input_ids=ids).logits.float()
        return logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])

    with npu_patch.applied(model):
        with torch.no_grad():
            old = log_probabilities()
        ratio = (log_probabilities() - old).exp()
    assert ratio.requires_grad and bool((ratio == 1.0).all())


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3_moe", "qwen3_5"])
def test_what_a_checkpoint_computes_again_is_what_the_forward_computed(
    family: str, reentrant: bool, npu: torch.device
) -> None:
    """Every result of a module within the layers: reentrant checkpointing runs them without gradients first. Without
    early stopping, so that both are whole."""
    model = tiny(family).bfloat16().to(npu).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    npu_patch.apply(model)
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.model.layers.named_modules():
        if name.endswith(("proj", "norm", "mlp", "experts")):
            seen[name] = []

            def keep(module: Any, given: Any, result: Any, kept: list[Tensor] = seen[name]) -> None:
                kept.append((result[0] if isinstance(result, tuple) else result).detach().clone())

            module.register_forward_hook(keep)
    try:
        with set_checkpoint_early_stop(False):
            loss = model(**{name: tensor.to(npu) for name, tensor in tiny_batch().items()}, use_cache=False).loss
            loss.backward()
    finally:
        npu_patch.restore()
    assert seen and {len(kept) for kept in seen.values()} == {2}
    assert [name for name, (forward, again) in seen.items() if not torch.equal(forward, again)] == []


def test_single_queries_without_a_cache_are_served_as_they_are_trained(npu: torch.device) -> None:
    """A prompt of one token, and a causal layer beside a cache: only the latter decodes."""
    model = tiny("qwen3").bfloat16().to(npu)
    ids = tiny_batch(length=1)["input_ids"].to(npu)

    def decoded(**given: Any) -> int:
        with torch.no_grad(), simulator.count() as counted:
            model(**given)
        return counted.by_op.get("npu::npu_fused_infer_attention_score", (0, 0))[0]

    with npu_patch.applied(model):
        assert others(logits_by_watcher(model, ids)) == []
        assert decoded(input_ids=ids) == 0
        with torch.no_grad():
            cache = model(input_ids=tiny_batch()["input_ids"].to(npu)).past_key_values
        assert decoded(input_ids=ids, past_key_values=cache) == 2


@pytest.mark.parametrize("causal", [False, True])
def test_a_single_query_of_a_layer_that_is_not_causal_does_not_decode(causal: bool, npu: torch.device) -> None:
    """Attention pooling and cross-attention have this shape in training too."""
    from transformers.modeling_utils import AttentionInterface

    layer = torch.nn.Module()
    layer.is_causal = causal
    query, key, value = (torch.randn(2, 4, n, 16, dtype=torch.bfloat16, device=npu) for n in (1, 9, 9))
    with npu_patch.applied(tiny("qwen3").to(npu)), torch.no_grad(), simulator.count() as counted:
        AttentionInterface._global_mapping["sdpa"](layer, query, key, value, None)
    assert ("npu::npu_fused_infer_attention_score" in counted.by_op) == causal


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_trained_tables_get_their_gradient(variant: rope.RoPEVariant, npu: torch.device) -> None:
    """So tables need not be left to the original where, and only where, gradients are on."""
    width = variant.table.width(8)
    tables = [torch.randn(1, 1, 5, width).requires_grad_() for _ in range(2)]
    heads = [torch.randn(2, n, 5, 12).requires_grad_() for n in (3, 1)]
    expected = [variant.reference(x, *tables) for x in heads]
    seeds = [torch.randn_like(y) for y in expected]
    wanted = torch.autograd.grad(expected, [*tables, *heads], seeds)
    implementation = next(each for each in rope.ROPE.implementations if "npu" in each.device_types)
    moved = [tensor.detach().to(npu).requires_grad_() for tensor in (*tables, *heads)]
    assert implementation.unsupported(moved[2:], *moved[:2], variant) is None
    found = implementation.run(moved[2:], *moved[:2], variant)
    gradients = torch.autograd.grad(found, moved, [seed.to(npu) for seed in seeds])
    for one, other in zip(gradients, wanted, strict=True):
        assert relative_error(one.cpu().double(), other.double()) < 1e-5


@needs_triton
@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(
    "norm", [each for each in rms_norm.PLAIN_VARIANTS if each.output == "input"], ids=lambda v: v.name
)
def test_trained_tables_get_their_gradient_from_the_fused_kernel(
    norm: rms_norm.RMSNormVariant, npu: torch.device
) -> None:
    variant = next(each for each in VARIANTS if each.pairing == rotation.HALF and each.table is TABLES[0])
    tables = [torch.randn(1, 5, 8).requires_grad_() for _ in range(2)]
    inputs = [torch.randn(2, 5, n, 12).requires_grad_() for n in (3, 1)]
    weight = None if norm.gamma == NONE else torch.randn(12)

    def run(implementation: Callable[..., Any], device: torch.device, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        gamma = None if weight is None else weight.to(device)
        q, k = (qk_norm_rope.Heads(x, gamma, 1e-6, norm) for x in leaves[2:])
        outputs = implementation(q, k, *leaves[:2], variant)
        seeds = [torch.linspace(-1, 1, y.numel(), device=device).view(y.shape) for y in outputs]
        return torch.autograd.grad(list(outputs), leaves[:2], seeds)

    expected = run(qk_norm_rope.reference, torch.device("cpu"), [*tables, *inputs])
    (kernel,) = qk_norm_rope.QK_NORM_ROPE.implementations
    found = run(kernel.run, npu, [tensor.detach().to(npu).requires_grad_() for tensor in (*tables, *inputs)])
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one.cpu().double(), other.double()) < 1e-5


def test_what_is_kept_of_a_mask_in_inference_mode_serves_a_training_step() -> None:
    kept, mask = OncePerTensor(), torch.ones(3)
    with torch.inference_mode():
        made = kept.of((mask,), lambda: mask * 2)
        by_key = OncePerTensor().by(mask, 4, lambda: mask * 3)
    assert kept.of((mask,), lambda: None) is made
    weight = torch.ones(3, requires_grad=True)
    ((made + by_key) * weight).sum().backward()
    assert weight.grad.tolist() == [5.0] * 3


def test_a_tuning_file_chooses_by_sizes_and_not_by_who_watches() -> None:
    signatures = set()
    for mode in WATCHERS.values():
        with mode():
            signatures.add(tuning.signature_of((torch.nn.Linear(3, 2), torch.zeros(4, 3)), {}))
    assert len(signatures) == 1


DECIDING = ("ops", "patches", "kernels", "serving", "waiting", "measuring/tuning.py")
WATCHES = re.compile(r"is_grad_enabled|is_inference_mode_enabled|\.requires_grad\b(?!_)|\.training\b")
# What looks at it, and why it may.
MAY = {
    "ops/chunked_loss.py": "which gradients are made, and whether somebody asks for that of the logits",
    "ops/differentiated_once.py": "a second derivative is refused",
    "ops/rope_tables.py": "tables that are trained are laid out anew, in the same way",
    "ops/recomputed.py": "what is kept for a backward, not what is computed",
    "ops/attention/decode.py": "single-token decoding beside a cache, the one exception",
    "ops/gated_delta/recurrent.py": "single-token decoding beside a cache, where it is asked for",
    "ops/gated_delta/step.py": "neighbours in one tensor are widened together, to the same numbers",
    "ops/static_cache.py": "single-token decoding beside a cache, whose place a backward would want as it was",
    "ops/prefetch.py": "weights are fetched for single tokens beside a cache; nothing is computed",
    "patches/inference/weight_nz.py": "a cast of weights without gradients, to the same numbers",
    "waiting/logits.py": "logits without a gradient give a loss none",
    "waiting/origins.py": "logits of a head that an optimizer is about to change are made before",
    "patches/attention/sdpa.py": "a mask that is trained is split anew, in the same way",
    "patches/attention/patch.py": "a copy of a result that is changed in place, and that a backward has kept",
    "patches/lora/patch.py": "a copy of an input that is changed in place, and that a backward will need",
    "patches/lora/groups.py": "a result that waits is of the call that was made in the same mode, or made again",
    "patches/rms_norm.py": "a copy of an input that is changed in place, and that a backward will need",
    "patches/w8a8/add_rms_norm.py": "single-token decoding beside a cache",
    "patches/w8a8/quantizer.py": "a layer that is made has the mode of the one that it replaces",
}


def test_nothing_else_that_decides_looks_at_who_watches() -> None:
    package = Path(npu_patch.__file__).parent
    files = [
        file
        for part in DECIDING
        for file in ([package / part] if part.endswith(".py") else (package / part).rglob("*.py"))
    ]
    looking = {str(file.relative_to(package)) for file in files if WATCHES.search(file.read_text(encoding="utf-8"))}
    assert looking == set(MAY)
