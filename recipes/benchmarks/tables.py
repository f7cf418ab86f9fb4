"""Writes the tables of this folder's README from the JSON files, between its `<!-- table: name -->` marks.

    python recipes/benchmarks/tables.py

A figure on the page comes from a file that a command wrote; a test checks that this command would change nothing.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

from recipes.benchmarks.launch import RESULTS
from recipes.benchmarks.systems import SYSTEMS

README = Path(__file__).with_name("README.md")
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def parity() -> str:
    result = load("glue_parity.json")
    rows = [
        [
            pair.replace(" / ", " against "),
            f"{found['max_loss_difference']:.1e}",
            f"{found['max_weight_difference']:.1e}",
            f"{found['test_accuracy_difference']:+.4f}",
        ]
        for pair, found in result["comparisons"].items()
    ]
    return markdown(["runs", "largest loss difference", "largest weight difference", "test accuracy"], rows)


def parity_runs() -> str:
    rows = []
    for name, run in load("glue_parity.json")["runs"].items():
        test, agreement = run["metrics"]["test"], run["gradient_agreement"]
        cosines = [
            ", ".join(f"{batch['cosine']:.3f}" for batch in agreement.get(when, [])) or "exact"
            for when in ("before", "after")
        ]
        rows.append([name, f"{test['accuracy']:.4f}", f"{test['f1']:.4f}", *cosines])
    return markdown(["run", "test accuracy", "F1", "gradient cosine before", "after"], rows)


def memory() -> str:
    result = load("memory.json")
    one = result["ranks"]["1"][0]
    rows = []
    for rank in (one, *result["ranks"]["2"]):
        label = "one rank" if rank is one else f"rank {rank['lp_rank']} of two"
        layers, resident = rank["layers"], rank["resident"]["peak"]
        parts = [f"{layers[part] / 2**20:.0f}" for part in ("weights", "gradients", "adam", "sum")]
        ratio = f"{layers['sum'] / one['layers']['sum']:.2f}"
        rows.append([label, *parts, ratio, f"{resident / 2**20:.0f}", f"{resident / one['resident']['peak']:.2f}"])
    head = ["MiB", "layer weights", "gradients", "Adam", "sum", "ratio", "whole process at its peak", "ratio"]
    return markdown(head, rows)


def big_model() -> str:
    """Of the fullest process of each phase, in GB."""
    rows = []
    for phase, ranks in load("big_model.json")["phases"].items():
        fullest = max(ranks, key=lambda rank: rank["peak"] / rank["allowed"])
        cells = [f"{fullest[key] / 1e9:.2f}" for key in ("own_layers", "ends", "peak", "allowed")]
        rows.append([phase, *cells, "yes" if all(rank["within"] for rank in ranks) else "no"])
    return markdown(["GB", "own layers", "outside of layers", "process at its peak", "allowed", "within"], rows)


def speed() -> str:
    """Ratios to serial one-thread torch on two ranks, by depth, and the simulator's time over the measured one; of the
    shallowest the cosine, and the memory that a step grows by on the fuller rank."""
    tables = sorted((t for t in _speed_tables("stack")), key=lambda t: t["layers"])
    rows = []
    for name, side in tables[0]["sides"].items():
        cells = [*(_ratio(t, name) for t in tables), _predicted(tables, name)]
        cosine = f"{side['gradient']['cosine']:.4f}" if "gradient" in side else side["error"].split("\n")[0][:60]
        grown = f"{max(side['memory_growth_bytes']) / 2**20:.0f}" if "memory_growth_bytes" in side else ""
        rows.append([name, *cells, cosine, grown])
    head = ["side", *(f"N={t['layers']}" for t in tables), "predicted / measured"]
    return markdown([*head, f"cosine (N={tables[0]['layers']})", "MiB"], rows)


def ends() -> str:
    """Ratios to the stock model on two ranks, with embedding, head and loss, and the simulator's time over the measured
    one where the file has it."""
    tables = sorted((t for t in _speed_tables("ends")), key=lambda t: t["layers"])
    rows = [[name, *(_ratio(t, name) for t in tables)] for name in tables[0]["sides"]]
    head = ["side", *(f"N={t['layers']}" for t in tables)]
    predictions = [_predicted(tables, name) for name in tables[0]["sides"]]
    if any(predictions):
        head, rows = [*head, "predicted / measured"], [[*r, p] for r, p in zip(rows, predictions, strict=True)]
    return markdown(head, rows)


EXACT_OF_WEAK = ("gpipe M=4", "1f1b M=4", "ours pipeline M=4", "ours M=4")


def weak() -> str:
    """Weak scaling: twice the layers on twice the ranks, over serial one-thread torch with half the layers."""
    stacks = {(t["layers"], t["ranks"]): t["sides"] for t in load("speed.json")["tables"] if t["table"] == "stack"}
    depths = sorted(n for n, ranks in stacks if ranks == 2 and (n // 2, 1) in stacks)
    rows = []
    for name in stacks[depths[0], 2]:
        if not ("1/1 M=1" in name if name.startswith("mgrit") else name in EXACT_OF_WEAK):
            continue
        half = [stacks[n // 2, 1]["serial, 1 thread"]["seconds"]["median"] for n in depths]
        whole = [stacks[n, 2][name]["seconds"]["median"] for n in depths]
        rows.append([name, *(f"{w / h:.2f}" for w, h in zip(whole, half, strict=True))])
    return markdown(["side", *(f"{n} layers on 2 ranks over {n // 2} on 1" for n in depths)], rows)


def _speed_tables(table: str) -> list[dict[str, Any]]:
    return [t for t in load("speed.json")["tables"] if t["table"] == table and t["ranks"] == 2]


def _predicted(tables: Sequence[dict[str, Any]], name: str) -> str:
    found = [t["sides"].get(name, {}).get("predicted_over_measured") for t in tables]
    return ", ".join(f"{p:.2f}" for p in found if p is not None)


def _ratio(table: dict[str, Any], name: str) -> str:
    side = table["sides"].get(name)
    return "" if side is None else f"{side['ratio']:.2f}" if "ratio" in side else "fails"


def controller() -> str:
    """What training with each side came to: loss above serial's of the same seed, and the predicted step."""
    result = load("controller.json")
    rows = []
    for label, found in result["summary"].items():
        for side, row in found["sides"].items():
            above = _against_serial(side, row)
            runs = row.get("runs")
            share = row.get("predicted_share") or [
                sum(run["predicted_share"][i] for run in runs) / len(runs) for i in range(len(result["ranks"]))
            ]
            parallel = f"{min(run['layer_parallel'] for run in runs):.0%}" if runs else ""
            rows.append([label, side, above, parallel, " / ".join(f"{s:.2f}" for s in share)])
    usual = min(run["steps"] for run in result["runs"])
    longer = [run for run in result["runs"] if run["steps"] != usual]
    serial = {(run["h"], run["seed"]): run["evaluation"][-1][1] for run in longer if run["side"] == "serial"}
    for run in longer:
        loss, base = run["evaluation"][-1][1], serial[run["h"], run["seed"]]
        above = f"final loss {loss:.3f}" if run["side"] == "serial" else f"{loss - base:+.3f}"
        rows.append([f"{run['h']}, {run['steps']} steps", run["side"], above, "", ""])
    ranks = " / ".join(map(str, result["ranks"]))
    head = ["", "gradient", "validation loss minus serial, by seed", "least share of steps layer-parallel"]
    return markdown([*head, f"predicted step over one rank's, {ranks} ranks"], rows)


