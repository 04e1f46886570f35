"""Volumes larger than memory: read block by block, written block by block."""
