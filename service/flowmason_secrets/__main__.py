"""`python -m flowmason_secrets` is `flowmason-secrets`."""

from .cli import main

# Processes that `verify` starts import this module again, under another name.
if __name__ == "__main__":
    main()
