"""Post-training quantization for PyTorch Lightning by CalibTIP: calibrate, reconstruct, allocate bits, re-tune."""

from .allocation.costs import register_cost
from .allocation.options import AllocationOptions
from .calibration.divergences import Divergence, register_divergence
from .calibration.options import StorageOptions
from .calibration.utility import Utility
from .callbacks.adaquant import AdaQuant
from .callbacks.batch_norm_tuning import BatchNormTuning
from .callbacks.bias_tuning import BiasTuning
from .callbacks.bit_allocation import BitAllocation
from .callbacks.calibration import Calibration
from .callbacks.decision_costs import DecisionCosts
from .callbacks.diagnosis import Diagnosis
from .callbacks.equalization import Equalization
from .callbacks.stage import Stage, StageResult
from .diagnosis.diagnose import DiagnosisResult
from .diagnosis.options import DiagnosisOptions
from .export.onnx_file import export_onnx
from .export.packed import export_packed, load_packed
from .export.report import ExportReport
from .module import QuantizationModule
from .network.layer_types import Operand, register_layer
from .network.scheme import QuantizationScheme
from .network.targets import Target, register_target
from .pipeline.callback import CalibTIP
from .pipeline.options import PipelineOptions
from .pipeline.presets import make_stages
from .pipeline.runner import quantize, run_stages
from .quantization.observers import register_observer
from .quantization.quantizers import register_quantizer
from .quantization.ranges import RangeOptions, register_range_method
from .quantization.spec import LayerConfig, TensorSpec
from .reconstruction.equalizable import EqualizationOptions
from .reconstruction.objectives import register_objective
from .reconstruction.options import AdaQuantOptions
from .reconstruction.rounding import register_rounding
from .tuning.batch_norm import BatchNormTuningOptions
from .tuning.bias import BiasTuningOptions

__version__ = "0.1.0"

__all__ = [
    "AdaQuant",
    "AdaQuantOptions",
    "AllocationOptions",
    "BatchNormTuning",
    "BatchNormTuningOptions",
    "BiasTuning",
    "BiasTuningOptions",
    "BitAllocation",
    "CalibTIP",
    "Calibration",
    "DecisionCosts",
    "Diagnosis",
    "DiagnosisOptions",
    "DiagnosisResult",
    "Divergence",
    "Equalization",
    "EqualizationOptions",
    "ExportReport",
    "LayerConfig",
    "Operand",
    "PipelineOptions",
    "QuantizationModule",
    "QuantizationScheme",
    "RangeOptions",
    "Stage",
    "StageResult",
    "StorageOptions",
    "Target",
    "TensorSpec",
    "Utility",
    "export_onnx",
    "export_packed",
    "load_packed",
    "make_stages",
    "quantize",
    "register_cost",
    "register_divergence",
    "register_layer",
    "register_objective",
    "register_observer",
    "register_quantizer",
    "register_range_method",
    "register_rounding",
    "register_target",
    "run_stages",
]
