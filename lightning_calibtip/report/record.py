"""The record of a run, ``result.json``: metrics of each stage, size, and what became of each layer."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..calibration.whole_file import write_whole
from ..quantization.network import QuantizedNetwork
from .size import model_size
from .table import text_table

RECORD_VERSION = 1


@dataclass(frozen=True)
class StageRecord:
    """A stage of a run: how long it took, the metric after it (None where nothing was evaluated), its figures."""

    name: str
    seconds: float
    metric: float | None
    figures: dict[str, float] = field(default_factory=dict)


def peak_rss_bytes() -> int | None:
    """Greatest resident memory of this process so far; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def layer_records(network: QuantizedNetwork) -> list[dict[str, Any]]:
    """A line for each quantizable layer; ``error_before`` and ``error_after`` are relative to the output's mean square,
    and None
    where nothing was reconstructed.
    """
    records = []
    for line in network.summary():
        if line.kind == "folded" or line.name in network.left:
            continue
        layer = network.layers.get(line.name)
        before, after = (layer.errors if layer is not None else None) or (None, None)
        records.append(
            {
                "name": line.name,
                "weight_bits": line.weight_bits,
                "activation_bits": line.activation_bits,
                "parameters": line.parameters,
                "error_before": before,
                "error_after": after,
            }
        )
    return records


def run_record(
    network: QuantizedNetwork,
    recipe: str,
    model: str,
    metric: str,
    seed: int,
    calibration_samples: int,
    float_metric: float | None,
    stages: Sequence[StageRecord],
) -> dict[str, Any]:
    """All figures of a run as plain values; metrics are fractions (0 to 1)."""
    size = model_size(network)
    return {
        "version": RECORD_VERSION,
        "recipe": recipe,
        "model": model,
        "metric": metric,
        "seed": seed,
        "calibration_samples": calibration_samples,
        "float": float_metric,
        "calibrated": next((stage.metric for stage in stages if stage.name == "Calibration"), None),
        "quantized": stages[-1].metric if stages else None,
        "stages": [asdict(stage) for stage in stages],
        "size": {"float_bytes": size.float_bytes, "quantized_bytes": size.quantized_bytes, "ratio": size.ratio},
        "layers": layer_records(network),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON: whole or not at all."""
    write_whole(path, (json.dumps(_valid(record), indent=2, allow_nan=False) + "\n").encode())


def _valid(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _valid(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def record_table(record: Mapping[str, Any]) -> str:
    """The stages of a record as a table; of AdaQuant also the share of its seconds that is not spent in the optimiser's
    steps."""
    rows: list[list[object]] = [["float", None, None, record["float"]]]
    for stage in record["stages"]:
        steps, seconds = stage["figures"].get("step_seconds"), stage["seconds"]
        outside = None if steps is None or not seconds else f"{1 - steps / seconds:.1%}"
        rows.append([stage["name"], seconds, outside, stage["metric"]])
    return text_table(["stage", "seconds", "outside steps", record["metric"]], rows)
