"""All conversations in one SQLite file, found again by full text.

The index uses trigrams, so that Chinese, which has no spaces, is found like English; words of one or two characters,
which have no trigram, are looked for in every text. Calls block (the app makes them in a thread) and raise StoreError.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from glmlocal_tui.cleaning import clean
from glmlocal_tui.conversation import Attachment, Conversation, Message, ToolCall
from glmlocal_tui.sse import Usage

T = TypeVar("T")
FULL, LOCKED, CORRUPT, UNUSABLE = "full", "locked", "corrupt", "unusable"
_VERSION = 1
_LOCK_WAIT_S = 2.0
_UNDO_FOR_S = 86400.0  # a deleted conversation can be brought back for a day
_PROMPTS_KEPT = 500
_SESSIONS_SHOWN = 500
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions(
    id TEXT PRIMARY KEY, title TEXT NOT NULL, system TEXT NOT NULL, leaf TEXT,
    created_s REAL NOT NULL, updated_s REAL NOT NULL, deleted_s REAL);
CREATE TABLE IF NOT EXISTS messages(
    n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, session TEXT NOT NULL, text TEXT NOT NULL, data TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS messages_of ON messages(session);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(text, content='messages', content_rowid='n', tokenize='trigram');
CREATE TRIGGER IF NOT EXISTS words_in AFTER INSERT ON messages BEGIN
    INSERT INTO words(rowid, text) VALUES (new.n, new.text); END;
CREATE TRIGGER IF NOT EXISTS words_out AFTER DELETE ON messages BEGIN
    INSERT INTO words(words, rowid, text) VALUES ('delete', old.n, old.text); END;
CREATE TRIGGER IF NOT EXISTS words_new AFTER UPDATE ON messages BEGIN
    INSERT INTO words(words, rowid, text) VALUES ('delete', old.n, old.text);
    INSERT INTO words(rowid, text) VALUES (new.n, new.text); END;
CREATE TABLE IF NOT EXISTS prompts(n INTEGER PRIMARY KEY, text TEXT NOT NULL);
"""


