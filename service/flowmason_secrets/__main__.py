"""`python -m flowmason_secrets` is `flowmason-secrets`."""

from .cli import main

main()
