"""Names of the keys in NeMo-Aligner's YAML files, of all its versions. `a.{b,c}` stands for `a.b` and `a.c`."""

_TRAINER = "trainer.{num_nodes,devices,accelerator,precision,logger,enable_checkpointing,use_distributed_sampler}"
_EXP_MANAGER = """
exp_manager.{explicit_log_dir,exp_dir,name,create_wandb_logger,resume_if_exists,resume_ignore_no_checkpoint}
exp_manager.{resume_from_checkpoint,create_checkpoint_callback,max_time_per_run}
exp_manager.wandb_logger_kwargs.{project,name}
exp_manager.checkpoint_callback_params.{monitor,save_top_k,mode,always_save_nemo,save_nemo_on_train_end,filename}
exp_manager.checkpoint_callback_params.{model_parallel_size,save_best_model}
trainer.{max_time,max_epochs,max_steps}
"""
_OPTIM = """
model.optim.{name,bucket_cap_mb,overlap_grad_sync,contiguous_grad_buffer,lr,weight_decay,betas}
model.optim.sched.{name,warmup_steps,constant_steps,min_lr}
model.seed
"""
_MODEL = """
model.{micro_batch_size,global_batch_size,megatron_amp_O2,encoder_seq_length,max_position_embeddings,precision}
"""
_DATA = """
model.data.{data_impl,splits_string,seq_length,skip_warmup,num_workers,dataloader_type,reset_position_ids}
model.data.{reset_attention_mask,eod_mask_loss,index_mapping_dir,data_prefix}
model.overwrite_base_config.data.data_prefix
"""
_HEAD = """
model.{output_sequence,use_avg_pool,force_head_dtype,reward_model_type}
model.regression.{num_attributes,merge_attributes,attribute_weights}
"""
_PEFT = """
model.peft.{peft_scheme,restore_from_path}
model.peft.lora_tuning.{target_modules,adapter_dim,alpha,adapter_dropout,column_init_method,row_init_method,layer_selection}
model.peft.lora_tuning.{weight_tying,position_embedding_strategy}
model.peft.adapter_tuning.{adapter_dim,adapter_dropout,column_init_method,layer_selection,norm_position}
model.peft.adapter_tuning.{norm_type,position_embedding_strategy,row_init_method,type,weight_tying}
model.peft.ia3_tuning.layer_selection
model.peft.p_tuning.{bottleneck_dim,embedding_dim,init_std,virtual_tokens}
"""
_STANDARDIZATION = "model.reward_standardization.{enable,mean,std}"

