"""Fine-tune a GPT model on {"prompt", "response"} rows: its responses become more likely.

Start it with `python train_gpt_sft.py key=value ...`, on several ranks with
`torchrun --nproc_per_node N train_gpt_sft.py key=value ...`.
"""

from nemo_eppo.entry.job import job
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.training import SFTConfig


@job(SFTConfig, config_name="gpt_sft")
def main(config: SFTConfig, run: Run) -> None:
    from nemo_eppo.training.sft import train_sft

    train_sft(config, run)


if __name__ == "__main__":
    main()
