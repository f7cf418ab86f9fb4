"""What the first rank does for all: once, with a failure that everybody hears of, however long it takes."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from hf_layerpar.errors import HubError
from hf_layerpar.run import first_rank
from tests.multiproc import outcomes_of_ranks, run_ranks

CPU = torch.device("cpu")


def slowly() -> list:
    first_rank.BEAT_SECONDS = 0.02
    calls, heard = [], []

    def work() -> int:
        time.sleep(0.2)
        calls.append(dist.get_rank())
        return 42

    def fail() -> None:
        raise OSError("disk full")

    heard.append(first_rank.on_first_rank(work, "the work", dist.group.WORLD, CPU))
    try:
        first_rank.on_first_rank(fail, "the work", dist.group.WORLD, CPU)
    except (OSError, HubError) as error:
        heard.append(f"{type(error).__name__}: {error}")
    return [calls, *heard]


def test_one_works_and_all_know_how_it_ended() -> None:
    first, second = run_ranks(slowly, 2)
    assert first == [[0], 42, "OSError: disk full"]
    assert second == [[], None, "HubError: world rank 0 failed at the work: OSError: disk full"]


def dying() -> None:
    def die() -> None:
        import os

        os._exit(3)

    first_rank.on_first_rank(die, "the work", dist.group.WORLD, CPU)


def test_a_first_rank_that_dies_ends_the_others() -> None:
    first, second = outcomes_of_ranks(dying, 2, timeout=60)
    assert first == "exit code 3"
    assert "PeerLostError" in second


def test_without_a_group_it_is_a_call() -> None:
    assert first_rank.on_first_rank(lambda: 7, "the work", None, CPU) == 7
