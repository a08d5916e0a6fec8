"""The command line: one thin module a command.

Each module has `register(app)`, which adds its commands to the typer application. Heavy imports
stay inside the command functions, so that `dropbydrop --help` is quick.
"""
