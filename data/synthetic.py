"""Generate Criteo rows whose click probabilities are known, and so the best AUC that any model can reach.

    python -m data.synthetic --rows 200000 --seed 0 --output rows.tsv
    python -m data.synthetic --rows 5000000 --output rows.tsv.gz

The file is a log in Criteo's format: label, 13 integers and 26 categories, separated by tabs. One core writes about
130,000 rows a second. Then the program takes some 5 seconds to estimate the best possible AUC, and prints it.

Columns have the number of distinct ids and about the share of missing values of the Kaggle data. Ids follow a bounded
Zipf law. A click is drawn with probability sigmoid(logit), where the logit is the sum of an effect of each id, products
of two such effects for pairs of features, and linear terms in the integers. Effects are hashes of ids and seed, not
tables, so `Signal.logits` scores any rows of the file as the best possible model would.
"""

import argparse
import gzip
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from data.formats.criteo_tsv import write_tsv
from data.program import exit_code
from data.rows import to_batch, to_frame
from data.schema import MISSING, NUM_DENSE, NUM_SPARSE, Layout
from robe_files import whole_file

# The Kaggle data: distinct ids of each category, and roughly the share of rows in which a field is empty.
CARDINALITIES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
SPARSE_MISSING = (
    0, 0, 0.03, 0.03, 0, 0.12, 0, 0, 0, 0, 0, 0.03, 0,
    0, 0, 0.03, 0, 0, 0.44, 0.44, 0.03, 0.76, 0, 0.03, 0.44, 0.44,
)  # fmt: skip
DENSE_MISSING = (0.45, 0, 0.21, 0.22, 0.03, 0.22, 0.04, 0, 0.04, 0.45, 0.04, 0.77, 0.22)
DENSE_SCALE = (1, 20, 6, 6, 3000, 40, 6, 10, 60, 0.5, 2, 0.5, 6)  # medians of the integers that are not missing
ZIPF_EXPONENT = 1.1
POSITIVE_RATE = 0.2568

# Scales of the terms of the logit. With these, the best possible AUC is near 0.8, as it seems to be on the real data.
_ID_EFFECT, _PAIR_EFFECT, _DENSE_EFFECT, _PAIRS = 0.4, 0.35, 0.1, 8
# The effect of the id of rank r is scaled by 1 / sqrt(1 + r / _RANK_SCALE): in real logs, too, rare ids say little.
_RANK_SCALE = 100
_ROWS_AT_A_TIME = 50_000