def _against_serial(side: str, row: dict[str, Any]) -> str:
    """A figure for each seed: serial's last losses, or what another side's are above them."""
    if side == "serial":
        return "final loss " + ", ".join(f"{loss:.3f}" for loss in row["final_losses"].values())
    return ", ".join(f"{loss:+.3f}" for loss in row["minus_serial"].values())


def cosines() -> str:
    """Gradient cosine with the exact one on the serial runs, by operator at 1/1 and c=4, at three moments."""
    rows = []
    for run in load("controller.json")["runs"]:
        if not run["gradients"]:
            continue
        steps = sorted({row["step"] for row in run["gradients"]})
        chosen = [min(steps, key=lambda s: abs(s - share * steps[-1])) for share in (0.1, 0.5, 1.0)]
        table: dict[str, dict[int, float]] = {}
        for row in run["gradients"]:
            if row["settings"].endswith("1/1 c=4"):
                name = row["settings"].removeprefix("mgrit ").removesuffix(" 1/1 c=4")
                table.setdefault(name, {})[row["step"]] = row["cosine"]
        what = f"{run['h']}, {run['steps']} steps" + run["side"].removeprefix("serial")
        rows += [[what, name, *(f"{found[s]:.3f} ({s})" for s in chosen)] for name, found in table.items()]
    return markdown(["serial run", "operator", "early (step)", "middle", "end"], rows)