class StoreError(Exception):
    """``kind`` is one of the words above; the text is for the screen."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Summary:
    id: str
    title: str
    updated_s: float


@dataclass(frozen=True, slots=True)
class Hit:
    """A message that a search found, with the text around the place; ``start:end`` is the place in ``excerpt``."""

    session: str
    title: str
    message: str
    excerpt: str
    start: int
    end: int


class Store:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.set_aside: Path | None = None  # where an unreadable file went
        self._db: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    def open(self) -> None:
        """Open or make the file; one that is no database is moved aside and a new one begun. Raises StoreError."""
        try:
            self._open()
        except StoreError as error:
            if error.kind != CORRUPT:
                raise
            self.move_aside()

    def move_aside(self) -> None:
        """Keep the broken file under another name and begin a new one. Raises StoreError."""
        self.close()
        aside = self.path.with_name(f"{self.path.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
        try:
            for ending in ("-wal", "-shm"):
                beside = Path(f"{self.path}{ending}")
                if beside.exists():
                    os.replace(beside, f"{aside}{ending}")
            os.replace(self.path, aside)
        except OSError as error:
            raise StoreError(UNUSABLE, f"{self.path} is broken and cannot be moved aside: {error}") from None
        self.set_aside = aside
        self._open()

    def close(self) -> None:
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def save(self, conversation: Conversation, messages: Iterable[Message]) -> None:
        """Write a conversation's head and those of its messages, in one transaction."""
        rows = [
            (message.id, conversation.id, message.content, json.dumps(asdict(message), ensure_ascii=False))
            for message in messages
        ]
        head = (conversation.id, conversation.title, conversation.system, conversation.leaf, conversation.created_s)

        def write(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, NULL) ON CONFLICT(id) DO UPDATE SET title = "
                "excluded.title, system = excluded.system, leaf = excluded.leaf, updated_s = excluded.updated_s",
                (*head, time.time()),
            )
            db.executemany(
                "INSERT INTO messages(id, session, text, data) VALUES (?, ?, ?, ?) "
                "ON CONFLICT(id) DO UPDATE SET text = excluded.text, data = excluded.data",
                rows,
            )

        self._run(write)

    def load(self, session: str) -> Conversation | None:
        def read(db: sqlite3.Connection) -> Conversation | None:
            head = db.execute(
                "SELECT id, title, system, created_s, leaf FROM sessions WHERE id = ?", (session,)
            ).fetchone()
            if head is None:
                return None
            rows = db.execute("SELECT data FROM messages WHERE session = ? ORDER BY n", (session,)).fetchall()
            try:
                found = [_message(_cleaned(json.loads(data))) for (data,) in rows]
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                # One bad message is no reason to move the whole file aside.
                kind = type(error).__name__
                said = f"a message of this conversation cannot be read ({kind}); the others in {self.path} are safe"
                raise StoreError(UNUSABLE, said) from error
            id_, title, system, created_s, leaf = head
            return Conversation(id_, title, system, created_s, {message.id: message for message in found}, leaf)

        return self._run(read)

    def sessions(self) -> list[Summary]:
        """The newest _SESSIONS_SHOWN conversations, newest first."""
        query = "SELECT id, title, updated_s FROM sessions WHERE deleted_s IS NULL ORDER BY updated_s DESC LIMIT ?"
        return self._run(lambda db: [Summary(*row) for row in db.execute(query, (_SESSIONS_SHOWN,))])

    def rename(self, session: str, title: str) -> None:
        self._run(lambda db: db.execute("UPDATE sessions SET title = ? WHERE id = ?", (title, session)))

    def delete(self, session: str) -> None:
        """Out of sight; ``restore`` brings it back for a day."""
        self._run(lambda db: db.execute("UPDATE sessions SET deleted_s = ? WHERE id = ?", (time.time(), session)))

    def restore(self, session: str) -> None:
        self._run(lambda db: db.execute("UPDATE sessions SET deleted_s = NULL WHERE id = ?", (session,)))

    def search(self, text: str, limit: int = 50) -> list[Hit]:
        """Messages that have every word of a text, newest first."""
        words = text.split()
        if not words:
            return []
        clauses, values = [], []
        long = [word for word in words if len(word) >= 3]
        if long:
            clauses.append("m.n IN (SELECT rowid FROM words WHERE words MATCH ?)")
            values.append(" AND ".join('"' + word.replace('"', '""') + '"' for word in long))
        for word in words:
            if len(word) < 3:
                clauses.append("m.text LIKE ? ESCAPE '\\'")
                values.append(f"%{_escaped(word)}%")
        query = (
            "SELECT m.session, s.title, m.id, m.text FROM messages m JOIN sessions s ON s.id = m.session "
            f"WHERE s.deleted_s IS NULL AND {' AND '.join(clauses)} ORDER BY m.n DESC LIMIT {int(limit)}"
        )
        return self._run(lambda db: [_hit(row, words[0]) for row in db.execute(query, values)])

    def prompts(self) -> list[str]:
        """What was typed, oldest first."""
        query = "SELECT text FROM (SELECT n, text FROM prompts ORDER BY n DESC LIMIT ?) ORDER BY n"
        return self._run(lambda db: [text for (text,) in db.execute(query, (_PROMPTS_KEPT,))])

    def remember_prompt(self, text: str) -> None:
        def write(db: sqlite3.Connection) -> None:
            db.execute("INSERT INTO prompts(text) VALUES (?)", (text,))
            db.execute("DELETE FROM prompts WHERE n <= (SELECT max(n) FROM prompts) - ?", (_PROMPTS_KEPT,))

        self._run(write)

    def _open(self) -> None:
        with self._lock, _told(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))  # conversations are nobody else's business
            db = sqlite3.connect(self.path, timeout=_LOCK_WAIT_S, check_same_thread=False)
            db.text_factory = lambda text: clean(text.decode("utf-8", "replace"))  # others can write to the file too
            try:
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version > _VERSION:
                    raise StoreError(UNUSABLE, f"{self.path} was made by a newer version of this app")
                db.execute("PRAGMA journal_mode = WAL")
                if db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                    raise StoreError(CORRUPT, f"{self.path} is damaged")
                db.executescript(_SCHEMA)
                with db:
                    old = time.time() - _UNDO_FOR_S
                    db.execute(
                        "DELETE FROM messages WHERE session IN (SELECT id FROM sessions WHERE deleted_s < ?)", (old,)
                    )
                    db.execute("DELETE FROM sessions WHERE deleted_s < ?", (old,))
                    db.execute(f"PRAGMA user_version = {_VERSION}")
            except BaseException:
                db.close()
                raise
            self._db = db

    def _run(self, action: Callable[[sqlite3.Connection], T]) -> T:
        if self._db is None:
            self._open()
        with self._lock, _told(self.path):
            assert self._db is not None
            with self._db:
                return action(self._db)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """SQLite's and the system's errors as StoreError."""
    try:
        yield
    except sqlite3.Error as error:
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise StoreError(FULL, f"the disk of {path.parent} is full") from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreError(LOCKED, f"{path} is locked by another program") from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise StoreError(CORRUPT, f"{path} is damaged: {error}") from error
        raise StoreError(UNUSABLE, f"{path} cannot be used: {error}") from error
    except OSError as error:
        raise StoreError(UNUSABLE, f"{path} cannot be used: {error.strerror or error}") from error


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def _hit(row: tuple[str, str, str, str], word: str) -> Hit:
    session, title, message, text = row
    at = max(text.casefold().find(word.casefold()), 0)
    begin = max(at - 30, 0)
    excerpt = text[begin : at + 100].replace("\n", " ")
    return Hit(session, title, message, excerpt, at - begin, at - begin + len(word))


def _cleaned(value: Any) -> Any:
    """JSON with all its strings clean: escaped in the file, control characters only come out now."""
    if isinstance(value, dict):
        return {name: _cleaned(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    return clean(value) if isinstance(value, str) else value


def _message(data: dict[str, Any]) -> Message:
    data["attachments"] = tuple(Attachment(**item) for item in data["attachments"])
    data["tool_calls"] = tuple(ToolCall(**item) for item in data["tool_calls"])
    data["usage"] = Usage(**data["usage"]) if data["usage"] else None
    return Message(**data)
