"""One reader per public layout: which fields make prompt and responses, and what makes a row unusable."""

from collections.abc import Iterator
from typing import Any

import pytest
from small_data import dialogue

from nemo_eppo.tools.corpora import CORPORA, Corpus, Example, Malformed, nemo_aligner
from nemo_eppo.tools.sources import Row

POST = {"subreddit": "tifu", "title": "A title", "post": "What happened.\n"}
POST_PROMPT = "SUBREDDIT: r/tifu\n\nTITLE: A title\n\nPOST: What happened.\n\nTL;DR:"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def one(corpus: str, fields: dict[str, Any]) -> Example:
    [example] = CORPORA[corpus].read(fields)
    return example


def joined(corpus: Corpus, *fields: dict[str, Any] | str) -> Iterator[Row]:
    """What a corpus makes of rows; text stands for a row with that defect."""
    rows = [Row("f", n, {}, r) if isinstance(r, str) else Row("f", n, r) for n, r in enumerate(fields, start=1)]
    return corpus.join(iter(rows))


def test_hh_prompt_ends_with_the_last_assistant_marker_and_opens_with_the_first_human_turn() -> None:
    start = dialogue("Hi", "Hello.")
    example = one("hh", {"chosen": start + dialogue("Why?", "So."), "rejected": start + dialogue("Why?", "No\nidea.")})
    assert example.prompt == start + "\n\nHuman: Why?\n\nAssistant:"
    assert example.responses == (" So.", " No\nidea.")
    assert example.turns == (user("Hi"), assistant("Hello."), user("Why?"))
    assert example.opening == "Hi"


@pytest.mark.parametrize("choice", [0, 1])
def test_tldr_comparisons(choice: int) -> None:
    summaries = [{"text": " first", "policy": "x"}, {"text": "second "}]
    example = one("tldr", {"info": {"id": "t3", **POST}, "summaries": summaries, "choice": choice, "worker": "w"})
    assert example.prompt == POST_PROMPT
    assert example.responses == ((" first", " second"), (" second", " first"))[choice]
    assert example.turns == (user(POST_PROMPT),)


@pytest.mark.parametrize(
    ("fields", "responses"),
    [
        ({**POST, "summary": "short"}, (" short",)),
        ({**POST, "subreddit": "r/tifu", "summary": "short"}, (" short",)),
        ({"prompt": POST_PROMPT, "label": " short"}, (" short",)),
        ({"prompt": POST_PROMPT + " ", "completion": "short"}, (" short",)),
        ({"prompt": POST_PROMPT, "chosen": "a", "rejected": " b"}, (" a", " b")),
    ],
)
def test_tldr_layouts_give_the_same_prompt(fields: dict[str, Any], responses: tuple[str, ...]) -> None:
    example = one("tldr", fields)
    assert (example.prompt, example.responses) == (POST_PROMPT, responses)


def test_alpaca_farm_pairs_demonstrations_and_prompts() -> None:
    task = {"instruction": "Add.", "input": "1, 2"}
    prompt = "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
    pair = {**task, "output_1": "3", "output_2": "4"}
    assert one("alpaca_farm", {**pair, "preference": 1}).responses == ("3", "4")
    assert one("alpaca_farm", {**pair, "preference": 2}).responses == ("4", "3")
    demonstration = one("alpaca_farm", {**task, "output": "3 "})
    assert (demonstration.prompt, demonstration.responses) == (prompt, ("3",))
    assert demonstration.turns == (user("Add.\n\n1, 2"),)
    assert one("alpaca_farm", task).responses == ()
    for absent in ({}, {"input": ""}, {"input": None}):
        example = one("alpaca_farm", {"instruction": "Sing.", **absent})
        assert example.prompt == "### Instruction:\nSing.\n\n### Response:\n"
        assert example.turns == (user("Sing."),)


def test_prompts_are_kept_as_they_are() -> None:
    assert one("prompts", {"prompt": " a\n", "text": "ignored"}) == Example(" a\n", (), (user("a"),), "a")
    assert one("prompts", {"text": "b"}).prompt == "b"


def test_rows_of_the_trainers_keep_their_texts() -> None:
    assert one("rows", {"prompt": " a\n", "answer": 3}) == Example(" a\n", (), (user("a"),), "a")
    assert one("rows", {"prompt": "a", "response": " b "}).responses == (" b ",)
    assert one("rows", {"prompt": "a", "chosen": "b ", "rejected": "\n"}).responses == ("b ", "\n")


