"""What files say about their layers is checked before anything is made of it."""

import json
import random
import struct

import pytest
import torch
from torch import nn

import robe
from robe.metadata import checksum, describe, layers_of, parse


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.user = nn.Embedding(60, 4)
        self.words = nn.EmbeddingBag(50, 4, mode="sum")
        self.top = nn.Linear(4, 1)


def tables(*dims):
    return [robe.EmbeddingBagConfig(f"t{k}", 50, dim, [f"f{k}"]) for k, dim in enumerate(dims)]


def int8():
    layer = robe.RobeEmbedding(50, 4, robe_size=100)
    layer.array = layer.array.quantized(32)
    return layer


def counting():
    return robe.RobeEmbedding(50, 4, robe_size=100, admission=robe.Admission(32, threshold=2, counter_bytes=1024))


LAYERS = {
    "embedding": lambda: robe.RobeEmbedding(50, 4, robe_size=100, admission=robe.Admission(32)),
    "counting": counting,
    "bag": lambda: robe.RobeEmbeddingBag(50, 4, mode="max", padding_idx=1, compression=1),
    "collection": lambda: robe.RobeEmbeddingBagCollection(tables(4, 4), robe_size=100),
    "linear": lambda: robe.RobeEmbeddingBagCollection(tables(4, 4), robe_size=100, hash="linear"),
    "keyed": lambda: robe.RobeKeyedEmbeddingBagCollection(tables(4, 8), robe_size=100),
    "int8": int8,
    "model": lambda: robe.compress(Model(), 2, min_rows=1),
}


def with_header(content, change):
    """A file with another header: ``change`` takes what JSON makes of it, and returns that or a text."""
    size = struct.unpack("<Q", content[:8])[0]
    header = change(json.loads(content[8 : 8 + size]))
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def with_metadata(content, change):
    """A file with other metadata, given as above."""

    def of_header(header):
        about = change(json.loads(header["__metadata__"]["robe"]))
        header["__metadata__"]["robe"] = about if isinstance(about, str) else json.dumps(about)
        return header

    return with_header(content, of_header)


def put(*path_and_value):
    """A change that puts a value at a path."""
    *path, last, value = path_and_value

    def change(about):
        inner = about
        for key in path:
            inner = inner[key]
        inner[last] = value
        return about

    return change


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "layer"
    robe.save(LAYERS["embedding"](), path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: [], "expected an object, got"),
        (lambda about: "[" * 50_000, "nested more than 64 deep"),
        (
            lambda about: {k: v for k, v in about.items() if k != "arrays"},
            "metadata: arrays: expected a list, got nothing",
        ),
        (put("layers", {}), "metadata: layers: expected at least one"),
        (put("layers", "", "array", 7), "metadata: layers.''.array: expected below 1, got 7"),
        (put("layers", "", "admission", -1), "metadata: layers.''.admission: expected below 1, got -1"),
        (put("layers", "", "class", "X"), r"kind: expected \"RobeEmbedding\" or"),
        (put("layers", "", "config", "robe", 1), "config.'robe': not an argument of RobeEmbedding that is saved"),
        (put("layers", "", "config", "array", None), "config.'array': not an argument"),
        (put("layers", "", "config", {}), "config: expected num_embeddings, which a RobeEmbedding needs"),
        (put("layers", "", "config", "sign", 1), "config.sign: expected true or false, got 1"),
        (put("layers", "", "config", "hash", "md5"), "hash: expected one of mix"),
        (put("layers", "", "config", "num_embeddings", 2**63), "metadata: layers.'': "),
        (put("arrays", 0, "size", 1.5), r"arrays\[0\].size: expected an integer"),
        (put("arrays", 0, "size", 0), "size: expected at least 1 weight, got 0"),
        (put("arrays", 0, "seed", "0"), "seed: expected an integer, got '0'"),
        (put("arrays", 0, "dtype", "load"), r"arrays\[0\].dtype: expected \"float16\" or"),
        (put("arrays", 0, "dtype", "float64"), "of torch.float32, and its layer of torch.float64|more than the file"),
        (put("arrays", 0, "dtype", "int8"), "group_size: expected one with int8"),
        (put("arrays", 0, "size", 1 << 40), "has arrays and admissions of 4398046511136 bytes, more than the file"),
        (put("admissions", 0, "bytes", 3 << 29), "has arrays and admissions of 1610613136 bytes, more than the file"),
        (put("admissions", 0, "counter_bytes", 1024), "counter_bytes: expected with a threshold"),
    ],
)
def test_damaged_metadata_is_refused_by_file_and_key(change, message, file):
    file.write_bytes(with_metadata(file.read_bytes(), change))
    with pytest.raises(ValueError, match=f"/layer: .*({message})"):
        robe.load(file)


