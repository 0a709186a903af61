#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["pyzmq"]
# ///
"""The notebook server: it serves the page, keeps the files, and stands between page and kernels.

Run:  python minijupyter.py [FOLDER]      (then open the address that it prints)

    browser                    this server                                   kernel process
    index.html  -- REST -->    Handler -> Contents, Kernels, Sessions
                <- WebSocket ->  Bridge  <- four ZeroMQ channels, signed ->  kernel.py, or any other
                                 Watcher <- iopub, the process's end ------

Sections: 1 Documents · 2 Contents · 3 Kernel specs · 4 Kernels · 5 Sessions · 6 WebSocket ·
7 The bridge · 8 HTTP · 9 main

Of a cell's journey it holds stations 2, 3 and 11: `FrameParser` puts the page's frames together,
`Bridge.to_kernel` signs the request and sends it down its channel, `Bridge.from_kernel` takes what
comes back, checks the signature and hands the JSON on as it came.

Left out on purpose: users, extensions, a database, a terminal. One person, one folder, one token.

Threads: *main* accepts connections; one thread per HTTP connection, which becomes the bridge's
when the connection turns into a WebSocket and then owns its ZeroMQ sockets; one *watcher* per
kernel process. Sources: Jupyter Server's REST API (jupyter_server, api.yaml), nbformat 4.5, RFC
9110 (HTTP), RFC 6455 (WebSocket), the Jupyter messaging specification 5.5.
"""
import argparse
import base64
import binascii
import contextlib
import errno
import functools
import gc
import hashlib
import hmac
import html
import json
import mimetypes
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

try:
    import zmq
except ImportError:
    sys.exit("MiniJupyter needs pyzmq: run `pip install pyzmq`.")

import kernel as our_kernel
from kernel import BadMessage, Session, to_json

__version__ = our_kernel.__version__
HERE = os.path.dirname(os.path.abspath(__file__))


class Problem(Exception):
    """A request that cannot be done: becomes a JSON error `{"message", "reason"}` with `status`."""

    def __init__(self, status, message, reason=None):
        super().__init__(message)
        self.status, self.message, self.reason = status, message, reason


def iso(seconds):
    """A time as Jupyter writes it: 2026-11-22T16:56:22.077384Z, always with microseconds."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def log(text):
    """A line for the terminal, if there still is one."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


# ---- 1. Documents: notebook files, bytes <-> dict ---------------------------------------------
#
# A notebook is a JSON file (nbformat 4). On disk long strings are lists of lines, so that a diff
# reads well; in the API they are whole strings. Reading joins them, writing splits them. Versions
# 2 and 3 are upgraded when read; a newer minor version than ours is kept as it is. What we do not
# know (keys, output types, MIME types) is carried along untouched.
#
# A browser cannot keep a file byte for byte: to JavaScript 1.0 and 1 are the same number. So a
# save is compared with what the file says: an untouched notebook is not written at all, and in a
# changed one every untouched cell stays as it stood. For that a file is read cell by cell, and the
# place of each is kept.

SHORT_MIME = {   # nbformat 3's names
    "text": "text/plain", "html": "text/html", "svg": "image/svg+xml", "png": "image/png",
    "jpeg": "image/jpeg", "latex": "text/latex", "json": "application/json",
    "javascript": "application/javascript"}
CELL_FIELDS = {  # cell_type -> what it must have, of which type
    "code": {"source": (str, list), "outputs": list},
    "markdown": {"source": (str, list)}, "raw": {"source": (str, list)}}
ID_MINOR = 5     # the minor version of nbformat 4 that gave cells an id
JSON = json.JSONDecoder(parse_constant=str)   # NaN, which JSON has not, is read as its name
to_text = json.JSONEncoder(ensure_ascii=False).encode


class NotANotebook(ValueError):
    """The text is no notebook that we can read; says what is wrong and where (a JSON pointer)."""


def is_json_mime(mime):
    return mime == "application/json" or mime.endswith("+json")


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


def map_strings(cell, convert, is_converted=lambda mime: not is_json_mime(mime)):
    """A copy of `cell` with `convert` applied to its source and to the text in its outputs."""
    if "source" in cell:
        cell = {**cell, "source": convert(cell["source"])}
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


class NotebookFile:
    """What a notebook file says, and where it says it. Raises NotANotebook.

    notebook = the JSON object, of version 4 and of a sound structure
    places = {key: slice of `text`}; for "cells" a list of them, one for each cell
    tail = what comes after the object: one newline, as a rule
    """

    def __init__(self, data):
        self.data, self.text, self.tail = data, "", ""
        self.notebook, self.places = {}, {}
        try:
            self.text = data.decode("utf-8-sig")
            self.read()
        except (ValueError, RecursionError) as problem:
            raise NotANotebook(f"the file is not JSON: {problem}") from None
        self.version = self.notebook.get("nbformat")
        if not isinstance(self.version, int):
            raise NotANotebook("the file is JSON, but not a notebook: it has no nbformat number")
        if self.version not in (2, 3, 4):
            raise NotANotebook(f"this is nbformat {self.version}; versions 2 to 4 can be read")
        if self.version < 4:
            self.notebook = upgrade(self.notebook)
        validate(self.notebook)

    def read(self):
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
        self.places[key] = slice(at, end)
        return end

    def read_cell(self, at):
        cell, end = JSON.raw_decode(self.text, at)
        self.notebook["cells"].append(cell)
        self.places["cells"].append(slice(at, end))
        return end

    @functools.cached_property
    def served(self):
        """The notebook as the API gives it: strings joined, ids in 4.5."""
        cells = [map_strings(cell, join) for cell in self.notebook["cells"]]
        if self.notebook.get("nbformat_minor", 0) >= ID_MINOR:
            cells = with_ids(cells)
        return {**self.notebook, "cells": cells}


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


def validate(notebook):
    """Raise NotANotebook with the JSON pointer of the first part that nobody could draw."""
    expect({"nbformat_minor": 0, **notebook}, "",
           {"cells": list, "metadata": dict, "nbformat_minor": int})
    for i, cell in enumerate(notebook["cells"]):
        where = f"/cells/{i}"
        expect(cell, where, {"cell_type": str, "metadata": dict})
        if cell["cell_type"] in CELL_FIELDS:   # other types may come with a later minor version
            expect(cell, where, CELL_FIELDS[cell["cell_type"]])
        expect({"outputs": [], **cell}, where, {"outputs": list})
        for j, output in enumerate(cell.get("outputs", ())):
            expect(output, f"{where}/outputs/{j}", {"output_type": str})


def expect(value, where, types):
    if not isinstance(value, dict):
        raise NotANotebook(f"{where} must be an object")
    for key, kind in types.items():
        if not isinstance(value.get(key), kind):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            problem = f"must be of type {names}" if key in value else "is missing"
            raise NotANotebook(f"{where}/{key} {problem}")


def join_old(text):
    """As nbformat 2 and 3 joined: their lists often hold lines without their ends."""
    if isinstance(text, list) and text and not text[0].endswith(("\n", "\r")):
        return "\n".join(text)
    return join(text)


def upgrade(notebook):
    """nbformat 2 or 3 as 4.5. Raises NotANotebook when it has not even their structure."""
    try:
        cells = [upgrade_cell(cell) for sheet in notebook.get("worksheets", [])
                 for cell in sheet["cells"]]
        metadata = {k: v for k, v in notebook.get("metadata", {}).items()
                    if k not in ("name", "signature")}
    except (TypeError, KeyError, AttributeError, ValueError) as problem:
        raise NotANotebook(f"a damaged notebook of nbformat {notebook['nbformat']}: "
                           f"{problem!r}") from None
    return {"cells": with_ids(cells), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def upgrade_cell(cell):
    kind, metadata = cell["cell_type"], dict(cell.get("metadata", {}))
    if kind == "code":
        if "collapsed" in cell:
            metadata["collapsed"] = bool(cell["collapsed"])
        return {"cell_type": "code", "metadata": metadata,
                "source": join_old(cell.get("input", "")),
                "execution_count": cell.get("prompt_number"),
                "outputs": [upgrade_output(output) for output in cell.get("outputs", [])]}
    source = join_old(cell.get("source", ""))
    if kind == "heading":
        source = "#" * int(cell.get("level", 1)) + " " + " ".join(source.split("\n"))
    return {"cell_type": "raw" if kind == "raw" else "markdown", "metadata": metadata,
            "source": source}


def upgrade_output(old):
    kind = {"pyout": "execute_result", "pyerr": "error"}.get(old["output_type"], old["output_type"])
    if kind == "stream":
        return {"output_type": kind, "name": old.get("stream", "stdout"),
                "text": join_old(old["text"])}
    if kind == "error":
        return {"output_type": kind, **{k: old[k] for k in ("ename", "evalue", "traceback")}}
    data = {SHORT_MIME[key]: join_old(value) for key, value in old.items() if key in SHORT_MIME}
    if "application/json" in data:
        data["application/json"] = json.loads(data["application/json"])
    count = {"execution_count": old.get("prompt_number")} if kind == "execute_result" else {}
    return {"output_type": kind, "data": data, "metadata": old.get("metadata", {}), **count}


def with_ids(cells):
    """The cells, each with a unique id; a missing one is made from place and source, so the same
    file gives the same ids every time."""
    seen, result = set(), []
    for number, cell in enumerate(cells):
        if not isinstance(cell.get("id"), str) or cell["id"] in seen:
            text = f"{number} {join(cell.get('source', ''))}"
            cell = {**cell, "id": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]}
        seen.add(cell["id"])
        result.append(cell)
    return result


def read_notebook(data):
    """The notebook in the bytes of a file, as the API gives it."""
    return NotebookFile(data).served


