"""`nemo-eppo generate`: responses of a model to a file of prompts, and the generator that other commands use."""

from collections.abc import Sequence
from typing import Any

import torch

from nemo_eppo.algorithms.sampling import counter_hash
from nemo_eppo.config import ConfigError
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.evaluation.model_rows import WINDOW, append_rows
from nemo_eppo.evaluation.prompts import read_prompts
from nemo_eppo.evaluation.responses import require_chat_template
from nemo_eppo.evaluation.rows_file import RowsFile
from nemo_eppo.evaluation.score import model_name
from nemo_eppo.files import json_line, sha256
from nemo_eppo.generation.engine import EngineLimits
from nemo_eppo.generation.megatron_engine import MegatronEngine
from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.collectives import over_replicas
from nemo_eppo.rollout.batch import Completion, FinishReason
from nemo_eppo.settings.evaluation import GenerateConfig, GeneratorConfig
from nemo_eppo.training.energy_cache import prompt_digest
from nemo_eppo.training.setup import build, plan


class Generator:
    """Answers prompts with a model's current weights, decoded by Megatron with a KV cache.

    Creating it checks files, settings and layout; `build` loads the model.

    Raises:
        ConfigError: the model, layout or sampling does not work.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        self.config = config
        self._plan = plan(config.setup(config.model), "--model", head="lm", ranks=config.parallel.model_parallel_size)
        self.model, self.name = self._plan.model, model_name(self._plan.source)
        self.tokenizer: Tokenizer = self._plan.tokenizer
        self.longest_prompt = self.model.max_sequence_length - config.sampling.max_new_tokens
        """Largest number of tokens of a prompt."""
        if self.longest_prompt < 1:
            raise ConfigError(
                f"--max-new-tokens: {config.sampling.max_new_tokens} leave no room for a prompt in the model's window "
                f"of {self.model.max_sequence_length} tokens"
            )

    def build(self) -> None:
        """Join the ranks and load the model; collective."""
        runtime.initialize(self.config.parallel, seed=0)
        runner = build(self._plan, "lm")
        tokenizer, longest = self.tokenizer, self.model.max_sequence_length
        limits = EngineLimits(tokenizer.eos_id, tokenizer.pad_id, self.config.batch_size, longest, tokenizer)
        self._engine = MegatronEngine(runner.chunks, limits)

    def answer(self, prompts: Sequence[list[int]], samples: Sequence[int]) -> list[Completion]:
        """Return one completion for each prompt; collective.

        It depends on the weights, the settings, the prompt's tokens and its number in `samples`, and on nothing else:
        not on the other prompts, their order, the batch size or the layout.
        """
        digests = [int.from_bytes(prompt_digest(prompt)[:8], "little", signed=True) for prompt in prompts]
        streams = counter_hash(torch.tensor(self.config.seed), torch.tensor(digests))
        seeds = counter_hash(streams, torch.tensor(samples)).tolist()

        def replica(mine: list[int]) -> list[Completion]:
            return self._engine.generate([prompts[i] for i in mine], self.config.sampling, [seeds[i] for i in mine])

        return over_replicas([len(prompt) for prompt in prompts], replica)


class Generating:
    """Writes the responses of a model to a file of prompts.

    Creating it checks everything, the output of an interrupted run included. Rows are {"index", "sample", "prompt",
    "response", "prompt_ids", "response_ids", "finish_reason", "finished"}: `index` counts prompts, `sample` the
    responses to one prompt, both from 0. "fields" has the other fields of the prompt's row.

    Raises:
        ConfigError: the model, layout or sampling does not work, a row is bad (by file and line), or the output belongs
            to another model, data or settings.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self.config, self.generator = config, Generator(config)
        tokenizer = self.generator.tokenizer
        if config.chat_template:
            require_chat_template(tokenizer, config.model)
        vocab_size, longest = self.generator.model.vocab_size, self.generator.longest_prompt
        self.prompts = read_prompts(config.prompts, tokenizer, vocab_size, longest, config.chat_template)
        self.longest = max(len(prompt.token_ids) for prompt in self.prompts) + config.sampling.max_new_tokens
        """Most tokens of a prompt and its response together."""
        self.total = len(self.prompts) * config.samples_per_prompt
        """Number of responses."""
        self.settings = {
            "model": self.generator.name,
            "prompts_sha256": sha256(config.prompts),
            **config.model_dump(
                mode="json", include={"samples_per_prompt", "sampling", "seed", "chat_template", "precision"}
            ),
        }
        """Settings that the responses depend on."""
        self._output = RowsFile(config.output, "generate", self.settings)

    def run(self) -> None:
        """Join the ranks and append the missing rows to the output; collective."""
        if self._output.done == self.total:
            return
        self.generator.build()
        append_rows(self._output, self.total, self.config.batch_size * WINDOW, self._lines, "responses")

    def _lines(self, window: slice) -> list[str]:
        numbers = [divmod(row, self.config.samples_per_prompt) for row in range(window.start, window.stop)]
        prompts = [self.prompts[index] for index, _ in numbers]
        completions = self.generator.answer([prompt.token_ids for prompt in prompts], [sample for _, sample in numbers])
        texts = self.generator.tokenizer.decode_batch([completion.token_ids for completion in completions])
        lines = []
        for (index, sample), prompt, completion, text in zip(numbers, prompts, completions, texts, strict=True):
            row: dict[str, Any] = {
                "index": index,
                "sample": sample,
                "prompt": prompt.text,
                "response": text,
                "prompt_ids": prompt.token_ids,
                "response_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
                "finished": completion.finish_reason is FinishReason.STOP,
            }
            lines.append(json_line(row | ({"fields": prompt.fields} if prompt.fields else {})))
        return lines
