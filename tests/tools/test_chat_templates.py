"""Chat templates at preparation: the ids that training sees are those of transformers' own chat encoding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_data import read_rows
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from nemo_eppo.config import ConfigError
from nemo_eppo.data.datasets import PreferenceDataset, SFTDataset
from nemo_eppo.data.tokenizer import Tokenizer, train_bpe
from nemo_eppo.settings.preparation import PreparationConfig
from nemo_eppo.tools.corpora import CORPORA
from nemo_eppo.tools.preparation import prepare

WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_BOS = WITH_BOS.removeprefix("{{ bos_token }}")


@pytest.fixture(scope="module")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tokenizer directory with BOS <s>; whether it adds BOS itself, its template and its EOS are given."""
    bpe = tmp_path_factory.mktemp("bpe")
    train_bpe(["the cat sat"], 270, bpe)

    def make(template: str | None, adds_bos: bool = True, eos: str = "<|im_end|>") -> Path:
        tokenizer = AutoTokenizer.from_pretrained(bpe)
        tokenizer.add_special_tokens(
            {"bos_token": "<s>", "eos_token": eos, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
        )
        if adds_bos:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
            )
        tokenizer.chat_template = template
        directory = tmp_path_factory.mktemp("chat")
        tokenizer.save_pretrained(directory)
        return directory

    return make


def dialogues(count: int = 20) -> list[dict[str, str]]:
    start = "\n\nHuman: Hi {n}\n\nAssistant: Yes?\n\nHuman: Why {n}?\n\nAssistant:"
    return [{"chosen": start.format(n=n) + " So.", "rejected": start.format(n=n) + " No <b>."} for n in range(count)]


def messages(n: int, *answers: str) -> list[dict[str, str]]:
    said = [("user", f"Hi {n}"), ("assistant", "Yes?"), ("user", f"Why {n}?"), *(("assistant", a) for a in answers)]
    return [{"role": role, "content": content} for role, content in said]


def run(rows: Path, tokenizer: Path, out: Path, **settings: Any) -> Any:
    chosen = PreparationConfig(validation_fraction=0.3, tokenizer=tokenizer, **settings)
    return prepare(CORPORA["hh"], [rows], out, chosen)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_templated_rows_have_the_ids_of_transformers_with_one_bos_and_one_eos(
    make_tokenizer: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path, adds_bos: bool
) -> None:
    directory = make_tokenizer(WITH_BOS, adds_bos)
    run(write_rows(*dialogues()), directory, tmp_path / "out", chat_template="tokenizer")
    tokenizer, reference = (
        Tokenizer.from_directory(tmp_path / "out/tokenizer"),
        AutoTokenizer.from_pretrained(directory),
    )
    bos, eos = reference.bos_token_id, reference.eos_token_id
    prompts = {tuple(reference.apply_chat_template(messages(n), add_generation_prompt=True)): n for n in range(20)}
    pairs = PreferenceDataset(tmp_path / "out/preferences.train.jsonl", tokenizer, max_sequence_length=999)
    for pair in pairs.items:
        prompt = pair.prompt_ids.tolist()
        assert prompt.count(bos) == 1
        n = prompts[tuple(prompt)]
        for answer, ids in (("So.", pair.chosen_ids.tolist()), ("No <b>.", pair.rejected_ids.tolist())):
            *whole, newline = reference.apply_chat_template(messages(n, answer))  # a line break follows the last EOS
            assert reference.decode(newline) == "\n"
            assert prompt + ids == whole
            assert ids.count(eos) == 1
            assert bos not in ids


