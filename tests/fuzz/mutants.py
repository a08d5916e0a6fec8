"""Checkpoints that are not what they should be: a small corpus, and mutants of it by number.

`mutant(corpus, number)` is a pure function of its arguments: whoever finds a failure names it by
one number. A mutant knows the structure of what it changes (JSON trees, safetensors headers, values
of tensors, sets of files), so that most get past the first check; half of them are signed, that is,
their manifest says what the changed files are, as whoever means harm would see to.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.planning.plan import Plan
from dropbydrop.planning.sensitivity import Sensitivity
from dropbydrop.system.digest import FileHasher
from random_model import equal_errors
from tiny import tiny_llama, tiny_model, write_checkpoint

Files = dict[str, bytes]
MANIFEST, CONFIG, REST = "manifest.json", "config.json", "model.safetensors"
SMALL: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1}

ODD_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    8,
    63,
    64,
    65,
    255,
    1 << 31,
    1 << 62,
    1 << 64,
    10**30,
    0.5,
    1e300,
    "",
    "x",
    "../x",
    "a/b",
    "\ud800",
    "\x1b[2J",
    "model.norm",
    "lm_head",
    "sdpa",
    "kernels-community/x",
    [],
    [1],
    [[]],
    {},
    {"kind": "full"},
    {"": 0},
    "float16",
    "float8_e4m3fn",
    "llama",
    "gpt2",
]
ODD_KEYS = (
    "attn_implementation",
    "_attn_implementation",
    "transformers_weights",
    "auto_map",
    "text_config",
    "quantization_config",
    "tie_word_embeddings",
    "num_hidden_layers",
    "surprise",
    "adapter",
    "dtype",
    "rope_parameters",
    "format_version",
    "xxh128",
    "level_scales",
    "torch_dtype",
    "sliding_window",
)
ODD_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "generation_config.json",
    "added_tokens.json",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "plan.json",
    "sensitivity.json",
    "notes.txt",
    "chat_template.jinja",
    "plane-9.safetensors",
    "x.py",
    ".hidden",
    "plane-1.safetensors.part",
)


@dataclass
class Mutant:
    """A folder in memory.

    Attributes:
        files: name -> bytes; what is absent is not there.
        signed: whether the manifest was adapted.
        changes: what was done, in words.
        exact: no number of the config and no float was made another: if it loads, its logits are
            finite.
        base: number of the checkpoint of the corpus that it was made of.
    """

    files: Files
    signed: bool = False
    changes: list[str] = field(default_factory=list)
    exact: bool = True
    base: int = 0

    def write(self, folder: Path) -> Path:
        """Into a folder, which holds nothing else afterwards."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.name not in self.files:
                path.unlink()
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder


