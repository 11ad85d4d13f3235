"""The estimate of a step, by hand: micro-batches, pipelines, links, what overlaps what; and as `doctor` tells it."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scales
import yaml
from jobs import Models
from launched import eppo, write

from nemo_eppo.cli import main
from nemo_eppo.config import ConfigError, RunError
from nemo_eppo.launch import calibration
from nemo_eppo.launch.cluster import H100, Cluster, Fixed, Link, read_cluster
from nemo_eppo.launch.placement import Placement
from nemo_eppo.launch.work import Work
from nemo_eppo.megatron import device
from nemo_eppo.settings.model import ModelConfig, ModelSetup
from nemo_eppo.settings.training import OptimizerConfig

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    vocab_size=32,
    max_sequence_length=64,
)
FREE = Link(bandwidth=1e30, latency=0)
SECOND = Cluster(  # everything takes a second, or nothing
    products={"fp32": 1.0},
    attention=1e30,
    memory=1e30,
    activations=1e30,
    decoded=1e30,
    host=1.0,
    overlaps=False,
    inside=Link(bandwidth=1.0, latency=0),
    between=Link(bandwidth=0.5, latency=0),
    fixed=Fixed(**dict.fromkeys(Fixed.model_fields, 0.0)),
)


def placed(ranks: int = 1, node: int = 8, **setup: Any) -> Placement:
    layout = {"architecture": MODEL, "tokenizer": Path("words"), **setup}
    optimizer = OptimizerConfig(lr=1e-6)
    return Placement("actor", MODEL, ModelSetup(**layout), ranks, node, True, 100.0, 100.0, optimizer)


def test_processes_that_measure_may_warn_at_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!{sys.executable}\nimport os, sys, time\nfrom pathlib import Path\n"
        "folder = Path(sys.argv[3])\nsys.stderr.write('warning\\n' * 20_000)\n"
        f"(folder / f'{{os.environ[\"LOCAL_RANK\"]}}.json').write_text({SECOND.model_dump_json()!r})\n"
        "while len(list(folder.glob('*.json'))) < 2:\n    time.sleep(0.01)\n"  # ranks wait for each other
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    monkeypatch.setattr(calibration, "_PATIENCE_S", 10)
    assert calibration.measure_here({"fp32"}) == SECOND


def test_each_rank_measures_the_device_that_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for a device waits for the current one, which is the first in every process."""
    calls = []

    def measured(*_: Any) -> Cluster:
        calls.append("measure")
        return SECOND

    monkeypatch.setattr(device, "select", lambda: calls.append("select"))
    monkeypatch.setattr(calibration, "_measure", measured)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(sys, "argv", ["calibration", str(tmp_path), "fp32"])
    calibration.main()
    assert calls == ["select", "measure"]


def test_one_gpu_has_no_link_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "visible_gpus", lambda: ["0"])
    with pytest.raises(RunError, match="the link between them, found one"):
        calibration.measure_here({"bf16"})


def test_what_passes_and_layers_cost_is_found_from_models_of_two_depths() -> None:
    names = ("layer", "forward", "layer_backward", "backward", "layer_update", "update", "layer_decode", "decode")
    cost = dict(zip(names, (0.003, 0.05, 0.007, 0.02, 0.011, 0.13, 0.002, 0.017), strict=True))

    def forward(layers: int) -> float:
        return cost["forward"] + layers * cost["layer"]

    def update(layers: int, micro_batches: int) -> float:
        each = forward(layers) + cost["backward"] + layers * cost["layer_backward"]
        return micro_batches * each + cost["update"] + layers * cost["layer_update"]

    seconds = calibration._Seconds(
        forward={layers: forward(layers) for layers in (2, 6)},
        decode={layers: cost["decode"] + layers * cost["layer_decode"] for layers in (2, 6)},
        train={(layers, count): update(layers, count) for layers in (2, 6) for count in (1, 4)},
        large={},
        decode_large={},
    )
    found = calibration._fixed(seconds).model_dump()
    assert {name: found[name] for name in names} == pytest.approx(cost)
    assert found["request"] == H100.fixed.request


