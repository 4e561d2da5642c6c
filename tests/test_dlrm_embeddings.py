"""The tables ROBE is compared with, against nn.Embedding and a Python dictionary."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from dlrm import DLRMConfig
from dlrm.embeddings import Tables, VocabularyTables, build_embeddings, capped_rows
from robe import RobeEmbeddingBagCollection

ROWS = (7, 1, 30)


def config(**changes):
    return DLRMConfig(**{"embedding_dim": 4, "bottom_mlp": (4,), "top_mlp": (1,), "table_rows": ROWS} | changes)


def test_tables_read_id_modulo_rows():
    tables = Tables(ROWS, 4)
    sparse = torch.randint(0, 2**32, (50, 3))
    first = 0
    for feature, rows in enumerate(ROWS):
        own = tables.weight[first : first + rows]
        expected = functional.embedding(torch.from_numpy(sparse[:, feature].numpy() % rows), own)
        assert torch.equal(tables(sparse)[:, feature], expected)
        assert own.abs().max() <= rows**-0.5
        first += rows


def test_tables_have_sparse_gradients_of_the_rows_read():
    tables = Tables(ROWS, 4)
    tables(torch.tensor([[3, 0, 8], [10, 0, 8]])).sum().backward()
    gradient = tables.weight.grad
    assert gradient.is_sparse
    expected = torch.zeros_like(tables.weight)
    for row in (3, 3, 7, 7, 7 + 1 + 8, 7 + 1 + 8):  # 10 % 7 = 3
        expected[row] += 1
    assert torch.equal(gradient.to_dense(), expected)


def test_vocabulary_gives_known_ids_rows_of_their_own_and_all_others_one():
    rng = np.random.default_rng(0)
    known = [np.unique(rng.integers(0, 2**32, n)) for n in (5, 40, 1)]
    known[1] = np.unique(np.concatenate([known[1], known[0], [0, 2**32 - 1]]))  # the same id in two features
    tables = VocabularyTables([len(ids) + 1 for ids in known], 4, [torch.from_numpy(ids) for ids in known])
    strangers = [-1, 2**32, 2**40 + int(known[1][3]), int(known[0][0]) + 1]
    sparse = torch.tensor([[int(rng.choice(ids)) for ids in known] for _ in range(30)] + [[s] * 3 for s in strangers])
    rows = tables.rows(sparse)
    for feature, ids in enumerate(known):
        row_of = {int(id): row for row, id in enumerate(ids)}
        assert rows[:, feature].tolist() == [row_of.get(id, len(ids)) for id in sparse[:, feature].tolist()]
    assert (rows[-4:-1] == tables.table_rows - 1).all()


def test_vocabulary_is_part_of_the_state():
    known = [torch.tensor([3, 9]), torch.tensor([], dtype=torch.int64), torch.tensor([2**32 - 1])]
    trained = VocabularyTables([3, 1, 2], 4, known)
    loaded = VocabularyTables([3, 1, 2], 4, None)
    loaded.load_state_dict(trained.state_dict())
    sparse = torch.tensor([[9, 5, 2**32 - 1], [4, 4, 4]])
    assert torch.equal(loaded(sparse), trained(sparse))


@pytest.mark.parametrize("compression", [1, 2, 10, 1000])
def test_capped_rows(compression):
    rows = [1000, 3, 50, 200, 1]
    capped = capped_rows(rows, compression)
    cap = max(capped)
    assert capped == [min(n, cap) for n in rows]
    if sum(rows) / compression >= len(rows):
        assert sum(capped) <= sum(rows) / compression
        assert cap == max(rows) or sum(min(n, cap + 1) for n in rows) > sum(rows) / compression


def test_built_as_configured():
    robe = build_embeddings(config(compression=4, block_size=2, sign=True, hash_seed=5, init_std=0.5))
    assert isinstance(robe, RobeEmbeddingBagCollection)
    assert (robe.array.size, robe.block_size, robe.sign, robe.hash) == (38 * 4 // 4, 2, True, "mix")
    assert (robe.array.seed, robe.array.init_std) == (5, 0.5)
    assert build_embeddings(config(compression=None, robe_size=17)).array.size == 17
    assert len(build_embeddings(config(embedding="full", compression=None)).weight) == 38
    assert len(build_embeddings(config(embedding="hash", compression=2)).weight) <= 19
    sparse = torch.randint(0, 2**32, (5, 3))
    for embedding in ("robe", "full", "hash"):
        assert build_embeddings(config(embedding=embedding, compression=2))(sparse).shape == (5, 3, 4)
