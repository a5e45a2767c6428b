"""``python -m phigrow.cli``: what a launcher of several ranks starts."""

from phigrow.cli import main

if __name__ == "__main__":
    main()
