"""The hash against its formula in Python integers (see conftest), against frozen numbers, and against chance."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robe.hashing import mix64, multiply_high, slots, table_key
from tests.helpers.oracle import A, B, C, P, places, signed
from tests.helpers.oracle import mix64 as oracle_mix64
from tests.helpers.oracle import table_key as oracle_table_key

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
KAGGLE_ROWS = 33_762_577  # of the 26 tables together
D, Z, M = 16, 4, 540_201  # the Kaggle model at 1000 times

int64 = st.integers(INT64_MIN, INT64_MAX)
edge_ids = st.one_of(int64, st.integers(-50, 50), st.integers(0, 50).map(lambda k: INT64_MAX - k))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other take several times as long where other work has one of their cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def robe_slots(ids, *, sign=True, seed=0, table_id=0, first_row=0, **layout):
    """Slots and signs of rows from robe, in the arguments of the oracle."""
    key = {"mix": table_key(seed, table_id), "linear": first_row, "identity": first_row * layout["embedding_dim"]}
    return slots(torch.as_tensor(ids), torch.tensor(key[layout["hash"]]), sign=sign, **layout)


def assert_same_as_oracle(ids, **layout):
    got, signs = robe_slots(ids, **layout)
    want, want_signs = places(ids, sign=True, **layout)
    assert got.dtype == torch.int64
    np.testing.assert_array_equal(got.numpy(), want)
    np.testing.assert_array_equal(signs.numpy(), want_signs)


# ---------------------------------------------------------------------------------------------------------------------
# The mixer and the product


def test_mix64_is_the_finaliser_of_splitmix64():
    """The published outputs of SplitMix64 from state 1234567: its state grows by G, its output is mix64(state)."""
    outputs = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    states = torch.tensor([signed(1234567 + k * 0x9E3779B97F4A7C15) for k in range(1, 6)])
    assert mix64(states).tolist() == [signed(x) for x in outputs]
    assert [oracle_mix64(int(x)) for x in states] == outputs


@given(st.lists(int64, min_size=1, max_size=20))
def test_mix64_equals_python_integers(values):
    assert mix64(torch.tensor(values)).tolist() == [signed(oracle_mix64(x)) for x in values]


def test_mix64_is_undone_by_its_inverse():
    """A bijection: multiply by the inverse odd constants and undo the xor-shifts, and the input is back."""
    inputs = [0, 1, -1, INT64_MIN, INT64_MAX, *np.random.default_rng(1).integers(INT64_MIN, INT64_MAX, 200).tolist()]
    mask = 2**64 - 1

    def undo_xor_shift(x, shift):
        result = x
        for _ in range(64 // shift):
            result = x ^ (result >> shift)
        return result

    for x, mixed in zip(inputs, mix64(torch.tensor(inputs)).tolist()):
        back = undo_xor_shift(mixed & mask, 31)
        back = undo_xor_shift(back * pow(0x94D049BB133111EB, -1, 2**64) & mask, 27)
        back = undo_xor_shift(back * pow(0xBF58476D1CE4E5B9, -1, 2**64) & mask, 30)
        assert signed(back) == x


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 62, 63])
def test_mix64_moves_every_output_bit_half_of_the_time(bit):
    inputs = torch.arange(10_000) << 2  # none has one of the bits set, so that none stands for another
    changed = mix64(inputs) ^ mix64(inputs ^ signed(1 << bit))
    flips = ((changed.unsqueeze(1) >> torch.arange(64)) & 1).sum(0)
    assert ((flips - 5000).abs() < 5 * 50).all()  # 5 sigma of 10,000 coin flips


@given(
    st.lists(st.one_of(int64, st.sampled_from([0, -1, INT64_MIN, INT64_MAX, 2**32 - 1, -(2**32)])), min_size=1),
    st.one_of(
        st.integers(1, 2**32),
        st.integers(2**32, 2**62),
        st.sampled_from([1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**62, 2**63 - 1]),
    ),
)
def test_multiply_high_equals_python_integers(values, n):
    assert multiply_high(torch.tensor(values), n).tolist() == [((x % 2**64) * n) >> 64 for x in values]


@given(st.integers(-(2**70), 2**70), st.integers(-(2**70), 2**70))
def test_table_key_equals_python_integers_for_any_seed_and_table(seed, table_id):
    assert table_key(seed, table_id) == signed(oracle_table_key(seed, table_id))


# ---------------------------------------------------------------------------------------------------------------------
# Slots and signs


@given(
    ids=st.lists(edge_ids, min_size=1, max_size=8),
    embedding_dim=st.integers(1, 9),
    block_size=st.integers(1, 30),  # below, at and above d; dividing it, divided by it, and neither
    spare=st.one_of(st.integers(0, 100), st.integers(2**32, 2**62 - 100)),
    seed=st.integers(-(2**64), 2**64),
    table_id=st.integers(-3, 2**33),
)
def test_mix_equals_the_formula(ids, embedding_dim, block_size, spare, seed, table_id):
    layout = {"size": block_size + spare, "embedding_dim": embedding_dim, "block_size": block_size}
    assert_same_as_oracle(ids, hash="mix", seed=seed, table_id=table_id, **layout)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7, 8, 9, 12, 16, 20, 24, 100])
def test_mix_equals_the_formula_at_every_relation_of_block_and_row(block_size):
    ids = [*range(-30, 31), INT64_MIN, INT64_MIN + 1, INT64_MIN // 8, INT64_MAX // 8 + 1, INT64_MAX - 1, INT64_MAX]
    for table_id in range(3):
        layout = {"size": 1003, "embedding_dim": 8, "block_size": block_size, "table_id": table_id}
        assert_same_as_oracle(ids, hash="mix", seed=11, **layout)


def test_blocks_wider_than_a_row_hold_consecutive_rows_side_by_side():
    """Z = 4 d: rows 4 k ... 4 k + 3 are one run of consecutive slots; for negative ids too."""
    rows, signs = robe_slots(torch.arange(-8, 8), hash="mix", size=5000, embedding_dim=3, block_size=12)
    runs = rows.view(4, 12)
    assert torch.equal(runs - runs[:, :1], torch.arange(12).expand(4, 12))
    assert torch.equal(signs.view(4, 12), signs.view(4, 12)[:, :1].expand(4, 12))
    assert len(set(runs[:, 0].tolist())) == 4


@given(
    ids=st.lists(edge_ids, min_size=1, max_size=8),
    embedding_dim=st.integers(1, 9),
    block_size=st.integers(1, 30),
    spare=st.one_of(st.integers(0, 100), st.integers(0, 2**40)),
    first_row=st.one_of(st.integers(0, 10**9), st.integers(0, 2**62)),
)
def test_linear_equals_the_formula(ids, embedding_dim, block_size, spare, first_row):
    """Python's % is floor mod, so this says what negative ids mean as well."""
    layout = {"size": block_size + spare, "embedding_dim": embedding_dim, "block_size": block_size}
    assert_same_as_oracle(ids, hash="linear", first_row=first_row, **layout)


