"""Contracts, geometry, tiles, transform sets and the engines that run exported graphs in this process."""
