"""Pictures of runs: which panels they have, and that the curves, bands and switches are in them."""

from __future__ import annotations

import sys

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from hf_layerpar.cli import main
from hf_layerpar.errors import ConfigurationError, LayerParallelError
from hf_layerpar.report import pictures
from hf_layerpar.report.pictures import EXACT, OTHERS, RUN, SETTINGS, draw_run
from hf_layerpar.report.run import run_of
from tests.report.logs import CHEAP, RICH, history, older, write_run


def pixels(path, colour: str) -> int:
    image = imread(path)[:, :, :3]
    wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return int((abs(image - wanted).max(-1) < 0.02).sum())


def test_every_panel(tmp_path):
    run, serial = run_of(history(), "lp"), run_of(history(-0.5), "serial")
    draw_run(run, tmp_path / "both.png", [serial])
    draw_run(run, tmp_path / "alone.png")
    assert pixels(tmp_path / "both.png", OTHERS[0]) > pixels(tmp_path / "alone.png", OTHERS[0]) + 300
    for colour in (RUN, SETTINGS[1], EXACT):  # the curves, and bands of 40 and 20 % of the width
        assert pixels(tmp_path / "alone.png", colour) > 1000, colour


def test_panels_without_data_are_left_out(tmp_path):
    log = history()
    draw_run(run_of(log, "lp"), tmp_path / "run.png")
    heights = [imread(tmp_path / "run.png").shape[0]]  # with the panel of biases
    log = older(log)
    for without in ((), ("lp_check_lipschitz",), ("lp_check_lipschitz", "lp_check_cosine", "lp_check_bias_to_noise")):
        kept = [{k: v for k, v in entry.items() if k not in without} for entry in log]
        draw_run(run_of(kept, "lp"), tmp_path / "run.png")
        heights.append(imread(tmp_path / "run.png").shape[0])
    losses = [{k: v for k, v in entry.items() if not k.startswith("lp_")} for entry in log]
    draw_run(run_of(losses, "lp"), tmp_path / "run.png")
    heights.append(imread(tmp_path / "run.png").shape[0])
    assert heights == sorted(set(heights), reverse=True)


def test_switches_are_marked_in_all_panels(tmp_path):
    run = run_of(history(), "lp")
    quiet = run_of([e | {"lp_check_reason": ""} if "lp_check_name" in e else e for e in history()], "lp")
    draw_run(run, tmp_path / "marked.png")
    draw_run(quiet, tmp_path / "plain.png")
    marked, plain = (imread(tmp_path / name) for name in ("marked.png", "plain.png"))
    apart = abs(marked - plain).max(-1) > 0.1
    places = apart.any(0).nonzero()[0]
    assert len(places) < 12, "more than two thin lines differ"
    for column in (places[0], places[-1]):  # dashes from the first panel to the last
        rows = apart[:, column - 2 : column + 3].any(1).nonzero()[0]
        assert len(rows) > 0.4 * len(apart)
        assert rows[-1] - rows[0] > 0.85 * len(apart)


def test_biases_are_drawn_in_the_colours_of_what_they_were_read_of(tmp_path):
    axes = [Figure().subplots() for _ in range(2)]
    run = run_of(history(), "lp")
    for panel, one in zip((pictures._bias(run, []), pictures._factors(run, [])), axes, strict=True):
        panel[1](one.figure, one)
    drawn = {line.get_label(): (line.get_color(), list(line.get_ydata())) for line in axes[0].get_lines()}
    assert drawn[CHEAP] == (SETTINGS[0], [0.2, 0.6])
    assert drawn[RICH] == (SETTINGS[1], [0.1, 0.3, 0.4])
    assert set(drawn["bound"][1]) == {0.5}
    # no curve goes on from the readings of one setting to those of another
    assert [list(line.get_xdata()) for line in axes[1].get_lines()][:2] == [[20, 40], [60, 80]]
    assert pictures._bias(run_of(older(history()), "lp"), []) is None


def test_what_cannot_be_drawn_is_refused_before(tmp_path, capsys):
    run = write_run(tmp_path / "lp", history())
    with pytest.raises(ConfigurationError, match=r"x\.foo is no name of a picture; give one that ends in \.png"):
        draw_run(run_of(history(), "lp"), tmp_path / "x.foo")
    for option, name, said in (("--png", "x.foo", "ends in .png"), ("--json", "no/x.json", "No such file")):
        assert main(["report", str(run), option, str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert said in err
        assert err.count("\n") == 1


def test_factors_of_the_log_stand_in_where_nothing_was_checked():
    run = run_of([{"step": s, "loss": 1.0, "lp_backward_factor": 0.1 * s} for s in range(1, 5)], "lp")
    assert pictures._factors(run, []) is not None
    assert pictures._factors(run_of([{"step": 1, "loss": 1.0}], "lp"), []) is None


def test_command(tmp_path, capsys):
    run, serial = write_run(tmp_path / "lp", history()), write_run(tmp_path / "serial", history(-0.5))
    png, js = tmp_path / "run.png", tmp_path / "run.json"
    assert main(["report", str(run), "--against", str(serial), "--png", str(png), "--json", str(js)]) == 0
    said = capsys.readouterr().out
    assert "2 switches in 4 checks:" in said
    assert f"drawn to {png}" in said
    assert png.read_bytes().startswith(b"\x89PNG")
    assert '"mean_predicted_share": 0.525' in js.read_text()


def test_command_refuses_without_a_traceback(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"hf-layerpar: {tmp_path} has no trainer_state.json")
    assert said.count("\n") == 1


def test_missing_matplotlib_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LayerParallelError, match=r"pip install 'hf_layerpar\[report\]'"):
        draw_run(run_of(history(), "lp"), tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
