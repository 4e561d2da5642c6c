"""Prepared folders: any rows, parts, and a clear error for a folder that was changed."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data.formats.prepared
from data.formats.opening import open_source
from data.formats.prepared import Dataset
from data.rows import Batch
from data.schema import DataError
from tests.fuzz import manifests
from tests.helpers.criteo import log_dense, make_rows, together, write_log
from tests.helpers.sources import compare, converted, names, run

ROOT = Path(data.formats.prepared.__file__).parents[2]
DAYS = [make_rows(count, seed) for seed, count in enumerate((53, 20, 31))]
ALL = together(*DAYS)


def make(folder, *options, days=DAYS):
    for i, rows in enumerate(days):
        write_log(folder / f"day_{i}", rows)
    sources = [folder / f"day_{i}" for i in range(len(days))]
    assert run(*sources, "--output", folder / "out", "--shard-rows", 20, *options) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return make(tmp_path_factory.mktemp("prepared"))


def test_shards_are_those_of_each_source(prepared):
    dataset = Dataset(prepared)
    assert [shard.rows for shard in dataset.shards] == [20, 20, 13, 20, 20, 11]
    assert [shard.bytes for shard in dataset.shards] == [160 * shard.rows for shard in dataset.shards]
    assert (dataset.rows, dataset.name, dataset.is_own) == (104, "out", True)
    assert [(source.name, source.rows) for source in dataset.sources()] == [("day_0", 53), ("day_1", 20), ("day_2", 31)]
    for source, rows in zip(dataset.sources(), DAYS):
        compare(source.take(0, source.rows), rows)
        compare(source.take(11, 17), rows[11:17])


def test_any_rows(prepared):
    dataset = Dataset(prepared)
    edges = (0, 1, 19, 20, 21, 40, 53, 54, 72, 73, 93, 103, 104)
    for start, stop in itertools.combinations_with_replacement(edges, 2):
        if start < dataset.rows:
            compare(dataset.take(start, stop), ALL[start:stop])
        batches = list(dataset.read(start, stop))
        assert sum(map(len, batches)) == stop - start
        if batches:
            batch = Batch.concatenate(batches)
            np.testing.assert_array_equal(batch.sparse, ALL.ids[start:stop])
            np.testing.assert_array_equal(batch.labels, ALL.labels[start:stop])
            np.testing.assert_allclose(batch.dense, log_dense(ALL.dense[start:stop]), rtol=1e-6)


def test_a_shard_of_no_rows_between_others(tmp_path):
    """A shard is empty if all its lines were bad."""
    rows = make_rows(60)
    lines = rows.lines()
    lines[20:40] = ["bad"] * 20
    (tmp_path / "day_0").write_text("\n".join(lines) + "\n")
    assert run(tmp_path / "day_0", "--output", tmp_path / "out", "--shard-rows", 20, "--on-error", "skip") == 0
    dataset = Dataset(tmp_path / "out")
    assert [shard.rows for shard in dataset.shards] == [20, 0, 20]
    kept = together(rows[:20], rows[40:])
    for start, stop in ((0, 40), (19, 21), (20, 40), (20, 21), (39, 40)):
        compare(dataset.take(start, stop), kept[start:stop])


def test_parts_by_rows(prepared):
    assert Dataset(prepared).parts() is None


@pytest.mark.parametrize("last", [1, 2, 30, 31])
def test_parts_by_days(tmp_path, last):
    dataset = Dataset(make(tmp_path, "--split", "days", days=[DAYS[0], DAYS[1], make_rows(last)]))
    half = 73 + -(-last // 2)
    assert dataset.parts() == {"train": range(73), "test": range(73, half), "validation": range(half, 73 + last)}


@pytest.mark.parametrize("train", [1, 2])
def test_parts_by_files(tmp_path, train):
    paths = [write_log(tmp_path / f"day_{i}", rows) for i, rows in enumerate([*DAYS, make_rows(9)])]
    options = ("--validation", *paths[train:3], "--test", paths[3], "--output", tmp_path / "out")
    assert run(*paths[:train], *options) == 0
    ends = [53, 73, 104]
    assert Dataset(tmp_path / "out").parts() == {
        "train": range(ends[train - 1]),
        "validation": range(ends[train - 1], 104),
        "test": range(104, 113),
    }


@pytest.fixture
def own(tmp_path):
    return make(tmp_path)


def refused(folder, capsys, *parts):
    """Opening raises and --verify exits 2; each says so in one line."""
    with pytest.raises(DataError) as error:
        open_source(folder)
    capsys.readouterr()
    assert run("--verify", folder) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    for message in (str(error.value), printed):
        assert "\n" not in message
        for part in parts:
            assert part in message


def test_unfinished(own, capsys):
    (own / "day_1.manifest.json").unlink()
    refused(own, capsys, f"{own}: not complete: 1 of 3 sources", "(day_1)", "--resume")
    for i in (0, 2):
        manifest = own / f"day_{i}.manifest.json"
        manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    refused(own, capsys, f"{own}: not complete: 3 of 3 sources", "(day_0, day_1, day_2)")


def test_missing_shard(own, capsys):
    (own / "day_0-00001.rows").unlink()
    refused(own, capsys, "day_0-00001.rows: changed since it was written: expected 3200 bytes, it is missing")


@pytest.mark.parametrize("size", [3199, 3201, 0])
def test_shard_of_another_size(own, capsys, size):
    os.truncate(own / "day_0-00001.rows", size)
    refused(own, capsys, f"day_0-00001.rows: changed since it was written: expected 3200 bytes, it has {size}")


@pytest.mark.parametrize("file", ["dataset.json", "day_1.manifest.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (b"[]", "expected an object"),
        (b"3", "expected an object"),
        (b'{"version": 2}', "version: expected 1, got 2"),
        (b"{}", "version: expected 1, got nothing"),
    ],
)
def test_broken_manifest(own, capsys, file, content, message):
    (own / file).write_bytes(content)
    refused(own, capsys, f"{own / file}: {message}")


def test_manifest_of_nothing(own, capsys):
    (own / "dataset.json").write_text('{"version": 1}')
    refused(own, capsys, f"{own / 'dataset.json'}: format: expected text, got nothing")
    (own / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"dataset.json: No such file"):
        Dataset(own)


def changed(path, **values):
    """Replace values of a manifest, each by what a function makes of it."""
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {name: make(manifest.get(name)) for name, make in values.items()}))


def shard(**values):
    """Return a function that changes the first shard of a list."""
    return lambda shards: [shards[0] | values, *shards[1:]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layout": lambda _: "x"}, "dataset.json: layout: expected an object"),
        ({"layout": lambda v: v | {"dense": "f8"}}, "dataset.json: layout: expected dense i4 or f4"),
        ({"layout": lambda v: v | {"hots": [1] * 25}}, "dataset.json: layout: hots: expected 26 numbers"),
        ({"layout": lambda v: v | {"hots": [1 << 40] * 26}}, "dataset.json: layout: hots: expected at most"),
        ({"layout": lambda v: v | {"ids": "i8"}}, "day_0-00000.rows: expected 20 rows of 264 bytes, got 3200 bytes"),
        ({"sources": lambda _: 1}, "dataset.json: sources: expected a list, got 1"),
        ({"sources": lambda v: [*v, v[0]]}, "dataset.json: sources: 'day_0' is there twice"),
        ({"sources": lambda _: ["../day_0"]}, "dataset.json: sources: expected a plain name in the folder"),
        ({"sources": lambda _: ["/day_0"]}, "dataset.json: sources: expected a plain name in the folder"),
        ({"sources": lambda _: [".."]}, "dataset.json: sources: expected a plain name in the folder"),
        ({"sources": lambda _: ["a\0"]}, "dataset.json: sources: expected a plain name in the folder"),
        ({"sources": lambda _: ["a\0b"]}, "dataset.json: sources: expected a plain name in the folder"),
        ({"sources": lambda _: ["a\nb"]}, r"1 of 1 sources are still to be prepared (a\nb); run data.prepare"),
        ({"sources": lambda _: ["a" * 300]}, "dataset.json: sources: expected a plain name in the folder"),
        ({"sources": lambda _: ["a" * 250]}, "not complete: 1 of 1 sources"),
        ({"sources": lambda _: []}, "out: no rows"),
        ({"split": lambda _: {"by": "hours"}}, 'dataset.json: split.by: expected "rows" or "days" or "files"'),
        ({"split": lambda _: {"by": "files"}}, "dataset.json: split: split by files: expected sources of each part"),
        (
            {"split": lambda _: {"by": "files", "train": ["day_0"], "validation": ["day_2"], "test": ["day_1"]}},
            "dataset.json: split by files: expected all sources, in their order",
        ),
        ({"split": lambda _: {"by": "days"}, "sources": lambda _: ["day_0"]}, "expected at least 2 sources, got 1"),
        ({"more": lambda _: 1}, "dataset.json: more: not a field of DatasetManifest"),
    ],
)
def test_dataset_manifest_with_a_wrong_value(own, capsys, values, message):
    changed(own / "dataset.json", **values)
    refused(own, capsys, message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shards": lambda v: v * 2}, "day_0.manifest.json: shards: 'day_0-00000.rows' is there twice"),
        ({"shards": lambda v: v[1:]}, "day_0.manifest.json: expected 53 rows, its shards have 33"),
        ({"shards": lambda _: None}, "day_0.manifest.json: shards: expected a list, got None"),
        ({"shards": shard(file="../x")}, "day_0.manifest.json: shards[0]: file: expected a plain name in the folder"),
        ({"shards": shard(file="/etc/passwd")}, "shards[0]: file: expected a plain name in the folder"),
        ({"shards": shard(file=3)}, "day_0.manifest.json: shards[0].file: expected text, got 3"),
        ({"shards": shard(file="day_1-00000.rows")}, "day_1-00000.rows: is listed twice"),
        ({"shards": shard(rows=-20)}, "shards[0]: expected rows and bytes of at least 0"),
        ({"shards": shard(rows=19)}, "day_0-00000.rows: expected 19 rows of 160 bytes, got 3200 bytes"),
        ({"shards": shard(rows=1 << 62)}, "day_0-00000.rows: expected 4611686018427387904 rows"),
        ({"shards": shard(rows=1.0)}, "shards[0].rows: expected an integer of 64 bits, got 1.0"),
        ({"shards": shard(bytes=3201)}, "day_0-00000.rows: changed since it was written: expected 3201 bytes"),
        ({"rows": lambda _: 54}, "day_0.manifest.json: lines: expected rows and bad_rows, 54 and 0, together, got 53"),
        ({"rows": lambda _: 54, "lines": lambda _: 54}, "expected 54 rows, its shards have 53"),
        ({"complete": lambda _: "no"}, "day_0.manifest.json: complete: expected true or false, got 'no'"),
    ],
)
def test_source_manifest_with_a_wrong_value(own, capsys, values, message):
    changed(own / "day_0.manifest.json", **values)
    refused(own, capsys, message)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("../secret", "is a link that leads out of the folder"),
        ("day_0-00001.rows", "is listed twice"),
        ("nowhere", "expected 3200 bytes, it is missing"),
    ],
)
def test_a_shard_that_is_a_link(own, capsys, target, message):
    (own.parent / "secret").write_bytes(bytes(3200))
    file = own / "day_0-00000.rows"
    file.unlink()
    file.symlink_to(target)
    refused(own, capsys, f"{own}/day_0-0000", message)


def test_a_folder_that_is_a_link(own, tmp_path):
    (tmp_path / "link").symlink_to(own)
    compare(Dataset(tmp_path / "link").take(0, 53), DAYS[0])


def test_nothing_is_written_outside_of_the_output(own, tmp_path, capsys):
    (own / "dataset.json").write_text((own / "dataset.json").read_text().replace("day_0", "../evil"))
    (tmp_path / "evil.manifest.json").write_bytes((own / "day_0.manifest.json").read_bytes())
    before = sorted(os.listdir(tmp_path))
    assert run(own, "--output", tmp_path / "new" / "out") == 2
    assert "sources: expected a plain name in the folder, got '../evil'" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == before


def test_a_folder_of_before_is_read(own):
    """Manifests of 0.9.0 know nothing of the sources' files."""
    for path in own.glob("day_*.json"):
        manifest = json.loads(path.read_text())
        del manifest["source"]
        path.write_text(json.dumps(manifest, indent=2) + "\n")
    compare(Dataset(own).take(0, 104), ALL)


