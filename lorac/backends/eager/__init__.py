"""Eager PyTorch: the host module itself, each site's call computed from the site's slots."""
