"""Every setting of the job that reads reference energies (conf/gpt_reference_energies.yaml)."""

from typing import Any

from pydantic import Field, model_validator

from nemo_eppo.config import Config
from nemo_eppo.settings.generation import EngineConfig, SamplingParams
from nemo_eppo.settings.model import ModelConfig, ModelSetup
from nemo_eppo.settings.ppo import EnergyConfig, PPOConfig, PromptsConfig
from nemo_eppo.settings.run import ExpManagerConfig


class ReferenceEnergiesConfig(Config):
    """The job that fills the energy cache of an actor."""

    exp_manager: ExpManagerConfig = ExpManagerConfig()
    seed: int = Field(1234, ge=0, lt=2**31)
    """The actor's seed: prompts are answered in the order in which it meets them."""
    model: ModelSetup
    """The SFT model, from which the actor starts. The layout may be another than the actor's."""
    data: PromptsConfig
    """The actor's prompts; those for validation need no reference."""
    generation: SamplingParams
    """The actor's; the answers are greedy whatever it says of sampling."""
    engine: EngineConfig = EngineConfig()
    energy: EnergyConfig
    """The actor's, with its `cache`."""
    batch_size: int = Field(256, ge=1)
    """Prompts that are answered before their energies are written, over all ranks."""

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prompt and response together."""
        return self.data.max_prompt_length + self.generation.max_new_tokens

    def check_model(self, model: ModelConfig, ranks: int) -> None:
        """Raise ConfigError if the model's window or layers do not allow these settings."""
        self.data.check_window(self.generation.max_new_tokens, model.max_sequence_length)
        self.energy.layer_indices(model.num_layers)

    @model_validator(mode="after")
    def _cache_is_shared(self) -> "ReferenceEnergiesConfig":
        if self.energy.cache is None:
            raise ValueError("energy.cache = null: expected the directory that energy.cache of the actor names")
        if self.energy.reference != "own_response":
            raise ValueError(
                f"energy.reference = '{self.energy.reference}' reads the policy's responses: expected 'own_response'"
            )
        return self


def answer_settings(config: PPOConfig | ReferenceEnergiesConfig) -> dict[str, Any]:
    """Return the settings that the reference's own answers and their energies depend on, as plain containers."""
    return {
        "precision": config.model.precision,
        "generation": config.generation.as_greedy.model_dump(mode="json"),
        "energy": config.energy.model_dump(mode="json", include={"preset", "layers", "norm", "window", "max_tokens"}),
    }
