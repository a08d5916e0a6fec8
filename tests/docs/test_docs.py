"""The documentation: links, navigation, generated pages, and what must agree with the source."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import dropbydrop

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [*PAGES, *sorted(ROOT.glob("*.md")), ROOT / "research" / "README.md"]
TEXTS.append(ROOT / "integrations" / "vllm" / "README.md")
HISTORY = {DOCS / "log.md", ROOT / "CHANGELOG.md"}  # as things were called in their day
FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def script(name: str) -> ModuleType:
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    found = set(re.findall(r'<a id="([\w-]+)"></a>', page.read_text()))
    for title in re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCED.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


PATH = re.compile(
    r"\b(?:integrations/vllm/)?"
    r"(?:benchmarks|native|research|scripts|tests)/[\w/]+\.(?:py|sh|cpp|h|md|txt)\b"
)


def test_files_named_in_the_pages_exist() -> None:
    for page in set(TEXTS) - HISTORY:
        lost = [path for path in PATH.findall(page.read_text()) if not (ROOT / path).is_file()]
        assert not lost, f"{page.name}: {lost}"


def nav(entries: list[object]) -> Iterator[str]:
    """All pages of the navigation."""
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            if isinstance(value, str):
                yield value
            else:
                yield from nav(value)


def test_every_page_is_in_the_navigation() -> None:
    listed = list(nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert len(listed) == len(set(listed))
    assert set(listed) == {page.name for page in PAGES}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_page_of_the_command_line_is_the_generated_one() -> None:
    made = script("generate_cli_docs").page()
    assert (DOCS / "cli.md").read_text() == made, "run: python scripts/generate_cli_docs.py"


def options_of(command: Any) -> dict[str, set[str]]:
    """Command, also "study bound" -> its options."""
    found = {}
    for name, child in getattr(command, "commands", {}).items():
        written = {option for p in child.params for option in [*p.opts, *p.secondary_opts]}
        found[name] = written | {"--help"}
        found |= {f"{name} {deeper}": options for deeper, options in options_of(child).items()}
    return found


def test_commands_in_the_pages_have_options_that_exist() -> None:
    known = options_of(script("generate_cli_docs").main_command())
    if "study bound" not in known:  # the research distribution is not installed
        del known["study"], known["compare"]
    for page in set(TEXTS) - HISTORY:
        text = page.read_text().replace("\\\n", " ")
        for name, deeper, rest in re.findall(r"dropbydrop (\w+)( \w+)?([^`\n|]*)", text):
            command = next((c for c in (name + deeper, name) if c in known), None)
            if command is None:
                continue
            line = rest.partition(" #")[0].partition("dropbydrop")[0]
            used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line))
            assert used <= known[command], f"{page.name}: dropbydrop {command}{rest}"


def test_python_in_the_pages_has_names_that_exist() -> None:
    for page in set(TEXTS) - HISTORY:
        for name in re.findall(r"\bdropbydrop\.(\w+)\(", page.read_text()):
            assert name in dropbydrop.__all__, f"{page.name}: dropbydrop.{name}"


def test_the_figures_of_the_picture_are_in_the_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = json.loads((DOCS / "data" / "kl-over-bits.json").read_text())
    rows = [row for row in (DOCS / "results.md").read_text().splitlines() if row.startswith("| ")]
    for method in found["methods"]:
        wanted = [re.sub(r"^0", "", f"{kl}").rstrip("0") for kl in method["kl"]]
        assert any(all(kl in row for kl in wanted) for row in rows), method["name"]
    picture = tmp_path / "picture.svg"
    script("draw_kl_over_bits").draw(found, picture)
    assert picture.stat().st_size > 10_000


def test_the_site_is_searched_for_what_it_loads(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<a href="https://a.example">a</a><img src="b.png"><p style="color: red">')
    external = script("check_site").external
    assert external(page) == []
    page.write_text('<link rel="stylesheet" href="https://a.example/x"><img src="//b.example/y">')
    assert external(page) == ["https://a.example/x", "//b.example/y"]
    style = tmp_path / "style.css"
    style.write_text("@import 'https://a.example/x'; b { background: url(//c.example/z) }")
    assert external(style) == ["https://a.example/x", "//c.example/z"]


# the page of the Python names


def documented() -> dict[str, str]:
    """Public names with a heading of their own in docs/api.md -> the signature below it."""
    text = (DOCS / "api.md").read_text()
    found = re.findall(r"^### ([\w.]+)\n+```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return {name.removeprefix("dropbydrop."): code for name, code in found}


def test_every_public_name_is_documented() -> None:
    assert set(documented()) == set(dropbydrop.__all__) - {"__version__"}


@pytest.mark.parametrize("name", sorted(documented()))
def test_documented_signatures_are_those_of_the_source(name: str) -> None:
    thing = getattr(dropbydrop, name)
    (written,) = ast.parse(f"def {documented()[name].strip()}: ...").body
    assert isinstance(written, ast.FunctionDef)
    arguments = written.args
    names = [a.arg for a in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
    names += [arguments.kwarg.arg] if arguments.kwarg else []
    assert names == list(inspect.signature(thing).parameters)


# the page of errors


def messages() -> dict[str, str]:
    """Where -> text of every error that a user can cause; … stands for what is filled in."""
    folders = [ROOT / "src" / "dropbydrop", ROOT / "integrations" / "vllm" / "src"]
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    trees = {file: ast.parse(file.read_text()) for file in files}
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    kinds = {"DropError", "VLLMValidationError"}  # the latter is vLLM's, for what a request asks
    classes = [node for _, node in nodes if isinstance(node, ast.ClassDef)]
    for _ in range(3):  # generations of subclasses
        kinds |= {c.name for c in classes if kinds & {ast.unparse(base) for base in c.bases}}
    found = {}
    for file, node in nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) in kinds and node.args:
            text = literal(node.args[0])
            if text.strip("… "):
                found[f"{file.relative_to(ROOT)}:{node.lineno}"] = text
    return found


def literal(node: ast.expr) -> str:
    """The fixed parts of a text, with … between them."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return literal(node.left) + literal(node.right)
    return "…"


def rows_of_errors() -> dict[str, re.Pattern[str]]:
    """First cells of docs/troubleshooting.md, and as patterns; … stands for anything."""
    page = (DOCS / "troubleshooting.md").read_text()
    cells = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    texts = [cell for cell in cells if not re.fullmatch(r"\w+Error", cell)]  # not the classes
    return {
        text: re.compile(".*".join(map(re.escape, text.split("…"))), re.DOTALL) for text in texts
    }


def test_every_error_has_a_row() -> None:
    rows, found = rows_of_errors(), messages()
    assert len(found) > 100
    lost = {at: text for at, text in found.items() if not any(r.match(text) for r in rows.values())}
    assert not lost, "docs/troubleshooting.md lacks:\n" + "\n".join(map(str, lost.items()))
    stale = [row for row, pattern in rows.items() if not any(map(pattern.match, found.values()))]
    assert not stale, "docs/troubleshooting.md has rows for no error:\n" + "\n".join(stale)
