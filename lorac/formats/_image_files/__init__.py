"""Adapter files of image and video models: the part that diffusers, sd-scripts and LyCORIS have in common.

Every file is a safetensors file of tensors ``<component><module>.<leaf>``, where formats differ in how they spell the
three. ``spellings`` and ``original_names`` are tables of the names, ``layouts`` of the tensors of a module, one class
for each method. Modules are those of the model itself, so that a file means nothing without it.
"""
