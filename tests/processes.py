"""Processes that are killed at a chosen moment."""

import os
import signal

import torch

# The first backward pass of a process decides whether autograd gets threads of its own, which do not survive a fork.
# None are needed on a CPU, but placeholders for tensors, where a test has made some before, look like another device's.
torch.ones(1, requires_grad=True).sum().backward()


def in_a_killed_process(work) -> None:
    """Run ``work`` in a process of its own, which must end by SIGKILL.

    It is forked, and threads of OpenMP do not survive that: the fixture ``one_thread`` sees that there are none.
    """
    assert torch.get_num_threads() == 1
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill_at_call(monkeypatch, owner, name, count) -> None:
    """The process kills itself when ``name`` is called for the ``count``-th time."""
    original, calls = getattr(owner, name), []

    def counting(*args, **kwargs):
        calls.append(None)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)


def pid_of_a_process_that_has_ended() -> int:
    """Number of a process of this machine that does not run any longer."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child
