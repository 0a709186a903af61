#!/usr/bin/env python3
"""The kernel: a process of its own that runs Python code for any Jupyter client.

Run:  python kernel.py -f CONNECTION_FILE      (a server or a console writes the file and starts it)

    client  -- execute_request -->  shell    ROUTER   requests, answered one by one
            -- interrupt, stop -->  control  ROUTER   the same, but answered while a cell runs
            <- input_request ----   stdin    ROUTER   the kernel asks the person a question
            <- stream, result ---   iopub    XPUB     what everybody sees
            -- ping, pong ------->  heartbeat ROUTER  is the process alive?

Sections: 1 The wire · 2 Display · 3 Output · 4 The interpreter · 5 Magics · 6 Other people's
modules · 7 The kernel · 8 main

Of a cell's journey it holds stations 4 to 10: `Session.unpack` verifies the request,
`Kernel.dispatch` finds its handler, `Kernel.execute_request` counts, `Interpreter.run` runs,
`Stream.write` carries what is printed, `Display.result` shows the value, `Kernel.finish` replies.

Left out on purpose: IPython. What notebooks use of it every day (`!command`, a few magics, display)
is here; when the real one is installed and imported, its display functions speak through us.

Threads: *main* runs the user's code, one cell at a time, inside one asyncio loop, so that tasks go
on between cells and a SIGINT reaches the code; *io* owns every socket but the heartbeat's and
waits for them, for the outbox and for the pipes behind descriptors 1 and 2; *helper* answers
questions about code; *heartbeat* echoes without Python. Sources: the Jupyter messaging
specification 5.5, https://jupyter-client.readthedocs.io/en/stable/messaging.html, and Python's own
documentation.
"""
import ast
import base64
import builtins
import codecs
import collections
import contextlib
import contextvars
import hashlib
import hmac
import importlib.util
import io
import itertools
import json
import linecache
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
import types

try:
    import zmq
except ImportError:
    sys.exit("The kernel needs pyzmq: run `pip install pyzmq`.")

__version__ = "0.1.0"
PROTOCOL_VERSION = "5.5"


# ---- 1. The wire: signed messages -------------------------------------------------------------
#
# A Jupyter message is four JSON objects: header (who, when, which type), parent_header (the header
# of the request that caused it), metadata and content; raw buffers may follow. On a ZeroMQ socket
# it is
#
#     [*identities, b"<IDS|MSG>", signature, header, parent_header, metadata, content, *buffers]
#
# The signature is an HMAC over the exact bytes of the four JSON parts: whoever does not have the
# key from the connection file can neither forge a message nor send an old one again. Nothing here
# knows a socket; the server uses the same class.

DELIMITER = b"<IDS|MSG>"
MOST_SIGNATURES = 65_536   # how many are remembered against replay; jupyter_client keeps as many


class BadMessage(ValueError):
    """The parts are no message of ours: forged, replayed, truncated or not JSON."""


class Session:
    """Signs, packs and unpacks the messages of one process. It may be used from several threads.

    `key` is the secret of the connection file (str or bytes); an empty key means unsigned.
    """

    def __init__(self, key, session=None, username="kernel", scheme="hmac-sha256"):
        key = key.encode() if isinstance(key, str) else key
        digest = getattr(hashlib, scheme.removeprefix("hmac-"))
        self.hmac = hmac.new(key, digestmod=digest) if key else None
        self.session = session or os.urandom(16).hex()
        self.username = username
        self.numbers = itertools.count(1)
        self.seen = {}   # signature -> None, oldest first

    def message(self, msg_type, content, parent_header=None, metadata=None, buffers=()):
        """A new message as a dict, with a header of its own."""
        now = time.time()
        date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}Z"
        header = {
            # The process id keeps the ids of a forked child apart from its parent's.
            "msg_id": f"{self.session}_{os.getpid()}_{next(self.numbers)}",
            "msg_type": msg_type, "session": self.session, "username": self.username,
            "date": date, "version": PROTOCOL_VERSION,
        }
        return {"header": header, "parent_header": parent_header or {},
                "metadata": metadata or {}, "content": content, "buffers": list(buffers)}

    def sign(self, frames):
        """The signature of the four JSON parts: lowercase hex, or b"" when unsigned."""
        if self.hmac is None:
            return b""
        digest = self.hmac.copy()
        for frame in frames:
            digest.update(frame)
        return digest.hexdigest().encode()

    def pack(self, message):
        """The parts of `message`, signed, behind its `identities` if it has any."""
        frames = [to_json(message[name])
                  for name in ("header", "parent_header", "metadata", "content")]
        return [*message.get("identities", ()), DELIMITER, self.sign(frames), *frames,
                *message.get("buffers", ())]

    def unpack(self, parts):
        """The message in `parts`, verified; raises BadMessage for anything else."""
        identities, frames, buffers = self.verify(parts)
        # Journey 4: the signature fits the bytes that arrived; only now are they read as JSON.
        try:
            header, parent_header, metadata, content = (json.loads(bytes(f)) for f in frames)
        except ValueError as problem:
            raise BadMessage(f"not JSON: {problem}") from None
        if not all(isinstance(p, dict) for p in (header, parent_header, metadata, content)):
            raise BadMessage("header, parent_header, metadata and content must be JSON objects")
        if not isinstance(header.get("msg_type"), str) or not isinstance(header.get("msg_id"), str):
            raise BadMessage("the header has no msg_type or no msg_id")
        return {"identities": identities, "header": header, "parent_header": parent_header,
                "metadata": metadata, "content": content, "buffers": buffers}

    def verify(self, parts):
        """(identities, the four JSON parts, buffers) of signed parts; raises BadMessage."""
        try:
            start = parts.index(DELIMITER)
        except ValueError:
            raise BadMessage("no delimiter <IDS|MSG>") from None
        if len(parts) < start + 6:
            raise BadMessage(f"truncated: {len(parts) - start - 1} parts after the delimiter")
        signature, frames = bytes(parts[start + 1]), parts[start + 2:start + 6]
        if self.hmac is not None:
            if not hmac.compare_digest(signature, self.sign(frames)):
                raise BadMessage("the signature does not fit")
            self.refuse_replay(signature)
        return parts[:start], frames, parts[start + 6:]

    def refuse_replay(self, signature):
        """Remember a verified signature; raises BadMessage when it has been here before.

        Verified first, remembered second: otherwise anybody could flush the memory with junk.
        """
        if signature in self.seen:
            raise BadMessage("replayed")
        self.seen[signature] = None
        if len(self.seen) > MOST_SIGNATURES:
            del self.seen[next(iter(self.seen))]


def plain(value):
    """`value`, which JSON does not know, as something that it does."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    for attribute, convert in (("isoformat", lambda v: v.isoformat()), ("__index__", int),
                               ("__float__", float), ("__iter__", list)):
        if hasattr(value, attribute):
            return convert(value)
    raise TypeError(f"{type(value).__name__} cannot be sent as JSON")


encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"),
                               default=plain).encode


def to_json(value):
    """`value` as UTF-8 JSON that every language can read."""
    try:
        return encode_json(value).encode()
    except ValueError:   # NaN or Infinity, which JSON has not, or half a surrogate pair
        return json.dumps(without_nan(value), default=plain).encode()


def without_nan(value):
    """`value` with NaN and the infinities replaced by their names."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return value


# ---- 2. Display: a value as a MIME bundle -----------------------------------------------------
#
# A value is shown as a MIME bundle: the same thing in several formats, {"text/plain": …,
# "text/html": …}, of which the frontend draws the richest that it knows. A class takes part by
# having methods such as `_repr_html_`; a class that cannot be changed gets a row in FORMATTERS.

REPR_METHODS = {   # method -> MIME type of what it returns
    "_repr_html_": "text/html",
    "_repr_markdown_": "text/markdown",
    "_repr_svg_": "image/svg+xml",
    "_repr_png_": "image/png",
    "_repr_jpeg_": "image/jpeg",
    "_repr_latex_": "text/latex",
    "_repr_json_": "application/json",
    "_repr_javascript_": "application/javascript",
    "_repr_pdf_": "application/pdf",
}
FORMATTERS = {}    # (module, class name) -> {MIME type: function of the value}
LINE_WIDTH = 79    # as in IPython: a longer container is broken into lines
MOST_ITEMS = 1000  # as in IPython: of a longer container the first ones are shown
BRACKETS = {list: "[]", tuple: "()", dict: "{}", set: "{}", frozenset: ("frozenset({", "})")}


