"""Methods: one file each; `method: {name: foo}` means the class `Method` of `raycluster/methods/foo.py`."""
