"""Models as single files for other runtimes: ONNX, and libraries that torch compiles ahead of time."""

from dlrm.inference.export.files import FORMATS, export, load

__all__ = ["FORMATS", "export", "load"]