_ACTOR = f"""
defaults
{_TRAINER} {_EXP_MANAGER} {_OPTIM} {_MODEL} {_DATA} {_PEFT}
trainer.ppo.{{max_steps,max_epochs,val_check_interval,save_interval,gradient_clip_val,initial_policy_kl_penalty}}
trainer.ppo.{{use_absolute_kl,discount_factor,gae_lambda,normalize_advantages,model_gbs,model_mbs}}
trainer.ppo.{{rollout_batch_seq_length,critic_warmup_steps}}
trainer.ppo.trt_llm.{{enable,reshard,max_input_len,model_type,unload_engine_train,seed}}
trainer.ppo.batch_iterator.{{use_flask,port}}
remote_critic_rm.{{pad_to_length,combine_rm_and_critic_server}}
remote_critic_rm.reward_model.{{name,ip,port}}
remote_critic_rm.critic.name.{{train,infer,save}}
remote_critic_rm.critic.{{ip,port}}
pretrained_checkpoint.restore_from_path
model.ppo.{{rollout_micro_batch_size,num_rollout_samples,forward_micro_batch_size,val_rollout_micro_batch_size}}
model.ppo.{{num_val_samples,offload_adam_states,entropy_bonus,ratio_eps,trt_llm}}
model.ppo.sampling_params.{{use_greedy,temperature,top_k,top_p,repetition_penalty,add_BOS,all_probs,compute_logprob}}
model.ppo.sampling_params.end_strings
model.ppo.length_params.{{max_length,min_length}}
model.{{mcore_gpt,sequence_parallel}}
model.optim.overlap_param_sync
model.peft.restore_from_ckpt.{{checkpoint_dir,checkpoint_name}}
model.ppo.sampling_params.apply_to_logprobs.{{kl_penalty_actor,kl_penalty_ref,loss}}
trainer.gradient_clip_val
trainer.ppo.{{batch_critic_send,export_rollouts_jsonl,host,log_dir,num_responses_per_prompt,output_dir,port}}
trainer.ppo.{{rollout_micro_batch_size,train_seq_length,trt_model_dir}}
trainer.ppo.flask_server.{{enable,host,port}}
trainer.ppo.trt_llm.{{max_context_len,max_input_tokens}}
"""
_CRITIC = f"""
defaults
{_TRAINER} {_EXP_MANAGER} {_OPTIM} {_MODEL} {_HEAD} {_STANDARDIZATION}
trainer.ppo.{{port,combine_rm_and_critic_server,max_steps,gradient_clip_val,pad_sequence_length_to_multiple}}
trainer.ppo.{{max_queue_delay_microseconds,inference_micro_batch_size}}
pretrained_checkpoint.restore_from_path
model.{{loss_clip_val,offload_adam_states,forward_micro_batch_size}}
model.{{attribute_weights,forward_mbs,merge_attributes}}
model.optim.overlap_param_sync
model.overwrite_base_config.data.data_prefix
trainer.{{gradient_clip_val,load_strict}}
trainer.ppo.{{forward_mbs,gbs,load_strict,strip_sequence_length_to_multiple}}
"""
_REWARD_SERVER = f"""
trainer.{{num_nodes,devices,accelerator,logger,precision}} {_STANDARDIZATION}
inference.{{micro_batch_size,inference_micro_batch_size,port}}
rm_model_file
model.{{sequence_parallel,activations_checkpoint_granularity,activations_checkpoint_method,precision}}
model.{{forward_micro_batch_size}}
model.regression.{{merge_attributes,attribute_weights}}
dataset_path
inference.{{forward_mbs,max_queue_delay_microseconds,model_name,strip_sequence_length_to_multiple}}
model.{{attribute_weights,forward_mbs,global_batch_size,merge_attributes}}
model.overwrite_base_config.data.data_prefix
model.regression.head_type
"""
_REWARD_TRAINING = f"""
defaults
{_TRAINER} {_EXP_MANAGER} {_OPTIM} {_MODEL} {_HEAD} {_DATA}
trainer.rm.{{max_epochs,max_steps,val_check_interval,save_interval,limit_val_batches,gradient_clip_val}}
pretrained_checkpoint.restore_from_path
model.{{mcore_gpt,share_embeddings_and_output_weights}}
model.regression.loss_mask_val
model.{{attribute_weights,forward_mbs,forward_micro_batch_size,head_type,loss_mask_val,merge_attributes}}
model.num_attributes
model.categorical.num_category
model.optim.overlap_param_sync
model.regression.{{head_type,load_rm_head_weights,loss_func}}
trainer.gradient_clip_val
trainer.rm.{{limit_train_batches,train_random_sampler,val_random_sampler}}
"""
_DATASET = (
    """global_batch_size,micro_batch_size,shuffle,memmap_workers,max_seq_length,min_seq_length,drop_last,label_key"""
)
_DATASET += ",file_path,add_eos,add_sep,add_bos,truncation_field,index_mapping_dir,prompt_template,hf_dataset"
_DATASET += ",truncation_method"
_SFT = f"""
name
{_TRAINER} {_EXP_MANAGER} {_OPTIM} {_PEFT}
trainer.sft.{{max_epochs,max_steps,val_check_interval,save_interval,limit_val_batches,gradient_clip_val}}
model.{{tensor_model_parallel_size,pipeline_model_parallel_size,restore_from_path,resume_from_checkpoint}}
model.{{save_nemo_on_validation_end,sync_batch_comm,megatron_amp_O2,encoder_seq_length,sequence_parallel}}
model.{{activations_checkpoint_granularity,activations_checkpoint_method,activations_checkpoint_num_layers}}
model.{{activations_checkpoint_layers_per_pipeline,answer_only_loss,gradient_as_bucket_view}}
model.{{seq_len_interpolation_factor,use_flash_attention,hidden_dropout,attention_dropout,ffn_dropout}}
model.data.{{chat,sample,num_workers,dataloader_type}}
model.data.chat_prompt_tokens.{{system_turn_start,turn_start,label_start,end_of_turn,end_of_name}}
model.data.train_ds.{{{_DATASET}}}
model.data.validation_ds.{{{_DATASET},output_original_text}}
inference.{{all_probs,compute_attention_mask,compute_logprob,greedy,min_tokens_to_generate,repetition_penalty}}
inference.{{temperature,top_k,top_p}}
model.{{context_parallel_size,global_batch_size,micro_batch_size,rotary_base,steerlm,transformer_engine}}
model.data.{{index_mapping_dir,memmap_workers,steerlm2_micro_batch_size,steerlm2_weight_micro_batch_size}}
model.data.test_ds.prompt_template
model.data.train_ds.concat_sampling_probabilities
model.data.validation_ds.{{include_text,names,output_file_path_prefix,tokens_to_generate}}
model.data.validation_ds.write_predictions_to_file
model.data.validation_ds.metric.{{average,name,num_classes}}
model.overwrite_base_config.data.data_prefix
model.steerable_attributes.{{coherence,complexity,correctness,creativity,helpfulness,humor,quality,toxicity}}
model.steerable_attributes.verbosity
model.steerlm2.{{forward_micro_batch_size,micro_batch_size}}
trainer.{{gradient_clip_val,skip_validation}}
trainer.sft.{{limit_train_batches,skip_validation}}
"""


def _expand(text: str) -> list[str]:
    names = []
    for pattern in text.split():
        prefix, brace, rest = pattern.partition("{")
        names += [prefix + name for name in rest.removesuffix("}").split(",")] if brace else [pattern]
    return names


KEY_NAMES = {
    "ppo-actor": _expand(_ACTOR),
    "ppo-critic": _expand(_CRITIC),
    "reward-server": _expand(_REWARD_SERVER),
    "reward-training": _expand(_REWARD_TRAINING),
    "sft": _expand(_SFT),
}
