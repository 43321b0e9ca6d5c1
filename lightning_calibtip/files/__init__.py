"""Files that survive what happens to runs: written whole or not at all, owned by one process at a time."""
