"""What a decoded token costs, by what is switched on, counted on the simulated NPU: no times.

    python -m npu_patch.simulator scripts/bench_decode.py
    python -m npu_patch.simulator scripts/bench_decode.py qwen3_next --cache static --batch 2 --by-operator
    python -m npu_patch.simulator scripts/bench_decode.py qwen3 --dtype float32 --check

Host launches and device kernels of generate() for unpatched, each of the switches in WAYS, and all of them, and their
shares of unpatched; kernels per layer too, as the difference of a model of `--layers` and one of half as many: whatever
is done once a token falls out. `--check` compares the greedy tokens of the ways on a small random model, says how far
their logits are from float64 and, where tokens differ, how far apart the two logits are, and which one float64 gives.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from npu_patch import simulator

if not simulator.is_active():
    simulator.start()

import torch
from torch import Tensor

import npu_patch
from npu_patch.commands.subject.tiny_model import random_model, shaken, tiny_config
from npu_patch.simulator.counters import REPLAY, Counted

UNPATCHED = "unpatched"
NONE = dict.fromkeys(("fused_ops", "moe_patch", "fla", "lora", "loss", "vision", "inference", "triton"), False)
PLAIN = {"triton": False}  # a switch that is not named has its default
WAYS: dict[str, dict[str, Any]] = {
    UNPATCHED: {"patch": False},
    "captured_decode": {**NONE, "captured_decode": True},
    "static_cache": {**NONE, "inference": True, "captured_decode": False},
    "fused_ops": {**NONE, "fused_ops": True},
    "moe_patch": {**NONE, "moe_patch": True},
    "fla": {**NONE, "fla": True},
    "inference off": {**PLAIN, "inference": False},
    "patched": PLAIN,
    "recurrent_bf16": {**PLAIN, "recurrent_bf16": True},
    "triton": {"triton": True},
    "all": {"triton": True, "recurrent_bf16": True},
}
PROMPT = 12


@dataclass(frozen=True)
class Cost:
    """Of one token."""

    launches: float
    kernels: float
    host_copies: float
    by_op: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="*", default=["qwen3"], help="model types; qwen3 if none is given")
    parser.add_argument("--layers", type=int, default=8, help="an even multiple of the family's pattern (8)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--cache", choices=("dynamic", "static"), default="static")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=6, help="over which is averaged, or which --check compares")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--by-operator", action="store_true", help="each operator's kernels, per layer")
    parser.add_argument("--check", action="store_true", help="compare greedy tokens instead")
    options = parser.parse_args()
    for family in options.family:
        (check if options.check else compare)(family, options)


def compare(family: str, options: argparse.Namespace) -> None:
    print(f"{family}, {options.dtype}, batch {options.batch}, {options.cache} cache, {options.layers} layers")
    columns = ("launches", "share", "kernels", "share", "waits", "per layer", "share")
    print(f"{'':<20}" + "".join(f"{column:>11}" for column in columns))
    first: tuple[float, float, float] | None = None
    for way in options.ways:
        cost, half = (counted(family, layers, WAYS[way], options) for layers in (options.layers, options.layers // 2))
        added = options.layers - options.layers // 2
        found = cost.launches, cost.kernels, (cost.kernels - half.kernels) / added
        first = first or found
        shares = [f"{mine / base:.4f}" for mine, base in zip(found, first, strict=True)]
        cells = (f"{cost.launches:.0f}", shares[0], f"{cost.kernels:.0f}", shares[1])
        cells += (f"{cost.host_copies:.0f}", f"{found[2]:.1f}", shares[2])
        print(f"{way:<20}" + "".join(f"{cell:>11}" for cell in cells), flush=True)
        if options.by_operator:
            names = sorted(cost.by_op, key=lambda name: -cost.by_op[name])
            of_layer = {name: (cost.by_op[name] - half.by_op.get(name, 0)) / added for name in names}
            print("\n".join(f"    {of_layer[name]:>6.2f} {cost.by_op[name]:>6.0f} {name}" for name in names))


def counted(family: str, layers: int, switches: dict[str, Any], options: argparse.Namespace) -> Cost:
    """Of calls that found all there that is kept between calls: twice as many tokens, less half of them."""
    model = made(family, layers, getattr(torch, options.dtype))
    counts = []
    with npu_patch.applied(model, **switches):
        for tokens in (2 * options.tokens, options.tokens):
            generated(model, tokens, options)
            with simulator.count() as count:
                generated(model, tokens, options)
            counts.append(count)
    more, less = counts

    def per_token(of: Callable[[Counted], int]) -> float:
        return (of(more) - of(less)) / options.tokens

    names = {name for each in counts for name in (*each.by_op, *each.replayed_by_op)}
    by_op = {name: per_token(functools.partial(kernels_of, name=name)) for name in names if name != REPLAY}
    return Cost(
        per_token(lambda count: count.launches),
        per_token(lambda count: count.kernels),
        per_token(lambda count: count.host_copies),
        by_op,
    )


def kernels_of(count: Counted, name: str) -> int:
    return sum(table.get(name, (0, 0))[0] for table in (count.by_op, count.replayed_by_op))


def check(family: str, options: argparse.Namespace) -> None:
    """Greedy tokens of each way against the first's. Where they part, both have seen the same tokens."""
    model = made(family, options.layers, getattr(torch, options.dtype))
    exact = made(family, options.layers, torch.float64, "cpu")
    exact.set_experts_implementation("eager")  # torch has no grouped product of float64
    exact.load_state_dict({name: tensor.double().cpu() for name, tensor in model.state_dict().items()})
    first: list[Tensor] | None = None
    print(f"{family}, {options.dtype}, batch {options.batch}, {options.cache} cache: {options.tokens} greedy tokens")
    for way in options.ways:
        with npu_patch.applied(model, **WAYS[way]):
            outputs = generated(model, options.tokens, options, output_logits=True, return_dict_in_generate=True)
        found = [logits.double().cpu() for logits in outputs.logits]
        first = found if first is None else first
        prompt = prompt_of(model, options.batch).cpu()
        distance = from_exact(exact, prompt, found)
        print(f"{way:<20}{distance:>9.2g} from float64; {told(exact, prompt, first, found)}", flush=True)


