"""What is wrong with a launch is told before anything starts, with the name of the key."""

import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import Models
from launched import eppo, write

from nemo_eppo import machine
from nemo_eppo.cli import main
from nemo_eppo.config import ConfigError, flat
from nemo_eppo.launch.command import CRITIC, REWARDS
from nemo_eppo.launch.examination import check_launch, missing_servers
from nemo_eppo.launch.gpus import Gpus
from nemo_eppo.launch.job import Job
from nemo_eppo.launch.kubernetes import manifests
from nemo_eppo.launch.launch_file import LaunchConfig, read_launch
from nemo_eppo.launch.slurm import batch_script
from nemo_eppo.machine import VISIBLE, visible_gpus
from nemo_eppo.settings.critic import CriticSource
from nemo_eppo.settings.kinds import KINDS
from nemo_eppo.settings.rewards import RewardSourceConfig
from nemo_eppo.settings.servers import ClientConfig


def settings(job: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    def change(launch: dict[str, Any]) -> None:
        own = launch["jobs"][job]["settings"]
        own |= dict(flat(own)) | values
        for key in [key for key, value in own.items() if isinstance(value, dict) and key not in values]:
            del own[key]

    return change


def of_job(job: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda launch: launch["jobs"][job].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda launch: launch.update(nmae="x"), "nmae: unknown key (did you mean 'name'?)"),
        (of_job("critic", script="serve_critic"), "jobs.critic.script = 'serve_critic'"),
        (
            of_job("actor", needs=["critic", "rewards"]),
            "jobs.actor.needs: no job 'rewards' (jobs: critic, reward, actor)",
        ),
        (of_job("actor", needs=["reward"]), "jobs.actor.needs: expected one serve_ppo_critic, found none"),
        (of_job("actor", needs=["critic"]), "jobs.actor.needs: expected a serve_reward_model, or reward_model among"),
        (of_job("critic", needs=["actor"]), "jobs need each other in a circle: "),
        (of_job("actor", held_out="gold"), "jobs.actor.held_out = 'gold': expected one of its needs"),
        (settings("critic", **{"server.port": "abc"}), "jobs.critic.settings.server.port = 'abc': expected 0 (any) to"),
        (settings("reward", **{"server.port": 70000}), "jobs.reward.settings.server.port = 70000: expected 0 (any) to"),
        (settings("actor", output="${outptu}"), "Interpolation key 'outptu' not found"),
        (of_job("critic", nodes=2), "jobs.critic: nodes = 2: expected 1 on this machine"),
        (
            of_job("actor", ranks_per_node=3),
            "jobs.actor: world size 3 is not divisible by tensor_model_parallel_size 2",
        ),
        (
            settings("actor", **{"critic.server.url": "grpc://127.0.0.1:5555"}),
            "jobs.actor: critic.server.url = 'grpc://127.0.0.1:5555': expected no value here, the launcher sets it",
        ),
        (settings("actor", **{"data.max_prompt_length": 40}), "jobs.actor: data.max_prompt_length 40 + "),
        (
            settings("actor", **{"model.parallel.tensor_model_parallel_size": 1, "ppo.mini_batch_size": 1}),
            "jobs.actor: ppo.mini_batch_size = 1 is not divisible by 2 replicas",
        ),
        (
            settings("actor", gold_reward="nemo_eppo.tools.noun_task:gold"),
            "gold_reward = 'nemo_eppo.tools.noun_task:gold': expected 'module:function'",
        ),
        (
            settings("actor", **{"shaping.terms": [{"name": "mine", "term": "nowhere:Term"}]}),
            "shaping.terms.mine.term = 'nowhere:Term': expected 'module:Class'",
        ),
        (
            settings("actor", **{"monitor.indicators": [{"name": "mine", "indicator": "nowhere:Sign"}]}),
            "monitor.indicators.mine.indicator = 'nowhere:Sign': expected 'module:Class'",
        ),
        (
            settings("actor", **{"ppo.max_steps": 2, "ppo": {"max_steps": 3}}),
            "jobs.actor.settings.ppo.max_steps is given twice",
        ),
        (lambda values: values["jobs"]["actor"].update(rank_per_node=2), "did you mean 'ranks_per_node'?"),
        (settings("critic", optimzer={"lr": 1}), "jobs.critic: invalid configuration:\n  - optimzer: unknown key"),
        (
            settings("reward", **{"model.restore_from_path": "/nowhere/rm"}),
            "jobs.reward: model.restore_from_path = /nowhere/rm does not exist",
        ),
        (
            settings(
                "actor", **{"model.restore_from_path": "${output}/critic/checkpoints", "data.validation": "/no.jsonl"}
            ),
            "jobs.actor: data.validation = /no.jsonl does not exist",
        ),
        (
            settings("reward", **{"model.restore_from_path": "${output}/critic/checkpoints"}),
            "checkpoints is made by the job critic, which is not among its needs",
        ),
    ],
)
def test_a_fault_is_named(
    models: Models,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], None],
    words: str,
) -> None:
    launch = eppo(models, tmp_path / "out")
    change(launch)
    assert main(["launch", str(write(launch, tmp_path / "launch.yaml")), "--dry-run"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_faulty_jobs_are_named_at_once_and_a_layout_is_checked_against_the_model(
    models: Models, tmp_path: Path
) -> None:
    launch = eppo(models, tmp_path / "out")
    launch["jobs"]["reward"].update(ranks_per_node=8)
    launch["jobs"]["reward"]["settings"]["model.parallel.tensor_model_parallel_size"] = 8
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        launch["jobs"]["critic"]["settings"]["server.port"] = port
        with pytest.raises(ConfigError) as error:
            check_launch(read_launch(write(launch, tmp_path / "launch.yaml")), here=True)
    assert "jobs.reward: impossible layout" in str(error.value)
    assert f"jobs.critic.settings.server.port = {port}: cannot listen there" in str(error.value)


@pytest.mark.parametrize(
    ("job", "expected"), [("sft", "'scalar', expected 'lm'"), ("reward", "'lm', expected 'scalar'"), ("critic", "")]
)
def test_a_model_with_another_head_is_refused_where_the_job_would_refuse_it(
    models: Models, tmp_path: Path, job: str, expected: str
) -> None:
    launch = eppo(models, tmp_path / "out")
    data = {side: str(models.data / f"sft.{side}.jsonl") for side in ("train", "validation")}
    sft = {"model.restore_from_path": str(models.sft), "data": data, "fit.max_steps": 1}
    launch["jobs"]["sft"] = {"script": "train_gpt_sft", "settings": sft}
    launch["jobs"][job]["settings"]["model.restore_from_path"] = str(models.rm if job == "sft" else models.sft)
    file = read_launch(write(launch, tmp_path / "launch.yaml"))
    if expected:
        with pytest.raises(ConfigError, match=f"jobs.{job}: .* holds a model with head {expected}"):
            check_launch(file, here=True)
    else:
        check_launch(file, here=True)


def actor(critic: object, rewards: tuple[object, ...]) -> Job:
    """An actor whose settings find critic and rewards like this."""
    settings = SimpleNamespace(**{CRITIC: critic, REWARDS: rewards})
    return Job("actor", KINDS["train_gpt_ppo_actor"], 1, settings)


SERVED = CriticSource(server=ClientConfig(url="grpc://127.0.0.1:1"))
HERE = SimpleNamespace(colocated=object())
FUNCTION = RewardSourceConfig(function="rewards:length")


@pytest.mark.parametrize(
    ("needs", "critic", "rewards", "missing"),
    [
        ([], None, (FUNCTION,), []),
        ([], HERE, (HERE, FUNCTION), []),
        (["reward"], None, (SERVED, FUNCTION), []),
        (["critic"], SERVED, (FUNCTION,), []),
        ([], SERVED, (FUNCTION,), ["expected one serve_ppo_critic, found none"]),
        (["critic"], SERVED, (FUNCTION, SERVED), ["expected a serve_reward_model"]),
        (["critic", "second"], SERVED, (HERE,), ["expected one serve_ppo_critic, found critic, second"]),
        ([], SERVED, (SERVED,), ["expected one serve_ppo_critic, found none", "expected a serve_reward_model"]),
    ],
)
def test_an_actor_needs_a_server_where_its_settings_ask_for_an_address(
    needs: list[str], critic: object, rewards: tuple[object, ...], missing: list[str]
) -> None:
    critic_job = {"script": "serve_ppo_critic"}
    jobs = {"critic": critic_job, "second": critic_job, "reward": {"script": "serve_reward_model"}}
    jobs["actor"] = {"script": "train_gpt_ppo_actor", "needs": needs}  # type: ignore[dict-item]
    launch = LaunchConfig.model_validate({"name": "few", "output": "out", "jobs": jobs})
    found = [finding.found for finding in missing_servers(launch, actor(critic, rewards))]
    assert len(found) == len(missing)
    for text, words in zip(found, missing, strict=True):
        assert text.startswith(f"jobs.actor.needs: {words}")


def test_an_override_changes_what_the_file_says_in_either_spelling(models: Models, tmp_path: Path) -> None:
    file = write(eppo(models, tmp_path / "out"), tmp_path / "launch.yaml")
    changed = read_launch(file, ["jobs.actor.settings.ppo.epochs=3", "jobs.reward.settings.model.precision=bf16"])
    assert changed.jobs["actor"].setting("ppo") == {
        "max_steps": 2,
        "rollout_batch_size": 8,
        "mini_batch_size": 8,
        "epochs": 3,
    }
    assert changed.jobs["reward"].setting("model") == {"restore_from_path": str(models.rm), "precision": "bf16"}


@pytest.mark.parametrize(
    ("text", "arguments", "fault"),
    [
        ("name: x\noutput: o\nname: y\n", [], "FILE:3: found duplicate key name: 'name: y'"),
        ("name: x\njobs:\n\tactor: {}\n", [], "FILE:3: found character '\\t' that cannot start any token: '\\tactor"),
        ("name: x\njobs: {actor: [\n", [], "FILE:2: expected the node content, but found '<stream end>': 'jobs: {ac"),
        ("name: ${nothing}\noutput: o\njobs: {}\n", [], "FILE: name: Interpolation key 'nothing' not found"),
        ("- name\n", [], "FILE: expected a mapping with name, output and jobs"),
        ("name: x\n", ["jobs.actor"], "jobs.actor: expected KEY=VALUE"),
        ("name: x\n", ["--dry-run", "jobs.actor"], "jobs.actor: expected KEY=VALUE"),
        ("name: x\n", ["=3"], "=3: expected KEY=VALUE"),
        ("name: x\n", ["a=[1,"], "a=[1,: expected KEY=VALUE ("),
        ("name: x\n", ["a.b=1", "--dry-run", "a.b=2"], "a.b is given twice on the command line: a.b=1 and a.b=2"),
        (None, [], "FILE is a directory, expected a launch file"),
    ],
)
def test_a_file_or_argument_that_cannot_be_read_is_named(
    text: str | None, arguments: list[str], fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "launch.yaml"
    if text is None:
        file.mkdir()
    else:
        file.write_text(text)
    assert main(["launch", str(file), *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"nemo-eppo: error: {fault.replace('FILE', str(file))}")


def test_changes_may_follow_an_option(models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write(eppo(models, tmp_path / "out"), tmp_path / "launch.yaml"))
    for command in (["launch", file, "--dry-run"], ["doctor", file, "jobs.actor.ranks_per_node=2", "--json"]):
        change = "jobs.critic.settings.optimzer.lr=1"
        with suppress(SystemExit):
            main([*command, change])
        assert "optimzer: unknown key" in "".join(capsys.readouterr())
        with pytest.raises(SystemExit):
            main([*command, change, "--wrong"])
        assert "unrecognized arguments: jobs.critic.settings.optimzer.lr=1 --wrong" in capsys.readouterr().err


def test_what_a_backend_needs_is_said_with_an_example(models: Models, tmp_path: Path) -> None:
    launch = read_launch(write(eppo(models, tmp_path / "out"), tmp_path / "launch.yaml"))
    with pytest.raises(ConfigError, match=r"slurm: required .*: slurm: \{image: .*, sbatch: \{account: NAME, "):
        batch_script(launch)
    with pytest.raises(ConfigError, match=r"kubernetes: required .*: kubernetes: \{image: NAME, volumes: \{CLAIM: "):
        manifests(launch)


def stages(server_needs: list[str]) -> LaunchConfig:
    """An SFT on all of eight GPUs, then servers on two and an actor on six."""
    server = {"needs": server_needs, "ranks_per_node": 1}
    jobs = {
        "sft": {"script": "train_gpt_sft", "ranks_per_node": 8},
        "critic": {"script": "serve_ppo_critic", **server},
        "reward": {"script": "serve_reward_model", **server},
        "actor": {"script": "train_gpt_ppo_actor", "needs": ["critic", "reward"], "ranks_per_node": 6},
    }
    return LaunchConfig.model_validate({"name": "stages", "output": "out", "jobs": jobs})


def test_jobs_that_run_together_get_gpus_of_their_own() -> None:
    launch = stages(server_needs=["sft"])
    gpus = Gpus(launch, [str(number) for number in range(8)])
    assert gpus.take("sft", launch.jobs["sft"]) == {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    assert gpus.take("critic", launch.jobs["critic"]) is None
    gpus.give_back("sft")
    taken = [gpus.take(name, launch.jobs[name]) for name in ("critic", "reward", "actor")]
    assert [gpus and gpus["CUDA_VISIBLE_DEVICES"] for gpus in taken] == ["0", "1", "2,3,4,5,6,7"]
    with pytest.raises(ConfigError, match=r"jobs.sft.ranks_per_node: critic, reward, sft run together on 10 ranks"):
        Gpus(stages(server_needs=[]), [str(number) for number in range(8)])
    assert Gpus(stages(server_needs=[]), []).take("sft", launch.jobs["sft"]) == {}


def test_gpus_are_found_where_there_is_no_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia1", "nvidia3", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    monkeypatch.setattr(machine, "_NODES", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(VISIBLE, raising=False)
    machine._gpus.cache_clear()
    assert visible_gpus() == ["0", "1"]
    machine._gpus.cache_clear()
    for named, seen in {"": [], "-1": [], "NoDevFiles": [], "2, GPU-ab": ["2", "GPU-ab"], "1,-1,0": ["1"]}.items():
        monkeypatch.setenv(VISIBLE, named)
        assert visible_gpus() == seen
