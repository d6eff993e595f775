"""The console: one page that shows what is served, live. `index.html` is sent as it is; its data: `/console/state`."""

from pathlib import Path

PATH = "/console"
STATE_PATH = "/console/state"
# Names of programs and steps come from clients: nothing but this page's own script may run.
_POLICY = (
    b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"content-security-policy", _POLICY),
]


def page() -> bytes:
    """The page."""
    return (Path(__file__).parent / "index.html").read_bytes()
