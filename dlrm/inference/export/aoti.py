"""A DLRM compiled ahead of time by torch, as a package that runs without this project."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from dlrm.embeddings import Tables, synthetic_ids
from dlrm.model import DLRM
from robe import RobeEmbeddingBagCollection
from robe.hashing import slots
from robe.sketches import SHARED_ID


class PortableDLRM(nn.Module):
    """A DLRM and the sigmoid in torch's own operators, so that the compiled package runs without robe.

    Args:
        model: a DLRM on the CPU.
        embeddings: what it reads in place of its own embeddings.
    """

    feature: Tensor
    pairs: Tensor
    shared_id: Tensor

    def __init__(self, model: DLRM, embeddings: nn.Module):
        super().__init__()
        self.config, self.embeddings = model.config, embeddings
        self.bottom, self.interaction, self.top = model.bottom, model.interaction, model.top
        self.register_buffer("feature", torch.tensor(model.config.feature_of_id))
        vectors = len(model.config.table_rows) + 1
        lower = torch.tril_indices(vectors, vectors, -1)
        # A buffer, not a constant: the C++ compiler refuses constant products that overflow, as those of a hash do.
        self.register_buffer("shared_id", torch.full((1, len(self.feature)), SHARED_ID))
        self.register_buffer("pairs", lower[0] * vectors + lower[1])

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """Predict a batch.

        Args:
            dense: (B, num_dense) float32.
            sparse: (B, H) int64 ids.

        Returns:
            (B,) probabilities.
        """
        x = self.bottom(dense)
        embeddings = self._embed(sparse)
        if self.config.interaction == "cross":
            x = self.interaction(x, embeddings)
        else:
            vectors = torch.cat([x.unsqueeze(1), embeddings], dim=1)
            dots = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
            x = torch.cat([x, dots[:, self.pairs]], dim=1)
        return self.top(x).squeeze(1).sigmoid()

    def _embed(self, sparse: Tensor) -> Tensor:
        """Return the embeddings (B, F, D) of ids (B, H)."""
        config = self.config
        if config.synthetic_hots:
            assert config.hots is not None
            sparse = synthetic_ids(sparse, config.hots, config.table_rows)
        if isinstance(self.embeddings, RobeEmbeddingBagCollection):
            vectors = self._robe(self.embeddings, sparse)
        else:
            assert isinstance(self.embeddings, Tables)
            rows = self.embeddings.rows(sparse, self.feature) + self.embeddings.first_rows[self.feature]
            vectors = self.embeddings.weight[rows]
        if config.hots is None:
            return vectors
        return torch.stack([x.sum(1) for x in vectors.split(list(config.hots), dim=1)], dim=1)

    def _robe(self, embeddings: RobeEmbeddingBagCollection, ids: Tensor) -> Tensor:
        """Return the embedding of each id: ids (B, H) to (B, H, D)."""
        weight, scale = embeddings.array.read()
        dim, block_size = embeddings.embedding_dim, embeddings.block_size
        keys = embeddings.table_keys[self.feature]
        if embeddings.admission is not None:
            ids = ids.where(embeddings.admission.admits(ids, keys), self.shared_id)
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
            vectors = weight[slot]
        else:
            # Whole blocks: the compiler then hashes once a block, not once a weight, and reads neighbours together.
            vectors = weight.unfold(0, block_size, 1)[slot[..., ::block_size]].flatten(2)[..., :dim]
        vectors = vectors.float()
        if scale is not None:
            vectors = vectors * scale[slot // embeddings.array.group_size]
        return vectors if signs is None else vectors * signs


def write_aoti(model: DLRM, embeddings: nn.Module, file: Path) -> None:
    """Compile a model into a package for this CPU.

    Args:
        model: a DLRM on the CPU.
        embeddings: what it reads in place of its own embeddings.
        file: where to write; ends with .pt2.

    Raises:
        ValueError: there is no C++ compiler.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch._inductor.utils import fresh_cache

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError("format aoti: needs a C++ compiler, and there is none: install g++ or set CXX") from None
    portable = PortableDLRM(model, embeddings).eval().requires_grad_(False)
    config = model.config
    inputs = torch.zeros(2, config.num_dense), torch.zeros(2, config.num_ids, dtype=torch.int64)
    batch = torch.export.Dim("batch")
    with _quiet(), torch.no_grad(), fresh_cache():
        program = torch.export.export(portable, inputs, dynamic_shapes=({0: batch}, {0: batch}))
        # The compiler's own loops are serial: starting threads would cost more than it gains for a batch of one. The
        # products of the MLPs are torch's, and use its threads where the file is run.
        options = {"compile_threads": 1, "cpp.threads": 1}
        aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)


def load_aoti(file: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Load a package into torch.

    Returns:
        A function of dense and sparse that returns probabilities.
    """
    from torch._inductor import aoti_load_package

    with _quiet():
        package = aoti_load_package(str(file))
    return lambda dense, sparse: package(dense, sparse)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings and logs of torch's compiler, but for errors: a user can't act on them."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
