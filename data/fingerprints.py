"""Fingerprints of source files: they tell whether a file is the one that was prepared, without reading all of it."""

import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.schema import DataError

END_BYTES = 1 << 20  # of the beginning and of the end, which are read


@dataclass(frozen=True)
class Fingerprint:
    """What was seen of a file.

    Attributes:
        file: its name, without the folder: it may have been moved.
        bytes: its size.
        mtime_ns: when it was changed last.
        ends_sha256: of its first and last END_BYTES, in hexadecimal. Finds another file of the same size and time.
    """

    file: str
    bytes: int
    mtime_ns: int
    ends_sha256: str


def fingerprints(files: Sequence[Path]) -> list[Fingerprint]:
    """Return the fingerprints of files. Pipes and the like have none, and are left out.

    Raises:
        DataError: a file can't be read.
    """
    found = []
    for path in files:
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                continue
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                digest = hashlib.sha256(file.read(END_BYTES))
                file.seek(max(status.st_size - END_BYTES, 0))
                digest.update(file.read(END_BYTES))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        found.append(Fingerprint(path.name, status.st_size, status.st_mtime_ns, digest.hexdigest()))
    return found


def difference(then: Sequence[Fingerprint], now: Sequence[Fingerprint]) -> str | None:
    """Say in words what differs between the fingerprints of the same files at two times; None: nothing."""
    if [x.file for x in then] != [x.file for x in now]:
        return f"{', '.join(x.file for x in then)} then, {', '.join(x.file for x in now)} now"
    for old, new in zip(then, now):
        if old.bytes != new.bytes:
            return f"{old.file} had {old.bytes} bytes, has {new.bytes}"
        if old.ends_sha256 != new.ends_sha256:
            return f"{old.file} has other content"
        if old.mtime_ns != new.mtime_ns:
            return f"{old.file} has another time of change"
    return None
