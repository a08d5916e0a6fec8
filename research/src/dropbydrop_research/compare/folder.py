"""The folder of a comparison: everything that is finished, so that nothing is done twice.

    compare.json                    what all methods have in common; another one is refused
    grams/block-000.safetensors     Gram matrices of the block's input groups, "0", "1", ...; the
                                    groups' modules and the text in the metadata
    <method>/method.json            digest of the code that made what lies beside it
    <method>/block-000.safetensors  decoded weights, float16, "<level>/<module>"; a `Record` in the
                                    metadata
    <method>/result.json            the method's evaluation, with what it was evaluated on
    *.sha256                        of each of these three: SHA-256 of its path and content
    result.json, *.png, *.svg       the comparison, written by the command

Every file appears by a rename, whole or not at all. Kept work is finished when its SHA-256 is
there, which is written last, and compared before it is used: what was damaged or exchanged since is
refused, not tabulated. A method whose code has changed since is made again, the others stay; more
blocks may be asked for later, and other texts evaluated. Weights are kept in float16, which is what
the runtimes of these methods decode to.

A lock on the folder keeps two runs apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dropbydrop.checkpoint.journal import differences
from dropbydrop.system.atomic_folder import replacing
from dropbydrop.system.digest import digest, file_digest
from dropbydrop.system.errors import DropError, FormatError
from dropbydrop.system.file_errors import file_errors
from dropbydrop.system.locks import lock
from dropbydrop_research.baselines import Method

COMMON = "compare.json"
RESULT = "result.json"


@dataclass(frozen=True)
class Record:
    """What one method did on one block.

    Attributes:
        seconds, peak: of encoding all levels; peak resident bytes of the process meanwhile.
        bytes: level -> bytes read at that level; `files`: bytes of each checkpoint.
        values: weights coded; `widths`: d_in of the input groups.
        errors: level -> sum over matrices of the relative weighted error; `matrices`: how many.
        kinds: level -> what the method made of how many weights; empty where it makes one thing.
    """

    seconds: float
    peak: int
    bytes: dict[int, int]
    files: list[int]
    values: int
    widths: list[int]
    errors: dict[int, float]
    matrices: int
    kinds: dict[int, dict[str, int]] = field(default_factory=dict)

    @staticmethod
    def from_json(text: str) -> Record:
        """Inverse of `to_json`; JSON turns the levels into strings."""
        raw = json.loads(text)
        for name in ("bytes", "errors", "kinds"):
            raw[name] = {int(p): value for p, value in raw[name].items()}
        return Record(**raw)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


BlockGrams = list[tuple[tuple[str, ...], Tensor]]
"""For each input group of a block, in order: its modules and H [d_in, d_in]."""


class Folder:
    """An opened and locked folder; use as a context manager.

    Raises:
        DropError: the folder holds something else, or a comparison of something else, or another
            process works in it.
    """

    def __init__(self, path: Path, common: Mapping[str, Any]) -> None:
        self.path = path
        self.common = json.loads(json.dumps(common))
        self._intact: set[Path] = set()  # compared, or written, in this run

    def __enter__(self) -> Folder:
        busy = f"another process is comparing in {self.path}; wait for it, or name another --out."
        with file_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path, DropError(busy))
        try:
            self._check()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._lock)

    def _check(self) -> None:
        before = read_json(self.path / COMMON)
        if before is None:
            if found := [p.name for p in self.path.iterdir() if not p.name.startswith(".")]:
                raise DropError(
                    f"{self.path} holds other files than a comparison ({found[0]}); name a new "
                    "folder with --out."
                )
            self.write_json(self.path / COMMON, self.common)
            return
        if changes := differences(before, self.common):
            raise DropError(
                f"{self.path} holds another comparison; what differs: {changes}. Give the same "
                "options again, or name a new folder with --out."
            )

    # ---- writing ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def _replacing(self, path: Path) -> Iterator[Path]:
        """A name to write to; it becomes `path` when all went well."""
        advice = "Free some space and give the same command again."
        try:
            with file_errors(path, advice), replacing(path) as partial:
                yield partial
        except SafetensorError as error:  # how its writer reports a full disk
            raise DropError(f"{path} could not be written: {error}.") from error

    def write_json(self, path: Path, value: Any) -> None:
        with self._replacing(path) as partial:
            partial.write_text(json.dumps(value) + "\n")

    @contextlib.contextmanager
    def _sealing(self, path: Path) -> Iterator[Path]:
        """`_replacing`, and the SHA-256 beside it."""
        _seal(path).unlink(missing_ok=True)
        with self._replacing(path) as partial:
            yield partial
        with self._replacing(_seal(path)) as partial:
            partial.write_text(self._digest(path) + "\n")
        self._intact.add(path)

    def _digest(self, path: Path) -> str:
        """Of content and place: the file of another block or method is another one."""
        place = path.relative_to(self.path).as_posix()
        return hashlib.sha256(f"{place} {file_digest(path)}".encode()).hexdigest()

    def _finished(self, path: Path) -> bool:
        return path.is_file() and _seal(path).is_file()

    def _compare(self, path: Path) -> None:
        """Raises FormatError when a finished file is not what was written."""
        if path in self._intact:
            return
        with file_errors(path):
            same = self._finished(path) and _seal(path).read_bytes().strip() == (
                self._digest(path).encode()
            )
        if not same:
            raise FormatError(
                f"{path} is not what was written (its SHA-256 is another): damaged. Remove it and "
                "give the same command again."
            )
        self._intact.add(path)

    def _write_tensors(
        self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        with self._sealing(path) as partial:
            save_file(
                {k: v.contiguous().cpu() for k, v in tensors.items()}, partial, dict(metadata)
            )

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        """A finished safetensors file, compared, whose tensors the caller may keep."""
        self._compare(path)
        with _opened(path) as handle:
            yield handle

    # ---- Gram matrices ---------------------------------------------------------------------

    def _grams(self, i: int) -> Path:
        return self.path / "grams" / f"block-{i:03d}.safetensors"

    def has_grams(self, i: int) -> bool:
        return self._finished(self._grams(i))

    def write_grams(self, i: int, grams: BlockGrams, note: Mapping[str, Any]) -> None:
        """Keep the Gram matrices of a block with a JSON-able note."""
        tensors = {str(k): h for k, (_, h) in enumerate(grams)}
        groups = [modules for modules, _ in grams]
        metadata = {"input_groups": json.dumps(groups), "note": json.dumps(note)}
        self._write_tensors(self._grams(i), tensors, metadata)

    def grams(self, i: int) -> BlockGrams:
        with self._opened(self._grams(i)) as handle:
            groups = json.loads(handle.metadata()["input_groups"])
            return [(tuple(m), handle.get_tensor(str(k)).clone()) for k, m in enumerate(groups)]

    def gram_note(self, i: int) -> dict[str, Any]:
        with self._opened(self._grams(i)) as handle:
            return json.loads(handle.metadata()["note"])

    # ---- methods ---------------------------------------------------------------------------

    def start(self, method: Method, settings: Mapping[str, Any]) -> bool:
        """Make a method's folder ready; returns whether work of older code had to go.

        `settings`: what the method's result depends on beside its code and what all share.
        """
        folder = self.path / method.name
        made = {"code": digest(*method.sources()), **settings}
        before = read_json(folder / "method.json")
        if before == made:
            return False
        shutil.rmtree(folder, ignore_errors=True)
        self.write_json(folder / "method.json", made)
        return before is not None

    def _block(self, method: Method, i: int) -> Path:
        return self.path / method.name / f"block-{i:03d}.safetensors"

    def has_block(self, method: Method, i: int) -> bool:
        return self._finished(self._block(method, i))

    def write_block(
        self, method: Method, i: int, weights: Mapping[int, Mapping[str, Tensor]], record: Record
    ) -> None:
        """weights: level -> module -> decoded [d_out, d_in]."""
        tensors = {
            f"{p}/{module}": w.half() for p, part in weights.items() for module, w in part.items()
        }
        self._write_tensors(self._block(method, i), tensors, {"record": record.to_json()})

    def record(self, method: Method, i: int) -> Record:
        with self._opened(self._block(method, i)) as handle:
            return Record.from_json(handle.metadata()["record"])

    def weights(self, method: Method, level: int, blocks: int) -> dict[str, Tensor]:
        """module -> decoded weight at a level, float16, of the first `blocks` blocks."""
        found: dict[str, Tensor] = {}
        start = f"{level}/"
        for i in range(blocks):
            with self._opened(self._block(method, i)) as handle:
                for key in handle.keys():  # noqa: SIM118 (no mapping)
                    if key.startswith(start):
                        found[key.removeprefix(start)] = handle.get_tensor(key)
        return found

    def evaluation(self, method: Method, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The method's evaluation if it was made on the same blocks and text."""
        path = self.path / method.name / RESULT
        if not self._finished(path):
            return None
        self._compare(path)
        stored = read_json(path)
        wanted = json.loads(json.dumps(key))
        same = stored is not None and stored.get("key") == wanted
        return stored["result"] if stored is not None and same else None

    def write_evaluation(
        self, method: Method, key: Mapping[str, Any], result: Mapping[str, Any]
    ) -> None:
        with self._sealing(self.path / method.name / RESULT) as partial:
            partial.write_text(json.dumps({"key": key, "result": result}) + "\n")


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no file.

    Raises:
        FormatError: not JSON, or no object.
    """
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is damaged ({error}); remove it and start again.") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file whose tensors the caller may keep."""
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (
        SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError
    ) as error:  # fmt: skip
        raise FormatError(
            f"{path} cannot be read ({error}); remove it and give the same command again."
        ) from error
