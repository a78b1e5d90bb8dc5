"""The settings. The only reader of the environment."""

import ipaddress
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from .core.errors import ConfigurationError
from .core.keyring import DEFAULT_KEY_WORD, MIN_PRODUCTION_KEY
from .core.merkle import Unverified
from .core.note import COSIGNATURE, Verifier
from .core.witness import Witness
from .storage.keysources import read_key_file

PREFIX = "FLOWMASON_SECRETS_"
API_KEY = "FLOWMASON_API_KEY"
AGENT_SOCKET = "FLOWMASON_AGENT_SOCKET"
CREDENTIAL = "flowmason-signing-key"
DEFAULT_PORT = 8700


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that can be set. Sizes in bytes, durations in seconds.

    `master_keys` has the active one first, also those of `key_file`, as they were, and `old_keys`.
    """

    master_keys: tuple[str, ...] = field(default=(), repr=False)
    key_file: Path | None = None
    old_keys: tuple[str, ...] = field(default=(), repr=False)
    data_dir: Path = Path("~/.flowmason/secrets")
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    workers: int = 1
    cache_bytes: int = 16 << 20
    segment_bytes: int = 64 << 20
    segment_age: float = 86400.0
    queue_limit: int = 10_000
    connections: int = 10_000
    request_bytes: int = 64 << 20
    head_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    keepalive_timeout: float = 75.0
    signing_key_file: Path | None = None
    free_space_warning: int = 1 << 30
    reserve_bytes: int = 64 << 20
    witnesses: tuple[str, ...] = ()
    witness_keys: tuple[str, ...] = ()
    vault_compat: bool = False

    @property
    def root(self) -> Path:
        """The data directory with `~` expanded."""
        return self.data_dir.expanduser()

    @property
    def signing_key(self) -> Path:
        """The file of the key that signs the log: by default beside the data directory."""
        if self.signing_key_file is not None:
            return self.signing_key_file
        # Whatever link the data directory was reached by, it has one key.
        root = self.root.resolve()
        return root.with_name(f"{root.name}-signing.key")


# Variable (without the prefix) → field of Settings, what it is for.
VARIABLES: dict[str, tuple[str, str]] = {
    "KEY": ("master_keys", "The master key."),
    "KEY_FILE": (
        "key_file",
        "A file with one master key a line, the newest first; mode 0600. Instead of KEY.",
    ),
    "OLD_KEYS": (
        "old_keys",
        "Older master keys, one a line: what is under them stays readable. "
        f"The word {DEFAULT_KEY_WORD} stands for the documented default key.",
    ),
    "DIR": ("data_dir", "The data directory."),
    "HOST": ("host", "The address to listen on."),
    "PORT": ("port", "The TCP port to listen on."),
    "WORKERS": ("workers", "How many processes serve; 0 is one for each core, bound to it."),
    "CACHE_BYTES": ("cache_bytes", "How much encrypted data each process keeps in memory."),
    "SEGMENT_BYTES": ("segment_bytes", "At which size a segment of the event log is sealed."),
    "SEGMENT_AGE": ("segment_age", "At which age, in seconds, a segment is sealed."),
    "QUEUE_LIMIT": ("queue_limit", "How many operations may wait for their commit."),
    "CONNECTIONS": (
        "connections",
        "How many connections each process keeps open; fewer if the system allows it fewer files.",
    ),
    "REQUEST_BYTES": (
        "request_bytes",
        "How much each process holds of requests that wait, and of answers that aren't taken.",
    ),
    "HEAD_TIMEOUT": ("head_timeout", "Seconds within which a request's head has to arrive."),
    "BODY_TIMEOUT": ("body_timeout", "Seconds within which a request's body has to arrive."),
    "WRITE_TIMEOUT": (
        "write_timeout",
        "Seconds within which an answer has to be taken, or 64 KiB more of it.",
    ),
    "KEEPALIVE_TIMEOUT": ("keepalive_timeout", "Seconds after which idle connections close."),
    "SIGNING_KEY_FILE": (
        "signing_key_file",
        "The file of the key that signs the log, mode 0600; made when the log is first signed. "
        f"Without it: the systemd credential {CREDENTIAL}, if there is one, or a file beside the "
        "data directory, named like it, with -signing.key at its end.",
    ),
    "FREE_SPACE_WARNING": (
        "free_space_warning",
        "Below how many free bytes on the disk of the data directory a server warns; 0: never.",
    ),
    "RESERVE_BYTES": (
        "reserve_bytes",
        "How much room a server keeps for refusals, deletions and operators when the disk is full; "
        "0: none.",
    ),
    "WITNESS": (
        "witnesses",
        "URLs of witnesses that are asked to cosign the log, with white space between them.",
    ),
    "WITNESS_KEY": (
        "witness_keys",
        "The verifier key of each witness, in the same order.",
    ),
    "VAULT_COMPAT": (
        "vault_compat",
        "Whether clients of HashiCorp Vault are served under /v1, too: true or false.",
    ),
}


# The largest numbers that make sense.
MOST = {"port": 65535, "workers": 256}
_KEYS = frozenset({"KEY", "KEY_FILE", "OLD_KEYS"})

# So many cosignatures of witnesses with names so long (in bytes) fit into a line of the log.
_MOST_WITNESSES = 8
_WITNESS_NAME = 128


def from_environment(
    environ: Mapping[str, str] = os.environ, *, master_key: str | None = None
) -> Settings:
    """The settings that the `FLOWMASON_SECRETS_*` variables describe.

    `master_key` takes the place of the one that the environment names.

    Raises:
        ConfigurationError: an unknown variable, one that can't be read, or two that contradict.
    """
    values: dict[str, object] = {"signing_key_file": _credential(environ)}
    for variable in sorted(environ):
        if not variable.startswith(PREFIX):
            continue
        short = variable[len(PREFIX) :]
        if short not in VARIABLES:
            known = ", ".join(PREFIX + name for name in VARIABLES)
            raise ConfigurationError(f"Unknown variable {variable}. Known are: {known}.")
        if short not in _KEYS:
            name = VARIABLES[short][0]
            values[name] = _convert(variable, name, environ[variable])
    if master_key is not None:
        check_key(master_key, "The master key")
        old = _old_keys(environ)
        return Settings(**values, master_keys=(master_key, *old), old_keys=old)  # type: ignore[arg-type] # as below
    return Settings(**values, **_master_keys(environ))  # type: ignore[arg-type] # _convert has checked each of them


def _master_keys(environ: Mapping[str, str]) -> dict[str, object]:
    key, key_file = environ.get(PREFIX + "KEY"), environ.get(PREFIX + "KEY_FILE")
    old = _old_keys(environ)
    if key and key_file:
        raise ConfigurationError(f"Set {PREFIX}KEY or {PREFIX}KEY_FILE, not both.")
    if key:
        return {"master_keys": (check_key(key, PREFIX + "KEY"), *old), "old_keys": old}
    if key_file:
        path = Path(key_file).expanduser().absolute()
        keys = (*read_key_file(path), *old)
        return {"master_keys": keys, "key_file": path, "old_keys": old}
    if old:
        raise ConfigurationError(
            f"{PREFIX}OLD_KEYS needs the key that encrypts: {PREFIX}KEY or {PREFIX}KEY_FILE."
        )
    return {}


def _credential(environ: Mapping[str, str]) -> Path | None:
    """The signing key that systemd passes to its service, see systemd.exec(5)."""
    directory = environ.get("CREDENTIALS_DIRECTORY")
    path = None if not directory else Path(directory) / CREDENTIAL
    return path if path is not None and path.exists() else None


def _old_keys(environ: Mapping[str, str]) -> tuple[str, ...]:
    lines = environ.get(PREFIX + "OLD_KEYS", "").split("\n")
    return tuple(check_key(key.strip(), PREFIX + "OLD_KEYS") for key in lines if key.strip())


def api_key(environ: Mapping[str, str] = os.environ) -> str | None:
    """The API key that the command line sends to a server."""
    return environ.get(API_KEY) or None


def for_children(environ: Mapping[str, str] = os.environ) -> dict[bytes, bytes]:
    """The environment without what gives access to secrets: master keys and the API key."""
    ours = {API_KEY, PREFIX + "KEY", PREFIX + "OLD_KEYS"}
    return {
        os.fsencode(name): os.fsencode(text) for name, text in environ.items() if name not in ours
    }


def agent_socket(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where the agent's socket is, if it was said."""
    path = environ.get(AGENT_SOCKET)
    return Path(path) if path else None


