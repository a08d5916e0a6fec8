"""What is released: the version, the wheel, the source distribution, and an installation of them.

The wheel is built in this tree, whose build folder the installation has left, so that little is
compiled again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import dropbydrop
from dropbydrop.system.version import __version__

ROOT = Path(__file__).parents[2]
DATE = "1764201600"  # of every file in what is built


def test_the_version_is_one() -> None:
    research = tomllib.loads((ROOT / "research" / "pyproject.toml").read_text())["project"]
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert citation
    assert dropbydrop.__version__ == __version__
    assert citation[1] == research["version"] == __version__
    assert f"dropbydrop=={__version__}" in research["dependencies"]
    headings = re.findall(
        r"^## ([\d.]+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert headings[0][0] == __version__


def build(what: str, into: Path) -> Path:
    """The wheel or the sdist, through the backend's own hooks."""
    into.mkdir()
    call = f"import scikit_build_core.build as b; b.build_{what}({str(into)!r})"
    environment = os.environ | {"SOURCE_DATE_EPOCH": DATE}
    subprocess.run([sys.executable, "-c", call], cwd=ROOT, env=environment, check=True)
    (found,) = into.iterdir()
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Each of them twice."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    pytest.importorskip("scikit_build_core", reason="the build backend is not installed: make dev")
    place = tmp_path_factory.mktemp("built")
    return {w: [build(w, place / f"{w}{i}") for i in (1, 2)] for w in ("wheel", "sdist")}


@pytest.mark.slow
def test_the_same_tree_gives_the_same_bytes(built: dict[str, list[Path]]) -> None:
    for one, other in built.values():
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_what_is_in_them(built: dict[str, list[Path]]) -> None:
    wheel, sdist = built["wheel"][0], built["sdist"][0]
    assert re.fullmatch(rf"dropbydrop-{__version__}-py3-none-\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"dropbydrop/{p.relative_to(ROOT / 'src' / 'dropbydrop').as_posix()}"
               for p in (ROOT / "src" / "dropbydrop").rglob("*.py")}  # fmt: skip
    assert sources <= names
    assert "dropbydrop/py.typed" in names
    assert any(name.endswith(".safetensors") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [n for n in names if not n.startswith(("dropbydrop/", "dropbydrop-"))]
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "native/CMakeLists.txt", "src/dropbydrop/__init__.py"} <= inside
    assert not [name for name in inside if name.startswith(("build", ".venv"))]


@pytest.mark.slow
def test_the_wheel_works_without_a_compiler(built: dict[str, list[Path]], tmp_path: Path) -> None:
    """An environment with the wheel and its dependencies, and a PATH with nothing on it."""
    place = tmp_path / "clean"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    folder = next((place / "lib").glob("python*")) / "site-packages"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install", "-q",
         "--disable-pip-version-check", "--no-deps", "--no-index", built["wheel"][0]],
        check=True,
    )  # fmt: skip
    # its dependencies are those of this environment; editable installs are not seen that way
    paths = dict.fromkeys(
        str(Path(m.__file__).parents[1]) for m in map(__import__, ("torch", "rich"))
    )
    (folder / "dependencies.pth").write_text("\n".join(paths) + "\n")
    command = [place / "bin" / "dropbydrop", "info", "--kernels"]
    told = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, check=True)
    assert "torch" in told.stdout
    where = "import dropbydrop, dropbydrop.kernels as k; print(dropbydrop.__file__, k.available())"
    told = subprocess.run(
        [place / "bin" / "python", "-c", where],
        env={"PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.startswith(str(folder))
    if any("_native" in name for name in zipfile.ZipFile(built["wheel"][0]).namelist()):
        assert "portable" in told.stdout
