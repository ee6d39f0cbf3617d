"""Files on any file system: local paths, file://, s3://, gs://, and whatever else pyarrow or fsspec can open.

A URI is taken literally (only file:// is percent-decoded). s3:// and gs:// URIs may end with options,
`s3://bucket/folder?endpoint_override=127.0.0.1:5000&scheme=http`; `join` keeps them. Credentials come from the
environment, never from the URI, so that no log, configuration or manifest can hold a secret.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from secrets import token_hex
from typing import TypeVar
from urllib.parse import parse_qsl, quote, unquote

import pyarrow as pa
from pyarrow import fs as pafs

from raycluster.io.retry import RetryState
from raycluster.types import UserError

T = TypeVar("T")

_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_OPTIONS = re.compile(r"\?((?:endpoint_override|scheme|region|anonymous)=[^?]*)$")
_PAUSES_SECONDS = (0.2, 0.8)  # before the second and the third attempt
_CONNECT_TIMEOUT_SECONDS = 2.0
_REQUEST_TIMEOUT_SECONDS = 30.0
_GCS_RETRY_SECONDS = 4.0
_LONGEST_CAUSE = 400
_PERMANENT = re.compile(
    "ACCESS_DENIED|NO_SUCH_BUCKET|NO_SUCH_KEY|RESOURCE_NOT_FOUND|INVALID_ACCESS_KEY|SIGNATURE|CREDENTIALS|EXPIRED|"
    "HTTP status 40[0134]|HTTP response code 40[0134]|status: 40[0134]",
    re.IGNORECASE,
)
_DAMAGED = re.compile(
    "corrupt|checksum|decompress|inflate|deserialize thrift|unexpected end of stream|page header", re.IGNORECASE
)
_OBJECT_REFUSED = re.compile("ACCESS_DENIED|NO_SUCH_KEY|RESOURCE_NOT_FOUND|(status|code):? 40[34]", re.IGNORECASE)
_FULL = {errno.ENOSPC, errno.EDQUOT}
_OF_ONE_FILE = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENXIO, errno.ENODEV, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EOVERFLOW, errno.EFBIG),
}
_TRANSIENT_LOCAL = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR}
_PART = re.compile(r"^\..+\.[0-9a-f]{16}\.part$")
_ABANDONED_SECONDS = 3600.0  # a temporary file this old belongs to no live writer
_swept: set[str] = set()  # folders in which this process has looked for abandoned temporary files


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system that holds `uri`, and the path of `uri` in it."""
    scheme, rest, options = _parse(uri)
    if not scheme:
        return _local(), os.path.abspath(os.path.expanduser(rest))
    if scheme == "file":
        return _local(), os.path.abspath("/" + unquote(rest).lstrip("/"))
    if "@" in rest.split("/")[0] and scheme in ("s3", "gs"):
        raise UserError(
            f"{shown(uri)} holds credentials, which would end up in logs; put them into the environment instead "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS)"
        )
    if scheme == "s3":
        return attempt("open", uri, lambda: _s3(rest.split("/")[0], options)), rest
    if scheme in ("gs", "gcs"):
        return attempt("open", uri, lambda: _gcs(options)), rest
    return _any(uri)


def join(uri: str, *parts: str) -> str:
    """`uri` with path components appended; options at its end stay at its end."""
    base, options = without_options(uri)
    for part in parts:
        clean = part.strip("/")
        base = f"{base.rstrip('/')}/{quote(clean) if base.startswith('file://') else clean}"
    return f"{base}?{options}" if options else base


def parent(uri: str) -> str:
    """The folder that holds `uri`; options at its end stay at its end."""
    base, options = without_options(uri)
    folder = base.rstrip("/").rpartition("/")[0] or "/"
    return f"{folder}?{options}" if options else folder


def without_options(uri: str) -> tuple[str, str]:
    """Split `uri` into base and options: ("s3://bucket/key", "region=eu-west-1"), ("/a/path", "")."""
    options = _parse(uri)[2]
    return (uri.removesuffix(f"?{options}"), options) if options else (uri, "")


def absolute(uri: str) -> str:
    """`uri` with the same meaning in every process: a local path becomes absolute."""
    return uri if _parse(uri)[0] else filesystem(uri)[1]


def shown(uri: str) -> str:
    """`uri` without its password, for messages."""
    return re.sub(r"//[^/@]*@", "//***@", uri)


