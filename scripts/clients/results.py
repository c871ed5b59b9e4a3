"""What run.py found, as the table of docs/clients.md.

python scripts/clients/results.py FILE.json...          # prints it
python scripts/clients/results.py --write FILE.json...  # writes it there too: give every environment's file
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs/clients.md"
BEGIN, END = "<!-- clients: begin -->", "<!-- clients: end -->"
HEAD = ("client", "versions", "starts", "took effect", "equal", "lines needed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found = [each for file in options.files for each in json.loads(file.read_text())]
    table = as_markdown(found)
    print(table)
    wrong = [f"{each['client']}: {reason}" for each in found for reason in each["wrong"]]
    if options.write and not wrong:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")
    sys.exit("\n".join(wrong) or None)


def as_markdown(found: Iterable[Mapping[str, Any]]) -> str:
    """A row for each client; where its ways fare differently, for each of these."""
    lines = [_row(HEAD), _row(["---"] * len(HEAD))]
    for client in found:
        versions = ", ".join(f"{name} {version.split('+')[0]}" for name, version in client["versions"].items())
        fares: dict[tuple[str, ...], list[str]] = {}
        for way in client["lines"]:
            fares.setdefault(_fare(client, way), []).append(way)
        for (starts, effect), ways in fares.items():
            apart = [client["apart"][way] for way in ways if way in client["apart"]]
            needed = ", or ".join(client["lines"][way] for way in ways).replace(", or none: ", ", or ")
            lines.append(_row([f"`{client['client']}`", versions, starts, effect, _equal(apart), needed]))
    return "\n".join(lines)


def _fare(client: Mapping[str, Any], way: str) -> tuple[str, ...]:
    if way not in client["apart"]:
        return ("no", "")
    effects = [", ".join(sorted(client["ran"][way]))] if client["ran"][way] else []
    effects += [f"{client['tool']}'s, by name: {', '.join(client['left'][way])}"] if client["left"][way] else []
    return ("yes", "; ".join(effects))


def _equal(apart: Sequence[float]) -> str:
    return f"{max(apart):.1e}" if apart else ""


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
