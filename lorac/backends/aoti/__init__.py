"""AOTInductor: a program compiled to a shared library by torch, whose slots are inputs; a call gives other tensors."""
