"""Finds where a response ends: at EOS, or with the token that completes a stop string."""

from bisect import bisect_left
from collections.abc import Sequence

from nemo_eppo.data.tokenizer import Tokenizer

_MARGIN = 4  # tokens: the stop string's first character or space may be part of a token before it


class Stops:
    """The tokens and texts that end a response.

    Args:
        strings: stop strings. A special token's own text stands for this token; others are looked for in the response's
            text, special tokens included, whatever tokens they are made of.
        eos_id: the token that always ends a response.
        tokenizer: turns tokens into text; None if there are no strings.
    """

    ids: tuple[int, ...]
    """Token ids that end a response, EOS first."""

    def __init__(self, strings: Sequence[str], eos_id: int, tokenizer: Tokenizer | None) -> None:
        self._tokenizer, special = tokenizer, {}
        if strings:
            assert tokenizer is not None, "stop strings need a tokenizer"
            special = tokenizer.special_ids
        self.ids = tuple(dict.fromkeys([eos_id, *(special[text] for text in strings if text in special)]))
        self._texts = [text for text in strings if text not in special]
        # each token of a stop string has at least one byte; tokens without text inside one are not expected
        self._reach = _MARGIN + max((len(text.encode()) for text in self._texts), default=0)

    def end(self, tokens: list[int], seen: int = 0) -> int | None:
        """Return how many of a response's tokens there are up to its end, end included; None if it has not ended.

        Args:
            tokens: the response so far.
            seen: number of first tokens that are known not to end it: only those after them are turned into text, with
                the few before them in which a stop string can begin.
        """
        places = range(seen, len(tokens))
        by_id = next((place + 1 for place in places if tokens[place] in self.ids), None)
        if not self._texts:
            return by_id
        start, last = max(0, seen - self._reach), by_id or len(tokens)
        if not self._contained(tokens[start:last]):
            return by_id
        sizes = range(seen + 1, last)
        return sizes.start + bisect_left(sizes, True, key=lambda size: self._contained(tokens[start:size]))

    def _contained(self, tokens: list[int]) -> bool:
        assert self._tokenizer is not None
        text = self._tokenizer.decode(tokens, special_tokens=True)
        return any(stop in text for stop in self._texts)
