"""Train one configuration: TrainingRun(config, data, settings) trains an epoch per call of epoch()."""

from __future__ import annotations

import math
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunefleet.metric import FRACTIONS
from tunefleet.models.space import TrainConfig
from tunefleet.trainables.data import ImageData
from tunefleet.trainables.device import (
    DeviceSettings,
    has_convolution,
    micro_batch,
    use_exact_fp32,
)
from tunefleet.trainables.graph import StepGraph
from tunefleet.trainables.group import Group
from tunefleet.trainables.inputs import Inputs, build_model, cached_features, load_inputs, mapped_tensor
from tunefleet.trainables.pipeline import Pipeline, augment, draw_crops

EVAL_BATCH_BYTES = 32 * 2**20  # inputs of one evaluation batch; activations are some 50 times that
EVAL_BATCH_MAX = 256  # images through convolutions on a processor, whose caches hold no more
ALONE = Group()
CHANCE_MARGIN = 3  # standard deviations of a guesser's accuracy that still count as chance


class DamagedCheckpointError(Exception):
    """A checkpoint's file is not what was written."""


class TrainingRun:
    """One trial's network, optimizer and place in its schedule.

    Args:
        config: The trial.
        data: The decoded images.
        settings: The device's settings.
        data_dir: Where prepared inputs are cached.
        leaves_chance_by: Epoch from which an accuracy at chance means that the trial diverged; None: never.
        group: This worker's place where several train the trial; reports are then of all together.
        inputs: What to train and validate on; None: all of the data, as the config reads it.

    Raises:
        ValueError: The architecture cannot be built from the config.
    """

    trains_images = True  # a Space(run=…) that is a subclass trains a network on images

    def __init__(
        self,
        config: TrainConfig,
        data: ImageData,
        settings: DeviceSettings,
        data_dir: Path,
        leaves_chance_by: int | None = None,
        group: Group = ALONE,
        inputs: Inputs | None = None,
    ) -> None:
        settings = settings.of(config.space)
        self.config, self.data, self.settings, self.group = config, data, settings, group
        self.data_dir = Path(data_dir)
        self.device = torch.device(settings.device)
        self.leaves_chance_by = leaves_chance_by
        use_exact_fp32()
        self.inputs = inputs or load_inputs(config, data, settings, data_dir)
        self.pipeline = Pipeline.of(config, data, settings)
        self.model = build_model(config, data).to(self.device)
        if getattr(self.model, "frozen", False):
            self.model.get_submodule("backbone").requires_grad_(False)
        self.has_own_loss = type(self).loss is not TrainingRun.loss
        group.synchronise_batchnorm(self.model)
        # Cached features replace the backbone: only the head is trained, saved and evaluated.
        self.network = self.model.get_submodule("head") if self.inputs.kind == "features" else self.model
        if settings.channels_last and has_convolution(self.model):
            self.model.to(memory_format=torch.channels_last)
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        on_device = self.device.type == "cuda" or settings.cuda_graph  # a tensor, which a captured step reads
        self.lr = torch.tensor(config.lr, device=self.device) if on_device else config.lr
        self.optimizer = self.make_optimizer(self.trained)
        for lr_group in self.optimizer.param_groups:
            lr = lr_group["lr"]  # whose ratio to the schedule's lr is kept
            lr_group["lr_scale"] = 1.0 if lr is self.lr else float(lr) / config.lr
            if settings.cuda_graph and not isinstance(lr, Tensor):
                lr_group["lr"] = torch.tensor(lr, device=self.device)
        self.generator = torch.Generator().manual_seed(config.seed)  # order and augmentation
        torch.manual_seed(config.seed)  # dropout draws from the device's own generator
        self.reports: list[dict[str, Any]] = []  # of all epochs so far
        self.loss_sum = torch.zeros((), device=self.device)  # of an epoch's steps
        self.correct = torch.zeros((), device=self.device, dtype=torch.int64)
        self.last_lr = config.lr
        self.graph: StepGraph | None = None  # once there are steps to replay
        self.train_mode()
        _check_batch_norm(self.network, config.batch_size)
        sample = self.to_network(self.inputs.train_x[:1].to(self.device, copy=True))
        self.micro_batch = config.batch_size
        if not self.has_own_loss:  # which may be no mean over images
            self.micro_batch = micro_batch(settings, self.network, sample, config.batch_size)
        self.parallel = group.parallel(self.network)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of a batch; yours to override.

        One that is no mean over images gives other gradients where several workers share a batch.

        Args:
            logits: float32 ``(N, C)``.
            y: Labels ``(N,)``.
        """
        return F.cross_entropy(
            logits, y, label_smoothing=self.config.label_smoothing if self.network.training else 0
        )

    def make_optimizer(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Build the optimizer of what is trained, of ``self.config`` and ``self.lr``; yours to override.

        Groups of parameters may have several lrs: the schedule keeps their ratios.
        """
        return make_optimizer(self.config, parameters, self.lr)

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return training images as they are to be seen; yours to override, instead of crops and flips.

        Args:
            images: uint8 ``(N, 3, H, W)``, on the device.
            generator: On the CPU, of this step and worker, and the same after a resume: draw from it alone.
        """
        raise NotImplementedError

    @classmethod
    def augments(cls) -> bool:
        """Return whether a subclass augments images in a way of its own."""
        return cls.augment is not TrainingRun.augment

    @property
    def epochs_done(self) -> int:
        """Epochs that the network has been trained for."""
        return len(self.reports)

    def epoch(self) -> dict[str, Any]:
        """Train and evaluate one epoch.

        Returns:
            epoch, train_loss, train_accuracy, val_loss, val_accuracy, val_balanced_accuracy and val_macro_f1
            (fractions 0..1), lr (of the epoch's last step), epoch_seconds, finished_at (seconds since 1970)
            and diverged. The
            train figures are means over the epoch, measured as its steps went by; the val figures of
            a refit are None.
        """
        began = time.perf_counter()
        count = len(self.inputs.train_y)
        train_loss, train_accuracy = (total.item() / count for total in self.train_epoch())
        val_loss: float | None = None
        of_classes: dict[str, float] = {}
        if not self.config.refit:
            loss_sum, confusion = self.evaluate(self.inputs.val_x, self.inputs.val_y)
            val_loss = loss_sum.item() / len(self.inputs.val_y)
            of_classes = class_metrics(confusion)
        report = {
            "epoch": self.epochs_done + 1,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": val_loss,
            **{f"val_{name}": of_classes.get(name) for name in FRACTIONS},
            "lr": self.last_lr,
            "epoch_seconds": time.perf_counter() - began,
            "finished_at": time.time(),
        }
        finite = all(math.isfinite(loss) for loss in (train_loss, val_loss) if loss is not None)
        report["diverged"] = not finite or self._is_at_chance(report)
        self.reports.append(report)
        return report

    def train_epoch(self) -> tuple[Tensor, Tensor]:
        """Take one optimizer step per batch of every training image, in a new order.

        Returns:
            Summed loss and number of correct predictions, on the device: no step waits for either.
        """
        config, group, count = self.config, self.group, len(self.inputs.train_y)
        self.train_mode()
        if group.size > 1:  # dropout: another mask on each worker, the same after a restart
            seed = np.random.SeedSequence((config.seed, self.epochs_done, group.rank))
            torch.manual_seed(int(seed.generate_state(1)[0]))
        self.loss_sum.zero_()
        self.correct.zero_()
        sizes = batch_sizes(count, config.batch_size)
        order = torch.randperm(count, generator=self.generator).to(self.inputs.train_y.device)
        crops = self._draw_crops(sizes)
        lrs = [lr_at(config, self.epochs_done + (step + 0.5) / len(sizes)) for step in range(len(sizes))]
        graph = self._graph_of_epoch(sizes)
        if graph:
            graph.begin_epoch(order, crops, lrs)
        crop_batches = [None] * len(sizes) if crops is None else crops.split(sizes)
        for size, indices, batch_crops, lr in zip(sizes, order.split(sizes), crop_batches, lrs, strict=True):
            if graph and size == config.batch_size:
                graph.step(self.train_step)
            else:
                self._set_lr(lr)
                self.train_step(indices, batch_crops)
        self.last_lr = lrs[-1]
        return group.total(self.loss_sum.clone(), self.correct.clone())

    def train_mode(self) -> None:
        """Set the network's mode; a frozen backbone's statistics do not move."""
        self.network.train()
        if getattr(self.network, "frozen", False):
            self.network.get_submodule("backbone").eval()

    def train_step(self, indices: Tensor, crops: Tensor | None) -> None:
        """Take one optimizer step; add its loss and correct predictions to those of the epoch.

        Args:
            indices: The batch, of the training images ``(N,)``.
            crops: How each is augmented ``(N, 3)``; None: it is not.
        """
        inputs, group, size, augments = self.inputs, self.group, len(indices), self.augments()
        if augments:  # one draw, whatever a worker's rows draw: all workers have the same next order
            seed = int(torch.randint(2**62, (), generator=self.generator)) + group.rank
            generator = torch.Generator().manual_seed(seed)
        indices = group.share(indices)
        parts = indices.split(size if self.micro_batch == self.config.batch_size else self.micro_batch)
        crop_parts = [None] * len(parts) if crops is None else group.share(crops).split(max(1, len(parts[0])))
        for k, (part, part_crops) in enumerate(zip(parts, crop_parts, strict=True), start=1):
            x, y = (gather(tensor, part, self.device) for tensor in (inputs.train_x, inputs.train_y))
            if augments and len(x):
                x = self.augment(x, generator)
            elif part_crops is not None:
                x = augment(x, part_crops)
            with group.accumulating(self.parallel, last=k == len(parts)):
                with self.settings.autocast():
                    logits = self.parallel(self.to_network(x)).float()
                loss = self._loss_sum(logits, y, self.config.label_smoothing)
                # parts add up to the mean over the batch; workers are averaged
                (loss * (group.size / size)).backward()
            self.loss_sum += loss.detach()
            self.correct += (logits.detach().argmax(1) == y).sum()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss_sum(self, logits: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
        if not self.has_own_loss:
            return F.cross_entropy(logits, y, reduction="sum", label_smoothing=smoothing)
        return self.loss(logits, y) * len(y)

    def _draw_crops(self, sizes: list[int]) -> Tensor | None:
        """Draw how an epoch's images are augmented ``(N, 3)``; None: they are not.

        Drawn for whole batches, so that neither workers nor parts change it, and on the CPU, so that no
        device does.
        """
        if self.config.augment == "none" or self.augments():
            return None
        side, flip = self.data.image_shape[1], self.config.augment == "crop_flip"
        crops = [draw_crops(size, side, self.generator, flip=flip) for size in sizes]
        return torch.cat(crops).to(self.device)

    def _graph_of_epoch(self, sizes: list[int]) -> StepGraph | None:
        """Return what replays the full batches; None where steps run eagerly."""
        full = sizes.count(self.config.batch_size)
        if not (self.settings.cuda_graph and self.group.size == 1 and full) or self.augments():
            return None
        if self.graph is None:
            augmented = self.config.augment != "none"
            self.graph = StepGraph(
                full, self.config.batch_size, self._set_lr, self.device, augmented=augmented
            )
        return self.graph

    def _set_lr(self, lr: float | Tensor) -> None:
        for lr_group in self.optimizer.param_groups:
            scaled = lr * lr_group.get("lr_scale", 1.0)
            if isinstance(lr_group["lr"], Tensor):
                lr_group["lr"].fill_(scaled)
            else:
                lr_group["lr"] = scaled

    @torch.inference_mode()
    def evaluate(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed loss over all of x ``(N, …)``, and the confusion matrix ``(true, predicted)``."""
        x, y = self.group.stretch(x), self.group.stretch(y)
        loss_sum, classes = torch.zeros((), device=self.device), len(self.data.classes)
        confusion = torch.zeros(classes**2, device=self.device, dtype=torch.int64)
        batches = y.to(self.device).split(self.eval_batch(x))
        for part_y, logits in zip(batches, self._logits(self.network, self.to_network, x), strict=True):
            loss_sum += self._loss_sum(logits.float(), part_y)
            pairs = part_y * classes + logits.argmax(1)
            confusion.index_add_(0, pairs, torch.ones_like(pairs))
        return self.group.total(loss_sum, confusion.view(classes, classes))

    @torch.inference_mode()
    def predict_and_loss(self, images: np.ndarray, labels: Tensor) -> tuple[Tensor, float]:
        """Return class probabilities ``(N, classes)``, on the CPU, of test images, and their mean loss.

        Args:
            images: uint8 ``(N, 3, H, W)``, of which a batch at a time is read.
            labels: int64 ``(N,)``.
        """
        if self.inputs.kind == "features" and self.config.weights != "none":  # else each seed has its own
            x = cached_features(self.config, self.data, self.settings, self.data_dir, images)
            batches = self._logits(self.network, self.to_network, x)
        else:
            batches = self._logits(self.model, self.pipeline, mapped_tensor(images))
        # written in place: what is kept of each batch would leave holes between what the next ones take
        probabilities = torch.empty(len(labels), len(self.data.classes))
        loss_sum, start = 0.0, 0
        for logits in batches:
            end = start + len(logits)
            loss_sum += self._loss_sum(logits.float(), labels[start:end].to(self.device)).item()
            probabilities[start:end] = logits.float().softmax(1)
            start = end
        return probabilities, loss_sum / len(labels)

    def _logits(
        self, network: nn.Module, prepare_batch: Callable[[Tensor], Tensor], x: Tensor
    ) -> Iterator[Tensor]:
        """Yield the logits of x in batches, in eval mode."""
        network.eval()
        for part in x.split(self.eval_batch(x)):
            with self.settings.autocast():
                # a copy, since a network may write to its input, and a map cannot be written
                logits = network(prepare_batch(part.to(self.device, copy=True)))
            yield logits

    def to_network(self, x: Tensor) -> Tensor:
        """Return inputs as the network reads them: uint8 images pass the pipeline, others are ready."""
        return self.pipeline(x) if self.inputs.kind == "images" else x

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming needs, readable with ``weights_only=True``."""
        return {
            "config": self.config.to_dict(),
            "split_sha256": self.inputs.split_sha256,
            "reports": self.reports,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],  # its other values follow from the config
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state.

        Raises:
            ValueError: The state is another trial's, or was made on another validation split.
        """
        if self.config.space.config(state["config"]).to_dict() != self.config.to_dict():
            raise ValueError("the checkpoint belongs to another configuration")
        if state["split_sha256"] != self.inputs.split_sha256:
            raise ValueError("the checkpoint was trained on another training/validation split")
        self.network.load_state_dict(state["network"])
        saved, lrs = state["optimizer"], [lr_group["lr"] for lr_group in self.optimizer.param_groups]
        own = self.optimizer.state_dict()
        # before 2026-11-28 checkpoints had param_groups, too
        self.optimizer.load_state_dict(own | {"state": saved["state"] if "param_groups" in saved else saved})
        for lr_group, lr in zip(self.optimizer.param_groups, lrs, strict=True):  # torch has copied tensors
            lr_group["lr"] = lr
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])
        self.reports = list(state["reports"])
        self.graph = None  # it would write to the optimizer state of before

    def save(self, file: Path | IO[bytes]) -> None:
        """Write a checkpoint."""
        torch.save(self.state_dict(), file)

    def load(self, file: Path | IO[bytes]) -> None:
        """Read a checkpoint; tensors and plain values only.

        Raises:
            DamagedCheckpointError: The file is truncated or its bits have changed.
            ValueError: It is another trial's.
        """
        self.load_state_dict(read_checkpoint(file))

    def eval_batch(self, x: Tensor) -> int:
        """Return how many rows of x to evaluate at a time."""
        if self.device.type == "cpu" and has_convolution(self.model):
            return min(self.micro_batch, EVAL_BATCH_MAX)
        enlarged = (self.config.image_size / self.data.image_shape[1]) ** 2
        image_bytes = x[0].numel() * 4 * (enlarged if x.dtype == torch.uint8 else 1)
        return max(1, int(EVAL_BATCH_BYTES / image_bytes))

    def _is_at_chance(self, report: dict[str, Any]) -> bool:
        if self.leaves_chance_by is None or report["epoch"] < self.leaves_chance_by:
            return False
        name, labels = ("train", self.inputs.train_y) if self.config.refit else ("val", self.inputs.val_y)
        chance = 1 / len(self.data.classes)
        limit = chance + CHANCE_MARGIN * math.sqrt(chance * (1 - chance) / len(labels))
        return report[f"{name}_accuracy"] <= limit < (1 + chance) / 2  # too few images say nothing