def test_damaged_manifests_are_read_or_refused_in_one_line(tmp_path):
    """`make fuzz-manifests` does the same with a million."""
    ended = manifests.fuzz(manifests.make_folder(tmp_path), 300, 7)
    assert ended["refused"] > 200
    assert ended["read"] > 10


def test_manifest_of_another_version(own, capsys):
    manifest = json.loads((own / "dataset.json").read_text())
    (own / "dataset.json").write_text(json.dumps(manifest | {"version": 2}))
    refused(own, capsys, f"{own / 'dataset.json'}: version: expected 1, got 2")


def flip(path, keep_time):
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[777] ^= 4
    path.write_bytes(content)
    later = status.st_mtime_ns + (0 if keep_time else 10**9)
    os.utime(path, ns=(later, later))


@pytest.mark.parametrize("keep_time", [True, False])
def test_a_flipped_bit(own, keep_time, capsys):
    file = own / "day_2-00000.rows"
    flip(file, keep_time)
    dataset = Dataset(own)
    message = f"{file}: changed since it was written: expected SHA-256 .*, got "
    if keep_time:
        dataset.verify()
    else:
        with pytest.raises(DataError, match=message):
            dataset.verify()
    with pytest.raises(DataError, match=message):
        dataset.verify(everything=True)
    assert run("--verify", own) == 2
    assert f"error: {file}: changed since it was written: expected SHA-256 " in capsys.readouterr().err


