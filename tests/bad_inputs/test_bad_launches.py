"""Bad launch files, for `nemo-eppo launch` and `nemo-eppo doctor`."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_input import Row, check, prepare, rows, run

LAUNCH: dict[str, Any] = {
    "name": "tiny",
    "output": "out",
    "jobs": {
        "critic": {"script": "serve_ppo_critic", "settings": {"model.restore_from_path": "rm"}},
        "reward": {"script": "serve_reward_model", "settings": {"model.restore_from_path": "rm"}},
        "actor": {
            "script": "train_gpt_ppo_actor",
            "needs": ["critic", "reward"],
            "settings": {
                "model.restore_from_path": "sft",
                "data": {"train": "data/prompts.train.jsonl", "max_prompt_length": 16},
                "generation.max_new_tokens": 20,
                "ppo": {"max_steps": 1, "rollout_batch_size": 8, "mini_batch_size": 8},
            },
        },
    },
}


def launch_file(*keys: Any) -> dict[str, str | bytes | None]:
    """The launch file with another value, the last argument, at the path of keys before."""
    *path, last, value = keys
    launch = copy.deepcopy(LAUNCH)
    section = launch
    for key in path:
        section = section[key]
    section[last] = value
    return {"run.yaml": yaml.safe_dump(launch, sort_keys=False)}


GOOD = launch_file("name", "tiny")
RUN = "launch run.yaml --dry-run"
LAUNCHES = [
    Row("no such file", "launch nowhere.yaml", r"nowhere\.yaml does not exist, expected a launch file"),
    Row("a directory", "launch data", "data is a directory, expected a launch file"),
    Row(
        "an empty file",
        RUN,
        "name: required, but not set - output: required, but not set - jobs: required, but not set",
        {"run.yaml": ""},
    ),
    Row(
        "an index into a list",
        f"{RUN} jobs.actor.needs.0=critic",
        r"jobs\.actor\.needs\.0=critic: .*; a list is given whole, KEY=\[A,B\]",
        GOOD,
    ),
    Row("a list", RUN, r"run\.yaml: expected a mapping with name, output and jobs", {"run.yaml": "- a\n"}),
    Row("a key twice", RUN, r"run\.yaml:2: found duplicate key name: 'name: b'", {"run.yaml": "name: a\nname: b\n"}),
    Row(
        "a tab",
        RUN,
        r"run\.yaml:2: found character '\\t' that cannot start any token: '\\tactor: \{\}'",
        {"run.yaml": "jobs:\n\tactor: {}\n"},
    ),
    Row(
        "not UTF-8",
        RUN,
        r"run\.yaml: 'utf-8' codec can't decode byte 0xff in position 6: invalid start byte",
        {"run.yaml": b"name: \xff\n"},
    ),
    Row(
        "no jobs", RUN, "jobs: Dictionary should have at least 1 item after validation, not 0", launch_file("jobs", {})
    ),
    Row(
        "jobs that are a list",
        RUN,
        r"jobs = \['actor'\]: Input should be a valid dictionary",
        launch_file("jobs", ["actor"]),
    ),
    Row(
        "settings that are a list",
        RUN,
        r"jobs\.actor\.settings = \['a'\]: Input should be a valid dictionary",
        launch_file("jobs", "actor", "settings", ["a"]),
    ),
    Row(
        "a name of capitals",
        RUN,
        r"name = 'My Run': expected up to 40 lower case letters, digits and inner dashes, the first a letter",
        launch_file("name", "My Run"),
    ),
    Row("an unknown key", RUN, r"job: unknown key \(did you mean 'jobs'\?\)", launch_file("job", {})),
    Row(
        "an unknown script",
        RUN,
        r"jobs\.critic\.script = 'serve_critic': Input should be 'train_gpt_sft', 'train_reward_model',",
        launch_file("jobs", "critic", "script", "serve_critic"),
    ),
    Row(
        "an unknown need",
        RUN,
        r"settings do not fit together: jobs\.actor\.needs: no job 'rewards' \(jobs: critic, reward, actor\)",
        launch_file("jobs", "actor", "needs", ["critic", "rewards"]),
    ),
    Row(
        "a circle",
        RUN,
        "settings do not fit together: jobs need each other in a circle: critic -> actor -> critic",
        launch_file("jobs", "critic", "needs", ["actor"]),
    ),
    Row(
        "no critic",
        RUN,
        r"jobs\.actor\.needs: expected one serve_ppo_critic, found none",
        launch_file("jobs", "actor", "needs", ["reward"]),
    ),
    Row(
        "no ranks",
        RUN,
        r"jobs\.actor\.ranks_per_node = 0: Input should be greater than or equal to 1",
        launch_file("jobs", "actor", "ranks_per_node", 0),
    ),
    Row(
        "ranks that the layout does not fill",
        RUN,
        r"jobs\.actor: world size 1 is not divisible by tensor_model_parallel_size 2 x",
        launch_file("jobs", "actor", "settings", "model.parallel.tensor_model_parallel_size", 2),
    ),
    Row(
        "a misspelt setting of a job",
        RUN,
        r"jobs\.actor: invalid configuration: - ppo\.mini_batch: unknown key \(did you mean 'mini_batch_size'\?\)",
        launch_file("jobs", "actor", "settings", "ppo", "mini_batch", 8),
    ),
    Row(
        "a method that needs other rewards",
        RUN,
        r"jobs\.actor: reward_kind = 'inform', but the job reward has a reward model of kind 'bradley_terry'",
        launch_file("jobs", "actor", "settings", "method", "eppo_inform"),
    ),
    Row(
        "an unknown method",
        RUN,
        r"jobs\.actor: cannot read the settings .*gpt_ppo_actor\.yaml: In 'gpt_ppo_actor': Could not find",
        launch_file("jobs", "actor", "settings", "method", "epo"),
    ),
    Row(
        "a model that is nowhere",
        RUN,
        r"jobs\.reward: model\.restore_from_path = nowhere does not exist",
        launch_file("jobs", "reward", "settings", "model.restore_from_path", "nowhere"),
    ),
    Row(
        "a model that no earlier job makes",
        RUN,
        r"jobs\.reward: model\.restore_from_path = out/critic/checkpoints is made by the job critic, which is",
        launch_file("jobs", "reward", "settings", "model.restore_from_path", "out/critic/checkpoints"),
    ),
    Row(
        "data that are nowhere",
        RUN,
        r"jobs\.actor: data\.train = nowhere\.jsonl does not exist",
        launch_file("jobs", "actor", "settings", "data", "train", "nowhere.jsonl"),
    ),
    Row(
        "an address that is filled in",
        RUN,
        r"jobs\.actor: critic\.server\.url = 'grpc://a:1': expected no value here, the launcher sets it",
        launch_file("jobs", "actor", "settings", "critic.server.url", "grpc://a:1"),
    ),
    Row(
        "a run directory that is filled in",
        RUN,
        r"jobs\.actor: exp_manager\.explicit_log_dir = 'a': expected no value here, the launcher sets it",
        launch_file("jobs", "actor", "settings", "exp_manager.explicit_log_dir", "a"),
    ),
    Row(
        "a port that is text",
        RUN,
        r"settings do not fit together: jobs\.critic\.settings\.server\.port = 'abc': expected 0 \(any\) to 65535",
        launch_file("jobs", "critic", "settings", "server.port", "abc"),
    ),
    Row(
        "a port twice",
        f"{RUN} jobs.critic.settings.server.port=23456 jobs.reward.settings.server.port=23456",
        r"jobs\.reward\.settings\.server\.port = 23456: the job critic has it already",
        GOOD,
    ),
    Row(
        "an output that is a file",
        RUN,
        "output = out: .*out is a file, expected a directory or a free name",
        {**GOOD, "out": ""},
    ),
    Row("no value", f"{RUN} jobs.actor.settings.seed", r"jobs\.actor\.settings\.seed: expected KEY=VALUE", GOOD),
    Row(
        "a key twice in the command",
        f"{RUN} name=a name=b",
        "name is given twice on the command line: name=a and name=b",
        GOOD,
    ),
    Row("an unknown option", f"{RUN} --force", "unrecognized arguments: --force", GOOD),
    Row(
        "an unknown backend",
        f"{RUN} --backend ray",
        r"argument --backend: invalid choice: 'ray'",
        GOOD,
    ),
    Row(
        "Slurm without its settings",
        f"{RUN} --backend slurm",
        "slurm: required with --backend slurm, but not set; expected options of sbatch, and the",
        GOOD,
    ),
    Row(
        "Kubernetes without its settings",
        f"{RUN} --backend kubernetes",
        "kubernetes: required with --backend kubernetes, but not set; expected the container image, the",
        GOOD,
    ),
    Row(
        "a file of manifests for this machine",
        f"{RUN} --output run.sbatch",
        r"--output: nothing is written with --backend local; `output` of the launch file is meant\?",
        GOOD,
    ),
    Row(
        "an interpolation of nothing",
        RUN,
        r"run\.yaml: output: Interpolation key 'nowhere' not found",
        launch_file("output", "${nowhere}/out"),
    ),
    Row(
        "an interpolation in a circle",
        RUN,
        r"run\.yaml: output: Recursive interpolation detected",
        launch_file("output", "${output}"),
    ),
    Row(
        "prompts without a prompt",
        "doctor run.yaml",
        r"actor: data\.train rows\.jsonl:1: field 'prompt' is missing \(the line has: text\) -> expected JSON",
        {**launch_file("jobs", "actor", "settings", "data", "train", "rows.jsonl"), **rows({"text": "a"})},
        status=1,
    ),
]


@pytest.mark.parametrize("row", LAUNCHES, ids=str)
def test_ends_with_one_clear_message(row: Row, world: Path, directory: Path) -> None:
    check(row, f"nemo-eppo {row.command}", world, directory)


def test_the_same_file_without_a_fault_is_accepted(world: Path, directory: Path) -> None:
    prepare(world, directory, Row("", "", "", GOOD))
    status, output = run(f"nemo-eppo {RUN}", directory)
    assert status == 0, output