@pytest.mark.parametrize("row", [10**10, 10**10 + 586_900_000, 10**11, 10**15, INT64_MAX, -1, -(10**11), INT64_MIN])
def test_linear_stays_right_where_int64_overflows(row):
    """A * row passes 2**63 above 1.06e10: there the authors' int64 wraps, and addresses leave the array."""
    got, _ = robe_slots([row], hash="linear", size=M, embedding_dim=D, block_size=Z)
    offsets = [(A * row + B * block + C) % P % (M - Z + 1) for block in range(4)]
    assert got[0, ::Z].tolist() == offsets
    assert (got[0].view(4, Z) - got[0, ::Z, None]).tolist() == [[0, 1, 2, 3]] * 4


def test_linear_starts_anew_at_component_0_where_blocks_are_wider_than_rows():
    got, _ = robe_slots([0, 1, 2], hash="linear", size=1000, embedding_dim=4, block_size=10)
    want = [(A * row + C) % P % 991 for row in range(3)]
    assert got.tolist() == [[offset + i for i in range(4)] for offset in want]


@pytest.mark.parametrize("block_size", [1, 3, 4, 50])
def test_identity_gives_every_weight_a_slot_of_its_own(block_size):
    """Tables of 5 and 7 rows, one behind the other; no signs even if asked for."""
    ids = torch.tensor([[x, y] for x in range(5) for y in range(7)])
    got, signs = slots(
        ids, torch.tensor([0, 20]), size=48, embedding_dim=4, block_size=block_size, hash="identity", sign=True
    )
    assert signs is None
    assert got[::7, 0].flatten().tolist() == list(range(20))
    assert got[:7, 1].flatten().tolist() == list(range(20, 48))


