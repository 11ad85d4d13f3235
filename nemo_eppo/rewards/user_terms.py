"""The user's own term of the reward: a class by its dotted path, with its settings, at a named place in the order."""

import importlib
from typing import Any, Literal

from pydantic import Field

from nemo_eppo.config import Config, ConfigError, load_config
from nemo_eppo.rewards.terms import Term

Place = Literal["proxy", "latent_penalty", "length_penalty", "missing_eos", "energy_penalty", "clip"]


class UserTermConfig(Config):
    """One term of one's own: a subclass of `nemo_eppo.rewards.terms.Term`."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """The ledger's and the metrics' name of what it adds: reward/<name>."""
    term: str
    """The class, "module:Class"."""
    after: Place = "energy_penalty"
    """The built-in step that it follows; several terms at one place apply in the order of this list."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What its `config_class` holds."""


def load_term(config: UserTermConfig) -> Term[Any]:
    """Import and configure a user's term.

    Raises:
        ConfigError: there is no such class, it is no term, or its settings are wrong; names the term.
    """
    where = f"ppo.terms.{config.name}"
    kind = load_named(f"{where}.term", config.term, "module:Class")
    if not (isinstance(kind, type) and issubclass(kind, Term)):
        raise ConfigError(f"{where}.term = {config.term!r} is no subclass of nemo_eppo.rewards.terms.Term")
    try:
        term: Term[Any] = kind(load_config(kind.config_class, config.settings))
    except ConfigError as error:
        raise ConfigError(f"{where}.settings: {error}") from None
    term.metric = f"reward/{config.name}"  # type: ignore[misc]  # one class may serve under several names
    return term


def load_named(key: str, path: str, form: str) -> Any:
    """The object behind "module:name"; ConfigError, naming the config key and the expected form, if there is none."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key} = {path!r}: expected '{form}' ({error})") from None
