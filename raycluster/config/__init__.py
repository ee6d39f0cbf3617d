"""Configuration: YAML <-> frozen settings."""

from __future__ import annotations

from raycluster.config.loader import dump, from_tree, load, parse, settings
from raycluster.config.registry import named

__all__ = ["dump", "from_tree", "load", "named", "parse", "settings"]
