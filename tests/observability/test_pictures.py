"""The PNG pictures: panels of the size they say, with what was drawn in the colours of its series."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from nemo_eppo.observability.charts import COLORS, Bars, Chart, Histogram, Lines, Scatter, Series, Stack
from nemo_eppo.observability.pictures import write_picture

X = np.linspace(0, 1, 30)
GROUPS = [
    Series("low", COLORS[0], X.tolist(), (X**2).tolist(), error=(X / 10).tolist()),
    Series("high", COLORS[1], X.tolist(), (X + 1).tolist()),
]


@pytest.mark.parametrize(
    "chart",
    [
        Histogram("Energies", "", GROUPS, "energy loss"),
        Lines("Reward", "", GROUPS, "PPO step", "reward"),
        Scatter("Responses", "", GROUPS, "proxy", "gold"),
        Scatter("Responses", "", GROUPS, "proxy", "gold", joined=True),
        Stack("Seconds", "", GROUPS, "PPO step", "seconds"),
        Bars("Alarms", "", GROUPS, "runs", names=[f"sign {number}" for number in range(30)]),
    ],
)
def test_a_picture_shows_every_group_in_its_colour(chart: Chart, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    write_picture(path, [chart])
    pixels = (matplotlib.image.imread(path)[:, :, :3] * 255).round()
    assert pixels.shape == (400, 560, 3)
    assert (pixels[0, 0] == 255).all(), "light background"
    for color in COLORS[:2]:
        wanted = np.array(list(bytes.fromhex(color.removeprefix("#"))))
        assert (np.abs(pixels - wanted).max(axis=2) < 4).sum() > 20
    assert not any((np.abs(pixels - list(bytes.fromhex(COLORS[2][1:]))).max(axis=2) < 4).ravel())


def test_panels_stand_side_by_side_and_the_same_picture_is_the_same_file(tmp_path: Path) -> None:
    panels = [Histogram(name, "", GROUPS, "energy loss") for name in ("one", "two", "three")]
    write_picture(tmp_path / "a.png", panels)
    write_picture(tmp_path / "b.png", panels)
    assert matplotlib.image.imread(tmp_path / "a.png").shape[:2] == (800, 1120)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png"]
