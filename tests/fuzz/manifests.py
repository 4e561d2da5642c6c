"""Open a prepared folder again and again, each time with another damage in its manifests.

    python -m tests.fuzz.manifests --inputs 1000000 --seed 0

Every time, the rows are read, all of them from files in the folder, or one line says what is wrong. Anything else ends
the run, prints the manifest, and exits 1.
"""

import argparse
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from data.formats.prepared import Dataset
from data.preparation import Preparation, PrepareOptions
from data.schema import DataError
from tests.helpers.mutations import mutated
from tests.helpers.sources import Numbered

ROWS = (53, 20, 31)
AT_ONCE = 10_000  # inputs of one seed


def make_folder(path):
    """Prepare three sources in a new folder; a link in it leads out."""
    sources = [Numbered(rows, 100 * i) for i, rows in enumerate(ROWS)]
    for i, source in enumerate(sources):
        source.path, source.name = path / f"day_{i}", f"day_{i}"
        source.path.write_bytes(b"")
    split = {"by": "files", "train": ["day_0"], "validation": ["day_1"], "test": ["day_2"]}
    Preparation(sources, path / "out", PrepareOptions(shard_rows=20), split).run()
    (path / "secret").write_bytes(bytes(3200))
    (path / "out" / "link").symlink_to(path / "secret")
    return path / "out"


def check(folder):
    """Open and read a folder. Returns how it ended.

    Raises:
        AssertionError: it ended in no way that it may.
    """
    try:
        dataset = Dataset(folder)
        if not dataset.is_own:
            return "another format"
        records = dataset.take(0, dataset.rows)
        parts = dataset.parts()
    except DataError as error:
        message = str(error)
        assert message.startswith(str(folder)), message
        assert not re.search(r"[\x00-\x1f\x7f]", message), message
        assert len(message) < len(str(folder)) + 500, message
        return "refused"
    assert len(records) == dataset.rows == sum(source.rows for source in dataset.sources())
    assert set(records["sparse"][:, 0].tolist()) <= {100 * i + k for i, rows in enumerate(ROWS) for k in range(rows)}
    assert parts is None or sum(map(len, parts.values())) in (dataset.rows, 0)
    return "read"


def fuzz(folder, inputs, seed):
    """Damage the manifests of a folder again and again. Returns how often it ended in which way."""
    generator, ended = random.Random(seed), Counter()
    good = {path: path.read_bytes() for path in folder.glob("*.json")}
    for number in range(inputs):
        damaged = {
            path: mutated(good[path], generator) for path in generator.sample(sorted(good), 1 + (number % 16 == 0))
        }
        for path, content in damaged.items():
            path.write_bytes(content)
        try:
            ended[check(folder)] += 1
        except BaseException:
            print(f"input {number} of seed {seed}: {damaged}", file=sys.stderr)
            raise
        for path in damaged:
            path.write_bytes(good[path])
    return ended


def main():
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start, ended = time.perf_counter(), Counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        out = make_folder(Path(folder))
        for done in range(0, args.inputs, AT_ONCE):
            inputs = min(AT_ONCE, args.inputs - done)
            ended += fuzz(out, inputs, args.seed + done)
            print(f"{done + inputs:,} inputs in {time.perf_counter() - start:.0f} s: {dict(ended)}", flush=True)


if __name__ == "__main__":
    main()
