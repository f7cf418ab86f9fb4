"""`LayerParallelTrainer`: the HuggingFace Trainer on a dp x lp mesh."""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Seq2SeqTrainer, Trainer

from hf_layerpar.compat.accelerate import (
    BatchSharing,
    check_accelerator,
    clear_device_cache,
    compiler_asked_for,
    keep_unwrapped,
)
from hf_layerpar.compat.trainer import check_attributes, find_batch_size, loss_is_scaled, unwrap_peft_model
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.ode.rehearsal import loss_and_metrics
from hf_layerpar.run.mesh import build_mesh
from hf_layerpar.run.sharing import share
from hf_layerpar.run.transport import Attempt, GroupTransport, LocalTransport, fact
from hf_layerpar.sharding import layer_parallel
from hf_layerpar.training.arguments import LayerParallelTrainingArguments
from hf_layerpar.training.callbacks import solver_log
from hf_layerpar.training.collectives import averaged_gradients, gather_samples
from hf_layerpar.training.half import check_parameters, loss_scale, use_fp16
from hf_layerpar.training.launched import unseen_by_accelerate
from hf_layerpar.training.loading import CountedStream, innermost_sampler, real_rows
from hf_layerpar.training.losses import SmoothedCrossEntropy, depends_on_item_count
from hf_layerpar.training.processes import Processes
from hf_layerpar.training.pushing import HubPushing
from hf_layerpar.training.spreading import is_parallel, spread
from hf_layerpar.training.streams import SeededCollator, kept_streams, main_streams, set_main_streams
from hf_layerpar.training.support import refuse_trainer, refuse_unsupported
from hf_layerpar.training.watching import STATE, Watch

_CONTROLS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


