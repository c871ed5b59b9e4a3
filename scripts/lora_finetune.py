"""Fine-tune with LoRA on an Ascend NPU, without and with npu_patch.apply(), and show what that changed.

    python scripts/lora_finetune.py                                   two small random models, the help of Python
    python scripts/lora_finetune.py --model DIR --text FILE           your own

scripts/demo.sh makes an environment first. Without an NPU the job runs on a simulated one, whose counts of launches
and bytes are those of the operators, and whose speed means nothing.
"""

from __future__ import annotations

import os
import sys
import warnings

from finetune.settings import Settings, Unacceptable, parser, settings_of


def main(arguments: list[str]) -> int:
    arguments_parser = parser()
    settings = settings_of(arguments_parser.parse_args(arguments))
    _quiet()
    try:
        compare(settings)
    except Unacceptable as error:
        arguments_parser.error(str(error))
    return 0


def compare(settings: Settings) -> None:
    """Every model without and with the patches, its comparison printed as soon as it is there."""
    from finetune import device as devices

    device = devices.start(settings.device)  # before torch is imported

    from finetune import curves
    from finetune.comparison import comparison
    from finetune.models import candidates
    from finetune.text import sequences
    from finetune.training import train
    from tqdm import tqdm

    jobs = [(each, sequences(settings, each.tokenize, each.vocabulary)) for each in candidates(settings)]
    results = {}
    with tqdm(total=len(jobs) * len(settings.runs) * settings.steps, bar_format=BAR, dynamic_ncols=True) as bar:
        for candidate, data in jobs:
            runs = {run: train(candidate, run, data, settings, device, bar) for run in settings.runs}
            results[candidate.title] = runs
            bar.write("\n" + comparison(candidate, runs, settings, device) + "\n", file=sys.stdout)
    picture = settings.output / "loss_curves.png"
    curves.save(results, device, picture)
    print(f"loss curves: {picture}\nadapters:    {settings.output}/*/{'|'.join(settings.runs)}")


BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"


def _quiet() -> None:
    """Only what concerns the job is printed. Everything is local: no look at the hub."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", module=r"torch_npu|transformers|peft|accelerate")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
