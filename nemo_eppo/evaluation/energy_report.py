"""`nemo-eppo energy-report` on two models: reads the energy losses of all their layers in one pass of each."""

from pathlib import Path

import numpy as np

from nemo_eppo.config import ConfigError
from nemo_eppo.evaluation.energies import Energies, read_data, read_labels, read_scores, with_labels
from nemo_eppo.evaluation.score import Scoring
from nemo_eppo.settings.evaluation import EnergyReportConfig, ModelRunConfig, ScoreConfig


class EnergyScoring:
    """Scores the responses of two models; both read the RLHF model's, which gives the KL divergence between them.

    Creating it checks the models, every row and label, and the output of an interrupted run.

    Raises:
        ConfigError: a model, setting, row or label that does not work, models that differ in layers or tokens, or
            responses that are not to the same prompts.
    """

    def __init__(self, config: EnergyReportConfig) -> None:
        self.config = config
        self._responses = responses = read_data(config.data, config.before_data)
        if config.labels is not None:
            read_labels(config.labels, responses.index)
        shared = config.model_dump(include={"preset", "layer", *ModelRunConfig.model_fields})

        def job(name: str, model: Path, data: Path, fields: tuple[str, str]) -> Scoring:
            output = config.output / f"{name}.jsonl"
            settings = ScoreConfig(model=model, data=data, output=output, fields=fields, sweep=True, **shared)
            return Scoring(settings, f"--{name.partition('_')[0]}")

        before_data = config.before_data or config.data
        is_new = not config.output.exists()
        config.output.mkdir(parents=True, exist_ok=True)
        try:
            self._jobs = {
                "before": job("before", config.before, before_data, responses.before_fields),
                "after": job("after", config.after, config.data, responses.after_fields),
            }
            if not responses.same:
                on_after = job("before_on_after", config.before, config.data, responses.after_fields)
                self._jobs["before_on_after"] = on_after
            self._check(before_data)
        except ConfigError:
            if is_new:
                config.output.rmdir()
            raise

    def run(self) -> None:
        """Score what is missing; collective."""
        for job in self._jobs.values():
            job.run()

    def energies(self) -> Energies:
        """Return what was scored, with its labels."""
        found = {name: job.config.output for name, job in self._jobs.items()}
        return with_labels(read_scores(**found, responses=self._responses), self.config.labels)

    def _check(self, before_data: Path) -> None:
        old, new = self._jobs["before"], self._jobs["after"]
        if len(new.rows) < 2:
            raise ConfigError(f"{self.config.data}: rows: 1; expected at least 2, or energies have no spread")
        if (layers := old.plan.model.num_layers) != new.plan.model.num_layers:
            raise ConfigError(
                f"--before has {layers} layers, --after has {new.plan.model.num_layers}: expected models of one kind"
            )
        for one, other in zip(old.rows, new.rows, strict=True):
            if not np.array_equal(one.prompt, other.prompt):
                raise ConfigError(
                    f"{before_data}:{one.line}: its prompt, as tokens of --before, is not that of {self.config.data}:"
                    f"{other.line} as tokens of --after; expected the same prompts in the same order, and one tokenizer"
                )
        for one, other in zip((self._jobs.get("before_on_after") or old).rows, new.rows, strict=True):
            if not np.array_equal(one.response, other.response):
                raise ConfigError(
                    f"{self.config.data}:{other.line}: the two models' tokenizers read different tokens of its "
                    "response; expected one tokenizer"
                )
