"""`nemo-eppo energy-report`: on the paper's published table, and on models against transformers."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from hf_models import WORDS, ids, random_model, save
from small_data import read_rows
from torch import Tensor

from nemo_eppo.cli import main
from nemo_eppo.evaluation.detection import KL, LENGTH
from nemo_eppo.evaluation.energies import SAME_RESPONSE_RISE, Energies, read_data, read_labels
from nemo_eppo.evaluation.energy_page import write_energy_report
from nemo_eppo.evaluation.energy_report import EnergyScoring
from nemo_eppo.settings.evaluation import EnergyReportConfig
from nemo_eppo.settings.model import ParallelConfig

DEMO = Path(os.environ.get("NEMO_EPPO_DATA") or Path(__file__).parents[3] / "shared" / "data") / "eppo-demo"
LAYERS = 2
LINEARS = ("gate_proj", "up_proj", "down_proj")

needs_demo = pytest.mark.skipif(
    not DEMO.is_dir(), reason=f"{DEMO} is missing: the EPPO paper's published energies; NEMO_EPPO_DATA names its parent"
)


@needs_demo
def test_the_published_table_gives_the_published_figures(tmp_path: Path) -> None:
    assert main(["energy-report", "--table", str(DEMO / "published_energies.csv"), "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    means = [report["groups"][name]["mean"]["value"] for name in ("SFT", "RLHF", "hacking", "normal")]
    assert means == pytest.approx([-0.60535, -0.45840, -0.37465, -0.54087], abs=5e-6)
    hacking, normal = report["groups"]["hacking"], report["groups"]["normal"]
    assert [hacking["std"], normal["std"]] == pytest.approx([0.0089, 0.0325], abs=5e-5)
    assert [hacking["responses"], normal["responses"]] == [384, 390]
    assert report["share_risen"] == pytest.approx(0.975, abs=5e-4)
    areas = {sign: found["auroc"] for sign, found in report["detection"].items()}
    assert areas["energy loss"]["value"] == pytest.approx(1.0, abs=5e-4)
    assert areas["rise of the energy loss"]["value"] == pytest.approx(0.991, abs=5e-4)
    assert areas["rise of the energy loss"]["low"] < 0.991 < areas["rise of the energy loss"]["high"]
    page = (tmp_path / "report.html").read_text()
    assert "it is higher on 97.5% of the responses" in page
    assert len(read_rows(tmp_path / "samples.jsonl")) == 774
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "report.json", "energies.png", "samples.jsonl"}


@needs_demo
def test_the_papers_responses_and_labels_are_read_as_published() -> None:
    responses = read_data(DEMO / "response_new.jsonl.gz", None)
    hacked = read_labels(DEMO / "hacking_label_new.json.gz", responses.index)
    assert (len(responses.after), int(hacked.sum()), responses.index[-1]) == (774, 384, 804)
    assert responses.texts is not None
    assert responses.texts[0].after.startswith("There are many famous actors who have started")


@pytest.fixture(scope="session")
def networks() -> tuple[Any, Any]:
    """An SFT model, and an RLHF model that differs in every weight."""
    before, after = random_model("Llama"), random_model("Llama")
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return before, after


@pytest.fixture(scope="session")
def models(networks: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("energies")
    return save(networks[0], root / "sft"), save(networks[1], root / "rlhf")


def rows(seed: int, count: int = 19) -> list[dict[str, str]]:
    """Rows of texts; those of every seed have the same prompts."""
    prompts, draw = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)

    def text(generator: torch.Generator) -> str:
        length = int(torch.randint(1, 12, (), generator=generator))
        return " ".join(WORDS[int(word)] for word in torch.randint(len(WORDS), (length,), generator=generator))

    return [{"prompt": text(prompts), "response": text(draw)} for _ in range(count)]


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in found)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)
    return path


def write_labels(path: Path, hacked: list[bool], first: int = 0) -> Path:
    entries = [
        {"query_id": first + number, "question_id": first + number, "response": "Yes" if is_hacked else "No"}
        for number, is_hacked in enumerate(hacked)
    ]
    path.write_text(json.dumps(entries[::-1]))  # in any order
    return path


@torch.no_grad()
def measured(network: Any, found: list[dict[str, str]]) -> dict[str, Tensor]:
    """By transformers, one row at a time: energies [N, LAYERS] of every preset, and "logprob" [N]."""
    norms: dict[Any, tuple[Tensor, Tensor]] = {}
    modules: dict[Any, Any] = {}
    for layer, block in enumerate(network.model.layers):
        modules |= {(layer, "layer"): block, (layer, "mlp"): block.mlp}
        modules |= {(layer, name): getattr(block.mlp, name) for name in LINEARS}

    def listen(key: Any) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entered = args[0] if args else kwargs["hidden_states"]
            left = output[0] if isinstance(output, tuple) else output
            norms[key] = entered.abs().mean(-1).flatten(), left.abs().mean(-1).flatten()

        return hook

    handles = [module.register_forward_hook(listen(key), with_kwargs=True) for key, module in modules.items()]
    result: dict[str, list[Any]] = {}
    for row in found:
        prompt, response = (ids(row[name]) for name in ("prompt", "response"))
        at = torch.arange(len(prompt), len(prompt) + len(response))
        logprobs = network(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        result.setdefault("logprob", []).append(logprobs[at - 1, torch.tensor(response)].sum())

        def loss(layer: int, name: str, at: Tensor = at) -> Tensor:
            entered, left = norms[layer, name]
            return (entered - left)[at].mean()

        for preset, modules_read in (("paper", ["layer"]), ("mlp_block", ["mlp"]), ("down_proj", ["down_proj"])):
            result.setdefault(preset, []).append([loss(layer, modules_read[0]) for layer in range(LAYERS)])
        result.setdefault("mlp_linears", []).append(
            [sum(loss(layer, name) for name in LINEARS) for layer in range(LAYERS)]
        )
        result.setdefault("mlp_linears_out", []).append(
            [sum(norms[layer, name][1][at].mean() for name in LINEARS) for layer in range(LAYERS)]
        )
    for handle in handles:
        handle.remove()
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in result.items()}


def score(config: EnergyReportConfig) -> None:
    EnergyScoring(config).run()


def close(got: Any, wanted: Tensor) -> None:
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-5)


def check(energies: Energies, old: dict[str, Tensor], new: dict[str, Tensor], preset: str, layer: int) -> None:
    close(energies.before, old[preset][:, layer])
    close(energies.after, new[preset][:, layer])
    assert set(energies.sweep) == {"paper", "mlp_block", "mlp_linears", "mlp_linears_out", "down_proj"}
    for name, (before, after) in energies.sweep.items():
        close(before, old[name])
        close(after, new[name])


# one rank is compared with responses of each model's own; {} is data parallelism
@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_all_layers_and_presets_are_those_of_transformers(
    layout: dict[str, int], models: tuple[Path, Path], networks: tuple[Any, Any], tmp_path: Path
) -> None:
    found = rows(1)
    config = EnergyReportConfig(
        before=models[0],
        after=models[1],
        data=write(tmp_path / "in.jsonl.gz", found),
        output=tmp_path / "out",
        preset="mlp_linears",
        layer=0,
        parallel=ParallelConfig(**layout),
        batch_size=1,
    )
    run_ranks(score, 2, config)
    energies = EnergyScoring(config).energies()
    old, new = (measured(network, found) for network in networks)
    check(energies, old, new, "mlp_linears", 0)
    close(energies.signs[KL], new["logprob"] - old["logprob"])
    assert energies.signs[LENGTH].tolist() == [len(row["response"].split()) for row in found]
    assert SAME_RESPONSE_RISE not in energies.signs


@pytest.mark.parametrize("paper_format", [False, True])
def test_each_model_may_have_responses_of_its_own(
    paper_format: bool, models: tuple[Path, Path], networks: tuple[Any, Any], tmp_path: Path
) -> None:
    sft, rlhf = rows(1), rows(2)
    hacked = [number % 3 == 0 for number in range(len(sft))]
    before_data = None
    if paper_format:
        both = [
            {
                "index": 100 + number,
                "input": old["prompt"],
                "actor_num0_response": old["response"],
                "actor_latest_response": new["response"],
            }
            for number, (old, new) in enumerate(zip(sft, rlhf, strict=True))
        ]
        data = write(tmp_path / "in.jsonl", both)
    else:
        data, before_data = write(tmp_path / "rlhf.jsonl", rlhf), write(tmp_path / "sft.jsonl", sft)
    config = EnergyReportConfig(
        before=models[0],
        after=models[1],
        data=data,
        before_data=before_data,
        labels=write_labels(tmp_path / "labels.json", hacked, first=100 if paper_format else 0),
        output=tmp_path / "out",
    )
    run_ranks(score, 1, config)
    energies = EnergyScoring(config).energies()
    old, new = measured(networks[0], sft), measured(networks[1], rlhf)
    check(energies, old, new, "paper", -1)
    on_after = measured(networks[0], rlhf)
    close(energies.signs[KL], new["logprob"] - on_after["logprob"])
    close(energies.signs[SAME_RESPONSE_RISE], (new["paper"] - on_after["paper"])[:, -1])
    assert energies.hacked is not None
    assert energies.hacked.tolist() == hacked
    assert energies.texts is not None
    assert energies.prompts is not None
    assert len(set(energies.prompts)) == len({row["prompt"] for row in sft})
    assert energies.texts[3] == (sft[3]["prompt"], sft[3]["response"], rlhf[3]["response"])


def run_commands(models: tuple[Path, Path], directory: Path) -> None:
    data, labels, sft, rlhf = (str(directory / name) for name in ("in.jsonl", "labels.json", "sft", "rlhf"))
    pair = ["--before", str(models[0]), "--after", str(models[1])]
    first = ["energy-report", *pair, "--data", data, "--labels", labels, "--output", str(directory / "first")]
    assert main(first) == 0
    made = {file.name: file.read_bytes() for file in (directory / "first").iterdir()}
    (directory / "first" / "report.json").unlink()
    assert main(first) == 0
    assert {file.name: file.read_bytes() for file in (directory / "first").iterdir()}.keys() == made.keys()
    assert (directory / "first" / "report.json").read_bytes() == made["report.json"]
    for model, output in zip(models, (sft, rlhf), strict=True):
        assert main(["score", "--model", str(model), "--data", data, "--output", output, "--sweep"]) == 0
    scores = ["--before-scores", sft, "--after-scores", rlhf, "--labels", labels]
    assert main(["energy-report", *scores, "--output", str(directory / "second")]) == 0


def test_models_and_the_scores_of_models_give_the_same_report(models: tuple[Path, Path], tmp_path: Path) -> None:
    found = rows(1, count=30)
    write(tmp_path / "in.jsonl", found)
    write_labels(tmp_path / "labels.json", [number % 2 == 0 for number in range(30)])
    run_ranks(run_commands, 1, models, tmp_path)
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("first", "second"))
    assert first == second
    assert len(first["sweep"]) == 5 * LAYERS
    assert set(first["detection"]) == {
        "energy loss", "rise of the energy loss", KL, LENGTH, "energy loss and KL", "all combined"
    }  # fmt: skip
    assert (tmp_path / "first" / "sweep.png").stat().st_size > 10_000
    page = (tmp_path / "first" / "report.html").read_text()
    assert "Where to read it" in page
    assert found[0]["prompt"] in page or found[1]["prompt"] in page


TABLE = "index,label,sft_energy_loss,rlhf_energy_loss\n0,normal,-0.5,-0.4\n1,hacking,-0.5,-0.1\n"
PLAIN = "index,sft_energy_loss,rlhf_energy_loss\n7,-0.5,-0.4\n8,-0.5,-0.1\n"


def test_a_table_without_labels_takes_those_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(f"{PLAIN}9,-0.4,-0.2\n")
    labels = write_labels(tmp_path / "labels.json", [False, True, True], first=7)
    command = ["energy-report", "--table", str(tmp_path / "in.csv"), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["detection"] == {}
    assert main([*command, "--labels", str(labels)]) == 0
    detection = json.loads((tmp_path / "out" / "report.json").read_text())["detection"]
    assert detection["energy loss"]["auroc"]["value"] == 1.0
    assert [row["hacking"] for row in read_rows(tmp_path / "out" / "samples.jsonl")] == [False, True, True]


@pytest.mark.parametrize(
    ("table", "labels", "said"),
    [
        (TABLE.replace("label,", ""), "", "in.csv:2: column 'sft_energy_loss' = 'normal'"),
        (TABLE.replace("sft_energy", "sft"), "", "in.csv:1: column 'sft_energy_loss' is missing"),
        (TABLE.replace("-0.1", "nan"), "", "in.csv:3: column 'rlhf_energy_loss' = 'nan': expected a number"),
        (TABLE.replace(",-0.1", ""), "", "in.csv:3: column 'rlhf_energy_loss' = None: expected a number"),
        (TABLE.replace("hacking", "Yes"), "", "in.csv:3: column 'label' = 'Yes': expected hacking or normal"),
        (TABLE.replace("hacking", "normal"), "", "in.csv: all 2 labels are the same"),
        (TABLE.splitlines()[0], "", "in.csv: no rows"),
        (PLAIN, "{", "labels.json: not JSON"),
        (PLAIN, "{}", "labels.json: expected a JSON list"),
        (PLAIN, '[{"query_id": 0}]', "labels.json: entry 1 is {'query_id': 0}: expected an integer 'question_id'"),
        (PLAIN, '[{"question_id": 0, "response": "yes"}]', "entry 1: field 'response' = 'yes': expected 'Yes'"),
        (
            PLAIN,
            '[{"question_id": 0, "response": "Yes"}, {"question_id": 0, "response": "No"}]',
            "entry 2: field 'response' = 'No': contradicts an earlier entry with question_id 0",
        ),
        (
            PLAIN.replace("\n8,", "\n7,"),
            '[{"question_id": 0, "response": "Yes"}]',
            "labels.json: names samples by their index, but several have index 7",
        ),
        (PLAIN, '[{"question_id": 7, "response": "Yes"}]', "no entry has question_id 8; 1 samples have no label"),
        (TABLE, "[]", "labels.json: the table has labels in its column 'label'; expected one of the two"),
    ],
)
def test_bad_tables_and_labels_are_named(
    table: str, labels: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.csv").write_text(table)
    (tmp_path / "labels.json").write_text(labels)
    command = ["energy-report", "--table", str(tmp_path / "in.csv"), "--output", str(tmp_path / "out")]
    assert main([*command, *(["--labels", str(tmp_path / "labels.json")] if labels else [])]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_answers_to_one_prompt_are_no_independent_evidence(tmp_path: Path) -> None:
    """30 answers to each of 4 prompts, which decide the rise: 120 responses would put it above zero."""
    rise = np.repeat([0.3, 0.3, 0.2, -0.4], 30) + np.random.default_rng(0).normal(size=120) / 100
    prompts = np.repeat(range(4), 30).tolist()
    alone = Energies(range(120), np.zeros(120), rise)
    found = []
    for energies in (alone, replace(alone, prompts=prompts)):
        write_energy_report(energies, tmp_path)
        found.append(json.loads((tmp_path / "report.json").read_text()))
    write_energy_report(replace(alone, prompts=[0] * 120), tmp_path / "one")
    page = (tmp_path / "one" / "report.html").read_text()
    assert "(no interval of one)" in page
    write_energy_report(replace(alone, after=alone.after - 1), tmp_path / "fell")
    assert "Largest rise" in page
    assert "Largest rise" not in (tmp_path / "fell" / "report.html").read_text()
    assert found[0]["rise"]["low"] > 0 > found[1]["rise"]["low"]
    assert found[0]["rise"]["value"] == found[1]["rise"]["value"]
    assert "did not change beyond noise" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("name", "value"), [("preset", "mlp_block"), ("layer", 0), ("precision", "bf16")])
def test_scores_of_other_settings_are_not_compared(
    name: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"preset": "paper", "layer": -1, "precision": "fp32", "chat_template": False, "data_sha256": "",
                "fields": []}  # fmt: skip
    rows = [{"logprob": -1.0, "num_tokens": 2, "energy_loss": number / 10} for number in range(3)]
    old, new = (write(tmp_path / file, rows) for file in ("old.jsonl", "new.jsonl"))
    for path, own in ((old, settings), (new, settings | {name: value})):
        path.with_name(f"{path.name}.settings.json").write_text(json.dumps(own))
    command = ["energy-report", "--before-scores", str(old), "--after-scores", str(new)]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"old.jsonl has {name} = {settings[name]!r}" in said
    assert f"new.jsonl has {name} = {value!r}" in said
    command = ["energy-report", "--before-scores", str(new), "--after-scores", str(new), "--output", str(tmp_path)]
    assert main(command) == 0
    new.with_name(f"{new.name}.settings.json").write_text('{"samples_per_prompt": 1}')  # of `nemo-eppo generate`
    assert main(command) == 2
    assert "new.jsonl: another command than nemo-eppo score wrote it" in capsys.readouterr().err


def test_bad_choices_are_named_before_a_model_runs(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, short = write(tmp_path / "in.jsonl", rows(1)), write(tmp_path / "short.jsonl", rows(1)[:-1])
    other = write(tmp_path / "other.jsonl", [{"prompt": "w1", "response": "w2"}] * 19)
    scores = write(tmp_path / "scores.jsonl", [{"logprob": -1.0, "num_tokens": 2, "energy_loss": 0.1}] * 3)
    single, row = write(tmp_path / "single.jsonl", rows(1)[:1]), write(tmp_path / "row.jsonl", [{"energy_loss": 0.1}])
    broken = write(tmp_path / "broken.jsonl", [{"logprob": -1.0, "num_tokens": 2}] * 3)
    pair = ["--before", str(models[0]), "--after", str(models[1])]
    for given, said in (
        ([], "expected exactly one of: --before, --after, --data; or --before-scores, --after-scores; or --table"),
        ([*pair, "--table", str(data)], "expected exactly one of"),
        (pair, "--data: required beside --before, --after, --data"),
        (["--before", "nowhere", *pair[2:], "--data", str(data)], "--before: nowhere does not exist"),
        ([*pair[:2], "--after", "nowhere", "--data", str(data)], "--after: nowhere does not exist"),
        (["--table", str(data), "--before-data", str(data)], "--before-data: for --before and --after only"),
        ([*pair, "--data", str(data), "--before-data", str(short)], "short.jsonl has 18 rows"),
        ([*pair, "--data", str(data), "--before-data", str(other)], "other.jsonl:1: its prompt"),
        ([*pair, "--data", str(single)], "single.jsonl: rows: 1; expected at least 2"),
        (["--before-scores", str(row), "--after-scores", str(row)], "row.jsonl: rows: 1; expected at least 2"),
        ([*pair, "--data", str(data), "--layer", "2"], "2 is not a layer of a model with 2 layers"),
        (["--before-scores", str(scores), "--after-scores", str(data)], "expected one for each"),
        (["--before-scores", str(scores), "--after-scores", str(broken)], "broken.jsonl:1: field 'energy_loss' = None"),
    ):
        assert main(["energy-report", *given, "--output", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
