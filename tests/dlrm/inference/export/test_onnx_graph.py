"""The arithmetic of graphs in ONNX Runtime against Python integers."""

import sys

import numpy as np
import onnxruntime
import pytest

from dlrm.inference.export import export
from dlrm.inference.export.onnx_graph import Graph
from tests.dlrm.inference.export.models import make


def test_an_array_of_more_than_32_bits_of_places():
    graph = Graph()
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


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_missing_packages_are_named(old_file, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"needs the package {name}: pip install onnx onnxruntime"):
        export(make(), old_file, format="onnx")
