"""Lists the keys that several of NeMo-Aligner's YAML files have, and the rule for each; aligner_keys.py has the others.
A name that ends in ".*" stands for all keys below it."""

from nemo_eppo.tools.aligner_rules import Rule, dropped, joint, lost, precision, recompute, schedule, to

Rules = dict[str, Rule]

_LAUNCH = "ranks are what torchrun starts: see the command at the top of the output"
COPY = "a copy of another key"
SPEED = "changes speed or memory only"
_MODEL = "comes with the model"
_LIGHTNING = "of Lightning's own loop, which is not used"
_LORA = "adapters come with the checkpoint of the run that they were trained in"
FORMAT = "data are JSON lines (nemo-eppo prepare)"
STRICT = "every weight has to be in the checkpoint"
_REGRESSION = "regression models are not supported"
SAME_SIZE = "model.micro_batch_size holds for inference, too"

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
    "trainer.load_strict": lost(STRICT, True, None),
    "model.precision": dropped("a copy of trainer.precision"),
    "model.mcore_gpt": lost("models are always Megatron-core's", True, None),
    "model.transformer_engine": dropped("used where it is installed"),
    "model.tensor_model_parallel_size": to("model.parallel.tensor_model_parallel_size", 1),
    "model.pipeline_model_parallel_size": to("model.parallel.pipeline_model_parallel_size", 1),
    "model.virtual_pipeline_model_parallel_size": to("model.parallel.virtual_pipeline_model_parallel_size"),
    "model.context_parallel_size": dropped("every rank holds whole sequences here; its ranks become data parallelism"),
    "model.sequence_parallel": joint("model.parallel.sequence_parallel", False),
    "model.activations_checkpoint_granularity": to("model.recompute", None, recompute),
    "model.activations_checkpoint_method": dropped(SPEED),
    "model.activations_checkpoint_num_layers": dropped(SPEED),
    "model.activations_checkpoint_layers_per_pipeline": dropped(SPEED),
    "model.num_micro_batches_with_partial_activation_checkpoints": dropped(SPEED),
    "model.megatron_amp_O2": dropped("bf16 always keeps fp32 main weights"),
    "model.ub_tp_comm_overlap": dropped(SPEED),
    "model.ub_tp_comm_overlap_cfg.*": dropped(SPEED),
    "model.use_flash_attention": dropped(SPEED),
    "model.apply_rope_fusion": dropped(SPEED),
    "model.gradient_accumulation_fusion": dropped(SPEED),
    "model.bias_activation_fusion": dropped(SPEED),
    "model.bias_dropout_add_fusion": dropped(SPEED),
    "model.masked_softmax_fusion": dropped(SPEED),
    "model.dist_ckpt_format": dropped("checkpoints are Megatron-core's torch_dist"),
    "model.dist_ckpt_load_on_device": dropped(SPEED),
    "model.dist_ckpt_parallel_save": dropped(SPEED),
    "model.encoder_seq_length": dropped(_MODEL),
    "model.max_position_embeddings": dropped(_MODEL),
    "model.share_embeddings_and_output_weights": dropped(_MODEL),
    "model.rotary_base": lost(_MODEL, None),
    "model.overwrite_base_config.*": dropped("there is no configuration inside of checkpoints to merge with"),
}

EXP_MANAGER: Rules = {
    "exp_manager.explicit_log_dir": joint("exp_manager.explicit_log_dir"),
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
    "trainer.max_epochs": dropped(COPY),
    "trainer.max_steps": dropped(COPY),
}


def optimizer(lr: float, min_lr: float, weight_decay: float = 0.1) -> Rules:
    return {
        "model.optim.name": joint("optimizer.distributed", "distributed_fused_adam"),
        "model.optim.lr": to("optimizer.lr", lr, float),
        "model.optim.weight_decay": to("optimizer.weight_decay", weight_decay, float),
        "model.optim.betas": to("optimizer.betas", [0.9, 0.98], lambda values: [float(value) for value in values]),
        "model.optim.eps": to("optimizer.eps", None, float),
        "model.optim.bucket_cap_mb": dropped(SPEED),
        "model.optim.overlap_grad_sync": dropped(SPEED),
        "model.optim.overlap_param_sync": dropped(SPEED),
        "model.optim.contiguous_grad_buffer": dropped(SPEED),
        "model.optim.contiguous_param_buffer": dropped(SPEED),
        "model.optim.grad_sync_dtype": lost("gradients are summed in fp32", None, "fp32"),
        "model.optim.sched.name": to("optimizer.schedule", "CosineAnnealing", schedule),
        "model.optim.sched.warmup_steps": to("optimizer.warmup_steps", 10),
        "model.optim.sched.constant_steps": joint("optimizer.constant_steps"),
        "model.optim.sched.min_lr": to("optimizer.min_lr", min_lr, float),
        "model.optim.sched.max_steps": dropped(COPY),
        "model.seed": to("seed", 1234),
    }


PRETRAINED: Rules = {"pretrained_checkpoint.restore_from_path": joint("model.restore_from_path")}

MEGATRON_DATA: Rules = {
    "model.data.data_impl": lost(FORMAT, "jsonl", None),
    "model.data.splits_string": lost("training and validation data are files of their own", None),
    "model.data.seq_length": joint("data.max_prompt_length"),
    "model.data.skip_warmup": dropped(FORMAT),
    "model.data.num_workers": dropped(SPEED),
    "model.data.dataloader_type": dropped("examples come in a random order that the seed decides"),
    "model.data.reset_position_ids": lost("every row is one sequence", False, None),
    "model.data.reset_attention_mask": lost("every row is one sequence", False, None),
    "model.data.eod_mask_loss": lost("the end of a response is learnt like its other tokens", False, None),
    "model.data.index_mapping_dir": dropped(FORMAT),
    "model.data.data_prefix": joint("data.train, data.validation"),
    "model.data.data_prefix.train": joint("data.train"),
    "model.data.data_prefix.validation": joint("data.validation"),
    "model.data.data_prefix.test": dropped("not used there either"),
}

_OTHER_PEFT = "of another model.peft.peft_scheme than lora and none, which is refused"

PEFT: Rules = {
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

REWARD_HEAD: Rules = {
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
    "model.forward_mbs": dropped(SAME_SIZE),
}

STANDARDIZATION: Rules = {
    "model.reward_standardization.enable": joint(""),
    "model.reward_standardization.mean": joint(""),
    "model.reward_standardization.std": joint(""),
}
