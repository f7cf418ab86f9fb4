"""Steps on 1, 2, 3 and 4 gloo ranks against one rank, and what happens when ranks disagree or die."""

import dataclasses
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from hf_layerpar import LayerParallelConfig, convert_to_ode, layer_parallel, parallelize
from hf_layerpar.errors import RankMismatchError
from hf_layerpar.plan.ownership import contiguous_owner, interleaved_owner, two_blocks_owner
from hf_layerpar.plan.step import Anatomy, build_step
from hf_layerpar.run.transport import GroupTransport
from recipes.benchmarks.bare import BareStack
from tests import zoo
from tests.multiproc import outcomes_of_ranks, run_ranks
from tests.problems import blocks, calls_of, gradients_of, loss_of, relative, serial_results, state, world

LAYERS = 11  # a prime: no rank count divides it, and the last interval is shorter

SETTINGS = [
    *({"micro_batches": m} for m in (1, 2, 5, 8)),
    *({"schedule": s, "micro_batches": 3} for s in ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v")),
    *(
        {"strategy": "mgrit", "coarse_operator": o, "relaxation": r, "coarsening": c}
        | {"forward_iterations": f, "backward_iterations": b, "micro_batches": m}
        for o in ("rediscretize", "aggregate", "identity")
        for r, c, f, b, m in (
            ("F", 3, 1, 1, 1),
            ("F", 4, 2, 1, 3),
            ("FCF", (2, 2), 2, 2, 2),
            ("F", 2, 0, 2, 1),  # exact forward, inexact adjoint
        )
    ),
    *(
        {"strategy": "mgrit", "coarse_operator": o, "coarsening": c, "acceleration": "krylov", "relaxation": r}
        | {"forward_iterations": f, "backward_iterations": 3, "micro_batches": m, "increment_penalty": p}
        for o, c, r, f, m, p in (
            ("rediscretize", 2, "F", 0, 2, 0.0),
            ("aggregate", (2, 2), "FCF", 1, 1, 0.0),
            ("identity", 2, "F", 0, 1, 0.5),
        )
    ),
    {"micro_batches": 2, "increment_penalty": 0.5},
    {"strategy": "mgrit", "coarse_operator": "identity", "coarsening": 3, "micro_batches": 2, "increment_penalty": 0.5},
]

RECOMPUTED = [
    {"schedule": "zb_h1", "micro_batches": 3},
    {"strategy": "mgrit", "coarse_operator": "rediscretize", "coarsening": 3, "micro_batches": 2},
]


def every_setting(split=None, owner=None, num_layers=LAYERS, batch=5, buffers=(1, 5, 1)):
    """Per setting what this rank has: gradients, end state, residuals squared and penalty (dropout on)."""
    layers = blocks(num_layers, dropout=0.2).train()
    x, side = state(batch=batch), state(batch=batch, seed=4)
    results = []
    for settings, recompute in [*((s, False) for s in SETTINGS), *((s, True) for s in RECOMPUTED)]:
        config, how = LayerParallelConfig(**settings), {"split": split, "owner": owner, "buffers": buffers}
        solved = gradients_of(config, layers, x, side, **how, recompute=recompute, seed=3)
        tensors = {name: tensor.numpy() for name, tensor in solved.results.items()}
        squares = {key: found.tolist() for key, found in solved.outcome.residuals.items()}
        results.append((tensors, squares, solved.penalty or 0.0, solved.loss))
    return results


def owned(num_layers, owner, rank):
    names = {f"{n}.{p}" for n in range(num_layers) if owner[n] == rank for p in dict(blocks(1)[0].named_parameters())}
    return names | ({"x", "side"} if rank == owner[0] else set()) | ({"y"} if rank == owner[-1] else set())


def assert_like_one_rank(ranks, one, owner):
    for i, settings in enumerate([*SETTINGS, *RECOMPUTED]):
        tensors, squares, penalty, loss = one[i]
        for rank, found in enumerate(ranks):
            assert set(found[i][0]) == owned(len(owner), owner, rank), (settings, rank)
            for name, value in found[i][0].items():
                a, b = torch.from_numpy(value), torch.from_numpy(tensors[name])
                # aggregate's increments are summed per rank first, so in another order than on one rank; all else is
                # equal bit for bit: the same kernel on the same inputs, and sums in one order, wherever they run
                if settings.get("coarse_operator") == "aggregate":
                    assert relative(a, b) < 1e-12, (settings, name)
                else:
                    assert torch.equal(a, b), (settings, name)
        for key, expected in squares.items():
            sums = [sum(parts) for parts in zip(*(r[i][1][key] for r in ranks if key in r[i][1]), strict=True)]
            assert sums == pytest.approx(expected, rel=1e-11, abs=1e-28), (settings, key)
        assert sum(r[i][2] for r in ranks) == pytest.approx(penalty, rel=1e-12)
        assert sum(r[i][3] for r in ranks) == pytest.approx(loss, rel=1e-12)


@pytest.fixture(scope="module")
def on_one_rank():
    return run_ranks(every_setting, 1)[0]


DEALT = {world: interleaved_owner(LAYERS, world, (1, 4, 7, 10)) for world in (2, 3, 4)}


@pytest.mark.parametrize(
    ("num_ranks", "split", "owner"),
    [
        *((n, None, None) for n in (2, 3, 4)),
        (2, (3, 8), None),
        (3, (1, 9, 1), None),
        *((n, None, owner) for n, owner in DEALT.items()),
        (2, None, two_blocks_owner(LAYERS, 2, "interleaved")),
        (3, None, two_blocks_owner(LAYERS, 3, "v")),
    ],
)
def test_nothing_depends_on_the_ranks(on_one_rank, num_ranks, split, owner):
    ranks = run_ranks(every_setting, num_ranks, split, owner)
    assert_like_one_rank(ranks, on_one_rank, owner or contiguous_owner(LAYERS, num_ranks, split=split))


def test_a_layer_a_rank_and_a_batch_of_one():
    """No micro-batches to cut, no buffers, intervals of one layer at the end."""
    shape = (None, None, 4, 1, (0, 0))
    assert_like_one_rank(run_ranks(every_setting, 4, *shape), run_ranks(every_setting, 1, *shape)[0], (0, 1, 2, 3))


def called_and_stepped():
    """How far a call's gradients are from those of a step; this rank's gradients."""
    model, inputs = zoo.build("gpt2", layers=8)
    config = LayerParallelConfig(
        strategy="mgrit", coarsening=2, forward_iterations=0, backward_iterations=2, acceleration="krylov"
    )
    split = "interleaved" if world().size == 2 else None
    handle = parallelize(convert_to_ode(model.double().eval(), buffers=(0, 3, 0)), config, split=split)
    handle.train_step(inputs)
    stepped = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**inputs).loss.backward()
    called = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert called.keys() == stepped.keys()
    return max(relative(called[n], g) for n, g in stepped.items()), {n: g.numpy() for n, g in stepped.items()}


