"""The documents say what is there: files and tests that they name exist, and the examples of docs/adding.md work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
README_LINES = 120
FOLDERS = ("npu_patch", "tests", "scripts", "docs", ".ci")
BLOCK = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def words(text: str) -> Iterator[str]:
    """What a document has in backticks, outside its blocks."""
    for code in CODE.findall(BLOCK.sub("", text)):
        yield from code.split()


def absent_paths(document: Path, text: str) -> list[str]:
    """What begins with a folder of the repository, and links, where there is no such file."""
    named = (word.split("::")[0] for word in words(text))
    paths = {word for word in named if word.split("/")[0] in FOLDERS and re.fullmatch(r"[\w.-]+(/[\w.*-]+)+/?", word)}
    links = {link.split("#")[0] for link in LINK.findall(text) if ":" not in link} - {""}
    missing = {path for path in paths if not any(ROOT.glob(path.rstrip("/")))}
    return sorted(missing | {link for link in links if not (document.parent / link).exists()})


def absent_tests(text: str, existing: set[str]) -> list[str]:
    return sorted({word for word in words(text) if re.fullmatch(r"test_\w+", word)} - existing)


@pytest.fixture(scope="module")
def existing_tests() -> set[str]:
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")]
    return {name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda each: each.name)
def test_what_a_document_names_exists(document: Path, existing_tests: set[str]) -> None:
    text = document.read_text(encoding="utf-8")
    assert (absent_paths(document, text), absent_tests(text, existing_tests)) == ([], [])


OF_OTHERS = {"train.py", "script.py", "runtime/interpreter.py"}  # a user's, and triton's


def absent_files(file: Path, text: str) -> list[str]:
    """Names of files in `text`, found neither beside `file` nor from the package or the repository."""
    named = set(re.findall(r"(?<![\w./*{}-])(?:\w+/)*\w+\.py\b", text)) - OF_OTHERS
    beside = (file.parent, ROOT / "npu_patch", ROOT)
    return sorted(name for name in named if not any((folder / name).exists() for folder in beside))


def test_files_that_the_package_names_exist() -> None:
    package = ROOT / "npu_patch"
    missing = {
        str(file.relative_to(package)): absent
        for file in sorted(package.rglob("*.py"))
        if (absent := absent_files(file, file.read_text(encoding="utf-8")))
    }
    assert missing == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the algebra is in chunks.py", []),
        ("see probe/experts.py and npu_patch/log.py, run by train.py", []),
        ("in gated_delta_chunks.py; ops/rule.py", ["gated_delta_chunks.py", "ops/rule.py"]),
    ],
)
def test_a_file_that_moved_is_missed(text: str, expected: list[str]) -> None:
    assert absent_files(ROOT / "npu_patch" / "ops" / "gated_delta" / "rule.py", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`npu_patch/log.py` and `npu_patch/walk.py`", ["npu_patch/walk.py"]),
        ("`scripts/demo.sh --help`, `scripts/demo_2.sh --help`", ["scripts/demo_2.sh"]),
        ("`tests/test_docs.py::test_x` `tests/test_no*_such.py`", ["tests/test_no*_such.py"]),
        (
            "[here](README.md#limits) [there](docs/nothing.md) [away](https://arxiv.org/abs/1606.08415)",
            ["docs/nothing.md"],
        ),
        ("```sh\n`tests/of_a_block.py`\n```\n", []),
    ],
)
def test_what_does_not_exist_is_named(text: str, expected: list[str]) -> None:
    assert absent_paths(ROOT / "README.md", text) == expected
    assert absent_tests("`test_defaults` and `test_nothing`", {"test_defaults"}) == ["test_nothing"]


def test_the_readme_is_short_and_links_to_every_document() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES
    assert {ROOT / link for link in LINK.findall(text)} >= set(DOCUMENTS[1:])


@dataclass(frozen=True)
class Example:
    """A block of docs/adding.md. Lines for `file`: all of it, or `after` or `instead of` the line with `anchor`; or a
    script to run, which is no `file`."""

    section: str
    file: str | None
    how: str
    anchor: str
    lines: str

    @classmethod
    def of(cls, section: str, block: str) -> Example:
        header, lines = block.split("\n", 1)
        file, _, how = header.removeprefix("# ").partition(", ")
        how, _, anchor = how.partition(": ")
        return cls(section, None if file == "check" else file, how, anchor, lines)

    def put_into(self, root: Path) -> None:
        file = root / self.file
        if not self.how:
            assert not file.exists(), f"{self.section}: {self.file} is there already"
            file.write_text(self.lines, encoding="utf-8")
            return
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (number, *others) = [number for number, line in enumerate(lines) if self.anchor in line] or [None]
        assert number is not None and not others, f"{self.section}: not one line of {self.file} has {self.anchor!r}"
        start = {"after": number + 1, "instead of": number}[self.how]
        lines[start : number + 1] = [self.lines]
        file.write_text("".join(lines), encoding="utf-8")


def _examples() -> list[Example]:
    found = []
    for part in (ROOT / "docs" / "adding.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        section, text = part.split("\n", 1)
        found += [Example.of(section, block) for block in BLOCK.findall(text)]
    return found


EXAMPLES = _examples()


@pytest.fixture(scope="module")
def with_everything_added(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package in which each example stands."""
    root = tmp_path_factory.mktemp("added")
    for folder in ("npu_patch", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for example in EXAMPLES:
        if example.file is not None:
            example.put_into(root)
    return root


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.file is None], ids=lambda each: each.section)
def test_the_examples_of_what_can_be_added_work(example: Example, with_everything_added: Path) -> None:
    script = with_everything_added / "check.py"
    script.write_text(example.lines, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "npu_patch.simulator", str(script)],
        cwd=with_everything_added,
        env={**os.environ, "PYTHONPATH": str(with_everything_added)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
