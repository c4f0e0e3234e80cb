"""Command lines from dataclasses: `parse(Config)`.

Every field is one flag, or a positional argument if its type is `tyro.conf.Positional`:
`--batch_size 64`, `--batch-size 64` and `--test=False` all work, so that a W&B sweep can set each
of them. Limits are part of the type (`epochs: PositiveInt`), the help text is the comment behind
the field.
"""

import dataclasses
import errno
import math
import os
import sys
import typing
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from . import console
from .errors import UserError
from .files import expand_home, read_json


@dataclasses.dataclass(frozen=True)
class Limits:
    """The range of a number; infinity and NaN are always outside."""

    low: float
    high: float = math.inf
    low_is_allowed: bool = True

    def refuses(self, value: float) -> str | None:
        """What the value must be, or None if it is."""
        in_range = self.low <= value <= self.high and value < math.inf  # NaN is not
        excluded = value == self.low and not self.low_is_allowed
        if in_range and not excluded:
            return None
        text = f"at least {self.low:g}" if self.low_is_allowed else f"greater than {self.low:g}"
        if self.high < math.inf:
            text += f" and at most {self.high:,.10g}"
        return text


# Upper bounds are far beyond any use: they catch typing errors before memory runs out.
PositiveInt = Annotated[int, Limits(1, 1_000_000)]  # epochs, channels, images in a batch
BatchSize = Annotated[int, Limits(2, 1_000_000)]  # batch norm needs at least two images
NonNegativeInt = Annotated[int, Limits(0, 2**31 - 1)]  # seeds, warm-up epochs
ImageSize = Annotated[int, Limits(8, 1024)]  # three halvings leave a pixel
White = Annotated[float, Limits(0, 2**32, low_is_allowed=False)]  # a gray value
PositiveFloat = Annotated[float, Limits(0, 1e6, low_is_allowed=False)]  # learning rates
NonNegativeFloat = Annotated[float, Limits(0, 1e6)]  # weight decay
Fraction = Annotated[float, Limits(0, 1)]  # shares, alpha
Draws = Annotated[int, Limits(1, 100)]  # repetitions of a probe
Points = Annotated[int, Limits(10, 2000)]  # of a map; browsers draw 2,000 without a delay

_PLACE = object()
Place = Annotated[str, _PLACE]  # a file or folder; parse replaces a leading ~

Blocks = Annotated[int, Limits(0, 100)]  # of a network, per stage
Views = Annotated[int, Limits(1, 100)]  # of an image

