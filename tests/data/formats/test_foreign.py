"""Archives, failed downloads and other tools' files are named for what they are."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import numpy as np
import polars as pl
import pytest

from data.formats.foreign import not_rows, refuse_foreign
from data.formats.opening import open_source
from data.schema import DataError
from tests.helpers.criteo import make_rows

TEXT = make_rows(20).text()


def tar(mode):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        info = tarfile.TarInfo("train.txt")
        info.size = len(TEXT)
        archive.addfile(info, io.BytesIO(TEXT))
    return file.getvalue()


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("train.txt", TEXT)
    return file.getvalue()


def in_polars(write):
    file = io.BytesIO()
    getattr(pl.DataFrame({"a": [1]}), write)(file)
    return file.getvalue()


def numpy():
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


FILES = {
    "a.tar": (tar("w"), "a tar archive, not rows; unpack it first"),
    "a.tar.gz": (tar("w:gz"), "a tar archive"),
    "a.tgz": (tar("w:gz"), "a tar archive"),
    "a.tar.xz": (tar("w:xz"), "a tar archive"),
    "pax": (tar("w:") + b"", "a tar archive"),
    "a.zip": (zipped(), "a zip archive of \\['train.txt'\\]; unpack it"),
    "a.zip.gz": (gzip.compress(zipped()), "a zip archive, not rows"),
    "a.bz2": (bz2.compress(TEXT), "a bzip2 archive, not rows; unpack it, or pack it with gzip, xz or zstd"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(99), "a 7z archive"),
    "a.rar": (b"Rar!\x1a\x07\x01\x00" + bytes(99), "a rar archive"),
    "a.lz4": (b"\x04\x22\x4d\x18\x64" + bytes(99), "an lz4 archive"),
    "a.lzma": (lzma.compress(TEXT, lzma.FORMAT_ALONE), "an lzma archive"),
    "a.Z": (b"\x1f\x9d\x90" + bytes(99), "a compress"),
    "twice.gz": (gzip.compress(gzip.compress(TEXT)), "a gzip archive, packed twice"),
    "twice.xz": (lzma.compress(gzip.compress(TEXT)), "a gzip archive, packed twice"),
    "a.parquet.gz": (gzip.compress(in_polars("write_parquet")), "a packed Parquet file"),
    "a.npy.gz": (gzip.compress(numpy()), "a packed array of numpy"),
    "a.arrow": (in_polars("write_ipc"), "an Arrow file, not rows; convert it"),
    "a.avro": (in_polars("write_avro"), "an Avro file"),
    "utf16": (TEXT.decode().encode("utf-16"), "UTF-16 text, not rows; convert it to UTF-8"),
    "page.gz": (b"<!DOCTYPE html>\n<html>404</html>", "a web page, not rows; download it again"),
    "page.xml": (b"<?xml version='1.0'?>\n<Error>AccessDenied</Error>", "XML, perhaps the error of a server"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12345\n", "a pointer of Git LFS"),
    "a.csv": (TEXT.replace(b"\t", b","), "its fields are separated by commas; expected tabs"),
    "text": (b"Hello\n", "expected 40 tab-separated fields \\(39 without label\\), got 1"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_kinds_are_named(tmp_path, name):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"^{tmp_path}/{name}(:1)?: .*{message}"):
        open_source(tmp_path / name)


def test_rows_are_not_foreign(tmp_path):
    for text in (TEXT, make_rows(3).text(labelled=False), b"\t" * 39 + b"\n"):
        refuse_foreign(tmp_path, text[:512])


def test_a_damaged_first_line_makes_no_other_kind_of_file(tmp_path):
    (tmp_path / "a").write_bytes(b"<html>\n" + TEXT)
    assert open_source(tmp_path / "a").labelled


def test_the_number_of_fields_is_said_where_nothing_else_is_known():
    assert not_rows([b"a\tb\n"]).endswith("got 2")
