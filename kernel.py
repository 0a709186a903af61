#!/usr/bin/env python3
"""The kernel: a process of its own that runs Python code for any Jupyter client.

Run:  python kernel.py -f CONNECTION_FILE      (a server or a console writes the file and starts it)

    client  -- execute_request -->  shell    ROUTER   requests, answered one by one
            -- interrupt, stop -->  control  ROUTER   the same, but answered while a cell runs
            <- input_request ----   stdin    ROUTER   the kernel asks the person a question
            <- stream, result ---   iopub    XPUB     what everybody sees
            -- ping, pong ------->  heartbeat ROUTER  is the process alive?

PART I is a whole kernel and runs alone: 1 The wire · 2 Output · 3 The interpreter · 4 The kernel
· 5 main. PART II is what people expect besides; each section plugs itself into Part I:
6 Errors in colour · 7 Containers in lines · 8 The notebook's interpreter · 9 Comms · 10 Magics
· 11 Questions about code · 12 IPython.display in small · 13 IPython · 14 matplotlib · 15 Subshells
· 16 Children · 17 Cells taken back · 18 What a cell has broken · 19 Stalled subscribers
· 20 Windows · 21 Interrupts that were lost · 22 Patience at the start · 23 The parent's end
· 24 Passwords · 25 Clients that have gone · 26 Leaving · 27 Encryption · 28 Usage and addresses
· 29 Less collecting · 30 Faster JSON · 31 Automagic · 32 Packages · 33 Install.

Part I's extension points, and what Part II does with them:

    HANDLERS           msg_type -> (thread, function)          completion, comms, subshells, usage …
    ENCODERS           functions of a value, to JSON           a faster one
    EXTRAS             functions of the kernel at its start    each extra hangs itself in
    FORMATTERS         class's name -> {MIME type: function}   containers in lines, figures
    ERROR_FORMATS      functions of an exception               colours, both ends of long chains
    INTERPRETERS       language -> class                       NotebookInterpreter
    SOCKETS            channel -> class of its socket          clients that have gone
    SOCKET_OPTIONS     functions of a socket, before it binds  encryption
    BROADCASTS         classes for iopub                       stalled subscribers
    DESCRIPTORS        is the system POSIX -> class            Windows
    COMMANDS, FEATURES words                                   install; subshells
    kernel.workers     who runs a handler -> function          the helper thread, the subshells
    kernel.listen      socket or descriptor -> function        lost interrupts, the parent's end
    kernel.rounds      functions that io calls each time       patience at the start
    kernel.on_start    functions, before the first cell        less collecting, what may be broken
    kernel.on_enter, on_cell_end, on_drain                     children and what they print
    kernel.on_interrupt, on_trouble                            lost interrupts, broken builtins
    interpreter.before_cell, after_cell, before_error          figures, what libraries want called

Of a cell's journey this file holds stations 4 to 10: `Session.unpack` verifies the request,
`Kernel.dispatch` finds its handler, `execute_request` counts, `Interpreter.run_source` runs,
`Stream.write` carries what is printed, `Display.result` shows the value, `Kernel.finish` replies.

Left out on purpose: a debugger protocol. IPython is not needed; once somebody imports it, it runs
the cells.

Threads: *main* runs the user's code, one cell at a time, inside one asyncio loop, so that tasks
go on between cells and a SIGINT reaches the code; *io* owns every socket but the heartbeat's,
because ZeroMQ sockets are not thread-safe, and waits for them, for the outbox and for the pipes
behind descriptors 1 and 2; *heartbeat* echoes without Python. Part II adds *helper*, which answers
questions about code while a cell runs, *variables*, and one thread for each subshell.
Sources: the Jupyter messaging specification 5.5 with JEP 65 (welcome) and JEP 91 (subshells),
https://jupyter-client.readthedocs.io/en/stable/messaging.html, and Python's own documentation.
"""
import os
import sys

if __name__ == "__main__":
    # Python looks for a script's modules in the script's folder first, which may be the notebook's:
    # a file `string.py` there must not run because the kernel imports `string` (I7).
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    sys.path[:] = [entry for entry in sys.path if entry != os.getcwd()]

import _thread
import ast
import atexit
import base64
import builtins
import codecs
import collections
import collections.abc
import contextlib
import contextvars
import fnmatch
import functools
import gc
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
import queue
import re
import signal
import socket
import threading
import time
import traceback
import types
from threading import current_thread
from time import monotonic, sleep

try:
    import zmq
except ImportError:
    sys.exit("The kernel needs pyzmq: run `pip install pyzmq`.")

__version__ = "0.2.0"
PROTOCOL_VERSION = "5.5"
# A cell may set `builtins.len = None` or `time.time = None` (I8). A function takes its builtins
# from its module's `__builtins__`, at the moment when it is defined: so we put a copy there. We
# also replace each imported module by a copy of its names, but for `sys` and `builtins`.
MODULES = [value for value in globals().values() if isinstance(value, types.ModuleType)]
__builtins__ = dict(vars(builtins))
globals().update({module.__name__: types.SimpleNamespace(**vars(module)) for module in MODULES
                  if module not in (sys, builtins) and "." not in module.__name__})
POSIX = os.name == "posix"   # signals between processes, process groups, pipes in a poller, fork


# ---- 1. The wire: signed messages -------------------------------------------------------------
#
# A Jupyter message is four JSON objects: header (who, when, which type), parent_header (the header
# of the request that caused it), metadata and content; raw buffers may follow. For example, the
# request to run a cell, and one of the messages that come of it:
#
#     header         {"msg_id": "7", "msg_type": "execute_request", "session": "page", …}
#     parent_header  {}
#     metadata       {}
#     content        {"code": "print(1 + 1)", "silent": false, "store_history": true, …}
#
#     header         {"msg_id": "a", "msg_type": "stream", "session": "kernel", …}
#     parent_header  {"msg_id": "7", "msg_type": "execute_request", "session": "page", …}
#     metadata       {}
#     content        {"name": "stdout", "text": "2\n"}
#
# On a ZeroMQ socket a message is a list of parts:
#
#     [*identities, b"<IDS|MSG>", signature, header, parent_header, metadata, content, *buffers]
#
# The signature is an HMAC over the exact bytes of the four JSON parts. It is checked on the bytes,
# because one JSON value has many spellings. Without the key from the connection file nobody can
# forge a message, nor send an old one again, as long as its signature is remembered. (Identities
# and buffers are not signed: the specification.) A message that fails here gets no answer: nobody
# known has sent it, and an answer would tell a stranger how close he came.
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
        self.parent = {}, b"{}"   # the latest parent header and its JSON

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
        json_parts = [to_json(message["header"]), self.parent_json(message["parent_header"]),
                      to_json(message["metadata"]), to_json(message["content"])]
        # Buffers are copied: they may change before they leave, or be no bytes at all.
        return [*message.get("identities", ()), DELIMITER, self.sign(json_parts), *json_parts,
                *(memoryview(buffer).tobytes() for buffer in message.get("buffers", ()))]

    def parent_json(self, header):
        """A parent header as JSON; many messages in a row have the same."""
        if self.parent[0] is not header:
            self.parent = header, to_json(header)
        latest, text = self.parent
        return text if latest is header else to_json(header)   # another thread was quicker

    def unpack(self, parts):
        """The message in `parts`, verified; raises BadMessage for anything else.

        A dict of identities (list of bytes), header, parent_header, metadata, content (dicts) and
        buffers (list of bytes); a kernel's request gets its `channel`, too.
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


ENCODERS = [json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"),
                             default=json_default).encode]   # the last one is used


def to_json(value):
    """`value` as UTF-8 JSON that every language can read."""
    try:
        return ENCODERS[-1](value).encode()
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


# ---- 2. Output: everything on its way out, in one queue ---------------------------------------
#
# The order of output is the order in which things enter one queue, the outbox: printed text from
# any thread, results, replies, status. Printing must cost next to nothing, so `Stream.write`
# appends a tuple and returns. The io thread joins neighbouring texts of one stream and one parent
# into one message. It promises:
#
#     I1 order       what is said first arrives first, whichever thread, stream or child says it
#     I2 idle last   nothing of a cell comes after its `idle`, except from what still runs
#     I3 whole       nothing is dropped; whoever prints faster than clients read has to wait
#     I4 bounded     so the queue holds some 30 MB at most, and a message about 1 MB of text
#     I5 alone       a subscriber that stops reading loses its own output and nobody else's. (Part I
#                    alone waits ten seconds for it, once, and then drops what anybody cannot take.)
#
# While it is not sending, io waits. How long depends on the outbox's state, and so does what a
# thread must do that prints:
#
#     state      in the queue            io waits             a thread that prints
#     IDLE       nothing                 for ever             wakes io
#     GATHERING  printed text            until `flush_at`     just appends
#     HELD       too much, or a          RETRY_MS             waits until there is room
#                subscriber has no room
#
# A message (`put`) makes the queue due in any state: io sends it at once, and with it all text that
# was queued before. The first text goes out after GATHER_SECONDS, the rest every FLUSH_SECONDS.

IDLE, GATHERING, HELD = "idle", "gathering", "held"
GATHER_SECONDS = 0.002      # `print` writes text and line end separately: this joins them,
LINE_SECONDS = 0.02         # and this where the thread that prints has to wait for its turn
FLUSH_SECONDS = 0.03        # a person sees 30 updates a second as flowing
MOST_WAITING = 400_000      # items, some 30 MB: above this, a thread that prints waits
BIG_TEXT = 1 << 16          # characters: who prints a text as long as this waits earlier,
MOST_BIG_WAITING = 128      # namely above this number of items
MOST_TEXT = 1 << 20         # characters in one stream message: a browser draws that in one frame
FLOODS = ("display_data", "update_display_data", "clear_output", "comm_msg")   # wait like prints
STALL_SECONDS = 10          # that a subscriber may hold up the others, once


def scope_of(header):
    """Whose output it is: (header of the request, key for descriptor 1, key for descriptor 2).
    Texts are queued under such a key; neighbours with the same key become one message."""
    return header, ("stdout", header), ("stderr", header)


class Outbox:
    """The queue of everything that will leave the process; any thread may put, io takes."""

    def __init__(self, session):
        self.session = session
        # Flat, because a tuple for each would be work for the garbage collector. Even places hold
        # the channel of a message or the key of a text, odd places its parts or the text. One
        # `extend` adds both, so that no thread can come between.
        self.queue = []
        self.scope = contextvars.ContextVar("scope")
        self.latest = scope_of({})         # the scope of threads and handlers that have none
        self.catch_up = None               # brings in what a cell's child processes have printed
        self.state = IDLE
        self.is_due = False                # a message waits, or too much text: send it all now
        self.is_full = False               # a subscriber of iopub has no room
        self.flush_at = None               # when waiting text is due; seconds, monotonic
        self.line_seconds = LINE_SECONDS   # 0 when the process ends
        self.line_until = None             # until when the beginning of a line waits for its end
        self.last_flush = 0.0
        self.wake_receiver, self.wake_sender = socket.socketpair()
        self.wake_receiver.setblocking(False)
        self.wake_sender.setblocking(False)

    def put(self, channel, message):
        """Queue a message. It is packed here: what cannot be sent fails where it was said."""
        self.queue.extend((channel, self.session.pack(message)))
        if not self.is_due:   # else io is awake, and has not taken yet
            self.is_due = True
            self.wake()

    def publish(self, msg_type, content, parent=None, metadata=None, buffers=()):
        """Queue a message for iopub, below the running request unless a parent is given."""
        parent = self.parent_header() if parent is None else parent
        if self.catch_up:   # a child process may have printed before this (I1)
            self.catch_up()
        if self.is_full and msg_type in FLOODS:
            self.wait_for_room(0)
        message = self.session.message(msg_type, content, parent, metadata, buffers)
        message["identities"] = [f"kernel.{self.session.session}.{msg_type}".encode()]
        self.put("iopub", message)

    def parent_header(self):
        """The header of the request that the calling thread works for."""
        return self.scope.get(self.latest)[0]

    def wait_for_room(self, size):
        """Wake io after text of `size` characters was queued. A thread that floods waits here (I3),
        in short sleeps, so that an interrupt reaches it."""
        self.wake()
        most = MOST_WAITING if size < BIG_TEXT else MOST_BIG_WAITING
        while (len(self.queue) > most or self.is_full) and current_thread().name != "io":
            self.is_due = True
            self.wake()
            sleep(0.001)

    def wake(self):
        """End the io thread's sleep. A full pipe is a wake-up that is already on its way."""
        if self.state is IDLE:
            self.state = GATHERING   # the next print need not wake io again
        try:
            self.wake_sender.send(b"\0")
        except BlockingIOError:
            pass

    def was_woken(self):
        """Empty the pipe of wake-ups; called by io."""
        try:
            self.wake_receiver.recv(4096)
        except BlockingIOError:
            pass

    def patience(self):
        """Milliseconds that io may wait before the next `take`; None when nothing is queued."""
        self.state = IDLE   # before the look: who queues something after it will wake us
        if not self.queue and not self.is_due:
            return None
        self.state = HELD if self.is_full or len(self.queue) > MOST_WAITING else GATHERING
        if self.is_due:
            return 0
        now = monotonic()
        self.flush_at = self.flush_at or max(now + GATHER_SECONDS, self.last_flush + FLUSH_SECONDS)
        return max(0, math.ceil((self.flush_at - now) * 1000))

    def take(self):
        """All that is due, as (channel, parts) one after the other, neighbouring text joined. Each
        is packed when it is asked for, so that clients read one while the next is made."""
        if not self.is_due and (self.flush_at is None or self.flush_at > monotonic()):
            return []
        self.is_due, self.flush_at = False, None
        entries = self.queue[:self.whole_lines()]
        del self.queue[:len(entries)]   # what was appended meanwhile stays
        return self.joined(entries)

    def whole_lines(self):
        """How many items of the queue may go now: all but the few texts at its end that begin a
        line, which wait a moment for its end."""
        end = at = len(self.queue)
        while end - 8 < at > 0 and isinstance(text := self.queue[at - 1], str) \
                and not text.endswith("\n"):
            at -= 2
        if at == end or self.line_until and self.line_until < monotonic():
            self.line_until = None
            return end
        self.line_until = self.line_until or monotonic() + self.line_seconds
        return at if self.line_seconds else end

    def joined(self, entries):
        """(channel, parts) of each entry, with the texts of equal neighbours as one message."""
        values = iter(entries[1::2])
        for key, group in itertools.groupby(entries[::2]):
            neighbours = [*itertools.islice(values, len([*group]))]
            if isinstance(key, str):
                yield from ((key, parts) for parts in neighbours)
            else:
                yield from self.streams(*key, "".join(neighbours))

    def streams(self, name, parent, text):
        """`stream` messages of a bounded size (I4)."""
        self.last_flush = monotonic()
        for start in range(0, len(text), MOST_TEXT):
            message = self.session.message(
                "stream", {"name": name, "text": text[start:start + MOST_TEXT]}, parent)
            message["identities"] = [f"stream.{name}".encode()]
            yield "iopub", self.session.pack(message)


class Stream(io.TextIOBase):
    """`sys.stdout` or `sys.stderr` of the user's code."""

    encoding, errors, line_buffering = "utf-8", "replace", True

    def __init__(self, descriptor, outbox):
        self.descriptor = descriptor
        self.write = self.writer(outbox)
        self.buffer = StreamBuffer(self)

    def writer(self, outbox):
        """The `write` of this stream. Every print calls it twice, so its names are bound here."""
        extend, scope = outbox.queue.extend, outbox.scope.get
        descriptor, gathering, big = self.descriptor, GATHERING, BIG_TEXT

        def write(text):
            # Journey 8: printed text is queued under the parent header of its cell, as `stream`.
            if text.__class__ is not str:
                text = check_text(text)
            if outbox.catch_up:   # a child process may have printed before this (I1)
                outbox.catch_up()
            extend((scope(outbox.latest)[descriptor], text))
            if outbox.state is not gathering or len(text) > big:
                outbox.wait_for_room(len(text))
            return len(text)

        return write

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
    becomes readable, the main thread at a cell's end, before `idle` (I2).
    """

    def __init__(self, descriptor, outbox):
        self.descriptor, self.outbox = descriptor, outbox
        self.original = os.dup(descriptor)
        self.pipe, self.write_end = os.pipe()   # the latter stays open, or the pipe might end
        os.dup2(self.write_end, descriptor)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.lock = threading.RLock()   # a `__del__` may print while its thread is in `drain`

    def listen(self, kernel):
        """Let io read the pipe."""
        os.set_blocking(self.pipe, False)
        kernel.listen(self.pipe, self.drain)

    def drain(self):
        with self.lock:
            for _ in range(16):   # 1 MiB, more than a pipe holds: a flood cannot keep us here
                try:
                    self.take(os.read(self.pipe, 1 << 16))
                except BlockingIOError:
                    return   # empty

    def take(self, data):
        text = self.decoder.decode(data)
        self.outbox.queue.extend((self.outbox.latest[self.descriptor], text))
        if self.outbox.state is not GATHERING:
            self.outbox.wake()


os_write = os.write
DESCRIPTORS = {True: Descriptor, False: Descriptor}   # has the system POSIX's ways? -> class


def send_parts(new, parts, more=int(zmq.SNDMORE | zmq.NOBLOCK), last=int(zmq.NOBLOCK)):
    """Send a message whole or, raising zmq.Again, not at all. (In `send_multipart` the arithmetic
    of flags takes longer than all the rest.)"""
    for part in parts[:-1]:
        new.send(part, more)
    new.send(parts[-1], last)


class Broadcast:
    """The iopub socket: sends what is published to every subscriber; the io thread's alone.

    When a subscriber has no room, the message waits, and so does whoever prints (I3). When that has
    lasted for STALL_SECONDS, messages are dropped for all that have no room at that moment, because
    ZeroMQ does not tell who it is. (The section on stalled subscribers finds out: I5.)
    """

    def __init__(self, xpub):
        self.xpub = xpub
        self.refused = None            # when a message was refused first; seconds, monotonic
        self.has_subscribers = False   # somebody has subscribed, to whatever topic

    def send(self, parts):
        """Send a message; False when it must wait, and then it must be the next one, too."""
        if not self.try_to_send(parts):
            self.refused = self.refused or monotonic()
            if not self.is_late():
                return False
            self.xpub.xpub_nodrop = 0
            self.try_to_send(parts)
        self.refused = None
        return True

    def is_late(self):
        return monotonic() - self.refused >= STALL_SECONDS

    def try_to_send(self, parts):
        """False when a subscriber has no room for the message; then nobody has got it."""
        try:
            send_parts(self.xpub, parts)
        except zmq.Again:
            return False
        return True

    def subscribe(self, topic, welcome):
        """A client subscribes. The first that it hears is the message `welcome`, so that it knows
        from when on it hears everything (JEP 65)."""
        self.has_subscribers = True
        self.xpub.subscribe = topic
        self.try_to_send(welcome)

    def unsubscribe(self, topic):
        """A client takes a subscription back, or leaves; which one it is, ZeroMQ does not tell."""
        self.xpub.unsubscribe = topic


BROADCASTS = [Broadcast]   # classes; the last one is used


# ---- 3. The interpreter: run a cell, show its value, its error (knows no socket) --------------
#
# A cell is not a file: its last expression is shown, `await` stands at the top level, and its
# source lives in no file although tracebacks must quote it. So a cell is parsed once, split into a
# body and a last expression, each compiled under a made-up file name which `linecache` knows.
#
# The user's code can break anything, since it runs in this process. The kernel promises:
#
#     I6 answered    every cell gets its reply; one that raises also gets an `error`, with the name
#                    of the exception that it raised, however hard that one is to show
#     I7 apart       no module of the notebook's folder runs unless a cell, or a module of the
#                    user's that a cell has imported, imports it. Part I imports all that it needs
#                    before the folder is on `sys.path`; for later imports see `own` in Part II
#     I8 mended      a cell may break builtins and modules: this file uses copies of its own, and
#                    when Python's machinery fails, Part II puts back what was there

COROUTINE = 0x80      # inspect.CO_COROUTINE: the code must be awaited
FUTURES = 0x1FF0000   # the bits of `from __future__ import …`, which hold for all later cells
# What Python takes for the file of a cell (see `cell_file`). Where a SyntaxError names it, the text
# has only `(3-7.py, line 1)`: the second branch is for that.
CELL_FILE = re.compile(r"(?:/tmp/ipykernel_\d+/|(?<=\())(\d+)-\d+\.py")


# -- a value as a MIME bundle --
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
FAILED = object()  # what `attempt` can return


def attempt(function, *arguments, otherwise=None):
    """What `function` returns, or `otherwise` when it fails, and stderr says why. One form of a
    value that fails must not lose the others. (NotImplementedError means: not offered.)"""
    try:
        return function(*arguments)
    except NotImplementedError:
        pass
    except Exception as error:
        lines = describe_error(error)["traceback"]
        print("A form of this value failed:", *lines, sep="\n", file=sys.stderr)
    return otherwise


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


def with_metadata(result):
    """(data, metadata) of what a `_repr_…_` method has returned: data alone, or both."""
    return result if isinstance(result, tuple) and len(result) == 2 else (result, None)


def bundle_of(value):
    """(data, metadata) of `_repr_mimebundle_`, which says all at once."""
    data, metadata = with_metadata(value._repr_mimebundle_(include=None, exclude=None))
    return dict(data or {}), dict(metadata or {})


def form_of(value, method, mime):
    """(data, metadata) of one `_repr_…_` method. Raises TypeError when it returned no text."""
    data, metadata = with_metadata(getattr(value, method)())
    if not isinstance(data, (str, bytes, type(None))) and mime != "application/json":
        raise TypeError(f"{method} returned {type(data).__name__}, not text or bytes")
    return data, metadata


def mime_bundle(value):
    """(data, metadata): every format of `value`, with text/plain; bytes are base64."""
    rows, data, metadata = formatters_for(value), {}, {}
    if has_reprs(value):
        if hasattr(value, "_repr_mimebundle_"):
            data, metadata = attempt(bundle_of, value, otherwise=({}, {}))
        for method, mime in REPR_METHODS.items():
            if mime not in data and mime not in rows and hasattr(value, method):
                data[mime], about = attempt(form_of, value, method, mime, otherwise=(None, None))
                metadata.update({mime: about} if about else {})
    for mime, function in rows.items():
        if mime != "text/plain" and (form := attempt(function, value)) is not None:
            data[mime] = form
    data = without_bytes(data)
    if "text/plain" not in data:
        show = rows.get("text/plain", repr)
        try:
            data["text/plain"] = show(value)
        except Exception as error:
            if not data and not isinstance(error, NotImplementedError):
                raise   # there is no other form: the cell has failed
    return data, metadata


def without_bytes(data):
    """The data of a MIME bundle without forms that are None, and with bytes, such as a PNG's, as
    base64."""
    return {mime: json_default(form) if isinstance(form, bytes) else form
            for mime, form in data.items() if form is not None}


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
        return attempt(value._ipython_display_, otherwise=FAILED) is not FAILED

    def result(self, value, execution_count):
        """Send the value of a cell's last expression; returns its text/plain, if it has one."""
        if self.shows_itself(value):
            return None
        # Journey 9: the value becomes a MIME bundle and leaves as `execute_result`.
        data, metadata = self.format(value)
        if data:
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


# -- an error as text --
#
# Nothing about an exception can be trusted: its class's name, message, notes and causes may
# be computed by code that raises, exits or never ends. So what describes it is tried, the
# richest first: the functions of ERROR_FORMATS from the last to the first, then one plain line.

def describe_error(error):
    """{ename, evalue, traceback}: the fields of an `error` message. It raises nothing (I6)."""
    name, evalue = class_name(error), text_of(error)
    try:
        evalue = CELL_FILE.sub(r"Cell In[\1]", evalue)
    except BaseException:   # a cell has emptied sys.modules: `re` cannot import what it needs
        pass
    lines = [f"{name}: {evalue}"]
    for format_error in reversed(ERROR_FORMATS):
        try:
            lines = format_error(error)
            break
        except BaseException:   # the next one asks less of it
            pass
    return {"ename": name, "evalue": evalue, "traceback": lines}


def class_name(error):
    """The name of its class, as `class` said it; a metaclass may hide it."""
    return type.__dict__["__name__"].__get__(type(error))


def text_of(value):
    """`str(value)`, or why there is none. An exception's `__str__` may even exit."""
    try:
        return str.__str__(str(value))
    except BaseException as another:
        return f"<str() failed: {class_name(another)}>"


def traceback_of(error):
    """Its `__traceback__`, which a class of the user's may hide."""
    return BaseException.__dict__["__traceback__"].__get__(error)


def users_traceback(error):
    """Its traceback, without the frames of this file that led to the cell."""
    trace = traceback_of(error)
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return without_handler(trace)


def without_handler(trace):
    """The traceback without our handler of SIGINT: Python's own leaves no frame either."""
    at = trace
    while at is not None and at.tb_next is not None:
        code = at.tb_next.tb_frame.f_code
        if (code.co_filename, code.co_name) == (__file__, "interrupt"):
            at.tb_next = None
        at = at.tb_next
    return trace


def plain_error(error):
    """The lines that Python itself would print, the cells by name."""
    lines = traceback.format_exception(type(error), error, users_traceback(error))
    return CELL_FILE.sub(r"In[\1]", "".join(lines)).rstrip("\n").split("\n")


ERROR_FORMATS = [plain_error]   # functions of an exception that give its traceback's lines


# -- running a cell --

def cell_file(count, serial):
    """What Python takes for the file of a cell. Such a path has ipykernel, and by it debuggers,
    profilers and printers of tracebacks know a cell."""
    return f"/tmp/ipykernel_{os.getpid()}/{count}-{serial}.py"


def split_cell(tree):
    """(body, last): the statements of a module and its last expression, or None."""
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        *body, last = tree.body
        return (ast.Module(body, tree.type_ignores) if body else None), ast.Expression(last.value)
    return tree, None


