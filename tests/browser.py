"""A real browser, steered over its debugging pipe (Chrome DevTools Protocol), for pages that must hold all that they need."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections import deque
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROME = next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page; `errors` are what its console told, `requests` the addresses that it asked for."""

    def __init__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        ours, theirs = os.pipe(), os.pipe()
        line = (f'exec "$0" --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir={self.profile.name} '
                f"--remote-debugging-pipe 3<&{ours[0]} 4>&{theirs[1]}")
        self.process = subprocess.Popen(["bash", "-c", line, CHROME], pass_fds=(ours[0], theirs[1]), stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(ours[0])
        os.close(theirs[1])
        self.out, self.into, self.number, self.session = ours[1], theirs[0], 0, None
        self.buffer, self.events, self.errors, self.requests = b"", deque(), [], []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.session = None
        self.ask("Browser.close")
        self.process.wait(20)
        os.close(self.out)
        os.close(self.into)
        self.profile.cleanup()

    def _read(self):
        while b"\0" not in self.buffer:
            got = os.read(self.into, 1 << 20)
            assert got, "the browser has gone"
            self.buffer += got
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, message):
        method, told = message.get("method", ""), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method in ("Runtime.exceptionThrown", "Log.entryAdded") or (
                method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert")):
            self.errors.append(told)
        self.events.append(method)

    def ask(self, method, **params):
        self.number += 1
        request = {"id": self.number, "method": method, "params": params}
        request |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(request).encode() + b"\0")
        while (message := self._read()).get("id") != self.number:
            self._note(message)
        assert "error" not in message, message
        return message["result"]

    def open(self, path, width, height=800):
        """Load a file in a window (a phone's below 640) and wait until all of it is there."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 640)
        self.events.clear()
        self.ask("Page.navigate", url=Path(path).resolve().as_uri())
        while "Page.loadEventFired" not in self.events:
            self._note(self._read())

    def run(self, script):
        """The value of an expression in the page."""
        result = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def picture(self, path, whole=False):
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(shot["data"]))
