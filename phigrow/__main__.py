"""Run the `phigrow` command as ``python -m phigrow``."""

from phigrow.cli import main

if __name__ == "__main__":
    main()
