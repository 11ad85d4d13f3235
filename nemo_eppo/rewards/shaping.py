"""The settings from which the reward of a response is composed.

To add a built-in term, enter its class in _BUILT_IN and its settings in ShapingConfig: the field's name is the term's
name, and the order of the fields is the order in which the terms are applied."""

from typing import Any, Literal

from pydantic import Field, model_validator

from nemo_eppo.algorithms.ensembles import Combine
from nemo_eppo.config import Config, ConfigError
from nemo_eppo.rewards.clip import Clip, ClipConfig
from nemo_eppo.rewards.divergence import DivergenceConfig, DivergencePenalty
from nemo_eppo.rewards.energy_penalty import EnergyPenalty, EnergyPenaltyConfig
from nemo_eppo.rewards.kl import KLPenaltyConfig
from nemo_eppo.rewards.latent_penalty import LatentPenalty, LatentPenaltyConfig
from nemo_eppo.rewards.length_penalty import LengthPenalty, LengthPenaltyConfig
from nemo_eppo.rewards.missing_eos import MissingEos, MissingEosConfig
from nemo_eppo.rewards.repetition import Repetition, RepetitionConfig
from nemo_eppo.rewards.response_format import ResponseFormat, ResponseFormatConfig
from nemo_eppo.rewards.term import Term
from nemo_eppo.rewards.user_terms import UserTermConfig, load_term

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


class ShapingConfig(Config):
    """How the scores of a response become its reward: they are combined, then changed by one term after the other."""

    combine: Combine = "single"
    """How the scores of several reward models become one: `single` allows one model only; `sum`; `mean`; `wco` takes
    the lowest; `uwo` takes the mean less uwo_lambda times the variance over models (arXiv 2310.02743). The values of
    reward functions are added to the result."""
    uwo_lambda: float = Field(default=0.1, ge=0)
    """Weight of the variance over models; used by uwo only."""
    uwo_ddof: Literal[0, 1] = 0
    """0: the variance divides by the number of models, 1: by one less; used by uwo only."""
    latent_penalty: LatentPenaltyConfig = LatentPenaltyConfig()
    length_penalty: LengthPenaltyConfig = LengthPenaltyConfig()
    missing_eos: MissingEosConfig = MissingEosConfig()
    repetition: RepetitionConfig = RepetitionConfig()
    response_format: ResponseFormatConfig = ResponseFormatConfig()
    energy_penalty: EnergyPenaltyConfig = EnergyPenaltyConfig()
    clip: ClipConfig = ClipConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    kl: KLPenaltyConfig = KLPenaltyConfig()
    terms: tuple[UserTermConfig, ...] = ()
    """The user's own terms."""

    @model_validator(mode="after")
    def _kl_in_one_place(self) -> "ShapingConfig":
        both = self.kl.coefficient > 0 and self.divergence.kind == "kl"
        if both and self.kl.placement != self.divergence.placement:
            raise ValueError(
                f"kl.placement = '{self.kl.placement}', divergence.placement = '{self.divergence.placement}': they put "
                "the KL divergence into the reward and into the loss at once; expected one place"
            )
        return self

    def build_terms(self) -> dict[str, Term[Any]]:
        """All terms by name, the user's own among the built-in ones, in the order in which they are applied.

        Raises:
            ConfigError: a user's term cannot be loaded, has a name that is taken, or follows one that does not exist.
        """
        sections = {name: value for name, value in self if isinstance(value, Config) and name != "kl"}
        built = {name: _TERM_OF[type(value)](value) for name, value in sections.items()}
        order: list[str] = []

        def place(name: str) -> None:
            order.append(name)
            for own in self.terms:
                if own.after == name:
                    place(own.name)

        names = ["proxy", *built, "kl", "final", *(own.name for own in self.terms)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"shaping.terms: the name {twice[0]} is taken")
        for name in ("proxy", *built):
            place(name)
        if lost := [own for own in self.terms if own.name not in order]:
            known = ", ".join(order)
            raise ConfigError(f"shaping.terms.{lost[0].name}.after = '{lost[0].after}': expected one of {known}")
        built |= {own.name: load_term(own) for own in self.terms}
        return {name: built[name] for name in order[1:]}
