"""How does a dataclass become a command line?   parse(Config)

Every field is one flag, or a word in its place if its type is `tyro.conf.Positional`:
`--batch_size 64`, `--batch-size 64` and `--test=False` all work, so that a W&B sweep can drive each
of them. Limits stand beside the type (`epochs: Count`), the help text is
the comment behind the field.
"""

import dataclasses
import errno
import math
import os
import sys
import typing
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from common.errors import UserError
from common.files import read_json


@dataclasses.dataclass(frozen=True)
class Limits:
    """The values that a number may take; infinity and NaN never are."""

    low: float
    high: float = math.inf
    low_is_allowed: bool = True
    multiple_of: int = 1

    def refuses(self, value: float) -> str | None:
        """What a right value would be, or None where `value` is one."""
        wrong = not self.low <= value <= self.high or value == math.inf  # NaN is not between
        if value == self.low and not self.low_is_allowed:
            wrong = True
        if isinstance(value, int) and value % self.multiple_of:
            wrong = True
        if not wrong:
            return None
        text = f"at least {self.low:g}" if self.low_is_allowed else f"greater than {self.low:g}"
        if self.high < math.inf:
            text += f" and at most {self.high:,.10g}"
        return text + (f" and a multiple of {self.multiple_of}" if self.multiple_of > 1 else "")


# No use has numbers near these bounds: a slip of the keyboard is named before memory runs out.
Count = Annotated[int, Limits(1, 1_000_000)]  # epochs, channels, images in a batch
Batch = Annotated[int, Limits(2, 1_000_000)]  # batch norm wants two images at least
Natural = Annotated[int, Limits(0, 2**31 - 1)]  # seeds, warm-up epochs
ImageSize = Annotated[int, Limits(8, 1024, multiple_of=8)]  # three halvings leave whole pixels
Positive = Annotated[float, Limits(0, 1e6, low_is_allowed=False)]  # learning rates
NonNegative = Annotated[float, Limits(0, 1e6)]  # weight decay
Fraction = Annotated[float, Limits(0, 1)]  # shares, alpha
Draws = Annotated[int, Limits(1, 100)]  # repetitions of a probe
Points = Annotated[int, Limits(10, 2000)]  # of a map on a page: 2,000 are drawn without a delay

# What a continued run may be told anew; everything else would make it another run.
FREE_ON_RESUME = ("resume", "run_dir", "data_dir", "tracking")

ConfigType = TypeVar("ConfigType")


def parse(config_class: type[ConfigType], args: Sequence[str] | None = None) -> ConfigType:
    """Read the command line into a frozen dataclass; with `--resume RUN`, on top of RUN's own.

    Args:
        config_class: a frozen dataclass of scalars and `Literal`s, one flag per field; one
            without the field `resume` has no runs to continue.
        args: words of the command line; None reads `sys.argv`.

    Raises:
        UserError: a number outside its limits; a text that is empty or unprintable; a flag that
            contradicts the run to be continued.
        SystemExit: what tyro itself refuses (unknown flags, words for numbers), with its own text.
    """
    config = _checked(_command_line(config_class, args, default=None))
    if getattr(config, "resume", None) is not None:
        if config.run_dir is not None:
            raise UserError("--resume names the run folder already; leave --run_dir out")
        if (Path(config.resume) / "config.json").exists():
            config = _checked(_continued(config_class, args, Path(config.resume)))
    return config


def _checked(config: ConfigType) -> ConfigType:
    """The same, if every number is within its limits and every text can be a name."""
    for name, limits in _limits(type(config)).items():
        value = getattr(config, name)
        right = None if value is None else limits.refuses(value)
        if right:
            raise UserError(f"--{name} {value} is out of range: it must be {right}")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_list = field.default == ""  # of tags: may be empty, or longer than a file's name
        for text in value if isinstance(value, tuple) else [value]:
            if isinstance(text, str) and (wrong := _wrong_text(text, is_list)):
                raise UserError(f"--{field.name} {wrong}")
    return config


def _wrong_text(text: str, is_list: bool) -> str | None:
    """Why no file, and no project of W&B, can be called so; None where one can."""
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
        console_outputs=os.environ.get("RANK", "0") == "0",
    )


def _continued(config_class: type, args: Sequence[str] | None, run_dir: Path) -> Any:
    """The configuration of the run in `run_dir`, if the command line does not contradict it."""
    settings = read_json(run_dir / "config.json")
    settings = settings.get("settings") if isinstance(settings, dict) else None
    if not isinstance(settings, dict):
        raise UserError(f"{run_dir}/config.json holds no settings of a run; restore a copy of it")
    fields = {field.name for field in dataclasses.fields(config_class)}
    if set(settings) != fields:
        odd = ", ".join(sorted(set(settings) ^ fields))
        raise UserError(f"{run_dir} was made by another script or version (fields: {odd})")
    stored = config_class(**settings | {"resume": str(run_dir), "run_dir": None})
    # Parsed on top of the stored values, only what the user typed can differ from them.
    config = _command_line(config_class, args, default=stored)
    config = dataclasses.replace(config, resume=str(run_dir))
    differences = [
        f"--{name} {getattr(config, name)} (the run has {getattr(stored, name)})"
        for name in settings
        if name not in FREE_ON_RESUME and getattr(config, name) != getattr(stored, name)
    ]
    if differences:
        raise UserError(
            f"{run_dir} cannot go on with {', '.join(differences)}; "
            "leave these flags out, or start a new run"
        )
    return config


def _limits(config_class: type) -> dict[str, Limits]:
    """The limits of each field that has them, also inside `Count | None`."""
    found = {}
    for name, hint in typing.get_type_hints(config_class, include_extras=True).items():
        for option in (hint, *typing.get_args(hint)):
            for metadata in getattr(option, "__metadata__", ()):
                if isinstance(metadata, Limits):
                    found[name] = metadata
    return found
