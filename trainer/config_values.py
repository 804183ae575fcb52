"""What sections of a config are made of: their base, and the types of single values (intervals, amounts, numbers).

Imports no torch. The sections are `trainer.config` and the `config_*` files beside this one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

from trainer.units import parse_bytes


class Section(BaseModel):
    """Base of every section: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


@dataclass(frozen=True)
class Interval:
    """How often, or how long: a number of optimizer steps or of passes over the training data."""

    count: int
    unit: Literal["steps", "epochs"] = "steps"

    def steps(self, steps_per_epoch: int) -> int:
        """Returns the interval in optimizer steps."""
        return self.count * (steps_per_epoch if self.unit == "epochs" else 1)

    def __str__(self) -> str:
        return f"{self.count} {self.unit[:-1] if self.count == 1 else self.unit}"

    @classmethod
    def parse(cls, value: object) -> Interval:
        """Reads `200`, `200 steps` or `2 epochs`; raises ValueError on anything else."""
        if isinstance(value, cls):
            return value
        match = re.fullmatch(r"\s*([0-9]+)\s*(?:(step|epoch)s?)?\s*", str(value))
        if match is None or isinstance(value, bool | float):
            raise ValueError(f"write a number of steps, or like '2 epochs' (got {value!r})")
        return cls(int(match[1]), "epochs" if match[2] == "epoch" else "steps")


def _positive(interval: Interval) -> Interval:
    if interval.count < 1:
        raise ValueError("must be at least 1")
    return interval


_INTERVAL_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"type": "integer", "minimum": 0},
            {"type": "string", "pattern": r"^\s*[0-9]+\s*(steps?|epochs?)?\s*$"},
        ]
    }
)
_AS_TEXT = PlainSerializer(lambda i: i.count if i.unit == "steps" else str(i), return_type=int | str)
Duration = Annotated[Interval, BeforeValidator(Interval.parse), _AS_TEXT, _INTERVAL_SCHEMA]
Every = Annotated[Interval, BeforeValidator(lambda v: _positive(Interval.parse(v))), _AS_TEXT, _INTERVAL_SCHEMA]


@dataclass(frozen=True)
class Minutes:
    """How often, by the clock."""

    count: float

    def __str__(self) -> str:
        return f"{self.count:g} {'minute' if self.count == 1 else 'minutes'}"


def _steps_or_minutes(value: object) -> Interval | Minutes:
    """Reads what `Every` takes, or a number of minutes such as `10 minutes` or `0.5 minutes`."""
    if isinstance(value, Minutes):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*min(?:ute)?s?\s*", value) if isinstance(value, str) else None
    if match is not None:
        if float(match[1]) <= 0:
            raise ValueError("must be more than 0 minutes")
        return Minutes(float(match[1]))
    try:
        return _positive(Interval.parse(value))
    except ValueError as error:
        if "write a number" not in str(error):
            raise
        raise ValueError(f"write a number of steps, or like '2 epochs' or '10 minutes' (got {value!r})") from None


EveryOrMinutes = Annotated[
    Interval | Minutes,
    BeforeValidator(_steps_or_minutes),
    PlainSerializer(
        lambda i: i.count if isinstance(i, Interval) and i.unit == "steps" else str(i), return_type=int | str
    ),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {
                    "type": "string",
                    "pattern": r"^\s*([0-9]+\s*(steps?|epochs?)?|[0-9]+(\.[0-9]+)?\s*min(ute)?s?)\s*$",
                },
            ]
        }
    ),
]


_SECONDS_OF = {"second": 1.0, "sec": 1.0, "s": 1.0, "minute": 60.0, "min": 60.0, "hour": 3600.0, "h": 3600.0}


@dataclass(frozen=True)
class TimeSpan:
    """A time by the clock, in seconds."""

    seconds: float

    def __str__(self) -> str:
        for size, unit in ((3600, "hour"), (60, "minute")):
            if self.seconds >= size and self.seconds % size == 0:
                count = int(self.seconds // size)
                return f"{count} {unit}{'' if count == 1 else 's'}"
        return f"{self.seconds:g} {'second' if self.seconds == 1 else 'seconds'}"

    @classmethod
    def parse(cls, value: object) -> TimeSpan:
        """Reads `10 minutes`, `90 seconds`, `1 hour` or a number of seconds; raises ValueError on anything else."""
        if isinstance(value, cls):
            return value
        seconds = 0.0
        if isinstance(value, int | float) and not isinstance(value, bool):
            seconds = float(value)
        elif isinstance(value, str):
            match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(second|sec|s|minute|min|hour|h)s?\s*", value)
            seconds = float(match[1]) * _SECONDS_OF[match[2]] if match else 0.0
        if 0 < seconds < float("inf"):
            return cls(seconds)
        raise ValueError(f"write a time such as '10 minutes' or '90 seconds' (got {value!r})")


Seconds = Annotated[
    TimeSpan,
    BeforeValidator(TimeSpan.parse),
    PlainSerializer(str, return_type=str),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*(second|sec|s|minute|min|hour|h)s?\s*$"},
            ]
        }
    ),
]


