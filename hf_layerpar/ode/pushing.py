"""`push_to_hub` of a converted model: what its `save_pretrained` writes and a model card, in one commit."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from hf_layerpar.compat.transformers import CHECKPOINT_PATH, has_adapters
from hf_layerpar.errors import CheckpointError, UnsupportedModelError
from hf_layerpar.hub.card import CardFacts, Kind, facts_of_class, make_card, merged
from hf_layerpar.hub.upload import CARD_NAME, Repository
from hf_layerpar.ode.convert import ode_view
from hf_layerpar.ode.files import is_of_a_checkpoint
from hf_layerpar.ode.fold import can_fold

VERSIONS = ("hf_layerpar", "transformers", "torch")


@dataclasses.dataclass(eq=False)
class PushToHub:
    """The `push_to_hub` of a converted model. Plain data, so that deepcopy and pickle follow it to the copy.

    `parallelize` puts that of its handle in its place, which gathers the layers.
    """

    model: PreTrainedModel

    def __call__(self, repo_id: str, **options: Any) -> CommitInfo:
        """As `PreTrainedModel.push_to_hub`, with the same options; see `ModelPush`."""
        if any(stack.sharded for stack in ode_view(self.model).stacks):
            raise CheckpointError(
                "this rank holds only a part of the layers; call push_to_hub of the model that was parallelized, on "
                "all its lp ranks"
            )
        return ModelPush(repo_id, **options)(self.model)


class ModelPush:
    """A push in two steps, so that a missing permission is known before anything is gathered or written.

    A card that is there and was written by people is kept, and tagged.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: str | list[str] | None = None,
        **options: Any,
    ) -> None:
        """Makes the repository where there is none. `options` are for `HfApi.create_repo`."""
        self.message, self.description = commit_message or "Upload model", commit_description
        self.max_shard_size = max_shard_size
        self.tags = [tags] if isinstance(tags, str) else list(tags or [])
        self.repository = Repository(
            repo_id, token=token, revision=revision, create_pr=create_pr, private=private, **options
        )

    def __call__(
        self, model: Any, state_dict: dict[str, Tensor] | None = None, solver: Mapping[str, Any] | None = None
    ) -> CommitInfo:
        """Writes the model (a converted one, or its PEFT wrapper) aside and pushes that.

        state_dict: the whole one, where this process lacks layers. solver: for the card, as in `CardFacts`.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            given = {} if state_dict is None else {"state_dict": state_dict}
            model.save_pretrained(folder, max_shard_size=self.max_shard_size, **given)
            return self.upload(model, folder, os.listdir(folder), solver)

    def upload(
        self,
        model: Any,
        folder: Path,
        names: list[str],
        solver: Mapping[str, Any] | None = None,
        variant: str | None = None,
    ) -> CommitInfo:
        """Pushes the files `names` of `folder`, and the card, which is put there too."""
        repo_id = self.repository.repo_id
        tags = (*(getattr(model, "model_tags", None) or ()), *self.tags)
        facts = facts_for_card(model)
        facts["versions"] = {name: importlib.metadata.version(name) for name in VERSIONS}
        if facts["base_model"] == repo_id:
            facts["base_model"] = None
        card = make_card(CardFacts(name=repo_id, tags=tags, solver=solver, **facts))
        merged(card, self.repository.card()).save(folder / CARD_NAME)
        return self.repository.commit(
            [(name, folder / name) for name in sorted({*names, CARD_NAME})],
            self.message,
            description=self.description,
            # not for adapters, which may lie beside their base model
            replaces=lambda name: CONFIG_NAME in names and is_of_a_checkpoint(name, variant),
        )


def check_pushable(model: Any) -> None:
    """Raises UnsupportedModelError for a model of which there is no card."""
    if not any(isinstance(module, PreTrainedModel) for module in model.modules()):
        raise UnsupportedModelError(
            f"push_to_hub of a {type(model).__name__}, which is no transformers model: call save_pretrained, and "
            "upload the folder with huggingface_hub"
        )


def facts_for_card(model: Any) -> dict[str, Any]:
    """`CardFacts` fields that a converted model (or its PEFT wrapper) tells; on any lp rank."""
    view = ode_view(model)
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    adapters = base is not model or has_adapters(base)
    return facts_of_class(type(base).__name__) | {
        "kind": "adapters" if adapters else kind_of(base, base.state_dict()),
        "ode": view.settings.to_dict(),
        "layers": {stack.path: len(stack.layers) for stack in view.stacks},
        "base_model": hub_name(getattr(base.config, CHECKPOINT_PATH, None)),
    }


def kind_of(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> Kind:
    """What `save_pretrained` writes of a converted model: plain, folded or code."""
    view = ode_view(model)
    if all(step_size == 1 for stack in view.stacks for step_size in stack.step_sizes):
        return "plain"
    return "folded" if view.settings.form == "split" and can_fold(model, state_dict) else "code"


def hub_name(name: str | None) -> str | None:
    """The name a model was loaded by, unless it was a folder, whose path nobody else knows."""
    return None if not name or os.path.exists(name) or name.startswith((os.sep, ".")) else name
