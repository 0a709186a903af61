#!/usr/bin/env python3
"""The kernel: a process of its own that runs Python code for any Jupyter client.

Run:  python kernel.py -f CONNECTION_FILE      (a server or a console writes the file and starts it)

    client  -- execute_request -->  shell    ROUTER   requests, answered one by one
            -- interrupt, stop -->  control  ROUTER   the same, but answered while a cell runs
            <- input_request ----   stdin    ROUTER   the kernel asks the person a question
            <- stream, result ---   iopub    XPUB     what everybody sees
            -- ping, pong ------->  heartbeat ROUTER  is the process alive?

Sections: 1 The wire · 2 Display · 3 Output · 4 The interpreter · 5 Questions about code · 6 Magics
· 7 Comms · 8 Other people's modules · 9 The kernel · 10 main

Of a cell's journey it holds stations 4 to 10: `Session.unpack` verifies the request,
`Kernel.dispatch` finds its handler, `Kernel.execute_request` counts, `Interpreter.run` runs,
`Stream.write` carries what is printed, `Display.result` shows the value, `Kernel.finish` replies.

Left out on purpose: IPython and a debugger protocol. What notebooks use of IPython every day
(`!command`, magics, display) is here; when the real one is imported, its shell works in our
namespace.

Threads: *main* runs the user's code, one cell at a time, inside one asyncio loop, so that tasks
go on between cells and a SIGINT reaches the code; each *subshell* is one more of its kind; *io*
owns every socket but the heartbeat's and waits for them, for the outbox and for the pipes behind
descriptors 1 and 2; *helper* answers questions about code; *heartbeat* echoes without Python.
Sources: the Jupyter messaging specification 5.5 with JEP 65 (welcome) and JEP 91 (subshells),
https://jupyter-client.readthedocs.io/en/stable/messaging.html, and Python's own documentation.
"""
import ast
import base64
import builtins
import codecs
import collections
import collections.abc
import contextlib
import contextvars
import fnmatch
import hashlib
import hmac
import importlib
import importlib.machinery
import importlib.util
import io
import itertools
import json
import keyword
import linecache
import math
import operator
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
# key from the connection file can neither forge a message nor, while the process remembers its
# signature, send an old one again. (Identities and buffers are not signed: the specification.)
# Nothing here knows a socket; the server uses the same class.

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
        header = {
            # The process id keeps the ids of a forked child apart from its parent's.
            "msg_id": f"{self.session}_{os.getpid()}_{next(self.numbers)}",
            "msg_type": msg_type, "session": self.session, "username": self.username,
            "date": date_now(), "version": PROTOCOL_VERSION,
        }
        return {"header": header, "parent_header": parent_header or {},
                "metadata": metadata or {}, "content": content, "buffers": list(buffers)}

    def sign(self, json_parts):
        """The signature of the four JSON parts: lowercase hex, or b"" when unsigned."""
        if self.hmac is None:
            return b""
        digest = self.hmac.copy()
        for part in json_parts:
            digest.update(part)
        return digest.hexdigest().encode()

    def pack(self, message):
        """The parts of `message`, signed, behind its `identities` if it has any."""
        json_parts = [to_json(message[name])
                      for name in ("header", "parent_header", "metadata", "content")]
        # Buffers are copied: they may change before they leave, or be no bytes at all.
        return [*message.get("identities", ()), DELIMITER, self.sign(json_parts), *json_parts,
                *(memoryview(buffer).tobytes() for buffer in message.get("buffers", ()))]

    def unpack(self, parts):
        """The message in `parts`, verified; raises BadMessage for anything else.

        A dict of identities (list of bytes), header, parent_header, metadata, content (dicts) and
        buffers (list of bytes); a kernel's request gets `channel` and `received` (seconds), too.
        """
        identities, json_parts, buffers = self.verify(parts)
        # Journey 4: the signature fits the bytes that arrived; only now are they read as JSON.
        try:
            header, parent_header, metadata, content = (json.loads(bytes(p)) for p in json_parts)
        except (ValueError, RecursionError) as problem:
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
        signature, json_parts = bytes(parts[start + 1]), parts[start + 2:start + 6]
        if self.hmac is not None:
            if not hmac.compare_digest(signature, self.sign(json_parts)):
                raise BadMessage("the signature does not fit")
            self.refuse_replay(signature)
        for i in (1, 2):   # xeus kernels say so that there is no parent or no metadata
            if json_parts[i] == b"null":
                json_parts[i] = b"{}"
        return parts[:start], json_parts, parts[start + 6:]

    def refuse_replay(self, signature):
        """Remember a verified signature; raises BadMessage when it has been here before.

        Verified first, remembered second: otherwise anybody could flush the memory with junk.
        """
        if signature in self.seen:
            raise BadMessage("replayed")
        self.seen[signature] = None
        if len(self.seen) > MOST_SIGNATURES:
            del self.seen[next(iter(self.seen))]


def date_now():
    """The time as a header has it: ISO 8601, UTC, microseconds."""
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}Z"


def json_default(value):
    """`value`, which JSON does not know, as something that it does."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    for attribute, convert in (("isoformat", lambda v: v.isoformat()), ("__index__", int),
                               ("__float__", lambda v: without_nan(float(v))), ("__iter__", list)):
        with contextlib.suppress(TypeError):   # an array has an __index__ that only one number has
            if hasattr(value, attribute):
                return convert(value)
    raise TypeError(f"{type(value).__name__} cannot be sent as JSON")


encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"),
                               default=json_default).encode


def to_json(value):
    """`value` as UTF-8 JSON that every language can read."""
    try:
        return encode_json(value).encode()
    except RecursionError:
        raise ValueError("the value is nested too deep for JSON") from None
    except ValueError:   # NaN or Infinity, which JSON has not, or half a surrogate pair
        return encode_loosely(value)


def encode_loosely(value):
    """The same for a value that holds NaN or half a surrogate pair. Raises ValueError."""
    try:
        return json.dumps(without_nan(value), default=json_default).encode()
    except RecursionError:
        raise ValueError("the value contains itself") from None


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
    """`repr(value)`, but with long containers one item a line, sets in order, types by name."""
    if type(value) is type:
        is_builtin = value.__module__ == "builtins"
        return value.__qualname__ if is_builtin else f"{value.__module__}.{value.__qualname__}"
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
    try:
        return not isinstance(value, type) and not hasattr(value, "_no_object_has_this_name_")
    except Exception:   # its `__getattr__` raises whatever it likes
        return False


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
        try:
            data[mime] = function(value)
        except Exception:
            show_failure(f"The formatter of {type(value).__name__} for {mime}")
    data = {mime: d for mime, d in data.items() if d is not None}
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
    return without_bytes(data), metadata


def without_bytes(data):
    """The data of a MIME bundle with bytes, such as a PNG's, as base64."""
    return {mime: json_default(d) if isinstance(d, bytes) else d for mime, d in data.items()}


class Display:
    """`display()` and its family. `publish(msg_type, content)` sends a message on iopub."""

    def __init__(self, publish):
        self.publish = publish
        self.format = mime_bundle   # IPython's takes its place when somebody imports it

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
            data, about = (value, {}) if raw else self.format(value)
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
        """Send the value of a cell's last expression; returns its text/plain, if it has one."""
        if self.shows_itself(value):
            return None
        # Journey 9: the value becomes a MIME bundle and leaves as `execute_result`.
        data, metadata = self.format(value)
        self.publish("execute_result", {"data": data, "metadata": metadata,
                                        "execution_count": execution_count})
        return data.get("text/plain")


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

GATHER_SECONDS = 0.001      # so that the first text comes with its line end
FLUSH_SECONDS = 0.03        # a person sees 30 updates a second as flowing
MOST_WAITING = 200_000      # entries, some 30 MB; a thread that prints faster than io sends waits
BIG_TEXT = 1 << 16          # characters; a thread that has printed so much at once waits
MOST_BIG_WAITING = 64       # until no more entries than these are left
MOST_TEXT = 1 << 20         # characters in one stream message: a browser draws that in one frame
FIRST, SECOND = operator.itemgetter(0), operator.itemgetter(1)
SILENT = {"silent": True}   # stands for the parent_header of a silent request; is never sent
Scope = collections.namedtuple("Scope", "header stdout stderr")   # whose output it is; see scope_of


def scope_of(header):
    """The scope of a request: its header, and for each stream a key that texts are queued under.
    Neighbouring texts with the same key become one message."""
    return Scope(header, ("stdout", header), ("stderr", header))


class Outbox:
    """The queue of everything that will leave the process; any thread may put, io takes.

    Meanwhile io waits in one of three ways. Nothing is queued: it sleeps, and who queues something
    must nudge it. Text is queued: it sleeps until `flush_at`, and nobody needs to nudge. A message
    is queued: it does not sleep.
    """

    def __init__(self, session):
        self.session = session
        self.queue = []                    # (channel, parts) of messages, (key, text) of prints
        self.scope = contextvars.ContextVar("scope")
        self.latest = scope_of({})         # the scope of threads that inherited none
        self.catch_up = None               # brings in what a cell's child processes have printed
        self.wants_nudge = False           # io sleeps without a time limit, or is far behind
        self.is_held = False               # a subscriber of iopub is slow: who prints must wait
        self.is_urgent = False             # a message is waiting, or too much text
        self.last_flush = 0.0
        self.flush_at = None               # when the waiting text is due
        self.wake_receiver, self.wake_sender = socket.socketpair()
        self.wake_receiver.setblocking(False)
        self.wake_sender.setblocking(False)

    def put(self, channel, message):
        """Queue a message. It is packed here: what cannot be sent fails where it was said."""
        self.queue.append((channel, self.session.pack(message)))
        self.is_urgent = True
        self.wake()

    def publish(self, msg_type, content, parent=None, metadata=None, buffers=()):
        """Queue a message for iopub, below the running request unless a parent is given."""
        parent = self.parent_header() if parent is None else parent
        if parent is SILENT:
            return
        if self.is_held and msg_type == "display_data":
            self.nudge(0)
        message = self.session.message(msg_type, content, parent, metadata, buffers)
        message["identities"] = [f"kernel.{self.session.session}.{msg_type}".encode()]
        self.put("iopub", message)

    def parent_header(self):
        """The header of the request that the calling thread works for."""
        return self.scope.get(self.latest).header

    def nudge(self, size):
        """Called after text of `size` characters was queued, when io wants it or the text is big:
        wake io, and hold a thread that floods, in short sleeps, so that it can be interrupted."""
        self.wake()
        most = MOST_WAITING if size < BIG_TEXT else MOST_BIG_WAITING
        while (len(self.queue) > most or self.is_held) \
                and threading.current_thread().name != "io":
            self.is_urgent = True
            self.wake()
            time.sleep(0.001)

    def wake(self):
        """End the io thread's sleep. A full pipe is a wake-up that is already on its way."""
        self.wants_nudge = False
        with contextlib.suppress(BlockingIOError):
            self.wake_sender.send(b"\0")

    def rest(self):
        """Milliseconds that io may wait before the next `take`; None when nothing is queued."""
        self.wants_nudge = True   # before the look: what is put after the look will wake us
        if not self.queue:
            return None
        self.wants_nudge = len(self.queue) > MOST_WAITING
        if self.is_urgent:
            return 0
        now = time.monotonic()
        self.flush_at = self.flush_at or max(now + GATHER_SECONDS, self.last_flush + FLUSH_SECONDS)
        return max(0, math.ceil((self.flush_at - now) * 1000))

    def take(self):
        """All that is due, as a list of (channel, parts), neighbouring text joined."""
        try:
            while self.wake_receiver.recv(4096):
                pass
        except BlockingIOError:
            pass
        is_due = self.flush_at is not None and self.flush_at <= time.monotonic()
        if not (self.is_urgent or is_due):
            return []
        self.is_urgent, self.flush_at = False, None
        entries = self.queue[:]
        del self.queue[:len(entries)]   # what was appended meanwhile stays
        return list(self.joined(entries))

    def joined(self, entries):
        """(channel, parts) of each entry, with the texts of equal neighbours as one message."""
        for key, group in itertools.groupby(entries, FIRST):
            if isinstance(key, str):
                yield from group
            else:
                yield from self.streams(*key, "".join(map(SECOND, group)))

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
        self.name, self.descriptor = name, descriptor
        self.line = ""   # in a forked child: not yet written
        self.write = self.writer(outbox)
        self.buffer = StreamBuffer(self)
        if hasattr(os, "register_at_fork"):
            # A forked child has no io thread: its text goes through the pipe to the parent's.
            os.register_at_fork(after_in_child=lambda: setattr(self, "write", self.write_to_pipe))

    def writer(self, outbox):
        """The `write` of this stream. Every print calls it twice, so its names are bound here."""
        append, scope = outbox.queue.append, outbox.scope.get
        stream = Scope._fields.index(self.name)

        def write(text):
            # Journey 8: printed text is queued under the parent header of its cell, as `stream`.
            if text.__class__ is not str:
                text = check_text(text)
            if outbox.catch_up:   # a child process may have printed before this
                outbox.catch_up()
            append((scope(outbox.latest)[stream], text))
            size = len(text)
            if outbox.wants_nudge or size > BIG_TEXT:
                outbox.nudge(size)
            return size

        return write

    def write_to_pipe(self, text):
        """`write` in a forked child: whole lines, so that those of several children don't mix."""
        self.line += text
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self):
        """Nothing to do, but in a forked child."""
        data, self.line = self.line.encode(self.encoding, self.errors), ""
        while data:
            data = data[os_write(self.descriptor, data):]

    def writable(self):
        return True

    def fileno(self):
        """The captured descriptor, so that `subprocess.run(…, stdout=sys.stdout)` is seen."""
        return self.descriptor


