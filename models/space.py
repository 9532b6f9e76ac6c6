"""A space: a network or a training, and what is searched of it; and one configuration of it, checked once.

A key of a space's ranges is a field of `TrainConfig` or an argument of its builder, never both, so that a
name means one thing from the space to the command line, the journal and the tables.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from typing import Any

from ray.tune.search.sample import Domain

from tunefleet import lookup
from tunefleet.metric import OF_IMAGES, Metric, metric_of
from tunefleet.models.checks import (
    boolean,
    check_integer,
    check_name,
    check_number,
    check_statistics,
    nearest,
)
from tunefleet.models.network import Network
from tunefleet.models.ranges import check_kind, contains, described, ends, middle, plain, plain_range

PRECISIONS = ("auto", "fp32", "bf16")
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine")
AUGMENTS = ("none", "crop", "crop_flip")  # a mirrored digit is another sign: flips are a choice of their own
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # what torchvision's weights were trained with
OF_EVERY_RUN = ("architecture", "epochs", "seed", "refit")  # keys of a trial's config that no space sets
OF_A_REPORT = (  # what the study itself records of a trial and of each of its reports
    *("trial_id", "status", "rung", "seconds", "node", "epoch", "diverged", "error", "pid", "gpu", "phase"),
    *("epoch_seconds", "finished_at", "config", "lost", "promoted_from", "run"),
)
RESERVED = (*OF_A_REPORT, "train_loss", "train_accuracy", "architecture", "space", "build")
FIRST_EDITION = ("hidden", "kernel_size")  # in every config then, null where the network has no such one
ESSENCE = ("build", "run", "normalise", "cuda_graph")  # what workers take from a space's source
TRAITS = ("channels_last", "micro_batches", "feature_cache")
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation, per channel
Parser = Callable[[str], Any]  # of a value on a command line


def literal(text: str) -> Any:
    """Return the number, boolean, None or list that a text writes, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


PARSERS: dict[str, Parser] = {"str": str, "int": int, "float": float, "bool": boolean}


