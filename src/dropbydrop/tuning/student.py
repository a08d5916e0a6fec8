"""The quantized model as something to train: codes held as bytes, weights decoded as they are used.

`Student` gives, with gradients to the checkpoint's small tensors (codebooks, scales, norms):

1. `block`: one decoder block at several levels at once. An input group's planes are decoded once
   for all levels (decode.py) and given to the family's own block, whose linear layers rotate their
   inputs.
2. `logits`: final norm, head and soft cap, from the embedding and head that the checkpoint stores.

What surrounds the blocks (masks, position embeddings, scaling of embeddings) is the runner's: no
list of architectures. Its weights outside of the blocks are read from the checkpoint
(`StoredWeights`).

Memory on the device: the codes of all blocks, as they are stored; embedding and head, dense;
one block's weights at the levels in use, in float32, while it runs.

Limits: linear layers in decoder blocks, one codebook set an input group. Blocks with routed experts
are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.config import RESERVED_PREFIXES, codebook_name
from dropbydrop.checkpoint.tables import dense_table
from dropbydrop.coding.code import expand_codebook
from dropbydrop.coding.codebook_set import CodebookSet, TrellisSet
from dropbydrop.coding.planes import BytesPlane
from dropbydrop.coding.rotation import Rotation
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.experts import stack_names
from dropbydrop.models.weight_files import WeightFiles
from dropbydrop.system.errors import FormatError, UnsupportedModelError

from .decode import decode_levels
from .grid import table_of, top_of, values_of
from .optimizer import Values

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class StoredWeights(WeightFiles):
    """A checkpoint in the place of a model's files: embeddings dense, all else as it is stored.
    Embeddings in planes are those of all planes, for every level.

    Quantized matrices are listed, so that the runner finds nothing missing; they cannot be read
    here.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder, self.checkpoint = checkpoint.path, checkpoint
        eight = checkpoint.quantization.embeddings
        self._rows = set(eight.modules) if eight.bits != 16 else set()
        weights = [*checkpoint.quantization.modules, *self._rows]
        self._names = dict.fromkeys([*checkpoint.rest, *(f"{module}.weight" for module in weights)])

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        module = name.removesuffix(".weight")
        if module in self.checkpoint.quantization.tables:
            tensor = dense_table(
                self.checkpoint, module, len(self.checkpoint.quantization.embeddings.planes)
            )
        elif module in self._rows:
            scales = self.checkpoint.read(f"{module}.row_scales").float()
            tensor = self.checkpoint.read(f"{module}.rows").float() * scales[:, None]
        else:
            tensor = self.checkpoint.read(name)
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.to(wanted, copy=True)


