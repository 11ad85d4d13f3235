"""Train a policy with PPO, or with an estimator without a critic such as GRPO. `method=NAME`
chooses it; `method=eppo`, the default, takes the energy-loss penalty of EPPO off the reward.

Unless the settings say otherwise, the actor asks a critic (serve_ppo_critic.py) and a reward model
(serve_reward_model.py), and waits for servers that are still starting. Start it with
`torchrun --nproc_per_node N train_gpt_ppo_actor.py key=value ...`.
"""

from nemo_eppo.entry.job import job
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.ppo import PPOConfig


@job(PPOConfig, config_name="gpt_ppo_actor")
def main(config: PPOConfig, run: Run) -> None:
    from nemo_eppo.training.ppo_loop import train_ppo

    train_ppo(config, run)


if __name__ == "__main__":
    main()
