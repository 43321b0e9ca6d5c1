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
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for row in (
        "float",
        "ranges only",
        "+ BatchNormTuning",
        "+ AdaQuant",
        "+ BiasTuning",
        "10 quantized, 6 folded, 0 float",
        "in ONNX Runtime",
    ):
        assert row in done.stdout
    files = ("stages.png", "layer_errors.png", "quantized.ckpt", "w2a4/layer_errors.png", "w2a4/quantized.ckpt")
    for name in (*files, "w4a4.onnx", "w2a4.onnx"):
        assert (tmp_path / name).stat().st_size > 1000
    records = [json.loads((tmp_path / name).read_text()) for name in ("result.json", "w2a4/result.json")]
    assert [record["layers"][1]["weight_bits"] for record in records] == [4, 2]
    assert all(record["recipe"] == "quickstart" and 0 < record["size"]["ratio"] < 0.2 for record in records)
    assert done.stdout.count(f"{records[0]['float']:.4g}") >= 2