def pretty(value, indent=0, inside=()):
    """`repr(value)`, but with long containers one item a line and sets in order."""
    if type(value) not in BRACKETS or not value:
        return repr(value)
    opening, closing = BRACKETS[type(value)]
    if id(value) in inside:
        return f"{opening}...{closing}"
    column, inside = indent + len(opening), (*inside, id(value))
    texts = []
    for item in itertools.islice(in_order(value), MOST_ITEMS):
        if isinstance(value, dict):
            key = pretty(item, column, inside) + ": "
            texts.append(key + pretty(value[item], column + len(key), inside))
        else:
            texts.append(pretty(item, column, inside))
    if len(value) > MOST_ITEMS:
        texts.append("...")
    comma = "," if type(value) is tuple and len(value) == 1 else ""
    line = opening + ", ".join(texts) + comma + closing
    if indent + len(line) <= LINE_WIDTH and "\n" not in line:
        return line
    return opening + (",\n" + " " * column).join(texts) + comma + closing


def in_order(container):
    """The items of a container; a set's are sorted when they can be."""
    if isinstance(container, (set, frozenset)):
        try:
            return sorted(container)
        except TypeError:
            pass
    return container


def show_failure(method):
    """Say on stderr why a `_repr_…_` method failed; the other formats are still shown."""
    sys.stderr.write(f"{method} failed:\n" + "\n".join(format_error(sys.exc_info()[1])) + "\n")


def call_repr(value, method, mime):
    """(data, metadata) from `value.method()`, both {} when it has nothing to say."""
    try:
        data = getattr(value, method)()
    except Exception:
        show_failure(f"{type(value).__name__}.{method}")
        return {}, {}
    metadata = {}
    if isinstance(data, tuple) and len(data) == 2:
        data, about = data
        metadata = {mime: about} if about else {}
    return ({}, {}) if data is None else ({mime: data}, metadata)


def call_mimebundle(value):
    """(data, metadata) from `value._repr_mimebundle_()`, both {} when it has nothing to say."""
    try:
        bundle = value._repr_mimebundle_(include=None, exclude=None)
    except Exception:
        show_failure(f"{type(value).__name__}._repr_mimebundle_")
        return {}, {}
    data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
    return dict(data or {}), dict(metadata or {})


def has_reprs(value):
    """False for classes, whose methods want an instance, and for objects that answer any name."""
    return not isinstance(value, type) and not hasattr(value, "_no_object_has_this_name_")


def formatters_for(value):
    """{MIME type: function} of the nearest class that has a row in FORMATTERS."""
    for cls in type(value).__mro__:
        found = FORMATTERS.get((cls.__module__, cls.__qualname__))
        if found:
            return found
    return {}


def mime_bundle(value):
    """(data, metadata): every format of `value`, always with text/plain; bytes are base64."""
    data, metadata = {}, {}
    for mime, function in formatters_for(value).items():
        data[mime] = function(value)
    if has_reprs(value):
        if hasattr(value, "_repr_mimebundle_"):
            more, about = call_mimebundle(value)
            data, metadata = {**more, **data}, {**about, **metadata}
        for method, mime in REPR_METHODS.items():
            if mime not in data and hasattr(value, method):
                more, about = call_repr(value, method, mime)
                data.update(more)
                metadata.update(about)
    if "text/plain" not in data:
        try:
            data["text/plain"] = pretty(value)
        except RecursionError:
            data["text/plain"] = repr(value)
    return {mime: plain(d) if isinstance(d, bytes) else d for mime, d in data.items()}, metadata


class Display:
    """`display()` and its family. `publish(msg_type, content)` sends a message on iopub."""

    def __init__(self, publish):
        self.publish = publish

    def display(self, *values, display_id=None, raw=False, metadata=None, transient=None,
                clear=False, update=False, include=None, exclude=None, **ignored):
        """Show each value; with `display_id` (True for a new one) return a handle to change it."""
        if display_id is True:
            display_id = os.urandom(16).hex()
        if clear:
            self.clear_output(wait=True)
        for value in values:
            if not raw and self.shows_itself(value):
                continue
            data, about = (value, {}) if raw else mime_bundle(value)
            data = {mime: data[mime] for mime in data
                    if (not include or mime in include) and (not exclude or mime not in exclude)}
            self.publish_display_data(data, {**about, **(metadata or {})}, update=update,
                                      transient=with_id(transient, display_id))
        return DisplayHandle(self, display_id) if display_id else None

    def publish_display_data(self, data, metadata=None, transient=None, update=False, **ignored):
        """Send a finished MIME bundle as `display_data` or `update_display_data`."""
        self.publish("update_display_data" if update else "display_data",
                     {"data": data, "metadata": metadata or {}, "transient": transient or {}})

    def update_display(self, value, *, display_id, **options):
        """Replace what was shown under `display_id`, wherever it stands."""
        self.display(value, display_id=display_id, update=True, **options)

    def clear_output(self, wait=False):
        """Empty the cell's output, at once or when the next output comes."""
        self.publish("clear_output", {"wait": bool(wait)})

    def shows_itself(self, value):
        """True when `value._ipython_display_()` did all there is to do."""
        if not has_reprs(value) or not hasattr(value, "_ipython_display_"):
            return False
        try:
            value._ipython_display_()
        except Exception:
            show_failure(f"{type(value).__name__}._ipython_display_")
            return False
        return True

    def result(self, value, execution_count):
        """Send the value of a cell's last expression."""
        if self.shows_itself(value):
            return
        # Journey 9: the value becomes a MIME bundle and leaves as `execute_result`.
        data, metadata = mime_bundle(value)
        self.publish("execute_result", {"data": data, "metadata": metadata,
                                        "execution_count": execution_count})


def with_id(transient, display_id):
    """The `transient` dict of a display: what is not kept in the notebook's file."""
    return {**(transient or {}), **({"display_id": display_id} if display_id else {})}


class DisplayHandle:
    """What `display(…, display_id=…)` returns: a place that can be shown again or changed."""

    def __init__(self, display, display_id):
        self.owner, self.display_id = display, display_id

    def display(self, value, **options):
        self.owner.display(value, display_id=self.display_id, **options)

    def update(self, value, **options):
        self.owner.update_display(value, display_id=self.display_id, **options)

    def __repr__(self):
        return f"<DisplayHandle display_id={self.display_id}>"


# ---- 3. Output: everything on its way out, in one queue ---------------------------------------
#
# The order of output is the order in which things enter one queue, the outbox: printed text from
# any thread, results, replies, status. Printing must cost next to nothing, so `Stream.write`
# appends a tuple and returns; the io thread joins neighbouring texts of one stream and one parent
# into one message. The first text goes out at once, the rest every FLUSH_SECONDS, and a message
# takes along all that was said before it; so nothing is ever said after the `idle` that it belongs
# before.

FLUSH_SECONDS = 0.03        # a person sees 30 updates a second as flowing
MOST_WAITING = 200_000      # entries; a thread that prints faster than they can be sent waits
MOST_TEXT = 1 << 20         # characters in one stream message, for the browser's sake
STREAMS = ("stdout", "stderr")
SILENT = {}                 # the parent_header of a silent request: known by identity, never sent


