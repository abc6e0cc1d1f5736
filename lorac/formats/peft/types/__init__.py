"""PEFT types, one file each; every concrete ``PeftType`` in a module here is registered."""
