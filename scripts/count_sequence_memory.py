"""The highest device memory of a LoRA step on long sequences, by how many simulated NPUs share them.

    python scripts/count_sequence_memory.py                     # 32768 tokens, one rank and two: about two minutes
    python scripts/count_sequence_memory.py --ranks 1 4 --families qwen3_5 --tokens 65536

A rank's peak beyond its model, of two patched layers in bfloat16, a sixteenth as wide as those of Qwen3-1.7B, whose
sequences are divided by npu_patch.sequence_parallel. The memory is that of torch_npu's allocator; attention's kernel
computes nothing here (its results are zeros of the right shapes), since on a CPU its products take hours and no peak
depends on their values.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

FAMILIES = ("qwen3", "qwen3_5")
SIZES = {
    "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def peaks(families: list[str], tokens: int, ranks: int) -> dict[str, int]:
    """By family: of the rank with the highest one."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "npu_patch.simulator", "torchrun", "--standalone"]
        command += ["--nproc-per-node", str(ranks), __file__, folder, str(tokens), *families]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, env=environment, check=True)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    return {family: max(each[family] for each in found) for family in families}


def without_attention() -> None:
    """Its results are zeros."""
    import torch

    from npu_patch.simulator.fused import attention
    from npu_patch.simulator.fused.attention_formula import Gradients

    def attend(query: Any, key: Any, value: Any, scores: Any) -> tuple[Any, ...]:
        statistics = torch.ones(query.shape[:2])
        return query.new_zeros(*query.shape[:2], value.shape[-1]), statistics, statistics.clone()

    def attend_backward(grad: Any, query: Any, key: Any, value: Any, *others: Any) -> Gradients:
        return Gradients(*(torch.zeros_like(each) for each in (query, key, value)), None, None)

    attention.Problem.scores = lambda *_: SimpleNamespace()
    attention.attend, attention.attend_backward = attend, attend_backward


def rank(folder: str, tokens: int, families: list[str]) -> None:
    import torch
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model

    import npu_patch
    from npu_patch.sequence_parallel import SequenceParallel
    from tests.support.tiny_models import tiny

    warnings.simplefilter("ignore")
    torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_num_threads(1)
    without_attention()
    dist.init_process_group("hccl")
    found = {}
    for family in families:
        model = tiny(family, **SIZES, max_position_embeddings=tokens).to("npu", torch.bfloat16).train()
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        ids = torch.randint(2, 101, (1, tokens), generator=torch.Generator().manual_seed(0)).to("npu")
        npu_patch.apply(model)
        parallel = SequenceParallel(model, sequence_parallel=dist.get_world_size() > 1)
        for length in (1024, tokens):  # once for what stays
            torch.npu.reset_peak_memory_stats()
            before = torch.npu.memory_allocated()
            with parallel.part(input_ids=ids[:, :length], labels=ids[:, :length]) as part:
                model(**part).loss.backward()
        found[family] = torch.npu.max_memory_allocated() - before
        parallel.close()
        npu_patch.restore()
        del model, part
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    asked = arguments()
    by_ranks = {ranks: peaks(asked.families, asked.tokens, ranks) for ranks in asked.ranks}
    first = by_ranks[asked.ranks[0]]
    print(f"| {asked.tokens} tokens | ranks | peak of a rank, MB | falls by |\n| --- | --- | --- | --- |")
    for family in asked.families:
        for ranks, found in by_ranks.items():
            print(f"| {family} | {ranks} | {found[family] / 1e6:.1f} | {first[family] / found[family]:.2f} |")
    if asked.json:
        asked.json.write_text(json.dumps(by_ranks))


if __name__ == "__main__":
    if "RANK" in os.environ:
        rank(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
    else:
        main()
