"""`python -m dropbydrop` is the command line."""

from .cli.main import main

main()