class Stage:
    """Folders of mutants, one for each checkpoint of the corpus, in which only what differs from
    the last mutant is written: most mutants change one file of twelve.

    Args:
        root: where the folders are made; nobody else writes there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lie: dict[int, Files] = {}

    def put(self, made: Mutant) -> Path:
        """The folder that now holds exactly the files of a mutant."""
        folder = self.root / str(made.base)
        if made.base not in self._lie:
            folder.mkdir(parents=True)
        lie = self._lie.setdefault(made.base, {})
        for name, data in [*lie.items()]:
            if made.files.get(name) is not data:
                os.unlink(folder / name)  # never written over: somebody may have mapped it
                del lie[name]
        for name in made.files.keys() - lie.keys():
            (folder / name).write_bytes(made.files[name])
            lie[name] = made.files[name]
        return folder


def make_corpus(folder: Path) -> list[Files]:
    """Both kinds of planes; embeddings of 8 and 16 bits and in planes, tied and not; biases."""
    models = {
        "tied": tiny_llama(**SMALL),
        "untied": tiny_llama(**SMALL, tie_word_embeddings=False),
        "biases": tiny_model("qwen2", **SMALL),
        "tables": tiny_llama(**SMALL),
    }
    bits: dict[str, int | tuple[int, ...]] = {"untied": 16, "tables": (3, 4, 5)}
    folder.mkdir(parents=True, exist_ok=True)
    corpus = []
    for code in ("bytes", "trellis"):
        for name, model in models.items():
            out = folder / f"{code}-{name}"
            log = equal_errors(model)
            write_checkpoint(
                out, model, code=code, embedding_bits=bits.get(name, 8), extra_files=log
            )
            opened = Checkpoint.open(out)
            losses = {g.name: {2: 2.0, 3: 1.0, 4: 0.0} for g in opened.quantization.input_groups}
            Sensitivity(opened.fingerprint, losses, "measured", {4: 0.0}).save(out)
            Plan.uniform(opened, 3).save(out / "plan.json")
            corpus.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    return corpus


def mutant(corpus: list[Files], number: int) -> Mutant:
    """Mutant `number` of a corpus: the same arguments give the same bytes."""
    rng = random.Random(number)
    base = rng.choice(range(len(corpus)))
    made = Mutant(dict(corpus[base]), base=base)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choices([one for one, _ in CHANGES], [weight for _, weight in CHANGES])[0]
        change(made, rng)
    if rng.random() < 0.5:
        sign(made)
    return made


def sign(made: Mutant) -> None:
    """Adapt the manifest to the files that are there, if it still can be read."""
    try:
        manifest = json.loads(made.files[MANIFEST])
        listed = manifest["files"]
        for name in list(listed):
            if name in made.files:
                hasher = FileHasher()
                hasher.update(made.files[name])
                entry = hasher.entry()
                listed[name] = {"size": entry.size, "sha256": entry.sha256}
                listed[name]["xxh128"] = list(entry.xxh128 or ())
        made.files[MANIFEST] = json.dumps(manifest).encode()
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return
    made.signed = True


# ------------------------------------------------------------------------------- kinds of changes


def _bytes(made: Mutant, rng: random.Random) -> None:
    """Bits and bytes of a file."""
    name = rng.choice(sorted(made.files))
    data = bytearray(made.files[name])
    at = rng.randrange(len(data) + 1)
    kind = rng.choice(("flip", "flip", "byte", "cut", "more", "zero", "repeat", "empty"))
    if kind == "flip" and data:
        data[at % len(data)] ^= 1 << rng.randrange(8)
    elif kind == "byte" and data:
        data[at % len(data)] = rng.randrange(256)
    elif kind == "cut":
        del data[at:]
    elif kind == "more":
        data += rng.randbytes(rng.choice((1, 8, 4096)))
    elif kind == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == "repeat":
        data[at:at] = data[max(0, at - 64) : at]
    elif kind == "empty":
        data.clear()
    _put(made, name, bytes(data), kind)


def _files(made: Mutant, rng: random.Random) -> None:
    """Files that are absent, exchanged, or too many."""
    first, second = rng.sample(sorted(made.files), 2)
    kind = rng.choice(("remove", "swap", "copy", "add"))
    if kind == "remove":
        made.files.pop(first)
    elif kind == "swap":
        made.files[first], made.files[second] = made.files[second], made.files[first]
    elif kind == "copy":
        made.files[first] = made.files[second]
    else:
        first = rng.choice(ODD_FILES)
        made.files[first] = rng.choice((b"", b"{}", b'{"a": 1}', made.files[second]))
    made.exact = made.exact and first != CONFIG
    made.changes.append(f"{kind} {first} {second}")


def _json(made: Mutant, rng: random.Random) -> None:
    """A node of a JSON tree."""
    choices = [n for n in made.files if n.endswith(".json")]
    name = rng.choice(sorted(choices) + [n for n in (CONFIG, MANIFEST) if n in choices] * 4)
    try:
        tree = json.loads(made.files[name])
    except (ValueError, RecursionError):
        return
    at = _change_node(tree, rng)
    text = json.dumps(tree)
    kind = rng.randrange(12)
    if kind == 0:  # a key twice, which json alone cannot write
        text = text.replace('": ', '": 0, "again": 1, "again": ', 1)
    elif kind == 1:
        text = text[:-1] + ', "deep": ' + "[" * 3000 + "]" * 3000 + "}"
    elif kind == 2:
        text = text.replace("1", "1e999", 1)
    _put(made, name, text.encode(errors="surrogatepass"), f"{at} to another node")
    made.exact = made.exact and name != CONFIG


def _header(made: Mutant, rng: random.Random) -> None:
    """The header of a safetensors file, with the bytes behind it as they are."""
    name, header, data = _tensors(made, rng)
    if header is None or not header:
        return
    tensor = rng.choice(sorted(header))
    entry = header[tensor]
    kind = rng.choice(("rename", "drop", "node", "twice", "dtype", "shape", "offsets", "metadata"))
    if kind == "rename":
        header[rng.choice((f"{tensor}.levels", "x", "", "model.norm.weight"))] = header.pop(tensor)
    elif kind == "drop":
        header.pop(tensor)
    elif kind == "node":
        _change_node(header, rng)
    elif kind == "dtype" and isinstance(entry, dict):
        entry["dtype"] = rng.choice(("F16", "BF16", "U8", "I8", "F32", "I64", "F8_E4M3", 3, None))
    elif kind == "shape" and isinstance(entry, dict) and isinstance(entry.get("shape"), list):
        entry["shape"] = rng.choice(
            ([], [-1, -2], entry["shape"][::-1], [*entry["shape"], 1], entry["shape"][1:], None)
        )
    elif kind == "offsets" and isinstance(entry, dict):
        entry["data_offsets"] = rng.choice(
            ([0], [], [0, 1, 2], [0, 1 << 63], [-8, 8], None, [8, 0])
        )
    elif kind == "metadata":
        header["__metadata__"] = rng.choice(
            (None, [], {"format": 1}, {}, "x", {"format_version": "2"})
        )
    text = json.dumps(header)
    if kind == "twice":
        text = text[:-1] + f", {json.dumps(tensor)}: {json.dumps(entry)}" + "}"
    raw = text.encode(errors="surrogatepass")
    _put(made, name, struct.pack("<Q", len(raw)) + raw + data, f"header: {kind} {tensor}")


def _levels(made: Mutant, rng: random.Random) -> None:
    """A whole tensor more in model.safetensors, consistent in itself."""
    name, header, data = _tensors(made, rng, REST)
    if not header:
        return
    owner = rng.choice(sorted(header))
    tensor = rng.choice(
        (f"{owner}.levels", f"{owner}.codes.1", "model.norm.bias", f"{owner}_scales")
    )
    shape = rng.choice(([3, 48], [1], [], [48], [3, 1], [0], [128, 8]))
    size = 2
    for n in shape:
        size *= n
    header[tensor] = {"dtype": "F16", "shape": shape, "data_offsets": [len(data), len(data) + size]}
    raw = json.dumps(header).encode()
    _put(made, name, struct.pack("<Q", len(raw)) + raw + data + bytes(size), f"more: {tensor}")


def _values(made: Mutant, rng: random.Random) -> None:
    """Values of one tensor."""
    name, header, data = _tensors(made, rng)
    names = [n for n, e in (header or {}).items() if isinstance(e, dict) and "data_offsets" in e]
    if not header or not names:
        return
    entry = header[rng.choice(sorted(names))]
    try:
        start, stop = entry["data_offsets"]
        width = {"F16": 2, "BF16": 2, "F32": 4}.get(entry["dtype"], 1)
        if not 0 <= start < stop <= len(data):
            return
    except (ValueError, TypeError, KeyError):
        return
    nan, infinity = b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"
    half = {"F16": {nan: b"\x00\x7e", infinity: b"\x00\x7c"}}.get(entry["dtype"], {})
    pattern = rng.choice(
        (nan, infinity, b"\xff\xff\xff\xff", b"\x80" * 4, b"\x00" * 4, b"\xff\xff\x7f\x7f")
    )
    value = half.get(pattern, pattern[-width:])
    at = start + rng.randrange((stop - start) // width) * width
    changed = bytearray(data)
    changed[at : at + width] = value
    raw = json.dumps(header).encode()
    _put(made, name, struct.pack("<Q", len(raw)) + raw + bytes(changed), f"values at {at}")
    made.exact = made.exact and width == 1


CHANGES: list[tuple[Callable[[Mutant, random.Random], None], int]] = [
    (_bytes, 3),
    (_files, 2),
    (_json, 5),
    (_header, 4),
    (_levels, 2),
    (_values, 3),
]


# -------------------------------------------------------------------------------------- helpers


def _put(made: Mutant, name: str, data: bytes, how: str) -> None:
    made.files[name] = data
    made.changes.append(f"{name}: {how}")


def _tensors(
    made: Mutant, rng: random.Random, name: str | None = None
) -> tuple[str, dict[str, Any] | None, bytes]:
    """A safetensors file (twice as often model.safetensors), its header and what lies behind it."""
    choices = [n for n in sorted(made.files) if n.endswith(".safetensors")]
    name = name or rng.choice([*choices, REST, REST])
    raw = made.files.get(name, b"")
    try:
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        return name, header if isinstance(header, dict) else None, raw[8 + length :]
    except (struct.error, ValueError, RecursionError, OverflowError):
        return name, None, b""


def _change_node(tree: Any, rng: random.Random) -> str:
    """Change one node of a tree in place; where it was."""
    path, node = "", tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return path
        key = rng.choice(keys)
        inner = node[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            path, node = f"{path}/{key}", inner
            continue
        break
    kind = rng.choice(("value", "value", "value", "drop", "more", "near", "double"))
    if kind == "value":
        node[key] = rng.choice(ODD_VALUES)
    elif kind == "drop":
        del node[key]
    elif kind == "more" and isinstance(node, dict):
        node[rng.choice(ODD_KEYS)] = rng.choice(ODD_VALUES)
    elif kind == "double" and isinstance(node, list):
        node.append(inner)
    elif isinstance(inner, int):
        node[key] = inner + rng.choice((-1, 1, 8, -8))
    return f"{path}/{key} {kind}"