def check_text(text):
    """`text` of a subclass as plain str; raises TypeError, as every text stream does."""
    if not isinstance(text, str):
        raise TypeError(f"write() argument must be str, not {type(text).__name__}")
    return str.__str__(text)


class StreamBuffer(io.RawIOBase):
    """`sys.stdout.buffer`: bytes that take their turn among what is printed."""

    def __init__(self, stream):
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, data):
        self.stream.write(self.decoder.decode(bytes(data)))
        return len(data)

    def writable(self):
        return True

    def fileno(self):
        return self.stream.fileno()


class Descriptor:
    """Descriptor 1 or 2 of the process, led into the outbox: children and C code print there.

    Whoever calls `drain` reads what has arrived, without waiting: the io thread when the pipe
    becomes readable, the main thread at a cell's end, before `idle`.
    """

    def __init__(self, descriptor, name, outbox):
        self.name, self.outbox = name, outbox
        self.original = os.dup(descriptor)
        self.pipe, self.write_end = os.pipe()   # the latter stays open, or the pipe might end
        os.dup2(self.write_end, descriptor)
        os.set_blocking(self.pipe, False)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.lock = threading.RLock()   # a `__del__` may print while its thread is in `drain`

    def drain(self):
        with self.lock:
            for _ in range(16):   # 1 MiB, more than a pipe holds: a flood cannot keep us here
                try:
                    data = os.read(self.pipe, 1 << 16)
                except BlockingIOError:
                    return   # empty
                text = self.decoder.decode(data)
                self.outbox.queue.append((getattr(self.outbox.latest, self.name), text))
                if self.outbox.wants_nudge:
                    self.outbox.wake()


os_write = os.write


def keep_order(descriptors):
    """Let what `os.write` sends to a captured descriptor be read at once, so that it comes before
    what is printed next."""
    by_number = dict(zip((1, 2), descriptors, strict=True))

    def write(descriptor, data):
        written = os_write(descriptor, data)
        if descriptor in by_number:
            by_number[descriptor].drain()
        return written

    os.write = write


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
RED, GREEN, CYAN, DIM, BOLD, RESET = (
    f"\x1b[{code}m" for code in ("31", "32", "36", "2", "1", "0"))
SESSION_NUMBER = 1    # in the history
MOST_OUTPUTS = 1000   # values kept in Out, as in IPython
MOST_RESULT = 10_000  # characters of a result kept in the history
FRAMES_SHOWN = 6      # of a deep recursion, at either end: enough to see the cycle
CELL_FILE = re.compile(r"<(In\[\d+\]) \d+>")   # what Python takes for the file of a cell
TOKEN = re.compile(   # of a line in a traceback
    r"(?P<comment>#.*)|(?P<string>(?:\b[a-zA-Z]{1,2})?(?:'[^'\n]*'|\"[^\"\n]*\"))"
    rf"|\b(?:(?P<keyword>{'|'.join(keyword.kwlist)})|(?P<number>\d[\w.]*))\b")
TOKEN_COLOURS = {"comment": "\x1b[90m", "string": "\x1b[33m", "keyword": "\x1b[35m",
                 "number": "\x1b[32m"}


def debugger():
    """Python's debugger, for one use. An interrupt ends it instead of asking anew."""
    import pdb

    class Debugger(pdb.Pdb):
        def _cmdloop(self):
            self.cmdloop()

    return Debugger(nosigint=True)


def breakpoint_here(*args, **options):
    """What `breakpoint()` calls."""
    debugger().set_trace(sys._getframe(1))


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
        summary = [f"{CYAN}{place(error.filename or '', error.lineno or 0)}{RESET}\n"]
        summary += traceback.format_exception_only(type(error), error)[1:]
        entries = [entry for entry in entries if entry.filename != error.filename]
    else:
        summary = traceback.format_exception_only(type(error), error)
    lines = [f"{RED}{'-' * LINE_WIDTH}{RESET}"]
    for number, entry in enumerate(entries):
        if FRAMES_SHOWN <= number < len(entries) - FRAMES_SHOWN:
            if number == FRAMES_SHOWN:
                lines.append(f"{DIM}… {len(entries) - 2 * FRAMES_SHOWN} frames left out …{RESET}")
            continue
        lines += ["", *format_frame(entry)] if number else format_frame(entry)
    before, name, message = "".join(summary).rstrip("\n").rpartition(type(error).__name__)
    lines += f"{before}{BOLD}{RED}{name}{RESET}{message}".split("\n")
    members = error.exceptions if hasattr(error, "exceptions") else ()   # of an exception group
    for number, member in enumerate(members, 1):
        lines.append(f"{DIM}+---- {number} of {len(members)} in the group{RESET}")
        lines += [f"| {line}" for line in format_error(member)]
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
    lines = [f"{CYAN}{place(entry.filename, entry.lineno)}{GREEN}{where}{RESET}"]
    for number in range(entry.lineno - around, entry.lineno + around + 1):
        text = linecache.getline(entry.filename, number).rstrip("\n")
        if number == entry.lineno:
            lines.append(f"{GREEN}----> {number}{RESET} {underlined(entry, text)}")
        elif text:
            lines.append(f"{DIM}{number:7d}{RESET} {coloured(text)}")
    return lines


def underlined(entry, text):
    """The line with the failing expression underlined (Python 3.11 and later know its columns)."""
    start, end = getattr(entry, "colno", None), getattr(entry, "end_colno", None)
    if start is None or end is None or getattr(entry, "end_lineno", 0) != entry.lineno:
        return coloured(text)
    raw = text.encode()   # the columns count UTF-8 bytes
    before, middle, after = (part.decode("utf-8", "replace")
                             for part in (raw[:start], raw[start:end], raw[end:]))
    if not middle.strip() or not before.strip() and not after.strip():
        return coloured(text)
    return f"{coloured(before)}\x1b[4m{coloured(middle)}\x1b[24m{coloured(after)}"


def coloured(text):
    """A line of Python, or a piece of one, with colours; they end without ending an underline."""
    return TOKEN.sub(lambda match: f"{TOKEN_COLOURS[match.lastgroup]}{match[0]}\x1b[39m", text)


class Exit:
    """`exit` and `quit`, with or without brackets: end the kernel when the cell is done, and tell a
    console to end as well."""

    def __init__(self, interpreter):
        self.interpreter = interpreter

    def __call__(self, code=None):
        self.interpreter.wants_exit = True
        self.interpreter.payload.append({"source": "ask_exit", "keepkernel": False})

    _ipython_display_ = __call__   # `exit` alone is the value of its cell


class Interpreter:
    """Python, as a kernel sees it. `publish(msg_type, content)` sends on iopub.

    A kernel for another language is `Kernel(connection, Other)` with a subclass that has its own
    `language_info`, `run` (which shows the value by `self.display.result(value, self.count.get())`
    or raises), `take_over` (nothing to do), and what it can of is_complete, complete, inspect.
    """

    implementation = "minijupyter"
    banner = f"MiniJupyter's kernel {__version__}, Python {sys.version}"
    language_info = {
        "name": "python", "version": sys.version.split()[0], "mimetype": "text/x-python",
        "file_extension": ".py", "pygments_lexer": "ipython3", "nbconvert_exporter": "python",
        "codemirror_mode": {"name": "ipython", "version": 3},
    }

    def __init__(self, publish, parent_header=dict):
        self.publish, self.parent_header = publish, parent_header
        self.display = Display(publish)
        self.execution_count = 0           # of the latest cell; in a cell, `count` has its own
        self.count = contextvars.ContextVar("execution_count", default=0)
        self.comms = Comms(publish)
        self.payload = []                  # what the frontend is asked to do when the cell is done
        self.stores = True                 # the running cell's value becomes _ and Out[n]
        self.wants_exit = False            # the user called exit()
        self.results = {}                  # execution_count -> text/plain, for the history
        self.serial = itertools.count(1)   # one for every cell ever compiled, shown or not
        self.flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        self.before_cell = []              # functions of the cell's code, called before it runs
        self.after_cell = []               # functions without arguments, called when it is done
        module = types.ModuleType("__main__", "The namespace of the notebook's cells.")
        self.namespace = vars(module)
        self.inputs, self.outputs = [""], {}
        self.namespace.update({"__builtins__": builtins, "In": self.inputs, "Out": self.outputs,
                               "_": "", "__": "", "___": "", "_i": "", "_ii": "", "_iii": ""})
        self.module = module

    def take_over(self):
        """Make this process the notebook's: `__main__`, `display`, the display hook, the magics."""
        sys.modules["__main__"] = self.module
        sys.displayhook, sys.breakpointhook = self.displayhook, breakpoint_here
        builtins.exit = builtins.quit = Exit(self)
        builtins.display = self.display.display
        self.magics = Magics(self)
        builtins.get_ipython = lambda: self.magics
        hook_imports(self)

    async def execute(self, code, store_history=True, user_expressions=(),
                      was_interrupted=lambda: False):
        """Run a cell; returns the content of its `execute_reply`."""
        self.payload, self.stores = [], store_history
        self.count.set(self.execution_count)
        if store_history:
            self.remember(code)
        try:
            self.begin_cell(code)
            await self.run(code)
            reply = {"status": "ok", "user_expressions": {
                name: self.evaluate(user_expressions[name]) for name in user_expressions}}
        except BaseException as error:
            if was_interrupted():   # its await was cancelled, which is how an interrupt gets in
                error = KeyboardInterrupt().with_traceback(error.__traceback__)
            reply = self.fail(error)
        try:
            self.finish_cell()
        except BaseException as error:
            self.fail(error)
        return {**reply, "payload": self.payload, "execution_count": self.count.get()}

    def begin_cell(self, code):
        for function in self.before_cell:
            function(code)

    def finish_cell(self):
        """Call what libraries want called, such as the drawing of figures."""
        for function in self.after_cell:
            function()

    def users_frames(self):
        """Our code objects below which the user's code runs: there an interrupt may raise."""
        methods = (self.begin_cell, self.run, self.evaluate, self.finish_cell)
        return [method.__func__.__code__ for method in methods]

    def fail(self, error):
        """Publish an error, keep it for the debugger, and return a failed reply."""
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
        reply = self.failure(error)
        self.publish("error", {key: reply[key] for key in ("ename", "evalue", "traceback")})
        return reply

    async def run(self, code):
        """Run a cell in the notebook's namespace and show the value of its last expression.

        The user's code runs inside this frame: `Kernel.interrupt` looks for it.
        """
        # Journey 7: the cell is translated to plain Python, parsed, split, compiled and run.
        first, _, body = code.lstrip().partition("\n")
        if first.startswith("%%") and not first.rstrip().endswith("?"):
            name, _, line = first[2:].partition(" ")
            value = self.magics.cell(name, line.strip(), body)
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
        name = f"<In[{self.count.get()}] {next(self.serial)}>"
        linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        flags, tree = self.flags | ast.PyCF_ONLY_AST, None
        with contextlib.suppress(SyntaxError, ValueError):   # perhaps it has magics in it
            tree = compile(code, name, "exec", flags, True)
        tree = tree or compile(translate(code), name, "exec", flags, True)
        steps = []
        for part, mode in zip(split_cell(tree), ("exec", "eval"), strict=True):
            if part is not None:
                steps.append(compile(part, name, mode, self.flags, True))
                self.flags |= steps[-1].co_flags & FUTURES
        return steps

    def remember(self, code):
        """Keep the source as In[n], _i, _ii, _iii and _in."""
        n, names = self.count.get(), self.namespace
        self.inputs += [""] * (n - len(self.inputs)) + [code]
        names["_iii"], names["_ii"] = names.get("_ii", ""), names.get("_i", "")
        names["_i"] = self.inputs[n - 1]
        names[f"_i{n}"] = code

    def displayhook(self, value):
        """Show the value of a last expression and keep it as `_`, `_n` and Out[n]."""
        if value is None:
            return
        names, count = self.namespace, self.count.get()
        if value is not self.outputs and self.stores:
            names["___"], names["__"] = names.get("__", ""), names.get("_", "")
            names["_"] = value
            names[f"_{count}"] = self.outputs[count] = value
            if len(self.outputs) > MOST_OUTPUTS:   # each one keeps a value alive
                oldest = next(iter(self.outputs))
                del self.outputs[oldest]
                names.pop(f"_{oldest}", None)
        text = self.display.result(value, count)
        if self.stores:
            self.results[count] = (text or "")[:MOST_RESULT]

    def evaluate(self, expression):
        """A user expression's value as a MIME bundle, or its error."""
        try:
            data, metadata = self.display.format(eval(expression, self.namespace))
            return {"status": "ok", "data": data, "metadata": metadata}
        except Exception as error:
            return self.failure(error)

    def failure(self, error):
        """The fields of `error` and of a failed `execute_reply`."""
        try:
            evalue = CELL_FILE.sub(r"Cell \1", str(error))
        except Exception as another:
            evalue = f"<str() failed: {type(another).__name__}>"
        return {"status": "error", "ename": type(error).__name__, "evalue": evalue,
                "traceback": format_error(error)}

    # -- questions, answered by the helper thread while a cell may be running --

    def is_complete(self, code):
        status, indent = is_complete(code)
        return {"status": status, **({"indent": indent} if status == "incomplete" else {})}

    def complete(self, code, cursor):
        """The content of a complete_reply, with the types that JupyterLab shows."""
        matches, start, kinds = complete(code, cursor, self.namespace, self.magics.names())
        types_ = [{"start": start, "end": cursor, "text": name, "type": kind, "signature": ""}
                  for name, kind in zip(matches, kinds, strict=True)]
        return {"matches": matches, "cursor_start": start, "cursor_end": cursor,
                "metadata": {"_jupyter_types_experimental": types_}}

    def inspect(self, code, cursor, detail):
        """The content of an inspect_reply."""
        value = NOT_THERE
        if magic := MAGIC_END.search(code[:cursor] + re.match(r"\w*", code[cursor:])[0]):
            name = magic[0].strip()
            with contextlib.suppress(NameError):
                value = self.magics.find(name.strip("%"))
        elif name := name_at(code, cursor):
            value = resolve(name, self.namespace)
        if value is NOT_THERE:
            return {"found": False, "data": {}, "metadata": {}}
        return {"found": True, "data": {"text/plain": describe(name, value, detail)},
                "metadata": {}}

    def history(self, wish):
        """The content of a history_reply: [session, number, input or [input, output]]. There is
        one session, number 1: a kernel remembers as long as it lives."""
        entries = list(enumerate(self.inputs))[1:]
        kind, n = wish["hist_access_type"], wish.get("n") or len(entries)
        if kind == "range":
            start, stop = wish.get("start") or 0, wish.get("stop")
            is_this = wish.get("session", 0) in (0, SESSION_NUMBER)
            entries = [e for e in entries if is_this and e[0] >= start
                       and (stop is None or e[0] < stop)]
        elif kind == "search":
            pattern = re.compile(fnmatch.translate(wish.get("pattern") or "*"))
            entries = [e for e in entries if pattern.match(e[1])]
            if wish.get("unique"):
                entries = sorted((number, text) for text, number in
                                 {text: number for number, text in entries}.items())
            entries = entries[-n:]
        else:
            entries = entries[-n:]
        return {"history": [
            [SESSION_NUMBER, number,
             [text, self.results.get(number)] if wish.get("output") else text]
            for number, text in entries]}