class Outbox:
    """The queue of everything that will leave the process; any thread may put, io takes."""

    def __init__(self, session):
        self.session = session
        # (channel, None, parts) of messages, or ("stdout" | "stderr", parent_header, text)
        self.queue = collections.deque()
        self.parent = contextvars.ContextVar("parent_header")
        self.latest = {}                   # the parent of threads that inherited none
        self.is_asleep = False             # io waits without a time limit
        self.is_urgent = False             # something else than text is waiting
        self.last_flush = 0.0
        self.wake_receiver, self.wake_sender = socket.socketpair()
        self.wake_receiver.setblocking(False)
        self.wake_sender.setblocking(False)

    def put(self, channel, message):
        """Queue a message. It is packed here: what cannot be sent fails where it was said."""
        self.queue.append((channel, None, self.session.pack(message)))
        self.is_urgent = True
        self.wake()

    def publish(self, msg_type, content, parent=None, metadata=None, buffers=()):
        """Queue a message for iopub, below the running request unless a parent is given."""
        parent = self.parent.get(self.latest) if parent is None else parent
        if parent is SILENT:
            return
        message = self.session.message(msg_type, content, parent, metadata, buffers)
        message["identities"] = [f"kernel.{self.session.session}.{msg_type}".encode()]
        self.put("iopub", message)

    def write(self, name, parent, text):
        """Queue text for a stream. Half the cost of a print is here, so it does no more."""
        self.queue.append((name, parent, text))
        if self.is_asleep:
            self.wake()
        elif len(self.queue) > MOST_WAITING:
            self.wait_for_room()

    def wake(self):
        """End the io thread's sleep. A full pipe is a wake-up that is already on its way."""
        self.is_asleep = False
        with contextlib.suppress(BlockingIOError):
            self.wake_sender.send(b"\0")

    def wait_for_room(self):
        """Hold a thread that floods; in short sleeps, so that it can be interrupted."""
        while len(self.queue) > MOST_WAITING // 2 and threading.current_thread().name != "io":
            self.wake()
            time.sleep(0.001)

    def rest(self):
        """Milliseconds that io may wait before the next `take`; None when nothing is queued."""
        self.is_asleep = True   # before the look: what is put after the look will wake us
        if not self.queue:
            return None
        self.is_asleep = False
        if self.is_urgent:
            return 0
        return max(0, int((self.last_flush + FLUSH_SECONDS - time.monotonic()) * 1000))

    def take(self):
        """All that is due, as a list of (channel, parts), neighbouring text joined."""
        try:
            while self.wake_receiver.recv(4096):
                pass
        except BlockingIOError:
            pass
        due = self.last_flush + FLUSH_SECONDS <= time.monotonic()
        if not (self.is_urgent or due):
            return []
        self.is_urgent = False
        entries = [self.queue.popleft() for _ in range(len(self.queue))]
        return list(self.joined(entries))

    def joined(self, entries):
        """(channel, parts) of each entry, with the texts of equal neighbours as one message."""
        entries.append((None, None, None))   # so that the last text has an end, too
        texts, of, below = [], None, None
        for where, parent, payload in entries:
            if texts and (where is not of or parent is not below):
                yield from self.streams(of, below, "".join(texts))
                texts = []
            if where in STREAMS:
                of, below = where, parent
                texts.append(payload)
            elif where:
                yield where, payload

    def streams(self, name, parent, text):
        """`stream` messages of a bounded size; none below a silent request."""
        self.last_flush = time.monotonic()
        for start in range(0, len(text) if parent is not SILENT else 0, MOST_TEXT):
            message = self.session.message(
                "stream", {"name": name, "text": text[start:start + MOST_TEXT]}, parent)
            message["identities"] = [f"stream.{name}".encode()]
            yield "iopub", self.session.pack(message)


class Stream(io.TextIOBase):
    """`sys.stdout` or `sys.stderr` of the user's code."""

    encoding, errors, line_buffering = "utf-8", "replace", True

    def __init__(self, name, outbox, descriptor):
        self.name, self.outbox, self.descriptor = name, outbox, descriptor
        self.is_child = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: setattr(self, "is_child", True))
        self.buffer = io.FileIO(descriptor, "w", closefd=False)   # sys.stdout.buffer

    def write(self, text):
        # Journey 8: printed text joins the outbox under the parent header of its cell, as `stream`.
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if self.is_child:
            # A forked child has no io thread: its text goes through the pipe to the parent's.
            self.buffer.write(text.encode(self.encoding, self.errors))
        elif text:
            outbox = self.outbox
            outbox.write(self.name, outbox.parent.get(outbox.latest), text)
        return len(text)

    def writable(self):
        return True

    def fileno(self):
        """The captured descriptor, so that `subprocess.run(…, stdout=sys.stdout)` is seen."""
        return self.descriptor


class Descriptor:
    """Descriptor 1 or 2 of the process, led into the outbox: children and C code print there.

    Whoever calls `drain` reads what has arrived, without waiting: the io thread when the pipe
    becomes readable, the main thread at a cell's end, before `idle`.
    """

    def __init__(self, descriptor, name, outbox):
        self.name, self.outbox = name, outbox
        self.original = os.dup(descriptor)
        self.pipe, write_end = os.pipe()
        os.dup2(write_end, descriptor)
        os.close(write_end)
        os.set_blocking(self.pipe, False)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.lock = threading.Lock()

    def drain(self):
        with self.lock:
            for _ in range(16):   # 1 MiB, more than a pipe holds: a flood cannot keep us here
                try:
                    data = os.read(self.pipe, 1 << 16)
                except BlockingIOError:
                    return   # empty
                text = self.decoder.decode(data)
                if text:
                    self.outbox.write(self.name, self.outbox.latest, text)


def flush_c_output():
    """Make C's stdio give what it has buffered to the descriptors, if ctypes can be had."""
    try:
        import ctypes
        ctypes.CDLL(None).fflush(None)
    except (ImportError, OSError, AttributeError, TypeError):
        pass   # no C library to ask on this system: C's text comes when its buffer is full


def inherit_context():
    """Let a new thread inherit its starter's context: its output belongs to that cell."""
    start = threading.Thread.start

    def start_with_context(thread):
        context, run = contextvars.copy_context(), thread.run
        thread.run = lambda: context.run(run)
        start(thread)

    threading.Thread.start = start_with_context


# ---- 4. The interpreter: run a cell (knows no socket) -----------------------------------------
#
# A cell is not a file: its last expression is shown, `await` stands at the top level, and its
# source lives in no file although tracebacks must quote it. So a cell is parsed once, split into a
# body and a last expression, each compiled under a made-up file name which `linecache` knows.

COROUTINE = 0x80      # inspect.CO_COROUTINE: the code must be awaited
FUTURES = 0x1FF0000   # the bits of `from __future__ import …`, which hold for all later cells
RED, GREEN, CYAN, DIM, BOLD, PLAIN = (
    f"\x1b[{code}m" for code in ("31", "32", "36", "2", "1", "0"))
FRAMES_SHOWN = 6      # of a deep recursion, at either end


def split_cell(tree):
    """(body, last): the statements of a module and its last expression, or None."""
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        *body, last = tree.body
        return (ast.Module(body, tree.type_ignores) if body else None), ast.Expression(last.value)
    return tree, None


def is_muted(code):
    """True when the cell ends in `;`, which mutes its value; comments may follow it."""
    if ";" not in code.rstrip().rpartition("\n")[2]:
        return False
    import tokenize
    last = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE,
                                  tokenize.ENDMARKER):
                last = token.string
    except (tokenize.TokenError, SyntaxError):   # the cell has `!ls;` or the like in it
        return code.rstrip().endswith(";")
    return last == ";"


def is_complete(code):
    """(status, indent) for a console that asks whether Enter should run the cell.

    `complete`, `invalid`, or `incomplete` with the indentation of the next line. A block is
    complete when an empty line ends it.
    """
    import codeop
    import warnings
    lines = code.split("\n")
    compiler = codeop.CommandCompiler()
    compiler.compiler.flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    if code.startswith("%%"):
        return ("complete" if lines[-1] == "" and len(lines) > 1 else "incomplete"), ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ready = compiler(translate(code), "<is_complete>", "exec")
    except (SyntaxError, OverflowError, ValueError):
        return "invalid", ""
    last = lines[-1]
    indent = last[:len(last) - len(last.lstrip())] + ("    " if last.rstrip().endswith(":") else "")
    in_block = bool(last.strip()) and last[:1] in " \t"
    return ("complete", "") if ready and not in_block else ("incomplete", indent)


