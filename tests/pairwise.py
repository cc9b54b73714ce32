"""A few combinations in place of a product, as most faults need two values at most to come together."""

import itertools
import random
from collections.abc import Iterable
from typing import Any


def pairwise(*dimensions: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows of the dimensions' product in which any two values of two dimensions meet, chosen greedily."""
    dimensions = [list(values) for values in dimensions]
    product = list(itertools.product(*(range(len(values)) for values in dimensions)))
    # Of equal rows the first is taken: in order, these are of the first values.
    random.Random(0).shuffle(product)
    rows = {row: set(itertools.combinations(enumerate(row), 2)) for row in product}
    missing, chosen = set().union(*rows.values()), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(rows[row] & missing)))
        missing -= rows[chosen[-1]]
    return [tuple(values[k] for values, k in zip(dimensions, row, strict=True)) for row in chosen]
