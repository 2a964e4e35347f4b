"""transformers' Trainer on LLaVA models: loss over labelled positions, one order for any number of ranks, resume.

A checkpoint holds the trained parameters by name (projector, adapters, language model). Under DeepSpeed they are in
the engine's own files. Frozen parameters are loaded again from their source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments

from clips.common.errors import NotFiniteError, UserError
from clips.common.files import seal
from clips.common.signals import StopSignal, start_worker
from clips.common.start import Start
from clips.common.tensors import only_data, read_weights, write_weights
from mllm.data.conversation import IGNORE
from mllm.data.dataset import LlavaDataset, pad_rows
from mllm.data.sampler import EpochSampler
from mllm.data.video import Size
from mllm.model.forward import causal_lm_loss, embed_inputs
from mllm.model.packing import PACKED, Counts, Packing, can_pack
from mllm.model.tiles import Llava, newline_of, placeholder_ids
from mllm.training.arguments import TrainArguments
from mllm.training.checkpoints import SCHEDULER, TRAINED, engine_tag, prune, restoring, writing
from mllm.training.freeze import llava_of, parameter_groups
from mllm.training.log import Work
from mllm.training.zero import checkpoint_classes

PASSED_ON = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "seed", "bf16"),
    *("learning_rate", "weight_decay", "lr_scheduler_type", "max_grad_norm", "dataloader_num_workers"),
    *("logging_steps", "save_steps"),
)
"""The flags that the Trainer gets under the same name."""


class TrainingModel(nn.Module):
    """The module that the Trainer wraps: a batch → its loss. `model` is the LLaVA model, plain or as a PeftModel.

    With tiles the newline is a parameter of this module too: under ZeRO-3 a parameter is whole while its module runs.
    `features` says that batches bring `image_features`, not `pixel_values`. With `packed`, batches are packed
    (mllm/model/packing.py) if the language model allows it.
    """

    accepts_loss_kwargs = True  # the Trainer hands over the number of labels of the whole step

    def __init__(self, model: nn.Module, *, features: bool, packed: bool = True) -> None:
        super().__init__()
        self.model = model
        self.features = features
        self.image_newline = newline_of(self.llava)
        self.packed = packed and can_pack(self.llava.config.get_text_config())
        if self.packed:
            self.llava.model.language_model.set_attn_implementation(PACKED)

    @property
    def llava(self) -> Llava:
        return llava_of(self.model)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor,
        image_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Sequence[Size] = (),
        num_items_in_batch: Tensor | None = None,
        counts: Counts | None = None,
        index: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`counts`: of this batch, if known: without them the host waits for the GPU. `index` is the Trainer's."""
        llava = self.llava
        if counts is None:
            batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
            counts = Counts.of(batch, *placeholder_ids(llava.config))
        if not self.features and pixel_values is None:  # a batch without images, see `embed_inputs`
            side = llava.model.vision_tower.config.image_size
            pixel_values = torch.zeros(0, 3, side, side, dtype=llava.dtype, device=input_ids.device)
        embeds = embed_inputs(llava, input_ids, image_features, pixel_values, counts.image_tokens, image_sizes)
        packing = Packing.of(attention_mask, counts) if self.packed else None
        loss = causal_lm_loss(
            llava, embeds, attention_mask, labels, num_items_in_batch, learned=counts.learned, packing=packing
        )
        return {"loss": loss}

    def train(self, mode: bool = True) -> TrainingModel:
        """The encoder stays in eval mode unless it trains."""
        super().train(mode)
        tower = self.llava.model.vision_tower
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.eval()
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class Collator:
    """Samples → the arguments of `TrainingModel`: ids, labels and mask [B, L], and `image_key` by `load_images`.

    A batch brings its `counts`, counted before it goes to the device, and the `index` of each sample, by which an
    error names the samples of a loss that is not finite. With `image_sizes` of all pictures where the samples have
    them. A batch without pictures has no `image_key`; the model makes that safe under ZeRO-3.
    """

    pad_id: int
    image_ids: tuple[int, ...]
    """The placeholders' ids, of images and of videos."""
    load_images: Callable[[list[str]], Tensor] | None
    """Names of pictures → their pixels or features; None of a set without pictures."""
    image_key: str = "pixel_values"

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [sample["input_ids"] for sample in samples]
        batch: dict[str, Any] = {
            "input_ids": pad_rows(ids, self.pad_id),
            "labels": pad_rows([sample["labels"] for sample in samples], IGNORE),
            "attention_mask": pad_rows([[1] * len(row) for row in ids], 0),
            "index": torch.tensor([sample["index"] for sample in samples]),
        }
        batch["counts"] = Counts.of(batch, *self.image_ids)
        names = [name for sample in samples for name in sample["images"]]
        if names and self.load_images is not None:
            batch[self.image_key] = self.load_images(names)
        sizes = [size for sample in samples for size in sample.get("image_sizes", ())]
        if sizes:
            batch["image_sizes"] = sizes
        return batch