def test_exact_layers_between_and_krylov_in_a_model_on_any_ranks():
    ((error, expected),) = run_ranks(called_and_stepped, 1)
    assert error < 1e-12
    for num_ranks in (2, 3):
        results = run_ranks(called_and_stepped, num_ranks)
        assert {n for _, found in results for n in found} == set(expected)
        for error, found in results:
            assert error < 1e-12
            for name, grad in found.items():
                assert relative(torch.from_numpy(grad), torch.from_numpy(expected[name])) < 1e-10, name


def spread_tails():
    """How far gradients and loss are from the serial ones when every rank has a piece of the tail."""
    layers, x, transport = blocks(6), state(batch=7), world()
    anatomy = dataclasses.replace(Anatomy.of_stack(contiguous_owner(6, transport.size)), tail_pieces=transport.size)
    stack = BareStack(calls_of(layers), x, lambda y, rows: loss_of(y, rows, 7))
    stack.micro_batches = 2  # of 3 and 4 rows
    plan = build_step(LayerParallelConfig(micro_batches=2), anatomy, transport.size, 2)
    outcome = stack.step(plan, transport)
    expected = serial_results(layers, x)
    grads = {"x": x.grad, **{name: p.grad for name, p in layers.named_parameters()}}
    errors = [relative(grad, expected[name]) for name, grad in grads.items() if grad is not None]
    total = torch.tensor(float(sum(outcome.losses.values())), dtype=x.dtype)
    transport.all_reduce(total)
    return sorted(outcome.losses), max(errors), abs(float(total) - float(loss_of(expected["y"])))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_rank_has_a_piece_of_the_tail(num_ranks):
    for rank, (pieces, gradient_error, loss_error) in enumerate(run_ranks(spread_tails, num_ranks)):
        assert pieces == [(0, rank), (1, rank)]
        assert gradient_error < 1e-14
        assert loss_error < 1e-13


