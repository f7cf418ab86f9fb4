"""The simulator against a time line worked out by hand, its memory against what a step holds, and prices."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext

import pytest
import torch

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan import schedules, step
from hf_layerpar.plan.costs import APART, Costs
from hf_layerpar.plan.ownership import contiguous_owner
from hf_layerpar.plan.part import RankPart
from hf_layerpar.plan.planner import predict_step
from hf_layerpar.plan.schedules import PRIORITIES
from hf_layerpar.plan.simulate import simulate
from hf_layerpar.plan.step import Anatomy, Pass, build_step
from hf_layerpar.plan.tasks import Plan
from hf_layerpar.run.layers import Common
from hf_layerpar.run.step import Step
from recipes.benchmarks.bare import BareStack
from tests.plan.shapes import exact_step, makespan, two_stacks
from tests.problems import blocks, calls_of, state

COSTS = Costs(
    step=1.0,
    graph_step=1.5,
    vjp=2.0,
    weights=1.25,
    final_vjp=3.0,
    overhead=0.125,
    latency=0.5,
    bandwidth=8.0,
    send=0.25,
    state_bytes=2.0,
    graph_bytes=10.0,
)
MGRIT = LayerParallelConfig(
    strategy="mgrit", coarsening=2, forward_iterations=2, backward_iterations=2, coarse_operator="aggregate"
)


def spans_of(plan: Plan, rank: int) -> dict[str, tuple[float, float]]:
    """When a rank works what: F and B of layers, and the phases, by micro-batch."""
    names = {("step", "forward"): "F", ("step", "backward"): "B", ("weights", "backward"): "W"}
    timeline = simulate(plan, COSTS)
    return {
        f"{names.get((t.kind, t.direction), f'{t.direction} {t.place}')} {t.micro_batch}": span
        for t, span in zip(plan.tasks, timeline.spans, strict=True)
        if t.rank == rank
    }


def test_two_ranks_by_hand():
    """A layer and an end each, two micro-batches. A message: send 0.25, flight 0.25, latency 0.5."""
    plan = exact_step("gpipe", 2, 2, 2, COSTS)
    assert spans_of(plan, 0) == {
        "forward 0 0": (0.0, 0.125),
        "F 0": (0.125, 1.75),
        "forward 0 1": (2.0, 2.125),
        "F 1": (2.125, 3.75),
        "B 0": (10.625, 13.75),
        "backward 0 0": (13.75, 13.875),
        "B 1": (14.0, 17.125),
        "backward 0 1": (17.125, 17.25),
    }
    assert spans_of(plan, 1) == {
        "F 0": (2.75, 4.375),
        "forward 1 0": (4.375, 4.5),
        "F 1": (4.75, 6.375),
        "forward 1 1": (6.375, 6.5),
        "B 0": (6.5, 9.625),
        "B 1": (9.875, 13.0),
    }
    timeline = simulate(plan, COSTS, serial=20.0)
    assert timeline.finish == (17.25, 13.25)  # rank 1 is through when its last message is out
    assert timeline.sending == (0.5, 0.5)
    assert timeline.busy == (10.0 + 0.5, 9.75 + 0.5)
    assert timeline.idle_shares == pytest.approx((1 - 10.5 / 17.25, 1 - 10.25 / 17.25))
    assert timeline.idle_share == pytest.approx(1 - 20.75 / 34.5)
    assert timeline.share == pytest.approx(17.25 / 20)
    assert timeline.bytes_moved == 4 * 2.0


def test_ends_and_weights_have_prices_of_their_own():
    plan = exact_step("zb_h1", 2, 1, 1)
    costs = dataclasses.replace(COSTS, front=0.5, front_backward=0.25, tail=4.0, overhead=0.0)
    assert makespan(plan, costs) == 0.5 + 2 * 1.5 + 4.0 + 2 * (2.0 + 1.25) + 0.25
    assert makespan(exact_step("gpipe", 2, 1, 1), costs) == costs.serial(2) == 0.5 + 2 * 1.5 + 4.0 + 2 * 3.0 + 0.25


def test_a_rank_without_ends_makes_the_arguments_first():
    """Once a micro-batch and pass, while it waits for the first state if it has to wait."""
    plan = exact_step("gpipe", 4, 2, 3)
    plain, late = (simulate(plan, Costs(arguments=a)) for a in (0.0, 1.0))
    assert late.makespan > plain.makespan
    starts = {
        t.micro_batch: start
        for t, (start, _) in zip(late.plan.tasks, late.spans, strict=True)
        if t.rank == 1 and t.kind == "step" and t.direction == "forward"
    }
    assert starts == {0: 2.0, 1: 5.0, 2: 8.0}  # without: 2, 4, 6


def test_timeline_accounts_for_every_unit():
    plan = build_step(MGRIT, two_stacks(contiguous_owner(8, 2), contiguous_owner(8, 2)), 2, 2, costs=COSTS)
    costs = dataclasses.replace(COSTS, combine=0.25, residual=0.5, tail=1.0, front=0.75, send=0.0)
    timeline = simulate(plan, costs)
    assert sum(timeline.busy) == pytest.approx(sum(costs.of(t, plan) for t in plan.tasks))
    assert 0 <= timeline.idle_share < 1
    assert simulate(plan, dataclasses.replace(costs, latency=5.0)).makespan > timeline.makespan
    for task, (start, end) in zip(plan.tasks, timeline.spans, strict=True):
        assert end - start == pytest.approx(costs.of(task, plan))


def test_one_rank_is_serial():
    costs = dataclasses.replace(COSTS, tail=1.0, front=0.5)
    for micro_batches in (1, 4):
        config = LayerParallelConfig(micro_batches=micro_batches)
        step = predict_step(config, [0] * 8, costs, num_ranks=1)
        # all layers are one task each way
        tasks = 5 * micro_batches
        assert step.makespan == pytest.approx(step.serial - 2 * 8 * 0.125 + tasks * 0.125)
        assert step.serial == 8 * (4.5 + 2 * 0.125) + 1.5
        assert step.idle_share == pytest.approx(0.0)
        assert step.bytes_moved == 0.0


def test_cutting_costs():
    cut = dataclasses.replace(COSTS, fixed_share=0.2, tail=2.0, arguments=0.5).cut(4)
    assert cut.step == pytest.approx(0.2 + 0.8 / 4)
    assert cut.tail == pytest.approx(2 * 0.4)
    assert (cut.state_bytes, cut.graph_bytes) == (0.5, 2.5)
    assert (cut.overhead, cut.latency, cut.send, cut.arguments) == (0.125, 0.5, 0.25, 0.5)
    assert COSTS.cut(1) == COSTS


@pytest.mark.parametrize(
    ("prices", "message"),
    [
        ({"step": -1.0}, "step=-1.0 must be at least 0"),
        ({"bandwidth": 0.0}, "bandwidth=0.0 must be positive"),
        ({"fixed_share": 1.5}, r"fixed_share=1.5 must be in \[0, 1\]"),
        ({"latency": math.nan}, "latency=nan"),
    ],
)
def test_impossible_costs_are_refused(prices, message):
    with pytest.raises(ConfigurationError, match=message):
        Costs(**prices)


# ---- memory
class Others:
    """Plays all other ranks to one of them: whatever it waits for is there."""

    size = 3

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def open(self, pairs, device): ...

    def unbroken(self):
        return nullcontext()

    def send(self, tensor, target): ...

    def start_all_reduce(self, tensor): ...

    def receive(self, tensor, source):
        tensor.zero_()

    def wait(self, handle): ...

    def is_done(self, handle):
        return True


class Counted(dict):
    """A step's values; notes the most states that it held."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan, self.most = plan, 0

    def __setitem__(self, key, value) -> None:
        self.update({key: value})

    def update(self, *new) -> None:
        super().update(*new)
        self.most = max(self.most, sum(self.plan.values[v].kind not in ("graph", "pending") for v in self))


