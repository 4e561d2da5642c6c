"""A file that an export which fails leaves as it was."""

import pytest


@pytest.fixture
def old_file(tmp_path):
    """Yield an old file, and check afterwards that it is unchanged and alone in its folder."""
    (tmp_path / "model.onnx").write_text("old")
    yield tmp_path / "model.onnx"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "old"
