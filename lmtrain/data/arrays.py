"""The type of an array of indices, offsets, lengths or counts, which the packages under data/ pass to each other."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
