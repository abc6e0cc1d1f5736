"""Adapter files of image and video models: the code that diffusers, sd-scripts and LyCORIS files share.

Every file is a safetensors file of tensors ``<component><module>.<leaf>``; formats spell these three parts differently.
``spellings`` and ``original_names`` are tables of the names; ``layouts`` has the layout of a module's tensors, one
class per method. Modules are the model's own, so a file cannot be read without the model.
"""
