"""One file a command of the `phaseline` command line."""
