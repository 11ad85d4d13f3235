"""What the engine reads while it decodes, against the trainer's pass over the same tokens; and how fast it decodes.
On a GPU both with kernels that are launched one by one, and with CUDA graphs.

`of the floor` is the time in which the device could read what a step needs, the weights and the keys and values so far,
at the rate of a measured copy, over the time that a step took. Prompts, which are short, count as steps.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from checks import LLAMA_1B, LLAMA_8B, PRECISIONS, TINY, agreement, passed
from networks import their_model
from pairs import Options, Row, compare, interleave, medians
from torch import Tensor

from nemo_eppo.generation.decoder import attention_of_device
from nemo_eppo.generation.engine import EngineLimits
from nemo_eppo.generation.megatron_engine import MegatronEngine
from nemo_eppo.generation.replay import GraphRecorder
from nemo_eppo.megatron import device
from nemo_eppo.megatron.attention import attend
from nemo_eppo.megatron.energy import EnergyProbe
from nemo_eppo.megatron.model import build_model
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.megatron.runtime import initialize
from nemo_eppo.megatron.weights import export_tensors, load_tensors
from nemo_eppo.rollout.batch import RolloutBatch
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.model import ModelConfig, ParallelConfig, Precision
from nemo_eppo.training.policy import next_token_targets

PROBE = EnergyProbeConfig()
RECORDERS = {"": None, **({", CUDA graphs": GraphRecorder} if device.on_gpu() else {})}


def measure(options: Options) -> Iterator[Row]:
    initialize(ParallelConfig(), seed=1)
    yield from agreements(TINY if options.smallest else LLAMA_1B, new=8 if options.smallest else 96)
    rate = copy_rate(2**20 if options.smallest else 2**32)
    yield {"what": "device copy", "TB/s, read and written": rate / 1e12}
    yield from decoding_kernel(options, rate)
    shapes = {"tiny": TINY} if options.smallest else {"1B": LLAMA_1B, "8B": LLAMA_8B}
    for name, model in shapes.items():
        yield from speeds(name, model, options, rate)


def agreements(model: ModelConfig, new: int) -> Iterator[Row]:
    prompts = [torch.randint(2, model.vocab_size, (length,)).tolist() for length in (3, 40, 17, 1, 129, 64, 5, 90)]
    weights: dict[str, Tensor] = {}
    for precision in reversed(PRECISIONS):  # fp32 with the weights of bf16
        runner = scorer(model, precision, weights)
        weights = {name: tensor.cpu() for name, tensor in export_tensors(runner.chunks, model)}
        limits = EngineLimits(eos_id=1, pad_id=0, max_batch_size=4, max_sequence_length=model.max_sequence_length)
        judging = runner if precision == "fp32" else scorer(model, "fp32", weights)
        for how, record in RECORDERS.items():
            engine = MegatronEngine(runner.chunks, limits, PROBE, record and record())
            completions = engine.generate(prompts, SamplingParams(max_new_tokens=new), list(range(len(prompts))))
            engine.close()
            batch = RolloutBatch.from_completions(prompts, completions, pad_id=0)
            assert batch.engine_entropies is not None
            assert batch.engine_energies is not None
            read = (batch.engine_logprobs, batch.engine_entropies, batch.engine_energies[:, 1:])
            trainer, judge = scored(runner, batch), scored(judging, batch)
            for name, *numbers in zip(("logprobs", "entropies", "energies"), read, trainer, judge, strict=True):
                ours, peer, expected = (x[batch.mask] for x in numbers)
                row: Row = {"what": f"engine's {name}{how}", "tokens": len(ours)}
                yield agreement(row, precision, ours, peer, expected)


def decoding_kernel(options: Options, rate: float) -> Iterator[Row]:
    """The Triton kernel of decoding steps against torch's attention, over rows of many lengths."""
    if device.on_gpu():
        made = all(attention_of_device(dtype, 128) for dtype in (torch.float32, torch.bfloat16))
        found = "Triton's kernel" if made else "torch's attention"
        yield passed({"what": "attention of decoding steps", "found": found}, "Triton's kernel", made)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        sys.modules.pop("triton", None)  # which `device.install()` hides on a CPU
    from nemo_eppo.generation.flash_decoding import flash_decode

    rows, groups, heads, width, columns = (2, 2, 2, 16, 256) if options.smallest else (64, 8, 4, 128, 4096)
    positions = torch.randint(columns // 8, columns, (rows,), device=device.device())
    hidden = torch.arange(columns, device=device.device()) > positions[:, None]
    query = torch.randn(rows, groups, heads, width, device=device.device())
    cache = torch.randn(rows, groups, 2, columns, width, device=device.device())
    for precision in PRECISIONS if device.on_gpu() else ("fp32",):  # Triton's interpreter does not multiply in bf16
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        mask = torch.zeros(rows, 1, 1, columns, dtype=dtype, device=device.device())
        mask.masked_fill_(hidden[:, None, None], -torch.inf)
        q, kv = query.to(dtype), cache.to(dtype)
        ours = partial(flash_decode, q, kv, positions, columns, blocks=None if device.on_gpu() else 4)
        theirs = partial(attend, q, kv[:, :, 0], kv[:, :, 1], mask)  # by the kernels that the decoder would use
        judge = attend(q.double(), kv[:, :, 0].double(), kv[:, :, 1].double(), mask.double())
        yield agreement({"what": "attention of decoding steps"}, precision, ours(), theirs(), judge)
        times = interleave({"Triton's kernel": ours, "torch's attention": theirs}, options.rounds)
        seen = 2 * groups * width * kv.element_size() * int((positions + 1).sum())  # bytes
        for row in compare(times, "torch's attention", precision=precision):
            yield row | {"of the floor": seen / rate / float(row["clock s"])}


def scorer(model: ModelConfig, precision: Precision, weights: Mapping[str, Tensor]) -> ModelRunner:
    chunks = build_model(model, ParallelConfig(), head="lm", precision=precision)
    if weights:
        load_tensors(chunks, model, weights.__getitem__)
    return ModelRunner(chunks, 4, probe=EnergyProbe(PROBE, chunks, model.num_layers))


def scored(runner: ModelRunner, batch: RolloutBatch) -> tuple[Tensor, Tensor, Tensor]:
    """What the trainer gives, in the places in which a RolloutBatch has it."""
    targets = next_token_targets(batch.tokens, batch.mask)
    out, energies = runner.infer(batch.tokens, batch.lengths, targets, outputs=2, energies=True)
    assert energies is not None
    return out[:, :-1, 0], out[:, :-1, 1], energies[:, 1:]


def speeds(name: str, model: ModelConfig, options: Options, rate: float) -> Iterator[Row]:
    prompt, new = (4, 4) if options.smallest else (64, 96)
    chunks = build_model(model, ParallelConfig(), head="lm", precision="bf16")
    network = their_model(model, "bf16").eval()
    each = {parameter for chunk in chunks for parameter in chunk.parameters()}
    read = sum(parameter.nbytes for parameter in each)
    if not model.tie_embeddings:  # of the input embedding only the rows of the tokens are read
        read -= model.vocab_size * model.hidden_size * 2
    for batch in (1, 2) if options.smallest else (1, 16, 64, 256):
        tokens = torch.randint(1, model.vocab_size - 1, (batch, prompt))
        limits = EngineLimits(
            model.vocab_size - 1, 0, max_batch_size=batch, max_sequence_length=model.max_sequence_length
        )
        work: dict[str, Callable[[], int]] = {
            "transformers": partial(their_tokens, network, tokens, new),
        }
        for how, record in RECORDERS.items():
            for reading, probe in {"": None, ", reading energies": PROBE}.items():
                engine = MegatronEngine(chunks, limits, probe, record and record())
                work[f"ours{reading}{how}"] = partial(our_tokens, engine, tokens, new)
        of_cache = batch * (prompt + new / 2) * 2 * model.kv_heads * model.head_width * model.num_layers * 2
        for what, one in work.items():  # one at a time: each may take all memory that is left
            row: Row = {"what": what, "model": name, "batch": batch, "new tokens": new}
            try:
                [found] = medians(interleave({what: one}, options.rounds))
            except RuntimeError as error:  # while a graph is recorded, it is not the OutOfMemoryError that it was
                yield row | {"tokens/s": "out of memory", "why": str(error)[:200]}
            else:
                seconds = float(found["clock s"])
                floor = (read + of_cache) / rate
                yield (
                    row
                    | {"tokens/s": 1 / seconds, "ms a step": 1e3 * seconds * batch}
                    | {"of the floor": floor / (seconds * batch)}
                )
            device.empty_cache()


def our_tokens(engine: MegatronEngine, tokens: Tensor, new: int) -> int:
    sampling = SamplingParams(max_new_tokens=new, min_new_tokens=new)
    completions = engine.generate(tokens.tolist(), sampling, list(range(len(tokens))))
    engine.sleep()
    return sum(len(completion.token_ids) for completion in completions)


def their_tokens(network: "torch.nn.Module", tokens: Tensor, new: int) -> int:
    tokens = tokens.to(device.device())
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    out: Tensor = network.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)  # type: ignore[operator]
    return out[:, tokens.size(1) :].numel()


def copy_rate(size: int) -> float:
    """Bytes a second that the device reads and writes while it copies."""
    source = torch.zeros(size, dtype=torch.uint8, device=device.device())
    target = torch.empty_like(source)

    def copies() -> int:
        for _ in range(10):
            target.copy_(source)
        return 20 * size

    return 1 / float(medians(interleave({"copy": copies}, 3))[0]["clock s"])
