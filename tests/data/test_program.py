"""Exit codes and the one line on stderr."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

import data.program
from data.program import exit_code
from tests.helpers.criteo import make_rows, write_log

ROOT = Path(data.program.__file__).parent.parent


class Panic(BaseException):
    """As polars raises it."""


class DivergedError(RuntimeError):
    exit_code = 3


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("epochs: expected at least 1"), 2, "error: epochs: expected at least 1"),
        (OSError(28, "No space left on device", "runs/a"), 2, "error: runs/a: No space left on device"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device"),
        (OSError(2, "No such file or directory", "a\nb\x1b[31m"), 2, r"error: a\nb\x1b[31m: No such file or directory"),
        (ValueError("d\udcff: é"), 2, r"error: d\xff: é"),
        (MemoryError("Unable to allocate 9 PiB"), 2, "error: not enough memory: Unable to allocate 9 PiB"),
        (MemoryError(), 2, "error: not enough memory"),
        (RuntimeError("can't start new thread"), 2, "error: not enough memory or threads: can't start new thread"),
        (
            ImportError("x.so: failed to map segment"),
            2,
            "error: not enough memory or threads: x.so: failed to map segment",
        ),
        (Panic("failed to spawn thread: Os { code: 11 }"), 2, r"error: .* failed to spawn thread: Os { code: 11 }"),
        (ValueError(""), 2, None),
        (DivergedError("the loss is nan"), 3, "error: the loss is nan"),
        (ValueError("a\nb: no such day"), 2, r"error: a\nb: no such day"),
        (ValueError("tr\udce9in: no such day"), 2, r"error: tr\xe9in: no such day"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_errors_become_one_line_and_a_code(error, code, line, capsys):
    def program():
        raise error

    assert exit_code(program) == code
    printed = capsys.readouterr().err
    if line is None:  # another process has said why
        assert printed == ""
    else:
        assert printed == line + "\n" or re.fullmatch(line + "\n", printed)


def test_done_is_0_and_bugs_keep_their_traceback():
    assert exit_code(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        exit_code(raises(RuntimeError("size mismatch")))
    with pytest.raises(SystemExit):
        exit_code(raises(SystemExit(3)))


def raises(error):
    def program():
        raise error

    return program


LIMITED = """
import resource, sys
from data import prepare
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (int(sys.argv[1]) << 20),) * 2)
sys.exit(prepare.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("megabytes", [1, 4, 7])  # no thread has room for its stack of 8 MB
def test_a_program_that_is_given_no_memory_says_so_in_one_line(tmp_path, megabytes):
    log = write_log(tmp_path / "day_0", make_rows(50))
    command = [sys.executable, "-c", LIMITED, str(megabytes), log, "--output", tmp_path / "out", "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.fullmatch("error: not enough memory.*", done.stderr.splitlines()[-1])


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_stdout_cannot_encode_is_escaped(encoding, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding))
    assert exit_code(lambda: print("tr\udce9in", flush=True)) == 0
    assert written.getvalue() == rb"tr\udce9in" + b"\n"


CLOSED = """
import sys
from data.program import exit_code
def program():
    print("a", "x" * 100_000)
    sys.stderr.write("b")
sys.exit(exit_code(program))
"""


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        (">/dev/full", 2, "error: No space left on device\n"),
        ("| true", 2, "error: Broken pipe\n"),
        (">&-", 0, "b"),
        ("2>&-", 0, ""),
    ],
)
def test_streams_that_are_full_or_closed_end_in_one_line(redirected, code, said):
    command = f"set -o pipefail; {sys.executable} -c '{CLOSED}' {redirected}"
    if "pipe" in said:  # the reader leaves before anything is written
        command = command.replace("import sys", "import sys, time; time.sleep(0.3)", 1)
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, said)


def test_names_that_are_not_utf_8_are_printed_and_named(capsys):
    name = "n\udcff"
    assert exit_code(lambda: print(name)) == 0
    assert capsys.readouterr().out == "n\\udcff\n"

    def strict():
        name.encode()

    assert exit_code(strict) == 2
    assert capsys.readouterr().err == "error: n\\xff: expected a name in UTF-8\n"
