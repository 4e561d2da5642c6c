"""Options of data.prepare as its user gives them, what they do, and one line for what is wrong."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import data.formats.criteo_tsv
import data.preparation
from data import prepare
from data.formats.opening import open_source
from data.schema import printable
from tests.helpers.criteo import make_rows, together, write_log, write_npz, write_parquet
from tests.helpers.preparing import ALL, DAYS, error_of, left_over, write_days
from tests.helpers.sources import read, run

ROOT = Path(prepare.__file__).parent.parent


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(data.formats.criteo_tsv, "PIECE_BYTES", 7000)


@pytest.fixture
def days(tmp_path):
    return write_days(tmp_path)


@pytest.mark.parametrize("shard_rows", [1, 30, 100, 1000])
def test_rows_of_several_archives(tmp_path, days, shard_rows, capsys):
    out = tmp_path / "out"
    assert run(*days, "--output", out, "--shard-rows", shard_rows) == 0
    records = read(out)
    np.testing.assert_array_equal(records["label"], ALL.labels)
    np.testing.assert_array_equal(records["dense"], ALL.dense)
    np.testing.assert_array_equal(records["sparse"], ALL.ids)
    assert len(list(out.glob("*.rows"))) == sum(-(-len(rows) // shard_rows) for rows in DAYS)
    assert f"{out}: 480 rows of 3 of 3 sources" in capsys.readouterr().out
    assert left_over(out) == []


@pytest.mark.parametrize("shard_rows", [40, 1000])
@pytest.mark.parametrize("most", [1, 40, 99, 100, 120, 10**6])
def test_max_rows(tmp_path, days, most, shard_rows):
    run(*days, "--output", tmp_path / "out", "--max-rows", most, "--shard-rows", shard_rows)
    np.testing.assert_array_equal(read(tmp_path / "out")["sparse"], np.concatenate([rows.ids[:most] for rows in DAYS]))


@pytest.mark.parametrize("most", [1, 1000, 2**31])
def test_max_ind_range(tmp_path, days, most):
    run(*days, "--output", tmp_path / "out", "--max-ind-range", most)
    np.testing.assert_array_equal(read(tmp_path / "out")["sparse"], ALL.ids % most)


@pytest.fixture
def frequent(tmp_path):
    rows = [make_rows(count, seed, different=40) for seed, count in enumerate((300, 200))]
    return [write_log(tmp_path / f"freq_{i}", part) for i, part in enumerate(rows)], together(*rows)


@pytest.mark.parametrize("least", [1, 2, 7])
@pytest.mark.parametrize("most", [None, 100])
def test_min_count_is_exact(tmp_path, frequent, least, most):
    paths, rows = frequent
    ids = rows.ids
    if most:
        ids = np.concatenate([ids[:100], ids[300:400]])
    options = ("--max-rows", most) if most else ()
    run(*paths, "--output", tmp_path / "out", "--min-count", least, "--shard-rows", 70, *options)
    counts = [Counter(column.tolist()) for column in ids.T]
    expected = [[x if x == 0 or counts[i][x] >= least else 1 for i, x in enumerate(row)] for row in ids.tolist()]
    np.testing.assert_array_equal(read(tmp_path / "out")["sparse"], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard-rows", 0], "shard_rows: expected at least 1"),
        (["--max-rows", 0], "max_rows: expected at least 1"),
        (["--max-rows", 2**63], "max_rows: expected less than 2**63"),
        (["--max-ind-range", 2**31 + 1], "max_ind_range: expected at most 2**31"),
        (["--min-count", 0], "min_count: expected at least 1"),
        (["--min-count", 256, "--count-sketch", 1], "min_count: with a sketch expected 2 to 255"),
        (["--min-count", 2, "--count-sketch", 2**40], "not enough memory: Unable to allocate"),
        (["--min-count", 2, "--part", "0/2"], "min_count: counts the ids of all sources"),
        (["--test", "nowhere", "--validation", "nowhere"], "nowhere: No such file"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_impossible_options(tmp_path, days, options, message, capsys):
    assert run(*days, "--output", tmp_path / "out", *options) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()  # the same folder will do for the right options


def test_days_of_one_source(tmp_path, days, capsys):
    assert run(days[0], "--output", tmp_path / "out", "--split", "days") == 2
    assert "expected a source for each day, at least 2, got 1" in error_of(capsys)


def test_the_last_day_is_the_test_day_however_the_shell_sorts(tmp_path, capsys):
    rows = [make_rows(4, day) for day in range(12)]
    days = [write_log(tmp_path / f"day_{day}.gz", of_day, end=".gz") for day, of_day in enumerate(rows)]
    assert run(*sorted(days), "--split", "days", "--output", tmp_path / "out") == 0
    names = ", ".join(f"day_{day}" for day in range(12))
    printed = capsys.readouterr().out
    assert printed.startswith(f"12 sources, in this order: {names}; day_11 is to test and to validate on\n")
    source = open_source(tmp_path / "out")
    np.testing.assert_array_equal(read(source)["sparse"], together(*rows).ids)
    assert source.parts()["test"] == range(44, 46)


@pytest.mark.parametrize("damage", [lambda line: line.rpartition(b"\t")[0], lambda line: line[1:], lambda line: b""])
def test_a_damaged_first_row_is_a_bad_row_like_any_other(tmp_path, damage, capsys):
    rows = make_rows(100)
    lines = rows.text().splitlines()
    lines[0] = damage(lines[0])
    (tmp_path / "a").write_bytes(b"\n".join(lines) + b"\n")
    assert run(tmp_path / "a", "--output", tmp_path / "out", "--on-error", "skip") == 0
    assert ": 99 rows of 1 of 1 sources" in capsys.readouterr().out
    np.testing.assert_array_equal(read(tmp_path / "out")["sparse"], rows.ids[1:])
    assert run(tmp_path / "a", "--output", tmp_path / "other") == 2
    assert error_of(capsys).startswith(f"error: {tmp_path}/a:1: ")


@pytest.mark.parametrize("name", [b"tr\xe9in", b"two\nlines", b"\xff\xfe", "\u2028".encode()])
@pytest.mark.parametrize("write", [write_log, write_parquet, write_npz])
def test_any_name_of_a_file_is_printed_kept_and_read_again(tmp_path, name, write, capsys):
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    rows = make_rows(20)
    write(tmp_path / "plain.npz", rows)
    path = (tmp_path / "plain.npz").rename(folder / os.fsdecode(name + b".day"))
    if write is write_log:
        path.write_bytes(rows.text() + b"bad\n")
    options = ("--output", folder / "out", "--on-error", "quarantine", folder / "bad")
    assert run(path, *options) == 0
    assert run(path, *options, "--resume") == 0
    assert run("--verify", folder / "out") == 0
    assert run("--describe", folder / "out") == 0
    printed = capsys.readouterr()
    (printed.out + printed.err).encode()
    assert printed.out.count(f"{printable(folder)}/out: 20 rows") == 3
    np.testing.assert_array_equal(read(folder / "out")["sparse"], rows.ids)
    bad = (folder / "bad").read_bytes()
    assert bad == (
        f"{printable(path)}:21: expected 40 tab-separated fields, got 1\tbad\n".encode() * (write is write_log)
    )


def test_describe(tmp_path, capsys):
    rows = make_rows(4)
    rows.labels[:] = [1, 0, 0, 0]
    rows.dense[:, 0] = [5, -2, 2**31 - 1, -(2**31)]
    rows.dense[:, 1] = -(2**31)
    rows.ids[:, 0] = [7, 7, 9, 0]
    rows.ids[:, 1] = 0
    path = write_log(tmp_path / "day_0", rows)
    assert run("--describe", path, "--plot", tmp_path / "ids.png") == 0
    printed = capsys.readouterr().out
    assert f"{path}: 4 rows, 25.0000% positive" in printed
    of_column = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line[:4] in ("int_", "cat_")}
    assert len(of_column) == 39
    assert of_column["int_0"] == ["25.00%", "-2", "2.14748e+09"]
    assert of_column["int_1"] == ["100.00%", "-", "-"]
    assert of_column["cat_0"] == ["25.00%", "2", "50.00%", "50.0%"]
    assert of_column["cat_1"] == ["100.00%", "0", "0.00%", "0.0%"]
    assert (tmp_path / "ids.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.slow
def test_from_the_command_line(tmp_path, days):
    command = [sys.executable, "-m", "data.prepare", *days, "--output", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    order = "3 sources, in this order: day_0, day_1, day_2\n"
    assert (done.returncode, done.stdout) == (0, f"{order}{tmp_path / 'out'}: 480 rows of 3 of 3 sources\n")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'out'}: has prepared data")


def test_shares_of_sources_are_a_partition():
    sources = list(range(10))
    assert prepare.share("0/1").of(sources) == sources
    assert sorted(i for text in ("0/3", "1/3", "2/3") for i in prepare.share(text).of(sources)) == sources
    assert prepare.share("1/3").of(sources) == [1, 4, 7]


@pytest.mark.parametrize("text", ["1", "a/2", "2/2", "-1/2", "0/0", "1/2/3"])
def test_shares_that_are_none(text, capsys):
    with pytest.raises(SystemExit):
        prepare.parse(["day_0", "--output", "out", f"--part={text}"])
    assert "argument --part: expected I" in capsys.readouterr().err


def test_preparing_needs_no_torch():
    code = "import sys, data.prepare; print(sorted({'torch', 'robe', 'dlrm'} & set(sys.modules)))"
    got = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert got.stdout == "[]\n"
