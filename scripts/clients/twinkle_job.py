"""twinkle's training loop as in its cookbook: its data set, template, model and steps.

`--kernelize`: its own kernels on the model. `--apply before` or `after` these: the two lines that have npu_patch in it.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import twinkle
from twinkle.dataloader import DataLoader
from twinkle.dataset import Dataset, DatasetMeta
from twinkle.kernel import kernelize
from twinkle.model import TransformersModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True, help="a file with messages in each line")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--kernelize", action="store_true")
    parser.add_argument("--apply", choices=("before", "after"))
    options = parser.parse_args()

    twinkle.initialize(mode="local", seed=1)
    dataset = Dataset(DatasetMeta(options.dataset))
    dataset.set_template("Template", model_id=options.model)
    dataset.encode()
    model = TransformersModel(model_id=options.model, mixed_precision="no", dtype="float32")
    if options.apply == "before":
        apply_to(model)
    if options.kernelize:
        kernelize(model.model)
    if options.apply == "after":
        apply_to(model)
    model.set_optimizer("AdamW", lr=1e-3)
    history = []
    for batch in DataLoader(dataset=dataset, batch_size=2):
        output = model.forward_backward(inputs=batch)
        norm = model.clip_grad_norm()
        model.step()
        model.zero_grad()
        history.append({"loss": float(output["loss"]), "grad_norm": float(norm)})
        if len(history) == options.steps:
            break
    write(history, options.out)


def apply_to(model: TransformersModel) -> None:
    import npu_patch

    npu_patch.apply(model.model)


def write(history: list[dict[str, float]], folder: Path) -> None:
    """As a Trainer keeps it; and the report, where run.py wants one of the two lines."""
    kept = folder / f"checkpoint-{len(history)}"
    kept.mkdir(parents=True)
    (kept / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    if "CLIENT_REPORT" in os.environ:
        import npu_patch

        npu_patch.report().write(os.environ["CLIENT_REPORT"])


if __name__ == "__main__":
    main()
