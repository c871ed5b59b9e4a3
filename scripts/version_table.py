"""The compatibility table in docs/versions.md, from what tests/support/version_cells.py found on each version.

python scripts/version_table.py FILE.json...          # writes the table: give every version's file
python scripts/version_table.py --check FILE.json...  # says where the table differs from these versions' files

A cell that is different or failed is an error, and the table stays as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/versions.md"
BEGIN, END = "<!-- versions: begin -->", "<!-- versions: end -->"
EQUAL, NOTHING = "=", "-"
WRONG = ("different: ", "failed: ")

# What is found, in words, by (patch, family) and then by version: "=", "-", or the reason why it is skipped.
Found = dict[tuple[str, str], dict[str, str]]


def read_files(paths: Iterable[Path]) -> Found:
    found: Found = {}
    contents = [json.loads(path.read_text()) for path in paths]
    for content in sorted(contents, key=lambda content: _numbers(content["versions"]["transformers"])):
        for family, cells in content["cells"].items():
            for patch, cell in cells.items():
                found.setdefault((patch, family), {})[content["versions"]["transformers"]] = _in_words(cell)
    return found


def _in_words(cell: Mapping[str, str]) -> str:
    if cell["status"] == "equal":
        return EQUAL
    if cell["status"] == "nothing":
        return NOTHING
    if cell["status"] == "no family":
        return "this transformers does not have the family"
    return f"{cell['status']}: {cell['reason']}"


def render(found: Found) -> str:
    """One row for all families of a patch that fare alike on every version; reasons as numbered notes below."""
    versions = list(dict.fromkeys(version for by_version in found.values() for version in by_version))
    rows: dict[tuple[str, ...], list[str]] = {}
    for (patch, family), by_version in found.items():
        words = tuple(by_version.get(version, NOTHING) for version in versions)
        if set(words) != {NOTHING}:
            rows.setdefault((patch, *words), []).append(family)
    reasons = list(dict.fromkeys(word for _, *words in rows for word in words if word not in (EQUAL, NOTHING)))
    lines = [_row(["patch", "families", *versions]), _row(["---"] * (2 + len(versions)))]
    patches = list(dict.fromkeys(patch for patch, _ in found))
    for (patch, *words), families in sorted(rows.items(), key=lambda row: patches.index(row[0][0])):
        marks = [word if word in (EQUAL, NOTHING) else str(reasons.index(word) + 1) for word in words]
        lines.append(_row([patch, ", ".join(families), *marks]))
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes]).rstrip()


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def parse(text: str) -> Found:
    """What `render` wrote."""
    lines = text.strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    reasons = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    found: Found = {}
    for patch, families, *marks in rows[2:]:
        for family in families.split(", "):
            found[patch, family] = {
                version: reasons.get(mark, mark) for version, mark in zip(rows[0][2:], marks, strict=True)
            }
    return found


def differences(documented: Found, found: Found) -> list[str]:
    """In words, over the versions that were found and are documented."""
    apart = []
    known = {version for by_version in documented.values() for version in by_version}
    for (patch, family), by_version in found.items():
        for version in known & by_version.keys():
            before, now = documented.get((patch, family), {}).get(version, NOTHING), by_version[version]
            if before != now:
                where = f"transformers {version}, {family}, {patch}"
                apart.append(f"{where}: docs/versions.md has {before!r}, found {now!r}")
    return apart


def documented() -> Found:
    return parse(PAGE.read_text().partition(BEGIN)[2].partition(END)[0])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the table differs")
    parser.add_argument("files", nargs="+", type=Path, help="as written by python -m tests.support.version_cells")
    options = parser.parse_args(arguments)
    found = read_files(options.files)
    wrong = [
        f"transformers {version}, {family}, {patch}: {words}"
        for (patch, family), by_version in found.items()
        for version, words in by_version.items()
        if words.startswith(WRONG)
    ]
    if wrong:
        print(*wrong, sep="\n")
        return 1
    if options.check:
        apart = differences(documented(), found)
        print(*apart, sep="\n", end="\n" if apart else "")
        return 1 if apart else 0
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{render(found)}\n{END}{rest.partition(END)[2]}")
    return 0


def _numbers(version: str) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in version.split(".")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
