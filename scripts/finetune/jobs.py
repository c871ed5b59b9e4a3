"""A job: each model without and with the patches, its comparison printed as soon as it is there."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from .settings import Settings, Unacceptable, settings_of

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"


Jobs = Callable[[Settings], Iterable[tuple[Any, list[Any]]]]


def main(parser: argparse.ArgumentParser, jobs_of: Jobs) -> int:
    """Of a script that compares."""
    settings = settings_of(parser.parse_args())
    quiet()
    try:
        compare(settings, jobs_of)
    except Unacceptable as error:
        parser.error(str(error))
    return 0


def compare(settings: Settings, jobs_of: Jobs) -> None:
    """`jobs_of`: candidates (`finetune.models`), each with its examples. Called once the device is there."""
    from . import device as devices

    device = devices.start(settings.device)  # before torch is imported

    from tqdm import tqdm

    from . import curves
    from .comparison import comparison
    from .training import train

    jobs = list(jobs_of(settings))
    results = {}
    with tqdm(total=len(jobs) * len(settings.runs) * settings.steps, bar_format=BAR, dynamic_ncols=True) as bar:
        for candidate, data in jobs:
            runs = {run: train(candidate, run, data, settings, device, bar) for run in settings.runs}
            results[candidate.title] = runs
            bar.write("\n" + comparison(candidate, runs, settings, device) + "\n", file=sys.stdout)
    picture = settings.output / "loss_curves.png"
    curves.save(results, device, picture)
    print(f"loss curves: {picture}\nadapters:    {settings.output}/*/{'|'.join(settings.runs)}")


def quiet() -> None:
    """Only what concerns the job is printed. Everything is local: no look at the hub."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", module=r"torch_npu|transformers|peft|accelerate|torchvision")
