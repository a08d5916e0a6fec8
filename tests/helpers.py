"""Tiny models and checkpoints for tests: built in a fraction of a second, nothing downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dropbydrop.checkpoint import (
    CheckpointWriter,
    Embeddings,
    PlaneSpec,
    QuantizationConfig,
    StoredGroup,
)
from dropbydrop.coding.rotation import Rotation

VOCAB = 300


def tiny_config(**changes: Any) -> LlamaConfig:
    """Two blocks, hidden 64, intermediate 96 (odd factor 3), 300 tokens, tied embeddings."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**{**settings, **changes})


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama in eval mode whose logits are not all alike."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
            elif parameter.dim() == 2:
                parameter.mul_(4)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, without merges: tokens 0..2 are special, then the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i for i, c in enumerate(alphabet, 3)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def tiny_model_folder(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder of `tiny_llama` with its tokenizer."""
    tiny_llama(seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def llama_groups(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """(name, modules) of the input groups of a Llama: q/k/v, o, gate/up, down of each block."""
    for i in range(model.config.num_hidden_layers):  # type: ignore[union-attr]
        block = f"model.layers.{i}"
        yield f"{block}.qkv", [f"{block}.self_attn.{n}_proj" for n in "qkv"]
        yield f"{block}.o", [f"{block}.self_attn.o_proj"]
        yield f"{block}.gate_up", [f"{block}.mlp.{n}_proj" for n in ("gate", "up")]
        yield f"{block}.down", [f"{block}.mlp.down_proj"]


def random_codebooks(planes: Sequence[PlaneSpec], seed: int = 0) -> list[Tensor]:
    """Stored codebooks whose planes shrink by half each: float16 [K/2 or K, g]."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(plane.stored_entries, plane.group, generator=generator) / 2**m).half()
        for m, plane in enumerate(planes)
    ]


def write_checkpoint(
    out: Path,
    model: LlamaForCausalLM | None = None,
    *,
    levels: Sequence[int] = (2, 3, 4),
    embedding_bits: int = 8,
    sign_symmetric: bool = True,
    rotation: str = "full",
    level_scales: bool = False,
    extra_files: Mapping[str, bytes | Path] | None = None,
    tokenizer: bool = True,
    seed: int = 0,
    **writer: Any,
) -> Path:
    """Write a valid checkpoint of `model` (default `tiny_llama()`) with random codes.

    Everything but the linears of the blocks is the model's own. Keyword arguments beyond the ones
    named go to `CheckpointWriter`. The same arguments give the same bytes.
    """
    model = model or tiny_llama(seed)
    generator = torch.Generator().manual_seed(seed)
    planes = [PlaneSpec(sign_symmetric=sign_symmetric) for _ in range(max(levels))]
    tied = bool(model.config.tie_word_embeddings)
    input_groups, done = [], set()
    with CheckpointWriter(out, **writer) as ck:
        ck.add_codebook_set("universal", random_codebooks(planes, seed))
        for index, (name, modules) in enumerate(llama_groups(model)):
            d_in = model.get_submodule(modules[0]).in_features
            turn = group_turn(index, d_in, rotation)
            input_group = StoredGroup(name, tuple(modules), d_in, "universal", turn.spec())
            input_groups.append(input_group)
            ck.add_group(input_group, turn)
            for module in modules:
                linear = model.get_submodule(module)
                shape = (linear.out_features, d_in // 8)
                codes = [
                    torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
                    for _ in planes
                ]
                scales = 0.05 + 0.05 * torch.rand(shape[0], generator=generator)
                rows = torch.stack([scales * (1 + 0.1 * i) for i in range(len(levels))])
                bias = linear.bias
                ck.add_linear(module, codes, scales, rows if level_scales else None, bias)
                done |= {f"{module}.weight", f"{module}.bias"}
        modules = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
        for module in modules:
            ck.add_embedding(module, model.get_submodule(module).weight, embedding_bits)
            done.add(f"{module}.weight")
        for name, parameter in model.named_parameters():
            if name not in done:
                ck.add_tensor(name, parameter.detach())
        quantization = QuantizationConfig(
            max(levels),
            tuple(levels),
            tuple(planes),
            tuple(input_groups),
            Embeddings(embedding_bits, tuple(modules), tied),
            {"base_model": "tiny", "seed": seed},
        )
        config = json.loads(model.config.to_json_string(use_diff=False))
        config["architectures"] = [type(model).__name__]
        config.pop("transformers_version", None)  # so that the bytes depend on us alone
        files = dict(extra_files or {})
        if tokenizer:
            files |= _tokenizer_files()
        total = sum(parameter.numel() for parameter in model.parameters())
        return ck.finish(config, quantization, files, {"total": total})


def group_turn(index: int, d_in: int, kind: str = "full") -> Rotation:
    """The rotation of input group `index`: every second one has factors of inputs."""
    turn = Rotation.make(d_in, kind, 32 if kind == "block" else None, seed=index)
    plain = kind == "none" or index % 2 == 0
    return turn if plain else turn.scale(torch.linspace(0.7, 1.4, d_in))


def decoded_reference(model: LlamaForCausalLM, loaded: nn.Module) -> LlamaForCausalLM:
    """A plain Llama with the dense weights that `loaded` decodes to: the reference for logits."""
    from dropbydrop.runtime.modules import NestedEmbedding, NestedHead, NestedLinear

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in loaded.named_modules():
        if isinstance(module, (NestedLinear, NestedEmbedding, NestedHead)):
            state[f"{name}.weight"] = module.dense_weight()
            if getattr(module, "bias", None) is not None:
                state[f"{name}.bias"] = module.bias.detach().float()
        elif isinstance(module, (nn.Embedding, nn.Linear)):
            state[f"{name}.weight"] = module.weight.detach().float()
    plain = LlamaForCausalLM(model.config).eval()
    plain.load_state_dict(state)
    return plain


def _tokenizer_files() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tiny_tokenizer().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
