"""The results of `bench` as a picture: a bar for each op, how many times it gained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npu_patch.commands.bench.measured import Measured


def draw(content: dict[str, Any], measured: Sequence[Measured], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [(each, each.gain) for each in measured if each.gain is not None]
    labels = [f"{each.patch}: {each.site}\n{each.shapes[:70]}" for each, _ in shown]
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.5 * len(shown)))
    colours = ["#c7000b" if gain >= 1 else "#9a9a9a" for _, gain in shown]
    bars = axis.barh(range(len(shown)), [gain for _, gain in shown], color=colours)
    axis.bar_label(bars, [f"{gain:.2f}" for _, gain in shown], padding=3)
    axis.set_yticks(range(len(shown)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.axvline(1.0, color="black", linewidth=0.8)
    what = "times fewer launches (simulated counts)" if content["note"] else "times faster"
    axis.set_xlabel(f"{what}, forward and backward")
    axis.set_title(f"{content['model']} on {content['device']} ({content['chip']}), {content['dtype']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
