"""`nemo-eppo score`: log-probability and energy loss of given responses under a model."""

import math
from collections.abc import Sequence
from pathlib import Path

from nemo_eppo.algorithms.energy import energy_window, response_energy
from nemo_eppo.algorithms.masking import masked_sum, response_mask
from nemo_eppo.config import ConfigError
from nemo_eppo.data.datasets import collate
from nemo_eppo.evaluation.model_rows import WINDOW, append_rows
from nemo_eppo.evaluation.responses import Response, read_responses, require_chat_template
from nemo_eppo.evaluation.rows_file import RowsFile
from nemo_eppo.files import json_line, sha256
from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.energy import EnergyProbes, readable_presets
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.models.checkpoint_files import model_identity
from nemo_eppo.models.hf_directory import HfDirectory
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.evaluation import ScoreConfig
from nemo_eppo.training.policy import next_token_targets
from nemo_eppo.training.setup import build, plan


class Scoring:
    """Computes log-probability and energy loss of the responses in one file.

    Creating it checks the model, every row, and the output of an interrupted run. `logprob` is the sum over the
    response's tokens, at temperature 1 over the whole vocabulary. `energy_loss` is the mean energy loss at these
    tokens' positions (window `response`), each energy divided by its tensor's width as in training; a preset with
    several modules is the sum of theirs, as in the penalty.

    Args:
        where: the option that names the model, for messages.

    Raises:
        ConfigError: the model, layout or preset does not work, a row is bad (by file and line), or the output belongs
            to another model, data or settings.
    """

    def __init__(self, config: ScoreConfig, where: str = "--model") -> None:
        self.config = config
        self.plan = plan(config.setup(config.model), where, head="lm", ranks=config.parallel.model_parallel_size)
        main = EnergyProbeConfig(preset=config.preset, layers=(config.layer,))
        main.layer_indices(self.plan.model.num_layers)  # ConfigError if there is no such layer
        all_layers = tuple(range(self.plan.model.num_layers))
        sweep = readable_presets() if config.sweep else ()
        self._probes = [main, *(EnergyProbeConfig(preset=preset, layers=all_layers) for preset in sweep)]
        if config.chat_template:
            require_chat_template(self.plan.tokenizer, config.model)
        model = self.plan.model
        self.rows = read_responses(
            config.data,
            self.plan.tokenizer,
            model.vocab_size,
            model.max_sequence_length,
            config.chat_template,
            config.fields,
        )
        """The responses, in this model's tokens."""
        settings = {
            "model": model_name(self.plan.source),
            "data_sha256": sha256(config.data),
            **config.model_dump(mode="json", include={"fields", "preset", "layer", "chat_template", "precision"}),
            "sweep": list(sweep),
        }
        self._output = RowsFile(config.output, "score", settings)

    def run(self) -> None:
        """Join the ranks and append the missing rows to the output; collective."""
        if self._output.done == len(self.rows):
            return
        runtime.initialize(self.config.parallel, seed=0)
        runner = build(self.plan, "lm")
        runner.probe = EnergyProbes(self._probes, runner.chunks, self.plan.model.num_layers)

        def lines(window: slice) -> list[str]:
            return self._score(runner, self.rows[window])

        append_rows(self._output, len(self.rows), self.config.batch_size * WINDOW, lines)

    def _score(self, runner: ModelRunner, rows: Sequence[Response]) -> list[str]:
        """Make the output lines of `rows`."""
        tokens, prompt_lengths, lengths = collate([row[:2] for row in rows], self.plan.tokenizer.pad_id)
        mask = response_mask(prompt_lengths, lengths, tokens.size(1))
        out, token_energies = runner.infer(tokens, lengths, next_token_targets(tokens, mask), outputs=2, energies=True)
        assert token_energies is not None
        logprobs = masked_sum(out[:, :-1, 0].double(), mask, dim=1)
        energies = response_energy(energy_window(token_energies, "response").double(), mask)
        parts = energies.split([probe.energies_per_token() for probe in self._probes], dim=1)
        per_probe = zip(self._probes, parts, strict=True)
        layers = [part.unflatten(1, (len(probe.layers), -1)).sum(2) for probe, part in per_probe]  # [N, layers] each
        lines = []
        for index, (row, logprob) in enumerate(zip(rows, logprobs.tolist(), strict=True)):
            energy = layers[0][index].item()
            if not math.isfinite(logprob) or not energies[index].isfinite().all():
                values = f"log-probability {logprob}, energy loss {energy}"
                raise ConfigError(f"{self.config.data}:{row.line}: {self.config.model} gives NaN or infinity: {values}")
            scores = {"logprob": logprob, "num_tokens": len(row.response), "energy_loss": energy}
            if self.config.sweep:
                swept = zip(self._probes[1:], layers[1:], strict=True)
                scores["energies"] = {probe.preset: part[index].tolist() for probe, part in swept}
            lines.append(json_line(scores))
        return lines


def model_name(source: Path | HfDirectory | None) -> str:
    """Return the path of the model's directory, with the first digits of its identity."""
    path = source.path if isinstance(source, HfDirectory) else source
    assert path is not None
    return f"{path.resolve()} ({model_identity(path)[:12]})"
