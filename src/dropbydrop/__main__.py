"""`python -m dropbydrop` is the command line."""

from .cli import main

main()
