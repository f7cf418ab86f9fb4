"""The model card of a recipe's run: everything in it comes from the run's result.json and its saved model's config.

    python recipes/model_card.py runs/glue_bert -o model_cards/glue_bert.md

RUN is a run's folder or its result.json. The model's class and the kind of its checkpoint are read from
RUN/model/config.json, where that is there.
"""

from __future__ import annotations

import argparse
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
from recipes.glue_tasks import OFFLINE, TASKS

GLUE = "nyu-mll/glue"


def facts_of(result: Mapping[str, Any], config: Mapping[str, Any] | None, name: str) -> CardFacts:
    """config: the saved model's config.json. Raises ConfigurationError where `result` is no recipe's result.json."""
    missing = sorted({"settings", "metrics", "ranks", "seconds", "versions"} - result.keys())
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
        datasets=_datasets(recipe),
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


def _kind(ode: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> Any:
    """As the config says; without one, as the settings have it (half precision can make a split form one of code)."""
    if config is not None and CONFIG_KEY in config:
        if config["model_type"].startswith("ode-"):
            return "code"
        return "folded" if config[CONFIG_KEY]["folded"] else "plain"
    if ode is None or ode["step_size"] == 1:
        return "plain"
    return "folded" if ode["form"] == "split" else "code"


def _datasets(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """The Hub's name where the recipe has one, else what its offline data is called."""
    if OFFLINE in (recipe.get("dataset_name"), recipe.get("task")):
        return (f"{OFFLINE} {recipe.get('source', 'data')}",)
    if name := recipe.get("dataset_name"):
        return (Path(name).name if Path(name).is_dir() else name,)  # where a folder lies is nobody's business
    return (GLUE,) if recipe.get("task") in TASKS else ()


def main(argv: Sequence[str] | None = None) -> Path:
    """Writes the card whole and returns where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or its result.json")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the card to write")
    parser.add_argument("--name", help="of the repository on the hub; default: the card's own name")
    options = parser.parse_args(argv)
    file = options.run / "result.json" if options.run.is_dir() else options.run
    if not file.is_file():
        raise ConfigurationError(f"there is no {file}; give the folder of a finished run")
    config = file.parent / "model" / "config.json"
    facts = facts_of(
        json.loads(file.read_text("utf-8")),
        json.loads(config.read_text("utf-8")) if config.is_file() else None,
        options.name or options.output.stem,
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    aside = options.output.with_name(options.output.name + ".part")
    make_card(facts).save(aside)
    os.replace(aside, options.output)
    return options.output


if __name__ == "__main__":
    print(main())