def new_notebook():
    return {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": ID_MINOR}


class Layout:
    """How JSON is laid out in a notebook file: as Jupyter does it, or as an older file has it."""

    def __init__(self, file=None):
        self.newline, self.step, self.is_sorted, self.start, self.end = "\n", " ", True, "", "\n"
        if file:
            match = re.match(r"\s*\{(\r?\n|)([ \t]*)", file.text)
            self.newline, self.step = match.groups()
            self.is_sorted = [*file.places] == sorted(file.places)
            self.start = "\ufeff" if file.data.startswith(b"\xef\xbb\xbf") else ""
            self.end = file.tail

    def write(self, value, depth):
        if isinstance(value, dict):
            return self.enclose("{}", depth, [f"{to_text(key)}: {self.write(part, depth + 1)}"
                                              for key, part in self.in_order(value)])
        if isinstance(value, list):
            return self.enclose("[]", depth, [self.write(part, depth + 1) for part in value])
        return to_text(value)

    def in_order(self, members):
        return sorted(members.items()) if self.is_sorted else members.items()

    def enclose(self, brackets, depth, texts):
        if not texts:
            return brackets
        outer = self.newline + self.step * depth
        inner = outer + self.step
        return brackets[0] + inner + f",{inner}".join(texts) + outer + brackets[1]


def write_notebook(notebook, old=None):
    """The bytes of a notebook file that says what `notebook` says. What `old`, the bytes that are
    on disk now, says already is left as it stands there. Raises NotANotebook."""
    validate(notebook)
    try:
        file = file_or_none(old)
        if file and same(file.served, notebook):
            return old
        return rewritten(notebook, file if file and file.version == 4 else None)
    except RecursionError:
        raise NotANotebook("it is nested too deep") from None


def file_or_none(data):
    try:
        return NotebookFile(data) if data and not data.isspace() else None
    except NotANotebook:
        return None


def rewritten(notebook, file):
    """The bytes of a changed notebook, with the texts of what did not change."""
    layout = Layout(file)
    texts = {"cells": layout.enclose("[]", 1, [*cell_texts(notebook["cells"], file, layout)])}
    for key, value in notebook.items():
        if key != "cells":
            is_kept = file and key in file.places and same(file.notebook[key], value)
            texts[key] = file.text[file.places[key]] if is_kept else layout.write(value, 1)
    keys = sorted(texts) if layout.is_sorted else dict.fromkeys([*file.places, *texts])
    members = [f"{to_text(key)}: {texts[key]}" for key in keys if key in texts]
    return encode_text(layout.start + layout.enclose("{}", 0, members) + layout.end)


def cell_texts(cells, file, layout):
    """Yield the text of each cell: where nobody changed it, what stands in the file."""
    known = {}   # (id, source) -> cells of the file that look alike, the first one last
    if file:
        on_disk = zip(file.served["cells"], file.notebook["cells"], file.places["cells"],
                      strict=True)
        for served, cell, place in reversed([*on_disk]):
            if served.get("id") == cell.get("id"):   # an id that was made up is to be written
                known.setdefault(looks(cell), []).append((served, file.text[place]))
    for cell in cells:
        alike = known.get(looks(cell))
        served, text = alike.pop() if alike else (None, None)
        is_kept = served is not None and same(served, cell)
        yield text if is_kept else layout.write(map_strings(cell, split, is_split_mime), 2)


def looks(cell):
    return str(cell.get("id")), str(join(cell.get("source")))


def encode_text(text):
    """A JSON text in UTF-8, which has no halves of surrogate pairs: they are written as escapes."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", text).encode()


def same(one, other):
    """True when a JavaScript client cannot tell `other` from `one`, which stands in a file."""
    if isinstance(one, str):
        return one == other
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() \
            and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return in_javascript(one) == in_javascript(other)


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


# ---- 2. Contents: files and folders below the root --------------------------------------------
#
# The API's paths are relative to the root, with slashes. `resolve` is the one door from such a
# path to the disk: nothing outside the root, no hidden file and no link that leads out passes it.
# A file is written whole or not at all: into a temporary file beside it, which then takes its
# place.

UNTITLED = {"notebook": ("Untitled", ".ipynb"), "file": ("untitled", ".txt"),
            "directory": ("Untitled Folder", "")}


NOT_THERE = "not there"     # what a file must be for a save that may overwrite nothing
CHECKPOINT = "checkpoint"   # the id of a file's one checkpoint


class Contents:
    """Files as the models of Jupyter's contents API. The methods raise Problem, or the OSError of
    the disk, which the HTTP section turns into a status."""

    def __init__(self, root):
        self.root = os.path.realpath(root)
        self.lock = threading.Lock()   # between the look at a file and its replacement

    def resolve(self, path):
        """The absolute path on disk of an API path that need not exist."""
        names = [name for name in path.split("/") if name]
        absolute = os.path.join(self.root, *names)
        if not all(map(is_visible, names)):
            raise Problem(404, f"No such file or folder: {path}")
        return self.kept_inside(absolute, path)

    def kept_inside(self, absolute, path):
        """`absolute`, unless it leads out of the root, or to a pipe or the like."""
        is_odd = os.path.exists(absolute) and not os.path.isfile(absolute) \
            and not os.path.isdir(absolute)
        if is_odd or not is_within(os.path.realpath(absolute), self.root):
            raise Problem(404, f"No such file or folder: {path}")
        return absolute

    def existing(self, path):
        absolute = self.resolve(path)
        if not os.path.exists(absolute):
            raise Problem(404, f"No such file or folder: {path}")
        return absolute

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
                model.update(hash=hashlib.sha256(data).hexdigest(), hash_algorithm="sha256")
            if content:
                model.update(self.content(path, model["type"], form, data))
        return model

    def model(self, path, absolute):
        """The contents model of something that exists, without its content."""
        info = os.stat(absolute)
        path = "/".join(name for name in path.split("/") if name)
        kind = ("directory" if stat.S_ISDIR(info.st_mode) else
                "notebook" if path.endswith(".ipynb") else "file")
        return {"name": path.rpartition("/")[2], "path": path, "type": kind,
                "created": iso(info.st_ctime), "last_modified": iso(info.st_mtime),
                "size": None if kind == "directory" else info.st_size,
                "writable": os.access(absolute, os.W_OK),
                "mimetype": (mimetypes.guess_type(path)[0] if kind == "file" else None),
                "content": None, "format": None, "hash": None, "hash_algorithm": None}

    def listing(self, path, absolute):
        """Models of a folder's visible files and folders, in the order of their names."""
        models = []
        for name in sorted(os.listdir(absolute), key=str.casefold):
            below = os.path.join(absolute, name)
            is_ours = is_within(os.path.realpath(below), self.root)
            if is_visible(name) and is_ours and (os.path.isdir(below) or os.path.isfile(below)):
                models.append(self.model(f"{path}/{name}", below))
        return models

    def content(self, path, kind, form, data):
        """content, format and mimetype of a file's bytes. Without `form`, text when it is UTF-8."""
        if kind == "notebook":
            try:
                return {"content": read_notebook(data), "format": "json"}
            except NotANotebook as problem:
                text = f"Unreadable notebook {path}: {problem}"
                raise Problem(400, text, "bad notebook") from None
        guessed = mimetypes.guess_type(path)[0]
        if form != "base64":
            try:
                return {"content": data.decode(), "format": "text",
                        "mimetype": guessed or "text/plain"}
            except UnicodeDecodeError:
                if form == "text":
                    raise Problem(400, f"{path} is not UTF-8 text", "bad format") from None
        return {"content": base64.b64encode(data).decode(), "format": "base64",
                "mimetype": guessed or "application/octet-stream"}

    def read(self, absolute):
        with open(absolute, "rb") as file:
            return file.read()

    def save(self, path, model, expected=None):
        """Write a model's content. `expected` is the hash that the file must have now, "*" (any) or
        NOT_THERE; otherwise Problem 412 (RFC 9110 13.1). Returns (new model, was it created)."""
        absolute, kind = self.resolve(path), model.get("type")
        if kind not in UNTITLED:
            raise Problem(400, "type must be notebook, file or directory")
        with self.lock:
            is_new = not os.path.exists(absolute)
            if kind == "directory":
                os.makedirs(absolute, exist_ok=True)
                return self.model(path, absolute), is_new
            if os.path.isdir(absolute):
                raise Problem(400, f"{path} is a folder")
            old = None if is_new else self.read(absolute)
            self.refuse_conflict(path, old, expected)
            data = self.encode(path, model, old)
            if data != old:
                write_atomically(absolute, data)
        new = self.model(path, absolute)
        new.update(type=kind, hash=hashlib.sha256(data).hexdigest(), hash_algorithm="sha256")
        return new, is_new

    def refuse_conflict(self, path, old, expected):
        if expected == NOT_THERE and old is not None:
            raise Problem(412, f"{path} exists already", "conflict")
        if expected in (None, NOT_THERE):
            return
        if old is None:
            raise Problem(412, f"{path} is no longer on disk", "conflict")
        if expected not in ("*", hashlib.sha256(old).hexdigest()):
            raise Problem(412, f"{path} was changed on disk since it was opened", "conflict")

    def encode(self, path, model, old):
        """The bytes that a model's content becomes on disk."""
        content, kind, form = model.get("content"), model["type"], model.get("format")
        try:
            if kind == "notebook":
                is_new = content is None and not old   # without content only a new file may be
                return write_notebook(new_notebook() if is_new else content, old)
            if form == "base64":
                return base64.b64decode(content or "", validate=True)
            return (content or "").encode()
        except NotANotebook as problem:
            raise Problem(400, f"Not saved, this is no valid notebook: {problem}") from None
        except (binascii.Error, TypeError, AttributeError, UnicodeEncodeError) as problem:
            raise Problem(400, f"Not saved, the content of {path} is not {form or 'text'}: "
                               f"{problem}") from None

    def save_chunk(self, path, model):
        """Write one chunk of a large upload: number 1 begins the file anew, -1 is the last one.

        The chunks gather in a hidden file beside it, which takes its place at the end.
        """
        absolute, number = self.resolve(path), model["chunk"]
        if model.get("type") != "file" or model.get("format") not in ("text", "base64"):
            raise Problem(400, "Only files of format text or base64 can come in chunks")
        folder, name = os.path.split(absolute)
        part = self.kept_inside(os.path.join(folder, f".{name}.upload"), path)
        data = self.encode(path, model, None)
        with self.lock:
            is_new = not os.path.exists(absolute)
            with open(part, "wb" if number == 1 else "ab") as file:
                file.write(data)
            if number == -1:
                os.replace(part, absolute)
        return self.model(path, absolute if number == -1 else part), is_new and number == -1

    # -- checkpoints: one per file, beside it in .ipynb_checkpoints --

    def checkpoint_path(self, path):
        folder, name = os.path.split(self.existing(path))
        stem, extension = os.path.splitext(name)
        saved = os.path.join(folder, ".ipynb_checkpoints", f"{stem}-checkpoint{extension}")
        return self.kept_inside(saved, path)

    def checkpoints(self, path):
        """The list of a file's checkpoints: one, or none."""
        saved = self.checkpoint_path(path)
        return [self.checkpoint_model(saved)] if os.path.exists(saved) else []

    def checkpoint_model(self, saved):
        return {"id": CHECKPOINT, "last_modified": iso(os.stat(saved).st_mtime)}

    def create_checkpoint(self, path):
        """Keep the file as it is on disk now."""
        saved = self.checkpoint_path(path)
        os.makedirs(os.path.dirname(saved), exist_ok=True)
        write_atomically(saved, self.read(self.existing(path)))
        return self.checkpoint_model(saved)

    def restore_checkpoint(self, path, id):
        with self.lock:
            write_atomically(self.resolve(path), self.read(self.checkpoint_of(path, id)))

    def delete_checkpoint(self, path, id):
        os.remove(self.checkpoint_of(path, id))

    def checkpoint_of(self, path, id):
        saved = self.checkpoint_path(path)
        if id != CHECKPOINT or not os.path.exists(saved):
            raise Problem(404, f"{path} has no checkpoint {id}")
        return saved

    def create(self, folder, kind="file", extension=""):
        """A new, empty file, notebook or folder with a name of its own."""
        stem, usual = UNTITLED.get(kind, UNTITLED["file"])
        if not os.path.isdir(self.existing(folder)):
            raise Problem(400, f"{folder} is not a folder")
        with self.lock:
            space = " " if kind == "directory" else ""
            path = self.free_name(folder, stem, extension or usual, space, 0)
            if kind == "directory":
                os.mkdir(self.resolve(path))
            else:
                write_atomically(self.resolve(path),
                                 write_notebook(new_notebook()) if kind == "notebook" else b"")
        return self.model(path, self.resolve(path))

    def free_name(self, folder, stem, extension, joint, number):
        while True:
            name = f"{stem}{joint}{number}{extension}" if number else stem + extension
            path = f"{folder}/{name}".lstrip("/")
            if not os.path.lexists(self.resolve(path)):
                return path
            number += 1

    def copy(self, source, folder):
        """A copy of a file, named `name-Copy1.ext`."""
        absolute = self.existing(source)
        if os.path.isdir(absolute):
            raise Problem(400, f"{source} is a folder")
        stem, extension = os.path.splitext(os.path.basename(source))
        stem = re.sub(r"-Copy\d*$", "", stem)
        with self.lock:
            path = self.free_name(folder, f"{stem}-Copy", extension, "", 1)
            write_atomically(self.resolve(path), self.read(absolute))
        return self.model(path, self.resolve(path))

    def rename(self, path, new_path):
        """Move a file or folder; never over another one."""
        old, new = self.existing(path), self.resolve(new_path)
        if not new_path.strip("/") or os.path.realpath(old) == self.root:
            raise Problem(400, "A new path is needed")
        with self.lock:
            if os.path.lexists(new) and not os.path.samefile(old, new):
                raise Problem(409, f"{new_path} exists already")
            if not os.path.isdir(os.path.dirname(new)):
                raise Problem(404, f"No such folder: {os.path.dirname(new_path)}")
            saved = self.checkpoint_path(path)
            os.rename(old, new)
            if os.path.exists(saved):   # it goes along
                os.makedirs(os.path.dirname(self.checkpoint_path(new_path)), exist_ok=True)
                os.replace(saved, self.checkpoint_path(new_path))
        return self.model(new_path, new)

    def delete(self, path):
        """Delete a file or an empty folder."""
        absolute = self.existing(path)
        if os.path.realpath(absolute) == self.root:
            raise Problem(400, "The root folder stays")
        if not os.path.isdir(absolute) or os.path.islink(absolute):
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.checkpoint_path(path))
            return os.remove(absolute)
        if {*os.listdir(absolute)} - {".ipynb_checkpoints", "__pycache__", ".DS_Store"}:
            raise Problem(400, f"{path} is not empty (it may hold hidden files): "
                               "delete what is in it first")
        shutil.rmtree(absolute)


