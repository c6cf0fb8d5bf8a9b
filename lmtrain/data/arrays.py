"""The type of array that the rooms of data hand to each other."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
