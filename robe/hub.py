"""ROBE layers and models that hold them on the Hugging Face Hub. Needs huggingface_hub (pip install .[hub]).

    class Recommender(torch.nn.Module, robe.hub.RobeHubMixin): ...

    model = robe.compress(Recommender(rows=40_000_000), 1000)
    model.push_to_hub("me/recommender")                         # or save_pretrained("folder")
    model = Recommender.from_pretrained("me/recommender")       # compressed again

The layers here are those of robe with these three methods. The file that they write is that of ``robe.save``.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

import robe
from robe_json import read_json

FILE = constants.SAFETENSORS_SINGLE_FILE


class RobeHubMixin(ModelHubMixin, library_name="robe-dlrm", tags=["robe", "recommendation"]):
    """A base class for models: ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``, see ModelHubMixin.

    ``from_pretrained`` makes the model with its saved arguments, those in JSON's types, and swaps its tables for the
    saved layers. The model is then in evaluation mode, as always with huggingface_hub. Where the tables would not fit,
    make them on the meta device.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        robe.save(self, save_directory / FILE)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """Make the model of a folder or a repository, as in ModelHubMixin.

        Args:
            pretrained_model_name_or_path: the folder, or the name of the repository.
            **options: those of ModelHubMixin; map_location, the device; and arguments of the class.

        Raises:
            ValueError: config.json is no JSON object, or the model file is damaged or doesn't fit; see ``robe.load``.
        """
        where = {
            name: x for name, x in options.items() if name in ("cache_dir", "revision", "token", "local_files_only")
        }
        config = _config_file(str(pretrained_model_name_or_path), where)
        if config is not None:
            read_json(config, dict[str, Any])
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def _from_pretrained(cls, *, map_location: str | None = None, **options: Any) -> Any:
        file, arguments = _file(**options)
        model: Any = robe.load(file, cls(**arguments), device=map_location)  # type: ignore[arg-type]
        return (model if map_location is None else model.to(map_location)).eval()


class _LayerHubMixin(RobeHubMixin):
    """The methods for layers, whose file holds all that is needed to make them."""

    @classmethod
    def _from_pretrained(cls, *, map_location: str | None = None, **options: Any) -> Any:
        file, _ = _file(**options)
        layer: Any = robe.load(file, device=map_location)
        if type(layer) not in cls.__mro__:
            raise ValueError(f"{file}: of a {type(layer).__name__}, not a {cls.__name__}")
        layer.__class__ = cls
        return layer.eval()


def _config_file(model_id: str, where: dict[str, Any]) -> Path | None:
    """The file with the arguments of a model; None: there is none."""
    if Path(model_id).is_dir():
        file = Path(model_id) / constants.CONFIG_NAME
        return file if file.exists() else None
    try:
        return Path(hf_hub_download(model_id, constants.CONFIG_NAME, **where))
    except HfHubHTTPError:
        return None


def _file(
    *,
    model_id: str,
    revision,
    cache_dir,
    force_download,
    local_files_only,
    token,
    proxies=None,  # older versions pass this and the next one
    resume_download=None,
    strict=None,  # PyTorchModelHubMixin has this; here loading is always strict
    **arguments: Any,
) -> tuple[Path, dict[str, Any]]:
    """The file of a folder or a repository, and the arguments that don't say where it is."""
    if Path(model_id).is_dir():
        return Path(model_id) / FILE, arguments
    file = hf_hub_download(
        model_id,
        FILE,
        revision=revision,
        cache_dir=cache_dir,
        force_download=force_download,
        token=token,
        local_files_only=local_files_only,
    )
    return Path(file), arguments


class RobeEmbedding(_LayerHubMixin, robe.RobeEmbedding):  # type: ignore[misc]
    """robe.RobeEmbedding with the methods of the Hub; ``from_pretrained`` is the Hub's, not that of a table."""


class RobeEmbeddingBag(_LayerHubMixin, robe.RobeEmbeddingBag):  # type: ignore[misc]
    """robe.RobeEmbeddingBag with the methods of the Hub; ``from_pretrained`` is the Hub's, not that of a table."""


class RobeEmbeddingBagCollection(_LayerHubMixin, robe.RobeEmbeddingBagCollection):
    """robe.RobeEmbeddingBagCollection with the methods of the Hub."""


class RobeKeyedEmbeddingBagCollection(_LayerHubMixin, robe.RobeKeyedEmbeddingBagCollection):
    """robe.RobeKeyedEmbeddingBagCollection with the methods of the Hub."""
