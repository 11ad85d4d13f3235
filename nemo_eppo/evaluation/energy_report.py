"""`nemo-eppo energy-report` on two models: reads the energy losses of all layers in one forward pass of each."""

from pathlib import Path

import numpy as np

from nemo_eppo.config import ConfigError
from nemo_eppo.evaluation.energies import Energies, read_data, read_labels, read_scores, with_labels
from nemo_eppo.evaluation.score import Scoring
from nemo_eppo.settings.evaluation import EnergyReportConfig, ModelRunConfig, ScoreConfig


class EnergyScoring:
    """Scores the responses of two models; the SFT model reads the RLHF model's, too, for the KL divergence.

    Creating it checks the models, every row and label, and the output of an interrupted run.

    Raises:
        ConfigError: a model, setting, row or label does not work, the models differ in layers or tokens, or the
            responses are not to the same prompts.
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
        """Score the missing rows; collective."""
        for job in self._jobs.values():
            job.run()

    def energies(self) -> Energies:
        """Return the scored energies, with their labels."""
        files = {name: job.config.output for name, job in self._jobs.items()}
        return with_labels(read_scores(**files, responses=self._responses), self.config.labels)

    def _check(self, before_data: Path) -> None:
        old, new = self._jobs["before"], self._jobs["after"]
        if len(new.rows) < 2:
            raise ConfigError(f"{self.config.data}: rows: 1; expected at least 2, or energies have no spread")
        if (layers := old.plan.model.num_layers) != new.plan.model.num_layers:
            raise ConfigError(
                f"--before has {layers} layers, --after has {new.plan.model.num_layers}: expected models of one kind"
            )
        for old_row, new_row in zip(old.rows, new.rows, strict=True):
            if not np.array_equal(old_row.prompt, new_row.prompt):
                raise ConfigError(
                    f"{before_data}:{old_row.line}: its prompt, as tokens of --before, is not that of "
                    f"{self.config.data}:{new_row.line} as tokens of --after; expected the same prompts in the same "
                    "order, and one tokenizer"
                )
        for old_row, new_row in zip((self._jobs.get("before_on_after") or old).rows, new.rows, strict=True):
            if not np.array_equal(old_row.response, new_row.response):
                raise ConfigError(
                    f"{self.config.data}:{new_row.line}: the two models' tokenizers read different tokens of its "
                    "response; expected one tokenizer"
                )
