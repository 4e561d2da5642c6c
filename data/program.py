"""How the programs end: an exit code, and for an error one line on stderr."""

import sys
from collections.abc import Callable


def exit_code(program: Callable[[], None]) -> int:
    """Run a program.

    Returns:
        0: done. 2: input, options or machine did not allow it. 130: interrupted. An exception that has an ``exit_code``
        of its own: that. One without a message is not printed: another process has said why.
    """
    try:
        program()
    except (ValueError, OSError, MemoryError) as error:
        return _fail(_describe(error), 2)
    except RuntimeError as error:
        if not hasattr(error, "exit_code"):
            raise
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _fail(message: str, code: int) -> int:
    if message:
        print(f"error: {message}", file=sys.stderr)
    return code


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
