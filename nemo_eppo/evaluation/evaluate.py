"""`nemo-eppo evaluate`: what a policy's answers are worth, by proxy and gold rewards, energy loss, KL and length."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from nemo_eppo.config import Config, ConfigError
from nemo_eppo.evaluation.evaluation_page import write_page
from nemo_eppo.evaluation.evaluation_results import join_rows, results_of, write_results
from nemo_eppo.evaluation.generate import GenerateConfig, Generating
from nemo_eppo.evaluation.responses import Response, read_responses
from nemo_eppo.evaluation.reward_scoring import RewardScoring
from nemo_eppo.evaluation.rows_file import RowsFile, parts_folder
from nemo_eppo.evaluation.score import ScoreConfig, Scoring
from nemo_eppo.evaluation.source_scoring import SourceScoring, sample_of
from nemo_eppo.files import sha256
from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.collectives import on_rank0
from nemo_eppo.observability.recorder import read_rows
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.model import ModelSetup, ParallelConfig, Precision
from nemo_eppo.training.setup import Plan, plan

logger = logging.getLogger(__name__)


class EvaluateConfig(Config):
    """Settings of `nemo-eppo evaluate`."""

    output: Path
    """Directory for the results, new or of an interrupted evaluation."""
    model: Path | None = None
    """The policy: it answers the prompts, and its log-probs and energy losses are read; null to do neither."""
    prompts: Path | None = None
    """File of prompts, as `GenerateConfig.prompts`; null if there are responses already."""
    responses: Path | None = None
    """File of responses, as `ScoreConfig.data`; null to generate them."""
    reference: Path | None = None
    """The model that the policy is compared with: KL divergence, and energy losses of the same responses."""
    proxies: tuple[str, ...] = ()
    """Proxy rewards: reward checkpoints, reward servers grpc://HOST:PORT, or functions module:function."""
    gold: str | None = None
    """The gold reward, given like a proxy reward; null for none."""
    certificates: Path | None = None
    """Folder of the servers' certificates; null if they have none."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses to each prompt that are generated."""
    sampling: SamplingParams
    """How they are sampled."""
    chat_template: bool = False
    """Render a prompt that is text as the user's turn in the tokenizer's own chat template."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the sampling and of bootstrap intervals."""
    precision: Precision = "fp32"
    """Precision of all models."""
    batch_size: int = Field(8, ge=1)
    """Responses decoded at once, and rows per forward pass."""
    parallel: ParallelConfig = ParallelConfig()
    """How each model is laid out over the job's ranks."""

    @model_validator(mode="after")
    def _can_be_done(self) -> "EvaluateConfig":
        if (self.prompts is None) == (self.responses is None):
            raise ValueError("expected exactly one of --prompts and --responses")
        for name in ("prompts", "reference"):
            if getattr(self, name) is not None and self.model is None:
                raise ValueError(f"--{name} needs --model")
        if not self.proxies and self.gold is None and self.model is None:
            raise ValueError("nothing to measure: expected --model, --proxy or --gold")
        return self


