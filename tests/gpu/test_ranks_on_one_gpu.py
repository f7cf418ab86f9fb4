"""Several ranks on one GPU. NCCL refuses two of them on one device by host and bus, so each has a host of its own."""

from __future__ import annotations

import os

import pytest
import torch

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.plan.ownership import interleaved_owner, two_blocks_owner
from tests.multiproc import RankPool
from tests.problems import blocks, gradients_of, relative, serial_results, state
from tests.training import runs

pytestmark = pytest.mark.gpu

LAYERS = 12
EXACT = [{"schedule": s, "micro_batches": 3} for s in ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v", "list")]
MGRIT = [  # as many iterations as make it exact
    {"strategy": "mgrit", "coarse_operator": o, "coarsening": 3, "relaxation": r, "micro_batches": 2}
    | {"forward_iterations": 4, "backward_iterations": 4}
    for o in ("rediscretize", "aggregate", "identity")
    for r in ("F", "FCF")
]
DEALT = {n: interleaved_owner(LAYERS, n, range(0, LAYERS + 1, 3)) for n in (2, 3, 4)}
TWO_BLOCKS = {n: two_blocks_owner(LAYERS, n, "v") for n in (2, 3, 4)}


def pool(num_ranks: int, device: str, *, eager: bool = False) -> RankPool:
    if device == "cpu":
        return RankPool(num_ranks)
    alone = {"NCCL_HOSTID": "host{rank}", "NCCL_SOCKET_IFNAME": "lo", "LOCAL_RANK": "0"}
    return RankPool(num_ranks, alone, backend="cpu:gloo,cuda:nccl", device="cuda:0" if eager else None)


def errors(device: str, owner, settings) -> list[float]:
    """How far this rank's gradients are from the serial ones, for each of the settings."""
    layers, x = blocks(LAYERS).to(device), state(batch=6).detach().to(device).requires_grad_()
    exact = serial_results(layers, x)
    found = []
    for each in settings:
        results = gradients_of(LayerParallelConfig(**each), layers, x, owner=owner).results
        found.append(max(relative(results[name], exact[name]) for name in results))
    return found


@pytest.mark.parametrize("eager", [False, True], ids=["lazily", "device_id"])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_every_setting_and_split_equals_serial(num_ranks, eager, device):
    ranks = pool(num_ranks, device, eager=eager)
    try:
        for owner, settings in ((None, EXACT + MGRIT), (TWO_BLOCKS[num_ranks], EXACT), (DEALT[num_ranks], MGRIT)):
            for found in ranks.run(errors, device, owner, settings, timeout=240.0):
                assert max(found) < 1e-10, (owner, found)
    finally:
        ranks.close()


def train(folder: str, settings: dict) -> dict:
    if torch.cuda.is_available() and not settings["use_cpu"]:
        torch.cuda.set_device(0)
    return runs.train(os.path.join(folder, str(settings["lp_size"])), "llama", settings)


@pytest.mark.parametrize(("num_ranks", "lp_size"), [(4, 2), (4, 4)])
def test_the_trainer_on_several_ranks(num_ranks, lp_size, device, tmp_path):
    settings = {"max_steps": 4, "use_cpu": device == "cpu", "dropout": 0.0}
    dp_size = num_ranks // lp_size
    batch = {"per_device_train_batch_size": 8 // dp_size}
    alone, many = pool(1, device), pool(num_ranks, device)
    try:
        one = alone.run(train, str(tmp_path), settings | {"lp_size": 1, "per_device_train_batch_size": 8})[0]
        found = many.run(train, str(tmp_path), settings | {"lp_size": lp_size} | batch, timeout=240.0)
    finally:
        alone.close()
        many.close()
    for rank in found:
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-4)
