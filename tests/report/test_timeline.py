"""Time lines as text, read back cell by cell, and as pictures."""

import itertools
import sys

import pytest

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import LayerParallelError
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.ownership import contiguous_owner
from hf_layerpar.plan.planner import predict_step
from hf_layerpar.plan.simulate import simulate
from hf_layerpar.plan.step import Anatomy, Pass, build_step
from hf_layerpar.report.timeline import KINDS, as_text, bars, draw


def step_of(num_ranks=2, costs=None, **settings):
    return predict_step(LayerParallelConfig(**settings), contiguous_owner(8, num_ranks), costs, num_ranks=num_ranks)


def test_text_of_a_pipeline():
    """Two micro-batches of four layers a rank: 2 time units each way and for the weights, one column a unit."""
    rows = as_text(step_of(micro_batches=2, schedule="1f1b"), width=18).splitlines()
    assert rows == [
        "rank 0 |FFFF....XXXX..XXXX|",
        "rank 1 |..FFXXXXFFXXXX....|",
        "F forward step, X final vjp and weight gradients, . idle",
    ]


def test_text_of_the_ends_and_of_weight_gradients_apart():
    """The front takes 1 forward and 2 backward for a micro-batch, the tail 2 both ways."""
    costs = Costs(front=2, front_backward=4, tail=4)
    rows = as_text(step_of(micro_batches=2, schedule="zb_h1", costs=costs), width=21).splitlines()
    assert rows == [
        "rank 0 |EFFEFF...BBeeWWBBeeWW|",
        "rank 1 |...FFTTBBFFTTBBWWWW..|",
        "E front, F forward step, T tail, both ways, B final vjp, W weight gradients, e front backward, . idle",
    ]
    rows = as_text(step_of(ends="spread", schedule="1f1b", costs=costs), width=32).splitlines()
    assert rows[:2] == ["rank 0 |EEFFFF....TT........XXXXXXXXeeee|", "rank 1 |......FFFFTTXXXXXXXX............|"]


def test_text_of_two_stacks():
    """An encoder on rank 0 and a decoder on rank 1, which is given the encoder's states."""
    anatomy = Anatomy((Pass((0, 0)), Pass((1, 1), sides=True)), (0, 1, 1), ((), (0,), (1,)))
    plan = build_step(LayerParallelConfig(schedule="gpipe"), anatomy, 2)
    rows = as_text(simulate(plan, Costs(front=1, front_backward=1, tail=1)), width=17).splitlines()
    assert rows[:2] == ["rank 0 |EFF.........XXXXe|", "rank 1 |...MFFTXXXXm.....|"]


def test_text_of_a_coarse_sweep():
    rows = as_text(step_of(1, strategy="mgrit", coarsening=4, coarse_operator="aggregate"), width=30).splitlines()
    count = {letter: rows[0].count(letter) for letter in "FfXb."}
    # the coarse step of the first interval evaluates four layers, the first of which the relaxation shares
    assert count == {"F": 8, "f": 3, "X": 16, "b": 3, ".": 0}


def test_many_ranks_are_thinned_out():
    owner = contiguous_owner(100, 100)
    text = as_text(predict_step(LayerParallelConfig(), owner, num_ranks=100), max_rows=10)
    assert [line.split("|")[0] for line in text.splitlines()[:-1]] == [f"rank {r:>2} " for r in range(0, 100, 10)]


def test_bars_are_the_busy_time():
    costs = Costs(combine=0.125, residual=0.25, latency=0.5)
    step = step_of(strategy="mgrit", coarsening=2, forward_iterations=2, costs=costs)
    drawn = list(bars(step))
    assert {kind for _, kind, *_ in drawn} <= set(KINDS)
    assert {"forward step", "coarse or early step", "coarse or early vjp", "combine, residual"} <= {
        k for _, k, *_ in drawn
    }
    for rank, busy in enumerate(step.busy):
        mine = sorted((start, end) for r, _, _, start, end in drawn if r == rank)
        assert sum(end - start for start, end in mine) == pytest.approx(busy)
        assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(mine))
        assert mine[-1][1] <= step.makespan


def test_picture(tmp_path):
    from matplotlib.image import imread

    steps = {
        "pipeline": step_of(micro_batches=2, schedule="zb_h1"),
        "identity": step_of(strategy="mgrit", coarse_operator="identity"),
    }
    draw(steps, tmp_path / "both.png")
    draw({"pipeline": steps["pipeline"]}, tmp_path / "one.png")
    both, one = (imread(tmp_path / name) for name in ("both.png", "one.png"))
    assert both.shape[0] > one.shape[0]
    for _, (_, colour) in [item for item in KINDS.items() if item[0] in ("forward step", "weight gradients")]:
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(one[:, :, :3] - wanted).max(-1) < 0.01).mean() > 0.005, f"{colour} is not in the picture"


def test_nothing_to_compare_with(tmp_path):
    """A step whose time on one rank isn't known, and one that takes no time at all."""
    plan = step_of().plan
    nothing = dict.fromkeys(("step", "graph_step", "vjp", "weights", "final_vjp"), 0.0)
    for step in (simulate(plan), step_of(costs=Costs(**nothing))):
        assert step.share == 0
        draw({"alone": step}, tmp_path / "alone.png")
        assert as_text(step).startswith("rank 0 |")


def test_missing_matplotlib_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LayerParallelError, match=r"pip install 'hf_layerpar\[report\]'"):
        draw({"a": step_of()}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
