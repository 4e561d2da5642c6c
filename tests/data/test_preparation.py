"""Runs that prepare sources: the same bytes whatever happens on the way, and one line for what is wrong."""

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import data.fingerprints
import data.formats.criteo_tsv
import data.formats.facebook
import data.preparation
import data.sources
from data import prepare
from data.formats.writer import ShardFile
from tests.helpers.criteo import make_rows, together, write_log
from tests.helpers.preparing import DAYS, ENDS, contents, error_of, left_over, write_days
from tests.helpers.sources import read, run

ROOT = Path(prepare.__file__).parent.parent


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(data.formats.criteo_tsv, "PIECE_BYTES", 7000)


@pytest.fixture
def days(tmp_path):
    return write_days(tmp_path)


@pytest.fixture
def frequent(tmp_path):
    rows = [make_rows(count, seed, different=40) for seed, count in enumerate((300, 200))]
    return [write_log(tmp_path / f"freq_{i}", part) for i, part in enumerate(rows)], together(*rows)


def with_bad(path, rows, bad):
    """Write a log with bad lines {number from 0: text} in place of rows, and return the rows that are left."""
    lines = rows.lines()
    for number, text in bad.items():
        lines[number] = text
    path.write_text("\n".join(lines) + "\n")
    return rows[[i for i in range(len(rows)) if i not in bad]]


def test_max_rows_leaves_out_a_bad_line_after_them(tmp_path):
    with_bad(tmp_path / "day_0", DAYS[0], {20: "bad"})
    assert run(tmp_path / "day_0", "--output", tmp_path / "out", "--max-rows", 20) == 0
    assert run(tmp_path / "day_0", "--output", tmp_path / "other", "--max-rows", 21) == 2


@pytest.mark.parametrize("kind", ["rows", "npz", "parquet"])
def test_workers_do_not_change_a_byte(tmp_path, days, kind):
    options = ("--shard-rows", 30, "--format", kind)
    run(*days, "--output", tmp_path / "1", "--workers", 1, *options)
    run(*days, "--output", tmp_path / "3", "--workers", 3, *options)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_parts_make_what_one_run_makes(tmp_path, days):
    options = ("--shard-rows", 30, "--resume")
    run(*days, "--output", tmp_path / "one", *options)
    run(*days, "--output", tmp_path / "two", *options, "--part", "1/2")
    assert not (tmp_path / "two" / "day_0.manifest.json").exists()
    run(*days, "--output", tmp_path / "two", *options, "--part", "0/2")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


BAD = {60: "first", 61: "0\t1\r", 149: "\t".join("x" * 40), 240: "", 245: "a", 246: "b", 249: "last\tone"}


