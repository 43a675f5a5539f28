"""Signals that stop a run: handled between steps, so that the current step is saved."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

__all__ = ["StopSignals"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


class StopSignals:
    """Catches SIGTERM, SIGHUP and the first Ctrl-C and requests a clean stop; a context manager.

    A second Ctrl-C raises KeyboardInterrupt at once. Several processes of one program agree on where to stop through
    JAX's preemption service, whichever one receives the signal. Signals that the process ignores (`nohup`) stay
    ignored. Outside the main thread, where Python receives no signals, nothing changes.

    >>> with StopSignals() as signals:  # doctest: +SKIP
    ...     state = run_loop(..., should_stop=signals.should_stop)
    """

    def __init__(self) -> None:
        """No handlers are installed until entry."""
        self.received: signal.Signals | None = None
        self._calls = 0
        self._multi_process = jax.process_count() > 1
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # With several processes, JAX handles SIGTERM itself, to notify the others.
                ours = not (self._multi_process and number == signal.SIGTERM)
                if ours and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *unused: object) -> None:
        """Restores the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def should_stop(self) -> bool:
        """Returns whether to stop now; all processes must call it after the same steps, and get the same answer."""
        self._calls += 1
        if self._multi_process:
            if multihost_utils.reached_preemption_sync_point(self._calls):
                self.received = self.received or signal.SIGTERM
                return True
            return False
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number)
            with contextlib.suppress(OSError):  # The terminal may be gone. No print: it may have been interrupted.
                os.write(2, b"\nstopping after this step, which is saved; Ctrl-C again leaves at once\n")
            if self._multi_process:
                os.kill(os.getpid(), signal.SIGTERM)
