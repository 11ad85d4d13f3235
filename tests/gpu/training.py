"""Updates and log-prob passes at the shape of a 1B Llama in bf16: tokens a second, and what the energy probe costs.

MFU is the floating-point operations that a pass needs (2 for each weight that a token meets, causal attention, three
times that with the backward pass; nothing for padding, or for computing logits again), over those that the device makes
in the same time in a large bf16 matrix product, measured before. Mixed lengths are new in every round. Attention sees
multiples of 64, for each of which cuDNN plans once: packed batches are also measured with kernels that do not plan.
"""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from checks import LLAMA_1B, TINY
from networks import our_runner, rows_of, thousandth_nll
from pairs import Contestant, Options, Row, compare, interleave, medians
from torch.nn.attention import sdpa_kernel

from nemo_eppo.megatron import device
from nemo_eppo.megatron.attention import ALL_BUT_CUDNN
from nemo_eppo.megatron.runner import ModelRunner, Rows
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.model import ModelConfig


def measure(options: Options) -> Iterator[Row]:
    model, size = (TINY, 256) if options.smallest else (LLAMA_1B, 8192)
    rate = matmul_rate(size)
    yield {"what": f"bf16 product of {size} x {size} matrices", "TFLOP/s": rate / 1e12}
    for case in ("even", "mixed"):
        yield from speeds(case, model, options, rate)
        gc.collect()  # the runners hold each other
        device.empty_cache()


def speeds(case: str, model: ModelConfig, options: Options, rate: float) -> Iterator[Row]:
    longest, count, together = (16, 4, 2) if options.smallest else (1024, 32, 8)
    batches = []
    for _ in range(options.rounds + 1):  # one more, before it counts
        lengths = torch.randint(longest if case == "even" else longest // 8, longest + 1, (count,))
        batches.append(rows_of(lengths, model.vocab_size))
    build = partial(our_runner, model, together, precision="bf16", trained=True)
    padded, packed = build(), build(micro_batch_tokens=together * longest)
    for what, work, times in (("update", update, 3), ("log-probs", log_probs, 1)):
        contestants: dict[str, Contestant] = {
            "padded": on_the_next(batches, partial(work, padded)),
            "packed": on_the_next(batches, partial(work, packed)),
            "packed, without cuDNN": on_the_next(batches, sdpa_kernel(ALL_BUT_CUDNN)(partial(work, packed))),
        }
        for row in compare(interleave(contestants, options.rounds), "padded"):
            yield told({**row, "what": f"{what}, {row['what']}", "lengths": case}, model, batches[1:], times, rate)
    if case == "even":
        yield from probe(model, batches[0], together, options)


def on_the_next(batches: list[Rows], work: Callable[[Rows], None]) -> Contestant:
    """Work on another batch each time; its unit is a token."""
    order = cycle(batches)

    def contestant() -> int:
        rows = next(order)
        work(rows)
        return int(rows["lengths"].sum())

    return contestant


def probe(model: ModelConfig, rows: Rows, together: int, options: Options) -> Iterator[Row]:
    with_probe = our_runner(model, together, precision="bf16", probe=EnergyProbeConfig())
    contestants: dict[str, Contestant] = {
        "log-probs, no energies": partial(log_probs, with_probe, rows),
        "log-probs and energies": partial(log_probs, with_probe, rows, True),
    }
    yield from compare(interleave(contestants, 3 * options.rounds), "log-probs, no energies", lengths="even")


def told(row: Row, model: ModelConfig, batches: list[Rows], times: int, rate: float) -> Row:
    lengths = torch.cat([rows["lengths"] for rows in batches]).double()
    attention = 2 * model.num_layers * model.num_attention_heads * model.head_width * lengths.square().mean()
    operations = times * float(2 * weights(model) * lengths.mean() + attention) / float(lengths.mean())  # of a token
    seconds = float(row["clock s"])
    return row | {"tokens/s": 1 / seconds, "MFU": operations / seconds / rate}


def weights(model: ModelConfig) -> int:
    """How many weights a token is multiplied by."""
    attention = (2 * model.num_attention_heads + 2 * model.kv_heads) * model.head_width
    layer = model.hidden_size * (attention + 3 * model.ffn_hidden_size)
    return model.num_layers * layer + model.hidden_size * model.vocab_size


def update(runner: ModelRunner, rows: Rows) -> None:
    runner.train_step(rows, thousandth_nll)


def log_probs(runner: ModelRunner, rows: Rows, energies: bool = False) -> None:
    runner.infer(*rows.values(), outputs=2, energies=energies)


def matmul_rate(size: int) -> float:
    """Floating-point operations a second."""
    left, right = torch.randn(2, size, size, dtype=torch.bfloat16, device=device.device())
    out = torch.empty_like(left)

    def products() -> int:
        for _ in range(10):
            torch.mm(left, right, out=out)
        return 10

    return 2 * size**3 / float(medians(interleave({"product": products}, 5))[0]["clock s"])
