"""`predict_with_generate`: the stock Seq2SeqTrainer's predictions, every sample once, on every mesh."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers as hf

from hf_layerpar.errors import ConfigurationError
from hf_layerpar.training.trainer import LayerParallelTrainer
from tests import zoo
from tests.multiproc import RankPool
from tests.training import evaluating, runs

COUNT = 7  # neither the batch size nor the number of ranks divides it


def test_predictions_are_those_of_stock(
    ranks1: RankPool, ranks2: RankPool, ranks3: RankPool, ranks4: RankPool, tmp_path
) -> None:
    beams = {"predict_with_generate": True, "generation_max_length": 6, "generation_num_beams": 2}
    stock = evaluating.generate_with_stock(str(tmp_path), "marian", beams, COUNT)
    assert len(stock["predictions"]) == COUNT
    one = ranks1.run(evaluating.generate, str(tmp_path), "marian", beams, COUNT)[0]
    assert one["predictions"] == stock["predictions"]
    assert one["labels"] == stock["labels"]
    for pool, lp_size in ((ranks2, 2), (ranks3, 3), (ranks2, 1), (ranks4, 2)):
        for rank in pool.run(evaluating.generate, str(tmp_path), "marian", beams | {"lp_size": lp_size}, COUNT):
            assert rank["predictions"] == stock["predictions"]
            assert rank["labels"] == stock["labels"]
            assert rank["eval_count"] == COUNT
            if pool.world == lp_size:  # the same batches
                assert rank["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-5)


def test_a_decoder_sampling_longer_than_its_configuration(ranks1: RankPool, ranks4: RankPool, tmp_path) -> None:
    """Sequences of unequal length over the dp ranks; the arguments' generation_config counts."""
    config = hf.GenerationConfig(max_new_tokens=9, eos_token_id=list(range(5, 40)), pad_token_id=zoo.PAD)
    settings = {"predict_with_generate": True, "generation_config": config, "per_device_eval_batch_size": 1}
    one = ranks1.run(evaluating.generate, str(tmp_path), "llama", settings, 5)[0]
    assert len({len(row) for row in one["predictions"]}) > 1
    for rank in ranks4.run(evaluating.generate, str(tmp_path), "llama", settings | {"lp_size": 2}, 5):
        assert rank["predictions"] == one["predictions"]
        assert rank["eval_count"] == 5


def test_evaluation_during_training_draws_nothing_apart(ranks2: RankPool, tmp_path) -> None:
    """Sampling moves the random streams, and training goes on with masks that the ranks have in common."""
    config = hf.GenerationConfig(do_sample=True, max_new_tokens=4, pad_token_id=zoo.PAD)
    settings = {"predict_with_generate": True, "generation_config": config, "eval_strategy": "steps", "eval_steps": 2}
    first, second = ranks2.run(evaluating.train_and_generate, str(tmp_path), settings | {"lp_size": 2})
    assert first["generated"] == second["generated"]
    assert len(first["generated"]) == 2
    assert first["losses"] == second["losses"]


def test_without_generation_it_is_the_trainer(tmp_path) -> None:
    run = runs.trainer(str(tmp_path), "llama", {"per_device_eval_batch_size": 4})
    stock = hf.Trainer(runs.build("llama"), hf.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    stock.args.per_device_eval_batch_size = 4
    ours, theirs = (t.predict(runs.Samples("llama", 6, 1000)) for t in (run, stock))
    np.testing.assert_allclose(ours.predictions, theirs.predictions, atol=1e-5)
    assert ours.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], abs=1e-6)


def test_refusals(ranks2: RankPool, tmp_path) -> None:
    settings: dict[str, Any] = {"predict_with_generate": True}
    with pytest.raises(ConfigurationError, match="predict_with_generate with a BertForSequenceClassification"):
        LayerParallelTrainer(runs.build("bert_classifier"), runs.arguments(str(tmp_path), **settings))
    settings["generation_config"] = hf.GenerationConfig(num_return_sequences=2, num_beams=2, max_new_tokens=2)
    for message in ranks2.run(evaluating.generation_error, str(tmp_path), settings | {"lp_size": 2}):
        assert "num_return_sequences=1" in message
        assert "4 sequences for 2 samples" in message
