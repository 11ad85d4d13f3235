"""Seconds per generated token of our engine and of transformers' generate, on models of the same shape.

`even`: one batch, every response as long as it may be. `mixed`: several batches, prompts and responses of all lengths.
"""

import torch
from networks import shape, their_model
from pairs import Contestant, Options, Row, compare, interleave

from nemo_eppo.generation.engine import EngineLimits
from nemo_eppo.generation.megatron_engine import MegatronEngine
from nemo_eppo.megatron import device
from nemo_eppo.megatron.model import build_model
from nemo_eppo.megatron.runtime import initialize
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.model import ParallelConfig

VOCABULARY = {"even": 1024, "mixed": 128}  # a fresh model ends a response with probability 1 / vocabulary


def measure(options: Options) -> list[Row]:
    initialize(ParallelConfig(), seed=1)
    rows: list[Row] = []
    for case in VOCABULARY:
        for batch in (4,) if options.smallest else (16, 64):
            seconds = interleave(engines(case, batch, new=8 if options.smallest else 128), options.rounds)
            rows += compare(seconds, "transformers", case=case, batch=batch)
    return rows


def engines(case: str, batch: int, new: int) -> dict[str, Contestant]:
    """Both at the same work; each returns how many tokens it generated."""
    model = shape(vocabulary=VOCABULARY[case])
    eos = model.vocab_size - 1
    ours = MegatronEngine(
        build_model(model, ParallelConfig(), head="lm"),
        EngineLimits(eos_id=eos, pad_id=0, max_batch_size=batch, max_sequence_length=model.max_sequence_length),
    )
    theirs = their_model(model).eval()
    lengths = [32] * batch if case == "even" else torch.randint(8, 64, (3 * batch,)).tolist()
    prompts = [torch.randint(1, eos, (length,)).tolist() for length in lengths]
    fewest = new if case == "even" else 1

    def run_ours() -> int:
        sampling = SamplingParams(max_new_tokens=new, min_new_tokens=fewest)
        completions = ours.generate(prompts, sampling, list(range(len(prompts))))
        return sum(len(completion.token_ids) for completion in completions)

    def run_theirs() -> int:
        settings = {"max_new_tokens": new, "min_new_tokens": fewest, "do_sample": True, "top_k": 0, "pad_token_id": 0}
        count = 0
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            longest = max(map(len, part))
            tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in part])
            tokens = tokens.to(device.device())
            out = theirs.generate(tokens, attention_mask=(tokens != 0).long(), **settings)[:, longest:]
            ended = (out == eos).cumsum(1)
            count += int((ended - (out == eos).long() == 0).sum())
        return count

    return {"transformers": run_theirs, "ours": run_ours}
