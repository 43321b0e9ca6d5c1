"""``python -m lightning_calibtip fit|validate|quantize --config ...``."""

from .cli import main

if __name__ == "__main__":
    main()
