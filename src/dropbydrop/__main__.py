"""The command line: `dropbydrop`, and `python -m dropbydrop`.

It is interrupted as the commands are from its first import on, which takes most of a second.
"""

import sys


def main() -> None:
    """Entry point of the `dropbydrop` command."""
    try:
        from .cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
