"""What compared methods are keyed by: every file that their results depend on, and no ghost."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import dropbydrop
import dropbydrop_research
from dropbydrop.system import native_library
from dropbydrop.system.errors import DropError
from dropbydrop_research.baselines import METHODS
from dropbydrop_research.compare import job
from dropbydrop_research.sources import files_of

ROOTS = {
    "dropbydrop": Path(dropbydrop.__file__).parent,
    "dropbydrop_research": Path(dropbydrop_research.__file__).parent,
}
# Rooms whose code decides no value: errors, and where files, memory and libraries are.
NEUTRAL = ("system", "__init__.py")
SHARED = {  # methods of another one's module
    "trellis": "drop",
    "trellis-dedicated": "dedicated",
    "llama-k": "llama",
    "llama-iq": "llama",
    "llama-k-folded": "llama",
    "llama-iq-folded": "llama",
}


def imported(path: Path, package: str) -> Iterator[str]:
    """Modules that a file imports when it runs, also inside of functions."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def file_of(module: str) -> Path | None:
    top, *rest = module.split(".")
    if top not in ROOTS:
        return None
    path = ROOTS[top].joinpath(*rest)
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def closure(module: str) -> set[Path]:
    """Files of both packages that a module imports, directly or not."""
    found: set[Path] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        path = file_of(name)
        if path is None or path in found:
            continue
        found.add(path)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        if path.name != "__init__.py" or "baselines" not in path.parts:  # the registry has all
            todo += imported(path, package)
    return found


def inside(path: Path) -> str:
    """A file by its path in its package."""
    root = next(root for root in ROOTS.values() if path.is_relative_to(root))
    return path.relative_to(root).as_posix()


@pytest.mark.parametrize("name", METHODS)
def test_all_code_of_a_method_is_in_its_key(name: str) -> None:
    file = SHARED.get(name, name).replace("-", "_")
    module = f"dropbydrop_research.baselines.{file}"
    importlib.import_module(module)
    needed = {p for p in closure(module) if not inside(p).startswith(NEUTRAL)}
    needed = {p for p in needed if p.name != "__init__.py"}
    missing = needed - {*METHODS[name].sources(), *files_of(*job._STATISTICS)}
    assert not missing, sorted(map(inside, missing))


def test_our_methods_depend_on_the_native_library_and_on_codebooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libdrop.so"
    library.write_bytes(b"")
    monkeypatch.setattr(native_library, "library_path", lambda *_: library)
    for name in ("drop", "dedicated", "paper-weights"):
        sources = METHODS[name].sources()
        assert library in sources
        assert any(path.suffix == ".safetensors" for path in sources)
    assert library not in METHODS["gptq"].sources()


def test_a_renamed_file_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DropError, match=r"baselines/old_name.py is in neither"):
        files_of("baselines/suite.py", "baselines/old_name.py")
    for method in METHODS.values():
        method.sources()
    assert files_of(*job._STATISTICS)
