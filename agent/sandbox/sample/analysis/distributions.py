"""Student's t and Fisher's F, through the incomplete beta function.

The image has no scipy: four functions do not pay for 40 MB. The continued fraction is equation 8.17.22 of the
NIST Digital Library of Mathematical Functions, evaluated by the method of Lentz.
"""

from __future__ import annotations

import math

_TINY = 1e-300
_PRECISION = 1e-15
_MAX_TERMS = 10_000


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b), for positive `a` and `b` and `x` from 0 to 1."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    return front / a * _continued_fraction(a, b, x)


def f_survival(f: float, numerator: float, denominator: float) -> float:
    """Return the probability of a larger F with these degrees of freedom."""
    return incomplete_beta(denominator / 2, numerator / 2, denominator / (denominator + numerator * f))


def t_survival(t: float, freedom: float) -> float:
    """Return the probability of a larger t with these degrees of freedom."""
    tail = incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t)) / 2
    return tail if t >= 0 else 1 - tail


def t_quantile(probability: float, freedom: float) -> float:
    """Return the t that is exceeded with probability 1 - `probability`, which is at least one half, by bisection."""
    low, high = 0.0, 1.0
    while t_survival(high, freedom) > 1 - probability and high < 1 / _PRECISION:
        high *= 2
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_survival(middle, freedom) > 1 - probability else (low, middle)
    return (low + high) / 2


def _continued_fraction(a: float, b: float, x: float) -> float:
    c, d = 1.0, 1 / _apart(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, _MAX_TERMS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _apart(1 + term * d)
            c = _apart(1 + term / c)
            value *= c * d
        if abs(c * d - 1) < _PRECISION:
            break
    return value


def _apart(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
