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


def talk(rank: int, size: int, port: int, patience: float, do, said) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "DTQ_TIMEOUT": str(patience)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        said.put((rank, do(Workers.join())))
    except WorkerError as error:
        said.put((rank, str(error)))


def run(do, size: int = 2, patience: float = 2.0):
    """Start ``do(team)`` in each process; the processes, and the queue of what they return."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    said = fork.Queue()
    children = [
        fork.Process(target=talk, args=(rank, size, port, patience, do, said), daemon=True)
        for rank in range(size)
    ]
    for child in children:
        child.start()
    return children, said


def answers(said, count: int) -> dict:
    found = dict(said.get(timeout=60) for _ in range(count))
    with pytest.raises(queue.Empty):
        said.get_nowait()
    return found


def test_everyone_hears_what_the_first_says():
    def do(team):
        return [team.broadcast({"turn": turn} if team.is_main else None) for turn in range(20)]

    _, said = run(do, size=3)
    turns = [{"turn": turn} for turn in range(20)]
    assert answers(said, 3) == {0: turns, 1: turns, 2: turns}


def test_a_second_command_of_the_same_processes_waits_too():
    def do(team):
        first = team.broadcast(1 if team.is_main else None)
        again = Workers.join()
        if again.is_main:
            time.sleep(0.5)
        return [first, again.broadcast(2 if again.is_main else None)]

    _, said = run(do)
    assert answers(said, 2) == {0: [1, 2], 1: [1, 2]}


@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_one_is_waited_for(slow):
    def do(team):
        if team.rank == slow:
            time.sleep(3)
        team.barrier()
        return "met"

    _, said = run(do, patience=1.0)
    assert answers(said, 2) == {0: "met", 1: "met"}


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_one_is_not(dead):
    def do(team):
        team.barrier()
        if team.rank == dead:
            os.kill(os.getpid(), signal.SIGKILL)
        team.barrier()

    _, said = run(do, patience=30.0)
    started = time.monotonic()
    told = answers(said, 1)[1 - dead]
    assert "another process died or does not answer" in told
    assert "the same command continues from there" in told
    assert time.monotonic() - started < 20


def test_a_silent_one_is_not():
    def do(team):
        team.barrier()
        if team.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        team.barrier()

    children, said = run(do, patience=1.0)
    assert "no heartbeat from process 1 of 2" in answers(said, 1)[0]
    children[1].kill()


def test_one_that_never_comes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(
        target=talk, args=(0, 2, port, 1.0, Workers.barrier, said)
    )
    child.start()
    assert "distributed initialization failed" in said.get(timeout=60)[1]
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
