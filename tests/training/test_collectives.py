"""Sharing, averaging and gathering over a group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import BatchEncoding

from hf_layerpar.errors import ConfigurationError
from hf_layerpar.run.mesh import Mesh, build_mesh, check_lp_size
from hf_layerpar.run.sharing import share
from hf_layerpar.training import collectives
from tests.multiproc import RankPool


def _places() -> tuple[Any, ...]:
    mesh = build_mesh(2)
    assert mesh.dp_group is not None
    assert mesh.lp_group is not None
    members = [dist.get_process_group_ranks(group) for group in (mesh.dp_group, mesh.lp_group)]
    return mesh.dp_size, mesh.lp_size, mesh.dp_rank, mesh.lp_rank, *members


def test_mesh(ranks4: RankPool) -> None:
    assert ranks4.run(_places) == [
        (2, 2, 0, 0, [0, 2], [0, 1]),
        (2, 2, 0, 1, [1, 3], [0, 1]),
        (2, 2, 1, 0, [0, 2], [2, 3]),
        (2, 2, 1, 1, [1, 3], [2, 3]),
    ]
    assert build_mesh(1) == Mesh()


@pytest.mark.parametrize(
    ("world", "lp_size", "message"),
    [(4, 3, r"lp_size in \[1, 2, 4\] or start 3 or 6"), (2, 4, "start 4 processes"), (2, True, "lp_size=True")],
)
def test_mesh_errors(world: int, lp_size: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_lp_size(world, lp_size)


def _shared(source: int) -> dict[str, Any]:
    mine = dist.get_rank() == source
    tensor = torch.arange(6).view(2, 3).t()  # not contiguous
    batch = BatchEncoding({"input_ids": tensor, "again": tensor, "empty": torch.empty(0, 4)})
    value = [{"batch": batch, "text": "a", "flag": torch.tensor(True), "half": torch.ones(2, dtype=torch.bfloat16)}]
    group = dist.group.WORLD
    assert group is not None
    result = share(value if mine else None, group, torch.device("cpu"), source)[0]
    got = result["batch"]
    same = got["input_ids"] is got["again"] and isinstance(got, BatchEncoding)
    ids = got["input_ids"].tolist()
    return {
        "ids": ids,
        "same": same,
        "text": result["text"],
        "flag": bool(result["flag"]),
        "half": str(result["half"].dtype),
        "empty": tuple(got["empty"].shape),
    }


@pytest.mark.parametrize("source", [0, 2])
def test_share(source: int, ranks3: RankPool) -> None:
    expected = {
        "ids": [[0, 3], [1, 4], [2, 5]],
        "same": True,
        "text": "a",
        "flag": True,
        "half": "torch.bfloat16",
        "empty": (0, 4),
    }
    assert ranks3.run(_shared, source) == [expected] * 3


def _averaged() -> tuple[list[Any], int]:
    rank = dist.get_rank()
    sizes = [(3, 2), (5,), (1,), (4,), (2, 2)]
    params = [
        nn.Parameter(torch.zeros(size, dtype=torch.float64 if i == 3 else torch.float32))
        for i, size in enumerate(sizes)
    ]
    for i, parameter in enumerate(params[:4]):
        if not (i == 1 and rank == 0):  # unused on one rank; the last one is unused on all
            parameter.grad = torch.full_like(parameter, float(rank + i))
    calls = []
    original = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    before = collectives.BUCKET_BYTES, collectives._UNDER_WAY
    collectives.BUCKET_BYTES, collectives._UNDER_WAY = 40, 2
    group = dist.group.WORLD
    assert group is not None
    try:
        collectives.average_gradients(params, group)
    finally:
        dist.all_reduce = original
        collectives.BUCKET_BYTES, collectives._UNDER_WAY = before
    return [None if p.grad is None else p.grad.flatten().tolist() for p in params], len(calls)


def test_average_gradients_in_buckets(ranks2: RankPool) -> None:
    for grads, calls in ranks2.run(_averaged):
        assert grads == [[0.5] * 6, [1.0] * 5, [2.5], [3.5] * 4, None]
        assert calls == 1 + 3  # which are used; 24 + 20 bytes, 4 bytes, and the double ones apart


def _averaged_beside_a_backward() -> tuple[list[int], list[Any]]:
    """The all-reduces that were started after each layer was done, and the gradients in the end."""
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    layers = {layer: [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(6))] for layer in ((0, 1), (0, 0))}
    shared = layers[0, 1][0]
    last = nn.Parameter(torch.zeros(3))
    before, collectives.BUCKET_BYTES = collectives.BUCKET_BYTES, 16
    try:
        average = collectives.GradientAverage([*layers.items(), ((0, 0), [shared]), (None, [last])], group)
    finally:
        collectives.BUCKET_BYTES = before
    started, original = [], dist.all_reduce
    calls: list[int] = []
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    try:
        for layer in ((0, 1), (0, 0)) if rank == 0 else ((0, 0), (0, 1)):  # plans of dp ranks may differ
            for parameter in layers[layer]:
                parameter.grad = torch.full_like(parameter, float(rank + layer[1]))
            average.done(layer)
            started.append(len(calls))
        last.grad = None if rank else torch.ones_like(last)
        average.finish()
    finally:
        dist.all_reduce = original
    found = [*layers[0, 1], *layers[0, 0], last]
    return started, [None if p.grad is None else p.grad.tolist() for p in found]


def test_averaging_beside_a_backward(ranks2: RankPool) -> None:
    (first, grads), (second, others) = ranks2.run(_averaged_beside_a_backward)
    assert grads == others == [[1.5] * 4, [1.5] * 6, [0.5] * 4, [0.5] * 6, [0.5] * 3]
    # what both layers have part in is first, so nothing starts before they are done; then all but what comes last
    assert first == second == [0, 4]


def _gathered() -> Any:
    rank = dist.get_rank()
    group = dist.group.WORLD
    assert group is not None
    data = {"rows": torch.full((2, 1), rank), "scalar": torch.tensor(rank)}
    return {name: value.tolist() for name, value in collectives.gather_rows(data, group).items()}


def test_gather_rows(ranks2: RankPool) -> None:
    assert ranks2.run(_gathered) == [{"rows": [[0], [0], [1], [1]], "scalar": [0, 1]}] * 2
