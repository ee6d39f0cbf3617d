"""Configuration: YAML <-> frozen settings."""

from __future__ import annotations

from raycluster.config.loader import NonEmpty, Seed, dump, from_tree, load, parse, settings
from raycluster.config.registry import PluginField

__all__ = ["NonEmpty", "PluginField", "Seed", "dump", "from_tree", "load", "parse", "settings"]
