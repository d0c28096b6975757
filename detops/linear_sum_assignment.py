"""Optimal one-to-one assignment of queries to targets, and DETR's matching."""

import torch
from torch import Tensor

from . import _library
from ._library import register_fake


def linear_sum_assignment(cost: Tensor, num_targets: Tensor | None = None) -> Tensor:
    """For each target its query, such that the sum of the costs is least: the Hungarian matching of a whole batch.

    Args:
        cost: [B, Q, T]: of query q for target t. Computed in float64, whatever the dtype. +inf forbids a pair.
        num_targets: [B] int64: only the first so many targets of each problem take part; all T if None. What is beyond
            may hold anything, NaN too.

    Returns:
        int64 [B, T]: the query of each target; -1 for targets beyond `num_targets`, for those left over where there are
        more targets than queries, and for those that only forbidden pairs are left for. As many targets as possible
        have a query; among the ways to do so, the cheapest is taken.

    Ties: where several assignments cost the same, the same one is found on every device and every run. No gradient. On
    a GPU there is no host synchronisation: NaN and -inf count as +inf there, and `num_targets` is clamped to [0, T].

    Raises:
        RuntimeError: wrong shapes, dtypes or devices; on the CPU also NaN or -inf costs, or `num_targets` out of range.

    Example:
        >>> cost = torch.tensor([[[1., 2.], [1., 4.], [9., 9.]]])
        >>> linear_sum_assignment(cost)
        tensor([[1, 0]])

    Source: scipy.optimize.linear_sum_assignment, which takes one matrix, returns (rows, columns), and raises where a
    target cannot be matched. Jonker and Volgenant, "A shortest augmenting path algorithm", Computing 38, 1987.
    """
    cost = cost.detach()
    if not cost.is_floating_point():
        cost = cost.to(torch.float64)
    return _library.ops.linear_sum_assignment(cost, num_targets)


@register_fake("linear_sum_assignment")
def _(cost: Tensor, num_targets: Tensor | None) -> Tensor:
    return cost.new_empty(cost.shape[0], cost.shape[2], dtype=torch.int64)
