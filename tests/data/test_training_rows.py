"""The rows of a run: parts, epochs and passes, as the readers of data give them."""

from itertools import chain

import numpy as np
import pytest

from data.batches import epoch_batches, split_rows, vocabulary
from data.formats.opening import open_source
from data.rows import Batch, DataError
from data.synthetic import write
from data.training_rows import TrainingRows
from tests.helpers.criteo import make_lines, write_lines

ROWS = 140


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.tsv"
    write(path, ROWS)
    return path


@pytest.fixture(scope="module")
def whole(path):
    return Batch.concatenate(list(open_source(path).read()))


def assert_rows(batches, expected):
    got = Batch.concatenate(list(batches))
    np.testing.assert_array_equal(got.sparse, expected.sparse)
    np.testing.assert_array_equal(got.labels, expected.labels)


def test_parts_are_those_of_the_data(path, whole):
    rows = TrainingRows(path)
    assert rows.ranges == dict(zip(("train", "validation", "test"), split_rows(ROWS)))
    assert rows.hots is None
    assert_rows(rows.read_training(""), whole[:100])
    for part, of_part in rows.ranges.items():
        read = list(rows.read_part(part, batch_size=30, rank=0, world_size=1))
        assert_rows(read, whole[of_part.start : of_part.stop])
        assert all(len(batch) == 30 for batch in read[:-1])
        shares = (rows.read_part(part, batch_size=30, rank=rank, world_size=3) for rank in range(3))
        assert_rows(chain.from_iterable(shares), whole[of_part.start : of_part.stop])


def test_evaluation_rows_of_their_own(path, tmp_path, whole):
    write(tmp_path / "eval.tsv", 21, seed=5)
    rows = TrainingRows(path, tmp_path / "eval.tsv")
    assert rows.ranges == {"train": range(ROWS), "validation": range(10), "test": range(10, 21)}
    other = Batch.concatenate(list(open_source(tmp_path / "eval.tsv").read()))
    assert_rows(rows.read_training(""), whole)
    assert_rows(rows.read_part("test", batch_size=5, rank=0, world_size=1), other[10:])


@pytest.mark.parametrize("eval_data", [False, True])
def test_known_ranges_are_taken_as_they_are(path, tmp_path, whole, eval_data):
    """As in the processes that do not check the rows."""
    write(tmp_path / "eval.tsv", 21, seed=5)
    arguments = (path, tmp_path / "eval.tsv" if eval_data else None)
    checked = TrainingRows(*arguments)
    taken = TrainingRows(*arguments, checked.ranges)
    assert taken.ranges == checked.ranges
    for part in checked.ranges:
        expected = Batch.concatenate(list(checked.read_part(part, batch_size=50, rank=0, world_size=1)))
        assert_rows(taken.read_part(part, batch_size=50, rank=0, world_size=1), expected)


def test_epochs_are_those_of_epoch_batches(path):
    rows = TrainingRows(path)
    source = open_source(path)
    for rank in range(2):
        got = rows.epoch(1, 2, batch_size=16, seed=7, rank=rank, world_size=2)
        expected = epoch_batches(source, range(100), 16, 7, 1, rank, 2, start=2)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(one.sparse, other.sparse)


def test_ids_are_those_of_the_training_rows(path, whole):
    rows = TrainingRows(path)
    expected = vocabulary([whole[:100]], rows.parts["train"].source.layout.features)
    for got, ids in zip(rows.count_ids(), expected, strict=True):
        np.testing.assert_array_equal(got, ids)


def test_bad_rows_are_refused_with_their_line(path, tmp_path):
    lines = path.read_text().splitlines()
    (tmp_path / "rows.tsv").write_text("\n".join([*lines[:130], "1\t2"]) + "\n")
    with pytest.raises(DataError, match=r"rows.tsv:131: expected 40"):
        TrainingRows(tmp_path / "rows.tsv")
    with pytest.raises(DataError, match=r"rows.tsv:131: expected 40"):
        TrainingRows(path, tmp_path / "rows.tsv")


def test_the_files_of_folders_are_named_before_they_are_checked(tmp_path):
    said = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for day in (9, 10):
            write_lines(tmp_path / folder / f"day_{day}", make_lines(10))
    TrainingRows(tmp_path / "a", tmp_path / "b", say=said.append)
    assert said == [f"{tmp_path / folder}: 2 files, in this order: day_9, day_10" for folder in ("a", "b")]
    TrainingRows(tmp_path / "a" / "day_9", say=said.append)
    assert len(said) == 2
