"""`nemo-eppo score`: log-probability and energy loss of given responses under a model."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from pydantic import Field
from tqdm import tqdm

from nemo_eppo.algorithms.energy import energy_window, response_energy
from nemo_eppo.algorithms.masking import masked_sum, response_mask
from nemo_eppo.config import Config, ConfigError
from nemo_eppo.data.datasets import TokenIds, collate
from nemo_eppo.data.jsonl import json_line, read_objects, text_fields
from nemo_eppo.data.tokenizer import encode_in_blocks
from nemo_eppo.files import complete_lines, sha256, write_atomically
from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.energy import EnergyProbeConfig, Preset
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.models.checkpoint_files import model_identity
from nemo_eppo.models.hf_directory import HfDirectory
from nemo_eppo.models.layout import ParallelConfig
from nemo_eppo.models.model_config import Precision
from nemo_eppo.training.policy import next_token_targets
from nemo_eppo.training.setup import ModelSetup, build, plan

_TEXTS, _IDS = ("prompt", "response"), ("prompt_ids", "response_ids")
_WINDOW = 16  # micro-batches whose rows are sorted by length, and written, together


class ScoreConfig(Config):
    """Settings of `nemo-eppo score`."""

    model: Path
    """A policy: Hugging Face directory, checkpoint, or directory of checkpoints, of which the newest is read."""
    data: Path
    """File of rows {"prompt", "response"}, .jsonl or .jsonl.gz. `prompt_ids` and `response_ids`, as rollout files have
    them, are taken as they are; a response that is only there as text gets EOS if its row says that it finished."""
    output: Path
    """File for rows {"logprob", "num_tokens", "energy_loss"}, in the order of `data`."""
    preset: Preset = "paper"
    """The modules whose energy losses are read, see `EnergyProbeConfig`."""
    layer: int = -1
    """Decoder layer of these modules, counted from 0; negative numbers count from the end."""
    chat_template: bool = False
    """Render the prompt as the user's turn in the tokenizer's own chat template."""
    precision: Precision = "fp32"
    """Precision of weights and activations."""
    batch_size: int = Field(8, ge=1)
    """Rows per forward pass."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model is laid out over the job's ranks."""


class _Given(NamedTuple):
    """What a line of the data says."""

    line: int
    text: tuple[str, ...]
    """Prompt and response; empty where the row has nothing but token ids."""
    ids: tuple[list[int], ...]
    """Token ids of prompt and response; empty where the row has none."""
    finished: bool


class _Row(NamedTuple):
    prompt: TokenIds
    response: TokenIds


