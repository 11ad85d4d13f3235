"""Lists every key of NeMo-Aligner's YAML files (gpt_ppo_actor, gpt_ppo_critic, inference_rm, training_rm, gpt_sft) and
the rule for it. A name that ends in ".*" stands for all keys below it."""

from nemo_eppo.tools.aligner_rules import (
    Rule,
    answer_only,
    clip_norm,
    dropped,
    joint,
    lost,
    pooling,
    precision,
    recompute,
    schedule,
    steps,
    texts,
    to,
)

Rules = dict[str, Rule]

_LAUNCH = "ranks are what torchrun starts: see the command at the top of the output"
_COPY = "a copy of another key"
_SPEED = "changes speed or memory only"
_MODEL = "comes with the model"
_LIGHTNING = "of Lightning's own loop, which is not used"
_LORA = "adapters come with the checkpoint of the run that they were trained in"
_FORMAT = "data are JSON lines (nemo-eppo prepare)"
_STRICT = "every weight has to be in the checkpoint"
_REGRESSION = "regression models are not supported"
_STEERLM = "SteerLM is not supported"
_SAME_SIZE = "model.micro_batch_size holds for inference, too"
_NO_BEST = "the critic is saved with the actor, whose checkpoint.* say when, and what is kept"

COMMON: Rules = {
    "defaults": dropped("Hydra's list of files, here for Transformer Engine's overlap of communication"),
    "trainer.num_nodes": dropped(_LAUNCH),
    "trainer.devices": dropped(_LAUNCH),
    "trainer.accelerator": dropped("GPUs are used if there are any"),
    "trainer.precision": to("model.precision", "bf16", precision),
    "trainer.logger": dropped(_LIGHTNING),
    "trainer.enable_checkpointing": dropped(_LIGHTNING),
    "trainer.use_distributed_sampler": dropped(_LIGHTNING),
    "trainer.gradient_clip_val": dropped(_LIGHTNING),
    "trainer.skip_validation": dropped(_LIGHTNING),
    "trainer.load_strict": lost(_STRICT, True, None),
    "model.precision": dropped("a copy of trainer.precision"),
    "model.mcore_gpt": lost("models are always Megatron-core's", True, None),
    "model.transformer_engine": dropped("used where it is installed"),
    "model.tensor_model_parallel_size": to("model.parallel.tensor_model_parallel_size", 1),
    "model.pipeline_model_parallel_size": to("model.parallel.pipeline_model_parallel_size", 1),
    "model.virtual_pipeline_model_parallel_size": to("model.parallel.virtual_pipeline_model_parallel_size"),
    "model.context_parallel_size": dropped("every rank holds whole sequences here; its ranks become data parallelism"),
    "model.sequence_parallel": joint("model.parallel.sequence_parallel", False),
    "model.activations_checkpoint_granularity": to("model.recompute", None, recompute),
    "model.activations_checkpoint_method": dropped(_SPEED),
    "model.activations_checkpoint_num_layers": dropped(_SPEED),
    "model.activations_checkpoint_layers_per_pipeline": dropped(_SPEED),
    "model.num_micro_batches_with_partial_activation_checkpoints": dropped(_SPEED),
    "model.megatron_amp_O2": dropped("bf16 always keeps fp32 main weights"),
    "model.ub_tp_comm_overlap": dropped(_SPEED),
    "model.ub_tp_comm_overlap_cfg.*": dropped(_SPEED),
    "model.use_flash_attention": dropped(_SPEED),
    "model.apply_rope_fusion": dropped(_SPEED),
    "model.gradient_accumulation_fusion": dropped(_SPEED),
    "model.bias_activation_fusion": dropped(_SPEED),
    "model.bias_dropout_add_fusion": dropped(_SPEED),
    "model.masked_softmax_fusion": dropped(_SPEED),
    "model.dist_ckpt_format": dropped("checkpoints are Megatron-core's torch_dist"),
    "model.dist_ckpt_load_on_device": dropped(_SPEED),
    "model.dist_ckpt_parallel_save": dropped(_SPEED),
    "model.encoder_seq_length": dropped(_MODEL),
    "model.max_position_embeddings": dropped(_MODEL),
    "model.share_embeddings_and_output_weights": dropped(_MODEL),
    "model.rotary_base": lost(_MODEL, None),
    "model.overwrite_base_config.*": dropped("there is no configuration inside of checkpoints to merge with"),
}