class Evaluation:
    """Measures responses, with one model in memory after the other, and writes results and report.

    Creating it checks all models, files, functions and the rows of an interrupted evaluation. Servers are asked first
    of all when it runs.

    Raises:
        ConfigError: a model, file, function or layout that does not work, models with different tokenizers, or an
            output that holds something else.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self.config, self._parts = config, parts_folder(config.output, "an evaluation")
        names = {f"proxy_{number}": name for number, name in enumerate(config.proxies, start=1)}
        names |= {"gold": config.gold} if config.gold is not None else {}
        options = {key: f"--{key.partition('_')[0]}" for key in names}
        models = {key: self._reward_model(name, options[key]) for key, name in names.items() if Path(name).exists()}
        policy = self._policy(config.model, "--model") if config.model is not None else None
        reference = self._policy(config.reference, "--reference") if config.reference is not None else None
        owner = policy or next((model.plan for model in models.values()), None)
        if owner is None:
            raise ConfigError("--responses: expected --model or a reward checkpoint too, which has their tokenizer")
        self._owner: Plan = owner
        scorers = {
            key: models.get(key) or SourceScoring(name, options[key], config.certificates, owner.tokenizer)
            for key, name in names.items()
        }
        self._parts.mkdir(parents=True, exist_ok=True)
        self._generating, depends_on = self._answers()
        for key, model in models.items():
            model.plan.check_fits(options[key], owner.tokenizer, f"{owner.setup.restore_from_path}", self._longest)
        if reference is not None:
            reference.check_fits("--reference", owner.tokenizer, f"{config.model}", self._longest)
        self._scorers = [
            (key, scorer, RowsFile(self._parts / f"{key}.jsonl", "evaluate", scorer.identity | depends_on))
            for key, scorer in scorers.items()
        ]

    def _reward_model(self, name: str, option: str) -> RewardScoring:
        config = self.config
        return RewardScoring(
            Path(name), option, precision=config.precision, batch_size=config.batch_size, parallel=config.parallel
        )

    def _policy(self, path: Path, option: str) -> Plan:
        parallel = self.config.parallel
        setup = ModelSetup(restore_from_path=path, precision=self.config.precision, parallel=parallel)
        return plan(setup, option, head="lm", ranks=parallel.model_parallel_size)

    def _answers(self) -> tuple[Generating | None, dict[str, Any]]:
        """Check prompts or responses; return what generates, and what the responses depend on."""
        config = self.config
        if config.responses is not None:
            self._file = config.responses
            rows = self._read()
            self._total, self._longest = len(rows), max(len(row.prompt) + len(row.response) for row in rows)
            return None, {"responses_sha256": sha256(config.responses), "chat_template": config.chat_template}
        self._file = self._parts / "responses.jsonl"
        shared = {name: getattr(config, name) for name in GenerateConfig.model_fields}
        generating = Generating(GenerateConfig(**shared | {"output": self._file}))
        self._total, self._longest = generating.total, generating.longest
        return generating, {"responses": generating.settings}

    def _read(self) -> list[Response]:
        model, rendered = self._owner.model, self.config.responses is not None and self.config.chat_template
        return read_responses(self._file, self._owner.tokenizer, model.vocab_size, model.max_sequence_length, rendered)

    def run(self) -> None:
        """Join the ranks, compute what is missing, and write results and report; collective."""
        config = self.config
        runtime.initialize(config.parallel, seed=0)
        with ExitStack() as stack:
            for _, scorer, output in self._scorers:
                if isinstance(scorer, SourceScoring) and output.done < self._total:
                    scorer.connect(self._longest, stack)
            if self._generating is not None:
                self._generating.run()
                self._generating = None  # and its model with it
            responses = self._read()
            for part, model in (("policy", config.model), ("reference", config.reference)):
                if model is not None:
                    logger.info("log-probs and energy losses of %s", model)
                    self._score(part, model)
            while self._scorers:
                key, scorer, output = self._scorers.pop(0)  # the one before, and its model, are let go
                scorer.append(responses, output, key)
        on_rank0(lambda: self._write(responses))

    def _score(self, part: str, model: Path) -> None:
        config = self.config
        settings = ScoreConfig(
            model=model,
            data=self._file,
            output=self._parts / f"{part}.jsonl",
            chat_template=config.responses is not None and config.chat_template,
            precision=config.precision,
            batch_size=config.batch_size,
            parallel=config.parallel,
        )
        Scoring(settings).run()

    def _write(self, responses: list[Response]) -> None:
        config = self.config
        keys = [f"proxy_{number}" for number in range(1, len(config.proxies) + 1)]
        optional = {"gold": config.gold, "policy": config.model, "reference": config.reference}
        keys += [key for key, source in optional.items() if source is not None]
        parts = {key: read_rows(self._parts / f"{key}.jsonl") for key in keys}
        samples = [sample_of(response, self._owner.tokenizer) for response in responses]
        only_models = all(Path(name).exists() or name.startswith("grpc://") for name in config.proxies)
        results = results_of(join_rows(responses, samples, parts), only_models, config.seed)
        settings = config.model_dump(mode="json", exclude={"output", "certificates"})
        write_results(config.output, results, settings)
        write_page(config.output, results, settings)