class Interpreter:
    """Python, as a kernel sees it. `publish(msg_type, content)` sends on iopub.

    A kernel for another language is `Kernel(connection, Other)` with a subclass of this one. It has
    its own `language_info`. Its `run` shows the value by `self.displayhook(value)`, or raises. Its
    `take_over` does nothing. It may have `is_complete`, `complete`, `inspect` for Part II to call.
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
        self.execution_count = 0           # of the latest cell; in a cell, `count` has its own
        self.count = contextvars.ContextVar("execution_count", default=0)
        self.serial = itertools.count(1)   # one for every cell ever compiled, shown or not
        self.flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        self.before_cell = []              # functions of the cell's code, called before it runs
        self.after_cell = []               # functions without arguments, called when it is done
        self.before_error = []             # functions of an exception, before anybody hears of it
        self.module = types.ModuleType("__main__", "The namespace of the notebook's cells.")
        self.namespace = vars(self.module)
        self.namespace["__builtins__"] = builtins

    def take_over(self):
        """Make this process the notebook's: its folder comes first on `sys.path`, its namespace is
        `__main__`, and everybody finds `display`."""
        sys.path.insert(0, "")
        sys.modules["__main__"] = self.module
        builtins.display = self.display.display

    async def execute(self, code, *, store_history=True, silent=False, user_expressions=(),
                      was_interrupted=lambda: False):
        """Run a cell; returns the content of its `execute_reply`."""
        self.count.set(self.execution_count)
        sys.displayhook = self.displayhook if not silent else lambda value: None
        try:
            reply = await self.users_part(code, user_expressions, was_interrupted)
        except BaseException as error:
            cause = error.__cause__ if type(error) is RuntimeError else None
            if type(cause) is StopIteration and users_traceback(error) is None:
                error = cause   # which our coroutines may not raise (PEP 479)
            if was_interrupted() and class_name(error) == "CancelledError":   # see `interrupt`
                error = KeyboardInterrupt().with_traceback(traceback_of(error))
            reply = self.fail(error)
        try:   # the one guard around all that runs after a cell
            self.finish_cell()
        except BaseException as error:
            self.fail(error)
        return {"payload": [], **reply, "execution_count": self.count.get()}

    async def users_part(self, code, user_expressions, was_interrupted):
        """The part of a cell that an interrupt may end at any moment; returns the reply."""
        if was_interrupted():   # when the cell had begun, but not come to here
            raise KeyboardInterrupt
        self.begin_cell(code)
        await self.run(code)
        return {"status": "ok", "user_expressions": {
            name: self.evaluate(user_expressions[name]) for name in user_expressions}}

    def begin_cell(self, code):
        for function in self.before_cell:
            function(code)

    def finish_cell(self):
        """Call what libraries want called, such as the drawing of figures."""
        for function in self.after_cell:
            function()

    def users_frames(self):
        """Our code objects below which the user's code runs: there an interrupt may raise."""
        methods = (self.users_part, self.evaluate, self.finish_cell)
        return [method.__func__.__code__ for method in methods]

    def fail(self, error):
        """Publish an error, keep it for the debugger, and return a failed reply."""
        for function in self.before_error:
            function(error)
        sys.last_exc = error   # for Python 3.12 and later, before that the other three
        sys.last_type, sys.last_value = type(error), error
        sys.last_traceback = traceback_of(error)
        content = self.describe_error(error)
        self.tell_error(error, content)
        return {"status": "error", **content}

    def tell_error(self, error, content):
        self.publish("error", content)

    def describe_error(self, error):
        """{ename, evalue, traceback} of an exception."""
        return describe_error(error)

    async def run(self, code):
        """Run a cell in the notebook's namespace and show the value of its last expression.

        The user's code runs inside this frame: `Kernel.interrupt` looks for it.
        """
        value = await self.run_source(code)
        if value is not None:
            sys.displayhook(value)

    async def run_source(self, code, names=None):
        """Run Python source, in the notebook's namespace or another, and return the value of its
        last expression."""
        value = None
        # Journey 7: the cell is parsed, split, compiled and run; what is left is its value.
        for step in self.compile(code):
            value = eval(step, self.namespace if names is None else names)
            if step.co_flags & COROUTINE:
                value = await value
        return value

    def compile(self, code):
        """Code objects to be evaluated in turn; the last one's value is the cell's."""
        name = cell_file(self.count.get(), next(self.serial))
        linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        steps = []
        for part, mode in zip(split_cell(self.parse(code, name)), ("exec", "eval"), strict=True):
            if part is not None:
                steps.append(compile(part, name, mode, self.flags, True))
                self.flags |= steps[-1].co_flags & FUTURES
        return steps

    def parse(self, code, name):
        """The syntax tree of a cell that is called `name`. Raises SyntaxError."""
        return compile(code, name, "exec", self.flags | ast.PyCF_ONLY_AST, True)

    def displayhook(self, value):
        """Show the value of a last expression."""
        if value is not None:
            self.display.result(value, self.count.get())

    def evaluate(self, expression):
        """A user expression's value as a MIME bundle, or its error."""
        try:
            data, metadata = self.display.format(eval(expression, self.namespace))
            return {"status": "ok", "data": data, "metadata": metadata}
        except Exception as error:
            return {"status": "error", **self.describe_error(error)}


INTERPRETERS = {"python": Interpreter}   # language -> class; Part II has a richer one


# ---- 4. The kernel: five sockets, one dispatcher ----------------------------------------------
#
# HANDLERS says for each message type who answers it: *io*, at once; *cells*, in turn with the
# cells, on the main thread; or a worker that Part II adds. It is at the same time the list of what
# a client may ask for. A handler is a function of (kernel, request) that returns the content of its
# reply, or None where the protocol has no reply. To answer a new message, write such a function
# with the message's name below `@handles(…)`; nothing else changes. (`execute_request` is awaited:
# Cells runs it.)
#
# Every request is bracketed by `status: busy` and `status: idle` on iopub, whatever becomes of it.
# A client needs both signs of the end: the reply is for the one who asked, and says how it went;
# `idle` is for everybody, and says that all output is out. (They travel on two sockets, so either
# may arrive first.) What becomes of an execute_request:
#
#     state     where it is              what leads on
#     waiting   Cells.waiting            its turn: running · an error before it: aborted
#     running   Cells.request            its end: answered
#     answered  busy, outputs, reply, idle have been queued, in this order
#     aborted   busy, a reply `aborted`, idle: it was not run
#
# After an error the cells that wait are aborted (`stop_on_error`), because they were sent in the
# belief that the one before would work. It promises:
#
#     I9 aborts      what had arrived when the error was told is aborted; what a client sends after
#                    it heard of the error is run. No date in a header decides: clients' clocks are
#                    coarse, wrong or missing. A client that sends many cells at once may give them
#                    the same `burst` in their metadata: after an error, all of that burst are
#                    aborted, whenever they arrive
#     I10 interrupts a SIGINT ends what runs, awaits, sleeps or asks, and never the kernel
#
# Control is a second channel with the same requests: what is asked there is answered while a cell
# runs, since io reads it, and it does not queue behind cells.

RETRY_MS = 20       # until what could not be sent is tried again; a person does not notice it
BRISK_MS = 1        # the same while a subscriber that is slow takes something each time
INTERRUPT_SECONDS = 0.1   # within which a thread that waits for an answer notices an interrupt
BIND_SECONDS = 1    # for which a port that somebody else has is tried again
MOST_FAILURES = 50  # of a thread's loop, one after the other, until the process gives up
HANDLERS = {}       # msg_type -> (who runs it, function of (kernel, request))
EXTRAS = []         # functions of the kernel, called when its sockets are open
SOCKETS = {}          # channel -> class of its socket; zmq.Socket by default
SOCKET_OPTIONS = []   # functions of (socket, connection), called before a socket is bound
FEATURES = []       # what kernel_info_reply says of optional parts of the protocol


def handles(who):
    """Put a function into HANDLERS, under its own name."""
    def register(function):
        HANDLERS[function.__name__] = (who, function)
        return function
    return register


def is_cell(request):
    return request["header"]["msg_type"] == "execute_request"


class Cells:
    """A queue of cells and the thread that runs them, one at a time, inside one asyncio loop."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.waiting = collections.deque()   # requests
        self.loop = self.task = self.arrived = None   # once it runs
        self.request = None                  # the cell that runs
        self.taken = None                    # cells to be aborted if the running one has failed
        self.failed_burst = None             # the burst in which the latest error was
        self.was_cancelled = False           # the await of the running cell was ended: an interrupt
        self.failures = 0                    # of the loop since the latest cell
        self.is_stopping = False

    def put(self, request):
        """Called by io. A comm message need not wait for a cell that awaits something; but it may
        not overtake cells, which perhaps register its target."""
        if self.request and self.loop and not is_cell(request) and not self.waiting:
            self.loop.call_soon_threadsafe(self.kernel.answer, request)
        else:
            self.waiting.append(request)
            self.wake()

    def wake(self):
        if self.loop:
            self.kernel.try_twice(lambda: self.loop.call_soon_threadsafe(self.arrived.set))

    def stop(self):
        """End when the running cell has; returns the requests that waited."""
        self.is_stopping = True
        waiting = []
        with contextlib.suppress(IndexError):   # the thread may be taking the last one, too
            while True:
                waiting.append(self.waiting.popleft())
        self.wake()
        return waiting

    # -- its thread --

    def run(self):
        """The thread's life, until `stop`."""
        import asyncio
        self.sleep, self.arrived = asyncio.sleep, asyncio.Event()
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        self.loop = loop
        while not self.is_stopping:
            try:
                if self.task is None or self.task.done():   # at first; a cell may cancel all tasks
                    self.task = loop.create_task(self.one_after_the_other())
                loop.run_until_complete(self.task)
            except KeyboardInterrupt:
                pass      # it ended a background task of the user's, which remembers it
            except BaseException as problem:
                self.failures += 1   # at first, a cell has stopped the loop; then it is broken
                if self.failures > 1:
                    self.kernel.trouble("the cells' loop", problem)
                if self.failures > MOST_FAILURES:
                    os._exit(1)
        if self is not self.kernel.cells:   # exit functions may need the main one
            loop.close()

    async def one_after_the_other(self):
        while not self.is_stopping:
            while self.waiting and not self.is_stopping:
                request = self.waiting.popleft()
                if not is_cell(request):
                    self.kernel.answer(request)
                elif self.failed_burst and burst_of(request) == self.failed_burst:
                    self.kernel.abort(request)
                else:
                    await self.execute(request)
                if self.waiting:
                    await self.sleep(0)   # background tasks have their turn
            self.arrived.clear()
            if not self.is_stopping and not self.waiting:
                await self.arrived.wait()

    async def execute(self, request):
        """Run one execute_request from busy to idle; after an error, abort those that wait."""
        kernel = self.kernel
        kernel.enter(request)
        self.request, self.taken, self.failures = request, None, 0
        started = {"started": date_now()}
        try:
            kernel.status("busy", request)
            reply = await execute_request(kernel, request)
        except BaseException as error:   # the client's mistake, or a SIGINT at an odd moment
            reply = {**failed(error), "execution_count": kernel.interpreter.execution_count}
        kernel.try_twice(self.leave)
        try:
            kernel.finish(request, reply, started)
        except (TypeError, ValueError) as error:   # a payload or value that JSON has no word for
            kernel.finish(request, {**failed(error), "execution_count": reply["execution_count"]})
        if reply["status"] == "error":
            self.failed_burst = burst_of(request) if self.taken is not None else None
            for other in self.taken or ():
                kernel.abort(other)
        else:   # an error that was told, but did not end the cell: the others go on waiting
            self.waiting.extendleft(reversed(self.taken or ()))

    def leave(self):
        """The running cell has come to its end: nothing of it must be left in the kernel's way."""
        for function in self.kernel.on_cell_end:
            function(None)
        self.request = None
        self.forget_cancel()
        if current_thread() is threading.main_thread():
            # A handler that the cell has left must not decide what the next interrupt does (I10).
            signal.signal(signal.SIGINT, self.kernel.interrupt)
        self.kernel.drain()

    # -- errors and interrupts --

    def before_error(self, error):
        """An error will be told. Collect the cells to abort before anybody hears of it: what a
        client sends after it heard of the error must run (I9)."""
        content = self.request["content"]
        if content.get("stop_on_error", True) and not content.get("silent", False):
            self.taken = [*(self.taken or ()), *self.kernel.let_io(self.take_cells)]

    def take_cells(self):
        """Called by io: the cells that have arrived, taken out; comm messages go on waiting."""
        while self.kernel.receive("shell"):
            pass
        waiting = [self.waiting.popleft() for _ in range(len(self.waiting))]
        self.waiting.extendleft(reversed([r for r in waiting if not is_cell(r)]))
        return [request for request in waiting if is_cell(request)]

    def interrupt(self):
        """End the await of the running cell, thread-safely: only that wakes a loop which sleeps in
        select. Or, if it has only begun, let it see that it was interrupted."""
        self.was_cancelled = True
        self.loop.call_soon_threadsafe(self.cancel, self.request)

    def cancel(self, request):
        """Called in the loop: end what a cell awaits, if it still runs."""
        if self.request is request:
            self.task.cancel()

    def forget_cancel(self):
        """The task lives on: `asyncio.timeout` and the like must not find it cancelled."""
        self.was_cancelled = False
        while hasattr(self.task, "uncancel") and self.task.cancelling():
            self.task.uncancel()


def burst_of(request):
    """The name that a client gave to the cells which it sent at once, or None."""
    burst = request["metadata"].get("burst")
    return burst if isinstance(burst, str) else None


class Kernel:
    """The five channels of one interpreter, as the connection file says."""

    def __init__(self, connection, interpreter_class=None):
        self.session = Session(connection["key"], scheme=connection["signature_scheme"])
        self.outbox = Outbox(self.session)
        self.interpreter = (interpreter_class or INTERPRETERS["python"])(self.outbox.publish)
        self.interpreter.before_error.append(self.before_error)
        self.connection = connection
        self.process_id = os.getpid()
        self.context = zmq.Context()
        self.sockets = {}                     # channel -> socket; the io thread's alone
        self.descriptors = []
        self.cells = Cells(self)
        self.shells = [self.cells]            # whatever runs cells
        self.workers = {"io": self.answer, "cells": self.cells.put}   # who -> function of a request
        self.poller, self.sources = zmq.Poller(), {}   # socket or descriptor -> function
        self.rounds = [self.do_calls, self.send_due]   # see `serve`
        self.on_start = []                       # functions without arguments
        self.on_enter, self.on_drain = [], []    # the same
        self.on_interrupt, self.on_trouble = [], []   # the same
        self.on_cell_end = []                    # functions of an exception, or None
        self.calls = collections.deque()      # functions that io is to call
        self.questions = {}      # msg_id of an input_request -> (queue of its answer, the message)
        self.past = collections.deque(maxlen=1000)   # msg_ids of questions that wait no more
        self.request = contextvars.ContextVar("request")
        self.latest = None                    # the execute_request that runs or ran last
        self.interrupts = 0                   # how many there were
        self.unsent = []                      # (channel, parts) that wait for one that must wait
        self.retry_ms = RETRY_MS              # BRISK_MS after something was sent, then longer
        self.is_finished, self.io_done = False, threading.Event()

    # -- life: bind, capture, run until told to stop --

    def bind(self):
        """Open the sockets: the kernel binds, clients connect."""
        for channel, kind in (("shell", zmq.ROUTER), ("control", zmq.ROUTER),
                              ("stdin", zmq.ROUTER), ("iopub", zmq.XPUB)):
            new = self.sockets[channel] = self.context.socket(kind, SOCKETS.get(channel))
            new.linger = 1000    # milliseconds that the last words get when the process ends
            if kind == zmq.ROUTER:
                new.sndhwm = 0            # a reply is never dropped
                new.router_handover = 1   # a client that comes back under its old identity is heard
                new.router_mandatory = channel == "stdin"   # see `send`
            else:
                new.xpub_manual = 1       # we say what a subscription stands for: see Broadcast
                new.xpub_nodrop = 1       # a full subscriber is waited for
                new.sndhwm = 64           # messages, of up to a megabyte, for each subscriber
            self.open(new, channel)
            self.listen(new, functools.partial(self.receive, channel))
        self.broadcast = BROADCASTS[-1](self.sockets["iopub"])

    def open(self, new, channel):
        """Bind a socket to the address that the connection file has for its channel."""
        for set_option in SOCKET_OPTIONS:
            set_option(new, self.connection)
        joint = ":" if self.connection["transport"] == "tcp" else "-"
        port = self.connection[port_name(channel)]
        until = monotonic() + BIND_SECONDS
        while True:
            try:
                return new.bind(
                    f"{self.connection['transport']}://{self.connection['ip']}{joint}{port}")
            except zmq.ZMQError as problem:   # whoever looks for free ports takes one for a moment
                if problem.errno != zmq.EADDRINUSE or monotonic() > until:
                    raise
                sleep(0.02)

    def listen(self, source, function):
        """Let io call `function()` when a socket or descriptor can be read. Before io starts, or
        in it."""
        self.sources[source] = function
        self.poller.register(source, zmq.POLLIN)

    def capture(self):
        """Lead sys.stdout, sys.stderr and descriptors 1 and 2 into the outbox."""
        for number, name in ((1, "stdout"), (2, "stderr")):
            descriptor = DESCRIPTORS[POSIX](number, self.outbox)
            self.descriptors.append(descriptor)
            descriptor.listen(self)
            setattr(sys, name, Stream(number, self.outbox))
        builtins.input = self.input
        # What code writes to a captured descriptor is read at once, so that it keeps its turn (I1).
        sys.modules["os"].write = self.write

    def run(self):
        """Start the threads and run cells in this one, the main thread, until the end."""
        signal.signal(signal.SIGINT, self.interrupt)
        self.bind()
        self.capture()
        self.listen(self.outbox.wake_receiver.fileno(), self.outbox.was_woken)
        # To receive and to answer a request, io takes the interpreter's lock some twenty times. As
        # long as a cell computes, each may take so many seconds (usually 0.005).
        sys.setswitchinterval(0.001)
        try:
            self.start()
        except BaseException:
            self.log(traceback.format_exc())   # perhaps nobody serves sys.stderr yet
            os._exit(1)
        self.cells.run()
        self.end()

    def start(self):
        """Call the extras, start the threads, and hand the process to the user."""
        for extra in EXTRAS:
            extra(self)
        # Queued before any thread can answer a request: it is the first that a client hears.
        self.outbox.publish("status", {"execution_state": "starting"}, parent={})
        for work in (self.serve, self.beat):
            threading.Thread(target=work, name=THREADS[work.__name__], daemon=True).start()
        import asyncio  # noqa: F401, io answers meanwhile; the user's folder is not yet in reach
        for function in self.on_start:
            function()
        self.interpreter.take_over()

    def stop(self):
        """Let every shell end when its running cell has; the main thread then ends the process."""
        for cells in [*self.shells]:
            for request in cells.stop():
                if is_cell(request):
                    self.abort(request)

    def end(self):
        """Let exit functions speak, send all that is queued, and go without waiting for threads."""
        atexit._run_exitfuncs()
        flush_files()
        self.drain()
        self.outbox.is_due = True   # before the next line: io must take all that is left
        self.outbox.line_seconds = 0
        self.is_finished = True
        self.outbox.wake()
        self.io_done.wait(2)
        end_children()
        os._exit(0)

    # -- the io thread: every socket, level-triggered --

    def serve(self):
        """Wait for sockets, pipes and the outbox; nothing here blocks or runs user code.

        Each function in `rounds` does what is due, and returns the milliseconds after which it
        wants to be called again, or None.
        """
        failures, patience = 0, 0
        while not self.is_finished:
            try:
                for source, _ in self.poller.poll(patience):
                    self.sources[source]()
                wishes = [wish for do in self.rounds if (wish := do()) is not None]
                patience, failures = min(wishes, default=None), 0
            except Exception as problem:   # perhaps a cell has broken what we need (I8)
                self.trouble("the io thread", problem)
                patience, failures = RETRY_MS, failures + 1
                if failures > MOST_FAILURES:
                    os._exit(1)
        self.send_due()
        self.context.destroy(linger=1000)
        self.io_done.set()

    def send_due(self):
        """Send what is due, in order. What cannot be sent yet waits, and lets pass only what goes
        another way."""
        due, self.unsent = itertools.chain(self.unsent, self.outbox.take()), []
        held = set()   # ways on which messages must wait for one that waits
        self.retry_ms = min(2 * self.retry_ms, RETRY_MS)
        for channel, parts in due:
            way = channel if channel == "iopub" else (channel, parts[0])
            if way in held or not self.send(channel, parts):
                held.add(way)
                self.unsent.append((channel, parts))
        self.hold("iopub" in held)
        patience = self.outbox.patience()
        if self.unsent:
            patience = self.retry_ms if patience is None else min(self.retry_ms, patience)
        return patience

    def hold(self, is_full):
        """While a subscriber has no room, whoever prints must wait: threads look at `is_full`, and
        the pipes of child processes are not read (I4)."""
        if is_full != self.outbox.is_full:
            self.outbox.is_full = is_full
            for source in self.sources:
                if any(source == each.pipe for each in self.descriptors):
                    self.poller.register(source, 0 if is_full else zmq.POLLIN)

    def send(self, channel, parts):
        """Send one message; False when that must be tried again."""
        try:
            if channel == "iopub":
                if not self.broadcast.send(parts):
                    return False
                self.retry_ms = BRISK_MS
            else:
                send_parts(self.sockets[channel], parts)
        except Exception as problem:
            if getattr(problem, "errno", None) != zmq.EHOSTUNREACH:
                self.trouble(f"sending on {channel}", problem)
                return False
            return not self.questions   # its client is not on stdin yet: try again while we ask
        return True

    def let_io(self, function):
        """What `function()` returns or raises, called by the io thread. It may use the sockets."""
        outcome = queue.SimpleQueue()
        self.calls.append((function, outcome))
        self.outbox.wake()
        result, error = outcome.get()
        if error:
            raise error
        return result

    def do_calls(self):
        while self.calls:
            function, outcome = self.calls.popleft()
            try:
                outcome.put((function(), None))
            except Exception as error:
                outcome.put((None, error))

    def receive(self, channel):
        """Pass on one message that has come on a channel. False when there was none."""
        self.outbox.is_due = True   # io is awake: who puts a message now need not wake it
        try:
            parts = self.sockets[channel].recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        except Exception as problem:
            self.trouble(f"receiving on {channel}", problem)
            return False
        try:
            self.take_in(channel, parts)
        except Exception as problem:   # no busy, no reply, and never the end of this thread
            self.log(f"dropped a message on {channel}: {problem!r}")
        return True

    def take_in(self, channel, parts):
        """Pass on a message; raises BadMessage."""
        if channel == "iopub":
            return self.subscription(parts[0])
        request = self.session.unpack(parts)
        request["channel"] = channel
        if channel != "stdin":
            self.dispatch(request)
        elif request["header"]["msg_type"] == "input_reply":
            self.take_answer(request)

    def take_answer(self, request):
        """An answer goes to the question that it names, or else, for jupyter_client names none, to
        the latest; not when it names one that was interrupted."""
        named = request["parent_header"].get("msg_id")
        asked = self.questions.get(named) or next(reversed(self.questions.values()), None)
        if asked and named not in self.past:
            asked[0].put(str(request["content"].get("value", "")))

    def subscription(self, event):
        """A client has subscribed to iopub, or does so no more."""
        sign, topic = event[:1], event[1:]
        if sign == b"\x01":
            message = self.session.message("iopub_welcome", {
                "subscription": topic.decode("utf-8", "replace")})
            self.broadcast.subscribe(topic, self.session.pack({**message, "identities": [topic]}))
        elif sign == b"\x00":
            self.broadcast.unsubscribe(topic)

    def dispatch(self, request):
        """Hand a request to the thread that answers it."""
        # Journey 5: the handler is the function named like the message type; busy comes first.
        who, _ = HANDLERS.get(request["header"]["msg_type"], ("io", None))
        self.workers[who](request)

    def beat(self):
        """Echo heartbeats in C, without the interpreter's lock, so that a busy kernel is alive."""
        echo = zmq.Context().socket(zmq.ROUTER)
        echo.linger = 0
        self.open(echo, "heartbeat")
        zmq.proxy(echo, echo)

    def try_twice(self, function):
        """Call a function, and when it fails once more (I8)."""
        try:
            return function()
        except Exception as problem:
            self.trouble(function.__name__, problem)
            return function()

    def trouble(self, what, problem):
        """What never fails has failed: has a cell broken something? Say so, and mend it (I8)."""
        self.log(f"{what} failed: {problem!r}")
        for function in self.on_trouble:
            function()

    def log(self, text):
        """A line on the real stderr, for whoever started the kernel."""
        line = f"kernel {os.getpid()}: {text}\n"
        try:
            os_write(self.descriptors[1].original, line.encode("utf-8", "replace"))
        except OSError:
            pass   # nobody may be there to read it

    # -- answering --

    def status(self, state, request):
        self.outbox.publish("status", {"execution_state": state}, parent=request["header"])

    def reply(self, request, content, metadata=None):
        """Send a reply to the one who asked, on the channel it asked on."""
        msg_type = request["header"]["msg_type"].removesuffix("_request") + "_reply"
        message = self.session.message(msg_type, {"status": "ok", **content}, request["header"],
                                       metadata)
        message["identities"] = request["identities"]
        self.outbox.put(request["channel"], message)

    def answer(self, request):
        """Answer a request that is no cell: busy, perhaps a reply, idle."""
        msg_type = request["header"]["msg_type"]
        self.status("busy", request)
        try:
            _, handler = HANDLERS.get(msg_type, (None, None))
            if handler is None:
                self.log(f"no handler for {msg_type!r}")
            elif (content := handler(self, request)) is not None:
                self.reply(request, content)
        except Exception as error:   # the client's mistake, such as a missing field
            self.log(f"{msg_type} failed: {error!r}")
            if msg_type.endswith("_request"):
                self.reply(request, failed(error))
        finally:
            self.status("idle", request)

    def enter(self, request):
        """From here on, what this thread says belongs to `request`.

        Output belongs to the request of its context. A thread has no context of its own: its output
        belongs to the cell that began last.
        """
        self.latest, self.outbox.latest = request, scope_of(request["header"])
        self.outbox.scope.set(self.outbox.latest)
        self.request.set(request)
        for function in self.on_enter:
            function()

    def cells_of(self, request):
        """Which cells run a request; None when it runs no more."""
        return next((cells for cells in [*self.shells] if cells.request is request), None)

    def before_error(self, error):
        """The interpreter will tell an error, below the request of this context."""
        for function in self.on_cell_end:
            function(error)
        request = self.request.get(None)   # None in a thread of the user's
        if request and (cells := self.cells_of(request)):
            cells.before_error(error)

    def drain(self):
        """Bring in what child processes and C code have printed so far (I2)."""
        for function in self.on_drain:
            function()
        for descriptor in self.descriptors:
            descriptor.drain()

    def write(self, number, data):
        """`os.write`. What it sends to a captured descriptor is read at once, so that it comes
        before what is printed next (I1)."""
        written = os_write(number, data)
        if number in (1, 2):
            self.descriptors[number - 1].drain()
        return written

    def finish(self, request, reply, metadata=None):
        # Journey 10: `execute_reply` goes to the one who asked, then everybody hears `idle` (I2).
        self.reply(request, reply, metadata)
        self.status("idle", request)

    def abort(self, request):
        self.status("busy", request)
        self.finish(request, {"status": "aborted",
                              "execution_count": self.interpreter.execution_count})

    # -- interrupts --

    def interrupt(self, signum, frame):
        """SIGINT, in the main thread. Where the code stands decides what can be done (I10):

        running or sleeping: raise right here; awaiting, or just beginning: cancel the await; idle:
        nothing.
        """
        for function in self.on_interrupt:
            function()
        self.interrupts += 1
        code, ours = [], self.interpreter.users_frames()
        while frame is not None:
            code.append(frame.f_code)
            frame = frame.f_back
        runs_here = any(one in ours or CELL_FILE.match(one.co_filename) for one in code)
        for cells in [*self.shells]:
            if cells.request and not (runs_here and cells is self.cells):
                cells.interrupt()
        self.outbox.wake()   # whom the interrupt keeps from doing so, perhaps
        if runs_here and Kernel.let_io.__code__ not in code:   # io would go on without us
            raise KeyboardInterrupt

    # -- stdin: the kernel asks, the client that runs the cell answers --

    def input(self, prompt=""):
        """Python's `input`."""
        return self.ask(str(prompt))

    def ask(self, prompt, password=False):
        """Send `input_request` and wait for its `input_reply`; raises EOFError on Ctrl-D."""
        request = self.request.get(self.latest)
        if request is None or not request["content"].get("allow_stdin", True):
            raise StdinNotImplementedError("input() was called, but this client does not allow "
                                           "questions (allow_stdin is false)")
        message = self.session.message("input_request", {"prompt": prompt, "password": password},
                                       request["header"])
        # A client has the same identity on shell and on stdin: so the question finds it.
        message["identities"] = request["identities"]
        msg_id = message["header"]["msg_id"]
        answer, interrupts = queue.SimpleQueue(), self.interrupts
        self.questions[msg_id] = answer, message
        try:
            self.outbox.put("stdin", message)
            value = self.wait_for(answer, interrupts)
        finally:
            del self.questions[msg_id]
            self.past.append(msg_id)
        if value == "\x04":
            raise EOFError
        return value

    def wait_for(self, answer, interrupts):
        """What is put into the queue `answer`. The signal that ends the wait reaches the main
        thread alone: others look from time to time whether there were more than so many."""
        in_main = current_thread() is threading.main_thread()
        while True:
            try:
                return answer.get(timeout=None if in_main else INTERRUPT_SECONDS)
            except queue.Empty:
                if self.interrupts > interrupts:
                    raise KeyboardInterrupt from None


