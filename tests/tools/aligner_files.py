"""Files of one's own in NeMo-Aligner's manner, with values unlike its defaults."""

from typing import Any

ACTOR: dict[str, Any] = {
    "trainer": {
        "num_nodes": 2,
        "devices": 4,
        "precision": "bf16-mixed",
        "ppo": {
            "max_steps": 300,
            "max_epochs": 2,
            "val_check_interval": 7,
            "save_interval": "${.val_check_interval}",
            "gradient_clip_val": 0.5,
            "initial_policy_kl_penalty": 0.02,
            "use_absolute_kl": False,
            "discount_factor": 0.99,
            "gae_lambda": 0.9,
            "normalize_advantages": False,
            "trt_llm": {"enable": True, "model_type": "llama"},
        },
    },
    "remote_critic_rm": {
        "combine_rm_and_critic_server": False,
        "reward_model": {"ip": "node7", "port": 5600},
        "critic": {"ip": "localhost", "port": 5601},
    },
    "exp_manager": {
        "explicit_log_dir": "/results/actor",
        "create_wandb_logger": True,
        "wandb_logger_kwargs": {"project": "p", "name": "n"},
        "max_time_per_run": "00:03:30:00",
        "checkpoint_callback_params": {
            "monitor": "val_global_rewards",
            "save_top_k": 3,
            "mode": "max",
            "model_parallel_size": "${multiply:${model.tensor_model_parallel_size},${model.nowhere}}",
        },
    },
    "pretrained_checkpoint": {"restore_from_path": "/models/sft.nemo"},
    "model": {
        "ppo": {
            "num_rollout_samples": 96,
            "rollout_micro_batch_size": 12,
            "num_val_samples": "${.num_rollout_samples}",
            "entropy_bonus": 0.01,
            "ratio_eps": 0.15,
            "sampling_params": {
                "temperature": 0.8,
                "top_k": 50,
                "top_p": 0.0,
                "repetition_penalty": 1.2,
                "end_strings": ["<|endoftext|>", "\nUser:"],
            },
            "length_params": {"max_length": "${int_div:${model.encoder_seq_length}, 4}", "min_length": 5},
        },
        "micro_batch_size": 3,
        "global_batch_size": 48,
        "encoder_seq_length": 2048,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "activations_checkpoint_granularity": "full",
        "seed": 99,
        "optim": {
            "name": "distributed_fused_adam",
            "lr": 3e-7,
            "betas": [0.8, 0.9],
            "sched": {"name": "CosineAnnealing", "warmup_steps": 5, "constant_steps": 0, "min_lr": 3e-8},
        },
        "data": {"data_impl": "jsonl", "data_prefix": {"train": ["/d/train.jsonl"], "validation": ["/d/val.jsonl"]}},
    },
}
CRITIC: dict[str, Any] = {
    "trainer": {"ppo": {"port": 5601, "combine_rm_and_critic_server": True, "max_steps": 600}},
    "pretrained_checkpoint": {"restore_from_path": "/models/rm.nemo"},
    "model": {"loss_clip_val": 0.3, "reward_standardization": {"enable": True, "mean": 1.5, "std": 2.5}},
}
REWARD_SERVER: dict[str, Any] = {
    "trainer": {"precision": 32},
    "inference": {"port": 5600, "inference_micro_batch_size": [2, 8]},
    "rm_model_file": "/models/rm_hf",
}
REWARD_TRAINING: dict[str, Any] = {
    "trainer": {"rm": {"max_epochs": 2, "max_steps": -1, "val_check_interval": 50, "save_interval": 200}},
    "exp_manager": {"checkpoint_callback_params": {"monitor": "val_loss", "save_top_k": 3, "mode": "min"}},
    "pretrained_checkpoint": {"restore_from_path": "/models/sft_hf"},
    "model": {
        "global_batch_size": 32,
        "encoder_seq_length": 1024,
        "data": {
            "seq_length": "${model.encoder_seq_length}",
            "data_prefix": {"train": ["/d/a"], "validation": ["/d/b"]},
        },
    },
}
SFT: dict[str, Any] = {
    "trainer": {"sft": {"max_steps": 500, "val_check_interval": 0.5}},
    "exp_manager": {"checkpoint_callback_params": {"monitor": "val_loss", "save_top_k": 1, "mode": "min"}},
    "model": {
        "restore_from_path": "/models/base.nemo",
        "hidden_dropout": 0.1,
        "data": {
            "train_ds": {"file_path": "/d/train.jsonl", "global_batch_size": 16, "max_seq_length": 512},
            "validation_ds": {"file_path": "/d/val.jsonl", "add_eos": "${model.data.train_ds.max_seq_length}"},
        },
    },
}
FILES = {
    "ppo-actor": ACTOR,
    "ppo-critic": CRITIC,
    "reward-server": REWARD_SERVER,
    "reward-training": REWARD_TRAINING,
    "sft": SFT,
}
