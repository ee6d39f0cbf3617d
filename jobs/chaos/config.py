"""Settings of the fault-injection job. Imports neither Ray nor torch, so that errors appear at once."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from raycluster.config import NonEmpty, Seed, settings


@settings
class ChaosSettings:
    """What to run.

    seed: of moments and processes. only: run scenarios with a fault whose name contains this text. repeat: number of
    passes, each with the next seed. out: folder for the run directories and logs of failed scenarios.
    """

    seed: Seed = 0
    only: str = ""
    repeat: Annotated[int, Field(ge=1, le=1000)] = 1
    out: NonEmpty = "chaos"
