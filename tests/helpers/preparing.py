"""Three days of rows for tests of data.prepare, and what its runs leave behind."""

import re

from tests.helpers.criteo import make_rows, together, write_log

DAYS = [make_rows(count, seed) for seed, count in enumerate((250, 100, 130))]


ALL = together(*DAYS)


ENDS = (".gz", ".xz", ".zst")


def write_days(folder):
    """Write the days, each packed in another way, and return their paths."""
    return [write_log(folder / f"day_{i}{end}", rows, end=end) for i, (end, rows) in enumerate(zip(ENDS, DAYS))]


def contents(folder):
    """Return {name: bytes} of the files in a folder; manifests without times."""
    found = {}
    for file in folder.iterdir():
        content = file.read_bytes()
        found[file.name] = re.sub(rb'"mtime_ns": \d+', b"", content) if file.suffix == ".json" else content
    return found


def error_of(capsys):
    """Return the error that was printed, after checking that it is the last line and the only error."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert sum("error: " in line for line in lines) == 1
    assert lines[-1].startswith("error: ")
    return lines[-1]


def left_over(folder):
    """Return the names of unfinished files and locks in a folder."""
    return [file.name for file in folder.iterdir() if file.suffix in (".part", ".lock")]