def read_checkpoint(file: Path | IO[bytes]) -> dict[str, Any]:
    """Return what a checkpoint holds; tensors on the CPU, as the states of all generators have to be.

    Raises:
        DamagedCheckpointError: The file is truncated or its bits have changed.
    """
    try:
        with zipfile.ZipFile(file) as archive:  # torch.load verifies no checksum (2.15)
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise DamagedCheckpointError(f"{file} cannot be read: {error}") from error
    if damaged:
        raise DamagedCheckpointError(f"{file}: the checksum of {damaged} is wrong")
    if not isinstance(file, Path):
        file.seek(0)
    saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return saved


def _check_batch_norm(network: nn.Module, batch_size: int) -> None:
    """Raise ValueError for batches of one image, of which BatchNorm has no statistics."""
    if batch_size > 1:
        return
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in network.modules()):
        raise ValueError("batch_size=1 is not possible with the network's BatchNorm; give 2 or more")


def class_metrics(confusion: Tensor) -> dict[str, float]:
    """Return accuracy, balanced_accuracy and macro_f1 of a confusion matrix ``(true, predicted)``.

    The latter two are means over classes, of recall and of F1; classes without an image are left out.
    """
    counts = confusion.double().cpu()
    hits, of_class = counts.diagonal(), counts.sum(1)
    present = of_class > 0
    recall, f1 = hits / of_class, 2 * hits / (of_class + counts.sum(0))
    return {
        "accuracy": (hits.sum() / of_class.sum()).item(),
        "balanced_accuracy": recall[present].mean().item(),
        "macro_f1": f1[present].mean().item(),
    }