THREADS = {"serve": "io", "beat": "heartbeat"}   # method that is a thread's life -> its name


class StdinNotImplementedError(RuntimeError):
    """The cell asks for input, and its client cannot give any. (ipykernel's name for it.)"""


def port_name(channel):
    return "hb_port" if channel == "heartbeat" else f"{channel}_port"


def failed(error):
    """The content of a reply to a request that could not be handled."""
    return {"status": "error", "ename": class_name(error), "evalue": text_of(error),
            "traceback": []}


# -- the requests --

@handles("cells")
async def execute_request(kernel, request):
    """Content: code, silent, store_history, allow_stdin, stop_on_error, user_expressions."""
    content, interpreter = request["content"], kernel.interpreter
    code, silent = content["code"], bool(content.get("silent", False))
    if not isinstance(code, str):
        raise TypeError("execute_request: code must be a string")
    store_history = bool(content.get("store_history", True)) and not silent
    # Journey 6: the counter goes up and everybody hears what will run, as `execute_input`.
    interpreter.execution_count += store_history
    if not silent:
        kernel.outbox.publish("execute_input", {
            "code": code, "execution_count": interpreter.execution_count})
    return await interpreter.execute(
        code, store_history=store_history, silent=silent,
        user_expressions=content.get("user_expressions") or {},
        was_interrupted=lambda: getattr(kernel.cells_of(request), "was_cancelled", False))


@handles("io")
def kernel_info_request(kernel, request):
    about = kernel.interpreter
    return {"protocol_version": PROTOCOL_VERSION, "implementation": about.implementation,
            "implementation_version": __version__, "language_info": about.language_info,
            "banner": about.banner, "help_links": [], "supported_features": FEATURES}


@handles("io")
def shutdown_request(kernel, request):
    """Reply, tell everybody, and let the main thread end; a running cell is interrupted."""
    restart = bool(request["content"].get("restart", False))
    kernel.outbox.publish("shutdown_reply", {"status": "ok", "restart": restart},
                          parent=request["header"])
    kernel.stop()
    if kernel.cells.request:
        signal_main_thread()
    return {"restart": restart}


@handles("io")
def interrupt_request(kernel, request):
    """The same as a SIGINT, for kernel specs with `interrupt_mode: message`."""
    signal_main_thread()
    return {}


# -- the system's own ways, and the portable ones beside them --

def signal_main_thread():
    """Deliver a SIGINT as the terminal would: to our children too, when we lead the group."""
    if POSIX and os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGINT)
    elif POSIX:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    else:
        _thread.interrupt_main()


def flush_files():
    """Write what a cell has left in files that it did not close, as Python does at its end."""
    for each in gc.get_objects():
        if type(each) in (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom):
            with contextlib.suppress(Exception):
                each.flush()


def end_children(number=signal.SIGTERM):
    """Signal the processes that the user's code has started, when we lead their group."""
    if POSIX and os.getpgrp() == os.getpid():
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)   # it is for our children, not for us
        os.killpg(os.getpid(), number)


# ---- 5. main ----------------------------------------------------------------------------------
#
# Python caches the bytecode of imported modules but not of the script it runs, and compiling this
# file takes longer than all the rest of a start. So a kernel spec imports it: see LAUNCH.

# Python 3.13 itself imports modules before it runs what stands behind -c.
SAFE_PATH = ["-P"] if sys.version_info >= (3, 11) else []
LAUNCH = """\
import os, sys
sys.path[:] = [entry for entry in sys.path if entry and entry != os.getcwd()]
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
spec = PathFinder.find_spec("kernel", [{folder!r}])
kernel = module_from_spec(spec)
spec.loader.exec_module(kernel)
kernel.main()"""


def command():
    """The argv of a kernel spec that starts this file quickly, and leaves the name `kernel` to
    the user's own module of that name."""
    folder = os.path.dirname(os.path.abspath(__file__))
    return [sys.executable, *SAFE_PATH, "-c", LAUNCH.format(folder=folder),
            "-f", "{connection_file}"]


def kernel_spec(display_name):
    """The content of a kernel.json that starts this file."""
    return {"argv": command(), "display_name": display_name, "language": "python",
            "interrupt_mode": "signal" if POSIX else "message", "env": {},
            # The last two are for our server: who prints waits for subscribers that read slowly.
            "metadata": {"debugger": False, "supported_encryption": ["curve"],
                         "supported_transports": ["tcp", "ipc"], "waits_for_subscribers": True},
            "kernel_protocol_version": f"{PROTOCOL_VERSION}.0"}


def data_folder():
    """Jupyter's data folder of this user."""
    home = os.path.expanduser
    usual = {"darwin": home("~/Library/Jupyter"),
             "win32": os.path.join(os.environ.get("APPDATA", home("~")), "jupyter")}
    return os.environ.get("JUPYTER_DATA_DIR") or usual.get(sys.platform) or os.path.join(
        os.environ.get("XDG_DATA_HOME") or home("~/.local/share"), "jupyter")


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
            **connection, "connection_file": os.path.abspath(path)}


COMMANDS = {}   # first word of the command line -> function of the others


def main():
    """Read the connection file and run."""
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        return COMMANDS[sys.argv[1]](sys.argv[2:])
    # Other options are ignored: nbclient sends some of ipykernel's to any kernel called python3.
    words = [word for argument in sys.argv[1:]
             for word in (argument.split("=", 1) if argument[:1] == "-" else [argument])]
    if "-f" not in words[:-1]:
        sys.exit("usage: python kernel.py -f CONNECTION_FILE   (a Jupyter client starts it so)\n"
                 "       python kernel.py install [--user | --prefix DIR]")
    connection = read_connection_file(words[words.index("-f") + 1])
    sys.argv[:] = [""]
    Kernel(connection).run()


# ==== Part II: delete from here to its end mark, and the rest runs ====
#
# Each section below is one feature. It reaches Part I only by the extension points listed at the
# head of this file, and other sections only by the tables that come first; so any one of them can
# be deleted, and the rest works without it.
#
#     6 Errors in colour            ERROR_FORMATS
#     7 Containers in lines         FORMATTERS
#     8 The notebook's interpreter  INTERPRETERS, HANDLERS: history_request
#     9 Comms                       HANDLERS, kernel.comms
#    10 Magics                      TRANSLATORS, EXTRAS
#    11 Questions about code        HANDLERS, EXTRAS: the helper thread
#    12 IPython.display in small    STAND_INS
#    13 IPython                     AFTER_IMPORT
#    14 matplotlib                  AFTER_IMPORT, STAND_INS
#    15 Subshells                   HANDLERS, kernel.workers
#    16 Children                    kernel.on_enter, on_cell_end, on_drain
#    17 Cells taken back            HANDLERS, kernel.workers
#    18 What a cell has broken      kernel.on_trouble, on_cell_end
#    19 Stalled subscribers         BROADCASTS
#    20 Windows                     DESCRIPTORS
#    21 Interrupts that were lost   kernel.listen, rounds, on_interrupt, on_cell_end
#    22 Patience at the start       kernel.rounds
#    23 The parent's end            kernel.listen
#    24 Passwords                   AFTER_IMPORT
#    25 Clients that have gone      SOCKETS, EXTRAS, kernel.listen, rounds
#    26 Leaving                     EXTRAS: exit and quit
#    27 Encryption                  SOCKET_OPTIONS
#    28 Usage and addresses         HANDLERS
#    29 Less collecting             EXTRAS
#    30 Faster JSON                 ENCODERS
#    31 Variables                   HANDLERS, EXTRAS, FEATURES
#    32 Automagic                   EXTRAS, OFFERS
#    33 Packages                    EXTRAS, OFFERS, STAND_INS
#    34 Install                     COMMANDS
#
# The tables by which one section serves another, and two finders on `sys.meta_path`: a few
# libraries must know that they run in a notebook, but nothing is imported before the user does.

AFTER_IMPORT = {}   # module -> function of (module, kernel), called when it was imported
STAND_INS = {}      # module that is missing -> function of (module, kernel) that fills an empty one
TRANSLATORS = []    # functions of a cell's source that is no Python; each returns it nearer to it
COMPLETERS = []     # see `complete` in section 11
OFFERS = {}         # name -> function that one section has, and others use by `offered`
IPYTHON_BRINGS = ("IPython brings all its magics, extensions and settings: "
                  "%pip install ipython, then restart the kernel")
PACKAGES = ("IPython", "IPython.core", "IPython.terminal")   # stand-ins that have modules in them


class AfterImport:
    """Calls AFTER_IMPORT[name](module, kernel) when a module has just been imported (PEP 451)."""

    def __init__(self, kernel):
        self.kernel, self.hooks = kernel, dict(AFTER_IMPORT)

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
                with own_imports():
                    hook(module, self.kernel)
            except BaseException:   # perhaps an interrupt; the next try is a first one again
                self.hooks[name] = hook
                for each in [*sys.modules]:
                    if name == "IPython" and each.startswith("IPython."):
                        del sys.modules[each]
                raise

        spec.loader.exec_module = exec_module
        return spec


class StandIns:
    """Modules made on the spot, for names in STAND_INS that nobody else can import."""

    def __init__(self, kernel):
        self.kernel = kernel

    def find_spec(self, name, path=None, target=None):
        if name in STAND_INS:
            return importlib.util.spec_from_loader(name, self, is_package=name in PACKAGES)
        return None

    def create_module(self, spec):
        return None   # the usual empty module

    def exec_module(self, module):
        STAND_INS[module.__name__](module, self.kernel)


# Late imports must not find modules of the notebook's folder: see FolderFinder.
PYTHON_PATH = [entry for entry in sys.path if entry]   # where the kernel itself finds modules
STANDARD, IMPORTLIB = os.path.dirname(os.__file__), os.path.dirname(importlib.__file__)
LIBRARIES = (STANDARD, *(entry for entry in PYTHON_PATH if entry.endswith("-packages")))
HERE = threading.local()   # `imports`: how many imports of the kernel's own this thread is in


class own_imports:
    """While this lasts, imports of this thread are the kernel's own."""

    def __enter__(self):
        self.before = getattr(HERE, "imports", 0)
        HERE.imports = self.before + 1

    def __exit__(self, *error):
        HERE.imports = self.before


def answer_in_thread(kernel, name):
    """A thread answers the requests of the handlers that name it, one after the other."""
    questions = queue.SimpleQueue()

    def answer():
        HERE.imports = 1   # all imports of this thread are the kernel's own
        while True:
            kernel.answer(questions.get())

    kernel.workers[name] = questions.put
    threading.Thread(target=answer, name=name, daemon=True).start()


class FolderFinder(importlib.machinery.PathFinder):
    """Takes the place of Python's PathFinder, which searches `sys.path`.

    who imports                  searched
    the kernel                   PYTHON_PATH
    a library                    PYTHON_PATH, then sys.path: what numpy calls `secrets` is Python's
    a cell, the user's modules   sys.path, on which the notebook's folder comes first
    """

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and getattr(HERE, "imports", 0):
            path = PYTHON_PATH
        elif path is None and importing_file().startswith(LIBRARIES):
            is_known = name in sys.stdlib_module_names or super().find_spec(name, PYTHON_PATH)
            path = PYTHON_PATH if is_known else None
        return super().find_spec(name, path, target)


def importing_file():
    """The file whose code is importing something."""
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename.startswith(("<frozen importlib", IMPORTLIB))
                            or frame.f_globals is globals()):
        frame = frame.f_back
    return frame.f_code.co_filename


def own(name):
    """The module `name` for the kernel itself, also when a cell has imported one of that name from
    the notebook's folder."""
    with own_imports():
        module = importlib.import_module(name)
        if is_pythons(module):
            return module
        spec = FolderFinder.find_spec(name)
        module = importlib.util.module_from_spec(spec)   # a second one, for us alone
        spec.loader.exec_module(module)
    return module


def is_pythons(module):
    """True for a module that was not found in the notebook's folder."""
    origin = getattr(module, "__file__", None)
    if origin is None or "." in module.__name__:
        return True   # built in, or in a package
    folder = os.path.dirname(origin)
    return (os.path.dirname(folder) if hasattr(module, "__path__") else folder) in PYTHON_PATH \
        or folder.startswith(STANDARD)


@EXTRAS.append
def keep_folder_out(kernel):
    sys.meta_path[:] = [FolderFinder if finder is importlib.machinery.PathFinder else finder
                        for finder in sys.meta_path]


def offered(name, *arguments):
    """What another section's function returns; None where that section is not there."""
    return OFFERS[name](*arguments) if name in OFFERS else None


def is_muted(code):
    """True when the cell ends in `;`, which mutes its value; comments may follow it."""
    if ";" not in code.rstrip().rpartition("\n")[2]:
        return False
    tokenize = own("tokenize")
    last = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE,
                                  tokenize.ENDMARKER):
                last = token.string
    except (tokenize.TokenError, SyntaxError):   # the cell has `!ls;` or the like in it
        return code.rstrip().endswith(";")
    return last == ";"


@EXTRAS.append
def hook_imports(kernel):
    sys.meta_path.insert(0, AfterImport(kernel))
    sys.meta_path.append(StandIns(kernel))


# ---- 6. Errors in colour -----------------------------------------------------------------------
#
# Tracebacks with the cell's lines around the spot, the failing expression underlined, and colours.
# Chains and groups are walked without recursion where they may be deep, and every walk is bounded:
# of a recursion, a chain of causes or a group both ends are shown, and how much was left out.

CAUSE = "The above exception was the direct cause of the following one:"
CONTEXT = "During handling of the above exception, another one occurred:"
FRAMES_SHOWN = 6   # of a deep recursion, at either end: enough to see the cycle
ERRORS_SHOWN = 15  # of a long chain of causes, at either end; of a group, as in Python's own
MOST_NEAR = 2_000  # names among which one is looked for that was meant
GROUPS_SHOWN = 10  # levels of groups within groups; as in Python's own
EXIT_NOTE = "An exception has occurred, use %tb to see the full traceback.\n"   # as in ipykernel
RED, GREEN, CYAN, DIM, BOLD, RESET = (
    f"\x1b[{code}m" for code in ("31", "32", "36", "2", "1", "0"))
TOKEN = re.compile(   # of a line in a traceback
    r"(?P<comment>#.*)|(?P<string>(?:\b[a-zA-Z]{1,2})?(?:'[^'\n]*'|\"[^\"\n]*\"))"
    rf"|\b(?:(?P<keyword>{'|'.join(keyword.kwlist)})|(?P<number>\d[\w.]*))\b")
TOKEN_COLOURS = {"comment": "\x1b[90m", "string": "\x1b[33m", "keyword": "\x1b[35m",
                 "number": "\x1b[32m"}

RULE_WIDTH = 79


def attribute(error, name, kinds, otherwise=None):
    """`error.NAME`, if it can be had and is one of `kinds`."""
    try:
        value = getattr(error, name, otherwise)
    except BaseException:
        return otherwise
    return value if isinstance(value, kinds) else otherwise


def format_error(error):
    """The traceback of `error`, its causes and members as lines, without the frames of this
    file."""
    if isinstance(error, SystemExit):   # the user has asked for it
        return [EXIT_NOTE, f"{named(error)}\n"]
    if render := getattr(type(error), "_render_traceback_", None):   # as in IPython
        return [text_of(line) for line in render(error)]
    with own_imports():
        return [*chain_lines(error, set(), 0)]


def chain_lines(error, shown, depth):
    """An exception below those that led to it; `depth` counts the groups around it."""
    for link, one in chain_of(error, shown):
        if link:
            yield from ("", link, "")
        if one is not None:
            yield from format_one(one)
            yield from group_lines(one, shown, depth)


def chain_of(error, shown):
    """[(how it follows from the one before, exception)], the first cause first; of a long chain
    both ends. What was `shown` already, as in a circle, ends the chain."""
    chain = []
    while error is not None and id(error) not in shown:
        shown.add(id(error))
        cause, context = related(error)
        chain.insert(0, (CAUSE if cause else CONTEXT if context else "", error))
        error = cause or context
    if chain:
        chain[0] = ("", chain[0][1])
    left_out = len(chain) - 2 * ERRORS_SHOWN
    if left_out > 0:
        chain[ERRORS_SHOWN:-ERRORS_SHOWN] = [(f"… {left_out} more led to each other …", None)]
    return chain


def related(error):
    """(cause, context) of an exception: `raise … from`, or the one that was being handled."""
    cause = attribute(error, "__cause__", BaseException)
    is_told = cause or attribute(error, "__suppress_context__", bool)
    return cause, None if is_told else attribute(error, "__context__", BaseException)


def members_of(group):
    """The exceptions of an exception group; none of another exception."""
    members = attribute(group, "exceptions", (tuple, list), ())
    return [each for each in members if isinstance(each, BaseException)]


def group_lines(group, shown, depth):
    """The members of an exception group, each below a line that counts it."""
    members = members_of(group)
    if members and depth == GROUPS_SHOWN:
        yield f"… {len(members)} in the group …"
        return
    for number, member in enumerate(members[:ERRORS_SHOWN], 1):
        yield f"+---- {number} of {len(members)} in the group"
        for line in chain_lines(member, shown, depth + 1):
            yield f"| {line}"
    if len(members) > ERRORS_SHOWN:
        yield f"… {len(members) - ERRORS_SHOWN} more in the group …"


def format_one(error):
    """One exception without its causes: a rule, frames, then the lines that name it."""
    frames = frames_of(error)
    if isinstance(error, SyntaxError):   # the file that is wrong is named by the last lines
        frames = [entry for entry in frames
                  if isinstance(entry, str) or entry.filename != error.filename]
    lines = [f"{RED}{'-' * RULE_WIDTH}{RESET}"]
    for number, entry in enumerate(frames):
        lines += [""] if number else []
        lines += [f"{DIM}{entry}{RESET}"] if isinstance(entry, str) else format_frame(entry)
    return lines + coloured_name(error, last_lines(error))


def coloured_name(error, lines):
    """`lines` with the exception's name, and the spot of a SyntaxError, in colour."""
    name = class_name(error)
    for at, line in enumerate(lines):
        before, found, message = line.partition(name)
        if name and found and message[:1] in ("", ":"):
            return [*lines[:at], f"{before}{BOLD}{RED}{name}{RESET}{message}", *lines[at + 1:]]
    return lines


def frames_of(error):
    """The frames of its traceback that are not of this file; of a deep recursion both ends."""
    trace = users_traceback(error)
    depth = sum(1 for _ in traceback.walk_tb(trace))
    if depth <= 2 * FRAMES_SHOWN:
        entries = traceback.extract_tb(trace)
    else:
        entries = [*traceback.extract_tb(trace, FRAMES_SHOWN),
                   f"… {depth - 2 * FRAMES_SHOWN} frames left out …",
                   *traceback.extract_tb(trace, -FRAMES_SHOWN)]
    return [entry for entry in entries if isinstance(entry, str) or entry.filename != __file__]


def last_lines(error):
    """The lines that name an exception: of a SyntaxError its spot, name and message, notes."""
    if any(related(error)) or members_of(error):
        # Python's own function would walk the whole chain each time, and the group without end.
        error_alone = SyntaxError(*error.args) if type(error) is SyntaxError else None
    else:
        error_alone = error
    lines = []
    with contextlib.suppress(Exception):   # fields of the wrong type, made by hand
        if error_alone is not None:
            lines = traceback.format_exception_only(type(error_alone), error_alone)
    if lines and lines[0].startswith("  File "):
        lines[0] = f"{CYAN}{place(text_of(error.filename), error.lineno)}{RESET}"
    lines = lines or [named(error)]
    with contextlib.suppress(Exception):   # `dir` of an odd object
        lines[0] = lines[0].rstrip("\n") + hint(error, lines)
    return "\n".join(line.rstrip("\n") for line in lines).split("\n")


def hint(error, lines):
    """`. Did you mean: 'x'?`, as Python itself adds it to a message; '' where it has done so, or
    nothing is near. (`traceback` knows it for few errors, and not before Python 3.12.)"""
    name = attribute(error, "name", str)
    if not name or any(". Did you" in line for line in lines):
        return ""
    if issubclass(type(error), NameError):
        *_, (frame, _) = traceback.walk_tb(traceback_of(error))
        if name in sys.stdlib_module_names:
            return f". Did you forget to import '{name}'?"
        near = {**vars(builtins), **frame.f_globals, **frame.f_locals}
    elif issubclass(type(error), AttributeError):
        near = dir(attribute(error, "obj", object))
    else:
        return ""
    near = [each for each in near if each[:1] != "_" or name[:1] == "_"][:MOST_NEAR]
    found = own("difflib").get_close_matches(name, near, 1, 0.7)
    return f". Did you mean: '{found[0]}'?" if found else ""


def named(error):
    """Name and message of an exception, and what `add_note` has added."""
    module, text = type(error).__module__, text_of(error)
    before = "" if module in ("builtins", "__main__") else f"{module}."
    notes = attribute(error, "__notes__", (list, tuple), ())
    return "\n".join([f"{before}{class_name(error)}{': ' if text else ''}{text}",
                      *map(text_of, notes)])


def place(filename, line):
    """`Cell In[3], line 2` or `File /x/y.py, line 2`: what a person calls the spot."""
    if cell := CELL_FILE.match(filename):
        return f"Cell In[{cell[1]}], line {line}"
    return f"File {filename}, line {line}"


def format_frame(entry):
    """One frame: where it is, and its line; in a cell two more on either side."""
    around = 2 if CELL_FILE.match(entry.filename) else 0
    where = "" if entry.name == "<module>" else f", in {entry.name}"
    lines = [f"{CYAN}{place(entry.filename, entry.lineno)}{GREEN}{where}{RESET}"]
    for number in range(entry.lineno - around, entry.lineno + around + 1):
        text = linecache.getline(entry.filename, number).rstrip("\n")
        if not text.strip():
            continue   # also where the source is not there, as of compiled modules
        if number == entry.lineno:
            lines.append(f"{GREEN}----> {number}{RESET} {underlined(entry, text)}")
        else:
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


