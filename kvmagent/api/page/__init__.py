"""The status page at /: a few static files. The browser reads what they show by the other GET paths.

Nothing here is built, fetched from elsewhere or specific to this host, so that it may be served to whoever may connect:
a browser can send no token before a page has asked for it.
"""

import hashlib
from collections.abc import Mapping
from importlib.resources import files

from kvmagent.api.server import Answer, Call, Handler, Route

#: Path to file and content type.
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/dom.js": ("dom.js", "text/javascript; charset=utf-8"),
    "/poll.js": ("poll.js", "text/javascript; charset=utf-8"),
    "/tasks.js": ("tasks.js", "text/javascript; charset=utf-8"),
    "/ladder.js": ("ladder.js", "text/javascript; charset=utf-8"),
    "/vms.js": ("vms.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
# Nothing inline, nothing from elsewhere, no frame around it; text becomes markup nowhere (trusted types).
# Source: W3C Content Security Policy 3, Trusted Types.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    # Kept by the browser, and asked for again by its ETag: after an upgrade nobody sees the former page.
    "Cache-Control": "no-cache",
}


def page_routes() -> Mapping[tuple[str, str], Route]:
    """Return the GET paths of the page's files and what answers them."""
    return {("GET", path): Route(_serve(name, kind), "public") for path, (name, kind) in FILES.items()}


def _serve(name: str, kind: str) -> Handler:
    body = files(__package__).joinpath(name).read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**_HEADERS, "Content-Type": kind, "ETag": tag}

    def serve(call: Call) -> Answer:
        known = [entry.strip().removeprefix("W/") for entry in call.headers.get("if-none-match", "").split(",")]
        if tag in known or "*" in known:
            return Answer(b"", status=304, headers=headers)
        return Answer(body, headers=headers)

    return serve