def format_error(error):
    """The traceback of `error` as coloured lines, without the frames of this file."""
    lines, seen = [], set()
    chain = []   # (exception, how it led to the one before it)
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if error.__cause__ is not None:
            chain.append((error, "The above exception was the direct cause of the following one:"))
            error = error.__cause__
        else:
            chain.append((error, "During handling of the above exception, another one occurred:"))
            error = None if error.__suppress_context__ else error.__context__
    for number, (one, _) in enumerate(reversed(chain)):
        if number:
            lines += ["", chain[len(chain) - number - 1][1], ""]
        lines += format_one(one)
    return lines


def format_one(error):
    """One exception without its causes: frames, then the last line."""
    import traceback
    entries = [entry for entry in traceback.extract_tb(error.__traceback__)
               if entry.filename != __file__]
    if isinstance(error, SyntaxError):
        summary = [f"{CYAN}{place(error.filename or '', error.lineno or 0)}{PLAIN}\n"]
        summary += traceback.format_exception_only(type(error), error)[1:]
        entries = [entry for entry in entries if entry.filename != error.filename]
    else:
        summary = traceback.format_exception_only(type(error), error)
    lines = [f"{RED}{'-' * LINE_WIDTH}{PLAIN}"]
    for number, entry in enumerate(entries):
        if FRAMES_SHOWN <= number < len(entries) - FRAMES_SHOWN:
            if number == FRAMES_SHOWN:
                lines.append(f"{DIM}… {len(entries) - 2 * FRAMES_SHOWN} frames left out …{PLAIN}")
            continue
        lines += format_frame(entry)
    before, name, message = "".join(summary).rstrip("\n").rpartition(type(error).__name__)
    lines += f"{before}{BOLD}{RED}{name}{PLAIN}{message}".split("\n")
    if hasattr(error, "exceptions"):   # an exception group: Python's own drawing of its members
        lines += "".join(traceback.format_exception(error)).rstrip().split("\n")
    return lines


def place(filename, line):
    """`Cell In[3], line 2` or `File /x/y.py, line 2`: what a person calls the spot."""
    if filename.startswith("<In["):
        return f"Cell {filename[1:].split(']')[0]}], line {line}"
    return f"File {filename}, line {line}"


def format_frame(entry):
    """One frame: where it is, and its line; in a cell two more on either side."""
    around = 2 if entry.filename.startswith("<In[") else 0
    where = "" if entry.name == "<module>" else f", in {entry.name}"
    lines = [f"{CYAN}{place(entry.filename, entry.lineno)}{GREEN}{where}{PLAIN}"]
    for number in range(entry.lineno - around, entry.lineno + around + 1):
        text = linecache.getline(entry.filename, number).rstrip("\n")
        if number == entry.lineno:
            lines.append(f"{GREEN}----> {number}{PLAIN} {underlined(entry, text)}")
        elif text:
            lines.append(f"{DIM}{number:7d}{PLAIN} {text}")
    return lines


def underlined(entry, text):
    """The line with the failing expression underlined (Python 3.11 and later know its columns)."""
    start, end = getattr(entry, "colno", None), getattr(entry, "end_colno", None)
    if start is None or end is None or getattr(entry, "end_lineno", 0) != entry.lineno:
        return text
    raw = text.encode()   # the columns count UTF-8 bytes
    before, middle, after = (part.decode("utf-8", "replace")
                             for part in (raw[:start], raw[start:end], raw[end:]))
    if not middle.strip() or not before.strip() and not after.strip():
        return text
    return f"{before}\x1b[4m{middle}\x1b[24m{after}"


class Interpreter:
    """Python, as a kernel sees it. A kernel for another language brings another one of these.

    `publish(msg_type, content)` sends on iopub; `execute` returns the content of `execute_reply`.
    """

    implementation = "minijupyter"
    banner = f"MiniJupyter's kernel {__version__}, Python {sys.version}"
    language_info = {
        "name": "python", "version": sys.version.split()[0], "mimetype": "text/x-python",
        "file_extension": ".py", "pygments_lexer": "ipython3", "nbconvert_exporter": "python",
        "codemirror_mode": {"name": "ipython", "version": 3},
    }

    def __init__(self, publish):
        self.publish = publish
        self.display = Display(publish)
        self.execution_count = 0
        self.serial = itertools.count(1)   # one for every cell ever compiled, shown or not
        self.flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        self.after_cell = []               # functions without arguments, called when a cell is done
        self.was_cancelled = False         # the kernel has ended the cell's await: an interrupt
        module = types.ModuleType("__main__", "The namespace of the notebook's cells.")
        self.namespace = vars(module)
        self.inputs, self.outputs = [""], {}
        self.namespace.update({"__builtins__": builtins, "In": self.inputs, "Out": self.outputs,
                               "_": "", "__": "", "___": "", "_i": "", "_ii": "", "_iii": ""})
        self.module = module

    def take_over(self):
        """Make this process the notebook's: `__main__`, `display`, the display hook, the magics."""
        sys.modules["__main__"] = self.module
        sys.displayhook = self.displayhook
        builtins.display = self.display.display
        self.magics = Magics(self)
        builtins.get_ipython = lambda: self.magics
        hook_imports(self)

    async def execute(self, code, store_history=True, user_expressions=()):
        """Run a cell; returns the content of its `execute_reply`."""
        if store_history:
            self.remember(code)
        try:
            await self.run(code)
            reply = {"status": "ok", "payload": [], "user_expressions": {
                name: self.evaluate(user_expressions[name]) for name in user_expressions}}
        except BaseException as error:
            if self.was_cancelled:
                error = KeyboardInterrupt().with_traceback(error.__traceback__)
            reply = self.failure(error)
            self.publish("error", {key: reply[key] for key in ("ename", "evalue", "traceback")})
        try:
            for function in self.after_cell:
                function()
        except Exception as error:
            self.publish("error", {k: v for k, v in self.failure(error).items() if k != "status"})
        return {**reply, "execution_count": self.execution_count}

    async def run(self, code):
        """Run a cell in the notebook's namespace and show the value of its last expression.

        All of the user's code runs inside this frame: `Kernel.interrupt` looks for it.
        """
        # Journey 7: the cell is translated to plain Python, parsed, split, compiled and run.
        if code.startswith("%%"):
            first, _, body = code.partition("\n")
            name, _, line = first[2:].partition(" ")
            value = self.magics.run_cell_magic(name, line.strip(), body)
            value = await value if hasattr(value, "__await__") else value
        else:
            value = await self.run_source(code)
        if value is not None and not is_muted(code):
            sys.displayhook(value)

    async def run_source(self, code):
        """Run Python source, with magics in it, and return the value of its last expression."""
        value = None
        for step in self.compile(code):
            value = eval(step, self.namespace)
            if step.co_flags & COROUTINE:
                value = await value
        return value

    def compile(self, code):
        """Code objects to be evaluated in turn; the last one's value is the cell's."""
        name = f"<In[{self.execution_count}] {next(self.serial)}>"
        linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        tree = compile(translate(code), name, "exec", self.flags | ast.PyCF_ONLY_AST, True)
        steps = []
        for part, mode in zip(split_cell(tree), ("exec", "eval"), strict=True):
            if part is not None:
                steps.append(compile(part, name, mode, self.flags, True))
                self.flags |= steps[-1].co_flags & FUTURES
        return steps

    def remember(self, code):
        """Keep the source as In[n], _i, _ii, _iii and _in."""
        n, names = self.execution_count, self.namespace
        self.inputs += [""] * (n - len(self.inputs)) + [code]
        names["_iii"], names["_ii"], names["_i"] = names["_ii"], names["_i"], self.inputs[n - 1]
        names[f"_i{n}"] = code

    def displayhook(self, value):
        """Show the value of a last expression and keep it as `_`, `_n` and Out[n]."""
        if value is None:
            return
        names = self.namespace
        if value is not self.outputs:
            names["___"], names["__"], names["_"] = names["__"], names["_"], value
            names[f"_{self.execution_count}"] = self.outputs[self.execution_count] = value
        self.display.result(value, self.execution_count)

    def evaluate(self, expression):
        """A user expression's value as a MIME bundle, or its error."""
        try:
            data, metadata = mime_bundle(eval(expression, self.namespace))
            return {"status": "ok", "data": data, "metadata": metadata}
        except Exception as error:
            return self.failure(error)

    def failure(self, error):
        """The fields of `error` and of a failed `execute_reply`."""
        try:
            evalue = str(error)
        except Exception as another:
            evalue = f"<str() failed: {type(another).__name__}>"
        return {"status": "error", "ename": type(error).__name__, "evalue": evalue,
                "traceback": format_error(error)}


