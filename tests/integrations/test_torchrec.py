"""torchrec's EmbeddingBagCollection and DLRM: compressed, and with a collection of robe's in its place."""

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, PoolingType
from torchrec.models.dlrm import DLRM

import robe
from tests.integrations.rows import FEATURES, IDS, TRAIN, auc, check, rows

NAMES = [f"cat_{k}" for k in range(FEATURES)]
MIXED = [
    EmbeddingBagConfig(name="t0", num_embeddings=2000, embedding_dim=8, feature_names=["a", "b"]),
    EmbeddingBagConfig(name="t1", num_embeddings=3000, embedding_dim=4, feature_names=["c"], pooling=PoolingType.MEAN),
    EmbeddingBagConfig(name="t2", num_embeddings=3000, embedding_dim=8, feature_names=["c", "d"]),
]


def features_of(sparse):
    values = torch.from_numpy(sparse.T.copy()).flatten()
    return KeyedJaggedTensor(keys=NAMES, values=values, lengths=torch.ones(len(values), dtype=torch.int32))


def trained(embeddings):
    """Test AUC of a DLRM."""
    torch.manual_seed(1)
    model = DLRM(embeddings, 13, dense_arch_layer_sizes=[32, 8], over_arch_layer_sizes=[32, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    batch = rows()
    for start in range(0, TRAIN, 256):
        some = slice(start, min(start + 256, TRAIN))
        optimizer.zero_grad()
        logits = model(torch.from_numpy(batch.dense[some]), features_of(batch.sparse[some])).squeeze(1)
        nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(batch.labels[some])).backward()
        optimizer.step()
    with torch.no_grad():
        return auc(model(torch.from_numpy(batch.dense[TRAIN:]), features_of(batch.sparse[TRAIN:])))


def test_dlrm():
    configs = [
        EmbeddingBagConfig(name=f"t_{name}", num_embeddings=IDS, embedding_dim=8, feature_names=[name])
        for name in NAMES
    ]
    torch.manual_seed(0)
    full = trained(EmbeddingBagCollection(tables=configs))
    torch.manual_seed(0)
    compressed = robe.compress(EmbeddingBagCollection(tables=configs), 10)
    assert len(compressed.compression_report.swapped) == FEATURES
    keyed = robe.RobeKeyedEmbeddingBagCollection(configs, compression=10)
    # The same virtual tables, in one operator call or in 26.
    bag = compressed.embedding_bags["t_cat_3"]
    keyed.load_state_dict(dict.fromkeys(keyed.state_dict(), bag.array.weight))
    torch.testing.assert_close(keyed.collections[0].full_weight("cat_3@t_cat_3"), bag.full_weight())
    scores = [trained(compressed), trained(keyed)]
    print(f"DLRM: full {full:.4f}, compressed {scores[0]:.4f}, keyed {scores[1]:.4f}")
    for score in scores:
        check(score, full)
    assert abs(scores[0] - scores[1]) < 1e-3


@pytest.mark.parametrize("keys", [["a", "b", "c", "d"], ["d", "unused", "c", "b", "a"]])
@pytest.mark.parametrize("weighted", [False, True])
def test_output_is_torchrecs(keys, weighted):
    tables = MIXED[::2] if weighted else MIXED
    keyed = robe.RobeKeyedEmbeddingBagCollection(tables, compression=10, is_weighted=weighted)
    torchs = EmbeddingBagCollection(tables=tables, is_weighted=weighted)
    with torch.no_grad():
        for collection in keyed.collections:
            for name in collection.feature_names:
                torchs.embedding_bags[name.split("@")[1]].weight.copy_(collection.full_weight(name))
    lengths = torch.tensor([2, 0, 1, 3] * len(keys))
    n = int(lengths.sum())
    features = KeyedJaggedTensor(
        keys=keys, values=torch.arange(n) * 7, lengths=lengths, weights=torch.rand(n) if weighted else None
    )
    got, want = keyed(features), torchs(features)
    assert type(got) is KeyedTensor
    assert got.keys() == want.keys()
    assert got.length_per_key() == want.length_per_key()
    torch.testing.assert_close(got.values(), want.values())
    got.values().sum().backward()
    assert keyed.array.weight.grad.any()


def test_a_compressed_collection_keeps_its_output():
    collection = EmbeddingBagCollection(tables=MIXED)
    features = KeyedJaggedTensor(
        keys=["a", "b", "c", "d"], values=torch.arange(8), lengths=torch.tensor([1, 1, 2, 0, 1, 1, 0, 2])
    )
    keys, shape = collection(features).keys(), collection(features).values().shape
    out = robe.compress(collection, 10)(features)
    assert (type(out), out.keys(), out.values().shape) == (KeyedTensor, keys, shape)
