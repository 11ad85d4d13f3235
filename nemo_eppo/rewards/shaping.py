"""The terms that a reward is composed of.

To add a built-in term, enter its class in _BUILT_IN and its settings in `ShapingConfig` (settings/shaping.py): the
field's name is the term's name, and the order of the fields is the order in which the terms are applied.
"""

from typing import Any

from nemo_eppo.config import Config, ConfigError
from nemo_eppo.rewards.clip import Clip
from nemo_eppo.rewards.divergence import DivergencePenalty
from nemo_eppo.rewards.energy_penalty import EnergyPenalty
from nemo_eppo.rewards.latent_penalty import LatentPenalty
from nemo_eppo.rewards.length_penalty import LengthPenalty
from nemo_eppo.rewards.missing_eos import MissingEos
from nemo_eppo.rewards.repetition import Repetition
from nemo_eppo.rewards.response_format import ResponseFormat
from nemo_eppo.rewards.term import Term
from nemo_eppo.rewards.user_terms import load_term
from nemo_eppo.settings.shaping import ShapingConfig

_BUILT_IN: tuple[type[Term[Any]], ...] = (
    LatentPenalty,
    LengthPenalty,
    MissingEos,
    Repetition,
    ResponseFormat,
    EnergyPenalty,
    Clip,
    DivergencePenalty,
)
_TERM_OF: dict[type[Config], type[Term[Any]]] = {term.config_class: term for term in _BUILT_IN}


def build_terms(config: ShapingConfig) -> dict[str, Term[Any]]:
    """All terms by name, the user's own among the built-in ones, in the order in which they are applied.

    Raises:
        ConfigError: a user's term cannot be loaded, has a name that is taken, or follows one that does not exist.
    """
    sections = {name: value for name, value in config if isinstance(value, Config) and name != "kl"}
    built = {name: _TERM_OF[type(value)](value) for name, value in sections.items()}
    order: list[str] = []

    def place(name: str) -> None:
        order.append(name)
        for term in config.terms:
            if term.after == name:
                place(term.name)

    names = ["proxy", *built, "kl", "final", *(term.name for term in config.terms)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"shaping.terms: the name {twice[0]} is taken")
    for name in ("proxy", *built):
        place(name)
    if unplaced := [term for term in config.terms if term.name not in order]:
        name, after, known = unplaced[0].name, unplaced[0].after, ", ".join(order)
        raise ConfigError(f"shaping.terms.{name}.after = '{after}': expected one of {known}")
    built |= {term.name: load_term(term) for term in config.terms}
    return {name: built[name] for name in order[1:]}
