"""Preparation of sources: shards written one after the other, each safe on the disk before a manifest names it."""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data.counts import CountMinSketch, Frequent, IdCounts
from data.fingerprints import difference, fingerprints
from data.formats.opening import WRITERS
from data.formats.prepared import (
    MANIFEST,
    OWN_FORMAT,
    VERSION,
    DatasetManifest,
    SourceProgress,
    check_shard,
    read_progress,
    source_manifest,
)
from data.formats.writer import Writer
from data.schema import DataError, Layout
from data.sources import Piece, Source, require_one_layout
from data.storage import check_name
from robe_files import flush, locked, no_link, write_json
from robe_json import read_json

FAULTS_KEPT = 5  # of each source, for the report


@dataclass(frozen=True)
class PrepareOptions:
    """Options that the bytes written depend on, besides the sources.

    Args:
        format: of the files, a name in `data.formats.opening.FORMATS`.
        shard_rows: lines that become one shard.
        max_rows: lines to read of each source; None: all.
        max_ind_range: ids become id % max_ind_range, as in facebookresearch/dlrm; None: they stay.
        min_count: ids that occur less often become `data.counts.RARE_ID`; None: they stay.
        sketch_bytes: memory to count ids for min_count in the same pass; None: count exactly, in a pass of its own.
        on_error: "raise", "skip" or "quarantine" a bad row.

    Raises:
        ValueError: a value is out of range.
    """

    format: str = OWN_FORMAT
    shard_rows: int = 1 << 20
    max_rows: int | None = None
    max_ind_range: int | None = None
    min_count: int | None = None
    sketch_bytes: int | None = None
    on_error: str = "raise"

    def __post_init__(self):
        for name in ("shard_rows", "max_rows", "max_ind_range", "min_count", "sketch_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
            if value is not None and value >= 1 << 63:
                raise ValueError(f"{name}: expected less than 2**63, got {value}")
        if self.max_ind_range is not None and self.max_ind_range > 1 << 31:
            raise ValueError(f"max_ind_range: expected at most 2**31, got {self.max_ind_range}")


class Share(NamedTuple):
    """A process's share of the sources: every ``step``-th, beginning with number ``start``."""

    start: int = 0
    step: int = 1

    def of(self, sources: list[Source]) -> list[Source]:
        """Return the sources of this share."""
        return sources[self.start :: self.step]


def quarantine_file(folder: Path, name: str) -> Path:
    """Return the path of a source's bad rows. Each line has file:line and cause, a tab, and the line as it was."""
    return folder / f"{name}.bad"


class Preparation:
    """A run that prepares sources, or a share of them.

    Args:
        sources: to be prepared, in the order of their rows. Their names have to differ.
        output: the folder to write.
        options: of the preparation.
        split: how the reader of the folder is to split the rows: {"by": "rows" or "days"}, or {"by": "files",
            "train": [names], "validation": [names], "test": [names]} in the order of the sources.
        share: of the sources, for this process.
        workers: threads that parse.
        resume: go on with what is in the folder.
        advance: called with the number of rows after each piece was written.

    Attributes:
        changed: why sources are to be prepared again, by name: their files have changed since, or shards are missing.
            ``run`` removes what was made of them, and where ids are counted also what was made of the others.

    Raises:
        DataError: the sources have no common layout or do not fit into the format, or the folder has something else.
        ValueError: ``share`` is not of all sources, and ids are to be counted.
    """

    def __init__(
        self,
        sources: list[Source],
        output: Path,
        options: PrepareOptions,
        split: dict[str, Any],
        share: Share = Share(),  # noqa: B008
        workers: int = 1,
        resume: bool = False,
        advance: Callable[[int], object] = lambda _: None,
    ):
        self._sources, self._output, self._options, self._workers = sources, output, options, workers
        self._advance = advance
        names: dict[str, Source] = {}
        for source in sources:
            check_name(source.name, str(source.path))
            if source.name in names:
                raise DataError(
                    f"{source.path} and {names[source.name].path}: expected files of different names, "
                    f"got two of {source.name}"
                )
            names[source.name] = source
        self.layout = require_one_layout(sources)
        WRITERS[options.format].check(self.layout)
        if share.step > 1 and options.min_count is not None:
            raise ValueError("min_count: counts the ids of all sources; expected one process (no --part)")
        self._mine = share.of(sources)
        self._stop = threading.Event()
        self._filters: list[Callable[[np.ndarray], None]] = []  # change ids, in pieces of any order
        self._sketch: CountMinSketch | None = None
        if options.min_count is not None and options.sketch_bytes is not None:
            self._sketch = CountMinSketch(self.layout.features, options.min_count, options.sketch_bytes)
        _claim(
            output / MANIFEST,
            {
                "version": VERSION,
                "format": options.format,
                "layout": self.layout.to_dict(),
                "split": split,
                "options": asdict(options),
                "sources": [source.name for source in sources],
            },
            resume,
        )
        reasons = {source.name: self._why_again(source) for source in self._mine}
        self.changed = {name: reason for name, reason in reasons.items() if reason}

    def _why_again(self, source: Source) -> str | None:
        """Say why what was made of a source can't stay; None: it can."""
        progress = read_progress(self._output, source.name)
        reason = progress.source and difference(progress.source, fingerprints(source.files()))
        try:
            for shard in progress.shards:
                check_shard(self._output, shard)
        except DataError as error:
            reason = reason or str(error)
        return reason or None

    def _forget_changed(self) -> None:
        # What ids are counted decides about the rows of all sources. Those that have changed come last: killed on the
        # way, this is done again.
        others = [source.name for source in self._mine if source.name not in self.changed]
        if self.changed and self._options.min_count is not None:
            for name in others:
                forget(self._output, name)
        for name in self.changed:
            forget(self._output, name)

    def run(self) -> list[SourceProgress]:
        """Prepare this process's share of the sources.

        Returns:
            the progress of each source of the share.

        Raises:
            DataError: a source can't be read, or has a bad row and on_error is "raise".
            OSError: a file can't be written. Whatever the error, what is in the manifests is safe.
        """
        options = self._options
        self._forget_changed()
        with ThreadPoolExecutor(self._workers) as parsers:
            try:
                if options.max_ind_range is not None:
                    self._filters.append(self._cap)
                if options.min_count is not None and not self._sketch:
                    counts = IdCounts(self.layout.features)
                    for source in self._sources:
                        for piece in self._read(source, 0, parsers, self._workers + 1):
                            counts.add(piece.records)
                    self._filters.append(Frequent(counts, options.min_count))
                return self._run_sources(parsers)
            finally:
                self._stop.set()

    def _run_sources(self, parsers: ThreadPoolExecutor) -> list[SourceProgress]:
        # What a sketch makes of a row depends on all rows before it, so sources are read one after the other.
        at_once = 1 if self._sketch or not self._mine else min(self._workers, len(self._mine))
        with ThreadPoolExecutor(at_once) as readers:
            running = [readers.submit(self._run_source, source, parsers, at_once) for source in self._mine]
            try:
                wait(running, return_when=FIRST_EXCEPTION)
                for future in running:
                    if future.done() and (error := future.exception()):
                        raise error
            finally:
                self._stop.set()  # the others stop after their piece
                for future in running:
                    future.cancel()
        return [future.result() for future in running]

    def _run_source(self, source: Source, parsers: ThreadPoolExecutor, at_once: int) -> SourceProgress:
        job = SourceJob(source, self._output, self.layout, self._options, self._sketch)
        try:
            self._advance(job.progress.rows)
            if not job.progress.complete or self._sketch:
                source.verify()
                # A sketch has to see all rows again; the job leaves out those that are in shards.
                start = 0 if self._sketch else job.progress.lines
                for piece in self._read(source, start, parsers, self._workers // at_once + 1):
                    self._advance(job.add(piece))
                job.complete()
            return job.progress
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(self._output / source.name)) from None
        finally:
            job.close()

    def _read(self, source: Source, start: int, parsers: ThreadPoolExecutor, ahead: int) -> Iterator[Piece]:
        """Yield the pieces from line ``start`` to the last one wanted, some of them read ahead."""
        stop = sys.maxsize if self._options.max_rows is None else self._options.max_rows
        if start >= stop:
            return
        for piece in self._in_order(source.pieces(start), parsers, ahead):
            wanted = piece.split(stop)[0]
            if wanted.faults and self._options.on_error == "raise":
                raise DataError(wanted.faults[0].describe(piece.path))
            yield wanted
            if piece.first + piece.lines >= stop:
                return
            if self._stop.is_set():
                raise InterruptedError("another source failed")

    def _in_order(self, calls: Iterable[Callable[[], Piece]], pool: ThreadPoolExecutor, ahead: int) -> Iterator[Piece]:
        """Yield what the calls return, in their order, while the next ones run."""
        waiting: deque[Future[Piece]] = deque()
        try:
            for call in calls:
                waiting.append(pool.submit(self._filtered, call))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _filtered(self, call: Callable[[], Piece]) -> Piece:
        piece = call()
        for keep in self._filters:
            keep(piece.records)
        return piece

    def _cap(self, records: np.ndarray) -> None:
        records["sparse"] %= self._options.max_ind_range


class SourceJob:
    """Writes the shards of a source and its manifest.

    Args:
        source: whose rows they are.
        folder: to write.
        layout: of the records.
        options: of the preparation.
        sketch: replaces rare ids, in the order of the rows; None: no sketch.

    Attributes:
        progress: of the source.
        quarantine: the open file of its bad rows; None unless on_error is "quarantine".

    Raises:
        DataError: another process is preparing the source, or its manifest is broken.
        OSError: a file can't be opened.
    """

    def __init__(
        self, source: Source, folder: Path, layout: Layout, options: PrepareOptions, sketch: CountMinSketch | None
    ):
        self._source, self._folder, self._layout, self._options, self._sketch = source, folder, layout, options, sketch
        self._name = name = source.name
        self._make = WRITERS[options.format]
        self._lock = ExitStack()
        self._lock.enter_context(source_lock(folder, name))
        self._manifest = source_manifest(folder, name)
        self._line: int | None = None  # the next one to write; None: none was written since the last shard
        self._writer: Writer | None = None
        self.quarantine: BinaryIO | None = None
        try:
            self.progress = read_progress(folder, name)
            if self.progress.source is None and not self.progress.complete:
                self.progress.source = fingerprints(source.files())
            if options.on_error == "quarantine" and not self.progress.complete:
                self.quarantine = open(quarantine_file(folder, name), "ab", opener=no_link)  # noqa: SIM115
                self.quarantine.truncate(self.progress.bad_bytes)
        except BaseException:
            self.close()
            raise
        self._bad_rows, self._bad_examples = 0, list(self.progress.bad_examples)

    def add(self, piece: Piece) -> int:
        """Write the rows of a piece, without those that are in shards already. Returns the number of rows written."""
        written = 0
        while piece.lines:
            shard_end = (piece.first // self._options.shard_rows + 1) * self._options.shard_rows
            head, piece = piece.split(shard_end if self._make.sharded else sys.maxsize)
            if self._sketch:
                self._sketch(head.records)
            if head.first < self.progress.lines or self.progress.complete:
                continue
            self._write(head)
            written += len(head.records)
            self._line = head.first + head.lines
            if self._line == shard_end and self._make.sharded:
                self.commit()
        return written

    def complete(self) -> None:
        """Write the last shard; all lines were added.

        Raises:
            DataError: the source had fewer lines than it promised, or was changed while it was read.
        """
        if not self.progress.complete:
            if self._line is not None or not self.progress.shards:
                self.commit()
            self._check_source()
            self.progress.complete = True
            write_json(self._manifest, asdict(self.progress))

    def _check_source(self) -> None:
        path, promised, most = self._source.path, self._source.rows, self._options.max_rows
        if promised is not None and self.progress.lines != min(promised, most or promised):
            raise DataError(f"{path}: expected {promised} rows, as it says, got {self.progress.lines}")
        changed = difference(self.progress.source or [], fingerprints(self._source.files()))
        if changed:
            raise DataError(f"{path}: changed while it was read: {changed}")

    def close(self) -> None:
        """Release the source, and remove what is unfinished."""
        if self._writer:
            self._writer.abort()
        if self.quarantine:
            self.quarantine.close()
        self._lock.close()

    def _open(self) -> Writer:
        if not self._writer:
            number = f"-{self.progress.lines // self._options.shard_rows:05d}" if self._make.sharded else ""
            self._writer = self._make(self._folder, self._name + number, self._layout)
        return self._writer

    def _write(self, piece: Piece) -> None:
        self._open().write(piece.records)
        self._bad_rows += len(piece.faults)
        for fault in piece.faults:
            where = fault.describe(piece.path)
            if len(self._bad_examples) < FAULTS_KEPT:
                self._bad_examples.append(where)
            if self.quarantine:
                self.quarantine.write(os.fsencode(where) + b"\t" + fault.text + b"\n")

    def commit(self) -> None:
        """Finish the shard, then enter it into the manifest."""
        writer, progress = self._open(), self.progress
        shards = writer.finish()
        if self.quarantine:
            self.quarantine.flush()
            os.fsync(self.quarantine.fileno())
            progress.bad_bytes = self.quarantine.tell()
        progress.shards += shards
        progress.rows += writer.rows
        progress.lines = self._line or 0
        progress.bad_rows += self._bad_rows
        progress.bad_examples = list(self._bad_examples)
        write_json(self._manifest, asdict(progress))
        self._writer, self._line, self._bad_rows = None, None, 0


@contextmanager
def source_lock(folder: Path, name: str) -> Iterator[None]:
    """Keep other processes away from what is made of a source.

    Args:
        folder: the prepared folder.
        name: of the source.

    Raises:
        DataError: another process is preparing it.
    """
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / f".{name}.lock", wait=False))
        except BlockingIOError:
            raise DataError(f"{folder / name}: another process is preparing it") from None
        yield


