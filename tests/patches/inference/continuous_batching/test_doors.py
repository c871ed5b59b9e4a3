"""What is bound for continuous batching: all of it or nothing, on this device only, and put back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import npu_patch
from npu_patch.ops.attention import paged
from npu_patch.patches.inference.continuous_batching import patch, resolving
from npu_patch.patches.inference.continuous_batching.step import running, step_of, within
from tests.support.continuous_batches import PROMPTS, apart, batched, calls_of, generated, half

pytest.importorskip("transformers.generation.continuous_batching.cache_allocators")


def bound() -> dict[str, Any]:
    found = {}
    for door in patch.DOORS.values():
        site = door.site("npu")
        held = site.owner if isinstance(site.owner, dict) else vars(site.owner)
        found[site.described] = held.get(site.name)
    return found


def test_every_door_is_put_back(npu: torch.device) -> None:
    before = bound()
    model = half("qwen3").to(npu)
    report = npu_patch.apply(model)
    of_patch = [each for each in report if each.patch == "generate_batch"]
    assert {each.status for each in of_patch} == {"patched"} and len(of_patch) == len(patch.DOORS) + 1
    assert not [note for note in report.notes if "generate_batch" in note]
    assert all(now is not before[name] for name, now in bound().items())
    batched(model)
    npu_patch.restore()
    assert all(now is before[name] for name, now in bound().items())
    assert before["transformers.generation.continuous_batching.utils.DEVICE_TYPE_TO_GRAPH_NAME"] is None


def test_another_device_keeps_its_own() -> None:
    before = bound()
    report = npu_patch.apply(device="cuda")
    assert not [each for each in report if each.patch == "generate_batch" and each.status == "patched"]
    assert all(now is before[name] for name, now in bound().items())


def test_a_transformers_with_other_doors_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.generation.continuous_batching.utils.DEVICE_TYPE_TO_GRAPH_NAME")
    report = npu_patch.apply(device="npu")
    (only,) = [each for each in report if each.patch == "generate_batch"]
    assert only.status == "skipped" and "no attribute 'DEVICE_TYPE_TO_GRAPH_NAME'" in only.site
    assert not [warning for warning in report.warnings if "generate_batch" in warning]


def test_applied_twice_and_in_either_order_with_attention(npu: torch.device) -> None:
    model = half("qwen3")
    expected = generated(model)
    npu_patch.apply(model.to(npu), sdpa=False)
    npu_patch.apply(model)
    report = npu_patch.apply(model)
    assert "flash_attention_2" in " ".join(each.site for each in report.patched if each.patch == "attention")
    assert apart(batched(model), expected, model.cpu().float()) == []


def test_without_the_attention_patch(npu: torch.device) -> None:
    model = half("gemma3")
    expected = generated(model)
    npu_patch.apply(model.to(npu), sdpa=False)
    assert apart(batched(model), expected, model.cpu().float()) == []


def test_steps_may_overlap_on_this_device_by_default(npu: torch.device) -> None:
    """As flash attention with graphs asks for: transformers alone raises then."""
    from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingAsyncIOs

    assert "npu" not in ContinuousBatchingAsyncIOs._supported_device_types
    npu_patch.apply(device="npu")
    assert ContinuousBatchingAsyncIOs._supported_device_types[-1] == "npu"


def test_the_memory_is_the_devices(npu: torch.device) -> None:
    from transformers.generation.continuous_batching import cache

    assert cache.get_device_and_memory_breakdown()[0].type == "cpu", "the host's, which no cache is to be made by"
    npu_patch.apply(device="npu")
    held = torch.ones(1 << 20, device=npu)
    device, total, reserved, allocated = cache.get_device_and_memory_breakdown()
    free, of_device = torch.npu.mem_get_info()
    assert device.type == "npu" and total == of_device and allocated == total - free
    assert reserved >= held.nbytes


def test_a_capture_is_known_as_one(npu: torch.device) -> None:
    from transformers.utils import import_utils

    npu_patch.apply(device="npu")
    seen = [import_utils.is_tracing()]
    with torch.npu.graph(torch.npu.NPUGraph()):
        torch.ones(3, device=npu)
        seen.append(import_utils.is_tracing())
    assert seen == [False, True]


@pytest.mark.parametrize("given, blocks", [(None, 20), (32, 32)])
def test_a_cache_is_as_large_as_the_operator_takes_unless_somebody_says_how_large(
    given: int | None, blocks: int, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty blocks of 16 tokens, two layers, keys and values, two heads of 16; two more take what padding writes."""
    most = 22 * 16 * 2 * 2 * 2 * 16
    for module in (paged, resolving):
        monkeypatch.setattr(module, "MOST_ELEMENTS", most)
    model = half("qwen3")
    expected = generated(model)
    report = npu_patch.apply(model.to(npu))
    share = 32e6 / torch.npu.mem_get_info()[0]
    found = batched(model, num_blocks=given, max_memory_percent=share)
    assert apart(found, expected, model.cpu().float()) == []
    refused = calls_of(report, "PagedAttentionCache.__init__").fell_through
    assert (not refused) == (given is None), refused
    if given is None:
        (calls,) = [each.calls for each in report if each.site.endswith("continuous_batching_context_manager")]
        assert calls.resting.manager.batch_processor.cache.num_blocks == blocks


def test_sinks_and_softcap_are_attended_to_by_definition(npu: torch.device) -> None:
    """No gate knows of them before the first step of single tokens, which has no other way left."""
    model = half("qwen3")
    report = npu_patch.apply(model.to(npu))
    forward = type(model.model.layers[0].self_attn).forward
    sink = torch.full((6,), 0.5, device=npu, dtype=torch.float16)

    def with_sink(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs, s_aux=sink)

    before = batched(model)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(model.model.layers[0].self_attn), "forward", with_sink)
        npu_patch.restore()
        report = npu_patch.apply(model)
        found = [batched(model, use_cuda_graph=graph) for graph in (None, False)]
    assert found[0] == found[1] != before
    assert "attention sinks" in calls_of(report, "of a paged cache").fell_through


def test_rows_that_pad_are_known_from_the_others() -> None:
    requests = [SimpleNamespace(query_length=1, state=SimpleNamespace(position_offset=length)) for length in (5, 9)]
    runner = SimpleNamespace(
        inputs_and_outputs=SimpleNamespace(requests_in_batch=requests),
        cache=SimpleNamespace(cache_allocators={"full": SimpleNamespace(get_seqlen_k=lambda past, new: past + new)}),
    )
    step = step_of(runner, {"block_table": torch.zeros(1, 4, 2)})
    assert (step.lengths, step.query_ends, step.key_ends) == ((5, 9, 1, 1), (1, 2), {"full": (5, 14)})
    assert running() is None
    with within(step):
        assert running() is step


def test_the_model_that_asked_for_another_attention_has_it_again(npu: torch.device) -> None:
    model = half("qwen3").to(npu)
    model.set_attn_implementation("eager")
    npu_patch.apply(model)
    batched(model, PROMPTS[:2])
    batched(model, PROMPTS[:2])
    assert model.config._attn_implementation == "eager"
