"""Ctrl-C and SIGTERM: the first lets a run save itself and says how long that takes, the second
stops it at once."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Stop:
    """`finishing`: what is still done first, as it is said at the key press; None: there is nothing
    to save, the run stops at once."""

    asked: bool = False
    finishing: Callable[[], str] | None = None


@contextmanager
def stop_signals(stop: Stop) -> Iterator[None]:
    """The first signal sets `stop.asked`, or raises KeyboardInterrupt where nothing is finished
    first; a second one acts as always."""

    def receive(number: int, _: Any) -> None:
        stop.asked = True
        restore()
        if stop.finishing is None:
            raise KeyboardInterrupt
        if said := stop.finishing():
            # Not through the console: the signal may have come while it was printing.
            os.write(2, f"\n{said}; once more stops at once\n".encode())

    def restore() -> None:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    before = {kind: signal.signal(kind, receive) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()
