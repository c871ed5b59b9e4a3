"""One of the ranks that share each sequence: how far loss, logits and gradients are from those of the whole sequences
on one device, patched and not; what is refused; and the highest memory. Written down.

python tests/support/sequence_parallel_ranks.py DIRECTORY   # with what torchrun sets
"""

# ruff: noqa: E402
from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[2])
from npu_patch import simulator

if simulator.real_device() is None:
    simulator.start()

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

import npu_patch
from npu_patch.commands.replay.bars import FLOORS, GROSS
from npu_patch.sequence_parallel import SequenceParallel
from tests.support.gradients import in_float64, relative_error
from tests.support.tiny_models import tiny

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
NPU = torch.device("npu", RANK)
LENGTH = 24
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
WAYS = ("unpatched", "before", "after", "off")
PACKED = torch.tensor([[*range(7), *range(12), *range(5)]])
THREE = {"num_attention_heads": 12, "num_key_value_heads": 3}
GATED = {**HEADS, "linear_num_key_heads": 4, "linear_num_value_heads": 8}
BOUNDS = torch.tensor([0, 7, 19, 24], dtype=torch.int32)
PACKED_FLAT = {"position_ids": PACKED, "cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS}
SEQUENCE_OF_EACH = {"seq_idx": torch.tensor([[0] * 7 + [1] * 12 + [2] * 5], dtype=torch.int32)}
PADDED = (torch.arange(LENGTH)[None] < torch.tensor([[LENGTH], [17]])).long()
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Tensor]]] = {
    "causal": ("qwen3", HEADS, {}, {}),
    "experts": ("qwen3_moe", HEADS, {}, {}),
    "sliding window": ("mistral", HEADS, {}, {}),
    "windows and not": ("gemma3", HEADS, {}, {}),
    "sinks": ("gpt_oss", HEADS, {"reference": "eager", "attn": "sdpa"}, {}),  # unpatched, sdpa knows no sinks
    "fewer key-value heads than ranks": ("qwen3", {**HEADS, "num_key_value_heads": 1}, {}, {}),
    "packed": ("qwen3", HEADS, {}, {"position_ids": PACKED}),
    "packed, flash attention": (
        "qwen3", HEADS, {"reference": "sdpa", "attn": "flash_attention_2"}, {"position_ids": PACKED},
    ),  # which transformers does not have here
    "padded": ("qwen3", HEADS, {}, {"attention_mask": PADDED}),
    "checkpointed": ("qwen3", HEADS, {"checkpointed": True}, {}),
    "key-value heads that the ranks do not divide": ("qwen3", THREE, {}, {}),
    "gated delta nets": ("qwen3_5", GATED, {}, {}),
    "gated delta nets, experts": ("qwen3_next", GATED, {}, {}),
    "gated delta nets, fewer key heads than ranks": ("qwen3_5", {**GATED, "linear_num_key_heads": 1}, {}, {}),
    "gated delta nets, checkpointed": ("qwen3_5", GATED, {"checkpointed": True}, {}),
    "gated delta nets, padded": ("qwen3_5", GATED, {}, {"attention_mask": PADDED.flip(1)}),
    "gated delta nets, packed": ("qwen3_5", GATED, {"apart": True}, PACKED_FLAT | SEQUENCE_OF_EACH),
    "gated delta nets, packed by lengths": ("qwen3_5", GATED, {"apart": True}, PACKED_FLAT),
}  # fmt: skip