def test_changed_shards_are_not_prepared_again_or_described(own, tmp_path, capsys):
    flip(own / "day_2-00000.rows", False)
    for args in (("--describe", own), (own, "--output", tmp_path / "new")):
        assert run(*args) == 2
        assert "error: " + str(own / "day_2-00000.rows: changed since it was written") in capsys.readouterr().err
    *good, bad = Dataset(own).sources()
    for source in good:
        source.verify()
    with pytest.raises(DataError, match=r"day_2-00000.rows: changed since it was written"):
        bad.verify()


def test_another_time_alone_is_no_change(own, capsys):
    os.utime(own / "day_0-00000.rows", ns=(1, 1))
    read = []
    Dataset(own).verify(progress=read.append)
    assert read == [3200]
    assert run("--verify", own) == 0
    assert f"{own}: 6 files, {104 * 160:,} bytes, as they were written" in capsys.readouterr().out


def test_verify_from_the_command_line(own):
    command = [sys.executable, "-m", "data.prepare", "--verify", own]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0
    flip(own / "day_1-00000.rows", False)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(f"error: {own / 'day_1-00000.rows'}: changed")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["npz", "parquet", "tsv"])
def test_folders_in_other_formats_are_verified_too(tmp_path, kind):
    folder = make(tmp_path, "--format", kind)
    assert run("--verify", folder) == 0
    assert not Dataset(folder).is_own
    flip(sorted(folder.glob(f"*.{kind}"))[-1], True)
    assert run("--verify", folder) == 2


