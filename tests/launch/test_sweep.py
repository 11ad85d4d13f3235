"""`launch --sweep`: an actor with a fresh critic for each value, on servers and trainings that run once."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs import Models
from launched import eppo, stages, write

from nemo_eppo.cli import main
from nemo_eppo.config import ConfigError
from nemo_eppo.launch import local
from nemo_eppo.launch.gpus import Gpus
from nemo_eppo.launch.launch_file import LaunchConfig
from nemo_eppo.launch.local import run_local
from nemo_eppo.launch.sweep import swept, variants
from nemo_eppo.observability.comparison import compare_runs

ETA = "shaping.energy_penalty.eta"

# Stands in for a job: a server is ready at once and stays; every start and end is a line of a common file.
JOB = """
import json, pathlib, signal, sys, time
name, events, ready = sys.argv[1:]
def tell(what):
    with open(events, "a") as file:
        print(what, name, file=file)
def end(*_):
    tell("-")
    sys.exit()
signal.signal(signal.SIGTERM, end)
tell("+")
if ready:
    path = pathlib.Path(ready.partition("=")[2].strip("'"))  # quoted, as Hydra wants a value with "="
    path.with_suffix(".new").write_text(json.dumps({"url": "grpc://127.0.0.1:1"}))
    path.with_suffix(".new").rename(path)
    time.sleep(100)
