"""One reading of a model's config, from transformers' objects and from config.json."""

import json

import pytest
from transformers import AutoConfig

from dropbydrop.models.embeddings import embedding_name, head_name
from dropbydrop.models.model_config import context_length, text_settings
from tiny import save_tiny, tiny_model


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_object_and_file_say_the_same(tmp_path, family):
    """Also where a family has a name of its own for it, as GPT-2's n_positions."""
    folder = save_tiny(tmp_path / "model", family)
    config = json.loads((folder / "config.json").read_text())
    assert context_length(config) == context_length(AutoConfig.from_pretrained(folder)) == 256


def test_the_text_part_of_a_model_of_several_modalities():
    text = {"max_position_embeddings": 128, "hidden_size": 16}
    assert text_settings({"text_config": text, "hidden_size": 8})["hidden_size"] == 16
    assert context_length({"text_config": text, "max_position_embeddings": 64}) == 128


@pytest.mark.parametrize(
    "config", [{}, {"max_position_embeddings": None}, {"max_position_embeddings": -1}]
)
def test_a_config_without_a_limit(config):
    assert context_length(config) is None


def test_other_names_of_the_limit():
    assert context_length({"max_seq_len": 256}) == context_length({"n_positions": 256}) == 256


def test_names_of_embedding_and_head():
    model = tiny_model("llama")
    assert (embedding_name(model), head_name(model)) == ("model.embed_tokens", "lm_head")
    assert embedding_name(model.base_model) == "embed_tokens"
    assert head_name(model.base_model) is None