def is_within(real, root):
    """True when `real` is `root` or below it; both are real paths."""
    return real == root or real.startswith(os.path.join(root, ""))


def is_visible(name):
    """False for hidden files and for what is no file name: with NUL, "\\" or half a surrogate."""
    is_plain = name.encode("utf-8", "replace").decode() == name
    return is_plain and not name.startswith(".") and not {"\0", "\\"} & {*name} \
        and name != "__pycache__"


def write_atomically(path, data):
    """Replace a file's bytes or, if that fails, change nothing. Mode and symbolic link stay."""
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".saving", dir=folder)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode_for(target))
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def mode_for(path):
    """The permissions of the file at `path`, or what a new file gets there."""
    if os.path.exists(path):
        return stat.S_IMODE(os.stat(path).st_mode)
    return 0o666 & ~UMASK


UMASK = os.umask(0o022)
os.umask(UMASK)


# ---- 3. Kernel specs: which kernels there are -------------------------------------------------
#
# A kernel spec is a folder `kernels/NAME/` with a `kernel.json` in one of Jupyter's data folders:
# the command that starts a kernel, its language, its name for people. Our own needs no folder.

JUPYTER_DATA = our_kernel.data_folder()
RUNTIME = os.environ.get("JUPYTER_RUNTIME_DIR") or os.path.join(JUPYTER_DATA, "runtime")
DEFAULT_KERNEL = "python3"


def spec_folders():
    """Every data folder's `kernels`, in Jupyter's order: the first that has a name wins."""
    listed = [path for path in os.environ.get("JUPYTER_PATH", "").split(os.pathsep) if path]
    own = [os.path.join(sys.prefix, "share", "jupyter"), JUPYTER_DATA]
    system = ["/usr/local/share/jupyter", "/usr/share/jupyter"] if os.name == "posix" else []
    return [os.path.join(path, "kernels") for path in (*listed, *own, *system)]


def find_specs():
    """{name: (spec, folder)}; ours is `python3`, an installed one of that name comes beside it."""
    specs = {DEFAULT_KERNEL: (our_kernel.kernel_spec("Python 3"), None)}
    for folder in spec_folders():
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            spec = read_spec(os.path.join(folder, name, "kernel.json"))
            key = name.lower() if name.lower() != DEFAULT_KERNEL else f"{DEFAULT_KERNEL}-installed"
            if spec and key not in specs:
                specs[key] = (spec, os.path.join(folder, name))
    return specs


