"""The comparison of an over-optimisation bench against numpy and closed forms, and the bench itself, hardly trained."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from comparison import Acceptance, Curves, compare, over_distance, win_rate
from results_page import verdict, write_results
from scipy import stats
from test_alarms import write_run

from nemo_eppo.evaluation import intervals
from nemo_eppo.evaluation.detection import ENERGY_AND_KL, KL

BENCH = Path(__file__).parents[2] / "examples" / "overoptimization"


def curves(gold: list[float], kl: list[float] | None = None, **other: Any) -> Curves:
    steps = tuple(range(0, 10 * len(gold), 10))
    values: dict[str, Any] = {
        "proxy": np.linspace(0, 1, len(gold)),
        "energy": np.linspace(0, 1, len(gold)),
        "length": np.full(len(gold), 5.0),
        "correlation": 0.7,
        "first": np.full(4, gold[0]),
        "last": np.full(4, gold[-1]),
    }
    kl_values = np.array(kl if kl is not None else [float(step) for step in steps])
    return Curves(steps=steps, gold=np.array(gold), kl=kl_values, **values | other)


def test_gold_at_a_distance_is_interpolated() -> None:
    run = curves([0.0, 1.0, 0.5], kl=[0.0, 4.0, 8.0])
    assert [run.at(kl, run.gold) for kl in (0.0, 1.0, 4.0, 6.0, 8.0)] == [0.0, 0.25, 1.0, 0.75, 0.5]
    assert run.at(9.0, run.gold) == 0.5, "never so far: the last step's"
    back = curves([0.0, 1.0, 0.5, 0.2], kl=[0.0, 4.0, 2.0, 8.0])
    assert back.at(3.0, back.gold) == 0.75, "the first time counts"
    assert back.at(6.0, back.gold) == pytest.approx(0.35)


@pytest.mark.parametrize(
    ("gold", "correlation", "refusal"),
    [
        ([0.2, 0.5, 0.3], 0.7, ""),
        ([0.2, 0.5, 0.3], 0.4, "correlation 0.400 is below 0.5"),
        ([0.2, 0.3, 0.1], 0.7, "rises by 0.100 only"),
        ([0.2, 0.349, 0.1], 0.7, "rises by 0.149 only, less than 0.15"),
        ([0.2, 0.5, 0.48], 0.7, "falls by 0.020 only"),
    ],
)
def test_seeds_count_where_plain_ppo_over_optimises(gold: list[float], correlation: float, refusal: str) -> None:
    found = Acceptance().refusal(curves(gold, correlation=correlation))
    assert refusal in found
    assert bool(found) == bool(refusal)


def test_methods_are_compared_in_pairs() -> None:
    draw = np.random.default_rng(0)
    final = {name: draw.normal(size=6) for name in ("ppo", "eppo", "other")}
    runs = {
        name: {seed: curves([0.0, 2.0, float(values[seed])], kl=[0.0, 1.0 + seed, 9.0]) for seed in range(6)}
        for name, values in final.items()
    }
    runs["other"][17] = runs["other"][0]  # no other method has this seed
    found = compare(runs, ("ppo", "eppo"))
    assert found["seeds"] == list(range(6))
    other = found["methods"]["other"]
    assert other["final"]["value"] == pytest.approx(final["other"].mean())
    assert other["final"]["seeds"] == pytest.approx(final["other"].tolist())
    for name in ("ppo", "eppo"):
        differences = final["other"] - final[name]
        less = other["final"]["less"][name]
        assert less["value"] == pytest.approx(differences.mean())
        interval = stats.ttest_rel(final["other"], final[name]).confidence_interval(0.95)
        assert (less["low"], less["high"]) == pytest.approx((interval.low, interval.high))
        assert less["higher"] == (differences > 0).sum()
        # of all ways to give the ranks signs, the share with a sum as far from half of all ranks
        ranks = stats.rankdata(abs(differences))
        sums = [np.dot(signs, ranks) for signs in itertools.product((0, 1), repeat=6)]
        far = abs(np.dot(differences > 0, ranks) - 10.5)
        assert less["p"] == pytest.approx(np.mean([abs(total - 10.5) >= far for total in sums]))
        assert other[f"wins_over_{name}"]["seeds"] == (final["other"] > final[name]).astype(float).tolist()
    assert found["methods"]["eppo"]["equal_kl"]["value"] == 2.0, "plain PPO's peak is theirs as well"
    assert found["methods"]["eppo"]["reaches_equal_kl"]["value"] == 1.0
    assert "eppo" not in found["methods"]["eppo"]["final"]["less"]


def test_the_fit_over_the_distance_finds_what_made_the_curves() -> None:
    kl = np.linspace(0, 3, 61) ** 2
    kl[30] = kl[28]  # it came back for a step
    d = np.maximum.accumulate(kl) ** 0.5
    gold = 0.2 + d * (0.8 - 0.5 * np.log(np.maximum(d, 1e-9)))
    runs = {name: {seed: curves(gold.tolist(), kl.tolist()) for seed in (1, 2)} for name in ("ppo", "eppo")}
    places, values = over_distance(list(runs["ppo"].values()), "gold", points=4)
    assert places.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert values[0][[0, 2, 3]] == pytest.approx(0.2 + np.array([0, 2, 3]) * (0.8 - 0.5 * np.log([1, 2, 3])))
    fit = compare(runs, ("ppo",))["fits"]["eppo"]
    assert (fit["start"], fit["a"], fit["b"]) == pytest.approx((0.2, 0.8, 0.5), abs=0.01)  # lines between the steps
    still = {name: {1: curves([0.2, 0.2], [0.0, 0.0])} for name in ("ppo", "eppo")}
    assert compare(still, ("ppo",))["fits"]["ppo"] is None


def test_of_one_seed_nothing_follows(tmp_path: Path) -> None:
    runs = {name: {1: curves([0.0, 1.0, last])} for name, last in (("ppo", 0.3), ("eppo", 0.4))}
    text = write_results(tmp_path, runs, {}, {})
    assert "One seed proves nothing: EPPO less plain PPO is 0.100." in " ".join(text.split())
    assert "0.100, 1/1" in text
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["methods"]["eppo"]["final"]["less"]["ppo"]["low"] is None
    assert found["fits"]["eppo"] is None


def test_equal_gold_rewards_are_half_a_win() -> None:
    assert win_rate(np.array([1.0, 2, 3, 4]), np.array([0.0, 2, 4, 4])) == 0.5


def test_the_first_sentence_says_whether_eppo_wins(tmp_path: Path) -> None:
    runs = {
        name: {seed: curves([0.0, 1.0, gold + 0.01 * seed]) for seed in (1, 2, 3)}
        for name, gold in (("ppo", 0.1), ("eppo", 0.4), ("ppo_kl", 0.6))
    }
    table = write_results(tmp_path, runs, {"size": "0.2M"}, {"candidates": {4: {"refusal": "no fall"}}})
    expected = (
        "EPPO does not win: ppo_kl does at the last step (0.620; EPPO 0.420, place 2 of 3). Against plain PPO EPPO"
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert verdict(results).startswith(expected)
    assert expected in (tmp_path / "report.html").read_text()
    assert expected.split(".")[0] in table
    assert results["candidates"] == {"4": {"refusal": "no fall"}}
    assert results["curves"]["eppo"]["2"]["gold"] == [0.0, 1.0, 0.42]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    del runs["ppo_kl"]
    assert verdict(compare(runs, ("ppo", "eppo"))).startswith("EPPO has the highest gold reward")


def test_every_method_is_tuned_by_the_same_number_of_values_and_uses_what_was_chosen() -> None:
    methods = yaml.safe_load((BENCH / "methods.yaml").read_text())
    assert {len(next(iter(about["tune"].values()))) for about in methods.values() if "tune" in about} == {3}
    used = {str(of)[1:] for about in methods.values() for of in about.get("settings", {}).values() if str(of)[0] == "$"}
    assert all("tune" in methods[name] for name in used)


def bench(output: Path, methods: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCH / "bench.py"), "--smoke", "--output", str(output), "--methods", methods]
    subprocess.run(command, check=True, timeout=1800)
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


def test_the_bench_runs(tmp_path: Path) -> None:
    found = bench(tmp_path, "eppo")
    assert set(found["methods"]) == {"ppo", "eppo"}
    assert found["seeds"] == [1]
    assert found["tuning"] == found["candidates"] == {}, "one value, and every seed counts"
    assert found["curves"]["eppo"]["1"]["steps"] == [0, 1, 2]
    assert not (tmp_path / "alarms").exists(), "two steps are too few"
    read = json.loads((tmp_path / "weights_and_text.json").read_text())
    for method in ("ppo", "eppo"):
        recorded, of_method = found["curves"][method]["1"]["energy"], read[method]["1"]
        assert of_method["sft"]["first"] == pytest.approx(recorded[0], abs=1e-5)
        assert of_method["policy"]["last"] == pytest.approx(recorded[-1], abs=1e-5)
        assert len({of_method[reader][text] for reader in ("sft", "policy") for text in ("first", "last")}) == 4
    assert (tmp_path / "seed_1" / "policies" / "eppo" / "weights_and_text" / "done").exists(), "it is not read again"


@pytest.mark.slow
def test_the_bench_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    found = bench(tmp_path / "first", "energy_gated_kl")
    policy = tmp_path / "first" / "seed_1" / "policies" / "eppo"
    made = (policy / "metrics.jsonl").read_bytes()
    (policy.parent / "energy_gated_kl" / "done").unlink()  # as if it had been killed just before its end
    again = bench(tmp_path / "first", "energy_gated_kl")
    assert (policy / "metrics.jsonl").read_bytes() == made, "it was not trained again"
    assert again["curves"] == found["curves"]


def test_models_of_another_bench_do_not_count_as_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from bench import main

    monkeypatch.setattr(sys, "argv", ["bench.py", "--output", str(tmp_path), "--methods", "ppo_kl"])
    (tmp_path / "settings.json").write_text('{"text": "nouns", "size": "0.2M", "sft_steps": 20}')
    with pytest.raises(SystemExit, match="holds the models of another bench"):
        main()
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_a_policy_that_was_made_from_something_else_does_not_count_as_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # pieces are forked and keep the patch below
    from bench import Bench, Method
    from pieces import run_all
    from trainings import LABELS, SIZES, TEXTS, Effort, Task

    monkeypatch.setattr(Task, "train_policy", lambda *_: None)
    task = Task(tmp_path, TEXTS["nouns"], SIZES["0.2M"], LABELS["hedges"], Effort())
    eta, file = "shaping.energy_penalty.eta", tmp_path / "seed_1" / "policies" / "eppo" / "done"

    def train(name: str, about: dict[str, Any], eppo: int) -> None:
        method = Method(name, about)
        run_all("policies", [Bench(task, [method], 1, None)._policy(method, 1, {"eppo": eppo})], 1)

    train("eppo", {"method": "eppo", "tune": {eta: [2, 8]}}, 8)
    train("eppo_kl", {"method": "eppo", "settings": {eta: "$eppo"}}, 8)
    before = file.stat().st_mtime_ns
    train("eppo", {"method": "eppo", "tune": {eta: [2, 8, 32]}}, 8)
    assert file.stat().st_mtime_ns == before, "the chosen value is the same"
    says = r'policies/NAME: was made from .*eta": 8.*, it would be made from .*eta": 32.* now\nremove these directories'
    with pytest.raises(SystemExit, match=says.replace("NAME", "eppo")):
        train("eppo", {"method": "eppo", "tune": {eta: [2, 8, 32]}}, 32)
    with pytest.raises(SystemExit, match=says.replace("NAME", "eppo_kl")):
        train("eppo_kl", {"method": "eppo", "settings": {eta: "$eppo"}}, 32)
    file.unlink()  # it was interrupted at the end, its checkpoint is there
    with pytest.raises(SystemExit, match='"rewards": "odin"'):
        train("eppo", {"method": "eppo", "rewards": "odin", "tune": {eta: [8]}}, 8)
    (file.parent / "made_from.json").unlink()
    file.touch()
    with pytest.raises(SystemExit, match=r"was made from \{\}"):
        train("eppo", {"method": "eppo", "tune": {eta: [8]}}, 8)


def test_what_was_tuned_and_which_seeds_were_refused_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    import bench
    from trainings import LABELS, SIZES, TEXTS, Effort, Task

    def read(run: Path) -> Curves:
        tuned = {"eppo=2": [0.3, 0.5], "eppo=8": [0.45, 0.4]}
        if run.name in tuned:
            return curves([0.2, tuned[run.name][run.parents[1].name == "seed_1002"]])
        return curves([0.2, 0.5, 0.3], correlation=0.4 if "seed_1/" in f"{run}/" else 0.7)

    trained: list[Path] = []
    monkeypatch.setattr(bench, "run_all", lambda title, work, workers: trained.extend(one.directory for one in work))
    monkeypatch.setattr(bench, "read_curves", read)
    methods = [bench.Method("ppo", {}), bench.Method("eppo", {"method": "eppo", "tune": {"eta": [2, 8]}})]
    task = Task(tmp_path, TEXTS["nouns"], SIZES["0.2M"], LABELS["hedges"], Effort())
    made = bench.Bench(task, methods, 1, Acceptance())
    found = made.run(1)
    assert made.tuning == {"eppo": {"chosen": 8, "gold": {2: {1001: 0.3, 1002: 0.5}, 8: {1001: 0.45, 1002: 0.4}}}}
    refusal = "correlation 0.400 is below 0.5"
    assert made.candidates == {
        1: {"correlation": 0.4, "refusal": refusal}, 2: {"correlation": 0.7, "refusal": ""}
    }  # fmt: skip
    assert [list(of_method) for of_method in found.values()] == [[2], [2]]
    assert task.policy(2, "eppo") in trained
    assert task.policy(1, "eppo") not in trained


def test_alarms_are_those_of_plain_ppo_and_of_methods_with_further_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setattr(intervals, "_DRAWS", 50)
    from bench import detect
    from trainings import LABELS, SIZES, TEXTS, Effort, Task

    task = Task(tmp_path, TEXTS["nouns"], SIZES["0.2M"], LABELS["hedges"], Effort())
    for seed, peak in ((1, 18), (2, None), (3, 20)):  # the second is refused, gold does not fall
        write_run(task.policy(seed, "acceptance"), peak, hacks_from=11)
        write_run(task.policy(seed, "eppo"), peak, hacks_from=11, kl=True)
        write_run(task.policy(seed, "inform"), peak, hacks_from=None, few=0)
    detect(task, {"ppo": [1, 3], "eppo": [1, 3], "inform": [1, 3], "odin": [1, 3]}, "acceptance")
    assert {path.name for path in (tmp_path / "alarms").iterdir()} == {"ppo", "eppo"}
    plain, eppo = (json.loads((tmp_path / "alarms" / name / "report.json").read_text()) for name in ("ppo", "eppo"))
    assert list(plain["runs"]) == ["seed_1", "seed_2", "seed_3"], "those that were refused, too"
    assert plain["runs"]["seed_2"]["run"].endswith("seed_2/policies/acceptance")
    assert list(eppo["runs"]) == ["seed_1", "seed_3"]
    assert set(eppo["signs"]) - set(plain["signs"]) == {KL, ENERGY_AND_KL}
    printed = capsys.readouterr().out
    assert "ppo: The gold reward fell beyond noise in 2 of 3 runs" in printed
    assert "no alarms of inform: all 2 runs are left out" in printed


_TWO_PIECES = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from pieces import Work, run_all

def work():
    print(1, flush=True)
    time.sleep(100)

run_all("work", [Work(Path(sys.argv[2]), work)], 1)
"""


def test_pieces_of_work_end_with_the_bench(tmp_path: Path) -> None:
    piece = tmp_path / "piece"
    bench = subprocess.Popen([sys.executable, "-c", _TWO_PIECES, str(BENCH), str(piece)], cwd=BENCH.parents[1])
    while not (piece / "output.txt").exists() or not (piece / "output.txt").read_text():
        assert bench.poll() is None
        time.sleep(0.05)
    [work] = psutil.Process(bench.pid).children()
    bench.kill()
    bench.wait()
    assert not psutil.wait_procs([work], timeout=10)[1]


@pytest.mark.slow
@pytest.mark.timeout(3600)  # 35 trainings of policies, on a machine that may be busy
def test_the_same_seed_gives_the_same_numbers_and_every_method_runs(tmp_path: Path) -> None:
    names = yaml.safe_load((BENCH / "methods.yaml").read_text())
    first, second = bench(tmp_path / "first", ",".join(names)), bench(tmp_path / "second", "ppo_kl")
    assert all(first["curves"][name] == second["curves"][name] for name in ("ppo", "eppo", "ppo_kl"))
    assert set(first["methods"]) == set(names)
