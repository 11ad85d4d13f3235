"""The over-optimisation bench: which defence keeps the gold reward while a policy exploits a flawed proxy.

1. Data of a task whose true ("gold") reward is a formula: the noun task, or descriptions of Debian's packages. Reward
   models learn from labels that are biased (hedges) or few (scarce); their flaw is learnt, never programmed.
2. For every seed its own labels and reward models: Bradley-Terry models, WARM, ODIN, InfoRM.
3. A run of plain PPO decides whether a seed counts (protocol.md). Then every method of methods.yaml, with critic and
   reward models in the policy's own process; its coefficient was chosen on other seeds.
4. results.json, report.html, curves.png in the output directory; in alarms/, which alarms would have helped.
5. The SFT model and the policies of plain PPO and EPPO read each other's responses: weights_and_text.json shows whether
   the energy loss rises by the text or by the weights.

The same command resumes after an interruption, without repeating finished runs. A policy whose method or chosen value
has changed since is named, and has to be removed first.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would be missing in forked processes
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402
import yaml  # noqa: E402
from comparison import Acceptance, Curves, read_curves  # noqa: E402
from pieces import Work, run_all  # noqa: E402
from results_page import write_results  # noqa: E402
from trainings import LABELS, SINGLE, SIZES, TEXTS, Effort, Task  # noqa: E402
from weights_and_text import compare_weights_and_text  # noqa: E402

from nemo_eppo.config import ConfigError  # noqa: E402
from nemo_eppo.evaluation.alarms import Alarms  # noqa: E402
from nemo_eppo.evaluation.alarms_page import verdict, write_alarms  # noqa: E402
from nemo_eppo.files import write_atomically  # noqa: E402
from nemo_eppo.settings.evaluation import DetectionConfig  # noqa: E402

TUNING_SEEDS = (1001, 1002)
MOST_CANDIDATES = 3  # reward-model seeds tried, for each one wanted
ALWAYS = "ppo"
SMOKED = ("eppo", "inform", "erm_mean", "grpo", "control_frozen")
"""Methods of --smoke, beside plain PPO; they share little code."""
DETECTED = ("eppo", "inform", "erm_mean")
"""Methods whose runs have signs that plain PPO's lack: the energy loss's rise, latents, variance of reward models."""
ACCEPTANCE, ACCEPTANCE_SEED = "acceptance", 10_000  # name and seed offset of the run by which a seed is accepted


@dataclass(frozen=True)
class Method:
    """An entry of methods.yaml."""

    name: str
    entry: Mapping[str, Any]

    @property
    def tuned(self) -> str | None:
        """The setting whose value is chosen."""
        return next(iter(self.entry.get("tune", ())), None)

    @property
    def values(self) -> list[float]:
        return list(self.entry["tune"][self.tuned]) if self.tuned else []

    @property
    def rewards(self) -> str:
        """Kind of reward models that give the reward."""
        return str(self.entry.get("rewards", SINGLE))

    def settings(self, chosen: Mapping[str, float], value: float | None = None) -> dict[str, Any]:
        """Return the settings: "$NAME" is the value chosen for that method; the tuned one is `value`, or chosen."""
        values = {key: chosen[v[1:]] if str(v).startswith("$") else v for key, v in self._settings.items()}
        if self.tuned:
            values[self.tuned] = chosen[self.name] if value is None else value
        return values

    @property
    def _settings(self) -> dict[str, Any]:
        return dict(self.entry.get("settings", {}))

    @property
    def after(self) -> set[str]:
        """Methods whose chosen values this one uses."""
        return {str(value)[1:] for value in self._settings.values() if str(value).startswith("$")}


class Bench:
    """All runs on one task."""

    def __init__(self, task: Task, methods: list[Method], workers: int, acceptance: Acceptance | None) -> None:
        self.task, self.methods, self.workers, self.acceptance = task, methods, workers, acceptance
        self.tuning: dict[str, Any] = {}
        """For each method with several values: the chosen one, and the last gold reward by value and seed."""
        self.candidates: dict[int, Any] = {}
        """For each tried seed: correlation of proxy and gold reward, and the reason if it does not count."""

    def run(self, seeds: int) -> dict[str, dict[int, Curves]]:
        """Return the curves of every method by seed, for the seeds that count."""
        task = self.task
        run_all("SFT", [Work(task.sft, task.train_sft)], 1)
        chosen = self._choose()
        counted = self._accepted(seeds, range(1, 1 + MOST_CANDIDATES * seeds))
        self._train_rewards(counted, {method.rewards for method in self.methods})
        work = [self._policy(method, seed, chosen) for seed in counted for method in self.methods]
        run_all("policies", work, self.workers)
        return {
            method.name: {seed: read_curves(task.policy(seed, method.name)) for seed in counted}
            for method in self.methods
        }

    def _choose(self) -> dict[str, float]:
        """Choose a value for every method that has several: the highest gold reward at the last step."""
        tuned = [method for method in self.methods if method.tuned]
        undecided = [method for method in tuned if len(method.values) > 1]
        if undecided:
            self._train_rewards(TUNING_SEEDS, {method.rewards for method in undecided})
        trials = [(method, value, seed) for method in undecided for value in method.values for seed in TUNING_SEEDS]
        run_all("tuning", [self._policy(method, seed, {}, value) for method, value, seed in trials], self.workers)

        chosen = {method.name: method.values[0] for method in tuned}
        for method in undecided:
            gold = {
                value: {
                    seed: float(read_curves(self.task.policy(seed, f"{method.name}={value:g}")).gold[-1])
                    for seed in TUNING_SEEDS
                }
                for value in method.values
            }
            chosen[method.name] = max(gold, key=lambda value: sum(gold[value].values()))
            self.tuning[method.name] = {"chosen": chosen[method.name], "gold": gold}
        return chosen

    def _accepted(self, wanted: int, candidates: range) -> list[int]:
        """Train reward models of further seeds until the wanted number counts; return the seeds that count.

        The runs of plain PPO that decide this are not among the compared ones: their falls were selected.
        """
        if self.acceptance is None:
            self._train_rewards(candidates[:wanted], set())
            return list(candidates[:wanted])
        counted: list[int] = []
        untried = list(candidates)
        while (missing := wanted - len(counted)) > 0:
            batch, untried = untried[:missing], untried[missing:]
            if not batch:
                sys.exit(f"only seeds {counted} count, {wanted} are wanted: see protocol.md")
            self._train_rewards(batch, set())
            plain = {seed: Method(ACCEPTANCE, {"settings": {"seed": ACCEPTANCE_SEED + seed}}) for seed in batch}
            run_all("plain PPO", [self._policy(method, seed, {}) for seed, method in plain.items()], self.workers)
            for seed in batch:
                curves = read_curves(self.task.policy(seed, ACCEPTANCE))
                refusal = self.acceptance.refusal(curves)
                self.candidates[seed] = {"correlation": curves.correlation, "refusal": refusal}
                print(f"seed {seed}: " + (refusal or "counts"), flush=True)
                counted += [] if refusal else [seed]
        return counted

    def _train_rewards(self, seeds: Any, kinds: set[str]) -> None:
        """Train these kinds, and the single reward model of each seed, from which critic and ensemble start."""
        task = self.task
        labels = [Work(task.labels_of(seed), partial(task.write_labels, seed)) for seed in seeds]
        run_all("labels", labels, self.workers)
        work = [
            Work(task.rewards(seed, kind), partial(task.train_rewards, seed, kind))
            for seed in seeds
            for kind in sorted(kinds | {SINGLE})
        ]
        run_all("reward models", work, self.workers)

    def _policy(self, method: Method, seed: int, chosen: Mapping[str, float], value: float | None = None) -> Work:
        variant = method.name if value is None else f"{method.name}={value:g}"
        settings = method.settings(chosen, value)
        train = partial(self.task.train_policy, seed, variant, method.entry, settings)
        entry = {key: value for key, value in method.entry.items() if key != "tune"}  # a new value leaves others as is
        return Work(self.task.policy(seed, variant), train, {**entry, "settings": settings})


def read_methods(names: list[str], values: Mapping[str, float]) -> Iterator[Method]:
    """Return the methods of methods.yaml with these names, and those that they need; all if there are no names.

    A method in `values` has this single value to choose from.
    """
    table = {name: Method(name, entry) for name, entry in yaml.safe_load((HERE / "methods.yaml").read_text()).items()}
    for name, value in values.items():
        if name not in table or not table[name].tuned:
            tuned = ", ".join(other for other, method in table.items() if method.tuned)
            sys.exit(f"--values {name}={value:g}: expected of {tuned}")
        table[name] = Method(name, {**table[name].entry, "tune": {table[name].tuned: [value]}})
    if unknown := [name for name in names if name not in table]:
        sys.exit(f"--methods {unknown[0]}: expected of {', '.join(table)}")
    wanted = {ALWAYS, "eppo", *names} if names else set(table)
    wanted |= {other for name in wanted for other in table[name].after}
    return (method for name, method in table.items() if name in wanted)


def main() -> None:
    options = parse()
    started = time.monotonic()
    default = list(SMOKED) if options.smoke else []
    methods = list(read_methods(options.methods.split(",") if options.methods else default, options.values))
    size, effort = SIZES[options.size], Effort(steps=options.steps)
    acceptance: Acceptance | None = Acceptance()
    if options.smoke:
        size = replace(size, reward_steps=5)
        effort = Effort(sft_steps=20, steps=2, validate_every=1, validation_prompts=16)
        acceptance = None
        methods = [Method(method.name, _one_value(method.entry)) for method in methods]
    choices = {"text": options.text, "size": options.size, "labels": options.labels}
    _claim(options.output, {**choices, **asdict(size), **asdict(effort)})
    torch.set_num_threads(1)
    task = Task(options.output.absolute(), TEXTS[options.text], size, LABELS[options.labels], effort)
    bench = Bench(task, methods, options.workers, acceptance)
    curves = bench.run(1 if options.smoke else options.seeds)
    about = {
        **choices,
        "steps": effort.steps,
        "seconds": round(time.monotonic() - started),
        "command": " ".join(sys.argv),
    }
    print(write_results(task.directory, curves, about, {"tuning": bench.tuning, "candidates": bench.candidates}))
    plain = ALWAYS if options.smoke else ACCEPTANCE  # acceptance runs of refused seeds, too: gold may not have fallen
    detect(task, curves, plain)
    compare_weights_and_text(task, curves, options.workers)


def detect(task: Task, seeds: Mapping[str, Iterable[int]], plain: str) -> None:
    """Write into alarms/<method>/ which alarms would have helped, in the runs of plain PPO and in those of DETECTED.

    Args:
        seeds: the seeds of each method that ran.
        plain: directory name of plain PPO's runs.
    """
    runs = {ALWAYS: sorted(task.directory.glob(f"seed_*/policies/{plain}"))}
    runs |= {method: [task.policy(seed, method) for seed in seeds[method]] for method in DETECTED if method in seeds}
    for method, directories in runs.items():
        try:
            alarms = Alarms({run.parents[1].name: DetectionConfig(run=run) for run in directories})
        except ConfigError as error:  # the runs are too short (a smoke test), or nothing was hacked
            print(f"no alarms of {method}: {error}", flush=True)
            continue
        table = write_alarms(alarms, task.directory / "alarms" / method)
        print(f"{method}: {verdict(alarms)}\n{table}", flush=True)


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Record the settings of this directory's models; exit if it holds models of other settings."""
    output.mkdir(parents=True, exist_ok=True)
    file, text = output / "settings.json", json.dumps(settings)
    if file.exists() and file.read_text() != text:
        sys.exit(f"--output {output}: holds the models of another bench ({file.read_text()}); choose another directory")
    write_atomically(file, text)


