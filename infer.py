"""Use a trained DLRM.

    python infer.py predict --checkpoint runs/robe --data rows.tsv --output predictions.csv

writes one click probability per row of the data, in its order, under the name "probability": as CSV, Parquet or .npy,
by the output's name. The data may be in any format of data/; with labels, AUC and log loss are printed as well.

    python infer.py benchmark --checkpoint runs/robe --data rows.tsv --against full

times it at batch sizes from 1 to 16,384 beside the same MLPs with full tables.

    python infer.py export --checkpoint runs/robe --format onnx --output model.onnx

writes the model as one file that runs without this project: for ONNX Runtime, or with --format aoti (model.pt2)
compiled ahead of time for torch. It is loaded again and compared with the model before it takes its name.

    python infer.py loadgen --checkpoint runs/robe --data prepared --scenario Server --find-rate

runs MLPerf's inference benchmark: LoadGen issues runs of 100 to 700 rows, as for dlrm-v2, and times the answers. With
--accuracy it has all rows predicted and AUC computed from its log. Official runs take --seconds 600, Offline at least
24,576 samples in them, and 204,800 samples in memory; shorter ones, and data with fewer samples, say that they are not.

docs/inference.md has the figures, and more on each command.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.batches import in_background, rebatch
from data.formats.opening import open_source
from data.formats.prepared import PARTS
from data.parts import check, split
from data.predictions import check_name, predictions_file
from data.program import exit_code
from data.rows import Batch, to_batch
from data.schema import NUM_SPARSE, DataError
from data.sources import RandomAccess, Source
from data.synthetic import Signal
from dlrm import DLRM, checkpoint, plots
from dlrm.checkpoint import write_json
from dlrm.inference import loadgen, loadgen_logs
from dlrm.inference.export.formats import FORMATS, export
from dlrm.inference.predictor import DTYPES, Predictor
from dlrm.inference.throughput import BATCH_SIZES, STAGES, cut, make_candidates, measure, report, score_all
from dlrm.metrics import EVALUATION_BATCH, Scores, environment
from robe import backend

TIMED_ROWS = 1 << 16


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def add(name: str, run: Callable[[argparse.Namespace], None], what: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, description=what)
        command.set_defaults(run=run)
        command.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="of train.py's --output")
        command.add_argument("--array-dtype", choices=DTYPES, default="float32", help="the ROBE array is kept in")
        return command

    command = add("predict", run_predict, "write click probabilities")
    add_mlp_dtype(command)
    command.add_argument(
        "--data", type=Path, required=True, metavar="PATH", help="file or folder, with or without labels"
    )
    add_part(command)
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help=".csv, .parquet or .npy")

    command = add("benchmark", run_benchmark, "time predictions by batch size, with a table, JSON and a picture")
    add_mlp_dtype(command)
    command.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="rows to time; with labels, AUC and log loss are reported beside speed. Default: generated rows",
    )
    add_part(command)
    command.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="WHAT",
        help="full: the same MLPs with a table for each feature, as large as memory allows; eager: the model as a "
        "torch module; or files that export made",
    )
    command.add_argument("--batch-sizes", nargs="+", type=positive, default=BATCH_SIZES, metavar="B")
    command.add_argument("--seconds", type=float, default=5.0, help="for each batch size (default: 5)")
    command.add_argument("--max-rows", type=positive, help="of a full table, at most")
    command.add_argument("--output", type=Path, metavar="DIR", help="default: the checkpoint's folder, in benchmark/")

    command = add("export", run_export, "write a model as one file for other runtimes")
    command.add_argument("--format", choices=FORMATS, required=True, help="onnx; aoti: compiled, for torch")
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help="ends with .onnx or .pt2")
    command.add_argument("--data", type=Path, metavar="PATH", help="compare on its first rows, not on random ones")

    command = add("loadgen", run_loadgen, "MLPerf's inference benchmark; exit code 1: the run is INVALID")
    add_mlp_dtype(command)
    command.add_argument(
        "--data", type=Path, required=True, metavar="PATH", help="labelled rows: prepared ones, .npy, .npz or .bin"
    )
    command.add_argument("--scenario", required=True, choices=loadgen.SCENARIOS)
    command.add_argument("--accuracy", action="store_true", help="predict all rows once, for AUC")
    command.add_argument(
        "--target-qps", type=float, metavar="X", help="samples a second; Offline measures them where none are given"
    )
    command.add_argument("--find-rate", action="store_true", help="search the highest rate at which Server is VALID")
    command.add_argument(
        "--seconds",
        type=float,
        default=60,
        metavar="N",
        help="least duration (default: 60); below MLPerf's 600 Offline needs proportionately fewer samples",
    )
    command.add_argument(
        "--output", type=Path, metavar="DIR", help="for result and logs (default: loadgen/SCENARIO in the checkpoint's)"
    )
    return parser.parse_args(arguments)


def add_mlp_dtype(command: argparse.ArgumentParser) -> None:
    command.add_argument("--mlp-dtype", choices=DTYPES, default="float32", help="the MLPs compute in")


def add_part(command: argparse.ArgumentParser) -> None:
    command.add_argument("--part", choices=PARTS, help="only these rows, as train.py splits the data; default: all")


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    return exit_code(lambda: args.run(args))


def describe_hots(hots: tuple[int, ...] | None) -> str:
    return "one id a feature" if hots is None else f"{', '.join(map(str, hots))} ids a feature"


def open_data(path: Path, model: DLRM, part: str | None) -> tuple[Source, range | None]:
    """The rows to predict, once they are known to be what the model was trained on; None: to the end."""
    source = open_source(path)
    source.verify()
    if source.layout.hots != model.config.data_hots:
        raise DataError(
            f"{path}: has {describe_hots(source.layout.hots)}, the model was trained on "
            f"{describe_hots(model.config.data_hots)}"
        )
    if part is None:
        return source, None if source.rows is None else range(source.rows)
    rows = check(source) if source.rows is None else source.rows
    return source, split(path, source, rows)[part].rows


def batches_of(source: Source, rows: range | None) -> Iterator[Batch]:
    start, stop = (0, None) if rows is None else (rows.start, rows.stop)
    return in_background(lambda: rebatch(source.read(start, stop), EVALUATION_BATCH))


def run_predict(args: argparse.Namespace) -> None:
    check_name(args.output)
    model = checkpoint.load(args.checkpoint)
    source, rows = open_data(args.data, model, args.part)
    predictor = Predictor(model, array_dtype=args.array_dtype, mlp_dtype=args.mlp_dtype)
    scores = Scores()
    start = time.perf_counter()
    with (
        predictions_file(args.output) as write,
        tqdm(total=rows and len(rows), unit="row", unit_scale=True, desc="predicting") as bar,
    ):
        for batch in batches_of(source, rows):
            (probabilities,) = predictor.predict([batch])
            write(probabilities)
            if batch.labels is not None:
                scores.add(batch.labels, probabilities)
            bar.update(len(probabilities))
        done = bar.n
    print(f"{args.output}: {done:,} probabilities, {done / (time.perf_counter() - start):,.0f} a second")
    if scores.rows:
        print(describe_scores(scores.result()))


def describe_scores(result: dict[str, Any]) -> str:
    auc = "" if result["auc"] is None else f"AUC {result['auc']:.4f}, "
    return f"{auc}log loss {result['log_loss']:.4f}"


def run_benchmark(args: argparse.Namespace) -> None:
    model = checkpoint.load(args.checkpoint)
    if (args.array_dtype, args.mlp_dtype) != ("float32", "float32") and args.data is None:
        raise ValueError("--data: expected with --array-dtype and --mlp-dtype, so that AUC stands beside speed")
    source, rows = (None, None) if args.data is None else open_data(args.data, model, args.part)
    candidates = make_candidates(model, args.array_dtype, args.mlp_dtype, args.against, args.max_rows)
    pool = timed_rows(source, rows, model)
    results = []
    with tqdm(sorted(set(args.batch_sizes)), unit="batch size") as sizes:
        for size in sizes:
            sizes.set_description(f"timing batches of {size:,}")
            times = measure(candidates, cut(pool.dense, pool.sparse, size), args.seconds)
            results += [{"batch_size": size, "candidate": name, **values} for name, values in times.items()]
    if source is not None and source.labelled:
        with tqdm(total=rows and len(rows), unit="row", unit_scale=True, desc="AUC and log loss") as bar:
            score_all(candidates, batches_of(source, rows), bar.update)
    print(report(results, against=next(iter(candidates))))
    for name, candidate in candidates.items():
        print(
            ", ".join([f"{name}: {candidate.note}", *([describe_scores(candidate.scores)] if candidate.scores else [])])
        )
    folder = args.output or args.checkpoint / "benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    plots.throughput(folder / "throughput.png", results, STAGES)
    machine = environment() | {"kernels": backend()["cpu"], "load_average": os.getloadavg()[0]}
    told = {name: {"note": x.note, "scores": x.scores} for name, x in candidates.items()}
    write_json(
        folder / "benchmark.json",
        {"machine": machine, "model": model.config.to_dict(), "candidates": told, "results": results},
    )
    print(f"in {folder}: benchmark.json, throughput.png")


def timed_rows(source: Source | None, rows: range | None, model: DLRM) -> Batch:
    """Rows to cut batches from, so many that their ids do not stay in the caches."""
    if source is None:
        if model.config.data_hots is not None or len(model.config.table_rows) != NUM_SPARSE:
            raise ValueError("--data: expected; rows like those the model was trained on can't be generated")
        return to_batch(Signal().sample(TIMED_ROWS, stream=0))
    start, stop = (0, TIMED_ROWS) if rows is None else (rows.start, min(rows.start + TIMED_ROWS, rows.stop))
    return Batch.concatenate(list(source.read(start, stop)))


def run_export(args: argparse.Namespace) -> None:
    model = checkpoint.load(args.checkpoint)
    batches = None
    if args.data is not None:
        source, _ = open_data(args.data, model, None)
        batches = ((batch.dense, batch.sparse) for batch in source.read())
    print("compiling" if args.format == "aoti" else "exporting", "and comparing with the model ...", flush=True)
    done = export(model, args.output, format=args.format, array_dtype=args.array_dtype, batches=batches)
    print(
        f"{args.output}: {done.bytes:,} bytes in {done.seconds:.1f} s; probabilities of {done.rows:,} rows differ from "
        f"the model's by at most {done.difference:.1e}"
    )


def run_loadgen(args: argparse.Namespace) -> None:
    loadgen.import_loadgen()
    output = args.output or args.checkpoint / "loadgen" / args.scenario
    if args.find_rate:
        if args.scenario != "Server" or args.accuracy or args.target_qps is not None:
            raise ValueError("--find-rate is for --scenario Server without --accuracy and --target-qps")
        result = loadgen.find_rate(lambda *trial: run_trial(args, *trial), args.seconds, output)
        write_json(output / loadgen.RESULT, result)
    else:
        options = loadgen.Options(args.scenario, args.accuracy, args.target_qps, args.seconds)
        model = checkpoint.load(args.checkpoint)
        source, _ = open_data(args.data, model, None)
        if not isinstance(source, RandomAccess):
            raise DataError(
                f"{args.data}: LoadGen asks for rows in any order, which this can't be read in: expected rows prepared "
                "with python -m data.prepare"
            )
        if not source.labelled:
            raise DataError(f"{args.data}: expected rows with labels, which answers to LoadGen hold, got none")
        predictor = Predictor(model, array_dtype=args.array_dtype, mlp_dtype=args.mlp_dtype)
        rows = loadgen.Rows(source.rows, source.take, to_batch)
        result = loadgen.run(predictor, rows, options, output)
        result = {"checkpoint": str(args.checkpoint), "data": str(args.data), **result}
        write_json(output / loadgen.RESULT, result)
    print(loadgen_logs.describe(result))
    if not result.get("valid", True):
        raise loadgen.Invalid


def run_trial(
    args: argparse.Namespace, scenario: str, rate: float | None, seconds: float, output: Path
) -> dict[str, Any]:
    """A run in a process of its own, since LoadGen allows one in each; its result.json."""
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
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, loadgen.Invalid.exit_code) or not (output / loadgen.RESULT).exists():
        said = done.stderr.strip().splitlines() or ["no message"]
        raise ValueError(f"{scenario}: the run ended with exit code {done.returncode}: {said[-1]}")
    return json.loads((output / loadgen.RESULT).read_text())


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    loadgen.leave(code)
