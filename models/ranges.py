"""What may be searched: Ray Tune's ranges, as every searcher can draw from them."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform, Quantized, Uniform

from tunefleet.cli import printable
from tunefleet.models.checks import nearest

Ranges = Mapping[str, Domain]
KINDS = (  # that a command line may name
    *("uniform", "loguniform", "quniform", "qloguniform"),
    *("randint", "lograndint", "qrandint", "qlograndint", "choice"),
)


@dataclass(frozen=True)
class Interval:
    """A range of numbers, both ends included."""

    low: float
    high: float
    log: bool
    step: float | None  # between allowed values, which are its multiples; None: all floats
    integer: bool

    @property
    def bounds(self) -> tuple[float, float]:
        """Return between which floats to draw, so that rounding leaves the ends as likely as the others."""
        half = (self.step or 0) / 2
        return self.low - half, self.high + half

    def value(self, x: float) -> float | int:
        """Return the allowed value nearest to ``x``."""
        if self.step:
            x = float(f"{round(x / self.step) * self.step:.12g}")
        x = min(max(float(x), self.low), self.high)
        return round(x) if self.integer else x


def interval(domain: Domain) -> Interval:
    """Return what a range of Ray Tune, other than a choice, allows.

    Raises:
        ValueError: A kind of range that cannot be searched.
    """
    sampler, step = domain.get_sampler(), None
    if isinstance(sampler, Quantized):
        sampler, step = sampler.get_sampler(), plain(sampler.q)
    bounded = isinstance(domain, Float | Integer) and math.isfinite(domain.upper - domain.lower)
    if not bounded or not isinstance(sampler, Uniform | LogUniform):
        raise ValueError("it has no bounds, or depends on other values")
    assert isinstance(domain, Float | Integer)
    low, high, integer = plain(domain.lower), plain(domain.upper), isinstance(domain, Integer)
    if integer and step in (None, 1):  # Ray's integer ranges exclude their end, unless they are quantised
        high, step = high - 1, 1
    if step:
        low, high = _multiple(low, step, math.ceil), _multiple(high, step, math.floor)
    if low > high:
        raise ValueError("it has no value")
    return Interval(low, high, isinstance(sampler, LogUniform), step, integer)


def _multiple(bound: float, step: float, towards: Any) -> float:
    nearest = round(bound / step)
    return float(step * (nearest if math.isclose(bound / step, nearest) else towards(bound / step)))


def plain(value: Any) -> Any:
    """Return a value as the journal gives it back: numpy's numbers as Python's, tuples as lists.

    Raises:
        ValueError: It would come back as another value, or not at all.
    """
    try:
        if hasattr(value, "tolist"):  # numpy's and torch's
            value = value.tolist()
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {key: plain(each) for key, each in value.items()}
        found = json.loads(json.dumps(value))
        if found == value:
            return found
    except TypeError:  # of a class, say
        pass
    shown = printable(repr(value))
    raise ValueError(f"{shown} is not a JSON value, such as a number, text, true, null or a list")


def plain_range(name: str, domain: Any) -> Domain:
    """Return a range whose choices are plain values.

    Raises:
        ValueError: It is no range that every searcher can draw from.
    """
    try:
        if not isinstance(domain, Domain):
            raise ValueError("it is no range")
        if not isinstance(domain, Categorical):
            found = interval(domain)
            if found.low == found.high:
                raise ValueError(f"it has one value; fix {found.value(found.low)}")
            return domain
        if not len(domain.categories):
            raise ValueError("it has no value")
        return tune.choice(plain(domain.categories))
    except ValueError as error:
        raise ValueError(
            f"the range of {name} cannot be searched ({error}); give tune.choice, uniform, loguniform, "
            "randint or lograndint, or a quantised one of these (quniform, qrandint, …)"
        ) from None


def contains(domain: Domain, value: Any) -> bool:
    """Return whether a value lies in a range; a quantised one contains what lies between its steps, too."""
    if isinstance(domain, Categorical):
        return value in domain.categories
    found = interval(domain)
    if isinstance(value, bool) or not isinstance(value, int if found.integer else int | float):
        return False
    return found.low <= value <= found.high


def ends(domain: Domain) -> list[Any]:
    """Return the values of a choice, or between which two numbers a range lies."""
    if isinstance(domain, Categorical):
        return list(domain.categories)
    assert isinstance(domain, Float | Integer)
    return [(float if isinstance(domain, Float) else int)(end) for end in (domain.lower, domain.upper)]


def check_kind(name: str, domain: Domain, kind: str) -> None:
    """Raise ValueError where a range has values of another kind: str, int, float or bool; empty: any."""
    kinds = {"str": str, "int": int, "float": int | float, "bool": bool}
    for value in ends(domain) if kind else ():
        is_one = isinstance(value, kinds[kind]) and isinstance(value, bool) == (kind == "bool")
        if not is_one and value is not None:
            raise ValueError(f"{name}={value} is not possible; {name} is a value of type {kind}")


def middle(domain: Domain) -> Any:
    """Return the middle of a range: of a choice the middle value, of a log range the geometric mean."""
    if isinstance(domain, Categorical):
        return domain.categories[(len(domain.categories) - 1) // 2]
    found = interval(domain)
    return found.value(math.sqrt(found.low * found.high) if found.log else (found.low + found.high) / 2)


def parse_range(text: str) -> Domain:
    """Return the range that text such as ``loguniform(1e-5, 1e-2)`` describes; nothing is evaluated.

    Raises:
        ValueError: It describes none.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.keywords:
            raise ValueError
        kind = ast.unparse(call.func).removeprefix("tune.")
        values = [ast.literal_eval(argument) for argument in call.args]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("give for example loguniform(1e-5, 1e-2) or choice(64, 128)") from None
    if kind not in KINDS:
        raise ValueError(f"{kind} is no kind of range{nearest(kind, KINDS)}")
    if kind == "choice":
        values = [values[0] if len(values) == 1 and isinstance(values[0], list) else values]
    try:
        return plain_range("it", getattr(tune, kind)(*values))
    except ArithmeticError:  # a step of 0, or numbers that no float holds
        raise ValueError("its numbers are impossible; give finite ones and a step above 0") from None
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(str(error).removeprefix("the range of it ")) from None


def described(ranges: Ranges) -> dict[str, Any]:
    """Return ranges as study.json has them: ``{"values"}``, or ``{"low", "high", "log"[, "step"]}``."""
    plain: dict[str, Any] = {}
    for name, domain in ranges.items():
        if isinstance(domain, Categorical):
            plain[name] = {"values": list(domain.categories)}
            continue
        found = interval(domain)
        low, high = (int(end) if found.integer else end for end in (found.low, found.high))
        plain[name] = {"low": low, "high": high, "log": found.log}
        if found.step and (found.step != 1 or not found.integer):
            plain[name]["step"] = found.step
    return plain
