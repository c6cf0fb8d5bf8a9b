"""The configuration: its schema, and its loading. Overrides take precedence over the file, the file over defaults."""

from lmtrain.config.loading import dump_config, load_config
from lmtrain.config.schema import Config

__all__ = ["Config", "dump_config", "load_config"]