EXP_MANAGER: Rules = {
    "exp_manager.explicit_log_dir": to("exp_manager.explicit_log_dir"),
    "exp_manager.exp_dir": to("exp_manager.exp_dir"),
    "exp_manager.name": to("exp_manager.name"),
    "exp_manager.version": to("exp_manager.version"),
    "exp_manager.create_wandb_logger": to("exp_manager.create_wandb_logger", False),
    "exp_manager.wandb_logger_kwargs.*": joint("exp_manager.wandb_logger_kwargs"),
    "exp_manager.create_tensorboard_logger": to("exp_manager.create_tensorboard_logger"),
    "exp_manager.resume_if_exists": to("exp_manager.resume_if_exists"),
    "exp_manager.resume_ignore_no_checkpoint": dropped("a run without a checkpoint starts from the beginning"),
    "exp_manager.resume_from_checkpoint": lost("a run resumes from its own newest checkpoint", None),
    "exp_manager.max_time_per_run": to("exp_manager.max_time_per_run"),
    "exp_manager.create_checkpoint_callback": lost("the last step is always saved", True, None),
    "exp_manager.checkpoint_callback_params.monitor": joint("checkpoint.best"),
    "exp_manager.checkpoint_callback_params.mode": joint("checkpoint.best_is"),
    "exp_manager.checkpoint_callback_params.save_top_k": joint("checkpoint.best"),
    "exp_manager.checkpoint_callback_params.save_best_model": dropped("the best is linked as checkpoints/best"),
    "exp_manager.checkpoint_callback_params.always_save_nemo": dropped("no .nemo files: nemo-eppo convert"),
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end": dropped("no .nemo files: nemo-eppo convert"),
    "exp_manager.checkpoint_callback_params.filename": dropped("checkpoints are step_N"),
    "exp_manager.checkpoint_callback_params.model_parallel_size": dropped("checkpoints load in any layout"),
    "trainer.max_time": dropped("exp_manager.max_time_per_run is what ends a run, there as here"),
    "trainer.max_epochs": dropped(_COPY),
    "trainer.max_steps": dropped(_COPY),
}


def _optimizer(lr: float, min_lr: float, weight_decay: float = 0.1) -> Rules:
    return {
        "model.optim.name": joint("optimizer.distributed", "distributed_fused_adam"),
        "model.optim.lr": to("optimizer.lr", lr, float),
        "model.optim.weight_decay": to("optimizer.weight_decay", weight_decay, float),
        "model.optim.betas": to("optimizer.betas", [0.9, 0.98], lambda values: [float(value) for value in values]),
        "model.optim.eps": to("optimizer.eps", None, float),
        "model.optim.bucket_cap_mb": dropped(_SPEED),
        "model.optim.overlap_grad_sync": dropped(_SPEED),
        "model.optim.overlap_param_sync": dropped(_SPEED),
        "model.optim.contiguous_grad_buffer": dropped(_SPEED),
        "model.optim.contiguous_param_buffer": dropped(_SPEED),
        "model.optim.grad_sync_dtype": lost("gradients are summed in fp32", None, "fp32"),
        "model.optim.sched.name": to("optimizer.schedule", "CosineAnnealing", schedule),
        "model.optim.sched.warmup_steps": to("optimizer.warmup_steps", 10),
        "model.optim.sched.constant_steps": joint("optimizer.constant_steps"),
        "model.optim.sched.min_lr": to("optimizer.min_lr", min_lr, float),
        "model.optim.sched.max_steps": dropped(_COPY),
        "model.seed": to("seed", 1234),
    }


_PRETRAINED: Rules = {"pretrained_checkpoint.restore_from_path": joint("model.restore_from_path")}

_MEGATRON_DATA: Rules = {
    "model.data.data_impl": lost(_FORMAT, "jsonl", None),
    "model.data.splits_string": lost("training and validation data are files of their own", None),
    "model.data.seq_length": joint("data.max_prompt_length"),
    "model.data.skip_warmup": dropped(_FORMAT),
    "model.data.num_workers": dropped(_SPEED),
    "model.data.dataloader_type": dropped("examples come in a random order that the seed decides"),
    "model.data.reset_position_ids": lost("every row is one sequence", False, None),
    "model.data.reset_attention_mask": lost("every row is one sequence", False, None),
    "model.data.eod_mask_loss": lost("the end of a response is learnt like its other tokens", False, None),
    "model.data.index_mapping_dir": dropped(_FORMAT),
    "model.data.data_prefix": joint("data.train, data.validation"),
    "model.data.data_prefix.train": joint("data.train"),
    "model.data.data_prefix.validation": joint("data.validation"),
    "model.data.data_prefix.test": dropped("not used there either"),
}

