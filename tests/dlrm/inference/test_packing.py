"""MLPs and cross nets as functions, against the modules they are made of."""

import pytest
import torch

from dlrm.inference.packing import Chain, Cross, packed
from dlrm.model import MLP, CrossInteraction
from tests.dlrm.inference.test_predictor import MLP_DTYPES, TOLERANCE
from tests.helpers.kernels import IS_NATIVE


@pytest.mark.parametrize("dtype", MLP_DTYPES)
@pytest.mark.parametrize("relu_last", [False, True])
def test_an_mlp(dtype, relu_last):
    torch.manual_seed(0)
    mlp, x = MLP((13, 40, 7), relu_last), torch.rand(30, 13)
    run = packed(mlp, dtype)
    assert isinstance(run, Chain) == (dtype == "float32" and IS_NATIVE)
    with torch.inference_mode():
        torch.testing.assert_close(run(x).float(), mlp(x), rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", MLP_DTYPES)
def test_a_cross_net(dtype):
    torch.manual_seed(0)
    cross, dense, embeddings = CrossInteraction(20, 2, 3), torch.rand(30, 4), torch.rand(30, 4, 4)
    with torch.inference_mode():
        got = Cross(cross, dtype)(dense, embeddings)
        torch.testing.assert_close(got, cross(dense, embeddings), rtol=0, atol=10 * TOLERANCE[dtype])