ERROR_FORMATS.append(format_error)


# ---- 7. Containers in lines --------------------------------------------------------------------
#
# As IPython's printer shows them: a long container one item a line, sets in order, types by name.

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



def pretty_or_repr(value):
    try:
        return pretty(value)
    except RecursionError:
        return repr(value)


for _class in (*BRACKETS, type):
    FORMATTERS["builtins", _class.__name__] = {"text/plain": pretty_or_repr}


# ---- 8. The notebook's interpreter -------------------------------------------------------------
#
# What a notebook remembers: In, Out, `_` and their like, and the history that consoles ask for. And
# what it lets people write: a `;` that mutes the last value, and source that TRANSLATORS, such as
# section 10's, turn into Python when the parser does not understand it.

SESSION_NUMBER = 1    # in the history
MOST_OUTPUTS = 1000   # values kept in Out, as in IPython
MOST_RESULT = 10_000  # characters of a result kept in the history


class NotebookInterpreter(Interpreter):
    """Python, as a notebook has it."""

    def __init__(self, publish):
        super().__init__(publish)
        self.payload = []     # what the frontend is asked to do when the cell is done
        self.stores = True    # the running cell's value becomes _ and Out[n]
        self.results = {}     # execution_count -> text/plain, for the history
        self.magics = None    # section 10's, when it is there
        self.inputs, self.outputs = [""], {}
        self.namespace.update({
            "In": self.inputs, "_ih": self.inputs, "Out": self.outputs, "_oh": self.outputs,
            "_dh": [os.getcwd()], "_i": "", "_ii": "", "_iii": ""})
        self.forget_unders()

    async def execute(self, code, **options):
        self.payload, self.stores = [], options["store_history"]
        reply = await super().execute(code, **options)
        return {**reply, "payload": self.payload}

    def begin_cell(self, code):
        if self.stores:
            self.remember(code)
        super().begin_cell(code)

    async def run(self, code):
        """As in Part I: the user's code runs inside this frame."""
        value = await self.value_of(code)
        if value is not None and not is_muted(code):
            sys.displayhook(value)

    async def value_of(self, code):
        """The value of a cell; `%%` begins one for a magic."""
        first, _, body = code.lstrip().partition("\n")
        if not self.magics or first[:2] != "%%" or first.rstrip().endswith("?"):
            return await self.run_source(code)
        name, _, line = first[2:].partition(" ")
        value = self.magics.cell(name, line.strip(), body)
        return await value if hasattr(value, "__await__") else value

    def parse(self, code, name):
        with contextlib.suppress(SyntaxError, ValueError):   # perhaps it has magics in it
            return with_lone_magics(super().parse(code, name), code)
        for translate_source in TRANSLATORS:
            code = translate_source(code)
        return with_lone_magics(super().parse(code, name), code)

    def tell_error(self, error, content):
        if not offered("has_quit", error):   # the end of a debugger is nothing to show
            super().tell_error(error, content)

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
        count = self.count.get()
        if value is not self.outputs and self.stores:
            self.keep(value, count)
        text = self.display.result(value, count)
        if self.stores:
            self.results[count] = (text or "")[:MOST_RESULT]

    def forget_unders(self):
        self.unders = {"_": "", "__": "", "___": ""}   # as we have set them
        self.namespace.update(self.unders)

    def keep(self, value, count):
        """Keep a result. Once the user has set `_`, `__` or `___`, these are the user's (as in
        IPython), and so they are when `gettext` has put a function `_` into builtins."""
        names, before = self.namespace, self.unders
        if "_" not in vars(builtins) and all(
                names.get(name, old) is old for name, old in before.items()):
            self.unders = {"_": value, "__": before["_"], "___": before["__"]}
            names.update(self.unders)
        names[f"_{count}"] = self.outputs[count] = value
        if len(self.outputs) > MOST_OUTPUTS:   # each one keeps a value alive
            oldest = next(iter(self.outputs))
            del self.outputs[oldest]
            names.pop(f"_{oldest}", None)

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


def with_lone_magics(tree, code):
    """The tree of a cell, in which a lone `ls` or `ls -l` may call a magic: see section 32."""
    return offered("lone_magics", tree, code) or tree


INTERPRETERS["python"] = NotebookInterpreter


@handles("io")
def history_request(kernel, request):
    return kernel.interpreter.history(request["content"])


# ---- 9. Comms ----------------------------------------------------------------------------------
#
# Wires between an object here and one in the page. A comm is opened by either side under a target's
# name; then both send data and buffers in `comm_msg`, until one closes it. ipywidgets live on them.
# The classes have the interface of the package `comm`, which takes them from here when it is
# imported.

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


@EXTRAS.append
def have_comms(kernel):
    kernel.comms = Comms(kernel.outbox.publish)


def connect_comm(comm, kernel):
    """Called when the package comm has been imported: its comms are ours."""
    comm.create_comm, comm.get_comm_manager = kernel.comms.create, lambda: kernel.comms


# ipykernel puts its comms into the package comm, too.
AFTER_IMPORT["comm"] = connect_comm
AFTER_IMPORT["ipykernel.ipkernel"] = lambda module, kernel: connect_comm(
    importlib.import_module("comm"), kernel)
AFTER_IMPORT["ipykernel.comm"] = lambda module, kernel: setattr(
    module, "Comm", kernel.comms.create)


def call_comm(kernel, request):
    """Run a comm's callback below its message's header; a failure is the user's to see."""
    kernel.outbox.scope.set(scope_of(request["header"]))
    # ipywidgets' users are told of memoryviews: `upload.value[0].content.tobytes()`.
    request["buffers"] = [memoryview(part) for part in request["buffers"]]
    try:
        getattr(kernel.comms, request["header"]["msg_type"])(request)
    except BaseException as error:
        sys.stderr.write("\n".join(describe_error(error)["traceback"]) + "\n")


@handles("cells")
def comm_open(kernel, request):
    contextvars.copy_context().run(call_comm, kernel, request)


@handles("cells")
def comm_msg(kernel, request):
    contextvars.copy_context().run(call_comm, kernel, request)


@handles("cells")
def comm_close(kernel, request):
    contextvars.copy_context().run(call_comm, kernel, request)


@handles("io")
def comm_info_request(kernel, request):
    wanted = request["content"].get("target_name")
    return {"comms": {id: {"target_name": comm.target_name}
                      for id, comm in list(kernel.comms.comms.items())
                      if wanted in (None, comm.target_name)}}


# ---- 10. Magics: what notebooks say that is not Python -----------------------------------------
#
# `!command`, `x = !command`, `%magic`, `%%magic` and `name?` are no Python: the parser stops at
# such a line, and only there does `translate` look. So text inside strings is never touched. To
# add a magic, write a method `magic_NAME(self, line, cell)`; nothing else changes. Its docstring
# is what `%NAME?` shows; `cell` is None when it was called as a line magic.

ASSIGNED_COMMAND = re.compile(r"^(\s*)(\*?\w[\w., *\[\]\"']*?)\s*=\s*([!%])(?!=)(.*)$", re.S)
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
            translate_behind(lines, at)
    return "\n".join(lines)


def translate_behind(lines, at):
    """Replace the magics that follow the one at line `at`: a line behind a magic begins a
    statement, so there `!` or `%` can only be another."""
    while lines[at + 1:at + 2] and re.match(r"\s*[!%]", lines[at + 1]) \
            and translate_line(lines, at + 1):
        at += 1


def translate_line(lines, at):
    """Replace the magic at line `at`, with the lines that its backslashes continue it on."""
    end = at
    while lines[end].endswith("\\") and end + 1 < len(lines):
        end += 1
    text = "\n".join(lines[at:end + 1])
    call = magic_call(text) or offered("automagic", lines, at)
    if call is None:
        return False
    lines[at:end + 1] = [call] + [""] * (end - at)
    return True


def magic_call(text):
    """The Python for one magic line, or None when it is none."""
    text = text.replace("\\\n", " ")
    if text.strip() == "?":
        return "__shell__.line('quickref', '')"
    if match := re.match(r"\s*%{1,2}([\w.]+)(\?{1,2})\s*$", text):
        return f"__shell__.pinfo('%{match[1]}', {len(match[2])})"
    if match := ASSIGNED_COMMAND.match(text):
        indent, target, kind, rest = match.groups()
        return f"{indent}{target} = {call_of(kind, rest, 'getoutput', indent)}"
    if match := MAGIC_LINE.match(text):
        indent, kind, rest = match.groups()
        if kind == "%" and rest.split(None, 1)[:1] == ["time"]:
            return indent + time_call(rest.strip()[4:].strip(), indent)
        return indent + call_of(kind, rest, "getoutput" if kind == "!!" else "system", indent)
    if (match := HELP_LINE.match(text)) and (match[2] or match[4]):
        return f"{match[1]}__shell__.pinfo({match[3]!r}, {len(match[4] or match[2])})"
    return None


def call_of(kind, rest, shell_method, indent):
    """The call for `!command` or `%magic`. An indented one may stand in a function."""
    mention = mention_of(rest) if indent else ""
    if kind != "%":
        return f"{mention}__shell__.{shell_method}({rest.strip()!r})"
    name, _, line = rest.strip().partition(" ")
    return f"{mention}__shell__.line({name!r}, {line.strip()!r})"


def mention_of(line):
    """Python that mentions the names in a magic's line, and does nothing. An inner function sees
    only those names of the outer one that stand in its code, and text is no code."""
    names = sorted({name for name in WORD.findall(line)
                    if name.isidentifier() and name not in KEYWORDS})
    return f"(lambda: ({', '.join(names)},)) and " if names else ""


def time_call(line, indent):
    """`%time` as Python. In a block its line becomes a statement of the block, which may bind the
    names of a function, await or return. At the top its value is the cell's."""
    if not indent:
        return f"await __shell__.time_cell({line!r})"
    call = f"with __shell__.timed(): {magic_call(line) or line}"
    try:
        compile(call, "<time>", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    except (SyntaxError, ValueError):   # it is a block of its own, or no Python
        call = f"with __shell__.timed(): {mention_of(line)}exec({line!r})"
    return call


def callers_names(namespace):
    """The names that the code around a magic sees: those of its function, over those of its
    module. A cell magic has no code around it, and sees `namespace`, the notebook's."""
    frame = sys._getframe(1)
    runs = [each.run.__code__ for each in (Interpreter, INTERPRETERS["python"])]
    while frame and frame.f_globals is globals() and frame.f_code not in runs:
        frame = frame.f_back
    if frame is None or frame.f_globals is globals():
        return namespace
    at_top = frame.f_locals is frame.f_globals
    return frame.f_globals if at_top else {**frame.f_globals, **frame.f_locals}


def spoken(seconds, precision=3):
    """A duration as a person says it: `1min 5s`, `12.3 ms`."""
    if seconds >= 60:
        parts = []
        for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
            count, seconds = divmod(seconds, size)
            parts += [f"{count:.0f}{unit}"] if count else []
        return " ".join(parts)
    for size, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "μs")):
        if seconds >= size:
            return f"{seconds / size:.{precision}g} {unit}"
    return f"{seconds * 1e9:.{precision}g} ns"


class Timed:
    """`with Timed():` prints how long its body took."""

    def __enter__(self):
        self.cpu, self.wall = os.times(), time.perf_counter()

    def __exit__(self, *error):
        wall, cpu = time.perf_counter() - self.wall, os.times()
        user, system = cpu.user - self.cpu.user, cpu.system - self.cpu.system
        print(f"CPU times: user {spoken(user)}, sys: {spoken(system)}, "
              f"total: {spoken(user + system)}\nWall time: {spoken(wall)}")


class TimeitResult:
    """What `%timeit` has measured, in seconds: `all_runs`, each of so many `loops`, and `timings`,
    those of one loop; with IPython's names."""

    def __init__(self, loops, all_runs, compile_time, precision):
        self.loops, self.repeat, self.all_runs = loops, len(all_runs), all_runs
        self.compile_time, self.precision = compile_time, precision
        self.timings = [seconds / loops for seconds in all_runs]
        self.best, self.worst = min(self.timings), max(self.timings)
        self.average = own("statistics").fmean(self.timings)
        self.stdev = own("statistics").pstdev(self.timings)

    def __str__(self):
        runs, loops = (f"{count:,} {word}{'s' * (count != 1)}" for count, word in
                       ((self.repeat, "run"), (self.loops, "loop")))
        return (f"{spoken(self.average, self.precision)} ± {spoken(self.stdev, self.precision)} "
                f"per loop (mean ± std. dev. of {runs}, {loops} each)")

    def __repr__(self):
        return f"<TimeitResult : {self}>"


class Events:
    """`get_ipython().events` without IPython: functions to be called around a cell."""

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

    def __init__(self, display):
        self.display = display   # not `get_ipython()`'s: IPython may come between cell and show
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
            self.display.publish(msg_type, content)

    show = __call__


QUICK_REFERENCE = """What a cell may have beside Python:

name?           what it is, its signature and its documentation; name?? its source
pr*?            the names that fit a pattern
%lsmagic        the magics; %name? describes one; %% begins a cell for one
%pip install X  a package, into the Python of this kernel
%time f()       how long it takes; %timeit f() many times, on average
%who            your names; %whos with their values; %reset forgets them
!command        a command of the system; lines = !command keeps what it prints
_, __, _5       the last value, the one before, that of cell 5; In and Out have all
;               at the end of a cell mutes its value

A magic needs no % where its line would be no Python: `ls`, `cd data`, `time f()`.
"""


class Magics:
    """The magics of a notebook for which nobody has imported IPython."""

    RICH_CELLS = {"html": "text/html", "HTML": "text/html", "markdown": "text/markdown",
                  "latex": "text/latex", "svg": "image/svg+xml", "SVG": "image/svg+xml",
                  "javascript": "application/javascript", "js": "application/javascript"}
    SCRIPT_CELLS = {name: name for name in ("bash", "sh", "python3", "perl", "ruby", "node")}
    SCRIPT_CELLS["python"] = sys.executable
    CELL_ONLY = ("writefile", "file", "capture", "script")
    VERBATIM = ("time", "timeit")   # their lines are Python, and not to be expanded
    COMMANDS = ("ls", "cat", "cp", "mv", "rm", "mkdir", "rmdir", "man")
    IPYTHONS = ("config", "xmode", "colors", "pylab", "load_ext", "reload_ext")   # if it is there
    timed = Timed

    def __init__(self, interpreter):
        self.interpreter, self.user_ns = interpreter, interpreter.namespace
        self.initial_names = {*self.user_ns}
        self.debugs_errors, self.debugged = False, None   # set by %pdb; the last error shown there
        self.events, self.shell = Events(), None    # IPython's own shell, once it was imported
        interpreter.before_cell.append(self.before_cell)
        interpreter.after_cell.append(self.after_cell)
        builtins.__shell__ = self

    # -- what libraries call --

    def before_cell(self, code):
        self.events.trigger("pre_execute")
        self.events.trigger("pre_run_cell", types.SimpleNamespace(
            raw_cell=code, store_history=True, silent=False, shell_futures=True, cell_id=None))

    def after_cell(self):
        self.events.trigger("post_execute")
        self.events.trigger("post_run_cell", types.SimpleNamespace(
            success=True, result=None, error_in_exec=None))
        error = getattr(sys, "last_value", None)
        if self.debugs_errors and error is not self.debugged:
            self.debugged = error
            self.magic_debug("", None)

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
        if shell := self.shell_for(name):
            return shell.run_line_magic(name, line, _stack_depth=2)   # 2: our caller's variables
        if name in (*self.CELL_ONLY, *self.RICH_CELLS, *self.SCRIPT_CELLS):
            raise TypeError(f"%%{name} is a cell magic: write it in the first line of a cell")
        return self.find(name, "line")(line if name in self.VERBATIM else self.expand(line), None)

    def cell(self, name, line, cell):
        line = line if name in self.VERBATIM else self.expand(line)
        if shell := self.shell_for(name):
            return shell.run_cell_magic(name, line, cell)
        if name in self.RICH_CELLS:
            return self.interpreter.display.publish_display_data({self.RICH_CELLS[name]: cell})
        if name in self.SCRIPT_CELLS:
            return self.magic_script(f"{self.SCRIPT_CELLS[name]} {line}", cell)
        return self.find(name, "cell")(line, cell)

    def shell_for(self, name):
        """IPython's shell, if it runs the cells by now, or if a magic needs it and it is there."""
        if self.shell or name in self.names() and name not in self.IPYTHONS:
            return self.shell
        return offered("ipython_shell", self.interpreter)

    def find(self, name, kind="line"):
        """A magic's function of (line, cell). Raises NameError with the nearest name."""
        if self.shell and (theirs := self.shell.find_magic(name, kind)):
            return theirs
        if name in self.COMMANDS:
            def command(line, cell):
                self.run_visibly(f"{name} {line}")
            command.__doc__ = f"The shell's command `{name}`."
            return command
        if method := getattr(self, f"magic_{name}", None):
            return method
        near = own("difflib").get_close_matches(name, self.names(), 1)
        raise NameError(f"there is no magic %{name}"
                        + (f"; did you mean %{near[0]}? " if near else ". ") + IPYTHON_BRINGS)

    def names(self):
        theirs = self.shell.magics_manager.lsmagic() if self.shell else {}
        return sorted({*(name.removeprefix("magic_") for name in dir(self)
                         if name.startswith("magic_")),
                       *self.RICH_CELLS, *self.SCRIPT_CELLS, *self.COMMANDS,
                       *itertools.chain(*theirs.values())})

    # -- commands of the system --

    def system(self, command):
        """Run a shell command; what it prints comes through descriptors 1 and 2."""
        self.run_command(self.expand(command))

    def run_command(self, command):
        """Run a shell command, filled in already; one that installs packages is `%pip`'s."""
        if not offered("install_instead", command):
            self.run_visibly(command)

    def run_visibly(self, command):
        """Run a shell command, filled in already, and show what it prints."""
        if isinstance(sys.stdout, Stream):
            self.run_shell(command)
        else:   # somebody keeps what is printed: %%capture
            print(self.run_shell(f"({command}\n) 2>&1", keeps_output=True).removesuffix("\n"))

    def getoutput(self, command):
        """Run a shell command and return its lines."""
        return self.run_shell(self.expand(command), keeps_output=True).splitlines()

    def run_shell(self, command, keeps_output=False):
        """Run a shell command; of an interrupt, the traceback shows the user's line alone."""
        subprocess = own("subprocess")
        try:
            done = subprocess.run(command, shell=True, text=True, errors="replace",
                                  stdout=subprocess.PIPE if keeps_output else None)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None
        self.user_ns["_exit_code"] = done.returncode
        return done.stdout

    def expand(self, command):
        """`command` with {expression} and $name replaced by their values, where they have one."""
        names = callers_names(self.user_ns)

        def value(match):
            if match[0] in ("{{", "}}", "$$"):
                return match[0][0]
            expression = match[1] or match[2]
            if expression.isidentifier() and expression not in names:
                return match[0]       # shell syntax, such as $HOME or awk's {print}
            for text in (expression, f"f\"\"\"{{{expression}}}\"\"\""):   # that knows {x:.2f}, too
                with contextlib.suppress(Exception):
                    return str(eval(text, names))
            return match[0]

        return re.sub(r"\{\{|\}\}|\$\$|(?<![$\\])\{([^{}\n]+)\}|(?<!\\)\$([A-Za-z_]\w*)",
                      value, command)

    def magic_script(self, line, cell):
        """Run the cell with a program: `%%script [--out NAME] [--err NAME] [--no-raise-error]
        PROGRAM [ARGUMENTS]`; its output or errors go into a variable of that name."""
        words, subprocess = own("shlex").split(line), own("subprocess")
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
        command = line if cell is None else self.expand(cell)
        return self.run_shell(command, keeps_output=True).splitlines()

    magic_sx = magic_system

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
            os.environ[name.strip()] = value.strip()
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
            value = (self.find(name.strip("%")) if name[0] == "%" else
                     eval(name, callers_names(self.user_ns)))
        except Exception:
            return print(f"Object `{name}` not found.")
        self.page(offered("describe", name, value, detail - 1) or repr(value))

    def page(self, text):
        """Show text in the frontend's pager."""
        self.interpreter.payload.append(
            {"source": "page", "data": {"text/plain": text}, "start": 0})

    def magic_quickref(self, line, cell):
        """What can be written in a cell beside Python: the same as `?`."""
        self.page(QUICK_REFERENCE)

    def magic_pinfo(self, line, cell):
        """Describe an object: the same as `NAME?`."""
        self.pinfo(line, 1)

    def magic_lsmagic(self, line, cell):
        """List the magics."""
        cells = {*self.CELL_ONLY, *self.RICH_CELLS, *self.SCRIPT_CELLS}
        print("Line magics: " + "  ".join(f"%{n}" for n in self.names() if n not in cells))
        print("Cell magics: " + "  ".join(f"%%{n}" for n in sorted(cells | {"time", "timeit"})))

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
        with Timed():
            return await self.interpreter.run_source(cell)

    def magic_time(self, line, cell):
        """Time one statement (`%time x = f()`) or a whole cell (`%%time`)."""
        if cell is not None:
            return self.time_cell(f"{line}\n{cell}")
        with Timed():
            return finished(self.interpreter.run_source(line, callers_names(self.user_ns)))

    def magic_timeit(self, line, cell):
        """Time code over many runs: `%timeit [-n LOOPS] [-r RUNS] [-p DIGITS] [-t | -c] [-q]
        [-o | -v NAME] code`; -t and -c choose the clock (the day's, the processor's), -q prints
        nothing, -o returns the result, -v names it. The line of `%%timeit` prepares each run."""
        timeit, names = own("timeit"), callers_names(self.user_ns)
        options, words = own("getopt").getopt(line.split(" "), "n:r:p:v:tcqo")
        options, code, setup = dict(options), translate(" ".join(words)) or "pass", "pass"
        if cell is not None:
            code, setup = translate(cell), code
        clock = time.process_time if "-c" in options else time.time if "-t" in options \
            else time.perf_counter
        started = time.process_time()
        timer = timeit.Timer(code, setup, clock, names)
        compile_time = time.process_time() - started
        loops = int(options.get("-n", 0)) or timer.autorange()[0]
        result = TimeitResult(loops, timer.repeat(int(options.get("-r", 7)), loops),
                              compile_time, int(options.get("-p", 3)))
        if "-q" not in options:
            print(result)
        if "-v" in options:
            self.user_ns[options["-v"]] = result
        return result if "-o" in options else None

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
            text = offered("source_of", eval(line, self.user_ns)) or ""
        self.set_next_input(f"# %load {line}\n{text}", replace=True)

    def magic_run(self, line, cell):
        """Run a Python file as a program and keep its names: `%run [-i] FILE [ARGUMENTS]`."""
        words = own("shlex").split(line)
        shares, (path, *arguments) = words[0] == "-i", words[words[0] == "-i":]
        path = os.path.expanduser(path if os.path.exists(path) else f"{path}.py")
        with open(path, "rb") as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
        module = types.ModuleType("__main__")
        module.__file__, module.__builtins__ = path, builtins
        names = self.user_ns if shares else vars(module)
        saved, main, folder = sys.argv[:], sys.modules["__main__"], os.path.dirname(path)
        sys.argv[:] = [path, *arguments]
        sys.path.insert(0, os.path.abspath(folder))   # where a program's own modules are
        if not shares:
            sys.modules["__main__"] = module
        try:
            exec(code, names)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
        finally:
            sys.argv[:], sys.modules["__main__"] = saved, main
            with contextlib.suppress(ValueError):   # the program has taken it out
                sys.path.remove(os.path.abspath(folder))
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
        captured = Captured(self.interpreter.display)
        for name in [word for word in line.split() if not word.startswith("--")]:
            self.user_ns[name] = captured
        hidden = [kind for kind in ("stdout", "stderr", "display") if f"--no-{kind}" not in line]
        return self.capture(cell, captured, hidden)

    def magic_debug(self, line, cell):
        """Look around where the last error was raised, with Python's debugger."""
        if getattr(sys, "last_traceback", None) is None:
            return print("There is no error to debug.")
        one = own("pdb").Pdb()
        one.reset()
        one.interaction(None, sys.last_traceback)

    def magic_pdb(self, line, cell):
        """Open the debugger after each error: `%pdb on`, `%pdb off`, or the other of the two."""
        self.debugs_errors = {"on": True, "1": True, "off": False, "0": False}.get(
            line.strip().lower(), not self.debugs_errors)
        self.debugged = getattr(sys, "last_value", None)
        print(f"Automatic pdb calling has been turned {'ON' if self.debugs_errors else 'OFF'}")

    def magic_reset(self, line, cell):
        """Forget the notebook's names: `%reset [-f] [out]`; without -f it asks."""
        if "-f" not in line and builtins.input("Forget all names of the notebook (y/[n])? ") != "y":
            return
        self.interpreter.outputs.clear()
        for name in list(self.user_ns):
            is_result = re.fullmatch(r"_\d*|__|___", name) is not None
            if is_result or "out" not in line.split() and name not in self.initial_names:
                del self.user_ns[name]
        self.interpreter.forget_unders()

    def magic_load_ext(self, line, cell):
        """Load an IPython extension: only `autoreload`, which is one of ours, without IPython."""
        if line != "autoreload":
            raise ImportError(f"the extension {line} needs IPython. {IPYTHON_BRINGS}")

    magic_reload_ext = magic_load_ext

    def magic_autoreload(self, line, cell):
        """Import changed modules anew before each cell: `%autoreload 2`; 0 ends it."""
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
        """Figures are always shown inline here; every other backend is IPython's affair."""
        if line.strip() not in ("", "inline"):
            if shell := offered("ipython_shell", self.interpreter):
                return shell.run_line_magic("matplotlib", line)
            raise ImportError(f"figures are shown inline here. {IPYTHON_BRINGS}")

    def magic_autosave(self, line, cell):
        """Accepted: what it set is the frontend's."""

    magic_config = magic_xmode = magic_colors = magic_autosave


