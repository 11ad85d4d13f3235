"""Bad inputs of the job scripts: settings, their files, and the models and data that they name."""

import json
import re
from pathlib import Path

import pytest
import torch
from bad_input import (
    BUILT,
    Row,
    check,
    edited,
    other_tokenizer,
    prepare,
    removed,
    rows,
    run,
    tensors,
    truncated,
    written,
)

_FIT = "fit.global_batch_size=4 exp_manager.explicit_log_dir=run"
BASE = {
    "train_gpt_sft": "model.restore_from_path=sft data.train=data/sft.train.jsonl "
    f"data.validation=data/sft.validation.jsonl {_FIT}",
    "train_reward_model": "model.restore_from_path=sft data.train=data/preferences.train.jsonl "
    f"data.validation=data/preferences.validation.jsonl {_FIT}",
    "train_gpt_ppo_actor": "model.restore_from_path=sft data.train=data/prompts.train.jsonl data.max_prompt_length=16 "
    "generation.max_new_tokens=20 ppo.max_steps=1 ppo.rollout_batch_size=8 ppo.mini_batch_size=8 "
    "exp_manager.explicit_log_dir=run",
    "serve_ppo_critic": "model.restore_from_path=rm server.port=0 exp_manager.explicit_log_dir=run",
    "serve_reward_model": "model.restore_from_path=rm server.port=0 exp_manager.explicit_log_dir=run",
}
"""Arguments with which each script runs."""


def command(script: str, arguments: str) -> str:
    """The script's command line: what `BASE` has, but for the keys that the arguments set."""
    given = {argument.partition("=")[0].lstrip("+~") for argument in arguments.split()}
    kept = [argument for argument in BASE[script].split() if argument.partition("=")[0] not in given]
    return " ".join([script, *kept, arguments])


def yaml_file(text: str | bytes) -> dict[str, str | bytes]:
    return {"settings/mine.yaml": text}


MINE = "--config-dir settings --config-name mine"
_TRAIN = "data.train=rows.jsonl"
_ROW = {"prompt": "apple", "response": "river"}
_PAIR = {"prompt": "apple", "chosen": "river", "rejected": "queen"}


SETTINGS = [
    Row("YAML: a key twice", MINE, "", yaml_file("seed: 1\nseed: 2\n")),
    Row("YAML: a tab", MINE, "", yaml_file("model:\n\tprecision: bf16\n")),
    Row("YAML: broken", MINE, "", yaml_file("model: {precision: bf16\nseed: 1\n")),
    Row("YAML: a list", MINE, "", yaml_file("- seed: 1\n")),
    Row("YAML: a text", MINE, "", yaml_file("seed\n")),
    Row("YAML: empty", MINE, "", yaml_file("")),
    Row("YAML: not UTF-8", MINE, "", yaml_file(b"seed: \xff\xfe\n")),
    Row("YAML: a directory", MINE, "", {"settings/mine.yaml": None}),
    Row("YAML: missing", MINE, "", {"settings/other.yaml": "seed: 1"}),
    Row("YAML: an interpolation of nothing", MINE, "", yaml_file("defaults: [gpt_sft, _self_]\nseed: ${no.such}\n")),
    Row("YAML: an unknown key", MINE, "", yaml_file("defaults: [gpt_sft, _self_]\nmodle: {precision: bf16}\n")),
    Row("no such folder of settings", "--config-dir nowhere", ""),
    Row("a misspelt key", "model.restore_form_path=sft", ""),
    Row("a key of NeMo-Aligner", "trainer.num_nodes=2", ""),
    Row("a key of TRL", "per_device_train_batch_size=8", ""),
    Row("a key twice", "seed=1 seed=2", ""),
    Row("no value", "seed", ""),
    Row("an unknown option", "--max-steps 5", ""),
    Row("broken brackets", "model.parallel={tensor_model_parallel_size:2", ""),
    Row("a text for a number", "optimizer.lr=fast", ""),
    Row("a number with a comma", "optimizer.lr=1,5", ""),
    Row("a number for a section", "model.parallel=2", ""),
    Row("a list for a number", "fit.global_batch_size=[4]", ""),
    Row("a fraction for a count", "fit.global_batch_size=4.5", ""),
    Row("a learning rate of NaN", "optimizer.lr=nan", ""),
    Row("an infinite learning rate", "optimizer.lr=inf", ""),
    Row("a negative learning rate", "optimizer.lr=-1e-5", ""),
    Row("a learning rate of 0", "optimizer.lr=0", ""),
    Row("a huge learning rate", "optimizer.lr=1e9", ""),
    Row("a batch of 0", "fit.global_batch_size=0", ""),
    Row("a negative seed", "seed=-1", ""),
    Row("a huge seed", "seed=1000000000000000000000000", ""),
    Row("null where a value is needed", "fit.global_batch_size=null", ""),
    Row("no model", "model.restore_from_path=null", ""),
    Row("an unknown precision", "model.precision=fp16", ""),
    Row("epochs and steps", "fit.epochs=1 fit.max_steps=5", ""),
    Row(
        "a checkpoint and a fresh architecture",
        "model.architecture={num_layers:1,hidden_size:8,ffn_hidden_size:8,num_attention_heads:1,max_sequence_length:9}",
        "",
    ),
    Row("an unknown metric of the best", "checkpoint.best=validation/accuracy", ""),
    Row("a time limit in hours", "exp_manager.max_time_per_run=4h", ""),
    Row("W&B without a project", "exp_manager.create_wandb_logger=true", ""),
    Row("TP over more ranks than there are", "model.parallel.tensor_model_parallel_size=2", ""),
    Row("TP that does not divide the heads", "model.parallel.tensor_model_parallel_size=3", ""),
    Row("PP that does not divide the layers", "model.parallel.pipeline_model_parallel_size=3", ""),
    Row("sequence parallelism alone", "model.parallel.sequence_parallel=true", ""),
    Row("an unknown target of LoRA", "model.lora={targets:[q_proj]}", ""),
    Row("a run directory below a file", "exp_manager.explicit_log_dir=file/run", "", {"file": "x"}, status=1),
    Row("a run directory that is a file", "exp_manager.explicit_log_dir=run", "", {"run": "x"}, status=1),
    Row("another script's run directory", "", "", {"run/config.yaml": "# settings of train_reward_model.py\n"}),
    Row(
        "a run directory that may not be resumed",
        "exp_manager.resume_if_exists=false",
        "",
        {"run/config.yaml": "# settings of train_gpt_sft.py\n"},
    ),
]
"""Settings of every script, tried with that of SFT."""

