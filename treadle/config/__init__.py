"""Configuration: frozen typed schema, YAML in and out, overrides, presets, differences.

This room holds the machinery only; each room declares the config classes of its own parts.
"""

from treadle.config.base import Config, Kind, key_error, key_errors
from treadle.config.include import read_yaml
from treadle.config.load import resolve
from treadle.config.show import diff, keys, to_dict, to_yaml

__all__ = [
    "Config",
    "Kind",
    "diff",
    "key_error",
    "key_errors",
    "keys",
    "read_yaml",
    "resolve",
    "to_dict",
    "to_yaml",
]
