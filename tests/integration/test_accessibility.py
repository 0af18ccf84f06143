"""Every page of the console in Chromium, wide and narrow, light and dark: axe (from npm) finds nothing against WCAG 2.1
A and AA, and nothing is wider than the screen. Needs chromium and npm."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
from console_seed import MODEL, seed
from serving import Stand, make_stand, wait_for

from infra.db import one, transaction
from infra.settings import Settings

AXE = "axe-core@4"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(shutil.which("npm") is None or CHROMIUM is None, reason="npm or chromium is not installed"),
]
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
LOOK = """
<script src="/axe.js"></script><script>addEventListener("load", async () => {
  const found = await axe.run(document, {runOnly: RULES});
  const told = document.createElement("pre");
  told.id = "axe";
  told.textContent = JSON.stringify({
    width: innerWidth,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    passes: found.passes.length,
    violations: found.violations.map(v => [v.id, ...v.nodes.map(n => n.target.join(" ") + ": " + n.failureSummary)]),
  });
  document.body.append(told);
});</script></body>
""".replace("RULES", json.dumps(RULES))
# A window of Chromium is 500 px wide at least, a frame as narrow as it is told
FRAME = """
<!doctype html><iframe id="page" width="{width}" height="1400" src="{page}"></iframe>
<script>const look = setInterval(() => {{
  const told = document.getElementById("page").contentDocument.getElementById("axe");
  if (told) {{ clearInterval(look); document.body.append(told.cloneNode(true)); }}
}}, 50);</script>
"""


@pytest.fixture
def axe(tmp_path: Path) -> str:
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", AXE]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    return (tmp_path / "node_modules/axe-core/axe.min.js").read_text()


@pytest.fixture
def console(database: Settings, axe: str) -> Iterator[str]:
    """The gateway's console behind a proxy that logs in, brings axe along and sets the theme, as `?theme=` says."""
    with transaction() as conn:
        seed(conn, requests=160)
    with make_stand(database.home) as stand, stand.running_gateway():
        wait_for(lambda: stand._status() in (200, 503))

        class Proxy(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/axe.js":
                    self._answer(200, "text/javascript", axe.encode())
                    return
                asked = urlsplit(self.path)
                if asked.path == "/framed":
                    width, page = (html.escape(dict(parse_qsl(asked.query))[name]) for name in ("width", "page"))
                    self._answer(200, "text/html", FRAME.format(width=width, page=page).encode())
                    return
                self._answer(*fetched(stand, self.path, "dark" if "theme=dark" in self.path else "light"))

            def _answer(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()


def fetched(stand: Stand, path: str, theme: str) -> tuple[int, str, bytes]:
    answer = stand.http.get(stand.url + path, headers=stand.header("admin") | {"accept": "text/html"})
    kind, body = answer.headers["content-type"], answer.content
    if kind.startswith("text/html"):
        body = body.replace(b"</body>", LOOK.encode())
        body = body.replace(b'<html lang="en">', f'<html lang="en" data-theme="{theme}">'.encode())
    return answer.status_code, kind, body


def looked_at(console: str, page: str, width: int) -> dict[str, Any]:
    url = f"{console}/framed?{urlencode({'width': width, 'page': page})}"
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,1500",
         "--virtual-time-budget=8000", "--dump-dom", url],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="axe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, (url, done.stdout[-2000:], done.stderr[-2000:])
    told: dict[str, Any] = json.loads(html.unescape(found[1]))
    return told


def test_pages_are_for_everybody(console: str) -> None:
    with transaction() as conn:
        alert = one(conn, "select id from alert order by opened_at desc limit 1")["id"]
        request = one(conn, "select id from request_event where answer is not null order by at desc limit 1")["id"]
        run = one(conn, "select id from run limit 1")["id"]
    pages = [
        "/", "/alerts", f"/alerts/{alert}", f"/models/{MODEL}", f"/models/{MODEL}/drift?version=1",
        f"/models/{MODEL}/cost", f"/models/{MODEL}/versions/2", f"/models/{MODEL}/promote/1",
        f"/models/{MODEL}/rollback", f"/models/{MODEL}/rollout/1", "/requests", f"/requests/{request}",
        f"/review?model={MODEL}", "/playground", "/runs", f"/runs/{run}", "/studies", f"/studies/{MODEL}-s1",
        "/data", "/settings", "/models/none",
    ]  # fmt: skip
    wrong = []
    for page in pages:
        for width in (1440, 390):
            for theme in ("light", "dark"):
                told = looked_at(console, f"{page}{'&' if '?' in page else '?'}theme={theme}", width)
                assert told["width"] == width
                assert told["passes"] > 5, page
                if told["violations"] or told["wide"] > 0:
                    wrong.append(f"{page} {width} px, {theme}, {told['wide']} too wide: {told['violations']}")
    assert not wrong, "\n".join(wrong)