# ---- 5. Questions about code: complete, inspect, is_complete -----------------------------------
#
# A frontend asks while the person types, and a cell may be running meanwhile. So these answers
# come from the helper thread, and they never run the user's code: names are looked up in
# dictionaries, properties are not called, and an object whose attributes are made up on demand
# keeps them to itself. Not so for libraries of data, whose columns and accessors are such
# attributes: there the library's code runs, as in IPython. What a cell defines that has not run yet
# is told from its text, as far as that goes.
# Positions count characters (code points) of the code.

WORD = re.compile(r"[^\W\d]\w*")
MAGIC_END = re.compile(r"^\s*%{1,2}\w+\Z", re.M)
CHAIN_END = re.compile(r"(?:[^\W\d]\w*\s*\.\s*)*(?:[^\W\d]\w*)?$")
IMPORT_LINE = re.compile(r"^\s*(?:from\s+([\w.]+)\s+import\s+(?:[\w, ]*,\s*)?"
                         r"|(?:import|from)\s+)([\w.]*)$")
# d["ab   df.loc[rows, "ab   df[["one", "ab
KEY_END = re.compile(r"([\w.]+?)(?:\.loc)?\[(?:[^\]]*[\[,]\s*)?[\"']([^\"'\]]*)$")
QUOTED_END = re.compile(r"[\"']([^\"'\n]*)$")
SHELL_END = re.compile(r"\s*(?:[\w., ]+=\s*)?"
                       r"(?:!|%{1,2}(?:cat|cd|cp|load|ls|mkdir|mv|rm|run|writefile)\s)"
                       r"(?:.*\s)?(\S*)$")
MOST_MATCHES = 1_000
MOST_CHAIN = 1_000    # characters before the cursor in which a dotted name is looked for
OPEN_LIBRARIES = {"numpy", "pandas", "polars"}
SAFE_TYPES = (int, float, complex, str, bytes, bool, type(None))
NOT_THERE = object()
MOST_OPEN = 20        # lines before the cursor that may be begun and not whole
LITERALS = {list: (ast.List, ast.ListComp), dict: (ast.Dict, ast.DictComp), tuple: ast.Tuple,
            set: (ast.Set, ast.SetComp), str: ast.JoinedStr}


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


def is_a(value, cls):
    """isinstance, but without asking the object, whose `__class__` may be code of the user's."""
    return issubclass(type(value), cls)


def all_classes(value):
    """The classes in which an attribute of `value` is looked up."""
    own = type.__dict__["__mro__"].__get__(value) if is_a(value, type) else ()
    return own + type(value).__mro__


def static_attribute(value, name):
    """`value.name` without running anybody's code: NOT_THERE for properties and the like."""
    if is_a(value, types.ModuleType):
        return vars(value).get(name, NOT_THERE)
    own = instance_names(value).get(name, NOT_THERE)
    if own is not NOT_THERE:
        return own
    for cls in all_classes(value):
        if name in vars(cls):
            found = vars(cls)[name]
            if is_a(found, staticmethod):
                return found.__func__
            if is_a(found, classmethod):
                return types.MethodType(found.__func__, cls)
            if is_a(found, types.FunctionType) and not is_a(value, type):
                return types.MethodType(found, value)
            return NOT_THERE if hasattr(type(found), "__get__") and not callable(found) else found
    return NOT_THERE


def instance_names(value):
    """The dictionary of an object's own attributes; empty when it has none."""
    try:
        names = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return names if is_a(names, dict) else {}


def attribute_names(value):
    """All attribute names; a library's own `__dir__` is asked (pandas' columns), the user's not."""
    if type(value).__dir__ is not object.__dir__ and type(value).__module__ != "__main__":
        try:
            return [name for name in dir(value) if isinstance(name, str)]
        except Exception:
            pass   # an object that is not ready to answer; its classes are
    names = {*instance_names(value)}
    for cls in all_classes(value):
        names.update(vars(cls))
    return sorted(names)


def resolve(chain, namespace):
    """The object that `a.b.c` names, or NOT_THERE."""
    first, *rest = [part.strip() for part in chain.split(".")]
    value = namespace.get(first, getattr(builtins, first, NOT_THERE))
    for name in rest:
        if value is NOT_THERE:
            break
        value = (open_attribute if is_open(value) else static_attribute)(value, name)
    return value


def is_open(value):
    """May the attributes of this object be looked at, although that runs code?"""
    return type(value).__module__.partition(".")[0] in OPEN_LIBRARIES


def open_attribute(value, name):
    try:
        return getattr(value, name, NOT_THERE)
    except Exception:      # `series.str` where there are no strings
        return NOT_THERE


def kind_of(value):
    """The type of a match as JupyterLab shows it."""
    for kind, types_ in (("class", type), ("module", types.ModuleType)):
        if is_a(value, types_):
            return kind
    return "function" if callable(value) else "instance"


def complete(code, cursor, namespace, magics=()):
    """(matches, start, kinds): what may stand from `start` to the cursor; kinds are for people."""
    before = code[:cursor]
    line = before.rpartition("\n")[2][-MOST_CHAIN:]   # the patterns below are slow on long lines
    for find in (complete_magic, complete_import, complete_key, complete_path, complete_name):
        found = find(before, line, namespace, magics)
        if found is not None:
            break
    typed, pairs = found
    pairs = sorted({(name, kind) for name, kind in pairs if name.startswith(typed)},
                   key=lambda pair: (pair[1] != "param", pair[0][:1] == "_", pair[0].lower()))
    if not typed.startswith("_"):   # private names only when asked for
        pairs = [pair for pair in pairs if not pair[0].startswith("_")] or pairs
    pairs = pairs[:MOST_MATCHES]
    return [name for name, _ in pairs], cursor - len(typed), [kind for _, kind in pairs]


def complete_magic(before, line, namespace, magics):
    match = re.match(r"\s*(%{1,2})(\w*)$", line)
    return (match[1] + match[2], [(match[1] + name, "magic") for name in magics]) if match else None


def complete_import(before, line, namespace, magics):
    match = IMPORT_LINE.match(line)
    if not match:
        return None
    package, typed = match.groups()
    if package:                                         # from package import typed
        names = vars(sys.modules[package]) if package in sys.modules else {}
        return typed, [*((name, kind_of(value)) for name, value in list(names.items())),
                       *((name, "module") for name in submodules(package) if name not in names)]
    parent, _, last = typed.rpartition(".")             # import parent.last
    names = submodules(parent) if parent else [*sys.stdlib_module_names, *submodules("")]
    names += [name for name, value in vars(sys.modules.get(parent, ast)).items()
              if parent in sys.modules and is_a(value, types.ModuleType)]
    return last, [(name, "module") for name in names]


def submodules(package):
    """Names of the modules in a package that is loaded, or of all top-level ones."""
    return modules_in(getattr(sys.modules.get(package), "__path__", []) if package else sys.path)


def modules_in(path):
    """Names of the modules in these folders; loads nothing."""
    import pkgutil
    return [module.name for module in pkgutil.iter_modules([entry or "." for entry in path])]


def complete_key(before, line, namespace, magics):
    """`d["ab`: the keys of a dictionary, or what a library offers as keys."""
    match = KEY_END.search(line)
    value = resolve(match[1], namespace) if match else NOT_THERE
    if match is None:
        return None
    if is_a(value, dict):
        keys = dict.keys(value)
    elif type(value).__module__ == "__main__":
        keys = ()
    elif is_a(value, collections.abc.Mapping):
        keys = list(value)
    else:
        offer = getattr(type(value), "_ipython_key_completions_", None)
        if not offer and is_open(value):
            offer = getattr(type(value), "keys", None)
        keys = offer(value) if callable(offer) else ()
    return match[2], [(key, "key") for key in keys if is_a(key, str)]


def complete_path(before, line, namespace, magics):
    """Inside a string, or in a line for the shell: the files that its text may name."""
    is_open = line.count('"') % 2 or line.count("'") % 2
    match = QUOTED_END.search(line) if is_open else SHELL_END.match(line)
    if not match:
        return None
    folder, slash, typed = match[1].rpartition("/")
    try:
        entries = list(os.scandir(os.path.expanduser(folder + slash or ".")))
    except OSError:
        return typed, []
    return typed, [(entry.name + "/" * entry.is_dir(), "path") for entry in entries]


def complete_name(before, line, namespace, magics):
    chain = chain_before(before)
    owner, dot, typed = chain.rpartition(".")
    typed = typed.strip()
    if before[:len(before) - len(chain)].rstrip()[-1:] == "." or re.search(r"\d\.$", before):
        return typed, []   # an attribute of what only running the code could tell
    if not chain and before[-1:] in {*")]}'\""}:
        return typed, []   # nothing begins here
    if dot:
        value = resolve(owner, namespace)
        if value is NOT_THERE:
            value = resolve(owner, foreseen(before, namespace))
        if value is NOT_THERE:
            return typed, []
        return typed, [(name, kind_of(static_attribute(value, name)))
                       for name in attribute_names(value)]
    pairs = [(name, "keyword") for name in keyword.kwlist]
    pairs += [(name, kind_of(value)) for name, value in (*vars(builtins).items(),
                                                         *list(namespace.items()))]
    pairs += [(name, "statement") for name in WORD.findall(before[:-len(typed) or None])
              if name not in namespace and name not in vars(builtins)
              and name not in keyword.kwlist]
    pairs += [(f"{name}=", "param") for name in parameters_at(before, namespace)]
    return typed, pairs


def foreseen(before, namespace):
    """The names that a cell has when it has run up to here, as its text tells: {name: stand-in with
    the attributes of what will be there}."""
    for text in without_begun(before):
        with contextlib.suppress(SyntaxError, ValueError, TypeError, RecursionError, OSError):
            statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
            statements.sort(key=lambda node: node.lineno)
            return bindings(statements, namespace, module_named)
    return {}


def without_begun(before):
    """The text without what is begun and perhaps not whole, which may be its last line or more, or
    a `try` whose `except` is to come; the longest first."""
    lines = before.split("\n")
    for end in range(len(lines) - 1, max(-1, len(lines) - 1 - MOST_OPEN), -1):
        indent = lines[end][:len(lines[end]) - len(lines[end].lstrip())]
        text = translate("\n".join([*lines[:end], indent + "pass"]))
        yield from (text, "if 1:".join(text.rsplit("try:", 1)))


def bindings(statements, namespace, module_named):
    """{name: stand-in} for what these statements bind."""
    found = {}
    for node in statements:
        if isinstance(node, ast.Import):
            for name, alias in [(each.name, each.asname) for each in node.names]:
                top = name.partition(".")[0]
                found[alias or top] = module_named(name if alias else top)
        elif isinstance(node, ast.ImportFrom):
            package = "." * node.level + (node.module or "")
            found |= {each.asname or each.name: member_of(package, each.name, module_named)
                      for each in node.names}
        elif isinstance(node, ast.ClassDef):
            found[node.name] = type(node.name, (), bindings(node.body, namespace, module_named))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = lambda: None
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            value = value_like(node.value, {**namespace, **found})
            targets = getattr(node, "targets", None) or [node.target]
            found |= {each.id: value for each in targets if isinstance(each, ast.Name)}
    return found


def member_of(package, name, module_named):
    """What `from package import name` gives; a module in it may not be loaded."""
    value = static_attribute(module_named(package), name)
    is_stand_in = (is_a(value, types.ModuleType)
                   and sys.modules.get(vars(value).get("__name__")) is not value)
    return module_named(f"{package}.{name}") if is_stand_in else value


