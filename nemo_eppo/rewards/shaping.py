"""The settings of the reward's composition. The fields from `latent_penalty` to `divergence` are the built-in terms,
and their order here is the order in which they are applied."""

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

TERMS: dict[str, type[Term[Any]]] = {
    "latent_penalty": LatentPenalty,
    "length_penalty": LengthPenalty,
    "missing_eos": MissingEos,
    "repetition": Repetition,
    "response_format": ResponseFormat,
    "energy_penalty": EnergyPenalty,
    "clip": Clip,
    "divergence": DivergencePenalty,
}
"""The built-in terms in the order in which they are applied, each by the name of its settings in ShapingConfig."""


class ShapingConfig(Config):
    """How the scores of a response become its reward: combined, then changed by one term after the other."""

    combine: Combine = "single"
    """How the scores of several reward models become one: `single` insists on at most one model; `sum`; `mean`; `wco`,
    the lowest; `uwo`, the mean less uwo_lambda times the variance over models (arXiv 2310.02743). Reward functions are
    added to that."""
    uwo_lambda: float = Field(default=0.1, ge=0)
    """Weight of the variance; uwo only."""
    uwo_ddof: Literal[0, 1] = 0
    """0: variance of the population, 1: of a sample; uwo only."""
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
    """Terms of one's own."""

    @model_validator(mode="after")
    def _kl_in_one_place(self) -> "ShapingConfig":
        both = self.kl.coefficient > 0 and self.divergence.kind == "kl"
        if both and self.kl.placement != self.divergence.placement:
            raise ValueError(
                f"kl.placement = '{self.kl.placement}', divergence.placement = '{self.divergence.placement}': they put "
                "the KL divergence into the reward and into the loss at once; expected one place"
            )
        return self

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probs are needed."""
        return self.kl.coefficient > 0 or self.divergence.kind != "none" or self.kl.report

    def build_terms(self) -> dict[str, Term[Any]]:
        """All terms by name, the user's own among the built-in ones, in the order in which they are applied.

        Raises:
            ConfigError: a user's term cannot be loaded, has a name that is taken, or follows one that does not exist.
        """
        order: list[str] = []

        def place(name: str) -> None:
            order.append(name)
            for own in self.terms:
                if own.after == name:
                    place(own.name)

        names = ["proxy", *TERMS, "kl", "final", *(own.name for own in self.terms)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"shaping.terms: the name {twice[0]} is taken")
        for name in ("proxy", *TERMS):
            place(name)
        if lost := [own for own in self.terms if own.name not in order]:
            known = ", ".join(order)
            raise ConfigError(f"shaping.terms.{lost[0].name}.after = '{lost[0].after}': expected one of {known}")
        built = {name: kind(getattr(self, name)) for name, kind in TERMS.items()}
        built |= {own.name: load_term(own) for own in self.terms}
        return {name: built[name] for name in order[1:]}