@pytest.mark.parametrize("owner", [(0,) * 4 + (1,) * 4 + (2,) * 4, (0, 1, 2) * 4], ids=["blocks", "dealt"])
@pytest.mark.parametrize(
    "config",
    [LayerParallelConfig(micro_batches=3, schedule=s) for s in ("gpipe", "1f1b", "zb_h1", "list")]
    + [dataclasses.replace(MGRIT, micro_batches=2)],
    ids=["gpipe", "1f1b", "zb_h1", "list", "mgrit"],
)
@pytest.mark.parametrize("sides", [False, True])
def test_peak_states_are_what_a_step_holds(config, owner, sides):
    layers, x = blocks(12), state(6)
    side = state(6, seed=2) if sides else None
    for rank in range(3):
        stack = BareStack(calls_of(layers, side), x, lambda y, rows: y.sum())
        plan = stack.plan(config, owner, 3)
        step = Step(RankPart.of(plan, rank), stack, Others(rank), Common(), device=torch.device("cpu"))
        step.values = Counted(plan)
        step.run()
        assert step.values.most == simulate(plan).peaks[rank].states


def test_kept_graphs():
    """The forward fills up, the backward empties; what weight gradients wait for is held like the graph itself; bytes
    count both states and graphs."""
    costs = COSTS.cut(4)
    peaks = {name: simulate(exact_step(name, 12, 3, 4), costs).peaks for name in ("gpipe", "1f1b", "zb_h1")}
    assert [p.graphs for p in peaks["gpipe"]] == [16, 16, 16]
    assert [p.graphs for p in peaks["1f1b"]] == [12, 8, 4]
    assert [p.graphs for p in peaks["zb_h1"]] == [12, 12, 12]
    for peak in (*peaks["gpipe"], *peaks["1f1b"]):
        assert peak.graphs * 2.5 <= peak.bytes <= peak.graphs * 2.5 + peak.states * 0.5
    alone = build_step(LayerParallelConfig(), Anatomy.of_stack((0, 0, 1, 1)), 2, trains=False)
    assert [p.graphs for p in simulate(alone).peaks] == [0, 0]


