"""``python -m lightning_calibtip fit|validate|quantize --config ...``."""

import importlib.util
import sys

if __name__ == "__main__":
    if importlib.util.find_spec("jsonargparse") is None:
        sys.exit("The command line needs jsonargparse: pip install 'lightning-calibtip[cli]'.")
    from .cli import main

    main()
