"""The user's own term of the reward: a class by its dotted path, with its settings, at a named place in the order."""

from typing import Any

from pydantic import Field

from nemo_eppo.config import Config, ConfigError, load_config, load_named
from nemo_eppo.rewards.term import Term


class UserTermConfig(Config):
    """One term of one's own: a subclass of `nemo_eppo.rewards.term.Term`."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Name of what the term adds in ledger and metrics: reward/<name>."""
    term: str
    """The class, "module:Class"."""
    after: str = "energy_penalty"
    """Term that it follows: a built-in one, another of one's own, or `proxy` to be the first. Several that follow the
    same one are applied in the order of the list."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The settings that its `config_class` declares."""


def load_term(config: UserTermConfig) -> Term[Any]:
    """Import and configure a user's term.

    Raises:
        ConfigError: there is no such class, it is no term, or its settings are wrong; names the term.
    """
    where = f"shaping.terms.{config.name}"
    kind = load_named(f"{where}.term", config.term, "module:Class")
    if not (isinstance(kind, type) and issubclass(kind, Term)):
        raise ConfigError(f"{where}.term = {config.term!r} is no subclass of nemo_eppo.rewards.term.Term")
    try:
        return kind(load_config(kind.config_class, config.settings))
    except ConfigError as error:
        raise ConfigError(f"{where}.settings: {error}") from None
