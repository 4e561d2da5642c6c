"""The methods of the Hub, with folders, and with a Hub that is a folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import hub_mixin
from torch import nn

import robe
import robe.hub

IDS = torch.randint(0, 1000, (6, 5), generator=torch.Generator().manual_seed(0))


class Recommender(nn.Module, robe.hub.RobeHubMixin):
    def __init__(self, rows, dim=8):
        super().__init__()
        self.user = nn.Embedding(rows, dim)
        self.words = nn.EmbeddingBag(rows, dim)
        self.top = nn.Linear(dim, 1)

    def forward(self, ids):
        return self.top(self.user(ids[:, 0]) + self.words(ids))


LAYERS = {
    "RobeEmbedding": (1000, 8),
    "RobeEmbeddingBag": (1000, 8),
    "RobeEmbeddingBagCollection": ([robe.EmbeddingBagConfig("a", 1000, 8)],),
    "RobeKeyedEmbeddingBagCollection": ([robe.EmbeddingBagConfig("a", 1000, 8)],),
}


def test_a_compressed_model_in_a_folder(tmp_path):
    model = robe.compress(Recommender(2000, dim=4), 10, seed=6)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert json.loads((tmp_path / "config.json").read_text()) == {"rows": 2000, "dim": 4}
    again = Recommender.from_pretrained(tmp_path)
    assert not again.training
    assert isinstance(again.user, robe.RobeEmbedding)
    assert again.user.array is again.words.array
    assert torch.equal(again(IDS), model(IDS))


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, tmp_path):
    kind = getattr(robe.hub, name)
    layer = kind(*LAYERS[name], compression=10, seed=4, block_size=3)
    layer.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert type(again) is kind
    assert isinstance(again, getattr(robe, name))
    assert repr(again) == repr(layer)
    assert torch.equal(again.array.weight, layer.array.weight)
    again.save_pretrained(tmp_path)
    others = [other for other in LAYERS if other != name]
    with pytest.raises(ValueError, match=f"model.safetensors: of a {name}, not a {others[0]}"):
        getattr(robe.hub, others[0]).from_pretrained(tmp_path)


def test_what_other_versions_of_huggingface_hub_pass_on_is_not_for_the_model(tmp_path):
    robe.compress(Recommender(2000), 10).save_pretrained(tmp_path)
    where = {"model_id": str(tmp_path), "revision": None, "cache_dir": None, "force_download": False}
    where |= {"local_files_only": False, "token": None, "proxies": None, "resume_download": None, "strict": True}
    model = Recommender._from_pretrained(**where, rows=2000, map_location="cpu")
    assert model.user.array.weight.device.type == "cpu"


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError):
        robe.hub.RobeEmbedding.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "expected an object"), ("{", "not JSON"), ("[" * 100_000, "nested more than 64 deep")],
)
def test_a_damaged_config_is_refused_by_name(content, message, tmp_path):
    robe.compress(Recommender(2000), 10).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        Recommender.from_pretrained(tmp_path)


def test_a_damaged_model_is_refused_by_name(tmp_path):
    robe.compress(Recommender(2000), 10).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file"):
        Recommender.from_pretrained(tmp_path)


def test_push_and_pull(tmp_path, monkeypatch):
    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            (tmp_path / repo_id).mkdir(parents=True)
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **_):
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)

    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options.get("revision")))
        return str(tmp_path / repo_id / filename)

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    monkeypatch.setattr(hub_mixin, "hf_hub_download", lambda **options: download(**options))
    monkeypatch.setattr(robe.hub, "hf_hub_download", download)
    model = robe.compress(Recommender(2000), 10)
    model.push_to_hub("me/recommender")
    assert "robe" in Path(tmp_path / "me/recommender/README.md").read_text()
    again = Recommender.from_pretrained("me/recommender", revision="v1")
    assert torch.equal(again(IDS), model(IDS))
    assert ("me/recommender", "model.safetensors", "v1") in asked