# ---- of a model: ranks that disagree
def parallel(**settings):
    """(model, batch of four rows)."""
    model, batch = zoo.build("gpt2")
    model = convert_to_ode(model.train())
    parallelize(model, LayerParallelConfig(**settings))
    return model, {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}


def mismatches():
    """What this rank is told when it does something else than the others, by what."""
    rank = dist.get_rank()
    model, batch = parallel(micro_batches=2)
    handle = layer_parallel(model)
    told = {}

    def attempt(name, act):
        torch.manual_seed(rank if name == "seed" else 0)
        try:
            act()
        except RankMismatchError as error:
            told[name] = str(error)

    shorter = {name: tensor[: 4 - rank] for name, tensor in batch.items()}
    attempt("rows", lambda: handle.train_step(shorter))
    attempt("seed", lambda: handle.train_step(batch))
    attempt("loss scale", lambda: handle.train_step(batch, scale=1.0 + rank))
    attempt("other rows", lambda: handle.train_step({n: t.roll(rank, 0) for n, t in batch.items()}))
    attempt("rows of a call", lambda: model(**{n: t.roll(rank, 0) for n, t in batch.items()}))
    embedded = {"labels": batch["labels"], "inputs_embeds": torch.randn(4, 12, 32)}
    other = embedded | {"inputs_embeds": embedded["inputs_embeds"].roll(rank, 0)}
    attempt("other floats", lambda: handle.train_step(other))
    last = embedded | {"inputs_embeds": embedded["inputs_embeds"] * (1 + 1e-6 * rank)}
    attempt("floats with other last bits", lambda: handle.train_step(last))
    failing = (lambda part: 1 / 0) if rank == 1 else (lambda part: model(**part).loss)
    attempt("a loss that fails on one", lambda: handle.train_step(batch, failing))
    more = {"position_ids": torch.arange(12).expand(4, 12)} if rank else {}
    attempt("inputs", lambda: handle.train_step(batch | more))
    with handle.using(LayerParallelConfig(micro_batches=2 + rank)):
        attempt("settings", lambda: handle.train_step(batch))
    attempt("call", lambda: model(**batch) if rank else handle.train_step(batch))
    attempt("nothing", lambda: handle.train_step(batch))  # ranks that were told can go on
    return told, all(p.grad is not None for p in model.parameters() if p.numel())


