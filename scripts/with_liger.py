"""Runs the real Liger-Kernel together with npu_patch on a CUDA device, each before the other.

    python scripts/with_liger.py --families qwen3 llama qwen3_moe

The tests have stand-ins for Liger, whose kernels need a device. What it bound to a layer stays, the rest is patched,
both leave the loss and every gradient as far from the unpatched model's as Liger alone does, and `restore()` leaves
what is Liger's. Exit code 1 where that does not hold.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import liger_kernel.transformers as liger
import torch

import npu_patch
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.tiny_models import tiny, tiny_batch

CLOSE = 1e-5  # float32 against float32, beyond what Liger alone is off
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 101}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["qwen3", "llama", "qwen3_moe"])
    families = parser.parse_args().families
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    right = []
    for family in families:
        for liger_first in (True, False):
            tiny(family)  # imports the modeling file, where Liger leaves its classes under transformers' names
            with mock.patch.dict(vars(sys.modules[f"transformers.models.{family}.modeling_{family}"])):
                right.append(together(family, liger_first))
    sys.exit(not all(right))


def together(family: str, liger_first: bool) -> bool:
    """Prints what ran and how far the results are apart; false where something is not as it should be."""
    model = tiny(family, **WIDTHS).to("cuda")
    plain = loss_and_gradients(model, tiny_batch())
    if liger_first:
        bind_liger(family, model)
        report = npu_patch.apply(model, device="cuda")
    else:
        report = npu_patch.apply(model, device="cuda")
        bind_liger(family, model)
    both = distance(model, plain)
    ran = sorted({outcome.patch for outcome in report.patched if outcome.calls.ran})
    left = [f"{outcome.patch}: {outcome.reason}" for outcome in report.skipped if outcome.layers]
    npu_patch.restore()
    alone = distance(model, plain)
    print(
        f"{family}, {'Liger' if liger_first else 'npu_patch'} first: {both:.1e} from unpatched, Liger alone {alone:.1e}"
    )
    print(f"  ran: {', '.join(ran)}")
    for reason in dict.fromkeys(left):
        print(f"  left to Liger: {reason}")
    right = both < alone + CLOSE and bool(ran) and not report.failed
    if not right:
        print("  WRONG")
    return right


def bind_liger(family: str, model: torch.nn.Module) -> None:
    bind = getattr(liger, f"apply_liger_kernel_to_{family}")
    bind(model=model, fused_linear_cross_entropy=False, cross_entropy=False, rope=False)


def distance(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> float:
    found = loss_and_gradients(model, tiny_batch())
    return max(relative_error(found[name], expected[name]) for name in expected)


if __name__ == "__main__":
    main()
