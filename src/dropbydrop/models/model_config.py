"""A model's config, as the object of transformers or as the dictionary in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

# what families call it; the first one is what attribute maps of transformers lead to
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length")
Config = PretrainedConfig | Mapping[str, Any]


def text_settings(config: Config) -> Mapping[str, Any]:
    """The settings of the text decoder; models of several modalities keep them in a part.

    They have the names of most families (num_hidden_layers) beside those of their own (n_layer).
    """
    if not isinstance(config, Mapping):
        config = config.get_text_config().to_dict()
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else config
    kind = text.get("model_type", config.get("model_type"))
    own = CONFIG_MAPPING[str(kind)].attribute_map if str(kind) in CONFIG_MAPPING else {}
    return {**text, **{name: text[key] for name, key in own.items() if key in text}}


def context_length(config: Config) -> int | None:
    """The longest sequence that a model takes, in tokens; None if its config sets no limit."""
    text = text_settings(config)
    found = (text.get(name) for name in _CONTEXT)
    return next((int(n) for n in found if isinstance(n, int | float) and n > 0), None)