class LayerParallelTrainer(HubPushing, Seq2SeqTrainer):
    """`transformers.Trainer` whose model's layers live on `args.lp_size` processes; the others are data parallel.

    Everything is used as in the stock Trainer. The differences:

    - `args` must be `LayerParallelTrainingArguments`. A model that is not converted is converted at step size 1.
    - `model` (or what `model_init` returns) may be the path or Hub id of a checkpoint: then every process reads only
      its own layers and what is outside of layers (`hf_layerpar.from_pretrained`).
    - The lp ranks of one dp rank share one batch (that of lp rank 0), so batch sizes, token counts, the loss average
      and gathered predictions count dp ranks.
    - `compute_loss` should only compute: it is called for every micro-batch, on several lp ranks (each as far as its
      layers), and now and then to see how the loss is made. What is costly in it (a teacher) comes after the model.
    - A model whose loss ignores `num_items_in_batch` is recognised by computing the loss of its first batch twice
      (stock trusts the signature of `forward` and scales such gradients wrongly).
    - A push to the Hub is one commit, with a card that says how the layers were solved.
    - Checkpoints are written whole or not at all, and a run resumes bit-identically at another lp size.
    - Training logs have the solver's residuals, convergence factors and times (`lp_*`), and the metrics that
      `compute_loss` may return beside the loss in training, `(loss, {"name": scalar})`.
    - What a callback asks for on one process (to stop, save, evaluate or log) all processes do.
    - With `predict_with_generate` it evaluates and predicts as `Seq2SeqTrainer` does, but every sample counts once
      (stock repeats samples to fill the last batch, and weighs the loss of a small last batch as that of a full one).

    Raises ConfigurationError at construction for what can't work, and those of `convert_to_ode` and `parallelize`.
    RankMismatchError on all processes where they were given other arguments, models, data or optimizers, or are about
    to do different things.
    """

    args: LayerParallelTrainingArguments

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str] | None = None,
        args: LayerParallelTrainingArguments | None = None,
        *positional: Any,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, LayerParallelTrainingArguments):
            raise ConfigurationError(
                f"args is a {type(args).__name__}; LayerParallelTrainer needs LayerParallelTrainingArguments, which "
                "take the same arguments and lp_size"
            )
        refuse_trainer(type(self))
        self._everyone = Processes(args)
        self._everyone.agree_on_settings(args)
        refuse_unsupported(args, None if isinstance(model, str | os.PathLike) else model)
        self.mesh = build_mesh(args.lp_size, args.tp_size, args.device.type)
        group = self.mesh.batch_group
        names = "lp ranks" if args.tp_size == 1 else "ranks of a batch"
        self._batch_ranks = LocalTransport() if group is None else GroupTransport(group, names)
        self._collator: SeededCollator | None = None
        self._order: torch.Generator | None = None
        self._spreading_args = args  # call_model_init runs inside super().__init__
        self._compiling: dict[str, str] = {}
        if model is not None:
            model = spread(model, args, self.mesh, self._everyone)
        Trainer.__init__(self, model, args, *positional, **kwargs)  # type: ignore[arg-type]
        check_attributes(self)
        if args.generation_config is not None:  # Seq2SeqTrainer's own __init__ lacks optimizer_cls_and_kwargs
            self.model.generation_config = self.load_generation_config(args.generation_config)  # type: ignore[arg-type]
        if self.mesh.lp_size > 1 and self.optimizer is not None:
            raise ConfigurationError(
                "optimizers=(optimizer, ...) holds parameters of layers that other processes own; pass "
                "optimizer_cls_and_kwargs=(class, kwargs), or override create_optimizer"
            )
        if self.label_smoother is not None:
            self.label_smoother = SmoothedCrossEntropy(epsilon=self.label_smoother.epsilon)
        declared = getattr(unwrap_peft_model(self.model), "accepts_loss_kwargs", None)
        self._item_count_unknown = declared is None and self.model_accepts_loss_kwargs
        self._summed_metrics, self._metric_batches = Counter[str](), 0
        self._beside_loss: tuple[dict[str, float], dict[str, str]] = {}, {}
        self._watch: Watch | None = None
        self._watched_run: Any = None
        if args.controller != "off":
            self._watch = Watch(args, self.layer_parallel, self.mesh)

    # ---- the model on the mesh
    def call_model_init(self, trial: Any = None) -> nn.Module:
        given = super().call_model_init(trial)
        model = spread(given, self._spreading_args, self.mesh, self._everyone)
        self._compile(model)
        return model

    def _compile(self, model: nn.Module) -> None:
        if self._compiling:
            layer_parallel(model).compile_layers(**self._compiling)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        made = super()._build_accelerator_args(**kwargs)
        made.pop("parallelism_config", None)  # of which accelerate would make meshes of its own
        return made

    def create_accelerator_and_postprocess(self) -> None:
        with unseen_by_accelerate():
            super().create_accelerator_and_postprocess()
        check_accelerator(self.accelerator)
        keep_unwrapped(self.accelerator, is_parallel)  # gradients are averaged here
        if self.mesh.world_size > 1:
            self.accelerator.gather_for_metrics = self._gather_for_metrics
        if self.accelerator.mixed_precision == "fp16":
            use_fp16(self.accelerator)
        self._compiling = compiler_asked_for(self.accelerator)
        if self.model is not None:
            self._compile(self.model)
        loading = self.accelerator.dataloader_config
        if loading.data_seed is None:  # stock takes the main stream's current seed, which a resumed run may not have
            loading.data_seed = self._data_seed
        if self.mesh.world_size > 1 and loading.dispatch_batches is None:
            loading.dispatch_batches = False  # process 0 would deal iterable datasets out by world rank
        sharing = BatchSharing(self.mesh.dp_size, self.mesh.batch_size)
        self.accelerator.state.device_mesh = sharing if self.mesh.batch_size > 1 else None

    def get_tp_size(self) -> int:
        """The processes that share a batch: stock divides batch sizes, item counts and the loss scale by it."""
        return self.mesh.batch_size

    # ---- all processes do the same
    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        self._agree(
            "train",
            resume_from_checkpoint=str(resume_from_checkpoint or None),
            rows=_length(self.train_dataset),
            **{"rows to evaluate": {str(name): _length(dataset) for name, dataset in datasets.items()}},
        )
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        made = Attempt(self._make_optimizer)
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        facts = {"max_steps": max_steps, "batches": _length(train_dataloader), "optimizer": type(optimizer).__name__}
        facts["optimizer's defaults"] = fact(getattr(optimizer, "defaults", {}))
        self._everyone.agree(facts | {"about to": "start to train"}, made.error)
        vars(self)["create_optimizer"] = lambda *_: self.optimizer  # stock would call it again
        try:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        finally:
            del vars(self)["create_optimizer"]
        self._everyone.agree_on_optimizer(self.model, optimizer, self.lr_scheduler)
        return prepared

    def _make_optimizer(self) -> Any:
        if self.accelerator.scaler is not None:
            check_parameters(self.model.parameters())
        return self.create_optimizer()

    def _agree(self, doing: str, **facts: Any) -> None:
        self._everyone.agree_on_settings(self.args, **{"about to": doing}, **facts)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._join_controls()
        acts = self.control.should_log or self.control.should_evaluate or self.control.should_save
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            numbers, modes = solver_log(self.layer_parallel.report())
            self._beside_loss = numbers | self._mean_metrics(), modes
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if acts:
            self._join_controls()  # a callback may have asked to stop meanwhile

    def _join_controls(self) -> None:
        asked = [bool(getattr(self.control, name)) for name in _CONTROLS]
        *joined, writing = self._everyone.any_of("go on after a step", [*asked, self.is_writing])
        for name, value in zip(_CONTROLS, joined, strict=True):
            setattr(self.control, name, value)
        if not writing:
            self._finish_saving()

    # ---- batches
    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        if self.mesh.dp_size > 1 and isinstance(dataset, IterableDataset):
            if not is_training and self.args.dataloader_num_workers > 0:
                raise ConfigurationError(
                    f"an iterable evaluation dataset can't be counted over {self.mesh.dp_size} dp ranks with "
                    f"dataloader_num_workers={self.args.dataloader_num_workers}; use 0 workers, or give it indices"
                )
            dataset = CountedStream(dataset)
        loader = super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        if is_training:
            base = getattr(loader, "base_dataloader", loader)
            self._collator = SeededCollator(base.collate_fn, self._data_seed, self.mesh.dp_rank)
            base.collate_fn = self._collator
            base.worker_init_fn = self._collator.start_worker
            base.generator = torch.Generator()  # a new iterator draws from the main stream otherwise
        return loader

    def _run_epoch(self, *args: Any, epoch: int, train_dataloader: Any, **kwargs: Any) -> None:
        """Ties the samples' order to the epoch and their randomness to the step, also when resuming inside an epoch."""
        if self._collator is not None:
            self._collator.index = self.state.global_step * self.args.gradient_accumulation_steps
        sampler = innermost_sampler(train_dataloader)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        elif getattr(sampler, "generator", self) in (None, self._order):  # it would draw from the main stream
            sampler.generator = self._order = torch.Generator().manual_seed(self._data_seed + epoch)
        super()._run_epoch(*args, epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        def read() -> list[Any]:
            with kept_streams():
                if self._collator is not None:
                    self._collator.reseed()
                return list(itertools.islice(epoch_iterator, num_batches))

        found = Attempt(read)
        batches = self._share(f"share the batches of step {self.state.global_step}", found.value, found.error)
        return batches, self._get_num_items_in_batch(batches, device)

    def _share(self, doing: str, data: Any, error: Exception | None = None) -> Any:
        """The first rank's data on all ranks of the batch, and its random streams too: nothing a collator does can part
        them."""
        self._batch_ranks.agree({"about to": doing}, error)
        if self.mesh.batch_size == 1:
            return data
        assert self.mesh.batch_group is not None
        data, streams = share((data, main_streams()), self.mesh.batch_group, self.args.device)
        set_main_streams(streams)
        return data

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        if self._item_count_unknown and self.compute_loss_func is None and batch_samples:
            self._find_out_about_item_count(batch_samples[0])
        count = super()._get_num_items_in_batch(batch_samples, device)
        if count is not None and not self.args.average_tokens_across_devices:
            count = count * self.mesh.batch_size  # stock divides by get_tp_size() here too, though it hasn't summed
        return count

    def _find_out_about_item_count(self, batch: Any) -> None:
        inputs = self._prepare_inputs(batch)
        if "labels" not in inputs:
            return

        def loss(count: Tensor) -> Tensor:
            with self.compute_loss_context_manager():
                return loss_and_metrics(self.compute_loss(self.model, dict(inputs), num_items_in_batch=count))[0]

        depends = depends_on_item_count(self.model, loss, self.args.device)
        self._item_count_unknown = depends is None
        if depends is False:
            self.model_accepts_loss_kwargs = False
            if self.label_smoother is None:  # the smoother, not the head, may be what depends on it
                unwrap_peft_model(self.model).accepts_loss_kwargs = False  # type: ignore[assignment]

    # ---- steps
    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As stock, by `LayerParallel.train_step`: head and loss run on the rank that has them, part by part where the
        batch is cut into micro-batches, whatever `compute_loss` and `compute_loss_func` are."""
        self._check_settings(model, inputs)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # type: ignore[union-attr]
        inputs = self._prepare_inputs(inputs)

        def loss(batch: Mapping[str, Any]) -> Tensor:
            with self.compute_loss_context_manager():
                return self.compute_loss(model, dict(batch), num_items_in_batch=num_items_in_batch)  # type: ignore[return-value]

        scaled = loss_is_scaled(self, num_items_in_batch)
        accumulated = self.current_gradient_accumulation_steps
        steps, share = 1 if scaled else accumulated, 1 / self.accelerator.gradient_accumulation_steps
        share *= loss_scale(self.accelerator)
        group = self.mesh.dp_group if self.accelerator.sync_gradients else None
        with averaged_gradients(model, self.layer_parallel, group):
            value = self.layer_parallel.train_step(inputs, loss, scale=share / steps, penalty_scale=share / accumulated)
        if self.accelerator.sync_gradients:
            self.accelerator.unscale_gradients(self.optimizer)
        if self.args.torch_empty_cache_steps and self.state.global_step % self.args.torch_empty_cache_steps == 0:
            clear_device_cache()
        value, metrics = loss_and_metrics(value)
        self._summed_metrics.update({name: float(number) for name, number in metrics.items()})
        self._metric_batches += 1
        return value / steps

    def _mean_metrics(self) -> dict[str, float]:
        """What `compute_loss` returned beside the loss since the last log, a mean over batches. Collective."""
        names, batches = sorted(self._summed_metrics), self._metric_batches
        found = [self._summed_metrics[name] for name in names]
        sums = torch.tensor(found, dtype=torch.float64, device=self.args.device)
        if names and self.mesh.dp_size > 1:
            dist.all_reduce(sums, group=self.mesh.dp_group)
        self._summed_metrics.clear()
        self._metric_batches = 0
        return dict(zip(names, (sums / (batches * self.mesh.dp_size)).tolist(), strict=True)) if names else {}

    def _check_settings(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Before a step: what the controller checks, decides and logs."""
        watch, step = self._watch, self.state.global_step
        if watch is None:
            return
        stored = self.state.stateful_callbacks
        if self._watched_run is not self.state:  # a run begins, or goes on from a checkpoint
            self._watched_run = self.state
            watch.start(stored.get(STATE))
        if not watch.due(step, inputs):
            return
        inputs = self._prepare_inputs(inputs)
        model.train()

        def loss(batch: Mapping[str, Any]) -> Tensor:
            with self.compute_loss_context_manager():
                return self.compute_loss(model, dict(batch))  # type: ignore[return-value]

        with self.layer_parallel.whole():  # so that gradients are those of this dp rank's own batch
            numbers, texts = watch.check(step, model, inputs, loss)
        stored[STATE] = watch.state()
        self.log(numbers)
        self.state.log_history[-1] |= texts

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self.layer_parallel.clip_grad_norm_(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self.layer_parallel.grad_norm() if grad_norm is None else grad_norm

    # ---- evaluation
    def evaluation_loop(self, dataloader: DataLoader, description: str, *args: Any, **kwargs: Any) -> Any:
        self._agree(description, batches=_length(dataloader))
        # stock forgets eval_use_gather_object after its first loop, and Seq2SeqTrainer sets a function that gathers
        # from the whole world, samples that fill the last batch up included
        self.gather_function = functools.partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )
        with self.layer_parallel.whole():  # dp ranks may run other numbers of forwards
            return super().evaluation_loop(dataloader, description, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> Any:
        inputs = self._share("share a batch to evaluate", inputs)
        found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        rows = find_batch_size(inputs)
        if self.args.predict_with_generate and found[1] is not None and len(found[1]) != rows:
            raise ConfigurationError(
                f"generation gave {len(found[1])} sequences for {rows} samples; with predict_with_generate use "
                "num_return_sequences=1 (in generation_config, or as an argument of evaluate and predict)"
            )
        return found

    def _gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """As accelerate's, over the dp ranks; the lp ranks of each have the same predictions."""
        assert self.mesh.dp_group is not None
        kept = real_rows(self.accelerator.gradient_state, self.args.eval_batch_size * self.mesh.dp_size)
        return gather_samples(input_data, self.mesh.dp_group, kept, as_objects=use_gather_object)

    # ---- counting and logging
    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        seen = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + seen // self.mesh.batch_size

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of what this rank holds; stock sums it over all processes."""
        return super().floating_point_ops(inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        modes: dict[str, str] = {}
        if "loss" in logs:  # once: a callback may log a loss of its own, on one process
            (numbers, modes), self._beside_loss = self._beside_loss, ({}, {})
            logs |= numbers
        super().log(logs, start_time)
        self.state.log_history[-1] |= modes


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:  # None, or an iterable that doesn't know
        return None