def test_rows_fill_micro_batches_of_replicas() -> None:
    assert placed(micro_batch_size=4).forward(10, 16, 8).own.forward == 3
    assert placed(2, micro_batch_size=4).forward(10, 16, 8).own.forward == 2
    assert placed(micro_batch_tokens=40).forward(10, 16, 8).own.forward == 5  # two rows of 16 tokens each
    one, many = (placed(micro_batch_size=size).forward(12, 16, 8).own for size in (12, 3))
    assert (one.products, one.attention, 4 * one.layer) == (many.products, many.attention, many.layer)


@pytest.mark.parametrize(("virtual", "bubble"), [(None, 1.0), (2, 0.5)])
def test_a_stage_waits_for_the_others(virtual: int | None, bubble: float) -> None:
    parallel = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": virtual}
    own, waits = placed(2, micro_batch_size=4, parallel=parallel).train(12, 16, 8)
    assert (own.forward, waits.forward) == (3, bubble)
    logits = (
        4 * 2 * 12 * 8 * MODEL.hidden_size * MODEL.vocab_size
    )  # on the last stage, forward and three times backward
    assert waits.products == pytest.approx((own.products - logits) / 3 * bubble)


def test_links_are_of_the_nodes_that_a_group_spans() -> None:
    within, across = (placed(8, node, parallel={"tensor_model_parallel_size": 4}) for node in (8, 4))
    tensor, replica = Work(tensor_bytes=1), Work(replica_bytes=1)
    assert [p.parts(SECOND, tensor)["links"] for p in (within, across)] == [1, 1]
    assert [p.parts(SECOND, replica)["links"] for p in (within, across)] == [1, 2]


def test_a_device_overlaps_products_reads_and_launches_and_a_core_does_not() -> None:
    device = SECOND.model_copy(
        update={"overlaps": True, "memory": 1.0, "fixed": SECOND.fixed.model_copy(update={"layer": 1.0})}
    )
    work = Work(products=3, memory=5, layer=4, host=1)
    assert placed().seconds(device, work) == 5 + 1
    assert placed().seconds(device, work + Work(layer=4)) == 8 + 1
    assert placed().seconds(device.model_copy(update={"overlaps": False}), work) == 3 + 5 + 4 + 1


def test_gradients_are_summed_behind_the_last_backward_pass() -> None:
    device = SECOND.model_copy(update={"overlaps": True})
    replicas = replace(placed(2), optimizer=OptimizerConfig(lr=1e-6, overlap_grad_reduce=True))
    assert replicas.hidden(device, 2, 16, 8) == 400  # ring of two: 100 gradients of 4 bytes
    slow = device.model_copy(update={"inside": Link(bandwidth=1e-9, latency=0)})
    backward = replicas.shape.backward(1, 16, 8)
    assert replicas.hidden(slow, 2, 16, 8) == replicas.seconds(slow, backward)
    assert placed(2).hidden(device, 2, 16, 8) == 0


def test_prompts_wait_for_room_in_the_engine() -> None:
    at_once, in_turn = (placed().generation(8, 16, 10, room) for room in (8, 3))
    assert (at_once.layer_decode, in_turn.layer_decode) == (4 * 11, 3 * 4 * 11)
    assert in_turn.products == pytest.approx(at_once.products)


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    file = tmp_path / "figures.yaml"
    file.write_text(yaml.safe_dump({**json.loads(SECOND.model_dump_json()), "cores": 100}))
    return file


