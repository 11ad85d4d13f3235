"""What a reward sees of one response."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt and the response that was sampled for it."""

    prompt: str
    """Text of the prompt, as the data file has it."""
    response: str
    """Text of the response, without special tokens."""
    token_ids: tuple[int, ...]
    """Token ids of the response, EOS included if the policy produced it."""
    finished: bool
    """Whether the response ended with EOS; a truncated one did not."""
    fields: dict[str, Any] = field(default_factory=dict)
    """The other fields of the prompt's row in the data file, such as a reference answer."""
