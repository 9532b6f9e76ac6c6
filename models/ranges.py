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
        sampler, step = sampler.get_sampler(), sampler.q
    bounded = isinstance(domain, Float | Integer) and math.isfinite(domain.upper - domain.lower)
    if not bounded or not isinstance(sampler, Uniform | LogUniform):
        raise ValueError("it has no bounds, or depends on other values")
    assert isinstance(domain, Float | Integer)
    low, high, integer = domain.lower, domain.upper, isinstance(domain, Integer)
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


def check_ranges(ranges: Mapping[str, Any]) -> None:
    """Raise ValueError where something is no range that every searcher can draw from."""
    for name, domain in ranges.items():
        try:
            if not isinstance(domain, Domain):
                raise ValueError("it is no range")
            if isinstance(domain, Categorical):
                _check_choice(domain)
            else:
                interval(domain)
        except ValueError as error:
            raise ValueError(
                f"the range of {name} cannot be searched ({error}); give tune.choice, uniform, loguniform, "
                "randint or lograndint, or a quantised one of these (quniform, qrandint, …)"
            ) from None


def _check_choice(domain: Categorical) -> None:
    """Raise ValueError where a value would come back from the journal as another one."""
    if not domain.categories:
        raise ValueError("it has no value")
    for value in domain.categories:
        try:
            same = json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise ValueError(f"{value!r} is not a JSON value, such as a number, text, true, null or a list")


def contains(domain: Domain, value: Any) -> bool:
    """Return whether a value lies in a range; a quantised one contains what lies between its steps, too."""
    if isinstance(domain, Categorical):
        return value in domain.categories
    found = interval(domain)
    if isinstance(value, bool) or not isinstance(value, int if found.integer else int | float):
        return False
    return found.low <= value <= found.high


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
        domain: Domain = getattr(tune, kind)(*values)
        check_ranges({"it": domain})
    except ArithmeticError:  # a step of 0, or numbers that no float holds
        raise ValueError("its numbers are impossible; give finite ones and a step above 0") from None
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(str(error).removeprefix("the range of it ")) from None
    return domain


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