def finished(coroutine):
    """The result of a coroutine that never waits; raises SyntaxError when it does."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    coroutine.close()
    raise SyntaxError("a line magic cannot await; use %%time for the whole cell")


def tame_debugger(pdb, kernel):
    """Called when pdb has been imported: every debugger of it fits into a kernel.

    An interrupt ends it, and the kernel keeps its handler of SIGINT. It never stops in the
    kernel's own code: a step out of the cell is the cell's end.
    """
    run = type(kernel.interpreter).run.__code__

    class Debugger(pdb.Pdb):
        def __init__(self, *args, **options):
            super().__init__(*args, **{**options, "nosigint": True})

        def _cmdloop(self):   # pdb's own asks anew after an interrupt
            self.cmdloop()

        def stop_here(self, frame):
            if frame.f_code is run:
                self.set_continue()
            return frame.f_code.co_filename != __file__ and super().stop_here(frame)

    pdb.Pdb, hook = Debugger, threading.excepthook
    sys.modules["threading"].excepthook = lambda args: has_quit(args.exc_value) or hook(args)


def has_quit(error):
    """Is this the end of a debugger that was told to quit? Then there is nothing to show."""
    return class_name(error) == "BdbQuit" and type(error).__module__ == "bdb"


def breakpoint_here(*args, **options):
    """What `breakpoint()` calls."""
    own("pdb").Pdb().set_trace(sys._getframe(1))


def complete_magic(before, line, namespace, magics):
    match = re.match(r"\s*((%{1,2})\w*)$", line)
    return (match[1], [([match[2] + name for name in magics], "magic")]) if match else None


def complete_symbol(before, line, namespace, magics):
    """`\\al`: the names of letters that begin so; a whole one becomes its letter."""
    match = SYMBOL_END.search(line)
    begun = ["\\" + name for name in symbols() if name.startswith(match[1])] if match else []
    return (match[0], [(begun, "symbol")]) if begun else None


def symbols():
    """{LaTeX's name: what may stand in a Python name}; HTML has most of these under that name."""
    letters = {name[:-1]: letter for name, letter in own("html.entities").html5.items()
               if name[-1] == ";" and letter.isidentifier() and not letter.isascii()}
    return {**letters, **LATEX_LETTERS}


def letter_called(name):
    """The letter of this name in Unicode, "GREEK SMALL LETTER ALPHA", if a Python name may have
    it; else None."""
    try:
        letter = own("unicodedata").lookup(name)
    except KeyError:
        return None
    return letter if f"a{letter}".isidentifier() else None


@EXTRAS.append
def have_magics(kernel):
    sys.breakpointhook = breakpoint_here
    if hasattr(kernel.interpreter, "magics"):
        kernel.interpreter.magics = Magics(kernel.interpreter)


TRANSLATORS.append(translate)
OFFERS["has_quit"], AFTER_IMPORT["pdb"] = has_quit, tame_debugger
COMPLETERS.append(complete_magic)


# ---- 11. Questions about code: complete, inspect, is_complete ----------------------------------
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
KEY_END = re.compile(   # d[   d["ab   d[1, "ab   df.loc[rows, "ab   df[["one", "ab
    r"(?<![\w.])(?P<of>[^\W\d][\w.]*?)(?:\.loc)?\[(?:[^\]]*\[)?(?P<earlier>[^\[\]]*,\s*)?"
    r"(?:(?P<prefix>\w{0,2})(?P<quote>[\"'])(?P<typed>[^\"'\]]*)|(?P<bare>[\w.]*))$")
STRING = re.compile(   # one that no quote ends has an empty `end`
    r"#.*|(?P<prefix>(?:\b[a-zA-Z]{1,2})?)(?P<quote>'{3}|\"{3}|['\"])"
    r"(?P<text>(?:\\.|(?!(?P=quote)).)*)(?P<end>(?P=quote)|$)")
FIELD_END = re.compile(r"\{([^{}]*)$")
SYMBOL_END = re.compile(r"\\([A-Za-z]{2,})$")
UNICODE_END = re.compile(r"\\([A-Z][A-Z0-9 -]+)$")
LATEX_LETTERS = {   # which HTML has under another name or not at all; the last ones go on a letter
    "epsilon": "ϵ", "varepsilon": "ε", "phi": "ϕ", "varphi": "φ", "hbar": "ħ", "hat": "\u0302",
    "bar": "\u0304", "dot": "\u0307", "ddot": "\u0308", "tilde": "\u0303", "vec": "\u20d7"}
SHELL_END = re.compile(r"\s*(?:[\w., ]+=\s*)?"
                       r"(?:!|%{1,2}(?:cat|cd|cp|load|ls|mkdir|mv|rm|run|writefile)\s)"
                       r"(?:.*\s)?(\S*)$")
MOST_MATCHES = 1_000
MOST_CHAIN = 1_000    # characters before the cursor in which a dotted name is looked for
MOST_OPEN = 20        # lines before the cursor that may be begun and not whole
MOST_KEYS = 100_000   # of a dictionary that are looked at
MOST_CALL = 10_000    # characters before the cursor in which an open call is looked for
MOST_SHOWN = 100      # items of a container whose text is shown; characters at either end of it
OPEN_LIBRARIES = {"numpy", "pandas", "polars"}
SAFE_TYPES = (int, float, complex, str, bytes, bool, type(None))
NOT_THERE = object()
QUESTION_SECONDS = 2   # for an answer; then the frontend is told that there is none
KEYWORDS = {*keyword.kwlist}
NEWLINE = "\n"         # no backslash may stand in the braces of an f-string before Python 3.12
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType,
             types.MethodDescriptorType)
LITERALS = {list: (ast.List, ast.ListComp), dict: (ast.Dict, ast.DictComp), tuple: ast.Tuple,
            set: (ast.Set, ast.SetComp), str: ast.JoinedStr}


def is_complete(code):
    """(status, indent) for a console that asks whether Enter should run the cell.

    `complete`, `invalid`, or `incomplete` with the indentation of the next line. An empty line
    ends a block, and the cell of a magic.
    """
    lines, codeop, warnings = code.split("\n"), own("codeop"), own("warnings")
    if code.startswith("%%"):
        return ("complete" if code.endswith("\n\n") else "incomplete"), ""
    if lines[-1].endswith("\\") and MAGIC_LINE.match(lines[-1]):
        return "incomplete", ""
    compiler, source = codeop.CommandCompiler(), translate(code)
    compiler.compiler.flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            end = "\n" * (not source.endswith("\\"))
            is_whole = compiler(source + end, "<is_complete>", "exec") is not None
    except (SyntaxError, OverflowError, ValueError):
        return "invalid", ""
    if is_whole and not (lines[-1].strip() and ends_in_block(source)):
        return "complete", ""
    last = lines[-1]
    colon = "    " if last.rstrip().endswith(":") else ""
    return "incomplete", last[:len(last) - len(last.lstrip())] + colon


def ends_in_block(source):
    """Does this program end with an indented line, after which its block may go on?"""
    tokenize = own("tokenize")
    *_, last, _ = tokenize.generate_tokens(io.StringIO(source).readline)
    return last.type == tokenize.DEDENT


def is_a(value, cls):
    """isinstance, but without asking the object, whose `__class__` may be code of the user's."""
    return issubclass(type(value), cls)


def all_classes(value):
    """The classes in which an attribute of `value` is looked up."""
    bases = type.__dict__["__mro__"].__get__(value) if is_a(value, type) else ()
    return bases + type(value).__mro__


def static_attribute(value, name):
    """`value.name` without running anybody's code: NOT_THERE for properties and the like."""
    if is_a(value, types.ModuleType):
        return vars(value).get(name, NOT_THERE)
    found = instance_names(value).get(name, NOT_THERE)
    if found is not NOT_THERE:
        return found
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
    """(matches, start, kinds): what may stand from `start` to the cursor; kinds are for people.

    Each finder looks at the text before the cursor. It returns None when another one has to look,
    or (typed, [(names, kind), …]): the part of a name that has been typed, and groups of names in
    the order in which they are shown. `kind` is a string, or a function of the name.
    """
    before = code[:cursor]
    line = before.rpartition("\n")[2][-MOST_CHAIN:]   # the patterns below are slow on long lines
    match = SYMBOL_END.search(line) or UNICODE_END.search(line)
    letter = match and (symbols().get(match[1]) or letter_called(match[1]))
    if letter:
        return [letter], cursor - len(match[0]), ["symbol"]
    for find in (complete_magic, complete_symbol, complete_import, complete_key, complete_path,
                 complete_name):
        found = find(before, line, namespace, magics)
        if found is not None:
            break
    typed, groups = found
    kinds = {}   # match -> kind
    for names, kind in groups:
        for name in first_names(names, typed):
            kinds.setdefault(name, kind(name) if callable(kind) else kind)
    matches = [*kinds][:MOST_MATCHES]
    return matches, cursor - len(typed), [kinds[name] for name in matches]


def first_names(names, typed):
    """The first MOST_MATCHES names that begin with what was typed, sorted; private ones when they
    are asked for or nothing else is there."""
    # `globals()` may have other keys than text.
    names = [name for name in names if type(name) is str and name.startswith(typed)]
    if not typed:
        names = [name for name in names if name[:1] != "_"] or names
    return sorted(names[:MOST_MATCHES], key=lambda name: (name[:1] == "_", name.lower(), name))


def complete_import(before, line, namespace, magics):
    match = IMPORT_LINE.match(line)
    if not match:
        return None
    package, typed = match.groups()
    if package:                                         # from package import typed
        names = vars(sys.modules[package]) if package in sys.modules else {}
        return typed, [([*names], lambda name: kind_of(names[name])),
                       (submodules(package), "module")]
    parent, _, last = typed.rpartition(".")             # import parent.last
    names = submodules(parent) if parent else [*sys.stdlib_module_names, *submodules("")]
    names += [name for name, value in vars(sys.modules.get(parent, ast)).items()
              if parent in sys.modules and is_a(value, types.ModuleType)]
    return last, [(names, "module")]


def submodules(package):
    """Names of the modules in a package that is loaded, or of all top-level ones."""
    return modules_in(getattr(sys.modules.get(package), "__path__", []) if package else sys.path)


def modules_in(path):
    """Names of the modules in these folders; loads nothing."""
    return [module.name for module in own("pkgutil").iter_modules([entry or "." for entry in path])]


def complete_key(before, line, namespace, magics):
    """`d["ab`, `d[` and `d[1, `: the keys of a dictionary, or what a library offers as keys."""
    match = KEY_END.search(line)
    if not match:
        return None
    earlier, typed = literal_tuple(match["earlier"]), match["typed"] or match["bare"] or ""
    if not match["quote"] and (open_text(line) is not None or match["earlier"] and not earlier):
        return None
    value = resolve(match["of"], namespace)
    keys = parts_of_keys(list(itertools.islice(keys_of(value), MOST_KEYS)),
                         earlier if is_a(value, dict) else ())
    if match["quote"]:
        kind = bytes if "b" in match["prefix"].lower() else str
        names = [quoted(key, match["quote"]) for key in keys if type(key) is kind]
        return typed, [(names, "key")]
    names = [repr(key) for key in keys if type(key) in (str, bytes, int, float)]
    if not any(name.startswith(typed) for name in names):
        return None
    others = [] if typed else complete_name(before, line, namespace, magics)[1]
    return typed, [(names, "key"), *others]


def keys_of(value):
    """The keys of a dictionary, or those that a library offers; a user's class is not asked."""
    if is_a(value, dict):
        return list(dict.keys(value))
    if type(value).__module__ == "__main__":
        return ()
    if is_a(value, collections.abc.Mapping):
        return list(value)
    offer = getattr(type(value), "_ipython_key_completions_", None)
    if not offer and is_open(value):
        offer = getattr(type(value), "keys", None)
    return offer(value) if callable(offer) else ()


def parts_of_keys(keys, earlier):
    """The keys, of tuples their first item; or the next items of those that begin as `earlier`."""
    size = len(earlier)
    return [key[size] if type(key) is tuple else key for key in keys if
            (type(key) is tuple and len(key) > size and key[:size] == earlier) or
            (type(key) is not tuple and not earlier)]


def literal_tuple(text):
    """`1, "a", ` as a tuple; empty where it is none."""
    try:
        return ast.literal_eval(f"({text})") if text else ()
    except (SyntaxError, ValueError):
        return ()


def quoted(key, quote):
    """A key as it is written between quotes of this kind."""
    text = repr(key)[2:-1] if is_a(key, bytes) else repr('"' + key)[2:-1]
    return text if quote == "'" else text.replace("\\'", "'").replace('"', '\\"')


def complete_path(before, line, namespace, magics):
    """Inside a string, or in a line for the shell: the files that its text may name."""
    text = open_text(line)
    if text is None and (match := SHELL_END.match(line)):
        text = match[1]
    if text is None:
        return None
    folder, slash, typed = text.rpartition("/")
    try:
        entries = list(os.scandir(os.path.expanduser(folder + slash or ".")))
    except OSError:
        return typed, []
    return typed, [([entry.name + "/" * entry.is_dir() for entry in entries], "path")]


def open_text(line):
    """The text of the string in which the line ends, or None. An f-string has code in it, which
    may have strings of its own."""
    match = next((match for match in STRING.finditer(line) if match["end"] == ""), None)
    if not match:
        return None
    is_formatted = "f" in match["prefix"].lower()
    field = is_formatted and FIELD_END.search(match["text"].replace("{{", ""))
    return open_text(field[1]) if field else match["text"]


def complete_name(before, line, namespace, magics):
    chain = chain_before(before)
    owner, dot, typed = chain.rpartition(".")
    typed = typed.strip()
    if before[:len(before) - len(chain)].rstrip()[-1:] == "." or re.search(r"\d\.$", before[-9:]):
        return typed, []   # an attribute of what only running the code could tell
    if not chain and before[-1:] in {*")]}'\""}:
        return typed, []   # nothing begins here
    if dot:
        value = resolve(owner, namespace)
        if value is NOT_THERE:
            value = resolve(owner, foreseen(before, namespace))
        if value is NOT_THERE:
            return typed, []
        return typed, [(attribute_names(value),
                        lambda name: kind_of(static_attribute(value, name)))]
    said = {*WORD.findall(before[:-len(typed) or None])}   # in the cell's text

    def kind(name):
        if name in KEYWORDS:
            return "keyword"
        value = namespace.get(name, vars(builtins).get(name, NOT_THERE))
        return "statement" if value is NOT_THERE else kind_of(value)

    return typed, [([f"{name}=" for name in parameters_at(before, namespace)], "param"),
                   ([*KEYWORDS, *vars(builtins), *said, *reversed([*namespace])], kind)]


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
        whole = lines[end].rpartition(";")[0] or indent + "pass"   # `import os; os.`
        text = translated("\n".join([*lines[:end], whole]))
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
            value = value_like(node.value, collections.ChainMap(found, namespace))
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
    depth, before = 0, before[-MOST_CALL:]
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
    """What `name?` shows: signature, type, docstring; with `detail` the source. Labels and their
    order are IPython's."""
    is_definition = is_a(value, (type, *FUNCTIONS))
    kind = ("Type", type(value).__name__)
    rows = [("Init signature" if is_a(value, type) else "Signature", signature_text(name, value))]
    if not is_definition:
        rows += [kind, ("String form", string_form(value))]
    if type(value) in (*BRACKETS, str, bytes):
        rows.append(("Length", str(len(value))))
    source = source_of(value) if detail and type(value) not in SAFE_TYPES else None
    rows += [("Source", source)] if source else docstrings(value)
    with contextlib.suppress(TypeError, OSError):
        rows.append(("File", CELL_FILE.sub(r"Cell In[\1]", own("inspect").getfile(value))))
    rows += [kind] if is_definition else []
    rows = [(f"{label}:", text) for label, text in rows if text is not None]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{RED}{label:<{width}}{RESET}{NEWLINE if NEWLINE in text else ' '}{text}"
                     for label, text in rows)


def docstrings(value):
    """The docstring, and those of how it is made and called: [(label, text), …]."""
    inspect = own("inspect")
    function = value.__func__ if is_a(value, types.MethodType) else value
    rows = [("Docstring", inspect.getdoc(function) or "<no docstring>")]
    if is_a(value, FUNCTIONS):
        return rows
    methods = [("Init docstring", value if is_a(value, type) else type(value), "__init__")]
    if not is_a(value, type):
        methods.append(("Call docstring", value, "__call__"))
    for label, owner, name in methods:
        method = static_attribute(owner, name)
        if is_a(method, (types.FunctionType, types.MethodType)) and method.__doc__:
            rows.append((label, inspect.cleandoc(method.__doc__)))
    return rows


def signature_text(name, value):
    """`name(a, b=1)`, or None. An object's `__call__` is looked up without asking the object."""
    if name[0] == "%":
        return None
    if not is_a(value, (type, *FUNCTIONS)) and type(value).__module__ == "__main__":
        value = static_attribute(value, "__call__")
    with contextlib.suppress(Exception):   # built in without one; a library may raise anything
        return f"{name}{safe_signature(value)}" if callable(value) else None


def string_form(value):
    """str(value) where that runs no code of the user's, or None; its middle is left out."""
    try:
        if is_plain(value) or is_a(value, types.ModuleType):
            text = str(value)
        elif type(value).__repr__ is object.__repr__ and type(value).__str__ is object.__str__:
            text = object.__repr__(value)
        else:
            return None
    except ValueError:   # a number of more digits than Python likes to write
        return None
    is_long = len(text) > 2 * MOST_SHOWN
    return f"{text[:MOST_SHOWN]} <...> {text[-MOST_SHOWN:]}" if is_long else text


def is_plain(value):
    """Is this of Python's own types, and what it holds, too?"""
    if type(value) not in BRACKETS:
        return type(value) in SAFE_TYPES
    items = [*value, *value.values()] if type(value) is dict else value
    return len(items) <= MOST_SHOWN and all(type(item) in SAFE_TYPES for item in items)


class Hidden:
    """Stands in a signature for a default that is not shown."""

    def __repr__(self):
        return "…"


def safe_signature(function):
    """A signature that shows plain defaults only: others have a `__repr__` of the user's."""
    signature = own("inspect").signature(function)
    return signature.replace(parameters=[
        p if type(p.default) in SAFE_TYPES or p.default is p.empty else p.replace(default=Hidden())
        for p in signature.parameters.values()])


def source_of(value):
    """The source of a function, class or module, or None. A cell's class is found in its cell."""
    inspect = own("inspect")
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


# -- the helper thread --

def translated(code):
    """`code` as Python: see TRANSLATORS."""
    for translate_source in TRANSLATORS:
        code = translate_source(code)
    return code


@EXTRAS.append
def have_helper(kernel):
    answer_in_thread(kernel, "helper")


def in_time(handler):
    """The handler, but it raises TimeoutError when the answer takes too long. A library's `__dir__`
    may hang: its thread is left alone, and the next question gets a new one. (While C code holds
    the interpreter's lock, nobody can answer anything.)"""
    @functools.wraps(handler)
    def handle(kernel, request):
        outcome = queue.SimpleQueue()

        def work():
            HERE.imports = 1
            try:
                outcome.put((handler(kernel, request), None))
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

    return handle


def answer_of(kernel, question, *arguments):
    """The interpreter's own answer, or, since it is Python's, one of ours."""
    interpreter = kernel.interpreter
    own_answer = getattr(interpreter, question, None)
    return own_answer(*arguments) if own_answer else ANSWERS[question](interpreter, *arguments)


def cursor_of(content):
    """cursor_pos, or the end of the code; never outside of it."""
    return min(max(0, content.get("cursor_pos", len(content["code"]))), len(content["code"]))


@handles("helper")
@in_time
def is_complete_request(kernel, request):
    """Its `status` is the answer, not ok or error."""
    return answer_of(kernel, "is_complete", request["content"]["code"])


@handles("helper")
@in_time
def complete_request(kernel, request):
    content = request["content"]
    return answer_of(kernel, "complete", content["code"], cursor_of(content))


@handles("helper")
@in_time
def inspect_request(kernel, request):
    content = request["content"]
    return answer_of(kernel, "inspect", content["code"], cursor_of(content),
                     content.get("detail_level", 0))


def answer_is_complete(interpreter, code):
    status, indent = is_complete(code)
    return {"status": status, **({"indent": indent} if status == "incomplete" else {})}


def answer_complete(interpreter, code, cursor):
    """The content of a complete_reply, with the types that JupyterLab shows."""
    magics = interpreter.magics.names() if interpreter.magics else ()
    matches, start, kinds = complete(code, cursor, interpreter.namespace, magics)
    types_ = [{"start": start, "end": cursor, "text": name, "type": kind, "signature": ""}
              for name, kind in zip(matches, kinds, strict=True)]
    return {"matches": matches, "cursor_start": start, "cursor_end": cursor,
            "metadata": {"_jupyter_types_experimental": types_}}


def answer_inspect(interpreter, code, cursor, detail):
    """The content of an inspect_reply."""
    value = NOT_THERE
    if magic := MAGIC_END.search(code[:cursor] + re.match(r"\w*", code[cursor:])[0]):
        name = magic[0].strip()
        with contextlib.suppress(NameError, AttributeError):
            value = interpreter.magics.find(name.strip("%"))
    elif name := name_at(code, cursor):
        value = resolve(name, interpreter.namespace)
    if value is NOT_THERE:
        return {"found": False, "data": {}, "metadata": {}}
    return {"found": True, "data": {"text/plain": describe(name, value, detail)}, "metadata": {}}


ANSWERS = {"is_complete": answer_is_complete, "complete": answer_complete,
           "inspect": answer_inspect}
OFFERS.update(describe=describe, source_of=source_of)


# ---- 12. IPython.display in small --------------------------------------------------------------
#
# `from IPython.display import …` stands in a quarter of all notebooks. When IPython is missing,
# these take its place; text and bytes of one MIME type each, and the functions that show them.

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


def fill_display(module, kernel):
    """Make a stand-in for IPython.display, or for one of the modules that it came from."""
    vars(module).update(ipython_display(kernel.interpreter.display))


def fill_ipython(module, kernel):
    """Make a stand-in for IPython, or for one of the modules that libraries ask where they run."""
    get_ipython = getattr(builtins, "get_ipython", lambda: None)
    vars(module).update(
        get_ipython=get_ipython, InteractiveShell=type(get_ipython()), version_info=(9, 0, 0),
        __version__="9.0.0", display=kernel.interpreter.display.display,
        TerminalInteractiveShell=type("TerminalInteractiveShell", (), {}))


STAND_INS.update({
    "IPython": fill_ipython, "IPython.core": fill_display, "IPython.display": fill_display,
    "IPython.core.display": fill_display, "IPython.core.getipython": fill_ipython,
    "IPython.core.interactiveshell": fill_ipython, "IPython.terminal": fill_ipython,
    "IPython.terminal.interactiveshell": fill_ipython})


# ---- 13. IPython: once there, it is the interpreter --------------------------------------------
# Nobody imports IPython at the start. When the user, a library, an unknown magic, `%load_ext` or an
# attribute of `get_ipython()` does, IPython's own shell runs all later cells: traits, events,
# extensions, history and transformers are then IPython's, not imitated. The switch is the class of
# the one interpreter object, so that no reference to it grows stale. The shell takes over our
# namespace, In, Out, counter and hooks, and asks us to show results, displays and errors, to run
# `!commands` and to keep payloads. The cell that brings IPython was begun by our own `run`, and
# ends there.

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


def ipython_shell(interpreter):
    """IPython's shell, which runs the cells from now on; None where IPython is not installed."""
    if "IPython" not in sys.modules and \
            importlib.machinery.PathFinder.find_spec("IPython", PYTHON_PATH):
        own("IPython")   # its hook is let_ipython_interpret
    return interpreter.magics.shell


class Shell:
    """What `get_ipython()` answers before IPython is there: the little that needs no IPython. To
    ask for anything else, or to set anything, imports it; all then goes to its shell."""

    # rich, plotly and others look at this name to learn whether they run in a notebook.
    __qualname__, __module__ = "ZMQInteractiveShell", "ipykernel.zmqshell"

    def __init__(self, interpreter):
        type(self).__name__ = type(self).__qualname__
        magics, kernel = interpreter.magics, ShellKernel(interpreter)
        vars(self).update(   # `__setattr__` is IPython's
            _interpreter=interpreter, user_ns=interpreter.namespace, kernel=kernel,
            get_parent=kernel.get_parent, run_line_magic=magics.line, run_cell_magic=magics.cell,
            system=magics.system, getoutput=magics.getoutput, ev=magics.ev, push=magics.push,
            set_next_input=magics.set_next_input)

    parent_header = property(lambda self: self.get_parent())

    def without_ipython(self):
        """What libraries ask for even where there is no IPython."""
        magics = self._interpreter.magics
        return {"events": magics.events, "config": {"IPKernelApp": {}}, "colors": "nocolor",
                "run_cell": magics.run_cell, "enable_gui": lambda gui=None: None,
                "register_magic_function": magics.register_magic_function,
                "display_formatter": types.SimpleNamespace(formatters={
                    mime: TypeFormatter(mime) for mime in ("text/plain", *REPR_METHODS.values())})}

    def __getattr__(self, name):
        if "_interpreter" not in vars(self):   # it is being copied
            raise AttributeError(name)
        shell = self._interpreter.magics.shell
        if shell is None and name.startswith("_"):   # `_repr_html_`, `__wrapped__`: only a probe
            raise AttributeError(name)
        if shell := shell or ipython_shell(self._interpreter):
            return getattr(shell, name)
        if name in (known := self.without_ipython()):
            return known[name]
        raise AttributeError(f"there is no get_ipython().{name} here. {IPYTHON_BRINGS}")

    def __setattr__(self, name, value):
        shell = ipython_shell(self._interpreter)
        if shell is None:
            raise AttributeError(f"get_ipython().{name} has no effect here. {IPYTHON_BRINGS}")
        setattr(shell, name, value)


