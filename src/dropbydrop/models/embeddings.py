"""Token embedding and output head of any causal LM, found by what transformers says of them."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def embedding_name(model: PreTrainedModel) -> str:
    """Full name of the module that embeds tokens."""
    name = _name_of(model, model.get_input_embeddings())
    assert name is not None, f"{type(model).__name__} embeds no tokens"
    return name


def head_name(model: PreTrainedModel) -> str | None:
    """Full name of the output head; None for a model without one."""
    return _name_of(model, model.get_output_embeddings())


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def embedded_tokens(model: PreTrainedModel) -> int:
    """How many tokens a model knows: rows of its embedding, which may differ from its tokenizer's
    vocabulary."""
    embedding = model.get_input_embeddings()
    found = getattr(embedding, "num_embeddings", None)
    return int(model.config.get_text_config().vocab_size if found is None else found)


def output_scale(embedding: nn.Module) -> float | None:
    """Factor between an embedding's rows and its output: 1, or that of Gemma's scaled embeddings.

    None for a subclass that computes something else than a look-up, as far as one can tell.
    """
    if type(embedding) is nn.Embedding:
        return 1.0
    scale = getattr(embedding, "scalar_embed_scale", None)
    known = type(embedding).__name__.endswith("ScaledWordEmbedding")
    return float(scale) if known and isinstance(scale, (int, float)) else None
