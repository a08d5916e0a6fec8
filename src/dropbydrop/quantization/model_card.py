"""The model card of a checkpoint: README.md, for people who meet the folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from dropbydrop.checkpoint import QuantizationConfig
from dropbydrop.checkpoint.config import CARD_FILE

_FRONT = re.compile(r"---\r?\n(.*?\n)---\s*\n", re.DOTALL)
_LICENSE = re.compile(r"^license: *[\"']?([\w.-]+)[\"']? *\r?$", re.MULTILINE)
_MOST = 1 << 16  # characters of a card that are looked at


def license_of(folder: Path) -> str | None:
    """The licence that a model's own card names (the Hub's identifier), or None."""
    try:
        with open(folder / CARD_FILE, encoding="utf-8") as file:
            front = _FRONT.match(file.read(_MOST))
    except (OSError, ValueError):
        return None
    found = _LICENSE.search(front[1]) if front else None
    return found[1] if found else None


def model_card(
    base: str,
    quantization: QuantizationConfig,
    errors: Mapping[int, float],
    license_name: str | None = None,
) -> str:
    """How the checkpoint was made and how it is loaded, with the fields that the Hub reads.
    Deterministic.

    Args:
        base: the model; errors: mean error of each level.
        license_name: of the base model, where it is known.
    """
    levels = ", ".join(map(str, quantization.levels))
    low = quantization.levels[0]
    count = quantization.prefix_of(low)
    reads = ", ".join(f"{p}: {quantization.prefix_of(p)}" for p in quantization.levels)
    code = {
        "bytes": "additive codebooks, a byte a plane for 8 weights",
        "trellis": "additive trellis codes, a stream of bits a plane for every input",
    }[quantization.kind]
    by_level = "/".join(map(str, quantization.embeddings.by_level))
    bits = f"{by_level}, by level," if by_level else quantization.embeddings.bits
    made = quantization.provenance
    calibration = made.get("calibration", {})
    source = "text that the model wrote"
    if calibration.get("kind") == "text":
        source = f"`{calibration['text']}` (SHA-256 {calibration['sha256'][:16]}…)"
    rows = "\n".join(f"| {p} | {e:.4f} |" for p, e in errors.items())
    # Only an id of the form owner/name is one that the Hub accepts as a base model.
    parts = base.split("/")
    is_id = len(parts) == 2 and all(parts) and not base.startswith((".", "~"))
    front = f"base_model: {base}\nbase_model_relation: quantized\n" if is_id else ""
    front += f"license: {license_name}\n" if license_name else ""
    return f"""---
library_name: dropbydrop
pipeline_tag: text-generation
{front}tags:
- dropbydrop
- quantized
---
# {base} at {levels} bits, one checkpoint

Made by dropbydrop {made.get("version", "")}: {code}, ordered so that the first planes are a \
model. Plane m is `plane-m.safetensors`; a device needs `model.safetensors` and the first planes, \
by bits a weight ({reads}).

```python
import dropbydrop

model = dropbydrop.load("this-folder", bits={low})   # planes read: {count}
```

Stock transformers cannot read the codes and stops with a size mismatch. After \
`dropbydrop.register()` its `from_pretrained` reads this folder too.

- preset `{made.get("preset")}`, seed {made.get("seed")}
- calibration: {source}, {calibration.get("windows")} windows of {calibration.get("seq_len")} tokens
- embeddings and head: {bits} bits

| bits | mean relative weighted error of a matrix |
|---|---|
{rows}
"""
