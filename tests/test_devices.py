"""Work that several devices share: in order, on threads, no further ahead than they are.

Meant to find: results in the order in which they were made; all jobs read before the first is done; a worker that is given two jobs at once; an
error that is lost, or thrown while others still work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from worldenv.devices import dealt


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_come_in_the_order_of_the_jobs(workers: int) -> None:
    read: list[int] = []
    inside = dict.fromkeys(range(workers), 0)
    most = dict(inside)

    def jobs() -> Iterator[int]:
        for job in range(12):
            read.append(job)
            yield job

    def work(worker: int, job: int) -> tuple[int, int]:
        inside[worker] += 1
        most[worker] = max(most[worker], inside[worker])
        time.sleep(0.02 if job % workers == 0 else 0.001)
        inside[worker] -= 1
        return job, worker

    made = []
    for job, worker in dealt(range(workers), jobs(), work):
        made.append((job, worker))
        assert len(read) <= len(made) + workers - 1
    assert [job for job, _ in made] == list(range(12))
    assert set(most.values()) <= {0, 1}
    assert len({worker for _, worker in made}) == workers


def test_several_work_at_once_and_one_works_here() -> None:
    both = threading.Barrier(2, timeout=60)
    assert list(dealt("ab", range(4), lambda worker, job: both.wait() * 0 + job)) == [0, 1, 2, 3]
    assert set(dealt("a", range(3), lambda worker, job: threading.get_ident())) == {threading.get_ident()}
    assert threading.get_ident() not in set(dealt("ab", range(3), lambda worker, job: threading.get_ident()))


def test_who_stops_it_does_not_wait_for_what_is_under_way() -> None:
    free = threading.Event()

    def jobs() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(dealt("ab", jobs(), lambda worker, job: free.wait(60)))
    assert time.monotonic() - before < 30
    free.set()


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_is_thrown_when_the_others_have_ended(workers: int) -> None:
    ended: list[int] = []

    def work(worker: int, job: int) -> int:
        if job == 1:
            raise ValueError("no such frame")
        time.sleep(0.05)
        ended.append(job)
        return job

    with pytest.raises(ValueError, match="no such frame"):
        list(dealt(range(workers), range(9), work))
    before = list(ended)
    time.sleep(0.1)
    assert ended == before
    assert len(before) <= workers + 1
