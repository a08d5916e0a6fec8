"""The model card of a checkpoint: README.md, for people who meet the folder."""

from __future__ import annotations

from collections.abc import Mapping

from dropbydrop.checkpoint import QuantizationConfig


def model_card(base: str, quantization: QuantizationConfig, errors: Mapping[int, float]) -> str:
    """How the checkpoint was made and how it is loaded. Deterministic."""
    levels = ", ".join(map(str, quantization.levels))
    low = quantization.levels[0]
    count = quantization.prefix_of(low)
    reads = ", ".join(f"{p}: {quantization.prefix_of(p)}" for p in quantization.levels)
    code = {
        "bytes": "additive codebooks, a byte a plane for 8 weights",
        "trellis": "additive trellis codes, a stream of bits a plane for every input",
    }[quantization.kind]
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
    return f"""---
library_name: transformers
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
- embeddings and head: {quantization.embeddings.bits} bits

| bits | mean relative weighted error of a matrix |
|---|---|
{rows}
"""
