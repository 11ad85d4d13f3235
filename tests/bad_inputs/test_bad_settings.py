"""Bad settings of job scripts, and bad files of settings; tried with SFT, since all scripts read them alike."""

import os
from pathlib import Path

import pytest
from bad_input import Row, check, command, run

from nemo_eppo.observability.run import hold


def yaml_file(text: str | bytes) -> dict[str, str | bytes]:
    return {"settings/mine.yaml": text}


MINE = "--config-dir settings --config-name mine"
SETTINGS = [
    Row("true for a number", "fit.max_steps=true", r"fit\.max_steps = True: expected a number"),
    Row("an empty path", "exp_manager.explicit_log_dir=", r"exp_manager\.explicit_log_dir = '': expected a path"),
    Row("an empty key", "=1", "=1: expected KEY=VALUE"),
    Row(
        "a name that is too long",
        f"exp_manager.explicit_log_dir={'x' * 300}",
        "x: File name too long; choose a shorter name",
        status=1,
    ),
    Row(
        "YAML: a key twice",
        MINE,
        r"settings/mine\.yaml:2: found duplicate key seed: 'seed: 2'",
        yaml_file("seed: 1\nseed: 2\n"),
    ),
    Row(
        "YAML: a tab",
        MINE,
        r"settings/mine\.yaml:2: found character '\\t' that cannot start any token: '\\tprecision: bf16'",
        yaml_file("model:\n\tprecision: bf16\n"),
    ),
    Row(
        "YAML: broken",
        MINE,
        r"settings/mine\.yaml:2: expected ',' or '\}', but got ':': 'seed: 1'",
        yaml_file("model: {precision: bf16\nseed: 1\n"),
    ),
    Row(
        "YAML: a list",
        MINE,
        r"cannot read the settings .*settings/mine\.yaml: primary config 'mine' must be a DictConfig, got",
        yaml_file("- seed: 1\n"),
    ),
    Row(
        "YAML: a text",
        MINE,
        "seed = None: Input should be a valid integer - optimizer: required, but not set",
        yaml_file("seed\n"),
    ),
    Row("YAML: empty", MINE, "optimizer: required, but not set", yaml_file("")),
    Row(
        "YAML: not UTF-8",
        MINE,
        r"settings/mine\.yaml: 'utf-8' codec can't decode byte 0xff in position 6: invalid start byte",
        yaml_file(b"seed: \xff\xfe\n"),
    ),
    Row(
        "YAML: a directory",
        MINE,
        r"cannot read the settings .*settings/mine\.yaml: is a directory, expected a file",
        {"settings/mine.yaml": None},
    ),
    Row(
        "YAML: missing",
        MINE,
        r"cannot read the settings .*settings/mine\.yaml: no such file",
        {"settings/other.yaml": "seed: 1"},
    ),
    Row(
        "YAML: an interpolation of nothing",
        MINE,
        r"seed: Interpolation key 'no\.such' not found",
        yaml_file("defaults: [gpt_sft, _self_]\nseed: ${no.such}\n"),
    ),
    Row(
        "YAML: an unknown key",
        MINE,
        r"modle: unknown key \(did you mean 'model'\?\)",
        yaml_file("defaults: [gpt_sft, _self_]\nmodle: {precision: bf16}\n"),
    ),
    Row(
        "no such folder of settings",
        "--config-dir nowhere",
        r"cannot read the settings .*nowhere/gpt_sft\.yaml: Primary config directory not found",
    ),
    Row(
        "a misspelt key",
        "model.restore_form_path=sft",
        r"model\.restore_form_path: unknown key \(did you mean 'restore_from_path'\?\)",
    ),
    Row(
        "a key of NeMo-Aligner",
        "trainer.num_nodes=2",
        r"trainer: unknown key \(known keys: exp_manager, seed, model, data, answer_only_loss, fit,",
    ),
    Row(
        "a key of TRL",
        "per_device_train_batch_size=8",
        r"per_device_train_batch_size: unknown key \(known keys: exp_manager, seed, model, data,",
    ),
    Row("a key twice", "seed=1 seed=2", "seed is given twice on the command line: seed=1 and seed=2"),
    Row("no value", "seed", "seed: expected KEY=VALUE"),
    Row("an unknown option", "--max-steps 5", "unrecognized arguments: --max-steps 5"),
    Row(
        "broken brackets",
        "model.parallel={tensor_model_parallel_size:2",
        r"model\.parallel=\{tensor_model_parallel_size:2: expected KEY=VALUE; quote a value with signs of its own as",
    ),
    Row(
        "a text for a number",
        "optimizer.lr=fast",
        r"optimizer\.lr = 'fast': Input should be a valid number, unable to parse string as a number",
    ),
    Row(
        "a number with a comma",
        "optimizer.lr=1,5",
        r"optimizer\.lr=1,5: expected one value; a list is optimizer\.lr=\[A,B\]",
    ),
    Row(
        "a number for a section",
        "model.parallel=2",
        r"model\.parallel = 2: Input should be a valid dictionary or instance of ParallelConfig",
    ),
    Row(
        "a list for a number",
        "fit.global_batch_size=[4]",
        r"fit\.global_batch_size = \[4\]: Input should be a valid integer",
    ),
    Row(
        "a fraction for a count",
        "fit.global_batch_size=4.5",
        r"fit\.global_batch_size = 4\.5: Input should be a valid integer, got a number with a fractional part",
    ),
    Row("a learning rate of NaN", "optimizer.lr=nan", r"optimizer\.lr = nan: Input should be a finite number"),
    Row("an infinite learning rate", "optimizer.lr=inf", r"optimizer\.lr = inf: Input should be a finite number"),
    Row("a negative learning rate", "optimizer.lr=-1e-5", r"optimizer\.lr = -1e-05: Input should be greater than 0"),
    Row("a learning rate of 0", "optimizer.lr=0", r"optimizer\.lr = 0: Input should be greater than 0"),
    Row(
        "a huge learning rate",
        "optimizer.lr=1e9",
        r"optimizer\.lr = 1000000000\.0: Input should be less than or equal to 1",
    ),
    Row("a beta of 1", "optimizer.betas=[0.9,1.0]", r"optimizer\.betas\.1 = 1\.0: Input should be less than 1"),
    Row(
        "a batch of 0",
        "fit.global_batch_size=0",
        r"fit\.global_batch_size = 0: Input should be greater than or equal to 1",
    ),
    Row("a negative seed", "seed=-1", "seed = -1: Input should be greater than or equal to 0"),
    Row(
        "a huge seed",
        "seed=1000000000000000000000000",
        "seed = 1000000000000000000000000: Input should be less than 2147483648",
    ),
    Row(
        "null where a value is needed",
        "fit.global_batch_size=null",
        r"fit\.global_batch_size = None: Input should be a valid integer",
    ),
    Row(
        "no model",
        "model.restore_from_path=null",
        "model: exactly one of restore_from_path and architecture has to be set",
    ),
    Row("an unknown precision", "model.precision=fp16", r"model\.precision = 'fp16': Input should be 'fp32' or 'bf16'"),
    Row(
        "epochs and steps",
        "fit.epochs=1 fit.max_steps=5",
        "fit: epochs = 1 and max_steps = 5: expected only one of them",
    ),
    Row(
        "a checkpoint and a fresh architecture",
        "model.architecture={num_layers:1,hidden_size:8,ffn_hidden_size:8,num_attention_heads:1,max_sequence_length:9}",
        "model: exactly one of restore_from_path and architecture has to be set",
    ),
    Row(
        "an unknown metric of the best",
        "checkpoint.best=validation/accuracy",
        r"checkpoint\.best = 'validation/accuracy': expected one of validation/loss, validation/perplexity",
    ),
    Row(
        "a time limit in hours",
        "exp_manager.max_time_per_run=4h",
        r"exp_manager\.max_time_per_run = '4h': expected DD:HH:MM:SS, 00:03:50:00 for instance",
    ),
    Row(
        "W&B without a project",
        "exp_manager.create_wandb_logger=true",
        "exp_manager: create_wandb_logger = true needs wandb_logger_kwargs with name and project",
    ),
    Row(
        "TP over more ranks than there are",
        "model.parallel.tensor_model_parallel_size=2",
        "world size 1 is not divisible by tensor_model_parallel_size 2 x pipeline_model_parallel_size 1",
    ),
    Row(
        "TP that does not divide the heads",
        "model.parallel.tensor_model_parallel_size=3",
        r"impossible layout: - model\.architecture\.num_attention_heads = 4 is not divisible by",
    ),
    Row(
        "PP that does not divide the layers",
        "model.parallel.pipeline_model_parallel_size=3",
        r"impossible layout: - model\.architecture\.num_layers = 4 is not divisible by pipeline \(x virtual\)",
    ),
    Row(
        "sequence parallelism alone",
        "model.parallel.sequence_parallel=true",
        r"model\.parallel: sequence_parallel = true needs tensor_model_parallel_size > 1",
    ),
    Row(
        "an unknown target of LoRA",
        "model.lora={targets:[q_proj]}",
        r"model\.lora\.targets\.0 = 'q_proj': Input should be 'linear_qkv', 'linear_proj', 'linear_fc1' or",
    ),
    Row(
        "a run directory below a file",
        "exp_manager.explicit_log_dir=file/run",
        "file/run: Not a directory; a file is in the way; choose another name",
        {"file": "x"},
        status=1,
    ),
    Row(
        "a run directory that is a file",
        "exp_manager.explicit_log_dir=run",
        "run: File exists; a file is in the way; choose another name",
        {"run": "x"},
        status=1,
    ),
    Row(
        "another script's run directory",
        "",
        r"run is the run directory of another job \(settings of train_reward_model\.py\): choose another",
        {"run/config.yaml": "# settings of train_reward_model.py\n"},
    ),
    Row(
        "a run directory that may not be resumed",
        "exp_manager.resume_if_exists=false",
        r"run holds a run already and exp_manager\.resume_if_exists = false: set it to true to resume that",
        {"run/config.yaml": "# settings of train_gpt_sft.py\n"},
    ),
]


@pytest.mark.parametrize("row", SETTINGS, ids=str)
def test_ends_with_one_clear_message(row: Row, world: Path, directory: Path) -> None:
    check(row, command("train_gpt_sft", row.command), world, directory)


def test_a_run_directory_in_use(world: Path, directory: Path) -> None:
    hold(directory / "run")
    row = Row(
        "in use", "", rf"run is in use by another job \(host .*, process {os.getpid()}, started .*\): wait for it"
    )
    check(row, command("train_gpt_sft", row.command), world, directory)


def test_a_run_directory_of_other_settings(world: Path, directory: Path, tmp_path: Path) -> None:
    _, settings = run(command("train_gpt_sft", "--cfg job"), tmp_path)
    started = {"run/config.yaml": f"# settings of train_gpt_sft.py\n{settings}", "run/checkpoints/step_000001": None}
    row = Row("other", "seed=5", "holds a run that was started with other settings: - seed was 1234, now 5", started)
    check(row, command("train_gpt_sft", row.command), world, directory)
