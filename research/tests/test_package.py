"""What research/pyproject.toml says fits the package beside it."""

from __future__ import annotations

import tomllib
from importlib.metadata import entry_points
from pathlib import Path

from dropbydrop.cli import plugins
from dropbydrop.system.version import __version__

ROOT = Path(__file__).parents[2]


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


def test_both_distributions_have_one_version() -> None:
    core, research = project(ROOT), project(ROOT / "research")
    assert research["version"] == __version__
    assert f"dropbydrop=={__version__}" in research["dependencies"]
    assert research["requires-python"] == core["requires-python"]
    assert research["license"] == core["license"]


def test_the_commands_are_those_that_the_package_points_to() -> None:
    declared = project(ROOT / "research")["entry-points"][plugins.GROUP]
    assert tuple(sorted(declared)) == tuple(sorted(plugins.RESEARCH))
    for entry in entry_points(group=plugins.GROUP):
        if entry.name in declared:
            assert entry.value == declared[entry.name]
            assert callable(entry.load())


def test_no_folder_of_research_is_imported_by_the_package() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        assert "import dropbydrop_research" not in path.read_text()
        assert "from dropbydrop_research" not in path.read_text()


def test_benchmarks_do_not_need_research() -> None:
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert "dropbydrop_research" not in path.read_text()
