"""The use cases of API keys: create, list, revoke."""

import re
import secrets
from dataclasses import replace
from hashlib import sha256

from .attempts import Attempt, Path
from .core import access, errors, names, times
from .core.access import FULL, Caller, Principal
from .core.drafts import IssuedKey, KeyDraft
from .core.events import Receipt
from .core.keyring import Plaintext
from .core.ports import Clock, Store
from .core.records import ApiKey, PutApiKey

_FULL = frozenset({FULL})

_KEY_ID = re.compile(r"key_[0-9a-f]{16}")


class ApiKeys:
    """All that can be done with the API keys of an organisation."""

    def __init__(self, store: Store, path: Path, clock: Clock) -> None:
        self._store = store
        self._path = path
        self._clock = clock

    async def issue(self, caller: Caller, draft: KeyDraft) -> IssuedKey:
        """Create an API key of the caller's organisation.

        Raises:
            InvalidInput: nothing was recorded.
            Denied: recorded; also for a caller who is limited to some names himself.
        """
        names.check_label(draft.name)
        now = self._clock()
        expiry = None if draft.expires_at is None else times.parse(draft.expires_at, "expires_at")
        # format §4: fm_live_ and 48 hex digits, of which only the SHA-256 is kept.
        raw = Plaintext(f"fm_live_{secrets.token_hex(24)}")
        key = ApiKey(
            id=f"key_{secrets.token_hex(8)}",
            org_id=caller.principal.org_id,
            name=draft.name,
            digest=sha256(raw.reveal().encode()).hexdigest(),
            scopes=access.check_scopes(draft.scopes),
            allow=access.check_patterns(draft.allow),
            created_at=times.render(now),
            created_by=caller.principal.actor,
            expires_at=None if expiry is None else times.render(expiry),
            expiry=expiry,
        )

        async def step(attempt: Attempt) -> None:
            _may_manage(attempt.caller.principal)
            attempt.resource = ("api_key", key.id, key.name)
            attempt.change = PutApiKey(key)
            attempt.details = {"scopes": list(key.scopes), "allow": list(key.allow)}

        _, receipt = await self._path.perform(caller, "api_key.create", None, step)
        return IssuedKey(key, raw, receipt)

    async def all(self, caller: Caller) -> list[ApiKey]:
        """All API keys of the organisation, oldest first, the revoked ones included.

        Raises:
            Denied: recorded in the log.
        """
        await self._path.permit(caller, "api_key.list", "api_key", _may_manage)
        return await self._store.api_keys(caller.principal.org_id)

    async def revoke(self, caller: Caller, key_id: str) -> Receipt:
        """Revoke an API key: when this returns, no process accepts it any more.

        Raises:
            ApiKeyNotFound: absent or revoked already; recorded.
            Denied: recorded in the log.
        """

        async def step(attempt: Attempt) -> None:
            _may_manage(attempt.caller.principal)
            if not _KEY_ID.fullmatch(key_id):
                attempt.resource = ("api_key", None, None)
                raise errors.ApiKeyNotFound(key_id)
            attempt.resource = ("api_key", key_id, None)
            org_id = attempt.caller.principal.org_id
            attempt.depends += (((org_id, key_id), self._store.position),)
            keys = [key for key in await self._store.api_keys(org_id) if key.id == key_id]
            if not keys or keys[0].revoked_at is not None:
                raise errors.ApiKeyNotFound(key_id)
            attempt.resource = ("api_key", key_id, keys[0].name)
            attempt.change = PutApiKey(replace(keys[0], revoked_at=times.render(self._clock())))

        _, receipt = await self._path.perform(caller, "api_key.revoke", None, step)
        return receipt


def _may_manage(principal: Principal) -> None:
    principal.require(_FULL)
    principal.require_unrestricted()
