"""The tables ROBE is compared with, against nn.Embedding and a Python dictionary."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from dlrm import DLRM, DLRMConfig
from dlrm.embeddings import Tables, VocabularyTables, bags, build_embeddings, capped_rows, synthetic_ids
from robe import RobeEmbeddingBagCollection
from tests.helpers.oracle import mix64, table_key

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


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    "make",
    [lambda: Tables([5, 7], 4), lambda: VocabularyTables([3, 3], 4, [torch.tensor([1, 5]), torch.tensor([2, 3])])],
    ids=["tables", "vocabulary"],
)
def test_tables_from_the_meta_device_read_what_they_are_filled_with(make, assign):
    source, ids = make(), torch.randint(0, 9, (20, 2), generator=torch.Generator().manual_seed(0))
    tables = make().to("meta")
    if not assign:
        tables.to_empty(device="cpu")
    tables.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(tables(ids), source(ids))


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


# -- Several ids a feature --------------------------------------------------------------------------------------------

HOTS = (2, 1, 3)


def bag_sums(tables, rows):
    """nn.EmbeddingBag of each feature on its own table: (B, F, D)."""
    ends = np.cumsum(HOTS).tolist()
    parts = [rows[:, end - hot : end] for end, hot in zip(ends, HOTS)]
    return torch.stack([functional.embedding_bag(part, table, mode="sum") for part, table in zip(parts, tables)], 1)


@pytest.mark.parametrize("examples", [0, 1, 4])
def test_bags(examples):
    sparse = torch.randint(0, 2**32, (examples, 6))
    values, offsets = bags(sparse, HOTS)
    assert len(offsets) == 3 * examples + 1
    got = [values[a:b].tolist() for a, b in pairwise(offsets.tolist())]
    rows = sparse.tolist()
    assert got == [row[a:b] for a, b in ((0, 2), (2, 3), (3, 6)) for row in rows]


@pytest.mark.parametrize("kind", ["tables", "vocabulary", "robe"])
def test_sums_of_several_ids(kind):
    torch.manual_seed(0)
    sparse = torch.randint(0, 2**32, (20, 6))
    sparse[0, 0] = sparse[0, 1] = sparse[1, 0]  # the same id twice in a bag, and in two
    if kind == "robe":
        embeddings = build_embeddings(config(compression=2, hots=HOTS))
        sparse %= 50
        ids = torch.arange(50).unsqueeze(1).expand(-1, 3)
        own = embeddings(ids.contiguous()).detach().transpose(0, 1)
        rows = sparse
    else:
        if kind == "tables":
            embeddings = Tables(ROWS, 4)
            rows_of = [lambda i, n=n: i % n for n in ROWS]
        else:
            known = [[int(sparse[1, 0]), 5], [], sparse[:, 3:].reshape(-1).unique().tolist()[:29]]
            known = [sorted(ids) for ids in known]
            tables = [len(ids) + 1 for ids in known]
            embeddings = VocabularyTables(tables, 4, [torch.tensor(ids, dtype=torch.int64) for ids in known])
            rows_of = [lambda i, ids=ids: ids.index(i) if i in ids else len(ids) for ids in known]
        own = embeddings.weight.detach().split(embeddings.table_rows.tolist())
        feature = [f for f, hot in enumerate(HOTS) for _ in range(hot)]
        rows = torch.tensor([[rows_of[f](i) for f, i in zip(feature, row)] for row in sparse.tolist()])
    own = [table.clone().requires_grad_() for table in own]
    expected, got = bag_sums(own, rows), embeddings(*bags(sparse, HOTS))
    torch.testing.assert_close(got, expected)
    factor = torch.randn(20, 3, 4)
    (got * factor).sum().backward()
    (expected * factor).sum().backward()
    if kind == "robe":
        virtual = embeddings(ids.contiguous()).transpose(0, 1)
        dense = torch.stack([table.grad for table in own])
        (grad,) = torch.autograd.grad((virtual * dense).sum(), embeddings.array.weight)
        torch.testing.assert_close(embeddings.array.weight.grad, grad)
    else:
        torch.testing.assert_close(embeddings.weight.grad.to_dense(), torch.cat([table.grad for table in own]))


@pytest.mark.parametrize("embedding", ["robe", "full", "hash"])
def test_hots_of_one_are_one_id_each(embedding):
    embeddings = build_embeddings(config(embedding=embedding, compression=2))
    sparse = torch.randint(0, 2**32, (5, 3))
    torch.testing.assert_close(embeddings(*bags(sparse, (1, 1, 1))), embeddings(sparse))


def test_synthetic_ids_are_the_id_and_hashes_of_it_in_its_table():
    rows, hots = (1000, 7, 40_000_000), (3, 1, 2)
    sparse = torch.tensor([[5, -1, 2**40], [6, 0, 2**40], [5, 3, 0]])
    ids = synthetic_ids(sparse, hots, rows)
    expected = []
    for row in sparse.tolist():
        expected.append([])
        for feature, (x, hot, size) in enumerate(zip(row, hots, rows)):
            of_id = mix64(x + table_key(0x484F5453, feature))
            expected[-1] += [x] + [mix64(of_id + k) * size >> 64 for k in range(1, hot)]
    assert ids.tolist() == expected
    many = synthetic_ids(torch.arange(20_000)[:, None], (2,), (100,))[:, 1]
    counts = np.bincount(many.numpy(), minlength=100)
    assert len(counts) == 100
    assert ((counts - 200) ** 2 / 200).sum() < 170, "chi-squared with 99 degrees of freedom: 1e-5"


def test_a_model_makes_the_ids_of_synthetic_hots_itself():
    with_hots = config(table_rows=(10, 20), compression=3, hots=(3, 2))
    made = DLRM(replace(with_hots, synthetic_hots=True))
    given = DLRM(with_hots)
    given.load_state_dict(made.state_dict())
    dense, sparse = torch.randn(5, 13), torch.randint(0, 2**32, (5, 2))
    assert made.config.data_hots is None
    assert given.config.data_hots == (3, 2)
    assert torch.equal(made(dense, sparse), given(dense, synthetic_ids(sparse, (3, 2), (10, 20))))
    with pytest.raises(ValueError, match="synthetic_hots: expected hots with it"):
        replace(with_hots, hots=None, synthetic_hots=True)
