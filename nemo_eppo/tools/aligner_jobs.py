"""Translates the keys of a NeMo-Aligner file that depend on each other, job by job, and notes what is left to do; the
table of the jobs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemo_eppo.tools.aligner_keys import ACTOR, CRITIC, REWARD_SERVER, REWARD_TRAINING, SFT
from nemo_eppo.tools.aligner_rules import REQUIRED, Conversion
from nemo_eppo.tools.aligner_shared_keys import Rules

_LINEARS: dict[str, tuple[str, ...]] = {
    "attention_qkv": ("linear_qkv",),
    "attention_dense": ("linear_proj",),
    "mlp_fc1": ("linear_fc1",),
    "mlp_fc2": ("linear_fc2",),
}
_LINEARS["attention"] = _LINEARS["attention_qkv"] + _LINEARS["attention_dense"]
_LINEARS["mlp"] = _LINEARS["mlp_fc1"] + _LINEARS["mlp_fc2"]
_LINEARS["all"] = _LINEARS["attention"] + _LINEARS["mlp"]
"""Maps names in `model.peft.lora_tuning.target_modules` to those in `model.lora.targets`."""


def ppo_actor(c: Conversion) -> None:
    get = c.source.get
    _common(c)
    _lora(c)
    _model_path(c, "pretrained_checkpoint.restore_from_path")
    _data(c, "nemo-eppo prepare prompts", "prompts", validation_required=False)
    window = c.integer("model.data.seq_length", 0) or c.integer("model.encoder_seq_length")
    longest = c.integer("model.ppo.length_params.max_length", 0) or window // 2
    c.require(
        "model.ppo.length_params.max_length", longest < window, f"leaves no room for a prompt in a window of {window}"
    )
    c.put("generation.max_new_tokens", longest)
    c.put("data.max_prompt_length", window - longest, f"{window} less generation.max_new_tokens")
    c.put("data.too_long", "drop")
    c.require("model.ppo.sampling_params.use_greedy", not get("model.ppo.sampling_params.use_greedy"), "PPO samples")
    c.put("generation.greedy", False)

    rollout, mini_batch = c.integer("model.ppo.num_rollout_samples"), c.integer("model.global_batch_size")
    c.require(
        "model.ppo.num_rollout_samples", rollout % mini_batch == 0, f"not divisible by global_batch_size {mini_batch}"
    )
    epochs, max_steps = _length(c, "ppo", "ppo.max_steps")
    if max_steps is None:
        c.put("ppo.max_steps", REQUIRED)
        c.todo.append(f"ppo.max_steps: {epochs} x (number of prompts // {rollout}); NeMo-Aligner counts the prompts")
    _constant_steps(c, None if max_steps is None else max_steps * rollout // mini_batch)
    c.put("ppo.epochs", 1, "each rollout is used once, as there")
    # NeMo-Aligner's number includes the rollout of the policy's first step
    if (warmup := c.integer("trainer.ppo.critic_warmup_steps", 0) - 1) > 0:
        c.put(
            "ppo.critic_warmup_steps", warmup, f"{warmup + 1} rollouts there, of which the policy learns from the last"
        )
        if max_steps is not None:
            c.put("ppo.max_steps", max_steps + warmup, f"of which {warmup} are the critic's alone")

    c.put("checkpoint.interval", c.integer("trainer.ppo.save_interval", c.values["validation.interval"]))
    c.put("validation.max_prompts", c.integer("model.ppo.num_val_samples", 0) or rollout)
    eps = c.number("model.ppo.ratio_eps")
    c.put("ppo.clip_low", eps)
    c.put("ppo.clip_high", eps)
    metrics = {"val_global_rewards": "proxy_reward", "val_rewards": "proxy_reward"}
    _best(c, metrics if c.values["data.validation"] else {})
    _kl(c)
    c.put("shaping.clip.range", None, "NeMo-Aligner does not clip rewards")
    _servers(c)


def _length(c: Conversion, section: str, target: str) -> tuple[int, int | None]:
    """Translate the number of steps, if the file sets one; return its epochs and steps (None if it sets none)."""
    name = f"trainer.{section}"
    epochs, steps = c.integer(f"{name}.max_epochs", 0) or 1, c.integer(f"{name}.max_steps", -1)
    if steps < 0:  # no limit
        return epochs, None
    note = f"NeMo-Aligner ends after {epochs} epochs already, if they have fewer steps; set fewer steps then"
    c.put(target, steps, note)
    _mark(c, f"{name}.max_epochs", "changed", note)
    return epochs, steps


def _fit_length(c: Conversion, section: str) -> None:
    epochs, steps = _length(c, section, "fit.max_steps")
    if steps is None:
        c.put("fit.epochs", epochs)
    _constant_steps(c, steps)


def _constant_steps(c: Conversion, updates: int | None) -> None:
    """Translate the number of updates at min_lr at the end of a run of `updates` updates, None if not known."""
    key = "model.optim.sched.constant_steps"
    constant = c.integer(key, 0)
    if not constant:
        return
    if c.values["optimizer.schedule"] == "constant":
        _mark(c, key, "dropped", "the learning rate is constant")
        return
    note = "with more of them than the run has updates, NeMo-Aligner is at min_lr right after the warm-up"
    if updates is not None and (largest := max(updates - c.values["optimizer.warmup_steps"] - 1, 0)) < constant:
        c.conflict(key, f"leaves no update to decay in: at min_lr right after the warm-up, as there, with {largest}")
        constant = largest
    c.put("optimizer.constant_steps", constant, note)


def _kl(c: Conversion) -> None:
    note = ""
    if c.source["trainer.ppo.use_absolute_kl"] and c.values["shaping.kl.coefficient"]:
        note = "the log-ratio itself (k1), not its absolute value; k3 is never negative, but much smaller near zero"
        _mark(c, "trainer.ppo.use_absolute_kl", "changed", note)
    c.put("shaping.kl.estimator", "k1", note)
    c.put("shaping.kl.placement", "reward")


def _servers(c: Conversion) -> None:
    def url(server: str) -> str:
        host = c.source[f"remote_critic_rm.{server}.ip"]
        c.require(f"remote_critic_rm.{server}.ip", bool(host), "expected a host name or an address")
        if host not in ("localhost", "127.0.0.1"):
            c.todo.append(f"servers: {host} and the actor need certificates: `nemo-eppo certificates FOLDER`")
        return f"grpc://{host}:{c.source[f'remote_critic_rm.{server}.port']}"

    raw, note = {"mean": 0.0, "std": 1.0}, "null for both standardises by the reward model's own mean and deviation"
    critic = url("critic")
    c.put("critic.server.url", critic)
    if c.source["remote_critic_rm.combine_rm_and_critic_server"]:
        server = {"url": critic, "job": "critic"}
        c.put("rewards", [{"server": server, **raw}], f"the critic's job serves the reward model, too; {note}")
        for key in ("remote_critic_rm.reward_model.ip", "remote_critic_rm.reward_model.port"):
            _mark(c, key, "dropped", "combine_rm_and_critic_server is true: the critic's job serves the reward model")
    else:
        c.put("rewards", [{"server": {"url": url("reward_model")}, **raw}], note)


def ppo_critic(c: Conversion) -> None:
    _common(c)
    path = _model_path(c, "pretrained_checkpoint.restore_from_path")
    combined = c.source["trainer.ppo.combine_rm_and_critic_server"]
    c.put("reward_model", path if combined else None, "the model that the critic starts from scores, too")
    if combined and path == REQUIRED:
        c.todo.append("reward_model: the reward model, from which the critic usually starts, too")
    if c.source.get("model.global_batch_size"):
        c.todo.append(
            f"the mini-batches that the critic learns from are the actor's: global_batch_size = "
            f"{c.source['model.global_batch_size']} of this file has to be its ppo.mini_batch_size"
        )
    updates = c.integer("trainer.ppo.max_steps")
    if updates < 1:
        c.put("optimizer.decay_steps", REQUIRED)
        c.todo.append("optimizer.decay_steps: PPO steps x mini-batches per step, over which the learning rate falls")
    else:
        c.put("optimizer.decay_steps", updates)
    _constant_steps(c, updates if updates > 0 else None)
    _regression(c)
    _standardization(c)
    _host(c)


def reward_server(c: Conversion) -> None:
    _common(c)
    _model_path(c, "rm_model_file")
    names = ("model.forward_micro_batch_size", "inference.inference_micro_batch_size", "inference.micro_batch_size")
    sizes = [c.source[name] for name in names if c.source.get(name) is not None] or [4]
    size = sizes[0]
    c.put("model.micro_batch_size", int(max(size) if isinstance(size, list) else size))
    _regression(c)
    _standardization(c)
    _host(c)


def reward_training(c: Conversion) -> None:
    _common(c)
    _model_path(c, "pretrained_checkpoint.restore_from_path")
    _data(c, "nemo-eppo prepare nemo_aligner", "preferences", validation_required=True)
    longest = c.integer("model.data.seq_length", 0) or c.integer("model.encoder_seq_length")
    c.put("data.max_sequence_length", longest)
    c.put("data.too_long", "drop")
    _fit_length(c, "rm")
    _best(c, {"val_loss": "accuracy", "val_acc": "accuracy", "val_accuracy": "accuracy"})
    _regression(c)


def sft(c: Conversion) -> None:
    _common(c)
    _lora(c)
    _model_path(c, "model.restore_from_path")
    for ours, theirs in (("train", "train_ds"), ("validation", "validation_ds")):
        key = f"model.data.{theirs}.file_path"
        if c.source.get(f"model.data.{theirs}.file_names"):
            key = f"model.data.{theirs}.file_names"
        _file(c, f"data.{ours}", key, c.source.get(key), "nemo-eppo prepare nemo_aligner", "sft")
    c.put("data.too_long", "drop")
    _fit_length(c, "sft")
    _best(c, {"val_loss": "loss"})


def _common(c: Conversion) -> None:
    """Translate the optimizer and the layout, with the corrections that NeMo-Aligner makes silently to a layout."""
    get = c.source.get
    sizes = [f"model.{kind}_model_parallel_size" for kind in ("tensor", "pipeline")]
    if c.kind != "sft" and any(row.key in sizes and row.status == "default" for row in c.rows):
        c.todo.append(
            "model.parallel: sizes that the file does not set, NeMo-Aligner takes from the .nemo file; they are 1 here"
        )
    sequence_parallel = bool(get("model.sequence_parallel"))
    if sequence_parallel and c.integer("model.tensor_model_parallel_size", 1) == 1:
        c.conflict("model.sequence_parallel", "has no effect without tensor parallelism: off")
        sequence_parallel = False
    c.put("model.parallel.sequence_parallel", sequence_parallel)
    if get("model.virtual_pipeline_model_parallel_size") and c.integer("model.pipeline_model_parallel_size", 1) == 1:
        c.conflict("model.virtual_pipeline_model_parallel_size", "has no effect without pipeline stages: off")
        c.put("model.parallel.virtual_pipeline_model_parallel_size", None)
    if get("model.precision") not in (None, get("trainer.precision")):
        c.conflict("model.precision", f"is not trainer.precision = {get('trainer.precision')}, which is used")
    logger = {
        key.rpartition(".")[2]: value
        for key, value in c.source.items()
        if key.startswith("exp_manager.wandb_logger_kwargs.") and value is not None
    }
    if logger:
        c.put("exp_manager.wandb_logger_kwargs", logger)
    _run_directory(c)
    if "model.optim.name" in c.source:
        name = str(c.source["model.optim.name"])
        c.require("model.optim.name", "adam" in name, "the optimizer is AdamW")
        c.require(
            "model.optim.sched.min_lr",
            c.values["optimizer.min_lr"] <= c.values["optimizer.lr"],
            f"above model.optim.lr = {c.values['optimizer.lr']}",
        )
        c.put("optimizer.distributed", "distributed" in name)


def _run_directory(c: Conversion) -> None:
    """Give the job a run directory of its own: NeMo-Aligner's files have the same one for every job."""
    key = "exp_manager.explicit_log_dir"
    directory = c.source.get(key)
    if directory == REQUIRED:
        c.put(key, REQUIRED)
    elif directory is not None:
        note = "with the job's name: a run directory belongs to one job"
        c.put(key, f"{str(directory).rstrip('/')}/{c.kind.replace('-', '_')}", note)
        _mark(c, key, "changed", note)


