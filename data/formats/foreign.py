"""Files that hold no rows, told by their first bytes, so that an error can say what they are and what to do.

Whatever no format recognizes is read as a log: archives, failed downloads and the formats of other tools as well.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.schema import NUM_DENSE, NUM_SPARSE, DataError

_UNPACK = "unpack it first"
_PACK = "unpack it, or pack it with gzip, xz or zstd"
_CONVERT = "convert it to Parquet or to a log first"
_DOWNLOAD = "download it again"


class _Kind(NamedTuple):
    """A kind of file: what it is, what to do with it, and the bytes at a place in the file that tell."""

    name: str
    remedy: str
    magic: bytes
    at: int = 0


# No row begins with any of these.
_BINARY = (
    _Kind("a zip archive", _UNPACK, b"PK\x03\x04"),
    _Kind("an empty zip archive", _UNPACK, b"PK\x05\x06"),
    _Kind("a tar archive", _UNPACK, b"ustar", 257),
    _Kind("a 7z archive", _UNPACK, b"7z\xbc\xaf\x27\x1c"),
    _Kind("a rar archive", _UNPACK, b"Rar!\x1a\x07"),
    _Kind("an ar archive", _UNPACK, b"!<arch>\n"),
    _Kind("a bzip2 archive", _PACK, b"BZh"),
    _Kind("an lz4 archive", _PACK, b"\x04\x22\x4d\x18"),
    _Kind("an lzip archive", _PACK, b"LZIP"),
    _Kind("an lzma archive", _PACK, b"\x5d\x00\x00"),
    _Kind("an lzop archive", _PACK, b"\x89LZO"),
    _Kind("a snappy archive", _PACK, b"\xff\x06\x00\x00sNaPpY"),
    _Kind("a compress (.Z) archive", _PACK, b"\x1f\x9d"),
    _Kind("a gzip archive, packed twice", _UNPACK, b"\x1f\x8b"),
    _Kind("an xz archive, packed twice", _UNPACK, b"\xfd7zXZ\x00"),
    _Kind("a zstd archive, packed twice", _UNPACK, b"\x28\xb5\x2f\xfd"),
    _Kind("a packed Parquet file", _UNPACK, b"PAR1"),
    _Kind("a packed array of numpy", _UNPACK, b"\x93NUMPY"),
    _Kind("an encrypted Parquet file", "decrypt it first", b"PARE"),
    _Kind("an Arrow file", _CONVERT, b"ARROW1"),
    _Kind("a Feather file", _CONVERT, b"FEA1"),
    _Kind("an ORC file", _CONVERT, b"ORC"),
    _Kind("an Avro file", _CONVERT, b"Obj\x01"),
    _Kind("an HDF5 file", _CONVERT, b"\x89HDF"),
    _Kind("an SQLite database", _CONVERT, b"SQLite format 3"),
    _Kind("UTF-16 text", "convert it to UTF-8 first (iconv -f UTF-16 -t UTF-8)", b"\xff\xfe"),
    _Kind("UTF-16 text", "convert it to UTF-8 first (iconv -f UTF-16 -t UTF-8)", b"\xfe\xff"),
)
_TEXT = (
    _Kind("a web page", _DOWNLOAD, b"<!doctype"),
    _Kind("a web page", _DOWNLOAD, b"<html"),
    _Kind("XML, perhaps the error of a server", _DOWNLOAD, b"<?xml"),
    _Kind("XML, perhaps the error of a server", _DOWNLOAD, b"<error"),
    _Kind("a pointer of Git LFS", "fetch the file (git lfs pull)", b"version https://git-lfs"),
    _Kind("a pointer of git-annex", "fetch the file (git annex get)", b"/annex/objects/"),
    _Kind("JSON", _CONVERT, b"{"),
    _Kind("JSON", _CONVERT, b"["),
)
_SEPARATORS = {b",": "commas", b";": "semicolons", b"|": "vertical bars", b" ": "spaces", b"\x01": r"\x01"}


def refuse_foreign(path: Path, start: bytes) -> None:
    """Refuse a file, or what an archive holds, that can't be text with rows in it.

    Args:
        path: of the file.
        start: its first bytes, 512 or all.

    Raises:
        DataError: it is a known kind of file. The message says which, and what to do.
    """
    for kind in _BINARY:
        if start.startswith(kind.magic, kind.at):
            raise DataError(f"{path}: {kind.name}, not rows; {kind.remedy}")


def not_rows(lines: Sequence[bytes]) -> str:
    """Return what text is, none of whose first lines has the fields of a row."""
    first = lines[0].removeprefix(b"\xef\xbb\xbf").lstrip()
    for kind in _TEXT:
        if first[: len(kind.magic)].lower() == kind.magic:
            return f"{kind.name}, not rows; {kind.remedy}"
    expected = NUM_DENSE + NUM_SPARSE + 1
    for separator, name in _SEPARATORS.items():
        if first.count(separator) + 1 in (expected - 1, expected):
            return f"not a Criteo row: its fields are separated by {name}; expected tabs"
    got = lines[0].count(b"\t") + 1
    return f"not a Criteo row: expected {expected} tab-separated fields ({expected - 1} without label), got {got}"
