"""MLPerf's samples, and logs that are not what they should be."""

import hashlib
import json

import numpy as np
import pytest

from dlrm.inference.loadgen_logs import read_accuracy, read_speed, sample_bounds, trace


def test_samples_are_those_of_mlperf():
    bounds = sample_bounds(89_137_319)
    assert len(bounds) - 1 == 330_067
    assert hashlib.md5(trace(bounds).encode()).hexdigest() == "3db90209564316f2506c99cc994ad0b2"


@pytest.mark.parametrize("rows", [1, 99, 5000, *(x + y for x in sample_bounds(3000)[1:5].tolist() for y in (-1, 0, 1))])
def test_samples_of_few_rows(rows):
    rng, quantiles = np.random.RandomState(123), [100] * 2 + [200] * 12 + [300] * 2 + [400, 500, 600, 700]
    expected = [0]
    while expected[-1] < rows:
        expected.append(min(expected[-1] + quantiles[rng.randint(0, 20)], rows))
    assert sample_bounds(rows).tolist() == expected


def test_no_rows_are_no_samples():
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        sample_bounds(0)


def test_an_accuracy_log_with_too_little(tmp_path):
    bounds = np.array([0, 2, 5])
    hexed = [np.arange(2 * n, dtype="<f4").tobytes().hex() for n in (2, 3)]
    entries = [{"seq_id": i, "qsl_idx": i, "data": data} for i, data in enumerate(hexed)]

    def read(*some):
        text = "[\n" + ",\n".join(map(json.dumps, some)) + "\n]\n"
        (tmp_path / "mlperf_log_accuracy.json").write_text(text)
        return read_accuracy(tmp_path, bounds)

    assert read(entries[1], entries[0]).tolist() == [[1, 0], [3, 2], [1, 0], [3, 2], [5, 4]]
    with pytest.raises(ValueError, match="expected 2 samples, got 1"):
        read(entries[1])
    with pytest.raises(ValueError, match="sample 0: expected 2 rows, got 3"):
        read(entries[1], {**entries[1], "qsl_idx": 0})


def test_a_log_without_a_result(tmp_path):
    with pytest.raises(ValueError, match=r"mlperf_log_detail\.txt: expected result_validity, got none"):
        read_speed(tmp_path, "Offline", 200)
