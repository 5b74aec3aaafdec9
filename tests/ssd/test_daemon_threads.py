"""Threads for a disk that may hang: as many as asked for, results and errors as they come, and an end in any case."""

import threading

import pytest

from kvpool.tiers.ssd.daemon_threads import DaemonThreads


def test_calls_run_on_at_most_so_many_threads():
    threads = DaemonThreads(3, "t")
    names, together = set(), threading.Barrier(3)

    def call(number):
        names.add(threading.current_thread().name)
        together.wait(60)
        return number * 2

    futures = [threads.submit(call, number) for number in range(12)]
    assert [future.result(60) for future in futures] == [number * 2 for number in range(12)]
    assert len(names) == 3
    threads.shutdown()
    with pytest.raises(RuntimeError):
        threads.submit(call, 1)


def test_a_call_does_not_wait_for_one_that_hangs():
    threads = DaemonThreads(2, "t")
    for _ in range(50):
        assert threads.submit(int).result(60) == 0
    many = [threads.submit(int) for _ in range(50)]
    assert [future.result(60) for future in many] == [0] * 50
    go_on = threading.Event()
    hanging = threads.submit(go_on.wait)
    assert threads.submit(int).result(60) == 0
    go_on.set()
    assert hanging.result(60)
    threads.shutdown()


def test_errors_come_back_and_the_thread_goes_on():
    threads = DaemonThreads(1, "t")
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 / 0).result(60)
    assert threads.submit(lambda: 7).result(60) == 7
    threads.shutdown()


def test_a_call_that_hangs_can_be_abandoned():
    threads = DaemonThreads(2, "t")
    begun, go_on = threading.Event(), threading.Event()

    def hang():
        begun.set()
        go_on.wait()

    future = threads.submit(hang)
    assert begun.wait(60)
    assert threads.abandon(TimeoutError("too late")) == 1
    with pytest.raises(TimeoutError):
        future.result(60)
    threads.shutdown(wait=False)
    go_on.set()