def read_spec(path):
    """A kernel.json with all of its fields, or None: a broken one must not hide the others."""
    try:
        with open(path, encoding="utf-8") as file:
            spec = json.load(file)
        if not isinstance(spec["argv"], list) or not spec["argv"]:
            raise ValueError("argv must be a list of words")
        return {"interrupt_mode": "signal", "env": {}, "metadata": {}, **spec,
                "display_name": str(spec["display_name"]), "language": str(spec["language"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as problem:
        log(f"Ignored the kernel spec {path}: {problem!r}")
        return None


def fill_in(argv, values):
    """argv with `{connection_file}` and the like replaced; a plain `python` is this Python."""
    words = [re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), word) for word in argv]
    if words[0] in ("python", "python3", f"python3.{sys.version_info[1]}"):
        words[0] = sys.executable
    return words


# ---- 4. Kernels: processes, and who watches them ----------------------------------------------
#
# A kernel is started with a connection file that names five ports and a key. From then on one
# thread watches that process: it hears iopub (busy or idle?), what the process writes on its own
# stderr, and its end. What the watcher has to say to the pages (that the kernel died) it publishes
# on an in-process socket as a signed `status` message; the bridges listen there as they listen to
# iopub.

CHANNELS = {   # channel -> socket type of the client's end; the kernel has the other one
    "iopub": zmq.SUB, "shell": zmq.DEALER, "stdin": zmq.DEALER, "control": zmq.DEALER}
ZMQ = zmq.Context()
ZMQ.set(zmq.MAX_SOCKETS, 65_536)
SHUTDOWN_SECONDS = 2.5    # after each of: request, SIGTERM; as jupyter_client does
NOTICE = b"minijupyter"   # the iopub topic of what the watcher says in the kernel's stead
TAIL = 4_000              # characters of a kernel's own stderr that are kept for an explanation
# Their busy and idle say nothing about running code; a frontend sends them all the time.
QUIET_REQUESTS = {"kernel_info_request", "comm_info_request", "is_complete_request",
                  "complete_request", "inspect_request", "history_request", "interrupt_request",
                  "shutdown_request"}


class Kernel:
    """One kernel: its process, its connection, its state."""

    def __init__(self, name, spec, folder, cwd, path=""):
        self.id = str(uuid.uuid4())
        self.name, self.spec, self.folder, self.cwd, self.path = name, spec, folder, cwd, path
        self.state, self.reason, self.connections = "starting", None, 0
        self.last_activity = time.time()
        self.intent = None        # why the process is about to end: "restart", "shutdown" or None
        self.is_gone = False      # it will not be started again
        self.lock = threading.Lock()
        self.connection = new_connection(name, path)
        self.connection_file = os.path.join(RUNTIME, f"kernel-{self.id}.json")
        self.session = Session(self.connection["key"], username="server")
        self.notices = ZMQ.socket(zmq.PUB)   # the watcher's voice
        self.notices.bind(self.notices_endpoint)
        self.process, self.ended = None, threading.Event()
        self.ended.set()

    @property
    def notices_endpoint(self):
        return f"inproc://kernel-{self.id}"

    def model(self):
        model = {"id": self.id, "name": self.name, "last_activity": iso(self.last_activity),
                 "execution_state": self.state, "connections": self.connections}
        return {**model, "reason": self.reason} if self.reason else model

    def launch(self):
        """Write the connection file and start the process. Raises Problem 500."""
        write_secret(self.connection_file, json.dumps(self.connection, indent=1))
        argv = fill_in(self.spec["argv"], {
            "connection_file": self.connection_file, "resource_dir": self.folder or HERE,
            "prefix": sys.prefix})
        try:
            self.process = subprocess.Popen(
                argv, cwd=self.cwd, env=self.environment(), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as problem:
            self.state, self.reason = "dead", f"The kernel {self.name} cannot be started: {problem}"
            raise Problem(500, self.reason) from None
        self.state, self.reason, self.intent = "starting", None, None
        self.ended = threading.Event()
        threading.Thread(target=Watcher(self).run, name="watcher", daemon=True).start()

    def environment(self):
        env = {**os.environ, "JPY_PARENT_PID": str(os.getpid()), "JPY_SESSION_NAME": self.path}
        for name, value in self.spec["env"].items():   # $NAME stands for a variable's value
            env[name] = re.sub(r"\$\{(\w+)\}|\$(\w+)",
                               lambda m: os.environ.get(m[1] or m[2], m[0]), value)
        return env

    def connect(self, channel, identity=b""):
        """A client's socket, connected to a channel; it belongs to the calling thread."""
        new = ZMQ.socket(CHANNELS[channel])
        new.linger, new.rcvhwm, new.sndhwm = 0, 0, 0
        new.reconnect_ivl = 20    # milliseconds: a kernel that is just starting is found at once
        if channel == "iopub":
            new.subscribe(b"")
        elif identity:
            new.identity = identity
        port = self.connection[f"{channel}_port"]
        new.connect(f"{self.connection['transport']}://{self.connection['ip']}:{port}")
        return new

    def request_on_control(self, msg_type, content, seconds):
        """Send a request on control and wait for its reply; True when one came in time."""
        with contextlib.closing(self.connect("control")) as control:
            message = self.session.message(msg_type, content)
            control.send_multipart(self.session.pack(message))
            return bool(control.poll(int(seconds * 1000)))

    def status_message(self, state):
        """The parts of a `status` message that the kernel itself cannot send any more."""
        reason = {"reason": self.reason or "It was shut down."} if state == "dead" else {}
        content = {"execution_state": state, **reason}
        return self.session.pack(self.session.message("status", content))

    def interrupt(self):
        """Interrupt the running cell, by signal or by message as the spec says."""
        if self.spec["interrupt_mode"] == "message":
            self.request_on_control("interrupt_request", {}, 1)
        else:
            self.send_signal(signal.SIGINT)

    def send_signal(self, number):
        """Signal the kernel and its children; they are a process group of their own."""
        if self.ended.is_set():
            return   # by now the number may be another process's
        with contextlib.suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)

    def stop(self, intent):
        """End the process in the specification's order: request, SIGTERM, SIGKILL."""
        self.intent = intent
        if not self.ended.is_set():
            self.request_on_control("shutdown_request", {"restart": intent == "restart"}, 1)
        for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
            if self.ended.wait(SHUTDOWN_SECONDS):
                break
            self.send_signal(number)
        self.ended.wait()

    def restart(self):
        """A new process on the same ports: the clients stay connected."""
        with self.lock:
            if self.is_gone:
                raise Problem(404, f"Kernel does not exist: {self.id}")
            self.state = "restarting"
            self.stop("restart")
            self.launch()

    def shutdown(self):
        with self.lock:
            self.is_gone = True
            self.stop("shutdown")
            self.forget()

    def forget(self):
        self.notices.close(linger=1000)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.connection_file)


class Watcher:
    """The thread that follows one process of a kernel from its start to its end."""

    def __init__(self, kernel):
        self.kernel, self.process = kernel, kernel.process
        self.tail = ""   # the last that the process wrote on its own stdout or stderr

    def run(self):
        iopub, shell = self.kernel.connect("iopub"), self.kernel.connect("shell")
        output = self.process.stdout
        os.set_blocking(output.fileno(), False)
        poller = zmq.Poller()
        for source in (iopub, shell, output.fileno()):
            poller.register(source, zmq.POLLIN)
        end = watch_process(self.process, poller)
        # Its answer says that the kernel has started.
        shell.send_multipart(self.kernel.session.pack(
            self.kernel.session.message("kernel_info_request", {})))
        while self.process.poll() is None:
            # Without a pidfd the end is looked for twice a second.
            ready = dict(poller.poll(None if end else 500))
            if shell in ready and shell.recv_multipart() and self.kernel.state == "starting":
                self.kernel.state = "idle"
            if iopub in ready:
                self.hear(iopub)
            if output.fileno() in ready and not self.read(output):
                poller.unregister(output.fileno())
        self.read(output)
        if end:
            os.close(end)
        output.close()
        iopub.close()
        shell.close()
        try:
            self.tell_end()
        finally:
            self.kernel.ended.set()   # whoever stops the kernel waits for this

    def hear(self, iopub):
        """Learn the kernel's state from the `status` messages that running code causes."""
        try:
            message = self.kernel.session.unpack(iopub.recv_multipart())
        except BadMessage as problem:
            return log(f"kernel {self.kernel.id}: dropped a message on iopub: {problem}")
        if message["header"]["msg_type"] != "status":
            return
        state = message["content"].get("execution_state")
        parent = message["parent_header"].get("msg_type")
        if parent not in QUIET_REQUESTS and state in ("busy", "idle"):
            self.kernel.state, self.kernel.last_activity = state, time.time()

    def read(self, output):
        """Pass on what the process says itself; False at the end of the file."""
        try:
            data = os.read(output.fileno(), 65_536)
        except BlockingIOError:
            return True
        text = data.decode("utf-8", "replace")
        self.tail = (self.tail + text)[-TAIL:]
        if text.strip():
            log(text.rstrip())
        return bool(data)

    def tell_end(self):
        """Publish that the process has ended, and why, to every page."""
        kernel = self.kernel
        if kernel.intent == "restart":
            self.publish("restarting")
        else:
            if kernel.intent is None:
                kernel.reason = self.explain()
                log(f"kernel {kernel.id} ({kernel.name}): {kernel.reason}")
            kernel.state = "dead"
            self.publish("dead")

    def explain(self):
        code, said = self.process.returncode, self.tail.strip()
        how = (f"was ended by signal {-code} ({signal.strsignal(-code)})" if code < 0
               else f"ended with exit code {code}")
        return f"The kernel process {how}" + (f":\n{said}" if said else ".")

    def publish(self, state):
        self.kernel.notices.send_multipart([NOTICE, *self.kernel.status_message(state)])


