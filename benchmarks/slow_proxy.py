"""A server that is slow: passes every request on to another one, and responds after a delay.

python benchmarks/slow_proxy.py PORT UPSTREAM_PORT DELAY_S [STATUS]

With a STATUS (e.g. 507) nothing is passed on: every request but the health check is refused with it.
"""

import http.client
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HEALTH = "/health"


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream = 0
    delay_s = 0.0
    status: int | None = None

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.delay_s)
        if self.status is not None and self.path != HEALTH:
            self.respond(self.status, b'{"error_code": "INTERNAL_ERROR", "message": "database or disk is full"}')
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")}
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        self.respond(response.status, response.read(), response.getheader("Content-Type", "application/json"))
        connection.close()

    def respond(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = pass_on  # noqa: N815  # as the library names them

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def main() -> None:
    port, Proxy.upstream, Proxy.delay_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    Proxy.status = int(sys.argv[4]) if len(sys.argv) > 4 else None
    ThreadingHTTPServer(("127.0.0.1", port), Proxy).serve_forever()


if __name__ == "__main__":
    main()