def value_like(node, namespace):
    """What has the attributes of an expression's value; NOT_THERE where only running it tells."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name | ast.Attribute):
        return resolve(ast.unparse(node), namespace)
    if isinstance(node, ast.Call):
        called = resolve(ast.unparse(node.func), namespace)
        return called if is_a(called, type) else NOT_THERE
    return next((make() for make, kinds in LITERALS.items() if isinstance(node, kinds)), NOT_THERE)


def module_named(name):
    """A module; if it is not loaded, one that has the names which its source binds. NOT_THERE when
    it cannot be found."""
    if name in sys.modules:
        return sys.modules[name]
    module, path = types.ModuleType(name), None
    for part in name.split("."):
        spec = importlib.machinery.PathFinder.find_spec(part, path)
        if spec is None:
            return NOT_THERE
        path = spec.submodule_search_locations
    vars(module).update((each, types.ModuleType(each)) for each in modules_in(path or []))
    if str(spec.origin).endswith(".py"):
        with open(spec.origin, "rb") as source:
            body = ast.parse(source.read()).body
        vars(module).update(bindings(outermost(body), {}, types.ModuleType))
    return module


def outermost(body):
    """The statements of a module, those in its `if` and `try` too."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from outermost([*node.body, *node.orelse, *getattr(node, "finalbody", [])])


def parameters_at(before, namespace):
    """The parameter names of the Python function whose call is open at the cursor."""
    called = open_call(before)
    function = resolve(called, namespace) if called else None
    function = getattr(function, "__init__", None) if type(function) is type else function
    if is_a(function, types.MethodType):
        function = function.__func__
    if not isinstance(function, types.FunctionType):
        return ()
    code = function.__code__
    names = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]
    return [name for name in names if name not in ("self", "cls")]


def open_call(before):
    """The dotted name before the innermost bracket that is still open; "" when there is none."""
    depth = 0
    for at in range(len(before) - 1, -1, -1):
        depth += (before[at] in ")]}") - (before[at] in "([{")
        if depth < 0:
            return chain_before(before[:at]) if before[at] == "(" else ""
    return ""


def name_at(code, cursor):
    """The dotted name under the cursor, or of the call that is open there."""
    end = cursor
    while end < len(code) and (code[end].isalnum() or code[end] == "_"):
        end += 1
    return chain_before(code[:end]).strip(" .") or open_call(code[:cursor])


def chain_before(text):
    """The dotted name at the end of text."""
    return CHAIN_END.search(text[-MOST_CHAIN:])[0]


def describe(name, value, detail=0):
    """What `name?` shows: signature, type, docstring; with `detail` the source."""
    import inspect
    lines = []
    is_usual = is_a(value, (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType))
    if is_usual or callable(value) and type(value).__module__ != "__main__":
        with contextlib.suppress(Exception):   # built in without one; a library may raise anything
            lines.append(("Signature:", f"{name}{safe_signature(value)}"))
    lines.append(("Type:     ", type(value).__name__))
    if type(value) in BRACKETS:
        lines.append(("Length:   ", str(len(value))))
    if type(value) in SAFE_TYPES:
        lines.append(("Value:    ", repr(value)[:1000]))
        return "\n".join(f"{RED}{label}{RESET} {text}" for label, text in lines)
    source = source_of(value) if detail else None
    if source is None:
        function = value.__func__ if is_a(value, types.MethodType) else value
        lines.append(("Docstring:", inspect.getdoc(function) or "<no docstring>"))
    else:
        lines.append(("Source:   ", "\n" + source))
    with contextlib.suppress(TypeError, OSError):
        lines.append(("File:     ", inspect.getfile(value)))
    return "\n".join(f"{RED}{label}{RESET} {text}" for label, text in lines)


class Hidden:
    """Stands in a signature for a default that is not shown."""

    def __repr__(self):
        return "…"


def safe_signature(function):
    """A signature that shows plain defaults only: others have a `__repr__` of the user's."""
    import inspect
    signature = inspect.signature(function)
    return signature.replace(parameters=[
        p if type(p.default) in SAFE_TYPES or p.default is p.empty else p.replace(default=Hidden())
        for p in signature.parameters.values()])


def source_of(value):
    """The source of a function, class or module, or None. A cell's class is found in its cell."""
    import inspect
    if not is_a(value, (types.FunctionType, types.MethodType, types.ModuleType, type)):
        value = type(value)
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        pass
    methods = [m for m in vars(value).values() if isinstance(m, types.FunctionType)] \
        if isinstance(value, type) else []
    for method in methods:   # Python looks for a class by its module's file, and cells have none
        lines = linecache.getlines(method.__code__.co_filename)
        for at, line in enumerate(lines):
            if re.match(rf"\s*class {value.__name__}\b", line):
                return "".join(inspect.getblock(lines[at:]))
    return None


# ---- 6. Magics: what notebooks say that is not Python -----------------------------------------
#
# `!command`, `x = !command`, `%magic`, `%%magic` and `name?` are no Python: the parser stops at
# such a line, and only there does `translate` look. So text inside strings is never touched. To
# add a magic, write a method `magic_NAME(self, line, cell)`; nothing else changes. Its docstring
# is what `%NAME?` shows; `cell` is None when it was called as a line magic.

ASSIGNED_COMMAND = re.compile(r"^(\s*)(\w[\w., ]*?)\s*=\s*([!%])(?!=)(.*)$", re.S)
MAGIC_LINE = re.compile(r"^(\s*)(!!?|%)(.*)$", re.S)
PROMPT = re.compile(r"^\s*(?:>>> ?|\.\.\. ?|In \[\d+\]: ?|\.{3,}: ?)")
HELP_LINE = re.compile(r"^(\s*)(\?{1,2})?([\w.*%]+?)(\?{1,2})?\s*$")


def translate(code):
    """`code` with its magic lines replaced by calls; the number of lines stays the same.

    The prompts of a console (`>>> `, `In [3]: `) that were pasted along are taken off, and so is
    the indentation of a piece of a program.
    """
    lines = code.split("\n")
    if PROMPT.match(code.lstrip()):
        lines = [PROMPT.sub("", line) for line in lines]
    first = next((line for line in lines if line.strip() and line.lstrip()[0] != "#"), "")
    indent = first[:len(first) - len(first.lstrip())]
    lines = [line.removeprefix(indent) for line in lines]
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
    if match := re.match(r"\s*%{1,2}([\w.]+)(\?{1,2})\s*$", text):
        return f"__shell__.pinfo('%{match[1]}', {len(match[2])})"
    if match := ASSIGNED_COMMAND.match(text):
        indent, target, kind, rest = match.groups()
        return f"{indent}{target} = {call_of(kind, rest, 'getoutput')}"
    if match := MAGIC_LINE.match(text):
        indent, kind, rest = match.groups()
        return indent + call_of(kind, rest, "getoutput" if kind == "!!" else "system",
                                may_await=not indent)
    if (match := HELP_LINE.match(text)) and (match[2] or match[4]):
        return f"{match[1]}__shell__.pinfo({match[3]!r}, {len(match[4] or match[2])})"
    return None


def call_of(kind, rest, shell_method, may_await=False):
    if kind != "%":
        return f"__shell__.{shell_method}({rest.strip()!r})"
    name, _, line = rest.strip().partition(" ")
    if name == "time" and may_await:
        return f"await __shell__.time_cell({line.strip()!r})"
    return f"__shell__.line({name!r}, {line.strip()!r})"


def spoken(seconds):
    """A duration as a person says it: `1min 5s`, `12.3 ms`."""
    if seconds >= 60:
        return f"{int(seconds // 60)}min {seconds % 60:.0f}s"
    for size, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


class Events:
    """`get_ipython().events`: functions that libraries want called around a cell."""

    def __init__(self):
        self.callbacks = collections.defaultdict(list)   # event -> functions

    def register(self, event, function):
        if function not in self.callbacks[event]:
            self.callbacks[event].append(function)

    def unregister(self, event, function):
        self.callbacks[event].remove(function)

    def trigger(self, event, *values):
        for function in list(self.callbacks[event]):
            function(*values)


class Captured:
    """What `%%capture NAME` has kept: text of both streams, and outputs as (msg_type, content)."""

    def __init__(self):
        self.streams, self.outputs = {"stdout": io.StringIO(), "stderr": io.StringIO()}, []

    stdout = property(lambda self: self.streams["stdout"].getvalue())
    stderr = property(lambda self: self.streams["stderr"].getvalue())

    def __str__(self):
        return self.stdout

    def __call__(self):
        """Show it all."""
        sys.stdout.write(self.stdout)
        sys.stderr.write(self.stderr)
        for msg_type, content in self.outputs:
            builtins.get_ipython().interpreter.publish(msg_type, content)

    show = __call__