def test_a_bad_row_stops_and_leaves_the_shards_before_it(tmp_path, capsys):
    with_bad(tmp_path / "day_0", DAYS[0], BAD)
    out = tmp_path / "out"
    assert run(tmp_path / "day_0", "--output", out, "--shard-rows", 25) == 2
    assert error_of(capsys) == f"error: {tmp_path / 'day_0'}:61: expected 40 tab-separated fields, got 1"
    assert left_over(out) == []
    kept = json.loads((out / "day_0.manifest.json").read_text())
    assert [shard["rows"] for shard in kept["shards"]] == [25] * (kept["lines"] // 25)
    assert kept["complete"] is False
    # Mended, it goes on.
    write_log(tmp_path / "day_0", DAYS[0])
    assert run(tmp_path / "day_0", "--output", out, "--shard-rows", 25, "--resume") == 0
    np.testing.assert_array_equal(read(out)["sparse"], DAYS[0].ids)


def test_bad_rows_are_left_out_and_counted(tmp_path, capsys):
    left = with_bad(tmp_path / "day_0", DAYS[0], BAD)
    write_log(tmp_path / "day_1", DAYS[1])
    options = ("--output", tmp_path / "out", "--shard-rows", 25, "--on-error", "skip")
    for resume in ((), ("--resume",)):
        assert run(tmp_path / "day_0", tmp_path / "day_1", *options, *resume) == 0
        printed = capsys.readouterr().out
        assert f"{tmp_path / 'day_0'}: 7 bad rows left out:" in printed
        assert f"  {tmp_path / 'day_0'}:61: expected 40 tab-separated fields, got 1\n" in printed
        assert printed.count("\n  ") == 6
        assert "and 2 more" in printed
        assert "day_1:" not in printed
        assert ": 343 rows of 2" in printed
    np.testing.assert_array_equal(read(tmp_path / "out")["dense"], together(left, DAYS[1]).dense)


def test_a_run_that_stopped_at_a_bad_row_goes_on_without_it(tmp_path, capsys):
    log, options = tmp_path / "day_0", ("--shard-rows", 50)
    good = with_bad(log, DAYS[0], {120: "bad"})
    assert run(log, "--output", tmp_path / "out", *options) == 2
    assert "day_0:121: expected 40" in error_of(capsys)
    for on_error in (("skip",), ("quarantine", tmp_path / "bad")):  # begun with skip, it can't go on otherwise
        code = run(log, "--output", tmp_path / "out", *options, "--resume", "--on-error", *on_error)
        assert code == (0 if on_error == ("skip",) else 2)
    assert "options.on_error: the run to resume was started with skip, got quarantine" in error_of(capsys)
    np.testing.assert_array_equal(read(tmp_path / "out")["sparse"], good.ids)
    assert run(log, "--output", tmp_path / "new", *options, "--on-error", "skip") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def quarantined(path):
    """Return (line number, text) of each line of a quarantine file."""
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    return [(int(re.match(rb"[^\t]*?:(\d+): ", line)[1]) - 1, line.partition(b"\t")[2].decode()) for line in lines]


def test_bad_rows_in_quarantine(tmp_path, capsys):
    left = with_bad(tmp_path / "day_0", DAYS[0], BAD)
    with_bad(tmp_path / "day_1", DAYS[1], {5: "of day 1"})
    sources = (tmp_path / "day_0", tmp_path / "day_1")
    options = ("--shard-rows", 25, "--on-error", "quarantine")
    assert run(*sources, "--output", tmp_path / "out", *options, tmp_path / "new" / "bad") == 0
    assert quarantined(tmp_path / "new" / "bad") == [*BAD.items(), (5, "of day 1")]
    assert len(read(tmp_path / "out")) == len(left) + 99
    # Stopped on its way, and on again.
    commit = data.preparation.SourceJob.commit
    for shards in (1, 3, 6, 9):
        out, count = tmp_path / f"out {shards}", iter(range(shards))

        def stop(job, count=count):
            if next(count, None) is None:
                job.quarantine.flush()
                raise OSError(28, "No space left on device")
            commit(job)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data.preparation.SourceJob, "commit", stop)
            assert run(*sources, "--output", out, *options, tmp_path / "again", "--workers", 1) == 2
        assert run(*sources, "--output", out, *options, tmp_path / "again", "--resume") == 0
        assert (tmp_path / "again").read_bytes() == (tmp_path / "new" / "bad").read_bytes()
        assert contents(out) == contents(tmp_path / "out")


def test_count_sketch_keeps_what_was_seen_often_enough(tmp_path, frequent):
    paths, rows = frequent
    options = ("--min-count", 3, "--count-sketch", 1, "--shard-rows", 70)
    run(*paths, "--output", tmp_path / "out", *options)
    got = read(tmp_path / "out")["sparse"]
    seen, total = Counter(), Counter((i, x) for row in rows.ids.tolist() for i, x in enumerate(row))
    for row, written in zip(rows.ids.tolist(), got.tolist()):
        for i, (x, y) in enumerate(zip(row, written)):
            seen[i, x] += 1
            assert y in (x, 1)
            if seen[i, x] >= 3 or x == 0:
                assert y == x
            elif total[i, x] < 3:
                assert y == 1
    run(*paths, "--output", tmp_path / "three", *options, "--workers", 3)
    assert contents(tmp_path / "out") == contents(tmp_path / "three")
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, 5)
        assert run(*paths, "--output", tmp_path / "again", *options) == 2
    assert run(*paths, "--output", tmp_path / "again", *options, "--resume") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_a_folder_with_something_else(tmp_path, days, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    for resume in ((), ("--resume",)):
        assert run(*days, "--output", tmp_path / "out", *resume) == 2
        assert "has other files in it" in error_of(capsys)
    assert os.listdir(tmp_path / "out") == ["mine"]
    assert run(*days, "--output", days[0]) == 2
    assert "is a file; expected a new or empty folder" in error_of(capsys)


def test_a_second_run(tmp_path, days, capsys):
    out = tmp_path / "out"
    (out).mkdir()
    assert run(*days, "--output", out, "--shard-rows", 30) == 0
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.iterdir()}
    assert run(*days, "--output", out, "--shard-rows", 30) == 2
    assert "has prepared data; go on with --resume" in error_of(capsys)
    assert run(*days, "--output", out, "--shard-rows", 30, "--resume") == 0
    assert "480 rows of 3 of 3 sources" in capsys.readouterr().out
    for options, named in (
        (("--shard-rows", 31), "options.shard_rows: the run to resume was started with 30, got 31"),
        (("--shard-rows", 30, "--max-rows", 9), "options.max_rows: the run to resume was started with None, got 9"),
        (
            ("--shard-rows", 30, "--max-ind-range", 9),
            "options.max_ind_range: the run to resume was started with None, got 9",
        ),
        (("--shard-rows", 30, "--min-count", 9), "options.min_count: the run to resume was started with None, got 9"),
        (
            ("--shard-rows", 31, "--on-error", "skip"),
            "options.shard_rows: the run to resume was started with 30, got 31",
        ),
        (("--shard-rows", 30, "--format", "npz"), "format: the run to resume was started with rows, got npz"),
        (("--shard-rows", 30, "--split", "days"), "split.by: the run to resume was started with rows, got days"),
    ):
        assert run(*days, "--output", out, "--resume", *options) == 2
        assert named in error_of(capsys)
    assert run(*days[:2], "--output", out, "--resume", "--shard-rows", 30) == 2
    assert (
        "sources: the run to resume was started with ['day_0', 'day_1', 'day_2'], got ['day_0', 'day_1']"
        in error_of(capsys)
    )
    assert before == {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.iterdir()}