def test_nemo_aligner_demonstrations_and_dpo_pairs() -> None:
    assert one("nemo_aligner", {"input": "in\n", "output": " out"}) == Example("in\n", (" out",), (user("in"),), "in")
    fields = {"prompt": "p", "chosen_response": "c", "rejected_response": "r", "chosen_reward": 1.0}
    assert one("nemo_aligner", fields).responses == ("c", "r")


def test_nemo_aligner_text_rows_alternate_between_better_and_worse() -> None:
    start = "<extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n"
    corpus = CORPORA["nemo_aligner"]
    rows = list(joined(corpus, {"text": start + "yes"}, {"text": start + "no"}, {"text": start + "1"}, {"text": "2"}))
    assert [row.line for row in rows] == [1, 3]
    [example] = corpus.read(rows[0].fields)
    assert example == Example(start, ("yes", "no"), (), start)
    with pytest.raises(Malformed, match="no assistant turn"):
        list(corpus.read(rows[1].fields))
    hh = nemo_aligner("\n\nAssistant:")
    [row] = joined(hh, {"text": dialogue("Hi", "yes")}, {"text": dialogue("Hi", "no")})
    [example] = hh.read(row.fields)
    assert example.responses == (" yes", " no")


def test_a_malformed_text_row_costs_its_partner_and_shifts_nothing() -> None:
    good = [{"text": "a"}, {"text": "b"}]
    rows = joined(CORPORA["nemo_aligner"], "not JSON", good[1], *good, good[0], "not JSON", *good, good[0])
    assert [(row.line, row.defect) for row in rows] == [
        (1, "not JSON"),
        (3, ""),
        (5, "not JSON"),
        (7, ""),
        (9, "no second row of the pair"),
    ]


def test_rows_that_are_no_text_rows_are_not_joined() -> None:
    other = {"input": "a", "output": "b"}
    assert [row.line for row in joined(CORPORA["nemo_aligner"], other, "not JSON", other)] == [1, 2, 3]


def test_a_conversation_trains_on_each_turn_that_its_mask_leaves() -> None:
    said = [("User", "Hi"), ("Bot", "Hello."), ("User", "Why? "), ("Bot", "So.")]
    turns = [{"from": speaker, "value": value, "label": None} for speaker, value in said]
    fields = {"system": "Be brief.", "mask": "User", "conversations": turns, "type": "VALUE_TO_TEXT"}
    first, second = CORPORA["nemo_aligner"].read(fields)
    system = {"role": "system", "content": "Be brief."}
    assert (first.prompt, first.responses) == ("Be brief.\n\nHuman: Hi\n\nAssistant:", (" Hello.",))
    assert first.turns == (system, user("Hi"))
    assert second.prompt == first.prompt + " Hello.\n\nHuman: Why?\n\nAssistant:"
    assert second.turns == (system, user("Hi"), assistant("Hello."), user("Why?"))
    assert first.opening == second.opening == "Hi"
    [swapped] = CORPORA["nemo_aligner"].read({**fields, "system": "", "mask": "Bot"})
    assert (swapped.turns, swapped.responses) == ((assistant("Hi"), user("Hello.")), (" Why?",))


def test_conversations_give_pairs_demonstrations_and_prompts() -> None:
    read, system = CORPORA["chat"].read, {"role": "system", "content": "Be brief."}
    said = [system, user("Hi"), assistant("Hello."), user(" Why? ")]
    for fields in (
        {"chosen": [*said, assistant("So.")], "rejected": [*said, assistant("No.")], "prompt": "Why?"},
        {"prompt": said, "chosen": [assistant("So.")], "rejected": [assistant("No.")]},
    ):
        [pair] = read(fields)
        assert (pair.responses, pair.opening) == ((" So.", " No."), "Hi")
        assert pair.prompt == "Be brief.\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
        assert pair.turns == (system, user("Hi"), assistant("Hello."), user("Why?"))
    first, second = read({"messages": said})
    assert (first.turns, first.responses) == ((system, user("Hi")), (" Hello.",))
    assert (second.prompt, second.responses) == (pair.prompt, ())
    [alone], [answered] = read({"prompt": said}), read({"prompt": said, "completion": [assistant("So.")]})
    assert (alone.responses, answered.responses) == ((), (" So.",))
    assert alone.turns == answered.turns == pair.turns


