"""The console script ``jiio``."""
