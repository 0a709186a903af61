#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["pyzmq"]
# ///
"""The notebook server: it serves the page, keeps the files, and stands between page and kernels.

Run:  python minijupyter.py [FOLDER]      (then open the address that it prints)

    browser                         this server                              kernel process
    index.html  -- REST ------->    Handler -> Contents, Kernels, Sessions
                -- WebSocket -->    Bridge   -- requests -->  Watcher  -- shell, control, stdin -->
                <---------------             <- mailbox ---            <- iopub, replies, its end --

Part I is the architecture, complete: it runs alone. Read it in order: 1 Documents and files ·
2 Kernel specs · 3 Kernels · 4 Sessions · 5 WebSocket · 6 The bridge · 7 Who may come in · 8 HTTP ·
9 main. Part II is everything else that people expect, each feature a section of its own.

Part I's extension points, and what is plugged in there:

    DOCUMENTS, UPGRADES    ways to read and write notebooks        byte for byte, old formats
    MEND                   what makes a notebook's cells whole     defaults
    CONTENTS               subclasses of Contents, the last used   checkpoints, uploads, copies …
    CODEC                  how models become JSON and back         large things, piece by piece
    TEMPORARIES, FOLDERS   how a file is written, a folder held    locks, owners, leftovers
    REPLACE                how a file takes another one's place    hard links, mounts
    AFTER_SAVE             functions, when a file was saved        journal
    KERNEL_EXTRAS          called with each new KernelProcess      journal, orphans, Under the hood
    kernel.on_request, on_publish, on_join, on_end                 journal
    kernel.on_launch, on_exit, gates                               orphans, Under the hood
    OUTPUTS                what a process says itself, by system   Windows
    PORTS, REPAIRS         where a kernel is reached, tried again  socket files, new ports
    FOLLOWERS              ?journal= -> class of a mailbox         journal
    OWN_CHANNELS           channels between page and server        journal
    EXTENSIONS, LAYOUTS    of a WebSocket, of messages on it       compression, the v1 layout
    ROUTES, OPEN_TO_ALL    method, path, endpoint                  login, checkpoints, many others
    HANDLERS, SERVERS      subclasses of both, the last used       slow clients, strangers
    CODINGS                transfer coding -> its reader           bodies in chunks
    CHECKS, SPEC_CHECKS    what a body and a kernel.json may say   bad wishes
    SPEC_FOLDERS, OWN_SPECS   kernel specs: where to look; ours    `jupyter --paths`, .venv
    BEFORE, AFTER          functions of the handler                Under the hood, strangers
    ADMITTED               functions of the handler                strangers, activity
    TAPS                   who hears of bytes at the edge          Under the hood
    OPTIONS, AT_START      of the command line, and to obey them   password, TLS, idle kernels
    COMMANDS               first word -> function                  list, stop, run, console …
    ACCESS                 subclasses of Access, the last used     password, tokens in UTF-8
    SPELLINGS              how a secret is found in what is shown  every encoding
    server.wrap            socket -> what connections speak by     TLS

Of a cell's journey (README) it holds stations 2, 3 and 11, each marked at its line: a WebSocket
frame is put together, the signed request leaves, and what comes back is handed on as it came. (1
and 12 are in index.html, 4 to 10 in kernel.py.)

Left out on purpose: users, extensions, a database. One person, one folder, one token.

Threads: *main* accepts connections; one per HTTP connection, which becomes the bridge's when the
connection turns into a WebSocket; one *watcher* per kernel process, which owns all sockets to it.
Sources: Jupyter Server's REST API (jupyter_server, api.yaml), nbformat 4.5, RFC 9110 and 9112
(HTTP), RFC 6455 (WebSocket), the Jupyter messaging specification 5.5.
"""
import argparse
import atexit
import base64
import codecs
import collections
import contextlib
import errno
import functools
import gc
import hashlib
import hmac
import html
import io
import itertools
import json
import math
import mimetypes
import os
import random
import re
import secrets
import shutil
import signal
import socket
import stat
import string
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
import weakref
import zlib
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

try:
    import zmq
except ImportError:
    sys.exit("MiniJupyter needs pyzmq: run `pip install pyzmq`.")

try:
    import fcntl
except ImportError:   # Windows
    fcntl = None

import kernel as our_kernel
from kernel import POSIX, Session, to_json  # POSIX: signals, process groups, polled pipes

__version__ = our_kernel.__version__
HERE = os.path.dirname(os.path.abspath(__file__))


class Problem(Exception):
    """A request that cannot be done: becomes a JSON error `{"message", "reason"}` with `status`."""

    def __init__(self, status, message, reason=None):
        super().__init__(message)
        self.status, self.message, self.reason = status, message, reason
        self.more, self.headers = {}, {}   # further members of the answer, further headers


def iso(seconds):
    """A time as Jupyter writes it: 2026-11-22T16:56:22.077384Z, always with microseconds. What no
    calendar has (a file may claim any time) is the beginning of 1970."""
    try:
        moment = datetime.fromtimestamp(seconds, timezone.utc)
        return moment.isoformat(timespec="microseconds")[:-len("+00:00")] + "Z"
    except (ValueError, OverflowError, OSError):
        return iso(0)


@functools.lru_cache(1)
def http_date(second):
    """A time as HTTP writes it (RFC 9110 5.6.7): Sun, 06 Nov 1994 08:49:37 GMT."""
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second))


def written_date(written):
    """The same of a time as `iso` writes it."""
    moment = datetime.fromisoformat(written.removesuffix("Z")).replace(tzinfo=timezone.utc)
    return http_date(moment.timestamp())


LEVELS = ("debug", "info", "warning", "error")


def log(text, level="warning"):
    """A line for the terminal, if there still is one and the level is asked for. Clients choose
    part of many texts: what would command the terminal is shown by its escape."""
    if LEVELS.index(level) >= LEVELS.index(log.level):
        shown = "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1]
                        for each in text)
        with contextlib.suppress(OSError, ValueError):
            print(shown, file=sys.stderr, flush=True)


log.level = "warning"
# Functions (kind, way, about, parts). They are called with all bytes that enter ("in") or leave
# ("out") the server: WebSocket frames, parts of ZeroMQ messages, what is done to a process.
TAPS = []


# ---- 1. Documents and files: what is below the root --------------------------------------------
#
# A notebook is a JSON file (nbformat 4). On disk long strings are lists of lines, so that a diff
# reads well; in the API they are whole strings. Reading joins them, writing splits them. A newer
# minor version than ours is kept as it is, and what we do not know (keys, output types, MIME types)
# is carried along untouched.
#
# The API's paths are relative to the root, with slashes. `Contents.look` is the one door from such
# a path to the disk: nothing outside the root, no hidden file, no link that leads out and nothing
# of Jupyter's runtime folder (tokens and keys) passes it.

NOTEBOOK_FIELDS = {"cells": list, "metadata": dict, "nbformat_minor": int}
OUTPUT_FIELDS = {"output_type": str}
ANY_CELL_FIELDS = {"cell_type": str, "metadata": dict}
CELL_FIELDS = {  # cell_type -> what it must have, of which type
    "code": {"source": (str, list), "outputs": list},
    "markdown": {"source": (str, list)}, "raw": {"source": (str, list)}}
ID_MINOR = 5     # the minor version of nbformat 4 that gave cells an id
is_json = re.compile(r"application/json|.*\+json", re.S).fullmatch
is_id = re.compile(r"[A-Za-z0-9_-]{1,64}").fullmatch
JSON = json.JSONDecoder(parse_constant=str)   # NaN, which JSON has not, is read as its name
REQUEST = json.JSONDecoder(parse_constant=lambda name: None)   # … or null, as from a browser
UNTITLED = {"notebook": ("Untitled", ".ipynb"), "file": ("untitled", ""),
            "directory": ("Untitled Folder", "")}
NOT_THERE = "not there"     # what a file must be for a save that may overwrite nothing
LEFTOVERS = ("~", ".pyc", ".pyo")   # what no listing shows, as in Jupyter
NO_CONTENT = {".ipynb_checkpoints", "__pycache__", ".DS_Store"}   # a folder with these is empty
AFTER_SAVE = []   # functions(server, path, model), called when a file was saved


class NotANotebook(ValueError):
    """The text is no notebook that we can read; says what is wrong and where (a JSON pointer)."""


def is_split_mime(mime):
    """True for the types that are written as lists of lines."""
    return mime.startswith("text/") or mime in ("application/javascript", "image/svg+xml")


def join(text):
    try:
        return "".join(text) if isinstance(text, list) else text
    except TypeError:   # not a list of strings
        return text


def split(text):
    """A string as its lines. Only \\n ends one: U+2028 and the like are part of a line."""
    return re.findall(r"[^\n]*\n|[^\n]+", text) if isinstance(text, str) else text


def map_strings(cell, convert, is_converted=lambda mime: not is_json(mime)):
    """A copy of `cell` with `convert` applied to its source and to the text in its outputs."""
    cell = {**cell}
    if "source" in cell:
        cell["source"] = convert(cell["source"])
    if isinstance(cell.get("outputs"), list):
        cell["outputs"] = [map_output(output, convert, is_converted) for output in cell["outputs"]]
    return cell


def map_output(output, convert, is_converted):
    if output["output_type"] == "stream" and "text" in output:
        return {**output, "text": convert(output["text"])}
    if isinstance(output.get("data"), dict):
        return {**output, "data": {mime: convert(data) if is_converted(mime) else data
                                   for mime, data in output["data"].items()}}
    return output


# JSON, read step by step by the sections of Part II that keep a file's form, and that read what is
# large.

def skip_space(text, at, space=re.compile(r"[ \t\r\n]*")):
    return space.match(text, at).end()


def skip(mark, text, at):
    """Where the next thing begins, after the mark that must stand at `at`."""
    if not text.startswith(mark, at):
        raise json.JSONDecodeError(f"Expecting {mark!r}", text, at)
    return skip_space(text, at + 1)


def read_entries(text, at, end_mark, read_entry):
    """Read the JSON list or object that opens at `at`; returns where it ends.

    `read_entry(at)` reads one entry and returns its end.
    """
    at = skip_space(text, at + 1)
    is_empty = text.startswith(end_mark, at)
    while not is_empty:
        at = skip_space(text, read_entry(at))
        if text.startswith(end_mark, at):
            break
        at = skip(",", text, at)
    return at + 1


class PlainDocument:
    """A notebook file in Jupyter's own form, read and written as a whole. Raises NotANotebook.

    data = its bytes
    served = the notebook as the API gives it: strings joined, ids in 4.5
    """

    def __init__(self, data):
        try:
            text = data.decode("utf-8-sig")
            notebook = JSON.decode(text) if text.strip() else new_notebook()
        except (ValueError, RecursionError) as problem:
            raise NotANotebook(f"the file is not JSON: {problem}") from None
        notebook, _, _ = current(notebook)
        cells = [map_strings(cell, join) for cell in notebook["cells"]]
        self.data, self.served = data, as_served(notebook, cells)

    @classmethod
    def written(cls, notebook, old=None):
        """The document that says what a good notebook says; `old` is what the file says now."""
        cells = [map_strings(cell, split, is_split_mime) for cell in notebook["cells"]]
        try:
            text = json.dumps({**notebook, "cells": cells}, ensure_ascii=False, indent=1,
                              sort_keys=True, allow_nan=False)
        except ValueError:
            raise NotANotebook("it holds a number that JSON has not") from None
        return cls(encode_text(text + "\n"))

    @functools.cached_property
    def hash(self):
        return sha256(self.data)


DOCUMENTS = [PlainDocument]   # ways to read and write notebook files: the last one is used
# Functions of a notebook -> (the same with whole cells, numbers or names of what was not whole):
# the last.
MEND = [lambda notebook: (notebook, ())]
UPGRADES = {}                 # older nbformat -> function(notebook of that version) -> of version 4


def current(notebook):
    """(the notebook in nbformat 4, its version in the file, what was mended). Raises
    NotANotebook."""
    version = notebook.get("nbformat") if isinstance(notebook, dict) else None
    if not isinstance(version, int):
        raise NotANotebook("the file is JSON, but not a notebook: it has no nbformat number")
    if version in UPGRADES:
        notebook = UPGRADES[version](notebook)
    elif version != 4:
        known = ", ".join(map(str, sorted([*UPGRADES, 4])))
        raise NotANotebook(f"this is nbformat {version}; what can be read is nbformat {known}")
    notebook, mended = MEND[-1](notebook)
    validate(notebook)
    return notebook, version, mended


def validate(notebook):
    """Raise NotANotebook with the JSON pointer (RFC 6901) of the first part that nobody could
    draw."""
    expect({"nbformat_minor": 0, **notebook}, NOTEBOOK_FIELDS)
    for i, cell in enumerate(notebook["cells"]):
        expect(cell, ANY_CELL_FIELDS, f"/cells/{i}")
        # Other types may come with a later minor version.
        expect(cell, CELL_FIELDS.get(cell["cell_type"], {}), f"/cells/{i}")
        outputs = cell.get("outputs", [])
        if not isinstance(outputs, list):
            expect(cell, CELL_FIELDS["code"], f"/cells/{i}")
        for j, output in enumerate(outputs):
            expect(output, OUTPUT_FIELDS, f"/cells/{i}/outputs/{j}")


def expect(value, types, where=""):
    if not isinstance(value, dict):
        raise NotANotebook(f"{where} must be an object")
    for key, kind in types.items():
        if not isinstance(value.get(key), kind):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            problem = f"must be of type {names}" if key in value else "is missing"
            raise NotANotebook(f"{where}/{key} {problem}")


def as_served(notebook, cells):
    """A notebook with these cells, their strings joined, as the API gives it."""
    has_ids = notebook.get("nbformat_minor", 0) >= ID_MINOR
    return {**notebook, "cells": with_ids(cells) if has_ids else cells}


def with_ids(cells):
    """The cells, each with a unique id; a missing one, or one that nbformat forbids, is made from
    place and source, so the same file gives the same ids every time."""
    seen, result = set(), []
    for number, cell in enumerate(cells):
        id, text = cell.get("id"), f"{number} "
        while not isinstance(id, str) or not is_id(id) or id in seen:
            text += str(join(cell.get("source", "")))
            id = sha256(text.encode("utf-8", "replace"))[:8]
            text += " "
        if id != cell.get("id"):
            cell = {**cell, "id": id}
        seen.add(id)
        result.append(cell)
    return result


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def new_notebook():
    return {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": ID_MINOR}


def write_notebook(notebook, old=None):
    """The document that says what `notebook` says; `old` is the one that is on disk now. Raises
    NotANotebook."""
    notebook, _ = MEND[-1](notebook)
    validate(notebook)
    if notebook.get("nbformat") != 4:
        raise NotANotebook("/nbformat must be 4")
    notebook = as_served(notebook, notebook["cells"])
    try:
        return DOCUMENTS[-1].written(notebook, old)
    except RecursionError:
        raise NotANotebook("it is nested too deep") from None


def encode_text(text):
    """A JSON text in UTF-8, which has no halves of surrogate pairs: they are written as escapes."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", text).encode()


CODEC = {   # how models and long texts are read and written: at once
    "model_json": to_json, "read_model": lambda data: REQUEST.decode(data.decode("utf-8-sig")),
    "decode_text": bytes.decode,
    "encode_base64": lambda data: base64.b64encode(data).decode(),
    "decode_base64": lambda texts: base64.b64decode("".join(texts))}


class Contents:
    """Files as the models of Jupyter's contents API. The methods raise Problem, or the OSError of
    the disk, which the HTTP section turns into a status."""

    def __init__(self, root, allow_hidden=False, private=()):
        """`private`: folders that are out of reach even when they lie below the root."""
        self.root, self.allow_hidden = os.path.realpath(root), allow_hidden
        self.private = [os.path.realpath(folder) for folder in private]
        self.lock = threading.Lock()   # while a file is renamed, and for the next
        self.saved = weakref.WeakValueDictionary()   # path -> the Lock of its one save at a time

    def look(self, path):
        """(absolute path on disk, its os.stat_result or None when nothing is there) of an API path.
        Problem 404 for what nobody may see."""
        names = [name for name in path.split("/") if name]
        if not all(map(self.is_visible, names)):
            raise Problem(404, f"No such file or folder: {path}")
        absolute = os.path.join(self.root, *names)
        return absolute, self.kept_inside(absolute, path)

    def resolve(self, path):
        """The absolute path on disk of an API path that need not exist."""
        return self.look(path)[0]

    def kept_inside(self, absolute, path):
        """The os.stat_result of `absolute` (None: nothing is there), unless it leads out of the
        root, or to a pipe or the like."""
        real, info = self.follow(absolute)
        is_odd = info and not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode)
        is_private = any(is_within(real, folder) for folder in self.private)
        if is_odd or is_private or not is_within(real, self.root):
            raise Problem(404, f"No such file or folder: {path}")
        return info

    def follow(self, absolute):
        """(real path, os.stat_result or None) of a path below the root."""
        try:
            return os.path.realpath(absolute), os.stat(absolute)
        except OSError:
            return os.path.realpath(absolute), None

    def is_visible(self, name):
        """False for hidden files and for what is no file name."""
        is_hidden = name.startswith(".") or name == "__pycache__"
        return (self.allow_hidden or not is_hidden) and name not in (".", "..") and is_plain(name)

    def existing(self, path):
        absolute, info = self.look(path)
        if info is None:
            raise Problem(404, f"No such file or folder: {path}")
        return absolute

    def get_json(self, path, *asked):
        """What `get` gives, as JSON: bytes, or a list of them when they are many."""
        return CODEC["model_json"](self.get(path, *asked))

    def document(self, data):
        """The notebook document of these bytes. Raises NotANotebook."""
        return DOCUMENTS[-1](data)

    def written(self, notebook, old):
        """The document that says what `notebook` says; `old`: the file's document now, or None."""
        return write_notebook(notebook, old)

    def hash(self, data):
        return sha256(data)

    def get(self, path, kind=None, form=None, content=True, with_hash=False):
        """The model of a file or folder; `kind` and `form` insist on a type or format."""
        absolute = self.existing(path)
        model = self.model(path, absolute)
        if kind and kind != model["type"]:
            if "directory" in (kind, model["type"]):
                raise Problem(400, f"{path} is a {model['type']}, not a {kind}", "bad type")
            model["type"] = kind
        if content and model["type"] == "directory":
            model.update(format="json", content=self.listing(path, absolute))
        elif model["type"] != "directory" and (content or with_hash):
            data = self.read(absolute)
            if with_hash:
                model.update(hash=self.hash(data), hash_algorithm="sha256")
            if content:
                model.update(self.content(path, model["type"], form, data))
        return model

    def model(self, path, absolute, info=None):
        """The contents model of something that exists, without its content."""
        info = info or os.stat(absolute)
        path = "/".join(name for name in path.split("/") if name)
        kind = ("directory" if stat.S_ISDIR(info.st_mode) else
                "notebook" if path.endswith(".ipynb") else "file")
        return {"name": path.rpartition("/")[2], "path": path, "type": kind,
                "created": iso(info.st_ctime), "last_modified": iso(info.st_mtime),
                "size": None if kind == "directory" else info.st_size,
                "writable": may_write(absolute, info),
                "mimetype": (mimetypes.guess_type(path)[0] if kind == "file" else None),
                "content": None, "format": None, "hash": None, "hash_algorithm": None}

    def listing(self, path, absolute):
        """The models of a folder's visible files and folders in the order of their names."""
        real, models = os.path.realpath(absolute), []
        for name in sorted(os.listdir(real), key=str.casefold):
            if not name.endswith(LEFTOVERS) or self.allow_hidden:
                with contextlib.suppress(OSError, Problem):   # gone by now, or not to be seen
                    models.append(self.entry(path, real, name))
        return models

    def entry(self, folder, real, name):
        """The model of what is in a folder, whose real path is `real`."""
        path = f"{folder}/{name}"
        return self.model(path, self.existing(path))

    def content(self, path, kind, form, data):
        """content, format and mimetype of a file's bytes. Without `form`, text when it is UTF-8."""
        if kind == "notebook":
            try:
                return {"content": self.document(data).served, "format": "json"}
            except NotANotebook as problem:
                text = f"Unreadable notebook {path}: {problem}"
                raise Problem(400, text, "bad notebook") from None
        guessed = mimetypes.guess_type(path)[0]
        if form != "base64":
            try:
                return {"content": CODEC["decode_text"](data), "format": "text",
                        "mimetype": guessed or "text/plain"}
            except UnicodeDecodeError:
                if form == "text":
                    raise Problem(400, f"{path} is not UTF-8 text", "bad format") from None
        return {"content": CODEC["encode_base64"](data), "format": "base64",
                "mimetype": guessed or "application/octet-stream"}

    def read(self, absolute):
        with open(absolute, "rb") as file:
            return file.read()

    def read_if_there(self, absolute):
        return self.read(absolute) if os.path.exists(absolute) else None

    def one_save(self, absolute):
        """The lock of a file: what one save writes the next one reads, but two files are saved at
        the same time."""
        with self.lock:
            return self.saved.setdefault(os.path.realpath(absolute), threading.Lock())

    def save(self, path, model, expected=None, with_hash=False):
        """Write a model's content. `expected` is the hash that the file must have now, "*" (any) or
        NOT_THERE; otherwise Problem 412 (RFC 9110 13.1). Returns (new model, was it created)."""
        absolute, kind = self.resolve(path), model.get("type")
        if kind not in UNTITLED:
            raise Problem(400, "type must be notebook, file or directory")
        if model.get("copy_from"):
            raise Problem(400, "A copy is made with POST")
        with self.one_save(absolute):
            is_new = not os.path.exists(absolute)
            if kind == "directory":
                os.makedirs(absolute, exist_ok=True)
                return self.model(path, absolute), is_new
            data = self.write(path, absolute, model, expected)
        new = {**self.model(path, absolute), "type": kind}
        if with_hash:
            new.update(hash=self.hash(data), hash_algorithm="sha256")
        return new, is_new

    def write(self, path, absolute, model, expected):
        """Put a model's content into its file; returns the bytes."""
        if os.path.isdir(absolute):
            raise Problem(400, f"{path} is a folder")
        refuse_protected(absolute)
        old = self.read_if_there(absolute)
        self.refuse_conflict(path, old, expected)
        data = self.encode(path, model, old)

        def look(target):
            """What was true when the save began must be true when the file is replaced."""
            if expected not in (None, "*") and self.read_if_there(target) != old:
                raise Problem(412, f"{path} was changed on disk just now", "conflict")

        if data != old:
            write_atomically(absolute, data, look)
        return data

    def refuse_conflict(self, path, old, expected):
        if expected == NOT_THERE and old is not None:
            raise Problem(412, f"{path} exists already", "conflict")
        if expected in (None, NOT_THERE):
            return
        if old is None:
            raise Problem(412, f"{path} is no longer on disk", "conflict")
        if expected not in ("*", self.hash(old)):
            raise Problem(412, f"{path} was changed on disk since it was opened", "conflict")

    def file_or_none(self, data):
        """The document of these bytes, if they are that of a notebook."""
        try:
            return self.document(data) if data and not data.isspace() else None
        except NotANotebook:
            return None

    def encode(self, path, model, old):
        """The bytes that a model's content becomes on disk."""
        content, kind, form = model.get("content"), model["type"], model.get("format")
        try:
            if kind == "notebook":
                is_new = content is None and not old   # without content only a new file may be
                notebook = new_notebook() if is_new else content
                return self.written(notebook, self.file_or_none(old)).data
            texts = content if isinstance(content, tuple) else (content or "",)
            if form == "base64":
                return CODEC["decode_base64"](texts)
            return b"".join(text.encode() for text in texts)
        except NotANotebook as problem:
            raise Problem(400, f"Not saved, this is no valid notebook: {problem}") from None
        except (ValueError, TypeError, AttributeError) as problem:
            raise Problem(400, f"Not saved, the content of {path} is not {form or 'text'}: "
                               f"{problem}") from None

    def create(self, folder, wish):
        """A new, empty file, notebook or folder, as the `type` and `ext` of the wish say, with a
        name of its own."""
        extension = wish.get("ext") or ""
        kind = wish.get("type") or ("notebook" if extension == ".ipynb" else "file")
        stem, usual = UNTITLED.get(kind, UNTITLED["file"])
        extension = usual if kind == "notebook" else extension or usual
        if not os.path.isdir(self.existing(folder)):
            raise Problem(400, f"{folder} is not a folder")
        data = self.written(new_notebook(), None).data if kind == "notebook" else b""
        joint = " " if kind == "directory" else ""
        while True:
            path = self.free_name(folder, stem, extension, joint)
            try:
                if kind == "directory":
                    os.mkdir(self.resolve(path))
                else:
                    write_atomically(self.resolve(path), data, refuse_existing)
                return self.model(path, self.resolve(path))
            except FileExistsError:   # somebody took the name meanwhile
                continue

    def free_name(self, folder, stem, extension, joint):
        """The path of stem + extension in the folder, with a joint and a number if need be."""
        for number in itertools.count():
            name = f"{stem}{joint}{number}{extension}" if number else stem + extension
            path = f"{folder}/{name}".lstrip("/")
            if not os.path.lexists(self.resolve(path)):
                return path

    def rename(self, path, new_path):
        """Move a file or folder; never over another one."""
        old, new = self.existing(path), self.resolve(new_path)
        if not new_path.strip("/") or os.path.realpath(old) == self.root:
            raise Problem(400, "A new path is needed")
        self.refuse_private(path, old)
        if not os.path.isdir(os.path.dirname(new)):
            raise Problem(404, f"No such folder: {os.path.dirname(new_path)}")
        with self.lock, FOLDERS[-1](os.path.dirname(new)):
            if os.path.lexists(new) and not os.path.samefile(old, new):
                raise Problem(409, f"{new_path} exists already")
            self.move(old, new)
        return self.model(new_path, new)

    def move(self, old, new):
        os.rename(old, new)

    def refuse_private(self, path, absolute):
        if any(is_within(folder, os.path.realpath(absolute)) for folder in self.private):
            raise Problem(403, f"{path} holds what this server needs")

    def delete(self, path, with_content=True):
        """Delete a file or a folder. A folder with files only `with_content`, which is what
        Jupyter's clients expect: they have asked before."""
        absolute = self.existing(path)
        if os.path.realpath(absolute) == self.root:
            raise Problem(400, "The root folder stays")
        if not os.path.isdir(absolute) or os.path.islink(absolute):
            return os.remove(absolute)
        self.refuse_private(path, absolute)
        if not with_content and {*os.listdir(absolute)} - NO_CONTENT:
            raise Problem(400, f"{path} is not empty (it may hold hidden files): "
                               "delete what is in it first", "not empty")
        shutil.rmtree(absolute)


CONTENTS = [Contents]   # classes: the last one is used


def refuse_existing(target):
    """What a new file must not find when it takes its place."""
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "There is such a file already", target)


def is_plain(name):
    """False for a name that is not UTF-8 (half a surrogate stands for such a byte), or that leads
    elsewhere on some system."""
    return "\0" not in name and "\\" not in name and (
        name.isascii() or name.encode("utf-8", "replace").decode() == name)


def is_within(real, root):
    """True when `real` is `root` or below it; both are real paths."""
    return real == root or real.startswith(os.path.join(root, ""))


# -- Saving: at every moment the file is its old self or its new one, whole --
#
# S1 A file that may not be written stays as it is, for root, too.
# S2 A save is answered when the bytes, and the name that leads to them, are on the disk.
# S3 Whenever the machine stops, the file is the old one or the new one. (A test replays every
#    point at which a save can stop, and every order in which the disk may have done its work.)
# S4 Of two saves that expect the same old file one is refused: each looks once more at the file
#    right before it replaces it, and no other save of that file comes between (`one_save`).
#
# A file is replaced: a hidden file is written beside it, fsync, rename, fsync of the folder.

WRITTEN_AT_ONCE = 1 << 20   # bytes
IS_LEFTOVER = re.compile(r"\.[0-9a-f]{16}\.saving").fullmatch   # what `leftover_name` gives
O_BINARY = getattr(os, "O_BINARY", 0)   # Windows must not change line ends
UMASK = os.umask(0o022)
os.umask(UMASK)


def write_atomically(path, data, look=None):
    """Replace the bytes of the file at `path`, or of what that links to; or change nothing.

    `look(target)` is called right before the replacement; what it raises stops the save.
    """
    target = os.path.realpath(path)
    refuse_protected(target)

    def replace():
        with TEMPORARIES[-1](target) as temporary:
            temporary.write(data)
            temporary.replace(look)

    REPLACE[-1](target, replace, lambda: data, look)


def refuse_protected(target):
    """Raise PermissionError for a file that may not be written. The disk lets root write anything;
    so a file that nobody has the right to write is taken at its word."""
    info = stat_of(target)
    if info and not may_write(target, info):
        raise PermissionError(errno.EACCES, "The file is write-protected", target)


def may_write(path, info):
    is_protected = stat.S_ISREG(info.st_mode) and not info.st_mode & 0o222
    return not is_protected and os.access(path, os.W_OK)


def replace_file(source, target):
    """os.replace; on Windows a virus scanner or the like may have the file open for a moment."""
    for seconds in () if POSIX else (0.01, 0.05, 0.2, 0.5):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(seconds)
    return os.replace(source, target)


def stat_of(path):
    """The os.stat_result, or None when nothing is there."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


class Temporary:
    """A hidden file beside `target` that is to take its place."""

    def __init__(self, target):
        self.target, self.folder = target, os.path.dirname(target)
        self.make()

    def make(self):
        self.path = leftover_name(self.folder)
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | O_BINARY, 0o600)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.remove()

    def remove(self):
        """End it; as a rule it has become the target, and there is nothing to remove."""
        self.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    def close(self):
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def write(self, data):
        write_all(self.descriptor, data)

    def replace(self, look=None):
        """Take the place of the target, now or never."""
        self.dress(stat_of(self.target))
        os.fsync(self.descriptor)
        with FOLDERS[-1](self.folder):
            if look:
                look(self.target)
            if os.name == "nt":   # where no open file is renamed
                self.close()
            replace_file(self.path, self.target)

    def dress(self, old):
        """Take the rights of the file that is to be replaced: its os.stat_result, or None."""
        os.chmod(self.path, stat.S_IMODE(old.st_mode) if old else 0o666 & ~UMASK)


def write_all(descriptor, data):
    """Write all bytes at the place where the descriptor stands."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest[:WRITTEN_AT_ONCE]):]


def leftover_name(folder):
    return os.path.join(folder, f".{secrets.token_hex(8)}.saving")


@contextlib.contextmanager
def changing(folder):
    """While names in a folder change; in the end they are on the disk. Gives its descriptor, None
    where a folder cannot be opened (Windows)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        descriptor = None
    try:
        yield descriptor
        if descriptor is not None:
            with contextlib.suppress(OSError):   # some file systems know no such thing
                os.fsync(descriptor)
    finally:
        if descriptor is not None:
            os.close(descriptor)


TEMPORARIES = [Temporary]   # classes: the last one is used
FOLDERS = [changing]        # context managers like that one: the last one is used
REPLACE = [lambda target, replace, data, look: replace()]   # functions: the last one is used


# ---- 2. Kernel specs: which kernels there are --------------------------------------------------
#
# A kernel spec is a folder `kernels/NAME/` with a `kernel.json` in one of Jupyter's data folders:
# the command that starts a kernel, its language, its name for people. Our own needs no folder.

JUPYTER_DATA = our_kernel.data_folder()
RUNTIME = os.environ.get("JUPYTER_RUNTIME_DIR") or os.path.join(JUPYTER_DATA, "runtime")
DEFAULT_KERNEL = "python3"
LOCAL = "local-provisioner"   # who starts a kernel; of others (clusters and the like) we know none
SPEC_CHECKS = []   # functions(spec): ValueError for what no process can be given
SPEC_FIELDS = {   # of a kernel.json -> what it must be, what it is when missing
    "argv": (list, None), "display_name": (str, ""), "language": (str, ""), "env": (dict, {}),
    "interrupt_mode": (str, "signal"), "metadata": (dict, {}), "kernel_protocol_version": (str, "")}


def usual_folders():
    """Every folder of kernel specs: the user's, this Python's, the system's. The first one that
    has a name wins."""
    prefixes = [os.path.join(prefix, "share", "jupyter")
                for prefix in (sys.prefix, "/usr/local", "/usr")]
    return [os.path.join(path, "kernels") for path in (JUPYTER_DATA, *prefixes)]


SPEC_FOLDERS = [usual_folders]   # functions: the last one is used
OWN_SPECS = [lambda: {DEFAULT_KERNEL: (our_kernel.kernel_spec("Python 3"), None)}]   # all are used


def find_specs():
    """{name: (spec, folder)}; ours is `python3`, an installed one of that name comes beside it."""
    specs = {name: found for own in OWN_SPECS for name, found in own().items()}
    for folder in SPEC_FOLDERS[-1]():
        for entry in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            name = entry.lower()
            key = name if name != DEFAULT_KERNEL else f"{DEFAULT_KERNEL}-installed"
            if key in specs or not re.fullmatch(r"[a-z0-9._-]+", name):
                continue
            if spec := read_spec(os.path.join(folder, entry, "kernel.json")):
                specs[key] = (spec, os.path.join(folder, entry))
    return specs


def read_spec(path):
    """A kernel.json with all of its fields, or None: a broken one must not hide the others."""
    try:
        with open(path, encoding="utf-8") as file:
            return complete_spec(json.load(file))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError, RecursionError) as problem:
        log(f"Ignored the kernel spec {path}: {problem}")
        return None


def complete_spec(found):
    """The spec in a kernel.json; None when another must start it; ValueError for a broken one."""
    spec = {name: found.get(name, default) for name, (_, default) in SPEC_FIELDS.items()}
    for name, (kind, _) in SPEC_FIELDS.items():
        if not isinstance(spec[name], kind):
            raise ValueError(f"{name} must be of type {kind.__name__}")
    if not spec["argv"] or not all(isinstance(word, str) for word in spec["argv"]):
        raise ValueError("argv must be a list of words")
    for check in SPEC_CHECKS:
        check(spec)
    spec["interrupt_mode"] = spec["interrupt_mode"].lower()
    if spec["interrupt_mode"] not in ("signal", "message"):
        raise ValueError("interrupt_mode must be signal or message")
    provisioner = spec["metadata"].get("kernel_provisioner", {})
    return spec if provisioner.get("provisioner_name", LOCAL) == LOCAL else None


def find_spec(name):
    """(spec, folder) of the kernel of this name, in capitals or not. Raises Problem 501."""
    specs = find_specs()
    if name.lower() in specs:
        return specs[name.lower()]
    problem = Problem(501, f"There is no kernel called {name}; there are: {', '.join(specs)}")
    problem.more = {"short_message": f"{name} not found"}   # what Notebook shows as a title
    raise problem


def fill_in(argv, values):
    """argv with `{connection_file}` and the like replaced; a plain `python` is this Python."""
    words = [re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), word) for word in argv]
    if words[0] in ("python", "python3", f"python3.{sys.version_info[1]}"):
        words[0] = sys.executable
    return [os.path.expanduser(word) for word in words]


def kernel_environment(spec):
    """The environment of a spec's kernel: ours and its `env`, where $NAME stands for a value."""
    # Left alone, plotly sends JSON only, which needs JupyterLab's extension: have it send HTML too.
    env = {"PLOTLY_RENDERER": "plotly_mimetype+notebook", **os.environ}
    env.update((name, string.Template(value).safe_substitute(os.environ))
               for name, value in spec["env"].items())
    if spec["language"].lower().startswith("python"):
        env.pop("PYTHONEXECUTABLE", None)   # macOS: it would start another Python than argv's
    return env


# ---- 3. Kernels: one owner each ----------------------------------------------------------------
#
# A kernel process has five sockets, and a ZeroMQ socket may be used by one thread only. So one
# thread, the *watcher*, owns all sockets to a process, under one identity: to its kernel this
# server is one client, with many pages behind it. A page's WebSocket has a thread of its own, the
# *bridge* (section 6). Between them there is a mailbox each way:
#
#     bridge of a page  -- Request -> KernelProcess.requests ->  watcher  -- shell, control, stdin
#                       <- PageMailbox <- Entry ----------------          <- iopub, replies
#
# Words: a *page* is any client with a WebSocket (ours, JupyterLab, a program), known by its
# session_id; an *Entry* is a message on its way to pages, a *Request* one on its way to the kernel;
# a *life* is the number of a process of the kernel; *heard*: something has come on iopub of this
# process, so that nothing can be missed any more; *away*: a page whose connection has ended.
#
# What can be relied on, with the moment for which each was made:
#
#     P1 heard     A kernel publishes to those who have subscribed *by then*. A page that asks while
#                  its kernel starts must see the output: no request is sent before something was
#                  heard on iopub, also after a restart.
#     P2 whose     Two pages run cells of one kernel. A reply or a question goes to the page whose
#                  request it names as its parent, what is on iopub goes to all.
#     P3 the rest  A laptop sleeps in mid-run. The mailbox stays; who comes back under the same
#                  session finds in it what came meanwhile, in order, once. (What TCP had taken by
#                  then nobody can tell: pages acknowledge nothing.)
#     P4 pace      A tab in the background reads nothing while 600 MB are printed. While others
#                  read, they miss nothing, and it is cut off, alone, when it is far behind. While
#                  nobody reads, iopub is not read either, and a kernel that waits for its
#                  subscribers (ours does) holds whoever prints.
#     P5 one life  Somebody presses Run as the kernel crashes. What the server has got before it
#                  tells of the crash never reaches the next process, which has other variables.
#     P6 an end    A cell calls a library that crashes. What it printed before is shown, then every
#                  page is told why, as `status: restarting` or `dead`. A restart that was asked
#                  for is no crash, and other clients would take that status for one.
#
#     state        the process            what leads on
#     starting     runs, not heard yet    heard on iopub and shell -> idle; its end -> dead (who
#                                         never spoke would not at the next try), or, with one of
#                                         REPAIRS, starting
#     idle, busy   runs                   a cell begins, the last one ends; its end -> restarting,
#                                         or dead after MOST_RESTARTS in a row
#     restarting   is about to end, or    the next one is launched -> starting
#                  has ended
#     dead         has ended              a restart that somebody asks for -> starting

CHANNELS = {   # channel -> socket type of the client's end; the kernel has the other one
    "iopub": zmq.SUB, "shell": zmq.DEALER, "stdin": zmq.DEALER, "control": zmq.DEALER,
    "hb": zmq.DEALER}
HEARD = ("iopub", "shell", "control", "stdin")   # in this order, for output comes before its reply
UPWARD = ("shell", "control", "stdin")   # channels on which a page speaks
ZMQ = zmq.Context()
ZMQ.set(zmq.MAX_SOCKETS, 65_536)
SHUTDOWN_SECONDS = 2.5      # that a kernel gets to end, after the request and after SIGTERM
NUDGE_SECONDS = 0.5         # between two kernel_info_requests to a kernel that is silent
LAST_WORDS_MS = 100         # of silence after a process's end, and we have heard its last words
LAST_WORDS_SECONDS = 5      # in all: the kernel of a wrapper that has ended may go on talking
HEARTBEAT_SECONDS = 3       # between two beats
SILENT_BEATS = 3            # beats without an echo before it is reported
STABLE_SECONDS = 10         # a process that lived so long starts a new count of crashes, and after
MOST_RESTARTS = 5           # so many in a row the kernel is given up (both jupyter_client's)
MOST_WAITING = 16 << 20     # bytes in a page's mailbox; when all are full, who prints has to wait
STALLED_SECONDS = 8         # it waits at most: later our kernel would give us up (STALL_SECONDS)
MOST_BEHIND = 64 << 20      # bytes in the mailbox of one page while others have room: it is cut off
LATE_SECONDS = 1            # a page that took nothing for so long can be cut off
MOST_AHEAD = 64             # messages that ZeroMQ takes from a kernel that waits for subscribers
MOST_UNSENT = 100           # requests that wait for a kernel; while there are more, no page is read
MOST_AWAY = 16              # mailboxes that are kept of pages that are away, per kernel
LEAVE_SECONDS = 5           # that the bridge of a session's old connection gets to end
MOST_DESCRIPTORS = 32       # that must be free for a kernel: 14 are its own; the last ones are for
                            # connections, or nobody could come in to shut a kernel down
MOST_ASKED = 10_000         # requests whose page is remembered, because a reply may still come
BATCH = 1 << 20             # bytes that are taken from a socket, or a mailbox, in one go
ID = r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"   # of kernels and sessions: UUIDs
TAIL = 4_000                # characters of a kernel's own stderr that are kept for an explanation
# The busy and idle of these do not mean that code runs; frontends send them all the time.
QUIET_REQUESTS = {"kernel_info_request", "comm_info_request", "is_complete_request",
                  "complete_request", "inspect_request", "history_request", "interrupt_request",
                  "shutdown_request", "abort_request"}
REPAIRS = []         # functions(kernel): True when one that could not begin shall try again
KERNEL_EXTRAS = []   # functions or classes, called with each new KernelProcess: to plug into it
FOLLOWERS = {}       # value of ?journal= -> class of the page's mailbox
OWN_CHANNELS = {}    # channel between page and server alone -> function of kernel and Entry


def call_all(functions, *args):
    """Call what extras have plugged in. A mistake in one of them must not end a kernel."""
    for function in functions:
        try:
            function(*args)
        except Exception:
            import traceback
            log(traceback.format_exc())


class Entry:
    """One message on its way through the server: its JSON as it came; the headers are read."""

    __slots__ = ("channel", "json_parts", "buffers", "header", "parent_id", "client", "number",
                 "life", "size")

    def __init__(self, channel, json_parts, buffers=()):
        """Raises ValueError when the headers are not JSON objects with the fields they need."""
        self.channel, self.json_parts, self.buffers = channel, json_parts, buffers
        self.header, self.parent_id = read_header(json_parts[0]), parent_id(json_parts[1])
        self.client = None   # session_id of the page that has said it, or that it is for
        self.number = 0      # its place in the journal
        self.life = 0        # of the process that follows, where this tells that one has ended
        self.size = 1_000 + len(json_parts[3]) + sum(map(len, buffers))   # bytes, about

    @property
    def msg_type(self):
        return self.header["msg_type"]

    @property
    def content(self):
        """What it says; {} when that is no JSON object."""
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(self.json_parts[3])
            return content if isinstance(content, dict) else {}
        return {}

    @property
    def is_idle(self):
        return self.msg_type == "status" and b'"idle"' in self.json_parts[3]


def read_header(part):
    header = json.loads(part)
    if not isinstance(header, dict) or not all(
            isinstance(header.get(name), str) for name in ("msg_id", "msg_type")):
        raise ValueError("a header without msg_id or msg_type")
    return header


@functools.lru_cache(maxsize=64)   # a thousand lines of output have one parent
def parent_id(part):
    parent = json.loads(part)
    id = parent.get("msg_id") if isinstance(parent, dict) else None
    return id if isinstance(id, str) else None


def said(session, channel, msg_type, content, request=None):
    """What the server itself has to say in a kernel's stead, as an Entry."""
    message = session.message(msg_type, content, request and request.header)
    entry = Entry(channel, session.pack(message)[2:6])
    entry.client = request and request.client
    return entry


class Mailbox:
    """What other threads have for one thread, with a descriptor that its poller can wait for."""

    def __init__(self):
        self.items, self.size = [], 0   # size: of all items, bytes
        self.lock = threading.Lock()
        self.taken_at = time.monotonic()
        self.ear, self.mouth = socket.socketpair()
        self.is_signalled = self.is_closed = False   # a byte is on its way from mouth to ear

    def fileno(self):
        return self.ear.fileno()

    def put(self, items=()):
        """Append items and wake the owner; without items just wake it."""
        with self.lock:
            self.items.extend(items)
            self.size += sum(item.size for item in items)
            if not self.is_signalled and not self.is_closed:
                self.is_signalled = True
                self.mouth.send(b"\0")

    def take(self, most=math.inf):
        """The oldest items, until they have so many bytes; all of them by default."""
        with self.lock:
            count = size = 0
            while count < len(self.items) and size < most:
                size += self.items[count].size
                count += 1
            items, self.items = self.items[:count], self.items[count:]
            self.size -= size
            self.taken_at = time.monotonic()
            if self.is_signalled and not self.items and not self.is_closed:
                self.ear.recv(1)
                self.is_signalled = False
        return items

    def put_back(self, items):
        """What was taken, but came to nothing, is the first again."""
        with self.lock:
            self.items = [*items, *self.items]
            self.size += sum(item.size for item in items)

    def close(self):
        """Nobody waits for anything any more; what is put stays."""
        with self.lock:
            self.is_closed = True
        self.ear.close()
        self.mouth.close()


class Request:
    """What a page, or the server itself, has for a kernel: signed parts, as they will be sent.

    `entry` is the same as an Entry, None for what is the server's own. `life` says for which
    process it is meant: the newest that its sender could know of (P5).
    """

    __slots__ = ("channel", "parts", "entry", "life", "size")

    def __init__(self, channel, parts, entry=None, *, life):
        self.channel, self.parts, self.entry, self.life = channel, parts, entry, life
        self.size = sum(map(len, parts))


class KernelSocket(zmq.Socket):
    """A client's end of a channel. What passes is reported as it is: ZeroMQ's parts."""

    about = None   # for `report`

    def send_multipart(self, parts, *args, **options):
        for tap in TAPS:
            tap("zmq", "out", self.about, parts)
        return super().send_multipart(parts, *args, **options)

    def recv_multipart(self, *args, **options):
        parts = super().recv_multipart(*args, **options)
        for tap in TAPS:
            tap("zmq", "in", self.about, parts)
        return parts


class PageMailbox(Mailbox):
    """What a kernel has for one page: its bridge takes it out. It outlives the connection for a
    while, so that a page that comes back under its session simply gets the rest (P3)."""

    def __init__(self, session_id, websocket):
        """Without a session_id nobody can come back."""
        super().__init__()
        self.is_kept = bool(session_id)
        self.session_id = session_id or secrets.token_hex()
        self.websocket = websocket   # None while the page is away
        self.life = 0                # of the newest process that the page can know of (P5)

    def wants(self, entry):
        """All of iopub; of the rest, what answers this page (P2)."""
        return entry.channel == "iopub" or entry.client == self.session_id

    def cut_off(self):
        """End the page's connection; its bridge sees that."""
        if websocket := self.websocket:
            websocket.abort()


class KernelProcess:
    """One kernel: its process, its connection, its state, and the mailboxes of its pages.

    Any thread may call it; the sockets belong to the watcher of the process alone.
    """

    def __init__(self, name, spec, folder, cwd, session_name="", id=None, env=None):
        self.id = id or str(uuid.uuid4())
        self.name, self.spec, self.folder, self.cwd = name, spec, folder, cwd
        self.session_name = session_name   # what it is told of its notebook
        self.env = env or {}      # variables that the client asks for
        self.state, self.reason = "starting", None
        self.last_activity = time.time()
        self.intent = None        # why the process is about to end: "restart", "shutdown" or None
        self.is_gone = False      # it will not be started again
        self.is_heard = False     # iopub of this process is connected: no answer can be missed
        self.life = 0             # counts the processes that have ended
        self.crashes = 0          # in a row
        self.lock = threading.Lock()           # one start or stop at a time
        self.connection_file = os.path.join(RUNTIME, f"kernel-{self.id}.json")
        self.files = [self.connection_file]    # to be removed in the end
        self.connection = new_connection(self)
        self.session = Session(self.connection["key"], username="server")
        self.process = self.watcher = None     # the newest
        self.ended = threading.Event()         # its end is told
        self.ended.set()
        self.requests = Mailbox()              # for the watcher
        self.waiting = []                      # those that it has taken and may not send yet
        # msg_id of a request -> session_id of its page; the watcher's. Those that run code may
        # take hours, and are not forgotten for all that is asked meanwhile.
        self.asked, self.asked_to_run = {}, {}
        self.awaited = {}         # msg_id of a request of the server's own -> Event
        self.pages_lock = threading.Lock()     # guards the next, and what extras know of pages
        self.page_left = threading.Condition(self.pages_lock)
        self.mailboxes = {}       # session_id -> PageMailbox, also of some that are away
        # What extras plug in: functions of an Entry, of Entries, of a PageMailbox, of nothing.
        self.on_request, self.on_publish, self.on_join, self.on_end = [], [], [], []
        self.on_launch, self.on_exit = [], []   # the same; a process was started, has ended
        self.gates = []           # see Gate
        for extra in KERNEL_EXTRAS:
            extra(self)

    def model(self):
        model = {"id": self.id, "name": self.name, "last_activity": iso(self.last_activity),
                 "execution_state": self.state, "connections": self.connections}
        return {**model, "reason": self.reason} if self.reason else model

    # -- the process --

    def start(self):
        """Start the first process. Raises Problem 500, or 404 when it was shut down meanwhile."""
        with self.lock:
            if self.is_gone:
                raise Problem(404, f"Kernel does not exist: {self.id}")
            self.launch()

    def launch(self):
        """Write the connection file and start the process; the lock is held. Raises Problem 500."""
        argv = fill_in(self.spec["argv"], {
            "connection_file": os.path.realpath(self.connection_file),
            "resource_dir": self.folder or HERE, "prefix": sys.prefix})
        try:
            need_descriptors(MOST_DESCRIPTORS)
            self.remove_files()       # a child of the last process may still listen there, dumb
            for file in self.files:   # somebody may have cleaned up
                os.makedirs(os.path.dirname(file), mode=0o700, exist_ok=True)
            write_secret(self.connection_file, json.dumps(self.connection, indent=1))
            self.process = subprocess.Popen(
                argv, cwd=self.cwd, env=self.environment(), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        except (OSError, ValueError) as problem:   # no such program; or a NUL among its words
            self.state, self.reason = "dead", f"The kernel {self.name} cannot be started: {problem}"
            self.publish([self.status("dead")])
            raise Problem(500, self.reason) from None
        call_all(self.on_launch)
        self.report("out", f"start as process {self.process.pid}: {' '.join(argv)}")
        self.state, self.reason, self.intent, self.is_heard = "starting", None, None, False
        self.watcher, self.ended = Watcher(self), threading.Event()
        threading.Thread(target=self.watcher.run, name="watcher", daemon=True).start()

    def report(self, way, text):
        """Tell what was done to the process, or what it said itself."""
        for tap in TAPS:
            tap("process", way, {"kernel": self.id}, [text.encode("utf-8", "replace")])

    def environment(self):
        return {**kernel_environment(self.spec), "JPY_PARENT_PID": str(os.getpid()),
                "JPY_SESSION_NAME": self.session_name, **self.env}

    def connect(self, channel, identity):
        """A client's socket, connected to a channel; it belongs to the calling thread."""
        new = KernelSocket(ZMQ, CHANNELS[channel])
        new.about = {"kernel": self.id, "channel": channel}
        new.linger, new.rcvhwm, new.sndhwm = 0, 0, 0
        new.reconnect_ivl = 20    # milliseconds: a kernel that is just starting is found at once
        if channel == "iopub":
            new.subscribe(b"")
            if self.spec["metadata"].get("waits_for_subscribers"):   # others would drop messages
                new.rcvhwm = MOST_AHEAD                              # (P4)
        else:
            new.identity = identity
        new.connect(endpoint(self.connection, channel))
        return new

    def interrupt(self):
        """Interrupt the running cell, by signal or by message as the spec says."""
        if self.spec["interrupt_mode"] == "message" or not POSIX:
            self.ask("interrupt_request", {}, 1)
        else:
            self.send_signal(signal.SIGINT)

    def send_signal(self, number):
        """Signal the kernel and its children; they are a process group of their own."""
        if self.ended.is_set():
            return   # by now the number may be another process's
        self.report("out", f"signal {int(number)} ({signal.strsignal(number)})")
        with contextlib.suppress(ProcessLookupError):
            if POSIX:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)

    def stop(self, intent):
        """End the process in the specification's order: request, SIGTERM, SIGKILL."""
        self.intent = intent
        self.ask("shutdown_request", {"restart": intent == "restart"}, 1)
        for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
            if self.ended.wait(SHUTDOWN_SECONDS):
                break
            self.send_signal(number)
        self.ended.wait(SHUTDOWN_SECONDS + LAST_WORDS_SECONDS)   # its watcher hears its last words

    def restart(self):
        """A new process on the same ports: the clients stay connected."""
        with self.lock:
            if self.is_gone:
                raise Problem(404, f"Kernel does not exist: {self.id}")
            self.state, self.intent, self.is_heard = "restarting", "restart", False
            self.crashes = 0
            self.stop("restart")
            self.launch()

    def start_again(self, process):
        """Start what ended by itself, unless somebody else has done it meanwhile."""
        with self.lock:
            if self.process is process and self.intent is None and not self.is_gone:
                with contextlib.suppress(Problem):   # its reason is in the model
                    self.launch()

    def shutdown(self):
        with self.lock:
            self.is_gone = True
            self.stop("shutdown")
            self.wake_pages()   # they see that the kernel is gone, and close
            self.remove_files()
            if self.ended.is_set():
                self.requests.close()

    def remove_files(self):
        for file in self.files:
            with contextlib.suppress(OSError):
                os.unlink(file)

    # -- requests: from any thread to the watcher --

    def send(self, request):
        """Put a Request to the watcher; to a dead kernel there is nothing to say."""
        if self.state != "dead":
            self.requests.put([request])

    def ask(self, msg_type, content, seconds):
        """Send a request of the server's own on control, to the process that there is, and wait so
        long for its reply."""
        if self.ended.is_set():
            return
        message = self.session.message(msg_type, content)
        msg_id = message["header"]["msg_id"]
        answered = self.awaited[msg_id] = threading.Event()
        self.requests.put([Request(
            "control", self.session.pack(message), life=self.watcher.life)])
        answered.wait(seconds)
        self.awaited.pop(msg_id, None)

    @property
    def has_room(self):
        """False while so many requests wait that no page is read."""
        return len(self.requests.items) + len(self.waiting) < MOST_UNSENT

    # -- pages --

    @property
    def pages(self):
        """The mailboxes of the pages that are connected."""
        return [box for box in list(self.mailboxes.values()) if box.websocket]

    @property
    def connections(self):
        return len(self.pages)

    def publish(self, entries):
        """Put Entries into the mailboxes of those whom they are for."""
        with self.pages_lock:
            call_all(self.on_publish, entries)
            for box in list(self.mailboxes.values()):
                if wanted := [entry for entry in entries if box.wants(entry)]:
                    box.put(wanted)
                if box.websocket is None and box.size > MOST_WAITING:
                    del self.mailboxes[box.session_id]   # too much for who may never come back

    def wake_pages(self):
        """Let the bridges look again at what state the kernel is in."""
        for box in self.pages:
            box.put()

    def join(self, box):
        """A page connects: from now on `box` gets what is for it. First it gets what waited for its
        session, whose old connection ends: its bridge puts back what it could not send (P3)."""
        def has_made_way():
            old = self.mailboxes.get(box.session_id)
            if old:
                old.cut_off()
            return not old or not old.websocket

        with self.pages_lock:
            self.page_left.wait_for(has_made_way, LEAVE_SECONDS)
            old = self.mailboxes.pop(box.session_id, None)
            box.life = self.life
            if old and box.is_kept:
                box.put(old.take())
                box.life = old.life
            call_all(self.on_join, box)
            if self.state == "dead":
                box.put([self.status("dead")])
            self.mailboxes[box.session_id] = box

    def leave(self, box):
        """A page's connection has ended. Its mailbox is kept, of so many pages."""
        with self.pages_lock:
            box.websocket = None
            box.close()
            if self.mailboxes.get(box.session_id) is box:
                del self.mailboxes[box.session_id]
                if box.is_kept:
                    self.mailboxes[box.session_id] = box
            away = [each for each in self.mailboxes.values() if not each.websocket]
            for each in away[:-MOST_AWAY]:
                del self.mailboxes[each.session_id]
            self.page_left.notify_all()
        self.requests.put()   # the watcher may wait for room in it

    def begin_life(self, is_known):
        """A process has ended. `is_known`: the pages can know, for one has asked for it."""
        with self.pages_lock:
            self.life += 1
            for box in self.mailboxes.values() if is_known else ():
                box.life = self.life

    def status(self, state):
        """A status message that the kernel itself cannot send any more, as an Entry."""
        reason = {"reason": self.reason or "It was shut down."} if state == "dead" else (
            {"reason": self.reason} if self.reason else {})
        return said(self.session, "iopub", "status", {"execution_state": state, **reason})


class Watcher:
    """The thread that follows one process of a kernel from its start to its end, and owns all
    sockets to it."""

    def __init__(self, kernel):
        self.kernel, self.process, self.life = kernel, kernel.process, kernel.life
        self.sockets, self.output, self.poller = {}, None, zmq.Poller()   # channel -> its socket
        self.tail = ""   # the last that the process wrote on its own stdout or stderr
        self.started = self.last_echo = time.monotonic()
        self.next_nudge = self.next_beat = 0.0
        self.has_answered, self.running = False, set()   # msg_ids of requests that are worked on
        self.full_since = None   # since when no page has room, and iopub is not heard; monotonic

    def run(self):
        """Follow the process to its end. When that cannot be done, as descriptors run short, its
        end comes now: nobody would hear it any more."""
        try:
            self.connect()
            with watched_process(self.process, self.poller) as is_watched:
                while self.process.poll() is None:
                    # Without a pidfd the end is looked for twice a second.
                    self.step(min(self.patience(), 60 if is_watched else 0.5))
            self.hear_last_words()
        except Exception as problem:
            self.tail += f"The server could not follow it: {problem!r}"
            self.kernel.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
            self.process.wait()
        self.end()

    def connect(self):
        # One identity on all channels: the kernel asks on stdin whom it heard on shell.
        identity = secrets.token_bytes(16)
        for channel in CHANNELS:
            self.sockets[channel] = self.kernel.connect(channel, identity)
        self.output = OUTPUTS[POSIX](self.process.stdout)
        for source in (*self.sockets.values(), self.output.fileno(), self.kernel.requests.fileno()):
            self.poller.register(source, zmq.POLLIN)

    def step(self, seconds):
        """Wait for either side and carry what has come."""
        ready = dict(self.poller.poll(seconds * 1000))
        entries = [entry for channel in HEARD if self.sockets[channel] in ready
                   for entry in self.hear(channel)]
        if self.sockets["hb"] in ready and self.sockets["hb"].recv_multipart():
            self.last_echo = time.monotonic()
        if self.output.fileno() in ready and not self.read():
            self.poller.unregister(self.output.fileno())
        requests = self.kernel.requests.take() if self.kernel.requests.fileno() in ready else []
        was_full = len(requests) + len(self.kernel.waiting) >= MOST_UNSENT
        for gate in self.kernel.gates:
            entries, requests = gate.let_pass(entries, requests)
        if entries:
            self.kernel.publish(entries)
        self.send_all(requests)
        if was_full and self.kernel.has_room:
            self.kernel.wake_pages()   # they are read again
        self.keep_pace()
        self.nudge()
        self.beat()

    def patience(self):
        """Seconds until there is something to do without being told."""
        is_known = self.has_answered and self.kernel.is_heard
        due = self.next_beat if is_known else min(self.next_beat, self.next_nudge)
        seconds = [due - time.monotonic(), *(gate.patience() for gate in self.kernel.gates)]
        if self.full_since is not None:
            seconds.append(LATE_SECONDS)
        return max(0.0, min(seconds))

    # -- what the kernel says --

    def hear(self, channel):
        """What has arrived on a channel, in one go, as Entries."""
        kernel, entries = self.kernel, []
        for parts in waiting_messages(self.sockets[channel]):
            try:
                entry = Entry(channel, *kernel.session.verify(parts)[1:])
                self.note(entry)
                entries.append(entry)
            except (ValueError, TypeError, AttributeError, RecursionError) as problem:
                log(f"kernel {kernel.id}: dropped a message on {channel}: {problem!r}")
        self.last_echo = time.monotonic()   # what is heard is alive
        return entries

    def note(self, entry):
        """Learn from an Entry: who is alive, who runs, whom it is for."""
        kernel = self.kernel
        if entry.channel == "iopub":
            if entry.msg_type == "status":
                self.note_state(entry)
            is_ending = kernel.intent is not None or self.process.returncode is not None
            kernel.is_heard = kernel.is_heard or not is_ending
            return
        self.has_answered = True
        # P2: a reply or a question belongs to the page whose request it names as its parent.
        entry.client = kernel.asked_to_run.get(entry.parent_id) or kernel.asked.get(entry.parent_id)
        if answered := kernel.awaited.get(entry.parent_id):
            answered.set()

    def note_state(self, entry):
        """Learn the kernel's state from the `status` messages that running code causes. A cell that
        is dropped ends while another one runs."""
        state = entry.content.get("execution_state")
        parent = json.loads(entry.json_parts[1])
        if parent.get("msg_type") in QUIET_REQUESTS or state not in ("busy", "idle"):
            return
        (self.running.add if state == "busy" else self.running.discard)(parent.get("msg_id"))
        self.kernel.state = "busy" if self.running else "idle"
        self.kernel.last_activity = time.time()

    def keep_pace(self):
        """Poll iopub only while one page has room: else the kernel holds whoever prints, and all
        other channels are heard as before. The fastest page sets the pace (P4); who falls far
        behind it is cut off, like those that all stall."""
        pages, now = self.kernel.pages, time.monotonic()
        is_full = bool(pages) and self.kernel.intent is None and all(
            box.size > MOST_WAITING for box in pages)
        if is_full != (self.full_since is not None):
            self.full_since = now if is_full else None
            self.poller.register(self.sockets["iopub"], 0 if is_full else zmq.POLLIN)
        is_stalled = is_full and now - self.full_since > STALLED_SECONDS
        for box in pages:
            most = 0 if is_stalled else MOST_BEHIND
            if box.size > most and now - box.taken_at > LATE_SECONDS:
                box.cut_off()

    # -- what is said to the kernel --

    def send_all(self, requests):
        """Send Requests, and those that waited. What is meant for an earlier process is dropped
        (P5), what a page asks waits until the answer can be heard (P1)."""
        kernel = self.kernel
        waiting, kernel.waiting = [*kernel.waiting, *requests], []
        for request in waiting:
            if request.life != self.life:
                continue
            if request.entry and not kernel.is_heard:
                kernel.waiting.append(request)
                continue
            try:
                self.send(request)
            except Exception as problem:   # also of an extra: the kernel goes on
                log(f"kernel {kernel.id}: dropped a page's message: {problem!r}")

    def send(self, request):
        if entry := request.entry:
            runs = entry.msg_type == "execute_request"
            asked = self.kernel.asked_to_run if runs else self.kernel.asked
            asked[entry.header["msg_id"]] = entry.client
            if len(asked) > MOST_ASKED:
                del asked[next(iter(asked))]
            for function in self.kernel.on_request:
                function(entry)
        # Journey 3: the signed request leaves on the ZeroMQ socket of its channel.
        self.sockets[request.channel].send_multipart(request.parts)

    def nudge(self):
        """Ask a new kernel for its info until it has answered and iopub was heard: a kernel
        publishes only to those who have subscribed by then (P1)."""
        kernel, now = self.kernel, time.monotonic()
        if self.has_answered and kernel.is_heard:
            if kernel.state == "starting":
                kernel.state = "idle"
            return
        if now >= self.next_nudge:
            self.has_answered = False
            self.next_nudge = now + NUDGE_SECONDS
            message = kernel.session.message("kernel_info_request", {})
            self.sockets["shell"].send_multipart(kernel.session.pack(message))

    def beat(self):
        """Send a heartbeat; say so when a kernel that once spoke has stopped to echo it."""
        now, kernel = time.monotonic(), self.kernel
        is_silent = now - self.last_echo > SILENT_BEATS * HEARTBEAT_SECONDS
        if is_silent and kernel.is_heard and not kernel.reason:
            kernel.reason = "The kernel process is there, but does not answer its heartbeat."
            log(f"kernel {kernel.id}: {kernel.reason}")
        elif not is_silent and self.process.poll() is None:
            kernel.reason = None
        if now >= self.next_beat:
            self.next_beat = now + HEARTBEAT_SECONDS
            self.sockets["hb"].send_multipart([b"", b"ping"])

    # -- its end --

    def read(self):
        """Pass on what the process says itself; False at the end of the file."""
        try:
            data = self.output.read()
        except BlockingIOError:
            return True
        text = data.decode("utf-8", "replace")
        self.tail = (self.tail + text)[-TAIL:]
        if text.strip():
            log(text.rstrip())
            self.kernel.report("in", text)
        return bool(data)

    def end(self):
        """The process is gone: tell every page, and start it anew or not."""
        kernel, spoke = self.kernel, self.kernel.is_heard
        kernel.is_heard = starts_again = False
        call_all(kernel.on_exit)
        kernel.report("in", f"ended with exit code {self.process.returncode}")
        for each in (*self.sockets.values(), self.output or self.process.stdout):
            each.close()
        try:
            starts_again = self.tell_end(spoke)
        finally:
            kernel.ended.set()   # whoever stops the kernel waits for this
            for answered in list(kernel.awaited.values()):
                answered.set()
        if starts_again:
            kernel.start_again(self.process)

    def hear_last_words(self):
        """Publish what the process has said before its end, and what is held at gates."""
        last, deadline = zmq.Poller(), time.monotonic() + LAST_WORDS_SECONDS
        for channel in HEARD:
            last.register(self.sockets[channel], zmq.POLLIN)
        for gate in self.kernel.gates:
            self.kernel.publish(gate.release())
        while time.monotonic() < deadline and (ready := dict(last.poll(LAST_WORDS_MS))):
            self.kernel.publish([entry for channel in HEARD if self.sockets[channel] in ready
                                 for entry in self.hear(channel)])
        self.read()

    def tell_end(self, spoke):
        """Publish that the process has ended, and why; True when it is to be started again. Of a
        restart that a client has asked for no status tells: it is no crash."""
        kernel, intent = self.kernel, self.kernel.intent   # which may change: it is read once
        is_crash = intent is None
        if is_crash and not spoke and any(repair(kernel) for repair in REPAIRS):
            return True
        if is_crash:
            kernel.reason = self.explain()
            log(f"kernel {kernel.id} ({kernel.name}): {kernel.reason}")
            was_short = time.monotonic() - self.started < STABLE_SECONDS
            kernel.crashes = kernel.crashes + 1 if was_short else 1
        will_restart = is_crash and spoke and kernel.crashes <= MOST_RESTARTS
        kernel.state = "restarting" if will_restart or intent == "restart" else "dead"
        kernel.begin_life(is_known=not is_crash)
        call_all(kernel.on_end)
        if intent != "restart":
            news = kernel.status(kernel.state)
            news.life = kernel.life
            kernel.publish([news])
        return will_restart

    def explain(self):
        code, said = self.process.returncode, self.tail.strip()
        how = (f"was ended by signal {-code} ({signal.strsignal(-code)})" if code < 0
               else f"ended with exit code {code}")
        return f"The kernel process {how}" + (f":\n{said}" if said else ".")


class Output:
    """What a process writes on its own stdout and stderr, with a descriptor for a poller."""

    def __init__(self, pipe):
        self.pipe = pipe
        os.set_blocking(pipe.fileno(), False)

    def fileno(self):
        return self.pipe.fileno()

    def read(self):
        """Some bytes, none at the end; raises BlockingIOError while there are none."""
        return os.read(self.pipe.fileno(), 65_536)

    def close(self):
        self.pipe.close()


OUTPUTS = {True: Output, False: Output}   # has the system POSIX's ways? -> class


def waiting_messages(sock):
    """The messages that have arrived on a ZeroMQ socket, up to about BATCH bytes."""
    size = 0
    while size < BATCH:
        try:
            parts = sock.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        size += sum(map(len, parts))
        yield parts


@contextlib.contextmanager
def watched_process(process, poller):
    """Lets `poller` wake when the process ends, where the system can; gives True if so."""
    try:
        descriptor = os.pidfd_open(process.pid)   # Linux
    except (AttributeError, OSError):
        yield False
        return
    poller.register(descriptor, zmq.POLLIN)
    try:
        yield True
    finally:
        os.close(descriptor)


def new_connection(kernel):
    """The fields of a kernel's connection file."""
    ports, where = PORTS[-1](kernel)
    return {**dict(zip((f"{channel}_port" for channel in CHANNELS), ports, strict=True)), **where,
            "key": secrets.token_hex(32), "signature_scheme": "hmac-sha256",
            "kernel_name": kernel.name, "jupyter_session": kernel.session_name}


def free_ports(kernel):
    """(five of them, where they are). Raises OSError when there are none."""
    with contextlib.ExitStack() as open_sockets:
        taken = []   # all open at once, so that no two get the same port
        for port in random.sample(QUIET_PORTS, 1_000):
            sock = open_sockets.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                taken.append(port)
            if len(taken) == len(CHANNELS):
                return taken, {"ip": "127.0.0.1", "transport": "tcp"}
    raise OSError(errno.EADDRINUSE, "There are no free ports")


# Systems give none of these to outgoing connections. (With a higher one a socket that looks for its
# kernel every 20 ms finds, once in some thousand starts, itself.)
QUIET_PORTS = range(10_000, 32_768)
PORTS = [free_ports]   # functions: the last one is used


def endpoint(connection, channel):
    joint = ":" if connection["transport"] == "tcp" else "-"
    return f"{connection['transport']}://{connection['ip']}{joint}{connection[f'{channel}_port']}"


def need_descriptors(count):
    """Raises OSError unless so many can be opened now."""
    with contextlib.ExitStack() as opened:
        for _ in range(count):
            opened.enter_context(open(os.devnull))


def write_secret(path, text):
    """Write a file that only its owner may read."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


class Kernels:
    """All kernels, by id. Used from every connection's thread."""

    def __init__(self, contents):
        self.contents = contents
        self.all = {}   # id -> KernelProcess

    def start(self, name=None, path="", id=None, env=None, session_name=""):
        """Start the kernel called `name` in the folder of `path`. `session_name` is what the kernel
        is told of its notebook (JPY_SESSION_NAME). Raises Problem."""
        name = name or DEFAULT_KERNEL
        found = find_spec(name)
        if id is not None and (not re.fullmatch(ID, id) or id in self.all):
            raise Problem(400, f"{id} is no UUID, or the id of another kernel")
        # Of a client's variables only those that gateways know pass: not PATH, not LD_PRELOAD.
        env = {name: value for name, value in (env or {}).items()
               if name.startswith("KERNEL_") and isinstance(value, str)}
        new = KernelProcess(name, *found, cwd=self.folder_of(path), session_name=session_name,
                            id=id, env=env)
        if self.all.setdefault(new.id, new) is not new:
            raise Problem(400, f"{id} is the id of another kernel")
        try:
            new.start()
        except Problem:
            self.all.pop(new.id, None)
            new.shutdown()
            raise
        return new

    def folder_of(self, path):
        """The nearest existing folder on the way to `path`: where a kernel starts."""
        try:
            folder = self.contents.resolve(path)
        except Problem:
            return self.contents.root
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        return folder

    def get(self, id):
        if id not in self.all:
            raise Problem(404, f"Kernel does not exist: {id}")
        return self.all[id]

    def shutdown(self, id):
        self.get(id).shutdown()
        self.all.pop(id, None)

    def shutdown_all(self):
        """End all kernels at the same time."""
        while kernels := list(self.all.values()):   # a request may start one meanwhile
            threads = [threading.Thread(target=kernel.shutdown) for kernel in kernels]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for kernel in kernels:
                self.all.pop(kernel.id, None)


# ---- 4. Sessions: which file belongs to which kernel -------------------------------------------
#
# REST calls the tie between a path and a kernel a session. (A message's session is another thing:
# the id of the process that sent it.) Opening the same notebook again finds its session and its
# kernel.

class Sessions:
    """The ties, by id: {"id", "path", "name", "type", "kernel": a KernelProcess}."""

    def __init__(self, kernels):
        self.kernels = kernels
        self.all = {}
        self.lock = threading.Lock()

    def model(self, session):
        model = {**session, "kernel": session["kernel"].model()}
        if session["type"] == "notebook":
            model["notebook"] = {"path": session["path"], "name": session["name"]}
        return model

    def alive(self):
        """The sessions whose kernel is still there."""
        return [session for session in list(self.all.values())
                if session["kernel"].id in self.kernels.all]

    def list(self):
        return [self.model(session) for session in self.alive()]

    def get(self, id):
        session = self.all.get(id)
        if session is None or session["kernel"].id not in self.kernels.all:
            raise Problem(404, f"Session not found: {id}")
        return session

    def create(self, wish):
        """A session for `wish["path"]`: the one it has, or a new one with its kernel."""
        for field in ("path", "type"):
            if not isinstance(wish.get(field), str):
                raise Problem(400, f"Missing field in JSON data: {field}")
        path, name = wish["path"], wish.get("name")
        with self.lock:
            self.all = {session["id"]: session for session in self.alive()}
            for session in self.all.values():
                if session["path"] == path:
                    return session
            kernel = self.kernel_for(wish.get("kernel") or {}, path, name)
            session = {"id": str(uuid.uuid4()), "path": path, "type": wish["type"],
                       "name": name or path.rpartition("/")[2], "kernel": kernel}
            self.all[session["id"]] = session
            return session

    def kernel_for(self, wish, path, name):
        """The kernel of the wished `id`, or a new one with that id and the wished name."""
        if wish.get("id") in self.kernels.all:
            return self.kernels.get(wish["id"])
        return self.kernels.start(wish.get("name"), path, wish.get("id"),
                                  session_name=self.session_name(path, name))

    def session_name(self, path, name):
        """What a kernel is told of its notebook: the absolute path of a document that has a name,
        else the session's path, as Jupyter Server has it."""
        return os.path.join(self.kernels.folder_of(path), name) if name else path

    def change(self, id, wish):
        """Change path, name, type or kernel; a kernel that is replaced is shut down. A wish that
        cannot be fulfilled changes nothing."""
        with self.lock:
            session, kernel_wish = self.get(id), wish.get("kernel") or {}
            if kernel_wish.get("id") is not None and kernel_wish["id"] not in self.kernels.all:
                raise Problem(400, f"No such kernel: {kernel_wish['id']}")
            changes = {key: wish[key] for key in ("path", "name", "type")
                       if wish.get(key) is not None}
            new, old = {**session, **changes}, session["kernel"]
            if kernel_wish.get("id") or kernel_wish.get("name"):
                new["kernel"] = self.kernel_for(kernel_wish, new["path"], new["name"])
            session.update(new)
            # Its process is told when it is started again.
            session["kernel"].session_name = self.session_name(session["path"], session["name"])
            is_used = any(s["kernel"] is old for s in list(self.all.values()))
        if not is_used and old.id in self.kernels.all:
            self.kernels.shutdown(old.id)
        return session

    def follow_rename(self, old, new):
        """Keep sessions with their files when a file or one of its folders is renamed."""
        for session in list(self.all.values()):
            if session["path"] == old or session["path"].startswith(f"{old}/"):
                session["path"] = new + session["path"][len(old):]
                session["name"] = session["path"].rpartition("/")[2]
                session["kernel"].session_name = self.session_name(session["path"], session["name"])

    def delete(self, id):
        """End a session and its kernel."""
        with self.lock:
            session = self.get(id)
            del self.all[id]
        with contextlib.suppress(Problem):   # somebody else has just shut it down
            self.kernels.shutdown(session["kernel"].id)


# ---- 5. WebSocket: RFC 6455 --------------------------------------------------------------------
#
# A WebSocket is a TCP connection that began as an HTTP request. After the handshake both sides
# send frames: two bytes (FIN and opcode, mask bit and length), perhaps a longer length, perhaps a
# mask, then the payload. `FrameParser` turns bytes into messages and knows no socket, so every
# rule of the RFC can be tested with two strings of bytes; `WebSocket` reads and writes.

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
FIN, COMPRESSED, RESERVED = 0b1000_0000, 0b0100_0000, 0b0011_0000   # bits beside the opcode
WHOLE = {FIN | opcode for opcode in (TEXT, BINARY, CLOSE, PING, PONG)}   # first byte, most often
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"   # RFC 6455 1.3
NORMAL, GOING_AWAY, PROTOCOL_ERROR, INVALID_DATA, TOO_BIG = 1000, 1001, 1002, 1007, 1009
MOST_BYTES = 256 << 20    # of one message: a picture pasted into a widget should pass
MOST_FRAGMENTS = 1 << 16  # of one message: empty ones cost nothing to send
CLOSE_CODES = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}   # RFC 6455 7.4, IANA
BLOCK = 1 << 15           # bytes unmasked at a time: they and their numbers fit in a core's cache
LOOPBACK = ("127.", "::1")   # how addresses begin that never leave this machine
KEY = re.compile(r"[A-Za-z0-9+/]{22}==")   # 16 bytes in base64
PING_SECONDS = 30         # between pings; a peer silent for three of them is gone
EXTENSIONS = []           # functions(handler) -> (answer to the client's offer, extension) or None
HANG_UP_SECONDS = 2       # that a peer gets to take the last that we said


class WebSocketError(Exception):
    """The peer broke a rule: the connection is closed with `code` (RFC 6455 7.4.1)."""

    def __init__(self, code, reason):
        super().__init__(reason)
        self.code, self.reason = code, reason


def accept_key(key):
    """What proves to the client that we speak WebSocket (RFC 6455 4.2.2)."""
    return base64.b64encode(hashlib.sha1((key + GUID).encode()).digest()).decode()


def apply_mask(data, mask, start=0, end=None):
    """data[start:end] XOR the repeated four-byte mask, in big numbers: at the speed of memory."""
    end = len(data) if end is None else end
    size = min(BLOCK, end - start)
    key = int.from_bytes((mask * (size // 4 + 1))[:size], "little")
    if end - start == size:
        return (int.from_bytes(data[start:end], "little") ^ key).to_bytes(size, "little")
    result = io.BytesIO()
    for at in range(start, end, BLOCK):
        block = data[at:min(at + BLOCK, end)]
        number = int.from_bytes(block, "little") ^ key
        result.write(number.to_bytes(size, "little")[:len(block)])
    return result.getvalue()


def encode_frame(opcode, payload, mask=None):
    """One unfragmented frame; a client must mask, a server must not (RFC 6455 5.2, 5.3)."""
    masked = 0b1000_0000 if mask else 0
    if len(payload) < 126:
        head = bytes([FIN | opcode, masked | len(payload)])
    elif len(payload) < 1 << 16:
        head = struct.pack("!BBH", FIN | opcode, masked | 126, len(payload))
    else:
        head = struct.pack("!BBQ", FIN | opcode, masked | 127, len(payload))
    return head + mask + apply_mask(payload, mask) if mask else head + payload


def words(headers, name):
    """The comma-separated words of a header, which may be there more than once."""
    return [word.strip() for line in headers.get_all(name, []) for word in line.split(",")]


def handshake_key(headers):
    """The Sec-WebSocket-Key of a handshake; Problem 400 or 426 when it is none (RFC 6455 4.2)."""
    key = headers.get("Sec-WebSocket-Key", "")
    upgrades = [word.lower() for word in words(headers, "Upgrade")]
    options = [word.lower() for word in words(headers, "Connection")]
    if "websocket" not in upgrades or "upgrade" not in options or not KEY.fullmatch(key):
        raise Problem(400, "This address speaks WebSocket (RFC 6455) only")
    if headers.get("Sec-WebSocket-Version") != "13":
        problem = Problem(426, "This server speaks version 13 of WebSocket")
        problem.headers = {"Sec-WebSocket-Version": "13", "Upgrade": "websocket"}
        raise problem
    return key


class FrameParser:
    """Bytes in, messages out: `feed` yields (opcode, payload) of messages and control frames.

    Raises WebSocketError where a rule is broken. TEXT payloads are str, all others bytes.
    """

    def __init__(self, most_bytes=MOST_BYTES, extension=None):
        self.most_bytes, self.extension = most_bytes, extension
        self.bytes, self.at = bytearray(), 0   # what has not been a whole frame yet; from where on
        self.opcode = None            # of the message that is under way
        self.unpack = None            # the extension's function for its payloads
        self.fragments, self.size = [], 0
        self.cut = b""                # the beginning of a character whose end comes next
        self.is_closed = False
        self.about = None             # for `report`: which connection this is

    def feed(self, data):
        self.bytes += data
        while not self.is_closed and (frame := self.next_frame()) is not None:
            message = self.message(*frame)
            if message is not None:
                self.is_closed = message[0] == CLOSE   # RFC 6455 5.5.1: nothing comes after it
                yield message
        del self.bytes[:self.at]
        self.at = 0

    def next_frame(self):
        """(first byte, payload), or None while bytes are missing."""
        have, at = len(self.bytes), self.at + 2
        if have < at:
            return None
        first, second = self.bytes[self.at], self.bytes[self.at + 1]
        length = second & 0b0111_1111
        self.check_head(first, second, length)
        if length >= 126:
            size, layout = (2, "!H") if length == 126 else (8, "!Q")
            if have < at + size:
                return None
            length, at = struct.unpack_from(layout, self.bytes, at)[0], at + size
        if self.size + length > self.most_bytes or len(self.fragments) > MOST_FRAGMENTS:
            raise WebSocketError(TOO_BIG, f"a message may have {self.most_bytes} bytes")
        at, end = at + 4, at + 4 + length
        if have < end:
            return None
        # Journey 2: the frame is whole; it is unmasked, put together with its fragments, decoded.
        for tap in TAPS if self.about else ():
            tap("websocket", "in", self.about, [self.bytes[self.at:end]])
        self.at = end
        return first, apply_mask(self.bytes, self.bytes[at - 4:at], at, end)

    def check_head(self, first, second, length):
        opcode = first & 0b1111
        if first & RESERVED or first & COMPRESSED and not (
                self.extension and opcode in (TEXT, BINARY)):
            raise WebSocketError(PROTOCOL_ERROR, "reserved bits are set")
        if opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise WebSocketError(PROTOCOL_ERROR, f"unknown opcode {opcode}")
        if not second & 0b1000_0000:
            raise WebSocketError(PROTOCOL_ERROR, "a client's frame must be masked")
        if opcode >= CLOSE and (length > 125 or not first & FIN):
            raise WebSocketError(PROTOCOL_ERROR, "a control frame must be short and whole")
        if opcode < CLOSE and (opcode == CONTINUATION) != (self.opcode is not None):
            raise WebSocketError(PROTOCOL_ERROR, "a fragment out of order")

    def message(self, first, payload):
        """The message that a frame completes; control frames may stand between fragments."""
        opcode, is_last = first & 0b1111, first & FIN
        if first in WHOLE:
            return opcode, self.decode(payload, is_last) if opcode == TEXT else payload
        if opcode != CONTINUATION:
            self.opcode = opcode
            self.unpack = self.extension.unpacker() if first & COMPRESSED else None
        if self.unpack:
            payload = self.unpack(payload, is_last, self.most_bytes - self.size)
        self.size += len(payload)
        self.fragments.append(self.decode(payload, is_last) if self.opcode == TEXT else payload)
        if not is_last:
            return None
        empty = "" if self.opcode == TEXT else b""
        message = self.opcode, empty.join(self.fragments)
        self.opcode, self.fragments, self.size = None, [], 0
        return message

    def decode(self, payload, is_last):
        """The text of a fragment, which may begin and end within a character (RFC 6455 8.1)."""
        data = self.cut + payload
        try:
            text, used = codecs.utf_8_decode(data, "strict", bool(is_last))
        except UnicodeDecodeError:
            raise WebSocketError(INVALID_DATA, "a text message must be UTF-8") from None
        self.cut = data[used:]
        return text


def close_code(payload):
    """The code in a CLOSE frame's payload; raises WebSocketError (RFC 6455 5.5.1, 7.4)."""
    if not payload:
        return NORMAL
    code = int.from_bytes(payload[:2], "big")
    if len(payload) == 1 or code not in CLOSE_CODES:
        raise WebSocketError(PROTOCOL_ERROR, "no such close code")
    try:
        payload[2:].decode()
    except UnicodeDecodeError:
        raise WebSocketError(INVALID_DATA, "a close reason must be UTF-8") from None
    return code


class WebSocket:
    """One accepted connection. It belongs to one thread: its handler's."""

    def __init__(self, sock, first_bytes=b"", most_bytes=MOST_BYTES, protocol=None,
                 extension=None):
        self.socket, self.protocol, self.extension = sock, protocol, extension
        self.parser = FrameParser(most_bytes, extension)
        self.first_bytes = first_bytes   # came glued to the handshake
        self.is_closed = self.close_sent = False
        self.last_heard = self.last_ping = time.monotonic()

    @classmethod
    def accept(cls, handler, protocols=(), extensions=EXTENSIONS):
        """Answer the handshake of a BaseHTTPRequestHandler. Raises Problem 400 (RFC 6455 4.2).

        The first of the client's subprotocols that is in `protocols` is chosen, or none, and the
        first of `extensions` that accepts the client's offer.
        """
        key = handshake_key(handler.headers)
        offered = words(handler.headers, "Sec-WebSocket-Protocol")
        protocol = next((name for name in offered if name in protocols), None)
        answer, extension = next(
            (accepted for accept in extensions if (accepted := accept(handler))), (None, None))
        handler.send_response(101)
        for name, value in (("Upgrade", "websocket"), ("Connection", "Upgrade"),
                            ("Sec-WebSocket-Accept", accept_key(key)),
                            ("Sec-WebSocket-Protocol", protocol),
                            ("Sec-WebSocket-Extensions", answer)):
            if value:
                handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.flush()
        handler.close_connection = True
        first_bytes = buffered(handler)
        handler.connection.settimeout(60)   # seconds a peer may take to accept what we send
        return cls(handler.connection, first_bytes, protocol=protocol, extension=extension)

    def fileno(self):
        return self.socket.fileno()

    @property
    def has_bytes(self):
        """True when bytes have arrived that no poll of the TCP socket tells: they came with the
        handshake, or TLS has decrypted them already."""
        return bool(self.first_bytes) or getattr(self.socket, "pending", int)() > 0

    def abort(self):
        """End the connection from another thread: its owner then sees its end."""
        with contextlib.suppress(OSError):   # TLS's own shutdown would let the owner go on in clear
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def arrived(self):
        """Yield the messages in what has arrived; wait for it. Answers pings and closes, in turn
        with the messages: a peer's mistake does not undo what it said before."""
        try:
            data, self.first_bytes = self.first_bytes or self.socket.recv(1 << 18), b""
            self.is_closed = self.is_closed or not data
            self.last_heard = time.monotonic()
            for opcode, payload in self.parser.feed(data):
                if opcode in (TEXT, BINARY):
                    yield payload
                else:
                    self.control(opcode, payload)
        except TimeoutError:
            pass
        except OSError:
            self.is_closed = True
        except WebSocketError as problem:
            self.close(problem.code, problem.reason)
            self.hang_up()

    def control(self, opcode, payload):
        """Obey a control frame."""
        if opcode == PING:
            self.write(encode_frame(PONG, payload))
        elif opcode == CLOSE:
            # RFC 6455 5.5.1: a close is answered once, with the same code.
            self.close(close_code(payload))
            self.is_closed = True

    def frame(self, opcode, payload):
        """The finished frame of a whole message, as the extension packs it."""
        if self.extension:
            opcode, payload = self.extension.pack(opcode, payload)
        return encode_frame(opcode, payload)

    def send(self, message):
        """Send a str as a text message, bytes as a binary one."""
        is_text = isinstance(message, str)
        self.write(self.frame(TEXT if is_text else BINARY,
                              message.encode() if is_text else bytes(message)))

    def write(self, *frames):
        """Send finished frames; a peer that is gone or does not read closes the connection."""
        if self.close_sent:
            return
        left = memoryview(b"".join(frames))
        try:
            while left:   # not sendall, which gives a slow peer no more time for more
                left = left[self.socket.send(left):]
        except OSError:
            self.is_closed = True
            return
        for tap in TAPS if self.parser.about else ():
            for frame in frames:
                tap("websocket", "out", self.parser.about, [frame])

    def ping_or_give_up(self):
        """Say from time to time that we are here; a peer that says nothing is not."""
        now = time.monotonic()
        if now - self.last_heard > 3 * PING_SECONDS:
            self.is_closed = True
        elif now - self.last_ping > PING_SECONDS:
            self.last_ping = now
            self.write(encode_frame(PING, b""))

    def close(self, code=NORMAL, reason=""):
        """Send a close frame, once."""
        text = reason.encode()[:123].decode(errors="ignore")   # RFC 6455 5.5: 125 bytes in all
        self.write(encode_frame(CLOSE, struct.pack("!H", code) + text.encode()))
        self.close_sent = True

    def hang_up(self):
        """End the connection so that the peer learns why (RFC 6455 7.1.1)."""
        self.is_closed = True
        hang_up(self.socket)


def hang_up(sock):
    """End our half of a connection and throw away what the peer still sends, or its system might
    throw away what we sent last (RFC 9112 9.6)."""
    deadline = time.monotonic() + HANG_UP_SECONDS
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        while (left := deadline - time.monotonic()) > 0:
            sock.settimeout(left)
            if not sock.recv(1 << 18):
                break


def buffered(handler):
    """What the client sent right behind its handshake: rfile has it, the socket no longer does."""
    handler.connection.setblocking(False)
    try:
        return handler.rfile.read1(len(handler.rfile.peek()))
    except OSError:
        return b""   # where TCP has nothing yet and says so by an empty string, TLS raises


# ---- 6. The bridge: a page's WebSocket, and the mailboxes of its kernel ------------------------
#
# One thread for each page waits for two things: what the page says, and its mailbox. A kernel's
# message is four JSON parts, a page's is a JSON object with four such members. What a kernel says
# goes on as it came, and only its headers are read.

def splice(entry):
    """(opcode, payload) of an Entry in Jupyter's default protocol: its JSON as it came.

    `msg_id` and `msg_type` stand at the top level, too: Python clients look there.
    """
    header, parent_header, metadata, content = entry.json_parts
    text = b"".join((
        b'{"header":', header, b',"parent_header":', parent_header, b',"metadata":', metadata,
        b',"content":', content, b',"buffers":[],"channel":"', entry.channel.encode(),
        b'","msg_id":', to_json(entry.header["msg_id"]),
        b',"msg_type":', to_json(entry.msg_type), b"}"))
    if not entry.buffers:
        return TEXT, text
    return BINARY, join_parts([text, *entry.buffers])


def join_parts(parts):
    """Binary layout of the default protocol: n, n offsets (big-endian u32), then the n parts."""
    offsets, at = [], 4 * (len(parts) + 1)
    for part in parts:
        offsets.append(at)
        at += len(part)
    return struct.pack(f"!{len(parts) + 1}I", len(parts), *offsets) + b"".join(parts)


def unsplice(message):
    """The Entry in a page's WebSocket message, text or binary; raises ValueError."""
    text, *buffers = [message] if isinstance(message, str) else split_parts(message)
    members = {"channel": "shell", "parent_header": {}, "metadata": {}, **json.loads(text)}
    if not {"header", "content"} <= members.keys():
        raise ValueError("a message needs a header and a content")
    parts = [to_json(members[name])
             for name in ("header", "parent_header", "metadata", "content")]
    return Entry(members["channel"], parts, buffers)


def split_parts(message):
    """The parts of a message in that binary layout; raises ValueError."""
    try:
        count = struct.unpack_from("!I", message)[0]
        offsets = [*struct.unpack_from(f"!{count}I", message, 4), len(message)]
    except struct.error as problem:
        raise ValueError(f"a truncated binary message: {problem}") from None
    return [message[start:end] for start, end in zip(offsets, offsets[1:], strict=False)]


LAYOUTS = {None: (unsplice, splice)}   # subprotocol -> functions: message -> Entry, and back


class Bridge:
    """Carries messages between one WebSocket and one kernel until either is gone."""

    def __init__(self, websocket, kernel, inbox):
        self.websocket, self.kernel, self.inbox = websocket, kernel, inbox
        self.unsplice, self.splice = LAYOUTS[websocket.protocol]
        websocket.parser.about = {"kernel": kernel.id, "client": inbox.session_id}

    def run(self):
        self.poller = zmq.Poller()
        self.poller.register(self.inbox.fileno(), zmq.POLLIN)
        self.kernel.join(self.inbox)
        self.inbox.put()   # look at once: the kernel may be gone by now
        try:
            while not self.websocket.is_closed:
                self.step()
        finally:
            self.kernel.leave(self.inbox)

    def step(self):
        """Wait for either side and carry what has come."""
        page, has_room = self.websocket.fileno(), self.kernel.has_room
        self.poller.register(page, zmq.POLLIN if has_room else 0)
        ready = dict(self.poller.poll(0 if self.websocket.has_bytes else PING_SECONDS * 1000))
        if page in ready or self.websocket.has_bytes:
            for message in self.websocket.arrived():
                self.carry_up(message)
        # Only now, for a page that has left must find what is for it when it comes back (P3).
        if self.inbox.fileno() in ready and not self.websocket.is_closed:
            was_full = self.inbox.size > MOST_WAITING
            self.carry_down(self.inbox.take(BATCH))
            if was_full:
                self.kernel.requests.put()   # the watcher waits for room (P4)
        if self.kernel.is_gone and self.kernel.ended.is_set() and not self.inbox.items:
            self.websocket.close(GOING_AWAY, "the kernel was shut down")
            self.websocket.is_closed = True
        if not has_room:   # who is not read is not silent
            self.websocket.last_heard = time.monotonic()
        self.websocket.ping_or_give_up()

    def carry_down(self, entries):
        """Send Entries to the page."""
        # Of several crashes the last counts: a page that was away hears of all at once.
        if (life := max((entry.life for entry in entries), default=0)) > self.inbox.life:
            self.learn_of_crash(life)
        if entries:
            # Journey 11: verified, marked with its channel, and on its way to the page.
            self.websocket.write(*(self.websocket.frame(*self.splice(each)) for each in entries))
        if self.websocket.is_closed:
            self.inbox.put_back(entries)

    def learn_of_crash(self, life):
        """The page is told now. What it has said until this moment was meant for the process that
        is gone, and must not reach the next one (P5)."""
        arrived = zmq.Poller()
        arrived.register(self.websocket.fileno(), zmq.POLLIN)
        while not self.websocket.is_closed and (self.websocket.has_bytes or arrived.poll(0)):
            for message in self.websocket.arrived():
                self.carry_up(message)   # under the old life
        self.inbox.life = life

    def carry_up(self, message):
        """Sign what the page has said, and put it to the kernel's watcher. Large messages are
        signed in this thread, so that they hold up no other page."""
        try:
            entry = self.unsplice(message)
            entry.client = self.inbox.session_id
            if entry.channel in OWN_CHANNELS:
                return OWN_CHANNELS[entry.channel](self.kernel, entry)
            if entry.channel not in UPWARD:
                raise ValueError(f"there is no channel {entry.channel!r} to a kernel")
            signature = self.kernel.session.sign(entry.json_parts)
            self.kernel.send(Request(
                entry.channel, [our_kernel.DELIMITER, signature, *entry.json_parts, *entry.buffers],
                entry, life=self.inbox.life))
        except Exception as problem:   # whatever a page may send: the bridge goes on
            log(f"kernel {self.kernel.id}: dropped a page's message: {problem!r}")


# ---- 7. Who may come in ------------------------------------------------------------------------
#
# Three questions come before any handler. Is the Host one of ours? (Else a foreign name may point
# here: DNS rebinding.) Does the client know the token, or has it the cookie that the token was
# exchanged for? And if it is a cookie, which a browser sends along whoever asks: does the request
# come from our own page?

SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}  # RFC 9110 9.2.1
METHODS = SAFE_METHODS | {"POST", "PUT", "PATCH", "DELETE"}
LOCAL_HOST = re.compile(r"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]*)?", re.I)   # and port


def same_secret(given, secret):
    """Compare without telling by the time it takes how much was right."""
    return hmac.compare_digest(*(text.encode("utf-8", "replace") for text in (given, secret)))


def as_it_is(secret):
    """A pattern of bytes: the secret as it is, and as it stands in an address."""
    return re.compile(b"|".join(re.escape(text.encode("utf-8", "surrogatepass"))
                                for text in (secret, quote(secret, errors="replace"))))


SPELLINGS = [as_it_is]   # functions of a secret -> pattern of its spellings: the last one is used


def is_loopback(ip):
    """True when only this machine reaches what listens there."""
    return ip.startswith(LOOPBACK) or ip == "localhost"


class Access:
    """What opens this server, and for whom. It knows requests by their headers alone."""

    def __init__(self, token, ip, port, base_url="/"):
        self.token, self.ip, self.base_url = token, ip, base_url
        self.is_secure = False   # True when cookies may go through TLS alone
        self.cookie_name = f"minijupyter-{port}"                # cookies do not know ports
        self.cookie_value = self.new_cookie()

    def new_cookie(self, about=""):
        """What a cookie says. It changes with the token, and with what else lets in."""
        return hmac.new(self.token.encode(), f"cookie {about}".encode(), "sha256").hexdigest()

    def is_token(self, given):
        return same_secret(given, self.token)

    def without_token(self, data):
        """Bytes as a text in which the token cannot be read."""
        return SPELLINGS[-1](self.token).sub(b"...", data).decode("utf-8", "replace")

    def given_token(self, headers, query):
        """The token of the Authorization header or of the query; None when there is none."""
        scheme, _, value = headers.get("Authorization", "").partition(" ")
        if scheme.lower() in ("token", "bearer"):
            return value.strip(" ")
        return query["token"][0] if "token" in query else None

    def cookie(self, headers, name):
        found = re.search(rf"(?:^|;\s*){re.escape(name)}=([^;\s]+)", headers.get("Cookie", ""))
        return found[1] if found else ""

    def has_cookie(self, headers):
        return same_secret(self.cookie(headers, self.cookie_name), self.cookie_value)

    def set_cookie(self, name, value, more="HttpOnly; SameSite=Strict"):
        """The Set-Cookie header; without a value it takes the cookie away."""
        end = "" if value else "; Max-Age=0"
        secure = "; Secure" if self.is_secure else ""
        return f"{name}={value}; Path={self.base_url}; {more}{secure}{end}"

    def is_our_host(self, host):
        """Bound to loopback, the server answers only to names that mean loopback."""
        return not is_loopback(self.ip) or LOCAL_HOST.fullmatch(host) is not None

    def is_our_page(self, method, headers, query):
        """True when a request with our cookie may come from our own page, or from a program that
        knows what only a page of ours could: Jupyter's _xsrf cookie, said a second time."""
        if headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            return False
        origin = headers.get("Origin")
        if origin is not None:
            return re.sub("^https?://", "", origin) == headers.get("Host")
        return method in SAFE_METHODS or self.repeats_xsrf(headers, query.get("_xsrf", [""])[0])

    def repeats_xsrf(self, headers, given):
        xsrf = self.cookie(headers, "_xsrf")
        return bool(xsrf) and same_secret(headers.get("X-XSRFToken") or given, xsrf)


ACCESS = [Access]   # classes: the last one is used


# ---- 8. HTTP: routes, handlers -----------------------------------------------------------------
#
# ROUTES is the whole API: method, pattern of the path, endpoint. An endpoint is a function of the
# handler and the pattern's groups, or the name of such a method of Handler. It returns what is
# sent as JSON, or (status, JSON), or sends by itself and returns nothing. To add one, add a row
# (the last that fits counts), and its name to OPEN_TO_ALL when it needs no token.

ROUTES = [
    ("GET", r"/", "home"),
    ("GET", r"/(?:tree|notebooks|edit)(?:/.*)?", "page"),
    ("GET", r"/frame", "frame"),
    ("GET", r"/files/(.+)", "file"),
    ("GET", r"/api", "version"),
    ("POST", r"/api/shutdown", "shutdown_server"),
    ("GET", r"/api/contents(?:/(.*))?", "get_contents"),
    ("POST", r"/api/contents(?:/(.*))?", "create_contents"),
    ("PUT", r"/api/contents/(.+)", "save_contents"),
    ("PATCH", r"/api/contents/(.+)", "rename_contents"),
    ("DELETE", r"/api/contents(?:/(.*))?", "delete_contents"),
    ("GET", r"/api/kernelspecs", "list_kernelspecs"),
    ("GET", r"/api/kernels", "list_kernels"),
    ("POST", r"/api/kernels", "start_kernel"),
    ("GET", rf"/api/kernels/{ID}", "get_kernel"),
    ("DELETE", rf"/api/kernels/{ID}", "shutdown_kernel"),
    ("POST", rf"/api/kernels/{ID}/interrupt", "interrupt_kernel"),
    ("POST", rf"/api/kernels/{ID}/restart", "restart_kernel"),
    ("GET", rf"/api/kernels/{ID}/channels", "channels"),
    ("GET", r"/api/sessions", "list_sessions"),
    ("POST", r"/api/sessions", "create_session"),
    ("GET", rf"/api/sessions/{ID}", "get_session"),
    ("PATCH", rf"/api/sessions/{ID}", "change_session"),
    ("DELETE", rf"/api/sessions/{ID}", "delete_session"),
]
OPEN_TO_ALL = {"version", "frame"}   # endpoints that need no token
PAGES = {"home", "page", "view"}      # endpoints for people: a refusal leads to the login
BEFORE = []    # functions of the handler, called when the head of a request has come …
ADMITTED = []  # … when it has shown the token or the cookie …
AFTER = []     # … and when it is answered, or has become a WebSocket
CHECKS = []    # functions(handler, JSON object of a body): Problem 400 for what cannot be wished
CODINGS = {}   # transfer coding -> function(handler, most bytes) -> the body
MOST_BODY = 1 << 30                   # bytes of a request; a notebook of a gigabyte is a mistake
MOST_FORM = 1 << 16                   # bytes of a request from who is not let in yet
MOST_DISCARDED = 1 << 20              # bytes of a refused request; more, and the connection ends
MOST_HEAD, MOST_FIELDS = 1 << 16, 100   # bytes and lines of a head, as http.server allows
STATUS_OF = {   # errno -> HTTP status of what the disk refuses
    errno.EACCES: 403, errno.EPERM: 403, errno.EROFS: 403, errno.ENOENT: 404, errno.ENOSPC: 507,
    errno.EDQUOT: 507, errno.EFBIG: 507, errno.ENAMETOOLONG: 400, errno.EEXIST: 409,
    errno.ENOTDIR: 400, errno.EISDIR: 400, errno.EINVAL: 400}   # the last: into itself
API_POLICY = "default-src 'none'; frame-ancestors 'self'"
FILE_POLICY = "sandbox allow-scripts; frame-ancestors 'self'"
PAGE_POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline' 'self'; "
    "img-src 'self' data: blob: https: http:; media-src 'self' data: blob: https: http:; "
    "font-src 'self' data:; connect-src 'self'; frame-src 'self' blob: data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'self'; require-trusted-types-for 'script'; "
    "trusted-types inert")
FRAME_POLICY = "sandbox allow-scripts allow-popups allow-forms; frame-ancestors 'self'"
FRAME = b"""<!doctype html><meta charset="utf-8"><script>
// An output with scripts lives here, in an origin of its own: the page posts its HTML, and it
// answers with its height whenever that changes.
addEventListener('message', event => {
  if (event.source !== parent || typeof event.data.html !== 'string') return;
  // What lies outside of the flow counts only where there is nothing else.
  const tell = 'new ResizeObserver(() => parent.postMessage({height: Math.max('
    + 'document.documentElement.offsetHeight, document.body.scrollHeight)'
    + ' || Array.from(document.body.querySelectorAll("*")).reduce((most, node) =>'
    + ' Math.max(most, node.getBoundingClientRect().bottom), 0)}, "*"))'
    + '.observe(document.body)';
  document.open();
  document.write('<!doctype html><meta charset="utf-8">'
    + '<style>body { margin: 0; font: 14px/1.5 system-ui, sans-serif }</style>'
    + event.data.html + '<script>' + tell + '</' + 'script>');
  document.close();
});
</script>"""
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"   # RFC 9110 5.6.2
TEXT_BYTES = r"[^\0-\x08\x0a-\x1f\x7f]*"   # no control but the tab (RFC 9110 5.5)
REQUEST_LINE = re.compile(rf"({TOKEN}) ([^\0-\x20\x7f]+) HTTP/([0-9])\.([0-9])")   # RFC 9112 3
FIELD = re.compile(rf"({TOKEN}):({TEXT_BYTES})")                                  # RFC 9112 5
HOST = re.compile(r"[][A-Za-z0-9._~!$&'()*+,;=%:-]*")                              # RFC 3986 3.2
DIGITS = re.compile("[0-9]{1,18}")       # a longer number counts no bytes


def routes_at(path):
    """{method: (endpoint, groups of its pattern)} of a path."""
    matches = [(method, endpoint, re.fullmatch(pattern, path, re.S))
               for method, pattern, endpoint in ROUTES]
    return {method: (endpoint, [group or "" for group in match.groups()])
            for method, endpoint, match in matches if match}


def hashes_of_scripts(page):
    """How a policy names the scripts in a page's bytes (CSP 3, 2.3.1)."""
    # `.*?` before the end would take fourteen times as long: it looks for that at each character.
    scripts = re.findall(rb"<script[^>]*>([^<]*(?:<(?!/script>)[^<]*)*)", page)
    digests = (base64.b64encode(hashlib.sha256(script).digest()) for script in scripts)
    return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)


class Headers:
    """The fields of a header section; their names have no case (RFC 9110 5.1)."""

    def __init__(self, fields=()):
        self.values = {}        # name in lower case -> [value]
        for name, value in fields:
            self.values.setdefault(name.lower(), []).append(value)

    def get(self, name, default=None):
        """The first value; RFC 9110 5.3 has lists in several fields, for those see get_all."""
        return self.values.get(name.lower(), (default,))[0]

    def get_all(self, name, default=None):
        return self.values.get(name.lower(), default)


NO_HEADERS = Headers()


class Head:
    """A request's head: its bytes up to and with the empty line, understood.

    Strict, because a head that two programs read in two ways hides a second request from one of
    them. Raises Problem 400 for what RFC 9112 has no place for: a line that ends in LF or CR alone,
    NUL and other controls, a space before the colon, a folded field (2.2, 3, 5.1, 5.2), a Host that
    is missing or there twice (3.2); 505 for a version that is not HTTP/1 (RFC 9110 15.6.6).
    """

    def __init__(self, data):
        first, *lines = data.decode("latin-1").split("\r\n")
        line, fields = REQUEST_LINE.fullmatch(first), [*map(FIELD.fullmatch, lines[:-2])]
        if not line or lines[-2:] != ["", ""]:
            raise Problem(400, "This is no request line, or a line does not end in CRLF")
        self.method, self.target, major, minor = line.groups()
        self.is_old = minor == "0"
        if major != "1":
            raise Problem(505, "This server speaks HTTP/1.1")
        if not all(fields):
            raise Problem(400, "The headers of the request are malformed")
        self.headers = Headers([(field[1], field[2].strip(" \t")) for field in fields])
        hosts = self.headers.get_all("Host", [""] if self.is_old else [])
        if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
            raise Problem(400, "A request names one Host")
        self.length = self.body_length()
        options = [word.lower() for word in words(self.headers, "Connection")]
        self.is_last = "keep-alive" not in options if self.is_old else "close" in options

    def body_length(self):
        """How many bytes the body has; None when its coding tells its end (RFC 9112 6.3). Problem
        400 where one cannot be sure, 501 for a coding that is not in CODINGS (6.1)."""
        lengths, codings = (self.headers.get_all(name) for name in (
            "Content-Length", "Transfer-Encoding"))
        if not lengths and not codings:
            return 0
        if not codings:
            if len(lengths) > 1 or not DIGITS.fullmatch(lengths[0]):
                raise Problem(400, "Content-Length must be one number")
            return int(lengths[0])
        if lengths or self.is_old:
            raise Problem(400, "Transfer-Encoding goes with HTTP/1.1, and with no Content-Length")
        self.coding = ", ".join(codings).lower()
        if self.coding not in CODINGS:
            raise Problem(501, f"This server knows no Transfer-Encoding {self.coding}")
        return None


def split_target(target):
    """(path, query, host that it names, most often "") of a request's target (RFC 9112 3.2);
    "//host/" is a path here, never a host. Problem 400."""
    try:
        url = urlsplit(re.sub("^/{2,}", "/", target.encode("latin-1").decode()))
        return unquote(url.path), parse_qs(url.query, max_num_fields=MOST_FIELDS), url.netloc
    except ValueError:
        raise Problem(400, "This is no path, or its query is too long") from None


class Handler(BaseHTTPRequestHandler):
    """One HTTP connection; the requests on it come one after the other.

    Of the standard library's handler it takes the connection's life. It reads heads by itself:
    that one takes a header for what it may be, and most of its time to do so.
    """

    protocol_version, server_version, sys_version = "HTTP/1.1", f"MiniJupyter/{__version__}", ""
    disable_nagle_algorithm = True   # otherwise small answers wait 40 ms for an acknowledgement
    timeout = 75                     # seconds of silence before a kept-alive connection is closed
    wbufsize = 1 << 16               # headers and body leave together
    request_version = protocol_version   # for send_response, which knows HTTP/0.9 as well
    parse_head, split_target, routes_at = map(staticmethod, (Head, split_target, routes_at))

    def handle(self):
        """Serve a connection to its end; a client that vanishes is no error."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()

    def handle_one_request(self):
        """Answer a request; `close_connection` says that there will be no other."""
        self.close_connection, self.is_answered = True, False
        self.command, self.path, self.headers, self.head = "", "", NO_HEADERS, None
        self.endpoint, self.query, self.body = type(self).answer, {}, b""
        self.head_bytes = self.read_head()
        if self.head_bytes:
            self.answer()
            self.wfile.flush()

    def answer(self):
        """Check the request, read its body, find its route, send what the handler returns."""
        for hear in BEFORE:
            hear(self)
        try:
            self.take_head()
            self.split_path()
            endpoint, groups = self.find_route()
            self.name = name = endpoint if isinstance(endpoint, str) else endpoint.__name__
            self.endpoint = getattr(type(self), name) if endpoint is name else endpoint
            if self.admit(name):
                self.body = self.read_body(MOST_FORM if name in OPEN_TO_ALL else MOST_BODY)
                result = self.endpoint(self, *groups)
                if not self.is_answered:
                    status, value = result if isinstance(result, tuple) else (200, result)
                    self.send_json(status, value)
        except Problem as problem:
            self.send_problem(problem)
        except OSError as problem:
            if isinstance(problem, (ConnectionError, TimeoutError)):
                raise   # the client is gone: `handle` ends the connection
            self.send_problem(Problem(STATUS_OF.get(problem.errno, 500),
                                      problem.strerror or type(problem).__name__))
        except Exception as problem:
            import traceback
            log(self.server.access.without_token(traceback.format_exc().encode()))
            self.send_problem(Problem(500, f"The server failed: {type(problem).__name__}"))
        finally:
            self.end_request()

    def end_request(self):
        """Tell that the request is over; of a WebSocket again when that ends."""
        for hear in AFTER:
            hear(self)

    def finish(self):
        with contextlib.suppress(OSError):   # the client is gone
            super().finish()

    # -- the request --

    def read_head(self):
        """The next request line and header section, as far as their limit; what ends them is their
        empty line, or a line that no head can have. Empty when the client has no more to ask."""
        head = line = self.rfile.readline(MOST_HEAD)
        if line == b"\r\n":                 # RFC 9112 2.2: some send one behind the last body
            head = line = self.rfile.readline(MOST_HEAD)
        while line[-2:] == b"\r\n" and len(line) > 2 and len(head) < MOST_HEAD:
            line = self.rfile.readline(MOST_HEAD - len(head))
            head += line
        return head

    def take_head(self):
        """`command`, `path` and `headers` of the head. Problem 414 and 431 when it is too large
        (RFC 6585 5); after a head that we do not understand the connection ends."""
        data = self.head_bytes
        if len(data) >= MOST_HEAD or data.count(b"\n") > MOST_FIELDS + 2:
            is_line = b"\n" not in data
            raise Problem(414 if is_line else 431, "The head of the request is too large")
        head = self.head = self.parse_head(data)
        self.command, self.path, self.headers = head.method, head.target, head.headers
        self.close_connection = head.is_last
        self.body = None    # it is still to be read, or to be discarded

    def split_path(self):
        """`route` and `query` of the request line."""
        path, query, self.named_host = self.split_target(self.path)
        self.query = dict(query)
        base = self.server.base_url
        if not f"{path}/".startswith(base):
            self.route = ""
            raise Problem(404, f"There is nothing at {path}; this server is at {base}")
        self.route = "/" + path[len(base):]

    def read_body(self, most):
        """The body's bytes; Problem 413, and the end of the connection, when they are more."""
        length, self.body = self.head.length, b""    # whatever comes of it, it is read once
        if length is not None and length > most:
            self.close_connection = True
            raise Problem(413, f"A body may have {most} bytes here")
        return CODINGS[self.head.coding](self, most) if length is None else (
            self.read_exactly(length))

    def read_exactly(self, size):
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionError("the client ended the connection in the middle of a body")
        return data

    def discard_body(self):
        """Read a body that nobody wants, or the next request on this connection would begin in its
        middle. A large one is not worth it."""
        with contextlib.suppress(Problem):
            self.read_body(MOST_DISCARDED)

    def json_body(self, load=json.loads):
        """The JSON object in the body; an empty body is an empty object."""
        try:
            value = load(self.body or b"{}")
        except (ValueError, RecursionError) as problem:
            raise Problem(400, f"Invalid JSON in the body of the request: {problem}") from None
        if not isinstance(value, dict) or not isinstance(value.get("kernel") or {}, dict):
            raise Problem(400, "The body must be a JSON object, and so must its kernel")
        for check in CHECKS:
            check(self, value)
        return value

    def find_route(self):
        """(endpoint, groups of its pattern); Problem 404, or 405 with the methods there are."""
        if self.command not in METHODS:
            raise Problem(501, f"This server knows no {self.command}")   # RFC 9110 9.1
        method = "GET" if self.command == "HEAD" else self.command
        routes = self.routes_at(self.route.rstrip("/") or "/")
        if method in routes:
            return routes[method]
        allowed = [*routes]
        if not allowed:
            raise Problem(404, f"There is nothing at {self.route}")
        problem = Problem(405, f"{self.command} is not possible at {self.route}")
        methods = {*allowed, *(["HEAD"] if "GET" in allowed else [])}
        problem.headers = {"Allow": ", ".join(sorted(methods))}
        raise problem

    # -- access --

    def admit(self, name):
        """True when the request may pass; raises Problem 403 or leads to the login page."""
        access = self.server.access
        if not access.is_our_host(self.named_host or self.headers.get("Host", "")):
            raise Problem(403, "This server does not answer to that Host name")
        if name in OPEN_TO_ALL:
            return True
        given = access.given_token(self.headers, self.query)
        has_token = given is not None and access.is_token(given)
        if has_token or given is None and access.has_cookie(self.headers):
            is_navigation = name in PAGES and self.command in SAFE_METHODS   # a link leads here
            if not has_token and not is_navigation and not access.is_our_page(
                    self.command, self.headers, self.query):
                raise Problem(403, "The request comes from another site")
            for hear in ADMITTED:
                hear(self)
            shows_token = has_token and name in PAGES and "token" in self.query
            return not shows_token or self.move_token_to_cookie()
        if name not in PAGES or not self.routes_at("/login"):
            raise Problem(403, "Forbidden: a valid token is needed")
        self.redirect(f"{self.server.base_url}login?next={quote(self.address_without_token())}")
        return False

    def address_without_token(self):
        query = "&".join(f"{quote(key)}={quote(value)}" for key, values in self.query.items()
                         for value in values if key != "token")
        return self.server.base_url + quote(self.route[1:]) + ("?" + query if query else "")

    def move_token_to_cookie(self):
        """Answer so that a cookie keeps the token and the address bar loses it; returns False."""
        access = self.server.access
        self.redirect(self.address_without_token(),
                      access.set_cookie(access.cookie_name, access.cookie_value))
        return False

    def redirect(self, address, cookie=None):
        self.send(302, b"", "text/plain",
                  {"Location": address, **({"Set-Cookie": cookie} if cookie else {})})

    # -- the response --

    def send(self, status, data, content_type, headers=()):
        """Send a whole response, bytes or a list of them; HEAD gets the same headers, no body."""
        pieces = data if isinstance(data, list) else [data]
        if self.body is None:
            self.discard_body()
        fields = {"Content-Type": content_type, "Content-Length": str(sum(map(len, pieces))),
                  "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store",
                  "Content-Security-Policy": API_POLICY, "Referrer-Policy": "no-referrer",
                  **dict(headers)}
        if status == 204:
            del fields["Content-Length"]       # RFC 9110 8.6
        if self.close_connection or self.head.is_old:
            fields["Connection"] = "close" if self.close_connection else "keep-alive"
        self.log_request(status)
        lines = [f"HTTP/1.1 {status} {self.responses[status][0]}", f"Server: {self.server_version}",
                 f"Date: {http_date(int(time.time()))}",
                 *[f"{name}: {value}" for name, value in fields.items()], "\r\n"]
        head = "\r\n".join(lines).encode("latin-1")
        if head.count(b"\n") != len(lines):
            raise ValueError("a header with a line end in it would be two")
        self.is_answered = True
        self.wfile.write(head)
        if self.command != "HEAD" and status != 204:
            for piece in pieces:
                self.wfile.write(piece)

    def send_json(self, status, value, headers=()):
        self.send(status, b"" if value is None else to_json(value), "application/json", headers)

    def send_problem(self, problem):
        """The one place where an error becomes an answer."""
        if self.is_answered:     # its answer has begun: all that is left is to end the connection
            self.close_connection = True
            return
        told = {"message": problem.message, "reason": problem.reason, **problem.more}
        self.send_json(problem.status, told, problem.headers)

    def created(self, model, kind, id):
        self.send_json(201, model, self.location(kind, id))

    def location(self, kind, id):
        """The header that says where something is: as in "kernels", ID or "contents", PATH."""
        return {"Location": f"{self.server.base_url}api/{kind}/{quote(id)}"}

    def send_contents(self, status, model):
        """The answer to what changed a file: its model without content, where it is now, and when
        it was written."""
        self.send_json(status, model, {**self.location("contents", model["path"]),
                                       "Last-Modified": written_date(model["last_modified"])})

    def log_request(self, code="-", size="-"):
        """Nothing is said of a request in the terminal."""

    # -- pages and files --

    def home(self):
        self.redirect(f"{self.server.base_url}tree")

    def page(self):
        """index.html, for every page; its scripts are named in the policy by their hashes."""
        with open(os.path.join(HERE, "index.html"), "rb") as file:
            data = file.read()
        self.send(200, data, "text/html; charset=utf-8", {
            "Content-Security-Policy": PAGE_POLICY.format(scripts=hashes_of_scripts(data))})

    def frame(self):
        """The empty page in which outputs with scripts run; its policy makes it a stranger here."""
        self.send(200, FRAME, "text/html; charset=utf-8", {"Content-Security-Policy": FRAME_POLICY})

    def file(self, path):
        """A file's bytes. Whatever it is, it runs in no page of ours: its policy is a sandbox."""
        absolute = self.server.contents.existing(path)
        if os.path.isdir(absolute):
            raise Problem(404, f"{path} is a folder")
        headers = {"Content-Security-Policy": FILE_POLICY, "Cache-Control": "no-cache"}
        if "download" in self.query or path.endswith(".ipynb"):
            name = quote(os.path.basename(path), safe="")
            headers["Content-Disposition"] = f"attachment; filename*=utf-8''{name}"
        self.send_file(absolute, headers)

    def send_file(self, path, headers):
        with open(path, "rb") as file:
            kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
            self.send(200, file.read(), kind, headers)

    # -- /api --

    def version(self):
        return {"version": __version__}

    def shutdown_server(self):
        """End the server and its kernels, once this answer is sent."""
        threading.Thread(target=self.server.shutdown).start()
        return {}

    def asked(self, name, default=None, choices=None):
        """A query parameter; Problem 400 when it is not one of the choices."""
        value = self.query.get(name, [default])[0]
        if choices and value not in (None, *choices):
            raise Problem(400, f"{name} must be one of {', '.join(choices)}")
        return value

    def get_contents(self, path):
        kind = self.asked("type")
        info = self.server.contents.look(path)[1]
        answer = self.server.contents.get_json(
            path, kind if kind in (None, *UNTITLED) else "file",
            self.asked("format", choices=("text", "base64", "json")),
            self.asked("content", "1", "01") == "1", self.asked("hash", "0", "01") == "1")
        written = iso(info.st_mtime if info else 0)
        headers = {"Last-Modified": written_date(written)}
        self.send(200, answer, "application/json", headers)

    def create_contents(self, path):
        self.send_contents(201, self.server.contents.create(path, self.json_body()))

    def save_contents(self, path):
        expected = (NOT_THERE if self.headers.get("If-None-Match") == "*" else
                    self.headers.get("If-Match", "").strip('"') or None)
        body = self.json_body(CODEC["read_model"])
        if not body:
            return self.create_contents(path)
        model, is_new = self.server.contents.save(
            path, body, expected, with_hash=self.asked("hash") == "1")
        for hear in AFTER_SAVE:
            hear(self.server, path, model)
        self.send_contents(201 if is_new else 200, model)

    def rename_contents(self, path):
        new_path = self.json_body().get("path")
        if not isinstance(new_path, str):
            raise Problem(400, "The body must name the new path")
        model = self.server.contents.rename(path, new_path)
        self.server.sessions.follow_rename(path.strip("/"), model["path"])
        self.send_contents(200, model)

    def delete_contents(self, path):
        """With ?recursive=0 a folder that is not empty stays: a page can ask once more."""
        self.server.contents.delete(path, self.asked("recursive", "1", "01") == "1")
        return 204, None

    def list_kernelspecs(self):
        specs = {name: self.spec_model(name, *found) for name, found in find_specs().items()}
        return {"default": DEFAULT_KERNEL, "kernelspecs": specs}

    def spec_model(self, name, spec, folder):
        """A kernel spec as the API gives it; its resources are some of the files in its folder."""
        return {"name": name, "spec": spec, "resources": {}}

    def list_kernels(self):
        return [kernel.model() for kernel in list(self.server.kernels.all.values())]

    def start_kernel(self):
        """A new kernel; the one with the wished `kernel_id`, when there is one."""
        body = self.json_body()
        kernel = self.server.kernels.all.get(body.get("kernel_id")) or self.server.kernels.start(
            body.get("name"), body.get("path") or "", body.get("kernel_id"), body.get("env"))
        self.created(kernel.model(), "kernels", kernel.id)

    def get_kernel(self, id):
        return self.server.kernels.get(id).model()

    def shutdown_kernel(self, id):
        self.server.kernels.shutdown(id)
        return 204, None

    def interrupt_kernel(self, id):
        self.server.kernels.get(id).interrupt()
        return 204, None

    def restart_kernel(self, id):
        self.server.kernels.get(id).restart()
        return self.server.kernels.get(id).model()

    def channels(self, id):
        """From here on the connection is a WebSocket, and this thread is its bridge."""
        kernel = self.server.kernels.get(id)
        websocket = WebSocket.accept(self, [*filter(None, LAYOUTS)])
        self.is_answered = True
        self.end_request()
        mailbox = FOLLOWERS.get(self.asked("journal"), PageMailbox)
        Bridge(websocket, kernel, mailbox(self.asked("session_id"), websocket)).run()

    def list_sessions(self):
        return self.server.sessions.list()

    def create_session(self):
        session = self.server.sessions.create(self.json_body())
        self.created(self.server.sessions.model(session), "sessions", session["id"])

    def get_session(self, id):
        return self.server.sessions.model(self.server.sessions.get(id))

    def change_session(self, id):
        return self.server.sessions.model(self.server.sessions.change(id, self.json_body()))

    def delete_session(self, id):
        self.server.sessions.delete(id)
        return 204, None


HANDLERS = [Handler]   # classes: the last one is used


class Server(ThreadingHTTPServer):
    """The listening socket and what all connections share."""

    daemon_threads = True       # connections do not keep the program alive
    request_queue_size = 128    # connections that may wait to be accepted

    def __init__(self, root, ip, port, token, base_url="/", allow_hidden=False):
        """Raises OSError when it cannot listen there."""
        self.address_family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        super().__init__((ip, port), HANDLERS[-1])
        self.ip, self.base_url, self.scheme = ip, base_url, "http"
        self.wrap = lambda sock: sock   # what connections speak through; TLS replaces it
        self.access = ACCESS[-1](token, ip, self.server_port, base_url)
        self.contents = CONTENTS[-1](root, allow_hidden, private=[RUNTIME])
        self.kernels = Kernels(self.contents)
        self.sessions = Sessions(self.kernels)

    def server_bind(self):
        """Without HTTPServer's look-up of the host's full name, which can take seconds."""
        # On Windows SO_REUSEADDR would let another program take the port that we listen on, and
        # with it our users' tokens; elsewhere it only shortens the wait after a server's end.
        option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
        self.socket.setsockopt(socket.SOL_SOCKET, option, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]

    def finish_request(self, request, client_address):
        """Serve a connection, in its own thread."""
        with contextlib.closing(self.wrap(request)) as connection:
            super().finish_request(connection, client_address)

    @property
    def url(self):
        host = "127.0.0.1" if self.ip in ("", "0.0.0.0", "::") else self.ip
        host = f"[{host}]" if ":" in host else host
        return f"{self.scheme}://{host}:{self.server_port}{self.base_url}"

    def address(self):
        """What a person opens: the token in it becomes a cookie."""
        return f"{self.url}tree?token={quote(self.access.token)}"

    def handle_error(self, request, client_address):
        log(f"A connection failed: {sys.exc_info()[1]!r}")


SERVERS = [Server]     # classes: the last one is used


# ---- 9. main: options, commands ----------------------------------------------------------------
#
# To add an option, add a row to OPTIONS, and to AT_START a function that obeys it. To add a
# command, write a function of its words whose docstring says how it is called and what it does.

FIRST_PORT, PORTS_TRIED = 8888, 50   # 8888 is Jupyter's
OPTIONS = [   # (names, what argparse wants to know of it)
    (["--ip"], {"default": "127.0.0.1", "metavar": "ADDRESS", "help":
                "where it listens (default: %(default)s, which only this machine reaches)"}),
    (["--port"], {"type": int, "help": f"default: {FIRST_PORT}, or the next that is free"}),
    (["--token"], {"help": "the secret that opens the server (default: $JUPYTER_TOKEN, or a new "
                           "one)"}),
    (["--base-url"], {"default": "/", "metavar": "PATH",
                      "help": "what all its addresses begin with"}),
    (["--allow-hidden"], {"action": "store_true", "help": "show and serve hidden files"}),
    (["--no-browser"], {"action": "store_true", "help": "do not open a browser"}),
]
AT_START = []   # functions (server, arguments): when it listens, before it answers
COMMANDS = {}   # first word of the command line -> function(the other words)


def parse_arguments():
    commands = [re.match(r"`(.+?)`: (.+?)\.(?:\s|$)", function.__doc__, re.S).groups()
                for function in COMMANDS.values()]
    parser = argparse.ArgumentParser(
        prog="minijupyter.py", description="A notebook server, a kernel and a page.",
        usage="\n       ".join(["%(prog)s [folder] [options]",
                                *(f"%(prog)s {form}" for form, _ in commands)]),
        epilog=" ".join(f"`{form}`: {what}." for form, what in commands))
    parser.add_argument("folder", nargs="?", default=".",
                        help="what the server shows (default: this folder)")
    for names, about in OPTIONS:
        parser.add_argument(*names, **about)
    arguments = parser.parse_args()
    if not os.path.isdir(arguments.folder):
        is_file, name = os.path.exists(arguments.folder), arguments.folder
        parser.error(f"{name} is a file, and the server shows a folder" if is_file else
                     f'there is no folder {name}. To make it: mkdir "{name}"')
    token = default_token() if arguments.token is None else arguments.token
    arguments.token = token.strip()
    if not arguments.token or not arguments.token.isprintable():
        parser.error("the token must not be empty, and its characters must be printable")
    arguments.base_url = re.sub("/+", "/", f"/{arguments.base_url}/")
    return arguments


def default_token():
    if file := os.environ.get("JUPYTER_TOKEN_FILE"):
        with open(file, encoding="utf-8") as opened:
            return opened.read().strip()
    return os.environ.get("JUPYTER_TOKEN") or secrets.token_hex(24)


def open_server(arguments):
    """A server at the wished port, or at the next free one when none was wished for."""
    wish = arguments.port
    ports = [*range(FIRST_PORT, FIRST_PORT + PORTS_TRIED), 0]   # 0: one that the system chooses
    for port in ports if wish is None else [wish]:
        try:
            return SERVERS[-1](arguments.folder, arguments.ip, port, arguments.token,
                               arguments.base_url, arguments.allow_hidden)
        except (OSError, OverflowError) as problem:
            is_taken = getattr(problem, "errno", None) in (errno.EADDRINUSE, errno.EACCES)
            if wish is not None or not is_taken or port == 0:
                reason = getattr(problem, "strerror", None) or problem
                sys.exit(f"Cannot listen on {arguments.ip}:{port}: {reason}")


def stop(signum, frame):
    raise KeyboardInterrupt


def main():
    """Obey a command, or serve until Ctrl-C or SIGTERM."""
    if sys.argv[1:] and sys.argv[1] in COMMANDS:
        return COMMANDS[sys.argv[1]](sys.argv[2:])
    arguments = parse_arguments()
    server = open_server(arguments)
    for obey in AT_START:
        obey(server, arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    print(f"MiniJupyter {__version__} serves {server.contents.root}\n\n    "
          f"{server.address()}\n\nCtrl-C stops it and its kernels.", flush=True)
    if not is_loopback(server.ip) and server.scheme == "http":
        print("Other machines can reach it, and the network between can read along.",
              flush=True)
    if not arguments.no_browser:
        import webbrowser
        threading.Thread(target=webbrowser.open, args=[server.address()], daemon=True).start()
    serve(server)


def serve(server):
    """Answer requests until the server is told to end; then end every kernel."""
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("\nStopping the kernels …", flush=True)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):   # a second one must leave no kernel behind
            signal.signal(number, signal.SIG_IGN)
        server.kernels.shutdown_all()
        server.server_close()


# ==== Part II: delete from here to its end mark, and the rest runs ====
#
# What people expect beyond the architecture. Each section can be deleted, alone, or with those that
# say that they need it. What it plugs into stands behind its name:
#
#    10 Byte for byte                            DOCUMENTS
#    11 Cells that are not whole                 MEND
#    12 Old formats                              UPGRADES
#    13 What the schema says                     CONTENTS
#    14 Large things, a little at a time         CODEC
#    15 Names that no client could send back     CONTENTS
#    16 Fewer questions to the disk              CONTENTS
#    17 Many servers, owners, crashes            TEMPORARIES, FOLDERS, CONTENTS
#    18 What was read or asked for a moment ago  CONTENTS
#    19 Files that cannot be replaced            REPLACE, CONTENTS
#    20 Links and copies                         CONTENTS
#    21 Checkpoints                              ROUTES, CONTENTS
#    22 Uploads in pieces                        CONTENTS
#    23 What Jupyter refuses and guesses         CONTENTS
#    24 Ranges                                   HANDLERS
#    25 Bodies                                   CODINGS, HANDLERS
#    26 What clients ask again and again         HANDLERS
#    27 Clients that send drop by drop           HANDLERS
#    28 Strangers                                HANDLERS, SERVERS, ADMITTED, AFTER
#    29 Where Jupyter looks                      SPEC_FOLDERS
#    30 Pictures of kernels                      ROUTES, HANDLERS
#    31 Wishes that cannot be fulfilled          CHECKS, SPEC_CHECKS
#    32 The journal                              KERNEL_EXTRAS, FOLLOWERS, OWN_CHANNELS, AFTER_SAVE
#    33 Orphans                                  KERNEL_EXTRAS
#    34 Windows                                  OUTPUTS
#    35 What a page says, as it stands           LAYOUTS
#    36 The other layout of messages             LAYOUTS
#    37 Compression                              EXTENSIONS
#    38 However a secret is spelled              SPELLINGS, ACCESS
#    39 Login                                    ACCESS, ROUTES, OPEN_TO_ALL, OPTIONS, COMMANDS
#    40 TLS                                      OPTIONS, AT_START
#    41 How kernels are reached                  PORTS, OPTIONS, AT_START
#    42 Ports that others took                   REPAIRS
#    43 What the terminal shows                  HANDLERS, OPTIONS, AT_START
#    44 Few garbage collections                  AT_START
#    45 Idle kernels                             OPTIONS, AT_START
#    46 What few clients ask for                 ROUTES, CHECKS, ADMITTED, HANDLERS, SERVERS
#    47 Under the hood                           TAPS, BEFORE, AFTER, KERNEL_EXTRAS, ROUTES
#    48 Other servers                            COMMANDS, AT_START, SERVERS
#    49 Other clients of a kernel                ROUTES
#    50 Pages of other sites                     OPTIONS, AT_START, HANDLERS, SERVERS needs 46
#    51 Parameters                               TRANSLATORS
#    52 Run a notebook without a page            COMMANDS                          needs 51 55
#    53 Clusters                                 ROUTES, SERVERS, OPTIONS, AT_START needs 63
#    54 Programs as notebooks                    CONTENTS
#    55 Download as                              ROUTES                            needs 54
#    56 A terminal on a kernel                   COMMANDS                          needs 33 48
#    57 Editing                                  AT_CONSOLE                        needs 56
#    58 A trace that is kept                     OPTIONS, AT_START                 needs 47
#    59 Markdown files as notebooks              ROUTES                            needs 54
#    60 A lecture                                OPTIONS, AT_START, SERVERS
#    61 Tables of text                           ROUTES
#    62 Variables of other kernels               ROUTES
#    63 Environments of the folder               OWN_SPECS, AT_START
#    64 The trash                                ROUTES                            needs 21
#    65 Welcome                                  ROUTES
#    66 A quick start                            run_as_module


# ---- 10. Byte for byte: a save changes what was changed ----------------------------------------
#
# A browser cannot keep a file byte for byte: to JavaScript 1.0 and 1 are the same number. So a
# save is compared with what the file says: an untouched notebook is not written at all, and in a
# changed one every untouched cell stays as it stood. For that a file is read cell by cell, and the
# place of each is kept.

BOM = codecs.BOM_UTF8
to_text = json.JSONEncoder(ensure_ascii=False).encode


class NotebookReader:
    """Reads a notebook's JSON member by member and cell by cell, and notes where each stands:
    `notebook`, `places` and `tail` as in a NotebookFile. Raises ValueError."""

    def __init__(self, data):
        self.text, self.notebook, self.places, self.tail = data.decode("utf-8-sig"), {}, {}, ""
        # One place, in characters of the text and in bytes of the file: see `place`.
        self.at, self.byte = 0, len(BOM) if data.startswith(BOM) else 0
        start = skip_space(self.text, 0)
        if start == len(self.text):   # an empty file is a new notebook
            self.notebook = new_notebook()
        elif self.text[start] != "{":
            JSON.decode(self.text)
        else:
            end = read_entries(self.text, start, "}", self.read_member)
            self.tail = self.text[end:]
            if self.tail.strip():
                raise json.JSONDecodeError("Extra data", self.text, end)

    def read_member(self, at):
        """Read the member of the notebook's object that begins at `at`; returns where it ends."""
        if not self.text.startswith('"', at):
            raise json.JSONDecodeError("Expecting a name", self.text, at)
        key, at = JSON.raw_decode(self.text, at)
        at = skip(":", self.text, skip_space(self.text, at))
        if key == "cells" and self.text.startswith("[", at):
            self.notebook[key], self.places[key] = [], []
            return read_entries(self.text, at, "]", self.read_cell)
        self.notebook[key], end = JSON.raw_decode(self.text, at)
        self.places[key] = self.place(at, end)
        return end

    def read_cell(self, at):
        cell, end = JSON.raw_decode(self.text, at)
        self.notebook["cells"].append(cell)
        self.places["cells"].append(self.place(at, end))
        return end

    def place(self, start, end):
        """The bytes of these characters. It is asked for from the front to the back, so that only
        what lies between two places need be counted."""
        first = self.byte + len(encode_text(self.text[self.at:start]))
        self.at, self.byte = end, first + len(encode_text(self.text[start:end]))
        return slice(first, self.byte)


class NotebookFile:
    """What a notebook file says, and where it says it. Raises NotANotebook.

    notebook = the JSON object, of version 4 and of a sound structure
    mended = numbers of the cells, and names of other parts, that are not whole in the file
    places = {key: slice of `data`}; for "cells" a list of them, one for each cell
    tail = what comes after the object: one newline, as a rule
    """

    def __init__(self, data):
        try:
            reader = NotebookReader(data)
        except (ValueError, RecursionError) as problem:
            raise NotANotebook(f"the file is not JSON: {problem}") from None
        self.data, self.places, self.tail = data, reader.places, reader.tail
        self.notebook, self.version, self.mended = current(reader.notebook)

    @classmethod
    def written(cls, notebook, old=None):
        """The file that says what a good notebook says. What `old`, which is on disk now, says
        already is left as it stands there."""
        if old and not old.mended and is_unchanged(old.served, notebook):
            return old
        return rewritten(without_origin(notebook), old if old and old.version == 4 else None)

    @classmethod
    def put_together(cls, notebook, served, data, places, tail):
        """The same for bytes that were just made; they need not be read."""
        file = cls.__new__(cls)
        file.notebook, file.served, file.version = notebook, as_served(notebook, served), 4
        file.data, file.places, file.tail, file.mended = data, places, tail, ()
        return file

    @functools.cached_property
    def served(self):
        """The notebook as the API gives it: strings joined, ids in 4.5."""
        cells = [map_strings(cell, join) for cell in self.notebook["cells"]]
        return as_served(self.notebook, cells)

    @functools.cached_property
    def hash(self):
        return sha256(self.data)


def without_origin(notebook):
    """The notebook, no more saying that it comes from an older format (see `upgrade`)."""
    if notebook["metadata"].get("orig_nbformat") not in [*UPGRADES]:
        return notebook
    metadata = {key: value for key, value in notebook["metadata"].items()
                if key not in ("orig_nbformat", "orig_nbformat_minor")}
    return {**notebook, "metadata": metadata}


class Layout:
    """How JSON is laid out in a notebook file: as Jupyter does it, or as an older file has it."""

    def __init__(self, file=None):
        self.newline, self.step, self.is_sorted, self.start, self.end = "\n", " ", True, b"", "\n"
        self.is_lossy = False   # did we write null for what JSON has not?
        if file:
            match = re.match(rb"(?:\xef\xbb\xbf)?\s*\{(\r?\n|)([ \t]*)", file.data)
            self.newline, self.step = (part.decode() for part in match.groups())
            self.is_sorted = [*file.places] == sorted(file.places)
            self.start = BOM if file.data.startswith(BOM) else b""
            self.end = file.tail

    def write(self, value, depth):
        if isinstance(value, dict):
            return self.enclose("{}", depth, [
                f"{to_text(key)}: {self.write(part, depth + 1)}"
                for key, part in self.in_order(value)])
        if isinstance(value, list):
            return self.enclose("[]", depth, [self.write(part, depth + 1) for part in value])
        if isinstance(value, float) and not math.isfinite(value):
            self.is_lossy, value = True, None   # JSON has no NaN; a browser would have sent null
        return to_text(value)

    def in_order(self, members):
        return sorted(members.items()) if self.is_sorted else members.items()

    def enclose(self, brackets, depth, texts):
        """The texts, with brackets and commas around them."""
        if not texts:
            return brackets
        outer = self.newline + self.step * depth
        inner = outer + self.step
        return brackets[0] + inner + f",{inner}".join(texts) + outer + brackets[1]


class Pieces:
    """Bytes that are made piece by piece; of each can be told where it stands."""

    def __init__(self, start):
        self.pieces, self.size = [start], len(start)

    def add(self, piece):
        """The slice of the whole at which the piece, text or bytes, stands now."""
        data = encode_text(piece) if isinstance(piece, str) else piece
        self.pieces.append(data)
        self.size += len(data)
        return slice(self.size - len(data), self.size)


def rewritten(notebook, file):
    """A changed notebook, with the texts of what did not change in `file`."""
    layout, places = Layout(file), {}
    made = Pieces(layout.start)
    cells = [*matched_cells(notebook["cells"], file)]
    members = {**notebook, "cells": [cell for cell, _, _ in cells]}
    keys = dict.fromkeys([*(file.places if file else ()), *notebook])
    kept = file.places.keys() - file.mended if file else ()
    for key in sorted(notebook) if layout.is_sorted else filter(notebook.__contains__, keys):
        made.add(("," if places else "{") + layout.newline + layout.step)
        made.add(f"{to_text(key)}: ")
        if key == "cells":
            places[key] = add_cells(made, cells, file, layout)
        elif file and key in kept and same(file.notebook[key], notebook[key]):
            members[key] = file.notebook[key]
            places[key] = made.add(file.data[file.places[key]])
        else:
            places[key] = made.add(layout.write(notebook[key], 1))
    made.add(f"{layout.newline}}}{layout.end}")
    served, data = [served for _, served, _ in cells], b"".join(made.pieces)
    if layout.is_lossy:
        return NotebookFile(data)
    return NotebookFile.put_together(members, served, data, places, layout.end)


def matched_cells(cells, file):
    """Yield (cell as in a file, as the API gives it, its number in `file`) for each of the cells;
    the number is None for one that is new or changed."""
    known = {}   # (id, source) -> numbers of the cells in the file that look alike, the last first
    on_disk = [*zip(file.served["cells"], file.notebook["cells"], strict=True)] if file else []
    for number, (served, cell) in reversed([*enumerate(on_disk)]):
        # An id that was made up, and what the cell did not have, is to be written.
        if served.get("id") == cell.get("id") and number not in file.mended:
            known.setdefault(looks(cell), []).append(number)
    for cell in cells:
        alike = known.get(looks(cell))
        number = alike.pop() if alike else None
        if number is not None and same(on_disk[number][0], cell):
            yield on_disk[number][1], on_disk[number][0], number
        else:
            split_cell = map_strings(cell, split, is_split_mime)
            yield split_cell, map_strings(split_cell, join), None


def add_cells(made, cells, file, layout):
    """Add the array of cells to a notebook's bytes; returns the place of each. Cells that follow
    each other in the file too are copied in one piece, with what stands between them."""
    def distance(item):
        """How far a cell has moved from its place in the file: neighbours have moved alike. What
        is new is a run of its own."""
        position, (_, _, number) = item
        return (False, position) if number is None else (True, position - number)

    places, outer = [], layout.newline + layout.step
    for (is_kept, _), run in itertools.groupby(enumerate(cells), distance):
        run = [cell for _, cell in run]
        made.add(("," if places else "[") + outer + layout.step)
        if is_kept:
            old = file.places["cells"][run[0][2]:run[-1][2] + 1]
            piece = memoryview(file.data)[old[0].start:old[-1].stop]
            shift = made.add(piece).start - old[0].start
            places += [slice(place.start + shift, place.stop + shift) for place in old]
        else:
            places.append(made.add(layout.write(run[0][0], 2)))
    made.add(f"{outer}]" if cells else "[]")
    return places


def looks(cell):
    return str(cell.get("id")), str(join(cell.get("source")))


def same(one, other):
    """True when a JavaScript client cannot tell `other` from `one`, which stands in a file."""
    if isinstance(one, str):
        return one == other
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return False
        for key, value in one.items():   # a loop: this is most of the work of saving
            theirs = other[key]
            if value is not theirs and (value != theirs if isinstance(value, str)
                                        else not same(value, theirs)):
                return False
        return True
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return in_javascript(one) == in_javascript(other)


def is_unchanged(one, other):
    """`same` for notebooks; the cells, which are most of the work, last."""
    return (same({**one, "cells": None}, {**other, "cells": None})
            and same(one["cells"], other["cells"]))


def in_javascript(value):
    """(type, value) as which a simple JSON value comes back from a browser. It has but one kind of
    number; an integer too large for that becomes Infinity, and then null."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return type(value), value
    try:
        value = float(value)
    except OverflowError:
        return type(None), None
    return (float, value) if abs(value) != float("inf") else (str, str(value))


DOCUMENTS.append(NotebookFile)


# ---- 11. Cells that are not whole --------------------------------------------------------------

DEFAULTS = {     # cell_type -> what nbformat wants and some leave out: a type's new value
    "code": {"source": str, "outputs": list, "metadata": dict, "execution_count": type(None)},
    "markdown": {"source": str, "metadata": dict}, "raw": {"source": str, "metadata": dict}}


def mend(notebook):
    """(the notebook with whole cells, numbers of those that were not, and names of what else was
    not). Other programs leave out outputs or sources, or write null, and some cells have an id that
    nbformat forbids; with a default for each such part the file is good."""
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list):
        return notebook, set()
    missing = missing_members(notebook)
    whole = with_right_ids([*map(whole_cell, cells)], {**notebook, **missing}["nbformat_minor"])
    mended = {number for number, cell in enumerate(whole) if cell is not cells[number]}
    if not mended and not missing:
        return notebook, set()
    return {**notebook, **missing, "cells": whole}, mended | missing.keys()


def missing_members(notebook):
    """What a notebook must have beside its cells and does not have."""
    has_ids = any(isinstance(cell, dict) and "id" in cell for cell in notebook["cells"])
    defaults = {"metadata": {}, "nbformat_minor": ID_MINOR if has_ids else ID_MINOR - 1}
    return {key: value for key, value in defaults.items() if notebook.get(key) is None}


def with_right_ids(cells, minor):
    """nbformat demands ids of their own for all cells from version 4.5 on, and forbids them
    before."""
    if not isinstance(minor, int) or not all(isinstance(cell, dict) for cell in cells):
        return cells   # nothing that we could mend
    if minor >= ID_MINOR:
        return with_ids(cells)
    return [{key: part for key, part in cell.items() if key != "id"} if "id" in cell else cell
            for cell in cells]


def whole_cell(cell):
    if not isinstance(cell, dict) or not isinstance(cell.get("cell_type"), str):
        return cell   # nothing that we could mend
    defaults = DEFAULTS.get(cell["cell_type"], {"metadata": dict})
    missing = {key: kind() for key, kind in defaults.items()
               if cell.get(key) is None and not (key in cell and kind is type(None))}
    return {**cell, **missing} if missing else cell


MEND.append(mend)


# ---- 12. Old formats: nbformat 2 and 3 ---------------------------------------------------------

SHORT_MIME = {   # nbformat 3's names
    "text": "text/plain", "html": "text/html", "svg": "image/svg+xml", "png": "image/png",
    "jpeg": "image/jpeg", "latex": "text/latex", "json": "application/json",
    "javascript": "application/javascript"}


def join_old(text):
    """As nbformat 2 and 3 joined: their lists often hold lines without their ends."""
    if isinstance(text, list) and text and not text[0].endswith(("\n", "\r")):
        return "\n".join(text)
    return join(text)


def upgrade(notebook):
    """nbformat 2 or 3 as 4.5. Pages are told by `orig_nbformat`, as nbformat does it, that a save
    makes it a newer one. Raises NotANotebook when it has not even their structure."""
    try:
        cells = [upgrade_cell(cell) for sheet in notebook.get("worksheets") or []
                 for cell in sheet.get("cells") or []]
        metadata = {k: v for k, v in (notebook.get("metadata") or {}).items()
                    if k not in ("name", "signature")}
        metadata["orig_nbformat"] = notebook["nbformat"]
        metadata["orig_nbformat_minor"] = notebook.get("nbformat_minor") or 0
    except (TypeError, KeyError, AttributeError, ValueError) as problem:
        raise NotANotebook(f"a damaged notebook of nbformat {notebook['nbformat']}: "
                           f"{problem!r}") from None
    return {"cells": with_ids(cells), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def upgrade_cell(cell):
    kind, metadata = cell["cell_type"], dict(cell.get("metadata") or {})
    if kind == "code":
        if "collapsed" in cell:
            metadata["collapsed"] = bool(cell["collapsed"])
        return {"cell_type": "code", "metadata": metadata,
                "source": join_old(cell.get("input") or ""),
                "execution_count": cell.get("prompt_number"),
                "outputs": [upgrade_output(output) for output in cell.get("outputs") or []]}
    source = join_old(cell.get("source") or "")
    if kind == "heading":
        source = "#" * int(cell.get("level", 1)) + " " + " ".join(source.split("\n"))
    return {"cell_type": "raw" if kind == "raw" else "markdown", "metadata": metadata,
            "source": source}


def upgrade_output(old):
    kind = {"pyout": "execute_result", "pyerr": "error"}.get(old["output_type"], old["output_type"])
    if kind == "stream":
        return {"output_type": kind, "name": old.get("stream", "stdout"),
                "text": join_old(old.get("text") or "")}
    if kind == "error":
        return {"output_type": kind, "ename": old.get("ename") or "",
                "evalue": old.get("evalue") or "", "traceback": old.get("traceback") or []}
    data = {SHORT_MIME[key]: join_old(value) for key, value in old.items() if key in SHORT_MIME}
    if "application/json" in data:
        with contextlib.suppress(ValueError):   # some programs left it as it was
            data["application/json"] = json.loads(data["application/json"])
    count = {"execution_count": old.get("prompt_number")} if kind == "execute_result" else {}
    return {"output_type": kind, "data": data, "metadata": old.get("metadata") or {}, **count}


UPGRADES.update({2: upgrade, 3: upgrade})


# ---- 13. What the schema says: such a notebook can be drawn, and its readers are told ----------

MEMBERS = {   # of a notebook, cell or output, by type: (those it must have, those it may have)
    kind: ({*required.split()}, {*required.split(), *optional.split()})
    for kind, required, optional in (
        ("notebook", "metadata nbformat nbformat_minor cells", ""),
        ("code", "cell_type metadata source outputs execution_count", "id"),
        ("markdown", "cell_type metadata source", "id attachments"),
        ("raw", "cell_type metadata source", "id attachments"),
        ("stream", "output_type name text", ""),
        ("display_data", "output_type data metadata", ""),
        ("execute_result", "output_type data metadata execution_count", ""),
        ("error", "output_type ename evalue traceback", ""))}


def validation_message(notebook):
    """What Jupyter says of a notebook that is not quite valid, or None."""
    problem = next(complaints(notebook), None)
    return problem and f"Notebook validation failed: {problem}"


def complaints(notebook):
    """What the schema of its version would say of a notebook that `validate` lets pass."""
    if notebook.get("nbformat_minor", 0) > ID_MINOR:
        return   # it may have what we do not know
    yield from strangers("", notebook, "notebook")
    spec = notebook["metadata"].get("kernelspec", {"name": "", "display_name": ""})
    if not isinstance(spec, dict) or not {"name", "display_name"} <= spec.keys():
        yield "/metadata/kernelspec must have a name and a display_name"
    for i, cell in enumerate(notebook["cells"]):
        yield from strangers(f"/cells/{i}", cell, cell["cell_type"])
        if "id" in cell and notebook.get("nbformat_minor", 0) < ID_MINOR:
            yield f"/cells/{i}/id is not allowed before nbformat 4.{ID_MINOR}"
        if not re.fullmatch("[A-Za-z0-9_-]{1,64}", str(cell.get("id", "none"))):
            yield f"/cells/{i}/id may have 64 letters, digits, - and _"
        for j, output in enumerate(cell.get("outputs", ())):
            yield from strangers(f"/cells/{i}/outputs/{j}", output, output["output_type"])


def strangers(where, part, kind):
    """What is said of members that a part lacks or must not have."""
    if kind not in MEMBERS:
        yield f"{where} is of an unknown type, {kind!r}"
        return
    required, allowed = MEMBERS[kind]
    for name in sorted(required - part.keys()):
        yield f"{where}/{name} is missing"
    for name in sorted(part.keys() - allowed):
        yield f"{where}/{name} is not allowed"


class RemarkingContents(CONTENTS[-1]):
    """Adds what is not quite right in a notebook to its model, when it is read or saved."""

    def content(self, path, kind, form, data):
        return self.with_remark(super().content(path, kind, form, data), kind)

    def save(self, path, model, *arguments, **options):
        saved, is_new = super().save(path, model, *arguments, **options)
        message = self.with_remark({"content": model.get("content")}, saved["type"])
        message.pop("content")
        return {**saved, **message}, is_new

    def with_remark(self, model, kind):
        notebook = model["content"] if kind == "notebook" else None
        message = notebook and validation_message(notebook)
        return {**model, "message": message} if message else model


CONTENTS.append(RemarkingContents)


# ---- 14. Large things, a little at a time ------------------------------------------------------
#
# While Python's json is at work all other threads wait: a file of 500 MB would hold up every page
# for seconds. So what is long is read and written piece by piece.

ITEMS_AT_ONCE = 50          # cells or files are encoded without a break: a millisecond or two
AT_ONCE = 1 << 18           # bytes of a long text
WHOLE_ANSWER = 1 << 20      # bytes; a larger one is not joined
LONG_TEXT = 1 << 22         # bytes, from which a text is handled piece by piece
STEPS = 3                   # levels of JSON that are read one by one: model, notebook, cells
FEW = 20                    # strings of a file's model, names and values
# What can be read of a JSON string by itself: no half of an escape or of a surrogate pair.
STRING = re.compile(rb'''(?:[^"\\]+|\\u[dD][89abAB]..\\u[dD][c-fC-F]..
    |\\u(?![dD][89abAB])....|\\[^u])*''', re.S | re.X)


def model_json(model):
    """A contents model as JSON: bytes, or a list of them when they are many. (To join half a
    gigabyte is a moment in which nothing else happens.)"""
    start = to_json({key: value for key, value in model.items() if key != "content"})
    pieces = [start[:-1], b',"content":', *content_json(model["content"]), b"}"]
    return b"".join(pieces) if sum(map(len, pieces)) <= WHOLE_ANSWER else pieces


def content_json(content):
    """The pieces of a folder's, a notebook's or a file's content as JSON."""
    if isinstance(content, list):
        return list_json(content)
    if isinstance(content, dict):
        notebook = {**content}
        cells = notebook.pop("cells")
        return [to_json(notebook)[:-1], b',"cells":', *list_json(cells), b"}"]
    if isinstance(content, tuple):
        return [b'"', *(to_json(text)[1:-1] for text in content), b'"']
    return [to_json(content)]


def list_json(items):
    parts = (items[at:at + ITEMS_AT_ONCE] for at in range(0, len(items), ITEMS_AT_ONCE))
    pieces = [piece for part in parts for piece in (b",", to_json(part)[1:-1])]
    return [b"[", *pieces[1:], b"]"]


def decode_text(data):
    """Bytes as text: a string, or a tuple of strings when it is long. Raises UnicodeDecodeError."""
    if len(data) <= LONG_TEXT:
        return data.decode()
    decode, view = codecs.getincrementaldecoder("utf-8")().decode, memoryview(data)
    return (*(decode(view[at:at + AT_ONCE]) for at in range(0, len(data), AT_ONCE)),
            decode(b"", final=True))


def encode_base64(data):
    """Bytes in base64: a string, or a tuple of strings when it is long."""
    if len(data) <= LONG_TEXT:
        return base64.b64encode(data).decode()
    view, step = memoryview(data), AT_ONCE // 3 * 3   # three bytes are four letters
    return (*(base64.b64encode(view[at:at + step]).decode() for at in range(0, len(data), step)),)


def decode_base64(texts):
    """The bytes that strings in base64 say together. Raises ValueError."""
    pieces, rest = [], ""
    for text in texts:
        if "=" in rest or pieces and len(pieces[-1]) % 3:
            raise ValueError("there is more after the end")
        rest += "".join(text.split())
        whole = len(rest) // 4 * 4
        pieces.append(base64.b64decode(rest[:whole], validate=True))
        rest = rest[whole:]
    return b"".join([*pieces, base64.b64decode(rest, validate=True)])


def read_model(data):
    """The JSON object of a contents model. A long text in it comes as a tuple of strings. NaN,
    which JSON has not, is null, as from a browser. Raises ValueError."""
    if len(data) <= LONG_TEXT:
        return REQUEST.decode(data.decode("utf-8-sig"))
    mark = secrets.token_hex()
    short, long_text = take_long_text(data, mark.encode())
    text = short.decode("utf-8-sig")
    model, end = read_in_steps(text, skip_space(text, 0), STEPS)
    if text[end:].strip():
        raise json.JSONDecodeError("Extra data", text, end)
    if not long_text:
        return model
    if isinstance(model, dict) and model.get("content") == mark:
        return {**model, "content": long_text}
    return REQUEST.decode(data.decode("utf-8-sig"))   # it was no text of a file


def read_in_steps(text, at, steps):
    """(the JSON value at `at`, its end). What it consists of is read one by one, so many levels
    deep: the members of a model, those of a notebook, its cells."""
    if not steps or not text.startswith(("{", "["), at):
        return REQUEST.raw_decode(text, at)
    found = {} if text[at] == "{" else []

    def read_member(at):
        if not text.startswith('"', at):
            raise json.JSONDecodeError("Expecting a name", text, at)
        key, at = REQUEST.raw_decode(text, at)
        at = skip(":", text, skip_space(text, at))
        found[key], end = read_in_steps(text, at, steps - 1)
        return end

    def read_item(at):
        item, end = read_in_steps(text, at, steps - 1)
        found.append(item)
        return end

    is_object = isinstance(found, dict)
    return found, read_entries(text, at, "}" if is_object else "]",
                               read_member if is_object else read_item)


def take_long_text(data, mark):
    """(JSON with `mark` in the place of its long string, that string as a tuple of strings). In a
    file's model it is one of the first few; otherwise (data, None)."""
    at = 0
    for _ in range(FEW):
        start = data.find(b'"', at)
        if start < 0:
            break
        texts, at = read_string(data, start + 1)
        if texts is None:
            break
        if at - start > LONG_TEXT:
            return data[:start + 1] + mark + data[at:], texts
        at += 1
    return data, None


def read_string(data, at):
    """(the JSON string whose first byte is at `at` as a tuple of strings, where its end mark is);
    None for what is no good string."""
    texts = []
    while at < len(data) and data[at] != ord('"'):
        end = STRING.match(data, at, at + AT_ONCE).end()
        while end < len(data) and data[end] & 0xc0 == 0x80:   # in the middle of a character
            end -= 1
        try:
            texts.append(REQUEST.decode(f'"{data[at:end].decode()}"'))
        except ValueError:
            return None, at
        if end <= at:
            return None, at
        at = end
    return (*texts,), at


CODEC.update(model_json=model_json, read_model=read_model, decode_text=decode_text,
             encode_base64=encode_base64, decode_base64=decode_base64)


# ---- 15. Names that no client could send back --------------------------------------------------

class HonestContents(CONTENTS[-1]):
    """Says of a folder how much in it is not listed."""

    def get(self, path, kind=None, form=None, content=True, with_hash=False):
        model = super().get(path, kind, form, content, with_hash)
        if model["type"] == "directory" and content:
            names = os.listdir(self.existing(path))
            unlisted = sum(not is_plain(name) and (
                self.allow_hidden or not name.endswith(LEFTOVERS)) for name in names)
            if unlisted:
                model["message"] = ("Not listed because of their names, which are not UTF-8 or "
                                    f"hold a backslash: {unlisted} (rename them in a terminal)")
        return model


CONTENTS.append(HonestContents)


# ---- 16. Fewer questions to the disk -----------------------------------------------------------

class QuickContents(CONTENTS[-1]):
    """Asks the disk once for each name of a path, and once for each file in a folder."""

    def follow(self, absolute):
        """(real path, os.stat_result or None) of a path below the root. The root is real: only
        what comes after it can be a link, and one question to the disk per name tells."""
        real, info = self.root, None
        try:
            for name in filter(None, absolute[len(self.root):].split(os.sep)):
                real = os.path.join(real, name)
                info = os.lstat(real)
                if stat.S_ISLNK(info.st_mode) or getattr(info, "st_reparse_tag", 0):
                    return os.path.realpath(absolute), os.stat(absolute)
            return real, info or os.stat(real)
        except OSError:
            return os.path.realpath(absolute), None

    def entry(self, folder, real, name):
        """The model of what is in a folder; of a plain file one question to the disk is enough."""
        absolute, path = os.path.join(real, name), f"{folder}/{name}"
        if self.is_visible(name):
            info = os.lstat(absolute)
            if stat.S_ISREG(info.st_mode) and not getattr(info, "st_reparse_tag", 0):
                return self.model(path, absolute, info)
        return super().entry(folder, real, name)


CONTENTS.append(QuickContents)


# ---- 17. Many servers, owners, crashes: what a save minds, too ---------------------------------
#
# S5 Between a look at the file and its replacement no other server comes either: both happen
#    under a lock of its folder.
# S6 Owner and access rights of the file stay.
# S7 What a killed server left over goes as soon as somebody looks into that folder again.

LOCK_SECONDS = 10        # that another program may hold a folder; then we go on without the lock
TIDIED = set()           # folders in which we have looked for leftovers


@contextlib.contextmanager
def locked(folder):
    """No other server that asks for this lock writes in the folder meanwhile. The lock is on the
    folder itself: nothing is created, and nothing left over; a file system may have no locks."""
    with changing(folder) as descriptor:
        if descriptor is not None:
            wait_for_lock(descriptor)
        yield descriptor
        unlock(descriptor)   # the next one can go on while the disk works


def wait_for_lock(descriptor):
    """A program that holds the lock and was stopped must not stop us for ever."""
    deadline = time.monotonic() + LOCK_SECONDS
    while lock(descriptor) is False and time.monotonic() < deadline:
        time.sleep(0.0005)


def lock(descriptor):
    """Take the lock of an open file or folder (flock); it goes when that is closed, or with the
    process. False when somebody else has it, None when there are no locks here: then the look
    right before the replacement must do. (On Windows an open file is neither removed nor
    replaced, and its C runtime locks no folder.)"""
    try:
        return fcntl and not fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None


def unlock(descriptor):
    if fcntl and descriptor is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


class LockedTemporary(TEMPORARIES[-1]):
    """It is locked as long as it is in use, so that it is no leftover to anybody who tidies the
    folder."""

    def make(self):
        tidy(self.folder)
        self.descriptor = None
        # Before it is locked another server that tidies could take it for a leftover.
        while self.descriptor is None:
            super().make()
            if lock(self.descriptor) is False or not os.path.exists(self.path):
                self.close()

    def dress(self, old):
        """Take the owner as well. Raises PermissionError when that is not ours to give."""
        new = os.fstat(self.descriptor)
        if old and (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            os.chown(self.path, old.st_uid, old.st_gid)
        if old:
            copy_attributes(self.target, self.path)
        super().dress(old)


def copy_attributes(source, target):
    """Access control lists and the like, where there are any and we may give them."""
    with contextlib.suppress(OSError, AttributeError):   # only Linux has these functions
        for name in os.listxattr(source):
            with contextlib.suppress(OSError):
                os.setxattr(target, name, os.getxattr(source, name))


def tidy(folder):
    """Remove what killed servers left over in a folder; that of running ones is locked.

    Done when a folder is first listed or saved into. (A walk through all folders at the start
    could take minutes; a list of what is being written would cost each save an fsync more.)
    """
    if folder in TIDIED:
        return
    TIDIED.add(folder)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for path in [entry.path for entry in entries if IS_LEFTOVER(entry.name)]:
            with contextlib.suppress(OSError), locked(folder):
                remove_if_unlocked(path)


def remove_if_unlocked(path):
    """Remove a leftover, file or folder. Raises OSError when it is in use."""
    # Network file systems lock only what may be written; a folder is never opened for that.
    is_folder = os.path.isdir(path)
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        if lock(descriptor) and is_folder:
            shutil.rmtree(path)
        elif lock(descriptor):
            os.unlink(path)
    finally:
        os.close(descriptor)


class TidyContents(CONTENTS[-1]):
    """Removes leftovers where files are first listed or saved."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        tidy(self.root)

    def listing(self, path, absolute):
        tidy(os.path.realpath(absolute))
        return super().listing(path, absolute)


TEMPORARIES.append(LockedTemporary)
FOLDERS.append(locked)
CONTENTS.append(TidyContents)


# ---- 18. What was read or asked for a moment ago -----------------------------------------------

class Recent:
    """The notebook files that were read or written last, because what is opened or saved will be
    saved: the last large one, for a minute, and as many small ones as there is room for."""

    SECONDS, LARGE, ROOM = 60, 1 << 20, 1 << 20   # the last two are bytes

    def __init__(self):
        self.lock, self.file, self.timer = threading.Lock(), None, None
        self.small, self.size = {}, 0   # bytes -> document, of so many bytes in all

    def find(self, data):
        """The document of these bytes, or None."""
        file = self.file if len(data) >= self.LARGE else self.small.get(data)
        return file if file and file.data == data else None

    def read(self, data):
        """The document of these bytes. Raises NotANotebook."""
        return self.find(data) or self.keep(DOCUMENTS[-1](data))

    def hash(self, data):
        file = self.find(data)
        return file.hash if file else sha256(data)

    def keep(self, file):
        with self.lock:
            if len(file.data) < self.LARGE:
                self.keep_small(file)
            else:
                if self.timer:
                    self.timer.cancel()
                self.file, self.timer = file, threading.Timer(self.SECONDS, self.drop, [file])
                self.timer.daemon = True
                self.timer.start()
        return file

    def keep_small(self, file):
        if self.size + len(file.data) > self.ROOM:
            self.small, self.size = {}, 0
        if file.data not in self.small:
            self.size += len(file.data)
        self.small[file.data] = file

    def drop(self, file):
        with self.lock:
            if self.file is file:
                self.file = self.timer = None


class Answers:
    """The JSON of small files that were asked for, kept while the file's stamp on the disk is the
    same. One that was written just now is not kept: the next write could leave the same stamp."""

    SMALL, MOST = 1 << 20, 1 << 23   # bytes of one answer, of all
    TICK = 2                         # seconds: the coarsest clock of a file system, that of FAT

    def __init__(self):
        self.lock, self.kept, self.size = threading.Lock(), {}, 0

    def get(self, question, info, make):
        """What `make` gives for a question about the file of this os.stat_result: bytes, or a list
        of them, which is too large to be kept."""
        stamp = info and (info.st_dev, info.st_ino, info.st_mode, info.st_size, info.st_mtime_ns,
                          info.st_ctime_ns)
        known, answer = self.kept.get(question, (None, None))
        if stamp and known == stamp:
            return answer
        answer = make()
        if (info and stat.S_ISREG(info.st_mode) and isinstance(answer, bytes)
                and time.time() - max(info.st_mtime, info.st_ctime) > self.TICK):
            self.keep(question, stamp, answer)
        return answer

    def keep(self, question, stamp, answer):
        with self.lock:
            if self.size + len(answer) > self.MOST:
                self.kept, self.size = {}, 0
            self.kept[question] = stamp, answer
            self.size += len(answer)


class RememberingContents(CONTENTS[-1]):
    """Keeps what was read or asked for a moment ago, while it is still true."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.recent, self.answers = Recent(), Answers()

    def get_json(self, path, *asked):
        """That of a small file is kept while the file is the same."""
        make = super().get_json
        return self.answers.get((path, *asked), self.look(path)[1], lambda: make(path, *asked))

    def document(self, data):
        return self.recent.read(data)

    def written(self, notebook, old):
        return self.recent.keep(super().written(notebook, old))

    def hash(self, data):
        return self.recent.hash(data)


CONTENTS.append(RememberingContents)


# ---- 19. Files that cannot be replaced ---------------------------------------------------------
#
# A file with other names (hard links), a mount, a file in a folder that takes no new one or of an
# owner that is not ours to give: old and new bytes go into a record in the runtime folder, then the
# bytes into the file itself, then the record is removed. A server that starts finishes such
# records.

IS_RECORD = re.compile(r"save-[0-9a-f]{16}\.record").fullmatch
CANNOT_REPLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV}
SECTOR = 512             # bytes that a disk writes whole or not at all


def write_over(target, data, look=None):
    """Put new bytes into the file itself. Until that is done a record keeps the old ones, too."""
    with FOLDERS[-1](os.path.dirname(target)):
        if look:
            look(target)
        with open(target, "r+b", buffering=0) as file:
            old = file.readall()
            record = make_record(target, old, data)
            try:
                fill(file.fileno(), data)
            except OSError:   # the disk is full: the room for the old bytes is still ours
                fill(file.fileno(), old)
                remove_record(record)
                raise
            remove_record(record)


def fill(descriptor, data):
    """Make these the bytes of a file, and have them on the disk."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    write_all(descriptor, data)
    os.ftruncate(descriptor, len(data))
    os.fsync(descriptor)


def make_record(target, old, new):
    """A file that says what is about to be written over: a line of JSON, old bytes, new bytes."""
    os.makedirs(RUNTIME, mode=0o700, exist_ok=True)
    record = os.path.join(RUNTIME, f"save-{secrets.token_hex(8)}.record")
    head = {"path": target, "old": len(old), "new": len(new)}
    with TEMPORARIES[-1](record) as temporary:
        temporary.write(json.dumps(head).encode() + b"\n")
        temporary.write(old)
        temporary.write(new)
        temporary.replace()
    os.chmod(record, 0o600)
    return record


def remove_record(record):
    """It must not come back after a later save: its removal is on the disk, too."""
    with FOLDERS[-1](os.path.dirname(record)):
        os.unlink(record)


def finish_records():
    """Finish what a server was writing over when it was stopped."""
    for name in filter(IS_RECORD, os.listdir(RUNTIME) if os.path.isdir(RUNTIME) else ()):
        with contextlib.suppress(OSError, ValueError):
            finish_record(os.path.join(RUNTIME, name))


def finish_record(record):
    """Write the new bytes once more, if the file is half old and half new. If it is neither, then
    somebody else has written it since, and it stays."""
    with open(record, "rb") as file:
        head = json.loads(file.readline())
        old, new = file.read(head["old"]), file.read(head["new"])
    if os.path.isfile(head["path"]):
        # Who still writes it holds this lock.
        with FOLDERS[-1](os.path.dirname(head["path"])), open(head["path"], "r+b") as file:
            found = file.read()
            if found not in (old, new) and is_between(found, old, new):
                fill(file.fileno(), new)
    remove_record(record)


def is_between(found, old, new):
    """True when each sector is that of one of the two, or was never written."""
    size, longest = len(found), max(len(old), len(new))
    states = [state.ljust(longest, b"\0") for state in (
        old, new, new + old[len(new):], b"")]   # the third is not yet cut
    return min(len(old), len(new)) <= size <= longest and all(
        any(found[at:at + SECTOR] == state[at:min(at + SECTOR, size)] for state in states)
        for at in range(0, size, SECTOR))


def or_write_over(target, replace, data, look):
    """Call `replace`, or else write what `data` returns into the file itself."""
    try:
        info = stat_of(target)
        if info and info.st_nlink > 1:
            raise OSError(errno.EBUSY, "The file has other names, which a new one would not have")
        replace()
    except OSError as problem:
        if problem.errno not in CANNOT_REPLACE or not os.path.isfile(target):
            raise
        write_over(target, data(), look)


class FinishingContents(CONTENTS[-1]):
    """Finishes what a killed server was writing, before anything is read."""

    def __init__(self, *arguments, **options):
        finish_records()
        super().__init__(*arguments, **options)


REPLACE.append(or_write_over)
CONTENTS.append(FinishingContents)


# ---- 20. Links and copies: relative links lead where they led ----------------------------------

def move(old, new):
    """Rename a file or folder; links lead where they led."""
    folder, new_folder = (os.path.realpath(os.path.dirname(path)) for path in (old, new))
    is_link = os.path.islink(old)
    leads = os.readlink(old) if is_link else os.sep
    if is_link and not os.path.isabs(leads) and folder != new_folder:
        os.symlink(os.path.relpath(os.path.join(folder, leads), new_folder), new)
        return os.unlink(old)
    os.rename(old, new)
    if os.path.isdir(new) and not is_link and folder != new_folder:
        mend_links(new, os.path.join(folder, os.path.basename(old)))
    return None


def mend_links(tree, came_from):
    """Give the relative links of a moved or copied folder that lead out of it a new text."""
    for folder, folders, files in os.walk(os.path.realpath(tree)):
        old_folder = os.path.join(came_from, os.path.relpath(folder, os.path.realpath(tree)))
        for link in (os.path.join(folder, name) for name in (*folders, *files)):
            if not os.path.islink(link) or os.path.isabs(os.readlink(link)):
                continue
            aim = os.path.normpath(os.path.join(old_folder, os.readlink(link)))
            if not is_within(aim, came_from):
                with contextlib.suppress(OSError):   # in a folder that we may not change
                    os.unlink(link)
                    os.symlink(os.path.relpath(aim, folder), link)


class LeadingContents(CONTENTS[-1]):
    """Moves files so that links lead where they led."""

    def move(self, old, new):
        move(old, new)


CONTENTS.append(LeadingContents)


class Copies:
    """Copies of files and folders below the root of `contents`."""

    def __init__(self, contents):
        self.contents = contents

    def copy(self, source, folder):
        """A copy of a file or folder: of the same name in another folder, else `name-Copy1.ext`. A
        `folder` that does not exist in one that does is the name of the copy."""
        is_name = self.contents.look(folder)[1] is None
        into = folder.strip("/").rpartition("/")[0] if is_name else folder
        absolute, target = self.contents.existing(source), self.contents.existing(into)
        if not os.path.isdir(target):
            raise Problem(400, f"{into} is not a folder")
        is_folder = os.path.isdir(absolute)
        if is_folder and is_within(os.path.realpath(target), os.path.realpath(absolute)) or (
                not source.strip("/")):
            raise Problem(400, f"{source} cannot be copied into itself")
        stem, extension = self.copy_name(os.path.basename(source.rstrip("/")), is_folder)

        def choose():
            return folder if is_name else self.contents.free_name(folder, stem, extension, "-Copy")

        if is_folder:
            return self.copy_folder(absolute, target, choose)
        data = self.contents.read(absolute)
        while True:
            path = choose()
            try:
                refuse_existing(self.contents.resolve(path))   # also a link to nowhere
                write_atomically(self.contents.resolve(path), data, refuse_existing)
                return self.contents.model(path, self.contents.resolve(path))
            except FileExistsError:   # somebody took the name meanwhile
                if is_name:
                    raise

    def copy_name(self, name, is_folder):
        """(what stands before "-Copy1", what after it). All of .tar.gz is an extension, but in
        a.b.ipynb it is what follows the last dot."""
        name = re.sub(r"-Copy\d*(?=\.|$)", "", name)
        if is_folder:
            return name, ""
        stem, dot, extension = (name.rpartition if name.endswith(".ipynb") else name.partition)(".")
        return stem, dot + extension

    def copy_folder(self, absolute, into, choose):
        """The copy grows in a hidden folder, and is there, under the path that `choose` returns,
        when it is whole."""
        growing = leftover_name(into)
        with removed_on_error(growing), contextlib.ExitStack() as in_use:
            with FOLDERS[-1](os.path.dirname(growing)):   # nobody tidies between these two lines
                os.mkdir(growing)
                in_use.enter_context(FOLDERS[-1](growing))
            shutil.copytree(absolute, growing, symlinks=True, ignore=self.not_copied,
                            dirs_exist_ok=True)
            mend_links(growing, os.path.realpath(absolute))
            with self.contents.lock, FOLDERS[-1](os.path.dirname(growing)):
                path = choose()
                refuse_existing(self.contents.resolve(path))
                os.rename(growing, self.contents.resolve(path))
        return self.contents.model(path, self.contents.resolve(path))

    def not_copied(self, folder, names):
        """Those of the names in a folder that are no file, folder or link, or not to be seen."""
        paths = {name: os.path.join(folder, name) for name in names}
        return [name for name, path in paths.items() if IS_LEFTOVER(name)
                or not (os.path.islink(path) or os.path.isfile(path) or os.path.isdir(path))
                or any(is_within(os.path.realpath(path), private)
                       for private in self.contents.private)]


class CopyingContents(CONTENTS[-1]):
    """Makes a copy where a new file is wished with a `copy_from`."""

    def create(self, folder, wish):
        """POST with a member `copy_from`: the path of a file or folder."""
        if source := wish.get("copy_from"):
            return Copies(self).copy(source, folder)
        return super().create(folder, wish)


CONTENTS.append(CopyingContents)


@contextlib.contextmanager
def removed_on_error(folder):
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


# ---- 21. Checkpoints: one per file, beside it in .ipynb_checkpoints ----------------------------

class Checkpoints:
    """The one checkpoint of each file. The methods raise Problem or OSError."""

    ID = "checkpoint"

    def __init__(self, contents):
        self.contents = contents

    def path(self, path):
        """Where the checkpoint of an API path is, or would be."""
        folder, name = os.path.split(self.contents.existing(path))
        stem, extension = os.path.splitext(name)
        saved = os.path.join(folder, ".ipynb_checkpoints", f"{stem}-checkpoint{extension}")
        self.contents.kept_inside(saved, path)
        return saved

    def existing(self, path, id):
        saved = self.path(path)
        if id != self.ID or not os.path.exists(saved):
            raise Problem(404, f"{path} has no checkpoint {id}")
        return saved

    def list(self, path):
        """The models of a file's checkpoints: one, or none."""
        saved = self.path(path)
        return [self.model(saved)] if os.path.exists(saved) else []

    def model(self, saved):
        return {"id": self.ID, "last_modified": iso(os.stat(saved).st_mtime)}

    def create(self, path):
        """Keep the file as it is on disk now."""
        saved = self.path(path)
        os.makedirs(os.path.dirname(saved), exist_ok=True)
        write_atomically(saved, self.contents.read(self.contents.existing(path)))
        return self.model(saved)

    def restore(self, path, id):
        absolute, saved = self.contents.resolve(path), self.existing(path, id)
        with self.contents.one_save(absolute):
            write_atomically(absolute, self.contents.read(saved))

    def delete(self, path, id):
        os.remove(self.existing(path, id))


def list_checkpoints(handler, path):
    return Checkpoints(handler.server.contents).list(path)


def create_checkpoint(handler, path):
    made = Checkpoints(handler.server.contents).create(path)
    handler.created(made, "contents", f"{path.strip('/')}/checkpoints/{made['id']}")


def restore_checkpoint(handler, path, id):
    Checkpoints(handler.server.contents).restore(path, id)
    return 204, None


def delete_checkpoint(handler, path, id):
    Checkpoints(handler.server.contents).delete(path, id)
    return 204, None


ROUTES += [("GET", r"/api/contents/(.+)/checkpoints", list_checkpoints),
           ("POST", r"/api/contents/(.+)/checkpoints", create_checkpoint),
           ("POST", r"/api/contents/(.+)/checkpoints/([^/]+)", restore_checkpoint),
           ("DELETE", r"/api/contents/(.+)/checkpoints/([^/]+)", delete_checkpoint)]


class CheckedContents(CONTENTS[-1]):
    """A checkpoint goes along with its file."""

    def rename(self, path, new_path):
        left = self.checkpoint_of(path)
        model = super().rename(path, new_path)
        if os.path.exists(left):
            taken = Checkpoints(self).path(new_path)
            os.makedirs(os.path.dirname(taken), exist_ok=True)
            os.replace(left, taken)
        return model

    def delete(self, path, with_content=True):
        left = self.checkpoint_of(path)
        super().delete(path, with_content)
        if os.path.isfile(left):
            os.remove(left)

    def checkpoint_of(self, path):
        with contextlib.suppress(Problem):   # what has none cannot be moved or deleted either
            return Checkpoints(self).path(path)
        return ""


CONTENTS.append(CheckedContents)


# ---- 22. Uploads in pieces: a model with a chunk's number --------------------------------------

def put_in_place(temporary):
    """The same for bytes that are in a temporary file already."""
    refuse_protected(temporary.target)

    def data():
        with open(temporary.path, "rb") as file:
            return file.read()

    REPLACE[-1](temporary.target, temporary.replace, data, None)


class Upload:
    """A file that comes in pieces: 1, 2, ... and -1, the last. They gather in a temporary file
    that takes the file's place at the end."""

    def __init__(self, target, data):
        """`data`: of piece 1, which is still to be added."""
        self.file, self.first, self.number = TEMPORARIES[-1](target), sha256(data), 0
        self.latest = time.monotonic()

    def add(self, number, data):
        """Problem 400 when the piece is not the next one; the upload goes on with that."""
        if number not in (self.number + 1, -1):
            raise Problem(400, f"Chunk {number} is out of place: the next one is "
                               f"{self.number + 1}, or -1 for the last")
        self.file.write(data)
        self.number, self.latest = self.number + 1, time.monotonic()


class Uploads:
    """Those under way, one of each file. What gathers is never seen as the file."""

    PAUSE_SECONDS = 30     # without a piece: then another upload of the same file may begin
    MOST_SECONDS = 3600    # then an upload goes, when another one begins

    def __init__(self):
        self.lock, self.under_way = threading.Lock(), {}   # real path -> Upload
        atexit.register(self.drop_all)

    def add(self, target, number, data):
        """Add a piece; returns where the pieces gather, or None: the file is in its place."""
        with self.lock:
            if number == 1:
                self.begin(target, data)
            upload = self.under_way.get(target)
            if upload is None:
                raise Problem(400, "An upload begins with chunk 1")
            try:
                upload.add(number, data)
            except OSError:
                self.drop(target)
                raise
            if number != -1:
                return upload.file.path
            del self.under_way[target]
        with upload.file:
            return put_in_place(upload.file)

    def begin(self, target, data):
        """Problem 409 while another upload of the same file is under way: nothing tells whose a
        later piece is. The same first piece begins anew, because then what follows fits,
        whoever sends it."""
        now = time.monotonic()
        for other, upload in [*self.under_way.items()]:
            if now - upload.latest > self.MOST_SECONDS:
                self.drop(other)
        old = self.under_way.get(target)
        if old and now - old.latest < self.PAUSE_SECONDS and old.first != sha256(data):
            raise Problem(409, "Another upload of this file is under way: wait for its end, or "
                               f"{self.PAUSE_SECONDS} seconds after it was given up")
        refuse_protected(target)
        if old:
            self.drop(target)
        self.under_way[target] = Upload(target, data)

    def drop(self, target):
        self.under_way.pop(target).file.remove()

    def drop_all(self):
        for target in [*self.under_way]:
            self.drop(target)


def save_chunk(contents, path, model):
    """Write one piece of a large upload; returns (model, was a file created)."""
    absolute = contents.resolve(path)
    if model.get("type") != "file" or model.get("format") not in ("text", "base64"):
        raise Problem(400, "Only files of format text or base64 can come in chunks")
    if os.path.isdir(absolute):
        raise Problem(400, f"{path} is a folder")
    data, was_there = contents.encode(path, model, None), os.path.exists(absolute)
    gathering = UPLOADS.add(os.path.realpath(absolute), model["chunk"], data)
    return contents.model(path, gathering or absolute), not gathering and not was_there


class UploadedContents(CONTENTS[-1]):
    """Saves a model that has a chunk's number as a piece of its file."""

    def save(self, path, model, *arguments, **options):
        if isinstance(model.get("chunk"), int):
            return save_chunk(self, path, model)
        return super().save(path, model, *arguments, **options)


UPLOADS = Uploads()
CONTENTS.append(UploadedContents)


# ---- 23. What Jupyter refuses and guesses ------------------------------------------------------

class JupytersContents(CONTENTS[-1]):
    """Answers 400 for what is hidden, as Jupyter Server does, and guesses a file's type."""

    def create(self, folder, wish):
        self.refuse_hidden("copy", str(wish.get("copy_from") or ""))
        return super().create(folder, wish)

    def save(self, path, model, *arguments, **options):
        self.refuse_hidden("create", path)
        model = {**model, "type": self.kind_of(path, model)}
        return super().save(path, model, *arguments, **options)

    def rename(self, path, new_path):
        self.refuse_hidden("rename", path, new_path)
        return super().rename(path, new_path)

    def delete(self, path, *arguments, **options):
        self.refuse_hidden("delete", path)
        super().delete(path, *arguments, **options)

    def refuse_hidden(self, action, *paths):
        """Problem 400 when one of the paths is hidden. A GET of it is a 404, as in Jupyter."""
        names = [name for path in paths for name in path.split("/")]
        is_hidden = any(name.startswith(".") and name not in (".", "..") for name in names)
        if is_hidden and not self.allow_hidden:
            raise Problem(400, f"Cannot {action} file or directory {paths[0]!r}")

    def kind_of(self, path, wish):
        """The type of the file that a PUT describes: said by it, or for a new one by its name.
        Problem 400 when an existing file would lose its content."""
        kind = wish.get("type") or ("notebook" if path.endswith(".ipynb") else "file")
        kind = kind if kind in UNTITLED else "file"   # of types that others have
        if self.look(path)[1] and kind != "directory":
            for field in ("type", "content"):
                if wish.get(field) is None:
                    raise Problem(400, f"No file {field} provided")
        return kind


CONTENTS.append(JupytersContents)


# ---- 24. Ranges: a part of a file (RFC 9110 14) ------------------------------------------------

PIECE = 1 << 18    # bytes of a file that are read and sent at a time


def range_of(header, size):
    """(status, start, end) for a Range header; only a single range of bytes is obeyed."""
    match = re.fullmatch(r"bytes=([0-9]*)-([0-9]*)", header or "")
    if not match or match[1] == match[2] == "":
        return 200, 0, size
    # Python reads no number of thousands of digits; what has 20 of them is beyond any file.
    first, last = (int(digits.lstrip("0")[:20] or 0) if digits else None
                   for digits in match.groups())
    if first is None:
        start = max(0, size - last)
        return (206, start, size) if start < size else (416, 0, 0)
    start, end = first, size if last is None else min(last + 1, size)
    return (206, start, end) if start < end else (416, 0, 0)


class RangingHandler(HANDLERS[-1]):
    """Sends a file piece by piece, or the one range of it that is asked for."""

    def send_file(self, path, headers):
        """Of several ranges none is obeyed (RFC 9110 14)."""
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            status, start, end = range_of(self.headers.get("Range"), size)
            headers = {**headers, "Accept-Ranges": "bytes", "Last-Modified":
                       self.date_time_string(os.fstat(file.fileno()).st_mtime)}
            if status != 200:
                extent = f"{start}-{end - 1}" if end else "*"
                headers["Content-Range"] = f"bytes {extent}/{size}"
            self.send(status, b"", kind, {**headers, "Content-Length": str(end - start)})
            file.seek(start)
            while self.command != "HEAD" and start < end:
                piece = file.read(min(PIECE, end - start))
                if not piece:             # the file has become shorter: the length is a lie now
                    self.close_connection = True
                    break
                self.wfile.write(piece)
                start += len(piece)


HANDLERS.append(RangingHandler)


# ---- 25. Bodies: in chunks, on demand, refused -------------------------------------------------

MOST_CHUNK_LINE = 1 << 12             # bytes of a chunk's size with its extensions
CHUNK = re.compile(rf"([0-9A-Fa-f]{{1,15}})(?:[ \t]*;{TEXT_BYTES})?")   # RFC 9112 7.1


def read_chunks(handler, most):
    """The body that comes in chunks, each behind its size in hexadecimal; what extensions and
    trailers say is not for us (RFC 9112 7.1). Problem 400 or 413, and the connection ends."""
    keeps, handler.close_connection = handler.close_connection, True
    body = io.BytesIO()
    while size := chunk_size(handler):
        if body.tell() + size > most:
            raise Problem(413, f"A body may have {most} bytes here")
        body.write(handler.read_exactly(size))
        if handler.read_exactly(2) != b"\r\n":
            raise Problem(400, "A chunk is not as long as it says")
    for _ in range(MOST_FIELDS):
        if (line := chunk_line(handler)) == "":
            handler.close_connection = keeps
            return body.getvalue()
        if not FIELD.fullmatch(line):
            raise Problem(400, "A trailer of the body is malformed")
    raise Problem(431, "The body has too many trailers")


def chunk_size(handler):
    match = CHUNK.fullmatch(chunk_line(handler))
    if not match:
        raise Problem(400, "This is no size of a chunk")
    return int(match[1], 16)


def chunk_line(handler):
    """A line between chunks, without its CRLF."""
    line = handler.rfile.readline(MOST_CHUNK_LINE)
    if line[-2:] != b"\r\n":
        raise Problem(400, "A line between chunks is too long, or does not end in CRLF")
    return line[:-2].decode("latin-1")


class AskingHandler(HANDLERS[-1]):
    """Asks for the body of a client that waits for that (RFC 9110 10.1.1)."""

    def take_head(self):
        super().take_head()
        expects = self.headers.get("Expect", "").lower() == "100-continue"
        self.is_wanted = not expects or self.head.is_old or self.head.length == 0

    def read_body(self, most):
        if not self.is_wanted and (self.head.length or 0) <= most:
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.is_wanted = True
        return super().read_body(most)

    def discard_body(self):
        """What the client has not begun to send need not be read."""
        if self.is_wanted:
            super().discard_body()
        else:
            self.close_connection, self.body = True, b""


class LastingHandler(AskingHandler):
    """A client that still sends a body which nobody reads gets its refusal first."""

    hangs_up = False    # True when the last we said is that the connection ends

    def send(self, *arguments):
        super().send(*arguments)
        self.hangs_up = self.close_connection

    def finish(self):
        super().finish()
        if self.hangs_up:
            hang_up(self.connection)


CODINGS["chunked"] = read_chunks
HANDLERS += [AskingHandler, LastingHandler]


# ---- 26. What clients ask again and again ------------------------------------------------------

MOST_REMEMBERED = 1 << 12      # bytes of a head or path whose meaning is kept


def remembered(function):
    """A function of a text, with its last hundred results at hand: clients ask the same again and
    again. Long texts are not kept, or a stranger could fill the memory with them."""
    known = functools.lru_cache(100)(function)
    return lambda text: known(text) if len(text) <= MOST_REMEMBERED else function(text)


class RememberingHandler(HANDLERS[-1]):
    """Reads a head in one go, and understands what it has just understood at once."""

    parse_head, split_target, routes_at = (staticmethod(remembered(function)) for function in (
        Head, split_target, routes_at))

    def read_head(self):
        """Most often it comes in one piece."""
        ahead = self.rfile.peek(1)
        end = ahead.find(b"\r\n\r\n") + 4
        return self.rfile.read(end) if end > 4 and ahead[:1] != b"\r" else super().read_head()


HANDLERS.append(RememberingHandler)


# ---- 27. Clients that send drop by drop --------------------------------------------------------

HEAD_SECONDS = BODY_SECONDS = 20      # that a head and a body may take, and as much longer as
SLOWEST = 500                         # bytes arrive in each second (Apache's mod_reqtimeout)


class Incoming(io.RawIOBase):
    """The bytes of a connection as they arrive; its BufferedReader is the handler's rfile.

    Raises TimeoutError for a client that is silent for `silence` seconds, and past the `deadline`,
    which a client that sends drop by drop would never meet by silence alone. Every byte moves the
    deadline, so that a slow upload of any size passes.
    """

    def __init__(self, sock, silence):
        self.socket, self.silence = sock, silence
        self.deadline = None    # by time.monotonic(); None between two requests

    def readable(self):
        return True

    def allow(self, seconds):
        self.deadline = time.monotonic() + seconds

    def rest(self):
        """No more is awaited; what is sent has the whole `silence` again."""
        if self.deadline is not None:
            self.deadline = None
            self.socket.settimeout(self.silence)

    def readinto(self, buffer):
        if self.deadline is None:
            return self.socket.recv_into(buffer)
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request takes too long")
        self.socket.settimeout(min(left, self.silence))
        count = self.socket.recv_into(buffer)
        self.deadline += count / SLOWEST
        return count


class ImpatientHandler(HANDLERS[-1]):
    """Waits so long for a head and for a body, and not for each of their bytes."""

    def setup(self):
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(Incoming(self.connection, self.timeout))

    def read_head(self):
        if b"\r\n\r\n" not in self.rfile.peek(1):   # most often it comes in one piece
            self.rfile.raw.allow(HEAD_SECONDS)
        head = super().read_head()
        self.rfile.raw.rest()
        return head

    def read_body(self, most):
        if self.head.length != 0:
            self.rfile.raw.allow(BODY_SECONDS)
        body = super().read_body(most)
        self.rfile.raw.rest()
        return body


HANDLERS.append(ImpatientHandler)


# ---- 28. Strangers -----------------------------------------------------------------------------

MOST_STRANGERS = 128        # connections without a token; a browser makes six to a server
SHORTAGE_SECONDS = 0.1      # until descriptors may be free again


class Strangers:
    """Connections on which nobody has shown a token yet; the first has been silent longest.

    Their number has a limit: who only connects must not take the descriptors that pages, files and
    kernels need. One too many, or one when descriptors run short, and the first is cut off. It may
    come again.
    """

    def __init__(self, most):
        self.most, self.sockets, self.lock = most, {}, threading.Lock()

    def add(self, sock):
        """From the connection's thread: it has come, or has got an answer, just now."""
        with self.lock:
            self.sockets.pop(sock, None)
            self.sockets[sock] = True
        if len(self.sockets) > self.most:
            self.cut_off()

    def remove(self, sock):
        """It has shown a token, or it ends."""
        with self.lock:
            self.sockets.pop(sock, None)

    def cut_off(self):
        """End the first: its thread sees the end, and closes it."""
        with self.lock, contextlib.suppress(OSError, StopIteration):
            sock = next(iter(self.sockets))
            del self.sockets[sock]
            socket.socket.shutdown(sock, socket.SHUT_RDWR)   # of TLS the owner's thread takes care


def most_strangers():
    """How many there may be: of the descriptors that this process may open a quarter at most."""
    try:
        import resource
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:    # not on Windows, which has no such limit
        return MOST_STRANGERS
    return MOST_STRANGERS if limit < 0 else min(MOST_STRANGERS, limit // 4)


class CountedHandler(HANDLERS[-1]):
    """A connection is a stranger until a request shows a token or the cookie."""

    is_stranger = True

    def setup(self):
        super().setup()
        self.server.strangers.add(self.connection)

    def finish(self):
        super().finish()
        self.server.strangers.remove(self.connection)


class FrugalServer(SERVERS[-1]):
    """Knows its strangers, and cuts one off when descriptors run short."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.strangers = Strangers(most_strangers())

    def get_request(self):
        """Accept a connection. When descriptors run short it has to wait, and so do we: or else its
        waiting would wake us again and again."""
        try:
            return super().get_request()
        except OSError as problem:
            if problem.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.strangers.cut_off()
                time.sleep(SHORTAGE_SECONDS)
            raise    # socketserver waits for the next


def leave_strangers(handler):
    if handler.is_stranger:
        handler.is_stranger = False
        handler.server.strangers.remove(handler.connection)


def stay_a_stranger(handler):
    if handler.is_stranger:
        handler.server.strangers.add(handler.connection)


HANDLERS.append(CountedHandler)
SERVERS.append(FrugalServer)
ADMITTED.append(leave_strangers)
AFTER.append(stay_a_stranger)


# ---- 29. Where Jupyter looks -------------------------------------------------------------------

def data_folders():
    """Jupyter's data folders in the order in which they are searched (as `jupyter --paths`)."""
    import site
    share = os.path.join("share", "jupyter")
    listed = [path.rstrip(os.sep) for path in os.environ.get("JUPYTER_PATH", "").split(os.pathsep)]
    system = ["/usr/local/share/jupyter", "/usr/share/jupyter"] if os.name == "posix" else []
    if os.name == "nt" and is_set("JUPYTER_USE_PROGRAMDATA") and "PROGRAMDATA" in os.environ:
        system = [os.path.join(os.environ["PROGRAMDATA"], "jupyter")]
    user = [JUPYTER_DATA]
    if site.ENABLE_USER_SITE:
        user.append(os.path.join(site.getuserbase(), share))
    own = [path for path in [os.path.join(sys.prefix, share)] if path not in system]
    nearest = [*own, *user] if prefers_environment() else [*user, *own]
    return list(dict.fromkeys(path for path in (*listed, *nearest, *system) if path))


def prefers_environment():
    """True when this Python's own folder comes before the user's: when asked for, or by default
    in a virtual or Conda environment that belongs to the user."""
    if "JUPYTER_PREFER_ENV_PATH" in os.environ:
        return is_set("JUPYTER_PREFER_ENV_PATH")
    conda = os.environ.get("CONDA_PREFIX")
    is_conda = bool(conda) and sys.prefix.startswith(conda) \
        and os.environ.get("CONDA_DEFAULT_ENV", "base") != "base"
    is_owner = not hasattr(os, "geteuid") or os.stat(sys.prefix).st_uid == os.geteuid()
    return (sys.prefix != sys.base_prefix or is_conda) and is_owner


def is_set(name):
    value = os.environ.get(name, "no").lower()
    return value not in ("no", "n", "false", "off", "0", "0.0")


def spec_folders():
    """Every folder of kernel specs; IPython's is where they were before there was Jupyter."""
    ipython = os.environ.get("IPYTHONDIR") or os.path.expanduser("~/.ipython")
    return [os.path.join(path, "kernels") for path in (*data_folders(), ipython)]


SPEC_FOLDERS.append(spec_folders)


# ---- 30. Pictures of kernels -------------------------------------------------------------------

LOGO_FILE = "logo-svg.svg"    # of our own kernel
LOGO = b"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">
<rect width="64" height="64" rx="12" fill="#306998"/>
<path d="M12 18l14 14-14 14" fill="none" stroke="#ffd43b" stroke-width="7"/>
<path d="M32 47h20" stroke="#fff" stroke-width="7"/></svg>"""


def resources(handler, name, folder):
    """What frontends want of a kernel spec's files: logos, and scripts for the classic page."""
    address = f"{handler.server.base_url}kernelspecs/{quote(name)}/"
    files = os.listdir(folder) if folder else [LOGO_FILE]
    return {file if file in ("kernel.js", "kernel.css") else os.path.splitext(file)[0]:
            address + quote(file) for file in files
            if file.startswith("logo-") or file in ("kernel.js", "kernel.css")}


def kernelspec_file(handler, name, file):
    """A logo or the like from a kernel spec's folder."""
    spec, folder = find_specs().get(name.lower(), (None, None))
    if spec and not folder and file == LOGO_FILE:   # of our own kernel, which has no folder
        return handler.send(200, LOGO, "image/svg+xml")
    path = os.path.realpath(os.path.join(folder or HERE, file)) if "\0" not in file else ""
    if not folder or not is_within(path, os.path.realpath(folder)) or not os.path.isfile(path):
        raise Problem(404, f"There is no {file} of the kernel spec {name}")
    is_picture = file.lower().endswith(".png")
    handler.send_file(path, {"Cache-Control": "max-age=2592000" if is_picture else "no-cache"})


class PicturesHandler(HANDLERS[-1]):
    """Says where the files of a kernel spec are."""

    def spec_model(self, name, spec, folder):
        return {**super().spec_model(name, spec, folder),
                "resources": resources(self, name, folder)}


HANDLERS.append(PicturesHandler)
ROUTES.append(("GET", r"/kernelspecs/([^/]+)/(.+)", kernelspec_file))


# ---- 31. Wishes that cannot be fulfilled -------------------------------------------------------
#
# All that a process would be given is looked at before there is one.

MOST_NAME = 1 << 14          # bytes of a path or name; Linux takes a quarter of it
MOST_VARIABLES = 1 << 16     # characters of all that a client would have in `env`
TEXT_FIELDS = {"path", "name", "type", "format", "ext", "copy_from", "id", "kernel_id"}
KERNEL_WISHES = {"start_kernel", "create_session", "change_session"}


def check_texts(handler, body):
    """Problem 400 for a number or the like where a text is wanted, and for what the process of a
    kernel cannot be given."""
    for part in (body, body.get("kernel") or {}):
        for name in TEXT_FIELDS & part.keys():
            if not isinstance(part[name], (str, type(None))):
                raise Problem(400, f"{name} must be a string")
    if handler.name in KERNEL_WISHES:
        for part in (body, body.get("kernel"), body.get("notebook")):
            check_kernel_wish(part if isinstance(part, dict) else {})


def check_kernel_wish(part):
    for name, value in part.items():
        if name == "env" and value is not None:
            check_variables(value)
        is_text = name in TEXT_FIELDS and value is not None
        if is_text and not is_plain_text(value, MOST_NAME):
            raise Problem(400, f"{name} is too long, or has a character that no name has")


def check_variables(env):
    """Problem 400 unless a process can be given a client's `env`."""
    try:
        check_environment(env)
        if sum(map(len, env.values())) > MOST_VARIABLES:
            raise ValueError("env is too large")
    except ValueError as problem:
        raise Problem(400, str(problem)) from None


def is_plain_text(value, most=100_000):
    """True for a string that a process can be given: at most so many bytes (Linux takes 128 KB of
    each), no NUL, no half of a surrogate pair."""
    return (isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)
            and len(value.encode()) <= most)


def check_environment(variables):
    """Raise ValueError unless this is {name: value} as a process can be given it."""
    if not isinstance(variables, dict):
        raise ValueError("env must be an object")
    for name, value in variables.items():
        if not name or "=" in name or not is_plain_text(name) or not is_plain_text(value):
            raise ValueError(f"env cannot give {name!r:.99} the value {value!r:.99}")


def check_spec(spec):
    if not all(map(is_plain_text, spec["argv"])):
        raise ValueError("argv must be a list of words")
    check_environment(spec["env"])


CHECKS.append(check_texts)
SPEC_CHECKS.append(check_spec)


# ---- 32. The journal: what no file holds yet ---------------------------------------------------
#
# A page that is closed, or comes new, is told what came of the cells whose outputs no file holds
# yet, and then all that is new, with nothing twice and nothing missing. It is told of other pages'
# cells as well: it *follows*. What it has saved is forgotten.

MOST_JOURNAL = 32 << 20     # bytes of unsaved output that are kept for pages that come back
MOST_OUTLINES = 4 << 20     # bytes of requests and replies whose output is saved
MOST_REQUESTS = 1_000       # of a kernel that are remembered
STORY = {"execute_request", "execute_input", "execute_reply", "input_request", "input_reply",
         "status"}   # what a full journal keeps; all else is output
SAID_BY_PAGES = {"execute_request", "input_reply"}   # of the story; the rest comes from the kernel


class Record:
    """An execute_request and all that came of it."""

    def __init__(self, request, is_followed):
        self.request = request
        self.is_followed = is_followed   # who asked will say when the file holds the outputs
        self.entries, self.size = [], 0
        self.due = {"execute_reply", "idle"}   # what must still come
        self.dropped = 0                       # bytes of output that did not fit

    @property
    def is_over(self):
        """True when no more output is to come; a reply may have nobody to go to."""
        return "idle" not in self.due

    def add(self, entry):
        self.entries.append(entry)
        self.size += entry.size
        self.due.discard("idle" if entry.is_idle else entry.msg_type)

    def outputs_after(self, msg_id):
        """The output that came behind a message; all of it, if that message is not here."""
        late = []
        for entry in reversed(self.entries):
            if entry.header["msg_id"] == msg_id:
                break
            late.append(entry)
        return [entry for entry in reversed(late) if entry.msg_type not in STORY]

    def shorten(self, session):
        """Drop the older half of the output, leave a note; returns how many bytes that freed.

        The note has the place and the msg_id of the last entry dropped: whoever has seen that one
        needs no note.
        """
        outputs = [entry for entry in self.entries if entry.msg_type not in STORY]
        dropped = outputs[:(len(outputs) + 1) // 2]
        if not dropped:
            return 0
        freed = sum(entry.size for entry in dropped)
        self.dropped += freed
        text = (f"[{self.dropped / 1e6:.1f} MB of this output are missing here: MiniJupyter keeps "
                f"{MOST_JOURNAL >> 20} MB for a page that is away]\n")
        note = said(session, "iopub", "stream", {"name": "stderr", "text": text}, self.request)
        note.header["msg_id"], note.number = dropped[-1].header["msg_id"], dropped[-1].number
        note.json_parts[0] = to_json(note.header)
        gone = set(dropped)
        self.entries = [note if entry is dropped[-1] else entry
                        for entry in self.entries if entry is dropped[-1] or entry not in gone]
        self.size -= freed - note.size
        return freed - note.size


class Journal:
    """What came of the requests whose outputs no file holds yet: execute_requests, replies, iopub,
    questions for input and their answers, in the order in which they passed.

    The pages' lock is held while an entry is filed and handed to those who follow: so nothing is
    told twice and nothing is missed.
    """

    def __init__(self, kernel):
        self.kernel, self.session = kernel, kernel.session
        self.records = {}     # msg_id of an execute_request -> Record, oldest first
        # the same, forgotten ones too: msg_id -> (request, then reply and idle; is_followed)
        self.outlines = {}
        self.outline_size = 0   # bytes of those whose record is forgotten
        # msg_id of an open input_request -> (its request's msg_id, is it secret)
        self.questions = {}
        # msg_id -> input_request of a client of the kernel's that is none of ours and has gone: the
        # kernel asks it of all, once, and pages come and go
        self.strays = {}
        self.number = self.size = 0
        kernel.journal = self
        kernel.on_request.append(self.note)
        kernel.on_publish.append(self.publish)
        kernel.on_join.append(self.welcome)
        kernel.on_end.append(self.tell_end)

    # -- what the kernel's owner calls --

    def note(self, request):
        """A page asks or answers: tell the followers. What was typed in secret is not kept. Raises
        ValueError when its parts are no JSON."""
        if request.msg_type not in SAID_BY_PAGES:
            return
        for part in request.json_parts[2:]:   # they will be shown to other pages, within their JSON
            json.loads(part)
        if isinstance(request.content, dict) and request.content.get("silent") is True:
            return   # a program's question, such as a page's for variables: no file will hold it
        shown = request
        if request.msg_type == "input_reply":
            with self.kernel.pages_lock:
                _, is_secret = self.questions.get(request.parent_id, (None, True))
            content = {**request.content, "value": ""} if is_secret else request.content
            shown = Entry("stdin", [*request.json_parts[:3], to_json(content)])
            shown.client = request.client
        with self.kernel.pages_lock:   # followers alone: nobody else is told what pages say
            call_all([self.publish], [shown])

    def publish(self, entries):
        """File Entries and put them to the followers, in one step; the pages' lock is held."""
        story = []
        for entry in entries:
            story += [*self.add(entry), entry]
        for box in self.kernel.mailboxes.values():
            if isinstance(box, Follower):
                box.put([entry for entry in story if box.follows(entry)])

    def welcome(self, box):
        """A follower begins with all that no file holds yet; the lock is held."""
        if isinstance(box, Follower):
            box.put(self.replay())

    def tell_end(self):
        """The process has ended: say what it cannot say any more. Of an end that was asked for the
        followers are told; other clients know it from who asked."""
        with self.kernel.pages_lock:
            endings = self.endings()
        self.kernel.publish(endings)
        if self.kernel.intent == "restart":
            with self.kernel.pages_lock:
                for box in self.kernel.mailboxes.values():
                    if isinstance(box, Follower):
                        box.put([self.kernel.status("restarting")])

    # -- filing --

    def add(self, entry):
        """File an entry, if it is an execute_request or came of one. Returns the entries that tell
        of its request, when that was forgotten: without them a page could not place it."""
        self.number += 1
        entry.number = self.number
        request_id = entry.parent_id
        if entry.msg_type == "execute_request":
            request_id = self.begin(entry)
        elif entry.msg_type == "input_request":
            self.questions[entry.header["msg_id"]] = request_id, bool(entry.content.get("password"))
            if request_id not in self.outlines:
                self.strays[entry.header["msg_id"]] = entry
        elif entry.msg_type == "input_reply":
            request_id, *_ = self.questions.pop(entry.parent_id, (None,))
            self.strays.pop(entry.parent_id, None)
        elif entry.is_idle and self.strays:
            self.strays = {id: question for id, question in self.strays.items()
                           if question.parent_id != request_id}
        was_forgotten = request_id not in self.records
        record = self.record_for(request_id, entry)
        outline = record.entries[:] if record and was_forgotten else []
        if record:
            self.file(record, entry)
        return outline

    def begin(self, request):
        id = request.header["msg_id"]
        is_followed = isinstance(self.kernel.mailboxes.get(request.client), Follower)
        self.forget([id])   # a client should not, but may use one twice
        self.drop_outline(id)
        self.outlines[id] = [], is_followed
        self.records[id] = Record(request, is_followed)
        if len(self.outlines) > MOST_REQUESTS:
            oldest = next(iter(self.outlines))
            self.forget([oldest])
            self.drop_outline(oldest)
        return id

    def drop_outline(self, id):
        """Nothing that comes of this request can be placed any more."""
        entries, _ = self.outlines.pop(id, ((), None))
        self.outline_size -= sum(entry.size for entry in entries)

    def record_for(self, request_id, entry):
        """The record of a request, or None. Its outline outlives it: what a thread prints after its
        cell's outputs were saved begins a new one, with request, reply and idle alone, to which a
        page appends what follows."""
        if request_id in self.records or request_id not in self.outlines or entry.msg_type in STORY:
            return self.records.get(request_id)
        entries, is_followed = self.outlines[request_id]
        self.records[request_id] = record = Record(entries[0], is_followed)
        for each in entries:
            record.add(each)
        self.size += record.size
        self.outline_size -= record.size
        return record

    def file(self, record, entry):
        id = record.request.header["msg_id"]
        record.add(entry)
        self.size += entry.size
        if entry.is_idle or entry.msg_type in ("execute_request", "execute_reply"):
            self.outlines[id][0].append(entry)
        if entry.is_idle:
            self.questions = {question: about for question, about in self.questions.items()
                              if about[0] != id}
        if self.size > MOST_JOURNAL:
            self.make_room()

    def make_room(self):
        largest = max(self.records.values(), key=lambda record: record.size)
        freed = largest.shorten(self.session)
        self.size -= freed
        if not freed:   # it is not the output that is large
            self.forget([largest.request.header["msg_id"]])

    def forget(self, ids, last=None):
        """The outputs of these requests are in the file now: all, or as far as `last` tells,
        {request's msg_id: msg_id of the last message that is}. The rest came while the file was
        written."""
        for id in ids:
            last_saved = last.get(id) if last else None
            if record := self.records.pop(id, None):
                self.size -= record.size
                self.outline_size += sum(entry.size for entry in self.outlines[id][0])
                for entry in record.outputs_after(last_saved) if last_saved else ():
                    self.file(self.record_for(id, entry), entry)
        while self.outline_size > MOST_OUTLINES:
            self.drop_outline(next(id for id in self.outlines if id not in self.records))

    def forget_unfollowed(self):
        """The same for all that are over, of clients that do not tell what they have saved."""
        with self.kernel.pages_lock:
            self.forget([id for id, record in self.records.items()
                         if record.is_over and not record.is_followed])

    def replay(self):
        """All entries, in the order in which they came."""
        entries = [entry for record in self.records.values() for entry in record.entries]
        return sorted([*entries, *self.strays.values()], key=lambda entry: entry.number)

    def endings(self):
        """What a process that has ended cannot say any more: an aborted reply, an idle, where they
        are due. After a crash, the reply of the cell that ran has the reason."""
        self.questions.clear()
        self.strays.clear()
        why = {"reason": self.kernel.reason} if self.kernel.intent is None else {}
        endings = []
        for record in self.records.values():
            last = {"execute_reply": ("shell", "execute_reply", {"status": "aborted", **why}),
                    "idle": ("iopub", "status", {"execution_state": "idle"})}
            endings += [said(self.session, *last[due], record.request)
                        for due in sorted(record.due)]
            if "execute_reply" in record.due:
                why = {}   # it was the first that had no reply; the others waited behind it
        for ending in endings:
            ending.life = self.kernel.life   # whoever hears it knows of the end
        return endings


class Follower(PageMailbox):
    """Of a page that follows the kernel's whole conversation (`?journal=1`). On connecting it gets
    what no file holds yet, afterwards also the requests, replies, questions and answers of other
    pages; it says what it has saved by `{"channel": "journal", "content": {"forget": [msg_ids of
    execute_requests], "last": {msg_id: msg_id of its last message that is saved}}}`."""

    def __init__(self, session_id, websocket):
        super().__init__(session_id, websocket)
        self.is_kept = False   # the journal has it all

    def wants(self, entry):
        return False   # it gets everything from the journal, which files it first

    def follows(self, entry):
        is_own = entry.client == self.session_id
        if entry.msg_type in SAID_BY_PAGES:
            return not is_own
        return is_own or entry.channel == "iopub" or entry.msg_type in STORY


def forget(kernel, entry):
    """A follower has saved these outputs."""
    with kernel.pages_lock:
        kernel.journal.forget(entry.content["forget"], entry.content.get("last"))


KERNEL_EXTRAS.append(Journal)
FOLLOWERS["1"] = Follower
OWN_CHANNELS["journal"] = forget


def forget_saved(server, path, model):
    """A notebook was saved: so are the outputs of clients that do not tell it their kernel."""
    for session in server.sessions.alive() if model["type"] == "notebook" else ():
        if session["path"] == path.strip("/"):
            session["kernel"].journal.forget_unfollowed()


AFTER_SAVE.append(forget_saved)


# ---- 33. Orphans: kernels of a server that was killed ------------------------------------------

class Reaper:
    """A shell that outlives a killed server, to end the kernels that would otherwise be orphans.

    The server tells it of every kernel's process group and files; when the pipe between them
    breaks, it ends and removes those that are left.
    """

    SCRIPT = """
        while read -r sign word; do
            case $sign in
                +) groups="$groups $word " ;;
                -) groups="${groups%% $word *} ${groups#* $word }" ;;
                file) files="$files$word\n" ;;
            esac
        done
        printf %s "$files" | while read -r file; do rm -f -- "$file"; done
        set -- $groups
        for signal in TERM KILL; do
            for group; do kill -s $signal -- -$group; done 2>/dev/null
            [ $# = 0 ] || sleep 1
        done"""

    def __init__(self):
        self.lock, self.shell = threading.Lock(), None

    def note(self, sign, word):
        """A process group began ("+") or ended ("-"), or there is a "file"."""
        with self.lock, contextlib.suppress(OSError):   # without a shell: kernels watch us, too
            if self.shell is None and POSIX:
                self.shell = subprocess.Popen(
                    ["/bin/sh", "-c", self.SCRIPT], stdin=subprocess.PIPE, bufsize=0,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            if self.shell and "\n" not in str(word):   # of a path two lines would be two files
                self.shell.stdin.write(os.fsencode(f"{sign} {word}\n"))


REAPER = Reaper()


def watch_over(kernel):
    """Tell the reaper of each process of a kernel, and of what files it may leave."""
    def note_launch():
        REAPER.note("+", kernel.process.pid)
        for file in kernel.files:
            REAPER.note("file", file)

    kernel.on_launch.append(note_launch)
    kernel.on_exit.append(lambda: REAPER.note("-", kernel.process.pid))


KERNEL_EXTRAS.append(watch_over)


# ---- 34. Windows -------------------------------------------------------------------------------
#
# What is POSIX's alone stands in one place each, with a portable way beside it: see `if POSIX`,
# getattr(socket, …), and this. A poller there knows sockets alone; so a thread copies what a
# process says into one. (Processes that a killed server leaves watch their parent themselves.)

class PortableOutput:
    def __init__(self, pipe):
        self.pipe = pipe
        self.ear, self.mouth = socket.socketpair()
        self.ear.setblocking(False)
        self.thread = threading.Thread(target=self.copy, daemon=True)
        self.thread.start()

    def copy(self):
        with self.mouth, contextlib.suppress(OSError):   # nobody listens any more
            while data := os.read(self.pipe.fileno(), 65_536):
                self.mouth.sendall(data)

    def fileno(self):
        return self.ear.fileno()

    def read(self):
        return self.ear.recv(65_536)

    def close(self):
        self.ear.close()
        self.thread.join(LAST_WORDS_MS / 1000)
        if not self.thread.is_alive():   # else a child of the process has inherited its end
            self.pipe.close()


OUTPUTS[False] = PortableOutput


# ---- 35. What a page says, as it stands --------------------------------------------------------
#
# A page may send a message of many megabytes. While Python reads and writes that anew, all other
# threads wait. So its four parts are cut out of the page's JSON and go on as they stand there.

def unsplice_as_it_stands(message):
    """The Entry in a page's WebSocket message, text or binary; raises ValueError."""
    if isinstance(message, str):
        return entry_of(message, [])
    parts = split_parts(message)
    return entry_of(parts[0].decode(), parts[1:])


def entry_of(text, buffers):
    """The Entry in a message's JSON, whose parts go on as they stand there."""
    members = json_members(text)
    if not {"header", "content"} <= members.keys():
        raise ValueError("a message needs a header and a content")
    parts = [members.get(name, "{}").encode()
             for name in ("header", "parent_header", "metadata", "content")]
    return Entry(json.loads(members.get("channel", '"shell"')), parts, buffers)


def json_members(text):
    """{key: its value, still as JSON} of the object in `text`. Raises ValueError."""
    find_string, find_value = json.decoder.scanstring, JSON.raw_decode
    members, at = {}, expect_token("{", text, 0)
    while at < len(text) and text[at] != "}":
        if members:
            at = expect_token(",", text, at)
        key, at = find_string(text, expect_token('"', text, at))
        start = expect_token(":", text, at)
        _, end = find_value(text, start)
        members[key], at = text[start:end], expect_token("", text, end)
    if expect_token("}", text, at) != len(text):
        raise ValueError("there is something behind the JSON object")
    return members


WHITE = r"[ \t\n\r]*"
TOKENS = {token: re.compile(WHITE + re.escape(token) + WHITE * (token != '"'))
          for token in ("{", "}", ",", ":", '"', "")}   # behind a quotation mark a string begins


def expect_token(token, text, at):
    """Where text goes on behind white space, `token` and (but in a string) white space."""
    match = TOKENS[token].match(text, at)
    if not match:
        raise ValueError(f"{token} is missing at character {at} of the JSON object")
    return match.end()


LAYOUTS[None] = unsplice_as_it_stands, splice


# ---- 36. The other layout of messages: v1.kernel.websocket.jupyter.org -------------------------

V1 = "v1.kernel.websocket.jupyter.org"


def splice_v1(entry):
    """The same in `v1.kernel.websocket.jupyter.org`: n, n offsets (little-endian u64; the last one
    is the end), then channel, header, parent_header, metadata, content, buffers."""
    parts, offsets = [entry.channel.encode(), *entry.json_parts, *entry.buffers], []
    at = 8 * (len(parts) + 2)
    for part in parts:
        offsets.append(at)
        at += len(part)
    head = struct.pack(f"<{len(parts) + 2}Q", len(parts) + 1, *offsets, at)
    return BINARY, head + b"".join(parts)


def unsplice_v1(message):
    """The Entry in a message of that layout; raises ValueError."""
    try:
        count = struct.unpack_from("<Q", message)[0]
        offsets = struct.unpack_from(f"<{min(count, len(message))}Q", message, 8)
    except (struct.error, TypeError) as problem:
        raise ValueError(f"not of the v1 layout: {problem}") from None
    parts = [message[start:end] for start, end in zip(offsets, offsets[1:], strict=False)]
    if len(parts) < 5:
        raise ValueError("a part is missing")
    return Entry(parts[0].decode(), parts[1:5], parts[5:])


LAYOUTS[V1] = unsplice_v1, splice_v1


# ---- 37. Compression: permessage-deflate (RFC 7692) --------------------------------------------
#
# Each message is compressed by itself, "no context takeover", so that no connection keeps a window
# of 32 kB for later.

WORTH_DEFLATING = 1 << 10   # bytes; a smaller message fits in one packet anyway
FLUSH_TAIL = b"\0\0\xff\xff"   # ends what is flushed; it is not sent (RFC 7692 7.2.1)
DEFLATE_PARAMETERS = {    # RFC 7692 7.1 -> the values that we can do; zlib has no raw window of 8
    "server_no_context_takeover": "", "client_no_context_takeover": "",
    "server_max_window_bits": "9|1[0-5]", "client_max_window_bits": "|[89]|1[0-5]"}


class Deflate:
    """The extension permessage-deflate of one connection (RFC 7692)."""

    def __init__(self, window_bits=15):
        self.window_bits = window_bits   # of what we compress

    def pack(self, opcode, payload):
        """(opcode with the bit that says so, payload compressed), where it is worth it."""
        if len(payload) < WORTH_DEFLATING:
            return opcode, payload
        return opcode | COMPRESSED, deflate(payload, self.window_bits)

    def unpacker(self):
        """The function that unpacks the payloads of one message, fragment by fragment: of the
        payload, of whether it is the last, and of the bytes that there is room for. One that would
        grow beyond the limit is not even made."""
        inflater = zlib.decompressobj(-15)

        def unpack(payload, is_last, room):
            try:
                data = inflater.decompress(payload + FLUSH_TAIL if is_last else payload, room + 1)
            except zlib.error as problem:
                text = f"not compressed by deflate: {problem}"
                raise WebSocketError(INVALID_DATA, text) from None
            if len(data) > room:
                raise WebSocketError(TOO_BIG, f"this message has no room for {len(data)} bytes")
            return data

        return unpack


def accept_deflate(offers):
    """(answer, window bits) to the first offer of permessage-deflate that we can accept; (None,
    None) without one (RFC 7692 5)."""
    for offer in offers:
        name, *parameters = [part.strip() for part in offer.split(";")]
        values = {key.strip(): value.strip(' "') for key, _, value in (
            parameter.partition("=") for parameter in parameters)}
        is_known = len(values) == len(parameters) and all(
            key in DEFLATE_PARAMETERS and re.fullmatch(DEFLATE_PARAMETERS[key], value)
            for key, value in values.items())
        if name == "permessage-deflate" and is_known:
            bits = values.get("server_max_window_bits")
            answer = f"{name}; server_no_context_takeover; client_no_context_takeover"
            return answer + (f"; server_max_window_bits={bits}" if bits else ""), int(bits or 15)
    return None, None


def deflate(payload, window_bits):
    """A message's payload, compressed (RFC 7692 7.2.1); quickly, for a person waits."""
    compressor = zlib.compressobj(1, zlib.DEFLATED, -window_bits)
    data = compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
    return data.removesuffix(FLUSH_TAIL)


def offer_deflate(handler):
    """(answer, Deflate) to a client that offers it, or None."""
    answer, bits = accept_deflate(words(handler.headers, "Sec-WebSocket-Extensions"))
    return (answer, Deflate(bits)) if answer else None


def deflate_afar(handler):
    """The same, if the client is on another machine: through loopback it only costs time."""
    return None if handler.client_address[0].startswith(LOOPBACK) else offer_deflate(handler)


EXTENSIONS.append(deflate_afar)


# ---- 38. However a secret is spelled -----------------------------------------------------------

def spellings(secret):
    """A pattern of bytes: the secret as it is, and as it stands in addresses (RFC 3986 2.1, once
    or twice encoded), forms, JSON, HTML and in headers in Latin-1."""
    return re.compile(b"".join(map(spellings_of_character, secret)))


@functools.lru_cache(1000)
def spellings_of_character(each):
    """A pattern for one character; letters and digits nobody encodes."""
    number, data = ord(each), each.encode("utf-8", "surrogatepass")
    if each.isascii() and each.isalnum():
        return data
    encoded = b"".join(b"(?:%b|%%(?:25)*%02x)" % (re.escape(bytes([byte])), byte) for byte in data)
    units = each.encode("utf-16-be", "surrogatepass")    # as JSON counts
    unicode = b"".join(rb"\\u%02x%02x" % pair for pair in zip(units[::2], units[1::2], strict=True))
    # The longer one first, where one begins like another.
    ways = [unicode, re.escape(json.dumps(each)[1:-1].encode()), encoded,
            b"&#x?0*(?:%d|%x);" % (number, number),
            re.escape(html.escape(each).encode("utf-8", "surrogatepass"))]
    ways += [rb"\+"] if each == " " else []
    ways += [re.escape(bytes([number]))] if number < 256 else []
    return b"(?i:%b)" % b"|".join(ways)


def as_utf8(value):
    """A header's text, which was read as Latin-1, as UTF-8 where it is that."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value


class TolerantAccess(ACCESS[-1]):
    """Takes a token in a header in UTF-8, as most clients send it, or in Latin-1, as Python's."""

    def is_token(self, given):
        return super().is_token(given) or super().is_token(as_utf8(given))


SPELLINGS.append(spellings)
ACCESS.append(TolerantAccess)


# ---- 39. Login: forms, passwords ---------------------------------------------------------------
#
# Who opens a page without a cookie is led to a form, which takes the token. A password lets in as
# well, when one is set; the server knows only its hash. It is taken by the form alone: to look at
# a guess takes time, and a picture in a notebook could make one in its address.

SCRYPT = {"n": 1 << 14, "r": 8, "p": 1}   # some 50 ms and 16 MB for each guess (RFC 7914)
PASSWORD_HASH = re.compile("scrypt:[0-9a-f]+:[0-9a-f]+")
LOGIN_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
                "frame-ancestors 'none'")
FORM_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<title>MiniJupyter: {button}</title>
<meta name="viewport" content="width=device-width">
<style>:root{{color-scheme:light dark}}body{{font:16px system-ui;max-width:32rem;margin:15vh auto;
padding:0 1rem}}input{{font:inherit;width:100%;box-sizing:border-box;padding:.4rem;margin:.5rem 0}}
button{{font:inherit;padding:.4rem 1rem}}</style><main><h1>MiniJupyter</h1>
<form method="post" action="{action}">{fields}<input type="hidden" name="_xsrf" value="{xsrf}">
<button>{button}</button></form></main></html>"""
LOGIN_FIELDS = """<label for="password">{why}</label>
<input id="password" name="password" type="password" autocomplete="current-password" autofocus>
<input type="hidden" name="next" value="{next}">"""


def form_page(handler, status, path, fields, button):
    """A page with a form of our own. The cookie _xsrf and the field of its name show that the
    form comes from here: another site can send one as well, with our cookies, but cannot read
    them. `fields` is HTML."""
    access = handler.server.access
    xsrf = access.cookie(handler.headers, "_xsrf") or secrets.token_hex(16)
    page = FORM_PAGE.format(action=f"{handler.server.base_url}{path}", fields=fields,
                            xsrf=html.escape(xsrf), button=button)
    handler.send(status, page.encode(), "text/html; charset=utf-8", {
        "Content-Security-Policy": LOGIN_POLICY,
        "Set-Cookie": access.set_cookie("_xsrf", xsrf, "SameSite=Strict")})


def form_fields(handler):
    """The fields of the form in the body: name -> its first value."""
    return {name: values[0] for name, values in parse_qs(
        handler.body.decode("utf-8", "replace"), keep_blank_values=True).items()}


def login_page(handler, why="Copy the whole address with ?token=… from the terminal into the "
                            "address bar, or type the token or password here.", status=200):
    fields = LOGIN_FIELDS.format(why=why, next=html.escape(handler.asked("next", "")))
    form_page(handler, status, "login", fields, "Log in")


def login(handler):
    """Exchange the password, or the token, for the cookie."""
    access, form = handler.server.access, form_fields(handler)
    handler.query.setdefault("next", [form.get("next", "")])
    # Else another site could log its visitor in, to a server that it knows.
    if not access.repeats_xsrf(handler.headers, form.get("_xsrf", "")):
        return login_page(handler, "That took too long, or cookies are off: please try again.", 403)
    if not any(opens(form.get("password", "")) for opens in access.keys):
        return login_page(handler, "That was neither the token nor the password.", 401)
    handler.redirect(safe_next(access, handler.asked("next", "")),
                     access.set_cookie(access.cookie_name, access.cookie_value))


def logout_page(handler):
    """Log out who comes to this page by our own link, or types its address. All others are
    asked first: a notebook's picture, or a browser that does not say what it loads it for, may
    name any address of ours, so that a GET must have no effects (RFC 9110 9.2.1)."""
    purpose = [handler.headers.get(f"Sec-Fetch-{name}") for name in ("Dest", "Mode", "Site")]
    if purpose in (["document", "navigate", "same-origin"], ["document", "navigate", "none"]):
        return end_login(handler)
    form_page(handler, 200, "logout", "<p>Log out from this server?</p>", "Log out")


def logout(handler):
    access, form = handler.server.access, form_fields(handler)
    if not (access.is_our_page("POST", handler.headers, {}) or access.repeats_xsrf(
            handler.headers, form.get("_xsrf", ""))):
        raise Problem(403, "The request comes from another site")
    end_login(handler)


def end_login(handler):
    access = handler.server.access
    handler.redirect(f"{handler.server.base_url}login", access.set_cookie(access.cookie_name, ""))


def safe_next(access, path):
    """Where a login may lead: a path of ours, or our start. A browser takes "//host",
    "/\\host" and the like for another site's address."""
    is_ours = path.startswith(access.base_url) and not re.match(r"/[/\\]", path) \
        and not re.search(r"[\x00-\x20\x7f\\]", path)
    return quote(path, safe="/?&=%#:+,;@!$'()*~") if is_ours else access.base_url + "tree"


ROUTES += [("GET", "/login", login_page), ("POST", "/login", login),
           ("GET", "/logout", logout_page), ("POST", "/logout", logout)]
OPEN_TO_ALL |= {"login_page", "login", "logout_page", "logout"}


def hash_password(password, salt=None):
    """What may be written down of a password: scrypt:SALT:HASH, both in hex."""
    salt = salt or secrets.token_bytes(16)
    digest = hashlib.scrypt(password.encode("utf-8", "replace"), salt=salt, **SCRYPT)
    return f"scrypt:{salt.hex()}:{digest.hex()}"


class Password:
    """A password of which only the hash is known."""

    def __init__(self, hash):
        self.hash, self.salt = hash, bytes.fromhex(hash.split(":")[1])
        self.guessing = threading.Lock()   # one guess at a time

    def opens(self, given):
        with self.guessing:
            return same_secret(hash_password(given, self.salt), self.hash)


def ask_password(twice):
    """A password from the terminal, or a line of the standard input when that is none."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    import getpass
    password = getpass.getpass("Password: ")
    if twice and getpass.getpass("Once more: ") != password:
        sys.exit("These were two different passwords.")
    return password


def hash_of_password(text):
    """The value of --password: what `password` has printed, or nothing, which asks for it now."""
    if text and not PASSWORD_HASH.fullmatch(text):
        raise argparse.ArgumentTypeError("it takes no password, which others could see in the list "
                                         "of processes, but what `minijupyter.py password` prints")
    return text


class KeyRing(ACCESS[-1]):
    """Opens for what else a login takes."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.keys = [self.is_token]   # functions of a text, is it one that a login takes

    def add_key(self, opens, about):
        """Take at a login as well a text for which `opens` is true. Who was let in before `about`
        changed is out (CVE-2026-40934)."""
        self.keys.append(opens)
        self.cookie_value = self.new_cookie(about)


ACCESS.append(KeyRing)


def let_password_in(server, arguments):
    hash = arguments.password
    if hash == "":
        hash = hash_password(ask_password(twice=True))
    if hash:
        server.access.add_key(Password(hash).opens, hash)


def print_password(words):
    """`password`: ask for a password and print what to give to --password."""
    print(hash_password(ask_password(twice=True)))


OPTIONS.append((["--password"], {
    "metavar": "HASH", "nargs": "?", "const": "", "type": hash_of_password,
    "help": "lets a password in, too: asked for now, or what `password` has printed"}))
AT_START.append(let_password_in)
COMMANDS["password"] = print_password


# ---- 40. TLS -----------------------------------------------------------------------------------

OPTIONS += [
    (["--certfile"], {"metavar": "PEM", "help": "certificate: the server speaks https"}),
    (["--keyfile"], {"metavar": "PEM", "help": "its key, when it is not in the same file"})]


def speak_tls(server, arguments):
    """All connections through TLS, if there is a certificate. The handshake comes with the first
    bytes that a connection's own thread reads: a client that stalls holds up nobody else."""
    certfile, keyfile = arguments.certfile, arguments.keyfile
    if not certfile:
        return sys.exit("--keyfile needs --certfile") if keyfile else None
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certfile, keyfile)
    except (OSError, ssl.SSLError) as problem:
        sys.exit(f"Cannot use the certificate {certfile}: {problem}")
    server.wrap = functools.partial(
        context.wrap_socket, server_side=True, do_handshake_on_connect=False)
    server.scheme, server.access.is_secure = "https", True


AT_START.append(speak_tls)


# ---- 41. How kernels are reached ---------------------------------------------------------------

SOCKETS = os.path.join(RUNTIME, "sockets")
MOST_SOCKET_PATH = 103   # bytes of a socket file's path (macOS; Linux has 107)
OPTIONS.append((["--transport"], {"choices": ["tcp"], "help":
    "how kernels are reached (default: by files that only you can open, for kernels that can; "
    "tcp: by ports, so that others can listen, as in a lab)"}))


def knows_local(spec):
    """True when a kernel is known to bind socket files; xeus-python, for one, cannot."""
    return zmq.has("ipc") and POSIX and (
        "ipc" in spec["metadata"].get("supported_transports", ())
        or any("ipykernel" in word for word in spec["argv"]))


def can_be_socket(path):
    """False for a path that is too long, or (to ZeroMQ) no text."""
    try:
        return len(path.encode()) <= MOST_SOCKET_PATH
    except UnicodeEncodeError:
        return False


def socket_files(kernel):
    """The same as files, for kernels that can. Nobody else on this machine can reach a file in a
    folder of ours; a port anybody can."""
    # Named without the kernel's id: `jupyter console --existing ID` takes any file that has it.
    prefix = os.path.join(SOCKETS, secrets.token_hex(4))
    if not knows_local(kernel.spec) or not can_be_socket(f"{prefix}-5"):
        return free_ports(kernel)
    kernel.files += [f"{prefix}-{number}" for number in range(1, 6)]   # most kernels leave them
    return range(1, 6), {"ip": prefix, "transport": "ipc"}


def choose_transport(server, arguments):
    if arguments.transport == "tcp":
        PORTS.remove(socket_files)


PORTS.append(socket_files)
AT_START.append(choose_transport)


# ---- 42. Ports that others took ----------------------------------------------------------------
#
# Between the choice of a port and its kernel's start another program may take it.

MOST_STARTS = 5             # of a kernel whose ports others take


def lost_a_port(kernel):
    """True when the process could not begin because others have taken one of its ports since
    they were chosen: it gets new ones, and nobody needs to know."""
    starts = getattr(kernel, "starts_in_vain", 0)
    try:
        if starts >= MOST_STARTS or not any_is_taken(kernel.connection):
            return False
        kernel.connection = {**new_connection(kernel), "key": kernel.connection["key"]}
    except OSError:   # descriptors run short
        return False
    kernel.starts_in_vain = starts + 1
    log(f"kernel {kernel.id}: a port was taken, so it gets new ones", "info")
    return True


def any_is_taken(connection):
    """True when another process listens on a port of a connection."""
    for channel in CHANNELS if connection["transport"] == "tcp" else ():
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)   # ours has just ended
            try:
                sock.bind((connection["ip"], connection[f"{channel}_port"]))
            except OSError:
                return True
    return False


REPAIRS.append(lost_a_port)


# ---- 43. What the terminal shows ---------------------------------------------------------------

class LoggingHandler(HANDLERS[-1]):
    """Prints a line for each request."""

    def log_request(self, code="-", size="-"):
        """A line per request, when asked for; a query may hold the token and is left out."""
        if log.level in ("debug", "info"):
            path = self.server.access.without_token(self.path.partition("?")[0].encode("latin-1"))
            log(f"{code} {self.command} {path}" if path else f"{code}, no request", "info")


def choose_level(server, arguments):
    log.level = arguments.log_level


OPTIONS.append((["--log-level"], {
    "choices": LEVELS, "default": "warning", "metavar": "LEVEL",
    "help": f"{', '.join(LEVELS)}; info prints a line for each request (default: %(default)s)"}))
HANDLERS.append(LoggingHandler)
AT_START.append(choose_level)


# ---- 44. Few garbage collections ---------------------------------------------------------------

def collect_rarely(server, arguments):
    """A large notebook is a million objects without a cycle: looked at rarely, it loads faster."""
    gc.freeze()
    gc.set_threshold(100_000, *gc.get_threshold()[1:])


AT_START.append(collect_rarely)


# ---- 45. Idle kernels --------------------------------------------------------------------------

OPTIONS.append((["--cull-idle"], {
    "type": float, "metavar": "SECONDS",
    "help": "shut down kernels that nobody uses, after so long (default: never)"}))


def cull(kernels, seconds):
    """Forever: end the kernels that nobody listens to and that have been idle for so long."""
    while True:
        time.sleep(min(10, seconds / 4))
        for kernel in list(kernels.all.values()):
            is_idle = kernel.state == "idle" and not kernel.connections
            if is_idle and time.time() - kernel.last_activity > seconds:
                log(f"kernel {kernel.id} was idle for {seconds:g} s: it is shut down")
                with contextlib.suppress(Problem):
                    kernels.shutdown(kernel.id)


def cull_idle_kernels(server, arguments):
    if arguments.cull_idle:
        threading.Thread(target=cull, args=[server.kernels, arguments.cull_idle],
                         daemon=True).start()


AT_START.append(cull_idle_kernels)


# ---- 46. What few clients ask for --------------------------------------------------------------

# They are asked by programs that look whether anybody is here: nobody is, for all they do.
NO_ACTIVITY = {"status", "resolve_path"}
JUPYTER_CONFIG = os.environ.get("JUPYTER_CONFIG_DIR") or os.path.expanduser("~/.jupyter")
VIEW_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; frame-src 'self'; "
               "base-uri 'none'; form-action 'none'; frame-ancestors 'self'")
VIEW_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>html,body,iframe{{width:100%;height:100%;margin:0;border:0;display:block}}</style>
<iframe sandbox="allow-scripts" title="{name}" src="{address}"></iframe></html>"""


class Config:
    """Settings that frontends keep with the server: a JSON object per section, in Jupyter's folder.

    The files are those of Jupyter Server's `serverconfig`: whichever of the two servers runs, a
    frontend finds its settings.
    """

    def __init__(self, folder):
        self.folder, self.lock = folder, threading.RLock()

    def path(self, section):
        return os.path.join(self.folder, f"{section}.json")

    def get(self, section):
        try:
            with open(self.path(section), encoding="utf-8") as file:
                values = json.load(file)
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise Problem(400, f"The settings {section} on disk are damaged")
        return values

    def set(self, section, values):
        try:
            data = to_json(values)
        except (ValueError, RecursionError):
            raise Problem(400, f"The settings {section} are nested too deep") from None
        with self.lock:
            os.makedirs(self.folder, exist_ok=True)
            write_atomically(self.path(section), data)

    def change(self, section, values):
        """Merge `values` into a section; null takes a key away. Returns the section."""
        with self.lock:
            try:
                merged = merge(self.get(section), values)
            except RecursionError:
                raise Problem(400, f"The settings {section} are nested too deep") from None
            self.set(section, merged)
        return merged


def merge(old, new):
    """`old` with the values of `new`, object by object; null takes a key away, and an object that
    becomes empty by it goes, too (jupyter_server.config_manager, recursive_update)."""
    if not isinstance(new, dict):
        return new
    merged = dict(old) if isinstance(old, dict) else {}
    for key, value in new.items():
        value = merge(merged.get(key), value)
        if value is None or value == {}:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged


def status(handler):
    server = handler.server
    kernels = list(server.kernels.all.values())
    latest = max([server.last_activity, *(kernel.last_activity for kernel in kernels)])
    return {"started": iso(server.started), "last_activity": iso(latest),
            "kernels": len(kernels), "connections": sum(k.connections for k in kernels)}


def note_activity(handler):
    if "no_track_activity" not in handler.query and handler.name not in NO_ACTIVITY:
        handler.server.last_activity = time.time()


ADMITTED.append(note_activity)


def old_session_wish(handler, wish):
    """Before there were sessions of other types, its path stood in `notebook`: some clients still
    say it so."""
    if handler.name in ("create_session", "change_session"):
        if not handler.body:
            raise Problem(400, "No JSON data provided")
        notebook = wish.pop("notebook", None)
        if isinstance(notebook, dict) and notebook.get("path"):
            wish.update(path=notebook["path"], type="notebook")


CHECKS.append(old_session_wish)


def me(handler):
    """Who uses the server: always the same one person."""
    try:
        wanted = json.loads(handler.asked("permissions", "{}"))
        is_list = all(isinstance(actions, list) and all(isinstance(a, str) for a in actions)
                      for actions in wanted.values())
    except (ValueError, AttributeError, RecursionError):
        is_list = False
    if not is_list:
        raise Problem(400, 'permissions should be a JSON dict of {"resource": ["action",]}')
    name = os.environ.get("USER") or os.environ.get("USERNAME") or "user"
    return {"identity": {"username": name, "name": name, "display_name": name,
                         "initials": name[:1].upper(), "avatar_url": None, "color": None},
            "permissions": {**wanted, "updatable_fields": []}}


def change_me(handler):
    if not handler.json_body():
        raise Problem(400, "Invalid or missing JSON body")
    raise Problem(501, "The user of this server is whoever started it")


def get_kernelspec(handler, name):
    found = find_specs().get(name.lower())
    if not found:
        raise Problem(404, f"Kernel spec {name} not found")
    return handler.spec_model(name, *found)


def get_config(handler, section):
    return handler.server.config.get(section)


def set_config(handler, section):
    handler.server.config.set(section, handler.json_body())
    return 204, None


def change_config(handler, section):
    return handler.server.config.change(section, handler.json_body())


def view(handler, path):
    """A page with a file in a frame of its own, which may run the file's scripts: they are
    strangers to this server, as everywhere."""
    if os.path.isdir(handler.server.contents.existing(path)):
        raise Problem(404, f"{path} is a folder")
    page = VIEW_PAGE.format(
        name=html.escape(os.path.basename(path)),
        address=html.escape(f"{handler.server.base_url}files/{quote(path)}"))
    handler.send(200, page.encode(), "text/html; charset=utf-8",
              {"Content-Security-Policy": VIEW_POLICY})


def old_contents(handler, path):
    """Where notebooks were before other files had an address, too."""
    handler.redirect(f"{handler.server.base_url}api/contents/{quote(path)}")


def specification(handler):
    """This API as Swagger 2.0, made from ROUTES. It is JSON, which is YAML, too."""
    paths = {}
    for method, pattern, endpoint in ROUTES:
        function = getattr(Handler, endpoint) if isinstance(endpoint, str) else endpoint
        name = function.__name__
        names = function.__code__.co_varnames[1:function.__code__.co_argcount]
        words = (function.__doc__ or name.replace("_", " ")).strip().splitlines()
        if pattern.startswith("/api"):
            template = path_template(pattern, names)
            paths.setdefault(template, {})[method.lower()] = {
                "operationId": name, "summary": words[0].rstrip(), "parameters": [
                    {"name": name, "in": "path", "required": True, "type": "string"}
                    for name in names if f"{{{name}}}" in template],
                "responses": {"default": {"description": "JSON; an error has a `message`"}}}
    handler.send(200, to_json({
        "swagger": "2.0", "info": {"title": "MiniJupyter", "version": __version__},
        "basePath": handler.server.base_url, "paths": paths}), "text/x-yaml")


def resolve_path(handler):
    """Where a path leads that stands in some output: below the root, and for a kernel."""
    path, kernel_id = handler.asked("path"), handler.asked("kernel")
    if path is None:
        raise Problem(400, "Missing argument path")
    kernel = handler.server.kernels.all.get(kernel_id)
    found = {"server": path_below_root(handler, path), "kernel": kernel and path_at(kernel, path)}
    answer = {"resolved": [{"scope": scope, "path": found[scope]} for scope in found
                           if found[scope]]}
    if kernel_id and not kernel:
        reason = f"Kernel {kernel_id} could not be found"
        answer["unresolved"] = [{"scope": "kernel", "reason": reason}]
    return answer


def path_below_root(handler, path):
    """The API's path of an existing file, from a path below the root or of the disk."""
    root, path = handler.server.contents.root, os.path.expanduser(path)
    if is_within(path, root):
        path = path[len(root):]
    with contextlib.suppress(Problem):
        return handler.server.contents.look(path)[1] and path.strip("/")
    return None


def own_file(handler, path):
    """Whether this very server runs from that file: then an editor tells when a change acts."""
    absolute = handler.server.contents.existing(path)
    own = os.path.join(HERE, os.path.basename(path))
    return {"is_own": os.path.exists(own) and os.path.samefile(absolute, own)}


ROUTES += [("GET", r"/view/(.+)", view),
           ("GET", r"/api/own/(.+)", own_file),
           ("GET", r"/api/status", status),
           ("GET", r"/api/kernelspecs/([^/]+)", get_kernelspec),
           ("GET", r"/api/me", me),
           ("PATCH", r"/api/me", change_me),
           ("GET", r"/api/resolvePath", resolve_path),
           ("GET", r"/api/spec\.yaml", specification),
           ("GET", r"/api/config/(\w+)", get_config),
           ("PUT", r"/api/config/(\w+)", set_config),
           ("PATCH", r"/api/config/(\w+)", change_config),
           ("GET", r"/api/notebooks(?:/(.*))?", old_contents)]


def path_at(kernel, path):
    """The absolute path of an existing file as a kernel's code would find it, or None."""
    absolute = os.path.join(kernel.cwd, os.path.expanduser(path))
    return absolute if os.path.exists(absolute) else None


def path_template(pattern, names):
    """A route's pattern for people, with the names of its groups: /api/kernels/{id}/interrupt."""
    text = pattern.removesuffix(r"\Z").replace(ID, "()").replace("\\", "")
    text = re.sub(r"\(\?:/\((.*?)\)\)\?", "/()", text)
    names = iter(names)
    return re.sub(r"\([^)]*\)", lambda _: f"{{{next(names)}}}", text)


def options(handler, allowed):
    """The answer to that; no origin but ours is allowed."""
    handler.send(204, b"", "text/plain", {
        "Allow": ", ".join(sorted({*allowed, "OPTIONS"})),
        "Access-Control-Allow-Methods": "GET, PUT, POST, PATCH, DELETE, OPTIONS",
        "Access-Control-Allow-Headers": "accept, content-type, authorization, x-xsrftoken"})


OPEN_TO_ALL.add("options")


class WellKnownServer(SERVERS[-1]):
    """Knows since when it runs, and what settings it keeps."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.started = self.last_activity = time.time()
        self.config = Config(os.path.join(JUPYTER_CONFIG, "serverconfig"))


class HelpfulHandler(HANDLERS[-1]):
    """Answers OPTIONS."""

    def find_route(self):
        """Also what a browser asks before a request from elsewhere: which methods there are."""
        try:
            return super().find_route()
        except Problem as problem:
            if self.command != "OPTIONS" or problem.status != 405:
                raise
            return options, [problem.headers["Allow"].split(", ")]


SERVERS.append(WellKnownServer)
HANDLERS.append(HelpfulHandler)


# ---- 47. Under the hood: what passes, shown ----------------------------------------------------
#
# Who looks under the hood hears of everything that passes the server's edge, as the bytes that
# pass: HTTP exchanges, WebSocket frames, ZeroMQ messages, and what is done to a process. The taps
# are where the bytes are (KernelSocket, FrameParser.next_frame, WebSocket.write, Exchange) and do
# no more than put them into the ring of each Watch. Its own thread takes them out some times a
# second, hides what is secret and sends them on; what it sends itself is not reported. Who watches
# can also interfere: hold messages back (`Gate`), cut a connection, end the process, send a
# forgery. To add such a wish, write a method of its name and name it in WISHES.

SPECTATORS = []              # those who look under the hood: hardly ever is there one
MOST_TRACED = 64 << 10    # bytes of what is reported that are kept
MOST_LINES = 6            # of the call stack
MOST_EVENTS = 5_000          # that wait for who watches; then the oldest are dropped, and counted
MOST_WATCHED = 32 << 20      # bytes of them
TELL_SECONDS = 0.1           # between two looks: a person sees no difference
MOST_SECONDS_HELD = 60       # of a delay
GATE_SECONDS = 0.02          # between two looks at what waits at a gate
MOST_AT_ONCE = 400           # events in one go: the thread that sends them slows all others
WISHES = ("hold", "step", "drop", "kill", "send", "key")
SOURCES = ("index.html", "minijupyter.py", "kernel.py")
PRIVATE = [re.compile(pattern, re.M | re.I) for pattern in (   # the second group is hidden
    rb"^((?:authorization|cookie|set-cookie|x-xsrftoken):[ \t]*)([^\r\n]+)",
    rb"((?:[?&]|%3F|%26)(?:token|_xsrf)(?:=|%3D))([^&\s#]+)",
    rb"""(name="_xsrf" value=")([^"]+)""")]
TYPED = re.compile(rb'("value"\s*:\s*")((?:[^"\\]|\\.)*)')   # in an input_reply
LONGEST_SPELLING = 20        # bytes of a character: four in UTF-8, each percent-encoded twice
SHORTEST_SECRET = 4          # characters; stars for a shorter one would tell more than it does


def report(kind, way, about, parts):
    """The tap: tell spectators of a WebSocket frame, of the parts of a ZeroMQ message, or the like,
    and of the lines of this file that have led to it, innermost first: of a frame that comes in
    where it is understood, of all else the caller of the method that sends or receives."""
    lines, frame = [], sys._getframe(1 if (kind, way) == ("websocket", "in") else 2)
    while frame and frame.f_code.co_filename == __file__ and len(lines) < MOST_LINES:
        lines.append(frame.f_lineno)
        frame = frame.f_back
    event = {"kind": kind, "way": way, "at": time.time(), "lines": lines,
             "sizes": [*map(len, parts)], "parts": parts, **about}
    if sum(event["sizes"]) > MOST_TRACED:
        event["parts"] = cut(parts)
    for spectator in tuple(SPECTATORS):
        spectator.note(event)


def cut(parts):
    """The first bytes of the parts, no more than are kept."""
    room, kept = MOST_TRACED, []
    for part in parts:
        kept.append(part[:room])
        room -= len(kept[-1])
    return kept


def stars(text):
    """As many stars: what is hidden keeps its length, so that all else keeps its place."""
    return b"*" * len(text)


def mask(pattern, data):
    return pattern.sub(lambda match: match[1] + stars(match[2]), data)


def split_frame(frame):
    """(head, mask, payload as it is on the wire) of a WebSocket frame (RFC 6455 5.2)."""
    size = 2 + {126: 2, 127: 8}.get(frame[1] & 0b0111_1111, 0)
    masked = size + (4 if frame[1] & 0b1000_0000 else 0)
    return frame[:size], frame[size:masked], frame[masked:]


def longest_spelling(secret):
    """How many bytes no spelling is longer than."""
    return sum(1 if each.isascii() and each.isalnum() else LONGEST_SPELLING for each in secret)


class Secrets:
    """What a trace must not tell: token, cookies, passwords, the keys of kernels."""

    def __init__(self, server):
        self.server, self.known = server, {}   # text -> pattern
        self.asked_openly = set()   # msg_ids of input_requests whose answer may be seen

    def learn(self):
        """Which texts are secret now, too: kernels come and go."""
        access, kernels = self.server.access, list(self.server.kernels.all.values())
        known = [access.token, access.cookie_value,
                 *(kernel.connection["key"] for kernel in kernels)]
        for each in known:
            if len(each) >= SHORTEST_SECRET and each not in self.known:
                self.known[each] = SPELLINGS[-1](each)

    def seen(self, event):
        """The parts of an event as they may be seen, each as long as it was. Of one that was cut
        the end goes, too: half a secret may stand there."""
        kind, parts = event["kind"], event["parts"]
        if kind == "websocket":
            parts = [self.in_frame(parts[0])]
        elif kind == "http":
            for pattern in PRIVATE:
                parts = [mask(pattern, part) for part in parts]
        elif event.get("channel") == "stdin":
            self.note_question(parts)
            parts = self.in_answer(parts)
        whole = b"".join(parts)
        if sum(event["sizes"]) == len(whole):
            is_clean = not any(pattern.search(whole) for pattern in self.known.values())
            return parts if is_clean else [*map(self.in_text, parts)]
        end = max(map(longest_spelling, self.known), default=0)
        return [self.in_text(part)[:None if len(part) == size else -end]
                for part, size in zip(parts, event["sizes"], strict=True)]

    def in_text(self, data):
        for pattern in self.known.values():
            data = pattern.sub(lambda match: stars(match[0]), data)
        return data

    def in_frame(self, frame):
        """A frame's payload is read without its mask. What is compressed can only be hidden as a
        whole, and so is a fragment: a secret may begin in one and end in the next."""
        head, key, payload = split_frame(frame)
        plain = apply_mask(payload, key) if key else payload
        text = plain
        if frame[0] & COMPRESSED:
            text = zlib.decompressobj(-15).decompress(plain)
        seen = self.in_text(self.in_answer([text])[0])
        if frame[0] & ~COMPRESSED not in WHOLE or text is not plain and seen != text:
            seen = stars(plain)
        elif seen == text:
            return frame
        return head + key + (apply_mask(seen, key) if key else seen)

    def note_question(self, parts):
        """Remember an input_request that is no secret."""
        if b'"input_request"' in b"".join(parts):
            start = parts.index(our_kernel.DELIMITER) + 2
            header, _, _, content = map(json.loads, parts[start:start + 4])
            is_open = header["msg_type"] == "input_request" and content["password"] is False
            if is_open and header["msg_id"]:
                self.asked_openly.add(header["msg_id"].encode())
            if len(self.asked_openly) > MOST_EVENTS:
                self.asked_openly.clear()

    def in_answer(self, parts):
        """An input_reply without what was typed, unless its question is known to be no secret."""
        data = b"".join(parts)
        if b'"input_reply"' not in data or any(
                msg_id in data for msg_id in self.asked_openly):
            return parts
        return [mask(TYPED, part) for part in parts]


class Exchange:
    """One HTTP exchange, reported when it is over: it takes the place of the handler's wfile, to
    keep a copy of what is written.

    parts = [head of the request, its body, head of the response, its body]
    """

    def __init__(self, handler):
        self.handler, self.file, self.at = handler, handler.wfile, time.time()
        self.written, self.size, handler.wfile = bytearray(), 0, self

    def write(self, data):
        self.written += data[:max(0, MOST_TRACED // 2 - self.size)]
        self.size += len(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()

    def end(self):
        """Report it, once; the wishes of who watches are no part of what there is to see."""
        handler, endpoint = self.handler, self.handler.endpoint
        name = endpoint.__name__
        if handler.wfile is not self:
            return
        handler.wfile = self.file
        if name in ("trace", "source"):
            return
        asked, body = handler.head_bytes, handler.body or b""
        head, end, answer = bytes(self.written).partition(b"\r\n\r\n")
        kept = body[:MOST_TRACED // 2]
        parts = [asked, stars(kept) if name == "login" else kept, head + end, answer]
        sizes = [len(asked), len(body), len(head + end), self.size - len(head + end)]
        report("http", "in", {"at": self.at, "seconds": time.time() - self.at, "sizes": sizes,
                              "lines": [endpoint.__code__.co_firstlineno]},
               parts)


class Gate:
    """Between a kernel and its pages: it is open, but a spectator can hold messages back, channel
    by channel, to see what happens then. The watcher asks it.

    rules = {channel: ("pause", 0) (until a step lets one pass), ("delay", seconds) (each comes so
    much later) or ("every", seconds) (one at a time)}
    """

    def __init__(self, kernel):
        self.rules, self.steps, self.lock = {}, 0, threading.Lock()
        self.held = []         # (when it came, Entry or Request) that wait, oldest first
        self.passed_at = 0.0   # when one of them passed last; monotonic, like the others
        kernel.gate = self
        kernel.gates.append(self)

    def patience(self):
        """Seconds until the next look."""
        return GATE_SECONDS if self.held else math.inf

    def let_pass(self, entries, requests):
        """Those of the Entries, Requests, and of what waited here, that may go on now. On each
        channel and way the order stays. What would be too much to keep passes."""
        if not (self.held or self.rules):
            return entries, requests
        now = time.monotonic()
        waiting = [*self.held, *((now, each) for each in (*entries, *requests))]
        room = MOST_WAITING - sum(each.size for _, each in waiting)
        held, stuck, passed = [], set(), []
        for came_at, each in waiting:
            way = type(each), each.channel
            is_own = isinstance(each, Request) and each.entry is None   # the server's
            if is_own or way not in stuck and (room < 0 or self.is_free(each, came_at)):
                room += each.size
                passed.append(each)
            else:
                stuck.add(way)
                held.append((came_at, each))
        self.held = held
        return ([each for each in passed if isinstance(each, Entry)],
                [each for each in passed if isinstance(each, Request)])

    def is_free(self, each, came_at):
        """True when the oldest that waits on its way may go on now."""
        rule, seconds = self.rules.get(each.channel, ("delay", 0))
        if rule == "pause":
            with self.lock:
                may_pass, self.steps = self.steps > 0, max(0, self.steps - 1)
        else:
            since = came_at if rule == "delay" else self.passed_at
            may_pass = time.monotonic() >= seconds + since
        if may_pass:
            self.passed_at = time.monotonic()
        return may_pass

    def release(self):
        """The Entries that wait: their process has ended, and its end is told behind them."""
        entries = [each for _, each in self.held if isinstance(each, Entry)]
        self.held = []
        return entries


KERNEL_EXTRAS.append(Gate)


class Spectator:
    """One who looks under the hood, by a WebSocket of its own.

    It sends binary messages (see `join_parts`) of a JSON object and the parts of an event: n, kind
    (http, websocket, zmq, process), way (in, out), at (seconds since 1970), lines (of this file,
    innermost first), sizes (of the parts before they were cut), hidden (is there a star in them),
    kernel, channel, client. A text message is a JSON object of `now`, `missed` (events), `held`
    ({kernel: {channel: [messages that wait, msg_type of the first]}}), `key` or `problem`. It gets
    wishes: {do: one of WISHES, kernel, …}.
    """

    def __init__(self, websocket, server):
        self.websocket, self.server, self.secrets = websocket, server, Secrets(server)
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()      # guards the next three
        self.events, self.size, self.missed = collections.deque(), 0, 0
        self.rules = {}                   # kernel -> the rules it has set for its gate
        self.held = {}                    # as was told last

    def note(self, event):
        """From any thread: keep an event until it is sent."""
        with self.lock:
            self.events.append(event)
            self.size += sum(map(len, event["parts"]))
            while len(self.events) > MOST_EVENTS or self.size > MOST_WATCHED:
                self.take()
                self.missed += 1

    def take(self):
        """The oldest event; the lock is held."""
        event = self.events.popleft()
        self.size -= sum(map(len, event["parts"]))
        return event

    def run(self):
        """Tell and obey until the connection ends; then nothing is held back any more."""
        poller = zmq.Poller()
        poller.register(self.websocket.fileno(), zmq.POLLIN)
        self.begin()
        try:
            self.say(now=time.time())
            while not self.websocket.is_closed:
                if self.websocket.has_bytes or poller.poll(TELL_SECONDS * 1000):
                    for message in self.websocket.arrived():
                        self.obey(message)
                self.tell()
                self.websocket.ping_or_give_up()
        finally:
            self.end()

    def begin(self):
        """From here on it hears of all that passes."""
        SPECTATORS.append(self)
        if report not in TAPS:
            TAPS.append(report)

    def end(self):
        """It hears no more, and what it holds back may pass."""
        SPECTATORS.remove(self)
        if not SPECTATORS:
            TAPS.remove(report)
        for kernel, rules in self.rules.items():
            if kernel.gate.rules is rules:   # nobody else has set it since
                kernel.gate.rules = {}

    # -- what it tells --

    def tell(self):
        with self.lock:
            events = [self.take() for _ in range(min(MOST_AT_ONCE, len(self.events)))]
            missed, self.missed = self.missed, 0
        if events:
            self.secrets.learn()
            self.websocket.write(*map(self.frame, events))
        # Whoever has set the rules: all who watch see what they do.
        held = {kernel.id: self.held_at(kernel)
                for kernel in list(self.server.kernels.all.values()) if kernel.gate.rules}
        if missed or held != self.held:
            self.held = held
            self.say(missed=missed, held=held)

    def say(self, **what):
        self.websocket.send(to_json(what).decode())

    def frame(self, event):
        head, parts = self.shown(event)
        return encode_frame(BINARY, join_parts([to_json(head), *parts]))

    def shown(self, event):
        """(head, parts) of an event as they may be shown."""
        parts = event["parts"]
        try:
            seen = self.secrets.seen(event)
        except Exception:   # what cannot be read may hold a secret, and must not end the telling
            seen = [*map(stars, parts)]
        is_hidden = any(not part.startswith(shown)
                        for part, shown in zip(parts, seen, strict=True))
        head = {"n": next(self.numbers), "hidden": is_hidden, **event}
        del head["parts"]
        return head, seen

    def held_at(self, kernel):
        """{channel: (how many messages wait at the kernel's gate, msg_type of the first)}"""
        held = {}
        for _, each in kernel.gate.held:
            entry = each if isinstance(each, Entry) else each.entry
            count, first = held.get(entry.channel, (0, entry.msg_type))
            held[entry.channel] = count + 1, first
        return held

    # -- what it is asked to do --

    def obey(self, message):
        """Do what is wished; what cannot be done is told."""
        try:
            wish = json.loads(message)
            if wish["do"] not in WISHES:
                raise ValueError(f"there is no wish {wish['do']}; there are {', '.join(WISHES)}")
            kernel = self.server.kernels.get(wish["kernel"])
            getattr(self, wish["do"])(kernel, wish)
        except Problem as problem:
            self.say(problem=problem.message)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as problem:
            self.say(problem=f"This wish cannot be understood: {problem!r}")

    def hold(self, kernel, wish):
        """Set the rules of the kernel's gate: {channel: [one of pause, delay, every; seconds]}."""
        rules = {channel: (rule, float(seconds))
                 for channel, (rule, seconds) in wish["rules"].items()}
        for channel, (rule, seconds) in rules.items():
            if channel not in (*UPWARD, "iopub") or rule not in ("pause", "delay", "every") \
                    or not 0 <= seconds <= MOST_SECONDS_HELD:
                raise ValueError(f"{channel}: {rule} {seconds}")
        self.rules[kernel] = kernel.gate.rules = rules
        kernel.gate.steps = 0
        kernel.requests.put()   # the watcher looks

    def step(self, kernel, wish):
        """Let one more message pass, if one waits for that."""
        gate, held = kernel.gate, self.held_at(kernel)
        waiting = sum(count for channel, (count, _) in held.items()
                      if gate.rules.get(channel, ("", 0))[0] == "pause")
        with gate.lock:
            gate.steps = min(gate.steps + 1, waiting)

    def drop(self, kernel, wish):
        """Cut a page's connection, or all, as a bad network would."""
        for box in kernel.pages:
            if wish.get("client") in (None, box.session_id):
                box.cut_off()

    def kill(self, kernel, wish):
        kernel.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))

    def send(self, kernel, wish):
        """Send these very parts, in base64, down a channel, as one could who knows no key."""
        if wish["channel"] not in UPWARD:
            raise ValueError(f"nobody sends on {wish['channel']}")
        kernel.requests.put([Request(
            wish["channel"], [*map(base64.b64decode, wish["parts"])], life=kernel.life)])

    def key(self, kernel, wish):
        """Tell the key of a kernel, with which the page checks signatures. Who may run code there
        could read it anyway."""
        self.say(kernel=kernel.id, key=kernel.connection["key"])


def trace(handler):
    """From here on this thread tells what passes the server (see Spectator)."""
    websocket = WebSocket.accept(handler)
    handler.is_answered = True
    Spectator(websocket, handler.server).run()


def source(handler, name):
    """A file of this program, for who wants to read the line that has just run."""
    with open(os.path.join(HERE, name), "rb") as file:
        handler.send(200, file.read(), "text/plain; charset=utf-8")


def begin_exchange(handler):
    handler.exchange = Exchange(handler) if SPECTATORS else None


def end_exchange(handler):
    if handler.exchange:
        handler.exchange.end()


ROUTES += [("GET", "/api/trace", trace),
           ("GET", rf"/api/trace/({'|'.join(map(re.escape, SOURCES))})", source)]
BEFORE.append(begin_exchange)
AFTER.append(end_exchange)


# ---- 48. Other servers: list, stop -------------------------------------------------------------
#
# Every running server leaves a file in Jupyter's runtime folder, so that `jupyter server list`
# finds it, and `list` below: its address, its process, its token (only its owner may read it). A
# second one that was to have the same port says where the first one is.

STOP_SECONDS = 15          # that a server may take to end its kernels
MOST_ANSWER = 1 << 20      # bytes of an answer; what answers may be anything
SERVER_INFO = {"url": str, "token": str, "port": int, "root_dir": str}   # that we need of a file


def call(info, method, path):
    """The answer of a running server to a request, a JSON object or array; None without one."""
    import http.client
    import ssl
    import urllib.request
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE   # it is this machine
    try:
        request = urllib.request.Request(info["url"] + path, method=method, headers={
            "Authorization": f"token {info['token']}".encode()})
        with urllib.request.urlopen(request, timeout=5, context=context) as response:
            answer = json.loads(response.read(MOST_ANSWER))
    except (OSError, ValueError, RecursionError, http.client.HTTPException):
        return None
    return answer if isinstance(answer, (dict, list)) else None


def read_server_info(path):
    """What a server's file says; None when it is no such file: other programs leave theirs here,
    half of one may be left by a crash, or it belongs to somebody else."""
    try:
        with open(path, encoding="utf-8") as file:
            info = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(info, dict) or not all(
            isinstance(info.get(name), kind) for name, kind in SERVER_INFO.items()):
        return None
    return info if re.match("https?://", info["url"]) else None


def running_servers(port=None):
    """What the files in the runtime folder say, of those servers that answer; with `port`, of the
    one that has it."""
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(RUNTIME)):
            is_ours = re.fullmatch(r"jpserver-\d+\.json", name)
            info = read_server_info(os.path.join(RUNTIME, name)) if is_ours else None
            if info and port in (None, info["port"]) and call(info, "GET", "api"):
                yield info


def address_of(info):
    """Where a browser opens a running server."""
    return f"{info['url']}?token={quote(info['token'])}"


def list_servers(words):
    """`list`: show the servers that run."""
    servers = list(running_servers())
    for info in servers:
        print(f"{address_of(info)} :: {info['root_dir']}")
    if not servers:
        print("No server runs.")


def stop_server(words):
    """`stop [PORT]`: end one of them and its kernels."""
    servers = [info for info in running_servers() if words in ([], [str(info["port"])])]
    if len(servers) != 1:
        sys.exit("Which one? Give its port: " + ", ".join(str(s["port"]) for s in servers)
                 if servers else "No such server runs.")
    call(servers[0], "POST", "api/shutdown")
    deadline = time.monotonic() + STOP_SECONDS
    while call(servers[0], "GET", "api"):
        if time.monotonic() > deadline:
            sys.exit(f"{servers[0]['url']} does not end.")
        time.sleep(0.1)
    print(f"{servers[0]['url']} has ended.")


def announce(server, arguments):
    """Leave the server's file in the runtime folder until it ends (jupyter_server's fields)."""
    path = os.path.join(RUNTIME, f"jpserver-{os.getpid()}.json")
    write_secret(path, json.dumps({
        "base_url": server.base_url, "hostname": server.ip,
        "password": getattr(arguments, "password", None) is not None,
        "pid": os.getpid(), "port": server.server_port, "root_dir": server.contents.root,
        "secure": server.scheme == "https", "sock": "", "token": server.access.token,
        "url": server.url, "version": __version__}, indent=2))
    atexit.register(remove_if_there, path)


def remove_if_there(path):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


class NamingServer(SERVERS[-1]):
    """A server that cannot have its port says which one of the same user has it."""

    def server_bind(self):
        try:
            super().server_bind()
        except OSError as problem:
            port = self.server_address[1]
            for info in running_servers(port):
                problem.strerror = (
                    f"{problem.strerror}.\nA server of yours is there already, with the folder "
                    f"{info['root_dir']}:\n\n    {address_of(info)}\n\nTo stop it: "
                    f"python minijupyter.py stop {port}")
            raise


COMMANDS.update(list=list_servers, stop=stop_server)
AT_START.append(announce)
SERVERS.append(NamingServer)


# ---- 49. Other clients of a kernel -------------------------------------------------------------
#
# A kernel has as many clients as want to talk to it: a console in a terminal sees what the page
# runs, and the other way round. All that a client needs stands in the connection file.

def command_line(words):
    """Words as the shell of this system takes them."""
    import shlex
    return shlex.join(words) if POSIX else subprocess.list2cmdline(words)


def other_clients(handler, id):
    """What to type in a terminal of this machine to talk to a kernel, for each client:
    {connection_file, where, commands: [{client, command, install}]}."""
    file = handler.server.kernels.get(id).connection_file
    ours = [sys.executable, os.path.join(HERE, "minijupyter.py"), "console"]
    clients = [("MiniJupyter's console", ours, None),
               ("Jupyter console", ["jupyter", "console"], "pip install jupyter-console"),
               ("Qt console", ["jupyter", "qtconsole"], "pip install qtconsole PySide6")]
    return {"connection_file": file, "where": f"on {socket.gethostname()}", "commands": [
        {"client": client, "command": command_line([*words, "--existing", file]),
         "install": install} for client, words, install in clients]}


ROUTES.append(("GET", rf"/api/kernels/{ID}/clients", other_clients))


# ---- 50. Pages of other sites ------------------------------------------------------------------
#
# A course's web page may run its examples on this server (thebe), or a JupyterLite use its kernels:
# pages of another *origin* (scheme, host and port). A browser lets such a page send requests, but
# shows it an answer only if the answer names its origin (CORS, Fetch 3.2). So --allow-origin names
# those that are let in, each exactly; the page must know the token all the same, because our cookie
# does not count there. A browser asks first, with OPTIONS (a preflight), and also whether a page of
# the internet may reach this private network at all.

def exact_origin(text):
    """The value of --allow-origin: scheme, host and port, in the spelling of browsers."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc \
            or parts.path not in ("", "/") or parts.query or parts.fragment or "*" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no origin: write it as https://example.org or http://localhost:3000, one "
            "--allow-origin for each; there are no patterns, because whoever is let in can run "
            "code")
    usual = {"http": ":80", "https": ":443"}[parts.scheme]
    return f"{parts.scheme}://{parts.netloc.lower().removesuffix(usual)}"


class SharingServer(SERVERS[-1]):
    """Knows whose pages may read its answers."""

    origins = frozenset()


class SharingHandler(HANDLERS[-1]):
    """Tells the browser so."""

    def send(self, status, data, content_type, headers=()):
        origin = self.headers.get("Origin")
        if origin in self.server.origins:
            headers = {**dict(headers), "Access-Control-Allow-Origin": origin, "Vary": "Origin",
                       "Access-Control-Expose-Headers": "Location, Last-Modified"}
            if self.command == "OPTIONS":
                headers.update({"Access-Control-Max-Age": "600",   # seconds
                                "Access-Control-Allow-Private-Network": "true"})
        super().send(status, data, content_type, headers)


def let_origins_in(server, arguments):
    server.origins = frozenset(arguments.allow_origin)


SERVERS.append(SharingServer)
HANDLERS.append(SharingHandler)
OPTIONS.append((["--allow-origin"], {
    "metavar": "ORIGIN", "action": "append", "default": [], "type": exact_origin,
    "help": "lets pages of this origin, such as https://example.org, use the server with its token "
            "(thebe, JupyterLite); may be given several times"}))
AT_START.append(let_origins_in)
# ---- 51. Parameters: values of the command line, as a cell in the notebook's language ----------
#
# papermill's rules. A cell tagged `parameters` holds the defaults. The cell that assigns the values
# is tagged `injected-parameters`: it takes the place of an earlier one, or follows the defaults, or
# stands at the top. To add a language, add a row to TRANSLATORS.

DEFAULTS_TAG, INJECTED_TAG = "parameters", "injected-parameters"
is_variable = re.compile(r"[^\W\d][\w.]*").fullmatch   # R has names with dots
CONSTANTS = {"None": None, "False": False, "True": True}


def python_text(text):
    """As papermill writes it: what is not ASCII is an escape."""
    escaped = text.encode("unicode_escape").decode().replace('"', r'\"')
    return f'"{escaped}"'


def json_text(text):
    """For the languages that read JSON's escapes."""
    return json.dumps(text, ensure_ascii=False)


def julia_text(text):
    return json_text(text).replace("$", r"\$")   # which would insert a variable


def shell_text(text):
    import shlex
    return shlex.quote(text)


def text_with(escapes):
    """A function that writes a text in double quotes, with these {character: its escape}."""
    return lambda text: f'"{text.translate(str.maketrans(escapes))}"'


TRANSLATORS = {
    # language -> (comment, assignment, its None False True nan inf -inf, function of a text,
    #              what marks a long integer)
    "python": ("# {}", "{} = {}", "None False True float('nan') float('inf') float('-inf')",
               python_text, ""),
    "r": ("# {}", "{} = {}", "NULL FALSE TRUE NaN Inf -Inf", json_text, ""),
    "julia": ("# {}", "{} = {}", "nothing false true NaN Inf -Inf", julia_text, ""),
    "bash": ("# {}", "{}={}", " false true nan inf -inf", shell_text, ""),
    "javascript": ("// {}", "{} = {};", "null false true NaN Infinity -Infinity", json_text, ""),
    "typescript": ("// {}", "let {} = {};",   # in Deno let may follow let, and something must
                   "null false true NaN Infinity -Infinity", json_text, ""),
    "scala": ("// {}", "val {} = {}", "None false true Double.NaN Double.PositiveInfinity "
              "Double.NegativeInfinity", json_text, "L"),
    "c#": ("// {}", "var {} = {};", "(object)null false true double.NaN double.PositiveInfinity "
           "double.NegativeInfinity", json_text, "L"),
    "f#": ("(* {} *)", "let {} = {}", "None false true nan infinity -infinity", json_text, "L"),
    "powershell": ("# {}", "${} = {}", "$Null $False $True [double]::NaN "
                   "[double]::PositiveInfinity [double]::NegativeInfinity",
                   text_with({"`": "``", '"': '`"', "$": "`$"}), ""),
    "matlab": ("% {}", "{} = {};", "NaN false true NaN Inf -Inf",
               text_with({'"': '""', "\n": '" + newline + "'}), ""),
    "octave": ("% {}", "{} = {};", "NaN false true NaN Inf -Inf", json_text, ""),
}
SAME_LANGUAGE = {"csharp": "c#", "fsharp": "f#", "pwsh": "powershell", "sh": "bash", "zsh": "bash"}


def parameter_value(word):
    """A word of the command line as what it looks like (True, 3, 1e5, nan), else as it is."""
    if word in CONSTANTS:
        return CONSTANTS[word]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(word)
    return word


def translate(value, constants, write_text, long_mark):
    """A value as it is written in the language with this row."""
    if isinstance(value, str):
        return write_text(value)
    words = ("None", "False", "True", "nan", "inf", "-inf")
    written = dict(zip(words, constants.split(" "), strict=True)).get(str(value), str(value))
    is_long = isinstance(value, int) and not -(1 << 31) <= value < 1 << 31
    return written + (long_mark if is_long else "")


def assignments(parameters, language):
    """The source that assigns {name: value}. Raises ValueError for a language that has no row."""
    name = language.lower()
    name = SAME_LANGUAGE.get(name, name)
    if name not in TRANSLATORS:
        raise ValueError(f"Parameters cannot be written in the language {language!r}, only in "
                         + ", ".join(TRANSLATORS))
    comment, assignment, *row = TRANSLATORS[name]
    names = {key.lstrip("_") if name == "r" else key: value   # R has no names that begin with _
             for key, value in parameters.items()}
    lines = [assignment.format(key, translate(value, *row)) for key, value in names.items()]
    return "\n".join([comment.format("Parameters"), *lines, ""])


def has_tag(cell, tag):
    tags = cell["metadata"].get("tags")
    return isinstance(tags, list) and tag in tags


def with_parameters(cells, parameters, language):
    """The cells with one that assigns the parameters. Raises ValueError as `assignments` does."""
    injected = {"cell_type": "code", "execution_count": None, "outputs": [],
                "metadata": {"tags": [INJECTED_TAG]}, "source": assignments(parameters, language)}
    places = {tag: number for number, cell in reversed([*enumerate(cells)])
              for tag in (DEFAULTS_TAG, INJECTED_TAG) if has_tag(cell, tag)}
    if not places:
        log("No cell of the notebook has the tag parameters: the values are assigned at its top.")
    defaults = cells[places[DEFAULTS_TAG]]["source"] if DEFAULTS_TAG in places else ""
    for name in parameters if defaults else ():
        if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", defaults):
            log(f"The cell tagged parameters says nothing of {name}: is the name right?")
    if INJECTED_TAG in places:
        at = places[INJECTED_TAG]
        return [*cells[:at], {**cells[at], **injected}, *cells[at + 1:]]
    at = places.get(DEFAULTS_TAG, -1) + 1
    return [*cells[:at], injected, *cells[at:]]


# ---- 52. Run a notebook without a page: run ----------------------------------------------------
#
# `run` is a page without a browser: it joins a kernel as its only page, sends one cell after the
# other, files what comes, and saves. Two tables, SHOWN and CHANGES, say what messages do to the
# outputs of a cell. What is recorded and skipped is as in nbclient: the file looks as it does after
# `jupyter execute`.
#
#     R1 whole      The machine stops in mid-run. The file is the old one or holds what there was a
#                   second ago: outputs are saved as they come, whole or not at all.
#     R2 kept       Somebody saves the notebook in a page while it runs here. Theirs stays, and the
#                   result goes to a file of its own beside it.
#     R3 an end     A cell loops for ever, asks somebody who is not there, crashes its kernel; or
#                   somebody presses Ctrl-C. The cell says so in its outputs, what there is gets
#                   saved, and no process is left.
#     R4 told       What goes wrong is a sentence on stderr; stdout has the result or nothing.
#
#     a cell is      what leads on
#     running        its reply and idle -> over; --timeout, Ctrl-C, a question -> interrupted; the
#                    end of the process -> over, and so is the run
#     interrupted    its idle -> over; INTERRUPT_SECONDS, or another Ctrl-C -> over, and its kernel
#                    is ended like any other: asked to, then by SIGTERM, then by SIGKILL

FAILED, USAGE, SIGNALLED = 1, 2, 128   # exit codes; the last one plus the signal's number
START_SECONDS = 60       # that a kernel may take to answer (nbclient's, and papermill's)
INTERRUPT_SECONDS = 5    # that a cell gets to end when it is interrupted
IDLE_SECONDS = 4         # of silence after a reply, and the idle will not come (nbclient's)
TICK_SECONDS = 0.2       # between two looks at the clock and at signals
SAVE_SECONDS = 1         # between two saves while cells run, at least, and so many times as long
SAVE_SHARE = 10          # as the last save took
TRACEBACK_LINES = 12     # that are shown of a cell that failed
BAR, LINE = 16, 60       # columns of the bar, and of the code in a line
TIMES = {   # what comes on iopub -> its name in a cell's metadata.execution
    "execute_input": "iopub.execute_input",
    "busy": "iopub.status.busy", "idle": "iopub.status.idle"}


def refuse(sentence):
    log(sentence, "error")
    sys.exit(USAGE)


class OnlyPage(PageMailbox):
    """The mailbox of `run`, which is there until the end."""

    def __init__(self):
        super().__init__("", websocket=self)

    def cut_off(self):
        """When it is full the kernel waits (P4): nobody else does."""


class RunningCell:
    """A cell that was sent to its kernel: it gets the outputs that come of it.

    A stream's text is a list of pieces, as in a file, until the notebook is saved.
    """

    def __init__(self, cell, displays):
        self.cell, self.displays = cell, displays   # display_id -> outputs, of the whole run
        self.clears_next = False   # clear_output(wait=True): when the next output comes
        self.reply, self.is_idle, self.is_stopped = None, False, False
        self.question = None       # what it asks somebody who is not there
        self.heard_at = time.monotonic()
        cell.update(outputs=[], execution_count=None,
                    metadata={**cell["metadata"], "execution": {}})

    @property
    def is_over(self):
        """Both have come, or what is missing will not: bash, when interrupted, may never reply."""
        is_silent = time.monotonic() - self.heard_at > IDLE_SECONDS
        has_reply = self.reply is not None
        return self.is_idle and (has_reply or self.is_stopped) or has_reply and is_silent

    @property
    def error(self):
        """ename and evalue in a line, or None. A cell that was not run has failed, too."""
        reply = self.reply or {}
        if reply.get("status") in ("error", "aborted", "abort"):
            return f"{reply.get('ename') or reply['status']}: {reply.get('evalue', '')}".strip(": ")

    def last_words(self):
        """The end of its traceback; of what it printed when there is none (bash)."""
        texts = ["\n".join(output.get("traceback", ())) or "".join(output.get("text", ()))
                 for output in reversed(self.cell["outputs"])]
        plain = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", next(filter(str.strip, texts), ""))
        return "\n".join(plain.strip("\n").split("\n")[-TRACEBACK_LINES:])

    def hear(self, entry):
        """File an Entry that came of this cell."""
        self.heard_at = time.monotonic()
        content, msg_type = entry.content, entry.msg_type
        if entry.channel == "iopub":
            self.note_time(TIMES.get(content.get("execution_state", msg_type)), entry)
            self.is_idle = self.is_idle or entry.is_idle
            if msg_type in SHOWN:
                self.show(msg_type, content)
            elif msg_type in CHANGES:
                CHANGES[msg_type](self, content)
        elif msg_type == "execute_reply":
            self.note_time("shell.execute_reply", entry)
            self.reply = content
        elif msg_type == "input_request":
            self.question = f"The cell asks {content.get('prompt')!r}, and nobody can answer."
        if "execution_count" in content:
            self.cell["execution_count"] = content["execution_count"]

    def note_time(self, name, entry):
        if name:   # nothing is changed in place: it may be part of what was saved
            times = {**self.cell["metadata"]["execution"],
                     name: entry.header.get("date") or iso(time.time())}
            self.cell["metadata"] = {**self.cell["metadata"], "execution": times}

    def add(self, output):
        if self.clears_next:
            self.clear({})
        self.cell["outputs"].append(output)

    def show(self, kind, content):
        """Append an output. What has a display_id is from now on shown wherever that id is."""
        members = {name: content.get(name, default) for name, default in SHOWN[kind].items()}
        self.add({"output_type": kind, **members})
        if display_id := (content.get("transient") or {}).get("display_id"):
            self.displays[display_id].append(self.cell["outputs"][-1])
            self.update(content)

    def stream(self, content):
        """A text: part of the last output, if that is the same stream."""
        name, outputs = content.get("name", "stdout"), self.cell["outputs"]
        if self.clears_next or not outputs or outputs[-1].get("name") != name:
            self.add({"output_type": "stream", "name": name, "text": []})
        outputs[-1]["text"].append(content.get("text", ""))

    def update(self, content):
        for output in self.displays[(content.get("transient") or {}).get("display_id")]:
            output.update(data=content.get("data", {}), metadata=content.get("metadata", {}))

    def clear(self, content):
        self.clears_next = bool(content.get("wait"))
        if not self.clears_next:
            self.cell["outputs"].clear()


SHOWN = {   # msg_type, which is an output's type -> what the output has of the message, its default
    "display_data": {"data": {}, "metadata": {}},
    "execute_result": {"data": {}, "metadata": {}, "execution_count": None},
    "error": {"ename": "", "evalue": "", "traceback": []}}
CHANGES = {   # msg_type -> what else it does to a cell's outputs; others (comms …) do nothing
    "stream": RunningCell.stream, "update_display_data": RunningCell.update,
    "clear_output": RunningCell.clear}


class Result:
    """Where a run's notebook goes: a file, or stdout, where it comes once, at the end."""

    def __init__(self, source, path, is_known, say):
        """`source`: the document that runs, whose form is kept. `path`: "-" for stdout. `is_known`:
        is it the file of the source? `say`: function of a sentence."""
        self.document, self.path, self.say = source, path, say
        # The bytes that the file has, unless somebody else has written it (R2); None: do not look.
        self.known = source.data if is_known else None
        self.due = math.inf        # when it may be saved next
        self.complaint = None      # the latest

    def save(self, notebook, must_write=False):
        """Write the file, if there is one and it changes. Raises OSError, NotANotebook."""
        began = time.monotonic()
        self.document = write_notebook(notebook, self.document)
        data = self.document.data
        if self.path != "-" and (must_write or data != self.known):
            try:
                write_atomically(self.path, data, self.look)
            except FileExistsError:
                self.step_aside()
                write_atomically(self.path, data, refuse_existing)
            self.known = data
        now = time.monotonic()
        if self.path != "-":
            self.due = now + max(SAVE_SECONDS, SAVE_SHARE * (now - began))

    def save_meanwhile(self, notebook):
        """The same while cells run (R1). A disk that is full now may have room at the end."""
        try:
            self.save(notebook)
        except (OSError, NotANotebook) as problem:
            self.due = time.monotonic() + SAVE_SECONDS
            if str(problem) != self.complaint:
                self.complaint = str(problem)
                self.say(f"{self.path} cannot be written: {problem}")

    def look(self, target):
        """Right before the file is replaced: FileExistsError when it is not as we left it."""
        if self.known is not None and read_bytes(target) != self.known:
            raise FileExistsError

    def step_aside(self):
        """Go on with another file: the first name beside the old one that is free."""
        stem, extension = os.path.splitext(self.path)
        names = (f"{stem}-run{number or ''}{extension}" for number in itertools.count())
        name = next(name for name in names if not os.path.lexists(name))
        self.say(f"Somebody else has changed {self.path}: it stays as it is, and the result goes "
                 f"to {name}.")
        self.path = name

    def save_at_last(self, notebook):
        """The same after the run. Returns whether it worked: if not, it is in another file."""
        try:
            self.save(notebook)
            return True
        except OSError as problem:
            self.say(f"{self.path} cannot be written: {reason_of(problem)}.")
            descriptor, self.path = tempfile.mkstemp(".ipynb")
            write_all(descriptor, self.document.data)
            os.close(descriptor)
            return False

    def give(self, has_page):
        """The end: what goes to stdout goes now, and a page is written beside a file. Returns a
        word on where it is."""
        if self.path == "-":
            write_all(sys.stdout.fileno(), self.document.data)
            return "went to stdout"
        if not has_page:
            return f"are in {self.path}"
        page = os.path.splitext(self.path)[0] + ".html"
        folder, name = os.path.split(os.path.abspath(self.path))
        write_atomically(page, export_html(self.document.served, name, Contents(folder)))
        return f"are in {self.path} and {page}"


def reason_of(problem):
    """What the disk, or a notebook that cannot be written, says in words."""
    return getattr(problem, "strerror", None) or problem


def read_bytes(path):
    """The bytes of a file, None when it is not there."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


class Progress:
    """What is seen of a run, on stderr: a bar on a terminal, elsewhere a line for each cell."""

    def __init__(self, total, kernel_name):
        self.total, self.number, self.code = total, 0, f"starting {kernel_name}"
        self.began = self.cell_began = time.monotonic()
        self.is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.drawn = ""   # the line of the bar
        self.full, self.empty = "█░" if self.writable("█░") == "█░" else "#-"

    def begin(self, cell):
        code = next(line for line in cell["source"].split("\n") if line.strip()).strip()
        self.code, self.number = self.writable(code), self.number + 1
        self.cell_began = time.monotonic()
        self.draw()

    def writable(self, text):
        """The text with ? for what stderr has no letters for."""
        encoding = sys.stderr.encoding or "ascii"
        return text.encode(encoding, "replace").decode(encoding)

    def draw(self):
        """On a terminal: a bar, number, time, and the first line of the code. At the right there is
        room for the ^C that a terminal shows."""
        done = BAR * max(self.number - 1, 0) // max(self.total, 1)
        line = (f"{self.full * done}{self.empty * (BAR - done)} {self.number}/{self.total}  "
                f"{clock(self.seconds)}  {self.code}")
        if self.is_terminal and line != self.drawn:
            self.drawn = line
            self.write(f"\r{fitted(line, shutil.get_terminal_size().columns - 4)}")

    def clear(self):
        if self.drawn:
            self.drawn = ""
            self.write(f"\r{' ' * (shutil.get_terminal_size().columns - 1)}\r")

    def write(self, text):
        with contextlib.suppress(OSError):   # nobody looks any more
            sys.stderr.write(text)
            sys.stderr.flush()

    def end(self, error):
        """A cell has ended: elsewhere than on a terminal that is a line."""
        if not self.is_terminal:
            number = f"[{self.number:{len(str(self.total))}}/{self.total}]"
            words = [fitted(self.code, LINE).rstrip(), *(error or "").split("\n")[:1]]
            log(f"{number} {time.monotonic() - self.cell_began:.1f} s  {'  '.join(words).rstrip()}",
                "error")

    @property
    def seconds(self):
        return time.monotonic() - self.began

    def say(self, sentence):
        self.clear()
        log(sentence, "error")


def clock(seconds):
    """A time as 0:07, or 1:02:03."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def fitted(text, width):
    """A line of so many columns: cut, or filled up. East Asian letters have two of them."""
    import unicodedata
    shown, left = [], width
    for each in text:
        columns = 2 if unicodedata.east_asian_width(each) in "WF" else 1
        if left < columns:
            break
        left -= columns
        shown.append(each if each.isprintable() else "?")
    return "".join(shown) + " " * left


class NotebookRun:
    """A notebook that runs: its cells, its kernel, the page that `run` is, and the result."""

    def __init__(self, notebook, kernel, options):
        self.notebook = {**notebook, "cells": [{**cell} for cell in notebook["cells"]]}
        self.kernel, self.timeout, self.allows_errors = (
            kernel, options.timeout or math.inf, options.allow_errors)
        self.todo = [cell for cell in self.notebook["cells"] if is_to_run(cell)]
        self.progress = Progress(len(self.todo), kernel.name)
        self.result = None
        self.box, self.poller = OnlyPage(), zmq.Poller()
        self.poller.register(self.box.fileno(), zmq.POLLIN)
        self.running = {}        # msg_id -> RunningCell, of all: a thread may print later
        self.displays = collections.defaultdict(list)   # display_id -> outputs
        self.info = None         # kernel_info_reply
        self.death = None        # why the kernel's process has ended
        self.signals = []        # numbers of those that have come: SIGINT, SIGTERM
        self.has_news = False    # since the last save
        self.failures = 0
        kernel.on_end.append(self.end_of_kernel)
        kernel.join(self.box)

    def end_of_kernel(self):
        self.kernel.is_gone = True   # a new process would not have the variables

    def run(self):
        """Run the cells, end the kernel; returns why it ended early, or None. Raises Problem when
        the kernel cannot be started."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: self.signals.append(number))
        try:
            self.kernel.start()
            return self.run_all()
        finally:
            self.kernel.shutdown()
            self.take()   # its last words, of threads, too
            self.progress.clear()

    def run_all(self):
        """Run the cells in turn; returns as `run`."""
        self.ask("kernel_info_request", {})
        if not self.until(lambda: self.info, START_SECONDS):
            return self.death or ("Interrupted." if self.signals else
                                  f"The kernel {self.kernel.name} does not answer.")
        if isinstance(self.info.get("language_info"), dict):
            self.notebook["metadata"] = {**self.notebook["metadata"],
                                         "language_info": self.info["language_info"]}
        for cell in self.todo:
            self.progress.begin(cell)
            running = self.begin(cell)
            if trouble := self.run_cell(running):
                return trouble
            self.failures += bool(running.error)
            if running.error and not self.allows_errors and not has_tag(cell, "raises-exception"):
                return running.last_words() or running.error
        return None

    def run_cell(self, running):
        """Wait for the end of a cell; returns a sentence when the run ends with it, too (R3)."""
        self.until(lambda: running.is_over or running.question, self.timeout)
        ename, sentence = self.trouble(running)
        if ename and not self.death:
            self.interrupt(running)
        if ename and ename not in [output.get("ename") for output in running.cell["outputs"]]:
            running.show("error", {"ename": ename, "evalue": sentence, "traceback": [sentence]})
        self.progress.end(ename or running.error)
        return sentence

    def trouble(self, running):
        """(ename, sentence) of what ends the run with this cell; (None, None) when it goes on."""
        if running.is_over:
            return None, "Interrupted." if self.signals else None
        if self.death:
            return "DeadKernelError", self.death
        if self.signals:
            return "KeyboardInterrupt", "Interrupted."
        if running.question:
            return "StdinNotImplementedError", running.question
        return "CellTimeoutError", f"The cell took longer than {self.timeout:g} s (--timeout)."

    def interrupt(self, running):
        """Interrupt a cell. If that does not help, the end of the run ends the process."""
        running.is_stopped = True
        self.kernel.interrupt()
        self.until(lambda: running.is_over, INTERRUPT_SECONDS, len(self.signals))

    def begin(self, cell):
        """Send a cell; returns it as a RunningCell."""
        running = RunningCell(cell, self.displays)
        msg_id = self.ask("execute_request", {
            "code": cell["source"], "silent": False, "store_history": True, "user_expressions": {},
            "allow_stdin": False, "stop_on_error": True})
        self.running[msg_id] = running
        return running

    def ask(self, msg_type, content):
        """Send a request on shell, as a page does; returns its msg_id."""
        parts = self.kernel.session.pack(self.kernel.session.message(msg_type, content))
        entry = Entry("shell", parts[2:6])
        entry.client = self.box.session_id
        self.kernel.send(Request("shell", parts, entry, life=self.box.life))
        return entry.header["msg_id"]

    def until(self, is_true, seconds, most_signals=0):
        """Hear, save and draw until `is_true()`; or until so many seconds are over, more signals
        than that have come, or the kernel has ended. Returns `is_true()`."""
        deadline = time.monotonic() + seconds
        while (not is_true() and not self.death and time.monotonic() < deadline
               and len(self.signals) <= most_signals):
            self.poller.poll(1000 * min(TICK_SECONDS, max(0, deadline - time.monotonic())))
            self.take()
            if self.has_news and time.monotonic() > self.result.due:
                self.has_news = False
                self.result.save_meanwhile(self.saved())
            self.progress.draw()
        return is_true()

    def take(self):
        """Take what the kernel has said, and file it."""
        was_full = self.box.size > MOST_WAITING
        for entry in self.box.take():
            if entry.life:
                self.death = self.kernel.reason or "The kernel has ended."
            elif entry.parent_id in self.running:
                self.file(entry)
            elif entry.msg_type == "kernel_info_reply":
                self.info = entry.content
        if was_full:
            self.kernel.requests.put()   # the watcher waits for room (P4)

    def file(self, entry):
        """File what came of a cell. Kernels make mistakes; the rest of what they say counts."""
        self.has_news = True
        try:
            self.running[entry.parent_id].hear(entry)
        except (TypeError, AttributeError) as problem:
            self.progress.say(f"{entry.msg_type} from the kernel is not as it must be: {problem}")

    def saved(self):
        """The notebook as it is to be saved."""
        return {**self.notebook, "cells": [map_strings(cell, join)
                                           for cell in self.notebook["cells"]]}


def is_to_run(cell):
    source = cell["source"]
    return (cell["cell_type"] == "code" and isinstance(source, str) and bool(source.strip())
            and not has_tag(cell, "skip-execution"))


def shielded(words):
    """The words of a command line; what follows -p is marked, for it may begin with a dash."""
    rest, shown = iter(words), []
    for word in rest:
        shown.append(word)
        if word in ("-p", "--parameters"):
            shown += [f"={value}" for value in itertools.islice(rest, 2)]
    return shown


def run_options(words):
    """What the words after `run` say. Exits with USAGE and a sentence when they say nothing."""
    parser = argparse.ArgumentParser(
        prog="minijupyter.py run", description="Run all cells of a notebook, in its folder, and "
        "save what comes of them.", epilog="Exit code: 0 when all cells have run, 1 when one has "
        "failed, took too long, or its kernel has died, 2 when nothing could be run, 130 after "
        "Ctrl-C. What there is by then is saved. Cells tagged raises-exception may fail, those "
        "tagged skip-execution are left out.")
    add = parser.add_argument
    add("notebook", metavar="NOTEBOOK", help="a file; -: stdin")
    add("-o", "--output", metavar="OUT", help="the file of the result (default: NOTEBOOK itself, "
        "in which nothing but outputs changes; of stdin, stdout); -: stdout")
    add("--html", action="store_true", help="write a page beside the result, too")
    add("--kernel", metavar="NAME", help="the kernel that runs it (default: the notebook's)")
    add("--timeout", metavar="SECONDS", type=float, help="that a cell may take; then it is "
        "interrupted, and the run ends (default: as long as it likes)")
    add("--allow-errors", action="store_true", help="go on after a cell that fails; exit code 0")
    add("-p", "--parameters", metavar=("NAME", "VALUE"), nargs=2, action="append", default=[],
        help="assign a value in a cell after the one that is tagged parameters; can be repeated. "
        "What looks like None, True, False or a number is one")
    options = parser.parse_args(shielded(words))
    options.output = options.output or options.notebook
    options.parameters = {name[1:]: parameter_value(value[1:])
                          for name, value in options.parameters}
    if options.timeout is not None and not options.timeout > 0:
        parser.error("--timeout needs a number of seconds above 0")
    if options.output == "-" and options.html:
        parser.error("--html writes a page beside a file: name one with -o")
    for name in options.parameters:
        if not is_variable(name):
            parser.error(f"{name!r} cannot be the name of a parameter")
    return options


def read_document(path):
    """The document of a notebook file, "-" for stdin. Exits with USAGE when it is none."""
    try:
        if path == "-":
            return DOCUMENTS[-1](sys.stdin.buffer.read())
        with open(path, "rb") as file:
            return DOCUMENTS[-1](file.read())
    except NotANotebook as problem:
        refuse(f"{'stdin' if path == '-' else path} is no notebook that can be run: {problem}.")
    except OSError as problem:
        refuse(f"{path} cannot be read: {reason_of(problem)}.")


def refuse_foreign(path):
    """Exit with USAGE when the file that a result would replace is no notebook."""
    try:
        DOCUMENTS[-1](read_bytes(path) or b"")
    except NotANotebook:
        refuse(f"{path} is there, and is no notebook: it is not replaced.")
    except OSError as problem:
        refuse(f"{path} cannot be written: {reason_of(problem)}.")


def kernel_for(notebook, wish, path):
    """The KernelProcess that shall run a notebook; it is not started. Exits with USAGE when there
    is none."""
    spec = notebook["metadata"].get("kernelspec")
    name = wish or (spec.get("name") if isinstance(spec, dict) else None) or DEFAULT_KERNEL
    absolute = os.path.abspath("notebook" if path == "-" else path)
    try:
        return KernelProcess(name, *find_spec(str(name)), cwd=os.path.dirname(absolute),
                             session_name=absolute)
    except Problem as problem:
        refuse(f"{problem.message}. Choose one with --kernel NAME.")
    except OSError as problem:
        refuse(f"No kernel can be started: {reason_of(problem)}.")


def parameterized(notebook, parameters, kernel):
    """The notebook with a cell that assigns the parameters, if there are any. Exits with USAGE when
    the kernel's language has no way to write them."""
    try:
        return {**notebook, "cells": with_parameters(
            notebook["cells"], parameters, kernel.spec["language"])} if parameters else notebook
    except ValueError as problem:
        refuse(f"{problem}.")


def run_notebook(words):
    """`run NOTEBOOK [options]`: run all cells of a notebook and save what comes of them."""
    options = run_options(words)
    document = read_document(options.notebook)
    if options.output not in ("-", options.notebook):
        refuse_foreign(options.output)
    kernel = kernel_for(document.served, options.kernel, options.notebook)
    notebook = parameterized(document.served, options.parameters, kernel)
    log.level = "error"   # what kernels say beside their cells is in the way; a crash shows it
    run = NotebookRun(notebook, kernel, options)
    run.result = Result(document, options.output, options.output == options.notebook,
                        run.progress.say)
    try:
        run.result.save(run.saved(), must_write=True)   # what cannot be written is told at once
    except (OSError, NotANotebook) as problem:
        refuse(f"{options.output} cannot be written: {reason_of(problem)}.")
    try:
        trouble = run.run()
    except Problem as problem:
        refuse(problem.message)
    sys.exit(end_of_run(run, trouble, options.html))


def end_of_run(run, trouble, has_page):
    """Save and tell; returns the exit code."""
    count, number, say = len(run.todo), run.progress.number, run.progress.say
    if trouble:
        say(trouble)
    try:
        is_saved, where = run.result.save_at_last(run.saved()), run.result.give(has_page)
    except (OSError, NotANotebook) as problem:
        is_saved, where = False, f"cannot be written: {reason_of(problem)}"
    if trouble:
        at = f"at cell {number} of {count}" if number else "before its first cell"
        say(f"The run ended {at}; the outputs until then {where}.")
    else:
        failed = f", {run.failures} of them failed" if run.failures else ""
        say(f"{count} cell{'s' * (count != 1)} in {run.progress.seconds:.1f} s{failed}; "
            f"the outputs {where}.")
    if run.signals:
        return SIGNALLED + run.signals[0]
    return FAILED if trouble or not is_saved else 0


COMMANDS["run"] = run_notebook


# ---- 53. Clusters: ipyparallel's ---------------------------------------------------------------
#
# A cluster of ipyparallel is a controller and sets of engines, processes that work for notebooks.
# ipyparallel's own Cluster and launchers start and stop them, here or on other machines. This
# section gives them the addresses of ipyparallel's server extension, with its models, so that its
# JupyterLab extension works here, too. `?details=1` adds what the page's tab shows.
#
#     page, lab -- REST --> Clusters -- Driver -- JSON lines --> drive_clusters (one per Python)
#                                                                ipyparallel -> controller, engines
#
# The process that runs `drive_clusters` is the *driver*. It runs the Python of a kernel spec, so
# that the engines have the packages of the notebook's kernel; this server itself imports nothing of
# ipyparallel. When the server is gone, the driver reads the end of its standard input.
#
#     state of an engine   what is true                           what leads on
#     starting             its process runs                       the hub knows it -> running
#     running              the hub has given it a number          its process ends -> dead
#     dead                 it has ended, and nobody asked for it  restart -> a new one, starting
#
# C1 Every cluster of this user is found, wherever it was started: each leaves a file in a profile.
# C2 A cluster that this server has started ends with it, also when it is killed; or, with
#    --keep-clusters, never.
# C3 Who waits for a task of a cluster that is stopped is told. ipyparallel alone would let them
#    wait for ever. So the tasks that wait are aborted and those that run interrupted, then the
#    engines end, and the controller, which tells of both, ends last.

CLUSTER_WISHES = ("list", "create", "read", "start", "stop", "scale", "restart", "logs", "choices")
CLUSTER_SECONDS = {"list": 10, "read": 10, "choices": 10}   # that an answer may take …
MOST_CLUSTER_SECONDS = 180     # … and others: a job that starts may have to queue
DISMISS_SECONDS = 4            # that tasks get to answer before their engines end
MOST_ABORTED = 2_000           # ids on an engine's command line, where an argument has 128 kB
STRANDED_SECONDS = 6           # a scheduler says after 5 s that a task ended with its engine
CLUSTERS_END_SECONDS = 30      # that a driver gets to end its clusters
LOG_BYTES = 64_000             # of the end of a log
HUB_SECONDS = 2                # between two questions of how many tasks there are: each is logged
NO_IPYPARALLEL = "no ipyparallel"   # the reason of a Problem
CLUSTER_PATH = r"/ipyparallel/clusters/(.+)"
OPTIONS.append((["--keep-clusters"], {
    "action": "store_true", "help": "leave ipyparallel's clusters running when the server ends"}))


def python_of(spec):
    """The words of a kernel spec that start its Python: those of `conda run -n lab python -s`, say.
    Problem 400 when there is no Python among them."""
    argv = fill_in(spec["argv"], {"prefix": sys.prefix})
    for at, word in enumerate(argv):
        if re.fullmatch(r"(python|pypy)[\d.]*(\.exe)?", os.path.basename(word).lower()):
            flags = itertools.takewhile(re.compile("-[EIPsS]+").fullmatch, argv[at + 1:])
            return [*argv[:at + 1], *flags]   # those that say where it looks for packages
    raise Problem(400, f"The kernel {spec['display_name']} has no Python that could run engines")


class Driver:
    """The process that has ipyparallel's Cluster objects for one Python. Any thread may ask it."""

    def __init__(self, spec, folder, keeps):
        """Start it; Problem 500 when the kernel's Python is not there."""
        self.spec, self.python = spec, python_of(spec)
        self.lock, self.numbers = threading.Lock(), itertools.count(1)
        self.waiting = {0: threading.Event()}   # number of a wish -> its answer is there
        self.answers = {}                       # number of a wish -> its answer; 0: it is ready
        self.tail = ""                          # of what the process says on stderr
        start = (f"import sys; sys.path[0] = {HERE!r}; import minijupyter; "
                 f"minijupyter.drive_clusters({keeps})")
        try:
            self.process = subprocess.Popen(
                [*self.python, "-c", start], cwd=folder, env=kernel_environment(spec),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True)   # Ctrl-C is the server's
        except OSError as problem:
            raise Problem(500, f"The Python of {spec['display_name']} does not start: "
                               f"{problem.strerror}") from None
        for follow in (self.listen, self.overhear):
            threading.Thread(target=follow, daemon=True).start()

    @property
    def is_alive(self):
        return self.process.poll() is None

    def listen(self):
        """File the answers as they come, until the process ends."""
        for line in self.process.stdout:
            answer = json.loads(line)
            if event := self.waiting.get(answer["number"]):   # else it was too late
                self.answers[answer["number"]] = answer
                event.set()
        self.process.wait()
        for event in list(self.waiting.values()):
            event.set()

    def overhear(self):
        for line in self.process.stderr:
            self.tail = (self.tail + line.decode("utf-8", "replace"))[-TAIL:]

    def ask(self, do, **wish):
        """What the process answers to a wish. Raises the Problem that it answers with, 501 when
        ipyparallel is not there, 504 when it takes too long."""
        self.take(0, MOST_CLUSTER_SECONDS)
        number, event = next(self.numbers), threading.Event()
        self.waiting[number] = event
        line = json.dumps({"number": number, "do": do, "wish": wish})
        try:
            with self.lock:
                self.process.stdin.write(line.encode() + b"\n")
                self.process.stdin.flush()
        except (OSError, ValueError):   # it has ended, or the server ends
            event.set()
        try:
            return self.take(number, CLUSTER_SECONDS.get(do, MOST_CLUSTER_SECONDS))
        finally:
            del self.waiting[number]
            self.answers.pop(number, None)

    def take(self, number, seconds):
        """An answer, as soon as it is there."""
        if not self.waiting[number].wait(seconds) and self.is_alive:
            raise Problem(504, "ipyparallel is still busy with another wish. Look again in a while")
        answer = self.answers.get(number)
        if answer is None:
            words = self.tail.strip().rpartition("\n")[2]
            raise Problem(500, f"The process that drives ipyparallel has ended. {words}")
        if "problem" not in answer:
            return answer["value"]
        problem = Problem(answer["status"], answer["problem"], answer["reason"])
        problem.more = answer["more"]
        if problem.reason == NO_IPYPARALLEL:
            problem.message = (
                f"ipyparallel is not installed for the kernel {self.spec['display_name']}. In a "
                "notebook with that kernel, run  %pip install ipyparallel  or in a terminal  "
                f"{answer['more']['command']}")
        raise problem

    def close(self):
        """Let it end: it ends its clusters, or leaves them."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()


class Clusters:
    """The drivers of all Pythons that were asked for, and whose each cluster is."""

    def __init__(self, server):
        self.server, self.keeps, self.lock = server, False, threading.Lock()
        self.drivers = {}   # words that start a Python, and its environment -> Driver
        self.owners = {}    # key of a cluster that was made here -> (Driver, name of its kernel)
        self.finders = {}   # key of any cluster -> Driver that has told of it

    def driver(self, kernel_name=None):
        """The living Driver of a kernel's Python, as a rule of our own kernel's."""
        spec, _ = find_spec(kernel_name or DEFAULT_KERNEL)
        place = (*python_of(spec), *sorted(spec["env"].items()))
        with self.lock:
            if not self.drivers:
                atexit.register(self.close)
            driver = self.drivers.get(place)
            if not driver or not driver.is_alive:
                driver = Driver(spec, self.server.contents.root, self.keeps)
                self.drivers[place] = driver
            return driver

    def list(self, **wish):
        """The models of all clusters, in ipyparallel's order. A driver sees the clusters of another
        one by their files: whoever has made one knows more of it."""
        first = self.driver(wish.pop("kernel_name", None))
        answers, models = [(first, first.ask("list", **wish))], {}
        for driver in list(self.drivers.values()):
            if driver is not first and driver.is_alive:
                with contextlib.suppress(Problem):   # trouble of a Python that nobody asked for
                    answers.append((driver, driver.ask("list", **wish)))
        for driver, found in answers:
            for model in found:
                owner, _ = self.owners.get(model["id"], (None, None))
                if owner is driver or model["id"] not in models:
                    models[model["id"]] = self.with_origin(model)
                    self.finders[model["id"]] = driver
        return sorted(models.values(), key=cluster_order)

    def ask(self, do, key, **wish):
        """What becomes of a wish for the cluster of this key."""
        owner, _ = self.owners.get(key, (self.finders.get(key), None))
        driver = owner if owner and owner.is_alive else self.driver()
        return self.with_origin(driver.ask(do, key=key, **wish))

    def create(self, wish):
        name = wish.pop("kernel_name", None) or DEFAULT_KERNEL
        if not isinstance(name, str):
            raise Problem(400, "kernel_name must be the name of a kernel spec")
        driver = self.driver(name)
        model = driver.ask("create", wish=wish)
        self.owners[model["id"]] = driver, name
        return model

    def with_origin(self, model):
        """The model; its details say, in words, who started the cluster, and for which kernel."""
        if details := isinstance(model, dict) and model.get("details"):
            details["kernel_name"] = self.owners.get(model["id"], (None, None))[1]
            details["origin"] = "this server" if details["is_ours"] else self.origin(
                details.pop("parent", None))
        return model

    def origin(self, parent):
        """Who has started a process: a notebook, a program, or one that has ended since."""
        if not parent:
            return ""
        for session in self.server.sessions.list():
            kernel = self.server.kernels.all.get(session["kernel"]["id"])
            if kernel and kernel.process and kernel.process.pid == parent["pid"]:
                return f"the notebook {session['path']}"
        name = "ipcluster" if "ipcluster" in parent["command"] else "process"
        return f"{name} {parent['pid']}: {parent['command']}"

    def close(self):
        """The server ends: so do the clusters that it has started, unless they are kept (C2)."""
        drivers = [driver for driver in self.drivers.values() if driver.is_alive]
        if self.owners and drivers:
            print("Left running: " + ", ".join(self.owners) + ". `ipcluster list` shows them."
                  if self.keeps else "Stopping the clusters …", flush=True)
        for driver in drivers:
            driver.close()
        deadline = time.monotonic() + CLUSTERS_END_SECONDS
        for driver in drivers:
            try:
                driver.process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                driver.process.kill()


def cluster_order(model):
    """ipyparallel's: those that run, the default profile, the default id."""
    cluster = model["cluster"]
    return (not model.get("controller"), cluster["profile"] != "default",
            cluster["cluster_id"] != "", cluster["profile"], cluster["cluster_id"])


# -- The endpoints --

def list_clusters(handler):
    return handler.server.clusters.list(details=handler.asked("details"),
                                        kernel_name=handler.asked("kernel_name"))


def create_cluster(handler):
    return handler.server.clusters.create(handler.json_body())


def get_cluster(handler, key):
    return handler.server.clusters.ask("read", key, details=handler.asked("details"))


def start_cluster(handler, key):
    return handler.server.clusters.ask("start", key, n=handler.json_body().get("n"))


def scale_cluster(handler, key):
    return handler.server.clusters.ask("scale", key, n=handler.json_body().get("n"))


def stop_cluster(handler, key):
    handler.server.clusters.ask("stop", key)
    handler.server.clusters.owners.pop(key, None)
    return 204, None


def restart_engines(handler, key):
    """Engines anew: the one that the body names by `set` and `engine`, or all that are dead."""
    body = handler.json_body()
    return handler.server.clusters.ask(
        "restart", key, set=body.get("set"), engine=body.get("engine"))


def cluster_logs(handler, key):
    return handler.server.clusters.ask("logs", key)


def cluster_choices(handler):
    """What a new cluster can have: profiles, launchers, the number of cores."""
    return handler.server.clusters.driver(handler.asked("kernel_name")).ask("choices")


ROUTES += [("GET", r"/ipyparallel/clusters", list_clusters),
           ("POST", r"/ipyparallel/clusters", create_cluster),
           ("GET", CLUSTER_PATH, get_cluster),
           ("POST", CLUSTER_PATH, start_cluster),
           ("PATCH", CLUSTER_PATH, scale_cluster),
           ("DELETE", CLUSTER_PATH, stop_cluster),
           ("POST", CLUSTER_PATH + "/restart", restart_engines),
           ("GET", CLUSTER_PATH + "/logs", cluster_logs),
           ("GET", r"/ipyparallel/choices", cluster_choices)]


class ClusterServer(SERVERS[-1]):
    """Has the clusters."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.clusters = Clusters(self)


def keep_clusters(server, arguments):
    server.clusters.keeps = arguments.keep_clusters


SERVERS.append(ClusterServer)
AT_START.append(keep_clusters)


# -- The driver: all below runs in its process, in one asyncio loop --

def drive_clusters(keeps):
    """Obey the server's wishes, a JSON line each, until there are no more; then end."""
    import asyncio
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)   # what ipyparallel prints is no answer

    def answer(number, **what):
        channel.write(json.dumps({"number": number, **what}) + "\n")
        channel.flush()

    try:
        import ipyparallel.cluster  # noqa: F401
    except ImportError as problem:
        import importlib.util
        command = install_command(sys.executable, importlib.util.find_spec("pip"), "ipyparallel")
        answer(0, problem=str(problem), status=501, reason=NO_IPYPARALLEL,
               more={"command": command})
        return
    answer(0, value="ready")
    asyncio.run(Conductor(answer, keeps).run())


def in_thread(function, *arguments):
    """A future of what `function` returns. It may block for ever, as a client does whose hub has
    gone: nobody waits for the thread when the driver ends."""
    import asyncio
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def run():
        try:
            tell = functools.partial(future.set_result, function(*arguments))
        except Exception as problem:
            tell = functools.partial(future.set_exception, problem)
        with contextlib.suppress(RuntimeError):   # the loop has ended
            loop.call_soon_threadsafe(lambda: future.done() or tell())

    threading.Thread(target=run, daemon=True).start()
    return future


class Hub:
    """What a cluster's hub says to a client of ours: its engines' numbers, how many tasks wait."""

    def __init__(self, cluster):
        self.cluster, self.client, self.queues = cluster, None, {}
        self.look, self.next_look = None, 0   # the task that asks; when to ask again, monotonic

    async def connect(self):
        import ipyparallel
        if self.client is None:
            info = await self.cluster.controller.get_connection_info()
            self.client = await in_thread(
                lambda: ipyparallel.Client(info["client"], timeout=CLUSTER_SECONDS["read"]))
        return self.client

    async def ask(self):
        client = await self.connect()
        self.queues = await in_thread(client.queue_status)

    def refresh(self):
        """Ask again, without waiting for it: a list must not wait for a hub that hangs."""
        import asyncio
        if self.look and (not self.look.done() or time.monotonic() < self.next_look):
            return
        if self.look and self.look.exception():   # it was no hub any more, or not yet
            self.client = None
        self.next_look = time.monotonic() + HUB_SECONDS
        self.look = asyncio.ensure_future(self.ask())

    def close(self):
        if self.client is not None:
            in_thread(self.client.close)

    @property
    def tasks(self):
        """{"waiting", "running"}; of an engine's own queue all but the first one wait. The hub
        keeps on counting those of a dead engine."""
        counts = [self.load(number) for number in self.client.ids] if self.queues else []
        return {"waiting": self.queues.get("unassigned", 0) + sum(max(0, n - 1) for n in counts),
                "running": sum(map(bool, counts))}

    def load(self, number):
        """How many tasks an engine has."""
        queue = self.queues.get(number, {})
        return queue.get("queue", 0) + queue.get("tasks", 0)

    def dismiss(self):
        """Have every task answered (C3); blocks. A task is aborted when an engine takes it, so each
        engine must also drop what it works on. False when tasks are left: no engine is there, or
        it does not drop them, or they were those of a dead one, of which the scheduler tells."""
        deadline, told = time.monotonic() + DISMISS_SECONDS, set()
        while time.monotonic() < deadline:
            queues = self.client.queue_status(verbose=True)
            queued = {*queues.pop("unassigned")}
            tasks = {n: {*queue["queue"], *queue["tasks"]} for n, queue in queues.items()}
            alive = {*self.client.ids} & tasks.keys()
            waiting = queued.union(*(tasks[n] for n in alive))
            if not waiting or not alive:
                return not queued and not any(tasks.values())
            if fresh := waiting - told:
                self.client.abort([*fresh], block=False)
            if busy := [n for n in alive if tasks[n] - told]:
                self.client.send_signal("SIGINT", targets=busy, block=False)
            told |= waiting
            time.sleep(0.1)
        return False


class Conductor:
    """The driver's clusters, in ipyparallel's ClusterManager, and what the server wishes of them.

    A wish is a method called like it, of CLUSTER_WISHES. It returns JSON, or raises a Problem.
    """

    def __init__(self, answer, keeps):
        from ipyparallel.cluster import ClusterManager
        self.answer, self.keeps, self.manager = answer, keeps, ClusterManager()
        self.ours = {}       # key -> Cluster that was started here
        self.hubs = {}       # key -> Hub
        self.failures = {}   # key -> why it did not start: {"message", "log"}
        self.stamps = {}     # cluster file of others -> its st_mtime_ns when it was read
        self.numbers = {}    # (key, set, name) of an engine -> its number in the hub

    async def run(self):
        import asyncio
        loop, over, obeyed = asyncio.get_running_loop(), asyncio.Event(), set()

        def listen():
            for line in sys.stdin.buffer:
                loop.call_soon_threadsafe(begin, json.loads(line))
            loop.call_soon_threadsafe(over.set)

        def begin(wish):
            task = asyncio.ensure_future(self.obey(**wish))
            obeyed.add(task)   # the loop itself keeps no task alive
            task.add_done_callback(obeyed.discard)

        threading.Thread(target=listen, daemon=True).start()
        await over.wait()
        if not self.keeps:
            await asyncio.gather(*(self.end(key, cluster) for key, cluster in self.ours.items()),
                                 return_exceptions=True)   # one must not keep the others

    async def obey(self, number, do, wish):
        try:
            if do not in CLUSTER_WISHES:
                raise Problem(400, f"The driver knows no {do}")
            self.answer(number, value=await getattr(self, do)(**wish))
        except Problem as problem:
            self.answer(number, problem=problem.message, status=problem.status,
                        reason=problem.reason, more=problem.more)
        except Exception as problem:
            self.answer(number, problem=f"ipyparallel: {type(problem).__name__}: {problem}",
                        status=500, reason=None, more={})

    # -- what there is --

    async def list(self, details=None):
        self.read_files()
        return [self.model(key, cluster, details)
                for key, cluster in self.manager.clusters.items()]

    async def read(self, key, details=None):
        return self.model(key, self.find(key), details)

    async def choices(self):
        from ipyparallel.traitlets import entry_points
        from ipyparallel.util import _all_profile_dirs, abbreviate_profile_dir
        launchers = entry_points(group="ipyparallel.engine_launchers")
        profiles = {"default", *map(abbreviate_profile_dir, _all_profile_dirs())}
        return {"profiles": sorted(profiles), "n": os.cpu_count(),
                "engines": sorted(launcher.name for launcher in launchers)}

    async def logs(self, key):
        """[{"name", "file", "text"}] of the controller and of each engine, dead ones too."""
        return self.logs_of(self.find(key))

    def logs_of(self, cluster):
        found = [("controller", cluster.controller)] if cluster.controller else []
        logs = [self.log_of(name, launcher) for name, launcher in found]
        for each in cluster.engines.values():
            parts = getattr(each, "launchers", {})
            logs += [self.log_of(f"engine {n}", part) for n, part in parts.items()]
            logs += [{"name": f"engine {n}, dead", "file": "", "text": text[-LOG_BYTES:]}
                     for n, text in getattr(each, "outputs", {}).items() if n not in parts]
            if not hasattr(each, "launchers"):
                logs.append(self.log_of(f"{each.n} engines", each))
        return logs

    def log_of(self, name, launcher):
        """The end of a launcher's log; of one that has ended, ipyparallel has kept what it said."""
        file = getattr(launcher, "output_file", "")
        try:
            with open(file, "rb") as opened:
                opened.seek(max(0, os.path.getsize(file) - LOG_BYTES))
                text = opened.read().decode("utf-8", "replace")
        except OSError:
            text = launcher.get_output() if launcher.state == "after" else ""
        ours = r"(?m)^.* requested 'queue_request'\n"   # that we look is no news
        return {"name": name, "file": file, "text": re.sub(ours, "", text)[-LOG_BYTES:]}

    def find(self, key):
        if key not in self.manager.clusters:
            self.read_files()
        try:
            return self.manager.get_cluster(key)
        except KeyError:
            raise Problem(404, f"No such cluster: {key}") from None

    def hub(self, key, cluster):
        if key not in self.hubs or self.hubs[key].cluster is not cluster:
            self.hubs[key] = Hub(cluster)
        return self.hubs[key]

    def read_files(self):
        """Find the clusters of others, and forget those that have ended (C1)."""
        changed = {key: cluster for key, cluster in self.manager.clusters.items()
                   if key not in self.ours and self.has_changed(cluster)}
        for key in changed:
            self.manager.clusters.pop(key)
        self.manager.load_clusters(init_default_clusters=True)
        for key, old in changed.items():
            if new := self.manager.clusters.get(key):
                carry_over(old, new)
                self.hub(key, old).cluster = new
        self.ours = {key: cluster for key, cluster in self.ours.items()
                     if self.manager.clusters.get(key) is cluster}
        for key, hub in list(self.hubs.items()):
            if self.manager.clusters.get(key) is not hub.cluster or not runs(hub.cluster):
                self.hubs.pop(key).close()

    def has_changed(self, cluster):
        """True when whoever started a cluster has changed its file since it was read: ipyparallel
        itself reads a file once. The old object writes to that file no more."""
        info = stat_of(cluster.cluster_file)
        if not info or self.stamps.get(cluster.cluster_file) == info.st_mtime_ns:
            return False
        self.stamps[cluster.cluster_file] = info.st_mtime_ns
        with contextlib.suppress(OSError, ValueError), open(cluster.cluster_file) as file:
            if json.load(file) != cluster.to_dict():
                cluster.cluster_file = ""
                return True
        return False

    def model(self, key, cluster, details=None):
        """A cluster as ipyparallel's server extension tells of it (its cluster_model)."""
        from ipyparallel.util import abbreviate_profile_dir
        model = cluster.to_dict()
        model["cluster"]["profile"] = abbreviate_profile_dir(cluster.profile_dir)
        sets = model["engines"]["sets"].values()
        model["engines"]["n"] = sum(each.get("n", 0) for each in sets)
        model.update(id=key, cluster_file=cluster.cluster_file)
        return {**model, "details": self.details(key, cluster)} if details else model

    def details(self, key, cluster):
        hub = None
        if runs(cluster):
            hub = self.hub(key, cluster)
            hub.refresh()
        is_ours = key in self.ours
        return {"is_ours": is_ours, "parent": None if is_ours else parent_of(cluster.controller),
                "controller": cluster.controller.state if cluster.controller else "before",
                "engines": [self.engine(key, *each) for each in engines_of(cluster)],
                "registered": len(hub.client.ids) if hub and hub.client else 0,
                "tasks": hub.tasks if hub else None, "failure": self.failures.get(key)}

    def engine(self, key, set_id, name, launcher, ended):
        """An engine as the page shows it; `count` engines that one launcher has as one job."""
        number = self.number(key, set_id, name, launcher)
        is_job = launcher and name is None
        state = "dead" if ended is not None else "running" if is_job or (
            number is not None) else "starting"
        return {"set": set_id, "engine": name, "state": state, "number": number,
                "count": launcher.n if is_job else 1,
                "pid": getattr(launcher, "pid", None) if launcher else ended.get("pid"),
                "exit_code": int(code) if (code := (ended or {}).get("exit_code")) else code}

    def number(self, *place):
        """The number that the hub has given to an engine, which its log tells. It has it for good,
        also when it is dead."""
        *place, launcher = place
        if launcher and tuple(place) not in self.numbers:
            found = re.search(r"Completed registration with id (\d+)",
                              self.log_of("", launcher)["text"])
            if found:
                self.numbers[tuple(place)] = int(found[1])
        return self.numbers.get(tuple(place))

    # -- what becomes of it --

    async def create(self, wish):
        """Define a cluster by values of Cluster's traits, as ipyparallel's extension does."""
        wish = {name: value for name, value in wish.items() if value is not None and value != ""}
        if os.sep in str(wish.get("profile", "")):
            wish["profile_dir"] = wish.pop("profile")
        if "profile" in wish and "cluster_id" not in wish and (
                f"{wish['profile']}:" not in self.manager.clusters):
            wish["cluster_id"] = ""
        try:
            key, cluster = self.manager.new_cluster(**wish)
        except KeyError:
            raise Problem(409, f"There is a cluster {wish.get('cluster_id')!r} already") from None
        except Exception as problem:   # a trait's value that ipyparallel does not take
            raise Problem(400, f"ipyparallel cannot make such a cluster: {problem}") from None
        return self.model(key, cluster)

    async def start(self, key, n=None):
        cluster = self.find(key)
        if n is not None:
            check_count(n)
        self.failures.pop(key, None)
        cluster.shutdown_atexit = not self.keeps
        self.ours[key] = cluster
        try:
            await cluster.start_cluster(n=n)
        except Exception as problem:
            log = "\n".join(each["text"] for each in self.logs_of(cluster)).strip()
            await cluster.stop_cluster()
            self.manager.clusters[key] = self.ours.pop(key, cluster)   # it can be tried again
            why = log.rpartition("\n")[2] or str(problem)
            self.failures[key] = {"message": why, "log": log}
            refusal = Problem(500, f"The cluster {key} did not start: {why}")
            refusal.more = {"log": log}
            raise refusal from None
        return self.model(key, cluster)

    async def stop(self, key):
        await self.end(key, self.find(key))
        self.failures.pop(key, None)
        self.manager.clusters.pop(key, None)
        self.ours.pop(key, None)

    async def end(self, key, cluster):
        """End a cluster in the order in which everybody who waits is told (C3)."""
        import asyncio
        hub = self.hub(key, cluster)
        if runs(cluster):
            await as_long_as_it_runs(cluster, asyncio.ensure_future(hub.connect()))
        is_there = hub.client is not None   # it is false when it has no engines
        are_told = not is_there or await as_long_as_it_runs(cluster, in_thread(hub.dismiss))
        await cluster.stop_engines()
        await until(lambda: not (runs(cluster) and is_there and hub.client.ids), 1)
        if not are_told and runs(cluster):
            await self.answer_for(cluster, hub)
        await cluster.stop_controller()
        self.hubs.pop(key, None)
        hub.close()

    async def answer_for(self, cluster, hub):
        """No engine is left that could answer the tasks that wait: start one that aborts them all.
        Meanwhile the scheduler tells of those that ended with their engines."""
        import asyncio
        told_at = time.monotonic() + STRANDED_SECONDS
        queues = await as_long_as_it_runs(
            cluster, in_thread(functools.partial(hub.client.queue_status, verbose=True)))
        if waiting := (queues or {}).get("unassigned"):
            abort = f"get_ipython().kernel.aborted.update({waiting[:MOST_ABORTED]})"
            await cluster.start_engines(1, engine_args=["-c", abort])
            await until(lambda: hub.client.ids or not runs(cluster), MOST_CLUSTER_SECONDS / 10)
            await as_long_as_it_runs(cluster, in_thread(hub.dismiss))
        await cluster.stop_engines()
        await asyncio.sleep(max(0, told_at - time.monotonic()))

    async def scale(self, key, n=None):
        cluster = self.find(key)
        check_count(n)
        if not runs(cluster):
            raise Problem(409, f"The cluster {key} does not run: start it first")
        now = sum(count(each) for each in cluster.engines.values())
        if n > now:
            await cluster.start_engines(n - now)
        elif n < now:
            await self.let_go(key, cluster, now - n)
        forget_dead(cluster)
        return self.model(key, cluster)

    async def let_go(self, key, cluster, spare):
        """End so many engines, those first that have nothing to do, and of them the newest."""
        hub = self.hub(key, cluster)
        numbers = {(set_id, name): self.number(key, set_id, name, part)
                   for set_id, name, part, ended in engines_of(cluster) if name and part}
        numbers = {each: math.inf if n is None else n for each, n in numbers.items()}
        single = sorted(numbers, key=lambda each: (hub.load(numbers[each]), -numbers[each]))
        jobs = {set_id: each.n for set_id, each in cluster.engines.items()
                if not hasattr(each, "launchers")}
        leaving = []
        for set_id, size in sorted(jobs.items(), key=lambda job: -job[1]):
            if size <= spare:
                leaving.append(set_id)
                spare -= size
        if spare > len(single):
            sizes = ", ".join(str(size) for size in jobs.values())
            raise Problem(409, f"These engines are jobs that end as a whole, of {sizes} engines: "
                               "choose a number that leaves whole jobs")
        for set_id in leaving:
            await cluster.stop_engines(set_id)
        for set_id, name in single[:spare]:
            await stop_engine(cluster, set_id, name)

    async def restart(self, key, set=None, engine=None):
        """Start anew one engine, a job as a whole, or all engines that are dead."""
        cluster = self.find(key)
        each = cluster.engines.get(str(set))
        if set is not None and each is None:
            raise Problem(404, f"The cluster {key} has no set of engines {set}")
        if each is not None and not hasattr(each, "launchers"):
            await cluster.restart_engines(set)   # a job, as a whole
            return self.model(key, cluster)
        if engine is None:
            lost = forget_dead(cluster)
        elif each and str(engine) in {**each.launchers, **dead_of(each)}:
            await stop_engine(cluster, set, engine)
            lost = 1
        else:
            raise Problem(404, f"The set {set} has no engine {engine}")
        if lost:
            await cluster.start_engines(lost)
        return self.model(key, cluster)


def runs(cluster):
    """Its controller runs, and can be asked."""
    return bool(cluster.controller) and cluster.controller.state == "running"


async def until(condition, seconds):
    """Wait for what other parts of the loop, or other threads, bring about; or for so long."""
    import asyncio
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(0.02)


async def as_long_as_it_runs(cluster, future):
    """What becomes of a future that needs a cluster's hub; None when the hub goes, or hangs."""
    await until(lambda: future.done() or not runs(cluster), 2 * DISMISS_SECONDS)
    return future.result() if future.done() and not future.exception() else None


def check_count(n):
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise Problem(400, f"n must be an integer, not {n!r}")


def parent_of(controller):
    """{"pid", "command"} of the process that has started a controller on this machine."""
    import psutil
    try:
        parent = psutil.Process(controller.process.pid).parent()
        return {"pid": parent.pid, "command": " ".join(parent.cmdline())[:200]}
    except (AttributeError, psutil.Error):   # it runs elsewhere, or its parent has ended
        return None


def dead_of(engine_set):
    """{name of an engine: {"exit_code", "pid"}} of those that ended and were not asked to. Those
    that a client has shut down end with 0."""
    ended = (engine_set.stop_data or {}).get("engines", {})
    return {name: how for name, how in ended.items() if how.get("exit_code") != 0}


def engines_of(cluster):
    """(id of its set, its name there, its launcher, how it ended) of each engine; the engines of a
    job (MPI, Slurm …) have one launcher and no names."""
    for set_id, each in cluster.engines.items():
        if not hasattr(each, "launchers"):
            yield set_id, None, each, (each.stop_data or {}) if each.state == "after" else None
        else:
            names = {**dict.fromkeys(each.launchers), **dict.fromkeys(dead_of(each))}
            for name in sorted(names, key=lambda name: (len(name), name)):
                ended = None if name in each.launchers else dead_of(each)[name]
                yield set_id, name, each.launchers.get(name), ended


def carry_over(old, new):
    """Tell a cluster that was read from its file once more what the file does not say: which sets
    were started here, which engines have died."""
    for set_id, each in old.engines.items():
        fresh = new.engines.get(set_id)
        if fresh is None and each.state == "running":
            new.engines[set_id] = each
        elif hasattr(fresh, "launchers"):
            known = {name: {"exit_code": None, "pid": launcher.pid}
                     for name, launcher in each.launchers.items()}
            known.update(dead_of(each))
            lost = {name: known[name] for name in known.keys() - fresh.launchers.keys()}
            fresh.stop_data.setdefault("engines", {}).update(lost)
            fresh.outputs.update(each.outputs)
            fresh.n += len(lost)


def count(engine_set):
    """How many engines of a set run."""
    if hasattr(engine_set, "launchers"):
        return len(engine_set.launchers)
    return engine_set.n if engine_set.state != "after" else 0


async def stop_engine(cluster, set_id, name):
    """End one engine, which is then no dead one but forgotten."""
    engine_set = cluster.engines[set_id]
    if launcher := engine_set.launchers.get(name):
        await launcher.stop()   # which tells its set, a little later
        await until(lambda: name not in engine_set.launchers, launcher.stop_timeout)
    forget_dead(cluster, {(set_id, name)})


def forget_dead(cluster, which=None):
    """Take dead engines out of their sets, all or `which` {(set, name)}; returns how many."""
    forgotten = 0
    for set_id, each in list(cluster.engines.items()):
        for name in list(dead_of(each)):
            if which is None or (set_id, name) in which:
                each.stop_data["engines"].pop(name)
                each.n -= 1
                forgotten += 1
        if each.state == "after" and not dead_of(each):
            cluster.engines.pop(set_id)
    cluster.update_cluster_file()
    return forgotten


# ---- 54. Programs as notebooks: the percent format ---------------------------------------------
#
# A program whose comments `# %%` divide it into cells is a notebook, too: VS Code, Spyder, PyCharm
# and jupytext read and write it. `GET /api/contents/x.py?type=notebook` gives it as one, and a PUT
# of type notebook writes it back. The rules are jupytext's (format py:percent, version 1.3):
#
#     in the program                          in the notebook
#     # %% Title tags=["a"]                   a code cell, its metadata {"title", "tags"}
#     # %% [markdown], then comments          a Markdown cell; also [raw]
#     # %matplotlib inline                    the line without "# ": no Python would run it
#     # %% language="bash", then comments     a code cell that begins with %%bash
#     # ---, YAML, # --- at the head          which kernel it wants; all else in there stays
#
# What the program has no place for is not kept: outputs, pasted pictures, one empty line at the end
# of a cell. A save leaves the text of each cell that was not changed as it stands, its marker and
# the empty lines below it, too. What stands above the first marker is a cell as it is: so a program
# without any opens as one cell. As in jupytext, a marker within a string of several lines, or in a
# fenced block of a Markdown cell, is none.
#
# To open another kind of text as a notebook, add a row to TEXT_NOTEBOOKS.

TEXT_NOTEBOOKS = {}   # extension -> function of it: what has read(text), write(notebook, old_text)
PROGRAMS = {          # extension -> (language, how a comment begins); names as in jupytext
    extension: (language, sign) for sign, rows in (
        ("#", ".py python .R R .r R .jl julia .sh bash .ps1 powershell .tcl tcl .gp gnuplot"),
        ("//", ".js javascript .ts typescript .rs rust .go go .cpp c++ .java java .scala scala "
               ".cs csharp .fs fsharp .fsx fsharp .groovy groovy"),
        ("--", ".hs haskell .lua lua .sql sql"), (";;", ".clj clojure .scm scheme"),
        ("%", ".m matlab"))
    for extension, language in zip(rows.split()[::2], rows.split()[1::2], strict=True)}
# Magics whose cells are in another language (jupytext/languages.py)
CELL_LANGUAGES = re.compile(
    "R|bash|sh|python[23]|coconut|javascript|js|perl|html|latex|markdown|pypy|ruby|script|svg|"
    "matlab|octave|idl|robotframework|sas|spark|sql|cython|haskell|tcl|gnuplot")
MAGICS = {   # language -> how a line that only a kernel understands begins; SIGN: a comment
    "python": r"""\s*SIGN%{1,3}[a-zA-Z](?!.*\#\s*noescape) | \s*SIGN\s*[?!]\s*[A-Za-z.~$\\/{}]
                | SIGN\s*[a-zA-Z_][\w$]*\s*=\s*(?:%{1,3}|!)[a-zA-Z]   # x = !ls
                | SIGN(?:cat|cd|cp|mv|rm|rmdir|mkdir|copy|ddir|echo|ls|ldir|ren)(?:$|\s$|\s[^=,])
                | \s*(?:\#\ )*\S*\?\s*$                               # print?""",
    "rust": r"SIGN:[a-zA-Z]", "csharp": r"SIGN\#![a-zA-Z]", "go": r"SIGN(?:!\*?|%{1,3})[a-zA-Z]",
    "matlab": r"(?!)"}
OTHER_MAGICS = r"\s*SIGN%{1,3}[a-zA-Z]"
NOT_WRITTEN = {"autoscroll", "collapsed", "scrolled", "trusted", "execution", "ExecuteTime",
               "cell_marker", "lines_to_next_cell"}   # metadata that say nothing of the program
HEAD = re.compile(r"(?:#!.*\n)?(?:#.*coding[:=].*\n)?"
                  r"(?:(#|//|--|;;|%) ---\n(?:\1(?: .*)?\n)*?\1 ---\n)?")
PROSE = re.compile(r"\[(markdown|md|raw)\]")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
TRIPLE_QUOTED = re.compile(r"""\s*([rR]?)('''|\"\"\")\n?(.*?)\n?\2\s*""", re.S)
OPTION = re.compile(r"\s*([A-Za-z0-9_.@/-]+)(=?)")


class Piece(collections.namedtuple("Piece", "cell marker text gap")):
    """A cell as it stands in a program.

    cell = {"cell_type", "metadata", "source"}
    marker = its first line, "# %% …"; "" for what stands above the first marker
    text = all its lines, the marker, too, but without the empty ones at its end
    gap = these, and the line end before them
    """


class Program:
    """Reads and writes programs of one language as notebooks."""

    def __init__(self, extension):
        self.extension, (self.language, self.sign) = extension, PROGRAMS[extension]
        sign = re.escape(self.sign)
        self.marker = re.compile(rf"[ \t]*{sign}[ \t]*(?:%%(%*(?:[ \t].*)?)|<codecell>[ \t]*"
                                 r"|In\[[0-9 ]*\]:?[ \t]*)$")
        self.unclosed = set()   # marks of fences that nothing closes in the cell that is read
        self.strings = re.compile(rf"{sign}.*|('''|\"\"\")(?:\\.|(?!\1)[\s\S])*\1"
                                  r"|'(?:\\.|[^'\\\n])*'" r'|"(?:\\.|[^"\\\n])*"')
        self.magic = re.compile(MAGICS.get(self.language, OTHER_MAGICS).replace(
            "SIGN", rf"(?:{sign}\ |{sign})*"), re.X)

    # -- Reading

    def read(self, text):
        """The notebook of a program's text."""
        head, pieces, _ = self.pieces(text)
        spec = self.kernelspec(head)
        more = {"code": {"outputs": [], "execution_count": None}}
        cells = [{**more.get(cell["cell_type"], {}), **cell} for cell, *_ in pieces]
        return {**new_notebook(), "metadata": {"kernelspec": spec} if spec else {},
                "cells": with_ids(cells)}

    def kernelspec(self, head):
        """The kernel that the head names, or one of the language; None: the usual one will do."""
        if spec := named_kernel(self.bare_text(head)):
            return spec
        return None if self.language == "python" else kernel_of(self.language)

    def pieces(self, text):
        """(what stands above all cells, [Piece], what stands below the last one)."""
        head = HEAD.match(text)[0]
        lines = split(text[len(head):])
        starts = [*self.starts(lines)]
        first = lines[:starts[0]] if starts else lines
        if first and not "".join(first).strip():
            head += "".join(first)
        elif first:
            starts.insert(0, 0)
        pieces = [self.piece(lines[start:end])
                  for start, end in zip(starts, [*starts[1:], None], strict=False)]
        if not pieces:
            return head, [], "\n"
        *others, last = pieces
        return head, [*others, last._replace(gap="\n\n")], last.gap

    def starts(self, lines):
        """Numbers of the lines that are markers."""
        quoted, is_prose, end = self.quoted(lines), False, 0
        for number, line in enumerate(lines):
            marker = self.marker.fullmatch(line.rstrip("\n")) if number not in quoted else None
            if is_prose and number >= end and (fence := FENCE.match(self.bare(line))):
                end = self.end_of_fence(fence[1], lines, number)
            if marker and number >= end:
                is_prose, self.unclosed = bool(PROSE.search(marker[1] or "")), set()
                yield number

    def end_of_fence(self, fence, lines, start):
        """Number of the line behind a fenced block; that of its first line when it has no end
        before the comments end. `unclosed` remembers that, so that no text is read again and
        again."""
        for number in range(start + 1, len(lines)) if fence not in self.unclosed else ():
            if not lines[number].startswith(self.sign):
                break
            if re.fullmatch(rf" {{0,3}}{fence}{fence[0]}*\s*", self.bare(lines[number])):
                return number + 1
        self.unclosed.add(fence)
        return start

    def quoted(self, lines):
        """Numbers of the lines that begin within a string of several lines."""
        found, number, at, text = set(), 0, 0, "".join(lines)
        for match in self.strings.finditer(text):
            number, at = number + text.count("\n", at, match.start()), match.start()
            found.update(range(number + 1, number + 1 + match[0].count("\n")))
        return found

    def piece(self, lines):
        """The Piece of a marker and what follows it. One empty line between cells, or exactly two
        (as PEP 8 wants around functions), belong to neither."""
        marker = self.marker.fullmatch(lines[0].rstrip("\n"))
        rest = [*map(str.strip, lines[bool(marker):])]
        empty = 2 if rest[-2:] == ["", ""] and any(rest[-3:-2]) else int(
            lines[-1] == "\n" and len(lines) > 1)
        kept = "".join(lines[:len(lines) - empty])
        text = kept.removesuffix("\n")
        body = text.split("\n")[bool(marker):]
        cell = self.cell(marker[1] or "", body) if marker else code_cell(text)
        return Piece(cell, lines[0].rstrip("\n") if marker else "", text,
                     "".join(lines)[len(text):])

    def cell(self, options, lines):
        """A cell by what stands behind its marker, and the lines below."""
        title, metadata = read_options(options)
        if kind := PROSE.search(title):
            title = title.replace(kind[0], "")
        depth = len(title) - len(title.lstrip("%"))
        title = title.lstrip("%").strip()
        metadata = {**({"title": title} if title else {}),
                    **({"cell_depth": depth} if depth else {}), **metadata}
        if kind:
            kind = "raw" if kind[1] == "raw" else "markdown"
            quoted = TRIPLE_QUOTED.fullmatch("\n".join(lines)) if self.extension == ".py" else None
            if quoted:
                metadata["cell_marker"] = quoted[1] + quoted[2]
            source = quoted[3] if quoted else "\n".join(map(self.bare, lines))
            return {"cell_type": kind, "metadata": metadata, "source": source}
        if isinstance(metadata.get("language"), str):
            words = [f"%%{metadata.pop('language')}", metadata.pop("magic_args", "")]
            lines = [" ".join(filter(None, words)), *map(self.bare, lines)]
        else:
            lines = self.changed_magics(lines, self.bare)
        return code_cell("\n".join(lines), metadata)

    def bare(self, line):
        """A line without the sign of a comment, or as it is."""
        text = line.lstrip()
        if not text.startswith(self.sign):
            return line
        return line[:len(line) - len(text)] + re.sub("^ ", "", text[len(self.sign):])

    def bare_text(self, text):
        return "\n".join(map(self.bare, text.split("\n")))

    def changed_magics(self, lines, change):
        """The lines of a code cell; `change` makes another one of each that is a magic, also of
        the lines on which it goes on behind a backslash."""
        quoted = self.quoted([f"{line}\n" for line in lines])
        goes_on, changed = False, []
        for number, line in enumerate(lines):
            is_magic = number not in quoted and bool(goes_on or self.magic.match(line))
            goes_on = is_magic and self.language == "python" and line.rstrip().endswith("\\")
            changed.append(change(line) if is_magic else line)
        return changed

    # -- Writing

    def write(self, notebook, old_text=""):
        """The program's text that says what a notebook says; `old_text` is what the file says."""
        head, old, end = self.pieces(old_text)
        head = self.with_kernelspec(head, notebook["metadata"].get("kernelspec"))
        *pieces, last = [*self.pieces_for(plain_cells(notebook), old)] or [Piece(None, "", "", "")]
        return "".join([head, *(piece.text + piece.gap for piece in pieces), last.text,
                        end if last.text else ""])

    def pieces_for(self, cells, old):
        """Yield a Piece for each cell: the old one that says the same, or a new one. That has the
        marker and the gap of the one whose place it takes."""
        found = matched(cells, old, lambda piece, position: piece.marker or position == 0)
        for position, (cell, number, place) in enumerate(found):
            twin = None if place is None else old[place]
            yield twin if number is not None else self.new_piece(cell, twin, position == 0)

    def new_piece(self, cell, twin, is_first):
        marker, lines = self.lines(cell)
        gap = twin.gap if twin else "\n\n"
        if twin and not twin.marker:
            is_plain = is_first and marker == f"{self.sign} %%" and "\n".join(lines).strip()
            if is_plain and cell["source"] == "\n".join(lines):
                return Piece(cell, "", cell["source"], gap)   # it still needs no marker
        elif twin and self.lines(twin.cell)[0] == marker:
            marker = twin.marker
        return Piece(cell, marker, "\n".join([marker, *lines]), gap)

    def lines(self, cell):
        """(marker, lines below it) of a cell as this program has them."""
        kind, source = cell["cell_type"], cell["source"]
        metadata, lines = {**cell["metadata"]}, source.split("\n")
        magic = re.fullmatch(r"%%(\S+)(?: (.*))?", lines[0]) if kind == "code" else None
        quote = str(metadata.get("cell_marker", ""))
        if magic and CELL_LANGUAGES.fullmatch(magic[1]) and magic[1] != self.language:
            metadata.update({"magic_args": magic[2]} if magic[2] else {}, language=magic[1])
            lines = self.commented(lines[1:])
        elif kind == "code":
            lines = self.changed_magics(lines, self.as_comment) if source else []
        elif quote.lower().lstrip("r") in ("'''", '"""') and quote[-3:] not in source:
            lines = [quote, *lines, quote[-3:]]
        else:
            lines = self.commented(lines)
        options = write_options("" if kind == "code" else f"[{kind}]", metadata)
        return f"{self.sign} %%" + ("" if options[:1] in ("", "%") else " ") + options, lines

    def commented(self, lines):
        return [f"{self.sign} {line}" if line else self.sign for line in lines]

    def as_comment(self, line):
        text = line.lstrip()
        return f"{line[:len(line) - len(text)]}{self.sign} {text}"

    def with_kernelspec(self, head, spec):
        """The head, changed when it would lead to another kernel."""
        usual = self.kernelspec(head) or {"name": DEFAULT_KERNEL}
        if not isinstance(spec, dict) or spec.get("name") in (None, usual["name"]):
            return head
        sign, lines = self.sign, head.split("\n")
        wish = ["  kernelspec:", *(f"    {key}: {json.dumps(str(spec[key]), ensure_ascii=False)}"
                                   for key in ("display_name", "language", "name") if key in spec)]
        if f"{sign} jupyter:" not in lines:
            wish = ["---", "jupyter:", "  jupytext:", "    text_representation:",
                    f"      extension: {self.extension}", "      format_name: percent", *wish,
                    "---"]
            return head + "".join(f"{line}\n" for line in [*self.commented(wish), ""])
        old = rf"(?m)^{re.escape(sign)} ( *)kernelspec:\n(?:{re.escape(sign)} \1 +.*\n)*"
        lines = re.sub(old, "", head).split("\n")
        at = lines.index(f"{sign} jupyter:") + 1
        return "\n".join([*lines[:at], *self.commented(wish), *lines[at:]])


def code_cell(source, metadata=()):
    return {"cell_type": "code", "metadata": dict(metadata), "source": source}


def plain_cells(notebook):
    """The cells of a notebook as {"cell_type", "source", "metadata"}; unknown types become raw."""
    return [{"cell_type": cell["cell_type"] if cell["cell_type"] in CELL_FIELDS else "raw",
             "source": str(join(cell.get("source", ""))), "metadata": cell["metadata"]}
            for cell in notebook["cells"]]


def matched(cells, old, fits):
    """Yield (cell, number, place) for each cell. number = that of the old piece that says the same;
    place = that of the piece whose place it takes, so that it can be written like that; or None.
    `fits(piece, position)` tells whether an old piece can stand at a position as it is."""
    known = {}   # what a cell says -> numbers of the old pieces that say it, the last first
    for number, piece in reversed([*enumerate(old)]):
        known.setdefault(meaning(piece.cell), []).append(number)
    found = []   # number of the old piece for each cell, or None
    for position, cell in enumerate(cells):
        numbers = known.get(meaning(cell), [])
        found.append(numbers.pop() if numbers and fits(old[numbers[-1]], position) else None)
    free, before = {*range(len(old))} - {*found}, -1
    for cell, number in zip(cells, found, strict=True):
        place = before + 1 if number is None and before + 1 in free else number
        before = before if place is None else place
        free.discard(place)
        yield cell, number, place


def meaning(cell):
    """What is the same of two cells that a program writes in the same way."""
    written = {key: value for key, value in cell["metadata"].items() if key not in NOT_WRITTEN}
    return cell["cell_type"], cell["source"], json.dumps(written, sort_keys=True)


def read_options(text):
    """(title, metadata) of what stands behind a marker: words, then key=JSON or {JSON}. What cannot
    be read so is kept as it stands, under the name that jupytext gives it."""
    begin = re.search(r"(?:^|\s)(?:\{|[A-Za-z0-9_.@/-]+=)", text)
    title, rest = (text[:begin.start()], text[begin.start():].strip()) if begin else (text, "")
    metadata, at = {}, 0
    try:
        if rest.startswith("{"):
            return title, json.loads(rest)
        while at < len(rest):
            key = OPTION.match(rest, at)
            metadata[key[1]], at = (JSON.raw_decode(rest, key.end()) if key[2]
                                    else (None, key.end()))
    except (ValueError, TypeError, RecursionError):
        return title, {"incorrectly_encoded_metadata": rest}
    return title, metadata


def write_options(kind, metadata):
    """The text that `read_options` reads; `kind`: "[markdown]", say."""
    metadata = {key: value for key, value in metadata.items() if key not in NOT_WRITTEN}
    title, depth = metadata.pop("title", None), metadata.pop("cell_depth", 0)
    other = metadata.pop("incorrectly_encoded_metadata", None)
    if title is not None and (not isinstance(title, str) or re.search(r"[][={}\n]", title)):
        metadata["title"], title = title, None
    words = ["%" * depth if isinstance(depth, int) else "", title, kind]
    if all(re.fullmatch("[A-Za-z0-9_.@/-]+", key) for key in metadata):
        words += [key if value is None else f"{key}={json.dumps(value)}"
                  for key, value in metadata.items()]
    else:
        words.append(json.dumps(metadata))
    return " ".join(filter(None, [*words, other]))


def named_kernel(yaml):
    """The kernelspec that a text's head names, or None."""
    block = re.search(r"(?m)^( *)kernelspec:\n((?:\1 +.*\n)+)", yaml + "\n")
    fields = re.findall(r"(?m)^ *(\w+): *['\"]?(.*?)['\"]?$", block[2]) if block else ()
    return {"name": "", "display_name": "", **dict(fields)} if block else None


def kernel_of(language):
    """The kernelspec of a language: of the first kernel for it, or by the language's name."""
    for name, (spec, _) in find_specs().items():
        if spec["language"].lower() == language.lower():
            return {"name": name, "display_name": spec["display_name"],
                    "language": spec["language"]}
    return {"name": language, "display_name": language, "language": language}


def text_notebook(path):
    """What reads and writes the text at this path as a notebook, or None."""
    extension = os.path.splitext(path)[1]
    make = TEXT_NOTEBOOKS.get(extension)
    return make and make(extension)


class TextNotebookContents(CONTENTS[-1]):
    """Gives a text as a notebook, and writes a notebook as a text, where one is asked for."""

    def content(self, path, kind, form, data):
        reader = text_notebook(path) if kind == "notebook" else None
        if not reader:
            return super().content(path, kind, form, data)
        return {"content": reader.read(self.plain_text(path, data)[0]), "format": "json",
                "mimetype": None}

    def encode(self, path, model, old):
        writer = text_notebook(path) if model["type"] == "notebook" else None
        if not writer:
            return super().encode(path, model, old)
        try:
            notebook, _ = MEND[-1](model.get("content") or new_notebook())
            validate(notebook)
        except NotANotebook as problem:
            raise Problem(400, f"Not saved, this is no valid notebook: {problem}") from None
        text, newline = self.plain_text(path, old or b"")
        data = encode_text(writer.write(notebook, text).replace("\n", newline))
        return codecs.BOM_UTF8 + data if (old or b"").startswith(codecs.BOM_UTF8) else data

    def plain_text(self, path, data):
        """(the text of a file with \\n as line ends, its own line end)."""
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise Problem(400, f"{path} is not UTF-8 text, so it cannot be a notebook",
                          "bad format") from None
        is_dos = "\n" in text and text.count("\r\n") == text.count("\n")
        return (text.replace("\r\n", "\n"), "\r\n") if is_dos else (text, "\n")


CONTENTS.append(TextNotebookContents)
TEXT_NOTEBOOKS.update(dict.fromkeys(PROGRAMS, Program))


# ---- 55. Download as: what else a notebook can become ------------------------------------------
#
# `GET /api/nbconvert` lists the formats, `GET /nbconvert/FORMAT/PATH` gives a notebook of the disk
# in one of them, and `POST /nbconvert/FORMAT` the notebook in the body, which need not be saved. An
# exporter returns files, {name: bytes}: the notebook in that format first, then what it shows. When
# there is more than one, they come as a zip. To add a format, add a row to EXPORTERS. When
# nbconvert is installed, its exporters are formats, too. Each runs in a process of its own, because
# it starts other programs (TeX, pandoc, Chromium) and may take long.

EXPORTERS = {}            # format -> (MIME type, function(Export) -> {file name: bytes})
NBCONVERT_SECONDS = 180   # for one notebook; TeX with many figures takes one minute
LIST_SECONDS = 60         # for the list of exporters: most of it is importing nbconvert
MOST_PICTURE = 1 << 25    # bytes of a picture beside the notebook that goes into a download
ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")
PICTURES = {   # MIME type of an output -> extension of its file; the first one that is there
    "image/png": ".png", "image/jpeg": ".jpg", "image/gif": ".gif", "image/webp": ".webp",
    "image/svg+xml": ".svg"}
NAMED_FILES = re.compile(   # in Markdown and HTML: ![](x), [x]: x, src=x, poster=x, url(x)
    r"""!\[[^\]]{0,999}\]\([ ]*<?([^\s)>]+) | ^[ ]{0,3}\[[^\]]{1,999}\]:[ ]*<?([^\s>]+)
      | \b(?:src|poster)\s?=\s?["']?([^\s"'>]+) | url\(\s?["']?([^"')]+)""", re.X | re.M | re.I)
# What a page to read has no use for: sections of index.html, each with all sections that need it.
NOT_FOR_READING = (
    "Typing", "Completion and tooltip", "Undo of cell operations", "Copy, split, merge, move",
    "Locked cells and graded ones", "How runs end, in words", "Answers to questions",
    "Drafts, and one tab that writes", "What differs", "Names, copies, checkpoints", "Metadata",
    "Download as", "The file browser", "Clusters", "The text editor", "Under the hood", "A lecture",
    "Other clients of the kernel", "Texts as notebooks", "Tables of any size", "Variables",
    "CSV and Markdown files", "Completion while typing", "Settings", "Missing packages",
    "Variables are gone", "Tools at a cell", "Files that are moved", "Welcome")
# Where a section of the page begins: one of a script, or of the style
PAGE_SECTIONS = re.compile(r"(?m)^(?=// ---- \d|/\* (?:\d\d [A-Z]|Narrow))")
NO_READING = re.compile(rf"(?:// ---- \d+\.|/\*) ?(?:\d\d )?(?:{'|'.join(NOT_FOR_READING)})"
                        r"(?:[:;.]| -| \*/)")
READING_POLICIES = (   # what both allow is allowed: no script from an address, whatever its nonce
    "default-src 'none'; script-src {scripts} 'nonce-{nonce}' 'unsafe-eval'; style-src "
    "'unsafe-inline'; img-src data:; media-src data:; font-src data:; base-uri 'none'; "
    "form-action 'none'; require-trusted-types-for 'script'; trusted-types inert default",
    "script-src 'unsafe-inline' 'unsafe-eval' data:")
READING_FRAME = (
    '<template id="enclosed-frame"><iframe class="script-frame" title="Output with scripts" '
    'loading="lazy" sandbox="allow-scripts" srcdoc="{page}"></iframe></template>\n')
# Goes before FRAME's script. `prepare` runs in the output's page, before anything else there.
FRAME_IN_COPY = """<!doctype html><script>
{      // so that the output's scripts find no names of ours
globalThis.trustedTypes?.createPolicy('default', {
  createHTML: text => text, createScript: text => text, createScriptURL: text => text });
const prepare = () => {
  delete globalThis.RTCPeerConnection;      // the one way out that no policy closes
  const hosts = new Set(), note = document.createElement('p');
  note.style = 'margin: 0; font-size: 12px; color: #666';
  let hasFailed = false;
  // A figure may ask for more than it needs, as plotly does for MathJax: what was drawn is no loss.
  const tellSoon = () => setTimeout(() => {
    if (hasFailed || !document.querySelector('svg, canvas')) document.body.prepend(note);
  }, 1000);
  addEventListener('securitypolicyviolation', ({ blockedURI }) => {
    if (!/^https?:/.test(blockedURI)) return;
    hosts.add(new URL(blockedURI).host);
    note.textContent = `Shown without what it loads from ${[...hosts].join(', ')}: a copy to read `
      + 'asks no other computer. It is complete where the notebook is opened.';
    if (document.readyState === 'complete') tellSoon();
  });
  for (const failing of ['error', 'unhandledrejection'])
    addEventListener(failing, () => { hasFailed = true; });
  addEventListener('load', () => hosts.size && tellSoon());
  addEventListener('DOMContentLoaded', () => {
    // A policy with a nonce refuses handlers in attributes; `new Function` makes them anew.
    for (const element of document.querySelectorAll('*'))
      for (const { name, value } of element.attributes)
        if (/^on/.test(name)) element[name] = new Function('event', value);
  });
};
const { nonce } = document.currentScript;
addEventListener('message', ({ data }) => {
  data.html = `<script nonce="${nonce}">(${prepare})()</` + 'script>'
    + data.html.replace(/<script(?=[\\s>])/gi, `$& nonce="${nonce}"`);
});
}
</script>"""


class Export:
    """A notebook that is to become something else, and where it is.

    cells = its cells as far as they are to be shown: without empty ones at the end
    contents = the Contents that its path is of: for the pictures beside it; None: there are none
    """

    def __init__(self, notebook, path, contents=None, with_code=True):
        self.notebook, self.path, self.contents = notebook, path, contents
        self.folder, _, name = path.rpartition("/")
        self.stem = os.path.splitext(name)[0] or "notebook"
        self.cells = [*filter(None, (shown(cell, with_code) for cell in notebook["cells"]))]
        while self.cells and is_empty(self.cells[-1]):
            self.cells.pop()

    @property
    def language(self):
        metadata = self.notebook["metadata"]
        infos = [metadata.get(name) for name in ("kernelspec", "language_info")]
        spec, info = (value if isinstance(value, dict) else {} for value in infos)
        return str(spec.get("language") or info.get("name") or "python")

    def pictures(self):
        """{path below the root: (MIME type, bytes)} of the pictures, sounds and films beside the
        notebook that its text or its outputs name."""
        found = {}
        for path in {*self.named_paths()} if self.contents else ():
            kind = mimetypes.guess_type(path)[0] or ""
            with contextlib.suppress(Problem, OSError):   # there is no such file
                absolute, info = self.contents.look(path)
                is_file = info is not None and stat.S_ISREG(info.st_mode)
                if is_file and info.st_size <= MOST_PICTURE and kind.startswith(
                        ("image/", "audio/", "video/")):
                    found[path] = kind, self.contents.read(absolute)
        return found

    def named_paths(self):
        """Yield the paths below the root that stand where one names a picture."""
        for cell in self.cells:
            texts = [join(bundle(output).get(kind)) for output in cell.get("outputs", ())
                     for kind in ("text/html", "text/markdown")]
            for text in (cell["source"], *texts):
                for match in NAMED_FILES.finditer(text if isinstance(text, str) else ""):
                    address = unquote(html.unescape(next(filter(None, match.groups()))))
                    if path := self.below_root(re.split("[?#]", address)[0]):
                        yield path

    def below_root(self, address):
        """The path below the root of what a relative address names, or None."""
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//", address):
            return None
        folder = "" if address.startswith("/") else self.folder
        parts = os.path.normpath(f"{folder}/{address}").replace(os.sep, "/").lstrip("/").split("/")
        return None if parts[0] in ("..", ".", "") else "/".join(parts)


def shown(cell, with_code=True):
    """The cell without what its tags hide, as nbconvert and Jupyter Book have them; None when
    nothing is left of it. `hide-` means folded: only a page can do that."""
    tags = cell["metadata"].get("tags")
    tags = {str(tag).replace("_", "-") for tag in tags} if isinstance(tags, list) else set()
    if "remove-cell" in tags:
        return None
    is_code = cell["cell_type"] == "code"
    cell = {**cell, "source": str(join(cell.get("source", ""))), "metadata": {**cell["metadata"]}}
    if is_code and "remove-output" in tags:
        cell["outputs"] = []
    if is_code and "hide-output" in tags:
        cell["metadata"]["collapsed"] = True
    if is_code and "hide-input" in tags:
        cell["metadata"]["jupyter"] = {"source_hidden": True}
    if "remove-input" in tags or is_code and not with_code:
        cell.update(source="", metadata={**cell["metadata"], "tags": ["remove-input"]})
        return cell if cell.get("outputs") else None
    return cell


def is_empty(cell):
    """Does it show neither a text nor an output?"""
    return not cell["source"].strip() and not cell.get("outputs")


def bundle(output):
    """The MIME bundle of an output, maybe an empty one."""
    return output["data"] if isinstance(output.get("data"), dict) else {}


# -- Notebook and script

def export_notebook(export):
    return {f"{export.stem}.ipynb": write_notebook(export.notebook).data}


# Magics that a Python kernel knows without their %, too, beside those that MAGICS has
BARE_MAGIC = re.compile(
    r"(?:alias|autoreload|bookmark|conda|config|debug|dhist|dirs|doctest_mode|edit|env|gui|history"
    r"|less|load|load_ext|lsmagic|magic|mamba|man|matplotlib|more|page|pdb|pdef|pdoc|pfile|pinfo|pip"
    r"|popd|prun|psearch|psource|pushd|pwd|pycat|pylab|recall|reload_ext|rerun|reset|run|save"
    r"|set_env|store|sx|system|tb|time|timeit|unalias|unload_ext|uv|who|who_ls|whos|xdel|xmode"
    r"|python[\d.]*[ ]-m[ ]pip)(?:[ \t]|$)")
NOT_SHOWN = "<downloaded>"   # where warnings would say that a cell is from


def export_script(export):
    """The program of the notebook's language. Of a language that is not in PROGRAMS, the sign of a
    comment is taken to be #. In Python, all that only a kernel understands is a comment."""
    info = export.notebook["metadata"].get("language_info")
    told = str(info.get("file_extension") or "") if isinstance(info, dict) else ""
    by_language = {language.lower(): extension for extension, (language, _) in PROGRAMS.items()}
    extension = by_language.get(export.language.lower(), told)
    program = Program(extension if extension in PROGRAMS else ".sh")
    cells = export.notebook["cells"]
    if program.language == "python":
        cells = [{**cell, "source": signed(program, str(join(cell.get("source", ""))))}
                 if cell["cell_type"] == "code" else cell for cell in cells]
    text = program.write({**export.notebook, "cells": cells})
    return {f"{export.stem}{extension or '.txt'}": encode_text(text)}


def signed(program, source):
    """A cell of Python whose lines that only a kernel understands can be told by their sign, and be
    comments: `pip install x` has its %, `    !ls` is `    pass  # !ls`, because a block must not
    become empty, and what stands below `%%writefile`, and is no Python, is a comment already."""
    if (magic := re.match(r"%%(\S+)", source)) and CELL_LANGUAGES.fullmatch(magic[1]):
        return source
    lines = source.split("\n")
    lines = [re.sub(r"^([ \t]+)(?=[%!]\S)", r"\1pass  # ", line) if line != bare else line
             for line, bare in zip(lines, program.changed_magics(lines, str.strip), strict=True)]
    while (at := first_fault(program.changed_magics(lines, program.as_comment))) is not None:
        if not BARE_MAGIC.match(lines[at]):
            return "\n".join([lines[0], *program.commented(lines[1:])]
                             if lines[0].startswith("%%") else lines)
        lines[at] = f"%{lines[at]}"
    return "\n".join(lines)


def first_fault(lines):
    """The number of the line at which Python's parser stops, or None."""
    import ast
    try:
        compile("\n".join(lines), NOT_SHOWN, "exec",
                ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, True)
    except SyntaxError as error:
        return min(max(error.lineno or 1, 1), len(lines)) - 1
    except (ValueError, RecursionError, MemoryError):   # a byte 0, or brackets without end
        return 0
    return None


# For good: catch_warnings would change what other threads warn of.
warnings.filterwarnings("ignore", module=re.escape(NOT_SHOWN))


# -- Markdown

def export_markdown(export):
    """Markdown, its pictures as files of a folder beside it."""
    files, texts = {}, []
    for number, cell in enumerate(export.cells):
        keep = functools.partial(keep_file, files, f"{export.stem}_files")
        if cell["cell_type"] == "code":
            texts += [fenced(cell["source"], export.language)] if cell["source"].strip() else []
            for at, output in enumerate(whole_outputs(cell)):
                texts.append(markdown_of(output, functools.partial(keep, f"output_{number}_{at}")))
        elif cell["source"].strip():
            texts.append(with_attachments(cell, functools.partial(keep, f"attachment_{number}_")))
    near = {path: data for path, (_, data) in export.pictures().items()
            if not export.folder or path.startswith(f"{export.folder}/")}
    name = f"{export.stem}.md"
    return {name: encode_text("\n\n".join(filter(None, texts)) + "\n"), **files,
            **{path[len(export.folder):].lstrip("/"): data for path, data in near.items()}}


def keep_file(files, folder, stem, name, data):
    """Add a picture to `files`; returns how Markdown names it."""
    path = f"{folder}/{stem}{name}"
    files[path] = data
    return quote(path)


def fenced(text, language=""):
    """A block of code, in a fence that is longer than any run of its marks in the text."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    text = text.removesuffix("\n")
    return f"{fence}{language}\n{text}\n{fence}"


def whole_outputs(cell):
    """The outputs of a cell, neighbouring pieces of a stream as one."""
    whole = []
    for output in cell.get("outputs", ()):
        if output["output_type"] == "stream" and not join(output.get("text")):
            continue
        last = whole[-1] if whole else {}
        if output["output_type"] == "stream" and last.get("name", "") == output.get("name"):
            last["text"] += str(join(output["text"]))
        else:
            text = {"text": str(join(output["text"]))} if "text" in output else {}
            whole.append({**output, **text})
    return whole


def markdown_of(output, keep):
    """An output as Markdown. `keep(extension, data)` takes a picture and returns its name."""
    data = bundle(output)
    for mime, extension in PICTURES.items():
        if picture := picture_bytes(mime, data.get(mime)):
            return f"![]({keep(extension, picture)})"
    for mime in ("text/markdown", "text/latex", "text/html"):
        if mime in data:
            return str(join(data[mime]))
    text = (output.get("text") or "\n".join(map(str, output.get("traceback") or ()))
            or join(data.get("text/plain")) or "")
    text = printed(str(text))
    return fenced(text) if text.strip() else ""


def picture_bytes(mime, value):
    """The bytes of a picture in a MIME bundle, or None."""
    text = join(value)
    if not isinstance(text, str):
        return None
    if mime == "image/svg+xml":
        return encode_text(text)
    try:
        return base64.b64decode(text)
    except ValueError:
        return None


def with_attachments(cell, keep):
    """The Markdown of a cell, its pasted pictures as files."""
    attachments = cell.get("attachments")

    def address(match):
        name = unquote(match[1])
        data = attachments.get(name) if isinstance(attachments, dict) else None
        for mime in PICTURES if isinstance(data, dict) else ():
            if picture := picture_bytes(mime, data.get(mime)):
                return keep(re.sub(r"[^\w.-]", "_", name), picture)
        return match[0]

    return re.sub(r"attachment:([^\s)\"'>]+)", address, cell["source"])


def printed(text):
    """What a text leaves on paper: no colours, and of a line only what was last written on it."""
    lines = ANSI.sub("", text).replace("\r\n", "\n").split("\n")
    for number, line in enumerate(lines):
        if "\r" in line or "\b" in line:
            lines[number] = overwritten(line)
    return "\n".join(lines)


def overwritten(line):
    """A line of a terminal after its carriage returns and backspaces."""
    written, at = [], 0
    for piece in re.findall(r"\r|\x08|[^\r\x08]+", line):
        if piece in "\r\b":
            at = max(0, at - 1) if piece == "\b" else 0
        else:
            written[at:at + len(piece)] = piece
            at += len(piece)
    return "".join(written)


# -- HTML: the page with the notebook in it, to be read

def export_html(notebook, path, contents=None, with_code=True):
    """index.html with a notebook in it, as a page that needs no server; bytes. With `contents` the
    pictures beside the notebook go into it."""
    return page_with(Export(notebook, path, contents, with_code))


def page_with(export):
    """The page, {path, content, files} in it, and the frame in which an output with scripts runs.
    Its policies travel with it, and a frame inherits them: no address but data: URLs, and no script
    but the page's, by their hashes, and those with a nonce. Only a script of the frame knows the
    nonce. `<` is escaped, so that no text of the notebook can end the element that it is in."""
    files = {path: f"data:{kind};base64,{base64.b64encode(data).decode()}"
             for path, (kind, data) in export.pictures().items()}
    enclosed = to_json({"path": export.path, "files": files,
                        "content": {**export.notebook, "cells": export.cells}})
    page = reading_page()
    hashes = hashes_of_scripts(page)
    nonce = secrets.token_urlsafe(16)
    metas = "".join(f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
                    for policy in READING_POLICIES).format(scripts=hashes, nonce=nonce).encode()
    frame = (FRAME_IN_COPY + FRAME.decode()).replace("<script>", f'<script nonce="{nonce}">')
    notebook = b'<script type="application/json" id="enclosed">%b</script>\n%b<div id="no-start"'
    return page.replace(b"<title>", metas + b"<title>", 1).replace(
        b'<div id="no-start"', notebook % (enclosed.replace(b"<", rb"\u003c"),
            READING_FRAME.format(page=html.escape(frame)).encode()), 1)


def reading_page():
    """index.html without the sections, and their style, that a page to read has no use for."""
    with open(os.path.join(HERE, "index.html"), encoding="utf-8") as file:
        pieces = PAGE_SECTIONS.split(file.read())
    for number, piece in enumerate(pieces):
        if NO_READING.match(piece):   # of the last one, the end of the script stays
            pieces[number] = piece[len(piece.partition("</script>")[0]):]
    return "".join(pieces).encode()


EXPORTERS.update(
    notebook=("application/json", export_notebook), script=("text/plain", export_script),
    markdown=("text/markdown", export_markdown),
    html=("text/html", lambda export: {f"{export.stem}.html": page_with(export)}))


# -- nbconvert's exporters, each in a process of its own

REMEDIES = (   # what nbconvert says when something is missing -> what it is, and how to get it
    ("PandocMissing|pandoc wasn't found",
     "pandoc, which is not installed: see https://pandoc.org/installing.html "
     "(apt install pandoc, brew install pandoc)"),
    ("latex not found|bibtex not found",
     "TeX, which is not installed: see https://tug.org/texlive (apt install texlive-xetex "
     "texlive-fonts-recommended texlive-plain-generic)"),
    ("Playwright is not installed|No module named 'playwright'",
     "playwright, which is not installed: pip install 'nbconvert[webpdf]', then playwright install "
     "chromium"),
    ("No suitable chromium|Executable doesn't exist",
     "a Chromium that playwright finds: playwright install chromium"),
    ("PyQtWebEngine",
     "Qt's web engine, which is not installed: pip install 'nbconvert[qtpdf]'"))


class Nbconvert:
    """The exporters of the nbconvert that is installed beside this server, if there is one."""

    def __init__(self):
        self.lock, self.known = threading.Lock(), None

    def exporters(self):
        """{format: MIME type}; asked once, in a process, because importing it takes a second."""
        import importlib.util
        importlib.invalidate_caches()
        if importlib.util.find_spec("nbconvert") is None:
            return {}
        with self.lock:
            if self.known is None:
                self.known = self.run("list_nbconvert", {}, LIST_SECONDS)
        return self.known

    def export(self, format, export):
        """{file name: bytes}."""
        folder = export.contents.resolve(export.folder) if export.contents else None
        with tempfile.TemporaryDirectory(prefix="minijupyter-") as target:
            job = {"format": format, "notebook": export.notebook, "name": export.stem,
                   "folder": folder, "target": target}
            files = {}
            for name in self.run("run_nbconvert", job, NBCONVERT_SECONDS):
                with open(os.path.join(target, name), "rb") as file:
                    files[name] = file.read()
            return files

    def run(self, function, job, seconds):
        """The JSON that a function of this module prints last, called in a process of its own.
        Problem 504 when it takes too long, 500 when it fails."""
        process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {HERE!r}); "
                                   f"import minijupyter; minijupyter.{function}()"], cwd=HERE,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True)
        try:
            output, errors = process.communicate(to_json(job), timeout=seconds)
        except subprocess.TimeoutExpired:
            end_group(process)
            raise Problem(504, f"nbconvert took longer than {seconds} seconds, and was ended"
                          ) from None
        if process.returncode:
            raise Problem(500, why_it_failed(errors.decode("utf-8", "replace")))
        return json.loads(output.splitlines()[-1])


def end_group(process):
    """End a process and, where there are process groups, what it has started."""
    with contextlib.suppress(ProcessLookupError):
        if POSIX:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.communicate()


def why_it_failed(errors):
    """In words, what nbconvert's last words mean."""
    for pattern, remedy in REMEDIES:
        if re.search(pattern, errors):
            return f"This format needs {remedy}"
    # Of a traceback, what stands below the last line of code
    lines = re.split(r"(?m)^[ ]+.*\n", errors.strip() + "\n")[-1].split()
    return "nbconvert failed: " + (" ".join(lines)[-600:] or "it said nothing")


def list_nbconvert():
    """In that process: print {format: MIME type} of all exporters."""
    from nbconvert.exporters import get_export_names, get_exporter
    found = {}
    for name in get_export_names():
        with contextlib.suppress(ValueError, ImportError):   # one of others, half installed
            found[name] = get_exporter(name).output_mimetype
    print(json.dumps(found))


def run_nbconvert():
    """In that process: write what an exporter makes into the target folder, print the names."""
    import nbformat
    from nbconvert.exporters import get_exporter
    from nbconvert.nbconvertapp import NbConvertApp
    job, app = json.load(sys.stdin), NbConvertApp()
    app.load_config_file()   # the user's own settings of nbconvert
    exporter = get_exporter(job["format"])(config=app.config)
    metadata = {"name": job["name"], **({"path": job["folder"]} if job["folder"] else {})}
    output, resources = exporter.from_notebook_node(
        nbformat.from_dict(job["notebook"]), resources={"metadata": metadata})
    files = {job["name"] + resources["output_extension"]: output}
    for name, data in (resources.get("outputs") or {}).items():
        files[os.path.basename(name)] = data
    for name, data in files.items():
        with open(os.path.join(job["target"], name), "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
    print(json.dumps([*files]))


NBCONVERT = Nbconvert()


# -- The API

def list_exporters(handler):
    """The formats: ours first, then nbconvert's."""
    types = {**{format: kind for format, (kind, _) in EXPORTERS.items()},
             **{format: kind for format, kind in NBCONVERT.exporters().items()
                if format not in EXPORTERS}}
    return {format: {"output_mimetype": kind} for format, kind in types.items()}


def exporter(format):
    """(MIME type, function) of a format; Problem 404 with those there are."""
    if format in EXPORTERS:
        return EXPORTERS[format]
    others = NBCONVERT.exporters()
    if format in others:
        return others[format], functools.partial(NBCONVERT.export, format)
    known = ", ".join(dict.fromkeys([*EXPORTERS, *others]))
    more = "" if others else "; others need nbconvert: pip install nbconvert"
    raise Problem(404, f"There is no format {format}. There are {known}{more}")


def export_file(handler, format, path):
    """A notebook of the disk in another format."""
    found = exporter(format)
    model = handler.server.contents.get(path, "notebook")
    send_export(handler, *found, model["content"], model["path"],
                handler.asked("download", "").lower() in ("true", "1"))


def export_content(handler, format):
    """The notebook in the body in another format; its `path` says where its pictures are."""
    found, model = exporter(format), handler.json_body(CODEC["read_model"])
    path = model.get("path") or model.get("name") or "notebook.ipynb"
    if not isinstance(path, str) or not isinstance(model.get("content"), dict):
        raise Problem(400, "The body must have a notebook as its content, and a path")
    try:
        notebook = write_notebook(model["content"]).served
    except NotANotebook as problem:
        raise Problem(400, f"This is no valid notebook: {problem}") from None
    send_export(handler, *found, notebook, path.strip("/"), True)


def send_export(handler, kind, export_as, notebook, path, is_attached):
    """Send a notebook as `export_as` makes it: a file, or a zip of several."""
    export = Export(notebook, path, handler.server.contents, handler.asked("code") != "false")
    files = export_as(export)
    name, data = next(iter(files.items()))
    if len(files) > 1:
        name, data = f"{export.stem}.zip", zipped(files)
    # nbconvert calls the PDF of some of its exporters HTML.
    known = {".pdf": "application/pdf", ".png": "image/png", ".zip": "application/zip"}
    kind = known.get(os.path.splitext(name)[1], kind or "application/octet-stream")
    charset = "; charset=utf-8" if kind.startswith("text/") else ""
    headers = {"Content-Security-Policy": FILE_POLICY}
    if is_attached or len(files) > 1:
        headers["Content-Disposition"] = f"attachment; filename*=utf-8''{quote(name, safe='')}"
    handler.send(200, data, kind + charset, headers)


def zipped(files):
    """A zip archive of {name: bytes}."""
    import zipfile
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, data in files.items():
            zipped.writestr(name, data)
    return archive.getvalue()


ROUTES += [("GET", r"/api/nbconvert", list_exporters),
           ("GET", r"/nbconvert/([^/]+)/(.+)", export_file),
           ("POST", r"/nbconvert/([^/]+)", export_content)]


# ---- 56. A terminal on a kernel: console -------------------------------------------------------
#
# A client of a kernel is a page of code: four sockets and a Session (`Client`), and a method for
# each message type, called like it (`Console`). A connection file is all that it needs, whoever
# started the kernel. A kernel that the console itself starts has a KernelProcess besides, as in the
# server: this interrupts it by a signal, starts it again after a crash, and ends it in the end.
#
#     state    the main thread waits in    what leads on
#     asks     `input`, for the person     a whole cell -> runs; Ctrl-D, `exit` -> the end
#     runs     `Client.receive`            reply and idle, or the kernel's end -> asks; its question
#                                          -> answers. Ctrl-C interrupts the kernel
#     answers  `input`, for the kernel     a line, or Ctrl-C -> runs
#
# ZeroMQ's sockets are not thread-safe: all of them belong to the main thread. While that thread
# is in `input`, which knows no sockets, nothing is heard. (The next section changes that.)

EARS = (*HEARD, "link")       # link: the connection to the kernel's process is made, or lost
ANSWER_SECONDS = 1            # that the kernel gets for a question about code: it may be busy
ATTACH_SECONDS = 10           # for its first answer,
FIRST_SECONDS = 60            # and if we have just started it (jupyter_console's)
OBEY_SECONDS = 2              # that a cell gets to stop, before we say what else can be done
MOST_DRAWN = 20_000           # characters that clear_output can clear; no terminal shows more
PROMPT_COLOURS = {"In ": 32, "Out": 31, "Remote ": 33}   # of prompts: green, red, yellow, as there
AT_CONSOLE = []               # functions of a Console, before its first prompt on a terminal
LEAVING = re.compile(r"\s*(exit|quit)\s*(\(\s*\))?\s*")   # in the kernel, this would end it
ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\].*?(\x07|\x1b\\))")   # colours, links, titles
PICTURE_SIZES = {   # MIME type -> how it begins, with width and height; struct's format of these
    "image/png": (rb"\x89PNG.{12}(....)(....)", ">I"), "image/gif": (rb"GIF8.a(..)(..)", "<H"),
    "image/jpeg": (rb".*?\xff[\xc0-\xc2]..\x08(?=..(..))(..)", ">H")}
# To each of these message types a console has a method of that name, which gets content and parent
# header. The first ones show something.
DISPLAYED = ("stream", "display_data", "update_display_data", "execute_result", "error",
         "execute_input", "link")
NOTED = ("status", "clear_output", "shutdown_reply", "kernel_info_reply", "execute_reply",
         "input_request")


class Client:
    """A client of a kernel, on the wire. Only the thread that made it may use it."""

    def __init__(self, connection):
        self.session = Session(connection["key"], username="console",
                               scheme=connection["signature_scheme"])
        self.sockets = {channel: self.connect(connection, channel) for channel in HEARD}
        self.sockets["link"] = self.sockets["iopub"].get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)

    def connect(self, connection, channel):
        new = ZMQ.socket(CHANNELS[channel])
        new.linger, new.rcvhwm, new.reconnect_ivl = 0, 0, 20   # milliseconds
        if channel == "iopub":
            new.subscribe(b"")
        else:   # the same on all channels: the kernel asks on stdin whom it has heard on shell
            new.identity = self.session.session.encode()
        if public_key := connection.get("curve_publickey"):
            new.curve_publickey, new.curve_secretkey = zmq.curve_keypair()
            new.curve_serverkey = public_key.encode()
        new.connect(endpoint(connection, channel))
        return new

    def send(self, channel, msg_type, content):
        """Sign and send a message. Returns its msg_id: what comes of it has that as its parent."""
        message = self.session.message(msg_type, content)
        self.sockets[channel].send_multipart(self.session.pack(message))
        return message["header"]["msg_id"]

    def receive(self, seconds, channels=EARS):
        """(channel, message) of what comes within so many seconds, or None. iopub is first, because
        output comes before its reply. What is forged or broken is dropped."""
        while ready := zmq.select([self.sockets[each] for each in channels], [], [], seconds)[0]:
            channel = next(each for each in channels if self.sockets[each] in ready)
            parts = self.sockets[channel].recv_multipart()
            if channel == "link":   # its parts are no message: (event, value), endpoint
                is_made = struct.unpack("=Hi", parts[0])[0] == zmq.EVENT_HANDSHAKE_SUCCEEDED
                return channel, self.session.message("link", {"is_made": is_made})
            with contextlib.suppress(our_kernel.BadMessage):
                return channel, self.session.unpack(parts)
        return None

    def request(self, msg_type, content):
        """The content of the reply to a request on shell; {} when none comes in time."""
        msg_id, deadline = self.send("shell", msg_type, content), time.monotonic() + ANSWER_SECONDS
        while came := self.receive(max(0, deadline - time.monotonic()), ["shell"]):
            if came[1]["parent_header"].get("msg_id") == msg_id:
                return came[1]["content"]
        return {}


class Console:
    """A Client of the kernel `name`, and a person at a terminal or lines from a pipe. `kernel` is
    the KernelProcess when we have started it, else None."""

    def __init__(self, client, name, kernel):
        self.client, self.name, self.kernel = client, name, kernel
        for each in (sys.stdin, sys.stdout, sys.stderr):
            each.reconfigure(errors="replace")   # not every terminal has every character
        self.ours = {client.session.session, kernel and kernel.session.session, None}
        self.others = set()       # the sessions of other clients that have asked something
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.input = lambda prompt, text: input(prompt())   # see `ask`
        self.on_cell = []         # functions of the code of each cell that was typed
        self.count, self.lines = 1, []   # number of the next cell; its lines, until it is whole
        self.ahead = []           # lines that were read from a pipe to see how it goes on
        self.info, self.is_heard, self.is_lost = {}, False, False   # info: its kernel_info_reply
        self.ending = {}          # content of a shutdown_reply: the kernel's end is no crash
        self.running, self.due = None, set()   # msg_id of our cell; what has not come of it yet
        self.warn_at = math.inf   # when to say that the cell does not stop; None: it was said
        self.next_input = ""      # text with which the next cell begins
        self.has_failed = self.is_over = self.keeps_kernel = self.is_asking = False
        self.drawn = ""           # what was shown since a cell began, for clear_output
        self.is_within = self.clears = False   # within a line; the next output replaces all that

    # -- what is shown: a method for each message type --

    def handle(self, channel, message):
        """Do what a message asks for; in a pipe, show only what comes of our cells. A kernel may
        send anything: what cannot be shown is named."""
        msg_type, parent = message["header"]["msg_type"], message["parent_header"]
        self.is_heard = self.is_heard or channel == "iopub"
        is_ours = parent.get("session") in self.ours
        is_shown = msg_type in DISPLAYED and (self.is_terminal or is_ours)
        try:
            if is_shown or msg_type in NOTED:
                getattr(self, msg_type)(message["content"], parent)
        except (LookupError, TypeError, ValueError, AttributeError) as problem:
            self.say(f"Left out a {msg_type} that cannot be shown: {problem!r}")

    def write(self, text, name="stdout", own_line=True):
        """Print text, without colours where no terminal is; on lines of its own."""
        stream, is_terminal = getattr(sys, name), getattr(sys, name).isatty()
        if self.clears and is_terminal:
            stream.write(back_over(self.drawn))
            self.is_within, self.drawn = False, ""
        if own_line:
            text = "\n" * self.is_within + text + "\n"
        stream.write(text if is_terminal else ESCAPES.sub("", text))
        stream.flush()
        if text:
            self.drawn = (self.drawn + text)[-MOST_DRAWN:]
            self.is_within, self.clears = not text.endswith("\n"), False

    def say(self, text):
        """What the console itself has to say."""
        self.write(text, "stdout" if self.is_terminal else "stderr")

    def label(self, word, number, parent):
        """`In [7]: ` or `Out[7]: ` in colour, of other clients as `Remote In [7]: `; nothing in a
        pipe."""
        mark = "" if parent.get("session") in self.ours else "Remote "
        text = f"\x1b[{PROMPT_COLOURS[mark or word]}m{mark}{word}[{number}]: \x1b[0m"
        return text if self.is_terminal else ""

    def stream(self, content, parent):
        self.write(content["text"], "stderr" if content["name"] == "stderr" else "stdout", False)

    def display_data(self, content, parent):
        self.write(in_words(content["data"]))

    update_display_data = display_data   # a terminal has no way back to where it was shown

    def execute_result(self, content, parent):
        text = in_words(content["data"])
        label = self.label("Out", content["execution_count"], parent)
        self.write(f"{label}\n{text}" if label and "\n" in text else f"{label}{text}")

    def error(self, content, parent):
        lines = content["traceback"] or [f"{content['ename']}: {content['evalue']}"]
        self.write("\n".join(lines).rstrip("\n"), "stderr")

    def execute_input(self, content, parent):
        self.count = content["execution_count"] + 1
        if parent.get("session") not in self.ours:   # ours is there: it was typed
            label = self.label("In ", content["execution_count"], parent)
            margin = "\n" + "...: ".rjust(len(ESCAPES.sub("", label)))
            self.clears = False
            self.write("\n" + label + content["code"].replace("\n", margin))
            self.drawn = ""

    def clear_output(self, content, parent):
        self.clears = True

    def status(self, content, parent):
        if parent.get("session") not in self.ours:
            self.others.add(parent["session"])
        if content["execution_state"] == "idle" and parent.get("msg_id") == self.running:
            self.due.discard("idle")

    def execute_reply(self, content, parent):
        if parent.get("msg_id") != self.running:
            return
        self.due.discard("reply")
        self.has_failed = content["status"] != "ok"
        if content["status"] == "aborted":
            self.say("The kernel did not run it, because another cell has failed.")
        for payload in content.get("payload", ()):
            if payload["source"] == "page":
                self.write(in_words(payload["data"]))
            elif payload["source"] == "set_next_input":
                self.next_input = payload["text"]
            elif payload["source"] == "ask_exit":
                self.is_over, self.keeps_kernel = True, payload.get("keepkernel", False)

    def input_request(self, content, parent):
        """Ask the person for the kernel. Ctrl-D is answered with \\x04, which kernels know."""
        try:
            if content.get("password") and self.is_terminal:
                import getpass
                answer = getpass.getpass(content["prompt"])
            else:
                answer = self.ask(lambda: content["prompt"])
        except EOFError:
            answer = "\x04"
        except KeyboardInterrupt:
            return self.interrupt()
        if answer is not None:
            self.client.send("stdin", "input_reply", {"value": answer})

    # -- the kernel's life --

    def kernel_info_reply(self, content, parent):
        self.info = content

    def greet(self, seconds):
        """Ask who the kernel is, until it has answered and iopub was heard: it publishes only to
        those who have subscribed by then (P1). True if so. On control, too: shell may be busy."""
        self.info, self.is_heard = {}, False
        began = nudge_at = time.monotonic()
        while not (self.info and self.is_heard):
            now = time.monotonic()
            if now > began + seconds or (self.kernel and self.kernel.state == "dead"):
                return False
            if now >= nudge_at:
                nudge_at = now + NUDGE_SECONDS
                for channel in ("shell", "control"):
                    self.client.send(channel, "kernel_info_request", {})
            self.step(NUDGE_SECONDS)
        return True

    def shutdown_reply(self, content, parent):
        self.ending = content

    def link(self, content, parent):
        """The connection to the kernel was made, or is lost: then its process has ended."""
        if content["is_made"] and self.is_lost:
            if self.greet(FIRST_SECONDS):
                self.is_lost, self.count, self.ending = False, 1, {}
                self.say("A new process of the kernel is there; it has none of the variables.")
        elif not content["is_made"] and not self.is_lost:
            self.is_lost = True
            if self.kernel and self.kernel.ended.wait(ANSWER_SECONDS) and self.kernel.reason:
                return self.say(self.kernel.reason)
            self.say("The kernel has ended." if not self.ending else
                     "The kernel is restarted." if self.ending.get("restart") else
                     "The kernel was shut down.")

    def wait_until_back(self):
        self.say("The kernel is gone. Waiting until it comes back; Ctrl-C ends the waiting.")
        if self.kernel and self.kernel.state == "dead":   # it has crashed too often
            self.kernel.restart()
        while self.is_lost:
            self.step(NUDGE_SECONDS)

    def step(self, seconds):
        """Do something about the next message, if one comes in this time. True if one did."""
        if came := self.client.receive(seconds):
            self.handle(*came)
        return bool(came)

    def run(self, code):
        """Run a cell, and show what comes of it until reply and idle are in. True if it is fine."""
        if self.is_lost:
            self.wait_until_back()
        self.drawn, self.has_failed, self.warn_at, self.due = "", False, math.inf, {"reply", "idle"}
        self.running = self.client.send("shell", "execute_request", {
            "code": code, "silent": False, "store_history": True, "user_expressions": {},
            "allow_stdin": True, "stop_on_error": True})
        while self.due and not self.is_lost:
            self.step(NUDGE_SECONDS)
            if self.warn_at and time.monotonic() > self.warn_at:
                self.warn_at = None
                self.say("The cell does not stop. Ctrl-C again leaves it running. (Some kernels "
                         "can be interrupted only where they were started.)")
        self.running, self.clears = None, False
        return not self.has_failed and not self.due

    def interrupt(self):
        """Interrupt the cell: in our own kernel as the server does, in another by a message. When
        that was in vain, stop waiting for the cell."""
        if self.warn_at is None:
            self.due = set()
            return
        self.warn_at, self.is_within = time.monotonic() + OBEY_SECONDS, True   # behind ^C
        if self.kernel:
            self.kernel.interrupt()
        else:
            self.client.send("control", "interrupt_request", {})

    def leave(self):
        """End our own kernel, unless others use it, and say what becomes of it."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)   # too late
        how = f"`python minijupyter.py console --existing {self.name}` attaches to it"
        if not self.kernel:
            if self.is_terminal and not self.is_lost:
                self.say(f"The kernel goes on: {how}.")
        elif POSIX and (self.keeps_kernel or (self.others and not self.is_over)):
            let_go(self.kernel)
            why = "" if self.keeps_kernel else ", because others use it"
            self.say(f"The kernel goes on{why}: {how}, `kill {self.kernel.process.pid}` ends it.")
        else:   # on Windows there is no reaper: a kernel must follow its parent
            self.kernel.shutdown()

    # -- the person --

    def begin(self):
        """Say who is there. The number of the last cell stands in the reply to an empty one that is
        silent, and so is not counted."""
        if not self.is_terminal:
            return
        banner = str(self.info.get("banner", "")).strip("\n")
        self.say(f"{banner}\nCtrl-C interrupts, Ctrl-D leaves.")
        if not self.kernel:
            reply = self.client.request("execute_request", {"code": "", "silent": True})
            self.count = (reply.get("execution_count") or 0) + 1
        call_all(AT_CONSOLE, self)

    def interact(self):
        """Read cells and run them, until it is over. False when one failed that came from a pipe,
        whose others are not run then."""
        while not self.is_over:
            try:
                code = self.read_cell()
                if LEAVING.fullmatch(code):
                    break
                if code.strip() and not self.run(code) and not self.is_terminal:
                    return False
            except KeyboardInterrupt:
                if not self.is_terminal:
                    return False
                self.write("", own_line=True)
            except EOFError:
                if self.is_terminal:
                    self.write("\r\x1b[K", own_line=False)   # some have begun a new line, some not
                    self.is_within = False
                break
        return True

    def read_cell(self):
        """The next cell: lines until the kernel says that they are whole. Raises EOFError."""
        self.lines, text, self.next_input = [], self.next_input, ""
        while self.step(0):
            pass   # what has come since the last one
        if self.is_terminal:
            print("\n" * self.is_within)
        while True:
            try:
                line = self.ask(self.prompt, text)
            except EOFError:
                if not self.lines:
                    raise
                break
            self.lines.append(line if line.strip() else "")
            is_whole, text = self.is_whole("\n".join(self.lines))
            if is_whole:
                break
        code = "\n".join(self.lines)
        call_all(self.on_cell, code)
        return code

    def is_whole(self, code):
        """(is it a cell?, what the next line begins with). In a pipe a blank line is no end."""
        if not code.strip() or LEAVING.fullmatch(code) or self.is_lost:   # nobody can tell then
            return True, ""
        reply = self.client.request("is_complete_request", {"code": code})
        if reply.get("status") == "incomplete":
            return False, reply.get("indent", "")
        return self.is_terminal or len(self.lines) == 1 or not self.goes_on(), ""

    def goes_on(self):
        """True when the next line of a pipe that is not blank is indented."""
        while not any(map(str.strip, self.ahead)) and (line := sys.stdin.readline()):
            self.ahead.append(line)
        return any(line.strip() and line[0] in " \t" for line in self.ahead)

    def prompt(self, number=None):
        """`In [7]: `, or dots for a line that follows; nothing in a pipe. Without a number, it is
        that of the line which comes next."""
        label = self.label("In ", self.count, {})
        return label if number == 0 or not (self.lines and label) else (
            "...: ".rjust(len(ESCAPES.sub("", label))))

    def ask(self, prompt, text=""):
        """A line from the person, which may begin with `text`; prompt() is shown before it. None
        when it is not wanted any more. Raises EOFError."""
        if self.is_terminal:
            self.is_asking = True
            try:
                return self.input(prompt, text)
            finally:
                self.is_asking = self.is_within = False
        self.write(prompt(), own_line=False)
        line = self.ahead.pop(0) if self.ahead else sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def on_interrupt(self, signum, frame):
        """Ctrl-C is for the cell that runs, else for the line that is typed."""
        if self.running and not self.is_asking:
            return self.interrupt()
        raise KeyboardInterrupt


def back_over(text):
    """What brings a terminal to where it was before this text, and clears the rest."""
    width, lines = shutil.get_terminal_size().columns, ESCAPES.sub("", text).split("\n")
    rows = sum(len(line) // width + 1 for line in lines) - 1
    return "\r" + f"\x1b[{rows}A" * bool(rows) + "\x1b[J"


def in_words(data):
    """What a terminal can show of a MIME bundle: its text; of pictures, and of what has no text,
    the type and the size."""
    texts = [data[mime] for mime in ("text/plain", "text/markdown", "text/latex") if mime in data]
    return "\n".join(texts[:1] + [in_short(mime, body) for mime, body in data.items()
                                  if mime.startswith("image/") or not texts])


def in_short(mime, body):
    """[image/png, 640 × 480, 12 kB]"""
    data = base64.b64decode(body) if mime in PICTURE_SIZES else (
        body.encode() if isinstance(body, str) else to_json(body))
    begins, form = PICTURE_SIZES.get(mime, (b"(?!)", ""))
    found = re.match(begins, data, re.S)
    sides = [struct.unpack(form, side)[0] for side in found.groups()] if found else []
    size = f"{len(data) / 1000:,.0f} kB" if len(data) >= 1000 else f"{len(data)} bytes"
    return f"[{', '.join([mime, *([' × '.join(map(str, sides))] if sides else []), size])}]"


# Which kernel --existing means.

def connection_files(word):
    """(path, fields) of the connection files in the runtime folder with this word in their names,
    the newest first."""
    found = []
    for name in os.listdir(RUNTIME) if os.path.isdir(RUNTIME) else ():
        path = os.path.join(RUNTIME, name)
        with contextlib.suppress(OSError):   # it has just been removed
            if word in name and (connection := read_connection(path)):
                found.append((os.path.getmtime(path), path, connection))
    return [each[1:] for each in sorted(found, reverse=True, key=lambda each: each[0])]


def read_connection(path):
    """The fields of a connection file; None of any other file."""
    try:
        return our_kernel.read_connection_file(path)
    except SystemExit:   # a kernel cannot go on without
        return None


def is_heard_at(connection):
    """True when a process listens at the place that a connection file names: the kernel lives."""
    ip, port = connection["ip"], connection["shell_port"]
    try:
        if connection["transport"] == "tcp":
            socket.create_connection((ip, port), ATTACH_SECONDS).close()
        else:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(f"{ip}-{port}")
    except (OSError, AttributeError):   # Windows has no socket files
        return False
    return True


def kernels_of_notebook(path):
    """{id of a kernel: path of its notebook} of the notebooks on the running servers that `path`
    means: from here, or from a server's root."""
    found = {}
    for info in running_servers():
        for session in call(info, "GET", "api/sessions") or ():
            with contextlib.suppress(LookupError, TypeError):   # what answers may be anything
                whole = os.path.realpath(os.path.join(info["root_dir"], session["path"]))
                if session["path"] == path or whole == os.path.realpath(path):
                    found[session["kernel"]["id"]] = whole
    return found


def find_kernel(which):
    """(path, fields) of the connection file that --existing means. Exits with what is wrong."""
    connection = read_connection(which) if os.path.isfile(which) else None
    files = [(which, connection)] if connection else connection_files(which)
    if not files:
        notebooks = kernels_of_notebook(which)
        if len(notebooks) > 1:
            sys.exit(f"Which one? {which} has {len(notebooks)} kernels; give the id: " + ", ".join(
                f"{id} ({path})" for id, path in notebooks.items()))
        files = [file for id in notebooks for file in connection_files(id)]
    for path, connection in files:
        if is_heard_at(connection):
            return path, connection
    if files and which:
        sys.exit(f"The kernel of {files[0][0]} has ended: nobody listens there any more.")
    sys.exit(f"No kernel runs: there is no file of one in {RUNTIME}." if not which else
             f"{which} is no connection file, no part of the name of one in {RUNTIME}, and no "
             "notebook with a kernel on a server that runs. (--existing alone takes the newest.)")


def start_kernel(name):
    """A KernelProcess of a kernel spec, in this folder. Exits with what is wrong."""
    kernel = None
    try:
        # A kernel ends with the process JPY_PARENT_PID. This one may have to go on without us, for
        # other clients. If we are killed, the reaper ends it.
        kernel = KernelProcess(name, *find_spec(name), cwd=os.getcwd(),
                               env={"JPY_PARENT_PID": "0"} if POSIX else None)
        kernel.start()
    except (Problem, OSError) as problem:
        if kernel:
            kernel.shutdown()
        sys.exit(str(problem))
    return kernel


def let_go(kernel):
    """Let a kernel process live on without us. A shell reads what the process writes on its own
    stdout, as we did until now, and removes its files when it has ended."""
    REAPER.shell.kill()   # it would end the kernel
    os.set_blocking(kernel.process.stdout.fileno(), True)
    subprocess.Popen(
        ["/bin/sh", "-c", 'cat > /dev/null; rm -f -- "$@"', "sh", *kernel.files],
        stdin=kernel.process.stdout, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True)


def console(words):
    """`console [--existing [ID|PATH|FILE]] [--kernel NAME]`: talk with a kernel in the terminal, a
    new one or one that runs."""
    parser = argparse.ArgumentParser(prog="minijupyter.py console", description=
        "A terminal on a kernel. Ctrl-C interrupts, Ctrl-D leaves.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--kernel", default=DEFAULT_KERNEL, metavar="NAME",
                       help="start this one (default: %(default)s)")
    which.add_argument("--existing", nargs="?", const="", metavar="ID|PATH|FILE", help=
                       "attach to the kernel with this id, of this notebook on a server, or of "
                       "this connection file (default: to the newest)")
    wish, log.level, kernel = parser.parse_args(words), "error", None
    if wish.existing is None:
        kernel = start_kernel(wish.kernel)
        name, connection = kernel.id[:8], kernel.connection
    else:
        path, connection = find_kernel(wish.existing)
        is_known = os.path.dirname(path) == RUNTIME   # by its id; part of it will do
        name = re.sub(r"^kernel-|\.json$", "", os.path.basename(path))[:8] if is_known else path
    talk, is_fine = Console(Client(connection), name, kernel), False
    signal.signal(signal.SIGINT, talk.on_interrupt)
    for signal_name in {"SIGTERM", "SIGHUP"} & {*dir(signal)}:
        signal.signal(getattr(signal, signal_name), lambda signum, frame: sys.exit(128 + signum))
    try:
        if talk.greet(FIRST_SECONDS if kernel else ATTACH_SECONDS):
            talk.begin()
            is_fine = talk.interact()
        else:
            talk.say(kernel and kernel.reason or f"The kernel {name} does not answer.")
    except KeyboardInterrupt:
        talk.say("Interrupted.")
    except BrokenPipeError:   # nobody reads on; Python shall not complain of it when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        talk.leave()
    sys.exit(not is_fine)


COMMANDS["console"] = console


# ---- 57. Editing: lines, and news while somebody types -----------------------------------------
#
# With readline, lines are edited, completed by the kernel (Tab) and found again (arrow up), and the
# console shows at once what other clients run. While the main thread is in `input`, the thread
# *bell* waits for the descriptors of the sockets, and rings with a signal. The signal's handler
# runs in the main thread, so it may use the sockets: it takes what has come. If that is to be
# shown, the handler leaves `input` by the exception News; the console shows it above the lines that
# were typed, and calls `input` again with the text that was typed. (On Windows, which has no such
# signals, and without readline, news waits for Enter.)

MOST_HISTORY = 1_000          # cells (jupyter_console's)


class News(Exception):
    """Something is to be shown while the person types."""


class LineEditor:
    """readline, for a Console."""

    def __init__(self, readline, console):
        self.readline, self.console, self.client = readline, console, console.client
        self.typed = ""     # with what the next line begins
        self.news = []      # (channel, message) that could not be shown yet
        self.is_open = threading.Event()   # somebody types, and the bell may ring
        self.matches = []
        found = self.client.request("history_request", {
            "hist_access_type": "tail", "n": MOST_HISTORY, "raw": True, "output": False})
        for _, _, code in found.get("history", ()):
            self.remember(code)
        readline.set_auto_history(False)
        readline.set_startup_hook(self.begin)
        readline.set_completer(self.complete)
        is_libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")   # pasted lines are one text
        if POSIX:
            signal.signal(signal.SIGUSR1, self.on_bell)
            ears = [self.client.sockets[name].fd for name in ("iopub", "link")]
            threading.Thread(target=self.ring, args=[ears], daemon=True, name="bell").start()

    def remember(self, code):
        with contextlib.suppress(ValueError):   # a NUL, half a surrogate pair
            if code.strip():
                self.readline.add_history(code)

    def ask(self, prompt, text):
        """A line, as Console.ask has it."""
        answers, self.typed = self.console.running, text
        while not (answers and self.is_too_late()):
            try:
                self.hear()   # ZeroMQ's descriptors tell of what comes, not of what is unread
                # Colours stand between \1 and \2: readline does not count them as columns.
                return input(ESCAPES.sub("\1\\g<0>\2", prompt()))
            except News:
                self.show_news(prompt)
            except EOFError:   # with it, GNU readline prints an empty line after each later line
                self.readline.parse_and_bind("set enable-bracketed-paste off")
                raise
            finally:
                self.is_open.clear()
        return None

    def begin(self):
        """Called by readline when `input` begins."""
        self.readline.insert_text(self.typed)
        self.is_open.set()

    def ring(self, ears):
        """The thread *bell*. It uses no socket, it only waits for descriptors."""
        while self.is_open.wait():
            if zmq.select(ears, [], [])[0] and self.is_open.is_set():
                signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    def on_bell(self, signum, frame):
        """The bell has rung. A second signal must not be handled within the first."""
        if self.is_open.is_set():
            self.is_open.clear()
            self.typed = self.readline.get_line_buffer()
            self.hear()
            self.is_open.set()

    def hear(self):
        """Take what has come. Raises News when there is something to show."""
        while came := self.client.receive(0, ["iopub", "link"]):
            if self.news or came[1]["header"]["msg_type"] in DISPLAYED:
                self.news.append(came)
            else:
                self.console.handle(*came)
        if self.news or (self.console.running and self.is_too_late()):
            raise News

    def is_too_late(self):
        """True when nobody waits for the answer any more."""
        return "idle" not in self.console.due or self.console.is_lost

    def show_news(self, prompt):
        """Show what has come above the lines that are typed."""
        console = self.console
        above = "" if console.running else "\n{}"   # is it a cell, or an answer?
        print(back_over(above.format(self.lines()) + prompt() + self.typed), end="")
        while self.news:
            console.handle(*self.news.pop(0))
        print("\n" * console.is_within + above.format(self.lines()), end="", flush=True)

    def lines(self):
        """The lines of the cell that were typed before this one, with their prompts."""
        return "".join(f"{self.console.prompt(at)}{line}\n"
                       for at, line in enumerate(self.console.lines))

    def complete(self, word, number):
        """readline's completer: match `number` for the word before the cursor, None at the end."""
        if number == 0:
            self.is_open.clear()   # no bell: the sockets are needed here
            self.matches = [] if self.console.running else self.find_matches()
            self.is_open.set()
        return self.matches[number] if number < len(self.matches) else None

    def find_matches(self):
        """The kernel's matches, cut for readline: the kernel's replace the text from cursor_start
        on, readline's the text from begidx on, which may be earlier or later."""
        line, end = self.readline.get_line_buffer(), self.readline.get_endidx()
        if not line[:end].strip():
            return ["    "]
        before = "".join(f"{each}\n" for each in self.console.lines)
        reply = self.client.request("complete_request", {
            "code": before + line, "cursor_pos": len(before) + end})
        start, begin = reply.get("cursor_start", 0) - len(before), self.readline.get_begidx()
        return [line[begin:start] + match[max(0, begin - start):]
                for match in reply.get("matches", ())]


def use_readline(console):
    """Edit lines with readline, where there is one."""
    with contextlib.suppress(ImportError):   # Windows
        import readline
        editor = LineEditor(readline, console)
        console.input = editor.ask
        console.on_cell.append(editor.remember)


AT_CONSOLE.append(use_readline)


# ---- 58. A trace that is kept ------------------------------------------------------------------
#
# What Under the hood shows, kept while nobody looks. `--trace FILE` writes it from the server's
# start to its end, in the format of the page's “Save trace”: so a lesson can show the journey of a
# cell where the network fails (“Load trace…”). `--trace -` prints a line for each message instead:
#
#     14:03:07.512  browser ─▶ server            shell    execute_request    #3      420 B  1 + 1
#     14:03:07.513             server ─▶ kernel  shell    execute_request    #3      396 B  1 + 1
#     14:03:07.514             server ◀─ kernel  iopub    status          of #3      611 B  busy
#
# Requests are numbered as they come; `of #3` names the parent. Both ways are a Spectator without a
# WebSocket: it hears of the same bytes and hides the same secrets, but holds nothing back.

IS_TRACE = re.compile(rb'\{\s*"minijupyter_trace"')
END_OF_TRACE = b"\n]}\n"
MOST_OF_TRACE = 256 << 20    # bytes: a browser still reads that in one go
MOST_NUMBERED = 10_000       # requests; an answer to an older one has no number
MOST_TOLD = 40               # characters of what a message says
HEADERS = re.compile(rb'\{"header":(\{.*?\}),"parent_header":(\{.*?\}),')   # of what was cut
POLLING = re.compile(r"GET \S*/api/(?:sessions|kernels|status)(?:[/?][\w-]*)? ")
WAYS = {"http in": "browser ─▶ server", "websocket in": "browser ─▶ server",
        "websocket out": "browser ◀─ server",
        "zmq out": "           server ─▶ kernel", "zmq in": "           server ◀─ kernel",
        "process out": "           server ─▶ kernel", "process in": "           server ◀─ kernel"}
COLOURS = {"shell": 34, "control": 35, "iopub": 32, "stdin": 33, "": 2}   # SGR; 2 is dim
TOLD = ("code", "text", "execution_state", "ename", "prompt", "status")   # of a content the first


class Recorder(Spectator):
    """A spectator as long as the server lives. `keep(events)` keeps what may be seen of them; when
    it raises an OSError, the recorder says so and the server goes on."""

    def __init__(self, server, keep):
        super().__init__(None, server)
        self.keep, self.ending = keep, threading.Event()
        self.thread = threading.Thread(target=self.run, name="recorder", daemon=True)

    def run(self):
        """Tell until the server ends, and then the rest."""
        try:
            while not self.ending.wait(TELL_SECONDS):
                self.tell()
            self.tell()
        except OSError as problem:
            log(f"The trace ends here: {problem.strerror or problem}", "error")
        finally:
            self.end()

    def tell(self):
        with self.lock:
            events = [self.take() for _ in range(len(self.events))]
            missed, self.missed = self.missed, 0
        if missed:
            log(f"The trace misses {missed:,} events: they came too fast")
        if events:
            self.secrets.learn()
            self.keep([{**head, "parts": parts} for head, parts in map(self.shown, events)])

    def stop(self):
        """Called when the kernels have ended, because their end belongs to the trace."""
        self.ending.set()
        self.thread.join()


class TraceFile:
    """{minijupyter_trace: 1, saved, events}, as the page saves and loads it, that grows. The file
    is whole after each write: it can be loaded while the server runs, or after it was killed."""

    def __init__(self, path):
        """Raises OSError, and ValueError when there is a file that is no trace."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        self.file = io.FileIO(os.open(path, flags, 0o666), "r+")
        beginning = self.file.read(100)
        if beginning and not IS_TRACE.match(beginning):
            raise ValueError("a file that is no trace is there, and stays as it is")
        self.between = b'{"minijupyter_trace": 1, "saved": %s, "events": [\n' % to_json(
            iso(time.time()))
        self.file.truncate(0)
        self.write(0, b"")

    def keep(self, events):
        """Write events over the end, and the end behind them."""
        self.write(self.file.seek(-len(END_OF_TRACE), os.SEEK_END), b",\n".join(
            to_json({**event, "parts": [base64.b64encode(part).decode()
                                        for part in event["parts"]]}) for event in events))

    def write(self, at, data):
        """The events that make a whole file of its first `at` bytes. Raises OSError; when the disk
        is full, the file ends before them."""
        if at + len(data) > MOST_OF_TRACE:
            raise OSError(errno.EFBIG, "the file is as long as a page can load")
        rest = memoryview(self.between + data + END_OF_TRACE)
        try:
            self.file.seek(at)
            while rest:
                rest = rest[self.file.write(rest):]
        except OSError:
            self.file.truncate(at)
            self.file.seek(at)
            self.file.write(END_OF_TRACE)
            raise
        self.between = b",\n" if data else b""


class TraceLines:
    """Prints a line for each event, but for what the page hides as well: heartbeats, polling."""

    def __init__(self):
        self.numbers = {}   # msg_id of a request -> its number, oldest first
        self.count = itertools.count(1)
        self.has_colours = sys.stdout.isatty() and POSIX and "NO_COLOR" not in os.environ
        sys.stdout.reconfigure(errors="replace")   # a terminal may know no arrows

    def keep(self, events):
        for event in sorted(events, key=lambda event: event["at"]):   # an exchange began before
            if line := self.line(event):
                print(line, flush=True)

    def line(self, event):
        """The line of an event, or None when it has nothing to say."""
        read = {"http": words_of_exchange, "process": words_of_process}.get(event["kind"])
        entry = None if read else entry_in(event)
        if not read and (not entry or is_nudge(entry)):
            return None
        channel, msg_type, told = read(event["parts"]) if read else (
            entry.channel, entry.msg_type, told_by(entry.content))
        if POLLING.match(msg_type + " "):
            return None
        at = datetime.fromtimestamp(event["at"]).strftime("%H:%M:%S.%f")[:-3]
        way = f"{event['kind']} {event['way']}"
        cells = (f"{at}  {WAYS[way]:27}  {channel:8} {msg_type:19}", f"{self.cause(entry):>8}",
                 f"{sum(event['sizes']):>9,} B", f" {told}")
        text = " ".join("".join(each if each.isprintable() else "·" for each in cell)
                        for cell in cells).rstrip()
        return f"\x1b[{COLOURS[channel]}m{text}\x1b[0m" if self.has_colours else text

    def cause(self, entry):
        """`#3` for a request, `of #3` for what came of it, else nothing."""
        if entry is None:
            return ""
        msg_id = entry.header["msg_id"]
        if entry.msg_type.endswith("_request") and entry.msg_type != "input_request":
            if msg_id not in self.numbers:
                self.numbers[msg_id] = next(self.count)
            if len(self.numbers) > MOST_NUMBERED:
                del self.numbers[next(iter(self.numbers))]
            return f"#{self.numbers[msg_id]}"
        number = self.numbers.get(entry.parent_id)
        if number and entry.msg_type == "input_request":   # its answer is of that request, too
            self.numbers[msg_id] = number
        return f"of #{number}" if number else ""


def words_of_exchange(parts):
    """(channel, what, more) of an HTTP exchange: its request line, its status."""
    asked, answered = (part.decode("latin-1").partition("\r\n")[0] for part in parts[::2])
    return "", asked.rpartition(" ")[0], answered[9:]


def words_of_process(parts):
    return "", parts[0].decode("utf-8", "replace").rstrip()[:100], ""


def entry_in(event):
    """The message that an event carries, as an Entry; None when it carries none."""
    try:
        if event["kind"] == "websocket":
            return entry_in_frame(event["parts"][0])
        parts = event["parts"]
        start = parts.index(our_kernel.DELIMITER) + 2
        return Entry(event["channel"], parts[start:start + 4])
    except (ValueError, IndexError, RecursionError, zlib.error):
        return None   # a heartbeat, a fragment, a close, or a peer's mistake


def entry_in_frame(frame):
    """The same in a whole frame; of one that was cut, the headers. Raises ValueError."""
    _, key, payload = split_frame(frame)
    data = apply_mask(payload, key) if key else payload
    if frame[0] & COMPRESSED:
        data = zlib.decompressobj(-15).decompress(data)
    for unsplice, _ in LAYOUTS.values():
        with contextlib.suppress(ValueError, LookupError):
            return unsplice(data.decode() if frame[0] & 0b1111 == TEXT else data)
    if match := HEADERS.match(data):
        return Entry("", [*match.groups(), b"{}", b"{}"])
    raise ValueError("no message")


def is_nudge(entry):
    """The server asks a new kernel until it answers. That, and the answer, tells a reader
    nothing."""
    return any(isinstance(header, dict) and header.get("username") == "server"
               and header.get("msg_type") == "kernel_info_request"
               for header in (entry.header, json.loads(entry.json_parts[1])))


def told_by(content):
    """What a message says, in a few characters."""
    data = content.get("data")
    said = data.get("text/plain", ", ".join(data)) if isinstance(data, dict) else next(
        (content[name] for name in TOLD if name in content), "")
    line = " ".join(("".join(map(str, said)) if isinstance(said, list) else str(said)).split())
    return line if len(line) <= MOST_TOLD else f"{line[:MOST_TOLD - 1]}…"


def keep_trace(server, arguments):
    """Begin the trace that the command line asks for."""
    if arguments.trace is None:
        return
    try:
        keeper = TraceLines() if arguments.trace == "-" else TraceFile(arguments.trace)
    except (OSError, ValueError) as problem:
        sys.exit(f"Cannot write the trace {arguments.trace}: "
                 f"{getattr(problem, 'strerror', None) or problem}. Name another file.")
    recorder = Recorder(server, keeper.keep)
    recorder.begin()
    recorder.thread.start()
    atexit.register(recorder.stop)


OPTIONS.append((["--trace"], {"metavar": "FILE", "help":
    "write all that passes to FILE until the server ends, as Under the hood saves and loads it; "
    "- prints a line for each message"}))
AT_START.append(keep_trace)


# ---- 59. Markdown files as notebooks -----------------------------------------------------------
#
# A Markdown file is a notebook, too: its fenced blocks of code in the kernel's language are code
# cells, the prose between them is Markdown cells. So a README is read and tried out in one place.
#
#     in the file                             in the notebook
#     ```python  ~~~py  ```{python}           a code cell, also indented by up to three spaces
#     ```python A title tags=["a"]            its metadata {"title", "tags"}, as jupytext has them
#     ```{code-cell}, then :tags: [a]         MyST's; then blocks without {code-cell} are prose
#     ```bash  ```  ```python .noeval         prose, as other languages are; also a block in a list,
#                                             a quote or HTML, because it is a part of that
#     # Heading, or two empty lines           the next Markdown cell begins; in MyST also at +++
#     <!-- #region -->, <!-- #endregion -->   a Markdown cell; #raw: a raw one (jupytext's)
#     front matter                            which kernel it wants; all else in there stays
#
# The language is that of the kernel in the front matter. Without one it is the language that most
# blocks are in, of those for which there is a kernel (a shell only when there is no other), and
# Python when there is none.
#
# As in section 54, outputs have no place in the file, and what was not changed stays byte for
# byte. A cell that would be read as something else, if its text just stood there, is put between
# jupytext's comments. Which blocks there are is found as CommonMark 0.31 has it.

FRONT_MATTER = re.compile(   # jupytext can hide it in a comment
    r"(<!--[ \t]*\n)?---[ \t]*\n(?=[\w-]+:|#|---)(?:.*\n)*?---[ \t]*(?:\n|$)"
    r"(?(1)[ \t]*-->[ \t]*\n)")
LIST_ITEM = re.compile(r" {0,3}(?:[-+*]|\d{1,9}[.)])(?: {1,4}(?! )| (?= {4})|$)")
RULE = re.compile(r" {0,3}([-*_])(?: *\1){2,} *$")
HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t\r]|$)", re.M)
UNDERLINED = re.compile(r" {0,3}[^\s>|-].*\n {0,3}(?:=+|-{2,})\s*(?:\n|$)")
OPENING = re.compile(r"(?P<indent> {0,3})(?P<mark>`{3,}(?=[^`]*$)|~{3,})[ \t]*(?P<info>.*)")
MYST_CELL = re.compile(r"\{(code|raw)-cell\}[ \t]*(\S*)")
MYST_OPTIONS = re.compile(
    r"(?:---[ \t]*\n(?:.*\n)*?---[ \t]*\n|(?:[ \t]*:[\w-]+:.*\n)+)(?:[ \t]*\n)?")
MYST_BREAK = re.compile(r"\+\+\+(?:\s|$)")
FENCE_LANGUAGE = re.compile(r"\{?\s*\.?([A-Za-z][\w+#-]*)")
REGION = re.compile(r"<!--[ \t]*#(end)?(region|md|markdown|raw)\b(.*?)-->\s*")
EMPTY_LINE = re.compile("^$")
HTML_BLOCKS = [   # (how the first line of a block begins, what its last line has)
    *((re.compile(begins, re.I), re.compile(ends, re.I)) for begins, ends in (
        (r" {0,3}<(?:script|pre|style|textarea)(?:[\s>]|$)", "</(?:script|pre|style|textarea)>"),
        (r" {0,3}<!--", "-->"), (r" {0,3}<\?", r"\?>"), (r" {0,3}<!\[CDATA\[", r"\]\]>"),
        (r" {0,3}<![a-z]", ">"))),
    (re.compile(
     r" {0,3}</?(?:address|article|aside|base|basefont|blockquote|body|caption|center|col|colgroup"
     r"|dd|details|dialog|dir|div|dl|dt|fieldset|figcaption|figure|footer|form|frame|frameset|h[1-6]"
     r"|head|header|hr|html|iframe|legend|li|link|main|menu|menuitem|nav|noframes|ol|optgroup"
     r"|option|p|param|search|section|summary|table|tbody|td|tfoot|th|thead|title|tr|track|ul)"
     r"(?:\s|/?>|$)", re.I), EMPTY_LINE)]
# A tag alone on its line begins a block, too, but not within a paragraph.
LONE_TAG = re.compile(r"""[ ]{0,3}(?:</[a-z][a-z0-9-]*\s*>|<[a-z][a-z0-9-]*(?:\s+[a-z_:][\w.:-]*
    (?:\s*=\s*(?:[^\s"'=<>`]+|'[^']*'|"[^"]*"))?)*\s*/?>)\s*$""", re.I | re.X)
SHELLS = {"bash", "zsh", "powershell"}


class Block(collections.namedtuple("Block", "kind start end match begins")):
    """What begins at a line of a Markdown file.

    kind = "fence", "region", "break" (+++), or "text": one line, or a block that is part of prose
    start, end = numbers of its first line, and of the one behind it
    match = of its first line, for a fence and a region
    begins = whether a Markdown cell begins here
    """


class Markdown:
    """The blocks of a Markdown text, and the cells that they are.

    head = what stands above all cells: front matter, empty lines
    pieces = [Piece]; the gap of the last one is empty
    end = what stands below the last one
    language, kernelspec = of its code; the latter is None when the usual kernel will do
    is_myst = whether its cells are MyST's
    is_open = whether its last block is never closed, so that nothing can stand behind it
    """

    def __init__(self, text, language=None):
        front = FRONT_MATTER.match(text)
        self.front = front[0] if front else ""
        self.lines, self.is_open = split(text[len(self.front):]), False
        self.is_myst = bool(re.search(r"(?m)^ {0,3}(?:`{3,}|~{3,})\{(?:code|raw)-cell\}", text)
                            or re.search(r"(?m)^ *format_name: myst", self.front))
        blocks = [*self.blocks()]
        self.kernelspec = named_kernel(self.front)
        self.language = language or self.find_language(
            [block.match["info"] for block in blocks if block.kind == "fence"])
        starts = [*self.cell_starts(blocks), (len(self.lines), None)]
        self.head = self.front + "".join(self.lines[:starts[0][0]])
        self.pieces = [self.piece(start, end, block)
                       for (start, block), (end, _) in itertools.pairwise(starts)]
        self.end = self.pieces[-1].gap if self.pieces else "\n"
        self.pieces[-1:] = [piece._replace(gap="") for piece in self.pieces[-1:]]

    # -- Blocks

    def blocks(self):
        """Yield a Block for all that stands outside of empty lines."""
        regions, items, at, empty, is_paragraph = self.regions(), [], 0, 2, False
        while at < len(self.lines):
            line = self.line(at)
            if not line:
                at, empty, is_paragraph = at + 1, empty + 1, False
                continue
            kind, end, match, last, rest = "text", at + 1, None, None, within(line, items)
            if not items and at in regions:
                kind, end, match = "region", regions[at] + 1, REGION.fullmatch(self.lines[at])
            elif not items and self.is_myst and MYST_BREAK.match(rest):
                kind = "break"
            elif match := OPENING.fullmatch(rest):
                kind = "text" if items else "fence"
                end = self.end_of(at, items, closing(match["mark"]))
            elif last := html_end(rest, is_paragraph):
                end = at if last.search(rest) else self.end_of(at, items, last)
                end = max(end, at + 1)
            begins = (empty > 1 and not line.startswith(" ") or HEADING.match(line)
                      or empty and UNDERLINED.match(f"{line}\n{self.line(at + 1)}"))
            yield Block(kind, at, end, match, bool(begins))
            is_paragraph = bool(rest) and not (
                match or last or HEADING.match(rest) or RULE.match(rest)) and (
                    is_paragraph or not rest.startswith("    "))
            at, empty = end, 0

    def line(self, number):
        """A line without the spaces at its end and with spaces for tabs; "" behind the last."""
        line = self.lines[number].rstrip() if number < len(self.lines) else ""
        return line.expandtabs(4) if "\t" in line else line

    def end_of(self, start, items, last):
        """Number of the line behind a block: `last` is found in its last line, or its list item
        ends above the next one."""
        begin = items[-1] if items else 0
        for number in range(start + 1, len(self.lines)):
            line = self.line(number)
            if line and len(line) - len(line.lstrip(" ")) < begin:
                return number
            if last.search(line[begin:]):
                return number + 1
        self.is_open = not items and last is not EMPTY_LINE
        return len(self.lines)

    def regions(self):
        """{number of the line that begins a region: number of its last line}."""
        found, begun = {}, collections.defaultdict(list)   # begun: kind -> numbers of first lines
        for number, line in enumerate(self.lines):
            comment = REGION.fullmatch(line) if line.startswith("<!--") else None
            if comment and not comment[1]:
                begun[comment[2]].append(number)
            elif comment and begun[comment[2]]:
                found[begun[comment[2]].pop()] = number
        return found

    # -- Language

    def find_language(self, infos):
        """The language of the code, by the kernel that the front matter names or by the blocks;
        then `kernelspec` is that of the first kernel for it."""
        specs = {name: canonical(spec["language"]) for name, (spec, _) in find_specs().items()}
        if self.kernelspec:
            named = specs.get(self.kernelspec["name"]) or self.kernelspec.get("language")
            if named:
                return canonical(named)
        count = collections.Counter(filter({*specs.values()}.__contains__, map(
            self.language_of, infos)))
        language = max(count, key=lambda name: (name not in SHELLS, count[name]), default="python")
        if language != "python" and not self.kernelspec:
            self.kernelspec = next(kernel_of(spec["language"]) for spec, _ in find_specs().values()
                                   if canonical(spec["language"]) == language)
        return language

    def language_of(self, info):
        """The language of a fenced block by what stands behind its mark; "" when it is no cell."""
        cell = MYST_CELL.match(info)
        word = FENCE_LANGUAGE.match(cell[2] if cell else info)
        if self.is_myst and not cell or not word or ".noeval" in info.split():
            return ""
        return canonical(word[1])

    def is_cell(self, block):
        """True for what is a cell by itself, whatever stands around it."""
        return block.kind == "region" or block.kind == "fence" and bool(
            MYST_CELL.match(block.match["info"])
            or self.language_of(block.match["info"]) == self.language)

    # -- Cells

    def cell_starts(self, blocks):
        """[(number of a cell's first line, its Block)]."""
        starts, before = [], "cell"
        for block in blocks:
            kind = "cell" if self.is_cell(block) else block.kind
            if kind in ("cell", "break") or before == "cell" or block.begins and before != "break":
                starts.append((block.start, block))
            before = kind
        return starts

    def piece(self, start, end, block):
        """The Piece of a cell that begins at a line; the next one begins at `end`."""
        text = "".join(self.lines[start:end])
        kept = text.rstrip()
        kept += text[len(kept):].partition("\n")[0]   # spaces at the end of the last line
        make = self.cell if self.is_cell(block) else self.prose
        cell, marker = make(kept, block)
        return Piece(cell, marker, kept, text[len(kept):])

    def prose(self, text, block):
        """(cell, marker) of a Markdown cell without comments around it."""
        marker = text.partition("\n")[0] if block.kind == "break" else ""
        metadata = json_or_none(marker[3:].strip()) if marker else None
        return {"cell_type": "markdown", "metadata": metadata if isinstance(metadata, dict) else {},
                "source": text[len(marker):].lstrip("\n") if marker else text}, marker

    def cell(self, text, block):
        """(cell, marker) of a region, or of a fenced block that is a cell."""
        first, _, rest = text.partition("\n")
        if block.kind == "region":
            kind = "raw" if block.match[2] == "raw" else "markdown"
            return {"cell_type": kind, "metadata": titled_options(block.match[3]),
                    "source": rest.rpartition("\n")[0]}, first
        indent, mark, info = block.match.groups()
        directive = MYST_CELL.match(info)
        options = (MYST_OPTIONS.match(rest) if directive else None) or [""]
        body, last = rest[len(options[0]):], rest.rpartition("\n")[2]
        if closing(mark).search(last.rstrip()):
            body = body.removesuffix(last).removesuffix("\n")
        body = "\n".join(re.sub(f"^ {{0,{len(indent)}}}", "", line) for line in body.split("\n"))
        metadata = myst_options(options[0]) if directive else fence_options(info)
        kind = "raw" if directive and directive[1] == "raw" else "code"
        return {"cell_type": kind, "metadata": metadata, "source": body}, (
            f"{first}\n{options[0]}".removesuffix("\n"))


def within(line, items):
    """The part of a line that stands behind the signs of the list items it belongs to. `items` has
    the columns where their texts begin, and is changed."""
    indent = len(line) - len(line.lstrip(" "))
    while items and indent < items[-1]:
        items.pop()
    begin = items[-1] if items else 0
    while not RULE.match(line[begin:]) and (item := LIST_ITEM.match(line, begin)):
        begin = item.end() + (not item[0].endswith(" "))
        items.append(begin)
    return line[begin:]


def closing(mark):
    """The pattern of the line that ends a block which this mark has begun."""
    return re.compile(rf"^ {{0,3}}{mark}{mark[0]}*[ \t]*$")


def html_end(line, is_in_paragraph):
    """The pattern of the last line of the block of HTML that a line begins, or None."""
    if not line.lstrip(" ").startswith("<"):
        return None
    is_lone = LONE_TAG.match(line) and not is_in_paragraph
    return next((ends for begins, ends in HTML_BLOCKS if begins.match(line)),
                EMPTY_LINE if is_lone else None)


def canonical(language):
    """A language's name as it can stand at a fence, one for all of its names: py is python."""
    name = re.sub(r"[^\w+#-]+", "-", language.lower())
    if re.fullmatch(r"i?python\d?", name):
        return "python"
    return PROGRAMS.get(f".{name}", ({"c++": "cpp", "c#": "csharp"}.get(name, name),))[0].lower()


def fence_options(info):
    """The metadata that stand at a fence, in jupytext's way."""
    language, _, rest = info.partition(" ")
    if not re.fullmatch(r"[\w+#-]+", language):   # {python} or {.python .class}
        return {}
    return titled_options(rest)


def titled_options(text):
    """The metadata that a title and options of jupytext's mean."""
    title, metadata = read_options(text.strip())
    return {**({"title": title.strip()} if title.strip() else {}), **metadata}


def myst_options(text):
    """The metadata in the lines `:key: value` or `key: value` (YAML) on top of a MyST cell."""
    found = re.findall(r"(?m)^[ \t]*:?([\w-]+):[ \t]*(.*?)[ \t]*$", text)
    return {key: myst_value(value) for key, value in found}


def myst_value(text):
    """JSON, YAML's [a, b], or the text itself."""
    value = json_or_none(text)
    if value is None and text.startswith("[") and text.endswith("]"):
        return [word.strip(" '\"") for word in text[1:-1].split(",") if word.strip()]
    return text if value is None else value


def json_or_none(text):
    """What a text means as JSON; None when it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


class MarkdownNotebook:
    """Reads and writes Markdown files as notebooks."""

    def __init__(self, _extension):
        self.old = None   # the Markdown that is on disk, while a notebook is written

    def read(self, text):
        found = Markdown(text)
        more = {"code": {"outputs": [], "execution_count": None}}
        return {**new_notebook(), "cells": with_ids([
            {**more.get(piece.cell["cell_type"], {}), **piece.cell} for piece in found.pieces]),
            "metadata": {"kernelspec": found.kernelspec} if found.kernelspec else {}}

    def write(self, notebook, old_text=""):
        """The text that says what a notebook says; `old_text` is what the file says."""
        self.old = old = Markdown(old_text)
        spec = notebook["metadata"].get("kernelspec")
        spec = spec if isinstance(spec, dict) and isinstance(spec.get("name"), str) else (
            old.kernelspec or {"name": DEFAULT_KERNEL, "language": "python"})
        self.language = self.language_of(spec)
        cells, pieces = plain_cells(notebook), []
        for cell, number, place in matched(cells, old.pieces, functools.partial(
                self.can_stay, len(cells))):
            piece = old.pieces[number] if number is not None else self.new_piece(
                cell, None if place is None else old.pieces[place])
            if piece.marker.startswith(" ") and self.could_be_in_list(pieces, place):
                piece = self.fenced(cell, piece._replace(marker=piece.marker.lstrip(" ")))
            pieces += [(piece, place)] if piece.text else []
        text = "".join(self.joined(pieces))
        head = old.head + ("" if old.head.endswith("\n") or not old.head else "\n")
        if (Markdown(head + text).kernelspec or {"name": DEFAULT_KERNEL})["name"] != spec["name"]:
            head = with_kernel(old.front, spec) + (
                head[len(old.front):] if old.front else head or "\n")
        return head + text + old.end if text else old.head

    def language_of(self, spec):
        """The language of a notebook's kernel, as it stands at fences."""
        known, _ = find_specs().get(spec["name"], ({}, None))
        named = known.get("language") or spec.get("language")
        return canonical(named) if isinstance(named, str) else self.old.language

    def can_stay(self, count, piece, position):
        """Whether an old piece can be the cell at a position, of so many, as it stands."""
        is_last_open = self.old.is_open and piece is self.old.pieces[-1]
        return (piece.cell["cell_type"] != "code" or self.old.language == self.language) and (
            not is_last_open or position == count - 1)

    def could_be_in_list(self, pieces, place):
        """Whether an indented block behind these pieces might now belong to a list in the last."""
        piece, before = pieces[-1] if pieces else (None, None)
        is_as_before = place and before == place - 1 and piece is self.old.pieces[before]
        return bool(pieces) and piece.marker[:3] in ("", "+++") and not is_as_before

    def new_piece(self, cell, twin):
        """The Piece of a cell that is new or changed, and takes the place of `twin`."""
        is_empty = not cell["source"].strip() and meaning(cell)[2] == "{}"
        if is_empty and (twin is None or cell["cell_type"] == "markdown"):
            return Piece(cell, "", "", "")   # a new cell, in which nothing is written yet
        is_like = twin is not None and are_alike(cell, twin.cell)
        if cell["cell_type"] == "code":
            is_like = is_like and self.old.language == self.language
            return self.fenced(cell, twin if is_like else None)
        if is_like and MYST_CELL.search(twin.marker):
            return self.fenced(cell, twin)
        text = re.sub(r"\A(?:[ \t]*\n)+|(?:\n[ \t]*)+\Z", "", cell["source"])
        if cell["cell_type"] == "markdown" and self.is_prose(text):
            if is_like and MYST_BREAK.match(twin.marker):
                return Piece(cell, twin.marker, f"{twin.marker}\n\n{text}", "")
            if meaning(cell)[2] == "{}":
                return Piece(cell, "", text, "")
        return self.commented(cell, twin if is_like and REGION.fullmatch(twin.marker) else None)

    def commented(self, cell, twin):
        """The Piece of a cell between jupytext's comments; `twin` has the same first one."""
        kind = "raw" if cell["cell_type"] == "raw" else "region"
        options = write_options("", cell["metadata"]).replace("-->", r"--\u003e")
        words = ["<!--", f"#{kind}", options, "-->"]
        marker = twin.marker if twin else " ".join(filter(None, words))
        end = f"<!-- #end{REGION.fullmatch(marker)[2]} -->"
        return Piece(cell, marker, f"{marker}\n{cell['source']}\n{end}", "")

    def is_prose(self, text):
        """Whether a text is read as Markdown cells and nothing else, wherever it stands."""
        found = Markdown(text, self.language)
        return not (found.is_open or found.front) and not any(
            piece.marker for piece in found.pieces)

    def fenced(self, cell, twin):
        """The Piece of a code cell: like its twin, or like the first one in the file."""
        marker = twin.marker if twin else self.marker(cell["metadata"])
        first, _, options = marker.partition("\n")
        opening = OPENING.fullmatch(first.rstrip())
        indent, mark = opening["indent"], opening["mark"]
        runs = re.findall(rf"(?m)^ *({mark[0]}{{3,}})", cell["source"])
        longest = mark[0] * max(len(mark), *(len(run) + 1 for run in runs), 0)
        last = twin.text.rpartition("\n")[2] if twin else ""
        if longest != mark or not closing(mark).search(last.rstrip()):
            last = indent + longest
        first = first.replace(mark, longest, 1)
        lines = [first, *([options] if options else []), *(
            line and indent + line for line in cell["source"].split("\n") if cell["source"]), last]
        return Piece(cell, marker, "\n".join(lines), "")

    def marker(self, metadata):
        """The first line of a new code cell, and with MyST those with its options. Names that MyST
        could not read there are not kept."""
        openings = [OPENING.match(piece.marker.partition("\n")[0].rstrip())
                    for piece in self.old.pieces if piece.cell["cell_type"] == "code"]
        mark, word = openings[0]["mark"] if openings else "```", self.language
        for opening in openings:   # the language is called as it is in the file
            named = (MYST_CELL if self.old.is_myst else FENCE_LANGUAGE).match(opening["info"])
            name = named.group(named.lastindex) if named else ""
            word = name if canonical(name) == self.language else word
        if self.old.is_myst:
            lines = [f":{key}: {json.dumps(value)}" for key, value in metadata.items()
                     if key not in NOT_WRITTEN and re.fullmatch(r"[\w-]+", key)]
            return "\n".join([f"{mark}{{code-cell}} {word}", *lines])
        options = write_options("", metadata)
        sign = "~" if "`" in options else mark[0]   # a line with ``` must have no other `
        return sign * len(mark) + " ".join(filter(None, [word, options]))

    def joined(self, pieces):
        """Yield the texts of the pieces, and between them the gaps of the file, or new ones that
        keep them apart."""
        for (piece, place), (after, place_after) in itertools.pairwise([*pieces, (None, None)]):
            yield piece.text
            if after is None:
                return
            is_old = place is not None and place_after == place + 1
            gap = self.old.pieces[place].gap if is_old else ""
            are_apart = piece.marker or after.marker or HEADING.match(after.text)
            least = 1 if are_apart else 2 if UNDERLINED.match(after.text) else 3
            if gap.count("\n") < least:
                gap = "\n\n" if least < 3 else "\n\n+++\n\n" if self.old.is_myst else "\n\n\n"
            yield gap


def are_alike(cell, other):
    """Whether two cells differ in their text alone."""
    return meaning({**cell, "source": ""}) == meaning({**other, "source": ""})


def with_kernel(front, spec):
    """Front matter that names this kernel; all else in it stays."""
    wish = ["kernelspec:", *(f"  {key}: {json.dumps(str(spec[key]), ensure_ascii=False)}"
                             for key in ("display_name", "language", "name") if key in spec)]
    named = re.search(r"(?m)^( *)kernelspec:\n(?:\1 +.*\n)+", front)
    if named:
        wish = "".join(f"{named[1]}{line}\n" for line in wish)
        return front[:named.start()] + wish + front[named.end():]
    wish = "".join(f"  {line}\n" for line in wish)
    if begun := re.search(r"(?m)^jupyter:[ \t]*\n", front):
        return front[:begun.end()] + wish + front[begun.end():]
    if front:
        end = front.rindex("\n---") + 1
        return front[:end] + "jupyter:\n" + wish + front[end:]
    return f"---\njupyter:\n{wish}---\n"


def readme(handler):
    """This program's own README, of which a reader can have a copy as a notebook."""
    path = os.path.join(HERE, "README.md")
    try:
        with open(path, encoding="utf-8") as file:
            return {"content": file.read()}
    except OSError as problem:
        raise Problem(404, f"There is no README.md beside the program: {problem}") from None


TEXT_NOTEBOOKS.update(dict.fromkeys((".md", ".markdown"), MarkdownNotebook))
ROUTES.append(("GET", "/api/readme", readme))


# ---- 60. A lecture: a notebook that walks through the twelve stations --------------------------
#
# `--lecture` lays a notebook into the served folder and opens it at an address (?lecture=1) where
# the page goes through its table LECTURE, one step for each press of the space bar. The cells that
# the table runs are these, by their ids.
#
#     Lecture.ipynb                        what happens
#     is not there                         it is written
#     has the cells of the lecture         it is opened as it is
#     is anything else                     it stays; the next name is Lecture1.ipynb

LECTURE_CELLS = {   # id -> (type, source)
    "lecture-title": ("markdown", "# What happens when you press Shift+Enter\n\n"
                      "Space goes on, Shift+Space or Backspace goes back, Esc ends the lecture."),
    "lecture-hello": ("code", "print('hello')\n6 * 7"),
    "lecture-wait": ("code", "import time\ntime.sleep(600)"),
    "lecture-yours": ("code", ""),
}


def lecture_notebook():
    made = {"code": {"execution_count": None, "outputs": []}}
    return {**new_notebook(), "cells": [
        {"cell_type": kind, "id": id, "metadata": {}, "source": source, **made.get(kind, {})}
        for id, (kind, source) in LECTURE_CELLS.items()]}


def is_lecture(contents, name):
    """Whether a file in the root is a notebook with the cells of the lecture."""
    try:
        with open(contents.existing(name), "rb") as file:
            cells = json.load(file)["cells"]
        return LECTURE_CELLS.keys() <= {cell.get("id") for cell in cells}
    except (Problem, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def lay_out_lecture(contents):
    """The name of the lecture's notebook in the root, which is written if need be. Raises OSError;
    no other file is written over."""
    data = contents.written(lecture_notebook(), None).data
    for number in itertools.count():
        name = f"Lecture{number or ''}.ipynb"
        path = os.path.join(contents.root, name)
        if not os.path.lexists(path):   # a link may lead to where nothing is yet
            with contextlib.suppress(FileExistsError):   # somebody took the name meanwhile
                write_atomically(path, data, refuse_existing)
                return name
        elif is_lecture(contents, name):
            return name


class LectureServer(SERVERS[-1]):
    """A server that may have a lecture: then its notebook is what a person opens."""
    lecture = None

    def address(self):
        if self.lecture is None:
            return super().address()
        return f"{self.url}notebooks/{self.lecture}?lecture=1&token={quote(self.access.token)}"


def prepare_lecture(server, arguments):
    """Begin with the lecture that the command line asks for."""
    if not arguments.lecture:
        return
    try:
        server.lecture = lay_out_lecture(server.contents)
    except OSError as problem:
        sys.exit(f"Cannot write the lecture's notebook into {server.contents.root}: "
                 f"{getattr(problem, 'strerror', None) or problem}. Serve a folder that you may "
                 "write to.")


SERVERS.append(LectureServer)
OPTIONS.append((["--lecture"], {"action": "store_true", "help":
    "open a notebook that walks through what happens when a cell runs, one step for each press of "
    "the space bar"}))
AT_START.append(prepare_lecture)


# ---- 61. Tables of text: CSV and the like, a page of rows at a time ------------------------------
#
# `GET /api/table/PATH?from=0&to=200` gives rows of a file that is a table in text, parsed by
# Python's csv: quotes, line ends in quotes. What separates its fields, whether its first row is a
# head and which columns are numbers is guessed from its beginning. A file may be larger than the
# memory. So only the place of each row is kept, and only as far as somebody has asked:
#
#     state      what is known                     what leads on
#     begun      the first rows, and how they are  each question reads on for READ_SECONDS
#     whole      the place of each row             the file changes: it is begun anew
#
# In the answer `count` is how many rows are known, `bytes` how far the file was read, of `size`.
# With `filter=TEXT`, the rows are those that have the text in a field, in large letters or small
# ones. Each question looks through more rows for READ_SECONDS; `count` is how many have it, `of`
# how many rows there are.

READ_SECONDS = 0.25             # of reading on, for one question
MOST_TABLES = 4                 # files whose rows are known; the one not asked for longest goes
MOST_GIVEN = 1_000              # rows, and columns, in one answer
MOST_SORTED = 3_000_000         # rows that are sorted
MOST_RECODED = 1 << 26          # bytes of a file in another encoding: it is read as a whole
MOST_FIELD = 500                # characters of a field in an answer
FIELD_LIMIT = 1 << 24           # characters of a field: no quote has closed a longer one
SEARCHED_AT_ONCE = 2_000        # rows that are looked through for a text
MOST_SEARCHES = 4               # of a file that are kept: two pages may look for two texts
GUESS_BYTES, GUESS_ROWS = 1 << 16, 200
SEPARATORS = ",;\t|"
NUMBER = re.compile(r"\s*[-+]?(?:[0-9][0-9.,'_ ]*|[.,][0-9]+)(?:[eE][-+]?[0-9]+)?\s*%?\s*")


class TextTable:
    """A file as a table: rows by number, and in an order. Raises Problem for what is no table."""

    def __init__(self, path, name):
        import csv
        self.csv, self.path, self.name = csv, path, name
        csv.field_size_limit(FIELD_LIMIT)
        self.lock, self.encoding = threading.Lock(), None
        self.size, self.note = os.path.getsize(path), ""

    def begin(self, encoding):
        """From the start, in an encoding whose line ends are bytes 10."""
        import array
        self.encoding, self.recoded = encoding, None
        with open(self.path, "rb") as file:
            head = file.read(GUESS_BYTES)
        coding = "utf-16" if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else encoding
        has_old_ends = b"\r" in head and b"\n" not in head
        if coding == "utf-16" or has_old_ends:
            head = self.recode(coding)[:GUESS_BYTES]
        elif b"\0" in head:
            raise Problem(400, f"{self.name} is not a text: it holds a byte 0")
        self.skip = len(codecs.BOM_UTF8) * head.startswith(codecs.BOM_UTF8)
        self.starts, self.position = array.array("Q"), self.skip
        self.is_whole, self.width, self.sorted = False, 0, (None, None)
        self.searches = {}           # text -> RowSearch, the latest last
        self.narrowed = None, None   # (the order, the text), and the rows with this text in it
        text = head[self.skip:].decode(self.encoding, "replace")
        self.separator = guessed_separator(self.csv, text, self.name)
        self.has_head = False
        sample = self.rows(0, GUESS_ROWS)
        self.has_head = is_head(sample)
        self.names = sample[0] if self.has_head else []
        self.kinds = kinds_of(sample[self.has_head:])

    def recode(self, coding):
        """The whole file as UTF-8 with usual line ends, in the memory."""
        if self.size > MOST_RECODED:
            raise Problem(400, f"{self.name} is too large for its encoding. Save it as UTF-8")
        with open(self.path, encoding=coding, errors="replace", newline=None) as file:
            self.recoded = file.read().encode("utf-8", "replace")
        self.encoding, self.size = "utf-8", len(self.recoded)
        return self.recoded

    def open(self):
        return io.BytesIO(self.recoded) if self.recoded is not None else open(self.path, "rb")

    def lines(self, file):
        """Its lines as text; `position` is where the next one begins."""
        for line in file:
            self.position += len(line)
            yield line.decode(self.encoding)

    def read_on(self, until_row, seconds=READ_SECONDS):
        """Find where rows begin, for so long, and until this row at least."""
        deadline = time.monotonic() + seconds
        with self.open() as file:
            file.seek(self.position)
            reader = self.csv.reader(self.lines(file), delimiter=self.separator)
            while not self.is_whole and (len(self.starts) < until_row
                                         or time.monotonic() < deadline):
                self.read_some(reader)

    def read_some(self, reader, count=500):
        """The next rows. An empty line is none."""
        for _ in range(count):
            start = self.position
            row = next(reader, None)
            if row is None:
                self.is_whole = True
                return
            if row:
                self.starts.append(start)
                self.width = max(self.width, len(row))

    def text_of(self, start, end):
        """(the text of rows, their numbers): as many of them as there are."""
        self.read_on(end, 0)
        numbers = range(*slice(start, end).indices(len(self.starts)))
        if not numbers:
            return "", numbers
        last = self.starts[numbers[-1] + 1] if numbers[-1] + 1 < len(self.starts) else self.position
        with self.open() as file:
            file.seek(self.starts[numbers[0]])
            return file.read(last - self.starts[numbers[0]]).decode(self.encoding), numbers

    def rows(self, start, end):
        """The fields of rows, by number, the head being one of them."""
        return [row for row in self.parsed(self.text_of(start, end)[0]) if row]

    def parsed(self, text):
        return self.csv.reader(io.StringIO(text, newline=""), delimiter=self.separator)

    def order(self, column, is_descending):
        """The numbers of all rows, in the order of a column; what is empty comes last."""
        while not self.is_whole and len(self.starts) <= MOST_SORTED:
            self.read_on(0, 1)
        if not self.is_whole:
            raise Problem(400, f"{self.name} has more than {MOST_SORTED:,} rows: too many to sort")
        if self.sorted[0] != (column, is_descending):
            self.sorted = (column, is_descending), self.sort(column, is_descending)
        return self.sorted[1]

    def sort(self, column, is_descending):
        with self.open() as file:
            file.seek(self.skip)
            text = io.TextIOWrapper(file, self.encoding, newline="")
            rows = filter(None, self.csv.reader(text, delimiter=self.separator))
            fields = [row[column] if column < len(row) else "" for row in rows]
        numbers = range(self.has_head, len(fields))
        is_number = column < len(self.kinds) and self.kinds[column] == "number"
        has_commas = self.separator != ","   # then a comma may be the decimal point
        keys = [number_of(field, has_commas) for field in fields] if is_number else fields
        given = [n for n in numbers if keys[n] not in ("", None)]
        missing = [n for n in numbers if keys[n] in ("", None)]
        return sorted(given, key=keys.__getitem__, reverse=is_descending) + missing

    def found(self, text, seconds=READ_SECONDS):
        """The numbers of rows that have a text in a field, as far as they are found in so long."""
        search = self.searches[text] = self.searches.pop(text, None) or RowSearch(self, text)
        if len(self.searches) > MOST_SEARCHES:
            del self.searches[next(iter(self.searches))]
        deadline = time.monotonic() + seconds
        while not search.is_over and time.monotonic() < deadline:
            search.go_on()
        return search.rows

    def page(self, *wish):
        """What is asked for, as the endpoint answers it. One question at a time."""
        with self.lock:
            try:
                if not self.encoding:
                    self.begin("utf-8")
                return self.told(*wish)
            except UnicodeDecodeError:
                if self.encoding != "utf-8":
                    raise
                self.note = "not UTF-8: read as Windows-1252"
                self.begin("cp1252" if is_decodable(self.path, "cp1252") else "latin-1")
                return self.told(*wish)
            except self.csv.Error as problem:
                raise Problem(400, f"{self.name} is no table: after row {len(self.starts):,}, "
                              f"{problem}. Open it with Edit") from None

    def chosen(self, sort, text):
        """The numbers of the rows in an order, of those with a text, or of both."""
        if not sort:
            return self.found(text)
        order = self.order(*sort)
        if text and self.narrowed[0] != (sort, text):
            found = {*self.found(text, math.inf)}
            self.narrowed = (sort, text), [n for n in order if n in found]
        return self.narrowed[1] if text else order

    def told(self, start, end, columns, sort, text):
        self.read_on(end + self.has_head)
        if sort or text:
            chosen = self.chosen(sort, text)[start:end]
            rows = [self.rows(n, n + 1)[0] for n in chosen]
        else:
            chosen = range(start + self.has_head, end + self.has_head)
            rows = self.rows(chosen.start, chosen.stop)
        names = [*self.names, *[""] * (self.width - len(self.names))]
        kinds = [*self.kinds, *["text"] * (self.width - len(self.kinds))]
        heads = [[name or str(n + 1), kind, kind == "number"]
                 for n, (name, kind) in enumerate(zip(names, kinds, strict=False))]
        cells = [[f"{n + 1 - self.has_head}", *map(shown_field, row[columns])]
                 for n, row in zip(chosen, rows, strict=False)]
        count = len(self.starts) - self.has_head
        known = {"count": count, "is_whole": self.is_whole, "bytes": self.position}
        return {"cells": cells, "columns": heads, "of": count, "width": self.width,
                "size": self.size, "separator": self.separator, "note": self.note,
                **(self.searches[text].known if text else known)}


class RowSearch:
    """The rows of a TextTable that have a text in a field, as far as it has looked."""

    def __init__(self, table, text):
        import array
        self.table, self.rows = table, array.array("Q")
        self.next = table.has_head   # the row to look at next
        self.wanted = text.casefold()
        self.is_plain = '"' not in text and "\n" not in text   # such a text stands so in the file

    @property
    def is_over(self):
        return self.table.is_whole and self.next >= len(self.table.starts)

    @property
    def known(self):
        """The same as a table tells of all its rows."""
        starts = self.table.starts
        place = self.table.position if self.next >= len(starts) else starts[self.next]
        return {"count": len(self.rows), "is_whole": self.is_over, "bytes": place}

    def go_on(self):
        """Look at the next rows. Where the text does not stand at all, no field can have it."""
        table, start = self.table, self.next
        text, numbers = table.text_of(start, start + SEARCHED_AT_ONCE)
        self.next += len(numbers)
        if self.is_plain and self.wanted not in text.casefold():
            return
        rows = filter(None, table.parsed(text))
        self.rows.extend(n for n, row in zip(numbers, rows, strict=True)
                         if any(self.wanted in field.casefold() for field in row))


def shown_field(field):
    return field if len(field) <= MOST_FIELD else field[:MOST_FIELD] + "…"


def guessed_separator(csv, text, name):
    """The sign that divides most rows into equally many fields, more than one; of a .tsv the
    tab."""
    if name.lower().endswith((".tsv", ".tab")):
        return "\t"
    lines = text.splitlines(True)
    lines = lines[:-1] or lines   # the last one may be cut off

    def quality(separator):
        rows = itertools.islice(csv.reader(lines, delimiter=separator), GUESS_ROWS)
        try:
            widths = collections.Counter(len(row) for row in rows if row)
        except csv.Error:   # a quote that the sample does not close
            return 0, 0
        width, count = max(widths.items(), key=lambda item: (item[1], item[0]), default=(1, 0))
        return (count / widths.total() if width > 1 else 0), width

    return max(SEPARATORS, key=quality)


def is_head(rows):
    """Has the first row names, where the others have values? All are there, and none is a
    number."""
    first = rows[0] if len(rows) > 1 else []
    return bool(first) and all(field.strip() and not NUMBER.fullmatch(field) for field in first)


def kinds_of(rows):
    """"number" or "text" for each column."""
    columns = itertools.zip_longest(*rows, fillvalue="")
    filled = ([field for field in column if field.strip()] for column in columns)
    return ["number" if fields and all(map(NUMBER.fullmatch, fields)) else "text"
            for fields in filled]


def number_of(field, has_decimal_commas):
    """A field as a number, whatever stands between its thousands; None when it is none."""
    text = re.sub(r"[\s'_%]", "", field)
    if has_decimal_commas and text.count(",") == 1 and text.rfind(",") > text.rfind("."):
        text = text.replace(".", "").replace(",", ".")
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def is_decodable(path, encoding):
    """Whether a file's beginning is text in this encoding."""
    with open(path, "rb") as file:
        head = file.read(GUESS_BYTES)
    try:
        head.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


TABLES = collections.OrderedDict()   # (path, its version) -> TextTable, oldest first
TABLES_LOCK = threading.Lock()


def text_table(handler, path):
    """Rows of a file: from, to; columns=FIRST,END; sort=COLUMN, descending; filter=TEXT."""
    absolute, info = handler.server.contents.look(path)
    if info is None or stat.S_ISDIR(info.st_mode):
        raise Problem(404, f"No such file: {path}")
    number = functools.partial(asked_number, handler)
    start, first = number("from", 0), number("first", 0)
    end, last = (min(number(name, begin + 100), begin + MOST_GIVEN)
                 for name, begin in (("to", start), ("last", first)))
    sort = (number("sort", 0), "descending" in handler.query) if "sort" in handler.query else None
    key = absolute, info.st_mtime_ns, info.st_size
    with TABLES_LOCK:
        table = TABLES.pop(key, None)
    table = table or TextTable(absolute, os.path.basename(path))
    with TABLES_LOCK:
        TABLES[key] = table
        while len(TABLES) > MOST_TABLES:
            TABLES.popitem(last=False)
    return table.page(start, end, slice(first, last), sort, handler.asked("filter", ""))


def asked_number(handler, name, default):
    text = handler.query.get(name, [str(default)])[0]
    if not DIGITS.fullmatch(text):
        raise Problem(400, f"{name} must be a number, not {text!r}")
    return int(text)


ROUTES += [("GET", r"/table(?:/.*)?", "page"), ("GET", r"/preview(?:/.*)?", "page"),
           ("GET", r"/api/table/(.+)", text_table)]


# ---- 62. Variables of other kernels -------------------------------------------------------------
#
# Our kernel tells the page what its variables are. Other Python kernels are sent the same code, as
# a program: the section of kernel.py, as far as it uses nothing else of that file.

VARIABLES_SECTION = re.compile(r"(?s)# ---- \d+\. Variables -.*?(?=\n# -- in this kernel --)")
VARIABLES_IMPORTS = ("collections", "contextlib", "contextvars", "itertools", "json", "math",
                     "sys", "threading", "types")


def variables_program(handler):
    path = os.path.join(HERE, "kernel.py")
    with open(path, encoding="utf-8") as file:
        section = VARIABLES_SECTION.search(file.read())
    if not section:
        raise Problem(404, f"{path} has no section Variables")
    imports = "".join(f"import {name}\n" for name in VARIABLES_IMPORTS)
    return {"program": f"{imports}from time import monotonic\n\n{section[0]}\n"}


ROUTES.append(("GET", "/api/variables", variables_program))


# ---- 63. Environments of the folder ------------------------------------------------------------
#
# A virtual environment in the served folder (`.venv`, `venv`, `env`) is offered as a kernel: our
# kernel.py, run by its Python. That needs pyzmq there; without it, the process that is started says
# with which command it comes: by pip, uv or ensurepip, whichever there is.
#
# A page starts the kernel that a notebook names when it is opened. A stranger's folder may hold a
# program that poses as a Python, and a notebook that names it. So the name has a part that only
# this machine can know, and such a kernel starts after somebody has chosen it here.

ENVIRONMENTS = (".venv", "venv", "env")
PYTHON_IN_ENVIRONMENT = os.path.join(*("bin", "python") if POSIX else ("Scripts", "python.exe"))
OLDEST_PYTHON = (3, 10)   # that kernel.py runs on
NEEDS_PYZMQ = ("The environment {name} has no pyzmq, which our kernel needs. Run this in a "
               "terminal, then start the kernel again:  {command}")


def install_command(python, has_pip, package):
    """What installs a package into a Python, for a terminal of this machine."""
    run, pip = f'"{python}" -m', f"pip install {package}"
    if has_pip:
        return f"{run} {pip}"
    if os.environ.get("UV") or shutil.which("uv"):   # `uv run` names its own
        return f'uv pip install --python "{python}" {package}'
    return f"{run} ensurepip && {run} {pip}"


def environment_specs(root):
    """{name: (spec, None)} of the virtual environments in this folder."""
    found = {}
    for name in ENVIRONMENTS:
        folder = os.path.join(root, name)
        version, python = python_version(folder), os.path.join(folder, PYTHON_IN_ENVIRONMENT)
        if version and os.path.exists(python):
            spec = environment_spec(name, folder, python, version)
            found[f"{name}-{known_here(root)}"] = (spec, None)
    return found


def python_version(folder):
    """(3, 12) of a virtual environment that can run kernel.py; None for any other folder. PEP 405
    says where it stands; uv and virtualenv call it version_info."""
    try:
        with open(os.path.join(folder, "pyvenv.cfg"), encoding="utf-8") as file:
            match = re.search(r"(?m)^version(?:_info)?\s*=\s*(\d+)\.(\d+)", file.read())
    except (OSError, ValueError):
        return None
    version = match and (int(match[1]), int(match[2]))
    return version if version and version >= OLDEST_PYTHON else None


def known_here(root):
    """Eight digits that a folder has on this machine, and nobody else can tell."""
    secret = f"{uuid.getnode()} {os.stat(root).st_ino} {os.path.realpath(root)}"
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def environment_spec(name, folder, python, version):
    """The kernel spec of a virtual environment."""
    spec = our_kernel.kernel_spec(f"Python {version[0]}.{version[1]} ({name})")
    options = [word for word in spec["argv"][1:] if word != "-P" or version >= (3, 11)]
    if not has_module(folder, version, "zmq"):
        command = install_command(python, has_module(folder, version, "pip"), "pyzmq")
        options = ["-c", f"raise SystemExit({NEEDS_PYZMQ.format(name=name, command=command)!r})"]
    programs = os.path.dirname(python).replace("$", "$$")   # `$` begins a variable in a spec
    return {**spec, "argv": [python, *options], "env": {
        "VIRTUAL_ENV": folder.replace("$", "$$"), "PATH": f"{programs}{os.pathsep}$PATH"}}


def has_module(folder, version, name):
    """Is this module installed in a virtual environment? Unknown, so maybe, where it uses the
    packages of the Python that it was made with as well."""
    with open(os.path.join(folder, "pyvenv.cfg"), encoding="utf-8") as file:
        is_open = re.search(r"include-system-site-packages\s*=\s*true", file.read(), re.I)
    inner = ("lib", f"python{version[0]}.{version[1]}") if POSIX else ("Lib",)
    return bool(is_open) or os.path.isdir(os.path.join(folder, *inner, "site-packages", name))


def offer_environments(server, arguments):
    OWN_SPECS.append(lambda: environment_specs(server.contents.root))


AT_START.append(offer_environments)


# ---- 64. The trash: what a page deletes can come back -------------------------------------------
#
# `GET /api/trash/FOLDER` tells whether files in it can go to the desktop's trash, and what that is
# called there ("" for no); `POST /api/trash/PATH` moves one, and `PUT /api/trash/PATH` takes back
# what was put there last of what lay at this path. `DELETE /api/contents/PATH` deletes for good:
# programs ask for that, too, and what they clean up is of no use in a trash.
#
#     the server runs on                     the file is             it goes
#     Linux or the like, without a desktop   anywhere                for good: nobody would look
#     Linux or the like, with one            on the home's disk      to the trash of freedesktop.org
#                                            on another disk         where send2trash takes it
#     Windows, macOS                         anywhere                where send2trash takes it
#
# Without send2trash (`pip install send2trash`) its rows are "for good". Moving to the trash is one
# rename; a trash on another file system would be a copy, of any size. Only the desktop gives back
# what send2trash has taken.

TRASH_NAMES = {"win32": "Recycle Bin", "darwin": "Trash"}   # sys.platform -> what users call it


def home_trash():
    """The folder of the user's trash; None where there is no desktop, and has been none."""
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    trash = os.path.join(data, "Trash")
    return trash if os.environ.get("XDG_CURRENT_DESKTOP") or os.path.isdir(trash) else None


def send2trash_way():
    try:
        from send2trash import send2trash
    except ImportError:
        return None
    return send2trash


def put_into(trash, absolute):
    """Move a file or a folder into a trash (freedesktop.org's specification 1.0): first what tells
    where it was, under a name that is free, then itself."""
    for kind in ("info", "files"):
        os.makedirs(os.path.join(trash, kind), mode=0o700, exist_ok=True)
    stem, extension = os.path.splitext(os.path.basename(absolute))
    told = (f"[Trash Info]\nPath={quote(os.fsencode(absolute))}\n"
            f"DeletionDate={datetime.now():%Y-%m-%dT%H:%M:%S}\n")
    for number in itertools.count(1):
        name = f"{stem}{f' {number}' if number > 1 else ''}{extension}"
        info, place = (os.path.join(trash, "info", f"{name}.trashinfo"),
                       os.path.join(trash, "files", name))
        with contextlib.suppress(FileExistsError), open(info, "x", encoding="ascii") as file:
            file.write(told)
            break
    try:
        refuse_existing(place)   # without its information: of a program that was killed
        os.rename(absolute, place)
    except OSError:
        os.remove(info)
        raise


def trash_way(absolute):
    """The function that moves this file to a trash; None when there is none."""
    if sys.platform in TRASH_NAMES:
        return send2trash_way()
    trash = home_trash()
    if trash is None:
        return None
    known = trash
    while not os.path.isdir(known):   # the first file makes it
        known = os.path.dirname(known)
    is_beside = os.lstat(absolute).st_dev == os.stat(known).st_dev
    return functools.partial(put_into, trash) if is_beside else send2trash_way()


def tell_trash(handler, folder):
    way = trash_way(handler.server.contents.existing(folder or ""))
    return {"name": TRASH_NAMES.get(sys.platform, "trash") if way else ""}


def move_to_trash(handler, path):
    contents = handler.server.contents
    absolute, checkpoint = contents.existing(path), contents.checkpoint_of(path)
    if os.path.realpath(absolute) == contents.root:
        raise Problem(400, "The root folder stays")
    contents.refuse_private(path, absolute)
    way = trash_way(absolute)
    if way is None:
        raise Problem(400, f"{path} was not deleted: this machine has no trash for it", "no trash")
    way(absolute)
    if os.path.isfile(checkpoint):   # else the next file of this name would have it
        os.remove(checkpoint)
    return 204, None


def latest_in(trash, absolute):
    """(what tells of it, where it lies) of what lay at this path and was put into the trash last;
    None when nothing is there."""
    info, stem = os.path.join(trash, "info"), os.path.splitext(os.path.basename(absolute))[0]
    told = [os.path.join(info, name) for name in (os.listdir(info) if os.path.isdir(info) else ())
            if name.startswith(stem) and name.endswith(".trashinfo")]
    for path in sorted(told, key=os.path.getmtime, reverse=True):
        name = os.path.basename(path).removesuffix(".trashinfo")
        place = os.path.join(trash, "files", name)
        with open(path, encoding="ascii", errors="replace") as file:
            lay_at = re.search("(?m)^Path=(.*)$", file.read())
        is_it = lay_at and unquote(lay_at[1], errors="surrogateescape") == absolute
        if is_it and os.path.lexists(place):
            return path, place
    return None


def take_from_trash(handler, path):
    """Back to its place, if that is free. Its folder must be there, as for a new file."""
    contents, trash = handler.server.contents, home_trash()
    absolute = contents.resolve(path)
    found = latest_in(trash, absolute) if trash and sys.platform not in TRASH_NAMES else None
    if found is None:
        raise Problem(404, f"{path} can be taken back only where it lies now: in the desktop's "
                           f"{TRASH_NAMES.get(sys.platform, 'trash')}")
    if os.path.lexists(absolute):
        raise Problem(409, f"{path} exists already")
    if not os.path.isdir(os.path.dirname(absolute)):
        raise Problem(404, f"No such folder: {os.path.dirname(path)}")
    told, place = found
    os.rename(place, absolute)
    os.remove(told)
    return contents.model(path, absolute)


ROUTES += [("GET", "/api/trash(?:/(.*))?", tell_trash),
           ("POST", "/api/trash/(.+)", move_to_trash),
           ("PUT", "/api/trash/(.+)", take_from_trash)]


# ---- 65. Welcome: a notebook that shows what one can do -----------------------------------------
#
# The page puts a copy of it into the user's folder, when it is asked to. Its cells run on a Python
# that has pyzmq and nothing else.

WELCOME_CELLS = (   # type, source
    ("markdown", """\
# Welcome to MiniJupyter

A notebook is text and code in cells. The code runs, and what comes of it stays below. This one is
yours: change it, break it, delete it.

**Click into the next cell and press `Shift`+`Enter`.** (Or rest the mouse on it, and press ▶.)"""),
    ("code", '6 * 7'),
    ("markdown", """\
## Two modes

- **`Enter`**, or a click into a cell: you write. `Tab` completes, `Shift`+`Tab` explains.
- **`Esc`**: letters are commands. `A` adds a cell above, `B` below, `D` `D` deletes, `Z` brings
  back, `M` makes it text.

`H` shows all keys. For the mouse there are tools at each cell, and *+ Code* between two.

The **kernel** is the Python that runs the cells and keeps their variables: ■ stops a cell, ↻ starts
the kernel afresh, and it forgets all variables."""),
    ("code", """\
import time

for step in range(1, 6):
    print("step", step, "of 5")
    time.sleep(0.4)   # while it runs, ■ stops it"""),
    ("markdown", """\
## Pictures

What a cell ends with is shown, pictures, too. This one needs nothing installed. For plots as you
know them, run `%pip install matplotlib` in a cell of its own."""),
    ("code", """\
from math import sin

from IPython.display import SVG

wave = " ".join(f"{x},{60 - 45 * sin(x / 25) * sin(x / 190):.1f}" for x in range(601))
SVG(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 120" width="600" height="120">'
    f'<polyline points="{wave}" fill="none" stroke="#4f7fe8" stroke-width="3"/></svg>')"""),
    ("markdown", """\
## Sliders

With ipywidgets a function gets controls, and runs again at each move."""),
    ("code", """\
try:
    from ipywidgets import interact
except ImportError:
    print("Sliders need ipywidgets. Run this in a cell of its own:  %pip install ipywidgets")
else:
    interact(lambda n: print("★" * n), n=(1, 40))"""),
    ("markdown", """\
## Under the hood

Press `Esc`, then `U`, and run the next cell: each arrow is a message between browser, server and
kernel. A click on one shows it down to its bytes, and the line of the program that sent it."""),
    ("code", 'print("on its way")'),
    ("markdown", """\
## And now

*Help*, **Open README as a notebook** tells how all of it works, in programs short enough to read.
*Help*, **All commands…** (`P`) finds everything else by name."""),
)


def welcome(handler):
    """The notebook, for the page that asks for it."""
    made = {"code": {"execution_count": None, "outputs": []}}
    return {**new_notebook(), "cells": [
        {"cell_type": kind, "id": f"welcome-{number}", "metadata": {}, "source": source,
         **made.get(kind, {})} for number, (kind, source) in enumerate(WELCOME_CELLS, 1)]}


ROUTES.append(("GET", "/api/welcome", welcome))


# ---- 66. A quick start -------------------------------------------------------------------------
#
# Python keeps a script's syntax tree for as long as it runs (7 MB here), but loads a module from
# the bytecode cache. So the server starts itself again as a module, except under a debugger. (Not
# commands: people wait for them, and a second start takes 80 ms.) On the way it has glibc ask for
# large pages: half the time of a copy of a large notebook or message is spent on faults of 4 kB
# pages. (Not in kernels: an idle one would have 2 MB more.)

def run_as_module():
    ours = {} if "GLIBC_TUNABLES" in os.environ else {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    start = (f"import os, sys; sys.path[0] = {HERE!r}; "
             f"[os.environ.pop(name) for name in {[*ours]}]; "
             "import minijupyter; minijupyter.main()")
    flags = sys.orig_argv[1:-len(sys.argv)]   # such as -S or -X
    os.execve(sys.executable, [sys.executable, *flags, "-c", start, *sys.argv[1:]],
              {**os.environ, **ours})


if __name__ == "__main__" and os.name == "posix" and not (
        {"bdb", "pydevd"} & sys.modules.keys() or {*sys.argv[1:2]} & COMMANDS.keys()):
    run_as_module()


# ==== End of Part II ====

if __name__ == "__main__":
    main()
