"""The command line: one thin module a command, listed in main.py.

Heavy imports stay inside the command functions, so that `dropbydrop --help` is quick.
"""
