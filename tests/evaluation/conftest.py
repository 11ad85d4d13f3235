"""Fixtures of this folder."""

from jobs import models, reward_url, trained

__all__ = ["models", "reward_url", "trained"]