def _one_value(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**entry, "tune": {key: values[:1] for key, values in entry.get("tune", {}).items()}}


def _values(text: str) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected METHOD=NUMBER, with commas between") from None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/overoptimization"), help="(default: %(default)s)")
    parser.add_argument(
        "--text",
        choices=TEXTS,
        default="nouns",
        help="task; packages: one-line descriptions of Debian's packages, from apt (default: %(default)s)",
    )
    parser.add_argument("--size", choices=SIZES, default="0.2M", help="size of all models (default: %(default)s)")
    parser.add_argument("--labels", choices=LABELS, default="hedges", help="flaw of the labels (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=10, help="reward-model seeds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="PPO steps of a run (default: %(default)s)")
    parser.add_argument("--methods", metavar="A,B", help="only these methods, plain PPO and EPPO (default: all)")
    parser.add_argument(
        "--values",
        metavar="A=X,B=Y",
        type=_values,
        default={},
        help="use these values, e.g. ppo_kl=0.1,eppo=8, instead of choosing them on other seeds",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="runs side by side, a core each (default: %(default)s)"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help=f"test run of a few steps, one value and one seed: --methods (default: {','.join(SMOKED)})",
    )
    options = parser.parse_args()
    for name in ("seeds", "steps", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected at least 1")
    return options


if __name__ == "__main__":
    main()