def test_a_shard_that_goes_away_while_it_is_read(own):
    dataset = Dataset(own)
    os.truncate(own / "day_0-00001.rows", 1600)
    with pytest.raises(DataError, match=r"day_0-00001.rows: truncated: it ends at byte 1600"):
        dataset.take(0, 40)
    (own / "day_0-00001.rows").unlink()
    with pytest.raises(DataError, match=r"day_0-00001.rows: No such file"):
        dataset.take(0, 40)


# -- The writer ------------------------------------------------------------------------------------------------------

RECORD = np.dtype([("label", "<i4"), ("dense", "<i4", 13), ("sparse", "<u4", 26)])


def test_rows(tmp_path):
    rows = make_rows(250)
    log = write_log(tmp_path / "day_0", rows)
    folder = converted(log, "rows", tmp_path / "out")
    assert names(folder) == [f"day_0-0000{i}.rows" for i in range(3)]
    records = np.concatenate([np.fromfile(folder / name, RECORD) for name in names(folder)])
    assert [(folder / name).stat().st_size for name in names(folder)] == [16000, 16000, 8000]
    np.testing.assert_array_equal(records["label"], rows.labels)
    np.testing.assert_array_equal(records["dense"], rows.dense)
    np.testing.assert_array_equal(records["sparse"], rows.ids)