DATA = [
    Row("no such file", "data.train=nowhere.jsonl", ""),
    Row("a directory", "data.train=data", ""),
    Row("an empty file", _TRAIN, "", {"rows.jsonl": ""}),
    Row("blank lines alone", _TRAIN, "", {"rows.jsonl": "\n\n  \n"}),
    Row("an archive that is none", "data.train=rows.jsonl.gz", "", {"rows.jsonl.gz": '{"prompt": "queen"}\n'}),
    Row("the training file twice", "data.validation=data/sft.train.jsonl", ""),
    Row("CSV", _TRAIN, "", rows("prompt,response", "apple,the")),
    Row("one JSON array", _TRAIN, "", {"rows.jsonl": json.dumps([_ROW])}),
    Row("broken JSON", _TRAIN, "", rows(_ROW, '{"prompt": "apple", "response": ')),
    Row("nothing but NUL", _TRAIN, "", {"rows.jsonl": "\0" * 4096}),
    Row("bytes that are not UTF-8", _TRAIN, "", {"rows.jsonl": b'{"prompt": "\xff", "response": "river"}\n'}),
    Row("UTF-16", _TRAIN, "", {"rows.jsonl": (json.dumps(_ROW) + "\n").encode("utf-16")}),
    Row("a key twice in a row", _TRAIN, "", rows('{"prompt": "apple", "prompt": "river", "response": "queen"}')),
    Row("200,000 nested arrays", _TRAIN, "", rows('{"prompt": ' + "[" * 200_000 + "]" * 200_000 + "}")),
    Row("a number with 10,000 digits", _TRAIN, "", rows('{"prompt": ' + "1" * 10_000 + ', "response": "queen"}')),
    Row("NaN for a text", _TRAIN, "", rows('{"prompt": NaN, "response": "river"}')),
    Row("null for a text", _TRAIN, "", rows(_ROW, {"prompt": None, "response": "river"})),
    Row(
        "messages for a text", _TRAIN, "", rows({"prompt": [{"role": "user", "content": "apple"}], "response": "queen"})
    ),
    Row("half a surrogate pair", _TRAIN, "", rows('{"prompt": "\\ud800", "response": "river"}')),
    Row("a missing field", _TRAIN, "", rows({"prompt": "apple"})),
    Row("fields of NeMo-Aligner", _TRAIN, "", rows({"input": "apple", "output": "river"})),
    Row("pairs for SFT", "data.train=data/preferences.train.jsonl", ""),
    Row("an empty prompt", _TRAIN, "", rows({"prompt": "", "response": "river"})),
    Row("an empty response", _TRAIN, "", rows({"prompt": "apple", "response": ""})),
    Row("a response of spaces", _TRAIN, "", rows(_ROW, {"prompt": "apple", "response": "   "})),
    Row("a row beyond the window", _TRAIN, "", rows({"prompt": "apple", "response": "river " * 60})),
    Row("no row within the limit", f"{_TRAIN} data.max_sequence_length=2 data.too_long=drop", "", rows(_ROW, _ROW)),
    Row("a limit beyond the window", "data.max_sequence_length=100", ""),
    Row("fewer rows than a batch", "fit.global_batch_size=64", ""),
    Row("a word that the tokenizer lacks", _TRAIN, "", rows({"prompt": "apple", "response": "Ωmega"})),
]
"""Data, tried with SFT."""

