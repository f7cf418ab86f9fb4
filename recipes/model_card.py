"""The model card of a recipe's run: everything in it comes from the run's result.json and its saved model's config.

    python recipes/model_card.py runs/glue_bert -o model_cards/glue_bert.md [--against RUN]

RUN is a run's folder or its result.json. The model's class and the kind of its checkpoint are read from
RUN/model/config.json, where that is there. `--against` sets the metrics of an exact run with the same settings and
seed beside the run's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout runs without being installed

from hf_layerpar.config import CONFIG_KEY
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.hub.card import CardFacts, changes_of, facts_of_class, make_card, solver_facts


def facts_of(result: Mapping[str, Any], config: Mapping[str, Any] | None, name: str) -> CardFacts:
    """config: the saved model's config.json. Raises ConfigurationError where `result` is no recipe's result.json."""
    missing = sorted({"data", "settings", "metrics", "ranks", "seconds", "versions"} - result.keys())
    if missing:
        raise ConfigurationError(f"the result has no {', '.join(missing)}; give the result.json of a recipe's run")
    recipe, ode, solver, training = (
        result["settings"].get(key) for key in ("recipe", "ode", "layer_parallel", "training")
    )
    ranks = result["ranks"]
    if solver is not None:
        lp_size = ranks[0]["lp_size"]
        solver = solver_facts(solver, lp_size=lp_size, dp_size=len(ranks) // lp_size)
    layers = {path: 1 + max(i for rank in ranks for i in rank["layers"][path]) for path in ranks[0].get("layers", {})}
    described = {} if config is None else facts_of_class((config.get("architectures") or [None])[0])
    base = recipe.get("model_name")
    return CardFacts(
        name=name,
        kind=_kind(ode, config),
        base_model=None if base is None or Path(base).is_absolute() or Path(base).exists() else base,
        datasets=(result["data"],),
        ode=ode,
        layers=layers,
        solver=solver,
        changes=changes_of(result.get("checks", ())),
        training=(training or {})
        | {"optimizer steps": max((entry["step"] for entry in result.get("steps", ())), default=None)}
        | {"seconds": result["seconds"]["training"], "devices": [rank["device"] for rank in ranks]},
        metrics=result["metrics"],
        evaluation=tuple(result.get("evaluation", ())),
        versions=result["versions"],
        **described,
    )


def exact_metrics(result: Mapping[str, Any], exact: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metrics of `exact`. Raises ConfigurationError where that isn't `result`'s run with an exact gradient."""
    own, other = result["settings"], exact["settings"]
    if (other["layer_parallel"] or {}).get("strategy") == "mgrit":
        raise ConfigurationError("strategy='mgrit' trained the run to compare with; give one that was trained exactly")
    for part in ("recipe", "ode", "training"):
        ours, theirs = own[part] or {}, other[part] or {}
        for key in sorted((ours.keys() | theirs.keys()) - {"agreement_batches"}):
            if ours.get(key) != theirs.get(key):
                raise ConfigurationError(
                    f"{key}={ours.get(key)!r} in the run, {theirs.get(key)!r} in the one to compare with; compare runs "
                    "that differ in the solver only"
                )
    return exact["metrics"]


def read_result(run: Path) -> tuple[dict[str, Any], Path]:
    """A run's result.json, and the folder that it lies in."""
    file = run / "result.json" if run.is_dir() else run
    if not file.is_file():
        raise ConfigurationError(f"there is no {file}; give the folder of a finished run")
    return json.loads(file.read_text("utf-8")), file.parent


def _kind(ode: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> Any:
    """As the config says; without one, as the settings have it (half precision can make a split form one of code)."""
    if config is not None and CONFIG_KEY in config:
        if config["model_type"].startswith("ode-"):
            return "code"
        return "folded" if config[CONFIG_KEY]["folded"] else "plain"
    if ode is None or ode["step_size"] == 1:
        return "plain"
    return "folded" if ode["form"] == "split" else "code"


def main(argv: Sequence[str] | None = None) -> Path:
    """Writes the card whole and returns where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or its result.json")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the card to write")
    parser.add_argument("--name", help="of the repository on the hub; default: the card's own name")
    parser.add_argument("--against", type=Path, metavar="RUN", help="an exact run with the same settings and seed")
    options = parser.parse_args(argv)
    result, folder = read_result(options.run)
    config = folder / "model" / "config.json"
    facts = facts_of(
        result,
        json.loads(config.read_text("utf-8")) if config.is_file() else None,
        options.name or options.output.stem,
    )
    if options.against:
        exact = exact_metrics(result, read_result(options.against)[0])
        facts = dataclasses.replace(facts, exact_metrics=exact)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    aside = options.output.with_name(options.output.name + ".part")
    make_card(facts).save(aside)
    os.replace(aside, options.output)
    return options.output


if __name__ == "__main__":
    print(main())
