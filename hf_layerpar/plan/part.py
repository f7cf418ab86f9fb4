"""A plan as one rank sees it: its tasks, and when it posts its sends, receives and all-reduces.

A transport may work a rank's posts strictly one after the other, each until its peer has reached it too, and match them
without tags (NCCL does, on one stream; a communicator that is made at its first message even holds up the program). No
order that the ranks choose for themselves is safe there. So all posts of a step have one order for all ranks: that of
`Plan.traffic`, in which everything comes after what it depends on, and each rank posts its share of it in that order.
Take the first of them that isn't through: all before it are, so both its ranks have come to it, and its sender can't be
waiting for anything behind it. `check_rendezvous` plays that through.

For example, rank 1 makes v5 for rank 2 and then works a task on v7, which comes from rank 0 and was made after v5:

    works what makes v5; posts its send; posts the receive of v7, though its buffer has been free for long; works on
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Literal

from hf_layerpar.plan.tasks import Message, Plan, Task

LOOK_AHEAD = 4
"""Receives and all-reduces are posted so many tasks before the one that needs them: early enough to travel beside work,
late enough that few buffers are held."""


@dataclass(frozen=True, slots=True)
class Post:
    """What a rank tells its transport to do. peer: of a send or receive, the other rank."""

    kind: Literal["send", "receive", "reduce"]
    value: int
    peer: int = -1


@dataclass(frozen=True)
class RankPart:
    """A plan as one rank sees it, worked out once and run many times.

    groups: the rank's tasks, those of a wave together.
    posts: what is posted before groups[i], and behind the last one.
    contributes: value of this rank -> the all-reduces that it is a term of.
    fetch: values to have in the end.
    dead_after: values that groups[i] is the last to need. leaves_after: (pass, micro-batch) that it is the last of.
    split_runs: (pass, micro-batch, lowest layer) of the final steps whose weight gradients are taken apart.
    """

    plan: Plan
    rank: int
    groups: tuple[tuple[Task, ...], ...]
    posts: tuple[tuple[Post, ...], ...]
    contributes: dict[int, tuple[int, ...]]
    fetch: tuple[int, ...]
    dead_after: tuple[tuple[int, ...], ...]
    leaves_after: tuple[tuple[tuple[int, int], ...], ...]
    split_runs: frozenset[tuple[int, int, int]]

    @classmethod
    def of(cls, plan: Plan, rank: int, tasks: Sequence[Task] | None = None, fetch: Sequence[int] = ()) -> RankPart:
        """tasks: those of the plan to work, of all ranks, in this order; all by default. Then values that others of the
        tasks make are sent by who makes them. fetch: values to have in the end."""
        groups = [group for group in plan.groups() if group[0].rank == rank]
        terms: set[int] = set()  # that some rank makes now: all ranks have a part in their sums
        if tasks is not None:
            groups = [(task,) for task in tasks if task.rank == rank]
            terms = {value for task in tasks for value in task.outputs}
        needed: dict[int, int] = {}
        last: dict[int, int] = {}
        made: dict[int, int] = {}
        leaves: dict[tuple[int, int], int] = {}
        entered: dict[tuple[int, int], int] = {}
        for i, group in enumerate(groups):
            for task in group:
                for value in task.inputs:
                    needed.setdefault(value, i)
                last |= dict.fromkeys((*task.inputs, *task.outputs), i)
                made |= dict.fromkeys(task.outputs, i)
                if tasks is None:
                    leaves[task.place, task.micro_batch] = i
                if task.kind == "phase" and task.direction == "forward":
                    entered[task.place, task.micro_batch] = i
        for value in fetch:
            needed.setdefault(value, len(groups))

        # every post with the first place where it may stand, the one where it would best, and the last one
        queue: list[tuple[Post, int, int, int]] = []
        for entry in plan.traffic:
            value, end = entry.value, needed.get(entry.value, len(groups))
            like = plan.values[value]
            # not before the phase that tells the shapes
            known = min(entered.get((like.place, like.micro_batch), -1) + 1, end)
            wish = max(end - LOOK_AHEAD, known)
            if isinstance(entry, Message):
                if entry.source == rank and value in made:
                    there = made[value] + 1
                    queue.append((Post("send", value, entry.target), there, there, there))
                elif entry.target == rank and value in needed:
                    queue.append((Post("receive", value, entry.source), 0, wish, end))
            elif tasks is None or not terms.isdisjoint(entry.terms):
                there = max((made[term] + 1 for term in entry.terms if term in made), default=0)
                queue.append((Post("reduce", value), there, wish if value in needed else there, end))
        posts: list[list[Post]] = [[] for _ in range(len(groups) + 1)]
        latest = list(accumulate((end for *_, end in reversed(queue)), min))[::-1]  # in time for all behind it, too
        at = 0
        for (post, first, wish, _), limit in zip(queue, latest, strict=True):
            at = max(at, first, min(wish, limit))
            posts[at].append(post)

        dead: list[list[int]] = [[] for _ in groups]
        for value, i in last.items():
            dead[i].append(value)
        gone: list[list[tuple[int, int]]] = [[] for _ in groups]
        for key, i in leaves.items():
            gone[i].append(key)
        contributes: dict[int, tuple[int, ...]] = {}
        for reduction in plan.reductions:
            for term in reduction.terms:
                if term in made:
                    contributes[term] = (*contributes.get(term, ()), reduction.value)
        return cls(
            plan,
            rank,
            tuple(groups),
            tuple(map(tuple, posts)),
            contributes,
            tuple(fetch),
            tuple(map(tuple, dead)),
            tuple(map(tuple, gone)),
            frozenset((t.place, t.micro_batch, min(t.layers)) for t in plan.tasks if t.kind == "weights"),
        )


def check_rendezvous(plan: Plan, parts: Sequence[RankPart] | None = None, *, blocking: bool = False) -> None:
    """Plays the ranks' parts through on the strictest of transports: each rank's posts are worked one after the other,
    a message only when it is the next post of both its ranks, an all-reduce when it is that of all.

    blocking: a rank's program goes on only when what it posted is through (as while communicators are made); else it
    goes on, and waits where it needs what it receives.
    Raises RuntimeError that tells what every rank waits for where they wait for ever, or where messages are crossed.
    """
    parts = [RankPart.of(plan, rank) for rank in range(plan.num_ranks)] if parts is None else parts
    queues: list[deque[Post]] = [deque() for _ in parts]
    arrived: list[set[int]] = [set() for _ in parts]
    programs = [_program(part, queue, here, blocking) for part, queue, here in zip(parts, queues, arrived, strict=True)]
    ended = [False] * len(parts)
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            steps = 0
            while not ended[rank] and (said := next(program, None)) is not False:
                ended[rank] = said is None
                steps += 1
            moved |= steps > 0
        for rank, queue in enumerate(queues):
            while queue and _meets(rank, queue[0], queues):
                post = queue[0]
                ranks = range(len(parts)) if post.kind == "reduce" else (rank, post.peer)
                for r in ranks:
                    arrived[r].add(queues[r].popleft().value)
                moved = True
    if not all(ended) or any(queues):
        heads = {rank: queue[0] for rank, queue in enumerate(queues) if queue}
        raise RuntimeError(f"the ranks wait for each other: next in line are {heads}")


def _program(part: RankPart, queue: deque[Post], arrived: set[int], blocking: bool) -> Iterator[bool]:
    """True for every task worked, False while it waits."""
    foreign = {post.value for post in chain(*part.posts) if post.kind != "send"}
    for i, posts in enumerate(part.posts):
        for post in posts:
            queue.append(post)
            while blocking and queue:
                yield False
        for task in part.groups[i] if i < len(part.groups) else ():
            while not foreign.intersection(task.inputs) <= arrived:
                yield False
            yield True


def _meets(rank: int, post: Post, queues: Sequence[deque[Post]]) -> bool:
    """Whether the peers have come to it too. Raises RuntimeError where they mean something else by it."""
    if post.kind == "reduce":
        heads = [queue[0] if queue else None for queue in queues]
        if any(head is None or head.kind != "reduce" for head in heads):
            return False
        if any(head != post for head in heads):
            raise RuntimeError(f"the ranks mean different all-reduces: {heads}")
        return True
    other = queues[post.peer][0] if queues[post.peer] else None
    if other is None or other.peer != rank or {post.kind, other.kind} != {"send", "receive"}:
        return False
    if other.value != post.value:
        raise RuntimeError(f"messages are crossed: rank {rank} means {post}, rank {post.peer} {other}")
    return True
