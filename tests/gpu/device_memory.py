"""The estimate of `nemo-eppo doctor` against the peak of a job's model: of torch's tensors on a GPU, else of PSS.

Each does its work of a step, log-probs and energies, values or rewards, then an update of what is trained, in bf16.
"""

from collections.abc import Iterator
from functools import partial

from checks import LLAMA_1B, LLAMA_3B, TINY, passed
from memory import MIB, jobs, peak
from networks import even_rows, our_runner
from pairs import Options, Row

from nemo_eppo.launch.memory import Workload, estimate
from nemo_eppo.megatron import device
from nemo_eppo.settings.model import ParallelConfig

BEYOND = 1.2
"""How many times the estimate a peak may be."""


def measure(options: Options) -> Iterator[Row]:
    wide = TINY.model_copy(update={"hidden_size": 128})
    shapes = {"tiny": TINY, "wider": wide} if options.smallest else {"1B": LLAMA_1B, "3B": LLAMA_3B}
    batch, length = (2, 8) if options.smallest else (4, 1024)
    for name, model in shapes.items():
        rows = even_rows(2 * batch, length, model.vocab_size)
        build = partial(our_runner, model, batch, precision="bf16")
        for job, work in jobs(build).items():
            found = peak(*work, rows)
            workload = Workload(batch * length, trained=job != "reward")
            expected = estimate(model, ParallelConfig(), "bf16", workload, outputs=None if job == "actor" else 1)
            row: Row = {"what": job, "model": name, "estimate": expected.total / MIB, **found}
            row["peak / estimate"] = ratio = found["peak"] / (expected.total / MIB)
            # a small process is full of what is no model's
            yield passed(row, f"peak at most {BEYOND} estimates", ratio <= BEYOND) if device.on_gpu() else row
            device.empty_cache()
