"""Weights are fetched ahead beside attention to single tokens: in order, within the L2 cache, and for nobody else."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

import npu_patch
from npu_patch import simulator
from npu_patch.ops import prefetch
from npu_patch.patches.inference import prefetch as preparation
from npu_patch.reporting.outcome import Outcome
from npu_patch.reporting.report import Report
from tests.support.lora_models import PRECISIONS, adapted_model
from tests.support.tiny_models import tiny, tiny_batch

pytestmark = pytest.mark.usefixtures("simulated")


@dataclass
class Log(simulator.Counted):
    """What read or fetched which address, in order; and the stream of what was fetched."""

    events: list[tuple[str, int, int]] = field(default_factory=list)
    streams: set[int] = field(default_factory=set)

    def launched(self, name: str, moved: int, read: Sequence[Any], written: Sequence[Any]) -> None:
        super().launched(name, moved, read, written)
        self._note(name, read)

    def ran_in_replay(self, name: str, moved: int, read: Sequence[Any], written: Sequence[Any]) -> None:
        super().ran_in_replay(name, moved, read, written)
        self._note(name, read)

    def prefetched(self, address: int, moved: int, stream: int) -> None:
        super().prefetched(address, moved, stream)
        self.events.append(("fetched", address, moved))
        self.streams.add(stream)

    def _note(self, name: str, read: Sequence[Any]) -> None:
        for each in read:
            if isinstance(each, Tensor):
                self.events.append((name, each.untyped_storage().data_ptr(), 0))

    def fetched(self) -> list[int]:
        return [address for name, address, _ in self.events if name == "fetched"]


def frozen(family: str, npu: torch.device) -> Any:
    return tiny(family).bfloat16().to(npu).requires_grad_(False)


def decoded(model: Any, tokens: int = 3, batch: int = 2) -> tuple[Tensor, Log]:
    """Greedy tokens after a prompt, and what happened while they were decoded."""
    ids = tiny_batch(batch=batch)["input_ids"].to(model.device)
    with torch.no_grad():
        step, found = model(input_ids=ids, use_cache=True), []
        with simulator.count(Log()) as log:
            for _ in range(tokens):
                found.append(step.logits[:, -1].argmax(-1, keepdim=True))
                step = model(input_ids=found[-1], past_key_values=step.past_key_values, use_cache=True)
    return torch.cat(found, 1).cpu(), log


def outcome(report: Report) -> Outcome:
    (found,) = [each for each in report.outcomes if each.patch == "prefetch"]
    return found


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama", "gemma3"])
def test_what_is_fetched_is_read_next_and_tokens_stay_the_same(family: str, npu: torch.device) -> None:
    model = frozen(family, npu)
    with npu_patch.applied(model):
        expected, without = decoded(model)
    report = npu_patch.apply(model, prefetch=True)
    tokens, log = decoded(model)
    assert torch.equal(tokens, expected) and without.prefetches == 0 and log.launches == without.launches
    layers = model.config.num_hidden_layers
    assert outcome(report).layers == layers
    products = 1 if family == "qwen3_moe" else 2  # which experts come next, the host does not know
    assert log.prefetches == 3 * layers * products
    for layer in model.model.layers:
        own = [layer.self_attn.o_proj, *([] if products == 1 else [layer.mlp.gate_proj])]
        addresses = [each.weight.data_ptr() for each in own]
        assert sum(log.fetched().count(each) for each in addresses) == 3 * products
        for address in addresses:
            whom = [name for name, at, _ in log.events if at == address]
            assert whom[::2] == ["fetched"] * 3 and "fetched" not in whom[1::2], "each is fetched, then used"
    assert torch.npu.current_stream(npu).stream_id not in log.streams and len(log.streams) == 1


def test_between_a_fetch_and_its_use_is_what_the_memory_waits_for(npu: torch.device) -> None:
    model = frozen("qwen3", npu)
    npu_patch.apply(model, prefetch=True)
    _, log = decoded(model, 1)
    address = model.model.layers[0].self_attn.o_proj.weight.data_ptr()
    start = log.events.index(next(each for each in log.events if each[:2] == ("fetched", address)))
    use = next(at for at, (name, of, _) in enumerate(log.events) if of == address and name != "fetched")
    between = {name for name, _, _ in log.events[start:use]}
    assert "npu::npu_fused_infer_attention_score" in between and not between & {"aten::mm", "aten::linear"}


@pytest.mark.parametrize(("share", "most"), [(4, 18 << 20), (4, 512), (192 << 20 >> 10, 18 << 20)])
def test_no_attention_fetches_more_than_its_share(
    share: int, most: int, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "SHARE", share)
    monkeypatch.setattr(prefetch, "MOST_BYTES", most)
    prefetch.budget.cache_clear()
    try:
        model = frozen("qwen3", npu)
        npu_patch.apply(model, prefetch=True)
        _, log = decoded(model, 1)
        layers = model.config.num_hidden_layers
        assert 0 < log.prefetched_bytes <= layers * (192 << 20) // share
        assert all(0 < moved <= most for name, _, moved in log.events if name == "fetched")
    finally:
        prefetch.budget.cache_clear()


@pytest.mark.parametrize("why", ["gradients", "prompt", "many rows", "training step", "by default"])
def test_nothing_is_fetched_for_others(why: str, npu: torch.device) -> None:
    model = frozen("qwen3", npu)
    npu_patch.apply(model, **({} if why == "by default" else {"prefetch": True}))
    ids = tiny_batch()["input_ids"].to(npu)
    with simulator.count() as counted:
        if why == "gradients":
            cache = model(input_ids=ids, use_cache=True).past_key_values
            model(input_ids=ids[:, :1], past_key_values=cache)
        elif why == "prompt":
            with torch.no_grad():
                model(input_ids=ids)
        elif why == "training step":
            model.train().requires_grad_(True)
            model(input_ids=ids, labels=ids).loss.backward()
        else:
            decoded(model, 1, batch=prefetch.MOST_ROWS + 1 if why == "many rows" else 2)
    assert counted.prefetches == 0 and counted.launches


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_generate_has_the_same_tokens(mode: Any, npu: torch.device) -> None:
    model = frozen("qwen3", npu)
    ids = tiny_batch()["input_ids"].to(npu)
    with mode():
        with npu_patch.applied(model):
            expected = model.generate(ids, max_new_tokens=6, do_sample=False)
        npu_patch.apply(model, prefetch=True)
        with simulator.count() as counted:
            found = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(found.cpu(), expected.cpu()) and counted.prefetches == 5 * 2 * 2


def test_of_adapted_layers_the_frozen_weight_is_fetched_and_nobody_listens(npu: torch.device) -> None:
    model = adapted_model("qwen3", 0.0, PRECISIONS["bfloat16"]).to(npu).eval()
    with npu_patch.applied(model):
        expected, _ = decoded(model)
    report = npu_patch.apply(model, prefetch=True)
    tokens, log = decoded(model)
    layer = model.base_model.model.model.layers[0]
    assert torch.equal(tokens, expected)
    assert {layer.self_attn.o_proj.base_layer.weight.data_ptr(), layer.mlp.gate_proj.base_layer.weight.data_ptr()} <= {
        *log.fetched()
    }
    assert not any(each.calls.fell_through for each in report.patched if each.patch == "lora")


def test_weights_in_blocks_are_fetched_too(npu: torch.device) -> None:
    model = tiny("qwen3", hidden_size=48, intermediate_size=64).bfloat16().to(npu).requires_grad_(False)
    with npu_patch.applied(model):
        expected, _ = decoded(model)
    npu_patch.apply(model, prefetch=True, weight_nz=True)
    tokens, log = decoded(model)
    assert torch.equal(tokens, expected) and log.prefetches == 3 * 2 * 2
    assert model.model.layers[0].mlp.gate_proj.weight.data_ptr() in log.fetched()


def test_in_a_graph_it_is_joined_and_fetched_at_each_replay(npu: torch.device) -> None:
    model = frozen("qwen3", npu)
    npu_patch.apply(model, prefetch=True)
    ids = tiny_batch()["input_ids"].to(npu)
    cache = StaticCache(config=model.config, max_cache_len=32)
    token, graph = ids[:, :1].clone(), torch.npu.NPUGraph()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        step = {"input_ids": token, "past_key_values": cache, "attention_mask": None}
        model(**step)
        with simulator.count(Log()) as log:
            with torch.npu.graph(graph):
                model(**step)
            assert log.prefetches == 0
            graph.replay()
            graph.replay()
    assert log.prefetches == 2 * 2 * 2
    address = model.model.layers[1].self_attn.o_proj.weight.data_ptr()
    whom = [name for name, at, _ in log.events if at == address]
    assert whom[::2] == ["fetched"] * 2 and "fetched" not in whom[1::2]


@pytest.mark.parametrize(
    ("given", "switches", "reason"),
    [
        ("eager", {}, "no layer asks for attention by sdpa or npu or flash_attention_2"),
        ("sdpa", {"sdpa": False}, "attention is left as it is"),
        ("cpu", {}, "no layer asks for attention"),
    ],
)
def test_a_model_that_it_does_not_serve_is_told_why(
    given: str, switches: dict[str, bool], reason: str, npu: torch.device
) -> None:
    model = tiny("qwen3").bfloat16().to("cpu" if given == "cpu" else npu)
    if given == "eager":
        model.set_attn_implementation("eager")
    found = outcome(npu_patch.apply(model, prefetch=True, **switches))
    assert found.status == "skipped" and found.reason.startswith(reason)


def test_undone_nothing_of_it_is_left(npu: torch.device) -> None:
    model, other = frozen("qwen3", npu), frozen("qwen3", npu)
    npu_patch.apply(model, prefetch=True)
    npu_patch.apply(model, prefetch=True)
    with npu_patch.applied(other, prefetch=True):
        assert len(prefetch.FOLLOWING) == 4
    assert len(prefetch.FOLLOWING) == 2 and copy.deepcopy(model) is not model
    gone = weakref.ref(model.model.layers[0].self_attn)
    del model
    gc.collect()
    assert gone() is None and not prefetch.FOLLOWING
    npu_patch.restore()
    npu_patch.apply(other)
    assert decoded(other)[1].prefetches == 0


def test_a_layer_that_is_no_linear_one_is_not_fetched(npu: torch.device) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Embedding(2, 2), nn.Sequential(nn.Linear(2, 2)))
    assert list(preparation._products(module)) == [module[0], module[2][0]]
