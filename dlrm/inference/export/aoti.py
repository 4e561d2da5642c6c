"""A DLRM compiled ahead of time by torch, into a package that runs where this project is not."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from dlrm.embeddings import Tables, synthetic_ids
from dlrm.model import DLRM
from robe import RobeEmbeddingBagCollection
from robe.admission import RARE
from robe.hashing import slots


class Portable(nn.Module):
    """A DLRM and the sigmoid in torch's own operators, so that what is compiled of it runs where robe is not."""

    feature: Tensor
    pairs: Tensor
    rare: Tensor

    def __init__(self, model: DLRM, embeddings: nn.Module):
        super().__init__()
        self.config, self.embeddings = model.config, embeddings
        self.bottom, self.interaction, self.top = model.bottom, model.interaction, model.top
        self.register_buffer("feature", torch.tensor(model.config.feature_of_id))
        vectors = len(model.config.table_rows) + 1
        lower = torch.tril_indices(vectors, vectors, -1)
        # Read from memory: of a hash that it knows beforehand, the C++ compiler does not let the products wrap around.
        self.register_buffer("rare", torch.full((1, len(self.feature)), RARE))
        self.register_buffer("pairs", lower[0] * vectors + lower[1])

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        rows = self._embed(sparse)
        if self.config.interaction == "cross":
            x = self.interaction(x, rows)
        else:
            vectors = torch.cat([x.unsqueeze(1), rows], dim=1)
            dots = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
            x = torch.cat([x, dots[:, self.pairs]], dim=1)
        return self.top(x).squeeze(1).sigmoid()

    def _embed(self, sparse: Tensor) -> Tensor:
        config = self.config
        if config.synthetic_hots:
            assert config.hots is not None
            sparse = synthetic_ids(sparse, config.hots, config.table_rows)
        if isinstance(self.embeddings, RobeEmbeddingBagCollection):
            rows = self._robe(self.embeddings, sparse)
        else:
            assert isinstance(self.embeddings, Tables)
            rows = self.embeddings.rows(sparse, self.feature) + self.embeddings.first_rows[self.feature]
            rows = self.embeddings.weight[rows]
        if config.hots is None:
            return rows
        return torch.stack([x.sum(1) for x in rows.split(list(config.hots), dim=1)], dim=1)

    def _robe(self, embeddings: RobeEmbeddingBagCollection, ids: Tensor) -> Tensor:
        """ids (B, H) to rows (B, H, D)."""
        weight, scale = embeddings.array.read()
        dim, block_size = embeddings.embedding_dim, embeddings.block_size
        keys = embeddings.table_keys[self.feature]
        if embeddings.admission is not None:
            ids = ids.where(embeddings.admission.admits(ids, keys), self.rare)
        slot, signs = slots(
            ids,
            keys,
            size=len(weight),
            embedding_dim=dim,
            block_size=block_size,
            hash="mix",
            sign=embeddings.sign,
        )
        if block_size > dim:
            rows = weight[slot]
        else:
            # Whole blocks: the compiler then hashes once a block, not once a weight, and reads neighbours together.
            rows = weight.unfold(0, block_size, 1)[slot[..., ::block_size]].flatten(2)[..., :dim]
        rows = rows.float()
        if scale is not None:
            rows = rows * scale[slot // embeddings.array.group_size]
        return rows if signs is None else rows * signs


def write_aoti(model: DLRM, embeddings: nn.Module, file: Path) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch._inductor.utils import fresh_cache

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError("format aoti: needs a C++ compiler, and there is none: install g++ or set CXX") from None
    portable = Portable(model, embeddings).eval().requires_grad_(False)
    config = model.config
    inputs = torch.zeros(2, config.num_dense), torch.zeros(2, config.num_ids, dtype=torch.int64)
    batch = torch.export.Dim("batch")
    with quiet(), torch.no_grad(), fresh_cache():
        program = torch.export.export(portable, inputs, dynamic_shapes=({0: batch}, {0: batch}))
        # Loops of the compiler's own are serial: begun on threads they take longer for a batch of one. The products of
        # MLPs are torch's, with as many threads as there are where the file is run.
        options = {"compile_threads": 1, "cpp.threads": 1}
        aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)


@contextmanager
def quiet() -> Iterator[None]:
    """torch's compiler without its warnings and logs below errors, as nobody here can act on them."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
