"""Where an id's filter bits and counters lie, against the formula in Python's own integers."""

import pytest
import torch

from robe.hashing import table_key
from robe.sketches import BITS_OF_ID, COUNTERS, SHARED_ID, admits, counters_of, filter_places
from tests.helpers.oracle import GOLDEN, MASK, mix64, signed

ROWS = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF, -(2**40) - 7]


@pytest.mark.parametrize("words", [1, 3, 64, 1000, 2**31 + 11])
def test_bits_of_an_id_lie_in_one_word(words):
    word, bits = filter_places(torch.tensor(ROWS), words)
    for row, at, got in zip(ROWS, word.tolist(), bits.tolist()):
        row &= MASK
        assert at == row * words >> 64
        assert got & MASK == 1 << row % 64 | 1 << row // 64 % 64 | 1 << row // 4096 % 64
        assert 1 <= (got & MASK).bit_count() <= BITS_OF_ID


@pytest.mark.parametrize("width", [1, 7, 4096, 2**28])
def test_counters_of_an_id(width):
    places = counters_of(torch.tensor(ROWS), width)
    expected = [[mix64(row + k * 0xD1B54A32D192ED03) * width >> 64 for row in ROWS] for k in range(1, 5)]
    assert places.tolist() == expected
    assert places.shape == (COUNTERS, len(ROWS))


def test_an_id_is_in_when_all_its_bits_are_set():
    key, ids, words = table_key(3, 1), [5, -9, 2**40], 8
    rows = [mix64(key + x * GOLDEN) for x in ids]
    filter = [0] * words
    for row in rows[:2]:
        filter[row * words >> 64] |= 1 << row % 64 | 1 << row // 64 % 64 | 1 << row // 4096 % 64
    given = torch.tensor([signed(word) for word in filter])
    assert admits(given, torch.tensor(ids), torch.tensor(key)).tolist() == [True, True, False]
    missing = given.clone()
    missing[rows[0] * words >> 64] &= ~(1 << rows[0] % 64) if rows[0] % 64 < 63 else 2**63 - 1
    assert not admits(missing, torch.tensor(ids[:1]), torch.tensor(key)).item()


def test_the_shared_id_is_the_lowest():
    assert torch.iinfo(torch.int64).min == SHARED_ID
