"""The simulator against time lines worked out by hand, its memory count against the executor, and the list schedule."""

import dataclasses
import itertools
import math
import weakref

import pytest
import torch

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.ownership import contiguous_owner
from hf_layerpar.plan.planner import gpipe, predict_step
from hf_layerpar.plan.schedule import PRIORITIES, earliest_micro_batch, in_schedule_order
from hf_layerpar.plan.simulate import Costs, simulate
from hf_layerpar.plan.strategies import build_plan
from hf_layerpar.run import executor
from hf_layerpar.run.communicator import LocalCommunicator
from hf_layerpar.run.executor import Evaluator, RankPart

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
MGRIT = LayerParallelConfig(strategy="mgrit", coarsening=2, forward_iterations=2, coarse_operator="aggregate")


def plan(config, direction, owner, num_ranks, micro_batches=1):
    return build_plan(config, direction, owner, num_ranks=num_ranks, micro_batches=micro_batches)


def test_two_ranks_by_hand():
    """Rank 0 evaluates layer 0 on two micro-batches, rank 1 layer 1. A message: send 0.25, flight 0.25, latency 0.5."""
    forward = simulate(plan(LayerParallelConfig(), "forward", (0, 1), 2, 2), COSTS)
    assert forward.spans == ((0.0, 1.625), (1.875, 3.5), (2.625, 4.25), (4.5, 6.125))
    handed_out = 2 * (0.5 + 0.25)  # both ends from rank 1, one after the other
    assert forward.finish == (6.125 + handed_out, 6.125 + handed_out)
    assert forward.sending == (0.5, 0.0)
    assert forward.busy == (3.25 + 0.5, 3.25)
    assert forward.idle_share == pytest.approx(1 - 7.0 / (2 * forward.makespan))
    assert forward.bytes_moved == (2 + 2) * 2.0


def test_one_rank_is_serial():
    for config in (LayerParallelConfig(), LayerParallelConfig(micro_batches=4)):
        step = predict_step(config, [0] * 8, COSTS, num_ranks=1)
        overheads = 2 * 8 * 0.125 * (config.micro_batches - 1)
        assert step.makespan == pytest.approx(step.serial + overheads) == pytest.approx(8 * 4.75 + overheads)
        assert step.idle_share == pytest.approx(0.0)
        assert step.bytes_moved == 0.0


@pytest.mark.parametrize(("num_ranks", "micro_batches"), [(2, 1), (4, 4), (8, 3), (16, 16)])
def test_pipeline_without_split_weights_is_gpipe(num_ranks, micro_batches):
    """With weight gradients inside the final vjps; as tasks of their own they fill the second half of the bubble."""
    owner = contiguous_owner(48, num_ranks)
    config = LayerParallelConfig(micro_batches=micro_batches)
    textbook = gpipe(48, num_ranks, micro_batches).time
    time = 0.0
    for direction in ("forward", "backward"):
        whole = plan(config, direction, owner, num_ranks, micro_batches)
        tasks = tuple(t for t in whole.tasks if t.kind != "weights")
        fused = in_schedule_order(dataclasses.replace(whole, tasks=tasks, split_weights=False))
        time += simulate(fused, Costs().cut(micro_batches)).makespan
    assert time == pytest.approx(textbook)
    assert predict_step(config, owner, num_ranks=num_ranks).makespan < textbook


def test_cutting_costs():
    cut = dataclasses.replace(COSTS, fixed_share=0.2).cut(4)
    assert cut.step == pytest.approx(0.2 + 0.8 / 4)
    assert (cut.state_bytes, cut.graph_bytes) == (0.5, 2.5)
    assert (cut.overhead, cut.latency, cut.send) == (0.125, 0.5, 0.25)
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


