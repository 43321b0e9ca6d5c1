"""Train a digit classifier and quantize it when training ends: ``python -m recipes.quickstart``."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import onnxruntime
from jsonargparse import auto_cli
from torch.utils.data import DataLoader

from lightning_calibtip import CalibTIP
from lightning_calibtip.report.figures import layer_error_figure, stage_figure
from lightning_calibtip.report.record import write_record
from lightning_calibtip.report.table import text_table
from recipes.output import set_up_logging

from .digits import DigitClassifier, digit_loaders


def accuracy_in_onnxruntime(path: Path, loader: DataLoader[Any]) -> float:
    """Top-1 accuracy of an exported file, which needs neither torch nor this package."""
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    correct = total = 0
    for images, labels in loader:
        (logits,) = session.run(None, {name: images.numpy()})
        correct += int((logits.argmax(1) == labels.numpy()).sum())
        total += len(labels)
    return correct / total


def main(epochs: int = 12, iterations: int = 300, seed: int = 0, output: Path = Path("runs/quickstart")) -> None:
    """Train a small residual network, quantize it to W4A4 and W2A4, run both in ONNX Runtime, print a table and save
    figures.

    Args:
        epochs: Epochs of training.
        iterations: Iterations of AdaQuant for each layer or block.
        seed: Random seed.
        output: Folder for checkpoints, records and figures.
    """
    set_up_logging(logging.ERROR)
    pl.seed_everything(seed, verbose=False)
    train, validation = digit_loaders(seed)
    callbacks = {
        f"W{weight_bits}A{activation_bits}": CalibTIP(
            pipeline="sequential",
            options={"adaquant": {"iterations": iterations}, "seed": seed},
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            calibration_samples=500,
            filename=f"w{weight_bits}a{activation_bits}",
            export="onnxruntime",
        )
        for weight_bits, activation_bits in ((4, 4), (2, 4))
    }
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks.values()),
        default_root_dir=output,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    print(f"Training a small residual network on handwritten digits for {epochs} epochs, then quantizing it ...")
    trainer.fit(DigitClassifier(), train, validation)

    records: dict[str, dict[str, Any]] = {}
    for label, callback in callbacks.items():
        folder = output if not records else output / label.lower()
        records[label] = callback.result.record("quickstart", "digits", "accuracy", seed)
        write_record(folder / "result.json", records[label])
        callback.result.save(folder / "quantized.ckpt")
        layer_error_figure(records[label]).savefig(folder / "layer_errors.png", dpi=150)
    stage_figure(records).savefig(output / "stages.png", dpi=150)

    first = next(iter(callbacks.values())).result
    first.module.print_summary()
    names = {"Calibration": "ranges only"}
    stages = [stage["name"] for stage in records["W4A4"]["stages"]]
    rows: list[list[object]] = [["float", *(record["float"] for record in records.values())]]
    for index, name in enumerate(stages):
        rows.append([names.get(name, f"+ {name}"), *(record["stages"][index]["metric"] for record in records.values())])
    files = [callback.result.exports[0].path for callback in callbacks.values()]
    rows.append(["in ONNX Runtime", *(accuracy_in_onnxruntime(file, validation) for file in files)])
    rows.append(["size / float size", *(record["size"]["ratio"] for record in records.values())])
    print(f"\nAccuracy on {len(validation.dataset)} held-out digits\n")  # type: ignore[arg-type]
    print(text_table(["stage", *records], rows))
    print(f"\nresult.json, quantized.ckpt and the figures are in {output} (those of W2A4 in {output / 'w2a4'});")
    print(f"{files[0]} and {files[1]} run wherever ONNX Runtime does.")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