class StepCallback(TrainerCallback):
    """Ends `start` before the first step, and after a stop signal every rank with a checkpoint of the same step.

    Reports each step to the profiler.
    """

    def __init__(self, start: Start) -> None:
        self.start = start
        self.signal = StopSignal()
        self.stopped = 0
        self.profiler: profile | None = None

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self.start.finish()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if self.profiler is not None:
            self.profiler.step()
        self.stopped = self.signal.requested
        if dist.is_initialized() and dist.get_world_size() > 1:
            # A signal may reach one rank only, or two ranks in different steps. All must stop after the same step.
            requested = torch.tensor(self.stopped, device=args.device)
            dist.all_reduce(requested, op=dist.ReduceOp.MAX)
            self.stopped = int(requested)
        if self.stopped:
            control.should_save = control.should_training_stop = True
        return control


class LlavaTrainer(Trainer):
    """The Trainer with this project's optimizer, the order `sampler` and the counter `work`."""

    # Narrower types than the Trainer declares.
    model: TrainingModel
    model_wrapped: Any  # the DeepSpeed engine, if DeepSpeed is used
    train_dataset: LlavaDataset
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR  # made before the first step

    def __init__(self, arguments: TrainArguments, *, sampler: EpochSampler, work: Work, **kwargs: Any) -> None:
        self.unchecked: list[tuple[Tensor, Tensor]] = []
        """Of the step's micro-batches so far: whether the loss is finite, and the samples' indices."""
        self.rates, self.keep, self.sampler, self.work = arguments.rates, arguments.save_total_limit, sampler, work
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)  # MetricsLog prints

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.rates, self.args.weight_decay)
            # torch's own defaults, spelled out: another version's defaults would change a run. Fused reads and writes
            # the weights once, not ten times.
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.sampler

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's loader, with workers that end with this process. They draw nothing, so they need no seed."""
        loader = super().get_train_dataloader()
        getattr(loader, "base_dataloader", loader).worker_init_fn = start_worker  # accelerate's loaders wrap one
        return loader

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.work.add(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss. Raises NotFiniteError on every rank if a loss of the step is not finite on one rank."""
        indices = inputs["index"]
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if isinstance(result, tuple) else result
        self.unchecked.append((torch.isfinite(loss.detach()), indices))
        if self.accelerator.sync_gradients:  # the host waits for a GPU here, so once a step
            self._check_finite()
        return result

    def _check_finite(self) -> None:
        """End the run on every rank, naming the samples of the micro-batches whose loss is not finite."""
        unchecked, self.unchecked = self.unchecked, []
        finite = torch.stack([flag for flag, _ in unchecked]).all().to(torch.int32)
        # Agreed on before the last backward pass: the ranks meet in it, and would wait for ever for a stopped rank.
        if self.args.world_size > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if finite:
            return
        mine = [index for flag, indices in unchecked if not flag for index in indices.tolist()]
        parts = [mine]
        if self.args.world_size > 1:
            parts = [[] for _ in range(self.args.world_size)]
            dist.all_gather_object(parts, mine)
        records = self.train_dataset.records
        names = ", ".join(records[index].name for part in parts for index in part)
        raise NotFiniteError(
            f"the loss is not finite at step {self.state.global_step + 1}; no weight was changed by this step. It is "
            f"the loss of: {names}. Look at them with scripts/check_data.py, or lower the learning rate"
        )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            raise NotFiniteError(
                f"a gradient is not finite at step {self.state.global_step + 1}; no weight was changed by this step"
            )
        return norm

    # ------------------------------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with writing(f"the checkpoint of step {self.state.global_step} cannot be written to {self.args.output_dir}"):
            super()._save_checkpoint(model, trial)
        if self.args.world_size > 1:
            dist.barrier()  # every rank has written its files
        if self.args.should_save:
            directory = Path(self._get_output_dir(trial))
            seal(directory / f"checkpoint-{self.state.global_step}")
            prune(directory, self.keep)  # not before the seal: until then the older checkpoint is the only one

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            directory = Path(output_dir or self._get_output_dir(None))
            directory.mkdir(parents=True, exist_ok=True)
            if not self.is_deepspeed_enabled:
                tensors = {name: p.detach().cpu().contiguous() for name, p in self.model.trained().items()}
                write_weights(tensors, directory / TRAINED)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # The Trainer leaves frozen weights out of PEFT models only, and does not see one in `TrainingModel`.
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # The checkpoint is not handed on: the Trainer would let DeepSpeed unpickle whatever `latest` names.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            checkpoint = Path(resume_from_checkpoint)
            with restoring(checkpoint):
                if self.is_deepspeed_enabled:
                    with only_data(checkpoint_classes()):  # not strict: a checkpoint leaves out what does not train
                        self.model_wrapped.load_checkpoint(
                            str(checkpoint), tag=engine_tag(checkpoint), load_module_strict=False
                        )
                self._load_optimizer_and_scheduler(str(checkpoint))
        return prepared

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The Trainer would look for a whole model, under file names of its own.
        with restoring(Path(resume_from_checkpoint)):
            saved = read_weights(Path(resume_from_checkpoint) / TRAINED)
            own = self.model.trained()
            if {name: t.shape for name, t in saved.items()} != {name: p.shape for name, p in own.items()}:
                raise UserError(f"{TRAINED} holds other parameters than those that train")
            for name, parameter in own.items():
                parameter.copy_(saved[name])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with restoring(Path(checkpoint or "")):
            super()._load_rng_state(checkpoint)


def training_arguments(
    arguments: TrainArguments, stage_dir: Path, device: torch.device, deepspeed: dict[str, Any] | None
) -> TrainingArguments:
    """The Trainer's own arguments, without the parts that this project does itself."""
    made = TrainingArguments(
        output_dir=str(stage_dir),
        **{name: getattr(arguments, name) for name in PASSED_ON},
        # The Trainer reads a value below one as a share of the steps.
        warmup_steps=arguments.warmup_ratio if arguments.warmup_steps is None else arguments.warmup_steps,
        deepspeed=deepspeed,
        use_cpu=device.type == "cpu",
        logging_nan_inf_filter=False,
        report_to="none",  # MetricsLog reports, as in pretraining
        log_level="error",
        save_strategy="steps",
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        ddp_backend=dist.get_backend() if dist.is_initialized() else None,
        # The encoder's layers behind the chosen one get no gradient.
        ddp_find_unused_parameters=arguments.unfreeze_mm_vision_tower,
    )
    if device.type == "cuda" and not dist.is_initialized():
        made._n_gpu = 1  # one process is one GPU; the Trainer would use all of them with DataParallel
    return made
