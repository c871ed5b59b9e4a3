"""Models whose loss needs no logits: loss and gradients, what never exists, who reads the logits after all, and what
is left to the original."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.loss import loss_utils

import npu_patch
from npu_patch.ops import chunked_loss
from npu_patch.patches.loss import takers
from npu_patch.reporting.report import Report
from npu_patch.waiting.logits import WaitingLogits
from tests.support.gradients import in_float64, loss_and_gradients, relative_error
from tests.support.largest_tensor import Largest
from tests.support.tiny_models import COMMON, tiny_batch
from tests.support.training_modes import MODES

VOCABULARY = COMMON["vocab_size"]
# Of what models do between head and loss.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", {}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "gemma2, soft cap": ("Gemma2Config", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "gemma3, soft cap": ("Gemma3TextConfig", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "cohere, scale": ("CohereConfig", {"logit_scale": 0.3}),
    "granite, divided": ("GraniteConfig", {"logits_scaling": 3.0}),
    "bamba, z-loss": (
        "BambaConfig",
        {
            "z_loss_coefficient": 0.1,
            "attn_layer_indices": [1],
            "mamba_n_heads": 6,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "num_logits_to_keep": 0,
        },
    ),
    "qwen3_moe, auxiliary loss": (
        "Qwen3MoeConfig",
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "output_router_logits": True},
    ),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 rows: `tiny_batch` makes two."""
    monkeypatch.setattr(chunked_loss, "ELEMENTS", 16 * VOCABULARY)


@pytest.fixture(autouse=True)
def restored() -> Any:
    yield
    npu_patch.restore()


