"""Random models of real shapes for the benchmarks: a checkpoint of ours, and GGUF files.

Speed does not depend on the values, so codes, rows and weights are random. The checkpoint is an
ordinary folder, loaded the ordinary way. The GGUF files hold a model of the same shape without a
tokenizer; llama.cpp's own quantizer makes them from one float16 file.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dropbydrop.checkpoint import CheckpointWriter
from dropbydrop.checkpoint.config import Embeddings, PlaneSpec, QuantizationConfig, StoredGroup
from dropbydrop.coding.rotation import Rotation

SIZES = {
    "1gb": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 10,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
            "tie_word_embeddings": False},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
                "tie_word_embeddings": True},
}  # fmt: skip
LEVELS = (2, 3, 4)


def config_of(size: str) -> LlamaConfig:
    return LlamaConfig(**SIZES[size], max_position_embeddings=4096, eos_token_id=None)


def _input_groups(model: LlamaForCausalLM) -> list[tuple[str, list[str]]]:
    input_groups = []
    for i in range(len(model.model.layers)):
        block = f"model.layers.{i}"
        input_groups += [
            (f"{block}.qkv", [f"{block}.self_attn.{x}_proj" for x in "qkv"]),
            (f"{block}.o", [f"{block}.self_attn.o_proj"]),
            (f"{block}.gate_up", [f"{block}.mlp.{x}_proj" for x in ("gate", "up")]),
            (f"{block}.down", [f"{block}.mlp.down_proj"]),
        ]
    return input_groups


def random_checkpoint(folder: Path, size: str, seed: int = 0) -> Path:
    """A checkpoint of random codes with levels 2, 3, 4 and eight-bit embedding and head."""
    if folder.exists():
        return folder
    generator = torch.Generator().manual_seed(seed)
    config = config_of(size)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    planes = tuple(PlaneSpec(sign_symmetric=True) for _ in range(max(LEVELS)))
    books = [torch.randn(p.stored_entries, p.group, generator=generator) for p in planes]
    folder.parent.mkdir(parents=True, exist_ok=True)
    input_groups, done = [], set()
    with CheckpointWriter(folder) as writer:
        writer.add_codebook_set("random", [(b / 2**m).half() for m, b in enumerate(books)])
        for name, modules in _input_groups(model):
            d_in = model.get_submodule(modules[0]).in_features
            rotation = Rotation.make(d_in, seed=len(input_groups))
            input_groups.append(StoredGroup(name, tuple(modules), d_in, "random", rotation.spec()))
            writer.add_group(input_groups[-1], rotation)
            for module in modules:
                rows = model.get_submodule(module).out_features
                codes = [_bytes((rows, d_in // 8), generator) for _ in planes]
                scales = (0.5 + torch.rand(rows, generator=generator)) / d_in**0.5
                writer.add_linear(module, codes, scales)
                done.add(f"{module}.weight")
        tied = config.tie_word_embeddings
        tables = ["model.embed_tokens"] + ([] if tied else ["lm_head"])
        for name in tables:
            shape = (config.vocab_size, config.hidden_size)
            writer.add_embedding(name, torch.randn(shape, generator=generator) * 0.02, 8)
            done.add(f"{name}.weight")
        for name, parameter in model.named_parameters():
            if name not in done:  # norms
                writer.add_tensor(name, torch.ones(parameter.shape))
        described = QuantizationConfig(
            max(LEVELS), LEVELS, planes, tuple(input_groups), Embeddings(8, tuple(tables), tied),
            {"base_model": f"random {size}", "seed": seed},
        )  # fmt: skip
        plain = json.loads(config.to_json_string(use_diff=False))
        plain |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
        total = sum(parameter.numel() for parameter in model.parameters())
        # an average number of bits needs some errors to go by; here all input groups are alike
        errors = {str(p): 4.0**-p for p in LEVELS}
        lines = [
            json.dumps({"module": m, "rel_error": errors}) for s in input_groups for m in s.modules
        ]
        log = {"quantize-log.jsonl": "\n".join(lines).encode()}
        return writer.finish(plain, described, log, {"total": total})


def _bytes(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def dense_model(size: str, dtype: torch.dtype) -> nn.Module:
    """transformers' own model of that shape, weights random."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config_of(size))
    model = model.to(dtype).to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.tie_weights()
    return model


def random_gguf(path: Path, size: str) -> Path:
    """A float16 GGUF of that shape."""
    import gguf
    import numpy as np

    if path.exists():
        return path
    config, random = config_of(size), np.random.default_rng(0)
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(hidden // config.num_attention_heads)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)

    def matrix(name: str, rows: int, d: int) -> None:
        values = random.standard_normal((rows, d), dtype=np.float32) * 0.02
        writer.add_tensor(name, values.astype(np.float16))

    matrix("token_embd.weight", vocab, hidden)
    if not config.tie_word_embeddings:
        matrix("output.weight", vocab, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
    for i in range(config.num_hidden_layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(hidden, dtype=np.float32))
        for name, rows, d in (
            ("attn_q", hidden, hidden), ("attn_k", kv, hidden), ("attn_v", kv, hidden),
            ("attn_output", hidden, hidden), ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden), ("ffn_down", hidden, inner),
        ):  # fmt: skip
            matrix(f"blk.{i}.{name}.weight", rows, d)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def silence(api: Any) -> None:
    """No messages from llama.cpp."""
    api.llama_log_set(_SILENT, None)  # it keeps the address, so the callback must stay


def quantized_gguf(source: Path, kind: str) -> Path:
    """`source` quantized by llama.cpp, e.g. kind "Q4_K_M"; beside it."""
    import llama_cpp

    path = source.with_name(f"{source.stem}-{kind}.gguf")
    if not path.exists():
        silence(llama_cpp)
        order = llama_cpp.llama_model_quantize_default_params()
        order.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        order.nthread = torch.get_num_threads()
        partial = path.with_suffix(".partial")
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), order)
        if status:
            raise RuntimeError(f"llama.cpp could not quantize {source} to {kind}: {status}")
        partial.rename(path)
    return path
