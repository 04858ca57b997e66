"""`python -m edgevlm`: the command line."""

from edgevlm.cli.main import main

if __name__ == "__main__":
    main()
