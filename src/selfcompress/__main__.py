"""`python -m selfcompress` is the command `selfcompress`."""

from .cli import main

if __name__ == "__main__":
    main()