def watch_process(process, poller):
    """Let `poller` wake when the process ends, where the system can; returns a descriptor."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return None
    poller.register(descriptor, zmq.POLLIN)
    return descriptor


def new_connection(name, path):
    """The fields of a connection file, with five free ports."""
    ports = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
    with contextlib.ExitStack() as open_sockets:
        taken = [open_sockets.enter_context(socket.socket()) for _ in ports]
        for sock in taken:   # all open at once, so that no two get the same port
            sock.bind(("127.0.0.1", 0))
        numbers = [sock.getsockname()[1] for sock in taken]
    return {**dict(zip(ports, numbers, strict=True)), "ip": "127.0.0.1", "transport": "tcp",
            "key": secrets.token_hex(32), "signature_scheme": "hmac-sha256", "kernel_name": name,
            "jupyter_session": path}


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
        self.all = {}   # id -> Kernel

    def start(self, name=None, path=""):
        """Start the kernel called `name` in the folder of `path`. Raises Problem."""
        name = name or DEFAULT_KERNEL
        specs = find_specs()
        if name not in specs:
            raise Problem(501, f"There is no kernel called {name}; there are: {', '.join(specs)}")
        new = Kernel(name, *specs[name], cwd=self.folder_of(path), path=path)
        self.all[new.id] = new
        try:
            new.launch()
        except Problem:
            del self.all[new.id]
            new.forget()
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
        threads = [threading.Thread(target=kernel.shutdown) for kernel in list(self.all.values())]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.all.clear()


# ---- 5. Sessions: which file belongs to which kernel ------------------------------------------
#
# REST calls the tie between a path and a kernel a session. (A message's session is another thing:
# the id of the process that sent it.) Opening the same notebook again finds its session and its
# kernel.

class Sessions:
    """The ties, by id: {"id", "path", "name", "type", "kernel": a Kernel}."""

    def __init__(self, kernels):
        self.kernels = kernels
        self.all = {}
        self.lock = threading.Lock()

    def model(self, session):
        model = {**session, "kernel": session["kernel"].model()}
        if session["type"] == "notebook":
            model["notebook"] = {"path": session["path"], "name": session["name"]}
        return model

    def list(self):
        return [self.model(session) for session in list(self.all.values())
                if session["kernel"].id in self.kernels.all]

    def get(self, id):
        session = self.all.get(id)
        if session is None or session["kernel"].id not in self.kernels.all:
            raise Problem(404, f"Session does not exist: {id}")
        return session

    def create(self, wish):
        """A session for `wish["path"]`: the one it has, or a new one with its kernel."""
        path, kind = wish.get("path"), wish.get("type")
        if not isinstance(path, str) or not isinstance(kind, str):
            raise Problem(400, "A session needs a path and a type")
        with self.lock:
            for session in list(self.all.values()):
                if session["path"] == path and session["kernel"].id in self.kernels.all:
                    return session
            kernel = self.kernel_for(wish.get("kernel") or {}, path)
            name = wish.get("name") or path.rpartition("/")[2]
            session = {"id": str(uuid.uuid4()), "path": path, "name": name, "type": kind,
                       "kernel": kernel}
            self.all[session["id"]] = session
            return session

    def kernel_for(self, wish, path):
        if wish.get("id"):
            return self.kernels.get(wish["id"])
        return self.kernels.start(wish.get("name"), path)

    def change(self, id, wish):
        """Change path, name, type or kernel; a kernel that is replaced is shut down."""
        session = self.get(id)
        session.update({key: wish[key] for key in ("path", "name", "type") if wish.get(key)})
        if wish.get("kernel"):
            old, session["kernel"] = session["kernel"], self.kernel_for(wish["kernel"],
                                                                        session["path"])
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

    def delete(self, id):
        session = self.get(id)
        self.kernels.shutdown(session["kernel"].id)
        self.all.pop(id, None)


# ---- 6. WebSocket: RFC 6455 -------------------------------------------------------------------
#
# A WebSocket is a TCP connection that began as an HTTP request. After the handshake both sides
# send frames: two bytes (FIN and opcode, mask bit and length), perhaps a longer length, perhaps a
# mask, then the payload. `FrameParser` turns bytes into messages and knows no socket, so every
# rule of the RFC can be tested with two strings of bytes; `WebSocket` reads and writes.

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"   # RFC 6455 1.3
NORMAL, GOING_AWAY, PROTOCOL_ERROR, INVALID_DATA, TOO_BIG = 1000, 1001, 1002, 1007, 1009
MOST_BYTES = 256 << 20    # of one message: a picture pasted into a widget should pass
MOST_FRAGMENTS = 1 << 16  # of one message: empty ones cost nothing to send
CLOSE_CODES = {*range(1000, 1004), *range(1007, 1012), *range(3000, 5000)}   # RFC 6455 7.4


class WebSocketError(Exception):
    """The peer broke a rule: the connection is closed with `code` (RFC 6455 7.4.1)."""

    def __init__(self, code, reason):
        super().__init__(reason)
        self.code, self.reason = code, reason


def accept_key(key):
    """What proves to the client that we speak WebSocket (RFC 6455 4.2.2)."""
    return base64.b64encode(hashlib.sha1((key + GUID).encode()).digest()).decode()


def apply_mask(data, mask):
    """XOR with the repeated four-byte mask, as one big number: at the speed of memory."""
    repeated = (mask * (len(data) // 4 + 1))[:len(data)]
    number = int.from_bytes(data, "little") ^ int.from_bytes(repeated, "little")
    return number.to_bytes(len(data), "little")


def encode_frame(opcode, payload, mask=None):
    """One unfragmented frame; a client must mask, a server must not (RFC 6455 5.2, 5.3)."""
    masked = 0b1000_0000 if mask else 0
    if len(payload) < 126:
        head = bytes([0b1000_0000 | opcode, masked | len(payload)])
    elif len(payload) < 1 << 16:
        head = struct.pack("!BBH", 0b1000_0000 | opcode, masked | 126, len(payload))
    else:
        head = struct.pack("!BBQ", 0b1000_0000 | opcode, masked | 127, len(payload))
    return head + mask + apply_mask(payload, mask) if mask else head + payload


class FrameParser:
    """Bytes in, messages out: `feed` returns (opcode, payload) of messages and control frames.

    Raises WebSocketError. TEXT payloads are str, all others bytes.
    """

    def __init__(self, most_bytes=MOST_BYTES):
        self.most_bytes = most_bytes
        self.bytes = bytearray()     # not yet a whole frame
        self.opcode = None           # of the fragmented message that is under way
        self.fragments, self.size = [], 0
        self.is_closed = False

    def feed(self, data):
        self.bytes += data
        messages = []
        while not self.is_closed and (frame := self.next_frame()) is not None:
            message = self.message(*frame)
            if message is not None:
                messages.append(message)
                self.is_closed = message[0] == CLOSE   # RFC 6455 5.5.1: nothing comes after it
        return messages

    def next_frame(self):
        """(is it the last fragment, opcode, payload), or None while bytes are missing."""
        if len(self.bytes) < 2:
            return None
        first, second = self.bytes[:2]
        opcode, length, head = first & 0b1111, second & 0b0111_1111, 2
        self.check_head(first, opcode, second, length)
        if length >= 126:
            size, layout = (2, "!H") if length == 126 else (8, "!Q")
            if len(self.bytes) < 2 + size:
                return None
            length, head = struct.unpack_from(layout, self.bytes, 2)[0], 2 + size
        if self.size + length > self.most_bytes or len(self.fragments) > MOST_FRAGMENTS:
            raise WebSocketError(TOO_BIG, f"a message may have {self.most_bytes} bytes")
        end = head + 4 + length
        if len(self.bytes) < end:
            return None
        # Journey 2: the frame is whole; it is unmasked, put together with its fragments, decoded.
        payload = apply_mask(self.bytes[head + 4:end], bytes(self.bytes[head:head + 4]))
        del self.bytes[:end]
        return bool(first & 0b1000_0000), opcode, payload

    def check_head(self, first, opcode, second, length):
        if first & 0b0111_0000:
            raise WebSocketError(PROTOCOL_ERROR, "reserved bits are set")
        if opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise WebSocketError(PROTOCOL_ERROR, f"unknown opcode {opcode}")
        if not second & 0b1000_0000:
            raise WebSocketError(PROTOCOL_ERROR, "a client's frame must be masked")
        if opcode >= CLOSE and (length > 125 or not first & 0b1000_0000):
            raise WebSocketError(PROTOCOL_ERROR, "a control frame must be short and whole")

    def message(self, is_last, opcode, payload):
        """The message that a frame completes; control frames may stand between fragments."""
        if opcode >= CLOSE:
            return opcode, payload
        if (opcode == CONTINUATION) != (self.opcode is not None):
            raise WebSocketError(PROTOCOL_ERROR, "a fragment out of order")
        self.opcode = self.opcode or opcode
        self.fragments.append(payload)
        self.size += len(payload)
        if not is_last:
            return None
        opcode, payload = self.opcode, b"".join(self.fragments)
        self.opcode, self.fragments, self.size = None, [], 0
        return opcode, decode(payload) if opcode == TEXT else payload


def decode(payload):
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise WebSocketError(INVALID_DATA, "a text message must be UTF-8") from None


class WebSocket:
    """One accepted connection. It belongs to one thread: its handler's."""

    def __init__(self, sock, first_bytes=b"", most_bytes=MOST_BYTES, protocol=None):
        self.socket, self.parser, self.protocol = sock, FrameParser(most_bytes), protocol
        self.first_bytes = first_bytes   # came glued to the handshake
        self.waiting = []                # whole messages that nobody has taken
        self.is_closed = self.close_sent = False
        self.last_heard = time.monotonic()

    @classmethod
    def accept(cls, handler, protocols=()):
        """Answer the handshake of a BaseHTTPRequestHandler. Raises Problem 400 (RFC 6455 4.2).

        The first of the client's subprotocols that is in `protocols` is chosen, or none.
        """
        headers = handler.headers
        key, version = headers.get("Sec-WebSocket-Key"), headers.get("Sec-WebSocket-Version")
        if "websocket" not in headers.get("Upgrade", "").lower() or not key or version != "13":
            raise Problem(400, "This address speaks WebSocket (RFC 6455, version 13) only")
        handler.send_response(101)
        handler.send_header("Upgrade", "websocket")
        handler.send_header("Connection", "Upgrade")
        handler.send_header("Sec-WebSocket-Accept", accept_key(key))
        offered = [name.strip() for name in headers.get("Sec-WebSocket-Protocol", "").split(",")]
        protocol = next((name for name in offered if name in protocols), None)
        if protocol:
            handler.send_header("Sec-WebSocket-Protocol", protocol)
        handler.end_headers()
        handler.wfile.flush()
        handler.close_connection = True
        # What the client sent right behind its handshake is in rfile's buffer, not in the socket.
        handler.connection.setblocking(False)
        first_bytes = handler.rfile.read1(len(handler.rfile.peek() or b"")) or b""
        handler.connection.settimeout(60)   # seconds a peer may take to accept what we send
        return cls(handler.connection, first_bytes, protocol=protocol)

    def fileno(self):
        return self.socket.fileno()

    def receive(self):
        """The next message, str or bytes; None when the connection is closed. Waits."""
        while not self.waiting and not self.is_closed:
            self.waiting += self.arrived()
        return self.waiting.pop(0) if self.waiting else None

    def arrived(self):
        """The messages in what has arrived; waits for the next bytes. Answers pings and closes."""
        try:
            data, self.first_bytes = self.first_bytes or self.socket.recv(1 << 18), b""
            if not data:
                self.is_closed = True
            self.last_heard = time.monotonic()
            return [payload for opcode, payload in self.parser.feed(data)
                    if opcode in (TEXT, BINARY) or self.control(opcode, payload)]
        except TimeoutError:
            return []
        except OSError:
            self.is_closed = True
        except WebSocketError as problem:
            self.close(problem.code, problem.reason)
            self.is_closed = True
        return []

    def control(self, opcode, payload):
        """Obey a control frame; False, because it is no message."""
        if opcode == PING:
            self.write(encode_frame(PONG, payload))
        elif opcode == CLOSE:
            # RFC 6455 5.5.1: a close is answered once, with the same code.
            code = struct.unpack("!H", payload[:2])[0] if len(payload) >= 2 else NORMAL
            is_fine = len(payload) != 1 and code in CLOSE_CODES
            decode(payload[2:])
            self.close(code if is_fine else PROTOCOL_ERROR)
            self.is_closed = True
        return False

    def send(self, message):
        """Send a str as a text message, bytes as a binary one."""
        self.write(message_frame(message))

    def write(self, data):
        """Send finished frames; a peer that is gone or does not read closes the connection."""
        try:
            if not self.close_sent:
                self.socket.sendall(data)
        except OSError:
            self.is_closed = True

    def close(self, code=NORMAL, reason=""):
        """Send a close frame, once."""
        self.write(encode_frame(CLOSE, struct.pack("!H", code) + reason.encode()[:123]))
        self.close_sent = True


def message_frame(message):
    if isinstance(message, str):
        return encode_frame(TEXT, message.encode())
    return encode_frame(BINARY, bytes(message))