def read_bytes(uri: str) -> bytes:
    """The content of a file; a local one must be a regular file. Raises UserError."""
    filesystem_, path = filesystem(uri)
    if isinstance(filesystem_, pafs.LocalFileSystem):
        return attempt("read", uri, lambda: _read_local(path))

    def read() -> bytes:
        with filesystem_.open_input_file(path) as file:
            return file.read()

    return attempt("read", uri, read)


def write_bytes(uri: str, data: bytes | pa.Buffer) -> None:
    """Write a file atomically: a reader sees all of it or what was there before.

    Missing folders are created. On failure nothing is left behind and UserError is raised. Temporary files that killed
    processes left in a local folder are deleted when they are an hour old.
    """
    filesystem_, path = filesystem(uri)
    if isinstance(filesystem_, pafs.LocalFileSystem):
        attempt("write", uri, lambda: _replace(path, data))
    else:
        attempt("write", uri, lambda: _put(filesystem_, path, data))


def exists(uri: str) -> bool:
    """Whether there is a file or folder."""
    return bool(file_info(uri).type != pafs.FileType.NotFound)


def file_info(uri: str) -> pafs.FileInfo:
    """Type (NotFound, File or Directory), size in bytes and time of change."""
    filesystem_, path = filesystem(uri)
    return attempt("look up", uri, lambda: filesystem_.get_file_info(path))


def list_files(uri: str, *, recursive: bool = False) -> list[str]:
    """URIs of the files in a folder, sorted. Raises UserError if there is no such folder."""
    return [join(uri, *info.path.split("/")) for info in list_infos(uri, recursive=recursive)]


def list_infos(uri: str, *, recursive: bool = False) -> list[pafs.FileInfo]:
    """Like `list_files`, as pyarrow's FileInfo with `path` relative to the folder; sorted by path."""
    filesystem_, path = filesystem(uri)
    base = path.rstrip("/") + "/"
    selector = pafs.FileSelector(path, recursive=recursive)
    infos = attempt("list", uri, lambda: filesystem_.get_file_info(selector))
    files = [
        pafs.FileInfo(info.path[len(base) :], info.type, size=info.size)
        for info in infos
        if info.type != pafs.FileType.Directory
    ]
    return sorted(files, key=lambda info: info.path)


def delete(uri: str) -> None:
    """Delete a file, or a folder with its content. Does nothing if it does not exist."""
    filesystem_, path = filesystem(uri)

    def remove() -> None:
        kind = filesystem_.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            filesystem_.delete_dir(path)
        elif kind != pafs.FileType.NotFound:
            filesystem_.delete_file(path)

    attempt("delete", uri, remove)


def attempt(verb: str, uri: str, operation: Callable[[], T]) -> T:
    """Call `operation`, again after a pause if its error is transient; else raise UserError naming `uri`.

    Retries last a second, or as long as the enclosing `raycluster.io.retry.retry_context` allows.
    """
    retries = RetryState()
    while True:
        for pause in (*_PAUSES_SECONDS, None):
            try:
                result = operation()
                retries.succeeded()
                return result
            except UserError:
                raise
            except (OSError, pa.ArrowException) as error:
                if pause is None or not _may_pass(uri, error):
                    user_error, cause = UserError(_explain(verb, uri, error)), error
                    break
                time.sleep(pause)
        full = getattr(cause, "errno", None) in _FULL
        if not (full or _may_pass(uri, cause)) or not retries.wait(str(user_error)):
            raise user_error from cause