class ShellKernel:
    """`get_ipython().kernel`: what libraries ask of ipykernel's kernel."""

    def __init__(self, interpreter):
        self.interpreter = interpreter
        self.comm_manager = getattr(interpreter.kernel, "comms", None)

    shell = property(lambda self: builtins.get_ipython())
    session = property(lambda self: self.interpreter.kernel.session)
    _parent_header = property(lambda self: self.get_parent())

    def get_parent(self, channel="shell"):
        """The message that this thread works for, as ipykernel keeps it."""
        kernel = self.interpreter.kernel
        header = kernel.outbox.parent_header()
        request = kernel.request.get(kernel.latest) or {"header": {}}
        if header is not request["header"]:   # a comm message's, of which no more is kept
            request = {}
        return {"parent_header": {}, "metadata": {}, "content": {}, "buffers": [], **request,
                "header": header, "msg_id": header.get("msg_id"),
                "msg_type": header.get("msg_type")}

    def do_shutdown(self, restart):
        """End when the cell is done; a server that has started us starts us anew."""
        offered("leave", self.interpreter.kernel)
        return {"status": "ok", "restart": restart}


class IPythonInterpreter(INTERPRETERS["python"]):
    """The interpreter after IPython was imported: its shell runs the cells.

    Our `fail` is for errors that the shell has not seen: those of the cell that brought IPython,
    and an interrupt between two pieces of the user's code.
    """

    shell = property(lambda self: self.magics.shell)
    execution_count = property(   # IPython counts the cell to come
        lambda self: self.shell.execution_count - 1,
        lambda self, count: setattr(self.shell, "execution_count", count + 1))
    payload = property(
        lambda self: self.shell.payload_manager.read_payload(),
        lambda self, payload: self.shell.payload_manager.clear_payload())

    async def execute(self, code, *, store_history=True, silent=False, user_expressions=(),
                      was_interrupted=lambda: False):
        """Run a cell; returns the content of its `execute_reply`."""
        self.code, self.stores, self.was_interrupted = code, store_history, was_interrupted
        self.payload, self.traceback, self.display_error, self.first = [], [], None, None
        self.count.set(self.execution_count)
        try:
            error = await self.run_cell(code, silent)
            self.finish_cell()
            reply = self.failure(error) if error is not None else {
                "status": "ok", "user_expressions": {
                    name: self.evaluate(user_expressions[name]) for name in user_expressions}}
        except BaseException as error:
            reply = self.fail(self.as_interrupt(error))
        return {**reply, "payload": list(self.payload), "execution_count": self.count.get()}

    async def run_cell(self, code, is_silent):
        """Run a cell in the shell, which shows its error; returns that, None when all went well.

        The user's code runs inside this frame: `Kernel.interrupt` looks for it.
        """
        shell, result = self.shell, None
        if self.was_interrupted():
            raise KeyboardInterrupt
        try:
            cell = {"transformed_cell": shell.transform_cell(code)}
        except Exception:   # a magic that makes no sense: the shell shows why
            cell = {"transformed_cell": code, "preprocessing_exc_tuple": sys.exc_info()}
        if self.stores:
            shell.execution_count = self.count.get()   # it counts up itself
        is_replaced = "run_cell" in vars(shell)   # as by %autopx of ipyparallel
        if is_replaced and not shell.should_run_async(code, **cell):
            result = shell.run_cell(code, self.stores, is_silent, **self.about_cell())
        else:
            try:
                result = await shell.run_cell_async(code, self.stores, is_silent, **cell,
                                                    **self.about_cell())
                result.error_in_exec = self.as_interrupt(result.error_in_exec)
            finally:   # what IPython leaves to its caller
                shell.events.trigger("post_execute")
                if not is_silent:
                    shell.events.trigger("post_run_cell", result)
        problems = (result.error_before_exec, result.error_in_exec, self.display_error)
        return next((error for error in problems if error is not None), None)

    def about_cell(self):
        """What callbacks are told about the cell beside its code; later versions know more."""
        known = own("inspect").signature(self.shell.run_cell_async).parameters
        metadata = self.shell.get_parent()["metadata"]
        about = {"cell_id": metadata.get("cellId"), "cell_meta": metadata}
        return {name: about[name] for name in about if name in known}

    def as_interrupt(self, error):
        """`error`, or a KeyboardInterrupt where an interrupt has cancelled what the cell awaits."""
        if type(error).__name__ == "CancelledError" and self.was_interrupted():
            return KeyboardInterrupt().with_traceback(error.__traceback__)
        return error

    def users_frames(self):
        return [*super().users_frames(), IPythonInterpreter.run_cell.__code__]

    def fail(self, error):
        """Let the shell show an error, without our frames."""
        if self.first:
            self.first.error_in_exec = error
        self.shell.showtraceback((type(error), error, users_traceback(error)), tb_offset=0)
        return self.failure(error)

    def failure(self, error):
        """The fields of a failed `execute_reply`, with the traceback that was shown."""
        return {"status": "error", **self.describe_error(error), "traceback": self.traceback}

    def finish_cell(self):
        """The cell that brought IPython ends as the shell's own do; then what is left of ours."""
        if self.first:
            first, self.first, self.shell.displayhook.exec_result = self.first, None, None
            self.shell.last_execution_result = first
            self.shell.last_execution_succeeded = first.success
            self.shell.events.trigger("post_execute")
            self.shell.events.trigger("post_run_cell", first)
        super().finish_cell()


def output_classes(interpreter):
    """Classes for IPython's shell: how it names a cell, shows a result, and displays."""
    from IPython.core import compilerop, displayhook, displaypub

    class Compiler(compilerop.CachingCompiler):
        def get_code_name(self, raw_code, transformed_code, number):
            return cell_file(number, next(interpreter.serial))

        def format_code_name(self, name):
            """As tracebacks call a cell, also one that ran before IPython came."""
            cell = CELL_FILE.match(name)
            return ("Cell", f"In[{cell[1]}]") if cell else None

    class DisplayHook(displayhook.DisplayHook):
        prompt_count = property(lambda self: interpreter.count.get())   # a subshell has its own
        is_showing = False

        def __call__(self, value=None):
            self.is_showing = True
            try:
                super().__call__(value)
            finally:
                self.is_showing = self._is_active = False   # also when a `__repr__` was interrupted

        def quiet(self):
            # The `;` at the end of a `%%magic` cell is the magic's.
            return is_muted(interpreter.shell.transform_cell(interpreter.code))

        def write_output_prompt(self):
            pass

        finish_displayhook = write_output_prompt

        def write_format_data(self, data, metadata=None):
            interpreter.publish("execute_result", {
                "data": without_bytes(data), "metadata": metadata or {},
                "execution_count": self.prompt_count})

        def update_user_ns(self, value):
            if interpreter.stores:
                super().update_user_ns(value)

        def log_output(self, data):
            if interpreter.stores:
                super().log_output(data)

    class DisplayPublisher(displaypub.DisplayPublisher):
        def publish(self, data, metadata=None, *, transient=None, update=False, **ignored):
            interpreter.display.publish_display_data(
                without_bytes(data), metadata, transient, update)

        def clear_output(self, wait=False):
            interpreter.display.clear_output(wait)

    return Compiler, DisplayHook, DisplayPublisher


def shell_class(interpreter):
    """The class of IPython's shell with our ways out: what ipykernel's has, in small."""
    from IPython.core import autocall, interactiveshell, page
    from IPython.core.error import UsageError
    from traitlets import Instance, Type
    Compiler, DisplayHook, DisplayPublisher = output_classes(interpreter)

    class ZMQInteractiveShell(interactiveshell.InteractiveShell):   # libraries look for this name
        __module__ = "ipykernel.zmqshell"
        displayhook_class, display_pub_class = Type(DisplayHook), Type(DisplayPublisher)
        compiler_class, exiter = Type(Compiler), Instance(autocall.ZMQExitAutocall)
        keepkernel_on_exit = None
        parent_header = property(lambda self: self.get_parent())

        def _exiter_default(self):
            return autocall.ZMQExitAutocall(self)

        def init_virtualenv(self):
            pass   # which would warn: a kernel is installed where it belongs

        def init_hooks(self):
            super().init_hooks()
            self.set_hook("show_in_pager", page.as_hook(self.page), 99)

        def page(self, text, start=0, *ignored, **options):
            data = text if isinstance(text, dict) else {"text/plain": text}
            self.ask_frontend("page", data=data, start=max(0, start))

        def set_next_input(self, text, replace=False):
            self.ask_frontend("set_next_input", text=text, replace=replace)

        def ask_exit(self):
            self.exit_now = not self.keepkernel_on_exit
            self.ask_frontend("ask_exit", keepkernel=self.keepkernel_on_exit)
            if self.exit_now:
                offered("leave", interpreter.kernel)

        def ask_frontend(self, source, **wish):
            self.payload_manager.write_payload({"source": source, **wish})

        def get_parent(self):
            return self.kernel.get_parent()

        def system(self, command):
            """Ours: IPython uses a terminal, which swallows interrupts and ends lines in \\r\\n."""
            interpreter.magics.run_command(self.var_expand(command, depth=1))

        system_piped = system_raw = system

        def enable_gui(self, gui=None):
            if gui not in (None, "inline", "ipympl", "widget", "nbagg", "notebook", "asyncio"):
                raise UsageError(f"Invalid GUI request {gui!r}: this kernel has no windows")

        def _get_exc_info(self, exc_tuple=None):
            etype, error, frames = super()._get_exc_info(exc_tuple)
            error = interpreter.as_interrupt(error)
            return type(error), error, without_handler(frames)

        def _showtraceback(self, etype, error, lines):
            interpreter.traceback = lines
            for function in interpreter.before_error:
                function(error)
            if self.displayhook.is_showing:   # a result that cannot be shown is a failure
                interpreter.display_error = error
            interpreter.publish("error", self._format_exception_for_storage(error))

        def _format_exception_for_storage(self, error, *ignored, **options):
            """For `%notebook`, too. IPython's own fails with an error whose `__str__` fails."""
            failure = interpreter.failure(error)
            return {key: failure[key] for key in ("ename", "evalue", "traceback")}

    return ZMQInteractiveShell


def let_ipython_interpret(ipython, kernel):
    """Called when IPython has been imported: from now on its shell runs the cells."""
    interpreter = kernel.interpreter
    from IPython.core.interactiveshell import ExecutionInfo, ExecutionResult
    from traitlets.config import Config
    names, file = interpreter.namespace, kernel.connection.get("connection_file", "")
    values = {name: names.get(name, "") for name in ("_", "__", "___")}
    interpreter.code = interpreter.inputs[-1] if interpreter.stores else ""
    interpreter.traceback, interpreter.display_error = [], None
    interpreter.was_interrupted = lambda: False
    shell = interpreter.magics.shell = shell_class(interpreter).instance(
        user_module=interpreter.module, user_ns=names,
        config=Config({"IPKernelApp": {"connection_file": file},
                       "HistoryManager": {"hist_file": ":memory:"}}))
    shell.kernel = ShellKernel(interpreter)
    hand_over_values(interpreter, shell)
    hand_over_hooks(interpreter, shell)
    names.update(values)
    vars(shell.displayhook).update(values)   # it keeps its hands off a `_` that is not its own
    first = interpreter.first = shell.displayhook.exec_result = ExecutionResult(ExecutionInfo(
        interpreter.code, interpreter.stores, False, True, None))
    pose_as_zmqshell(type(shell))
    first.execution_count = interpreter.count.get()
    interpreter.__class__ = IPythonInterpreter
    builtins.get_ipython, sys.displayhook = shell.get_ipython, shell.displayhook


def hand_over_values(interpreter, shell):
    """Give the shell what has gathered here, and take its containers for ours."""
    history = shell.history_manager
    history.input_hist_raw[:], history.input_hist_parsed[:] = [""], [""]
    for number, code in enumerate(interpreter.inputs[1:], 1):
        history.store_inputs(number, code)
    history.output_hist.update(interpreter.outputs)
    history.output_hist_reprs.update(interpreter.results)
    shell.execution_count = interpreter.execution_count + 1
    for payload in interpreter.payload:
        shell.payload_manager.write_payload(payload)
    interpreter.inputs, interpreter.outputs = history.input_hist_raw, history.output_hist
    interpreter.results = history.output_hist_reprs
    interpreter.display.format = shell.display_formatter.format
    shell.compile.flags |= interpreter.flags & FUTURES
    for (module, name), formatters in FORMATTERS.items():
        cls = getattr(sys.modules.get(module), name, None)
        for mime in formatters.keys() - {"text/plain"}:   # IPython prints containers itself
            formatter = shell.display_formatter.formatters[mime]
            formatter.for_type(cls or f"{module}.{name}", formatters[mime])


def hand_over_hooks(interpreter, shell):
    """What was called around our cells is called around the shell's; and what ipykernel adds."""
    magics = interpreter.magics
    interpreter.before_cell.remove(magics.before_cell)
    interpreter.after_cell.remove(magics.after_cell)
    for function in interpreter.before_cell:
        shell.events.register("pre_run_cell", lambda info, call=function: call(info.raw_cell))
    for function in interpreter.after_cell:
        shell.events.register("post_execute", function)
    interpreter.before_cell.clear()
    interpreter.after_cell.clear()
    for event, functions in magics.events.callbacks.items():
        for function in functions:
            shell.events.register(event, function)
    shell.extension_manager.load_extension("storemagic")
    for name, command in (("less", "cat {}"), ("more", "cat {}"), ("man", "man {} | col -b")):
        shell.register_magic_function(lambda line, command=command: shell.page(
            shell.getoutput(command.format(line), split=False)), magic_name=name)
    shell.register_magic_function(lambda line: shell.system("clear"), magic_name="clear")
    for name in ("pip", "uv", "conda"):
        if method := getattr(magics, f"magic_{name}", None):
            shell.register_magic_function(functools.partial(method, cell=None), magic_name=name)
    shell.register_magic_function(lambda line: None, magic_name="autosave")   # the page's own
    if "matplotlib" not in sys.modules and importlib.util.find_spec("matplotlib_inline"):
        os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")


def pose_as_zmqshell(shell):
    """tqdm.auto looks whether `ipykernel.zmqshell` is loaded. Whoever wants more of that module
    than the shell's class gets the real one's."""
    name = "ipykernel.zmqshell"
    module = types.ModuleType(name)

    def from_the_real_one(attribute):
        sys.modules.pop(name)
        return getattr(importlib.import_module(name), attribute)

    module.ZMQInteractiveShell, module.__getattr__ = shell, from_the_real_one
    sys.modules.setdefault(name, module)


def pose_as_ipykernel(kernelapp, kernel):
    """`ipykernel.get_connection_file()` and its like ask the one application object."""
    app = kernelapp.IPKernelApp.instance()
    app.connection_file = kernel.connection["connection_file"]
    app.kernel = kernel.interpreter.magics.shell.kernel


@EXTRAS.append
def have_get_ipython(kernel):
    interpreter = kernel.interpreter
    interpreter.kernel = kernel
    if getattr(interpreter, "magics", None):
        shell = Shell(interpreter)
        builtins.get_ipython = lambda: shell


OFFERS["ipython_shell"] = ipython_shell
AFTER_IMPORT["IPython"] = let_ipython_interpret
AFTER_IMPORT["ipykernel.kernelapp"] = pose_as_ipykernel


# ---- 14. matplotlib ----------------------------------------------------------------------------
#
# matplotlib draws figures for a backend, so it gets one of ours: Agg draws, and the figures are
# shown when the cell is done.

BACKEND = "minijupyter_figures"


def figure_png(figure):
    """A matplotlib figure as PNG bytes."""
    data = io.BytesIO()
    figure.canvas.print_figure(data, format="png", bbox_inches="tight")
    return data.getvalue()


def make_backend(module, kernel):
    """Fill the module that matplotlib loads as its backend."""
    import matplotlib
    from matplotlib._pylab_helpers import Gcf
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    def show(*args, **options):
        if matplotlib.get_backend().removeprefix("module://") != BACKEND:
            return   # `%matplotlib widget` has come since
        for manager in Gcf.get_all_fig_managers():
            builtins.display(manager.canvas.figure)
        Gcf.destroy_all()

    module.FigureCanvas, module.show = FigureCanvasAgg, show
    kernel.interpreter.after_cell.append(show)


def connect_matplotlib(matplotlib, kernel):
    FORMATTERS["matplotlib.figure", "Figure"] = {"image/png": figure_png}
    if "MPLBACKEND" not in os.environ:
        matplotlib.use(f"module://{BACKEND}")


AFTER_IMPORT["matplotlib"], STAND_INS[BACKEND] = connect_matplotlib, make_backend


# ---- 15. Subshells -----------------------------------------------------------------------------
#
# More cells at the same time, in the same namespace (JEP 91): each subshell is one more Cells, on a
# thread of its own. A request names the one that it is for in its header.

FEATURES.append("kernel subshells")


@EXTRAS.append
def have_subshells(kernel):
    kernel.subshells = {}   # subshell_id -> Cells
    put_main = kernel.workers["cells"]

    def put(request):
        id = request["header"].get("subshell_id")
        if id is None:
            put_main(request)
        elif isinstance(id, str) and id in kernel.subshells:
            kernel.subshells[id].put(request)
        else:
            refuse(kernel, request)

    kernel.workers["cells"] = put


def refuse(kernel, request):
    """Answer a request for a subshell that is not there (any more)."""
    problem = KeyError(f"there is no subshell {request['header']['subshell_id']}")
    kernel.status("busy", request)
    kernel.log(f"refused {request['header']['msg_type']}: {problem}")
    if is_cell(request):
        kernel.reply(request, failed(problem))
    kernel.status("idle", request)


@handles("io")
def create_subshell_request(kernel, request):
    id, cells = os.urandom(16).hex(), Cells(kernel)
    kernel.subshells[id] = cells
    kernel.shells.append(cells)
    threading.Thread(target=cells.run, name=f"subshell {id[:4]}", daemon=True).start()
    return {"subshell_id": id}


@handles("io")
def delete_subshell_request(kernel, request):
    cells = kernel.subshells.pop(str(request["content"]["subshell_id"]))
    kernel.shells.remove(cells)
    for each in cells.stop():   # control overtakes what was sent on shell before it
        kernel.abort(each) if is_cell(each) else kernel.cells.put(each)
    return {}


@handles("io")
def list_subshell_request(kernel, request):
    return {"subshell_id": list(kernel.subshells)}


# ---- 16. Children ------------------------------------------------------------------------------
#
# What child processes and C code print comes through the pipes behind descriptors 1 and 2. From the
# first of them in a cell on, each print looks into the pipes before, so that all keeps its place.
# A child that was forked has no io thread: its text goes through the pipe to the parent's, and it
# ends where its cell ends, as a Python program ends.

CHILD_EVENTS = {"subprocess.Popen", "os.system", "os.fork", "os.posix_spawn",   # of sys.audit
                "ctypes.dlopen", "ctypes.dlsym"}


@EXTRAS.append
def notice_children(kernel):
    def notice(event, args):
        if event in CHILD_EVENTS:
            kernel.outbox.catch_up = kernel.drain

    def forget():
        kernel.outbox.catch_up = None

    sys.addaudithook(notice)
    kernel.on_enter.append(forget)
    kernel.on_drain.append(flush_c_output)
    kernel.on_cell_end.append(functools.partial(end_child, kernel))
    if hasattr(os, "register_at_fork"):
        for stream in (sys.stdout, sys.stderr):
            os.register_at_fork(after_in_child=ChildStream(stream).take_over)


def flush_c_output():
    """Make C's stdio give what it has buffered to the descriptors, once the cell has used C."""
    if "ctypes" not in sys.modules:
        return
    with contextlib.suppress(ImportError, OSError, AttributeError, TypeError):
        own("ctypes").CDLL(None).fflush(None)   # or there is no C library to ask on this system


class ChildStream:
    """`write` and `flush` of a stream in a forked child: whole lines, so that those of several
    children don't mix."""

    def __init__(self, stream):
        self.stream, self.line = stream, ""

    def take_over(self):
        self.stream.write, self.stream.flush = self.write, self.flush

    def write(self, text):
        self.line += text
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self):
        data, self.line = self.line.encode("utf-8", "replace"), ""
        while data:
            data = data[os_write(self.stream.descriptor, data):]


def end_child(kernel, error):
    """End a process that was forked in the cell: after an error with a traceback and 1, after
    `sys.exit(n)` with n."""
    if os.getpid() == kernel.process_id:
        return
    status = 0
    try:
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
            if isinstance(error.code, str):
                sys.stderr.write(error.code + "\n")
        elif error is not None:
            status = 1
            sys.stderr.write("\n".join(describe_error(error)["traceback"]) + "\n")
        sys.stdout.flush()
        sys.stderr.flush()
        flush_files()
    finally:
        os._exit(status & 0xFF)


# ---- 17. Cells taken back ----------------------------------------------------------------------
#
# `abort_request`, a message of ipykernel up to version 6: a client takes back cells that wait.

UNWANTED = 1000   # cells that are taken back before they have come and are remembered


@EXTRAS.append
def have_unwanted(kernel):
    kernel.unwanted = collections.deque(maxlen=UNWANTED)   # msg_ids
    put = kernel.workers["cells"]

    def put_or_abort(request):
        is_unwanted = is_cell(request) and request["header"]["msg_id"] in kernel.unwanted
        (kernel.abort if is_unwanted else put)(request)

    kernel.workers["cells"] = put_or_abort


@handles("io")
def abort_request(kernel, request):
    """Take the cells of these `msg_ids` out of the queue; what runs, runs on."""
    msg_ids, dropped = {*request["content"]["msg_ids"]}, set()
    for cells in [*kernel.shells]:
        for cell in [*cells.waiting]:
            msg_id = cell["header"]["msg_id"]
            if is_cell(cell) and msg_id in msg_ids:
                with contextlib.suppress(ValueError):   # its turn has just come
                    cells.waiting.remove(cell)
                    dropped.add(msg_id)
                    kernel.abort(cell)
    kernel.unwanted.extend(msg_ids - dropped)   # control overtakes shell: they may be on their way
    return {}


# ---- 18. What a cell has broken ----------------------------------------------------------------
#
# A cell may set `builtins.len = None`. The functions of this file use copies, but asyncio, pyzmq
# and the other modules that we call do not. So when something fails that never does, or a builtin
# is gone when a cell ends, all that has changed is put back.

# What the kernel itself, or IPython, replaces.
OURS = {"input", "display", "exit", "quit", "get_ipython", "write", "_", "__loader__"}


@EXTRAS.append
class Mender:
    """Puts back what was there when the kernel started."""

    def __init__(self, kernel):
        self.kernel, self.before = kernel, []   # modules and what they held
        self.loaded = {name: module for name, module in sys.modules.items()   # pyzmq imports each
                       if name.partition(".")[0] in ("sys", "zmq")}   # exception that it raises
        self.needed = [name for name, value in vars(builtins).items()
                       if callable(value) and name not in OURS]
        kernel.on_start.append(self.remember)
        kernel.on_trouble.append(self.mend)
        kernel.on_cell_end.append(self.look)

    def remember(self):
        asyncio = sys.modules["asyncio"]
        modules = [module for module in MODULES if module is not sys]
        modules += [asyncio, asyncio.base_events, asyncio.events, asyncio.tasks]
        self.before = [(module, dict(vars(module))) for module in modules]

    def look(self, error):
        if not all(map(callable, map(vars(builtins).get, self.needed))):
            self.mend()

    def mend(self):
        names = []
        for module, before in self.before:
            for name, value in before.items():
                if callable(value) and vars(module).get(name) is not value and name not in OURS:
                    names.append(f"{module.__name__}.{name}")
                    vars(module)[name] = value
        sys.modules.update(self.loaded)
        if sys.getrecursionlimit() < 500:
            sys.setrecursionlimit(1000)   # Python's default
        self.kernel.log(f"put back: {', '.join(names) or 'nothing'}")


# ---- 19. Stalled subscribers -------------------------------------------------------------------
#
# A ZeroMQ publisher cannot tell which subscriber has no room: it drops messages for some, or holds
# them for all. But in manual mode an XPUB socket does nothing with a subscription until we say what
# it stands for, and what we say counts for the client whose subscription was received last. So each
# subscriber that wants everything (all clients do) gets a second one as well, to a topic that
# nobody else has. As long as all have room, one send serves all. When one has no room, the message
# waits. After STALL_SECONDS we send each subscriber its own copy: whoever still has no room has
# *stalled*, loses what it cannot take, and does not hold up the others again (I5), until it has
# taken PARDONED messages, so that it must be reading; the next time twice as many. (Subscribers to
# chosen topics get no copies: they lose what is said while one of all is full.)
#
#     how a message goes    when
#     one send for all      everybody has room
#     it waits              somebody has none, but may hold up the others: it has not stalled yet
#     a copy for each       somebody has none and has stalled, now or before

PARDONED = 128   # messages: all that wait for a subscriber in its queue, and as many again