def model_of(name: str, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    config, arguments = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config)(**{**COMMON, **arguments, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config).float().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    return model


def calls_of(report: Report) -> tuple[Counter[str], Counter[str]]:
    """What ran, by kind of site, and what fell through and why."""
    ran: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for outcome in report.patched:
        if outcome.patch == "cross_entropy":
            name = outcome.site.rsplit(".", 1)[-1]
            kind = {"forward": "forward", "selective_log_softmax": "of tokens", "entropy_from_logits": "of tokens"}
            kind = kind.get(name, "loss")
            ran[kind] += outcome.calls.ran
            reasons += outcome.calls.fell_through
    return ran, reasons


def only_the_loss(model: torch.nn.Module | None = None) -> Any:
    """Everything else as it is: what differs is the loss."""
    return npu_patch.applied(model, fused_ops=False, moe_patch=False, fla=False)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_original_ones(name: str, npu: torch.device) -> None:
    model, batch = model_of(name).to(npu), tiny_batch()
    expected = loss_and_gradients(model, batch)
    with only_the_loss(model) as report:
        found = loss_and_gradients(model, batch)
    assert calls_of(report) == ({"forward": 1, "loss": 1}, {})
    assert found.keys() == expected.keys()
    for each in expected:
        assert relative_error(found[each], expected[each]) < 1e-6, each


@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16_gradients_are_as_far_from_float64_as_the_original_ones(name: str, npu: torch.device) -> None:
    """By the root of the mean square over all parameters and four seeds: a single one may be lucky."""
    ours, theirs = [], []
    for seed in range(4):
        model, batch = model_of(name, seed).to(torch.bfloat16), tiny_batch(seed=seed)
        exact = loss_and_gradients(in_float64(model), batch)
        model = model.to(npu)
        for into, applied in ((theirs, False), (ours, True)):
            with npu_patch.applied(model, fused_ops=False, moe_patch=False, fla=False, loss=applied):
                found = loss_and_gradients(model, batch)
            into += [relative_error(found[each], exact[each]) ** 2 for each in exact if exact[each].norm() > 0]
    assert sum(ours) ** 0.5 <= 1.1 * sum(theirs) ** 0.5


@pytest.mark.parametrize("name", ["qwen3", "gemma2, soft cap"])
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradients_within_every_way_to_train(mode: str, name: str, npu: torch.device) -> None:
    """Who offloads what autograd keeps of a soft cap looks at the logits."""
    model, batch = model_of(name).to(npu), tiny_batch()
    with MODES[mode](model):
        expected = loss_and_gradients(model, batch)
        with only_the_loss(model) as report:
            found = loss_and_gradients(model, batch)
    offloaded = mode == "save_on_cpu" and name != "qwen3"
    ran, reasons = calls_of(report)
    assert ran == {"loss": 1, "forward": 0 if offloaded else 1} and reasons.total() == offloaded
    for each in expected:
        assert relative_error(found[each], expected[each]) < 1e-6, each


@pytest.mark.parametrize(
    "batch", [{"num_items_in_batch": 31}, {"num_items_in_batch": "tensor"}, {"shift_labels": True}]
)
def test_what_a_trainer_gives_the_loss_counts(batch: dict[str, Any], npu: torch.device) -> None:
    model = model_of("qwen3").to(npu)
    given = {name: tensor.to(npu) for name, tensor in tiny_batch().items()} | batch
    if given.get("num_items_in_batch") == "tensor":
        given["num_items_in_batch"] = torch.tensor(17, device=npu)
    if "shift_labels" in given:
        given["shift_labels"] = given["labels"].roll(3, -1)
    expected = model(**given).loss
    with only_the_loss(model) as report:
        found = model(**given).loss
    assert calls_of(report)[0] == {"forward": 1, "loss": 1}
    assert relative_error(found.detach(), expected.detach()) < 1e-6


def test_the_same_bits_in_training_and_evaluation_and_without_gradients(npu: torch.device) -> None:
    model = model_of("gemma3, soft cap").to(npu).bfloat16()
    batch = {name: tensor.to(npu) for name, tensor in tiny_batch().items()}
    npu_patch.apply(model)
    wanted = model(**batch).loss.detach()
    model.eval()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            found = model(**batch)
            assert torch.equal(found.loss, wanted) and not found.logits.settled
            found.logits.sum()  # whoever looks on
            assert torch.equal(model(**batch).loss, wanted)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert torch.equal(model(**batch).loss, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_head_is_multiplied_in_its_dtype(dtype: torch.dtype, npu: torch.device) -> None:
    model, batch = model_of("qwen3").to(npu), {name: tensor.to(npu) for name, tensor in tiny_batch().items()}
    exact = loss_and_gradients(in_float64(model), tiny_batch())

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("npu", dtype):
            loss = model(**batch).loss
        (loss * 1024).backward()
        return {"loss": loss, "lm_head.weight": model.lm_head.weight.grad / 1024}

    expected = step()
    with only_the_loss(model) as report:
        found = step()
    assert calls_of(report) == ({"forward": 1, "loss": 1}, {})
    for name in expected:
        ours, theirs = (relative_error(each[name].detach().double().cpu(), exact[name]) for each in (found, expected))
        assert found[name].dtype == expected[name].dtype and ours <= 1.1 * theirs + 1e-6


@pytest.mark.parametrize("trained", ["nothing of the head", "the head", "an adapter", "a saved copy"])
@pytest.mark.parametrize("when", ["before", "after", "twice", "without a model"])
def test_heads_of_peft_models(when: str, trained: str, npu: torch.device) -> None:
    """`apply` before and after peft wraps the model."""
    targets = ["q_proj", "lm_head"] if trained == "an adapter" else ["q_proj"]
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.25,
        target_modules=targets,
        modules_to_save=["lm_head"] if trained == "a saved copy" else None,
        init_lora_weights=False,
    )

    def wrapped(model: torch.nn.Module) -> torch.nn.Module:
        torch.manual_seed(1)
        model = get_peft_model(model, config)
        if trained == "the head":
            model.base_model.model.lm_head.weight.requires_grad_()
        return model.train()

    def step(model: torch.nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(2)  # of the dropout
        return loss_and_gradients(model, tiny_batch())

    expected = step(wrapped(model_of("qwen3").to(npu)))
    model = None if when == "without a model" else model_of("qwen3").to(npu)
    only = {"fused_ops": False, "moe_patch": False, "fla": False}
    if when != "after":
        npu_patch.apply(model, **only)
    model = wrapped(model or model_of("qwen3").to(npu))
    if when in ("after", "twice"):
        npu_patch.apply(model, **only)
    found = step(model)
    assert calls_of(npu_patch.report()) == ({"forward": 1, "loss": 1}, {})
    assert found.keys() == expected.keys() and any("lm_head" in name for name in found) == (
        trained != "nothing of the head"
    )
    for each in expected:
        assert relative_error(found[each], expected[each]) < 1e-6, each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "gemma2, soft cap"])
