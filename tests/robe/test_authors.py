"""Checkpoints as the ROBE authors' code writes them, against their formula in numpy."""

import random

import numpy as np
import pytest
import torch

import robe

ROWS, DIM, SIZE = [1000, 3, 40_000_000, 17], 12, 5003
# As their constructor makes them.
CONSTANTS = np.concatenate([[2038074743], np.random.RandomState(1024).randint(0, 2038074743, (50,))]).astype(np.int64)


def state_dict(size=SIZE, dtype=torch.float32):
    """Of their DLRM: the array under many names, the constants of each table, MLPs."""
    array = torch.nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype))
    weights = {"hashed_weight": array}
    for k in range(len(ROWS)):
        weights[f"emb_l.{k}.random_numbers"] = torch.from_numpy(CONSTANTS.copy())
        weights[f"emb_l.{k}.hashed_weight"] = weights[f"emb_l.{k}.weight"] = array
        weights[f"emb_l.{k}.signature"] = torch.zeros(2, dtype=torch.int64)
    return weights | {"bot_l.0.weight": torch.randn(4, 13), "top_l.0.bias": torch.randn(3)}


def rows_of(array, table, ids, block_size):
    """(n, d): their formula, component by component."""
    p, c, b, a = CONSTANTS[:4]
    i = np.arange(DIM)
    row = (ids + sum(ROWS[:table]))[:, None]
    hashed = (a * row + b * (i // block_size) + c) % p
    return array[hashed % (len(array) - block_size + 1) + i % block_size]


@pytest.mark.parametrize("block_size", [1, 4, 5, 12, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_theirs_element_for_element(block_size, dtype):
    weights = state_dict(dtype=dtype)
    layer = robe.load_authors_weights(weights, ROWS, DIM, block_size=block_size)
    generator = np.random.default_rng(0)
    ids = np.stack([generator.integers(0, rows, 200) for rows in ROWS], axis=1)
    ids[0], ids[1] = 0, np.array(ROWS) - 1
    got = layer(torch.from_numpy(ids)).detach()
    assert got.dtype == dtype
    array = weights["hashed_weight"].detach().numpy()
    for table in range(len(ROWS)):
        np.testing.assert_array_equal(got[:, table].numpy(), rows_of(array, table, ids[:, table], block_size))


def test_bags_are_sums():
    weights = state_dict()
    layer = robe.load_authors_weights(weights, ROWS, DIM, block_size=4)
    got = layer(torch.tensor([1, 999, 2, 39_999_999, 7, 0]), torch.tensor([0, 2, 3, 5, 6]))
    array = weights["hashed_weight"].detach().numpy().astype(np.float64)
    for table, ids in enumerate(([1, 999], [2], [39_999_999, 7], [0])):
        want = rows_of(array, table, np.array(ids), 4).sum(0)
        np.testing.assert_allclose(got[0, table].detach().numpy(), want, rtol=1e-6)


def test_files_and_names(tmp_path):
    weights = state_dict()
    want = robe.load_authors_weights(weights, ROWS, DIM, block_size=4, names=list("abcd"))
    assert want.feature_names == ["a", "b", "c", "d"]
    assert want.array.weight.requires_grad
    ids = torch.tensor([[5, 2, 77, 16]])
    saved = {"epoch": 1, "iter": 3, "train_loss": 0.5, "state_dict": weights, "opt_state_dict": {"state": {}}}
    for k, content in enumerate((weights, saved)):
        torch.save(content, tmp_path / f"{k}.pt")
        layer = robe.load_authors_weights(tmp_path / f"{k}.pt", ROWS, DIM, block_size=4)
        assert layer.feature_names == ["cat_0", "cat_1", "cat_2", "cat_3"]
        assert torch.equal(layer(ids), want(ids))


def test_one_layer_alone():
    weights = {"hashed_weight": torch.randn(100), "random_numbers": torch.from_numpy(CONSTANTS)}
    layer = robe.load_authors_weights(weights, [1000], DIM)
    np.testing.assert_array_equal(
        layer(torch.tensor([[3]])).detach().numpy()[0], rows_of(weights["hashed_weight"].numpy(), 0, np.array([3]), 1)
    )


def changed(**values):
    return state_dict() | values


OTHER_SEED = torch.from_numpy(np.random.RandomState(3).randint(0, 2038074743, (51,)))


@pytest.mark.parametrize(
    ("source", "sizes", "message"),
    [
        ({"a.weight": torch.ones(3)}, ROWS, "source: expected a hashed_weight among the weights, got a.weight"),
        ({}, ROWS, "expected a hashed_weight among the weights, got none"),
        (changed(**{"emb_l.2.hashed_weight": torch.ones(SIZE)}), ROWS, "expected one array that all tables share"),
        (
            changed(**{"emb_l.1.random_numbers": OTHER_SEED}),
            ROWS,
            r"emb_l.1.random_numbers: expected the constants \(20",
        ),
        (state_dict(), ROWS[:3], "num_embeddings: there are 4 tables, got 3 sizes"),
        ({"state_dict": [1]}, ROWS, "expected a hashed_weight"),
        ([1, 2], ROWS, "expected str, bytes or os.PathLike"),
    ],
)
def test_refused(source, sizes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        robe.load_authors_weights(source, sizes, DIM)


def test_refused_names():
    with pytest.raises(ValueError, match="names: expected 4, one a table, got 1"):
        robe.load_authors_weights(state_dict(), ROWS, DIM, names=["a"])


def test_refused_files(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError, match=r"a\.pt"):
        robe.load_authors_weights(path, ROWS, DIM)
    for content in (b"", b"nothing of the kind", b"PK\x03\x04cut off"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"source: expected what torch.save wrote in .*a\.pt"):
            robe.load_authors_weights(path, ROWS, DIM)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"expected a state_dict, or a dict with one of .*a\.pt, got a list"):
        robe.load_authors_weights(path, ROWS, DIM)


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a file, got"):
        robe.load_authors_weights(tmp_path, ROWS, DIM)


@pytest.mark.parametrize(
    "array",
    [
        torch.ones(1).expand(1 << 40),  # 4 bytes in a file
        torch.eye(3).to_sparse(),
        torch.ones(SIZE, dtype=torch.int64),
        torch.empty(SIZE, device="meta"),
    ],
    ids=["repeated", "sparse", "integers", "meta"],
)
def test_arrays_of_another_kind_are_refused(array):
    weights = {"hashed_weight": array, "random_numbers": torch.from_numpy(CONSTANTS)}
    with pytest.raises(ValueError, match="expected a hashed_weight"):
        robe.load_authors_weights(weights, ROWS[:1], DIM)


@pytest.mark.parametrize("as_zip", [True, False])
def test_damaged_files_are_refused_in_one_line(as_zip, tmp_path):
    """Whatever torch's unpickler ends in."""
    path, random_ = tmp_path / "a.pt", random.Random(0)
    torch.save(state_dict(), path, _use_new_zipfile_serialization=as_zip)
    content = path.read_bytes()
    refused = []
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(4):
            damaged[random_.randrange(2000)] = random_.randrange(256)
        path.write_bytes(damaged[: random_.choice([len(damaged), random_.randrange(len(damaged))])])
        try:
            robe.load_authors_weights(path, ROWS, DIM, block_size=4)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 75
    assert all("a.pt" in message and "\n" not in message for message in refused)
