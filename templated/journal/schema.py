"""The tables of the journal, and how a file of the version before becomes one of this."""

from __future__ import annotations

VERSION = 8

_PROVISIONED = """
CREATE TABLE provisioned (
    function TEXT NOT NULL REFERENCES functions(name) ON DELETE CASCADE,
    qualifier TEXT NOT NULL,
    count INTEGER NOT NULL,
    changed TEXT NOT NULL,
    PRIMARY KEY (function, qualifier)
) STRICT;
"""
_FUNCTIONS = (
    """
CREATE TABLE functions (
    name TEXT PRIMARY KEY,
    reserved INTEGER,
    created TEXT NOT NULL,
    least INTEGER NOT NULL DEFAULT 0,
    most INTEGER
) STRICT;
CREATE TABLE versions (
    function TEXT NOT NULL REFERENCES functions(name) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    settings TEXT NOT NULL,
    digest TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created TEXT NOT NULL,
    PRIMARY KEY (function, number)
) STRICT;
CREATE TABLE numbers (
    function TEXT PRIMARY KEY,
    last INTEGER NOT NULL
) STRICT;
CREATE TABLE aliases (
    function TEXT NOT NULL REFERENCES functions(name) ON DELETE CASCADE,
    name TEXT NOT NULL,
    versions TEXT NOT NULL,
    description TEXT NOT NULL,
    PRIMARY KEY (function, name)
) STRICT;
CREATE TABLE events (
    id TEXT PRIMARY KEY,
    function TEXT NOT NULL REFERENCES functions(name) ON DELETE CASCADE,
    qualifier TEXT NOT NULL,
    payload BLOB NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    created TEXT NOT NULL,
    due REAL NOT NULL,
    reason TEXT NOT NULL
) STRICT;
CREATE INDEX events_due ON events (state, due);
CREATE INDEX events_of ON events (function);
"""
    + _PROVISIONED
)

_POLICIES = """
CREATE TABLE policies (
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    keys TEXT NOT NULL,
    PRIMARY KEY (kind, name)
) STRICT;
"""

_EGRESSES = """
CREATE TABLE egresses (
    name TEXT PRIMARY KEY,
    idx INTEGER NOT NULL UNIQUE,
    spec TEXT NOT NULL,
    state TEXT NOT NULL,
    created TEXT NOT NULL,
    lanes TEXT NOT NULL DEFAULT '[]'
) STRICT;
"""

SCHEMA = (
    """
CREATE TABLE templates (
    name TEXT PRIMARY KEY,
    active TEXT REFERENCES generations(id)
) STRICT;
CREATE TABLE generations (
    id TEXT PRIMARY KEY,
    template TEXT NOT NULL,
    state TEXT NOT NULL,
    created TEXT NOT NULL
) STRICT;
CREATE TABLE slots (
    id TEXT PRIMARY KEY,
    idx INTEGER NOT NULL UNIQUE,
    generation TEXT NOT NULL,
    uuid TEXT NOT NULL UNIQUE,
    mac TEXT NOT NULL UNIQUE,
    ip TEXT NOT NULL UNIQUE,
    machine_id TEXT NOT NULL UNIQUE,
    boot_id TEXT NOT NULL UNIQUE
) STRICT;
CREATE TABLE clones (
    name TEXT PRIMARY KEY,
    slot TEXT NOT NULL UNIQUE REFERENCES slots(id),
    template TEXT NOT NULL,
    state TEXT NOT NULL,
    path TEXT NOT NULL,
    created TEXT NOT NULL,
    pid INTEGER,
    pid_start INTEGER,
    phases TEXT NOT NULL DEFAULT '{}',
    total_ms REAL,
    reason TEXT NOT NULL DEFAULT '',
    function TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
CREATE TABLE pools (
    template TEXT PRIMARY KEY,
    standby INTEGER NOT NULL,
    warm INTEGER NOT NULL
) STRICT;
"""
    + _FUNCTIONS
    + _POLICIES
    + _EGRESSES
)
"""`numbers` outlives a function: one of the same name later gets no number a second time."""

MIGRATIONS = {
    3: f"ALTER TABLE clones ADD COLUMN function TEXT NOT NULL DEFAULT ''; {_FUNCTIONS}"
    f"{_POLICIES}{_EGRESSES}",
    4: f"""
ALTER TABLE functions ADD COLUMN least INTEGER NOT NULL DEFAULT 0;
ALTER TABLE functions ADD COLUMN most INTEGER;
{_PROVISIONED}{_POLICIES}{_EGRESSES}""",
    5: _POLICIES + _EGRESSES,
    6: _EGRESSES,
    7: "ALTER TABLE egresses ADD COLUMN lanes TEXT NOT NULL DEFAULT '[]';",
}
"""From each version that can be brought to this one; 1 and 2 were never released."""
