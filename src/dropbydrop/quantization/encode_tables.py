"""Embedding and head: coded in planes, or narrowed to 8 or 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from dropbydrop.checkpoint import CheckpointWriter, Embeddings
from dropbydrop.coding.codebooks import universal_set
from dropbydrop.coding.encoder import Effort, group_rotation
from dropbydrop.coding.tables import TABLES, encode_table, table_bits

from .config import QuantizeConfig


class TableWriter:
    """Writes the tables of a model as its config says.

    Args:
        ends: plane files that each level of the checkpoint reads.
        effort: of the search, of tables in planes.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        config: QuantizeConfig,
        ends: tuple[int, ...],
        effort: Effort,
        device: torch.device,
    ) -> None:
        self._writer, self._config, self._effort, self._device = writer, config, effort, device
        self._ends = ends
        # a backend was chosen for the planes of the matrices, which may be of another kind
        self._backend = config.backend if config.code == "trellis" else None
        self._bits = table_bits(config.levels, config.head_bits) if config.head_in_planes else ()
        if self._bits:
            self._known = tuple(sorted(set(self._bits)))
            self._books = universal_set(self._known, None, "trellis", effort.window)
            writer.add_codebook_set(TABLES, self._books)

    def described(self, modules: tuple[str, ...], tied: bool) -> Embeddings:
        """What the checkpoint says of them."""
        if not self._bits:
            return Embeddings(self._config.head_bits, modules, tied)
        return Embeddings(self._bits, modules, tied, self._books.planes, TABLES)

    def add(self, module: str, weight: Tensor, gram: Tensor | None, seed: int) -> dict[str, object]:
        """Write a table [vocab, d].

        Args:
            gram: H [d, d] of what its rows are multiplied by; None for a table of look-ups alone.
            seed: of its rotation.

        Returns:
            What the report says of it: its bits, and of tables in planes the relative weighted
            error at each level.
        """
        if not self._bits:
            self._writer.add_embedding(module, weight, self._config.head_bits)
            return {"bits": self._config.head_bits}
        d = weight.shape[1]
        h = torch.eye(d, device=self._device) if gram is None else gram.to(self._device)
        rotation = group_rotation({module: weight.to(self._device, torch.float32)}, h, seed)
        books = self._books.to(self._device)
        codes, scales, errors = encode_table(
            weight, h, rotation, books, self._known, self._effort, self._backend
        )
        files = self.described((module,), tied=False).files(self._ends)
        self._writer.add_table(module, codes, scales, rotation.to("cpu"), files)
        by_bits = dict(zip(self._known, errors, strict=True))
        pairs = zip(self._config.levels, self._bits, strict=True)
        return {
            "bits": list(self._bits),
            "rel_error": {str(level): by_bits[bits] for level, bits in pairs},
        }
