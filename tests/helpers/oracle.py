"""The oracle of the tests: the hash in Python integers and pooling as a loop, written from the docstrings alone.

Nothing here imports robe: what the tests compare robe with must not be robe.
"""

import numpy as np

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
P, A, B, C = 2038074743, 871205356, 1825252241, 634329019


def signed(x: int) -> int:
    """The 64 bits of x as a two's complement int64."""
    x &= MASK
    return x - 2**64 if x >= 2**63 else x


def mix64(x: int) -> int:
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def table_key(seed: int, table_id: int) -> int:
    return mix64(mix64(seed + GOLDEN) + table_id * GOLDEN)


def place(row, i, *, hash, size, embedding_dim, block_size, seed=0, table_id=0, first_row=0) -> tuple[int, int]:
    """(slot, sign) of component i of a row. "identity" takes the tables before to be as wide as this one."""
    if hash == "identity":
        return (first_row + row) * embedding_dim + i, 1
    block, rest = divmod(i, block_size)
    choices = size - block_size + 1
    if hash == "linear":
        value = (A * (row + first_row) + B * block + C) % P
        return value % choices + rest, -1 if mix64(value) & 1 else 1
    if block_size > embedding_dim:
        (row, rest), block = divmod(row * embedding_dim + i, block_size), 0
    hashed = mix64(mix64(table_key(seed, table_id) + row * GOLDEN) + block * GOLDEN)
    return ((hashed * choices) >> 64) + rest, -1 if hashed & 1 else 1


def places(ids, *, sign=False, embedding_dim, **layout) -> tuple[np.ndarray, np.ndarray]:
    """(slots, signs) of rows: two arrays of shape (*ids.shape, embedding_dim), signs all +1 without ``sign``."""
    ids = np.asarray(ids, dtype=object)
    both = np.array(
        [[place(int(x), i, embedding_dim=embedding_dim, **layout) for i in range(embedding_dim)] for x in ids.flat],
        dtype=np.int64,
    ).reshape(*ids.shape, embedding_dim, 2)
    return both[..., 0], both[..., 1] if sign else np.ones_like(both[..., 1])


def pool_loop(weight, bags, grad, *, mode, padding_idx, layouts):
    """Pooling and its gradients, one bag after the other, in float64.

    Args:
        weight: (m,) float64.
        bags: bags[feature][example]: list of (id, factor).
        grad: (B, F, D) upstream gradient.
        layouts: of each feature, the keywords of ``places``.

    Returns:
        (pooled (B, F, D), gradient (m,) of the weight, gradients of the factors, features major).
    """
    pooled, grad_weight, grad_factors = np.zeros_like(grad), np.zeros_like(weight), []
    for feature, layout in enumerate(layouts):
        for example, bag in enumerate(bags[feature]):
            upstream = grad[example, feature]
            kept = [k for k, (x, _) in enumerate(bag) if x != padding_idx]
            of_bag = [0.0] * len(bag)
            slots, signs = places([bag[k][0] for k in kept], **layout)
            rows = weight[slots] * signs
            if kept and mode == "max":
                best = rows.argmax(0)  # the first of equal ones
                component = np.arange(len(upstream))
                pooled[example, feature] = rows[best, component]
                np.add.at(grad_weight, slots[best, component], (upstream * signs[best, component]))
            elif kept:
                share = 1 / len(kept) if mode == "mean" else 1.0
                for row, slot, sign, k in zip(rows, slots, signs, kept):
                    pooled[example, feature] += row * bag[k][1] * share
                    np.add.at(grad_weight, slot, upstream * sign * bag[k][1] * share)
                    of_bag[k] = float(upstream @ row) * share
            grad_factors += of_bag
    return pooled, grad_weight, np.array(grad_factors)


def table_grad_to_array(table_grad, size, **layout) -> np.ndarray:
    """The gradient (m,) of the array that belongs to the gradient (N, d) of the virtual table."""
    slots, signs = places(range(len(table_grad)), embedding_dim=table_grad.shape[1], size=size, **layout)
    grad = np.zeros(size)
    np.add.at(grad, slots, np.asarray(table_grad, dtype=np.float64) * signs)
    return grad
