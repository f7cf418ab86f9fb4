"""The command line: what it prints, what it draws, and how it refuses."""

import subprocess
import sys

import pytest

from hf_layerpar.cli import main

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
    # forward (4 + 2) pieces of 4 layers, backward (4 + 2) of input-vjps and 4 of weight gradients: 6 + 10 of 12 * 4 / 4
    assert "time    16: forward 6, backward 10" in lines
    assert "serial  36 on one rank; predicted share of serial 0.444 (2.25x)" in lines
    assert "idle    25.0 % of rank time (ranks 25.0 to 25.0 %)" in lines
    assert "traffic 16 messages" in lines
    assert lines[-1].startswith("memory  rank 0 holds 16 layer graphs")


def test_costs_bytes_and_tasks(capsys):
    lines = lines_of(
        capsys, *MGRIT, "--cost", "state_bytes=8", "--cost", "final_vjp=5", "--cost", "weights=4", "--tasks"
    )
    assert lines[0].startswith("forward plan: 12 layers, 3 ranks, 1 micro-batches")
    assert any("= step 11(" in line for line in lines)
    assert any(line.startswith("serial  72 on one rank") for line in lines)
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
        (["--strategy", "serial"], "use strategy='pipeline' for micro-batches"),
        (["--strategy", "mgrit", "--levels", "5"], "is too deep for 12 steps"),
        (["--strategy", "mgrit", "--coarsening", "4", "2"], "gives 2 factors for levels=2"),
        (["--strategy", "mgrit", "--buffers", "6", "6"], "use fewer buffer layers"),
        (["--buffers", "-1", "0"], r"buffers[0]=-1"),
        (["--split", "6", "6"], "split=(6, 6) doesn't share 12 layers over 3 lp ranks"),
        (["--interleaved"], "--interleaved needs the intervals of --strategy mgrit"),
        (["--choose", "high", "--split", "4", "4", "4"], "leave --split out"),
        (["--cost", "price=1"], "'price' is unknown; use one of step, graph_step"),
        (["--cost", "step"], "'' is no number; write NAME=VALUE"),
        (["--cost", "step=-2"], "step=-2.0 must be at least 0"),
        (["--png", "/no/such/folder/x.png"], "No such file or directory"),
    ],
)
def test_what_does_not_fit_is_refused_without_a_traceback(capsys, arguments, message):
    assert main([*PIPELINE, *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hf-layerpar: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--layers", "0"], ["--strategy", "magic"], ["--levels", "two"]])
def test_malformed_arguments_exit_2(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main([*PIPELINE, *arguments])
    assert end.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_planning_loads_no_torch_and_no_matplotlib():
    code = (
        "import sys; from hf_layerpar.cli import main; assert main(sys.argv[1:]) == 0; "
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *PIPELINE], check=True, capture_output=True)
