"""Who may use the gateway: a file of `name:secret` lines, and bearer tokens."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from kvpool.core.errors import BadArgument
from scheduler.gateway.errors import ApiError


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose request it is. Without credentials all requests are of one tenant with no secret."""

    name: str = ""
    secret: str = ""

    def salt(self, cache_salt: str) -> bytes:
        """What keeps this tenant's blocks apart from others'; empty where nobody asked for it.

        With a secret it is never empty: a tenant must not learn from hit timing what another one sent.
        """
        if not self.secret and not cache_salt:
            return b""
        return hmac.new(self.secret.encode(), cache_salt.encode(), "sha256").digest()[:16]


class Credentials:
    """The secrets that are accepted; none = everybody is."""

    def __init__(self, tenants: list[Tenant]) -> None:
        # Looked up by digest: how long a look-up takes says nothing about a secret.
        self._tenants = {self._digest(t.secret.encode()): t for t in tenants}

    @classmethod
    def load(cls, path: str) -> Credentials:
        """Reads the file; empty path = no credentials.

        Raises: BadArgument with the line that is wrong.
        """
        if not path:
            return cls([])
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadArgument(f"can't read the API keys: {error}", hint="check --api-keys") from error
        tenants: dict[str, Tenant] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, _, secret = (part.strip() for part in line.partition(":"))
            if not name or not secret or secret in tenants:
                raise BadArgument(f"{path}, line {number}: must be `name:key`, and each key only once")
            tenants[secret] = Tenant(name, secret)
        if not tenants:
            raise BadArgument(f"{path} has no keys", hint="write `name:key` lines, or leave --api-keys out")
        return cls(list(tenants.values()))

    def check(self, authorization: str) -> Tenant:
        """The tenant of an Authorization header. Raises: ApiError (401)."""
        if not self._tenants:
            return Tenant()
        scheme, _, secret = authorization.partition(" ")
        # Header bytes come as latin-1; secrets are UTF-8.
        presented = secret.strip().encode("latin-1", "replace")
        tenant = self._tenants.get(self._digest(presented)) if scheme.lower() == "bearer" else None
        if tenant is None:
            message = "Incorrect API key provided." if secret else "You didn't provide an API key."
            raise ApiError(401, message, code="invalid_api_key")
        return tenant

    @staticmethod
    def _digest(secret: bytes) -> bytes:
        return hashlib.sha256(secret).digest()
