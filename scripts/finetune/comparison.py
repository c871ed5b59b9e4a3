"""What the two runs showed, as text."""

from __future__ import annotations

from collections.abc import Mapping

from .device import Device
from .models import Candidate
from .settings import Settings
from .training import Run

MOST_COLUMNS = 8


def comparison(candidate: Candidate, runs: Mapping[str, Run], settings: Settings, device: Device) -> str:
    each = "images" if settings.sequence_length is None else f"x {settings.sequence_length} tokens"
    heading = (
        f"{candidate.title}: LoRA rank {settings.lora_rank} on all linear layers, {settings.dtype}, "
        f"{settings.steps} steps of {settings.batch_size} {each}, on {device}"
    )
    reports = [str(run.report) for run in runs.values() if run.report is not None]
    return "\n\n".join([heading, *reports, loss_table(runs), cost_table(runs, device)])


def loss_table(runs: Mapping[str, Run]) -> str:
    steps = _shown_steps(len(next(iter(runs.values())).losses))
    lines = [f"{'loss at step':<18}" + "".join(f"{step:>9}" for step in steps)]
    lines += [f"{name:<18}" + "".join(f"{run.losses[step - 1]:>9.4f}" for step in steps) for name, run in runs.items()]
    if len(runs) == 2:
        apart = differences(runs)
        largest = max(apart)
        lines.append(
            f"largest difference {largest:.2e}, at step {apart.index(largest) + 1}; "
            f"{apart[0]:.2e} at step 1, before any update"
        )
    return "\n".join(lines)


def differences(runs: Mapping[str, Run]) -> list[float]:
    """|patched - unpatched|, step by step."""
    return [abs(a - b) for a, b in zip(*(run.losses for run in runs.values()), strict=True)]


def cost_table(runs: Mapping[str, Run], device: Device) -> str:
    costs = [run.cost for run in runs.values()]
    rows = [
        _row("kernel launches", [cost.launches for cost in costs], 1, "{:,.0f}"),
        _row("bytes moved", [cost.bytes for cost in costs], 1e6, "{:,.1f} MB"),
        _row("waits for the host", [cost.host_copies for cost in costs], 1, "{:,.0f}"),
        _row("peak memory", [cost.peak_memory for cost in costs], 1e6, "{:,.1f} MB"),
    ]
    columns = [*runs, "change"] if len(runs) == 2 else [*runs]
    title = f"per step, counted on {device}    "
    lines = [title + "".join(f"{column:>14}" for column in columns)]
    lines += [f"{name:<{len(title)}}" + "".join(f"{cell:>14}" for cell in cells) for name, cells in rows if cells]
    if not device.simulated:
        lines.append("launches and bytes are counted on a simulated NPU only: --device simulated")
    return "\n".join(lines)


def _row(name: str, values: list[float | None], unit: float, form: str) -> tuple[str, list[str]]:
    if None in values:
        return name, []
    cells = [form.format(value / unit) for value in values]
    if len(values) == 2:
        before, after = values
        cells.append(f"{100 * (after - before) / before:+.1f} %" if before else "-")
    return name, cells


def _shown_steps(steps: int) -> list[int]:
    """At most `MOST_COLUMNS` of 1 ... steps, evenly spread, the first and the last among them."""
    columns = min(MOST_COLUMNS, steps)
    if columns == 1:
        return [1]
    return [1 + round(column * (steps - 1) / (columns - 1)) for column in range(columns)]
