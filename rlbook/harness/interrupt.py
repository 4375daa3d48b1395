"""Ctrl-C that waits for the end of a turn, so that an interrupted run can go on bit for bit."""

import os
import signal
import threading
from types import FrameType


class Interrupts:
    """Between `start` and `stop` the first Ctrl-C only sets `asked`; a second one interrupts.

    Does nothing outside the main thread, or where something else handles the signal already.
    """

    def __init__(self) -> None:
        self.asked = False

    def start(self) -> None:
        """Takes Ctrl-C over."""
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._ask)

    def stop(self) -> None:
        """Gives Ctrl-C back to Python."""
        if signal.getsignal(signal.SIGINT) == self._ask:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True
        self.stop()
        if os.isatty(2):
            os.write(2, b"\nstopping at the end of this turn; Ctrl-C again stops at once\n")
