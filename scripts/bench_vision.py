"""What a vision tower costs, patched against unpatched.

    python scripts/bench_vision.py                              # counts on the simulated NPU, of the tiny families
    python scripts/bench_vision.py --families qwen2_5_vl --images 4 --lora
    python scripts/bench_vision.py --device cuda                # times on a GPU, of towers in the sizes of real ones
    python scripts/bench_vision.py --device npu                 # the same on a real NPU

Counts are those of `python -m npu_patch count FAMILY --images N`: for the tower (forward and backward) and for the
whole training step, before and after, and the ratio. Times are of one tower in bfloat16 with random weights, for one
image: forward alone, and forward and backward of all weights. The ways run in turns in one process, on one tower, with
sdpa and, where flash_attn is there, with flash_attention_2; a cell is the median over that of unpatched sdpa, and the
highest memory that was allocated. Times on a GPU say nothing of an NPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from npu_patch.commands.subject.vision.families import FAMILIES

COUNTED = {
    "launches": ("launches", 1),
    "bytes": ("MB moved", 1e6),
    "host_waits": ("host waits", 1),
    "copies": ("copies", 1),
    "peak_bytes": ("peak MB per image", 1e6),
}
TURNS, WARM_UPS, STEPS = 3, 2, 5


@dataclass(frozen=True)
class Tower:
    """`sides`: height and width of the image."""

    module: str
    model: str
    config: str
    sizes: dict[str, Any]
    sides: tuple[int, int]


TOWERS = {
    "qwen2_5_vl": Tower(
        "qwen2_5_vl",
        "Qwen2_5_VisionTransformerPretrainedModel",
        "Qwen2_5_VLVisionConfig",
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
        (1008, 1344),
    ),
    "qwen3_vl": Tower(
        "qwen3_vl",
        "Qwen3VLVisionModel",
        "Qwen3VLVisionConfig",
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096},
        (1024, 1344),
    ),
}


@dataclass(frozen=True)
class Way:
    attention: str
    patched: bool


WAYS = {
    "sdpa": Way("sdpa", False),
    "sdpa, patched": Way("sdpa", True),
    "flash": Way("flash_attention_2", False),
    "flash, patched": Way("flash_attention_2", True),
}


@dataclass
class Cost:
    """Milliseconds of each measured call; `gib`: the highest allocation; `error`: relative, to unpatched sdpa."""

    forward: list[float]
    step: list[float]
    gib: float = 0.0
    error: float = 0.0


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments()
    found: dict[str, Any] = {}
    if options.device != "simulated":
        for tower in options.towers:
            costs = timed_tower(TOWERS[tower], options.device, options.triton)
            found[tower] = {way: asdict(cost) for way, cost in costs.items()}
            print_times(tower, options.device, found[tower])
    else:
        for family in options.families:
            found[family] = counted(family, options.images, options.lora, options.dtype)
            print_counts(family, found[family], options.images)
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("simulated", "cuda", "npu"), default="simulated")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES, metavar="FAMILY")
    parser.add_argument("--images", type=int, default=2, help="counted: in the one sequence (default 2)")
    parser.add_argument("--lora", action="store_true", help="counted: adapters on all linear layers, the rest frozen")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="counted")
    parser.add_argument("--towers", nargs="+", default=list(TOWERS), choices=TOWERS, metavar="TOWER", help="timed")
    parser.add_argument("--triton", action="store_true", help="timed: Triton kernels, too")
    parser.add_argument("--output", metavar="FILE", help="everything as JSON")
    options = parser.parse_args()
    if options.images < 1:
        parser.error(f"--images {options.images}: accepted are numbers from 1")
    return options


def counted(family: str, images: int, lora: bool, dtype: str) -> dict[str, Any]:
    """By step and way, in a process of its own: no family finds another's modules patched."""
    command = [sys.executable, "-m", "npu_patch", "count", family, "--images", str(images), "--dtype", dtype, "--json"]
    done = subprocess.run([*command, *(["--lora"] if lora else [])], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{family}: {done.stdout}{done.stderr}")
    steps = json.loads(done.stdout)["steps"]
    return {step: {way: each["total"] for way, each in ways.items()} for step, ways in steps.items()}


def print_counts(family: str, steps: dict[str, Any], images: int) -> None:
    print(f"\n{family}, {images} images, counted on the simulated NPU{'':<6}unpatched     patched   ratio")
    for step in ("tower", "training step"):
        for measure, (title, unit) in COUNTED.items():
            share = images if measure == "peak_bytes" else 1
            before, after = (steps[step][way][measure] / unit / share for way in ("unpatched", "patched"))
            ratio = f"{after / before:8.2f}" if before else "       -"
            print(f"  {step:<14} {title:<40} {before:10,.2f}  {after:10,.2f}{ratio}", flush=True)


def timed_tower(tower: Tower, device: str, triton: bool) -> dict[str, Cost]:
    import torch

    import npu_patch

    of_device = torch.get_device_module(device)
    model = made(tower, device)
    pixels, grid = picture(tower, model)
    ways = {name: way for name, way in WAYS.items() if "flash" not in way.attention or has_flash_attention()}
    costs = {name: Cost([], []) for name in ways}
    reference = None
    for _ in range(TURNS):
        for name, way in ways.items():
            model.set_attn_implementation(way.attention)
            with npu_patch.applied(model, device=device, patch=way.patched, triton=triton):
                forward, step = calls(model, pixels, grid)
                result = forward()
                reference = result if reference is None else reference
                costs[name].error = float((result - reference).norm() / reference.norm())
                costs[name].forward += times(forward, of_device)
                costs[name].step += times(step, of_device)
                of_device.reset_peak_memory_stats()
                step()
                of_device.synchronize()
                costs[name].gib = of_device.max_memory_allocated() / 2**30
            of_device.empty_cache()
    return costs


def has_flash_attention() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def made(tower: Tower, device: str) -> Any:
    import torch

    folder = f"transformers.models.{tower.module}"
    kind = getattr(importlib.import_module(f"{folder}.modeling_{tower.module}"), tower.model)
    config = getattr(importlib.import_module(f"{folder}.configuration_{tower.module}"), tower.config)(**tower.sizes)
    torch.manual_seed(0)
    with torch.device(device):
        return kind._from_config(config, dtype=torch.bfloat16).train()


def picture(tower: Tower, model: Any) -> tuple[Any, Any]:
    """As the image processor gives it: patches, and how many there are in time, height and width."""
    import torch

    config, device = model.config, model.device
    down, across = (side // config.patch_size for side in tower.sides)
    size = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(down * across, size, device=device, dtype=torch.bfloat16)
    return pixels, torch.tensor([[1, down, across]], device=device)


def calls(model: Any, pixels: Any, grid: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    import torch

    def features() -> Any:
        found = model(pixels, grid_thw=grid)
        return getattr(found, "pooler_output", found)

    @torch.no_grad()
    def forward() -> Any:
        return features().float()

    def step() -> None:
        features().float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return forward, step


def times(call: Callable[[], Any], of_device: Any) -> list[float]:
    return list(_times(call, of_device))[WARM_UPS:]


def _times(call: Callable[[], Any], of_device: Any) -> Iterator[float]:
    """Milliseconds, the host's part included."""
    for _ in range(WARM_UPS + STEPS):
        of_device.synchronize()
        started = time.perf_counter()
        call()
        of_device.synchronize()
        yield (time.perf_counter() - started) * 1e3


def print_times(tower: str, device: str, costs: dict[str, dict[str, Any]]) -> None:
    import torch

    height, width = TOWERS[tower].sides
    name = torch.get_device_module(device).get_device_name()
    print(f"\n{tower}: one image of {height} x {width} on {name}, torch {torch.__version__}")
    if not has_flash_attention():
        print("  flash_attn is not installed: flash_attention_2 is left out")
    base = costs["sdpa"]
    for way, cost in costs.items():
        cells = []
        for what in ("forward", "step"):
            own, before = statistics.median(cost[what]), statistics.median(base[what])
            cells.append(f"{what} {own:8.2f} ms = {own / before:5.2f}")
        print(f"  {way:<14} {'   '.join(cells)}   {cost['gib']:6.2f} GiB   apart {cost['error']:.1e}", flush=True)


if __name__ == "__main__":
    main()
