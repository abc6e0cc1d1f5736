"""Inputs with which a model is captured: made from its configuration, and the axes along which they may vary."""