# ---- 7. The bridge: WebSocket <-> ZeroMQ ------------------------------------------------------
#
# One thread, one poller over the TCP socket and four ZeroMQ sockets; what arrives on one side
# leaves on the other. Only what comes from a browser is parsed: a kernel's message is four JSON
# parts already, so its bytes are put between braces and sent on; just its header is read.
#
# A kernel publishes to those who have subscribed *by then*. So a new bridge lets no request
# through until it has heard something on iopub: the welcome of a modern kernel, or what a
# `kernel_info_request` stirs up in an older one.

NUDGE_MS = 500        # between two kernel_info_requests to a kernel that is silent
LAST_WORDS_MS = 100   # that what a kernel said before its death may take through TCP
PING_SECONDS = 30     # between pings; a peer silent for three of them is gone


def splice(channel, json_parts, buffers):
    """The WebSocket frame of a kernel's message in Jupyter's default protocol: its JSON as it came.

    `msg_id` and `msg_type` stand at the top level, too: Python clients look there.
    """
    header, parent_header, metadata, content = json_parts
    about = json.loads(header)
    text = b"".join((
        b'{"header":', header, b',"parent_header":', parent_header, b',"metadata":', metadata,
        b',"content":', content, b',"buffers":[],"channel":"', channel.encode(),
        b'","msg_id":', to_json(about["msg_id"]),
        b',"msg_type":', to_json(about["msg_type"]), b"}"))
    if not buffers:
        return encode_frame(TEXT, text)
    return encode_frame(BINARY, join_parts([text, *buffers]))


def join_parts(parts):
    """Binary layout of the default protocol: n, n offsets (big-endian u32), then the n parts."""
    offsets, at = [], 4 * (len(parts) + 1)
    for part in parts:
        offsets.append(at)
        at += len(part)
    return struct.pack(f"!{len(parts) + 1}I", len(parts), *offsets) + b"".join(parts)


def decode_message(message):
    """The dict in a page's WebSocket message, text or binary; raises ValueError."""
    if isinstance(message, str):
        return json.loads(message)
    try:
        count = struct.unpack_from("!I", message)[0]
        offsets = [*struct.unpack_from(f"!{count}I", message, 4), len(message)]
    except struct.error as problem:
        raise ValueError(f"a truncated binary message: {problem}") from None
    parts = [message[start:end] for start, end in zip(offsets, offsets[1:], strict=False)]
    return {**json.loads(parts[0]), "buffers": parts[1:]}


def splice_v1(channel, json_parts, buffers):
    """The same in `v1.kernel.websocket.jupyter.org`: n, n offsets (little-endian u64; the last one
    is the end), then channel, header, parent_header, metadata, content, buffers."""
    parts, offsets = [channel.encode(), *json_parts, *buffers], []
    at = 8 * (len(parts) + 2)
    for part in parts:
        offsets.append(at)
        at += len(part)
    head = struct.pack(f"<{len(parts) + 2}Q", len(parts) + 1, *offsets, at)
    return encode_frame(BINARY, head + b"".join(parts))


def decode_v1(message):
    """The dict in a message of that layout; raises ValueError."""
    try:
        count = struct.unpack_from("<Q", message)[0]
        offsets = struct.unpack_from(f"<{min(count, len(message))}Q", message, 8)
    except (struct.error, TypeError) as problem:
        raise ValueError(f"not of the v1 layout: {problem}") from None
    parts = [message[start:end] for start, end in zip(offsets, offsets[1:], strict=False)]
    header, parent_header, metadata, content = (json.loads(part) for part in parts[1:5])
    return {"channel": parts[0].decode(), "header": header, "parent_header": parent_header,
            "metadata": metadata, "content": content, "buffers": parts[5:]}


V1 = "v1.kernel.websocket.jupyter.org"
LAYOUTS = {None: (decode_message, splice), V1: (decode_v1, splice_v1)}   # subprotocol -> functions


class Bridge:
    """Carries messages between one WebSocket and one kernel until either is gone."""

    def __init__(self, websocket, kernel):
        self.websocket, self.kernel = websocket, kernel
        # One identity on all channels: the kernel asks on stdin whom it heard on shell.
        identity = secrets.token_bytes(16)
        self.sockets = {channel: kernel.connect(channel, identity) for channel in CHANNELS}
        self.sockets["iopub"].connect(kernel.notices_endpoint)
        self.session = Session(kernel.connection["key"], username="page")
        self.process = kernel.process
        self.decode, self.splice = LAYOUTS[websocket.protocol]
        # True once iopub is known to be connected, so that no answer can be missed. A busy kernel
        # could not answer a nudge; it is taken as heard, for it has been running for long.
        self.is_heard = kernel.state == "busy"
        self.last_ping = time.monotonic()
        self.obituary = None   # (when, frame): that the kernel is dead, after its last words

    def run(self):
        poller, by_socket = zmq.Poller(), {s: channel for channel, s in self.sockets.items()}
        for sock in by_socket:
            poller.register(sock, zmq.POLLIN)
        self.kernel.connections += 1
        if self.kernel.state == "dead":   # who comes late is told as well
            parts = self.kernel.status_message("dead")
            self.websocket.write(self.splice("iopub", parts[2:], []))
        try:
            while not self.websocket.is_closed:
                self.step(poller, by_socket)
        finally:
            self.kernel.connections -= 1
            for sock in by_socket:
                sock.close()

    def step(self, poller, by_socket):
        """Wait for either side and carry what has come."""
        if self.kernel.process is not self.process:   # restarted: iopub must be heard anew
            self.process, self.is_heard, self.obituary = self.kernel.process, False, None
        if self.websocket.first_bytes and self.is_heard:
            return self.carry_up()
        page = self.websocket.fileno()
        poller.register(page, zmq.POLLIN if self.is_heard else 0)
        ready = dict(poller.poll(LAST_WORDS_MS if self.obituary else
                                 PING_SECONDS * 1000 if self.is_heard else NUDGE_MS))
        frames = [frame for sock, channel in by_socket.items() if sock in ready
                  for frame in self.from_kernel(channel, sock)]
        if frames:
            self.websocket.write(b"".join(frames))
        if page in ready and self.kernel.process is self.process:
            self.carry_up()
        if not ready and not self.is_heard and self.kernel.state != "dead":
            nudge = self.session.message("kernel_info_request", {})
            self.sockets["shell"].send_multipart(self.session.pack(nudge))
        self.tell_end()
        self.ping_or_give_up()

    def tell_end(self):
        """Tell the page of its kernel's death when that is due; close when no other will come."""
        if self.obituary:
            when, frame = self.obituary
            if when > time.monotonic():
                return
            self.websocket.write(frame)
            self.obituary = None
        if self.kernel.is_gone and self.kernel.process.returncode is not None:
            self.websocket.close(GOING_AWAY, "the kernel was shut down")
            self.websocket.is_closed = True

    def carry_up(self):
        for message in self.websocket.arrived():
            try:
                self.to_kernel(message)
            except Exception as problem:   # whatever a page may send: the bridge goes on
                log(f"kernel {self.kernel.id}: dropped a page's message: {problem!r}")

    def to_kernel(self, message):
        """Send a page's message down its channel; raises ValueError for anything else."""
        message = self.decode(message)
        channel = message.get("channel", "shell")
        if channel not in ("shell", "control", "stdin"):
            raise ValueError(f"there is no channel {channel!r} to a kernel")
        parts = {"header": message["header"], "parent_header": message.get("parent_header") or {},
                 "metadata": message.get("metadata") or {}, "content": message["content"],
                 "buffers": message.get("buffers", ())}
        # Journey 3: the request is signed and leaves on the ZeroMQ socket of its channel.
        self.sockets[channel].send_multipart(self.session.pack(parts))

    def from_kernel(self, channel, sock):
        """WebSocket frames of what has come on a channel, as long as there is more."""
        frames, size = [], 0
        while size < 1 << 20:
            try:
                parts = sock.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                _, json_parts, buffers = self.session.verify(parts)
            except BadMessage as problem:
                log(f"kernel {self.kernel.id}: dropped a message on {channel}: {problem}")
                continue
            if not self.is_heard and channel == "iopub" and parts[0] != NOTICE:
                self.is_heard, self.websocket.last_heard = True, time.monotonic()
            # Journey 11: verified, marked with its channel, and on its way to the page.
            frame = self.splice(channel, json_parts, buffers)
            if parts[0] == NOTICE and b'"dead"' in json_parts[3]:
                # It came by a shorter way than what the kernel itself said last.
                self.obituary = time.monotonic() + LAST_WORDS_MS / 1000, frame
                continue
            frames.append(frame)
            size += len(frame)
        return frames

    def ping_or_give_up(self):
        now = time.monotonic()
        if now - self.websocket.last_heard > 3 * PING_SECONDS and self.is_heard:
            self.websocket.is_closed = True
        elif now - self.last_ping > PING_SECONDS:
            self.last_ping = now
            self.websocket.write(encode_frame(PING, b""))


# ---- 8. HTTP: access, routes, handlers --------------------------------------------------------
#
# ROUTES is the whole API: method, pattern, name of the handler. A handler gets the pattern's
# groups and returns what is sent as JSON, or (status, JSON), or sends by itself and returns
# nothing. To add an endpoint, add a row and a method.
#
# Three questions come before any handler: is the Host one of ours (else a foreign name may point
# here: DNS rebinding), does the client know the token, and does a browser's request come from our
# own page?

