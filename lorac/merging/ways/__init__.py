"""The ways of making one adapter from several, one file each; the existence of a file is its registration."""
