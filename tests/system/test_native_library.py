import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import dropbydrop
from dropbydrop.coding import search
from dropbydrop.system.digest import code_digest
from dropbydrop.system.native_library import VERSION, built_libraries, library, library_path


@pytest.fixture
def fresh():
    """The library is looked for anew in the test, and again after it."""
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch, fresh) -> Path:
    """Where the library of a package whose folder is `tmp_path` would be; it is not there."""
    monkeypatch.setattr(dropbydrop, "__path__", [str(tmp_path)])
    path = library_path()
    path.parent.mkdir()
    return path


def refused(caplog) -> str:
    """What the log says when nothing native is there; that everything runs on torch then."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "dropbydrop.native"):
        assert library() is None
    assert search.backends()[0] == "torch"
    return caplog.text


@pytest.mark.skipif(
    not library_path().is_file() and not ("CI" in os.environ and shutil.which("c++")),
    reason="built without a C++ compiler",
)
def test_loads_where_a_compiler_was_there():
    """Looked for in the wrong folder, or refused, it would be missed by nothing but the clock."""
    lib = library()
    assert lib is not None
    assert lib.drop_version() == VERSION
    assert search.backends()[0] != "torch"
    assert "portable" in search.backends()
    assert lib.drop_kernel_count() > 0


def test_search_backends_are_best_first():
    names = [name for name in search.backends() if name in ("avx512", "avx2", "portable")]
    assert names == [name for name in ("avx512", "avx2", "portable") if name in names]


def test_absent_library(elsewhere, caplog):
    assert str(elsewhere) in refused(caplog)
    assert built_libraries() == []


def test_damaged_library(elsewhere, caplog):
    elsewhere.write_bytes(b"\x7fELF" + bytes(100))
    text = refused(caplog)
    assert "cannot be loaded" in text
    assert "WARNING" in text


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("int drop_version(void) { return 1; }", "has interface 1, this version needs"),
        # The right number and nothing else.
        (f"int drop_version(void) {{ return {VERSION}; }}", "cannot be loaded"),
        ("int drop_kernels_version(void) { return 1; }", "cannot be loaded"),
    ],
)
def test_library_of_another_version(elsewhere, caplog, source, message):
    code = elsewhere.with_suffix(".c")
    code.write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(elsewhere), str(code)], check=True)
    text = refused(caplog)
    assert message in text
    assert "running on torch" in text


def test_library_of_an_editable_install(tmp_path, monkeypatch):
    """Sources in one folder, what was built in another: both are on the package's path."""
    built = tmp_path / "site" / "_native" / library_path().name
    monkeypatch.setattr(dropbydrop, "__path__", [str(tmp_path / "src"), str(tmp_path / "site")])
    assert library_path() == tmp_path / "src" / "_native" / built.name
    built.parent.mkdir(parents=True)
    built.touch()
    assert library_path() == built
    assert built_libraries() == [built]  # what digests of the code cover
    before = code_digest()
    built.write_bytes(b"another")
    assert code_digest() != before
