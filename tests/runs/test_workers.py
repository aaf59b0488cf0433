# SPDX-License-Identifier: Apache-2.0
"""Processes wait for whoever lives, however long it takes, and for nobody else."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import socket
import time

import pytest

from dtq.errors import InputError, WorkerError
from dtq.runs.workers import Workers


def talk(rank: int, size: int, port: int, timeout: float, do, results) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "DTQ_TIMEOUT": str(timeout)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        results.put((rank, do(Workers.join())))
    except WorkerError as error:
        results.put((rank, str(error)))


def run(do, size: int = 2, timeout: float = 2.0):
    """Start ``do(workers)`` in each process; the processes, and the queue of what they return."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    children = [
        fork.Process(target=talk, args=(rank, size, port, timeout, do, results), daemon=True)
        for rank in range(size)
    ]
    for child in children:
        child.start()
    return children, results


def answers(results, count: int) -> dict:
    by_rank = dict(results.get(timeout=60) for _ in range(count))
    with pytest.raises(queue.Empty):
        results.get_nowait()
    return by_rank


def test_every_process_receives_the_value_of_the_first():
    def do(workers):
        return [
            workers.broadcast({"round": round_} if workers.is_main else None)
            for round_ in range(20)
        ]

    _, results = run(do, size=3)
    rounds = [{"round": round_} for round_ in range(20)]
    assert answers(results, 3) == {0: rounds, 1: rounds, 2: rounds}


def test_a_second_command_of_the_same_processes_waits_too():
    def do(workers):
        first = workers.broadcast(1 if workers.is_main else None)
        again = Workers.join()
        if again.is_main:
            time.sleep(0.5)
        return [first, again.broadcast(2 if again.is_main else None)]

    _, results = run(do)
    assert answers(results, 2) == {0: [1, 2], 1: [1, 2]}


@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_one_is_waited_for(slow):
    def do(workers):
        if workers.rank == slow:
            time.sleep(3)
        workers.barrier()
        return "met"

    _, results = run(do, timeout=1.0)
    assert answers(results, 2) == {0: "met", 1: "met"}


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_one_is_not(dead):
    def do(workers):
        workers.barrier()
        if workers.rank == dead:
            os.kill(os.getpid(), signal.SIGKILL)
        workers.barrier()

    _, results = run(do, timeout=30.0)
    started = time.monotonic()
    message = answers(results, 1)[1 - dead]
    assert "another process died or does not answer" in message
    assert "the same command continues from there" in message
    assert time.monotonic() - started < 20


def test_a_silent_one_is_not():
    def do(workers):
        workers.barrier()
        if workers.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        workers.barrier()

    children, results = run(do, timeout=1.0)
    assert "no heartbeat from process 1 of 2" in answers(results, 1)[0]
    children[1].kill()


def test_one_that_never_comes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(
        target=talk, args=(0, 2, port, 1.0, Workers.barrier, results)
    )
    child.start()
    assert "distributed initialization failed" in results.get(timeout=60)[1]
    child.join()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "DTQ_TIMEOUT"])
def test_a_variable_that_is_no_number(name, monkeypatch):
    monkeypatch.setenv(name, "two")
    with pytest.raises(InputError, match=name):
        Workers.join()


def test_a_variable_that_is_missing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="MASTER_ADDR is not set"):
        Workers.join()