@pytest.mark.parametrize(
    "change",
    [
        put("arrays", 0, "seed", 5),
        put("layers", "", "config", "table_id", 1),
        put("layers", "", "config", "block_size", 2),
        put("layers", "", "config", "sign", True),
        put("layers", "", "config", "padding_idx", 3),
        put("layers", "", "config", "num_embeddings", 49),
        put("layers", "", "config", "hash", "linear"),
        put("layers", "", "admission", None),
    ],
)
def test_rows_that_would_lie_elsewhere_are_refused(change, file):
    file.write_bytes(with_metadata(file.read_bytes(), change))
    with pytest.raises(ValueError, match=r"/layer: "):
        robe.load(file)


def test_a_changed_bit_of_a_filter_is_refused(tmp_path):
    layer = LAYERS["embedding"]()
    robe.save(layer, tmp_path / "layer")
    content = bytearray((tmp_path / "layer").read_bytes())
    assert content[-432:-400] == bytes(32)  # the filter, before 100 weights
    content[-410] ^= 4
    (tmp_path / "layer").write_bytes(content)
    with pytest.raises(ValueError, match="its rows do not lie where they lay when it was written"):
        robe.load(tmp_path / "layer")


def test_files_of_before_the_checksum_load(file):
    want = robe.load(file)

    def without(about):
        del about["checksum"]
        return about

    file.write_bytes(with_metadata(file.read_bytes(), without))
    assert repr(robe.load(file)) == repr(want)


def test_the_checksum_is_that_of_the_layout_alone():
    one, other = (LAYERS["embedding"]() for _ in "ab")
    with torch.no_grad():
        other.array.weight.fill_(1)
    assert checksum({"": one}) == checksum({"": other})
    other.admission.filter[1] = 1
    assert checksum({"": one}) != checksum({"": other})


def test_a_layer_inside_another_is_refused(tmp_path):
    robe.save(robe.compress(Model(), 2, min_rows=1), tmp_path / "model")

    def nested(about):
        about["layers"]["user.inner"] = about["layers"]["user"]
        return about

    (tmp_path / "model").write_bytes(with_metadata((tmp_path / "model").read_bytes(), nested))
    with pytest.raises(ValueError, match=r"layers.'user.inner': lies inside another layer"):
        robe.load(tmp_path / "model", Model())


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_described_layers_are_made_again(make):
    layers = dict(layers_of(make()))
    made = parse(describe(layers), "text").make(lambda name: torch.device("meta"))
    assert made.keys() == layers.keys()
    for name, layer in layers.items():
        assert repr(made[name]) == repr(layer)
        assert {k: x.shape for k, x in made[name].state_dict().items()} == {
            k: x.shape for k, x in layer.state_dict().items()
        }


# ---------------------------------------------------------------------------------------------------------------------
# Any damage

OTHERS = [None, True, -1, 0, 1, 3, 1.5, "", "x", "mix", "float64", "RobeEmbeddingBag", [], {}, [0], {"a": 1}]
OTHERS += [2**31, 2**40, 2**63 - 1, 2**63, 2**64, -(2**63), 10**45]


def paths(value, path=()):
    """The paths to everything inside a value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from paths(inner, (*path, key))


def mutated(value, random_):
    """The value with something changed, left out or renamed."""
    path = random_.choice(list(paths(value)))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    last, how = path[-1], random_.randrange(5)
    if how == 0:
        del inner[last]
    elif how == 1 and isinstance(inner, dict):
        inner[random_.choice(["kind", "class", "new", "a.b", ""])] = inner.pop(last)
    elif how == 2 and type(inner[last]) is int:
        inner[last] += random_.choice([-1, 1, 8])
    else:
        inner[last] = random_.choice(OTHERS)
    return value


def damaged(content, random_):
    """A file with its metadata, its header or its bytes changed, or cut."""
    how = random_.randrange(4)
    if how == 0:
        return content[: random_.randrange(len(content))]
    if how == 1:
        changed = bytearray(content)
        for _ in range(random_.randint(1, 3)):
            changed[random_.randrange(len(content))] = random_.randrange(256)
        return bytes(changed)
    return (with_header if how == 2 else with_metadata)(content, lambda value: mutated(value, random_))


@pytest.mark.parametrize("kind", LAYERS)
def test_any_damage_is_refused_in_one_line_and_changes_nothing(kind, tmp_path):
    path, random_ = tmp_path / "file", random.Random(kind)
    robe.save(LAYERS[kind](), path)
    content, messages = path.read_bytes(), []
    module = Model() if kind == "model" else None
    for _ in range(60):
        path.write_bytes(damaged(content, random_))
        before = {} if module is None else {name: x.clone() for name, x in module.state_dict().items()}
        try:
            robe.load(path, module)
        except ValueError as error:
            messages.append(str(error))
        else:
            module = Model() if kind == "model" else None
            continue
        if module is not None:
            after = module.state_dict()
            assert after.keys() == before.keys()
            assert all(torch.equal(after[name], x) for name, x in before.items())
    assert len(messages) > 30
    assert all(str(path) in message and "\n" not in message for message in messages)