def _lora(c: Conversion) -> None:
    scheme = c.source["model.peft.peft_scheme"]
    name = "model.peft.lora_tuning"
    if scheme in (None, "none"):
        c.put("model.lora", None)
        for part in ("adapter_dim", "alpha", "target_modules"):
            _mark(c, f"{name}.{part}", "dropped", "peft_scheme is none: all weights are trained")
        return
    c.require("model.peft.peft_scheme", scheme == "lora", "expected lora or none")
    rank, modules = c.integer(f"{name}.adapter_dim"), c.source[f"{name}.target_modules"]
    for module in modules:
        c.require(f"{name}.target_modules", module in _LINEARS, f"expected some of {', '.join(_LINEARS)}")
    targets = {linear for module in modules for linear in _LINEARS[module]}
    c.put("model.lora.rank", rank)
    c.put("model.lora.alpha", c.number(f"{name}.alpha", 0) or float(rank), "NeMo-Aligner's default is the rank")
    c.put("model.lora.targets", [linear for linear in _LINEARS["all"] if linear in targets])


def _best(c: Conversion, metrics: dict[str, str]) -> None:
    """Translate which checkpoint is kept as the best; `metrics` maps values of `monitor` to our metrics."""
    name = "exp_manager.checkpoint_callback_params"
    save_top_k, monitor = c.source.get(f"{name}.save_top_k"), c.source.get(f"{name}.monitor")
    if not save_top_k or monitor not in metrics:
        for part in ("save_top_k", "monitor", "mode"):
            _mark(c, f"{name}.{part}", "dropped", "the newest checkpoints are kept, none as the best")
        return
    metric = metrics[monitor]
    c.put("checkpoint.best", f"validation/{metric}")
    c.put("checkpoint.best_is", "lowest" if metric == "loss" else "highest")
    if save_top_k != 1:
        _mark(c, f"{name}.save_top_k", "changed", "the single best is kept, and the checkpoint.keep newest")
    if metric == "accuracy" and monitor == "val_loss":
        _mark(c, f"{name}.monitor", "changed", "reward models are compared by their accuracy")


