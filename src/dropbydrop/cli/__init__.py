"""Commands beyond the core ones of cli.py, one module a command family.

Each module has `register(app)`, which adds its commands to the typer application. Heavy imports
stay inside the command functions, so that `dropbydrop --help` is quick.
"""
