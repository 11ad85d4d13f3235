"""Fixtures of this folder."""

from small_data import words, write_rows

__all__ = ["words", "write_rows"]
