"""The folder of a training run: which files it has, and that one process at a time writes them."""

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dlrm.checkpoint import CONFIG, WEIGHTS
from dlrm.training.journal import METRICS_LOG
from robe_files import locked

METRICS, CURVES, LOCK = "metrics.json", "learning_curve.png", ".lock"


class RunFolder:
    """The folder of a run.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path):
        self.path = path
        self._claim = ExitStack()
        self._is_there = lambda: False

    def claim(self) -> None:
        """Keep other trainings out of the folder until ``release``. The folder is made if need be.

        Raises:
            ValueError: it is a file, its name is not UTF-8, or another process trains in it.
            OSError: it can't be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--output: {self.path} is a file; expected a folder, or a new name")
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            raise ValueError(f"--output: {self.path}: expected a name in UTF-8, as safetensors takes it") from None
        self._claim.enter_context(_made(self.path))
        try:
            self._is_there = self._claim.enter_context(locked(self.path / LOCK, wait=False))
        except BlockingIOError:
            raise ValueError(
                f"--output: another process is training in {self.path}; wait for its end, or choose another folder"
            ) from None

    def release(self) -> None:
        """Let others in. A folder that was made, and is still empty, is removed."""
        self._claim.close()

    @property
    def is_there(self) -> bool:
        """Whether the folder that was claimed is still there."""
        return self._is_there()

    def require(self) -> None:
        """Raise OSError if somebody has deleted the folder, so that nothing is written into another one."""
        if not self.is_there:
            raise OSError(errno.ENOENT, "the folder was deleted during the run", str(self.path))

    def results(self) -> list[str]:
        """Return the names of the files of an earlier run that would be lost if another one started here."""
        names = [name for name in (WEIGHTS, CONFIG, METRICS) if (self.path / name).exists()]
        log = self.path / METRICS_LOG
        return names + [METRICS_LOG] * (log.is_file() and log.stat().st_size > 0)

    def clear(self) -> None:
        """Remove the results of an earlier run, before another one starts."""
        for name in (WEIGHTS, CONFIG, METRICS, CURVES):
            (self.path / name).unlink(missing_ok=True)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it. In the end, those that were made and are empty are removed."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):
            for path in missing:
                path.rmdir()
