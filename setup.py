"""Packaging. `pip install .` brings torch and numpy and gives `import robe`; the rest of the project is in extras."""

from pathlib import Path

from setuptools import setup

setup(
    name="robe-dlrm",
    version="0.1.0",
    description="Embedding tables of any size on one small shared array (ROBE), and a DLRM built on it",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=["robe", "dlrm"],
    install_requires=["torch>=2.10", "numpy>=1.26"],
    extras_require={
        "train": ["polars>=1.0", "scikit-learn>=1.4", "tqdm>=4.60", "safetensors>=0.4", "matplotlib>=3.8"],
        "dev": ["pytest>=8", "pytest-xdist>=3", "hypothesis>=6", "ruff>=0.8", "mypy>=1.10"],
    },
)
