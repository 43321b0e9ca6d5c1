"""One thin Lightning callback a stage."""
