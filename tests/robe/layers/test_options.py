"""The keywords that all layers share: each layer has them all, and a misspelt one is refused by Python and by mypy."""

import subprocess
import sys
from pathlib import Path

import pytest

import robe
from robe.layers.options import LayerOptions, SharedOptions

ROOT = Path(__file__).parents[3]
TABLE = robe.EmbeddingBagConfig("a", 100, 8)
LAYERS = {
    robe.RobeEmbedding: (100, 8),
    robe.RobeEmbeddingBag: (100, 8),
    robe.RobeEmbeddingBagCollection: ([TABLE],),
    robe.RobeKeyedEmbeddingBagCollection: ([TABLE],),
}
VALUES = {
    "array": robe.RobeArray(64),
    "robe_size": 64,
    "compression": 10.0,
    "block_size": 4,
    "sign": True,
    "admission": robe.Admission(8),
    "seed": 3,
    "init_std": 0.5,
    "hash": "mix",
}


def test_every_option_is_tested():
    assert set(VALUES) == set(LayerOptions.__annotations__)
    assert set(LayerOptions.__annotations__) - set(SharedOptions.__annotations__) == {"hash"}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", VALUES)
def test_every_layer_has_every_option(kind, name):
    options = {name: VALUES[name]}
    if name not in ("array", "robe_size", "compression"):
        options["robe_size"] = 64
    if kind is robe.RobeKeyedEmbeddingBagCollection and name == "hash":
        with pytest.raises(
            TypeError, match="RobeKeyedEmbeddingBagCollection: got an unexpected keyword argument 'hash'"
        ):
            kind(*LAYERS[kind], **options)
        return
    layer = kind(*LAYERS[kind], **options)
    part = layer.collections[0] if kind is robe.RobeKeyedEmbeddingBagCollection else layer
    assert layer.array.size == (80 if name == "compression" else 64)
    if name in ("array", "admission"):
        assert getattr(layer, name) is VALUES[name]
    elif name in ("seed", "init_std"):
        assert getattr(layer.array, name) == VALUES[name]
    elif name in ("block_size", "sign", "hash"):
        assert getattr(part, name) == VALUES[name]


@pytest.mark.parametrize("kind", LAYERS)
def test_a_misspelt_option_is_refused_with_the_right_name(kind):
    with pytest.raises(
        TypeError, match=f"{kind.__name__}: got an unexpected .* 'blok_size'; did you mean 'block_size'?"
    ):
        kind(*LAYERS[kind], robe_size=64, blok_size=4)
    with pytest.raises(TypeError, match=f"{kind.__name__}: got an unexpected keyword argument 'x'$"):
        kind(*LAYERS[kind], robe_size=64, x=4)


@pytest.mark.slow
def test_type_checkers_refuse_misspelt_options_and_wrong_types(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        """import robe

table = robe.EmbeddingBagConfig("a", 100, 8)
robe.RobeEmbedding(100, 8, robe_size=64, block_size=4, hash="mix", table_id=1)
robe.RobeEmbeddingBag(100, 8, robe_size=64, sign=True, first_row=2)
robe.RobeEmbeddingBagCollection([table], compression=10, admission=None)
robe.RobeKeyedEmbeddingBagCollection([table], array=robe.RobeArray(64))
robe.RobeEmbedding(100, 8, robe_sise=64)
robe.RobeEmbeddingBag(100, 8, robe_size=64, blok_size=4)
robe.RobeEmbeddingBagCollection([table], compresion=10)
robe.RobeKeyedEmbeddingBagCollection([table], compression=10, hash="mix")
robe.RobeEmbedding(100, 8, robe_size="64")
"""
    )
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", str(program)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    places = [line.split(":")[1] for line in result.stdout.splitlines() if ": error:" in line]
    assert (places, result.returncode) == (["8", "9", "10", "11", "12"], 1), result.stdout + result.stderr
