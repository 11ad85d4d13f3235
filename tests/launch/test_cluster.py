"""The cluster files in examples/ are what the launcher writes, are valid, and start the jobs that they name."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from distributed import free_port
from jobs import Models
from launched import eppo, processes_of, stages, write

from nemo_eppo.cli import main
from nemo_eppo.config import NOT_FINISHED, ConfigError
from nemo_eppo.launch.command import CRITIC, REPOSITORY, REWARDS
from nemo_eppo.launch.kubernetes import manifests
from nemo_eppo.launch.launch_file import LaunchConfig, read_launch
from nemo_eppo.launch.slurm import batch_script
from nemo_eppo.observability.metrics import read_metrics
from nemo_eppo.servers.certificates import Certificates, create

EXAMPLES = REPOSITORY / "examples"
RUNS = ("llama3_8b_2_nodes", "llama3_70b_12_nodes")
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

# Stand-ins for Slurm's commands on one machine: srun starts the tasks here and ends all when one fails. Like the
# real one it hands SIGUSR1 on to them, but kills them when it gets SIGTERM.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
    case $1 in --ntasks=*) tasks=${1#*=} ;; --output=*) exec >>"${1#*=}" 2>&1 ;; esac
    shift
done
trap 'kill -KILL $(jobs -p); wait; exit 143' TERM
trap 'handed_on=yes; kill -USR1 $(jobs -p)' USR1
for ((task = 0; task < tasks; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
done
status=0
while ((tasks)); do
    handed_on=
    wait -n && code=0 || code=$?
    [[ $handed_on ]] && continue
    ((code)) && { status=$code; kill -KILL $(jobs -p) 2>/dev/null; }
    ((tasks--))
done
wait
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == requeue ]]; then echo "$2" >"$REQUEUED"; else echo 127.0.0.1; echo 127.0.0.2; fi
"""


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(("backend", "ending"), [("slurm", "sbatch"), ("kubernetes", "yaml")])
def test_the_examples_are_what_the_launcher_writes(name: str, backend: str, ending: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    file = EXAMPLES / "launch" / f"{name}.yaml"
    assert main(["launch", str(file), "--backend", backend, "--output", str(made)]) == 0
    assert made.read_bytes() == (EXAMPLES / backend / f"{name}.{ending}").read_bytes()


def shellcheck(script: str) -> None:
    assert SHELLCHECK is not None, "shellcheck is missing; it comes with pip install -e .[dev]"
    done = subprocess.run([SHELLCHECK, "-"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def pod_script(text: str) -> str:
    job = list(yaml.safe_load_all(text))[1]
    command: list[str] = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[:2] == ["bash", "-c"]
    return command[2]


@pytest.mark.parametrize("name", RUNS)
def test_shellcheck_and_kubernetes_own_schema_find_nothing(name: str) -> None:
    shellcheck((EXAMPLES / "slurm" / f"{name}.sbatch").read_text())
    text = (EXAMPLES / "kubernetes" / f"{name}.yaml").read_text()
    shellcheck(f"#!/usr/bin/env bash\n# shellcheck disable=SC2016\n{pod_script(text)}")
    for manifest in yaml.safe_load_all(text):
        kubernetes_validate.validate(manifest, "1.33", strict=True)


@pytest.mark.parametrize("name", RUNS)
def test_servers_run_in_the_environment_that_the_image_has_for_them(name: str) -> None:
    dockerfile = (REPOSITORY / "docker" / "Dockerfile").read_text()
    servers = next(line for line in dockerfile.splitlines() if line.startswith("ENV SERVERS=")).partition("=")[2]
    slurm = (EXAMPLES / "slurm" / f"{name}.sbatch").read_text()
    assert f" {servers}/bin/python -u /opt/nemo_eppo/examples/nlp/gpt/serve_ppo_critic.py " in slurm
    assert " python -u /opt/nemo_eppo/examples/nlp/gpt/train_gpt_ppo_actor.py " in slurm
    critic, actor = pod_script((EXAMPLES / "kubernetes" / f"{name}.yaml").read_text()).split("# actor")
    module = "nemo_eppo.entry.torchrun" if name == "llama3_8b_2_nodes" else "torch.distributed.run"  # one node a job
    assert f"exec {servers}/bin/python -u -m {module} --nproc_per_node 8 " in critic
    assert f"exec python -u -m {module} --nproc_per_node 8 " in actor


def test_every_pod_of_70b_on_12_nodes_runs_its_part(tmp_path: Path) -> None:
    example = EXAMPLES / "launch" / "llama3_70b_12_nodes.yaml"
    script = pod_script(manifests(read_launch(example, ["kubernetes.server_python=python"])))
    create(tmp_path / "secret")
    for there, here in (("/etc/nemo_eppo/certificates", "secret"), ("/tmp/nemo_eppo_certificates", "copied")):
        script = script.replace(there, str(tmp_path / here))
    commands = commands_in(tmp_path, 'echo "$@"')
    for index in range(12):
        environment = {**commands, "JOB_COMPLETION_INDEX": str(index)}
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
        job, first, nodes = ("serve_ppo_critic", 0, 4) if index < 4 else ("train_gpt_ppo_actor", 4, 8)
        assert f"/{job}.py" in done.stdout
        words = f"--nnodes {nodes} --master_addr llama3-70b-eppo-{first}.llama3-70b-eppo --master_port 29500"
        assert f"{words} --node_rank {index - first} " in done.stdout
        assert re.findall(r"certificates[=:]([^\s,}]+)", done.stdout) == [str(tmp_path / "copied")] * (1 + (index > 3))
        assert {file.stat().st_mode & 0o777 for file in Certificates.of(tmp_path / "copied")} == {0o600}


def cluster_run(models: Models, tmp_path: Path, **slurm: Any) -> dict[str, Any]:
    """The tiny run with one server, for a cluster whose containers see this machine's own files."""
    launch = eppo(models, tmp_path / "out")
    del launch["jobs"]["reward"]
    launch["jobs"]["critic"]["settings"].update({"reward_model": str(models.rm), "server.port": free_port()})
    launch["jobs"]["actor"]["needs"] = ["critic"]
    launch["slurm"] = {"image": "none", "code": str(REPOSITORY), "server_python": "python", **slurm}
    return launch


def commands_in(directory: Path, python: str) -> dict[str, str]:
    """An environment in which Slurm's commands are stand-ins and `python` is a line of shell."""
    folder = directory / "bin"
    folder.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", f"#!/usr/bin/env bash\n{python}\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    nodes = {f"SLURM_JOB_NODELIST_HET_GROUP_{group}": "node[1-2]" for group in (0, 1)}
    path = f"{folder}:{os.environ['PATH']}"
    return {**os.environ, **nodes, "PATH": path, "SLURM_JOB_ID": "17", "REQUEUED": str(directory / "requeued")}


@pytest.mark.slow
def test_the_batch_script_saves_and_requeues_when_its_time_is_over_and_goes_on_when_it_starts_again(
    models: Models, tmp_path: Path
) -> None:
    file = write(cluster_run(models, tmp_path), tmp_path / "launch.yaml")
    environment = commands_in(tmp_path, f'exec {sys.executable} "$@"')
    metrics, requeued = tmp_path / "out" / "actor" / "metrics.jsonl", tmp_path / "requeued"

    def run(steps: int) -> subprocess.Popen[bytes]:
        rarely = "jobs.actor.settings.checkpoint.interval=1000"
        script = batch_script(read_launch(file, [f"jobs.actor.settings.ppo.max_steps={steps}", rarely]))
        shellcheck(script)
        return subprocess.Popen(["bash", "-c", script], env=environment)

    process = run(1000)
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 0
    assert requeued.read_text() == "17\n"
    assert processes_of(tmp_path / "out") == []
    requeued.unlink()

    made = metrics.read_text().splitlines()
    process = run(len(made) + 1)
    assert process.wait(200) == 0
    assert metrics.read_text().splitlines()[: len(made)] == made  # none of these was made again
    assert read_metrics(metrics)["critic/loss"][0] == list(range(1, len(made) + 2))
    assert not requeued.exists()
    assert processes_of(tmp_path / "out") == []


def test_the_batch_script_requeues_even_if_a_step_takes_too_long_and_fails_with_its_servers(
    models: Models, tmp_path: Path
) -> None:
    launch = write(cluster_run(models, tmp_path, requeue_before_end=60), tmp_path / "launch.yaml")
    script = batch_script(read_launch(launch)).replace("timeout 30", "timeout 1")
    create(tmp_path / "out" / "certificates")  # here `python` only sleeps
    busy = 'trap "" USR1; exec sleep 98765'
    environment = commands_in(tmp_path, f'[[ "$*" == *$FAILING* ]] && {{ echo "no memory"; exit 3; }}; {busy}')
    process = subprocess.Popen(["bash", "-c", script], env={**environment, "FAILING": "none of them"})
    while not (tmp_path / "out" / "logs" / "actor.log").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert (tmp_path / "requeued").read_text() == "17\n"

    (tmp_path / "requeued").unlink()
    as_ranks_end = f"{{ ((RANK)) && exit 0; sleep 1; exit {NOT_FINISHED}; }}"
    own_time = commands_in(tmp_path, f'[[ "$*" == *train_gpt_ppo_actor* ]] && {as_ranks_end}; {busy}')
    assert subprocess.run(["bash", "-c", script], env=own_time, timeout=30, check=False).returncode == 0
    assert (tmp_path / "requeued").read_text() == "17\n"

    (tmp_path / "requeued").unlink()
    environment = commands_in(tmp_path, f'[[ "$*" == *$FAILING* ]] && {{ echo "no memory"; exit 3; }}; {busy}')
    failed = subprocess.run(
        ["bash", "-c", script],
        env={**environment, "FAILING": "serve_ppo_critic"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert failed.returncode == 1
    assert "a server that actor needs ended with exit status 3" in failed.stderr
    assert "no memory" in failed.stderr
    assert not (tmp_path / "requeued").exists()
    assert processes_of(Path("sleep 98765")) == []


def actor_alone(models: Models, tmp_path: Path, output: Path) -> Path:
    """A launch file whose only job has no critic, and a function for its reward."""
    launch = cluster_run(models, tmp_path)
    del launch["jobs"]["critic"]
    launch["output"], launch["jobs"]["actor"]["needs"] = str(output), []
    launch["jobs"]["actor"]["settings"] |= {CRITIC: None, REWARDS: [{"function": "rewards:length"}]}
    launch["kubernetes"] = {"image": "x", "volumes": {"data": "/data"}}
    return write(launch, tmp_path / "launch.yaml")


def test_an_actor_without_servers_is_a_plain_batch_job(models: Models, tmp_path: Path) -> None:
    file = actor_alone(models, tmp_path, tmp_path / "out")
    script = batch_script(read_launch(file, ["jobs.actor.ranks_per_node=1"]))
    shellcheck(script)
    assert "het" not in script.replace("method", "")
    assert "certificates" not in script
    environment = {**commands_in(tmp_path, '((!FAILING)) || exit 3; echo "$@"'), "SLURM_JOB_NODELIST": "node[1-2]"}
    for failing, status in (("0", 0), ("1", 3)):
        environment["FAILING"] = failing
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=30)
        assert done.returncode == status, done.stderr
        assert "a server" not in done.stderr
    [line] = (tmp_path / "out" / "logs" / "actor.log").read_text().splitlines()
    assert "/train_gpt_ppo_actor.py " in line
    assert f" {CRITIC}=null {REWARDS}=[{{function:rewards:length}}] " in line
    assert "url" not in line


def test_without_an_image_jobs_run_in_the_environment_that_setup_makes(models: Models, tmp_path: Path) -> None:
    values = cluster_run(models, tmp_path)
    for name in ("venv", "servers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "python").write_text(
            f'#!/usr/bin/env bash\necho "$LOADED {name} $*"\n[[ "$*" != *serve_* ]] || exec sleep 76543\nsleep 1\n'
        )
        (tmp_path / name / "python").chmod(0o755)
    values["slurm"] = {
        "setup": f"# a module's script\nexport LOADED=loaded$NEVER_SET\nexport PATH={tmp_path}/venv:$PATH",
        "code": "/shared/nemo_eppo",
        "server_python": str(tmp_path / "servers" / "python"),
    }
    script = batch_script(read_launch(write(values, tmp_path / "launch.yaml")))
    shellcheck(script)
    assert "container" not in script
    environment = commands_in(tmp_path, "echo the wrong one")
    subprocess.run(["bash", "-c", script], env=environment, capture_output=True, timeout=60, check=True)
    logs = tmp_path / "out" / "logs"
    assert (
        (logs / "actor.log")
        .read_text()
        .startswith("loaded venv -u /shared/nemo_eppo/examples/nlp/gpt/train_gpt_ppo_actor.py ")
    )
    assert (logs / "critic.log").read_text().startswith("loaded servers -u /shared/nemo_eppo/examples/nlp/gpt/serve_")
    assert processes_of(Path("sleep 76543")) == []


def test_an_actor_without_servers_is_an_indexed_job_of_its_own_nodes(models: Models, tmp_path: Path) -> None:
    file = actor_alone(models, tmp_path, Path("/data/out"))
    text = manifests(read_launch(file, ["jobs.actor.nodes=2", "kubernetes.server_python=python"]))
    assert "certificates" not in text
    assert "secret" not in text
    service, job = yaml.safe_load_all(text)
    for manifest in (service, job):
        kubernetes_validate.validate(manifest, "1.33", strict=True)
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert job["spec"]["successPolicy"] == {"rules": [{"succeededIndexes": "0-1"}]}
    script = pod_script(text)
    shellcheck(f"#!/usr/bin/env bash\n# shellcheck disable=SC2016\n{script}")
    commands = commands_in(tmp_path, 'echo "$@"')
    for index in range(2):
        environment = {**commands, "JOB_COMPLETION_INDEX": str(index)}
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
        assert f"--nnodes 2 --master_addr tiny-0.tiny --master_port 29500 --node_rank {index} " in done.stdout
        assert f" {CRITIC}=null " in done.stdout
        assert "url" not in done.stdout


def test_what_does_not_suit_a_cluster_is_named(models: Models, tmp_path: Path) -> None:
    values = cluster_run(models, tmp_path)
    values["kubernetes"] = {"image": "x", "volumes": {"data": "/data"}, "secret": "certificates"}
    launch = read_launch(write(values, tmp_path / "launch.yaml"))
    with pytest.raises(ConfigError, match=r"ranks_per_node: .* \{'critic': 1, 'actor': 2\}"):
        manifests(launch)
    with pytest.raises(ConfigError, match=r"output = .*: expected a directory on one of kubernetes\.volumes"):
        manifests(read_launch(tmp_path / "launch.yaml", ["jobs.critic.ranks_per_node=2"]))
    with pytest.raises(ConfigError, match=r"kubernetes\.secret: required for the servers critic, but not set"):
        manifests(read_launch(tmp_path / "launch.yaml", ["kubernetes.secret=null"]))
    with pytest.raises(ConfigError, match="output = out: expected an absolute path"):
        batch_script(read_launch(tmp_path / "launch.yaml", ["output=out"]))
    file = write(values | {"jobs": {"critic": values["jobs"]["critic"]}}, tmp_path / "launch.yaml")
    with pytest.raises(ConfigError, match="jobs: all are servers"):
        batch_script(read_launch(file))
    values["jobs"]["sft"] = {"script": "train_gpt_sft"}
    values["jobs"]["second"] = {"script": "serve_reward_model", "needs": ["sft"]}
    with pytest.raises(ConfigError, match=r"jobs\.second: on a cluster a server runs together with .*, found none"):
        batch_script(read_launch(write(values, tmp_path / "launch.yaml")))
    values["jobs"]["second"]["needs"] = []
    values["jobs"]["again"] = values["jobs"]["actor"]
    with pytest.raises(ConfigError, match=r"jobs\.critic: .*, found actor, again"):
        batch_script(read_launch(write(values, tmp_path / "launch.yaml")))


SBATCH = """#!/usr/bin/env bash
number=$(($(wc -l <"$SUBMITTED") + 1))
echo "$*" >>"$SUBMITTED"
cat >"$SUBMITTED.$number"
echo "$number;cluster"
"""


def test_every_stage_is_a_batch_job_that_waits_for_those_before(models: Models, tmp_path: Path) -> None:
    values = stages(models, tmp_path / "out")
    values["slurm"] = {"image": "none", "code": str(REPOSITORY), "server_python": "python"}
    submission = batch_script(read_launch(write(values, tmp_path / "launch.yaml")))
    shellcheck(submission)
    environment = commands_in(tmp_path, 'echo "$@"; if [[ "$*" == *serve_* ]]; then exec sleep 87654; else sleep 1; fi')
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    submitted = tmp_path / "submitted"
    submitted.touch()
    environment |= {"SUBMITTED": str(submitted), "SLURM_JOB_NODELIST_HET_GROUP_2": "node3", "SLURM_JOB_NODELIST": "n"}
    done = subprocess.run(["bash", "-c", submission], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "sft: job 1;cluster\nreward_model: job 2;cluster\nactor: job 3;cluster\n"
    assert submitted.read_text().splitlines() == [
        "--parsable",
        "--parsable --kill-on-invalid-dep=yes --dependency=afterok:1",
        "--parsable --kill-on-invalid-dep=yes --dependency=afterok:1:2",
    ]
    for number, jobs in enumerate((["sft"], ["reward_model"], ["critic", "reward", "actor"]), start=1):
        script = Path(f"{submitted}.{number}").read_text()
        shellcheck(script)
        assert f"#SBATCH --job-name=stages-{jobs[-1].replace('_', '-')}\n" in script
        assert script.count("#SBATCH hetjob") == len(jobs) - 1
        subprocess.run(["bash", "-c", script], env=environment, capture_output=True, timeout=60, check=True)
        for job in jobs:
            line, *_ = (tmp_path / "out" / "logs" / f"{job}.log").read_text().splitlines()
            assert f"/{values['jobs'][job]['script']}.py " in line
            assert f" exp_manager.explicit_log_dir={tmp_path}/out/{job}" in line
    assert processes_of(Path("sleep 87654")) == []
    [actor] = (tmp_path / "out" / "logs" / "actor.log").read_text().splitlines()
    assert f"model.restore_from_path={tmp_path}/out/sft/checkpoints " in actor
    assert "critic.server.url=" in actor


def test_every_stage_is_a_suspended_job_that_one_without_gpus_starts(models: Models) -> None:
    values = stages(models, Path("/data/out"))
    values["kubernetes"] = {"image": "x", "volumes": {"data": "/data"}, "secret": "token"}
    launch = LaunchConfig.model_validate(
        values | {"jobs": {name: job | {"settings": {}} for name, job in values["jobs"].items()}}
    )
    objects = list(yaml.safe_load_all(manifests(launch)))
    for manifest in objects:
        kubernetes_validate.validate(manifest, "1.33", strict=True)
    jobs = {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "Job"}
    assert {name: spec.get("suspend", False) for name, spec in jobs.items()} == {
        "stages-sft": False,
        "stages-reward-model": True,
        "stages-actor": True,
        "stages-stages": False,
    }
    assert [jobs[name]["completions"] for name in ("stages-sft", "stages-reward-model", "stages-actor")] == [1, 1, 3]
    for name, words in (("stages-sft", ["train_gpt_sft"]), ("stages-actor", ["serve_ppo_critic", "train_gpt_ppo_act"])):
        [container] = jobs[name]["template"]["spec"]["containers"]
        shellcheck(f"#!/usr/bin/env bash\n# shellcheck disable=SC2016\n{container['command'][2]}")
        assert all(word in container["command"][2] for word in words)
    starter = jobs["stages-stages"]["template"]["spec"]
    assert "resources" not in starter["containers"][0]
    *python, needs = starter["containers"][0]["command"]
    assert python == ["python", "-u", "-m", "nemo_eppo.launch.stage_starter"]
    before = {"stages-sft": [], "stages-reward-model": ["stages-sft"]}
    assert json.loads(needs) == before | {"stages-actor": ["stages-sft", "stages-reward-model"]}
    [role] = [each for each in objects if each["kind"] == "Role"]
    assert role["rules"][0]["resourceNames"] == list(json.loads(needs))
    assert starter["serviceAccountName"] == role["metadata"]["name"] == "stages-stages"