# ---- 5. Magics: what notebooks say that is not Python -----------------------------------------
#
# `!command`, `x = !command`, `%magic`, `%%magic` and `name?` are no Python: the parser stops at
# such a line, and only there does `translate` look. So text inside strings is never touched. To
# add a magic, write a method `magic_NAME(self, line, cell)`; nothing else changes. Its docstring
# is what `%NAME?` shows; `cell` is None when it was called as a line magic.

ASSIGNED_COMMAND = re.compile(r"^(\s*)([\w., ]+?)\s*=\s*([!%])(?!=)(.*)$", re.S)
MAGIC_LINE = re.compile(r"^(\s*)(!!?|%)(.*)$", re.S)
HELP_LINE = re.compile(r"^(\s*)(\?{1,2})?([\w.*%]+?)(\?{1,2})?\s*$")


def translate(code):
    """`code` with its magic lines replaced by calls; the number of lines stays the same."""
    lines = code.split("\n")
    for _ in range(len(lines)):
        try:
            compile("\n".join(lines), "<translate>", "exec",
                    ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, True)
            break
        except (SyntaxError, ValueError) as error:
            at = (getattr(error, "lineno", 0) or 0) - 1
            if not 0 <= at < len(lines) or not translate_line(lines, at):
                break
    return "\n".join(lines)


def translate_line(lines, at):
    """Replace the magic at line `at`, with the lines that its backslashes continue it on."""
    end = at
    while lines[end].endswith("\\") and end + 1 < len(lines):
        end += 1
    text = "\n".join(lines[at:end + 1])
    call = magic_call(text)
    if call is None:
        return False
    lines[at:end + 1] = [call] + [""] * (end - at)
    return True


def magic_call(text):
    """The Python for one magic line, or None when it is none."""
    text = text.replace("\\\n", " ")
    if match := ASSIGNED_COMMAND.match(text):
        indent, target, kind, rest = match.groups()
        return f"{indent}{target} = {call_of(kind, rest, 'getoutput')}"
    if match := MAGIC_LINE.match(text):
        indent, kind, rest = match.groups()
        return indent + call_of(kind, rest, "getoutput" if kind == "!!" else "system")
    if (match := HELP_LINE.match(text)) and (match[2] or match[4]):
        return f"{match[1]}__shell__.pinfo({match[3]!r}, {len(match[4] or match[2])})"
    return None


def call_of(kind, rest, shell_method):
    if kind != "%":
        return f"__shell__.{shell_method}({rest.strip()!r})"
    name, _, line = rest.strip().partition(" ")
    return f"__shell__.run_line_magic({name!r}, {line.strip()!r})"


def spoken(seconds):
    """A duration as a person says it: `1min 5s`, `12.3 ms`."""
    if seconds >= 60:
        return f"{int(seconds // 60)}min {seconds % 60:.0f}s"
    for size, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


class Magics:
    """The magics, and what `get_ipython()` returns."""

    # rich, plotly and others look at this name to learn whether they run in a notebook.
    __qualname__ = "ZMQInteractiveShell"

    RICH_CELLS = {"html": "text/html", "markdown": "text/markdown", "latex": "text/latex",
                  "svg": "image/svg+xml", "javascript": "application/javascript"}

    def __init__(self, interpreter):
        self.interpreter = interpreter
        self.user_ns = interpreter.namespace
        type(self).__name__ = type(self).__qualname__
        builtins.__shell__ = self

    def run_line_magic(self, name, line):
        return self.find(name)(line, None)

    def run_cell_magic(self, name, line, cell):
        if name in self.RICH_CELLS:
            return self.interpreter.display.publish_display_data({self.RICH_CELLS[name]: cell})
        return self.find(name)(line, cell)

    def find(self, name):
        """The method of a magic; raises NameError with the nearest name when there is none."""
        method = getattr(self, f"magic_{name}", None)
        if method is None:
            import difflib
            names = [n.removeprefix("magic_") for n in dir(self) if n.startswith("magic_")]
            near = difflib.get_close_matches(name, names, 1)
            raise NameError(f"there is no magic %{name}"
                            + (f"; did you mean %{near[0]}?" if near else ""))
        return method

    def system(self, command):
        """Run a shell command; what it prints comes through descriptors 1 and 2."""
        import subprocess
        self.user_ns["_exit_code"] = subprocess.call(self.expand(command), shell=True)

    def getoutput(self, command):
        """Run a shell command and return its lines."""
        import subprocess
        done = subprocess.run(self.expand(command), shell=True, stdout=subprocess.PIPE, text=True,
                              errors="replace")
        self.user_ns["_exit_code"] = done.returncode
        return done.stdout.splitlines()

    def expand(self, command):
        """`command` with {expression} and $name replaced by their values, where they have one."""
        def value(match):
            try:
                return str(eval(match[1] or match[2], self.user_ns))
            except Exception:
                return match[0]   # shell syntax, such as ${HOME} or awk's {print}
        return re.sub(r"(?<![$\\])\{([^{}\n]+)\}|(?<![$\\])\$([A-Za-z_]\w*)", value, command)

    def pinfo(self, name, detail):
        """Show what `name?` or `name??` asks for: type, signature, docstring or source."""
        import inspect
        try:
            value = self.find(name.strip("%")) if name[0] == "%" else eval(name, self.user_ns)
        except Exception:
            return print(f"Object `{name}` not found.")
        print(f"Type:      {type(value).__name__}")
        try:
            print(f"Signature: {name}{inspect.signature(value)}")
        except (TypeError, ValueError):
            print(f"Value:     {pretty(value)[:1000]}")
        try:
            print(f"Source:\n{inspect.getsource(value)}" if detail == 2 else
                  f"Docstring: {inspect.getdoc(value) or '<no docstring>'}")
        except (TypeError, OSError):
            print(f"Docstring: {inspect.getdoc(value) or '<no docstring>'}")

    async def time_cell(self, cell):
        """Run source and say how long it took."""
        cpu, wall = os.times(), time.perf_counter()
        try:
            return await self.interpreter.run_source(cell)
        finally:
            wall, now = time.perf_counter() - wall, os.times()
            user, system = now.user - cpu.user, now.system - cpu.system
            print(f"CPU times: user {spoken(user)}, sys: {spoken(system)}, "
                  f"total: {spoken(user + system)}\nWall time: {spoken(wall)}")

    def magic_time(self, line, cell):
        """Time one statement (`%time x = f()`) or a whole cell (`%%time`)."""
        running = self.time_cell(line if cell is None else "\n" * bool(not line) + line + cell)
        return finished(running) if cell is None else running

    def magic_timeit(self, line, cell):
        """Time a statement or cell over many runs: `%timeit [-n LOOPS] [-r RUNS] [-q] code`."""
        import getopt
        import statistics
        import timeit
        options, words = getopt.getopt(line.split(" "), "n:r:qo")
        options, code = dict(options), " ".join(words)
        timer = timeit.Timer(cell if cell is not None else code or "pass",
                             code if cell is not None else "pass", globals=self.user_ns)
        loops, repeat = int(options.get("-n", 0)), int(options.get("-r", 7))
        loops = loops or timer.autorange()[0]
        runs = [seconds / loops for seconds in timer.repeat(repeat, loops)]
        if "-q" not in options:
            spread = statistics.pstdev(runs)
            print(f"{spoken(statistics.mean(runs))} ± {spoken(spread)} per loop "
                  f"(mean ± std. dev. of {len(runs)} runs, {loops:,} loops each)")
        return runs if "-o" in options else None

    def magic_matplotlib(self, line, cell):
        """Accepted for what other kernels need it for: figures are always shown inline here."""

    def magic_writefile(self, line, cell):
        """Write the cell into a file: `%%writefile [-a] PATH`; -a appends."""
        appends, path = line.startswith("-a "), line.removeprefix("-a ").strip()
        verb = "Appending to" if appends else "Overwriting" if os.path.exists(path) else "Writing"
        with open(os.path.expanduser(path), "a" if appends else "w", encoding="utf-8") as file:
            file.write(cell)
        print(f"{verb} {path}")

    magic_file = magic_writefile

    def magic_bash(self, line, cell):
        """Run the cell in bash."""
        import subprocess
        subprocess.run(["bash", "-c", cell], check=True)

    def magic_sh(self, line, cell):
        """Run the cell in the system's shell."""
        import subprocess
        subprocess.run(["sh", "-c", cell], check=True)

    def magic_pip(self, line, cell):
        """Run pip in this kernel's environment: `%pip install NAME`."""
        self.system(f'"{sys.executable}" -m pip {line}')

    def magic_cd(self, line, cell):
        """Change the working directory."""
        os.chdir(os.path.expanduser(line or "~"))
        print(os.getcwd())

    def magic_pwd(self, line, cell):
        """The working directory."""
        return os.getcwd()

    def magic_lsmagic(self, line, cell):
        """List the magics."""
        names = [n.removeprefix("magic_") for n in dir(self) if n.startswith("magic_")]
        print("Magics: " + "  ".join(f"%{name}" for name in names)
              + "\nCells:  " + "  ".join(f"%%{name}" for name in self.RICH_CELLS))


