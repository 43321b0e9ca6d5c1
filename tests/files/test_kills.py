import pytest

from tests.files.kills import kill_everywhere


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_was_killed_anywhere_ends_like_one_that_was_not():
    # All operations of all pipelines: python -m tests.files.kills
    assert kill_everywhere("sequential", every=80, first=40) >= 4