@pytest.mark.parametrize("hash", ["mix", "linear"])
@pytest.mark.parametrize("block_size", [2, 3, 10])
def test_keys_broadcast_to_ids(hash, block_size):
    """One key per column, as in a (B, F) batch, and one per id, as in bags: both as if each row were alone."""
    ids, keys = torch.tensor([[1, 2], [3, 4], [5, -6]]), torch.tensor([17, 99])
    layout = {"size": 101, "embedding_dim": 5, "block_size": block_size, "hash": hash, "sign": True}
    by_column, by_id = slots(ids, keys, **layout), slots(ids.flatten(), keys.repeat(3), **layout)
    for k, (x, key) in enumerate(zip(ids.flatten(), keys.repeat(3))):
        for both in zip(by_column, by_id, slots(x, key, **layout)):
            assert both[0].flatten(0, 1)[k].tolist() == both[1][k].tolist() == both[2].tolist()


@pytest.mark.parametrize("hash", ["mix", "linear", "identity"])
def test_without_signs_there_are_none(hash):
    assert robe_slots([1], sign=False, hash=hash, size=50, embedding_dim=4, block_size=2)[1] is None


@pytest.mark.parametrize("hash", ["mix", "linear"])
@pytest.mark.parametrize("block_size", [2, 10])
def test_an_array_of_one_block_is_read_from_its_start(hash, block_size):
    got, _ = robe_slots(range(-50, 50), hash=hash, size=block_size, embedding_dim=4, block_size=block_size)
    assert int(got.min()) == 0
    assert int(got.max()) < block_size
    if block_size == 2:
        assert got.tolist() == [[0, 1, 0, 1]] * 100


# ---------------------------------------------------------------------------------------------------------------------
# Golden vectors: frozen numbers. They are a promise: weights trained with robe mean something only under these very
# addresses. If one of these tests fails, the code is wrong, never the numbers; a better hash gets a new name.

GOLDEN_KEYS = {
    (0, 0): 5197578548964807871,
    (0, 1): -6411193824288604561,
    (1, 0): -2529857523242969672,
    (2024, 25): 6053026720310598195,
    (-1, -1): 3314115673469747073,
    (2**63, 2**40): -491549481277285709,
}
# (m, d, Z, seed, table_id): {row: [offset of each block, signed by the block's sign]}. None of the offsets is 0.
GOLDEN_BLOCKS = {
    (1000, 4, 2, 0, 0): {
        0: [98, -175],
        1: [925, -365],
        2: [27, -85],
        123456789: [183, 836],
        2**63 - 1: [597, -662],
        -1: [-589, -822],
        -(2**63): [966, -527],
    },
    (540_201, 16, 4, 0, 0): {
        0: [53476, -94759, 255630, 353292],
        1: [500237, -197743, 142642, -121716],
        2: [14919, -46071, -532217, 296130],
        123456789: [99359, 452140, 265332, 57407],
        2**63 - 1: [323001, -358414, 220140, -140089],
        -1: [-318775, -444892, -176353, 403772],
        -(2**63): [522460, -285080, 189139, 414189],
    },
    (2**33 + 7, 4, 2, 7, 3): {
        0: [-4019819242, -7488516853],
        1: [-91844992, -4209539891],
        2: [2277555729, -2102281169],
        123456789: [2486992405, 6754924061],
        2**63 - 1: [-5168267281, -3303685512],
        -1: [-4825263246, 1501429841],
        -(2**63): [-8299922319, 6513657487],
    },
    (2**40, 3, 1, -1, 25): {
        0: [574256433010, 848642527484, 18804458039],
        1: [-603786107801, 560998117216, 348425636611],
        2: [676304791301, 1035635265832, 358604362539],
        123456789: [889986059854, -362611920044, 110884683333],
        2**63 - 1: [486038413177, -751684016404, 481737480253],
        -1: [956528874153, -115104121792, -455354820404],
        -(2**63): [-335965368303, -422521464554, 842731484292],
    },
}
# Z > d, rows that cross from one block into the next among them: (m, d, Z, seed, table_id): {row: every slot, signed}.
GOLDEN_WIDE_ROWS = {
    (1000, 4, 8, 0, 0): {
        0: [98, 99, 100, 101],
        1: [102, 103, 104, 105],
        2: [919, 920, 921, 922],
        123456789: [491, 492, 493, 494],
        2**63 - 1: [271, 272, 273, 274],
        -1: [-589, -590, -591, -592],
        -(2**63): [-946, -947, -948, -949],
    },
    (1000, 4, 6, 0, 1): {
        0: [-233, -234, -235, -236],
        1: [-237, -238, -509, -510],
        2: [-511, -512, -513, -514],
        123456789: [863, 864, 865, 866],
        2**63 - 1: [-712, -713, -42, -43],
        -1: [-381, -382, -383, -384],
        -(2**63): [419, 420, -852, -853],
    },
}


