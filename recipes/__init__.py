"""Runnable, configurable reproductions on top of the package."""
