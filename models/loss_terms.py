"""What a detector returns while it trains: losses by name, and scalars that are only logged."""

from collections.abc import Mapping

import torch
from torch import Tensor

LOG_PREFIX = "log_"  # a scalar whose name begins so is logged, and is no part of the loss


def total_loss(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of the losses that a model returned, which are scalars by name.

    Names that begin with "log_" are left out.
    """
    losses = [value for name, value in outputs.items() if not name.startswith(LOG_PREFIX)]
    return torch.stack(losses).sum()