MODELS = [
    Row("no such model", "model.restore_from_path=meta-llama/Llama-3.1-8B", ""),
    Row("a file", "model.restore_from_path=file", "", {"file": "x"}),
    Row("an empty directory", "model.restore_from_path=empty", "", {"empty": None}),
    Row("a checkpoint with another head", "model.restore_from_path=rm", ""),
    Row("a truncated file of weights", "", "", change=("sft", truncated)),
    Row("a checkpoint without weights", "", "", change=("sft", removed("weights"))),
    Row("a checkpoint without tokenizer", "", "", change=("sft", removed("tokenizer"))),
    Row("a broken manifest", "", "", change=("sft", written("manifest.json", "{"))),
    Row("an empty manifest", "", "", change=("sft", written("manifest.json", ""))),
    Row("a manifest that lacks the model", "", "", change=("sft", edited("manifest.json", model=None))),
    Row("a manifest of a later version", "", "", change=("sft", edited("manifest.json", format=9))),
    Row(
        "a manifest that names files outside",
        "",
        "",
        change=("sft", edited("manifest.json", files={"../../secret": {"size": 1, "sha256": "0"}})),
    ),
    Row("a broken tokenizer", "model.tokenizer=tokenizer", "", {"tokenizer/tokenizer.json": "{"}),
    Row("no such tokenizer", "model.tokenizer=nowhere", ""),
    Row("a tokenizer of another model", "model.tokenizer=words", "", change=("words", other_tokenizer)),
    Row("HF: no config.json", "model.restore_from_path=hf", "", change=("hf", removed("config.json"))),
    Row("HF: broken config.json", "model.restore_from_path=hf", "", change=("hf", written("config.json", "{"))),
    Row("HF: config.json of a list", "model.restore_from_path=hf", "", change=("hf", written("config.json", "[]"))),
    Row(
        "HF: an unknown architecture",
        "model.restore_from_path=hf",
        "",
        change=("hf", edited("config.json", architectures=["GPT2LMHeadModel"])),
    ),
    Row(
        "HF: no architecture",
        "model.restore_from_path=hf",
        "",
        change=("hf", edited("config.json", architectures=None)),
    ),
    Row(
        "HF: architectures that are a text",
        "model.restore_from_path=hf",
        "",
        change=("hf", edited("config.json", architectures="LlamaForCausalLM")),
    ),
    Row(
        "HF: a text for the width",
        "model.restore_from_path=hf",
        "",
        change=("hf", edited("config.json", hidden_size="wide")),
    ),
    Row("HF: no width", "model.restore_from_path=hf", "", change=("hf", edited("config.json", hidden_size=None))),
    Row(
        "HF: an activation that is not supported",
        "model.restore_from_path=hf",
        "",
        change=("hf", edited("config.json", hidden_act="relu")),
    ),
    Row(
        "HF: another vocabulary", "model.restore_from_path=hf", "", change=("hf", edited("config.json", vocab_size=99))
    ),
    Row("HF: no weights", "model.restore_from_path=hf", "", change=("hf", removed("model.safetensors"))),
    Row(
        "HF: weights that are none",
        "model.restore_from_path=hf",
        "",
        change=("hf", written("model.safetensors", "version https://git-lfs")),
    ),
    Row(
        "HF: a missing tensor",
        "model.restore_from_path=hf",
        "",
        change=("hf", tensors(layers__1__mlp__up_proj__weight=None)),
    ),
    Row(
        "HF: a misshapen tensor",
        "model.restore_from_path=hf",
        "",
        change=("hf", tensors(model__norm__weight=torch.ones(5))),
    ),
    Row(
        "HF: quantised weights",
        "model.restore_from_path=hf",
        "",
        change=("hf", tensors(model__norm__weight=torch.ones(32, dtype=torch.int8))),
    ),
    Row("HF: no tokenizer", "model.restore_from_path=hf", "", change=("hf", removed("tokenizer.json"))),
    Row(
        "HF: a tokenizer with code of its own",
        "model.restore_from_path=hf",
        "",
        change=(
            "hf",
            edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own"),
        ),
    ),
    Row("HF: a reward model for SFT", "model.restore_from_path=hf_rm", ""),
]
"""Models, tried with SFT."""

