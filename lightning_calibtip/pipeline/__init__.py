"""From options to a finished run: presets, the runner, its outcome, and the CalibTIP callback."""
