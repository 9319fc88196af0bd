"""How a command's process ends: errors that bad input can cause become one line and an exit status."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn

from querydet_jax.runtime.errors import Interrupted, Preempted, QueryDetError
from querydet_jax.runtime.files import cannot_write
from querydet_jax.runtime.names import one_line, printable

# Errors that only a path that a user has named can cause.
_BAD_PATH = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR)


def run(command: Callable[[], None]) -> None:
    """Call a command. Exit with 2 after bad input, 130 after Ctrl-C, 141 after SIGPIPE, 143 after SIGTERM."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks ends no run
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    # force: libraries imported by now have set up handlers of their own.
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("querydet_jax").setLevel(logging.INFO)
    # Pillow's remarks on odd tags of pictures that are read well; others have a message of their own.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    try:
        command()
    except Preempted as error:
        print(error, file=sys.stderr)
        sys.exit(130 if isinstance(error, Interrupted) else 143)  # as a shell reports SIGINT and SIGTERM
    except QueryDetError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader (| head) has gone. Python flushes once more at exit: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell reports SIGPIPE
    except OSError as error:
        if cannot_write(error):
            _fail(f"{error.filename or 'an output'} cannot be written ({error.strerror})", 2)
        if error.filename is None or error.errno not in _BAD_PATH:
            raise
        _fail(f"{str(error.filename)[:200]}: {error.strerror}; correct the path, or its permissions", 2)
    except Exception as error:
        if not _among_several_hosts():
            raise
        from querydet_jax.runtime import host_failures

        line = host_failures.lost_host(error)
        if line is None:
            traceback.print_exc()
        _fail(line or f"{type(error).__name__} ({(str(error).splitlines() or [''])[0][:200]})", 2 if line else 1)


class _Formatter(logging.Formatter):
    """Escapes control characters, which names of files and classes may hold."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return one_line(text) if record.name == "querydet_jax" and not record.exc_info else printable(text)


@contextlib.contextmanager
def interrupts_end_the_process() -> Iterator[None]:
    """End the process with status 130 at Ctrl-C, or at the second one in a block that handles SIGINT itself.

    Python raises KeyboardInterrupt, which jax can lose in a callback, and calls handlers only when the main thread is
    out of C code, such as a compilation; so a thread counts as well.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    here, there = socket.socketpair()
    there.setblocking(False)

    def follow() -> None:
        presses = 0
        with here:
            while numbers := here.recv(64):
                presses += numbers.count(signal.SIGINT)
                if presses > 1:
                    _interrupted()

    threading.Thread(target=follow, daemon=True).start()
    former_fd = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(former_fd)
        there.close()


def _interrupted(*_: object) -> NoReturn:
    with contextlib.suppress(OSError):  # print() may be what a handler interrupts
        os.write(2, b"\ninterrupted\n")
    os._exit(130)


def _fail(line: str, status: int) -> NoReturn:
    print("interrupted" if status == 130 else f"error: {one_line(line)}", file=sys.stderr, flush=True)
    if _among_several_hosts():
        from querydet_jax.runtime import host_failures

        host_failures.leave(status)
    sys.exit(status)


def _among_several_hosts() -> bool:
    if "jax" not in sys.modules:  # nothing has met other hosts, and importing it takes longer than `querydet --help`
        return False
    import jax

    return jax.distributed.is_initialized()