def estimated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["doctor", *map(str, arguments), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["estimates"]
    return dict(found)


def seconds(phases: list[dict[str, Any]]) -> dict[str, float]:
    return {phase["name"]: phase["seconds"] for phase in phases}


def test_the_actor_waits_for_what_its_servers_still_do(
    models: Models, tmp_path: Path, figures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(eppo(models, tmp_path / "run"), tmp_path / "launch.yaml")
    found = estimated(capsys, file, "--estimate", figures)
    phases, servers = seconds(found["phases"]), seconds(found["servers"])
    assert set(servers) == {"critic: values", "reward: scores", "critic: updates"}
    scored = max(servers["critic: values"], servers["reward: scores"])
    assert phases["server_wait"] == max(0, scored - phases["logprobs"] - phases["reference"])
    assert phases["critic_train"] == pytest.approx(max(0, servers["critic: updates"] - phases["actor_train"]))
    assert found["seconds"] == pytest.approx(sum(phases.values()))
    alone = estimated(capsys, file, "jobs.actor.colocate=true", "--estimate", figures)
    assert not alone["servers"]
    assert seconds(alone["phases"])["critic_train"] > 0
    assert found["sent"]["tensor"] > 0 == found["sent"]["replica"]


def test_ranks_that_share_cores_wait_for_each_other(
    models: Models, tmp_path: Path, figures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(eppo(models, tmp_path / "run"), tmp_path / "launch.yaml")
    figures.write_text(figures.read_text().replace("cores: 100", "cores: 1"))
    found = estimated(capsys, file, "--estimate", figures)
    phases, servers = seconds(found["phases"]), seconds(found["servers"])
    busy = 2 * (phases["logprobs"] + phases["reference"]) + servers["critic: values"] + servers["reward: scores"]
    assert phases["server_wait"] == pytest.approx(busy - phases["logprobs"] - phases["reference"])


def test_old_logprobs_of_the_engine_save_a_pass_and_epochs_cost_updates(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = eppo(models, tmp_path / "run")
    launch["jobs"]["actor"]["settings"]["model.precision"] = "bf16"
    file, ppo = write(launch, tmp_path / "launch.yaml"), "jobs.actor.settings.ppo"
    once = seconds(estimated(capsys, file, "--estimate", "h100")["phases"])
    again = estimated(capsys, file, f"{ppo}.old_logprobs=engine", f"{ppo}.epochs=3", "--estimate", "h100")
    twice = seconds(again["phases"])
    assert (once["logprobs"] > 0, twice["logprobs"]) == (True, 0)
    assert twice["actor_train"] == pytest.approx(3 * once["actor_train"])


def test_the_table_names_what_bounds_each_phase(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(eppo(models, tmp_path / "run"), tmp_path / "launch.yaml")
    assert main(["doctor", str(file), "--estimate", "h100"]) == 0
    told = capsys.readouterr().out
    assert "response tokens a second, predicted" in told
    (generate,) = (line for line in told.splitlines() if line.startswith("  generate"))
    assert generate.split()[3] == "launches"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("attention: -1", "attention = -1: Input should be greater than 0"),
        ("atention: 1", "atention: unknown key (did you mean 'attention'?)"),
        ("inside: {bandwidth: 1}", "inside.latency: required, but not set"),
        ("products: {}", "products: Dictionary should have at least 1 item"),
    ],
)
def test_a_wrong_figure_is_named(change: str, message: str, figures: Path) -> None:
    values = yaml.safe_load(figures.read_text()) | yaml.safe_load(change)
    figures.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as refused:
        read_cluster(str(figures))
    assert message in str(refused.value)
    assert str(figures) in str(refused.value)


def test_a_cluster_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "run.yaml", "--estimate", "h200"]) == 2
    assert "--estimate = 'h200': expected h100, here, or a YAML file" in capsys.readouterr().err
    assert main(["doctor", "--estimate", "h100"]) == 2
    assert "expected a launch file" in capsys.readouterr().err


def test_a_precision_without_a_figure() -> None:
    with pytest.raises(ConfigError, match=r"products has no figure for jobs\.actor\.settings\.model\.precision = bf16"):
        placed(precision="bf16").parts(SECOND, Work(products=1))


def test_the_page_has_the_table_that_its_command_prints() -> None:
    page = Path(scales.__file__).parents[2] / "nemo_eppo" / "launch" / "README.md"
    assert set(scales.table([scales.ROWS[0], scales.ROWS[-1]]).splitlines()) <= set(page.read_text().splitlines())


def test_more_gpus_are_faster_and_a_gpu_of_the_largest_model_has_room() -> None:
    steps = [scales.estimated("8B", replicas, replicas) for replicas in (1, 2, 8)]
    assert [step.seconds for step in steps] == sorted((step.seconds for step in steps), reverse=True)
    assert max(scales.estimated("405B", 1, 1).memory.values()) < scales.GPU_BYTES
    assert scales.smallest("8B") == 4
    assert H100.products["bf16"] < 989e12
