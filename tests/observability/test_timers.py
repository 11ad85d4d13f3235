"""Phases of a step."""

import time

import pytest

from nemo_eppo.observability.timers import Timers


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the timers see: append to let time pass."""
    ticks = [100.0]
    monkeypatch.setattr("nemo_eppo.observability.timers.time.perf_counter", lambda: sum(ticks))
    return ticks


def test_phases_add_up_over_a_step(clock: list[float]) -> None:
    timers = Timers()
    for seconds in (2.0, 1.0):
        with timers("generate"):
            clock.append(seconds)
    clock.append(1.0)  # in no phase
    with timers("actor_train"):
        clock.append(4.0)
    assert timers.collect(total=8.0) == {
        "seconds/generate": 3.0,
        "seconds/actor_train": 4.0,
        "seconds/step": 8.0,
        "seconds/attributed_fraction": 7 / 8,
    }
    assert timers.collect(total=1.0) == {"seconds/step": 1.0, "seconds/attributed_fraction": 0.0}


def test_the_real_clock_measures_seconds() -> None:
    timers = Timers()
    start = time.perf_counter()
    with timers("wait"):
        time.sleep(0.02)
    total = time.perf_counter() - start
    assert 0.02 <= timers.collect(total)["seconds/wait"] <= total


def test_phases_do_not_overlap() -> None:
    timers = Timers()
    with (
        timers("generate"),
        pytest.raises(RuntimeError, match="'refit' starts inside phase 'generate'"),
        timers("refit"),
    ):
        pass


def test_an_unfinished_phase_cannot_be_collected() -> None:
    timers = Timers()
    with timers("generate"), pytest.raises(RuntimeError, match="'generate' is still running"):
        timers.collect(total=1.0)


def test_timings_left_over_from_an_earlier_step_are_noticed(clock: list[float]) -> None:
    timers = Timers()
    for _ in range(2):
        with timers("generate"):
            clock.append(3.0)
    with pytest.raises(RuntimeError, match=r"phases of 6\.000 s in a step of 3\.500 s \(generate 6\.000\)"):
        timers.collect(total=3.5)


def test_timings_never_collected_are_noticed_at_the_end(clock: list[float]) -> None:
    timers = Timers()
    with timers("log"):
        clock.append(1.0)
    with pytest.raises(RuntimeError, match="never collected: log"):
        timers.close()
    timers.collect(total=1.0)
    timers.close()


def test_a_failed_phase_does_not_hide_the_error() -> None:
    timers = Timers()
    with pytest.raises(ZeroDivisionError), timers("generate"):
        _ = 1 / 0
    with timers("generate"):
        pass


def test_device_work_is_charged_to_the_phase_that_queued_it(clock: list[float]) -> None:
    queued = [5.0]
    timers = Timers(synchronize=lambda: clock.append(queued.pop()) if queued else None)
    with timers("generate"):
        pass  # the wait for work queued before belongs to nobody
    with timers("actor_train"):
        queued.append(2.0)
    seconds = timers.collect(total=7.0)
    assert (seconds["seconds/generate"], seconds["seconds/actor_train"]) == (0.0, 2.0)
