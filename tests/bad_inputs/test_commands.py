"""Bad inputs of the `nemo-eppo` commands: their arguments, launch files, models and data."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bad_input import Row, check, rows, tensors, truncated, written

_PAIR = {"chosen": "\n\nHuman: copy\n\nAssistant: the", "rejected": "\n\nHuman: copy\n\nAssistant: a"}
_ROW = {"prompt": "apple", "response": "river"}

HH = "prepare hh --input rows.jsonl --output out --vocab-size 300"
PREPARE = [
    Row("an unknown corpus", "prepare ultrafeedback --input rows.jsonl --output out", ""),
    Row("no corpus", "prepare", ""),
    Row("no input", "prepare hh --output out", ""),
    Row("input and hub", "prepare hh --input rows.jsonl --hub a/b --output out", ""),
    Row("no such input", "prepare hh --input nowhere.jsonl --output out", ""),
    Row("a directory", "prepare hh --input data --output out", ""),
    Row("another format", "prepare hh --input rows.csv --output out", "", {"rows.csv": "chosen,rejected\n"}),
    Row("an empty file", HH, "", {"rows.jsonl": ""}),
    Row("an archive that is none", "prepare hh --input rows.jsonl.gz --output out", "", {"rows.jsonl.gz": "x"}),
    Row("a table that is none", "prepare hh --input rows.parquet --output out", "", {"rows.parquet": "x"}),
    Row(
        "an array that is cut", "prepare hh --input rows.json --output out", "", {"rows.json": f"[{json.dumps(_PAIR)},"}
    ),
    Row(
        "an array that is nested too deep",
        "prepare hh --input rows.json --output out",
        "",
        {"rows.json": "[" * 200_000},
    ),
    Row("no row that can be used", HH, "", rows(_ROW, _ROW)),
    Row("a broken row when asked to stop there", f"{HH} --strict", "", rows(_PAIR, '{"chosen": ')),
    Row("a row nested too deep when asked to stop", f"{HH} --strict", "", rows(_PAIR, "[" * 200_000)),
    Row("another corpus", "prepare tldr --input rows.jsonl --output out --strict", "", rows(_PAIR)),
    Row("everything held out", f"{HH} --validation-fraction 1", "", rows(_PAIR)),
    Row("a fraction of NaN", f"{HH} --validation-fraction nan", "", rows(_PAIR)),
    Row("a fraction in words", f"{HH} --validation-fraction half", "", rows(_PAIR)),
    Row("one prompt, which cannot be split", HH, "", rows(_PAIR)),
    Row("a limit of 0", f"{HH} --max-prompt-tokens 0", "", rows(_PAIR)),
    Row("a vocabulary below 256", "prepare hh --input rows.jsonl --output out --vocab-size 8", "", rows(*[_PAIR] * 3)),
    Row("no such tokenizer", "prepare hh --input rows.jsonl --output out --tokenizer nowhere", "", rows(_PAIR)),
    Row(
        "a template that the tokenizer lacks",
        "prepare hh --input rows.jsonl --output out --tokenizer data/tokenizer --chat-template",
        "",
        rows(_PAIR),
    ),
    Row(
        "a broken template",
        f"{HH} --chat-template chat.jinja",
        "",
        {**rows(_PAIR), "chat.jinja": "{% for m in messages %}"},
    ),
    Row("an output that exists", "prepare hh --input rows.jsonl --output out", "", {**rows(_PAIR), "out/file": ""}),
    Row("an output below a file", "prepare hh --input rows.jsonl --output rows.jsonl/out", "", rows(_PAIR)),
    Row("a toy task of no prompts", "prepare noun-task --output out --prompts 0", ""),
    Row("a toy task of a negative size", "prepare noun-task --output out --sft-examples -5", ""),
]

CONVERT = [
    Row("an unknown conversion", "convert hf-to-nemo --input hf --output out", ""),
    Row("no such input", "convert hf-to-megatron --input nowhere --output out", ""),
    Row("a file", "convert hf-to-megatron --input file --output out", "", {"file": ""}),
    Row("a checkpoint for a Hugging Face directory", "convert hf-to-megatron --input sft --output out", ""),
    Row("a Hugging Face directory for a checkpoint", "convert megatron-to-hf --input hf --output out", ""),
    Row("an output that exists", "convert hf-to-megatron --input hf --output out", "", {"out/file": ""}),
    Row("an output below a file", "convert hf-to-megatron --input hf --output file/out", "", {"file": ""}),
    Row("an unknown precision", "convert hf-to-megatron --input hf --output out --precision int8", ""),
    Row(
        "a misshapen tensor",
        "convert hf-to-megatron --input hf --output out",
        "",
        change=("hf", tensors(model__norm__weight=torch.ones(5))),
    ),
    Row("a reward model for a policy", "convert megatron-to-hf --input rm --output out", ""),
    Row("a policy for a reward model", "convert reward-to-hf --input sft --output out", ""),
    Row(
        "an architecture that does not fit",
        "convert megatron-to-hf --input sft --output out --architecture GPT2LMHeadModel",
        "",
    ),
    Row("a truncated checkpoint", "convert megatron-to-hf --input sft --output out", "", change=("sft", truncated)),
    Row(
        "a broken manifest",
        "convert megatron-to-hf --input sft --output out",
        "",
        change=("sft", written("manifest.json", "{")),
    ),
    Row("files of NaN bytes", "convert megatron-to-hf --input sft --output out --max-shard-gb nan", ""),
    Row("no settings of NeMo-Aligner", "convert aligner-config nowhere.yaml", ""),
    Row("broken settings of NeMo-Aligner", "convert aligner-config a.yaml", "", {"a.yaml": "model: {a: [1\nb: 2\n"}),
    Row("a list for settings of NeMo-Aligner", "convert aligner-config a.yaml", "", {"a.yaml": "- a\n"}),
    Row("empty settings of NeMo-Aligner", "convert aligner-config a.yaml", "", {"a.yaml": ""}),
    Row("settings of no known kind", "convert aligner-config a.yaml", "", {"a.yaml": "optim: 1\n"}),
    Row("settings of an unknown kind", "convert aligner-config a.yaml --kind dpo", "", {"a.yaml": "trainer: {}\n"}),
    Row(
        "settings to an existing file", "convert aligner-config a.yaml --output a.yaml", "", {"a.yaml": "trainer: {}\n"}
    ),
]

SCORE = "score --model sft --data rows.jsonl --output scores.jsonl"
SCORING = [
    Row("no such model", "score --model nowhere --data rows.jsonl --output scores.jsonl", "", rows(_ROW)),
    Row("no such data", SCORE, ""),
    Row("no model", "score --data rows.jsonl --output scores.jsonl", "", rows(_ROW)),
    Row("a reward model", "score --model rm --data rows.jsonl --output scores.jsonl", "", rows(_ROW)),
    Row("no rows", SCORE, "", rows()),
    Row("a missing response", SCORE, "", rows(_ROW, {"prompt": "apple"})),
    Row("token ids of another vocabulary", SCORE, "", rows({"prompt_ids": [3], "response_ids": [99999]})),
    Row("token ids that are text", SCORE, "", rows({"prompt_ids": ["3"], "response_ids": [4]})),
    Row("a row beyond the window", SCORE, "", rows({"prompt_ids": [3], "response_ids": [4] * 60})),
    Row("a row nested too deep", SCORE, "", rows(_ROW, '{"prompt": ' + "[" * 200_000)),
    Row("an unknown preset", f"{SCORE} --preset residual", "", rows(_ROW)),
    Row("a layer that there is not", f"{SCORE} --layer 4", "", rows(_ROW)),
    Row("a batch of 0", f"{SCORE} --batch-size 0", "", rows(_ROW)),
    Row("TP that does not divide the heads", f"{SCORE} --tp 3", "", rows(_ROW)),
    Row("no template", f"{SCORE} --chat-template", "", rows(_ROW)),
    Row("an output below a file", f"{SCORE} --output rows.jsonl/scores", "", rows(_ROW)),
    Row("an output in no directory", f"{SCORE} --output nowhere/scores.jsonl", "", rows(_ROW)),
    Row("an output of something else", f"{SCORE} --output other.jsonl", "", {**rows(_ROW), "other.jsonl": "x\n"}),
    Row("an output that is a directory", f"{SCORE} --output out", "", {**rows(_ROW), "out": None}),
]

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
    Row("no such file", "launch nowhere.yaml", ""),
    Row("a directory", "launch data", ""),
    Row("an empty file", RUN, "", {"run.yaml": ""}),
    Row("a list", RUN, "", {"run.yaml": "- a\n"}),
    Row("a key twice", RUN, "", {"run.yaml": "name: a\nname: b\n"}),
    Row("a tab", RUN, "", {"run.yaml": "jobs:\n\tactor: {}\n"}),
    Row("not UTF-8", RUN, "", {"run.yaml": b"name: \xff\n"}),
    Row("no jobs", RUN, "", launch_file("jobs", {})),
    Row("jobs that are a list", RUN, "", launch_file("jobs", ["actor"])),
    Row("settings that are a list", RUN, "", launch_file("jobs", "actor", "settings", ["a"])),
    Row("a name of capitals", RUN, "", launch_file("name", "My Run")),
    Row("an unknown key", RUN, "", launch_file("job", {})),
    Row("an unknown script", RUN, "", launch_file("jobs", "critic", "script", "serve_critic")),
    Row("an unknown need", RUN, "", launch_file("jobs", "actor", "needs", ["critic", "rewards"])),
    Row("a circle", RUN, "", launch_file("jobs", "critic", "needs", ["actor"])),
    Row("no critic", RUN, "", launch_file("jobs", "actor", "needs", ["reward"])),
    Row("no ranks", RUN, "", launch_file("jobs", "actor", "ranks_per_node", 0)),
    Row(
        "ranks that the layout does not fill",
        RUN,
        "",
        launch_file("jobs", "actor", "settings", "model.parallel.tensor_model_parallel_size", 2),
    ),
    Row("a misspelt setting of a job", RUN, "", launch_file("jobs", "actor", "settings", "ppo", "mini_batch", 8)),
    Row(
        "a method that needs other rewards", RUN, "", launch_file("jobs", "actor", "settings", "method", "eppo_inform")
    ),
    Row("an unknown method", RUN, "", launch_file("jobs", "actor", "settings", "method", "epo")),
    Row(
        "a model that is nowhere",
        RUN,
        "",
        launch_file("jobs", "reward", "settings", "model.restore_from_path", "nowhere"),
    ),
    Row(
        "a model that no earlier job makes",
        RUN,
        "",
        launch_file("jobs", "reward", "settings", "model.restore_from_path", "out/critic/checkpoints"),
    ),
    Row("data that are nowhere", RUN, "", launch_file("jobs", "actor", "settings", "data", "train", "nowhere.jsonl")),
    Row(
        "an address that is filled in",
        RUN,
        "",
        launch_file("jobs", "actor", "settings", "critic.server.url", "grpc://a:1"),
    ),
    Row(
        "a run directory that is filled in",
        RUN,
        "",
        launch_file("jobs", "actor", "settings", "exp_manager.explicit_log_dir", "a"),
    ),
    Row("a port that is text", RUN, "", launch_file("jobs", "critic", "settings", "server.port", "abc")),
    Row(
        "a port twice", f"{RUN} jobs.critic.settings.server.port=23456 jobs.reward.settings.server.port=23456", "", GOOD
    ),
    Row("an output that is a file", RUN, "", {**GOOD, "out": ""}),
    Row("no value", f"{RUN} jobs.actor.settings.seed", "", GOOD),
    Row("a key twice in the command", f"{RUN} name=a name=b", "", GOOD),
    Row("an unknown option", f"{RUN} --force", "", GOOD),
    Row("an unknown backend", f"{RUN} --backend ray", "", GOOD),
    Row("Slurm without its settings", f"{RUN} --backend slurm", "", GOOD),
    Row("Kubernetes without its settings", f"{RUN} --backend kubernetes", "", GOOD),
    Row("a file of manifests for this machine", f"{RUN} --output run.sbatch", "", GOOD),
    Row("an interpolation of nothing", RUN, "", launch_file("output", "${nowhere}/out")),
    Row("an interpolation in a circle", RUN, "", launch_file("output", "${output}")),
]

DOCTOR = [
    Row("no such launch file", "doctor nowhere.yaml", "", status=1),
    Row("a broken launch file", "doctor run.yaml", "", {"run.yaml": "jobs: [\n"}, status=1),
    Row("a URL of http", "doctor --server http://127.0.0.1:5555", "", status=1),
    Row("a server that is not there", "doctor --server grpc://127.0.0.1:9", "", status=1),
    Row("certificates that are nowhere", "doctor --server grpc://127.0.0.1:9 --certificates nowhere", "", status=1),
    Row(
        "prompts without a prompt",
        "doctor run.yaml",
        "",
        {**launch_file("jobs", "actor", "settings", "data", "train", "rows.jsonl"), **rows({"text": "a"})},
        status=1,
    ),
]

OTHERS = [
    Row("no command", "", ""),
    Row("an unknown command", "train", ""),
    Row("a folder of certificates that exists", "certificates data", ""),
    Row("a folder of certificates below a file", "certificates file/pem", "", {"file": ""}),
    Row("no folder of certificates", "certificates", ""),
]

TABLE = [*PREPARE, *CONVERT, *SCORING, *LAUNCHES, *DOCTOR, *OTHERS]


@pytest.mark.parametrize("row", TABLE, ids=[f"{row.command.partition(' ')[0]}: {row}" for row in TABLE])
def test_ends_with_one_clear_message(row: Row, world: Path, directory: Path) -> None:
    check(row, f"nemo-eppo {row.command}", world, directory)