class Magics:
    """The magics, and what `get_ipython()` returns as long as nobody has imported IPython."""

    # rich, plotly and others look at this name to learn whether they run in a notebook.
    __qualname__, __module__ = "ZMQInteractiveShell", "ipykernel.zmqshell"
    RICH_CELLS = {"html": "text/html", "HTML": "text/html", "markdown": "text/markdown",
                  "latex": "text/latex", "svg": "image/svg+xml", "SVG": "image/svg+xml",
                  "javascript": "application/javascript", "js": "application/javascript"}
    SCRIPT_CELLS = {name: name for name in ("bash", "sh", "python3", "perl", "ruby", "node")}
    SCRIPT_CELLS["python"] = sys.executable
    CELL_ONLY = ("writefile", "file", "capture", "script")
    VERBATIM = ("time", "timeit", "prun")   # their lines are Python, and not to be expanded
    COMMANDS = ("ls", "cat", "cp", "mv", "rm", "mkdir", "rmdir", "man")
    colors = "nocolor"

    def __init__(self, interpreter):
        self.interpreter, self.user_ns = interpreter, interpreter.namespace
        self.initial_names = {*self.user_ns}
        self.events, self.shell = Events(), None    # IPython's own shell, once it was imported
        self.display_formatter = types.SimpleNamespace(formatters={
            mime: TypeFormatter(mime) for mime in ("text/plain", *REPR_METHODS.values())})
        self.kernel = types.SimpleNamespace(comm_manager=interpreter.comms)
        self.run_line_magic, self.run_cell_magic = self.line, self.cell
        interpreter.before_cell.append(self.before_cell)
        interpreter.after_cell.append(self.after_cell)
        builtins.__shell__ = self
        type(self).__name__ = type(self).__qualname__

    # -- what libraries call --

    def before_cell(self, code):
        for shell in filter(None, (self, self.shell)):
            shell.events.trigger("pre_execute")
            shell.events.trigger("pre_run_cell", types.SimpleNamespace(
                raw_cell=code, store_history=True, silent=False, shell_futures=True, cell_id=None))

    def after_cell(self):
        for shell in filter(None, (self, self.shell)):
            shell.events.trigger("post_execute")
            shell.events.trigger("post_run_cell", types.SimpleNamespace(
                success=True, result=None, error_in_exec=None))

    def enable_gui(self, gui=None):
        """matplotlib asks; there is no window system here."""

    def register_magic_function(self, function, magic_kind="line", magic_name=None):
        """Let `%NAME` call `function(line)`, or `%%NAME` call `function(line, cell)`."""
        name = magic_name or function.__name__
        setattr(self, f"magic_{name}", lambda line, cell:
                function(line) if cell is None else function(line, cell))

    def ev(self, expression):
        return eval(expression, self.user_ns)

    def run_cell(self, code, **options):
        """Run source in the notebook's namespace; it must not await."""
        return finished(self.interpreter.run_source(code))

    def push(self, variables):
        self.user_ns.update(variables)

    def set_next_input(self, text, replace=False):
        """Put text into a new cell below, or into this one."""
        self.interpreter.payload = [p for p in self.interpreter.payload
                                    if p["source"] != "set_next_input"]
        self.interpreter.payload.append(
            {"source": "set_next_input", "text": text, "replace": replace})

    # -- finding and calling --

    def line(self, name, line):
        if name in (*self.CELL_ONLY, *self.RICH_CELLS, *self.SCRIPT_CELLS):
            raise TypeError(f"%%{name} is a cell magic: write it in the first line of a cell")
        return self.find(name, "line")(line if name in self.VERBATIM else self.expand(line), None)

    def cell(self, name, line, cell):
        if name in self.RICH_CELLS:
            return self.interpreter.display.publish_display_data({self.RICH_CELLS[name]: cell})
        if name in self.SCRIPT_CELLS:
            return self.magic_script(f"{self.SCRIPT_CELLS[name]} {line}", cell)
        return self.find(name, "cell")(line, cell)

    def find(self, name, kind="line"):
        """A magic's function of (line, cell). Raises NameError with the nearest name."""
        if name in self.COMMANDS:
            return lambda line, cell: self.system(f"{name} {line}")
        if method := getattr(self, f"magic_{name}", None):
            return method
        if self.shell and (theirs := self.shell.find_magic(name, kind)):
            return lambda line, cell: theirs(line) if cell is None else theirs(line, cell)
        import difflib
        near = difflib.get_close_matches(name, self.names(), 1)
        raise NameError(f"there is no magic %{name}"
                        + (f"; did you mean %{near[0]}?" if near else ""))

    def names(self):
        return sorted({*(name.removeprefix("magic_") for name in dir(self)
                         if name.startswith("magic_")),
                       *self.RICH_CELLS, *self.SCRIPT_CELLS, *self.COMMANDS})

    # -- commands of the system --

    def system(self, command):
        """Run a shell command; what it prints comes through descriptors 1 and 2."""
        if isinstance(sys.stdout, Stream):
            self.run_shell(command)
        else:   # somebody keeps what is printed: %%capture
            print("\n".join(self.getoutput(f"({command}\n) 2>&1")))

    def getoutput(self, command):
        """Run a shell command and return its lines."""
        return self.run_shell(command, keeps_output=True).splitlines()

    def run_shell(self, command, keeps_output=False):
        """Run a shell command; of an interrupt, the traceback shows the user's line alone."""
        import subprocess
        try:
            done = subprocess.run(self.expand(command), shell=True, text=True, errors="replace",
                                  stdout=subprocess.PIPE if keeps_output else None)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None
        self.user_ns["_exit_code"] = done.returncode
        return done.stdout

    def expand(self, command):
        """`command` with {expression} and $name replaced by their values, where they have one."""
        def value(match):
            if match[0] in ("{{", "}}", "$$"):
                return match[0][0]
            expression = match[1] or match[2]
            if expression.isidentifier() and expression not in self.user_ns:
                return match[0]       # shell syntax, such as $HOME or awk's {print}
            try:
                return str(eval(expression, self.user_ns))
            except Exception:
                return match[0]
        return re.sub(r"\{\{|\}\}|\$\$|(?<![$\\])\{([^{}\n]+)\}|(?<!\\)\$([A-Za-z_]\w*)",
                      value, command)

    def magic_script(self, line, cell):
        """Run the cell with a program: `%%script [--out NAME] [--err NAME] [--no-raise-error]
        PROGRAM [ARGUMENTS]`; its output or errors go into a variable of that name."""
        import shlex
        import subprocess
        words = shlex.split(line)
        names = {option: words.pop(words.index(option) + 1) for option in ("--out", "--err")
                 if option in words}
        checks = "--no-raise-error" not in words
        done = subprocess.run([word for word in words if word not in
                               ("--out", "--err", "--no-raise-error")], input=cell, text=True,
                              stdout=subprocess.PIPE if "--out" in names else None,
                              stderr=subprocess.PIPE if "--err" in names else None)
        self.user_ns.update({name: done.stdout if option == "--out" else done.stderr
                             for option, name in names.items()})
        if checks:
            done.check_returncode()

    def magic_system(self, line, cell):
        """Run a shell command and return its lines."""
        return self.getoutput(line if cell is None else cell)

    magic_sx = magic_system

    def magic_pip(self, line, cell):
        """Run pip in this kernel's environment: `%pip install NAME`."""
        self.system(f'"{sys.executable}" -m pip {line}')

    def magic_cd(self, line, cell):
        """Change the working directory."""
        os.chdir(os.path.expanduser(line.strip("\"'") or "~"))
        print(os.getcwd())

    def magic_pwd(self, line, cell):
        """The working directory."""
        return os.getcwd()

    def magic_env(self, line, cell):
        """Show or set environment variables: `%env`, `%env NAME`, `%env NAME=VALUE`."""
        name, given, value = line.partition("=" if "=" in line else " ")
        if given:
            os.environ[name.strip()] = self.expand(value.strip())
            return print(f"env: {name.strip()}={os.environ[name.strip()]}")
        return os.environ[line] if line else dict(os.environ)

    magic_set_env = magic_env

    # -- help --

    def pinfo(self, name, detail):
        """Show in the pager what `name?` or `name??` asks for, or the names that fit a pattern."""
        if "*" in name:
            names = fnmatch.filter(sorted({*self.user_ns, *vars(builtins)}), name)
            return self.page("\n".join(names))
        try:
            value = (self.find(name.strip("%")) if name[0] == "%" else eval(name, self.user_ns))
        except Exception:
            return print(f"Object `{name}` not found.")
        self.page(describe(name, value, detail - 1))

    def page(self, text):
        """Show text in the frontend's pager."""
        self.interpreter.payload.append(
            {"source": "page", "data": {"text/plain": text}, "start": 0})

    def magic_pinfo(self, line, cell):
        """Describe an object: the same as `NAME?`."""
        self.pinfo(line, 1)

    def magic_lsmagic(self, line, cell):
        """List the magics."""
        cells = {*self.CELL_ONLY, *self.RICH_CELLS, *self.SCRIPT_CELLS}
        print("Line magics: " + "  ".join(f"%{n}" for n in self.names() if n not in cells))
        print("Cell magics: " + "  ".join(f"%%{n}" for n in sorted(cells | {"time", "timeit"})))

    def magic_quickref(self, line, cell):
        """Show every magic with its first line of help in the pager."""
        self.page("\n".join(f"%{name:<14} {(getattr(self, f'magic_{name}').__doc__ or '').strip()}"
                            for name in self.names() if hasattr(self, f"magic_{name}")))

    magic_magic = magic_quickref

    def magic_history(self, line, cell):
        """Print the cells that were run: `%history [-n] [FIRST-LAST]`; `-n` with their numbers."""
        inputs = self.interpreter.inputs
        wanted = re.search(r"(\d+)(?:-(\d+))?$", line)
        first = int(wanted[1]) if wanted else 1
        last = int(wanted[2] or wanted[1]) if wanted else len(inputs)
        for number, code in enumerate(inputs[first:last + 1], first):
            print(f"{number:4}: {code}" if "-n" in line.split() else code)

    def magic_who(self, line, cell):
        """Print the names that the notebook has defined."""
        print("\t".join(self.own_names()) or "Interactive namespace is empty.")

    def magic_whos(self, line, cell):
        """Print the notebook's names with type and value."""
        rows = [("Variable", "Type", "Data/Info")]
        for name in self.own_names():
            value = self.user_ns[name]
            text = f"n={len(value)}" if type(value) in BRACKETS else " ".join(repr(value).split())
            rows.append((name, type(value).__name__, text[:60]))
        for name, kind, text in rows:
            print(f"{name:<12} {kind:<12} {text}")

    def own_names(self):
        return [name for name in sorted(self.user_ns)
                if name not in self.initial_names and not name.startswith("_")]

    # -- time --

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
        running = self.time_cell(line if cell is None else f"{line}\n{cell}")
        return finished(running) if cell is None else running

    def magic_timeit(self, line, cell):
        """Time code over many runs: `%timeit [-n LOOPS] [-r RUNS] [-q] [-o] code`."""
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

    def magic_prun(self, line, cell):
        """Profile a statement or cell."""
        import cProfile
        import pstats
        profile = cProfile.Profile()
        try:
            profile.runctx(line if cell is None else cell, self.user_ns, self.user_ns)
        finally:
            pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(40)

    # -- files --

    def magic_writefile(self, line, cell):
        """Write the cell into a file: `%%writefile [-a] PATH`; -a appends."""
        appends = line.startswith("-a ")
        path = os.path.expanduser(line.removeprefix("-a ").strip().strip("\"'"))
        verb = "Appending to" if appends else "Overwriting" if os.path.exists(path) else "Writing"
        with open(path, "a" if appends else "w", encoding="utf-8") as file:
            file.write(cell)
        print(f"{verb} {path}")

    magic_file = magic_writefile

    def magic_load(self, line, cell):
        """Put the source of a file or an object into this cell."""
        if os.path.exists(line):
            with open(line, encoding="utf-8") as file:
                text = file.read()
        else:
            text = source_of(eval(line, self.user_ns)) or ""
        self.set_next_input(f"# %load {line}\n{text}", replace=True)

    def magic_run(self, line, cell):
        """Run a Python file as a program and keep its names: `%run [-i] FILE [ARGUMENTS]`."""
        import shlex
        words = shlex.split(line)
        shares, (path, *arguments) = words[0] == "-i", words[words[0] == "-i":]
        path = os.path.expanduser(path if os.path.exists(path) else f"{path}.py")
        with open(path, "rb") as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
        names = self.user_ns if shares else {"__name__": "__main__", "__file__": path,
                                             "__builtins__": builtins}
        saved, sys.argv[:] = sys.argv[:], [path, *arguments]
        try:
            exec(code, names)
        finally:
            sys.argv[:] = saved
            self.user_ns.update({name: value for name, value in names.items()
                                 if not name.startswith("__")})

    # -- the session --

    async def capture(self, cell, captured, hidden):
        """Run source with the `hidden` kinds of output put aside."""
        publish, streams = self.interpreter.display.publish, (sys.stdout, sys.stderr)
        if "stdout" in hidden:
            sys.stdout = captured.streams["stdout"]
        if "stderr" in hidden:
            sys.stderr = captured.streams["stderr"]
        if "display" in hidden:
            self.interpreter.display.publish = lambda *output: captured.outputs.append(output)
        try:
            value = await self.interpreter.run_source(cell)
            if value is not None and not is_muted(cell):
                self.interpreter.displayhook(value)
        finally:
            for function in self.interpreter.after_cell:   # its figures are its output, too
                function()
            (sys.stdout, sys.stderr), self.interpreter.display.publish = streams, publish

    def magic_capture(self, line, cell):
        """Put output aside: `%%capture [NAME] [--no-stdout] [--no-stderr] [--no-display]`."""
        captured = Captured()
        for name in [word for word in line.split() if not word.startswith("--")]:
            self.user_ns[name] = captured
        hidden = [kind for kind in ("stdout", "stderr", "display") if f"--no-{kind}" not in line]
        return self.capture(cell, captured, hidden)

    def magic_debug(self, line, cell):
        """Look around where the last error was raised, with Python's debugger."""
        if getattr(sys, "last_traceback", None) is None:
            return print("There is no error to debug.")
        one = debugger()
        one.reset()
        one.interaction(None, sys.last_traceback)

    def magic_reset(self, line, cell):
        """Forget the notebook's names: `%reset [-f] [out]`; without -f it asks."""
        if "-f" not in line and input("Forget all names of the notebook (y/[n])? ") != "y":
            return
        self.interpreter.outputs.clear()
        for name in list(self.user_ns):
            is_result = re.fullmatch(r"_\d*|__|___", name) is not None
            if is_result or "out" not in line.split() and name not in self.initial_names:
                del self.user_ns[name]
        self.user_ns.update({"_": "", "__": "", "___": ""})

    def magic_load_ext(self, line, cell):
        """Load an IPython extension; `autoreload` works without IPython, too."""
        try:
            if line == "autoreload":
                importlib.import_module("IPython.extensions.autoreload")
                line = "IPython.extensions.autoreload"
        except ImportError:
            return   # %autoreload is one of ours
        importlib.import_module(line).load_ipython_extension(self.shell or self)

    magic_reload_ext = magic_load_ext

    def magic_autoreload(self, line, cell):
        """Import changed modules anew before each cell: `%autoreload 2`; 0 ends it."""
        if self.shell and (theirs := self.shell.find_magic("autoreload")):
            return theirs(line)
        self.file_times = {}   # path of a module -> when it was changed, as far as we know
        self.changed_modules()
        for event, function in (("pre_execute", self.reload_changed),
                                ("post_execute", self.changed_modules)):   # notes what is new
            if line.strip() not in ("0", "off"):
                self.events.register(event, function)
            elif function in self.events.callbacks[event]:
                self.events.unregister(event, function)

    def changed_modules(self):
        """(module, path, when) of those whose files were changed; what is new is noted."""
        changed = []
        for module in list(sys.modules.values()):
            path = getattr(module, "__file__", None) or ""
            if not path.endswith(".py") or "site-packages" in path or not os.path.exists(path):
                continue
            when = os.stat(path).st_mtime_ns
            if self.file_times.setdefault(path, when) != when:
                changed.append((module, path, when))
        return changed

    def reload_changed(self):
        """Reload what has changed, and bind the notebook's names that came from it anew."""
        for module, path, when in self.changed_modules():
            self.file_times[path] = when
            importlib.reload(module)
            for name, value in list(self.user_ns.items()):
                if getattr(value, "__module__", None) == module.__name__:
                    self.user_ns[name] = getattr(module, value.__name__, value)

    def magic_matplotlib(self, line, cell):
        """Accepted: figures are always shown inline here."""

    magic_config = magic_xmode = magic_colors = magic_autosave = magic_pylab = magic_matplotlib


def finished(coroutine):
    """The result of a coroutine that never waits; raises SyntaxError when it does."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    coroutine.close()
    raise SyntaxError("a line magic cannot await; use %%time for the whole cell")


# ---- 7. Comms: wires between an object here and one in the page --------------------------------
#
# A comm is opened by either side under a target's name; then both send data and buffers in
# `comm_msg`, until one closes it. ipywidgets live on them. The classes have the interface of the
# package `comm`, which takes them from here when it is imported.

class Comm:
    """One wire. Opened here, it tells the page so; opened there, it is `primary=False`."""

    def __init__(self, target_name="comm", data=None, metadata=None, buffers=None, comm_id=None,
                 primary=True, manager=None, target_module=None, **ignored):
        self.comm_id, self.target_name = comm_id or os.urandom(16).hex(), target_name
        self.primary, self.target_module, self.manager = primary, target_module, manager
        self.message_callback = self.close_callback = None
        self.is_closed = False
        if primary:
            self.open(data, metadata, buffers)

    def open(self, data=None, metadata=None, buffers=None):
        self.manager.register_comm(self)
        more = {"target_name": self.target_name}
        if self.target_module:
            more["target_module"] = self.target_module
        self.publish_msg("comm_open", data, metadata, buffers, **more)

    def send(self, data=None, metadata=None, buffers=None):
        self.publish_msg("comm_msg", data, metadata, buffers)

    def close(self, data=None, metadata=None, buffers=None, deleting=False):
        if not self.is_closed:
            self.is_closed = True
            self.publish_msg("comm_close", data, metadata, buffers)
            self.manager.unregister_comm(self)

    def publish_msg(self, msg_type, data=None, metadata=None, buffers=None, **more):
        self.manager.publish(msg_type, {"comm_id": self.comm_id, "data": data or {}, **more},
                             metadata=metadata, buffers=buffers or ())

    def on_msg(self, callback):
        """Call `callback(message)` for every comm_msg from the page."""
        self.message_callback = callback

    def on_close(self, callback):
        self.close_callback = callback

    def handle_msg(self, message):
        if self.message_callback:
            self.message_callback(message)

    def handle_close(self, message):
        self.is_closed = True
        if self.close_callback:
            self.close_callback(message)


class Comms:
    """All comms by id, and the targets that the page may open. `publish` is the outbox's."""

    def __init__(self, publish):
        self.publish = publish
        self.comms = {}     # comm_id -> Comm
        self.targets = {}   # target_name -> function(comm, message)

    def register_target(self, name, function):
        """Call `function(comm, message)` when the page opens a comm to `name`."""
        self.targets[name] = function

    def unregister_target(self, name, function=None):
        return self.targets.pop(name)

    def register_comm(self, comm):
        self.comms[comm.comm_id] = comm
        return comm.comm_id

    def unregister_comm(self, comm):
        self.comms.pop(comm.comm_id, None)

    def get_comm(self, comm_id):
        return self.comms.get(comm_id)

    def create(self, *args, **options):
        return Comm(*args, **{"manager": self, **options})

    def comm_open(self, message):
        """The page opens a comm; one to a target that nobody registered is closed at once."""
        content = message["content"]
        comm = self.create(content["target_name"], comm_id=content["comm_id"], primary=False)
        target = self.targets.get(comm.target_name)
        if target is None:
            return comm.close()
        self.register_comm(comm)
        target(comm, message)

    def comm_msg(self, message):
        if comm := self.comms.get(message["content"]["comm_id"]):
            comm.handle_msg(message)

    def comm_close(self, message):
        if comm := self.comms.pop(message["content"]["comm_id"], None):
            comm.handle_close(message)


