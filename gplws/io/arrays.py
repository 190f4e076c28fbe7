"""Arrays of numpy and torch alike."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def as_numpy(array: np.ndarray | Tensor) -> np.ndarray:
    """The values on the host, shared where they lie there."""
    return array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
