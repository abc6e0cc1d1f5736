"""The ways of making one adapter from several, one file for those that are alike; a class is its registration."""
