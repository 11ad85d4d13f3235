"""Let the SFT model answer an actor's prompts, and keep the energy losses of its answers: the actor
(train_gpt_ppo_actor.py) with `energy.reference=own_response` and the same `energy.cache` then finds them.

It may run before the actor or beside it, in any layout; what is in the cache already is not answered
again. Start it with `torchrun --nproc_per_node N read_reference_energies.py key=value ...`.
"""

from nemo_eppo.entry.job import job
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.reference_energies import ReferenceEnergiesConfig


@job(ReferenceEnergiesConfig, config_name="gpt_reference_energies")
def main(config: ReferenceEnergiesConfig, run: Run) -> None:
    from nemo_eppo.training.reference_energies import read_reference_energies

    read_reference_energies(config, run)


if __name__ == "__main__":
    main()
