"""Serve the PPO critic, and train it on what the actor sends, through PyTriton until the job is stopped.

Start it with `python serve_ppo_critic.py key=value ...`, on several ranks with
`torchrun --nproc_per_node N serve_ppo_critic.py key=value ...`.
"""

from nemo_eppo.entry.job import job
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.critic import CriticConfig


@job(CriticConfig, config_name="gpt_ppo_critic")
def main(config: CriticConfig, run: Run) -> None:
    from nemo_eppo.training.critic import serve_critic

    serve_critic(config, run)


if __name__ == "__main__":
    main()