@dataclass(frozen=True, eq=False)
class Space:
    """What is searched, and of what: a network with its ranges and budgets, or a training of your own.

    Args:
        build: Builds the network: ``build(num_classes, image_shape, **own)`` with an ``image_shape`` of
            ``(3, H, W)`` returns an ``nn.Module`` from images ``(N, 3, H, W)`` to logits
            ``(N, num_classes)``; a class may be one. An argument named ``weights`` gets ``--weights``.
        ranges: Ray Tune's, by field of `TrainConfig` or argument of ``build``.
        run: A class that trains by itself, or a subclass of ``TrainingRun``.
        first: A value for each range: what the first trial has. None: the middle of each.
        fixed: Values that no trial varies.
        name: None: that of the variable that holds the space.
        summary: A line for ``--list-spaces``.
        why: Why the ranges are what they are, likewise.
        trials: Default of ``--trials``.
        epochs: Default of ``--epochs``.
        metric: What rungs compare and the winner is chosen by.
        mode: max or min; None: as the metric's name says.
        image_size: Default of ``--image-size``; where ``build`` has ``weights``, with trained ones only.
        cpu_image_size: The same on CPUs; None: the same.
        normalise: ``data`` (mean and standard deviation of the training images), ``imagenet``,
            ``(mean, std)`` of three fractions each, or a function of the builder's own arguments, as a
            dict, that returns those of the images its weights were trained on (untrained: ``data``).
        gpus_per_trial: Default where there are GPUs; small networks share one.
        workers_per_trial: Default where there are as many GPUs.
        published: A published accuracy, a fraction, that a report compares with.
        leaves_chance_by: Epochs; an accuracy at chance from then on is a divergence. None: never.
        channels_last: Whether the network computes the same in that memory format; None: one batch tells.
        micro_batches: Whether the gradient of a batch is the sum of its parts'; None: one batch tells.
        feature_cache: Whether a frozen ``backbone``'s outputs may stand for images; None: one batch tells.
        cuda_graph: Whether a step may be captured as a CUDA graph, which freezes what its Python code does.

    Raises:
        ValueError: A key is unknown, a value impossible.
    """

    build: Callable[..., Any] | None = None
    ranges: Mapping[str, Domain] = field(default_factory=dict)
    _: KW_ONLY
    run: type[Any] | None = None
    first: Mapping[str, Any] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    summary: str = ""
    why: str = ""
    trials: int = 32
    epochs: int = 27
    metric: str = "val_accuracy"
    mode: str | None = None
    image_size: int | None = None
    cpu_image_size: int | None = None
    normalise: str | Statistics | Callable[[Mapping[str, Any]], Statistics] = "data"
    gpus_per_trial: float = 1.0
    workers_per_trial: int = 1
    published: float | None = None
    leaves_chance_by: int | None = 10
    channels_last: bool | None = None
    micro_batches: bool | None = None
    feature_cache: bool | None = None
    cuda_graph: bool = False
    source: Any = field(default=None, repr=False)  # a `sources.Source`; set where a space is found

    def __post_init__(self) -> None:
        if self.build is None and self.run is None:
            raise ValueError("a space needs build, which builds a network, or run, which trains by itself")
        if self.run is not None and self.trains_images == (self.build is None):
            needs = "needs build, too" if self.trains_images else "trains by itself; leave build out"
            raise ValueError(f"run={getattr(self.run, '__name__', self.run)} {needs}")
        self._make_plain()
        object.__setattr__(self, "name", self.name or builder_name(self))
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"name={self.name!r} is not possible; give letters, digits, _, - and .")
        self._check_arguments()
        for key in (*self.ranges, *self.fixed):
            self._check_key(key)
        for key in self.ranges:
            if key in self.fixed:
                raise ValueError(f"{key} is in ranges and in fixed; leave it in one of them")
        self._check_first()
        compared = metric_of(self.metric, self.mode)
        if self.trains_images:
            check_name("metric", compared.name, OF_IMAGES)
        for name, lowest in (("trials", 1), ("epochs", 1), ("workers_per_trial", 1)):
            check_integer(name, getattr(self, name), lowest)
        check_number("gpus_per_trial", self.gpus_per_trial, 0, math.inf)
        if not self.trains_images and self.workers_per_trial > 1:
            raise ValueError(f"workers_per_trial={self.workers_per_trial}: {self.name} trains alone; give 1")
        if self.trains_images:
            self.config({**self.fixed, **self.start})  # an impossible value is an error here
        if self.source:  # which a space that was changed since it was found has no longer
            essence = tuple(getattr(self, name) for name in ESSENCE)
            is_changed = self.source.essence not in (None, essence)
            object.__setattr__(self, "source", None if is_changed else replace(self.source, essence=essence))

    def _make_plain(self) -> None:
        """Make every value what the journal and a checkpoint give back."""
        ranges = {key: plain_range(key, domain) for key, domain in dict(self.ranges or {}).items()}
        object.__setattr__(self, "ranges", ranges)
        for name in ("first", "fixed"):
            given, values = getattr(self, name), {}
            for key, value in dict(given or {}).items():
                try:
                    values[key] = plain(value)
                except ValueError as error:
                    raise ValueError(f"{name} has {key}, and {error}") from None
            object.__setattr__(self, name, None if given is None and name == "first" else values)
        if isinstance(self.normalise, str):
            check_name("normalise", self.normalise, ("data", "imagenet"))
        elif not callable(self.normalise):
            object.__setattr__(self, "normalise", check_statistics(self.normalise))

    @property
    def _columns(self) -> set[str]:
        """Return the names that tables and reports have for themselves."""
        metrics = (self.metric, *OF_IMAGES)
        derived = [name for key in metrics for name in (key, f"best_{key}", Metric(str(key)).test_name)]
        return {*RESERVED, *derived}

    def _check_arguments(self) -> None:
        for name in self.arguments:
            if name in FIELDS or name in self._columns:
                what = "a hyperparameter of the training" if name in FIELDS else "a column of the results"
                raise ValueError(f"the argument {name} of {self.name} has the name of {what}; rename it")
        given = {*self.ranges, *self.fixed}
        for name, parameter in self.arguments.items():
            if parameter.default is parameter.empty and name not in given:
                raise ValueError(
                    f"{self.name} needs {name}, which has neither a range nor a default; give it one, or a "
                    "value in fixed"
                )

    def _check_key(self, key: str) -> None:
        if not isinstance(key, str) or not key.isidentifier():
            raise ValueError(f"{key!r} is no name of a hyperparameter; give a Python identifier")
        if self.trains_images and key in NOT_SEARCHED:
            what = "searched" if key in self.ranges else "fixed"
            raise ValueError(f"{key} cannot be {what}; {NOT_SEARCHED[key]}")
        if self.trains_images and key not in FIELDS and key not in self.arguments and not self.is_open:
            raise ValueError(
                f"{key} is neither a hyperparameter of the training nor an argument of {self.name}"
                f"{nearest(key, [*self.arguments, *FIELDS])}"
            )
        if key in self._columns or (not self.trains_images and key in OF_EVERY_RUN):
            raise ValueError(f"{key} is the name of a column of the results; rename it")

    def check_known(self, name: str) -> None:
        """Raise ValueError for a name that a training of its own has neither searched nor fixed."""
        known = {**self.ranges, **self.fixed}
        if not self.trains_images and name not in known:
            raise ValueError(
                f"{name} is neither in the ranges nor in fixed of {self.name}{nearest(name, known)}"
            )

    def _check_first(self) -> None:
        if self.first is None:
            return
        for key, value in self.first.items():
            if key not in self.ranges:
                raise ValueError(f"first has {key}, which has no range{nearest(key, self.ranges)}")
            if not contains(self.ranges[key], value):
                raise ValueError(f"first has {key}={value!r}, which is not in its range; give one that is")
        if missing := self.ranges.keys() - self.first.keys():
            raise ValueError(f"first lacks {', '.join(sorted(missing))}; give a value for each range")

    def search(self, **options: Any) -> Any:
        """Search this space; see ``tunefleet.search.api.search``."""
        return lookup("search.api", "search")(self, **options)

    def __reduce__(self) -> Any:
        """Pickle where the space comes from: another process imports it from there."""
        if self.source is None:
            raise TypeError(f"{self.name} has no source; see models/sources.py")
        return _space_of, (self.source, self.traits)

    @property
    def traits(self) -> dict[str, bool | None]:
        """Return what is known of the network, or was found out by one batch (trainables/examine.py)."""
        return {name: getattr(self, name) for name in TRAITS}

    @property
    def reference(self) -> str:
        """Return what ``--space`` takes to find it."""
        return self.source.reference if self.source else self.name

    @property
    def trains_images(self) -> bool:
        """Return whether trials train a network on images, which `TrainConfig` describes."""
        return self.run is None or getattr(self.run, "trains_images", False)

    @cached_property
    def arguments(self) -> dict[str, inspect.Parameter]:
        """Return the arguments of its own that the builder takes, beside classes, shape and weights."""
        return {
            name: p for name, p in self._parameters.items() if name != "weights" and p.kind not in VARIADIC
        }

    def statistics(self, own: Mapping[str, Any]) -> Statistics | None:
        """Return what to normalise with, given the builder's own arguments; None: the images' own."""
        if isinstance(self.normalise, str):
            return IMAGENET if self.normalise == "imagenet" else None
        return self.normalise(own) if callable(self.normalise) else self.normalise

    @property
    def takes_weights(self) -> bool:
        """Return whether the builder loads weights."""
        return "weights" in self._parameters

    @property
    def is_open(self) -> bool:
        """Return whether the builder takes any argument."""
        return any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())

    @cached_property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        if self.build is None:
            return {}
        if not callable(self.build):
            raise ValueError(f"build={self.build!r} cannot be called; give a function or a class")
        try:
            signature = inspect.signature(self.build, eval_str=True)
        except NameError:  # an annotation that only a type checker sees
            signature = inspect.signature(self.build)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the arguments of {self.build!r} are not known ({error}); wrap it") from None
        try:
            signature.bind_partial(None, None)
        except TypeError:
            raise ValueError(
                f"{self.name} has to take num_classes and image_shape as its first two arguments"
            ) from None
        first_two = [p.name for p in signature.parameters.values() if p.kind in POSITIONAL][:2]
        return {name: p for name, p in signature.parameters.items() if name not in first_two}

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Return the builder's own defaults that a journal can hold."""
        kinds = (str, int, float, bool, type(None))
        return {
            name: plain(parameter.default)
            for name, parameter in self.arguments.items()
            if isinstance(parameter.default, kinds)
        }

    @cached_property
    def start(self) -> dict[str, Any]:
        """Return the first trial's value of each range."""
        if self.first is not None:
            return dict(self.first)
        return {name: middle(domain) for name, domain in self.ranges.items()}

    def fixing(self, values: Mapping[str, Any]) -> Space:
        """Return the space with values that every trial has, searched otherwise or not.

        Raises:
            ValueError: A value is impossible.
        """
        first = self.start
        return replace(
            self,
            ranges={key: domain for key, domain in self.ranges.items() if key not in values},
            first={key: value for key, value in first.items() if key not in values},
            fixed={**self.fixed, **values},
        )

    def ranging(self, ranges: Mapping[str, Domain]) -> Space:
        """Return the space with other ranges; a first or fixed value outside becomes the middle of its range.

        Raises:
            ValueError: A name is no hyperparameter that can be searched, or its values have another type.
        """
        ranges = {key: plain_range(key, domain) for key, domain in ranges.items()}
        for key, domain in ranges.items():
            check_kind(key, domain, self._kind(key))
        kept = {key: value for key, value in self.start.items() if key not in ranges}
        known = {**self.fixed, **self.start}
        moved = {
            key: known[key] if key in known and contains(domain, known[key]) else middle(domain)
            for key, domain in ranges.items()
        }
        return replace(
            self,
            ranges={**self.ranges, **ranges},
            first={**kept, **moved},
            fixed={key: value for key, value in self.fixed.items() if key not in ranges},
        )

    def fixed_values(self, *, epochs: int, seed: int, image_size: int, weights: str) -> dict[str, Any]:
        """Return every value of a trial's config that is not searched.

        Raises:
            ValueError: A value is impossible.
        """
        common = {"architecture": self.name, "epochs": epochs, "seed": seed}
        if not self.trains_images:
            return {**common, **self.fixed}
        values = {**common, "image_size": image_size, "weights": weights if self.takes_weights else "none"}
        config = self.config({**values, **self.fixed, **self.start}).to_dict()
        return {key: value for key, value in config.items() if key not in self.ranges}

    def config(self, values: Mapping[str, Any]) -> TrainConfig:
        """Build a config from a trial's flat values.

        Raises:
            ValueError: A key is no hyperparameter, or a value impossible.
        """
        fields: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key, value in values.items():
            if key in FIELDS:
                fields[key] = value
            elif key in self.arguments or (self.is_open and key != "architecture"):
                own[key] = value
            elif key != "architecture" and not (key in FIRST_EDITION and value is None):
                raise ValueError(f"{key} is no hyperparameter{nearest(key, [*FIELDS, *self.arguments])}")
        if isinstance(self.build, Network):  # in the first edition null stood for the default
            own = {name: value for name, value in own.items() if value is not None}
        own = self.defaults | own
        if isinstance(self.build, Network):
            self.build.check(**own)
        return TrainConfig(self, **fields, model=own)

    def _kind(self, name: str) -> str:
        """Return a hyperparameter's type, a key of PARSERS, by annotation or default; empty: not known."""
        if self.trains_images and name in FIELDS:
            return str(FIELDS[name].type)
        if name not in self.arguments:
            return ""
        annotation, default = self.arguments[name].annotation, self.arguments[name].default
        kind = getattr(annotation, "__name__", str(annotation)).removesuffix(" | None")
        if kind not in PARSERS:
            kind = type(default).__name__
            if kind == "int" and name in self.ranges and float in map(type, ends(self.ranges[name])):
                kind = "float"  # dropout=0
        return kind if kind in PARSERS else ""

    def parser_of(self, name: str) -> Parser:
        """Return what turns a text of the command line into a value of this hyperparameter.

        Raises:
            ValueError: There is none of that name; names the nearest.
        """
        if kind := self._kind(name):
            return PARSERS[kind]
        if name in self.arguments:
            return literal
        if self.trains_images and not self.is_open:
            raise ValueError(f"{name} is no hyperparameter{nearest(name, [*self.arguments, *FIELDS])}")
        return literal

    def parse(self, name: str, text: str) -> Any:
        """Return the value that a text of the command line gives a hyperparameter.

        Raises:
            ValueError: There is no such hyperparameter, or the text is no value of its type.
        """
        parser = self.parser_of(name)
        try:
            return parser(text)
        except ValueError:
            kind = {"boolean": "bool"}.get(parser.__name__, parser.__name__)
            raise ValueError(f"{name}={text} is not possible; {name} is a value of type {kind}") from None

    def described(self) -> dict[str, Any]:
        """Return the ranges as study.json has them."""
        return described(self.ranges)

    def network(self, num_classes: int, image_shape: tuple[int, int, int], config: TrainConfig) -> Any:
        """Build a config's network.

        Raises:
            ValueError: The builder refuses the values.
        """
        assert self.build is not None
        weights = {"weights": config.weights} if self.takes_weights else {}
        return self.build(num_classes, image_shape, **config.model, **weights)


