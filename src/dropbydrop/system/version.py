"""The version of the installed package; rooms take it from here, not from the public face."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dropbydrop")
except PackageNotFoundError:  # run from a source tree
    __version__ = "0.1.0"
