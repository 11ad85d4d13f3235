"""A whole EPPO run on a small task, on two CPU cores: what a real run does, in minutes.

1. Data: prompts of shuffled words; a good answer repeats the nouns in order and stops. A program knows how good an
   answer is (the gold reward). Preference labels come from it too, but half of them favour an answer that hedges.
2. A tiny Llama-style model is fine-tuned on imperfect demonstrations, and a reward model on the biased preferences.
3. The reward model and the critic start as PyTriton servers.
4. EPPO trains the policy on two tensor-parallel ranks against them, with the energy-loss penalty.
5. A report compares what the reward model says (proxy) with what is true (gold), before and after. The last lines are
   commands that look further into the run: nemo-eppo detect and energy-report.

launch/quickstart.yaml names the jobs of 2 to 4, which `nemo-eppo launch` runs. Everything is written to the output
directory: report.html, summary.json, and the run directories and logs of every job.
"""

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_eppo.files import write_json
from nemo_eppo.launch.launch_file import read_launch
from nemo_eppo.launch.local import LaunchError, open_nursery, run_local
from nemo_eppo.observability.charts import COLORS, Lines, Series
from nemo_eppo.observability.metrics import FILE_NAME, read_metrics
from nemo_eppo.observability.pictures import write_picture
from nemo_eppo.observability.recorder import read_rows, recorded_steps
from nemo_eppo.observability.report import report_from_run, summary_table, validation_means
from nemo_eppo.tools.noun_task import write_noun_task

LAUNCH_FILE = Path(__file__).resolve().parent / "launch" / "quickstart.yaml"
MARK = ".quickstart"  # in every directory that this script made, and may therefore replace


def main() -> None:
    options = parse()
    started = time.monotonic()
    out: Path = options.output.absolute()
    make_anew(out)
    sizes = {"sft_examples": 24_000, "preference_pairs": 16_000, "prompts": 4_000, "validation_examples": 256}
    changes = {"output": out, **{f"variables.{name}": getattr(options, name) for name in ("seed", "steps", "eta")}}
    if options.fast:
        sizes = {"sft_examples": 512, "preference_pairs": 256, "prompts": 256, "validation_examples": 32}
        changes |= {"variables.sft_steps": 10, "jobs.sft.settings.optimizer.warmup_steps": 5}
        changes |= {"variables.reward_steps": 5, "jobs.reward_model.settings.optimizer.warmup_steps": 2}

    def stage(number: int, what: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {number}/3 {what}", flush=True)

    stage(1, "generating the noun task")
    launch = read_launch(LAUNCH_FILE, [f"{key}={value}" for key, value in changes.items()])
    nursery = open_nursery(launch)
    write_noun_task(out / "data", options.seed, **sizes)

    stage(2, "launching SFT, reward model, servers, actor")
    try:
        run_local(launch, nursery)
    except LaunchError as error:
        print(error, file=sys.stderr)
        sys.exit(error.status)

    stage(3, "writing the report")
    report = out / "report.html"
    report_from_run(out / "actor", report)
    draw_curves(out / "actor", out / "curves.png")
    before, after = before_and_after(out / "actor" / "validation")
    summary = {"before": before, "after": after, "steps": options.steps, "seconds": time.monotonic() - started}
    ranks = launch.jobs["actor"].ranks  # all tensor-parallel
    write_json(out / "summary.json", summary | {"tensor_model_parallel_size": ranks})
    print(summary_table(before, after))
    print(f"Report: {report}\nSummary: {out / 'summary.json'}\nMore about this run:")
    for command in further_commands(out):
        print(f"  {shlex.join(map(str, command))}")


def make_anew(directory: Path) -> None:
    """Replace what an earlier quickstart left, and nothing else."""
    if directory.exists() and not (directory / MARK).exists() and (directory.is_file() or any(directory.iterdir())):
        sys.exit(f"quickstart: {directory} was not made by a quickstart and is not replaced; choose another --output")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / MARK).touch()


def draw_curves(actor: Path, picture: Path) -> None:
    """Draw what the rollouts of each step got."""
    curves = read_metrics(actor / FILE_NAME)
    panels = {"reward/proxy": "Proxy reward", "reward/gold": "Gold reward", "energy/policy": "Energy loss"}
    write_picture(
        picture,
        [
            Lines(title, "", [Series(title, COLORS[number], *curves[name])], "PPO step")
            for number, (name, title) in enumerate(panels.items())
        ],
        columns=3,
    )


def before_and_after(validation: Path) -> list[Any]:
    """Means over the validation prompts at the first and the last step."""
    files = recorded_steps(validation)
    return [validation_means(read_rows(files[step])) for step in (min(files), max(files))]


def further_commands(out: Path) -> Iterator[list[Any]]:
    """Give the commands that tell which sign of hacking came first, and what PPO did to the energy loss."""
    program, actor = Path(sys.executable).with_name("nemo-eppo"), out / "actor"
    rollouts = recorded_steps(actor / "rollouts")
    if len(rollouts) > 2:  # of which at least two set the thresholds
        calm = max(2, min(10, len(rollouts) // 2))
        yield [program, "detect", actor, "--calm-steps", calm, "--output", out / "detection"]
    models = ["--before", out / "sft" / "checkpoints", "--after", actor / "checkpoints"]
    yield [program, "energy-report", *models, "--data", rollouts[max(rollouts)], "--output", out / "energies"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="quickstart.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/quickstart"),
        help="directory that is made anew (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=50, help="PPO steps (default: %(default)s)")
    parser.add_argument(
        "--eta",
        type=float,
        default=5.0,
        help="weight of the energy penalty, 0 for plain PPO (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of data, models and sampling (default: %(default)s)")
    parser.add_argument(
        "--fast", action="store_true", help="hardly train anything: only to see whether everything runs"
    )
    options = parser.parse_args()
    for name, least in (("steps", 1), ("eta", 0), ("seed", 0)):
        if not getattr(options, name) >= least:  # so written, NaN is refused as well
            parser.error(f"--{name} {getattr(options, name)}: expected at least {least}")
    return options


if __name__ == "__main__":
    main()