class _OneRank(LocalCommunicator):
    """Plays all other ranks to one of them: whatever it waits for is there."""

    size = 3

    def __init__(self, rank):
        self.rank = rank

    def send(self, tensor, target): ...

    def receive(self, tensor, source): ...

    def wait(self, handle): ...


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("owner", [(0,) * 4 + (1,) * 4 + (2,) * 4, (0, 1, 2) * 4], ids=["blocks", "dealt"])
@pytest.mark.parametrize("config", [LayerParallelConfig(), MGRIT], ids=["pipeline", "mgrit"])
def test_peak_states_are_what_the_executor_holds(config, owner, direction, monkeypatch):
    """Counts the states alive in the executor whenever it has got or made another one."""
    alive, counts = weakref.WeakSet(), []

    def noting(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            alive.add(tensor)
            counts.append(len(alive))
            return tensor

        return made

    monkeypatch.setattr(executor.torch, "empty_like", noting(torch.empty_like))
    monkeypatch.setattr(executor, "_combine", noting(executor._combine))
    evaluate = Evaluator(
        step=noting(lambda layer, micro_batch, x, final: x.clone()),
        weights=lambda layer, micro_batch: None,
        fit=noting(lambda span, x: x.clone()),
        observe=lambda span, micro_batch, start, end: None,
    )
    whole = plan(config, direction, owner, 3, 2)
    for rank, peak in enumerate(simulate(whole).peaks):
        counts.clear()
        part = RankPart.of(whole, rank)
        executor.execute(part, [torch.zeros(2), torch.zeros(2)], evaluate, _OneRank(rank))
        # the loop's own variables hold on to the last made and received state and to the two of the last residual
        assert peak.states <= max(counts) <= peak.states + 4


def test_kept_graphs():
    """The forward fills up, the backward empties; bytes count both states and graphs."""
    step = predict_step(LayerParallelConfig(micro_batches=4), contiguous_owner(12, 3), COSTS, num_ranks=3)
    for peaks in (step.forward.peaks, step.backward.peaks, step.peaks):
        assert [p.graphs for p in peaks] == [16, 16, 16]
    for peak in step.forward.peaks:
        assert 16 * 2.5 <= peak.bytes <= 16 * 2.5 + peak.states * 0.5


@pytest.mark.parametrize(
    ("settings", "num_layers", "num_ranks", "interleaved", "gain"),
    [  # (how much shorter the best of the three rules is than the first one, forward and backward together)
        ({"coarse_operator": "identity", "coarsening": 8, "forward_iterations": 2}, 128, 32, False, 0.05),
        ({"coarse_operator": "rediscretize", "coarsening": 8, "forward_iterations": 3}, 128, 32, False, 0.05),
        ({"coarse_operator": "aggregate", "coarsening": 8}, 128, 32, True, 0.10),
    ],
)
def test_several_priority_rules_shorten_the_schedule(settings, num_layers, num_ranks, interleaved, gain):
    config = LayerParallelConfig(strategy="mgrit", micro_batches=8, **settings)
    owner = contiguous_owner(num_layers, num_ranks)
    if interleaved:
        owner = tuple(n % num_ranks for n in range(num_layers))
    plans = [plan(config, direction, owner, num_ranks, 8) for direction in ("forward", "backward")]

    def time(rules):
        return sum(simulate(in_schedule_order(p, priorities=rules)).makespan for p in plans)

    assert time(PRIORITIES) <= (1 - gain) * time([earliest_micro_batch])
    for rule in PRIORITIES:
        assert time(PRIORITIES) <= time([rule])


def test_every_rule_gives_a_valid_order():
    for rule, direction in itertools.product(PRIORITIES, ("forward", "backward")):
        ordered = in_schedule_order(plan(MGRIT, direction, (0, 1, 2) * 4, 3, 2), COSTS, [rule])
        ordered.validate()


@pytest.mark.parametrize(
    ("config", "num_layers", "num_ranks"),
    [
        (LayerParallelConfig(micro_batches=16), 128, 128),
        (LayerParallelConfig(strategy="mgrit", coarse_operator="rediscretize", micro_batches=16), 128, 128),
        (LayerParallelConfig(strategy="mgrit", coarse_operator="rediscretize", coarsening=64), 4096, 4096),
    ],
    ids=["pipeline 128", "mgrit 128", "mgrit 4096"],
)
def test_large_plans_are_simulated(config, num_layers, num_ranks):
    step = predict_step(config, contiguous_owner(num_layers, num_ranks), num_ranks=num_ranks)
    assert len(step.peaks) == num_ranks
    assert step.share < 1