def _model_path(c: Conversion, key: str) -> str:
    path = c.source.get(key)
    if path in (None, REQUIRED):
        target, note = REQUIRED, ""
        c.todo.append("model.restore_from_path: a Hugging Face directory, or a checkpoint of these scripts")
    elif not str(path).endswith(".nemo"):
        target = str(path)
        note = "has to be a Hugging Face directory or a checkpoint; convert nemo-to-megatron makes one of a NeMo model"
    else:
        target, note = str(path).removesuffix(".nemo") + "_megatron", f"was {path}"
        c.todo.append(
            f"nemo-eppo convert nemo-to-megatron --input {path} --tokenizer DIRECTORY --output {target}, with the "
            "Hugging Face directory of the model's tokenizer"
        )
    c.put("model.restore_from_path", target, note)
    return target


def _data(c: Conversion, command: str, files: str, *, validation_required: bool) -> None:
    prefix = c.source.get("model.data.data_prefix")
    for ours in ("train", "validation"):
        key = f"model.data.data_prefix.{ours}"
        value = c.source.get(key, prefix if ours == "train" else None)
        if value is None and ours == "validation" and not validation_required:
            c.put("data.validation", None)
        else:
            _file(c, f"data.{ours}", key if key in c.source else "model.data.data_prefix", value, command, files)


