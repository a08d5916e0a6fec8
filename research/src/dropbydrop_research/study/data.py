"""What the studies read: a model's linear weights, and Gram matrices cached on disk.

A cache folder holds one file an input group, `group-00000.safetensors` and so on, so that
collecting and reading take the memory of one block, whatever the model. Tensors of a file:

    H         float32 [d_in, d_in]   mean of x x^T over the calibration tokens, as
                                     `BlockRunner.collect_statistics` gives it
    held      float32 [d_in, d_in]   the same over held-out tokens; may be absent
    energies  float32 [n, T]         ||x||^2 of the calibration tokens, unclipped; may be absent

Metadata: `input_group` (name), `modules` (JSON list), `tokens`, `clip`, `model` (`model_digest` of
the folder they were collected from). Nothing is damped. `files.json` has the SHA-256 of every file:
one that is missing, exchanged or damaged is refused. `collect` fills a folder aside and renames it,
so a cache is either whole or absent.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.statistics import CLIP
from dropbydrop.system.atomic_folder import replacing
from dropbydrop.system.digest import file_digest, model_digest
from dropbydrop.system.errors import FormatError

INDEX = "files.json"
_FILE = re.compile(r"group-\d{5}\.safetensors")
Progress = Callable[[int, int, str], None]
"""Called as progress(done, total, what is next)."""


def linear_modules(runner: BlockRunner) -> list[str]:
    """Full names of the linear layers in the decoder blocks, in the model's order."""
    prefix = f"{runner.blocks_name}."
    return [
        name
        for name, module in runner.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefix)
    ]


def read_weight(runner: BlockRunner, module: str) -> Tensor:
    """W of a linear layer, float32 [d_out, d_in], read from disk.

    Raises:
        FormatError: the model has no such layer.
    """
    try:
        found = runner.model.get_submodule(module)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Linear):
        raise FormatError(
            f"{runner.files.folder} has no linear layer {module}; the statistics or errors given "
            "belong to another model."
        )
    return runner.read(f"{module}.weight", torch.float32)


@dataclass(frozen=True, eq=False)
class GroupGram:
    """Statistics of an input group; see the module's note for the tensors.

    Attributes:
        gram: H, float32 [d_in, d_in]; held: the same over held-out tokens.
        energies: ||x||^2 of every token, float32 [n, T].
        tokens: how many H averages; clip: their clipping.
        model: fingerprint of the model; empty where it is not known.
    """

    name: str
    modules: tuple[str, ...]
    tokens: int
    clip: float
    gram: Tensor
    held: Tensor | None
    energies: Tensor | None
    model: str = ""


class GramFolder:
    """A cache folder of Gram matrices; iterating reads one input group at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _digests(self) -> dict[str, str]:
        """SHA-256 of every file by its name; empty where there is no cache."""
        index = self.folder / INDEX
        try:
            found = json.loads(index.read_text())
            if not isinstance(found, dict):
                raise ValueError(f"it holds a {type(found).__name__}")
            if foreign := [name for name in found if not _FILE.fullmatch(name)]:
                raise ValueError(f"it names {foreign[0]!r}")
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            raise _damaged(index, error) from error
        return found

    @property
    def files(self) -> list[Path]:
        return [self.folder / name for name in sorted(self._digests())]

    def __len__(self) -> int:
        return len(self._digests())

    def write(self, index: int, group: GroupGram) -> None:
        """Store the statistics of the input group number `index`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "H": group.gram,
            "held": group.held,
            "energies": group.energies,
        }
        path = self.folder / f"group-{index:05d}.safetensors"
        metadata = {
            "input_group": group.name,
            "modules": json.dumps(group.modules),
            "tokens": str(group.tokens),
            "clip": str(group.clip),
            "model": group.model,
        }
        present = {k: v.to(torch.float32).contiguous() for k, v in tensors.items() if v is not None}
        save_file(present, path, metadata)
        digests = self._digests() | {path.name: file_digest(path)}
        (self.folder / INDEX).write_text(json.dumps(digests, indent=1) + "\n")

    def __iter__(self) -> Iterator[GroupGram]:
        for name, expected in sorted(self._digests().items()):
            path = self.folder / name
            try:
                found = file_digest(path)
            except OSError as error:
                raise _damaged(path, error.strerror) from error
            if found != expected:
                raise _damaged(path, "its SHA-256 is another than when it was written")
            yield _read_group(path)


