"""Run the `phigrow` command as ``python -m phigrow.cli``; a launcher of several ranks starts this module."""

from phigrow.cli import main

if __name__ == "__main__":
    main()
