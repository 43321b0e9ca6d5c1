"""What every recipe says while it runs, and writes into its output folder."""

import logging
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_calibtip import PipelineOptions
from lightning_calibtip.pipeline.run import QuantizationRun
from lightning_calibtip.report.record import record_table


def set_up_logging(level: int | str = logging.INFO) -> None:
    """Print what the package says from ``level`` on; of the many small Trainers of a run, only warnings."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lightning_calibtip").setLevel(level)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)..*deprecated.*")


def write_run(run: QuantizationRun, record: dict[str, Any], output: Path, logger: Any) -> None:
    """Write the checkpoint and the report of a run, log what belongs to the whole of it, and print its tables.

    Args:
        run: Outcome of the pipeline.
        record: Figures of the run, for ``result.json``.
        output: Folder for the results.
        logger: Logger from ``make_logger``.
    """
    run.save(output / "quantized.ckpt", clean_up=False)
    run.write_report(output, record)
    run.log([logger] if logger else [], output / "quantized.ckpt")
    run.clean_up()
    if not run.writes:
        return
    run.module.print_summary()
    print()
    print(record_table(record))
    for report in run.exports:
        print(f"\n{report}")
    size = record["size"]
    print(
        f"\nsize: {size['float_bytes']:,} bytes float, {size['quantized_bytes']:,} quantized "
        f"(ratio {size['ratio']:.4f}); written to {output}"
    )


def progress_options() -> dict[str, Any]:
    """Trainer options: progress bars on a terminal, lines in a file."""
    return {"enable_progress_bar": sys.stdout.isatty()}


def with_state_folder(options: PipelineOptions, output: Path) -> PipelineOptions:
    """Options with a folder below ``output`` for what a run has finished until it is complete, unless they name one."""
    return replace(options, state_folder=options.state_folder or output / "unfinished")


def run_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run by name, for the report and for loggers: a recipe's arguments, those of the scheme and of the
    options in the place of both."""
    others = {name: value for name, value in arguments.items() if name not in ("scheme", "options")}
    scheme, options = arguments["scheme"], arguments["options"]
    return {**others, **scheme.to_dict(), **options.to_dict(), "seed": options.seed or 0}


def make_logger(kind: str, output: Path, project: str) -> Any:
    """Lightning logger ``"wandb"`` or ``"csv"`` that writes below ``output``, or False for ``"none"``.

    Raises:
        ValueError: If ``kind`` is another word.
    """
    if kind == "none":
        return False
    output.mkdir(parents=True, exist_ok=True)
    if kind == "csv":
        from lightning.pytorch.loggers import CSVLogger

        return CSVLogger(output, name="", version="log")
    if kind == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        return WandbLogger(project=project, save_dir=output)
    raise ValueError(f"logger must be wandb, csv or none, got {kind!r}.")