ID = r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
ROUTES = [(method, re.compile(pattern + "$"), name) for method, pattern, name in (
    ("GET", r"/", "home"),
    ("GET", r"/(?:tree|notebooks|edit)(?:/.*)?", "page"),
    ("GET", r"/frame", "frame"),
    ("GET", r"/files/(.+)", "file"),
    ("GET", r"/api", "version"),
    ("GET", r"/api/status", "status"),
    ("GET", r"/api/me", "me"),
    ("POST", r"/api/shutdown", "shutdown_server"),
    ("GET", r"/api/contents/(.+)/checkpoints", "list_checkpoints"),
    ("POST", r"/api/contents/(.+)/checkpoints", "create_checkpoint"),
    ("POST", r"/api/contents/(.+)/checkpoints/([^/]+)", "restore_checkpoint"),
    ("DELETE", r"/api/contents/(.+)/checkpoints/([^/]+)", "delete_checkpoint"),
    ("GET", r"/api/contents(?:/(.*))?", "get_contents"),
    ("POST", r"/api/contents(?:/(.*))?", "create_contents"),
    ("PUT", r"/api/contents/(.+)", "save_contents"),
    ("PATCH", r"/api/contents/(.+)", "rename_contents"),
    ("DELETE", r"/api/contents/(.+)", "delete_contents"),
    ("GET", r"/api/kernelspecs", "list_kernelspecs"),
    ("GET", r"/api/kernelspecs/([^/]+)", "get_kernelspec"),
    ("GET", r"/kernelspecs/([^/]+)/([^/]+)", "kernelspec_file"),
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
)]
OPEN_TO_ALL = {"version", "frame"}    # handlers that need no token
PAGES = {"home", "page"}              # handlers whose refusal is a page for people, not JSON
PIECE = 1 << 18                       # bytes of a file that are read and sent at a time
MOST_BODY = 1 << 30                   # bytes of a request; a notebook of a gigabyte is a mistake
TEXT_FIELDS = {"path", "name", "type", "format", "ext", "copy_from", "id", "kernel_id"}
STATUS_OF = {   # errno -> HTTP status of what the disk refuses
    errno.EACCES: 403, errno.EPERM: 403, errno.EROFS: 403, errno.ENOENT: 404, errno.ENOSPC: 507,
    errno.EDQUOT: 507, errno.EFBIG: 507, errno.ENAMETOOLONG: 400, errno.EEXIST: 409,
    errno.ENOTDIR: 400, errno.EISDIR: 400}
API_POLICY = "default-src 'none'; frame-ancestors 'self'"
FILE_POLICY = "sandbox allow-scripts; frame-ancestors 'self'"
PAGE_POLICY = (
    "default-src 'none'; script-src 'sha256-{script}'; style-src 'unsafe-inline' 'self'; "
    "img-src 'self' data: blob: https: http:; media-src 'self' data: blob: https: http:; "
    "font-src 'self' data:; connect-src 'self'; frame-src 'self' blob: data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'self'; require-trusted-types-for 'script'")
FRAME_POLICY = "sandbox allow-scripts allow-popups allow-forms; frame-ancestors 'self'"
FRAME = b"""<!doctype html><meta charset="utf-8"><style>body { margin: 0 }</style><script>
// An output with scripts lives here, in an origin of its own: the page posts its HTML, and it
// answers with its height whenever that changes.
addEventListener('message', event => {
  if (event.source !== parent || typeof event.data.html !== 'string') return;
  const tell = 'new ResizeObserver(() => parent.postMessage('
    + '{height: document.documentElement.scrollHeight}, "*")).observe(document.documentElement)';
  document.open();
  document.write('<!doctype html><meta charset="utf-8"><style>body { margin: 0 }</style>'
    + event.data.html + '<script>' + tell + '</' + 'script>');
  document.close();
});
</script>"""
LOCKED_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
                 "frame-ancestors 'none'")
LOCKED = """<!doctype html><html lang="en"><meta charset="utf-8"><title>MiniJupyter: token</title>
<style>:root{{color-scheme:light dark}}body{{font:16px system-ui;max-width:32rem;margin:15vh auto}}
input{{font:inherit;width:100%;padding:.4rem;margin:.5rem 0}}</style>
<h1>MiniJupyter</h1><form method="get" action="{action}"><label for="token">{why} The terminal that
started the server shows its address with the token.</label><input id="token" name="token"
type="password" autofocus><button>Open</button></form></html>"""