def concerns_one_file(error: BaseException | None) -> bool:
    """Whether a read failed permanently because of the file itself; others in the same place may be readable."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _OF_ONE_FILE
    if isinstance(error, (FileNotFoundError, PermissionError, ValueError)):  # ValueError: an invalid name or content
        return True
    return isinstance(error, (OSError, pa.ArrowException)) and bool(
        _DAMAGED.search(str(error)) or _OBJECT_REFUSED.search(str(error))
    )


def _parse(uri: str) -> tuple[str, str, str]:
    """(scheme or "", what follows it, options or "")."""
    match = _SCHEME.match(uri)
    if not match:
        return "", uri, ""
    scheme, rest, options = match[1].lower(), uri[match.end() :], ""
    found = _OPTIONS.search(rest) if scheme in ("s3", "gs", "gcs") else None
    if found:
        rest, options = rest[: found.start()], found[1]
    return scheme, rest.rstrip("/"), options


@lru_cache(maxsize=1)
def _local() -> pafs.LocalFileSystem:
    return pafs.LocalFileSystem()


@lru_cache(maxsize=64)
def _s3(bucket: str, options: str) -> pafs.S3FileSystem:
    chosen = dict(parse_qsl(options))
    region = chosen.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    endpoint = chosen.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL")
    if not region and not endpoint:
        region = pafs.resolve_s3_region(bucket)
    scheme, _, host = (endpoint or "").rpartition("://")
    return pafs.S3FileSystem(
        anonymous=chosen.get("anonymous", "") == "true",
        region=region,
        scheme=chosen.get("scheme") or scheme or None,
        endpoint_override=host or None,
        connect_timeout=_CONNECT_TIMEOUT_SECONDS,
        request_timeout=_REQUEST_TIMEOUT_SECONDS,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
        allow_delayed_open=True,
    )


@lru_cache(maxsize=16)
def _gcs(options: str) -> pafs.GcsFileSystem:
    chosen = dict(parse_qsl(options))
    return pafs.GcsFileSystem(
        anonymous=chosen.get("anonymous", "") == "true",
        scheme=chosen.get("scheme", "https"),
        endpoint_override=chosen.get("endpoint_override"),
        retry_time_limit=timedelta(seconds=_GCS_RETRY_SECONDS),
    )


def _any(uri: str) -> tuple[pafs.FileSystem, str]:
    """pyarrow's own file systems (hdfs, abfs), then fsspec's."""
    try:
        return pafs.FileSystem.from_uri(uri)
    except (OSError, pa.ArrowException) as arrow_error:
        try:
            import fsspec

            found, path = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError, OSError) as error:
            raise UserError(
                f"cannot open {shown(uri)}: pyarrow says '{arrow_error}', fsspec says '{error}'. Check the scheme, or "
                "install the fsspec package that serves it (e.g. adlfs, sshfs)"
            ) from error
        return pafs.PyFileSystem(pafs.FSSpecHandler(found)), path


def _read_local(path: str) -> bytes:
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # NUL or a surrogate in the name
        raise OSError(errno.EINVAL, f"invalid file name: {error}") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "a FIFO, socket or device, not a regular file", path)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _replace(path: str, data: bytes | pa.Buffer) -> None:
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    _delete_abandoned(folder)
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{token_hex(8)}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Make a rename durable, where the file system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _delete_abandoned(folder: str) -> None:
    """Delete old temporary files of processes that were killed; once per folder and process: folders may be large."""
    if folder in _swept:
        return
    _swept.add(folder)
    oldest = time.time() - _ABANDONED_SECONDS
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _PART.match(entry.name) and entry.stat(follow_symlinks=False).st_mtime < oldest:
                os.unlink(entry.path)


def _put(filesystem_: pafs.FileSystem, path: str, data: bytes | pa.Buffer) -> None:
    stream = filesystem_.open_output_stream(path)
    stream.write(data)
    stream.close()


def _may_pass(uri: str, error: BaseException) -> bool:
    if isinstance(
        error,
        (pa.ArrowInvalid, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError),
    ):
        return False
    if _parse(uri)[0] in ("", "file"):
        return getattr(error, "errno", None) in _TRANSIENT_LOCAL
    return not (_PERMANENT.search(str(error)) or _DAMAGED.search(str(error)))


def _explain(verb: str, uri: str, error: BaseException) -> str:
    cause = " ".join(str(error).split())
    if len(cause) > _LONGEST_CAUSE:
        cause = cause[:_LONGEST_CAUSE] + "..."
    return f"cannot {verb} {shown(uri)}: {cause}. {_remedy(uri, error)}"


def _remedy(uri: str, error: BaseException) -> str:
    remote = _parse(uri)[0] not in ("", "file")
    code = getattr(error, "errno", None)
    if isinstance(error, FileNotFoundError) or re.search("NO_SUCH_BUCKET|NO_SUCH_KEY|RESOURCE_NOT_FOUND", str(error)):
        return "There is nothing of that name: check the spelling" + (
            " of bucket and key, and the region" if remote else ", and that every machine sees this path"
        )
    if isinstance(error, pa.ArrowInvalid):
        return "It is damaged, incomplete, or of another format: write or copy it again"
    if code in _FULL:
        return "The disk or quota is full: make room, or choose another place"
    if isinstance(error, PermissionError) or _PERMANENT.search(str(error)):
        return (
            "Access was refused: check the credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            "AWS_SESSION_TOKEN, or GOOGLE_APPLICATION_CREDENTIALS), what they may do, and the region"
            if remote
            else "Access was refused: check owner and permissions"
        )
    if remote:
        return (
            f"Tried {len(_PAUSES_SECONDS) + 1} times: check that the endpoint can be reached from this machine, its "
            "scheme (?scheme=http), the region (?region=...), and the credentials in the environment"
        )
    return "Check the path and the disk"
