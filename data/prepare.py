"""Prepare Criteo data for training: any format in, shards that are read at any row out, in one pass.

    python -m data.prepare train.txt --output prepared
    python -m data.prepare day_0.gz day_1.gz day_23.gz --split days --output prepared --resume
    python -m data.prepare prepared --format parquet --output parquet
    python -m data.prepare --describe prepared --plot ids.png
    python -m data.prepare --verify prepared

Sources are files or folders: Criteo's logs (plain, .gz, .xz, .zst), facebookresearch/dlrm's .npz and .bin, torchrec's
.npy triples and multi-hot .npz, Parquet, and what this program wrote. A shard takes its name once it is whole, and then
its checksum goes into the manifest: after a kill or a full disk the same command with --resume goes on, and ends with
the same bytes. Several machines (or processes) share the work with --part: see docs/data.md.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.describe import describe, plot_frequencies, table
from data.formats.opening import open_source, open_sources
from data.formats.prepared import Dataset
from data.preparation import Options, Preparation, Progress, quarantine_file
from data.program import exit_code
from data.sources import Source
from data.storage import whole_file
from data.writers import WRITERS


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*", type=Path, metavar="SRC", help="files and folders, in the order given")
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--format", choices=WRITERS, default="rows", help="of the output (default: the project's own)")
    parser.add_argument(
        "--split",
        choices=("rows", "days"),
        default="rows",
        help="rows: 5/7 of them train, 1/7 validation, 1/7 test (default). days: the first half of the last source is "
        "the test set, as MLPerf has it, its second half for validation, all before train",
    )
    parser.add_argument("--validation", nargs="+", type=Path, default=[], metavar="SRC", help="split by files: with")
    parser.add_argument("--test", nargs="+", type=Path, default=[], metavar="SRC", help="these two; SRC... train")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="threads")
    parser.add_argument("--part", type=part, default=(0, 1), metavar="I/N", help="only every N-th source from number I")
    parser.add_argument("--max-rows", type=int, metavar="N", help="read only the first N rows of each source")
    parser.add_argument("--shard-rows", type=int, default=Options.shard_rows, metavar="N", help="rows of a shard")
    parser.add_argument("--resume", action="store_true", help="go on with what is in DIR")
    parser.add_argument("--max-ind-range", type=int, metavar="N", help="ids become id %% N")
    parser.add_argument(
        "--min-count", type=int, metavar="N", help="ids that occur less often become id 1, counted in a pass before"
    )
    parser.add_argument(
        "--count-sketch",
        type=int,
        nargs="?",
        const=64,
        metavar="MB",
        help="with --min-count: count in the same pass, in so much memory (default 64); ids count from the N-th time",
    )
    parser.add_argument(
        "--on-error",
        nargs="+",
        default=["raise"],
        metavar=("raise|skip|quarantine", "FILE"),
        help="what becomes of rows that can't be read: stop there (default), leave them out, or into FILE",
    )
    parser.add_argument("--describe", type=Path, metavar="PATH", help="say what is in a file or folder of any format")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="with --describe: draw how often ids occur")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="check all files of a prepared folder")
    args = parser.parse_args(arguments)
    if sum((bool(args.sources), args.describe is not None, args.verify is not None)) != 1:
        parser.error("expected either SRC..., or --describe PATH, or --verify DIR")
    if args.sources and args.output is None:
        parser.error("--output: expected, with SRC...")
    if bool(args.validation) != bool(args.test):
        parser.error("--validation and --test: expected both or neither")
    if args.validation and args.split != "rows":
        parser.error("--split days: expected without --validation and --test")
    if args.on_error[0] not in ("raise", "skip", "quarantine") or len(args.on_error) != 1 + (
        args.on_error[0] == "quarantine"
    ):
        parser.error(f"--on-error: expected raise, skip, or quarantine FILE, got {' '.join(args.on_error)}")
    if args.count_sketch is not None and args.min_count is None:
        parser.error("--count-sketch: expected with --min-count")
    if args.plot and not args.describe:
        parser.error("--plot: expected with --describe")
    if args.workers < 1:
        parser.error("--workers: expected at least 1")
    return args


def part(text: str) -> tuple[int, int]:
    """0/4 -> (0, 4)."""
    try:
        number, count = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected I/N as 0/4, got {text!r}") from None
    if not 0 <= number < count:
        raise argparse.ArgumentTypeError(f"expected I from 0 to N - 1, got {text!r}")
    return number, count


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.describe:
        return exit_code(lambda: run_describe(args.describe, args.plot))
    if args.verify:
        return exit_code(lambda: run_verify(args.verify))
    return exit_code(lambda: run_prepare(args))


def run_prepare(args: argparse.Namespace) -> None:
    parts = {
        name: [source for path in paths for source in open_sources(path)]
        for name, paths in (("train", args.sources), ("validation", args.validation), ("test", args.test))
    }
    sources = [source for of_part in parts.values() for source in of_part]
    split: dict[str, Any] = {"by": args.split}
    if args.validation:
        split = {"by": "files"} | {name: [source.name for source in of_part] for name, of_part in parts.items()}
    if args.split == "days" and len(sources) < 2:
        raise ValueError(f"--split days: expected a source for each day, at least 2, got {len(sources)}")
    options = Options(
        format=args.format,
        shard_rows=args.shard_rows,
        max_rows=args.max_rows,
        max_ind_range=args.max_ind_range,
        min_count=args.min_count,
        sketch_bytes=None if args.count_sketch is None else args.count_sketch << 20,
        on_error=args.on_error[0],
    )
    with tqdm(unit="row", unit_scale=True, desc=args.output.name, total=_total(sources, args)) as bar:
        preparation = Preparation(
            sources, args.output, options, split, args.part, args.workers, args.resume, lambda rows: _advance(bar, rows)
        )
        done = preparation.run()
    mine = sources[args.part[0] :: args.part[1]]
    rows = sum(progress.rows for progress in done)
    print(f"{args.output}: {rows:,} rows of {len(done)} of {len(sources)} sources")
    _report_bad_rows(mine, done)
    if args.on_error[0] == "quarantine":
        _collect_bad_rows(Path(args.on_error[1]), args.output, mine)


def _total(sources: Sequence[Source], args: argparse.Namespace) -> int | None:
    rows = [source.rows for source in sources[args.part[0] :: args.part[1]]]
    if None in rows:
        return None
    return sum(min(count, args.max_rows or count) for count in rows if count is not None)


def _advance(bar: tqdm, rows: int) -> None:
    with bar.get_lock():
        bar.update(rows)


def _report_bad_rows(sources: Sequence[Source], done: Sequence[Progress]) -> None:
    for source, progress in zip(sources, done):
        if progress.bad_rows:
            more = progress.bad_rows - len(progress.bad_examples)
            print(f"{source.path}: {progress.bad_rows:,} bad rows left out:")
            print(
                "\n".join(f"  {example}" for example in progress.bad_examples) + (f"\n  and {more:,} more" * (more > 0))
            )


def _collect_bad_rows(path: Path, folder: Path, sources: Sequence[Source]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        for source in sources:
            file.write(quarantine_file(folder, source.name).read_bytes())


def run_describe(path: Path, plot: Path | None) -> None:
    source = open_source(path)
    with tqdm(unit="row", unit_scale=True, desc=path.name, total=source.rows, leave=False) as bar:
        description = describe(source, bar.update)
    print(table(description))
    if plot:
        plot_frequencies(description, plot)
        print(f"\nid frequencies: {plot}")


def run_verify(path: Path) -> None:
    dataset = Dataset(path)
    total = sum(shard.bytes for shard in dataset.shards)
    with tqdm(unit="B", unit_scale=True, desc=path.name, total=total, leave=False) as bar:
        dataset.verify(everything=True, progress=bar.update)
    print(f"{path}: {len(dataset.shards)} files, {total:,} bytes, as they were written")


if __name__ == "__main__":
    sys.exit(main())