def make_optimizer(
    config: TrainConfig, parameters: Iterable[Tensor], lr: float | Tensor
) -> torch.optim.Optimizer:
    """Build an optimizer, fused: torch's default takes twice as long a step with Adam on a processor.

    Args:
        config: Names the optimizer and its values.
        parameters: What is trained.
        lr: A number; or a scalar on the GPU, whose steps may then be captured as a CUDA graph.
    """
    options: dict[str, Any] = {"lr": lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, nesterov=config.nesterov, **options)
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return optimizer(parameters, capturable=isinstance(lr, Tensor), **options)


def batch_sizes(count: int, batch_size: int) -> list[int]:
    """Return the sizes of an epoch's batches; a last one of one image joins the one before.

    BatchNorm in training refuses a single value per channel.
    """
    full, rest = divmod(count, batch_size)
    if rest == 1 and full:
        return [batch_size] * (full - 1) + [batch_size + 1]
    return [batch_size] * full + ([rest] if rest else [])


def gather(x: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """Return ``x[index]`` on a device, in the memory format of x; the index is where x is.

    index_select is twice as fast for rows that are contiguous in memory, and would lose channels_last.
    """
    rows = x.index_select(0, index) if x.is_contiguous() else x[index]
    if (
        rows.device.type != device.type
    ):  # pinned pages are copied while the GPU still trains on the batch before
        rows = rows.pin_memory().to(device, non_blocking=True)
    return rows


def lr_at(config: TrainConfig, epochs: float) -> float:
    """Return the lr of the step whose middle is this many (fractional) epochs after the start.

    Warm-up rises linearly to ``config.lr``; cosine then falls to 0 at ``config.epochs``
    (Loshchilov & Hutter 2017, without restarts).
    """
    if epochs < config.warmup_epochs:
        return config.lr * epochs / config.warmup_epochs
    if config.schedule == "constant":
        return config.lr
    done = (epochs - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
