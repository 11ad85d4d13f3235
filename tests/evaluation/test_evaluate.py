"""`nemo-eppo evaluate` against plain fp64 torch, the noun task's gold reward and numpy; resumed, and with servers."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import assert_fits, needs_chromium
from distributed import run_ranks
from hf_models import random_model, save
from jobs import Models, save_model
from reference_eppo import Weights, policy_pass, random_weights, scalars
from sklearn.metrics import roc_auc_score
from small_data import read_rows

from nemo_eppo.algorithms.latents import Gaussian, mahalanobis
from nemo_eppo.cli import main
from nemo_eppo.config import load_config
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.evaluation.evaluate import Evaluation
from nemo_eppo.evaluation.generate import Generating
from nemo_eppo.evaluation.reward_scoring import RewardScoring
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.settings.evaluation import EvaluateConfig
from nemo_eppo.tools.noun_task import quality

GOLD = "nemo_eppo.tools.noun_task:gold_reward"
PROMPTS, ANSWERS, NEW = 6, 4, 8


@pytest.fixture(scope="session")
def reference(models: Models, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    """A second policy, and its weights."""
    weights, directory = random_weights(models.reference, seed=3), tmp_path_factory.mktemp("reference") / "policy"
    run_ranks(save_model, 1, directory, "lm", models.config, weights, {}, models.data)
    return directory, weights


@pytest.fixture(scope="module")
def measures(
    models: Models, reference: tuple[Path, Weights], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """All settings but the output."""
    rows = read_rows(models.data / "prompts.train.jsonl")[:PROMPTS]
    lines = [json.dumps(row | {"answer": number}) for number, row in enumerate(rows)]
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    prompts.write_text("\n".join(lines) + "\n")
    return {
        "model": models.sft,
        "reference": reference[0],
        "prompts": prompts,
        "proxies": [str(models.rm)],
        "gold": GOLD,
        "samples_per_prompt": ANSWERS,
        "sampling": {"max_new_tokens": NEW},
    }


@pytest.fixture
def settings(measures: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return measures | {"output": tmp_path / "out"}


def run_job(settings: dict[str, Any]) -> None:
    Evaluation(load_config(EvaluateConfig, settings)).run()


@pytest.fixture(scope="module")
def whole(measures: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank writes that nothing interrupts."""
    output = tmp_path_factory.mktemp("evaluation") / "whole"
    run_ranks(run_job, 1, measures | {"output": output})
    return output