def test_ranks_that_disagree_are_all_told():
    expected = {
        "rows": "\"batch['input_ids']\": ['[4, 12] torch.int64', '[3, 12] torch.int64'",
        "seed": "'seed': [",
        "loss scale": "'loss scale[0]': [1.0, 2.0",
        "other rows": "\"contents of batch['input_ids']\": [",
        "rows of a call": "\"contents of batch[1]['input_ids']\": [",
        "other floats": "\"contents of batch['inputs_embeds']\": [",
        "a loss that fails on one": "ZeroDivisionError: division by zero",
        "inputs": "\"batch['position_ids']\": [None, '[4, 12] torch.int64'",
        "settings": "'settings.micro_batches': [2, 3",
        "call": "'a call of': [None, 'GPT2LMHeadModel'",
    }
    for num_ranks in (2, 3):
        for told, trained in run_ranks(mismatches, num_ranks):
            assert list(told) == list(expected)
            for name, text in expected.items():
                assert text in told[name], name
                assert f"the {num_ranks} lp ranks disagree" in told[name]
                assert "same batch and settings, and the same random seed (torch.manual_seed)" in told[name]
            assert trained


def questions():
    """What happens to ranks that state other facts."""
    transport = GroupTransport(dist.group.WORLD)
    transport.agree({"a": 1})
    try:
        transport.agree({"one" if transport.rank else "other": 1})
    except RankMismatchError as error:
        return str(error).split(";")[0]


def test_questions_to_all_ranks():
    said = "the 2 lp ranks disagree on {'other': [1, None], 'one': [None, 1]} (by rank)"
    assert run_ranks(questions, 2) == [said, said]


# ---- reports
def reported():
    model, batch = parallel(
        strategy="mgrit", coarsening=2, forward_iterations=2, micro_batches=2, increment_penalty=0.5
    )
    handle = layer_parallel(model)
    before = handle.report()
    torch.manual_seed(0)
    handle.train_step(batch)
    report = handle.report()
    with handle.exact():
        handle.train_step(batch)
    exact = handle.report()
    return before, report, {(path, d): s.mode for path, of in exact.sweeps.items() for d, s in of.items()}


def test_reports_are_alike_on_all_ranks():
    reports = [r for num_ranks in (1, 2, 3) for r in run_ranks(reported, num_ranks)]
    first = reports[0][1]
    ((path, sweeps),) = first.sweeps.items()
    assert [sweeps[d].iterations for d in ("forward", "backward")] == [2, 1]
    assert [len(sweeps[d].residuals) for d in ("forward", "backward")] == [2, 1]
    a, b = sweeps["forward"].residuals
    assert sweeps["forward"].convergence_factors == (b / a,)
    assert a > 0
    assert first.penalty > 0
    for before, report, modes in reports:
        assert before is None
        assert report.penalty == pytest.approx(first.penalty, rel=1e-6)
        for direction in ("forward", "backward"):
            found, expected = report.sweeps[path][direction], sweeps[direction]
            assert found.mode == "mgrit"
            # states are float32, and aggregate's increments are summed otherwise on several ranks
            assert found.residuals == pytest.approx(expected.residuals, rel=1e-3, abs=1e-5)
        assert 0 <= report.waited <= report.seconds
        assert modes == {(path, d): "exact" for d in ("forward", "backward")}


# ---- ranks that die
def die_in_a_step(schedule):
    layers, x = blocks(6), state(batch=4)

    def die(module, args, output):
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 1:
        layers[3].register_forward_hook(die)
    gradients_of(LayerParallelConfig(schedule=schedule, micro_batches=2), layers, x)


def die_between_steps():
    model, batch = parallel()
    handle = layer_parallel(model)
    handle.train_step(batch)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    handle.train_step(batch)


@pytest.mark.parametrize(("death", "args"), [(die_in_a_step, ("1f1b",)), (die_between_steps, ())])
def test_a_killed_rank_ends_the_others_with_a_clear_error(death, args):
    began = time.monotonic()
    outcomes = outcomes_of_ranks(death, 3, *args)
    assert time.monotonic() - began < 60
    assert outcomes[1] == "exit code -9"
    for rank in (0, 2):
        assert "PeerLostError: rank" in outcomes[rank]
        assert "restart all ranks, from the last checkpoint" in outcomes[rank]