@BROADCASTS.append
class FairBroadcast(Broadcast):
    """The iopub socket, fair to those who read."""

    TOPICS = (b"kernel.", b"stream.")   # every topic of ours begins with one of these

    def __init__(self, xpub):
        super().__init__(xpub)
        self.numbers = itertools.count(1)
        self.everybody = set()   # numbers of subscribers, also of those gone
        # Those that have stalled -> how many messages they must take; 0 stands for those with a
        # chosen topic.
        self.stalled = {}
        self.terms = collections.Counter()   # number -> how often it has stalled
        self.present = 0       # how many are there
        self.behind = None     # who still waits for a copy of the message that is being sent

    def send(self, parts):
        """Send a message; False when it must wait, and then it must be the next one, too."""
        if self.behind is None:
            if self.try_to_send(parts):
                self.refused = None
                self.pardon([*self.stalled])
                return True
            self.refused = self.refused or monotonic()
            if not self.stalled and not self.is_late():
                return False
            self.behind = {*self.everybody}
            self.is_known = False   # who has no room
        for number in [*self.behind]:
            if not self.try_to_send([self.private_topic(number) + parts[0], *parts[1:]]):
                self.is_known = True
                if number not in self.stalled and not self.is_late():
                    continue
                self.stall(number)
            elif number in self.stalled:
                self.pardon([number])
            self.behind.discard(number)
        if self.behind:
            return False
        if not self.is_known:
            self.stall(0)
        self.behind = self.refused = None
        return True

    def stall(self, number):
        if number not in self.stalled:
            self.stalled[number] = PARDONED << self.terms[number]
            self.terms[number] += 1

    def pardon(self, numbers):
        """These have taken a message, although they had stalled."""
        for number in numbers:
            self.stalled[number] -= 1
            if not self.stalled[number]:
                del self.stalled[number]

    @staticmethod
    def private_topic(number):
        return b"\0%d\0" % number

    def subscribe(self, topic, welcome):
        super().subscribe(topic, welcome)
        if topic:   # its own socket drops what has another topic, so it cannot get one for itself
            return
        self.xpub.unsubscribe = topic
        for each in (*self.TOPICS, self.private_topic(number := next(self.numbers))):
            self.xpub.subscribe = each
        self.everybody.add(number)
        self.present += 1

    def unsubscribe(self, topic):
        topics = [topic]
        if not topic:
            topics += [*self.TOPICS, *map(self.private_topic, self.everybody)]
            self.present -= 1
        else:
            self.stalled.pop(0, None)
        for each in topics:   # for a client that has left this does nothing
            self.xpub.unsubscribe = each
        if not self.present:
            self.everybody, self.stalled = set(), {}


# ---- 20. Windows -------------------------------------------------------------------------------
#
# What is POSIX's alone stands in one place each, with a portable way beside it: see
# `signal_main_thread`, `end_children`, `kernel_spec`. Here is the one that takes more than a line.

class PortableDescriptor(Descriptor):
    """The same where io cannot wait for a pipe (Windows): a thread of its own reads it. `drain`
    sends a mark through the pipe, and waits until the thread has come to it."""

    MARK = b"\0<drain %d>\0" % os.getpid()

    def listen(self, kernel):
        self.marks = threading.Semaphore(0)
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        text = b""
        while data := os.read(self.pipe, 1 << 16):
            *before, text = (text + data).split(self.MARK)
            for each in before:
                self.take(each)
                self.marks.release()
            begun = next((n for n in range(len(self.MARK) - 1, 0, -1)
                          if text.endswith(self.MARK[:n])), 0)   # of a mark that is cut
            self.take(text[:len(text) - begun])
            text = text[len(text) - begun:]

    def drain(self):
        with self.lock:
            os_write(self.write_end, self.MARK)
            self.marks.acquire()


DESCRIPTORS[False] = PortableDescriptor


# ---- 21. Interrupts that were lost -------------------------------------------------------------
#
# A signal that arrives just before the main thread begins to wait for a lock does not end that
# wait: Python has noted it, and would call the handler if only the wait ended. So Python also
# writes to a socket when a signal comes; when io hears that, and the handler has not run within
# RETRY_MS, io sends the main thread another signal. It ends the wait, and its own handler does
# nothing. (A second SIGINT could be taken for a new one: it would interrupt what shows the first.)

class LostInterrupts:
    SIGNAL = POSIX and signal.SIGURG   # nobody else uses it, and it is ignored by default

    def __init__(self, kernel):
        self.kernel = kernel
        self.due = None   # when the main thread is woken; seconds, monotonic
        self.signalled, self.wakeup = socket.socketpair()
        self.signalled.setblocking(False)
        self.wakeup.setblocking(False)
        self.listen(None)
        kernel.on_cell_end.append(self.listen)
        kernel.listen(self.signalled.fileno(), self.expect)
        kernel.on_interrupt.append(self.noticed)
        kernel.rounds.append(self.wake_main)

    def listen(self, error):
        """Let Python write to our socket, also when a cell has ended that has taken it away. One
        that asyncio has put in its place stays (`loop.add_signal_handler`)."""
        if current_thread() is threading.main_thread():
            signal.signal(self.SIGNAL, lambda number, frame: None)
            other = signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
            if other not in (-1, self.wakeup.fileno()):
                signal.set_wakeup_fd(other)

    def expect(self):
        """A signal has come. `noticed` empties this socket, too."""
        try:
            if signal.SIGINT in self.signalled.recv(4096):   # a byte for each signal, its number
                self.due = monotonic() + RETRY_MS / 1000
        except BlockingIOError:
            self.due = None

    def noticed(self):
        """The handler runs."""
        with contextlib.suppress(BlockingIOError):
            self.signalled.recv(4096)
        self.due = None

    def wake_main(self):
        if self.due and self.due < monotonic():
            is_ours = signal.getsignal(signal.SIGINT) == self.kernel.interrupt   # not a cell's
            self.due = monotonic() + RETRY_MS / 1000 if is_ours else None
            signal.pthread_kill(threading.main_thread().ident, self.SIGNAL)
        return RETRY_MS if self.due else None


if POSIX:
    EXTRAS.append(LostInterrupts)


# ---- 22. Patience at the start -----------------------------------------------------------------
#
# A client's sockets find a new kernel one at a time. If shell connects before iopub, the client
# would miss the output of what it asks: so shell is not read until somebody has subscribed, or
# DEAF_SECONDS have passed.

DEAF_SECONDS = 1


@EXTRAS.append
def wait_for_subscriber(kernel):
    shell, until = kernel.sockets["shell"], monotonic() + DEAF_SECONDS
    kernel.poller.unregister(shell)

    def listen_at_last():
        if shell in kernel.poller:
            return None
        if not kernel.broadcast.has_subscribers and monotonic() < until:
            return max(1, (until - monotonic()) * 1000)
        kernel.poller.register(shell, zmq.POLLIN)
        return 0

    kernel.rounds.append(listen_at_last)


# ---- 23. The parent's end ----------------------------------------------------------------------
#
# When the process has ended that started us (JPY_PARENT_PID), we go with it. Linux tells through a
# pidfd, without any polling in time; elsewhere a thread waits for it.

@EXTRAS.append
def follow_parent(kernel):
    pid = os.environ.get("JPY_PARENT_PID", "")
    if not pid.isdigit() or int(pid) != os.getppid():
        return

    def end():
        if POSIX:
            end_children(signal.SIGKILL)
        os._exit(1)

    try:
        kernel.listen(os.pidfd_open(int(pid)), end)
    except (AttributeError, OSError):   # not Linux, or it does not allow it
        threading.Thread(target=wait_for_parent, args=[int(pid), end], daemon=True).start()


def wait_for_parent(pid, end):
    """Call `end` when this process has lost its parent."""
    if os.name == "nt":   # where the number of the parent stays
        import ctypes
        system, synchronize, for_ever = ctypes.windll.kernel32, 0x00100000, 0xFFFFFFFF
        system.WaitForSingleObject(system.OpenProcess(synchronize, False, pid), for_ever)
    while os.name != "nt" and os.getppid() == pid:
        sleep(1)
    end()


# ---- 24. Passwords -----------------------------------------------------------------------------

def patch_getpass(module, kernel):
    """Let `getpass.getpass` ask the person in front of the page, who types unseen."""
    def getpass(prompt="Password: ", stream=None, **options):
        return kernel.ask(str(prompt), password=True)

    module.getpass = getpass


AFTER_IMPORT["getpass"] = patch_getpass


# ---- 25. Clients that have gone ----------------------------------------------------------------
#
# A console runs a cell that asks with input(), and its terminal is closed: the cell would wait for
# ever, and with it everybody else's cells. So the question is put to all clients that are there,
# and to each that comes; the first answer counts. ZeroMQ tells which connections end by their
# number, and each message by which one it came: so we know who has spoken and is still there.

class RememberingSocket(zmq.Socket):
    """The shell socket. It knows the clients that have spoken, until their connection ends."""

    clients = ends = None

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.clients = {}   # identity -> number of its connection
        self.ends = self.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def recv_multipart(self, flags=0):
        """A message, as a list of bytes; raises zmq.Again."""
        frame = self.recv(flags, copy=False)
        parts = [frame.bytes, *super().recv_multipart(flags)]
        # A number is used again: first those who had it before this message came must be forgotten.
        self.forget_gone()
        self.clients[parts[0]] = frame.get(zmq.SRCFD)
        return parts

    def forget_gone(self):
        while self.ends.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            # zmq_socket_monitor(3): two bytes for the event, four for its connection; its address
            event, _ = self.ends.recv_multipart()
            number = int.from_bytes(event[2:], sys.byteorder)
            self.clients = {who: its for who, its in self.clients.items() if its != number}


@EXTRAS.append
class OpenQuestions:
    """Has questions whose client has gone answered by others."""

    def __init__(self, kernel):
        self.kernel, self.shell = kernel, kernel.sockets["shell"]
        self.asked = {}   # msg_id of an open question -> identities that it was put to
        kernel.listen(self.shell.ends, self.shell.forget_gone)
        kernel.rounds.append(self.ask_others)

    def ask_others(self):
        questions = {**self.kernel.questions}
        self.asked = {id: asked for id, asked in self.asked.items() if id in questions}
        patience = None
        for id, (_, question) in questions.items():
            asked = self.asked.setdefault(id, {question["identities"][0]})
            if question["identities"][0] in self.shell.clients:
                continue
            for who in self.shell.clients.keys() - asked:
                asked.add(who)
                self.kernel.outbox.put("stdin", {**question, "identities": [who]})
                patience = 0   # what is in the outbox now is sent in the next round
        return patience


SOCKETS["shell"] = RememberingSocket


# ---- 26. Leaving -------------------------------------------------------------------------------

EXIT_SECONDS = 0.3   # between a cell's end and the kernel's, so that a console sees the reply


class Exit:
    """`exit` and `quit`, with or without brackets: end the kernel when the cell is done, and tell a
    console to end as well; with keep_kernel=True the console alone."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __call__(self, code=None, keep_kernel=False):
        self.kernel.interpreter.payload.append({"source": "ask_exit", "keepkernel": keep_kernel})
        if not keep_kernel:
            leave(self.kernel)

    _ipython_display_ = __call__   # `exit` alone is the value of its cell


def leave(kernel):
    """Let the kernel end after its cell."""
    loop = kernel.cells.loop
    loop.call_soon_threadsafe(loop.call_later, EXIT_SECONDS, kernel.stop)


@EXTRAS.append
def let_users_leave(kernel):
    if hasattr(kernel.interpreter, "payload"):
        builtins.exit = builtins.quit = Exit(kernel)


OFFERS["leave"] = leave


# ---- 27. Encryption ----------------------------------------------------------------------------

@SOCKET_OPTIONS.append
def encrypt(new, connection):
    """CurveZMQ, when the connection file carries keys (jupyter_client 8.9)."""
    if connection.get("curve_secretkey"):
        new.curve_secretkey = connection["curve_secretkey"].encode()
        new.curve_publickey = connection["curve_publickey"].encode()
        new.curve_server = True


# ---- 28. Usage and addresses -------------------------------------------------------------------

LAST_USAGE = {"wall": monotonic(), "cpu": 0.0}   # of the last usage_request


@handles("io")
def usage_request(kernel, request):
    """Not in the specification; resource monitors ask it."""
    wall, cpu = monotonic(), sum(os.times()[:2])
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


@handles("io")
def connect_request(kernel, request):
    """The ports; deprecated since protocol 5.1."""
    return {port_name(channel): kernel.connection[port_name(channel)]
            for channel in (*kernel.sockets, "heartbeat")}


# ---- 29. Less collecting -----------------------------------------------------------------------

COLLECT_AFTER = 10_000   # new objects; after 700, as usual, a flood of prints collects all the time


@EXTRAS.append
def collect_less(kernel):
    kernel.on_start.append(gc.freeze)   # what is loaded by then stays: not to be looked at again
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])


# ---- 30. Faster JSON ---------------------------------------------------------------------------
#
# JSONEncoder makes an encoder in C for each value: one for all takes half the time. And long texts,
# such as what 100 MB of prints become, mostly have no character that needs an escape but line ends.

def json_string(text):
    """`text` as a JSON string. To search for each character that needs an escape is four times as
    fast as to look at each character."""
    if len(text) < 500 or any(map(text.__contains__, ESCAPED)):
        return json.encoder.encode_basestring(text)
    if "\n" in text:
        text = text.replace("\n", "\\n")
    return f'"{text}"'


ESCAPED = ['"', "\\", *map(chr, {*range(32)} - {ord("\n")})]
if json.encoder.c_make_encoder:
    encode_pieces = json.encoder.c_make_encoder(None, json_default, json_string, None, ":", ",",
                                                False, False, False)
    ENCODERS.append(lambda value: "".join(encode_pieces(value, 0)))


# ---- 31. Variables -----------------------------------------------------------------------------
#
# What the notebook's variables are and hold, for a panel of the page, also while a cell runs. The
# page asks our kernel by a `variables_request`. It sends this section, up to "in this kernel", as
# a program to other Python kernels; so that part uses nothing of this file but its imports. A
# request is a small dict, and so is the answer:
#
#     asked                                   answered
#     {}                                      names: a row for each variable
#     path: [name, n, …]                      what that is; a table's columns, a text
#     path, items: [from, to]                 rows: a row for each thing in it, for a tree
#     path, rows: [from, to], columns: [from, to], sort: [column, is_descending], at: [n, …],
#     edition                                 cells: a table's; with the label of each row first
#     the same, filter: text                  of those rows that have it, as far as they are found
#                                             after SEARCH_SECONDS more; how many, of how many
#     anything that cannot be answered        problem: in words
#
# A row is [label, type, size in words, how many, text, kind, is hidden], and a kind is what a click
# on it opens: "table", "tree" or "text". A path leads by positions to things in things. `at` names
# a plane of an array with more than two dimensions. `edition` is the page's word for what it has
# read at one time: for as long a table is sorted once only.
#
#     V1 nothing changes    no name, no history, no counter; of an object only its length, its shape
#                           and its `__repr__` are asked for; no big data are copied
#     V2 nothing hangs      a `__repr__` that raises or takes SLOW_SECONDS costs its own row its
#                           text; its thread is asked to end. (While C code holds the interpreter's
#                           lock, nobody can answer anything.)

SLOW_SECONDS = 0.3      # for the text of one value
NAMES_SECONDS = 1.5     # for all names; then no more `__repr__` of classes that we do not know
TABLE_SECONDS = 5       # to sort a table, at most
SEARCH_SECONDS = 0.25   # to look for a text, for one question
SEARCHED_CELLS = 6_000  # that are looked at between two looks at the clock
MOST_SEARCHES = 4       # that are kept: two pages may look for two texts
MOST_BRIEF = 120        # characters of a value in its row
MOST_CELL = 500         # characters of a table's cell
MOST_WHOLE = 100_000    # characters of a text that was opened
MOST_COLUMNS = 2_000    # of a table that are told
FEW_ITEMS = 8           # of a container that stand in its row
SAMPLE = 200            # dicts of a list in which columns are looked for
PLAIN_TYPES = {int, float, complex, bool, type(None)}
ENDS = {list: "[]", tuple: "()", set: "{}", frozenset: ("frozenset({", "})"), dict: "{}",
        collections.deque: ("deque([", "])"), type({}.keys()): ("dict_keys([", "])"),
        type({}.values()): ("dict_values([", "])"), type({}.items()): ("dict_items([", "])")}
DEFINITIONS = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
SHELL_NAMES = {"In", "Out", "exit", "quit", "get_ipython"}   # which IPython has put there
WITH_SHAPES = {"numpy", "pandas", "polars", "torch", "tensorflow", "jax", "jaxlib", "xarray",
               "scipy", "cupy", "dask", "pyarrow"}


class Abandoned(BaseException):
    """Raised in a thread for whose work nobody waits any more."""


class Worker:
    """Runs `work(worker)` in a thread of its own, until it makes no progress. The work calls `step`
    before each thing that may take long."""

    def __init__(self, work):
        self.work, self.answer, self.error = work, None, None
        self.at, self.steps, self.is_abandoned = None, 0, False
        self.is_done = threading.Event()
        context = contextvars.copy_context()   # what a `__repr__` prints is no output of a cell
        self.thread = threading.Thread(target=context.run, args=(self.run,), daemon=True)
        self.thread.start()

    def run(self):
        try:
            self.answer = self.work(self)
        except (Exception, Abandoned) as error:
            self.error = error
        self.is_done.set()

    def step(self, at):
        if self.is_abandoned:
            raise Abandoned
        self.at, self.steps = at, self.steps + 1

    def wait(self, seconds):
        """True when the work is done; False when one step took so many seconds: then the thread is
        asked to end, by an exception that Python raises as soon as the thread runs Python code."""
        steps = None
        while not self.is_done.wait(seconds):
            if steps == self.steps:
                self.is_abandoned = True
                with contextlib.suppress(ImportError, AttributeError):   # no CPython
                    import ctypes
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(self.thread.ident), ctypes.py_object(Abandoned))
                return False
            steps = self.steps
        return True


# -- texts --

def shortened(text, most=MOST_BRIEF):
    """The beginning of a text, on one line, without half a surrogate pair."""
    text = text[:most + 1].replace("\n", " ") if most == MOST_BRIEF else text
    text = text if len(text) <= most else text[:most] + "…"
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def is_sliced(cls):
    """Has such a value a part of the same type, so that not all of it need be written?"""
    return cls in (str, bytes, bytearray) or cls.__module__ == "array"


def written_like(cls):
    """The container whose `__repr__` a subclass has, such as an OrderedDict; or None. It would be
    written as a whole, and in C: nothing else could run meanwhile."""
    for base in ENDS:
        if issubclass(cls, base):
            is_same = cls.__repr__ is base.__repr__ or cls.__module__ == "collections"
            return base if is_same else None
    return None


def brief(value, depth=2):
    """A value as a short text, without looking at all of what it holds."""
    cls = type(value)
    if is_sliced(cls):
        return shortened(repr(value[:MOST_BRIEF]) + "…" * (len(value) > MOST_BRIEF))
    if cls is int and value.bit_length() > 1000:   # Python refuses to write more than 4,300 digits
        return f"about {'-' * (value < 0)}1e{int(value.bit_length() * 0.30103)}"
    if depth < 2 and (size := how_many(value)[0]) and cls.__module__.split(".")[0] in WITH_SHAPES:
        return f"{cls.__name__} {size}"   # a table within something
    container = cls if cls in ENDS else written_like(cls)
    if not container or not depth:
        return "…" if container and len(value) else shortened(repr(value))
    begin, end = ENDS[container]
    is_dict = container is dict
    items = [*itertools.islice(dict.items(value) if is_dict else value, FEW_ITEMS)]
    texts = [f"{brief(key, depth - 1)}: {brief(item, depth - 1)}" for key, item in items] \
        if is_dict else [brief(item, depth - 1) for item in items]
    return shortened(begin + ", ".join(texts) + ", …" * (len(value) > FEW_ITEMS) + end)


def whole_text(value):
    """A value that was opened as a text."""
    if type(value) is int:
        return brief(value) if value.bit_length() > 10_000 else str(value)
    if is_sliced(type(value)):
        part = value[:MOST_WHOLE + 1]
        return shortened(part if isinstance(part, str) else repr(part), MOST_WHOLE)
    return shortened(repr(value), MOST_WHOLE)


def brief_safely(value):
    """The same, or what is wrong with its `__repr__`."""
    try:
        table = table_of(value)
        return shortened(table.brief() if table else brief(value))
    except Abandoned:
        raise
    except BaseException as error:   # a `__repr__` is the user's, and may even raise SystemExit
        return f"its __repr__ raises {type(error).__name__}"


def cell_text(value):
    """A value in a table, as its own `str`. A line end of it is kept."""
    try:
        return shortened(value if type(value) is str else str(value), MOST_CELL)
    except Exception as error:
        return f"raises {type(error).__name__}"


def label_text(label):
    """The label of a row or a column; those of several levels are tuples."""
    return " / ".join(map(cell_text, label)) if isinstance(label, tuple) else cell_text(label)


# -- what is in a value, for a tree --

def pairs_of(value):
    """(an iterable of (label, thing), how many) of what a value holds; (), 0 when it is whole."""
    cls = type(value)
    if issubclass(cls, dict):
        return ((brief(key), item) for key, item in dict.items(value)), dict.__len__(value)
    if issubclass(cls, tuple) and isinstance(getattr(cls, "_fields", None), tuple):
        return zip(cls._fields, value, strict=False), len(value)
    if issubclass(cls, (*ENDS, range)):
        return ((str(n), item) for n, item in enumerate(value)), len(value)
    if issubclass(cls, (*PLAIN_TYPES, str, bytes, *DEFINITIONS)):
        return (), 0
    found = attributes_of(value)
    return found.items(), len(found)


def attributes_of(value):
    """{name: value} of what an object itself holds: no property is called."""
    found = {}
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            with contextlib.suppress(AttributeError, KeyError):   # nothing is in it; mangled
                found["." + name] = cls.__dict__[name].__get__(value)
    with contextlib.suppress(AttributeError, TypeError):
        names = object.__getattribute__(value, "__dict__")
        found.update({f".{name}": item for name, item in names.items()})
    return found


def how_many(value):
    """(size in words, a number to sort by) of a value; ("", -1) when it has none."""
    cls = type(value)
    if cls in PLAIN_TYPES:
        return "", -1
    if cls.__module__.partition(".")[0] in WITH_SHAPES:
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple) and shape and all(type(n) is int for n in shape):
            return " × ".join(map(str, shape)), math.prod(shape)
    if not hasattr(cls, "__len__") or isinstance(value, type):
        return "", -1
    try:
        return str(len(value)), len(value)
    except Exception:   # an array without dimensions, a class that is odd
        return "", -1


# -- tables: each has `count` rows, and tells heads, an order, cells by position --

class PandasTable:
    """A DataFrame. A Series or an Index is one of a single column."""

    def __init__(self, value, at):
        how = {} if hasattr(value, "iloc") else {"index": False}   # an Index is not its own index
        self.frame = value if value.ndim == 2 else value.to_frame(**how)
        self.count, self.width = self.frame.shape
        self.is_single = value.ndim == 1

    def heads(self):
        numeric = [getattr(dtype, "kind", "O") in "iufc" for dtype in self.frame.dtypes]
        names = [""] if self.is_single and self.frame.columns[0] == 0 else self.frame.columns
        index = self.frame.index
        return [label_text(tuple(name or "" for name in index.names) if index.nlevels > 1
                           else index.name or ""),
                *([label_text(name), str(dtype), is_number] for name, dtype, is_number
                  in zip([*names][:MOST_COLUMNS], self.frame.dtypes, numeric, strict=False))]

    def order(self, column, is_descending):
        index = self.frame.index
        series = self.frame.iloc[:, column] if column >= 0 else index.to_series()
        if column < 0 and index.nlevels > 1:
            return index.argsort()[::-1 if is_descending else 1]
        series = series.reset_index(drop=True)
        how = {"ascending": not is_descending, "kind": "stable"}
        try:
            return series.sort_values(**how).index.to_numpy()
        except TypeError:   # of several types, which Python cannot compare
            return series.astype(str).sort_values(**how).index.to_numpy()

    def cells(self, rows, columns):
        part = self.frame.iloc[rows, columns]
        texts = [map(cell_text, part.iloc[:, n].array) for n in range(part.shape[1])]
        return [[*row] for row in zip(map(label_text, part.index), *texts, strict=False)]

    def brief(self):
        if self.is_single:
            return ", ".join(map(cell_text, self.frame.iloc[:FEW_ITEMS, 0].array))
        return ", ".join(map(label_text, self.frame.columns[:FEW_ITEMS]))


class PolarsTable:
    """A DataFrame of polars, or a Series."""

    def __init__(self, value, at):
        self.is_single = len(value.shape) == 1
        self.frame = value.to_frame() if self.is_single else value
        self.count, self.width = self.frame.shape

    def heads(self):
        kinds = self.frame.dtypes[:MOST_COLUMNS]
        return ["", *([name, str(kind), kind.is_numeric()]
                      for name, kind in zip(self.frame.columns, kinds, strict=False))]

    def order(self, column, is_descending):
        if column < 0:
            return [*range(self.count)][::-1 if is_descending else 1]
        series = self.frame.to_series(column)
        return series.arg_sort(descending=is_descending, nulls_last=True).to_list()

    def cells(self, rows, columns):
        numbers = range(*rows.indices(self.count)) if isinstance(rows, slice) else rows
        part = self.frame[rows, columns]
        texts = [map(cell_text, series.to_list()) for series in part.get_columns()]
        return [[*row] for row in zip(map(str, numbers), *texts, strict=False)]

    def brief(self):
        if self.is_single:
            return ", ".join(map(cell_text, self.frame.to_series(0)[:FEW_ITEMS].to_list()))
        return ", ".join(self.frame.columns[:FEW_ITEMS])


class ArrayTable:
    """An array of numpy: of its last two dimensions a plane, the others are fixed by `at`."""

    def __init__(self, value, at):
        self.value = value
        fixed = tuple((*at, *[0] * value.ndim)[:max(0, value.ndim - 2)])
        plane = value[fixed] if fixed else value
        self.names = plane.dtype.names if plane.ndim == 1 else None
        self.plane = plane if plane.ndim == 2 or self.names else plane[:, None]
        self.count, self.width = len(plane), len(self.names or range(self.plane.shape[1]))

    def heads(self):
        names = self.names or ([""] if self.value.ndim == 1 else range(self.width))
        kinds = [self.plane.dtype[name] for name in self.names] if self.names \
            else itertools.repeat(self.plane.dtype)
        return ["", *([str(name), str(kind), kind.kind in "iufc"] for name, kind
                      in zip([*names][:MOST_COLUMNS], kinds, strict=False))]

    def order(self, column, is_descending):
        """NaN stays at the end, whichever way."""
        values = self.plane[self.names[column]] if self.names and column >= 0 \
            else self.plane[:, column] if column >= 0 else None
        if values is None:
            return [*range(self.count)][::-1 if is_descending else 1]
        order = values.argsort(kind="stable")
        if not is_descending:
            return order
        known = self.count - int((values != values).sum())
        return [*order[:known][::-1].tolist(), *order[known:].tolist()]

    def cells(self, rows, columns):
        numbers = range(*rows.indices(self.count)) if isinstance(rows, slice) else rows
        part = self.plane[rows] if self.names else self.plane[rows, columns]
        lines = ([*row][columns] if self.names else row for row in part)
        return [[str(n), *map(cell_text, line)] for n, line in zip(numbers, lines, strict=False)]

    def brief(self):
        items = [cell_text(item) for item in itertools.islice(self.value.flat, FEW_ITEMS)]
        return f"[{', '.join(items)}{', …' * (self.value.size > FEW_ITEMS)}]"


class RecordsTable:
    """A list of dicts, as JSON has them."""

    def __init__(self, value, at):
        self.value, self.count = value, len(value)
        self.names = [*dict.fromkeys(name for row in value[:SAMPLE] for name in row)]
        self.width = len(self.names)

    def column(self, n, rows):
        return [row.get(self.names[n], "") if isinstance(row, dict) else row for row in rows]

    def heads(self):
        sample = self.value[:SAMPLE]
        kinds = [{type(item) for item in self.column(n, sample)} for n in range(self.width)]
        return ["", *([cell_text(name), ", ".join(sorted(kind.__name__ for kind in kinds)),
                       kinds <= {int, float, bool}]
                      for name, kinds in zip(self.names[:MOST_COLUMNS], kinds, strict=False))]

    def order(self, column, is_descending):
        positions = range(self.count)
        if column < 0:
            return [*positions][::-1 if is_descending else 1]
        items = self.column(column, self.value)
        try:
            return sorted(positions, key=items.__getitem__, reverse=is_descending)
        except TypeError:   # of several types, which Python cannot compare
            return sorted(positions, key=lambda n: str(items[n]), reverse=is_descending)

    def cells(self, rows, columns):
        numbers = range(*rows.indices(self.count)) if isinstance(rows, slice) else rows
        part = [self.value[n] for n in numbers]
        texts = [map(cell_text, self.column(n, part)) for n in range(self.width)[columns]]
        return [[*row] for row in zip(map(str, numbers), *texts, strict=False)]

    def brief(self):
        return ", ".join(map(cell_text, self.names[:FEW_ITEMS]))


TABLES = [("pandas", "DataFrame", PandasTable), ("pandas", "Series", PandasTable),
          ("pandas", "Index", PandasTable), ("polars", "DataFrame", PolarsTable),
          ("polars", "Series", PolarsTable), ("numpy", "ndarray", ArrayTable)]


def table_of(value, at=()):
    """A value as a table, or None. A library that nobody has imported has made no value."""
    cls = type(value)
    if cls.__module__ == "builtins" and cls is not list:
        return None
    if cls is list:
        are_dicts = value and all(type(item) is dict for item in value[:FEW_ITEMS])
        return RecordsTable(value, at) if are_dicts else None
    for library, name, make in TABLES:
        known = getattr(sys.modules.get(library), name, None)
        if isinstance(known, type) and issubclass(cls, known):
            is_scalar = make is ArrayTable and value.ndim == 0
            return None if is_scalar else make(value, at)
    return None


class RowSearch:
    """The rows of a table that have a text in a cell, as it is shown, as far as it has looked."""

    def __init__(self, text):
        self.wanted = text.casefold()
        self.rows, self.next, self.is_over = [], 0, False

    def go_on(self, table):
        until = monotonic() + SEARCH_SECONDS
        width = min(table.width, MOST_COLUMNS)
        block = SEARCHED_CELLS // max(1, width) + 1
        while self.next < table.count and monotonic() < until:
            lines = table.cells(slice(self.next, self.next + block), slice(0, width))
            self.rows += [n for n, line in enumerate(lines, self.next)
                          if self.wanted in "\0".join(line).casefold()]
            self.next += block
        self.is_over = self.next >= table.count


# -- answers --

class Variables:
    """The variables of a namespace, for who asks for them: see the head of the section."""

    def __init__(self, namespace):
        self.namespace = namespace
        self.slow = collections.Counter()   # (name, id of its value) -> how often it was too slow
        self.sorted = (None, None)   # (what for, the order) of the latest table that was sorted
        self.searches = {}           # what for -> RowSearch, the latest last

    def answer(self, ask):
        try:
            if "path" not in ask:
                return {"names": self.names()}
            worker = Worker(lambda worker: self.look(ask))
            if not worker.wait(TABLE_SECONDS / 2):
                return {"problem": f"It takes more than {TABLE_SECONDS} s."}
            if worker.error:
                raise worker.error
            return worker.answer
        except Exception as error:
            return {"problem": f"{type(error).__name__}: {shortened(str(error), MOST_CELL)}"}

    def names(self):
        """A row for each name, in the order in which they were made."""
        items, rows = self.namespace.copy(), {}
        until = monotonic() + NAMES_SECONDS
        while True:
            worker = Worker(lambda worker: self.tell_names(worker, items, rows, until))
            if worker.wait(SLOW_SECONDS / 2):
                break
            name = worker.at
            self.slow[name, id(items[name])] += 1
            rows.setdefault(name, self.row(name, items[name], is_slow=True))
        if worker.error:
            raise worker.error
        return [*rows.values()]

    def tell_names(self, worker, items, rows, until):
        """In the worker's thread: the rows of those names that have none yet."""
        for name, value in items.items():
            if name in rows:
                continue
            worker.step(name)
            # Once may be chance: a cell has computed in C meanwhile.
            is_slow = self.slow[name, id(value)] > 1 or monotonic() > until
            row = self.row(name, value, is_slow)
            rows.setdefault(name, row)

    def row(self, label, value, is_slow=False):
        cls = type(value)
        label = str(label)
        if cls in PLAIN_TYPES:
            return [label, cls.__name__, "", -1, brief(value), "text", label[:1] == "_"]
        is_hidden = label[:1] == "_" or issubclass(cls, DEFINITIONS) or label in SHELL_NAMES
        is_ours = cls in ENDS or cls in (str, bytes)
        size, count = how_many(value) if is_ours or not is_slow else ("", -1)
        text = "its __repr__ takes too long" if is_slow else brief_safely(value)
        return [label, cls.__name__, size, count, text, opens_as(value), is_hidden]

    def look(self, ask):
        value = self.value_at(ask["path"])
        if "items" in ask:
            pairs, count = pairs_of(value)
            found = itertools.islice(pairs, *ask["items"])
            return {"rows": [self.row(label, item) for label, item in found], "count": count}
        table = table_of(value, ask.get("at") or ())
        if ask.get("filter"):
            return self.found(table, ask)
        if "rows" in ask:
            rows = self.order(table, ask) if ask.get("sort") else None
            return {"cells": self.cells(table, rows, ask), "count": table.count}
        label, kind, size, count, text, opens, _ = self.row(ask["path"][-1], value)
        about = {"type": kind, "size": size, "count": count, "text": text, "opens": opens}
        if table:
            index, *columns = table.heads()
            shape = [int(n) for n in getattr(value, "shape", ())]
            return {**about, "count": table.count, "width": table.width, "index": index,
                    "columns": columns, "shape": shape}
        if opens == "tree":
            return {**about, "count": pairs_of(value)[1]}
        return {**about, "whole": whole_text(value)}

    def value_at(self, path):
        name, *positions = path
        if name not in self.namespace:
            raise LookupError(f"there is no variable {name} any more")
        value = self.namespace[name]
        for n in positions:
            pairs, _ = pairs_of(value)
            found = [*itertools.islice(pairs, n, n + 1)]
            if not found:
                raise LookupError("it has changed, and that is not in it any more")
            value = found[0][1]
        return value

    def order(self, table, ask):
        """The numbers of all rows, in an order."""
        key = [ask["edition"], ask["path"], ask.get("at"), ask["sort"]]
        if self.sorted[0] != key:
            self.sorted = key, table.order(*ask["sort"])
        return self.sorted[1]

    def found(self, table, ask):
        """The rows with a text: those that were found, and those that are found in a moment."""
        key = json.dumps([ask["edition"], ask["path"], ask.get("at"), ask["filter"]])
        search = self.searches[key] = self.searches.pop(key, None) or RowSearch(ask["filter"])
        if len(self.searches) > MOST_SEARCHES:
            del self.searches[next(iter(self.searches))]
        search.go_on(table)
        rows = search.rows
        if ask.get("sort"):
            wanted = {*rows}
            rows = [n for n in map(int, self.order(table, ask)) if n in wanted]
        return {"cells": self.cells(table, rows, ask), "count": len(rows), "of": table.count,
                "is_whole": search.is_over, "looked": min(search.next, table.count)}

    def cells(self, table, rows, ask):
        """A page of rows: of those with these numbers, or of all."""
        page = slice(*ask["rows"])
        if rows is not None:
            page = [int(n) for n in rows[page]]
        return table.cells(page, slice(*ask["columns"]))


