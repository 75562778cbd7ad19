"""Locks between processes: ``flock`` on a file, and on a file of this machine where the filesystem has no locks.

NFS without lockd and Lustre without ``-o flock`` have none. There two processes of one machine still wait for each
other; two machines do not. The kernel gives a lock back with the process that held it, however that ended.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(path: Path, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold the lock of ``path``, a file that is made for it and stays. Raises OSError.

    ``on_wait`` is called where somebody else holds it, before the wait; what it raises is raised in place of waiting.
    A process that holds it and asks for it again waits for ever.
    """
    try:
        descriptor = _acquire(path, on_wait)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        descriptor = _acquire(_of_this_machine(path), on_wait)
    try:
        yield
    finally:
        os.close(descriptor)  # and the lock with it


def _acquire(path: Path, on_wait: Callable[[], object]) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _of_this_machine(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return Path(tempfile.gettempdir(), f"glmlocal-{os.getuid()}-{name}.lock")
