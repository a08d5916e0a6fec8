"""Random models of a real shape: what benchmarks time and tests load.

    python benchmarks/random_model.py OUT [--size 1gb]     # a checkpoint with levels 2, 3, 4

Neither speed nor memory depends on the values, so codes, codebooks and row scales are drawn. Their
sizes are those of a trained model, so that no activation overflows: |W_ij| is about 1 / sqrt(d_in).
The checkpoint is an ordinary folder that is loaded the ordinary way, and the same arguments write
the same bytes. `random_checkpoint` is the one generator: benchmarks/cpu gives it a shape without
weights, benchmarks/gpu one of its own sizes, and tests a tiny model whose other tensors they check.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dropbydrop.checkpoint import (
    CheckpointWriter,
    Embeddings,
    QuantizationConfig,
    StoredGroup,
)
from dropbydrop.coding.codebook_set import SETS, CodebookSet
from dropbydrop.coding.planes import BytesPlane, PlaneSpec, TrellisPlane, counts_of, trellis_planes
from dropbydrop.coding.rotation import Rotation
from dropbydrop.coding.tables import TABLES, rings, table_planes

LEVELS = (2, 3, 4)
SIZES = {
    "1gb": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 10,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
            "tie_word_embeddings": False},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
                "tie_word_embeddings": True},
}  # fmt: skip


def llama_config(size: str) -> LlamaConfig:
    """The shape of one of `SIZES`, with a context of 4,096 tokens."""
    return LlamaConfig(**SIZES[size], max_position_embeddings=4096, eos_token_id=None)


def llama_shape(config: LlamaConfig) -> LlamaForCausalLM:
    """A Llama on the meta device: shapes and names without memory."""
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def random_llama(
    config: LlamaConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> LlamaForCausalLM:
    """transformers' own model of a shape in eval mode: weights N(0, 0.02^2), norms 1."""
    model = llama_shape(config).to(dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(1)
    # its frequencies are a buffer, which `to_empty` has left uninitialised
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    model.tie_weights()
    return model


def llama_groups(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """(name, modules) of the input groups of a Llama: q/k/v, o, gate/up, down of each block; or of
    a Phi-3, in which q/k/v and gate/up are matrices of one name."""
    for i in range(model.config.num_hidden_layers):  # type: ignore[union-attr]
        block = f"model.layers.{i}"
        merged = hasattr(model.get_submodule(f"{block}.self_attn"), "qkv_proj")
        yield (
            f"{block}.qkv",
            [f"{block}.self_attn.{n}_proj" for n in (["qkv"] if merged else "qkv")],
        )
        yield f"{block}.o", [f"{block}.self_attn.o_proj"]
        gate_up = ["gate_up"] if merged else ["gate", "up"]
        yield f"{block}.gate_up", [f"{block}.mlp.{n}_proj" for n in gate_up]
        yield f"{block}.down", [f"{block}.mlp.down_proj"]


def group_rotation(index: int, d_in: int, scaled_inputs: bool = False) -> Rotation:
    """The rotation of input group `index`; where inputs are scaled, every second group's are."""
    rotation = Rotation.make(d_in, seed=index)
    if scaled_inputs and index % 2:
        return rotation.scale(torch.linspace(0.7, 1.4, d_in))
    return rotation


def random_planes(
    code: str, levels: Sequence[int], *, sign_symmetric: bool = True, window: int = 12
) -> tuple[PlaneSpec, ...]:
    """Planes of a kind, "bytes" or "trellis", for these levels."""
    if code == "trellis":
        return trellis_planes(levels, window)
    return tuple(BytesPlane(sign_symmetric=sign_symmetric) for _ in range(max(levels)))


def random_set(
    planes: Sequence[PlaneSpec], seed: int = 0, sizes: Sequence[float] | None = None
) -> CodebookSet:
    """A codebook set of N(0, size^2) entries; `sizes` by default 1, 1/2, 1/4, ..."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [0.5**m for m in range(len(planes))] if sizes is None else sizes
    parts = [_codebook(*pair, generator) for pair in zip(planes, sizes, strict=True)]
    return SETS[planes[0].kind](tuple(planes), tuple(parts))


def _codebook(plane: PlaneSpec, size: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Parts of one codebook. Any taps but 0 make a code; any two of a window may be equal."""
    entries = torch.randn(plane.parts[""][1], generator=generator)
    if not isinstance(plane, TrellisPlane):
        return {"": (entries * size).half()}
    taps = torch.randint(1, plane.entries, (plane.window,), generator=generator)
    return {
        "": (entries * 21).round().clamp(-63, 63).to(torch.int8),  # three sigma are 63
        ".scale": torch.tensor([size / 21]),
        ".taps": taps.to(torch.uint8),
    }


def random_checkpoint(
    out: Path,
    model: LlamaForCausalLM,
    *,
    code: str = "bytes",
    levels: Sequence[int] = LEVELS,
    embedding_bits: int | Sequence[int] = 8,
    sign_symmetric: bool = True,
    window: int = 12,
    sizes: Sequence[float] | None = None,
    scaled_inputs: bool = False,
    files: Mapping[str, bytes | Path] | None = None,
    seed: int = 0,
    **writer: Any,
) -> Path:
    """Write a valid checkpoint of `model` whose linears have random codes.

    Embedding, head, norms and biases are the model's. Of a model on the meta device (see
    `llama_shape`) they are drawn: N(0, 0.02^2) for matrices, 1 for vectors.

    Args:
        out: the folder to write.
        model: its shape and everything but the linears of the blocks.
        code: kind of the planes, "bytes" or "trellis".
        levels: of the checkpoint; its planes are what they need.
        embedding_bits: of embedding and head; one for each level: in planes.
        sign_symmetric: of bytes: codebooks of K/2 stored entries and their negatives, else of K.
        window: of trellis: bits of a window.
        sizes: scale of the codebook of each plane; by default each is half of the last.
        scaled_inputs: give every second input group input scales.
        files: further files of the folder.
        seed: of codes, codebooks and row scales.
        writer: further arguments of `CheckpointWriter`.
    """
    generator = torch.Generator().manual_seed(seed)
    planes = random_planes(code, levels, sign_symmetric=sign_symmetric, window=window)
    tied = bool(model.config.tie_word_embeddings)
    input_groups, done = [], set()
    with CheckpointWriter(out, **writer) as checkpoint:
        checkpoint.add_codebook_set("universal", random_set(planes, seed, sizes))
        for index, (name, modules) in enumerate(llama_groups(model)):
            d_in = model.get_submodule(modules[0]).in_features
            turn = group_rotation(index, d_in, scaled_inputs)
            group = StoredGroup(name, tuple(modules), d_in)
            input_groups.append(group)
            checkpoint.add_group(group, turn)
            for module in modules:
                linear = model.get_submodule(module)
                d_out = linear.out_features
                codes = [
                    torch.randint(
                        0, 256, plane.shape(d_out, d_in), dtype=torch.uint8, generator=generator
                    )
                    for plane in planes
                ]
                scales = 0.4 * (1 + torch.rand(d_out, generator=generator)) / d_in**0.5
                bias = None if linear.bias is None else _values(linear.bias, generator)
                checkpoint.add_linear(module, codes, scales, bias, d_in=d_in)
                done |= {f"{module}.weight", f"{module}.bias"}
        tables = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
        embeddings = _embeddings(embedding_bits, tuple(tables), tied, window)
        if embeddings.by_level:
            books = random_set(embeddings.planes, seed + 1)
            checkpoint.add_codebook_set(embeddings.codebooks, books)
            ends = counts_of(planes, levels)
        for module in tables:
            weight = _values(model.get_submodule(module).weight, generator)
            if isinstance(embedding_bits, int):
                checkpoint.add_embedding(module, weight, embedding_bits)
            else:
                shape = tuple(weight.shape)
                codes = [
                    torch.randint(
                        0, 256, plane.shape(*rings(shape[0]), shape[1]), dtype=torch.uint8,
                        generator=generator,
                    )
                    for plane in embeddings.planes
                ]  # fmt: skip
                turn = group_rotation(1, shape[1], scaled_inputs)
                scales = weight.square().mean(1).sqrt()
                checkpoint.add_table(module, codes, scales, turn, embeddings.files(ends))
            done.add(f"{module}.weight")
        for name, parameter in model.named_parameters():
            if name not in done:  # norms
                checkpoint.add_tensor(name, _values(parameter, generator))
        quantization = QuantizationConfig(
            max(levels), tuple(levels), planes, tuple(input_groups),
            embeddings, {"base_model": "random", "seed": seed},
        )  # fmt: skip
        config = json.loads(model.config.to_json_string(use_diff=False))
        config["architectures"] = [type(model).__name__]
        config.pop("transformers_version", None)  # so that the bytes depend on us alone
        total = sum(parameter.numel() for parameter in model.parameters())
        return checkpoint.finish(config, quantization, dict(files or {}), total)


def _embeddings(
    bits: int | Sequence[int], modules: tuple[str, ...], tied: bool, window: int
) -> Embeddings:
    if isinstance(bits, int):
        return Embeddings(bits, modules, tied)
    planes = table_planes(bits, window)
    return Embeddings(tuple(bits), modules, tied, planes, TABLES)


def _values(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """A parameter, or one of its shape where it has no values."""
    if not parameter.is_meta:
        return parameter.detach()
    if parameter.dim() == 1:
        return torch.ones(parameter.shape)
    return torch.randn(parameter.shape, generator=generator) * 0.02


def equal_errors(model: LlamaForCausalLM, levels: Sequence[int] = LEVELS) -> dict[str, bytes]:
    """A log in which all matrices err alike: an average number of bits needs errors to go by."""
    errors = {str(p): 4.0**-p for p in levels}
    lines = [
        json.dumps({"module": module, "rel_error": errors})
        for _, modules in llama_groups(model)
        for module in modules
    ]
    return {"quantize-log.jsonl": "\n".join(lines).encode()}


def sized_checkpoint(out: Path, size: str, code: str = "bytes") -> Path:
    """A random checkpoint of one of `SIZES`, written unless it is there."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        model = llama_shape(llama_config(size))
        random_checkpoint(out, model, code=code, files=equal_errors(model))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write; one that exists is left alone")
    parser.add_argument("--size", choices=SIZES, default="1gb", help="shape of the model")
    parser.add_argument("--code", choices=SETS, default="bytes", help="kind of the planes")
    args = parser.parse_args()
    print(sized_checkpoint(args.out, args.size, args.code))


if __name__ == "__main__":
    main()
