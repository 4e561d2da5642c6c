"""Prepare Criteo data for training: read it in any format, and write shards that are read from any row.

    python -m data.prepare train.txt --output prepared
    python -m data.prepare day_0.gz day_1.gz day_23.gz --split days --output prepared --resume
    python -m data.prepare prepared --format parquet --output parquet
    python -m data.prepare --describe prepared --plot ids.png
    python -m data.prepare --verify prepared

A source is a file or folder: Criteo's logs (plain, .gz, .xz, .zst), .npz and .bin files of facebookresearch/dlrm, .npy
triples and multi-hot .npz files of torchrec, Parquet, or a folder that this program wrote.

The run can be stopped at any time, by a kill or a full disk: run the same command with --resume, and it goes on and
ends with the same bytes. Several processes or machines share the work with --part. See docs/data.md.

Exit codes: 0 done; 2 options, data or disk do not allow it; 130 interrupted.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.describe import describe, plot_frequencies, table
from data.files import in_order
from data.formats.opening import WRITERS, open_source, open_sources
from data.formats.prepared import Dataset, SourceProgress
from data.preparation import Preparation, PrepareOptions, Share, quarantine_file
from data.program import exit_code
from data.schema import printable
from data.sources import Source, files_read
from robe_files import whole_file

ON_ERROR = ("raise", "skip", "quarantine")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sources",
        nargs="*",
        type=Path,
        metavar="SRC",
        help="files or folders, in the order of rows; those whose names differ only in numbers (day_0, day_1) are put "
        "in the order of the numbers",
    )
    add_output_options(parser)
    add_row_options(parser)
    add_run_options(parser)
    other = parser.add_argument_group("instead of SRC")
    other.add_argument(
        "--describe",
        type=Path,
        metavar="PATH",
        help="print what a file or folder of any format holds",
    )
    other.add_argument("--plot", type=Path, metavar="PNG", help="with --describe: also draw how often ids occur")
    other.add_argument(
        "--verify", type=Path, metavar="DIR", help="read all files of a prepared folder and compare their SHA-256"
    )
    return parser


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is written."""
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, metavar="DIR", help="folder to write, new or empty; required with SRC")
    group.add_argument(
        "--format",
        choices=WRITERS,
        default="rows",
        help="format to write (default: rows, this project's own shards); npz, bin and tsv become one file a source, "
        "npy three",
    )
    group.add_argument(
        "--shard-rows",
        type=int,
        default=PrepareOptions.shard_rows,
        metavar="N",
        help=f"rows in a shard, for rows and parquet (default: {PrepareOptions.shard_rows:,}, 168 MB of Criteo's rows)",
    )
    group.add_argument(
        "--split",
        choices=("rows", "days"),
        default="rows",
        help="rows to train, validate and test on. rows: the first 5/7, then 1/7, then 1/7 (default). days: the first "
        "half of the last source is to test on, as in MLPerf, its second half to validate on, the other sources are to "
        "train on",
    )
    group.add_argument(
        "--validation",
        nargs="+",
        type=Path,
        default=[],
        metavar="SRC",
        help="sources to validate on; with --test, SRC... are to train on",
    )
    group.add_argument(
        "--test", nargs="+", type=Path, default=[], metavar="SRC", help="sources to test on; expected with --validation"
    )


