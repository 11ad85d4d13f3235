"""Fixtures of this folder."""

from jobs import models

__all__ = ["models"]