DatasetName = Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "folder"]
EncoderName = Literal["cnn", "airbench", "resnet18", "resnet34", "resnet50"]
OptimizerName = Literal["sgd", "adamw", "muon"]


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The flags that all training scripts share."""

    # Data
    dataset: DatasetName = "digits"  # which images; folder: your own
    data_dir: Place = "data"  # where they lie; for folder it holds train/CLASS/* (and test/CLASS/*)
    image_size: ImageSize = 32  # pixels a side
    limit_train: BatchSize | None = None  # take only so many training images, for a quick try
    labels_per_class: PositiveInt | None = None  # only so many training images keep their label
    skip_unreadable: bool = False  # folder: leave out images that cannot be read
    labels: str | None = None  # folder: a CSV file of path, label (and group), in place of folders
    balance: bool = False  # classes count evenly in training, however many images they have
    white: White | None = None  # folder: white of 16-bit and float images; None: 65535, 1 of float
    # Model
    encoder: EncoderName = "cnn"  # the network in front of the latents
    width: PositiveInt | None = None  # base channels; None: 32 for cnn, 64 for the others
    blocks: Blocks = 0  # residual blocks per stage of cnn and airbench (and of the decoder)
    # Evaluation
    evaluate_every: PositiveInt | None = None  # epochs; None: 1, or 20 to 40 times without --epochs
    knn_images: PositiveInt = 5000  # training images among which kNN on validation searches
    tsne_images: PositiveInt = 2000  # test images in the t-SNE picture
    test: bool = True  # evaluate on the test images at the end; False in sweeps
    # Run
    epochs: PositiveInt | None = None  # None: 20, or as many as make 1,000 steps
    seed: NonNegativeInt = 0  # of the weights, the order of the images and their augmentation
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"  # auto: bf16 where it is fast
    compile: bool = False  # torch.compile the training step; the first steps take longer
    log_every: PositiveInt = 50  # steps between two rows of train/loss
    run_dir: Place | None = None  # where everything goes; None: runs/METHOD-DATASET-TIME-XXXX
    resume: Place | None = None  # resume the run in this folder, or start there
    project: str | None = None  # of W&B; None: what W&B is set to, else latent-spaces
    group: str | None = None  # of W&B; None: what W&B is set to, else the data set
    tags: str = ""  # of W&B, separated by commas
    tracking: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: W&B, if logged in


# Flags that may change when a run is resumed.
FREE_ON_RESUME = ("resume", "run_dir", "data_dir", "tracking")
CHOSEN_BY_THE_RUN = ("epochs", "evaluate_every")  # None means the number that it has
RENAMED = {("augment", "light"): "crop_flip"}  # values of settings in older runs

ConfigType = TypeVar("ConfigType")


def parse(config_class: type[ConfigType], args: Sequence[str] | None = None) -> ConfigType:
    """Parse the command line into a frozen dataclass; with `--resume RUN`, RUN's are the defaults.

    Args:
        config_class: a frozen dataclass of scalars and `Literal`s, one flag per field; one
            without the field `resume` cannot be resumed.
        args: command-line arguments; None reads `sys.argv`: this process is a script, whose
            streams and errors `console.begin` takes care of.

    Raises:
        UserError: a number outside its limits; a text that is empty or unprintable; a flag that
            contradicts the run to be resumed.
        SystemExit: tyro's own errors (unknown flags, text instead of numbers), with tyro's message.
    """
    if args is None:
        console.begin()
    config = _checked(_command_line(config_class, args, default=None))
    if getattr(config, "resume", None) is not None:
        if config.run_dir is not None:
            raise UserError("--resume names the run folder already; leave --run_dir out")
        if (Path(config.resume) / "config.json").exists():
            try:
                with warnings.catch_warnings(action="ignore"):  # of tyro, about values' types
                    config = _checked(_resumed(config_class, args, Path(config.resume)))
            except (TypeError, AssertionError) as error:  # the latter of tyro up to 1.0
                raise UserError(
                    f"{config.resume}/config.json holds a setting of another type ({error}); "
                    "restore a copy of it"
                ) from None
    return config


def _checked(config: ConfigType) -> ConfigType:
    """`config`, if every number is within its limits and every text can be a name.

    Places are the same, however they are given: a shell replaces a ~ only where a word begins
    with it, and a sweep never does.
    """
    expanded = {name: _expanded(getattr(config, name)) for name in _places(type(config))}
    config = dataclasses.replace(config, **expanded)
    for name, limits in _limits(type(config)).items():
        value = getattr(config, name)
        rule = None if value is None else limits.refuses(value)
        if rule:
            raise UserError(f"--{name} {value} is out of range: it must be {rule}")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_list = field.default == ""  # tags: may be empty, or longer than a file name
        for text in value if isinstance(value, tuple) else [value]:
            if isinstance(text, str) and (wrong := _wrong_text(text, is_list)):
                raise UserError(f"--{field.name} {wrong}")
    return config


def _expanded(value: Any) -> Any:
    """A place, several or none, without ~."""
    if isinstance(value, tuple):
        return tuple(map(expand_home, value))
    return value and expand_home(value)


def _wrong_text(text: str, is_list: bool) -> str | None:
    """Why this cannot be the name of a file or a W&B project; None if it can."""
    if not text.strip():
        return None if is_list else "is empty; name one, or leave the flag out"
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        return f"{text!a} holds control characters; leave them out"
    if is_list:
        return None
    try:
        os.lstat(text)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return f"{text[:20]}… is too long for a name"
    return None


def _command_line(config_class: type, args: Sequence[str] | None, default: Any) -> Any:
    return tyro.cli(
        config_class,
        args=args,
        default=default,
        description=sys.modules[config_class.__module__].__doc__,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
        console_outputs=console.is_first_process(),
    )


def _resumed(config_class: type, args: Sequence[str] | None, run_dir: Path) -> Any:
    """The configuration of the run in `run_dir`; `UserError` if the command line contradicts it."""
    settings = read_json(run_dir / "config.json")
    settings = settings.get("settings") if isinstance(settings, dict) else None
    if not isinstance(settings, dict):
        raise UserError(f"{run_dir}/config.json holds no settings of a run; restore a copy of it")
    fields = {field.name for field in dataclasses.fields(config_class)}
    if set(settings) != fields:
        odd = ", ".join(sorted(set(settings) ^ fields))
        raise UserError(f"{run_dir} was made by another script or version (fields: {odd})")
    settings = renamed(settings)
    stored = config_class(**settings | {"resume": str(run_dir), "run_dir": None})
    # with the stored values as defaults, only flags on the command line can differ from them
    config = _command_line(config_class, args, default=stored)
    names = {name for name in fields.intersection(CHOSEN_BY_THE_RUN) if not getattr(config, name)}
    chosen = {name: getattr(stored, name) for name in names}
    config = dataclasses.replace(config, resume=str(run_dir), **chosen)
    free = [*FREE_ON_RESUME]
    if getattr(stored, "labels", None) and getattr(config, "labels", None):
        free.append("labels")  # a file that moves with the images, whose fingerprint holds them
    differences = [
        f"--{name} {getattr(config, name)} (the run has {getattr(stored, name)})"
        for name in settings
        if name not in free and getattr(config, name) != getattr(stored, name)
    ]
    if differences:
        raise UserError(
            f"{run_dir} cannot be resumed with {', '.join(differences)}; "
            "leave these flags out, or start a new run"
        )
    return config


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run with this version's names of values."""
    return {name: RENAMED.get((name, str(value)), value) for name, value in settings.items()}


def _limits(config_class: type) -> dict[str, Limits]:
    """The limits of each field that has some, also inside `PositiveInt | None`."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    found = {name: [x for x in _metadata(h) if isinstance(x, Limits)] for name, h in hints.items()}
    return {name: limits[-1] for name, limits in found.items() if limits}


def _places(config_class: type) -> list[str]:
    """The fields that hold a place, or several."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    return [name for name, hint in hints.items() if _PLACE in _metadata(hint)]


def _metadata(hint: Any) -> list[Any]:
    """What is annotated in a type, and in its parts."""
    parts = [item for part in typing.get_args(hint) for item in _metadata(part)]
    return [*getattr(hint, "__metadata__", ()), *parts]
