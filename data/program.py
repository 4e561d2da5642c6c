"""Exit codes of the programs, and the one line that an error puts on stderr."""

import io
import os
import sys
from collections.abc import Callable

from data.schema import printable

# What Python, the loader of libraries, torch, CUDA, C++ and polars say where memory or threads run out. They raise
# RuntimeError, ImportError or an exception of their own.
_SHORTAGES = (
    "can't start new thread",
    "failed to map segment",
    "annot allocate memory",
    "can't allocate memory",
    "out of memory",
    "bad_alloc",
    "failed to spawn",
    "could not spawn",
)


def exit_code(program: Callable[[], None]) -> int:
    """Run a program, and print an error as one line on stderr.

    Args:
        program: to run.

    Returns:
        0 if it is done; 2 if input, options or machine did not allow it; 130 if it was interrupted; the ``exit_code``
        of a RuntimeError that has one. An error without a message is not printed: another process has said why.

    Raises:
        BaseException: any other one is a bug, and keeps its traceback.
    """
    _prepare_streams()
    try:
        program()
        sys.stdout.flush()  # here, where an error is still reported
    except UnicodeEncodeError as error:  # from a library that takes no other names
        if "surrogates" not in error.reason:
            raise
        return _fail(f"{error.object}: expected a name in UTF-8", 2)
    except (ValueError, OSError) as error:
        _drop_unwritten()
        return _fail(_describe(error), 2)
    except MemoryError as error:
        return _fail(f"not enough memory: {error}".removesuffix(": "), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BaseException as error:  # polars' panics are no Exception
        if isinstance(error, RuntimeError) and hasattr(error, "exit_code"):
            return _fail(str(error), error.exit_code)
        if not any(words in str(error) for words in _SHORTAGES):
            raise
        return _fail(f"not enough memory or threads: {str(error).partition(chr(10))[0]}", 2)
    return 0


def _prepare_streams() -> None:
    """Let a program print any name of a file, and run without the streams that its parent has closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_unwritten() -> None:
    """Drop what standard output does not take: Python would try once more at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    if message:
        print(f"error: {printable(message)}", file=sys.stderr)
    return code


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
