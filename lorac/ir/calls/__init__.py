"""Calls of a program: its inputs, their sizes and rows, and the structure of its outputs."""