def forget(folder: Path, name: str) -> None:
    """Remove what was made of a source.

    Args:
        folder: the prepared folder.
        name: of the source.

    Raises:
        DataError: another process is preparing it.
    """
    with source_lock(folder, name):
        # The manifest goes last: killed on the way, the next run finds shards missing.
        for shard in read_progress(folder, name).shards:
            (folder / shard.file).unlink(missing_ok=True)
        flush(folder)
        source_manifest(folder, name).unlink(missing_ok=True)
        flush(folder)


def _claim(path: Path, manifest: dict[str, Any], resume: bool) -> None:
    """Write the manifest of a preparation into its folder; on resuming, check that it is there."""
    folder = path.parent
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file; expected a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", wait=True):
        if not path.exists():
            if any(not file.name.startswith(".") for file in folder.iterdir()):
                raise DataError(f"{folder}: has other files in it; expected a new or empty folder")
            return write_json(path, manifest)
        if not resume:
            raise DataError(f"{folder}: has prepared data; go on with --resume or choose another --output")
        there, here = _flat(asdict(read_json(path, DatasetManifest, DataError))), _flat(manifest)
        differences = [what for what in here if there.get(what) != here[what]]
        if differences == ["options.on_error"] and there[differences[0]] == "raise":
            # There has been no bad row so far, so it does not matter how one would have been treated.
            return write_json(path, manifest)
        if differences:
            what = differences[0]
            raise DataError(
                f"{folder}: {what}: the run to resume was started with {there.get(what)}, got {here[what]}; "
                "expected the same command"
            )


def _flat(manifest: dict[str, Any]) -> dict[str, Any]:
    """Name nested values in the manner of "options.max_rows", so that a difference has a name."""
    flat: dict[str, Any] = {}
    for name, value in manifest.items():
        flat |= {f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {name: value}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}
