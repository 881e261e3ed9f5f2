"""Content policies: what a page may do, in its first lines.

A page holds texts of others: questions, answers, names of models. Its policy lets only the scripts
run that are named by their hash, and lets nothing be fetched or sent, whatever the texts are.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

from markupsafe import Markup

BASE = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data: blob:; "
    "style-src 'unsafe-inline'"
)


def content_policy(scripts: Sequence[str], *more: str) -> Markup:
    """Return the `meta` element of a policy under which only these inline scripts run.

    A script is what stands between its tags, to the last character, with line feeds as ends of
    lines; `more` are further sources of `script-src`, such as "'wasm-unsafe-eval'".
    """
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    policy = f"{BASE}; script-src {' '.join([*hashes, *more])}"
    return Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">')