def _permute32(x: np.ndarray) -> np.ndarray:
    """Map 32-bit values one to one (Wellons' lowbias32): ids look hashed, and none collide within a column."""
    x = x.astype(np.uint32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _unpermute32(x: np.ndarray) -> np.ndarray:
    """Invert _permute32."""
    x = x.astype(np.uint32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(pow(0x846CA68B, -1, 1 << 32))
    x ^= (x >> np.uint32(15)) ^ (x >> np.uint32(30))
    x *= np.uint32(pow(0x7FEB352D, -1, 1 << 32))
    return x ^ (x >> np.uint32(16))


def _normal(key: int, x: np.ndarray) -> np.ndarray:
    """Return a standard normal number for each integer x, a function of key and x: a hash, then Box-Muller."""
    z = x.astype(np.uint64) + np.uint64((key * 0x9E3779B97F4A7C15) % (1 << 64))
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(multiplier)
    z ^= z >> np.uint64(31)
    first = ((z >> np.uint64(32)).astype(np.float64) + 0.5) / (1 << 32)
    second = (z & np.uint64(0xFFFFFFFF)).astype(np.float64) / (1 << 32)
    return np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)


def _column_offsets() -> np.ndarray:
    """Return the first value of each column before the permutation. Columns share no values, and none has 0."""
    return np.concatenate([[1], 1 + np.cumsum(CARDINALITIES)[:-1]]).astype(np.uint32)


class Signal:
    """The distribution of generated rows, and the true logit of each.

    Args:
        seed: other seeds give other effects and other rows.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        rng = np.random.default_rng([seed, 0])
        self._dense_weights = rng.normal(0, _DENSE_EFFECT, NUM_DENSE)
        self._pairs = rng.permutation(NUM_SPARSE)[: 2 * _PAIRS].reshape(_PAIRS, 2).tolist()
        self._offset = 0.0
        self._offset = self._calibrate()

    def sample(self, rows: int, stream: int) -> np.ndarray:
        """Draw rows.

        Args:
            rows: how many.
            stream: other streams have other rows.

        Returns:
            the records, a function of the seed, ``rows`` and ``stream``.
        """
        rng = np.random.default_rng([self.seed, 1, stream])
        spread = rng.lognormal(0, 1.5, (rows, NUM_DENSE)) * DENSE_SCALE
        integers = spread.astype(np.int64)
        integers[:, 1] -= 3 * (rng.random(rows) < 0.1)  # the only column of the logs that has negative values
        integers[rng.random((rows, NUM_DENSE)) < DENSE_MISSING] = MISSING
        # Inverse of the distribution function of a power law on [1, n + 1), rounded down.
        power = 1 - ZIPF_EXPONENT
        top = (np.array(CARDINALITIES) + 1.0) ** power
        ranks = (1 + rng.random((rows, NUM_SPARSE)) * (top - 1)) ** (1 / power) - 1
        ranks = np.minimum(ranks.astype(np.uint32), np.array(CARDINALITIES, dtype=np.uint32) - np.uint32(1))
        ids = _permute32(ranks + _column_offsets())
        ids[rng.random((rows, NUM_SPARSE)) < SPARSE_MISSING] = 0
        records = Layout().records(rows)
        records["dense"], records["sparse"], records["label"] = integers, ids, 0
        records["label"] = rng.random(rows) < 1 / (1 + np.exp(-self._logits(records)))
        return records

    def logits(self, dense: np.ndarray, sparse: np.ndarray) -> np.ndarray:
        """Return the true logits of rows, in the form that models get them.

        Args:
            dense: (B, 13) float, transformed integers.
            sparse: (B, 26) int64, ids.

        Returns:
            (B,) float64.
        """
        ranks = (_unpermute32(sparse) - _column_offsets()).astype(np.float64)
        damping = np.where(sparse == 0, 1, 1 / np.sqrt(1 + ranks / _RANK_SCALE))

        def effects(column: int, kind: int) -> np.ndarray:
            key = (self.seed * 2 + kind) * NUM_SPARSE + column + 1
            return damping[:, column] * _normal(key, sparse[:, column])

        total = self._offset + dense.astype(np.float64) @ self._dense_weights
        for column in range(NUM_SPARSE):
            total = total + _ID_EFFECT * effects(column, 0) / np.sqrt(2)
        for first, second in self._pairs:
            total = total + _PAIR_EFFECT * effects(first, 1) * effects(second, 1)
        return total

    def bayes_auc(self, rows: int = 500_000) -> float:
        """Return the AUC of the true probabilities on newly drawn rows. Except by chance, no model can do better.

        Args:
            rows: how many to draw, rounded up to 50,000.
        """
        scores, labels = [], []
        for stream in range(-(-rows // _ROWS_AT_A_TIME)):
            records = self.sample(_ROWS_AT_A_TIME, -1 - stream & 0xFFFFFFFF)
            scores.append(self._logits(records))
            labels.append(records["label"])
        return float(roc_auc_score(np.concatenate(labels), np.concatenate(scores)))

    def _calibrate(self) -> float:
        """Return the offset that gives a sample the click rate of the Kaggle data."""
        logits = self._logits(self.sample(_ROWS_AT_A_TIME, 0xFFFFFFFF))
        low, high = -20.0, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            rate = (1 / (1 + np.exp(-(logits + middle)))).mean()
            low, high = (low, middle) if rate > POSITIVE_RATE else (middle, high)
        return middle

    def _logits(self, records: np.ndarray) -> np.ndarray:
        batch = to_batch(records)
        return self.logits(batch.dense, batch.sparse)

    def records(self, rows: int) -> Iterator[np.ndarray]:
        """Yield the records of the first ``rows`` rows, 50,000 at a time."""
        for start in range(0, rows, _ROWS_AT_A_TIME):
            yield self.sample(min(_ROWS_AT_A_TIME, rows - start), start // _ROWS_AT_A_TIME)


def write(path: str | Path, rows: int, seed: int = 0, labelled: bool = True, progress: bool = False) -> Signal:
    """Write generated rows as a log. The file appears whole or not at all.

    Args:
        path: of the file, compressed if it ends with .gz.
        rows: how many.
        seed: of the signal.
        labelled: whether the rows have a label.
        progress: show a progress bar.

    Returns:
        the signal that the rows were drawn from.

    Raises:
        OSError: the file can't be written.
    """
    path = Path(path)
    signal = Signal(seed)
    with (
        whole_file(path) as unfinished,
        open(unfinished, "wb") as file,
        tqdm(total=rows, unit="row", unit_scale=True, desc=path.name, disable=not progress) as bar,
    ):
        # Without name and time, the same rows give the same bytes.
        packed = gzip.GzipFile("", "wb", 4, file, mtime=0) if path.suffix == ".gz" else nullcontext(file)
        with packed as text:
            for records in signal.records(rows):
                frame = to_frame(records)
                write_tsv(text, frame if labelled else frame.drop("label"))
                bar.update(len(records))
    return signal


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data.synthetic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=200_000,
        metavar="N",
        help="rows to generate (default: %(default)s, which take 49 MB)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="other seeds give other rows and clicks (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="file to write; compressed if it ends with .gz"
    )
    args = parser.parse_args(arguments)
    if args.rows < 1:
        parser.error(f"--rows: expected at least 1, got {args.rows}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the program, and return its exit code."""
    args = parse(arguments)
    return exit_code(lambda: run(args.output, args.rows, args.seed))


def run(path: Path, rows: int, seed: int) -> None:
    """Write a file of generated rows, and print their best possible AUC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    signal = write(path, rows, seed, progress=True)
    print(f"{path}: {rows} rows, best possible AUC {signal.bayes_auc():.4f}")


if __name__ == "__main__":
    sys.exit(main())
