"""``python -m sparsifiner``: the same as the command ``sparsifiner``."""

from .cli import main

if __name__ == "__main__":
    main()