def opens_as(value):
    """What a click on a value opens."""
    cls = type(value)
    if cls in PLAIN_TYPES or cls in (str, bytes):
        return "text"
    try:
        return "table" if table_of(value) else "tree" if pairs_of(value)[1] else "text"
    except Exception:   # an object that is odd
        return "text"


class Told:
    """An answer as a value that any kernel shows as JSON."""

    def __init__(self, answer):
        self.answer = answer

    def __repr__(self):
        return "<variables>"

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"application/json": self.answer}


def told(namespace, ask):
    """The answer of a namespace whose Variables are kept for the next question."""
    if KEPT.get("namespace") is not namespace:
        KEPT.update(namespace=namespace, variables=Variables(namespace))
    return Told(KEPT["variables"].answer(json.loads(ask)))


KEPT = {}


# -- in this kernel --

FEATURES.append("minijupyter variables")


@EXTRAS.append
def have_variables(kernel):
    kernel.variables = Variables(kernel.interpreter.namespace)
    answer_in_thread(kernel, "variables")


@handles("variables")
def variables_request(kernel, request):
    """Not in the specification: see the head of the section."""
    kernel.outbox.scope.set(scope_of(request["header"]))   # what a `__repr__` prints is no cell's
    return {"status": "ok", **kernel.variables.answer(request["content"])}


# ---- 32. Automagic -----------------------------------------------------------------------------
#
# `ls`, `cd data`, `time f()`: a magic without its %, as in IPython, where Python would fail anyway.
# A line is taken for a magic when its first word is the name of one, nothing has bound that name,
# the line begins a statement at the left edge of the cell, and
#
#     cd data, time f()   it is no Python, or
#     ls, ls -l, cd /a    it is a lone name, or one with an option or a path: in Python a NameError
#
# IPython looks at cells of one line only; here a cell may go on, as below `pip install pandas`. To
# switch it off, run `%automagic off`.

LONE_LINE = re.compile(r"([^\W\d]\w*)(?:[ \t]+(?:--?|/)\w[^=]*)?[ \t]*")
# What follows a word that Python must have meant otherwise: operators, and the words of a sentence
NO_ARGUMENTS = re.compile(r"\s*(?:$|[,:]|[-+*/%@&|^<>=!]*=|(?:is|in|not|and|or|if|else|for)\b)")
BINDING = (ast.Store, ast.Del)


class Automagic:
    """Finds the lines of a cell that call a magic without its %."""

    def __init__(self, magics):
        self.magics, self.is_on = magics, True
        magics.magic_automagic, magics.lone = self.switch, self.lone

    def switch(self, line, cell):
        """Let a magic be called without its %: `%automagic on`, `%automagic off`, or the other."""
        self.is_on = {"on": True, "1": True, "true": True, "off": False, "0": False,
                      "false": False}.get(line.strip().lower(), not self.is_on)
        print(f"Automagic is {'on' if self.is_on else 'off'}: a magic "
              f"{'needs no' if self.is_on else 'needs its'} % before its name.")

    def is_magic(self, name):
        """Is this the name of a line magic, and of nothing else?"""
        magics = self.magics
        cells = (*magics.CELL_ONLY, *magics.RICH_CELLS, *magics.SCRIPT_CELLS)
        return self.is_on and not self.is_bound(name) and name not in cells \
            and name in magics.names()

    def is_bound(self, name):
        return name in self.magics.user_ns or name in vars(builtins)

    def call(self, lines, at):
        """The Python for line `at`, at which the parser has stopped; None when it is no magic."""
        line = lines[at].rstrip()
        name, rest = re.match(r"(\w*)(.*)", line, re.S).groups()
        is_install = self.is_on and not self.is_bound(name) and offered("is_install", line)
        if not is_install and (NO_ARGUMENTS.match(rest) or not self.is_magic(name)
                               or not is_balanced(rest)):
            return None
        if self.magics.shell and len(lines) > 1:   # IPython would not take it
            return None
        return magic_call(f"{'!' if is_install else '%'}{line}") if self.begins(lines, at) else None

    def begins(self, lines, at):
        """Does line `at` begin a statement, and do those before it not bind its first word?"""
        name = re.match(r"\w*", lines[at])[0]
        try:
            tree = compile("\n".join(lines[:at]), "<automagic>", "exec",
                           ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, True)
        except (SyntaxError, ValueError):
            return False
        return not any(isinstance(node, ast.Name) and isinstance(node.ctx, BINDING)
                       and node.id == name or isinstance(node, ast.alias)
                       and name in (node.name, node.asname) for node in ast.walk(tree))

    def lone_magics(self, tree, code):
        """The tree of a cell, its statements such as `ls` or `cd /a` replaced by calls of `lone`.
        It decides when it runs: by then, the cell may have bound the name."""
        for statement in tree.body:
            name = first_name(statement)
            if name is None or self.is_bound(name) or not self.is_magic(name):
                continue
            line = code.split("\n")[statement.lineno - 1].rstrip()
            if LONE_LINE.fullmatch(line.lstrip()):
                call = ast.parse(f"__shell__.lone({line.strip()!r})").body[0].value
                for node in ast.walk(call):
                    ast.copy_location(node, statement)
                statement.value = call
        return tree

    def lone(self, line):
        """The value of a line such as `ls`, if its name is bound by now; else the magic's."""
        names, (name, _, rest) = callers_names(self.magics.user_ns), line.partition(" ")
        if name in names:
            return eval(line, names)
        return self.magics.line(name, rest.strip())


def first_name(statement):
    """The name that a statement such as `ls` or `ls -l` begins with; None of another statement."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    while isinstance(value, ast.BinOp):
        value = value.left
    return value.id if isinstance(value, ast.Name) else None


def is_balanced(text):
    """Is each bracket closed? Else the statement goes on in the next line."""
    return all(text.count(opened) == text.count(closed) for opened, closed in ("()", "[]", "{}"))


@EXTRAS.append
def have_automagic(kernel):
    if magics := getattr(kernel.interpreter, "magics", None):
        automagic = Automagic(magics)
        OFFERS.update(automagic=automagic.call, lone_magics=automagic.lone_magics)


# ---- 33. Packages ------------------------------------------------------------------------------
#
# `%pip install X` installs into the Python that runs this kernel, with what there is:
#
#     pip is there       python -m pip …
#     no pip, but uv     uv pip … --python PYTHON      (as in environments that uv has made)
#     neither            python -m ensurepip, then the first
#
# A shell's `pip` may belong to another Python. So `!pip install X`, or `pip install X` alone, is
# done by `%pip`, and a line says so. What the program prints is plain text, also on its stderr: uv
# tells its progress there, and red would look like a failure. The last line is ours:
#
#     it has installed something     Installed: pandas 2.3.3, with 5 more that it needs. You can …
#     it had nothing to do           Already there: pandas 2.3.3.
#     it has removed something       Removed: pandas 2.3.3.
#     it has failed                  an error of the cell: why, in one line (FAILURES)
#
# What was imported before it was changed stays as it is in memory: then the line says that.

# `python -m pip` would import from the notebook's folder.
RUN_PIP = ("import sys; sys.path[:] = filter(None, sys.path); import runpy; "
           "runpy.run_module('pip', run_name='__main__', alter_sys=True)")
SHELL_PIP = re.compile(r"\s*(?:\"?[^\s\"]*python[\d.]*\"?\s+-m\s+|uv\s+)?pip[\d.]*\s+"
                       r"(?=(?:un)?install\s)")
NO_PIP = ("{} has no pip, its ensurepip has failed, and there is no uv. Install uv "
          "(https://docs.astral.sh/uv/), or start the kernel from a virtual environment.")
# What pip, uv or conda says, the first that is found -> what it means; {} is what its group holds
FAILURES = (
    (r"dns error|lookup address|name resolution|name or service not known|getaddrinfo failed|"
     r"establish a new connection|error sending request|\(Connect\)|connection refused|"
     r"connect(?:ion)? ?timed? ?out|network (?:is unreachable|was disabled)|CondaHTTPError",
     "no connection to the package index. Is this computer online?"),
    (r"requirement (\S+) .*?\(from versions: (?!none)|there is no version of (\S+)",
     "the index has no {} that fits this Python. Try it without a version."),
    (r"No matching distribution found for (\S+)|Because (\S+) was not found in|"
     r"PackagesNotFoundError.*?- (\S+)", "no package is called {}. Check the spelling."),
)
NAMED = 5   # packages at most that the last line names
CONDA_CHANGES = ("install", "update", "upgrade", "remove", "uninstall")
NBFORMAT = "5.10.4"   # plotly and others look for nbformat's version, and for nothing else of it


class Installer:
    """The magics `%pip`, `%uv` and `%conda`."""

    def __init__(self, magics):
        self.magics, self.python = magics, f'"{sys.executable}"'
        for name in ("pip", "uv", "conda"):
            setattr(magics, f"magic_{name}", getattr(self, name))

    def pip(self, line, cell):
        """Run pip in this kernel's environment: `%pip install NAME`; uv where there is no pip."""
        __tracebackhide__ = True
        if not has_pip() and not uv_program():
            self.magics.run_visibly(f"{self.python} -I -m ensurepip --default-pip")
            importlib.invalidate_caches()
            if not has_pip():
                raise RuntimeError(NO_PIP.format(sys.executable))
        if not has_pip():
            return self.uv(f"pip {line}", cell)
        if line.startswith("uninstall ") and not re.search(r"\s(?:-y|--yes)\b", line):
            line += " --yes"   # nobody could answer its question
        command = f'{self.python} {" ".join(SAFE_PATH)} -c "{RUN_PIP}" {line}'
        return self.run(f"pip {line}", command)

    def uv(self, line, cell):
        """Run uv: `%uv pip install NAME` installs into this kernel's environment."""
        if not (uv := uv_program()):
            raise RuntimeError("There is no uv here: %pip install uv")
        words = re.match(r"pip\s+(\S+)(.*)", line, re.S)
        arguments = f"pip {words[1]} --python {self.python}{words[2]}" if words else line
        self.run(f"uv {line}", f'"{uv}" {arguments}')

    def conda(self, line, cell):
        """Run Conda for this kernel's environment: `%conda install NAME`."""
        programs = filter(None, map(own("shutil").which, ("conda", "mamba", "micromamba")))
        program = os.environ.get("CONDA_EXE") or next(programs, None)
        if not os.path.isdir(os.path.join(sys.prefix, "conda-meta")) or not program:
            raise RuntimeError("This kernel runs in no Conda environment: use %pip install")
        task, _, arguments = line.partition(" ")
        if task in CONDA_CHANGES:
            task += f' --yes --prefix "{sys.prefix}"'
        self.run(f"conda {line}", f'"{program}" {task} {arguments}')

    def run(self, name, command):
        """Run it, let Python find what is new, and tell what that is. Raises NotDone."""
        __tracebackhide__ = True   # so IPython leaves out frames of ours
        before = distributions()
        said = self.show(command)
        self.find_new()
        if self.magics.user_ns["_exit_code"]:
            raise NotDone(why_not(name, said))
        if news := news_in_words(name, before):
            print(news)

    def show(self, command):
        """Run a command and show all that it prints as plain text. Returns the end of it."""
        subprocess, last = own("subprocess"), collections.deque(maxlen=200)
        process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT)
        try:
            with io.TextIOWrapper(process.stdout, "utf-8", "replace", newline="") as lines:
                for line in lines:
                    print(line, end="", flush=True)
                    last.append(line)
            self.magics.user_ns["_exit_code"] = process.wait()
        except KeyboardInterrupt:
            process.kill()
            raise KeyboardInterrupt from None
        return "".join(last)

    def find_new(self):
        """Python has remembered which folders had which files; and where only the user's own folder
        of packages can be written, it may not have been there when the kernel started."""
        with own_imports():
            importlib.invalidate_caches()
        site = own("site")
        folder = site.getusersitepackages() if site.ENABLE_USER_SITE else ""
        if os.path.isdir(folder) and folder not in sys.path:
            site.addsitedir(folder)

    def instead(self, command):
        """Do what a shell command would install, by `%pip`; False for any other command."""
        __tracebackhide__ = True
        if not (match := SHELL_PIP.match(command)):
            return False
        line = command[match.end():]
        print(f"Run as %pip {line.strip()}, for the Python of this kernel.", flush=True)
        self.pip(line, None)
        return True


def has_pip():
    return importlib.machinery.PathFinder.find_spec("pip", PYTHON_PATH) is not None


def uv_program():
    """The path of uv; `uv run` tells its own."""
    return os.environ.get("UV") or own("shutil").which("uv")


class NotDone(Exception):
    """Packages were not changed. What the program said stands above, so that one line is enough."""

    def _render_traceback_(self):
        return [str(self)]


def why_not(name, said):
    """Why a command like `pip install X` has failed, in one line for the user."""
    what = "Not removed" if "uninstall" in name else "Not installed"
    text = re.sub(r"[\s│]+", " ", said)   # uv breaks its lines
    for pattern, meaning in FAILURES:
        if match := re.search(pattern, text, re.I):
            thing = next(filter(None, match.groups()), "")
            return f"{what}: {meaning.format(thing.rstrip(',;:'))}"
    return f"{what}: {name.split(None, 1)[0]} has failed, and says above why."


def news_in_words(name, before):
    """What a command like `pip install X` has changed since `before`; "" when that is nothing."""
    after = distributions()
    if gone := [each for each in before if each not in after and "uninstall" in name]:
        return f"Removed: {named_some(gone)}."
    asked = {normal(word) for word in re.findall(r"\w[\w.-]*", name.partition("install ")[2])}
    new = [each for each in after if each not in before]
    if not new:
        there = [each for each in after if normal(each.partition("-")[0]) in asked]
        return f"Already there: {named_some(there)}." if there else ""
    wanted = [each for each in new if normal(each.partition("-")[0]) in asked] or new
    others = len(new) - len(wanted)
    it, needs = ("it", "it needs") if len(wanted) == 1 else ("them", "they need")
    more = f", with {others} more that {needs}" if others else ""
    old, stand_ins = changed_in_memory(before)
    use = f"You can use {it} now." if not old else \
        f"Restart the kernel to use {it}: the old {', '.join(old)} is in memory."
    if stand_ins:
        use += (f" Restart the kernel only if you want all of {', '.join(stand_ins)}: what is in "
                "memory is a small stand-in, which is enough for most.")
    return f"Installed: {named_some(wanted)}{more}. {use}"


def normal(name):
    """The name of a package as it is compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named_some(distributions):
    """`numpy 2.4.0, scikit-learn 1.8.0` of the names of dist-info folders; of many, the first."""
    names = [each.removesuffix(".dist-info").replace("-", " ", 1).replace("_", "-")
             for each in sorted(distributions, key=str.lower)]
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def distributions():
    """{`numpy-2.4.0.dist-info`: its path} of all that this Python finds."""
    return {name: os.path.join(entry, name) for entry in reversed(sys.path)
            for name in (os.listdir(entry) if os.path.isdir(entry) else ())
            if name.endswith(".dist-info")}


def changed_in_memory(before):
    """Two lists of modules that were imported and are not what is installed now: those of another
    version than `before`, and stand-ins for what was missing then."""
    known, old, stand_ins = {name.partition("-")[0] for name in before}, set(), set()
    for name, path in distributions().items():
        if name in before:
            continue
        for module in modules_of(path) & sys.modules.keys():
            if is_stand_in(sys.modules[module]):
                stand_ins.add(module)
            elif name.partition("-")[0] in known:
                old.add(module)
    return sorted(old), sorted(stand_ins)


def modules_of(path):
    """The names of the modules, not those in packages, of a distribution with this path."""
    with contextlib.suppress(OSError, ValueError), \
            open(os.path.join(path, "RECORD"), encoding="utf-8") as file:
        return {re.match(r"\w*", line)[0] for line in file}
    return set()


def is_stand_in(module):
    return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), StandIns)


def fill_nbformat(module, kernel):
    """Make a stand-in for nbformat, which plotly and others look for, and do not use."""
    def missing(name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModuleNotFoundError("No module named 'nbformat'", name="nbformat")

    module.__version__, module.__getattr__ = NBFORMAT, missing


@EXTRAS.append
def have_packages(kernel):
    if magics := getattr(kernel.interpreter, "magics", None):
        OFFERS["install_instead"] = Installer(magics).instead


OFFERS["is_install"] = SHELL_PIP.match
STAND_INS["nbformat"] = fill_nbformat


# ---- 34. Install -------------------------------------------------------------------------------

def install(arguments):
    """`kernel.py install`: write a kernel spec (JEP 105); every Jupyter then lists this kernel."""
    parser = own("argparse").ArgumentParser(prog="kernel.py install")
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


COMMANDS["install"] = install


# ==== End of Part II ====

if __name__ == "__main__":
    main()
