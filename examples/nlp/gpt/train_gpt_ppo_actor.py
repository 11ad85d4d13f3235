"""Train a policy with PPO, and with the energy-loss penalty of EPPO if
`shaping.energy_penalty.eta` is above 0.

The critic and the reward models are jobs of their own, which have to be up or coming up:
serve_ppo_critic.py and serve_reward_model.py. Start it with
`torchrun --nproc_per_node N train_gpt_ppo_actor.py key=value ...`.
"""

from nemo_eppo.entry.job import job
from nemo_eppo.observability.run import Run
from nemo_eppo.training.ppo_config import PPOConfig


@job(PPOConfig, config_name="gpt_ppo_actor")
def main(config: PPOConfig, run: Run) -> None:
    from nemo_eppo.training.ppo_loop import train_ppo

    train_ppo(config, run)


if __name__ == "__main__":
    main()
