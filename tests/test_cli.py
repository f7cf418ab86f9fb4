"""The command line: what it prints, what it draws, and how it refuses."""

import dataclasses
import re
import shlex
import subprocess
import sys
from unittest.mock import Mock

import pytest

from hf_layerpar.cli import main
from hf_layerpar.config import LayerParallelConfig, help_of
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.operators import OPERATORS
from hf_layerpar.plan.schedules import SCHEDULES

PIPELINE = ["plan", "--layers", "12", "--ranks", "3", "--micro-batches", "4"]
MGRIT = ["plan", "--layers", "12", "--ranks", "3", "--strategy", "mgrit", "--coarsening", "3"]


def lines_of(capsys, *arguments):
    assert main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def test_plan_prints_the_step(capsys):
    lines = lines_of(capsys, *PIPELINE)
    rows = [line for line in lines if line.startswith("rank ")]
    assert [row[:8] for row in rows] == ["rank 0 |", "rank 1 |", "rank 2 |"]
    assert len({len(row) for row in rows}) == 1
    # four micro-batches of four layers a rank: 12 units of work on each, and the last rank waits for 2
    assert "time    14, on one rank 36; predicted share of serial 0.389 (2.57x)" in lines
    assert "idle    14.3 % of rank time (ranks 14.3 to 14.3 %)" in lines
    assert "traffic 16 messages" in lines
    assert lines[-1].startswith("memory  rank 0 holds 12 layer graphs")


def test_schedules_and_ends(capsys):
    gpipe = lines_of(capsys, *PIPELINE, "--schedule", "gpipe")
    assert any(line.startswith("time    18, on one rank 36") for line in gpipe)  # (4 + 2) pieces of 1 + 2
    assert gpipe[-1].startswith("memory  rank 0 holds 16 layer graphs")
    one_block = lines_of(capsys, *PIPELINE, "--schedule", "1f1b")
    two_blocks = lines_of(capsys, *PIPELINE, "--schedule", "1f1b", "--interleaved")
    placed = lines_of(capsys, *PIPELINE, "--schedule", "zb_v")
    assert "traffic 16 messages" in one_block
    assert "traffic 40 messages" in two_blocks
    assert "traffic 32 messages" in placed  # the turn of the V is on one rank
    heavy = lines_of(capsys, *PIPELINE, "--schedule", "1f1b", "--cost", "tail=9")  # as three layers
    assert heavy[-1].startswith("memory  rank 0 holds 15 layer graphs")
    head = ["--cost", "tail=12", "--cost", "front=1"]
    rows = [line.split("|")[1] for line in lines_of(capsys, *MGRIT, *head)[:3]]
    assert [("E" in row, "T" in row) for row in rows] == [(True, False), (False, False), (False, True)]
    rows = [line.split("|")[1] for line in lines_of(capsys, *MGRIT, *head, "--ends", "spread")[:3]]
    assert all("T" in row for row in rows)


def test_help_says_what_every_option_means(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "--help"])
    said = capsys.readouterr().out
    for title in ("the step", "the machine", "output"):
        assert f"\n{title}:\n" in said
    for field in dataclasses.fields(LayerParallelConfig):
        planned = field.name != "cuda_graphs"  # how a plan is run
        assert (f"--{field.name.replace('_', '-')}" in said) == planned
        assert (help_of(LayerParallelConfig, field.name) in said) == planned
    assert all(name in help_of(LayerParallelConfig, "schedule") for name in SCHEDULES)
    assert all(name in help_of(LayerParallelConfig, "coarse_operator") for name in OPERATORS)
    options = [line for line in re.sub(r"\n {9,}", " ", said).splitlines() if line.startswith("  --")]
    told = ("(default: ", "required.", "may be given again.", "and exit.")
    assert [line for line in options if not any(words in line for words in told)] == []
    example = said.splitlines()[-1].split("hf-layerpar ")[1].replace("step.png", str(tmp_path / "step.png"))
    assert any(line.startswith("time ") for line in lines_of(capsys, *shlex.split(example)))
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "--list-costs"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        field.name for field in dataclasses.fields(Costs)
    ]


def test_exact_sweeps_are_called_so(capsys, tmp_path):
    exact = [*MGRIT, "--forward-iterations", "0", "--png", str(tmp_path / "step.svg")]
    lines_of(capsys, *exact)
    assert main([*exact, "--layers", "1000000", "--micro-batches", "5"]) == 2
    assert "5 micro-batches and exact/1 iterations take" in capsys.readouterr().err
    lines = lines_of(capsys, *PIPELINE, "--choose", "any")
    assert not any("0/1" in line for line in lines)


def test_costs_bytes_and_tasks(capsys):
    lines = lines_of(
        capsys, *MGRIT, "--cost", "state_bytes=8", "--cost", "final_vjp=5", "--cost", "weights=4", "--tasks"
    )
    assert lines[0].startswith("plan: 12 layers, 3 ranks, 1 micro-batches")
    assert any("= step 11(" in line for line in lines)
    assert any(line.startswith("time") and "on one rank 72;" in line for line in lines)
    assert any(line.startswith("traffic") and "bytes" in line for line in lines)


def test_buffers_split_and_interleaved(capsys):
    base = lines_of(capsys, *MGRIT, "--buffers", "1", "2")
    split = lines_of(capsys, *MGRIT, "--buffers", "1", "2", "--split", "8", "2", "2")
    dealt = lines_of(capsys, *MGRIT, "--interleaved")
    assert base != split
    assert base != dealt
    assert split[-1].startswith("memory  rank 0 holds 8 layer graphs")


