"""Train a reward model, or an ensemble of them, on {"prompt", "chosen", "rejected"} rows.

`reward.kind` chooses the loss: Bradley-Terry alone, with ODIN's length head, or with InfoRM's
bottleneck.

Start it with `python train_reward_model.py key=value ...`, on several ranks with
`torchrun --nproc_per_node N train_reward_model.py key=value ...`.
"""

from nemo_eppo.entry.job import job
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.reward_model import RewardTrainingConfig


@job(RewardTrainingConfig, config_name="gpt_reward_model")
def main(config: RewardTrainingConfig, run: Run) -> None:
    from nemo_eppo.training.reward_model import train_reward_model

    train_reward_model(config, run)


if __name__ == "__main__":
    main()
