"""Exported files against the model in torch, and against the hash of the oracle."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import dlrm.inference.export.formats
import dlrm.inference.export.onnx_graph
import infer
from data.formats.criteo_tsv import CriteoTSV
from data.synthetic import write
from dlrm import DLRM, DLRMConfig, checkpoint
from dlrm.embeddings import build_embeddings
from dlrm.inference.export.formats import export, load
from dlrm.inference.predictor import Predictor
from robe import Admission, EmbeddingBagConfig, RobeEmbeddingBagCollection
from tests.helpers.oracle import places

ROOT = Path(__file__).parents[4]
CONFIG = DLRMConfig(
    embedding_dim=4,
    bottom_mlp=(8, 4),
    top_mlp=(8, 1),
    table_rows=(10, 200, 7),
    num_dense=5,
    compression=3,
    init_std=1.0,  # so that a wrong row shows in the probability
)
HOTS = (2, 1, 3)
KNOWN = [[3, 2**32 - 1], list(range(0, 400, 3)), [0]]
VOCABULARY = {"embedding": "full", "vocabulary": True, "table_rows": tuple(len(ids) + 1 for ids in KNOWN)}
LET_IN = [0, -1, 2**32 + 3, -(2**63) + 1, *range(2, 12)]
EDGES = [0, 1, -1, 5, 2**31, 2**32 - 1, 2**32, 2**32 + 3, -(2**32), 2**62 + 1, 2**63 - 1, -(2**63), -(2**63) + 1]


def make(**changes):
    torch.manual_seed(0)
    config = replace(CONFIG, **changes)
    vocabulary = [torch.tensor(ids) for ids in KNOWN] if config.vocabulary else None
    model = DLRM(config, build_embeddings(config, vocabulary))
    if config.admission_bytes:
        model.embeddings.admission.admit(torch.tensor(LET_IN).unsqueeze(1), model.embeddings.table_keys)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight *= 1.5
    return model


def inputs(model, rows, seed=1):
    rng = np.random.default_rng(seed)
    ids = sum(model.config.data_hots or (1,) * len(model.config.table_rows))
    special, hashes = rng.choice([*EDGES, *range(20)], (rows, ids)), rng.integers(0, 2**32, (rows, ids))
    sparse = np.where(rng.random((rows, ids)) < 0.5, special, hashes)
    return rng.random((rows, model.config.num_dense), np.float32), sparse


def run_onnx(path, dense, sparse):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_inputs()] == ["dense", "sparse"]
    return session.run(["probability"], {"dense": dense, "sparse": sparse})[0]


def eager(model, dense, sparse):
    with torch.no_grad():
        return model(torch.from_numpy(dense), torch.from_numpy(sparse)).sigmoid().numpy()


KINDS = {
    "one block a row": {},
    "signs": {"sign": True},
    "blocks of 2": {"block_size": 2, "sign": True},
    "blocks of 1": {"block_size": 1},
    "blocks of 3": {"block_size": 3, "sign": True},
    "blocks of 7": {"block_size": 7, "sign": True},
    "blocks of 8": {"block_size": 8},
    "one place": {"compression": None, "robe_size": 4, "init_std": 0.1},
    "another seed": {"hash_seed": -5},
    "full": {"embedding": "full", "compression": None},
    "hash": {"embedding": "hash"},
    "vocabulary": VOCABULARY,
    "hots": {"hots": HOTS, "sign": True},
    "hots of tables": {"hots": HOTS, "embedding": "full"},
    "hots of a vocabulary": {"hots": HOTS, **VOCABULARY},
    "one hot each": {"hots": (1, 1, 1)},
    "synthetic hots": {"hots": HOTS, "synthetic_hots": True},
    "cross": {"interaction": "cross", "cross_rank": 3, "cross_layers": 2},
    "deep": {"bottom_mlp": (3, 9, 4), "top_mlp": (1,)},
    "one feature": {"table_rows": (50,)},
    "admission": {"admission_bytes": 56},
    "admission, small blocks": {"admission_bytes": 56, "block_size": 2, "sign": True, "hots": HOTS},
    "admission, long blocks": {"admission_bytes": 56, "block_size": 7, "sign": True},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_onnx_has_the_probabilities_of_the_model(tmp_path, changes):
    model = make(**changes)
    done = export(model, tmp_path / "model.onnx", format="onnx")
    assert done.rows == 10_000
    assert done.difference <= 1e-5
    assert done.bytes == (tmp_path / "model.onnx").stat().st_size
    for rows in (0, 1, 2, 301):
        dense, sparse = inputs(model, rows)
        probability = run_onnx(tmp_path / "model.onnx", dense, sparse)
        assert probability.dtype == np.float32
        assert probability.shape == (rows,)
        if rows:  # the model itself takes no empty batch of bags
            np.testing.assert_allclose(probability, eager(model, dense, sparse), atol=1e-6)
    assert probability.std() > 1e-3  # that depend on the rows


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("array_dtype", ["float32", "bfloat16", "int8"])
def test_onnx_reads_the_slots_of_the_oracle(tmp_path, block_size, array_dtype):
    model = make(block_size=block_size, sign=True, hash_seed=3, compression=None, robe_size=150)
    export(model, tmp_path / "model.onnx", format="onnx", array_dtype=array_dtype)
    dense, sparse = inputs(model, 40)
    weight = model.embeddings.array.weight.detach()
    if array_dtype == "bfloat16":
        weight = weight.bfloat16().float()
    elif array_dtype == "int8":
        array = model.embeddings.array.quantized()
        weight = array.weight * array.scale.repeat_interleave(64)[:150]
    layout = {"hash": "mix", "size": 150, "embedding_dim": 4, "block_size": block_size, "seed": 3, "sign": True}
    features = [places(sparse[:, k], table_id=k, **layout) for k in range(sparse.shape[1])]
    rows = torch.stack([weight[slots] * torch.from_numpy(signs) for slots, signs in features], dim=1)
    with torch.no_grad():
        x = model.interaction(model.bottom(torch.from_numpy(dense)), rows.float())
        expected = model.top(x).squeeze(1).sigmoid()
    np.testing.assert_allclose(run_onnx(tmp_path / "model.onnx", dense, sparse), expected, atol=1e-6)


@pytest.mark.parametrize("block_size", [1, 3, 4, 7])
def test_onnx_reads_one_row_for_the_ids_that_were_not_let_in(tmp_path, block_size):
    model = make(block_size=block_size, sign=True, compression=None, robe_size=150, admission_bytes=80)
    export(model, tmp_path / "model.onnx", format="onnx")
    dense, sparse = inputs(model, 200)
    embeddings = model.embeddings
    inside = embeddings.admission.admits(torch.from_numpy(sparse), embeddings.table_keys).numpy()
    assert 0.2 < inside.mean() < 0.8
    replaced = np.where(inside, sparse, -(2**63))
    got = run_onnx(tmp_path / "model.onnx", dense, sparse)
    assert np.array_equal(got, run_onnx(tmp_path / "model.onnx", dense, replaced))
    np.testing.assert_allclose(got, eager(model, dense, sparse), atol=1e-6)
    embeddings.admission = None
    np.testing.assert_allclose(got, eager(model, dense, replaced), atol=1e-6)


def test_an_array_of_more_than_32_bits_of_places():
    graph = dlrm.inference.export.onnx_graph.Graph()
    numbers = np.array([0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15], np.uint64)
    factor = 2**40 + 12345
    high = graph.multiply_high("x", np.uint64(factor))
    kind = graph.kinds.UINT64
    value = graph.helper.make_tensor_value_info
    made = graph.helper.make_graph(
        graph.nodes, "g", [value("x", kind, ["n"])], [value(high, kind, ["n"])], graph.constants
    )
    model = graph.helper.make_model(made, opset_imports=[graph.helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": numbers})[0].tolist() == [int(x) * factor >> 64 for x in numbers]


@pytest.mark.parametrize("changes", [{}, {"hots": HOTS}, {"block_size": 7, "sign": True}])
@pytest.mark.parametrize("array_dtype", ["bfloat16", "int8"])
def test_an_array_in_another_dtype_is_kept_in_it(tmp_path, changes, array_dtype):
    model = make(**changes, compression=None, robe_size=20_000)
    export(model, tmp_path / "model.onnx", format="onnx", array_dtype=array_dtype)
    size = {"bfloat16": 2 * 20_000, "int8": 20_000 + 4 * 20_000 // 64}[array_dtype]
    assert size < (tmp_path / "model.onnx").stat().st_size < size + 16_000
    dense, sparse = inputs(model, 100)
    probability = run_onnx(tmp_path / "model.onnx", dense, sparse)
    predicted = Predictor(model, array_dtype=array_dtype)(torch.from_numpy(dense), torch.from_numpy(sparse))
    rounding = 3e-3 if changes == {"hots": HOTS} and array_dtype == "bfloat16" else 1e-6  # Predictor's, of the sums
    np.testing.assert_allclose(probability, predicted, atol=rounding)
    assert np.abs(probability - eager(model, dense, sparse)).max() > 1e-5  # it is not in float32


def test_the_file_has_standard_operators_and_the_config(tmp_path):
    model = make(hots=HOTS, synthetic_hots=True, sign=True, block_size=3)
    export(model, tmp_path / "model.onnx", format="onnx")
    file = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in file.graph.node} == {""}
    assert [(x.domain, x.version) for x in file.opset_import] == [("", 20)]
    assert file.producer_name == "robe-dlrm"
    config = {entry.key: entry.value for entry in file.metadata_props}["config"]
    assert DLRMConfig.from_dict(json.loads(config)) == model.config
    assert not file.functions


def test_load_gives_a_function_of_tensors(tmp_path):
    model = make()
    export(model, tmp_path / "model.onnx", format="onnx")
    dense, sparse = inputs(model, 9)
    probability = load(tmp_path / "model.onnx")(torch.from_numpy(dense), torch.from_numpy(sparse))
    np.testing.assert_allclose(probability, eager(model, dense, sparse), atol=1e-6)
    with pytest.raises(ValueError, match=r"expected a name that ends with \.onnx or \.pt2"):
        load(tmp_path / "model.pt")


# ---------------------------------------------------------------------------------------------------------------------
# What does not become a file


@pytest.fixture
def old_file(tmp_path):
    """An old file, which is to be all there is afterwards."""
    (tmp_path / "model.onnx").write_text("old")
    yield tmp_path / "model.onnx"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "old"


@pytest.mark.parametrize("block_size", [4, 7])
def test_another_filter_is_found_out(old_file, monkeypatch, block_size):
    monkeypatch.setattr(dlrm.inference.export.onnx_graph, "BITS_OF_WORD", 5)
    with pytest.raises(ValueError, match=r"differ from the model's by (0\.\d+|1), expected at most 1e-05"):
        export(make(admission_bytes=56, block_size=block_size), old_file, format="onnx")


def test_no_id_is_counted_by_an_export(tmp_path):
    model = make()
    model.embeddings.admission = admission = Admission(64, threshold=1, counter_bytes=1 << 23)
    model.train()
    for format, name in (("onnx", "model.onnx"), ("aoti", "model.pt2")):
        export(model, tmp_path / name, format=format)
        assert not admission.filter.any()
        assert not admission.counter.counters.any()
        assert (tmp_path / name).stat().st_size < 1 << 22, "without the counters"


@pytest.mark.parametrize(
    ("name", "wrong"), [("MULTIPLIERS", (0xBF58476D1CE4E5B9, 3)), ("SHIFTS", (30, 27, 30)), ("GOLDEN", 3)]
)
def test_another_hash_is_found_out(old_file, monkeypatch, name, wrong):
    monkeypatch.setattr(dlrm.inference.export.onnx_graph, name, wrong)
    with pytest.raises(ValueError, match=r"differ from the model's by (0\.\d+|1), expected at most 1e-05"):
        export(make(), old_file, format="onnx")


def test_one_wrong_row_is_found_out(old_file, monkeypatch):
    rows = dlrm.inference.export.formats._random_rows(make())
    rows[1][:] = 7
    rows[1][-1, 0] = -(2**63)
    model = make(embedding="full")
    op = dlrm.inference.export.onnx_graph.Graph.op

    def wrong(self, operator, *inputs, **attributes):  # the remainder of C, not of Python
        return op(self, operator, *inputs, **attributes, **({"fmod": 1} if operator == "Mod" else {}))

    monkeypatch.setattr(dlrm.inference.export.onnx_graph.Graph, "op", wrong)
    with pytest.raises(ValueError, match=r"differ from the model's by|can't be|indices element out of data bounds"):
        export(model, old_file, format="onnx", batches=[rows])


def test_a_model_of_nan_is_not_written(old_file):
    model = make()
    with torch.no_grad():
        model.top[0].bias[0] = torch.nan
    with pytest.raises(ValueError, match="differ from the model's by nan"):
        export(model, old_file, format="onnx")


def test_weights_beyond_protobuf_are_refused(old_file, monkeypatch):
    monkeypatch.setattr(dlrm.inference.export.onnx_graph, "_ONNX_BYTES", 100)
    with pytest.raises(ValueError, match="one ONNX file holds 2 GB; use --format aoti"):
        export(make(), old_file, format="onnx")


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_missing_packages_are_named(old_file, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"needs the package {name}: pip install onnx onnxruntime"):
        export(make(), old_file, format="onnx")


def test_no_compiler_is_one_error(tmp_path, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        export(make(), tmp_path / "model.pt2", format="aoti")
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path):
    for path, options, message in (
        ("model.onnx", {"format": "tflite"}, "format: expected one of onnx, aoti, got 'tflite'"),
        ("model.pt2", {"format": "onnx"}, "ends with .onnx for format onnx"),
        ("model.onnx", {"format": "aoti"}, "ends with .pt2 for format aoti"),
        ("model.onnx", {"format": "onnx", "array_dtype": "int4"}, "array_dtype: expected one of"),
        ("model.onnx", {"format": "onnx", "batches": []}, "at least one row"),
    ):
        with pytest.raises(ValueError, match=message):
            export(make(), tmp_path / path, **options)
    with pytest.raises(ValueError, match="needs a model with a ROBE array"):
        export(make(embedding="full"), tmp_path / "model.onnx", format="onnx", array_dtype="int8")
    tables = [EmbeddingBagConfig(str(k), 10, 4) for k in range(3)]
    for embeddings in (nn.Embedding(3, 4), RobeEmbeddingBagCollection(tables, robe_size=50)):
        with pytest.raises(ValueError, match="embeddings: expected"):
            export(DLRM(CONFIG, embeddings), tmp_path / "model.onnx", format="onnx")
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        export(make(), tmp_path / "folder.onnx", format="onnx")


# ---------------------------------------------------------------------------------------------------------------------
# Ahead-of-time compilation: half a minute each

# What runs them knows neither robe nor this project.
_STRANGER = """
import sys
import numpy as np

