"""`dropbydrop serve`: an OpenAI-compatible server, every request at its own precision."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from dropbydrop.system.errors import DropError

from .options import CheckpointFolder, Json, console, parse_bits


def run(
    out: CheckpointFolder,
    bits: Annotated[
        str | None, typer.Option(help="Levels to serve, such as 2,3,4 [all in OUT].")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Device: auto (a GPU if there is one), cpu, cuda, cuda:1.")
    ] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0: a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="DROPBYDROP_API_KEY", help="Key that clients must send."),
    ] = None,
    target_tps: Annotated[
        float,
        typer.Option(help="Tokens a second that each request should get; 0: no target."),
    ] = 20.0,
    queue: Annotated[int, typer.Option(help="Number of requests that may wait.")] = 32,
    as_json: Json = False,
) -> None:
    """Serve a checkpoint over HTTP as OpenAI does, every request at its own precision."""
    if not 0 <= target_tps < float("inf") or queue < 1 or not 0 <= port <= 65535:
        raise DropError(
            f"--target-tps {target_tps:g}, --queue {queue}, --port {port}: give a target of 0 or "
            "more, a queue of at least 1, and a port of 0 to 65535."
        )
    if api_key is not None and not api_key.strip():
        raise DropError("--api-key is empty: give a key, or leave it away.")
    try:
        host.encode("idna")
    except UnicodeError:
        raise DropError(f"--host {host[:80]!r}: no name or address of a machine.") from None
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise DropError(
            "serving needs starlette and uvicorn: pip install 'dropbydrop[serve]'"
        ) from None
    from dropbydrop.serve.server import LOOPBACK, Server
    from dropbydrop.serve.service import Service
    from dropbydrop.system.accelerator import pick_device
    from dropbydrop.system.console import phase, quiet_transformers

    place = pick_device(device)
    if api_key is None and host not in LOOPBACK:
        sys.stderr.write(
            f"warning: no --api-key: everybody who reaches {host} may use this server\n"
        )
    with phase("loading"), quiet_transformers():
        levels = None if bits is None else parse_bits(bits)
        service = Service(out, levels, target_tps or None, queue, place)
        service.engine.precisions.warm_up()

    def ready(address: str) -> None:
        status = service.status()
        if as_json:
            sys.stdout.write(json.dumps({"address": address, **status}) + "\n")
            sys.stdout.flush()
            return
        screen = console(False)
        screen.print(f"{service.served.name} at {address}", highlight=False)
        for level in status["levels"]:
            screen.print(
                f"  {level['id']}  {level['bytes_per_token'] / 1e6:.1f} MB a token, "
                f"{1 / level['seconds_per_token']:.0f} tokens/s alone",
                highlight=False,
            )
        screen.print(f"page at {address}, API at {address}/v1; Ctrl-C ends", highlight=False)

    Server(service, host, port, api_key, ready).answer()
