"""The dot interaction against a loop in float64 numpy."""

import numpy as np
import pytest
import torch

from dlrm.ops import REFERENCE


def by_loop(dense, embeddings, grad):
    """The output, and the gradients of dense and embeddings."""
    batch, features, dim = embeddings.shape
    vectors = np.concatenate([dense[:, None], embeddings], axis=1)
    output = np.zeros((batch, dim + features * (features + 1) // 2))
    grad_vectors = np.zeros_like(vectors)
    for b in range(batch):
        output[b, :dim] = dense[b]
        grad_vectors[b, 0] += grad[b, :dim]
        place = dim
        for i in range(features + 1):
            for j in range(i):
                output[b, place] = vectors[b, i] @ vectors[b, j]
                grad_vectors[b, i] += grad[b, place] * vectors[b, j]
                grad_vectors[b, j] += grad[b, place] * vectors[b, i]
                place += 1
    return output, grad_vectors[:, 0], grad_vectors[:, 1:]


def inputs(batch, features, dim, dtype=torch.float64):
    generator = torch.Generator().manual_seed(batch + features + dim)
    dense = torch.randn(batch, dim, generator=generator, dtype=torch.float64).to(dtype)
    embeddings = torch.randn(batch, features, dim, generator=generator, dtype=torch.float64).to(dtype)
    grad = torch.randn(batch, dim + features * (features + 1) // 2, generator=generator, dtype=torch.float64).to(dtype)
    return dense, embeddings, grad


SHAPES = [(3, 26, 16), (2, 26, 128), (4, 1, 5), (1, 3, 1), (5, 4, 17), (2, 40, 33), (0, 3, 4), (2, 15, 15), (300, 2, 8)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_a_loop(shape, dtype):
    dense, embeddings, grad = inputs(*shape, dtype)
    want = by_loop(*(x.double().numpy() for x in (dense, embeddings, grad)))
    dense.requires_grad_()
    embeddings.requires_grad_()
    output = torch.ops.dlrm.dot_interaction(dense, embeddings)
    output.backward(grad)
    for got, expected in zip((output.detach(), dense.grad, embeddings.grad), want):
        assert got.dtype == dtype
        scale = np.abs(expected).max(initial=1)
        np.testing.assert_allclose(got.double().numpy(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_reference_equals_a_loop():
    dense, embeddings, grad = inputs(3, 26, 16)
    want = by_loop(dense.numpy(), embeddings.numpy(), grad.numpy())
    got = (
        REFERENCE["dot_interaction"](dense, embeddings),
        *REFERENCE["dot_interaction_backward"](grad, dense, embeddings),
    )
    for tensor, expected in zip(got, want):
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=0, atol=1e-12)


def test_strides_do_not_matter():
    dense, embeddings, grad = inputs(4, 5, 6)
    want = torch.ops.dlrm.dot_interaction(dense, embeddings)
    wide = torch.zeros(4, 9, 6, dtype=torch.float64)
    wide[:, 2:7], wide[:, 8] = embeddings, dense
    columns = embeddings.transpose(1, 2).contiguous().transpose(1, 2)  # last dimension not contiguous
    assert torch.equal(torch.ops.dlrm.dot_interaction(wide[:, 8], wide[:, 2:7]), want)
    assert torch.equal(torch.ops.dlrm.dot_interaction(dense, columns), want)
    expected = torch.ops.dlrm.dot_interaction_backward(grad, dense, embeddings)
    got = torch.ops.dlrm.dot_interaction_backward(grad.T.contiguous().T, wide[:, 8], columns)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    dense, embeddings, grad = inputs(3, 4, 5, dtype)
    torch.library.opcheck(torch.ops.dlrm.dot_interaction, (dense.requires_grad_(), embeddings.requires_grad_()))
    torch.library.opcheck(torch.ops.dlrm.dot_interaction_backward, (grad, dense.detach(), embeddings.detach()))


@pytest.mark.parametrize(("dense", "embeddings"), [((2, 3), (2, 4, 5)), ((2, 3), (3, 4, 3)), ((2, 3), (2, 3))])
def test_shapes_that_do_not_fit_are_refused(dense, embeddings):
    with pytest.raises(ValueError, match=r"dense and embeddings: expected \(B, D\) and \(B, F, D\), got"):
        torch.ops.dlrm.dot_interaction(torch.ones(dense), torch.ones(embeddings))


def test_threads_do_not_change_a_bit():
    dense, embeddings, grad = inputs(200, 26, 16, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            output = torch.ops.dlrm.dot_interaction(dense, embeddings)
            results.append((output, *torch.ops.dlrm.dot_interaction_backward(grad, dense, embeddings)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
