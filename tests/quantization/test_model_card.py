"""The model card: the Hub's fields, and no more than is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.quantization.model_card import license_of, model_card
from tiny import write_checkpoint


def test_fields_of_the_hub(tmp_path: Path) -> None:
    quantization = Checkpoint.open(write_checkpoint(tmp_path / "out")).quantization
    front = model_card("owner/name", quantization, {2: 0.1}, "apache-2.0").split("---")[1]
    fields = dict(line.split(": ", 1) for line in front.splitlines() if ": " in line)
    assert fields["library_name"] == "dropbydrop"
    assert fields["base_model"] == "owner/name"
    assert fields["base_model_relation"] == "quantized"
    assert fields["license"] == "apache-2.0"
    for base in ("smollm2", "./folder/name", "a/b/c"):  # no ids of the Hub
        card = model_card(base, quantization, {2: 0.1})
        assert "base_model" not in card
        assert "license:" not in card
        assert "http" not in card  # nothing is linked, and so nothing that is not there


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("---\ntags: [a]\nlicense: llama3.2\n---\n# x", "llama3.2"),
        ("---\r\nlicense: 'mit'\r\n---\r\n", "mit"),
        ("# no front matter\nlicense: mit\n", None),
        ("---\nlicense: a\ufeff: b\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_taken_from_the_models_card(
    tmp_path: Path, card: str | None, name: str | None
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    assert license_of(tmp_path) == name
