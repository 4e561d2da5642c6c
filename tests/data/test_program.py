"""Exit codes and the one line on stderr."""

import io

import pytest

from data.program import exit_code


class DivergedError(RuntimeError):
    exit_code = 3


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("epochs: expected at least 1"), 2, "error: epochs: expected at least 1"),
        (OSError(28, "No space left on device", "runs/a"), 2, "error: runs/a: No space left on device"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device"),
        (MemoryError("too large"), 2, "error: too large"),
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
    assert capsys.readouterr().err == line + "\n"


def test_done_is_0_and_bugs_keep_their_traceback():
    assert exit_code(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 / 0)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_stdout_cannot_encode_is_escaped(encoding, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding))
    assert exit_code(lambda: print("tr\udce9in", flush=True)) == 0
    assert written.getvalue() == rb"tr\udce9in" + b"\n"
