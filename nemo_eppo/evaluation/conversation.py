"""`nemo-eppo generate --interactive`: a conversation with a model in a terminal."""

from collections.abc import Callable
from functools import partial

from nemo_eppo.config import ConfigError
from nemo_eppo.evaluation.generate import Generator
from nemo_eppo.evaluation.responses import render_chat
from nemo_eppo.megatron.collectives import on_rank0
from nemo_eppo.rollout.batch import FinishReason
from nemo_eppo.settings.evaluation import GeneratorConfig

HELP = "/reset starts a new conversation, /quit or Ctrl-D ends."


class Conversation:
    """A conversation of a user with a model.

    The model continues all turns so far, rendered by its chat template or, without one, joined by line breaks.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        self.generator = Generator(config)
        self._turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget all turns."""
        self._turns = []

    def reply(self, text: str) -> str:
        """Return the model's answer to the next turn of the user; collective.

        Raises:
            ConfigError: the conversation has become too long, or cannot be tokenised; the turn is not added.
        """
        tokenizer, longest = self.generator.tokenizer, self.generator.longest_prompt
        turns = [*self._turns, {"role": "user", "content": text}]
        chat = tokenizer.chat_template is not None
        rendered = render_chat(tokenizer, turns) if chat else "\n".join(turn["content"] for turn in turns)
        tokens = tokenizer.encode_prompt(rendered)
        if not 1 <= len(tokens) <= longest:
            raise ConfigError(
                f"the conversation has {len(tokens)} tokens; expected 1 to {longest}, which leaves "
                f"{self.generator.config.sampling.max_new_tokens} for the answer in the model's window: /reset"
            )
        (completion,) = self.generator.answer([tokens], [0])
        answer = tokenizer.decode(completion.token_ids)
        self._turns = [*turns, {"role": "assistant", "content": answer}]
        return answer if completion.finish_reason is FinishReason.STOP else f"{answer} [...]"


def talk(conversation: Conversation, read: Callable[[str], str] = input) -> None:
    """Load the model and converse until the user leaves; collective, and only rank 0 reads and prints.

    Args:
        read: shows its argument and returns the user's next line; EOFError ends the conversation.
    """
    conversation.generator.build()

    def next_line() -> str:
        try:
            return read("> ").strip()
        except EOFError:
            print()
            return "/quit"

    on_rank0(lambda: print(HELP))
    while (line := on_rank0(next_line)) != "/quit":
        if line == "/reset":
            conversation.reset()
        elif line:
            try:
                answer = conversation.reply(line)
            except ConfigError as error:
                answer = f"({error})"
            on_rank0(partial(print, answer, flush=True))
