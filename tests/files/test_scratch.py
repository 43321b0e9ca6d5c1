import gc
import os

import pytest

from lightning_calibtip.files import scratch as module
from lightning_calibtip.files.owner import Owner
from lightning_calibtip.files.scratch import Scratch
from tests.processes import in_a_killed_process


def test_it_names_its_owner_and_goes_with_its_object(tmp_path):
    scratch = Scratch(tmp_path / "new")
    assert str(Owner.this()) in scratch.path.name
    del scratch
    gc.collect()
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.usefixtures("one_thread")
def test_what_a_killed_process_left_is_removed_and_what_is_in_use_stays(tmp_path):
    def work():
        scratch = Scratch(tmp_path)
        (scratch.path / "1.bin").write_bytes(b"gigabytes")
        os.kill(os.getpid(), 9)

    in_a_killed_process(work)
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "mine").mkdir()
    first = Scratch(tmp_path)
    second = Scratch(tmp_path)
    assert set(tmp_path.iterdir()) == {first.path, second.path, tmp_path / "mine"}


def test_a_folder_that_is_about_to_be_locked_stays(tmp_path, monkeypatch):
    young = tmp_path / "calibtip-activations-elsewhere-1-x"
    young.mkdir()
    Scratch(tmp_path)
    assert young.is_dir()
    monkeypatch.setattr(module, "_YOUNG", -1.0)
    Scratch(tmp_path)
    assert not young.is_dir()


def test_a_link_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_YOUNG", -1.0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (tmp_path / "calibtip-activations-x").symlink_to(tmp_path / "mine")
    Scratch(tmp_path)
    assert (tmp_path / "mine" / "file").exists()


def test_a_process_that_was_forked_off_does_not_take_it_away(tmp_path):
    scratch = Scratch(tmp_path)
    pid = os.fork()
    if not pid:
        scratch.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert scratch.path.is_dir()