_OTHER_PEFT = "of another model.peft.peft_scheme than lora and none, which is refused"

_PEFT: Rules = {
    "model.peft.peft_scheme": joint("model.lora", "none"),
    "model.peft.restore_from_path": lost(_LORA, None),
    "model.peft.restore_from_ckpt.*": dropped(_LORA),
    "model.peft.lora_tuning.adapter_dim": joint("model.lora.rank", 32),
    "model.peft.lora_tuning.alpha": joint("model.lora.alpha"),
    "model.peft.lora_tuning.target_modules": joint("model.lora.targets", ["attention_qkv"]),
    "model.peft.lora_tuning.adapter_dropout": lost("adapters have no dropout", 0, None),
    "model.peft.lora_tuning.layer_selection": lost("every layer has adapters", None),
    "model.peft.lora_tuning.*": dropped("of an adapter A starts random and B zero"),
    "model.peft.adapter_tuning.*": dropped(_OTHER_PEFT),
    "model.peft.ia3_tuning.*": dropped(_OTHER_PEFT),
    "model.peft.p_tuning.*": dropped(_OTHER_PEFT),
}

_REWARD_HEAD: Rules = {
    "model.output_sequence": dropped("a critic gives a value per token, a reward model a score per response"),
    "model.use_avg_pool": dropped("how a score is read is stored with the reward model"),
    "model.force_head_dtype": lost("heads are fp32", "float32", "fp32", None),
    "model.reward_model_type": joint("", note="always binary_ranking: anything else is refused"),
    "model.regression.*": dropped(_REGRESSION),
    "model.categorical.*": dropped(_REGRESSION),
    "model.num_attributes": dropped(_REGRESSION),
    "model.merge_attributes": dropped(_REGRESSION),
    "model.attribute_weights": dropped(_REGRESSION),
    "model.head_type": dropped(_REGRESSION),
    "model.loss_mask_val": dropped(_REGRESSION),
    "model.forward_mbs": dropped(_SAME_SIZE),
}

_STANDARDIZATION: Rules = {
    "model.reward_standardization.enable": joint(""),
    "model.reward_standardization.mean": joint(""),
    "model.reward_standardization.std": joint(""),
}

_TRT = "set engine.name=tensorrt_llm, engine.tensorrt_llm.* and generation.min_new_tokens=0 by hand"

_RUN_DIRECTORY = "all files of a run go to its directory (exp_manager.*)"

