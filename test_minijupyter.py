#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "pyzmq",           # all that the code under test needs
#     "jupyter_client",  # oracle of the wire; drives the kernel
#     "nbclient",        # runs whole notebooks on the kernel
#     "nbformat",        # oracle of the documents
#     "ipykernel",       # the kernel to compare with
#     "jupyter_server",  # the server to compare with
#     "websockets",      # a WebSocket client written by others
#     "kosoku",          # the Autobahn test suite's cases
#     "hypothesis",      # makes up what nobody thinks of
#     "bash_kernel", "xeus-python",   # kernels of others
#     "jupyter_kernel_client",        # a client of servers
#     "playwright",      # drives the page in Chromium
#     "matplotlib",      # a plot, as users make them
#     "jupyter_kernel_test", "papermill", "nbval", "jupyter_console", "pexpect",  # other clients
#     "pandas", "polars", "sympy", "plotly", "altair", "bokeh", "rich", "tqdm",   # libraries that
#     "ipywidgets", "folium", "vl-convert-python",  # behave in a notebook as in Jupyter
#     "line_profiler", "ipympl", "ipynbname",  # what expects IPython's shell and ipykernel
#     "axe-playwright-python",  # carries axe-core, which finds what shuts people out
#     "brs-kb",          # a public list of attacks on pages
# ]
# ///
"""The tests and the benchmark of MiniJupyter: what it promises, proved on the real thing.

Run:  python test_minijupyter.py              all tests; the last line counts them
      python test_minijupyter.py NAME...      the tests whose name contains NAME
      python test_minijupyter.py core         Part I alone, and with all of Part II but one section
      python test_minijupyter.py bench        how fast, beside the physical limit and the others
      python test_minijupyter.py bench quick  the same with few repetitions
      python test_minijupyter.py bench NAME   the measures whose label contains NAME

    Chromium ---- page ----+
    HTTP client -----------+--> minijupyter.py --> kernel.py <--+-- Frontend over ZeroMQ
    WebSocket client ------+      (a process)     (a process)   +-- jupyter_client, nbclient

Nothing is faked: kernels and servers are processes, sockets are sockets, the page runs in
Chromium. A test's name is the promise, in a sentence; read the names first. The journey of a
cell is walked in full in section 9, station by station in sections 2 to 8.

Sections:
    1 Harness: a process, a frontend, an HTTP and a WebSocket client
    2 The wire
    3 The kernel, over real sockets
    4 The kernel, driven by jupyter_client and nbclient
    5 The kernel, whole: every message, magic and library
    6 Documents and contents
    7 HTTP, access, kernels and sessions
    8 WebSocket frames and the bridge
    9 The page, in Chromium and Firefox
    10 Documentation under test
    11 Bench
    12 main

Left out on purpose: assertions about time (the benchmark measures, it does not judge), and
anything that needs a network. Tests that need a package, Chromium or the sample notebooks
are skipped with the reason; with REQUIRE_ALL=1 a missing package is a failure.

Threads: two processes share the classes of tests; in each the tests run one after another in the
main thread, and each Process has one more that reads its output. No test sleeps: it waits for a
message, a line or a file, with a deadline.
Sources: the messaging specification, RFC 6455 with its own examples, nbformat's schema.
"""

import ast
import asyncio
import atexit
import base64
import collections
import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import hmac
import http.client
import importlib.util
import io
import itertools
import json
import operator
import os
import random
import re
import resource
import secrets
import select
import selectors
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import types
import unittest
import unittest.mock
import zlib
from concurrent.futures import ThreadPoolExecutor
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, quote_plus, urlencode

import zmq

import kernel
import minijupyter

HERE = Path(__file__).resolve().parent
NOTEBOOKS = Path(os.environ.get("NOTEBOOKS", HERE.parent / "shared" / "notebooks"))
REQUIRE_ALL = os.environ.get("REQUIRE_ALL") == "1"
OURS = [sys.executable, str(HERE / "kernel.py"), "-f", "{connection_file}"]
IPYKERNEL = [sys.executable, "-m", "ipykernel_launcher", "--log-level=50",
             "-f", "{connection_file}"]
WORKERS = 2  # processes that share the tests
MOST_SECONDS = 150  # a test that takes longer has failed
SECONDS = 20  # how long a test waits for what must come; only a failing test takes so long


# ---- 1. Harness: a process, a frontend, an HTTP and a WebSocket client -----------------
#
# A Frontend asks and files what comes back: each request has an Answer, which holds the reply
# and everything iopub said with that request as parent. A test then reads like the protocol:
#
#     cell = self.run_cell("print(1); 2")
#     self.assertMessages(cell, "busy execute_input stream execute_result idle")
#
# What carries the messages is a wire: ZeroMQWire talks to a kernel, WebSocketWire to a server.
# All that these start ends with the test or the class that started it, by its own id.


def needs(*modules):
    """Skip a test when one of these modules is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return unittest.skipIf(missing, "needs " + ", ".join(missing))


def needs_programs(*names):
    """Skip a test when one of these programs, or files, cannot be found."""
    missing = [name for name in names if not (shutil.which(name) or os.path.exists(name))]
    return unittest.skipIf(missing, "needs " + ", ".join(missing))


def needs_notebooks(function):
    """Skip a test when the sample notebooks are not there: they are not part of the project."""
    return unittest.skipUnless(NOTEBOOKS.is_dir(), "no sample notebooks; set NOTEBOOKS")(function)


def wait_until(condition, seconds=SECONDS):
    """The first true value of condition(), asked again and again until the deadline."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not true within {seconds} s: {condition}")
        time.sleep(0.01)
    return value


def fastest(function, times=5):
    """(seconds, value) of the fastest of several calls: what other processes take is left out."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        value = function()
        seconds.append(time.perf_counter() - started)
    return min(seconds), value


def free_ports(count):
    """Port numbers that were free a moment ago on the loopback interface."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def is_alive(pid):
    """True while a process runs; one that ended but was not yet collected does not count."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self").exists()


def cpu_seconds(pid):
    """Processor time that a process has taken until now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def clean_environment(folder, **variables):
    """The environment with every Jupyter folder moved below `folder`."""
    own = {name: str(Path(folder) / name.lower()) for name in (
        "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")}
    outside = ("JUPYTER_PATH", "JUPYTER_TOKEN", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if name not in outside}
    return {**kept, **own, **variables}


def bare_python(folder):
    """(python, environment) that sees the standard library and pyzmq, nothing else installed."""
    site = Path(zmq.__file__).parent.parent
    for name in ("zmq", "pyzmq.libs"):
        if (site / name).exists():
            (Path(folder) / name).symlink_to(site / name)
    return [sys.executable, "-S"], clean_environment(folder, PYTHONPATH=str(folder))


class Process:
    """A program under test; its output is collected line by line; it is ended by its own id."""

    def __init__(self, argv, **options):
        self.lines, self.news = [], threading.Condition()
        self.popen = subprocess.Popen(
            [str(word) for word in argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
            **options)
        self.pid, self.ended = self.popen.pid, False
        atexit.register(self.end)  # also when the tests are stopped by Ctrl-C
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.popen.stdout:
            with self.news:
                self.lines.append(line)
                self.news.notify_all()
        with self.news:
            self.ended = True
            self.news.notify_all()

    @property
    def output(self):
        return "".join(self.lines)

    def wait_for(self, pattern, seconds=SECONDS):
        """The match of `pattern` in the output, as soon as it is there."""
        with self.news:
            self.news.wait_for(lambda: self.ended or re.search(pattern, self.output), seconds)
            match = re.search(pattern, self.output)
        if not match:
            raise AssertionError(f"no {pattern!r} in the output:\n{self.output}")
        return match

    def exit_code(self, seconds=SECONDS):
        code = self.popen.wait(seconds)
        self.reader.join(2)  # a grandchild may hold the pipe open longer
        return code

    def end(self):
        """SIGINT, as Ctrl-C does, then SIGKILL for what does not listen."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(10)
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        self.reader.join(2)
        if not self.reader.is_alive():
            self.popen.stdout.close()
        atexit.unregister(self.end)


class KernelProcess:
    """A kernel in its own process, with its connection file in a temporary folder."""

    def __init__(self, argv=OURS, cwd=None, env=None, **connection):
        self.folder = tempfile.TemporaryDirectory(prefix="minijupyter-kernel-")
        names = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
        self.connection = {
            **dict(zip(names, free_ports(5), strict=True)), "transport": "tcp",
            "ip": "127.0.0.1", "key": secrets.token_hex(), "signature_scheme": "hmac-sha256",
            **connection}
        self.file = Path(self.folder.name, "connection.json")
        self.file.write_text(json.dumps(self.connection))
        self.process = Process(
            [word.format(connection_file=self.file) for word in argv],
            cwd=cwd or self.folder.name, env=env or clean_environment(self.folder.name))

    def connect(self):
        """A Frontend whose iopub subscription is known to be in force."""
        frontend = Frontend(ZeroMQWire(self.connection))
        frontend.greet()
        return frontend

    def interrupt(self):
        """SIGINT to the process group, as Jupyter's clients send it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self):
        if self.process.popen.poll() is None:
            self.process.popen.kill()
        self.process.end()
        self.folder.cleanup()


class ZeroMQWire:
    """The four channels of a kernel that carry messages; what arrives is verified."""

    TYPES = {"shell": zmq.DEALER, "control": zmq.DEALER, "stdin": zmq.DEALER, "iopub": zmq.SUB}

    def __init__(self, connection, channels=None):
        self.connection, self.session = connection, kernel.Session(connection["key"])
        self.context, self.poller, self.sockets = zmq.Context(), zmq.Poller(), {}
        for name in channels or self.TYPES:
            self.connect(name, self.TYPES[name])

    def connect(self, channel, kind):
        channel_socket = self.sockets[channel] = self.context.socket(kind)
        channel_socket.linger = 0
        channel_socket.reconnect_ivl = 5  # milliseconds: a kernel that begins to listen is found
        channel_socket.rcvhwm = 0  # a SUB socket would silently drop what passes its limit
        if kind == zmq.SUB:
            channel_socket.subscribe(b"")
        else:
            channel_socket.identity = self.session.session.encode()
        channel_socket.connect("tcp://{}:{}".format(
            self.connection["ip"], self.connection[channel + "_port"]))
        self.poller.register(channel_socket, zmq.POLLIN)

    def send(self, channel, message):
        self.send_parts(channel, self.session.pack(message))

    def send_parts(self, channel, parts):
        self.sockets[channel].send_multipart(parts)

    def receive(self, seconds):
        """(channel, message); TimeoutError when nothing comes."""
        ready = dict(self.poller.poll(max(0, seconds) * 1000))
        for channel, channel_socket in self.sockets.items():
            if channel_socket in ready:
                return channel, self.session.unpack(channel_socket.recv_multipart())
        raise TimeoutError(f"no message within {seconds:.1f} s")

    def close(self):
        self.context.destroy(linger=0)


def word(message):
    """A message in a word: its type, a status by its state."""
    content, msg_type = message["content"], message["header"]["msg_type"]
    return content.get("execution_state", msg_type) if isinstance(content, dict) else msg_type


def merged(words):
    """The words, neighbouring streams as one: how a kernel cuts its output is its own affair."""
    return [word for word, group in itertools.groupby(words)
            for _ in (range(1) if word.startswith("stream") else group)]


class Answer:
    """What one request led to: its reply, and what iopub said about it, in order of arrival."""

    def __init__(self, request):
        self.request = request
        self.reply = None    # the message on shell or control
        self.messages = []   # from iopub, this request as their parent
        self.questions = []  # contents of input_request
        self.question = None  # header of the last one
        self.answers = []    # contents of the input_replies of others
        self.is_idle = False

    @property
    def is_done(self):
        return self.reply is not None and self.is_idle

    @property
    def story(self):
        """The message types in order, a status by its state, neighbouring streams as one."""
        return " ".join(merged(map(word, self.messages)))

    def of(self, msg_type):
        """The contents of all messages of one type."""
        return [m["content"] for m in self.messages if m["header"]["msg_type"] == msg_type]

    def text(self, name="stdout"):
        return "".join(c["text"] for c in self.of("stream") if c["name"] == name)

    @property
    def status(self):
        return self.reply["content"]["status"]

    @property
    def result(self):
        """text/plain of the result, None when the cell had none."""
        return next((c["data"]["text/plain"] for c in self.of("execute_result")), None)

    @property
    def display(self):
        """The MIME bundle of the only display_data or execute_result."""
        (content,) = self.of("display_data") + self.of("execute_result")
        return content["data"]

    @property
    def count(self):
        return next((c["execution_count"] for c in self.of("execute_input")), None)

    @property
    def error(self):
        """Content of the error message, {} when the cell had none."""
        return next(iter(self.of("error")), {})

    @property
    def traceback(self):
        return re.sub(r"\x1b\[[\d;]*m", "", "\n".join(self.error["traceback"]))

    def __repr__(self):
        return f"{self.story or '-'}; reply {self.reply and self.reply['content']}; {self.error}"


class Frontend:
    """Asks, and files what comes back under the request it belongs to."""

    def __init__(self, wire):
        self.wire, self.session = wire, kernel.Session("")  # the wire signs
        self.answers = {}  # msg_id -> Answer
        self.unasked = []  # messages that no request of ours caused
        self.typed = []    # what the user will type when the kernel asks
        self.log = []      # message types and states, all of them, in order of arrival

    def ask(self, msg_type, channel="shell", metadata=None, **content):
        """Send a request, return its Answer, which fills as messages come in."""
        message = self.session.message(msg_type, content, metadata=metadata)
        answer = self.answers[message["header"]["msg_id"]] = Answer(message)
        self.wire.send(channel, message)
        return answer

    def pump(self, seconds=SECONDS):
        """Take one message and file it."""
        self.file(*self.wire.receive(seconds))

    def file(self, channel, message):
        self.log.append(word(message))
        answer = self.answers.get(str(message["parent_header"].get("msg_id")))
        if answer is None:
            self.unasked.append(message)
        elif channel == "iopub":
            answer.messages.append(message)
            answer.is_idle = answer.is_idle or self.log[-1] == "idle"
        elif channel == "stdin":
            self.question(answer, message)
        else:
            answer.reply = message

    def question(self, answer, message):
        answer.questions.append(message["content"])
        answer.question = message["header"]
        if self.typed:
            self.type(self.typed.pop(0), message["header"])

    def type(self, text, parent_header=None):
        reply = self.session.message("input_reply", {"value": text}, parent_header or {})
        self.wire.send("stdin", reply)

    def until(self, condition, seconds=SECONDS):
        """Take messages until condition() holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.pump(deadline - time.monotonic())

    def finish(self, *answers, seconds=SECONDS):
        self.until(lambda: all(answer.is_done for answer in answers), seconds)
        return answers[0]

    def request(self, msg_type, channel="shell", **content):
        return self.finish(self.ask(msg_type, channel, **content))

    def start(self, code, **options):
        """Ask for the execution of a cell, without waiting for its end."""
        defaults = {"silent": False, "store_history": True, "user_expressions": {},
                    "allow_stdin": True, "stop_on_error": True}
        return self.ask("execute_request", code=code, **{**defaults, **options})

    def greet(self, seconds=SECONDS):
        """Ask kernel_info until reply and status arrive: then no later message can be missed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                return self.finish(self.ask("kernel_info_request"), seconds=0.5)
        raise TimeoutError("the kernel does not answer")


class Page(Frontend):
    """A Frontend that follows the whole conversation of a kernel, as index.html does."""

    def __init__(self, wire):
        super().__init__(wire)
        self.session.session = wire.session_id
        self.cells = {}   # cell id -> Answer of the last request for it

    def start(self, code, cell, **options):
        answer = super().start(code, metadata={"cellId": cell}, **options)
        self.cells[cell] = answer
        return answer

    def pump(self, seconds=SECONDS):
        channel, message = self.wire.receive(seconds)
        msg_type, parent_id = message["msg_type"], message["parent_header"].get("msg_id")
        if msg_type == "execute_request" and message["msg_id"] not in self.answers:
            answer = self.answers[message["msg_id"]] = Answer(message)
            self.cells[message["metadata"].get("cellId")] = answer
        elif msg_type == "input_reply":
            for answer in self.answers.values():
                if answer.question and answer.question["msg_id"] == parent_id:
                    answer.answers.append(message["content"])
        else:
            self.file(channel, message)

    def forget(self, *answers):
        """Say that the file holds these answers' outputs."""
        self.wire.send("journal", self.session.message(
            "forget", {"forget": [answer.request["header"]["msg_id"] for answer in answers]}))

    def forget_all(self):
        self.forget(*self.cells.values())
        self.cells.clear()


class Reply:
    """Status, headers and body of an HTTP reply."""

    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self):
        return json.loads(self.body)

    def __repr__(self):
        return f"{self.status} {self.body[:500]!r}"


class Server:
    """minijupyter.py in its own process, with a root and Jupyter folders of its own.

    `program(root, port, token)` is the command line of another server, to compare with.
    """

    def __init__(self, root=None, options=None, env=None, program=None, **process):
        self.folder = tempfile.TemporaryDirectory(prefix="minijupyter-server-")
        self.root = Path(root or self.folder.name) / "root"
        self.root.mkdir(exist_ok=True)
        self.token = secrets.token_hex(8)
        port = free_ports(1)[0]
        ours = [sys.executable, HERE / "minijupyter.py", self.root, "--token", self.token,
                "--no-browser", *(["--port", port] if options is None else options)]
        self.process = Process(
            program(self.root, port, self.token) if program else ours,
            env=clean_environment(self.folder.name, **(env or {})), **process)
        try:
            self.url = self.process.wait_for(r"https?://(?:localhost|127\.0\.0\.1):(\d+)/\S*")
        except AssertionError:
            self.end()
            raise
        self.port = int(self.url[1])

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)

    def request(self, method, path, body=None, headers=None, connection=None):
        """One request with the token; `headers` may replace it, or leave it out with None."""
        if body is not None and not isinstance(body, bytes | str):
            body = json.dumps(body)
        headers = {"Authorization": f"token {self.token}", **(headers or {})}
        kept = {name: value for name, value in headers.items() if value is not None}
        own = connection or self.connect()
        try:
            own.request(method, path, body.encode() if isinstance(body, str) else body, kept)
            return Reply(own.getresponse())
        finally:
            if not connection:
                own.close()

    def get(self, path, **headers):
        return self.request("GET", path, headers=headers)

    def put(self, path, body, **headers):
        return self.request("PUT", path, body, headers)

    def post(self, path, body=None):
        return self.request("POST", path, body)

    def patch(self, path, body):
        return self.request("PATCH", path, body)

    def delete(self, path):
        return self.request("DELETE", path)

    def connection_files(self):
        """Files below our folders that hold a kernel's ports and key."""
        return [path for path in Path(self.folder.name).rglob("*.json")
                if b'"shell_port"' in path.read_bytes()]

    def frontend(self, kernel_id):
        """A Frontend on the kernel's WebSocket."""
        frontend = Frontend(WebSocketWire(self, kernel_id))
        frontend.greet()
        return frontend

    def end(self):
        self.process.end()
        self.folder.cleanup()


TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
MASK = b"\x37\xfa\x21\x3d"  # of the RFC's masked "Hello"


def frame(opcode, payload=b"", fin=True, mask=MASK, length=None):
    """A frame as a client sends it (RFC 6455 5.2); `length` may lie about the payload."""
    length = len(payload) if length is None else length
    masked = 0x80 if mask else 0
    head = bytes([(0x80 if fin else 0) | opcode])
    if length < 126:
        head += bytes([masked | length])
    elif length < 1 << 16:
        head += struct.pack("!BH", masked | 126, length)
    else:
        head += struct.pack("!BQ", masked | 127, length)
    if not mask:
        return head + payload
    key = (mask * (len(payload) // 4 + 1))[:len(payload)]
    return head + mask + (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(
        len(payload), "big")


def take_frame(buffer):
    """Remove the first whole frame of a server from `buffer`: (fin, opcode, payload) or None."""
    if len(buffer) < 2:
        return None
    size, start = buffer[1] & 0x7f, 2
    if size > 125:
        start, form = (4, "!H") if size == 126 else (10, "!Q")
        if len(buffer) < start:
            return None
        (size,) = struct.unpack(form, buffer[2:start])
    if len(buffer) < start + size:
        return None
    found = bool(buffer[0] & 0x80), buffer[0] & 0x0f, bytes(buffer[start:start + size])
    del buffer[:start + size]
    return found


class WebSocketClient:
    """A WebSocket client whose every byte can be chosen."""

    def __init__(self, port, path="/", headers=None, first=b""):
        self.socket = socket.create_connection(("127.0.0.1", port), SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer, self.close_code = bytearray(), None
        fields = {"Host": f"127.0.0.1:{port}", "Upgrade": "websocket", "Connection": "Upgrade",
                  "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",  # RFC 6455 1.3
                  "Sec-WebSocket-Version": "13", **(headers or {})}
        lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
        request = "\r\n".join([f"GET {path} HTTP/1.1", *lines, "", ""])
        self.socket.sendall(request.encode() + first)
        self.read_head()

    def read_head(self):
        while b"\r\n\r\n" not in self.buffer:
            self.more(SECONDS)
        head, _, rest = bytes(self.buffer).partition(b"\r\n\r\n")
        self.buffer = bytearray(rest)
        first, *lines = head.decode().split("\r\n")
        self.version, self.status = first.split()[0], int(first.split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (
            line.partition(":") for line in lines)}

    def more(self, seconds):
        self.socket.settimeout(max(seconds, 0.001))
        data = self.socket.recv(1 << 20)
        if not data:
            raise EOFError("the server closed the connection")
        self.buffer += data

    def send(self, message):
        binary = isinstance(message, bytes)
        self.socket.sendall(frame(BINARY if binary else TEXT,
                                  message if binary else message.encode()))

    def receive_frame(self, seconds=SECONDS):
        while not (found := take_frame(self.buffer)):
            self.more(seconds)
        return found

    def receive(self, seconds=SECONDS):
        """The next message, whole; None for a close, whose code is kept."""
        payload, kind, deadline = b"", None, time.monotonic() + seconds
        while True:   # pings do not prolong it
            fin, opcode, data = self.receive_frame(deadline - time.monotonic())
            if opcode == CLOSE:
                self.close_code = int.from_bytes(data[:2], "big")
                return None
            if opcode == PING:
                self.socket.sendall(frame(PONG, data))
            elif opcode != PONG:
                payload, kind = payload + data, kind or opcode
                if fin:
                    return payload.decode() if kind == TEXT else payload

    def is_at_end(self):
        """True when the server has closed the TCP connection and said nothing more."""
        try:
            self.receive_frame()
        except (EOFError, ConnectionError):
            return True
        return False

    def close(self):
        self.socket.close()


class WebSocketWire:
    """Carries messages to a kernel through the server: JSON texts that name their channel."""

    def __init__(self, server, kernel_id, session_id=None, journal=0):
        self.session_id = session_id or secrets.token_hex(8)
        path = (f"/api/kernels/{kernel_id}/channels?session_id={self.session_id}"
                f"&journal={journal}")
        self.client = WebSocketClient(
            server.port, path, {"Authorization": f"token {server.token}"})
        if self.client.status != 101:
            raise ConnectionError(self.client.status)

    def send(self, channel, message):
        self.client.send(json.dumps({**message, "channel": channel, "buffers": []}))

    def receive(self, seconds):
        try:
            text = self.client.receive(max(0.001, seconds))
        except TimeoutError:
            raise TimeoutError(f"no message within {seconds:.1f} s") from None
        if text is None:
            raise EOFError(f"closed with code {self.client.close_code}")
        message = json.loads(text)
        return message["channel"], message

    def close(self):
        self.client.close()


def install_kernelspec(folder, name, argv, **fields):
    """A kernel spec below `folder`, which then serves as an entry of JUPYTER_PATH."""
    spec = {"argv": argv, "display_name": name, "language": "python", **fields}
    (folder / "kernels" / name).mkdir(parents=True)
    (folder / "kernels" / name / "kernel.json").write_text(json.dumps(spec))


class Case(unittest.TestCase):
    """A test case with asserts in the field's words."""

    maxDiff = 2000

    def folder(self):
        """A temporary folder that lasts as long as the test."""
        return Path(self.enterContext(tempfile.TemporaryDirectory(prefix="minijupyter-test-")))

    def enterContext(self, context):  # TestCase has it from Python 3.11 on
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    def assertMessages(self, answer, story):
        """The types of the messages on iopub are these, in this order."""
        self.assertEqual(answer.story, story, answer)

    def assertFails(self, cell, ename):
        """The cell ended with this error, on iopub and in its reply."""
        self.assertEqual((cell.status, cell.error.get("ename")), ("error", ename), cell)
        self.assertEqual(cell.reply["content"]["ename"], ename)


class KernelCase(Case):
    """Tests that share one kernel; their cells run in one namespace."""

    options = {}

    @classmethod
    def setUpClass(cls):
        cls.kernel = KernelProcess(**cls.options)
        cls.addClassCleanup(cls.kernel.end)
        cls.frontend = cls.kernel.connect()
        cls.addClassCleanup(cls.frontend.wire.close)

    def setUp(self):
        """After a failed test a cell may still run: the next test gets a new kernel."""
        unfinished = [a for a in self.frontend.answers.values() if not a.is_idle]
        if unfinished:
            self.kernel.end()
            self.setUpClass()

    def run_cell(self, code, seconds=SECONDS, **options):
        return self.frontend.finish(self.frontend.start(code, **options), seconds=seconds)

    def request(self, msg_type, channel="shell", **content):
        return self.frontend.request(msg_type, channel, **content)

    def assertWorks(self):
        """The kernel still answers."""
        self.assertEqual(self.run_cell("6 * 7").result, "42")


class ServerCase(Case):
    """Tests that share one server and its root."""

    options = {}

    @classmethod
    def setUpClass(cls):
        cls.server = Server(**cls.options)
        cls.addClassCleanup(cls.server.end)
        cls.root = cls.server.root

    def own_server(self, *args, **options):
        server = Server(*args, **options)
        self.addCleanup(server.end)
        return server

    def ask(self, data):
        """All that the server answers to these bytes, until it closes."""
        with socket.create_connection(("127.0.0.1", self.server.port), SECONDS) as raw:
            answer = b""
            with contextlib.suppress(ConnectionError):
                raw.sendall(data)
                with contextlib.suppress(OSError):   # the server may have hung up by now
                    raw.shutdown(socket.SHUT_WR)
                while piece := raw.recv(65536):
                    answer += piece
        return answer

    def here(self, **options):
        """A server in this process, so that a test can change its constants."""
        server = minijupyter.SERVERS[-1](self.folder(), "127.0.0.1", 0, "secret", **options)
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        for end in (thread.join, server.server_close, server.shutdown):
            self.addCleanup(end)
        return server

    def assertReply(self, reply, status):
        """The status is one of these; an error carries a message in JSON."""
        self.assertIn(reply.status, [status] if isinstance(status, int) else status, reply)
        if reply.status >= 400:
            self.assertTrue(reply.json["message"], reply)
            self.assertNotIn(str(self.root), reply.body.decode())
            self.assertNotIn("Traceback", reply.body.decode())
        return reply

    def start_kernel(self, server=None, **body):
        """(kernel id, frontend, process id) of a new kernel."""
        server = server or self.server
        kernel_id = self.assertReply(server.post("/api/kernels", body), 201).json["id"]
        self.addCleanup(server.delete, f"/api/kernels/{kernel_id}")
        frontend = server.frontend(kernel_id)
        self.addCleanup(frontend.wire.close)
        cell = frontend.finish(frontend.start("import os; os.getpid()"))
        return kernel_id, frontend, int(cell.result)


# ---- 2. The wire ------------------------------------------------------------
#
# A message is identities, a delimiter, a signature, four JSON parts and any buffers. The
# signature is an HMAC of the four parts as they travel. Each refusal has a row of its own:
# what cannot be trusted must not be parsed, and must not disturb what follows.

CONTENT = {"code": "print('naïve ☃ 𝄞')", "silent": False}


def packed(session, **fields):
    """The parts of a message as `session` would send it, some of its fields replaced."""
    return session.pack({**session.message("execute_request", CONTENT), **fields})


def signed(key, *parts):
    """Parts with a good signature, whatever stands in them."""
    digest = hmac.new(key.encode(), b"".join(parts[:4]), hashlib.sha256).hexdigest()
    return [b"<IDS|MSG>", digest.encode(), *parts]


class Wire(Case):
    def setUp(self):
        self.sender, self.receiver = kernel.Session("secret"), kernel.Session("secret")

    def assertRefused(self, parts):
        with self.assertRaises(kernel.BadMessage, msg=parts):
            self.receiver.unpack(parts)

    def test_a_message_survives_packing_and_unpacking(self):
        message = self.sender.message("execute_request", CONTENT, {"msg_id": "1"}, {"a": 1})
        received = self.receiver.unpack(self.sender.pack(message))
        for field in ("header", "parent_header", "metadata", "content"):
            self.assertEqual(received[field], message[field])

    def test_a_header_has_the_six_required_fields(self):
        header = self.sender.message("status", {})["header"]
        self.assertLessEqual(
            {"msg_id", "session", "username", "date", "msg_type", "version"}, set(header))
        self.assertRegex(header["date"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d)")

    def test_every_message_has_its_own_id(self):
        ids = {self.sender.message("status", {})["header"]["msg_id"] for _ in range(100)}
        self.assertEqual(len(ids), 100)

    def test_parent_and_metadata_left_out_are_empty_objects(self):
        self.assertEqual(packed(self.sender)[3:5], [b"{}", b"{}"])

    def test_the_signature_is_the_hmac_of_the_four_parts(self):
        delimiter, signature, *four = packed(self.sender)
        self.assertEqual([delimiter, signature, *four], signed("secret", *four))
        self.assertEqual(self.sender.sign(four), signature)

    def test_key_as_bytes_signs_like_key_as_text(self):
        self.assertEqual(
            kernel.Session(b"secret").sign([b"{}"] * 4), self.sender.sign([b"{}"] * 4))

    def test_identities_and_buffers_travel_around_the_signed_parts(self):
        parts = packed(self.sender, identities=[b"a", b"b"], buffers=[b"\0\xff", b""])
        self.assertEqual(parts[:3], [b"a", b"b", b"<IDS|MSG>"])
        received = self.receiver.unpack(parts)
        self.assertEqual(received["identities"], [b"a", b"b"])
        self.assertEqual([bytes(each) for each in received["buffers"]], [b"\0\xff", b""])

    def test_a_changed_part_is_refused(self):
        for i in range(1, 6):
            with self.subTest(part=i):
                parts = packed(self.sender)
                parts[i] = parts[i][:-1] + b" "
                self.assertRefused(parts)

    def test_a_forged_or_missing_signature_is_refused(self):
        good = packed(self.sender)
        other = packed(kernel.Session("other key"))
        for signature in (b"", b"0" * 64, good[1].upper(), good[1][:-1], b"\xff", other[1]):
            with self.subTest(signature=signature):
                self.assertRefused([good[0], signature, *good[2:]])

    def test_a_replayed_message_is_refused(self):
        parts = packed(self.sender)
        self.receiver.unpack(parts)
        self.assertRefused(parts)

    def test_a_forgery_does_not_use_up_the_signature_of_the_true_message(self):
        parts = packed(self.sender)
        self.assertRefused([*parts[:5], b'{"code": "forged"}'])
        self.assertEqual(self.receiver.unpack(parts)["content"], CONTENT)

    def test_a_truncated_message_is_refused(self):
        parts = packed(self.sender)
        for length in range(len(parts)):
            with self.subTest(parts=length):
                self.assertRefused(parts[:length])

    def test_a_message_without_delimiter_is_refused(self):
        self.assertRefused(packed(self.sender)[1:])
        self.assertRefused([b"", b"\0", b"<IDS|MSG> "])

    def test_parts_that_are_not_json_objects_are_refused(self):
        header = json.dumps(self.sender.message("execute_request", {})["header"]).encode()
        for bad in (b"", b"{", b"\xff\xfe", b"[]", b"null", b"1", b"{} {}"):
            for i in range(4):
                parts = [header, b"{}", b"{}", b"{}"]
                parts[i] = bad
                if bad == b"null" and i in (1, 2):   # xeus kernels say so that there is none
                    continue
                with self.subTest(part=i, bad=bad):
                    self.assertRefused(signed("secret", *parts))

    def test_no_parent_and_no_metadata_may_be_null(self):
        header = json.dumps(self.sender.message("status", {})["header"]).encode()
        message = self.receiver.unpack(signed("secret", header, b"null", b"null", b"{}"))
        self.assertEqual((message["parent_header"], message["metadata"]), ({}, {}))

    def test_with_an_empty_key_nothing_is_signed_and_nothing_checked(self):
        for key in ("", b""):
            session = kernel.Session(key)
            parts = packed(session)
            self.assertEqual(parts[1], b"")
            for _again in range(2):
                self.assertEqual(session.unpack(parts)["content"], CONTENT)

    @needs("jupyter_client")
    def test_jupyter_client_reads_what_we_write(self):
        from jupyter_client.session import Session
        parts = packed(self.sender, identities=[b"me"], buffers=[b"buffer"])
        theirs = Session(key=b"secret")
        identities, rest = theirs.feed_identities(parts)
        message = theirs.deserialize(rest)
        self.assertEqual((identities, message["content"]), ([b"me"], CONTENT))
        self.assertEqual(bytes(message["buffers"][0]), b"buffer")

    @needs("jupyter_client")
    def test_we_read_what_jupyter_client_writes(self):
        from jupyter_client.session import Session
        theirs = Session(key=b"secret")
        message = theirs.msg("execute_request", CONTENT)
        received = self.receiver.unpack(theirs.serialize(message, ident=b"me"))
        self.assertEqual((received["identities"], received["content"]), ([b"me"], CONTENT))
        self.assertEqual(received["header"]["msg_id"], message["header"]["msg_id"])


# ---- 3. The kernel, over real sockets -----------------------------------------
#
# A kernel process, and a Frontend on its five sockets. Status busy and status idle bracket
# every request; what a cell says stands between them, under the cell that caused it.


class KernelProtocol(KernelCase):
    def test_kernel_info_says_what_the_kernel_speaks(self):
        info = self.request("kernel_info_request").reply["content"]
        self.assertEqual((info["status"], info["language_info"]["name"]), ("ok", "python"))
        self.assertEqual(info["language_info"]["file_extension"], ".py")
        self.assertRegex(info["protocol_version"], r"^5\.\d")

    def test_every_message_names_one_protocol_version(self):
        cell = self.run_cell("1")
        info = self.request("kernel_info_request").reply["content"]
        versions = {m["header"]["version"] for m in [cell.reply, *cell.messages]}
        self.assertEqual(versions, {info["protocol_version"]})

    def test_busy_and_idle_bracket_every_request(self):
        for msg_type, content in [
                ("kernel_info_request", {}), ("is_complete_request", {"code": "1"})]:
            for channel in ("shell", "control"):
                with self.subTest(msg_type, channel=channel):
                    answer = self.request(msg_type, channel, **content)
                    self.assertMessages(answer, "busy idle")
                    self.assertEqual(answer.reply["header"]["msg_type"],
                                     msg_type.replace("request", "reply"))

    def test_an_unknown_message_type_gets_busy_and_idle_and_harms_nothing(self):
        for msg_type in ("no_such_request", "__init__", "execute_reply", ""):
            with self.subTest(msg_type=msg_type):
                answer = self.frontend.ask(msg_type)
                self.frontend.until(lambda answer=answer: answer.is_idle)
                self.assertMessages(answer, "busy idle")
        self.assertWorks()

    def test_a_reply_names_its_request_as_parent(self):
        cell = self.run_cell("print(1)")
        for message in (cell.reply, *cell.messages):
            self.assertEqual(message["parent_header"], cell.request["header"])

    def test_is_complete_tells_a_whole_cell_from_a_begun_one(self):
        for code, status, indent in [
                ("", "complete", None), ("1 + 1", "complete", None),
                ("x = [1,\n2]", "complete", None), ("await f()", "complete", None),
                ("if x:\n    y\n\n", "complete", None), ("!ls", "complete", None),
                ("%time 1", "complete", None), ("%%time\n1\n\n", "complete", None),
                ("if x:\n    y", "incomplete", "    "), ("%%time\n1", "incomplete", ""),
                ("def f():", "incomplete", "    "), ("if x:\n    if y:", "incomplete", " " * 8),
                ("f(1,", "incomplete", None), ("'''text", "incomplete", None),
                ("x = = 1", "invalid", None), ("1 1", "invalid", None), (")", "invalid", None)]:
            with self.subTest(code=code):
                reply = self.request("is_complete_request", code=code).reply["content"]
                self.assertEqual(reply["status"], status)
                if indent is not None:
                    self.assertEqual(reply["indent"], indent)

    def test_kernel_info_on_control_is_answered_while_a_cell_runs(self):
        cell = self.frontend.start("input()")
        self.frontend.until(lambda: cell.questions)
        for channel in ("control", "shell"):
            self.assertEqual(self.request("kernel_info_request", channel).status, "ok")
        self.frontend.type("done")
        self.assertEqual(self.frontend.finish(cell).result, "'done'")

    @unittest.skipUnless(hasattr(os, "mkfifo"), "the platform has no named pipes")
    def test_the_heartbeat_answers_while_a_cell_holds_the_interpreter_lock(self):
        folder = self.folder()
        for name in ("ready", "go"):
            os.mkfifo(folder / name)
        ready, go = (os.open(folder / name, os.O_RDWR) for name in ("ready", "go"))
        cell = self.frontend.start(
            f"import ctypes, os\nfd = os.open({str(folder / 'go')!r}, os.O_RDONLY)\n"
            f"buffer = ctypes.create_string_buffer(1)\n"
            f"with open({str(folder / 'ready')!r}, 'w') as f: f.write('!')\n"
            "ctypes.PyDLL(None).read(fd, buffer, 1)")  # PyDLL keeps the lock for the call
        self.assertTrue(select.select([ready], [], [], SECONDS)[0], cell)
        try:
            self.ping(20)
            self.assertIsNone(cell.reply)
        finally:
            os.write(go, b"!")
        self.assertEqual(self.frontend.finish(cell).result, "1")

    def ping(self, times):
        wire = self.frontend.wire
        with wire.context.socket(zmq.REQ) as heartbeat:
            heartbeat.linger = 0
            heartbeat.connect("tcp://127.0.0.1:{hb_port}".format(**wire.connection))
            for _ in range(times):
                heartbeat.send(b"ping")
                self.assertTrue(heartbeat.poll(SECONDS * 1000), "no heartbeat")
                self.assertEqual(heartbeat.recv(), b"ping")


class KernelExecution(KernelCase):
    def test_a_cell_that_prints_and_ends_in_a_value(self):
        cell = self.run_cell("print('hello')\n6 * 7")
        self.assertMessages(cell, "busy execute_input stream execute_result idle")
        self.assertEqual((cell.text(), cell.result, cell.status), ("hello\n", "42", "ok"))

    def test_input_result_and_reply_show_the_same_execution_count(self):
        first, second = self.run_cell("1"), self.run_cell("2")
        counts = [second.of("execute_input")[0], second.of("execute_result")[0],
                  second.reply["content"]]
        expected = first.reply["content"]["execution_count"] + 1
        self.assertEqual([c["execution_count"] for c in counts], [expected] * 3)

    def test_what_is_no_result_publishes_none(self):
        for code in ("", "# only a comment", "x = 1", "None", "7;", "7;  # muted", "pass",
                     "def f(): return 1", "for i in [1]: i"):
            with self.subTest(code=code):
                cell = self.run_cell(code)
                self.assertEqual((cell.result, cell.status), (None, "ok"), cell)

    def test_what_is_a_result_publishes_it(self):
        for code, result in [
                ("1 # comment;", "1"), ("'a;'", "'a;'"), ("(\n1,\n2\n)", "(1, 2)"),
                ("x = 3; x", "3"), ("'naïve ☃ 𝄞'", "'naïve ☃ 𝄞'"), ("[None]", "[None]"),
                ("1\n\n\n", "1"), ("lambda: 1\n0", "0"), ("{'b': 1, 'a': 2}", None)]:
            with self.subTest(code=code):
                cell = self.run_cell(code)
                self.assertEqual(cell.result, result or cell.result)
                self.assertIsNotNone(cell.result)

    def test_stdout_and_stderr_are_told_apart(self):
        cell = self.run_cell("import sys\nprint('out')\nprint('err', file=sys.stderr)")
        self.assertEqual((cell.text(), cell.text("stderr")), ("out\n", "err\n"))

    def test_names_live_from_cell_to_cell(self):
        self.run_cell("def double(x): return 2 * x")
        self.assertEqual(self.run_cell("double(21)").result, "42")

    def test_the_last_results_and_inputs_are_remembered(self):
        count = self.run_cell("'first'").reply["content"]["execution_count"]
        self.run_cell("'second'")
        for code, result in [
                ("_, __", "('second', 'first')"), (f"Out[{count}]", "'first'"),
                (f"_{count}", "'first'"), (f"In[{count}]", '"\'first\'"')]:
            with self.subTest(code=code):
                self.assertEqual(self.run_cell(code).result, result)
                self.run_cell("'first'"), self.run_cell("'second'")

    def test_the_kernel_runs_cells_as_main_in_its_folder(self):
        cell = self.run_cell("import os\n__name__, os.getcwd()")
        self.assertEqual(cell.result, repr(("__main__", os.path.realpath(self.kernel.folder.name))))

    def test_a_class_of_a_cell_can_be_pickled(self):
        cell = self.run_cell("import pickle\nclass Point: pass\n"
                             "type(pickle.loads(pickle.dumps(Point()))) is Point")
        self.assertEqual(cell.result, "True")

    def test_modules_beside_the_notebook_can_be_imported(self):
        Path(self.kernel.folder.name, "beside_the_notebook.py").write_text("value = 42")
        self.assertEqual(self.run_cell("from beside_the_notebook import value; value").result, "42")

    def test_await_works_at_the_top_of_a_cell(self):
        cell = self.run_cell("import asyncio\nawait asyncio.sleep(0.01, 'slept')")
        self.assertEqual((cell.result, cell.status), ("'slept'", "ok"))
        cell = self.run_cell("async def count():\n    yield 1\n[i async for i in count()]")
        self.assertEqual(cell.result, "[1]")

    def test_a_task_goes_on_between_cells(self):
        cell = self.run_cell(
            "import asyncio\nasync def work():\n    for i in range(3):\n"
            "        await asyncio.sleep(0.01)\n        print('step', i)\n"
            "task = asyncio.create_task(work())")
        self.frontend.until(lambda: "step 2" in cell.text())
        self.assertEqual(self.run_cell("await task\ntask.done()").result, "True")

    def test_magics_and_shell_commands_that_notebooks_use(self):
        for code, expected in [
                ("!echo shell", "shell\n"), ("!printf 'no newline'", "no newline"),
                ("%time x = sum(range(10))", "time: "), ("%%time\nprint('timed')", "timed\n"),
                ("%timeit -n 1 -r 1 1", "loop"), ("for i in [1, 2]:\n    !echo {i}", "1\n2\n")]:
            with self.subTest(code=code):
                cell = self.run_cell(code)
                self.assertEqual(cell.status, "ok", cell)
                self.assertIn(expected, cell.text())

    def test_a_failing_shell_command_is_no_error(self):
        cell = self.run_cell("!false\n!echo after >&2")
        self.assertEqual((cell.status, cell.text() + cell.text("stderr")), ("ok", "after\n"))

    def test_a_large_result_arrives_whole(self):
        self.assertEqual(len(self.run_cell("'x' * 10_000_000").result), 10_000_002)


class KernelErrors(KernelCase):
    def test_an_error_is_published_and_replied(self):
        cell = self.run_cell("1/0")
        self.assertMessages(cell, "busy execute_input error idle")
        self.assertFails(cell, "ZeroDivisionError")
        self.assertEqual(cell.error["evalue"], "division by zero")

    def test_a_traceback_shows_the_lines_of_the_cell_in_colour(self):
        self.run_cell("def divide(x):\n    # far away\n    return 1 / x\n")
        cell = self.run_cell("first = 1\ndivide(0)")
        for line in ("divide(0)", "return 1 / x", "ZeroDivisionError: division by zero"):
            self.assertIn(line, cell.traceback)
        self.assertIn("\x1b[", "".join(cell.error["traceback"]))

    def test_a_traceback_shows_no_frame_of_the_kernel(self):
        for code in ("1/0", "1 +", "await nothing", "raise ValueError", "import no_such_module",
                     "import asyncio\nasync def f(): 1/0\nawait f()", "exec('1/0')",
                     "class R:\n    def __repr__(self): 1/0\nR()", "%nosuchmagic", "open('none')"):
            with self.subTest(code=code):
                cell = self.run_cell(code)
                text = cell.traceback if cell.error else cell.text("stderr")
                self.assertNotIn(str(HERE), text)
                self.assertNotIn("asyncio/", text)

    def test_a_syntax_error_shows_the_line_and_a_caret(self):
        cell = self.run_cell("x = 1\ny = = 2")
        self.assertFails(cell, "SyntaxError")
        self.assertRegex(cell.error["evalue"], r"\(Cell In\[\d+\], line 2\)$")
        self.assertRegex(cell.traceback, r"y = = 2\s*\n\s*\^")
        self.assertNotIn("another exception", cell.traceback)

    def test_a_chained_error_shows_its_cause(self):
        cell = self.run_cell("try:\n    1/0\nexcept ZeroDivisionError as e:\n"
                             "    raise ValueError('outer') from e")
        self.assertRegex(cell.traceback, r"(?s)ZeroDivisionError.*direct cause.*ValueError: outer")

    def test_a_piece_of_an_indented_program_runs(self):
        cell = self.run_cell("    def f(x):\n        return 2 * x\n    f(21)")
        self.assertEqual(cell.result, "42")
        cell = self.run_cell("    # a comment stands anywhere\n"
                             "!true\nprint(\"\"\"\n    kept\"\"\")")
        self.assertEqual(cell.text(), "\n    kept\n")

    def test_output_before_an_error_is_kept(self):
        cell = self.run_cell("print('before')\n1/0\nprint('after')")
        self.assertMessages(cell, "busy execute_input stream error idle")
        self.assertEqual(cell.text(), "before\n")

    def test_an_error_without_text_or_with_a_broken_text_is_shown(self):
        cell = self.run_cell("class Odd(Exception):\n    def __str__(self): raise RuntimeError\n"
                             "raise Odd")
        self.assertFails(cell, "Odd")
        self.assertWorks()

    def test_exceptions_that_end_a_program_do_not_end_the_kernel(self):
        for code in ("raise SystemExit(3)", "import sys; sys.exit('bye')",
                     "raise GeneratorExit", "raise BaseException"):
            with self.subTest(code=code):
                self.assertEqual(self.run_cell(code).status, "error")
        self.assertWorks()

    def test_endless_recursion_is_an_error_like_any_other(self):
        self.assertFails(self.run_cell("def f(): return f()\nf()"), "RecursionError")
        self.assertWorks()

    def test_cells_queued_behind_an_error_are_aborted(self):
        cells = [self.frontend.start(code) for code in (
            "import time\ntime.sleep(0.5)\n1/0", "print('never')", "never = True")]
        self.frontend.finish(*cells)
        self.assertEqual([cell.status for cell in cells], ["error", "aborted", "aborted"])
        for cell in cells[1:]:
            self.assertMessages(cell, "busy idle")
            self.assertIsInstance(cell.reply["content"]["execution_count"], int)
        self.assertFails(self.run_cell("never"), "NameError")

    def test_an_error_aborts_nothing_that_came_later(self):
        for _ in range(50):
            self.assertEqual(self.run_cell("1/0").status, "error")
            self.assertEqual(self.run_cell("1").status, "ok")

    def test_other_requests_queued_behind_an_error_are_answered(self):
        failing = self.frontend.start("import time\ntime.sleep(0.3)\n1/0")
        other = self.frontend.ask("is_complete_request", code="1")
        self.frontend.finish(failing, other)
        self.assertEqual(other.status, "complete")

    def test_with_stop_on_error_false_the_queue_goes_on(self):
        cells = [self.frontend.start("import time\ntime.sleep(0.3)\n1/0", stop_on_error=False),
                 self.frontend.start("'went on'")]
        self.frontend.finish(*cells)
        self.assertEqual(cells[1].result, "'went on'")


class KernelDisplay(KernelCase):
    def test_a_value_is_shown_in_every_form_it_has(self):
        for method, value, mime, data in [
                ("_repr_html_", "<b>x</b>", "text/html", "<b>x</b>"),
                ("_repr_markdown_", "*x*", "text/markdown", "*x*"),
                ("_repr_latex_", "$x$", "text/latex", "$x$"),
                ("_repr_svg_", "<svg/>", "image/svg+xml", "<svg/>"),
                ("_repr_json_", {"a": [1]}, "application/json", {"a": [1]}),
                ("_repr_png_", b"\x89PNG", "image/png", "iVBORw=="),
                ("_repr_jpeg_", b"\xff\xd8", "image/jpeg", "/9g="),
                ("_repr_javascript_", "1", "application/javascript", "1"),
                ("_repr_mimebundle_", {"x/y": "z"}, "x/y", "z")]:
            with self.subTest(method):
                cell = self.run_cell(
                    f"class Rich:\n    def {method}(self, *args, **options): return {value!r}\n"
                    "    def __repr__(self): return 'plain'\nRich()")
                self.assertEqual(cell.display[mime].strip() if mime == "image/png"
                                 else cell.display[mime], data)
                self.assertEqual(cell.display["text/plain"], "plain")

    def test_data_may_come_with_metadata(self):
        cell = self.run_cell("class Wide:\n    def _repr_png_(self): return b'x', {'width': 9}\n"
                             "Wide()")
        self.assertEqual(cell.of("execute_result")[0]["metadata"], {"image/png": {"width": 9}})

    def test_a_form_that_is_not_available_is_left_out(self):
        cell = self.run_cell("class Poor:\n    def _repr_html_(self): return None\n"
                             "    def __repr__(self): return 'poor'\nPoor()")
        self.assertEqual(cell.display, {"text/plain": "poor"})

    def test_a_class_is_not_shown_by_the_methods_of_its_instances(self):
        cell = self.run_cell("class Rich:\n    def _repr_html_(self): return '<b>'\nRich")
        self.assertEqual(list(cell.display), ["text/plain"])

    def test_an_object_that_answers_every_attribute_is_shown_as_text(self):
        cell = self.run_cell("class Any:\n    def __getattr__(self, name): return lambda *a: name\n"
                             "    def __repr__(self): return 'any'\nAny()")
        self.assertEqual((cell.display, cell.status), ({"text/plain": "any"}, "ok"))

    def test_a_form_that_is_refused_is_not_offered(self):
        for method in ("_repr_html_", "_repr_mimebundle_"):
            cell = self.run_cell(f"class Poor:\n    def {method}(self, *args, **options):\n"
                                 "        raise NotImplementedError\n"
                                 "    def __repr__(self): return 'poor'\nPoor()")
            self.assertMessages(cell, "busy execute_input execute_result idle")
            self.assertEqual(cell.display, {"text/plain": "poor"})

    def test_one_failing_form_does_not_lose_the_others(self):
        cell = self.run_cell("class Half:\n    def _repr_html_(self): 1/0\n"
                             "    def _repr_latex_(self): return '$x$'\n"
                             "    def __repr__(self): return 'half'\nHalf()")
        self.assertEqual(cell.display, {"text/plain": "half", "text/latex": "$x$"})
        self.assertIn("ZeroDivisionError", json.dumps([m["content"] for m in cell.messages]))

    def test_an_object_may_display_itself(self):
        cell = self.run_cell("class Own:\n    def _ipython_display_(self): print('own way')\nOwn()")
        self.assertMessages(cell, "busy execute_input stream idle")

    def test_display_publishes_each_object_in_order_with_the_streams(self):
        cell = self.run_cell("print('a')\ndisplay(1, 'two')\nprint('b')")
        self.assertMessages(
            cell, "busy execute_input stream display_data display_data stream idle")
        self.assertEqual([c["data"]["text/plain"] for c in cell.of("display_data")],
                         ["1", "'two'"])

    def test_a_display_with_an_id_can_be_updated(self):
        cell = self.run_cell("handle = display('old', display_id='spot')\nhandle.update('new')")
        (new,) = cell.of("update_display_data")
        self.assertEqual((new["transient"]["display_id"], new["data"]["text/plain"]),
                         ("spot", "'new'"))

    def test_the_display_module_of_ipython_works(self):
        cell = self.run_cell(
            "from IPython.display import HTML, Markdown, clear_output, display, display_html\n"
            "display(HTML('<i>h</i>'))\ndisplay(Markdown('*m*'))\nclear_output(wait=True)\n"
            "display_html('<u>raw</u>', raw=True)")
        self.assertMessages(cell, "busy execute_input display_data display_data clear_output "
                                  "display_data idle")
        shown = [c["data"] for c in cell.of("display_data")]
        self.assertEqual((shown[0]["text/html"], shown[1]["text/markdown"], shown[2]["text/html"]),
                         ("<i>h</i>", "*m*", "<u>raw</u>"))
        self.assertEqual(cell.of("clear_output"), [{"wait": True}])

    def test_an_image_is_sent_as_base64(self):
        cell = self.run_cell("from IPython.display import Image\n"
                             "Image(data=b'\\x89PNG\\r\\n\\x1a\\n', format='png')")
        self.assertEqual(base64.b64decode(cell.display["image/png"]), b"\x89PNG\r\n\x1a\n")

    @needs("matplotlib")
    def test_a_plot_is_shown_as_a_picture_with_no_configuration(self):
        cell = self.run_cell("import matplotlib.pyplot as plt\nplt.plot([1, 2]);", seconds=60)
        self.assertEqual(base64.b64decode(cell.display["image/png"])[:4], b"\x89PNG")


class KernelWithPyzmqAlone(KernelCase):
    """The same kernel where nothing but pyzmq is installed."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        python, env = bare_python(folder.name)
        cls.options = {"argv": [*python, *OURS[1:]], "env": env}
        super().setUpClass()

    def test_no_other_package_is_there(self):
        self.assertFails(self.run_cell("import jupyter_client"), "ModuleNotFoundError")
        self.assertWorks()

    def test_the_display_module_of_ipython_has_a_stand_in(self):
        KernelDisplay.test_the_display_module_of_ipython_works(self)
        KernelDisplay.test_an_image_is_sent_as_base64(self)

    def test_magics_need_nothing_either(self):
        KernelExecution.test_magics_and_shell_commands_that_notebooks_use(self)


class KernelOutput(KernelCase):
    def test_two_hundred_thousand_lines_arrive_whole_and_in_order(self):
        cell = self.run_cell("for i in range(200_000): print(i)", seconds=60)
        self.assertTrue(cell.text() == "".join(f"{i}\n" for i in range(200_000)),
                        f"{len(cell.text())} characters arrived")

    def test_the_first_output_comes_before_the_cell_ends(self):
        cell = self.frontend.start("print('early')\ninput()")
        self.frontend.until(lambda: cell.text() == "early\n")
        self.frontend.until(lambda: cell.questions)
        self.frontend.type("")
        self.frontend.finish(cell)

    def test_output_without_newline_comes_too(self):
        cell = self.frontend.start("print('50 %', end='')\ninput()")
        self.frontend.until(lambda: cell.text() == "50 %" and cell.questions)
        self.frontend.type("")
        self.frontend.finish(cell)

    def test_stdout_and_stderr_keep_their_order(self):
        cell = self.run_cell("import sys\nfor i in range(5):\n    print(i)\n"
                             "    print(i, file=sys.stderr)")
        texts = "".join(c["text"] for c in cell.of("stream"))
        self.assertEqual(texts, "".join(f"{i}\n{i}\n" for i in range(5)))

    def test_a_line_end_that_comes_a_little_late_joins_its_line(self):
        """As on a busy machine, between the two writes of `print`. Now and then it is too late."""
        code = ("import sys, time\nsys.stdout.write('line')\ntime.sleep(0.006)\n"
                "sys.stdout.write('\\n')\ntime.sleep(0.05)")
        lines = [[c["text"] for c in self.run_cell(code).of("stream")] for _ in range(5)]
        self.assertGreater(lines.count(["line\n"]), 2, lines)

    def test_the_beginning_of_a_line_is_shown_before_its_end(self):
        cell = self.frontend.start("print('Wait', end='')\ninput()")
        self.frontend.until(lambda: cell.text() == "Wait" and cell.questions)
        self.frontend.type("", cell.question)
        self.frontend.finish(cell)
        cell = self.frontend.start("import threading\nprint('Wait', end='')\n"
                                   "threading.Event().wait(1)\nprint('ed')")
        self.frontend.until(lambda: cell.text() == "Wait")
        self.assertEqual(self.frontend.finish(cell).text(), "Waited\n")

    def test_nothing_comes_after_idle(self):
        code = ("import os, subprocess, sys\nprint('python')\nos.write(1, b'descriptor\\n')\n"
                "subprocess.run([sys.executable, '-S', '-c', 'print(\"child\")'])\n"
                "os.write(2, b'error\\n');")
        cells = [self.run_cell(code) for _ in range(10)]
        self.assertWorks()
        for cell in cells:
            self.assertTrue(cell.story.endswith(" idle"), cell)
            self.assertEqual(sorted(cell.text().split()), ["child", "descriptor", "python"])

    def test_a_threads_output_belongs_to_the_cell_that_runs(self):
        first = self.run_cell(
            "import threading\nlater = threading.Event()\n"
            "thread = threading.Thread(target=lambda: (later.wait(), print('from thread')))\n"
            "thread.start()")
        second = self.run_cell("print('second')\nlater.set()\nthread.join()")
        self.assertEqual((first.text(), second.text()), ("", "second\nfrom thread\n"))

    def test_a_pools_output_belongs_to_the_cell_that_submitted_the_work(self):
        cell = self.run_cell(
            "from concurrent.futures import ThreadPoolExecutor\n"
            "with ThreadPoolExecutor(2) as pool: list(pool.map(print, 'ab'))")
        self.assertEqual(sorted(cell.text()), ["\n", "\n", "a", "b"])

    def test_output_of_child_processes_and_c_code_is_shown(self):
        for code, expected in [
                ("import os; os.write(1, b'descriptor\\n');", "descriptor\n"),
                ("import os; os.system('echo shell');", "shell\n"),
                ("import ctypes; c = ctypes.CDLL(None); c.puts(b'c'); c.fflush(None);", "c\n"),
                ("import subprocess; subprocess.run(['echo', 'child']);", "child\n")]:
            with self.subTest(code=code):
                self.assertEqual(self.run_cell(code).text(), expected)

    def test_a_forked_child_prints_once(self):
        cell = self.run_cell("import os, sys\nprint('parent')\npid = os.fork()\nif not pid:\n"
                             "    print('child', flush=True)\n    os._exit(0)\nos.waitpid(pid, 0);")
        self.assertEqual(sorted(cell.text().split()), ["child", "parent"])
        self.assertWorks()

    def test_a_character_split_over_two_writes_arrives_whole(self):
        cell = self.run_cell(
            "import os, time\nfor byte in 'é☃𝄞\\n'.encode():\n"
            "    os.write(1, bytes([byte]))\n    time.sleep(0.02)")
        self.assertEqual(cell.text(), "é☃𝄞\n")

    def test_many_characters_from_a_child_arrive_whole(self):
        cell = self.run_cell("import subprocess, sys\nsubprocess.run([sys.executable, '-S', '-X', "
                             "'utf8', '-c', 'print(\"é☃\" * 300_000)']);", seconds=60)
        self.assertTrue(cell.text() == "é☃" * 300_000 + "\n")

    def test_bytes_that_are_no_text_do_no_harm(self):
        self.assertIn("�", self.run_cell("import os; os.write(1, b'\\xff\\xfe\\n');").text())
        self.assertWorks()

    def test_the_streams_answer_what_libraries_ask(self):
        cell = self.run_cell("import sys\n(sys.stdout.isatty(), sys.stdout.encoding.lower(), "
                             "sys.stdout.writable(), sys.stdout.write('12'), sys.stdout.flush())")
        self.assertEqual(cell.result, "(False, 'utf-8', True, 2, None)")


class KernelStdin(KernelCase):
    def ask_user(self, code, *typed, **options):
        self.frontend.typed = list(typed)
        return self.run_cell(code, **options)

    def test_input_asks_the_frontend(self):
        cell = self.ask_user("input('Name? ')", "Ada ☃")
        self.assertEqual(cell.questions, [{"prompt": "Name? ", "password": False}])
        self.assertEqual(cell.result, "'Ada ☃'")

    def test_getpass_asks_for_a_hidden_answer(self):
        cell = self.ask_user("import getpass\ngetpass.getpass('Word? ')", "secret")
        self.assertEqual(cell.questions, [{"prompt": "Word? ", "password": True}])
        self.assertEqual(cell.result, "'secret'")

    def test_input_may_ask_again_and_again(self):
        cell = self.ask_user("[input() for _ in range(3)]", "a", "", "c")
        self.assertEqual(cell.result, "['a', '', 'c']")

    def test_a_question_waits_for_a_frontend_that_connects_late(self):
        nowhere = free_ports(1)[0]
        wire = ZeroMQWire({**self.kernel.connection, "stdin_port": nowhere})
        self.addCleanup(wire.close)
        frontend = Frontend(wire)
        frontend.greet()
        cell = frontend.start("print('asking')\ninput()")
        frontend.until(lambda: cell.text())
        wire.sockets["stdin"].disconnect(f"tcp://127.0.0.1:{nowhere}")
        wire.sockets["stdin"].connect("tcp://{ip}:{stdin_port}".format(**self.kernel.connection))
        frontend.until(lambda: cell.questions)
        frontend.type("late")
        self.assertEqual(frontend.finish(cell).result, "'late'")

    def test_what_was_printed_is_shown_before_the_question(self):
        cell = self.frontend.start("print('read this')\ninput()")
        self.frontend.until(lambda: cell.questions and cell.text())
        self.frontend.type("")
        self.assertEqual(self.frontend.finish(cell).text(), "read this\n")

    def test_a_control_d_is_the_end_of_input(self):
        self.assertFails(self.ask_user("input()", "\x04"), "EOFError")

    def test_a_frontend_that_cannot_answer_is_not_asked(self):
        for code in ("input()", "import getpass; getpass.getpass()"):
            with self.subTest(code=code):
                cell = self.run_cell(code, allow_stdin=False)
                self.assertEqual((cell.status, cell.questions), ("error", []))

    def test_an_answer_nobody_waits_for_is_forgotten(self):
        self.frontend.type("stale")
        self.assertWorks()
        self.assertEqual(self.ask_user("input()", "fresh").result, "'fresh'")


class KernelInterrupt(KernelCase):
    SITUATIONS = {
        "running": "print('ready')\nwhile True: pass",
        "sleeping": "import time\nprint('ready')\ntime.sleep(60)",
        "awaiting": "import asyncio\nprint('ready')\nawait asyncio.sleep(60)",
        "running in async code": "async def spin():\n    print('ready')\n    while True: pass\n"
                                 "await spin()",
        "sleeping in async code": "import asyncio, time\nasync def f():\n"
                                  "    await asyncio.sleep(0)\n    print('ready')\n"
                                  "    time.sleep(60)\nawait f()",
        "waiting for a child": "import subprocess\nprint('ready')\nsubprocess.run(['sleep', '60'])",
        "waiting for a thread": "import threading\nprint('ready')\nthreading.Event().wait()",
        "input": "print('ready')\ninput()",
    }

    def interrupted(self, code, interrupt):
        cell = self.frontend.start(code)
        self.frontend.until(lambda: "ready" in cell.text())
        if "input()" in code:
            self.frontend.until(lambda: cell.questions)
        interrupt()
        return self.frontend.finish(cell)

    def test_a_signal_stops_a_cell(self):
        for situation, code in self.SITUATIONS.items():
            with self.subTest(situation):
                cell = self.interrupted(code, self.kernel.interrupt)
                self.assertFails(cell, "KeyboardInterrupt")

    def test_an_interrupt_right_after_a_late_one_is_a_new_one(self):
        """While C code runs, Python cannot call the handler: the interrupt is late."""
        for _ in range(2):
            late = self.interrupted("print('ready')\nwhile True: sum(range(3_000_000))",
                                    self.kernel.interrupt)
            self.assertFails(late, "KeyboardInterrupt")
            self.assertMessages(late, "busy execute_input stream error idle")
            new = self.interrupted("print('ready', flush=True)\ninput()", self.kernel.interrupt)
            self.assertFails(new, "KeyboardInterrupt")

    def test_of_a_stopped_shell_command_the_traceback_shows_the_users_line(self):
        cell = self.interrupted("!echo ready; sleep 60", self.kernel.interrupt)
        self.assertFails(cell, "KeyboardInterrupt")
        self.assertIn("sleep 60", cell.traceback)
        self.assertNotIn("subprocess.py", cell.traceback)

    def test_an_interrupt_request_stops_a_cell(self):
        for situation, code in self.SITUATIONS.items():
            with self.subTest(situation):
                cell = self.interrupted(
                    code, lambda: self.request("interrupt_request", "control"))
                self.assertFails(cell, "KeyboardInterrupt")

    def test_an_interrupt_is_answered_between_busy_and_idle(self):
        answer = self.request("interrupt_request", "control")
        self.assertMessages(answer, "busy idle")
        self.assertEqual(answer.status, "ok")

    def test_an_interrupt_does_nothing_to_an_idle_kernel(self):
        self.run_cell("kept = 'kept'")
        for _ in range(3):
            self.kernel.interrupt()
            self.request("interrupt_request", "control")
        self.assertEqual(self.run_cell("kept").result, "'kept'")

    def test_a_cell_may_catch_its_interrupt(self):
        cell = self.interrupted("import time\ntry:\n    print('ready')\n    time.sleep(60)\n"
                                "except KeyboardInterrupt:\n    'caught'\nfinally:\n"
                                "    print('cleaned')\n'went on'", self.kernel.interrupt)
        self.assertEqual((cell.text(), cell.result), ("ready\ncleaned\n", "'went on'"))

    def test_an_interrupt_drops_the_queued_cells(self):
        first = self.frontend.start("import time\nprint('ready')\ntime.sleep(60)")
        second = self.frontend.start("'never'")
        self.frontend.until(lambda: first.text())
        queued = self.frontend.ask("kernel_info_request")   # its answer tells that all has come
        self.frontend.until(lambda: queued.reply)
        self.kernel.interrupt()
        self.frontend.finish(first, second)
        self.assertEqual((first.status, second.status), ("error", "aborted"))

    def test_a_background_task_survives_an_interrupt(self):
        self.run_cell("import asyncio\ntask = asyncio.create_task(asyncio.sleep(60))")
        self.interrupted("print('ready')\nwhile True: pass", self.kernel.interrupt)
        self.assertEqual(self.run_cell("task.done()").result, "False")


class KernelBadMessages(KernelCase):
    """Bad messages get no answer, are logged in one line, and the next good one works."""

    def parts(self, **fields):
        return packed(kernel.Session(self.kernel.connection["key"]), **fields)

    def assertShruggedOff(self, *messages):
        lines = len(self.kernel.process.lines)
        for channel in ("shell", "control", "stdin"):
            for parts in messages:
                self.frontend.wire.send_parts(channel, parts)
        self.assertWorks()
        self.assertEqual(self.request("kernel_info_request", "control").status, "ok")
        self.assertNotIn("Traceback", "".join(self.kernel.process.lines[lines:]))

    def test_a_forged_message_is_ignored(self):
        self.assertShruggedOff([b"<IDS|MSG>", b"0" * 64, *self.parts()[2:]],
                               packed(kernel.Session("other key")),
                               [b"<IDS|MSG>", b"", *self.parts()[2:]])

    def test_a_replayed_message_is_ignored(self):
        session = self.frontend.session
        message = session.message("execute_request", {"code": "times = globals().get('times', 0)"
                                                              " + 1", "allow_stdin": False})
        parts = self.frontend.wire.session.pack(message)
        self.assertShruggedOff(parts, parts)
        self.assertEqual(self.run_cell("times").result, "1")

    def test_a_truncated_message_is_ignored(self):
        parts = self.parts()
        self.assertShruggedOff(*[parts[:n] for n in range(1, len(parts))])

    def test_a_message_without_delimiter_is_ignored(self):
        self.assertShruggedOff(self.parts()[1:], [b""], [b"", b"", b""])

    def test_a_message_that_is_not_json_is_ignored(self):
        key = self.kernel.connection["key"]
        self.assertShruggedOff(
            signed(key, b"{", b"{}", b"{}", b"{}"), signed(key, b"\xff", b"{}", b"{}", b"{}"),
            signed(key, b"{}", b"{}", b"{}", b"{}"), signed(key, b"[]", b"[]", b"[]", b"[]"))

    def test_fields_of_a_wrong_type_do_no_harm(self):
        for content in ({}, {"code": None}, {"code": 7}, {"code": ["1"]},
                        {"code": "1", "user_expressions": []}):
            with self.subTest(content=content):
                answer = self.frontend.ask("execute_request", **content)
                self.frontend.until(lambda answer=answer: answer.is_idle)
                self.assertWorks()

    def test_a_huge_message_is_read(self):
        self.assertEqual(self.run_cell("len(" + repr("x" * 20_000_000) + ")").result, "20000000")


class KernelLife(Case):
    """Each test has a kernel of its own, for it ends it."""

    def start(self, **options):
        own = KernelProcess(**options)
        self.addCleanup(own.end)
        frontend = own.connect()
        self.addCleanup(frontend.wire.close)
        return own, frontend

    def test_a_shutdown_request_ends_the_process(self):
        for restart in (False, True):
            with self.subTest(restart=restart):
                own, frontend = self.start()
                answer = frontend.ask("shutdown_request", "control", restart=restart)
                frontend.until(lambda answer=answer: answer.reply)
                self.assertEqual(answer.reply["content"], {"status": "ok", "restart": restart})
                self.assertEqual(own.process.exit_code(), 0)

    def test_a_shutdown_request_ends_even_a_busy_kernel(self):
        own, frontend = self.start()
        cell = frontend.start("print('ready')\nwhile True: pass")
        frontend.until(lambda: cell.text())
        frontend.ask("shutdown_request", "control", restart=False)
        own.process.exit_code()

    def test_an_unsigned_kernel_answers(self):
        _, frontend = self.start(key="")
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")

    def test_starting_comes_first(self):
        for _ in range(8):
            own, frontend = self.start()
            if "starting" in frontend.log:
                self.assertLess(frontend.log.index("starting"), frontend.log.index("busy"))
            own.end()

    def test_requests_wait_until_a_new_kernel_is_heard(self):
        """A client's sockets come one by one; what iopub said before its own came is lost."""
        own = KernelProcess()
        self.addCleanup(own.end)
        frontend = Frontend(ZeroMQWire(own.connection, ["shell", "control"]))
        self.addCleanup(frontend.wire.close)
        cell = frontend.start("6 * 7")
        for _ in range(50):   # the kernel is there, and would have run the cell by now
            answer = frontend.ask("kernel_info_request", "control")
            frontend.until(lambda answer=answer: answer.reply)
        frontend.wire.connect("iopub", zmq.SUB)
        self.assertMessages(frontend.finish(cell), "busy execute_input execute_result idle")

    def test_a_kernel_that_nobody_hears_answers_too(self):
        own = KernelProcess()
        self.addCleanup(own.end)
        frontend = Frontend(ZeroMQWire(own.connection, ["shell"]))
        self.addCleanup(frontend.wire.close)
        cell = frontend.start("6 * 7")
        frontend.until(lambda: cell.reply)
        self.assertEqual(cell.status, "ok")

    def test_two_frontends_see_each_others_cells(self):
        own, first = self.start()
        second = own.connect()
        self.addCleanup(second.wire.close)
        cell = first.finish(first.start("print('for all')"))
        second.until(lambda: any(m["header"]["msg_type"] == "stream" for m in second.unasked))
        self.assertEqual(cell.text(), "for all\n")

    def test_an_interrupt_while_starting_up_does_not_stop_the_kernel(self):
        own, frontend = self.start()
        for _ in range(20):
            own.interrupt()
            self.assertEqual(frontend.finish(frontend.start("1")).status, "ok")

    def test_output_at_exit_reaches_nobody_and_harms_nobody(self):
        own, frontend = self.start()
        frontend.finish(frontend.start("import atexit; atexit.register(print, 'bye')"))
        frontend.ask("shutdown_request", "control", restart=False)
        self.assertEqual(own.process.exit_code(), 0)


# ---- 4. The kernel, driven by jupyter_client and nbclient ------------------------
#
# What Jupyter's own clients do with a kernel. A kernel spec in a temporary folder is all they
# are told. ipykernel runs the same notebooks, and its outcome is the expectation.


def outcome(nb):
    """Per code cell: how its outputs look, without what differs from run to run."""
    return [merged([shape(output) for output in cell["outputs"]])
            for cell in nb["cells"] if cell["cell_type"] == "code"]


def shape(output):
    """An output in a word: stream stdout, error NameError, execute_result text/plain ..."""
    detail = output.get("name") or output.get("ename") or " ".join(sorted(output.get("data", [])))
    return f"{output['output_type']} {detail}"


def prepared(name, folder):
    """A sample notebook as JSON, made fit for a test: nothing to download, nobody to wait for."""
    nb = json.loads((NOTEBOOKS / name).read_text("utf-8"))
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        cell["source"] = re.sub("from time +import sleep", "sleep = lambda seconds: None", source)
    (folder / "npdict.txt").write_text("a man\na plan\na canal\nPanama\n" * 3)
    (folder / "anpdict.txt").write_text("a man\na plan\na canal\nPanama\n" * 3)
    return nb


@needs("jupyter_client")
class JupyterClient(Case):
    argv = OURS

    def setUp(self):
        from jupyter_client.manager import KernelManager
        folder = self.folder()
        install_kernelspec(folder, "mini", self.argv)
        self.manager = KernelManager(kernel_name="mini")
        self.manager.kernel_spec_manager.kernel_dirs = [str(folder / "kernels")]
        self.manager.start_kernel(cwd=str(folder), env=clean_environment(folder))
        self.addCleanup(self.manager.shutdown_kernel, now=True)
        self.client = self.manager.client()
        self.client.start_channels()
        self.addCleanup(self.client.stop_channels)
        self.client.wait_for_ready(timeout=SECONDS)

    def execute(self, code, **options):
        streams = []
        reply = self.client.execute_interactive(
            code, timeout=SECONDS, output_hook=streams.append, **options)
        return reply["content"], [m["header"]["msg_type"] for m in streams]

    def test_execute_interactive_sees_output_and_reply(self):
        reply, types = self.execute("print(1); 2")
        self.assertEqual(reply["status"], "ok")
        types = [msg_type for msg_type, _ in itertools.groupby(types)]   # the text may be in pieces
        self.assertEqual([t for t in types if t != "status"],
                         ["execute_input", "stream", "execute_result"])

    def test_the_client_answers_input(self):
        reply, _ = self.execute("assert input('? ') == 'yes'", allow_stdin=True,
                                stdin_hook=lambda message: self.client.input("yes"))
        self.assertEqual(reply["status"], "ok")

    def test_the_client_sees_the_heartbeat(self):
        self.assertTrue(self.client.is_alive())

    def test_the_manager_interrupts(self):
        msg_id = self.client.execute("print('ready')\nwhile True: pass")
        wait_until(lambda: self.client.get_iopub_msg(timeout=SECONDS)["msg_type"] == "stream")
        self.manager.interrupt_kernel()
        reply = self.client.get_shell_msg(timeout=SECONDS)
        self.assertEqual((reply["parent_header"]["msg_id"], reply["content"]["ename"]),
                         (msg_id, "KeyboardInterrupt"))

    def test_the_manager_restarts(self):
        self.execute("old = 1")
        self.manager.restart_kernel()
        self.client.wait_for_ready(timeout=SECONDS)
        self.assertEqual(self.execute("old")[0]["ename"], "NameError")

    def test_the_manager_shuts_down_without_force(self):
        process = self.manager.provisioner.process
        self.manager.shutdown_kernel()
        self.assertEqual(process.returncode, 0)


def execute(name, argv):
    """A sample notebook as nbclient runs it on a kernel, errors allowed. The manager looks for free
    ports; when one is taken before the kernel binds it, the kernel dies, and is started again."""
    try:
        return execute_once(name, argv)
    except RuntimeError as problem:
        if "died before replying to kernel_info" not in str(problem):
            raise
        return execute_once(name, argv)


def execute_once(name, argv):
    import nbformat
    with tempfile.TemporaryDirectory() as folder:
        nb = nbformat.from_dict(prepared(name, Path(folder)))
        run_by_nbclient(nb, argv, Path(folder))
    return nb


def run_by_nbclient(nb, argv, folder):
    """Run a notebook in a folder on the kernel that `argv` starts, errors allowed."""
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    install_kernelspec(folder, "python3", argv)
    manager = AsyncKernelManager(kernel_name="python3")
    manager.kernel_spec_manager.kernel_dirs = [str(folder / "kernels")]
    NotebookClient(nb, km=manager, timeout=120, allow_errors=True,
                   resources={"metadata": {"path": str(folder)}}).execute(cleanup_kc=True)


def executed_on_both(name):
    """A sample notebook as it is after it has run on this kernel, and on ipykernel."""
    with ThreadPoolExecutor(2) as pool:
        return [*pool.map(execute, [name, name], [OURS, IPYKERNEL])]


def outcome_on_ipykernel(name):
    with ThreadPoolExecutor(1) as pool:  # a thread of its own: the page's tests run a loop here
        return outcome(pool.submit(execute, name, IPYKERNEL).result())


@needs("nbclient", "nbformat", "ipykernel")
class Nbclient(Case):
    @needs_notebooks
    def test_real_notebooks_run_as_on_ipykernel(self):
        for name in ("Differentiation", "Palindrome", "PropositionalLogic"):
            with self.subTest(name):
                self.assertEqual(*map(outcome, executed_on_both(f"pytudes-{name}.ipynb")))


# ---- 5. The kernel, whole: every message, magic and library -----------------------------
#
# `asked` sends what Frontend.ask cannot: buffers, and a header that names a subshell.


def asked(frontend, msg_type, channel="shell", subshell_id=None, buffers=(), **content):
    """Send a request that names a subshell or carries buffers; returns its Answer."""
    message = frontend.session.message(msg_type, content, buffers=buffers)
    if subshell_id is not None:
        message["header"]["subshell_id"] = subshell_id
    answer = frontend.answers[message["header"]["msg_id"]] = Answer(message)
    frontend.wire.send(channel, message)
    return answer


def python_without(folder, *hidden):
    """(python, environment) that sees all installed packages but those with a hidden name."""
    site = Path(zmq.__file__).parent.parent
    for entry in site.iterdir():
        if not entry.name.lower().startswith(hidden):
            (Path(folder) / entry.name).symlink_to(entry)
    return [sys.executable, "-S"], clean_environment(folder, PYTHONPATH=str(folder))


def plain_text(text):
    """Text without ANSI colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


class KernelQuestions(KernelCase):
    """Completion, inspection and history: never by running the user's code."""

    SETUP = """if True:
        import collections, json, os
        class Watched:
            'A class that tells who calls it.'
            calls = []
            def __init__(self, alpha, beta=1): self.alpha = alpha
            def method(self, first, *, key=3): 'Doc of method.'
            @property
            def tempting(self): Watched.calls.append('property'); return self
            def __getattr__(self, name): Watched.calls.append(name); raise AttributeError(name)
            def __dir__(self): Watched.calls.append('dir'); return []
            def __repr__(self): Watched.calls.append('repr'); return 'watched'
        watched = Watched(1)
        listed = [watched]
        def greet(first, second=2):
            'Doc of greet.'
            return first
        bare_global = 1
        words = {'key one': 1, 'k2': 2, 'ключ': 3}
        mixed = {'text': 1, 7: 2, b'raw': 3, (1, 'a'): 4, (1, 'b'): 5, (2, 'c'): 6}
        counted = collections.Counter(apple=1)
    """

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        setup = cls.SETUP
        cls.frontend.finish(cls.frontend.start(setup))

    def complete(self, code, cursor=None):
        reply = self.request("complete_request", code=code, cursor_pos=len(
            code) if cursor is None else cursor).reply["content"]
        return reply["matches"], reply["cursor_start"], reply["cursor_end"]

    def inspect(self, code, detail=0):
        reply = self.request("inspect_request", code=code, cursor_pos=len(code),
                             detail_level=detail).reply["content"]
        return plain_text(reply["data"].get("text/plain", "")) if reply["found"] else None

    def test_completion_offers_what_may_stand_at_the_cursor(self):
        folder = self.folder()
        (folder / "a file.txt").touch()
        for code, match, start in [
                ("watched.al", "alpha", 8), ("watched.meth", "method", 8),
                ("bare_g", "bare_global", 0),
                ("os.path.jo", "join", 8), ("import collec", "collections", 7),
                ("from collections import Coun", "Counter", 24), ("import json.de", "decoder", 12),
                ("words['key", "key one", 7), ('words["', "k2", 7), ("words['кл", "ключ", 7),
                ("counted['ap", "apple", 9),
                (f"open('{folder}/a f", "a file.txt", len(f"open('{folder}/")),
                (f"!ls -l {folder}/a", "a file.txt", len(f"!ls -l {folder}/")),
                (f"x = !cat {folder}/", "a file.txt", len(f"x = !cat {folder}/")),
                (f"%cat {folder}/", "a file.txt", len(f"%cat {folder}/")),
                ("%mat", "%matplotlib", 0), ("%%ti", "%%timeit", 0), ("greet(fi", "first=", 6),
                ("greet(1, sec", "second=", 9), ("Watched(al", "alpha=", 8), ("impor", "import", 0),
                ("watched.method(ke", "key=", 15), ("local = 1\nloc", "local", 10),
                ("'😀'; watched.al", "alpha", 13), ("watched . al", "alpha", 10)]:
            with self.subTest(code=code):
                matches, begin, end = self.complete(code)
                self.assertIn(match, matches)
                self.assertEqual((begin, end), (start, len(code)))

    def test_completion_knows_what_the_cell_would_define(self):
        for code, match in [
                ("import os.path as place\nplace.jo", "join"), ("import wave\nwave.op", "open"),
                ("from xml import dom, sax\nif dom:\n    sax.make_", "make_parser"),
                ("%matplotlib inline\nname = 'a'\nname.up", "upper"),
                ("for x in []:\n    found = [x]\n    found.app", "append"),
                ("from collections import Counter\nc = Counter()\nc.most", "most_common"),
                ("class New:\n    def method(self): pass\nnew = New()\nnew.met", "method"),
                ("def f(x):\n    d = {}\n    return print(\n        d.ke", "keys"),
                ("try:\n    w = watched\n    w.al", "alpha")]:
            with self.subTest(code=code):
                self.assertIn(match, self.complete(code)[0])
        self.assertEqual(self.run_cell("'wave' in __import__('sys').modules").result, "False")

    def test_a_line_may_hold_an_import_and_its_use(self):
        self.assertIn("open", self.complete("import wave; wave.op")[0])

    def test_code_within_an_f_string_is_completed_as_code(self):
        for code, match in [("f'{os.pa", "path"), ('print(f"at {watched.al', "alpha"),
                            ("f'{words[\"k", "k2")]:
            with self.subTest(code=code):
                self.assertIn(match, self.complete(code)[0])
        for code in ("'{os.pa", "f'{{os.pa", "f'{os.name} os.pa"):
            with self.subTest(code=code):
                self.assertNotIn("path", self.complete(code)[0])

    def test_an_opened_bracket_offers_the_keys_first(self):
        for code, first in [("words[", ["'k2'", "'key one'", "'ключ'"]),
                            ("mixed[", ["'text'", "1", "2", "7", "b'raw'"]), ("mixed[7", ["7"]),
                            ("mixed[1, ", ["'a'", "'b'"]), ("mixed[1, '", ["a", "b"]),
                            ("mixed[b'", ["raw"]), ("counted[", ["'apple'"])]:
            with self.subTest(code=code):
                self.assertEqual(self.complete(code)[0][:len(first)], first)

    def test_a_key_is_offered_as_it_is_written_between_these_quotes(self):
        self.run_cell("""quotes = {'it\\'s "so"': 1}""")
        self.assertEqual(self.complete("quotes['")[0], ["it\\'s \"so\""])
        self.assertEqual(self.complete('quotes["')[0], ["it's \\\"so\\\""])

    def test_a_letter_is_typed_by_its_name(self):
        for code, letter, start in [("\\alpha", "α", 0), ("x = \\Delta", "Δ", 4),
                                    ("\\varphi", "φ", 0), ("x\\hat", "\u0302", 1)]:
            with self.subTest(code=code):
                self.assertEqual(self.complete(code), ([letter], start, len(code)))
        self.assertIn("\\alpha", self.complete("\\al")[0])

    def test_twenty_thousand_names_complete_at_once(self):
        names = {f"name_{number}": number for number in range(20_000)}
        seconds, matches = fastest(lambda: kernel.complete("nam", 3, names)[0])
        self.assertEqual(len(matches), kernel.MOST_MATCHES)
        self.assertIn("name_19999", matches)   # the latest ones are kept
        self.assertLess(seconds, 0.02)   # about 5 ms

    def test_a_long_cell_in_a_large_notebook_completes_at_once(self):
        names = {f"name_{number}": number for number in range(20_000)}
        code = "\n".join([*(f"word{number} = 1" for number in range(500)), "wave.op"])
        seconds, _ = fastest(lambda: kernel.complete(code, len(code), names), 3)
        self.assertLess(seconds, 0.1)   # about 20 ms

    def test_in_a_call_its_parameters_come_first(self):
        self.assertEqual(self.complete("watched.method(")[0][:2], ["first=", "key="])

    def test_completion_offers_nothing_where_it_knows_nothing(self):
        for code in ("greet(1).bare_g", "listed[0].bare_g", "'text'.bare_g", "1.", "nobody.bare_g",
                     "watched.tempting.bare_g", "words['bare_g", "greet(self"):
            with self.subTest(code=code):
                self.assertEqual(self.complete(code)[0], [])

    def test_completion_looks_at_the_code_before_the_cursor_only(self):
        self.assertEqual(self.complete("watched.al + words", 10), (["alpha"], 8, 10))
        self.assertEqual(self.complete("'😀'; watched.al + 1", 15), (["alpha"], 13, 15))

    def test_completion_tells_jupyterlab_the_types(self):
        code = "'😀'; gre"
        metadata = self.request("complete_request", code=code, cursor_pos=len(code)).reply[
            "content"]["metadata"]
        (match,) = metadata["_jupyter_types_experimental"]
        self.assertEqual({**match, "signature": ""}, {
            "start": 5, "end": 8, "text": "greet", "type": "function", "signature": ""})

    def test_questions_never_run_the_users_code(self):
        self.run_cell("Watched.calls.clear()")
        for code in ("watched.", "watched.tempting.", "watched.nothing.", "listed[0].", "listed",
                     "watched", "watched.tempting", "watched.method("):
            self.complete(code), self.inspect(code), self.inspect(code, 1)
        self.assertEqual(self.run_cell("Watched.calls").result, "[]")

    def test_a_long_word_in_the_cell_does_not_hold_up_the_answer(self):
        code = "blob = '" + "deadbeef" * 100_000 + "'\nwatched.al"
        self.assertEqual(self.complete(code)[0], ["alpha"])
        self.assertIn("Doc of greet", self.inspect(code[:-10] + "greet"))

    def test_a_value_that_cannot_be_shown_does_not_hold_up_later_answers(self):
        self.run_cell("class Endless:\n    def __repr__(self):\n        while True: pass\n"
                      "endless = [Endless()]\ndef f(x=endless[0]): pass")
        for code in ("endless", "f"):
            self.frontend.ask("inspect_request", code=code, cursor_pos=len(code), detail_level=0)
        self.assertEqual(self.complete("watched.al")[0], ["alpha"])

    def test_inspection_names_what_it_shows(self):
        for code, detail, *parts in [
                ("greet", 0, "Signature:", "greet(first, second=2)", "Docstring:", "Doc of greet.",
                 "Type:", "function"),
                ("greet", 1, "Source:", "return first"), ("greet(1, ", 0, "Doc of greet."),
                ("Watched", 1, "class Watched", "Source:"),
                ("watched.method", 0, "watched.method(first, *, key=3)", "Doc of method."),
                ("'😀'; greet", 0, "Doc of greet."), ("len", 0, "Docstring:", "len(obj, /)"),
                ("words", 0, "Type:", "dict", "Length:", "3"),
                ("json.dumps", 1, "Source:", "def dumps"),
                ("x = 1\n%time", 0, "%time", "Docstring:", "method")]:
            with self.subTest(code=code, detail=detail):
                text = self.inspect(code, detail)
                for part in parts:
                    self.assertIn(part, text or "nothing")

    def test_the_labels_are_those_of_ipython(self):
        self.run_cell("class Called:\n    'A class.'\n    def __init__(self, a): 'Makes one.'\n"
                      "    def __call__(self, b): 'Calls it.'\ncalled, number = Called(1), 41")
        for code, *labels in [
                ("greet", "Signature", "Docstring", "File", "Type"),
                ("Called", "Init signature", "Docstring", "Init docstring", "Type"),
                ("called", "Signature", "Type", "String form", "Docstring", "Init docstring",
                 "Call docstring"),
                ("number", "Type", "String form", "Docstring"),
                ("words", "Type", "String form", "Length", "Docstring"),
                ("json", "Type", "String form", "Docstring", "File"),
                ("len", "Signature", "Docstring", "Type"), ("watched", "Type", "Docstring")]:
            with self.subTest(code=code):
                found = re.findall(r"^([A-Z][a-z]+(?: [a-z]+)?):(?: |$)", self.inspect(code), re.M)
                self.assertEqual(found, labels)

    def test_a_string_form_runs_no_code_and_stays_short(self):
        self.run_cell("long, holds, nothing = 'x' * 1000, [watched], [1, 'a']")
        self.assertIn("String form: [1, 'a']", self.inspect("nothing"))
        self.assertIn(" <...> ", self.inspect("long"))
        self.assertNotIn("String form", self.inspect("holds"))

    def test_inspection_of_the_unknown_is_found_false(self):
        for code in ("nobody", "nobody.x", "", "watched.tempting", "1 + ", "watched.nothing"):
            with self.subTest(code=code):
                reply = self.request("inspect_request", code=code, cursor_pos=len(code),
                                     detail_level=0).reply["content"]
                self.assertEqual(reply, {"status": "ok", "found": False, "data": {},
                                         "metadata": {}})

    def test_questions_are_answered_while_a_cell_blocks(self):
        cell = self.frontend.start("import time\nprint('ready')\nwhile True: time.sleep(60)")
        self.frontend.until(lambda: cell.text())
        self.assertEqual(self.complete("watched.al")[0], ["alpha"])
        self.assertIn("Doc of greet.", self.inspect("greet"))
        for msg_type, content in [
                ("history_request", {"hist_access_type": "tail", "n": 1, "raw": True,
                                     "output": False}),
                ("is_complete_request", {"code": "1"}), ("comm_info_request", {}),
                ("usage_request", {}), ("connect_request", {})]:
            with self.subTest(msg_type):
                self.assertMessages(self.request(msg_type, **content), "busy idle")
        self.assertFalse(cell.is_done)
        self.kernel.interrupt()
        self.assertFails(self.frontend.finish(cell), "KeyboardInterrupt")

    def test_a_question_without_its_fields_is_answered_with_an_error(self):
        for msg_type, content in [
                ("complete_request", {}), ("complete_request", {"code": 1, "cursor_pos": 0}),
                ("complete_request", {"code": "a", "cursor_pos": "x"}), ("inspect_request", {}),
                ("history_request", {"hist_access_type": "search", "pattern": 3}),
                ("history_request", {"hist_access_type": "tail", "n": "many"}),
                ("is_complete_request", {"code": None})]:
            with self.subTest(msg_type, content=content):
                answer = self.request(msg_type, **content)
                self.assertEqual((answer.status, answer.story), ("error", "busy idle"))
        self.assertEqual(self.complete("watched.al")[0], ["alpha"])


class IsComplete(Case):
    """Should Enter run the cell? IPython says so, but for what `OTHERWISE` names."""

    COMPLETE = (
        "", "\n", "x", "x\n", "x;", "x; y", "# c", "x # c", "f(1,\n  2)", "x = 1 + \\\n 2",
        "d = {1: 2,\n     3: 4}", "[1,\n2]", "x = [\n  1,\n]", "\"\"\"a\n  b\"\"\"", "f'{x}'",
        "x = \"\"\"a\n  b\"\"\"", "@d\ndef f(): pass", "@d\ndef f():\n    pass\n", "if x: y",
        "if x:\n    y\n", "if x:\n    y\n\n", "if x:\n    y\n    ", "for x in y: pass",
        "def f(x,\n      y): pass", "class A: pass", "if x:\n    y\nz", "lambda: 1", "await f()",
        "try:\n    x\nexcept E:\n    y\n", "match x:\n    case 1:\n        pass\n", "    x",
        "async def f():\n    await g()\n", "   x\n   y", ">>> x", "%%time\nx\n\n", "%time f(",
        "%time x", "!ls", "!ls (", "x = !ls", "x = %pwd", "f?", "?f", "f??", "  f?",
        "for x in y:\n    %time x\n", "for x in y:\n    !ls\n")
    INCOMPLETE = {   # code -> indentation of the next line
        "x = 1 + \\": "", "d = {1: 2,": "", "\"\"\"a\n  b": "  ", "x = (": "", "def f(": "",
        "@d": "", "@d\ndef f():": "    ", "@d\ndef f():\n    pass": "    ", "if x:": "    ",
        "if x:\n    y": "    ", "if x:\n    y\nelse:": "    ", "try:\n    x": "    ",
        "class A:\n    x = 1\n\n    y = 2": "    ", "if x:\n    \"\"\"\n  a\"\"\"": "  ",
        "while 1:\n    f(1,\n      2)": "      ", "for x in y:\n  if z:\n    w": "    ",
        "match x:\n    case 1:\n        pass": "        ", "%%time": "", "%%time\n": "",
        "%%time\nx": "", "%%time\nx\n": "", "!ls \\": "", ">>> if x:": "    ",
        "if x:\n    !ls": "    ", "for x in y:\n    %time x": "    "}
    INVALID = ("a b", "1 +", "x = )", "return 1", "print 1", "\"abc", "0777", "f'{x'",
               "if x:\n    y\n  z")
    OTHERWISE = {   # code -> ours; IPython reads tokens and waits for more, Python knows better
        "f(\"": ("invalid", ""), "f(?": ("invalid", ""), "lambda:": ("invalid", ""),
        "else:": ("invalid", ""), "if x:\n\ty": ("incomplete", "\t"),
        "try:\n    x\n": ("incomplete", ""),
        "def f(x,\n      y):": ("incomplete", "          ")}

    @property
    def table(self):
        return {**dict.fromkeys(self.COMPLETE, ("complete", "")),
                **{code: ("incomplete", indent) for code, indent in self.INCOMPLETE.items()},
                **dict.fromkeys(self.INVALID, ("invalid", ""))}

    def test_whole_begun_and_broken_input_are_told_apart(self):
        for code, answer in {**self.table, **self.OTHERWISE}.items():
            with self.subTest(code=code):
                self.assertEqual(kernel.is_complete(code), answer)

    @needs("IPython")
    def test_ipython_says_the_same(self):
        from IPython.core.inputtransformer2 import TransformerManager
        manager = TransformerManager()
        for code, answer in self.table.items():
            with self.subTest(code=code):
                status, indent = manager.check_complete(code)
                self.assertEqual((status, " " * (indent or 0)), answer)
        for code, answer in self.OTHERWISE.items():
            with self.subTest(otherwise=code):
                status, indent = manager.check_complete(code)
                self.assertNotEqual((status, " " * (indent or 0)), answer)


class KernelHistory(KernelCase):
    CELLS = ("a = 1", "print('b')", "a + 1", "a = 1")

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        for code in cls.CELLS:
            cls.frontend.finish(cls.frontend.start(code))

    def history(self, kind, **wish):
        return self.request("history_request", hist_access_type=kind, **{
            "raw": True, "output": False, **wish}).reply["content"]["history"]

    def test_the_tail_is_what_ran_last(self):
        self.assertEqual([entry[1:] for entry in self.history("tail", n=2)],
                         [[3, "a + 1"], [4, "a = 1"]])

    def test_a_range_takes_the_session_that_the_tail_reports(self):
        session = self.history("tail", n=1)[0][0]
        for number in (session, 0):
            with self.subTest(session=number):
                entries = self.history("range", session=number, start=2, stop=4)
                self.assertEqual([text for *_, text in entries], ["print('b')", "a + 1"])
        self.assertEqual(self.history("range", session=session + 7, start=1, stop=4), [])

    def test_a_search_finds_by_pattern(self):
        for pattern, options, texts in [
                ("a*", {}, ["a = 1", "a + 1", "a = 1"]), ("*b*", {}, ["print('b')"]),
                ("a*", {"unique": True}, ["a + 1", "a = 1"]), ("a*", {"n": 1}, ["a = 1"]),
                ("a ? 1", {"n": 2}, ["a + 1", "a = 1"]), ("nothing", {}, [])]:
            with self.subTest(pattern, **options):
                self.assertEqual([text for *_, text in self.history(
                    "search", pattern=pattern, **options)], texts)

    def test_with_output_each_entry_has_its_result(self):
        self.assertEqual([entry[2] for entry in self.history("tail", n=3, output=True)],
                         [["print('b')", None], ["a + 1", "2"], ["a = 1", None]])


class KernelRequests(KernelCase):
    def test_connect_request_names_the_five_ports(self):
        content = self.request("connect_request").reply["content"]
        ports = {name: port for name,
                 port in self.kernel.connection.items() if name.endswith("_port")}
        self.assertEqual({name: content[name] for name in ports}, ports)

    def test_usage_request_tells_memory_and_processor(self):
        content = self.request("usage_request", "control").reply["content"]
        self.assertEqual((content["pid"], content["cpu_count"]),
                         (self.kernel.process.pid, os.cpu_count()))
        self.assertGreater(content["kernel_memory"], 1 << 20)
        self.assertGreaterEqual(content["kernel_cpu"], 0)

    def test_a_reply_says_when_its_cell_started(self):
        cell = self.run_cell("import datetime\ndatetime.datetime.now(datetime.timezone.utc)"
                             ".isoformat()")
        started = cell.reply["metadata"]["started"].replace("Z", "+00:00")
        self.assertLess(started, cell.result.strip("'"))

    def test_without_store_history_nothing_is_remembered(self):
        count = self.run_cell("'kept'").reply["content"]["execution_count"]
        probe = self.run_cell("'probe'", store_history=False)
        self.assertEqual((probe.result, probe.reply["content"]["execution_count"]),
                         ("'probe'", count))
        self.assertEqual(self.run_cell(f"Out[{count}], In[{count}]").result,
                         """('kept', "'kept'")""")

    def test_user_expressions_are_answered_one_by_one(self):
        cell = self.run_cell("x = 6", user_expressions={
            "good": "x * 7", "bad": "1/0", "begun": "1 +"})
        answers = cell.reply["content"]["user_expressions"]
        self.assertEqual(answers["good"], {"status": "ok", "data": {"text/plain": "42"},
                                           "metadata": {}})
        self.assertEqual([answers[name]["ename"] for name in ("bad", "begun")],
                         ["ZeroDivisionError", "SyntaxError"])

    def test_a_failed_cell_has_no_user_expressions(self):
        cell = self.run_cell("1/0", user_expressions={"x": "1"})
        self.assertFalse(cell.reply["content"].get("user_expressions"))

    def test_what_json_cannot_carry_ends_no_kernel(self):
        self.run_cell("class Odd:\n    def _repr_json_(self): return {1: object()}")
        for code in ("Odd()", "display(Odd())", "get_ipython().set_next_input(object())",
                     "display({'x': {(1, 2): 3}}, raw=True)", "display({'x': b'1'}, raw=True)"):
            with self.subTest(code=code):
                self.assertIn(self.run_cell(code).status, ("ok", "error"))
                self.assertWorks()
        self.run_cell("1", user_expressions={"x": "Odd()"})
        self.assertWorks()

    def test_payloads_ask_the_frontend_to_do_something(self):
        folder = self.folder()
        (folder / "code.py").write_text("loaded = 1\n")
        for code, source, fields in [
                ("len?", "page", {"start": 0}),
                ("get_ipython().set_next_input('a'); get_ipython().set_next_input('b')",
                 "set_next_input", {"text": "b", "replace": False}),
                (f"%load {folder / 'code.py'}", "set_next_input", {"replace": True})]:
            with self.subTest(code=code):
                (payload,) = self.run_cell(code).reply["content"]["payload"]
                self.assertEqual(payload["source"], source)
                self.assertEqual({**payload, **fields}, payload)
        self.assertEqual(self.run_cell("1").reply["content"]["payload"], [])

    def test_the_outputs_that_are_kept_are_bounded(self):
        self.run_cell("import weakref\nclass Big: pass\nfirst = weakref.ref(Big())\nBig()")
        self.run_cell("first = weakref.ref(_)")
        for _ in range(1100):
            self.frontend.start("0")
        self.assertEqual(self.run_cell("len(Out) <= 1000, first()").result, "(True, None)")

    def test_nothing_comes_before_the_welcome_whatever_is_published_meanwhile(self):
        self.run_cell("import threading, time\nend = time.monotonic() + 2\n"
                      "def flood():\n    while time.monotonic() < end:\n"
                      "        display('x')\n        time.sleep(0.0002)\n"
                      "threading.Thread(target=flood).start()")
        for _ in range(30):
            wire = ZeroMQWire(self.kernel.connection, ["iopub"])
            self.addCleanup(wire.close)
            self.assertEqual(wire.receive(SECONDS)[1]["header"]["msg_type"], "iopub_welcome")
        wire.close()

    def test_every_subscriber_gets_its_welcome(self):
        for topic in (b"", b"kernel.", b"", b"\xff\xfe"):
            with self.subTest(topic=topic):
                socket_ = self.frontend.wire.context.socket(zmq.SUB)
                self.enterContext(contextlib.closing(socket_))
                socket_.subscribe(topic)
                socket_.connect("tcp://{ip}:{iopub_port}".format(**self.kernel.connection))
                self.assertTrue(socket_.poll(SECONDS * 1000), "no welcome")
                session = kernel.Session(self.kernel.connection["key"])
                message = session.unpack(socket_.recv_multipart())
                self.assertEqual((message["header"]["msg_type"], message["parent_header"]),
                                 ("iopub_welcome", {}))
                self.assertWorks()

    def test_headers_with_odd_fields_wedge_nothing(self):
        for fields in ({"subshell_id": [1]}, {"subshell_id": {}}, {"subshell_id": 7},
                       {"username": None}, {"session": 3}, {"date": []}, {"msg_id": "\ud800"}):
            with self.subTest(**fields):
                message = self.frontend.session.message("execute_request", {"code": "1"})
                message["header"].update(fields)
                self.frontend.wire.send("shell", message)
                self.assertWorks()

    def test_a_deeply_nested_message_wedges_nothing(self):
        deep = b'{"a":' * 200_000 + b"1" + b"}" * 200_000
        for part in range(4):
            parts = [b"{}"] * 4
            parts[part] = deep
            self.frontend.wire.send_parts("shell", signed(self.kernel.connection["key"], *parts))
        self.assertWorks()

    def test_what_is_no_subscription_wedges_nothing(self):
        with self.frontend.wire.context.socket(zmq.XSUB) as socket_:
            socket_.connect("tcp://{ip}:{iopub_port}".format(**self.kernel.connection))
            for parts in ([b"\x01\xff"], [b""], [b"hello"], [b"", b"x"], [b"\x01"]):
                socket_.send_multipart(parts)
            self.assertTrue(socket_.poll(SECONDS * 1000), "no welcome")
        self.assertWorks()


class KernelComms(KernelCase):
    """A comm that the page opens, and one that the kernel opens."""

    def heard(self, answer, msg_type):
        self.frontend.until(lambda: answer.of(msg_type))
        return answer.of(msg_type)[0]

    def test_a_comm_to_an_unknown_target_is_closed_at_once(self):
        answer = asked(self.frontend, "comm_open", comm_id="lost", target_name="nobody", data={})
        self.frontend.until(lambda: answer.is_idle)
        self.assertMessages(answer, "busy comm_close idle")
        self.assertEqual(answer.of("comm_close")[0]["comm_id"], "lost")
        self.assertNotIn("lost", self.request("comm_info_request").reply["content"]["comms"])

    def test_a_comm_of_the_page_carries_data_and_buffers_both_ways(self):
        self.run_cell(
            "def target(comm, message):\n"
            "    comm.on_msg(lambda m: comm.send({'echo': m['content']['data']}, buffers=[\n"
            "        bytes(reversed(b)) for b in m['buffers']]))\n"
            "    comm.on_close(lambda m: print('closed', m['content']['data']))\n"
            "    comm.send({'welcome': message['content']['data']})\n"
            "get_ipython().kernel.comm_manager.register_target('echo', target)")
        opened = asked(self.frontend, "comm_open", comm_id="c1", target_name="echo", data={"a": 1})
        self.assertEqual(self.heard(opened, "comm_msg")["data"], {"welcome": {"a": 1}})
        told = asked(self.frontend, "comm_msg", comm_id="c1", data={"b": 2}, buffers=[b"abc", b""])
        self.assertEqual(self.heard(told, "comm_msg")["data"], {"echo": {"b": 2}})
        (message,) = [m for m in told.messages if m["header"]["msg_type"] == "comm_msg"]
        self.assertEqual([bytes(b) for b in message["buffers"]], [b"cba", b""])
        info = self.request("comm_info_request", target_name="echo").reply["content"]
        self.assertEqual(info["comms"], {"c1": {"target_name": "echo"}})
        closed = asked(self.frontend, "comm_close", comm_id="c1", data={"c": 3})
        self.frontend.until(lambda: closed.text() == "closed {'c': 3}\n")
        self.assertNotIn("c1", self.request("comm_info_request").reply["content"]["comms"])

    @needs("comm")
    def test_a_comm_of_the_kernel_carries_data_and_buffers_both_ways(self):
        cell = self.run_cell("import comm\nwire = comm.create_comm(target_name='page', "
                             "data={'a': 1},"
                             " buffers=[b'raw'])\nwire.on_msg(lambda m: print(m['content']['data'],"
                             " [bytes(b) for b in m['buffers']]))")
        (opened,) = [m for m in cell.messages if m["header"]["msg_type"] == "comm_open"]
        self.assertEqual((opened["content"]["target_name"], opened["content"]["data"],
                          [bytes(b) for b in opened["buffers"]]), ("page", {"a": 1}, [b"raw"]))
        told = asked(self.frontend, "comm_msg", comm_id=opened["content"]["comm_id"],
                     data={"x": 1}, buffers=[b"b"])
        self.frontend.until(lambda: told.text() == "{'x': 1} [b'b']\n")
        self.assertMessages(self.run_cell("wire.close({'bye': 1})"),
                            "busy execute_input comm_close idle")

    def test_a_failing_callback_is_shown_and_harms_nothing(self):
        self.run_cell("def target(comm, message): 1/0\n"
                      "get_ipython().kernel.comm_manager.register_target('failing', target)")
        answer = asked(self.frontend, "comm_open", comm_id="f", target_name="failing", data={})
        self.frontend.until(lambda: answer.is_idle)
        self.assertIn("ZeroDivisionError", json.dumps([m["content"] for m in answer.messages]))
        self.assertWorks()

    def test_a_comm_message_is_served_while_a_cell_awaits(self):
        self.run_cell("import asyncio\nevent = asyncio.Event()\n"
                      "def target(comm, message): event.set()"
                      "\nget_ipython().kernel.comm_manager.register_target('wake', target)")
        cell = self.frontend.start("print('ready')\nawait event.wait()")
        self.frontend.until(lambda: cell.text())
        asked(self.frontend, "comm_open", comm_id="w", target_name="wake", data={})
        self.assertEqual(self.frontend.finish(cell).result, "True")

    def test_a_comm_message_waits_for_the_cells_that_came_before_it(self):
        first = self.frontend.start("import asyncio\nprint('ready')\nawait asyncio.sleep(0.2)")
        second = self.frontend.start(
            "def late(comm, message): print('opened')\n"
            "get_ipython().kernel.comm_manager.register_target('late', late)")
        opened = asked(self.frontend, "comm_open", comm_id="l", target_name="late", data={})
        self.frontend.finish(first, second)
        self.frontend.until(lambda: opened.is_idle)
        self.assertMessages(opened, "busy stream idle")

    def test_wrong_fields_in_a_comm_message_do_no_harm(self):
        for msg_type in ("comm_open", "comm_msg", "comm_close"):
            for content in ({}, {"comm_id": [1]}, {"comm_id": 3, "target_name": {}}, {"data": 1}):
                with self.subTest(msg_type, content=content):
                    answer = asked(self.frontend, msg_type, **content)
                    self.frontend.until(lambda answer=answer: answer.is_idle)
        self.assertWorks()


class KernelQueue(KernelCase):
    """A cell that waits can be taken out of the queue."""

    def abort(self, *cells):
        msg_ids = [cell.request["header"]["msg_id"] for cell in cells]
        return self.request("abort_request", "control", msg_ids=msg_ids)

    def waiting_cells(self):
        """A cell that waits for the user, and two behind it."""
        first = self.frontend.start("answer = input()")
        self.frontend.until(lambda: first.questions)
        return first, self.frontend.start("dropped = True"), self.frontend.start("'third'")

    def test_a_waiting_cell_is_dropped_at_once_and_the_others_run(self):
        first, second, third = self.waiting_cells()
        self.assertEqual(self.abort(second).reply["content"], {"status": "ok"})
        self.frontend.finish(second)
        self.assertEqual((second.status, second.count), ("aborted", None))
        self.assertFalse(first.is_idle)
        self.frontend.type("go on", first.question)
        self.frontend.finish(first, third)
        self.assertEqual((first.status, third.result), ("ok", "'third'"))
        self.assertEqual(self.run_cell("'dropped' in globals()").result, "False")

    def test_a_running_cell_is_left_alone(self):
        first, second, third = self.waiting_cells()
        self.abort(first)
        self.frontend.type("go on", first.question)
        self.frontend.finish(first, second, third)
        self.assertEqual([cell.status for cell in (first, second, third)], ["ok"] * 3)

    def test_a_cell_that_comes_after_the_request_to_drop_it_is_dropped(self):
        message = self.frontend.session.message("execute_request", {"code": "1"})
        answer = self.frontend.answers[message["header"]["msg_id"]] = Answer(message)
        self.abort(answer)
        self.frontend.wire.send("shell", message)
        self.assertEqual(self.frontend.finish(answer).status, "aborted")

    def test_what_is_no_list_of_ids_is_refused(self):
        for msg_ids in (None, 5, [[]], [{}]):
            answer = self.request("abort_request", "control", msg_ids=msg_ids)
            self.assertEqual(answer.status, "error")


class KernelSubshells(KernelCase):
    """JEP 91: cells that run beside a running cell."""

    def create(self):
        return self.request("create_subshell_request", "control").reply["content"]["subshell_id"]

    def start_in(self, subshell, code):
        return asked(self.frontend, "execute_request", subshell_id=subshell, code=code)

    def listed(self):
        return self.request("list_subshell_request", "control").reply["content"]["subshell_id"]

    def test_subshells_are_advertised(self):
        info = self.request("kernel_info_request").reply["content"]
        self.assertIn("kernel subshells", info["supported_features"])

    def test_subshells_are_created_listed_and_deleted(self):
        before, new = self.listed(), self.create()
        self.assertEqual(self.listed(), [*before, new])
        self.request("delete_subshell_request", "control", subshell_id=new)
        self.assertEqual(self.listed(), before)

    def test_a_subshell_runs_beside_a_blocking_cell_in_the_same_namespace(self):
        subshell = self.create()
        cell = self.frontend.start("import threading\nevent = threading.Event()\nprint('ready')\n"
                                   "event.wait()")
        self.frontend.until(lambda: cell.text())
        other = self.frontend.finish(self.start_in(subshell, "print('beside')\nevent.set()\n6 * 7"))
        self.assertEqual((other.text(), other.result), ("beside\n", "42"))
        self.assertEqual(self.frontend.finish(cell).result, "True")

    def test_two_subshells_run_at_the_same_time(self):
        self.run_cell("import threading\nbarrier = threading.Barrier(2)")
        cells = [self.start_in(self.create(), "x = barrier.wait()\nprint(x)") for _ in range(2)]
        self.frontend.finish(*cells)
        self.assertEqual(sorted(cell.text() for cell in cells), ["0\n", "1\n"])

    def test_an_error_aborts_the_queue_of_its_subshell_only(self):
        subshell = self.create()
        failing = self.start_in(subshell, "import time\ntime.sleep(0.3)\n1/0")
        queued, other = self.start_in(subshell, "1"), self.frontend.start("2")
        self.frontend.finish(failing, queued, other)
        self.assertEqual([c.status for c in (failing, queued, other)], ["error", "aborted", "ok"])

    def test_a_cell_for_an_unknown_subshell_is_answered_with_an_error(self):
        answer = self.frontend.finish(self.start_in("deleted", "1"))
        self.assertEqual((answer.status, answer.story), ("error", "busy idle"))
        answer = self.request("delete_subshell_request", "control", subshell_id="deleted")
        self.assertEqual(answer.status, "error")

    def test_a_comm_message_for_a_deleted_subshell_is_not_run(self):
        self.run_cell("def target(comm, message):\n    import threading\n"
                      "    print(threading.current_thread().name)\n"
                      "get_ipython().kernel.comm_manager.register_target('who', target)")
        answer = asked(self.frontend, "comm_open", subshell_id="deleted", comm_id="d",
                       target_name="who", data={})
        self.frontend.until(lambda: answer.is_idle)
        self.assertNotEqual(answer.text(), "io\n")

    def test_what_waits_in_a_subshell_that_is_deleted_is_answered(self):
        subshell = self.create()
        self.run_cell("go = __import__('threading').Event()\n"
                      "get_ipython().kernel.comm_manager.register_target('t', lambda *_: None)")
        runs = self.start_in(subshell, "print('ready')\ngo.wait()")
        self.frontend.until(lambda: runs.text())
        cell = self.start_in(subshell, "1")
        comm = asked(self.frontend, "comm_open", subshell_id=subshell, comm_id="w",
                     target_name="t", data={})
        self.request("is_complete_request", code="1")   # by now both have arrived
        self.request("delete_subshell_request", "control", subshell_id=subshell)
        self.frontend.until(lambda: comm.is_idle)
        self.assertEqual(self.frontend.finish(cell).status, "aborted")
        self.run_cell("go.set()")
        self.assertEqual(self.frontend.finish(runs).result, "True")

    def test_an_interrupt_ends_what_a_subshell_awaits(self):
        cell = self.start_in(self.create(),
                             "import asyncio\nprint('ready')\nawait asyncio.sleep(60)")
        self.frontend.until(lambda: cell.text())
        self.request("interrupt_request", "control")
        self.assertFails(self.frontend.finish(cell), "KeyboardInterrupt")


class WithoutIPython(KernelCase):
    """A kernel where IPython and what needs it are not installed."""

    HIDDEN = ("ipython", "ipykernel", "matplotlib_inline", "ipywidgets", "comm", "debugpy")

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        python, env = python_without(folder.name, *cls.HIDDEN)
        cls.options = {"argv": [*python, *OURS[1:]], "env": env}
        super().setUpClass()


class KernelMagics(WithoutIPython):
    """Every magic, as notebooks use it, in a table: code, what is shown."""

    def test_a_magic_prints(self):
        folder = self.folder()
        (folder / "program.py").write_text("import sys\nof_program = sys.argv[1:]\nprint(__name__)")
        self.run_cell(f"folder = {str(folder)!r}\nimport os")
        self.addCleanup(self.run_cell, f"%cd {self.kernel.folder.name}")
        for code, expected in [
                ("%%time\nx = 1", "Wall time: "), ("%time x = 1", "Wall time: "),
                ("\n%%time\nx = 1", "Wall time: "),
                ("%time await __import__('asyncio').sleep(0)", ""),
                ("%timeit -n 1 -r 1 1", "1 loop"), ("%%timeit -n 1 -r 1\nx = 1", "1 loop"),
                (f"%run {folder}/program.py a b", "__main__\n"), ("of_program", ""),
                ("%run {folder}/program.py", "__main__\n"), ("%cd {folder}", str(folder)),
                ("%cd $folder", str(folder)), ("%%writefile new.txt\ntext\n", "Writing new.txt"),
                ("%%writefile -a new.txt\nmore\n", "Appending to new.txt"),
                ("%cat new.txt", "text\nmore"),
                ("%%file new.txt\n1", "Overwriting new.txt"), ("%ls", "new.txt"),
                ("%%bash\necho $((6 * 7))", "42\n"), ("%%sh\necho sh", "sh\n"),
                ("%%script sh\necho script", "script\n"), ("%env A_B=1", "env: A_B=1"),
                ("%set_env A_B 2", "env: A_B=2"), ("!echo $A_B", "2"), ("%pip --version", "pip "),
                ("%lsmagic", "%timeit"), ("%who", "folder"), ("%whos", "module"),
                ("%mkdir made\n%rmdir made\n%ls", "new.txt"), ("%%python3\nprint(6 * 7)", "42\n"),
                ("%system echo 1\n%sx echo 2\nprint('end')", "end\n")]:
            with self.subTest(code=code):
                cell = self.run_cell(code)
                self.assertEqual(cell.status, "ok", cell)
                self.assertIn(expected, cell.text())

    def test_a_magic_has_a_value(self):
        for code, result in [
                ("%pwd", repr(os.path.realpath(self.kernel.folder.name))),
                ("x = %pwd\ntype(x) is str", "True"), ("%sx echo 1", "['1']"),
                ("%%sx\necho 1", "['1']"),
                ("!!echo 1", "['1']"), ("d = {}\nd['k'] = !echo 1\nd", "{'k': ['1']}"),
                ("first, *more = !printf 'a\\nb'\nmore", "['b']"),
                ("lines = !printf 'a\\nb'\nlines", "['a', 'b']"),
                ("%env NO_SUCH = 1\n%env NO_SUCH", "'1'"), ("%%time\n6 * 7", "42"),
                ("%time 42", "42"),
                ("len(%timeit -n 1 -r 2 -q -o 1)", None), ("x = %timeit -n 1 -r 1 -q -o 1\nbool(x)",
                                                          "True"),
                ("!exit 3\n_exit_code", "3"), ("!true\n_exit_code", "0"), ("%%time\n5;", None)]:
            with self.subTest(code=code):
                self.assertEqual(self.run_cell(code).result, result)

    def test_a_cell_in_another_language_is_shown_as_what_it_is(self):
        for name, mime in [("html", "text/html"), ("HTML", "text/html"), ("svg", "image/svg+xml"),
                           ("SVG", "image/svg+xml"), ("latex", "text/latex"), ("markdown",
                            "text/markdown"), ("javascript", "application/javascript"),
                           ("js", "application/javascript")]:
            with self.subTest(name):
                self.assertEqual(self.run_cell(f"%%{name}\n<x>\n").display[mime].strip(), "<x>")

    def test_a_magic_that_sets_something_up_is_silent(self):
        for code in ("%matplotlib inline", "%matplotlib",
                     "%config InlineBackend.figure_format='svg'",
                     "%xmode Plain", "%colors nocolor", "%autosave 60"):
            with self.subTest(code=code):
                self.assertMessages(self.run_cell(code), "busy execute_input idle")

    def test_a_command_is_filled_with_values(self):
        self.run_cell("name, items = 'World', [1, 2]")
        for command, text in [
                ("echo {name}", "World"), ("echo $name", "World"), ("echo {items[1] + 1}", "3"),
                ("echo {len(items)}", "2"), ("echo {1 / 3:.2f}", "0.33"),
                ("echo \"{name!r}\"", "'World'"), ("echo ${HOME}", os.environ["HOME"]),
                ("echo $HOME", os.environ["HOME"]), ("echo $$HOME", os.environ["HOME"]),
                ("echo 1 2 | awk '{print $2}'", "2"), ("echo {{name}}", "{name}"),
                ("echo 1 2 | awk '{print}'", "1 2"), ("echo a \\\n  b", "a b"),
                ("echo 'it''s' # {no} $nothing", "its")]:
            with self.subTest(command=command):
                self.assertEqual(self.run_cell("!" + command).text().strip(), text)

    def test_in_a_function_a_magic_sees_the_functions_names(self):
        folder = self.folder()
        (folder / "program.py").write_text("print('ran')")
        self.addCleanup(self.run_cell, f"%cd {self.kernel.folder.name}")
        for line, value, text in [
                ("!echo {n} $n", 5, "5 5"), ("!echo {n + 1}", 5, "6"), ("%env A_N={n}", 5, "=5"),
                ("%cd {n}", str(folder), str(folder)), ("%run {n}/program.py", str(folder), "ran"),
                ("%time print(n)", 5, "5\nCPU"), ("%timeit -n1 -r1 n + 1", 5, "1 loop each"),
                ("x = !echo {n}\n    print(x)", 5, "['5']"), ("%ls {n}", str(folder), "program"),
                ("x = %time n + 1\n    print(x)", 5, "6"),
                ("x = %sx echo {n}\n    print(x)", 5, "['5']")]:
            with self.subTest(line=line):
                cell = self.run_cell(f"n = 'global'\ndef f(n):\n    {line}\nf({value!r})")
                self.assertIn(text, cell.text(), cell)

    def test_wherever_code_stands_its_magics_see_its_names(self):
        for code in ("def f(n):\n    def g():\n        !echo {n}\n    g()\nf(5)",
                     "class C:\n    n = 5\n    !echo {n}",
                     "class C:\n    def f(self, n):\n        !echo {n}\nC().f(5)",
                     "async def f(n):\n    !echo {n}\nawait f(5)",
                     "for n in [5]:\n    if n:\n        !echo {n}",
                     "[get_ipython().system('echo {n}') for n in [5]]",
                     "(lambda n: get_ipython().system('echo {n}'))(5)",
                     "import threading\ndef f(n):\n    def g():\n        !echo {n}\n"
                     "    t = threading.Thread(target=g)\n    t.start(); t.join()\nf(5)"):
            with self.subTest(code=code):
                self.assertEqual(self.run_cell("n = 'global'\n" + code).text(), "5\n")

    def test_time_in_a_function_is_the_statement_itself(self):
        for line, result in [("%time r = [n] * 3\n    return r", "[2, 2, 2]"),
                             ("%time return n", "2"), ("%time await sleep(0)\n    return 1", "1"),
                             ("r = []\n    %time for i in range(n): r.append(i)\n    return r",
                              "[0, 1]")]:
            with self.subTest(line=line):
                cell = self.run_cell("from asyncio import sleep\nasync def f(n):\n    "
                                     + line + "\nawait f(2)")
                self.assertEqual(cell.result, result, cell)
                self.assertIn("Wall time", cell.text())

    def test_what_a_value_holds_is_not_filled_in_again(self):
        self.run_cell("outer, inner = '{inner}', 'seen'")
        for code in ("!echo {outer}", "%sx echo {outer}\n!echo {outer}", "%env OUTER={outer}",
                     "%time !echo {outer}"):
            with self.subTest(code=code):
                self.assertIn("{inner}", self.run_cell(code).text())

    def test_the_line_of_a_cell_magic_is_filled_with_values(self):
        self.run_cell("path = 'filled.txt'\nfrom pathlib import Path")
        self.run_cell("%%writefile {path}\n{path}\n")
        self.assertEqual(self.run_cell("Path('filled.txt').read_text()").result, r"'{path}\n'")

    def test_timeit_gives_its_measurements(self):
        self.run_cell("r = %timeit -o -q -n 2 -r 3 sum([1])")
        self.assertEqual(self.run_cell("r.loops, r.repeat, len(r.all_runs), len(r.timings)").result,
                         "(2, 3, 3, 3)")
        self.assertEqual(self.run_cell(
            "r.best <= r.average <= r.worst, r.stdev >= 0, r.compile_time >= 0").result,
            "(True, True, True)")
        self.assertRegex(self.run_cell("print(r)").text(), r"^[\d.]+ \w+ ± [\d.]+ \w+ per loop "
                         r"\(mean ± std. dev. of 3 runs, 2 loops each\)$")
        self.assertIn("<TimeitResult : ", self.run_cell("r").result)

    def test_timeit_takes_ipythons_options(self):
        for code, text in [("%timeit -n1 -r1 -p 1 1", "1 loop each"), ("%timeit -t -n1 -r1 1", "±"),
                           ("%timeit -c -n1 -r1 1", "±"), ("%timeit -n1 -r1 !echo", "±"),
                           ("%timeit -qv kept -n1 -r1 1\nprint(kept.loops)", "1\n"),
                           ("%%timeit -n1 -r2 prepared = 5\nprint(prepared)", "5\n5\n")]:
            with self.subTest(code=code):
                self.assertIn(text, self.run_cell(code).text())

    @needs("IPython")
    def test_a_timeit_result_reads_as_ipythons(self):
        from IPython.core.magics.execution import TimeitResult
        for loops, runs in [(1, [0.5]), (100, [0.1, 0.3]), (1000, [70_000.0] * 7), (10, [1e-7])]:
            with self.subTest(loops=loops, runs=runs):
                theirs = TimeitResult(loops, len(runs), 0, 0, runs, 0, 4)
                self.assertEqual(str(kernel.TimeitResult(loops, runs, 0, 4)), str(theirs))

    def test_captured_output_is_put_aside(self):
        cell = self.run_cell("%%capture kept\nimport sys\nprint('out')\n"
                             "print('err', file=sys.stderr)"
                             "\n!echo child\ndisplay(1)\n2")
        self.assertMessages(cell, "busy execute_input idle")
        self.assertEqual(self.run_cell("kept.stdout, kept.stderr, len(kept.outputs)").result,
                         r"('out\nchild\n', 'err\n', 2)")
        self.assertEqual(self.run_cell("kept()").text(), "out\nchild\n")
        cell = self.run_cell("%%capture --no-stdout\nprint('seen')\ndisplay(1)")
        self.assertMessages(cell, "busy execute_input stream idle")

    def test_a_question_mark_opens_the_pager(self):
        self.run_cell("def greet(name):\n    'Doc of greet.'\n    return name\n"
                      "prefix_a = prefix_b = 1")
        for code, *parts in [
                ("greet?", "Signature:", "greet(name)", "Docstring:", "Doc of greet."),
                ("?greet", "Doc of greet."), ("greet??", "Source:", "return name"),
                ("??greet", "return name"), ("prefix_*?", "prefix_a", "prefix_b"),
                ("%timeit?", "-n LOOPS"), ("%%time?", "whole cell"),
                ("%pinfo greet", "Doc of greet."),
                ("%ls?", "ls"), ("str.upper?", "upper"), ("x = 1\ngreet?", "Doc of greet.")]:
            with self.subTest(code=code):
                (payload,) = self.run_cell(code).reply["content"]["payload"]
                text = plain_text(payload["data"]["text/plain"])
                for part in parts:
                    self.assertIn(part, text)
        self.assertIn("not found", self.run_cell("nobody?").text())

    def test_an_unknown_magic_suggests_the_nearest(self):
        for code, nearest in [("%tiem 1", "%time"), ("%matplotib inline", "%matplotlib"),
                              ("%%bahs\n1", "%bash"), ("%writefil x", "%writefile")]:
            with self.subTest(code=code):
                cell = self.run_cell(code)
                self.assertEqual(cell.status, "error")
                self.assertIn(nearest, cell.error["evalue"])

    def test_what_ipython_would_bring_is_said(self):
        for code in ("%no_such_magic", "%%cython\n1", "%load_ext line_profiler",
                     "%matplotlib widget", "get_ipython().ast_node_interactivity",
                     "get_ipython().ast_node_interactivity = 'all'",
                     "get_ipython().set_custom_exc((Exception,), print)"):
            with self.subTest(code=code):
                self.assertIn("%pip install ipython", self.run_cell(code).error["evalue"])

    def test_libraries_that_ask_for_the_shell_are_answered(self):
        for code, result in [
                ("type(get_ipython()).__name__", "'ZMQInteractiveShell'"),
                ("'IPKernelApp' in get_ipython().config", "True"),
                ("get_ipython().get_parent()['header']['msg_type']", "'execute_request'"),
                ("get_ipython().parent_header['content']['code'][:3]", "'get'"),
                ("k = get_ipython().kernel\n[hasattr(k, n) for n in ('session', 'shell', "
                 "'comm_manager', 'get_parent', '_parent_header')]",
                 "[True, True, True, True, True]"),
                ("hasattr(get_ipython(), 'no_such_thing')", "False"),
                ("called = []\n"
                 "get_ipython().events.register('post_run_cell', called.append)", None),
                ("len(called)", "1")]:
            with self.subTest(code=code):
                self.assertEqual(self.run_cell(code).result, result)

    def test_a_cell_magic_without_a_cell_says_so(self):
        for code in ("%writefile x", "%html <b>", "%bash"):
            with self.subTest(code=code):
                self.assertIn("%%", self.run_cell(code).error["evalue"])

    def test_magics_in_text_stay_text(self):
        for code, result in [("'''\n%time 1\n!ls\nx?\n'''", r"'\n%time 1\n!ls\nx?\n'"),
                             ("7 \\\n%4", "3"), ("(7\n%4)", "3"), ("x = 1\nx != 2", "True"),
                             ("# what?\n1", "1"), ("'%d' %5", "'5'")]:
            with self.subTest(code=code):
                self.assertEqual(self.run_cell(code).result, result)

    def test_reset_forgets_the_notebooks_names(self):
        self.run_cell("forgotten = 1\nforgotten")
        self.run_cell("%reset -f")
        self.assertFails(self.run_cell("forgotten"), "NameError")
        self.assertEqual(self.run_cell("In[-1], __name__").result,
                         "('In[-1], __name__', '__main__')")

    def test_reset_out_lets_go_of_the_results(self):
        self.run_cell("import weakref\nclass Big: pass\nBig()")
        self.run_cell("gone = weakref.ref(_)")
        self.run_cell("%reset -f out")
        self.assertEqual(self.run_cell("gone(), len(Out)").result, "(None, 0)")

    @needs("IPython")
    def test_autoreload_is_ipythons(self):
        path = Path(self.kernel.folder.name, "changing.py")
        path.write_text("def value(): return 1")
        self.run_cell("%load_ext autoreload\n%autoreload 2\nimport sys\n"
                      f"sys.path.insert(0, {str(path.parent)!r})\nimport changing")
        path.write_text("def value(): return 'changed'")
        self.assertEqual(self.run_cell("changing.value()").result, "'changed'")

    @unittest.skipIf(sys.version_info < (3, 11), "`python -P` came with Python 3.11")
    @needs("pip")
    def test_pip_runs_nothing_from_the_notebooks_folder(self):
        trap = Path(self.kernel.folder.name, "typing.py")
        trap.write_text("raise SystemExit('the trap')")
        self.addCleanup(trap.unlink)
        self.assertIn("pip ", self.run_cell("%pip --version").text())

    def test_a_failed_pip_is_a_failed_cell(self):
        self.assertFails(self.run_cell("%pip no-such-command"), "CalledProcessError")

    def test_without_pip_uv_installs(self):
        folder = self.folder()
        (folder / "uv").write_text("#!/bin/sh\necho uv: $@")
        (folder / "uv").chmod(0o755)
        self.run_cell("import os\nfrom importlib.machinery import PathFinder\n"
                      "path = os.environ['PATH']\n"
                      f"os.environ['PATH'] = {str(folder)!r} + ':' + path\n"
                      "find = PathFinder.find_spec\nPathFinder.find_spec = lambda name, *where: "
                      "name != 'pip' and find(name, *where) or None")
        self.addCleanup(self.run_cell, "PathFinder.find_spec = find\nos.environ['PATH'] = path")
        self.assertIn(f"uv: pip install --python {sys.executable} thing",
                      self.run_cell("%pip install thing").text())


class KernelDebugger(KernelCase):
    """Python's debugger, over the stdin channel."""

    def ask_user(self, code, *typed):
        self.frontend.typed = list(typed)
        return self.run_cell(code)

    def test_debug_looks_around_where_the_error_was_raised(self):
        self.run_cell("def divide(by):\n    return 1 / by\ndivide(0)")
        cell = self.ask_user("%debug", "p by + 41", "up", "q")
        self.assertEqual([q["prompt"] for q in cell.questions][:1], ["(Pdb) "])
        self.assertIn("41", cell.text())
        self.assertEqual(cell.status, "ok")

    def test_a_breakpoint_stops_and_goes_on(self):
        cell = self.ask_user("x = 41\nbreakpoint()\nx + 1", "p x", "x = 1", "c")
        self.assertIn("41", cell.text())
        self.assertEqual(cell.result, "2")

    def test_a_breakpoint_in_a_function_shows_its_source(self):
        cell = self.ask_user("def f():\n    inside = 5\n    breakpoint()\n    return inside\nf()",
                             "l", "p inside", "c")
        self.assertIn("return inside", cell.text())
        self.assertEqual(cell.result, "5")

    def test_every_debugger_can_be_interrupted(self):
        self.run_cell("import pdb\n1 / 0")
        for code in ("breakpoint()\n1", "pdb.set_trace()\n1", "pdb.pm()", "%debug",
                     "pdb.run('x = 1')", "pdb.runcall(lambda: 1)",
                     "def f():\n    pdb.set_trace()\n    return 1\nf()",
                     "async def f():\n    breakpoint()\n    return 1\nawait f()"):
            with self.subTest(code=code):
                cell = self.frontend.start(code)
                self.frontend.until(lambda cell=cell: cell.questions)
                self.kernel.interrupt()
                self.assertFails(self.frontend.finish(cell), "KeyboardInterrupt")
        self.assertWorks()

    def test_an_interrupt_ends_the_debugger_of_a_thread(self):
        cell = self.frontend.start(
            "import threading\ndef f():\n    try:\n        breakpoint()\n        x = 1\n"
            "    except KeyboardInterrupt:\n        print('left')\n"
            "t = threading.Thread(target=f)\nt.start()\nt.join()")
        self.frontend.until(lambda: cell.questions)
        self.kernel.interrupt()
        self.assertFails(self.frontend.finish(cell), "KeyboardInterrupt")
        self.frontend.until(lambda: "left" in cell.text())

    def test_quitting_the_debugger_shows_no_error(self):
        self.run_cell("import pdb, threading\n1 / 0")
        for code in ("breakpoint()\n1", "pdb.set_trace()\n1", "pdb.pm()", "pdb.run('x = 1')",
                     "def f():\n    breakpoint()\n    x = 1\nf()",
                     "t = threading.Thread(target=f)\nt.start()\nt.join()"):
            with self.subTest(code=code):
                cell = self.ask_user(code, "q")
                self.assertMessages(cell, "busy execute_input stream idle")
                self.assertEqual(cell.text("stderr"), "")

    def test_a_step_out_of_the_cell_does_not_enter_the_kernel(self):
        cell = self.ask_user("breakpoint()\nx = 1", *["n"] * 9)
        self.assertNotIn("kernel.py", cell.text())
        self.frontend.typed.clear()
        self.assertWorks()

    def test_the_debugger_leaves_the_kernels_interrupt_alone(self):
        self.ask_user("import pdb\npdb.set_trace()\nx = 1", "c")
        cell = self.frontend.start("print('ready')\nwhile True: pass")
        self.frontend.until(lambda: cell.text())
        self.kernel.interrupt()
        self.assertFails(self.frontend.finish(cell), "KeyboardInterrupt")

    def test_pdb_on_opens_the_debugger_after_an_error(self):
        self.run_cell("%pdb on")
        self.addCleanup(self.run_cell, "%pdb off")
        cell = self.ask_user("here = 41\n1 / 0", "p here + 1", "q")
        self.assertFails(cell, "ZeroDivisionError")
        self.assertIn("42", cell.text())
        self.assertMessages(self.run_cell("here;"), "busy execute_input idle")


class KernelTracebacks(KernelCase):
    def test_a_chain_of_errors_is_told_from_the_first_to_the_last(self):
        for code, between in [
                ("raise ValueError('last')", "During handling of the above"),
                ("raise ValueError('last') from error", "direct cause")]:
            with self.subTest(code=code):
                cell = self.run_cell(
                    f"try:\n    {{}}['first']\nexcept KeyError as error:\n    {code}")
                self.assertRegex(cell.traceback,
                                 f"(?s)KeyError: 'first'.*{between}.*ValueError: last")
        cell = self.run_cell("try: {}['first']\n"
                             "except KeyError: raise ValueError('last') from None")
        self.assertNotIn("KeyError: 'first'", cell.traceback)

    @unittest.skipIf(sys.version_info < (3, 11), "exception groups came with Python 3.11")
    def test_a_group_of_errors_shows_its_members_and_no_frame_of_the_kernel(self):
        cell = self.run_cell("def inner(): raise ValueError('one')\ntry: inner()\n"
                             "except ValueError as e: kept = e\n"
                             "raise ExceptionGroup('both', [kept, TypeError('two')])")
        self.assertRegex(cell.traceback, r"(?s)both \(2 sub-exceptions\).*one.*two")
        self.assertNotIn(str(HERE), cell.traceback)

    @unittest.skipIf(sys.version_info < (3, 11), "columns came with Python 3.11")
    def test_the_failing_expression_is_underlined(self):
        cell = self.run_cell("d = {}\n'é☃', 1 + d['x'], 2")
        text = re.sub(r"\x1b\[3\dm", "", "\n".join(cell.error["traceback"]))
        self.assertIn("\x1b[4md['x']\x1b[24m", text)

    def test_the_code_has_colours(self):
        cell = self.run_cell("if 1 / 0: 'a # b'  # why")
        line = re.sub(r"\x1b\[(?:4|24)m", "", "\n".join(cell.error["traceback"]))
        for code, token in ((35, "if"), (32, "1"), (33, "'a # b'"), (90, "# why")):
            self.assertIn(f"\x1b[{code}m{token}\x1b[39m", line)

    @unittest.skipIf(sys.version_info < (3, 11), "notes came with Python 3.11")
    def test_notes_are_shown(self):
        cell = self.run_cell("error = ValueError('x')\nerror.add_note('look here')\nraise error")
        self.assertIn("look here", cell.traceback)

    def test_a_deep_recursion_is_cut_short(self):
        cell = self.run_cell("def f(n): return f(n + 1)\nf(0)")
        self.assertFails(cell, "RecursionError")
        self.assertLess(len(cell.traceback), 10_000)

    def test_a_syntax_error_points_at_the_line_in_the_cell(self):
        for code, line in [("x = 1\nf(1", "f(1"), ("if x\n    1", "if x"),
                           ("!ls\ny = = 2", "y = = 2"),
                           ("for x in y:\nprint(x)", "print(x)")]:
            with self.subTest(code=code):
                cell = self.run_cell(code)
                self.assertIn(line, cell.traceback)
                self.assertIn("^", cell.traceback)

    def test_an_error_in_a_timed_cell_shows_the_right_line(self):
        cell = self.run_cell("%%time\na = 1\n1/0\nb = 2")
        self.assertRegex(cell.traceback, r"----> \d (1/0|.*1/0)")
        self.assertIn("1/0", cell.traceback)


class KernelHardTimes(KernelCase):
    """Output and interrupts where other kernels stumble."""

    def interrupted(self, code, **options):
        cell = self.frontend.start(code, **options)
        self.frontend.until(lambda: "ready" in cell.text())
        self.kernel.interrupt()
        return self.frontend.finish(cell)

    def test_a_print_flood_can_be_interrupted(self):
        cell = self.interrupted("print('ready')\nwhile True: print('x' * 100)")
        self.assertFails(cell, "KeyboardInterrupt")
        self.assertWorks()

    def test_a_repr_that_never_ends_can_be_interrupted(self):
        self.run_cell("class Endless:\n    def __repr__(self):\n        print('ready')\n"
                      "        while True: pass")
        for code in ("Endless()", "display([Endless()])", "%whos\nx = Endless()\n%whos"):
            with self.subTest(code=code):
                self.assertFails(self.interrupted(code), "KeyboardInterrupt")
        self.assertEqual(self.run_cell("%reset -f").status, "ok")
        self.assertWorks()

    def test_what_runs_after_a_cell_can_be_interrupted(self):
        self.interrupted("import functools, time\nslow = functools.partial(time.sleep, 60)\n"
                         "get_ipython().events.register('post_execute', slow)\nprint('ready')")
        self.interrupted("get_ipython().events.unregister('post_execute', slow)\nprint('ready')")
        self.assertWorks()

    def test_a_user_expression_can_be_interrupted(self):
        cell = self.interrupted("import time\nprint('ready')", user_expressions={
            "x": "time.sleep(60)"})
        self.assertFails(cell, "KeyboardInterrupt")

    def test_a_child_that_is_waited_for_ends_with_the_interrupt(self):
        cell = self.interrupted("import subprocess\nchild = subprocess.Popen(['sleep', '600'])\n"
                                "print('ready')\nchild.wait()")
        self.assertFails(cell, "KeyboardInterrupt")
        self.assertFalse(is_alive(int(self.run_cell("child.pid").result)))

    def test_children_and_prints_keep_their_order(self):
        for code in ("!echo b", "import os; os.system('echo b')",
                     "import sys; x = sys.stdout.buffer.write(b'b\\n')",
                     "import subprocess; x = subprocess.run(['echo', 'b'])"):
            with self.subTest(code=code):
                for _ in range(10):
                    cell = self.run_cell(f"print('a')\n{code}\nprint('c')")
                    self.assertEqual(cell.text(), "a\nb\nc\n")

    def test_what_is_written_to_a_descriptor_keeps_its_place_among_prints(self):
        for _ in range(10):
            cell = self.run_cell("import os\nprint('a')\nx = os.write(1, b'b\\n')\nprint('c')")
            self.assertEqual(cell.text(), "a\nb\nc\n")

    def test_output_of_c_code_and_errors_keep_their_order(self):
        cell = self.run_cell("import os, sys\nfor i in range(5):\n    print(i)\n"
                             "    print(i, file=sys.stderr)\n    x = os.write(2, b'd\\n')")
        self.assertEqual("".join(c["text"] for c in cell.of("stream")),
                         "".join(f"{i}\n{i}\nd\n" for i in range(5)))

    def test_ten_megabytes_from_a_child_arrive_whole(self):
        cell = self.run_cell(
            "import subprocess, sys\nx = subprocess.run([sys.executable, '-S', '-c', 'import os\\n"
            "for i in range(10_000): os.write(1, (\"é%05d\" % i).encode() * 143 + b\"\\\\n\")'])",
            seconds=60)
        expected = "".join(f"é{i:05d}" * 143 + "\n" for i in range(10_000))
        self.assertTrue(cell.text() == expected,
                        f"{len(cell.text())} of {len(expected)} characters")

    def test_binary_junk_from_a_child_arrives_and_harms_nothing(self):
        cell = self.run_cell("import os\n"
                             "x = os.write(1, bytes(range(256)) * 40 + 'é☃\\n'.encode())")
        self.assertTrue(cell.text().endswith("é☃\n"))
        self.assertWorks()

    def test_a_forked_child_that_goes_on_harms_nothing(self):
        cell = self.run_cell("import os, sys\npid = os.fork()\n"   # one write: they may mix
                             "x = sys.stdout.write('parent\\n' if pid else 'child\\n')")
        self.frontend.until(lambda: sorted(cell.text().split()) == ["child", "parent"])
        for _ in range(50):
            self.assertEqual(self.run_cell("1").result, "1")
        self.assertEqual(self.run_cell("os.waitpid(pid, 0)[0] == pid").result, "True")

    def test_a_pool_of_processes_prints_through_the_kernel(self):
        cell = self.run_cell("import multiprocessing\n"
                             "with multiprocessing.get_context('fork').Pool(2) as pool:\n"
                             "    x = pool.map(print, 'ab')")
        self.assertEqual(sorted(cell.text().split()), ["a", "b"])

    def test_errors_in_threads_and_tasks_are_shown_under_their_cell(self):
        cell = self.run_cell("import threading\nt = threading.Thread(target=lambda: 1/0)\n"
                             "t.start(); t.join()")
        self.assertIn("ZeroDivisionError", cell.text("stderr"))

    def test_a_stream_that_was_closed_does_not_silence_the_kernel(self):
        self.run_cell("import sys\nsys.stdout.close()")
        self.assertEqual(self.run_cell("print('still here')").text(), "still here\n")

    def test_names_of_the_kernel_may_be_taken_by_the_user(self):
        for name in ("kernel", "json", "zmq", "print", "display", "get_ipython", "exit", "input"):
            with self.subTest(name):
                cell = self.run_cell(f"{name} = 1\nx = 5\nx")
                self.run_cell(f"del {name}")
                self.assertEqual(cell.result, "5")
        self.assertWorks()


class KernelEnds(KernelLife):
    """Whatever ends a kernel, ends it as it was meant."""

    def alone(self, **options):
        own, frontend = self.start(**options)
        return own, frontend, lambda code: frontend.finish(frontend.start(code))

    def test_exit_ends_the_kernel_after_its_reply(self):
        for code in ("exit()", "quit()", "exit(3)", "exit"):
            with self.subTest(code=code):
                own, _, run_cell = self.alone()
                cell = run_cell(f"print('last words')\n{code}")
                self.assertEqual((cell.status, cell.text()), ("ok", "last words\n"))
                self.assertEqual([p["source"] for p in cell.reply["content"]["payload"]],
                                 ["ask_exit"])
                self.assertEqual(own.process.exit_code(), 0)

    def test_os_exit_ends_the_kernel_and_nothing_else(self):
        own, frontend, _ = self.alone()
        frontend.start("import os; os._exit(7)")
        self.assertEqual(own.process.exit_code(), 7)

    def test_children_end_with_the_kernel(self):
        own, frontend, run_cell = self.alone()
        pid = int(run_cell("import subprocess\nsubprocess.Popen(['sleep', '600']).pid").result)
        frontend.ask("shutdown_request", "control", restart=False)
        own.process.exit_code()
        wait_until(lambda: not is_alive(pid))

    def test_output_of_exit_functions_arrives(self):
        own, frontend, run_cell = self.alone()
        run_cell("import atexit\natexit.register(print, 'from atexit')")
        answer = frontend.ask("shutdown_request", "control", restart=False)
        frontend.until(lambda: "from atexit" in json.dumps(
            [m["content"] for m in frontend.unasked + [m for a in frontend.answers.values()
                                                      for m in a.messages]]))
        self.assertEqual(own.process.exit_code(), 0)
        self.assertIsNotNone(answer)

    def test_the_kernel_ends_with_the_process_that_started_it(self):
        folder = self.folder()
        connection = {**dict(zip(("shell_port", "iopub_port", "stdin_port", "control_port",
                                  "hb_port"), free_ports(5), strict=True)), "key": "k"}
        (folder / "c.json").write_text(json.dumps(connection))
        parent = Process([sys.executable, "-c",
                          "import os, subprocess, sys, time\n"
                          "os.environ['JPY_PARENT_PID'] = str(os.getpid())\n"
                          "k = subprocess.Popen(sys.argv[1:], start_new_session=True)"
                          "\nprint('kernel', k.pid, flush=True)\ntime.sleep(600)",
                          *[word.format(connection_file=folder / "c.json") for word in OURS]],
                         env=clean_environment(folder))
        self.addCleanup(parent.end)
        pid = int(parent.wait_for(r"kernel (\d+)")[1])
        frontend = Frontend(ZeroMQWire({**connection, "ip": "127.0.0.1"}))
        self.addCleanup(frontend.wire.close)
        frontend.greet()
        child = int(frontend.finish(frontend.start(
            "import subprocess\nsubprocess.Popen(['sleep', '600']).pid")).result)
        parent.popen.kill()
        wait_until(lambda: not is_alive(pid))
        wait_until(lambda: not is_alive(child))

    def test_a_connection_can_be_encrypted(self):
        if not zmq.has("curve"):
            self.skipTest("this pyzmq has no CurveZMQ")
        public, secret = (key.decode() for key in zmq.curve_keypair())
        own = KernelProcess(curve_publickey=public, curve_secretkey=secret)
        self.addCleanup(own.end)

        class CurveWire(ZeroMQWire):
            def connect(self, channel, kind):
                mine = zmq.curve_keypair()
                new = self.sockets[channel] = self.context.socket(kind)
                new.linger, new.identity = 0, self.session.session.encode()
                new.curve_serverkey = public.encode()
                new.curve_publickey, new.curve_secretkey = mine
                if kind == zmq.SUB:
                    new.subscribe(b"")
                new.connect("tcp://{}:{}".format("127.0.0.1", own.connection[channel + "_port"]))
                self.poller.register(new, zmq.POLLIN)

        frontend = Frontend(CurveWire(own.connection))
        self.addCleanup(frontend.wire.close)
        frontend.greet()
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")
        plain = Frontend(ZeroMQWire(own.connection))
        self.addCleanup(plain.wire.close)
        plain.wire.sockets["shell"].sndtimeo = 1000  # milliseconds: nobody takes it
        with self.assertRaises((TimeoutError, zmq.Again)):
            plain.greet(seconds=1)

    def test_a_reconnecting_client_keeps_its_identity(self):
        own, first, run_cell = self.alone()
        wire = ZeroMQWire(own.connection)
        self.addCleanup(wire.close)
        again = wire.context.socket(zmq.DEALER)
        self.addCleanup(again.close, 0)
        again.identity = first.wire.session.session.encode()
        again.connect("tcp://127.0.0.1:{shell_port}".format(**own.connection))
        again.send_multipart(wire.session.pack(wire.session.message("kernel_info_request", {})))
        self.assertTrue(again.poll(SECONDS * 1000), "the second connection is not heard")

    @unittest.skipUnless(hasattr(os, "mkfifo"), "no ipc sockets")
    def test_channels_may_be_files(self):
        folder = self.folder()
        own = KernelProcess(transport="ipc", ip=str(folder / "k"))
        self.addCleanup(own.end)
        with zmq.Context() as context, context.socket(zmq.DEALER) as shell:
            session = kernel.Session(own.connection["key"])
            shell.linger = 0
            shell.connect(f"ipc://{folder / 'k'}-{own.connection['shell_port']}")
            shell.send_multipart(session.pack(session.message("kernel_info_request", {})))
            self.assertTrue(shell.poll(SECONDS * 1000), "no answer")


class KernelInstalls(Case):
    """`kernel.py install` writes what every Jupyter finds."""

    def install(self, folder, *arguments):
        done = subprocess.run([sys.executable, str(HERE / "kernel.py"), "install", *arguments],
                              env=clean_environment(folder), capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_the_spec_has_the_fields_of_a_kernel_spec(self):
        folder = self.folder()
        for arguments, path in [
                (["--user"], "jupyter_data_dir/kernels/minijupyter"),
                ([], "jupyter_data_dir/kernels/minijupyter"),
                (["--prefix", str(folder / "env")], "env/share/jupyter/kernels/minijupyter"),
                (["--name", "other", "--display-name", "Other ☃"],
                 "jupyter_data_dir/kernels/other")]:
            with self.subTest(arguments=arguments):
                self.assertIn(str(folder / path), self.install(folder, *arguments))
                spec = json.loads((folder / path / "kernel.json").read_text("utf-8"))
                self.assertIn("{connection_file}", spec["argv"])
                self.assertEqual((spec["language"], spec["interrupt_mode"],
                                  spec["kernel_protocol_version"]), ("python", "signal", "5.5.0"))
                self.assertEqual(spec["metadata"]["supported_encryption"], ["curve"])
        self.assertEqual(spec["display_name"], "Other ☃")

    def test_a_name_that_is_none_is_refused(self):
        for name in ("../evil", "a b", "", "a/b"):
            done = subprocess.run([sys.executable, str(HERE / "kernel.py"), "install", "--name",
                                   name],
                                  env=clean_environment(self.folder()), capture_output=True,
                                  text=True)
            self.assertNotEqual(done.returncode, 0)

    def test_the_installed_command_starts_a_kernel(self):
        folder = self.folder()
        self.install(folder)
        spec = json.loads((folder / "jupyter_data_dir/kernels/minijupyter/kernel.json").read_text())
        own = KernelProcess(argv=spec["argv"])
        self.addCleanup(own.end)
        frontend = own.connect()
        self.addCleanup(frontend.wire.close)
        info = frontend.request("kernel_info_request").reply["content"]
        self.assertEqual(spec["kernel_protocol_version"], info["protocol_version"] + ".0")

    @needs("jupyter_client")
    def test_jupyter_lists_it(self):
        folder = self.folder()
        self.install(folder, "--user", "--name", "listed")
        done = subprocess.run([sys.executable, "-m", "jupyter_client.kernelspecapp", "list",
                               "--json"],
                              env=clean_environment(folder), capture_output=True, text=True)
        self.assertIn("listed", json.loads(done.stdout)["kernelspecs"])


class AnotherLanguage(Case):
    """A kernel of another language is `Kernel` with another interpreter."""

    CALCULATOR = """if True:
        import sys, kernel
        class Calculator(kernel.Interpreter):
            implementation, banner = "calculator", "Sums only."
            language_info = {"name": "sums", "version": "1", "mimetype": "text/plain",
                             "file_extension": ".sum"}
            async def run(self, code):
                self.displayhook(sum(int(word) for word in code.split("+")))
            def is_complete(self, code): return {"status": "complete"}
            def complete(self, code, cursor):
                return {"matches": ["1"], "cursor_start": 0, "cursor_end": 0, "metadata": {}}
        kernel.Kernel(kernel.read_connection_file(sys.argv[-1]), Calculator).run()
    """

    def setUp(self):
        script = self.folder() / "calculator.py"
        script.write_text(self.CALCULATOR)
        own = KernelProcess([sys.executable, str(script), "{connection_file}"],
                            env=clean_environment(script.parent, PYTHONPATH=str(HERE)))
        self.addCleanup(own.end)
        self.frontend = own.connect()
        self.addCleanup(self.frontend.wire.close)
        self.kernel = own

    def test_a_calculator_calculates(self):
        cell = self.frontend.finish(self.frontend.start("40 + 2"))
        self.assertMessages(cell, "busy execute_input execute_result idle")
        self.assertEqual(cell.result, "42")

    def test_it_reports_its_own_errors_and_answers_its_own_questions(self):
        self.assertFails(self.frontend.finish(self.frontend.start("1 + x")), "ValueError")
        info = self.frontend.request("kernel_info_request").reply["content"]
        self.assertEqual((info["implementation"], info["language_info"]["name"]),
                         ("calculator", "sums"))
        reply = self.frontend.request("complete_request", code="", cursor_pos=0).reply["content"]
        self.assertEqual(reply["matches"], ["1"])

    def test_it_survives_an_interrupt(self):
        self.kernel.interrupt()
        self.assertEqual(self.frontend.finish(self.frontend.start("1 + 1")).result, "2")


@needs("jupyter_kernel_test")
class JupyterKernelTest(Case):
    """Jupyter's own test of a kernel, with every option it has: 13 of 13."""

    OPTIONS = {
        "language_name": "python", "file_extension": ".py",
        "code_hello_world": "print('hello, world')",
        "code_stderr": "import sys; print('test', file=sys.stderr)",
        "completion_samples": [{"text": "impo", "matches": {"import"}}, {"text": "zi", "matches":
                                                                        {"zip"}}],
        "complete_code_samples": ["1", "print('hello')", "def f(x):\n  return x*2\n\n\n"],
        "incomplete_code_samples": ["print('''hello", "def f(x):\n  x*2"],
        "invalid_code_samples": ["import = 7q", "x = = 1"],
        "code_page_something": "zip?", "code_generate_error": "raise ValueError()",
        "code_execute_result": [{"code": "1+2+3", "result": "6"},
                                {"code": "[n*n for n in range(1, 4)]",
                                                                  "result": "[1, 4, 9]"}],
        "code_display_data": [
            {"code": "from IPython.display import HTML, display; display(HTML('<b>test</b>'))",
             "mime": "text/html"},
            {"code": "from IPython.display import Math, display; display(Math('x'))",
             "mime": "text/latex"}],
        "code_history_pattern": "1?2*", "supported_history_operations": ("tail", "range", "search"),
        "code_inspect_sample": "zip",
        "code_clear_output": "from IPython.display import clear_output; clear_output()",
        "support_iopub_welcome": True}

    def test_all_thirteen_pass(self):
        from unittest import mock

        import jupyter_kernel_test
        folder = self.folder()
        install_kernelspec(folder, "mini", OURS)
        self.enterContext(mock.patch.dict(os.environ, clean_environment(
            folder, JUPYTER_PATH=str(folder))))
        suite = unittest.TestSuite()
        for case in (jupyter_kernel_test.KernelTests, jupyter_kernel_test.IopubWelcomeTests):
            mine = type(case.__name__, (case,), {**self.OPTIONS, "kernel_name": "mini"})
            suite.addTests(unittest.defaultTestLoader.loadTestsFromTestCase(mine))
        result = unittest.TestResult()
        suite.run(result)
        self.assertEqual((result.testsRun, result.errors, result.failures, result.skipped),
                         (13, [], [], []))


class OtherClients(Case):
    """Programs that run a kernel by its spec, as people start them."""

    def run_client(self, *argv, **options):
        env = clean_environment(self.place, JUPYTER_PATH=str(self.place))
        return subprocess.run([sys.executable, "-m", *argv], cwd=self.place, env=env, text=True,
                              capture_output=True, timeout=100, **options)

    def setUp(self):
        self.place = self.folder()
        install_kernelspec(self.place, "mini", OURS)
        self.notebook = self.place / "book.ipynb"
        self.notebook.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {
            "kernelspec": {"name": "mini", "display_name": "mini", "language": "python"}},
                                             "cells": [
                {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]},
                 "execution_count": 1, "outputs": [], "source": "n = 1"},
                {"cell_type": "code", "id": "b", "metadata": {}, "execution_count": 2, "source":
                 "print('out')\nn * 2", "outputs": [
                     {"output_type": "stream", "name": "stdout", "text": "out\n"},
                     {"output_type": "execute_result", "execution_count": 2, "metadata": {},
                      "data": {"text/plain": "2"}}]}]}))

    @needs("papermill")
    def test_papermill_runs_a_notebook_with_parameters(self):
        done = self.run_client("papermill", "book.ipynb", "out.ipynb", "-p", "n", "21")
        self.assertEqual(done.returncode, 0, done.stderr)
        nb = json.loads((self.place / "out.ipynb").read_text())
        self.assertIn("42", json.dumps(nb["cells"][-1]["outputs"]))

    @needs("nbval")
    def test_nbval_finds_the_outputs_unchanged(self):
        done = self.run_client("pytest", "--nbval", "-q", "-p", "no:cacheprovider", "book.ipynb")
        self.assertIn("2 passed", done.stdout)

    @needs("nbclient", "jupyter_client")
    def test_jupyter_execute_runs_a_notebook(self):
        done = self.run_client("jupyter", "execute", "--output=out", "book.ipynb")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("out", (self.place / "out.ipynb").read_text())

    @needs("jupyter_client")
    def test_jupyter_run_runs_a_program(self):
        (self.place / "program.py").write_text("print(6 * 7)")
        done = self.run_client("jupyter_client.runapp", "--kernel=mini", "program.py")
        self.assertEqual((done.stdout, done.returncode), ("42\n", 0), done.stderr)

    @needs("jupyter_console")
    def test_jupyter_console_shows_results_and_ends(self):
        done = self.run_client("jupyter_console", "--kernel=mini", "--simple-prompt",
                               input="6 * 7\nprint('printed')\n1/0\nexit\n")
        text = plain_text(done.stdout + done.stderr)
        for part in ("42", "printed", "ZeroDivisionError"):
            self.assertIn(part, text)

    @needs("jupyter_console", "pexpect")
    def test_jupyter_console_ends_at_exit(self):
        import pexpect
        env = clean_environment(self.place, JUPYTER_PATH=str(self.place), TERM="dumb")
        console = pexpect.spawn(sys.executable, ["-m", "jupyter_console", "--kernel=mini",
                                "--simple-prompt"], env=env, cwd=str(self.place), timeout=SECONDS)
        self.addCleanup(console.close, True)
        console.expect(r"In \[1\]")
        console.sendline("6 * 7")
        console.expect("42")
        console.sendline("exit()")
        console.expect(pexpect.EOF)


class Libraries(KernelCase):
    """Everyday libraries show themselves as in ipykernel."""

    # module -> code, MIME types that must be there, beside text/plain
    SHOWN = {
        "matplotlib": ("import matplotlib.pyplot as plt\nplt.plot([1, 2]);", "image/png"),
        "pandas": ("import pandas\npandas.DataFrame({'a': [1]})", "text/html"),
        "polars": ("import polars\npolars.DataFrame({'a': [1]})", "text/html"),
        "sympy": ("import sympy\nsympy.init_printing()\nsympy.Symbol('x') ** 2", "text/latex"),
        "plotly": ("import plotly.graph_objects as go\ngo.Figure([go.Bar(y=[1])])",
                   "application/vnd.plotly.v1+json"),
        "altair": ("import altair, pandas\naltair.Chart(pandas.DataFrame({'a': [1]})).mark_bar()"
                   ".encode(x='a')", "text/html"),
        "rich": ("from rich.table import Table\nTable('a')", "text/html"),
    }

    def shown(self, cell):
        return {mime for content in cell.of("display_data") + cell.of("execute_result")
                for mime in content["data"]}

    def test_a_value_is_shown_in_its_own_form(self):
        for module, (code, mime) in self.SHOWN.items():
            if importlib.util.find_spec(module):
                with self.subTest(module):
                    cell = self.run_cell(code, seconds=60)
                    self.assertEqual(cell.status, "ok", cell)
                    self.assertTrue([m for m in self.shown(cell) if m.startswith(mime)],
                                    self.shown(cell))

    @needs("pandas")
    def test_columns_and_accessors_are_completed(self):
        self.run_cell("import pandas\ndf = pandas.DataFrame({'city_name': ['a'], 'temp': [1.5]})",
                      seconds=60)
        for code, match in [("df['", "city_name"), ("df[['city_name', 'te", "temp"),
                            ("df.loc[:, 'te", "temp"), ("df.te", "temp"), ("df.temp.me", "mean"),
                            ("df.city_name.str.up", "upper"), ("df.columns.to", "to_list")]:
            with self.subTest(code):
                reply = self.request("complete_request", code=code, cursor_pos=len(code)).reply
                self.assertIn(match, reply["content"]["matches"])

    @needs("matplotlib")
    def test_figures_come_once_and_in_order(self):
        self.run_cell("%matplotlib inline\nimport matplotlib.pyplot as plt", seconds=60)
        for code, story in [
                ("plt.plot([1, 2])", "execute_result display_data"),
                ("fig = plt.figure();", "display_data"),
                ("plt.plot([1]); plt.show(); plt.plot([2]); plt.show()",
                 "display_data display_data"),
                ("print('a'); plt.plot([1]); plt.show(); print('b')", "stream display_data stream"),
                ("fig", "execute_result"), ("plt.close('all')", ""), ("plt.figure(); 1/0",
                                                                   "error display_data"),
                ("fig, ax = plt.subplots(); plt.close(); fig", "execute_result"),
                ("fig, ax = plt.subplots(); display(fig); plt.close()", "display_data")]:
            with self.subTest(code=code):
                expected = " ".join(f"busy execute_input {story} idle".split())
                self.assertMessages(self.run_cell(code), expected)

    @needs("plotly", "nbformat")
    def test_a_plotly_figure_shows_itself(self):
        cell = self.run_cell("import plotly.graph_objects as go\ngo.Figure([go.Bar(y=[1])]).show()",
                             seconds=60)
        self.assertIn("application/vnd.plotly.v1+json", self.shown(cell))

    @needs("altair")
    def test_an_altair_chart_displays_itself(self):
        cell = self.run_cell("import altair\naltair.Chart({'values': [{'a': 1}]}).mark_bar()"
                             ".encode(x='a:Q').display()", seconds=60)
        self.assertIn("text/html", self.shown(cell))

    @needs("bokeh")
    def test_a_bokeh_plot_shows_itself(self):
        cell = self.run_cell("from bokeh.plotting import figure, show\nfrom bokeh.io import "
                             "output_notebook\noutput_notebook()\np = figure()\n"
                             "p.line([1, 2], [3, 4])"
                             "\nshow(p)", seconds=60)
        self.assertEqual(cell.status, "ok", cell)
        self.assertIn("application/vnd.bokehjs_exec.v0+json", self.shown(cell))

    @needs("rich")
    def test_rich_prints_in_colour(self):
        cell = self.run_cell("from rich import print as rich_print\nrich_print('[red]x[/red]')")
        self.assertIn("text/html", self.shown(cell))

    @needs("tqdm")
    def test_tqdm_draws_its_bar(self):
        cell = self.run_cell("from tqdm import tqdm\nfor i in tqdm(range(3)): pass")
        self.assertIn("100%", cell.text("stderr"))
        self.assertIn("\r", cell.text("stderr"))

    def test_the_real_shell_or_its_stand_in_answers_libraries(self):
        for code, result in [
                ("type(get_ipython()).__name__", "'ZMQInteractiveShell'"),
                ("type(get_ipython()).__module__", "'ipykernel.zmqshell'"),
                ("from IPython import get_ipython as g\ng() is get_ipython()", "True"),
                ("x_of_cell = 1\nget_ipython().user_ns['x_of_cell']", "1"),
                ("get_ipython().run_line_magic('pwd', '') == __import__('os').getcwd()", "True"),
                ("get_ipython().ev('x_of_cell + 1')", "2"),
                ("get_ipython().getoutput('echo 1')[0]", "'1'"),
                ("'__IPYTHON__' in dir(__builtins__) or True", "True"),
                ("get_ipython().run_cell('y_of_cell = 5'); y_of_cell", "5"),
                ("get_ipython().push({'z_of_cell': 3}); z_of_cell", "3")]:
            with self.subTest(code=code):
                self.assertEqual(self.run_cell(code).result, result)

    def test_the_classes_of_ipythons_display_module_are_there(self):
        for code, mime in [
                ("HTML('<b>')", "text/html"), ("Markdown('*m*')", "text/markdown"),
                ("Latex('$x$')", "text/latex"), ("Math('x')", "text/latex"),
                ("SVG('<svg/>')", "image/svg+xml"), ("JSON({'a': 1})", "application/json"),
                ("Javascript('1')", "application/javascript"), ("Code('x = 1')", "text/plain"),
                ("IFrame('http://x/', 10, 10)", "text/html"), ("Pretty('p')", "text/plain"),
                ("YouTubeVideo('abc')", "text/html"), ("Audio(url='http://x/a.wav')", "text/html"),
                ("Video('http://x/v.mp4')", "text/html"), ("FileLink('x.txt')", "text/html"),
                ("ProgressBar(10)", "text/html"), ("FileLinks('.')", "text/html"),
                ("Image(url='http://x/i.png')", "text/html"),
                ("GeoJSON({})", "application/geo+json"),
                ("Image(data=b'GIF89a', format='gif')", "image/gif")]:
            with self.subTest(code=code):
                cell = self.run_cell(f"from IPython.display import *\nimport IPython.display\n"
                                     f"display(IPython.display.{code})")
                self.assertIn(mime, self.shown(cell), cell)


class LibrariesWithoutIPython(WithoutIPython, Libraries):
    """The same where IPython, ipykernel and matplotlib_inline are not installed."""

    test_a_value_is_shown_in_its_own_form = Libraries.test_a_value_is_shown_in_its_own_form
    test_figures_come_once_and_in_order = Libraries.test_figures_come_once_and_in_order
    test_a_plotly_figure_shows_itself = Libraries.test_a_plotly_figure_shows_itself
    test_an_altair_chart_displays_itself = Libraries.test_an_altair_chart_displays_itself
    test_a_bokeh_plot_shows_itself = Libraries.test_a_bokeh_plot_shows_itself
    test_rich_prints_in_colour = Libraries.test_rich_prints_in_colour
    test_tqdm_draws_its_bar = Libraries.test_tqdm_draws_its_bar
    test_the_real_shell_or_its_stand_in_answers_libraries = (
        Libraries.test_the_real_shell_or_its_stand_in_answers_libraries)
    test_the_classes_of_ipythons_display_module_are_there = (
        Libraries.test_the_classes_of_ipythons_display_module_are_there)

    def test_ipython_is_not_there(self):
        self.assertFails(self.run_cell("import IPython.core.magic"), "ModuleNotFoundError")
        self.assertFails(self.run_cell("import ipykernel"), "ModuleNotFoundError")


@needs("ipywidgets")
class Widgets(KernelCase):
    def test_a_slider_opens_its_comms_and_hears_the_page(self):
        cell = self.run_cell("import ipywidgets\nslider = ipywidgets.IntSlider(3)\nslider",
                             seconds=60)
        opened = cell.of("comm_open")
        self.assertEqual([c["data"]["state"]["_model_name"] for c in opened],
                         ["LayoutModel", "SliderStyleModel", "IntSliderModel"])
        self.assertIn("application/vnd.jupyter.widget-view+json", cell.display)
        moved = asked(self.frontend, "comm_msg", comm_id=opened[-1]["comm_id"], data={
            "method": "update", "state": {"value": 42}, "buffer_paths": []})
        self.frontend.until(lambda: moved.is_idle)
        self.assertEqual(self.run_cell("slider.value").result, "42")

    def test_a_widget_that_is_closed_closes_its_comm(self):
        self.run_cell("import ipywidgets\nbutton = ipywidgets.Button()", seconds=60)
        self.assertIn("comm_close", self.run_cell("button.close()").story)

    def test_interact_runs_its_function(self):
        cell = self.run_cell("import ipywidgets\n@ipywidgets.interact(x=3)\n"
                             "def f(x): print('x is', x)",
                             seconds=60)
        self.assertEqual(cell.status, "ok", cell)
        self.assertIn("x is 3", cell.text() + json.dumps(cell.of("comm_msg")))

    def test_an_output_widget_captures_below_its_cell(self):
        cell = self.run_cell("import ipywidgets\nout = ipywidgets.Output()\n"
                             "with out: print('inside')",
                             seconds=60)
        msg_ids = [c["data"]["state"]["msg_id"] for c in cell.of("comm_msg")
                   if "msg_id" in c["data"].get("state", {})]
        self.assertEqual(msg_ids, [cell.request["header"]["msg_id"], ""])

    def test_an_error_inside_an_output_widget_is_an_error_message(self):
        cell = self.run_cell("import ipywidgets\nout = ipywidgets.Output()\nwith out: 1/0",
                             seconds=60)
        self.assertEqual((cell.error.get("ename"), cell.status), ("ZeroDivisionError", "ok"))

    def test_a_progress_bar_of_tqdm_is_a_widget(self):
        if not importlib.util.find_spec("tqdm"):
            self.skipTest("needs tqdm")
        cell = self.run_cell("from tqdm.auto import tqdm\nfor i in tqdm(range(3)): pass",
                             seconds=60)
        self.assertEqual(cell.status, "ok", cell)
        self.assertTrue("FloatProgressModel" in json.dumps(cell.of("comm_open"))
                        or "100%" in cell.text("stderr"))


# ipykernel is the oracle for all that IPython does: each row is run on both, cell by cell, and what
# iopub and the reply say must be the same. Rows share their kernels and run in the same order, so
# that what one leaves behind is the same on both sides. A cell is its code, or (code, *what the
# user types). A row marked TRIGGERS runs once more on a kernel of its own in which nobody has
# imported IPython: there the feature itself must bring it.

TRIGGERS = True
SETUP = ("import IPython, os, sys, types, asyncio\nfrom IPython.core.interactiveshell import "
         "InteractiveShell\nfrom IPython.display import display, HTML\nip = get_ipython()")
SAME = [   # name, cells, [a module that must be installed], [TRIGGERS]
    ("interactivity of the class", [
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "InteractiveShell.ast_node_interactivity = 'all'", "1\n2", "x = 3\nx\nx + 1",
        "InteractiveShell.ast_node_interactivity = 'last_expr'", "1\n2"], TRIGGERS),
    ("interactivity of the shell", [
        "get_ipython().ast_node_interactivity = 'last_expr_or_assign'", "y = 5", "y += 1",
        "get_ipython().ast_node_interactivity = 'none'", "5",
        "get_ipython().ast_node_interactivity = 'last_expr'", "y"], TRIGGERS),
    ("interactivity by %config", [
        "%config InteractiveShell.ast_node_interactivity = 'all'", "1\n2;",
        "%config InteractiveShell.ast_node_interactivity", "%config ZMQInteractiveShell.colors",
        "%config InteractiveShell.ast_node_interactivity = 'last_expr'", "%config nonsense"],
     TRIGGERS),
    ("results by underscores", [
        "'a'", "'b'", "'c';", "_, __, ___", "len(Out) > 2, In[-1], _i, _ii", "del _\n4", "_",
        "__ = 1", "8", "_, __", "del _, __, ___\n0", "_"]),
    ("a custom handler of errors", [
        "def handler(shell, etype, value, tb, tb_offset=None):\n"
        "    print('handled', etype.__name__, value)\n"
        "get_ipython().set_custom_exc((ZeroDivisionError,), handler)", "1/0", "int('x')",
        "get_ipython().set_custom_exc((), None)", "1/0"], TRIGGERS),
    ("input transformers", [
        "def shout(lines):\n"
        "    return [line.replace('hello', 'print(\"HELLO\")') for line in lines]\n"
        "get_ipython().input_transformers_cleanup.append(shout)", "hello", "In[-1]",
        "get_ipython().input_transformers_cleanup.remove(shout)", "hello"], TRIGGERS),
    ("transformers of the tree", [
        "import ast\nclass Double(ast.NodeTransformer):\n    def visit_Constant(self, node):\n"
        "        return ast.copy_location(ast.Constant(node.value * 2), node)\n"
        "double = Double()\nget_ipython().ast_transformers.append(double)", "21",
        "_ip = get_ipython()", "_ip.ast_transformers.remove(double)", "21"], TRIGGERS),
    ("events", [
        "calls = []\ndef pre_execute(): calls.append('pre_execute')\n"
        "def post_execute(): calls.append('post_execute')\n"
        "def pre_run_cell(info): calls.append((info.raw_cell, info.store_history, info.silent))\n"
        "def post_run_cell(result): calls.append((result.success, result.result, "
        "result.execution_count is not None, repr(result.error_in_exec), result.info.raw_cell[:9]))"
        "\nfor function in (pre_execute, post_execute, pre_run_cell, post_run_cell):\n"
        "    get_ipython().events.register(function.__name__, function)\n42",
        "6 * 7", "calls", "calls.clear()\n1/0", "calls", "await __import__('asyncio').sleep(0)\n5",
        "calls[-3:]", "%pwd?", "calls[-1]", "print('no end", "calls[-1]",
        "for function in (pre_execute, post_execute, pre_run_cell, post_run_cell):\n"
        "    get_ipython().events.unregister(function.__name__, function)",
        "calls[-2:]"], TRIGGERS),
    ("a callback that fails", [
        "def fails(): 1/0\nget_ipython().events.register('pre_execute', fails)", "5",
        "get_ipython().events.unregister('pre_execute', fails)", "6"]),
    ("the last result", [
        "get_ipython().config and 7",
        "last = get_ipython().last_execution_result\nlast.result, last.success, "
        "last.info.raw_cell", "1/0", "last = get_ipython().last_execution_result\n"
        "last.success, repr(last.error_in_exec), get_ipython().last_execution_succeeded"],
     TRIGGERS),
    ("run_cell", [
        "result = get_ipython().run_cell('print(1); 6 * 7')", "result.result, result.success",
        "result = get_ipython().run_cell('1/0'); result.success, repr(result.error_in_exec)",
        "get_ipython().run_cell('1 +'); 5", "get_ipython().run_cell('z = 1', store_history=True)\n"
        "print(In[-1], z)"], TRIGGERS),
    ("%rerun, %recall, %macro", [
        "'again'", "%rerun", "'recalled'", "%recall", "print('in macro')",
        "%macro -q twice 1", "%macro", "%macro nothing_there 9999"], TRIGGERS),
    ("%history", ["first_of_history = 1", "%history -l 1", "%hist -n -l 2", "%history -g nothing"]),
    ("%store", [
        "kept = [1, 2]", "%store kept", "del kept", "%store -r kept", "kept", "%store",
        "%store -d kept",
        "%store nobody"], TRIGGERS),
    ("%notebook", ["%notebook all.ipynb", "os.path.exists('all.ipynb')", "%notebook"]),
    ("%gui", ["%gui", "%gui inline"], TRIGGERS),
    ("extensions", [
        "m = __import__('types').ModuleType('an_extension')\n"
        "m.load_ipython_extension = lambda shell: print('loaded', type(shell).__name__)\n"
        "m.unload_ipython_extension = lambda shell: print('unloaded')\n"
        "__import__('sys').modules['an_extension'] = m", "%load_ext an_extension",
        "%load_ext an_extension",
        "%reload_ext an_extension", "%unload_ext an_extension", "%unload_ext an_extension",
        "%load_ext no_such_extension", "%load_ext"], TRIGGERS),
    ("a cell that uses what it brings", [
        "%load_ext autoreload\n%autoreload 2\n%config InteractiveShell.xmode = 'Plain'\n"
        "%xmode Minimal\nprint('once')\n6 * 7", "1/0", "%autoreload 0\n%xmode Context"], TRIGGERS),
    ("an error in the cell that brings it", ["get_ipython().config\nint('x')", "%no_such_magic\n5",
                                             "get_ipython().config\nf(:"], TRIGGERS),
    ("figures in a cell that brings it", [
        "%matplotlib inline\n%config InlineBackend.figure_format = 'svg'\n"
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]);", "plt.plot([2, 1]);"],
     "matplotlib", TRIGGERS),
    ("autoreload", ["%reload_ext autoreload", "%autoreload 2", "%autoreload 0",
        "%aimport"], TRIGGERS),
    ("magics of others", [
        "from IPython.core.magic import register_line_magic, register_cell_magic, Magics, "
        "magics_class, cell_magic\n@register_line_magic\ndef shout(line): return line.upper()\n"
        "@register_cell_magic\ndef reverse(line, cell): print(line, cell[::-1])\n"
        "@magics_class\nclass Px(Magics):\n    @cell_magic\n    def px(self, line, cell):\n"
        "        return self.shell.run_cell(cell).result\nget_ipython().register_magics(Px)",
        "%shout hello", "x = %shout hello\nx", "%%reverse with\nabc", "%%px\nprint('on engine')\n5",
        "get_ipython().run_line_magic('shout', 'a'), get_ipython().find_magic('px') is not None"],
     TRIGGERS),
    ("unknown magics", ["%no_such_magic 1", "%%no_such_magic\n1", "%capture 1", "%%pwd\n1",
        "%bash"],
     TRIGGERS),
    ("magics", [
        "%pwd", "%cd .", "%env NO_SUCH=1", "%who_ls int", "%%time\n1", "%time 2",
        "%timeit -n1 -r1 1",
        "%%capture kept\nprint(1); display(2); 3", "kept.stdout, len(kept.outputs)", "kept()",
        "%precision 3", "1/3", "%precision", "%xmode Minimal", "1/0", "%xmode Context",
        "%colors linux",
        "%%writefile made.txt\nabc", "%cat made.txt", "%less made.txt", "%more made.txt",
        "%load made.txt", "%pinfo len", "%psearch nobody*",
        "%alias greet echo hello %s", "%greet you", "%unalias greet", "%%html\n<b>",
        "%%bash\necho hi",
        "%%script --no-raise-error false\n", "%automagic", "%automagic", "%pdb", "%pdb",
        "%lsmagic?",
        "%pprint", "{1: 2}", "%pprint", "%logstate", "%page len", "%pfile os.path",
        "%prun -q 1", "%sx echo 1", "%reset_selective -f no_such", "%xdel x"]),
    ("shell commands", [
        "!echo out; exit 3", "_exit_code", "lines = !echo a; echo b\nlines, lines.n",
        "word = 'w'\n!echo {word} $word $$HOME {1 + 1}",
        "def f(local): \n    !echo $local {local}\n"
        "f('of function')", "get_ipython().getoutput('echo x').s", "!!echo listed"]),
    ("errors", [
        "1/0", "1 +", "x = 1\ny = = 2", "  x = 1\n y = 2", "raise ValueError",
        "raise SystemExit(3)",
        "import sys; sys.exit()", "undefined_name", "return 1", "exec('1 +')", "def f(:",
        "f'{'", "raise KeyboardInterrupt", "try:\n    1/0\nexcept Exception as e:\n    "
        "raise KeyError('k') from e", "%tb", "assert False, 'because'", "await 5", "break",
        "class Own(Exception):\n    def _render_traceback_(self): return ['own traceback']\n"
        "raise Own", "raise ExceptionGroup('g', [ValueError(1)])"]),
    ("%debug", [("1/0", ), ("%debug", "p 41 + 1", "q"), "def f(): return 1"]),
    ("values that show themselves", [
        "class A:\n    def __init__(self, **m): self.__class__ = type('B', (A,), m)\n"
        "    def __repr__(self): return 'a'",
        "A(_repr_html_=lambda s: '<b>')",
        "A(_repr_png_=lambda s: b'png', _repr_latex_=lambda s: '$x$')",
        "A(_repr_mimebundle_=lambda s, include, exclude: ({'x/y': 1}, {'x/y': {'z': 1}}))",
        "A(_ipython_display_=lambda s: print('own'))",
        "def refuse(self, *a, **k): raise NotImplementedError\n"
        "A(_repr_html_=refuse, _repr_mimebundle_=refuse)",
        "display(A(_repr_html_=lambda s: '<i>'), 1)",
        "get_ipython().display_formatter.formatters['text/html'].for_type(complex, "
        "lambda c: '<i>complex</i>')", "1j", "display(HTML('<p>'), metadata={'a': 1})",
        "h = display(1, display_id='i')\nh.update(2)", "from IPython.display import clear_output\n"
        "clear_output(True)", "display({'text/plain': 'raw'}, raw=True)", "[1, 2, {3: 'x'}] * 12",
        "print"]),
    ("questions", ["len?", "len??", "get_ipython?", "nobody?", "le*?", "%pwd?", "x = 1; len?"]),
    ("payloads", ["get_ipython().set_next_input('next')",
        "get_ipython().set_next_input('a', True); "
                  "get_ipython().set_next_input('b', replace=True)", "%load_ext", "exit(3)",
        "exit(True)"]),
    ("await", ["import asyncio\nawait asyncio.sleep(0.01, 5)",
        "async def f():\n    return 6\nawait f()",
               "async for i in nothing(): pass", "async with asyncio.timeout(0.01):\n"
               "    await asyncio.sleep(5)",
        "async def gen():\n    yield 1\n[x async for x in gen()]",
               "def g():\n    return (await 1)"]),
    ("futures", ["from __future__ import annotations\ndef f(x: nothing): pass",
                 "def g(x: nothing_yet): pass\ng.__annotations__"]),
    ("what the kernel knows", [
        "k = get_ipython().kernel\n[hasattr(k, n) for n in ('session', 'shell', 'do_shutdown', "
        "'comm_manager', 'get_parent')], k.shell is get_ipython()",
        "p = get_ipython().get_parent()\n"
        "p['header']['msg_type'], p['content']['code'], p['msg_type']",
        "get_ipython().parent_header['header'] == get_ipython().kernel.get_parent()['header']",
        "'IPKernelApp' in get_ipython().config", "type(get_ipython()).__name__, "
        "type(get_ipython()).__module__"], TRIGGERS),
    ("the connection", [
        "import ipykernel, ipykernel.connect, os\n"
        "os.path.basename(ipykernel.get_connection_file())",
        "sorted(ipykernel.connect.get_connection_info(unpack=True))"],
     "ipykernel", TRIGGERS),
    ("ipynbname", ["import ipynbname", "try:\n    ipynbname.name()\nexcept Exception as e:\n"
                   "    print(type(e).__name__, e)"], "ipynbname"),
    ("line_profiler", [
        "%load_ext line_profiler", "def profiled():\n    a = 1\n    return a",
        "%lprun -f profiled profiled()"], "line_profiler", TRIGGERS),
    ("figures", [
        "import matplotlib.pyplot as plt", "plt.plot([1, 2]);", "fig, ax = plt.subplots()",
        "fig", "%matplotlib inline", "%config InlineBackend.figure_format = 'svg'",
        "plt.plot([1, 2]); print('before')", "%%capture kept\nplt.plot([1])", "len(kept.outputs)",
        "%matplotlib no_such_backend", "%matplotlib --list"], "matplotlib"),
    ("rich", ["import rich.traceback\nold = rich.traceback.install(width=60, code_width=40)", "1/0",
              "1 +", "for name in ('_showtraceback', 'showtraceback', 'showsyntaxerror'):\n"
              "    delattr(get_ipython(), name)", "1/0"], "rich", TRIGGERS),
]
# Name, cell, what ipykernel says (stdout, stderr, the reply's ename), what we say, why.
DIFFERENT = [
    ("the line ends of a command", "!echo a", ("a\r\n", "", None), ("a\n", "", None),
     "they are its terminal's, not the command's"),
    ("what a command says on stderr", "!echo e >&2", ("e\r\n", "", None), ("", "e\n", None),
     "one terminal for both cannot tell them apart"),
    ("an error without a text", "class Odd(Exception):\n    def __str__(self): 1/0\nraise Odd",
     ("", "", "ZeroDivisionError"), ("", "", "Odd"), "that one is the user's error"),
    ("a result that cannot be shown", "class Odd:\n    def _repr_html_(self): 1/0\nOdd()",
     ("", "", "NoneType"), ("", "", "ZeroDivisionError"), "the reply names the error"),
    ("a setting of the page's", "%autosave 60", ("Autosaving every 60 seconds\n", "", None),
     ("", "", None), "only the classic notebook ran the JavaScript that it sends"),
]


class Comparison:
    """What the kernels said about cells, in words that do not depend on place and time."""

    PLACES = [(re.compile(pattern), to) for pattern, to in (
        (r"\x1b\[[\d;]*m|\r(?=\n)", ""),
        (r"0x[0-9a-f]+|(?<=object at )[0-9a-f]+", "ADDRESS"),
        (r"\S*/ipykernel_\d+/[\d-]+\.py|(?<=\()\d+\.py|Cell In\[\d+\]", "CELL"),
        (r"(?m)^ +\d+ +\d+( +[\d.]+){3}", "PROFILE"),
        (r"\d[\d.e+]* ?(?:[nµμum]?s|min|seconds)\b", "TIME"), (r"(?m)[-=]{20,}", "LINE"),
        (r"(?:TIME ± )?TIME per loop.*|Timer unit.*|Total time.*", "TIMING"))]

    def __init__(self, argv, **options):
        self.kernel, self.has_ended = KernelProcess(argv, **options), False

    @functools.cached_property
    def frontend(self):
        return self.kernel.connect()

    def end(self):
        if not self.has_ended:
            self.has_ended = True
            self.frontend.wire.close()
            self.kernel.end()

    def start(self, cell):
        code, *self.frontend.typed = (cell,) if isinstance(cell, str) else cell
        return self.frontend.start(code)

    def ask(self, cell):
        return self.frontend.finish(self.start(cell), seconds=60)

    @staticmethod
    def said(sides, cells):
        """[what each cell said] of each side; they run a cell at the same time."""
        answers = []   # a row for each cell
        for cell in cells:
            answers.append([side.start(cell) for side in sides])
            for side, answer in zip(sides, answers[-1], strict=True):
                side.frontend.finish(answer, seconds=60)
        return [[side.words(answer, column[0].count) for answer in column]
                for side, column in zip(sides, zip(*answers, strict=True), strict=True)]

    def words(self, answer, first):
        """(type, content) of each output, neighbouring streams as one, then the reply."""
        said = []
        for message in answer.messages:
            msg_type, content = message["header"]["msg_type"], dict(message["content"])
            if msg_type in ("status", "execute_input"):
                continue
            if "traceback" in content:
                content["traceback"] = content["traceback"][-1].rpartition("\n")[2]
            if "execution_count" in content:
                content["execution_count"] -= first
            if msg_type == "stream" and said and said[-1][0] == f"stream {content['name']}":
                said[-1] = (said[-1][0], said[-1][1] + content["text"])
            elif msg_type == "stream":
                said.append((f"stream {content['name']}", content["text"]))
            else:
                said.append((msg_type, content))
        reply = answer.reply["content"]
        fields = ("status", "ename", "evalue", "payload")
        said.append(("reply", {name: reply[name] for name in fields if name in reply}))
        said += [("question", question["prompt"]) for question in answer.questions]
        return [(kind, self.placeless(content)) for kind, content in said]

    def placeless(self, value):
        if isinstance(value, dict):
            return {key: self.placeless(value[key]) for key in sorted(value)}
        if isinstance(value, list):
            return [self.placeless(item) for item in value]
        if not isinstance(value, str):
            return value
        value = value.replace(os.path.realpath(self.kernel.folder.name), "FOLDER")
        if value.startswith(("iVBOR", "<?xml")):
            return value[:5]   # a picture
        for pattern, to in self.PLACES:
            value = pattern.sub(to, value)
        return value


@needs("ipykernel")
class SameAsIpykernel(Case):
    """Where IPython runs the cells, iopub and the replies are those of ipykernel."""

    @classmethod
    def setUpClass(cls):
        cls.ipykernel, cls.ours = cls.sides = [Comparison(argv) for argv in (IPYKERNEL, OURS)]
        cls.expected = {}   # name of a row -> what ipykernel says about its cells
        for side in cls.sides:
            cls.addClassCleanup(side.end)
            side.ask(SETUP)

    def compare(self, name, cells, side):
        sides = [side] if name in self.expected else [self.ipykernel, side]
        *theirs, ours = Comparison.said(sides, cells)
        if theirs:
            (self.expected[name],) = theirs
        for cell, expected, said in zip(cells, self.expected[name], ours, strict=True):
            with self.subTest(name, cell=cell):
                self.assertEqual(said, expected)

    def rows(self):
        """(name, cells, whether they bring IPython) of the rows that can be run here."""
        for name, cells, *more in SAME:
            needed = [module for module in more if isinstance(module, str)]
            if all(importlib.util.find_spec(module) for module in needed):
                yield name, cells, TRIGGERS in more

    def test_what_ipython_does_is_the_same(self):
        for name, cells, _ in self.rows():
            self.compare(name, cells, self.ours)

    def test_what_needs_ipython_brings_it(self):
        rows = [(name, cells) for name, cells, brings in self.rows() if brings]
        started = []   # the next kernels start while the cells of a row run
        for number, row in enumerate(rows):
            while len(started) < 3 and number + len(started) < len(rows):
                started.append(Comparison(OURS))
                self.addCleanup(started[-1].end)
            fresh = started.pop(0)
            self.compare(*row, fresh)
            fresh.end()

    def test_what_differs_on_purpose(self):
        for name, cell, *both, why in DIFFERENT:
            for side, expected in zip(self.sides, both, strict=True):
                with self.subTest(name, why=why):
                    answer = side.ask(cell)
                    self.assertEqual((answer.text(), answer.text("stderr"),
                                      answer.reply["content"].get("ename")), expected)


class UnderIPython:
    """The tests of another class once more, in a kernel where IPython runs the cells."""

    OTHERWISE = ()   # tests of what IPython does in a way of its own; SameAsIpykernel has them

    def __init_subclass__(cls):   # `chosen_tests` takes the tests that a class itself has
        for name in dir(cls):
            if name.startswith("test") and name not in cls.OTHERWISE:
                setattr(cls, name, getattr(cls, name))

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.frontend.finish(cls.frontend.start("import IPython", store_history=False), seconds=60)


@needs("IPython")
class ExecutionUnderIPython(UnderIPython, KernelExecution):
    pass


@needs("IPython")
class ErrorsUnderIPython(UnderIPython, KernelErrors):
    pass


@needs("IPython")
class DisplayUnderIPython(UnderIPython, KernelDisplay):
    pass


@needs("IPython")
class InterruptUnderIPython(UnderIPython, KernelInterrupt):
    pass


@needs("IPython")
class StdinUnderIPython(UnderIPython, KernelStdin):
    pass


@needs("IPython")
class SubshellsUnderIPython(UnderIPython, KernelSubshells):
    pass


@needs("IPython")
class RequestsUnderIPython(UnderIPython, KernelRequests):
    # It keeps the names of old outputs hidden, with their values.
    OTHERWISE = ("test_the_outputs_that_are_kept_are_bounded",)


@needs("IPython")
class HardTimesUnderIPython(UnderIPython, KernelHardTimes):
    pass


@needs("IPython")
class OutputUnderIPython(UnderIPython, KernelOutput):
    pass


@needs("IPython")
class HistoryUnderIPython(UnderIPython, KernelHistory):
    pass


@needs("IPython")
class QuestionsUnderIPython(UnderIPython, KernelQuestions):
    pass


def kinds(nb):
    """Per code cell: its MIME types and errors in order, then which streams it wrote to."""
    return [[kind for kind in cell if "stream" not in kind]
            + sorted({kind for kind in cell if "stream" in kind}) for cell in outcome(nb)]


@needs("nbclient", "nbformat", "ipykernel", "matplotlib", "pandas")
class NotebooksSideBySide(Case):
    """Real notebooks on this kernel and on ipykernel: the same MIME types, cell by cell."""

    NAMES = ("handson-math_linear_algebra", "handson-tools_numpy", "handson-tools_pandas",
             "ipython-Animations_Using_clear_output", "ipython-Capturing_Output",
             "ipython-Custom_Display_Logic", "ipython-Plotting_in_the_Notebook",
             "ipython-Typesetting_Equations", "ipython-Updating_Displays",
             "ipython-Working_With_Markdown_Cells")

    # (notebook, cell) -> why they differ
    KNOWN = {("ipython-Plotting_in_the_Notebook", 5): "%matplotlib notebook: pictures here"}

    @needs_notebooks
    def test_the_mime_types_are_those_of_ipykernel(self):
        print("\nnotebook                                    cells  differ")
        for name in self.NAMES:
            with self.subTest(name):
                ours, theirs = map(kinds, executed_on_both(name + ".ipynb"))
                rows = [(number, *pair) for number, pair in enumerate(
                    zip(ours, theirs, strict=True)) if pair[0] != pair[1]]
                print(f"{name:43} {len(ours):5} {len(rows):7}")
                for row in rows:
                    print("  cell {}: {}; on ipykernel {}".format(*row))
                self.assertEqual([row for row in rows if (name, row[0]) not in self.KNOWN], [])


class KernelKeepsOut(Case):
    """A kernel runs no module of the notebook's folder that no cell has imported."""

    OTHERS = ("zmq", "IPython", "ipykernel", "comm", "traitlets", "jedi", "matplotlib", "pip",
              "prompt_toolkit", "pygments", "stack_data", "psutil", "ctypes", "sitecustomize")
    PATIENCE = 8   # seconds; %pip is slow
    TRAPS = {"raises": "raise RuntimeError('run by nobody')", "ends the process": "os._exit(3)"}

    def trapped(self, trap="raises", but=()):
        """A folder whose files have the names of modules and tell when one of them has run."""
        folder = self.folder()
        names = {*sys.stdlib_module_names, *self.OTHERS} - {*sys.builtin_module_names, *but}
        code = (f"import os\nwith open({str(folder / 'ran.txt')!r}, 'a') as f: "
                f"f.write(__name__ + ' ')\n{self.TRAPS[trap]}\n")
        for name in names:
            (folder / f"{name}.py").write_text(code)
        return folder

    def start(self, folder, argv=OURS, **options):
        own = KernelProcess(argv, cwd=folder, **options)
        self.addCleanup(own.end)
        frontend = own.connect()
        self.addCleanup(frontend.wire.close)
        return own, frontend

    def assertNothingRan(self, folder):
        ran = folder / "ran.txt"
        text = ran.read_text() if ran.exists() else ""
        ran.unlink(missing_ok=True)
        self.assertEqual(text, "", "modules of the folder that were run")

    CELLS = {   # what a person does -> cell, answers to questions, pattern in what is shown
        "print": ("print('out')", [], "out"),
        "a value": ("[1, {'a': 2}, {3}, 1.5, b'x', 2 + 1j]", [], "1.5"),
        "an error": ("def f(x): return 1 / x\nf(0)", [], "ZeroDivisionError"),
        "a chain of errors": ("try: {}['a']\nexcept KeyError as e: raise ValueError('b') from e",
                              [], "(?s)KeyError.*ValueError"),
        "a syntax error": ("x = = 1", [], "SyntaxError"),
        "an error in a magic": ("%%time\n1/0", [], "ZeroDivisionError"),
        "a muted value": ("5;  # muted", [], "."),
        "await": ("async def f(): return 'awaited'\nawait f()", [], "awaited"),
        "input": ("input('? ')", ["typed"], "typed"),
        "a shell command": ("!ls | head -1", [], r"\w"),
        "the output of a shell command": ("lines = !echo one\nlines", [], "one"),
        "%time": ("%time sum(range(9))", [], "36"),
        "%timeit": ("%timeit -n 1 -r 1 1", [], "loop"),
        "%%capture": ("%%capture kept\nprint('kept')", [], "."),
        "%who": ("%who", [], "."),
        "%pwd": ("%pwd", [], r"\w"),
        "an unknown magic": ("%no_such_magic", [], "no_such_magic"),
        "help": ("print?", [], "."),
        "help with source": ("f??", [], "."),
        "a display": ("class H:\n    def _repr_html_(self): return '<b>h</b>'\n"
                      "display(H())\nH()", [], "<b>h</b>"),
        "a display that fails": ("class H:\n    def _repr_html_(self): 1/0\nH()", [], "H"),
        "%pip": ("%pip --version", [], r"pip \d"),
        "the debugger": ("1/0", [], "ZeroDivisionError"),
        "%debug": ("%debug", ["p 'seen'", "q"], "seen"),
        "breakpoint": ("breakpoint()", ["p 'there'", "c"], "there"),
    }

    def assertKeptOut(self, folder, argv, starts_in=None):
        """A person's day with a kernel that stands among traps, or moves there."""
        own, frontend = self.start(starts_in or folder, argv)
        frontend.finish(frontend.start(f"%cd {folder}"))
        with self.subTest("the start"):
            self.assertNothingRan(folder)
        for what, (code, typed, pattern) in self.CELLS.items():
            with self.subTest(what):
                frontend.typed = list(typed)
                cell = frontend.start(code)
                frontend.finish(cell, seconds=self.PATIENCE)
                self.assertNothingRan(folder)
                shown = json.dumps([m["content"] for m in cell.messages] + [
                    cell.reply["content"]]).replace(r"\u001b", "")
                self.assertRegex(re.sub(r"\[[\d;]*m", "", shown), pattern)
            if not cell.is_done:
                return   # it hangs: no need to wait for all the others
        for msg_type, channel, content in [
                ("complete_request", "shell", {"code": "pri", "cursor_pos": 3}),
                ("complete_request", "shell", {"code": "import asyn", "cursor_pos": 11}),
                ("complete_request", "shell", {"code": "open('ra", "cursor_pos": 8}),
                ("inspect_request", "shell", {"code": "print", "cursor_pos": 5}),
                ("inspect_request", "shell", {"code": "f", "cursor_pos": 1, "detail_level": 1}),
                ("is_complete_request", "shell", {"code": "for x in y:"}),
                ("history_request", "shell", {"hist_access_type": "tail", "n": 5}),
                ("history_request", "shell", {"hist_access_type": "search", "pattern": "*p*"}),
                ("comm_info_request", "shell", {}), ("usage_request", "control", {}),
                ("create_subshell_request", "control", {}),
                ("interrupt_request", "control", {})]:
            with self.subTest(msg_type, **content):
                answer = frontend.ask(msg_type, channel, **content)
                frontend.finish(answer, seconds=self.PATIENCE)
                self.assertNothingRan(folder)
                self.assertNotEqual(answer.status, "error", answer)
            if not answer.is_done:
                return
        with self.subTest("a comm"):
            opened = frontend.ask("comm_open", comm_id="c", target_name="nobody", data={})
            frontend.until(lambda: opened.is_idle)
            self.assertNothingRan(folder)
        frontend.ask("shutdown_request", "control", restart=False)
        self.assertEqual(own.process.exit_code(), 0)
        self.assertNothingRan(folder)

    def test_started_as_a_script_it_runs_nothing_of_the_folder(self):
        self.assertKeptOut(self.trapped(), OURS)

    def test_started_by_its_kernel_spec_it_runs_nothing_of_the_folder(self):
        self.assertKeptOut(self.trapped("ends the process"), kernel.command())

    def test_a_copy_of_the_kernel_among_such_files_runs_none_of_them(self):
        folder = self.trapped("ends the process")
        shutil.copy(HERE / "kernel.py", folder)
        self.assertKeptOut(folder, [sys.executable, str(folder / "kernel.py"), *OURS[2:]])

    def test_the_spec_of_a_copy_among_such_files_runs_none_of_them(self):
        folder = self.trapped()
        shutil.copy(HERE / "kernel.py", folder)
        argv = [word.replace(repr(str(HERE)), repr(str(folder))) for word in kernel.command()]
        self.assertKeptOut(folder, argv)

    def test_in_a_folder_that_it_moves_to_it_runs_nothing_either(self):
        self.assertKeptOut(self.trapped(), OURS, starts_in=self.folder())

    def test_a_cell_imports_modules_of_the_folder(self):
        folder = self.folder()
        (folder / "helpers.py").write_text("value = 42")
        (folder / "kernel.py").write_text("value = 43")   # ours is not in its way
        for argv in (OURS, kernel.command()):
            _, frontend = self.start(folder, argv)
            cell = frontend.finish(frontend.start(
                "import helpers, kernel; helpers.value, kernel.value"))
            self.assertEqual(cell.result, "(42, 43)", cell)

    def test_a_cell_imports_the_folders_module_before_a_standard_one_as_in_python(self):
        folder = self.folder()
        (folder / "wave.py").write_text("value = 42")
        _, frontend = self.start(folder)
        frontend.finish(frontend.start("%no_such_magic"))   # whatever that makes the kernel import
        cell = frontend.finish(frontend.start("import wave; wave.value"))
        self.assertEqual(cell.result, "42", cell)

    def test_what_a_cell_has_changed_in_the_path_holds(self):
        folder = self.folder()
        (folder / "below").mkdir()
        (folder / "below" / "deep.py").write_text("value = 42")
        _, frontend = self.start(folder)
        frontend.finish(frontend.start("import sys; sys.path.insert(0, 'below')"))
        frontend.finish(frontend.start("%no_such_magic"))
        self.assertEqual(frontend.finish(frontend.start("import deep; deep.value")).result, "42")
        self.assertEqual(frontend.finish(frontend.start("sys.path[:2]")).result, "['below', '']")

    def test_modules_of_pythonpath_can_be_imported(self):
        folder, elsewhere = self.folder(), self.folder()
        (elsewhere / "far.py").write_text("value = 42")
        for argv in (OURS, kernel.command()):
            _, frontend = self.start(folder, argv, env=clean_environment(
                folder, PYTHONPATH=str(elsewhere)))
            cell = frontend.finish(frontend.start("import far; far.value"))
            self.assertEqual(cell.result, "42", cell)


class KernelStalledSubscriber(KernelCase):
    """A client that does not read what it subscribes to costs nobody else a message."""

    # The grace is shortened, so that these tests do not wait for it; one has the real one.
    BRIEFLY = (f"import sys; sys.path[0] = {str(HERE)!r}; import kernel; "
               "kernel.STALL_SECONDS = 2; kernel.main()")
    options = {"argv": [sys.executable, "-c", BRIEFLY, "-f", "{connection_file}"]}
    FLOOD = ("for i in range(3_000): display({{'text/plain': '{0} %d ' % i + 'x' * 10_000}}, "
             "raw=True)\n'{0} done'")
    names = itertools.count(1)

    def stalled(self, own=None):
        """A SUB socket that is connected, subscribed, and never read."""
        context = zmq.Context()
        self.addCleanup(context.term)
        subscriber = context.socket(zmq.SUB)
        self.addCleanup(subscriber.close, linger=0)
        subscriber.rcvhwm, subscriber.rcvbuf, subscriber.linger = 1, 4096, 0
        subscriber.connect("tcp://127.0.0.1:{iopub_port}".format(
            **(own or self.kernel).connection))
        subscriber.subscribe(b"")
        self.assertTrue(subscriber.poll(SECONDS * 1000), "no welcome")
        return subscriber

    def assertFloodArrives(self, frontend, seconds=60):
        """Every display of a flooding cell comes, in order, then its value, then `idle`."""
        name = f"flood{next(self.names)}"
        cell = frontend.finish(frontend.start(self.FLOOD.format(name)), seconds=seconds)
        seen = [c["data"]["text/plain"].split()[:2] for c in cell.of("display_data")]
        self.assertEqual(len(seen), 3_000)
        self.assertTrue(seen == [[name, str(i)] for i in range(3_000)], "not in order")
        self.assertEqual((cell.result, cell.status), (f"'{name} done'", "ok"))
        self.assertTrue(cell.story.endswith("display_data execute_result idle"))
        self.assertEqual(cell.story.split()[:3], ["busy", "execute_input", "display_data"])

    def test_others_miss_nothing_while_one_is_stalled_and_after_it_has_gone(self):
        subscriber = self.stalled()
        for _ in range(2):
            self.assertFloodArrives(self.frontend)
        late = self.kernel.connect()
        self.addCleanup(late.wire.close)
        self.assertFloodArrives(late)
        subscriber.close()
        self.assertFloodArrives(late)
        another = self.stalled()   # the second one that stalls is borne like the first
        self.assertFloodArrives(late)
        another.close()
        self.assertWorks()

    def test_two_that_are_stalled_are_borne_like_one(self):
        self.stalled(), self.stalled()
        self.assertFloodArrives(self.frontend)
        self.assertWorks()

    def test_a_client_that_was_stalled_and_reads_is_waited_for_again(self):
        socket_ = self.stalled()
        self.assertFloodArrives(self.frontend)
        socket_.rcvtimeo = SECONDS * 1000
        reader = threading.Thread(target=self.count, args=(socket_, name := f"n{next(self.names)}"))
        reader.start()
        for _ in range(2):   # in the first flood it may lose some, in the second none
            self.assertFloodArrives(self.frontend)
        self.run_cell(f"for i in range(3_000): display('{name} ' + 'x' * 10_000)")
        reader.join()
        self.assertEqual(self.counted, 3_000)

    def count(self, socket_, name):
        """Read all that comes, and count what has this name, until the first 3,000 or silence."""
        self.counted = 0
        with contextlib.suppress(zmq.Again):
            while self.counted < 3_000:
                self.counted += name.encode() in b"".join(socket_.recv_multipart()[-2:])

    def test_a_client_that_was_stalled_hears_again_when_it_reads(self):
        subscriber = self.stalled()
        self.assertFloodArrives(self.frontend)
        heard, deadline = False, time.monotonic() + SECONDS
        while not heard and time.monotonic() < deadline:
            self.run_cell("print('now you ' + 'hear')")
            while not heard and subscriber.poll(100):
                heard = b"now you hear" in b"".join(subscriber.recv_multipart())
        self.assertTrue(heard)

    def test_a_stalled_client_does_not_hold_up_replies_or_interrupts(self):
        self.stalled()
        cell = self.frontend.start("i = 0\nwhile True:\n    i += 1\n    display({'text/plain': "
                                   "'x' * 10_000}, raw=True)")
        self.frontend.until(lambda: len(cell.messages) > 500)
        self.assertEqual(self.request("kernel_info_request", "control").status, "ok")
        self.kernel.interrupt()
        self.assertFails(self.frontend.finish(cell), "KeyboardInterrupt")
        self.assertWorks()

    def test_the_grace_is_ten_seconds_and_nothing_is_lost_when_it_is_over(self):
        own = KernelProcess()
        self.addCleanup(own.end)
        frontend = own.connect()
        self.addCleanup(frontend.wire.close)
        self.assertEqual(kernel.STALL_SECONDS, 10)
        self.stalled(own)
        self.assertFloodArrives(frontend)
        self.assertFloodArrives(frontend)


class KernelAborts(KernelCase):
    """An error aborts the cells that have arrived, and those of its burst: no clock decides."""

    WAIT_AND_FAIL = "input()\n1/0"
    DATES = {"constant": "2026-01-01T00:00:00.000000Z", "whole seconds": "now",
             "long ago": "1970-01-01T00:00:00Z", "far ahead": "2100-01-01T00:00:00.000000Z",
             "none": None, "empty": "", "no date": "yesterday", "a number": 5, "a list": [1],
             "without zone": "2026-01-01T00:00:00", "odd zone": "2026-01-01T00:00:00+99:99"}

    def send(self, code, date="now", frontend=None, metadata=None, **options):
        """Ask for the execution of a cell whose header has this date; None leaves it out."""
        frontend = frontend or self.frontend
        message = frontend.session.message("execute_request", {
            "code": code, "allow_stdin": True, **options}, metadata=metadata)
        message["header"]["date"] = (
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) if date == "now" else date)
        if date is None:
            del message["header"]["date"]
        answer = frontend.answers[message["header"]["msg_id"]] = Answer(message)
        frontend.wire.send("shell", message)
        return answer

    def failing(self, **options):
        """A cell that waits for the user and then fails."""
        cell = self.send(self.WAIT_AND_FAIL, **options)
        self.frontend.until(lambda: cell.questions)
        return cell

    def let_fail(self, failing, *others):
        """All that was sent has arrived; now the cell fails. Returns the statuses of the others."""
        self.request("kernel_info_request")   # is answered after all that came on shell before it
        self.frontend.type("", failing.question)
        self.frontend.finish(failing, *others)
        self.assertFails(failing, "ZeroDivisionError")
        return [cell.status for cell in others]

    def test_what_is_sent_after_the_reply_runs_whatever_its_date(self):
        for name, date in self.DATES.items():
            with self.subTest(name):
                self.assertFails(self.frontend.finish(self.send("1/0", date)), "ZeroDivisionError")
                cells = [self.send("1 + 1", date) for _ in range(3)]
                self.frontend.finish(*cells)
                self.assertEqual([cell.status for cell in cells], ["ok"] * 3)

    def test_what_is_sent_when_the_error_is_seen_runs_whatever_its_date(self):
        for name, date in self.DATES.items():
            with self.subTest(name):
                for _ in range(10):
                    failing = self.send("1/0", date)
                    self.frontend.until(lambda failing=failing: failing.error)
                    cell = self.send("1 + 1", date)
                    self.frontend.finish(failing, cell)
                    self.assertEqual(cell.status, "ok")

    def test_what_had_arrived_is_aborted_whatever_its_date(self):
        for name, date in self.DATES.items():
            with self.subTest(name):
                failing = self.failing(date=date)
                cells = [self.send("1 + 1", date) for _ in range(5)]
                self.assertEqual(self.let_fail(failing, *cells), ["aborted"] * 5)
                for cell in cells:
                    self.assertMessages(cell, "busy idle")
                    self.assertEqual(cell.reply["content"]["execution_count"],
                                     failing.reply["content"]["execution_count"])

    def test_a_clock_that_goes_backwards_decides_nothing(self):
        failing = self.failing(date="2026-01-01T00:01:00Z")
        queued = self.send("1", date="2026-01-01T00:02:00Z")
        self.assertEqual(self.let_fail(failing, queued), ["aborted"])
        later = self.send("2", date="2026-01-01T00:00:30Z")
        self.assertEqual(self.frontend.finish(later).result, "2")

    def test_waiting_cells_of_other_sessions_are_aborted_too(self):
        other = self.kernel.connect()
        self.addCleanup(other.wire.close)
        failing = self.failing()
        cell = self.send("1 + 1", frontend=other)
        other.request("kernel_info_request")
        self.let_fail(failing)
        self.assertEqual(other.finish(cell).status, "aborted")
        self.assertEqual(other.finish(self.send("1 + 1", frontend=other)).result, "2")

    def test_with_stop_on_error_false_what_waits_runs(self):
        failing = self.failing(stop_on_error=False, metadata={"burst": "goes on"})
        cells = [self.send("1"), self.send("2", metadata={"burst": "goes on"})]
        self.assertEqual(self.let_fail(failing, *cells), ["ok", "ok"])
        late = self.frontend.finish(self.send("3", metadata={"burst": "goes on"}))
        self.assertEqual(late.result, "3")

    def test_a_silent_cell_that_fails_aborts_nothing_as_on_ipykernel(self):
        failing = self.send(self.WAIT_AND_FAIL, silent=True)
        self.frontend.until(lambda: failing.questions)
        cell = self.send("1 + 1")
        self.request("kernel_info_request")
        self.frontend.type("", failing.question)
        self.frontend.finish(failing, cell)
        self.assertEqual((failing.status, cell.status), ("error", "ok"))

    def test_comm_messages_and_questions_that_wait_are_not_aborted(self):
        failing = self.failing()
        opened = self.frontend.ask("comm_open", comm_id="a", target_name="nobody", data={})
        asked_ = self.frontend.ask("is_complete_request", code="1")
        self.let_fail(failing)
        self.frontend.until(lambda: opened.is_idle and asked_.is_done)
        self.assertEqual(asked_.status, "complete")

    def test_cells_of_its_burst_are_aborted_though_they_come_later(self):
        failing = self.frontend.finish(self.send("1/0", metadata={"burst": "b1"}))
        for code in ("1", "2"):
            cell = self.frontend.finish(self.send(code, metadata={"burst": "b1"}))
            self.assertEqual((cell.status, cell.story), ("aborted", "busy idle"))
            self.assertEqual(cell.reply["content"]["execution_count"],
                             failing.reply["content"]["execution_count"])
        self.assertWorks()

    def test_cells_of_another_burst_or_none_run(self):
        self.frontend.finish(self.send("1/0", metadata={"burst": "b2"}))
        for metadata in ({"burst": "b3"}, {}, {"burst": ""}, {"burst": None}, {"burst": 2}):
            with self.subTest(metadata=metadata):
                cell = self.frontend.finish(self.send("1 + 1", metadata=metadata))
                self.assertEqual(cell.result, "2", cell)

    def test_a_burst_that_was_interrupted_is_aborted_too(self):
        cell = self.send("print('ready')\nwhile True: pass", metadata={"burst": "b4"})
        self.frontend.until(lambda: cell.text())
        self.kernel.interrupt()
        self.assertFails(self.frontend.finish(cell), "KeyboardInterrupt")
        late = self.frontend.finish(self.send("1", metadata={"burst": "b4"}))
        self.assertEqual(late.status, "aborted")

    def test_a_burst_of_a_wrong_type_does_no_harm(self):
        for burst in (5, True, None, [], {}, [1, {}], {"a": []}, "", "x" * 100_000):
            with self.subTest(burst=str(burst)[:20]):
                failing = self.frontend.finish(self.send("1/0", metadata={"burst": burst}))
                self.assertFails(failing, "ZeroDivisionError")
                self.assertWorks()


class KernelOutlivesMistakes(KernelCase):
    """Whatever a cell breaks, the next one runs; whatever it raises, its own error is shown.

    Each row is code, then the name of the error: None when there is none, ANY when either will do.
    """

    ANY = "any"
    PATIENCE = 4   # seconds; a kernel that does not answer is replaced, and the next row goes on

    def assertSurvives(self, rows, check=None):
        """The kernel answers each row's cell as it should, then the next cell, and shows errors."""
        for code, ename in rows:
            with self.subTest(code=code):
                try:
                    cell = self.run_cell(code, seconds=self.PATIENCE)
                    if ename is None:
                        self.assertEqual(cell.status, "ok", cell)
                    elif ename is not self.ANY:
                        self.assertFails(cell, ename)
                        self.assertTrue(cell.error["traceback"])
                    self.assertEqual(self.run_cell("1 + 1", seconds=self.PATIENCE).result, "2")
                    after = self.run_cell("{}['key']", seconds=self.PATIENCE)
                    self.assertFails(after, "KeyError")
                except TimeoutError:
                    self.replace_kernel()
                    self.fail("no answer")
                finally:
                    (check or self.replace_kernel)()

    def replace_kernel(self):
        self.kernel.end()
        self.frontend.wire.close()
        self.setUpClass()

    def assertWorksBroken(self, *targets, ways=("{} = None", "del {}", "{} = broken")):
        """Names of modules may be broken in each of these ways, and be mended by the user."""
        prepare = "def broken(*args, **options): raise RuntimeError('broken by the user')\n"
        for target in targets:
            module = target.rpartition(".")[0]
            module = "threading" if module.startswith("threading") else module
            for way in ways:
                breaking = way.format(target)
                with self.subTest(breaking):
                    try:
                        self.run_cell(prepare + f"import {module}\nkept = {target}",
                                      seconds=self.PATIENCE)
                        cell = self.run_cell(breaking, seconds=self.PATIENCE)
                        self.assertEqual(cell.status, "ok", cell)
                        self.assertEqual(self.run_cell("1 + 1", seconds=self.PATIENCE).result, "2")
                        after = self.run_cell("{}['key']", seconds=self.PATIENCE)
                        self.assertFails(after, "KeyError")
                        self.run_cell(f"{target} = kept", seconds=self.PATIENCE)
                        self.assertEqual(self.run_cell("6 * 7", seconds=self.PATIENCE).result, "42")
                    except BaseException:   # what is broken stays so
                        self.replace_kernel()
                        raise

    def test_functions_among_the_builtins_may_be_broken(self):
        self.assertWorksBroken(*[f"builtins.{name}" for name in (
            "len", "isinstance", "print", "getattr", "hasattr", "repr", "compile", "open")],
            ways=("{} = None", "del {}"))

    def test_types_among_the_builtins_may_be_broken(self):
        self.assertWorksBroken(*[f"builtins.{name}" for name in (
            "str", "type", "Exception", "BaseException", "KeyError", "dict", "list")],
            ways=("{} = None",))

    def test_the_import_of_modules_may_be_broken(self):
        self.assertWorksBroken("builtins.__import__", "builtins.__build_class__")

    def test_what_the_kernel_puts_into_builtins_may_be_broken(self):
        self.assertWorksBroken("builtins.input", "builtins.display", "builtins.exit",
                               "builtins.get_ipython", ways=("{} = None", "del {}"))

    def test_streams_and_hooks_of_sys_may_be_broken(self):
        self.assertWorksBroken("sys.stdout", "sys.stderr", "sys.displayhook", "sys.excepthook",
                               "sys.path", "sys.argv", ways=("{} = None", "del {}", "{} = broken"))

    def test_functions_for_tracebacks_may_be_broken(self):
        self.assertWorksBroken("traceback.extract_tb", "traceback.format_exception_only",
                               "linecache.getline", "linecache.cache", "sys.exc_info")

    def test_functions_of_the_standard_library_may_be_broken(self):
        self.assertWorksBroken("json.dumps", "json.loads", "json.JSONEncoder", "time.time",
                               "time.monotonic", "time.sleep", "time.strftime", "os.write",
                               "os.read", "os.getpid", "os.urandom", "hmac.compare_digest",
                               ways=("{} = None",))

    def test_functions_for_threads_and_tasks_may_be_broken(self):
        self.assertWorksBroken("threading.Thread.start", "threading.current_thread",
                               "threading.Thread", "asyncio.sleep", "asyncio.Event",
                               "asyncio.get_running_loop", "contextvars.copy_context",
                               "queue.SimpleQueue", ways=("{} = None", "{} = broken"))

    def test_the_table_of_modules_may_be_emptied(self):
        keep = "import sys; kept = dict(sys.modules)\n"
        self.assertSurvives([
            (keep + "del sys.modules['traceback']", self.ANY),
            (keep + "for name in ('traceback', 'asyncio', 'json', 'threading', 'zmq'): "
             "sys.modules[name] = None", None),
            (keep + "sys.modules.clear()", None)])

    def test_all_tasks_may_be_cancelled(self):
        cancel = "import asyncio\nfor t in asyncio.all_tasks(): t.cancel()\n"
        self.assertSurvives([
            (cancel, None), (cancel + "print('all cancelled')", None),
            (cancel + "await asyncio.sleep(0)", "CancelledError"),
            (cancel * 3 + "await asyncio.sleep(10)", "CancelledError"),
            ("import asyncio\nasyncio.current_task().cancel()\nawait asyncio.sleep(5)",
             "CancelledError"),
            ("import asyncio\nasync def later():\n    await asyncio.sleep(0)\n"
             "    for t in asyncio.all_tasks(): t.cancel()\n"
             "task = asyncio.create_task(later())", None),
            ("import asyncio; raise asyncio.CancelledError", "CancelledError")], self.assertWorks)

    def test_the_loop_may_be_stopped(self):
        loop = "import asyncio\nloop = asyncio.get_running_loop()\n"
        self.assertSurvives([
            (loop + "loop.stop()", None), (loop + "loop.stop()\nawait asyncio.sleep(0)", None),
            (loop + "for i in range(5):\n    loop.stop()\n    await asyncio.sleep(0)", None),
            (loop + "handle = loop.call_soon(loop.stop)", None),
            (loop + "loop.close()", "RuntimeError"),
            (loop + "asyncio.set_event_loop(None)", None),
            (loop + "asyncio.run(asyncio.sleep(0))", "RuntimeError")], self.assertWorks)

    def test_a_kernel_without_a_free_file_descriptor_keeps_the_variables(self):
        self.run_cell("import os, resource\nwork = 'a week of it'\n"
                      "limits = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
                      "resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))\nkept = []")
        cell = self.run_cell("while True: kept.append(os.open(os.devnull, os.O_RDONLY))")
        self.assertFails(cell, "OSError")
        for code, ename in [("1/0", "ZeroDivisionError"), ("x = = 1", "SyntaxError"),
                            ("open('new')", "OSError")]:
            self.assertFails(self.run_cell(code), ename)
        self.assertEqual(self.run_cell("print('still here')\n1 + 1").text(), "still here\n")
        self.request("complete_request", code="pri", cursor_pos=3)
        self.run_cell("while kept: os.close(kept.pop())\n"
                      "resource.setrlimit(resource.RLIMIT_NOFILE, limits)")
        self.assertEqual(self.run_cell("work").result, "'a week of it'")
        self.kernel.connect().wire.close()

    def test_descriptors_1_and_2_may_be_closed(self):
        self.assertSurvives([("import os\nos.close(1); os.close(2)", None)], lambda: None)
        self.assertEqual(self.run_cell("print('heard')").text(), "heard\n")
        self.replace_kernel()

    def test_the_handler_of_interrupts_may_be_changed_for_the_cell_that_does(self):
        """As on ipykernel: when the next cell runs, an interrupt raises KeyboardInterrupt again."""
        for handler in ("signal.SIG_DFL", "signal.SIG_IGN", "lambda *args: None"):
            with self.subTest(handler):
                self.run_cell(f"import signal\nold = signal.signal(signal.SIGINT, {handler})\n"
                              "fd = signal.set_wakeup_fd(-1)")
                self.kernel.interrupt()   # between two cells
                self.run_cell("pass")     # it may come as late as here
                cell = self.frontend.start("import time\nprint('ready')\ntime.sleep(60)")
                try:
                    self.frontend.until(lambda cell=cell: cell.text(), self.PATIENCE)
                    self.kernel.interrupt()
                    self.frontend.finish(cell, seconds=self.PATIENCE)
                    self.assertFails(cell, "KeyboardInterrupt")
                    self.assertWorks()
                finally:
                    self.replace_kernel()

    def test_little_recursion_may_be_allowed(self):
        self.assertSurvives([(f"import sys\nsys.setrecursionlimit({n})", self.ANY)
                             for n in (30, 40, 50, 60, 80, 100)])

    def test_a_program_that_ends_itself_ends_a_cell(self):
        self.assertSurvives([
            ("import sys; sys.exit()", "SystemExit"), ("raise SystemExit", "SystemExit"),
            ("sys.exit(object())", "SystemExit"), ("raise GeneratorExit", "GeneratorExit"),
            ("raise KeyboardInterrupt", "KeyboardInterrupt"),
            ("raise BaseException('x')", "BaseException"),
            ("async def f(): sys.exit(3)\nawait f()", "SystemExit"),
            ("import asyncio\nasync def f(): sys.exit(4)\nt = asyncio.create_task(f())\n"
             "await asyncio.sleep(0)\nawait asyncio.sleep(0)", self.ANY),
            ("import asyncio\nasync def f(): raise KeyboardInterrupt\n"
             "t = asyncio.create_task(f())", self.ANY),
            ("import threading\nt = threading.Thread(target=sys.exit)\nt.start(); t.join()", None),
            ("h = asyncio.get_running_loop().call_soon(sys.exit)", None)], self.assertWorks)

    def test_exit_functions_that_fail_do_not_keep_a_kernel_alive(self):
        for function in ("sys.exit", "lambda: 1/0", "lambda: sys.exit(3)",
                         "lambda: (_ for _ in ()).throw(KeyboardInterrupt)"):
            with self.subTest(function):
                own = KernelProcess()
                self.addCleanup(own.end)
                frontend = own.connect()
                self.addCleanup(frontend.wire.close)
                frontend.finish(frontend.start(
                    f"import atexit, sys\natexit.register({function})"))
                answer = frontend.ask("shutdown_request", "control", restart=False)
                self.assertEqual(own.process.exit_code(), 0)
                frontend.until(lambda answer=answer: answer.reply)

    ODD = "class Odd(Exception):\n    {}\nraise Odd('text')"

    def assertShown(self, *bodies):
        """An exception whose class has such a body is shown by its own name."""
        self.assertSurvives([(self.ODD.format(body), "Odd") for body in bodies], self.assertWorks)

    def test_an_error_whose_text_fails_is_shown_by_its_name(self):
        self.assertShown(*[f"def {method}(self): {body}" for method in ("__str__", "__repr__")
                           for body in ("1/0", "return 5", "return None", "raise SystemExit",
                                        "import sys; sys.exit(3)", "raise KeyboardInterrupt",
                                        "raise self", "return str(self)", "return '\\ud800'",
                                        "raise BaseException")])

    def test_an_error_with_odd_attributes_is_shown_by_its_name(self):
        self.assertShown(*[
            f"{name} = {value}" for name in (
                "exceptions", "__cause__", "__context__", "__suppress_context__", "__traceback__",
                "__notes__", "__class__", "args", "__module__", "__dict__")
            for value in ("5", "property(lambda self: 5)", "property(lambda self: 1/0)")])

    def test_an_error_with_odd_members_is_shown_by_its_name(self):
        self.assertShown("exceptions = [1, 2]", "exceptions = 'ab'", "exceptions = None",
                         "exceptions = property(lambda self: [self])",
                         "def __getattr__(self, name): 1/0",
                         "def __getattribute__(self, name): 1/0",
                         "def __getattribute__(self, name): raise SystemExit",
                         "def __eq__(self, other): 1/0", "__hash__ = None",
                         "def __bool__(self): 1/0", "def __len__(self): return 0")

    @unittest.skipIf(sys.version_info < (3, 11), "notes came with Python 3.11")
    def test_an_error_with_odd_notes_is_shown_by_its_name(self):
        self.assertShown(*[f"__notes__ = {value}" for value in (
            "None", "5", "'text'", "[1, 2]", "[None]", "['good', 5]", "{}", "object()",
            "property(lambda self: 1/0)", "property(lambda self: exit)",
            "[type('B', (), {'__str__': lambda s: 1/0})()]", "['\\ud800']", "iter([])")])

    def test_an_error_with_an_odd_name_is_shown(self):
        broken = "class Meta(type):\n    {} = property(lambda cls: {})\n" \
                 "class Odd(Exception, metaclass=Meta): pass\nraise Odd('text')"
        self.assertSurvives([
            ("raise type('', (Exception,), {})('text')", ""),
            ("raise type('a b\\n☃', (Exception,), {})('text')", "a b\n☃"),
            (broken.format("__name__", "1/0"), "Odd"), (broken.format("__name__", "5"), "Odd"),
            (broken.format("__module__", "1/0"), "Odd"),
            ("class Meta(type):\n    def __getattribute__(cls, name): 1/0\n"
             "class Odd(Exception, metaclass=Meta): pass\nraise Odd('text')", "Odd"),
            ("class Meta(type):\n    def __instancecheck__(cls, other): 1/0\n"
             "class Odd(Exception, metaclass=Meta): pass\nraise Odd('text')", "Odd")],
            self.assertWorks)

    def test_errors_that_lead_to_each_other_are_shown(self):
        make = "a, b = ValueError('a'), KeyError('b')\n"
        self.assertSurvives([
            (make + "a.__cause__ = a\nraise a", "ValueError"),
            (make + "a.__cause__, b.__cause__ = b, a\nraise a", "ValueError"),
            (make + "a.__context__, b.__context__ = b, a\nraise b", "KeyError"),
            (make + "a.__cause__, b.__context__ = b, a\nraise a from b", "ValueError")],
            self.assertWorks)

    def test_a_long_chain_of_errors_is_shown(self):
        for attribute in ("__cause__", "__context__"):
            cell = self.run_cell("last = ValueError('first one')\nfor i in range(3_000):\n"
                                 f"    new = KeyError(i); new.{attribute} = last; last = new\n"
                                 "raise last")
            self.assertFails(cell, "KeyError")
            self.assertIn("2999", cell.traceback)
        self.assertWorks()

    @unittest.skipIf(sys.version_info < (3, 11), "exception groups came with Python 3.11")
    def test_deep_and_wide_groups_of_errors_are_shown(self):
        make = ("def group(n, e):\n    for _ in range(n): e = ExceptionGroup('g', [e])\n"
                "    return e\n")
        many = "[ValueError(i) for i in range({})]"
        self.assertSurvives([
            (make + "raise group(50, ValueError('x'))", "ExceptionGroup"),
            (make + "raise group(1500, ValueError('x'))", "ExceptionGroup"),
            ("raise ExceptionGroup('wide', " + many.format(10_000) + ")", "ExceptionGroup"),
            ("e = ValueError('x')\nfor _ in range(60): e = ExceptionGroup('g', [e, e])\nraise e",
             "ExceptionGroup"),
            ("g = ExceptionGroup('g', [ValueError('x')])\ng.exceptions[0].__cause__ = g\nraise g",
             "ExceptionGroup"),
            ("raise BaseExceptionGroup('b', [SystemExit(), KeyboardInterrupt()])",
             "BaseExceptionGroup")], self.assertWorks)

    def test_a_syntax_error_made_by_hand_is_shown(self):
        self.assertSurvives([(f"raise SyntaxError({args})", "SyntaxError") for args in (
            "", "'x'", "5", "None", "'m', ('f', 'a', None, 3)", "'m', (None, None, None, None)",
            "'m', ('f', 1, -5, 'text')", "'m', ('f', 1, 500, 'text')", "'m', (3, 4, 5, 6)",
            "'m', ('f', 1, 1, b'text')", "'m', ('f', -1, 1, '')", "'m', ('\\ud800', 1, 1, '\\n')",
            "'m', ('f', 1, 2, 'text', 'a', None)", "'m', ('<In[1] 1>', 10**30, 1, 't')")] + [
            ("e = SyntaxError('m')\ne.lineno, e.filename, e.text, e.offset, e.msg = "
             "'a', 3, b'x', [], object()\nraise e", "SyntaxError"),
            ("raise IndentationError('m', (object(), object(), object(), object()))",
             "IndentationError")], self.assertWorks)

    def test_text_that_is_no_text_is_shown(self):
        self.assertSurvives([
            ("raise ValueError('\\ud800\\x00\\x1b[31m')", "ValueError"),
            ("raise UnicodeDecodeError('utf-8', b'\\xff', 0, 1, '\\ud800')", "UnicodeDecodeError"),
            ("raise UnicodeEncodeError('u', '\\ud800', 0, 1, 'r')", "UnicodeEncodeError"),
            ("exec(compile('1/0', '\\ud800', 'exec'))", "ZeroDivisionError"),
            ("exec(compile('1/0', '', 'exec'))", "ZeroDivisionError"),
            ("exec(compile('\\n' * 99_999 + '1/0', '<In[1] 1>', 'exec'))", "ZeroDivisionError"),
            ("raise ValueError('x' * 5_000_000)", "ValueError")], self.assertWorks)

    def test_an_odd_traceback_is_shown(self):
        frame = "import sys, types\nframe = sys._getframe()\ne = ValueError('x')\n"
        self.assertSurvives([
            (frame + f"raise e.with_traceback(types.TracebackType(None, frame, {at}))",
             "ValueError") for at in ("0, -1", "99, 99", "-5, 10**6", "2**30, 2**30")] + [
            (frame + "tb = None\nfor i in range(20_000): tb = types.TracebackType(tb, frame, 0, 1)"
             "\nraise e.with_traceback(tb)", "ValueError")], self.assertWorks)

    def test_a_value_that_cannot_be_shown_is_an_error(self):
        for show in ("{}", "display({})", "[{}]"):
            self.assertSurvives([
                (f"import sys\nclass V:\n    def __repr__(self): {body}\n{show.format('V()')}",
                 ename) for body, ename in [
                    ("sys.exit()", "SystemExit"), ("raise KeyboardInterrupt", "KeyboardInterrupt"),
                    ("return 5", "TypeError"), ("1/0", "ZeroDivisionError"),
                    ("return repr(self)", "RecursionError")]], self.assertWorks)


class KernelLikeIpykernel(KernelCase):
    """What ipykernel 7.4 does where a kernel could do otherwise, as recorded from it."""

    def results(self, *cells):
        return [self.run_cell(code).result for code in cells]

    def test_a_user_who_assigns_underscore_keeps_it(self):
        self.assertEqual(self.results("1", "_ = 5", "7", "_", "'x'", "_"),
                         ["1", None, "7", "5", "'x'", "5"])
        self.assertEqual(self.results("del _", "8", "_", "9", "_, __, ___"),
                         [None, "8", "8", "9", "(9, 8, 8)"])

    def test_the_other_underscores_are_kept_too(self):
        self.assertEqual(self.results("del _", "1", "2", "__ = 'mine'", "3", "__", "_"),
                         [None, "1", "2", None, "3", "'mine'", "2"])
        self.run_cell("del _, __, ___")

    def test_the_old_names_of_in_and_out_exist(self):
        cell = self.run_cell("import os\n_oh is Out, _ih is In, [str(d) for d in _dh] == "
                             "[os.getcwd()], _i is not None, _ii is not None, _iii is not None")
        self.assertEqual(cell.result, str((True,) * 6), cell)

    def test_a_silent_cell_hides_its_number_and_result_only(self):
        before = self.run_cell("'before'").reply["content"]["execution_count"]
        cell = self.run_cell("print('s'); display({'text/plain': 'd'}, raw=True); 6 * 7",
                             silent=True)
        self.assertMessages(cell, "busy stream display_data idle")
        self.assertEqual(cell.reply["content"]["execution_count"], before)
        cell = self.run_cell("_, In[-1]")
        self.assertEqual((cell.result, cell.count), ("('before', '_, In[-1]')", before + 1))

    def test_the_error_of_a_silent_cell_is_published(self):
        cell = self.run_cell("1/0", silent=True)
        self.assertMessages(cell, "busy error idle")
        self.assertFails(cell, "ZeroDivisionError")

    def test_a_cell_that_is_not_stored_shows_its_result_without_a_new_number(self):
        before = self.run_cell("'before'").reply["content"]["execution_count"]
        cell = self.run_cell("1 + 1", store_history=False)
        self.assertEqual((cell.result, cell.reply["content"]["execution_count"]), ("2", before))

    def test_exit_may_keep_the_kernel(self):
        for code in ("exit(keep_kernel=True)", "quit(keep_kernel=True)"):
            cell = self.run_cell(code)
            self.assertEqual((cell.status, cell.reply["content"]["payload"]),
                             ("ok", [{"source": "ask_exit", "keepkernel": True}]))
            self.assertWorks()

    def test_the_error_of_sys_exit_has_its_code_and_no_frames(self):
        for code, evalue in [("sys.exit(3)", "3"), ("sys.exit()", ""), ("sys.exit(0)", "0"),
                             ("sys.exit('bye')", "bye"), ("raise SystemExit((1, 2))", "(1, 2)")]:
            with self.subTest(code=code):
                cell = self.run_cell(f"import sys\n{code}")
                self.assertFails(cell, "SystemExit")
                self.assertEqual(cell.error["evalue"], evalue)
                last = f"SystemExit: {evalue}" if evalue else "SystemExit"
                self.assertEqual([line.strip() for line in cell.traceback.split("\n") if line],
                                 ["An exception has occurred, use %tb to see the full traceback.",
                                  last])

    def test_papermill_reads_an_early_end(self):
        """sys.exit() and sys.exit(0) are no failures for it; it looks at ename and evalue."""
        for code, is_failure in [("sys.exit()", False), ("sys.exit(0)", False),
                                 ("sys.exit(3)", True)]:
            error = self.run_cell(f"import sys; {code}").error
            self.assertEqual(error["ename"] != "SystemExit" or error["evalue"] not in ("", "0"),
                             is_failure)

    def test_a_form_that_is_not_implemented_is_silently_not_offered(self):
        for method in ("_repr_html_", "_repr_png_", "_repr_mimebundle_", "_ipython_display_"):
            with self.subTest(method):
                cell = self.run_cell(f"class A:\n    def {method}(self, **options): raise "
                                     "NotImplementedError\n    def __repr__(self): return 'A'\n"
                                     "A()")
                self.assertMessages(cell, "busy execute_input execute_result idle")
                self.assertEqual(cell.display, {"text/plain": "A"})

    def test_a_signal_that_is_no_interrupt_interrupts_nothing(self):
        cell = self.run_cell("import os, signal, time\nseen = []\n"
                             "old = signal.signal(signal.SIGUSR1, lambda *args: seen.append(1))\n"
                             "for _ in range(20):\n    os.kill(os.getpid(), signal.SIGUSR1)\n"
                             "    time.sleep(0.03)\nold = signal.signal(signal.SIGUSR1, old)\n"
                             "len(seen)")
        self.assertEqual(cell.result, "20", cell)

    def test_a_forked_child_ends_as_a_program_of_python_would(self):
        for code, status, stderr in [
                ("1/0", 1, "ZeroDivisionError: division by zero"), ("sys.exit(5)", 5, ""),
                ("sys.exit()", 0, ""), ("sys.exit('bye')", 1, "bye"), ("pass", 0, ""),
                ("os._exit(7)", 7, "")]:
            for prefix in ("", "import asyncio\nawait asyncio.sleep(0)\n"):
                with self.subTest(code=code, awaits=bool(prefix)):
                    cell = self.run_cell(f"import os, sys\n{prefix}print('both')\npid = os.fork()\n"
                                         f"if not pid:\n    print('child')\n    {code}")
                    ended = self.run_cell("os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])")
                    self.assertEqual(ended.result, str(status), ended)
                    self.frontend.until(lambda pair=(cell, ended): "child" in "".join(
                        each.text() for each in pair))
                    shown = plain_text(cell.text("stderr") + ended.text("stderr"))
                    self.assertIn(stderr, shown)
                    self.assertEqual("1/0" in shown, code == "1/0")
                    self.assertNotIn("SystemExit", shown)
                    self.assertEqual((cell.status, cell.error), ("ok", {}))
                    words = (cell.text() + ended.text()).split()
                    self.assertEqual(sorted(words), ["both", "child"])
                    self.assertEqual(cell.story.count("idle"), 1)
        self.assertWorks()


@needs("ipykernel")
class OutputOfThreads(Case):
    """Whose output is it? What threads and tasks of an earlier cell say while a later cell runs
    belongs to the cell that ipykernel gives it to.

    Each row: what the first cell makes, what the second cell does; the mark `X` is shown by it.
    """

    WAITING = ("import threading, sys, os, time\ngo = threading.Event()\n"
               "def wait(work):\n    global thread\n"
               "    thread = threading.Thread(target=lambda: (go.wait(), work()))\n"
               "    thread.start()\n")
    GO = "go.set(); thread.join()"
    POOL = ("from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(1)\n"
            "pool.submit(int).result()\n")
    SHOW = "display({'text/plain': 'X'}, raw=True)"
    TASK = "import asyncio\ngo = asyncio.Event()\nasync def f():\n    await go.wait()\n    {}\n" \
           "task = asyncio.ensure_future(f())\nawait asyncio.sleep(0)"
    LOG = ("import logging\nlog = logging.getLogger('x')\nlog.handlers = [logging.StreamHandler()]"
           "\nlog.propagate = False\n")
    LOOP = ("import asyncio, threading\nother = asyncio.new_event_loop()\n"
            "threading.Thread(target=other.run_forever, daemon=True).start()")
    ROWS = {
        "thread prints": (WAITING + "wait(lambda: print('X'))", GO),
        "thread prints when no cell runs": (
            WAITING + "wait(lambda: (time.sleep(0.05), print('X')))", "go.set()"),
        "thread prints on stderr": (WAITING + "wait(lambda: print('X', file=sys.stderr))", GO),
        "thread displays": (WAITING + f"wait(lambda: {SHOW})", GO),
        "thread writes to descriptor 1": (WAITING + "wait(lambda: os.write(1, b'X\\n'))", GO),
        "thread runs a child": (WAITING + "wait(lambda: os.system('echo X'))", GO),
        "thread fails": (WAITING + "wait(lambda: {}['X'])", GO),
        "thread warns": (WAITING + "import warnings\nwait(lambda: warnings.warn('X'))", GO),
        "thread made, started by the second": (
            "import threading\nt = threading.Thread(target=print, args=('X',))",
            "t.start(); t.join()"),
        "thread starts a thread": (
            WAITING + "def outer():\n    t = threading.Thread(target=print, args=('X',))\n"
            "    t.start(); t.join()\nwait(outer)", GO),
        "thread below threading": (
            "import _thread, threading\ngo, done = threading.Event(), threading.Event()\n"
            "thread = _thread.start_new_thread(lambda: (go.wait(), print('X'), done.set()), ())",
            "go.set(); done.wait();"),
        "Timer": (WAITING + "t = threading.Timer(0, lambda: (go.wait(), print('X')))\nt.start()",
                  "go.set(); t.join()"),
        "Timer made, started by the second": (
            "import threading\nt = threading.Timer(0, print, ['X'])", "t.start(); t.join()"),
        "new executor": ("from concurrent.futures import ThreadPoolExecutor\n"
                         "pool = ThreadPoolExecutor(1)", "pool.submit(print, 'X').result()"),
        "used executor": (POOL, "pool.submit(print, 'X').result()"),
        "used executor maps": (POOL, "list(pool.map(print, 'X'))"),
        "used executor displays": (POOL, f"pool.submit(lambda: {SHOW}).result()"),
        "ThreadPool": ("from multiprocessing.pool import ThreadPool\npool = ThreadPool(1)",
                       "pool.apply(print, 'X')"),
        "callback of a ThreadPool": (
            "from multiprocessing.pool import ThreadPool\npool = ThreadPool(1)",
            "import threading\ndone = threading.Event()\npool.apply_async(int, callback="
            "lambda r: (print('X'), done.set()))\ndone.wait();"),
        "worker of a queue": (
            "import threading, queue\nq = queue.Queue()\ndef work():\n    while True:\n"
            "        print(q.get()); q.task_done()\n"
            "threading.Thread(target=work, daemon=True).start()", "q.put('X'); q.join()"),
        "callback of a Future": (
            "from concurrent.futures import Future\nf = Future()\n"
            "f.add_done_callback(lambda _: print('X'))", "f.set_result(1)"),
        "run_in_executor": (
            "import asyncio\nloop = asyncio.get_running_loop()\n"
            "await loop.run_in_executor(None, int)",
            "await loop.run_in_executor(None, print, 'X')"),
        "to_thread": ("import asyncio\nawait asyncio.to_thread(int)",
                      "await asyncio.to_thread(print, 'X')"),
        "task prints": (TASK.format("print('X')"), "go.set(); await task"),
        "task displays": (TASK.format(SHOW), "go.set(); await task"),
        "task fails": (TASK.format("raise KeyError('X')"),
                       "import gc\ngo.set()\nawait asyncio.sleep(0.01)\ndel task\ngc.collect();"),
        "coroutine made, awaited by the second": (
            "async def f(): print('X')\nc = f()", "await c"),
        "call_later": (
            "import asyncio\nasyncio.get_running_loop().call_later(0.05, print, 'X');",
            "await asyncio.sleep(0.1)"),
        "callback of an asyncio future": (
            "import asyncio\nf = asyncio.get_running_loop().create_future()\n"
            "f.add_done_callback(lambda _: print('X'))",
            "f.set_result(1)\nawait asyncio.sleep(0.01)"),
        "thread calls call_soon_threadsafe": (
            WAITING + "import asyncio\nloop = asyncio.get_running_loop()\n"
            "wait(lambda: loop.call_soon_threadsafe(print, 'X'))",
            "go.set()\nawait asyncio.sleep(0.05)"),
        "coroutine for a loop in a thread": (
            LOOP, "async def f(): print('X')\n"
            "asyncio.run_coroutine_threadsafe(f(), other).result()"),
        "function of the first": ("def f(): print('X')", "f()"),
        "generator of the first": ("def g():\n    yield\n    print('X')\n    yield\n"
                                   "it = g(); next(it)", "next(it)"),
        "context of the first": ("import contextvars\nc = contextvars.copy_context()",
                                 "c.run(print, 'X')"),
        "__del__": ("class D:\n    def __del__(self): print('X')\nd = D()", "del d"),
        "weakref.finalize": ("import weakref\nclass D: pass\nd = D()\n"
                             "weakref.finalize(d, print, 'X');", "del d"),
        "handler of a signal": ("import signal, os\n"
                                "signal.signal(signal.SIGUSR1, lambda *args: print('X'));",
                                "os.kill(os.getpid(), signal.SIGUSR1)"),
        "handler of a log": (LOG, "log.warning('X')"),
        "thread logs": (WAITING + LOG + "wait(lambda: log.warning('X'))", GO),
        "listener of a log": (
            LOG + "import logging.handlers, queue\nq = queue.Queue()\n"
            "listener = logging.handlers.QueueListener(q, *log.handlers)\n"
            "log.handlers = [logging.handlers.QueueHandler(q)]\nlistener.start()",
            "log.warning('X'); listener.stop()"),
        "child of the first": ("import subprocess\np = subprocess.Popen(['cat'], stdin=-1)",
                               "p.communicate(b'X\\n');"),
        "pre_run_cell": ("def hook(*args): print('X')\n"
                         "get_ipython().events.register('pre_run_cell', hook)",
                         "get_ipython().events.unregister('pre_run_cell', hook)"),
        "server in a thread": (
            "import http.server, threading, urllib.request\n"
            "class H(http.server.BaseHTTPRequestHandler):\n    def do_GET(self):\n"
            "        print('X'); self.send_response(204); self.end_headers()\n"
            "    def log_message(self, *args): pass\n"
            "s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), H)\n"
            "threading.Thread(target=s.serve_forever, daemon=True).start()",
            "urllib.request.urlopen(f'http://127.0.0.1:{s.server_port}/').close(); s.shutdown()"),
        "handle of a display": (
            "h = display({'text/plain': 'a'}, raw=True, display_id=True)",
            "h.update({'text/plain': 'X'}, raw=True)"),
        "stream kept by the first": ("import sys\nout = sys.stdout", "out.write('X\\n');"),
    }

    @staticmethod
    def marks(answer, number):
        """Where the mark is seen below one cell: `2 stdout`, `1 display_data`."""
        return {f"{number} {m['content'].get('name', word(m))}" for m in answer.messages
                if word(m) in ("stream", "display_data", "update_display_data", "error")
                and "X" in json.dumps(m["content"])}

    def owners(self, argv):
        """Row -> whose the mark was, on one kernel."""
        own = KernelProcess(argv)
        self.addCleanup(own.end)
        frontend, rows = own.connect(), {}
        self.addCleanup(frontend.wire.close)
        for name, codes in self.ROWS.items():
            first, second = cells = [frontend.finish(frontend.start(code)) for code in codes]
            found = lambda: self.marks(first, 1) | self.marks(second, 2)  # noqa: B023, E731
            with contextlib.suppress(TimeoutError):
                frontend.until(found, 3)
            statuses = [cell.status for cell in cells]
            rows[name] = ", ".join(sorted(found())) + ("" if statuses == ["ok"] * 2 else "?")
        return rows

    def test_output_of_threads_and_tasks_belongs_to_the_cell_of_ipykernel(self):
        ours, theirs = self.owners(OURS), self.owners(IPYKERNEL)
        print(f"\n{'started by cell 1, shown in cell 2':40}{'ipykernel':24}ours")
        for name in self.ROWS:
            print(f"{name:40}{theirs[name]:24}{ours[name]}")
        for name in self.ROWS:
            with self.subTest(name):
                self.assertEqual(ours[name], theirs[name])

    def test_nothing_a_running_cell_waits_for_is_shown_above_it(self):
        own = KernelProcess(OURS)
        self.addCleanup(own.end)
        frontend = own.connect()
        self.addCleanup(frontend.wire.close)
        for name in ("thread prints", "used executor", "worker of a queue", "ThreadPool",
                     "run_in_executor", "thread displays", "thread logs"):
            with self.subTest(name):
                first, second = [frontend.finish(frontend.start(c)) for c in self.ROWS[name]]
                self.assertEqual((self.marks(first, 1), len(self.marks(second, 2))), (set(), 1))

    def test_a_question_of_a_thread_belongs_to_the_cell_that_runs(self):
        for argv in (OURS, IPYKERNEL):
            own = KernelProcess(argv)
            self.addCleanup(own.end)
            frontend = own.connect()
            self.addCleanup(frontend.wire.close)
            frontend.typed = ["typed"]
            first, second = [frontend.finish(frontend.start(code)) for code in (
                self.WAITING + "wait(lambda: print(input('? ')))", self.GO)]
            self.assertEqual((len(first.questions), len(second.questions)), (0, 1))
            self.assertEqual((first.text(), second.text()), ("", "typed\n"))

    def test_a_thread_speaks_for_the_cell_that_began_last_also_of_a_subshell(self):
        for argv in (OURS, IPYKERNEL):
            own = KernelProcess(argv)
            self.addCleanup(own.end)
            frontend = own.connect()
            self.addCleanup(frontend.wire.close)
            subshell = frontend.request("create_subshell_request", "control").reply["content"]
            first = frontend.finish(frontend.start(self.WAITING + "wait(lambda: print('X'))"))
            second = frontend.start("print('two'); done = threading.Event(); done.wait()")
            frontend.until(lambda second=second: second.text())
            third, fourth = [asked(frontend, "execute_request", code=code, **subshell)
                             for code in (self.GO, "done.set()")]
            frontend.finish(second, third, fourth)
            self.assertEqual([cell.text() for cell in (first, second, third, fourth)],
                             ["", "two\n", "X\n", ""])


class KernelHolds(KernelCase):
    """What attackers found, one test each."""

    def test_the_last_words_of_a_flood_come_before_the_end(self):
        own, frontend = KernelProcess(), None
        self.addCleanup(own.end)
        frontend = own.connect()
        self.addCleanup(frontend.wire.close)
        cell = frontend.start("while True: print('x' * 1000)")
        frontend.until(lambda: len(cell.text()) > 1_000_000)
        frontend.ask("shutdown_request", "control", restart=False)
        frontend.until(lambda: cell.is_idle)   # every message on the way was verified
        self.assertEqual(cell.error["ename"], "KeyboardInterrupt")
        self.assertEqual(own.process.exit_code(), 0)

    def test_a_handler_of_a_cell_is_called_once_for_an_interrupt(self):
        cell = self.frontend.start(
            "import signal, time\ncalls = []\n"
            "signal.signal(signal.SIGINT, lambda *a: calls.append(a))\nprint('ready')\n"
            "until = time.time() + 0.5\nwhile time.time() < until: time.sleep(0.01)\nlen(calls)")
        innocent = self.frontend.start("time.sleep(0.2); 'innocent'")
        self.frontend.until(lambda: "ready" in cell.text())
        self.kernel.interrupt()
        self.frontend.finish(cell, innocent)
        self.assertEqual((cell.result, innocent.result), ("1", "'innocent'"))

    def test_what_a_cell_has_written_is_in_the_file_after_the_end(self):
        own = KernelProcess()
        self.addCleanup(own.end)
        frontend = own.connect()
        self.addCleanup(frontend.wire.close)
        path = self.folder() / "kept.txt"
        frontend.finish(frontend.start(f"file = open({str(path)!r}, 'w'); file.write('kept')"))
        frontend.ask("shutdown_request", "control", restart=True)
        own.process.exit_code()
        self.assertEqual(path.read_text(), "kept")

    def test_a_forked_child_writes_what_is_in_its_files(self):
        path = self.folder() / "kept.txt"
        self.run_cell("import os\nif not (pid := os.fork()):\n"
                      f"    file = open({str(path)!r}, 'w')\n    file.write('kept')\n"
                      "else: os.waitpid(pid, 0)")
        self.assertEqual(path.read_text(), "kept")

    def test_a_port_that_is_taken_for_a_moment_is_waited_for(self):
        with socket.socket() as taken, socket.socket() as knocking:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            own = KernelProcess(iopub_port=taken.getsockname()[1])   # the last one that is bound
            self.addCleanup(own.end)
            wait_until(lambda: not knocking.connect_ex(("127.0.0.1", own.connection["shell_port"])))
        frontend = own.connect()
        self.addCleanup(frontend.wire.close)
        self.assertEqual(frontend.finish(frontend.start("1 + 1")).result, "2")

    def test_stop_iteration_is_told_by_its_name(self):
        for code in ("raise StopIteration(3)", "next(iter([]))"):
            self.assertFails(self.run_cell(code), "StopIteration")

    def test_an_answer_goes_to_the_question_that_it_names(self):
        first = self.frontend.start("try: input('delete all?')\nexcept KeyboardInterrupt: 0")
        self.frontend.until(lambda: first.questions)
        self.kernel.interrupt()
        self.frontend.finish(first)
        second = self.frontend.start("input('name?')")
        self.frontend.until(lambda: second.questions)
        self.frontend.type("yes", first.question)
        self.frontend.type("Ada", second.question)
        self.assertEqual(self.frontend.finish(second).result, "'Ada'")

    def test_a_question_of_a_client_that_is_not_there_holds_up_no_other(self):
        other = Frontend(ZeroMQWire(self.kernel.connection, ("shell", "iopub")))
        self.addCleanup(other.wire.close)
        other.greet()
        asking = other.start("input('nobody can answer')")
        other.until(lambda: "execute_input" in asking.story)
        self.kernel.interrupt()
        other.finish(asking)
        self.frontend.typed = ["here"]
        self.assertEqual(self.run_cell("input()").result, "'here'")

    def test_a_form_of_the_wrong_type_does_not_lose_the_others(self):
        for method in ("_repr_html_ = lambda self: object()",
                       "_repr_mimebundle_ = lambda self, **options: 5"):
            cell = self.run_cell(f"class Wrong:\n    {method}\n"
                                 "    __repr__ = lambda self: 'as text'\nWrong()")
            self.assertEqual((cell.status, cell.result), ("ok", "as text"))
            self.assertIn("failed", cell.text("stderr"))

    def test_a_stopped_loop_is_no_broken_one(self):
        self.run_cell("import asyncio\nkept, asyncio.run = asyncio.run, print\n"
                      "asyncio.get_event_loop().stop()")
        self.assertEqual(self.run_cell("asyncio.run is print").result, "True")
        self.run_cell("asyncio.run = kept")

    def test_run_finds_modules_beside_the_program_and_ends_quietly(self):
        folder = self.folder()
        (folder / "beside.py").write_text("value = 42")
        (folder / "program.py").write_text(
            "import pickle, sys, beside\nclass Kept: pass\npickle.dumps(Kept())\n"
            "print(beside.value)\nsys.exit(0)")
        cell = self.run_cell(f"%run {folder / 'program.py'}")
        self.assertEqual((cell.status, cell.text()), ("ok", "42\n"))

    def test_a_result_does_not_overtake_what_a_child_has_printed(self):
        for code in ("import os; os.system('echo a'); 5", "os.system('echo a'); display(5)"):
            self.assertEqual(self.run_cell(code).story.split()[2], "stream")

    def test_cells_that_wait_are_answered_at_the_end(self):
        own = KernelProcess()
        self.addCleanup(own.end)
        frontend = own.connect()
        self.addCleanup(frontend.wire.close)
        running, waiting = frontend.start("import time; time.sleep(60)"), frontend.start("1")
        frontend.until(lambda: "execute_input" in running.story)
        frontend.ask("shutdown_request", "control", restart=False)
        frontend.finish(running, waiting)
        self.assertEqual((running.status, waiting.status), ("error", "aborted"))


    def test_magics_in_a_row_are_told_from_text_that_looks_like_them(self):
        cell = self.run_cell("text = \'\'\'\n!no\n%no\n\'\'\'\n!echo a\n!echo b\n%time 1\nif 1:\n"
                             "    !echo c\n    %time 2\nprint(len(text), 7\n% 4)")
        self.assertEqual(re.findall(r"^(?:[abc]|\d+ \d)$", cell.text(), re.MULTILINE),
                         ["a", "b", "c", "9 3"])


class KernelHoldsTheSwitch(Case):
    @needs("IPython")
    def test_an_interrupt_while_ipython_comes_in_leaves_the_next_try_whole(self):
        own = KernelProcess()
        self.addCleanup(own.end)
        frontend = own.connect()
        self.addCleanup(frontend.wire.close)
        cell = frontend.start("import sys\nclass Hook:\n    def find_spec(name, *rest):\n"
                              "        if name == 'IPython.core.page': raise KeyboardInterrupt\n"
                              "sys.meta_path.insert(0, Hook)\nimport IPython")
        frontend.finish(cell)
        frontend.finish(frontend.start("sys.meta_path.remove(Hook); import IPython"))
        cell = frontend.finish(frontend.start(
            "sys.modules['IPython'].get_ipython() is get_ipython()"))
        self.assertEqual(cell.result, "True")


# Windows has none of these, and polls sockets alone.
BARE = """if True:
    import asyncio, os, stat, sys   # asyncio itself asks for os.sysconf, where it is POSIX's
    for name in ("killpg", "getpgrp", "getpgid", "setpgid", "setsid", "fork", "forkpty",
                 "pidfd_open", "execv", "execve", "sysconf", "set_blocking"):
        if hasattr(os, name):
            delattr(os, name)
    import zmq
    register = zmq.Poller.register
    def register_sockets_only(poller, what, flags=zmq.POLLIN):
        descriptor = what if isinstance(what, int) else getattr(what, "fileno", lambda: -1)()
        if not isinstance(what, zmq.Socket) and not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise OSError("descriptor %d is no socket: it cannot be polled" % descriptor)
        register(poller, what, flags)
    zmq.Poller.register = register_sockets_only
    sys.path[0] = FOLDER
    import kernel
    kernel.POSIX = False
    """.replace("FOLDER", repr(str(HERE)))


class KernelPortable(KernelCase):
    """The kernel where what only POSIX has is taken away."""

    options = {"argv": [sys.executable, "-c", BARE + "kernel.main()", "-f", "{connection_file}"]}

    def test_a_cell_prints_and_shows_its_value(self):
        cell = self.run_cell("print('hello')\n6 * 7")
        self.assertMessages(cell, "busy execute_input stream execute_result idle")
        self.assertEqual((cell.text(), cell.result), ("hello\n", "42"))

    def test_children_and_prints_keep_their_order(self):
        for code in ("!echo b", "import os; os.system('echo b')",
                     "import subprocess; x = subprocess.run(['echo', 'b'])"):
            with self.subTest(code=code):
                for _ in range(5):
                    cell = self.run_cell(f"print('a')\n{code}\nprint('c')")
                    self.assertEqual(cell.text(), "a\nb\nc\n")

    def test_much_output_of_a_child_arrives_whole(self):
        cell = self.run_cell("import subprocess, sys\nx = subprocess.run([sys.executable, '-S', "
                             "'-c', 'for i in range(20_000): print(i)'])")
        self.assertTrue(cell.text() == "".join(f"{i}\n" for i in range(20_000)))

    def test_a_line_comes_while_its_child_still_runs(self):
        cell = self.run_cell("import subprocess\nchild = subprocess.Popen(['sh', '-c', "
                             "'echo early; read line; echo late'], stdin=-1)")
        self.frontend.until(lambda: "early" in cell.text())
        self.assertEqual(self.run_cell("child.communicate(b'go\\n')").text(), "late\n")

    def test_an_error_is_shown_and_the_queue_aborted(self):
        cells = [self.frontend.start(code) for code in ("input()\n1/0", "'never'")]
        self.frontend.until(lambda: cells[0].questions)
        self.request("kernel_info_request")
        self.frontend.type("")
        self.assertFails(self.frontend.finish(*cells), "ZeroDivisionError")
        self.assertEqual(cells[1].status, "aborted")

    def test_input_asks_the_frontend(self):
        self.frontend.typed = ["Ada"]
        self.assertEqual(self.run_cell("input('Name? ')").result, "'Ada'")

    def test_an_interrupt_request_stops_what_runs_sleeps_or_awaits(self):
        for code in ("while True: pass", "import time\ntime.sleep(60)", "input()",
                     "import asyncio\nawait asyncio.sleep(60)",
                     "import threading\nthreading.Event().wait()"):
            with self.subTest(code=code):
                cell = self.frontend.start(f"print('ready')\n{code}")
                self.frontend.until(lambda cell=cell, code=code: (
                    cell.questions if code == "input()" else cell.text()))
                self.request("interrupt_request", "control")
                self.assertFails(self.frontend.finish(cell), "KeyboardInterrupt")
                self.assertWorks()

    def test_an_interrupt_request_does_nothing_to_an_idle_kernel(self):
        for _ in range(3):
            self.request("interrupt_request", "control")
            self.assertWorks()

    def test_a_shutdown_request_ends_it(self):
        for code in ("1", "print('ready')\nwhile True: pass"):
            own = KernelProcess(**self.options)
            self.addCleanup(own.end)
            frontend = own.connect()
            self.addCleanup(frontend.wire.close)
            cell = frontend.start(code)
            frontend.until(lambda cell=cell: cell.result or cell.text())
            answer = frontend.ask("shutdown_request", "control", restart=False)
            frontend.until(lambda answer=answer: answer.reply)
            self.assertEqual(own.process.exit_code(), 0)

    def test_its_kernel_spec_asks_for_interrupts_by_message(self):
        with unittest.mock.patch.object(kernel, "POSIX", False):
            self.assertEqual(kernel.kernel_spec("x")["interrupt_mode"], "message")
        self.assertEqual(kernel.kernel_spec("x")["interrupt_mode"],
                         "signal" if kernel.POSIX else "message")


# The two parts of kernel.py: Part I runs alone, and each section of Part II can be left out.

PART_II = "==== Part II: delete from here to its end mark, and the rest runs ===="
END_OF_PART_II = "==== End of Part II ===="
BANNER = re.compile(r"# ---- (\d+)\. (.+?) -+$")


def parts(source):
    """(lines before Part II, its lines with both marks, lines after it) of a source file; None
    when it has no such parts, and AssertionError when its marks are not one pair in order."""
    lines = source.splitlines(keepends=True)
    begins = [number for number, line in enumerate(lines) if PART_II in line]
    ends = [number for number, line in enumerate(lines) if END_OF_PART_II in line]
    if not begins and not ends:
        return None
    if len(begins) != 1 or len(ends) != 1 or begins > ends:
        raise AssertionError(f"Part II begins at {begins} and ends at {ends}")
    return lines[:begins[0]], lines[begins[0]:ends[0] + 1], lines[ends[0] + 1:]


def without_part_two(source):
    """What is left when Part II is cut out."""
    first, _, last = parts(source)
    return "".join(first + last)


def extras(source):
    """Title of each section of Part II -> the source without just that section."""
    first, second, last = parts(source)
    starts = [number for number, line in enumerate(second) if BANNER.match(line)]
    return {BANNER.match(second[start])[2]: "".join(first + second[:start] + second[stop:] + last)
            for start, stop in zip(starts, [*starts[1:], len(second) - 1], strict=True)}


class PartsOfAFile(Case):
    """The helper that cuts, on a made-up file."""

    SOURCE = "\n".join([   # not one text: its banners would begin lines of this file, too
        "first", "# ---- 1. Core ------", "core",
        f"# {PART_II}", "# what is in it",
        "# ---- 7. Magics ------", "magics",
        "# ---- 8. Comms: wires ------", "comms",
        f"# {END_OF_PART_II}", "# ---- 9. main ------", "main", ""])

    def test_part_two_is_cut_with_both_marks(self):
        self.assertEqual(without_part_two(self.SOURCE).split("\n"), [
            "first", "# ---- 1. Core ------", "core", "# ---- 9. main ------", "main", ""])

    def test_each_section_is_cut_alone_and_the_marks_stay(self):
        cut = extras(self.SOURCE)
        self.assertEqual([*cut], ["Magics", "Comms: wires"])
        for title, gone, kept in [("Magics", "magics", "comms"),
                                  ("Comms: wires", "comms", "magics")]:
            lines = cut[title].split("\n")
            self.assertNotIn(gone, lines)
            for line in (kept, "core", "main", f"# {PART_II}", f"# {END_OF_PART_II}"):
                self.assertIn(line, lines)

    def test_marks_that_are_no_pair_are_refused(self):
        self.assertIsNone(parts("no parts\n"))
        for source in (f"# {PART_II}\n", f"# {END_OF_PART_II}\n# {PART_II}\n",
                       self.SOURCE + f"# {PART_II}\n"):
            with self.assertRaises(AssertionError):
                parts(source)


KERNEL_SOURCE = (HERE / "kernel.py").read_text("utf-8")
SERVER_SOURCE = (HERE / "minijupyter.py").read_text("utf-8")
SOURCES = {"kernel.py": KERNEL_SOURCE, "minijupyter.py": SERVER_SOURCE}
needs_parts = unittest.skipUnless(parts(KERNEL_SOURCE), "kernel.py has no marks of Part II")


def class_folder(cls):
    """A temporary folder that lasts as long as the tests of a class."""
    folder = tempfile.TemporaryDirectory(prefix="minijupyter-core-")
    cls.addClassCleanup(folder.cleanup)
    return folder.name


def kernel_alone(folder, source):
    """The command of a kernel with this source, alone in a folder."""
    (Path(folder) / "kernel.py").write_text(source, "utf-8")
    return [sys.executable, str(Path(folder) / "kernel.py"), *OURS[2:]]


@needs_parts
class CoreOfTheKernel(KernelCase):
    """Part I alone is a kernel: what the architecture promises holds without any extra."""

    @classmethod
    def setUpClass(cls):
        cls.options = {"argv": kernel_alone(class_folder(cls), without_part_two(KERNEL_SOURCE))}
        super().setUpClass()

    parts = KernelBadMessages.parts
    assertShruggedOff = KernelBadMessages.assertShruggedOff
    ask_user = KernelStdin.ask_user
    SITUATIONS = KernelInterrupt.SITUATIONS

    def test_it_says_what_it_speaks(self):
        KernelProtocol.test_kernel_info_says_what_the_kernel_speaks(self)
        KernelProtocol.test_a_reply_names_its_request_as_parent(self)
        KernelProtocol.test_an_unknown_message_type_gets_busy_and_idle_and_harms_nothing(self)

    def test_it_runs_cells_and_shows_their_values(self):
        KernelExecution.test_a_cell_that_prints_and_ends_in_a_value(self)
        KernelExecution.test_input_result_and_reply_show_the_same_execution_count(self)
        KernelExecution.test_await_works_at_the_top_of_a_cell(self)
        KernelExecution.test_a_task_goes_on_between_cells(self)

    def test_its_output_is_whole_and_in_order(self):
        KernelOutput.test_two_hundred_thousand_lines_arrive_whole_and_in_order(self)
        KernelOutput.test_stdout_and_stderr_keep_their_order(self)
        KernelOutput.test_nothing_comes_after_idle(self)
        KernelOutput.test_the_first_output_comes_before_the_cell_ends(self)
        KernelOutput.test_output_of_child_processes_and_c_code_is_shown(self)

    def test_its_errors_are_published_and_end_the_queue(self):
        KernelErrors.test_an_error_is_published_and_replied(self)
        KernelErrors.test_a_syntax_error_shows_the_line_and_a_caret(self)
        KernelErrors.test_exceptions_that_end_a_program_do_not_end_the_kernel(self)
        KernelErrors.test_cells_queued_behind_an_error_are_aborted(self)
        KernelErrors.test_with_stop_on_error_false_the_queue_goes_on(self)
        KernelErrors.test_an_error_aborts_nothing_that_came_later(self)

    def test_a_value_shows_the_forms_that_it_has(self):
        cell = self.run_cell("class H:\n    def _repr_html_(self): return '<b>h</b>'\n"
                             "    def __repr__(self): return 'plain'\nH()")
        self.assertEqual(cell.display, {"text/html": "<b>h</b>", "text/plain": "plain"})
        cell = self.run_cell("display(H())\n'last'")
        self.assertMessages(cell, "busy execute_input display_data execute_result idle")

    def test_it_asks_the_frontend(self):
        KernelStdin.test_input_asks_the_frontend(self)
        KernelStdin.test_a_control_d_is_the_end_of_input(self)
        KernelStdin.test_an_answer_nobody_waits_for_is_forgotten(self)

    def test_it_can_be_interrupted(self):
        for stop in (self.kernel.interrupt,
                     lambda: self.request("interrupt_request", "control")):
            for situation, code in self.SITUATIONS.items():
                with self.subTest(situation):
                    self.assertFails(self.interrupted(code, stop), "KeyboardInterrupt")
        self.assertWorks()

    def interrupted(self, code, stop):
        """As a user does, perhaps again: one that comes right before a wait is lost without the
        section that helps it."""
        cell = self.frontend.start(code)
        self.frontend.until(lambda: cell.questions if "input()" in code else cell.text())
        for _ in range(3):
            stop()
            with contextlib.suppress(TimeoutError):
                return self.frontend.finish(cell, seconds=SECONDS / 4)
        return self.frontend.finish(cell)

    def test_forged_and_replayed_messages_are_ignored(self):
        KernelBadMessages.test_a_forged_message_is_ignored(self)
        KernelBadMessages.test_a_replayed_message_is_ignored(self)
        KernelBadMessages.test_a_truncated_message_is_ignored(self)
        KernelBadMessages.test_a_message_that_is_not_json_is_ignored(self)

    def test_its_heartbeat_answers(self):
        KernelProtocol.ping(self, 5)

    def test_it_is_ended_by_a_shutdown_request(self):
        own = KernelProcess(**self.options)
        self.addCleanup(own.end)
        frontend = own.connect()
        self.addCleanup(frontend.wire.close)
        answer = frontend.ask("shutdown_request", "control", restart=False)
        frontend.until(lambda: answer.reply)
        self.assertEqual(own.process.exit_code(), 0)

    def test_magics_are_not_there_and_harm_nothing(self):
        for code in ("%time 1", "!ls", "print?", "%%time\n1"):
            self.assertEqual(self.run_cell(code).status, "error")
        self.assertWorks()


@needs_parts
@needs("jupyter_client", "nbclient", "nbformat")
class CoreOfTheKernelUnderClients(JupyterClient):
    """Part I alone, driven by Jupyter's own clients."""

    def setUp(self):
        self.argv = kernel_alone(self.folder(), without_part_two(KERNEL_SOURCE))
        super().setUp()

    def test_jupyter_client_runs_interrupts_and_restarts_it(self):
        self.test_execute_interactive_sees_output_and_reply()
        self.test_the_client_answers_input()
        self.test_the_client_sees_the_heartbeat()
        self.test_the_manager_interrupts()
        self.test_the_manager_restarts()
        self.test_the_manager_shuts_down_without_force()

    def test_nbclient_runs_a_notebook(self):
        import nbformat
        cells = [nbformat.v4.new_code_cell(code) for code in (
            "x = 6\nprint('six')", "x * 7", "1/0", "await __import__('asyncio').sleep(0, 'late')")]
        nb = nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_markdown_cell("*the end*")])
        with tempfile.TemporaryDirectory() as folder:
            run_by_nbclient(nb, self.argv, Path(folder))
        nbformat.validate(nb)
        self.assertEqual(outcome(nb), [["stream stdout"], ["execute_result text/plain"],
                                       ["error ZeroDivisionError"], ["execute_result text/plain"]])
        self.assertEqual(nb.cells[3].outputs[0].data["text/plain"], "'late'")


@needs_parts
class EachExtraAlone(Case):
    """Part II without any one of its sections: the rest runs."""

    def test_part_two_has_sections_each_with_a_title_of_its_own(self):
        banners = [line for line in parts(KERNEL_SOURCE)[1] if BANNER.match(line)]
        self.assertGreater(len(banners), 3)
        self.assertEqual(len(extras(KERNEL_SOURCE)), len(banners))

    def test_without_one_section_the_kernel_starts_runs_fails_and_ends(self):
        for title, source in extras(KERNEL_SOURCE).items():
            with self.subTest(title), tempfile.TemporaryDirectory() as folder:
                own = KernelProcess(kernel_alone(folder, source))
                self.addCleanup(own.end)
                frontend = own.connect()
                self.addCleanup(frontend.wire.close)
                cell = frontend.finish(frontend.start("print(1); 2"))
                self.assertMessages(cell, "busy execute_input stream execute_result idle")
                self.assertEqual((cell.text(), cell.result), ("1\n", "2"))
                cell = frontend.finish(frontend.start("def f(x): return 1 / x\nf(0)"))
                self.assertFails(cell, "ZeroDivisionError")
                self.assertIn("return 1 / x", cell.traceback)
                for msg_type in ("complete_request", "inspect_request", "is_complete_request",
                                 "history_request", "comm_info_request"):
                    answer = frontend.ask(msg_type, code="pri", cursor_pos=3,
                                          hist_access_type="tail", n=1)
                    frontend.until(lambda answer=answer: answer.is_idle)
                frontend.ask("shutdown_request", "control", restart=False)
                self.assertEqual(own.process.exit_code(), 0, own.process.output)
                self.assertNotIn("Traceback", own.process.output)


CORE = (PartsOfAFile, CoreOfTheKernel, CoreOfTheKernelUnderClients, EachExtraAlone)


# ---- 6. Documents and contents -----------------------------------------------------
#
# Files through the REST API. A notebook that nobody changed goes back to disk byte for byte,
# even through a client that speaks JavaScript's JSON; a file that cannot be saved stays whole.


def through_javascript(value):
    """A JSON value as a browser gives it back: one kind of number, integer-like keys first."""
    if isinstance(value, dict):
        first = sorted((key for key in value if key.isdecimal() and key.isascii()), key=int)
        return {key: through_javascript(value[key]) for key in dict.fromkeys([*first, *value])}
    if isinstance(value, list):
        return [through_javascript(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) > sys.float_info.max:
            return None
        return int(float(value)) if float(value).is_integer() else value
    return value


def notebook(*sources, **metadata):
    """A notebook as a dict, a code cell for each source."""
    cells = [{"cell_type": "code", "execution_count": None, "id": f"cell-{i}", "metadata": {},
              "outputs": [], "source": source} for i, source in enumerate(sources)]
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def jupyter_bytes(nb):
    """A notebook as Jupyter writes it to a file."""
    return (json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


VERSION_3 = {"nbformat": 3, "nbformat_minor": 0, "metadata": {"name": "old"}, "worksheets": [{
    "metadata": {}, "cells": [
        {"cell_type": "heading", "level": 2, "metadata": {}, "source": ["Two\n", "lines"]},
        {"cell_type": "markdown", "metadata": {}, "source": "*text*"},
        {"cell_type": "code", "language": "python", "metadata": {}, "collapsed": False,
         "input": ["x = 1\n", "x"], "prompt_number": 3, "outputs": [
             {"output_type": "stream", "stream": "stdout", "text": ["a\n", "b"]},
             {"output_type": "pyout", "prompt_number": 3, "metadata": {}, "text": ["1"],
              "html": ["<b>1</b>"]},
             {"output_type": "display_data", "metadata": {}, "png": "iVBORw==", "text": ["p"],
              "json": ["{\"a\": 1}"]},
             {"output_type": "pyerr", "ename": "E", "evalue": "v", "traceback": ["t"]}]}]}]}


class Documents(ServerCase):
    INVALID = ("nbformat-invalid.ipynb", "nbformat-no_min_version.ipynb")

    def save_untouched(self, name):
        """Open and save `name` as a browser would, return the reply of the save."""
        opened = self.assertReply(self.server.get(f"/api/contents/{quote(name)}?content=1"), 200)
        model = through_javascript(opened.json)
        return self.server.put(f"/api/contents/{quote(name)}", {
            "type": "notebook", "format": "json", "content": model["content"]})

    def assertUntouched(self, data):
        (self.root / "same.ipynb").write_bytes(data)
        self.assertReply(self.save_untouched("same.ipynb"), 200)
        self.assertEqual((self.root / "same.ipynb").read_bytes(), data)

    @needs_notebooks
    def test_saving_an_untouched_notebook_that_jupyter_wrote_changes_no_byte(self):
        for path in sorted(NOTEBOOKS.glob("*.ipynb")):
            data = path.read_bytes()
            nb = json.loads(data)
            if nb["nbformat"] == 4 and data == jupyter_bytes(nb) and path.name not in self.INVALID:
                with self.subTest(path.name):
                    self.assertUntouched(data)

    def test_numbers_and_keys_that_javascript_cannot_keep_are_kept(self):
        nb = notebook("1", numbers={"float": 1.0, "big": 12345678901234567890, "small": 1e-9},
                      keys={"b": 1, "10": 2, "9": 3})
        nb["cells"][0]["outputs"] = [{"output_type": "display_data", "metadata": {}, "data": {
            "application/json": {"one": 1.0, "list": ["kept", "apart\n"]}}}]
        self.assertUntouched(jupyter_bytes(nb))

    def test_a_change_of_one_cell_leaves_the_numbers_of_the_others(self):
        nb = notebook("first", "second")
        nb["cells"][1]["metadata"]["number"] = 1.0
        (self.root / "two.ipynb").write_bytes(jupyter_bytes(nb))
        changed = through_javascript(nb)
        changed["cells"][0]["source"] = "changed"
        self.assertReply(self.server.put("/api/contents/two.ipynb", {
            "type": "notebook", "format": "json", "content": changed}), 200)
        text = (self.root / "two.ipynb").read_text("utf-8")
        self.assertIn('"number": 1.0', text)
        self.assertIn('"changed"', text)

    def test_every_way_to_write_a_cell_is_kept(self):
        for source in ("", [], "one string", ["one\n", "list"], ["split ", "in a line"],
                       ["a\r\n", "b"], ["line\u2028separator"], ["page\x0cfeed"], ["☃ 𝄞 é"]):
            with self.subTest(source=source):
                self.assertUntouched(jupyter_bytes(notebook(source)))

    def test_every_minor_version_is_kept(self):
        for minor in range(5):
            nb = {**notebook("1"), "nbformat_minor": minor}
            del nb["cells"][0]["id"]
            with self.subTest(minor=minor):
                self.assertUntouched(jupyter_bytes(nb))

    def test_unknown_fields_and_mime_types_are_kept(self):
        nb = notebook("1", vendor={"deep": [1, {"x": None}]})
        nb["cells"][0]["metadata"] = {"tags": ["a"], "vendor": {"b": True}}
        nb["cells"][0]["outputs"] = [{"output_type": "display_data", "metadata": {}, "data": {
            "application/vnd.unknown+json": [1, 2], "x/unknown": "text", "text/plain": ["a"]}}]
        self.assertUntouched(jupyter_bytes(nb))

    def test_a_changed_notebook_is_written_as_jupyter_writes_it(self):
        nb = notebook("x = 1\ny = 2", "")
        self.assertReply(self.server.put("/api/contents/written.ipynb", {
            "type": "notebook", "format": "json", "content": nb}), 201)
        nb["cells"][0]["source"], nb["cells"][1]["source"] = ["x = 1\n", "y = 2"], []
        self.assertEqual((self.root / "written.ipynb").read_bytes(), jupyter_bytes(nb))

    @needs("nbformat")
    @needs_notebooks
    def test_every_sample_opens_valid_or_is_refused_with_a_message(self):
        import nbformat
        for path in sorted(NOTEBOOKS.glob("*.ipynb")):
            with self.subTest(path.name):
                shutil.copy(path, self.root / path.name)
                reply = self.server.get(f"/api/contents/{quote(path.name)}")
                if path.name in self.INVALID:
                    self.assertReply(reply, [200, 400])
                    self.assertTrue(reply.status == 200 or reply.json["message"], reply)
                else:
                    self.assertReply(reply, 200)
                    nbformat.validate(nbformat.from_dict(reply.json["content"]))

    @needs("nbformat")
    def test_the_outputs_of_version_3_are_upgraded_as_nbformat_does_it(self):
        import nbformat
        data = json.dumps(VERSION_3)
        (self.root / "old.ipynb").write_text(data)
        ours = self.server.get("/api/contents/old.ipynb").json["content"]
        theirs = nbformat.reads(data, as_version=4)
        self.assertEqual(
            [(cell["cell_type"], cell["source"], cell.get("outputs")) for cell in ours["cells"]],
            [(cell.cell_type, cell.source, cell.get("outputs")) for cell in theirs.cells])

    @needs("nbformat")
    @needs_notebooks
    def test_versions_2_and_3_are_upgraded_and_saved_valid(self):
        import nbformat
        for name in ("nbformat-test2.ipynb", "nbformat-test3.ipynb"):
            with self.subTest(name):
                shutil.copyfile(NOTEBOOKS / name, self.root / f"own-{name}")
                name = f"own-{name}"
                content = self.server.get(f"/api/contents/{name}").json["content"]
                content["cells"][0]["source"] += " edited"
                self.assertReply(self.server.put(f"/api/contents/{name}", {
                    "type": "notebook", "format": "json", "content": content}), 200)
                saved = nbformat.read(self.root / name, as_version=nbformat.NO_CONVERT)
                nbformat.validate(saved)
                theirs = nbformat.read(NOTEBOOKS / name[4:], as_version=4)
                theirs.cells[0].source += " edited"
                self.assertEqual((saved.nbformat, saved.nbformat_minor), (4, 5))
                self.assertEqual([(cell.cell_type, cell.source) for cell in saved.cells],
                                 [(cell.cell_type, cell.source) for cell in theirs.cells])

    def test_a_notebook_that_cannot_be_one_is_refused_with_a_message(self):
        for data in (b"{", b"not json", b"[]", b"null", b"{}", b"\xff\xfe", b'{"nbformat": 5}',
                     b'{"cells": 1, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'):
            with self.subTest(data=data):
                (self.root / "bad.ipynb").write_bytes(data)
                self.assertReply(self.server.get("/api/contents/bad.ipynb"), 400)
                self.assertEqual((self.root / "bad.ipynb").read_bytes(), data)

    def test_what_is_no_notebook_is_not_saved_as_one(self):
        (self.root / "good.ipynb").write_bytes(jupyter_bytes(notebook("kept")))
        for content in (None, [], "text", {}, {"nbformat": 4}, {"cells": None, "nbformat": 4}):
            with self.subTest(content=content):
                self.assertReply(self.server.put("/api/contents/good.ipynb", {
                    "type": "notebook", "format": "json", "content": content}), 400)
                kept = (self.root / "good.ipynb").read_bytes()
                self.assertEqual(kept, jupyter_bytes(notebook("kept")))


class NotQuiteValid(ServerCase):
    """Notebooks that can be drawn but that the schema forbids."""

    STREAM = {"output_type": "stream", "name": "stdout", "text": ""}
    CHANGES = {   # what is wrong, and what makes it so
        "": lambda nb: None,
        "/unknown is not allowed": lambda nb: nb.update(unknown=1),
        "/cells/0/unknown is not allowed": lambda nb: nb["cells"][0].update(unknown=1),
        "/cells/0/execution_count is missing": lambda nb: nb["cells"][0].pop("execution_count"),
        "/cells/0/id may have": lambda nb: nb["cells"][0].update(id="a b"),
        "/cells/0/id is not allowed": lambda nb: nb.update(nbformat_minor=4),
        "/cells/0 is of an unknown type": lambda nb: nb["cells"][0].update(cell_type="drawing"),
        "/metadata/kernelspec must": lambda nb: nb["metadata"].update(kernelspec={"name": "x"}),
        "/cells/0/outputs/0 is of an unknown type":
            lambda nb: nb["cells"][0].update(outputs=[{"output_type": "smell"}]),
        "/cells/0/outputs/0/name is missing":
            lambda nb: nb["cells"][0].update(outputs=[{"output_type": "stream", "text": ""}]),
        "/cells/0/outputs/0/more is not allowed":
            lambda nb: nb["cells"][0].update(outputs=[{**NotQuiteValid.STREAM, "more": 1}])}

    @needs("nbformat")
    def test_what_nbformat_finds_invalid_is_told_and_nothing_else(self):
        import nbformat
        for expected, change in self.CHANGES.items():
            with self.subTest(expected):
                nb = notebook("1")
                change(nb)
                problem = next(minijupyter.complaints(nb), "")
                self.assertTrue(problem.startswith(expected), problem)
                is_valid = nbformat.validator.isvalid(nbformat.from_dict(nb))
                self.assertEqual(is_valid, not expected)

    def test_it_opens_and_is_saved_with_a_message(self):
        nb = notebook("1")
        nb["cells"][0]["unknown"] = 1
        for reply in (self.server.put("/api/contents/odd.ipynb",
                                      {"type": "notebook", "content": nb}),
                      self.server.get("/api/contents/odd.ipynb")):
            self.assertRegex(reply.json["message"], "^Notebook validation failed: /cells/0")
        self.assertNotIn("message", self.server.get("/api/contents/odd.ipynb?content=0").json)

    def test_a_later_minor_version_may_have_what_we_do_not_know(self):
        nb = {**notebook("1"), "nbformat_minor": 9, "unknown": 1}
        self.assertNotIn("message", self.server.put(
            "/api/contents/later.ipynb", {"type": "notebook", "content": nb}).json)


class Contents(ServerCase):
    def test_a_folder_lists_what_is_in_it(self):
        folder = self.root / "listed"
        (folder / "sub").mkdir(parents=True)
        (folder / "notes.txt").write_text("x")
        (folder / "work.ipynb").write_bytes(jupyter_bytes(notebook()))
        listing = self.assertReply(self.server.get("/api/contents/listed"), 200).json
        self.assertEqual((listing["type"], listing["format"]), ("directory", "json"))
        found = {(item["name"], item["path"], item["type"]) for item in listing["content"]}
        self.assertEqual(found, {("sub", "listed/sub", "directory"),
                                 ("notes.txt", "listed/notes.txt", "file"),
                                 ("work.ipynb", "listed/work.ipynb", "notebook")})

    def test_a_model_has_jupyters_fields(self):
        (self.root / "model.txt").write_text("text")
        model = self.server.get("/api/contents/model.txt?content=0").json
        self.assertLessEqual({"name", "path", "type", "writable", "created", "last_modified",
                              "size", "mimetype", "content", "format"}, set(model))
        self.assertEqual((model["size"], model["content"], model["writable"]), (4, None, True))
        self.assertRegex(model["last_modified"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$")

    def test_text_and_binary_files_are_read_and_saved(self):
        for name, format, content, data in [
                ("a.txt", "text", "naïve ☃\n", "naïve ☃\n".encode()),
                ("b.bin", "base64", "AP+A", b"\0\xff\x80"), ("c.py", "text", "", b""),
                ("crlf.txt", "text", "a\r\nb", b"a\r\nb")]:
            with self.subTest(name):
                model = {"type": "file", "format": format, "content": content}
                self.assertReply(self.server.put(f"/api/contents/{name}", model), 201)
                self.assertEqual((self.root / name).read_bytes(), data)
                read = self.server.get(f"/api/contents/{name}").json
                self.assertEqual((read["format"], read["content"].strip() or content.strip()),
                                 (format, content.strip()))
                self.assertReply(self.server.put(f"/api/contents/{name}", model), 200)

    def test_a_new_file_gets_the_next_free_name(self):
        names = [self.assertReply(self.server.post("/api/contents/", body), 201).json["name"]
                 for body in ({"type": "notebook"}, {"type": "notebook"}, {"type": "directory"},
                              {"type": "directory"}, {"type": "file", "ext": ".txt"})]
        self.assertEqual(names, ["Untitled.ipynb", "Untitled1.ipynb", "Untitled Folder",
                                 "Untitled Folder 1", "untitled.txt"])
        self.assertEqual(self.server.get("/api/contents/Untitled.ipynb").json["content"]["cells"],
                         [])

    def test_put_without_a_model_makes_a_new_file_in_that_folder(self):
        (self.root / "inbox").mkdir()
        reply = self.assertReply(self.server.put("/api/contents/inbox", {}), 201)
        self.assertEqual(reply.json["path"], "inbox/untitled")
        self.assertTrue((self.root / "inbox" / "untitled").is_file())

    def test_a_file_is_renamed_and_keeps_its_content(self):
        (self.root / "old.txt").write_text("content")
        reply = self.server.patch("/api/contents/old.txt", {"path": "new name ☃.txt"})
        self.assertEqual(self.assertReply(reply, 200).json["path"], "new name ☃.txt")
        self.assertEqual((self.root / "new name ☃.txt").read_text(), "content")
        self.assertReply(self.server.get("/api/contents/" + quote("new name ☃.txt")), 200)
        self.assertReply(self.server.get("/api/contents/old.txt"), 404)

    def test_a_rename_overwrites_nothing(self):
        (self.root / "from.txt").write_text("from")
        (self.root / "to.txt").write_text("to")
        self.assertReply(self.server.patch("/api/contents/from.txt", {"path": "to.txt"}), 409)
        self.assertEqual((self.root / "to.txt").read_text(), "to")

    def test_a_file_and_a_folder_are_deleted(self):
        (self.root / "gone").mkdir()
        (self.root / "gone" / "file.txt").write_text("x")
        self.assertReply(self.server.delete("/api/contents/gone/file.txt"), 204)
        self.assertReply(self.server.delete("/api/contents/gone"), 204)
        self.assertFalse((self.root / "gone").exists())
        self.assertReply(self.server.delete("/api/contents/gone"), 404)

    def test_what_does_not_exist_is_not_found(self):
        for reply in (self.server.get("/api/contents/none.txt"),
                      self.server.patch("/api/contents/none.txt", {"path": "x.txt"}),
                      self.server.delete("/api/contents/none.txt"),
                      self.server.put("/api/contents/no/folder/x.txt", {
                          "type": "file", "format": "text", "content": ""})):
            with self.subTest(reply=reply):
                self.assertReply(reply, [404, 400])

    def test_what_changes_a_file_says_where_it_is_and_when_it_was_written(self):
        body = {"type": "file", "format": "text", "content": ""}
        for reply in (self.server.put("/api/contents/a%20b.txt", body),
                      self.server.put("/api/contents/a%20b.txt", body),
                      self.server.post("/api/contents", {"copy_from": "a b.txt"}),
                      self.server.patch("/api/contents/a%20b.txt", {"path": "ü.txt"})):
            path = f"/api/contents/{quote(reply.json['path'])}"
            self.assertEqual(reply.headers["Location"], path)
            self.assertRegex(reply.headers["Last-Modified"], r"^\w{3}, \d\d \w{3} \d{4} .* GMT$")
        asked = self.server.get(path)
        self.assertEqual(asked.headers["Last-Modified"], reply.headers["Last-Modified"])
        self.assertNotIn("Location", asked.headers)
        made = self.server.post(f"{path}/checkpoints")
        self.assertEqual(made.headers["Location"], f"{path}/checkpoints/checkpoint")
        for time_ in (1 << 40, -(1 << 40), -50_000_000_000):   # the last: in the year 385
            os.utime(self.root / "ü.txt", (1 << 33, time_))
            self.assertRegex(self.server.get(path).json["last_modified"], r"^\d{4}-\d\d-\d\dT")

    def test_a_type_that_is_not_said_is_that_of_the_name(self):
        for path, body, kind in (
                ("t.txt", {"content": "x", "format": "text"}, "file"),
                ("t.ipynb", {"content": notebook(), "format": "json"}, "notebook"),
                ("t.x", {"content": "x", "format": "text", "type": "drawing"}, "file")):
            reply = self.assertReply(self.server.put(f"/api/contents/{path}", body), 201)
            self.assertEqual(reply.json["type"], kind)
        self.assertEqual(self.server.get("/api/contents/t.x?type=drawing").json["type"], "file")

    def test_an_existing_file_is_not_emptied_by_a_request_without_content(self):
        (self.root / "full.txt").write_text("full")
        for body in ({"type": "file"}, {"type": "file", "content": None}, {"type": "x"},
                     {"format": "text", "content": "x"}, {"name": "full.txt"}):
            self.assertReply(self.server.put("/api/contents/full.txt", body), 400)
        self.assertEqual((self.root / "full.txt").read_text(), "full")

    def test_a_folder_does_not_fit_into_itself(self):
        (self.root / "outer").mkdir()
        self.assertReply(self.server.patch("/api/contents/outer", {"path": "outer/in"}), 400)

    def test_a_wrong_request_is_refused_with_a_message(self):
        (self.root / "text.txt").write_text("x")
        for body in ("{", "[]", '"x"', "7", {"type": "file", "format": "base64", "content": "?"},
                     {"type": "file", "format": "text", "content": 7}, {"type": "nonsense"}):
            with self.subTest(body=body):
                self.assertReply(self.server.put("/api/contents/text.txt", body), 400)
                self.assertEqual((self.root / "text.txt").read_text(), "x")

    def test_a_saved_file_keeps_its_mode_and_its_symbolic_link(self):
        (self.root / "target.sh").write_text("old")
        os.chmod(self.root / "target.sh", 0o751)
        (self.root / "link.sh").symlink_to("target.sh")
        self.assertReply(self.server.put("/api/contents/link.sh", {
            "type": "file", "format": "text", "content": "new"}), 200)
        self.assertTrue((self.root / "link.sh").is_symlink())
        self.assertEqual((self.root / "target.sh").read_text(), "new")
        self.assertEqual((self.root / "target.sh").stat().st_mode & 0o777, 0o751)


class ConflictsAndFullDisks(ServerCase):
    def setUp(self):
        self.path = self.root / "shared.txt"
        self.path.write_text("old")
        self.hash = self.server.get("/api/contents/shared.txt?hash=1").json["hash"]

    def save(self, content, **headers):
        return self.server.put("/api/contents/shared.txt", {
            "type": "file", "format": "text", "content": content}, **headers)

    def test_the_hash_is_the_sha256_of_the_bytes_on_disk(self):
        self.assertEqual(self.hash, hashlib.sha256(b"old").hexdigest())

    def test_a_save_over_an_unchanged_file_goes_through(self):
        self.assertReply(self.save("new", **{"If-Match": f'"{self.hash}"'}), 200)
        self.assertEqual(self.path.read_text(), "new")

    def test_a_save_while_the_file_changed_on_disk_is_a_conflict(self):
        self.path.write_text("from elsewhere")
        reply = self.assertReply(self.save("new", **{"If-Match": f'"{self.hash}"'}), 412)
        self.assertEqual(reply.json["reason"], "conflict")
        self.assertEqual(self.path.read_text(), "from elsewhere")

    def test_a_save_while_the_file_was_deleted_is_a_conflict(self):
        self.path.unlink()
        self.assertReply(self.save("new", **{"If-Match": f'"{self.hash}"'}), 412)
        self.assertFalse(self.path.exists())

    @unittest.skipUnless(hasattr(os, "fork"), "the platform has no file size limit")
    def test_on_a_full_disk_the_old_file_stays_whole(self):
        import resource
        limit = (500_000, 500_000)
        server = self.own_server(
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
        (server.root / "work.ipynb").write_bytes(jupyter_bytes(notebook("old")))
        for name, kind in (("work.ipynb", "notebook"), ("new.txt", "file")):
            content = notebook("x" * 1_000_000) if kind == "notebook" else "x" * 1_000_000
            reply = server.put(f"/api/contents/{name}", {
                "type": kind, "format": "text" if kind == "file" else "json", "content": content})
            self.assertReply(reply, [500, 507])
        self.assertEqual((server.root / "work.ipynb").read_bytes(),
                         jupyter_bytes(notebook("old")))
        self.assertEqual([p.name for p in server.root.rglob("*") if p.is_file()], ["work.ipynb"])


class Saving(ServerCase):
    """A file is its old self or its new one, whole, and keeps what it is besides its bytes."""

    def write(self, name, text="old", mode=0o644):
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def save(self, name, content="new", server=None, headers=None, **model):
        return (server or self.server).put(f"/api/contents/{name}", {
            "type": "file", "format": "text", "content": content, **model}, **(headers or {}))

    def leftovers(self, *folders):
        return [path.name for folder in folders or [self.root] for path in folder.rglob("*")
                if path.name.endswith((".saving", ".record"))]

    def records(self):
        return self.leftovers(Path(self.server.folder.name))

    def test_a_write_protected_file_stays_as_it_is_for_root_too(self):
        """S1."""
        path = self.write("protected.txt", mode=0o444)
        before = path.stat()
        self.assertFalse(self.server.get("/api/contents/protected.txt").json["writable"])
        for content in ("new", "old"):
            reply = self.assertReply(self.save("protected.txt", content), 403)
            self.assertIn("write-protected", reply.json["message"])
        self.assertReply(self.save("protected.txt", chunk=1), 403)
        self.assertEqual((path.read_text(), path.stat()), ("old", before))

    def test_a_checkpoint_is_not_restored_into_a_write_protected_file(self):
        path = self.write("restored.txt")
        self.assertReply(self.server.post("/api/contents/restored.txt/checkpoints"), 201)
        self.write("restored.txt", "newer", 0o444)
        address = "/api/contents/restored.txt/checkpoints/checkpoint"
        self.assertReply(self.server.post(address), 403)
        self.assertEqual(path.read_text(), "newer")

    def test_a_write_protected_file_is_renamed_and_deleted_as_the_system_allows(self):
        self.write("protected 1.txt", mode=0o444)
        reply = self.server.patch("/api/contents/protected%201.txt", {"path": "protected 2.txt"})
        self.assertReply(reply, 200)
        self.assertReply(self.server.delete("/api/contents/protected%202.txt"), 204)

    @unittest.skipUnless(hasattr(os, "getuid") and os.getuid() == 0, "root alone gives files away")
    def test_a_saved_file_keeps_its_owner(self):
        path = self.write("owned.txt", mode=0o640)
        os.chown(path, 1234, 2345)
        self.assertReply(self.save("owned.txt"), 200)
        info = path.stat()
        self.assertEqual((path.read_text(), info.st_uid, info.st_gid, info.st_mode & 0o777),
                         ("new", 1234, 2345, 0o640))

    def test_a_saved_file_keeps_its_other_names(self):
        path = self.write("one.txt")
        os.link(path, self.root / "two.txt")
        for content in ("longer than before", "short"):
            self.assertReply(self.save("one.txt", content), 200)
            self.assertEqual((self.root / "two.txt").read_text(), content)
        self.assertReply(self.save("one.txt", "uploaded", chunk=1), 200)
        self.assertReply(self.save("one.txt", " whole", chunk=-1), 200)
        self.assertEqual((self.root / "two.txt").read_text(), "uploaded whole")
        self.assertEqual((path.stat().st_nlink, self.records()), (2, []))

    @unittest.skipUnless(sys.platform == "linux", "to lose root's rights takes Linux")
    def test_a_file_is_saved_in_a_folder_that_takes_no_new_ones(self):
        server = self.own_server(preexec_fn=without_roots_rights)
        (server.root / "closed").mkdir()
        (server.root / "closed" / "open.txt").write_text("old")
        (server.root / "closed").chmod(0o555)
        self.addCleanup((server.root / "closed").chmod, 0o755)
        self.assertReply(self.save("closed/open.txt", server=server), 200)
        self.assertEqual((server.root / "closed" / "open.txt").read_text(), "new")
        self.assertReply(self.save("closed/other.txt", server=server), 403)

    @unittest.skipUnless(sys.platform == "linux" and os.getuid() == 0, "to mount takes root")
    def test_a_file_that_is_a_mount_is_saved(self):
        path, source = self.write("mount.txt"), self.write("source.txt")
        mounted = subprocess.run(["mount", "--bind", source, path], capture_output=True)
        if mounted.returncode:
            self.skipTest(mounted.stderr.decode())
        self.addCleanup(subprocess.run, ["umount", path], check=True)
        self.assertReply(self.save("mount.txt"), 200)
        self.assertEqual((source.read_text(), self.leftovers()), ("new", []))

    def test_on_a_full_disk_a_file_with_two_names_stays_whole(self):
        import resource
        limit = (500_000, 500_000)
        server = self.own_server(
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
        (server.root / "one.txt").write_text("old")
        os.link(server.root / "one.txt", server.root / "two.txt")
        self.assertReply(self.save("one.txt", "x" * 1_000_000, server=server), [500, 507])
        self.assertEqual((server.root / "two.txt").read_text(), "old")
        self.assertEqual(self.leftovers(Path(server.folder.name)), [])

    def test_what_was_written_over_when_the_server_was_killed_is_finished(self):
        old, new = b"a" * 5000, b"b" * 3000
        for found, expected in ((old, old), (new, new), (new + old[3000:], new),
                                (new[:1024] + old[1024:], new), (new[:512] + bytes(4488), new),
                                (b"somebody else's", b"somebody else's")):
            with self.subTest(found[:20]), \
                    unittest.mock.patch.object(minijupyter, "RUNTIME", str(self.folder())):
                path = self.folder() / "file"
                path.write_bytes(found)
                minijupyter.make_record(str(path), old, new)
                minijupyter.CONTENTS[-1](path.parent)
                self.assertEqual(path.read_bytes(), expected)
                self.assertEqual(os.listdir(minijupyter.RUNTIME), [])

    @unittest.skipUnless(minijupyter.fcntl, "this platform has no locks of folders")
    def test_two_servers_on_one_folder_accept_one_save_for_one_version(self):
        other = self.own_server(self.server.folder.name)
        path = self.write("shared.txt", "0")
        with ThreadPoolExecutor() as pool:
            for number in range(50):
                expected = hashlib.sha256(path.read_bytes()).hexdigest()
                replies = [*pool.map(lambda server, n=number, e=expected: self.save(
                    "shared.txt", f"{n} {server.port}", server, {"If-Match": e}),
                    (self.server, other))]
                self.assertEqual(sorted(reply.status for reply in replies), [200, 412])
                won = self.server if replies[0].status == 200 else other
                self.assertEqual(path.read_text(), f"{number} {won.port}")

    def test_what_another_program_writes_during_a_save_is_not_overwritten(self):
        """S4."""
        root = self.folder()
        contents, encode = minijupyter.CONTENTS[-1](root), minijupyter.Contents.encode
        (root / "a.txt").write_text("old")

        def encode_while_another_writes(*arguments):
            (root / "a.txt").write_text("new")
            return encode(contents, *arguments)

        contents.encode = encode_while_another_writes
        with self.assertRaises(minijupyter.Problem) as caught:
            contents.save("a.txt", {"type": "file", "format": "text", "content": "mine"},
                          hashlib.sha256(b"old").hexdigest())
        self.assertEqual((caught.exception.status, (root / "a.txt").read_text()), (412, "new"))

    def test_a_program_that_holds_a_folder_does_not_hold_the_save_for_ever(self):
        folder = self.folder()
        with minijupyter.locked(folder), \
                unittest.mock.patch.object(minijupyter, "LOCK_SECONDS", 0.1):
            minijupyter.write_atomically(folder / "a.txt", b"saved")
        self.assertEqual((folder / "a.txt").read_bytes(), b"saved")

    def test_two_uploads_of_one_file_do_not_mix(self):
        self.assertReply(self.save("up.txt", "a1 ", chunk=1), 200)
        self.assertReply(self.save("up.txt", "b1 ", chunk=1), 409)
        self.assertReply(self.save("up.txt", "a2 ", chunk=2), 200)
        self.assertFalse((self.root / "up.txt").exists())
        self.assertReply(self.save("up.txt", "a3", chunk=-1), 201)
        self.assertEqual((self.root / "up.txt").read_text(), "a1 a2 a3")

    def test_an_upload_that_was_given_up_begins_anew(self):
        self.assertReply(self.save("again.txt", "1 ", chunk=1), 200)
        self.assertReply(self.save("again.txt", "2 ", chunk=2), 200)
        self.assertReply(self.save("again.txt", "1 ", chunk=1), 200)
        self.assertReply(self.save("again.txt", "3", chunk=-1), 201)
        self.assertEqual((self.root / "again.txt").read_text(), "1 3")
        with unittest.mock.patch.object(minijupyter.Uploads, "PAUSE_SECONDS", 0):
            uploads, target = minijupyter.Uploads(), str(self.folder() / "x")
            for number, data in ((1, b"left"), (1, b"other "), (-1, b"one")):
                uploads.add(target, number, data)
        self.assertEqual(Path(target).read_bytes(), b"other one")

    def test_a_piece_out_of_order_is_refused_in_words_and_the_next_one_is_taken(self):
        self.assertReply(self.save("order.txt", "1", chunk=1), 200)
        for number in (3, 1 << 70, 0, -2):
            reply = self.assertReply(self.save("order.txt", "x", chunk=number), 400)
            self.assertIn("the next one is 2", reply.json["message"])
        self.assertReply(self.save("order.txt", "2", chunk=-1), 201)
        self.assertEqual((self.root / "order.txt").read_text(), "12")

    def test_what_a_killed_server_left_over_goes_and_what_a_running_one_writes_stays(self):
        folder = self.root / "tidied"
        folder.mkdir()
        self.assertReply(self.save("tidied/running.txt", "1", chunk=1), 200)
        running = self.leftovers(folder)
        (folder / ".0123456789abcdef.saving").write_text("half")
        (folder / ".fedcba9876543210.saving").mkdir()
        (folder / ".mine.saving").write_text("somebody's")
        self.own_server(self.server.folder.name).get("/api/contents/tidied")
        self.assertEqual(sorted(self.leftovers(folder)), sorted([*running, ".mine.saving"]))

    def test_a_save_that_is_killed_leaves_nothing_over(self):
        killed = self.own_server()
        (killed.root / "kept.txt").write_text("old")
        body = {"type": "file", "format": "text", "content": "new", "chunk": 1}
        self.assertReply(killed.put("/api/contents/kept.txt", body), 200)
        os.kill(killed.process.pid, signal.SIGKILL)
        self.assertEqual(len(self.leftovers(killed.root)), 1)
        again = self.own_server(killed.folder.name)
        self.assertEqual(self.leftovers(killed.root), [])
        self.assertEqual((killed.root / "kept.txt").read_text(), "old")
        self.assertReply(again.put("/api/contents/kept.txt", body), 200)
        again.process.end()
        self.assertEqual(self.leftovers(killed.root), [])


def without_roots_rights():
    """For a child before it runs: to root a mode means as much as to others."""
    import ctypes
    for capability in (1, 2):   # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)   # PR_CAPBSET_DROP


class Disk:
    """What a disk may hold when a machine stops: it stands for `os` while a file is saved and
    records each call; `crashes` gives every state that no fsync forbids.

    A file is its number; its bytes are what the last fsync left, or anything between that and
    what was written since. Names lead to files; a folder's names that were made, changed or
    removed after its last fsync may have been or not, each for itself.
    """

    def __init__(self, files):
        self.durable = {path: number for number, path in enumerate(files)}   # path -> file
        self.pending = []         # [{path: file or None}]: changes of names, not yet synced
        self.safe = dict(enumerate(files.values()))   # file -> bytes on the disk
        self.now = dict(self.safe)                    # file -> bytes that a reader sees
        self.versions = {}        # file -> the bytes that it has had since its last fsync
        self.open_files, self.places, self.states = {}, {}, []
        self.remember()

    def __getattr__(self, name):
        return getattr(os, name)

    def names(self):
        """path -> file as a reader sees it."""
        names = dict(self.durable)
        for change in self.pending:
            names.update(change)
        return {path: file for path, file in names.items() if file is not None}

    def remember(self):
        """The states in which the machine can stop here."""
        for done in itertools.product((True, False), repeat=len(self.pending)):
            names = dict(self.durable)
            for change in itertools.compress(self.pending, done):
                names.update(change)
            names = {path: file for path, file in names.items() if file is not None}
            files = sorted(set(names.values()))
            for contents in itertools.product(*map(self.possible, files)):
                bytes_of = dict(zip(files, contents, strict=True))
                state = {path: bytes_of[file] for path, file in names.items()}
                if state not in self.states:
                    self.states.append(state)

    def possible(self, file):
        """What the disk may hold of a file: its sectors, old or new or never written."""
        old = self.safe[file]
        if file not in self.versions:
            return [self.now[file]]
        found = {old}
        for new in (self.now[file], *self.versions[file]):
            found |= {new, bytes(len(new))}
            for at in range(0, max(len(new), len(old)), 512):
                for first, then in ((new, old), (old, new)):
                    found.add(first[:at].ljust(at if len(then) > at else 0, b"\0") + then[at:])
                found.add(new[:at] if len(old) < at else new)
        return found

    def open(self, path, flags, mode=0o777):
        descriptor = os.open(path, flags, mode)
        path = str(path)
        if flags & os.O_CREAT:
            number = len(self.now)
            self.now[number] = self.safe[number] = b""
            self.change({path: number})
        self.open_files[descriptor] = path
        return descriptor

    def change(self, names):
        self.pending.append(names)
        self.remember()

    def file_of(self, descriptor):
        """The file that a descriptor is open on, or None for a folder."""
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        return self.names().get(path)

    def write(self, descriptor, data):
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        size, file = os.write(descriptor, data), self.file_of(descriptor)
        old = self.now[file]
        self.set(file, old[:at] + bytes(data[:size]) + old[at + size:])
        return size

    def ftruncate(self, descriptor, size):
        os.ftruncate(descriptor, size)
        file = self.file_of(descriptor)
        self.set(file, self.now[file][:size])

    def set(self, file, data):
        self.versions.setdefault(file, []).append(self.now[file])
        self.now[file] = data
        self.remember()

    def fsync(self, descriptor):
        file = self.file_of(descriptor)
        if file is None:
            folder = os.readlink(f"/proc/self/fd/{descriptor}")
            kept = [change for change in self.pending if os.path.dirname([*change][0]) != folder]
            for change in self.pending:
                self.durable.update(change if change not in kept else {})
            self.pending = kept
        else:
            self.safe[file] = self.now[file]
            self.versions.pop(file, None)
        self.remember()

    def replace(self, old, new):
        os.replace(old, new)
        self.change({str(new): self.names()[str(old)], str(old): None})

    def unlink(self, path):
        existed = os.path.lexists(path)
        os.unlink(path)
        if existed:
            self.change({str(path): None})


@unittest.skipUnless(Path("/proc/self/fd").exists(), "the recorder asks Linux for names")
class Crashes(Case):
    """The machine stops at any point of a save, and the disk has done its work in any order."""

    def states_of_a_save(self, old, new, names=1):
        """Every state in which a machine can stop during a save: {path: bytes} with the paths
        below the folder; also what comes after it, which is the new file for good."""
        folder = Path(os.path.realpath(self.folder()))
        (folder / "root").mkdir()
        (folder / "runtime").mkdir()
        paths = [folder / "root" / f"{number}.ipynb" for number in range(names)]
        paths[0].write_bytes(old)
        for path in paths[1:]:
            os.link(paths[0], path)
        disk = Disk({str(paths[0]): old})
        with unittest.mock.patch.multiple(
                minijupyter, os=disk, RUNTIME=str(folder / "runtime"), WRITTEN_AT_ONCE=1024):
            minijupyter.write_atomically(paths[0], new)
        self.assertEqual((disk.pending, disk.versions), ([], {}))   # all of it is on the disk
        self.assertEqual(paths[0].read_bytes(), new)
        return [{os.path.relpath(path, folder): data for path, data in state.items()}
                for state in disk.states]

    def opened(self, state, names):
        """What the notebook says to a server that starts on this disk."""
        folder = Path(os.path.realpath(self.folder()))
        for path, data in state.items():
            target = folder / path
            target.parent.mkdir(exist_ok=True)
            if b"/root/" in data:   # the record of another folder
                data = re.sub(rb'"[^"]*(/root/[^"]*)"',
                              lambda match: json.dumps(str(folder)).encode()[:-1] + match[1] + b'"',
                              data)
            target.write_bytes(data)
        for number in range(1, names):
            os.link(folder / "root" / "0.ipynb", folder / "root" / f"{number}.ipynb")
        with unittest.mock.patch.object(minijupyter, "RUNTIME", str(folder / "runtime")):
            contents = minijupyter.CONTENTS[-1](folder / "root")
        self.assertEqual([path.name for path in folder.rglob("*") if path.suffix in (
            ".saving", ".record") and path.parent.name == "root"], [])
        return contents.read(folder / "root" / "0.ipynb")

    def assertOldOrNew(self, names):
        for old, new in ((3000, 2000), (2000, 3000), (1500, 1500)):
            old, new = (jupyter_bytes(notebook(mark * size))
                        for mark, size in (("a", old), ("b", new)))
            states = self.states_of_a_save(old, new, names)
            self.assertGreater(len(states), 10)
            for number, state in enumerate(states):
                with self.subTest(names=names, state=number, of=len(states)):
                    found = self.opened(state, names)
                    self.assertTrue(found in (old, new), f"{len(found)} bytes, a mixture")

    def test_no_crash_loses_a_notebook_that_is_replaced(self):
        """S2, S3."""
        self.assertOldOrNew(names=1)

    def test_no_crash_loses_a_notebook_that_is_written_over(self):
        self.assertOldOrNew(names=2)

    def test_the_recorder_finds_what_a_careless_save_loses(self):
        def careless(target, data, look=None):
            with minijupyter.Temporary(str(target)) as temporary:
                temporary.write(data)
                minijupyter.os.replace(temporary.path, target)

        with unittest.mock.patch.object(minijupyter, "write_atomically", careless), \
                self.assertRaises(AssertionError):
            self.states_of_a_save(b"old", b"new")


class PathsOutsideTheRoot(Case):
    """The root's neighbours are out of reach, however the path is written."""

    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassFolder()
        cls.server = Server(folder)
        cls.addClassCleanup(cls.server.end)
        cls.outside = [folder / "secret.txt", folder / "root-sibling" / "secret.txt"]
        (folder / "root-sibling").mkdir()
        for path in cls.outside:
            path.write_text("SECRET")
        (cls.server.root / "link").symlink_to(folder)
        (cls.server.root / "inside.txt").write_text("inside")
        cls.absolute = str(folder / "secret.txt")

    @classmethod
    def enterClassFolder(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        return Path(folder.name)

    def paths(self):
        return ["../secret.txt", "..%2fsecret.txt", "%2e%2e/secret.txt", "%2e%2e%2fsecret.txt",
                "a/../../secret.txt", "./../secret.txt", "..%5csecret.txt", "link/secret.txt",
                "../root-sibling/secret.txt", "..%2froot-sibling/secret.txt", "link%2fsecret.txt",
                self.absolute, "/" + self.absolute, quote(self.absolute, safe=""),
                "file://" + self.absolute, "%00/../secret.txt", "secret.txt%00", "..", "%2e%2e"]

    def assertNothingLeaks(self, reply, path):
        self.assertIn(reply.status, range(400, 405), (path, reply))
        self.assertNotIn(b"SECRET", reply.body)
        self.assertEqual([p.read_text() for p in self.outside], ["SECRET", "SECRET"])

    def test_nothing_outside_is_read(self):
        for prefix in ("/api/contents/", "/files/"):
            for path in self.paths():
                with self.subTest(prefix + path):
                    self.assertNothingLeaks(self.server.get(prefix + path), path)

    def test_nothing_outside_is_written(self):
        model = {"type": "file", "format": "text", "content": "overwritten"}
        for path in self.paths():
            with self.subTest(path):
                self.assertNothingLeaks(self.server.put("/api/contents/" + path, model), path)

    def test_nothing_outside_is_deleted(self):
        for path in self.paths():
            with self.subTest(path):
                self.assertNothingLeaks(self.server.delete("/api/contents/" + path), path)

    def test_nothing_is_moved_outside_or_inside(self):
        for path in ("../moved.txt", "link/moved.txt", self.absolute + ".moved", "../../x"):
            with self.subTest(path):
                reply = self.server.patch("/api/contents/inside.txt", {"path": path})
                self.assertTrue((self.server.root / "inside.txt").exists() or reply.status == 200)
        self.assertEqual(sorted(p.name for p in self.server.root.parent.iterdir()),
                         ["root", "root-sibling", "secret.txt"])

    def test_a_kernel_starts_inside_the_root_whatever_the_path(self):
        for path in ("../../x.ipynb", self.absolute, "link/x.ipynb"):
            with self.subTest(path):
                reply = self.server.post("/api/sessions", {"path": path, "type": "notebook"})
                if reply.status == 201:
                    frontend = self.server.frontend(reply.json["kernel"]["id"])
                    cell = frontend.finish(frontend.start("import os; print(os.getcwd())"))
                    frontend.wire.close()
                    self.server.delete(f"/api/sessions/{reply.json['id']}")
                    self.assertTrue(Path(cell.text().strip()).resolve().is_relative_to(
                        self.server.root.resolve()), cell)


def two_cells():
    """A notebook in the order of keys that Colab writes, with what JavaScript cannot keep."""
    output = {"output_type": "display_data", "metadata": {}, "data": {
        "application/json": {"10": 12345678901234567890, "9": float("nan")},
        "x/unknown": ["kept", "apart"]}}
    first = {"cell_type": "code", "source": ["first ☃"], "metadata": {"id": "x", "number": 1.0},
             "execution_count": 1, "outputs": [output]}
    second = {"cell_type": "code", "source": ["second"], "metadata": {}, "execution_count": None,
              "outputs": []}
    return {"nbformat": 4, "nbformat_minor": 0, "metadata": {"colab": {"b": 1, "a": 2}},
            "cells": [first, second]}


JUPYTERS = jupyter_bytes(two_cells())
FILE_STYLES = {   # ways to lay out one notebook
    "Jupyter": JUPYTERS, "Colab": json.dumps(two_cells(), indent=2).encode(),
    "four spaces": json.dumps(two_cells(), indent=4, sort_keys=True).encode() + b"\n",
    "tabs": json.dumps(two_cells(), indent="\t", ensure_ascii=False).encode(),
    "CRLF": JUPYTERS.replace(b"\n", b"\r\n"), "a byte order mark": b"\xef\xbb\xbf" + JUPYTERS,
    "no newline at the end": JUPYTERS.rstrip(), "blank lines at the end": JUPYTERS + b"\n \n",
    "escapes": json.dumps(two_cells(), indent=1, sort_keys=True).encode() + b"\n",
    "half a surrogate pair": JUPYTERS.replace("☃".encode(), rb"\ud83d"),
    "numbers beyond all bounds": JUPYTERS.replace(
        b"NaN", b"[1e999, -1e999, Infinity, -Infinity, 1" + 400 * b"0" + b"]"),
    "a later minor version": jupyter_bytes({**two_cells(), "nbformat_minor": 9, "cells": [
        {**cell, "id": f"c{i}", "new": {}} for i, cell in enumerate(two_cells()["cells"])]})}


class NotebookFiles(ServerCase):
    """Whoever wrote the file, and however it is laid out."""

    save_untouched, assertUntouched = Documents.save_untouched, Documents.assertUntouched

    def open(self, data):
        """The content of a notebook of these bytes; strictly JSON, as a browser wants it."""
        (self.root / "styled.ipynb").write_bytes(data)
        reply = self.assertReply(self.server.get("/api/contents/styled.ipynb"), 200)
        return json.loads(reply.body, parse_constant=self.fail)["content"]

    def save(self, content):
        self.assertReply(self.server.put("/api/contents/styled.ipynb", {
            "type": "notebook", "format": "json", "content": content}), 200)
        return (self.root / "styled.ipynb").read_bytes()

    def test_an_untouched_file_keeps_every_byte(self):
        for style, data in FILE_STYLES.items():
            with self.subTest(style):
                self.assertUntouched(data)

    def test_a_change_of_one_cell_changes_nothing_else_in_the_file(self):
        for style, data in FILE_STYLES.items():
            with self.subTest(style):
                content = through_javascript(self.open(data))
                content["cells"][1]["source"] = "changed"
                self.assertEqual(self.save(content), data.replace(b'"second"', b'"changed"'))

    def test_a_file_that_was_just_written_is_known_as_if_it_had_been_read(self):
        for style, data in FILE_STYLES.items():
            file = minijupyter.NotebookFile(data)
            for text in ("changed", "again", "second"):
                content = through_javascript(json.loads(kernel.to_json(file.served)))
                content["cells"][1]["source"] = text
                file = minijupyter.write_notebook(content, file)
                read = minijupyter.NotebookFile(file.data)
                with self.subTest(style, text=text):
                    self.assertEqual(file.data, data.replace(b'"second"', f'"{text}"'.encode()))
                    self.assertEqual(repr(file.served), repr(read.served))
                    self.assertEqual([file.data[place] for place in file.places["cells"]],
                                     [read.data[place] for place in read.places["cells"]])
                    self.assertEqual((file.tail, set(file.places)), (read.tail, set(read.places)))

    def test_a_large_file_that_another_program_changed_is_read_anew(self):
        large = jupyter_bytes(notebook(["x" * minijupyter.Recent.LARGE], ["second"]))
        self.open(large)
        self.assertEqual(self.open(large.replace(b"second", b"changed"))["cells"][1]["source"],
                         "changed")
        content = self.open(large)
        content["cells"][1]["source"] = "mine"
        self.assertEqual(self.save(content), large.replace(b"second", b"mine"))
        self.assertUntouched((self.root / "styled.ipynb").read_bytes())

    def test_small_notebooks_are_kept_within_a_bound(self):
        recent = minijupyter.Recent()
        recent.ROOM = 3000
        for number in [*range(20), 19, 19]:
            data = jupyter_bytes(notebook(f"{number} {'x' * 500}"))
            file = recent.read(data)
            self.assertIs(recent.read(bytes(bytearray(data))), file)
            self.assertEqual(recent.size, sum(map(len, recent.small)))
        self.assertIn(recent.size, range(500, 3000))

    def test_cells_that_are_moved_deleted_and_added_leave_the_others_as_they_stand(self):
        content = through_javascript(self.open(FILE_STYLES["Colab"]))
        content["cells"] = [*reversed(content["cells"]), notebook("new")["cells"][0]]
        saved = self.save(content)
        for text in (b'"number": 1.0', b"NaN", b"12345678901234567890", rb"\u2603"):
            self.assertIn(text, saved)
        self.assertEqual([cell["source"] for cell in json.loads(saved)["cells"]],
                         [["second"], ["first ☃"], ["new"]])

    def test_every_style_is_opened_as_valid_json(self):
        for style, data in FILE_STYLES.items():
            with self.subTest(style):
                self.assertEqual(self.open(data)["cells"][1]["source"], "second")

    def test_half_a_surrogate_pair_in_a_changed_cell_is_written_as_an_escape(self):
        content = self.open(jupyter_bytes(notebook("")))
        content["cells"][0]["source"] = "half \ud83d"
        saved = self.save(content)
        self.assertIn(rb'"half \ud83d"', saved)
        self.assertEqual(self.open(saved)["cells"][0]["source"], "half \ud83d")

    def test_cells_without_an_id_of_their_own_get_the_same_one_every_time(self):
        nb = notebook("1", "2", "3")
        del nb["cells"][0]["id"]
        nb["cells"][2]["id"] = nb["cells"][1]["id"]
        data = jupyter_bytes(nb)
        content = self.open(data)
        ids = [cell["id"] for cell in content["cells"]]
        self.assertEqual(len(set(ids)), 3)
        self.assertEqual([cell["id"] for cell in self.open(data)["cells"]], ids)
        self.assertUntouched(data)
        content["cells"][1]["source"] = "changed"
        saved = json.loads(self.save(content))
        self.assertEqual([cell["id"] for cell in saved["cells"]], ids)

    @needs("nbformat")
    def test_what_other_programs_leave_out_of_a_cell_is_there_when_it_is_opened_and_saved(self):
        import nbformat
        code, prose = {"cell_type": "code"}, {"cell_type": "markdown"}
        for cell in (code, prose, {**code, "outputs": None, "source": None, "metadata": None},
                     {**code, "source": "x", "outputs": [], "metadata": {}},
                     {**prose, "source": None}, {"cell_type": "raw", "metadata": {}}):
            nb = notebook("other", "second")
            nb["cells"][0] = {"id": "a", **cell}
            for is_changed in (False, True):
                with self.subTest(cell=cell, is_changed=is_changed):
                    content = self.open(jupyter_bytes(nb))
                    nbformat.validate(nbformat.from_dict(content))
                    if is_changed:
                        content["cells"][1]["source"] = "changed"
                    nbformat.validate(nbformat.reads(self.save(content), nbformat.NO_CONVERT))

    @needs("nbformat")
    def test_ids_that_nbformat_forbids_are_mended_when_saving(self):
        import nbformat
        ids = ["two words", "", "x" * 65, "é", "same", "same", 7, None, "good-1_"]
        nb = notebook(*map(str, ids))
        nb["cells"] = [{**cell, "id": id} for cell, id in zip(nb["cells"], ids, strict=True)]
        for name, content in (("sent.ipynb", nb), ("styled.ipynb", self.open(jupyter_bytes(nb)))):
            content["cells"][0]["source"] = "changed"
            self.assertReply(self.server.put(f"/api/contents/{name}", {
                "type": "notebook", "format": "json", "content": content}), [200, 201])
            saved = nbformat.read(self.root / name, nbformat.NO_CONVERT)
            nbformat.validate(saved)
            kept = [cell["id"] for cell in saved["cells"]]
            self.assertEqual((len(set(kept)), kept[4], kept[8]), (9, "same", "good-1_"))

    def test_what_json_has_not_comes_into_no_file(self):
        nb = notebook("1")
        nb["cells"][0]["outputs"] = [{"output_type": "display_data", "metadata": {}, "data": {
            "application/json": [float("nan"), float("inf"), 1e308, "NaN"]}}]
        for text in (json.dumps(nb), json.dumps(nb).replace("Infinity", "1e999")):
            body = f'{{"type": "notebook", "format": "json", "content": {text}}}'
            self.assertReply(self.server.put("/api/contents/nan.ipynb", body), [200, 201])
            saved = json.loads((self.root / "nan.ipynb").read_bytes(), parse_constant=self.fail)
            self.assertEqual(saved["cells"][0]["outputs"][0]["data"]["application/json"],
                             [None, None, 1e308, "NaN"])
            opened = self.server.get("/api/contents/nan.ipynb").json["content"]
            self.assertEqual(opened["cells"][0]["outputs"], saved["cells"][0]["outputs"])

    def test_an_empty_file_is_a_new_notebook(self):
        for data in (b"", b"\n"):
            content = self.open(data)
            self.assertEqual(content["cells"], [])
            self.assertEqual(self.save(content), jupyter_bytes(notebook()))

    def test_the_plain_way_alone_opens_and_saves_notebooks(self):
        contents = minijupyter.CONTENTS[-1](self.folder())
        nb = notebook("x = 1\ny = 2", "half \ud83d")
        path = Path(contents.root, "a.ipynb")
        model = {"type": "notebook", "format": "json", "content": nb}
        with unittest.mock.patch.multiple(
                minijupyter, DOCUMENTS=[minijupyter.PlainDocument], UPGRADES={}):
            contents.save("a.ipynb", model)
            self.assertEqual(contents.get("a.ipynb")["content"], nb)
            data = path.read_bytes()
            contents.save("a.ipynb", model, hashlib.sha256(data).hexdigest())
            self.assertEqual(path.read_bytes(), data)
            nb["cells"] = [{"cell_type": "code"}, *notebook("1")["cells"]]
            contents.save("a.ipynb", model)
            self.assertEqual(contents.get("a.ipynb")["content"]["cells"][0]["outputs"], [])
            nb["metadata"]["number"] = float("inf")
            for text, action in ((json.dumps(VERSION_3), lambda: contents.get("a.ipynb")),
                                 ("{}", lambda: contents.save("a.ipynb", model))):
                path.write_text(text)
                with self.assertRaises(minijupyter.Problem):
                    action()
        self.assertEqual(contents.get("a.ipynb", "file")["content"], "{}")

    def test_a_file_of_a_newer_format_is_refused_in_clear_words(self):
        (self.root / "five.ipynb").write_text('{"nbformat": 5}')
        reply = self.assertReply(self.server.get("/api/contents/five.ipynb"), 400)
        self.assertIn("nbformat 5", reply.json["message"])

    def test_a_damaged_notebook_is_refused_with_the_place_of_the_fault(self):
        cases = {   # what stands in the place of the first cell -> what the message says
            "7": "/cells/0", '{"metadata": {}, "outputs": []}': "/cells/0/cell_type",
            '{"cell_type": "code", "metadata": {}, "outputs": [], "source": 7}': "/cells/0/source",
            '{"cell_type": "code", "metadata": {}, "source": "", "outputs": [{}]}':
                "/cells/0/outputs/0/output_type",
            '{"cell_type": "raw", "metadata": 1, "source": ""}': "/cells/0/metadata",
            "": "column", "{}, ": "column", "{} {}": "column", "[": "column", '{"a" 1}': "column"}
        for cell, said in cases.items():
            with self.subTest(cell):
                (self.root / "damaged.ipynb").write_text(
                    f'{{"cells": [{cell or ","}], "metadata": {{}}, "nbformat": 4}}')
                reply = self.assertReply(self.server.get("/api/contents/damaged.ipynb"), 400)
                self.assertIn(said, reply.json["message"])

    def test_what_is_nested_too_deep_is_refused(self):
        deep = 50_000 * "[" + 50_000 * "]"
        data = json.dumps(notebook(deep=0)).replace('"deep": 0', f'"deep": {deep}')
        (self.root / "deep.ipynb").write_text(data)
        self.assertReply(self.server.get("/api/contents/deep.ipynb"), 400)
        body = f'{{"type": "notebook", "format": "json", "content": {data}}}'
        self.assertReply(self.server.put("/api/contents/saved.ipynb", body), 400)


NAMES = ["Übung.txt", "данные.csv", "資料.txt", "データ.ipynb", "데이터.txt", "ข้อมูล.txt",
         "नमूना.txt", "بيانات.txt", "נתונים.txt", "ελληνικά.txt", "ქართული.txt",
         "😀👩\u200d🚀.txt", "\xe9.txt", "e\u0301.txt", "two words.txt", " around ",
         "100%.txt", "%2e%2e%2fx.txt", "a#b?c&d=e+f;g.txt", "quote'\".txt", "<b>bold.txt",
         "$HOME `id`.txt", "a\tb\nc.txt", "new line\n", "no_extension",
         "\u202eright to left.txt", "x" * 251 + ".txt"]


class Files(ServerCase):
    """One folder of files, as strange as they come."""

    def save(self, path, content="new", server=None, **model):
        model = {"type": "file", "format": "text", "content": content, **model}
        return (server or self.server).put(f"/api/contents/{quote(path)}", model)

    def names(self, folder=""):
        listing = self.assertReply(self.server.get(f"/api/contents/{quote(folder)}"), 200)
        return [model["name"] for model in listing.json["content"]]

    def test_names_of_every_alphabet_are_saved_listed_read_renamed_and_deleted(self):
        (self.root / "names").mkdir()
        for name in NAMES:
            with self.subTest(name):
                address = f"/api/contents/names/{quote(name)}"
                model = self.assertReply(self.save(f"names/{name}", type="file"), 201).json
                self.assertEqual((model["name"], model["path"]), (name, f"names/{name}"))
                self.assertEqual((self.root / "names" / name).read_text(), "new")
                self.assertIn(name, self.names("names"))
                self.assertEqual(self.server.get(address + "?type=file").json["content"], "new")
                self.assertEqual(self.server.get(f"/files/names/{quote(name)}").body, b"new")
                self.assertReply(self.server.patch(address, {"path": "names/other"}), 200)
                self.assertReply(self.server.patch("/api/contents/names/other", {
                    "path": f"names/{name}"}), 200)
                self.assertReply(self.server.delete(address), 204)
                self.assertEqual(self.names("names"), [])

    def test_a_name_that_the_disk_cannot_take_is_refused(self):
        for name in ("x" * 300, "\0", "a\0b", "a\\b"):
            with self.subTest(name):
                self.assertReply(self.save(name), [400, 404])

    def test_a_listing_hides_what_jupyter_hides_and_survives_what_cannot_be_shown(self):
        folder = self.root / "listing"
        for name in ("shown.py", ".hidden", "shown.py~", "old.pyc", ".DS_Store"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("")
        (folder / "__pycache__").mkdir()
        (folder / "broken link").symlink_to("nowhere")
        (folder / "endless link").symlink_to("endless link")
        (folder / "good link.py").symlink_to("shown.py")
        os.mkfifo(folder / "pipe")
        (folder / b"not utf-8 \xff".decode("utf-8", "surrogateescape")).write_text("")
        os.utime(folder / "shown.py", (1 << 33, 1 << 33))
        self.assertEqual(self.names("listing"), ["good link.py", "shown.py"])

    def test_names_that_no_client_could_send_are_counted(self):
        folder = self.root / "odd names"
        folder.mkdir()
        (folder / "good.txt").write_text("")
        self.assertNotIn("message", self.server.get("/api/contents/odd%20names").json)
        for name in (b"not utf-8 \xff", b"back\\slash"):
            (folder / os.fsdecode(name)).write_text("")
        listing = self.assertReply(self.server.get("/api/contents/odd%20names"), 200).json
        self.assertEqual([model["name"] for model in listing["content"]], ["good.txt"])
        self.assertIn("backslash: 2", listing["message"])

    def test_a_folder_is_copied_whole(self):
        folder = self.root / "work"
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "deep" / "er" / "data.bin").write_bytes(b"\xff")
        (folder / "link").symlink_to("deep")
        os.mkfifo(folder / "pipe")
        for target, path in (("", "work-Copy1"), ("", "work-Copy2"), ("inbox", "inbox/work")):
            (self.root / "inbox").mkdir(exist_ok=True)
            reply = self.server.post(f"/api/contents/{target}", {"copy_from": "work"})
            model = self.assertReply(reply, 201).json
            self.assertEqual((model["path"], model["type"]), (path, "directory"))
            copy = self.root / path
            self.assertEqual((copy / "link" / "er" / "data.bin").read_bytes(), b"\xff")
            self.assertEqual(sorted(os.listdir(copy)), ["deep", "link"])

    def test_a_folder_with_files_is_deleted_unless_the_client_wants_to_ask_first(self):
        folder = self.root / "full"
        (folder / ".hidden").mkdir(parents=True)
        (folder / "outside").symlink_to(self.root.parent)
        reply = self.assertReply(self.server.delete("/api/contents/full?recursive=0"), 400)
        self.assertEqual(reply.json["reason"], "not empty")
        self.assertReply(self.server.delete("/api/contents/full"), 204)
        self.assertEqual((folder.exists(), self.root.exists()), (False, True))

    def test_a_relative_link_leads_to_the_same_file_after_a_move(self):
        (self.root / "here").mkdir()
        (self.root / "here" / "below").mkdir()
        (self.root / "aim.txt").write_text("aim")
        (self.root / "here" / "link.txt").symlink_to("../aim.txt")
        for old, new in (("here/link.txt", "here/below/link.txt"),
                         ("here/below/link.txt", "link.txt"), ("link.txt", "renamed.txt")):
            self.assertReply(self.server.patch(f"/api/contents/{old}", {"path": new}), 200)
            self.assertFalse(os.path.lexists(self.root / old))
            self.assertFalse(os.path.isabs(os.readlink(self.root / new)))
            self.assertEqual(self.server.get(f"/api/contents/{new}").json["content"], "aim")

    def test_the_links_of_a_folder_lead_to_the_same_files_after_a_move_and_a_copy(self):
        folder = self.root / "linked" / "inner"
        folder.mkdir(parents=True)
        (self.root / "out.txt").write_text("out")
        (self.root / "linked" / "in.txt").write_text("in")
        (folder / "out.txt").symlink_to("../../out.txt")
        (folder / "in.txt").symlink_to("../in.txt")
        (self.root / "deep" / "er").mkdir(parents=True)
        reply = self.server.post("/api/contents/deep", {"copy_from": "linked"})
        self.assertReply(reply, 201)
        reply = self.server.patch("/api/contents/linked", {"path": "deep/er/moved"})
        self.assertReply(reply, 200)
        for path in ("deep/linked/inner", "deep/er/moved/inner"):
            for name in ("in", "out"):
                opened = self.server.get(f"/api/contents/{path}/{name}.txt").json
                self.assertEqual(opened["content"], name)
        self.assertEqual(os.readlink(self.root / "deep" / "er" / "moved" / "inner" / "in.txt"),
                         "../in.txt")

    def test_a_range_may_have_any_number_of_digits(self):
        (self.root / "ranged.txt").write_text("0123456789")
        huge, zeros = "9" * 5000, "0" * 5000
        for given, status, body in ((f"2-{huge}", 206, b"23456789"), (f"{huge}-", 416, b""),
                                    (f"-{huge}", 206, b"0123456789"), (f"{huge}-{huge}", 416, b""),
                                    (f"{zeros}2-{zeros}3", 206, b"23"), ("1-1", 206, b"1"),
                                    ("0-0", 206, b"0"), ("-0", 416, b""), ("-1", 206, b"9")):
            with self.subTest(given[:9]):
                reply = self.server.get("/files/ranged.txt", Range=f"bytes={given}")
                self.assertEqual((reply.status, reply.body), (status, body))

    def test_long_texts_are_read_and_saved_as_short_ones_are(self):
        texts = ["é☃𝄞\n\"\\" * 40, "x", "\\\\ud83d", "\u2028", "😀"]
        with unittest.mock.patch.multiple(minijupyter, LONG_TEXT=10, AT_ONCE=33):
            contents = minijupyter.CONTENTS[-1](self.folder())
            for text, is_ascii in itertools.product([*texts, "".join(texts)], (True, False)):
                sent = {"type": "file", "format": "text", "content": text}
                data = json.dumps(sent, ensure_ascii=is_ascii).encode()
                contents.save("a.txt", minijupyter.read_model(data))
                self.assertEqual(json.loads(contents.get_json("a.txt"))["content"], text)
                sent["content"] = base64.encodebytes(text.encode()).decode()
                sent["format"] = "base64"
                contents.save("a.txt", minijupyter.read_model(json.dumps(sent).encode()))
                got = json.loads(contents.get_json("a.txt", None, "base64"))["content"]
                self.assertEqual(base64.b64decode(got), text.encode())

    def test_large_things_are_read_and_written_in_small_pieces(self):
        """A piece is what holds up all other threads."""
        contents, most = minijupyter.CONTENTS[-1](self.folder()), 8 * minijupyter.AT_ONCE
        for form, letter in (("text", "\n"), ("base64", "A")):
            text = letter * 8_000_000
            body = json.dumps({"type": "file", "format": form, "content": text}).encode()
            model = minijupyter.read_model(body)
            self.assertLess(max(map(len, model["content"])), most)
            contents.save("large", model)
            self.assertLess(max(map(len, contents.get_json("large", None, form))), most)
        for number in range(8000):
            Path(contents.root, f"{number}.txt").write_text("")
        self.assertLess(max(map(len, contents.get_json(""))), most)

    def test_a_long_request_is_read_as_json_reads_it(self):
        nb = notebook("x" * 30, "[1, {\"a\": 2}]")
        good = [{"type": "notebook", "content": nb}, {"content": ["x" * 99]}, {"x" * 99: "y" * 99},
                {"type": "x" * 99, "content": "y" * 99}, [["z" * 99]], "z" * 99, {}]
        bad = ["", "{", '{"content": "' + "x" * 99, '{"content": "%s\n"}' % ("x" * 99), "{} {}",
               '{"content": "%s\\q"}' % ("x" * 99), '{"content": "%s" "x"}' % ("x" * 99),
               '{"content": "%s\\ud8"}' % ("x" * 99), "{7: 1}"]
        with unittest.mock.patch.multiple(minijupyter, LONG_TEXT=1, AT_ONCE=33):
            for value in good:
                read = minijupyter.read_model(json.dumps(value).encode())
                if isinstance(read, dict) and isinstance(read.get("content"), tuple):
                    read["content"] = "".join(read["content"])
                self.assertEqual(read, value)
            for text in bad:
                with self.subTest(text), self.assertRaises(ValueError):
                    minijupyter.read_model(text.encode())

    def test_a_hidden_file_is_neither_read_nor_written_nor_moved_to(self):
        (self.root / ".secret").write_text("SECRET")
        (self.root / ".folder").mkdir()
        (self.root / "seen.txt").write_text("seen")
        for path in (".secret", ".folder/x.txt", ".new", "a/.b/c.txt"):
            with self.subTest(path):
                self.assertReply(self.server.get(f"/api/contents/{path}"), 404)
                self.assertReply(self.server.get(f"/files/{path}"), 404)
                self.assertReply(self.save(path), 400)
                self.assertReply(self.server.delete(f"/api/contents/{path}"), 400)
                self.assertReply(self.server.post("/api/contents/", {"copy_from": path}), 400)
                self.assertReply(self.server.patch("/api/contents/seen.txt", {"path": path}), 400)
        self.assertEqual((self.root / ".secret").read_text(), "SECRET")

    def test_a_small_file_is_read_once_until_it_changes(self):
        root = self.folder()
        contents = minijupyter.CONTENTS[-1](root)
        (root / "a.txt").write_text("one")
        self.assertIsNot(contents.get_json("a.txt"), contents.get_json("a.txt"))   # too fresh
        contents.answers.TICK = 0
        kept = contents.get_json("a.txt")
        self.assertIs(contents.get_json("a.txt"), kept)
        self.assertIn(b'"content":null', contents.get_json("a.txt", None, None, False))
        (root / "a.txt").write_text("two")
        os.utime(root / "a.txt", (1, 1))
        self.assertIn(b'"content":"two"', contents.get_json("a.txt"))
        (root / "a.txt").unlink()
        with self.assertRaises(minijupyter.Problem):
            contents.get_json("a.txt")

    def test_what_small_files_say_is_kept_within_a_bound(self):
        root = self.folder()
        contents = minijupyter.CONTENTS[-1](root)
        contents.answers.TICK, contents.answers.MOST = 0, 3000
        for number in range(20):
            (root / f"{number}.txt").write_text("x" * 1000)
            contents.get_json(f"{number}.txt")
        kept = [answer for _, answer in contents.answers.kept.values()]
        self.assertLessEqual(sum(map(len, kept)), 3000)
        self.assertGreater(len(kept), 0)

    def test_hidden_files_are_served_when_they_are_asked_for(self):
        root = self.folder()
        (root / ".hidden").write_text("x")
        contents = minijupyter.CONTENTS[-1](root, allow_hidden=True)
        self.assertEqual(contents.get(".hidden")["content"], "x")
        self.assertEqual([m["name"] for m in contents.get("")["content"]], [".hidden"])
        for path in ("..", ".", "../x", "a/../.hidden"):
            with self.assertRaises(minijupyter.Problem):
                contents.resolve(path)

    def test_tokens_and_keys_below_the_root_are_out_of_reach(self):   # CVE-2022-29241
        root = self.folder()
        runtime = root / "root" / "jupyter" / "runtime"
        server = self.own_server(root, env={"JUPYTER_RUNTIME_DIR": str(runtime)})
        kernel_id = self.assertReply(server.post("/api/kernels", {}), 201).json["id"]
        self.assertTrue((runtime / f"kernel-{kernel_id}.json").exists())
        (server.root / "link").symlink_to(runtime)
        listing = server.get("/api/contents/jupyter").json
        self.assertEqual(listing["content"], [])
        for path in ("jupyter/runtime", f"jupyter/runtime/kernel-{kernel_id}.json", "link",
                     f"link/kernel-{kernel_id}.json"):
            with self.subTest(path):
                self.assertReply(server.get(f"/api/contents/{path}"), 404)
                self.assertReply(server.get(f"/files/{path}"), 404)
                self.assertReply(server.post("/api/contents/", {"copy_from": path}), 404)
                self.assertReply(server.patch(f"/api/contents/{path}", {"path": "moved"}), 404)
                self.assertReply(server.delete(f"/api/contents/{path}"), 404)
        self.assertReply(server.patch("/api/contents/jupyter", {"path": "moved"}), 403)
        self.assertReply(self.save("jupyter/runtime/new.json", server=server), 404)

    @unittest.skipUnless(sys.platform == "linux", "to lose root's rights takes Linux")
    def test_what_the_disk_does_not_permit_is_forbidden(self):
        server = self.own_server(preexec_fn=without_roots_rights)
        for name in ("file.txt", "folder/file.txt", "closed/file.txt"):
            (server.root / name).parent.mkdir(exist_ok=True)
            (server.root / name).write_text("old")
        (server.root / "file.txt").chmod(0)
        (server.root / "folder").chmod(0o555)
        (server.root / "closed").chmod(0)
        self.addCleanup((server.root / "folder").chmod, 0o755)
        self.addCleanup((server.root / "closed").chmod, 0o755)
        self.assertReply(server.get("/api/contents/file.txt"), 403)
        self.assertReply(server.get("/files/file.txt"), 403)
        self.assertReply(server.get("/api/contents/closed"), 403)
        self.assertFalse(server.get("/api/contents/folder?content=0").json["writable"])
        self.assertReply(self.save("folder/new.txt", server=server), 403)
        self.assertReply(server.delete("/api/contents/folder/file.txt"), 403)
        self.assertReply(server.post("/api/contents/folder", {"type": "notebook"}), 403)
        self.assertReply(server.patch("/api/contents/folder/file.txt", {"path": "x.txt"}), 403)
        self.assertReply(server.post("/api/contents/folder/file.txt/checkpoints"), 403)
        self.assertEqual((server.root / "folder" / "file.txt").read_text(), "old")
        self.assertReply(server.get("/api/contents/"), 200)

    def test_a_copy_gets_a_name_of_its_own(self):
        (self.root / "copies").mkdir()
        (self.root / "elsewhere").mkdir()
        for name, copies in {
                "a.b.ipynb": ["a.b-Copy1.ipynb", "a.b-Copy2.ipynb"],
                "x.tar.gz": ["x-Copy1.tar.gz", "x-Copy2.tar.gz"],
                "plain": ["plain-Copy1", "plain-Copy2"],
                "y-Copy3.txt": ["y.txt", "y-Copy1.txt"]}.items():
            (self.root / "copies" / name).write_text(name)
            for folder, copy in zip(("copies", "copies", "elsewhere"),
                                    [*copies, re.sub("-Copy3", "", name)], strict=True):
                with self.subTest(copy, folder=folder):
                    reply = self.server.post(f"/api/contents/{folder}",
                                             {"copy_from": f"copies/{name}"})
                    model = self.assertReply(reply, 201).json
                    self.assertEqual(model["path"], f"{folder}/{copy}")
                    self.assertEqual(reply.headers["Location"], f"/api/contents/{folder}/{copy}")
                    self.assertEqual((self.root / folder / copy).read_text(), name)

    def test_a_copy_may_be_given_its_name(self):
        (self.root / "pattern.txt").write_text("pattern")
        reply = self.assertReply(self.server.post("/api/contents/named.md",
                                                  {"copy_from": "pattern.txt"}), 201)
        self.assertEqual(reply.json["path"], "named.md")
        self.assertEqual((self.root / "named.md").read_text(), "pattern")

    def test_a_folder_is_copied_whole_or_not_at_all(self):
        folder = self.root / "whole"
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "x.txt").write_text("x")
        (folder / "link").symlink_to("/etc/passwd")
        os.mkfifo(folder / "pipe")
        copy = lambda: self.server.post("/api/contents", {"copy_from": "whole"})  # noqa: E731
        self.assertEqual(self.assertReply(copy(), 201).json["path"], "whole-Copy1")
        made = self.root / "whole-Copy1"
        self.assertEqual({path.name for path in made.rglob("*")}, {"deep", "x.txt", "link"})
        self.assertTrue((made / "link").is_symlink())
        self.assertReply(self.server.get("/api/contents/whole-Copy1/link"), 404)
        self.assertEqual(self.assertReply(copy(), 201).json["path"], "whole-Copy2")
        if os.geteuid():   # nothing is forbidden to root
            (folder / "deep").chmod(0)
            self.addCleanup((folder / "deep").chmod, 0o700)
            self.assertReply(copy(), 403)
            self.assertFalse((self.root / "whole-Copy3").exists())
        self.assertEqual(list(self.root.glob(".*.copying")), [])

    def test_what_cannot_be_copied_is_refused(self):
        (self.root / "file to copy").write_text("")
        (self.root / "folder to copy").mkdir()
        for source, folder, status in (("folder to copy", "folder to copy", 400),
                                       ("/", "folder to copy", 400), ("missing", "", 404),
                                       ("file to copy", "missing/x", 404),
                                       ("file to copy", "file to copy", 400)):
            with self.subTest(source, folder=folder):
                self.assertReply(self.server.post(f"/api/contents/{quote(folder)}",
                                                  {"copy_from": source}), status)
        self.assertReply(self.save("x.txt", copy_from="file to copy"), 400)

    def test_a_checkpoint_is_made_restored_and_deleted(self):
        (self.root / "kept.txt").write_text("first")
        address = "/api/contents/kept.txt/checkpoints"
        self.assertEqual(self.server.get(address).json, [])
        made = self.assertReply(self.server.post(address), 201).json
        self.assertEqual(self.server.get(address).json, [made])
        self.assertEqual(set(made), {"id", "last_modified"})
        self.assertEqual((self.root / ".ipynb_checkpoints" / "kept-checkpoint.txt").read_text(),
                         "first")
        self.assertReply(self.save("kept.txt", "second"), 200)
        self.assertReply(self.server.post(f"{address}/{made['id']}"), 204)
        self.assertEqual((self.root / "kept.txt").read_text(), "first")
        self.assertReply(self.server.delete(f"{address}/{made['id']}"), 204)
        self.assertEqual(self.server.get(address).json, [])
        for reply in (self.server.post(f"{address}/{made['id']}"),
                      self.server.delete(f"{address}/{made['id']}"),
                      self.server.post(f"{address}/..%2fkept"),
                      self.server.post("/api/contents/missing.txt/checkpoints")):
            self.assertReply(reply, 404)

    def test_a_checkpoint_goes_along_with_its_file_and_ends_with_it(self):
        (self.root / "moves.txt").write_text("x")
        self.server.post("/api/contents/moves.txt/checkpoints")
        self.server.patch("/api/contents/moves.txt", {"path": "moved.txt"})
        address = "/api/contents/moved.txt/checkpoints"
        self.assertEqual(len(self.server.get(address).json), 1)
        self.server.delete("/api/contents/moved.txt")
        (self.root / "moved.txt").write_text("another")
        self.assertEqual(self.server.get(address).json, [])

    def test_a_large_upload_comes_in_chunks_and_takes_its_place_at_the_end(self):
        (self.root / "target.bin").write_bytes(b"old")
        (self.root / "target.bin").chmod(0o640)
        (self.root / "upload.bin").symlink_to("target.bin")
        chunks = [secrets.token_bytes(1000) for _ in range(3)]
        for number, chunk in zip((1, 2, -1), chunks, strict=True):
            self.assertEqual((self.root / "upload.bin").read_bytes(), b"old")
            self.assertReply(self.save("upload.bin", base64.b64encode(chunk).decode(),
                                       format="base64", chunk=number), 200)
        self.assertTrue((self.root / "upload.bin").is_symlink())
        self.assertEqual((self.root / "target.bin").read_bytes(), b"".join(chunks))
        self.assertEqual((self.root / "target.bin").stat().st_mode & 0o777, 0o640)
        self.assertEqual(list(self.root.glob(".*.upload")), [])

    def test_a_chunk_out_of_place_is_refused(self):
        for chunk in ({"chunk": 2}, {"chunk": -1}, {"chunk": 1, "type": "notebook"},
                      {"chunk": 1, "format": None}):
            with self.subTest(chunk):
                self.assertReply(self.save("new.bin", "", **chunk), 400)
        self.assertFalse((self.root / "new.bin").exists())

    def test_base64_is_taken_in_lines_as_jupyter_gives_it(self):
        self.assertReply(self.save("lines.bin", base64.encodebytes(b"\xff" * 100).decode(),
                                   format="base64"), 201)
        self.assertEqual((self.root / "lines.bin").read_bytes(), b"\xff" * 100)

    def test_a_save_through_a_link_to_nowhere_creates_its_target(self):
        (self.root / "to be").symlink_to("made.txt")
        self.assertReply(self.save("to be"), 201)
        self.assertEqual((self.root / "made.txt").read_text(), "new")

    def test_while_a_file_is_saved_every_reader_gets_one_version_whole(self):
        versions = ["a" * 1_000_000, "b" * 1_000_000]
        self.save("busy.txt", versions[0])
        with ThreadPoolExecutor() as pool:
            saves = [pool.submit(self.save, "busy.txt", versions[i % 2]) for i in range(20)]
            while not all(save.done() for save in saves):
                self.assertIn(self.server.get("/api/contents/busy.txt").json["content"], versions)
        self.assertEqual({save.result().status for save in saves}, {200})


# ---- 7. HTTP, access, kernels and sessions ----------------------------------------
#
# Who may talk to the server, and what becomes of the kernels it starts. Every error is a
# JSON object with a message. A kernel that dies, or never lives, says why.


class Http(ServerCase):
    def test_a_connection_serves_many_requests_errors_included(self):
        connection = self.server.connect()
        self.addCleanup(connection.close)
        first = None
        for method, path, body, status in [
                ("GET", "/api", None, 200), ("GET", "/api/contents/none", None, 404),
                ("PUT", "/api/contents/x.txt", "{", 400), ("DELETE", "/api/kernels", None, 405),
                ("POST", "/api/nothing", "x" * 100_000, 404), ("GET", "/api/kernels", None, 200)]:
            with self.subTest(f"{method} {path}"):
                reply = self.server.request(method, path, body, connection=connection)
                self.assertEqual(reply.status, status, reply)
                first = first or connection.sock
                self.assertIs(connection.sock, first)

    def test_an_unauthorized_request_with_a_body_keeps_the_connection_in_step(self):
        connection = self.server.connect()
        self.addCleanup(connection.close)
        for token, status in ((None, 403), (f"token {self.server.token}", 201)):
            reply = self.server.request(
                "PUT", "/api/contents/step.txt",
                {"type": "file", "format": "text", "content": "x" * 100_000},
                {"Authorization": token}, connection)
            self.assertEqual(reply.status, status, reply)

    def test_the_server_says_its_version_without_a_token(self):
        reply = self.server.get("/api", Authorization=None)
        self.assertEqual((reply.status, type(reply.json["version"])), (200, str))

    def test_options_are_answered_to_everybody_and_allow_no_other_origin(self):
        reply = self.server.request("OPTIONS", "/api/kernels", headers={"Authorization": None})
        self.assertEqual((reply.status, reply.headers["Allow"]), (204, "GET, HEAD, OPTIONS, POST"))
        self.assertNotIn("Access-Control-Allow-Origin", reply.headers)

    def test_errors_are_json_with_a_message(self):
        for method, path, status in [
                ("GET", "/api/nothing", 404), ("DELETE", "/api/kernels", 405),
                ("GET", "/api/kernels/00000000-0000-0000-0000-000000000000", 404),
                ("DELETE", "/api/sessions/00000000-0000-0000-0000-000000000000", 404),
                ("GET", "/api/kernels/nonsense", 404), ("BREW", "/api/kernels", 501),
                ("get", "/api/kernels", 501)]:
            with self.subTest(f"{method} {path}"):
                self.assertReply(self.server.request(method, path), status)

    def test_who_asks_for_the_status_is_nobody_who_works_here(self):
        """A program that ends idle servers asks again and again; it must not keep them alive."""
        last = lambda: self.server.get("/api/status").json["last_activity"]  # noqa: E731
        before = last()
        self.server.get("/api/resolvePath?path=x")
        self.assertEqual(last(), before)
        self.server.get("/api/kernels")
        self.assertGreater(last(), before)

    def test_permissions_are_lists_of_words(self):
        for wish in ("x", "[]", '{"a": "b"}', '{"a": [1]}', "[" * 10_000, "3"):
            with self.subTest(wish[:10]):
                self.assertReply(self.server.get(f"/api/me?permissions={quote(wish)}"), 400)
        granted = self.server.get("/api/me?permissions=" + quote('{"a": ["b"]}')).json
        self.assertEqual(granted["permissions"], {"a": ["b"], "updatable_fields": []})

    def test_the_specification_names_every_route_of_the_api(self):
        reply = self.server.get("/api/spec.yaml")
        self.assertEqual((reply.status, reply.headers["Content-Type"]), (200, "text/x-yaml"))
        paths = reply.json["paths"]
        self.assertEqual(set(paths["/api/kernels/{id}"]), {"get", "delete"})
        self.assertEqual(set(paths["/api/contents/{path}/checkpoints/{id}"]), {"post", "delete"})
        self.assertIn("/api/config/{section}", paths)
        self.assertFalse([path for path in paths if re.search(r"[^\w/{}.]", path)])

    @needs("yaml", "jupyter_server")
    def test_the_specification_has_every_path_of_jupyters_but_terminals(self):
        import jupyter_server
        import yaml
        file = Path(jupyter_server.__file__).parent / "services" / "api" / "api.yaml"
        unnamed = lambda paths: {re.sub("{.*?}", "{}", path).rstrip("/") for path in paths}  # noqa: E731
        theirs = unnamed(yaml.safe_load(file.read_text())["paths"])
        ours = unnamed(self.server.get("/api/spec.yaml").json["paths"])
        self.assertEqual({path for path in theirs - ours if "terminals" not in path}, set())

    def test_a_path_in_an_output_is_found_below_the_root_and_for_its_kernel(self):
        (self.root / "found").mkdir()
        (self.root / "found" / "é.py").write_text("")
        kernel_id = self.assertReply(
            self.server.post("/api/kernels", {"path": "found/x.ipynb"}), 201).json["id"]
        self.addCleanup(self.server.delete, f"/api/kernels/{kernel_id}")
        whole = str((self.root / "found" / "é.py").resolve())
        for path, expected in (
                ("é.py", {"kernel": whole}), ("found/é.py", {"server": "found/é.py"}),
                (whole, {"server": "found/é.py", "kernel": whole}), ("none", {}), ("../x", {}),
                ("nul\0", {})):
            with self.subTest(path):
                reply = self.assertReply(self.server.get(
                    f"/api/resolvePath?path={quote(path)}&kernel={kernel_id}"), 200).json
                self.assertEqual({r["scope"]: r["path"] for r in reply["resolved"]}, expected)

    def test_a_file_is_viewed_in_a_frame_that_is_a_stranger_here(self):
        name = '<b>"&.html'
        (self.root / name).write_text("<script>parent.document</script>")
        reply = self.server.get(f"/view/{quote(name)}")
        page = reply.body.decode()
        self.assertIn('sandbox="allow-scripts"', page)
        self.assertIn('src="/files/%3Cb%3E%22%26.html"', page)
        self.assertNotIn("<b>", page)
        self.assertIn("default-src 'none'", reply.headers["Content-Security-Policy"])
        self.assertNotIn("script-src", reply.headers["Content-Security-Policy"])
        self.assertEqual(self.server.get("/view/x", Authorization=None).status, 302)

    def test_replies_forbid_sniffing(self):
        for path in ("/api", "/api/contents", f"/tree?token={self.server.token}"):
            self.assertEqual(self.server.get(path).headers["X-Content-Type-Options"], "nosniff")

    def test_every_page_is_the_frontend(self):
        (self.root / "page.ipynb").write_bytes(jupyter_bytes(notebook()))
        for path in ("/tree", "/tree/", "/notebooks/page.ipynb", "/edit/page.txt"):
            with self.subTest(path):
                reply = self.server.get(path)
                self.assertEqual(reply.status, 200)
                self.assertTrue(reply.headers["Content-Type"].startswith("text/html"))
                self.assertIn("Content-Security-Policy", reply.headers)

    def test_nonsense_on_the_socket_harms_nobody(self):
        for data in (b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
                     b"GET / HTTP/9.9\r\n\r\n", b"POST /api HTTP/1.1\r\nHost: localhost\r\n"
                     b"Content-Length: x\r\n\r\n", b"GET /" + b"x" * 100_000):
            with self.subTest(data=data[:40]), socket.create_connection(
                    ("127.0.0.1", self.server.port), SECONDS) as raw:
                with contextlib.suppress(ConnectionError):
                    raw.sendall(data)
                    with contextlib.suppress(OSError):   # the server may have ended it
                        raw.shutdown(socket.SHUT_WR)
                    while raw.recv(65536):
                        pass
                self.assertEqual(self.server.get("/api").status, 200)
        self.assertNotIn("Traceback", self.server.process.output)


class HttpRequests(ServerCase):
    """Requests byte by byte, as RFC 9112 has them and as it has not; among them the 33 cases of
    h1spec (uNetworking)."""

    def request(self, line="GET /api HTTP/1.1", *fields, body=b"", host="127.0.0.1"):
        lines = [line, *([f"Host: {host}"] if host else []),
                 f"Authorization: token {self.server.token}", *fields, "", ""]
        return "\r\n".join(lines).encode() + body

    def connect(self, data):
        raw = self.enterContext(socket.create_connection(("127.0.0.1", self.server.port), SECONDS))
        raw.sendall(data)
        return raw

    def assertStatuses(self, data, *statuses):
        """The answers to these bytes, in order, until the server closes; returns all it said."""
        answer = self.ask(data)
        found = re.findall(rb"HTTP/1\.1 (\d+) [A-Z]", answer)
        self.assertEqual([int(status) for status in found], [*statuses], answer)
        return answer

    def put(self, *fields, body=b"", name="x.txt"):
        return self.request(f"PUT /api/contents/{name} HTTP/1.1", *fields, body=body)

    MODEL = json.dumps({"type": "file", "format": "text", "content": "HellO world1"}).encode()

    def chunks(self, *sizes, extension=b""):
        """MODEL in chunks of these sizes, the last of what is left, and the end mark."""
        cuts, pieces = [0, *itertools.accumulate(sizes), len(self.MODEL)], []
        for start, end in itertools.pairwise(cuts):
            pieces.append(b"%x%b\r\n%b\r\n" % (end - start, extension, self.MODEL[start:end]))
        return b"".join(pieces) + b"0\r\n"

    def test_valid_requests_are_answered_however_odd(self):
        host = b"Host: 127.0.0.1"
        for data in (b"GET /api HTTP/1.1\r\nhoSt:\t127.0.0.1 \r\nempty:\r\n\r\n",
                     b"\r\nGET /api HTTP/1.1\r\n" + host + b"\r\n\r\n",
                     b"GET http://localhost/api HTTP/1.1\r\n" + host + b"\r\n\r\n",
                     b"GET /api HTTP/1.0\r\nHost: localhost\r\n\r\n",
                     b"GET /api HTTP/1.9\r\nHost: localhost\r\n\r\n",
                     self.request("GET /api HTTP/1.1", "X: \t!\x80\xff ~", "X:"),
                     self.request("GET /api?" + "x" * 60_000 + " HTTP/1.1"),
                     self.request("GET /api HTTP/1.1", *(f"X{n}: y" for n in range(90)))):
            with self.subTest(data=data[:70]):
                self.assertStatuses(data, 200)

    def test_what_is_no_request_is_refused_and_ends_the_connection(self):
        """The request behind it would be served by whoever reads the first one in another way."""
        for status, data in (
                (400, b"GET / \r\n\r\n"), (400, b"GET /\r\n\r\n"), (400, b"GET\r\n\r\n"),
                (400, self.request("GET  /api HTTP/1.1")), (400, self.request("GET /a b HTTP/1.1")),
                (400, self.request(" GET /api HTTP/1.1")), (400, self.request("G,T /api HTTP/1.1")),
                (400, self.request("Extra lineGET /api HTTP/1.1")),
                (400, self.request("GET /api HTTP/x")), (400, self.request("GET /api http/1.1")),
                (400, self.request("GET /api HTTP/1.1 ")), (400, self.request("GET /\0 HTTP/1.1")),
                (400, self.request("GET /api HTTP/1.10")), (505, self.request("GET / HTTP/9.9")),
                (505, self.request("GET /api HTTP/2.0")), (505, self.request("GET / HTTP/0.9")),
                (400, self.request(host=None)), (400, self.request(host="a b")),
                (400, self.request(host="user@localhost")), (400, self.request(host="localhost/x")),
                (400, self.request("Host: 127.0.0.1")),
                *((400, self.request("GET /api HTTP/1.1", fields)) for fields in (
                    "Host: localhost", "X-Invalid[]: y", "X : y", " X: y", "X: y\r\n folded",
                    "X: y\rZ: y", "X: y\nZ: y", "X: \0", "X: \x07", "X: \x7f", "no colon", ": y",
                    "\rX: y", "X\xe9: y", "Content-Length: -123456789123456789123456789",
                    "Content-Length: -1234", "Content-Length: abc", "Content-Length:",
                    "Content-Length: 5, 5", "Content-Length: " + "9" * 5000)),
                (400, self.request().replace(b"\r\n", b"\n")),
                (400, self.request().replace(b"\r\n\r\n", b"\r\n\n")),
                (400, self.request().replace(b"\r\n\r\n", b"\r\n\rX: y\r\n\r\n")),
                (400, self.request("GET /api?" + "&".join(f"{n}=x" for n in range(200)) +
                                   " HTTP/1.1", "Connection: close")),
                (414, b"GET /" + b"x" * 70_000), (431, self.request("GET /api HTTP/1.1",
                                                                   "X: " + "y" * 70_000)),
                (431, self.request("GET /api HTTP/1.1", *["X: y"] * 200))):
            with self.subTest(data=data[:80]):
                answer = self.assertStatuses(data + self.request(), status)
                self.assertIn(b"\r\nConnection: close\r\n", answer)

    def test_what_is_remembered_of_requests_is_short(self):
        handler = minijupyter.HANDLERS[-1]
        for function in (handler.split_target, handler.routes_at):
            for length, same in ((100, True), (1 << 16, False)):
                text = "/" + "x" * length
                self.assertEqual(function(text) is function(text), same)

    def test_a_request_is_waited_for_wherever_it_is_cut(self):
        whole = self.request("GET /api HTTP/1.1", "Connection: close")
        for at in range(1, len(whole)):
            raw = self.connect(whole[:at])
            raw.sendall(whole[at:])
            self.assertTrue(raw.recv(1000).startswith(b"HTTP/1.1 200 OK"), whole[:at])
            raw.close()

    def test_requests_may_come_before_the_answers(self):
        three = self.request() + self.put(f"Content-Length: {len(self.MODEL)}", body=self.MODEL)
        self.assertRegex(self.ask(three + self.request("HEAD /api HTTP/1.1") + self.request()),
                         rb"(?s)\AHTTP/1.1 200 .*}HTTP/1.1 20[01] .*}HTTP/1.1 200 .*\r\n\r\n"
                         rb"HTTP/1.1 200 .*}\Z")

    def test_an_old_client_says_whether_it_stays(self):
        asked = b"GET /api HTTP/1.0\r\nHost: localhost\r\n"
        self.assertStatuses(asked + b"\r\n" + self.request(), 200)
        answer = self.assertStatuses(asked + b"Connection: Keep-Alive\r\n\r\n" + self.request(),
                                     200, 200)
        self.assertIn(b"\r\nConnection: keep-alive\r\n", answer)

    def test_a_body_may_come_in_chunks_with_extensions_and_trailers(self):   # RFC 9112 7.1
        fields = "TransFer-Encoding: Chunked"
        for body in (self.chunks() + b"\r\n", self.chunks(1, 2, 30) + b"\r\n",
                     self.chunks(*[1] * 20) + b"Trailer: x\r\nAnother:\r\n\r\n",
                     self.chunks(9, extension=b';a=1; b="c;d"') + b"\r\n",
                     self.chunks(9, extension=b" ;x").replace(b"9", b"009") + b"\r\n"):
            with self.subTest(body=body):
                self.assertRegex(self.ask(self.put(fields, body=body) + self.request()),
                                 rb"(?s)\AHTTP/1.1 20[01] .*}HTTP/1.1 200 ")
                self.assertEqual((self.root / "x.txt").read_text(), "HellO world1")
        empty = self.request("POST /api/contents HTTP/1.1", fields, body=b"0\r\n\r\n")
        self.assertStatuses(empty + self.request(), 201, 200)   # as tornado sends no body
        refused = self.put(fields, body=self.chunks(1) + b"\r\n").replace(b"token ", b"x ")
        self.assertStatuses(refused + self.request(), 403, 200)

    def test_chunks_that_could_be_read_in_two_ways_are_refused(self):
        model = self.chunks(5)
        for status, body in (
                (400, b"\r\n\r\n"), (400, b"x\r\n"), (400, b"-1\r\n"), (400, b"0x5\r\nabcde\r\n"),
                (400, b"5\nabcde\r\n"), (400, b"5\r\nabcdefg\r\n0\r\n\r\n"), (400, b" 5\r\nabcde"),
                (400, b"5\r\nabcde\n0\r\n\r\n"), (400, b"5;a=\0\r\n"), (400, b"5 5\r\n"),
                (400, b"1" * 5000), (400, b"5;" + b"x" * 5000), (400, model + b"X : y\r\n\r\n"),
                (400, model + b" folded\r\n\r\n"), (400, model + b"X: y\n\r\n"),
                (413, b"fffffffff\r\n"), (431, model + b"X: y\r\n" * 101)):
            with self.subTest(body=body[:60]):
                asked = self.put("Transfer-Encoding: chunked", body=body)
                self.assertStatuses(asked + self.request(), status)
        for status, fields in ((400, ["Content-Length: 5"]), (501, ["Transfer-Encoding: gzip"]),
                               (501, ["Transfer-Encoding: chunked"])):
            asked = self.put("transfer-encoding: chunked", *fields, body=model + b"\r\n")
            self.assertStatuses(asked + self.request(), status)
        self.assertStatuses(self.put("Transfer-Encoding: chunked", body=model).replace(
            b"HTTP/1.1", b"HTTP/1.0"), 400)

    def test_a_stranger_has_no_larger_body_in_chunks_than_in_one(self):
        form = self.request("POST /login HTTP/1.1", "Transfer-Encoding: chunked",
                            body=b"8000\r\n%b\r\n" % (b"x" * 0x8000) * 4 + b"0\r\n\r\n")
        self.assertStatuses(form, 413)

    def test_a_client_that_asks_before_it_sends_its_body_is_told_to_at_once(self):
        fields = (f"Content-Length: {len(self.MODEL)}", "Expect: 100-continue")
        raw = self.connect(self.put(*fields, name="asked.txt"))
        self.assertEqual(raw.recv(1000), b"HTTP/1.1 100 Continue\r\n\r\n")
        raw.sendall(self.MODEL)
        self.assertRegex(raw.recv(1000), rb"^HTTP/1.1 201 ")
        self.assertStatuses(self.request("GET /api HTTP/1.1", "Expect: 100-continue"), 200)

    def test_a_client_that_asks_first_gets_its_refusal_and_sends_no_body(self):
        length, expect = f"Content-Length: {len(self.MODEL)}", "Expect: 100-Continue"
        for status, asked in (
                (403, self.put(length, expect).replace(b"token ", b"x ")),
                (404, self.request("PUT /api/nothing HTTP/1.1", length, expect)),
                (413, self.put(f"Content-Length: {2 << 30}", expect))):
            answer = self.assertStatuses(asked, status)
            self.assertIn(b"\r\nConnection: close\r\n", answer)

    @needs_programs("curl")
    def test_curl_uploads_without_waiting(self):
        large = json.dumps({"type": "file", "format": "text", "content": "x" * 2_000_000}).encode()
        for fields in ([], ["-H", "Transfer-Encoding: chunked"]):
            seconds = subprocess.run(
                ["curl", "-sS", "-X", "PUT", "--data-binary", "@-", "-H", "Expect: 100-continue",
                 "-H", f"Authorization: token {self.server.token}", *fields, "-o", os.devnull,
                 "-w", "%{time_total} %{http_code}", "--expect100-timeout", "15",
                 f"http://127.0.0.1:{self.server.port}/api/contents/curl.txt"],
                input=large, capture_output=True, check=True).stdout.split()
            self.assertLess(float(seconds[0]), 10)
            self.assertIn(seconds[1], (b"200", b"201"))

    @needs("tornado")
    def test_tornados_client_sends_bodies_of_any_kind_and_none(self):
        from tornado.httpclient import HTTPClient
        client, contents = HTTPClient(), f"http://127.0.0.1:{self.server.port}/api/contents"
        self.addCleanup(client.close)
        for method, path, options in (
                ("POST", "", {"allow_nonstandard_methods": True}),    # no body: in no chunk
                ("PUT", "/x.txt", {"body_producer": lambda write: write(self.MODEL)}),
                ("PUT", "/x.txt", {"body": self.MODEL, "expect_100_continue": True})):
            reply = client.fetch(contents + path, method=method, headers={
                "Authorization": f"token {self.server.token}"}, **options)
            self.assertIn(reply.code, (200, 201))

    def test_an_answer_cannot_be_split_by_what_stands_in_a_header(self):
        split = {"X": "y\r\nSet-Cookie: a=b"}
        server = self.here()
        with unittest.mock.patch.object(
                minijupyter.Handler, "list_kernels",
                lambda self: self.send(200, b"", "text/plain", split)
                ), contextlib.redirect_stderr(io.StringIO()):
            client = http.client.HTTPConnection(*server.server_address, timeout=SECONDS)
            self.addCleanup(client.close)
            client.request("GET", "/api/kernels", headers={"Authorization": "token secret"})
            reply = Reply(client.getresponse())
        self.assertEqual((reply.status, reply.headers["Set-Cookie"]), (500, None))

    def test_a_refusal_reaches_a_client_that_is_still_sending(self):
        asked = self.put(f"Content-Length: {2 << 30}", body=b"x" * 4_000_000)
        self.assertStatuses(asked, 413)

    def drip(self, raw, data, size=1):
        """Send piece by piece; True when all has been sent, False when the server has hung up."""
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(data), size):
                if select.select([raw], [], [], 0.01)[0]:
                    return False
                raw.sendall(data[at:at + size])
            return True

    def test_a_request_that_drips_is_given_up_and_a_slow_one_is_not(self):
        head = b"PUT /api/contents/x.txt HTTP/1.1\r\nHost: localhost\r\nAuthorization: token " \
               b"secret\r\nContent-Length: %d\r\n\r\n"
        model = json.dumps({"type": "file", "format": "text", "content": "x" * 20_000}).encode()
        limits = {"HEAD_SECONDS": 0.3, "BODY_SECONDS": 0.3, "SLOWEST": 1_000}
        with unittest.mock.patch.multiple(minijupyter, **limits):
            server = self.here()
            for first, slow in ((b"", head * 5), (b"GET /api HTTP/1.1\r\n", b"X: y\r\n" * 90),
                                (head % len(model), model)):
                with socket.create_connection(server.server_address, SECONDS) as raw:
                    raw.sendall(first)
                    self.assertFalse(self.drip(raw, slow))
            with socket.create_connection(server.server_address, SECONDS) as raw:
                raw.sendall(head % len(model))
                self.assertTrue(self.drip(raw, model, 200))   # takes longer than BODY_SECONDS
                self.assertRegex(raw.recv(1000), rb"^HTTP/1.1 201 ")

    def test_the_log_commands_no_terminal(self):
        loud = self.own_server(options=["--port", free_ports(1)[0], "--log-level", "info"])
        for path in ("/\x9b31m", "/\u2028\u202e", "/\x85"):
            with socket.create_connection(("127.0.0.1", loud.port), SECONDS) as raw:
                raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                self.assertRegex(raw.recv(1000), rb"^HTTP/1.1 404 ")
        loud.process.wait_for(r"404 GET /\\x9b31m\n404 GET /\\u2028\\u202e\n404 GET /\\x85\n")


class Access(ServerCase):
    ENDPOINTS = [("GET", "/api/contents"), ("PUT", "/api/contents/x"), ("POST", "/api/contents"),
                 ("PATCH", "/api/contents/x"), ("DELETE", "/api/contents/x"),
                 ("GET", "/api/kernels"), ("POST", "/api/kernels"), ("GET", "/api/kernelspecs"),
                 ("GET", "/api/sessions"), ("POST", "/api/sessions"), ("GET", "/files/x")]

    def status(self, method, path, **headers):
        return self.server.request(method, path, "{}", headers).status

    def test_without_the_token_nothing_is_served(self):
        wrong = (None, "token wrong", "Bearer wrong", self.server.token, "token", "token ",
                 f"token {self.server.token}x", "Basic " + self.server.token)
        for method, path in self.ENDPOINTS:
            for authorization in wrong:
                with self.subTest(f"{method} {path}", authorization=authorization):
                    self.assertEqual(self.status(method, path, Authorization=authorization), 403)

    def test_a_refusal_says_why(self):
        self.assertReply(self.server.get("/api/contents", Authorization=None), 403)

    def test_the_token_is_taken_from_header_and_query(self):
        token = self.server.token
        for authorization in (f"token {token}", f"Bearer {token}"):
            self.assertEqual(self.status("GET", "/api/kernels", Authorization=authorization), 200)
        reply = self.server.get(f"/api/kernels?token={token}", Authorization=None)
        self.assertEqual(reply.status, 200)

    def test_a_page_without_the_token_is_not_served(self):
        for path in ("/", "/tree", "/notebooks/x.ipynb"):
            self.assertIn(self.server.get(path, Authorization=None).status, (302, 401, 403))

    def test_a_foreign_host_name_is_refused_even_with_the_token(self):
        for host in ("evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil",
                     f"evil.example:{self.server.port}"):
            with self.subTest(host):
                self.assertEqual(self.status("GET", "/api/kernels", Host=host), 403)

    def test_every_name_of_the_loopback_interface_is_accepted(self):
        for host in (f"localhost:{self.server.port}", f"127.0.0.1:{self.server.port}"):
            self.assertEqual(self.status("GET", "/api/kernels", Host=host), 200)

    def cookie(self):
        """What a browser keeps after it has opened the printed address."""
        reply = self.server.get(f"/tree?token={self.server.token}", Authorization=None)
        self.assertEqual((reply.status, reply.headers["Location"]), (302, "/tree"))
        return reply.headers["Set-Cookie"]

    def test_the_token_in_the_address_becomes_a_cookie(self):
        cookie = self.cookie()
        self.assertIn("; HttpOnly", cookie)
        self.assertRegex(cookie, "; SameSite=(Strict|Lax)")
        self.assertNotIn(self.server.token, cookie)
        self.assertEqual(self.status("GET", "/api/kernels", Cookie=cookie.partition(";")[0],
                                     Authorization=None), 200)

    def test_another_site_may_change_nothing_with_our_cookie(self):
        cookie, port = self.cookie().partition(";")[0], self.server.port
        for origin in ("http://evil.example", "null", "http://localhost:1",
                       f"http://127.0.0.1:{port}.evil.example", f"http://evil127.0.0.1:{port}"):
            for method, path in (("POST", "/api/kernels"), ("PUT", "/api/contents/x"),
                                 ("DELETE", "/api/contents/x")):
                with self.subTest(f"{method} from {origin}"):
                    self.assertEqual(self.status(method, path, Origin=origin, Cookie=cookie,
                                                 Authorization=None), 403)
        self.assertEqual(self.server.get("/api/kernels").json, [])

    def test_our_page_may_change_what_it_likes_with_its_cookie(self):
        host = f"127.0.0.1:{self.server.port}"
        reply = self.server.put(
            "/api/contents/own.txt", {"type": "file", "format": "text", "content": ""},
            Origin=f"http://{host}", Cookie=self.cookie().partition(";")[0], Authorization=None)
        self.assertEqual(reply.status, 201)

    def test_a_forged_cookie_opens_nothing(self):
        name = self.cookie().partition("=")[0]
        for value in ("", "0", "0" * 64, self.server.token):
            self.assertEqual(self.status("GET", "/api/kernels", Cookie=f"{name}={value}",
                                         Authorization=None), 403)

    def test_the_token_is_not_written_to_the_log(self):
        self.server.get(f"/api/kernels?token={self.server.token}")
        first_screen = self.server.process.output.count(self.server.token)
        self.server.get(f"/api/nothing?token={self.server.token}")
        self.assertEqual(self.server.process.output.count(self.server.token), first_screen)


ODD_TOKENS = ("a b", "100% &more=#?/x", "a+b", "é", "Ünï \u20ac \U0001f511 ключ", "\"'<>\\",
              "%41%2B", "x" * 200, "token;, =")


class OddTokens(ServerCase):
    """A token may have any printable characters, and opens the server by every way in."""

    def with_token(self, token, *options):
        server = self.own_server(options=["--port", free_ports(1)[0], "--token", token, *options])
        server.token = token
        return server

    def test_it_is_taken_from_address_header_form_and_cookie(self):
        for token in ODD_TOKENS:
            with self.subTest(token):
                self.check_ways_in(self.with_token(token), token)

    def check_ways_in(self, server, token):
        headers = [f"token {token}".encode()]
        with contextlib.suppress(UnicodeEncodeError):
            headers.append(f"Bearer {token}".encode("latin-1"))
        for header in headers:
            self.assertEqual(server.get("/api/kernels", Authorization=header).status, 200)
        printed = server.process.wait_for(r"http://[^/]+(/\S*)")[1]
        for address in (printed, f"/tree?token={quote(token, safe='')}",
                        f"/tree?token={quote_plus(token)}"):
            reply = server.get(address, Authorization=None)
            self.assertEqual((reply.status, reply.headers["Location"]), (302, "/tree"))
        form = urlencode({"password": token, "_xsrf": "x"})
        login = server.request("POST", "/login", form, {
            "Authorization": None, "Cookie": "_xsrf=x",
            "Content-Type": "application/x-www-form-urlencoded"})
        for opened in (reply, login):
            cookie = opened.headers["Set-Cookie"].partition(";")[0]
            reply = server.get("/api/kernels", Authorization=None, Cookie=cookie)
            self.assertEqual(reply.status, 200)
        self.assertEqual(server.get("/api/kernels", Authorization="token x").status, 403)

    def test_it_is_found_by_list_and_stop(self):
        server = self.own_server(options=["--port", free_ports(1)[0], "--token", ODD_TOKENS[4]])
        env = clean_environment(server.folder.name)
        command = [sys.executable, HERE / "minijupyter.py"]
        shown = subprocess.run([*command, "list"], env=env, capture_output=True, text=True).stdout
        self.assertIn(f"?token={quote(ODD_TOKENS[4])} ::", shown)
        stopped = subprocess.run([*command, "stop"], env=env, capture_output=True)
        self.assertEqual(stopped.returncode, 0)

    def test_it_is_known_however_it_is_spelled(self):
        for token in ODD_TOKENS:
            pattern = minijupyter.spellings(token)
            spelled = [token.encode(), quote(token).encode(), quote(token, safe="").encode(),
                       quote_plus(token).encode(), quote(quote(token)).encode(),
                       re.sub("%..", lambda match: match[0].lower(), quote(token)).encode(),
                       json.dumps(token)[1:-1].encode(),
                       json.dumps(token, ensure_ascii=False)[1:-1].encode(),
                       escape(token).encode(), token.encode("latin-1", "ignore")]
            for text in spelled[:9 + token.isascii()]:
                with self.subTest(token, text=text):
                    self.assertEqual(pattern.sub(b"*", b"(" + text + b")"), b"(*)")
            self.assertIsNone(pattern.search(b"What is no secret stays: 50% <b>, a  b"))

    def test_it_is_in_no_line_of_the_log(self):
        for token in ODD_TOKENS:
            loud, once = self.with_token(token, "--log-level", "debug"), quote(token, safe="")
            for path in (f"/api?token={once}", f"/tree/{once}", f"/tree%3Ftoken={quote(once)}"):
                loud.get(path, Authorization=None)
            lines = loud.process.wait_for(r"(?s)\n200 GET .*\n404 GET \S+\n")[0]
            for text in (token, quote(token), once, quote(once)):
                with self.subTest(token, text=text):
                    self.assertNotIn(text, lines)



class Login(ServerCase):
    """A password, or the token, is exchanged for a cookie at /login."""

    @classmethod
    def setUpClass(cls):
        cls.hash = minijupyter.hash_password("correct horse")
        cls.options = {"options": ["--port", free_ports(1)[0], "--password", cls.hash]}
        super().setUpClass()

    @property
    def origin(self):
        return f"http://127.0.0.1:{self.server.port}"

    def form(self, password, next="", xsrf="x" * 32, cookie=None, path="/login", **headers):
        body = f"password={quote(password)}&next={quote(next, safe='')}&_xsrf={xsrf}"
        cookie = f"_xsrf={xsrf}" if cookie is None else cookie
        return self.server.request("POST", path, body, {
            "Authorization": None, "Cookie": cookie,
            "Content-Type": "application/x-www-form-urlencoded", **headers})

    def login(self):
        return self.form("correct horse").headers["Set-Cookie"].partition(";")[0]

    def test_a_page_without_a_cookie_leads_to_the_login_and_back(self):
        reply = self.server.get("/notebooks/a%20b.ipynb?x=1", Authorization=None)
        self.assertEqual(reply.status, 302)
        self.assertEqual(reply.headers["Location"],
                         "/login?next=/notebooks/a%2520b.ipynb%3Fx%3D1")
        page = self.server.get(reply.headers["Location"], Authorization=None)
        self.assertIn('value="/notebooks/a%20b.ipynb?x=1"', page.body.decode())
        reply = self.form("correct horse", "/notebooks/a%20b.ipynb?x=1")
        self.assertEqual((reply.status, reply.headers["Location"]),
                         (302, "/notebooks/a%20b.ipynb?x=1"))

    def test_password_and_token_are_let_in_and_nothing_else(self):
        for password, status in (("correct horse", 302), (self.server.token, 302), ("", 401),
                                 ("wrong", 401), (self.hash, 401), ("correct horse ", 401)):
            with self.subTest(password):
                reply = self.form(password)
                self.assertEqual(reply.status, status, reply)
                self.assertEqual("minijupyter-" in reply.headers["Set-Cookie"], status == 302)

    def test_a_password_is_taken_by_the_form_alone(self):
        """To check a guess takes 50 ms; a notebook's pictures could make thousands of them."""
        for path, header in (("/api/kernels?token=correct%20horse", None),
                             ("/api/kernels", "token correct horse")):
            self.assertEqual(self.server.get(path, Authorization=header).status, 403)

    def test_the_cookie_opens_pages_and_api_until_the_logout(self):
        cookie = self.login()
        for path in ("/tree", "/api/kernels"):
            reply = self.server.get(path, Authorization=None, Cookie=cookie)
            self.assertEqual(reply.status, 200)
        reply = self.form("", cookie=cookie, path="/logout", Origin=self.origin)
        self.assertEqual((reply.status, reply.headers["Location"]), (302, "/login"))
        self.assertIn("Max-Age=0", reply.headers["Set-Cookie"])

    def test_no_picture_and_no_other_site_logs_a_reader_out(self):
        cookie, xsrf = self.login(), "x" * 32

        def is_out(method, **headers):
            reply = self.server.request(method, "/logout", headers={
                "Authorization": None, "Cookie": f"{cookie}; _xsrf={xsrf}", **headers})
            return reply.status == 302 and "minijupyter-" in reply.headers["Set-Cookie"]

        def purpose(dest, mode, site):
            return {"Sec-Fetch-Dest": dest, "Sec-Fetch-Mode": mode, "Sec-Fetch-Site": site}

        for headers in ({}, purpose("image", "no-cors", "same-origin"),
                        purpose("iframe", "navigate", "same-origin"),
                        purpose("document", "navigate", "cross-site"),
                        purpose("empty", "cors", "same-origin")):
            self.assertFalse(is_out("GET", **headers), headers)
        for headers in ({}, {"Origin": "null"}, {"Origin": "http://evil.example"},
                        {"Sec-Fetch-Site": "cross-site"}):
            self.assertFalse(is_out("POST", **headers), headers)
        self.assertTrue(is_out("GET", **purpose("document", "navigate", "same-origin")))
        self.assertTrue(is_out("GET", **purpose("document", "navigate", "none")))
        self.assertTrue(is_out("POST", **{"X-XSRFToken": xsrf}))

    def test_who_is_asked_before_the_logout_confirms_it_by_a_button(self):
        page = self.server.get("/logout", Authorization=None, Cookie=self.login())
        self.assertIn('<form method="post" action="/logout">', page.body.decode())
        xsrf = re.search("_xsrf=([^;]+)", page.headers["Set-Cookie"])[1]
        reply = self.form("", xsrf=xsrf, path="/logout")
        self.assertEqual((reply.status, reply.headers["Location"]), (302, "/login"))

    def test_a_login_that_another_site_sends_is_refused(self):
        self.assertEqual(self.form("correct horse", cookie="").status, 403)
        self.assertEqual(self.form("correct horse", cookie="_xsrf=" + "y" * 32).status, 403)

    def test_a_login_leads_nowhere_else(self):   # CVE-2019-10255 and its many successors
        for next in ("//evil.example", "https://evil.example", "/\\evil.example",
                     "\\\\evil.example", "///evil.example", "https:///evil.example",
                     "http:evil.example",
                     "\t//evil.example", "/\t/evil.example", "javascript:alert(1)", "evil.example",
                     "/tree\r\nSet-Cookie: a=b", "%2f%2fevil.example"):
            with self.subTest(next):
                reply = self.form("correct horse", next)
                self.assertEqual((reply.status, reply.headers["Location"]), (302, "/tree"))

    def test_slashes_and_backslashes_in_a_path_lead_nowhere_else(self):
        for path in ("//evil.example/", "//evil.example/..", "/\\evil.example/", "///evil.example",
                     "/%2fevil.example/", "/tree//evil.example/"):
            with self.subTest(path):
                reply = self.server.get(path + f"?token={self.server.token}", Authorization=None)
                self.assertRegex(reply.headers["Location"] or "/", r"^/(?![/\\])")

    def test_jupyters_clients_repeat_the_xsrf_cookie_instead_of_an_origin(self):
        page = self.server.get("/login", Authorization=None)
        xsrf = re.search("_xsrf=([^;]+)", page.headers["Set-Cookie"])[1]
        cookie = f"{self.login()}; _xsrf={xsrf}"
        for token, status in ((xsrf, 201), ("0" * 32, 403), (None, 403)):
            reply = self.server.request("POST", "/api/contents", "{}", {
                "Authorization": None, "Cookie": cookie, "X-XSRFToken": token})
            self.assertEqual(reply.status, status, token)

    def test_a_new_password_shuts_out_who_was_let_in_by_the_old_one(self):   # CVE-2026-40934
        access = minijupyter.ACCESS[-1]("token", "127.0.0.1", 1)
        cookies = {access.cookie_value}
        for hash in (self.hash, minijupyter.hash_password("correct horse")):
            access.add_key(minijupyter.Password(hash).opens, hash)
            cookies.add(access.cookie_value)
        self.assertEqual(len(cookies), 3)

    def test_a_large_form_from_a_stranger_is_not_read(self):
        reply = self.form("x" * 100_000)
        self.assertEqual(reply.status, 413)

    def test_the_password_is_never_given_in_the_open(self):
        process = Process([sys.executable, HERE / "minijupyter.py", "--password", "geheim"])
        self.addCleanup(process.end)
        self.assertEqual(process.exit_code(), 2)
        self.assertIn("minijupyter.py password", process.output)
        made = subprocess.run([sys.executable, HERE / "minijupyter.py", "password"], check=True,
                              input="geheim\n", capture_output=True, text=True).stdout.strip()
        self.assertTrue(minijupyter.Password(made).opens("geheim"))
        self.assertFalse(minijupyter.Password(made).opens("Geheim"))


class Config(ServerCase):
    """Settings that Jupyter's frontends keep with the server."""

    def test_a_section_is_empty_then_set_then_merged(self):
        path = "/api/config/notebook"
        self.assertEqual(self.server.get(path).json, {})
        self.assertReply(self.server.put(path, {"a": {"b": 1, "c": 2}, "d": 3}), 204)
        merged = self.server.patch(path, {"a": {"b": None, "e": 4}, "d": None, "f": {"g": 5}})
        self.assertEqual(merged.json, {"a": {"c": 2, "e": 4}, "f": {"g": 5}})
        self.assertEqual(self.server.get(path).json, merged.json)

    @needs("jupyter_server")
    def test_values_are_merged_as_in_jupyter(self):
        from jupyter_server.config_manager import recursive_update
        for old, new in (
                ({}, {}), ({"a": 1}, {"a": None}), ({}, {"a": None}), ({}, {"a": {"b": None}}),
                ({"a": {"b": 1}}, {"a": {"b": None}}), ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}),
                ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": None}}}), ({"a": {"b": 1}}, {"a": {}}),
                ({"a": {}}, {"a": {}}), ({"a": [1, {"b": 2}]}, {"a": [{"b": None}]}),
                ({"a": {"b": 1}}, {"a": 2}), ({"z": 1, "a": 2}, {"m": 3, "z": 4})):
            with self.subTest(old=old, new=new):
                expected = json.loads(json.dumps(old))
                recursive_update(expected, new)
                merged = minijupyter.merge(old, new)
                self.assertEqual(list(merged.items()), list(expected.items()))

    def test_damaged_or_endless_settings_are_refused_in_words(self):
        folder = Path(self.server.folder.name) / "jupyter_config_dir" / "serverconfig"
        folder.mkdir(parents=True, exist_ok=True)
        for text in ("{", "[]", "null", "[" * 100_000):
            (folder / "damaged.json").write_text(text)
            with self.subTest(text[:9]):
                self.assertReply(self.server.get("/api/config/damaged"), 400)
                self.assertReply(self.server.patch("/api/config/damaged", {"a": 1}), 400)
        deep = '{"a":' * 990 + "1" + "}" * 990
        for method in ("PUT", "PATCH"):
            reply = self.server.request(method, "/api/config/deep", deep)
            self.assertIn(reply.status, (200, 204, 400))

    def test_jupyter_server_and_ours_keep_the_same_files(self):
        self.assertReply(self.server.put("/api/config/shared", {"a": 1}), 204)
        folder = Path(self.server.folder.name) / "jupyter_config_dir" / "serverconfig"
        self.assertEqual(json.loads((folder / "shared.json").read_text()), {"a": 1})

    def test_what_is_no_object_or_no_section_is_refused(self):
        self.assertReply(self.server.put("/api/config/notebook", "[]"), 400)
        for section in ("..%2f..%2fx", "..", "a%2fb"):
            self.assertIn(self.server.put(f"/api/config/{section}", {"a": 1}).status, (204, 404))
        outside = Path(self.server.folder.name).parent / "x.json"
        self.assertFalse(outside.exists())


class BaseUrl(ServerCase):
    """A server below a path, as behind a proxy."""

    @classmethod
    def setUpClass(cls):
        cls.options = {"options": ["--port", free_ports(1)[0], "--base-url", "user/ada"]}
        super().setUpClass()

    def test_everything_is_below_the_path_and_nothing_beside_it(self):
        self.assertIn("/user/ada/tree?token=", self.server.url[0])
        for path, status in (("/user/ada/api", 200), ("/user/ada/api/kernels", 200),
                             ("/api", 404), ("/user/adam/api", 404), ("/user/ada", 302),
                             ("/user/ada/tree", 200), ("/", 404)):
            with self.subTest(path):
                self.assertEqual(self.server.get(path).status, status)

    def test_addresses_in_replies_have_the_path(self):
        made = self.server.post("/user/ada/api/contents", {})
        self.assertEqual(made.headers["Location"], "/user/ada/api/contents/untitled")
        moved = self.server.get(f"/user/ada/tree?token={self.server.token}", Authorization=None)
        self.assertEqual(moved.headers["Location"], "/user/ada/tree")
        self.assertIn("; Path=/user/ada/;", moved.headers["Set-Cookie"])
        asked = self.server.get("/user/ada/tree", Authorization=None)
        self.assertEqual(asked.headers["Location"], "/user/ada/login?next=/user/ada/tree")


class Tls(ServerCase):
    """https and wss by the standard library, with a certificate made for the test."""

    @classmethod
    def setUpClass(cls):
        if not shutil.which("openssl"):
            raise unittest.SkipTest("needs openssl")
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.certificate = Path(folder.name, "cert.pem")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
                        "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
                        "-keyout", cls.certificate, "-out", Path(folder.name, "public.pem")],
                       check=True, capture_output=True)
        public = Path(folder.name, "public.pem").read_text()
        cls.certificate.write_text(cls.certificate.read_text() + public)
        cls.context = ssl.create_default_context(cafile=Path(folder.name, "public.pem"))
        cls.options = {"options": ["--port", free_ports(1)[0], "--certfile", cls.certificate]}
        super().setUpClass()

    def request(self, method, path, body=None, **headers):
        connection = http.client.HTTPSConnection("127.0.0.1", self.server.port, timeout=SECONDS,
                                                 context=self.context)
        self.addCleanup(connection.close)
        return self.server.request(method, path, body, headers, connection)

    def test_requests_are_answered_and_cookies_are_secure(self):
        self.assertTrue(self.server.url[0].startswith("https://"))
        self.assertEqual(self.request("GET", "/api/kernels").status, 200)
        moved = self.request("GET", f"/tree?token={self.server.token}", Authorization=None)
        self.assertIn("; Secure", moved.headers["Set-Cookie"])

    @needs("websockets")
    def test_a_cell_runs_over_wss_with_large_messages_both_ways(self):
        from websockets.sync.client import connect
        kernel_id = self.request("POST", "/api/kernels", {}).json["id"]
        with connect(f"wss://127.0.0.1:{self.server.port}/api/kernels/{kernel_id}/channels",
                     additional_headers={"Authorization": f"token {self.server.token}"},
                     ssl=self.context, max_size=None) as client:
            code = f"text = {'x' * 3_000_000!r}; print(text); len(text)"
            message = kernel.Session("").message("execute_request", {"code": code})
            client.send(json.dumps({**message, "channel": "shell"}))
            result = ""
            while "3000000" not in result:
                heard = json.loads(client.recv(timeout=SECONDS))
                if heard["msg_type"] == "execute_result":
                    result = heard["content"]["data"]["text/plain"]
        self.assertEqual(self.request("DELETE", f"/api/kernels/{kernel_id}").status, 204)

    def test_who_does_not_speak_tls_or_stalls_hurts_nobody(self):
        with socket.create_connection(("127.0.0.1", self.server.port), SECONDS) as silent, \
                socket.create_connection(("127.0.0.1", self.server.port), SECONDS) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            self.assertEqual(self.request("GET", "/api").status, 200)
            silent.close()

    def test_a_stranger_on_tls_is_cut_off_like_any_other(self):
        server = self.own_server(
            options=["--port", free_ports(1)[0], "--certfile", self.certificate],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48)))
        for number in range(60):
            raw = self.enterContext(socket.create_connection(("127.0.0.1", server.port), SECONDS))
            if number % 2:
                self.enterContext(self.context.wrap_socket(raw, server_hostname="127.0.0.1"))
        client = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=SECONDS,
                                             context=self.context)
        self.addCleanup(client.close)
        self.assertEqual(server.request("GET", "/api/kernels", connection=client).status, 200)
        self.assertNotIn("failed", server.process.output)

    def test_a_missing_certificate_is_an_error_in_one_line(self):
        process = Process([sys.executable, HERE / "minijupyter.py", "--certfile", "/no/such.pem",
                           "--no-browser"])
        self.addCleanup(process.end)
        self.assertEqual((process.exit_code(), len(process.lines)), (1, 1))
        self.assertIn("/no/such.pem", process.output)


class Kernels(ServerCase):
    def test_the_built_in_kernel_is_the_default_python3(self):
        specs = self.server.get("/api/kernelspecs").json
        self.assertEqual(specs["default"], "python3")
        spec = specs["kernelspecs"]["python3"]["spec"]
        self.assertEqual(spec["language"], "python")
        self.assertIn("{connection_file}", " ".join(spec["argv"]))

    def test_a_kernel_is_started_listed_and_shut_down(self):
        kernel_id, _, pid = self.start_kernel()
        model = self.server.get(f"/api/kernels/{kernel_id}").json
        self.assertEqual((model["id"], model["name"]), (kernel_id, "python3"))
        self.assertRegex(model["last_activity"], r"\.\d{6}Z$")
        self.assertIn(kernel_id, [m["id"] for m in self.server.get("/api/kernels").json])
        self.assertReply(self.server.delete(f"/api/kernels/{kernel_id}"), 204)
        wait_until(lambda: not is_alive(pid))
        self.assertReply(self.server.get(f"/api/kernels/{kernel_id}"), 404)

    def test_a_started_kernel_becomes_idle(self):
        for _ in range(5):
            kernel_id = self.server.post("/api/kernels", {}).json["id"]
            self.addCleanup(self.server.delete, f"/api/kernels/{kernel_id}")
            self.server.frontend(kernel_id).wire.close()
            wait_until(lambda path=f"/api/kernels/{kernel_id}":
                       self.server.get(path).json["execution_state"] == "idle", 5)

    def test_the_state_of_a_kernel_follows_its_cells(self):
        kernel_id, frontend, _ = self.start_kernel()
        state = lambda: self.server.get(f"/api/kernels/{kernel_id}").json["execution_state"]  # noqa: E731
        wait_until(lambda: state() == "idle")
        cell = frontend.start("input()")
        frontend.until(lambda: cell.questions)
        wait_until(lambda: state() == "busy")
        frontend.type("")
        frontend.finish(cell)
        wait_until(lambda: state() == "idle")

    def test_interrupt_stops_a_running_cell(self):
        kernel_id, frontend, _ = self.start_kernel()
        cell = frontend.start("print('ready')\nwhile True: pass")
        frontend.until(lambda: cell.text())
        self.assertReply(self.server.post(f"/api/kernels/{kernel_id}/interrupt"), 204)
        self.assertFails(frontend.finish(cell), "KeyboardInterrupt")

    def test_restart_gives_a_new_process_under_the_same_id(self):
        kernel_id, frontend, pid = self.start_kernel()
        reply = self.assertReply(self.server.post(f"/api/kernels/{kernel_id}/restart"), 200)
        self.assertEqual(reply.json["id"], kernel_id)
        again = self.server.frontend(kernel_id)
        self.addCleanup(again.wire.close)
        cell = again.finish(again.start("import os; os.getpid()"))
        self.assertNotEqual(int(cell.result), pid)
        wait_until(lambda: not is_alive(pid))

    def test_what_comes_before_the_news_of_a_restart_does_not_reach_the_new_process(self):
        """P5."""
        kernel_id, frontend, pid = self.start_kernel()
        for _ in range(5):   # who is too late is told first, and the new process runs the cell
            restart = threading.Thread(
                target=self.server.post, args=[f"/api/kernels/{kernel_id}/restart"])
            restart.start()
            wait_until(lambda pid=pid: not is_alive(pid))
            frontend.start("late = 1")
            restart.join()
            frontend = self.server.frontend(kernel_id)
            cell = frontend.finish(frontend.start("import os; os.getpid(), 'late' in globals()"))
            pid, is_late = eval(cell.result)
            if not is_late:
                return
        self.fail("the new process has run it")

    def test_a_restart_that_was_asked_for_is_no_crash_to_other_clients(self):
        """P6. JupyterLab and VS Code tell their users of each `restarting` that the kernel died."""
        kernel_id, frontend, _ = self.start_kernel()
        page = Page(WebSocketWire(self.server, kernel_id, journal=1))
        self.addCleanup(page.wire.close)
        cell = frontend.start("print('ready')\nwhile True: pass")
        frontend.until(lambda: cell.text())
        self.assertReply(self.server.post(f"/api/kernels/{kernel_id}/restart"), 200)
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")
        self.assertNotIn("restarting", frontend.log)
        self.assertNotIn("dead", frontend.log)
        self.assertTrue(cell.is_idle)
        page.until(lambda: "restarting" in page.log)   # our own page is told, without a reason

    def test_a_kernel_whose_port_was_taken_gets_another_and_nothing_is_lost(self):
        """Of many kernels that start at once, one may take a port between another's choice and its
        use. Here its wrapper takes it, once."""
        folder = self.folder()
        thief = (f"import json, subprocess, sys, time; OURS = {OURS!r}; file = sys.argv[1]\n"
                 "taken = open(file + '.count', 'a'); taken.write('x'); taken.close()\n"
                 "if len(open(file + '.count').read()) == 1:\n"
                 "    port = json.load(open(file))['shell_port']\n"
                 "    holder = subprocess.Popen([sys.executable, '-c', f'import socket, time; s = "
                 "socket.socket(); s.bind((\"127.0.0.1\", {port})); s.listen(); time.sleep(8)'])\n"
                 "    time.sleep(0.5)\n"
                 "import os; os.execv(OURS[0], [*OURS[:-1], file])")
        install_kernelspec(folder, "late", [sys.executable, "-c", thief, "{connection_file}"])
        server = self.own_server(env={"JUPYTER_PATH": str(folder)})
        reply = self.assertReply(server.post("/api/kernels", {"name": "late"}), 201)
        frontend = Frontend(WebSocketWire(server, reply.json["id"]))
        self.addCleanup(frontend.wire.close)
        cell = frontend.finish(frontend.start("6 * 7"), seconds=60)
        self.assertEqual(cell.result, "42")
        self.assertNotIn("dead", frontend.log)

    def test_restart_works_while_a_cell_runs(self):
        kernel_id, frontend, _ = self.start_kernel()
        cell = frontend.start("print('ready')\nwhile True: pass")
        frontend.until(lambda: cell.text())
        self.assertReply(self.server.post(f"/api/kernels/{kernel_id}/restart"), 200)
        again = self.server.frontend(kernel_id)
        self.addCleanup(again.wire.close)
        self.assertEqual(again.finish(again.start("6 * 7")).result, "42")

    def test_a_kernel_that_crashes_is_started_again_and_every_frontend_is_told_why(self):
        """P6."""
        kernel_id, frontend, pid = self.start_kernel()
        other = self.server.frontend(kernel_id)
        self.addCleanup(other.wire.close)
        cell = frontend.start("print('ready'); input()")
        frontend.until(lambda: cell.questions)
        os.kill(pid, signal.SIGKILL)
        for each in (frontend, other):
            each.until(lambda each=each: "restarting" in each.log)
            (told,) = [m for m in each.unasked if word(m) == "restarting"]
            self.assertEqual(told["parent_header"], {})
            self.assertIn("signal 9", told["content"]["reason"])
        self.assertTrue(cell.is_idle)   # its end is told in the kernel's stead
        cell = frontend.finish(frontend.start("import os; print(os.getpid()); ready"))
        self.assertNotEqual(int(cell.text()), pid)
        self.assertFails(cell, "NameError")

    def test_a_page_that_hears_of_two_crashes_at_once_can_go_on(self):
        kernel_id, frontend, pid = self.start_kernel()
        other = self.server.frontend(kernel_id)
        self.addCleanup(other.wire.close)
        session = frontend.wire.session_id
        frontend.wire.close()
        for count in (1, 2):
            os.kill(pid, signal.SIGKILL)
            other.until(lambda count=count: other.log.count("restarting") == count)
            pid = int(other.finish(other.start("import os; os.getpid()")).result)
        frontend.wire = WebSocketWire(self.server, kernel_id, session)
        self.addCleanup(frontend.wire.close)
        frontend.until(lambda: frontend.log.count("restarting") == 2)
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")

    def test_what_was_sent_to_a_dying_kernel_does_not_run_in_the_next_one(self):
        """P5."""
        _, frontend, pid = self.start_kernel()
        was_sent_before_the_news = False
        while not was_sent_before_the_news:     # on a busy machine it may come too late
            frontend.start("import os; os._exit(3)")
            wait_until(lambda pid=pid: not is_alive(pid))
            late = frontend.start("lost = 1")
            ends = len(frontend.unasked)
            frontend.until(lambda ends=ends: "restarting" in map(word, frontend.unasked[ends:]))
            news = next(each for each in frontend.unasked[ends:] if word(each) == "restarting")
            was_sent_before_the_news = late.request["header"]["date"] < news["header"]["date"]
            pid = int(frontend.finish(frontend.start("import os; os.getpid()")).result)
        self.assertFails(frontend.finish(frontend.start("lost")), "NameError")
        self.assertIn(late.reply and late.status, (None, "aborted"))

    def test_a_kernel_that_keeps_crashing_is_given_up(self):
        kernel_id, frontend, _ = self.start_kernel()
        while "dead" not in frontend.log:
            frontend.start("import os; os._exit(3)")
            ends = len(frontend.unasked)
            frontend.until(lambda ends=ends: {"dead", "restarting"} & set(
                map(word, frontend.unasked[ends:])))
        self.assertEqual(frontend.log.count("restarting"), minijupyter.MOST_RESTARTS)
        model = self.server.get(f"/api/kernels/{kernel_id}").json
        self.assertEqual(model["execution_state"], "dead")
        self.assertIn("exit code 3", model["reason"])
        late = Frontend(WebSocketWire(self.server, kernel_id))
        self.addCleanup(late.wire.close)
        late.until(lambda: "dead" in late.log)
        self.assertIn("exit code 3", late.unasked[-1]["content"]["reason"])
        self.assertReply(self.server.post(f"/api/kernels/{kernel_id}/restart"), 200)
        self.assertEqual(late.finish(late.start("6 * 7")).result, "42")

    def test_a_kernel_that_cannot_be_started_again_is_told_dead(self):
        folder = self.folder()
        (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (folder / "python").chmod(0o700)
        install_kernelspec(folder, "vanishing", [str(folder / "python"), *OURS[1:]])
        server = self.own_server(env={"JUPYTER_PATH": str(folder)})
        _, frontend, pid = self.start_kernel(server, name="vanishing")
        (folder / "python").unlink()
        os.kill(pid, signal.SIGKILL)
        frontend.until(lambda: "dead" in frontend.log)
        self.assertIn("restarting", frontend.log)
        self.assertIn("cannot be started", frontend.unasked[-1]["content"]["reason"])

    def test_a_kernel_that_does_not_echo_its_heartbeat_is_reported(self):
        kernel_id, _, pid = self.start_kernel()
        path = f"/api/kernels/{kernel_id}"
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: "heartbeat" in self.server.get(path).json.get("reason", ""), 30)
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: "reason" not in self.server.get(path).json)

    def test_an_idle_kernel_that_nobody_uses_is_culled_when_asked(self):
        server = self.own_server(options=["--port", free_ports(1)[0], "--cull-idle", "1"])
        used, frontend, _ = self.start_kernel(server)
        frontend.finish(frontend.start("import time; time.sleep(2)"))
        left = self.assertReply(server.post("/api/kernels", {}), 201).json["id"]
        wait_until(lambda: server.get(f"/api/kernels/{left}").status == 404)
        self.assertEqual(server.get(f"/api/kernels/{used}").status, 200)

    @unittest.skipUnless(Path("/proc/self/fd").exists(), "no /proc tells of descriptors")
    def test_kernels_that_were_shut_down_hold_no_descriptor(self):
        server = self.own_server()
        descriptors = Path(f"/proc/{server.process.pid}/fd")

        def start_and_shut_down():
            kernel_id = server.post("/api/kernels", {}).json["id"]
            self.assertReply(server.delete(f"/api/kernels/{kernel_id}"), 204)

        start_and_shut_down()
        first = len(list(descriptors.iterdir()))
        for _ in range(4):
            start_and_shut_down()
        wait_until(lambda: len(list(descriptors.iterdir())) <= first)

    def test_a_client_may_name_a_kernel_and_pass_kernel_variables(self):
        wish = "11111111-2222-3333-4444-555555555555"
        kernel_id, frontend, _ = self.start_kernel(
            id=wish, kernel_id=wish, env={"KERNEL_USERNAME": "ada", "PATH": "/nowhere"})
        self.assertEqual(kernel_id, wish)
        cell = frontend.finish(frontend.start(
            "import os; print(os.environ['KERNEL_USERNAME'], os.environ['PATH'] == '/nowhere')"))
        self.assertEqual(cell.text(), "ada False\n")
        again = self.assertReply(self.server.post("/api/kernels", {"kernel_id": wish}), 201)
        self.assertEqual(again.json["id"], wish)
        self.assertEqual(len(self.server.get("/api/kernels").json), 1)
        self.assertReply(self.server.post("/api/kernels", {"kernel_id": "../x"}), 400)

    def test_an_unknown_kernel_name_is_refused_with_a_message(self):
        reply = self.assertReply(self.server.post("/api/kernels", {"name": "cobol"}),
                                 [400, 404, 500, 501])
        self.assertIn("cobol", reply.json["message"])

    def test_a_kernel_that_cannot_start_tells_its_stderr(self):
        folder = self.folder()
        crash = "import sys; print('no licence for this kernel', file=sys.stderr); sys.exit(3)"
        install_kernelspec(folder, "crash", [sys.executable, "-c", crash, "{connection_file}"])
        install_kernelspec(folder, "absent", ["/nowhere/no-such-program", "{connection_file}"])
        server = self.own_server(env={"JUPYTER_PATH": str(folder)})
        for name, expected in (("crash", "no licence for this kernel"),
                               ("absent", "no-such-program")):
            with self.subTest(name):
                self.assertIn(expected, self.failure(server, name))

    def failure(self, server, name):
        """What the server says of a kernel that does not come up."""
        reply = server.post("/api/kernels", {"name": name})
        if reply.status != 201:
            return self.assertReply(reply, [500, 501]).json["message"]
        path = f"/api/kernels/{reply.json['id']}"
        wait_until(lambda: server.get(path).json["execution_state"] == "dead")
        return server.get(path).json["reason"]


class KernelsFromWithin(ServerCase):
    """What must happen at one moment: the server runs in this process."""

    @classmethod
    def setUpClass(cls):
        cls.root = Path("never")

    def setUp(self):
        runtime = self.folder()
        self.enterContext(unittest.mock.patch.multiple(
            minijupyter, RUNTIME=str(runtime), SOCKETS=str(runtime / "sockets")))
        server = self.here()
        self.kernels = server.kernels
        self.address = types.SimpleNamespace(port=server.server_port, token="secret")
        self.addCleanup(self.kernels.shutdown_all)

    def start(self, *args):
        """(a new kernel, a frontend)"""
        kernel_ = self.kernels.start(*args)
        frontend = Frontend(WebSocketWire(self.address, kernel_.id))
        self.addCleanup(frontend.wire.close)
        frontend.greet()
        return kernel_, frontend

    def test_a_restart_just_after_a_crash_does_not_ask_the_new_process_to_end(self):
        kernel_, _ = self.start()
        said = []
        self.enterContext(unittest.mock.patch.object(
            minijupyter, "TAPS", [lambda kind, way, about, parts: said.extend(parts)]))
        kernel_.process.kill()
        wait_until(lambda: kernel_.process.returncode is not None)   # last words are heard now
        kernel_.restart()
        kernel_.ask("kernel_info_request", {}, SECONDS)
        self.assertNotIn(b"shutdown_request", b"".join(said))

    def test_a_restart_that_is_asked_for_while_a_crash_is_told_leaves_no_page_behind(self):
        kernel_, frontend = self.start()
        restart = threading.Thread(target=kernel_.restart)

        def press():
            if not restart.ident:
                restart.start()
                wait_until(lambda: kernel_.intent == "restart")

        kernel_.on_end.append(press)
        kernel_.process.kill()
        frontend.until(lambda: "restarting" in frontend.log)
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")
        restart.join()

    def test_who_has_seen_its_cell_end_with_the_process_may_ask_the_next_at_once(self):
        kernel_, _ = self.start()
        page = Page(WebSocketWire(self.address, kernel_.id, journal=1))
        self.addCleanup(page.wire.close)
        cell, has_asked = page.start("print('ready'); input()", cell="a"), threading.Event()
        page.until(lambda: cell.questions)
        kernel_.on_end.append(lambda: has_asked.wait(SECONDS))   # the end is not yet told
        kernel_.process.kill()
        page.until(lambda: cell.is_done)
        again = page.start("6 * 7", cell="b")
        wait_until(lambda: kernel_.requests.items)
        has_asked.set()
        self.assertEqual(page.finish(again).result, "42")

    def test_a_mistake_in_an_extra_ends_no_kernel(self):
        kernel_, frontend = self.start()
        self.enterContext(unittest.mock.patch.object(minijupyter.log, "level", "error"))
        for functions in (kernel_.on_publish, kernel_.on_end, kernel_.on_exit, kernel_.on_launch):
            functions.append(lambda *args: 1 / 0)
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")
        kernel_.process.kill()
        frontend.until(lambda: "restarting" in frontend.log)
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")

    def test_a_kernel_that_cannot_be_followed_is_ended_and_told_dead(self):
        kernel_, frontend = self.start()
        with unittest.mock.patch.object(minijupyter.KernelProcess, "connect") as connect:
            connect.side_effect = OSError(errno.EMFILE, "Too many open files")
            kernel_.restart()
            frontend.until(lambda: "dead" in frontend.log)
        self.assertIn("Too many open files", kernel_.reason)
        self.assertEqual(kernel_.process.returncode, -signal.SIGKILL)
        kernel_.restart()
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")

    def test_a_full_disk_is_told_and_leaves_no_kernel_that_never_starts(self):
        kernel_, frontend = self.start()
        with unittest.mock.patch.object(minijupyter, "write_secret") as write:
            write.side_effect = OSError(errno.ENOSPC, "No space left on device")
            for start in (self.kernels.start, kernel_.restart):
                with self.assertRaises(minijupyter.Problem) as caught:
                    start()
                self.assertIn("No space left", caught.exception.message)
        self.assertEqual(([*self.kernels.all.values()], kernel_.state), ([kernel_], "dead"))
        frontend.until(lambda: "dead" in frontend.log)
        kernel_.restart()
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")

    def test_a_kernel_whose_files_cannot_be_removed_is_shut_down_all_the_same(self):
        kernel_ = self.kernels.start()
        with unittest.mock.patch.object(os, "unlink", side_effect=PermissionError):
            self.kernels.shutdown(kernel_.id)
        self.assertEqual(self.kernels.all, {})

    def test_a_kernel_that_is_shut_down_while_it_is_started_leaves_no_process(self):
        write, ends = minijupyter.write_secret, []

        def write_slowly(*args):
            (kernel_,) = self.kernels.all.values()
            ends.append(threading.Thread(target=self.kernels.shutdown, args=[kernel_.id]))
            ends[0].start()
            ends[0].join(0.2)
            write(*args)

        with unittest.mock.patch.object(minijupyter, "write_secret", write_slowly):
            kernel_ = self.kernels.start()
        ends[0].join()
        self.assertIsNotNone(kernel_.process.poll())

    def test_a_session_that_returns_gets_what_its_old_connection_could_not_send(self):
        kernel_, _ = self.start()
        old, new = (minijupyter.PageMailbox("same", unittest.mock.Mock()) for _ in range(2))
        kernel_.join(old)
        joining = threading.Thread(target=kernel_.join, args=[new])
        joining.start()
        wait_until(lambda: old.websocket.abort.called)
        first, last = (kernel_.status("idle") for _ in range(2))
        kernel_.publish([last])
        old.put_back([first])
        kernel_.leave(old)
        joining.join()
        self.assertEqual(new.take(), [first, last])
        kernel_.leave(new)

    def start_wrapped(self):
        """(a kernel whose process is a wrapper, a frontend); the real one talks on and on."""
        wrapper = ("import subprocess, sys, time\n"
                   f"subprocess.Popen({OURS[:-1]!r} + sys.argv[1:], start_new_session=True)\n"
                   "time.sleep(60)")
        spec = minijupyter.complete_spec(
            {"argv": [sys.executable, "-c", wrapper, "{connection_file}"], "language": "python",
             "display_name": "wrapped", "metadata": {"supported_transports": ["tcp", "ipc"]}})
        self.enterContext(unittest.mock.patch.object(
            minijupyter, "find_specs", return_value={"wrapped": (spec, None)}))
        kernel_, frontend = self.start("wrapped")
        cell = frontend.finish(frontend.start("import os, time; os.getpid()"))
        self.addCleanup(os.kill, int(cell.result), signal.SIGKILL)
        cell = frontend.start("while True: print('on and on'); time.sleep(0.01)")
        frontend.until(lambda: cell.text())
        return kernel_, frontend

    def test_a_kernel_that_outlives_its_wrapper_and_talks_on_does_not_hide_its_end(self):
        self.enterContext(unittest.mock.patch.object(minijupyter, "LAST_WORDS_SECONDS", 0.5))
        kernel_, frontend = self.start_wrapped()
        kernel_.start_again = lambda process: None
        kernel_.process.kill()
        frontend.until(lambda: "restarting" in frontend.log)

    def test_the_next_process_begins_when_the_last_words_of_the_former_are_heard(self):
        self.enterContext(unittest.mock.patch.multiple(
            minijupyter, LAST_WORDS_SECONDS=1, SHUTDOWN_SECONDS=0.1))
        kernel_, frontend = self.start_wrapped()
        former, launched = kernel_.ended, []
        kernel_.launch = lambda: launched.append(former.is_set())
        kernel_.ask = lambda *args: None
        kernel_.restart()
        self.assertEqual(launched, [True])

    def test_a_cell_gets_its_reply_however_much_was_asked_meanwhile(self):
        self.enterContext(unittest.mock.patch.object(minijupyter, "MOST_ASKED", 3))
        _, frontend = self.start()
        cell = frontend.start("input()")
        frontend.until(lambda: cell.questions)
        for _ in range(5):
            frontend.request("kernel_info_request", "control")
        frontend.type("")
        self.assertEqual(frontend.finish(cell).result, "''")


class ManyKernels(ServerCase):
    """A class of students: thirty kernels that start at once, on one machine."""

    COUNT = 30

    def results(self, server):
        """What the first cell of each gives, sent as soon as its kernel is asked for."""
        def run(number):
            kernel_id = server.post("/api/kernels", {}).json["id"]
            wire = WebSocketWire(server, kernel_id)
            try:
                frontend = Frontend(wire)
                return frontend.finish(frontend.start(f"{number} + 1"), seconds=60).result
            finally:
                wire.close()

        with concurrent.futures.ThreadPoolExecutor(self.COUNT) as pool:
            return [*pool.map(run, range(self.COUNT))]

    def test_none_of_them_dies_and_no_first_cell_is_lost(self):
        """P1."""
        server = self.own_server()
        self.assertEqual(self.results(server), [str(n + 1) for n in range(self.COUNT)])

    def test_the_same_over_ports(self):
        server = self.own_server(options=["--port", free_ports(1)[0], "--transport", "tcp"])
        self.assertEqual(self.results(server), [str(n + 1) for n in range(self.COUNT)])


class ServerPortable(ServerCase):
    """The server where what only POSIX has is taken away, from it and from its kernels."""

    START = BARE + """
    sys.modules["fcntl"] = None
    import minijupyter
    minijupyter.our_kernel.command = lambda: [sys.executable, "-c", KERNEL, "-f",
                                              "{connection_file}"]
    minijupyter.main()""".replace("KERNEL", repr(BARE + "kernel.main()"))

    @classmethod
    def setUpClass(cls):
        cls.options = {"program": lambda root, port, token: [
            sys.executable, "-c", cls.START, root, "--port", str(port), "--token", token,
            "--no-browser"]}
        super().setUpClass()

    def test_a_kernel_starts_says_what_it_says_and_restarts(self):
        kernel_id, frontend, pid = self.start_kernel()
        cell = frontend.finish(frontend.start("import os; os.write(2, b'said'); 6 * 7"))
        self.assertEqual(cell.result, "42")
        self.assertReply(self.server.post(f"/api/kernels/{kernel_id}/restart"), 200)
        cell = frontend.finish(frontend.start("import os; os.getpid()"))
        self.assertNotEqual(int(cell.result), pid)

    def test_an_interrupt_is_sent_as_a_message(self):
        Kernels.test_interrupt_stops_a_running_cell(self)

    def test_a_crash_is_told_with_what_the_process_said_and_the_next_one_works(self):
        kernel_id, frontend, _ = self.start_kernel()
        frontend.start("import os; os.write(2, b'no licence'); os._exit(3)")
        frontend.until(lambda: "restarting" in frontend.log)
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")

    def test_files_are_saved_and_a_conflict_is_found(self):
        ConflictsAndFullDisks.setUp(self)
        ConflictsAndFullDisks.test_a_save_while_the_file_changed_on_disk_is_a_conflict(self)

    save = ConflictsAndFullDisks.save

    def test_a_file_that_a_scanner_holds_for_a_moment_is_replaced_all_the_same(self):
        held = [PermissionError, PermissionError, None]
        with unittest.mock.patch.object(minijupyter, "POSIX", False), \
                unittest.mock.patch.object(os, "replace", side_effect=held) as replace:
            minijupyter.replace_file("new", "old")
        self.assertEqual(replace.call_count, 3)

    def test_the_kernels_of_a_killed_server_end_by_themselves(self):
        server = self.own_server(**self.options)
        _, _, pid = self.start_kernel(server)
        os.kill(server.process.pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid))
        self._cleanups = [c for c in self._cleanups if c[0] != server.delete]


@unittest.skipUnless(os.name == "posix", "socket files are POSIX's")
class LocalSockets(ServerCase):
    """Between server and kernel there are files that only their owner can open, where it can be."""

    def connection(self, kernel_id, server=None):
        """The fields of a kernel's connection file."""
        (file,) = Path((server or self.server).folder.name).rglob(f"kernel-{kernel_id}.json")
        return json.loads(file.read_text())

    def socket_files(self, server=None):
        return [*Path((server or self.server).folder.name).rglob("sockets/*")]

    def test_a_kernel_that_can_is_reached_by_files_in_a_private_folder(self):
        kernel_id, _, _ = self.start_kernel()
        connection = self.connection(kernel_id)
        self.assertEqual(connection["transport"], "ipc")
        self.assertNotIn(kernel_id, connection["ip"])   # `--existing ID` takes any such file
        files = [f for f in self.socket_files() if str(f).startswith(connection["ip"])]
        self.assertEqual(len(files), 5)
        self.assertEqual(files[0].parent.stat().st_mode & 0o777, 0o700)

    def test_its_restart_uses_the_same_files(self):
        kernel_id, frontend, pid = self.start_kernel()
        before = self.connection(kernel_id)
        self.assertReply(self.server.post(f"/api/kernels/{kernel_id}/restart"), 200)
        cell = frontend.finish(frontend.start("import os; os.getpid()"))
        self.assertNotEqual(int(cell.result), pid)
        os.kill(int(cell.result), signal.SIGKILL)   # it leaves its files where they are
        frontend.until(lambda: "restarting" in frontend.log)
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")
        self.assertEqual(self.connection(kernel_id), before)

    @needs("jupyter_client")
    def test_another_client_attaches_by_the_connection_file(self):
        from jupyter_client import BlockingKernelClient
        kernel_id, _, _ = self.start_kernel()
        client = BlockingKernelClient()
        client.load_connection_info(self.connection(kernel_id))
        client.start_channels()
        self.addCleanup(client.stop_channels)
        client.wait_for_ready(timeout=SECONDS)
        reply = client.execute_interactive("6 * 7", timeout=SECONDS, output_hook=lambda m: None)
        self.assertEqual(reply["content"]["status"], "ok")
        self.assertTrue(client.is_alive())   # the heartbeat, too

    @needs("jupyter_console")
    def test_jupyter_console_attaches_by_the_kernels_id(self):
        kernel_id, frontend, _ = self.start_kernel()
        frontend.finish(frontend.start("seen = 'from the page'"))
        done = subprocess.run(
            [sys.executable, "-m", "jupyter_console", "--existing", kernel_id, "--simple-prompt"],
            env=clean_environment(self.server.folder.name, TERM="dumb"), text=True,
            input="seen\nexit(keep_kernel=True)\n", capture_output=True, timeout=MOST_SECONDS)
        self.assertIn("from the page", done.stdout, done.stderr)
        self.assertEqual(frontend.finish(frontend.start("seen")).result, "'from the page'")

    @needs("ipykernel")
    def test_ipykernel_is_reached_by_files_too(self):
        folder = self.folder()
        install_kernelspec(folder, "theirs", IPYKERNEL)
        server = self.own_server(env={"JUPYTER_PATH": str(folder)})
        kernel_id, frontend, _ = self.start_kernel(server, name="theirs")
        self.assertEqual(self.connection(kernel_id, server)["transport"], "ipc")
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")

    def test_a_kernel_that_is_shut_down_leaves_no_file(self):
        server = self.own_server()
        kernel_id, _, _ = self.start_kernel(server)
        self.assertReply(server.delete(f"/api/kernels/{kernel_id}"), 204)
        self.assertEqual(self.socket_files(server), [])

    def test_a_killed_server_leaves_no_file(self):
        server = self.own_server()
        _, _, pid = self.start_kernel(server)
        os.kill(server.process.pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid))
        wait_until(lambda: not self.socket_files(server))
        wait_until(lambda: not [*Path(server.folder.name).rglob("kernel-*.json")])
        self._cleanups = [c for c in self._cleanups if c[0] != server.delete]

    def test_a_child_that_holds_the_sockets_does_not_keep_the_next_process_waiting(self):
        """Its ZeroMQ has no thread: who connects to it is accepted, and hears nothing."""
        _, frontend, _ = self.start_kernel()
        frontend.start("import os, time\nchild = os.fork()\nif child: os._exit(3)\n"
                       "open('child', 'w').write(str(os.getpid()))\n"
                       "os.rename('child', 'forked'); time.sleep(60); os._exit(0)")
        frontend.until(lambda: "restarting" in frontend.log)
        wait_until((self.root / "forked").exists)
        self.addCleanup(os.kill, int((self.root / "forked").read_text()), signal.SIGKILL)
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")

    def test_a_restart_works_when_somebody_has_cleaned_up_the_runtime_folder(self):
        server = self.own_server()
        kernel_id, frontend, _ = self.start_kernel(server)
        shutil.rmtree(Path(server.folder.name, "jupyter_runtime_dir"))
        self.assertReply(server.post(f"/api/kernels/{kernel_id}/restart"), 200)
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")

    def test_the_runtime_folder_may_have_any_name(self):
        for name in (b"two\nlines", b"\xff no UTF-8"):
            with self.subTest(name):
                runtime = os.fsdecode(os.path.join(os.fsencode(self.folder()), name))
                server = self.own_server(env={"JUPYTER_RUNTIME_DIR": runtime})
                _, frontend, _ = self.start_kernel(server)
                self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")

    def test_where_the_path_is_too_long_there_are_ports(self):
        long = self.folder() / ("x" * 100)
        server = self.own_server(env={"JUPYTER_RUNTIME_DIR": str(long)})
        kernel_id, frontend, _ = self.start_kernel(server)
        (file,) = long.glob(f"kernel-{kernel_id}.json")
        self.assertEqual(json.loads(file.read_text())["transport"], "tcp")
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")

    def test_ports_can_be_asked_for(self):
        server = self.own_server(options=["--port", free_ports(1)[0], "--transport", "tcp"])
        kernel_id, _, _ = self.start_kernel(server)
        self.assertEqual(self.connection(kernel_id, server)["transport"], "tcp")


class Sessions(ServerCase):
    def post(self, path, **fields):
        reply = self.server.post("/api/sessions", {"path": path, "type": "notebook", **fields})
        model = self.assertReply(reply, 201).json
        self.addCleanup(self.server.delete, f"/api/sessions/{model['id']}")
        return model

    def test_the_same_path_gets_the_same_session(self):
        first, second = self.post("a.ipynb"), self.post("a.ipynb")
        self.assertEqual((first["id"], first["kernel"]["id"]),
                         (second["id"], second["kernel"]["id"]))
        self.assertNotEqual(self.post("b.ipynb")["kernel"]["id"], first["kernel"]["id"])

    def test_a_session_has_jupyters_fields(self):
        model = self.post("fields.ipynb", name="fields.ipynb")
        self.assertLessEqual({"id", "path", "name", "type", "kernel"}, set(model))
        self.assertIn(model["id"], [m["id"] for m in self.server.get("/api/sessions").json])

    def test_a_kernel_runs_in_the_folder_of_its_notebook(self):
        (self.root / "deep" / "er").mkdir(parents=True)
        model = self.post("deep/er/x.ipynb")
        frontend = self.server.frontend(model["kernel"]["id"])
        self.addCleanup(frontend.wire.close)
        cell = frontend.finish(frontend.start("import os; print(os.getcwd())"))
        self.assertEqual(Path(cell.text().strip()), (self.root / "deep" / "er").resolve())

    def told(self, model):
        """What the kernel of a session is told of its notebook."""
        frontend = self.server.frontend(model["kernel"]["id"])
        self.addCleanup(frontend.wire.close)
        cell = frontend.finish(frontend.start("import os; print(os.environ['JPY_SESSION_NAME'])"))
        return cell.text().strip()

    def test_how_the_server_allocates_is_no_matter_of_its_kernels(self):
        _, frontend, _ = self.start_kernel()
        cell = frontend.finish(frontend.start("'GLIBC_TUNABLES' in os.environ"))
        self.assertEqual(cell.result, str("GLIBC_TUNABLES" in os.environ))

    def test_a_kernel_is_told_the_whole_path_of_its_notebook(self):
        (self.root / "told").mkdir()
        model = self.post("told/x.ipynb", name="x.ipynb")
        folder = (self.root / "told").resolve()
        self.assertEqual(self.told(model), str(folder / "x.ipynb"))
        (connection,) = [json.loads(path.read_text()) for path in self.server.connection_files()
                         if model["kernel"]["id"] in path.name]
        self.assertEqual(connection["jupyter_session"], str(folder / "x.ipynb"))
        self.server.patch(f"/api/sessions/{model['id']}",
                          {"path": "told/y.ipynb", "name": "y.ipynb"})
        self.server.post(f"/api/kernels/{model['kernel']['id']}/restart")
        self.assertEqual(self.told(model), str(folder / "y.ipynb"))

    def test_a_console_has_no_file_and_its_kernel_is_told_the_sessions_path(self):
        self.assertEqual(self.told(self.post("console-1-abc", type="console")), "console-1-abc")

    def test_clients_of_old_name_the_notebook_apart(self):
        reply = self.assertReply(self.server.post(
            "/api/sessions", {"notebook": {"path": "old.ipynb"}, "kernel": {}}), 201).json
        path = f"/api/sessions/{reply['id']}"
        self.addCleanup(self.server.delete, path)
        self.assertEqual((reply["path"], reply["type"]), ("old.ipynb", "notebook"))
        moved = self.assertReply(self.server.patch(path, {"notebook": {"path": "new.ipynb"}}), 200)
        self.assertEqual(moved.json["notebook"]["path"], "new.ipynb")

    def test_requests_at_the_same_time_for_one_path_get_one_session(self):
        with ThreadPoolExecutor(8) as pool:
            models = list(pool.map(lambda _: self.post("crowd.ipynb"), range(8)))
        self.assertEqual(len({model["id"] for model in models}), 1)
        self.assertEqual(len({model["kernel"]["id"] for model in models}), 1)
        ids = {kernel["id"] for kernel in self.server.get("/api/kernels").json}
        self.assertEqual(len(ids), len(self.server.get("/api/sessions").json))

    def test_sessions_made_changed_and_ended_at_once_leave_no_kernel_behind(self):
        server = self.own_server()

        def use(number):
            path = f"{number % 3}.ipynb"
            model = server.post("/api/sessions", {"path": path, "type": "notebook"}).json
            address = f"/api/sessions/{model['id']}"
            wish = {"kernel": {"name": "python3"}} if number % 2 else {"path": f"{number}.ipynb"}
            return [server.patch(address, wish).status, server.delete(address).status]
        with ThreadPoolExecutor(6) as pool:
            statuses = {status for two in pool.map(use, range(18)) for status in two}
        self.assertLessEqual(statuses, {200, 204, 404})   # 404: somebody else has ended it
        self.assertEqual(server.get("/api/sessions").json, [])
        self.assertEqual(server.get("/api/kernels").json, [])

    def test_a_change_that_is_refused_changes_nothing(self):
        model = self.post("same.ipynb", name="same.ipynb")
        path = f"/api/sessions/{model['id']}"
        for kernel_, status in (({"name": "cobol"}, 501), ({"id": model["id"]}, 400)):
            self.assertReply(self.server.patch(path, {"path": "other", "kernel": kernel_}), status)
        for body in ({}, {"kernel": {}}, {"kernel": {"id": None, "name": None}}, {"path": None}):
            self.assertReply(self.server.patch(path, body), 200)
        now = self.server.get(path).json
        self.assertEqual((now["path"], now["kernel"]["id"]), ("same.ipynb", model["kernel"]["id"]))

    def test_an_unknown_kernel_is_named_in_a_short_message_and_leaves_no_session(self):
        reply = self.assertReply(self.server.post("/api/sessions", {
            "path": "x.ipynb", "type": "notebook", "kernel": {"name": "cobol"}}), 501)
        self.assertEqual(reply.json["short_message"], "cobol not found")
        self.assertNotIn("x.ipynb", [m["path"] for m in self.server.get("/api/sessions").json])

    def test_a_kernels_name_may_be_written_in_capitals(self):
        self.assertEqual(self.post("big.ipynb", kernel={"name": "Python3"})["kernel"]["name"],
                         "Python3")

    def test_a_wish_that_no_process_can_be_given_leaves_no_kernel(self):
        processes = lambda: set(children(self.server.process.pid))  # noqa: E731
        before, kernels = processes(), self.server.get("/api/kernels").json
        session = {"path": "x.ipynb", "type": "notebook"}
        bad = ("nul\0", "half \ud800", "\udfff", "long" * 50_000)
        texts = [{field: text} for text in bad for field in ("path", "name", "kernel_id")]
        envs = [{"env": env} for env in (
            [], "x", 7, {"KERNEL_A": 1}, {"KERNEL_A": None}, {"KERNEL_=": "x"}, {"": "x"},
            {"KERNEL_A\0": "x"}, {"KERNEL_A": "\0"}, {"KERNEL_A": "\ud800"}, {"A=B": "x"},
            {"KERNEL_A": "x" * 200_000}, {f"KERNEL_{i}": "x" * 9_000 for i in range(400)})]
        sessions = [{**session, **wish} for text in bad for wish in (
            {"path": text}, {"name": text}, {"kernel": {"id": text}}, {"kernel": {"name": text}},
            {"notebook": {"path": text}})] + [{**session, **wish} for wish in envs]
        for path, bodies in (("/api/kernels", texts + envs), ("/api/sessions", sessions)):
            for body in bodies:
                with self.subTest(path, body=str(body)[:99]):
                    self.assertReply(self.server.post(path, body), 400)
        self.assertEqual(self.server.get("/api/kernels").json, kernels)
        self.assertEqual(processes(), before)

    def test_a_session_follows_its_notebook_to_a_new_path(self):
        model = self.post("before.ipynb")
        path = f"/api/sessions/{model['id']}"
        moved = self.assertReply(self.server.patch(path, {"path": "after.ipynb"}), 200).json
        self.assertEqual((moved["path"], moved["kernel"]["id"]),
                         ("after.ipynb", model["kernel"]["id"]))
        self.assertEqual(self.post("after.ipynb")["id"], model["id"])

    def test_deleting_a_session_ends_its_kernel(self):
        model = self.post("end.ipynb")
        self.assertReply(self.server.delete(f"/api/sessions/{model['id']}"), 204)
        self.assertReply(self.server.get(f"/api/kernels/{model['kernel']['id']}"), 404)
        self.assertReply(self.server.get(f"/api/sessions/{model['id']}"), 404)

    def test_an_incomplete_session_is_refused_with_a_message(self):
        for body in ({}, {"path": "x.ipynb"}, {"type": "notebook"}, "[]", "{"):
            with self.subTest(body=body):
                reply = self.server.post("/api/sessions", body)
                if reply.status == 201:
                    self.server.delete(f"/api/sessions/{reply.json['id']}")
                if body != {"path": "x.ipynb"}:
                    self.assertReply(reply, 400)


NOBODY = "00000000-0000-0000-0000-000000000000"   # the id of no kernel and of no session
UNKNOWN = {**notebook("1"), "cells": [{**notebook("1")["cells"][0], "unknown": 1}]}
TEXT_FILE = {"type": "file", "format": "text", "content": "x"}
CRASH = "Jupyter Server fails (500)"
REDIRECT = "we answer where Jupyter Server redirects to the path without the slash"
NO_NAME = "a session without a name gets its file's, because @jupyterlab/services wants a string"
HEAD = "RFC 9110 9.3.2: what can be asked for by GET can be asked for by HEAD"
REQUESTS = [   # method, path, body, why our answer is another one; $K and $S: the latest ids
    ("GET", "/api", None, ""),
    ("GET", "/api/", None, REDIRECT),
    ("HEAD", "/api/kernels", None, HEAD),
    ("OPTIONS", "/api/kernels", None, "RFC 9110 15.3.5: without a body a success is a 204"),
    ("GET", "/api/nothing", None, ""),
    ("PUT", "/api/kernels", {}, ""),
    ("GET", "//api/kernels", None, "a doubled slash at the start is one slash"),
    ("GET", "/api//kernels", None, ""),
    ("GET", "/api/status", None, ""),
    ("GET", "/api/me", None, "our one person cannot be renamed: updatable_fields is empty"),
    ("GET", "/api/me?permissions=x", None, ""),
    ("GET", "/api/me?permissions=[]", None, ""),
    ("GET", '/api/me?permissions={"a":"b"}', None, ""),
    ("GET", '/api/me?permissions={"a":[1]}', None, ""),
    ("PATCH", "/api/me", {}, ""),
    ("PATCH", "/api/me", {"name": "x"}, "our one person cannot be renamed: 501, as the API allows"),
    ("GET", "/api/resolvePath", None, ""),
    ("GET", "/api/resolvePath?path=a.txt", None, ""),
    ("GET", "/api/resolvePath?path=/dir/in.txt", None, ""),
    ("GET", "/api/resolvePath?path=none", None, ""),
    ("GET", "/api/resolvePath?path=../x", None, ""),
    ("GET", f"/api/resolvePath?path=a.txt&kernel={NOBODY}", None, ""),
    ("GET", "/api/notebooks/a.ipynb", None, ""),
    ("GET", "/api/spec.yaml", None, ""),
    ("HEAD", "/api/spec.yaml", None, CRASH),

    ("GET", "/api/config/x", None, ""),
    ("GET", "/api/config/a-b", None, ""),
    ("GET", "/api/config/a.b", None, ""),
    ("GET", "/api/config/a%2fb", None, ""),
    ("PUT", "/api/config/x", {"a": {"b": 1, "c": {"d": 2}}, "e": [1, None]}, ""),
    ("GET", "/api/config/x", None, ""),
    ("PATCH", "/api/config/x", {"a": {"b": None}, "z": 1, "n": None, "q": {"r": None}, "w": {}},
     ""),
    ("PATCH", "/api/config/x", {"a": {"c": {"d": None}}}, ""),
    ("PATCH", "/api/config/x", {"z": {"y": 1}}, CRASH),
    ("PATCH", "/api/config/x", [], CRASH),
    ("PUT", "/api/config/x", [1], CRASH),
    ("PATCH", "/api/config/x", "{", ""),
    ("PUT", "/api/config/x", {"a": 3}, ""),
    ("GET", "/api/config/x", None, ""),

    ("GET", "/api/contents", None, ""),
    ("GET", "/api/contents/a.txt", None, ""),
    ("GET", "/api/contents/a.txt/", None, REDIRECT),
    ("GET", "/api/contents/b.bin", None, "base64 comes in one line, as RFC 4648 3.1 has it"),
    ("GET", "/api/contents/dir", None, ""),
    ("GET", "/api/contents/a.ipynb", None, "no cell is called untrusted: none is trusted"),
    ("GET", "/api/contents/bad.ipynb", None, "the reason names what is wrong: bad notebook"),
    ("GET", "/api/contents/odd.ipynb?content=0", None, ""),
    ("GET", "/api/contents/none", None, ""),
    ("GET", "/api/contents/none/none", None, ""),
    ("GET", "/api/contents/.hidden", None, ""),
    ("GET", "/api/contents/.hid/x.txt", None, ""),
    ("GET", "/api/contents/a.txt?content=0", None, ""),
    ("GET", "/api/contents/a.txt?content=2", None, ""),
    ("GET", "/api/contents/a.txt?format=x", None, ""),
    ("GET", "/api/contents/a.txt?format=json", None, "notebooks are asked for with format=json"),
    ("GET", "/api/contents/b.bin?format=text", None, ""),
    ("GET", "/api/contents/a.txt?type=directory", None, ""),
    ("GET", "/api/contents/dir?type=file", None, ""),
    ("GET", "/api/contents/a.ipynb?type=file", None, ""),
    ("GET", "/api/contents/a.txt?type=x", None, ""),
    ("GET", "/api/contents/a.txt?hash=1&content=0", None, ""),
    ("GET", "/api/contents/a.txt?hash=2", None, ""),
    ("GET", "/api/contents/dir?hash=1", None, CRASH),
    ("GET", "/api/contents/a.txt?1700000000000", None, ""),
    ("GET", "/api/contents/../x", None, ""),
    ("GET", "/api/contents/a%00b", None, ""),

    ("POST", "/api/contents", {}, ""),
    ("POST", "/api/contents", "", ""),
    ("POST", "/api/contents", {"type": "notebook"}, ""),
    ("POST", "/api/contents", {"type": "directory"}, ""),
    ("POST", "/api/contents", {"type": "directory"}, ""),
    ("POST", "/api/contents", {"ext": ".py"}, ""),
    ("POST", "/api/contents", {"ext": ".ipynb"}, ""),
    ("POST", "/api/contents", {"type": "x"}, ""),
    ("POST", "/api/contents", {"type": None}, ""),
    ("POST", "/api/contents/dir", {"type": "file", "ext": ".txt"}, ""),
    ("POST", "/api/contents/a.txt", {}, ""),
    ("POST", "/api/contents/none", {}, ""),
    ("POST", "/api/contents/.hid", {}, ""),
    ("POST", "/api/contents", {"copy_from": "a.txt"}, ""),
    ("POST", "/api/contents/dir", {"copy_from": "a.txt"}, ""),
    ("POST", "/api/contents/as.txt", {"copy_from": "a.txt"}, ""),
    ("POST", "/api/contents", {"copy_from": "dir"}, ""),
    ("POST", "/api/contents/empty", {"copy_from": "dir"}, ""),
    ("DELETE", "/api/contents/empty/dir/in.txt", None, ""),
    ("DELETE", "/api/contents/empty/dir/a.txt", None, ""),
    ("DELETE", "/api/contents/empty/dir/untitled.txt", None, ""),
    ("DELETE", "/api/contents/empty/dir", None, ""),
    ("POST", "/api/contents", {"copy_from": "none"}, ""),
    ("POST", "/api/contents", {"copy_from": ".hidden"}, ""),
    ("POST", "/api/contents/a.txt", {"copy_from": "a.ipynb"}, ""),
    ("POST", "/api/contents/none/x.txt", {"copy_from": "a.txt"}, ""),
    ("POST", "/api/contents", "{", ""),

    ("PUT", "/api/contents/p.txt", TEXT_FILE, ""),
    ("PUT", "/api/contents/p.txt", TEXT_FILE, ""),
    ("PUT", "/api/contents/none.txt", {}, ""),
    ("PUT", "/api/contents/dir", {}, ""),
    ("PUT", "/api/contents/new.txt", {"type": "file"}, ""),
    ("PUT", "/api/contents/new.txt", {"type": "file"}, ""),
    ("PUT", "/api/contents/new.ipynb", {"type": "notebook"}, ""),
    ("PUT", "/api/contents/typeless.txt", {"content": "x", "format": "text"}, ""),
    ("PUT", "/api/contents/typeless.txt", {"content": "x", "format": "text"}, ""),
    ("PUT", "/api/contents/typeless.ipynb", {"content": notebook("1"), "format": "json"}, ""),
    ("PUT", "/api/contents/other.txt", {**TEXT_FILE, "type": "x"}, ""),
    ("PUT", "/api/contents/formless.txt", {"type": "file", "content": "x"},
     "content without a format is text"),
    ("PUT", "/api/contents/bad.bin", {**TEXT_FILE, "format": "base64", "content": "!!"},
     "what is no base64 is refused, not saved as nothing"),
    ("PUT", "/api/contents/d", {"type": "directory"}, ""),
    ("PUT", "/api/contents/d", {"type": "directory"}, "201 is for what was made: this was there"),
    ("PUT", "/api/contents/a.txt", {"type": "directory"}, "409: something else is there"),
    ("PUT", "/api/contents/dir", TEXT_FILE, CRASH),
    ("PUT", "/api/contents/none/x.txt", TEXT_FILE, CRASH),
    ("PUT", "/api/contents/.hidden", TEXT_FILE, ""),
    ("PUT", "/api/contents/.new", {"type": "directory"}, ""),
    ("PUT", "/api/contents/c.txt", {"copy_from": "a.txt"}, ""),
    ("PUT", "/api/contents/odd2.ipynb", {"type": "notebook", "content": UNKNOWN}, ""),
    ("PUT", "/api/contents/odd2.ipynb", {"type": "notebook", "content": UNKNOWN}, ""),
    ("PUT", "/api/contents/bad2.ipynb", {"type": "notebook", "content": {}}, CRASH),
    ("PUT", "/api/contents/up.txt", {**TEXT_FILE, "chunk": 1},
     "an upload is created by its last chunk: until then the old file stays"),
    ("PUT", "/api/contents/up.txt", {**TEXT_FILE, "chunk": -1},
     "an upload is created by its last chunk: until then the old file stays"),
    ("PUT", "/api/contents/up.ipynb", {"type": "notebook", "content": UNKNOWN, "chunk": 1}, ""),

    ("PATCH", "/api/contents/p.txt", {"path": "pp.txt"}, ""),
    ("PATCH", "/api/contents/none.txt", {"path": "x.txt"}, ""),
    ("PATCH", "/api/contents/a.txt", {"path": "pp.txt"}, ""),
    ("PATCH", "/api/contents/a.txt", {"path": "a.txt"}, ""),
    ("PATCH", "/api/contents/a.txt", {"path": ".h"}, ""),
    ("PATCH", "/api/contents/.hidden", {"path": "h"}, ""),
    ("PATCH", "/api/contents/a.txt", {}, "a rename must say where to"),
    ("PATCH", "/api/contents/a.txt", "", ""),
    ("PATCH", "/api/contents/a.txt", {"path": ""}, "no path is no conflict: 400"),
    ("PATCH", "/api/contents/a.txt", {"path": "none/x"}, ""),
    ("PATCH", "/api/contents/a.txt", {"path": "../x"}, ""),
    ("PATCH", "/api/contents/a.txt", {"path": 3}, CRASH),
    ("PATCH", "/api/contents/dir", {"path": "dir2"}, ""),
    ("PATCH", "/api/contents/dir2", {"path": "dir/"}, ""),
    ("PATCH", "/api/contents/dir", {"path": "dir/dir"}, CRASH),

    ("GET", "/api/contents/a.ipynb/checkpoints", None, ""),
    ("POST", "/api/contents/a.ipynb/checkpoints", None, ""),
    ("GET", "/api/contents/a.ipynb/checkpoints", None, ""),
    ("POST", "/api/contents/a.ipynb/checkpoints/checkpoint", None, ""),
    ("POST", "/api/contents/a.ipynb/checkpoints/none", None, CRASH),
    ("DELETE", "/api/contents/a.ipynb/checkpoints/none", None, ""),
    ("DELETE", "/api/contents/a.ipynb/checkpoints/checkpoint", None, ""),
    ("POST", "/api/contents/a.ipynb/trust", None, "no notebook is trusted, whoever says so"),
    ("POST", "/api/contents/none/checkpoints", None, CRASH),
    ("POST", "/api/contents/dir/checkpoints", None, CRASH),
    ("GET", "/api/contents/.hidden/checkpoints", None, "a hidden file is not there"),

    ("DELETE", "/api/contents/pp.txt", None, ""),
    ("DELETE", "/api/contents/pp.txt", None, ""),
    ("DELETE", "/api/contents/empty", None, ""),
    ("DELETE", "/api/contents/.hidden", None, ""),
    ("DELETE", "/api/contents", None, ""),
    ("DELETE", "/api/contents/../x", None, ""),
    ("DELETE", "/api/contents/dir", None, ""),
    ("GET", "/files/x.html", None, ""),
    ("GET", "/view/x.html", None, ""),
    ("GET", "/view/dir", None, ""),
    ("GET", "/view/none", None, ""),
    ("GET", "/view/.hid/x.txt", None, "a hidden file is not there"),

    ("GET", "/api/kernelspecs/shared", None, ""),
    ("GET", "/api/kernelspecs/none", None, ""),
    ("GET", "/api/kernelspecs/a%20b", None, ""),
    ("GET", "/kernelspecs/shared/logo-64x64.png", None, ""),
    ("HEAD", "/kernelspecs/shared/logo-64x64.png", None, ""),
    ("GET", "/kernelspecs/SHARED/kernel.js", None, "RFC 9239 6: it is text/javascript"),
    ("GET", "/kernelspecs/shared/none", None, ""),
    ("GET", "/kernelspecs/none/x", None, ""),
    ("GET", "/kernelspecs/shared/..%2f..%2fx", None, "what is outside is not there, not forbidden"),

    ("GET", "/api/kernels", None, ""),
    ("GET", f"/api/kernels/{NOBODY}", None, ""),
    ("DELETE", f"/api/kernels/{NOBODY}", None, ""),
    ("POST", f"/api/kernels/{NOBODY}/interrupt", None, ""),
    ("POST", f"/api/kernels/{NOBODY}/restart", None, CRASH),
    ("POST", f"/api/kernels/{NOBODY}/x", None, ""),
    ("GET", f"/api/kernels/{NOBODY}/interrupt", None, ""),
    ("GET", f"/api/kernels/{NOBODY}/channels", None, ""),
    ("GET", "/api/kernels/abc", None, ""),
    ("POST", "/api/kernels", {"name": "none"}, CRASH),
    ("POST", "/api/kernels", [], CRASH),
    ("POST", "/api/kernels", "{", ""),
    ("POST", "/api/kernels", {"name": 3}, CRASH),
    ("POST", "/api/kernels", {"name": "shared"}, ""),
    ("GET", "/api/kernels", None, ""),
    ("GET", "/api/kernels/$K", None, ""),
    ("POST", "/api/kernels", {"kernel_id": "$K"}, ""),
    ("POST", "/api/kernels/$K/interrupt", {}, ""),
    ("POST", "/api/kernels/$K/restart", "", ""),
    ("DELETE", "/api/kernels/$K", None, ""),
    ("DELETE", "/api/kernels/$K", None, ""),

    ("GET", "/api/sessions", None, ""),
    ("GET", f"/api/sessions/{NOBODY}", None, ""),
    ("PATCH", f"/api/sessions/{NOBODY}", {"path": "x"}, ""),
    ("DELETE", f"/api/sessions/{NOBODY}", None, ""),
    ("GET", "/api/sessions/abc", None, ""),
    ("POST", "/api/sessions", {}, ""),
    ("POST", "/api/sessions", "", ""),
    ("POST", "/api/sessions", {"path": "x"}, ""),
    ("POST", "/api/sessions", {"type": "x"}, ""),
    ("POST", "/api/sessions", [], CRASH),
    ("POST", "/api/sessions", {"path": 3, "type": "x"}, CRASH),
    ("POST", "/api/sessions", {"path": "x", "type": "x", "kernel": {"name": "none"}}, ""),
    ("POST", "/api/sessions", {"path": "x", "type": "x", "kernel": "x"}, CRASH),
    ("POST", "/api/sessions", {"notebook": {}}, ""),
    ("POST", "/api/sessions", {"notebook": {"path": "a.ipynb"}, "kernel": {"name": "shared"}},
     NO_NAME),
    ("POST", "/api/sessions", {"path": "a.ipynb", "type": "x", "kernel": {"name": "none"}},
     NO_NAME),
    ("PATCH", "/api/sessions/$S", {"name": "a.ipynb"}, ""),
    ("GET", "/api/sessions", None, ""),
    ("GET", "/api/sessions/$S", None, ""),
    ("PATCH", "/api/sessions/$S", "", ""),
    ("PATCH", "/api/sessions/$S", {}, ""),
    ("PATCH", "/api/sessions/$S", {"path": "dir/b.ipynb"}, ""),
    ("PATCH", "/api/sessions/$S", {"notebook": {"path": "c.ipynb"}}, ""),
    ("PATCH", "/api/sessions/$S", {"name": "", "type": "console"}, ""),
    ("PATCH", "/api/sessions/$S", {"kernel": {"id": NOBODY}}, ""),
    ("PATCH", "/api/sessions/$S", {"kernel": {"id": "$K"}}, ""),
    ("PATCH", "/api/sessions/$S", {"kernel": {}}, ""),
    ("PATCH", "/api/sessions/$S", {"kernel": {"id": None, "name": None}}, ""),
    ("PATCH", "/api/sessions/$S", {"kernel": {"name": "none"}},
     "the short message is that of a new session"),
    ("PATCH", "/api/sessions/$S", {"kernel": {"name": "shared"}}, ""),
    ("PUT", "/api/sessions/$S", {}, ""),
    ("DELETE", "/api/sessions/$S", None, ""),
    ("GET", "/api/sessions/$S", None, ""),
    ("GET", "/api/kernels", None, ""),
]


@needs("jupyter_server")
class SameAsJupyterServer(Case):
    """One server of ours and one Jupyter Server, both with the same files and the same kernel, get
    the same requests. Where the answers differ, the table says why; it may say so only there."""

    # What each server has of its own; of these the kind of value is compared, not the value.
    OWN = {"created", "last_modified", "last_activity", "started", "version", "message", "size",
           "id", "connections", "execution_state"}

    def server(self, **options):
        server = Server(env={"JUPYTER_PATH": str(self.specs)}, **options)
        self.addCleanup(server.end)
        root = server.root
        for folder in ("dir", "empty", ".hid"):
            (root / folder).mkdir()
        for name, text in {"a.txt": "hello\n", "dir/in.txt": "in", "x.html": "<p>", ".hidden": "h",
                           ".hid/x.txt": "x", "bad.ipynb": "{", "odd.ipynb": json.dumps(UNKNOWN),
                           "a.ipynb": json.dumps(notebook("1"))}.items():
            (root / name).write_text(text)
        (root / "b.bin").write_bytes(b"\xff\x00\xfe")
        wait_until(lambda: answers(server))
        server.ids = {"$K": NOBODY, "$S": NOBODY}
        return server

    def ask(self, server, method, path, body):
        """The digest of the answer; the ids in it are kept for the next requests."""
        body = body if isinstance(body, str | None) else json.dumps(body)
        for name, id in server.ids.items():
            path, body = path.replace(name, id), body and body.replace(name, id)
        reply = server.request(method, quote(path, safe="/?&=%"), body)
        try:
            value = reply.json
        except ValueError:
            value = None
        if isinstance(value, dict) and reply.status < 300:
            if "kernel" in value:
                server.ids.update({"$S": value["id"], "$K": value["kernel"]["id"]})
            elif "execution_state" in value:
                server.ids["$K"] = value["id"]
        server.policy = {*reply.headers.get("Content-Security-Policy", "").split("; ")}
        return self.digest(server, reply, value)

    def digest(self, server, reply, value):
        """(status, JSON, headers) without what each server has of its own."""
        if reply.status >= 400:
            value = value if isinstance(value, dict) else {}
            return reply.status, value.get("reason"), value.get("short_message")
        location = reply.headers.get("Location", "")
        for name, id in server.ids.items():
            location = location.replace(id, name)
        kind = reply.headers.get("Content-Type", "").split(";")[0] if reply.body else ""
        is_dated = "Last-Modified" in reply.headers and kind == "application/json"
        is_yaml = kind == "text/x-yaml"
        return reply.status, None if is_yaml else self.shape(value), location, kind, is_dated

    def shape(self, value, key=None):
        """A JSON value; of what is a server's own the type."""
        if isinstance(value, dict):
            return {key: self.shape(each, key) for key, each in value.items()}
        if isinstance(value, list):
            return sorted((self.shape(each) for each in value), key=repr)
        return type(value).__name__ if key in self.OWN else value

    def test_every_request_is_answered_alike_or_the_table_says_why_not(self):
        self.specs = self.folder()
        install_kernelspec(self.specs, "shared", OURS)
        for name in ("logo-64x64.png", "kernel.js"):
            (self.specs / "kernels" / "shared" / name).write_text(name)
        ours, theirs = self.server(), self.server(program=jupyter_server)
        for number, (method, path, body, why) in enumerate(REQUESTS):
            with self.subTest(f"{number} {method} {path} {body}"):
                mine, other = (self.ask(server, method, path, body) for server in (ours, theirs))
                if why:
                    self.assertNotEqual(mine, other, "the same again: take the reason away")
                else:
                    self.assertEqual(mine, other)
                self.assertTrue(mine[0] < 500 or mine[0] == 501, mine)
                # Nobody reads reports here; a page without a policy is one that redirects.
                stricter = theirs.policy - ours.policy
                self.assertLessEqual({part.split(" ")[0] for part in stricter}, {"report-uri", ""})
                if why == CRASH:
                    self.assertEqual(other[0], 500)


class ServerLife(ServerCase):
    def setUp(self):
        self.server = self.own_server()

    @classmethod
    def setUpClass(cls):
        cls.root = Path("never")

    def test_the_first_screen_shows_the_address_with_the_token(self):
        self.assertIn(f"/tree?token={self.server.token}", self.server.url[0])

    def test_control_c_leaves_no_process_and_no_connection_file(self):
        pids = [self.start_kernel(self.server)[2] for _ in range(2)]
        _, busy, pid = self.start_kernel(self.server)
        cell = busy.start("print('ready')\nwhile True: pass")
        busy.until(lambda: cell.text())
        self.assertEqual(len(self.server.connection_files()), 3)
        self.assertEqual({p.stat().st_mode & 0o77 for p in self.server.connection_files()}, {0})
        os.kill(self.server.process.pid, signal.SIGINT)
        self.server.process.exit_code()
        self.assertEqual([p for p in [*pids, pid] if is_alive(p)], [])
        self.assertEqual(self.server.connection_files(), [])
        self.assertNotIn("Traceback", self.server.process.output)
        self._cleanups = [c for c in self._cleanups if c[0] != self.server.delete]

    def test_it_listens_where_it_is_told_and_warns_when_others_reach_it(self):
        ways = [("localhost", "localhost", False), ("0.0.0.0", "127.0.0.1", True)]
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as free:
            free.bind(("::1", 0))    # not every machine has IPv6
            ways.append(("::1", "[::1]", False))
        for ip, host, is_warned in ways:
            process = Process([sys.executable, HERE / "minijupyter.py", "--ip", ip, "--port", "0",
                               "--token", "x", "--no-browser", self.server.root],
                              env=clean_environment(self.folder()))
            self.addCleanup(process.end)
            port = process.wait_for(rf"http://{re.escape(host)}:(\d+)/tree")[1]
            connection = http.client.HTTPConnection(f"{host}:{port}", timeout=SECONDS)
            self.addCleanup(connection.close)
            connection.request("GET", "/api/kernels", headers={"Authorization": "token x"})
            self.assertEqual(connection.getresponse().status, 200)
            process.end()
            self.assertEqual("Other machines" in process.output, is_warned, ip)

    def test_a_terminate_signal_ends_the_kernels_too(self):
        _, _, pid = self.start_kernel(self.server)
        os.kill(self.server.process.pid, signal.SIGTERM)
        self.server.process.exit_code()
        self.assertFalse(is_alive(pid))
        self._cleanups = [c for c in self._cleanups if c[0] != self.server.delete]

    def test_a_taken_port_moves_on_to_the_next_free_one(self):
        with contextlib.ExitStack() as stack:
            taken = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # someone else has it: as good
                taken.bind(("127.0.0.1", 8888))
                taken.listen()
            server = self.own_server(options=[])
            self.assertGreater(server.port, 8888)
            self.assertEqual(server.get("/api/kernels").status, 200)

    def test_when_all_its_ports_are_taken_the_system_chooses_one(self):
        tried = range(minijupyter.FIRST_PORT, minijupyter.FIRST_PORT + minijupyter.PORTS_TRIED)
        for port in tried:
            taken = self.enterContext(socket.socket())
            with contextlib.suppress(OSError):  # someone else has it: as good
                taken.bind(("127.0.0.1", port))
                taken.listen()
        server = self.own_server(options=[])
        self.assertNotIn(server.port, tried)
        self.assertEqual(server.get("/api/kernels").status, 200)

    def test_on_windows_nobody_else_can_take_the_port(self):
        with unittest.mock.patch.object(socket, "SO_EXCLUSIVEADDRUSE", 77, create=True), \
                unittest.mock.patch.object(socket.socket, "setsockopt") as setsockopt:
            server = minijupyter.SERVERS[-1](self.folder(), "127.0.0.1", 0, "secret")
            server.server_close()
        options = [call.args for call in setsockopt.call_args_list]
        self.assertIn((socket.SOL_SOCKET, 77, 1), options)
        self.assertNotIn((socket.SOL_SOCKET, socket.SO_REUSEADDR, 1), options)

    def test_a_taken_port_that_was_asked_for_is_an_error(self):
        again = Process([sys.executable, HERE / "minijupyter.py", self.server.root, "--port",
                         self.server.port, "--no-browser"])
        self.addCleanup(again.end)
        self.assertNotEqual(again.exit_code(), 0)
        self.assertIn(str(self.server.port), again.output)
        self.assertNotIn("Traceback", again.output)

    def test_without_pyzmq_one_line_says_what_to_install(self):
        env = clean_environment(self.folder())
        for program in ("minijupyter.py", "kernel.py"):
            with self.subTest(program):
                process = Process([sys.executable, "-S", HERE / program, "--no-browser"], env=env)
                self.addCleanup(process.end)
                self.assertEqual(process.exit_code(), 1)
                self.assertEqual(len(process.lines), 1, process.output)
                self.assertIn("pip install pyzmq", process.output)

    def command(self, *words):
        env = clean_environment(self.server.folder.name)
        return subprocess.run([sys.executable, HERE / "minijupyter.py", *words], env=env,
                              capture_output=True, text=True, timeout=60)

    def test_list_shows_the_running_server_and_stop_ends_it(self):
        _, _, pid = self.start_kernel(self.server)
        shown = self.command("list").stdout
        self.assertIn(f"http://127.0.0.1:{self.server.port}/?token={self.server.token}", shown)
        self.assertIn(str(self.server.root.resolve()), shown)
        self.assertIn("No such server", self.command("stop", "1").stderr)
        self.assertEqual(self.command("stop").returncode, 0)
        self.assertEqual(self.server.process.exit_code(), 0)
        self.assertFalse(is_alive(pid))
        self.assertEqual(self.command("list").stdout, "No server runs.\n")
        self.assertEqual(list(Path(self.server.folder.name).rglob("jpserver-*")), [])
        self._cleanups = [c for c in self._cleanups if c[0] != self.server.delete]

    def test_list_and_stop_bear_whatever_lies_in_the_runtime_folder(self):
        runtime = Path(self.server.folder.name, "jupyter_runtime_dir")
        info = json.loads(next(runtime.glob("jpserver-*.json")).read_text())
        listener = self.enterContext(socket.create_server(("127.0.0.1", 0)))
        silent = f"http://127.0.0.1:{listener.getsockname()[1]}/"

        def speak_another_protocol():
            with listener, listener.accept()[0] as connection:
                connection.sendall(b"SSH-2.0-x\r\n")

        threading.Thread(target=speak_another_protocol, daemon=True).start()
        for number, text in enumerate((
                "", "{", "[]", "null", "1", '"x"', "{}", "[" * 100_000, "\xff\xfe", '{"url": 1}',
                *(json.dumps({**info, **changed}) for changed in (
                    {"url": "http://[::1"}, {"url": "file:///etc/passwd"}, {"url": "x y"},
                    {"url": f"http://127.0.0.1:{free_ports(1)[0]}/"}, {"url": silent},
                    {"url": "http://\n/"}, {"url": "http://é..x/"}, {"token": None},
                    {"port": "8888"}, {"url": "http+unix://%2Fx/"})))):
            (runtime / f"jpserver-{number}.json").write_text(text, "latin-1")
        (runtime / "jpserver-100.json").mkdir()
        (runtime / "jpserver-101.json").symlink_to("nowhere")
        shown = self.command("list")
        self.assertEqual((shown.stdout.count("::"), shown.stderr), (1, ""))
        self.assertEqual(self.command("stop").stderr, "")
        self.assertEqual(self.server.process.exit_code(), 0)

    @needs("jupyter_server")
    def test_list_and_stop_know_servers_of_jupyter_server_too(self):
        theirs = self.own_server(program=jupyter_server)
        wait_until(lambda: answers(theirs), 60)
        self.server.end()
        env = clean_environment(theirs.folder.name)
        for word, said in (("list", f":{theirs.port}/?token={theirs.token}"), ("stop", "ended")):
            done = subprocess.run([sys.executable, HERE / "minijupyter.py", word], env=env,
                                  capture_output=True, text=True)
            self.assertIn(said, done.stdout)

    @needs("jupyter_server")
    def test_jupyters_own_list_shows_our_server(self):
        shown = subprocess.run(
            [sys.executable, "-m", "jupyter_server", "list", "--json"], text=True, check=True,
            env=clean_environment(self.server.folder.name), capture_output=True).stdout
        info = json.loads(shown)
        self.assertEqual((info["port"], info["token"], info["pid"]),
                         (self.server.port, self.server.token, self.server.process.pid))

    def with_descriptors(self, count):
        """A server that may open so many files and connections."""
        return self.own_server(preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_NOFILE, (count, count)))

    def test_strangers_take_no_descriptor_from_those_who_have_the_token(self):
        server = self.with_descriptors(64)
        kept = server.connect()
        self.addCleanup(kept.close)
        self.assertEqual(server.request("GET", "/api/kernels", connection=kept).status, 200)
        first = kept.sock
        _, frontend, _ = self.start_kernel(server)
        for _ in range(80):
            self.enterContext(socket.create_connection(("127.0.0.1", server.port), SECONDS))
        for _ in range(5):
            self.assertEqual(server.get("/api/kernels").status, 200)
        self.assertEqual(server.request("GET", "/api/kernels", connection=kept).status, 200)
        self.assertIs(kept.sock, first)
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")

    def test_the_stranger_who_was_silent_longest_is_cut_off_first(self):
        strangers = minijupyter.Strangers(2)
        pairs = [socket.socketpair() for _ in range(4)]
        for each in itertools.chain(*pairs):
            self.addCleanup(each.close)
        strangers.add(pairs[0][0])
        strangers.add(pairs[1][0])
        strangers.add(pairs[0][0])    # has got an answer
        strangers.add(pairs[2][0])
        self.assertEqual(pairs[1][1].recv(1), b"")
        strangers.remove(pairs[0][0])
        strangers.add(pairs[3][0])
        self.assertEqual(list(strangers.sockets), [pairs[2][0], pairs[3][0]])

    def test_a_shortage_of_descriptors_costs_no_time_and_passes(self):
        server = self.with_descriptors(40)
        kept = [server.connect() for _ in range(50)]
        for each in kept:
            self.addCleanup(each.close)
            each.timeout = 2
        with contextlib.suppress(TimeoutError):
            for each in kept:
                server.request("GET", "/api/kernels", connection=each)
        self.assertGreater(sum(each.sock is not None for each in kept), 10)
        before = cpu_seconds(server.process.pid)
        with self.assertRaises(TimeoutError):     # the next has to wait, too
            server.request("GET", "/api/kernels", connection=kept[-1])
        self.assertLess(cpu_seconds(server.process.pid) - before, 0.3)
        for each in kept:
            each.close()
        self.assertEqual(server.get("/api/kernels").status, 200)

    def test_kernels_leave_descriptors_for_those_who_come_to_end_them(self):
        server, kernels = self.with_descriptors(100), []
        for _ in range(8):
            reply = server.post("/api/kernels", {})
            if reply.status == 201:
                kernels.append(reply.json["id"])
                server.frontend(kernels[-1]).wire.close()   # by now it has all of its own
        self.assertIn("Too many open files", self.assertReply(reply, 500).json["message"])
        self.assertEqual(len(server.get("/api/kernels").json), len(kernels))
        for id in kernels:
            self.assertReply(server.delete(f"/api/kernels/{id}"), 204)
        self.start_kernel(server)

    def test_a_killed_server_leaves_no_kernel_behind(self):
        pids = [self.start_kernel(self.server)[2] for _ in range(2)]
        cell = ("import subprocess, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                "print(subprocess.Popen(['sleep', '1000']).pid)")
        _, frontend, pid = self.start_kernel(self.server)
        child = int(frontend.finish(frontend.start(cell)).text())
        os.kill(self.server.process.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, [*pids, pid, child])))
        self._cleanups = [c for c in self._cleanups if c[0] != self.server.delete]

    def test_a_killed_server_leaves_not_even_a_kernel_that_stands_still(self):
        """It cannot see by itself that its server is gone, like most kernels of others."""
        _, _, pid = self.start_kernel(self.server)
        os.kill(pid, signal.SIGSTOP)
        os.kill(self.server.process.pid, signal.SIGKILL)
        self._cleanups = [c for c in self._cleanups if c[0] != self.server.delete]
        self.addCleanup(lambda: is_alive(pid) and os.kill(pid, signal.SIGKILL))
        wait_until(lambda: not is_alive(pid))

    def test_requests_are_logged_only_when_asked_and_without_the_token(self):
        self.assertNotIn("GET", self.server.process.output)
        loud = self.own_server(options=["--port", free_ports(1)[0], "--log-level", "info"])
        before = loud.process.output.count(loud.token)
        loud.get(f"/api/status?token={loud.token}")
        loud.process.wait_for("200 GET /api/status\n")
        self.assertEqual(loud.process.output.count(loud.token), before)

    def test_a_folder_that_does_not_exist_is_an_error(self):
        process = Process([sys.executable, HERE / "minijupyter.py", "/no/such/folder"])
        self.addCleanup(process.end)
        self.assertNotEqual(process.exit_code(), 0)
        self.assertNotIn("Traceback", process.output)


# ---- 8. WebSocket frames and the bridge --------------------------------------------
#
# WebSocketClient can send any bytes, wrong ones too. The rules are those of RFC 6455, with its
# own examples; an echo server, made of WebSocket.accept alone, shows how each is obeyed. Then
# the bridge: the same Frontend as in section 3, now through the server.

class Mailboxes(Case):
    """What one thread has for another."""

    def entry(self, size):
        session = kernel.Session("")
        message = session.message("stream", {"name": "stdout", "text": "x" * size})
        return minijupyter.Entry("iopub", session.pack(message)[2:6])

    def test_a_mailbox_gives_a_little_at_a_time_and_says_that_there_is_more(self):
        box, entries = minijupyter.Mailbox(), [self.entry(1000) for _ in range(5)]
        self.addCleanup(box.close)
        box.put(entries)
        self.assertEqual(box.take(3000), entries[:2])
        self.assertTrue(select.select([box], [], [], 0)[0])
        self.assertEqual((box.take(), box.size), (entries[2:], 0))
        self.assertFalse(select.select([box], [], [], 0)[0])

    def test_what_came_to_nothing_is_the_first_again(self):
        box, entries = minijupyter.Mailbox(), [self.entry(10) for _ in range(3)]
        self.addCleanup(box.close)
        box.put(entries)
        box.put_back(box.take(1))
        self.assertEqual(box.take(), entries)

    def test_what_is_put_into_a_closed_one_stays(self):
        box, entries = minijupyter.Mailbox(), [self.entry(10)]
        box.close()
        box.put(entries)
        self.assertEqual(box.take(), entries)


class EchoServer:
    """WebSocket.accept on a plain http.server: what comes in goes back."""

    def __init__(self, context=None, **options):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            log_message = lambda *values: None  # noqa: E731

            def do_GET(self):
                websocket = minijupyter.WebSocket.accept(self, **options)
                while not websocket.is_closed:
                    for message in websocket.arrived():
                        websocket.send(message)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *values: None  # a client that breaks a rule is expected
        if context:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def end(self):
        self.server.shutdown()
        self.server.server_close()


class WebSocketFrames(Case):
    """The parser alone: bytes in, messages out."""

    def feed(self, *chunks, **limits):
        parser = minijupyter.FrameParser(**limits)
        return [message for chunk in chunks for message in parser.feed(chunk)]

    def test_the_examples_of_the_rfc_are_read(self):
        for data, message in [  # RFC 6455 5.7
                ("818537fa213d7f9f4d5158", (TEXT, "Hello")),
                ("898537fa213d7f9f4d5158", (PING, b"Hello")),
                ("8a8537fa213d7f9f4d5158", (PONG, b"Hello"))]:
            with self.subTest(data):
                self.assertEqual(self.feed(bytes.fromhex(data)), [message])

    def test_the_examples_of_the_rfc_are_written(self):
        for data, opcode, payload, mask in [
                ("810548656c6c6f", TEXT, b"Hello", None),
                ("818537fa213d7f9f4d5158", TEXT, b"Hello", MASK),
                ("890548656c6c6f", PING, b"Hello", None), ("8200", BINARY, b"", None),
                ("827e0100" + "00" * 256, BINARY, bytes(256), None),
                ("827f0000000000010000" + "00" * 65536, BINARY, bytes(65536), None)]:
            with self.subTest(data[:20]):
                written = minijupyter.encode_frame(opcode, payload, mask)
                self.assertEqual(written.hex(), data)

    def test_every_length_is_read_back(self):
        for length in (0, 1, 3, 4, 125, 126, 127, 65535, 65536, 1_000_001):
            payload = os.urandom(length)
            with self.subTest(length):
                self.assertEqual(self.feed(frame(BINARY, payload)), [(BINARY, payload)])

    def test_frames_may_arrive_byte_by_byte_or_all_at_once(self):
        data = frame(TEXT, b"one") + frame(BINARY, b"two" * 100) + frame(TEXT, "☃".encode())
        expected = [(TEXT, "one"), (BINARY, b"two" * 100), (TEXT, "☃")]
        self.assertEqual(self.feed(data), expected)
        self.assertEqual(self.feed(*[bytes([byte]) for byte in data]), expected)

    def test_a_fragmented_text_is_put_together_around_a_ping(self):
        snowman = "☃".encode()
        messages = self.feed(frame(TEXT, b"a" + snowman[:1], fin=False), frame(PING, b"?"),
                             frame(0, snowman[1:], fin=False), frame(0, b"", fin=True))
        self.assertEqual(messages, [(PING, b"?"), (TEXT, "a☃")])

    def test_what_breaks_a_rule_is_refused_with_its_close_code(self):
        for code, *frames in [
                (1002, frame(TEXT, b"x", mask=None)), (1002, frame(3)), (1002, frame(11)),
                (1002, bytes([0xc1, 0x80]) + MASK), (1002, frame(0, b"x")),
                (1002, frame(TEXT, b"a", fin=False), frame(TEXT, b"b")),
                (1002, frame(PING, fin=False)), (1002, frame(PING, b"x" * 126)),
                (1007, frame(TEXT, b"\xff")), (1007, frame(TEXT, b"\xed\xa0\x80")),
                (1007, frame(TEXT, "☃".encode()[:2])), (1009, frame(BINARY, b"", length=1001)),
                (1009, frame(BINARY, b"x" * 900, fin=False), frame(0, b"x" * 101))]:
            with self.subTest(code=code, frames=frames), self.assertRaises(
                    minijupyter.WebSocketError) as caught:
                self.feed(*frames, most_bytes=1000)
            self.assertEqual(caught.exception.code, code)


class WebSocketConnection(Case):
    """The same rules on a socket, against an echo server."""

    @classmethod
    def setUpClass(cls):
        cls.server = EchoServer()
        cls.addClassCleanup(cls.server.end)

    def connect(self, **options):
        client = WebSocketClient(self.server.port, **options)
        self.addCleanup(client.close)
        return client

    def assertClosed(self, client, code):
        """The server sends one close frame with this code, then ends the connection."""
        self.assertIsNone(client.receive())
        self.assertEqual(client.close_code, code)
        self.assertTrue(client.is_at_end())

    def test_the_handshake_answers_with_the_accept_key_of_the_rfc(self):
        client = self.connect()
        self.assertEqual((client.version, client.status), ("HTTP/1.1", 101))
        self.assertEqual(client.headers["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
        self.assertEqual(client.headers["upgrade"].lower(), "websocket")

    def test_text_and_binary_messages_go_both_ways(self):
        client = self.connect()
        for message in ("Hello", "", "☃ 𝄞", b"\0\xff", b"", "x" * 70_000, b"y" * 3_000_000):
            client.send(message)
            self.assertEqual(client.receive(), message)

    def test_servers_do_not_mask(self):
        client = self.connect()
        client.send("Hello")
        self.assertEqual(client.receive_frame(), (True, TEXT, b"Hello"))

    def test_a_frame_glued_to_the_handshake_is_read(self):
        client = self.connect(first=frame(TEXT, b"first") + frame(TEXT, b"second"))
        self.assertEqual([client.receive(), client.receive()], ["first", "second"])

    def test_a_slow_line_gets_as_much_time_as_it_needs(self):
        ours, theirs = socket.socketpair()
        ours.settimeout(0.3)   # that a peer may take nothing
        websocket, received = minijupyter.WebSocket(ours), 0
        sending = threading.Thread(target=lambda: (websocket.send("x" * (4 << 20)), ours.close()))
        sending.start()
        with theirs:
            while data := theirs.recv(1 << 18):
                received += len(data)
                time.sleep(0.05)
        sending.join()
        self.assertEqual((received, websocket.is_closed), ((4 << 20) + 10, False))

    def test_a_ping_is_answered_with_its_payload_even_between_fragments(self):
        client = self.connect()
        client.socket.sendall(frame(TEXT, b"Hel", fin=False) + frame(PING, b"there?"))
        self.assertEqual(client.receive_frame(), (True, PONG, b"there?"))
        client.socket.sendall(frame(0, b"lo"))
        self.assertEqual(client.receive(), "Hello")

    def test_an_unasked_pong_is_ignored(self):
        client = self.connect()
        client.socket.sendall(frame(PONG, b"unasked"))
        client.send("next")
        self.assertEqual(client.receive(), "next")

    def test_a_close_is_answered_once_with_its_code(self):
        for payload, code in ((struct.pack("!H", 1000), 1000), (struct.pack("!H", 4001), 4001),
                              (struct.pack("!H", 1001) + b"bye", 1001)):
            with self.subTest(code):
                client = self.connect()
                client.socket.sendall(frame(CLOSE, payload))
                self.assertClosed(client, code)

    def test_an_empty_close_is_answered(self):
        client = self.connect()
        client.socket.sendall(frame(CLOSE))
        self.assertIsNone(client.receive())
        self.assertIn(client.close_code, (0, 1000))

    def test_a_wrong_close_is_a_protocol_error(self):
        for payload, code in ((b"\x03", 1002), (struct.pack("!H", 1005), 1002),
                              (struct.pack("!H", 999), 1002), (b"\x03\xe8\xff", 1007)):
            with self.subTest(payload):
                client = self.connect()
                client.socket.sendall(frame(CLOSE, payload))
                self.assertClosed(client, code)

    def test_an_unmasked_frame_closes_the_connection(self):
        client = self.connect()
        client.socket.sendall(frame(TEXT, b"Hello", mask=None))
        self.assertClosed(client, 1002)

    def test_an_oversized_frame_closes_the_connection_before_it_is_read(self):
        client = self.connect()
        client.socket.sendall(frame(BINARY, b"", length=1 << 62))
        self.assertClosed(client, 1009)

    def test_a_text_that_is_not_utf_8_closes_the_connection(self):
        client = self.connect()
        client.socket.sendall(frame(TEXT, b"\xff"))
        self.assertClosed(client, 1007)

    def test_a_client_that_vanishes_ends_the_conversation(self):
        client = self.connect()
        client.close()
        other = self.connect()
        other.send("still there")
        self.assertEqual(other.receive(), "still there")

    @needs("websockets")
    def test_another_implementation_understands_us(self):
        from websockets.sync.client import connect
        with connect(f"ws://127.0.0.1:{self.server.port}/") as client:
            for message in ("Hello ☃", b"\0" * 100_000, ""):
                client.send(message)
                self.assertEqual(client.recv(timeout=SECONDS), message)
            client.send(iter(["frag", "mented"]))
            self.assertEqual(client.recv(timeout=SECONDS), "fragmented")
            self.assertTrue(client.ping().wait(SECONDS))


class Bridge(ServerCase):
    """A kernel through the server: the same Frontend, another wire."""

    def setUp(self):
        self.kernel_id, self.frontend, _ = self.start_kernel()

    def run_cell(self, code, **options):
        return self.frontend.finish(self.frontend.start(code, **options), seconds=60)

    def handshake(self, path=None, **headers):
        path = path or f"/api/kernels/{self.kernel_id}/channels"
        headers = {"Authorization": f"token {self.server.token}", **headers}
        client = WebSocketClient(self.server.port, path, headers)
        self.addCleanup(client.close)
        return client

    def cookie(self):
        reply = self.server.get(f"/tree?token={self.server.token}", Authorization=None)
        return reply.headers["Set-Cookie"].partition(";")[0]

    def test_the_page_connects_with_its_cookie(self):
        client = self.handshake(Cookie=self.cookie(), Authorization=None,
                                Origin=f"http://127.0.0.1:{self.server.port}")
        self.assertEqual(client.status, 101)

    def test_a_cell_runs_through_the_server(self):
        cell = self.run_cell("print('☃')\n6 * 7")
        self.assertMessages(cell, "busy execute_input stream execute_result idle")
        self.assertEqual((cell.text(), cell.result, cell.status), ("☃\n", "42", "ok"))

    def test_a_message_names_its_channel_and_type_on_top(self):
        cell = self.run_cell("1")
        for channel, message in [("shell", cell.reply), *[("iopub", m) for m in cell.messages]]:
            self.assertEqual(
                (message["channel"], message["msg_type"], message["msg_id"]),
                (channel, message["header"]["msg_type"], message["header"]["msg_id"]))
            self.assertEqual(message["buffers"], [])

    def test_input_travels_both_ways(self):
        self.frontend.typed = ["Ada ☃"]
        cell = self.run_cell("input('Name? ')")
        self.assertEqual((cell.questions, cell.result),
                         ([{"prompt": "Name? ", "password": False}], "'Ada ☃'"))

    def test_control_messages_pass_while_a_cell_runs(self):
        cell = self.frontend.start("print('ready')\nwhile True: pass")
        self.frontend.until(lambda: cell.text())
        self.assertEqual(self.frontend.request("interrupt_request", "control").status, "ok")
        self.assertFails(self.frontend.finish(cell), "KeyboardInterrupt")

    def test_two_hundred_thousand_lines_arrive_whole_and_in_order(self):
        cell = self.run_cell("for i in range(200_000): print(i)")
        self.assertTrue(cell.text() == "".join(f"{i}\n" for i in range(200_000)),
                        f"{len(cell.text())} characters arrived")

    def test_large_messages_pass_in_both_directions(self):
        cell = self.run_cell("'" + "x" * 5_000_000 + "'")
        self.assertEqual(len(cell.result), 5_000_002)

    def test_every_frontend_sees_the_output_and_only_the_asker_the_reply(self):
        """P2."""
        other = self.server.frontend(self.kernel_id)
        self.addCleanup(other.wire.close)
        cell = self.run_cell("print('for all')")
        other.until(lambda: "for all\n" in "".join(
            m["content"].get("text", "") for m in other.unasked))
        other.request("kernel_info_request")
        self.assertEqual([m for m in other.unasked if m["channel"] == "shell"], [])
        self.assertEqual(cell.text(), "for all\n")

    def test_a_frontend_that_leaves_harms_no_other(self):
        other = self.server.frontend(self.kernel_id)
        other.wire.close()
        self.assertEqual(self.run_cell("6 * 7").result, "42")

    def test_a_kernel_outlives_its_frontends(self):
        self.run_cell("kept = 'kept'")
        self.frontend.wire.close()
        again = self.server.frontend(self.kernel_id)
        self.addCleanup(again.wire.close)
        self.assertEqual(again.finish(again.start("kept")).result, "'kept'")

    def test_bad_messages_from_a_page_harm_nobody(self):
        for text in ("", "{", "[]", "null", "7", "{}", '{"channel": "shell"}',
                     '{"channel": "nonsense", "header": {}, "content": {}}',
                     '{"channel": "iopub", "header": {"msg_type": "status"}, "content": {}}',
                     '{"channel": "shell", "header": null, "content": null}'):
            with self.subTest(text):
                client = self.handshake()
                client.send(text)
                self.assertEqual(self.run_cell("6 * 7").result, "42")
        self.assertNotIn("Traceback", self.server.process.output)

    def test_bad_messages_from_a_kernel_harm_nobody(self):
        cell = self.run_cell(
            "import sys; write = sys.stdout.write\n"
            "outbox = write.__closure__[write.__code__.co_freevars.index('outbox')].cell_contents\n"
            "for bad in ([], 'text', None):\n"
            "    for name in ('status', 'input_request', 'execute_request'):\n"
            "        outbox.publish(name, bad)\n"
            "        outbox.publish(name, {}, parent={'msg_id': [], 'msg_type': []})")
        self.assertEqual(cell.status, "ok", cell)
        self.assertEqual(self.run_cell("6 * 7").result, "42")
        self.assertReply(self.server.delete(f"/api/kernels/{self.kernel_id}"), 204)

    def test_json_as_deep_as_a_well_from_a_kernel_ends_nobodys_thread(self):
        cell = self.run_cell(
            "import sys; write = sys.stdout.write\n"
            "outbox = write.__closure__[write.__code__.co_freevars.index('outbox')].cell_contents\n"
            "deep = b'[' * 100_000 + b']' * 100_000\n"
            "for place in (0, 1):   # what the server reads\n"
            "    parts = outbox.session.pack(outbox.session.message('status', {}))[2:]\n"
            "    parts[place] = deep\n"
            "    outbox.queue.extend(('iopub', [b'kernel.', b'<IDS|MSG>', "
            "outbox.session.sign(parts), *parts]))")
        self.assertEqual(cell.status, "ok", cell)
        self.assertEqual(self.run_cell("6 * 7").result, "42")

    def test_wrong_frames_close_with_their_code(self):
        for data, code in ((frame(TEXT, b"{}", mask=None), 1002), (frame(TEXT, b"\xff"), 1007),
                           (frame(BINARY, b"", length=1 << 62), 1009)):
            with self.subTest(code):
                client = self.handshake()
                client.socket.sendall(data)
                while client.receive() is not None:
                    pass
                self.assertEqual(client.close_code, code)

    def test_who_may_not_connect_gets_no_websocket(self):
        for expected, headers in [
                (403, {"Authorization": None}), (403, {"Authorization": "token wrong"}),
                (403, {"Origin": "http://evil.example", "Cookie": self.cookie(),
                       "Authorization": None}), (403, {"Host": "evil.example"}),
                (400, {"Sec-WebSocket-Key": None}), (400, {"Upgrade": None}),
                (400, {"Sec-WebSocket-Key": "short"}), (400, {"Connection": "close"}),
                (426, {"Sec-WebSocket-Version": "8"})]:
            with self.subTest(headers):
                self.assertEqual(self.handshake(**headers).status, expected)
        wrong_version = self.handshake(**{"Sec-WebSocket-Version": "8"})
        self.assertEqual(wrong_version.headers["sec-websocket-version"], "13")
        nobody = "/api/kernels/00000000-0000-0000-0000-000000000000/channels"
        self.assertEqual(self.handshake(nobody).status, 404)

    def test_the_kernels_end_closes_the_websocket(self):
        self.server.delete(f"/api/kernels/{self.kernel_id}")
        with self.assertRaises((EOFError, ConnectionError)):
            self.frontend.until(lambda: False)

    @needs("websockets")
    def test_another_client_runs_code(self):
        from websockets.sync.client import connect
        url = f"ws://127.0.0.1:{self.server.port}/api/kernels/{self.kernel_id}/channels"
        message = kernel.Session("").message("kernel_info_request", {})
        with connect(url, additional_headers={
                "Authorization": f"token {self.server.token}"}) as client:
            client.send(json.dumps({**message, "channel": "shell", "buffers": []}))
            types = set()
            while "kernel_info_reply" not in types:
                types.add(json.loads(client.recv(timeout=SECONDS))["header"]["msg_type"])


class Journal(ServerCase):
    """What the server keeps for a page that is away, and for one that comes new."""

    def setUp(self):
        self.kernel_id, self.plain, _ = self.start_kernel()

    def follow(self, session=None):
        """A page: it hears the whole conversation, from what no file holds yet."""
        page = Page(WebSocketWire(self.server, self.kernel_id, session, journal=1))
        self.addCleanup(page.wire.close)
        return page

    def test_what_was_printed_while_nobody_listened_is_there_for_a_new_page(self):
        page = self.follow()
        cell = page.start("import time\nfor i in range(50): print(i); time.sleep(0.01)\n6 * 7",
                          cell="a")
        page.until(lambda: cell.text())
        page.wire.close()
        again = self.follow()
        again.until(lambda: "a" in again.cells and again.cells["a"].is_done)
        found = again.cells["a"]
        self.assertEqual(found.text(), "".join(f"{i}\n" for i in range(50)))
        self.assertMessages(found, "busy execute_input stream execute_result idle")
        self.assertEqual((found.result, found.status), ("42", "ok"))

    def test_a_page_that_lost_its_connection_gets_nothing_twice_and_misses_nothing(self):
        page = self.follow()
        code = "import time\nfor i in range(300): print(i, flush=True); time.sleep(0.002)"
        cell = page.start(code, cell="a")
        for _ in range(3):
            page.until(lambda cell=cell: len(cell.messages) > 5)
            lost, page = page, self.follow(page.session.session)
            page.until(lambda page=page: "a" in page.cells)
            cell = page.cells["a"]
            lost.wire.close()
        page.until(lambda: cell.is_done)
        self.assertEqual(cell.text(), "".join(f"{i}\n" for i in range(300)))
        ids = [message["header"]["msg_id"] for message in cell.messages]
        self.assertEqual(len(ids), len(set(ids)))

    def test_a_new_page_learns_which_cells_run_and_which_are_queued(self):
        page = self.follow()
        first = page.start("input()", cell="runs")
        page.start("1", cell="waits")
        page.until(lambda: first.questions)
        other = self.follow()
        other.until(lambda: {"runs", "waits"} <= set(other.cells))
        other.until(lambda: other.cells["runs"].questions
                    and other.cells["runs"].story == "busy execute_input")
        self.assertEqual(other.cells["waits"].story, "")
        page.type("", first.question)
        other.until(lambda: other.cells["waits"].is_done)
        self.assertEqual(other.cells["waits"].result, "1")

    def test_a_question_is_answered_after_a_reload(self):
        page = self.follow()
        cell = page.start("print(input('Name? '))", cell="a")
        page.until(lambda: cell.questions)
        page.wire.close()
        again = self.follow()
        again.until(lambda: "a" in again.cells and again.cells["a"].questions)
        again.type("Ada", again.cells["a"].question)
        again.until(lambda: again.cells["a"].is_done)
        self.assertEqual(again.cells["a"].text(), "Ada\n")

    def test_another_page_may_answer_a_question(self):
        page, other = self.follow(), self.follow()
        cell = page.start("print(input('Name? '))", cell="a")
        other.until(lambda: "a" in other.cells and other.cells["a"].questions)
        page.until(lambda: cell.questions)
        other.type("Ada", other.cells["a"].question)
        page.until(lambda: cell.is_done and cell.answers)
        self.assertEqual((cell.text(), cell.answers), ("Ada\n", [{"value": "Ada"}]))

    def test_a_password_is_not_kept(self):
        page = self.follow()
        cell = page.start("import getpass; len(getpass.getpass())", cell="a")
        page.until(lambda: cell.questions)
        page.type("geheim", cell.question)
        page.until(lambda: cell.is_done)
        self.assertEqual(cell.result, "6")
        again = self.follow()
        again.until(lambda: "a" in again.cells and again.cells["a"].is_done)
        self.assertEqual(again.cells["a"].answers, [{"value": ""}])

    def test_two_pages_see_each_others_cells(self):
        page, other = self.follow(), self.follow()
        cell = page.start("print('for both'); 1 / 0", cell="a")
        page.until(lambda: cell.is_done)
        other.until(lambda: "a" in other.cells and other.cells["a"].is_done)
        self.assertEqual(other.cells["a"].story, cell.story)
        self.assertFails(other.cells["a"], "ZeroDivisionError")

    def test_what_is_saved_is_not_told_again(self):
        page = self.follow()
        saved, kept = (page.start(f"print({n})", cell=n) for n in "12")
        page.until(lambda: saved.is_done and kept.is_done)
        page.forget(saved)
        page.request("kernel_info_request")
        again = self.follow()
        again.until(lambda: "2" in again.cells and again.cells["2"].is_done)
        self.assertNotIn("1", again.cells)

    def test_what_a_task_prints_after_the_save_is_kept_too(self):
        page = self.follow()
        cell = page.start("import asyncio; go = asyncio.Event()\n"
                          "async def late(): await go.wait(); print('late')\n"
                          "task = asyncio.create_task(late()); print('early')", cell="a")
        page.until(lambda: cell.is_done)
        page.forget(cell)
        other = page.start("go.set()", cell="b")
        page.until(lambda: other.is_done and "late" in cell.text())
        again = self.follow()
        again.until(lambda: "a" in again.cells and "late" in again.cells["a"].text())
        self.assertEqual((again.cells["a"].text(), again.cells["a"].is_done), ("late\n", True))

    def test_too_much_output_loses_its_beginning_and_says_so(self):
        page = self.follow()
        cell = page.start("for i in range(60): print(f'<{i}>' + 'x' * 1_000_000)\n'end'", cell="a")
        page.until(lambda: cell.text())
        page.wire.close()
        self.plain.finish(self.plain.start("'after'"), seconds=60)
        again = self.follow()
        again.until(lambda: "a" in again.cells and again.cells["a"].is_done)
        found = again.cells["a"]
        self.assertRegex(found.text("stderr"), r"MB of this output are missing here")
        self.assertNotIn("<0>", found.text())
        self.assertIn("<59>", found.text())
        self.assertLess(len(found.text()), 40_000_000)
        self.assertEqual((found.result, found.status), ("'end'", "ok"))

    def test_a_kernels_death_ends_the_cells_of_a_page_that_is_away(self):
        page = self.follow()
        cell = page.start("print('before'); input()", cell="a")
        page.start("1", cell="b")
        page.until(lambda: cell.questions)
        page.wire.close()
        self.assertReply(self.server.post(f"/api/kernels/{self.kernel_id}/restart"), 200)
        again = self.follow()
        again.until(lambda: "a" in again.cells and again.cells["a"].is_done)
        again.until(lambda: "b" in again.cells and again.cells["b"].is_done)
        self.assertEqual([again.cells[name].status for name in "ab"], ["error", "aborted"])
        self.assertEqual(again.cells["a"].text(), "before\n")

    def test_another_client_that_returns_gets_what_it_missed_like_from_jupyter_server(self):
        """P3."""
        wire = WebSocketWire(self.server, self.kernel_id, "same")
        client = Frontend(wire)
        client.greet()
        cell = client.start("print('one'); input(); print('two')\n3")
        client.until(lambda: cell.questions and cell.text())
        wire.close()
        client.wire = WebSocketWire(self.server, self.kernel_id, "same")
        self.addCleanup(client.wire.close)
        client.type("", cell.question)
        client.finish(cell)
        self.assertEqual((cell.text(), cell.result), ("one\ntwo\n", "3"))
        self.assertMessages(cell, "busy execute_input stream execute_result idle")

    def test_a_client_that_returns_gets_its_reply_while_a_page_looks_on(self):
        self.follow()
        client = Frontend(WebSocketWire(self.server, self.kernel_id, "same"))
        client.greet()
        cell = client.start("import time; print('one'); time.sleep(0.5); print('two')\n3")
        client.until(lambda: cell.text())
        client.wire.close()
        self.plain.request("is_complete_request", code="1")
        wait_until(lambda: self.server.get(f"/api/kernels/{self.kernel_id}").json[
            "execution_state"] == "idle")
        client.wire = WebSocketWire(self.server, self.kernel_id, "same")
        self.addCleanup(client.wire.close)
        client.finish(cell)
        self.assertEqual((cell.text(), cell.result, cell.status), ("one\ntwo\n", "3", "ok"))

    def test_an_answer_may_come_before_the_connection_that_was_asked_has_ended(self):
        client = Frontend(WebSocketWire(self.server, self.kernel_id, "same"))
        client.greet()
        cell = client.start("input()")
        client.until(lambda: cell.questions)
        client.ask("is_complete_request", code="#" * 20_000_000)   # keeps its bridge busy
        client.wire = WebSocketWire(self.server, self.kernel_id, "same")
        self.addCleanup(client.wire.close)
        client.type("Ada", cell.question)
        self.assertEqual(client.finish(cell).result, "'Ada'")

    def test_what_a_connection_could_not_take_is_there_for_the_next_of_its_session(self):
        first = Frontend(WebSocketWire(self.server, self.kernel_id, "same"))
        self.addCleanup(first.wire.close)
        first.greet()
        self.plain.wire.close()
        first.start("for i in range(14): print(f'<{i}>' + 'x' * 1_500_000)\n"
                    "open('said', 'w').close()")
        wait_until((self.root / "said").exists)   # its bridge cannot send it all
        second = Frontend(WebSocketWire(self.server, self.kernel_id, "same"))
        self.addCleanup(second.wire.close)
        second.until(lambda: "idle" in second.log)
        with contextlib.suppress(EOFError, ConnectionError):
            first.until(lambda: False)
        texts = ["".join(each["content"]["text"] for each in messages if word(each) == "stream")
                 for messages in (first.answers.popitem()[1].messages, second.unasked)]
        marks = [[int(mark) for mark in re.findall(r"<(\d+)>", text)] for text in texts]
        self.assertEqual({*marks[0], *marks[1]}, {*range(14)}, marks)
        self.assertEqual(marks[1], [*range(marks[1][0], 14)])

    def test_a_second_connection_of_a_session_ends_the_first(self):
        first = WebSocketWire(self.server, self.kernel_id, "same")
        Frontend(first).greet()   # by now its bridge is there
        second = Frontend(WebSocketWire(self.server, self.kernel_id, "same"))
        self.addCleanup(second.wire.close)
        with self.assertRaises((EOFError, ConnectionError)):
            while True:
                first.receive(SECONDS)
        self.assertEqual(second.finish(second.start("6 * 7")).result, "42")

    def connections(self):
        return self.server.get(f"/api/kernels/{self.kernel_id}").json["connections"]

    def test_a_page_that_reads_nothing_holds_up_no_other(self):
        """P4."""
        self.follow()
        cell = self.plain.start("for _ in range(50): print('x' * 1_000_000)\n'done'")
        self.plain.finish(cell, seconds=60)
        self.assertEqual((cell.result, len(cell.text())), ("'done'", 50_000_050))
        self.assertEqual(self.connections(), 2)   # nobody waited until it was cut off

    def test_iopub_is_read_again_as_soon_as_a_page_has_room(self):
        """Nobody else would tell the watcher: it would look a second later."""
        ends = socket.socketpair()
        for end in ends:
            self.addCleanup(end.close)
        process = unittest.mock.Mock(requests=minijupyter.Mailbox(), has_room=True, is_gone=False)
        inbox = minijupyter.PageMailbox("page", None)
        bridge = minijupyter.Bridge(minijupyter.WebSocket(ends[0]), process, inbox)
        bridge.poller = zmq.Poller()
        bridge.poller.register(inbox.fileno(), zmq.POLLIN)
        for size, is_woken in (1_000, False), (minijupyter.MOST_WAITING + 1, True):
            entry = minijupyter.said(kernel.Session("key"), "iopub", "status", {})
            entry.size = size
            inbox.put([entry])
            bridge.step()
            self.assertEqual((process.requests.is_signalled, inbox.size), (is_woken, 0))

    def test_a_page_far_behind_the_others_is_cut_off_and_may_come_back(self):
        """P4."""
        stuck = self.follow()
        own = stuck.start("6 * 7", cell="a")
        cell = self.plain.start("import time\nfor _ in range(30): print('x' * 5_000_000); "
                                "time.sleep(0.1)\n'done'")
        self.plain.finish(cell, seconds=60)
        self.assertEqual((cell.result, len(cell.text())), ("'done'", 150_000_030))
        self.assertEqual(self.connections(), 1)
        again = self.follow(stuck.session.session)
        again.until(lambda: "a" in again.cells and again.cells["a"].is_done)
        self.assertEqual((again.cells["a"].result, own.is_done), ("42", False))

    @unittest.skipUnless(Path("/proc/self/smaps_rollup").exists(), "no /proc tells of memory")
    def test_cells_with_much_code_count_like_output(self):
        page = self.follow()
        before, = memory(self.server.process.pid)
        for number in range(40):
            cell = page.start(f"{number} #" + "x" * 3_000_000, cell=str(number))
            page.until(lambda cell=cell: cell.is_done)
            page.forget(cell)
        self.assertLess(next(memory(self.server.process.pid)) - before, 90)

    @unittest.skipUnless(Path("/proc/self/smaps_rollup").exists(), "no /proc tells of memory")
    def test_what_no_page_reads_waits_in_the_kernel_and_not_in_the_server(self):
        """P4. The kernel's memory holds some 100 MB, ZeroMQ's queues and the system the rest."""
        self.plain.wire.close()
        stuck = self.follow()
        before, = memory(self.server.process.pid)
        stuck.start("for i in range(600): print(i, 'x' * 1_000_000)\n"
                    "open('printed', 'w')", cell="a")
        time.sleep(3)
        self.assertFalse((self.root / "printed").exists())
        self.assertLess(next(memory(self.server.process.pid)) - before, 200)
        self.assertReply(self.server.post(f"/api/kernels/{self.kernel_id}/interrupt"), 204)

    def test_a_page_that_is_not_read_because_the_kernel_is_busy_is_not_silent(self):
        with unittest.mock.patch.multiple(minijupyter, PING_SECONDS=0.1, MOST_UNSENT=0):
            server = self.here()
            kernel_ = server.kernels.start()
            self.addCleanup(kernel_.shutdown)
            address = types.SimpleNamespace(port=server.server_port, token="secret")
            client = WebSocketWire(address, kernel_.id).client
            self.addCleanup(client.close)
            pings = 0
            while pings < 6:   # who is silent for three of them is gone
                pings += client.receive_frame()[1] == PING

    def test_a_restart_need_not_wait_for_a_page_that_reads_nothing(self):
        self.follow().start("import time\nfor _ in range(50): print('x' * 1_000_000)\n"
                            "open('printed', 'w'); time.sleep(60)", cell="a")
        wait_until((self.root / "printed").exists, SECONDS)   # `plain` does not read it either
        self.assertReply(self.server.post(f"/api/kernels/{self.kernel_id}/restart"), 200)
        self.assertEqual(self.connections(), 2)   # nobody waited until they were cut off


# -- the whole of RFC 6455, and compression --

def certificate(folder):
    """(certificate file, key file) for 127.0.0.1, signed by itself."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", key, "-out", cert, "-subj", "/CN=127.0.0.1", "-addext",
         "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return cert, key


def deflated(data, wbits=-15, tail=b"\0\0\xff\xff"):
    """A message's payload as permessage-deflate sends it (RFC 7692 7.2.1)."""
    packer = zlib.compressobj(wbits=wbits)
    return (packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)).removesuffix(tail)


@needs("kosoku")
class Autobahn(Case):
    """The cases of the Autobahn test suite, under its numbers, against the echo server."""

    # What the RFC leaves open, or demands only of the strict: 6.4.3 and 6.4.4 cut one frame into
    # pieces of TCP, and a frame is decoded when it is whole. 7.1.6 races with itself.
    LENIENT = {"6.4.3", "6.4.4", "7.1.6", "7.13.1", "7.13.2"}

    @classmethod
    def setUpClass(cls):
        cls.server = EchoServer(extensions=[minijupyter.offer_deflate])
        cls.addClassCleanup(cls.server.end)
        # The suite takes an echo for text when it comes back uncompressed; so all are compressed.
        cls.enterClassContext(
            unittest.mock.patch.object(minijupyter, "WORTH_DEFLATING", 0))

    @classmethod
    def enterClassContext(cls, context):   # TestCase has it from Python 3.11 on
        context.__enter__()
        cls.addClassCleanup(context.__exit__, None, None, None)

    def assertPasses(self, *cases):
        """Each case ends as the RFC demands; a failed one raises what went wrong."""
        from kosoku import run_fuzzingclient
        url = f"ws://127.0.0.1:{self.server.port}/"
        results = asyncio.run(asyncio.wait_for(
            run_fuzzingclient(url, cases, concurrency=8), 4 * SECONDS))
        self.assertGreaterEqual(len(results), len(cases))
        for result in results:
            if result.case_id not in self.LENIENT:
                self.assertEqual((result.behavior.value, result.behavior_close.value),
                                 ("OK", "OK"), f"{result.case_id}: {result.description}")

    def test_1_messages_of_every_size_come_back(self):
        self.assertPasses("1.*")

    def test_2_pings_are_answered_and_pongs_are_not(self):
        self.assertPasses("2.*")

    def test_3_reserved_bits_end_the_connection(self):
        self.assertPasses("3.*")

    def test_4_reserved_opcodes_end_the_connection(self):
        self.assertPasses("4.*")

    def test_5_fragments_are_put_together_in_order(self):
        self.assertPasses("5.*")

    def test_6_only_utf_8_is_text(self):
        self.assertPasses("6.*")

    def test_7_the_closing_handshake_is_kept_with_valid_codes_only(self):
        self.assertPasses("7.*")

    def test_9_large_messages_and_thousands_of_fragments_pass(self):
        self.assertPasses("9.*")

    def test_10_a_message_may_be_fragmented_by_the_client_as_it_likes(self):
        self.assertPasses("10.*")

    def test_12_compressed_messages_of_every_size_come_back(self):
        self.assertPasses("12.1.1", "12.2.4", "12.3.1", "12.4.11", "12.5.4")

    def test_13_the_parameters_of_compression_are_negotiated(self):
        self.assertPasses(*[f"13.{number}.3" for number in range(1, 8)])


class WebSocketCompression(Case):
    """permessage-deflate: each message by itself, and never more than the limit."""

    OFFER = {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"}

    @classmethod
    def setUpClass(cls):
        cls.server = EchoServer(extensions=[minijupyter.offer_deflate])
        cls.addClassCleanup(cls.server.end)

    def connect(self, port=None, **headers):
        client = WebSocketClient(port or self.server.port, headers=headers)
        self.addCleanup(client.close)
        return client

    def feed(self, *frames, most_bytes=1000):
        parser = minijupyter.FrameParser(most_bytes, minijupyter.Deflate())
        return [message for each in frames for message in parser.feed(each)]

    def test_the_first_offer_that_can_be_met_is_accepted(self):
        none = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
        for offer, answer in [
                ("permessage-deflate", none), ("x-other, permessage-deflate; "
                 "client_no_context_takeover", none), ("permessage-deflate; "
                 "server_max_window_bits=10", none + "; server_max_window_bits=10"),
                ('permessage-deflate; server_max_window_bits="9"',
                 none + "; server_max_window_bits=9"),
                # zlib has no raw window of 8; what is unknown, doubled or out of range is refused
                ("permessage-deflate; server_max_window_bits=8, permessage-deflate", none),
                ("permessage-deflate; server_max_window_bits", None),
                ("permessage-deflate; client_max_window_bits=16", None),
                ("permessage-deflate; server_no_context_takeover=1", None),
                ("permessage-deflate; unheard_of", None), ("permessage-deflate; "
                 "client_no_context_takeover; client_no_context_takeover", None), ("", None)]:
            with self.subTest(offer):
                client = self.connect(**{"Sec-WebSocket-Extensions": offer})
                self.assertEqual(client.status, 101)
                self.assertEqual(client.headers.get("sec-websocket-extensions"), answer)

    def test_a_peer_on_this_machine_is_not_asked_to_compress(self):
        plain = EchoServer()
        self.addCleanup(plain.end)
        client = self.connect(plain.port, **self.OFFER)
        self.assertNotIn("sec-websocket-extensions", client.headers)

    def test_a_large_message_is_compressed_and_a_small_one_is_not(self):
        client = self.connect(**self.OFFER)
        for message, opcode in (("x" * 100_000, 0x40 | TEXT), (b"y" * 100_000, 0x40 | BINARY),
                                ("small", TEXT)):
            client.send(message)
            while not client.buffer:
                client.more(SECONDS)
            self.assertEqual(client.buffer[0] & 0x7f, opcode)
            payload = client.receive_frame()[2]
            if opcode & 0x40:
                self.assertLess(len(payload), 1000)
                payload = zlib.decompressobj(-15).decompress(payload + b"\0\0\xff\xff")
            self.assertEqual(payload, message if isinstance(message, bytes) else message.encode())

    def test_a_compressed_message_may_be_fragmented_anywhere(self):
        data = deflated("☃ Hello".encode())
        for at in range(len(data) + 1):
            frames = (frame(0x40 | TEXT, data[:at], fin=False), frame(PING, b"?"),
                      frame(0, data[at:]))
            self.assertEqual(self.feed(*frames), [(PING, b"?"), (TEXT, "☃ Hello")])

    def test_the_examples_of_rfc_7692_are_read(self):
        for data in ("f248cdc9c90700", "000500faff48656c6c6f00", "f348cdc9c9070000",
                     "f2480500000 0ffffcac9c90700".replace(" ", "")):   # 7.2.3
            with self.subTest(data):
                message = frame(0x40 | TEXT, bytes.fromhex(data))
                self.assertEqual(self.feed(message), [(TEXT, "Hello")])

    def test_a_bomb_is_refused_before_it_goes_off(self):
        bomb = deflated(bytes(10_000_000))
        for frames in ([frame(0x40 | BINARY, bomb)],
                       [frame(0x40 | BINARY, bomb[:9], fin=False), frame(0, bomb[9:])]):
            with self.assertRaises(minijupyter.WebSocketError) as caught:
                self.feed(*frames, most_bytes=100_000)
            self.assertEqual(caught.exception.code, 1009)

    def test_what_cannot_be_inflated_or_was_not_agreed_on_is_refused(self):
        for code, *frames in [
                (1007, frame(0x40 | TEXT, b"\xff\xff\xff")),
                (1007, frame(0x40 | TEXT, deflated(b"\xff"))),
                (1002, frame(0x40 | PING, b"")),
                (1002, frame(TEXT, b"", fin=False), frame(0x40, b"")),
                (1002, frame(0x20 | TEXT, b""))]:
            with self.subTest(frames), self.assertRaises(minijupyter.WebSocketError) as caught:
                self.feed(*frames)
            self.assertEqual(caught.exception.code, code)

    @needs("websockets")
    def test_another_implementation_inflates_what_we_deflate(self):
        from websockets.sync.client import connect
        with connect(f"ws://127.0.0.1:{self.server.port}/") as client:
            self.assertIn("permessage-deflate", client.response.headers["Sec-WebSocket-Extensions"])
            for message in ("Hello ☃ " * 10_000, os.urandom(100_000), "", "small"):
                client.send(message)
                self.assertEqual(client.recv(timeout=SECONDS), message)


class WebSocketCloseCodes(Case):
    def test_every_code_is_valid_or_refused_as_the_rfc_says(self):
        valid = {1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)}
        for code in range(1 << 16):
            payload = code.to_bytes(2, "big")
            if code in valid:
                self.assertEqual(minijupyter.close_code(payload), code)
            else:
                with self.assertRaises(minijupyter.WebSocketError) as caught:
                    minijupyter.close_code(payload)
                self.assertEqual(caught.exception.code, 1002)

    def test_a_long_reason_is_cut_between_characters(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            minijupyter.WebSocket(ours).close(1011, "☃" * 100)
            _, opcode, payload = take_frame(bytearray(theirs.recv(1000)))
        self.assertEqual((opcode, payload[2:].decode()), (CLOSE, "☃" * 41))

    def test_messages_before_a_mistake_still_count(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(frame(TEXT, b"one") + frame(PING, b"?") + frame(TEXT, b"two")
                           + frame(3))
            theirs.shutdown(socket.SHUT_WR)
            websocket, messages = minijupyter.WebSocket(ours), []
            while not websocket.is_closed:
                messages += websocket.arrived()
            answers = bytearray(theirs.recv(1000))
        self.assertEqual(messages, ["one", "two"])
        self.assertEqual([take_frame(answers)[1] for _ in range(2)], [PONG, CLOSE])


    def test_who_broke_a_rule_and_goes_on_talking_still_hears_why(self):
        server = EchoServer()
        self.addCleanup(server.end)
        client = WebSocketClient(server.port)
        self.addCleanup(client.close)
        client.socket.sendall(frame(3) + bytes(1 << 20))
        with contextlib.suppress(ConnectionError):   # the server need not hear it all
            client.socket.sendall(bytes(4 << 20))
        self.assertIsNone(client.receive())
        self.assertEqual(client.close_code, 1002)


@needs_programs("openssl")
class WebSocketOverTls(Case):
    """An SSL socket may hold bytes of which the TCP socket beneath knows nothing."""

    def setUp(self):
        cert, key = certificate(self.folder())
        ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ours.load_cert_chain(cert, key)
        self.client = ssl.create_default_context(cafile=cert)
        self.server = EchoServer(context=ours)
        self.addCleanup(self.server.end)

    @needs("websockets")
    def test_messages_go_both_ways(self):
        # The client with threads reads and writes TLS at the same time, and stands still at times.
        from websockets.asyncio.client import connect

        async def echo():
            address = f"wss://127.0.0.1:{self.server.port}/"
            async with connect(address, ssl=self.client, max_size=None) as client:
                for message in ("Hello", b"x" * 1_000_000, ""):
                    await client.send(message)
                    self.assertEqual(await asyncio.wait_for(client.recv(), SECONDS), message)

        asyncio.run(echo())

    def handshake(self, behind=b""):
        """The TLS socket of a client that has just sent its handshake, and what is behind it."""
        plain = self.enterContext(
            socket.create_connection(("127.0.0.1", self.server.port), SECONDS))
        client = self.enterContext(
            self.client.wrap_socket(plain, server_hostname="127.0.0.1"))
        head = ("GET / HTTP/1.1", "Host: 127.0.0.1", "Upgrade: websocket", "Connection: Upgrade",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", "", "")
        client.sendall("\r\n".join(head).encode() + behind)
        return client

    def test_a_frame_glued_to_the_handshake_is_read(self):
        client, answer = self.handshake(frame(TEXT, b"glued")), b""
        while not answer.endswith(b"\r\n\r\n\x81\x05glued"):
            answer += client.recv(1000)

    def test_a_connection_that_is_cut_off_from_another_thread_does_not_go_on_in_clear(self):
        client = self.handshake()
        websocket = minijupyter.WebSocket(client)
        websocket.abort()
        self.assertIsNotNone(client.version())   # it still speaks TLS
        websocket.send("secret")
        self.assertTrue(websocket.is_closed)

    def test_has_bytes_tells_what_tls_has_decrypted_already(self):
        client = self.handshake()
        websocket = minijupyter.WebSocket(client)
        self.assertFalse(websocket.has_bytes)
        client.recv(1)
        self.assertTrue(websocket.has_bytes)
        client.recv(1000)
        self.assertFalse(websocket.has_bytes)


# -- kernels by other people --

class KernelSpecs(ServerCase):
    """The same kernels as Jupyter finds, and the same commands for them."""

    FIELDS = ("argv", "env", "display_name", "language", "interrupt_mode", "metadata",
              "kernel_protocol_version")

    @classmethod
    def setUpClass(cls):
        cls.root = Path("never")   # each test has a server of its own

    def spec(self, folder, name, **fields):
        """A kernel.json that tells by its display_name where it lies."""
        fields = {"argv": [name, "{connection_file}"], "language": "none", **fields}
        path = folder / "kernels" / name
        path.mkdir(parents=True)
        (path / "kernel.json").write_text(json.dumps(
            {"display_name": str(path.relative_to(self.base)), **fields}))
        return path

    def setUp(self):
        self.base = self.folder()
        self.places = {name: self.base / name for name in (
            "first", "second", "data", "userbase/share/jupyter", "ipython")}
        for i, folder in enumerate(self.places.values()):
            for name in ("everywhere", *[f"from-{n}" for n in range(i, len(self.places))]):
                self.spec(folder, name)
        self.env = {
            "JUPYTER_PATH": os.pathsep.join(str(self.places[name]) for name in ("first", "second")),
            "JUPYTER_DATA_DIR": str(self.places["data"]), "PYTHONUSERBASE":
            str(self.base / "userbase"), "IPYTHONDIR": str(self.places["ipython"])}

    def ours(self, **env):
        server = self.own_server(env={**self.env, **env})
        specs = self.assertReply(server.get("/api/kernelspecs"), 200).json["kernelspecs"]
        server.end()
        return {name: entry["spec"] for name, entry in specs.items()}

    def theirs(self, **env):
        """What jupyter_client finds in the same environment."""
        output = subprocess.run(
            [sys.executable, "-m", "jupyter_client.kernelspecapp", "list", "--json"], check=True,
            capture_output=True, env=clean_environment(self.base, **{**self.env, **env})).stdout
        return {name: entry["spec"] for name, entry in json.loads(output)["kernelspecs"].items()}

    def assertAgree(self, **env):
        ours, theirs = self.ours(**env), self.theirs(**env)
        ours.pop("python3")   # this one is built in
        theirs["python3-installed"] = theirs.pop("python3")
        self.assertEqual(ours, theirs)
        return ours

    @needs("jupyter_client")
    def test_the_first_folder_that_has_a_name_wins_as_in_jupyter(self):
        specs = self.assertAgree()
        self.assertEqual(specs["everywhere"]["display_name"], "first/kernels/everywhere")
        self.assertEqual(specs["from-2"]["display_name"], "first/kernels/from-2")

    @needs("jupyter_client")
    def test_the_user_or_the_environment_comes_first_as_jupyter_is_told(self):
        self.spec(self.places["data"], "python3", language="python")
        for value in ("1", "0", "no", "TRUE"):
            with self.subTest(value):
                specs = self.assertAgree(JUPYTER_PREFER_ENV_PATH=value, JUPYTER_PATH="")
                is_user = specs["python3-installed"]["display_name"] == "data/kernels/python3"
                self.assertEqual(is_user, value in ("0", "no"))

    @needs("jupyter_client")
    def test_every_field_is_read_as_jupyter_reads_it(self):
        self.spec(self.places["first"], "full", env={"A": "$B"}, interrupt_mode="message",
                  metadata={"debugger": True}, kernel_protocol_version="5.4", mimetype="x/y",
                  codemirror_mode="shell")
        self.spec(self.places["first"], "Capitals")
        specs = self.assertAgree()
        self.assertEqual(set(specs["full"]), set(self.FIELDS))
        self.assertEqual(specs["full"]["interrupt_mode"], "message")
        self.assertIn("capitals", specs)

    def test_a_broken_kernel_json_hides_no_other(self):
        for i, text in enumerate(('{', '[]', 'null', '{}', '{"argv": []}', '{"argv": "python"}',
                                  '{"argv": [1]}', '{"argv": ["x"], "env": {"A": 1}}',
                                  '{"argv": ["x"], "interrupt_mode": "shout"}', '[' * 100_000,
                                  '{"argv": ["x"], "metadata": {"kernel_provisioner": 3}}')):
            path = self.spec(self.places["first"], f"broken-{i}")
            (path / "kernel.json").write_text(text)
        self.spec(self.places["first"], "not a name")
        (self.places["first"] / "kernels" / "no-folder").write_text("")
        names = set(self.ours())
        self.assertIn("everywhere", names)
        self.assertEqual({name for name in names if name.startswith(("broken", "no"))}, set())

    def test_a_kernel_that_only_a_provisioner_can_start_is_left_out(self):
        self.spec(self.places["first"], "remote", metadata={
            "kernel_provisioner": {"provisioner_name": "somewhere-else"}})
        self.spec(self.places["first"], "local", metadata={
            "kernel_provisioner": {"provisioner_name": "local-provisioner"}})
        names = set(self.ours())
        self.assertEqual(names & {"remote", "local"}, {"local"})

    @needs("jupyter_client")
    def test_the_command_is_filled_in_as_jupyter_does(self):
        from jupyter_client.kernelspec import KernelSpec
        from jupyter_client.manager import KernelManager
        file = str(self.base / "kernel-1.json")
        for argv in (["python", "{connection_file}"], ["python3", "-m", "x"], ["/bin/python", "-E"],
                     [f"python3.{sys.version_info[1]}"], ["python2.7"], ["python3.99"],
                     ["{prefix}/bin/x", "{resource_dir}/y", "{unknown}", "{}", "{ prefix }"],
                     ["x", "--file={connection_file}", "{connection_file}{connection_file}"]):
            with self.subTest(argv):
                manager = KernelManager(connection_file=file)
                manager._kernel_spec = KernelSpec(argv=argv, resource_dir="/resources")
                self.assertEqual(
                    minijupyter.fill_in(argv, {"connection_file": file, "prefix": sys.prefix,
                                               "resource_dir": "/resources"}),
                    manager.format_kernel_cmd())

    @needs("jupyter_client")
    def test_the_environment_is_filled_in_as_jupyter_does(self):
        from jupyter_client.kernelspec import KernelSpec
        from jupyter_client.provisioning import LocalProvisioner
        env = {"PS1": "$", "A": "$FIRST/x", "B": "${FIRST}x", "C": "$$FIRST", "D": "${FIRST",
               "E": "$UNKNOWN ${UNKNOWN}", "F": "100 $ $1", "PATH": "/mine:${PATH}"}
        with unittest.mock.patch.dict(os.environ, FIRST="first", PYTHONEXECUTABLE="/other"):
            for language in ("python", "bash"):
                spec = {"env": env, "language": language}
                local = LocalProvisioner(kernel_spec=KernelSpec(**spec), kernel_id="1")
                expected = asyncio.run(super(LocalProvisioner, local).pre_launch())["env"]
                ours = minijupyter.kernel_environment(spec)
                del ours["PLOTLY_RENDERER"]
                self.assertEqual(ours, expected)

    def test_logos_and_scripts_beside_the_kernel_json_are_served(self):
        path = self.spec(self.places["first"], "logos")
        for name in ("logo-64x64.png", "logo-svg.svg", "kernel.js", "other.txt"):
            (path / name).write_text(name)
        server = self.own_server(env=self.env)
        entry = server.get("/api/kernelspecs/logos").json
        self.assertEqual(set(entry["resources"]), {"logo-64x64", "logo-svg", "kernel.js"})
        for url in entry["resources"].values():
            self.assertEqual(server.get(url).body.decode(), url.rpartition("/")[2])
        (path / "more").mkdir()
        (path / "more" / "deep.js").write_text("deep.js")
        self.assertEqual(server.get("/kernelspecs/logos/more/deep.js").body, b"deep.js")
        for name in ("..%2feverywhere%2fkernel.json", "..", "more", "none", "nul%00"):
            self.assertReply(server.get(f"/kernelspecs/logos/{name}"), 404)
        self.assertReply(server.get("/api/kernelspecs/none"), 404)


NODE = HERE / ".ci-venv" / "node" / "node_modules"   # where .ci/run installs packages from npm
DENO = next(NODE.glob("@deno/*/deno"), NODE / "@deno" / "deno")
FOREIGN = {   # kernel -> command and fields of its spec, then cells and what comes of them
    "ipykernel": {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "cell": "print('☃')\n6 * 7", "prints": "☃\n", "result": "42", "interrupt_mode": "signal",
        "wrong": "1 / 0", "fails": "ZeroDivisionError",
        "endless": "import time\nprint('ready')\nwhile True: time.sleep(0.1)"},
    "bash": {
        "argv": [sys.executable, "-m", "bash_kernel", "-f", "{connection_file}"],
        "language": "bash", "env": {"PS1": "$"}, "cell": "echo ☃ $((6 * 7))", "prints": "☃ 42\n",
        "wrong": "ls /no/such/folder", "fails": "", "endless": "echo ready; sleep 1000"},
    "xpython": {   # from a wheel: it ends when it is interrupted
        "argv": [sys.executable, "-m", "xpython_launcher", "-f", "{connection_file}"],
        "cell": "print('☃')\n6 * 7", "prints": "☃\n", "result": "42",
        "wrong": "1 / 0", "fails": "<class 'ZeroDivisionError'>"},
    "deno": {      # so does this one
        "argv": [str(DENO), "jupyter", "--kernel", "--conn", "{connection_file}"],
        "language": "typescript", "cell": "console.log('☃');\n6 * 7", "prints": "☃\n",
        "result": "42", "wrong": "throw new TypeError('no')", "fails": "TypeError"},
    "ir": {
        "argv": ["R", "--slave", "-e", "IRkernel::main()", "--args", "{connection_file}"],
        "language": "R", "cell": "cat('1\\n')\n6 * 7", "prints": "1\n", "result": "[1] 42",
        "wrong": "stop('no')", "fails": "ERROR",
        "endless": "cat('ready\\n'); flush(stdout()); Sys.sleep(1000)"}}


class ForeignKernels(ServerCase):
    """Real kernels of other languages, by other people, under our server."""

    @classmethod
    def setUpClass(cls):
        cls.specs = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.specs.cleanup)
        for name, kernel_ in FOREIGN.items():
            fields = {key: kernel_[key] for key in ("language", "env") if key in kernel_}
            install_kernelspec(Path(cls.specs.name), name, kernel_["argv"], **fields)
        cls.options = {"env": {"JUPYTER_PATH": cls.specs.name, "DENO_NO_UPDATE_CHECK": "1"}}
        super().setUpClass()

    def run_cells(self, name):
        """A cell, a wrong one, an interrupt and a restart, as the table has them."""
        row = FOREIGN[name]
        reply = self.assertReply(self.server.post("/api/kernels", {"name": name}), 201)
        path = f"/api/kernels/{reply.json['id']}"
        self.addCleanup(self.server.delete, path)
        frontend = self.connect(path)
        self.assertCell(frontend, row)
        cell = frontend.finish(frontend.start(row["wrong"]))
        self.assertEqual((cell.status, cell.error.get("ename")), ("error", row["fails"]), cell)
        if "endless" in row:
            cell = frontend.start(row["endless"])
            frontend.until(lambda: "ready" in cell.text())
            self.interrupt(path, frontend, cell)
            self.assertNotEqual(cell.reply and cell.status, "ok")
        self.assertReply(self.server.post(f"{path}/restart"), 200)
        self.assertCell(self.connect(path), row)

    def interrupt(self, path, frontend, cell):
        """As a user does, again and again: bash misses one that comes between two commands. And
        when one comes between its command and its reply, it says idle and never replies."""
        for _ in range(4):
            self.assertReply(self.server.post(f"{path}/interrupt"), 204)
            with contextlib.suppress(TimeoutError):
                return frontend.until(lambda: cell.is_idle, seconds=SECONDS / 4)
        self.fail(f"goes on after four interrupts: {cell}")

    def connect(self, path):
        frontend = self.server.frontend(path.rpartition("/")[2])
        self.addCleanup(frontend.wire.close)
        return frontend

    def assertCell(self, frontend, row):
        """A cell prints and gives what the table says; Deno says idle before its last output."""
        cell = frontend.start(row["cell"])
        expected = row["prints"], [row["result"]] if "result" in row else []
        frontend.until(lambda: cell.is_done and (cell.text(), self.shown(cell)) == expected)
        self.assertEqual(cell.status, "ok", cell)

    def shown(self, cell):
        contents = cell.of("execute_result") + cell.of("display_data")
        return [re.sub(r"\x1b\[[\d;]*m", "", c["data"]["text/plain"]) for c in contents]

    @needs("ipykernel")
    def test_ipykernel_runs(self):
        self.run_cells("ipykernel")

    @needs("bash_kernel")
    def test_bash_runs(self):
        self.run_cells("bash")

    @needs("xpython_launcher")
    def test_xeus_python_runs(self):
        self.run_cells("xpython")

    @needs_programs(str(DENO))
    def test_deno_runs(self):
        self.run_cells("deno")

    @unittest.skipUnless(shutil.which("R"), "R with IRkernel is not installed")
    def test_r_runs(self):
        self.run_cells("ir")


# -- clients by other people --

SERVICES = """
const services = require('@jupyterlab/services');
const assert = require('assert');
const [baseUrl, token] = process.argv.slice(1);
const serverSettings = services.ServerConnection.makeSettings({
  baseUrl, token, wsUrl: baseUrl.replace('http', 'ws'), appendToken: true});
const until = async condition => {
  while (!await condition()) await new Promise(resolve => setTimeout(resolve, 10));
};
// Runs a cell: what it printed, its result, its reply's content; `answer` replies to its input().
async function run(kernel, code, answer) {
  const future = kernel.requestExecute({code, allow_stdin: answer !== undefined});
  const outcome = {text: '', result: null};
  future.onIOPub = message => {
    if (message.header.msg_type === 'stream') outcome.text += message.content.text;
    if (message.header.msg_type === 'execute_result')
      outcome.result = message.content.data['text/plain'];
  };
  future.onStdin = message =>
    kernel.sendInputReply({value: answer, status: 'ok'}, message.header);
  outcome.reply = (await future.done).content;
  return outcome;
}
(async () => {
%s
})().then(() => { console.log('done'); process.exit(0); },
          error => { console.error(error); process.exit(1); });
"""


@needs_programs("node", str(NODE / "@jupyterlab" / "services"))
class JupyterLabServices(ServerCase):
    """@jupyterlab/services, the library by which JupyterLab and Notebook 7 talk to a server."""

    def javascript(self, text):
        """Run an async function's body in node; an assertion that fails there fails here."""
        process = Process(["node", "-e", SERVICES % text, "--",
                           f"http://127.0.0.1:{self.server.port}/", self.server.token],
                          env={**os.environ, "NODE_PATH": str(NODE)})
        self.addCleanup(process.end)
        self.assertEqual(process.exit_code(3 * SECONDS), 0, process.output)
        self.assertTrue(process.output.endswith("done\n"), process.output)

    def test_files_are_made_saved_moved_copied_and_deleted(self):
        self.javascript("""
          const contents = new services.ContentsManager({serverSettings});
          const changes = [];
          contents.fileChanged.connect((_, change) => changes.push(change.type));
          const folder = await contents.newUntitled({type: 'directory'});
          let file = await contents.newUntitled({path: folder.path, type: 'file', ext: '.md'});
          const made = await contents.newUntitled({path: folder.path, type: 'notebook'});
          assert.strictEqual(file.path, 'Untitled Folder/untitled.md');
          await contents.save(file.path, {type: 'file', format: 'text', content: '# ☃'});
          assert.strictEqual((await contents.get(file.path)).content, '# ☃');
          file = await contents.rename(file.path, folder.path + '/über 100%.md');
          const copy = await contents.copy(file.path, folder.path);
          assert.strictEqual(copy.name, 'über 100%-Copy1.md');
          assert.strictEqual((await contents.get(
            copy.path, {format: 'base64', content: true})).content,
                             Buffer.from('# ☃').toString('base64'));
          const hashed = await contents.get(file.path, {content: false, hash: true});
          assert.strictEqual(hashed.hash_algorithm, 'sha256');
          const listed = await contents.get(folder.path);
          assert.deepStrictEqual(listed.content.map(model => model.name).sort(),
                                 ['Untitled.ipynb', 'über 100%-Copy1.md', 'über 100%.md']);
          const url = await contents.getDownloadUrl(file.path);
          const reply = await services.ServerConnection.makeRequest(url, {}, serverSettings);
          assert.strictEqual(await reply.text(), '# ☃');
          for (const path of [file.path, copy.path, made.path, folder.path])
            await contents.delete(path);
          await assert.rejects(contents.get(file.path),
                               error => error.response.status === 404 && !!error.message);
          assert.deepStrictEqual([...new Set(changes)].sort(),
                                 ['delete', 'new', 'rename', 'save']);
        """)
        self.assertEqual([path.name for path in self.root.iterdir()], [])

    def test_a_notebook_is_saved_and_its_checkpoint_restored(self):
        self.javascript("""
          const contents = new services.ContentsManager({serverSettings});
          const {path} = await contents.newUntitled({type: 'notebook'});
          const model = await contents.get(path, {type: 'notebook', content: true});
          const checkpoint = await contents.createCheckpoint(path);
          assert.deepStrictEqual((await contents.listCheckpoints(path)).map(c => c.id),
                                 [checkpoint.id]);
          model.content.cells = [{id: 'a', cell_type: 'markdown', metadata: {}, source: '☃'}];
          await contents.save(path, model);
          assert.strictEqual((await contents.get(path)).content.cells[0].source, '☃');
          await contents.restoreCheckpoint(path, checkpoint.id);
          assert.deepStrictEqual((await contents.get(path)).content.cells, []);
          await contents.deleteCheckpoint(path, checkpoint.id);
          assert.deepStrictEqual(await contents.listCheckpoints(path), []);
          await contents.delete(path);
        """)

    def test_a_large_upload_comes_in_chunks(self):
        self.javascript("""
          const contents = new services.ContentsManager({serverSettings});
          const part = 'x'.repeat(100000);
          for (const chunk of [1, 2, -1])
            await contents.save('big.txt', {type: 'file', format: 'text', content: part, chunk});
          assert.strictEqual((await contents.get('big.txt')).content, part + part + part);
          await contents.delete('big.txt');
        """)

    def test_kernel_specs_sessions_and_kernels_are_managed(self):
        self.javascript("""
          const kernelspecs = new services.KernelSpecManager({serverSettings});
          await kernelspecs.ready;
          assert.strictEqual(kernelspecs.specs.default, 'python3');
          assert.strictEqual(kernelspecs.specs.kernelspecs.python3.language, 'python');
          const kernels = new services.KernelManager({serverSettings});
          const sessions = new services.SessionManager({serverSettings, kernelManager: kernels});
          const session = await sessions.startNew({
            path: 'one.ipynb', type: 'notebook', name: 'one.ipynb', kernel: {name: 'python3'}});
          assert.strictEqual((await run(session.kernel, '6 * 7')).result, '42');
          await session.setPath('two.ipynb');
          await session.setName('two');
          await until(() => [...sessions.running()][0]?.name === 'two');
          assert.strictEqual((await sessions.findByPath('two.ipynb')).id, session.id);
          const before = session.kernel.id;
          await session.changeKernel({name: 'python3'});
          assert.notStrictEqual(session.kernel.id, before);
          assert.strictEqual((await run(session.kernel, '6 * 7')).result, '42');
          await kernels.refreshRunning();
          assert.deepStrictEqual([...kernels.running()].map(k => k.id), [session.kernel.id]);
          await session.shutdown();
          // The manager polls on its own, too: an answer from before can come after ours.
          await until(async () => {
            await kernels.refreshRunning();
            return [...kernels.running()].length === 0;
          });
          await assert.rejects(kernels.startNew({name: 'cobol'}), /cobol/);
        """)

    def test_a_kernel_runs_asks_is_interrupted_and_restarted(self):
        self.javascript("""
          const kernels = new services.KernelManager({serverSettings});
          const kernel = await kernels.startNew({name: 'python3'});
          assert.strictEqual((await kernel.info).language_info.name, 'python');
          let cell = await run(kernel, "print('☃' * 3)\\n6 * 7");
          assert.deepStrictEqual([cell.text, cell.result, cell.reply.status],
                                 ['☃☃☃\\n', '42', 'ok']);
          cell = await run(kernel, "input('Name? ')", 'Ada');
          assert.strictEqual(cell.result, "'Ada'");
          const future = kernel.requestExecute({code: "print('ready')\\nwhile True: pass"});
          let isReady = false;
          future.onIOPub = message => { isReady ||= message.header.msg_type === 'stream'; };
          await until(() => isReady);
          await kernel.interrupt();
          assert.strictEqual((await future.done).content.ename, 'KeyboardInterrupt');
          await run(kernel, 'kept = 1');
          await kernel.restart();
          assert.strictEqual((await run(kernel, 'kept')).reply.ename, 'NameError');
          const completion = await kernel.requestComplete({code: 'impor', cursor_pos: 5});
          assert.ok(completion.content.matches.includes('import'));
          await kernel.shutdown();
          assert.strictEqual(kernel.status, 'dead');
        """)

    @needs("comm")
    def test_comms_carry_buffers_both_ways(self):
        self.javascript("""
          const kernel = await new services.KernelManager({serverSettings}).startNew();
          await run(kernel, `
        from comm import get_comm_manager
        def opened(comm, message):
            @comm.on_msg
            def echo(message):
                comm.send(message['content']['data'],
                          buffers=[bytes(reversed(b)) for b in message['buffers']])
        get_comm_manager().register_target('echo', opened)`.replaceAll('\\n        ', '\\n'));
          const comm = kernel.createComm('echo');
          const answered = new Promise(resolve => { comm.onMsg = resolve; });
          await comm.open({}).done;
          await comm.send({'☃': 1}, {}, [new Uint8Array([1, 2, 3]).buffer]).done;
          const message = await answered;
          assert.deepStrictEqual(message.content.data, {'☃': 1});
          const bytes = message.buffers.map(buffer => [...new Uint8Array(buffer.buffer ?? buffer)
            .slice(buffer.byteOffset ?? 0, (buffer.byteOffset ?? 0) + buffer.byteLength)]);
          assert.deepStrictEqual(bytes, [[3, 2, 1]]);
          await comm.close().done;
          await kernel.shutdown();
        """)

    def test_a_reconnect_in_the_middle_of_a_cell_loses_nothing(self):
        self.javascript("""
          const kernel = await new services.KernelManager({serverSettings}).startNew();
          const future = kernel.requestExecute({code: `
        import time
        for i in range(40):
            print(i, flush=True)
            time.sleep(0.02)`.replaceAll('\\n        ', '\\n')});
          let text = '';
          future.onIOPub = message => {
            if (message.header.msg_type === 'stream') text += message.content.text;
          };
          for (const line of [5, 15, 25]) {
            await until(() => text.includes(`\\n${line}\\n`));
            await kernel.reconnect();
          }
          assert.strictEqual((await future.done).content.status, 'ok');
          assert.strictEqual(text, [...Array(40).keys()].map(i => i + '\\n').join(''));
          await kernel.shutdown();
        """)

    def test_both_subprotocols_are_spoken(self):
        self.javascript("""
          const WebSocket = require('ws');
          const spoken = [];
          for (const offered of [true, false]) {
            class Choosing extends WebSocket {
              constructor(url, protocols) {
                super(url, offered ? protocols : []);
                this.on('open', () => spoken.push(this.protocol));
              }
            }
            const kernels = new services.KernelManager(
              {serverSettings: {...serverSettings, WebSocket: Choosing}});
            const kernel = await kernels.startNew();
            const cell = await run(kernel, "print('☃')");
            assert.strictEqual(cell.text, '☃\\n');
            await kernel.shutdown();
          }
          assert.deepStrictEqual(spoken, ['v1.kernel.websocket.jupyter.org', '']);
        """)


# What the scripts of the next class begin with: `say` prints a result, without ids and times;
# `watched` notes which members of a manager are used, and `unused` names the others.
SAYING = """
const said = value => JSON.stringify(value, (key, each) => {
  if (each instanceof Error) return `Error ${each.response?.status}`;
  if (each === undefined) return null;
  if (/^(created|last_modified|last_activity)$/.test(key)) return 'TIME';
  if (/^(connections|execution_state|size)$/.test(key)) return typeof each;
  if (key === 'reason' || key === 'resources') return undefined;
  if (each && each.constructor === Object)
    return Object.fromEntries(Object.entries(each).sort());
  if (typeof each === 'string')
    return each.replace(/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/g, 'ID')
      .replaceAll(serverSettings.baseUrl, '/').replaceAll(serverSettings.token, 'TOKEN');
  return each;
});
const say = (what, value) => console.log(`= ${what}: ${said(value)}`);
const refused = async promise => promise.then(value => ['not refused', value], error => error);
const used = new Set();
const watched = object => new Proxy(object, {
  get(target, name) {
    used.add(name);
    const member = target[name];
    return typeof member === 'function' ? member.bind(target) : member;
  },
  set(target, name, value) { used.add(name); target[name] = value; return true; }
});
const unused = (...classes) => classes.flatMap(each => Object.getOwnPropertyNames(each.prototype))
  .filter(name => !used.has(name) && !/^(_|constructor$|request(Running|Specs)$)/.test(name));
"""


@needs("jupyter_server")
@needs_programs("node", str(NODE / "@jupyterlab" / "services"))
class JupyterLabServicesSideBySide(Case):
    """Every method of the managers of @jupyterlab/services, but for those of terminals, events,
    settings, workspaces and users: what it gives here is what it gives with Jupyter Server."""

    @classmethod
    def setUpClass(cls):
        cls.specs = tempfile.TemporaryDirectory(prefix="minijupyter-specs-")
        cls.addClassCleanup(cls.specs.cleanup)
        install_kernelspec(Path(cls.specs.name), "shared", OURS, interrupt_mode="signal")
        cls.servers = []
        for program in (None, jupyter_server):
            cls.servers.append(Server(env={"JUPYTER_PATH": cls.specs.name}, program=program))
            cls.addClassCleanup(cls.servers[-1].end)
        wait_until(lambda: answers(cls.servers[1]))

    def assertAlike(self, text):
        """The script says the same with both servers; the lines with ours are returned."""
        outputs = []
        for server in self.servers:
            process = Process(["node", "-e", SERVICES % (SAYING + text), "--",
                               f"http://127.0.0.1:{server.port}/", server.token],
                              env={**os.environ, "NODE_PATH": str(NODE)})
            self.addCleanup(process.end)
            self.assertEqual(process.exit_code(3 * SECONDS), 0, process.output)
            outputs.append([line for line in process.lines if line.startswith("= ")])
        self.assertEqual(*outputs)
        return outputs[0]

    def test_every_method_of_the_contents_manager_gives_the_same(self):
        lines = self.assertAlike("""
          const contents = watched(new services.ContentsManager({serverSettings}));
          const changes = [];
          contents.fileChanged.connect((_, change) => changes.push(change));
          say('names', [contents.localPath('a:b/c'), contents.normalize('a/../b'),
                        contents.resolvePath('a/b', '../c'), contents.driveName('d:e'),
                        contents.driveName('e'), contents.defaultDrive.name]);
          const folder = await contents.newUntitled({type: 'directory'});
          say('folder', folder);
          let file = await contents.newUntitled({path: folder.path, type: 'file', ext: '.md'});
          say('file', file);
          say('notebook', await contents.newUntitled({path: folder.path, type: 'notebook'}));
          say('by ending', await contents.newUntitled({path: folder.path, ext: '.ipynb'}));
          say('saved', await contents.save(file.path,
            {type: 'file', format: 'text', content: '# ☃'}));
          say('read', await contents.get(file.path));
          say('hashed', (await contents.get(file.path, {content: false, hash: true})).hash);
          file = await contents.rename(file.path, folder.path + '/über 100%.md');
          say('renamed', file);
          say('copy', await contents.copy(file.path, folder.path));
          say('copy elsewhere', await contents.copy(file.path, ''));
          say('address', await contents.getDownloadUrl(file.path));
          const listed = await contents.get(folder.path);
          say('listed', listed.content.map(model => [model.name, model.type]).sort());
          const checkpoint = await contents.createCheckpoint(file.path);
          say('checkpoint', [checkpoint, await contents.listCheckpoints(file.path)]);
          await contents.save(file.path, {type: 'file', format: 'text', content: 'later'});
          say('restored', await contents.restoreCheckpoint(file.path, checkpoint.id));
          say('as before', (await contents.get(file.path)).content);
          say('forgotten', await contents.deleteCheckpoint(file.path, checkpoint.id));
          say('none left', await contents.listCheckpoints(file.path));
          await contents.save('target.md', {type: 'file', format: 'text', content: 'old'});
          say('overwritten', await contents.overwrite(file.path, 'target.md'));
          say('target', (await contents.get('target.md')).content);
          const cells = [{id: 'a', cell_type: 'markdown', metadata: {}, source: ['☃\\n', 'x']}];
          const content = {cells, metadata: {}, nbformat: 4, nbformat_minor: 5};
          say('notebook saved', await contents.save('n.ipynb',
            {type: 'notebook', format: 'json', content}));
          say('notebook read', await contents.get('n.ipynb', {type: 'notebook', content: true}));
          for (const [what, wish] of Object.entries({
            missing: () => contents.get('none'), hidden: () => contents.get('.hidden'),
            'no folder': () => contents.newUntitled({path: 'none'}),
            'a file': () => contents.newUntitled({path: 'target.md'}),
            'saved hidden': () => contents.save('.h', {type: 'file', format: 'text', content: ''}),
            'moved on another': () => contents.rename('target.md', 'n.ipynb'),
            'moved from nowhere': () => contents.rename('none', 'x'),
            'moved hidden': () => contents.rename('target.md', '.x'),
            'copied from nowhere': () => contents.copy('none', ''),
            'deleted nothing': () => contents.delete('none'),
            'deleted hidden': () => contents.delete('.x'),
            'no file': () => contents.get('target.md', {type: 'directory'})}))
            say(what, await refused(wish()));
          for (const name of [...listed.content.map(model => model.path), 'target.md', 'n.ipynb',
                              'über 100%.md', folder.path])
            if (name !== file.path) await contents.delete(name);
          say('changes', changes.map(change => [change.type, change.newValue?.path ?? null]));
          contents.addDrive(new services.Drive({name: 'Other', serverSettings}));
          say('other drive', await contents.newUntitled({path: 'Other:', type: 'file'}));
          say('in it', (await contents.get('Other:untitled')).path);
          await contents.delete('Other:untitled');
          say('shared', contents.getSharedModelFactory('n.ipynb'));
          contents.dispose();
          say('disposed', contents.isDisposed);
          say('unused', unused(services.ContentsManager));
        """)
        self.assertEqual(lines[-1], "= unused: []\n")

    def test_every_method_of_a_drive_gives_the_same(self):
        lines = self.assertAlike("""
          const drive = watched(new services.Drive({name: 'D', serverSettings}));
          const changes = [];
          drive.fileChanged.connect((_, change) => changes.push(change.type));
          say('it', [drive.name, drive.isDisposed, drive.serverSettings.token,
                     drive.sharedModelFactory, drive.contentProviderRegistry !== undefined]);
          const made = await drive.newUntitled({type: 'file', ext: '.txt'});
          say('made', made);
          for (const chunk of [1, 2, -1])
            say('chunk', (await drive.save('big.txt', {
              type: 'file', format: 'text', content: 'x'.repeat(9), chunk})).name);
          say('read', await drive.get('big.txt'));
          say('renamed', await drive.rename(made.path, 'moved.txt'));
          say('copied', await drive.copy('moved.txt', ''));
          say('checkpoint', await drive.createCheckpoint('big.txt'));
          say('listed', await drive.listCheckpoints('big.txt'));
          say('restored', await drive.restoreCheckpoint('big.txt', 'checkpoint'));
          say('forgotten', await drive.deleteCheckpoint('big.txt', 'checkpoint'));
          say('address', await drive.getDownloadUrl('big.txt'));
          for (const name of ['big.txt', 'moved.txt', 'moved-Copy1.txt']) await drive.delete(name);
          say('changes', changes);
          drive.dispose();
          say('unused', unused(services.Drive));
        """)
        self.assertEqual(lines[-1], "= unused: []\n")

    def test_every_method_of_the_managers_of_kernels_and_specs_gives_the_same(self):
        lines = self.assertAlike("""
          const specs = watched(new services.KernelSpecManager({serverSettings}));
          await specs.ready;
          let news = 0;
          specs.specsChanged.connect(() => { news += 1; });
          specs.connectionFailure.connect(() => say('failed'));
          await specs.refreshSpecs();
          const {language, display_name, argv, env, metadata, interrupt_mode} =
            specs.specs.kernelspecs.shared;
          say('spec', [specs.specs.default, language, display_name, argv, env, metadata,
                       interrupt_mode, specs.isReady, news]);
          specs.dispose();
          const kernels = watched(new services.KernelManager({serverSettings}));
          await kernels.ready;
          kernels.runningChanged.connect((_, models) => used.add('heard'));
          kernels.connectionFailure.connect(() => say('failed'));
          kernels.kernelInfoTimeout = kernels.kernelInfoTimeout;
          kernels.commsOverSubshells = kernels.commsOverSubshells;
          const kernel = await kernels.startNew({name: 'shared'});
          say('started', [kernel.name, (await kernel.spec).display_name, kernels.isReady]);
          const other = kernels.connectTo({model: kernel.model});
          say('other', [(await run(other, '6 * 7')).result, other.id === kernel.id]);
          await kernels.refreshRunning();
          say('running', [[...kernels.running()].map(model => model.name), kernels.runningCount]);
          say('found', (await kernels.findById(kernel.id)).name);
          say('not found', await kernels.findById('00000000-0000-0000-0000-000000000000'));
          say('refused', [await refused(kernels.startNew({name: 'cobol'})) instanceof Error]);
          await kernels.shutdown(kernel.id);
          say('gone', [...kernels.running()].length);
          await kernels.startNew({name: 'shared'});
          await kernels.startNew({name: 'shared'});
          await kernels.refreshRunning();
          say('two', kernels.runningCount);
          await kernels.shutdownAll();
          say('none', [kernels.runningCount, used.has('heard')]);
          kernels.dispose();
          say('unused', unused(services.KernelSpecManager, services.KernelManager));
        """)
        self.assertEqual(lines[-1], "= unused: []\n")

    def test_every_method_of_the_session_manager_gives_the_same(self):
        lines = self.assertAlike("""
          const kernelManager = new services.KernelManager({serverSettings});
          const sessions = watched(new services.SessionManager({serverSettings, kernelManager}));
          await sessions.ready;
          sessions.runningChanged.connect(() => used.add('heard'));
          sessions.connectionFailure.connect(() => say('failed'));
          const wish = path => ({path, name: path, type: 'notebook', kernel: {name: 'shared'}});
          const session = watched(await sessions.startNew(wish('one.ipynb')));
          const changes = [];
          session.propertyChanged.connect((_, name) => changes.push(name));
          session.kernelChanged.connect(() => changes.push('kernel'));
          say('model', [sessions.isReady, session.model]);
          say('told', (await run(session.kernel, `import os
        name = os.environ['JPY_SESSION_NAME']
        os.path.isabs(name), os.path.relpath(name)`.replaceAll('\\n        ', '\\n'))).result);
          say('again', (await sessions.startNew(wish('one.ipynb'))).id === session.id);
          await session.setPath('two.ipynb');
          await session.setName('two');
          await session.setType('console');
          // An answer that was under way before may come later, and be corrected by the next one.
          for (let tries = 0; tries < 50 && session.type !== 'console'; tries++)
            await sessions.refreshRunning();
          say('changed', [session.path, session.name, session.type]);
          say('by path', (await sessions.findByPath('two.ipynb')).name);
          say('by id', (await sessions.findById(session.id)).path);
          say('nowhere', [await sessions.findByPath('none'), await sessions.findById('none')]);
          const before = session.kernel.id;
          await session.changeKernel({name: 'shared'});
          say('new kernel', [session.kernel.id !== before, session.kernel.name]);
          say('refused', await refused(session.changeKernel({name: 'cobol'})));
          say('still', (await run(session.kernel, '6 * 7')).result);
          const third = await kernelManager.startNew({name: 'shared'});
          await session.changeKernel({id: third.id});
          say('given', session.kernel.id === third.id);
          await kernelManager.refreshRunning();
          say('kernels', kernelManager.runningCount);
          const other = sessions.connectTo({model: session.model});
          say('other', other.id === session.id);
          await sessions.refreshRunning();
          say('running', [...sessions.running()]);
          await sessions.startNew(wish('three.ipynb'));
          await sessions.stopIfNeeded('three.ipynb');
          await sessions.refreshRunning();
          say('stopped', [...sessions.running()].map(model => model.path));
          await session.shutdown();
          say('ended', [session.isDisposed, [...sessions.running()].length]);
          const fourth = await sessions.startNew(wish('four.ipynb'));
          await sessions.shutdown(fourth.id);
          say('gone already', await refused(sessions.shutdown(fourth.id)));
          await sessions.startNew(wish('five.ipynb'));
          await sessions.shutdownAll();
          await kernelManager.refreshRunning();
          say('none', [[...sessions.running()].length, kernelManager.runningCount,
            [...new Set(changes)].sort()]);
          sessions.dispose();
          say('unused', unused(services.SessionManager));
        """)
        self.assertEqual(lines[-1], "= unused: []\n")

    def test_config_sections_are_read_and_merged_the_same(self):
        self.assertAlike("""
          const manager = new services.ConfigSectionManager({serverSettings});
          const section = await manager.create({name: 'test'});
          say('new', section.data);
          say('updated', await section.update({a: {b: 1, c: 2}, d: [1, null]}));
          say('merged', await section.update({a: {b: null}, e: {f: null}}));
          say('again', (await manager.create({name: 'test'})).data);
          services.ConfigSection._setConfigSectionManager(manager);
          say('by name', (await services.ConfigSection.create({name: 'test'})).data);
          const values = new services.ConfigWithDefaults(
            {section, defaults: {x: 1, y: 2}, className: 'Part'});
          say('default', [values.get('x'), await values.set('x', 7), values.get('x')]);
          say('back', [await values.set('x', null), values.get('x')]);
          await section.load();
          say('loaded', section.data);
          say('no section', await refused(manager.create({name: 'a/b'})));
        """)

    def test_a_kernel_connection_is_answered_the_same(self):
        self.assertAlike("""
          const kernels = new services.KernelManager({serverSettings});
          const kernel = await kernels.startNew({name: 'shared'});
          say('info', (await kernel.info).language_info.name);
          say('again', (await kernel.requestKernelInfo()).content.status);
          say('run', await run(kernel, "print('☃')\\ninput('?')", 'Ada'));
          say('complete', (await kernel.requestComplete({code: 'impor', cursor_pos: 5})).content);
          say('inspect', (await kernel.requestInspect(
            {code: 'nothing', cursor_pos: 3, detail_level: 0})).content);
          say('whole', (await kernel.requestIsComplete({code: 'if 1:'})).content);
          say('history', (await kernel.requestHistory(
            {hist_access_type: 'tail', n: 1, raw: true, output: false})).content.status);
          say('comms', (await kernel.requestCommInfo({})).content);
          await run(kernel, 'kept = 1');
          const clone = kernel.clone();
          say('clone', (await run(clone, 'kept')).result);
          clone.dispose();
          await kernel.reconnect();
          say('reconnected', (await run(kernel, 'kept')).result);
          if (kernel.supportsSubshells) {
            const made = await kernel.requestCreateSubshell({}).done;
            const listed = await kernel.requestListSubshell({}).done;
            say('subshells', listed.content.subshell_id.length);
            await kernel.requestDeleteSubshell({subshell_id: made.content.subshell_id}).done;
          }
          const future = kernel.requestExecute({code: "print('ready')\\nwhile True: pass"});
          let isReady = false;
          future.onIOPub = message => { isReady ||= message.header.msg_type === 'stream'; };
          await until(() => isReady);
          await kernel.interrupt();
          say('interrupted', (await future.done).content.ename);
          await kernel.restart();
          say('restarted', (await run(kernel, 'kept')).reply.ename);
          await kernel.shutdown();
          say('ended', kernel.status);
          say('gone', await refused(kernels.shutdown(kernel.id)));
        """)


class Gateway(ServerCase):
    """Jupyter Server, and clients that use ours as the gateway to its kernels."""

    @needs("jupyter_server")
    def test_jupyter_server_runs_its_kernels_on_ours(self):
        def gateway(root, port, token):
            return [sys.executable, "-m", "jupyter_server", f"--port={port}", "--no-browser",
                    "--allow-root", f"--IdentityProvider.token={token}",
                    f"--ServerApp.root_dir={root}",
                    f"--gateway-url=http://127.0.0.1:{self.server.port}",
                    f"--GatewayClient.auth_token={self.server.token}"]
        front = self.own_server(program=gateway)
        wait_until(lambda: answers(front))
        specs = self.assertReply(front.get("/api/kernelspecs"), 200).json
        self.assertEqual(specs["default"], "python3")
        model = self.assertReply(front.post("/api/sessions", {
            "path": "x.ipynb", "type": "notebook", "name": "", "kernel": {"name": "python3"}}),
            201).json
        (ours,) = self.server.get("/api/kernels").json
        self.assertEqual(ours["id"], model["kernel"]["id"])
        frontend = front.frontend(ours["id"])
        self.addCleanup(frontend.wire.close)
        frontend.typed = ["Ada"]
        cell = frontend.finish(frontend.start("print('☃')\ninput()"))
        self.assertEqual((cell.text(), cell.result), ("☃\n", "'Ada'"))
        cell = frontend.start("print('ready')\nwhile True: pass")
        frontend.until(lambda: "ready" in cell.text())
        path = f"/api/kernels/{ours['id']}"
        self.assertReply(front.post(f"{path}/interrupt"), 204)
        self.assertFails(frontend.finish(cell), "KeyboardInterrupt")
        self.assertReply(front.post(f"{path}/restart"), 200)
        self.assertReply(front.delete(f"/api/sessions/{model['id']}"), 204)
        self.assertEqual(self.server.get("/api/kernels").json, [])

    @needs("jupyter_kernel_client")
    def test_jupyter_kernel_client_runs_code(self):
        from jupyter_kernel_client import JupyterKernelClient
        url = f"http://127.0.0.1:{self.server.port}"
        with JupyterKernelClient(server_url=url, token=self.server.token) as client:
            reply = client.execute("print('☃')\n6 * 7")
            self.assertEqual(reply["status"], "ok")
            *printed, result = reply["outputs"]   # a text may come in pieces
            self.assertEqual("".join(output["text"] for output in printed), "☃\n")
            self.assertEqual(result["data"]["text/plain"], "42")
            self.assertEqual(client.execute("1 / 0")["status"], "error")
        wait_until(lambda: self.server.get("/api/kernels").json == [])

    @needs("jupyter_server", "nbclient", "nbformat")
    def test_nbclient_runs_a_notebook_through_the_gateway(self):
        program = """
import functools, nbclient, nbformat, sys, websocket
# The gateway's own kernel client forgets the token when it opens the WebSocket.
websocket.create_connection = functools.partial(
    websocket.create_connection, header=["Authorization: token " + sys.argv[1]])
from jupyter_server.gateway.managers import GatewayKernelManager
nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x = 6; print('☃')"),
                                     nbformat.v4.new_code_cell("x * 7")])
nbclient.NotebookClient(nb, kernel_manager_class=GatewayKernelManager, timeout=60).execute()
text = "".join(output.text for output in nb.cells[0].outputs)   # it may have come in pieces
print(text, nb.cells[1].outputs[0].data["text/plain"])
"""
        process = Process([sys.executable, "-c", program, self.server.token], env=clean_environment(
            self.folder(), JUPYTER_GATEWAY_URL=f"http://127.0.0.1:{self.server.port}",
            JUPYTER_GATEWAY_AUTH_TOKEN=self.server.token))
        self.addCleanup(process.end)
        self.assertEqual(process.exit_code(3 * SECONDS), 0, process.output)
        self.assertTrue(process.output.endswith("☃\n 42\n"), process.output)


# -- what nobody thinks of, and what others did not think of --

def fuzzed(*strategies, examples=200):
    """Run a test with many made-up values, the same ones every time; a failing one is shrunk.

    A strategy is a function of hypothesis.strategies, which need not be installed.
    """
    def decorate(test):
        def run(self):
            from hypothesis import HealthCheck, given, settings
            from hypothesis import strategies as st
            limits = settings(derandomize=True, database=None, deadline=None,
                              max_examples=examples, suppress_health_check=list(HealthCheck))
            limits(given(st.tuples(*[strategy(st) for strategy in strategies]))(
                lambda values: test(self, *values)))()
        return needs("hypothesis")(functools.wraps(test)(run))
    return decorate


def chunked(st):
    """Sizes of the pieces in which bytes arrive."""
    return st.lists(st.integers(1, 50), max_size=20)


def pieces(data, sizes):
    """`data` in pieces of these sizes; the last one is the rest."""
    for size in sizes:
        yield data[:size]
        data = data[size:]
    yield data


def messages(st):
    """WebSocket messages, each with the places where it is cut into fragments."""
    return st.lists(st.tuples(st.text() | st.binary(), st.lists(st.integers(0, 30), max_size=4),
                              st.booleans()), max_size=5)


def json_values(st):
    """Any JSON value, with the words of a notebook among its strings and keys."""
    known = st.sampled_from([
        "nbformat", "nbformat_minor", "metadata", "cells", "worksheets", "cell_type", "code",
        "markdown", "raw", "heading", "source", "input", "outputs", "output_type", "stream",
        "display_data", "pyout", "error", "text", "data", "text/plain", "application/json", "id"])
    words = known | st.text(max_size=5)
    simple = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | words
    return st.recursive(simple, lambda inner: st.lists(inner, max_size=3)
                        | st.dictionaries(words, inner, max_size=4), max_leaves=12)


def notebooks(st):
    """Valid notebooks of versions 3 and 4, as Python values."""
    text = st.text(max_size=5) | st.lists(st.text(max_size=5), max_size=3)
    data = st.dictionaries(st.sampled_from(["text/plain", "image/png", "x/y"]), text, max_size=2)
    any_json = st.fixed_dictionaries({"application/json": json_values(st)})
    output = st.one_of(*[st.fixed_dictionaries({"output_type": st.just(kind), **fields})
                         for kind, fields in {
        "stream": {"name": st.just("stdout"), "text": text},
        "display_data": {"data": data | any_json, "metadata": st.just({})},
        "execute_result": {"data": data, "metadata": st.just({}), "execution_count": st.just(1)},
        "error": {"ename": text, "evalue": text, "traceback": st.just(["a", "b"])}}.items()])
    code = {"cell_type": st.just("code"), "metadata": st.just({}), "source": text,
            "execution_count": st.none(), "outputs": st.lists(output, max_size=2)}
    other = {"cell_type": st.sampled_from(["markdown", "raw", "unheard-of"]),
             "metadata": st.just({}), "source": text}
    cell = st.one_of(*[st.fixed_dictionaries({**fields, **ids}) for fields in (code, other)
                       for ids in ({}, {"id": st.sampled_from(["a", "b", "ü"])})])
    old_output = st.fixed_dictionaries(
        {"output_type": st.sampled_from(["pyout", "display_data"])},
        optional={"text": text, "png": text, "prompt_number": st.just(1)})
    old_cell = st.fixed_dictionaries(
        {"cell_type": st.sampled_from(["code", "heading", "markdown"])}, optional={
            "input": text, "source": text, "level": st.integers(1, 6), "metadata": st.just({}),
            "outputs": st.lists(old_output, max_size=2), "collapsed": st.booleans()})
    return st.fixed_dictionaries({
        "nbformat": st.just(4), "nbformat_minor": st.integers(0, 9), "metadata": st.just({}),
        "cells": st.lists(cell, max_size=3)}) | st.fixed_dictionaries({
            "nbformat": st.integers(2, 3), "metadata": st.just({}), "worksheets": st.lists(
                st.fixed_dictionaries({"cells": st.lists(old_cell, max_size=3)}), max_size=2)})


def slots(value):
    """(container, key) of every value within a JSON value."""
    for key in {dict: list, list: lambda v: range(len(v))}.get(type(value), lambda v: ())(value):
        yield value, key
        yield from slots(value[key])


def almost_notebooks(st):
    """Valid notebooks in which a few values have been replaced by something else, or removed."""
    def changed(pair):
        notebook_, changes = json.loads(json.dumps(pair[0])), pair[1]
        for at, value in changes:
            places = list(slots(notebook_))
            container, key = places[at % len(places)]
            container[key] = value
            if value == "id":
                del container[key]
        return notebook_
    changes = st.lists(st.tuples(st.integers(0, 60), json_values(st)), max_size=2)
    return st.tuples(notebooks(st), changes).map(changed)


class FuzzedWebSocket(Case):
    @fuzzed(lambda st: st.binary(max_size=200), chunked, lambda st: st.booleans(), examples=500)
    def test_any_bytes_are_messages_or_an_error_with_a_code(self, data, sizes, may_compress):
        parser = minijupyter.FrameParser(1000, minijupyter.Deflate() if may_compress else None)
        try:
            for piece in pieces(data, sizes):
                for opcode, payload in parser.feed(piece):
                    self.assertIsInstance(payload, str if opcode == TEXT else bytes)
        except minijupyter.WebSocketError as problem:
            self.assertIn(problem.code, (1002, 1007, 1009))

    @fuzzed(lambda st: st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=130)),
                                max_size=6), chunked, examples=500)
    def test_any_masked_frames_are_messages_or_an_error_with_a_code(self, frames, sizes):
        data = b"".join(bytes([first]) + frame(0, payload)[1:] for first, payload in frames)
        parser = minijupyter.FrameParser(1000, minijupyter.Deflate())
        try:
            for piece in pieces(data, sizes):
                list(parser.feed(piece))
        except minijupyter.WebSocketError as problem:
            self.assertIn(problem.code, (1002, 1007, 1009))

    @fuzzed(messages, chunked, examples=300)
    def test_messages_come_out_as_they_went_in_however_they_are_cut(self, sent, sizes):
        parser, data = minijupyter.FrameParser(extension=minijupyter.Deflate()), b""
        for message, cuts, is_compressed in sent:
            opcode = TEXT if isinstance(message, str) else BINARY
            payload = message.encode() if opcode == TEXT else message
            if is_compressed:
                opcode, payload = opcode | 0x40, deflated(payload)
            parts = list(pieces(payload, cuts))
            for i, part in enumerate(parts):
                data += frame(0 if i else opcode, part, fin=i == len(parts) - 1)
                data += frame(PING, b"between")
        received = [payload for piece in pieces(data, sizes) for opcode, payload in
                    parser.feed(piece) if opcode != PING]
        self.assertEqual(received, [message for message, _, _ in sent])


class FuzzedDocuments(Case):
    def assertReadable(self, data):
        """The bytes are refused, or a notebook that is valid and goes back to disk untouched."""
        try:
            notebook_ = minijupyter.DOCUMENTS[-1](data).served
        except minijupyter.NotANotebook as problem:
            return self.assertTrue(str(problem))
        self.assertEqual(notebook_["nbformat"], 4)
        json.loads(kernel.to_json(notebook_), parse_constant=self.fail)
        file = minijupyter.NotebookFile(data)
        again = minijupyter.write_notebook(notebook_, file).data
        if json.loads(data)["nbformat"] == 4 and not file.mended:
            self.assertEqual(again, data)
        self.assertEqual(json.dumps(minijupyter.DOCUMENTS[-1](again).served, sort_keys=True),
                         json.dumps(notebook_, sort_keys=True))

    @fuzzed(json_values, examples=300)
    def test_any_json_is_refused_or_a_notebook(self, value):
        self.assertReadable(json.dumps(value).encode())

    @fuzzed(almost_notebooks, examples=700)
    def test_what_looks_like_a_notebook_is_refused_or_is_one(self, value):
        self.assertReadable(json.dumps(value).encode())

    @fuzzed(lambda st: st.binary(max_size=50), examples=200)
    def test_any_bytes_are_refused_or_a_notebook(self, data):
        with contextlib.suppress(minijupyter.NotANotebook):
            self.assertIsInstance(minijupyter.DOCUMENTS[-1](data).served, dict)


class FuzzedContents(ServerCase):
    """Whatever is asked of the contents: no failure, nothing outside the root, no torn file."""

    PATHS = ["", ".", "..", "-rf", "*?", "../outside.txt", "folder/../../outside.txt", ".hidden",
             "link/outside.txt", "a.txt/below", "x" * 300, "a\\b", "nul\0", "a%2fb", " ", "~",
             "folder/", "//a.txt", "a.txt/checkpoints", "\ud800",
             ".ipynb_checkpoints/a-checkpoint.txt"]

    def setUp(self):
        self.outside = self.root.parent / "outside.txt"
        self.outside.write_text("outside")
        if not (self.root / "link").is_symlink():
            (self.root / "link").symlink_to(self.root.parent)
        self.connection = self.server.connect()
        self.addCleanup(self.connection.close)

    def paths(st):
        """Most of them good ones."""
        good = st.sampled_from(["a.txt", "b.ipynb", "folder", "folder/c.txt", "é ☃.txt"])
        return st.one_of(good, good, st.sampled_from(FuzzedContents.PATHS), st.text(max_size=10))

    def models(st):
        """Bodies of requests, good ones and others."""
        paths, text = FuzzedContents.paths(st), st.text(max_size=5)
        good = [st.just({"type": "directory"}), st.fixed_dictionaries({"path": paths}),
                st.fixed_dictionaries({"copy_from": paths}),
                st.fixed_dictionaries({"type": st.just("notebook"), "content": notebooks(st)}),
                st.fixed_dictionaries({"type": st.just("file"), "content": text, "format":
                                       st.sampled_from(["text", "base64"])}, optional={
                                           "chunk": st.sampled_from([1, 2, -1])})]
        fields = ["type", "format", "content", "path", "copy_from", "ext", "chunk", "name"]
        return st.one_of(*good, st.dictionaries(st.sampled_from(fields), json_values(st) | paths),
                         json_values(st))

    @fuzzed(lambda st: st.sampled_from(["GET", "PUT", "PUT", "POST", "PATCH", "DELETE"]), paths,
            lambda st: st.sampled_from(["", "", "/checkpoints", "/checkpoints/checkpoint"]),
            models, examples=600)
    def test_any_request_is_done_or_refused(self, method, path, suffix, model):
        (self.root / "folder").mkdir(exist_ok=True)
        for name in ("a.txt", "folder/c.txt", "b.ipynb"):
            if not (self.root / name).exists():
                (self.root / name).write_text("")
        url = f"/api/contents/{quote(path, errors='surrogatepass')}{suffix}"
        reply = self.server.request(method, url, json.dumps(model), connection=self.connection)
        self.assertLess(reply.status, 500, reply)
        if reply.status >= 400:
            self.assertTrue(reply.json["message"], reply)
        self.assertEqual(self.outside.read_text(), "outside")
        self.assertLessEqual({path.name for path in self.root.parent.iterdir()} - {"root"},
                             {"outside.txt", "jupyter_runtime_dir", "jupyter_data_dir"})
        torn = [file for file in self.root.rglob(".*.saving")]
        self.assertEqual(torn, [])


    def test_a_reader_never_sees_half_a_file_however_many_write(self):
        path, wholes = self.root / "shared.txt", {letter * 300_000 for letter in "abc"}
        path.write_text("a" * 300_000)

        def write(content):
            for _ in range(15):
                model = {"type": "file", "format": "text", "content": content}
                self.assertEqual(self.server.put("/api/contents/shared.txt", model).status, 200)
        with ThreadPoolExecutor() as pool:
            writers = [pool.submit(write, content) for content in wholes]
            while not all(writer.done() for writer in writers):
                self.assertIn(path.read_text(), wholes)
                self.assertIn(self.server.get("/files/shared.txt").body.decode(), wholes)
        for writer in writers:
            writer.result()


class FuzzedKernels(ServerCase):
    """Whatever is asked of kernels and sessions, and whatever is said to a kernel."""

    FIELDS = ["path", "name", "type", "kernel", "id", "kernel_id", "env", "notebook"]

    def bodies(st):
        """What may stand in a request; no kernel is called like this."""
        names = st.sampled_from(["", "none", "x.ipynb", "notebook", "../x", "é", "\0", "\ud800"])
        values = st.one_of(names, json_values(st), st.dictionaries(
            st.sampled_from(["id", "name", "x"]), names | json_values(st)))
        wishes = st.dictionaries(st.sampled_from(FuzzedKernels.FIELDS), values)
        return st.one_of(wishes, wishes, json_values(st)).map(
            lambda body: {"name": "none", "kernel": {"name": "none"}, **body}
            if isinstance(body, dict) else body)

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.session = cls.server.post(
            "/api/sessions", {"path": "x.ipynb", "type": "notebook"}).json["id"]

    @fuzzed(lambda st: st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE"]),
            lambda st: st.sampled_from([
                "kernels", "kernels/{none}", "kernels/{none}/restart", "kernels/{none}/interrupt",
                "sessions", "sessions", "sessions/{none}", "sessions/{ours}", "sessions/{ours}",
                "sessions/x", "kernelspecs/x", "me?permissions={none}"]), bodies, examples=200)
    def test_any_request_is_done_or_refused(self, method, path, body):
        path = path.format(none="00000000-0000-0000-0000-000000000000", ours=self.session)
        if method == "DELETE" and path.endswith(self.session):
            return
        if isinstance(body, dict) and not (body["kernel"] and body["name"]):
            return   # this would start the default kernel
        reply = self.server.request(method, f"/api/{path}", json.dumps(body))
        self.assertTrue(reply.status < 500 or reply.status == 501, reply)   # 501: no such kernel
        if reply.status >= 400:
            self.assertTrue(reply.json["message"], reply)
        self.assertEqual(self.server.get("/api/sessions").status, 200)

    @fuzzed(lambda st: st.sampled_from(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]),
            lambda st: st.sampled_from([
                "/api/config/x", "/api/config/{}", "/api/me", "/api/me?permissions={}",
                "/api/resolvePath?path={}", "/api/resolvePath?kernel={}&path=x", "/api/spec.yaml",
                "/api/notebooks/{}", "/api/kernelspecs/{}", "/kernelspecs/python3/{}",
                "/kernelspecs/{}/x", "/view/{}", "/api/kernels/{}", "/api/sessions/{}"]),
            lambda st: st.text(max_size=8) | st.sampled_from(
                ["..", "../..", "\0", "\ud800", "x" * 300, "~", "/", "{}", "[[", ".."]),
            json_values, examples=300)
    def test_any_request_for_what_is_asked_for_rarely_is_answered(self, method, path, text, body):
        path = path.format(quote(text, errors="surrogatepass"))
        reply = self.server.request(method, path, json.dumps(body))
        self.assertTrue(reply.status < 500 or reply.status == 501, (path, reply))

    @fuzzed(lambda st: st.sampled_from(list(minijupyter.LAYOUTS)), lambda st: st.text(max_size=60)
            | st.binary(max_size=60) | json_values(st).map(json.dumps), examples=300)
    def test_any_websocket_message_is_decoded_or_refused(self, protocol, message):
        unsplice, _ = minijupyter.LAYOUTS[protocol]
        with contextlib.suppress(ValueError):
            unsplice(message)

    @fuzzed(lambda st: st.sampled_from(list(minijupyter.LAYOUTS)), json_values,
            lambda st: st.lists(st.binary(max_size=20), max_size=3), examples=200)
    def test_a_message_comes_out_of_either_layout_as_it_went_in(self, protocol, value, buffers):
        unsplice, splice = minijupyter.LAYOUTS[protocol]
        parts = [{"msg_id": "1", "msg_type": "status"}, {}, {"any": value}, {"any": value}]
        raw = [kernel.to_json(part) for part in parts]
        opcode, payload = splice(minijupyter.Entry("iopub", raw, buffers))
        entry = unsplice(payload.decode() if opcode == TEXT else payload)
        self.assertEqual((entry.channel, entry.json_parts, entry.buffers), ("iopub", raw, buffers))

    @fuzzed(lambda st: st.dictionaries(st.text(max_size=5), json_values(st), max_size=4),
            lambda st: st.sampled_from([None, 1]), examples=200)
    def test_the_members_of_a_json_object_are_found_as_they_stand(self, value, indent):
        text = json.dumps(value, indent=indent)
        members = minijupyter.json_members(f" {text}\n")
        read = {key: json.loads(part) for key, part in members.items()}
        self.assertEqual(repr(read), repr(value))   # NaN is not equal to itself
        self.assertTrue(all(part in text for part in members.values()))

    def test_what_is_no_json_object_has_no_members(self):
        for text in ("", "{", "[]", "null", '{"a"}', '{"a":}', '{"a":1,}', '{"a":1 "b":2}', "{}x",
                     '{"a":1}}', "{1:2}", '{"a":1', '{"a" 1}', '{,"a":1}', '{"a":1,,"b":2}'):
            with self.subTest(text), self.assertRaises(ValueError):
                minijupyter.json_members(text)


class FuzzedHttp(ServerCase):
    """Whatever comes in at the door: an answer or a closed door, and the others are served."""

    def assertAnswered(self, data):
        """Nothing, or responses none of which says that the server failed."""
        answer = self.ask(data)
        for status in re.findall(rb"(?m)^HTTP/1\.[01] (\d+)", answer):
            self.assertTrue(int(status) < 500 or status in (b"501", b"505"), answer)
        self.assertNotIn("Traceback", self.server.process.output)
        self.assertNotIn("A connection failed", self.server.process.output)

    @fuzzed(lambda st: st.binary(max_size=300), examples=150)
    def test_any_bytes(self, data):
        self.assertAnswered(data)

    def headers(st):
        names = st.sampled_from(["Host", "Content-Length", "Transfer-Encoding", "Connection",
                                 "Expect", "Range", "Authorization", "Cookie", "Origin", "Upgrade",
                                 "If-Match", "X"]) | st.text(max_size=5)
        values = st.sampled_from([
            "5", "-1", "+5", "0x5", "99999999999999999999", "5, 5", "chunked", "gzip, chunked",
            "close", "keep-alive", "upgrade", "websocket", "100-continue", "bytes=0-", "bytes=9-1",
            "token", "LONG", "127.0.0.1", "[::1", "http://[", "=;=", "\x00", "²"])
        return st.lists(st.tuples(names, values | st.text(max_size=10)), max_size=5)

    METHODS = ["GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "BREW", "get", ""]
    TARGETS = ["/", "/api", "/api/contents", "//evil/", "*", "http://x/", "/%", "/%ff", "/\xff",
               "?", "/api?token=%", "/files/..%00", "/LONG", "", "/api/kernels?&&=&a"]
    VERSIONS = ["HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/x", "", "HTTP/1"]
    BODIES = [b"", b"{}", b"5\r\nabcde\r\n0\r\n\r\n", b"\0" * 9]

    @fuzzed(lambda st: st.sampled_from(FuzzedHttp.METHODS),
            lambda st: st.sampled_from(FuzzedHttp.TARGETS),
            lambda st: st.sampled_from(FuzzedHttp.VERSIONS), headers,
            lambda st: st.sampled_from(FuzzedHttp.BODIES), examples=300)
    def test_any_request(self, method, target, version, headers, body):
        lines = [f"{method} {target} {version}", f"Authorization: token {self.server.token}",
                 "Host: 127.0.0.1", *[f"{name}: {value}" for name, value in headers], "", ""]
        head = "\r\n".join(lines).replace("LONG", "x" * 70_000)
        self.assertAnswered(head.encode("utf-8", "replace") + body)

    def test_what_could_be_read_in_two_ways_is_refused(self):
        """Where a body ends must be clear, or a second request could hide in it (RFC 9112 6.3)."""
        hidden = b"GET /api HTTP/1.1\r\nHost: localhost\r\n\r\n"
        head = f"POST /api/nothing HTTP/1.1\r\nHost: localhost\r\nAuthorization: token " \
               f"{self.server.token}\r\n"
        for fields in ("Content-Length: 0\r\nContent-Length: 40\r\n", "Content-Length: +40\r\n",
                       "Content-Length : 40\r\n", "Content-Length: 40\r\n\tx: 1\r\n",
                       "Content-Length: 0, 40\r\n", "Content-Length: 4_0\r\n",
                       "Content-Length: ４\r\n",
                       "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n",
                       "Transfer-Encoding : chunked\r\n", "no colon\r\nContent-Length: 0\r\n",
                       "Transfer-Encoding: identity\r\n"):
            with self.subTest(fields):
                answer = self.ask(f"{head}{fields}\r\n".encode() + hidden)
                self.assertRegex(answer[:20], rb"HTTP/1.1 (400|501)")
                self.assertEqual(answer.count(b"HTTP/1.1 "), 1, answer)

    def test_too_many_or_too_large_headers_are_refused(self):
        for fields in ("X: y\r\n" * 200, f"X: {'y' * 70_000}\r\n"):
            self.assertRegex(self.ask(f"GET /api HTTP/1.1\r\n{fields}\r\n".encode())[:20],
                             rb"HTTP/1.1 4(00|31)")

    def test_a_client_that_stalls_is_left_and_holds_up_nobody(self):
        with tempfile.TemporaryDirectory() as root, \
                unittest.mock.patch.object(minijupyter.Handler, "timeout", 0.2):
            server = minijupyter.SERVERS[-1](root, "127.0.0.1", 0, "secret")
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            for begun in (b"", b"GET /ap", b"GET /api HTTP/1.1\r\nHost: loc",
                          b"POST /api/kernels HTTP/1.1\r\nHost: localhost\r\nAuthorization: token "
                          b"secret\r\nContent-Length: 9\r\n\r\n{"):
                with socket.create_connection(server.server_address, SECONDS) as slow:
                    slow.sendall(begun)
                    quick = http.client.HTTPConnection(*server.server_address, timeout=SECONDS)
                    quick.request("GET", "/api")
                    self.assertEqual(quick.getresponse().status, 200)
                    quick.close()
                    self.assertEqual(slow.recv(1000), b"")   # the server gives up first
            server.shutdown()
            server.server_close()
            thread.join()


class Chaos(ServerCase):
    """Browsers, kernels and the server are killed at random. What was printed is there, once; a
    file is one of the versions that were saved; no process outlives its server."""

    SECONDS = 30
    COUNT = 300
    TEXT = "".join(f"{i}\n" for i in range(COUNT))
    CELL = f"import time\nfor i in range({COUNT}): print(i); time.sleep(0.001)"

    @classmethod
    def setUpClass(cls):
        cls.root, cls.dice = Path("never"), random.Random(2026)

    def setUp(self):
        self.home, self.pids, self.versions = self.folder(), [], {b""}
        self.begin()

    def begin(self):
        self.server = self.own_server(self.home)
        self.new_kernel()

    def new_kernel(self):
        wish = {"path": "work.ipynb", "type": "notebook"}
        self.kernel_id = self.server.post("/api/sessions", wish).json["kernel"]["id"]
        self.page = self.follow()
        self.note_pid()

    def note_pid(self):
        cell = self.page.finish(self.page.start("import os; os.getpid()", cell="pid"), seconds=60)
        self.pid = int(cell.result)
        self.pids.append(self.pid)
        self.page.forget(cell)

    def follow(self):
        page = Page(WebSocketWire(self.server, self.kernel_id, journal=1))
        self.addCleanup(page.wire.close)
        return page

    def save(self):
        """Save a large file; the server may be killed meanwhile."""
        content = secrets.token_hex(500_000)
        self.versions.add(content.encode())
        with contextlib.suppress(OSError, http.client.HTTPException):
            self.server.put("/api/contents/file.txt", {
                "type": "file", "format": "text", "content": content})

    def drop_page(self):
        self.page.wire.close()
        self.page = self.follow()
        self.page.until(lambda: set("abc") <= set(self.page.cells), 60)

    def cells(self):
        return [self.page.cells[name] for name in "abc"]

    def until_done(self):
        self.page.until(lambda: all(cell.is_done for cell in self.cells()), 60)

    def finish(self):
        self.until_done()
        self.assertEqual([cell.text() for cell in self.cells()], [self.TEXT] * 3)

    def kill_kernel(self):
        os.kill(self.pid, signal.SIGKILL)
        self.until_done()
        for cell in self.cells():
            self.assertTrue(self.TEXT.startswith(cell.text()), cell)
        self.assertEqual(self.cells()[-1].status, "aborted")
        self.note_pid()

    def restart_kernel(self):
        self.assertReply(self.server.post(f"/api/kernels/{self.kernel_id}/restart"), 200)
        self.until_done()
        self.note_pid()

    def kill_server(self):
        saving = threading.Thread(target=self.save)
        saving.start()
        time.sleep(self.dice.uniform(0, 0.1))
        os.kill(self.server.process.pid, signal.SIGKILL)
        saving.join()
        wait_until(lambda: not any(map(is_alive, self.pids)))
        self.pids.clear()   # in a long run others get these numbers
        self.page.wire.close()
        self.assertFileIsWhole()
        self.begin()

    def assertFileIsWhole(self):
        file = self.server.root / "file.txt"
        if file.exists():
            self.assertIn(file.read_bytes(), self.versions)

    def test_half_a_minute_of_kills_loses_no_output_tears_no_file_and_leaves_no_process(self):
        fates = (self.finish, self.finish, self.kill_kernel, self.restart_kernel, self.kill_server)
        deadline, rounds = time.monotonic() + self.SECONDS, 0
        while time.monotonic() < deadline:
            for name in "abc":
                self.page.start(self.CELL, cell=name)
            for event in self.dice.choices((self.drop_page, self.save), k=3):
                self.page.until(lambda: self.page.cells["a"].messages)
                event()
            fate = fates[rounds % len(fates)]
            with self.subTest(round=rounds, fate=fate.__name__):
                fate()
            self.page.forget_all()
            rounds += 1
        self.server.end()
        self.assertEqual([pid for pid in self.pids if is_alive(pid)], [])
        self.assertFileIsWhole()
        self.assertGreater(rounds, 9)


class Spectator:
    """Looks under the hood, as the page does: the events of a trace, and the news."""

    def __init__(self, server):
        self.client = WebSocketClient(
            server.port, "/api/trace", {"Authorization": f"token {server.token}"})
        self.events, self.news = [], {}
        self.until(lambda: "now" in self.news)

    def pump(self, seconds=SECONDS):
        message = self.client.receive(seconds)
        if isinstance(message, str):
            self.news.update(json.loads(message))
        else:
            head, *parts = minijupyter.split_parts(message)
            self.events.append({**json.loads(head), "parts": parts})

    def until(self, condition):
        deadline = time.monotonic() + SECONDS
        while not condition():
            self.pump(deadline - time.monotonic())

    def of(self, kind, way="", **fields):
        """The events of a kind; each field must be as given."""
        return [event for event in self.events if event["kind"] == kind
                and event["way"].startswith(way) and fields.items() <= event.items()]

    def wait_for(self, kind, way="", count=1, **fields):
        self.until(lambda: len(self.of(kind, way, **fields)) >= count)
        return self.of(kind, way, **fields)

    def wish(self, do, kernel_id, **fields):
        """Wish for something, and wait until it is done: a wish that cannot be is told."""
        self.news.pop("problem", None)
        self.client.send(json.dumps({"do": do, "kernel": kernel_id, **fields}))
        self.client.send("a wish that nobody understands")
        self.until(lambda: "problem" in self.news)

    def words(self):
        """What the server has said of processes, and they themselves."""
        return b"\n".join(event["parts"][0] for event in self.of("process")).decode()


PAUSE = "pause", 0


def unmasked(frame):
    """The payload of a frame that has no extended length, or one of 16 bits."""
    start = 4 if frame[1] & 0x7f == 126 else 2
    if not frame[1] & 0x80:
        return frame[start:]
    return minijupyter.apply_mask(frame[start + 4:], frame[start:start + 4])


class UnderTheHood(ServerCase):
    """What passes the server's edge is told to who watches, as the bytes that pass; who watches can
    hold it up."""

    def setUp(self):
        self.kernel_id, self.page, self.pid = self.start_kernel()
        self.watch = self.look()

    def look(self):
        watch = Spectator(self.server)
        self.addCleanup(watch.client.close)
        return watch

    @property
    def key(self):
        (path,) = [path for path in self.server.connection_files() if self.kernel_id in path.name]
        return json.loads(path.read_text())["key"]

    def hold(self, watch=None, **rules):
        (watch or self.watch).wish("hold", self.kernel_id, rules=rules)

    def send(self, *parts):
        self.watch.wish("send", self.kernel_id, channel="shell",
                        parts=[base64.b64encode(part).decode() for part in parts])

    def waiting(self, count, channel="shell", first=None):
        """Wait until none or at least so many messages wait at the gate, the first of this type."""
        def is_so():
            channels = self.watch.news.get("held", {}).get(self.kernel_id, {})
            found, msg_type = channels.get(channel, (0, None))
            return (found >= count if count else not found) and first in (None, msg_type)

        self.watch.until(is_so)

    def test_a_request_passes_the_edge_twice_and_each_answer_too(self):
        answer = self.page.finish(self.page.start("print('hello'); 1 + 1"))
        id = answer.request["header"]["msg_id"]

        def frames(way):
            messages = [json.loads(unmasked(event["parts"][0]))
                        for event in self.watch.of("websocket", way)]
            return [message for message in messages
                    if id in (message["header"]["msg_id"], message["parent_header"].get("msg_id"))]

        def parts(way, channel):
            start = 3 if channel == "iopub" else 2     # behind topic, delimiter and signature
            return [json.loads(event["parts"][start])["msg_type"]
                    for event in self.watch.of("zmq", way, channel=channel)
                    if id.encode() in b"".join(event["parts"])]

        self.watch.until(lambda: {"idle", "execute_reply"} <= {*map(word, frames("out"))})
        self.assertEqual([*map(word, frames("in"))], ["execute_request"])
        self.assertEqual(parts("out", "shell"), ["execute_request"])
        self.assertEqual(parts("in", "shell"), ["execute_reply"])
        published = parts("in", "iopub")
        self.assertEqual(merged(published),
                         ["status", "execute_input", "stream", "execute_result", "status"])
        self.assertEqual([message["header"]["msg_type"] for message in frames("out")
                          if message["channel"] == "iopub"], published)

    def test_the_bytes_are_those_on_the_wire(self):
        request = self.page.session.message("kernel_info_request", {})
        text = json.dumps({**request, "channel": "shell"}).encode()
        self.page.wire.client.socket.sendall(frame(TEXT, text))
        (event,) = self.watch.wait_for("websocket", "in")
        self.assertEqual(event["parts"][0], frame(TEXT, text))
        (event,) = self.watch.wait_for("zmq", "out", channel="shell")
        message = kernel.Session(self.key).unpack(event["parts"])
        self.assertEqual(message["header"], request["header"])
        self.assertEqual(event["sizes"], [len(part) for part in event["parts"]])

    def test_an_event_names_the_lines_that_led_to_it(self):
        self.page.finish(self.page.start("1"))
        lines = text_of("minijupyter.py").split("\n")
        for kind, way, words in (("websocket", "in", "tap("), ("websocket", "out", ".write("),
                                 ("zmq", "out", "send_multipart("), ("zmq", "in", "recv_multi")):
            with self.subTest(f"{kind} {way}"):
                event = self.watch.wait_for(kind, way)[0]
                self.assertIn(words, lines[event["lines"][0] - 1])
        self.server.get("/api/contents")
        (event,) = self.watch.wait_for("http")
        self.assertIn("def get_contents(", lines[event["lines"][0] - 1])

    def test_an_http_exchange_is_told_with_both_heads_and_bodies(self):
        model = {"type": "file", "format": "text", "content": "x"}
        reply = self.server.put("/api/contents/told.txt", model, **{"X-Lab": "1"})
        (event,) = self.watch.wait_for("http")
        head, body, answer_head, answer = event["parts"]
        self.assertTrue(head.startswith(b"PUT /api/contents/told.txt HTTP/1.1\r\n"))
        self.assertIn(b"\r\nX-Lab: 1\r\n", head)
        self.assertEqual(json.loads(body), model)
        self.assertTrue(answer_head.startswith(b"HTTP/1.1 201 Created\r\n"))
        self.assertEqual(answer, reply.body)
        self.assertEqual(event["sizes"], [len(part) for part in event["parts"]])
        self.assertGreater(event["seconds"], 0)

    def test_a_failed_request_and_a_handshake_are_exchanges_too(self):
        self.server.get("/api/contents/none")
        wire = WebSocketWire(self.server, self.kernel_id)
        self.addCleanup(wire.close)
        statuses = [event["parts"][2].split()[1]
                    for event in self.watch.wait_for("http", count=2)]
        self.assertEqual(statuses, [b"404", b"101"])

    def test_the_watching_itself_is_not_told(self):
        self.look()
        source = self.server.get("/api/trace/kernel.py").body.decode()
        self.assertEqual(source, text_of("kernel.py"))
        self.server.get("/api")
        self.watch.wait_for("http")
        self.assertEqual([b"GET /api HTTP/1.1"], [
            event["parts"][0].split(b"\r\n")[0] for event in self.watch.of("http")])
        told_of = {event["client"] for event in self.watch.of("websocket")}
        self.assertLessEqual(told_of, {self.page.wire.session_id})   # not of who watches

    def test_only_who_has_the_token_may_look(self):
        for path in ("/api/trace", "/api/trace/kernel.py"):
            self.assertReply(self.server.get(path, Authorization=None), 403)
        self.assertReply(self.server.get("/api/trace/test_minijupyter.py"), 404)

    def assertHidden(self, *secrets_):
        seen = b"".join(part if event["kind"] != "websocket" else unmasked(part)
                        for event in self.watch.events for part in event["parts"])
        for secret in secrets_:
            self.assertNotIn(secret.encode(), seen)
        return seen

    def test_token_cookies_and_passwords_are_hidden(self):
        token = self.server.token
        tree = self.server.get(
            f"/tree?token={token}", Authorization=None, Referer=f"http://x/?token={token}")
        cookie = tree.headers["Set-Cookie"].partition(";")[0]
        self.server.get("/api", Authorization=None, Cookie=cookie)
        login = self.server.get("/login", Authorization=None)
        xsrf = login.headers["Set-Cookie"].partition(";")[0].partition("=")[2]
        self.server.request("POST", "/login", f"password=sesame&_xsrf={xsrf}", {
            "Authorization": None, "Cookie": f"_xsrf={xsrf}"})
        self.watch.wait_for("http", count=4)
        self.assertHidden(token, cookie.partition("=")[2], "sesame", xsrf)

    def test_a_kernels_key_is_hidden_wherever_it_stands(self):
        self.page.finish(self.page.start(f"print({self.key!r})"))
        self.watch.wait_for("websocket", "out", count=5)
        seen = self.assertHidden(self.key)
        self.assertIn(b"*" * len(self.key), seen)

    def test_what_is_typed_is_hidden_when_the_question_is_secret(self):
        self.page.typed += ["Ada", "sesame"]
        self.page.finish(self.page.start("import getpass; input(); getpass.getpass() and None"))
        self.watch.until(lambda: len(self.watch.of("zmq", "out", channel="stdin")) == 2)
        self.assertIn(b"Ada", self.assertHidden("sesame"))

    def test_what_is_typed_is_hidden_when_nobody_heard_the_question(self):
        answer = self.page.start("input() and None")
        self.page.until(lambda: answer.questions)
        self.watch = self.look()
        self.page.type("sesame", answer.question)
        self.page.finish(answer)
        self.watch.until(lambda: self.watch.of("zmq", "out", channel="stdin"))
        self.assertHidden("sesame")

    def test_secrets_in_frames_are_hidden_at_equal_length(self):
        secrets_ = minijupyter.Secrets(None)
        secrets_.known = {"t0ken": minijupyter.spellings("t0ken")}
        reply = b'{"msg_type": "input_reply", "content": {"value": "a\\"b"}}'
        for name, data, seen in [
                ("masked", frame(TEXT, b"my t0ken"), frame(TEXT, b"my *****")),
                ("plain", frame(TEXT, b"my t0ken", mask=None), frame(TEXT, b"my *****", mask=None)),
                ("nothing", frame(TEXT, b"Hello"), frame(TEXT, b"Hello")),
                ("empty", frame(PING), frame(PING)),
                ("a fragment", frame(TEXT, b"my t0", fin=False), frame(TEXT, b"*****", fin=False)),
                ("typed", frame(TEXT, reply), frame(TEXT, reply.replace(b'a\\"b', b"****")))]:
            with self.subTest(name):
                self.assertEqual(secrets_.in_frame(data), seen)
        whole = {"kind": "websocket", "sizes": [99], "parts": [frame(TEXT, b"x" * 50 + b"t0k")]}
        self.assertEqual(unmasked(secrets_.seen(whole)[0]), b"x" * 48)   # it was cut amid a secret
        for text, is_hidden in ((b"my t0ken" * 99, True), (b"Hello" * 99, False)):
            data = minijupyter.encode_frame(
                TEXT | minijupyter.COMPRESSED, minijupyter.deflate(text, 15), MASK)
            self.assertEqual(secrets_.in_frame(data) != data, is_hidden)

    def test_of_a_large_message_the_beginning_is_kept_and_its_size(self):
        def large():
            return [event for event in self.watch.of("websocket", "out")
                    if event["sizes"][0] > 1_000_000]

        self.page.finish(self.page.start("'x' * 1_000_000"))
        self.watch.until(large)
        kept = len(large()[0]["parts"][0])
        self.assertIn(minijupyter.MOST_TRACED - kept, range(100))   # the end could hide a secret

    def test_what_cannot_be_read_is_hidden_whole_and_the_next_is_told(self):
        event = {"kind": "websocket", "way": "in", "sizes": [9], "parts": [
            minijupyter.encode_frame(TEXT | minijupyter.COMPRESSED, b"\xff" * 3, MASK)]}
        told = minijupyter.Spectator(None, None).frame(event)
        self.assertTrue(told.endswith(b"*" * 9))
        self.assertEqual(len(event["parts"][0]), 9)   # another who watches gets it, too

    def test_of_a_large_save_the_answer_is_kept_as_well(self):
        model = {"type": "file", "format": "text", "content": "x" * 100_000}
        self.server.put("/api/contents/large.txt", model)
        (event,) = self.watch.wait_for("http")
        self.assertTrue(event["parts"][2].startswith(b"HTTP/1.1 201 Created"))
        self.assertEqual(event["sizes"][1], len(json.dumps(model)))

    def test_events_that_come_too_fast_are_counted_not_kept(self):
        watch = minijupyter.Spectator(None, None)
        for _ in range(minijupyter.MOST_EVENTS + 7):
            watch.note({"parts": [b"1234"]})
        self.assertEqual((len(watch.events), watch.missed), (minijupyter.MOST_EVENTS, 7))
        for _ in range(2):
            watch.note({"parts": [bytes(minijupyter.MOST_WATCHED // 2 + 1)]})
        self.assertEqual((len(watch.events), watch.size), (1, minijupyter.MOST_WATCHED // 2 + 1))

    def test_a_held_message_waits_for_a_step(self):
        self.hold(shell=PAUSE)
        answer = self.page.start("1 + 1")
        self.waiting(1)
        self.assertEqual(self.watch.of("zmq", "out", channel="shell"), [])
        self.watch.wish("step", self.kernel_id)
        self.page.until(lambda: answer.is_idle)     # iopub is not held
        self.waiting(1, first="execute_reply")
        self.assertIsNone(answer.reply)
        self.watch.wish("step", self.kernel_id)
        self.page.finish(answer)

    def test_a_step_with_nothing_to_let_pass_lets_nothing_pass_later(self):
        self.hold(shell=PAUSE)
        self.watch.wish("step", self.kernel_id)
        self.page.start("1")
        self.waiting(1)
        self.page.start("2")     # when this one has come, the first has not gone
        self.waiting(2)

    def test_who_stops_watching_holds_nothing_any_more(self):
        self.hold(shell=PAUSE, iopub=PAUSE, control=PAUSE)
        answers = [self.page.start(f"{n}") for n in range(9)]
        self.waiting(9)
        self.watch.client.close()
        self.page.finish(*answers)
        self.assertEqual([answer.result for answer in answers], [str(n) for n in range(9)])

    def test_of_two_who_watch_the_one_that_goes_leaves_the_others_hold(self):
        other = self.look()
        self.hold(other, shell=PAUSE)
        self.hold(shell=PAUSE)
        other.client.socket.sendall(frame(CLOSE))
        while other.client.receive() is not None:
            pass
        self.assertTrue(other.client.is_at_end())     # its thread has ended
        third = self.look()
        third.until(lambda: self.kernel_id in third.news.get("held", {}))
        answer = self.page.start("1")
        self.waiting(1)
        self.hold()
        self.page.finish(answer)

    def test_what_the_server_itself_asks_passes_what_is_held(self):
        self.hold(control=PAUSE)
        self.page.ask("kernel_info_request", "control")
        self.waiting(1, "control")
        self.server.post(f"/api/kernels/{self.kernel_id}/restart")
        self.watch.until(lambda: b"shutdown_request" in b"".join(
            part for event in self.watch.of("zmq", "out", channel="control")
            for part in event["parts"]))

    def test_what_is_held_for_a_process_that_ends_does_not_reach_the_next(self):
        self.hold(shell=PAUSE)
        self.page.start("print('late')")
        self.waiting(1)
        self.server.post(f"/api/kernels/{self.kernel_id}/restart")
        self.waiting(0)
        self.hold()
        new = self.page.finish(self.page.start("print('new')"))
        self.assertEqual((new.count, new.text()), (1, "new\n"))

    def test_slow_motion_keeps_the_order(self):
        self.hold(shell=("every", 0.02), iopub=("every", 0.02))
        answers = [self.page.start(f"print({n})") for n in range(3)]
        self.page.finish(*answers)
        self.assertEqual([answer.story for answer in answers],
                         ["busy execute_input stream idle"] * 3)
        times = [event["at"] for event in self.watch.wait_for("websocket", "out", count=15)]
        self.assertGreater(times[-1] - times[0], 14 * 0.02)

    def test_when_iopub_comes_late_the_reply_is_there_before_the_output(self):
        self.hold(iopub=("delay", 60))
        answer = self.page.start("1 + 1")
        self.page.until(lambda: answer.reply)
        self.waiting(4, "iopub")
        self.assertEqual(answer.messages, [])
        self.hold(iopub=("delay", 0.1))
        self.page.finish(answer)
        self.assertEqual(answer.result, "2")

    def test_a_step_does_not_count_what_waits_for_its_time(self):
        self.hold(control=PAUSE, iopub=("delay", 60))
        self.page.start("1")
        self.waiting(4, "iopub")
        self.watch.wish("step", self.kernel_id)
        asked = self.page.ask("kernel_info_request", "control")
        self.waiting(1, "control")
        self.watch.wish("step", self.kernel_id)
        self.watch.until(lambda: self.watch.of("zmq", "in", channel="control"))
        self.assertIsNone(asked.reply)     # the reply waits for a step of its own

    def test_more_than_can_be_kept_passes(self):
        self.hold(iopub=PAUSE)
        answer = self.page.start("for i in range(40): print('x' * 1_000_000)")
        self.page.until(lambda: len(answer.text()) > 10_000_000)
        self.assertFalse(answer.is_idle)
        self.hold()
        self.page.finish(answer)
        self.assertEqual(len(answer.text()), 40 * 1_000_001)

    def test_what_is_held_for_a_page_that_goes_is_there_when_it_returns(self):
        self.hold(iopub=PAUSE)
        answer = self.page.start("print('held')")
        self.page.until(lambda: answer.reply)
        self.waiting(4, "iopub")
        self.page.wire.close()
        self.hold()
        self.watch.until(lambda: self.kernel_id not in self.watch.news["held"])
        self.page.wire = WebSocketWire(self.server, self.kernel_id, self.page.wire.session_id)
        self.addCleanup(self.page.wire.close)
        self.page.finish(answer)
        self.assertEqual(answer.text(), "held\n")

    def test_a_connection_can_be_cut_and_others_stay(self):
        other = self.server.frontend(self.kernel_id)
        self.addCleanup(other.wire.close)
        self.watch.wish("drop", self.kernel_id, client=self.page.wire.session_id)
        with self.assertRaises((EOFError, ConnectionError)):
            self.page.until(lambda: False)
        other.finish(other.start("1"))

    def test_a_kernel_can_be_killed_and_its_end_is_told(self):
        self.watch.wish("kill", self.kernel_id)
        self.watch.until(lambda: "start as process" in self.watch.words())
        self.assertRegex(self.watch.words(),
                         r"(?s)signal 9 \(Killed\).*ended with exit code -9.*start as process")
        self.page.until(lambda: "restarting" in self.page.log)

    def test_a_forgery_is_dropped_by_the_kernel_which_says_why(self):
        self.page.finish(self.page.start("x = 1"))
        parts = [bytearray(part) for part in self.watch.wait_for("zmq", "out")[0]["parts"]]
        self.send(*parts)
        self.watch.until(lambda: "replayed" in self.watch.words())
        parts[-1][12] ^= 1
        self.send(*parts)
        self.watch.until(lambda: "the signature does not fit" in self.watch.words())

    def test_the_key_is_told_to_who_asks(self):
        self.watch.wish("key", self.kernel_id)
        self.watch.until(lambda: "key" in self.watch.news)
        self.assertEqual(self.watch.news["key"], self.key)

    def test_a_wish_that_cannot_be_done_is_told_and_ends_nothing(self):
        none = "00000000-0000-0000-0000-000000000000"
        for wish in ("", "x", "[]", "null", '{"do": "fly"}', '{"do": "step"}', b"", b"\0\0\0\1",
                     json.dumps({"do": "run", "kernel": self.kernel_id}),
                     json.dumps({"do": "step", "kernel": none}),
                     json.dumps({"do": "hold", "kernel": self.kernel_id}),
                     *(json.dumps({"do": "hold", "kernel": self.kernel_id, "rules": rules})
                       for rules in (1, {"shell": "x"}, {"x": PAUSE}, {"shell": ["every", -1]},
                                     {"shell": ["delay", "x"]}, {"shell": ["delay", 1e9]})),
                     *(json.dumps({"do": "send", "kernel": self.kernel_id, **fields}) for fields in
                       ({}, {"channel": "iopub"}, {"channel": "shell", "parts": 1}))):
            with self.subTest(wish):
                self.watch.news.pop("problem", None)
                self.watch.client.send(wish)
                self.watch.until(lambda: "problem" in self.watch.news)
        self.page.finish(self.page.start("1"))


class PastFlaws(ServerCase):
    """What once went wrong in Jupyter's servers, each under its number; those that other tests
    tell are not repeated: foreign origins, paths to the root's neighbours, a kernel's folder."""

    def setUp(self):
        self.host = f"127.0.0.1:{self.server.port}"
        reply = self.server.get(f"/tree?token={self.server.token}", Authorization=None)
        self.cookie = reply.headers["Set-Cookie"].partition(";")[0]

    def with_cookie(self, method, path, body=None, **headers):
        """A request as a browser sends it that has our cookie and not the token."""
        return self.server.request(method, path, body, {
            "Authorization": None, "Cookie": self.cookie, **headers})

    def test_a_form_of_another_site_changes_nothing(self):
        """CVE-2015-5607, CVE-2016-9971; without an Origin, too, which old browsers leave out, and
        CVE-2026-40864: whatever the request claims to be."""
        before = sorted(self.root.iterdir())
        for headers in ({}, {"Origin": "null"}, {"Origin": "http://evil.example"},
                        {"Referer": "http://evil.example/"}, {"Sec-Fetch-Mode": "no-cors"},
                        {"Sec-Fetch-Site": "none"}, {"Sec-Fetch-Site": "cross-site", "Origin":
                                                     f"http://{self.host}"}):
            for path in ("/api/contents", "/api/kernels", "/api/sessions", "/api/shutdown"):
                with self.subTest(path, **headers):
                    reply = self.with_cookie("POST", path, "type=notebook&path=x", **{
                        "Content-Type": "application/x-www-form-urlencoded", **headers})
                    self.assertReply(reply, 403)
        self.assertEqual(sorted(self.root.iterdir()), before)
        self.assertEqual(self.server.get("/api/kernels").json, [])

    def test_no_address_that_a_notebook_may_name_has_an_effect(self):
        """A picture is loaded with our cookie. Whatever GET it names: who it is shown to stays
        logged in, no file, kernel or session comes or goes, and a token in the address of one
        does not replace the reader's cookie."""
        (self.root / "kept.txt").write_text("kept")
        before = sorted(self.root.rglob("*"))
        picture = {"Sec-Fetch-Dest": "image", "Sec-Fetch-Mode": "no-cors",
                   "Sec-Fetch-Site": "same-origin"}
        samples = {r"(?:/.*)?": "/kept.txt", r"(?:/(.*))?": "/kept.txt", r"(.+)": "kept.txt",
                   r"(?:tree|notebooks|edit)": "tree", r"([\w.-]+)": "x", r"([^/]+)": "x",
                   minijupyter.ID: "00000000-0000-0000-0000-000000000000"}
        for method, path, _ in minijupyter.ROUTES:
            for part, sample in samples.items():
                path = path.replace(part, sample)
            for query in ("", "?token=wrong", "?next=/api"):
                if method == "GET" and not re.search(r"[()\\]", path):
                    with self.subTest(path + query):
                        reply = self.with_cookie("GET", path + query, **picture)
                        self.assertNotIn("minijupyter-", reply.headers["Set-Cookie"] or "")
        self.assertEqual(sorted(self.root.rglob("*")), before)
        self.assertEqual([self.server.get(f"/api/{kind}").json for kind in (
            "kernels", "sessions")], [[], []])

    def test_a_file_of_the_user_is_no_page_of_ours(self):
        """CVE-2015-7337, CVE-2018-21030: a file that a browser would run is shut in a sandbox."""
        script = "<script>fetch('/api/contents')</script>"
        for name in ("evil.html", "evil.svg", "evil.xhtml", "evil.xml", "evil", "evil.js"):
            (self.root / name).write_text(script)
            reply = self.server.get(f"/files/{name}")
            policy = reply.headers["Content-Security-Policy"].split(";")
            self.assertEqual(policy[0], "sandbox allow-scripts", name)
            self.assertEqual(reply.headers["X-Content-Type-Options"], "nosniff")
        for path in ("/edit/evil.html", "/tree/evil.html", "/notebooks/evil.html"):
            self.assertNotIn(script.encode(), self.server.get(path).body)
        (self.root / "evil.ipynb").write_text(script)
        self.assertIn("attachment", self.server.get("/files/evil.ipynb").headers[
            "Content-Disposition"])

    def test_a_name_cannot_become_part_of_a_page_or_a_header(self):
        """CVE-2015-6938, CVE-2018-19352: here the names of files; a page gets them as JSON."""
        name = "<img src=x onerror=alert(1)>\r\nSet-Cookie: a=b\".txt"
        self.assertReply(self.server.put(f"/api/contents/{quote(name)}", {
            "type": "file", "format": "text", "content": "x"}), 201)
        reply = self.server.get(f"/files/{quote(name)}?download=1")
        self.assertEqual((reply.status, reply.headers["Set-Cookie"]), (200, None))
        listed = self.server.get("/api/contents")
        self.assertEqual(listed.headers["Content-Type"], "application/json")
        self.assertIn(name, [model["name"] for model in listed.json["content"]])
        for path in (f"/tree/{quote(name)}", f"/x?{quote(name)}", f"/api/contents/no{quote(name)}"):
            reply = self.server.get(path, Authorization=None)
            self.assertNotIn(b"<img", reply.body)
            self.assertIsNone(reply.headers["Set-Cookie"])

    def test_no_other_site_may_include_what_is_ours(self):
        """CVE-2019-9644, CVE-2023-40170: as a script, an image or a frame, with our cookie."""
        (self.root / "secret.js").write_text("secret = 1")
        for path in ("/files/secret.js", "/api/contents/secret.js", "/api/kernels", "/api/me"):
            for site in ("cross-site", "same-site"):
                with self.subTest(path, site=site):
                    self.assertReply(self.with_cookie("GET", path, **{"Sec-Fetch-Site": site}), 403)
            same = self.with_cookie("GET", path, **{"Sec-Fetch-Site": "same-origin"})
            self.assertEqual(same.status, 200)
            self.assertIn("frame-ancestors 'self'", same.headers["Content-Security-Policy"])
            self.assertIsNone(same.headers["Access-Control-Allow-Origin"])

    def test_secrets_are_in_no_error_and_on_no_screen(self):
        """CVE-2022-24757, CVE-2022-24758: not in the log either when the server fails."""
        secrets_ = [self.cookie.partition("=")[2], "c2VjcmV0", "other-secret"]
        for path in ("/api/nothing", "/api/contents/none", "/files/none", "/api/contents?type=x",
                     "/api/kernels/00000000-0000-0000-0000-000000000000/channels"):
            for method in ("GET", "DELETE", "BREW"):
                reply = self.with_cookie(method, path, **{
                    "Authorization": "Basic c2VjcmV0", "Referer": "http://x/?token=other-secret"})
                self.assertGreaterEqual(reply.status, 400)
                for secret in [*secrets_, self.server.token]:
                    self.assertNotIn(secret.encode(), reply.body)
        for secret in secrets_:
            self.assertNotIn(secret, self.server.process.output)

    def test_a_hidden_file_is_hidden_by_its_exact_name_too(self):
        """CVE-2022-29238."""
        (self.root / ".hidden").mkdir()
        for name in (".secret", ".hidden/secret.txt"):
            (self.root / name).write_text("SECRET")
            for prefix in ("/files/", "/api/contents/", "/api/contents/x/../"):
                self.assertReply(self.server.get(f"{prefix}{name}"), 404)
            model = {"type": "file", "format": "text", "content": "changed"}
            self.assertReply(self.server.put(f"/api/contents/{name}", model), [400, 404])
            self.assertReply(self.server.delete(f"/api/contents/{name}"), [400, 404])
            self.assertReply(self.server.patch(f"/api/contents/{name}", {"path": "x"}), [400, 404])
            self.assertReply(self.server.post("/api/contents", {"copy_from": name}), [400, 404])
            self.assertEqual((self.root / name).read_text(), "SECRET")

    def test_the_files_that_hold_tokens_and_keys_cannot_be_read_from_the_root(self):
        """CVE-2022-29241: when the root is the home folder, Jupyter's own files lie below it."""
        home = self.folder()
        runtime = home / "root" / ".local" / "share" / "jupyter" / "runtime"
        server = self.own_server(home, env={"JUPYTER_RUNTIME_DIR": str(runtime)})
        kernel_id = self.assertReply(server.post("/api/kernels", {}), 201).json["id"]
        self.addCleanup(server.delete, f"/api/kernels/{kernel_id}")
        files = [path for path in runtime.iterdir() if path.is_file()]
        self.assertGreaterEqual(len(files), 1)
        for path in files:
            self.assertEqual(path.stat().st_mode & 0o077, 0)
            relative = path.relative_to(server.root)
            for prefix in ("/files/", "/api/contents/"):
                self.assertEqual(server.get(f"{prefix}{relative}").status, 404)

    def test_an_error_shows_no_path_and_no_traceback(self):
        """CVE-2023-49080: not even one that nobody foresaw."""
        with tempfile.TemporaryDirectory() as root, unittest.mock.patch.object(
                minijupyter.Handler, "list_kernels", side_effect=RuntimeError(f"in {root}")), \
                contextlib.redirect_stderr(io.StringIO()) as log:
            server = minijupyter.SERVERS[-1](root, "127.0.0.1", 0, "secret")
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            client = http.client.HTTPConnection(*server.server_address, timeout=SECONDS)
            client.request("GET", "/api/kernels", headers={"Authorization": "token secret"})
            reply = Reply(client.getresponse())
            client.close()
            server.shutdown()
            server.server_close()
            thread.join()
        self.assertEqual(reply.status, 500)
        self.assertNotIn(root, reply.body.decode())
        self.assertNotIn("Traceback", reply.body.decode())
        self.assertIn("RuntimeError", log.getvalue())   # who runs the server may know

    def test_nobody_makes_the_server_touch_a_path_before_the_token(self):
        """CVE-2024-35178: on Windows a look at a foreign path gives the user's password hash."""
        for path in ("//evil.example/share/x", "\\\\evil.example\\share\\x", "/etc/passwd",
                     "C:\\Windows\\win.ini"):
            for prefix in ("/files/", "/api/contents/", "/kernelspecs/python3/", "/tree/"):
                url = prefix + quote(path, safe="")
                with self.subTest(url):
                    self.assertIn(self.server.get(url, Authorization=None).status, (302, 403, 404))
                    if prefix != "/tree/":
                        self.assertReply(self.server.get(url), [400, 404])

    def test_a_root_that_is_the_whole_disk_has_no_outside(self):
        """CVE-2026-5422: "/" ends with its own separator."""
        contents = minijupyter.CONTENTS[-1](os.sep)
        self.assertEqual(contents.resolve("etc"), os.path.join(os.sep, "etc"))
        self.assertTrue(minijupyter.is_within("/etc", "/"))
        self.assertFalse(minijupyter.is_within("/root-sibling", "/root"))


# ---- 9. The page, in Chromium and Firefox ------------------------------------------
#
# A new user's first ten minutes, with real clicks and keys, then whole notebooks by other
# people. Each test opens a page of its own; one browser and one server serve them all. Nothing
# a page does may end in an error on its console, or in a request to another host.

BROWSER_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking",
                   "--disable-component-update", "--disable-sync", "--no-first-run",
                   "--disable-quic",
                   # Chromium's own popups are pages, loaded for each profile beside what is tested.
                   # The last list of features counts: the other ones are Playwright's.
                   "--disable-features=WebUIOmniboxPopup,WebUIOmniboxAimPopup,AimEnabled,"
                   "AvoidUnnecessaryBeforeUnloadCheckSync,DestroyProfileOnBrowserClose,"
                   "HttpsUpgrades,MediaRouter,OptimizationHints,PaintHolding,PreconnectToSearch"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
IS_DONE = """() => !changedOutputs.size && ![...document.querySelectorAll('.cell')].some(
    cell => ['queued', 'running'].includes(cell.dataset.state))"""


@functools.cache
def browser():
    """The one Chromium of all page tests; it is closed when the last test is over."""
    from playwright.sync_api import sync_playwright
    playwright = sync_playwright().start()
    unittest.addModuleCleanup(playwright.stop)
    chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER_OPTIONS)
    unittest.addModuleCleanup(chromium.close)
    return chromium


class Tab:
    """A browser tab with a page of ours, in a user's words. Cells are counted from 0."""

    def __init__(self, page):
        self.page = page

    def cell(self, i):
        return self.page.locator(".cell").nth(i)

    def sources(self):
        return self.page.eval_on_selector_all(
            ".cell textarea.editor", "all => all.map(a => a.value)")

    def types(self):
        return self.page.eval_on_selector_all(".cell", "all => all.map(c => c.dataset.type)")

    def states(self):
        return self.page.eval_on_selector_all(".cell", "all => all.map(c => c.dataset.state)")

    def outputs(self, i):
        return self.cell(i).locator(".outputs")

    def texts(self):
        """What every cell shows as its output."""
        return self.page.eval_on_selector_all(
            ".cell .outputs", "all => all.map(o => o.textContent)")

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def select(self, i):
        """Select a cell in command mode."""
        self.cell(i).locator("textarea.editor").focus()
        self.press("Escape")

    def write(self, i, text):
        """Replace the source of a cell, as if pasted."""
        self.cell(i).locator("textarea.editor").fill(text)

    def run(self, i, text=None):
        """Run a cell with Shift+Enter and wait until it is done."""
        if text is not None:
            self.write(i, text)
        self.cell(i).locator("textarea.editor").focus()
        self.press("Shift+Enter")
        self.wait_until_done()

    def wait_until_done(self, seconds=SECONDS):
        self.page.wait_for_function(IS_DONE, timeout=seconds * 1000)

    def at_rest(self, place):
        """A place on the page, once cells that came into sight have got their true heights."""
        return self.page.evaluate(f"""async () => {{
            for (let before, still = 0; still < 3; before = {place}) {{
                await new Promise(requestAnimationFrame);
                still = before === {place} ? still + 1 : 0;
            }}
            return {place};
        }}""")

    def command(self, name):
        """Choose a command, wherever its button or menu item is."""
        self.page.locator(f"[data-command={name}]").first.dispatch_event("click")

    def choose(self, label):
        """Press a button of the open dialog."""
        self.page.locator("dialog[open]").get_by_role("button", name=label, exact=True).click()

    def wait_for(self, **state):
        """Wait for a state of the page: kernel="idle", saved="true"."""
        self.page.wait_for_selector("body" + "".join(
            f"[data-{name}={value}]" for name, value in state.items()))

    def save(self):
        with self.page.expect_response(lambda response: response.request.method == "PUT"):
            self.press("Control+s")
        self.wait_for(saved="true")


@needs("playwright")
@unittest.skipUnless(CHROMIUM, "needs chromium on the PATH")
class PageCase(ServerCase):
    """Tests that share one browser profile, which is emptied after each of them."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.profile = browser().new_context()   # costs as much as opening two notebooks
        cls.addClassCleanup(cls.profile.close)
        cls.broom = cls.profile.new_cdp_session(cls.profile.new_page())

    def setUp(self):
        self.problems = []  # what no test may cause: errors on the console, foreign requests
        self.use(self.profile)
        self.addCleanup(self.empty_profile)

    def use(self, context):
        self.context = context
        context.set_default_timeout(SECONDS * 1000)
        context.on("page", self.watch)
        context.add_cookies([self.cookie()])

    def use_own_profile(self):
        """For a test that changes what cannot be changed back: the clock, a script in each page."""
        context = browser().new_context()
        self.addCleanup(context.close)
        self.use(context)

    def empty_profile(self):
        self.profile.remove_listener("page", self.watch)
        self.profile.unroute_all()
        for page in self.profile.pages[1:]:   # the first one holds the broom
            page.close()
        self.profile.clear_cookies()
        self.profile.clear_permissions()
        self.broom.send("Storage.clearDataForOrigin",
                        {"origin": self.address(""), "storageTypes": "all"})

    def cookie(self):
        reply = self.server.get(f"/tree?token={self.server.token}", Authorization=None)
        name, _, value = reply.headers["Set-Cookie"].partition(";")[0].partition("=")
        return {"name": name, "value": value, "url": self.address("/")}

    def tearDown(self):
        for session in self.server.get("/api/sessions").json:
            self.server.delete("/api/sessions/" + session["id"])
        self.assertEqual(self.problems, [])

    def address(self, path):
        return f"http://127.0.0.1:{self.server.port}{path}"

    def watch(self, page):
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self.logged)
        page.on("request", self.requested)

    def logged(self, message):
        is_refusal = "status of 4" in message.text  # of the server, which a test may want
        if message.type == "error" and not is_refusal:
            self.problems.append(message.text)

    def requested(self, request):
        ours = self.address("/")
        if request.url.startswith("http") and not request.url.startswith(ours):
            self.problems.append(f"asks {request.url}")

    @property
    def name(self):
        """The file name of this test's notebook."""
        return f"{self._testMethodName.removeprefix('test_')[:35]}.ipynb"

    def visit(self, path):
        page = self.context.new_page()
        page.goto(self.address(path))
        return Tab(page)

    def open(self, *sources, name=None, **metadata):
        """A tab on a new notebook with these sources, its kernel ready."""
        name = name or self.name
        (self.root / name).write_bytes(jupyter_bytes(notebook(*sources, **metadata)))
        return self.reopen(name)

    def reopen(self, name):
        tab = self.visit("/notebooks/" + quote(name))
        tab.wait_for(kernel="idle")
        return tab

    def saved(self, name=None):
        """The notebook on disk."""
        return json.loads((self.root / (name or self.name)).read_text("utf-8"))

    def saved_sources(self, name=None):
        return ["".join(cell["source"]) for cell in self.saved(name)["cells"]]

    def assertShows(self, locator, text):
        """Sooner or later the element shows this text."""
        from playwright.sync_api import expect
        expect(locator).to_contain_text(text, timeout=SECONDS * 1000)

    def assertCount(self, locator, count):
        from playwright.sync_api import expect
        expect(locator).to_have_count(count, timeout=SECONDS * 1000)


class PageFiles(PageCase):
    def test_the_printed_address_shows_the_files_and_hides_the_token(self):
        (self.root / "shown.ipynb").write_bytes(jupyter_bytes(notebook()))
        self.context.clear_cookies()
        tab = self.visit(f"/tree?token={self.server.token}")
        self.assertShows(tab.page.locator("main"), "shown.ipynb")
        self.assertEqual(tab.page.url, self.address("/tree"))

    def test_without_the_token_the_page_asks_for_it(self):
        self.context.clear_cookies()
        tab = self.visit("/tree")
        tab.page.locator("input").first.fill(self.server.token)
        tab.press("Enter")
        tab.page.wait_for_selector("body[data-page=tree]")
        self.problems.clear()  # the browser notes the 403 of the first visit

    def test_a_click_opens_a_notebook(self):
        (self.root / "click me.ipynb").write_bytes(jupyter_bytes(notebook("'opened'")))
        tab = self.visit("/tree")
        with self.context.expect_page() as opened:
            tab.page.get_by_text("click me.ipynb").click()
        opened.value.wait_for_selector("body[data-kernel=idle]")
        self.assertEqual(Tab(opened.value).sources(), ["'opened'"])

    def test_folders_can_be_entered_and_left(self):
        (self.root / "folder" / "inner").mkdir(parents=True)
        tab = self.visit("/tree")
        tab.page.get_by_role("link", name="folder", exact=True).click()
        tab.page.get_by_role("link", name="inner", exact=True).click()
        tab.page.wait_for_url("**/tree/folder/inner")
        tab.page.locator(".crumbs").get_by_text("Files").click()
        tab.page.wait_for_url("**/tree")

    def test_a_new_notebook_runs_its_first_cell(self):
        tab = self.visit("/tree")
        tab.page.locator("[data-command=new]").click()
        with self.context.expect_page() as opened:
            tab.page.locator("[data-command=new-notebook]").first.click()
        new = Tab(opened.value)
        new.wait_for(kernel="idle")
        new.run(0, "6 * 7")
        self.assertShows(new.outputs(0), "42")

    def test_a_file_is_renamed_and_deleted(self):
        (self.root / "before.txt").write_text("x")
        tab = self.visit("/tree")
        tab.page.get_by_label("Select before.txt").check()
        tab.page.locator("[data-command=rename]").last.click()
        tab.page.locator("dialog input").fill("after.txt")
        tab.choose("Rename")
        self.assertShows(tab.page.locator("tbody tr:has(:checked)"), "after.txt")
        tab.page.locator("[data-command=delete]").click()
        tab.choose("Delete")
        self.assertCount(tab.page.get_by_text("after.txt"), 0)
        self.assertFalse((self.root / "before.txt").exists() or (self.root / "after.txt").exists())

    def test_a_folder_with_files_is_deleted_after_one_more_question(self):
        (self.root / "full").mkdir()
        (self.root / "full" / "inside.txt").write_text("x")
        tab = self.visit("/tree")
        tab.page.get_by_label("Select full").check()
        tab.page.locator("[data-command=delete]").click()
        tab.choose("Delete")
        self.assertShows(tab.page.locator("dialog[open]"), "not empty")
        self.assertTrue((self.root / "full" / "inside.txt").exists())
        tab.choose("Delete all")
        self.assertCount(tab.page.get_by_label("Select full"), 0)
        self.assertFalse((self.root / "full").exists())

    def test_names_that_no_page_can_send_are_counted_below_the_list(self):
        folder = self.root / "odd names"
        folder.mkdir()
        (folder / "fine.txt").write_text("x")
        (folder / "back\\slash").write_text("x")
        tab = self.visit("/tree/odd%20names")
        self.assertShows(tab.page.locator("main"), "fine.txt")
        self.assertShows(tab.page.locator("main"), "Not listed because of their names")

    def test_what_may_not_be_written_says_so(self):
        (self.root / "protected.txt").write_text("old")
        (self.root / "protected.txt").chmod(0o444)
        tab = self.visit("/edit/protected.txt")
        tab.page.locator("textarea.editor").fill("new")
        tab.press("Control+s")
        self.assertShows(tab.page.locator("body"), "write-protected")

    def test_hostile_file_names_are_only_names(self):
        name = "<img src=x onerror=document.title='owned'>.txt"
        (self.root / name).write_text("x")
        tab = self.visit("/tree")
        self.assertShows(tab.page.locator("main"), name)
        self.assertNotEqual(tab.page.title(), "owned")

    def test_a_text_file_is_edited_and_saved(self):
        (self.root / "notes.txt").write_text("old")
        tab = self.visit("/edit/notes.txt")
        tab.page.locator("textarea.editor").fill("new ☃\n")
        tab.save()
        self.assertEqual((self.root / "notes.txt").read_text("utf-8"), "new ☃\n")

    def test_a_program_has_line_numbers_and_prose_wraps(self):
        for name, numbers in (("program.py", "1\n2\n3"), ("prose.md", None)):
            (self.root / name).write_text("word = 1\n" + "word " * 1000 + "\n")
            tab = self.visit(f"/edit/{name}")
            tab.page.wait_for_selector("textarea.editor:focus")
            shown = tab.page.locator(".numbers:visible")
            self.assertEqual(shown.text_content() if shown.count() else None, numbers)
            is_wrapped = tab.page.locator(".input").evaluate(
                "input => input.scrollWidth <= input.clientWidth")
            self.assertEqual(is_wrapped, numbers is None)

    def test_a_text_file_keeps_its_line_ends(self):
        (self.root / "windows.txt").write_bytes(b"one\r\ntwo\r\n")
        tab = self.visit("/edit/windows.txt")
        tab.page.locator("textarea.editor").press("x")
        tab.save()
        self.assertEqual((self.root / "windows.txt").read_bytes(), b"xone\r\ntwo\r\n")

    def test_a_long_text_file_is_shown_from_its_start(self):
        (self.root / "long.txt").write_text("line\n" * 500)
        tab = self.visit("/edit/long.txt")
        tab.page.wait_for_selector("textarea.editor:focus")
        self.assertEqual(tab.page.evaluate("scrollY"), 0)

    def test_shift_and_a_click_check_all_files_between(self):
        for name in "abcd":
            (self.root / f"{name}.txt").touch()
        tab = self.visit("/tree")
        tab.page.get_by_label("Select b.txt").click()
        tab.page.get_by_label("Select d.txt").click(modifiers=["Shift"])
        self.assertTrue(tab.page.get_by_label("Select c.txt").is_checked())
        self.assertFalse(tab.page.get_by_label("Select a.txt").is_checked())

    def test_running_kernels_are_listed_and_shut_down(self):
        tab = self.open("1")
        files = self.visit("/tree")
        files.page.get_by_role("tab", name="Running").click()
        row = files.page.locator("tr", has_text=self.name)
        row.get_by_role("button", name="Shut down").click()
        self.assertCount(row, 0)
        tab.page.wait_for_selector("body[data-kernel=dead], body[data-kernel=none]")

    def test_a_file_that_is_no_notebook_is_refused_in_clear_words_and_mended_as_text(self):
        (self.root / "broken.ipynb").write_bytes(jupyter_bytes(notebook("x"))[:-2])
        tab = self.visit("/notebooks/broken.ipynb")
        self.assertShows(tab.page.locator("main"), "JSON")
        tab.page.get_by_role("link", name="Open as text").click()
        tab.page.wait_for_selector("textarea:focus")
        tab.press("Control+End", "}")
        tab.save()
        self.reopen("broken.ipynb")
        self.problems.clear()      # the browser notes the reply that refused it


class PageRuns(PageCase):
    def test_shift_enter_runs_a_cell_and_goes_on(self):
        tab = self.open("x = 6", "x * 7")
        tab.run(0)
        tab.press("Shift+Enter")
        self.assertShows(tab.outputs(1), "42")
        self.assertEqual(tab.cell(1).locator(".prompt").text_content(), "[2]")
        self.assertEqual(len(tab.sources()), 3)  # a new cell at the end

    def test_control_enter_stays_and_alt_enter_inserts(self):
        tab = self.open("'a'", "'b'")
        tab.cell(0).locator("textarea.editor").focus()
        tab.press("Control+Enter")
        self.assertShows(tab.outputs(0), "'a'")
        self.assertEqual(len(tab.sources()), 2)
        tab.cell(0).locator("textarea.editor").focus()
        tab.press("Alt+Enter")
        self.assertEqual(tab.sources(), ["'a'", "", "'b'"])

    def test_typed_code_runs(self):
        tab = self.open("")
        tab.cell(0).locator("textarea.editor").click()
        tab.page.keyboard.type("for i in range(3):\nprint(i * 'ab')")
        tab.run(0)
        self.assertShows(tab.outputs(0), "abab")

    def test_a_running_cell_shows_a_star_and_the_kernel_is_busy(self):
        tab = self.open("input()")
        tab.cell(0).locator("textarea.editor").focus()
        tab.press("Shift+Enter")
        tab.wait_for(kernel="busy")
        self.assertShows(tab.cell(0).locator(".prompt"), "[*]")
        self.assertEqual(tab.cell(0).get_attribute("data-state"), "running")
        tab.page.locator(".stdin input").fill("")
        tab.press("Enter")
        tab.wait_for(kernel="idle")
        self.assertShows(tab.cell(0).locator(".prompt"), "[1]")

    def test_a_cell_that_waits_for_a_starting_kernel_says_so_and_runs(self):
        held = []
        self.context.route("**/api/sessions", lambda route: held.append(route))
        (self.root / self.name).write_bytes(jupyter_bytes(notebook("6 * 7")))
        tab = self.visit("/notebooks/" + self.name)
        tab.wait_for(kernel="starting")
        tab.select(0)
        tab.press("Control+Enter")
        self.assertEqual(tab.cell(0).locator(".prompt").text_content(), "[*]")
        self.assertEqual(tab.cell(0).get_attribute("data-state"), "queued")
        held[0].continue_()
        self.assertShows(tab.outputs(0), "42")
        self.assertShows(tab.cell(0).locator(".prompt"), "[1]")

    def test_a_cell_that_waits_for_a_starting_kernel_can_be_dropped(self):
        held = []
        self.context.route("**/api/sessions", lambda route: held.append(route))
        (self.root / self.name).write_bytes(jupyter_bytes(notebook("'first'", "'second'")))
        tab = self.visit("/notebooks/" + self.name)
        tab.wait_for(kernel="starting")
        tab.command("run-all")
        tab.cell(0).locator(".unqueue").click()
        self.assertEqual(tab.states(), ["idle", "queued"])
        held[0].continue_()
        self.assertShows(tab.outputs(1), "'second'")
        self.assertEqual(tab.texts()[0], "")

    def test_a_cell_that_waits_can_be_taken_out_of_the_queue(self):
        tab = self.open("input()", "'second'", "'third'")
        tab.command("run-all")
        tab.page.locator(".stdin input").wait_for()
        tab.cell(1).locator(".unqueue").click()
        self.assertShows(tab.cell(1).locator(".prompt"), "[ ]")
        self.assertEqual(tab.states(), ["running", "idle", "queued"])
        tab.wait_for(kernel="busy")
        tab.page.locator(".stdin input").fill("go on")
        tab.press("Enter")
        self.assertShows(tab.outputs(2), "'third'")
        tab.wait_for(kernel="idle")
        self.assertEqual(tab.texts()[1], "")

    def test_a_kernel_that_cannot_drop_cells_is_named_as_such(self):
        forget = "del input.__func__.__globals__['HANDLERS']['abort_request']"
        tab = self.open(forget, "input()", "3")
        tab.command("run-all")
        tab.page.locator(".stdin input").wait_for()
        tab.cell(2).locator(".unqueue").click()
        self.assertShows(tab.page.locator("#notices"), "This kernel takes no cell out of its queue")
        self.assertEqual(tab.states()[2], "queued")
        tab.command("interrupt")
        tab.wait_for(kernel="idle")

    def test_run_all_runs_in_order(self):
        tab = self.open("x = [1]", "x.append(2)", "x.append(3)", "x")
        tab.command("run-all")
        self.assertShows(tab.outputs(3), "[1, 2, 3]")

    def test_an_error_is_shown_and_stops_the_cells_behind_it(self):
        tab = self.open("print('before')\n1/0", "print('never')")
        tab.command("run-all")
        self.assertShows(tab.outputs(0), "ZeroDivisionError")
        tab.wait_until_done()
        self.assertEqual([tab.cell(i).get_attribute("data-state") for i in (0, 1)],
                         ["error", "idle"])
        self.assertNotIn("never", tab.outputs(1).text_content())

    def test_what_an_error_keeps_from_running_keeps_its_output(self):
        tab = self.open("good = True", "good or 1/0", "'kept'")
        tab.command("run-all")
        self.assertShows(tab.outputs(2), "kept")
        tab.wait_until_done()
        tab.write(0, "good = False")
        tab.command("run-all")
        self.assertShows(tab.outputs(1), "ZeroDivisionError")
        tab.wait_until_done()
        self.assertEqual(tab.texts()[2], "'kept'")
        tab.save()
        self.assertEqual(self.saved()["cells"][2]["execution_count"], 3)

    def test_interrupt_stops_an_endless_loop(self):
        for by in ("key", "button"):
            with self.subTest(by):
                tab = self.open("print('ready')\nwhile True: pass", name=f"loop-{by}.ipynb")
                tab.select(0)
                tab.press("Control+Enter")
                self.assertShows(tab.outputs(0), "ready")
                if by == "key":
                    tab.press("Escape", "i", "i")
                else:
                    tab.page.locator("#toolbar [data-command=interrupt]").click()
                self.assertShows(tab.outputs(0), "KeyboardInterrupt")
                tab.wait_for(kernel="idle")

    def test_a_flood_of_output_leaves_the_page_alive(self):
        tab = self.open("i = 0\nwhile True:\n    i += 1\n    print(i)", "i > 1000")
        tab.select(0)
        tab.press("Control+Enter")
        self.assertShows(tab.outputs(0), "1000")
        tab.page.locator("#toolbar [data-command=interrupt]").click()
        self.assertShows(tab.outputs(0), "KeyboardInterrupt")
        tab.run(1)
        self.assertShows(tab.outputs(1), "True")

    def test_restart_asks_and_forgets_the_variables(self):
        tab = self.open("x = 1", "x")
        tab.command("run-all")
        self.assertShows(tab.outputs(1), "1")
        tab.command("restart")
        tab.choose("Restart")
        tab.wait_for(kernel="idle")
        tab.run(1)
        self.assertShows(tab.outputs(1), "NameError")

    def test_input_is_asked_in_the_cell(self):
        tab = self.open("input('Name? ')")
        tab.select(0)
        tab.press("Control+Enter")
        self.assertShows(tab.cell(0).locator(".stdin"), "Name?")
        tab.page.locator(".stdin input").fill("Ada ☃")
        tab.press("Enter")
        self.assertShows(tab.outputs(0), "'Ada ☃'")

    def test_up_and_down_bring_back_earlier_answers(self):
        tab = self.open("import getpass\nfor _ in range(3): input('? ')\n"
                        "getpass.getpass()\ninput()")
        tab.select(0)
        tab.press("Control+Enter")
        field = tab.page.locator(".stdin input")
        for typed in ("one", "two"):
            field.fill(typed)
            tab.press("Enter")
            self.assertShows(tab.outputs(0), f"? {typed}")
        field.fill("thr")
        for key, shown in (("Up", "two"), ("Up", "one"), ("Up", "one"), ("Down", "two"),
                           ("Down", "thr"), ("Down", "thr"), ("Up", "two")):
            tab.press("Arrow" + key)
            self.assertEqual(field.input_value(), shown)
        tab.press("Enter")
        tab.page.locator(".stdin [type=password]").fill("secret")
        tab.press("Enter")
        tab.page.locator(".stdin [type=text]").wait_for()
        tab.press("ArrowUp")
        self.assertEqual(field.input_value(), "two")
        tab.press("Enter")

    def test_input_takes_what_is_typed_after_running_all_and_gives_the_focus_back(self):
        tab = self.open("first = 1", "input('Name? ')")
        tab.select(0)
        tab.command("run-all")
        tab.page.wait_for_selector(".stdin input:focus")
        tab.press("d", "Shift+Enter", "d", "Enter")
        self.assertShows(tab.outputs(1), "'dd'")
        self.assertEqual(tab.sources(), ["first = 1", "input('Name? ')"])
        tab.page.wait_for_selector(".cell:first-child:focus")

    def test_who_runs_a_cell_that_asks_answers_at_once_and_then_writes_on(self):
        tab = self.open("input('Name? ') + input('More? ')")
        tab.cell(0).locator("textarea.editor").focus()
        tab.press("Shift+Enter")
        tab.page.wait_for_selector(".stdin input:focus")
        tab.page.keyboard.type("Ada")
        tab.press("Enter")
        tab.page.locator(".stdin", has_text="More?").wait_for()
        tab.page.wait_for_selector(".stdin input:focus")
        tab.press("Enter")
        self.assertShows(tab.outputs(0), "'Ada'")
        tab.page.keyboard.type("next")
        self.assertEqual(tab.sources()[1], "next")

    def test_who_writes_is_not_disturbed_by_a_cell_that_asks(self):
        tab = self.open("import os\nwhile not os.path.exists('go'): pass\ninput()", "text")
        tab.cell(0).locator("textarea.editor").focus()
        tab.press("Shift+Enter", "Enter")
        (self.root / "go").touch()
        self.addCleanup((self.root / "go").unlink)
        tab.page.wait_for_selector(".stdin input")
        tab.page.keyboard.type(" goes on")
        self.assertEqual(tab.sources()[1], "text goes on")

    def test_nothing_moves_when_input_is_asked(self):
        tab = self.open("input('Name? ')")
        before = tab.cell(0).bounding_box()["y"]
        tab.select(0)
        tab.press("Control+Enter")
        tab.page.wait_for_selector(".stdin input:focus")
        self.assertFalse(tab.page.is_visible("#stdin-bar"))      # who answers needs no way there
        tab.cell(0).focus()
        tab.page.wait_for_selector("#stdin-bar:visible")
        self.assertEqual(tab.cell(0).bounding_box()["y"], before)

    def test_a_password_is_hidden(self):
        tab = self.open("import getpass\nlen(getpass.getpass())")
        tab.select(0)
        tab.press("Control+Enter")
        field = tab.page.locator(".stdin input")
        self.assertEqual(field.get_attribute("type"), "password")
        field.fill("sesame")
        tab.press("Enter")
        self.assertShows(tab.outputs(0), "6")
        self.assertNotIn("sesame", tab.page.content())

    def test_a_kernel_that_dies_is_told_and_started_again(self):
        tab = self.open("import os, time\ntime.sleep(0.2)\nos._exit(3)", "'alive'")
        tab.command("run-all")
        self.assertShows(tab.page.locator("#notices"), "It has not run a cell that waited.")
        self.assertShows(tab.page.locator("#notices"), "exit code 3")
        tab.wait_for(kernel="idle")
        self.assertEqual(tab.cell(0).get_attribute("data-state"), "idle")
        tab.run(1)
        self.assertShows(tab.outputs(1), "'alive'")

    @needs("matplotlib")
    def test_a_plot_appears_as_a_picture(self):
        tab = self.open("import matplotlib.pyplot as plt\nplt.plot([1, 4, 9]);")
        tab.run(0)
        picture = tab.outputs(0).locator("img")
        picture.wait_for()
        self.assertGreater(picture.evaluate("img => img.decode().then(() => img.naturalWidth)"),
                           100)


class PageEdits(PageCase):
    def test_cells_are_inserted_deleted_and_brought_back(self):
        tab = self.open("first", "second")
        tab.select(0)
        tab.press("b", "Escape", "a", "Escape")
        self.assertEqual(tab.sources(), ["first", "", "", "second"])
        tab.press("d", "d", "d", "d")
        self.assertEqual(tab.sources(), ["first", "second"])
        tab.select(0)
        tab.press("d", "d")
        self.assertEqual(tab.sources(), ["second"])
        tab.press("z")
        self.assertEqual(tab.sources(), ["first", "second"])

    def test_cells_are_cut_copied_pasted_and_moved(self):
        tab = self.open("a", "b", "c")
        tab.select(0)
        tab.press("x", "v")
        self.assertEqual(tab.sources(), ["b", "a", "c"])
        tab.press("c", "Shift+V")
        self.assertEqual(tab.sources(), ["b", "a", "a", "c"])
        tab.select(0)
        tab.press("Control+Shift+ArrowDown")
        self.assertEqual(tab.sources(), ["a", "b", "a", "c"])

    def test_the_type_of_a_cell_is_changed(self):
        tab = self.open("# Title")
        tab.select(0)
        for key, kind in (("m", "markdown"), ("r", "raw"), ("y", "code")):
            tab.press(key, "Escape")
            self.assertEqual(tab.types(), [kind])

    def test_escape_and_enter_change_the_mode(self):
        tab = self.open("text")
        tab.select(0)
        tab.press("Enter")
        self.assertEqual(tab.page.evaluate("document.activeElement.className"), "editor")
        tab.press("End")
        tab.page.keyboard.type("b")
        tab.press("Escape")
        self.assertEqual(tab.sources(), ["textb"])
        tab.press("b")
        self.assertEqual(tab.sources(), ["textb", ""])

    def test_after_any_change_the_colours_are_those_of_the_whole_text(self):
        tab = self.open("def f(x):\n    return 'a' + x  # why\n" * 5)
        parts = ["'", '"""', "#", "\n", "def ", "1", "x", "", " ", "%%bash\n"]
        wrong = tab.page.evaluate("""parts => {
            const { editor } = view.active;
            let seed = 1;
            const upTo = n => (seed = seed * 16807 % 2147483647) % (n + 1);
            for (let n = 0; n < 400; n += 1) {
                const start = upTo(editor.value.length);
                if (n % 7 === 6) editor.undo();
                else editor.replace(start, Math.min(start + upTo(3), editor.value.length),
                    parts[upTo(parts.length - 1)]);
                const whole = h('pre');
                showCode(whole, editor.value + '\\n', 'python');
                if (editor.code.innerHTML !== whole.innerHTML)
                    return [n, editor.code.innerHTML, whole.innerHTML];
            }
        }""", arg=parts)
        self.assertIsNone(wrong)

    def test_of_a_long_text_what_is_in_the_window_has_colours(self):
        tab = self.open("\n".join(f"x = {i}" for i in range(5000)))
        coloured = """() => [...document.querySelectorAll('[data-token=number]')].map(number =>
            Number(number.textContent))"""
        first = tab.page.evaluate(coloured)
        self.assertIn(0, first)
        self.assertLess(len(first), 1000)
        tab.page.evaluate("scrollTo(0, 60000)")
        tab.page.wait_for_function(f"() => !({coloured})().includes(0)")
        self.assertIn(3150, tab.page.evaluate(coloured))

    def test_text_and_caret_scroll_together_in_a_long_line(self):
        tab = self.open("x = '" + "long " * 200 + "'")
        tab.select(0)
        tab.press("Enter", "Control+Home", "End")
        box = tab.page.evaluate("""() => {
            const { input, area, code } = view.active.editor;
            return { over: input.scrollLeft, caret: placeOf(code, area.selectionEnd).left,
                edge: input.getBoundingClientRect().right, own: area.scrollLeft };
        }""")
        self.assertGreater(box["over"], 500)
        self.assertEqual(box["own"], 0)
        self.assertLess(box["caret"], box["edge"])
        tab.press("Home", "Home")
        self.assertEqual(tab.page.evaluate("view.active.editor.input.scrollLeft"), 0)

    def test_a_new_line_is_in_sight(self):
        tab = self.open("first")
        tab.select(0)
        tab.press("Enter", "Control+End", *["Enter"] * 60)
        place = tab.page.evaluate("""() => {
            const { area, code } = view.active.editor;
            return [placeOf(code, area.selectionEnd).bottom, innerHeight];
        }""")
        self.assertLess(*place)

    def test_markdown_is_shown_and_edited(self):
        tab = self.open("")
        tab.select(0)
        tab.press("m")
        tab.run(0, "# Title\n\n**bold** and `code`\n\n- item")
        shown = tab.cell(0).locator(".rendered")
        for selector, text in (("h1", "Title"), ("strong", "bold"), ("code", "code"),
                               ("li", "item")):
            self.assertShows(shown.locator(selector), text)
        shown.dblclick()
        self.assertTrue(tab.cell(0).locator("textarea.editor").is_visible())

    def test_a_save_writes_the_file(self):
        tab = self.open("old")
        tab.write(0, "new = '☃'")
        tab.wait_for(saved="false")
        tab.save()
        self.assertEqual(self.saved_sources(), ["new = '☃'"])

    def test_the_page_saves_by_itself(self):
        tab = self.open("old")
        tab.write(0, "new")
        tab.wait_for(saved="false")
        tab.wait_for(saved="true")
        self.assertEqual(self.saved_sources(), ["new"])

    def test_opening_and_saving_changes_no_byte(self):
        tab = self.open("1", numbers={"one": 1.0, "big": 12345678901234567890})
        before = (self.root / self.name).read_bytes()
        tab.save()
        self.assertEqual((self.root / self.name).read_bytes(), before)

    def test_the_title_renames_the_notebook(self):
        tab = self.open("x = 1")
        tab.page.locator("#title").click()
        tab.page.locator("dialog input").fill("new name ☃")     # as the title shows it
        tab.choose("Rename")
        self.assertShows(tab.page.locator("#title"), "new name ☃")
        self.assertTrue((self.root / "new name ☃.ipynb").exists())
        tab.run(0)
        tab.save()
        self.assertEqual(self.saved("new name ☃.ipynb")["cells"][0]["execution_count"], 1)

    def test_after_closing_and_reopening_outputs_and_variables_are_there(self):
        tab = self.open("x = 'still here'\nprint('output')", "x")
        tab.run(0)
        tab.save()
        tab.page.close()
        again = self.reopen(self.name)
        self.assertShows(again.outputs(0), "output")
        again.run(1)
        self.assertShows(again.outputs(1), "'still here'")

    def conflict(self, choice):
        """Mine and the file's version meet; returns (tab, name)."""
        name = f"conflict-{choice}.ipynb"
        tab = self.open("old", name=name)
        (self.root / name).write_bytes(jupyter_bytes(notebook("theirs")))
        tab.write(0, "mine")
        tab.press("Control+s")
        self.assertShows(tab.page.locator("dialog[open]"), "changed on disk")
        tab.page.locator("dialog[open]").get_by_role("button", name=choice).click()
        return tab, name

    def test_a_save_over_a_changed_file_asks_first(self):
        tab, name = self.conflict("Keep mine")
        tab.wait_for(saved="true")
        self.assertEqual(self.saved_sources(name), ["mine"])

    def test_the_files_version_can_be_taken(self):
        tab, name = self.conflict("Take the file")
        tab.page.wait_for_function("() => document.querySelector('.editor')?.value === 'theirs'")
        self.assertEqual(self.saved_sources(name), ["theirs"])

    def test_both_versions_can_be_kept(self):
        tab, name = self.conflict("Keep both")
        tab.wait_for(saved="true")
        names = [path.name for path in self.root.glob("conflict-Keep both*.ipynb")]
        self.assertEqual(sorted(map(self.saved_sources, names)), [["mine"], ["theirs"]])


class PageShows(PageCase):
    """One cell, one output, and what a person sees of it."""

    def output(self, code):
        tab = self.open(code)
        tab.run(0)
        return tab, tab.cell(0).locator(".output").first

    def test_colours_of_the_terminal_are_shown(self):
        _, output = self.output("print('\\x1b[31mred\\x1b[0m plain')")
        self.assertEqual(output.text_content().strip(), "red plain")
        red, plain = (element.evaluate("element => getComputedStyle(element).color")
                      for element in (output.get_by_text("red", exact=True), output))
        self.assertNotEqual(red, plain)

    def test_a_carriage_return_overwrites_the_line(self):
        _, output = self.output("for i in range(101): print(f'\\r{i} %', end='')")
        self.assertShows(output, "100 %")
        self.assertNotIn("99 %", output.text_content())

    def test_standard_error_is_told_apart(self):
        _, output = self.output("import sys; print('careful', file=sys.stderr)")
        self.assertShows(output, "careful")
        self.assertIn("stderr", output.get_attribute("data-mime"))

    def test_a_picture_is_shown(self):
        pixel = base64.b64encode(one_red_pixel()).decode()
        tab, output = self.output(
            f"import base64\nfrom IPython.display import Image\n"
            f"Image(data=base64.b64decode('{pixel}'), format='png')")
        width = output.locator("img").evaluate("img => img.decode().then(() => img.naturalWidth)")
        self.assertEqual((output.get_attribute("data-mime"), width), ("image/png", 1))

    def test_html_is_shown_in_the_page_without_what_could_act(self):
        tab, output = self.output(
            "from IPython.display import HTML\nHTML('''<table><tr><td>cell</td></tr></table>"
            "<img src=x onerror=\"document.title='owned'\">"
            "<a href=\"javascript:document.title='owned'\">link</a>"
            "<form action=/api/shutdown><button>go</button></form>''')")
        self.assertShows(output.locator("td"), "cell")
        self.assertCount(output.locator("[onerror], a[href^=javascript], form[action]"), 0)
        self.assertNotIn("owned", tab.page.title())
        self.problems = [text for text in self.problems if "Security Policy" not in text]

    def test_a_whole_page_of_html_shows_its_body(self):
        _, output = self.output("from IPython.display import HTML\n"
                                "HTML('<!doctype html><html><body><b>here</b></body></html>')")
        self.assertShows(output.locator("b"), "here")

    def test_html_with_scripts_runs_in_a_frame_that_reaches_nothing(self):
        tab, output = self.output(
            "from IPython.display import HTML\nHTML('''<p id=p>waiting</p><script>"
            "const p = document.getElementById('p');"
            "try { parent.document.title = 'owned'; p.textContent = 'reached'; }"
            "catch (error) { p.textContent = 'kept out'; }"
            "fetch('/api/contents').then(r => { if (r.ok) p.textContent = 'read'; }, () => 0)"
            "</script>''')")
        self.assertNotIn("same-origin", output.locator("iframe").get_attribute("sandbox"))
        self.assertShows(output.frame_locator("iframe").locator("#p"), "kept out")
        tab.page.wait_for_load_state("networkidle")
        self.assertShows(output.frame_locator("iframe").locator("#p"), "kept out")
        self.assertNotIn("owned", tab.page.title())
        self.problems.clear()  # the browser notes what the frame was refused

    def test_a_markdown_output_is_shown(self):
        _, output = self.output("from IPython.display import Markdown\nMarkdown('**bold**')")
        self.assertShows(output.locator("strong"), "bold")

    def test_a_display_is_updated_in_place(self):
        tab, _ = self.output("handle = display('old', display_id=True)\nhandle.update('new')")
        self.assertShows(tab.outputs(0), "new")
        self.assertNotIn("old", tab.outputs(0).text_content())

    def test_clear_output_clears(self):
        tab, _ = self.output("from IPython.display import clear_output\nprint('first')\n"
                             "clear_output(wait=True)\nprint('second')")
        self.assertShows(tab.outputs(0), "second")
        self.assertNotIn("first", tab.outputs(0).text_content())

    def test_ten_thousand_lines_are_all_there(self):
        tab, _ = self.output("for i in range(10_000): print('line', i)")
        self.assertShows(tab.outputs(0), "line 9999")
        lines = re.findall(r"line (\d+)", tab.outputs(0).text_content())
        self.assertEqual([int(n) for n in lines], list(range(10_000)))

    def test_a_kernel_that_cannot_start_says_why(self):
        folder = self.folder()
        crash = "import sys; print('no licence for this kernel', file=sys.stderr); sys.exit(3)"
        install_kernelspec(folder, "crash", [sys.executable, "-c", crash, "{connection_file}"])
        self.server = self.own_server(env={"JUPYTER_PATH": str(folder)})
        self.root = self.server.root
        self.context.add_cookies([self.cookie()])
        spec = {"name": "crash", "display_name": "crash", "language": "python"}
        (self.root / "crash.ipynb").write_bytes(jupyter_bytes(notebook("1", kernelspec=spec)))
        tab = self.visit("/notebooks/crash.ipynb")
        self.assertShows(tab.page.locator("#notices"), "no licence for this kernel")
        tab.wait_for(kernel="dead")


def one_red_pixel():
    """A PNG file of one pixel."""
    def chunk(kind, data):
        return struct.pack("!I", len(data)) + kind + data + struct.pack(
            "!I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack("!IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0\xff\0\0")) + chunk(b"IEND", b""))


class PageAsksTheKernel(PageCase):
    """Completion, tooltip and pager: what the kernel knows, where the caret is."""

    def editor(self, tab, text, i=0):
        tab.write(i, text)
        tab.cell(i).locator("textarea.editor").focus()
        tab.press("Control+End")
        return tab.cell(i).locator("textarea.editor")

    def test_help_opens_the_pager_and_q_closes_it(self):
        tab = self.open("print?")
        tab.run(0)
        pager = tab.page.get_by_role("region", name="Help pager")
        self.assertShows(pager, "Signature")
        self.assertNotIn("\x1b", pager.text_content())
        tab.press("Escape", "q")
        self.assertCount(pager, 0)

    def test_the_pager_grows_with_the_arrow_keys_on_its_edge(self):
        tab = self.open("print?")
        tab.run(0)
        edge = tab.page.get_by_role("separator")
        height = int(edge.get_attribute("aria-valuenow"))
        edge.focus()
        tab.press("ArrowUp", "ArrowUp")
        self.assertEqual(int(edge.get_attribute("aria-valuenow")), height + 10)

    def test_load_replaces_the_cell_and_undo_brings_it_back(self):
        (self.root / "loaded.py").write_text("answer = '🙂'\n")
        tab = self.open("%load loaded.py", "2")
        tab.run(0)
        self.assertIn("answer = '🙂'", tab.sources()[0])
        tab.cell(0).locator("textarea.editor").focus()
        tab.press("Control+z")
        self.assertEqual(tab.sources()[0], "%load loaded.py")

    def test_the_next_input_becomes_a_new_cell_below(self):
        tab = self.open("get_ipython().set_next_input('made = 1')", "last")
        tab.run(0)
        self.assertEqual(tab.sources()[1:], ["made = 1", "last"])
        self.assertEqual(tab.page.locator(".cell.selected textarea").input_value(), "last")

    def test_exit_leaves_the_notebook_without_a_kernel(self):
        tab = self.open("exit")
        tab.run(0)
        tab.wait_for(kernel="none")

    def test_tab_inserts_the_only_completion_at_once(self):
        tab = self.open("import collections")
        tab.run(0)
        area = self.editor(tab, "'🙂🙂'; collections.Order", 1)
        tab.press("Tab")
        tab.page.wait_for_function(
            "() => document.querySelectorAll('.editor')[1].value.endsWith('.OrderedDict')")
        self.assertEqual(area.input_value(), "'🙂🙂'; collections.OrderedDict")

    def test_several_completions_are_listed_and_narrow_while_typing(self):
        tab = self.open("import os.path")
        tab.run(0)
        area = self.editor(tab, "os.path.", 1)
        tab.press("Tab")
        options = tab.page.get_by_role("listbox").get_by_role("option")
        options.first.wait_for()
        tab.page.keyboard.type("is")
        self.assertEqual({text[:2] for text in options.all_inner_texts()}, {"is"})
        self.assertEqual(options.first.get_attribute("data-type"), "function")
        tab.press("ArrowDown", "Enter")
        self.assertEqual(area.input_value(), "os.path.isdir")
        self.assertCount(options, 0)

    def test_what_completions_have_in_common_comes_first_and_a_click_takes_one(self):
        tab = self.open("prefix_one = prefix_two = 1")
        tab.run(0)
        area = self.editor(tab, "pref", 1)
        tab.press("Tab")
        tab.page.get_by_role("option", name="prefix_two").wait_for()
        self.assertEqual(area.input_value(), "prefix_")
        tab.page.get_by_role("option", name="prefix_two").click()
        self.assertEqual(area.input_value(), "prefix_two")

    def test_escape_closes_the_list_and_stays_in_the_editor(self):
        tab = self.open("import os.path")
        tab.run(0)
        self.editor(tab, "os.path.", 1)
        tab.press("Tab")
        tab.page.get_by_role("listbox").wait_for()
        tab.press("Escape")
        self.assertCount(tab.page.get_by_role("listbox"), 0)
        tab.wait_for(mode="edit")

    def test_completion_works_while_a_cell_runs_and_leaves_the_kernel_busy(self):
        tab = self.open("import os.path, time\ntime.sleep(3)", "")
        tab.run(0, "import os.path, time")
        tab.select(0)
        tab.write(0, "time.sleep(3)")
        tab.cell(0).locator("textarea.editor").focus()
        tab.press("Control+Enter")
        tab.wait_for(kernel="busy")
        self.editor(tab, "os.path.sp", 1)
        tab.press("Tab")
        tab.page.get_by_role("listbox").wait_for()
        tab.wait_for(kernel="busy")

    def test_tab_in_leading_blanks_indents(self):
        tab = self.open("")
        area = self.editor(tab, "  ")
        tab.press("Tab")
        self.assertEqual(area.input_value(), "    ")

    def test_shift_tab_tells_what_a_name_is_and_again_tells_more(self):
        tab = self.open("")
        self.editor(tab, "print")
        tab.press("Shift+Tab")
        self.assertShows(tab.page.get_by_role("tooltip"), "Signature")
        tab.press("Shift+Tab")
        self.assertShows(tab.page.get_by_role("region", name="Help pager"), "Signature")
        self.assertCount(tab.page.get_by_role("tooltip"), 0)

    def test_run_all_names_one_burst_so_that_an_error_aborts_what_is_on_its_way(self):
        tab = self.open("1", "1/0", "3")
        tab.page.evaluate("""() => {
            window.bursts = [];
            const send = WebSocket.prototype.send;
            WebSocket.prototype.send = function (data) {
                const { header, metadata } = JSON.parse(data);
                if (header.msg_type === 'execute_request') bursts.push(metadata.burst);
                send.call(this, data);
            };
        }""")
        tab.command("run-all")
        tab.wait_until_done()
        bursts = tab.page.evaluate("bursts")
        self.assertEqual((len(bursts), len({*bursts}), type(bursts[0])), (3, 1, str))
        self.assertEqual(tab.texts()[2], "")


def markdown(text, **fields):
    return {"cell_type": "markdown", "metadata": {}, "source": text, **fields}


# Keys pressed in command mode on the second of the code cells a, b, c: the sources they leave.
COMMAND_KEYS = [
    ("a", ["a", "", "b", "c"]),
    ("b", ["a", "b", "", "c"]),
    ("x", ["a", "c"]),
    ("x v", ["a", "c", "b"]),
    ("x Shift+V", ["a", "b", "c"]),
    ("c v v", ["a", "b", "b", "b", "c"]),
    ("Shift+ArrowDown c ArrowUp ArrowUp v", ["a", "b", "c", "b", "c"]),
    ("Shift+K x", ["c"]),
    ("Shift+J d d", ["a"]),
    ("Control+a d d", [""]),
    ("d d z", ["a", "b", "c"]),
    ("d d z Shift+Z", ["a", "c"]),
    ("k d d", ["b", "c"]),
    ("j d d", ["a", "b"]),
    ("ArrowUp x ArrowDown v", ["b", "c", "a"]),
    ("Shift+M", ["a", "b\n\nc"]),
    ("Shift+ArrowUp Shift+M", ["a\n\nb", "c"]),
    ("Control+Shift+ArrowUp", ["b", "a", "c"]),
    ("Control+Shift+ArrowDown", ["a", "c", "b"]),
    ("m 2", ["a", "## b", "c"]),
    ("m 1 3", ["a", "### b", "c"]),
    ("m Escape y 4", ["a", "b", "c"]),
    ("Enter End x", ["a", "bx", "c"]),
    ("Enter Control+m d d", ["a", "c"]),
    ("Alt+Enter", ["a", "b", "", "c"]),
    ("Shift+Enter d d", ["a", "b"]),
    ("Control+Enter d d", ["a", "c"]),
]
# Text with the caret as | (or the selection between two): keys, and what they leave.
EDIT_KEYS = [
    ("if x:|", "Enter", "if x:\n    |"),
    ("    y|", "Enter", "    y\n    |"),
    ("f(|)", "Enter", "f(\n    |\n)"),
    ("        |", "Backspace", "    |"),
    ("(|)", "Backspace", "|"),
    ("|", "(", "(|)"),
    ("|", "'", "'|'"),
    ("(|)", ")", "()|"),
    ("if x:\n    y\n    else|", ":", "if x:\n    y\nelse:|"),
    ("try:\n    y\n    except OSError as e|", ":", "try:\n    y\nexcept OSError as e:|"),
    ("    if x:\n        y\n    else|", ":", "    if x:\n        y\n    else:|"),
    ("x = {\n    else_|", ":", "x = {\n    else_:|"),
    ("x = [\n    1\n    |\n]", "]", "x = [\n    1\n]|"),
    ("|\n'a'", "'", "'|'\n'a'"),
    ("def f():\n    return 1|", "Enter", "def f():\n    return 1\n|"),
    ("def f():\n    return (|", "Enter", "def f():\n    return (\n        |"),
    ("def f():\n    |return 1", "Enter", "def f():\n    \n    |return 1"),
    ("a\nb|b\nc", "Alt+ArrowUp", "b|b\na\nc"),
    ("a|\nb|\nc", "Alt+ArrowDown", "c\na|\nb|"),
    ("a\nb|", "Alt+ArrowDown", "a\nb|"),
    ("a\n  b c|", "Home", "a\n  |b c"),
    ("a\n  |b c", "Home", "a\n|  b c"),
    ("  a|", "Shift+Home", "  |a|"),
    ("|abc|", "[", "[|abc|]"),
    ("it|", "'", "it'|"),
    ("|", '" " "', '"""|'),
    ("|a\nb|", "Tab", "    |a\n    b|"),
    ("|    a\n    b|", "Shift+Tab", "|a\nb|"),
    ("a|", "Control+]", "    a|"),
    ("    a|", "Control+[", "a|"),
    ("a|", "Control+/", "# a|"),
    ("|a\n  b|", "Control+/", "# |a\n#   b|"),
    ("# a|", "Control+/", "a|"),
    ("one\ntw|o\nthree", "Control+d", "one\n|three"),
    ("|", "a b Control+z", "|"),
    ("|", "a b Control+z Control+Shift+Z", "ab|"),
    ("|", "a b Control+z Control+y", "ab|"),
    ("|", "Control+z", "|"),
    ("🙂 a|", "Backspace Control+z", "🙂 a|"),
]
LIST_KEYS = [  # in a Markdown cell
    ("- one|", "Enter t", "- one\n- t|"), ("  9) nine|", "Enter", "  9) nine\n  10) |"),
    ("- [x] done|", "Enter", "- [x] done\n- [ ] |"), ("- one\n- |", "Enter", "- one\n|"),
    ("* one|two", "Enter", "* one\n* |two"), ("-no list|", "Enter", "-no list\n|"),
]
OTHER_LANGUAGES = [  # language, line, (kind, token) of what is coloured
    ("javascript", "let s = `a` // c", [("keyword", "let"), ("string", "`a`"),
                                        ("comment", "// c")]),
    ("r", "f <- function(x) TRUE # c", [("keyword", "function"), ("keyword", "TRUE"),
                                        ("comment", "# c")]),
    ("sql", "select 1 -- c", [("keyword", "select"), ("number", "1"), ("comment", "-- c")]),
    ("rust", "fn name<'a>() {}", [("keyword", "fn"), ("definition", "name")]),
    ("constructor", "let", [("keyword", "let")]),
]


class PageKeys(PageCase):
    """What the fingers know from the classic Notebook and JupyterLab."""

    def test_command_mode_has_the_keys_of_jupyter(self):
        tab = self.open("")
        for keys, sources in COMMAND_KEYS:
            with self.subTest(keys):
                tab.page.evaluate("""() => {
                    view.cells = [...'abc'].map(source => view.newCell('code', { source }));
                    view.arrange([view.cells[1]]);
                }""")
                tab.press(*keys.split())
                self.assertEqual(tab.sources(), sources)

    def test_edit_mode_has_the_keys_of_jupyter(self):
        tab = self.open("")
        self.assertKeys(tab, EDIT_KEYS)

    def test_enter_goes_on_with_a_list_in_markdown(self):
        tab = self.open("")
        tab.select(0)
        tab.press("m", "Enter")
        self.assertKeys(tab, LIST_KEYS)

    def assertKeys(self, tab, table):
        """What keys make of a text: table of (before, keys, after), with | for the caret."""
        area = tab.cell(0).locator("textarea.editor")
        for before, keys, after in table:
            with self.subTest(before=before, keys=keys):
                self.place(area, before)
                tab.press(*keys.split(" "))
                self.assertEqual(self.marked(area), after)

    def place(self, area, marked):
        """Set the text without its marks, and the selection to where they were."""
        parts = marked.split("|")
        area.evaluate("""(area, [text, start, end]) => {
            area.closest('.cell').cell.editor.value = text;
            area.focus();
            area.setSelectionRange(start, end);
        }""", ["".join(parts), len(parts[0]), len("".join(parts[:2])) if len(parts) > 2
               else len(parts[0])])

    def marked(self, area):
        text, start, end = area.evaluate("a => [a.value, a.selectionStart, a.selectionEnd]")
        inner = text[start:end] + "|" if start != end else ""
        return f"{text[:start]}|{inner}{text[end:]}"

    def test_the_partner_of_a_bracket_is_marked_unless_it_is_quoted(self):
        tab = self.open("")
        area = tab.cell(0).locator("textarea.editor")
        for text, places in (("f(a[1], ')')|", [11, 1]), ("|(x]", []), ("a|", []),
                             ("'(|)'", [1, 2]), ("{|x: (1)}", [0, 7])):
            with self.subTest(text):
                self.place(area, text)
                tab.page.wait_for_function("""places => {
                    const code = document.querySelector('.code');
                    const placeOf = ({ startContainer, startOffset }) => {
                        const before = new Range();
                        before.setStart(code, 0);
                        before.setEnd(startContainer, startOffset);
                        return before.toString().length;
                    };
                    const found = [...CSS.highlights.get('bracket') ?? []].map(placeOf);
                    return JSON.stringify(found) === places;
                }""", arg=json.dumps(places, separators=(",", ":")))

    def test_a_word_from_an_input_method_is_one_step_of_undo(self):
        tab = self.open("x = ")
        tab.select(0)
        tab.press("Enter", "End")
        session = self.context.new_cdp_session(tab.page)
        for text in ("n", "ni", "你"):
            session.send("Input.imeSetComposition",
                         {"text": text, "selectionStart": len(text), "selectionEnd": len(text)})
        session.send("Input.insertText", {"text": "你好"})
        self.assertEqual(tab.sources(), ["x = 你好"])
        tab.press("Control+z")
        self.assertEqual(tab.sources(), ["x = "])

    def test_the_chosen_completion_is_described_beside_the_list(self):
        tab = self.open("import os", "")
        tab.run(0)
        self.place(tab.cell(1).locator("textarea.editor"), "os.get|")
        tab.press("Tab")
        tab.page.get_by_role("listbox").wait_for()
        tab.page.keyboard.type("cw")
        self.assertShows(tab.page.get_by_role("tooltip"), "current working directory")
        tab.press("Escape")
        self.assertCount(tab.page.get_by_role("tooltip"), 0)

    def test_what_is_pasted_arrives_as_it_is_and_is_one_step_of_undo(self):
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        tab = self.open("old")
        text = "a\t'🙂'\n\n  <b> \\x00 ${x} `\u2028` שלום\n"
        tab.page.evaluate("text => navigator.clipboard.writeText(text)", text)
        tab.select(0)
        tab.press("Enter", "Control+a", "Control+v")
        self.assertEqual(tab.sources(), [text])
        tab.press("Control+z")
        self.assertEqual(tab.sources(), ["old"])

    def test_other_languages_have_their_colours_and_comments(self):
        tab = self.open("")
        for language, line, coloured in OTHER_LANGUAGES:
            with self.subTest(language):
                found = tab.page.evaluate("""([line, language]) => [...tokens(line, language)].map(
                    ([kind, start, end]) => [kind, line.slice(start, end)])""", [line, language])
                self.assertEqual([tuple(token) for token in found], coloured)
        tab.page.evaluate("view.cells[0].editor.setLanguage('sql')")
        self.place(tab.cell(0).locator("textarea.editor"), "a|")
        tab.press("Control+/")
        self.assertEqual(tab.sources(), ["-- a"])

    def test_a_cell_is_split_at_the_cursor_and_merged_again(self):
        tab = self.open("one\ntwo")
        tab.select(0)
        tab.press("Enter", "Control+Home", "ArrowDown", "Control+Shift+Minus")
        self.assertEqual(tab.sources(), ["one", "two"])
        tab.press("Escape", "ArrowUp", "Shift+M")
        self.assertEqual(tab.sources(), ["one\n\ntwo"])

    def test_up_and_down_at_the_edge_go_to_the_neighbour(self):
        tab = self.open("a\nb", "c")
        tab.select(0)
        tab.press("Enter", "Control+End", "ArrowDown", "1", "ArrowUp", "End", "2")
        self.assertEqual(tab.sources(), ["a\nb2", "1c"])

    def test_selected_text_is_seen(self):
        tab = self.open("")
        pictures = []
        for text in ("---", "==="):
            tab.write(0, text)
            tab.press("Control+a")
            pictures.append(tab.cell(0).locator(".input").screenshot())
        self.assertNotEqual(*pictures)

    def test_who_opens_an_empty_notebook_can_write_at_once(self):
        tab = self.open("")
        tab.press("d", "d")
        self.assertEqual(tab.sources(), ["dd"])

    def test_only_the_notice_of_the_last_step_offers_undo(self):
        tab = self.open("a", "b")
        tab.select(0)
        tab.press("d", "d")
        notice = tab.page.locator(".notice")
        self.assertShows(notice, "Deleted: a cell")
        tab.press("b", "Escape")
        self.assertCount(notice, 0)
        tab.press("z", "z")
        self.assertShows(notice, "Undone: delete a cell")
        self.assertCount(notice, 1)

    def test_undo_of_text_stays_in_its_cell(self):
        tab = self.open("a", "b")
        tab.select(0)
        tab.press("Enter", "End", "1", "Escape", "ArrowDown", "Enter", "End", "2")
        tab.press("Control+z", "Control+z")
        self.assertEqual(tab.sources(), ["a1", "b"])
        tab.press("Escape", "ArrowUp", "Enter", "Control+z")
        self.assertEqual(tab.sources(), ["a", "b"])

    def test_line_numbers_are_shown_for_one_cell_or_all(self):
        tab = self.open("1\n2", "3")
        tab.select(0)
        tab.press("l")
        self.assertEqual(tab.page.locator(".numbers:visible").all_text_contents(), ["1\n2"])
        tab.press("Shift+L", "Shift+L")
        self.assertCount(tab.page.locator(".numbers:visible"), 2)

    def test_output_is_collapsed_and_scrolled_by_key_and_stays_so_in_the_file(self):
        tab = self.open("print('here')")
        tab.run(0)
        tab.select(0)
        tab.press("o")
        self.assertFalse(tab.outputs(0).is_visible())
        tab.save()
        self.assertTrue(self.saved()["cells"][0]["metadata"]["collapsed"])
        tab.press("o", "Shift+O")
        self.assertIn("folded", tab.outputs(0).get_attribute("class"))
        tab.save()
        self.assertEqual(self.saved()["cells"][0]["metadata"], {"scrolled": True})

    def test_tab_in_command_mode_changes_no_text(self):
        tab = self.open("a", "b", "c")
        tab.select(0)
        tab.press("Tab", "Tab", "Tab")
        self.assertEqual(tab.sources(), ["a", "b", "c"])
        self.assertFalse(tab.page.evaluate("document.activeElement.matches('.editor')"))

    def test_code_is_hidden_where_jupyterlab_hides_it(self):
        tab = self.open("'shown'", "2")
        tab.run(0)
        tab.select(0)
        tab.command("hide-code")
        self.assertFalse(tab.cell(0).locator(".input").is_visible())
        tab.save()
        self.assertEqual(self.saved()["cells"][0]["metadata"], {"jupyter": {"source_hidden": True}})
        tab = self.reopen(self.name)
        self.assertShows(tab.outputs(0), "shown")
        self.assertFalse(tab.cell(0).locator(".input").is_visible())
        tab.page.get_by_role("button", name="Show the code").click()
        self.assertTrue(tab.cell(0).locator(".input").is_visible())
        tab.save()
        self.assertEqual(self.saved()["cells"][0]["metadata"], {})

    def test_a_long_result_is_folded_like_a_long_print(self):
        tab = self.open("print('x\\n' * 99)\n''", "class Long:\n    def __repr__(self): "
                        "return 'x\\n' * 99\nLong()", "1 + 1")
        for i, folded in enumerate([True, True, False]):
            tab.run(i)
            self.assertEqual("folded" in tab.outputs(i).get_attribute("class"), folded)

    def test_the_newest_lines_of_a_long_output_are_in_sight_while_it_comes(self):
        tab = self.open("import time\nfor i in range(99): print(i)\ntime.sleep(0.5)\n1/0")
        tab.run(0)
        self.assertTrue(tab.outputs(0).evaluate(
            "box => box.scrollTop > 0 && box.scrollHeight - box.scrollTop - box.clientHeight < 9"))

    def test_the_active_cell_stays_in_sight_when_the_output_above_it_grows(self):
        tab = self.open("from IPython.display import HTML\n"
                        "HTML('<p style=\"height: 500px\">' + 'x' * 9)", "")
        tab.page.set_viewport_size({"width": 900, "height": 600})
        tab.select(0)
        tab.press("Shift+Enter")
        tab.wait_until_done()
        tab.page.wait_for_function("""() => {
            const { top, bottom } = view.cells[1].node.getBoundingClientRect();
            return view.cells[0].outputs[0].node.offsetHeight > 500 && top > 0
                && bottom <= innerHeight;
        }""")

    def test_the_button_that_folds_a_long_output_stays_under_the_pointer(self):
        tab = self.open("for i in range(300): print(i)", *["1"] * 40)
        tab.run(0)
        tab.page.get_by_role("button", name="Show all 300 lines").click()
        button = tab.page.get_by_role("button", name="Fold this output")
        button.scroll_into_view_if_needed()
        place = "document.querySelector('.fold').getBoundingClientRect().top"
        before = tab.at_rest(place)
        button.click()
        tab.page.get_by_role("button", name="Show all 300 lines").wait_for()
        self.assertAlmostEqual(tab.at_rest(place), before, delta=2)

    def test_shift_enter_runs_also_after_a_click_into_the_output(self):
        tab = self.open("1/0", "'next'")
        tab.run(0)
        tab.cell(0).locator("summary").click()
        tab.press("Shift+Enter")
        tab.wait_until_done()      # or the error stops the next one
        tab.press("Shift+Enter")
        self.assertShows(tab.outputs(1), "next")

    def test_shift_and_a_click_select_as_far_as_that_cell(self):
        tab = self.open("a", "b", "c", "d")
        tab.select(1)
        tab.cell(2).locator(".gutter").click(modifiers=["Shift"])
        self.assertCount(tab.page.locator(".cell.selected"), 2)
        tab.press("d", "d")
        self.assertEqual(tab.sources(), ["a", "d"])

    def test_help_lists_every_key_and_the_palette_every_command(self):
        tab = self.open("1")
        tab.select(0)
        tab.press("h")
        for words in ("Run and go on", "Split cell at the cursor", "Complete, or indent"):
            self.assertShows(tab.page.locator("dialog"), words)
        tab.press("Escape", "p")
        tab.page.keyboard.type("insert below")
        tab.press("Enter")
        self.assertEqual(tab.sources(), ["1", ""])

    def test_space_scrolls_down_and_with_shift_up(self):
        tab = self.open("x = 1\n" * 200)
        tab.select(0)
        tab.page.evaluate("scrollTo(0, 0)")
        tab.press("Space")
        tab.page.wait_for_function("() => scrollY > 300")
        tab.press("Shift+Space")
        tab.page.wait_for_function("() => scrollY === 0")


class PageManages(PageCase):
    """Files, kernels and cells: what is not done every minute."""

    def names(self, tab):
        return tab.page.locator("tbody td.name a span:nth-child(2)").all_text_contents()

    def test_files_are_sorted_duplicated_and_downloaded(self):
        folder = self.root / "sorted"
        (folder / "zoo").mkdir(parents=True)
        for size, name in enumerate(("b2.txt", "b10.txt", "a.txt"), 1):
            (folder / name).write_text("x" * size)
        tab = self.visit("/tree/sorted")
        tab.page.locator("tbody tr").first.wait_for()
        self.assertEqual(self.names(tab), ["zoo", "a.txt", "b2.txt", "b10.txt"])
        tab.page.get_by_role("button", name="Size").click()
        self.assertEqual(self.names(tab), ["zoo", "a.txt", "b10.txt", "b2.txt"])
        tab.page.get_by_label("Select a.txt").check()
        with tab.page.expect_download() as download:
            tab.page.locator(".actions").get_by_role("button", name="Download").click()
        self.assertEqual(Path(download.value.path()).read_text(), "xxx")
        tab.page.locator("[data-command=duplicate]").click()
        self.assertShows(tab.page.locator("tbody tr:has(:checked)"), "a-Copy1.txt")

    def test_the_list_of_files_follows_the_kernels_without_taking_focus_or_menu_away(self):
        folder = self.root / "followed"
        folder.mkdir()
        (folder / "a.txt").write_text("")
        tab = self.visit("/tree/followed")
        link = tab.page.get_by_role("link", name="a.txt")
        link.focus()
        tab.page.evaluate("view.refresh()")
        self.assertTrue(link.evaluate("link => link === document.activeElement"))
        tab.page.locator("[data-command=new]").click()
        tab.page.evaluate("view.refresh()")
        self.assertCount(tab.page.locator(".menu:popover-open"), 1)

    def test_files_that_are_dropped_are_uploaded_and_replace_others_only_when_asked(self):
        (self.root / "there.txt").write_text("old")
        tab = self.visit("/tree")
        tab.page.locator("tbody tr").first.wait_for()
        tab.page.evaluate("""() => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([new Uint8Array([0, 255])], 'new.bin'));
            dataTransfer.items.add(new File(['new'], 'there.txt'));
            dispatchEvent(new DragEvent('drop', { dataTransfer, cancelable: true }));
        }""")
        tab.choose("Cancel")
        self.assertShows(tab.page.locator("main"), "new.bin")
        self.assertEqual((self.root / "new.bin").read_bytes(), b"\x00\xff")
        self.assertEqual((self.root / "there.txt").read_text(), "old")

    def test_a_folder_and_a_text_file_are_made(self):
        (self.root / "empty").mkdir()
        tab = self.visit("/tree/empty")
        for kind, name in (("folder", "Untitled Folder"), ("file", "untitled.txt")):
            tab.page.locator("[data-command=new]").click()
            tab.page.locator(f"[data-command=new-{kind}]").click()
            self.assertShows(tab.page.locator("main"), name)
            tab.page.get_by_label(f"Select {name}").and_(tab.page.locator(":checked")).wait_for()
        tab.page.get_by_label("Select Untitled Folder").check()
        self.assertShows(tab.page.locator("main"), "2 files selected")

    def test_restart_and_run_up_to_the_active_cell(self):
        tab = self.open("x = 1", "x + 1", "x + 2")
        tab.select(1)
        tab.command("restart-run-above")
        tab.choose("Restart")
        self.assertShows(tab.outputs(1), "2")
        tab.wait_until_done()
        self.assertEqual(tab.texts()[2], "")

    def test_a_kernel_is_shut_down_in_the_list_of_files(self):
        tab = self.open("1")
        tab.page.goto(self.address("/tree"))
        row = tab.page.locator("tr", has_text=self.name)
        self.assertShows(row, "running")
        row.locator("input").check()
        tab.page.get_by_role("button", name="Shut down").click()
        row.locator(".running-mark").wait_for(state="detached")
        self.assertEqual(self.server.get("/api/sessions").json, [])

    def test_a_notebook_is_made_beside_the_open_one(self):
        tab = self.open("first")
        with self.context.expect_page() as made:
            tab.command("new-notebook")
        made.value.wait_for_selector("body[data-kernel=idle]")
        self.assertIn("/notebooks/Untitled", made.value.url)

    def test_save_as_goes_on_with_the_new_file_and_leaves_the_old_one(self):
        tab = self.open("old", name="first.ipynb")
        tab.write(0, "new")
        tab.command("save-as")
        tab.page.locator("dialog input").fill("second")     # a notebook stays one
        tab.choose("Save")
        tab.page.wait_for_url("**/notebooks/second.ipynb")
        tab.wait_for(saved="true")
        self.assertEqual(self.saved_sources("second.ipynb"), ["new"])
        paths = [session["path"] for session in self.server.get("/api/sessions").json]
        self.assertEqual(paths, ["second.ipynb"])

    def test_save_as_asks_before_it_replaces_a_file(self):
        (self.root / "there.ipynb").write_bytes(jupyter_bytes(notebook("precious")))
        tab = self.open("mine")
        tab.command("save-as")
        tab.page.locator("dialog input").fill("there.ipynb")
        tab.choose("Save")
        self.assertShows(tab.page.locator("dialog[open]"), "already there")
        tab.choose("Cancel")
        self.assertEqual(self.saved_sources("there.ipynb"), ["precious"])

    def test_revert_brings_back_the_last_save_by_hand(self):
        tab = self.open("first")
        tab.write(0, "kept")
        tab.save()
        tab.page.wait_for_load_state("networkidle")
        tab.write(0, "later")
        tab.page.evaluate("view.file.save()")      # as autosave does: without a checkpoint
        tab.wait_for(saved="true")
        tab.command("revert")
        tab.choose("Revert")
        tab.page.wait_for_function("() => document.querySelector('.editor')?.value === 'kept'")
        self.assertEqual(self.saved_sources(), ["kept"])

    def test_a_notebook_joins_the_kernel_of_another(self):
        first = self.open("x = 'shared'", name="one.ipynb")
        first.run(0)
        second = self.open("x", name="two.ipynb")
        second.command("change-kernel")
        label = second.page.locator("dialog option", has_text="one.ipynb").text_content()
        second.page.locator("dialog select").select_option(label=label)
        second.choose("Select")
        second.wait_for(kernel="idle")
        second.run(0)
        self.assertShows(second.outputs(0), "'shared'")

    def test_waiting_cells_tell_their_place_and_an_interrupt_drops_them(self):
        tab = self.open("input()", "1", "2")
        for i in range(3):
            tab.select(i)
            tab.press("Control+Enter")
            tab.page.locator(".stdin input").wait_for()     # it takes the focus
        self.assertShows(tab.cell(1).locator(".timer"), "queued 1")
        self.assertShows(tab.cell(2).locator(".timer"), "queued 2")
        self.assertTrue(tab.page.title().startswith("(0/3)"))
        tab.select(2)
        tab.press("i", "i")
        tab.wait_until_done()
        self.assertShows(tab.outputs(0), "KeyboardInterrupt")
        self.assertEqual(tab.texts()[1:], ["", ""])

    def test_a_cell_tells_whether_its_text_has_run(self):
        tab = self.open("1")
        runs = []
        for act in (lambda: None, lambda: tab.run(0), lambda: tab.write(0, "2"),
                    lambda: tab.write(0, "1"), self.restart):
            act(*[tab] if act == self.restart else [])
            runs.append(tab.cell(0).get_attribute("data-run"))
        self.assertEqual(runs, ["never", "fresh", "edited", "fresh", "never"])

    def restart(self, tab):
        tab.command("restart")
        tab.choose("Restart")
        tab.page.wait_for_selector("[data-run=never]")

    def test_tags_and_metadata_are_edited_and_undone(self):
        tab = self.open("1")
        tab.select(0)
        tab.command("metadata")
        tab.page.get_by_role("textbox", name="Tags").fill("slow, needs-net")
        tab.page.get_by_label("Metadata as JSON").fill('{"owner": "Ada"}')
        tab.choose("Change")
        tab.save()
        self.assertEqual(self.saved()["cells"][0]["metadata"],
                         {"owner": "Ada", "tags": ["slow", "needs-net"]})
        tab.press("z")
        tab.save()
        self.assertEqual(self.saved()["cells"][0]["metadata"], {})

    def test_a_command_leads_to_the_failed_cell(self):
        tab = self.open("1", "1/0", "2")
        tab.run(1)
        tab.select(2)
        tab.command("go-failed")
        self.assertEqual(tab.page.locator(".cell.selected textarea").input_value(), "1/0")

    def test_one_step_at_a_time_is_told_and_offered_to_be_undone(self):
        tab = self.open("1", "2")
        tab.select(0)
        tab.press("d", "d", "z", "Shift+Z")
        self.assertShows(tab.page.locator("#notices"), "Redone: delete a cell")
        self.assertCount(tab.page.locator(".notice"), 1)

    def test_a_failure_out_of_sight_is_told_with_the_way_there(self):
        tab = self.open(*["1"] * 60, "1/0", "2")
        tab.command("run-all")
        self.assertShows(tab.page.locator(".notice"), "Cell [61] failed: ZeroDivisionError")
        tab.page.get_by_role("button", name="Go there").click()
        tab.page.wait_for_selector(".cell.selected[data-state=error]:focus")

    def test_output_is_copied_as_text(self):
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        tab = self.open("print('\\x1b[31mred')\n6 * 7")
        tab.run(0)
        tab.select(0)
        tab.command("copy-output")
        self.assertShows(tab.page.locator("#notices"), "Copied")
        self.assertEqual(tab.page.evaluate("navigator.clipboard.readText()"), "red\n\n42")


class PageLosesNothing(PageCase):
    """Crashes, other writers, other tabs, and a server that goes away."""

    def refuse_saves(self):
        """From now on no save reaches the server."""
        self.context.route("**/api/contents/**", lambda route: route.abort()
                           if route.request.method == "PUT" else route.continue_())

    def wait_for_draft(self, tab, is_there=True):
        tab.page.evaluate("""async isThere => {
            while (Boolean(await drafts('get', view.file.key)) !== isThere) await nextFrame();
        }""", is_there)

    def crashed(self):
        """A new tab on a notebook whose last tab crashed with something unsaved."""
        tab = self.open("saved")
        self.refuse_saves()
        tab.write(0, "typed before the crash")
        self.wait_for_draft(tab)
        tab.page.on("dialog", lambda dialog: dialog.accept())
        with tab.page.expect_event("crash"), contextlib.suppress(Exception):
            tab.page.goto("chrome://crash")
        tab.page.close()
        self.context.unroute_all()
        self.problems.clear()      # the browser notes the saves that failed
        return self.visit("/notebooks/" + quote(self.name))

    def test_a_draft_survives_a_crash_and_is_offered_with_what_differs(self):
        tab = self.crashed()
        self.assertShows(tab.page.locator("dialog del"), "- saved")
        self.assertShows(tab.page.locator("dialog ins"), "+ typed before the crash")
        tab.choose("Restore them")
        wait_until(lambda: self.saved_sources() == ["typed before the crash"])

    def test_a_draft_that_is_discarded_is_not_offered_again(self):
        tab = self.crashed()
        tab.choose("Discard them")
        tab.wait_for(kernel="idle")
        self.assertEqual(tab.sources(), ["saved"])
        tab.page.reload()
        tab.wait_for(kernel="idle")
        self.assertCount(tab.page.locator("dialog"), 0)

    def test_a_draft_that_is_neither_restored_nor_discarded_is_offered_again(self):
        tab = self.crashed()
        tab.choose("Cancel")
        tab.wait_for(kernel="idle")
        tab.page.reload()
        self.assertShows(tab.page.locator("dialog ins"), "typed before the crash")

    def test_outputs_alone_come_back_without_a_question(self):
        self.use_own_profile()
        self.context.clock.install()
        tab = self.open("'on' + 'ce'")
        self.refuse_saves()
        tab.select(0)
        tab.press("Control+Enter")
        self.assertShows(tab.outputs(0), "once")
        self.wait_for_draft(tab)
        tab.page.close()
        self.context.unroute_all()
        self.problems.clear()
        tab = self.reopen(self.name)
        tab.page.clock.fast_forward(5_000)
        tab.wait_for(saved="true")
        self.assertEqual(tab.texts()[0], "'once'")

    def test_a_save_ends_the_draft(self):
        tab = self.open("a")
        tab.write(0, "b")
        self.wait_for_draft(tab)
        tab.save()
        self.wait_for_draft(tab, is_there=False)

    def test_a_conflict_shows_what_differs(self):
        tab = self.open("same", "mine")
        (self.root / self.name).write_bytes(jupyter_bytes(notebook("same", "theirs", "more")))
        tab.write(1, "changed")
        tab.press("Control+s")
        dialog = tab.page.locator("dialog[open]")
        self.assertShows(dialog, "changed on disk")
        self.assertEqual([line.strip() for line in dialog.locator("del").all_text_contents()],
                         ["- theirs", "- ── code", "- more"])
        self.assertEqual([line.strip() for line in dialog.locator("ins").all_text_contents()],
                         ["+ changed"])
        tab.choose("Keep both")

    def test_a_conflict_found_by_the_autosave_takes_no_key(self):
        tab = self.open("mine")
        (self.root / self.name).write_bytes(jupyter_bytes(notebook("theirs")))
        tab.select(0)
        tab.press("Enter", "1")
        notice = tab.page.get_by_role("button", name="Compare…")
        notice.wait_for()
        tab.press("2", "Enter", "3")
        self.assertEqual(tab.sources(), ["mine12\n3"])
        for answer in ("Cancel", "Keep mine"):      # the notice stays until there is an answer
            notice.click()
            dialog = tab.page.locator("dialog[open]")
            self.assertEqual(dialog.locator(":focus").inner_text(), "Cancel")
            tab.choose(answer)
        tab.wait_for(saved="true")
        self.assertEqual(self.saved_sources(), ["mine12\n3"])

    def test_closing_warns_while_something_is_not_saved(self):
        tab = self.open("a")
        self.refuse_saves()
        tab.select(0)
        tab.press("Enter", "x")
        with tab.page.expect_event("dialog") as asked:
            tab.page.close(run_before_unload=True)
        self.assertEqual(asked.value.type, "beforeunload")
        asked.value.accept()
        self.problems.clear()

    def test_a_save_that_failed_is_told_and_made_up_for_by_itself(self):
        self.use_own_profile()
        self.context.clock.install()
        tab = self.open("a")
        self.refuse_saves()
        tab.write(0, "b")
        tab.press("Control+s")
        self.assertShows(tab.page.locator("#notices"), "Not saved: The server does not answer")
        self.context.unroute_all()
        tab.page.clock.fast_forward(10_000)
        tab.wait_for(saved="true")
        self.assertCount(tab.page.locator(".notice.bad"), 0)
        self.assertEqual(self.saved_sources(), ["b"])
        self.problems.clear()

    def test_a_list_of_files_whose_server_is_gone_says_so_and_goes_on_when_it_is_back(self):
        self.use_own_profile()
        self.context.clock.install()
        tab = self.visit("/tree")
        tab.page.locator(".crumbs").wait_for()
        self.context.route("**/api/**", lambda route: route.abort())
        tab.page.evaluate("view.poll()")
        self.assertShows(tab.page.locator("#notices"), "The server does not answer")
        (self.root / "meanwhile.txt").write_text("x")
        self.context.unroute_all()
        tab.page.clock.fast_forward(10_000)
        self.assertShows(tab.page.locator("main"), "meanwhile.txt")
        self.assertCount(tab.page.locator(".notice"), 0)
        self.problems.clear()

    def test_a_request_that_failed_says_what_and_can_be_tried_again(self):
        (self.root / "stays.txt").write_text("x")
        tab = self.visit("/tree")
        tab.page.get_by_label("Select stays.txt").check()
        self.context.route("**/stays.txt?*", lambda route: route.abort())
        tab.page.locator("[data-command=delete]").click()
        tab.choose("Delete")
        self.assertShows(tab.page.locator("#notices"), "“stays.txt” was not deleted")
        self.context.unroute_all()
        tab.page.get_by_role("button", name="Try again").click()
        self.assertCount(tab.page.get_by_text("stays.txt"), 0)
        self.problems.clear()

    def test_a_file_that_somebody_else_wrote_is_offered_when_one_comes_back(self):
        tab = self.open("old")
        (self.root / self.name).write_bytes(jupyter_bytes(notebook("theirs")))
        tab.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        self.assertShows(tab.page.locator("#notices"), "changed on disk")
        tab.page.get_by_role("button", name="Load it").click()
        tab.page.wait_for_function("() => document.querySelector('.editor')?.value === 'theirs'")

    def two_tabs(self):
        first = self.open("old")
        second = self.reopen(self.name)
        self.assertShows(second.page.locator("#notices"), "open in another tab")
        return first, second

    def test_a_second_tab_says_so_and_does_not_save(self):
        first, second = self.two_tabs()
        second.write(0, "second")
        first.write(0, "first")
        first.save()
        self.assertShows(second.page.locator("#save-state"), "Open in another tab")
        self.assertEqual(self.saved_sources(), ["first"])
        first.page.close()

    def test_what_another_tab_has_not_saved_yet_is_no_draft_of_a_crash(self):
        first = self.open("old")
        self.refuse_saves()
        first.write(0, "new")
        self.wait_for_draft(first)
        self.context.unroute_all()
        second = self.visit("/notebooks/" + quote(self.name))
        second.wait_for(kernel="idle")
        self.assertCount(second.page.locator("dialog"), 0)
        self.problems.clear()

    def test_the_second_tab_takes_over_what_the_first_has_written(self):
        first, second = self.two_tabs()
        first.write(0, "typed in the first")
        second.page.get_by_role("button", name="Take over").click()
        second.page.wait_for_function(
            "() => document.querySelector('.editor')?.value === 'typed in the first'")
        second.write(0, "and the second goes on")
        second.save()
        self.assertShows(first.page.locator("#notices"), "open in another tab")
        self.assertEqual(self.saved_sources(), ["and the second goes on"])

    def test_when_the_first_tab_closes_the_second_saves(self):
        self.use_own_profile()
        self.context.clock.install()
        first, second = self.two_tabs()
        first.page.close()
        second.write(0, "second")
        second.page.clock.fast_forward(2_000)      # it looks whether it may save now
        second.page.wait_for_function("() => view.file.isHolder")
        second.page.clock.fast_forward(5_000)
        second.wait_for(saved="true")
        self.assertEqual(self.saved_sources(), ["second"])

    def test_a_traceback_leads_to_the_line_and_folds(self):
        tab = self.open("def f():\n    return 1 / 0", "f()")
        tab.run(0)
        tab.run(1)
        tab.page.get_by_role("button", name="[1] line 2").click()
        tab.wait_for(mode="edit")
        self.assertEqual(tab.page.evaluate("getSelection().toString()"), "    return 1 / 0")
        tab.outputs(1).locator("summary").click()
        self.assertFalse(tab.outputs(1).locator("pre").first.is_visible())


AXE_FINDS = """async rules => (await axe.run(rules)).violations.flatMap(
    ({ id, nodes }) => nodes.map(node => `${id}: ${node.html.slice(0, 200)}`))"""
ALL_KINDS = """# Title

[link](https://example.org) `code` $x^2$ **bold**

- [ ] task

> quote

| a | b |
|---|---|
| 1 | 2 |

```python
x = 'a'  # comment
```"""


@needs("axe_playwright_python")
class PageForEveryone(PageCase):
    """axe-core, keyboard, screen readers, small screens, paper."""

    def assertAxeFindsNothing(self, tab):
        import axe_playwright_python
        axe = Path(axe_playwright_python.__file__).with_name("axe.min.js")
        if not tab.page.evaluate("'axe' in window"):
            tab.page.evaluate(axe.read_text("utf-8"))
        for scheme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
            tab.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            with self.subTest(scheme):
                self.assertEqual(tab.page.evaluate(AXE_FINDS, rules), [])

    def test_files_menus_and_dialogs_of_the_tree(self):
        (self.root / "sub").mkdir()
        (self.root / "t.txt").write_text("x")
        tab = self.visit("/tree")
        tab.page.get_by_label("Select t.txt").check()
        self.assertAxeFindsNothing(tab)
        tab.page.locator("[data-command=rename]").last.click()
        self.assertAxeFindsNothing(tab)
        tab.choose("Cancel")
        tab.page.get_by_label("Select t.txt").uncheck()
        tab.page.locator("[data-command=new]").click()
        self.assertAxeFindsNothing(tab)

    def test_a_notebook_with_every_kind_of_output(self):
        tab = self.open(
            "", "import sys\nfor i in range(99): print(i)\nprint('e', file=sys.stderr)", "1 / 0",
            "from IPython.display import HTML\nHTML('<table><tr><td>1</table>')")
        tab.select(0)
        tab.press("m")
        tab.run(0, ALL_KINDS)
        for i in (1, 2, 3):
            tab.run(i)
        tab.select(1)
        tab.press("l")
        tab.command("contents")
        self.assertAxeFindsNothing(tab)

    def test_the_panel_under_the_hood(self):
        tab = self.open("1 + 1")
        tab.command("hood")
        tab.run(0)
        row = tab.page.locator("#ladder-rows [role=row]", has_text="execute_request").nth(1)
        row.click()
        for depth in ("Fields", "JSON", "Bytes", "Source"):
            tab.page.locator("#hood-detail").get_by_role("tab", name=depth).click()
            tab.page.locator("#hood-detail pre, #hood-detail dl").first.wait_for()
            self.assertAxeFindsNothing(tab)

    def test_popups_of_a_notebook(self):
        tab = self.open("import os", "os.path.", "input('name? ')")
        tab.run(0)
        for open_it, close_it in (("f", "Escape"), ("h", "Escape"), ("p", "Escape"),
                                  ("0 0", "Escape"), ("Enter Control+End Tab", "Escape Escape"),
                                  ("Enter Control+Home Shift+Tab", "Escape Escape")):
            with self.subTest(open_it):
                tab.select(1)
                tab.press(*open_it.split())
                self.assertAxeFindsNothing(tab)
                tab.press(*close_it.split())
        tab.page.locator("[popovertarget=menu-file]").click()
        self.assertAxeFindsNothing(tab)
        tab.press("Escape")
        tab.select(2)
        tab.press("Control+Enter")
        tab.page.locator(".stdin").wait_for()
        self.assertAxeFindsNothing(tab)

    def test_dialogs_of_a_notebook(self):
        tab = self.open("input()", "2")
        for command in ("metadata", "notebook-metadata", "change-kernel"):
            with self.subTest(command):
                tab.command(command)
                tab.page.locator("dialog[open]").wait_for()
                self.assertAxeFindsNothing(tab)
                tab.press("Escape")
                tab.page.locator("dialog[open]").wait_for(state="detached")
        tab.command("run-all")
        tab.page.locator(".stdin input").wait_for()
        self.assertAxeFindsNothing(tab)

    def test_a_conflict_and_what_differs(self):
        tab = self.open("old\nsame")
        (self.root / self.name).write_bytes(jupyter_bytes(notebook("theirs\nsame")))
        tab.write(0, "mine\nsame")
        tab.press("Control+s")
        tab.page.locator("dialog[open] .diff").wait_for()
        self.assertAxeFindsNothing(tab)
        tab.choose("Take the file's")

    def test_a_text_file_and_a_file_that_is_missing(self):
        (self.root / "t.txt").write_text("x")
        self.assertAxeFindsNothing(self.visit("/edit/t.txt"))
        tab = self.visit("/notebooks/missing.ipynb")
        tab.page.get_by_role("alert").wait_for()
        self.assertAxeFindsNothing(tab)

    def test_menus_work_by_keyboard_and_give_the_focus_back(self):
        tab = self.open("a", "b")
        tab.page.locator("[popovertarget=menu-file]").focus()
        for key, menu in (("Enter", "file"), ("ArrowRight", "edit"), ("ArrowRight", "view"),
                          ("ArrowRight", "insert")):
            tab.press(key)
            tab.page.locator(f"#menu-{menu} button:focus").wait_for()
        tab.press("ArrowDown", "Enter")
        self.assertEqual(tab.sources(), ["a", "", "b"])
        tab.press("d", "d")
        self.assertEqual(tab.sources(), ["a", "b"])

    def test_files_are_reached_renamed_and_deleted_by_keyboard(self):
        (self.root / "keys").mkdir()
        for name in ("a.txt", "b.txt", "c.txt"):
            (self.root / "keys" / name).write_text("")
        tab = self.visit("/tree/keys")
        self.assertShows(tab.page.locator("main"), "c.txt")
        tab.press("ArrowDown", "ArrowDown", "F2")
        tab.page.keyboard.type("new")
        tab.press("Enter")
        self.assertShows(tab.page.locator("main"), "new.txt")
        tab.page.locator("tr", has_text="new.txt").locator("input").uncheck()
        tab.page.locator("a", has_text="a.txt").focus()
        tab.press("Delete", "Enter")
        tab.page.locator("tr", has_text="a.txt").wait_for(state="detached")
        self.assertEqual(sorted(os.listdir(self.root / "keys")), ["c.txt", "new.txt"])
        tab.page.locator("[data-command=new]").focus()
        tab.press("Enter")
        tab.page.locator("#menu-new button:focus").wait_for()
        tab.press("ArrowUp", "Enter")
        wait_until(lambda: "Untitled Folder" in os.listdir(self.root / "keys"))

    def test_escape_and_then_tab_leave_the_cell(self):
        tab = self.open("a", "b")
        tab.cell(0).locator("textarea.editor").focus()
        tab.press("Escape", "Tab")
        self.assertFalse(tab.page.evaluate("view.active.node.contains(document.activeElement)"))
        (self.root / "left.txt").write_text("text")
        tab = self.visit("/edit/left.txt")
        tab.page.locator("textarea.editor:focus").wait_for()
        tab.press("Escape", "Tab")
        self.assertFalse(tab.page.evaluate("document.activeElement.matches('.editor')"))
        self.assertEqual(tab.page.locator("textarea.editor").input_value(), "text")

    def test_screen_readers_hear_how_a_run_ended(self):
        tab = self.open("print('all is well')", "1 / 0")
        spoken = tab.page.locator("#spoken")
        tab.run(0)
        self.assertShows(spoken, "Cell [1] done: all is well")
        tab.run(1)
        self.assertShows(spoken, "Cell [2] failed: ZeroDivisionError: division by zero")

    def test_on_a_phone_nothing_is_wider_than_the_screen(self):
        tab = self.open("x = 'a' * 300; print(x)  # " + "long " * 40, "1")
        tab.page.set_viewport_size({"width": 360, "height": 700})
        tab.run(0)
        width = tab.page.evaluate("document.documentElement.scrollWidth")
        self.assertLessEqual(width, 360)
        tab.page.locator("#toolbar [data-command=run]").click()
        self.assertShows(tab.outputs(1), "1")
        tree = self.visit("/tree")
        tree.page.set_viewport_size({"width": 360, "height": 700})
        self.assertLessEqual(tree.page.evaluate("document.documentElement.scrollWidth"), 360)

    def test_on_paper_there_are_whole_cells_and_no_controls(self):
        row = "".join(f"<td>number{i}</td>" for i in range(30))
        tab = self.open("for i in range(99): print(i)  # " + "long " * 60,
                        f"display({{'text/html': '<table><tr>{row}</tr></table>'}}, raw=True)")
        for i in (0, 1):
            tab.run(i)
        tab.page.emulate_media(media="print", color_scheme="dark")
        self.assertFalse(tab.page.locator("#top").is_visible())
        output = tab.outputs(0)
        self.assertEqual(output.evaluate("o => o.scrollHeight - o.clientHeight"), 0)
        code = tab.cell(0).locator(".input")
        self.assertEqual(code.evaluate("o => o.scrollWidth - o.clientWidth"), 0)
        self.assertEqual(code.evaluate("o => getComputedStyle(o).color"), "rgb(28, 35, 48)")
        table, place = tab.outputs(1).locator("table"), tab.outputs(1)
        self.assertLessEqual(*(o.evaluate("o => o.getBoundingClientRect().right")
                               for o in (table, place)))


class PageDownloads(PageCase):
    """Download as: a program, Markdown, and this page with the notebook in it."""

    def downloaded(self, kind, *sources, cells=()):
        """(file name, text) of a notebook whose code has run, downloaded as this kind."""
        nb = notebook(*sources)
        nb["cells"][:0] = cells
        (self.root / self.name).write_bytes(jupyter_bytes(nb))
        tab = self.reopen(self.name)
        tab.command("run-all")
        tab.wait_until_done()
        with tab.page.expect_download() as download:
            tab.command(f"download-{kind}")
        return download.value.suggested_filename, Path(download.value.path()).read_text("utf-8")

    def test_a_program_has_the_code_and_the_rest_as_comments(self):
        name, text = self.downloaded("script", "x = 1", "%pwd\nx", cells=[
            markdown("# Title\n\ntext", id="m")])
        self.assertEqual(name, self.name.replace(".ipynb", ".py"))
        self.assertEqual(text, "# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 1\n\n"
                               "# %%\n# %pwd\nx\n")

    def test_markdown_has_everything_in_one_file(self):
        pixel = base64.b64encode(one_red_pixel()).decode()
        attachments = {"a.png": {"image/png": pixel}}
        name, text = self.downloaded("markdown", "print('```')", cells=[
            markdown("![a](attachment:a.png)", id="m", attachments=attachments)])
        self.assertEqual(name, self.name.replace(".ipynb", ".md"))
        self.assertEqual(text, f"![a](data:image/png;base64,{pixel})\n\n"
                               "````python\nprint('```')\n````\n\n````\n```\n````\n")

    def page(self, *sources, cells=()):
        """The downloaded page, opened from the disk; what asks for the network is a problem."""
        _, text = self.downloaded("html", *sources, cells=cells)
        path = self.folder() / "notebooks.html"
        path.write_text(text, "utf-8")
        page = self.context.new_page()
        page.goto(path.as_uri())
        return page

    def test_the_page_shows_the_notebook_without_a_server(self):
        (self.root / "pixel.png").write_bytes(one_red_pixel())
        page = self.page("print('out' + 'put')", cells=[
            markdown("# Title\n\n$x^2$ ![p](pixel.png)", id="m")])
        self.assertShows(page.locator("h1").nth(1), "Title")
        self.assertCount(page.locator("math"), 1)
        self.assertShows(page.locator(".outputs").nth(1), "output")
        width = page.locator(".rendered img").evaluate("i => i.decode().then(() => i.naturalWidth)")
        self.assertEqual(width, 1)

    def test_the_page_can_be_read_but_not_changed(self):
        page = self.page("text = 1", "2")
        tab = Tab(page)
        tab.select(0)
        tab.press("d", "d", "Enter", "x", "Tab", "Escape", "ArrowDown", "Shift+Enter")
        self.assertEqual(tab.sources(), ["text = 1", "2"])
        tab.press("f")
        page.keyboard.type("text")
        self.assertShows(page.locator("#find-count"), "1")

    def test_nothing_in_the_notebook_can_act_in_the_page(self):
        evil = "</script><script>document.title = 'owned'</script><!--<script>"
        cell = markdown(f"{evil}<img src=x onerror=document.title='owned'>", id="m")
        page = self.page(f"print({evil!r})", f"from IPython.display import HTML; HTML({evil!r})",
                         cells=[cell])
        self.assertShows(page.locator(".outputs").nth(1), evil)
        self.assertNotIn("owned", page.title())
        blocked = page.evaluate("""() => new Promise(resolve => {
            addEventListener('securitypolicyviolation', event => resolve(event.effectiveDirective));
            fetch('https://example.org/').catch(() => {});
        })""")
        self.assertEqual(blocked, "connect-src")
        self.problems.clear()

    def test_the_page_says_why_the_scripts_of_an_output_do_not_run(self):
        page = self.page("from IPython.display import HTML, Javascript\n"
                         "HTML('<script>document.title = 1</script>')",
                         "Javascript('element.append(1)')")
        for i in (0, 1):
            self.assertShows(page.locator(".outputs").nth(i), "runs no scripts but its own")


class PageStaysFluid(PageCase):
    """Big notebooks and much output."""

    def test_a_notebook_of_ten_thousand_cells_opens_and_scrolls(self):
        nb = notebook(*[f"x = {i}" for i in range(9_999)])
        nb["cells"].append(markdown("# The end", id="end"))
        (self.root / "big.ipynb").write_bytes(jupyter_bytes(nb))
        tab = self.reopen("big.ipynb")
        tab.run(0, "6 * 7")
        self.assertShows(tab.outputs(0), "42")
        tab.select(9_990)
        for _ in range(9):
            tab.press("ArrowDown")
        heading = tab.page.locator(".rendered h1")
        heading.wait_for()
        self.assertLess(heading.bounding_box()["y"], 720)

    def test_cells_near_the_viewport_are_coloured_and_the_others_are_not(self):
        tab = self.open(*["def f(): pass\n" * 40] * 20)
        coloured = "() => view.cells.map(cell => cell.node.querySelector('[data-token]') !== null)"
        tab.page.wait_for_function(f"() => ({coloured})()[0]")
        self.assertFalse(tab.page.evaluate(coloured)[-1])
        tab.select(19)
        tab.page.wait_for_function(f"() => ({coloured})()[19]")

    def test_an_endless_print_can_be_interrupted_by_button(self):
        tab = self.open("while True: print('on and on')", "'next'")
        tab.select(0)
        tab.press("Control+Enter")
        tab.outputs(0).locator("[data-mime$='.stdout']").wait_for()
        tab.page.get_by_role("button", name="Interrupt", exact=True).click()
        # Not by its text: asking for all of it, again and again, would keep the page busy.
        failure = tab.outputs(0).locator("[data-mime$='.error']")
        self.assertShows(failure, "KeyboardInterrupt")
        tab.run(1)
        self.assertShows(tab.outputs(1), "'next'")

    def test_a_run_of_many_cells_leaves_the_view_where_it_is(self):
        tab = self.open(*["for i in range(30): print(i)"] * 20)
        tab.command("run-all")
        tab.wait_until_done()
        tab.cell(9).scroll_into_view_if_needed()
        place = "document.querySelectorAll('.cell')[9].getBoundingClientRect().top"
        before = tab.at_rest(place)
        tab.command("run-all")
        tab.wait_until_done()
        self.assertAlmostEqual(tab.at_rest(place), before, delta=2)


ODD_OUTPUTS = [
    {"output_type": "nope"}, {"output_type": "stream"},
    {"output_type": "stream", "name": "weird", "text": 5}, {"output_type": "error"},
    {"output_type": "error", "traceback": "one string", "ename": 5},
    {"output_type": "error", "traceback": {"a": 1}, "ename": None},
    {"output_type": "display_data"}, {"output_type": "display_data", "data": None},
    {"output_type": "display_data", "data": {"text/plain": 5}, "metadata": {"text/plain": None}},
    {"output_type": "display_data", "data": {"text/html": {"a": 1}}},
    {"output_type": "display_data", "data": {"text/markdown": {"a": [1]}}},
    {"output_type": "execute_result", "data": {"application/json": None}},
    {"output_type": "execute_result", "data": {"x/unknown": {"a": 1}}, "metadata": None},
    {"output_type": "display_data", "data": {"image/svg+xml": ["<svg", 5]}, "metadata": 5},
]
ODD_CELLS = [
    {"cell_type": "diagram", "metadata": {"k": 1}, "source": "boxes", "extra": {"deep": [1]}},
    markdown("![a](attachment:a) ![b](attachment:%zz) ![c](attachment:__proto__)",
             attachments={"a": "attachment:a", "%zz": None}),
    markdown("![a](attachment:a)", attachments=None),
    markdown("[" * 5000 + "*" * 5000 + "<div" * 1000 + "> " * 500 + "$" * 1001),
    {"cell_type": "code", "source": "x" * 1_000_000, "outputs": [], "execution_count": "many",
     "metadata": {"scrolled": "x", "collapsed": [], "jupyter": 5, "tags": "no list"}},
]


class PageBearsAnything(PageCase):
    """Notebooks as they come: shown as well as possible, kept as they are."""

    def opened(self, cells, **metadata):
        """A tab on these cells, with one more below them that must be drawn, too."""
        nb = {"cells": [{**cell, "id": f"c{n}"} for n, cell in enumerate(
            [*cells, markdown("# the last")])],
            "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
        (self.root / self.name).write_text(json.dumps(nb))
        tab = self.visit("/notebooks/" + self.name)
        tab.page.locator(".rendered h1").wait_for()
        tab.page.evaluate("view.file.touch()")
        tab.save()
        self.assertEqual(self.saved(), nb)
        return tab

    def test_outputs_of_odd_shapes_are_shown_or_named_and_kept(self):
        after = {"output_type": "stream", "name": "stdout", "text": "after"}
        tab = self.opened([{"cell_type": "code", "metadata": {}, "source": "x",
                            "outputs": [odd, after], "execution_count": 1} for odd in ODD_OUTPUTS])
        for i, shown in enumerate(tab.texts()[:-1]):
            self.assertTrue(shown.endswith("after"), ODD_OUTPUTS[i])

    def test_cells_of_odd_kinds_are_shown_and_kept(self):
        tab = self.opened(ODD_CELLS)
        self.assertEqual(tab.sources()[0], "boxes")

    def test_odd_metadata_is_kept(self):
        self.opened([], kernelspec=5, language_info="x", widgets=None)


class PageRunsScripts(PageCase):
    """Scripts of outputs run, and reach nothing."""

    def frame(self, code):
        tab = self.open(code)
        tab.run(0)
        return tab, tab.page.frame_locator(".script-frame")

    def test_html_with_scripts_runs_in_a_frame_of_no_origin(self):
        tab, frame = self.frame(
            "from IPython.display import HTML\nHTML('''<p>text</p><script>"
            "document.body.append('origin ' + origin);"
            "try { parent.document.title = 'owned' } catch { document.body.append(' kept out') }"
            "</script>''')")
        self.assertShows(frame.locator("body"), "origin null kept out")
        self.assertNotIn("owned", tab.page.title())

    def test_a_frame_cannot_read_files_or_cookies(self):
        tab, frame = self.frame(
            "from IPython.display import HTML\nHTML('''<script>"
            "fetch('/api/contents').then(() => 'read', () => 'refused').then(word => {"
            "try { word += document.cookie } catch { word += ' no cookies' }"
            "document.body.append(word) })</script>''')")
        self.assertShows(frame.locator("body"), "refused no cookies")
        self.problems.clear()      # the browser notes what it refused

    def test_javascript_gets_an_element_and_the_frame_its_height(self):
        tab, frame = self.frame(
            "from IPython.display import Javascript\nJavascript(\"element.append('drawn'); "
            "element.style.height = '321px'\")")
        self.assertShows(frame.locator("body"), "drawn")
        tab.page.wait_for_function(
            "() => document.querySelector('.script-frame').offsetHeight >= 321")

    def test_an_error_in_a_program_is_shown_in_its_output(self):
        tab, frame = self.frame("from IPython.display import Javascript\nJavascript('nope()')")
        self.assertShows(frame.locator("body"), "nope is not defined")
        self.problems.clear()

    def test_a_frame_far_away_is_not_loaded(self):
        html = {"output_type": "display_data", "metadata": {},
                "data": {"text/html": "<script>document.body.append('here')</script>"}}
        nb = notebook(*["x = 1\n" * 40] * 5, "last")
        nb["cells"][-1]["outputs"] = [html]
        (self.root / "far.ipynb").write_bytes(jupyter_bytes(nb))
        tab = self.reopen("far.ipynb")
        self.assertEqual([frame.url for frame in tab.page.frames[1:]], [""])
        tab.cell(5).scroll_into_view_if_needed()
        self.assertShows(tab.page.frame_locator(".script-frame").locator("body"), "here")


# TeX, and what its MathML says: tag names with the texts in them
FORMULAS = [
    ("x^2", "msup(mi x mn 2)"),
    ("x_i^2", "msubsup(mi x mi i mn 2)"),
    ("f'", "msup(mi f mo ′)"),
    ("12.5", "mn 12.5"),
    (r"\frac12", "mfrac(mn 1 mn 2)"),
    (r"\sqrt[3]{x}", "mroot(mi x mn 3)"),
    (r"{a \over b}", "mfrac(mi a mi b)"),
    (r"\sum_{n}^k", "munderover(mo ∑ mi n mi k)"),
    (r"\int_0^1", "msubsup(mrow(mo ∫ mi()) mn 0 mn 1)"),
    (r"\lim_x", "munder(mo lim mi x)"),
    (r"\mathbb{R}", "mi ℝ"),
    (r"\mathbf{Ab1}", "mrow(mi 𝐀 mi 𝐛 mn 𝟏)"),
    (r"\mathrm{rank}", "mi rank"),
    (r"\mathcal{L}", "mi ℒ"),
    (r"\left(x\right]", "mrow(mo ( mrow(mi x) mo ])"),
    (r"\hat{x}", "mover(mi x mo ^)"),
    (r"\text{if } x", "mrow(mrow(mtext if\u00a0) mi x)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
     "mrow(mo ( mtable(mtr(mtd(mn 1) mtd(mn 2)) mtr(mtd(mn 3) mtd(mn 4))) mo ))"),
    (r"\begin{cases}1\\2\end{cases}", "mrow(mo { mtable(mtr(mtd(mn 1)) mtr(mtd(mn 2))))"),
    (r"\newcommand{\half}[1]{\frac{#1}{2}}\half{y}", "mrow(mrow() mfrac(mi y mn 2))"),
    (r"a \nosuch b", r"mrow(mi a mtext \nosuch mi b)"),
    (r"\constructor", r"mtext \constructor"),
    (r"\binom{n}{k}", "mrow(mo ( mfrac(mi n mi k) mo ))"),
    (r"\overset{a}{b}", "mover(mi b mi a)"),
]
MATHML_IN_WORDS = """tex => {
    const say = node => node.childElementCount || !node.textContent
        ? `${node.localName}(${[...node.children].map(say).join(' ')})`
        : `${node.localName} ${node.textContent}`;
    return [...mathNode(tex, true).children].map(say).join(' ');
}"""


class PageTypesetsMath(PageCase):
    def test_tex_becomes_mathml(self):
        page = self.open("").page
        for tex, words in FORMULAS:
            with self.subTest(tex):
                self.assertEqual(page.evaluate(MATHML_IN_WORDS, tex), words)

    def test_all_ways_of_marking_math_are_understood(self):
        nb = notebook()
        text = "\n\n".join(["a $x$ b", "$$y$$", r"\\(z\\)", r"\[v\]", r"\begin{align}w\end{align}",
                            "$5 and $6"])
        nb["cells"] = [{"cell_type": "markdown", "metadata": {}, "source": text, "id": "math"}]
        (self.root / "ways.ipynb").write_bytes(jupyter_bytes(nb))
        tab = self.reopen("ways.ipynb")
        self.assertEqual(tab.page.locator("math").all_text_contents(), list("xyzvw"))
        self.assertShows(tab.cell(0).locator(".rendered"), "$5 and $6")

    def test_what_is_not_understood_shows_its_source_with_a_mark(self):
        page = self.open("").page
        for tex in (r"\frac{a", r"\begin{nope}x\end{nope}", r"\def\x{\x}\x", "{" * 9000):
            with self.subTest(tex[:20]):
                shown = page.evaluate("""tex => {
                    const node = mathNode(tex);
                    return [node.className, node.textContent];
                }""", tex)
                self.assertEqual(shown, ["tex-unknown", tex])

    def test_every_formula_of_the_example_notebooks_is_typeset(self):
        for name in ("ipython-Typesetting_Equations", "handson-math_linear_algebra"):
            if not (NOTEBOOKS / f"{name}.ipynb").exists():
                self.skipTest("needs the example notebooks")
            shutil.copy(NOTEBOOKS / f"{name}.ipynb", self.root)
            tab = self.reopen(f"{name}.ipynb")
            tab.page.locator("math").first.wait_for()
            self.assertCount(tab.page.locator(".tex-unknown"), 0)
            self.problems.clear()      # pictures of other hosts

    def test_latex_output_is_typeset(self):
        tab = self.open(r"from IPython.display import Math; Math(r'\frac{1}{2}')")
        tab.run(0)
        self.assertCount(tab.outputs(0).locator("mfrac"), 1)

    stage = None

    def drawn(self, text, measure):
        """What a function says of the text, drawn as Markdown."""
        self.stage = self.stage or self.visit("/tree").page
        return self.stage.evaluate("""text => {
            ui.main.replaceChildren(h('div', { class: 'rendered markdown' }, renderMarkdown(text)));
            return MEASURE(ui.main);
        }""".replace("MEASURE", f"({measure})"), text)

    def test_formulas_have_the_numbers_they_ask_for_and_references_link_to_them(self):
        formulas = ("$$x \\tag{1}\\label{eq:one}$$\n\n"
                    "\\begin{align}a &= b \\tag*{$\\star$}\\label{s}\\\\ "
                    "c &= d \\notag\\end{align}\n\n"
                    "\\begin{equation}y\\label{none}\\end{equation}")
        links = "see \\eqref{eq:one}, $\\ref{eq:one}$, \\eqref{s}, \\ref{none} and \\ref{nowhere}"
        nb = notebook(*["x = 1\n" * 50] * 3)
        nb["cells"][:0] = [markdown(links, id="links")]
        nb["cells"].append(markdown(formulas, id="formulas"))
        (self.root / self.name).write_bytes(jupyter_bytes(nb))
        page = self.reopen(self.name).page
        self.assertShows(page.locator(".rendered").first, "see (1), 1, (⋆), ??? and ???")
        self.assertEqual(page.locator(".beside .tag").all_text_contents(), ["(1)", "⋆"])
        page.get_by_role("link", name="1", exact=True).first.click()
        page.wait_for_function("""() => {
            const { top, bottom } = document.querySelector('.beside .tag').getBoundingClientRect();
            return top >= 0 && bottom <= innerHeight;
        }""")

    def test_a_number_stands_at_the_right_edge_and_its_formula_in_the_middle(self):
        middle, edge = self.drawn("$$x \\tag{1}$$", """main => {
            const box = selector => main.querySelector(selector).getBoundingClientRect();
            const [math, number, letter] = ['math', '.tag', 'mi'].map(box);
            return [letter.left + letter.right - math.left - math.right,
                math.right - number.right];
        }""")
        self.assertLess(abs(middle), 4)
        self.assertLess(edge, 10)

    def test_scripts_are_set_tight(self):
        for tex in ("\\sum_{i=1}^n", "x_{i=1}", "$\\frac{i=1}{2}$", "x^{\\frac{i=1}{2}}",
                    "\\overset{i=1}{=}"):
            with self.subTest(tex):
                text = tex if tex[0] == "$" else f"$${tex}$$"
                gaps = self.drawn(text, GAPS)
                self.assertLess(max(gaps), 1, gaps)
        self.assertGreater(max(self.drawn("$$i=1$$", GAPS)), 3)
        self.assertGreater(max(self.drawn("$$\\frac{i=1}{2}$$", GAPS)), 3)
        self.assertLess(max(self.drawn("$P(i|1)$", GAPS.replace("'='", "'|'"))), 1)

    def test_a_displayed_integral_is_higher_than_a_sum(self):
        height = "main => main.querySelector('mo').getBoundingClientRect().height"
        high, sum_, inline = (self.drawn(tex, height)
                              for tex in ("$$\\int_0^1$$", "$$\\sum_0^1$$", "$\\int_0^1$"))
        self.assertGreater(high, 1.2 * sum_)
        self.assertGreater(high, 1.5 * inline)

    def test_columns_of_aligned_formulas_stand_at_their_sides(self):
        text = "\\begin{align}a &= b\\\\ a + b + c &= d\\end{align}"
        lefts, rights = self.drawn(text, """main => {
            const boxes = name => [...main.querySelectorAll(`mtd.${name}`)].map(cell => [
                cell.querySelector('mi + mo') ?? cell.firstChild, cell.lastChild].map(
                    node => node.getBoundingClientRect()));
            return [boxes('l').map(([first]) => first.left),
                boxes('r').map(([, last]) => last.right)];
        }""")
        self.assertLess(abs(lefts[0] - lefts[1]), 1)
        self.assertLess(abs(rights[0] - rights[1]), 1)


# The space on both sides of a sign in a formula, in pixels
GAPS = """main => {
    const sign = [...main.querySelectorAll('mo')].find(mo => mo.textContent === '='
        && mo.previousElementSibling?.textContent === 'i' && mo.nextElementSibling);
    const [before, here, after] = [sign.previousElementSibling, sign, sign.nextElementSibling].map(
        node => node.getBoundingClientRect());
    const width = sign.firstChild && (() => {
        const range = document.createRange();
        range.selectNodeContents(sign);
        return range.getBoundingClientRect().width;
    })();
    return [here.width - width, here.left - before.right, after.left - here.right];
}"""


class PageMoves(PageCase):
    """Find and replace, table of contents, sections, dragging, pasted pictures."""

    def mixed(self, *cells):
        """A tab on a notebook of code (text) and Markdown (dictionaries)."""
        nb = notebook(*["" for _ in cells])
        for cell, given in zip(nb["cells"], cells, strict=True):
            if isinstance(given, dict):
                for key in ("outputs", "execution_count"):
                    cell.pop(key, None)
                cell.update(given)
            else:
                cell["source"] = given
        name = f"{self._testMethodName[5:40]}.ipynb"
        (self.root / name).write_bytes(jupyter_bytes(nb))
        return self.reopen(name)

    def find(self, tab, text):
        tab.select(0)
        tab.press("f")
        tab.page.keyboard.type(text)
        return tab.page.locator("#find-count")

    def shown(self, tab):
        return tab.page.eval_on_selector_all(".cell", "all => all.map(c => !c.hidden)")

    def active(self, tab):
        return tab.page.eval_on_selector_all(
            ".cell", "all => all.findIndex(c => c.classList.contains('selected'))")

    def test_find_counts_and_goes_from_hit_to_hit(self):
        tab = self.mixed("apple = 1", markdown("an Apple"), "pear", "apple")
        count = self.find(tab, "apple")
        self.assertShows(count, "3")
        tab.press("Enter", "Enter")
        self.assertShows(count, "2 of 3")
        self.assertEqual(self.active(tab), 1)
        tab.press("Shift+Enter", "Shift+Enter")
        self.assertShows(count, "3 of 3")

    def test_find_ends_at_the_hit_in_the_mode_in_which_it_began(self):
        tab = self.mixed("apple", "pear", "apple")
        for key, mode in (("f", "command"), ("Control+f", "edit")):
            tab.press(key)
            tab.page.keyboard.type("apple")
            tab.press("Enter", "Escape")
            tab.wait_for(mode=mode)
            self.assertNotEqual(self.active(tab), 1)
            tab.cell(1).locator("textarea.editor").focus()

    def test_hits_are_marked_across_colours_and_in_cells_that_come_near(self):
        tab = self.open(*["for x in 'abc': pass"] * 60)
        self.assertShows(self.find(tab, "in 'ab"), "60")
        marked = """() => [...CSS.highlights.get('find')].map(range => {
            const live = new Range();
            live.setStart(range.startContainer, range.startOffset);
            live.setEnd(range.endContainer, range.endOffset);
            return live.startContainer.isConnected && live.toString();
        })"""
        are_all = f"() => (all => all.length === 60 && new Set(all).size === 1)(({marked})())"
        tab.page.wait_for_function(are_all)   # colours may be made anew just now
        self.assertEqual(tab.page.evaluate(marked)[0], "in 'ab")
        tab.page.evaluate("scrollTo(0, document.body.scrollHeight)")
        tab.cell(59).locator("[data-token]").first.wait_for()
        tab.page.wait_for_function(are_all)

    def test_a_text_that_find_has_opened_is_rendered_again_at_its_end(self):
        tab = self.mixed("pear", markdown("an *apple*"))
        self.assertShows(self.find(tab, "apple"), "1")
        marked = tab.page.evaluate("[...CSS.highlights.get('find')].map(range => "
                                   "range.startContainer.parentElement.localName)")
        self.assertEqual(marked, ["pre", "em"])     # the source, and what is shown of it
        tab.press("Enter")
        self.assertFalse(tab.cell(1).locator(".rendered").is_visible())
        tab.press("Escape")
        self.assertTrue(tab.cell(1).locator(".rendered").is_visible())

    def test_find_knows_capitals_expressions_and_outputs(self):
        tab = self.mixed("print('Ap' + 'ple')", "apple Apple")
        tab.run(0)
        count = self.find(tab, "Apple")
        self.assertShows(count, "2")
        tab.page.get_by_label("Aa").check()
        self.assertShows(count, "1")
        tab.page.get_by_label("outputs").check()
        self.assertShows(count, "2")
        tab.page.get_by_label(".*").check()
        tab.page.locator("#find-text").fill("^app|(")
        self.assertShows(count, "No whole pattern")
        tab.page.locator("#find-text").fill("^app")
        self.assertShows(count, "1")

    def test_replace_one_is_undone_in_its_cell(self):
        tab = self.mixed("a1 a2", "a3")
        self.find(tab, r"a(\d)")
        tab.page.get_by_label(".*").check()
        tab.page.get_by_label("Replace with").fill("b$1")
        tab.page.locator("#find-text").press("Enter")
        tab.page.get_by_role("button", name="Replace", exact=True).click()
        self.assertEqual(tab.sources(), ["b1 a2", "a3"])
        tab.cell(0).locator("textarea.editor").focus()
        tab.press("Control+z")
        self.assertEqual(tab.sources(), ["a1 a2", "a3"])

    def test_replace_all_is_one_step_of_the_notebook(self):
        tab = self.mixed("a a", "b", markdown("a"))
        self.find(tab, "a")
        tab.page.get_by_label("Replace with").fill("$&")
        tab.page.get_by_role("button", name="Replace all").click()
        self.assertEqual(tab.sources(), ["$& $&", "b", "$&"])
        tab.select(0)
        tab.press("z")
        self.assertEqual(tab.sources(), ["a a", "b", "a"])

    def test_the_table_of_contents_tells_what_runs_and_what_failed(self):
        tab = self.mixed(markdown("# One"), "1/0", markdown("## Two"), "2")
        tab.command("contents")
        entries = tab.page.locator("#contents a")
        self.assertCount(entries, 2)
        self.assertEqual(entries.all_text_contents(), ["One", "Two"])
        tab.run(1)
        tab.page.locator("#contents a[data-state=error]").wait_for()
        self.assertShows(tab.page.locator("#contents [aria-current]"), "Two")
        tab.select(1)
        self.assertShows(tab.page.locator("#contents [aria-current]"), "One")
        entries.nth(1).click()
        self.assertEqual(self.active(tab), 2)

    def test_sections_close_and_open_and_stay_so_in_the_file(self):
        tab = self.mixed(markdown("# One"), "1", markdown("## Inner"), "2", markdown("# Two"))
        tab.cell(0).click()
        tab.press("ArrowLeft")
        self.assertEqual(self.shown(tab), [True, False, False, False, True])
        self.assertIn("3 cells", tab.cell(0).locator(".rendered").evaluate(
            "heading => getComputedStyle(heading, '::after').content"))
        tab.press("ArrowDown")
        self.assertEqual(self.active(tab), 4)
        tab.save()
        tab = self.reopen(f"{self._testMethodName[5:40]}.ipynb")
        tab.page.locator("[data-section=closed]").wait_for()
        tab.cell(0).click()
        tab.press("ArrowRight")
        self.assertEqual(self.shown(tab), [True] * 5)
        tab.select(3)
        tab.press("ArrowLeft")
        self.assertEqual(self.active(tab), 2)

    def test_a_cell_is_dragged_to_its_place_and_back_by_undo(self):
        tab = self.mixed("a", "b", "c")
        tab.cell(2).locator(".gutter").drag_to(tab.cell(0), target_position={"x": 300, "y": 2})
        self.assertEqual(tab.sources(), ["c", "a", "b"])
        tab.press("z")
        self.assertEqual(tab.sources(), ["a", "b", "c"])

    def test_a_pasted_picture_becomes_an_attachment(self):
        tab = self.mixed(markdown("see: "))
        tab.cell(0).dblclick()
        tab.press("Control+End")
        tab.page.evaluate("""png => {
            const clipboardData = new DataTransfer();
            const bytes = Uint8Array.from(atob(png), character => character.charCodeAt(0));
            clipboardData.items.add(new File([bytes], 'a b.png', { type: 'image/png' }));
            document.activeElement.dispatchEvent(new ClipboardEvent('paste',
                { clipboardData, bubbles: true, cancelable: true }));
        }""", base64.b64encode(one_red_pixel()).decode())
        tab.page.wait_for_function("() => document.querySelector('.editor').value.length > 9")
        self.assertEqual(tab.sources(), ["see: ![a b](attachment:a%20b.png)"])
        tab.press("Control+Enter")
        width = tab.cell(0).locator("img").evaluate("i => i.decode().then(() => i.naturalWidth)")
        self.assertEqual(width, 1)
        tab.save()
        self.assertEqual(list(self.saved()["cells"][0]["attachments"]), ["a b.png"])


class PageFilesMoved(PageCase):
    def test_a_move_that_is_dismissed_moves_nothing(self):
        (self.root / "inner").mkdir()
        (self.root / "inner" / "stays.txt").write_text("x")
        tab = self.visit("/tree/inner")
        tab.page.get_by_label("Select stays.txt").check()
        tab.page.locator("[data-command=move]").click()
        tab.choose("Cancel")
        tab.page.locator("[data-command=move]").click()
        tab.page.locator("dialog input").fill("")
        tab.choose("Move")
        self.assertCount(tab.page.get_by_text("stays.txt"), 0)
        self.assertTrue((self.root / "stays.txt").exists())


@needs("nbclient", "nbformat", "ipykernel")
class PageNotebooks(PageCase):
    """Whole notebooks by other people: run, saved, valid, and the same when they come back."""

    def tearDown(self):
        """Pictures that these notebooks take from elsewhere are their own affair, and so are
        programs in them that look for the classic Notebook's objects."""
        self.problems = [text for text in self.problems if not text.startswith("asks http")
                         and "ERR_NAME_NOT_RESOLVED" not in text
                         and text != "IPython is not defined"]
        super().tearDown()

    def check(self, name):
        import nbformat
        (self.root / name).write_bytes(jupyter_bytes(prepared(name, self.root)))
        tab = self.reopen(name)
        self.run_all(tab)
        tab.save()
        shown = tab.texts()
        tab.page.close()
        saved = self.saved(name)
        nbformat.validate(nbformat.from_dict(saved))
        self.assertEqual(outcome(saved), outcome_on_ipykernel(name))
        again = self.reopen(name)
        self.assertEqual(again.texts(), shown)

    def run_all(self, tab):
        """Run every cell, one after another, so that an error stops none of the others."""
        tab.press("Home")
        for _ in range(tab.page.locator(".cell").count()):
            tab.press("Control+Enter")
            tab.wait_until_done(60)
            tab.press("Escape", "ArrowDown")

    @needs_notebooks
    def test_cheryl(self):
        self.check("pytudes-Cheryl.ipynb")

    @needs_notebooks
    def test_life(self):
        self.check("pytudes-Life.ipynb")

    @needs_notebooks
    def test_lispy(self):
        self.check("pytudes-lispy.ipynb")

    @needs_notebooks
    @needs("matplotlib")
    def test_the_first_ten_minutes_of_a_new_user(self):
        (self.root / "ten.ipynb").write_bytes((NOTEBOOKS / "pytudes-Cheryl.ipynb").read_bytes())
        tab = self.reopen("ten.ipynb")
        tab.command("run-all")
        self.assertShows(tab.outputs(18), "July 16")
        self.edit_markdown(tab)
        last = len(tab.sources()) - 1
        tab.run(last, "import matplotlib.pyplot as plt\nplt.plot([1, 2]);")
        self.assertCount(tab.outputs(last).locator("img"), 1)
        self.loop_and_restart(tab, last + 1)
        tab.save()
        tab.page.close()
        again = self.reopen("ten.ipynb")
        self.assertShows(again.cell(0).locator("h1"), "My title")
        self.assertCount(again.outputs(last).locator("img"), 1)
        self.assertShows(again.outputs(last + 1), "NameError")

    def edit_markdown(self, tab):
        tab.cell(0).locator(".rendered").dblclick()
        tab.run(0, "# My title")
        self.assertShows(tab.cell(0).locator("h1"), "My title")

    def loop_and_restart(self, tab, i):
        """Interrupt an endless loop in cell i, restart, and see that the names are gone."""
        tab.write(i, "print('ready')\nwhile True: pass")
        tab.cell(i).locator("textarea.editor").focus()
        tab.press("Control+Enter")
        self.assertShows(tab.outputs(i), "ready")
        tab.page.locator("#toolbar [data-command=interrupt]").click()
        self.assertShows(tab.outputs(i), "KeyboardInterrupt")
        tab.command("restart")
        tab.choose("Restart")
        tab.wait_for(kernel="idle")
        tab.run(i, "plt")
        self.assertShows(tab.outputs(i), "NameError")

    @needs_notebooks
    def test_run_all_runs_from_the_first_to_the_last_cell(self):
        (self.root / "all.ipynb").write_bytes((NOTEBOOKS / "pytudes-Cheryl.ipynb").read_bytes())
        tab = self.reopen("all.ipynb")
        tab.command("run-all")
        tab.wait_until_done(60)
        tab.save()
        self.assertEqual(outcome(self.saved("all.ipynb")),
                         outcome_on_ipykernel("pytudes-Cheryl.ipynb"))

    @needs_notebooks
    def test_every_sample_is_shown_or_refused_in_clear_words(self):
        page = self.context.new_page()
        for path in sorted(NOTEBOOKS.glob("*.ipynb")):
            with self.subTest(path.name):
                (self.root / path.name).write_bytes(path.read_bytes())
                reply = self.server.get("/api/contents/" + quote(path.name))
                page.goto(self.address("/notebooks/" + quote(path.name)))
                if reply.status == 200:
                    self.assertCount(page.locator(".cell"), len(reply.json["content"]["cells"]))
                else:
                    self.assertShows(page.locator("[role=alert]"), reply.json["message"])


class PageComesBack(PageCase):
    """Outputs made while no page was there, and by others: the server's journal tells of them."""

    COUNT = ("import os, time\nfor i in range(12):\n    print(i)\n"
             "    while not os.path.exists(f'go{min(i, 1)}'): time.sleep(0.01)\n'end'")

    def leave_and_return(self, tab):
        tab.page.close(run_before_unload=False)
        return self.visit("/notebooks/" + quote(self.name))

    def test_a_reload_amid_a_run_loses_no_output_and_shows_what_waits(self):
        tab = self.open(self.COUNT, "'next'")
        tab.command("run-all")
        self.assertShows(tab.outputs(0), "0")
        tab = self.leave_and_return(tab)
        self.assertShows(tab.outputs(0), "0")
        for i, state in enumerate(("running", "queued")):
            self.assertCount(tab.page.locator(f".cell >> nth={i}").and_(
                tab.page.locator(f"[data-state={state}]")), 1)
        for name in ("go0", "go1"):
            (self.root / name).touch()
            self.addCleanup((self.root / name).unlink)
        tab.wait_until_done()
        self.assertEqual(tab.texts(), ["\n".join(map(str, range(12))) + "'end'", "'next'"])
        tab.save()
        self.assertEqual([len(cell["outputs"]) for cell in self.saved()["cells"]], [2, 1])

    def test_the_tab_of_a_page_that_comes_back_counts_what_still_runs(self):
        tab = self.open("input()", "", "'next'")
        tab.command("run-all")
        tab.page.wait_for_selector("form.stdin input")
        tab = self.leave_and_return(tab)
        tab.page.wait_for_selector(".cell[data-state=queued]")
        tab.page.wait_for_function("() => document.title.startsWith('(0/2)')")

    def test_a_run_seen_later_tells_the_kernels_time_also_when_its_reply_comes_last(self):
        tab = self.open("1")
        tab.page.evaluate("""() => {
            const execution = new Execution(view, view.cells[0], 'id', { isAdopted: true });
            const status = (execution_state, second) => execution.status({ execution_state },
              { header: { date: `2020-01-01T00:00:0${second}Z` } });
            status('busy', 1);
            status('idle', 6);
            execution.execute_reply({ status: 'ok', execution_count: 1 });
        }""")
        self.assertShows(tab.cell(0).locator(".timer"), "5.0 s")

    def test_what_ended_while_no_tab_was_open_is_there_and_only_once(self):
        tab = self.open("import time; time.sleep(0.3); print('was', 'there')\n1 / 0", "print('no')")
        tab.command("run-all")
        tab.page.wait_for_selector(".cell[data-state=running]")
        tab.page.close(run_before_unload=False)
        (session,) = self.server.get("/api/sessions").json
        wait_until(lambda: self.server.get("/api/kernels/" + session["kernel"]["id"]).json[
            "execution_state"] == "idle")
        for _ in range(2):   # before and after it was saved
            tab = self.visit("/notebooks/" + quote(self.name))
            self.assertShows(tab.outputs(0), "ZeroDivisionError")
            self.assertEqual(tab.outputs(0).inner_text().count("was there"), 1)
            self.assertEqual(tab.texts()[1], "")
            tab.save()
            tab.page.close(run_before_unload=False)

    def test_a_question_waits_for_a_page_that_comes_back(self):
        tab = self.open("name = input('Name? ')\nprint('Hello', name)")
        tab.command("run-all")
        tab.page.wait_for_selector("form.stdin input")
        tab = self.leave_and_return(tab)
        tab.page.locator("form.stdin input").fill("Ada")
        tab.page.locator("form.stdin input").press("Enter")
        self.assertShows(tab.outputs(0), "Hello Ada")
        self.assertEqual(tab.texts(), ["Name? Ada\nHello Ada"])

    def open_breakable(self, *sources):
        """A tab whose page can lose its connection: sockets.at(-1).close()."""
        self.use_own_profile()
        self.context.add_init_script("""
            window.sockets = [];
            window.WebSocket = class extends WebSocket {
              constructor(...all) { super(...all); sockets.push(this); }
            };""")
        return self.open(*sources)

    def test_what_waited_for_a_kernel_that_is_gone_is_told_as_not_run(self):
        tab = self.open_breakable("1", "2")
        self.context.set_offline(True)
        tab.page.evaluate("sockets.at(-1).close()")
        tab.command("run-all")
        self.assertEqual(tab.states(), ["queued", "queued"])
        (session,) = self.server.get("/api/sessions").json
        self.server.delete("/api/sessions/" + session["id"])
        self.context.set_offline(False)
        self.assertShows(tab.page.locator("#notices"), "It has not run 2 cells that waited.")
        self.assertEqual(tab.states(), ["idle", "idle"])
        self.problems.clear()      # what the browser says of requests that failed

    def test_a_lost_connection_mends_itself_and_nothing_is_missing_or_twice(self):
        tab = self.open_breakable(
            "import time\nfor i in range(100): print(i); time.sleep(0.02)", "'next'")
        tab.command("run-all")
        self.assertShows(tab.outputs(0), "5")
        tab.page.evaluate("sockets.at(-1).close()")
        tab.page.wait_for_selector("body[data-kernel=disconnected]")
        tab.wait_until_done()
        self.assertEqual(tab.texts(), ["\n".join(map(str, range(100))), "'next'"])

    def test_what_a_task_prints_after_the_save_is_appended(self):
        tab = self.open("import asyncio; go = asyncio.Event()\nprint('early')\n"
                        "async def late(): await go.wait(); print('late')\n"
                        "task = asyncio.create_task(late())", "go.set()")
        tab.run(0)
        tab.save()
        tab.page.close()
        (session,) = self.server.get("/api/sessions").json
        frontend = self.server.frontend(session["kernel"]["id"])
        self.addCleanup(frontend.wire.close)
        frontend.finish(frontend.start("go.set()"))
        tab = self.visit("/notebooks/" + quote(self.name))
        self.assertShows(tab.outputs(0), "late")
        self.assertEqual(tab.texts()[0], "early\nlate")
        self.assertEqual((tab.cell(0).get_attribute("data-state"),
                          tab.cell(0).locator(".prompt").inner_text().strip()), ("idle", "[1]"))

    LATE = ["import asyncio; go = asyncio.Semaphore(0)\n"
            "async def late():\n    for n in range(3):\n        await go.acquire()\n"
            "        print('late', n)\ntask = asyncio.create_task(late())\nprint('early')",
            "go.release()"]

    def release(self):
        """Let the task print one line more, while no page is there."""
        (session,) = self.server.get("/api/sessions").json
        frontend = self.server.frontend(session["kernel"]["id"])
        self.addCleanup(frontend.wire.close)
        frontend.finish(frontend.start("go.release()"))

    def test_what_a_task_prints_after_the_save_is_saved_too_and_there_only_once(self):
        tab = self.open(*self.LATE)
        tab.run(0)
        tab.save()
        tab.run(1)
        self.assertShows(tab.outputs(0), "late 0")
        tab.save()
        tab = self.leave_and_return(tab)
        self.release()
        self.assertShows(tab.outputs(0), "late 1")
        self.assertEqual(tab.texts()[0], "early\nlate 0\nlate 1")

    def test_what_a_task_printed_before_a_crash_is_there_only_once(self):
        tab = self.open(*self.LATE)
        tab.run(0)
        tab.save()
        self.context.route("**/api/contents/**", lambda route: route.abort()
                           if route.request.method == "PUT" else route.continue_())
        for n in (0, 1):   # the second time, the draft has what an older draft had
            if n == 0:
                tab.select(1)
                tab.press("Control+Enter")
            else:
                self.release()
            self.assertShows(tab.outputs(0), f"late {n}")
            wait_until(lambda text=f"late {n}", page=tab.page: text in page.evaluate(
                "async () => JSON.stringify(await drafts('get', view.file.key)) ?? ''"))
            tab = self.leave_and_return(tab)
        self.release()
        self.assertShows(tab.outputs(0), "late 2")
        self.assertEqual(tab.texts()[0], "early\nlate 0\nlate 1\nlate 2")
        self.context.unroute_all()
        self.problems.clear()      # the browser notes the saves that failed
        tab.wait_for(saved="true")
        tab = self.leave_and_return(tab)
        self.assertShows(tab.outputs(0), "late 2")
        tab.wait_for(kernel="idle")
        self.assertEqual(tab.texts()[0], "early\nlate 0\nlate 1\nlate 2")

    def test_a_reload_leads_back_to_the_cell_where_one_was(self):
        tab = self.open(*map(str, range(60)))
        tab.select(50)
        tab.page.reload()
        tab.page.wait_for_selector(".cell.selected >> nth=0")
        self.assertEqual(tab.page.evaluate("view.cells.indexOf(view.active)"), 50)
        self.assertTrue(tab.page.evaluate("isInSight(view.active.node)"))

    def test_two_tabs_see_each_others_cells(self):
        one = self.open("print('from one')", "print(input('Who? '))")
        two = self.visit("/notebooks/" + quote(self.name))
        two.wait_for(kernel="idle")
        one.run(0)
        self.assertShows(two.outputs(0), "from one")
        one.cell(1).locator("textarea.editor").focus()
        one.press("Control+Enter")
        two.page.locator("form.stdin input").fill("two")
        two.page.locator("form.stdin input").press("Enter")
        for tab in (one, two):
            self.assertShows(tab.outputs(1), "Who? two\ntwo\n")
            self.assertCount(tab.page.locator("form.stdin"), 0)

    def test_a_cell_of_a_file_without_ids_is_found_by_its_text(self):
        nb = notebook("1 + 1", "'slow'; import time; time.sleep(0.5); 42")
        nb["nbformat_minor"] = 4
        for cell in nb["cells"]:
            del cell["id"]
        (self.root / self.name).write_bytes(jupyter_bytes(nb))
        tab = self.reopen(self.name)
        tab.command("run-all")
        tab.page.wait_for_selector(".cell[data-state=running]")
        tab = self.leave_and_return(tab)
        self.assertShows(tab.outputs(1), "42")
        self.assertEqual(tab.texts(), ["2", "42"])


# Markdown beyond CommonMark, and its HTML
GFM = [
    ("a | b\n-|-:\n1 | 2", '<table><thead><tr><th align="">a</th><th align="right">b</th></tr>'
     '</thead><tbody><tr><td align="">1</td><td align="right">2</td></tr></tbody></table>'),
    ("|a|\n|-|\n|`x\\|y`|\n|p|q|", '<table><thead><tr><th align="">a</th></tr></thead><tbody><tr>'
     '<td align=""><code>x|y</code></td></tr><tr><td align="">p</td></tr></tbody></table>'),
    ("text\n\na | b\nno table", "<p>text</p><p>a | b\nno table</p>"),
    ("- [ ] to do\n- [x] **done**", '<ul><li><input type="checkbox" disabled aria-label="Task"> to '
     'do</li><li><input type="checkbox" disabled aria-label="Task" checked> <strong>done</strong>'
     "</li></ul>"),
    ("~~gone~~ ~too~ ~~~not~~~ a~b", "<p><del>gone</del> <del>too</del> ~~~not~~~ a~b</p>"),
    ("see www.a.org/x_(y), (https://b.org).", '<p>see <a href="http://www.a.org/x_(y)">'
     'www.a.org/x_(y)</a>, (<a href="https://b.org">https://b.org</a>).</p>'),
    ("[https://a.org](https://b.org)", '<p><a href="https://b.org">https://a.org</a></p>'),
    ("`https://a.org` xhttps://a.org", "<p><code>https://a.org</code> xhttps://a.org</p>"),
]
# What Markdown and HTML show, without the blank space between blocks
MARKDOWN_AND_HTML = r"""([text, html]) => {
    const said = shown => {
        const holder = document.createElement('div');
        holder.append(shown);
        const block = /\s*(<\/?(?:p|h\d|[uo]l|li|blockquote|pre|hr|t\w+)\b[^>]*>)\s*/g;
        return holder.innerHTML.replace(block, '$1').trim();
    };
    return [said(renderMarkdown(text)), said(dress(sanitize(html)))];
}"""


class PageUnderTheHood(PageCase):
    """The panel that shows what passes between browser, server and kernel."""

    def look(self, *sources):
        """A tab on a notebook, with the panel open."""
        tab = self.open(*sources)
        tab.page.evaluate("document.activeElement.blur()")
        tab.press("u")
        tab.page.wait_for_function("() => hood.socket.readyState === WebSocket.OPEN")
        return tab

    def run_cell(self, tab, i):
        """Run a cell and wait until all of it is drawn below."""
        tab.select(i)
        tab.press("Control+Enter")
        tab.wait_until_done()
        tab.page.wait_for_function("""id => hood.arrows.some(({ family, kind, detail }) =>
            hood.families.get(family)?.cellId === id && kind === 'websocket' && detail === 'idle')
            """, arg=tab.cell(i).get_attribute("data-id"))

    def rows(self, tab, text=""):
        return (tab.page if isinstance(tab, Tab) else tab).locator(
            "#ladder-rows [role=row]:visible", has_text=text)

    def labels(self, tab):
        """[from, to, message] of each visible arrow."""
        return [row.locator("[role=gridcell]").all_text_contents()[1:4]
                for row in self.rows(tab).all()]

    def choose(self, tab, text, depth="Fields", nth=0):
        """Choose an arrow, and how it is shown; gives what is shown."""
        self.rows(tab, text).nth(nth).click()
        detail = (tab.page if isinstance(tab, Tab) else tab).locator("#hood-detail")
        detail.get_by_role("tab", name=depth).click()
        return detail

    def test_running_a_cell_draws_each_of_its_messages_on_its_way(self):
        tab = self.look("1 + 1")
        self.run_cell(tab, 0)
        labels = self.labels(tab)
        for row in (["Browser", "Server", "execute_request 1 + 1"],
                    ["Server", "shell", "execute_request 1 + 1"],
                    ["iopub", "Server", "status busy"], ["iopub", "Server", "execute_input [1]"],
                    ["iopub", "Server", "execute_result 2"],
                    ["shell", "Server", "execute_reply ok"],
                    ["Server", "Browser", "execute_result 2"],
                    ["Server", "Browser", "status idle"]):
            self.assertIn(row, labels)
        times = tab.page.eval_on_selector_all(
            "#ladder-rows [style*='--hue'] .time", "all => all.map(node => node.textContent)")
        self.assertEqual(len(times), len(labels))
        for text in times:     # since the key press
            self.assertRegex(text, r"^\+\d+\.\d ms$")

    def test_cells_have_colours_and_a_bar_from_busy_to_idle(self):
        tab = self.look("1", "2")
        for i in (0, 1):
            self.run_cell(tab, i)
        hues = tab.page.evaluate("""() => view.cells.map(({ node }) =>
            node.style.getPropertyValue('--hue'))""")
        self.assertEqual(len(set(hues)), 2)
        arrows = tab.page.evaluate("""() => hood.arrows
            .filter(({ kind, bar }) => kind === 'zmq' && bar)
            .map(({ detail, bar }) => [detail, String(bar)])""")
        for hue, count in zip(hues, "12", strict=True):
            mine = [detail for detail, bar in arrows if bar == hue]
            self.assertEqual((mine[0], mine[-1]), ("busy", "idle"))
            self.assertIn(f"[{count}]", mine)

    def test_a_cell_and_its_arrows_show_each_other(self):
        tab = self.look("1", "2")
        for i in (0, 1):
            self.run_cell(tab, i)
        tab.cell(0).hover()
        dim = self.rows(tab).and_(tab.page.locator(".dim"))
        self.assertEqual({row.inner_text() for row in dim.all() if "request" in row.inner_text()},
                         {row.inner_text() for row in self.rows(tab, "execute_request 2").all()})
        self.rows(tab, "execute_request 2").first.hover()
        self.assertIn("lit", tab.cell(1).get_attribute("class"))
        self.assertNotIn("lit", tab.cell(0).get_attribute("class"))
        tab.cell(0).hover()
        self.assertNotIn("lit", tab.cell(1).get_attribute("class"))

    def test_an_arrow_is_told_in_words_fields_json_bytes_and_source(self):
        tab = self.look("6 * 7")
        self.run_cell(tab, 0)
        detail = self.choose(tab, "execute_request", nth=1)
        self.assertShows(detail, "The page asks the kernel to run “6 * 7”. The server sends it on")
        self.assertShows(detail, "execute_request")
        json_ = self.choose(tab, "execute_request", "JSON", 1).locator("pre").last
        self.assertEqual(json.loads(json_.inner_text())["code"], "6 * 7")
        names = self.choose(tab, "execute_request", "Bytes", 1).locator("h2").all_inner_texts()
        self.assertEqual([name.split(":")[0].split()[0] for name in names], [
            "delimiter", "signature", "header", "parent_header", "metadata", "content"])
        self.assertShows(detail.locator("pre").first, "3c 49 44 53 7c 4d 53 47 3e")
        source = self.choose(tab, "execute_request", "Source", 1)
        self.assertShows(source.locator("mark"), "send_multipart(")
        source.get_by_role("button", name="kernel.py").click()
        self.assertShows(source.locator("mark"), "def execute_request(kernel")

    def test_the_source_of_an_output_is_where_kernel_and_page_handle_it(self):
        tab = self.look("print('x')")
        self.run_cell(tab, 0)
        for nth, file, words in ((0, "kernel.py", '"stream"'), (1, "index.html", "stream({")):
            self.assertShows(self.choose(tab, "stream", "Source", nth), file)
            tab.page.locator("#hood-detail .places").get_by_role("button", name=file).click()
            self.assertShows(tab.page.locator("#hood-detail mark"), words)

    def test_the_source_of_a_status_is_the_one_that_says_it(self):
        tab = self.look("1")
        self.run_cell(tab, 0)
        detail = self.choose(tab, "busy", "Source")
        self.assertShows(detail.locator("mark"), "def status(self, state, request)")
        tab.page.evaluate("view.implementation = 'another'")     # as of a kernel in R
        detail = self.choose(tab, "execute_input", "Source")
        detail.get_by_role("button", name="minijupyter.py").first.wait_for()
        self.assertCount(detail.get_by_role("button", name="kernel.py"), 0)

    def test_a_restart_is_seen_with_what_it_asks_on_control(self):
        tab = self.look("1")
        tab.command("restart")
        tab.choose("Restart")
        self.rows(tab, "/restart 200").wait_for()     # an exchange is told when it is over
        labels = self.labels(tab)
        for row in (["Server", "control", "shutdown_request "],
                    ["control", "Server", "shutdown_reply ok"]):
            self.assertIn(row, labels)

    def test_a_page_that_is_loaded_anew_looks_on_and_sees_its_own_start(self):
        tab = self.look("1")
        tab.page.reload()
        tab.wait_for(kernel="idle")
        self.assertShows(self.choose(tab, "POST /api/sessions"), "asks for its notebook’s kernel")
        self.assertShows(self.choose(tab, "/channels?"), "make this connection a WebSocket")
        tab.press("Escape", "u")
        tab.page.reload()
        tab.wait_for(kernel="idle")
        self.assertFalse(tab.page.locator("#hood").is_visible())

    def test_what_another_page_says_is_others_traffic(self):
        tab = self.look("1")
        other = self.reopen(self.name)
        self.run_cell(tab, 0)
        idle = self.rows(tab, "status idle").and_(
            tab.page.locator("[style*='--hue']:has(.left.websocket)"))     # of the cell
        self.assertCount(idle, 1)
        tab.page.get_by_label("others' traffic").check()
        self.assertCount(idle, 2)
        other.page.close()

    def test_the_frame_of_the_rfcs_example_is_taken_apart(self):
        """RFC 6455 5.7, RFC 7692 7.2.3.1: Hello, masked, and compressed."""
        tab = self.look("")
        read = """async bytes => {
            const event = { way: 'in', parts: [new Uint8Array(bytes)], sizes: [bytes.length] };
            return (await WIRES.websocket(event)).ranges.map(([name, part]) => [name, utf8(part)]);
        }"""
        parts = tab.page.evaluate(read, [*frame(TEXT, b"Hello")])
        self.assertEqual([name.split(",")[0].split(":")[0] for name, _ in parts], [
            "FIN 1", "mask 1", "mask", "payload", "payload without the mask"])
        self.assertEqual(parts[-1][1], "Hello")
        parts = tab.page.evaluate(read, list(bytes.fromhex("c107f248cdc9c90700")))
        self.assertEqual(parts[-1], ["payload, decompressed", "Hello"])

    def test_messages_of_both_binary_layouts_are_read(self):
        session = kernel.Session("")
        message = session.message("comm_msg", {"data": {}}, buffers=[b"123"])
        entry = minijupyter.Entry("shell", session.pack(message)[2:6], [b"123"])
        tab = self.look("")
        for splice in (minijupyter.splice, minijupyter.splice_v1):
            with self.subTest(splice.__name__):
                _, payload = splice(entry)
                found = tab.page.evaluate("""bytes => {
                    const { message } = readPayload(2, new Uint8Array(bytes));
                    return [message.header.msg_id, message.channel];
                }""", [*payload])
                self.assertEqual(found, [message["header"]["msg_id"], "shell"])

    def test_the_signature_is_computed_and_a_flipped_byte_breaks_it(self):
        tab = self.look("1")
        self.run_cell(tab, 0)
        detail = self.choose(tab, "execute_request", "Bytes", 1)
        seal = detail.locator(".seal")
        self.assertShows(seal, "✓ The signature fits")
        seal.get_by_role("button", name="Flip a byte").click()
        self.assertShows(seal, "✗ The signature does not fit")
        seal.get_by_role("button", name="Send it to the kernel").click()
        self.assertShows(self.rows(tab, "dropped a message").first, "signature does not fit")
        seal.get_by_role("button", name="As it was").click()
        self.assertShows(seal, "✓ The signature fits")
        detail.locator("pre").last.click(position={"x": 70, "y": 14})     # a byte of the content
        self.assertShows(seal, "of content was changed. ✗")

    def start(self, pace, source):
        """A tab whose only cell was started while messages go at this pace."""
        tab = self.look(source)
        tab.page.get_by_label(pace, exact=True).check()
        tab.select(0)
        tab.press("Control+Enter")
        return tab

    def test_messages_are_held_and_let_pass_one_by_one(self):
        tab = self.start("hold", "1 + 1")
        self.assertShows(tab.page.locator("#hood-news"), "holds 1 on shell (execute_request).")
        self.assertEqual(tab.states(), ["queued"])
        step = tab.page.get_by_role("button", name="Step")
        step.click()
        self.assertShows(tab.page.locator("#hood-news"), "4 on iopub")
        tab.page.get_by_label("Which channels").select_option("iopub")     # the reply may pass
        for left in (3, 2, 1):
            step.click()
            self.assertShows(tab.page.locator("#hood-news"), f"{left} on iopub")
        step.click()
        tab.wait_until_done()
        self.assertEqual(tab.texts(), ["2"])

    def test_slow_motion_is_slow_and_closing_the_panel_ends_it(self):
        tab = self.start("slow", "print(1)")
        self.assertShows(tab.page.locator("#hood-news"), "on iopub")
        tab.page.get_by_role("button", name="Close Under the hood").click()
        tab.wait_until_done()
        self.assertEqual(tab.texts(), ["1"])

    def test_what_is_to_run_after_a_restart_runs_though_the_news_of_it_come_late(self):
        tab = self.look("6 * 7")
        tab.page.get_by_role("button", name="Delay iopub").click()
        tab.command("restart-run-all")
        tab.choose("Restart")
        self.assertShows(tab.outputs(0), "42")

    def test_faults_are_told_and_mended(self):
        tab = self.look("1")
        tab.page.get_by_role("button", name="Cut the connection").click()
        self.assertShows(tab.page.locator("#notices"), "The connection to the kernel is back.")
        tab.page.get_by_role("button", name="Kill the kernel").click()
        self.assertShows(tab.page.locator("#notices"), "The kernel died and was started again")
        self.assertShows(self.rows(tab, "ended with").first, "exit code -9")
        tab.wait_for(kernel="idle")
        tab.page.get_by_role("button", name="Delay iopub").click()
        self.run_cell(tab, 0)
        reply, idle = (tab.page.evaluate("""detail => hood.arrows.findLast(arrow =>
            arrow.kind === 'websocket' && arrow.detail === detail).at""", detail)
            for detail in ("ok", "idle"))
        self.assertGreater(idle - reply, 1)

    def test_a_secret_that_is_hidden_is_not_sent_nor_called_a_forgery(self):
        tab = self.look("1")
        key = json.loads(self.server.connection_files()[0].read_text())["key"]
        tab.run(0, f"'{key}'")
        detail = self.choose(tab, "execute_request", nth=1)
        self.assertShows(detail, "A secret in it is hidden: the signature is not checked.")
        self.assertCount(detail.get_by_role("button", name="Send"), 0)

    def test_a_trace_is_saved_and_looked_at_later(self):
        tab = self.look("'kept'")
        self.run_cell(tab, 0)
        before = self.labels(tab)
        with tab.page.expect_download() as download:
            tab.page.get_by_role("button", name="Save trace").click()
        path = download.value.path()
        self.assertNotIn(self.server.token, path.read_text())
        tab.page.get_by_role("button", name="Clear").click()
        self.assertCount(self.rows(tab), 0)
        tab.page.locator("[name=file]").set_input_files(path)
        self.assertShows(tab.page.locator("#hood-news"), "Clear leads back")
        self.rows(tab, "idle").first.wait_for()
        self.assertEqual(self.labels(tab), before)
        detail = self.choose(tab, "execute_request", nth=1)
        self.assertShows(detail, "The key is not known here")

    def test_what_is_no_trace_is_refused_and_what_is_odd_is_shown(self):
        tab = self.look("")
        for text in ("", "{}", "[1]", '{"minijupyter_trace": 1, "events": 1}',
                     '{"minijupyter_trace": 1, "events": [{"kind": "x"}]}',
                     '{"minijupyter_trace": 1, "events": [null]}', "null"):
            with self.subTest(text):
                tab.page.locator("[name=file]").set_input_files(
                    {"name": "odd.json", "mimeType": "", "buffer": text.encode()})
                self.assertShows(tab.page.locator("#notices"), "odd.json is no trace")
        odd = {"way": "in", "at": 0, "lines": [1], "parts": ["aGk="], "sizes": [2],
               "channel": "shell"}
        events = [{"kind": kind, **odd} for kind in ("http", "websocket", "zmq", "process")]
        for header in ('{"msg_type": "constructor"}', '{"msg_type": "("}', "7", "[", "null"):
            parts = [b"<IDS|MSG>", b"", header.encode(), b"null", b"[]", b"0"]
            events.append({"kind": "zmq", **odd, "size": 1, "sizes": [*map(len, parts)],
                           "parts": [base64.b64encode(part).decode() for part in parts]})
        tab.page.locator("[name=file]").set_input_files({
            "name": "odd.json", "mimeType": "",
            "buffer": json.dumps({"minijupyter_trace": 1, "events": events}).encode()})
        self.assertCount(self.rows(tab), len(events))
        tab.page.evaluate("ui.notices.replaceChildren()")
        for row in self.rows(tab).all():
            row.click()
            for depth in ("JSON", "Bytes", "Source", "Fields"):
                tab.page.locator("#hood-detail").get_by_role("tab", name=depth).click()
            self.assertShows(tab.page.locator("#hood-detail"), "bytes")

    def test_the_ladder_is_filtered_and_hides_what_comes_all_the_time(self):
        tab = self.look("1")
        self.run_cell(tab, 0)
        self.assertCount(self.rows(tab, "ping"), 0)
        tab.page.get_by_label("heartbeats, polling").check()
        self.rows(tab, "ping").first.wait_for()     # at most one heartbeat later
        tab.page.get_by_label("Filter").fill("ZMQ busy")
        self.assertEqual(self.labels(tab), [["iopub", "Server", "status busy"]])
        tab.page.get_by_label("Filter").fill("")
        tab.page.get_by_label("table", exact=True).check()
        self.assertTrue(self.rows(tab).first.locator(".who").first.is_visible())

    def test_it_is_walked_by_keyboard_and_keys_of_the_notebook_do_nothing_there(self):
        tab = self.look("1", "2")
        self.run_cell(tab, 0)
        tab.page.locator("#ladder").focus()
        tab.press("ArrowDown", "ArrowDown")
        chosen = tab.page.locator("#ladder-rows [aria-selected=true]")
        self.assertShows(chosen, "execute_request")
        self.assertShows(tab.page.locator("#hood-detail"), "The server sends it on")
        tab.press("x", "b", "End")
        self.assertNotIn("execute_request", chosen.inner_text())
        self.assertEqual(len(tab.sources()), 2)
        depths = tab.page.locator("#hood-detail").get_by_role("tab")
        depths.first.focus()
        for depth in ("JSON", "Bytes"):
            tab.press("ArrowRight")
            self.assertEqual(tab.page.evaluate("document.activeElement.textContent"), depth)
        tab.press("Escape", "j", "u")
        self.assertFalse(tab.page.locator("#hood").is_visible())

    def test_the_panel_moves_into_a_window_and_back(self):
        tab = self.look("1", "2")
        with tab.page.expect_popup() as popup:
            tab.page.get_by_role("button", name="Own window").click()
        other = popup.value
        self.run_cell(tab, 0)
        source = self.choose(other, "execute_request", "Source", 1)
        self.assertShows(source.locator("mark"), "send_multipart")
        self.rows(other, "execute_request").first.hover()
        self.assertIn("lit", tab.cell(0).get_attribute("class"))
        other.close()
        tab.page.locator("#hood").wait_for()
        self.run_cell(tab, 1)
        self.rows(tab, "execute_request 2").first.wait_for()

    def test_of_a_flood_the_last_five_thousand_arrows_stay(self):
        tab = self.look("for i in range(2600): display(i, display_id='x', update=i > 0)")
        self.run_cell(tab, 0)
        self.assertEqual(tab.page.evaluate(
            "[hood.arrows.length, ui['ladder-rows'].childElementCount]"), [5000, 5000])

    def test_who_does_not_look_any_more_is_told_nothing(self):
        tab = self.look("1")
        self.run_cell(tab, 0)
        tab.press("Escape", "u")
        count = tab.page.evaluate("hood.arrows.length")
        tab.run(0)
        self.assertEqual(tab.page.evaluate("hood.arrows.length"), count)
        self.assertEqual(tab.page.evaluate("hood.socket.readyState"), 3)


class PageRendersMarkdown(PageCase):
    def page(self):
        return self.visit("/tree").page

    def test_commonmark_is_rendered_as_its_specification_says(self):
        """At least 95 % of its examples; both sides pass the sanitiser, which is our choice."""
        page = self.page()
        examples = commonmark_examples()
        wrong = [example["example"] for example in examples if len(set(page.evaluate(
            MARKDOWN_AND_HTML, [example["markdown"], example["html"]]))) > 1]
        right = 1 - len(wrong) / len(examples)
        self.assertGreaterEqual(right, 0.95, f"{right:.1%}; wrong are the examples {wrong}")
        self.assertEqual(wrong, [608, 611])     # GFM makes links of bare addresses
        self.problems.clear()                   # their images are not there

    def test_github_flavoured_markdown_is_rendered(self):
        page = self.page()
        for text, html in GFM:
            with self.subTest(text):
                self.assertEqual(*page.evaluate(MARKDOWN_AND_HTML, [text, html]))

    def test_each_block_begins_on_the_side_where_its_script_begins(self):
        page = self.page()
        sides = page.evaluate("""text => {
            document.body.append(h('div', { class: 'rendered' }, renderMarkdown(text)));
            return [...document.querySelector('body > .rendered').children].map(
                block => getComputedStyle(block).direction);
        }""", "# שלום\n\n- Latin\n- letters\n\n> مرحبا\n\n|ב|\n|-|\n\n1 + 1, then א")
        self.assertEqual(sides, ["rtl", "ltr", "rtl", "rtl", "ltr"])

    def test_markdown_of_any_shape_is_rendered_in_one_go(self):
        """Each of these takes minutes where the time grows with the square of the length."""
        page = self.page()
        for text in ("> ", ">", "- ", "1. ", "[", "![", "[a](", "[a][", "]", "*a ", "*a_ ", "a**b",
                     "` `` ", "<", "<a ", '<a x="', "<!-" "- ", "<![CDATA[", "$", "${", "$a ",
                     "$$ a ", r"\begin{a}", r"\[", "&", "https://a.b)", "www.", "a $$ b\n", "|a",
                     "\t", " ", "[a]: b\n", "[a](b) [", "-", "#", "{", "~", "_a_b", "\n", "a"):
            with self.subTest(text):
                # No letter at the beginning, which would settle the direction of the text.
                shown = page.evaluate("text => renderMarkdown(text).textContent.length",
                                      "1" + text * (60_000 // len(text)))
                self.assertGreater(shown, 0)


    def test_a_bar_in_a_formula_or_in_code_is_no_border_of_a_table(self):
        page = self.page()
        for row, cells in TABLE_ROWS:
            with self.subTest(row):
                self.assertEqual(page.evaluate("""row => [...renderMarkdown(`a|b\\n-|-\\n${row}`)
                    .querySelectorAll('td')].map(cell => cell.textContent)""", row), cells)
                self.assertEqual(page.evaluate("""row => [...renderMarkdown(`${row}\\n-|-\\n1|2`)
                    .querySelectorAll('th')].map(cell => cell.textContent)""", row), cells)

    def test_prices_are_no_formulas(self):
        page = self.page()
        for text, formulas in PRICES:
            with self.subTest(text):
                self.assertEqual(page.evaluate("""text => [...renderMarkdown(text)
                    .querySelectorAll('math')].map(math => math.dataset.tex)""", text), formulas)

    def test_a_table_on_a_phone_scrolls_and_breaks_no_word(self):
        page = self.page()
        page.set_viewport_size({"width": 375, "height": 700})
        text = "|" + "extraordinarily long|" * 5 + "\n" + "|-" * 5 + "|\n" + "|word" * 5 + "|"
        lines, width, seen = page.evaluate("""text => {
            ui.main.replaceChildren(h('div', { class: 'rendered markdown' }, renderMarkdown(text)));
            const [table, word] = ['table', 'th'].map(name => document.querySelector(name));
            const range = document.createRange();
            range.setStart(word.firstChild, 0);
            range.setEnd(word.firstChild, 'extraordinarily'.length);
            return [range.getClientRects().length, table.scrollWidth, table.clientWidth];
        }""", text)
        self.assertEqual(lines, 1)
        self.assertGreater(width, seen)


# Rows of a table with two columns, and their cells
TABLE_ROWS = [
    ("|$P(A|B)$|kept|", ["P(A|B)", "kept"]), ("|$\\|x\\|$|$$|z|$$|", ["‖x‖", "|z|"]),
    ("|`a|b`|`a\\|b`|", ["a|b", "a|b"]), ("x|``a`|``", ["x", "a`|"]),
    ("|\\(a|b\\)|x|", ["a|b", "x"]),
    ("|Price ($)|Cost ($)|", ["Price ($)", "Cost ($)"]), ("|$5|$6|", ["$5", "$6"]),
    ("|in $ | or $ |", ["in $", "or $"]), ("|a \\| b|\\$ | ", ["a | b", "$"]),
    ("|`|x|", ["`", "x"])]
# Texts, and the formulas in them
PRICES = [
    ("costs $5 and then `$x$` is code", []), ("<b>$5</b> and `$6` too", []), ("$5 and $10", []),
    ("5$ and 10$", []), ("US$, CA$ and A$", []), ("price ($) and cost ($)", []),
    ("$ 5 and $ 6", []), ("$ for me and $ for you", []), ("<b>5$</b> or <b>6$</b> ", []),
    ("\\$5 and $x$", ["x"]), ("a $5 lunch, then $x$", ["x"]), ("`$`, $x$ and `$`", ["x"]),
    ("two $$ and `$$x$$`", []), ("3$\\times$3", ["\\times"]), ("10$^2$5", ["^2"]),
    ("$ x + y $", ["x + y"]), ("$5 \\times 2$", ["5 \\times 2"]),
    ("the $n$th $k$-mean", ["n", "k"]),
    ("$[0, 1)$ $)$ $,$", ["[0, 1)", ")", ","]), ("$True Positives$", ["True Positives"]),
    ("$\\grave a = $ and $`$", ["\\grave a =", "`"])]


def commonmark_examples():
    """The 652 of version 0.31. They come with the sources of markdown-it-py; see .ci/run."""
    sources = list(Path(sys.prefix, "sources").glob("markdown_it_py-*.tar.gz"))
    if not sources:
        raise unittest.SkipTest("needs the sources of markdown-it-py")
    with tarfile.open(sources[0]) as archive:
        name = next(name for name in archive.getnames() if name.endswith("/commonmark.json"))
        return json.load(archive.extractfile(name))


# A MIME bundle, and what the page shows of it: an element, and the text in it
MIME_BUNDLES = [
    ({"text/html": "<b>rich</b>", "text/plain": "poor"}, ".host b", "rich"),
    ({"text/markdown": "**rich** $x$", "text/plain": "poor"}, ".markdown strong", "rich"),
    ({"text/latex": r"$\frac{1}{2}$", "image/png": "", "text/plain": "poor"}, "mfrac", "12"),
    ({"text/latex": r"a_b \begin{align}x &= 1\end{align} c_d"}, ".markdown", "a_b x=1 c_d"),
    ({"image/svg+xml": "<svg width='9' height='9'/>"}, "img[src^='data:image/svg']", ""),
    ({"image/png": base64.b64encode(b"x").decode()}, "img[src='data:image/png;base64,eA==']", ""),
    ({"image/jpeg": "eA=="}, "img[src^='data:image/jpeg']", ""),
    ({"image/gif": "eA==\n"}, "img[src='data:image/gif;base64,eA==']", ""),
    ({"image/webp": "eA=="}, "img[src^='data:image/webp']", ""),
    ({"audio/wav": "eA=="}, "audio[controls][src^='data:audio/wav']", ""),
    ({"video/mp4": "eA=="}, "video[controls][src^='data:video/mp4']", ""),
    ({"application/pdf": "eA=="}, "a[download][href^='data:application/pdf']", "PDF"),
    ({"application/json": {"a": [1, None]}, "text/plain": "poor"}, ".json details", "a: [2]"),
    ({"application/geo+json": {"type": "Point"}, "text/plain": "poor"}, ".json", '"Point"'),
    ({"application/javascript": "1"}, "iframe[sandbox]", ""),
    ({"text/html": "<p>x</p><scr" "ipt>1</scr" "ipt>"}, "iframe[sandbox]", ""),
    ({"text/html": "<iframe src='https://x.org'></iframe>"}, "iframe[sandbox]", ""),
    ({"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "IntSlider()"},
     "div", "IntSlider()An interactive widget (ipywidgets). This page shows it as text."),
    ({"application/vnd.vegalite.v5+json": {}, "text/plain": "<VegaLite>"}, "pre", "<VegaLite>"),
    ({"application/vnd.unknown+json": {"a": 1}}, "div", "application/vnd.unknown+json{1}a: 1"),
    ({"text/csv": "a,b\n1,2"}, "pre", "a,b\n1,2"),
    ({"application/x-unknown": "?"}, ".note", "cannot show: application/x-unknown"),
    ({}, ".note", "no type at all"),
    # of a shape that nbformat does not allow
    (None, ".note", "no type at all"), ("text", ".note", "cannot show"), (7, ".note", "no type"),
    ({"text/plain": ["a\n", "b"]}, "pre", "a\nb"), ({"text/plain": None}, "pre", ""),
    ({"text/plain": {"a": 1}}, "pre", '{"a":1}'), ({"text/html": ["<b>", 1, "</b>"]}, "b", "1"),
    ({"image/png": {"a": 1}}, "img", ""), ({"image/svg+xml": "\ud800<svg/>"}, "img", ""),
    ({"application/json": [1] * 1001}, ".json button", "More"),
    ({"application/json": "a" * 5_000_000}, ".json code", "more characters, kept in the file"),
]
BUNDLE_SHOWN = """([bundle, selector]) => {
    const holder = document.createElement('div');
    holder.append(renderBundle(bundle, null)[1]);
    const root = holder.querySelector('.host')?.shadowRoot ?? holder;
    const find = node => node.querySelector(selector.replace('.host ', ''));
    return (find(holder) ?? find(root))?.textContent;
}"""


def outputs_in(*outputs):
    """A notebook with one code cell, which has these outputs."""
    nb = notebook("")
    nb["cells"][0]["outputs"] = [
        {"output_type": "display_data", "metadata": {}, "data": output} for output in outputs]
    return nb


class DrawnPage(PageCase):
    def put(self, nb, name=None):
        """A tab on a notebook that is put there as it is; what a kernel does is of no interest."""
        (self.root / (name or self.name)).write_bytes(jupyter_bytes(nb))
        tab = self.visit("/notebooks/" + quote(name or self.name))
        tab.page.wait_for_selector(".cell")
        return tab


class PageShowsEveryType(DrawnPage):
    def test_every_mime_type_is_shown_and_the_richest_first(self):
        page = self.visit("/tree").page
        for bundle, selector, text in MIME_BUNDLES:
            with self.subTest(str(bundle)[:60]):
                shown = page.evaluate(BUNDLE_SHOWN, [bundle, selector])
                self.assertIsNotNone(shown, f"no {selector}")
                self.assertIn(text, shown)
        self.problems.clear()      # pictures that are none

    def test_images_and_links_are_found_beside_the_notebook_and_in_the_cell(self):
        (self.root / "a b").mkdir()
        (self.root / "a b" / "dot.png").write_bytes(one_red_pixel())
        dot = base64.b64encode(one_red_pixel()).decode()
        text = ("![one](dot.png) ![two](<attachment:my image.png>) <img src='../a%20b/dot.png'> "
                "![four](/a%20b/dot.png) ![none](attachment:none.png) "
                "[a](other.ipynb#X) [b](data.csv) [c](/a%20b/) [d](#X) [e](http://x.org)")
        cell = markdown(text, attachments={"my image.png": {"image/png": dot}, "broken": None})
        nb = {**notebook(), "cells": [cell]}
        page = self.put(nb, "a b/n.ipynb").page
        page.wait_for_function("""() => [...document.querySelectorAll('.rendered img')]
            .filter(image => image.naturalWidth === 1).length === 4""")
        self.assertEqual(
            page.eval_on_selector_all(".rendered a", "all => all.map(a => a.getAttribute('href'))"),
            [self.address("/notebooks/a%20b/other.ipynb#X"), self.address("/files/a%20b/data.csv"),
             self.address("/tree/a%20b/"), "#X", "http://x.org"])

    def test_math_is_typeset_in_html_too_but_no_prices(self):
        html = "<td>$x^2$ <td>$5 <td>$a <td>$b$ <td>$6 <code>$y^2$</code> \\[z^2\\]"
        page = self.visit("/tree").page
        shown = page.evaluate("""html => [...htmlOutput(html, {}).shadowRoot
            .querySelectorAll('math')].map(math => math.dataset.tex)""", html)
        self.assertEqual(shown, ["x^2", "b", "z^2"])

    def test_what_paints_its_own_ground_has_dark_text_in_a_dark_page(self):
        html = "<style>td { background: gold }</style><table><td>text</table>"
        nb = outputs_in({"text/html": html}, {"text/html": "<table><td>plain</table>"})
        nb["cells"].append(markdown("<p style='background: #eee'>boxed</p>"))
        page = self.put(nb).page
        page.emulate_media(color_scheme="dark")
        colours = [page.get_by_text(text, exact=True).evaluate(
            "element => getComputedStyle(element).color") for text in ("text", "plain", "boxed")]
        dark, light = "rgb(28, 35, 48)", "rgb(223, 227, 234)"
        self.assertEqual(colours, [dark, light, dark])

    def test_words_in_angle_brackets_that_are_no_html_keep_what_follows(self):
        page = self.visit("/tree").page
        shown = page.evaluate("text => renderMarkdown(text).textContent", "a vector<int> of things")
        self.assertEqual(shown, "a vector of things\n")

    def test_alerts_of_jupyters_notebooks_are_told_apart(self):
        page = self.visit("/tree").page
        kinds = page.evaluate("""text => [...renderMarkdown(text).querySelectorAll('div')]
            .map(div => div.dataset.alert)""", '<div class="alert alert-block alert-info">x</div>')
        self.assertEqual(kinds, ["info"])

    def test_a_frame_is_as_high_as_what_it_shows_also_when_that_shrinks(self):
        html = ("<div id=box style='height: 400px'></div><scr" "ipt>addEventListener('click', "
                "() => box.style.height = '50px')</scr" "ipt>")
        page = self.put(outputs_in({"text/html": html})).page
        is_high = "height => document.querySelector('.script-frame').offsetHeight === height"
        page.wait_for_function(is_high, arg=400)
        page.frame_locator(".script-frame").locator("#box").click()
        page.wait_for_function(is_high, arg=50)

    @needs_notebooks
    def test_every_formula_of_the_sample_notebooks_is_typeset(self):
        """Without a mark of something unknown, and without TeX that is left as text."""
        page = self.visit("/tree").page
        texts = [text for path in NOTEBOOKS.glob("*.ipynb") for text in markdown_texts(path)]
        typeset, unknown = page.evaluate("""texts => {
            const holder = document.createElement('div');
            for (const text of texts) holder.append(renderMarkdown(text));
            const found = holder.querySelectorAll('.tex-unknown');
            return [holder.querySelectorAll('math').length, [...found].map(code => code.title)];
        }""", texts)
        self.assertGreater(typeset, 400)
        self.assertLess(len(unknown) / typeset, 0.01, unknown)
        self.problems.clear()      # pictures of other hosts


def markdown_texts(path):
    """The sources of the Markdown cells of a notebook of any version, and its LaTeX outputs."""
    try:
        nb = minijupyter.DOCUMENTS[-1](path.read_bytes()).served
    except ValueError:
        return
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            yield cell["source"]
        for output in cell.get("outputs", ()):
            if "text/latex" in output.get("data", {}):
                yield output["data"]["text/latex"]


class PageShowsLibraries(PageCase):
    """What popular libraries draw with scripts is drawn, in frames that reach nothing."""

    def setUp(self):
        super().setUp()
        self.context.route(lambda url: not url.startswith(self.address("/")),
                           lambda route: route.abort())      # no test needs the network

    def tearDown(self):
        self.problems = [text for text in self.problems if not text.startswith("asks http")
                         and "ERR_FAILED" not in text]
        super().tearDown()

    def frames(self, *sources):
        tab = self.open(*sources)
        tab.command("run-all")
        tab.wait_until_done(60)
        for frame in tab.page.locator(".script-frame").all():
            frame.scroll_into_view_if_needed()
            yield frame.content_frame

    @needs("plotly")
    def test_plotly_draws_every_figure_with_the_library_of_the_first(self):
        first = "import plotly.graph_objects as go\ngo.Figure(go.Bar(y=[1, 3])).show()"
        frames = list(self.frames(first, "go.Figure(go.Bar(y=[2, 4]))"))
        self.assertEqual(len(frames), 2)
        for frame in frames:
            self.assertCount(frame.locator(".bars .point"), 2)

    @needs("bokeh")
    def test_bokeh_draws_what_its_first_output_has_loaded_the_library_for(self):
        first = ("from bokeh.io import output_notebook\nfrom bokeh.resources import INLINE\n"
                 "from bokeh.plotting import figure, show\noutput_notebook(INLINE)")
        plot = "p = figure(width=200, height=100)\np.line([1, 2], [1, 2])\nshow(p)"
        frames = list(self.frames(first, plot, plot))
        self.assertEqual(len(frames), 2)
        for frame in frames:
            frame.locator("canvas").first.wait_for(state="attached")

    @needs("altair", "vl_convert")
    def test_altair_draws_with_its_library_inline(self):
        chart = ("import altair as alt, pandas as pd\nfrom IPython.display import HTML\n"
                 "data = pd.DataFrame({'a': [1, 2]})\n"
                 "HTML(alt.Chart(data).mark_bar().encode(x='a').to_html(inline=True))")
        for frame in self.frames(chart):
            frame.locator("#vis svg.marks").wait_for()

    @needs("folium")
    def test_folium_runs_in_a_frame_of_its_own_in_the_frame(self):
        code = ("import folium\nm = folium.Map()\nm.get_root().script.add_child(folium.Element("
                "\"document.body.append('the map runs')\"), index=0)\nm")
        for frame in self.frames(code):
            self.assertShows(frame.frame_locator("iframe").locator("body"), "the map runs")
        self.problems.clear()      # the map's own library is not there

    @needs("ipywidgets")
    def test_a_widget_shows_its_text_and_what_it_is(self):
        tab = self.open("import ipywidgets\nipywidgets.IntSlider(value=3)")
        tab.run(0)
        self.assertShows(tab.outputs(0), "IntSlider(value=3)")
        self.assertShows(tab.outputs(0), "An interactive widget (ipywidgets)")

    @needs("ipywidgets", "tqdm")
    def test_the_bars_of_tqdm_move_and_go(self):
        tab = self.open("from tqdm.notebook import tqdm\nfor i in tqdm(range(30), desc='Work'):\n"
                        "    if i == 20: input()", "for i in tqdm(range(30), leave=False): pass")
        tab.select(0)
        tab.press("Control+Enter")
        tab.page.locator(".stdin input").wait_for()
        bar = tab.outputs(0).locator("progress")
        self.assertShows(tab.outputs(0), "Work")
        self.assertLess(bar.evaluate("bar => bar.position"), 1)
        tab.page.locator(".stdin input").press("Enter")
        tab.wait_until_done()
        self.assertShows(tab.outputs(0), "30/30")
        self.assertEqual(bar.evaluate("bar => bar.position"), 1)
        tab.run(1)
        self.assertCount(tab.outputs(1).locator("progress"), 0)
        self.assertEqual(tab.texts()[1].strip(), "")


# What each text leaves in an output of each of these types that might act
WHAT_ACTS = r"""async ([texts, types]) => {
    const wrong = [];
    const stage = document.createElement('div');
    const elementsOf = root => [...root.querySelectorAll('*')].flatMap(element =>
        [element, ...(element.shadowRoot ? elementsOf(element.shadowRoot) : [])]);
    const foreign = ('script iframe object embed form base link meta use animate set '
        + 'foreignObject').split(' ');
    const harmless = /^(?:https?:|mailto:|tel:|ftp:|blob:|#|\/\/|data:(?:image|audio|video)\/)/i;
    const acts = ({ name, value }, element) =>
        /^(?:on|name$|srcdoc$|srcset$|form|xlink:|action$)/i.test(name)
        || name === 'id' && element.getRootNode() === stage
        || ['href', 'src', 'poster'].includes(name) && !harmless.test(value);
    for (const text of texts) for (const type of types ?? [text]) {
        stage.replaceChildren(renderBundle({ [type]: text }, { width: text, alt: text })[1]);
        for (const element of elementsOf(stage)) {
            const isKeptOut = element.matches('.script-frame')
                && !/same-origin|top-navigation|modals/.test(element.getAttribute('sandbox'));
            const attributes = isKeptOut ? [] : [...element.attributes];
            if (!isKeptOut && foreign.includes(element.localName)) wrong.push([type, text]);
            if (attributes.some(attribute => acts(attribute, element))) wrong.push([type, text]);
        }
    }
    // what was started by then has failed or acted before this picture fails
    await new Promise(onerror => h('img', { src: '/nothing', onerror }));
    return wrong;
}"""


# Points outside of all outputs and rendered texts that belong to one, or are red on the picture
DRAWN_OUTSIDE = """async picture => {
    const image = new Image();
    image.src = `data:image/png;base64,${picture}`;
    await image.decode();
    const canvas = new OffscreenCanvas(image.width, image.height).getContext('2d');
    canvas.drawImage(image, 0, 0);
    const { data } = canvas.getImageData(0, 0, image.width, image.height);
    const isRed = (x, y) => {
        const [red, green, blue] = data.subarray(4 * (y * image.width + x));
        return red > 200 && green + blue < 50;
    };
    const boxes = [...document.querySelectorAll('.output, .rendered')].map(
        box => box.getBoundingClientRect());
    const outside = [];
    for (let x = 3; x < innerWidth; x += 35) for (let y = 3; y < innerHeight; y += 4) {
        const isIn = boxes.some(({ left, right, top, bottom }) =>
            left - 1 <= x && x <= right && top - 1 <= y && y <= bottom);
        const hit = document.elementFromPoint(x, y)?.closest('.output, .rendered');
        if (!isIn && (hit || isRed(x, y))) outside.push([x, y]);
    }
    return outside;
}"""
# How HTML and CSS name an address; the first ones ask for it at once
WAYS_TO_ASK = [
    "<img src='%s'>", "<video src='%s'></video>", "<video poster='%s'></video>",
    "<audio src='%s' preload=auto></audio>", "<video><source src='%s'></video>",
    "<input type=image src='%s'>", "<p style='background: url(%s)'>x</p>",
    """<p style='background: \\75r\\6c ("%s")'>x</p>""".replace(" (", "("),
    "<p style='--x: url(%s); background: var(--x)'>x</p>",
    "<svg><style>svg { background: url(%s) }</style></svg>"]
WAYS_TO_ASK_IN_HTML = [
    "<style>a\\\" {} p { background: url(%s) } c\\\" {}</style><p>x</p>",
    "<style>b::after { content: url( '%s' ) }</style><b>x</b>",
    "<style>/* ' */ p { content: 'url('; background: url('%s') /* ' */ }</style><p>x</p>",
    "<style>@media all { li { list-style: disc url(%s) } }</style><li>x</li>"]
WAYS_THAT_ASK_NOTHING = [
    "<img srcset='%s'>", "<picture><source srcset='%s'><img></picture>", "<p background='%s'>x</p>",
    "<link rel=stylesheet href='%s'>", "<link rel=prefetch href='%s'>", "<base href='%s'>",
    "<meta http-equiv=refresh content='0;url=%s'>",
    "<svg><image href='%s'/></svg>", "<svg><image xlink:href='%s'/></svg>",
    "<svg><use href='%s#a'/></svg>",
    "<svg><filter id=f><feImage href='%s'/></filter><path filter='url(#f)'/></svg>",
    "<svg width=9 height=9><rect width=9 height=9 fill='url(%s#a)' clip-path='url(%s#a)'/></svg>",
    "<math><mi href='%s'>x</mi></math>", "<a href='%s' ping='%s'>x</a>", "<track src='%s'>",
    "<table background='%s'><td background='%s'>x</table>", "<body background='%s'>",
    "<style>@import '%s';</style>", "<style>@\\69mport url(%s);</style>",
    "<style>p { background: image-set('%s' 1x) }</style><p>x</p>",
    "<style>p { background: -webkit-image-set('%s' 1x) }</style><p>x</p>",
    "<style>@font-face { font-family: f; src: url(%s) } p { font-family: f }</style><p>x</p>",
    "<svg><style>@import '%s';</style></svg>",
    "<form action='%s'><button formaction='%s'>x</button>",
    "<frameset><frame src='%s'></frameset>"]
WAYS_TO_ASK_IN_MARKDOWN = ["![](%s)", "![x][%s]\n\n[%s]: %s"]
WAYS_OF_SCRIPTS = [      # in HTML these go to a frame
    "<object data='%s'></object>", "<embed src='%s'>", "<iframe src='%s'></iframe>",
    "<svg><script href='%s'></script></svg>", "<script src='%s'></script>"]
# What leads to a place of our own server that is no file
PLACES_OF_OURS = [
    "/logout", "//127.0.0.1:{port}/logout", "http://127.0.0.1:{port}/logout", "http:/logout",
    "http:logout", "../../../logout", "/files/../logout", "/files/%2e%2e/logout", "\\logout",
    "\\\\127.0.0.1:{port}\\logout", "/&#9;/logout", "/../logout", "/&#47;127.0.0.1:{port}/logout",
    "http://localhost:{port}/logout", "http://[::1]:{port}/logout", " HTTP://127.0.0.1:{port}/logout",
    "/api/kernels", "../frame", "../notebooks/x.ipynb", "/api/contents/x.ipynb"]


@needs("brs_kb")
class PageKeepsOut(DrawnPage):
    """A public list of attacks on pages, 4,462 texts, acts nowhere. The rest of it: by design."""

    def setUp(self):
        super().setUp()
        import brs_kb.payloads
        entries = brs_kb.payloads.get_all_payloads().values()
        self.payloads = list(dict.fromkeys(entry.payload for entry in entries))
        self.use_own_profile()
        self.context.route(lambda url: not url.startswith(self.address("/")),
                           lambda route: route.abort())
        self.context.add_init_script("""
            for (const name of ['alert', 'confirm', 'prompt', 'print'])
                window[name] = () => console.error(`${name} was called`);
        """)

    def tearDown(self):
        """Pictures and styles from elsewhere are no attack. Chromium tells of a handler that its
        parser meets, before the sanitiser takes it away."""
        self.problems = [text for text in self.problems if "was called" in text
                         or "script" in text and "Executing inline event handler" not in text]
        super().tearDown()

    def test_attacks_are_inert_in_every_type_of_output(self):
        page = self.visit("/tree").page
        types = ["text/latex", "image/svg+xml", "text/plain", "application/json", "image/png"]
        for texts, kinds in ((self.payloads, ["text/html", "text/markdown"]),
                             (self.payloads[::10], types), (self.payloads[::10], None)):
            self.assertEqual(page.evaluate(WHAT_ACTS, [texts, kinds]), [])

    def test_attacks_are_inert_in_browsers_without_a_sanitiser_of_their_own(self):
        page = self.visit("/tree").page
        page.evaluate("delete Element.prototype.setHTML")
        types = ["text/html", "text/markdown"]
        self.assertEqual(page.evaluate(WHAT_ACTS, [self.payloads[::4], types]), [])

    def test_attacks_are_inert_in_cells_tracebacks_attachments_and_names(self):
        nb = notebook()
        for i, text in enumerate(self.payloads[::12]):
            error = {"output_type": "error", "ename": text, "evalue": text, "traceback": [text]}
            stream = {"output_type": "stream", "name": text, "text": text}
            code = {**notebook(text)["cells"][0], "id": f"c{i}", "outputs": [error, stream]}
            picture = {text: {f"image/{text}": text, "image/png": text}}
            nb["cells"] += [code, {**markdown(text, attachments=picture), "id": f"m{i}"}]
        first = self.payloads[1]
        nb["metadata"] = {"kernelspec": {"name": first, "display_name": first, "language": first},
                          "language_info": {"name": first, "mimetype": first}}
        page = self.put(nb).page
        page.wait_for_selector(f".cell:nth-of-type({len(nb['cells'])}) .rendered")
        for cell in (0, len(nb["cells"]) // 2, len(nb["cells"]) - 1):
            page.locator(".cell").nth(cell).scroll_into_view_if_needed()
        self.assertEqual(page.locator(".cell script, .rendered [id], [onerror]").count(), 0)

    def test_attacks_are_inert_as_names_of_files(self):
        names = [text for text in self.payloads
                 if not {*"/\\\0"} & {*text} and text[0] != "." and len(text.encode()) < 200]
        folder = self.root / self.payloads[1]       # <img src=x onerror=alert(1)>
        folder.mkdir()
        for name in names[:300]:
            (folder / name).write_text("", errors="replace")
        page = self.visit("/tree/" + quote(folder.name)).page
        self.assertCount(page.locator(".files tbody tr"), len(set(os.listdir(folder))))
        self.assertEqual(page.locator("[onerror], main script").count(), 0)

    def test_a_string_is_no_markup_and_no_script_for_this_page(self):
        page = self.visit("/tree").page
        for sink in ("document.body.innerHTML = '<b>'", "setTimeout('1')",
                     "document.createElement('iframe').srcdoc = 'x'",
                     "trustedTypes.createPolicy('other', {})"):
            with self.subTest(sink):
                kept_out = page.evaluate(f"() => {{ try {{ {sink}; return false; }} "
                                         "catch { return true; } }")
                self.assertTrue(kept_out)
        self.problems.clear()

    def test_an_output_cannot_lie_over_the_page(self):
        everywhere = "position: fixed !important; inset: 0 !important; z-index: 99 !important;"
        html = f"<style>:host {{ {everywhere} contain: none !important }}</style>over it"
        nb = outputs_in({"text/html": html},
                        {"text/markdown": f"<div style='{everywhere}'>over it</div>"})
        nb["cells"].append(markdown(f"<div style='{everywhere}'>over it</div>"))
        page = self.put(nb).page
        page.get_by_text("over it").last.wait_for()
        for name in ("#title", "#toolbar button", "#main"):
            box = page.locator(name).first.bounding_box()
            hit = page.evaluate("([x, y]) => document.elementFromPoint(x, y).closest('.output, "
                                ".rendered')", [box["x"] + 3, box["y"] + 3])
            self.assertIsNone(hit, name)

    def test_a_notebook_takes_no_name_that_the_page_asks_for(self):
        names = ("main", "title", "kernel", "menus", "body", "cookie", "ui", "getElementById")
        html = "".join(f'<a id="{name}" name="{name}">x</a><form name="{name}"><input '
                       f'name="{name}"></form><img name="{name}">' for name in names)
        nb = {**outputs_in({"text/html": html}), "metadata": {}}
        nb["cells"].append(markdown(html))
        page = self.put(nb).page
        page.locator(".rendered a").first.wait_for(state="attached")
        self.assertEqual(page.evaluate("() => [document.getElementById('main').localName, "
                                       "document.body.localName, typeof document.cookie]"),
                         ["main", "body", "string"])
        self.assertEqual(page.locator(".rendered [id], .rendered [name], form[name]").count(), 0)

    def test_a_notebook_presses_no_button_of_the_page(self):
        html = '<a href="#" data-command="insert-below">all about cells</a>'
        nb = {**outputs_in({"text/html": html}), "metadata": {}}
        nb["cells"].append(markdown(html))
        page = self.put(nb).page
        cells = page.locator(".cell")
        count = cells.count()
        for link in page.get_by_role("link", name="all about cells").all():
            link.click()
        self.assertCount(cells, count)

    def asked_by(self, html, text, folder="a"):
        """All addresses of ours that a page asks for because of this HTML and Markdown; the last
        picture is `last.png`."""
        asked = []
        self.context.on("request", lambda request: asked.append(request.url))
        (self.root / folder).mkdir(exist_ok=True)
        nb = {**outputs_in(*({"text/html": part} for part in html)), "metadata": {}}
        nb["cells"] += [markdown(part, id=f"m{i}") for i, part in enumerate(text)]
        nb["cells"].append(markdown("![](last.png)", id="last"))
        page = self.put(nb, f"{folder}/{self.name}").page
        return page, asked

    def test_what_a_notebook_names_asks_our_server_for_files_alone(self):
        places = [place.format(port=self.server.port) for place in PLACES_OF_OURS]
        html, text, wanted = [], [], set()
        for i, way in enumerate(WAYS_TO_ASK + WAYS_TO_ASK_IN_HTML + WAYS_THAT_ASK_NOTHING):
            html += [way.replace("%s", f"{place}?asked={i}") for place in places]
            html.append(way.replace("%s", f"pixel.png?wanted=h{i}"))
        for i, way in enumerate(WAYS_TO_ASK_IN_MARKDOWN + WAYS_TO_ASK + WAYS_THAT_ASK_NOTHING
                                + WAYS_OF_SCRIPTS):
            text += [way.replace("%s", f"{place}?asked={i}") for place in places]
            text.append(way.replace("%s", f"pixel.png?wanted=m{i}"))
        wanted = {f"h{i}" for i in range(len(WAYS_TO_ASK + WAYS_TO_ASK_IN_HTML))} | {
            f"m{i}" for i in range(len(WAYS_TO_ASK_IN_MARKDOWN + WAYS_TO_ASK))}
        page, asked = self.asked_by(html, ["\n\n".join(text)])
        page.locator(".rendered").last.wait_for()
        page.eval_on_selector_all(
            "[loading]", "all => { for (const image of all) image.loading = 'eager'; }")
        self.until(lambda: not wanted - {url.partition("wanted=")[2] for url in asked}, page)
        self.until(lambda: any("last.png" in url for url in asked), page)
        others = [url for url in asked if not url.startswith(self.address("/files/"))]
        self.assertEqual([url for url in others if "asked=" in url], [])

    def test_a_link_to_our_own_server_leads_to_pages_that_only_show(self):
        places = [place.format(port=self.server.port) for place in PLACES_OF_OURS]
        _, asked = self.asked_by([f"<a href='{place}?.ipynb'>go</a>" for place in places],
                                 [f"<a href='{place}?.ipynb'>go</a>" for place in places])
        page = self.context.pages[-1]
        page.get_by_text("go").last.wait_for()
        links = page.evaluate("""() => [document, ...[...document.querySelectorAll('.host')].map(
            host => host.shadowRoot)].flatMap(root => [...root.querySelectorAll('.rendered a, a')])
            .filter(a => a.textContent === 'go').map(({ href }) => href)""")
        self.assertEqual(len(links), 2 * len(places))
        pages = tuple(self.address(f"/{name}") for name in ("files/", "notebooks/", "tree/"))
        self.assertEqual([link for link in links if link and not link.startswith(pages)], [])

    def test_no_other_host_learns_where_it_is_shown(self):
        told = []

        class Other(BaseHTTPRequestHandler):
            def do_GET(self):
                told.append((self.path, self.headers.get("Referer")))
                self.send_response(404)
                self.send_header("Access-Control-Allow-Origin", "*")
                self.end_headers()

            def log_message(self, *_):
                pass

        other = ThreadingHTTPServer(("127.0.0.1", 0), Other)
        threading.Thread(target=other.serve_forever, args=[0.01]).start()
        self.addCleanup(other.server_close)
        self.addCleanup(other.shutdown)
        self.context.unroute_all()
        place = f"http://localhost:{other.server_port}"
        unsafe = "<meta name=referrer content=unsafe-url>"
        html = [unsafe + way.replace("%s", f"{place}/h{i}")
                for i, way in enumerate(WAYS_TO_ASK + WAYS_TO_ASK_IN_HTML + WAYS_THAT_ASK_NOTHING)]
        text = [unsafe + way.replace("%s", f"{place}/m{i}")
                for i, way in enumerate(WAYS_TO_ASK_IN_MARKDOWN + WAYS_TO_ASK)]
        html.append(f"<scr" f"ipt>fetch('{place}/fetch'); new Image().src = '{place}/image'; "
                    f"document.body.append(document.referrer + 'nothing')</scr" f"ipt>"
                    f"<link rel=stylesheet href='{place}/sheet'>")
        page, _ = self.asked_by(html, text + [f"[go]({place}/link)"])
        page.get_by_text("go").last.click()
        page.locator(".script-frame").scroll_into_view_if_needed()
        frame = page.frame_locator(".script-frame")
        self.assertEqual(frame.locator("body").inner_text().strip(), "nothing")
        wanted = {"/fetch", "/image", "/sheet", "/link",
                  *(f"/h{i}" for i in range(len(WAYS_TO_ASK + WAYS_TO_ASK_IN_HTML)))}
        self.until(lambda: not wanted - {path for path, _ in told}, page)
        self.assertEqual([path for path, referer in told if referer], [])

    def test_a_label_of_a_notebook_presses_nothing_of_the_page(self):
        html = "<label for=find-case>presses</label>"
        nb = outputs_in({"text/html": html}, {"text/markdown": html})
        nb["cells"].append(markdown(html))
        page = self.put(nb).page
        labels = page.locator("label", has_text="presses")
        self.assertCount(labels, 3)
        for label in labels.all():
            label.dispatch_event("click")
        self.assertFalse(page.locator("#find-case").is_checked())

    def test_no_attribute_of_a_notebook_refers_to_an_element_of_the_page(self):
        names = ["for", "form", "list", "headers", "usemap",
                 "popovertarget", "commandfor", "anchor",
                 "interestfor", "itemref", "aria-labelledby", "aria-controls", "aria-owns",
                 "aria-activedescendant", "aria-describedby", "aria-details", "aria-flowto"]
        attributes = " ".join(f"{name}=title" for name in names)
        html = "".join(f"<{tag} {attributes} command=show-modal>x</{tag}>"
                       for tag in ("label", "button", "td", "input", "img", "p", "svg"))
        nb = outputs_in({"text/html": html}, {"text/markdown": html})
        nb["cells"].append(markdown(html))
        page = self.put(nb).page
        page.locator(".rendered label").wait_for()
        refers = ", ".join(f":is(.rendered, .output) [{name}]" for name in names)
        found = page.evaluate("""refers => [...document.querySelectorAll(refers)].map(
            element => element.outerHTML)""", refers)
        self.assertEqual(found, [])      # in a shadow root, `for` refers to what is there too

    @needs("ipywidgets")
    def test_a_widgets_html_draws_in_its_own_place_alone(self):
        html = ("<style>#top, .cell { display: none !important } b { color: red }</style>"
                "<label for=find-case>presses</label><b>inside</b> $x^2$")
        tab = self.open("import ipywidgets\nparts = [ipywidgets.HTML(value), "
                        "ipywidgets.HTMLMath(value)]\nipywidgets.VBox(parts)")
        tab.run(0, f"value = {html!r}\n" + tab.sources()[0])
        inside = tab.outputs(0).get_by_text("inside")
        self.assertCount(inside, 2)
        self.assertEqual(inside.first.evaluate("b => getComputedStyle(b).color"), "rgb(255, 0, 0)")
        tab.outputs(0).get_by_text("presses").first.click()
        self.assertFalse(tab.page.locator("#find-case").is_checked())
        self.assertTrue(tab.page.locator("#top").is_visible())
        self.assertCount(tab.outputs(0).locator("math"), 1)

    def test_the_style_of_a_drawing_is_for_this_drawing_alone(self):
        def drawing(colour):
            return (f"<svg width=9 height=9><style>* {{ fill: {colour}; color: {colour} }}</style>"
                    f"<linearGradient id=g><stop stop-color='{colour}'/></linearGradient>"
                    f"<rect width=9 height=9 stroke='url(#g)'/></svg>")
        html = drawing("red") + drawing("blue") + "<p>beside</p>"
        nb = outputs_in({"text/html": html}, {"text/markdown": html})
        nb["cells"].append(markdown(html))
        page = self.put(nb).page
        self.assertCount(page.locator("rect"), 6)
        fills = [rect.evaluate("rect => getComputedStyle(rect).fill")
                 for rect in page.locator("rect").all()]
        self.assertEqual(fills, ["rgb(255, 0, 0)", "rgb(0, 0, 255)"] * 3)
        self.assertCount(page.locator("#g"), 6)
        for text in page.get_by_text("beside").all():
            self.assertEqual(text.evaluate("p => getComputedStyle(p).color"), "rgb(28, 35, 48)")

    def test_nothing_that_a_notebook_draws_leaves_its_place(self):
        """Whatever the style, a point of the page outside of the output is the page's."""
        styles = ["position: fixed; inset: 0", "position: absolute; inset: -500px -900px",
                  "position: sticky; top: 0; height: 900px", "margin: -900px; height: 2000px",
                  "transform: scale(50) translate(-20px)", "translate: -400px -200px; scale: 9",
                  "box-shadow: 0 0 0 900px red", "outline: 900px solid red", "zoom: 40",
                  "filter: drop-shadow(0 -300px red)", "float: left; margin: -400px; padding: 99px",
                  "font-size: 900px; line-height: 0", "letter-spacing: 900px",
                  "position: fixed; position-area: top; position-anchor: auto; inset: auto",
                  "rotate: 45deg; width: 9000px", "text-indent: -900px; text-shadow: 0 -300px red",
                  "perspective: 1px; transform: translateZ(.9px)", "width: 300vw; height: 9px",
                  "border: 500px solid red; margin: -500px", "offset: ray(0deg) 900px"]
        everywhere = "z-index: 2147483647; background: red"
        nb = outputs_in({"text/html": "a"}, {"text/markdown": "a"}, {"text/html": "a"})
        nb["cells"] += [markdown("a"), *notebook("x = 1")["cells"]]
        page = self.put(nb).page
        page.locator(".rendered p").wait_for()
        for style in styles:
            html = f"<div style='{style}; {everywhere}'>drawn</div>"
            sheet = (f"<style>:host, div {{ {style} !important; contain: none !important; "
                     f"overflow: visible !important; {everywhere} }}</style><div>drawn</div>")
            with self.subTest(style):
                page.evaluate("""([html, sheet]) => {
                    const bundles = [{ 'text/html': html }, { 'text/markdown': html },
                        { 'text/html': sheet }, { 'text/markdown': html }];
                    const places = '.output, .rendered:not([hidden])';
                    for (const place of document.querySelectorAll(places))
                        place.replaceChildren(renderBundle(bundles.shift(), null)[1]);
                }""", [html, sheet])
                picture = base64.b64encode(page.screenshot()).decode()
                self.assertEqual(page.evaluate(DRAWN_OUTSIDE, picture), [])

    def until(self, is_true, page):
        """Let the page go on until this is so."""
        deadline = time.monotonic() + SECONDS
        while not is_true():
            self.assertLess(time.monotonic(), deadline)
            page.evaluate("() => new Promise(requestAnimationFrame)")


class PageSurvives(DrawnPage):
    """Outputs and texts of any shape: shown as well as possible, kept, and never a blank page."""

    SHAPES = [
        {"output_type": "display_data"}, {"output_type": "display_data", "data": None},
        {"output_type": "display_data", "data": ["x"], "metadata": None},
        {"output_type": "execute_result", "data": {"text/plain": {"a": [1]}}, "metadata": "x"},
        {"output_type": "stream"}, {"output_type": "stream", "name": None, "text": {"a": 1}},
        {"output_type": "stream", "name": "stdout", "text": ["a", None, 3]},
        {"output_type": "error"}, {"output_type": "error", "traceback": "text"},
        {"output_type": "error", "ename": 1, "evalue": None, "traceback": [None, 2]},
        {"output_type": "from the future", "data": {"text/plain": "still shown"}},
        {"output_type": "display_data", "data": {"text/html": [1, None, ["<b>x</b>"]]}},
    ]

    def test_outputs_of_any_shape_are_drawn_and_kept(self):
        nb = notebook(*["x"] * len(self.SHAPES), "last")
        for cell, output in zip(nb["cells"], self.SHAPES, strict=False):
            cell["outputs"] = [output]
        tab = self.put(nb)
        self.assertCount(tab.page.locator(".output > *"), len(self.SHAPES))
        self.assertShows(tab.outputs(10), "still shown")
        tab.write(len(self.SHAPES), "changed")
        tab.save()
        saved = [cell["outputs"] for cell in self.saved()["cells"][:-1]]
        self.assertEqual(saved, [[output] for output in self.SHAPES])

    def test_a_terminal_shows_the_same_however_its_text_is_cut(self):
        bits = ["a", "bc", "\n", "x\ny\n", "\r", "\b", "\x1b[31m", "\x1b[0m", "\x1b[A", "\x1b[2K",
                "🙂"]
        dice = random.Random(1)
        texts = [dice.choices(bits, k=dice.randint(1, 30)) for _ in range(3000)]
        cuts = self.visit("/tree").page.evaluate("""texts => texts.filter(pieces => {
            const [whole, cut] = [new Terminal(pieces.join('')), new Terminal()];
            for (const piece of pieces) cut.write(piece);
            return whole.text !== cut.text || whole.starts.join() !== cut.starts.join();
        })""", texts)
        self.assertEqual(cuts, [])

    def test_a_line_of_two_million_characters_is_shown(self):
        line = "word " * 400_000
        nb = outputs_in({"text/plain": line}, {"text/html": f"<b>{line}</b>"},
                        {"application/json": line}, {"text/markdown": line})
        nb["cells"][0]["outputs"] += [{"output_type": "stream", "name": "stdout", "text": line},
                                      {"output_type": "error", "traceback": [line]}]
        nb["cells"].append(markdown(line + "\n\nthe end"))
        tab = self.put(nb)
        self.assertShows(tab.cell(1).locator(".rendered p").last, "the end")
        self.assertCount(tab.page.locator(".output > *"), 6)

    def test_a_long_line_in_colour_is_written_over(self):
        page = self.visit("/tree").page
        shown = page.evaluate(r"""() => textNode(
            `\x1b[31m${'a'.repeat(300_000)}\r${'b'.repeat(300_000)}`).textContent[0]""")
        self.assertEqual(shown, "b")

    def test_ten_thousand_marks_inside_each_other_are_shown(self):
        nb = notebook()
        nb["cells"] = [markdown(mark * 10_000 + "the end", id=f"m{i}") for i, mark in enumerate(
            (">", "[", "![", "- ", "*", "<div>", "$", "${", r"$\frac{", "("))]
        deep = json.loads('{"a":' * 500 + "1" + "}" * 500)
        nb["cells"].append({**outputs_in({"application/json": deep})["cells"][0], "id": "json"})
        tab = self.put(nb)
        tab.page.locator(".json").wait_for(state="attached")
        for i in range(len(nb["cells"]) - 1):
            self.assertIn("the end", tab.cell(i).locator(".rendered").text_content())


# The other engine: what the page does may work in one browser only. %s stands for a test's steps.
FIREFOX = next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), "firefox")
FIREFOX_STEPS = """
import assert from 'node:assert';
import puppeteer from 'puppeteer-core';
const [executablePath, address] = process.argv.slice(1);
const browser = await puppeteer.launch({ browser: 'firefox', executablePath });
try {
  const page = await browser.newPage();
  const problems = [];
  page.on('pageerror', error => problems.push(String(error)));
  const press = async (...keys) => {
    for (const key of keys) await page.keyboard.down(key);
    for (const key of keys.reverse()) await page.keyboard.up(key);
  };
  const shows = text => page.waitForFunction(
    text => [...document.querySelectorAll('.outputs')].some(box => box.textContent.includes(text)),
    {}, text);
  await page.goto(address);
  await page.waitForSelector('body[data-kernel=idle]');
  %s
  assert.deepStrictEqual(problems, []);
} finally {
  await browser.close();
}
"""


@needs_programs("node", str(NODE / "puppeteer-core"), FIREFOX)
class PageInFirefox(ServerCase):
    """The same page in Firefox, driven by puppeteer over WebDriver BiDi."""

    def walk(self, nb, steps):
        """Take these steps, JavaScript with `page`, in a tab with the notebook."""
        (self.root / "fox.ipynb").write_bytes(jupyter_bytes(nb))
        address = f"http://127.0.0.1:{self.server.port}/notebooks/fox.ipynb"
        process = Process(
            ["node", "--input-type=module", "-e", FIREFOX_STEPS % steps, "--", FIREFOX,
             f"{address}?token={self.server.token}"], cwd=NODE)
        self.addCleanup(process.end)
        self.assertEqual(process.exit_code(3 * SECONDS), 0, process.output)

    def test_a_notebook_is_written_run_and_saved(self):
        self.walk(notebook(""), """
            await page.keyboard.type('for i in range(2):\\nprint(i, "ü")');
            await press('Shift', 'Enter');
            await shows('0 ü\\n1 ü');
            const coloured = () =>      // for, in
                document.querySelectorAll('[data-token=keyword]').length === 2;
            await page.waitForFunction(coloured);
            const html = '<script>document.body.append(6 * 7)</script>';
            await page.keyboard.type(`display({"text/html": "${html}"}, raw=True)`);
            await press('Shift', 'Enter');
            const frame = await page.waitForFrame(frame => frame.url().endsWith('/frame'));
            await frame.waitForFunction(() => document.body.innerText === '42');
            await press('Control', 's');
            await page.waitForSelector('body[data-saved=true]');
        """)
        nb = json.loads((self.root / "fox.ipynb").read_text("utf-8"))
        self.assertEqual(["".join(cell["source"]) for cell in nb["cells"]][:2], [
            'for i in range(2):\n    print(i, "ü")',
            'display({"text/html": "<script>document.body.append(6 * 7)</script>"}, raw=True)'])

    def test_a_cell_far_away_is_reached(self):
        """Firefox does not make up for the guessed heights of the cells on the way."""
        long = "x = 1\n" * 40
        self.walk(notebook(*[long] * 30, "1/0", *[long] * 3), """
            await page.$eval('[data-command=run-all]', button => button.click());
            await shows('ZeroDivisionError');
            await page.evaluate(() => scrollTo(0, 0));
            await page.$eval('[data-command=go-failed]', item => item.click());
            await page.waitForFunction(() => {
              const { top, bottom } = document.querySelector('[data-state=error]')
                .getBoundingClientRect();
              return top > 0 && bottom < innerHeight;
            });
        """)



# -- Part I of the server alone, and Part II without any one section --

def server_alone(folder, source):
    """`program` of a server with this source in a folder of its own, with the kernel's Part I and
    the page."""
    for name, text in (("minijupyter.py", source), ("kernel.py", without_part_two(KERNEL_SOURCE)),
                       ("index.html", text_of("index.html"))):
        (Path(folder) / name).write_text(text, "utf-8")
    return lambda root, port, token: [
        sys.executable, Path(folder) / "minijupyter.py", root, "--port", str(port),
        "--token", token, "--no-browser"]


class CoreOfTheServer(ServerCase):
    """Part I alone is a server: what the architecture promises holds without any extra."""

    @classmethod
    def setUpClass(cls):
        cls.options = {"program": server_alone(class_folder(cls), without_part_two(SERVER_SOURCE))}
        super().setUpClass()

    handshake = Bridge.handshake
    kernel_id = None

    def test_notebooks_are_opened_and_saved_whole_and_never_over_a_change(self):
        path, nb = "/api/contents/a.ipynb", notebook("x = 1")
        self.assertReply(self.server.put(path, {"type": "notebook", "content": nb}), 201)
        model = self.assertReply(self.server.get(f"{path}?hash=1"), 200).json
        self.assertEqual(model["content"], nb)
        self.assertEqual(json.loads((self.root / "a.ipynb").read_text()), {
            **nb, "cells": [{**nb["cells"][0], "source": ["x = 1"]}]})
        again, expected = notebook("x = 2"), {"If-Match": f'"{model["hash"]}"'}
        body = {"type": "notebook", "content": again}
        self.assertReply(self.server.put(path, body, **expected), 200)
        self.assertReply(self.server.put(path, body, **expected), 412)
        self.assertReply(self.server.put(path, {"type": "notebook", "content": {}}), 400)
        self.assertEqual(self.server.get(path).json["content"], again)

    def test_files_are_listed_made_renamed_and_deleted(self):
        Contents.test_a_folder_lists_what_is_in_it(self)
        Contents.test_a_new_file_gets_the_next_free_name(self)
        Contents.test_a_rename_overwrites_nothing(self)
        Contents.test_a_file_and_a_folder_are_deleted(self)
        self.assertReply(self.server.post("/api/contents/a.ipynb/checkpoints"), 404)

    def test_nothing_outside_the_root_is_reached(self):
        (self.root / ".hidden").write_text("x")
        (self.root / "out").symlink_to("/etc")
        for path in ("../root/x", "..%2f..%2fetc/passwd", ".hidden", "out/passwd"):
            self.assertReply(self.server.get(f"/api/contents/{path}"), 404)

    def test_who_may_come_in_is_asked_first(self):
        self.assertReply(self.server.get("/api/contents", Authorization=None), 403)
        self.assertReply(self.server.get("/api/contents", Host="evil.example"), 403)
        cookie = Bridge.cookie(self)
        for origin, status in (("http://evil.example", 403),
                               (f"http://127.0.0.1:{self.server.port}", 201)):
            self.assertReply(self.server.request(
                "POST", "/api/contents", {},
                {"Authorization": None, "Cookie": cookie, "Origin": origin}), status)

    def test_a_kernel_is_started_interrupted_restarted_and_shut_down(self):
        Kernels.test_a_kernel_is_started_listed_and_shut_down(self)
        Kernels.test_the_state_of_a_kernel_follows_its_cells(self)
        Kernels.test_interrupt_stops_a_running_cell(self)
        Kernels.test_restart_works_while_a_cell_runs(self)
        _, frontend, pid = self.start_kernel()
        os.kill(pid, signal.SIGKILL)
        frontend.until(lambda: "restarting" in frontend.log)
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")
        Kernels.test_what_was_sent_to_a_dying_kernel_does_not_run_in_the_next_one(self)

    def test_a_session_ties_a_notebook_to_its_kernel(self):
        wish = {"path": "a.ipynb", "type": "notebook", "kernel": {"name": "python3"}}
        one, two = (self.assertReply(self.server.post("/api/sessions", wish), 201).json
                    for _ in range(2))
        self.assertEqual(one["kernel"]["id"], two["kernel"]["id"])
        self.assertReply(self.server.delete(f"/api/sessions/{one['id']}"), 204)

    def test_cells_run_and_what_they_say_goes_to_whom_it_is_for(self):
        self.kernel_id, self.frontend, _ = self.start_kernel()
        self.run_cell = functools.partial(Bridge.run_cell, self)
        Bridge.test_a_cell_runs_through_the_server(self)
        Bridge.test_input_travels_both_ways(self)
        self.frontend.typed = []
        Bridge.test_two_hundred_thousand_lines_arrive_whole_and_in_order(self)
        Bridge.test_every_frontend_sees_the_output_and_only_the_asker_the_reply(self)
        Bridge.test_bad_messages_from_a_page_harm_nobody(self)
        Bridge.test_wrong_frames_close_with_their_code(self)

    def test_who_comes_back_gets_the_rest(self):
        self.kernel_id, self.plain, _ = self.start_kernel()
        Journal.test_another_client_that_returns_gets_what_it_missed_like_from_jupyter_server(self)

    def test_what_two_programs_could_read_in_two_ways_is_refused(self):
        for head in ("GET /api HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
                     "GET /api HTTP/1.1\r\nHost: localhost\r\nA: b\rX: y\r\n\r\n",
                     "GET /api HTTP/1.1\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", self.server.port)) as client:
                client.sendall(head.encode())
                self.assertIn(b" 400 ", client.recv(100))


class CoreOfTheServerUnderThePage(PageCase):
    """The page works on Part I of server and kernel alone."""

    @classmethod
    def setUpClass(cls):
        cls.options = {"program": server_alone(class_folder(cls), without_part_two(SERVER_SOURCE))}
        super().setUpClass()

    def test_cells_are_run_answered_interrupted_and_restarted(self):
        tab = self.open("print('out')\n6 * 7", "1 / 0", "input('Name? ')", "while True: pass")
        tab.run(0)
        self.assertShows(tab.outputs(0), "42")
        tab.run(1)
        self.assertShows(tab.outputs(1), "ZeroDivisionError")
        tab.cell(2).locator("textarea.editor").focus()
        tab.press("Shift+Enter")
        tab.cell(2).locator("input").fill("Ada")
        tab.press("Enter")
        self.assertShows(tab.outputs(2), "'Ada'")
        tab.cell(3).locator("textarea.editor").focus()
        tab.press("Shift+Enter")
        tab.wait_for(kernel="busy")
        tab.command("interrupt")
        self.assertShows(tab.outputs(3), "KeyboardInterrupt")
        tab.command("restart")
        tab.choose("Restart")
        tab.wait_for(kernel="idle")
        tab.run(0)
        self.assertShows(tab.cell(0).locator(".prompt"), "1")

    def test_what_is_edited_is_saved_and_there_again(self):
        tab = self.open("x = 1")
        tab.write(0, "x = 2")
        tab.save()
        self.assertEqual(self.saved_sources(), ["x = 2"])
        self.assertEqual(self.reopen(self.name).sources(), ["x = 2"])

    def test_a_change_on_disk_is_a_conflict(self):
        tab = self.open("x = 1")
        (self.root / self.name).write_bytes(jupyter_bytes(notebook("theirs = 3")))
        tab.write(0, "x = 2")
        tab.press("Control+s")
        self.assertShows(tab.page.locator("dialog[open]"), "changed")
        self.assertEqual(self.saved_sources(), ["theirs = 3"])


@needs_parts
class EachExtraOfTheServerAlone(ServerCase):
    """Part II of the server without any one of its sections: the rest runs."""

    @classmethod
    def setUpClass(cls):
        cls.root = Path("never")

    def assertServes(self, server):
        self.assertReply(server.get("/api/contents", Authorization="token x"), 403)
        opened = server.get(f"/tree?token={server.token}", Authorization=None)
        cookie = opened.headers["Set-Cookie"].partition(";")[0]
        self.assertReply(server.get("/tree", Authorization=None, Cookie=cookie), 200)
        nb = {"type": "notebook", "content": notebook("x = 1")}
        self.assertReply(server.put("/api/contents/a.ipynb", nb), 201)
        self.assertEqual(server.get("/api/contents/a.ipynb").json["content"], nb["content"])
        large = {"type": "file", "format": "text", "content": "x" * 5_000_000}
        self.assertReply(server.put("/api/contents/large.txt", large), 201)
        self.assertReply(server.get("/files/a.ipynb"), 200)
        kernel_id = self.assertReply(server.post("/api/kernels", {}), 201).json["id"]
        wire = WebSocketWire(server, kernel_id, "page", journal=1)
        self.addCleanup(wire.close)
        frontend = Frontend(wire)
        self.assertEqual(frontend.finish(frontend.start("6 * 7")).result, "42")
        self.assertReply(server.delete(f"/api/kernels/{kernel_id}"), 204)
        self.assertNotIn("Traceback", server.process.output)

    def test_without_one_section_the_server_serves_saves_and_runs(self):
        without = {"nothing": SERVER_SOURCE, **extras(SERVER_SOURCE)}
        self.assertGreater(len(without), 20)
        for title, source in without.items():
            with self.subTest(title), tempfile.TemporaryDirectory() as folder:
                server = Server(program=server_alone(folder, source))
                self.addCleanup(server.end)
                self.assertServes(server)
                server.end()


CORE += (CoreOfTheServer, CoreOfTheServerUnderThePage, EachExtraOfTheServerAlone)


# ---- 10. Documentation under test --------------------------------------------------
#
# The documentation is code that nobody runs, so these tests do: the twelve stations of a cell's
# journey, the sections that each file announces, the two parts and what joins them, the commands
# of the README, what lies on top.

FILES = ("kernel.py", "minijupyter.py", "index.html", "test_minijupyter.py", "README.md")


def text_of(name):
    return (HERE / name).read_text("utf-8")


def definitions(statements):
    """Count of each name that module-level statements define; of branches only one is taken."""
    found = collections.Counter()
    for node in statements:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] += 1
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = getattr(node, "targets", None) or [node.target]
            found.update(name.id for target in targets for name in ast.walk(target)
                         if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store))
        else:
            branches = [getattr(node, part, []) for part in ("body", "orelse", "finalbody")]
            branches += [handler.body for handler in getattr(node, "handlers", [])]
            found += functools.reduce(operator.or_, map(definitions, branches))
    return found


def attributes(tree):
    """Names of the methods and of the attributes of `self` that the classes of a tree define."""
    return {node.attr for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)} | {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def uses(tree):
    """Names that a tree reads, writes or calls; of `a.b` both. `@handles(…)` uses HANDLERS."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return names | {"HANDLERS"} if "handles" in names else names


def calls(tree):
    """The names of what is called, and of constants, in a syntax tree."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id.isupper()
            } | {node.func.id for node in ast.walk(tree)
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def announced_sections(second):
    """[(number, title, [plug])] as the list at the head of Part II has them."""
    head = itertools.takewhile(lambda line: line.startswith("#"), second)
    rows = [re.fullmatch(r"# +(\d+) (\S.*?)  +(.+)\n", line) for line in head]
    return [(row[1], row[2], row[3].split(":")[0].split(", ")) for row in rows if row]


def announced_plugs(docstring):
    """["HANDLERS", "kernel.workers", …] of the list of extension points in a module docstring."""
    paragraphs = docstring.split("\n\n")
    heading = next(p for p in paragraphs if p.lstrip().startswith("Part I's extension points"))
    names = []
    for line in paragraphs[paragraphs.index(heading) + 1].split("\n"):
        owner, words = re.match(r" {4}(\w+\.)?(\w+(?:, \w+)*)", line).groups()
        names += [(owner or "") + word for word in words.split(", ")]
    return names


def stations(source):
    """{line: number} of the first line of code below each `# Journey N:` of a source."""
    lines, found = source.split("\n"), {}
    for at, line in enumerate(lines, 1):
        if match := re.match(r"\s*# Journey (\d+):", line):
            found[next(number for number, text in enumerate(lines[at:], at + 1)
                       if text.strip() and text.strip()[0] != "#")] = int(match[1])
    return found


FOLLOWER = """\
import sys, threading
folder, stations, path = sys.argv[1:4]
del sys.argv[1:4]
sys.path.insert(0, folder)
import kernel
stations, log = dict(pair.split("=") for pair in stations.split()), open(path, "wb", 0)

def follow(frame, event, argument):
    if frame.f_code.co_filename != kernel.__file__:
        return None
    if event == "line" and str(frame.f_lineno) in stations:
        log.write(stations[str(frame.f_lineno)].encode() + b" ")
    return follow

sys.settrace(follow)
threading.settrace(follow)
kernel.main()"""


class Documentation(Case):
    def test_the_twelve_stations_of_the_journey_stand_once_each_and_in_their_file(self):
        found = [(int(number), name) for name in FILES[:3]
                 for number in re.findall(r"Journey (\d+):", text_of(name))]
        stations = {"index.html": (1, 12), "minijupyter.py": (2, 3, 11),
                    "kernel.py": (4, 5, 6, 7, 8, 9, 10)}
        self.assertEqual(sorted(found), sorted(
            (number, name) for name, numbers in stations.items() for number in numbers))

    def test_a_cell_passes_the_kernels_stations_in_the_order_of_their_numbers(self):
        for title, source in (("whole", KERNEL_SOURCE),
                              ("Part I alone", without_part_two(KERNEL_SOURCE))):
            folder = self.folder()
            kernel_alone(folder, source)
            log, places = folder / "passed", stations(source).items()
            own = KernelProcess([
                sys.executable, "-c", FOLLOWER, str(folder),
                " ".join(f"{line}={number}" for line, number in places), str(log), *OURS[2:]])
            self.addCleanup(own.end)
            frontend = own.connect()
            self.addCleanup(frontend.wire.close)
            earlier = len(log.read_text())   # the kernel has answered: it writes no more of it
            cell = frontend.finish(frontend.start("print(1); 2"), seconds=60)
            with self.subTest(title):
                self.assertMessages(cell, "busy execute_input stream execute_result idle")
                passed = [int(number) for number in log.read_text()[earlier:].split()]
                self.assertEqual([*dict.fromkeys(passed)], [4, 5, 6, 7, 8, 9, 10])

    def test_each_file_announces_its_sections_and_keeps_to_them(self):
        for name in FILES[:4]:
            text = text_of(name)
            banners = re.findall(r"^(?:#|//|<!--) ---- (\d+)\. (.+?) -{3,}", text, re.MULTILINE)
            heads = text.split(f"---- {banners[0][0]}.")[0], (text.split(PART_II) + [""])[1]
            opening = " ".join("".join(heads).split())
            with self.subTest(name):
                self.assertEqual([int(n) for n, _ in banners], list(range(1, len(banners) + 1)))
                for number, title in banners:
                    self.assertRegex(opening, rf"\b{number}\.? {re.escape(title.split(':')[0])}")

    def test_no_name_is_defined_twice_in_a_file(self):
        self.assertEqual(definitions(ast.parse(
            "try: x = 1\nexcept OSError: x = 2\ny, y = [x for x in 'ab']\ndef x(): y = 3").body),
            {"x": 2, "y": 2})
        for name in FILES:
            if name.endswith(".py"):
                found = definitions(ast.parse(text_of(name)).body)
                with self.subTest(name):
                    self.assertEqual({name: n for name, n in found.items() if n > 1}, {})

    def test_each_file_has_one_part_two_and_all_its_stations_stand_before_it(self):
        held = {"kernel.py": [4, 5, 6, 7, 8, 9, 10], "minijupyter.py": [2, 3, 11]}
        for name, stations in held.items():
            source = SOURCES[name]
            with self.subTest(name):
                self.assertEqual([source.count(mark) for mark in (PART_II, END_OF_PART_II)], [1, 1])
                found = [re.findall(r"Journey (\d+)", "".join(lines)) for lines in parts(source)]
                self.assertEqual([sorted(map(int, numbers)) for numbers in found],
                                 [stations, [], []])

    def test_part_two_lists_its_sections_and_each_uses_the_plugs_that_it_names(self):
        for name, source in SOURCES.items():
            _, second, _ = parts(source)
            banners = [number for number, line in enumerate(second) if BANNER.match(line)]
            matches = [BANNER.match(second[number]) for number in banners]
            announced = announced_sections(second)
            self.assertEqual([row[:2] for row in announced],
                             [(match[1], match[2].split(":")[0]) for match in matches])
            for (_, title, plugs), *lines in zip(
                    announced, banners, [*banners[1:], None], strict=True):
                names = uses(ast.parse("".join(second[slice(*lines)])))
                for plug in plugs:
                    with self.subTest(name, title=title, plug=plug):
                        self.assertTrue(plug.rpartition(".")[2] in names, "not used there")

    def test_what_a_section_of_the_servers_part_two_defines_is_used_there_alone(self):
        """Else the rest would miss it when the section is deleted, if only in a rare moment."""
        first, second, _ = parts(SERVER_SOURCE)
        starts = [number for number, line in enumerate(second) if BANNER.match(line)]
        sections = {BANNER.match(second[at])[2]: ast.parse("".join(second[at:end]))
                    for at, end in zip(starts, [*starts[1:], None], strict=True)}
        called = {title: calls(tree)
                  for title, tree in {"Part I": ast.parse("".join(first)), **sections}.items()}
        for title, tree in sections.items():
            for other in called.keys() - {title}:
                with self.subTest(section=title, used_in=other):
                    self.assertEqual({*definitions(tree.body)} & called[other], set())

    def test_each_extension_point_is_made_in_part_one_and_used_in_part_two(self):
        for file, source in SOURCES.items():
            first, second, _ = (ast.parse("".join(lines)) for lines in parts(source))
            made, used = {*definitions(first.body)}, uses(second)
            plugs = announced_plugs(ast.get_docstring(first, clean=False))
            self.assertGreater(len(plugs), 10)
            for plug in plugs:
                owner, _, name = plug.rpartition(".")
                with self.subTest(file, plug=plug):
                    self.assertTrue(name in (attributes(first) if owner else made), "not in Part I")
                    self.assertTrue(name in used, "no section of Part II uses it")

    def test_every_command_of_the_readme_names_a_file_that_is_there(self):
        commands = re.findall(r"(?:python|uv run) (\w+\.py)", text_of("README.md"))
        self.assertLessEqual({"minijupyter.py", "test_minijupyter.py"}, set(commands))
        self.assertLessEqual(set(commands), set(FILES))

    def test_every_option_of_the_readme_exists(self):
        shown = subprocess.run([sys.executable, HERE / "minijupyter.py", "--help"],
                               capture_output=True, text=True, check=True).stdout
        for option in re.findall(r"`[^`]*minijupyter\.py[^`]* (--[a-z-]+)", text_of("README.md")):
            with self.subTest(option):
                self.assertIn(option, shown)

    def test_each_file_says_how_to_run_it_on_a_fresh_machine(self):
        for name, needed in (("minijupyter.py", ["pyzmq"]), ("test_minijupyter.py", None)):
            with self.subTest(name):
                head = text_of(name)
                self.assertRegex(head, r'# requires-python = ">=3\.10"')
                self.assertEqual(dependencies(head), needed or dependencies(head))
                self.assertIn("pyzmq", dependencies(head))
                if importlib.util.find_spec("tomllib"):
                    import tomllib
                    block = re.search(r"(?ms)^# /// script$(.*?)^# ///$", head)[1]
                    tomllib.loads(re.sub(r"(?m)^# ?", "", block))

    def test_every_message_type_is_answered_by_a_method_of_its_name(self):
        for msg_type in kernel.HANDLERS:
            self.assertIn(f"def {msg_type}(", text_of("kernel.py"))

    def test_the_page_asks_nothing_of_other_hosts(self):
        page = text_of("index.html")
        self.assertEqual(re.findall(r"(?:src|href)=[\"']?https?:[^\"' >]*", page), [])
        self.assertEqual(re.findall(r"(?:url\(|@import |import\()[\"']?https?:.*", page), [])

    def test_the_top_level_holds_the_five_files_and_nothing_else(self):
        top = {name for name in os.listdir(HERE) if not name.startswith(".")}
        self.assertEqual(top - {"__pycache__"}, set(FILES))


def dependencies(text):
    """The names in a file's inline script metadata (PEP 723)."""
    block = re.search(r"(?ms)^# dependencies = \[(.*?)\]$", text)[1]
    return re.findall(r'"([^"]+)"', block)


# ---- 11. Bench ----------------------------------------------------------------------
#
# What a user waits for, beside what is physically possible on this machine (the same frames
# through a bare ZeroMQ socket, the bare interpreter) and beside ipykernel and jupyter_server.
# All contenders take turns in one run; a figure is a median. A label ends in its unit when that is
# not milliseconds. To add a measure of a server, add a row to SERVER_MEASURES or FILE_MEASURES: a
# label and a function that yields the figures. For another subject, write a function that yields
# (label, figure) and name it in BENCHES.

WANTED = []   # words of the command line: a label must contain one of them
PRINTS = "for i in range(200_000): print(i)"
ALLOCATE = "x = [[i] for i in range(2_000_000)]; del x"
WORK = {
    "kernel: a string of 100 MB": "print('x' * 100_000_000)",
    "kernel: 1,000 displays of 10 kB":
        "for i in range(1000): display({'text/plain': 'x' * 10_000}, raw=True)",
    "kernel: a cell that allocates": ALLOCATE,
}
ECHO = """
import sys, zmq
router = zmq.Context().socket(zmq.ROUTER)
print(router.bind_to_random_port("tcp://127.0.0.1"), flush=True)
while True: router.send_multipart(router.recv_multipart())
"""


def wanted(*labels):
    return not WANTED or any(word in label for word in WANTED for label in labels)


def yields(*labels):
    """Say which labels a function yields, so that it need not run when none is wanted."""
    def mark(function):
        function.labels = labels
        return function
    return mark


def milliseconds(action):
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * 1000


def printed_lines():
    text = io.StringIO()
    for i in range(200_000):
        print(i, file=text)
    return text.getvalue().encode()


def round_trips(frontend, count):
    """How long `1+1` takes, from the request to reply and idle."""
    for _ in range(count):
        yield milliseconds(lambda: frontend.finish(frontend.start("1+1"), seconds=60))


@yields("kernel: start to first answer", "kernel: start to first result",
        "server: start to first 200 on /api")
def bench_interpreter(count):
    """The limit of every start: an interpreter that has imported zmq."""
    def start():
        subprocess.run([sys.executable, "-c", "import zmq"], check=True)
    for label in ("kernel: start to first answer", "kernel: start to first result",
                  "server: start to first 200 on /api"):
        yield label, milliseconds(start)


@yields("kernel: 1+1, p50", "server: 1+1, p50", "kernel: 200,000 printed lines",
        "server: 200,000 printed lines")
def bench_echo(count):
    """The limit of every exchange: the same bytes there and back, with nothing in between."""
    echo, context = Process([sys.executable, "-c", ECHO]), zmq.Context()
    try:
        dealer = context.socket(zmq.DEALER)
        dealer.connect("tcp://127.0.0.1:" + echo.wait_for(r"(\d+)\n")[1])
        parts = packed(kernel.Session("key"))
        for _ in range(count):
            trip = milliseconds(lambda: (dealer.send_multipart(parts), dealer.recv_multipart()))
            yield "kernel: 1+1, p50", trip
            yield "server: 1+1, p50", trip
        flood = milliseconds(lambda: (dealer.send(printed_lines()), dealer.recv()))
        yield "kernel: 200,000 printed lines", flood
        yield "server: 200,000 printed lines", flood
    finally:
        context.destroy(linger=0)
        echo.end()


@yields("kernel: start to first answer", "kernel: start to first result", "kernel: 1+1, p50",
        "kernel: 200,000 printed lines")
def bench_kernel(argv, count):
    """A kernel alone, over ZeroMQ."""
    began = time.perf_counter()
    process = KernelProcess(argv)
    frontend = Frontend(ZeroMQWire(process.connection))
    try:
        first = frontend.ask("kernel_info_request")
        frontend.until(lambda: first.reply, 60)
        yield "kernel: start to first answer", (time.perf_counter() - began) * 1000
        result = frontend.start("1+1")
        frontend.until(lambda: result.reply, 60)
        yield "kernel: start to first result", (time.perf_counter() - began) * 1000
        frontend.greet()
        for trip in round_trips(frontend, count):
            yield "kernel: 1+1, p50", trip
        yield "kernel: 200,000 printed lines", milliseconds(
            lambda: frontend.finish(frontend.start(PRINTS), seconds=120))
    finally:
        frontend.wire.close()
        process.end()


def answered(frontend, answer):
    frontend.until(lambda: answer.reply, 60)


def reply_times(frontend, count, msg_type, channel="shell", **content):
    for _ in range(count):
        yield milliseconds(
            lambda: answered(frontend, frontend.ask(msg_type, channel, **content)))


def interrupt_times(process, frontend, count):
    """From SIGINT to the execute_reply of a sleeping cell."""
    for _ in range(count):
        cell = frontend.start("import time\nprint('ready')\ntime.sleep(60)")
        frontend.until(lambda cell=cell: cell.text(), 60)
        yield milliseconds(lambda cell=cell: (process.interrupt(), answered(frontend, cell)))
        frontend.finish(cell)


def memory(pid, kinds="Pss"):
    """MB of a process's own share (PSS), or of what it shares with nobody, where Linux tells."""
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    if rollup.exists():
        yield sum(map(int, re.findall(rf"(?:{kinds}):\s+(\d+)", rollup.read_text()))) / 1000


@yields("kernel: idle memory, MB", "kernel: completion, p50", "kernel: SIGINT to reply", *WORK,
        "kernel: control while Python runs")
def bench_work(argv, count):
    """What a kernel does all day, over ZeroMQ."""
    process = KernelProcess(argv)
    try:
        frontend = process.connect()
        frontend.finish(frontend.start("import os, json, threading"), seconds=60)
        for megabytes in memory(process.process.pid):
            yield "kernel: idle memory, MB", megabytes
        for trip in reply_times(frontend, count, "complete_request", code="from os import ",
                                cursor_pos=15):
            yield "kernel: completion, p50", trip
        for trip in interrupt_times(process, frontend, 3):
            yield "kernel: SIGINT to reply", trip
        for label, code in WORK.items():
            yield label, milliseconds(lambda code=code: frontend.finish(
                frontend.start(code), seconds=120))
        cell = frontend.start("import time\nend = time.time() + 1\nwhile time.time() < end: pass")
        for trip in reply_times(frontend, 10, "kernel_info_request", "control"):
            yield "kernel: control while Python runs", trip
        frontend.finish(cell)
    finally:
        process.end()


@yields("kernel: a cell that allocates")
def bench_plain(count):
    """The limit of a cell that allocates: the same code in the bare interpreter."""
    for _ in range(3):
        timed = f"import time; t = time.perf_counter(); {ALLOCATE}; print(time.perf_counter() - t)"
        done = subprocess.run([sys.executable, "-c", timed], check=True, capture_output=True)
        yield "kernel: a cell that allocates", float(done.stdout) * 1000


@contextlib.contextmanager
def connected(server, kernel_id):
    frontend = server.frontend(kernel_id)
    try:
        yield frontend
    finally:
        frontend.wire.close()


def server_round_trips(server, kernel_id, count):
    with connected(server, kernel_id) as frontend:
        yield from round_trips(frontend, count)


def quick_round_trips(server, kernel_id, count):
    """The same for a client that acknowledges every TCP segment at once: many wait for 40 ms, and
    with them waits a server that leaves Nagle's algorithm on."""
    if not hasattr(socket, "TCP_QUICKACK"):
        return
    with connected(server, kernel_id) as frontend:
        client = frontend.wire.client
        receive_more = client.more

        def more(seconds):
            receive_more(seconds)
            client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

        client.more = more
        yield from round_trips(frontend, count)


LOOK = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as client:
    client.sendall(sys.argv[2].encode())
    print(client.recv(1000), flush=True)
    while client.recv(1 << 20): pass
"""


def watched_round_trips(server, kernel_id, count):
    """Round trips with a pause after each, as a person makes them, while somebody looks under the
    hood; in percent of those while nobody does."""
    handshake = "\r\n".join([
        "GET /api/trace HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Connection: Upgrade",
        "Upgrade: websocket", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", f"Authorization: token {server.token}",
        "", ""])

    def trips():
        for trip in round_trips(frontend, 2 * count):
            time.sleep(0.01)
            yield trip

    if server.get("/api/trace").status == 404:
        return
    with connected(server, kernel_id) as frontend:
        for _ in range(5):
            alone = quantile([*trips()], 0.5)
            watcher = Process([sys.executable, "-c", LOOK, str(server.port), handshake])
            watcher.wait_for("101")
            yield quantile([*trips()], 0.5) / alone * 100
            watcher.end()


def one_cell(code):
    """A measure: how long a cell takes, until all of its output has arrived."""
    def measure(server, kernel_id, count):
        with connected(server, kernel_id) as frontend:
            yield milliseconds(lambda: frontend.finish(frontend.start(code), seconds=120))
    return measure


def deliveries(clients, messages):
    """A measure: messages per second that reach the clients of one kernel, all of them together.

    One loop reads for all; it counts a word of each message, which costs next to nothing.
    """
    def measure(server, kernel_id, count):
        with contextlib.ExitStack() as stack:
            frontends = [stack.enter_context(connected(server, kernel_id)) for _ in range(clients)]
            began = time.perf_counter()
            frontends[0].start(f"for i in range({messages}): "
                               "display({'text/plain': 'tick' + chr(33)}, raw=True)")
            found, ended = read_words([f.wire.client for f in frontends], b"tick!", messages)
            if found < clients * messages:
                name = " ".join(map(str, server.process.popen.args[1:3]))
                print(f"{name} lost {clients * messages - found} of {clients * messages} messages")
            yield found / (ended - began)
    return measure


def read_words(clients, word, number):
    """Read until `word` has come that often to each of the clients, or nothing comes any more;
    returns how many came, and when the last one did."""
    found, ended = 0, time.perf_counter()
    with selectors.DefaultSelector() as selector:
        for client in clients:
            client.socket.setblocking(False)
            selector.register(client.socket, selectors.EVENT_READ, bytearray())   # last bytes
        while found < number * len(clients) and (ready := selector.select(3)):
            for key, _ in ready:
                key.data.extend(key.fileobj.recv(1 << 20))
                found += key.data.count(word)
                del key.data[:1 - len(word)]
            ended = time.perf_counter()
    return found, ended


def large_message(server, kernel_id, count):
    """From the first byte of a request of 64 MB to its reply; it is made before."""
    with connected(server, kernel_id) as frontend:
        message = frontend.session.message("kernel_info_request", {"padding": "x" * (64 << 20)})
        answer = frontend.answers[message["header"]["msg_id"]] = Answer(message)
        text = json.dumps({**message, "channel": "shell", "buffers": []}).encode()
        data = frame(TEXT, text)
        frontend.wire.client.socket.settimeout(60)
        yield milliseconds(lambda: (frontend.wire.client.socket.sendall(data),
                                    answered(frontend, answer)))


SERVER_MEASURES = {   # label -> function(server, kernel id, count of round trips)
    "server: 1+1, p50": server_round_trips,
    "server: 1+1, acknowledged at once, p50": quick_round_trips,
    "server: 1+1 under the hood, of unseen, %": watched_round_trips,
    "server: 200,000 printed lines": one_cell(PRINTS),
    "server: 100 MB of output": one_cell("for i in range(1000): print(i, 'x' * 100_000)"),
    "server: small messages, 1/s": deliveries(1, 5000),
    "server: to 50 clients, 1/s": deliveries(50, 500),
    "server: a 64 MB message to the kernel": large_message,
}


@yields("server: start to first 200 on /api", "server: new session to first result",
        *SERVER_MEASURES)
def bench_server(program, count):
    """A server and its kernel, over the WebSocket."""
    began = time.perf_counter()
    server = Server(program=program)
    try:
        wait_until(lambda: answers(server), 60)
        yield "server: start to first 200 on /api", (time.perf_counter() - began) * 1000
        began = time.perf_counter()
        session = server.post("/api/sessions", {
            "path": "x.ipynb", "name": "", "type": "notebook", "kernel": {"name": "python3"}}).json
        kernel_id = session["kernel"]["id"]
        frontend = Frontend(WebSocketWire(server, kernel_id))
        frontend.finish(frontend.start("1+1"), seconds=60)
        yield "server: new session to first result", (time.perf_counter() - began) * 1000
        frontend.wire.close()
        for label, measure in SERVER_MEASURES.items():
            for figure in measure(server, kernel_id, count) if wanted(label) else ():
                yield label, figure
        server.delete("/api/sessions/" + session["id"])
    finally:
        server.end()


@functools.cache
def run_notebook(cells, lines, picture):
    """The bytes of a notebook in which each cell has printed lines and drawn a picture (bytes)."""
    def outputs(number):
        text = [f"{number:5} {line:3} {line / 7:.12f} {number * line:9}\n" for line in range(lines)]
        return [{"output_type": "stream", "name": "stdout", "text": text},
                {"output_type": "display_data", "metadata": {}, "data": {
                    "image/png": base64.b64encode(random.randbytes(picture)).decode(),
                    "text/plain": ["<Figure size 640x480 with 1 Axes>"]}}]

    nb = notebook(*(f"plot({number})\n" for number in range(cells)))
    nb["cells"] = [{**cell, "outputs": outputs(number), "source": [cell["source"]]}
                   for number, cell in enumerate(nb["cells"])]
    return jupyter_bytes(nb)


def open_notebook(server, count):
    for _ in range(3):
        yield milliseconds(lambda: server.get("/api/contents/large.ipynb"))


def save_notebook(server, count):
    """As a page does after a cell was changed."""
    content = server.get("/api/contents/large.ipynb").json["content"]
    for number in range(3):
        content["cells"][number]["source"] += "# changed\n"
        body = json.dumps({"type": "notebook", "format": "json", "content": content})
        yield milliseconds(lambda body=body: server.put("/api/contents/large.ipynb", body))


def save_untouched_notebook(server, count):
    model = server.get("/api/contents/large.ipynb").json
    body = json.dumps({"type": "notebook", "format": "json", "content": model["content"]})
    for _ in range(3):
        yield milliseconds(lambda: server.put("/api/contents/large.ipynb", body))


def small_requests(server, count, path="/api/contents/small.ipynb", clients=8, seconds=1):
    """Requests, for a notebook of 20 cells (17 kB), that are answered in a second, on connections
    kept alive."""
    request = (f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
               f"Authorization: token {server.token}\r\n\r\n").encode()
    answered, end = 0, time.perf_counter() + seconds
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for _ in range(clients):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            selector.register(connection, selectors.EVENT_READ, bytearray())
            connection.sendall(request)
        while time.perf_counter() < end:
            for key, _ in selector.select(SECONDS):
                key.data.extend(key.fileobj.recv(1 << 16))
                head, _, body = key.data.partition(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: *(\d+)", head)
                if length and len(body) == int(length[1]):
                    answered += head.startswith(b"HTTP/1.1 200")
                    key.data.clear()
                    key.fileobj.sendall(request)
    yield answered / seconds


FILE_MEASURES = {   # label -> function(server, count)
    "files: open a 50 MB notebook": open_notebook,
    "files: save it, a cell changed": save_notebook,
    "files: save it, nothing changed": save_untouched_notebook,
    "files: small notebooks, 8 connections, 1/s": small_requests,
    "files: GET /api, 8 connections, 1/s": functools.partial(small_requests, path="/api"),
}


@yields(*FILE_MEASURES)
def bench_files(program, count):
    """A server and its files."""
    server = Server(program=program)
    try:
        wait_until(lambda: answers(server), 60)
        (server.root / "small.ipynb").write_bytes(run_notebook(20, lines=3, picture=200))
        (server.root / "large.ipynb").write_bytes(run_notebook(10_000, lines=30, picture=2500))
        time.sleep(minijupyter.Answers.TICK)   # these files were not written just now
        for label, measure in FILE_MEASURES.items():
            for figure in measure(server, count) if wanted(label) else ():
                yield label, figure
    finally:
        server.end()


@yields("memory: idle server, MB", "memory: idle server and ten kernels, MB")
def bench_memory(program, count):
    """What a server and its kernels, all idle, share with no other process."""
    def private(pid):
        return next(memory(pid, "Private_Clean|Private_Dirty"), None)

    server = Server(program=program)
    try:
        wait_until(lambda: answers(server), 60)
        alone = private(server.process.pid)
        if alone is None:
            return
        yield "memory: idle server, MB", alone
        for _ in range(10):
            kernel_id = server.post("/api/kernels", {"name": "python3"}).json["id"]
            with connected(server, kernel_id) as frontend:
                frontend.finish(frontend.start("1+1"), seconds=60)
        kernels = sum(map(private, children(server.process.pid)))
        yield "memory: idle server and ten kernels, MB", private(server.process.pid) + kernels
    finally:
        server.end()


def children(pid):
    """Yield the ids of a process's children."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                yield int(path.parent.name)


def answers(server):
    with contextlib.suppress(ConnectionRefusedError):
        return server.get("/api").status == 200


def jupyter_server(root, port, token):
    return [sys.executable, "-m", "jupyter_server", "--allow-root", "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={port}", f"--IdentityProvider.token={token}",
            "--ServerApp.open_browser=False", f"--ServerApp.root_dir={root}",
            # Without these it drops what it finds too much.
            "--ZMQChannelsWebsocketConnection.limit_rate=False",
            "--ServerApp.tornado_settings={'websocket_max_message_size': 1073741824}"]


def notebook_7(root, port, token):
    return [sys.executable, "-m", "notebook", "--allow-root", "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={port}", f"--IdentityProvider.token={token}", "--no-browser",
            "--JupyterNotebookApp.expose_app_in_browser=True", f"--ServerApp.root_dir={root}"]


BENCH_PAGES = {  # what a program calls things: its cells, its editor, its outputs, its kernel
    None: {"editor": ".cell .editor", "output": ".output", "cells": ".cell",
           "text": "document.querySelector('.cell .editor').value",
           "ready": "document.body.dataset.kernel === 'idle'",
           "run_all": "runCommand('run-all')"},
    notebook_7: {"editor": ".jp-Cell .cm-content", "output": ".jp-OutputArea-output",
                 "cells": ".jp-Cell",
                 "text": "document.querySelector('.jp-Cell .cm-content')?.textContent",
                 "ready": "[...document.querySelectorAll('.jp-Notebook-ExecutionIndicator')]"
                          ".some(i => i.dataset.status === 'idle')",
                 "run_all": "jupyterapp.commands.execute('notebook:run-all-cells')"},
}
KEY_TO_PAINT = """count => new Promise(resolve => {
    const times = [];
    addEventListener('keydown', () => {
        const pressed = performance.now();
        requestAnimationFrame(() => setTimeout(() => {
            times.push(performance.now() - pressed);
            if (times.length === count) resolve(times);
        }));
    }, true);
    console.log('listening');
})"""


LAST_LINES = "document.querySelector('.output > pre')?.lastChild.textContent"
JSON_TO_PAINT = """whole => {   // ready: the time in milliseconds, when it is on the screen
    const look = () => {
        if (!document.querySelector('.cell') || !eval(whole)) return requestAnimationFrame(look);
        const [file] = performance.getEntriesByType('resource').filter(
            ({name}) => name.includes('/api/contents/'));
        setTimeout(() => { window.ready = performance.now() - file.responseEnd });
    };
    look();
}"""
KEY_COST = """() => {   // of handlers and layout, without the wait for a frame
    window.times = [];
    let pressed;
    addEventListener('keydown', () => { pressed = performance.now() }, true);
    addEventListener('input', () => queueMicrotask(() => {
        document.body.getBoundingClientRect();
        times.push(performance.now() - pressed);
    }));
}"""
LONGEST_FRAME = """() => setTimeout(() => {   // in a moment: by then nobody watches
    let longest = 0;
    let last = performance.now();
    const frame = now => {
        longest = Math.max(longest, now - last);
        last = now;
        if (LAST_LINES?.includes('line 19999')) window.longest = longest;
        else requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
    document.querySelector('[data-command=run]').click();
}, 1000)""".replace("LAST_LINES", LAST_LINES)
BURST = """import sys, time
write = sys.stdout.write
outbox = write.__closure__[write.__code__.co_freevars.index('outbox')].cell_contents
began = time.perf_counter()
for i in range(20_000):   # each a message of its own; prints would be gathered
    outbox.publish('stream', {'name': 'stdout', 'text': f'line {i}\\n'})
    if i % 100 == 0:      # ten thousand in a second
        time.sleep(max(0, began + i / 10_000 - time.perf_counter()))
time.sleep(1)             # for the page to draw them
open('done', 'x')
"""


def bench_notebook(server, sources, outputs=()):
    """Write a notebook for the bench; returns the address of its page."""
    content = notebook(*sources, kernelspec={
        "name": "python3", "display_name": "Python 3", "language": "python"})
    content["cells"][0]["outputs"] = list(outputs)
    (server.root / "bench.ipynb").write_bytes(jupyter_bytes(content))
    return f"http://127.0.0.1:{server.port}/notebooks/bench.ipynb?token={server.token}"


class BenchPage:
    """A notebook in a new browser profile, opened from a server of ours or of theirs."""

    def __init__(self, program, server, sources, outputs=()):
        self.words = BENCH_PAGES[program]
        self.context = browser().new_context(bypass_csp=True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.began = time.perf_counter()
        self.page.goto(bench_notebook(server, sources, outputs), wait_until="commit")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.context.close()

    def until(self, condition):
        self.page.wait_for_function(f"() => {condition}")

    def type(self, text):
        """Type into the first cell, and see it there."""
        self.page.locator(self.words["editor"]).first.click()
        self.page.keyboard.type(text)
        self.until(f"({self.words['text']} ?? '').includes({json.dumps(text)})")

    def is_shown(self, text):
        return (f"[...document.querySelectorAll({json.dumps(self.words['output'])})]"
                f".some(o => o.textContent.includes({json.dumps(text)}))")


@contextlib.contextmanager
def page_server(program):
    """A server that answers, and a browser: neither's start is the page's."""
    browser()
    server = Server(program=program)
    try:
        wait_until(lambda: answers(server), 60)
        yield server
    finally:
        server.end()


def bench_page_opens(program, server):
    """From the address to the first typed character."""
    for label, count in (("page: 10 cells, to typing", 10), ("page: 1,000 cells, to typing", 1000)):
        with BenchPage(program, server, [f"x = {i}" for i in range(count)]) as page:
            page.type("# typed")
            yield label, (time.perf_counter() - page.began) * 1000


def bench_page_keys(program, server, count):
    with BenchPage(program, server, [f"x = {i}" for i in range(100)]) as page:
        page.until(page.words["ready"])
        page.type("# someone has been typing for a while")
        yield from keys_to_paint(page.page, count)


def keys_to_paint(page, count):
    with page.expect_console_message(lambda message: message.text == "listening"):
        page.evaluate(f"() => {{ window.times = ({KEY_TO_PAINT})({count}) }}")
    page.keyboard.type("a" * count, delay=30)
    for milliseconds_ in page.evaluate("() => window.times"):
        yield "page: key to paint, p50", milliseconds_


@yields("page: key to paint, p50")
def bench_bare_page(count):
    """The limit: a page with a text field and nothing else."""
    with contextlib.closing(browser().new_page()) as page:
        page.set_content("<textarea>")
        page.locator("textarea").focus()
        yield from keys_to_paint(page, count)


def bench_page_runs(program, server):
    """From Shift+Enter, or from "run all", to the last output on the page."""
    with BenchPage(program, server, ["", *["1 + 1"] * 99, "'the ' + 'end'"]) as page:
        page.until(page.words["ready"])
        page.type("for i in range(10_000): print('line', i)")
        began = time.perf_counter()
        page.page.keyboard.press("Shift+Enter")
        page.until(page.is_shown("line 9999"))
        yield "page: a cell prints 10,000 lines", (time.perf_counter() - began) * 1000
        began = time.perf_counter()
        page.page.evaluate(f"() => {{ {page.words['run_all']} }}")
        page.until(page.is_shown("the end"))
        yield "page: run all of 100 cells", (time.perf_counter() - began) * 1000


def bench_page_draws(program, server):
    """From the notebook's last byte to the picture: many cells, much output."""
    lines = {"output_type": "stream", "name": "stdout",
             "text": "".join(f"line {i}\n" for i in range(100_000))}
    sources = [f"x = {i}" for i in range(5000)]
    for label, count, outputs in (("page: 1,000 cells, JSON to paint", 1000, []),
                                  ("page: 5,000 cells, JSON to paint", 5000, []),
                                  ("page: 100,000 lines, JSON to paint", 1, [lines])):
        with BenchPage(program, server, sources[:count], outputs=outputs) as page:
            page.page.evaluate(JSON_TO_PAINT, f"{LAST_LINES}?.includes('line 99999')"
                               if outputs else f"document.querySelectorAll('.cell')[{count - 1}]")
            page.until("window.ready")
            yield label, page.page.evaluate("window.ready")


def bench_page_work(program, server, count):
    """What a key press costs in a long notebook."""
    with BenchPage(program, server, ["", *[f"x = {i}" for i in range(999)]]) as page:
        page.until(page.words["ready"])
        page.type("# someone has been typing for a while")
        page.page.evaluate(KEY_COST)
        page.page.keyboard.type("a" * count, delay=30)
        for milliseconds_ in page.page.evaluate("window.times"):
            yield "page: work of a key in 1,000 cells, p50", milliseconds_


@contextlib.contextmanager
def chromium_process(address):
    """A Chromium that shows a page. Yields a function: with it one can look at the page."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, "--headless", *BROWSER_OPTIONS, f"--user-data-dir={profile}",
             "--remote-debugging-port=0", address], stderr=subprocess.DEVNULL)
        port = Path(profile, "DevToolsActivePort")

        @contextlib.contextmanager
        def look():
            with contextlib.closing(browser().browser_type.connect_over_cdp(
                    f"http://127.0.0.1:{port.read_text().split()[0]}")) as connected:
                yield connected.contexts[0].pages[0]

        try:
            wait_until(lambda: port.exists() and port.read_text())
            yield look
        finally:
            process.terminate()
            process.wait()


def bench_page_burst(server):
    """Who watches a page hears of each WebSocket message too, at a greater cost than the page's
    own work: so nobody looks while the messages come."""
    address = bench_notebook(server, [BURST, *[f"x = {i}" for i in range(999)]])
    with chromium_process(address) as look:
        with look() as page:
            page.wait_for_function(f"() => {BENCH_PAGES[None]['ready']}")
            page.evaluate(LONGEST_FRAME)
        wait_until((server.root / "done").exists)
        with look() as page:
            page.wait_for_function("() => window.longest")
            yield "page: longest frame at 10,000 messages/s", page.evaluate("window.longest")


@yields("page: 1,000 cells, JSON to paint", "page: 5,000 cells, JSON to paint",
        "page: 100,000 lines, JSON to paint", "page: work of a key in 1,000 cells, p50",
        "page: longest frame at 10,000 messages/s")
def bench_big_page(program, count):
    """Big work in the page, which has its targets in milliseconds."""
    with page_server(program) as server:
        yield from bench_page_draws(program, server)
        yield from bench_page_work(program, server, count)
        yield from bench_page_burst(server)


@yields("page: 10 cells, to typing", "page: 1,000 cells, to typing", "page: key to paint, p50",
        "page: a cell prints 10,000 lines", "page: run all of 100 cells")
def bench_page(program, count):
    """What a user of the page waits for, in Chromium with a new profile."""
    with page_server(program) as server:
        yield from bench_page_opens(program, server)
        yield from bench_page_keys(program, server, count)
        yield from bench_page_runs(program, server)


BENCHES = [  # column, needed module, function, its arguments before the count of round trips
    ("limit", None, bench_interpreter),
    ("limit", None, bench_echo),
    ("limit", None, bench_plain),
    ("limit", "playwright", bench_bare_page),
    ("ours", None, bench_kernel, kernel.command()),
    ("theirs", "ipykernel", bench_kernel, IPYKERNEL),
    ("ours", None, bench_work, kernel.command()),
    ("theirs", "ipykernel", bench_work, IPYKERNEL),
    ("ours", None, bench_server, None),
    ("theirs", "jupyter_server", bench_server, jupyter_server),
    ("ours", None, bench_files, None),
    ("theirs", "jupyter_server", bench_files, jupyter_server),
    ("ours", None, bench_memory, None),
    ("theirs", "jupyter_server", bench_memory, jupyter_server),
    ("ours", "playwright", bench_page, None),
    ("theirs", "notebook", bench_page, notebook_7),
    ("ours", "playwright", bench_big_page, None),
]


def bench(words):
    """Let all contenders take turns, then print the table."""
    is_quick = "quick" in words
    WANTED[:] = [word for word in words if word != "quick"]
    samples = {}  # label -> column -> figures
    for _ in range(2 if is_quick else 5):
        for column, needed, function, *arguments in BENCHES:
            if wanted(*function.labels) and (not needed or importlib.util.find_spec(needed)):
                for label, value in function(*arguments, 20 if is_quick else 60):
                    samples.setdefault(label, {}).setdefault(column, []).append(value)
    print_table({label: figures for label, figures in samples.items() if wanted(label)})


def print_table(samples):
    print(f"{'medians':44}{'unit':>5}{'limit':>9}{'ours':>9}{'theirs':>9}{'better by':>11}")
    for label, columns in samples.items():
        show_row(label, columns, 0.5)
        if label.endswith("p50"):
            show_row(label.replace("p50", "p99"), columns, 0.99)


def show_row(label, columns, share):
    """A line of the table. Ours is better by a factor: what takes less, or does more a second."""
    has_unit = label.endswith(("MB", "1/s", "%"))
    name, _, unit = label.rpartition(", ") if has_unit else (label, "", "ms")
    figures = {column: quantile(values, share) for column, values in columns.items()}
    shown = "".join(f"{figures[c]:9,.{1 if figures[c] < 1000 else 0}f}" if c in figures
                    else f"{'-':>9}" for c in ("limit", "ours", "theirs"))
    factor = ""
    if {"ours", "theirs"} <= figures.keys():
        ratio = figures["theirs"] / figures["ours"]
        factor = f"{1 / ratio if unit == '1/s' else ratio:.2f} x"
    print(f"{name:44}{unit:>5}{shown}{factor:>11}")


def quantile(values, share):
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


# ---- 12. main ----------------------------------------------------------------


def give_up(signum, frame):
    raise TimeoutError(f"this test takes longer than {MOST_SECONDS} s")


class Result(unittest.TestResult):
    """Prints each promise as it is kept or broken, and counts them."""

    def __init__(self):
        super().__init__()
        self.passed, self.broken, self.skips = 0, {}, []
        self.began = time.monotonic()

    def startTest(self, test):
        super().startTest(test)
        self.started = time.monotonic()
        if hasattr(signal, "alarm"):
            signal.alarm(MOST_SECONDS)

    def stopTest(self, test):
        mark = "FAILED" if str(test) in self.broken else "ok"
        if not self.skips or self.skips[-1][0] != str(test):
            sentence = test._testMethodName.removeprefix("test_").replace("_", " ")
            seconds = time.monotonic() - self.started
            print(f"{mark:6} {type(test).__name__}: {sentence} ({seconds:.2f} s)", flush=True)
        super().stopTest(test)

    def addSuccess(self, test):
        self.passed += str(test) not in self.broken

    def addError(self, test, error):
        self.broken.setdefault(str(test), []).append(self._exc_info_to_string(error, test))

    addFailure = addError

    def addSubTest(self, test, subtest, error):
        if error:
            text = f"{subtest._subDescription()}\n{self._exc_info_to_string(error, test)}"
            self.broken.setdefault(str(test), []).append(text)

    def addSkip(self, test, reason):
        self.skips.append((str(test), reason))
        print(f"skip   {test}: {reason}", flush=True)
        if REQUIRE_ALL and reason.startswith("needs"):
            self.broken[str(test)] = [f"skipped, though REQUIRE_ALL=1: {reason}"]

    def add(self, passed, broken, skips):
        """Take in what another process has found."""
        self.passed += passed
        self.broken.update(broken)
        self.skips += skips

    def report(self):
        for name, texts in self.broken.items():
            print(f"\n---- {name} " + "-" * max(0, 80 - len(name)))
            print("\n".join(texts))
        skipped = len([name for name, _ in self.skips if name not in self.broken])
        print(f"\n{time.monotonic() - self.began:.0f} s")
        print(f"{self.passed} passed, {len(self.broken)} failed"
              + (f", {skipped} skipped" if skipped else ""))
        return 1 if self.broken else 0


class Queue(unittest.TestSuite):
    """The classes of tests, of which each of several processes takes the next one that is left."""

    _cleanup = False   # unittest need not forget what has run: each comes once

    def __init__(self, suites):
        super().__init__(suites)
        self.numbers, end = os.pipe()
        with open(end, "wb") as numbers:
            numbers.write(bytes(range(len(suites))))

    def __iter__(self):
        while number := os.read(self.numbers, 1):
            yield self._tests[number[0]]


def run_in_worker(queue):
    """Run tests from the queue in a process of its own; returns (its id, file of its findings)."""
    findings, end = os.pipe()
    if pid := os.fork():
        os.close(end)
        return pid, open(findings)
    result = Result()
    queue.run(result)
    with open(end, "w") as file:
        json.dump([result.passed, result.broken, result.skips], file)
    sys.exit()


def chosen_tests(names):
    """A suite for each class that has tests whose name contains one of `names`, or any test."""
    suites = []
    for case in [c for c in globals().values()
                 if isinstance(c, type) and issubclass(c, unittest.TestCase)]:
        methods = [name for name in vars(case) if name.startswith("test")]
        tests = [case(name) for name in methods if not names or any(
            word.lower() in f"{case.__name__}.{name}".lower() for word in names)]
        if tests:
            suites.append(unittest.TestSuite(tests))
    return suites


def run_tests(suites):
    """Run the suites, several in two processes; returns the Result."""
    result, queue = Result(), Queue(suites)
    if len(suites) == 1 or not hasattr(os, "fork"):
        queue.run(result)
        return result
    workers = dict(run_in_worker(queue) for _ in range(WORKERS))
    try:
        for pid, findings in workers.items():
            with findings:
                text = findings.read()
            result.add(*(json.loads(text) if text else (0, {f"process {pid}": ["died"]}, [])))
    except KeyboardInterrupt:
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
        raise
    finally:
        for pid in workers:
            os.waitpid(pid, 0)
    return result


def main(names):
    """Run the benchmark, the parts alone, the tests whose name contains one of `names`, or all."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if names[:1] == ["bench"]:
        return bench(names[1:])
    if names == ["core"]:
        names = [f"{case.__name__}." for case in CORE]
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, give_up)
    return run_tests(chosen_tests(names)).report()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
