"""Functions that prepare an adapter to run, or convert one adapter into another."""
