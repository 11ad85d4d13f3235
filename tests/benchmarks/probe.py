"""Seconds of a forward pass that gives log-probs and entropies, without and with the energy probe of each preset."""

from functools import partial

from networks import even_rows, our_runner, shape
from pairs import Contestant, Options, Row, compare, interleave

from nemo_eppo.megatron.energy import readable_presets
from nemo_eppo.settings.energy import EnergyProbeConfig


def measure(options: Options) -> list[Row]:
    found: list[Row] = []
    for batch, length in ((2, 16),) if options.smallest else ((64, 96), (8, 512)):
        model = shape()
        rows = even_rows(batch, length, model.vocab_size)
        contestants: dict[str, Contestant] = {"no probe": partial(our_runner(model).infer, *rows.values(), outputs=2)}
        for preset in readable_presets():
            runner = our_runner(model, probe=EnergyProbeConfig(preset=preset))
            contestants[f"{preset}, attached"] = partial(runner.infer, *rows.values(), outputs=2)
            contestants[f"{preset}, read"] = partial(runner.infer, *rows.values(), outputs=2, energies=True)
            if preset == "paper":
                every = EnergyProbeConfig(layers=tuple(range(model.num_layers)))
                runner = our_runner(model, probe=every)
                contestants["paper, all layers read"] = partial(runner.infer, *rows.values(), outputs=2, energies=True)
        found += compare(interleave(contestants, options.rounds), "no probe", batch=batch, length=length)
    return found
