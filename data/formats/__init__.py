"""Formats of click logs, a module each, and `open_source`, which recognizes them."""

from data.formats.opening import open_source, open_sources

__all__ = ["open_source", "open_sources"]