# ---- 8. Other people's modules: matplotlib, IPython, comm --------------------------------------
#
# A few libraries must know that they run in a notebook. matplotlib draws figures for a backend, so
# it gets one of ours. `from IPython.display import …` stands in a quarter of all notebooks: when
# IPython is missing, a stand-in is imported in its place; when it is there and somebody imports
# it, one real shell of its is made, which works in our namespace and speaks through us. Nothing is
# imported before the user does: a finder on `sys.meta_path` waits.

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
        if spec is None or isinstance(spec.loader, StandIns):
            self.hooks[name] = hook         # not installed; perhaps it will be
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            try:
                execute(module)
            except BaseException:
                self.hooks[name] = hook     # the next try is a first one again
                raise
            hook(module)

        spec.loader.exec_module = exec_module
        return spec


class StandIns:
    """Modules made on the spot, for names that nobody else can import: {name: function(module)}."""

    def __init__(self, makers):
        self.makers = makers

    def find_spec(self, name, path=None, target=None):
        if name in self.makers:
            is_package = name in ("IPython", "IPython.core", "IPython.terminal")
            return importlib.util.spec_from_loader(name, self, is_package=is_package)
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
        is_linked = url is not None and not embed
        super().__init__(data, None if is_linked else url, filename, **options)
        self.url = url if is_linked else None
        kinds = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
        found = [kind for magic, kind in kinds.items() if bytes(self.data or b"").startswith(magic)]
        self.mime = f"image/{(format or (found or ['png'])[0]).replace('jpg', 'jpeg')}"

    def names_file(self, text):
        return True

    def _repr_mimebundle_(self, include=None, exclude=None):
        if self.url:
            size = "".join(f" {name}='{value}'" for name, value in self.metadata.items())
            return {"text/html": f"<img src='{self.url.replace(chr(39), '%27')}'{size}>"}
        return super()._repr_mimebundle_()


class ProgressBar:
    """A bar that an iteration over it fills."""

    def __init__(self, total):
        self.total, self.progress, self.handle = total, 0, None

    def __iter__(self):
        from_display = builtins.display
        self.handle = from_display(self, display_id=True)
        for progress in range(self.total):
            self.progress = progress
            self.handle.update(self)
            yield progress
        self.progress = self.total
        self.handle.update(self)

    def __repr__(self):
        done = 60 * self.progress // max(1, self.total)
        return f"[{'=' * done}{' ' * (60 - done)}] {self.progress}/{self.total}"

    def _repr_html_(self):
        return f"<progress max='{self.total}' value='{self.progress}'></progress>"


class Math(Rich):
    """TeX, shown as a displayed formula."""

    mime = "text/latex"

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {self.mime: "$\\displaystyle " + self.data.strip("$") + "$"}


def rich_class(name, mime):
    return type(name, (Rich,), {"mime": mime, "__doc__": f"Data of type {mime}."})


class Embedded(Rich):
    """A sound, a film or another page: HTML around a URL or around data of its own."""

    mime, reads_as, form = "text/html", "rb", "<a href='{src}'>{src}</a>"

    def __init__(self, data=None, width="", height="", url=None, filename=None, **options):
        is_address = isinstance(data, str)
        super().__init__(None if is_address else data, filename=filename)
        kind = self.options.get("mimetype", options.get("mimetype", "application/octet-stream"))
        src = url or data if self.data is None else f"data:{kind};base64,{json_default(self.data)}"
        self.metadata, src = {}, src.replace("'", "%27").replace("<", "%3C")
        self.data = self.form.format(src=src, width=int(width or 400), height=int(height or 300))


class FileLinks(Embedded):
    """Links to the files of a folder."""

    def __init__(self, path, **options):
        names = sorted(os.listdir(path))
        super().__init__(path)
        self.data = "<br>".join(Embedded(f"{path}/{name}").data for name in names)


def embedded_class(name, form):
    return type(name, (Embedded,), {"form": form, "__doc__": f"{name} in the notebook."})


EMBEDDED = {
    "IFrame": "<iframe src='{src}' width='{width}' height='{height}'></iframe>",
    "YouTubeVideo": "<iframe src='https://www.youtube.com/embed/{src}' width='{width}' "
                    "height='{height}'></iframe>",
    "Audio": "<audio controls src='{src}'></audio>",
    "Video": "<video controls src='{src}' width='{width}'></video>",
    "FileLink": "<a href='{src}'>{src}</a>",
}


def ipython_display(display):
    """The names of IPython.display, as far as this kernel knows them."""
    names = {name: rich_class(name, mime) for name, mime in (
        ("HTML", "text/html"), ("Markdown", "text/markdown"), ("Latex", "text/latex"),
        ("SVG", "image/svg+xml"), ("JSON", "application/json"), ("Pretty", "text/plain"),
        ("Code", "text/plain"), ("Javascript", "application/javascript"),
        ("GeoJSON", "application/geo+json"))}
    names.update({name: embedded_class(name, form) for name, form in EMBEDDED.items()})
    names["FileLinks"] = FileLinks
    names.update(Image=Image, Math=Math, ProgressBar=ProgressBar, DisplayHandle=DisplayHandle,
                 display=display.display, update_display=display.update_display,
                 clear_output=display.clear_output,
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


class TypeFormatter:
    """`get_ipython().display_formatter.formatters[mime]`: lets libraries add rows to FORMATTERS."""

    def __init__(self, mime):
        self.mime = mime
        self.type_printers, self.deferred_printers = {}, {}

    def for_type(self, cls, function=None):
        self.for_type_by_name(cls.__module__, cls.__qualname__, function)

    def for_type_by_name(self, module, name, function=None):
        if self.mime != "text/plain" and function:   # there IPython gives functions a printer
            FORMATTERS.setdefault((module, name), {})[self.mime] = function


def make_ipython_shell(interpreter, names):
    """IPython's own shell, for those who ask for it: in our namespace, showing through us."""
    from IPython.core.displaypub import DisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    class Publisher(DisplayPublisher):
        def publish(self, data, metadata=None, *, transient=None, update=False, **ignored):
            names["publish_display_data"](data, metadata, transient, update)

        def clear_output(self, wait=False):
            names["clear_output"](wait)

    class ZMQInteractiveShell(InteractiveShell):   # a name that libraries look for
        __module__ = "ipykernel.zmqshell"

        def _showtraceback(self, etype, evalue, stb):   # of errors that a widget catches
            interpreter.publish("error", {"ename": etype.__name__, "evalue": str(evalue),
                                          "traceback": stb})

    before = {*interpreter.namespace}
    ours = {name: interpreter.namespace.get(name) for name in ("In", "Out", "_", "__", "___")}
    shell = ZMQInteractiveShell.instance(
        user_module=interpreter.module, user_ns=interpreter.namespace,
        config=Config({"HistoryManager": {"enabled": False}}))
    interpreter.namespace.update(ours)
    for name in ("exit", "quit"):
        interpreter.namespace.pop(name, None)
    shell.display_pub = Publisher(shell=shell, parent=shell)
    shell.set_next_input = interpreter.magics.set_next_input
    shell.kernel = types.SimpleNamespace(comm_manager=interpreter.comms, get_parent=lambda: {
        "header": interpreter.parent_header()})
    sys.displayhook = interpreter.displayhook
    interpreter.magics.initial_names |= {*interpreter.namespace} - before
    return shell


def connect_ipython(interpreter, names):
    """Called when IPython has been imported: from now on its formatters describe all values."""
    shell = make_ipython_shell(interpreter, names)

    def bundle(value):
        data, metadata = shell.display_formatter.format(value)
        for mime, function in formatters_for(value).items():
            data[mime] = function(value)
        return without_bytes(data), metadata

    interpreter.magics.shell, interpreter.display.format = shell, bundle
    builtins.get_ipython = lambda: shell


def connect_comm(comm, interpreter):
    """Called when the package comm has been imported: its comms are ours."""
    comm.create_comm, comm.get_comm_manager = interpreter.comms.create, lambda: interpreter.comms


def connect_matplotlib(matplotlib):
    FORMATTERS["matplotlib.figure", "Figure"] = {"image/png": figure_png}
    if "MPLBACKEND" not in os.environ:
        matplotlib.use(f"module://{BACKEND}")


def hook_imports(interpreter):
    """Prepare for the imports named above, which the user may or may not make."""
    names = ipython_display(interpreter.display)
    about = {"get_ipython": builtins.get_ipython, "version_info": (9, 0, 0), "__version__": "9.0.0",
             "display": names["display"], "InteractiveShell": Magics,
             "TerminalInteractiveShell": type("TerminalInteractiveShell", (), {})}

    def speak_through_us(functions):   # IPython.core.display_functions, the real one
        for name in ("display", "update_display", "clear_output", "publish_display_data"):
            setattr(functions, name, names[name])

    def fill(module):
        vars(module).update(about if module.__name__ == "IPython" else {**names, **about})

    sys.meta_path.insert(0, AfterImport({
        "matplotlib": connect_matplotlib,
        "comm": lambda comm: connect_comm(comm, interpreter),
        "IPython": lambda ipython: connect_ipython(interpreter, names),
        "IPython.core.display_functions": speak_through_us}))
    stand_ins = ("IPython", "IPython.display", "IPython.core", "IPython.core.display",
                 "IPython.core.getipython", "IPython.core.interactiveshell", "IPython.terminal",
                 "IPython.terminal.interactiveshell")
    sys.meta_path.append(StandIns({BACKEND: lambda module: make_backend(module, interpreter),
                                   **dict.fromkeys(stand_ins, fill)}))


# ---- 9. The kernel: five sockets, one dispatcher --------------------------------------------
#
# A handler is a method named as the message type it answers; HANDLERS says which thread runs it
# and is at the same time the list of what a client may ask for. A handler returns the content of
# its reply. Every request is bracketed by `status: busy` and `status: idle` on iopub, whatever
# becomes of it. To answer a new message, write its method and add its row.

REPLY_STATUS = {"status": "ok"}
RETRY_MS = 20       # until what could not be sent is tried again; a person does not notice it
BRISK_MS = 1        # the same while a subscriber that is slow takes something each time
DEAF_SECONDS = 1    # after the start, until which requests wait for a subscriber of iopub
LATE_SECONDS = 1       # after an error in which cells may still come that were sent before it
EXIT_SECONDS = 0.3     # between the reply to exit() and the end
QUESTION_SECONDS = 2   # for an answer about code; then the frontend is told that there is none
UNWANTED = 1000     # cells that are dropped before they have come and are remembered
STALL_SECONDS = 10  # that a slow subscriber may hold up the output of all
HANDLERS = {    # msg_type -> who runs its handler
    "kernel_info_request": "io",
    "connect_request": "io",
    "interrupt_request": "io",
    "shutdown_request": "io",
    "create_subshell_request": "io",
    "delete_subshell_request": "io",
    "list_subshell_request": "io",
    "abort_request": "io",
    "complete_request": "helper",
    "inspect_request": "helper",
    "is_complete_request": "helper",
    "history_request": "helper",
    "comm_info_request": "helper",
    "usage_request": "helper",
    "execute_request": "cells",
    "comm_open": "cells",
    "comm_msg": "cells",
    "comm_close": "cells",
}
FEATURES = ["kernel subshells"]
COLLECT_AFTER = 10_000   # new objects; after 700, as usual, a flood of prints collects all the time
CHILD_EVENTS = {"subprocess.Popen", "os.system", "os.fork", "os.posix_spawn",   # of sys.audit
                "ctypes.dlopen", "ctypes.dlsym"}


def is_cell(request):
    return request["header"]["msg_type"] == "execute_request"


def seconds_of(header):
    """A header's date in seconds, by its sender's clock; None when it cannot be read."""
    from datetime import datetime
    try:
        return datetime.fromisoformat(header["date"].replace("Z", "+00:00")).timestamp()
    except (KeyError, ValueError, AttributeError):
        return None


def error_date(request):
    """When a request has failed, by the clock of its client, so that no two clocks are compared:
    its own date and the time it has been here. (A browser's dates are cut to milliseconds.)"""
    sent, age = seconds_of(request["header"]), time.monotonic() - request["received"]
    return None if sent is None else sent + max(0, age - 0.001)


class Cells:
    """A queue of cells and the thread that runs them, one at a time, inside one asyncio loop.

    The kernel has one on the main thread; every subshell (JEP 91) is another one.
    """

    def __init__(self, kernel):
        self.kernel, self.outbox = kernel, kernel.outbox
        self.waiting = collections.deque()   # requests
        self.loop = self.task = self.arrived = None   # once it runs
        self.is_busy = False                 # a cell is being run
        self.was_cancelled = False           # its await was ended: an interrupt
        self.failed = None                   # (session, time by its clock, by ours) of an error
        self.is_stopping = False

    def put(self, request):
        """Called by io. A comm message need not wait for a cell that awaits something; but it may
        not overtake cells, which perhaps register its target."""
        if self.is_busy and self.loop and not is_cell(request) and not self.waiting:
            self.loop.call_soon_threadsafe(self.kernel.answer, request)
        else:
            self.waiting.append(request)
            self.wake()

    def wake(self):
        if self.loop:
            self.loop.call_soon_threadsafe(self.arrived.set)

    def stop(self):
        """End when the running cell has; returns the requests that waited."""
        self.is_stopping = True
        waiting = []
        with contextlib.suppress(IndexError):   # the thread may be taking the last one, too
            while True:
                waiting.append(self.waiting.popleft())
        self.wake()
        return waiting

    def run(self):
        """The thread's life, until `stop`."""
        import asyncio
        import gc
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        self.arrived = asyncio.Event()
        self.task = loop.create_task(self.one_after_the_other())
        if threading.current_thread() is threading.main_thread():
            gc.freeze()   # what is loaded by now stays: the collector need not look at it again
            gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])
        self.loop = loop
        while not self.task.done():
            try:
                loop.run_until_complete(self.task)
            except KeyboardInterrupt:
                pass      # it ended a background task of the user's, which remembers it
            except BaseException:
                if self.task.done():
                    raise
        if self is not self.kernel.shells.get(None):
            loop.close()

    async def one_after_the_other(self):
        import asyncio
        while not self.is_stopping:
            while self.waiting:
                request = self.waiting.popleft()
                if is_cell(request) and self.is_too_late(request):
                    self.kernel.abort(request)
                elif is_cell(request):
                    await self.execute(request)
                else:
                    self.kernel.answer(request)
                await asyncio.sleep(0)   # background tasks have their turn
            self.arrived.clear()
            if not self.is_stopping and not self.waiting:
                await self.arrived.wait()

    async def execute(self, request):
        """Run one execute_request from busy to idle; after an error, abort those that wait."""
        kernel, content = self.kernel, request["content"]
        kernel.enter(request)
        self.is_busy, stops = True, content.get("stop_on_error", True)
        started = {"started": date_now()}
        kernel.status("busy", request)
        try:
            reply = await kernel.execute_request(request, lambda: self.was_cancelled)
        except BaseException as error:   # the client's mistake, or a SIGINT at an odd moment
            reply = {**failed(error), "execution_count": kernel.interpreter.execution_count}
            stops = False
        if os.getpid() != kernel.process_id:   # a child that was forked in the cell and not ended
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        self.is_busy = False
        self.forget_cancel()
        kernel.drain()
        # Taken before the reply leaves: what a client sends when it has seen the error is run.
        aborted = []
        if reply["status"] == "error" and stops:
            aborted = self.take_cells()
            self.failed = (request["header"].get("session"), error_date(request),
                           time.monotonic())
        try:
            kernel.finish(request, reply, started)
        except (TypeError, ValueError) as error:   # a payload or value that JSON has no word for
            kernel.finish(request, {**failed(error), "execution_count": reply["execution_count"]})
        for other in aborted:
            kernel.abort(other)
        if kernel.interpreter.wants_exit:   # soon: a console must have seen the reply before
            self.loop.call_later(EXIT_SECONDS, kernel.stop)

    def take_cells(self):
        """The cells that wait, taken out; comm messages go on waiting."""
        waiting = [self.waiting.popleft() for _ in range(len(self.waiting))]
        self.waiting.extendleft(reversed([r for r in waiting if not is_cell(r)]))
        return [request for request in waiting if is_cell(request)]

    def drop(self, msg_ids):
        """Called by io: take these cells out, if they still wait; returns them."""
        dropped = []
        for request in list(self.waiting):
            if is_cell(request) and request["header"]["msg_id"] in msg_ids:
                with contextlib.suppress(ValueError):   # its turn has just come
                    self.waiting.remove(request)
                    dropped.append(request)
        return dropped

    def is_too_late(self, request):
        """True for a cell that its client sent before it could know of the latest error, but that
        came after it: it belongs to those that were aborted."""
        session, failed_date, failed = self.failed or (None, None, 0)
        is_recent = request["received"] < failed + LATE_SECONDS
        if not is_recent or session != request["header"].get("session"):
            return False
        sent = seconds_of(request["header"])
        return sent is not None and failed_date is not None and sent <= failed_date

    def cancel(self):
        """Called in the loop: end what the running cell awaits."""
        if self.is_busy:
            self.was_cancelled = True
            self.task.cancel()

    def forget_cancel(self):
        """The task lives on: `asyncio.timeout` and the like must not find it cancelled."""
        self.was_cancelled = False
        while hasattr(self.task, "uncancel") and self.task.cancelling():
            self.task.uncancel()