def by_reference(row: dict[str, Any], models: Models, other: Weights) -> dict[str, float]:
    """What the plain models say of a response."""
    tokens, start = torch.tensor([row["prompt_ids"] + row["response_ids"]]), len(row["prompt_ids"]) - 1
    passes = [policy_pass(weights, tokens, models.reference) for weights in (models.policy, other)]
    (logprob, energy), (ref_logprob, ref_energy) = ((p[0][0, start:].sum(), p[2][0, start:].mean()) for p in passes)
    score = (scalars(models.scorer, tokens, models.reference)[0, -1] - 0.3) / 0.7
    found: dict[str, Any] = {
        "proxy_reward": score,
        "logprob": logprob,
        "reference_logprob": ref_logprob,
        "kl": logprob - ref_logprob,
        "energy_loss": energy,
        "reference_energy_loss": ref_energy,
        "gold_reward": quality(row["prompt"], row["response"], row["finished"]),
    }
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize(
    "layout",
    [
        {},  # data parallelism; the others are shown by each part's own tests
        pytest.param({"tensor_model_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param({"pipeline_model_parallel_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_responses_are_measured_as_a_plain_reference_does(
    layout: dict[str, int],
    settings: dict[str, Any],
    models: Models,
    reference: tuple[Path, Weights],
) -> None:
    run_ranks(run_job, 2, settings | {"parallel": layout, "batch_size": 3})
    rows = read_rows(settings["output"] / "samples.jsonl")
    assert [(row["index"], row["sample"]) for row in rows] == [(i, k) for i in range(PROMPTS) for k in range(ANSWERS)]
    for row in rows:
        expected = by_reference(row, models, reference[1])
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-4)
        assert str(row["gold_reward"]) == str(np.float32(row["gold_reward"])), "no digits that a function did not give"
        assert row["finished"] == (row["response_ids"][-1] == 0)
        assert row["response_length"] == len(row["response_ids"])
        assert row["fields"] == {"answer": row["index"]}, "reward functions see the other fields of the prompt's row"


def best_of(rows: list[dict[str, Any]], n: int, measure: str) -> float:
    """Mean over prompts of the mean over all subsets of n answers."""
    means = []
    for index in range(PROMPTS):
        answers = [row for row in rows if row["index"] == index]
        chosen = [max(subset, key=lambda row: float(row["proxy_reward"])) for subset in combinations(answers, n)]
        means.append(np.mean([row[measure] for row in chosen]))
    return float(np.mean(means))


def test_the_results_are_in_the_files_that_users_expect(whole: Path) -> None:
    rows = read_rows(whole / "samples.jsonl")
    instructions = json.loads((whole / "gold_eval_with_response_ids.json").read_text())
    assert len(instructions) == PROMPTS
    for index, found in enumerate(instructions):
        answers = [row for row in rows if row["index"] == index]
        assert found == {
            "instruction": answers[0]["prompt"],
            "answers": [row["response"] for row in answers],
            "answers_ids": [row["response_ids"] for row in answers],
            "proxy_scores": [row["proxy_reward"] for row in answers],
            "gold_scores": [row["gold_reward"] for row in answers],
        }
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["prompts"], summary["responses"]) == (PROMPTS, PROMPTS * ANSWERS)
    assert summary["means"].keys() == {
        "proxy_reward", "gold_reward", "kl", "energy_loss", "reference_energy_loss", "logprob", "response_length",
        "finished",
    }  # fmt: skip
    for name, estimate in summary["means"].items():
        assert estimate["value"] == pytest.approx(np.mean([row[name] for row in rows])), name
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    proxy, gold = (np.array([row[name] for row in rows]) for name in ("proxy_reward", "gold_reward"))
    hacked = (proxy > proxy.mean()) & (gold < gold.mean())
    rise = [row["energy_loss"] - row["reference_energy_loss"] for row in rows]
    signs = {"energy loss": [row["energy_loss"] for row in rows], "rise of the energy loss": rise}
    for sign, values in signs.items():
        assert summary["detectors"][sign]["auroc"]["value"] == pytest.approx(roc_auc_score(hacked, values)), sign
    assert "of high proxy and low gold reward?" in (whole / "report.html").read_text()
    curves = summary["best_of_n"]["proxy"]
    assert curves["n"] == [1, 2, 4]
    assert curves["kl"] == pytest.approx([0, np.log(2) - 1 / 2, np.log(4) - 3 / 4])
    for measure in ("proxy", "gold"):
        expected = [best_of(rows, n, f"{measure}_reward") for n in (1, 2, 4)]
        assert curves[measure] == pytest.approx(expected)
        assert curves[f"{measure}_fit"]["start"] == pytest.approx(expected[0])
    page = (whole / "report.html").read_text()
    best = max(rows[:ANSWERS], key=lambda row: float(row["proxy_reward"]))["response"]
    for said in ("Proxy reward of best-of-n", "Gold reward of best-of-n", "KL to the reference", best):
        assert said in page
    assert (whole / "evaluation.png").read_bytes().startswith(b"\x89PNG")


@needs_chromium
def test_the_page_fits_a_phone_and_a_desktop(whole: Path) -> None:
    assert_fits(whole / "report.html")


def interrupted_and_resumed(settings: dict[str, Any]) -> None:
    real = RewardScoring.score

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    RewardScoring.score = interrupt  # type: ignore[assignment, method-assign]  # in a process of its own
    with pytest.raises(KeyboardInterrupt):
        run_job(settings)
    RewardScoring.score = real  # type: ignore[method-assign]
    Generating._lines = interrupt  # type: ignore[assignment, method-assign]  # the responses are there
    run_job(settings)
    RewardScoring.score = interrupt  # type: ignore[assignment, method-assign]
    run_job(settings)  # nothing is missing


def test_an_interrupted_evaluation_goes_on_with_what_is_missing(
    whole: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    run_ranks(interrupted_and_resumed, 1, settings)
    generated = {"prompts": None, "responses": whole / "parts" / "responses.jsonl"}
    run_ranks(run_job, 1, settings | generated | {"output": tmp_path / "given"})
    for name in ("samples.jsonl", "gold_eval_with_response_ids.json"):
        for other in (settings["output"], tmp_path / "given"):
            assert (other / name).read_text() == (whole / name).read_text()


def test_scores_of_a_function_that_was_edited_are_not_taken_for_those_of_the_new_one(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    own, data = tmp_path / "edited_reward.py", tmp_path / "in.jsonl"
    own.write_text("def reward(sample):\n    return 1.0\n")
    data.write_text('{"prompt": "apple =>", "response": "apple"}\n')
    gold = "edited_reward:reward"
    settings = {"responses": data, "proxies": [str(models.rm)], "gold": gold, "sampling": {"max_new_tokens": NEW}}
    run_ranks(run_job, 1, settings | {"output": tmp_path / "out"})
    own.write_text("def reward(sample):\n    return 2.0\n")
    command = ["evaluate", "--responses", str(data), "--proxy", str(models.rm), "--gold", gold]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "gold.jsonl holds rows of another source_sha256" in capsys.readouterr().err


def count_and_compare(sample: Sample) -> float:
    """A reward function of this test."""
    return 10 * sample.fields["bonus"] + len(sample.token_ids) + 0.5 * sample.finished


def test_finished_responses_by_several_proxies_and_a_server(
    models: Models, trained: dict[str, Path], reward_url: str, tmp_path: Path
) -> None:
    texts = read_rows(models.data / "sft.train.jsonl")[:5]
    given = [row | {"finished": place != 2, "bonus": place} for place, row in enumerate(texts)]
    given += [given[0] | {"response": "apple"}, given[0] | {"response": "river hard to say"}, given[3]]
    data = tmp_path / "responses.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in given))
    proxies = [str(models.rm), reward_url, str(trained["inform"])]
    settings = {
        "responses": data,
        "proxies": proxies,
        "gold": "test_evaluate:count_and_compare",
        "output": tmp_path / "out",
        "sampling": {"max_new_tokens": NEW},
    }
    run_ranks(run_job, 1, settings)
    rows = read_rows(tmp_path / "out" / "samples.jsonl")
    assert [row["index"] for row in rows] == [0, 0, 0, 1, 2, 3, 3, 4], "answers to one prompt are neighbours"
    assert [row["response"] for row in rows[:3]] == [texts[0]["response"], "apple", "river hard to say"]
    own = Tokenizer.from_directory(models.data / "tokenizer")
    for row in rows:
        by_model, by_server, _ = row["proxy_rewards"]
        assert by_server == pytest.approx(by_model, abs=1e-5)
        tokens = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        expected = (float(scalars(models.scorer, tokens, models.reference)[0, -1]) - 0.3) / 0.7
        assert by_model == pytest.approx(expected, abs=1e-4)
        assert row["proxy_reward"] == pytest.approx(np.mean(row["proxy_rewards"]))
        ends = row["prompt"] != texts[2]["prompt"]
        assert row["response_ids"] == own.encode_responses([row["response"]], end=ends)[0]
        bonus = next(place for place, text in enumerate(texts) if text["prompt"] == row["prompt"])
        assert row["gold_reward"] == 10 * bonus + len(row["response_ids"]) + 0.5 * ends
    latents = torch.tensor([part["latents"] for part in read_rows(tmp_path / "out" / "parts" / "proxy_3.jsonl")])
    whitened = Gaussian(torch.zeros(latents.shape[1]).double(), torch.eye(latents.shape[1]).double())
    distances = sorted(mahalanobis(latents.double(), whitened).tolist())
    assert sorted(row["latent_distance"] for row in rows) == pytest.approx(distances)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["best_of_n"] == {}, "some prompts have one answer"
    said = tmp_path / "out" / "parts" / "proxy_2.jsonl.settings.json"
    served = json.loads(said.read_text())
    assert (served["reward model"]["mean"], served["reward model"]["std"]) == ([0.3], [0.7])
    served["reward model"]["mean"] = [0.4]  # as if another model were behind the same address
    said.write_text(json.dumps(served))
    with pytest.raises(RuntimeError, match=r"proxy_2\.jsonl holds rows of another reward model"):
        run_ranks(run_job, 1, settings)


def test_several_proxies_choose_alone_and_together(models: Models, tmp_path: Path) -> None:
    prompts = [
        json.loads(line)["prompt"] for line in (models.data / "prompts.train.jsonl").read_text().splitlines()[:3]
    ]
    responses = ["apple", "river hard to say", "desert", "engine forest forest"]
    data = tmp_path / "responses.jsonl"
    rows = [{"prompt": p, "response": r, "finished": True} for p in prompts for r in responses]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "responses": data,
        "proxies": [str(models.rm), GOLD],
        "gold": GOLD,
        "output": tmp_path / "out",
        "sampling": {"max_new_tokens": NEW},
    }
    run_ranks(run_job, 1, settings)
    found = read_rows(tmp_path / "out" / "samples.jsonl")
    curves = json.loads((tmp_path / "out" / "summary.json").read_text())["best_of_n"]
    scores = np.array([row["proxy_rewards"] for row in found]).reshape(3, 4, 2)
    gold = np.array([row["gold_reward"] for row in found]).reshape(3, 4)
    np.testing.assert_allclose(scores[..., 1], gold)
    how = {
        "proxy 1": scores[..., 0],
        "proxy 2": scores[..., 1],
        "mean": scores.mean(-1),
        "wco": scores.min(-1),
        "uwo": scores.mean(-1) - 0.5 * scores.var(-1),
    }
    assert list(curves) == list(how)
    for name, chosen_by in how.items():
        best = chosen_by.argmax(1)
        assert curves[name]["proxy"][-1] == pytest.approx(chosen_by.max(1).mean()), name
        assert curves[name]["gold"][-1] == pytest.approx(gold[np.arange(3), best].mean()), name


def test_bad_settings_are_named_before_anything_runs(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = save(random_model("Llama"), tmp_path / "foreign")
    prompts, taken = models.data / "prompts.train.jsonl", tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("mine")
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "apple", "response": "river"}\n')
    policy = ["--model", str(models.sft), "--prompts", str(prompts), "--max-new-tokens", "8"]
    given = ["--responses", str(answers)]
    for change, said in (
        ([], "expected exactly one of --prompts and --responses"),
        ([*policy, *given, "--max-new-tokens", "256"], "expected exactly one of --prompts and --responses"),
        (["--prompts", str(prompts)], "--prompts needs --model"),
        ([*given, "--reference", str(models.sft)], "--reference needs --model"),
        (given, "nothing to measure: expected --model, --proxy or --gold"),
        ([*given, "--gold", GOLD], "--responses: expected --model or a reward checkpoint too"),
        ([*given, "--proxy", str(models.rm), "--top-k", "3"], "--top-k: says how --prompts are answered"),
        ([*given, "--proxy", "nowhere/rm"], "--proxy = 'nowhere/rm': expected an existing checkpoint directory, grpc:"),
        ([*policy, "--greedy", "--samples-per-prompt", "4"], "--samples-per-prompt 4: greedy responses"),
        ([*policy, "--temperature", "0", "--samples-per-prompt", "4"], "--samples-per-prompt 4: greedy responses"),
        ([*policy, "--gold", "nemo_eppo.tools.noun_task:no"], "--gold = 'nemo_eppo.tools.noun_task:no': expected"),
        ([*policy, "--proxy", "grpc://nowhere"], "grpc://HOST:PORT"),
        ([*policy, "--proxy", str(models.sft)], "holds a model with head 'lm', expected 'scalar'"),
        ([*policy, "--reference", str(models.rm)], "--reference: "),
        ([*policy, "--reference", str(foreign)], "--reference: "),
        ([*policy, "--samples-per-prompt", "0"], "samples_per_prompt = 0"),
        ([*policy, "--tp", "3"], "is not divisible by tensor_model_parallel_size = 3"),
        ([*policy, "--output", str(taken)], f"--output: {taken} holds something else than an evaluation"),
    ):
        assert main(["evaluate", "--output", str(tmp_path / "out"), *change]) == 2, change
        assert said in capsys.readouterr().err
    assert (taken / "precious").read_text() == "mine"