rows = np.load("rows.npz")
if sys.argv[1] == "model.onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    run = lambda dense, sparse: session.run(None, {"dense": dense, "sparse": sparse})[0]
else:
    import torch
    package = torch._inductor.aoti_load_package("model.pt2")
    run = lambda dense, sparse: package(torch.from_numpy(dense), torch.from_numpy(sparse)).numpy()
sizes = 1, 2, 37, 60
parts = np.split(np.arange(len(rows["dense"])), np.cumsum(sizes))
np.save("probability.npy", np.concatenate([run(rows["dense"][part], rows["sparse"][part]) for part in parts]))
assert not {"robe", "dlrm"} & sys.modules.keys()
"""


def run_as_stranger(folder, name, dense, sparse):
    np.savez(folder / "rows.npz", dense=dense, sparse=sparse)
    subprocess.run([sys.executable, "-c", _STRANGER, name], cwd=folder, check=True)
    return np.load(folder / "probability.npy")


def export_as_user(folder, model, name, *options):
    """infer.py in a process of its own; what it printed."""
    checkpoint.save(folder / "checkpoint", model)
    arguments = ["--checkpoint", folder / "checkpoint", "--output", folder / name, *options]
    done = subprocess.run(
        [sys.executable, ROOT / "infer.py", "export", *map(str, arguments)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_onnx_as_its_user_runs_it(tmp_path):
    model = make(block_size=2, sign=True)
    out = export_as_user(tmp_path, model, "model.onnx", "--format", "onnx")
    assert "10,000 rows differ from the model's by at most" in out
    dense, sparse = inputs(model, 200)
    probability = run_as_stranger(tmp_path, "model.onnx", dense, sparse)
    np.testing.assert_allclose(probability, eager(model, dense, sparse), atol=1e-6)


def test_aoti_as_its_user_runs_it(tmp_path):
    model = make(block_size=3, sign=True, hots=HOTS, interaction="cross", cross_rank=3)
    out = export_as_user(tmp_path, model, "model.pt2", "--format", "aoti", "--array-dtype", "int8")
    assert len(out.splitlines()) == 2
    assert "10,000 rows differ from the model's by at most" in out
    dense, sparse = inputs(model, 200)
    probability = run_as_stranger(tmp_path, "model.pt2", dense, sparse)
    predicted = Predictor(model, array_dtype="int8")(torch.from_numpy(dense), torch.from_numpy(sparse))
    np.testing.assert_allclose(probability, predicted, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "array_dtype"),
    [
        ({"hots": HOTS, "synthetic_hots": True, "block_size": 7, "sign": True}, "bfloat16"),
        (VOCABULARY, "float32"),
        ({"admission_bytes": 56, "block_size": 2}, "float32"),
        ({"admission_bytes": 56, "block_size": 7}, "int8"),
    ],
)
def test_aoti_has_the_probabilities_of_the_model(tmp_path, changes, array_dtype):
    model = make(**changes)
    assert export(model, tmp_path / "model.pt2", format="aoti", array_dtype=array_dtype).difference <= 1e-5
    if array_dtype == "bfloat16":
        model.embeddings.array.weight.data = model.embeddings.array.weight.bfloat16().float()
    elif array_dtype == "int8":
        model.embeddings.array = model.embeddings.array.quantized()
    run = load(tmp_path / "model.pt2")
    for rows in (1, 2, 301):
        dense, sparse = inputs(model, rows)
        probability = run(torch.from_numpy(dense), torch.from_numpy(sparse))
        np.testing.assert_allclose(probability, eager(model, dense, sparse), atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


# ---------------------------------------------------------------------------------------------------------------------
# infer.py export


@pytest.fixture(scope="module")
def criteo(tmp_path_factory):
    """A checkpoint of a model of Criteo's rows."""
    folder = tmp_path_factory.mktemp("criteo")
    checkpoint.save(folder, make(num_dense=13, table_rows=(10,) * 26))
    return folder