def diagnosis() -> str:
    """Verdicts, and what short training runs said of them."""
    rows = []
    for name in ("control", "minilm", "smollm2", "gemma3"):
        result = load(f"diagnosis/{name}.json")
        runs = result["training"]["runs"]
        check = ", ".join(f"{setting} {run['progress']:.2f}" for setting, run in runs.items() if setting != "exact")
        right = ", ".join(f"{setting} {run['accuracy']:.3f}" for setting, run in runs.items() if "accuracy" in run)
        steps = result["training"]["steps"]
        rows.append([name, result["diagnosis"]["suggestion"]["verdict"], f"{check} ({steps} steps)", right])
    return markdown(["model", "verdict", "share of exact training's fall in loss", "accuracy"], rows)


def paper() -> str:
    """The paper's systems in small: the metric after training by seed, and its distance from serial's."""
    rows = []
    for name in SYSTEMS:
        summary = load(f"paper/{name}.json")["summary"]
        for side, row in summary["sides"].items():
            by_seed = {key: [value for _, value in sorted(row[key].items())] for key in row}
            final = ", ".join(f"{value:.3f}" for value in by_seed["final"])
            above = ", ".join(f"{value:+.3f}" for value in by_seed["minus_serial"] if not side.startswith("serial"))
            switches = "; ".join(f"{found[0][0]}: {found[0][1]}" for found in by_seed["switches"] if found)
            rows.append([name, summary["metric"], side, final, above, switches])
    head = ["system", "metric", "gradient", "after training, by seed", "minus serial", "first switch of each seed"]
    return markdown(head, rows)


def paper_speed() -> str:
    """The paper's deep networks: speed-ups over stock in one process, measured on two ranks and simulated."""
    result = load("paper/speed.json")
    ranks = next(iter(result["networks"].values()))["predicted"]["ranks"]
    shown = [2, 4, 8, 16, 32, 64]
    rows = []
    for name, network in result["networks"].items():
        depth, sides = network["measured_depth"], network["measured_on_2_ranks"]["sides"]
        what = f"{name}, {' + '.join([str(depth)] * network['stacks'])}"
        for side, speedups in network["predicted"]["speedup"][str(depth)].items():
            of_ranks = dict(zip(ranks, speedups, strict=False))  # no more ranks than half the layers
            cells = [f"{of_ranks[r]:.1f}" if r in of_ranks else "" for r in shown]
            cosine = f"{sides[side]['gradient']['cosine']:.3f}" if "gradient" in sides[side] else ""
            measured = f"{1 / sides[side]['ratio']:.2f}" if "ratio" in sides[side] else "fails"
            rows.append([what, side, cosine, measured, *cells])
    head = ["network, layers", "setting", "cosine", "2 ranks, measured", *(f"{r}, simulated" for r in shown)]
    return markdown(head, rows)


def fine_tuning() -> str:
    """Held-out accuracy after fine-tuning, by how the network was pretrained."""
    rows = []
    for task, row in load("paper/fine_tuning.json")["summary"].items():
        sides = row["sides"]
        cells = [f"{100 * sides['serial']['accuracy']:.1f}"]
        for side in ("switched", "adaptive", "new"):
            found, apart, error = (100 * sides[side][key] for key in ("accuracy", "minus_serial", "standard_error"))
            cells.append(f"{found:.1f} ({apart:+.1f} ± {error:.1f})")
        cells += [f"{100 * row['serial_deviation']:.1f}", f"{100 * row['majority']:.1f}"]
        rows.append([task, str(sides["serial"]["runs"]), *cells])
    head = ["task", "runs a side", "pretrained serially, %", "switched", "adaptive", "not pretrained"]
    return markdown([*head, "deviation of serial's runs", "most frequent label"], rows)


