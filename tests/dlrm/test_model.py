"""DLRM against the same model in numpy and float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dlrm import DLRM, PRESETS, DLRMConfig, checkpoint
from dlrm.model import MLP, CrossInteraction, DotInteraction, LowRankCrossNet

SMALL = DLRMConfig(
    embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 6, 1), table_rows=(10, 20, 30), compression=2, block_size=3
)


def mlp_in_numpy(state, prefix, x, relu_last):
    layers = sorted({int(name.split(".")[1]) for name in state if name.startswith(prefix)})
    for layer in layers:
        x = x @ state[f"{prefix}.{layer}.weight"].T + state[f"{prefix}.{layer}.bias"]
        if layer != layers[-1] or relu_last:
            x = np.maximum(x, 0)
    return x


@pytest.mark.parametrize("embedding", ["robe", "full", "hash"])
def test_forward_equals_numpy(embedding):
    torch.manual_seed(0)
    model = DLRM(replace(SMALL, embedding=embedding)).double()
    dense, sparse = torch.randn(6, 13, dtype=torch.float64), torch.randint(0, 2**32, (6, 3))
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    x = mlp_in_numpy(state, "bottom", dense.numpy(), relu_last=True)
    embedded = model.embeddings(sparse).detach().numpy()
    logits = []
    for b in range(6):
        vectors = [x[b], *embedded[b]]
        dots = [vectors[i] @ vectors[j] for i in range(4) for j in range(i)]
        logits.append(mlp_in_numpy(state, "top", np.concatenate([x[b], dots]), relu_last=False)[0])
    np.testing.assert_allclose(model(dense, sparse).detach().numpy(), logits, rtol=1e-12)


def test_interaction_order():
    """Row-wise strictly lower triangle: (1,0), (2,0), (2,1), (3,0) ... - trained top layers depend on it."""
    vectors = torch.eye(4).unsqueeze(0) * torch.tensor([1.0, 2.0, 3.0, 5.0])
    mixed = vectors + vectors.flip(1)
    joined = DotInteraction()(mixed[:, 0], mixed[:, 1:])[0].tolist()
    gram = (mixed[0] @ mixed[0].T).tolist()
    assert joined[:4] == mixed[0, 0].tolist()
    assert joined[4:] == [gram[1][0], gram[2][0], gram[2][1], gram[3][0], gram[3][1], gram[3][2]]


def test_initial_values_have_the_published_scales():
    torch.manual_seed(0)
    mlp = MLP((400, 600, 300), relu_last=False)
    assert [type(layer).__name__ for layer in mlp] == ["Linear", "ReLU", "Linear"]
    for layer, fan_in, fan_out in ((mlp[0], 400, 600), (mlp[2], 600, 300)):
        assert layer.weight.std().item() == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.02)
        assert layer.bias.std().item() == pytest.approx(fan_out**-0.5, rel=0.15)


@pytest.mark.parametrize(("name", "top_input"), [("kaggle", 367), ("terabyte", 479)])
def test_presets_build_the_published_models(name, top_input):
    model = DLRM(replace(PRESETS[name].model, compression=100_000))
    assert model.top[0].in_features == top_input
    assert model(torch.randn(2, 13), torch.randint(0, 2**32, (2, 26))).shape == (2,)
    if name == "terabyte":
        floats = sum(p.numel() for part in (model.bottom, model.top) for p in part.parameters())
        assert floats == pytest.approx(2.37e6, rel=0.01)


def test_embeddings_can_be_injected():
    class Ones(torch.nn.Module):
        def forward(self, sparse):
            return torch.ones(*sparse.shape, 4)

    model = DLRM(SMALL, Ones())
    assert not any(name.startswith("embeddings") for name in model.state_dict())
    assert model(torch.randn(2, 13), torch.zeros(2, 3, dtype=torch.long)).shape == (2,)


def test_state_dict_names_are_kept():
    names = set(DLRM(SMALL).state_dict())
    linear = {f"{part}.{i}.{kind}" for part, layers in (("bottom", (0, 2)), ("top", (0, 2, 4))) for i in layers
              for kind in ("weight", "bias")}  # fmt: skip
    assert names == {"embeddings.array.weight"} | linear


# torch's own compiler warns about its use of deprecated Python features.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compiles_without_graph_breaks():
    torch.manual_seed(0)
    model = DLRM(SMALL)
    dense, sparse = torch.randn(6, 13), torch.randint(0, 2**32, (6, 3))
    model(dense, sparse).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = torch.compile(model, fullgraph=True)(dense, sparse)
    torch.testing.assert_close(logits, model(dense, sparse))
    logits.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


@pytest.mark.parametrize("embedding", ["robe", "full", "hash"])
def test_several_ids_a_feature_are_summed(embedding, tmp_path):
    torch.manual_seed(0)
    hots = (2, 1, 3)
    model = DLRM(replace(SMALL, embedding=embedding, hots=hots))
    dense, sparse = torch.randn(6, 13), torch.randint(0, 2**32, (6, 6))
    firsts, columns = (0, 2, 3), []
    for first, hot in zip(firsts, hots):
        columns.append([first + min(i, hot - 1) for i in range(3)])
    one_each = [model.embeddings(sparse[:, [column[i] for column in columns]]) for i in range(3)]
    summed = torch.stack([sum(one_each[i][:, f] for i in range(hot)) for f, hot in enumerate(hots)], 1)
    expected = model.top(model.interaction(model.bottom(dense), summed)).squeeze(1)
    torch.testing.assert_close(model(dense, sparse), expected)
    checkpoint.save(tmp_path, model)
    loaded = checkpoint.load(tmp_path)
    assert loaded.config.hots == hots
    assert torch.equal(loaded(dense, sparse), model(dense, sparse))


# -- The cross net ----------------------------------------------------------------------------------------------------

CROSS = replace(SMALL, interaction="cross", cross_layers=2, cross_rank=3)


def cross_in_numpy(state, prefix, x0):
    x = x0
    for layer in range(len([name for name in state if name.startswith(f"{prefix}v.")])):
        v, w, b = (
            state[f"{prefix}v.{layer}.weight"],
            state[f"{prefix}w.{layer}.weight"],
            state[f"{prefix}w.{layer}.bias"],
        )
        x = np.stack([row0 * (w @ (v @ row) + b) + row for row0, row in zip(x0, x)])
    return x


def a_net(width, layers, rank):
    torch.manual_seed(0)
    net = LowRankCrossNet(width, layers, rank).double()
    with torch.no_grad():
        for w in net.w:
            w.bias.normal_()
    return net


@pytest.mark.parametrize(("width", "layers", "rank"), [(12, 3, 5), (5, 1, 1), (4, 2, 9)])
def test_the_cross_net_equals_numpy(width, layers, rank):
    net, x = a_net(width, layers, rank), torch.randn(7, width, dtype=torch.float64)
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    assert net(x).shape == (7, width)
    np.testing.assert_allclose(net(x).detach().numpy(), cross_in_numpy(state, "", x.numpy()), rtol=1e-12)
    assert net(x[:0]).shape == (0, width)


def test_gradients_of_the_cross_net():
    net = a_net(4, 3, 2)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*net.named_parameters())
    assert len(names) == 9
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(net, dict(zip(names, values)), x), (x, *values)
    )


def test_initial_values_of_the_cross_net():
    torch.manual_seed(0)
    net = LowRankCrossNet(700, 2, 300)
    for v, w in zip(net.v, net.w):
        assert v.weight.shape == (300, 700)
        assert w.weight.shape == (700, 300)
        assert v.bias is None
        assert not w.bias.any()
        for weight in (v.weight, w.weight):
            assert weight.std().item() == pytest.approx((2 / 1000) ** 0.5, rel=0.01)
            assert weight.abs().max() > 3.5 * (2 / 1000) ** 0.5, "normal, not uniform"


def test_the_cross_net_takes_the_vectors_one_behind_the_other():
    torch.manual_seed(0)
    crossing = CrossInteraction(12, 2, 3)
    dense, embeddings = torch.randn(5, 4), torch.randn(5, 2, 4)
    behind = torch.stack([torch.cat([dense[b], embeddings[b, 0], embeddings[b, 1]]) for b in range(5)])
    assert torch.equal(crossing(dense, embeddings), crossing.net(behind))


@pytest.mark.parametrize("embedding", ["robe", "full", "hash"])
@pytest.mark.parametrize("hots", [None, (2, 1, 3)])
def test_a_model_with_a_cross_net(embedding, hots, tmp_path):
    torch.manual_seed(0)
    model = DLRM(replace(CROSS, embedding=embedding, hots=hots)).double()
    dense, sparse = torch.randn(6, 13, dtype=torch.float64), torch.randint(0, 2**32, (6, sum(hots) if hots else 3))
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    x = mlp_in_numpy(state, "bottom", dense.numpy(), relu_last=True)
    firsts, columns = (0, 2, 3) if hots else (0, 1, 2), []
    for first, hot in zip(firsts, hots or (1, 1, 1)):
        columns.append([first + i for i in range(hot)])
    # One id of each feature at a time; ids of features that have no more are left out of the sums.
    one_each = [
        model.embeddings(sparse[:, [column[min(i, len(column) - 1)] for column in columns]]).detach().numpy()
        for i in range(3)
    ]
    rows = [sum(one_each[i][:, f] for i in range(len(column))) for f, column in enumerate(columns)]
    crossed = cross_in_numpy(state, "interaction.net.", np.concatenate([x, *rows], axis=1))
    expected = mlp_in_numpy(state, "top", crossed, relu_last=False)[:, 0]
    np.testing.assert_allclose(model(dense, sparse).detach().numpy(), expected, rtol=1e-10)

    model = model.float()
    dense = dense.float()
    model(dense, sparse).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    checkpoint.save(tmp_path, model)
    loaded = checkpoint.load(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(dense, sparse), model(dense, sparse))


def test_state_dict_names_of_the_cross_net_are_kept():
    names = {name for name in DLRM(CROSS).state_dict() if not name.startswith(("bottom", "top", "embeddings"))}
    assert names == {
        f"interaction.net.{part}" for i in range(2) for part in (f"v.{i}.weight", f"w.{i}.weight", f"w.{i}.bias")
    }


def test_dcnv2_builds_the_published_model():
    with torch.device("meta"):
        model = DLRM(replace(PRESETS["dcnv2"].model, compression=100_000))
    assert model.top[0].in_features == 27 * 128 == 3456
    floats = sum(p.numel() for p in model.interaction.parameters())
    assert floats == 3 * (2 * 3456 * 512 + 3456)
