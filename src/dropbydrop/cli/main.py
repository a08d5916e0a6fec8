"""Entry point of the command line. A command parses, calls one function of the library, and prints.

With --json the last line on stdout is one JSON object; tables and progress go to stderr.
User errors (errors.DropError, and what the operating system refuses) print their message and exit
with status 2, Ctrl-C with 130. SIGTERM, which schedulers send before they kill, and SIGHUP, which a
closed terminal sends, end a command as Ctrl-C does, except under torchrun and nohup.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from dropbydrop.system.errors import DropError, is_out_of_memory, of_memory
from dropbydrop.system.file_errors import of_os_error
from dropbydrop.system.version import __version__

from . import (
    bench,
    chat,
    evaluate,
    export,
    generate,
    info,
    options,
    plan,
    plugins,
    quantize,
    serve,
    transfer,
    tune,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # square brackets in help texts are text
    pretty_exceptions_enable=False,
    help="Quantize an LLM once, run it at any precision.",
)
COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize.run,
    "info": info.run,
    "eval": evaluate.run,
    "generate": generate.run,
    "chat": chat.run,
    "bench": bench.run,
    "serve": serve.run,
    "export": export.run,
    "plan": plan.run,
    "slice": transfer.slice_,
    "pull": transfer.pull,
    "tune": tune.run,
}


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Version of dropbydrop.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    pass


for name, command in COMMANDS.items():
    app.command(name)(command)
plugins.register(app)
options.with_paths(app)


def _tell(error: DropError) -> None:
    """Print an error once, however many processes torchrun has started."""
    from dropbydrop.system.console import printable
    from dropbydrop.system.distributed import PeerError, rank_of_process

    rank = rank_of_process()
    if rank == 0 or not isinstance(error, PeerError):
        sys.stderr.write(f"error{f' of rank {rank}' if rank else ''}: {printable(str(error))}\n")


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _open_streams() -> None:
    """Streams that take any text, whatever the locale, also where one was closed by who calls."""
    for name, mode, errors in (
        ("stdin", "r", "replace"),
        ("stdout", "w", "backslashreplace"),
        ("stderr", "w", "backslashreplace"),
    ):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)


def main() -> None:
    """Run the command that `sys.argv` names."""
    _open_streams()
    if "RANK" not in os.environ:
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # no SIGHUP on Windows
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _terminated)
    try:
        status = app(standalone_mode=False)  # typer returns that of typer.Exit, and 130 for Ctrl-C
    except KeyboardInterrupt:  # before a command has begun
        status = 130
    except DropError as error:
        _tell(error)
        sys.exit(2)
    except BrokenPipeError:  # whoever read stdout has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno is None:  # not of the operating system
            raise
        named = isinstance(error.filename, str)
        _tell(of_os_error(error, Path(error.filename) if named else Path.cwd()))
        sys.exit(2)
    except Exception as error:
        usage = getattr(error, "show", None)  # click's usage errors
        if usage is not None:
            usage()
        elif is_out_of_memory(error):
            _tell(of_memory(error))
        else:
            raise
        sys.exit(2)
    if status == 130:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would meet torch's ending
        sys.stderr.write("interrupted; nothing was left half-written\n")
    if isinstance(status, int) and status:
        sys.exit(status)