def is_loopback(host: str) -> bool:
    """Whether what goes to this host stays on this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for a URL, as `https_proxy` and `no_proxy` have it."""
    # Takes as long to import as the rest of a short command, and few ask for it.
    from urllib.request import getproxies, proxy_bypass

    parsed = urlsplit(url)
    if parsed.hostname is None or proxy_bypass(parsed.netloc):
        return None
    return getproxies().get(parsed.scheme)


def data_dir(path: str | Path, where: str = "The data directory") -> Path:
    """The data directory that is meant now, whatever the working directory becomes.

    Raises:
        ConfigurationError: it is empty.
    """
    if not str(path):
        raise ConfigurationError(f"{where} must not be empty.")
    return Path(path).expanduser().absolute()


def check_key(key: str, where: str) -> str:
    """Return a master key that can be one.

    Raises:
        ConfigurationError: it is empty, or not UTF-8.
    """
    if not key:
        raise ConfigurationError(f"{where} must not be empty.")
    if any("\ud800" <= character <= "\udfff" for character in key):
        raise ConfigurationError(f"{where} is not UTF-8.")
    return key


def check_production(settings: Settings) -> None:
    """Raises:
    ConfigurationError: no master key, or one of fewer than 32 characters.
    """
    if not settings.master_keys:
        raise ConfigurationError(
            f"--production needs a master key: set {PREFIX}KEY_FILE or {PREFIX}KEY. "
            "Make one with: python3 -c 'import secrets; print(secrets.token_urlsafe(48))'"
        )
    if any(len(key) < MIN_PRODUCTION_KEY for key in settings.master_keys):
        raise ConfigurationError(
            f"--production needs master keys of at least {MIN_PRODUCTION_KEY} characters."
        )


