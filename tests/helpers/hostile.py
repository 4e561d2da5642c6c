"""Random calls of the operators with arguments that fit neither the schema's promises nor each other.

A call is a good one in which a few arguments are replaced: tensors of other shapes, dtypes, strides and devices, ids
and offsets of any value, integers at the ends of their range, lists of other lengths. It must succeed, or raise an
error that names what is wrong. Whether it touched memory that is not its own is for AddressSanitizer to say.
"""

import random

import torch
from torch import Tensor

INTEGERS = (-(2**63), -(2**62), -(2**32), -7, -1, 0, 1, 2, 3, 4, 5, 8, 60, 2**31, 2**32, 2**61, 2**62, 2**63 - 1)
DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip
SHAPES = (
    (), (0,), (1,), (2,), (3,), (5,), (60,), (0, 2), (2, 0), (1, 2), (2, 2), (4, 9), (1, 2, 5), (2, 2, 5), (0, 2, 5),
    (2, 0, 5), (2, 2, 0), (1, 5, 32), (2**61, 0), (0, 2**62, 1), (2**57, 0, 32), (1, 2, 5, 1),
)  # fmt: skip
TEXTS = ("mix", "linear", "identity", "sum", "mean", "max", "sgd", "adagrad", "adam", "", "md5", "mix\0", "x" * 300)
NUMBERS = (0.0, 1.0, -1.0, 0.9, 1e308, float("inf"), float("nan"))
VECTORS = ("weight", "scale", "filter", "per_sample_weights", "row_hashes")  # copied before anything is counted
OF_A_LAYOUT = (
    "grad",
    "values",
    "embedding_dim",
    "block_size",
    "hash",
    "filter",
)  # names of what update_ takes in lists
REFUSALS = (ValueError, IndexError, TypeError, RuntimeError)


def _any_tensor(rng: random.Random) -> Tensor:
    shape, dtype = rng.choice(SHAPES), rng.choice(DTYPES)
    if rng.random() < 0.1:
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.full(shape, rng.choice((0, 1, 3)), dtype=dtype)


def _relaid(rng: random.Random, tensor: Tensor) -> Tensor:
    """The tensor in another layout, of the same or of another shape."""
    kind = rng.randrange(9)
    if kind == 0:
        return tensor.unsqueeze(rng.randint(0, tensor.dim()))
    if kind == 1:
        return tensor.reshape(-1)
    if tensor.dim() == 0:
        return tensor
    if kind == 2:
        return tensor[: rng.randint(0, tensor.shape[0])]
    if kind == 3:
        return torch.stack([tensor, tensor], -1)[..., rng.randint(0, 1)]
    if kind == 4:
        return tensor[:1].expand(tensor.shape[0] + rng.randint(0, 2), *tensor.shape[1:]) if len(tensor) else tensor
    if kind == 5:
        return tensor.transpose(0, -1)
    if kind == 6 and tensor.shape[0] == 1:  # the stride of a dimension of size 1 may be anything
        return tensor.as_strided(tensor.shape, (rng.choice((0, 1, 2**61, 2**62)), *tensor.stride()[1:]))
    if kind == 7 and tensor.numel() > 2:
        return tensor.as_strided(tensor.shape, [rng.randint(0, 1) for _ in tensor.shape])
    return torch.cat([tensor, tensor])


def _other_tensor(rng: random.Random, name: str, tensor: Tensor, others: list[Tensor]) -> Tensor:
    kind = rng.randrange(6)
    if kind == 0:
        return _any_tensor(rng)
    if kind == 1 and not tensor.is_complex():
        return tensor.to(rng.choice(DTYPES))
    if kind == 2 and tensor.numel():
        changed = tensor.clone().contiguous()
        low, high = (-(2**31), 2**31 - 1) if tensor.dtype == torch.int32 else (-(2**63), 2**63 - 1)
        value = min(max(rng.choice(INTEGERS), low), high) if tensor.dtype in (torch.int32, torch.int64) else -3
        changed.view(-1)[rng.randrange(tensor.numel())] = value
        return changed
    if kind == 3:
        return rng.choice(others)
    if kind == 4 and name in VECTORS and rng.random() < 0.1:
        return tensor.reshape(-1)[:1].expand(2**55) if tensor.numel() else tensor
    return _relaid(rng, tensor)


