"""The text of one response and its prompt, as reward functions and terms see it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt and the response that was sampled for it."""

    prompt: str
    """Text of the prompt, as it is in the data file."""
    response: str
    """Text of the response, without special tokens."""
    token_ids: tuple[int, ...]
    """Token ids of the response, with EOS or the stop string that ended it; no EOS follows a stop string."""
    finished: bool
    """Whether the response ended with EOS or a stop string; a truncated one did not."""
    fields: dict[str, Any] = field(default_factory=dict)
    """The other fields of the prompt's row in the data file, such as a reference answer."""
