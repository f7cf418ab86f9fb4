"""Measured unit costs: of layers whose time is known, and over two ranks."""

import time

import pytest
import torch
from torch import nn

from hf_layerpar.errors import ConfigurationError
from hf_layerpar.run.calibrate import calibrate
from hf_layerpar.run.communicator import GroupCommunicator
from tests.multiproc import run_ranks
from tests.problems import Call, blocks, state


class Sleeper(nn.Module):
    """Takes `seconds`, and `per_row` more for each row of the batch."""

    def __init__(self, seconds, per_row=0.0):
        super().__init__()
        self.weight, self.seconds, self.per_row = nn.Parameter(torch.ones(())), seconds, per_row

    def forward(self, x, table=None):
        time.sleep(self.seconds + self.per_row * x.shape[0])
        return x * self.weight


def test_known_times():
    fixed = calibrate([Call(Sleeper(0.004)) for _ in range(3)], state(batch=4), seconds=0.1)
    rows = calibrate([Call(Sleeper(0.0, 0.001)) for _ in range(3)], state(batch=4), seconds=0.1)
    for costs in (fixed, rows):
        assert costs.step >= 0.004
        assert costs.graph_step >= 0.004
        assert costs.latency == 0.0
    assert fixed.fixed_share > 0.5 > rows.fixed_share  # the vjps, which don't sleep, and a busy machine blur it


def test_every_price_is_measured():
    layers, x = blocks(12, dim=32), state(batch=4, tokens=16, dim=32)
    costs = calibrate([Call(layer) for layer in layers], x, seconds=0.1)
    assert min(costs.step, costs.graph_step, costs.vjp, costs.final_vjp, costs.overhead) > 0
    assert costs.overhead < costs.step
    assert costs.state_bytes == 4 * 16 * 32 * 8
    # the input, the inner linear's result or its tanh, and the result, at least; no weights (32 * 32 * 8 bytes each)
    assert 3 * costs.state_bytes <= costs.graph_bytes <= 6 * costs.state_bytes


def test_only_own_layers_are_evaluated_and_nothing_is_left_behind():
    layers, x = blocks(6, dropout=0.5).train(), state(batch=2)
    torch.manual_seed(3)
    calls = [Call(layer if n % 2 else nn.Identity()) for n, layer in enumerate(layers)]
    calibrate(calls, x, layers=[1, 3, 5], seconds=0.01)
    after = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(()))
    assert all(p.grad is None for p in layers.parameters())
    assert x.grad is None


def test_arguments_that_can_not_be_cut():
    calls = [Call(Sleeper(0.0), (torch.ones(8, 1, 1),)) for _ in range(2)]
    with pytest.raises(ConfigurationError, match="use micro_batches=1"):
        calibrate(calls, state(batch=4), seconds=0.01)
    assert calibrate(calls, state(batch=4), seconds=0.01, micro_batches=1).fixed_share == 0.0


def _calibrate_on_a_rank():
    layers = blocks(4, dim=16)
    communicator = GroupCommunicator(torch.distributed.group.WORLD)
    x = state(batch=2, tokens=32, dim=16)
    return calibrate([Call(layer) for layer in layers], x, communicator, seconds=0.05)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree_and_time_their_messages(world):
    every = run_ranks(_calibrate_on_a_rank, world)
    assert all(costs == every[0] for costs in every)
    assert 0 < every[0].latency < 1
    assert every[0].bandwidth > 0
    assert every[0].send > 0