def builder_name(space: Space) -> str:
    """Return what a space is called that has no name of its own."""
    name = getattr(space.build or space.run, "__name__", "space")
    return name if name.isidentifier() else "space"


def _space_of(source: Any, traits: Mapping[str, Any]) -> Space:
    space: Space = source.space()
    return replace(space, **traits)


VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class TrainConfig:
    """One configuration of a network: the same one on the same data gives the same weights.

    What must not change a result (data folder, device, threads, storage) is a function argument elsewhere.
    Fields have the names of the space, the command line and trials.csv.

    Raises:
        ValueError: A value is impossible; one line that says what was given and what is allowed.
    """

    space: Space
    epochs: int = 10  # the schedule's horizon; a pruned trial trains fewer
    batch_size: int = 128  # images per optimizer step, over all workers of the trial
    lr: float = 0.01  # per optimizer step at the schedule's top
    weight_decay: float = 0.0  # L2 in the gradient for sgd and adam, decoupled for adamw
    momentum: float = 0.0  # sgd only
    optimizer: str = "sgd"
    nesterov: bool = False
    schedule: str = "constant"
    warmup_epochs: float = 0.0  # lr rises linearly from 0 over these
    label_smoothing: float = 0.0
    augment: str = "none"  # crop: at random after padding by 1/8 of the side; crop_flip: mirrored, too
    image_size: int = 32  # pixels a side as the network sees them; enlarged on the device
    weights: str = "none"  # of the backbone: imagenet, none or a path
    seed: int = 0  # initialisation and the order of the images
    refit: bool = False  # trains on the validation images, too, which then validate nothing
    model: Mapping[str, Any] = field(default_factory=dict)  # arguments of the builder's own

    def __post_init__(self) -> None:
        check_name("optimizer", self.optimizer, OPTIMIZERS)
        check_name("schedule", self.schedule, SCHEDULES)
        check_name("augment", self.augment, AUGMENTS)
        for name, lowest in (("epochs", 1), ("batch_size", 1), ("image_size", 1), ("seed", 0)):
            check_integer(name, getattr(self, name), lowest)
        check_number("lr", self.lr, 0, math.inf, low_allowed=False)
        check_number("weight_decay", self.weight_decay, 0, math.inf)
        check_number("momentum", self.momentum, 0, 1)
        check_number("label_smoothing", self.label_smoothing, 0, 1)
        check_number("warmup_epochs", self.warmup_epochs, 0, self.epochs)
        for name in ("nesterov", "refit"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not possible; give True or False")
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum > 0):
            raise ValueError("nesterov=True needs optimizer=sgd and a momentum above 0")

    def to_dict(self) -> dict[str, Any]:
        """Return all values as plain JSON-able ones, the builder's own beside the others."""
        fields = {name: getattr(self, name) for name in FIELDS}
        return {"architecture": self.space.name, **fields, **self.model}


FIELDS = {
    found.name: found for found in dataclasses.fields(TrainConfig) if found.name not in ("space", "model")
}
NOT_SEARCHED = {  # and what to do instead
    "architecture": "give --space",
    "refit": "the winner's seeds have it, and no trial",
    **{name: f"give --{name.replace('_', '-')}" for name in ("epochs", "image_size", "weights", "seed")},
}
