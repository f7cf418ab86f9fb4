"""The paper's five systems in small: which recipe, which settings, and how each is trained.

Sides of a system: the exact gradient ("serial"), the paper's layer-parallel settings watched by its indicator ("paper",
which goes exact for good once a convergence factor passes 1), the same settings until two thirds of the run and exact
from there on ("switched"), and the adaptive controller ("adaptive"). The paper's settings: arXiv 2601.09026, section 4
and its appendix.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from types import ModuleType

UNBUFFERED = ", no buffers"
"""Ends the names of sides whose network has no buffer layers; their serial side has it too."""
EXACT = ("--strategy", "pipeline")
SWITCHED_AFTER = 2 / 3
"""The share of a "switched" run that is trained layer-parallel."""


def mgrit(operator: str, coarsening: int = 4, forward: int = 1, backward: int = 1) -> tuple[str, ...]:
    """Options of MGRIT on two levels; 0 iterations are an exact sweep."""
    settings = {"coarse_operator": operator, "coarsening": coarsening}
    settings |= {"forward_iterations": forward, "backward_iterations": backward}
    return ("--strategy", "mgrit", *(text for k, v in settings.items() for text in (f"--{k}", str(v))))


@dataclass(frozen=True)
class System:
    """A recipe with its settings.

    recipe: its module in `recipes`.
    figure: where the paper shows it.
    metric: the figure of the validation split by which sides are compared, and whether more of it is better.
    options: of every side.
    coarsening, forward, backward: the paper's settings; 0 iterations are an exact sweep.
    steps: of training. Checks are made every twentieth of them.
    more_sides: those that it has beside the usual ones, by name.
    """

    recipe: str
    figure: str
    metric: str
    more_is_better: bool
    options: tuple[str, ...]
    coarsening: int
    forward: int
    backward: int
    steps: int
    more_sides: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"recipes.{self.recipe}")

    @property
    def sides(self) -> dict[str, tuple[str, ...]]:
        """The options of each side, by its name."""
        watch = ("--check_every", str(self.steps // 20), "--check_gradient", "true", "--controller_ranks", "8")
        paper = mgrit("rediscretize", self.coarsening, self.forward, self.backward)
        ours = mgrit("aggregate", self.coarsening, 1, 1)
        return {
            "serial": EXACT,
            "paper": (*paper, *watch, "--controller", "paper"),
            "switched": paper,
            "adaptive": (*ours, *watch, "--controller", "adaptive"),
        } | self.more_sides

    def command(self, side: str, seed: int, folder: str) -> list[str]:
        """The recipe's options for one run."""
        always = ["--micro_batches", "1", "--agreement_batches", "0", "--max_steps", str(self.steps)]
        always += ["--seed", str(seed), "--output_dir", folder]
        return [*self.options, *self.sides[side], *always]


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NO_BUFFERS = words("--inner_layers 20 --buffers 0 0 --step_size 1")

SYSTEMS = {
    "morphology": System(
        recipe="tag_morphology",
        figure="Figure 3: MC, 64 layers",
        metric="accuracy",
        more_is_better=True,
        options=words("--eval_steps 100"),
        coarsening=2,
        forward=1,
        backward=1,
        steps=800,
    ),
    "translation": System(
        recipe="translate_marian",
        figure="Figure 3: MT, encoder and decoder of 6 inner layers",
        metric="bleu",
        more_is_better=True,
        options=words("--eval_steps 100 --max_eval_samples 512"),
        coarsening=3,
        forward=2,
        backward=1,
        steps=1000,
        more_sides={"paper with 1/1": mgrit("rediscretize", 3)},
    ),
    "bert": System(
        recipe="pretrain_bert",
        figure="Figure 4: BERT, 2 + 16 + 2 layers",
        metric="loss",
        more_is_better=False,
        options=words("--eval_steps 100"),
        coarsening=4,
        forward=1,
        backward=1,
        steps=1500,
    ),
    "gpt": System(
        recipe="pretrain_gpt2",
        figure="Figures 5 and 12: GPT-2, 2 + 16 + 2 layers, and 20 layers without buffers",
        metric="loss",
        more_is_better=False,
        options=words(
            "--width 64 --heads 4 --block_size 32 --max_eval_blocks 128 --per_device_train_batch_size 8 "
            "--eval_steps 200"
        ),
        coarsening=4,
        forward=0,
        backward=1,
        steps=2000,
        more_sides={
            f"serial{UNBUFFERED}": (*EXACT, *NO_BUFFERS),
            f"paper{UNBUFFERED}": (*mgrit("rediscretize", 4, 0, 1), *NO_BUFFERS),
        },
    ),
    "vit": System(
        recipe="train_vit",
        figure="Figures 4 and 5: ViT, 2 + 28 + 2 layers",
        metric="accuracy",
        more_is_better=True,
        options=words("--eval_steps 100"),
        coarsening=4,
        forward=0,
        backward=1,
        steps=800,
    ),
}
