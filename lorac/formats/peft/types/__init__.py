"""PEFT types, one file for those of one form; every concrete ``PeftType`` in a module here is registered."""
