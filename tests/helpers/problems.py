"""Random tables on one array and inputs of the operators, for tests that hold kernels against the reference."""

import numpy as np
import torch
from hypothesis import strategies as st

from robe.ops.layout import Tables, UpdateLists, unpack_bag_backward, unpack_lookup_backward

HASHES, MODES = ("mix", "linear", "identity"), ("sum", "mean", "max")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# One rounding step of each type, with room for sums in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def assert_close(got, want, tolerance=None):
    tolerance = TOLERANCE[want.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


class Problem:
    """Tables on one array, and random inputs for every operator."""

    def __init__(
        self,
        rows,
        *,
        size=1000,
        dim=8,
        block=8,
        hash="mix",
        sign=False,
        padding_idx=None,
        dtype=torch.float32,
        group=4,
        wide=True,
        uneven=False,
        ties=False,
        words=0,
        seed=0,
    ):
        self.rng, self.generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        self.rows, self.dim, self.padding_idx, self.dtype = rows, dim, padding_idx, dtype
        self.wide, self.uneven = wide, uneven
        first = [sum(rows[:k]) for k in range(len(rows))]
        if hash == "identity":
            size = max(size, sum(rows) * dim)
        keys = {
            "mix": [int(key) for key in self.rng.integers(-(2**63), 2**63 - 1, len(rows))],
            "linear": first,
            "identity": [n * dim for n in first],
        }[hash]
        self.tables = torch.tensor(keys), torch.tensor(rows), dim, block, hash, sign, padding_idx
        self.size, self.scale, self.filter = size, None, None
        if words:  # a filter with 3 of 4 bits set: 4 of 10 ids are in
            bits = (self.rng.integers(-(2**63), 2**63 - 1, words) for _ in range(2))
            self.filter = self.laid_out(torch.from_numpy(np.bitwise_or(*bits)))
        self.embedding_dtype = torch.float32 if dtype == torch.int8 else dtype
        if dtype == torch.int8:
            self.weight = torch.randint(-127, 128, (size,), dtype=torch.int8, generator=self.generator)
            self.scale = torch.rand(-(-size // group), generator=self.generator)
        else:
            values = self.floats(size)
            self.weight = self.laid_out((values.round() if ties else values).to(dtype))

    def floats(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def laid_out(self, tensor):
        """The same values, if uneven at strides that are not contiguous and from an address in between."""
        if not self.uneven:
            return tensor
        wider = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
        wider[..., 1] = tensor
        return wider[..., 1]

    def ids(self, feature, n):
        rows = self.rows[feature]
        if rows:
            ids = self.rng.integers(0, rows, n)
        elif self.wide:
            ids = self.rng.integers(-(2**63), 2**63 - 1, n) >> self.rng.integers(0, 62, n)
        else:
            ids = self.rng.integers(-(2**31), 2**31 - 1, n)
        if self.padding_idx is not None:
            ids = np.where(self.rng.random(n) < 0.3, self.padding_idx, ids)
        return ids

    def lookup(self, batch):
        """weight, ids and tables."""
        ids = torch.from_numpy(np.stack([self.ids(f, batch) for f in range(len(self.rows))]).astype(np.int64)).T
        ids = self.laid_out(ids) if self.uneven else ids.contiguous()
        return self.weight, ids if self.wide else ids.int(), *self.tables

    def bag(self, batch, mode, *, longest=5, weighted=False):
        """weight, values, offsets, factors, mode and tables. Three values at the end are in no bag."""
        lengths = self.rng.integers(0, longest + 1, (len(self.rows), batch))
        values = np.concatenate([*(self.ids(f, n) for f, n in enumerate(lengths.sum(1))), [-99, 2**31 - 1, 0]])
        values = torch.from_numpy(values.astype(np.int64))
        offsets = torch.tensor([0, *np.cumsum(lengths)])
        if not self.wide:
            values, offsets = values.int(), offsets.int()
        factors = self.laid_out(self.floats(len(values)).to(self.embedding_dtype)) if weighted else None
        return self.weight, self.laid_out(values), self.laid_out(offsets), factors, mode, *self.tables

    def grad(self, batch):
        return self.laid_out(self.floats(batch, len(self.rows), self.dim).to(self.embedding_dtype))


@st.composite
def problems(draw, dtypes=FLOATS, far=(5000, 70_000)):
    """far: sizes of arrays, beside small ones."""
    hash = draw(st.sampled_from(HASHES))
    dim = draw(st.one_of(st.integers(1, 20), st.sampled_from([8, 16, 32, 64, 128])))
    block = draw(st.one_of(st.integers(1, 2 * dim + 3), st.sampled_from([4, 8, 16, 32, dim])))
    bounded = st.integers(1, 50)
    rows = draw(st.lists(st.one_of(bounded, st.just(0)) if hash == "mix" else bounded, min_size=1, max_size=7))
    if hash == "linear" and draw(st.booleans()):
        rows[-1] = 0  # the last table needs no end
    return Problem(
        rows,
        size=block + draw(st.one_of(st.integers(0, 300), st.sampled_from(far))),
        dim=dim,
        block=block,
        hash=hash,
        sign=draw(st.booleans()),
        padding_idx=draw(st.one_of(st.none(), st.integers(-3, 5))),
        dtype=draw(st.sampled_from(dtypes)),
        group=draw(st.sampled_from([1, 2, 8, 64])),
        wide=draw(st.booleans()),
        uneven=draw(st.booleans()),
        words=draw(st.sampled_from([0, 0, 1, 50, 5000])) if hash == "mix" else 0,
        ties=draw(st.booleans()),  # for max: small integers, so that rows that differ hold equal values
        seed=draw(st.integers(0, 2**32 - 1)),
    )


batches = st.one_of(st.integers(0, 5), st.sampled_from([64, 300]))
modes = st.sampled_from([*((mode, False) for mode in MODES), ("sum", True)])

RULES = {
    "sgd": [0.1, 0.01, 0.9, 0.0, 0.0],
    "adagrad": [0.1, 0.01, 1e-10, 0.0, 0.0],
    "adam": [0.1, 0.01, 0.9, 0.99, 1e-8],
}


def drawn_calls(draw, problem, batch):
    """Calls of layers for ``updated``: none, or some of lookups and bags."""
    calls = []
    for _ in range(draw(st.integers(0, 3))):
        mode = draw(st.sampled_from(["one", *MODES, "weighted"]))
        if mode == "one":
            arguments = problem.lookup(batch)
        else:
            arguments = problem.bag(batch, mode.replace("weighted", "sum"), weighted=mode == "weighted")
        calls.append((problem.grad(batch), arguments[1:], problem.filter))
    return calls


def packed(calls):
    """The lists of update_ and sum_gradients for calls as in ``updated``."""
    unpacked = []
    for grad, arguments, *filter in calls:
        unpack = unpack_lookup_backward if len(arguments) == 1 + len(Tables._fields) else unpack_bag_backward
        unpacked.append((grad, unpack((*arguments, *filter))))
    return UpdateLists.pack(unpacked)


def updated(update_, weight, rule, options, calls):
    """weight and state after update_ on copies of them.

    Args:
        update_: the operator, or another body of it.
        calls: of (gradient, arguments of lookup or bag), or with their filter behind these.
    """
    weight = weight.clone(memory_format=torch.contiguous_format)
    state = [torch.full_like(weight, 0.25 * k + 0.5) for k in range({"adam": 2}.get(rule, 1))]
    update_(weight, state, rule, options, *packed(calls))
    return [weight, *state]
