"""Kill a run at every file operation of every pipeline, start it again, and compare: ``python -m tests.files.kills``.

Each run is a process of its own. Where it is killed is counted in operations on files below its folder (opening to
write, renaming, removing, making folders), so that every run of this script does the same.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
from torch import nn

from lightning_calibtip import quantize
from lightning_calibtip.pipeline.presets import PIPELINES

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
_FOREIGN = "thesis.tex"


def run(pipeline: str, folder: Path) -> None:
    """Quantize a small network and write everything that a run writes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {
        "state_folder": folder / "state",
        "storage": {"activation_budget": "1kB", "scratch_folder": folder / "scratch"},
        "adaquant": {"iterations": 2},
        "preparation": {"iterations": 2},
        "bias_tuning": {"epochs": 1},
        "allocation": {"compression": 0.22, "candidates": [4, 8]},
        "calibration": {"search": "joint", "joint_evaluations": 4} if pipeline == "calibrate" else {},
    }
    scheme = {"weight_bits": 4, "activation_bits": 4}
    outcome = quantize(net, images.split(8), None, pipeline, options, trainer_options={"accelerator": "cpu"}, **scheme)
    outcome.save(folder / "quantized.ckpt", clean_up=False)
    outcome.write_report(folder, outcome.record("kills", "small", None, 0))
    outcome.clean_up()


def in_a_process(pipeline: str, folder: Path, kill_at: int | None = None) -> int | None:
    """Run in a forked process that kills itself at an operation on files; the number of operations, None if killed.

    Args:
        pipeline: Name of the pipeline.
        folder: Folder of the run.
        kill_at: Number of the operation before which the process ends, from 1 on; None to let it run.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        count, place = 0, os.fspath(folder)

        def hook(event: str, args: tuple) -> None:
            nonlocal count
            if event == "open":
                path, mode, flags = args
                changes = (isinstance(mode, str) and any(c in mode for c in "wxa+")) or bool(flags & _WRITING)
            else:
                path, changes = (args[0] if args else None), event in _CHANGES
            if changes and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(place):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(hook)
            run(pipeline, folder)
            os.write(writing, str(count).encode())
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        counted = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert os.WEXITSTATUS(status) == 0, f"{pipeline} failed"
    return int(counted)


def content(folder: Path) -> tuple[str, list[str]]:
    """Digest of the checkpoint, and all files of a folder."""
    checkpoint = torch.load(folder / "quantized.ckpt", weights_only=True)
    return checkpoint["calibtip"]["digest"], sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def kill_everywhere(pipeline: str, every: int = 1, first: int = 1) -> int:
    """Kill the pipeline at every N-th operation and start it again; the number of kills.

    Args:
        pipeline: Name of the pipeline.
        every: N.
        first: Operation of the first kill.

    Raises:
        AssertionError: If a run that goes on ends differently from one that was not killed, leaves something, or
            touches a file that is not its own.
    """
    with tempfile.TemporaryDirectory() as parent:
        whole = Path(parent) / "whole"
        whole.mkdir()
        (whole / _FOREIGN).write_text("mine")
        total = in_a_process(pipeline, whole)
        assert total is not None
        wanted = content(whole)
        kills = range(first, total + 1, every)
        for kill_at in kills:
            folder = Path(parent) / str(kill_at)
            folder.mkdir()
            (folder / _FOREIGN).write_text("mine")
            assert in_a_process(pipeline, folder, kill_at) is None, f"{pipeline}: operation {kill_at} was not reached"
            in_a_process(pipeline, folder)
            found = content(folder)
            assert found == wanted, f"{pipeline}, killed at operation {kill_at}: {found} instead of {wanted}"
            assert (folder / _FOREIGN).read_text() == "mine"
        return len(kills)


def main() -> None:
    """Kill all pipelines everywhere, or at every N-th operation."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--pipelines", nargs="*", default=PIPELINES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    total = 0
    for pipeline in arguments.pipelines:
        kills = kill_everywhere(pipeline, arguments.every)
        total += kills
        print(f"{pipeline}: {kills} kills, all runs ended alike", flush=True)
    print(f"{total} kills")


if __name__ == "__main__":
    main()
