"""Files that appear whole or not at all, and last through a power cut; and locks between processes.

robe, dlrm and data all write files with it. It stands beside them since ``import robe`` brings torch, which data needs
nowhere else: preparing logs would start 1.3 s later and take 190 MB more.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write. It becomes ``path`` if all goes well, and is removed otherwise.

    Args:
        path: replaced in one step, once the new file is whole and on the disk.

    Raises:
        OSError: it can't be written; names ``path``.
    """
    from safetensors import SafetensorError  # what its writers raise for a full disk

    part = path.with_name(path.name + ".part")
    try:
        part.unlink(missing_ok=True)  # what a kill has left, or a link that leads elsewhere
        part.touch(exist_ok=False)
        mode = part.stat().st_mode  # as the umask has it; safetensors makes files that only their owner can read
        yield part
        part.chmod(mode)
        flush(part)
        rename(part, path)
    except (OSError, SafetensorError) as error:
        number, text = getattr(error, "errno", None), getattr(error, "strerror", None)
        raise OSError(number, text or str(error), str(path)) from None
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        OSError: it can't be written; names ``path``.
    """
    with whole_file(path) as part:
        part.write_text(json.dumps(values, indent=2) + "\n")


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[Callable[[], bool]]:
    """Keep other processes out. The system releases the lock when the process dies.

    Args:
        path: of the lock, a file that exists as long as the lock is held.
        wait: wait for the process that holds the lock.

    Yields:
        a function that returns whether the file is still there. Once it was deleted, perhaps with its folder, it keeps
        nobody out.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is false.
        OSError: the file can't be opened or locked; names ``path``.
    """
    while True:
        with open(path, "ab", opener=no_link) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from None

            def is_there() -> bool:
                try:
                    return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
                except FileNotFoundError:
                    return False

            if not is_there():  # the process that held the lock removed this file after we had opened it
                continue
            try:
                yield is_there
            finally:
                if is_there():
                    path.unlink(missing_ok=True)
            return


def no_link(path: str, flags: int) -> int:
    """Open a file as ``open`` does, but not by a link that may lead anywhere (an ``opener`` for ``open``).

    Raises:
        OSError: it is a link, or can't be opened.
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def rename(old: Path, new: Path) -> None:
    """Rename a file or folder, safe against a power cut."""
    os.replace(old, new)
    flush(new.parent)


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
