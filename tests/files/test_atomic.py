import os
import stat

import pytest

from lightning_calibtip.files.atomic import remove_unfinished, replacing, write_atomically
from lightning_calibtip.files.owner import Owner
from tests.processes import pid_of_a_process_that_has_ended


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_error_on_the_way_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    write_atomically(path, b"old")

    def fails(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fails)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["result.json"]


def test_links_are_replaced_not_followed(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    link = tmp_path / "result.json"
    link.symlink_to(tmp_path / "mine.txt")
    write_atomically(link, b"new")
    assert not link.is_symlink() and link.read_bytes() == b"new"
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_what_is_unfinished_cannot_be_foreseen(tmp_path, monkeypatch):
    # Even if it could: a link that lies there is not followed.
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 16)
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / f".a.{Owner.this()}.{'0' * 16}.unfinished").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "mine.txt").read_text() == "mine"
    monkeypatch.undo()
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        assert first != second


def test_files_have_the_permissions_that_others_have(tmp_path):
    (tmp_path / "plain").touch()
    write_atomically(tmp_path / "new", b"")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "new").chmod(0o640)
    write_atomically(tmp_path / "new", b"again")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_leftovers_of_killed_processes_of_this_machine_are_removed(tmp_path):
    gone, here, host = pid_of_a_process_that_has_ended(), os.getpid(), Owner.this().host
    kept = [f".a.json.{host}-{here}.00.unfinished", f".a.json.elsewhere-{gone}.00.unfinished", ".a.json.unfinished"]
    for name in [*kept, f".a.json.{host}-{gone}.00.unfinished", f".b.json.{host}-{gone}.00.unfinished"]:
        (tmp_path / name).touch()
    write_atomically(tmp_path / "a.json", b"new")
    assert names(tmp_path) == sorted([*kept, "a.json", f".b.json.{host}-{gone}.00.unfinished"])
    remove_unfinished(tmp_path)
    assert names(tmp_path) == sorted([*kept, "a.json"])


def test_a_folder_of_that_name_is_an_error(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder: give the name of a file"):
        write_atomically(tmp_path, b"")


def test_long_names_fit(tmp_path):
    write_atomically(tmp_path / ("n" * 250), b"x")
    assert names(tmp_path) == ["n" * 250]


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is a device or a pipe, which cannot be replaced"):
        write_atomically(tmp_path / "pipe", b"")
    assert (tmp_path / "pipe").is_fifo()


def test_long_names_of_long_letters_fit(tmp_path):
    write_atomically(tmp_path / ("\u4e2d" * 80), b"x")
    assert names(tmp_path) == ["\u4e2d" * 80]
