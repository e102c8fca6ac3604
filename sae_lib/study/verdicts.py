"""How a number and its interval are judged against a target: the words of the scorecard."""

import math
from typing import Literal

from sae_lib.metrics import Interval

Verdict = Literal["reproduced", "partly", "not"]


def at_most(found: Interval, target: float, fair: float | None = None) -> Verdict:
    """"reproduced" if the whole interval is at most the target, "partly" if the value is at most that, or at most `fair`; "not"
    also of what could not be measured (nan).
    """
    if found.high <= target:
        return "reproduced"
    return "partly" if found.value <= (target if fair is None else fair) else "not"


def at_least(found: Interval, target: float, fair: float | None = None) -> Verdict:
    """The same the other way round."""
    return at_most(Interval(-found.value, -found.high, -found.low), -target, None if fair is None else -fair)


def numbers_of(found: Interval) -> dict[str, float | None]:
    """An interval as the fields of a row: ours, low, high; all None if one of them could not be measured. If all draws of a
    bootstrap lie on one side of the value, as those of a minimum may, it is widened to it.
    """
    if not all(map(math.isfinite, found)):
        return {"ours": None, "low": None, "high": None}
    value, low, high = (float(end) for end in found)
    return {"ours": value, "low": min(low, value), "high": max(high, value)}
