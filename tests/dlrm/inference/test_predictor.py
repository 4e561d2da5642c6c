"""Predictors against the models they are made of."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from data.rows import Batch
from dlrm import DLRM, DLRMConfig
from dlrm.embeddings import build_embeddings
from dlrm.inference import packing
from dlrm.inference import predictor as inference
from dlrm.inference.predictor import DTYPES, Predictor, array_bytes, check_mlp_dtype, with_array_dtype
from robe import Admission

CONFIG = DLRMConfig(
    embedding_dim=8, bottom_mlp=(40, 8), top_mlp=(70, 33, 1), table_rows=(9, 400, 5000, 3), num_dense=5, compression=3
)
HOTS = (3, 1, 2, 4)
CONFIGS = {
    "robe": CONFIG,
    "robe, small blocks and signs": replace(CONFIG, block_size=3, sign=True),
    "robe, long blocks": replace(CONFIG, block_size=20),
    "robe, several ids": replace(CONFIG, hots=HOTS),
    "robe, synthetic ids": replace(CONFIG, hots=HOTS, synthetic_hots=True),
    "robe, admission": replace(CONFIG, admission_bytes=1536),
    "robe, admission and small blocks": replace(CONFIG, admission_bytes=1536, block_size=3, hots=HOTS),
    "full": replace(CONFIG, embedding="full", compression=None),
    "full, several ids": replace(CONFIG, embedding="full", compression=None, hots=HOTS),
    "hash": replace(CONFIG, embedding="hash"),
    "cross": replace(CONFIG, interaction="cross", cross_layers=2, cross_rank=5),
}
# How far a probability may move.
TOLERANCE = {"float32": 1e-6, "bfloat16": 0.01, "int8": 0.02}


def usable(mlp_dtype):
    try:
        check_mlp_dtype(mlp_dtype)
    except ValueError:
        return False
    return True


MLP_DTYPES = [dtype for dtype in DTYPES if usable(dtype)]


def make(config, seed=0):
    torch.manual_seed(seed)
    model = DLRM(config)
    with torch.no_grad():
        for p in model.embeddings.parameters():
            p.normal_(std=0.3)
    if config.admission_bytes:  # bits at random: two ids of five are in
        some, others = torch.randint(-(2**63), 2**63 - 1, (2, config.admission_bytes // 8))
        model.embeddings.admission.filter.copy_(some | others)
    return model.eval()


def rows_of(config, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = sum(config.data_hots or (1,) * len(config.table_rows))
    dense = torch.rand(count, config.num_dense, generator=generator) * 4
    sparse = torch.randint(-(2**40), 2**40, (count, ids), generator=generator)
    return dense, sparse


def expected(model, dense, sparse):
    with torch.no_grad():
        return torch.sigmoid(model(dense, sparse))


@pytest.mark.parametrize("mlp_dtype", MLP_DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_predictions_are_those_of_the_model(name, mlp_dtype):
    model = make(CONFIGS[name])
    predictor = Predictor(model, mlp_dtype=mlp_dtype)
    for count in (1, 3, 64, 1300):  # large batches go through in pieces
        dense, sparse = rows_of(model.config, count)
        got, want = predictor(dense, sparse), expected(model, dense, sparse)
        assert got.shape == (count,)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[mlp_dtype])
    assert want.std() > 0.02, "or constants would pass"
    if model.config.admission_bytes:
        inside = model.embeddings.admission.admits(sparse[:, :4], model.embeddings.table_keys)
        assert 0.1 < inside.float().mean() < 0.9


@pytest.mark.parametrize("name", ["robe", "cross"])
def test_without_fast_kernels_the_predictions_are_the_same(monkeypatch, name):
    model = make(CONFIGS[name])
    dense, sparse = rows_of(CONFIG, 70)
    monkeypatch.setattr(packing, "backend", lambda: {"cpu": "reference (not built)"})
    monkeypatch.setattr(packing, "pack_linear", None)  # is not asked for
    torch.testing.assert_close(
        Predictor(model)(dense, sparse), expected(model, dense, sparse), rtol=0, atol=TOLERANCE["float32"]
    )


@pytest.mark.parametrize("array_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if "robe" in name or name == "cross"])
def test_an_array_in_low_precision_is_read_as_the_numbers_it_stands_for(name, array_dtype):
    model = make(CONFIGS[name])
    weight = model.embeddings.array.weight.detach()
    if array_dtype == "int8":
        array = model.embeddings.array.quantized()
        rounded = array.weight.float() * array.scale.repeat_interleave(64)[: len(weight)]
    else:
        rounded = weight.bfloat16().float()
    assert not torch.equal(rounded, weight)
    before = copy.deepcopy(model.state_dict())
    dense, sparse = rows_of(model.config, 700)
    got = Predictor(model, array_dtype=array_dtype)(dense, sparse)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), "the model is as it was"
    with torch.no_grad():
        model.embeddings.array.weight.copy_(rounded)
    # In bfloat16, the sum of several ids is rounded too.
    tolerance = 2e-3 if array_dtype == "bfloat16" and model.config.hots else 1e-6
    torch.testing.assert_close(got, expected(model, dense, sparse), rtol=0, atol=tolerance)


def test_bytes_of_the_array():
    model = make(CONFIG)
    size = model.embeddings.array.size
    groups = -(-size // 64)
    for dtype, want in {"float32": 4 * size, "bfloat16": 2 * size, "int8": size + 4 * groups}.items():
        assert array_bytes(with_array_dtype(model.embeddings, dtype)) == want
    admission = make(CONFIGS["robe, admission"]).embeddings
    assert array_bytes(admission) == array_bytes(model.embeddings) == 4 * size, "the array is smaller by the filter"
    admission.admission = Admission(80, threshold=2, counter_bytes=1 << 16)
    assert array_bytes(admission) == 4 * admission.array.size + 80, "without the counters"
    full = make(CONFIGS["full"])
    assert array_bytes(full.embeddings) >= CONFIG.full_floats * 4


@pytest.mark.parametrize("array_dtype", DTYPES)
def test_a_predictor_counts_no_ids(array_dtype):
    model = make(CONFIG)
    model.embeddings.admission = admission = Admission(64, threshold=1, counter_bytes=1 << 16)
    model.train()
    dense, sparse = rows_of(CONFIG, 10)
    Predictor(model, array_dtype=array_dtype)(dense, sparse)
    assert not admission.filter.any()
    assert not admission.counter.counters.any()
    assert model.embeddings.training
    model(dense, sparse)
    assert admission.filter.any()


def test_results_stay_what_they_were():
    predictor = Predictor(make(CONFIG))
    first = predictor(*rows_of(CONFIG, 10, seed=1))
    kept = first.clone()
    predictor(*rows_of(CONFIG, 10, seed=2))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("name", CONFIGS)
def test_threads_that_share_a_predictor_get_their_own_answers(name):
    predictor = Predictor(make(CONFIGS[name]))
    requests = [rows_of(predictor.config, count, seed=count) for count in (700, 300, 511, 40)]
    alone = [predictor(*request) for request in requests]

    def serve(number):
        return all(torch.equal(predictor(*requests[number]), alone[number]) for _ in range(10))

    with ThreadPoolExecutor(len(requests)) as pool:
        assert all(pool.map(serve, [*range(len(requests))] * 3))
    twin = predictor.twin()
    assert torch.equal(twin(*requests[0]), alone[0])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("mlp_dtype", MLP_DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_predicts_the_same(name, mlp_dtype, copied):
    model = make(CONFIGS[name])
    for array_dtype in DTYPES if "robe" in name else ("float32",):
        predictor = Predictor(model, array_dtype=array_dtype, mlp_dtype=mlp_dtype)
        request = rows_of(model.config, 20)
        want = predictor(*request)
        other = copied(predictor)
        assert torch.equal(other(*request), want)
        assert (other.array_dtype, other.mlp_dtype, other.config) == (array_dtype, mlp_dtype, model.config)


def test_a_predictor_is_pickled_without_the_array_it_was_converted_from():
    model = make(replace(CONFIG, compression=1.01))
    sizes = {dtype: len(pickle.dumps(Predictor(model, array_dtype=dtype))) for dtype in ("float32", "int8")}
    assert sizes["float32"] - sizes["int8"] > 2 * model.embeddings.array.size


def test_a_predictor_unpickled_on_a_cpu_without_the_instructions_says_so(monkeypatch):
    state = Predictor(make(CONFIG)).__getstate__() | {"mlp_dtype": "int8"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with pytest.raises(ValueError, match="mlp_dtype: int8 needs VNNI instructions, which this CPU lacks"):
        Predictor.__new__(Predictor).__setstate__(state)


FINE_DENSE, FINE_SPARSE = torch.rand(4, 5), torch.zeros(4, 4, dtype=torch.long)


@pytest.mark.parametrize("mlp_dtype", MLP_DTYPES)
@pytest.mark.parametrize(
    ("dense", "sparse", "message"),
    [
        (torch.rand(4, 6), FINE_SPARSE, r"dense: expected a tensor \(B, 5\) float32 on cpu, got \(4, 6\) float32"),
        (torch.rand(5), FINE_SPARSE, r"dense: .*, got \(5,\) float32 on cpu"),
        (torch.rand(4, 5, 1), FINE_SPARSE, r"dense: .*, got \(4, 5, 1\) float32 on cpu"),
        (FINE_DENSE.double(), FINE_SPARSE, r"dense: .*, got \(4, 5\) float64 on cpu"),
        (FINE_DENSE.bfloat16(), FINE_SPARSE, "dense: .*, got .* bfloat16"),
        (FINE_DENSE.numpy(), FINE_SPARSE, "dense: .*, got ndarray"),
        (FINE_DENSE.tolist(), FINE_SPARSE, "dense: .*, got list"),
        (None, FINE_SPARSE, "dense: .*, got NoneType"),
        (FINE_DENSE.to("meta"), FINE_SPARSE, "dense: .*, got .* on meta"),
        (FINE_DENSE.to_sparse(), FINE_SPARSE, "dense: .*, got .* on cpu, sparse_coo"),
        (FINE_DENSE, FINE_SPARSE[:, :3], r"sparse: expected a tensor \(B, 4\) int64 on cpu, got \(4, 3\) int64"),
        (FINE_DENSE, FINE_SPARSE.numpy(), "sparse: .*, got ndarray"),
        (FINE_DENSE, FINE_SPARSE.float(), "sparse: .*, got .* float32"),
        (FINE_DENSE, FINE_SPARSE.to("meta"), "sparse: .*, got .* on meta"),
        (FINE_DENSE, FINE_SPARSE[:3], "dense and sparse: expected as many rows, got 4 and 3"),
        (torch.rand(600, 5), torch.zeros(512, 4, dtype=torch.long), "expected as many rows, got 600 and 512"),
    ],
)
def test_what_is_no_batch_is_refused_by_the_name_of_the_argument(mlp_dtype, dense, sparse, message):
    with pytest.raises(ValueError, match=message):
        Predictor(make(CONFIG), mlp_dtype=mlp_dtype)(dense, sparse)


@pytest.mark.parametrize("mlp_dtype", MLP_DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_batches_of_any_layout_are_the_same_batch(name, mlp_dtype):
    predictor = Predictor(make(CONFIGS[name]), mlp_dtype=mlp_dtype)
    dense, sparse = rows_of(predictor.config, 30)
    sparse %= 1000
    want = predictor(dense, sparse)
    wide = torch.zeros(60, 2 * dense.shape[1])
    wide[::2, ::2] = dense
    for same in (dense.t().contiguous().t(), wide[::2, ::2], dense.clone().requires_grad_()):
        assert torch.equal(predictor(same, sparse), want)
    for same in (sparse.t().contiguous().t(), sparse.int()):
        assert torch.equal(predictor(dense, same), want)
    assert predictor(dense[:0], sparse[:0]).shape == (0,)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_never_becomes_a_probability(value):
    dense, sparse = rows_of(CONFIG, 4)
    want = Predictor(make(CONFIG))(dense, sparse)
    dense[1, 2] = value
    got = Predictor(make(CONFIG))(dense, sparse)
    assert got.isnan().tolist() == [False, True, False, False]
    assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])
    for mlp_dtype in set(MLP_DTYPES) - {"float32"}:
        with pytest.raises(ValueError, match=f"dense: expected finite numbers, got {value:g} in row 1, column 2"):
            Predictor(make(CONFIG), mlp_dtype=mlp_dtype)(dense, sparse)
    with pytest.raises(ValueError, match=f"dense: expected finite numbers, got {value:g} in row 1, column 2"):
        list(Predictor(make(CONFIG)).predict([Batch(dense.numpy(), sparse.numpy(), None)]))


def test_the_clock_hears_of_every_stage():
    heard = []
    Predictor(make(CONFIG))(*rows_of(CONFIG, 1024), heard.append)
    assert heard == ["mlp", "embedding", "interaction", "mlp"] * 2


def test_predict_goes_through_batches_and_refuses_nan():
    model = make(CONFIG)
    dense, sparse = rows_of(CONFIG, 20)
    batches = [Batch(d.numpy(), s.numpy(), None) for d, s in zip(dense.split(8), sparse.split(8))]
    got = np.concatenate(list(Predictor(model).predict(batches)))
    np.testing.assert_allclose(got, expected(model, dense, sparse).numpy(), atol=1e-6)
    with torch.no_grad():
        model.top[0].bias[3] = torch.nan
    with pytest.raises(ValueError, match="the model predicts NaN"):
        list(Predictor(model).predict(batches))


def test_embeddings_may_be_any_module():
    model = DLRM(CONFIG, build_embeddings(CONFIGS["hash"])).eval()
    dense, sparse = rows_of(CONFIG, 20)
    torch.testing.assert_close(Predictor(model)(dense, sparse), expected(model, dense, sparse), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="array_dtype: int8 needs a model with a ROBE array; this one has tables"):
        Predictor(model, array_dtype="int8")


class Doubled(DLRM):
    def forward(self, dense, sparse):
        return 2 * super().forward(dense, sparse)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.top.__setitem__(1, nn.GELU()), "expected a ReLU at top.1, got a GELU"),
        (lambda model: model.bottom.insert(1, nn.Dropout()), "expected a ReLU at bottom.1, got a Dropout"),
        (lambda model: model.top[0].register_forward_hook(lambda *_: None), "top.0 has hooks"),
        (lambda model: model.register_forward_pre_hook(lambda *_: None), "it has hooks"),
        (lambda model: setattr(model, "forward", model.forward), "expected a DLRM, got a DLRM with a forward"),
        (lambda model: setattr(model, "__class__", Doubled), "expected a DLRM, got a Doubled with a forward"),
        (lambda model: model.double(), "expected float32 on the cpu, bottom.0.weight is torch.float64"),
        (lambda model: model.to("meta"), "expected float32 on the cpu, bottom.0.weight is torch.float32 on meta"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(change, message):
    model = make(CONFIG)
    change(model)
    with pytest.raises(ValueError, match=f"model: {message}"):
        Predictor(model)


def test_unknown_dtypes_are_refused():
    model = make(CONFIG)
    with pytest.raises(ValueError, match="array_dtype: expected one of float32, bfloat16, int8, got 'float16'"):
        Predictor(model, array_dtype="float16")
    with pytest.raises(ValueError, match="mlp_dtype: expected one of float32, bfloat16, int8, got 'half'"):
        Predictor(model, mlp_dtype="half")


@pytest.mark.parametrize(("mlp_dtype", "needs"), [("bfloat16", "AVX512-BF16 or AMX"), ("int8", "VNNI")])
def test_a_cpu_without_the_instructions_is_told(monkeypatch, mlp_dtype, needs):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    with pytest.raises(ValueError, match=f"mlp_dtype: {mlp_dtype} needs {needs} instructions, which this CPU lacks"):
        Predictor(make(CONFIG), mlp_dtype=mlp_dtype)
    assert inference.check_mlp_dtype("float32") is None