ACTOR: Rules = {
    **COMMON,
    **EXP_MANAGER,
    **_PRETRAINED,
    **_MEGATRON_DATA,
    **_PEFT,
    **_optimizer(lr=9e-7, min_lr=9e-8),
    "trainer.ppo.max_steps": joint("ppo.max_steps", -1),
    "trainer.ppo.max_epochs": joint("ppo.max_steps", 1),
    "trainer.ppo.val_check_interval": to("validation.interval", 10, steps),
    "trainer.ppo.save_interval": joint("checkpoint.interval"),
    "trainer.ppo.gradient_clip_val": to("optimizer.clip_grad", 1.0, clip_norm),
    "trainer.ppo.critic_warmup_steps": lost("policy and critic learn from the first step on", 0, 1, None),
    "trainer.ppo.initial_policy_kl_penalty": to("shaping.kl.coefficient", 0.01, float),
    "trainer.ppo.use_absolute_kl": joint("shaping.kl.estimator", True),
    "trainer.ppo.discount_factor": to("ppo.advantages.gamma", 1.0, float),
    "trainer.ppo.gae_lambda": to("ppo.advantages.lam", 0.95, float),
    "trainer.ppo.normalize_advantages": to("ppo.advantages.whiten", True),
    "trainer.ppo.model_gbs": dropped(_COPY),
    "trainer.ppo.model_mbs": dropped(_COPY),
    "trainer.ppo.rollout_batch_seq_length": dropped("padding; changes speed and memory only"),
    "trainer.ppo.num_responses_per_prompt": lost("one response to each prompt; see ppo.samples_per_prompt", 1, None),
    "trainer.ppo.rollout_micro_batch_size": dropped(_COPY),
    "trainer.ppo.train_seq_length": dropped("padding; changes speed and memory only"),
    "trainer.ppo.batch_critic_send": dropped(_SPEED),
    "trainer.ppo.output_dir": dropped(_RUN_DIRECTORY),
    "trainer.ppo.log_dir": dropped(_RUN_DIRECTORY),
    "trainer.ppo.export_rollouts_jsonl": dropped("record_rollouts says how many responses of a step are written"),
    "trainer.ppo.trt_model_dir": dropped("no TensorRT-LLM engines are written to disk"),
    "trainer.ppo.trt_llm.*": dropped(_TRT),
    "trainer.ppo.flask_server.*": dropped(_SPEED),
    "trainer.ppo.host": dropped(_SPEED),
    "trainer.ppo.port": dropped(_SPEED),
    "trainer.ppo.batch_iterator.*": dropped(_SPEED),
    "remote_critic_rm.pad_to_length": dropped("padding; changes speed and memory only"),
    "remote_critic_rm.combine_rm_and_critic_server": joint("rewards", True),
    "remote_critic_rm.reward_model.name": dropped("endpoints have fixed names"),
    "remote_critic_rm.reward_model.ip": joint("rewards", "localhost"),
    "remote_critic_rm.reward_model.port": joint("rewards", 5555),
    "remote_critic_rm.critic.name.*": dropped("endpoints have fixed names"),
    "remote_critic_rm.critic.ip": joint("critic.server.url", "localhost"),
    "remote_critic_rm.critic.port": joint("critic.server.url", 5556),
    "model.ppo.rollout_micro_batch_size": to("engine.max_batch_size", 8),
    "model.ppo.num_rollout_samples": to("ppo.rollout_batch_size", 512),
    "model.ppo.forward_micro_batch_size": dropped("log-probs are taken in batches of model.micro_batch_size"),
    "model.ppo.val_rollout_micro_batch_size": dropped("engine.max_batch_size holds for validation, too"),
    "model.ppo.num_val_samples": joint("validation.max_prompts"),
    "model.ppo.offload_adam_states": dropped(_SPEED),
    "model.ppo.combine_rm_and_critic_server": dropped("remote_critic_rm.combine_rm_and_critic_server decides"),
    "model.ppo.entropy_bonus": to("ppo.entropy_coefficient", 0.0, float),
    "model.ppo.ratio_eps": joint("ppo.clip_low, ppo.clip_high", 0.2),
    "model.ppo.trt_llm": dropped(_TRT),
    "model.ppo.trt_llm.*": dropped(_TRT),
    "model.ppo.sampling_params.use_greedy": joint("generation.greedy", False),
    "model.ppo.sampling_params.temperature": to("generation.temperature", 1.0, float),
    "model.ppo.sampling_params.top_k": to("generation.top_k", 0),
    "model.ppo.sampling_params.top_p": to("generation.top_p", 1.0, lambda value: float(value or 1)),
    "model.ppo.sampling_params.repetition_penalty": to(
        "generation.repetition_penalty", 1.0, float, "unless it is 1, PPO trains the penalised distribution here"
    ),
    "model.ppo.sampling_params.add_BOS": lost("prompts are tokenised as `nemo-eppo prepare` wrote them", False, None),
    "model.ppo.sampling_params.all_probs": dropped("of NeMo's generation, where it only changes what is returned"),
    "model.ppo.sampling_params.compute_logprob": dropped("log-probs are always taken by the trainer"),
    "model.ppo.sampling_params.end_strings": to(
        "generation.stop_strings",
        ["<|endoftext|>", "<extra_id_1>"],
        texts,
        "EOS ends a response as well; that project learns nothing from one that was cut off, here "
        "shaping.missing_eos.penalty can punish it",
    ),
    "model.ppo.sampling_params.apply_to_logprobs.*": lost(
        "log-probs are always of the distribution that is sampled from", False, None
    ),
    "model.ppo.length_params.max_length": joint("generation.max_new_tokens"),
    "model.ppo.length_params.min_length": to("generation.min_new_tokens", 1, lambda value: int(value or 0)),
    "model.micro_batch_size": to("model.micro_batch_size", 1),
    "model.global_batch_size": to("ppo.mini_batch_size", 64),
    "model.encoder_seq_length": joint("data.max_prompt_length", 4096),
}

