"""Every strategy on 1, 2, 3 and 4 gloo ranks against the serial stack, and what happens when ranks disagree or die."""

import itertools
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import RankMismatchError
from hf_layerpar.plan.ownership import interleaved_owner
from tests.multiproc import outcomes_of_ranks, run_ranks
from tests.problems import blocks, engine, gradients, loss_of, serial, solve, state

LAYERS = 11  # a prime: no rank count divides it, and the last interval is shorter

SETTINGS = [
    {"strategy": "serial"},
    *({"strategy": "pipeline", "micro_batches": m} for m in (1, 2, 5)),
    *(
        {"strategy": "mgrit", "coarse_operator": o, "relaxation": r, "levels": lv, "coarsening": c}
        | {"forward_iterations": f, "backward_iterations": b, "micro_batches": m}
        for o in ("rediscretize", "aggregate", "identity", "mean", "linear")
        for r, lv, c, f, b, m in (
            ("F", 2, 3, 1, 1, 1),
            ("F", 2, 4, 2, 1, 3),
            ("FCF", 3, 2, 2, 2, 2),
            ("F", 2, 2, 0, 2, 1),  # exact forward, inexact adjoint
        )
    ),
    {"strategy": "pipeline", "micro_batches": 2, "increment_penalty": 0.5},
    {"strategy": "mgrit", "coarse_operator": "linear", "coarsening": 3, "micro_batches": 2, "increment_penalty": 0.5},
]


def every_setting(split=None, deal=None):
    """Per setting the own layers' and inputs' gradients, as plain numbers (dropout on)."""
    layers = blocks(LAYERS, dropout=0.2).train()
    x, side = state(batch=5), state(batch=5, seed=4)
    rank = dist.get_rank() if dist.is_initialized() else 0
    results = []
    for settings in SETTINGS:
        solver = engine(LayerParallelConfig(**settings), LAYERS, buffers=(1, 1), split=split, owner=deal)
        torch.manual_seed(3)
        own = [n for n in range(LAYERS) if solver.owner[n] == rank]
        params = {n: list(layers[n].parameters()) for n in own}
        for _ in range(2 if settings.get("coarse_operator") in ("mean", "linear") else 0):  # the fits learn
            gradients(solve(layers, x, solver, side), [x])
        y = solve(layers, x, solver, side)
        grads = gradients(y, [x, side, *itertools.chain(*params.values())])
        named = {"y": y, "x": grads[0], "side": grads[1]}
        named |= {f"{n}.{i}": g for (n, i), g in zip([(n, i) for n in own for i in range(4)], grads[2:], strict=True)}
        numbers = [*solver.report("backward").residuals, solver.report("forward").penalty or 0.0]
        results.append({k: v.detach().numpy() for k, v in named.items()} | {"report": numbers})
    return results


@pytest.fixture(scope="module")
def on_one_rank():
    return run_ranks(every_setting, 1)[0]


DEALT = {world: interleaved_owner(LAYERS, world, (1, 4, 7, 10), (1, 1)) for world in (2, 3, 4)}


@pytest.mark.parametrize(
    ("world", "split", "deal"),
    [*((n, None, None) for n in (2, 3, 4)), (2, (3, 8), None), *((n, None, deal) for n, deal in DEALT.items())],
)
def test_gradients_do_not_depend_on_the_ranks(on_one_rank, world, split, deal):
    ranks = run_ranks(every_setting, world, split, deal)
    for i, settings in enumerate(SETTINGS):
        one = on_one_rank[i]
        assert {k for rank in ranks for k in rank[i]} == set(one)
        for rank in ranks:
            for name, value in rank[i].items():
                if name == "report":
                    assert value == pytest.approx(one[name], rel=1e-12)
                    continue
                a, b = torch.from_numpy(value), torch.from_numpy(one[name])
                # side gradients, and aggregate's increments, are summed per rank first, so in another order than on one
                # rank; all else is equal bit for bit: the same kernel on the same inputs, wherever it runs
                if name == "side" or settings.get("coarse_operator") == "aggregate":
                    assert float((a - b).norm() / b.norm()) < 1e-12, (settings, name)
                else:
                    assert torch.equal(a, b), (settings, name)


def test_serial_and_pipeline_equal_plain_torch(on_one_rank):
    """Bit for bit with one micro-batch. With more, weight gradients are sums over micro-batches, which rounds otherwise
    than one product over the whole batch (and masks are drawn per micro-batch, so dropout is off here)."""
    layers, x, side = blocks(LAYERS), state(batch=5), state(batch=5, seed=4)
    inputs = [x, side, *layers.parameters()]
    expected = gradients(serial(layers, x, side), inputs)
    for micro_batches in (1, 2, 5):
        config = LayerParallelConfig(micro_batches=micro_batches)
        grads = gradients(solve(layers, x, engine(config, LAYERS), side), inputs)
        for a, b in zip(grads, expected, strict=True):
            if micro_batches == 1:
                assert torch.equal(a, b)
            else:
                assert float((a - b).norm() / b.norm()) < 1e-14


def caught(batch_of_rank, seed_of_rank, error):
    rank = dist.get_rank()
    layers = blocks(4, dropout=0.1).train()
    torch.manual_seed(seed_of_rank[rank])
    try:
        solve(layers, state(batch=batch_of_rank[rank]), engine(LayerParallelConfig(), 4))
    except error as e:
        return str(e)
    return None


def test_ranks_with_different_batches_all_raise():
    for message in run_ranks(caught, 2, (4, 3), (0, 0), RankMismatchError):
        assert message is not None
        assert "'shape': [(4, 4, 6), (3, 4, 6)]" in message
        assert "same batch" in message


def test_ranks_with_different_random_streams_all_raise():
    for message in run_ranks(caught, 3, (4, 4, 4), (0, 0, 1), RankMismatchError):
        assert message is not None
        assert "'seed'" in message
        assert "torch.manual_seed" in message


def survive_a_kill():
    rank = dist.get_rank()
    layers, x = blocks(6), state()
    loss = loss_of(solve(layers, x, engine(LayerParallelConfig(), 6)))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    loss.backward()


def test_a_killed_rank_ends_the_others_with_a_clear_error():
    began = time.monotonic()
    outcomes = outcomes_of_ranks(survive_a_kill, 3)
    assert time.monotonic() - began < 60
    assert outcomes[1] == "exit code -9"
    for rank in (0, 2):
        assert "PeerLostError: rank" in outcomes[rank]
        assert "restart all ranks, from the last checkpoint" in outcomes[rank]
