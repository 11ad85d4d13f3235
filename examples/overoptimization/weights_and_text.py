"""Does the energy loss rise for what the policy writes, or for how it reads? Two models read the texts of both."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from pieces import Work, run_all
from trainings import Task

from nemo_eppo.evaluation.score import Scoring
from nemo_eppo.files import write_json
from nemo_eppo.observability.recorder import read_rows, recorded_steps
from nemo_eppo.settings.evaluation import ScoreConfig

Energies = dict[str, dict[str, float]]  # of a run: mean energy loss by reader and text
METHODS = ("ppo", "eppo")
READERS = ("sft", "policy")
TEXTS = ("first", "last")  # validation: the SFT model's responses, and the policy's


def compare_weights_and_text(task: Task, found: Mapping[str, Iterable[int]], workers: int) -> None:
    """Write weights_and_text.json: by method, seed, reader and text the mean energy loss over validation responses.

    Args:
        found: the seeds of each method that ran.
    """
    ran = [method for method in METHODS if method in found]
    runs = {method: {seed: task.policy(seed, method) for seed in found[method]} for method in ran}
    # in the run's directory, with which it is removed
    work = [Work(_below(run), partial(_read, task, run)) for of_method in runs.values() for run in of_method.values()]
    run_all("weights or text", work, workers)
    energies = {
        method: {str(seed): _energies(run) for seed, run in of_method.items()} for method, of_method in runs.items()
    }
    write_json(task.directory / "weights_and_text.json", energies)
    for method, of_seeds in energies.items():

        def change(reader: str, text: str, seeds: Iterable[Energies] = of_seeds.values()) -> float:
            return float(np.mean([of_seed[reader][text] - of_seed["sft"]["first"] for of_seed in seeds]))

        print(
            f"{method}: the energy loss changes by {change('policy', 'last'):+.4f}, by the text alone "
            f"{change('sft', 'last'):+.4f}, by the weights alone {change('policy', 'first'):+.4f}",
            flush=True,
        )


def _read(task: Task, run: Path) -> None:
    files = list(recorded_steps(run / "validation").values())
    for reader, model in zip(READERS, (task.sft, run), strict=True):
        for text, data in zip(TEXTS, (files[0], files[-1]), strict=True):
            output = _below(run) / f"{reader}_{text}.jsonl"
            Scoring(ScoreConfig(model=model / "checkpoints", data=data, output=output, batch_size=64)).run()


def _energies(run: Path) -> Energies:
    def mean(name: str) -> float:
        return float(np.mean([row["energy_loss"] for row in read_rows(_below(run) / f"{name}.jsonl")]))

    return {reader: {text: mean(f"{reader}_{text}") for text in TEXTS} for reader in READERS}


def _below(run: Path) -> Path:
    return run / "weights_and_text"
