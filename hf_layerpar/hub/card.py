"""Model cards: what a checkpoint is, how its layers were solved, how it was trained, how to load it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_layerpar.config import LayerParallelConfig

Kind = Literal["plain", "folded", "code", "adapters"]

MARK = "<!-- Written by hf_layerpar, anew at each push. Take this line out to keep what you write here. -->"
TAGS = ("hf_layerpar", "layer-parallel", "neural-ode")
_TEMPLATE = Path(__file__).with_name("card.md")
_MOST_EVALUATIONS = 12
_CHOSEN = ("coarse_operator", "coarsening", "forward_iterations", "backward_iterations")
"""What a controller's settings say themselves."""
_TIMING = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says; what is None or empty isn't mentioned.

    name: of the repository, as `from_pretrained` takes it.
    kind: "plain" (an ordinary checkpoint), "folded" (the same, with the step size in its weights), "code" (custom code
        and `auto_map`), "adapters" (of PEFT).
    architecture, auto_class, task: the model's class, the Auto class that loads it, and the Hub's name of its task.
    ode: `OdeSettings.to_dict()`; None for a model that was never converted.
    layers: of every stack, by its path, buffers included.
    solver: from `solver_facts`.
    changes: (step, settings) wherever the controller chose others.
    training: hyperparameters by the names of the training arguments, and what else there is to say.
    metrics: split -> metric -> value. exact_metrics: those of a run with the exact gradient, otherwise the same.
    evaluation: {"step", "loss", ...} over the run.
    """

    name: str
    kind: Kind = "plain"
    architecture: str | None = None
    auto_class: str | None = None
    task: str | None = None
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    language: str | list[str] | None = None
    license: str | None = None
    tags: tuple[str, ...] = ()
    ode: Mapping[str, Any] | None = None
    layers: Mapping[str, int] = field(default_factory=dict)
    solver: Mapping[str, Any] | None = None
    changes: tuple[tuple[int, str], ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    exact_metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    evaluation: tuple[Mapping[str, Any], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_refined(self) -> bool:
        return self.ode is not None and self.ode["step_size"] != 1


def make_card(facts: CardFacts) -> ModelCard:
    """The card of `facts`: the Hub's metadata on top, then text."""
    values = [(split, name, value) for split, found in facts.metrics.items() for name, value in found.items()]
    results = [
        EvalResult(
            task_type=facts.task or "other",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=name,
            metric_value=value,
        )
        for dataset in facts.datasets[:1]  # a score can't be shared out over several
        for split, name, value in values
    ]
    tags = [*(TAGS if facts.ode else ()), *facts.tags]
    if facts.solver and facts.solver.get("strategy") == "mgrit":
        tags.append("mgrit")
    data = ModelCardData(
        language=facts.language,
        license=facts.license,
        library_name="peft" if facts.kind == "adapters" else "transformers",
        pipeline_tag=facts.task,
        base_model=facts.base_model if facts.base_model and is_hub_name(facts.base_model) else None,
        datasets=[name for name in facts.datasets if is_hub_name(name)] or None,
        metrics=list(dict.fromkeys(name for _, name, _ in values)) or None,
        tags=list(dict.fromkeys(tags)) or None,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )
    rows = _spread(facts.evaluation)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"number": _number, "tuple": tuple}
    content = environment.from_string(_TEMPLATE.read_text("utf-8")).render(
        card_data=data.to_yaml(),
        facts=dataclasses.replace(facts, evaluation=rows, training=_in_force(facts.training)),
        auto_class=facts.auto_class or "AutoModel",
        evaluation_names=[name for name in (rows[0] if rows else ()) if name != "step"],
        is_hub_name=is_hub_name,
        chosen=_CHOSEN,
        mark=MARK,
    )
    return ModelCard(content)


def merged(made: ModelCard, there: ModelCard | None) -> ModelCard:
    """The card to push: `made` with the tags of the one that is there; that one, tagged, if people have written it."""
    if there is None:
        return made
    kept, other = (made, there) if MARK in there.text else (there, made)
    kept.data["tags"] = list(dict.fromkeys([*(kept.data.get("tags") or []), *(other.data.get("tags") or [])])) or None
    return kept


def solver_facts(config: Mapping[str, Any], *, lp_size: int, **more: Any) -> dict[str, Any]:
    """`CardFacts.solver` of a `LayerParallelConfig.to_dict()`, without what had no part in the training."""
    more = {"lp_size": lp_size} | more
    default = LayerParallelConfig().to_dict()
    values = default | dict(config) | more
    names = ["strategy", "micro_batches"]
    if values["strategy"] == "mgrit":
        names += ["coarse_operator", "coarsening", "relaxation", "forward_iterations", "backward_iterations"]
    unusual = ["ends", "increment_penalty", "stacked", "acceleration" if values["strategy"] == "mgrit" else "schedule"]
    names += [name for name in unusual if values[name] != default[name]]
    return {name: values[name] for name in [*names, *more]}


def metrics_of(entry: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The metrics of an evaluation, which the Trainer calls <prefix>_<name>, under their own names and without what it
    adds of its timing."""
    start = prefix + "_"
    names = {key: key.removeprefix(start) for key in entry if key.startswith(start)}
    return {name: entry[key] for key, name in names.items() if name not in _TIMING}


def changes_of(log: Iterable[Mapping[str, Any]]) -> tuple[tuple[int, str], ...]:
    """(step, settings) of the controller's checks, where they differ from those before."""
    changes: list[tuple[int, str]] = []
    for entry in log:
        name = entry.get("lp_check_name")
        if name is not None and (not changes or changes[-1][1] != name):
            changes.append((entry["step"], name))
    return tuple(changes)


def facts_of_class(architecture: str | None) -> dict[str, Any]:
    """`CardFacts` fields that the name of a class of transformers tells: architecture, auto_class and task."""
    from hf_layerpar.compat.transformers import TASK_MAPPING, auto_names

    def holds(names: Mapping[str, Any]) -> bool:
        return any(
            architecture == name or (isinstance(name, tuple) and architecture in name) for name in names.values()
        )

    autos = [name for name, names in auto_names().items() if holds(names)]
    # the one for pretraining stands in another's place where a family has no head of its own for it
    autos.sort(key=lambda name: (name != "AutoModel", name == "AutoModelForPreTraining"))
    task = next((task for task, names in TASK_MAPPING.items() if holds(names)), None)
    return {"architecture": architecture, "auto_class": autos[0] if autos else None, "task": task}


def is_hub_name(name: str) -> bool:
    """Whether it has the form owner/name, as models and data sets on the Hub have."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _in_force(training: Mapping[str, Any]) -> dict[str, Any]:
    """Without the epochs where a number of steps overrides them, and without that where it is -1."""
    unused = "num_train_epochs" if training.get("max_steps", -1) > 0 else "max_steps"
    return {name: value for name, value in training.items() if name != unused and value is not None}


def _spread(rows: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """At most a dozen of the rows, from the first to the last; all have the first one's names."""
    rows = list(rows)
    if len(rows) > _MOST_EVALUATIONS:
        last = len(rows) - 1
        rows = [rows[round(i * last / (_MOST_EVALUATIONS - 1))] for i in range(_MOST_EVALUATIONS)]
    return tuple({name: row.get(name) for name in rows[0]} for row in rows)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_number, value))
    return "" if value is None else str(value)
