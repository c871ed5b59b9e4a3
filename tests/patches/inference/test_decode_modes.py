"""Decoding with everything that serves it, in the modes in which models decode: tokens and logits of the unpatched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache, StaticCache

from npu_patch import applied, simulator
from tests.support.gradients import in_float64, loss_and_gradients, relative_error
from tests.support.parity import NEAR, RATIO
from tests.support.tiny_models import tiny, tiny_batch

pytestmark = pytest.mark.usefixtures("simulated")
FAMILIES = ("qwen3", "qwen3_moe", "qwen3_5", "gemma3")
PROMPT = 7


def cache_for(model: torch.nn.Module, kind: str) -> Any:
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, 40)


def decoded(model: torch.nn.Module, ids: Tensor, kind: str) -> Tensor:
    """Logits after the prompt and after each token beyond it, float64 on the CPU."""
    cache, found = cache_for(model, kind), []
    for start, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, ids.shape[1]))]:
        found.append(model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(found, 1).detach().double().cpu()


def tokens(batch: int = 2, length: int = 16) -> Tensor:
    return torch.randint(2, 100, (batch, length), generator=torch.Generator().manual_seed(5))


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(2)
    names = {name.rpartition(".")[2] for name, each in model.named_modules() if type(each) is torch.nn.Linear}
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=sorted(names - {"lm_head"}))
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_float32(family: str, mode: Any, kind: str, npu: torch.device) -> None:
    model, ids = tiny(family).eval(), tokens()
    expected = decoded(model, ids, kind)
    model = model.to(npu)
    with applied(model), mode():
        assert relative_error(decoded(model, ids.to(npu), kind), expected) < 4 * NEAR


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_with_an_adapter_and_after_a_training_step(family: str, npu: torch.device) -> None:
    """The step changes weights that the layers have decoded with before."""
    model, ids, batch = adapted(tiny(family)), tokens(), tiny_batch()

    def trained() -> None:
        loss_and_gradients(model, {name: each.to(model.device) for name, each in batch.items()})
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.05 * parameter.grad.sign())
        model.eval()

    kept = {name: each.clone() for name, each in model.state_dict().items()}
    trained()
    after = {name: each.clone() for name, each in model.state_dict().items()}
    with torch.no_grad():
        expected = decoded(model, ids, "static")
        model.load_state_dict(kept)
        model = model.to(npu)
        with applied(model):
            first = decoded(model, ids.to(npu), "static")
            model.load_state_dict(after)
            second = decoded(model, ids.to(npu), "static")
    assert relative_error(second, expected) < 4 * NEAR < relative_error(first, expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_bfloat16_are_no_further_from_float64(family: str, autocast: bool, npu: torch.device) -> None:
    kind = "dynamic" if autocast else "static"  # transformers' own static cache fails under autocast: k is float32
    model, ids = tiny(family, num_experts_per_tok=5).eval() if "moe" in family else tiny(family).eval(), tokens(4, 24)
    model = model if autocast else model.bfloat16()
    with torch.no_grad():
        exact = decoded(in_float64(model), ids, kind)
        model = model.to(npu)
        errors = {}
        for patched in (False, True):
            with applied(model, patch=patched), torch.autocast("npu", torch.bfloat16, enabled=autocast):
                errors[patched] = relative_error(decoded(model, ids.to(npu), kind), exact)
    assert errors[True] <= RATIO * errors[False], errors


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_a_linear_layer_s_states_keep_their_addresses_through_captured_steps(family: str, npu: torch.device) -> None:
    """A graph of one step, replayed, goes on where the eager model would."""
    model, ids = tiny(family).to(npu, torch.bfloat16).eval(), tokens().to(npu)
    with torch.no_grad(), applied(model):
        expected = decoded(model, ids, "static")[:, 3:]
        cache = cache_for(model, "static")
        model(input_ids=ids[:, :PROMPT], past_key_values=cache, use_cache=True)
        token = ids[:, PROMPT : PROMPT + 1].clone()
        model(input_ids=token, past_key_values=cache, use_cache=True)  # what is made once
        token.copy_(ids[:, PROMPT + 1 : PROMPT + 2])
        model(input_ids=token, past_key_values=cache, use_cache=True)
        graph, found = torch.npu.NPUGraph(), []
        with torch.npu.graph(graph):
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        for at in range(PROMPT + 2, ids.shape[1]):
            token.copy_(ids[:, at : at + 1])
            with simulator.count() as counted:
                graph.replay()
            assert counted.launches == counted.replays == 1 and counted.host_copies == 0
            found.append(logits[:, -1].double().cpu())
    assert torch.equal(torch.stack(found, 1), expected)


PATTERN = {"qwen3_5": ["linear_attention", "full_attention"]}


@pytest.mark.parametrize(("family", "share"), [("qwen3", 0.37), ("qwen3_moe", 0.35), ("qwen3_5", 0.45)])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_layer_takes_a_share_of_the_unpatched_one_s_kernels_for_a_token(
    family: str, share: float, kind: str, npu: torch.device
) -> None:
    """Without Triton. What four layers take beyond two."""
    kernels: dict[bool, list[int]] = {False: [], True: []}
    for layers in (2, 4):
        pattern = {"layer_types": PATTERN[family] * (layers // 2)} if family in PATTERN else {}
        model = tiny(family, num_hidden_layers=layers, **pattern).to(npu, torch.bfloat16).eval()
        ids = tokens(1, PROMPT + 1).to(npu)
        for patched, found in kernels.items():
            cache = cache_for(model, kind)
            with torch.no_grad(), applied(model, patch=patched, triton=False):
                model(input_ids=ids[:, :PROMPT], past_key_values=cache, use_cache=True)
                model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)  # what is made once
                with simulator.count() as counted:
                    model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
            found.append(counted.kernels)
            assert not patched or counted.host_copies == 0
    original, ours = (four - two for two, four in (kernels[False], kernels[True]))
    assert ours <= share * original, kernels
