"""The registry of formats, and `open_source`, which opens a file or folder of any of them.

A new format is a module with its reader and its writer, and a line in `FORMATS`.

Every format but Parquet and the logs is read at any place without reading what comes before. 32-bit ids are taken as
unsigned: Criteo's hashes come out as they are in the logs, also from tools that write them as int32. Nothing in a file
is ever unpickled.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data.files import data_files, require_regular
from data.formats.criteo_tsv import CriteoTSV, TSVWriter
from data.formats.facebook import BinWriter, FacebookBin, FacebookNpz, NpzWriter
from data.formats.parquet import CriteoParquet, ParquetWriter
from data.formats.prepared import Dataset, RowsWriter, is_prepared
from data.formats.torchrec import NpyWriter, TorchrecNpy, one_of_each_triple, triple_name
from data.formats.writer import Writer
from data.schema import DataError
from data.sources import RandomAccess, Several, SeveralRandomAccess, Source
from data.storage import open_binary


class Format(NamedTuple):
    """A format of files.

    Attributes:
        name: for ``data.prepare --format`` and in manifests.
        writer: writes its files.
        reader: opens a path.
        recognizes: called with a path and the first 6 bytes of the file, b"" for a folder; returns whether it is of
            this format, unless an earlier one in the registry has recognized it.
    """

    name: str
    writer: type[Writer]
    reader: Callable[[Path], Source]
    recognizes: Callable[[Path, bytes], bool]


FORMATS = (
    Format("rows", RowsWriter, Dataset, lambda path, start: is_prepared(path)),
    Format("parquet", ParquetWriter, CriteoParquet, lambda path, start: start[:4] == b"PAR1"),
    Format(
        "npy",
        NpyWriter,
        TorchrecNpy,
        lambda path, start: start == b"\x93NUMPY" or (start[:2] == b"PK" and triple_name(path) is not None),
    ),
    Format("npz", NpzWriter, FacebookNpz, lambda path, start: start[:2] == b"PK"),
    Format("bin", BinWriter, FacebookBin, lambda path, start: path.suffix == ".bin"),
    Format("tsv", TSVWriter, CriteoTSV, lambda path, start: True),
)
WRITERS: dict[str, type[Writer]] = {format.name: format.writer for format in FORMATS}


def open_source(path: str | Path) -> Source:
    """Open a file or folder in any format, which content and name tell.

    The files of a folder are one source, in the natural order of their names: day_2 before day_10.

    Raises:
        DataError: it does not exist, has no data, or can't be read.
    """
    path = Path(path)
    prepared = _open_prepared(path)
    if prepared:
        return prepared
    sources = _open_files(path)
    if len(sources) == 1:
        return sources[0]
    if all(isinstance(source, RandomAccess) for source in sources):
        return SeveralRandomAccess(path, sources)  # type: ignore[arg-type]
    return Several(path, sources)


def open_sources(path: Path) -> list[Source]:
    """Open a file or folder as separate sources.

    Returns:
        the sources that a prepared folder was made of; of another folder, one for each file or triple of files.

    Raises:
        DataError: it does not exist, has no data, or can't be read.
    """
    prepared = _open_prepared(path)
    return prepared.sources() if prepared else _open_files(path)


def _open_prepared(path: Path) -> Dataset | None:
    if not is_prepared(path):
        return None
    dataset = Dataset(path)  # raises if it is not whole, in whatever format its files are
    return dataset if dataset.is_own else None


def _open_files(path: Path) -> list[Source]:
    if not path.is_dir():
        return [_open_file(path)]
    files = data_files(path)
    if not files:
        raise DataError(f"{path}: no data in this folder")
    sources: dict[str, Source] = {}
    for source in map(_open_file, one_of_each_triple(files)):
        twin = sources.setdefault(source.name, source)
        if twin is not source:
            raise DataError(
                f"{path}: has {twin.path.name} and {source.path.name}; expected one file of {source.name}, whose rows "
                "would be read twice"
            )
    return list(sources.values())


def _open_file(path: Path) -> Source:
    require_regular(path)
    with open_binary(path) as file:
        start = file.read(6)
    return next(format.reader(path) for format in FORMATS if format.recognizes(path, start))
