"""Configuration: frozen typed schema, YAML in and out, overrides, presets, differences.

This room holds the machinery only; each room declares the config classes of its own parts.
"""

from treadle.config.base import Config, Kind

__all__ = ["Config", "Kind"]
