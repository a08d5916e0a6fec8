"""A server in this process, on a tiny checkpoint with a chat template."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from dropbydrop.serve.server import Server
from dropbydrop.serve.service import Service
from tiny import tiny_model, tiny_tokenizer, write_checkpoint

NAME = "tiny"


def chat_checkpoint(folder: Path, added: Sequence[AddedToken] = (), **settings: Any) -> Path:
    """A checkpoint with levels 2, 3, 4, a tokenizer (and more tokens), and a chat template."""
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.backend_tokenizer.add_tokens(list(added))
    with tempfile.TemporaryDirectory() as made:
        tokenizer.save_pretrained(made)
        files = {path.name: path.read_bytes() for path in Path(made).iterdir()}
    model = tiny_model("llama")  # whose greedy texts do not repeat one token
    return write_checkpoint(folder / NAME, model, extra_files=files, tokenizer=False, **settings)


class Running:
    """What tests need of a server that runs."""

    def __init__(self, service: Service, address: str) -> None:
        self.service, self.address = service, address

    @property
    def engine(self) -> Any:
        return self.service.engine


@contextmanager
def running(
    out: Path, *, target: float | None = None, queue: int = 64, api_key: str | None = None
) -> Iterator[Running]:
    """Serve a checkpoint on a free port of this machine; ends without a thread left."""
    service = Service(out, None, target, queue)
    service.engine.precisions.warm_up()
    addresses: list[str] = []
    listening = threading.Event()

    def ready(address: str) -> None:
        addresses.append(address)
        listening.set()

    server = Server(service, "127.0.0.1", 0, api_key, ready)
    thread = threading.Thread(target=server.answer)
    thread.start()
    try:
        assert listening.wait(60)
        yield Running(service, addresses[0])
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        assert not service.engine.alive
