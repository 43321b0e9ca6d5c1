"""Flip bits of a checkpoint and cut it short: ``python -m tests.files.flips`` does so to 300 and 20 copies."""

import logging
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_calibtip import QuantizationModule, quantize


def try_flips(
    path: Path, make: Callable[[], nn.Module], wanted: Tensor, inputs: Tensor, folder: Path, flips: int, cuts: int
) -> Counter:
    """Load damaged copies of a checkpoint; how often they were refused by name, loaded alike, or anything worse.

    Args:
        path: A quantized checkpoint.
        make: Makes its float model.
        wanted: What the quantized model gives for ``inputs``.
        inputs: A batch.
        folder: Folder for the copies.
        flips: Number of copies of which one bit is flipped.
        cuts: Number of copies that are cut short.
    """
    content, draw = path.read_bytes(), random.Random(0)
    outcomes: Counter = Counter()
    for number in range(flips + cuts):
        damaged = bytearray(content)
        if number < flips:
            damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        else:
            del damaged[draw.randrange(len(content)) :]
        copy = folder / "copy.ckpt"
        copy.write_bytes(damaged)
        try:
            loaded = QuantizationModule.load_from_checkpoint(copy, model=make())
            with torch.no_grad():
                outcomes["alike" if torch.equal(loaded(inputs), wanted) else "changed"] += 1
        except ValueError:
            outcomes["refused"] += 1
        except Exception as error:
            print(f"{type(error).__name__}: {str(error)[:300]}")
            outcomes["unnamed"] += 1
    return outcomes


def main() -> None:
    """Damage 320 copies of a small network's checkpoint."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()

    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    run = quantize(make(), images.split(8), None, "calibrate", trainer_options={"accelerator": "cpu"}, weight_bits=4)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "quantized.ckpt"
        run.save(path)
        outcomes = try_flips(path, make, run.module(images), images, Path(folder), 300, 20)
    print(dict(outcomes))
    assert not outcomes["changed"] and not outcomes["unnamed"]


if __name__ == "__main__":
    main()