CRITIC: Rules = {
    **COMMON,
    **EXP_MANAGER,
    **_PRETRAINED,
    **_REWARD_HEAD,
    **_STANDARDIZATION,
    **_optimizer(lr=9e-6, min_lr=9e-7),
    "exp_manager.checkpoint_callback_params.monitor": dropped(_NO_BEST),
    "exp_manager.checkpoint_callback_params.mode": dropped(_NO_BEST),
    "exp_manager.checkpoint_callback_params.save_top_k": dropped(_NO_BEST),
    "trainer.ppo.port": to("server.port", 5556),
    "trainer.ppo.combine_rm_and_critic_server": joint("reward_model", True),
    "trainer.ppo.max_steps": joint("optimizer.decay_steps", 10000),
    "trainer.ppo.gradient_clip_val": to("optimizer.clip_grad", 1.0, clip_norm),
    "trainer.ppo.inference_micro_batch_size": dropped("requests are cut to server.max_batch_size"),
    "trainer.ppo.gbs": dropped(_COPY),
    "trainer.ppo.forward_mbs": dropped(_COPY),
    "trainer.ppo.load_strict": lost(_STRICT, True, None),
    "trainer.ppo.pad_sequence_length_to_multiple": dropped(_SPEED),
    "trainer.ppo.strip_sequence_length_to_multiple": dropped(_SPEED),
    "trainer.ppo.max_queue_delay_microseconds": dropped(_SPEED),
    "model.loss_clip_val": to("value_clip", 0.2, lambda value: float(value) if value else None),
    "model.offload_adam_states": dropped(_SPEED),
    "model.forward_micro_batch_size": dropped(_SAME_SIZE),
    "model.micro_batch_size": to("model.micro_batch_size", 1),
    "model.global_batch_size": dropped("the actor's ppo.mini_batch_size, which sends the mini-batches"),
}

REWARD_SERVER: Rules = {
    **COMMON,
    **_REWARD_HEAD,
    **_STANDARDIZATION,
    "rm_model_file": joint("model.restore_from_path"),
    "dataset_path": dropped("not used there either"),
    "inference.model_name": dropped("endpoints have fixed names"),
    "inference.forward_mbs": dropped(_COPY),
    "inference.port": to("server.port", 5555),
    "inference.micro_batch_size": joint("model.micro_batch_size"),
    "inference.inference_micro_batch_size": joint("model.micro_batch_size"),
    "inference.strip_sequence_length_to_multiple": dropped(_SPEED),
    "inference.max_queue_delay_microseconds": dropped(_SPEED),
    "model.forward_micro_batch_size": joint("model.micro_batch_size"),
    "model.global_batch_size": dropped("a server of rewards makes no updates"),
}


def _fit(section: str, lr: float, min_lr: float, weight_decay: float) -> Rules:
    return {
        **COMMON,
        **EXP_MANAGER,
        **_optimizer(lr, min_lr, weight_decay),
        f"trainer.{section}.max_epochs": joint("fit.epochs", 1),
        f"trainer.{section}.max_steps": joint("fit.max_steps", -1),
        f"trainer.{section}.val_check_interval": to("fit.validation_interval", 100, steps),
        f"trainer.{section}.save_interval": to("checkpoint.interval", 100, steps),
        f"trainer.{section}.limit_val_batches": lost("all validation data are used", 1.0, None),
        f"trainer.{section}.limit_train_batches": lost("all training data are used", 1.0, None),
        f"trainer.{section}.gradient_clip_val": to("optimizer.clip_grad", 1.0, clip_norm),
    }


REWARD_TRAINING: Rules = {
    **_fit("rm", lr=9e-6, min_lr=9e-7, weight_decay=0.1),
    **_PRETRAINED,
    **_REWARD_HEAD,
    **_MEGATRON_DATA,
    "model.data.seq_length": joint("data.max_sequence_length"),
    "model.encoder_seq_length": joint("data.max_sequence_length", 4096),
    "trainer.rm.train_random_sampler": lost("examples are always shuffled", True, None),
    "trainer.rm.val_random_sampler": dropped("the order of validation data changes nothing"),
    "model.use_avg_pool": to("reward.score", False, pooling),
    "model.forward_micro_batch_size": dropped(_SAME_SIZE),
    "model.micro_batch_size": to("model.micro_batch_size", 1),
    "model.global_batch_size": to("fit.global_batch_size", 64),
}

_VALIDATION_COPY = "training's holds for validation, too"
_SFT_TEXT = "rows {prompt, response} are taken as they are: nemo-eppo prepare nemo_aligner writes them"

