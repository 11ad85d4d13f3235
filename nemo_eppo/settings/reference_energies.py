"""Every setting of the job that reads reference energies (conf/gpt_reference_energies.yaml)."""

from pydantic import Field, model_validator

from nemo_eppo.settings.ppo import AnsweringConfig, EnergyConfig


class ReferenceEnergiesConfig(AnsweringConfig):
    """The job that fills the energy cache of an actor.

    Model, data, generation, energy and seed are the actor's; layout and engine may differ. Answers are greedy
    whatever `generation` says of sampling.
    """

    energy: EnergyConfig
    """The actor's, with its `cache`."""
    batch_size: int = Field(256, ge=1)
    """Prompts that are answered before their energies are written, over all ranks."""

    @model_validator(mode="after")
    def _cache_is_shared(self) -> "ReferenceEnergiesConfig":
        if self.energy.cache is None:
            raise ValueError("energy.cache = null: expected the directory that energy.cache of the actor names")
        if self.energy.reference != "own_response":
            raise ValueError(
                f"energy.reference = '{self.energy.reference}' reads the policy's responses: expected 'own_response'"
            )
        return self