def finished(coroutine):
    """The result of a coroutine that never waits; raises SyntaxError when it does."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    coroutine.close()
    raise SyntaxError("a line magic cannot await; use %%time for the whole cell")


# ---- 6. Other people's modules: matplotlib and IPython.display --------------------------------
#
# Two libraries must know that they run in a notebook. matplotlib draws figures for a backend, so
# it gets one of ours. `from IPython.display import …` stands in a quarter of all notebooks: when
# IPython is missing, a stand-in is imported in its place; when it is there, its display functions
# are replaced by ours. Nothing is imported before the user does: a finder on `sys.meta_path`
# waits.

BACKEND = "minijupyter_figures"


class AfterImport:
    """Calls hooks[name](module) when the module `name` has just been imported (PEP 451 finder)."""

    def __init__(self, hooks):
        self.hooks = hooks

    def find_spec(self, name, path=None, target=None):
        hook = self.hooks.pop(name, None)   # taken out: the search below must not find us again
        if hook is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None:
            self.hooks[name] = hook         # not installed; perhaps it will be
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            hook(module)

        spec.loader.exec_module = exec_module
        return spec


class StandIns:
    """Modules made on the spot, for names that nobody else can import: {name: function(module)}."""

    def __init__(self, makers):
        self.makers = makers

    def find_spec(self, name, path=None, target=None):
        if name in self.makers:
            return importlib.util.spec_from_loader(name, self, is_package=name == "IPython")
        return None

    def create_module(self, spec):
        return None   # the usual empty module

    def exec_module(self, module):
        self.makers[module.__name__](module)


class Rich:
    """Text or bytes of one MIME type: IPython.display's HTML, Markdown, Image …, in small."""

    mime, reads_as = "text/plain", "r"

    def __init__(self, data=None, url=None, filename=None, metadata=None, **options):
        if filename is None and isinstance(data, str) and self.names_file(data):
            filename, data = data, None
        if url is not None:
            from urllib.request import urlopen
            data = urlopen(url).read()
            data = data if "b" in self.reads_as else data.decode()
        elif filename is not None:
            encoding = None if "b" in self.reads_as else "utf-8"
            with open(filename, self.reads_as, encoding=encoding) as file:
                data = file.read()
        self.data, self.options = data, options
        self.metadata = {**(metadata or {}), **{k: options[k] for k in ("width", "height")
                                                if options.get(k)}}

    def names_file(self, text):
        return False

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {self.mime: self.data}, {self.mime: self.metadata} if self.metadata else {}

    def __repr__(self):
        return f"<IPython.core.display.{type(self).__name__} object>"


class Image(Rich):
    """A picture from bytes, a file or a URL."""

    reads_as = "rb"

    def __init__(self, data=None, url=None, filename=None, format=None, embed=None, **options):
        super().__init__(data, url, filename, **options)
        kinds = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
        found = [kind for magic, kind in kinds.items() if bytes(self.data or b"").startswith(magic)]
        self.mime = f"image/{(format or (found or ['png'])[0]).replace('jpg', 'jpeg')}"

    def names_file(self, text):
        return True


class Math(Rich):
    """TeX, shown as a displayed formula."""

    mime = "text/latex"

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {self.mime: "$\\displaystyle " + self.data.strip("$") + "$"}


def rich_class(name, mime):
    return type(name, (Rich,), {"mime": mime, "__doc__": f"Data of type {mime}."})


def ipython_display(display):
    """The names of IPython.display, as far as this kernel knows them."""
    names = {name: rich_class(name, mime) for name, mime in (
        ("HTML", "text/html"), ("Markdown", "text/markdown"), ("Latex", "text/latex"),
        ("SVG", "image/svg+xml"), ("JSON", "application/json"), ("Pretty", "text/plain"),
        ("Javascript", "application/javascript"))}
    names.update(Image=Image, Math=Math, DisplayHandle=DisplayHandle, display=display.display,
                 update_display=display.update_display, clear_output=display.clear_output,
                 publish_display_data=display.publish_display_data)
    for name in ("html", "markdown", "latex", "svg", "png", "jpeg", "json", "javascript"):
        names[f"display_{name}"] = display_one(display, REPR_METHODS[f"_repr_{name}_"])
    return names


def display_one(display, mime):
    """`display_html` and its like: show values in one format, or raw data as that format."""
    def show(*values, raw=False, metadata=None):
        for value in values:
            if raw:
                display.publish_display_data({mime: value}, metadata)
            else:
                display.display(value, include=(mime, "text/plain"), metadata=metadata)
    return show


def figure_png(figure):
    """A matplotlib figure as PNG bytes."""
    data = io.BytesIO()
    figure.canvas.print_figure(data, format="png", bbox_inches="tight")
    return data.getvalue()


def make_backend(module, interpreter):
    """Fill a matplotlib backend: figures are drawn by Agg and shown when the cell is done."""
    from matplotlib._pylab_helpers import Gcf
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    def show(*args, **options):
        for manager in Gcf.get_all_fig_managers():
            interpreter.display.display(manager.canvas.figure)
        Gcf.destroy_all()

    module.FigureCanvas, module.show = FigureCanvasAgg, show
    interpreter.after_cell.append(show)


def hook_imports(interpreter):
    """Prepare for the imports named above, which the user may or may not make."""
    names = ipython_display(interpreter.display)

    def use_backend(matplotlib):
        FORMATTERS["matplotlib.figure", "Figure"] = {"image/png": figure_png}
        if "MPLBACKEND" not in os.environ:
            matplotlib.use(f"module://{BACKEND}")

    def speak_through_us(functions):   # IPython.core.display_functions, the real one
        for name in ("display", "update_display", "clear_output", "publish_display_data"):
            setattr(functions, name, names[name])

    sys.meta_path.insert(0, AfterImport({"matplotlib": use_backend,
                                         "IPython.core.display_functions": speak_through_us}))
    sys.meta_path.append(StandIns({
        BACKEND: lambda module: make_backend(module, interpreter),
        "IPython": lambda module: setattr(module, "get_ipython", builtins.get_ipython),
        "IPython.display": lambda module: vars(module).update(names),
    }))


# ---- 7. The kernel: five sockets, one dispatcher (knows no Python) ----------------------------
#
# A handler is a method named as the message type it answers; HANDLERS says which thread runs it
# and is at the same time the list of what a client may ask for. A handler returns the content of
# its reply. Every request is bracketed by `status: busy` and `status: idle` on iopub, whatever
# becomes of it. To answer a new message, write its method and add its row.

REPLY_STATUS = {"status": "ok"}
RETRY_MS = 50   # until an undelivered question is tried again
HANDLERS = {   # msg_type -> thread
    "kernel_info_request": "io",
    "interrupt_request": "io",
    "shutdown_request": "io",
    "is_complete_request": "helper",
    "execute_request": "main",
}


