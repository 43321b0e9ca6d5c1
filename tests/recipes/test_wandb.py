"""What a recipe leaves in the file of an offline Weights & Biases run."""

import json
import struct

import wandb
from wandb.proto import wandb_internal_pb2

from recipes.resnet_cifar10.__main__ import main

_BLOCK, _HEADER = 32768, 7


def records(path):
    """The protocol buffers of a ``.wandb`` file, which is a LevelDB log with a header of seven bytes."""
    content, place, part = path.read_bytes(), _HEADER, b""
    while place + _HEADER <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + _HEADER])
        part += content[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        # Whole, or the last piece of one.
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def test_an_offline_run_has_config_metrics_tables_pictures_and_the_checkpoint(tiny_cifar, cifar_checkpoint, tmp_path):
    main(
        cifar_checkpoint,
        data=str(tiny_cifar),
        pipeline="advanced",
        calibration_samples=32,
        options={
            "adaquant": {"iterations": 2},
            "allocation": {"compression": [0.15, 0.2], "candidates": [2, 4, 8], "checks": 1},
            "bias_tuning": {"epochs": 1},
        },
        accelerator="cpu",
        logger="wandb",
        output=tmp_path / "out",
    )
    wandb.finish()
    # After ``finish`` W&B's service still has the last block of the file to write; ``teardown`` waits until it has.
    wandb.teardown()
    (folder,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    history, config, artifacts = {}, {}, []
    for record in records(file):
        for item in [*record.history.item, *record.summary.update]:
            history["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        for item in record.config.update:
            config["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        if record.HasField("request") and record.request.HasField("log_artifact"):
            artifacts.append(record.request.log_artifact.artifact)
        if record.HasField("artifact"):
            artifacts.append(record.artifact)
    assert config["pipeline"] == "advanced" and config["seed"] == 0
    assert {
        "float/top1",
        "Calibration/top1",
        "AdaQuant/top1",
        "BitAllocation/top1",
        "BiasTuning/top1",
    } <= history.keys()
    stages = ("Calibration", "AdaQuant", "BitAllocation", "BatchNormTuning", "BiasTuning")
    assert all(history[f"{stage}/seconds"] >= 0 for stage in stages)
    pictures = {"AdaQuant/reconstruction_w4a4", "run/layers", "run/histograms"}
    pictures |= {f"BitAllocation/{name}" for name in ("allocation", "sensitivity", "trade_off")}
    for key in pictures:
        assert history[f"{key}/_type"] == "images/separated" and history[f"{key}_table/_type"] == "table-file"
        assert (folder / "files" / history[f"{key}_table/path"]).is_file()
    layers = json.loads((folder / "files" / history["run/layers_table/path"]).read_text())
    assert layers["columns"][:4] == ["layer", "type", "is", "weight bits"]
    # 19 convolutions, as many BatchNorms, the linear layer; for the engine 9 additions and the pool besides.
    assert len(layers["data"]) == 19 + 19 + 1 + 9 + 1
    assert any(artifact.type == "model" and artifact.name.startswith("quantized-") for artifact in artifacts)
