"""Differences between rows of a study: paired by seed, tested, and adjusted for multiple comparisons."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from merge_jax.runs import mean_and_error

__all__ = ["Comparison", "holm", "paired_difference"]

_DECIMALS = 12  # Metrics are fractions in [0, 1]: smaller differences are rounding.


class Comparison(NamedTuple):
    """Differences of paired values.

    Attributes:
      n: the number of pairs.
      mean: the mean difference.
      error: its standard error; None for one pair.
      p_t: two-sided p of the paired t-test; None if undefined: one pair, or identical differences.
    """

    n: int
    mean: float
    error: float | None
    p_t: float | None


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Comparison:
    """Returns the comparison of `d_i = values_i - others_i`.

    If all differences are 0, p is 1. If all are equal but not 0, the spread is zero and p is undefined (our choice; its
    limit is 0, even with two seeds).

    Raises:
      ValueError: no values, or unequal numbers.
    """
    if len(values) != len(others) or not len(values):
        raise ValueError(
            f"paired values must be two equally long, nonempty sequences; got {len(values)} and {len(others)}"
        )
    differences = np.round(np.asarray(values, float) - np.asarray(others, float), _DECIMALS)
    n = len(differences)
    mean, error = mean_and_error(differences.tolist())
    if n == 1:
        return Comparison(n, mean, None, None)
    if not differences.any():
        return Comparison(n, 0.0, 0.0, 1.0)
    if np.ptp(differences) == 0:
        return Comparison(n, mean, 0.0, None)
    return Comparison(n, mean, error, float(stats.ttest_rel(values, others).pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values adjusted by Holm's step-down procedure, in the given order.

    `p'_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))` of the m values in ascending order. Source: Holm, A Simple
    Sequentially Rejective Multiple Test Procedure, 1979.
    """
    values = np.asarray(p_values, float)
    order = np.argsort(values, kind="stable")
    factors = np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * values[order]))
    return adjusted.tolist()
