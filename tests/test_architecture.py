"""The house rules of docs/architecture.md, read from that page and held against the source.

Imports are found in the syntax trees, wherever they stand: inside functions and under TYPE_CHECKING
they say as much about what depends on what.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "dropbydrop"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
MOST_ENTRIES, MOST_LINES, LONGEST_BODY = 15, 400, 60
KERNELS = {"coding/search/triton.py:visit", "kernels/cuda/triton_kernels.py:visit"}  # one program


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module and package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports(name: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every module of the package that a module imports."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level]
            origin = ".".join([*base, node.module] if node.module else base)
            origin = origin if node.level else str(node.module)
            inner = [f"{origin}.{alias.name}" for alias in node.names]
            found = [module if module in MODULES else origin for module in inner]
        else:
            continue
        for module in found:
            if module.split(".")[0] == PACKAGE.name:
                yield node.lineno, module


def room_of(module: str) -> str:
    """The entry of the package's top level that a module belongs to; "" for the package itself."""
    return (module.split(".") + [""])[1]


def floors() -> dict[str, int]:
    """Room -> floor, as the page lists them."""
    match = re.search(r"```rooms\n(.*?)```", PAGE, re.DOTALL)
    assert match is not None
    lines = match[1].strip().splitlines()
    return {room.strip(): floor for floor, line in enumerate(lines) for room in line.split(",")}


def budgets() -> dict[str, int]:
    """Room -> lines of Python that it may have, as the page lists them."""
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \|$", PAGE, re.MULTILINE)
    return {room: int(lines.replace(",", "")) for room, lines in rows}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def entries() -> set[str]:
    """Folders and modules of the package's top level."""
    found = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    return found | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}


def test_every_room_has_a_floor() -> None:
    assert entries() == set(floors())
    python = {"__init__.py", "__main__.py"}  # which every package needs, counted all the same
    assert len(entries() | python) <= MOST_ENTRIES


@pytest.mark.parametrize("room", sorted(floors()))
def test_a_room_imports_only_from_lower_floors(room: str) -> None:
    level = floors()
    wrong = [
        f"{MODULES[name].relative_to(PACKAGE)}:{line} imports {module}"
        for name in MODULES
        if room_of(name) == room
        for line, module in imports(name)
        if room_of(module) != room and level.get(room_of(module), len(level)) >= level[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_imports() -> None:
    graph = {name: {module for _, module in imports(name)} - {name} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("name", [n for n, p in MODULES.items() if p.name == "__init__.py"])
def test_no_name_hides_a_module(name: str) -> None:
    """A name bound in a package would stand before its submodule of that name."""
    bound: set[str] = set()
    for node in ast.walk(TREES[name]):
        itself = isinstance(node, ast.ImportFrom) and node.level == 1 and node.module is None
        if isinstance(node, ast.Import | ast.ImportFrom) and not itself:
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    hidden = sorted(word for word in bound if f"{name}.{word}" in MODULES)
    assert not hidden


@pytest.mark.parametrize("room", sorted(floors()))
def test_budget_of_lines(room: str) -> None:
    spent = sum(lines(path) for name, path in MODULES.items() if room_of(name) == room)
    allowed = budgets().get(room, MOST_LINES)
    assert spent <= allowed


def test_budget_of_all_lines() -> None:
    spent, allowed = sum(map(lines, MODULES.values())), budgets()["all"]
    assert spent <= allowed


def test_no_long_files() -> None:
    sizes = {str(p.relative_to(PACKAGE)): lines(p) for p in MODULES.values()}
    long = {name: count for name, count in sizes.items() if count > MOST_LINES}
    assert not long


def test_no_long_functions() -> None:
    """Lines of a body, its docstring and the signature left out."""
    long = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                documented = ast.get_docstring(node) is not None and len(node.body) > 1
                body = node.body[1:] if documented else node.body
                count = (body[-1].end_lineno or 0) - body[0].lineno + 1
                place = f"{MODULES[name].relative_to(PACKAGE)}:{node.name}"
                if count > LONGEST_BODY and place not in KERNELS:
                    long[place] = count
    assert not long


def test_the_page_names_every_module_in_the_row_of_its_room() -> None:
    rows = {row[0]: row[2] for row in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", PAGE, re.M)}
    for name, path in MODULES.items():
        room = room_of(name)
        if room and path.name not in ("__init__.py", "__main__.py"):
            assert f"`{path.stem}`" in rows[room], f"{name} is missing in docs/architecture.md"
