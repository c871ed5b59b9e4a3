"""Training a head: the loss of the token after the next, through the frozen model's output weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from npu_patch import applied
from npu_patch.patches.inference.mtp import head as heads
from npu_patch.patches.inference.mtp import training
from tests.support.heads import FAMILIES, loaded, prompt, saved
from tests.support.tiny_models import tiny


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_token_after_the_next(family: str, patched: bool) -> None:
    """And its gradients are the head's alone."""
    model, ids = tiny(family).requires_grad_(False), torch.cat((prompt(9), prompt(9, seed=1)))
    labels = ids.clone()
    labels[1, 5:] = training.NO_LABEL
    torch.manual_seed(0)
    head = heads.new_head(model)
    with applied(model, device="cpu", patch=patched, mtp=True):
        states = training.states_of(model, ids)
        loss = training.loss(head, model, states, ids, labels)
        loss.backward()
    rows = head.forward_layer(0, states[:, :7], torch.arange(1, 8)[None], None, input_ids=ids[:, 1:8])
    expected = F.cross_entropy(model.lm_head(rows).flatten(0, 1), labels[:, 2:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(expected, [*head.parameters()], allow_unused=True)
    for (name, parameter), gradient in zip(head.named_parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert all(each.grad is None for each in model.parameters())
    assert not states.requires_grad


def test_output_weights_with_an_adapter_are_asked_as_they_are() -> None:
    peft = pytest.importorskip("peft")
    model, ids = tiny("qwen3_5"), prompt(9)
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).base_model.model.requires_grad_(False)
    head = heads.new_head(model)
    states = training.states_of(model, ids)
    rows = training.predicted_states(head, states, ids)[:, :-1]
    expected = F.cross_entropy(model.lm_head(rows).flatten(0, 1), ids[0, 2:])
    torch.testing.assert_close(training.loss(head, model, states, ids), expected, rtol=1e-5, atol=1e-6)
    base = F.cross_entropy(model.lm_head.base_layer(rows).flatten(0, 1), ids[0, 2:])
    assert abs(base - expected) > 1e-3


def test_fewer_tokens_than_three_are_refused() -> None:
    model = tiny("qwen3_5")
    ids = prompt(2)
    with pytest.raises(ValueError, match="2 tokens: of the token after the next a head learns from three or more"):
        training.loss(heads.new_head(model), model, training.states_of(model, ids), ids)


def test_the_share_that_is_accepted_is_that_of_equal_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that says at each token what the model will say at the next one is always right; shifted, hardly ever."""
    model, ids = tiny("qwen3_5"), prompt(20)
    states = training.states_of(model, ids)
    said: dict[str, Any] = {"right": states[:, 1:], "late": states[:, :-1]}
    shares = {}
    for what, rows in said.items():
        monkeypatch.setattr(training, "predicted_states", lambda *args, rows=rows: rows)
        shares[what] = training.accepted(None, model, states, ids).item()
    assert shares["right"] == 1.0 and shares["late"] < 0.5


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
@pytest.mark.parametrize("patched", [False, True])
def test_the_head_beside_a_model_is_trained_on_apart_from_the_one_that_drafts(
    family: str, patched: bool, tmp_path: Path
) -> None:
    model = loaded(saved(family, tmp_path))
    with applied(model, device="cpu", patch=patched, mtp=True):
        (head, new), (other, _) = heads.head_to_train(model), heads.head_to_train(model)
        assert not new and all(each.requires_grad for each in head.parameters())
        ours, theirs = heads.published_names(head), heads.published_names(other)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        with torch.no_grad():
            head.layers[0].eh_proj.weight.zero_()
        assert other.layers[0].eh_proj.weight.any()
        assert heads.head_to_train(model)[0].layers[0].eh_proj.weight.any()


def test_a_model_without_one_gets_a_new_head() -> None:
    head, new = heads.head_to_train(tiny("qwen3_5"))
    assert new and len(head.layers) == 1
