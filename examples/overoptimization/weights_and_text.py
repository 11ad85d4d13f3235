"""Does the energy loss rise by the policy's text or by its weights? SFT model and policy read the texts of both."""

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

Energies = dict[str, dict[str, float]]  # mean energy loss of a run, by reader and text
METHODS = ("ppo", "eppo")
READERS = ("sft", "policy")
TEXTS = ("first", "last")  # validation of a run: responses of the SFT model, and of the policy


def compare_weights_and_text(task: Task, seeds: Mapping[str, Iterable[int]], workers: int) -> None:
    """Write weights_and_text.json: by method, seed, reader and text the mean energy loss over validation responses.

    Args:
        seeds: the seeds of each method that ran.
    """
    ran = [method for method in METHODS if method in seeds]
    runs = {method: {seed: task.policy(seed, method) for seed in seeds[method]} for method in ran}
    work = [Work(_scores(run), partial(_score, task, run)) for by_seed in runs.values() for run in by_seed.values()]
    run_all("weights or text", work, workers)
    energies = {
        method: {str(seed): _energies(run) for seed, run in by_seed.items()} for method, by_seed in runs.items()
    }
    write_json(task.directory / "weights_and_text.json", energies)
    for method, by_seed in energies.items():

        def change(reader: str, text: str, of_runs: Iterable[Energies] = by_seed.values()) -> float:
            return float(np.mean([energy[reader][text] - energy["sft"]["first"] for energy in of_runs]))

        print(
            f"{method}: the energy loss changes by {change('policy', 'last'):+.4f}, by the text alone "
            f"{change('sft', 'last'):+.4f}, by the weights alone {change('policy', 'first'):+.4f}",
            flush=True,
        )


def _score(task: Task, run: Path) -> None:
    files = list(recorded_steps(run / "validation").values())
    for reader, model in zip(READERS, (task.sft, run), strict=True):
        for text, data in zip(TEXTS, (files[0], files[-1]), strict=True):
            output = _scores(run) / f"{reader}_{text}.jsonl"
            Scoring(ScoreConfig(model=model / "checkpoints", data=data, output=output, batch_size=64)).run()


def _energies(run: Path) -> Energies:
    def mean(name: str) -> float:
        return float(np.mean([row["energy_loss"] for row in read_rows(_scores(run) / f"{name}.jsonl")]))

    return {reader: {text: mean(f"{reader}_{text}") for text in TEXTS} for reader in READERS}


def _scores(run: Path) -> Path:
    return run / "weights_and_text"  # inside the run's directory, to be removed with it
