"""Small models of every kind, their inputs, and exported files run as their users run them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from dlrm import DLRM, DLRMConfig, checkpoint
from dlrm.embeddings import build_embeddings

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


# A program that knows neither robe nor dlrm.
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
    """Run infer.py export in a process of its own and return what it printed."""
    checkpoint.save(folder / "checkpoint", model)
    arguments = ["--checkpoint", folder / "checkpoint", "--output", folder / name, *options]
    done = subprocess.run(
        [sys.executable, ROOT / "infer.py", "export", *map(str, arguments)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
