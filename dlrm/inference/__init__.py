"""Prediction with a trained DLRM: fast inference, throughput, MLPerf LoadGen, export."""

from dlrm.inference.predictor import Predictor

__all__ = ["Predictor"]
