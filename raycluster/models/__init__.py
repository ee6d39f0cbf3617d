"""Backbones, one per file: `model: {name: foo}` means the class `Model` of `raycluster/models/foo.py`; and what they
share.
"""
