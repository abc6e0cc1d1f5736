"""The ways of merging, one file for related ways; a way is registered by its class."""