class Kernel:
    """The five channels of one interpreter, as the connection file says."""

    def __init__(self, connection, interpreter_class=Interpreter):
        self.session = Session(connection["key"], scheme=connection["signature_scheme"])
        self.outbox = Outbox(self.session)
        self.interpreter = interpreter_class(self.outbox.publish)
        self.connection = connection
        self.context = zmq.Context()
        self.sockets = {}                     # channel -> socket; the io thread's alone
        self.descriptors = []
        self.cells = collections.deque()      # execute_requests that wait for the main thread
        self.questions = queue.SimpleQueue()  # requests that wait for the helper
        self.answers = queue.SimpleQueue()    # input_replies
        self.unasked = []                     # an input_request that could not be delivered yet
        self.running = None                   # the execute_request being run, or run last
        self.loop = None                      # the main thread's asyncio loop, once it runs
        self.is_awaiting = False              # a cell is being run
        self.is_stopping = False

    # -- life: bind, capture, run until told to stop --

    def bind(self):
        """Open the sockets: the kernel binds, clients connect."""
        for channel, kind in (("shell", zmq.ROUTER), ("control", zmq.ROUTER),
                              ("stdin", zmq.ROUTER), ("iopub", zmq.XPUB)):
            new = self.sockets[channel] = self.context.socket(kind)
            new.linger = 1000    # milliseconds that the last words get when the process ends
            new.sndhwm = 0       # nothing is dropped; the outbox bounds what may wait
            if kind == zmq.ROUTER:
                new.router_handover = 1   # a client that comes back under its old identity is heard
                new.router_mandatory = channel == "stdin"   # see `send_due`
            else:
                new.xpub_verbose = 1      # every subscriber gets its welcome, not just the first
            new.bind(self.endpoint(channel))

    def endpoint(self, channel):
        port = self.connection["hb_port" if channel == "heartbeat" else f"{channel}_port"]
        joint = ":" if self.connection["transport"] == "tcp" else "-"
        return f"{self.connection['transport']}://{self.connection['ip']}{joint}{port}"

    def capture(self):
        """Lead sys.stdout, sys.stderr and descriptors 1 and 2 into the outbox."""
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            self.descriptors.append(Descriptor(descriptor, name, self.outbox))
            setattr(sys, name, Stream(name, self.outbox, descriptor))
        builtins.input = self.input
        inherit_context()

    def run(self):
        """Start the threads and run cells in this one, the main thread, until the end."""
        signal.signal(signal.SIGINT, self.interrupt)
        self.bind()
        self.capture()
        for name, work in (("io", self.serve), ("helper", self.help), ("heartbeat", self.beat)):
            threading.Thread(target=work, name=name, daemon=True).start()
        self.outbox.publish("status", {"execution_state": "starting"}, parent={})
        self.interpreter.take_over()
        patch_getpass(self.getpass)
        self.run_cells()
        self.end()

    def run_cells(self):
        import asyncio
        import gc
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        self.arrived = asyncio.Event()
        main = loop.create_task(self.cell_after_cell())
        gc.freeze()   # what is loaded by now stays: the collector need not look at it again
        self.main_task, self.loop = main, loop
        while not main.done():
            try:
                loop.run_until_complete(main)
            except KeyboardInterrupt:
                pass      # it ended a background task of the user's, which remembers it
            except BaseException:
                if main.done():
                    raise

    async def cell_after_cell(self):
        """The main thread's life: take a cell, run it, wait for the next."""
        while not self.is_stopping:
            while self.cells:
                await self.execute(self.cells.popleft())
            self.arrived.clear()
            if not self.is_stopping and not self.cells:
                await self.arrived.wait()

    def end(self):
        """Let exit functions speak, send all that is queued, and go without waiting for threads."""
        import atexit
        atexit._run_exitfuncs()
        self.drain()
        self.is_finished = True
        self.outbox.is_urgent = True
        self.outbox.wake()
        self.io_done.wait(2)
        os._exit(0)

    io_done, is_finished = threading.Event(), False

    # -- the io thread: every socket, level-triggered --

    def serve(self):
        """Wait for sockets, pipes and the outbox; nothing here blocks or runs user code."""
        poller = zmq.Poller()
        pipes = {descriptor.pipe: descriptor for descriptor in self.descriptors}
        for source in (*self.sockets.values(), *pipes, self.outbox.wake_receiver.fileno()):
            poller.register(source, zmq.POLLIN)
        parent = watch_parent(poller)
        channels = {socket: channel for channel, socket in self.sockets.items()}
        while not self.is_finished:
            for source, _ in poller.poll(RETRY_MS if self.unasked else self.outbox.rest()):
                if source in channels:
                    self.receive(channels[source], source)
                elif source in pipes:
                    pipes[source].drain()
                elif source == parent:
                    os._exit(1)   # the server is gone, and nobody is left to talk to
            self.send_due()
        self.send_due()
        self.context.destroy(linger=1000)
        self.io_done.set()

    def send_due(self):
        """Send what is due; a question whose client is not yet on stdin is kept for later."""
        due, self.unasked = [*self.unasked, *self.outbox.take()], []
        for channel, parts in due:
            try:
                self.sockets[channel].send_multipart(parts, copy=len(parts[-1]) < 65_536)
            except zmq.ZMQError as problem:
                if problem.errno != zmq.EHOSTUNREACH:
                    raise
                self.unasked = [(channel, parts)]   # the latest: older ones were interrupted

    def receive(self, channel, source):
        """Take one message off a socket. A bad one is logged and dropped: no busy, no reply."""
        parts = source.recv_multipart()
        if channel == "iopub":
            return self.welcome(parts[0])
        try:
            request = self.session.unpack(parts)
        except BadMessage as problem:
            return self.log(f"dropped a message on {channel}: {problem}")
        request["channel"] = channel
        if channel == "stdin":
            return self.input_reply(request)
        self.dispatch(request)

    def dispatch(self, request):
        """Hand a request to the thread that answers it."""
        # Journey 5: the handler is the method named like the message type; busy comes first.
        thread = HANDLERS.get(request["header"]["msg_type"])
        if thread == "main":
            self.cells.append(request)
            if self.loop:
                self.loop.call_soon_threadsafe(self.arrived.set)
        elif thread == "helper":
            self.questions.put(request)
        else:
            self.answer(request)

    def welcome(self, event):
        """A client has subscribed: tell it, so that it knows from when on it hears everything."""
        if event[:1] == b"\x01":
            message = self.session.message("iopub_welcome", {"subscription": event[1:].decode()})
            message["identities"] = [event[1:]]
            self.outbox.put("iopub", message)

    def help(self):
        while True:
            self.answer(self.questions.get())

    def beat(self):
        """Echo heartbeats in C, without the interpreter's lock, so that a busy kernel is alive."""
        echo = zmq.Context().socket(zmq.ROUTER)
        echo.linger = 0
        echo.bind(self.endpoint("heartbeat"))
        zmq.proxy(echo, echo)

    def log(self, text):
        """A line on the real stderr, for whoever started the kernel."""
        os.write(self.descriptors[1].original, f"kernel {os.getpid()}: {text}\n".encode())

    # -- answering --

    def status(self, state, request):
        self.outbox.publish("status", {"execution_state": state}, parent=request["header"])

    def reply(self, request, content, metadata=None):
        """Send a reply to the one who asked, on the channel it asked on."""
        msg_type = request["header"]["msg_type"].removesuffix("_request") + "_reply"
        message = self.session.message(msg_type, {**REPLY_STATUS, **content}, request["header"],
                                       metadata)
        message["identities"] = request["identities"]
        self.outbox.put(request["channel"], message)

    def answer(self, request):
        """Answer a request that needs no user code: busy, reply, idle."""
        msg_type = request["header"]["msg_type"]
        self.status("busy", request)
        try:
            if msg_type in HANDLERS:
                self.reply(request, getattr(self, msg_type)(request))
            else:
                self.log(f"no handler for {msg_type!r}")
        except Exception as error:   # the client's mistake, such as a missing field
            self.log(f"{msg_type} failed: {error!r}")
            self.reply(request, failed(error))
        finally:
            self.status("idle", request)

    async def execute(self, request):
        """Run one execute_request from busy to idle; after an error, abort those that wait."""
        header, content = request["header"], request["content"]
        self.running, self.is_awaiting = request, True
        self.outbox.latest = SILENT if content.get("silent") else header
        self.outbox.parent.set(self.outbox.latest)
        self.status("busy", request)
        stops = content.get("stop_on_error", True)
        try:
            reply = await self.execute_request(request)
        except BaseException as error:   # the client's mistake, or a SIGINT at an odd moment
            reply = {**failed(error), "execution_count": self.interpreter.execution_count}
            stops = False
        self.is_awaiting = False
        self.forget_cancel()
        self.drain()
        # Taken before the reply leaves: what a client sends when it has seen the error is run.
        waiting = []
        if reply["status"] == "error" and stops:
            waiting, self.cells = self.cells, collections.deque()
        self.finish(request, reply)
        for request in waiting:
            self.abort(request)

    async def execute_request(self, request):
        """Content: code, silent, store_history, allow_stdin, stop_on_error, user_expressions."""
        content = request["content"]
        code, silent = content["code"], content.get("silent", False)
        if not isinstance(code, str):
            raise TypeError("execute_request: code must be a string")
        store_history = content.get("store_history", True) and not silent
        # Journey 6: the counter goes up and everybody hears what will run, as `execute_input`.
        self.interpreter.execution_count += bool(store_history)
        self.outbox.publish("execute_input", {
            "code": code, "execution_count": self.interpreter.execution_count})
        return await self.interpreter.execute(code, store_history,
                                              content.get("user_expressions") or {})

    def drain(self):
        """Bring in what child processes and C code have printed so far."""
        if "ctypes" in sys.modules:
            flush_c_output()
        for descriptor in self.descriptors:
            descriptor.drain()

    def finish(self, request, reply):
        # Journey 10: `execute_reply` goes to the one who asked, then everybody hears `idle`.
        self.reply(request, reply)
        self.status("idle", request)

    def abort(self, request):
        self.status("busy", request)
        self.finish(request, {"status": "aborted",
                              "execution_count": self.interpreter.execution_count})

    def kernel_info_request(self, request):
        about = self.interpreter
        return {"protocol_version": PROTOCOL_VERSION, "implementation": about.implementation,
                "implementation_version": __version__, "language_info": about.language_info,
                "banner": about.banner, "help_links": [], "supported_features": []}

    def is_complete_request(self, request):
        """Its `status` is the answer, not ok or error."""
        status, indent = is_complete(request["content"]["code"])
        return {"status": status, **({"indent": indent} if status == "incomplete" else {})}

    def shutdown_request(self, request):
        """Reply, tell everybody, and let the main thread end; a running cell is interrupted."""
        restart = bool(request["content"].get("restart", False))
        self.is_stopping = True
        self.cells.clear()
        self.outbox.publish("shutdown_reply", {"status": "ok", "restart": restart},
                            parent=request["header"])
        if self.loop:
            self.loop.call_soon_threadsafe(self.arrived.set)
        if self.is_awaiting:
            signal_main_thread()
        return {"restart": restart}

    # -- interrupts --

    def interrupt_request(self, request):
        """The same as a SIGINT, for kernel specs with `interrupt_mode: message`."""
        signal_main_thread()
        return {}

    def interrupt(self, signum, frame):
        """SIGINT, in the main thread. Where the code stands decides what can be done:

        running or sleeping: raise right here; awaiting: cancel the await, thread-safely, because
        only that wakes a loop which sleeps in select; idle: nothing.
        """
        while frame is not None:
            if frame.f_code is Interpreter.run.__code__ or frame.f_code.co_filename[:4] == "<In[":
                raise KeyboardInterrupt
            frame = frame.f_back
        if self.is_awaiting and self.loop:
            self.loop.call_soon_threadsafe(self.cancel_await)

    def cancel_await(self):
        """In the loop: end what the running cell awaits; the interpreter calls it an interrupt."""
        if self.is_awaiting:
            self.interpreter.was_cancelled = True
            self.main_task.cancel()

    def forget_cancel(self):
        """The main task lives on: `asyncio.timeout` and the like must not find it cancelled."""
        self.interpreter.was_cancelled = False
        while hasattr(self.main_task, "uncancel") and self.main_task.cancelling():
            self.main_task.uncancel()

    # -- stdin: the kernel asks, the client that runs the cell answers --

    def input(self, prompt=""):
        """Python's `input`."""
        return self.ask(str(prompt), password=False)

    def getpass(self, prompt="Password: ", stream=None, **options):
        """`getpass.getpass`."""
        return self.ask(str(prompt), password=True)

    def ask(self, prompt, password):
        """Send `input_request` and wait for its `input_reply`; raises EOFError on Ctrl-D."""
        request = self.running
        if request is None or not request["content"].get("allow_stdin", True):
            raise RuntimeError("input() was called, but this client does not allow questions "
                               "(allow_stdin is false)")
        while not self.answers.empty():
            self.answers.get_nowait()   # an answer to a question that was interrupted
        message = self.session.message("input_request", {"prompt": prompt, "password": password},
                                       request["header"])
        message["identities"] = request["identities"]
        self.outbox.put("stdin", message)
        value = self.answers.get()
        if value == "\x04":
            raise EOFError
        return value

    def input_reply(self, message):
        self.answers.put(str(message["content"].get("value", "")))