def add_row_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which rows are kept, and what becomes of ids."""
    group = parser.add_argument_group("rows and ids")
    group.add_argument("--max-rows", type=int, metavar="N", help="read the first N rows of each source (default: all)")
    group.add_argument(
        "--max-ind-range", type=int, metavar="N", help="replace each id by id %% N (default: ids stay as they are)"
    )
    group.add_argument(
        "--min-count",
        type=int,
        metavar="N",
        help="replace ids that occur fewer than N times by id 1; a first pass counts them exactly (default: "
        "ids stay as they are)",
    )
    group.add_argument(
        "--count-sketch",
        type=int,
        nargs="?",
        const=64,
        metavar="MB",
        help="with --min-count: count in the same pass, in MB megabytes (64 if not given); an id is then kept from its "
        "N-th occurrence on",
    )
    group.add_argument(
        "--on-error",
        nargs="+",
        default=["raise"],
        metavar=("raise|skip|quarantine", "FILE"),
        help="for a row that can't be read: stop (raise, the default), leave it out and count it (skip), or also write "
        "it to FILE (quarantine FILE)",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that do not change what is written."""
    group = parser.add_argument_group("run")
    group.add_argument("--resume", action="store_true", help="go on with what an earlier run left in DIR")
    group.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="threads that parse (default: one for each core)",
    )
    group.add_argument(
        "--part",
        type=share,
        default=Share(),
        metavar="I/N",
        help="prepare every N-th source, beginning with number I from 0; give all N processes the same SRC and "
        "--resume (default: 0/1, all sources)",
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and refuse options that do not go together."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if sum((bool(args.sources), args.describe is not None, args.verify is not None)) != 1:
        parser.error("expected one of SRC, --describe PATH and --verify DIR")
    if args.sources and args.output is None:
        parser.error("--output: expected with SRC")
    if bool(args.validation) != bool(args.test):
        parser.error("--validation and --test: expected both or neither")
    if args.validation and args.split != "rows":
        parser.error("--split days: expected without --validation and --test")
    action, *file = args.on_error
    if action not in ON_ERROR or len(file) != (action == "quarantine"):
        parser.error(f"--on-error: expected raise, skip, or quarantine FILE, got {' '.join(args.on_error)}")
    if args.count_sketch is not None and args.min_count is None:
        parser.error("--count-sketch: expected with --min-count")
    if args.plot and not args.describe:
        parser.error("--plot: expected with --describe")
    if args.workers < 1:
        parser.error(f"--workers: expected at least 1, got {args.workers}")
    return args


def share(text: str) -> Share:
    """Parse I/N.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    try:
        start, step = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected I/N, such as 0/4, got {text!r}") from None
    if not 0 <= start < step:
        raise argparse.ArgumentTypeError(f"expected I from 0 to N - 1, got {text!r}")
    return Share(start, step)


def main(arguments: list[str] | None = None) -> int:
    """Run the program, and return its exit code."""
    args = parse(arguments)
    if args.describe:
        return exit_code(lambda: run_describe(args.describe, args.plot))
    if args.verify:
        return exit_code(lambda: run_verify(args.verify))
    return exit_code(lambda: run_prepare(args))


def run_prepare(args: argparse.Namespace) -> None:
    """Prepare the sources of a command line."""
    parts = {
        name: [source for path in in_order(paths) for source in open_sources(path)]
        for name, paths in (("train", args.sources), ("validation", args.validation), ("test", args.test))
    }
    sources = [source for of_part in parts.values() for source in of_part]
    split: dict[str, Any] = {"by": args.split}
    if args.validation:
        split = {"by": "files"} | {name: [source.name for source in of_part] for name, of_part in parts.items()}
    if args.split == "days" and len(sources) < 2:
        raise ValueError(f"--split days: expected a source for each day, at least 2, got {len(sources)}")
    action, *quarantine = args.on_error
    options = PrepareOptions(
        format=args.format,
        shard_rows=args.shard_rows,
        max_rows=args.max_rows,
        max_ind_range=args.max_ind_range,
        min_count=args.min_count,
        sketch_bytes=None if args.count_sketch is None else args.count_sketch << 20,
        on_error=action,
    )
    mine = args.part.of(sources)
    with tqdm(unit="row", unit_scale=True, desc=printable(args.output.name), total=_total(mine, args.max_rows)) as bar:
        preparation = Preparation(
            sources, args.output, options, split, args.part, args.workers, args.resume, lambda rows: _advance(bar, rows)
        )
        for name, reason in preparation.changed.items():
            bar.write(f"{name}: prepared again: {reason}")
        if len(sources) > 1:
            tqdm.write(_order(sources, args.split))
        done = preparation.run()
    rows = sum(progress.rows for progress in done)
    print(f"{printable(args.output)}: {rows:,} rows of {len(done)} of {len(sources)} sources")
    _report_bad_rows(mine, done)
    if quarantine:
        _collect_bad_rows(Path(quarantine[0]), args.output, mine)


def _order(sources: Sequence[Source], split: str) -> str:
    """Return the order in which sources are read, as a line of text."""
    names = [printable(source.name) for source in sources]
    last = f"; {names[-1]} is to test and to validate on" if split == "days" else ""
    return f"{len(names)} sources, in this order: {', '.join(names)}{last}"


def _total(sources: Sequence[Source], max_rows: int | None) -> int | None:
    total = 0
    for source in sources:
        if source.rows is None:
            return None
        total += min(source.rows, max_rows or source.rows)
    return total


def _advance(bar: tqdm, rows: int) -> None:
    with bar.get_lock():
        bar.update(rows)


def _report_bad_rows(sources: Sequence[Source], done: Sequence[SourceProgress]) -> None:
    for source, progress in zip(sources, done):
        if progress.bad_rows:
            more = progress.bad_rows - len(progress.bad_examples)
            print(f"{printable(source.path)}: {progress.bad_rows:,} bad rows left out:")
            print(
                "\n".join(f"  {example}" for example in progress.bad_examples) + (f"\n  and {more:,} more" * (more > 0))
            )


def _collect_bad_rows(path: Path, folder: Path, sources: Sequence[Source]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished, open(unfinished, "wb") as file:
        for source in sources:
            with open(quarantine_file(folder, source.name), "rb") as bad_rows:
                shutil.copyfileobj(bad_rows, file, 1 << 20)


def run_describe(path: Path, plot: Path | None) -> None:
    """Print a description of data, and draw its id frequencies into a PNG if one is given."""
    source = open_source(path)
    source.verify()
    if files := files_read(source):
        print(files)
    with tqdm(unit="row", unit_scale=True, desc=printable(path.name), total=source.rows, leave=False) as bar:
        description = describe(source, bar.update)
    print(table(description))
    if plot:
        plot_frequencies(description, plot)
        print(f"\nid frequencies: {printable(plot)}")


def run_verify(path: Path) -> None:
    """Check all files of a prepared folder."""
    dataset = Dataset(path)
    total = sum(shard.bytes for shard in dataset.shards)
    with tqdm(unit="B", unit_scale=True, desc=printable(path.name), total=total, leave=False) as bar:
        dataset.verify(everything=True, progress=bar.update)
    print(f"{printable(path)}: {len(dataset.shards)} files, {total:,} bytes, as they were written")


if __name__ == "__main__":
    sys.exit(main())
