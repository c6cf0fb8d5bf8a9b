"""lmtrain trains recurrent language models from a YAML file and uses them.

>>> import lmtrain                                           # doctest: +SKIP
>>> result = lmtrain.train("configs/quickstart.yaml")        # doctest: +SKIP
>>> lmtrain.load(result.run).generate(["the old man"])       # doctest: +SKIP

`import lmtrain` alone loads no torch; the first use of a name does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmtrain.system.version import __version__

if TYPE_CHECKING:
    from lmtrain.config import load_config
    from lmtrain.inference.adaptation import Cache, Dynamic
    from lmtrain.inference.options import Beams, Sampling
    from lmtrain.inference.trained_model import TrainedModel, load
    from lmtrain.training.start import train

__all__ = ["Beams", "Cache", "Dynamic", "Sampling", "TrainedModel", "__version__", "load", "load_config", "train"]

_MODULES = {  # where each name is defined
    "Beams": "lmtrain.inference.options",
    "Cache": "lmtrain.inference.adaptation",
    "Dynamic": "lmtrain.inference.adaptation",
    "Sampling": "lmtrain.inference.options",
    "TrainedModel": "lmtrain.inference.trained_model",
    "load": "lmtrain.inference.trained_model",
    "load_config": "lmtrain.config",
    "train": "lmtrain.training.start",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lmtrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
