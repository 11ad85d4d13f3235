"""A launch file whose jobs start from what its earlier jobs make is checked before any of them has run."""

import json
from pathlib import Path

import pytest
from jobs import Models
from launched import stages, write

from nemo_eppo.cli import main
from nemo_eppo.config import ConfigError
from nemo_eppo.data.tokenizer import word_level
from nemo_eppo.launch.examination import check_launch, examine
from nemo_eppo.launch.job_checks import memory_of
from nemo_eppo.launch.launch_file import read_launch

REWARD = "jobs.reward_model.settings.reward"
INFORM = f"{REWARD}={{kind: inform, inform: {{sft_responses: SFT}}}}"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            ["jobs.actor.settings.method=eppo_inform"],
            "jobs.actor: reward_kind = 'inform', but the job reward has a reward model of kind 'bradley_terry'",
        ),
        ([INFORM, "jobs.actor.settings.method=eppo_inform"], ""),
        (
            ["jobs.actor.settings.shaping.latent_penalty.gamma=1"],
            "needs latents, but none of the reward models in rewards gives any",
        ),
        (
            [f"{REWARD}.kind=odin", "jobs.actor.settings.method=eppo_odin", "jobs.actor.colocate=true"],
            "",
        ),
        (
            ["jobs.actor.settings.method=eppo_odin", "jobs.actor.colocate=true"],
            "jobs.actor: reward_kind = 'odin', but rewards[0].colocated has a reward model of kind 'bradley_terry'",
        ),
        (
            ["jobs.actor.ranks_per_node=3", "jobs.actor.settings.model.parallel.tensor_model_parallel_size=3"],
            "jobs.actor: impossible layout:\n  - model.architecture.num_attention_heads = 4 is not divisible by",
        ),
        (
            ["jobs.critic.ranks_per_node=8", "jobs.critic.settings.model.parallel.pipeline_model_parallel_size=8"],
            "jobs.critic: impossible layout:\n  - model.architecture.num_layers = 4 is not divisible by pipeline",
        ),
        (
            ["jobs.sft.settings.model.architecture.vocab_size=60"],
            "jobs.sft: model: the tokenizer TOKENIZER has 64 tokens, the model 60",
        ),
        (
            ["jobs.reward.settings.model.restore_from_path=${output}/sft/checkpoints", "jobs.reward.needs=[sft]"],
            "the job sft makes a model with head 'lm', expected 'scalar'",
        ),
        (["jobs.critic.settings.model.restore_from_path=${output}/sft/checkpoints/step_000001"], ""),
        (
            ["jobs.critic.settings.model.restore_from_path=${output}/reward_model"],
            "jobs.critic: model.restore_from_path = OUT/reward_model: the job reward_model makes no checkpoint there, "
            "expected OUT/reward_model/checkpoints",
        ),
        (
            ["jobs.reward_model.settings.ensemble={members: 2}"],
            "jobs.reward: model.restore_from_path = OUT/reward_model/checkpoints: the job reward_model makes no "
            "checkpoint there, expected OUT/reward_model/member_0/checkpoints, OUT/reward_model/member_1/checkpoints",
        ),
        (
            ["jobs.reward_model.settings.ensemble={members: 2, average: true}"],
            "jobs.reward_model: ensemble.average = true averages members that share one head",
        ),
        (
            ["jobs.actor.settings.generation.max_new_tokens=40"],
            "jobs.reward: 56 tokens of prompt and response, a window of 48",
        ),
        (
            ["jobs.critic.settings.server.max_batch_size=4"],
            "jobs.critic: server.max_batch_size = 4, the job actor sends ppo.mini_batch_size = 8",
        ),
        (
            ["jobs.critic.settings.model.tokenizer=OTHER"],
            "jobs.critic: model.tokenizer = OTHER",
        ),
        (
            ["jobs.reward.settings.model.lora={}"],
            "jobs.reward: model.lora is for models that are trained",
        ),
        (["jobs.actor.settings.model.lora={}"], ""),
        (["jobs.sft.settings.data.train=DATA"], "jobs.sft: data.train = DATA is a directory, expected a file"),
        (["output=SFT"], "output = SFT: SFT is a file, expected a directory or a free name"),
        (["output=SFT/below"], "output = SFT/below: SFT is a file, expected a directory or a free name"),
    ],
)
def test_a_job_is_checked_against_what_an_earlier_one_will_make(
    models: Models, tmp_path: Path, changes: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    word_level([f"w{number}" for number in range(40)], tmp_path / "other")
    out = tmp_path / "out"

    def filled(text: str) -> str:
        names = {"SFT": models.data / "sft.train.jsonl", "OUT": out, "OTHER": tmp_path / "other"}
        names |= {"DATA": models.data, "TOKENIZER": models.data / "tokenizer"}
        for name, path in names.items():
            text = text.replace(name, str(path))
        return text

    file = write(stages(models, out), tmp_path / "launch.yaml")
    status = main(["launch", str(file), *map(filled, changes), "--dry-run"])
    message = capsys.readouterr().err
    assert filled(fault) in message
    assert status == (2 if fault else 0), message
    assert not out.exists()


def test_on_a_cluster_what_the_settings_say_is_checked_without_any_file(models: Models, tmp_path: Path) -> None:
    values = stages(models, Path("/nowhere/out"))
    values["jobs"]["sft"]["settings"]["model"]["tokenizer"] = "/nowhere/tokenizer"
    file = write(values, tmp_path / "launch.yaml")
    check_launch(read_launch(file), here=False)
    for change, words in (
        ("jobs.actor.settings.method=eppo_inform", "the job reward has a reward model of kind 'bradley_terry'"),
        ("jobs.critic.settings.model.restore_from_path=${output}/sft", "the job sft makes no checkpoint there"),
        ("jobs.reward_model.needs=[]", "is made by the job sft, which is not among its needs"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_launch(read_launch(file, [change]), here=False)


def test_memory_is_estimated_before_anything_was_trained(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(stages(models, tmp_path / "out"), tmp_path / "launch.yaml")
    assert main(["doctor", str(file), "--json"]) == 0
    checks = {finding["check"] for finding in json.loads(capsys.readouterr().out)["findings"]}
    for job in ("sft", "reward_model", "critic", "reward", "actor"):
        assert {f"{job}: memory", f"{job}: layout"} <= checks
    _, jobs = examine(read_launch(file), here=True, files=True)
    memory = {job.name: memory_of(job).staying["model"] for job in jobs}
    assert memory["actor"].weights == memory["sft"].weights > memory["reward"].weights
    assert memory["actor"].reference == memory["sft"].weights