end()
"""


def sweep_of(values: dict[str, Any], directory: Path, *arguments: str) -> LaunchConfig:
    *changes, sweep = arguments
    return swept(variants(write(values, directory / "launch.yaml"), changes, sweep))[0]


def test_actor_and_critic_are_repeated_and_all_else_runs_once(models: Models, tmp_path: Path) -> None:
    values = stages(models, tmp_path / "out")
    launch = sweep_of(values, tmp_path, f"{ETA}=0,2.5")
    first, second = f"{ETA}=0", f"{ETA}=2.5"
    assert set(launch.jobs) == {"sft", "reward_model", "reward", *(f"{v}/{j}" for v in (first, second) for j in (
        "actor", "critic"))}  # fmt: skip
    assert launch.jobs[f"{first}/actor"].needs == (f"{first}/critic", "reward")
    assert launch.jobs[f"{second}/actor"].needs == (f"{second}/critic", "reward", f"{first}/actor")
    assert launch.jobs[f"{second}/critic"].needs == ("reward_model", f"{first}/actor")
    assert launch.jobs[f"{second}/actor"].setting(ETA) == 2.5
    Gpus(launch, ["0", "1", "2"])  # a critic and the reward server beside an actor, never two critics
    with pytest.raises(ConfigError, match="run together on 3 ranks"):
        Gpus(launch, ["0", "1"])


def test_a_reward_of_the_critics_job_is_that_of_the_same_value(models: Models, tmp_path: Path) -> None:
    values = eppo(models, tmp_path / "out")
    values["jobs"]["critic"]["settings"]["reward_model"] = str(models.rm)
    values["jobs"]["actor"]["settings"]["rewards"] = [{"job": "reward", "weight": 2.0}, {"job": "critic"}]
    launch = sweep_of(values, tmp_path, f"{ETA}=0,2")
    assert launch.rewards(f"{ETA}=2/actor") == ["reward", f"{ETA}=2/critic"]
    assert launch.jobs[f"{ETA}=0/actor"].setting("rewards")[0] == {"job": "reward", "weight": 2.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jobs.reward.settings.seed=1,2"], "--sweep changes the job reward, of which there is one for all values"),
        (["jobs.actor.colocate=false,true"], "--sweep changes the job reward, of which there is one for all values"),
        (["jobs.actor.colocate=true,false"], "--sweep changes the job critic, of which there is one for all values"),
        (["environment.NCCL_ALGO=Ring,Tree"], "--sweep changes environment, of which there is one for all values"),
        (["start_timeout=10,20"], "--sweep changes start_timeout"),
        (["output=a,b"], "--sweep changes output"),
        (["jobs.actor.environment.NCCL_ALGO=Ring,Tree"], ""),
        (["jobs.critic.settings.seed=1,2"], ""),
        (["variables.eta=1,2"], ""),
        (["ppo.max_steps=[1,2]"], "ppo.max_steps"),
        ([ETA], f"--sweep {ETA}: expected KEY=VALUE,VALUE,..."),
        ([f"{ETA}="], "expected KEY=VALUE,VALUE,..."),
        ([f"{ETA}=1,1"], f"two values have the name {ETA}=1"),
        ([f"{ETA}=1,-2"], f"jobs.{ETA}=-2/actor: invalid configuration:"),
        ([f"{ETA}=1", "jobs.actor.script=train_gpt_sft"], "expected one train_gpt_ppo_actor in the file, found none"),
        ([f"{ETA}=1", "--sweep", "seed=1,2"], "--sweep is given 2 times, expected one key: "),
        ([f"{ETA}=1", "--backend", "slurm"], "--sweep runs on one machine"),
    ],
)
def test_what_cannot_be_swept_is_named(
    arguments: list[str], message: str, models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = eppo(models, tmp_path / "out") | {"variables": {"eta": 1}}
    values["jobs"]["actor"]["settings"][ETA] = "${variables.eta}"
    sweep, *others = arguments
    if message != "" and sweep.startswith(ETA):
        del values["jobs"]["actor"]["settings"][ETA]
    file = write(values, tmp_path / "launch.yaml")
    status = main(["launch", str(file), "--dry-run", "--sweep", sweep, *others])
    assert status == (2 if message else 0)
    assert message in capsys.readouterr().err


def test_the_reward_server_stays_and_each_critic_ends_with_its_actor(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, events = tmp_path / "job.py", tmp_path / "events"
    script.write_text(JOB)
    launch = sweep_of(eppo(models, tmp_path / "out"), tmp_path, f"{ETA}=0,2")

    def stand_in(launch: LaunchConfig, name: str, addresses: object) -> list[str]:
        return [sys.executable, str(script), name, str(events), *([] if launch.jobs[name].serves else [""])]

    monkeypatch.setattr(local, "_argv", stand_in)
    run_local(launch)
    seen = events.read_text().splitlines()
    zero, two = f"{ETA}=0", f"{ETA}=2"
    jobs = ("reward", *(f"{value}/{job}" for value in (zero, two) for job in ("critic", "actor")))
    assert sorted(seen) == sorted(f"{sign} {job}" for job in jobs for sign in "+-")
    for first, second in (
        (f"- {zero}/actor", f"- {zero}/critic"),
        (f"- {zero}/actor", f"+ {two}/critic"),
        (f"- {zero}/actor", f"+ {two}/actor"),
        (f"- {two}/actor", f"- {two}/critic"),
        (f"- {two}/actor", "- reward"),
    ):
        assert seen.index(first) < seen.index(second), seen


def test_runs_are_compared_by_curves_and_by_the_settings_that_differ(tmp_path: Path) -> None:
    for name, eta, gold in (("a", 0, [1.0, 2.0]), ("b", 2, [1.0, 3.0])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(
            f"seed: 1\nexp_manager: {{explicit_log_dir: {name}}}\ncritic: {{server: {{url: u{name}}}}}\n"
            f"rewards: [{{weight: 1, server: {{url: r{name}}}}}, {{function: module:name}}]\n"
            f"shaping: {{energy_penalty: {{eta: {eta}}}}}\n"
        )
        rows = [{"step": step, "time": 0, "reward/gold": value} for step, value in enumerate(gold, start=1)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = compare_runs({"eta=0 <x>": tmp_path / "a", "eta=2": tmp_path / "b"}, tmp_path)
    assert "Gold reward" in text
    assert "held" not in text
    found = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert found["eta=2"]["settings"] == {ETA: 2}
    assert found["eta=2"]["final"] == {"reward/gold": 3.0}
    page = (tmp_path / "comparison.html").read_text()
    assert "Settings that differ" in page
    assert "eta=0 &lt;x&gt;" in page
    assert page.count("<figure>") == 1