def test_the_rows_of_data_are_compared(tmp_path, criteo, capsys, monkeypatch):
    write(tmp_path / "rows.tsv", 10_500)
    compared = []
    largest = dlrm.inference.export.formats._largest_difference

    def spy(exported, expected, rows):
        compared.append(rows)
        return largest(exported, expected, rows)

    monkeypatch.setattr(dlrm.inference.export.formats, "_largest_difference", spy)
    arguments = ["export", "--checkpoint", str(criteo), "--format", "onnx", "--data", str(tmp_path / "rows.tsv")]
    assert infer.main([*arguments, "--output", str(tmp_path / "new" / "model.onnx")]) == 0
    assert "10,000 rows" in capsys.readouterr().out
    ((dense, sparse),) = compared
    source = list(CriteoTSV(tmp_path / "rows.tsv").read())
    np.testing.assert_array_equal(sparse, np.concatenate([batch.sparse for batch in source])[:10_000])
    np.testing.assert_array_equal(dense, np.concatenate([batch.dense for batch in source])[:10_000])


def test_errors_are_one_line(tmp_path, criteo, capsys):
    for checkpoint_folder, output, options, message in (
        (tmp_path / "nowhere", "model.onnx", [], "config.json: no such file"),
        (criteo, "model.pt2", [], "ends with .onnx"),
        (criteo, "model.onnx", ["--data", str(tmp_path / "nowhere.tsv")], "nowhere.tsv: No such file"),
    ):
        arguments = ["--checkpoint", str(checkpoint_folder), "--output", str(tmp_path / output), "--format", "onnx"]
        assert infer.main(["export", *arguments, *options]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
