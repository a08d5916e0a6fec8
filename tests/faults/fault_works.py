"""The work whose file operations fail: each command of this package that writes, on tiny data.

`quantize` and `tune` are their write phases: what is written, in the order and through the code of
the real commands, without the search and the training, which touch no file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dropbydrop.checkpoint import Checkpoint, CheckpointWriter
from dropbydrop.checkpoint.config import CONFIG_FILE, RESERVED_PREFIXES
from dropbydrop.checkpoint.export import export
from dropbydrop.checkpoint.files import check_replaceable
from dropbydrop.checkpoint.journal import Journal
from dropbydrop.checkpoint.pull import pull
from dropbydrop.checkpoint.slice import slice_checkpoint
from dropbydrop.coding.codebooks import UNIVERSAL
from dropbydrop.planning.plan import Plan
from dropbydrop.system.atomic_folder import AtomicFolder
from dropbydrop.tuning.writer import write_tuned
from dropbydrop_research.compare.folder import Folder
from tiny import tiny_llama, write_checkpoint


@dataclass(frozen=True)
class Work:
    """A command.

    Attributes:
        run: run(root): writes `root / "out"`.
        replaces: whether it may replace an old `out`.
        keeps: whether what a killed run has done is kept for the next.
    """

    name: str
    run: Callable[[Path], object]
    replaces: bool = False
    keeps: bool = False


def make_source(folder: Path, seed: int = 0, code: str = "bytes") -> Path:
    """A checkpoint of one block."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = tiny_llama(seed, **shape, vocab_size=64)
    text = {"README.md": b"# a card\n", "generation_config.json": b"{}\n"}
    return write_checkpoint(folder, model, tokenizer=False, extra_files=text, code=code, seed=seed)


def works(source: Path) -> list[Work]:
    """All commands that write; `source` is what they read."""
    read = Checkpoint.open(source)
    plan = Plan(read.fingerprint, {g.name: 3 for g in read.quantization.input_groups})
    return [
        Work("quantize", lambda root: _rewrite(read, root / "out", None), True),
        Work("quantize --resume", lambda root: _resume(read, root / "out"), True, True),
        Work("tune", lambda root: _tune(read, root / "out"), True),
        Work("slice", lambda root: slice_checkpoint(source, root / "out", 3, overwrite=True), True),
        Work("export", lambda root: export(source, root / "out", progress=False)),
        Work("pull", lambda root: pull(source, root / "out", progress=False), keeps=True),
        Work("plan --save", lambda root: plan.save(root / "out"), True),
        Work("compare", lambda root: _compare(root / "out"), keeps=True),
    ]


def _rewrite(source: Checkpoint, out: Path, journal: Journal | None) -> None:
    """The checkpoint `source` once more, step by step as `quantize` adds its blocks."""
    quantization = source.quantization
    steps = [] if journal is None else journal.steps
    work = None if journal is None else journal.path
    ours = {f"{module}.{leaf}" for module in source.shapes for leaf in ("scales", "bias")}
    ours |= set(quantization.guards)
    records = [step["writer"] for step in steps]
    with CheckpointWriter(out, overwrite=True, work=work, records=records) as writer:
        for number in range(len(steps), len(quantization.input_groups) + 1):
            if number == 0:
                writer.add_codebook_set(UNIVERSAL, source.read_set(UNIVERSAL))
            else:
                _add_group(source, writer, number - 1)
            if journal is not None:
                record: dict[str, Any] = {"step": number, "writer": writer.commit()}
                journal.keep(f"{number}.safetensors", {"a": torch.tensor([number])})
                journal.commit(record, torch.full((2, 3), number))
        for name in source.rest:
            if name not in ours and not name.startswith(RESERVED_PREFIXES):
                writer.add_tensor(name, source.read(name))
        done = {*source.manifest.tensor_files(), CONFIG_FILE}
        files = {name: source.path / name for name in source.manifest.files if name not in done}
        total = source.manifest.total_parameters
        announce = None
        if journal is not None:
            last = len(quantization.input_groups)
            assert int(journal.hidden()[0, 0]) == int(journal.kept(f"{last}.safetensors")["a"])

            def announce(manifest: str) -> None:
                journal.publishing({"manifest": manifest})

        writer.finish(source.config, quantization, files, total, announce)


def _add_group(source: Checkpoint, writer: CheckpointWriter, number: int) -> None:
    group = source.quantization.input_groups[number]
    writer.add_group(group, source.read_rotation(number))
    for module in group.modules:
        planes = range(1, len(source.quantization.planes) + 1)
        codes = [source.read_codes(module, m) for m in planes]
        bias = source.read(f"{module}.bias") if f"{module}.bias" in source.rest else None
        scales = source.read(f"{module}.scales").float()
        writer.add_linear(module, codes, scales, bias, d_in=group.d_in)


def _resume(source: Checkpoint, out: Path) -> None:
    with Journal(out, {"source": source.fingerprint}) as journal:
        if journal.published() is None:
            _rewrite(source, out, journal)


def _tune(source: Checkpoint, out: Path) -> None:
    with AtomicFolder(out, check_replaceable) as folder:
        made = {**source.quantization.provenance, "tuning": ["nothing"]}
        quantization = replace(source.quantization, provenance=made)
        write_tuned(folder, source, quantization, {}, [{"step": 1}], "tuned\n")


def _compare(out: Path) -> None:
    """What `compare` keeps of a block: a step that is there is not made again."""
    with Folder(out, {"model": "tiny"}) as folder:
        if not folder.has_grams(0):
            folder.write_grams(0, [(("a",), torch.eye(4))], {"seen": 1})
        folder.write_json(out / "result.json", {"a": 1})


def contents(path: Path) -> object:
    """A file or a folder, to be compared."""
    if path.is_dir():
        return {p.relative_to(path).as_posix(): contents(p) for p in path.rglob("*") if p.is_file()}
    if not path.exists():
        return None
    if path.parent.name == "grams" and path.suffix == ".sha256":
        return "of the file beside it, whose bytes vary"
    raw = path.read_bytes()
    if path.parent.name == "grams" and path.suffix == ".safetensors":
        # the library that writes these shuffles the keys of their metadata
        size = int.from_bytes(raw[:8], "little")
        return json.loads(raw[8 : 8 + size]), raw[8 + size :]
    return raw


def hidden_names(root: Path) -> list[str]:
    """Leftovers below a folder."""
    return sorted(p.name for p in root.rglob(".*"))


def put(old: Path, out: Path) -> None:
    """A copy of an old file or folder, as what is replaced."""
    if old.is_dir():
        shutil.copytree(old, out)
    else:
        shutil.copy(old, out)
