"""The system's lock on an open file: one holder at a time, until the file is closed or its process ends."""

from __future__ import annotations

import errno
import os
import sys

# What the system answers where a file is locked already, and where the file system has no locks.
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


if sys.platform == "win32":
    import msvcrt

    def lock(file: int) -> None:
        """Lock an open file, given by its number, without waiting; raise OSError, such as one of ``HELD``."""
        os.lseek(file, 1 << 30, os.SEEK_SET)  # beyond the text, which others may then read
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)

else:
    import fcntl

    def lock(file: int) -> None:
        """Lock an open file, given by its number, without waiting; raise OSError, such as one of ``HELD``."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
