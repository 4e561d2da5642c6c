"""The presets: models and training recipes of the published benchmarks."""

from dataclasses import dataclass, replace
from typing import Any

from dlrm.config import DLRMConfig, TrainingConfig


@dataclass(frozen=True)
class Preset:
    """A model and how it is trained."""

    model: DLRMConfig
    training: TrainingConfig


# Criteo Kaggle: the sizes of facebookresearch/dlrm's bench/dlrm_s_criteo_kaggle.sh, table rows after its preprocessing.
# The script trains with SGD (lr 0.1, batch 128). Adam reaches a higher AUC: see docs/accuracy.md.
_KAGGLE = Preset(
    DLRMConfig(
        embedding_dim=16,
        bottom_mlp=(512, 256, 64, 16),
        top_mlp=(512, 256, 1),
        table_rows=(
            1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
            27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
        ),
    ),
    TrainingConfig(batch_size=256, learning_rate=1e-3, optimizer="adam", epochs=3),
)  # fmt: skip

# Criteo Terabyte: MLPerf Training's DLRM (v0.7 to v2.1), at most 40 million rows a table. Training ends at the target
# AUC. MLPerf allows full tables 1 epoch to reach it; ROBE takes longer, and its authors allow 10.
_TERABYTE = Preset(
    DLRMConfig(
        embedding_dim=128,
        bottom_mlp=(512, 256, 128),
        top_mlp=(1024, 1024, 512, 256, 1),
        table_rows=(
            39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10,
            2208, 11938, 155, 4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36,
        ),
    ),
    TrainingConfig(
        batch_size=2048, learning_rate=1.0, optimizer="sgd", epochs=10, evaluations_per_epoch=20, target_auc=0.8025
    ),
)  # fmt: skip

# MLPerf Training's DLRM-DCNv2 (from v3.0 on): the same MLPs, a cross net instead of the dot products, several ids a
# feature. Their number comes from the data; --synthetic-hots makes MLPerf's numbers from data with one id a feature.
_DCNV2 = Preset(
    replace(
        _TERABYTE.model,
        interaction="cross",
        cross_layers=3,
        cross_rank=512,
        table_rows=(
            40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10,
            2209, 11938, 155, 4, 976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36,
        ),
    ),
    TrainingConfig(
        batch_size=65536,
        learning_rate=0.005,
        optimizer="adagrad",
        adagrad_eps=1e-8,
        epochs=10,
        evaluations_per_epoch=20,
        target_auc=0.80275,
    ),
)  # fmt: skip


def _large_batch(batch_size: int, learning_rate: float, warmup: int, decay_start: int, decay_steps: int) -> Preset:
    training = replace(
        _TERABYTE.training,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=warmup,
        decay_start=decay_start,
        decay_steps=decay_steps,
    )
    return replace(_TERABYTE, training=training)


PRESETS = {
    "kaggle": _KAGGLE,
    "terabyte": _TERABYTE,
    "terabyte-32768": _large_batch(32768, 18.0, 8000, 70000, 30000),  # MLPerf's recipes for large batches
    "terabyte-55296": _large_batch(55296, 24.0, 2750, 49315, 27772),
    "dcnv2": _DCNV2,
}


def preset(name: str, **changes: Any) -> Preset:
    """Return a preset with some fields of its model changed.

    Args:
        name: a key of PRESETS.
        **changes: fields of DLRMConfig, with their new values.

    Raises:
        ValueError: the preset is unknown, or the values do not fit together.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name}")
    return replace(PRESETS[name], model=replace(PRESETS[name].model, **changes))
