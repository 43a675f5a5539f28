"""What differences between rows of a study say: paired by seed, tested, and adjusted for how many there are."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from merge_jax.runs import mean_and_error

__all__ = ["Comparison", "holm", "paired_difference"]

_DECIMALS = 12  # Metrics are fractions in [0, 1]: what differs less is rounding, and would hide ties.


class Comparison(NamedTuple):
    """Differences of paired values.

    Attributes:
      n: pairs.
      mean: of the differences.
      error: its standard error; None for one pair.
      p_t: two-sided p of the paired t-test; None where it is undefined: one pair, or differences that are all the same.
      p_wilcoxon: two-sided p of the signed-rank test.
    """

    n: int
    mean: float
    error: float | None
    p_t: float | None
    p_wilcoxon: float | None


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Comparison:
    """Returns the comparison of `d_i = values_i - others_i`.

    Both tests are two-sided. Where all differences are 0, nothing speaks for one, and both p are 1. Where all are the
    same, but not 0, the t-test has no spread to go by, and no p (our choice; its limit is 0, after two seeds too).

    Raises:
      ValueError: no values, or not as many of either.
    """
    if len(values) != len(others) or not len(values):
        raise ValueError(f"paired values must be as many of either, one or more; got {len(values)} and {len(others)}")
    differences = np.round(np.asarray(values, float) - np.asarray(others, float), _DECIMALS)
    n = len(differences)
    mean, error = mean_and_error(differences.tolist())
    if n == 1:
        return Comparison(n, mean, None, None, None)
    if not differences.any():
        return Comparison(n, 0.0, 0.0, 1.0, 1.0)
    if np.ptp(differences) == 0:
        return Comparison(n, mean, 0.0, None, _signed_rank(differences))
    assert error is not None  # n is above 1.
    p_t = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return Comparison(n, mean, error, p_t, _signed_rank(differences))


def _signed_rank(differences: np.ndarray) -> float:
    """Returns the two-sided p of Wilcoxon's signed-rank test, `2 P(W <= min(W+, W-))`, exact with ties too.

    Differences of 0 are left out, as Wilcoxon (1945) has it, and ties share the mean of their ranks. SciPy's exact
    distribution has no ties, which accuracies on few hundred examples have often; here the distribution of `W`, the sum
    of ranks each taken with chance 1/2, is that of the ranks at hand.
    """
    differences = differences[differences != 0]
    ranks = np.rint(2 * stats.rankdata(np.abs(differences))).astype(int)  # Twice the ranks: shared ones end in a half.
    chances = np.zeros(ranks.sum() + 1)
    chances[0] = 1
    for rank in ranks:
        chances = 0.5 * (chances + np.concatenate([np.zeros(rank), chances[:-rank]]))
    positive = ranks[differences > 0].sum()
    smaller = min(positive, ranks.sum() - positive)
    return float(min(1.0, 2 * chances[: smaller + 1].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values adjusted for their number by Holm's step-down procedure, in the order given.

    `p'_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))` of the m values in ascending order. Source: Holm, A Simple
    Sequentially Rejective Multiple Test Procedure, 1979.
    """
    values = np.asarray(p_values, float)
    order = np.argsort(values, kind="stable")
    factors = np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * values[order]))
    return adjusted.tolist()