def test_golden_table_keys():
    assert {pair: table_key(*pair) for pair in GOLDEN_KEYS} == GOLDEN_KEYS


@pytest.mark.parametrize("case", GOLDEN_BLOCKS)
def test_golden_mix(case):
    size, embedding_dim, block_size, seed, table_id = case
    layout = {"size": size, "embedding_dim": embedding_dim, "block_size": block_size}
    ids = list(GOLDEN_BLOCKS[case])
    got, signs = robe_slots(ids, hash="mix", seed=seed, table_id=table_id, **layout)
    assert dict(zip(ids, (got * signs)[:, ::block_size].tolist())) == GOLDEN_BLOCKS[case]


@pytest.mark.parametrize("case", GOLDEN_WIDE_ROWS)
def test_golden_mix_with_blocks_wider_than_rows(case):
    size, embedding_dim, block_size, seed, table_id = case
    layout = {"size": size, "embedding_dim": embedding_dim, "block_size": block_size}
    ids = list(GOLDEN_WIDE_ROWS[case])
    got, signs = robe_slots(ids, hash="mix", seed=seed, table_id=table_id, **layout)
    assert dict(zip(ids, (got * signs).tolist())) == GOLDEN_WIDE_ROWS[case]


# The offsets of blocks 0 and 1 of a row, by hand from ((A * (row + first_row) + B * block + C) mod P) mod (m - Z + 1)
# with m - Z + 1 = 540198.
#   row 0, block 0:  C                       =  634329019                           = 1174 * 540198 + 136567
#   row 0, block 1:  B + C                   = 2459581260 = P + 421506517; that is     780 * 540198 + 152077
#   row 1, block 0:  A + C                   = 1505534375                           = 2787 * 540198 +   2549
#   row 1, block 1:  A + B + C               = 3330786616 = P + 1292711873; that is   2393 * 540198 +  18059
#   row 2 after 1000 rows, block 0:  1002 A + C = 873582095731 = 428 P + 1286105727;  2380 * 540198 + 434487
#   row 2 after 1000 rows, block 1:  that value + B = 3111357968 = P + 1073283225;    1986 * 540198 + 449997
GOLDEN_LINEAR = {(0, 0): [136567, 152077], (0, 1): [2549, 18059], (1000, 2): [434487, 449997]}


@pytest.mark.parametrize(("first_row", "row"), GOLDEN_LINEAR)
def test_golden_linear(first_row, row):
    got, _ = robe_slots([row], hash="linear", size=M, embedding_dim=D, block_size=Z, first_row=first_row)
    assert got[0, : 2 * Z : Z].tolist() == GOLDEN_LINEAR[first_row, row]


def test_golden_linear_sign_is_that_of_the_mixed_value():
    """Bit 0 of mix64(value mod P); of the values in the comment above, those of row 0 and row 1, blocks 0 and 1."""
    _, signs = robe_slots([0, 1], hash="linear", size=M, embedding_dim=D, block_size=Z)
    values = [[634329019, 421506517], [1505534375, 1292711873]]
    assert signs[:, : 2 * Z : Z].tolist() == [[1 - 2 * (oracle_mix64(v) & 1) for v in row] for row in values]
    assert len(set(signs.flatten().tolist())) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Chance. Every hash here is fixed, so no test is left to luck: 5 sigma is what a uniform hash would pass.


def offsets_of(ids, *, hash="mix", size, blocks=2, block_size=2, **options):
    """(n, blocks): the offset of each block."""
    layout = {"size": size, "embedding_dim": blocks * block_size, "block_size": block_size}
    return robe_slots(ids, hash=hash, sign=False, **layout, **options)[0][:, ::block_size]


def chi_square_sigmas(counts) -> float:
    """How many sigma the chi-square statistic lies from what counts of equal expectation give."""
    counts = torch.as_tensor(counts).double().flatten()
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum().item() - freedom) / (2 * freedom) ** 0.5


def joint_counts(x, y, x_bins, y_bins):
    return torch.bincount(x * y_bins + y, minlength=x_bins * y_bins)


