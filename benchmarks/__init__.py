"""Measurements: each prints ratios against a reference from the same run, and its own command."""