class RotatedLinear(nn.Module):
    """y = W' (Q x) + b with W' [d_out, d_in] in the rotated coordinates of the input group.

    Stands in the runner's blocks in place of a linear layer; its weight is given at every call. The
    rotation runs in float32, as in inference.
    """

    def __init__(self, linear: nn.Linear, rotation: Rotation) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.rotation = linear.weight, linear.bias, rotation

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out]."""
        with torch.autocast(x.device.type, enabled=False):
            rotated = self.rotation.apply(x.float())
        return nn.functional.linear(rotated, self.weight, self.bias)


@dataclass(frozen=True)
class TunedGroup:
    """The matrices of one input group, on the device."""

    modules: tuple[str, ...]  # full names
    rows: tuple[int, ...]  # d_out of each
    codes: tuple[tuple[Tensor, ...], ...]  # of each, its planes up to the highest level
    books: CodebookSet  # the stored set: it says what codes name
    rotation: Rotation
    codebooks: str  # name of its set

    def index(self, m: int) -> Tensor:
        """Entries that plane m (from 0) names, all rows together: integers [sum of rows, G]."""
        pairs = zip(self.codes, self.rows, strict=True)
        return torch.cat([self.books.index(m, codes[m], d_out) for codes, d_out in pairs])


class Student:
    """See the module's note.

    Args:
        checkpoint: with all planes up to the highest of `levels`.
        folder: of the original model; its config alone is read.
        train: "all", or "scales": row scales and norms, with the codebooks as they are.
        levels: that are run, ascending.
        half: run matrix products in bfloat16 (autocast); everything else stays in float32.

    Attributes:
        levels: as given.
        sets: codebook set of every input group; with `train` "all" each has its own.
        start: what can be trained, by its name in the checkpoint that will be written.
        elementwise: names among them that are row scales.
        grids: names among them that are codebooks of trellis planes (grid.py).

    Raises:
        FormatError, MissingPlaneError: the checkpoint is damaged or lacks a plane.
        UnsupportedModelError: a structure that cannot be walked.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        train: str,
        levels: Sequence[int],
        device: torch.device | str,
        half: bool = False,
    ) -> None:
        self.checkpoint, self.levels, self.half = checkpoint, tuple(levels), half
        checkpoint.require(levels[-1])
        self.runner = BlockRunner.open(folder, device=device, files=StoredWeights(checkpoint))
        self.device = self.runner.device
        q, runner = checkpoint.quantization, self.runner
        names = [input_group.codebooks for input_group in q.input_groups]
        if train == "all":
            names = [f"input-group-{i}" for i in range(len(names))]
        self.sets = tuple(names)
        self._input_groups: dict[int, list[TunedGroup]] = {i: [] for i in range(runner.num_blocks)}
        for number, input_group in enumerate(q.input_groups):
            self._input_groups[self._block_of(input_group.modules)].append(self._open_group(number))
        self.start: dict[str, Tensor] = {}
        self.elementwise: set[str] = set()
        self.grids: dict[str, int] = {}
        self._fixed: dict[str, Tensor] = {}
        self._collect(train)

    # ---- structure -------------------------------------------------------------------------

    def _block_of(self, modules: Sequence[str]) -> int:
        blocks = set()
        for name in modules:
            tail = name.removeprefix(f"{self.runner.blocks_name}.")
            number = tail.partition(".")[0]
            try:
                linear: object = self.runner.model.get_submodule(name)
            except AttributeError:
                linear = None
            shape = self.checkpoint.shapes[name]
            if (
                tail == name
                or not isinstance(linear, nn.Linear)
                or (linear.out_features, linear.in_features) != shape
            ):
                raise FormatError(
                    f"{name} is a matrix of {list(shape)} in {self.checkpoint.path}, but "
                    f"{type(self.runner.model).__name__} of the model given has "
                    f"{'no such module' if linear is None else linear} there: the checkpoint was "
                    "made from another model. Give the model that it was quantized from."
                )
            blocks.add(int(number))
        if len(blocks) != 1:
            raise UnsupportedModelError(
                f"the input group of {modules[0]} spans {len(blocks)} blocks; tuning needs input "
                "groups within one block."
            )
        return blocks.pop()

    def _open_group(self, number: int) -> TunedGroup:
        q, read = self.checkpoint.quantization, self.checkpoint.read_codes
        spec = q.input_groups[number]
        planes = range(1, q.prefix_of(self.levels[-1]) + 1)
        codes = tuple(
            tuple(read(module, m).to(self.device) for m in planes) for module in spec.modules
        )
        books = self.checkpoint.read_set(spec.codebooks).to(self.device)
        rows = tuple(self.checkpoint.shapes[module][0] for module in spec.modules)
        rotation = self.checkpoint.read_rotation(number).to(self.device)
        for module in spec.modules:
            linear = cast(nn.Linear, self.runner.model.get_submodule(module))
            self.runner.model.set_submodule(module, RotatedLinear(linear, rotation))
        return TunedGroup(spec.modules, rows, codes, books, rotation, self.sets[number])

    def _collect(self, train: str) -> None:
        """Sort the checkpoint's small tensors into those that can be trained and the others."""
        checkpoint, q = self.checkpoint, self.checkpoint.quantization
        prefix = q.prefix_of(self.levels[-1]) if train == "all" else 0
        for number, input_group in enumerate(q.input_groups):
            self.add_set(number, checkpoint.read_set(input_group.codebooks), prefix)
        modules, blocks = set(q.modules), f"{self.runner.blocks_name}."
        skipped = {*q.guards, *(f"{m}.{leaf}" for m in q.embeddings.modules for leaf in _ROWS)}
        for name, info in checkpoint.rest.items():
            if name.startswith(RESERVED_PREFIXES) or name in skipped:
                continue
            owner, _, leaf = name.rpartition(".")
            tensor = checkpoint.read(name)
            if owner in modules and leaf == "scales":
                self.elementwise.add(name)
                self.start[name] = tensor
            elif tensor.is_floating_point() and len(info.shape) == 1:
                self.start[name] = tensor
            elif name.startswith(blocks):
                self._fixed[name] = tensor
        self._fixed = {
            n: t.to(self.device, torch.float32 if t.is_floating_point() else t.dtype)
            for n, t in self._fixed.items()
        }

    def add_set(self, number: int, books: CodebookSet, prefix: int) -> None:
        """Take over the set of input group `number`; planes up to `prefix` can be trained."""
        for m, part in enumerate(books.parts, 1):
            name = codebook_name(self.sets[number], m)
            trellis = isinstance(books, TrellisSet)
            stored = values_of(part) if trellis else part[""]
            if trellis:
                self.grids[name] = top_of(part)
            (self.start if m <= prefix else self._fixed)[name] = stored

    def groups_of(self, block: int) -> Sequence[TunedGroup]:
        """The input groups of a block."""
        return self._input_groups[block]

    def trained_in(self, block: int) -> dict[str, Tensor]:
        """The part of `start` that belongs to one block."""
        prefix = f"{self.runner.block_prefix(block)}."
        sets = {f"codebooks.{input_group.codebooks}." for input_group in self._input_groups[block]}
        return {
            name: tensor
            for name, tensor in self.start.items()
            if name.startswith(prefix) or name[: name.rfind(".") + 1] in sets
        }

    def values(self, block: int | None = None) -> Values:
        """What is trained, all of it or that of one block."""
        start = self.start if block is None else self.trained_in(block)
        return Values(start, self.elementwise, self.device, self.grids)

    def leaves_of(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `block` takes, from tensors as they are stored (`Values.rounded`)."""
        out = {}
        for name, tensor in stored.items():
            if name in self.grids:
                out[name] = values_of({"": tensor, ".scale": stored[f"{name}.scale"]})
            elif name.removesuffix(".scale") not in self.grids:
                out[name] = tensor.to(torch.float32)
        return {name: tensor.to(self.device) for name, tensor in out.items()}

    # ---- running ---------------------------------------------------------------------------

    def _tensor(self, leaves: Mapping[str, Tensor], name: str) -> Tensor:
        """A small tensor, trained or not."""
        return leaves[name] if name in leaves else self._fixed[name]

    def _table(self, leaves: Mapping[str, Tensor], group: TunedGroup, m: int) -> Tensor:
        """Table of plane m (from 1) of an input group, float32 [K, g]."""
        name, plane = codebook_name(group.codebooks, m), group.books.planes[m - 1]
        values = self._tensor(leaves, name)
        if isinstance(plane, BytesPlane):
            return expand_codebook(values, plane.sign_symmetric)
        return table_of(values, self.grids[name])

    def _weights(
        self, block: int, leaves: Mapping[str, Tensor], levels: Sequence[int]
    ) -> list[dict[str, Tensor]]:
        """Weights of a block's quantized linears, rotated, by local names, for each level."""
        prefix = f"{self.runner.block_prefix(block)}."
        out: list[dict[str, Tensor]] = [{} for _ in levels]
        prefixes = [self.checkpoint.quantization.prefix_of(level) for level in levels]
        for input_group in self._input_groups[block]:
            planes = range(prefixes[-1])
            entries = [self._table(leaves, input_group, m + 1) for m in planes]
            index = [input_group.index(m) for m in planes]
            scales = torch.cat([leaves[f"{m}.scales"] for m in input_group.modules])
            decoded = decode_levels(index, entries, scales, prefixes)
            for weights, rotated in zip(out, decoded, strict=True):
                for module, weight in zip(
                    input_group.modules, rotated.split(input_group.rows), strict=True
                ):
                    weights[f"{module.removeprefix(prefix)}.weight"] = weight
        return out

    @torch.no_grad()
    def dense_weight(self, module: str) -> Tensor:
        """A matrix as the checkpoint stores it, at the highest level: float32 [d_out, d_in]."""
        stored = {n: t.to(self.device, torch.float32) for n, t in self.start.items()}
        linear = cast(RotatedLinear, self.runner.model.get_submodule(module))
        block = int(module.removeprefix(f"{self.runner.blocks_name}.").partition(".")[0])
        local = module.removeprefix(f"{self.runner.block_prefix(block)}.")
        rotated = self._weights(block, stored, self.levels[-1:])[0][f"{local}.weight"]
        return linear.rotation.transpose(rotated)

    def block(
        self,
        i: int,
        hidden: Sequence[Tensor],
        leaves: Mapping[str, Tensor],
        levels: Sequence[int],
    ) -> list[Tensor]:
        """Block i at each of `levels` (ascending), on inputs [b, T, d] of their own.

        Gradients flow to the inputs and to `leaves`, the trained tensors by name.
        """
        prefix = f"{self.runner.block_prefix(i)}."
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            with torch.autocast(self.device.type, enabled=False):
                weights = self._weights(i, leaves, levels)
            rest = {
                local: self._tensor(leaves, prefix + local)
                for local in self.runner.state_names(i)
                if local not in weights[0]
            }
            return [
                self.runner.apply_block(i, x, {**coded, **rest}).float()
                for x, coded in zip(hidden, weights, strict=True)
            ]

    def logits(self, hidden: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
        """Output of the last block [b, T, d] -> logits [b, T, vocab] float32, with gradients."""
        blocks = f"{self.runner.blocks_name}."
        inner = (blocks, *RESERVED_PREFIXES)
        values = {name: leaf for name, leaf in leaves.items() if not name.startswith(inner)}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            return self.runner.apply_head(hidden, values).float()


_ROWS = ("weight", "rows", "row_scales", "scales", "input_scales")


def refuse_experts(runner: BlockRunner) -> None:
    """Raises UnsupportedModelError for a mixture of experts."""
    config = runner.model.config.get_text_config()
    for key in _EXPERTS:
        if (getattr(config, key, None) or 0) > 1:
            raise _experts(runner, f"{key} = {getattr(config, key)}")
    if stacks := stack_names(runner.blocks, runner.blocks_name):
        raise _experts(runner, stacks[0])


def _experts(runner: BlockRunner, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(runner.model).__name__} routes tokens to experts ({found}); tuning supports dense "
        "decoders alone. Use the checkpoint without tuning; `quantize` with --no-tune makes one."
    )
