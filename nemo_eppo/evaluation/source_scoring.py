"""Scores of given responses by a running reward server or a reward function, as an actor asks them."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.data.datasets import collate
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.evaluation.model_rows import append_rows
from nemo_eppo.evaluation.responses import Response, row_fields, says_how_it_ended
from nemo_eppo.evaluation.reward_scoring import reward_lines
from nemo_eppo.evaluation.rows_file import RowsFile
from nemo_eppo.rewards.functions import FunctionPool, check_function, source_sha256
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.rollout.batch import RolloutBatch
from nemo_eppo.servers.certificates import Certificates
from nemo_eppo.settings.rewards import FunctionsConfig, RewardSourceConfig
from nemo_eppo.training.reward_sources import ServerSource, build_source

_AT_ONCE = 256  # responses of one request
_CONNECT_S = 60.0  # a running server answers at once; one that has just been started may still load its model


class SourceScoring:
    """Scores responses by the reward server grpc://HOST:PORT or the function module:function that `name` says.

    Creating it imports the function, or reads the certificates.

    Args:
        where: the option that names it, for messages.
        certificates: folder of the server's certificates; None if it has none.
        tokenizer: what the responses' token ids belong to.

    Raises:
        ConfigError: `name` is neither, there is no such function, or no certificates.
    """

    def __init__(self, name: str, where: str, certificates: Path | None, tokenizer: Tokenizer) -> None:
        self._where, self._tokenizer = where, tokenizer
        if name.startswith("grpc://"):
            server = {"url": name, "certificates": certificates, "connect_timeout": _CONNECT_S}
            self._source = load_config(RewardSourceConfig, {"server": server})
            self.identity: dict[str, Any] = {"server": name}  # until it has said which model it serves
            if certificates is not None:
                Certificates.of(certificates)
        else:
            check_function(where, name)
            self._source = RewardSourceConfig(function=name)
            self.identity = {"function": name, "source_sha256": source_sha256(name)}

    def connect(self, longest: int, stack: ExitStack) -> None:
        """Connect to a server, check that it fits and add its model to the identity, or prepare the function's process;
        closed with `stack`; collective.

        Args:
            longest: tokens of the longest prompt and response together.
        """
        pool = FunctionPool(FunctionsConfig())
        stack.callback(pool.close)
        expect = {"tokenizer": self._tokenizer.digest, "max_sequence_length": longest}
        self._asked = build_source(self._source, expect, "any", pool)
        stack.callback(self._asked.close)
        if len(self._asked.columns) > 1:
            raise ConfigError(f"{self._where}: the server has {len(self._asked.columns)} reward models; expected one")
        if isinstance(self._asked, ServerSource):
            self.identity["reward model"] = self._asked.statistics

    def append(self, rows: Sequence[Response], output: RowsFile, what: str = "") -> None:
        """Append the missing rows, as `RewardScoring.append` does; collective; `connect` comes before.

        Raises:
            ServerError: the server failed.
            RewardFunctionError: the function failed.
        """
        if output.done == len(rows):
            return
        (column,) = self._asked.columns

        def lines(window: slice) -> list[str]:
            chosen = rows[window]
            tokens, prompt_lengths, lengths = collate([row[:2] for row in chosen], self._tokenizer.pad_id)
            samples = [sample_of(row, self._tokenizer) for row in chosen]
            truncated = torch.tensor([not sample.finished for sample in samples])
            unread = torch.zeros(len(chosen), tokens.size(1) - 1)
            batch = RolloutBatch(tokens, prompt_lengths, lengths, truncated, unread, self._tokenizer.pad_id)
            return reward_lines(self._asked.ask(batch, samples)(), column.mean, column.std)

        append_rows(output, len(rows), _AT_ONCE, lines, what)


def sample_of(row: Response, tokenizer: Tokenizer) -> Sample:
    """Return a row as reward functions see it: texts that it lacks are read from its token ids.

    A response whose row does not say how it ended is taken as finished.
    """
    given, ids = row.row, row.response.tolist()
    ended = ids[-1] == tokenizer.eos_id or given.get("finish_reason") == "stop" or not says_how_it_ended(given)
    return Sample(
        prompt=given["prompt"] if isinstance(given.get("prompt"), str) else tokenizer.decode(row.prompt.tolist()),
        response=given["response"] if "response" in given else tokenizer.decode(ids),
        token_ids=tuple(ids),
        finished=given.get("finished", ended),
        fields=row_fields(given),
    )
