"""Chromium without a window, controlled through its debugging pipe: one page, real keys and real clicks."""

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-extensions", "--hide-scrollbars",
         "--remote-debugging-pipe")
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Chromium:
    """A browser with one tab. `problems` are the errors that it reported, `requests` the addresses it asked for."""

    def __init__(self, width: int = 1440, height: int = 900):
        program = shutil.which("chromium")
        if program is None:
            raise FileNotFoundError("chromium is not installed; try: apt-get install chromium")
        self.profile = tempfile.mkdtemp()
        to_browser, self.commands = high_pipe()
        self.replies, from_browser = high_pipe()
        # Chromium reads commands from file descriptor 3 and writes to 4, which the shell arranges.
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}', program, *FLAGS,
             f"--user-data-dir={self.profile}", f"--window-size={width},{height}", "about:blank"],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.received, self.calls, self.session = b"", 0, None
        self.problems, self.requests = [], []
        target = self.call("Target.createTarget", url="about:blank")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.replies)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **parameters) -> dict:
        """Send one command of the debugging protocol and wait for its result."""
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            reply = self.next_message()
            if reply.get("id") == self.calls:
                assert "error" not in reply, (method, reply["error"])
                return reply["result"]
            self.note(reply.get("method"), reply.get("params", {}))

    def next_message(self) -> dict:
        while b"\0" not in self.received:
            part = os.read(self.replies, 1 << 16)
            assert part, "chromium has ended"
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def note(self, event: str, details: dict) -> None:
        if event == "Runtime.exceptionThrown":
            self.problems.append(details["exceptionDetails"].get("exception", details)["description"])
        elif event in ("Runtime.consoleAPICalled", "Log.entryAdded"):
            self.problems.append(json.dumps(details))
        elif event == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])

    def run(self, script: str):
        """Run a piece of JavaScript and return its value. A promise is awaited."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def open(self, path: Path, address: str = "") -> None:
        """Open the file in an empty tab, and wait until the page has drawn itself."""
        self.call("Page.navigate", url="about:blank")
        self.problems, self.requests = [], []
        self.call("Page.navigate", url=f"{path.as_uri()}{address}")
        self.run(LOADED)
        self.drawn()

    def drawn(self) -> str:
        """Wait until the page shows its state, and return the address of that state."""
        return self.run(DRAWN)

    def drawn_as(self, address: str) -> bool:
        """Wait until the page shows this state. The browser reports some changes to the page with a delay."""
        return self.run(f"""new Promise(done => {{
            const look = () => document.body.dataset.drawn === "{address}" ? done(true) : setTimeout(look, 10);
            look();
        }})""")

    def text(self, selector: str) -> str:
        """The text that a reader sees, without the invisible marks around tokens."""
        found = self.run(f"document.querySelector({json.dumps(selector)}).innerText")
        return found.replace("\u2068", "").replace("\u2069", "")

    def key(self, key: str) -> str:
        code = KEYS.get(key, ord(key[0].upper()))
        typed = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **typed)
            typed = {}
        return self.drawn()

    def point(self, selector: str, x: float = 0.5, y: float = 0.5) -> dict:
        """Move the mouse to a place of an element, given as shares of its width and height."""
        box = self.run(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            const before = element.getBoundingClientRect();
            scrollBy(0, before.top + {y} * before.height - innerHeight / 2);    // away from the bar at the top
            const box = element.getBoundingClientRect();
            return [box.left, box.top, box.width, box.height];
        }})()""")
        place = {"x": box[0] + x * box[2], "y": box[1] + y * box[3]}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
        return place

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> str:
        place = self.point(selector, x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)
        return self.drawn()

    def screenshot(self) -> str:
        """The visible part of the page, as a PNG in base64."""
        return self.call("Page.captureScreenshot", format="png")["data"]


LOADED = """new Promise(done => {
    if (document.readyState === "complete" && location.href !== "about:blank") done();
    else addEventListener("load", () => done());
})"""
# The page writes the state that it has drawn into a data attribute of its body.
DRAWN = """new Promise(done => {
    const look = () => document.body && document.body.dataset.drawn === address()
        ? done(document.body.dataset.drawn) : setTimeout(look, 10);
    look();
})"""


def high_pipe() -> tuple[int, int]:
    """A pipe whose ends are numbered from 10 on, so that neither is 3 or 4."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high
