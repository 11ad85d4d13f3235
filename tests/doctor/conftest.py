"""Fixtures of this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from jobs import models, reward_url

__all__ = ["models", "reward_url"]
