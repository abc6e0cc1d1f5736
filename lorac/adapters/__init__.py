"""Steps that make an adapter ready to run, or convert one adapter into another."""