def _other_list(rng: random.Random, name: str, values: list, others: list[Tensor]) -> list:
    values = list(values)
    kind = rng.randrange(5)
    if kind == 0 or not values:
        return values[:-1]
    if kind == 1:
        return values + values[:1]
    if kind == 2 and rng.random() < 0.3:
        return []
    place = rng.randrange(len(values))
    if isinstance(values[place], Tensor):
        values[place] = _other_tensor(rng, name, values[place], others)
    else:
        values[place] = rng.choice(NUMBERS) if isinstance(values[place], float) else rng.choice(INTEGERS)
    return values


def _or_same(change, rng, name, value, others):
    try:
        return change(rng, name, value, others)
    except (RuntimeError, TypeError):  # torch makes no such tensor
        return value


def mutated(rng: random.Random, names: list[str], arguments: list) -> list:
    """The arguments with up to three of them replaced."""
    others = [x for x in arguments if isinstance(x, Tensor)]
    others += [x for values in arguments if isinstance(values, list) for x in values if isinstance(x, Tensor)]
    arguments = list(arguments)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3))):
        place = rng.randrange(len(arguments))
        name, value = names[place], arguments[place]
        if rng.random() < 0.03:
            arguments[place] = rng.choice((None, 3, "mix", 2**64, [], _any_tensor(rng)))
        elif isinstance(value, bool):
            arguments[place] = not value
        elif isinstance(value, Tensor):
            arguments[place] = _or_same(_other_tensor, rng, name, value, others)
        elif isinstance(value, list):
            arguments[place] = _or_same(_other_list, rng, name, value, others)
        elif isinstance(value, str):
            arguments[place] = rng.choice(TEXTS)
        elif isinstance(value, int) or name == "padding_idx":
            arguments[place] = rng.choice(INTEGERS)
        else:
            arguments[place] = _any_tensor(rng)
    return arguments


def _copied(value):
    if isinstance(value, Tensor):
        return value.clone()
    return [_copied(x) for x in value] if isinstance(value, list) else value


def _tensors(value):
    if isinstance(value, Tensor):
        return [value]
    return [x for each in value for x in _tensors(each)] if isinstance(value, (list, tuple)) else []


def _outcome(function, arguments):
    """The error, or None; and every tensor that the call returned or may have written."""
    try:
        result = function(*arguments)
    except REFUSALS as error:
        return error, []
    return None, [*_tensors(result), *_tensors(arguments)]


def _comparable(arguments):
    """Whether the reference takes the call as it is: no tensors that share memory, none without values, none huge."""
    tensors = _tensors(arguments)
    if any(x.device.type == "meta" or x.numel() > 10_000 for x in tensors):
        return False
    places = [x.untyped_storage().data_ptr() for x in tensors if x.numel()]
    return len(places) == len(set(places))


def attack(operator, reference, make, count, *, seed, every=25):
    """Call an operator ``count`` times; compare some calls that succeed with the reference.

    Args:
        operator: of ``torch.ops``.
        reference: its body in plain torch.
        make: make(rng) gives good arguments, new ones where the operator writes.
        count: of calls.
        seed: of the arguments.
        every: how many calls go by between those that are compared.

    Returns:
        (calls that succeeded, calls that were compared).
    """
    rng = random.Random(seed)
    names = [argument.name for argument in operator.default._schema.arguments]
    # torch makes numbers of tensors where the schema has numbers; the reference is called without it.
    numbers = [k for k, x in enumerate(operator.default._schema.arguments) if "Tensor" not in str(x.type)]
    succeeded = compared = 0
    for number in range(count):
        arguments = mutated(rng, names, make(rng))
        compare = number % every == 0 and _comparable(arguments)
        compare = compare and not any(isinstance(arguments[k], Tensor) for k in numbers)
        twins = _copied(arguments) if compare else None
        error, got = _outcome(operator, arguments)
        if error is not None:
            fake = any(x.device.type == "meta" for x in _tensors(arguments))  # torch's own words then
            known = (*names, *OF_A_LAYOUT, "index out of range", "argument", "out: ")
            assert fake or any(name in str(error) for name in known), f"call {number}: {error!r}"
            continue
        succeeded += 1
        if compare:
            compared += 1
            refusal, want = _outcome(reference, twins)
            assert refusal is None, f"call {number}: the reference says {refusal!r}"
            for a, b in zip(got, want, strict=True):
                tolerance = 0.02 if a.dtype in (torch.bfloat16, torch.float16) else 1e-4
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    return succeeded, compared
