"""The version of this package: the one place where it stands.

The build reads it from here (pyproject.toml), rooms import it from here; the other files that name
it are compared by a test.
"""

__version__ = "0.1.0"
