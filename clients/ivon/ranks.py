"""IVON's statistics over the ranks of torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor


def sum_ranks(statistics: Sequence[tuple[Tensor, Tensor]], samples: int, check: bool) -> int:
    """Add the sums of gradients and of their products with the noise over all ranks, in place.

    Args:
        statistics: (gradient, product), both (P,), of each group.
        samples: behind this rank's sums.
        check: look whether the gradients are averages over the ranks.

    Returns:
        The number of samples behind all sums.

    Raises:
        RuntimeError: with ``check``, the ranks have the same gradient of different samples.
    """
    if check:
        own = torch.stack([sum(v.double().sum() for v in values) for values in zip(*statistics, strict=True)])
        every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(every, own)
        gradients, products = torch.stack(every).T.tolist()
        if gradients[0] and len(set(gradients)) == 1 < len(set(products)):
            raise RuntimeError(
                "the gradients are averaged over the ranks already, which makes the curvature too small by their "
                "number: use sync=True without DistributedDataParallel, or leave the blocks under model.no_sync()"
            )
    count = torch.tensor(samples, device=statistics[0][0].device)
    torch.distributed.all_reduce(count)
    for gradient, product in statistics:
        torch.distributed.all_reduce(gradient)
        torch.distributed.all_reduce(product)
    return int(count)
