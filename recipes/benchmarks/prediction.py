"""What the simulator says of our sides on the bare stack, from costs that are measured in the same processes."""

from __future__ import annotations

from collections.abc import Collection

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.plan.planner import predict_step
from hf_layerpar.run.calibrate import calibrate
from recipes.benchmarks.sides import Place, local_communicator, our_calls, our_configs, our_interleaved, owner_of
from recipes.benchmarks.stack import make_stack, make_state


def predicted_seconds(num_layers: int, names: Collection[str]) -> dict[str, float]:
    """Seconds of a step of those of our sides that are among `names`. Collective: all ranks work while costs are
    measured, as they do in a step."""
    place, communicator, stack = Place.here(), local_communicator(), make_stack(num_layers)
    contiguous = owner_of(LayerParallelConfig(), num_layers, place.size, interleaved=False)
    calls = our_calls(stack, contiguous, place.rank)
    own = list(place.layers(num_layers))
    costs = calibrate(calls, make_state(seed=1), communicator, layers=own, seconds=4.0)
    found = {}
    sides = [*((name, config, False) for name, config in our_configs(place.size)), *our_interleaved(place.size)]
    for name, config, interleaved in sides:
        if name not in names:
            continue
        owner = owner_of(config, num_layers, place.size, interleaved=interleaved)
        found[name] = predict_step(config, owner, costs, num_ranks=place.size).makespan
    return found
