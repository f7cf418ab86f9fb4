"""Buffers, settings and verdicts from made-up readings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.diagnosis.readings import BufferTrial, LayerReading, Prediction, SettingReading
from hf_layerpar.diagnosis.suggest import best_trial, is_friendly, proposed_buffers, standing_out, suggest

NAN = float("nan")


def layers(*lipschitz: float, stack: str = "layers", increment: float = 0.1) -> list[LayerReading]:
    return [
        LayerReading(
            stack=stack,
            index=n,
            step_size=1.0,
            increment=increment,
            lipschitz=value,
            growth=1.0,
            outlier=1.5,
            adjoint=1.0,
        )
        for n, value in enumerate(lipschitz)
    ]


def reading(operator="aggregate", c=2, iterations=(1, 1), cosine=0.99, noise: float | None = 0.1) -> SettingReading:
    return SettingReading(
        config=LayerParallelConfig(
            strategy="mgrit",
            coarse_operator=operator,
            coarsening=c,
            forward_iterations=iterations[0],
            backward_iterations=iterations[1],
        ),
        state_error=0.1,
        loss_error=0.1,
        cosine=cosine,
        norm_ratio=1.0,
        bias_to_noise=noise,
        forward_factor=0.5,
        backward_factor=0.5,
    )


def judged(*pairs: tuple[SettingReading, float], pipeline: float = 0.5, buffers=(0, 0), outer=()):
    """The suggestion for readings and the predicted shares of their steps."""
    predictions = {
        r.config: Prediction(
            config=replace(r.config, micro_batches=2), split="interleaved", seconds=10 * share, share=share
        )
        for r, share in pairs
    }
    exact = Prediction(config=LayerParallelConfig(micro_batches=4), split=None, seconds=10 * pipeline, share=pipeline)
    return suggest([r for r, _ in pairs], predictions, exact, list(outer), buffers, 8)


@pytest.mark.parametrize(
    ("cosine", "noise", "friendly"),
    [
        (0.95, 0.5, True),
        (0.949, 0.1, False),
        (0.99, 0.51, False),
        (0.99, None, True),
        (NAN, 0.1, False),
        (0.99, NAN, False),
    ],
)
def test_friendly_needs_direction_and_small_bias(cosine, noise, friendly):
    assert is_friendly(reading(cosine=cosine, noise=noise)) is friendly


def test_proposed_are_the_layers_that_stand_out_most_wherever_they_are():
    assert proposed_buffers(layers(*[1.0] * 12)) == [(0, 0)]
    wild = layers(1.0, 9.0, *[1.0] * 5, 50.0, *[1.0] * 7, 8.0)
    assert standing_out(wild) == [7, 1, 15]
    assert proposed_buffers(wild) == [(0, 0), (0, 7, 0), (0, 1, 7, 0), (0, 1, 7, 1)]
    # no number at all stands out most, and no more than a quarter is proposed
    wild = layers(NAN, *[1.0] * 3, 50.0, *[1.0] * 4, 9.0, 8.0, 7.0)
    assert proposed_buffers(wild)[-1] == (1, 4, 9, 0)


def test_increments_and_adjoints_count_too_and_all_stacks_share_what_is_proposed():
    first = layers(*[1.0] * 8, stack="encoder")
    first[0] = replace(first[0], increment=1.0)
    second = layers(*[1.0] * 7, 8.0, stack="decoder")
    second[4] = replace(second[4], adjoint=100.0)
    assert proposed_buffers([*first, *second]) == [(0, 0), (1, 4, 0), (1, 4, 1)]
    # places between mean another layer in a deeper stack: ends alone
    deeper = layers(*[1.0] * 9, 8.0, stack="encoder")
    assert proposed_buffers([*deeper, *second]) == [(0, 0), (0, 1)]


def test_the_fewest_buffers_that_do_are_taken():
    def trials(*cosines: float) -> list[BufferTrial]:
        return [BufferTrial(buffers=(n, 0), cosine=cosine) for n, cosine in enumerate(cosines)]

    assert best_trial(trials(0.991, 0.9999)) == (0, 0)
    assert best_trial(trials(0.5, 0.9, 0.98, 0.985)) == (2, 0)
    assert best_trial(trials(NAN, 0.3, 0.1)) == (1, 0)


def test_the_layer_that_amplifies_most_is_named():
    wild = layers(*[1.0] * 3, 50.0, *[1.0] * 8)
    verdict = judged((reading(cosine=0.3), 0.2), outer=wild).verdict
    assert "layer 3 of layers has Lipschitz estimate 50" in verdict


def test_the_cheapest_friendly_setting_that_pays_is_suggested():
    cheap, good, better = reading("identity", cosine=0.5), reading(c=4), reading(c=2, cosine=0.999)
    found = judged((better, 0.4), (good, 0.3), (cheap, 0.1), buffers=(1, 2))
    assert found.friendly
    assert found.best == good
    assert found.config == replace(good.config, micro_batches=2)
    assert (found.split, found.buffers) == ("interleaved", (1, 2))
    assert found.verdict.startswith("layer-parallel: aggregate 1/1 c=4 with buffers (1, 2), interleaved, predicted")
    assert "0.30 of serial on 8 ranks (0.50 for the exact pipeline), gradient cosine 0.990" in found.verdict


def test_friendly_but_hardly_faster_is_the_pipeline():
    found = judged((reading(), 0.49), (reading(c=4), 0.6), (reading("identity", cosine=0.2), 0.1))
    assert not found.friendly
    assert found.config == LayerParallelConfig(micro_batches=4)
    assert found.verdict.startswith("the exact pipeline (4 micro-batches, predicted step 0.50 of serial on 8 ranks)")
    assert "not worth it, the fastest of them being aggregate 1/1 c=2 at a predicted 0.49" in found.verdict


def test_nothing_friendly_names_the_best_of_those_that_would_pay():
    slow, fast = reading(cosine=0.9, iterations=(2, 2)), reading("identity", cosine=0.6)
    found = judged((slow, 0.7), (fast, 0.2), (reading("rediscretize", cosine=NAN), 0.3))
    assert not found.friendly
    assert found.best == fast
    assert "best gradient of a setting that would be faster is that of identity 1/1 c=2" in found.verdict
    none_pays = judged((slow, 0.7), (fast, 0.6))
    assert none_pays.best == slow
    assert "of a setting measured is that of aggregate 2/2 c=2" in none_pays.verdict


def test_a_stack_too_short_for_any_setting():
    found = judged()
    assert (found.friendly, found.best) == (False, None)
    assert "too short" in found.verdict
