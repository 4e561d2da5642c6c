"""Signals that stop a run."""

import os
import signal

import pytest

from dlrm.training.signals import StopSignals
from dlrm.training.trainer import Stopped


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_within_the_statement_only(number):
    before = signal.getsignal(number)
    signals = StopSignals()
    with signals:
        assert not signals.received
        send(number)
        assert signals.received
    assert signal.getsignal(number) is before


def test_a_second_interrupt_is_raised_and_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)

    def interrupt():
        with StopSignals():
            send(signal.SIGTERM)
            send(signal.SIGTERM)
            send(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert signal.getsignal(signal.SIGINT) is before


def test_watched_items_end_with_a_signal():
    signals, seen = StopSignals(), []

    def watch():
        for item in signals.watch(range(5)):
            seen.append(item)
            if item == 2:
                send(signal.SIGTERM)

    with signals, pytest.raises(Stopped):
        watch()
    assert seen == [0, 1, 2]
    assert list(StopSignals().watch(range(5))) == list(range(5))
