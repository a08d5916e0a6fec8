"""llama.cpp beside ours in decode.py: GGUF files of a shape, and a model through its C interface.

The files hold random weights and no tokenizer; llama.cpp's own quantizer makes them from one
float16 file.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig


def random_gguf(path: Path, config: LlamaConfig) -> Path:
    """A float16 GGUF of a Llama's shape, without a tokenizer; written unless it is there."""
    import gguf
    import numpy as np

    if path.exists():
        return path
    partial = path.with_suffix(".partial")
    random = np.random.default_rng(0)
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    writer = gguf.GGUFWriter(str(partial), "llama")
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
    partial.rename(path)
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


@dataclass(frozen=True)
class Counts:
    """What is timed: `tokens` tokens after a prompt, and a prompt of `prefill` tokens."""

    prompt: int
    tokens: int
    prefill: int
    threads: int


class LlamaCpp:
    """A GGUF file in llama.cpp, through the C interface: no Python but the loop."""

    def __init__(self, path: Path, counts: Counts) -> None:
        import llama_cpp

        self.api, self.counts = llama_cpp, counts
        self.api.llama_backend_init()
        silence(self.api)
        model = self.api.llama_model_default_params()
        self.model = self.api.llama_model_load_from_file(str(path).encode(), model)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path}")
        context = self.api.llama_context_default_params()
        context.n_ctx = max(counts.prompt + counts.tokens, counts.prefill) + 8
        context.n_batch = context.n_ubatch = max(512, counts.prompt)
        context.n_threads = context.n_threads_batch = counts.threads
        self.context = self.api.llama_init_from_model(self.model, context)
        self.vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self.read = path.stat().st_size

    def feed(self, ids: list[int]) -> None:
        array = (ctypes.c_int32 * len(ids))(*ids)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama_decode failed")

    def clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def best(self) -> int:
        logits = ctypes.cast(
            self.api.llama_get_logits(self.context),
            ctypes.POINTER(ctypes.c_float * self.vocab),
        ).contents
        return int(torch.frombuffer(logits, dtype=torch.float32).argmax())

    def decode(self) -> float:
        self.clear()
        self.feed(list(range(1, self.counts.prompt + 1)))
        start = time.perf_counter()
        for _ in range(self.counts.tokens):
            self.feed([self.best()])
        self.best()
        return (time.perf_counter() - start) / self.counts.tokens

    def prefill(self) -> float:
        self.clear()
        start = time.perf_counter()
        self.feed(list(range(1, self.counts.prefill + 1)))
        self.best()
        return time.perf_counter() - start
