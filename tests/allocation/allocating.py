"""Short ways to allocate bits, to look at the outcome, and to begin anew."""

from lightning_calibtip.allocation.allocate import allocate
from lightning_calibtip.allocation.options import AllocationOptions
from lightning_calibtip.quantization.spec import BitWidths as B

CANDIDATES = [B(2, 8), B(8, 8)]
SMALL = {"compression": 0.16}


def allocated(network, calibration, candidates, evaluate=None, **options):
    return allocate(network, calibration, AllocationOptions(candidates=candidates, **options), evaluate=evaluate)


def bit_widths(network):
    return {name: layer.config.bit_widths for name, layer in network.layers.items()}


def start_again(network, initial):
    for name, layer in network.layers.items():
        layer.variants.clear()
        layer.restore(initial[name])