ID_PATTERNS = {
    "sequential": torch.arange(250_000),
    "negative": torch.arange(-250_000, 0),
    "strided": torch.arange(250_000) * (1 << 40),
    "multiples of m": torch.arange(250_000) * 1003,
    "64 random bits": torch.from_numpy(np.random.default_rng(5).integers(INT64_MIN, INT64_MAX, 250_000)),
}


@pytest.mark.parametrize("pattern", ID_PATTERNS)
def test_mix_loads_slots_evenly_whatever_the_ids(pattern):
    got, _ = robe_slots(ID_PATTERNS[pattern], hash="mix", sign=False, size=1003, embedding_dim=D, block_size=Z)
    offsets = torch.bincount(got[:, ::Z].flatten(), minlength=1000)
    assert len(offsets) == 1000  # 0 ... m - Z, both ends included
    mean = offsets.double().mean()
    assert mean == 1000
    assert ((offsets - mean).abs() < 5 * mean.sqrt()).all()
    assert abs(chi_square_sigmas(offsets)) < 5
    # Near the ends fewer offsets cover a slot: 1, 2, 3, 4, 4, ..., 4, 3, 2, 1 of them.
    load = torch.bincount(got.flatten(), minlength=1003).double()
    slot = torch.arange(1003)
    expected = torch.minimum(slot + 1, 1003 - slot).clamp(max=Z) * mean
    assert ((load - expected).abs() < 5 * expected.sqrt()).all()


def test_mix_loads_slots_evenly_where_blocks_span_rows():
    """24,000 blocks of 12 rows and a half: an offset serves a block, so one is counted for every block."""
    rows = torch.arange(300_000)
    got, _ = robe_slots(rows, hash="mix", sign=False, size=1024, embedding_dim=2, block_size=25)
    position = torch.stack([rows * 2, rows * 2 + 1], 1).flatten()
    offsets = torch.bincount(got.flatten()[position % 25 == 0], minlength=1000)
    assert len(offsets) == 1000
    assert offsets.sum() == 24_000
    assert abs(chi_square_sigmas(offsets)) < 5


@pytest.mark.parametrize("size", [2**31 + 11, 2**33 + 7, 2**45, 2**62])
def test_mix_reaches_all_of_a_huge_array_evenly(size):
    offsets = offsets_of(torch.arange(500_000), size=size).flatten()
    assert int(offsets.min()) >= 0
    assert int(offsets.max()) <= size - 2
    counts = torch.bincount((offsets.double() / (size - 1) * 1000).long(), minlength=1000)
    assert len(counts) == 1000
    assert ((counts - 1000).abs() < 5 * 1000**0.5).all()
    assert abs(chi_square_sigmas(counts)) < 5


def test_mix_keeps_at_least_999_of_1000_embeddings_distinct():
    rows = 2_000_000
    offsets = offsets_of(torch.arange(rows), size=M, blocks=4, block_size=Z)
    choices = M - Z + 1
    key = (offsets[:, 0] * choices + offsets[:, 1]) * choices + offsets[:, 2]  # below 2**58; rows distinct by three
    assert len(key.unique()) >= 0.999 * rows  # blocks are distinct by all four


@pytest.mark.slow
def test_linear_keeps_6_percent_of_the_kaggle_embeddings_distinct():
    """Why "mix" exists. Block b of a row has value (value of block 0 + b * B) mod P, so a row's first address fixes
    the others but for one thing: whether the sum wrapped at P. The three sums wrap one after the other as the first
    value grows, so four cases are all there are, and no more than 4 * (m - Z + 1) = 2.2 million vectors of addresses
    serve 33.8 million rows.
    """
    choices = M - Z + 1
    shifts = [b * B % P for b in (1, 2, 3)]
    # What to add to the first offset, in the four cases: as the first value passes P - shift, block b wraps.
    starts = [0, *sorted(P - shift for shift in shifts)]
    cases = [[(shift - P * (start >= P - shift)) % choices for shift in shifts] for start in starts]
    packed = torch.tensor([(x * choices + y) * choices + z for x, y, z in cases]).sort().values
    seen = torch.zeros(4, choices, dtype=torch.bool)
    for start in range(0, KAGGLE_ROWS, 1 << 16):
        rows = torch.arange(start, min(start + (1 << 16), KAGGLE_ROWS))
        first, *others = offsets_of(rows, hash="linear", size=M, blocks=4, block_size=Z).unbind(1)
        x, y, z = (torch.where(other < first, other - first + choices, other - first) for other in others)
        key = (x * choices + y) * choices + z
        case = torch.searchsorted(packed, key).clamp(max=3)
        assert torch.equal(packed[case], key)
        seen[case, first] = True
    assert 0.0635 < seen.sum().item() / KAGGLE_ROWS < 0.0645