@torch.no_grad()
def from_exact(exact: torch.nn.Module, prompt: Tensor, found: list[Tensor]) -> float:
    """How far the logits `[B, V]` of each token are from those of the model in float64, relative, on average."""
    logits = torch.stack(found, 1)
    seen = torch.cat((prompt, logits[:, :-1].argmax(-1)), 1)
    reference = exact(input_ids=seen, use_cache=False).logits[:, prompt.shape[1] - 1 :]
    return float(((logits - reference).norm(dim=-1) / reference.norm(dim=-1)).mean())


@torch.no_grad()
def told(exact: torch.nn.Module, prompt: Tensor, first: list[Tensor], found: list[Tensor]) -> str:
    """Of logits `[B, V]` for each token, whether their likeliest tokens are the same, sample by sample."""
    chosen = [torch.stack([logits.argmax(-1) for logits in each], 1) for each in (first, found)]
    apart = (chosen[0] != chosen[1]).nonzero().tolist()
    parted = {sample: at for sample, at in reversed(apart)}
    if not parted:
        return "equal"
    said = []
    for sample, at in sorted(parted.items()):
        seen = torch.cat((prompt[sample], chosen[0][sample, :at]))
        logits = exact(input_ids=seen[None], use_cache=False).logits[0, -1]
        theirs, ours = (tokens[sample, at] for tokens in chosen)
        gap = float(first[at][sample, theirs] - first[at][sample, ours])
        favoured = float(logits[theirs] - logits[ours])
        whom = "the first way's" if favoured > 0 else "this way's"
        said.append(f"sample {sample} from token {at}: {gap:.2g} apart there, float64 {abs(favoured):.2g} for {whom}")
    return "; ".join(said)


def generated(model: Any, tokens: int, options: argparse.Namespace, **settings: Any) -> Any:
    if options.cache == "static":
        settings["cache_implementation"] = "static"
    prompt = prompt_of(model, options.batch)
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False, **settings)


def made(family: str, layers: int, dtype: torch.dtype, device: str = "npu") -> torch.nn.Module:
    config = tiny_config(family)
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = layers
    if kinds and not isinstance(getattr(type(config), "layer_types", None), property):
        config.layer_types = [kinds[at % len(kinds)] for at in range(layers)]
    config.max_position_embeddings = 1024
    with torch.random.fork_rng(devices=[]):
        model = random_model(config, 0).float()
        torch.manual_seed(1)
        shaken(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(device, dtype).eval()


def prompt_of(model: torch.nn.Module, batch: int) -> Tensor:
    ids = torch.arange(batch * PROMPT).view(batch, PROMPT) * 7 % (model.config.get_text_config().vocab_size - 3) + 3
    return ids.to(model.device)


if __name__ == "__main__":
    main()
