"""Use a trained DLRM: predict, measure speed, export, and run MLPerf's inference benchmark.

Write a click probability for each row of the data, in order:

    python infer.py predict --checkpoint runs/robe --data rows.tsv --output predictions.csv

Time the model at batch sizes from 1 to 16,384, beside the same MLPs with full tables:

    python infer.py benchmark --checkpoint runs/robe --data rows.tsv --against full

Write the model as one file that runs without this project, for ONNX Runtime or (--format aoti, model.pt2) for torch:

    python infer.py export --checkpoint runs/robe --format onnx --output model.onnx

Run MLPerf's LoadGen, which issues samples of 100 to 700 rows as for dlrm-v2 and times the answers:

    python infer.py loadgen --checkpoint runs/robe --data prepared --scenario Server --find-rate

The data may be in any format of docs/data.md. "python infer.py COMMAND --help" lists the options of a command;
docs/inference.md has more on each, and figures.

Exit codes: 0 done; 1 the LoadGen run is INVALID; 2 options, data or machine do not allow it; 130 interrupted.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data.batches import in_background, rebatch
from data.formats.opening import open_source
from data.formats.prepared import PARTS
from data.parts import check, split
from data.predictions import check_name, predictions_file
from data.program import exit_code
from data.rows import Batch, to_batch
from data.schema import NUM_SPARSE, DataError
from data.sources import RandomAccess, Source, files_read
from data.synthetic import Signal
from dlrm import DLRM, checkpoint, plots
from dlrm.inference import loadgen
from dlrm.inference.export import FORMATS, export
from dlrm.inference.loadgen_logs import describe
from dlrm.inference.loadgen_system import LabelledRows
from dlrm.inference.predictor import DTYPES, Predictor
from dlrm.inference.throughput import BATCH_SIZES, STAGES, make_candidates, measure_all, report, score_all
from dlrm.machine import environment
from dlrm.metrics import EVALUATION_BATCH, Scores
from robe import backend
from robe_files import write_json

TIMED_ROWS = 1 << 16  # so many that their ids do not stay in the caches


class Selection(NamedTuple):
    """Rows of a source; None: to the end, of a source that does not know its length."""

    source: Source
    rows: range | None

    @property
    def length(self) -> int | None:
        """The number of rows, if it is known."""
        return None if self.rows is None else len(self.rows)

    def batches(self) -> Iterator[Batch]:
        """Yield batches of an even size, read in the background."""
        start, stop = (0, None) if self.rows is None else (self.rows.start, self.rows.stop)
        return in_background(lambda: rebatch(self.source.read(start, stop), EVALUATION_BATCH))

    def first(self, count: int) -> Batch:
        """Return the first rows as one batch."""
        start, end = (0, count) if self.rows is None else (self.rows.start, self.rows.stop)
        return Batch.concatenate(list(self.source.read(start, min(start + count, end))))


def open_rows(path: Path, model: DLRM, folder: Path, part: str | None = None) -> Selection:
    """Open data, verify it, and check that it is of the kind that the model was trained on.

    Args:
        path: file or folder.
        model: names the ids of each feature.
        folder: of the model; says what else it was trained on.
        part: "train", "validation" or "test", as train.py splits the data; None: all rows.
    """
    source = open_source(path)
    if files := files_read(source):
        print(files)
    source.verify()
    if source.layout.hots != model.config.data_hots:
        raise DataError(
            f"{path}: has {describe_hots(source.layout.hots)}, the model was trained on "
            f"{describe_hots(model.config.data_hots)}"
        )
    checkpoint.require_inputs(checkpoint.describe(folder).inputs, source.layout.inputs(), path)
    if part is None:
        return Selection(source, None if source.rows is None else range(source.rows))
    rows = check(source) if source.rows is None else source.rows
    return Selection(source, split(path, source, rows)[part].rows)


def describe_hots(hots: tuple[int, ...] | None) -> str:
    """Return the number of ids of each feature in words."""
    return "one id a feature" if hots is None else f"{', '.join(map(str, hots))} ids a feature"


def describe_scores(scores: dict[str, Any]) -> str:
    """Return AUC, if there is one, and log loss as text."""
    if scores["auc"] is None:
        return f"log loss {scores['log_loss']:.4f} (all labels are the same)"
    return f"AUC {scores['auc']:.4f}, log loss {scores['log_loss']:.4f}"


# -- predict -----------------------------------------------------------------------------------------------------------


def add_predict(command: argparse.ArgumentParser) -> None:
    """Add the options of predict."""
    add_model_options(command, mlp_dtype=True)
    add_data_options(command, "rows to predict, with or without labels; labels give AUC and log loss", part=True)
    command.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="file to write; ends with .csv, .parquet or .npy"
    )


def predict(args: argparse.Namespace) -> None:
    """Write the click probabilities of rows."""
    check_name(args.output)
    if args.output.exists() and args.data.exists() and args.output.samefile(args.data):
        raise ValueError(f"--output: {args.output} is the data; expected another name")
    model = checkpoint.load(args.checkpoint)
    rows = open_rows(args.data, model, args.checkpoint, args.part)
    predictor = Predictor(model, array_dtype=args.array_dtype, mlp_dtype=args.mlp_dtype)
    scores = Scores()
    start = time.perf_counter()
    with (
        predictions_file(args.output) as write,
        tqdm(total=rows.length, unit="row", unit_scale=True, desc="predicting") as bar,
    ):
        for batch in rows.batches():
            (probabilities,) = predictor.predict([batch])
            write(probabilities)
            if batch.labels is not None:
                scores.add(batch.labels, probabilities)
            bar.update(len(probabilities))
        done = bar.n
    print(f"{args.output}: {done:,} probabilities, {done / (time.perf_counter() - start):,.0f} a second")
    if scores.rows:
        print(describe_scores(scores.result()))


# -- benchmark ---------------------------------------------------------------------------------------------------------


def add_benchmark(command: argparse.ArgumentParser) -> None:
    """Add the options of benchmark."""
    add_model_options(command, mlp_dtype=True)
    add_data_options(
        command, "rows to time, and to score if they have labels (default: generated rows)", required=False, part=True
    )
    command.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="RIVAL",
        help="models to time beside it. full: the same model with a table for each feature, as large as memory allows, "
        "and MLPs that were not pruned; full-pruned: such tables with the model's own MLPs; eager: the model as a "
        "torch module; or paths of exported files (default: none)",
    )
    command.add_argument(
        "--batch-sizes",
        nargs="+",
        type=positive,
        default=BATCH_SIZES,
        metavar="B",
        help=f"rows of a batch (default: {' '.join(map(str, BATCH_SIZES))})",
    )
    command.add_argument(
        "--seconds", type=float, default=5.0, metavar="X", help="seconds for each batch size (default: %(default)g)"
    )
    command.add_argument(
        "--max-rows", type=positive, metavar="N", help="limit of the rows of a full table (default: as many as fit)"
    )
    command.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the results (default: benchmark/ in the checkpoint)"
    )


def benchmark(args: argparse.Namespace) -> None:
    """Time the model and its rivals; write benchmark.json and throughput.png."""
    model = checkpoint.load(args.checkpoint)
    if (args.array_dtype, args.mlp_dtype) != ("float32", "float32") and args.data is None:
        raise ValueError("--data: expected with --array-dtype and --mlp-dtype, so that AUC stands beside speed")
    rows = None if args.data is None else open_rows(args.data, model, args.checkpoint, args.part)
    candidates = make_candidates(model, args.array_dtype, args.mlp_dtype, args.against, args.max_rows)
    pool = generated_rows(model) if rows is None else rows.first(TIMED_ROWS)
    with tqdm(sorted(set(args.batch_sizes)), unit="batch size", desc="timing") as sizes:
        results = measure_all(candidates, pool, sizes, args.seconds)
    if rows is not None and rows.source.labelled:
        with tqdm(total=rows.length, unit="row", unit_scale=True, desc="AUC and log loss") as bar:
            score_all(candidates, rows.batches(), bar.update)
    print(report(results, against=next(iter(candidates))))
    for name, candidate in candidates.items():
        scores = [describe_scores(candidate.scores)] if candidate.scores else []
        print(", ".join([f"{name}: {candidate.note}", *scores]))
    folder = args.output or args.checkpoint / "benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    plots.throughput(folder / "throughput.png", results, STAGES)
    machine = environment() | {"kernels": backend()["cpu"], "load_average": os.getloadavg()[0]}
    about = {name: {"note": x.note, "scores": x.scores} for name, x in candidates.items()}
    content = {"machine": machine, "model": model.config.to_dict(), "candidates": about, "results": results}
    write_json(folder / "benchmark.json", content)
    print(f"in {folder}: benchmark.json, throughput.png")


def generated_rows(model: DLRM) -> Batch:
    """Return rows to time a model on without data."""
    if model.config.data_hots is not None or len(model.config.table_rows) != NUM_SPARSE:
        raise ValueError("--data: expected; rows like those the model was trained on can't be generated")
    return to_batch(Signal().sample(TIMED_ROWS, stream=0))


# -- export ------------------------------------------------------------------------------------------------------------


def add_export(command: argparse.ArgumentParser) -> None:
    """Add the options of export."""
    add_model_options(command, mlp_dtype=False)
    command.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="onnx: standard operators, for ONNX Runtime; aoti: compiled for this CPU, for torch (takes half a minute)",
    )
    command.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="file to write; ends with .onnx or .pt2"
    )
    add_data_options(
        command, "rows of which the first 10,000 are compared with the model (default: random rows)", required=False
    )


def export_model(args: argparse.Namespace) -> None:
    """Write the model as one file, and compare it with the model."""
    model = checkpoint.load(args.checkpoint)
    batches = None
    if args.data is not None:
        batches = ((batch.dense, batch.sparse) for batch in open_rows(args.data, model, args.checkpoint).source.read())
    print("compiling" if args.format == "aoti" else "exporting", "and comparing with the model ...", flush=True)
    done = export(model, args.output, format=args.format, array_dtype=args.array_dtype, batches=batches)
    print(
        f"{args.output}: {done.bytes:,} bytes in {done.seconds:.1f} s; probabilities of {done.rows:,} rows differ from "
        f"the model's by at most {done.difference:.1e}"
    )


# -- loadgen -----------------------------------------------------------------------------------------------------------


def add_loadgen(command: argparse.ArgumentParser) -> None:
    """Add the options of loadgen."""
    add_model_options(command, mlp_dtype=True)
    add_data_options(command, "labelled rows that can be read in any order: prepared ones, .npy, .npz or .bin")
    command.add_argument("--scenario", required=True, choices=loadgen.SCENARIOS, help="MLPerf's scenario")
    command.add_argument(
        "--accuracy", action="store_true", help="predict all rows once and compute AUC from LoadGen's log"
    )
    command.add_argument(
        "--target-qps",
        type=float,
        metavar="X",
        help="samples a second: the rate that Server issues, or that Offline expects (default: Offline measures it)",
    )
    command.add_argument(
        "--find-rate", action="store_true", help="search for the highest rate at which Server is VALID"
    )
    command.add_argument(
        "--seconds",
        type=float,
        default=60,
        metavar="X",
        help="least duration in seconds (default: %(default)g). Official runs take 600 and need at least 204,800 "
        "samples of data, and in Offline at least 24,576 queries; the result says whether a run was official",
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for result.json and the logs (default: loadgen/SCENARIO in the checkpoint)",
    )


def run_loadgen(args: argparse.Namespace) -> None:
    """Run LoadGen once, or as often as the search for a rate needs."""
    loadgen.import_loadgen()
    output = args.output or args.checkpoint / "loadgen" / args.scenario
    if args.find_rate:
        if args.scenario != "Server" or args.accuracy or args.target_qps is not None:
            raise ValueError("--find-rate is for --scenario Server without --accuracy and --target-qps")
        result = loadgen.find_rate(lambda *trial: run_trial(args, *trial), args.seconds, output)
    else:
        options = loadgen.LoadGenOptions(args.scenario, args.accuracy, args.target_qps, args.seconds)
        model = checkpoint.load(args.checkpoint)
        rows = labelled_rows(open_rows(args.data, model, args.checkpoint).source, args.data)
        predictor = Predictor(model, array_dtype=args.array_dtype, mlp_dtype=args.mlp_dtype)
        result = loadgen.run(predictor, rows, options, output)
        result = {"checkpoint": str(args.checkpoint), "data": str(args.data), **result}
    write_json(output / loadgen.RESULT, result)
    print(describe(result))
    if not result.get("valid", True):
        raise loadgen.Invalid


def labelled_rows(source: Source, path: Path) -> LabelledRows:
    """Return the rows of a source for LoadGen, which asks for them in any order."""
    if not isinstance(source, RandomAccess):
        raise DataError(
            f"{path}: LoadGen asks for rows in any order, which this can't be read in: expected rows prepared "
            "with python -m data.prepare"
        )
    if not source.labelled:
        raise DataError(f"{path}: expected rows with labels, which answers to LoadGen hold, got none")
    return LabelledRows(source.rows, source.take, to_batch)


def run_trial(
    args: argparse.Namespace, scenario: str, rate: float | None, seconds: float, output: Path
) -> dict[str, Any]:
    """Run this program once more, for one trial of the search."""
    options = {
        "--checkpoint": args.checkpoint,
        "--data": args.data,
        "--scenario": scenario,
        "--seconds": seconds,
        "--array-dtype": args.array_dtype,
        "--mlp-dtype": args.mlp_dtype,
        "--output": output,
    } | ({} if rate is None else {"--target-qps": rate})
    command = [sys.executable, __file__, "loadgen", *(str(x) for option in options.items() for x in option)]
    return loadgen.run_program(command, output)


# -- the program -------------------------------------------------------------------------------------------------------


def add_model_options(command: argparse.ArgumentParser, mlp_dtype: bool) -> None:
    """Add the options that name the model and its precision."""
    command.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="folder of the model: train.py's --output"
    )
    command.add_argument(
        "--array-dtype", choices=DTYPES, default="float32", help="dtype of the ROBE array (default: %(default)s)"
    )
    if mlp_dtype:
        command.add_argument(
            "--mlp-dtype",
            choices=DTYPES,
            default="float32",
            help="dtype in which the MLPs compute (default: %(default)s)",
        )


def add_data_options(command: argparse.ArgumentParser, help: str, required: bool = True, part: bool = False) -> None:
    """Add the options that say which rows are used."""
    command.add_argument("--data", type=Path, required=required, metavar="PATH", help=f"file or folder of {help}")
    if part:
        command.add_argument(
            "--part", choices=PARTS, help="use only this part of the rows, as train.py splits them (default: all rows)"
        )


def positive(text: str) -> int:
    """Parse an integer above 0."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Returns:
        The options of a command, and run, the function that carries it out.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, add, run, description in (
        ("predict", add_predict, predict, "write click probabilities"),
        ("benchmark", add_benchmark, benchmark, "time predictions by batch size; write a table, JSON and a plot"),
        ("export", add_export, export_model, "write the model as one file for other runtimes, and verify it"),
        ("loadgen", add_loadgen, run_loadgen, "run MLPerf's inference benchmark; exit code 1 if the run is INVALID"),
    ):
        command = commands.add_parser(name, help=description, description=description)
        add(command)
        command.set_defaults(run=run)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    args = parse(arguments)
    return exit_code(lambda: args.run(args))


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    loadgen.leave(code)