class Scoring:
    """Computes log-probability and energy loss of the responses in one file.

    Creating it checks the model, every row, and the output of an interrupted run. `logprob` is the sum over the
    response's tokens, at temperature 1 over the whole vocabulary. `energy_loss` is the mean energy loss at these
    tokens' positions (window `response`), each energy divided by its tensor's width as in training; presets with
    several modules add theirs up, as the penalty does.

    Raises:
        ConfigError: a model, layout or preset that does not work, a bad row by file and line, or an output that belongs
            to another model, data or settings.
    """

    def __init__(self, config: ScoreConfig) -> None:
        self.config = config
        setup = ModelSetup(
            restore_from_path=config.model,
            precision=config.precision,
            parallel=config.parallel,
            micro_batch_size=config.batch_size,
        )
        self._plan = plan(setup, "--model", head="lm", ranks=config.parallel.model_parallel_size)
        self._probe = EnergyProbeConfig(preset=config.preset, layers=(config.layer,))
        self._probe.layer_indices(self._plan.model.num_layers)
        if config.chat_template and self._plan.tokenizer.chat_template is None:
            raise ConfigError(f"--chat-template: the tokenizer of {config.model} has none")
        self._rows = self._read_rows()
        self._settings_file = config.output.with_name(config.output.name + ".settings.json")
        self._settings = {
            "model": _name(self._plan.source),
            "data_sha256": sha256(config.data),
            **config.model_dump(mode="json", include={"preset", "layer", "chat_template", "precision"}),
        }
        self._done, self._complete_bytes = self._read_output()

    def run(self) -> None:
        """Join the ranks and append the missing rows to the output; collective."""
        if self._done == len(self._rows):
            return
        runtime.initialize(self.config.parallel, seed=0)  # now all ranks have read the output, which may grow
        runner = build(self._plan, "lm", probe=self._probe)
        writes = dist.get_rank() == 0
        if writes:
            write_atomically(self._settings_file, json.dumps(self._settings, indent=1) + "\n")
            with self.config.output.open("ab") as file:
                file.truncate(self._complete_bytes)
        size = self.config.batch_size * _WINDOW
        hidden = None if writes else True  # None: tqdm itself hides the bar when stderr is not a terminal
        with tqdm(total=len(self._rows), initial=self._done, unit="row", disable=hidden) as bar:
            for start in range(self._done, len(self._rows), size):
                window = self._rows[start : start + size]
                lines = self._score(runner, window, start)
                if writes:
                    with self.config.output.open("a", encoding="utf-8") as file:
                        file.writelines(lines)
                bar.update(len(window))

    def _score(self, runner: ModelRunner, rows: Sequence[_Row], first: int) -> list[str]:
        """Make the output lines of `rows`, which begin at row `first` (from 0) of the data."""
        tokens, prompt_lengths, lengths = collate(rows, self._plan.tokenizer.pad_id)
        mask = response_mask(prompt_lengths, lengths, tokens.size(1))
        out, read = runner.infer(tokens, lengths, next_token_targets(tokens, mask), outputs=2, energies=True)
        assert read is not None
        logprobs = masked_sum(out[:, :-1, 0].double(), mask, dim=1)
        energies = response_energy(energy_window(read, "response").double(), mask).sum(1)
        lines = []
        for index, (row, logprob, energy) in enumerate(zip(rows, logprobs.tolist(), energies.tolist(), strict=True)):
            if not math.isfinite(logprob) or not math.isfinite(energy):
                raise ConfigError(f"row {first + index + 1}: log-probability {logprob}, energy loss {energy}")
            lines.append(json_line({"logprob": logprob, "num_tokens": len(row.response), "energy_loss": energy}))
        return lines

    def _read_rows(self) -> list[_Row]:
        path, longest = self.config.data, self._plan.model.max_sequence_length
        rows = []
        for given, encoded in encode_in_blocks(self._read_data(), self._encode):
            where = f"{path}:{given.line}"
            if isinstance(encoded, ConfigError):
                raise ConfigError(f"{where}: {encoded}")
            for field, ids in zip(_IDS if given.ids else _TEXTS, encoded, strict=True):
                if not ids:
                    raise ConfigError(f"{where}: field '{field}' has no tokens; expected at least one")
            if sum(map(len, encoded)) > longest:
                sizes = " + ".join(str(len(ids)) for ids in encoded)
                raise ConfigError(f"{where}: {sizes} tokens are more than the model's window of {longest}")
            rows.append(_Row(*(np.array(ids, dtype=np.int32) for ids in encoded)))
        if not rows:
            raise ConfigError(f"{path}: no rows")
        return rows

    def _read_data(self) -> Iterator[_Given]:
        for line, row in read_objects(self.config.data):
            where = f"{self.config.data}:{line}"
            has_ids = any(field in row for field in _IDS)
            ids = tuple(self._token_ids(row, field, where) for field in _IDS) if has_ids else ()
            text = () if has_ids and "response" not in row else text_fields(row, _TEXTS, where)
            finished = row.get("finished", row.get("finish_reason") == "stop")
            if not isinstance(finished, bool):
                raise ConfigError(f"{where}: field 'finished' = {finished!r:.80}: expected true or false")
            yield _Given(line, text, ids, finished)

    def _token_ids(self, row: dict[str, Any], field: str, where: str) -> list[int]:
        ids, size = row.get(field), self._plan.model.vocab_size
        if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < size for token in ids):
            raise ConfigError(f"{where}: field '{field}' = {ids!r:.80}: expected a list of token ids below {size}")
        if self.config.chat_template:
            raise ConfigError(f"{where}: field '{field}' cannot be rendered with --chat-template")
        return ids

    def _encode(self, block: list[_Given]) -> list[tuple[list[int], ...]]:
        """Return the token ids of every prompt and response."""
        tokenizer = self._plan.tokenizer
        texts = [given.text for given in block if not given.ids]
        prompts, responses = zip(*texts, strict=True) if texts else ((), ())
        if self.config.chat_template:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = tuple(tokenizer.render_chat(chat, add_generation_prompt=True) for chat in turns)
        encoded = iter(zip(tokenizer.encode(prompts), tokenizer.encode(responses), strict=True))
        found: list[tuple[list[int], ...]] = []
        for given in block:
            if given.ids:
                if given.text and (read := tokenizer.decode(given.ids[1])) != given.text[1]:
                    raise ConfigError(
                        f"field 'response_ids' are {read!r:.80} to this model's tokenizer, but field 'response' is "
                        f"{given.text[1]!r:.80}: expected token ids of the same tokenizer"
                    )
                found.append(given.ids)
            else:
                prompt, response = next(encoded)
                ends = given.finished and response[-1:] != [tokenizer.eos_id]
                found.append((prompt, [*response, tokenizer.eos_id] if ends else response))
        return found

    def _read_output(self) -> tuple[int, int]:
        """Count the complete rows, and their bytes, in the output of an interrupted run."""
        path = self.config.output
        if not path.exists():
            if not path.parent.is_dir():
                raise ConfigError(f"--output: {path.parent} is not a directory")
            return 0, 0
        if not self._settings_file.is_file():
            raise ConfigError(
                f"--output: {path} exists, but nemo-eppo score did not write it (there is no "
                f"{self._settings_file.name}); choose another or remove it"
            )
        settings = json.loads(self._settings_file.read_text())
        if different := [name for name, value in self._settings.items() if settings.get(name) != value]:
            raise ConfigError(
                f"--output: {path} holds scores of another {', '.join(different)} (see {self._settings_file.name}); "
                "choose another or remove it"
            )
        complete = complete_lines(path)
        return len(complete), sum(len(line) + 1 for line in complete)


def _name(source: Path | HfDirectory | None) -> str:
    """Name the model's directory for people, with the beginning of its identity."""
    path = source.path if isinstance(source, HfDirectory) else source
    assert path is not None
    return f"{path.resolve()} ({model_identity(path)[:12]})"
