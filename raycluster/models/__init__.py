"""Backbones, one per file: `model: {name: foo}` selects the class `Model` of `raycluster/models/foo.py`. Modules
without a class `Model` hold what backbones share.
"""
