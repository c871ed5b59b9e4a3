"""The house: which file may know which, read from the imports, those within functions too."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import npu_patch

PACKAGE = Path(npu_patch.__file__).parent
TESTS = Path(__file__).parent
OF_NO_ROOM = {"support", "training"}  # what tests share, and what concerns whole models
# From the ground up: a room knows what stands before it, and nothing behind.
FLOORS = (
    ("version", "log", "switches", "devices", "numerics"),
    ("kernels", "sites", "checkpoints"),
    ("serving", "simulator"),
    ("ops", "reporting"),
    ("waiting", "decoding"),
    ("probe", "measuring"),
    ("patches",),
    ("applying",),
    (
        "commands",
        "autoload",
        "sequence_parallel",
        "lifecycle",
        "tuning",
    ),  # the last two are former places, for scripts that know them
)
LOOSE_FILES = 8
LINES = 60


def _modules() -> dict[str, Path]:
    files = {file: file.relative_to(PACKAGE.parent).with_suffix("").parts for file in PACKAGE.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): file for file, parts in files.items()}


MODULES = _modules()


def _imported(module: str, file: Path) -> set[str]:
    """Modules of the package that `file` imports anywhere; of a package, its `__init__`."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else source for name in names}
    return (found & MODULES.keys()) - {module}


IMPORTS = {module: _imported(module, file) for module, file in MODULES.items()}


def _room(module: str) -> str:
    """The folder or the file at the package's root; of the package itself, "npu_patch"."""
    return [*module.split("."), "npu_patch"][1]


ROOMS: dict[str, set[str]] = {}
for _module, _others in IMPORTS.items():
    ROOMS.setdefault(_room(_module), set()).update(_room(other) for other in _others)


def circle(graph: Mapping[str, Iterable[str]]) -> list[str] | None:
    """One that leads back to where it starts, or None."""
    done: set[str] = set()

    def search(way: list[str]) -> list[str] | None:
        for following in sorted(graph.get(way[-1], ())):
            if following in way:
                return [*way[way.index(following) :], following]
            if following not in done:
                found = search([*way, following])
                if found is not None:
                    return found
        done.add(way[-1])
        return None

    return next((found for start in sorted(graph) if start not in done and (found := search([start]))), None)


def test_a_circle_is_found_where_there_is_one() -> None:
    assert circle({"a": ["b"], "b": ["c"], "c": []}) is None
    assert circle({"a": ["b"], "b": ["c", "d"], "d": ["b"]}) == ["b", "d", "b"]


def test_imports_make_no_circle_of_files() -> None:
    assert len(IMPORTS) > 150
    assert circle(IMPORTS) is None


def test_imports_make_no_circle_of_rooms() -> None:
    assert circle({room: others - {room} for room, others in ROOMS.items()}) is None


@pytest.mark.parametrize("room", [room for floor in FLOORS for room in floor])
def test_no_arrow_runs_back_up(room: str) -> None:
    below = {
        each for floor in FLOORS[: 1 + next(i for i, floor in enumerate(FLOORS) if room in floor)] for each in floor
    }
    assert ROOMS[room] - {"npu_patch"} <= below


def test_who_looks_on_knows_no_kind_of_what_waits() -> None:
    known = {name for module, names in IMPORTS.items() if _room(module) in ("commands", "reporting") for name in names}
    assert {name for name in known if _room(name) == "waiting"} == {"npu_patch.waiting.contract"}


def test_every_room_has_its_floor() -> None:
    assert set(ROOMS) - {"npu_patch", "__main__"} == {room for floor in FLOORS for room in floor}


def test_few_files_lie_loose_at_the_root() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= LOOSE_FILES


@pytest.mark.parametrize(
    ("what", "names", "where"),
    [
        ("torch_npu's operators", {"torch_npu"}, {"patches", "probe", "sites", "waiting", "reporting"}),
        ("transformers", {"transformers"}, {"ops", "kernels", "numerics", "serving", "reporting", "switches"}),
    ],
)
def test_what_a_room_knows_nothing_of(what: str, names: set[str], where: set[str]) -> None:
    knowing = set()
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if _room(module) in where and names & {name.split(".")[0] for name in imported}:
                knowing.add(module)
    assert knowing == set(), what


def rooms_and_tests(package: Path, tests: Path) -> tuple[set[str], set[str]]:
    """Rooms of `package`, at any depth, without tests in the folder of the same name, and folders of `tests` that stand
    for no room."""
    rooms = {file.parent.relative_to(package) for file in package.rglob("__init__.py")} - {Path()}
    tested = {each for file in tests.rglob("test_*.py") for each in file.relative_to(tests).parents}
    folders = {file.parent.relative_to(tests) for file in tests.rglob("*.py")} - {Path()}
    standing = {folder for folder in folders if folder.parts[0] not in OF_NO_ROOM}
    return {str(each) for each in rooms - tested}, {str(each) for each in standing - rooms}


def test_a_folder_of_tests_stands_for_each_room() -> None:
    assert rooms_and_tests(PACKAGE, TESTS) == (set(), set())


def test_a_room_without_tests_and_tests_without_a_room_are_named(tmp_path: Path) -> None:
    package = ("ops/__init__.py", "ops/experts/__init__.py", "probe/__init__.py", "sites/__init__.py")
    tests = ("ops/test_x.py", "probe/cases.py", "sites/journal/test_x.py", "support/y.py", "waiting/test_x.py")
    for file in (*(Path("package", each) for each in package), *(Path("tests", each) for each in tests)):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    found = rooms_and_tests(tmp_path / "package", tmp_path / "tests")
    assert found == ({"ops/experts", "probe"}, {"sites/journal", "waiting"})


def _lengths(module: str, file: Path) -> dict[str, int]:
    """Of all functions, by their full name; of two of one name, the longer."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{module}.{node.name}"
            found[name] = max(found.get(name, 0), node.end_lineno - node.lineno + 1)
    return found


def test_functions_are_short() -> None:
    lengths = {name: lines for module, file in MODULES.items() for name, lines in _lengths(module, file).items()}
    assert {name for name, lines in lengths.items() if lines > LINES} == set()