class Kernel:
    """The five channels of one interpreter, as the connection file says."""

    def __init__(self, connection, interpreter_class=Interpreter):
        self.session = Session(connection["key"], scheme=connection["signature_scheme"])
        self.outbox = Outbox(self.session)
        self.interpreter = interpreter_class(self.outbox.publish, self.outbox.parent_header)
        self.connection = connection
        self.process_id = os.getpid()
        self.context = zmq.Context()
        self.sockets = {}                     # channel -> socket; the io thread's alone
        self.descriptors = []
        self.shells = {None: Cells(self)}     # subshell_id -> its cells; None is the main one
        self.questions = queue.SimpleQueue()  # requests that wait for the helper
        self.answers = queue.SimpleQueue()    # values of input_replies
        self.request = contextvars.ContextVar("request")
        self.latest = None                    # the execute_request that runs or ran last
        self.interrupt_due = None             # when a SIGINT that nobody has noticed is repeated
        self.unasked = []                     # an input_request that could not be delivered yet
        self.unsent = []                      # (channel, parts) that a full iopub holds up
        self.unwanted = collections.deque(maxlen=UNWANTED)   # msg_ids of cells not to be run
        self.last_sent = time.monotonic()     # when nothing was held up
        self.retry_ms = RETRY_MS              # BRISK_MS after something was sent, then longer
        # A client's sockets find a kernel that is just starting one by one. What was published
        # before its iopub has, it would never hear: so its requests wait.
        self.deaf_until = time.monotonic() + DEAF_SECONDS
        self.is_finished, self.io_done = False, threading.Event()

    # -- life: bind, capture, run until told to stop --

    def bind(self):
        """Open the sockets: the kernel binds, clients connect."""
        for channel, kind in (("shell", zmq.ROUTER), ("control", zmq.ROUTER),
                              ("stdin", zmq.ROUTER), ("iopub", zmq.XPUB)):
            new = self.sockets[channel] = self.context.socket(kind)
            new.linger = 1000    # milliseconds that the last words get when the process ends
            if kind == zmq.ROUTER:
                new.sndhwm = 0            # a reply is never dropped
                new.router_handover = 1   # a client that comes back under its old identity is heard
                new.router_mandatory = channel == "stdin"   # see `send_due`
            else:
                new.xpub_manual = 1       # a subscription counts from its welcome on
                new.xpub_nodrop = 1       # a full subscriber is waited for: see `send_due`
                new.sndhwm = 64           # messages, of up to a megabyte, for each subscriber
            self.open(new, channel)

    def open(self, new, channel):
        """Bind a socket, encrypted when the connection file carries keys (CurveZMQ)."""
        if self.connection.get("curve_secretkey"):
            new.curve_secretkey = self.connection["curve_secretkey"].encode()
            new.curve_publickey = self.connection["curve_publickey"].encode()
            new.curve_server = True
        joint = ":" if self.connection["transport"] == "tcp" else "-"
        port = self.connection[port_name(channel)]
        new.bind(f"{self.connection['transport']}://{self.connection['ip']}{joint}{port}")

    def capture(self):
        """Lead sys.stdout, sys.stderr and descriptors 1 and 2 into the outbox."""
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            self.descriptors.append(Descriptor(descriptor, name, self.outbox))
            setattr(sys, name, Stream(name, self.outbox, descriptor))
        builtins.input = self.input
        inherit_context()
        keep_order(self.descriptors)
        sys.addaudithook(self.notice_children)

    def notice_children(self, event, args):
        """From the first child process or C function of a cell on, its output keeps its place."""
        if event in CHILD_EVENTS:
            self.outbox.catch_up = self.drain

    def run(self):
        """Start the threads and run cells in this one, the main thread, until the end."""
        signal.signal(signal.SIGINT, self.interrupt)
        self.signalled, wakeup = socket.socketpair()
        self.signalled.setblocking(False)
        wakeup.setblocking(False)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        self.wakeup = wakeup
        self.bind()
        self.capture()
        # Queued before any thread can answer a request: it is the first that a client hears.
        self.outbox.publish("status", {"execution_state": "starting"}, parent={})
        for name, work in (("io", self.serve), ("helper", self.help), ("heartbeat", self.beat)):
            threading.Thread(target=work, name=name, daemon=True).start()
        self.interpreter.take_over()
        patch_getpass(self.getpass)
        self.shells[None].run()
        self.end()

    def stop(self):
        """Let every shell end when its running cell has; the main thread then ends the process."""
        for cells in list(self.shells.values()):
            cells.stop()

    def end(self):
        """Let exit functions speak, send all that is queued, and go without waiting for threads."""
        import atexit
        atexit._run_exitfuncs()
        self.drain()
        self.outbox.is_urgent = True   # before the next line: io must take all that is left
        self.is_finished = True
        self.outbox.wake()
        self.io_done.wait(2)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)   # which ends our children, not us
        end_children(signal.SIGTERM)
        os._exit(0)

    # -- the io thread: every socket, level-triggered --

    def serve(self):
        """Wait for sockets, pipes and the outbox; nothing here blocks or runs user code."""
        poller = zmq.Poller()
        pipes = {descriptor.pipe: descriptor for descriptor in self.descriptors}
        channels = {socket: channel for channel, socket in self.sockets.items()}
        for source in (*channels, *pipes, self.outbox.wake_receiver.fileno(),
                       self.signalled.fileno()):
            if channels.get(source) != "shell":   # that one waits until somebody hears the outputs
                poller.register(source, zmq.POLLIN)
        parent = watch_parent(poller)
        while not self.is_finished:
            for source, _ in poller.poll(self.patience()):
                if source in channels:
                    self.receive_safely(channels[source], source)
                elif source in pipes:
                    pipes[source].drain()
                elif source == self.signalled.fileno():
                    self.expect_interrupt()
                elif source == parent:
                    end_children(signal.SIGKILL)   # the server is gone, and we go with them
                    os._exit(1)
            self.send_due()
            self.repeat_lost_interrupt()
            if self.deaf_until and self.deaf_until <= time.monotonic():
                self.deaf_until = None
                poller.register(self.sockets["shell"], zmq.POLLIN)
        self.send_due()
        self.context.destroy(linger=1000)
        self.io_done.set()

    def patience(self):
        """Milliseconds that the io thread may wait for its sockets; None for ever."""
        if self.unasked or self.unsent or self.interrupt_due:
            return self.retry_ms
        rest = self.outbox.rest()
        if self.deaf_until:
            left = max(0, math.ceil((self.deaf_until - time.monotonic()) * 1000))
            rest = left if rest is None else min(rest, left)
        return rest

    def expect_interrupt(self):
        """A SIGINT has come, and `interrupt`, which empties this socket too, may not have run."""
        self.interrupt_due = time.monotonic() + RETRY_MS / 1000
        try:
            self.signalled.recv(4096)
        except BlockingIOError:
            self.interrupt_due = None

    def repeat_lost_interrupt(self):
        """Signal the main thread again when it has not noticed: a signal that arrives just before
        it begins to wait for a lock does not end that wait."""
        if self.interrupt_due and self.interrupt_due < time.monotonic():
            self.interrupt_due = None
            if hasattr(signal, "pthread_kill"):
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def send_due(self):
        """Send what is due, in order. When iopub is full because a subscriber is slow, its messages
        wait (replies don't), and so does whoever prints; one that stands still for STALL_SECONDS
        misses messages."""
        due, self.unasked, unsent = [*self.unsent, *self.unasked, *self.outbox.take()], [], []
        self.retry_ms = min(2 * self.retry_ms, RETRY_MS)
        for channel, parts in due:
            if channel == "iopub" and unsent:
                unsent.append((channel, parts))
                continue
            try:
                self.sockets[channel].send_multipart(parts, zmq.NOBLOCK,
                                                     copy=len(parts[-1]) < BIG_TEXT)
                self.retry_ms = BRISK_MS
            except zmq.Again:
                unsent.append((channel, parts))
            except zmq.ZMQError as problem:
                if problem.errno != zmq.EHOSTUNREACH:
                    raise
                self.unasked = [(channel, parts)]   # its client is not yet on stdin: try again
        self.unsent, self.outbox.is_held = unsent, bool(unsent)
        if not unsent:
            self.last_sent = time.monotonic()
            return
        self.outbox.wants_nudge = True
        if time.monotonic() - self.last_sent > STALL_SECONDS:
            self.sockets["iopub"].xpub_nodrop = 0   # from now on as in other kernels

    def receive_safely(self, channel, source):
        """Log and drop a bad message: no busy, no reply, and never the end of this thread."""
        try:
            self.receive(channel, source.recv_multipart())
        except Exception as problem:
            self.log(f"dropped a message on {channel}: {problem!r}")

    def receive(self, channel, parts):
        """Pass on what has come on a channel; raises BadMessage."""
        if channel == "iopub":
            return self.welcome(parts[0])
        request = self.session.unpack(parts)
        request.update(channel=channel, received=time.monotonic())
        if channel == "stdin":
            if request["header"]["msg_type"] == "input_reply":
                self.answers.put(str(request["content"].get("value", "")))
            return
        self.dispatch(request)

    def dispatch(self, request):
        """Hand a request to the thread that answers it."""
        # Journey 5: the handler is the method named like the message type; busy comes first.
        who = HANDLERS.get(request["header"]["msg_type"])
        if who == "helper":
            self.questions.put(request)
        elif who == "cells":
            cells = self.cells_for(request)
            if is_cell(request) and request["header"]["msg_id"] in self.unwanted:
                self.abort(request)
            else:
                cells.put(request) if cells else self.refuse(request)
        else:
            self.answer(request)

    def cells_for(self, request):
        """The cells of the subshell that a request names; the main ones when it names none."""
        id = request["header"].get("subshell_id")
        return self.shells.get(id) if id is None or isinstance(id, str) else None

    def welcome(self, event):
        """A client subscribes: the first that it hears is its welcome, so that it knows from when
        on it hears everything. (ZeroMQ alone would begin with what is just being published.)"""
        sign, topic = event[:1], event[1:]
        if sign == b"\x01":
            self.deaf_until = self.deaf_until and time.monotonic()
            self.sockets["iopub"].setsockopt(zmq.SUBSCRIBE, topic)
            message = self.session.message("iopub_welcome", {
                "subscription": topic.decode("utf-8", "replace")})
            # It overtakes what waits to be sent.
            self.unsent.insert(0, ("iopub", self.session.pack({**message, "identities": [topic]})))
        elif sign == b"\x00":
            self.sockets["iopub"].setsockopt(zmq.UNSUBSCRIBE, topic)

    def help(self):
        while True:
            self.answer(self.questions.get())

    def beat(self):
        """Echo heartbeats in C, without the interpreter's lock, so that a busy kernel is alive."""
        echo = zmq.Context().socket(zmq.ROUTER)
        echo.linger = 0
        self.open(echo, "heartbeat")
        zmq.proxy(echo, echo)

    def log(self, text):
        """A line on the real stderr, for whoever started the kernel."""
        with contextlib.suppress(OSError):   # nobody may be there to read it
            line = f"kernel {os.getpid()}: {text}\n"
            os_write(self.descriptors[1].original, line.encode("utf-8", "replace"))

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
        """Answer a request that is no cell: busy, perhaps a reply, idle."""
        msg_type = request["header"]["msg_type"]
        self.status("busy", request)
        try:
            if HANDLERS.get(msg_type) == "helper":
                self.reply(request, in_time(getattr(self, msg_type), request))
            elif HANDLERS.get(msg_type) == "io":
                self.reply(request, getattr(self, msg_type)(request))
            elif HANDLERS.get(msg_type) == "cells":
                contextvars.copy_context().run(self.comm, request)   # which has no reply
            else:
                self.log(f"no handler for {msg_type!r}")
        except Exception as error:   # the client's mistake, such as a missing field
            self.log(f"{msg_type} failed: {error!r}")
            self.reply(request, failed(error))
        finally:
            self.status("idle", request)

    def refuse(self, request):
        """Answer a cell for a subshell that is not there (any more)."""
        problem = KeyError(f"there is no subshell {request['header']['subshell_id']}")
        self.status("busy", request)
        self.log(f"refused {request['header']['msg_type']}: {problem}")
        if is_cell(request):
            self.reply(request, failed(problem))
        self.status("idle", request)

    def enter(self, request):
        """From here on, what this thread says belongs to `request`.

        Whose output is it? That of this context's request; a new thread inherits its starter's;
        a thread that has neither (C code made it) speaks for the latest cell.
        """
        header, silent = request["header"], request["content"].get("silent")
        self.outbox.catch_up = None
        self.latest, self.outbox.latest = request, scope_of(SILENT if silent else header)
        self.outbox.scope.set(self.outbox.latest)
        self.request.set(request)

    async def execute_request(self, request, was_interrupted):
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
        return await self.interpreter.execute(
            code, store_history, content.get("user_expressions") or {}, was_interrupted)

    def drain(self):
        """Bring in what child processes and C code have printed so far."""
        if "ctypes" in sys.modules:
            flush_c_output()
        for descriptor in self.descriptors:
            descriptor.drain()

    def finish(self, request, reply, metadata=None):
        # Journey 10: `execute_reply` goes to the one who asked, then everybody hears `idle`.
        self.reply(request, reply, metadata)
        self.status("idle", request)

    def abort(self, request):
        self.status("busy", request)
        self.finish(request, {"status": "aborted",
                              "execution_count": self.interpreter.execution_count})

    def kernel_info_request(self, request):
        about = self.interpreter
        return {"protocol_version": PROTOCOL_VERSION, "implementation": about.implementation,
                "implementation_version": __version__, "language_info": about.language_info,
                "banner": about.banner, "help_links": [], "supported_features": FEATURES}

    def connect_request(self, request):
        return {port_name(channel): self.connection[port_name(channel)]
                for channel in (*self.sockets, "heartbeat")}

    def shutdown_request(self, request):
        """Reply, tell everybody, and let the main thread end; a running cell is interrupted."""
        restart = bool(request["content"].get("restart", False))
        self.outbox.publish("shutdown_reply", {"status": "ok", "restart": restart},
                            parent=request["header"])
        self.stop()
        if self.shells[None].is_busy:
            signal_main_thread()
        return {"restart": restart}

    def is_complete_request(self, request):
        """Its `status` is the answer, not ok or error."""
        return self.interpreter.is_complete(request["content"]["code"])

    def complete_request(self, request):
        content = request["content"]
        return self.interpreter.complete(content["code"], cursor_of(content))

    def inspect_request(self, request):
        content = request["content"]
        return self.interpreter.inspect(content["code"], cursor_of(content),
                                        content.get("detail_level", 0))

    def history_request(self, request):
        return self.interpreter.history(request["content"])

    def usage_request(self, request):
        return usage()

    # -- comms --

    def comm(self, request):
        """Run a comm's callback below its message's header; a failure is the user's to see."""
        self.outbox.scope.set(scope_of(request["header"]))
        try:
            getattr(self.interpreter.comms, request["header"]["msg_type"])(request)
        except BaseException as error:
            sys.stderr.write("\n".join(format_error(error)) + "\n")

    def comm_info_request(self, request):
        wanted = request["content"].get("target_name")
        return {"comms": {id: {"target_name": comm.target_name}
                          for id, comm in list(self.interpreter.comms.comms.items())
                          if wanted in (None, comm.target_name)}}

    # -- subshells: more cells at the same time, in the same namespace (JEP 91) --

    def create_subshell_request(self, request):
        id, cells = os.urandom(16).hex(), Cells(self)
        self.shells[id] = cells
        threading.Thread(target=cells.run, name=f"subshell {id[:4]}", daemon=True).start()
        return {"subshell_id": id}

    def delete_subshell_request(self, request):
        waiting = self.shells.pop(str(request["content"]["subshell_id"])).stop()
        for each in waiting:   # a message on control overtakes what was sent on shell before it
            self.abort(each) if is_cell(each) else self.shells[None].put(each)
        return {}

    def list_subshell_request(self, request):
        return {"subshell_id": [id for id in self.shells if id is not None]}

    def abort_request(self, request):
        """Take the cells of these `msg_ids` out of the queue; what runs, runs on. The message is
        ipykernel's, up to version 6."""
        msg_ids = {*request["content"]["msg_ids"]}
        dropped = [cell for cells in list(self.shells.values()) for cell in cells.drop(msg_ids)]
        for cell in dropped:
            self.abort(cell)
        # As above: the others may be on their way.
        self.unwanted.extend(msg_ids - {cell["header"]["msg_id"] for cell in dropped})
        return {}

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
        with contextlib.suppress(BlockingIOError):
            self.signalled.recv(4096)
        self.interrupt_due = None
        code = []
        while frame is not None:
            code.append(frame.f_code)
            frame = frame.f_back
        ours = self.interpreter.users_frames()
        runs_here = any(one in ours or one.co_filename[:4] == "<In[" for one in code)
        for id, cells in list(self.shells.items()):
            if cells.is_busy and not (runs_here and id is None):
                cells.loop.call_soon_threadsafe(cells.cancel)
        if runs_here:
            raise KeyboardInterrupt

    # -- stdin: the kernel asks, the client that runs the cell answers --

    def input(self, prompt=""):
        """Python's `input`."""
        return self.ask(str(prompt), password=False)

    def getpass(self, prompt="Password: ", stream=None, **options):
        """`getpass.getpass`."""
        return self.ask(str(prompt), password=True)

    def ask(self, prompt, password):
        """Send `input_request` and wait for its `input_reply`; raises EOFError on Ctrl-D."""
        request = self.request.get(self.latest)
        if request is None or not request["content"].get("allow_stdin", True):
            raise StdinNotImplementedError("input() was called, but this client does not allow "
                                           "questions (allow_stdin is false)")
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