@dataclass(frozen=True)
class NodeRange:
    """How many machines a job runs on: at least and at most so many."""

    least: int
    most: int

    @property
    def is_elastic(self) -> bool:
        """Whether machines may leave and join while the job runs."""
        return self.least < self.most

    def __str__(self) -> str:
        return f"{self.least}:{self.most}" if self.is_elastic else str(self.least)

    @classmethod
    def parse(cls, value: object) -> NodeRange:
        """Reads `4` or `1:4`; raises ValueError on anything else."""
        if isinstance(value, cls):
            return value
        match = None if isinstance(value, bool | float) else re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2] or match[1]):
            raise ValueError(f"write a number of machines such as 4, or a range such as '1:4' (got {value!r})")
        return cls(int(match[1]), int(match[2] or match[1]))


Nodes = Annotated[
    NodeRange,
    BeforeValidator(NodeRange.parse),
    PlainSerializer(lambda n: str(n) if n.is_elastic else n.least, return_type=int | str),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^\s*\d+\s*(:\s*\d+\s*)?$"}]}
    ),
]


@dataclass(frozen=True)
class Amount:
    """An amount of memory as it was written: a share of a whole such as `90%`, or bytes such as `20GiB`."""

    text: str

    def of(self, whole: int) -> int:
        """Returns the amount in bytes, where `whole` bytes are 100%."""
        if self.text.endswith("%"):
            return int(float(self.text[:-1]) / 100 * whole)
        return parse_bytes(self.text)

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, value: object) -> Amount:
        """Reads `90%`, `0.9` or `20GiB`; raises ValueError on anything else."""
        if isinstance(value, cls):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
            return cls(f"{100 * value:g}%")
        text = "".join(value.split()) if isinstance(value, str) else ""
        if re.fullmatch(r"[0-9]+(\.[0-9]+)?%", text) and 0 < float(text[:-1]) <= 100:
            return cls(text)
        try:
            if parse_bytes(text) > 0:
                return cls(text)
        except ValueError:
            pass
        raise ValueError(f"write a share such as 90%, or bytes such as 20GiB (got {value!r})")


# Strict numbers: true is not 1 and "64" is not 64, but 1 is a float.
PositiveInt = Annotated[int, Field(strict=True, ge=1)]
NonNegativeInt = Annotated[int, Field(strict=True, ge=0)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(strict=True, ge=0, le=1)]
Bool = Annotated[bool, Field(strict=True)]
MetricName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_@-]*$")]
ComponentName = Annotated[str, Field(min_length=1, pattern=r"^\S+$")]


_AMOUNT_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*(%|[KMGT]i?B)\s*$"},
        ]
    }
)
MemoryAmount = Annotated[Amount, BeforeValidator(Amount.parse), PlainSerializer(str, return_type=str), _AMOUNT_SCHEMA]


def _bytes(value: object) -> object:
    text = "".join(value.split()) if isinstance(value, str) else ""
    try:
        if parse_bytes(text) > 0:
            return text
    except ValueError:
        pass
    raise ValueError(f"write bytes such as 20GiB (got {value!r})")


# An amount where a share has no whole.
Bytes = Annotated[
    str,
    BeforeValidator(_bytes),
    WithJsonSchema({"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*([KMGT]i?B|B)\s*$"}),
]


def _micro_batch_size(value: object) -> object:
    if value in ("auto", None) or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"must be auto, or a whole number greater than or equal to 1 (got {value!r})")


def _workers(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError(f"must be auto, or a whole number greater than or equal to 0 (got {value!r})")


def _ema_warmup(value: object) -> object:
    if isinstance(value, bool) or value == "timm":
        return value
    raise ValueError(f"must be true, false or timm (got {value!r})")


EmaWarmup = Annotated[bool | Literal["timm"], BeforeValidator(_ema_warmup)]
Workers = Annotated[int | Literal["auto"], BeforeValidator(_workers)]
MicroBatchSize = Annotated[int | Literal["auto"] | None, BeforeValidator(_micro_batch_size)]


class Component(Section):
    """Something built by name: a built-in's short name, or `package.module:attribute` of the user's own."""

    name: ComponentName = Field(description="A built-in's short name or an import path `package.module:attribute`.")
    args: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments that it is called with.")
