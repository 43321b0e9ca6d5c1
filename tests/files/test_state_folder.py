import json
import multiprocessing
import os
import threading

import pytest

from lightning_calibtip.files.state_folder import MARKER, holding, remove_state
from tests.processes import in_a_killed_process


def hold(folder, ready, done):
    with holding(folder):
        ready.set()
        done.wait(60)


@pytest.fixture
def held_elsewhere(tmp_path):
    """A folder in which another process is at work, and its number."""
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "state", ready, done))
    process.start()
    assert ready.wait(60)
    yield tmp_path / "state", process.pid
    done.set()
    process.join()


def test_two_processes_do_not_share_a_folder(held_elsewhere):
    folder, pid = held_elsewhere
    message = rf"is in use by process {pid} on \S+ since 20\S+: wait for that run to end, or give this one a folder"
    with pytest.raises(RuntimeError, match=message), holding(folder):
        pass
    (folder / "0000.pt").touch()
    remove_state(folder, ["*.pt"])
    assert (folder / "0000.pt").exists()


def test_a_process_holds_it_several_times_over(tmp_path):
    folder = tmp_path / "state"
    with holding(folder):
        with holding(folder):
            pass
        with holding(tmp_path / "other" / ".." / "state"):
            pass
        assert json.loads((folder / MARKER).read_text())["pid"] == os.getpid()
    with holding(folder):
        pass


@pytest.mark.usefixtures("one_thread")
def test_a_killed_process_leaves_no_lock(tmp_path):
    def work():
        with holding(tmp_path / "state"):
            (tmp_path / "state" / "0000.pt").touch()
            os.kill(os.getpid(), 9)

    in_a_killed_process(work)
    with holding(tmp_path / "state"):
        assert (tmp_path / "state" / "0000.pt").exists()
    remove_state(tmp_path / "state", ["*.pt"])
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    message = r"holds thesis.tex, and no state of a run.*: give a folder of its own"
    with pytest.raises(ValueError, match=message), holding(tmp_path):
        pass
    remove_state(tmp_path, ["*"])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    file = tmp_path / "thesis.tex"
    with pytest.raises(NotADirectoryError, match="is a file: give a folder of its own"), holding(file):
        pass


def test_only_what_was_written_is_removed(tmp_path):
    folder = tmp_path / "state"
    with holding(folder):
        (folder / "0000.pt").touch()
    (folder / "mine").mkdir()
    (folder / "mine" / "0000.pt").touch()
    (tmp_path / "target.pt").touch()
    (folder / "0001.pt").symlink_to(tmp_path / "target.pt")
    remove_state(folder, ["*.pt"])
    assert (tmp_path / "target.pt").exists() and (folder / "mine" / "0000.pt").exists()
    assert not (folder / "0000.pt").exists() and not (folder / "0001.pt").is_symlink()


def test_the_last_thread_to_leave_lets_go(tmp_path):
    folder, inside, leave = tmp_path / "state", threading.Event(), threading.Event()

    def other():
        with holding(folder):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    with holding(folder):
        leave.set()
        thread.join()
        pid = os.fork()
        if not pid:
            try:
                with holding(folder):
                    os._exit(0)
            except RuntimeError:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