def in_time(handler, request):
    """What the handler returns or raises; raises TimeoutError when that takes too long. A
    library's `__dir__` may hang: its thread is left alone, and the next question gets a new one.
    (While C code holds the interpreter's lock, nobody can answer anything.)"""
    outcome = queue.SimpleQueue()

    def work():
        try:
            outcome.put((handler(request), None))
        except Exception as error:
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        content, error = outcome.get(timeout=QUESTION_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {QUESTION_SECONDS} s") from None
    if error:
        raise error
    return content


def port_name(channel):
    return "hb_port" if channel == "heartbeat" else f"{channel}_port"


def cursor_of(content):
    """cursor_pos, or the end of the code; never outside of it."""
    return min(max(0, content.get("cursor_pos", len(content["code"]))), len(content["code"]))


LAST_USAGE = {"wall": time.monotonic(), "cpu": 0.0}   # of the last usage_request


def usage():
    """The content of usage_reply (not in the specification; resource monitors ask it)."""
    wall, cpu = time.monotonic(), sum(os.times()[:2])
    percent = 100 * (cpu - LAST_USAGE["cpu"]) / max(wall - LAST_USAGE["wall"], 0.001)
    LAST_USAGE.update(wall=wall, cpu=cpu)
    reply = {"hostname": socket.gethostname(), "pid": os.getpid(), "kernel_cpu": round(percent, 1),
             "cpu_count": os.cpu_count()}
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as statm, open("/proc/meminfo") as meminfo:
            reply["kernel_memory"] = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            host = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in meminfo}
        used = host["MemTotal"] - host["MemAvailable"]
        reply["host_virtual_memory"] = {
            "total": host["MemTotal"], "available": host["MemAvailable"], "used": used,
            "free": host["MemFree"], "percent": round(100 * used / host["MemTotal"], 1)}
    return reply


class StdinNotImplementedError(RuntimeError):
    """The cell asks for input, and its client cannot give any. (ipykernel's name for it.)"""


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


def end_children(number):
    """Signal the processes that the user's code has started, when we lead their group."""
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), number)


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


# ---- 10. main ----------------------------------------------------------------------------------
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
        Session("", scheme=connection.get("signature_scheme", "hmac-sha256"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        sys.exit(f"kernel.py: {path} is not a usable connection file: {problem!r}")
    return {"ip": "127.0.0.1", "transport": "tcp", "key": "", "signature_scheme": "hmac-sha256",
            **connection}


def install(arguments):
    """`kernel.py install`: write a kernel spec (JEP 105); every Jupyter then lists this kernel."""
    import argparse
    parser = argparse.ArgumentParser(prog="kernel.py install")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--user", action="store_true", help="for this user (the default)")
    where.add_argument("--prefix", help="for the environment at PREFIX, such as sys.prefix")
    parser.add_argument("--name", default="minijupyter", help="default: %(default)s")
    parser.add_argument("--display-name", default="Python 3 (MiniJupyter)")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"[a-z0-9._-]+", options.name):
        parser.error("a name has small letters, digits, '.', '_' and '-' only")
    base = os.path.join(options.prefix, "share", "jupyter") if options.prefix else data_folder()
    folder = os.path.join(base, "kernels", options.name)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "kernel.json"), "w", encoding="utf-8") as file:
        json.dump(kernel_spec(options.display_name), file, indent=1)
    print(f"Installed the kernel spec {options.name} in {folder}")


def kernel_spec(display_name):
    """The content of a kernel.json that starts this file."""
    return {"argv": command(), "display_name": display_name, "language": "python",
            "interrupt_mode": "signal", "env": {},
            "metadata": {"debugger": False, "supported_encryption": ["curve"]},
            "kernel_protocol_version": f"{PROTOCOL_VERSION}.0"}


def data_folder():
    """Jupyter's data folder of this user."""
    home = os.path.expanduser
    usual = {"darwin": home("~/Library/Jupyter"),
             "win32": os.path.join(os.environ.get("APPDATA", home("~")), "jupyter")}
    return os.environ.get("JUPYTER_DATA_DIR") or usual.get(sys.platform) or os.path.join(
        os.environ.get("XDG_DATA_HOME") or home("~/.local/share"), "jupyter")


def main():
    """Read the connection file, make the notebook's folder the first to import from, and run."""
    if sys.argv[1:2] == ["install"]:
        return install(sys.argv[2:])
    # Other options are ignored: nbclient sends some of ipykernel's to any kernel called python3.
    words = [word for argument in sys.argv[1:]
             for word in (argument.split("=", 1) if argument[:1] == "-" else [argument])]
    if "-f" not in words[:-1]:
        sys.exit("usage: python kernel.py -f CONNECTION_FILE   (a Jupyter client starts it so)\n"
                 "       python kernel.py install [--user | --prefix DIR]")
    connection = read_connection_file(words[words.index("-f") + 1])
    sys.path[0] = ""
    sys.modules.pop("kernel", None)   # the user may have a kernel.py, too
    sys.argv[:] = [""]
    Kernel(connection).run()


if __name__ == "__main__":
    main()
