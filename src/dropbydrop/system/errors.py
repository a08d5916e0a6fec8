"""Errors a user can cause or meet. Each message says what was found, why it is refused, what to do.

Everything derives from `DropError`; the command line prints its text without a traceback and
exits with status 2. Bugs raise ordinary exceptions (AssertionError, TypeError, ...) instead.
"""


class DropError(Exception):
    """Base of all errors that are about the user's input or files, not about a bug."""


class FormatError(DropError):
    """A checkpoint that is damaged, unknown, or not one of ours."""


class MissingPlaneError(FormatError):
    """A plane that was asked for is not in the folder."""


class PrecisionError(DropError):
    """A precision that this checkpoint (or this loaded view) cannot serve."""


class UnsupportedModelError(DropError):
    """A model whose structure cannot be walked or quantized; names what was found."""


class CalibrationError(DropError):
    """Calibration text that is missing, empty or too short."""


class NumericError(DropError):
    """A model whose outputs are no numbers."""


class KernelError(DropError):
    """A kernel asked for by name that this machine or build does not have."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that memory has ended: Python's, torch's on a CPU, or a GPU's."""
    told = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in told)
    )


def of_memory(error: BaseException) -> DropError:
    """What to tell when memory has ended."""
    return DropError(
        f"there is not enough memory ({first_line(error)[:200]}). Ask for less: fewer or shorter "
        "windows, fewer tokens, or a smaller model; quantize and tune tell with --dry-run what "
        "they need."
    )


def first_line(error: BaseException) -> str:
    """Kind and first line of an error of another library, for the message of one of ours."""
    kind, lines = type(error).__name__, str(error).strip().splitlines()
    return f"{kind}: {lines[0]}" if lines else kind
