"""Models of deepctr-torch, compressed after they were made, in deepctr's own training loop."""

import pytest
import torch
from deepctr_torch.inputs import DenseFeat, SparseFeat
from deepctr_torch.models import DCN, AutoInt, DeepFM, FiBiNET, xDeepFM

import robe
from tests.integrations.rows import FEATURES, IDS, TRAIN, auc, check, rows

COLUMNS = [SparseFeat(f"cat_{k}", IDS, embedding_dim=8) for k in range(FEATURES)]
COLUMNS += [DenseFeat(f"int_{k}", 1) for k in range(13)]


def trained(make, ratio):
    """Test AUC, and the model."""
    torch.manual_seed(0)
    # The penalty of a table would be on weights that are gone.
    penalties = {"l2_reg_embedding": 0} | ({} if make is AutoInt else {"l2_reg_linear": 0})
    model = make(COLUMNS, COLUMNS, dnn_hidden_units=(32, 16), seed=0, **penalties)
    if ratio:
        model.regularization_weight.clear()  # it holds the tables' weights, with penalties of 0 too
        robe.compress(model, ratio)
    model.compile(torch.optim.Adam(model.parameters(), 0.002), "binary_crossentropy")
    batch = rows()
    inputs = {f"cat_{k}": batch.sparse[:, k] for k in range(FEATURES)}
    inputs |= {f"int_{k}": batch.dense[:, k] for k in range(13)}
    model.fit(
        {name: x[:TRAIN] for name, x in inputs.items()}, batch.labels[:TRAIN], batch_size=256, epochs=1, verbose=0
    )
    return auc(model.predict({name: x[TRAIN:] for name, x in inputs.items()}, batch_size=4096)), model


@pytest.mark.parametrize("make", [DeepFM, xDeepFM, DCN, AutoInt, FiBiNET])
def test_trains_and_is_not_far_behind(make):
    full, _ = trained(make, None)
    compressed, model = trained(make, 10)
    report = model.compression_report
    assert not report.left
    assert {table.embedding_dim for table in report.swapped} == {8, 1}
    assert sum(table.embedding_dim == 8 for table in report.swapped) == FEATURES
    assert len({id(m.array) for m in model.modules() if isinstance(m, robe.RobeEmbedding)}) == 1
    print(f"{make.__name__}: full {full:.4f}, compressed {compressed:.4f}")
    check(compressed, full)


def test_tables_are_left_while_a_penalty_refers_to_them():
    with pytest.raises(ValueError, match="its weight is also in the attribute regularization_weight of a DeepFM"):
        robe.compress(DeepFM(COLUMNS, COLUMNS), 10)