def share_of_pairs(first, second, choices):
    """Of the pairs of rows that share the first offset: how many there are, how many share the second one too."""

    def pairs(counts):
        return (counts * (counts - 1) // 2).sum().item()

    return pairs(torch.bincount(first)), pairs(joint_counts(first, second, choices, choices))


def test_mix_rows_that_share_one_block_share_another_by_chance_only():
    choices = 1000
    offsets = offsets_of(torch.arange(100_000), size=choices + 1)
    same_first, same_both = share_of_pairs(*offsets.unbind(1), choices)
    expected = same_first / choices  # 5,000 of 5 million pairs
    assert abs(same_both - expected) < 5 * expected**0.5


def test_linear_rows_that_share_one_block_mostly_share_another():
    """They do unless exactly one of the two second values wrapped at P, which B / P = 0.896 of them do."""
    choices = 1000
    offsets = offsets_of(torch.arange(100_000), hash="linear", size=choices + 1)
    same_first, same_both = share_of_pairs(*offsets.unbind(1), choices)
    assert same_both / same_first == pytest.approx((B / P) ** 2 + (1 - B / P) ** 2, abs=0.01)  # 0.81, not 0.001


# Two offsets that should have nothing to do with each other: the block, what is added to the row, the table.
UNRELATED = {
    "two blocks": ({}, {"block": 1}),
    "two tables": ({}, {"table_id": 1}),
    "two far tables": ({}, {"table_id": 2**40}),
    "two seeds": ({}, {"seed": 1}),
    "table 1 of seed 0 and table 0 of seed 1": ({"table_id": 1}, {"seed": 1}),
    "neighbouring rows": ({}, {"add": 1}),
    "a row's block 1 and the next row's block 0": ({"block": 1}, {"add": 1}),
    "rows apart by 2**32": ({}, {"add": 2**32}),
    "rows apart by 2**63": ({}, {"add": INT64_MIN}),
}


@pytest.mark.parametrize("what", UNRELATED)
def test_mix_is_independent_between(what):
    def offset_of(block=0, add=0, **table):
        return offsets_of(torch.arange(500_000) + add, size=1001, **table)[:, block]

    x, y = (offset_of(**side) for side in UNRELATED[what])
    assert abs(chi_square_sigmas(joint_counts(x * 20 // 1000, y * 20 // 1000, 20, 20))) < 5  # coarse
    assert abs(chi_square_sigmas(joint_counts(x % 20, y % 20, 20, 20))) < 5  # and fine
    expected = len(x) / 1000
    assert abs((x == y).sum().item() - expected) < 5 * expected**0.5


def test_mix_signs_are_balanced_and_say_nothing_of_the_offset():
    got, signs = robe_slots(torch.arange(250_000), hash="mix", size=1003, embedding_dim=D, block_size=Z)
    assert torch.equal(signs[:, ::Z].repeat_interleave(Z, 1), signs)  # one sign for a whole block
    sign = signs[:, ::Z].flatten()
    assert set(sign.tolist()) == {-1, 1}
    assert abs(sign.sum().item()) < 5 * 1000  # 5 sigma of a million coin flips
    assert abs(chi_square_sigmas(joint_counts((sign + 1) // 2, got[:, ::Z].flatten(), 2, 1000))) < 5


@pytest.mark.parametrize("other", [{"table_id": 1}, {"seed": 1}])
def test_mix_signs_are_independent_between_tables_and_seeds(other):
    layout = {"hash": "mix", "size": 1001, "embedding_dim": 4, "block_size": 2}
    x, y = (robe_slots(torch.arange(250_000), **layout, **key)[1][:, ::2] for key in ({}, other))
    for a, b in ((x[:, 0], x[:, 1]), (x[:, 0], y[:, 0])):
        assert abs((a * b).sum().item()) < 5 * 500


def test_linear_signs_are_balanced():
    signs = robe_slots(torch.arange(250_000), hash="linear", size=1003, embedding_dim=D, block_size=Z)[1][:, ::Z]
    assert abs(signs.sum().item()) < 5 * 1000
