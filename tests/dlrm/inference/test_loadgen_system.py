"""The queue from which workers take batches, alone and between threads."""

import threading
from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dlrm.inference.loadgen_system import BatchQueue

HANG = 120  # seconds


def nearest(sizes, share, limit):
    """How many of the first samples make up a batch: their rows are nearest to the share, and not over the limit."""
    counts = [n for n in range(1, len(sizes) + 1) if n == 1 or sum(sizes[:n]) <= limit]
    return min(counts, key=lambda n: (abs(sum(sizes[:n]) - min(share, limit)), -n))


@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=60),
    st.integers(700, 2100),
    st.lists(st.sampled_from(["put", "put", "take", "done"]), max_size=60),
    st.data(),
)
def test_batches_are_shares_in_order(sizes, limit, actions, data):
    workers = 3
    queue = BatchQueue(np.array(sizes), limit, workers)
    waiting, taken, idle, put = [], [], workers, 0
    for action in [*actions, *["done", "take"] * len(sizes)]:
        if action == "put" and put < len(sizes):
            some = list(range(put, min(put + data.draw(st.integers(1, 9)), len(sizes))))
            queue.put([sample + 1000 for sample in some], some)
            waiting += some
            put += len(some)
        elif action == "done" and idle < workers:
            queue.done()
            idle += 1
        elif action == "take" and idle and waiting:
            count = nearest([sizes[x] for x in waiting], sum(sizes[x] for x in waiting) / idle, limit)
            batch = queue.take()
            assert batch == [(x + 1000, x) for x in waiting[:count]]
            taken += waiting[:count]
            waiting = waiting[count:]
            idle -= 1
    assert taken == list(range(put))
    queue.close()
    assert queue.take() == []


def test_batches_keep_to_the_limit():
    queue = BatchQueue(np.array([400] * 6 + [1200]), 1000, 1)
    queue.put([0] * 7, list(range(7)))
    queue.close()  # whatever is taken, no take waits
    batches = []
    for _ in range(4):
        batches.append([sample for _, sample in queue.take()])
        queue.done()
    assert batches == [[0, 1], [2, 3], [4, 5], [6]]


def test_nothing_is_lost_between_threads():
    samples = 3000
    queue = BatchQueue(np.full(samples, 100), 700, 4)
    taken = [[] for _ in range(4)]

    def work(into):
        while batch := queue.take():
            into += batch
            queue.done()

    threads = [threading.Thread(target=work, args=(into,)) for into in taken]
    for thread in threads:
        thread.start()
    for sample in range(0, samples, 3):
        queue.put([sample, sample + 1, sample + 2], [sample, sample + 1, sample + 2])
    queue.close()
    for thread in threads:
        thread.join(HANG)
    assert sorted(chain(*taken)) == [(x, x) for x in range(samples)]