def test_two_sources_of_one_name(tmp_path, days, capsys):
    assert run(days[0], days[0], "--output", tmp_path / "out") == 2
    assert "expected files of different names" in error_of(capsys)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("how", ["cut", "changed"])
def test_broken_archives(tmp_path, end, how, capsys):
    write_log(tmp_path / "day_0", DAYS[0])
    path = write_log(tmp_path / f"day_1{end}", make_rows(3000), end=end)
    content = path.read_bytes()
    middle = len(content) * 3 // 4
    path.write_bytes(content[:middle] + (b"" if how == "cut" else bytes(100) + content[middle + 100 :]))
    out = tmp_path / "out"
    assert run(tmp_path / "day_0", path, "--output", out, "--shard-rows", 25, "--workers", 2) == 2
    assert re.search(rf"{path}: (truncated|corrupt)|{path}:\d+: ", error_of(capsys))
    assert left_over(out) == []


def test_two_at_once(tmp_path, days, capsys):
    out = tmp_path / "out"
    assert run(*days, "--output", out, "--max-rows", 10) == 0
    (out / "day_1.manifest.json").unlink()
    with open(out / ".day_1.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert run(*days, "--output", out, "--max-rows", 10, "--resume") == 2
        assert "day_1: another process is preparing it" in error_of(capsys)
        assert not (out / "day_1.manifest.json").exists()
    assert run(*days, "--output", out, "--max-rows", 10, "--resume") == 0
    assert left_over(out) == []


def test_a_broken_manifest_on_resume(tmp_path, days, capsys):
    out = tmp_path / "out"
    run(*days, "--output", out)
    (out / "day_1.manifest.json").write_text("{")
    assert run(*days, "--output", out, "--resume") == 2
    assert f"{out / 'day_1.manifest.json'}: not JSON: " in error_of(capsys)
    assert left_over(out) == []


# -- Sources that have changed ----------------------------------------------------------------------------------------


def identity(path):
    """What differs between two files, even of the same content."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_a_source_that_grew_is_prepared_again(tmp_path, capsys):
    """As one that was cut short by a download, and then downloaded again."""
    log, out = write_log(tmp_path / "day_0", DAYS[0][:100]), tmp_path / "out"
    write_log(tmp_path / "day_1", DAYS[1])
    options = (log, tmp_path / "day_1", "--output", out, "--shard-rows", 30)
    assert run(*options) == 0
    kept = identity(out / "day_1-00000.rows")
    write_log(log, DAYS[0])
    assert run(*options, "--resume") == 0
    printed = capsys.readouterr()
    assert re.search(r"day_0: prepared again: day_0 had \d+ bytes, has \d+\n", printed.out + printed.err)
    assert "day_1: prepared again" not in printed.out + printed.err
    np.testing.assert_array_equal(read(out)["sparse"], together(DAYS[0], DAYS[1]).ids)
    assert identity(out / "day_1-00000.rows") == kept
    assert run(*options[:-1], "30", "--resume") == 0
    assert "prepared again" not in capsys.readouterr().out


def shorter(path):
    write_log(path, DAYS[0][:40])


def of_the_same_size_and_time(path):
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:100].replace(b"\t2", b"\t3") + content[100:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def of_the_same_ends(path):
    """In a large file, only the time tells."""
    content = path.read_bytes()
    path.write_bytes(content[:9000].replace(b"\t2", b"\t3") + content[9000:])


@pytest.mark.parametrize("change", [shorter, of_the_same_size_and_time, of_the_same_ends])
@pytest.mark.parametrize("complete", [True, False])
def test_any_change_is_seen(tmp_path, change, complete, monkeypatch):
    monkeypatch.setattr(data.fingerprints, "END_BYTES", 100)
    log, out = write_log(tmp_path / "day_0", DAYS[0]), tmp_path / "out"
    if complete:
        assert run(log, "--output", out, "--shard-rows", 30) == 0
    else:
        with pytest.MonkeyPatch.context() as patch:
            fail_after(patch, 4)
            assert run(log, "--output", out, "--shard-rows", 30) == 2
        assert list(out.glob("*.rows"))
    change(log)
    assert run(log, "--output", tmp_path / "new", "--shard-rows", 30) == 0
    assert run(log, "--output", out, "--shard-rows", 30, "--resume") == 0
    assert contents(out) == contents(tmp_path / "new")


@pytest.mark.parametrize("sketch", [(), ("--count-sketch", 1)])
def test_where_ids_are_counted_a_changed_source_changes_all(tmp_path, frequent, sketch):
    (first, second), _ = frequent
    options = (first, second, "--min-count", 3, *sketch, "--shard-rows", 70)
    assert run(*options, "--output", tmp_path / "out") == 0
    write_log(second, make_rows(150, 7, different=40))
    assert run(*options, "--output", tmp_path / "new") == 0
    # Killed while it removes what was made, it begins anew.
    with pytest.MonkeyPatch.context() as patch:
        forget = data.preparation.forget

        def killed(folder, name):
            forget(folder, name)
            raise OSError(5, "Input/output error")

        patch.setattr(data.preparation, "forget", killed)
        assert run(*options, "--output", tmp_path / "out", "--resume") == 2
    assert run(*options, "--output", tmp_path / "out", "--resume") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_a_source_without_all_its_shards_is_prepared_again(tmp_path, days):
    options = (*days, "--shard-rows", 30)
    run(*options, "--output", tmp_path / "whole")
    run(*options, "--output", tmp_path / "out")
    (tmp_path / "out" / "day_0-00002.rows").unlink()
    os.truncate(tmp_path / "out" / "day_1-00001.rows", 100)
    assert run(*options, "--output", tmp_path / "out", "--resume") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_of_before_is_gone_on_with(tmp_path, days):
    """Manifests of 0.9.0 know nothing of the sources' files: what is there stays, and the rest is added."""
    options = (*days, "--shard-rows", 30)
    run(*options, "--output", tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, 9)
        assert run(*options, "--output", out, "--workers", 1) == 2
    for path in out.glob("day_*.json"):
        manifest = json.loads(path.read_text())
        del manifest["source"]
        path.write_text(json.dumps(manifest))
    before = {path: identity(path) for path in out.glob("*.rows")}
    assert run(*options, "--output", out, "--resume") == 0
    assert before
    assert {path: identity(path) for path in before} == before
    np.testing.assert_array_equal(read(out)["sparse"], read(tmp_path / "whole")["sparse"])


def test_a_source_that_changes_while_it_is_read(tmp_path, capsys):
    log, commit = write_log(tmp_path / "day_0", DAYS[0]), data.preparation.SourceJob.commit

    def appended(job):
        commit(job)
        write_log(log, DAYS[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.preparation.SourceJob, "commit", appended)
        assert run(log, "--output", tmp_path / "out") == 2
    assert re.search(rf"{log}: changed while it was read: day_0 had \d+ bytes, has \d+", error_of(capsys))
    assert run(log, "--output", tmp_path / "out", "--resume") == 0
    np.testing.assert_array_equal(read(tmp_path / "out")["sparse"], DAYS[1].ids)


def test_a_source_of_fewer_rows_than_it_promised(tmp_path, capsys):
    log = write_log(tmp_path / "day_0", DAYS[0])
    assert run(log, "--output", tmp_path / "npz", "--format", "npz") == 0

    class Shorter(data.formats.facebook.FacebookNpz):
        def pieces(self, start=0):
            return iter(list(super().pieces(start))[:-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.sources, "PIECE_ROWS", 40)
        sources = [Shorter(tmp_path / "npz" / "day_0.npz")]
        preparation = data.preparation.Preparation(
            sources, tmp_path / "out", data.preparation.PrepareOptions(), {"by": "rows"}
        )
        with pytest.raises(ValueError, match=r"day_0.npz: expected 250 rows, as it says, got 240"):
            preparation.run()
    assert not json.loads((tmp_path / "out" / "day_0.manifest.json").read_text())["complete"]


@pytest.mark.parametrize("file", ["day_0_dense.npy", "day_0_sparse.npy", "day_0_labels.npy"])
def test_each_file_of_a_triple_counts(tmp_path, file, capsys):
    for folder, rows in (("a", DAYS[1]), ("b", make_rows(100, 9))):
        log = write_log(tmp_path / "day_0", rows)
        assert run(log, "--output", tmp_path / folder, "--format", "npy") == 0
    triple = (tmp_path / "a" / "day_0_dense.npy", "--output", tmp_path / "out")
    assert run(*triple) == 0
    os.replace(tmp_path / "b" / file, tmp_path / "a" / file)
    assert run(*triple, "--resume") == 0
    printed = capsys.readouterr()
    assert f"day_0: prepared again: {file} has other content" in printed.out + printed.err


@pytest.mark.parametrize("name", [".day_0.lock", "day_0-00000.rows.part", "day_0.bad"])
def test_links_in_a_folder_from_elsewhere_are_not_followed(tmp_path, name, capsys):
    log, out = write_log(tmp_path / "day_0", DAYS[0]), tmp_path / "out"
    options = (log, "--output", out, "--on-error", "quarantine", tmp_path / "bad")
    assert run(*options) == 0
    (out / "day_0.manifest.json").unlink()
    (tmp_path / "mine").write_text("mine")
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to("../mine")
    assert run(*options, "--resume") == 2
    assert error_of(capsys).endswith(": Too many levels of symbolic links")
    assert (tmp_path / "mine").read_text() == "mine"


def fail_after(patch, writes):
    """Make the disk full after so many writes."""
    write, count = ShardFile.write, iter(range(writes))

    def full(self, content):
        if next(count, None) is None:
            raise OSError(28, "No space left on device")
        write(self, content)

    patch.setattr(ShardFile, "write", full)


@pytest.mark.parametrize("writes", [0, 1, 7, 14])
@pytest.mark.parametrize("workers", [1, 3])
def test_full_disk(tmp_path, days, writes, workers, capsys):
    options = ("--shard-rows", 30, "--workers", workers)
    run(*days, "--output", tmp_path / "whole", *options)
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, writes)
        assert run(*days, "--output", out, *options) == 2
    assert re.fullmatch(rf"error: {out}/day_\d: No space left on device", error_of(capsys))
    assert left_over(out) == []
    assert run(*days, "--output", out, *options, "--resume") == 0
    assert contents(out) == contents(tmp_path / "whole")


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
from data.prepare import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("kind", ["rows", "npz", "npy", "bin", "parquet", "tsv"])
def test_a_file_the_system_does_not_take(tmp_path, days, kind):
    options = [*days, "--format", kind, "--workers", "1"]
    run(*options, "--output", tmp_path / "whole")
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *options, "--output", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == f"error: {out}/day_0: File too large"
    assert "Traceback" not in done.stderr
    assert left_over(out) == []
    assert run(*options, "--output", out, "--resume") == 0
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    paths = [write_log(tmp_path / f"day_{i}{end}", make_rows(3000, i), end=end) for i, end in enumerate(("", ".gz"))]
    options = ["--shard-rows", "10", "--workers", "2"]
    run(*paths, "--output", tmp_path / "whole", *options)
    out, killed = tmp_path / "out", 0
    command = [sys.executable, "-m", "data.prepare", *paths, "--output", out, *options, "--resume"]
    moments = random.Random(1)
    for _ in range(6):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # From when it works, not from when it starts.
        before = len(list(out.glob("*.rows"))) if out.exists() else 0
        while process.poll() is None and (not out.exists() or len(list(out.glob("*.rows"))) == before):
            time.sleep(0.001)
        time.sleep(moments.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed > 1
    assert run(*paths, "--output", out, *options, "--resume") == 0
    assert left_over(out) == []
    assert contents(out) == contents(tmp_path / "whole")
    assert run("--verify", out) == 0