def _read_group(path: Path) -> GroupGram:
    try:
        with safe_open(path, framework="pt") as handle:
            meta, names = handle.metadata() or {}, set(handle.keys())
            tensors = {name: handle.get_tensor(name).clone() for name in names}
        return GroupGram(
            name=meta["input_group"],
            modules=tuple(json.loads(meta["modules"])),
            tokens=int(meta["tokens"]),
            clip=float(meta["clip"]),
            gram=tensors["H"],
            held=tensors.get("held"),
            energies=tensors.get("energies"),
            model=meta.get("model", ""),
        )
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, reason: object) -> FormatError:
    return FormatError(
        f"{path} is not the cached Gram matrices that were written ({reason}). Remove the folder "
        "and give the command again; they are collected anew."
    )


def collect(
    runner: BlockRunner,
    ids: Tensor,
    folder: Path,
    held_ids: Tensor | None = None,
    clip: float = CLIP,
    progress: Progress | None = None,
) -> GramFolder:
    """Run the unquantized model over calibration (and held-out) tokens and cache every input group.

    Args:
        ids: [n, T]; `held_ids` [m, T'] from other text.
        folder: where to; a cache that is there is replaced at the end.
        clip: token clipping of H, the same for both; infinity for the raw matrices.

    Raises:
        FormatError: `folder` holds something else than a cache.
        UnsupportedModelError, CalibrationError: as `BlockRunner.collect_statistics`.
    """
    own = {INDEX, *(path.name for path in GramFolder(folder).files)}
    if folder.exists() and any(path.name not in own for path in folder.iterdir()):
        raise FormatError(f"{folder} holds other files than cached statistics; name a new folder.")
    with replacing(folder, folder=True) as partial:
        _collect(runner, ids, held_ids, clip, GramFolder(partial), progress)
        shutil.rmtree(folder, ignore_errors=True)
    return GramFolder(folder)


@torch.no_grad()
def _collect(
    runner: BlockRunner,
    ids: Tensor,
    held_ids: Tensor | None,
    clip: float,
    store: GramFolder,
    progress: Progress | None,
) -> None:
    index, model = 0, model_digest(runner.files.folder)
    hidden = runner.embed(ids)
    held_hidden = None if held_ids is None else runner.embed(held_ids)
    for i in range(runner.num_blocks):
        if progress:
            progress(i, runner.num_blocks, runner.block_prefix(i))
        block = runner.block(i)
        firsts = [group.modules[0] for group in runner.input_groups(i, block, hidden)]
        with _Energies(block, runner.block_prefix(i), firsts) as energies:
            statistics = runner.collect_statistics(i, block, hidden, clip=clip, out=hidden)
        held: dict[str, Tensor] = {}
        if held_hidden is not None:
            held = runner.collect_statistics(
                i, block, held_hidden, clip=clip, out=held_hidden
            ).grams
        for group in statistics.input_groups:
            one = GroupGram(
                group.name,
                group.modules,
                statistics.tokens,
                clip,
                statistics.grams[group.name],
                held.get(group.name),
                energies.of(group.modules[0]),
                model,
            )
            store.write(index, one)
            index += 1
        runner.release(i)
    if progress:
        progress(runner.num_blocks, runner.num_blocks, "")


class _Energies:
    """Records ||x||^2 of every token at the inputs of some linear layers of a block."""

    def __init__(self, block: nn.Module, prefix: str, modules: Sequence[str]) -> None:
        self._seen: dict[str, list[Tensor]] = {module: [] for module in modules}
        self._hooks = [
            block.get_submodule(module.removeprefix(f"{prefix}.")).register_forward_pre_hook(
                self._hook(parts), with_kwargs=True
            )
            for module, parts in self._seen.items()
        ]

    @staticmethod
    def _hook(parts: list[Tensor]) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            parts.append(torch.linalg.vector_norm(x.float(), dim=-1).square().cpu())

        return hook

    def __enter__(self) -> _Energies:
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def of(self, module: str) -> Tensor | None:
        """[n, T] of a module; None where tokens do not come as [b, T, d]."""
        parts = self._seen[module]
        return torch.cat(parts) if parts and all(p.ndim == 2 for p in parts) else None


def finite(value: float) -> float | None:
    """A number as JSON has it: None for infinities and not-a-number."""
    return value if math.isfinite(value) else None
