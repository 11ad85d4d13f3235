"""The over-optimisation bench: which defence keeps the gold reward while a policy learns to please a flawed proxy.

1. Data of a task whose true ("gold") reward is a formula: the noun task, or descriptions of Debian's packages. Reward
   models learn from labels that are biased (hedges) or few (scarce); their flaw is learnt, never programmed.
2. For every seed its own labels and reward models: Bradley-Terry models, WARM, ODIN, InfoRM.
3. A run of plain PPO decides whether a seed counts (protocol.md). Then every method of methods.yaml, with critic and
   reward models in the policy's own process; its coefficient was chosen on seeds of their own.
4. results.json, report.html, curves.png in the output directory; in alarms/, which alarms would have helped.
5. The SFT model and the policies of plain PPO and EPPO read each other's responses: weights_and_text.json says whether
   the energy loss rises for the text or for the weights.

What is finished is kept: the same command goes on after an interruption. A policy whose method or chosen value has
changed since is named, and has to be removed first.
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

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a forked process has no threads of this one
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
MOST_CANDIDATES = 3  # reward-model seeds that are tried for each that is wanted
ALWAYS = "ppo"
SMOKED = ("eppo", "inform", "erm_mean", "grpo", "control_frozen")
"""Methods of --smoke, beside plain PPO, which share little with each other."""
DETECTED = ("eppo", "inform", "erm_mean")
"""Methods whose runs have signs that plain PPO's lack: the energy loss's rise, latents, variance of reward models."""
ACCEPTANCE, ACCEPTANCE_SEED = "acceptance", 10_000  # the run that accepts a seed, and what is added to its own


@dataclass(frozen=True)
class Method:
    """An entry of methods.yaml."""

    name: str
    about: Mapping[str, Any]

    @property
    def tuned(self) -> str | None:
        """The setting whose value is chosen."""
        return next(iter(self.about.get("tune", ())), None)

    @property
    def values(self) -> list[float]:
        return list(self.about["tune"][self.tuned]) if self.tuned else []

    @property
    def rewards(self) -> str:
        """Kind of reward models that give the reward."""
        return str(self.about.get("rewards", SINGLE))

    def settings(self, chosen: Mapping[str, float], value: float | None = None) -> dict[str, Any]:
        """Settings with the values that were chosen for this and other methods, or with this value."""
        named = {key: chosen[of[1:]] if str(of).startswith("$") else of for key, of in self._settings.items()}
        if self.tuned:
            named[self.tuned] = chosen[self.name] if value is None else value
        return named

    @property
    def _settings(self) -> dict[str, Any]:
        return dict(self.about.get("settings", {}))

    @property
    def after(self) -> set[str]:
        """Methods whose chosen values it uses."""
        return {str(of)[1:] for of in self._settings.values() if str(of).startswith("$")}


class Bench:
    """All runs on one task."""

    def __init__(self, task: Task, methods: list[Method], workers: int, acceptance: Acceptance | None) -> None:
        self.task, self.methods, self.workers, self.acceptance = task, methods, workers, acceptance
        self.tuning: dict[str, Any] = {}
        """Of each method with several values: the one that was chosen, and the last gold reward by value and seed."""
        self.candidates: dict[int, Any] = {}
        """Of each seed that was tried: correlation of proxy and gold reward, and why it does not count, if so."""

    def run(self, seeds: int) -> dict[str, dict[int, Curves]]:
        """Return the curves of every method by seed, of the seeds that count."""
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
        open_ones = [method for method in tuned if len(method.values) > 1]
        if open_ones:
            self._train_rewards(TUNING_SEEDS, {method.rewards for method in open_ones})
        trials = [(method, value, seed) for method in open_ones for value in method.values for seed in TUNING_SEEDS]
        run_all("tuning", [self._policy(method, seed, {}, value) for method, value, seed in trials], self.workers)

        chosen = {method.name: method.values[0] for method in tuned}
        for method in open_ones:
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
        """Train reward models of seeds until as many as are wanted count.

        The run of plain PPO that tells is compared with nothing: the fall that accepts it may be chance.
        """
        if self.acceptance is None:
            self._train_rewards(candidates[:wanted], set())
            return list(candidates[:wanted])
        counted: list[int] = []
        left = list(candidates)
        while (missing := wanted - len(counted)) > 0:
            batch, left = left[:missing], left[missing:]
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
        """Train these kinds, and the single reward model of each seed, with which critic and ensemble begin."""
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
        train = partial(self.task.train_policy, seed, variant, method.about, settings)
        entry = {key: value for key, value in method.about.items() if key != "tune"}  # a new value leaves others as is
        return Work(self.task.policy(seed, variant), train, {**entry, "settings": settings})


def read_methods(names: list[str], values: Mapping[str, float]) -> Iterator[Method]:
    """The methods of methods.yaml with these names, and those that they need; all if there are no names.

    Those with an entry in `values` have this value instead of several.
    """
    table = {name: Method(name, about) for name, about in yaml.safe_load((HERE / "methods.yaml").read_text()).items()}
    for name, value in values.items():
        if name not in table or not table[name].tuned:
            tuned = ", ".join(other for other, method in table.items() if method.tuned)
            sys.exit(f"--values {name}={value:g}: expected of {tuned}")
        table[name] = Method(name, {**table[name].about, "tune": {table[name].tuned: [value]}})
    if unknown := [name for name in names if name not in table]:
        sys.exit(f"--methods {unknown[0]}: expected of {', '.join(table)}")
    wanted = {ALWAYS, "eppo", *names} if names else set(table)
    wanted |= {other for name in wanted for other in table[name].after}
    return (method for name, method in table.items() if name in wanted)


def main() -> None:
    options = parse()
    started = time.monotonic()
    of_all = list(SMOKED) if options.smoke else []
    methods = list(read_methods(options.methods.split(",") if options.methods else of_all, options.values))
    size, effort = SIZES[options.size], Effort(steps=options.steps)
    acceptance: Acceptance | None = Acceptance()
    if options.smoke:
        size = replace(size, reward_steps=5)
        effort = Effort(sft_steps=20, steps=2, validate_every=1, validation_prompts=16)
        acceptance = None
        methods = [Method(each.name, _one_value(each.about)) for each in methods]
    task_of = {"text": options.text, "size": options.size, "labels": options.labels}
    _claim(options.output, {**task_of, **asdict(size), **asdict(effort)})
    torch.set_num_threads(1)
    task = Task(options.output.absolute(), TEXTS[options.text], size, LABELS[options.labels], effort)
    bench = Bench(task, methods, options.workers, acceptance)
    found = bench.run(1 if options.smoke else options.seeds)
    about = {
        **task_of,
        "steps": effort.steps,
        "seconds": round(time.monotonic() - started),
        "command": " ".join(sys.argv),
    }
    print(write_results(task.directory, found, about, {"tuning": bench.tuning, "candidates": bench.candidates}))
    plain = ALWAYS if options.smoke else ACCEPTANCE  # of all seeds that were tried, so that some did not fall
    detect(task, found, plain)
    compare_weights_and_text(task, found, options.workers)


def detect(task: Task, found: Mapping[str, Iterable[int]], plain: str) -> None:
    """Write into alarms/<method>/ which alarms would have helped, in the runs of plain PPO and in those of DETECTED.

    Args:
        found: the seeds of each method that ran.
        plain: what plain PPO's runs are called.
    """
    runs = {ALWAYS: sorted(task.directory.glob(f"seed_*/policies/{plain}"))}
    runs |= {method: [task.policy(seed, method) for seed in found[method]] for method in DETECTED if method in found}
    for method, of_method in runs.items():
        try:
            alarms = Alarms({run.parents[1].name: DetectionConfig(run=run) for run in of_method})
        except ConfigError as error:  # too short, as a smoke test's, or nothing was hacked
            print(f"no alarms of {method}: {error}", flush=True)
            continue
        table = write_alarms(alarms, task.directory / "alarms" / method)
        print(f"{method}: {verdict(alarms)}\n{table}", flush=True)


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Note what the models of this directory are; exit if there are others, which would count as finished."""
    output.mkdir(parents=True, exist_ok=True)
    file, text = output / "settings.json", json.dumps(settings)
    if file.exists() and file.read_text() != text:
        sys.exit(f"--output {output}: holds the models of another bench ({file.read_text()}); choose another directory")
    write_atomically(file, text)


def _one_value(about: Mapping[str, Any]) -> dict[str, Any]:
    return {**about, "tune": {key: values[:1] for key, values in about.get("tune", {}).items()}}


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
        help="packages: one-line descriptions of Debian's packages, as apt knows them (default: %(default)s)",
    )
    parser.add_argument("--size", choices=SIZES, default="0.2M", help="weights of all models (default: %(default)s)")
    parser.add_argument("--labels", choices=LABELS, default="hedges", help="their flaw (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=10, help="reward-model seeds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="PPO steps of a run (default: %(default)s)")
    parser.add_argument("--methods", metavar="A,B", help="only these methods, plain PPO and EPPO (default: all)")
    parser.add_argument(
        "--values",
        metavar="A=X,B=Y",
        type=_values,
        default={},
        help="take these values, as ppo_kl=0.1,eppo=8, instead of choosing from several on seeds of their own",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="runs side by side, a core each (default: %(default)s)"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help=f"hardly train anything, only to see it run: --methods (default: {','.join(SMOKED)}), one value, one seed",
    )
    options = parser.parse_args()
    for name in ("seeds", "steps", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected at least 1")
    return options


if __name__ == "__main__":
    main()
