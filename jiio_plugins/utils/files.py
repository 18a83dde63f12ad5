"""Files that are whole or absent, that tell when a bit of them has changed, and have one writer.

A file is written beside its place and moved there (:func:`replacing`). Its seal, a checksum of all
its other bytes, is somewhere inside: where, is up to its format (:func:`sealed`). Who writes one
again and again owns it meanwhile (:func:`owning`).
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import re
import secrets
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from jiio_plugins import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

EMPTY_SEAL = "sha256:" + 64 * "0"  # what a format puts where the seal is to be
_SEAL = re.compile(rb"sha256:[0-9a-f]{64}")
_ADVICE = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT), "the disk is full. Free some space, or choose another place"
    ),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "the folder is not yours to write to. Choose another, or change its permissions",
    ),
}


def sealed(content: bytes) -> bytes:
    """``content``, which has an empty seal somewhere, with the seal filled in."""
    return content.replace(EMPTY_SEAL.encode(), _seal_of(content))


def unsealed(content: bytes) -> bytes | None:
    """``content`` as it was before :func:`sealed`, or None if a bit of it has changed since."""
    for seal in set(_SEAL.findall(content)):
        before = content.replace(seal, EMPTY_SEAL.encode())
        if _seal_of(before) == seal:
            return before
    return None


def has_seal(content: bytes) -> bool:
    """Whether there is a seal in it, of whatever content."""
    return _SEAL.search(content) is not None


def _seal_of(content: bytes) -> bytes:
    return b"sha256:" + hashlib.sha256(content).hexdigest().encode()


def read_sealed(path: Path) -> bytes:
    """The content of a file that was written sealed, its seal empty again.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or was never sealed.
    """
    content = unsealed(read_regular(path))
    if content is None:
        raise damaged(path, "its checksum is not that of its content")
    return content


def read_regular(path: Path) -> bytes:
    """The content of a file. A pipe or a device in its place is not waited for.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is a pipe, a device or a folder.
    """
    if path.exists() and not path.is_file():
        raise damaged(path, "it is no regular file")
    return path.read_bytes()


def damaged(path: str | Path, why: object) -> ValueError:
    """The error of a file that cannot be used."""
    return ValueError(
        f"{path} is damaged or truncated, or this version of jiio-plugins did not write it: {why}. "
        "Give another file, or delete it to start afresh"
    )


@contextmanager
def understood(path: str | Path) -> Iterator[None]:
    """Say of what goes wrong in the block that the content of ``path`` is not what it should be."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        said = str(error).partition("\n")[0]
        raise damaged(path, f"{type(error).__name__}, {said}") from error


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], **about: object) -> None:
    """Write tensors, and plain values about them, as a sealed safetensors file.

    Args:
        path: the file.
        tensors: by name.
        **about: plain values, read back as text.

    Raises:
        OSError: could not be written, such as on a full disk. An older file is kept.
    """
    from safetensors.torch import save  # imports torch, which most of this module does without

    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = {name: str(value) for name, value in about.items()}
    with replacing(path) as file:
        file.write(sealed(save(plain, {**text, "checksum": EMPTY_SEAL})))


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and what :func:`save_tensors` was told about them.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or :func:`save_tensors` did not write it.
    """
    from safetensors.torch import load

    content = read_sealed(Path(path))
    try:
        tensors = load(content)
        with safe_open(path, framework="pt") as opened:  # the one way to what it says of itself
            about = dict(opened.metadata())
    except SafetensorError as error:
        raise damaged(path, error) from error
    del about["checksum"]
    return tensors, about


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` once it is whole, also if the process is killed.

    Raises:
        OSError: it could not be written. The message says whether there is one from before.
    """
    path = Path(path)
    # a name that nobody knows before, and "x": nothing that is there is shared, or followed
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with _writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink()


def as_json(content: Mapping[str, object], *, indent: int | None = None) -> str:
    """Plain values as JSON, with the version of jiio-plugins they come from.

    Args:
        content: by name, what :func:`plain` takes. Anything else becomes text, as paths do.
        indent: of the text. None: one line.
    """
    return json.dumps({"jiio_plugins": __version__, **plain(content)}, indent=indent, default=str)


def plain(value: Any) -> Any:
    """The value in what JSON has words for. NaN is a number not known: None. Infinity is text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def write_json(path: str | Path, content: Mapping[str, object], *, indent: int = 1) -> None:
    """Write plain values as JSON, with the version of jiio-plugins they come from.

    Args:
        path: the file, which replaces the one before once it is whole.
        content: what :func:`as_json` takes.
        indent: of the text.

    Raises:
        OSError: it could not be written. An older file is kept.
    """
    with replacing(path) as file:
        file.write((as_json(content, indent=indent) + "\n").encode())


def keep_results(folder: Path, names: Iterable[str], overwrite: bool) -> None:
    """Raise where a command would replace what an earlier one wrote.

    Args:
        folder: of the results.
        names: of the files that are to be written there.
        overwrite: whether they may be replaced.

    Raises:
        FileExistsError: one of them is there, and may not be.
    """
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{folder} holds the results of an earlier run ({', '.join(there[:3])}): choose "
            "another --out, or replace them with --overwrite"
        )


@contextmanager
def owning(path: str | Path, *beside: str | Path) -> Iterator[None]:
    """Be the only one who writes ``path``, and clear away what a killed writer left.

    Args:
        path: the file.
        *beside: further files that only the owner of ``path`` writes.

    Raises:
        BlockingIOError: another process, or another thread, owns it.
        OSError: its folder cannot be written to.
    """
    path = Path(path)
    place = path.with_name(f".{path.name}.lock")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise BlockingIOError(
                f"{path} is being written by another process or thread: wait until it has ended, "
                "or give each a file of its own"
            ) from error
    try:
        for one in map(Path, (path, *beside)):
            for left in one.parent.glob(f".{glob.escape(one.name)}.*.tmp"):
                left.unlink(missing_ok=True)
        yield
    finally:
        place.unlink(missing_ok=True)  # while it is ours: whoever waits for it looks again
        lock.release()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say of an error of the system's what it means for ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # it says already
            raise
        kept = f"; the one before is kept ({path})" if os.path.exists(path) else ""
        why = _ADVICE.get(error.errno, f"{error.strerror}. Choose another place")
        raise type(error)(f"could not write {path.name}{kept}: {why}") from error
