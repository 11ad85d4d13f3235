"""The user's own terms of the reward: a class named by its path, with its settings and its place in the order."""

import dataclasses
from typing import Any

from nemo_eppo.config import ConfigError, load_config, load_subclass
from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term
from nemo_eppo.settings.shaping import UserTermConfig


def load_term(config: UserTermConfig) -> Term[Any]:
    """Import and configure a user's term.

    Raises:
        ConfigError: there is no such class, it is no term, or its settings are wrong; the message names it.
    """
    where = f"shaping.terms.{config.name}"
    kind = load_subclass(f"{where}.term", config.term, Term)
    optional = [field.name for field in dataclasses.fields(RewardInputs) if field.default is None]
    if unknown := [name for name in kind.needs if name not in optional]:
        raise ConfigError(f"{where}.term = {config.term!r} needs {unknown[0]}: expected of {', '.join(optional)}")
    try:
        return kind(load_config(kind.config_class, config.settings))
    except ConfigError as error:
        raise ConfigError(f"{where}.settings: {error}") from None