def test_a_tokenizer_that_adds_bos_adds_it_to_a_template_that_does_not(
    make_tokenizer: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    directory = make_tokenizer(WITHOUT_BOS)
    run(write_rows(*dialogues()), directory, tmp_path / "out", chat_template="tokenizer")
    tokenizer, reference = Tokenizer.from_directory(directory), AutoTokenizer.from_pretrained(directory)
    text = read_rows(tmp_path / "out/prompts.train.jsonl")[0]["prompt"]
    assert tokenizer.encode_prompt(text) == reference(text)["input_ids"]
    assert tokenizer.encode_prompt(text)[0] == reference.bos_token_id


def test_what_closes_a_turn_is_trained_on_where_it_is_not_eos(
    make_tokenizer: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    directory = make_tokenizer(WITH_BOS, eos="<eos>")
    run(write_rows(*dialogues()), directory, tmp_path / "out", chat_template="tokenizer")
    assert {row["response"] for row in read_rows(tmp_path / "out/sft.train.jsonl")} == {"So.<|im_end|>\n"}
    tokenizer = Tokenizer.from_directory(directory)
    item = SFTDataset(tmp_path / "out/sft.train.jsonl", tokenizer, max_sequence_length=999)[0]
    assert item.response_ids[-1] == tokenizer.eos_id
    assert (item.response_ids == tokenizer.eos_id).sum() == 1


def test_a_jinja_file_is_applied_and_becomes_the_tokenizers_own(
    make_tokenizer: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    settings = {"chat_template": tmp_path / "chat.jinja", "system_prompt": "Be brief."}
    run(write_rows(*dialogues()), make_tokenizer(None), tmp_path / "out", **settings)
    expected = "[system] Be brief.\n[user] Hi 3\n[assistant] Yes?\n[user] Why 3?\n[assistant] "
    rows = read_rows(tmp_path / "out/sft.train.jsonl") + read_rows(tmp_path / "out/sft.validation.jsonl")
    assert {"prompt": expected, "response": "So.\n"} in rows
    copy = Tokenizer.from_directory(tmp_path / "out/tokenizer")
    assert copy.render_chat(messages(3), add_generation_prompt=False).startswith("[user] Hi 3\n")


def test_the_split_does_not_depend_on_the_template(
    make_tokenizer: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    path, directory = write_rows(*dialogues()), make_tokenizer(WITH_BOS)
    run(path, directory, tmp_path / "plain")
    run(path, directory, tmp_path / "chat", chat_template="tokenizer", system_prompt="Be brief.")
    plain, chat = (read_rows(tmp_path / name / "prompts.validation.jsonl") for name in ("plain", "chat"))
    assert len(plain) == len(chat) > 0
    for one, other in zip(plain, chat, strict=True):
        assert one["prompt"].split("\n\nHuman: ")[1].split("\n")[0] in other["prompt"]


def test_conversations_that_a_template_refuses_are_counted(
    make_tokenizer: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    strict = "{% if messages[0].content == 'Hi 1' %}{{ raise_exception('not this one') }}{% endif %}"
    counts = run(
        write_rows(*dialogues()), make_tokenizer(strict + WITH_BOS), tmp_path / "out", chat_template="tokenizer"
    )
    assert counts.dropped == {"the chat template refuses it: not this one": 1}
    changing = "{{ messages | length }}" + WITH_BOS
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: the chat template writes another prompt"):
        run(
            write_rows(*dialogues()),
            make_tokenizer(changing),
            tmp_path / "changing",
            chat_template="tokenizer",
            strict=True,
        )


def test_formatted_text_takes_no_template(
    make_tokenizer: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    start = "<extra_id_1>User\nHi\n<extra_id_1>Assistant\n"
    path = write_rows({"text": start + "yes"}, {"text": start + "no"})
    settings = PreparationConfig(tokenizer=make_tokenizer(WITH_BOS), chat_template="tokenizer")
    with pytest.raises(ConfigError, match=r"1 text that is already formatted takes no chat template"):
        prepare(CORPORA["nemo_aligner"], [path], tmp_path / "out", settings)


def test_templates_that_cannot_work_are_named_at_once(
    make_tokenizer: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    path, directory = write_rows(*dialogues()), make_tokenizer(None)
    with pytest.raises(ConfigError, match="no chat template of its own"):
        run(path, directory, tmp_path / "out", chat_template="tokenizer")
    with pytest.raises(ConfigError, match=r"absent\.jinja: no such file"):
        run(path, directory, tmp_path / "out", chat_template=tmp_path / "absent.jinja")
    (tmp_path / "bad.jinja").write_text("\n{% for m in %}")
    with pytest.raises(ConfigError, match=r"bad\.jinja', line 2"):
        run(path, directory, tmp_path / "out", chat_template=tmp_path / "bad.jinja")
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        prepare(CORPORA["hh"], [path], tmp_path / "out", PreparationConfig(chat_template="tokenizer"))
    assert not (tmp_path / "out").exists()
