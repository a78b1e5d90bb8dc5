"""FlowMason Secrets: encrypted secrets with an event-sourced audit trail."""

try:
    import cryptography  # noqa: F401
except ImportError as missing:
    raise ImportError(
        "FlowMason Secrets needs the package 'cryptography' and its companions. "
        "Install them with: pip install 'flowmason[secrets]'"
    ) from missing

__version__ = "2.0.0"
