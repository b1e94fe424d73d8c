"""Write a file or a folder completely or not at all.

Everything is written to a hidden sibling first and renamed when finished, so a failure or a
kill leaves what was there before.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama2.errors import Llama2Error


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success it replaces `path`, on failure it is removed."""
    make_parent(path)
    if path.is_dir():
        raise Llama2Error(f"cannot write {path}: a folder of this name exists; name a file inside it, or remove it")
    if path.exists() and not path.is_file():
        raise Llama2Error(f"cannot write {path}: it is a device or a pipe, not a file; name a file")
    with _writable(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success it becomes `path`, which must be new or empty."""
    make_parent(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise Llama2Error(f"cannot write into {path}: it exists and is not an empty folder; name a new one")
    with _writable(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_parent(path: Path) -> None:
    """Create the folder that `path` lies in; raise Llama2Error where that is impossible."""
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Llama2Error(f"cannot create the folder {path.parent}: {error.strerror}; name another place") from error


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Llama2Error(f"cannot write into {path.parent}: {error.strerror}; name another place") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
