"""One server for the tests that only ask it something."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from running import Running, chat_checkpoint, running


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_checkpoint(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="session")
def server(chat_folder: Path) -> Iterator[Running]:
    with running(chat_folder) as made:
        yield made
