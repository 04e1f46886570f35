"""Plain implementations of published methods, to test and time against."""
