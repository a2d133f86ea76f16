"""Who may say what exists and what runs: TUF roles, their keys, the verifying client, the repository, bundles.

securesystemslib looks for a cloud's key service when it is imported. Keys here are files and chips, so a library for
such a service that is installed for something else is not loaded: it costs every process a quarter of a second.
"""

import sys

_IS_HIDDEN = sys.modules.setdefault("boto3", None) is None  # type: ignore[arg-type]
try:
    import securesystemslib.signer  # noqa: F401
finally:
    if _IS_HIDDEN:
        del sys.modules["boto3"]