def test_choose_ranks_settings_and_shows_the_best(capsys):
    lines = lines_of(capsys, *PIPELINE, "--choose", "good")
    assert lines[0].split() == ["share", "setting", "and", "layers", "of", "each", "rank"]
    shares = [float(line.split()[0]) for line in lines[1:11]]
    assert shares == sorted(shares)
    assert any(f"predicted share of serial {shares[0]:.3f}" in line for line in lines)


def test_png(capsys, tmp_path):
    lines = lines_of(capsys, *MGRIT, "--png", str(tmp_path / "step.png"))
    assert lines[-1] == f"drawn to {tmp_path / 'step.png'}"
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "13"], "lp_size=13 is more than the 12 layers of the stack"),
        (["--strategy", "mgrit", "--coarsening", "4", "4", "4"], "is too deep for 12 steps"),
        (["--schedule", "gpip"], "schedule='gpip' is unknown; use one of gpipe, 1f1b"),
        (["--coarse-operator", "mean"], "coarse_operator='mean' is unknown; use one of rediscretize"),
        (["--strategy", "mgrit", "--buffers", "6", "6"], "use fewer buffer layers"),
        (["--buffers", "-1", "0"], r"buffers[0]=-1"),
        (["--split", "6", "6"], "split=(6, 6) doesn't share 12 layers over 3 lp ranks"),
        (["--layers", "5", "--interleaved"], "split='interleaved' makes 6 blocks of 5 layers on 3 lp ranks"),
        (["--choose", "high", "--split", "4", "4", "4"], "leave --split out"),
        (["--cost", "price=1"], "'price' is unknown; use one of step, graph_step"),
        (["--cost", "step"], "'' is no number; write NAME=VALUE"),
        (["--cost", "step=-2"], "step=-2.0 must be at least 0"),
        (["--png", "/no/such/folder/x.png"], "No such file or directory"),
        (["--png", "x.foo"], "x.foo is no name of a picture; give one that ends in .png, .pdf, .svg"),
        (["--cost", "step=inf"], "step=inf must be at least 0 and at most 1e+15; use a larger unit"),
        (["--cost", "tail=1e308"], "tail=1e+308 must be at least 0 and at most 1e+15"),
        (["--cost", "graph_step=nan"], "graph_step=nan must be"),
        (["--cost", "bandwidth=1e-300"], "bandwidth=1e-300 must be positive and at least 1e-15; inf costs nothing"),
        (["--micro-batches", "-4"], "micro_batches=-4 must be an integer of at least 1"),
        (["--micro-batches", "-4", "--choose", "high"], "micro_batches=-4 must be an integer of at least 1"),
        (["--micro-batches", "200000"], "s to plan, and the limit is 30 s; use less of one of them"),
        (["--micro-batches", "200000", "--choose", "high"], "try fewer micro-batches"),
        (["--buffers", "99", "99"], "buffers=(99, 99) leave 0 of 12 layers between them; use fewer buffer layers"),
        (["--buffers", "99", "99", "--choose", "high"], "use fewer buffer layers"),
        (["--strategy", "mgrit", "--forward-iterations", "1001"], "forward_iterations=1001 must be at most 1000"),
        (["--layers", str(10**18)], f"--layers={10**18} must be at most 1000000"),
        (
            ["--layers", "100000", "--strategy", "mgrit"],
            "4 micro-batches and 1/1 iterations take about 240 s to plan, and the limit is 30 s",
        ),
        (["--ranks", str(10**18)], f"--ranks={10**18} must be at most 1000000"),
    ],
)
def test_what_does_not_fit_is_refused_without_a_traceback(capsys, arguments, message):
    assert main([*PIPELINE, *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hf-layerpar: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--layers", "10^18"],
        ["--layers", "9" * 5000],
        ["--layers", "0"],
        ["--strategy", "magic"],
        ["--micro-batches", "two"],
        ["--ends", "last"],
    ],
)
def test_malformed_arguments_exit_2(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main([*PIPELINE, *arguments])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert arguments[0] in said
    assert said.count("\n") == 1


def test_nothing_costs_anything(capsys):
    free = [word for name in ("step", "graph_step", "vjp", "weights", "final_vjp") for word in ("--cost", f"{name}=0")]
    assert "time    0" in lines_of(capsys, *PIPELINE, *free)


def test_choose_says_what_it_assumes(capsys):
    assert any("half a batch takes half the time" in line for line in lines_of(capsys, *PIPELINE, "--choose", "exact"))
    measured = lines_of(capsys, *PIPELINE, "--choose", "exact", "--cost", "fixed_share=0.9")
    assert not any("assumed" in line for line in measured)
    assert "1 micro-batch," in measured[1]  # where cutting the batch saves next to nothing


def test_what_a_library_raises_is_one_line(capsys, monkeypatch):
    for error, said in (
        (RecursionError("too\ndeep"), "RecursionError: too deep"),
        (MemoryError(), "not enough memory"),
    ):
        monkeypatch.setattr("hf_layerpar.cli.predict_step", Mock(side_effect=error))
        assert main(PIPELINE) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


def test_planning_loads_no_torch_and_no_matplotlib():
    code = (
        "import sys; from hf_layerpar.cli import main; assert main(sys.argv[1:]) == 0; "
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *PIPELINE], check=True, capture_output=True)
