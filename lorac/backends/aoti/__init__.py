"""AOTInductor: a program that torch compiles to a shared library, with slots as inputs of every call."""
