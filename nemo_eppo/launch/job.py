"""A job of a launch file whose settings are valid, as its examination sees it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemo_eppo.entry.settings import read_settings
from nemo_eppo.launch.command import REPOSITORY, Address, overrides
from nemo_eppo.launch.gpus import on_gpus
from nemo_eppo.launch.launch_file import LaunchConfig
from nemo_eppo.settings.kinds import JobKind

if TYPE_CHECKING:
    from nemo_eppo.settings.model import ModelSetup
    from nemo_eppo.settings.training import OptimizerConfig
    from nemo_eppo.training.setup import Plan

DATA = ("data.train", "data.validation")
"""Settings that name the files of rows that a job reads."""


@dataclass(frozen=True)
class Job:
    """A job of the launch with valid settings."""

    name: str
    kind: JobKind
    ranks: int
    settings: Any
    plans: "Mapping[str, Plan]" = field(default_factory=dict)
    """Its models by the key of their settings; those that are wrong or were not examined are missing."""
    rewards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Statistics of the reward models among them, as a status reply has them; those that are unknown are missing."""

    @property
    def plan(self) -> "Plan | None":
        """The model that it trains or serves; None if that is wrong or was not examined."""
        return self.plans.get("model")

    @property
    def models(self) -> "dict[str, ModelSetup]":
        """All models that the job will run, by the key of their settings."""
        model = self.settings.model
        models: dict[str, ModelSetup] = {"model": model}
        if path := self.setting("reward_model"):
            models["reward_model"] = model.beside(path)
        if critic := self.setting("critic.colocated"):
            models["critic.colocated"] = model.beside(critic.restore_from_path, critic.lora)
        for key, source in (self.setting("reward_sources") or {}).items():
            if source.colocated is not None:
                models[f"{key}.colocated"] = model.beside(source.colocated.restore_from_path)
        return models

    @property
    def is_examined(self) -> bool:
        """Whether all its models are known."""
        return self.plans.keys() == self.models.keys()

    def is_language_model(self, key: str) -> bool:
        """Tell whether the model under this key gives logits; all others give numbers per token."""
        return key == "model" and self.kind.head == "lm"

    def optimizer(self, key: str) -> "OptimizerConfig | None":
        """Return the optimizer of the model under this key; None if that is not trained."""
        settings = {"model": "optimizer", "critic.colocated": "critic.colocated.optimizer"}
        return self.setting(settings[key]) if key in settings else None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the job works on; 0 if unknown."""
        chosen = self.setting("longest") or self.setting("data.max_sequence_length")
        return int(chosen or (self.plan.model.max_sequence_length if self.plan else 0))

    def setting(self, key: str) -> Any:
        """Return the value of a dotted key; None if this kind of job has no such setting."""
        value = self.settings
        for part in key.split("."):
            value = getattr(value, part, None)
        return value


def job_settings(launch: LaunchConfig, name: str, gpus: bool | None = None) -> Any:
    """Return the checked settings of a job before any server has an address; ConfigError as the job would report it.

    Args:
        gpus: whether it runs on GPUs; None if on this machine.
    """
    kind, nowhere = launch.jobs[name].kind, dict.fromkeys(launch.servers, Address("grpc://127.0.0.1:1"))
    given = overrides(launch, name, nowhere)
    gpus = on_gpus(launch, name) if gpus is None else gpus
    return read_settings(kind.schema, REPOSITORY / "conf", kind.config_name, given, gpus=gpus)
