"""`nemo-eppo latents`: compares a policy's responses with the SFT model's in the latent space of an InfoRM model."""

from pathlib import Path

import torch
from torch import Tensor

from nemo_eppo.config import ConfigError
from nemo_eppo.evaluation.latents_page import Latents, write_latents
from nemo_eppo.evaluation.responses import Response, read_responses, require_chat_template
from nemo_eppo.evaluation.reward_scoring import RewardScoring
from nemo_eppo.evaluation.rows_file import RowsFile, parts_folder
from nemo_eppo.evaluation.source_scoring import sample_of
from nemo_eppo.files import sha256
from nemo_eppo.monitor.indicators import NEIGHBOURS
from nemo_eppo.observability.recorder import read_rows
from nemo_eppo.settings.evaluation import LatentsConfig


class LatentReading:
    """Computes the latents of both files' responses, and writes the comparison.

    Creating it checks the model, every row, and the output of an interrupted command.

    Raises:
        ConfigError: the model has no latents, a row is bad (by file and line), there are too few SFT responses, or the
            output directory holds something else.
    """

    def __init__(self, config: LatentsConfig) -> None:
        self.config = config
        self._scoring = scoring = RewardScoring(config.setup(config.model), "--model")
        if not scoring.model.latent_size:
            kind = scoring.model.statistics["kind"]
            raise ConfigError(f"--model: {config.model} is of kind {kind!r} and has no latents; expected 'inform'")
        if config.chat_template:
            require_chat_template(scoring.plan.tokenizer, config.model)
        sources = {"sft": config.sft, "rlhf": config.rlhf}
        self._rows = {name: self._read(path) for name, path in sources.items()}
        if len(self._rows["sft"]) <= NEIGHBOURS:
            raise ConfigError(
                f"--sft: {config.sft} has {len(self._rows['sft'])} rows; expected at least {NEIGHBOURS + 1}"
            )
        parts = parts_folder(config.output, "latents")
        parts.mkdir(parents=True, exist_ok=True)
        self._files = {name: self._file(parts, name, path) for name, path in sources.items()}

    def run(self) -> None:
        """Compute the missing latents; collective."""
        for name, rows in self._rows.items():
            self._scoring.append(rows, self._files[name], name)

    def write(self) -> str:
        """Write the results, and return the main ones as text; after `run`, on one rank."""
        sft, rlhf = (self._latents(name) for name in self._rows)
        config = self.config
        sources = {"model": str(config.model), "sft": str(config.sft), "rlhf": str(config.rlhf)}
        return write_latents(config.output, sft, rlhf, sources, config.alpha, config.perplexity)

    def _read(self, path: Path) -> list[Response]:
        model, tokenizer = self._scoring.model, self._scoring.plan.tokenizer
        return read_responses(path, tokenizer, model.vocab_size, model.max_sequence_length, self.config.chat_template)

    def _file(self, parts: Path, name: str, data: Path) -> RowsFile:
        settings = self._scoring.identity | {"data_sha256": sha256(data), "chat_template": self.config.chat_template}
        return RowsFile(parts / f"{name}.jsonl", "latents", settings)

    def _latents(self, name: str) -> Latents:
        measured = read_rows(self._files[name].path)
        samples = [sample_of(row, self._scoring.plan.tokenizer) for row in self._rows[name]]
        texts = [(sample.prompt, sample.response) for sample in samples]
        latents: Tensor = torch.tensor([row["latents"] for row in measured], dtype=torch.float64)
        return Latents(latents, [row["reward"] for row in measured], [row.line for row in self._rows[name]], texts)
