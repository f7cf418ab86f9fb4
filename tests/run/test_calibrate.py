"""Measured unit costs: of layers whose time is known, and over two ranks."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_layerpar.run.calibrate import calibrate
from hf_layerpar.run.transport import GroupTransport
from tests.multiproc import run_ranks
from tests.problems import Call, blocks, calls_of, state


class Clock:
    """Moves when it is told to."""

    seconds = 0.0

    def __call__(self, work, device):
        before = self.seconds
        work()
        return self.seconds - before


class Ticking(torch.autograd.Function):
    """The identity, which takes so long forward and as long backward."""

    @staticmethod
    def forward(ctx, x, clock, seconds):
        ctx.clock, ctx.seconds = clock, seconds
        clock.seconds += seconds
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.seconds += ctx.seconds
        return grad, None, None


class Timed(nn.Module):
    """Takes `seconds`, and `per_row` more for each row of the batch."""

    def __init__(self, clock, seconds, per_row):
        super().__init__()
        self.weight, self.clock, self.seconds, self.per_row = nn.Parameter(torch.ones(())), clock, seconds, per_row

    def forward(self, x):
        return Ticking.apply(x, self.clock, self.seconds + self.per_row * len(x)) * self.weight


@pytest.mark.parametrize(("seconds", "per_row", "fixed_share"), [(4.0, 0.0, 1.0), (0.0, 1.0, 0.0), (3.0, 0.25, 0.75)])
def test_known_times(monkeypatch, seconds, per_row, fixed_share):
    clock, x = Clock(), state(batch=4)
    monkeypatch.setattr("hf_layerpar.run.calibrate.seconds_of", clock)
    calls = [Call(Timed(clock, seconds, per_row)) for _ in range(3)]
    costs = calibrate(calls, x, part=(calls, x[:1]), seconds=0.01)
    assert costs == dataclasses.replace(
        costs, step=4.0, graph_step=4.0, vjp=4.0, final_vjp=4.0, weights=0.0, overhead=0.0, latency=0.0, send=0.0
    )
    assert costs.fixed_share == pytest.approx(fixed_share)
    assert calibrate(calls, x, seconds=0.01).fixed_share == 0.0  # nothing was measured at fewer rows


def test_every_price_is_measured():
    x = state(batch=4, tokens=16, dim=32)
    costs = calibrate(calls_of(blocks(12, dim=32)), x, seconds=0.1)
    names = ("step", "graph_step", "vjp", "final_vjp", "combine", "residual", "overhead")
    assert all(getattr(costs, name) > 0 for name in names)
    assert costs.weights >= 0
    assert costs.overhead < costs.step
    assert (costs.front, costs.front_backward, costs.tail, costs.arguments) == (0, 0, 0, 0)
    assert costs.state_bytes == 4 * 16 * 32 * 8
    # the input, the inner linear's result or its tanh, and the result, at least; no weights (32 * 32 * 8 bytes each)
    assert 3 * costs.state_bytes <= costs.graph_bytes <= 6 * costs.state_bytes


def test_only_own_layers_are_evaluated_and_nothing_is_left_behind():
    layers, x = blocks(6, dropout=0.5).train(), state(batch=2)
    side = state(batch=2, seed=3)
    before = torch.ones_like(layers[3].inner.weight)
    layers[3].inner.weight.grad = before
    torch.manual_seed(3)
    calls = [Call(layer if n % 2 else nn.Identity(), (side * 2,)) for n, layer in enumerate(layers)]
    part = [Call(call.layer, (call.args[0][:1],)) for call in calls]
    calibrate(calls, x, layers=[1, 3, 5], part=(part, x[:1]), seconds=0.01)
    after = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(()))
    assert layers[3].inner.weight.grad is before
    assert torch.equal(before, torch.ones_like(before))
    assert all(p.grad is None for p in layers.parameters() if p is not layers[3].inner.weight)
    assert x.grad is None
    assert side.grad is None


def test_at_most_eight_layers_are_sampled_evenly():
    seen = []
    layers = blocks(32)
    for n, layer in enumerate(layers):
        layer.register_forward_hook(lambda module, args, output, n=n: seen.append(n))
    calibrate(calls_of(layers), state(), seconds=0.01)
    assert sorted(set(seen)) == list(range(0, 32, 4))


def test_weights_keep_their_gradients_under_autocast():
    """A cast that an evaluation without graph cached would lose them, and their time."""
    layers, x = blocks(2).float(), state().detach().float()
    counted = []
    layers[0].inner.weight.register_hook(lambda grad: counted.append(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calibrate(calls_of(layers), x, seconds=0.01)
    assert len(counted) >= 4  # of the backwards in one


def _calibrate_on_a_rank(with_ends):
    transport = GroupTransport(dist.group.WORLD)
    layers, x = blocks(4, dim=16), state(batch=2, tokens=32, dim=16)
    calls, ends = calls_of(layers), None
    if with_ends:  # each is measured on the rank that has it
        first, last = transport.rank == 0, transport.rank == transport.size - 1

        def ends():
            return 3.0 * first, 4.0 * first, 5.0 * last, 1.0 + transport.rank

    own = [n for n in range(4) if n % transport.size == transport.rank]
    return calibrate(calls, x, transport, layers=own, part=(calls, x[:1]), ends=ends, seconds=0.05)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_agree_and_time_their_messages(num_ranks):
    for with_ends in (False, True):
        every = run_ranks(_calibrate_on_a_rank, num_ranks, with_ends)
        costs = every[0]
        assert all(other == costs for other in every)
        assert 0 < costs.latency < 1
        assert costs.bandwidth > 0
        assert costs.send > 0
        assert costs.state_bytes == 2 * 32 * 16 * 8
        assert min(costs.step, costs.graph_step, costs.vjp, costs.final_vjp, costs.overhead) > 0
        assert all(value >= 0 for value in dataclasses.asdict(costs).values())
        ends = (costs.front, costs.front_backward, costs.tail)
        assert ends == ((3.0, 4.0, 5.0) if with_ends else (0.0, 0.0, 0.0))
        assert costs.arguments == pytest.approx((num_ranks + 1) / 2 if with_ends else 0.0)  # a mean


def test_ends_on_one_rank():
    costs = calibrate(calls_of(blocks(2)), state(), ends=lambda: (3.0, 4.0, 5.0, 1.0), seconds=0.01)
    assert (costs.front, costs.front_backward, costs.tail, costs.arguments) == (3.0, 4.0, 5.0, 1.0)