SFT: Rules = {
    **_fit("sft", lr=3e-5, min_lr=9e-7, weight_decay=0.01),
    **_PEFT,
    "name": dropped("exp_manager.name holds it"),
    "trainer.sft.inference_metrics.*": dropped("the validation metric is the loss"),
    "trainer.sft.skip_validation": lost("checkpoints are always validated", False, None),
    "inference.*": dropped("the validation metric is the loss"),
    "model.micro_batch_size": dropped(_COPY),
    "model.global_batch_size": dropped(_COPY),
    "model.restore_from_path": joint("model.restore_from_path"),
    "model.resume_from_checkpoint": lost("a run resumes from its own newest checkpoint", None),
    "model.save_nemo_on_validation_end": dropped("no .nemo files: nemo-eppo convert"),
    "model.sync_batch_comm": dropped(_SPEED),
    "model.answer_only_loss": to("answer_only_loss", True, answer_only),
    "model.gradient_as_bucket_view": dropped(_SPEED),
    "model.seq_len_interpolation_factor": lost("the model's positions are left as they are", None),
    "model.hidden_dropout": lost("there is no dropout in SFT", 0, None),
    "model.attention_dropout": lost("there is no dropout in SFT", 0, None),
    "model.ffn_dropout": lost("there is no dropout in SFT", 0, None),
    "model.steerlm": dropped(_STEERLM),
    "model.steerlm2.*": dropped(_STEERLM),
    "model.steerable_attributes.*": dropped(_STEERLM),
    "model.data.steerlm2_micro_batch_size": dropped(_STEERLM),
    "model.data.steerlm2_weight_micro_batch_size": dropped(_STEERLM),
    "model.inference.*": dropped("the validation metric is the loss"),
    "model.data.chat": lost("conversations become rows: nemo-eppo prepare nemo_aligner --chat-template", False, None),
    "model.data.chat_prompt_tokens.*": dropped("the tokenizer's chat template is used"),
    "model.data.sample": lost("every example is used once per epoch", False, None),
    "model.data.num_workers": dropped(_SPEED),
    "model.data.memmap_workers": dropped(_SPEED),
    "model.data.index_mapping_dir": dropped(_FORMAT),
    "model.data.dataloader_type": dropped("examples come in a random order that the seed decides"),
    "model.data.test_ds.*": dropped("not used there either"),
    "model.data.train_ds.file_path": joint("data.train"),
    "model.data.train_ds.file_names": joint("data.train"),
    "model.data.train_ds.concat_sampling_probabilities": lost("all examples count alike", None),
    "model.data.train_ds.global_batch_size": to("fit.global_batch_size", 128),
    "model.data.train_ds.micro_batch_size": to("model.micro_batch_size", 1),
    "model.data.train_ds.shuffle": lost("examples are always shuffled", True, None),
    "model.data.train_ds.memmap_workers": dropped(_SPEED),
    "model.data.train_ds.max_seq_length": to("data.max_sequence_length", 2048),
    "model.data.train_ds.min_seq_length": lost("short examples are kept", 0, 1, None),
    "model.data.train_ds.drop_last": lost("an incomplete last batch is dropped", True, None),
    "model.data.train_ds.label_key": dropped(_SFT_TEXT),
    "model.data.train_ds.add_eos": lost("every response ends with EOS", True, None),
    "model.data.train_ds.add_sep": lost("no separator is added", False, None),
    "model.data.train_ds.add_bos": lost("prompts are tokenised as `nemo-eppo prepare` wrote them", False, None),
    "model.data.train_ds.truncation_field": dropped("longer examples are dropped, none is truncated"),
    "model.data.train_ds.truncation_method": dropped("longer examples are dropped, none is truncated"),
    "model.data.train_ds.index_mapping_dir": dropped(_FORMAT),
    "model.data.train_ds.prompt_template": dropped(_SFT_TEXT),
    "model.data.train_ds.hf_dataset": dropped(_FORMAT),
    "model.data.train_ds.packed_sequence": dropped("changes speed only: model.micro_batch_tokens packs"),
    "model.data.train_ds.packed_sequence_return_cu_seqlen": dropped(_SPEED),
    "model.data.validation_ds.file_path": joint("data.validation"),
    "model.data.validation_ds.file_names": joint("data.validation"),
    "model.data.validation_ds.*": dropped(_VALIDATION_COPY),
}

KINDS: dict[str, Rules] = {
    "ppo-actor": ACTOR,
    "ppo-critic": CRITIC,
    "reward-server": REWARD_SERVER,
    "reward-training": REWARD_TRAINING,
    "sft": SFT,
}
