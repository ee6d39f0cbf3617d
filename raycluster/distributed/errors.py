"""UserError and ChunkFailed, unwrapped from the exceptions of Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from raycluster.types import ChunkFailed, UserError


def find_own_error(error: BaseException | None) -> UserError | ChunkFailed | None:
    """The UserError or ChunkFailed that `error` wraps, at any depth; None if there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, UserError):
            return UserError(str(error.cause)) if hasattr(error, "cause") else error
        if isinstance(error, ChunkFailed):
            return ChunkFailed(error.stream, error.reason)
        inner = getattr(error, "cause", None)
        failures = getattr(error, "worker_failures", None)
        if isinstance(failures, dict) and failures:
            inner = next(iter(failures.values()))
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return None


@contextmanager
def user_errors() -> Iterator[None]:
    """Re-raise the UserError or ChunkFailed inside an exception of Ray."""
    try:
        yield
    except Exception as error:
        found = find_own_error(error)
        if found is None or found is error:
            raise
        raise found from None
