import json
import os
import subprocess
import sys


def test_quickstart_prints_its_table_and_saves_figures(tmp_path):
    command = [
        sys.executable,
        "-m",
        "recipes.quickstart",
        "--epochs",
        "2",
        "--iterations",
        "5",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    for row in (
        "float",
        "ranges only",
        "+ BatchNormTuning",
        "+ AdaQuant",
        "+ BiasTuning",
        "7 quantized, 6 folded, 0 float",
    ):
        assert row in done.stdout
    for name in ("stages.png", "errors_W4A4.png", "errors_W2A4.png", "w4a4.ckpt", "w2a4.ckpt"):
        assert (tmp_path / name).stat().st_size > 1000
    record = json.loads((tmp_path / "result_W2A4.json").read_text())
    assert record["recipe"] == "quickstart" and 0 < record["size"]["ratio"] < 0.2
    assert done.stdout.count(f"{record['float']:.4g}") >= 2
