"""Users' mistakes come out of Ray as they went in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from raycluster.types import UserError


def find_user_error(error: BaseException | None) -> UserError | None:
    """The UserError that `error` wraps, however deep Ray has packed it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, UserError):
            return UserError(str(error.cause)) if hasattr(error, "cause") else error
        inner = getattr(error, "cause", None)
        failures = getattr(error, "worker_failures", None)
        if isinstance(failures, dict) and failures:
            inner = next(iter(failures.values()))
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return None


@contextmanager
def user_errors() -> Iterator[None]:
    """Raise the UserError inside Ray's exceptions instead of them."""
    try:
        yield
    except Exception as error:
        found = find_user_error(error)
        if found is None or found is error:
            raise
        raise found from None
