"""How much less what is old counts when memory is read: a weight by age, added to attention scores as its logarithm."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from longmem.plugins import Setting, find, parse_name, register

DAY = 86_400.0
_STRENGTH = Setting(0.5, "how fast the weight falls with age, in 1 / `unit`", 0.0, 1e6)
_UNIT = Setting(DAY, "seconds that an age of 1 stands for", 1e-6, 1e12)


class AgeKind(NamedTuple):
    """A kind of age prior: the parameters that it reads, and log w(age) with those of a prior.

    A parameter that a kind does not read would do nothing, so it is refused.
    """

    settings: Mapping[str, Setting]
    log_weight: "Callable[[AgePrior, float], float]"


@dataclass(frozen=True)
class AgePrior:
    """A weight w(age): 1 for what is new, never more, positive, and never rising with age.

    The age of a chunk is the time between its document's date and that of the newest document that is read, divided by
    `unit`. Attention adds log w to the scores of a chunk's tokens, and the search takes the chunks that are best with
    it. So where all documents have one date, nothing changes. It says how likely an old text still holds; of an old
    encoder it says nothing, and must not be used for that (`docs/staleness.md`).

    The functions are those of asynchronous federated learning: FedAsync and FedCompass (constant, hinge, poly) and the
    exponential with a floor of the UAM study. `a` is never negative: code was published in which the weight grew with age.

    Args:
        kind: "constant": 1. "hinge": 1 up to age `b`, then 1 / (a (age - b) + 1). "poly": (age + 1)^-a. "exp":
            floor + (1 - floor) exp(-a age).
        a: how fast the weight falls. It competes with scores: a chunk that is older by an age of 1 loses `a` of its
            logits with "exp", and `a` log 2 at most with "poly".
        b: of "hinge".
        floor: of "exp"; 0: what is old enough weighs nothing beside what is new.
        unit: in seconds; the default is one day.

    >>> [round(AgePrior("poly", a=0.5).weight(age), 3) for age in (0, 1, 3)]
    [1.0, 0.707, 0.5]
    >>> AgePrior("poly", a=4).name, make_age_prior("hinge:a=0.5,b=1")
    ('poly:a=4.0,unit=86400.0', AgePrior(kind='hinge', a=0.5, b=1.0, floor=0.0, unit=86400.0))
    """

    kind: str = "constant"
    a: float = 0.5
    b: float = 4.0
    floor: float = 0.0
    unit: float = DAY

    parameters: ClassVar[tuple[str, ...]] = ("a", "b", "floor", "unit")

    def __post_init__(self) -> None:
        kind: AgeKind = find("age_prior", self.kind)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in self.parameters:
            value, setting = getattr(self, name), kind.settings.get(name)
            if setting is None and value != defaults[name]:
                raise ValueError(f"`{name}` must be left out for the kind {self.kind!r}, got {value!r}: it has none.")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if setting is not None and not (is_number and setting.lowest <= value <= setting.highest):
                raise ValueError(
                    f"`{name}` of an age prior must be {setting.rule}, got {value!r}; it is {setting.meaning}, "
                    f"{setting.default:g} by default."
                )
            if setting is not None:
                object.__setattr__(self, name, float(value))

    @property
    def name(self) -> str:
        """Return the kind and all its parameters, as `make_age_prior` reads them."""
        chosen = ",".join(f"{key}={getattr(self, key)!r}" for key in find("age_prior", self.kind).settings)
        return f"{self.kind}:{chosen}" if chosen else self.kind

    def weight(self, age: float) -> float:
        """Return w(age), for an age of at least 0; an exponential without a floor underflows to 0 in the end."""
        return math.exp(self.log_weight(age))

    def log_weight(self, age: float) -> float:
        """Return log w(age), which is finite at every age that is."""
        return find("age_prior", self.kind).log_weight(self, age)


def log_exp(prior: AgePrior, age: float) -> float:
    """Return the logarithm of floor + (1 - floor) exp(-a age)."""
    if not prior.floor or not prior.a * age:
        return -prior.a * age
    # The sum may round to more than 1.
    return min(0.0, math.log(prior.floor + (1 - prior.floor) * math.exp(-prior.a * age)))


_FLOOR = Setting(0.0, "the weight that is never undercut", 0.0, 1.0)
_HINGE = {"a": _STRENGTH, "b": Setting(4.0, "the age up to which nothing is lost", 0.0, 1e12), "unit": _UNIT}
register("age_prior", "constant")(AgeKind({}, lambda prior, age: 0.0))
register("age_prior", "hinge")(AgeKind(_HINGE, lambda prior, age: -math.log1p(prior.a * max(0.0, age - prior.b))))
register("age_prior", "poly")(AgeKind({"a": _STRENGTH, "unit": _UNIT}, lambda prior, age: -prior.a * math.log1p(age)))
register("age_prior", "exp")(AgeKind({"a": _STRENGTH, "floor": _FLOOR, "unit": _UNIT}, log_exp))


def make_age_prior(age_prior: AgePrior | str | None) -> AgePrior | None:
    """Return the prior that is meant by itself, by a name with settings, or by None; "constant" is none, too.

    >>> make_age_prior("exp:a=2,floor=0.1").weight(0)
    1.0
    """
    if age_prior is None:
        return None
    if not isinstance(age_prior, AgePrior):
        _, chosen = parse_name("age_prior", age_prior)
        age_prior = AgePrior(age_prior.partition(":")[0], **chosen)
    return None if age_prior.kind == "constant" else age_prior