def failed(error):
    """The content of a reply to a request that could not be handled."""
    return {"status": "error", "ename": type(error).__name__, "evalue": str(error), "traceback": []}


def patch_getpass(function):
    import getpass
    getpass.getpass = function


def signal_main_thread():
    """Deliver a SIGINT as the terminal would: to our children too, when we lead the group."""
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGINT)
    elif hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)


def watch_parent(poller):
    """Poll for the end of the process that started us (JPY_PARENT_PID); returns a descriptor.

    Linux tells it through a pidfd, without any polling in time; elsewhere the server's own
    shutdown is all there is.
    """
    pid = os.environ.get("JPY_PARENT_PID", "")
    if not pid.isdigit() or int(pid) != os.getppid() or not hasattr(os, "pidfd_open"):
        return None
    try:
        descriptor = os.pidfd_open(int(pid))
    except OSError:
        return None   # the system does not allow it
    poller.register(descriptor, zmq.POLLIN)
    return descriptor


# ---- 8. main ----------------------------------------------------------------------------------
#
# Python caches the bytecode of imported modules but not of the script it runs, and compiling this
# file takes longer than all the rest of a start. So a kernel spec imports it: see LAUNCH.

LAUNCH = ("import sys; sys.path[0] = {folder!r}; import kernel; kernel.main()")


def command():
    """The argv of a kernel spec that starts this file quickly."""
    folder = os.path.dirname(os.path.abspath(__file__))
    return [sys.executable, "-c", LAUNCH.format(folder=folder), "-f", "{connection_file}"]


def read_connection_file(path):
    """The connection file's fields; raises SystemExit with a clear line when one is missing."""
    try:
        with open(path, encoding="utf-8") as file:
            connection = json.load(file)
        for name in ("shell", "control", "stdin", "iopub", "hb"):
            connection[f"{name}_port"] += 0   # a number
    except (OSError, ValueError, KeyError, TypeError) as problem:
        sys.exit(f"kernel.py: {path} is not a usable connection file: {problem!r}")
    return {"ip": "127.0.0.1", "transport": "tcp", "key": "", "signature_scheme": "hmac-sha256",
            **connection}


def main():
    """Read the connection file, make the notebook's folder the first to import from, and run."""
    # Other options are ignored: nbclient sends some of ipykernel's to any kernel called python3.
    words = " ".join(sys.argv[1:]).replace("=", " ").split(" ")
    if "-f" not in words[:-1]:
        sys.exit("usage: python kernel.py -f CONNECTION_FILE   (a Jupyter client starts it so)")
    connection = read_connection_file(words[words.index("-f") + 1])
    sys.path[0] = ""
    sys.modules.pop("kernel", None)   # the user may have a kernel.py, too
    sys.argv[:] = [""]
    Kernel(connection).run()


if __name__ == "__main__":
    main()