def test_sides_are_held_from_their_making_to_their_last_use():
    anatomy = Anatomy((Pass((0, 0, 1, 1), sides=True),), (0, 1), ((), (0,)))
    with_sides = simulate(build_step(LayerParallelConfig(schedule="1f1b"), anatomy, 2, 2)).peaks
    without = simulate(exact_step("1f1b", 4, 2, 2)).peaks
    assert all(a.states > b.states for a, b in zip(with_sides, without, strict=True))


# ---- orders of MGRIT
@pytest.mark.parametrize(
    ("settings", "dealt", "gain"),
    [  # how much shorter the best of the rules is than the second one
        ({"coarse_operator": "identity", "coarsening": 8, "forward_iterations": 2}, False, 0.02),
        ({"coarse_operator": "rediscretize", "coarsening": 8, "forward_iterations": 3}, False, 0.01),
        ({"coarse_operator": "aggregate", "coarsening": 8}, True, 0.05),
    ],
)
def test_several_priority_rules_shorten_the_schedule(settings, dealt, gain, monkeypatch):
    config = LayerParallelConfig(strategy="mgrit", micro_batches=8, **settings)
    owner = tuple(n % 16 for n in range(64)) if dealt else contiguous_owner(64, 16)

    def time(*rules) -> float:
        monkeypatch.setattr(schedules, "PRIORITIES", rules)
        step._built.cache_clear()
        plan = build_step(config, Anatomy.of_stack(owner), 16, 8, costs=APART)
        plan.validate()
        return makespan(plan, APART)

    best = time(*PRIORITIES)
    assert best <= (1 - gain) * time(schedules.earliest_micro_batch)
    assert all(best <= time(rule) + 1e-9 for rule in PRIORITIES)
    step._built.cache_clear()


@pytest.mark.parametrize(
    ("config", "num_layers", "num_ranks"),
    [
        (LayerParallelConfig(micro_batches=16), 64, 64),
        (LayerParallelConfig(micro_batches=64, schedule="zb_v"), 128, 64),
        (LayerParallelConfig(strategy="mgrit", coarse_operator="rediscretize", micro_batches=8), 64, 64),
        (LayerParallelConfig(strategy="mgrit", coarse_operator="rediscretize", coarsening=32), 1024, 1024),
    ],
    ids=["list 64", "zb_v 64", "mgrit 64", "mgrit 1024"],
)
def test_large_plans_are_simulated(config, num_layers, num_ranks):
    step = predict_step(config, contiguous_owner(num_layers, num_ranks), num_ranks=num_ranks)
    assert len(step.peaks) == num_ranks
    assert step.share < 1
