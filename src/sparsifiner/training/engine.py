"""The training loop: phases, checkpoints, resume. ``accelerate`` places, scales and distributes it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.data import resolve_model_data_config
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .._utils.files import check_writable, make_folder, write_atomically
from .._utils.messages import LOGGER
from .._utils.photos import input_channels
from .._utils.progress import Progress
from ..convert import always_sparse
from ..errors import SparsifinerError
from ..measure.accuracy import Accuracy, count_correct
from .batchnorm import average_statistics
from .checkpoint import RESULT_NAME, Checkpoint, check_same_start, load_checkpoint, save_checkpoint
from .data import Samples, TrainBatches, mixing, train_loader, train_transform, validation_loader, validation_transform
from .meter import Meter, watched
from .objective import Objective
from .phases import check_phases, enter_phase, make_optimizer, make_scheduler, set_reconstruction, set_training_mode
from .randomness import deterministic_algorithms, seed_of, seeded
from .recipe import PhaseConfig, TrainConfig
from .sources import ImageSource, open_source
from .student import build_models, needs_teacher, save_model
from .trackers import make_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Result:
    """Result of a run.

    Args:
        model: folder of the trained model.
        ema: folder of the averaged one, or None.
        accuracy: of each by name (``model``, ``ema``) on the validation images; empty without labels.
        broken: name and reason of the training images that could not be read and were replaced.
        history: log entries.
    """

    model: Path
    ema: Path | None
    accuracy: dict[str, Accuracy]
    broken: dict[str, str]
    history: list[dict[str, Any]]


def train(
    config: TrainConfig,
    output: str | Path,
    *,
    cpu: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    on_update: Callable[[int, int], None] | None = None,
) -> Result:
    """Run a recipe; where ``output`` holds an unfinished run of it, go on from its checkpoint.

    A run that was stopped anywhere and resumed ends with the same weights, bit for bit, on one process of the
    same kind. Under ``accelerate launch`` every process calls this.

    Args:
        config: the recipe.
        output: folder for ``model``, ``ema``, ``checkpoint.pt``, ``history.json`` and ``result.json``.
        cpu: stay on the CPU.
        progress: told how far each phase is.
        say: called with a line of text now and then; the logger ``sparsifiner`` if None.
        on_update: called after each optimiser step with the number of its phase and of the step.

    Raises:
        ValueError: in one line, if data, models or an earlier run in ``output`` do not fit the recipe.
    """
    folder = check_writable(output)
    accelerator = make_accelerator(config, folder, cpu=cpu)
    # The state outside is put back: a library does not reseed its caller.
    with seeded(config.seed), deterministic_algorithms(config.deterministic):
        run = Run(config, folder, accelerator, progress or (lambda *_: None), say or LOGGER.info, on_update)
        try:
            return run.all_phases()
        finally:
            accelerator.end_training()


class Run:
    """The state of a run in memory."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        accelerator: Accelerator,
        progress: Progress,
        say: Callable[[str], None],
        on_update: Callable[[int, int], None] | None,
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.progress = progress if accelerator.is_main_process else (lambda *_: None)
        self.say = say if accelerator.is_main_process else (lambda _: None)
        self.on_update = on_update
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.history: list[dict[str, Any]] = []
        self.broken: dict[str, str] = {}
        self.val_broken: dict[str, str] = {}
        data = config.data
        with accelerator.main_process_first():  # it may download what the others then find
            self.source = open_source(
                data.source, data.path, data.train_split, train=True, download=data.download, limit=data.limit
            )
            val_source = self._validation_source()
        self.checkpoint = load_checkpoint(folder, config, self.world, len(self.source), self.source.classes)
        check_same_start(self.checkpoint, folder)
        labelled = any("ce" in phase.losses for phase in config.phases)
        if labelled and self.source.classes is None:
            raise SparsifinerError(
                "the loss ce needs labels, but the images have none; leave ce out or use labelled data"
            )
        classes = len(self.source.classes) if labelled and self.source.classes else None
        self.num_classes = classes if config.num_classes is None else config.num_classes
        if classes is not None and self.num_classes is not None and self.num_classes < classes:
            raise SparsifinerError(f"num_classes is {self.num_classes}, but the data has {classes} classes")
        student, teacher = build_models(config, self.num_classes)
        check_phases(student, config)
        self.student: Any = student.to(accelerator.device)
        self.teacher = teacher
        if teacher is not None:
            teacher.to(accelerator.device)
        normalisation = resolve_model_data_config(student)
        size = data.size or tuple(student.patch_embed.img_size)  # type: ignore[union-attr, arg-type]
        self.transform = train_transform(config.augment, size, normalisation, input_channels(student))
        self.val_samples = None
        if val_source is not None and self._head_fits(val_source):
            transform = validation_transform(size, normalisation)
            self.val_samples = Samples(val_source, transform, config.seed, replace_broken=False)
        self.updates_per_epoch = len(self.source) // (config.batch_size * self.world * config.accumulation)
        if not self.updates_per_epoch:
            raise SparsifinerError(
                f"{len(self.source)} training images do not fill one step of {config.batch_size} x {self.world} "
                f"processes x {config.accumulation} accumulated batches; lower batch_size or accumulation"
            )
        self.ema: ModelEmaV3 | None = None
        self.accuracy: dict[str, Accuracy] | None = None  # of the end of the last phase

    def all_phases(self) -> Result:
        """Run what is left of the recipe, and write the results."""
        found, first = self.checkpoint, 0
        make_folder(self.folder)
        if found is not None:
            first, self.history, self.broken = found.phase, found.history, found.broken
            self.student.load_state_dict(found.student)
            self.say(f"resuming phase {first + 1} at step {found.update}")
        for number, phase in enumerate(self.config.phases):
            enter_phase(self.student, phase)  # also those that are done: keep rates stay until changed
            if number >= first:
                self._phase(number, phase, found if number == first else None)
        return self._finish()

    def _phase(self, number: int, phase: PhaseConfig, resumed: Checkpoint | None) -> None:
        config, accelerator = self.config, self.accelerator
        total = phase.num_updates(self.updates_per_epoch)
        start = 0 if resumed is None else resumed.update
        self.ema = self._averaged(None if resumed is None or resumed.update == 0 else resumed.ema)
        plain_optimizer = make_optimizer(self.student, config, phase)
        scheduler = make_scheduler(plain_optimizer, phase, self.updates_per_epoch)
        if resumed is not None and resumed.optimizer is not None:
            plain_optimizer.load_state_dict(resumed.optimizer)
        teacher = self.teacher if needs_teacher(config, number) else None
        plain_objective = Objective(self.student, teacher, phase.losses, config.augment.label_smoothing)
        objective, optimizer = accelerator.prepare(plain_objective, plain_optimizer)
        if resumed is not None and resumed.scaler is not None and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(resumed.scaler)
        mix = mixing(config.augment, self.student.num_classes)
        micro = config.accumulation
        samples = Samples(self.source, self.transform, seed_of(config.seed, number), replace_broken=True)
        batches = TrainBatches(
            len(samples), config.batch_size, self.updates_per_epoch * micro, total * micro,
            start=start * micro, seed=(config.seed, number), rank=self.rank, world=self.world,
        )  # fmt: skip
        loader = iter(train_loader(samples, batches, config.data.workers))
        meter = Meter()
        stage = f"phase {number + 1} of {len(config.phases)}: {phase.name}"
        for update in range(start, total):
            self.progress(stage, update, total)
            scheduler.step_update(update)
            for part in range(micro):
                batch = next(loader)
                self._note_broken(batch.broken, self.broken, "image", "the next readable one takes its place")
                with seeded(config.seed, number, update, part, self.rank), accelerator.accumulate(objective):
                    images = batch.images.to(accelerator.device, non_blocking=True)
                    target = batch.labels.to(accelerator.device, non_blocking=True)
                    if mix is not None:
                        images, target = mix(images, target.clamp(min=0))  # labels are -1 where there are none
                    with watched(phase.name, update + 1):
                        loss, parts = objective(images, target)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and config.clip_grad is not None:
                        accelerator.clip_grad_norm_(objective.parameters(), config.clip_grad)
                    optimizer.step()
                    optimizer.zero_grad()
                meter.add(loss.detach(), parts)
            done = update + 1
            if self.ema is not None:
                self.ema.update(self.student, step=done if config.ema_warmup else None)
            self._log(number, phase, done, total, meter, plain_optimizer)
            epoch_ends = done % self.updates_per_epoch == 0
            if done == total or epoch_ends or done % config.checkpoint_every == 0:
                meter.check(phase.name, done)
                self._check_sound(plain_objective, images, target, phase, done)
            if done == total or (
                epoch_ends and config.eval_every and done // self.updates_per_epoch % config.eval_every == 0
            ):
                self.accuracy = self._validate(number, done, stage)
                set_training_mode(self.student, phase)
            if done < total and (epoch_ends or done % config.checkpoint_every == 0):
                self._save(number, done, plain_optimizer)
            if self.on_update is not None:
                self.on_update(number, done)
        self.progress(stage, total, total)
        accelerator.free_memory()
        self.student.zero_grad(set_to_none=True)
        self._save(number + 1, 0, None)

    def _check_sound(self, objective: Objective, images: Tensor, target: Tensor, phase: PhaseConfig, done: int) -> None:
        """Refuse weights with which the loss of the last batch is not finite.

        The losses so far tell nothing of the last step, and its weights would take the place of sound ones in the
        checkpoint. Evaluation mode draws no random numbers and gathers no statistics.
        """
        self.student.eval()
        after = Meter()
        with torch.no_grad(), watched(phase.name, done):
            after.add(*objective(images, target))
        after.check(phase.name, done)
        set_training_mode(self.student, phase)

    def _averaged(self, state: dict[str, Any] | None) -> ModelEmaV3 | None:
        if self.config.ema_decay is None:
            return None
        ema = ModelEmaV3(self.student, decay=self.config.ema_decay, use_warmup=self.config.ema_warmup)
        if state is not None:
            ema.module.load_state_dict(state)
        return ema

    def _validation_source(self) -> ImageSource | None:
        """The validation images, their labels numbered as those of training; None where the recipe wants none."""
        data = self.config.data
        if data.val_split is None or data.source == "images":
            return None
        return open_source(
            data.source, data.path, data.val_split, train=False, download=data.download, limit=data.val_limit,
            classes=self.source.classes,
        )  # fmt: skip

    def _head_fits(self, source: ImageSource) -> bool:
        """True where the model can be validated on these images; logs the reason if not."""
        if source.classes is None:
            self.say("validation is skipped: its images have no labels; use labelled ones, or set data.val_split=null")
            return False
        head, classes = self.student.num_classes, len(source.classes)
        if head == classes or (self.config.num_classes or 0) > classes:
            return True
        self.say(
            f"validation is skipped: the model's head is for {head} classes and the data has {classes}; "
            f"take a model with a head for them, or set data.val_split=null"
        )
        return False

    def _note_broken(self, broken: dict[str, str], known: dict[str, str], what: str, outcome: str) -> None:
        for name, reason in broken.items():
            if name not in known:
                known[name] = reason
                self.say(f"broken {what} {name} ({reason}); {outcome}")

    def _of_all_processes(self, broken: dict[str, str]) -> dict[str, str]:
        """Each process has met its own images."""
        if self.world == 1:
            return broken
        from accelerate.utils import gather_object

        return dict(gather_object(list(broken.items())))

    def _log(
        self, number: int, phase: PhaseConfig, done: int, total: int, meter: Meter, optimizer: torch.optim.Optimizer
    ) -> None:
        if done % self.config.log_every and done != total:
            return
        meter.check(phase.name, done)
        values = meter.means(lambda values: self.accelerator.reduce(values, "mean"))
        entry = {"phase": number, "update": done, "lr": max(group["lr"] for group in optimizer.param_groups), **values}
        self.history.append(entry)
        self.accelerator.log(
            {k: v for k, v in entry.items() if k not in ("phase", "update")}, step=self._global(number, done)
        )
        text = ", ".join(f"{name} {value:.4g}" for name, value in entry.items() if name not in ("phase", "update"))
        self.say(f"{phase.name} step {done} of {total}: {text}")

    def _global(self, number: int, done: int) -> int:
        return done + sum(phase.num_updates(self.updates_per_epoch) for phase in self.config.phases[:number])

    def _validate(self, number: int, done: int, stage: str) -> dict[str, Accuracy]:
        """Accuracy of the model and of its average, if there are validation images."""
        if self.val_samples is None:
            return {}
        self._average_statistics()
        found = {}
        for name, model in self._models().items():
            loader = validation_loader(
                self.val_samples, self.config.batch_size, self.config.data.workers, rank=self.rank, world=self.world
            )
            label, count = f"{stage}: validating {name} at step {done}", len(loader)
            with self.accelerator.autocast(), always_sparse(model):
                accuracy = count_correct(
                    model, loader, self.accelerator.device, reduce=self._sum,
                    progress=lambda at, label=label, count=count: self.progress(label, at, count),  # type: ignore[misc]
                )  # fmt: skip
            found[name] = dataclasses.replace(accuracy, broken=self._of_all_processes(accuracy.broken))
            self._note_broken(found[name].broken, self.val_broken, "validation image", "it is left out")
            values = found[name].to_dict()
            place = {"phase": number, "update": done, "validated": name}
            # A finished run that is started again is validated again.
            self.history = [old for old in self.history if not place.items() <= old.items()] + [{**place, **values}]
            shown = {f"{name}/{key}": values[key] for key in ("top1", "top5", "loss")}
            self.accelerator.log(shown, step=self._global(number, done))
            low, high = values["top1_interval"]
            self.say(
                f"{name}: top-1 {values['top1']:.2%} ({low:.2%} to {high:.2%}), top-5 {values['top5']:.2%}, "
                f"{values['images']} images, {values['broken']} broken"
            )
        return found

    def _models(self) -> dict[str, nn.Module]:
        """Trained models by name: the model and, if there is one, its average."""
        return {"model": self.student, **({} if self.ema is None else {"ema": self.ema.module})}

    def _average_statistics(self) -> None:
        """Let all processes validate and save the same model."""
        if self.world > 1:
            for model in self._models().values():
                average_statistics(model, lambda values: self.accelerator.reduce(values, "mean"))

    def _sum(self, counts: Tensor) -> Tensor:
        return self.accelerator.reduce(counts.to(self.accelerator.device, torch.float64), "sum").cpu()

    def _save(self, phase: int, update: int, optimizer: torch.optim.Optimizer | None) -> None:
        self._average_statistics()
        self.broken = self._of_all_processes(self.broken)
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            checkpoint = Checkpoint(
                recipe=self.config.to_dict(),
                phase=phase,
                update=update,
                student=self.student.state_dict(),
                optimizer=None if optimizer is None else optimizer.state_dict(),
                scaler=None if scaler is None else scaler.state_dict(),
                ema=None if self.ema is None else self.ema.module.state_dict(),
                world=self.world,
                history=self.history,
                broken=self.broken,
                images=len(self.source),
                classes=self.source.classes,
            )
            save_checkpoint(checkpoint, self.folder)
            write_atomically(self.folder / "history.json", json.dumps(self.history, indent=1) + "\n")
        self.accelerator.wait_for_everyone()

    def _finish(self) -> Result:
        """Write models and results; the accuracy is that of the last validation, or measured now."""
        if self.ema is None and self.config.ema_decay is not None:  # resumed after the last step
            assert self.checkpoint is not None
            self.ema = self._averaged(self.checkpoint.ema)
        models = self._models()
        for model in models.values():
            model.eval()
            set_reconstruction(model, False)
        accuracy = self.accuracy
        if accuracy is None:
            last = len(self.config.phases) - 1
            accuracy = self._validate(last, self.config.phases[last].num_updates(self.updates_per_epoch), "end")
        if self.accelerator.is_main_process:
            for name, model in models.items():
                save_model(model, self.folder / name)
            result = {
                "accuracy": {name: value.to_dict() for name, value in accuracy.items()},
                "broken": self.broken,
                "val_broken": self.val_broken,
                "recipe": self.config.to_dict(),
            }
            write_atomically(self.folder / RESULT_NAME, json.dumps(result, indent=1) + "\n")
        self.accelerator.wait_for_everyone()
        ema = None if self.ema is None else self.folder / "ema"
        return Result(self.folder / "model", ema, accuracy, self.broken, self.history)
