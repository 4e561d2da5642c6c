"""The version of robe-dlrm, in this one place: the wheel's metadata is read from here."""

__version__ = "0.11.0"
