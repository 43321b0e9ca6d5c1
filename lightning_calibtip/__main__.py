"""``python -m lightning_calibtip fit|validate|test|predict|quantize|diagnose|export --config ...``."""

import importlib.util
import sys

from lightning_calibtip.extras import needs_extra


def main() -> None:
    """Run the command line, or say what it lacks."""
    if importlib.util.find_spec("jsonargparse") is None:
        sys.exit(f"{needs_extra('The command line', 'jsonargparse', 'cli')}.")
    from lightning_calibtip.cli import main as run

    run()


if __name__ == "__main__":
    main()
