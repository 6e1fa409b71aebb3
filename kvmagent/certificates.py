"""When a certificate of the agent expires."""

import ssl


def find_end(path: str) -> float | None:
    """Return when the first certificate of a PEM file expires, in seconds since the epoch; None if unknown.

    Python's ssl tells this of what a peer has shown, and of a file only here. Source: CPython Modules/_ssl.c, 3.11 to
    3.14. cryptography does it too, for 7 MiB of the agent's memory; kvmagentctl, which is short-lived, uses that.
    """
    decode = getattr(ssl._ssl, "_test_decode_cert", None)  # type: ignore[attr-defined]
    if decode is None:
        return None
    return ssl.cert_time_to_seconds(decode(path)["notAfter"])