class Handler(BaseHTTPRequestHandler):
    """One HTTP connection; the requests on it come one after the other."""

    protocol_version, server_version, sys_version = "HTTP/1.1", f"MiniJupyter/{__version__}", ""
    disable_nagle_algorithm = True   # otherwise small answers wait 40 ms for an acknowledgement
    timeout = 75                     # seconds of silence before a kept-alive connection is closed
    wbufsize = 1 << 16               # headers and body leave together

    def answer(self):
        """Check the request, read its body, find its route, send what the handler returns."""
        self.is_answered, self.body = False, None
        try:
            self.split_path()
            name, groups = self.find_route()
            if self.admit(name):
                self.body = self.read_body()
                result = getattr(self, name)(*groups)
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
            log(traceback.format_exc())
            self.send_problem(Problem(500, f"The server failed: {type(problem).__name__}"))

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = answer

    def handle(self):
        """Serve a connection to its end; a client that vanishes is no error."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()

    def finish(self):
        with contextlib.suppress(OSError):
            super().finish()

    # -- the request --

    def split_path(self):
        """`route` and `query` of the request line; "//host/" is a path here, never a host."""
        try:
            url = urlsplit(re.sub("^/{2,}", "/", self.path))
        except ValueError:
            self.route, self.query = "", {}
            raise Problem(400, "This is no path") from None
        self.route, self.query = unquote(url.path), parse_qs(url.query)

    def read_body(self):
        """The body's bytes; only from those who were let in."""
        length = self.headers.get("Content-Length", "0")
        is_number = re.fullmatch(r"[0-9]{1,10}", length)
        if "Transfer-Encoding" in self.headers or not is_number or int(length) > MOST_BODY:
            self.close_connection = True
            raise Problem(411 if "Transfer-Encoding" in self.headers else 413,
                          "A body needs a Content-Length, and not too large a one")
        return self.rfile.read(int(length))

    def discard_body(self):
        """Read a body that nobody wants, or the next request on this connection would begin in its
        middle; a large one is not worth it."""
        self.body = b""
        length = self.headers.get("Content-Length", "0")
        if re.fullmatch(r"[0-9]{1,6}", length) and "Transfer-Encoding" not in self.headers:
            self.rfile.read(int(length))
        else:
            self.close_connection = True

    def json_body(self):
        """The JSON object in the body; an empty body is an empty object."""
        try:
            value = json.loads(self.body or b"{}")
        except (ValueError, RecursionError) as problem:
            raise Problem(400, f"Invalid JSON in the body of the request: {problem}") from None
        if not isinstance(value, dict) or not isinstance(value.get("kernel") or {}, dict):
            raise Problem(400, "The body must be a JSON object, and so must its kernel")
        for part in (value, value.get("kernel") or {}):
            for name in TEXT_FIELDS & part.keys():
                if not isinstance(part[name], (str, type(None))):
                    raise Problem(400, f"{name} must be a string")
        return value

    def find_route(self):
        """(handler name, groups of its pattern); Problem 404, or 405 with the methods there are."""
        method = "GET" if self.command == "HEAD" else self.command
        allowed = []
        for route_method, pattern, name in ROUTES:
            if match := pattern.match(self.route.rstrip("/") or "/"):
                if route_method == method:
                    return name, [group or "" for group in match.groups()]
                allowed.append(route_method)
        if not allowed:
            raise Problem(404, f"There is nothing at {self.route}")
        problem = Problem(405, f"{self.command} is not possible at {self.route}")
        problem.allow = ", ".join(sorted({*allowed, *(["HEAD"] if "GET" in allowed else [])}))
        raise problem

    # -- access --

    def admit(self, name):
        """True when the request may pass; raises Problem 403 or answers with the token page."""
        server = self.server
        if not server.is_our_host(self.headers.get("Host", "")):
            raise Problem(403, "This server does not answer to that Host name")
        if name in OPEN_TO_ALL:
            return True
        given = self.given_token()
        if given is not None and same_secret(given, server.token):
            return not (name in PAGES and "token" in self.query) or self.move_token_to_cookie()
        if given is None and same_secret(self.cookie(), server.cookie_value):
            self.check_origin()
            return True
        if name not in PAGES:
            raise Problem(403, "Forbidden: a valid token is needed")
        why = "This token is not right." if given else "A token is needed."
        page = LOCKED.format(action=html.escape(self.path.partition("?")[0]), why=why)
        self.send(403, page.encode(), "text/html; charset=utf-8",
                  {"Content-Security-Policy": LOCKED_POLICY})
        return False

    def given_token(self):
        """The token of the Authorization header or of the query; None when there is none."""
        scheme, _, value = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() in ("token", "bearer"):
            return value.strip()
        return self.query["token"][0] if "token" in self.query else None

    def cookie(self):
        found = re.search(rf"(?:^|;\s*){self.server.cookie_name}=([0-9a-f]+)",
                          self.headers.get("Cookie", ""))
        return found[1] if found else ""

    def check_origin(self):
        """A request that a cookie admits must come from our own page, not from another site's."""
        origin, is_write = self.headers.get("Origin"), self.command not in ("GET", "HEAD")
        is_foreign = origin is not None and urlsplit(origin).netloc != self.headers.get("Host")
        if is_foreign or is_write and origin is None:
            raise Problem(403, "The request comes from another site")
        is_data = self.route.startswith(("/api", "/files"))
        if is_data and self.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            raise Problem(403, "The request comes from another site")

    def move_token_to_cookie(self):
        """Answer so that a cookie keeps the token and the address bar loses it; returns False."""
        query = "&".join(f"{quote(k)}={quote(v)}" for k, values in self.query.items()
                         for v in values if k != "token")
        self.send(302, b"", "text/plain", {
            "Location": quote(self.route) + ("?" + query if query else ""),
            "Set-Cookie": f"{self.server.cookie_name}={self.server.cookie_value}; "
                          "Path=/; HttpOnly; SameSite=Strict"})
        return False

    # -- the response --

    def send(self, status, data, content_type, headers=()):
        """Send a whole response; HEAD gets the same headers and no body."""
        self.is_answered = True
        if self.body is None:
            self.discard_body()
        self.send_response(status)
        if self.close_connection:
            self.send_header("Connection", "close")
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(data)),
                            "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store",
                            "Content-Security-Policy": API_POLICY, "Referrer-Policy": "no-referrer",
                            **dict(headers)}.items():
            if status != 204 or name != "Content-Length":
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and status != 204:
            self.wfile.write(data)

    def send_json(self, status, value, headers=()):
        self.send(status, b"" if value is None else to_json(value), "application/json", headers)

    def send_problem(self, problem):
        """The one place where an error becomes an answer."""
        if self.is_answered:     # its answer has begun: all that is left is to end the connection
            self.close_connection = True
            return
        allow = {"Allow": problem.allow} if hasattr(problem, "allow") else {}
        self.send_json(problem.status, {"message": problem.message, "reason": problem.reason},
                       allow)

    def created(self, model, kind, id):
        self.send_json(201, model, {"Location": f"/api/{kind}/{quote(id)}"})

    def log_message(self, format, *values):
        """Requests are not logged: the terminal is for what a person needs to know."""

    # -- pages and files --

    def home(self):
        self.send(302, b"", "text/plain", {"Location": "/tree"})

    def page(self):
        """index.html, for every page; its one script is named in the policy by its hash."""
        with open(os.path.join(HERE, "index.html"), "rb") as file:
            data = file.read()
        script = re.search(rb"<script[^>]*>(.*?)</script>", data, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
        self.send(200, data, "text/html; charset=utf-8",
                  {"Content-Security-Policy": PAGE_POLICY.format(script=digest)})

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
        """Send a file piece by piece, or the one range of it that is asked for (RFC 9110 14)."""
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

    # -- /api --

    def version(self):
        return {"version": __version__}

    def status(self):
        kernels = list(self.server.kernels.all.values())
        latest = max([self.server.started, *(kernel.last_activity for kernel in kernels)])
        return {"started": iso(self.server.started), "last_activity": iso(latest),
                "kernels": len(kernels), "connections": sum(k.connections for k in kernels)}

    def me(self):
        """Who uses the server: always the same one person."""
        try:
            wanted = json.loads(self.asked("permissions", "{}"))
            granted = {resource: list(actions) for resource, actions in wanted.items()}
        except (ValueError, AttributeError, TypeError):
            raise Problem(400, "permissions must be a JSON object of lists") from None
        name = self.server.user
        return {"identity": {"username": name, "name": name, "display_name": name,
                             "initials": name[:1].upper(), "avatar_url": None, "color": None},
                "permissions": {**granted, "updatable_fields": []}}

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
        return self.server.contents.get(
            path, self.asked("type", choices=("notebook", "file", "directory")),
            self.asked("format", choices=("text", "base64", "json")),
            content=self.asked("content", "1", "01") == "1", with_hash=self.asked("hash") == "1")

    def create_contents(self, path):
        body = self.json_body()
        if body.get("copy_from"):
            model = self.server.contents.copy(body["copy_from"], path)
        else:
            model = self.server.contents.create(path, body.get("type", "file"), body.get("ext", ""))
        self.created(model, "contents", model["path"])

    def save_contents(self, path):
        expected = (NOT_THERE if self.headers.get("If-None-Match") == "*" else
                    self.headers.get("If-Match", "").strip('"') or None)
        body = self.json_body()
        if isinstance(body.get("chunk"), int):
            model, is_new = self.server.contents.save_chunk(path, body)
        else:
            model, is_new = self.server.contents.save(path, body, expected)
        if self.asked("hash") != "1":
            model.update(hash=None, hash_algorithm=None)
        if is_new:
            return self.created(model, "contents", model["path"])
        return model

    def rename_contents(self, path):
        new_path = self.json_body().get("path")
        if not isinstance(new_path, str):
            raise Problem(400, "The body must name the new path")
        model = self.server.contents.rename(path, new_path)
        self.server.sessions.follow_rename(path.strip("/"), model["path"])
        return model

    def delete_contents(self, path):
        self.server.contents.delete(path)
        return 204, None

    def list_checkpoints(self, path):
        return self.server.contents.checkpoints(path)

    def create_checkpoint(self, path):
        return 201, self.server.contents.create_checkpoint(path)

    def restore_checkpoint(self, path, id):
        self.server.contents.restore_checkpoint(path, id)
        return 204, None

    def delete_checkpoint(self, path, id):
        self.server.contents.delete_checkpoint(path, id)
        return 204, None

    def list_kernelspecs(self):
        specs = {name: spec_model(name, *found) for name, found in find_specs().items()}
        return {"default": DEFAULT_KERNEL, "kernelspecs": specs}

    def get_kernelspec(self, name):
        specs = find_specs()
        if name not in specs:
            raise Problem(404, f"There is no kernel spec {name}")
        return spec_model(name, *specs[name])

    def kernelspec_file(self, name, file):
        """A logo or the like from a kernel spec's folder."""
        folder = find_specs().get(name, (None, None))[1]
        if not folder or file not in os.listdir(folder):
            raise Problem(404, f"There is no {file} of the kernel spec {name}")
        self.send_file(os.path.join(folder, file), {"Cache-Control": "max-age=2592000"})

    def list_kernels(self):
        return [kernel.model() for kernel in list(self.server.kernels.all.values())]

    def start_kernel(self):
        body = self.json_body()
        new = self.server.kernels.start(body.get("name"), body.get("path") or "")
        self.created(new.model(), "kernels", new.id)

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
        websocket = WebSocket.accept(self, [V1])
        self.is_answered = True
        Bridge(websocket, kernel).run()

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


def spec_model(name, spec, folder):
    """A kernel spec as the API gives it; its resources are the files beside its kernel.json."""
    names = os.listdir(folder) if folder else ()
    resources = {file if file in ("kernel.js", "kernel.css") else os.path.splitext(file)[0]:
                 f"/kernelspecs/{quote(name)}/{quote(file)}"
                 for file in names
                 if file.startswith("logo-") or file in ("kernel.js", "kernel.css")}
    return {"name": name, "spec": spec, "resources": resources}


def range_of(header, size):
    """(status, start, end) for a Range header; only a single range of bytes is obeyed."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if not match or match[1] == match[2] == "":
        return 200, 0, size
    if match[1] == "":
        start = max(0, size - int(match[2]))
        return (206, start, size) if start < size else (416, 0, 0)
    start, end = int(match[1]), min(int(match[2] or size - 1) + 1, size)
    return (206, start, end) if start < end else (416, 0, 0)


def same_secret(given, secret):
    """Compare without telling by the time it takes how much was right."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), secret.encode())


class Server(ThreadingHTTPServer):
    """The listening socket and what all connections share."""

    daemon_threads = True       # connections do not keep the program alive
    request_queue_size = 128    # connections that may wait to be accepted

    def __init__(self, root, ip, port, token):
        super().__init__((ip, port), Handler)
        self.ip, self.token, self.started = ip, token, time.time()
        self.user = os.environ.get("USER") or os.environ.get("USERNAME") or "user"
        self.contents = Contents(root)
        self.kernels = Kernels(self.contents)
        self.sessions = Sessions(self.kernels)
        self.cookie_name = f"minijupyter-{self.server_port}"   # cookies do not know ports
        self.cookie_value = hmac.new(token.encode(), b"cookie", "sha256").hexdigest()

    def server_bind(self):
        """Without HTTPServer's look-up of the host's full name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]

    def is_our_host(self, host):
        """Bound to loopback, the server answers only to names that mean loopback."""
        if not self.ip.startswith("127.") and self.ip not in ("localhost", "::1"):
            return True
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", name) is not None

    def address(self):
        host = "127.0.0.1" if self.ip in ("", "0.0.0.0") else self.ip
        return f"http://{host}:{self.server_port}/tree?token={quote(self.token)}"

    def handle_error(self, request, client_address):
        log(f"A connection failed: {sys.exc_info()[1]!r}")


# ---- 9. main ----------------------------------------------------------------------------------

FIRST_PORT, PORTS_TRIED = 8888, 50   # 8888 is Jupyter's


def open_server(root, ip, port, token):
    """A server at the wished port, or at the next free one when none was wished for."""
    for candidate in [port] if port is not None else range(FIRST_PORT, FIRST_PORT + PORTS_TRIED):
        try:
            return Server(root, ip, candidate, token)
        except OSError as problem:
            if port is not None or problem.errno != errno.EADDRINUSE:
                sys.exit(f"Cannot listen on {ip}:{candidate}: {problem.strerror}")
    sys.exit(f"No free port from {FIRST_PORT} to {FIRST_PORT + PORTS_TRIED - 1}")


def parse_arguments():
    parser = argparse.ArgumentParser(description="A notebook server, a kernel and a page.")
    parser.add_argument("folder", nargs="?", default=".",
                        help="what the server shows (default: the current folder)")
    parser.add_argument("--ip", default="127.0.0.1", metavar="ADDRESS",
                        help="where it listens (default: %(default)s, this machine only)")
    parser.add_argument("--port", type=int, help=f"default: {FIRST_PORT}, or the next that is free")
    parser.add_argument("--token", default=os.environ.get("JUPYTER_TOKEN") or secrets.token_hex(24),
                        help="the secret that opens the server (default: a new one)")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    arguments = parser.parse_args()
    if not os.path.isdir(arguments.folder):
        parser.error(f"there is no folder {arguments.folder}")
    if not arguments.token:
        parser.error("the token must not be empty")
    return arguments


def stop(signum, frame):
    raise KeyboardInterrupt


def main():
    """Serve until Ctrl-C or SIGTERM; then end every kernel."""
    arguments = parse_arguments()
    server = open_server(arguments.folder, arguments.ip, arguments.port, arguments.token)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    # A large notebook is a million objects without a cycle: looked at rarely, it loads much faster.
    gc.freeze()
    gc.set_threshold(our_kernel.COLLECT_AFTER, *gc.get_threshold()[1:])
    print(f"MiniJupyter {__version__} serves {server.contents.root}\n\n    {server.address()}\n\n"
          "Ctrl-C stops it and its kernels.", flush=True)
    if not arguments.no_browser:
        import webbrowser
        threading.Thread(target=webbrowser.open, args=[server.address()], daemon=True).start()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)   # a second one must not leave kernels behind
        print("\nStopping the kernels …", flush=True)
    finally:
        server.kernels.shutdown_all()
        server.server_close()


if __name__ == "__main__":
    main()