REWARD_TRAINING = [
    Row("demonstrations for pairs", "data.train=data/sft.train.jsonl", ""),
    Row("both sides empty", _TRAIN, "", rows({"prompt": "apple", "chosen": "", "rejected": " "})),
    Row("both sides equal", _TRAIN, "", rows(*[_PAIR | {"rejected": "river"}] * 4)),
    Row("an unknown kind", "reward.kind=pairrm", ""),
    Row("InfoRM without SFT responses", "reward.kind=inform", ""),
    Row("an average of one", "ensemble.average=true", ""),
    Row("an average of different heads", "ensemble.members=2 ensemble.average=true", ""),
    Row("a member's learning rate of 0", "ensemble.members=2 ensemble.lrs=[0.0,1e-5]", ""),
]

ACTOR = [
    Row("an unknown method", "method=epo", ""),
    Row("a method twice", "method=eppo method=ppo", ""),
    Row("a method as a key", "+method.name=eppo", ""),
    Row("a mini-batch that does not divide", "ppo.mini_batch_size=3", ""),
    Row("more prompts than there are", "ppo.rollout_batch_size=64", ""),
    Row("a prompt that is too long", "data.max_prompt_length=5", ""),
    Row("more tokens than the window", "generation.max_new_tokens=40", ""),
    Row("no new tokens", "generation.max_new_tokens=0", ""),
    Row("a negative temperature", "generation.temperature=-1", ""),
    Row("top_p above 1", "generation.top_p=1.5", ""),
    Row("greedy rollouts", "generation.greedy=true", ""),
    Row("stop strings that are no list", "generation.stop_strings=Human", ""),
    Row("more least than most new tokens", "generation.min_new_tokens=30", ""),
    Row("a negative eta", "shaping.energy_penalty.eta=-2", ""),
    Row("an unknown energy", "energy.preset=residual", ""),
    Row("a layer that there is not", "energy.layers=[7]", ""),
    Row("an unknown term", "shaping.energy_pnalty.eta=2", ""),
    Row("an own term of no module", 'shaping.terms=[{name:own,term:"nowhere:Term"}]', ""),
    Row("an own term that follows none", 'shaping.terms=[{name:own,term:"nowhere:Term",after:kll}]', ""),
    Row("lambda without GAE", "method=grpo +ppo.advantages.lam=0.9", ""),
    Row("GRPO with one sample", "method=grpo ppo.samples_per_prompt=1", ""),
    Row("GAE without a critic", "critic=null", ""),
    Row("a critic without GAE", "method=grpo +critic.server.url=grpc://127.0.0.1:5555", ""),
    Row("a URL of http", "critic.server.url=http://127.0.0.1:5555", ""),
    Row("a URL without port", "critic.server.url=grpc://127.0.0.1", ""),
    Row("a port beyond 65535", "critic.server.url=grpc://127.0.0.1:99999", ""),
    Row("no rewards", "rewards=[]", ""),
    Row("rewards that are no list", "rewards=grpc://127.0.0.1:5556", ""),
    Row("a reward of two kinds", 'rewards=[{function:"m:f",colocated:{restore_from_path:rm}}]', ""),
    Row("a function of no module", 'rewards=[{function:"nowhere:reward"}]', ""),
    Row("a function without a module", "rewards=[{function:reward}]", ""),
    Row("a function that its module lacks", 'rewards=[{function:"json:reward"}]', ""),
    Row("a function that is none", 'rewards=[{function:"math:pi"}]', ""),
    Row("a function whose module does not parse", 'gold_reward="own:reward"', "", {"own.py": "def reward(:\n"}),
    Row("a function whose module fails", 'gold_reward="own:reward"', "", {"own.py": "1 / 0\n"}),
    Row("a function whose module exits", 'gold_reward="own:reward"', "", {"own.py": "raise SystemExit(0)\n"}),
    Row("a reward model in the place of the policy", "model.restore_from_path=rm", ""),
    Row("a policy in the place of a reward model", "rewards=[{colocated:{restore_from_path:sft}}]", ""),
    Row("a kind of reward that is not given", "reward_kind=odin rewards=[{colocated:{restore_from_path:rm}}]", ""),
    Row(
        "two models and no combination",
        "rewards=[{colocated:{restore_from_path:rm}},{colocated:{restore_from_path:rm}}] critic={colocated:{restore_from_path:rm,optimizer:{lr:1e-6}}}",
        "",
    ),
    Row(
        "certificates that are nowhere",
        "critic.server.url=grpc://127.0.0.1:5555 critic.server.certificates=nowhere",
        "",
    ),
    Row("no such prompts for validation", "data.validation=nowhere.jsonl", ""),
    Row("the best without validation", "checkpoint.best=validation/proxy_reward", ""),
    Row("an unknown engine", "engine.name=vllm", ""),
    Row("TensorRT-LLM that is not there", "engine.name=tensorrt_llm", ""),
    Row("KL in two places", "shaping.kl.coefficient=0.1 shaping.kl.placement=loss shaping.divergence.kind=kl", ""),
    Row("an alarm without a gold reward", "monitor.disagreement.action=stop", ""),
]