def at_size() -> str:
    """What training the deep network with each side came to: loss above serial's of the same seed."""
    result = load("at_size.json")
    rows = []
    for h, found in result["summary"].items():
        for side, row in found["sides"].items():
            above = _against_serial(side, row)
            exact = [shares.get("pipeline", 0.0) for shares in row.get("shares_of_steps", [])]
            parallel = f"{1 - max(exact):.0%}" if exact else ""
            rows.append([h, side, above, parallel, " / ".join(f"{s:.2f}" for s in row["predicted_share"])])
    head = ["", "gradient", "validation loss minus serial's, by seed", "least share of steps layer-parallel"]
    return markdown([*head, "predicted step over one GPU's, 4 / 8 GPUs"], rows)


def at_size_cosines() -> str:
    """Gradient cosines on the long serial runs of the deep network, as they train."""
    rows = []
    for run in _at_size_runs(long=True):
        table: dict[str, list[str]] = {}
        for row in run["gradients"]:
            table.setdefault(row["settings"].removeprefix("mgrit "), []).append(f"{row['cosine']:.3f}")
        steps = sorted({row["step"] for row in run["gradients"]})
        rows += [[run["h"], name, *cosines] for name, cosines in table.items()]
    return markdown(["", "setting", *(f"step {step}" for step in steps)], rows)


def penalties() -> str:
    """Short serial runs with an increment penalty and without: their loss, and cosines at the end."""
    settings = ("aggregate 1/1 c=4", "aggregate exact/1 c=4", "identity 1/1 c=4")
    runs = _at_size_runs(long=False)
    plain = {(run["h"], run["seed"]): run["evaluation"][-1][1] for run in runs if not run["penalty"]}
    rows = []
    for run in sorted(runs, key=lambda run: (Fraction(run["h"].removeprefix("h=")), run["penalty"], run["seed"])):
        last = max(row["step"] for row in run["gradients"])
        cosines = {
            (row["settings"].removeprefix("mgrit "), row["penalty"]): row["cosine"]
            for row in run["gradients"]
            if row["step"] == last
        }
        cells = [" / ".join(f"{cosines[name, a]:.3f}" for a in sorted({0.0, run["penalty"]})) for name in settings]
        loss = run["evaluation"][-1][1]
        above = f"{loss - plain[run['h'], run['seed']]:+.3f}" if run["penalty"] else f"{loss:.3f}"
        rows.append([run["h"], f"{run['penalty']:g}", str(run["seed"]), above, *cells])
    head = ["", "penalty", "seed", "validation loss (minus that without)"]
    return markdown([*head, *(f"cosine of {name}, loss alone / with penalty" for name in settings)], rows)


def _at_size_runs(long: bool) -> list[dict[str, Any]]:
    """Those that compared gradients, smallest steps first."""
    runs = load("at_size.json")["runs"]
    most = max(run["steps"] for run in runs)
    found = [run for run in runs if run["gradients"] and (run["steps"] == most) == long]
    return sorted(found, key=lambda run: float(Fraction(run["h"].removeprefix("h="))))


def race() -> str:
    """Seconds to stock's last validation loss, and all seconds, by race and side; a figure for each seed."""
    rows = []
    for name, sides in load("race.json")["summary"].items():
        for side, row in sides.items():
            times = row["seconds_to_target"].values()
            reached = ", ".join("not reached" if s is None else f"{s:.1f}" for s in times)
            above = ", ".join(f"{loss:+.3f}" for loss in row["minus_stock"].values())
            rows.append([name, side, reached, ", ".join(f"{s:.1f}" for s in row["seconds"].values()), above])
    return markdown(["race", "side", "seconds to the target", "seconds of all steps", "last loss minus stock's"], rows)


def settings_map() -> str:
    """The least cosine of each setting by step size, and where it wins: GPUs and micro-batches."""
    result = load("settings_map.json")
    sizes = list(result["least_cosines"])
    names = dict.fromkeys(name for of_size in result["least_cosines"].values() for name in of_size)
    rows = []
    for name in names:
        cosines = [f"{result['least_cosines'][h][name]:.3f}" for h in sizes]
        wins = Counter((cell["dim"], cell["h"]) for cell in result["cells"] if cell["winner"] == name)
        rows.append(
            [name.removeprefix("mgrit "), *cosines, ", ".join(f"{h}, D={d}: {n}" for (d, h), n in wins.items())]
        )
    places = len(result["cells"]) // len(sizes) // len({cell["dim"] for cell in result["cells"]})
    return markdown(["setting", *(f"least cosine, {h}" for h in sizes), f"wins in so many of {places} places"], rows)


