"""The clients' runner: what it holds against a client, and the table that it prints. The clients themselves run by
scripts/clients/nightly.sh."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from npu_patch.reporting.outcome import PATCHED, SKIPPED, Outcome
from npu_patch.reporting.report import Report
from npu_patch.serving.calls import Calls
from npu_patch.sites.other_tools import TOOLS, of_tool
from scripts.clients import run
from scripts.clients.results import HEAD, as_markdown
from scripts.clients.table import BOTH, CLIENTS, VARIABLE, Client

NUMBERS = [5.5, 1.25, 5.25, 1.5]


def report(*names: str, taken: str = "") -> str:
    outcomes = [Outcome(name, "a.site", PATCHED, calls=Calls(ran=3)) for name in names]
    content = Report("npu")
    content.outcomes = [*outcomes, Outcome("rope", "b.site", SKIPPED, f"already replaced by theirs{taken}")]
    content.warnings = [f"rms_norm, add_rms_norm: c.site: bound anew by theirs{taken} on 9 layers"]
    return content.json()


def found(client: Client, monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, patched: list[float]) -> run.Found:
    """What is found of a client whose processes leave these numbers and this report."""

    class Ended:
        returncode, stderr = 0, ""

    def started(client: object, way: object, places: object, at: Path) -> object:
        (at / "report.json").write_text(text)
        return Ended

    monkeypatch.setattr(run, "started", started)
    monkeypatch.setattr(run, "numbers_in", lambda at: NUMBERS if at.name.endswith(run.UNPATCHED) else patched)
    return run.compared(client, {"material": folder}, {"torch": "2.13.0+cpu"})


@pytest.mark.parametrize(
    ("ran", "theirs", "tool", "patched", "wrong"),
    [
        (("attention",), ("", ()), "", NUMBERS, []),
        (("attention",), ("", ()), "", [5.5, 1.25, 5.25, 1.51], ["variable: [5.5, 1.25, 5.25, 1.51], unpatched"]),
        (("attention", "lora"), ("", ()), "", NUMBERS, ["variable: lora did not run"]),
        (("attention",), ("twinkle", ("rms_norm", "rope")), of_tool("twinkle"), NUMBERS, []),
        (("attention",), ("twinkle", ("rope", "swiglu")), of_tool("twinkle"), NUMBERS, ["variable: swiglu did not"]),
        (("attention",), ("twinkle", ("rope",)), of_tool("swift"), NUMBERS, ["variable: rope did not run, and the"]),
    ],
    ids=["fine", "another loss", "a patch did not run", "left by name", "left and unnamed", "left to another"],
)  # fmt: skip
def test_what_is_held_against_a_client(
    ran: tuple[str, ...], theirs: tuple[str, tuple[str, ...]], tool: str, patched: list[float], wrong: list[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    client = Client("a client", "base", (), ("train",), ways=(VARIABLE,), ran=ran, theirs=theirs)
    result = found(client, monkeypatch, tmp_path, report("attention", taken=tool), patched)
    assert len(result.wrong) == len(wrong)
    assert all(said.startswith(expected) for said, expected in zip(result.wrong, wrong, strict=True))


def test_ways_that_fare_alike_are_one_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = Client("a client", "base", (), ("train",), ways=BOTH, ran=("attention",))
    head, _, row = as_markdown(
        [asdict(found(client, monkeypatch, tmp_path, report("attention"), NUMBERS))]
    ).splitlines()
    assert head == f"| {' | '.join(HEAD)} |"
    assert row == (
        "| `a client` | torch 2.13.0 | yes | attention | 0.0e+00 | none: `TWINKLE_NPU_AUTO=1`, or "
        "`python -m npu_patch run ...` |"
    )


def test_the_rows_name_patches_tools_and_environments_that_there_are() -> None:
    from npu_patch.patches import CATALOGUE

    patches = {patch.name for patch in CATALOGUE}
    made = (Path(run.__file__).parent / "environment.sh").read_text().split("NAMES=(")[1].split(")")[0].split()
    for client in CLIENTS:
        tool, left = client.theirs
        assert {*client.ran, *left} <= patches and tool in ("", *(each.name for each in TOOLS))
        assert client.environment in made
