"""Scores of given responses by a running reward server or a reward function, requested as by an actor."""

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

_WINDOW = 256  # responses of one request
_CONNECT_S = 60.0  # a server that has just been started may still load its model


class SourceScoring:
    """Scores responses by a reward server or function, named grpc://HOST:PORT or module:function.

    Creating it imports the function, or reads the certificates.

    Args:
        where: the option that `name` is from, for messages.
        certificates: folder of the server's certificates; None if it has none.
        tokenizer: the tokenizer of the responses' token ids.

    Raises:
        ConfigError: `name` is neither, or there is no such function or no certificates.
    """

    def __init__(self, name: str, where: str, certificates: Path | None, tokenizer: Tokenizer) -> None:
        self._where, self._tokenizer = where, tokenizer
        if name.startswith("grpc://"):
            server = {"url": name, "certificates": certificates, "connect_timeout": _CONNECT_S}
            self._source = load_config(RewardSourceConfig, {"server": server})
            self.identity: dict[str, Any] = {"server": name}  # `connect` adds its model
            if certificates is not None:
                Certificates.of(certificates)
        else:
            check_function(where, name)
            self._source = RewardSourceConfig(function=name)
            self.identity = {"function": name, "source_sha256": source_sha256(name)}

    def connect(self, longest: int, stack: ExitStack) -> None:
        """Connect to the server, check it and add its model to `identity`, or prepare the function's process;
        collective. `stack` closes the connection or the process.

        Args:
            longest: tokens of the longest prompt and response together.
        """
        pool = FunctionPool(FunctionsConfig())
        stack.callback(pool.close)
        expect = {"tokenizer": self._tokenizer.digest, "max_sequence_length": longest}
        self._connected = build_source(self._source, expect, "any", pool)
        stack.callback(self._connected.close)
        if len(self._connected.columns) > 1:
            raise ConfigError(
                f"{self._where}: the server has {len(self._connected.columns)} reward models; expected one"
            )
        if isinstance(self._connected, ServerSource):
            self.identity["reward model"] = self._connected.statistics

    def append(self, rows: Sequence[Response], output: RowsFile, what: str = "") -> None:
        """Append the missing rows, as `RewardScoring.append` does; collective; call `connect` before.

        Raises:
            ServerError: the server failed.
            RewardFunctionError: the function failed.
        """
        if output.done == len(rows):
            return
        (column,) = self._connected.columns

        def lines(window: slice) -> list[str]:
            tokens, prompt_lengths, lengths = collate([row[:2] for row in rows[window]], self._tokenizer.pad_id)
            samples = [sample_of(row, self._tokenizer) for row in rows[window]]
            truncated = torch.tensor([not sample.finished for sample in samples])
            unused_logprobs = torch.zeros(len(samples), tokens.size(1) - 1)
            batch = RolloutBatch(tokens, prompt_lengths, lengths, truncated, unused_logprobs, self._tokenizer.pad_id)
            return reward_lines(self._connected.ask(batch, samples)(), column.mean, column.std)

        append_rows(output, len(rows), _WINDOW, lines, what)


def sample_of(row: Response, tokenizer: Tokenizer) -> Sample:
    """Return a response as the sample that reward functions get, with missing texts decoded from the token ids.

    A response whose row does not say how it ended counts as finished.
    """
    fields, ids = row.row, row.response.tolist()
    ended = ids[-1] == tokenizer.eos_id or fields.get("finish_reason") == "stop" or not says_how_it_ended(fields)
    return Sample(
        prompt=fields["prompt"] if isinstance(fields.get("prompt"), str) else tokenizer.decode(row.prompt.tolist()),
        response=fields["response"] if "response" in fields else tokenizer.decode(ids),
        token_ids=tuple(ids),
        finished=fields.get("finished", ended),
        fields=row_fields(fields),
    )