def batch_of(extra: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = 1 if "position_ids" in extra else 2
    ids = torch.randint(2, 101, (rows, LENGTH), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, : LENGTH // 2 + 3] = -100  # few on the first rank
    if "cu_seq_lens_q" in extra:
        labels[0, BOUNDS[:-1]] = -100
    if "attention_mask" in extra:
        labels[extra["attention_mask"] == 0] = -100
    return {name: each.to(NPU) for name, each in {"input_ids": ids, "labels": labels, **extra}.items()}


def model_of(family: str, sizes: dict[str, Any], how: dict[str, Any]) -> torch.nn.Module:
    model = tiny(family, **sizes).to(NPU).train()
    if "reference" in how:
        model.config._attn_implementation = how["reference"]
    if how.get("checkpointed"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def whole(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach().cpu().double(), **gradients(model)}


def apart(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The packed sequences, one after the other, as a model of transformers has them without fla."""
    losses = []
    for start, stop in itertools.pairwise(BOUNDS.tolist()):
        own = {name: batch[name][:, start:stop] for name in ("input_ids", "labels")}
        losses.append(model(**own, num_items_in_batch=(batch["labels"] != -100).sum(), use_cache=False).loss)
    loss = sum(losses)
    loss.backward()
    return {"loss": loss.detach().cpu().double(), **gradients(model)}


@dataclass
class Divided:
    means: dict[str, Tensor]
    loss_of_whole: float
    counted: simulator.Counted
    counted_whole: simulator.Counted
    ran: list[str]


def divided(model: torch.nn.Module, batch: dict[str, Tensor], way: str) -> Divided:
    """A step, with the means over the ranks; and one of whole sequences, which are attended to as before."""
    switch = {"sequence_parallel": False} if way == "off" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = npu_patch.apply(model, patch=way == "before")
        parallel = SequenceParallel(model, **switch)
        if way in ("after", "off"):
            report = npu_patch.apply(model)
    try:
        with simulator.count() as counted, parallel.part(**batch) as part:
            loss = model(**part).loss
            loss.backward()
        ran = sorted({o.patch for o in report.patched if o.calls.ran})
        means = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        means["loss"] = loss.detach().reshape(1)
        for mean in means.values():
            dist.all_reduce(mean, dist.ReduceOp.AVG)
        found = {"loss": means["loss"].cpu().double().reshape(()), **gradients(model)}
        with simulator.count() as of_whole:
            again = model(**batch, use_cache=False).loss
            again.backward()
        model.zero_grad()
        return Divided(found, again.item(), counted, of_whole, ran)
    finally:
        parallel.close()
        npu_patch.restore()


def unequal(found: dict[str, Tensor], name: str, expected: dict[str, Tensor], batch: dict[str, Tensor]) -> list[str]:
    """What is further off than 1e-6, and for what float32 cannot tell so well, than five times the expected one's own
    distance from float64: `verify`'s bars."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    far = [each for each in expected if not relative_error(found[each], expected[each]) < FLOORS[torch.float32]]
    truth = exact(name) if far else {}
    errors = {each: [relative_error(of[each], truth[each]) for of in (found, expected)] for each in far}
    return [f"{each}: {own} from float64, {its} expected" for each, (own, its) in errors.items() if own > GROSS * its]


@functools.cache
def exact(name: str) -> dict[str, Tensor]:
    family, sizes, how, extra = CASES[name]
    batch = {key: tensor.cpu() for key, tensor in batch_of(extra).items()}
    return (apart if "apart" in how else whole)(in_float64(tiny(family, **sizes).train()), batch)


def found_in(name: str) -> dict[str, Any]:
    family, sizes, how, extra = CASES[name]
    model, batch = model_of(family, sizes, how), batch_of(extra)
    found: dict[str, Any] = {}
    expected = (apart if "apart" in how else whole)(model, batch)
    model.config._attn_implementation = how.get("attn", model.config._attn_implementation)
    for way in ("before", "after", "off") if {"reference", "apart"} & how.keys() else WAYS:
        its = divided(model, batch, way)
        calls = its.counted.collectives_by_call
        copies, of_whole = (
            {each for each in counted.by_op if each.startswith("contiguous(inside")}
            for counted in (its.counted, its.counted_whole)
        )
        found[way] = {
            "unequal": unequal(its.means, name, expected, batch),
            "again": abs(its.loss_of_whole / expected["loss"].item() - 1),
            "exchanges": sum(count for count, _ in calls.values()),
            "waits": its.counted.host_copies,
            "copies": sorted(copies - of_whole),
            "ran": its.ran,
            "implementation": model.config._attn_implementation,
        }
    return found


def said(make: Callable[[], Any]) -> str:
    try:
        make()
    except (ValueError, npu_patch.PatchError) as error:
        return str(error)
    return "nothing"


def part_of(model: torch.nn.Module, tokens: int = 8 * WORLD, positions: Tensor | None = None, **switch: bool) -> None:
    parallel = SequenceParallel(model, **switch)
    try:
        ids = torch.ones(1, tokens, dtype=torch.long, device=NPU)
        with parallel.part(ids, position_ids=positions, labels=ids) as part:
            model(**part).loss.backward()
    finally:
        parallel.close()


def refused() -> dict[str, str]:
    odd = {"num_attention_heads": 2 * WORLD + 1, "num_key_value_heads": 2 * WORLD + 1}
    net = model_of("qwen3_5", {**GATED, "linear_num_value_heads": 3 * WORLD + 3, "linear_num_key_heads": 3}, {})
    short = {"tokens": 2 * WORLD}  # of which a convolution needs three
    anew = torch.arange(LENGTH // 2).repeat(2)[None].to(NPU)
    found = {
        "heads": said(lambda: SequenceParallel(model_of("qwen3", odd, {}))),
        "value heads": said(lambda: SequenceParallel(net)),
        "eager": said(lambda: SequenceParallel(model_of("qwen3", HEADS, {"reference": "eager"}))),
        "state": said(lambda: SequenceParallel(short_convolutions())),
        "other nets": said(lambda: SequenceParallel(without_functions())),
        "tokens": said(lambda: part_of(model_of("qwen3", HEADS, {}), 2 * WORLD + 1)),
        "few tokens": said(lambda: part_of(model_of("qwen3_5", GATED, {}), **short)),
        "packed untold": said(lambda: part_of(model_of("qwen3_5", GATED, {}), LENGTH, anew)),
    }
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())
    return found


def short_convolutions() -> torch.nn.Module:
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**sizes, **layers, vocab_size=101)).to(NPU)


def without_functions() -> torch.nn.Module:
    """A gated delta net that keeps its functions itself, as up to transformers 5.14."""
    model = model_of("qwen3_5", GATED, {})
    net = model.model.layers[0].linear_attn
    net.torch_chunk_gated_delta_rule = sys.modules[type(net).__module__].torch_chunk_gated_delta_rule
    return model


def unlike() -> dict[str, str]:
    """Another switch on each rank; one that does not ask; and then they go on."""
    found = {}
    model = model_of("qwen3", HEADS, {})
    with npu_patch.applied(rope=RANK == 0):
        found["asked"] = said(npu_patch.require_same_on_all_ranks)
        if RANK == 0:
            found["silent"] = said(lambda: npu_patch.require_same_on_all_ranks(1.0))
        found["switches"] = said(lambda: part_of(model))
    with npu_patch.applied(patch=RANK == 0):
        found["patched beside unpatched"] = said(lambda: part_of(model))
    found["divided beside whole"] = said(lambda: part_of(model, sequence_parallel=RANK == 0))
    found["alike"] = said(lambda: part_of(model))
    return found


def peaks() -> dict[str, int]:
    """The highest device memory of a step beyond the model's, whole and divided."""
    model = model_of("qwen3", {**HEADS, "num_hidden_layers": 1}, {})
    ids = torch.randint(2, 101, (1, 2048), generator=torch.Generator().manual_seed(3)).to(NPU)
    batch = {"input_ids": ids, "labels": ids}
    found = {}
    with npu_patch.applied(model):
        for name, step in {"whole": lambda: whole(model, batch), "divided": lambda: divided_once(model, batch)}.items():
            step()
            torch.npu.reset_peak_memory_stats()
            before = torch.npu.memory_allocated()
            step()
            found[name] = torch.npu.max_memory_allocated() - before
    return found


def divided_once(model: torch.nn.Module, batch: dict[str, Tensor]) -> None:
    parallel = SequenceParallel(model)
    with parallel.part(**batch) as part:
        model(**part).loss.backward()
    parallel.close()
    model.zero_grad()


if __name__ == "__main__":
    torch.npu.set_device(NPU)
    torch.set_num_threads(1)
    dist.init_process_group("hccl")
    written = {
        "cases": {name: found_in(name) for name in CASES},
        "refused": refused(),
        "unlike": unlike(),
        "peaks": peaks(),
    }
    Path(sys.argv[1], f"{RANK}.json").write_text(json.dumps(written))
    dist.destroy_process_group()
