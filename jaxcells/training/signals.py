"""SIGTERM and Ctrl-C as a request that the training loop answers between two steps."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """The run was asked to stop, saved its state and left.

    Attributes:
      signal: number of the signal; the exit code of a shell is 128 more.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal = signal_number


class StopRequest:
    """While open, turns SIGTERM and SIGINT into a flag; a second SIGINT interrupts at once.

    In several processes JAX's own preemption service tells all of them to stop after the same
    step; it watches SIGTERM.
    """

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> "StopRequest":
        signals = [signal.SIGINT]
        if jax.process_count() == 1:
            signals.append(signal.SIGTERM)
        self._previous = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def requested(self, step: int) -> bool:
        """Returns whether to stop before `step`; all processes give the same answer."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal != 0