def _file(c: Conversion, target: str, key: str, value: Any, command: str, files: str) -> None:
    paths = [item for item in (value if isinstance(value, list) else [value]) if not isinstance(item, int | float)]
    if isinstance(value, list) and len(paths) < len(value):
        c.conflict(key, "weights of data sets have no counterpart: put the rows that you want into one file")
    if len(paths) > 1:
        c.conflict(key, f"only one file is taken: put these together into {paths[0]}")
    path = paths[0] if paths else None
    if path in (None, REQUIRED):
        c.put(target, REQUIRED)
        c.todo.append(f"{target}: a file that {command} wrote")
        return
    side = target.rpartition(".")[2]
    c.put(target, str(path), f"rows of NeMo-Aligner: give {files}.{side}.jsonl of `{command}` instead")
    c.todo.append(f"{target}: {command} --input {path} --output DIRECTORY, then DIRECTORY/{files}.{side}.jsonl")


def _host(c: Conversion) -> None:
    c.put("server.host", "127.0.0.1", "0.0.0.0, as there, demands server.certificates, which the actor needs, too")


def _regression(c: Conversion) -> None:
    key = "model.reward_model_type"
    c.require(key, c.source.get(key) in (None, "binary_ranking"), "reward models learn from preference pairs")


def _standardization(c: Conversion) -> None:
    name = "model.reward_standardization"
    enabled = c.source.get(f"{name}.enable")
    note = "off; mean and std of the actor's rewards"
    if enabled:
        mean, std = c.source.get(f"{name}.mean"), c.source.get(f"{name}.std")
        note = "mean and std of the actor's rewards, null for the statistics that are stored with the reward model"
        c.todo.append(
            f"reward_standardization: set mean: {mean} and std: {std} in the actor's rewards; null for both is right "
            "if they are stored with the reward model"
        )
    for part in ("enable", "mean", "std"):
        _mark(c, f"{name}.{part}", "changed" if enabled else "dropped", note)