def test_nothing_as_large_as_the_logits_ever_exists(
    name: str, dtype: torch.dtype, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it in the memory that a step takes at most."""
    vocabulary, tokens = 32000, 256
    monkeypatch.setattr(chunked_loss, "ELEMENTS", 32 * vocabulary)
    model = model_of(name, vocab_size=vocabulary).to(npu, dtype)
    batch = {key: tensor.to(npu) for key, tensor in tiny_batch(length=tokens // 2).items()}
    logits = tokens * vocabulary

    def step() -> tuple[int, int]:
        torch.npu.reset_peak_memory_stats()
        before = torch.npu.memory_allocated()
        with Largest() as largest:
            model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)
        return largest.elements, torch.npu.max_memory_allocated() - before

    largest, most = step()
    assert largest >= logits
    npu_patch.apply(model)
    found, memory = step()
    assert found <= vocabulary * COMMON["hidden_size"] < logits
    assert memory < most - logits * 4


def test_reading_the_logits_is_counted_by_who_reads(npu: torch.device) -> None:
    model, batch = model_of("qwen3").to(npu), {name: tensor.to(npu) for name, tensor in tiny_batch().items()}
    expected = model(**batch).logits
    with only_the_loss(model) as report:
        outputs = [model(**batch) for _ in range(3)]
        for each in outputs[:2]:
            assert torch.equal(each.logits.argmax(-1), expected.argmax(-1))
            assert torch.equal(each.logits, expected)
        assert type(outputs[2].logits) is WaitingLogits and outputs[2].logits.shape == expected.shape
    assert calls_of(report) == (
        {"forward": 1, "loss": 3},
        {f"the logits are looked at: argmax in {__name__}": 2},
    )
    assert f"argmax in {__name__}" in " ".join(str(report).split())


def test_a_loss_of_the_callers_own_from_the_logits_has_their_gradient(npu: torch.device) -> None:
    """Distillation, say."""
    model, batch = model_of("gemma2, soft cap").to(npu), {n: t.to(npu) for n, t in tiny_batch().items()}
    teacher = torch.randn(*batch["labels"].shape, VOCABULARY, device=npu).softmax(-1)

    def step() -> list[Tensor]:
        found = model(**batch)
        loss = found.loss + torch.nn.functional.kl_div(found.logits.log_softmax(-1), teacher, reduction="batchmean")
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    expected = step()
    with only_the_loss(model):
        found = step()
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-6


LISTENERS: dict[str, Callable[[Tensor, list[Tensor]], Any]] = {
    "hook": lambda logits, heard: logits.register_hook(heard.append),
    "retained": lambda logits, heard: logits.retain_grad(),
}


@pytest.mark.parametrize("listen", LISTENERS)
@pytest.mark.parametrize("name", ["qwen3", "gemma2, soft cap"])
def test_who_listens_to_the_gradient_of_the_logits_hears_it(name: str, listen: str, npu: torch.device) -> None:
    model, batch = model_of(name).to(npu), {name: tensor.to(npu) for name, tensor in tiny_batch().items()}

    def step() -> list[Tensor]:
        model.zero_grad()
        heard: list[Tensor] = []
        found = model(**batch)
        LISTENERS[listen](found.logits, heard)
        found.loss.backward()
        return [*(heard or [found.logits.grad]), *(each.grad for each in model.parameters())]

    expected = step()
    with only_the_loss(model) as report:
        found = step()
    assert calls_of(report)[0]["loss"] == 1 and calls_of(report)[1].total() == 1
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-6


def test_the_gradient_of_the_logits_can_be_asked_for(npu: torch.device) -> None:
    model, batch = model_of("qwen3").to(npu), {name: tensor.to(npu) for name, tensor in tiny_batch().items()}

    def gradient() -> Tensor:
        found = model(**batch)
        return torch.autograd.grad(found.loss, found.logits)[0]

    expected = gradient()
    with only_the_loss(model):
        assert relative_error(gradient(), expected) < 1e-6


def test_a_wrapper_that_waits_for_any_gradient_costs_nothing(npu: torch.device) -> None:
    """FSDP hooks every output of a forward, to gather weights before the first gradient."""
    model, batch = model_of("qwen3").to(npu), {name: tensor.to(npu) for name, tensor in tiny_batch().items()}
    heard = []

    def gather(grad: Tensor | None) -> Tensor | None:
        heard.append(grad)
        return grad

    gather.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    with only_the_loss(model) as report:
        found = model(**batch)
        found.logits.register_hook(gather)
        found.loss.backward()
    assert calls_of(report) == ({"forward": 1, "loss": 1}, {})


def _hook(model: torch.nn.Module) -> Any:
    model.lm_head.register_forward_hook(lambda *call: None)


def _own_loss(model: torch.nn.Module) -> Any:
    model.loss_function = lambda logits, labels, **others: logits.float().square().mean()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "hooks on the head"),
        (_own_loss, "its loss is _own_loss.<locals>.<lambda>, which is not known"),
        (lambda model: model.half().float().double(), "a head of torch.float64"),
    ],
)
def test_what_is_unusual_is_left_to_the_original(change: Callable[[torch.nn.Module], Any], reason: str) -> None:
    model, batch = model_of("qwen3"), tiny_batch()
    change(model)
    expected = loss_and_gradients(model, batch)
    with npu_patch.applied(model, device="cpu", fused_ops=False) as report:
        found = loss_and_gradients(model, batch)
    ran, reasons = calls_of(report)
    assert ran.total() == 0 and reasons[reason] == 1
    for each in expected:
        assert torch.equal(found[each], expected[each])


def test_a_cross_entropy_that_somebody_bound_anew_is_called(npu: torch.device) -> None:
    called = []

    def theirs(*args: Any, **kwargs: Any) -> Tensor:
        called.append(args[0].shape)
        return original(*args, **kwargs)

    model, original = model_of("qwen3").to(npu), torch.nn.functional.cross_entropy
    with only_the_loss(model) as report, mock.patch.object(torch.nn.functional, "cross_entropy", theirs):
        loss_and_gradients(model, tiny_batch())
    assert called == [(2 * 13, VOCABULARY)]
    assert any("cross_entropy was bound anew" in reason for reason in calls_of(report)[1])


def test_without_labels_the_logits_are_made_at_once(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is imported that takes them as they wait."""
    monkeypatch.setattr(takers, "WITHOUT_LABELS", {})
    model = model_of("qwen3").to(npu).eval()
    ids = tiny_batch()["input_ids"].to(npu)
    expected = model(input_ids=ids).logits
    with only_the_loss(model) as report:
        found = model(input_ids=ids).logits
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert type(found) is Tensor and torch.equal(found, expected)
    ran, reasons = calls_of(report)
    assert ran.total() == 0 and not reasons


def test_a_model_that_computes_its_loss_from_slices_of_its_own_gets_the_logits(npu: torch.device) -> None:
    """As chameleon, which writes into them."""

    class Writes(transformers.Qwen3ForCausalLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
            logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
            logits[:, :, 5] = -3.0
            return self.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY)

    model = Writes(model_of("qwen3").config).to(npu)
    batch = {name: tensor.to(npu) for name, tensor in tiny_batch().items()}
    expected = model(**batch)
    globals()["Writes"] = Writes
    Writes.__module__ = __name__
    try:
        with only_the_loss(model) as report:
            found = model(**batch)
    finally:
        del globals()["Writes"]
    assert torch.equal(found, expected)
    assert calls_of(report) == (
        {"forward": 0, "loss": 0},
        {f"the logits are looked at: select in {__name__}": 1, "logits that are there already": 1},
    )


WHOLE: dict[str, dict[str, Any]] = {
    "non-reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default]),
    },
}


