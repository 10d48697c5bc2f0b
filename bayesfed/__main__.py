"""``python -m bayesfed``: the same as the command ``bayesfed``."""

from bayesfed.cli import main

if __name__ == "__main__":
    main()
