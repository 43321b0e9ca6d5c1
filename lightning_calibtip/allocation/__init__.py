"""Sensitivity measurement and the integer program."""
