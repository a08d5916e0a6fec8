"""Experts by the definition of the format: one matrix of a stack, entry by entry.

Slow and plain; what loaded stacks are compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dropbydrop.checkpoint import Checkpoint


def naive_expert(checkpoint: Checkpoint, name: str, e: int, level: int, rows: range) -> Tensor:
    """Rows of expert e's matrix at a level, entry by entry, from what is on disk."""
    q = checkpoint.quantization
    books, scales = checkpoint.read_set("universal"), checkpoint.read(f"{name}.scales")
    d_in = checkpoint.shapes[name][2]
    rotated = torch.zeros(len(rows), d_in, dtype=torch.float64)
    for m in range(1, q.prefix_of(level) + 1):
        codes, part, spec = checkpoint.read_codes(name, m)[e], books.parts[m - 1], q.planes[m - 1]
        for r in rows:
            for j in range(d_in):
                if spec.kind == "bytes":
                    c = int(codes[r, j // 8])
                    rotated[r, j] += float(part[""][c & 127, j % 8]) * (-1 if c & 128 else 1)
                    continue
                newest, label = spec.bits * (r + 1) - 1, 0
                for age, tap in enumerate(part[".taps"].tolist()):
                    i = (newest - age) % (8 * len(codes))
                    label ^= tap * (int(codes[i // 8, j]) >> i % 8 & 1)
                rotated[r, j] += float(part[""][label]) * float(part[".scale"])
    turn = checkpoint.read_rotation(q.group_index[name]).apply(torch.eye(d_in)).T.double()
    return rotated * scales[e, rows.start : rows.stop].double()[:, None] @ turn