def witnesses(settings: Settings) -> tuple[Witness, ...]:
    """The witnesses of the log.

    Raises:
        ConfigurationError: not a URL and a key for each of them, or the same key twice.
    """
    urls, vkeys = settings.witnesses, settings.witness_keys
    if len(urls) != len(vkeys):
        raise ConfigurationError(
            f"{len(urls)} witnesses and {len(vkeys)} keys of witnesses are set. Give each "
            f"--witness its --witness-key, in the same order; or {PREFIX}WITNESS and "
            f"{PREFIX}WITNESS_KEY. "
            "Without its key nobody can tell whether a cosignature is the witness's."
        )
    if len(urls) > _MOST_WITNESSES:
        raise ConfigurationError(f"More than {_MOST_WITNESSES} witnesses are set.")
    found = tuple(_witness(url, vkey) for url, vkey in zip(urls, vkeys, strict=True))
    if len({witness.verifier.name for witness in found}) < len(found):
        raise ConfigurationError("Two witnesses have the same name.")
    return found


def _witness(url: str, vkey: str) -> Witness:
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        whole = False
    if not whole or parts.query or parts.fragment:
        # Not the URL: it may hold a password.
        raise ConfigurationError(
            f"The URL of the witness with the key {vkey} is not one of http or https."
        )
    try:
        verifier = Verifier.decode(vkey)
    except Unverified as error:
        raise ConfigurationError(
            f"{vkey!r} is not the verifier key of a witness: {error}."
        ) from None
    if verifier.kind != COSIGNATURE or len(verifier.name.encode()) > _WITNESS_NAME:
        raise ConfigurationError(
            f"{vkey!r} is not the verifier key of a witness: it has to be for cosignatures "
            f"(type 4, Ed25519), and its name at most {_WITNESS_NAME} bytes long."
        )
    return Witness(url, verifier)


def _convert(variable: str, name: str, text: str) -> object:
    default = getattr(Settings(), name)
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise ConfigurationError(f"{variable}={text!r} must be true or false.")
        return text == "true"
    if isinstance(default, tuple):
        return tuple(text.split())
    kind = Path if name == "signing_key_file" else type(default)
    try:
        if kind in (int, float):
            number = kind(text)
            # In this form nan is out of range, too.
            if not 0 <= number <= MOST.get(name, math.inf):
                raise ValueError
            return number
        return data_dir(text, variable) if issubclass(kind, Path) else text
    except ValueError:
        raise ConfigurationError(f"{variable}={text!r} is not a number, or out of range.") from None
