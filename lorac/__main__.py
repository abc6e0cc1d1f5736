"""``python -m lorac``: the command line."""

from lorac.cli import main

if __name__ == "__main__":
    main()