@pytest.mark.parametrize("name", ["qwen3", "gemma2, soft cap"])
@pytest.mark.parametrize("how", WHOLE)
def test_a_whole_model_that_is_checkpointed_with_its_loss(how: str, name: str) -> None:
    """On the CPU, where every product is an `mm`, which a policy may keep."""
    model, batch = model_of(name), tiny_batch()

    def step() -> list[Tensor]:
        model.zero_grad()
        loss = checkpoint(lambda: model(**batch).loss, **WHOLE[how])
        loss.backward()
        return [loss.detach(), *(each.grad for each in model.parameters())]

    expected = step()
    with npu_patch.applied(model, device="cpu", fused_ops=False, moe_patch=False, fla=False) as report:
        found = step()
    assert calls_of(report) == ({"forward": 2, "loss": 2}, {})
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-6


def test_what_is_compiled_is_the_original_and_takes_logits_that_wait(npu: torch.device) -> None:
    model, batch = model_of("qwen3").to(npu), {name: tensor.to(npu) for name, tensor in tiny_batch().items()}
    expected = model(**batch)
    with only_the_loss(model) as report:
        torch._dynamo.reset()
        found = torch.compile(model, backend="eager", fullgraph=True)(**batch)
        assert type(found.logits) is Tensor and torch.equal(found.loss, expected.loss)
        assert calls_of(report)[0].total() == 0
        read = torch.compile(lambda logits: logits.float().log_softmax(-1).sum(), backend="eager")
        assert torch.equal(read(model(**batch).logits), read(expected.logits))


def test_everything_is_put_back(npu: torch.device) -> None:
    model = model_of("qwen3").to(npu)
    before = loss_utils.fixed_cross_entropy, transformers.Qwen3ForCausalLM.forward
    batch = {name: tensor.to(npu) for name, tensor in tiny_batch().items()}
    npu_patch.apply(model, fused_ops=False)
    waiting = model(**batch).logits
    assert loss_utils.fixed_cross_entropy is not before[0]
    npu_patch.restore()
    assert (loss_utils.fixed_cross_entropy, transformers.Qwen3ForCausalLM.forward) == before
    assert type(model(**batch).logits) is Tensor
    assert not model.lm_head._forward_pre_hooks and "forward" not in vars(model.lm_head)
    assert torch.equal(waiting, model(**batch).logits)  # what waited still is what it was
    assert copy.deepcopy(model.state_dict()).keys() == model.state_dict().keys()


def test_the_switch_turns_it_off(npu: torch.device) -> None:
    model = model_of("qwen3").to(npu)
    report = npu_patch.apply(model, loss=False)
    assert not [each for each in report if each.patch == "cross_entropy"]
    assert type(model(**{n: t.to(npu) for n, t in tiny_batch().items()}).logits) is Tensor
