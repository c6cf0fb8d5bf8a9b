"""The configuration: schema, and loading with the place of every fault. Precedence: defaults < file < overrides."""

from lmtrain.config.loading import dump_config, load_config
from lmtrain.config.schema import Config

__all__ = ["Config", "dump_config", "load_config"]