SERVERS = [
    Row("a model that is nowhere", "model.restore_from_path=nowhere", ""),
    Row("open to the network without certificates", "server.host=0.0.0.0", ""),
    Row("an address of another machine", "server.host=127.0.0.300", ""),
    Row("a port beyond 65535", "server.port=99999", ""),
    Row("no certificates in the folder", "server.certificates=empty", "", {"empty": None}),
    Row(
        "a key that others may read",
        "server.certificates=pem",
        "",
        {"pem/ca.pem": "", "pem/cert.pem": "", "pem/key.pem": ""},
    ),
    Row(
        "a fresh model",
        "model={architecture:{num_layers:1,hidden_size:8,ffn_hidden_size:8,num_attention_heads:1,max_sequence_length:9},tokenizer:data/tokenizer}",
        "",
    ),
    Row("a token in the settings", "server.token=secret", ""),
]
"""Settings of both servers, tried with that of reward models."""

CRITIC = [
    Row("a policy beside it", "reward_model=sft", ""),
    Row("a policy to start from", "model.restore_from_path=data", ""),
    Row("a negative clip", "value_clip=-0.2", ""),
]

REWARD_SERVER = [
    Row("a policy", "model.restore_from_path=sft", ""),
    Row("adapters to train", "model.lora={rank:8}", ""),
    Row("an optimizer", "optimizer.lr=1e-6", ""),
    Row("a ready file below a file", "server.ready_file=file/ready", "", {"file": "x"}, status=1),
]

TABLE = [
    *(("train_gpt_sft", row) for row in (*SETTINGS, *DATA, *MODELS)),
    *(("train_reward_model", row) for row in REWARD_TRAINING),
    *(("train_gpt_ppo_actor", row) for row in ACTOR),
    *(("serve_reward_model", row) for row in (*SERVERS, *REWARD_SERVER)),
    *(("serve_ppo_critic", row) for row in CRITIC),
]


@pytest.mark.parametrize(("script", "row"), TABLE, ids=[f"{script}: {row}" for script, row in TABLE])
def test_ends_with_one_clear_message(script: str, row: Row, world: Path, directory: Path) -> None:
    check(row, command(script, row.command), world, directory)


@pytest.mark.parametrize("script", BASE)
def test_the_same_command_without_the_fault_builds_a_model(script: str, world: Path, directory: Path) -> None:
    own = Row("", "rewards=[{function:math:fabs}]" if script == "train_gpt_ppo_actor" else "", "")
    prepare(world, directory, own)
    status, output = run(command(script, own.command), directory)
    assert status == 1
    assert re.search(BUILT, output), output
