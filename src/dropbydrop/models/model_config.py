"""A model's config, as the object of transformers or as the dictionary in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len")
Config = PretrainedConfig | Mapping[str, Any]


def text_settings(config: Config) -> Mapping[str, Any]:
    """The settings of the text decoder; models of several modalities keep them in a part."""
    if not isinstance(config, Mapping):
        return config.get_text_config().to_dict()
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def context_length(config: Config) -> int | None:
    """The longest sequence that a model takes, in tokens; None if its config sets no limit."""
    text = text_settings(config)
    found = [text.get(name) for name in _CONTEXT]
    return next((int(size) for size in found if size and int(size) > 0), None)
