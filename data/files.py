"""Files that are given as data: those in a folder, their order, and their names in messages.

What lies in a folder is data, or known not to be data, or an error that names it: nothing is left out silently.
"""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from data.schema import DataError
from data.storage import natural_order

# Files that lie beside data: hidden ones and those that begin with "_" (Spark's _SUCCESS) too.
_NOT_DATA = re.compile(
    r"[._].*"
    r"|.*(readme|licen[cs]e)(\.(txt|rst))?"
    r"|(md5|sha\d*|check)sums?(\.txt)?"
    r"|.*\.(json|md|png|part|crc|bad|lock|md5|sha1|sha256|sha512|py|sh|ya?ml)",
    re.IGNORECASE | re.DOTALL,
)
_ENDINGS = re.compile(r"(\.(gz|xz|zst|tsv|txt|csv|npz|npy|bin|parquet))+$", re.IGNORECASE)
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def data_files(folder: Path) -> list[Path]:
    """Return the files of a folder that hold data, in the natural order of their names: day_2 before day_10.

    Raises:
        DataError: something in the folder is neither a file nor known not to be data, or is there twice.
    """
    files: dict[Path, Path] = {}
    for entry in sorted(_entries(folder), key=natural_order):
        mode = _mode(entry)
        if stat.S_ISDIR(mode):
            if _entries(entry):
                raise DataError(
                    f"{entry}: a folder, in a folder of data: expected files; name it by itself, or move it"
                )
            continue
        require_regular(entry)
        first = files.setdefault(entry.resolve(), entry)
        if first is not entry:
            raise DataError(f"{entry}: the same file as {first}: its rows would be read twice; remove one of the two")
    return list(files.values())


def require_regular(path: Path) -> None:
    """Check that a path is a file that can be read several times, as rows are.

    Raises:
        DataError: it does not exist, or is a pipe, a socket or a device.
    """
    kind = _KINDS.get(stat.S_IFMT(_mode(path)))
    if kind:
        raise DataError(
            f"{path}: {kind}; expected a regular file, since rows are read several times (logs may be compressed)"
        )


def in_order(paths: Sequence[Path]) -> list[Path]:
    """Return files and folders in the order of their rows.

    Those whose names differ only in numbers are put in the order of these, so that day_10 comes after day_9: a shell
    gives day_* as day_0, day_1, day_10. All others stay where they are.
    """
    alike: dict[str, list[Path]] = {}
    for path in paths:
        alike.setdefault(_without_numbers(path), []).append(path)
    ordered = {
        name: iter(sorted(some, key=lambda path: natural_order(Path(stem(path))))) for name, some in alike.items()
    }
    return [next(ordered[_without_numbers(path)]) for path in paths]


def stem(path: Path) -> str:
    """Return the name of the rows in a file: day_3 for day_3.gz and day_3.tsv.xz."""
    return _ENDINGS.sub("", path.name) or path.name


def _without_numbers(path: Path) -> str:
    return re.sub(r"[0-9]+", "0", stem(path))


def _entries(folder: Path) -> list[Path]:
    try:
        return [entry for entry in folder.iterdir() if not _NOT_DATA.fullmatch(entry.name)]
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}") from None


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:
        link = f"a link to {os.readlink(path)}: " if path.is_symlink() else ""
        raise DataError(f"{path}: {link}{error.strerror or error}") from None
