"""Models of fuxictr, compressed after they were made, in fuxictr's own training loop, fed by its own loaders."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fuxictr.preprocess import FeatureProcessor
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from model_zoo.LongCTR import DIN, DCNv2, FinalMLP
from model_zoo.LongCTR.longctr_dataloader import LongCTRDataLoader

import robe
from tests.integrations.rows import FEATURES, IDS, TRAIN, auc, check, rows

NAMES = [f"cat_{k}" for k in range(FEATURES)]
ITEM = NAMES[-4:]  # in the models of histories, what describes an item
HISTORY = 3
META = ["user_index", "item_index", "seq_len"]
FIT = 22_000  # of the TRAIN rows; on the others fuxictr finds its best epoch
SPLITS = {"train": slice(0, FIT), "valid": slice(FIT, TRAIN), "test": slice(TRAIN, None)}


class DeepFM(BaseModel):
    """Made of fuxictr's layers: of its models, only those of histories are in the wheel."""

    def __init__(self, feature_map, embedding_dim, learning_rate, **options):
        super().__init__(feature_map, **options)
        self.embedding = FeatureEmbedding(feature_map, embedding_dim)
        self.fm = FactorizationMachine(feature_map)
        self.mlp = MLP_Block(feature_map.sum_emb_out_dim(), hidden_units=[32, 16], output_dim=1)
        self.compile(options["optimizer"], options["loss"], learning_rate)
        self.reset_parameters()

    def forward(self, inputs):
        x = self.get_inputs(inputs)
        embeddings = self.embedding(x)
        return {"y_pred": self.output_activation(self.fm(x, embeddings) + self.mlp(embeddings.flatten(1)))}


MODELS = {
    DeepFM: {},
    DCNv2: {"num_cross_layers": 2, "parallel_dnn_hidden_units": [32, 16]},
    FinalMLP: {"mlp1_hidden_units": [32, 16], "mlp2_hidden_units": [32, 16]},
    DIN: {"dnn_hidden_units": [32, 16], "attention_hidden_units": [16]},
}


def columns():
    # Id 0 is fuxictr's padding; the last one, IDS + 1, is for ids that it has not seen.
    return {name: ids + 1 for name, ids in zip(NAMES, rows().sparse.T)} | {"label": rows().labels.astype(int)}


def feature_map(folder, item=(), meta=()):
    category = {"type": "categorical", "dtype": int, "active": True, "vocab_size": IDS + 2}
    features = [category | {"name": name, "source": "item" if name in item else ""} for name in NAMES]
    features += [{"name": name, "type": "meta", "dtype": int, "active": True} for name in meta]
    processor = FeatureProcessor(features, {"name": "label", "dtype": int}, "rows", str(folder))
    processor.fit(None, rebuild_dataset=False)
    of_meta = {"name": list(meta), "embedding_dim": 0}
    processor.feature_map.load(processor.json_file, {"embedding_dim": 8, "feature_specs": [of_meta]})
    return processor.feature_map


def loaders(features, folder, **options):
    """Of the rows to train, to validate and to test."""
    paths = {f"{split}_data": str(folder / split) for split in SPLITS}
    return RankDataLoader(features, **paths, batch_size=256, shuffle=False, num_workers=0, **options)


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flat")
    for split, some in SPLITS.items():
        np.savez(folder / split, **{name: x[some] for name, x in columns().items()})
    features = feature_map(folder)
    return features, loaders(features, folder)


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    """Each row is of an item of its own, after at most HISTORY items of the rows before."""
    folder = tmp_path_factory.mktemp("histories")
    x = columns()
    n = len(x["label"])
    items = {"item_index": range(n + 1)} | {name: np.append(0, x.pop(name)) for name in ITEM}
    before = [np.maximum(np.arange(row + 1 - HISTORY, row + 1), 0) for row in range(n)]
    x |= {"user_index": range(n), "item_index": range(1, n + 1), "seq_len": np.arange(n) % (HISTORY + 1)}
    files = {"user_info": folder / "users.parquet", "item_info": folder / "items.parquet"}
    pd.DataFrame({"full_item_seq": before}).to_parquet(files["user_info"])
    pd.DataFrame(items).to_parquet(files["item_info"])
    for split, some in SPLITS.items():
        pd.DataFrame(x)[some].to_parquet(folder / f"{split}.parquet")
    features = feature_map(folder, ITEM, META)
    return features, loaders(features, folder, data_loader=LongCTRDataLoader, **files)


def made(make, features, ratio, **options):
    torch.manual_seed(0)
    training = {"optimizer": "adam", "loss": "binary_crossentropy"}
    options |= MODELS[make] | training | {"metrics": ["AUC"], "model_root": str(Path(features.data_dir).parent)}
    model = make(features, embedding_dim=8, learning_rate=0.002, verbose=0, **options)
    if ratio:
        robe.compress(model, ratio)
        # The optimizer that fuxictr makes with the model is of the tables.
        model.compile(**training, lr=0.002)
    return model


def trained(make, data, ratio):
    """Test AUC, and the model."""
    features, (train, valid, test) = data
    model = made(make, features, ratio, model_id=f"{make.__name__}_{ratio}")
    model.fit(train, epochs=2, validation_data=valid)
    # The second epoch overfits; the checkpoint of the first one is back.
    assert model.evaluate(valid)["AUC"] == model._best_metric
    return auc(model.predict(test)), model


@pytest.mark.parametrize("make", MODELS)
def test_trains_and_is_not_far_behind(make, request):
    data = request.getfixturevalue("flat" if make is DeepFM else "histories")
    full, model = trained(make, data, None)
    size = Path(model.checkpoint).stat().st_size
    compressed, model = trained(make, data, 10)
    report = model.compression_report
    assert not report.left
    assert sorted(table.embedding_dim for table in report.swapped) == [1] * FEATURES * (make is DeepFM) + [8] * FEATURES
    layers = [m for m in model.modules() if isinstance(m, robe.RobeEmbedding)]
    assert {layer.padding_idx for layer in layers} == {0}
    assert len({id(layer.array) for layer in layers}) == 1
    assert Path(model.checkpoint).stat().st_size < size / 5
    print(f"{make.__name__}: full {full:.4f}, compressed {compressed:.4f}")
    check(compressed, full)


def test_a_checkpoint_loads_into_another_model(flat):
    features, (*_, test) = flat
    model, other = made(DeepFM, features, 10), made(DeepFM, features, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_weights(model.checkpoint)
    other.load_weights(model.checkpoint)
    np.testing.assert_array_equal(other.predict(test), model.predict(test))


def test_the_penalty_on_embeddings_is_of_the_array(flat):
    model = made(DeepFM, flat[0], 10, embedding_regularizer=0.1)
    array = next(m.array for m in model.modules() if isinstance(m, robe.RobeEmbedding))
    # Once for each of fuxictr's layers that read it.
    torch.testing.assert_close(model.regularization_loss(), 2 * 0.1 / 2 * array.weight.square().sum())
    model.regularization_loss().backward()
    torch.testing.assert_close(array.weight.grad, 2 * 0.1 * array.weight)
