"""Post-training quantization for PyTorch Lightning by CalibTIP: calibrate, reconstruct, allocate bits, re-tune."""

from .callbacks.adaquant import AdaQuant
from .callbacks.batch_norm_tuning import BatchNormTuning
from .callbacks.bias_tuning import BiasTuning
from .callbacks.bit_allocation import BitAllocation
from .callbacks.calibration import Calibration
from .callbacks.calibtip import CalibTIP
from .callbacks.stage import Stage
from .module import QuantizationModule
from .pipeline import make_stages, quantize, run_stages
from .quantization.kinds import register_layer

__version__ = "0.1.0"

__all__ = [
    "AdaQuant",
    "BatchNormTuning",
    "BiasTuning",
    "BitAllocation",
    "CalibTIP",
    "Calibration",
    "QuantizationModule",
    "Stage",
    "make_stages",
    "quantize",
    "register_layer",
    "run_stages",
]
