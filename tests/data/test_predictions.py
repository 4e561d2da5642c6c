"""Files of predictions, in every format."""

import os

import numpy as np
import polars as pl
import pytest

from data.predictions import FORMATS, check_name, predictions_file


def read(path):
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".parquet":
        frame = pl.read_parquet(path)
    else:
        frame = pl.read_csv(path, schema={"probability": pl.Float32})
    assert frame.columns == ["probability"]
    assert frame.dtypes == [pl.Float32]
    return frame["probability"].to_numpy()


@pytest.mark.parametrize("rows", [0, 1, 7, 100_000, 600_000])
@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_written_is_read(tmp_path, suffix, rows):
    values = np.random.default_rng(rows).random(rows, dtype=np.float32)
    values[: rows // 2] **= 9  # small ones, whose decimals are many
    with predictions_file(tmp_path / "new" / f"p{suffix}") as write:
        for piece in np.array_split(values, rows // 3000 + 1):
            write(piece)
    got = read(tmp_path / "new" / f"p{suffix}")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, values)
    assert os.listdir(tmp_path / "new") == [f"p{suffix}"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, suffix):
    path = tmp_path / f"p{suffix}"
    path.write_text("old")
    with pytest.raises(KeyError), predictions_file(path) as write:  # noqa: PT012
        write(np.ones(3, np.float32))
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_place_that_can_not_be_written_is_named(tmp_path, suffix):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / f"p{suffix}"
    with pytest.raises(OSError, match="file"), predictions_file(path):
        pass


def test_names(tmp_path):
    for name in ("p", "p.txt", "csv"):
        with pytest.raises(ValueError, match=rf"{name}: expected a name that ends with .csv, .parquet or .npy"):
            check_name(tmp_path / name)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match=r"folder.csv: is a folder; expected the name of a file"):
        check_name(tmp_path / "folder.csv")
