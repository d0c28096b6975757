"""Optimal assignments from their definition: by trying all of them."""

import itertools

import numpy as np


def linear_sum_assignment(cost):
    """(pairs, total) of the best assignments of targets to queries, cost [Q, T]: the largest number of allowed pairs,
    and the least sum that so many can have. For tiny problems with costs whose sums are exact."""
    queries, targets = cost.shape
    rows = cost.T if targets <= queries else cost
    best = (0, 0.0)
    for columns in itertools.permutations(range(max(queries, targets)), min(queries, targets)):
        chosen = np.array([rows[row, column] for row, column in enumerate(columns)], np.float64)
        allowed = chosen[np.isfinite(chosen)]
        found = (-len(allowed), float(allowed.sum()))
        best = min(best, found)
    return -best[0], best[1]


def is_assignment(found, queries, count):
    """True if no query is taken twice and no target beyond the first `count` has one."""
    used = found[found >= 0]
    return (
        len(set(used.tolist())) == len(used)
        and (used < queries).all()
        and (found[count:] == -1).all()
        and (found >= -1).all()
    )


def total_cost(cost, found):
    """(pairs, sum) of the pairs of an assignment, cost [Q, T]."""
    pairs = [(query, target) for target, query in enumerate(found) if query >= 0]
    return len(pairs), float(sum(np.float64(cost[query, target]) for query, target in pairs))
