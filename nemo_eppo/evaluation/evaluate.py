"""`nemo-eppo evaluate`: measures a policy's answers by proxy and gold rewards, energy loss, KL and length."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.evaluation.evaluation_page import write_page
from nemo_eppo.evaluation.evaluation_results import join_rows, results_of, write_results
from nemo_eppo.evaluation.generate import Generating
from nemo_eppo.evaluation.responses import Response, read_responses
from nemo_eppo.evaluation.reward_scoring import RewardScoring
from nemo_eppo.evaluation.rows_file import RowsFile, parts_folder
from nemo_eppo.evaluation.score import Scoring
from nemo_eppo.evaluation.source_scoring import SourceScoring, sample_of
from nemo_eppo.files import sha256
from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.collectives import on_rank0
from nemo_eppo.observability.recorder import read_rows
from nemo_eppo.settings.evaluation import EvaluateConfig, GenerateConfig, ModelRunConfig, ScoreConfig
from nemo_eppo.training.setup import Plan, plan

logger = logging.getLogger(__name__)


class Evaluation:
    """Measures responses, with one model in memory at a time, and writes results and report.

    Creating it checks all models, files, functions and the rows of an interrupted evaluation; `run` connects to servers
    before anything else.

    Raises:
        ConfigError: a model, file, function or layout does not work, the models have different tokenizers, or the
            output directory holds something else.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self.config, self._parts = config, parts_folder(config.output, "an evaluation")
        names = {f"proxy_{number}": name for number, name in enumerate(config.proxies, start=1)}
        names |= {"gold": config.gold} if config.gold is not None else {}
        options = {key: f"--{key.partition('_')[0]}" for key in names}
        for key, name in names.items():
            if not Path(name).exists() and ":" not in name:
                expected = "an existing checkpoint directory, grpc://HOST:PORT, or module:function"
                raise ConfigError(f"{options[key]} = {name!r}: expected {expected}")
        models = {
            key: RewardScoring(config.setup(Path(name)), options[key])
            for key, name in names.items()
            if Path(name).exists()
        }
        policy = self._policy(config.model, "--model") if config.model is not None else None
        reference = self._policy(config.reference, "--reference") if config.reference is not None else None
        owner = policy or next((model.plan for model in models.values()), None)
        if owner is None:
            raise ConfigError("--responses: expected --model or a reward checkpoint too, which has their tokenizer")
        self._owner: Plan = owner  # of the tokenizer that all models must have
        self._scorers = {
            key: models.get(key) or SourceScoring(name, options[key], config.certificates, owner.tokenizer)
            for key, name in names.items()
        }
        self._parts.mkdir(parents=True, exist_ok=True)
        self._generating, self._responses_identity = self._prepare_responses()
        for key, model in models.items():
            model.plan.check_fits(options[key], owner.tokenizer, f"{owner.setup.restore_from_path}", self._longest)
        if reference is not None:
            reference.check_fits("--reference", owner.tokenizer, f"{config.model}", self._longest)
        self._outputs = {key: self._rows_file(key) for key in self._scorers}

    def _rows_file(self, key: str) -> RowsFile:
        identity = self._scorers[key].identity | self._responses_identity
        return RowsFile(self._parts / f"{key}.jsonl", "evaluate", identity)

    def _policy(self, path: Path, option: str) -> Plan:
        return plan(self.config.setup(path), option, head="lm", ranks=self.config.parallel.model_parallel_size)

    def _prepare_responses(self) -> tuple[Generating | None, dict[str, Any]]:
        """Check prompts or responses; return the job that generates responses, if any, and what these depend on."""
        config = self.config
        if config.responses is not None:
            self._data = config.responses
            rows = self._read()
            self._longest = max(len(row.prompt) + len(row.response) for row in rows)
            return None, {"responses_sha256": sha256(config.responses), "chat_template": config.chat_template}
        self._data = self._parts / "responses.jsonl"
        shared = {name: getattr(config, name) for name in GenerateConfig.model_fields}
        generating = Generating(load_config(GenerateConfig, shared | {"output": self._data}))
        self._longest = generating.longest
        return generating, {"responses": generating.settings}

    def _read(self) -> list[Response]:
        model, rendered = self._owner.model, self.config.responses is not None and self.config.chat_template
        return read_responses(self._data, self._owner.tokenizer, model.vocab_size, model.max_sequence_length, rendered)

    def run(self) -> None:
        """Join the ranks, compute the missing rows, and write results and report; collective."""
        config = self.config
        runtime.initialize(config.parallel, seed=0)
        with ExitStack() as stack:
            sources = {key: scorer for key, scorer in self._scorers.items() if isinstance(scorer, SourceScoring)}
            for key, source in sources.items():
                source.connect(self._longest, stack)
                self._outputs[key] = self._rows_file(key)  # anew: its identity now has the server's model
            if self._generating is not None:
                self._generating.run()
                self._generating = None  # frees its model
            responses = self._read()
            for part, model in (("policy", config.model), ("reference", config.reference)):
                if model is not None:
                    logger.info("log-probs and energy losses of %s", model)
                    self._score(part, model)
            for key in list(self._scorers):
                self._scorers.pop(key).append(responses, self._outputs[key], key)  # pop frees each model after use
        on_rank0(lambda: self._write(responses))

    def _score(self, part: str, model: Path) -> None:
        shared = self.config.model_dump(include=set(ModelRunConfig.model_fields))
        shared["chat_template"] &= self.config.responses is not None  # generated ones are rendered already
        Scoring(ScoreConfig(model=model, data=self._data, output=self._parts / f"{part}.jsonl", **shared)).run()

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
