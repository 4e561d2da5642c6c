"""Training runs of benchmarks.accuracy on a few generated rows."""

import numpy as np
import pytest

from benchmarks.trials import FULL, METHODS, Trial, TrialData, fit, is_past_its_best, kept_bytes

ROWS = 2000


@pytest.fixture(scope="module")
def data():
    return TrialData.generate(ROWS)


def test_every_method_keeps_to_its_memory(data):
    for method in METHODS:
        if method == FULL:
            continue
        for compression in (10.0, 100.0):
            layer = METHODS[method](data, Trial(method, compression), 0)
            bytes = 4 * sum(p.numel() for p in layer.parameters())
            if "int8" in method:  # it becomes so after training
                bytes = sum(x.numel() * x.element_size() for x in layer.array.quantized(64).read())
            if getattr(layer, "admission", None):
                bytes += layer.admission.bytes
            if "int8" in method:
                layer.array = layer.array.quantized(64)
            assert kept_bytes(layer) == bytes
            assert 0.4 < bytes / (data.full_bytes / compression) <= 1, method


def test_epochs_can_be_parts(data):
    size = len(data.parts.train)
    batches = list(data.train_batches(100, 0, 0, round(1.5 * size)))
    assert sum(map(len, batches)) == round(1.5 * size)
    dense = np.concatenate([batch.dense for batch in batches])
    train = data.batch.dense[:size]
    in_order = [np.unique(part, axis=0) for part in (dense[:size], train)]
    assert np.array_equal(*in_order), "every row once before any comes again"
    assert not np.array_equal(dense[:size], train)
    _, progress = fit(data, Trial("hash trick", 10.0, epochs=1.5), 0, 100)
    assert [point["epoch"] for point in progress.history] == pytest.approx([0.75, 1.5], abs=0.05)
    assert Trial("x", epochs=6.0).key == Trial("x", epochs=6).key


def test_training_ends_where_validation_falls():
    def history(*aucs):
        return [{"auc": auc} for auc in aucs]

    assert not is_past_its_best(history(0.7, 0.6))
    assert not is_past_its_best(history(0.7, 0.6, 0.71))
    assert not is_past_its_best(history(0.6, 0.7, 0.65))
    assert is_past_its_best(history(0.6, 0.7, 0.65, 0.69))
