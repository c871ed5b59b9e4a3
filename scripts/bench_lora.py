"""What one LoRA step costs on a GPU: time, peak memory and kernels, unpatched, with each switch, and beside Liger.

    python scripts/bench_lora.py                                    # every job and way, one run
    python scripts/bench_lora.py --jobs autocast checkpointed --ways unpatched all --profile 12

Models of the named sizes with random weights in bfloat16, rank 8 on all linear layers, dropout 0.05, AdamW. The ways
of one job run in turns in one process, on one model: `restore()` lies between them. Liger, which cannot be undone, has
a process of its own. A cell is the median time of a step (host included, as a training loop sees it) over that of the
unpatched one, the highest memory that was allocated, and the kernels of one step. All of it says something of a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LIGER, WITH_LIGER = "liger", "liger + all"
OFF = {"lora": False, "loss": False}
WAYS: dict[str, dict[str, Any] | None] = {
    "unpatched": None,
    "kernels": {**OFF, "triton": True},
    "lora": {"fused_ops": False, "moe_patch": False, "fla": False, "loss": False, "triton": True},
    "loss": {"fused_ops": False, "moe_patch": False, "fla": False, "lora": False},
    "all": {"triton": True},
    "all, no triton": {"triton": False},
    LIGER: None,
    WITH_LIGER: {"triton": True},
}
TURNS, WARM_UPS, STEPS = 2, 2, 5


@dataclass(frozen=True)
class Job:
    """`autocast`: to bfloat16; the adapters are float32 with it and without."""

    family: str
    tokens: int = 4096
    autocast: bool = False
    checkpointed: bool = False


JOBS = {
    "autocast": Job("qwen3", autocast=True),
    "float32 adapters": Job("qwen3"),
    "checkpointed": Job("qwen3", tokens=16384, checkpointed=True),
    "128 tokens": Job("qwen3", tokens=128, autocast=True),
    "qwen3_moe": Job("qwen3_moe", autocast=True),
    "qwen3_5": Job("qwen3_5", autocast=True),
}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 6,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "norm_topk_prob": True,
    },
    "qwen3_5": {
        "vocab_size": 248320,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_value_heads": 16,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
}
CONFIGS = {"qwen3": "Qwen3Config", "qwen3_moe": "Qwen3MoeConfig", "qwen3_5": "Qwen3_5TextConfig"}


@dataclass(frozen=True)
class Cost:
    """`milliseconds` and `slowest` of a step; `kernel_milliseconds` of the device; `gib`: the highest allocation."""

    milliseconds: float
    slowest: float
    gib: float
    kernels: int
    kernel_milliseconds: float
    loss: float
    longest: list[tuple[str, int, float]]


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments()
    if options.one is not None:
        for way, cost in measured(JOBS[options.one], options.ways, options.profile):
            print(json.dumps({"way": way, **asdict(cost)}), flush=True)
        return
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for job in options.jobs:
        found[job] = {}
        with_liger = {way for way in options.ways if "liger" in way}
        for ways in (
            [way for way in options.ways if way not in with_liger],
            [way for way in options.ways if way in with_liger],
        ):
            if ways:
                found[job] |= in_a_process_of_its_own(job, ways, options.profile)
        print_row(job, found[job], options.profile)
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS, metavar="JOB")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="name the N kernels that take longest")
    parser.add_argument("--output", metavar="FILE", help="everything as JSON")
    parser.add_argument("--one", choices=JOBS, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_a_process_of_its_own(job: str, ways: list[str], profile: int) -> dict[str, dict[str, Any]]:
    command = [sys.executable, __file__, "--one", job, "--ways", *ways, "--profile", str(profile)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        print(f"{job}: {(done.stderr.strip().splitlines() or ['?'])[-1]}", flush=True)
    return {line.pop("way"): line for line in lines}


def print_row(job: str, costs: dict[str, dict[str, Any]], profile: int) -> None:
    import torch

    print(f"\n{job}: {JOBS[job]} on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    base = costs.get("unpatched")
    for way, cost in costs.items():
        ratio = f"{cost['milliseconds'] / base['milliseconds']:5.2f}" if base else "    -"
        print(
            f"  {way:<16} {cost['milliseconds']:8.1f} ms (slowest {cost['slowest']:.1f}) = {ratio} of unpatched, "
            f"kernels {cost['kernels']:>6} in {cost['kernel_milliseconds']:7.1f} ms, {cost['gib']:6.2f} GiB, "
            f"loss {cost['loss']:.4f}",
            flush=True,
        )
        for name, count, milliseconds in cost["longest"][:profile]:
            print(f"      {milliseconds:8.2f} ms {count:6d} {name}")


def measured(job: Job, ways: list[str], profile: int) -> Any:
    """Each way with its `Cost`."""
    import torch

    import npu_patch

    model = make(job, any("liger" in way for way in ways))
    step = training_step(model, job)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(TURNS):
        for way in ways:
            with npu_patch.applied(model, device="cuda", patch=WAYS[way] is not None, **(WAYS[way] or {})):
                times[way] += [timed(step) for _ in range(WARM_UPS + STEPS)][WARM_UPS:]
                if turn == TURNS - 1:
                    yield way, cost_of(step, times[way], profile)
            torch.cuda.empty_cache()


def make(job: Job, with_liger: bool) -> Any:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.logging.set_verbosity_error()
    if with_liger:
        import liger_kernel.transformers

        getattr(liger_kernel.transformers, f"apply_liger_kernel_to_{job.family}")()
    config = getattr(transformers, CONFIGS[job.family])(**SIZES[job.family])
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    linear = [name for name, each in model.named_modules() if type(each) is torch.nn.Linear]
    targets = sorted({name.rsplit(".", 1)[-1] for name in linear} - {"lm_head"})  # "all-linear" means experts, too
    adapters = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets)
    model = get_peft_model(model, adapters)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if job.checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def training_step(model: Any, job: Job) -> Callable[[], Any]:
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)  # every way starts from the same adapters
    torch.manual_seed(0)
    ids = torch.randint(0, 150000, (1, job.tokens), device="cuda")

    def step() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=job.autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def cost_of(step: Callable[[], Any], times: list[float], profile: int) -> Cost:
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() / 2**30
    with profiler(activities=[ProfilerActivity.CUDA]) as profiled:
        loss = step()
        torch.cuda.synchronize()
    kernels = [each for each in profiled.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    counts, spent = Counter(), Counter()
    for each in kernels:
        counts[each.name[:90]] += 1
        spent[each.name[:90]] += each.device_time / 1e3
    return Cost(
        statistics.median(times),
        max(times),
        peak,
        len(kernels),
        sum(spent.values()),
        float(loss),
        [(name, counts[name], milliseconds) for name, milliseconds in spent.most_common(profile)],
    )


def timed(step: Callable[[], Any]) -> float:
    """Milliseconds."""
    import torch

    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


if __name__ == "__main__":
    main()