PAIR = {"chosen": dialogue("a", "x"), "rejected": dialogue("a", "y")}
COMPARISON = {"info": POST, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}
TURNS = [{"from": "User", "value": "a"}, {"from": "Bot", "value": "b"}]


@pytest.mark.parametrize(
    ("corpus", "fields", "complaint"),
    [
        ("hh", {"chosen": "x"}, "field 'rejected' is missing"),
        ("chat", {"prompt": "a"}, "the fields fit no layout that is read"),
        ("chat", {"messages": []}, "field 'messages' is not a list of objects"),
        ("chat", {"messages": [{"role": "tool", "content": "a"}]}, "field 'messages' has a role that is none of"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "field 'content' is not text"),
        ("chat", {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]}, "prompts differ"),
        ("chat", {"chosen": [user("a")], "rejected": [user("b")]}, "no assistant turn at the end"),
        ("prompts", {"prompt": [user("a")]}, "field 'prompt' is a conversation, which `nemo-eppo prepare chat` reads"),
        ("hh", {**PAIR, "chosen": None}, "field 'chosen' is missing"),
        ("hh", {**PAIR, "chosen": 3}, "field 'chosen' is not text"),
        ("hh", {**PAIR, "chosen": "\ud800"}, "field 'chosen' is not valid Unicode"),
        ("hh", {**PAIR, "chosen": dialogue("b", "x")}, "prompts differ"),
        ("hh", {**PAIR, "rejected": dialogue("a", "x") + dialogue("b", "y")}, "prompts differ"),
        ("hh", {"chosen": "no turns", "rejected": "no turns"}, "no assistant turn"),
        ("hh", {"chosen": "\n\nAssistant: x", "rejected": "\n\nAssistant: y"}, "no human turn"),
        ("hh", {name: "Note." + text for name, text in PAIR.items()}, "text before the first turn"),
        ("tldr", {**COMPARISON, "choice": 2}, "field 'choice' is not 0 or 1"),
        ("tldr", {**COMPARISON, "choice": True}, "field 'choice' is not 0 or 1"),
        ("tldr", {**COMPARISON, "summaries": [{"text": "a"}]}, "field 'summaries' is not two objects"),
        ("tldr", {**COMPARISON, "info": "post"}, "field 'info' is not an object"),
        ("tldr", {**COMPARISON, "info": {**POST, "post": None, "article": "x"}}, "field 'post' is missing"),
        ("tldr", {"prompt": "a", "answer": "b"}, "the fields fit no layout"),
        ("tldr", {}, "the fields fit no layout"),
        ("alpaca_farm", {"instruction": " ", "output": "b"}, "field 'instruction' is empty"),
        (
            "alpaca_farm",
            {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 0},
            "field 'preference' is not 1 or 2",
        ),
        ("prompts", {"instruction": "a"}, "field 'text' is missing"),
        ("rows", {"response": "a"}, "field 'prompt' is missing"),
        ("rows", {"prompt": "a", "chosen": "b"}, "field 'rejected' is missing"),
        ("rows", {"prompt": "a", "response": ["b"]}, "field 'response' is not text"),
        ("rows", {"prompt": [user("a")], "response": "b"}, "field 'prompt' is a conversation, which"),
        ("rows", {"prompt": "a", "response": "b", "chosen": "c", "rejected": "d"}, "are of different kinds of rows"),
        ("nemo_aligner", {"input": "a"}, "the fields fit no layout"),
        ("nemo_aligner", {"conversations": TURNS}, "field 'mask' is missing"),
        ("nemo_aligner", {"conversations": "a", "mask": "User"}, "field 'conversations' is not a list"),
        ("nemo_aligner", {"conversations": ["a"], "mask": "User"}, "not a list of objects"),
        ("nemo_aligner", {"conversations": TURNS, "mask": "Nobody"}, "not between the speaker in 'mask' and one"),
        ("nemo_aligner", {"conversations": TURNS[::-1], "mask": "User"}, "no turn to train on"),
    ],
)
def test_an_unusable_row_says_why(corpus: str, fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(Malformed, match=complaint):
        list(CORPORA[corpus].read(fields))
