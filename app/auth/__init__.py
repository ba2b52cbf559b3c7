"""Who asks: from the Authorization header to a `Principal`.

    Door ─┬─► TokenVerifier ─► jws ─► keys ── python-jose      keys from a secret, or key_sources: JWKS file or URL
          │        └─ denied                             single tokens that were leaked, from a file
          └─► ApiKeyVerifier                                   its table from api_key_file

Nothing here asks anybody while a request waits but for the one look that a token of an unknown key may cause.
"""

from app.auth.api_key_file import ApiKeyFile, ApiKeyReloader
from app.auth.api_keys import ApiKeyVerifier, make_key
from app.auth.denied import DeniedFile
from app.auth.door import FAILURES, Door, FailureLimit
from app.auth.key_sources import KeyFile, KeyUrl
from app.auth.keys import Key, KeySet
from app.auth.principal import SCOPES, Identity, Principal, Verifier, read_identity, read_models, read_scopes
from app.auth.tokens import TokenVerifier, mint_token

__all__ = [
    "FAILURES",
    "SCOPES",
    "ApiKeyFile",
    "ApiKeyReloader",
    "ApiKeyVerifier",
    "DeniedFile",
    "Door",
    "FailureLimit",
    "Identity",
    "Key",
    "KeyFile",
    "KeySet",
    "KeyUrl",
    "Principal",
    "TokenVerifier",
    "Verifier",
    "make_key",
    "mint_token",
    "read_identity",
    "read_models",
    "read_scopes",
]
