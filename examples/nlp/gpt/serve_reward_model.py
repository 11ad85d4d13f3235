"""Serve a trained reward model through PyTriton until the job is stopped.

Start it with `python serve_reward_model.py key=value ...`, on several ranks with
`torchrun --nproc_per_node N serve_reward_model.py key=value ...`.
"""

from nemo_eppo.entry.job import job
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.reward_model import RewardServerConfig


@job(RewardServerConfig, config_name="serve_reward_model")
def main(config: RewardServerConfig, run: Run) -> None:
    from nemo_eppo.training.reward_service import serve_reward_model

    serve_reward_model(config, run)


if __name__ == "__main__":
    main()
