"""What an exported file is compared on, and wrong files that are found out."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from dlrm.inference.export import export, onnx_graph
from dlrm.inference.export.verification import Inputs, first_rows, largest_difference, random_rows
from tests.dlrm.inference.export.models import KNOWN, VOCABULARY, make


def test_one_wrong_row_is_found_out(old_file, monkeypatch):
    rows = random_rows(make())
    rows.sparse[:] = 7
    rows.sparse[-1, 0] = -(2**63)
    model = make(embedding="full")
    op = onnx_graph.Graph.op

    def wrong(self, operator, *inputs, **attributes):  # the remainder of C, not of Python
        return op(self, operator, *inputs, **attributes, **({"fmod": 1} if operator == "Mod" else {}))

    monkeypatch.setattr(onnx_graph.Graph, "op", wrong)
    with pytest.raises(ValueError, match=r"differ from the model's by|can't be|indices element out of data bounds"):
        export(model, old_file, format="onnx", batches=[rows])


def test_random_rows_have_ids_of_every_kind():
    sparse = random_rows(make()).sparse
    edges = -(2**63), -100, 0, 1, 100, 2**32, 2**63 - 1
    for low, high in pairwise(edges):
        assert ((sparse >= low) & (sparse < high)).mean() > 0.02
    sparse = random_rows(make(**VOCABULARY)).sparse
    assert np.isin(sparse, np.concatenate(KNOWN)).mean() > 1 / 7
    assert all(np.isin(known, ids).all() for ids, known in zip(sparse.T, KNOWN))


def test_the_first_rows_of_batches():
    batches = [(np.full((6000, 2), k, np.float32), np.full((6000, 3), k)) for k in range(3)]
    dense, sparse = first_rows(iter(batches))
    assert dense.shape == (10_000, 2)
    assert sparse.shape == (10_000, 3)
    assert dense.sum() == 2 * 4000
    assert len(first_rows(batches[:1]).dense) == 6000
    with pytest.raises(ValueError, match="batches: expected at least one row to compare on, got none"):
        first_rows([])


@pytest.mark.parametrize("row", [0, 1, 2500, 4999])
def test_the_largest_difference_is_found_in_any_row(row):
    inputs = Inputs(np.zeros((5000, 1), np.float32), np.arange(5000)[:, None])

    def wrong(by):
        return lambda dense, sparse: torch.where(sparse[:, 0] == row, by, 0.0)

    right = wrong(0.0)
    assert largest_difference(right, right, inputs) == 0
    assert largest_difference(wrong(-0.25), right, inputs) == 0.25
    assert np.isnan(largest_difference(wrong(torch.nan), right, inputs))
