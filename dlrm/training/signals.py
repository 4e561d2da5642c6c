"""Signals that ask a training run to stop."""

import signal
from collections.abc import Iterable, Iterator
from typing import TypeVar

from dlrm.training.trainer import Stopped

T = TypeVar("T")


class StopSignals:
    """Within ``with``, SIGTERM and SIGINT ask the run to stop. A second SIGINT interrupts it at once.

    Attributes:
        received: whether one has come.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items until a signal comes.

        Raises:
            Stopped: one has come.
        """
        for item in items:
            if self.received:
                raise Stopped
            yield item
