"""The files below a local folder, on disks where not everything is a file and not every name is text."""

from __future__ import annotations

import heapq
import os
from collections import deque
from collections.abc import Iterator

from raycluster.data.sources.base import printable
from raycluster.io import storage

FOLDER_WITHOUT_ACCESS, NAME_NOT_TEXT = "folder without access", "name that is not UTF-8"


def walk(root: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Relative paths of the regular files below a folder, and (kind, path) of all else that is no folder.

    Hidden files and folders are left out. Symbolic links are followed, but each folder is visited once: under its own
    path if that lies below `root`, else under that of the first link to it. Raises OSError if the disk fails.
    """
    files: list[str] = []
    others: list[tuple[str, str]] = []
    visited: set[tuple[int, int]] = set()
    folders, links = deque([""]), list[str]()
    while folders or links:
        folder = folders.popleft() if folders else heapq.heappop(links)
        if _is_loop(root, folder):
            continue
        for path, kind in _entries(root, folder, visited):
            if kind == "file":
                files.append(path)
            elif kind == "folder":
                folders.append(path)
            elif kind == "link to folder":
                heapq.heappush(links, path)
            else:
                others.append((kind, path))
    return sorted(files), others


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is not meant for readers."""
    return name.startswith(".") or name == "__MACOSX"


def _is_loop(root: str, folder: str) -> bool:
    """Whether this is a symbolic link to a folder that the link itself lies in."""
    path = os.path.join(root, folder)
    if not folder or not os.path.islink(path):
        return False
    return f"{os.path.realpath(os.path.dirname(path))}/".startswith(f"{os.path.realpath(path).rstrip('/')}/")


def _entries(root: str, folder: str, visited: set[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """(path, kind) of what lies in a folder that was not visited before."""
    try:
        status = os.stat(os.path.join(root, folder))
        if (status.st_dev, status.st_ino) in visited:
            return
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(os.path.join(root, folder)) as entries:
            found = [(entry.name, _kind(entry)) for entry in entries if not hidden(entry.name)]
    except OSError as error:
        if not folder or not storage.concerns_one_file(error):
            raise
        yield folder, FOLDER_WITHOUT_ACCESS
        return
    for name, kind in sorted(found):
        path = f"{folder}/{name}" if folder else name
        yield (path, kind) if _is_text(name) else (printable(path), NAME_NOT_TEXT)


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "link to folder" if entry.is_symlink() else "folder"
        if entry.is_file():
            return "file"
        return (
            "broken symbolic link"
            if entry.is_symlink() and not os.path.exists(entry.path)
            else "FIFO, socket or device"
        )
    except OSError as error:
        if not storage.concerns_one_file(error):
            raise
        return "broken symbolic link"


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
