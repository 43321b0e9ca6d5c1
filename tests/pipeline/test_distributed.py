"""Two processes on one machine, by Lightning's launcher and by torchrun."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_calibtip import CalibTIP, QuantizationModule
from lightning_calibtip.callbacks.stage import check_strategy
from lightning_calibtip.ranks import deal_among
from tests.pipeline import distributed_runs

SCRIPT = "tests.pipeline.distributed_runs"


def run(folder, what, devices, launcher=(), check=True):
    """Run the script in new processes; the output of all ranks."""
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "WORLD_SIZE")}
    command = [sys.executable, *launcher, "-m", SCRIPT, what, str(folder), str(devices)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def load(path):
    return QuantizationModule.load_from_checkpoint(path, model=distributed_runs.model())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of all pipelines, of one process and of two."""
    folders = {devices: tmp_path_factory.mktemp(f"of_{devices}") for devices in (1, 2)}
    run(folders[2], "pipelines", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    distributed_runs.run_pipelines(folders[1], 1)
    torch.set_num_threads(threads)
    return {
        (pipeline, devices): torch.load(folder / f"{pipeline}.ckpt", weights_only=True)
        for pipeline in distributed_runs.PIPELINES
        for devices, folder in folders.items()
    }, folders


@pytest.mark.parametrize("pipeline", ["calibrate", "light", "advanced"])
def test_two_processes_come_to_what_one_comes_to_bit_for_bit(checkpoints, pipeline):
    one, two = (checkpoints[0][pipeline, devices]["calibtip"] for devices in (1, 2))
    assert one["config"]["plan"] == two["config"]["plan"]
    assert one["digest"] == two["digest"]


def test_units_in_sequence_are_reconstructed_by_both_together(checkpoints):
    one, two = (checkpoints[0]["sequential", devices]["calibtip"]["config"]["plan"] for devices in (1, 2))
    assert one.keys() == two.keys()
    images = torch.cat([batch[0] for batch in distributed_runs.data()])
    with torch.no_grad():
        wanted = distributed_runs.model()(images)
        errors = {
            devices: float((load(folder / "sequential.ckpt")(images) - wanted).norm() / wanted.norm())
            for devices, folder in checkpoints[1].items()
        }
    # Sums over halves of a mini-batch round otherwise, and a weight that is rounded otherwise leads elsewhere: the
    # models differ, and are about as close to the float one.
    assert errors[2] < 1.5 * errors[1] + 1e-3


def test_one_process_writes(checkpoints):
    for pipeline in distributed_runs.PIPELINES:
        names = [sorted(path.name for path in (folder / pipeline).iterdir()) for folder in checkpoints[1].values()]
        assert names[0] == names[1] and "report.html" in names[0]


def test_torchrun_needs_no_options(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    run(tmp_path, "resume", 1, launcher)
    assert (tmp_path / "resumed.ckpt").exists() and not (tmp_path / "state").exists()


def test_a_training_of_two_processes_ends_quantized(tmp_path):
    done = run(tmp_path, "train", 2)
    for rank in (0, 1):
        assert (
            f"rank {rank}: ['Calibration', 'Equalization', 'BatchNormTuning', 'AdaQuant', 'BiasTuning']" in done.stdout
        )
    assert (tmp_path / "quantized.ckpt").exists() and (tmp_path / "quantized_report" / "report.html").exists()


def test_stages_of_a_trainer_see_the_samples_of_all_ranks(tmp_path):
    one = re.search(r"rank 0: (.* of 48 samples)", run(tmp_path, "stages", 1).stdout)
    done = run(tmp_path, "stages", 2)
    assert one and all(f"rank {rank}: {one[1]}" in done.stdout for rank in (0, 1))
    assert (tmp_path / "stages.ckpt").exists()


def test_a_rank_that_dies_ends_the_run_and_one_process_goes_on(tmp_path):
    done = run(tmp_path, "die", 2, check=False)
    assert done.returncode != 0 and not (tmp_path / "resumed.ckpt").exists()
    assert len(list((tmp_path / "state").glob("*.pt"))) == 2
    run(tmp_path, "resume", 1)
    assert (tmp_path / "resumed.ckpt").exists() and not (tmp_path / "state").exists()


def test_strategies_that_split_the_model_are_refused():
    trainer = SimpleNamespace(strategy=pl.strategies.FSDPStrategy())
    with pytest.raises(
        MisconfigurationException, match=r"CalibTIP needs the whole model in each process, got strategy F"
    ):
        check_strategy("CalibTIP", trainer)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_processes_whose_results_would_be_lost_are_refused(strategy):
    callback = CalibTIP("calibrate", calibration_samples=8)
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, callbacks=[callback])
    message = 'CalibTIP cannot run in processes that are spawned or forked, .*: use strategy="ddp" in a script'
    with pytest.raises(MisconfigurationException, match=message):
        callback.setup(trainer, distributed_runs.model(), "fit")


def test_tasks_are_dealt_so_that_all_end_about_together():
    owners = deal_among([5.0, 1.0, 4.0, 2.0, 2.0], 2)
    assert sorted(sum(c for c, o in zip([5, 1, 4, 2, 2], owners, strict=True) if o == rank) for rank in (0, 1)) == [
        7,
        7,
    ]