def _mark(c: Conversion, key: str, status: str, note: str) -> None:
    """Change the status and note of a key's row, if its rule mapped or dropped it."""
    for index, row in enumerate(c.rows):
        if row.key == key and row.status in ("mapped", "dropped"):
            target = "" if status == "dropped" else row.target
            c.rows[index] = type(row)(key, row.value, status, target, note)


@dataclass(frozen=True)
class AlignerJob:
    """One kind of NeMo-Aligner's files, and its translation."""

    script: str
    """Name of our script for it, without its ending."""
    marks: tuple[str, ...]
    """Prefixes of keys by which files of this kind differ from those of later kinds in `JOBS`."""
    rules: Rules
    """The rule for each key."""
    joint: Callable[[Conversion], None]
    """Translates the keys that depend on each other, after all others."""


JOBS = {
    "ppo-actor": AlignerJob("train_gpt_ppo_actor", ("remote_critic_rm.", "model.ppo."), ACTOR, ppo_actor),
    "ppo-critic": AlignerJob("serve_ppo_critic", ("trainer.ppo.",), CRITIC, ppo_critic),
    "reward-training": AlignerJob("train_reward_model", ("trainer.rm.",), REWARD_TRAINING, reward_training),
    "sft": AlignerJob("train_gpt_sft", ("trainer.sft.",), SFT, sft),
    "reward-server": AlignerJob("serve_reward_model", ("rm_model_file", "inference."), REWARD_SERVER, reward_server),
}
"""Kinds of files by name."""
