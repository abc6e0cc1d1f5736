"""Where the models of the zoo come from, a file per library; each lists its own by ``entries()``."""
