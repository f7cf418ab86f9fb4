"""Messages: on the strictest of transports, after an error half way, and what errors are called."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError, PeerLostError
from hf_layerpar.plan.ownership import interleaved_owner, two_blocks_owner
from hf_layerpar.run.transport import GroupTransport, peer_loss
from tests.multiproc import run_ranks
from tests.problems import assert_same, blocks, gradients_of, state
from tests.serialised import SerialisedTransport

LAYERS = 12
SETTINGS = [
    *({"schedule": s, "micro_batches": 4} for s in ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v", "list")),
    *(
        {"strategy": "mgrit", "coarse_operator": o, "coarsening": 3, "relaxation": r, "micro_batches": m}
        | {"forward_iterations": f, "backward_iterations": b}
        for o in ("rediscretize", "aggregate", "identity")
        for r, f, b, m in (("F", 1, 1, 1), ("FCF", 2, 3, 2))
    ),
]


def serialised(owner):
    """The settings whose results differ from those on an ordinary transport."""
    layers, x, side = blocks(LAYERS, dropout=0.1).train(), state(batch=5), state(batch=5, seed=4)
    transport = SerialisedTransport(dist.group.WORLD)
    for settings in SETTINGS:
        config = LayerParallelConfig(**settings)
        expected = gradients_of(config, layers, x, side, owner=owner, seed=3)
        with patch("tests.problems.world", return_value=transport):
            found = gradients_of(config, layers, x, side, owner=owner, seed=3)
        assert_same(found.results, expected.results, bound=1e-12)  # gloo may sum in another order
    transport.agree({"through": True})


@pytest.mark.parametrize(
    ("num_ranks", "owner"),
    [
        (2, None),
        (3, None),
        (2, two_blocks_owner(LAYERS, 2, "v")),
        (3, two_blocks_owner(LAYERS, 3, "interleaved")),
        (3, interleaved_owner(LAYERS, 3, range(0, LAYERS + 1, 3))),
        (4, interleaved_owner(LAYERS, 4, range(0, LAYERS + 1, 3))),
    ],
)
def test_nothing_hangs_where_posts_are_worked_one_after_the_other(num_ranks, owner):
    run_ranks(serialised, num_ranks, owner)


def broken_off():
    """What a rank is told that goes on after an error half way through a step."""
    transport = GroupTransport(dist.group.WORLD)
    transport.agree({"ready": True})
    with pytest.raises(ZeroDivisionError), transport.unbroken():
        _ = 1 / 0
    told = []
    for attempt in (
        lambda: transport.agree({"ready": True}),
        lambda: transport.all_reduce(torch.zeros(1)),
        lambda: transport.unbroken().__enter__(),
    ):
        with pytest.raises(PeerLostError) as caught:
            attempt()
        told.append(str(caught.value))
    return told


def test_after_an_error_half_way_nothing_is_taken_for_something_else():
    for rank, told in enumerate(run_ranks(broken_off, 2)):
        for text in told:
            assert f"an earlier step of lp rank {rank} broke off half way (ZeroDivisionError: division by zero)" in text
            assert "restart all ranks" in text


def named(error):
    """What `peer_loss` makes of an error."""
    try:
        with peer_loss("a test"):
            raise error
    except Exception as caught:
        return type(caught).__name__


def names():
    return [
        named(error)
        for error in (
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("CUDA error: device-side assert triggered"),
            dist.DistBackendError("NCCL error: unhandled cuda error, out of memory"),
            dist.DistBackendError("NCCL communicator was aborted"),
            RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
        )
    ]


def test_errors_keep_their_names():
    expected = ["OutOfMemoryError", "RuntimeError", "DistBackendError", "PeerLostError", "PeerLostError"]
    assert run_ranks(names, 2) == [expected, expected]


def to_another_device():
    with pytest.raises(ConfigurationError) as caught:
        GroupTransport(dist.group.WORLD).open([(0, 1)], torch.device("cuda"))
    return str(caught.value)


def test_a_group_that_can_not_carry_a_device_is_refused():
    for text in run_ranks(to_another_device, 2):
        assert "cpu:gloo,cuda:nccl" in text


def alone():
    """A group of one process says nothing: its backend may have no host tensors."""
    if begun := not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    transport = GroupTransport(dist.group.WORLD)
    with (
        patch.object(dist, "all_gather", side_effect=AssertionError),
        patch.object(dist, "all_gather_object", side_effect=AssertionError),
    ):
        transport.agree({"ready": True})
        transport.agree_in_common({"a": 1})
        assert transport.any_of("this", [True, False]) == [True, False]
        with pytest.raises(ValueError, match="mine"):
            transport.agree({"ready": True}, ValueError("mine"))
    if begun:
        dist.destroy_process_group()


def test_a_group_of_one_process_compares_nothing():
    run_ranks(alone, 1)
