"""`python -m experiments.plan schedule`: its table and its picture."""

import io

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from deepseek_jax.parallel.pipeline.schedules import dualpipe, zero_bubble
from deepseek_jax.parallel.pipeline.simulate import simulate
from experiments import plan
from experiments.command_line import status
from experiments.planning.schedule_picture import COLOURS, IDLE, draw


def rows(capsys, *arguments):
    """Name -> numbers of the printed table."""
    assert plan.main(["schedule", *arguments]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    return {name: numbers for name, *numbers in lines[1:]}


def test_schedules_beside_their_formulas(capsys):
    names = ("gpipe", "one_f_one_b", "zero_bubble", "dualpipe", "dualpipe_v")
    found = rows(capsys, "--schedule", *names, "--stages", "8", "--micro", "20")
    # ranks, makespan, bubble least and most, formula, activations, formula, queue, in ticks
    assert found == {
        "gpipe": ["8", "81", "21", "21", "21", "20", "20", "0", "81"],
        "one_f_one_b": ["8", "81", "21", "21", "21", "8", "8", "0", "100"],
        "zero_bubble": ["8", "67", "7", "7", "7", "8", "8", "8", "67"],
        "dualpipe": ["8", "66", "6", "6", "6", "9", "9", "4", "72"],
        "dualpipe_v": ["4", "126", "6", "6", "6", "9", "9", "4", "132"],
    }


def test_costs_and_queue(capsys):
    assert rows(capsys, "--costs", "F&B=2.5")["dualpipe"][:5] == ["8", "59", "3.5", "4.5", "4.5"]
    found = rows(capsys, "--stages=16", "--micro=120", "--queue=1")["dualpipe"]
    assert (found[3], found[4], found[7]) == ("21", "14", "1")
    by_stage = rows(
        capsys, "--schedule=gpipe", "--stages=2", "--micro=1", "--costs", "F=1,3", "B=2,4", "hop=0.5"
    )
    assert by_stage["gpipe"][:5] == ["2", "11", "4", "8", "-"]


def colours(png: bytes) -> dict[tuple[int, ...], int]:
    """RGB -> pixels."""
    pixels = (imread(io.BytesIO(png))[..., :3] * 255).round().astype(int) @ (1 << 16, 1 << 8, 1)
    found, counts = np.unique(pixels, return_counts=True)
    return {(c >> 16, c >> 8 & 255, c & 255): n for c, n in zip(found.tolist(), counts.tolist(), strict=True)}


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(round(255 * x) for x in to_rgb(colour))


def test_the_picture_shows_the_time_of_every_kind():
    """Numbers and lines cover a little of each box."""
    costs = {"F": 2, "B": 6, "W": 3}
    both = [(s, simulate(s, costs)) for s in (dualpipe(2, 4), zero_bubble(2, 3))]
    seen = colours(draw(both))
    spent = dict.fromkeys(COLOURS, 0.0)
    for event in (event for _, timeline in both for event in timeline.events):
        parts = str(event.op).split("&")
        for part in parts:
            spent[part.rstrip("0123456789.")] += (event.end - event.start) / len(parts)
    area = {kind: sum(seen[rgb(c)] for c in COLOURS[kind] if rgb(c) in seen) for kind in COLOURS}
    per_unit = sum(area.values()) / sum(spent.values())
    assert area == {kind: pytest.approx(time * per_unit, rel=0.12) for kind, time in spent.items()}
    assert all(rgb(c) in seen for c in (IDLE, *COLOURS["F"], *COLOURS["B"], *COLOURS["Bi"]))


def test_the_picture_is_written_whole(tmp_path, capsys):
    out = tmp_path / "new" / "v.png"
    rows(capsys, "--schedule=dualpipe_v", "--stages=4", "--micro=4", f"--out={out}")
    assert imread(out).shape[2] == 4
    assert [file.name for file in out.parent.iterdir()] == ["v.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages=7"], "dualpipe: 7 stages, must be even"),
        (["--schedule=dualpipe_v", "--stages=7"], "dualpipe_v: 7 stages, must be even: two per rank"),
        (["--micro=10"], "dualpipe: 10 micro-batches, must be at least 16"),
        (["--costs", "F=x"], "'F=x' is not OP=COST"),
        (["--costs", "G=1"], "costs of ['G']: the known ones are"),
        (["--costs", "F=1,2"], "costs of F have the shape (2,)"),
        (["--schedule=chimera"], "invalid choice: 'chimera'"),
        (["--out=a.svg"], "--out=a.svg must end in .png"),
        (["--costs", "F=0", "B=0", "W=0", "--out=a.png"], "all costs are 0"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert status(plan.main, ["schedule", *arguments]) == 2
    assert message in capsys.readouterr().err
