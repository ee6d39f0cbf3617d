"""Reading .npz files that may be damaged."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raycluster.io import storage
from raycluster.types import UserError


def read_npz(uri: str, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The arrays `names` of an .npz file. Raises UserError if there is no file, it is damaged, or it lacks an array."""
    data = storage.read_bytes(uri)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # Each member is read to its end, where zipfile checks the checksum, before NumPy parses it.
            members = {name: io.BytesIO(archive.read(f"{name}.npy")) for name in names}
        return {name: np.lib.format.read_array(member, allow_pickle=False) for name, member in members.items()}
    except Exception as error:  # on damaged bytes, zipfile, zlib and NumPy raise a dozen types
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{storage.shown(uri)} is damaged or of another program: {cause}; wanted an .npz file with the arrays "
            f"{', '.join(names)}; restore it from a copy"
        ) from None
