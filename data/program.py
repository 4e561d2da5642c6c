"""Exit codes of the programs, and the one line that an error puts on stderr."""

import sys
from collections.abc import Callable

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
    try:
        program()
    except (ValueError, OSError) as error:
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


def _fail(message: str, code: int) -> int:
    if message:
        # Names of files may have anything in them; what is printed stays one line.
        line = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in message)
        print(f"error: {line}", file=sys.stderr)
    return code


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
