"""`python -m app.cli`, where the command `sluice` is not on the path."""

from app.cli import main

if __name__ == "__main__":
    main()
