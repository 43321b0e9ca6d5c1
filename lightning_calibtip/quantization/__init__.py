"""Numbers: formats of tensors, the affine codec, ranges, observers, quantizers and packing; nothing of models."""

# Register what is built in, whichever module of this room is imported first.
from . import affine_quantizer as affine_quantizer
from . import observers as observers
from . import sparq as sparq
