"""The joint mode: what equilibrium layers do while an optimisation runs."""
