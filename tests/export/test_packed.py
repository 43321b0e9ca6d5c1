import json
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_calibtip import QuantizationModule, export_packed, load_packed
from lightning_calibtip.report.size import model_size
from tests.conftest import TinyClassifier
from tests.export.exporting import Residual, quantized


@pytest.fixture
def images():
    return torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [
    {"weight_bits": 4}, {"weight_bits": 3, "target": None}, {"weight_bits": 2, "target": None, "per_token": True},
    {"weight_bits": 4, "activation_bits": None, "group_size": 32, "target": "weights"},
    {"weight_bits": None, "target": None}, {"overrides": {"conv1": None, "conv2": (5, 7)}},
])  # fmt: skip
def test_a_packed_file_computes_the_same_bit_for_bit(images, options, tmp_path):
    torch.manual_seed(0)
    module = quantized(Residual(), images, **options)
    path = export_packed(module, tmp_path / "net.safetensors")
    loaded = load_packed(path, Residual())
    assert torch.equal(loaded(images), module(images))
    assert loaded.network.plan == module.network.plan and loaded.hparams == module.hparams


def test_sequential_and_mixed_bits_too(images, tmp_path):
    torch.manual_seed(0)
    options = {"adaquant": {"iterations": 5, "batch_size": 8}, "preparation": {"iterations": 5, "batch_size": 8},
               "allocation": {"compression": 0.24}}  # fmt: skip
    module = quantized(Residual(), images, pipeline="mixed", options=options)
    loaded = load_packed(export_packed(module, tmp_path / "net.safetensors"), Residual())
    assert torch.equal(loaded(images), module(images))


def test_tied_weights_and_a_lightning_module(tmp_path):
    module = QuantizationModule(TinyClassifier())
    with pytest.raises(RuntimeError, match="run Calibration first"):
        export_packed(module, tmp_path / "net.safetensors")
    images = torch.randn(8, 1, 6, 6)
    module = quantized(TinyClassifier(), images, weight_bits=4)
    loaded = load_packed(export_packed(module, tmp_path / "net.safetensors"), TinyClassifier())
    assert isinstance(loaded.model, TinyClassifier) and torch.equal(loaded(images), module(images))


def test_the_file_is_as_large_as_the_bit_widths_say(tmp_path):
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(128, 128), nn.ReLU())))
    module = quantized(model, torch.randn(16, 128), weight_bits=3, edge_bits=None)
    size = export_packed(module, tmp_path / "net.safetensors").stat().st_size
    claimed = model_size(module.network).quantized_bytes
    # What is more is a header that does not grow with the layers' width.
    assert claimed <= size < 1.02 * claimed + 1000
    tensors = load_file(tmp_path / "net.safetensors")
    assert len(tensors["integers"]) == 8 * 128 * 128 * 3 // 8


def test_damaged_and_foreign_files_are_refused(images, tmp_path):
    module = quantized(Residual(), images)
    path = export_packed(module, tmp_path / "net.safetensors")
    content = path.read_bytes()
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"broken.safetensors is damaged or not complete .*: take another copy"):
        load_packed(broken, Residual())
    for place in (-1, -2000, len(content) // 2):
        changed = bytearray(content)
        changed[place] ^= 1
        broken.write_bytes(changed)
        with pytest.raises(ValueError, match="damaged"):
            load_packed(broken, Residual())
    save_file({"weight": torch.ones(2)}, broken)
    with pytest.raises(ValueError, match="was not written by export_packed"):
        load_packed(broken, Residual())
    with pytest.raises(FileNotFoundError, match="no_such"):
        load_packed(tmp_path / "no_such", Residual())
    with pytest.raises(ValueError, match="of another model"):
        load_packed(path, nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("change", [
    lambda index: index["config"]["scheme"].update(colour="red"), lambda index: index.pop("state"),
    lambda index: index["state"][0].__setitem__(1, "float33"), lambda index: index["state"][0].__setitem__(2, [999]),
])  # fmt: skip
def test_a_changed_index_is_refused(images, change, tmp_path):
    import base64

    from safetensors import safe_open

    path = export_packed(quantized(Residual(), images), tmp_path / "net.safetensors")
    with safe_open(str(path), framework="pt") as file:
        index = json.loads(zlib.decompress(base64.b85decode(file.metadata()["calibtip"])))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(index)
    changed = base64.b85encode(zlib.compress(json.dumps(index).encode())).decode()
    save_file(tensors, path, metadata={"calibtip": changed})
    with pytest.raises(ValueError, match="is damaged or was changed"):
        load_packed(path, Residual())


def test_a_later_version_is_refused(images, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_calibtip.export.packed.PACKED_VERSION", 2)
    path = export_packed(quantized(Residual(), images), tmp_path / "net.safetensors")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has version 2, this release reads version 1"):
        load_packed(path, Residual())


def test_the_metadata_are_the_plan(images, tmp_path):
    import base64

    from safetensors import safe_open

    module = quantized(Residual(), images)
    path = export_packed(module, tmp_path / "net.safetensors")
    with safe_open(str(path), framework="pt") as file:
        index = json.loads(zlib.decompress(base64.b85decode(file.metadata()["calibtip"])))
    assert index["config"]["plan"] == json.loads(json.dumps(module.network.plan.to_dict()))


def test_an_older_file_is_kept_until_the_new_one_is_complete(images, tmp_path, monkeypatch):
    module = quantized(Residual(), images)
    path = export_packed(module, tmp_path / "net.safetensors")
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError("the disk is full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="full"):
        export_packed(module, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
