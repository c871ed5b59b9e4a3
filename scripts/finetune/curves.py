"""The loss curves, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .comparison import differences
from .device import Device
from .training import Run

STYLES = {
    "unpatched": {"color": "#9a9a9a", "linewidth": 4.0},
    "patched": {"color": "#c7000b", "linewidth": 1.4},
}


def save(results: Mapping[str, Mapping[str, Run]], device: Device, path: Path) -> None:
    """`results`: title of the model -> name of the run -> run. Losses above, their difference below."""
    figure, axes = plt.subplots(
        2, len(results), figsize=(6 * len(results), 5.5), sharex="col", squeeze=False, height_ratios=(3, 1)
    )
    for column, (title, runs) in enumerate(results.items()):
        _losses(axes[0][column], title, runs)
        _differences(axes[1][column], runs)
    figure.suptitle(f"LoRA without and with npu_patch.apply(), on {device}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _losses(axis: plt.Axes, title: str, runs: Mapping[str, Run]) -> None:
    for name, run in runs.items():
        axis.plot(_steps(run.losses), run.losses, label=name, **STYLES[name])
    axis.set_title(title)
    axis.set_ylabel("loss")
    axis.grid(alpha=0.3)
    axis.legend()


def _differences(axis: plt.Axes, runs: Mapping[str, Run]) -> None:
    if len(runs) == 2:
        apart = differences(runs)
        axis.plot(_steps(apart), apart, color="black", linewidth=1.2)
    axis.set_ylabel("|difference|")
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)


def _steps(values: list[float]) -> range:
    return range(1, len(values) + 1)