def architectures() -> str:
    """What became of the architectures of transformers' Auto classes, by task, in one process; and how many of those
    that work there are equal on two ranks."""
    outcomes = ["equal to the bit", "equal", "refused", "failed", "not built"]
    result = load("architectures.json")
    counts: dict[str, Counter[str]] = {}
    for row in result["1"]:
        counts.setdefault(row["task"], Counter())[row["outcome"]] += 1
    two: Counter[str] = Counter()
    for row in result["2"]:
        two[row["task"]] += row["outcome"] in outcomes[:2]
    total, two["all"] = sum(counts.values(), Counter()), two.total()
    strange = set(total) - set(outcomes)
    assert not strange, f"outcomes that the table doesn't have: {strange}"
    rows = [
        [task, *(str(count[o]) for o in outcomes), str(two[task])] for task, count in [*counts.items(), ("all", total)]
    ]
    return markdown(["task", *outcomes, "equal on 2 ranks"], rows)


def h200() -> str:
    """The best share of one device's step of each way, over the micro-batches, and with how many."""
    rows = []
    ways = ["exact", "tensor parallel", "aggregate 1/1", "identity 1/1"]
    for table in load("layer_costs.json")["tables"]:
        size = f"{table['dim']}, {table['batch']}, {table['tokens']}"
        for case in table["simulated"]:
            best = {name: min((s, int(m)) for m, s in of.items()) for name, of in case["shares"].items()}
            cells = [f"{best[way][0]:.3f} (M={best[way][1]})" if way in best else "" for way in ways]
            usual = min(share for way, (share, _) in best.items() if way in ways[:2])
            gains = [f"{usual / best[way][0]:.1f}" for way in ways[2:]]
            rows.append([size, str(case["layers"]), f"{case['devices']}, {case['link']}", *cells, *gains])
    gained = [f"{way} faster than the better of these" for way in ways[2:]]
    return markdown(["D, B, T", "layers", "GPUs", *(f"best {way}" for way in ways), *gained], rows)


def one_device() -> str:
    """Steps on one GPU: ms, and over torch's own; of bare stacks over torch's CUDA graph."""
    rows = []
    for table in load("one_device.json")["tables"]:
        sides = table["sides"]
        base = sides.get("serial, CUDA graph", sides.get("stock"))["seconds"]["median"]
        for name, side in sides.items():
            seconds, cosine = side["seconds"]["median"], side["gradient"]["cosine"]
            rows.append([table["name"], name, f"{1e3 * seconds:.1f}", f"{seconds / base:.2f}", f"{cosine:.4f}"])
    return markdown(["", "side", "ms", "over torch", "cosine of the gradient"], rows)


def axes() -> str:
    """Steps of one global batch on four processes."""
    rows = [
        [name, f"{1e3 * row['seconds']:.0f}", f"{row['over_better_of_dp_and_lp']:.2f}"]
        for name, row in load("axes.json")["rows"].items()
    ]
    return markdown(["4 processes as", "ms a step", "over the better of dp and lp"], rows)


def compiled() -> str:
    """Steps with compiled layers beside eager ones."""
    rows = [
        [
            name,
            *(f"{1e3 * row[f'{side}_seconds']:.0f}" for side in ("eager", "compiled")),
            *(f"{row['share']:.2f}", f"{row['compiled_first_seconds']:.0f}", f"{row['gradient_error']:.0e}"),
        ]
        for name, row in load("compiled.json")["rows"].items()
    ]
    head = ["setting", "eager, ms", "compiled, ms", "share", "first step with compiling, s"]
    return markdown([*head, "relative error of the gradient"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "architectures": architectures,
    "parity": parity,
    "parity_runs": parity_runs,
    "memory": memory,
    "big_model": big_model,
    "axes": axes,
    "compiled": compiled,
    "speed": speed,
    "ends": ends,
    "weak": weak,
    "h200": h200,
    "one_device": one_device,
    "controller": controller,
    "cosines": cosines,
    "at_size": at_size,
    "at_size_cosines": at_size_cosines,
    "penalties": penalties,
    "settings_map": settings_map,
    "race": race,
    "diagnosis": diagnosis,
    "paper": paper,
    "paper_speed": paper_speed,
    "fine_tuning": fine_tuning,
}


def filled(text: str) -> str:
    """The page with every marked table written anew. KeyError for a mark that names no table."""
    return MARK.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
