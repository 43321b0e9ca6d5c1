"""AdaQuant, per layer and per block, parallel and sequential."""
