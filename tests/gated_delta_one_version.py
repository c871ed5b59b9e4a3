"""Trains, packs and generates with tiny gated delta nets on the transformers of a given directory; prints JSON.

python tests/gated_delta_one_version.py DIRECTORY FAMILY   # "" for the installed transformers
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[:1] = [directory for directory in (sys.argv[1], str(Path(__file__).parents[1])) if directory]

from npu_patch import simulator

if simulator.real_device() is None:
    simulator.start()

import torch
import transformers

import npu_patch
from tests.gradients import loss_and_gradients, relative_error
from tests.tiny_models import tiny, tiny_batch

OTHERS_OFF = {"fused_ops": False, "moe_patch": False}
LINEAR_ONLY = {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2}
ILL_CONDITIONED = ("A_log", "dt_bias")  # float32 tells them to 1e-4 at best, patched or not


def ran(report: npu_patch.Report) -> dict[str, int]:
    counted: dict[str, int] = {}
    for outcome in report:
        if outcome.patch == "gated_delta_net":
            counted[outcome.variant] = counted.get(outcome.variant, 0) + outcome.calls.ran
    return counted


def packed_error(model: torch.nn.Module, lengths: tuple[int, ...]) -> float:
    """Of the packed logits against those of each sequence alone."""
    ids = tiny_batch(batch=1, length=sum(lengths))["input_ids"].to("npu")
    bounds = torch.tensor((0, *lengths)).cumsum(0).to("npu", torch.int32)
    parts = ids.split(list(lengths), -1)
    kwargs = {
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to("npu"),
        "seq_idx": torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None].to("npu", torch.int32),
    }
    kwargs |= {f"cu_seq_lens_{which}": bounds for which in "qk"}
    kwargs |= {f"max_length_{which}": max(lengths) for which in "qk"}
    with torch.no_grad():
        packed = model(input_ids=ids, use_cache=False, **kwargs).logits
        alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in parts], 1)
    return relative_error(packed.cpu().double(), alone.cpu().double())


def main(family: str) -> dict[str, object]:
    found: dict[str, object] = {"version": transformers.__version__}
    model = tiny(family).to("npu")
    batch = tiny_batch(length=70)
    prompt = batch["input_ids"][:, :9].to("npu")
    with simulator.count() as eager:
        original = loss_and_gradients(model, batch)
    tokens = model.generate(prompt, max_new_tokens=5, do_sample=False)
    with npu_patch.applied(model, **OTHERS_OFF) as report:
        with simulator.count() as patched:
            trained = loss_and_gradients(model, batch)
        found["ran in training"] = ran(report)
        generated = model.generate(prompt, max_new_tokens=5, do_sample=False)
        found["ran"] = ran(report)
        found["fell through"] = sum(sum(outcome.calls.fell_through.values()) for outcome in report)
        found["failed"] = [str(outcome) for outcome in report.failed]
    found["launches"] = [eager.launches, patched.launches]
    found["same tokens"] = torch.equal(tokens, generated)
    well_conditioned = [name for name in original if not name.endswith(ILL_CONDITIONED)]
    found["error"] = max(relative_error(trained[name], original[name]) for name in well_conditioned)
    again = loss_and_gradients(model, batch)
    found["restored"] = all(torch.equal(again[name], original[name]) for name in original)
    with npu_patch.applied(**OTHERS_OFF) as report:
        later = tiny(family).to("npu")
        loss_and_gradients(later, batch)
        found["ran in a layer made later"] = ran(report)
        linear = tiny(family, **LINEAR_ONLY).to("npu")
        try:
            found["packed error"] = packed_error(linear, (5, 1, 20))
        except ValueError as error:  # this version hands no boundaries to the layer
            found["packed error"] = str(error)
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[2])))
