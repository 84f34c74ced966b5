"""Output for a person: tables, amounts, ages. Pure, but for the terminal's width.

Lines fit a terminal of 80 columns, except keys and URLs, which are to be copied whole. `click.echo`
removes styles where the output is not a terminal.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime

import click

from ray_valkey_spill.cli.check import FAILED, OK, WARNING
from ray_valkey_spill.cli.inspection import Inspection
from ray_valkey_spill.cli.inventory import (
    Figures,
    Item,
    NodeFigures,
    OverviewStatistics,
    Selection,
    Servers,
    Statistics,
    age,
    percent,
    total,
)
from ray_valkey_spill.format.names import Keyspace, ObjectName, TierName
from ray_valkey_spill.store.cleanup import Remains
from ray_valkey_spill.tiers.ledger import Usage
from ray_valkey_spill.units import escaped

__all__ = [
    "age_text",
    "amount",
    "inspection",
    "listing",
    "note",
    "outcome",
    "overview",
    "pairs",
    "ratio_text",
    "remains_table",
    "shown_chunks",
    "size_text",
    "statistics",
    "summary",
    "table",
    "verdict",
    "wrapped",
]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_NODE = 12  # of the 56 digits of a node's id
_LABEL = 14
_FIRST_CHUNKS, _LAST_CHUNKS = 5, 3
_SHOWN_PROBLEMS = 5
_NONE = "-"
_TIERS: dict[TierName, str] = {"valkey": "Valkey", "overflow": "overflow"}


def terminal_width() -> int:
    """Columns for text: the terminal's, but no more than a person reads well."""
    return min(100, shutil.get_terminal_size().columns)


# --- amounts ---


def size_text(size: float) -> str:
    """Format bytes with three digits and a unit: at most 8 characters."""
    units = iter(_UNITS)
    unit = next(units)
    while size >= 999.5 and unit != _UNITS[-1]:
        size, unit = size / 1024, next(units)
    digits = 0 if unit == "B" or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:,.{digits}f} {unit}"


def age_text(seconds: float | None) -> str:
    """Format seconds in the largest unit of which there are two: `90s`, `12m`, `47h`, `3d`."""
    if seconds is None:
        return _NONE
    for unit, length in _SECONDS.items():
        if seconds >= 2 * length or unit == "s":
            break
    return f"{seconds // length:.0f}{unit}"


def ratio_text(ratio: float | None) -> str:
    return _NONE if ratio is None else f"{ratio:,.{0 if ratio >= 999.5 else 2}f}"


def amount(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# --- layout ---


def wrapped(text: str, *, first: str) -> str:
    """Return `first` and `text` in lines of the terminal's width, indented by `first`."""
    return textwrap.fill(
        text,
        terminal_width(),
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str] | str], width: int | None = None
) -> Iterator[str]:
    """Yield the lines of a table.

    Args:
        columns: titles; ">" before one aligns its cells to the right.
        rows: cells, which may be styled; or a line across all columns, such as a group's title.
        width: of the table; the terminal's, unless given.
    """
    titles = [column.removeprefix(">") for column in columns]
    cells = [titles, *(row for row in rows if not isinstance(row, str))]
    widths = [max(len(click.unstyle(row[i])) for row in cells) for i in range(len(titles))]
    wanted = terminal_width() if width is None else width
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= wanted else " "
    yield click.style(_row(titles, columns, widths, gap), bold=True)
    for row in rows:
        yield row if isinstance(row, str) else _row(row, columns, widths, gap)


def _row(cells: Sequence[str], columns: Sequence[str], widths: Sequence[int], gap: str) -> str:
    padded = []
    for cell, column, width in zip(cells, columns, widths):
        space = " " * (width - len(click.unstyle(cell)))
        padded.append(space + cell if column.startswith(">") else cell + space)
    return gap.join(padded).rstrip()


def pairs(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield a line for each label and its value."""
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        yield f"{label:<{width}}  {value}"


def _field(label: str, text: str) -> str:
    return wrapped(text, first=label.ljust(_LABEL))


# --- check ---


def verdict(statuses: Sequence[str]) -> str:
    """Count findings, in one line."""
    counts = Counter(statuses)
    failed, warnings = counts[FAILED], counts[WARNING]
    parts = [f"{counts[OK]} ok", amount(warnings, "warning"), f"{failed} failed"]
    verdict = "spilling would not work" if failed else "spilling works from here"
    color = "red" if failed else "yellow" if warnings else "green"
    return click.style(f"{', '.join(parts)}: {verdict}", fg=color, bold=True)


# --- ls ---


def listing(items: Iterable[Item], selection: Selection, now: float) -> Iterator[str]:
    """Yield a line for each of the selected items, under titles that name node and tier."""
    group: tuple[str, str, TierName] | None = None
    count = logical = stored = 0
    for item in items:
        name, size, counted = item.entry
        if group is None:
            yield click.style(f"{'object':<56} {'data':>8} {'stored':>8} {'age':>5}", bold=True)
        if group != (name.session, name.node, item.tier):
            group = (name.session, name.node, item.tier)
            yield click.style(
                f"{name.session}, node {name.node[:_NODE]}, {_TIERS[item.tier]}", fg="cyan"
            )
        yield (
            f"{name.object_id:<56} {size_text(size):>8} {size_text(counted):>8} "
            f"{age_text(age(name.time, now)):>5}"
        )
        count, logical, stored = count + 1, logical + size, stored + counted
    if count:
        cut = ", as --limit allows" if count == selection.limit else ""
        yield (
            f"{amount(count, 'object')} of {size_text(logical)}, stored in {size_text(stored)}{cut}"
        )
    else:
        yield "Nothing is stored." if selection.is_everything else "No stored object matches."


# --- stats ---

# By the kind of policy. A spilled object has no TTL.
_EVICTIONS = {
    "noeviction": "evicts nothing",
    "volatile": "evicts keys with a TTL, never spilled objects",
    "allkeys": "may evict spilled objects",
}


def statistics(found: Statistics) -> Iterator[str]:
    yield from _server(found.servers, found.root)
    budget = found.max_bytes
    bound = "" if budget is None else f" of {size_text(budget)}"
    share = _share(found.charged, budget) or (", no max_bytes given" if budget is None else "")
    yield _field("budget", f"{size_text(found.charged)}{bound} used{share}")
    if found.grants:
        yield _field(
            "grants",
            f"{size_text(found.granted)} to {amount(len(found.grants), 'writer')}, of which "
            f"{size_text(found.written)} are written",
        )
    if dead := found.dead_nodes:
        size = sum(node.stored for node in dead)
        share = _share(size, sum(node.stored for node in found.nodes))
        yield _field("dead nodes", f"{amount(len(dead), 'node')}, {size_text(size)} stored{share}")
    yield ""
    if not found.nodes:
        yield "Nothing is stored, and no node has a lease."
        return
    rows: list[Sequence[str] | str] = []
    for session, nodes in found.sessions:
        rows.append(click.style(session, fg="cyan"))
        for node in nodes:
            rows += _tier_rows(
                f"  {node.node_name.node[:_NODE]}",
                node.valkey,
                node.overflow,
                found.now,
                _state(node),
            )
        if len(nodes) > 1:
            rows += _tier_rows(f"  {amount(len(nodes), 'node')}", *total(nodes), found.now)
    if len(found.sessions) > 1:
        rows.append("")
        rows += _tier_rows(amount(len(found.sessions), "session"), *total(found.nodes), found.now)
    yield from table(
        ["node", "tier", ">objects", ">data", ">stored", ">ratio", ">oldest", ">lease"], rows
    )


def overview(found: OverviewStatistics) -> Iterator[str]:
    """Yield the server's figures, and a row for each namespace and tier."""
    yield from _server(found.servers, found.prefix)
    yield ""
    rows: list[Sequence[str] | str] = []
    for each in found.namespaces:
        if each.statistics is None:
            rows.append(f"{each.name}: {each.failure}")
            continue
        living = sum(node.has_fresh_lease for node in each.statistics.nodes)
        rows += _tier_rows(
            each.name, *total(each.statistics.nodes), each.statistics.now, f"{living:,}"
        )
    yield from table(
        ["namespace", "tier", ">objects", ">data", ">stored", ">ratio", ">oldest", ">live nodes"],
        rows,
    )


def _server(servers: Servers, root: str) -> Iterator[str]:
    memory, first = servers.memory, servers.infos[0]
    yield _field("server", f"{first.product} {first.version} at {servers.address}")
    yield _field("topology", _topology(servers))
    yield _field("keys", f"{root}*")
    bound = f" of {size_text(memory.maxmemory)}" if memory.maxmemory else ""
    share = _share(memory.used, memory.maxmemory) or ", without a maxmemory"
    yield _field("memory", f"{size_text(memory.used)}{bound} used{share}")
    effect = _EVICTIONS.get(memory.policy.partition("-")[0], "not known to this version")
    yield _field("policy", f"{memory.policy}: {effect}")


def _topology(servers: Servers) -> str:
    replicas = f"{amount(servers.replicas, 'replica')} in step"
    if servers.is_cluster:
        return f"cluster of {amount(len(servers.infos), 'shard')}, {replicas}"
    if servers.sentinel_service is not None:
        return f"primary of {servers.sentinel_service!r}, found by Sentinels, {replicas}"
    return f"single primary, {replicas}"


def _share(part: int, whole: int | None) -> str:
    share = percent(part, whole)
    return "" if share is None else f" ({share:.0f} %)"


def _state(node: NodeFigures) -> str:
    colour = {"alive": "green", "silent": "yellow", "dead": "red"}[node.state]
    since = "" if node.lease_age is None else f" {age_text(node.lease_age)}"
    return click.style(f"{node.state}{since}", fg=colour)


def _tier_rows(
    title: str, valkey: Figures, overflow: Figures, now: float, lease: str = ""
) -> Iterator[list[str]]:
    """Yield a row for each tier that has something, and one for half-written objects."""
    shown = [(_TIERS["overflow"], overflow)] if overflow.objects else []
    if valkey.objects or not shown:
        shown.insert(0, (_TIERS["valkey"], valkey))
    for tier, figures in shown:
        oldest = None if figures.since is None else age(figures.since, now)
        yield [
            title,
            tier,
            f"{figures.objects:,}",
            size_text(figures.logical),
            size_text(figures.stored),
            ratio_text(figures.ratio),
            age_text(oldest),
            lease,
        ]
        title = lease = ""
    half_written = valkey.half_written + overflow.half_written
    if half_written:
        yield ["", "half-written", f"{half_written:,}", "", "", "", "", ""]


# --- inspect ---


def inspection(found: Inspection, keys: Keyspace, now: float, chunk: int | None) -> Iterator[str]:
    """Yield all figures, and some of the chunks, with `chunk` among them."""
    name, header = found.name, found.header
    yield click.style(f"object        {name.object_id}", bold=True)
    yield _field("session", name.session)
    yield _field("node", name.node)
    yield _field("tier", _TIERS[found.tier])
    yield f"{'file' if found.tier == 'overflow' else 'key':<{_LABEL}}{found.location}"
    if (url := found.url(keys)) is not None:
        yield f"{'url':<{_LABEL}}{url}"
    yield _field("spilled", _spilled(name, now))
    counted = "" if found.entry is None else f"; {size_text(found.entry.stored)} are counted for it"
    yield _field("in the ledger", f"{found.state}{'' if found.tier == 'overflow' else counted}")
    if header is not None:
        sealed = f", sealed with key {header.seal.key_id:016x}" if header.seal else ""
        yield _field("format", f"version {found.version}{sealed}")
        yield _field(
            "Ray metadata", escaped(header.ray_metadata.decode(errors="backslashreplace")) or _NONE
        )
        # It is longer than a line, and nobody copies it.
        pieces = textwrap.wrap(header.owner_address.hex(), 64)
        yield _field("owner address", " ".join(pieces) or _NONE)
        yield _field("data", f"{size_text(header.size)} ({header.size:,} bytes)")
        yield _field(
            "stored",
            f"{size_text(header.stored_size)} ({header.stored_size:,} bytes), "
            f"ratio {ratio_text(found.ratio)}",
        )
        yield _field("chunks", _chunks(found))
    for problem in found.problems[:_SHOWN_PROBLEMS]:
        yield _problem(escaped(problem))
    if len(found.problems) > _SHOWN_PROBLEMS:
        yield _problem(f"and {len(found.problems) - _SHOWN_PROBLEMS:,} more of the kind")
    if header is not None and header.chunks and not header.inline:
        yield ""
        yield from _chunk_table(found, chunk)


def _spilled(name: ObjectName, now: float) -> str:
    when = datetime.fromtimestamp(name.time).astimezone()
    ago = age_text(age(name.time, now))
    return f"{when:%Y-%m-%d %H:%M:%S %z}, {ago} ago, by process {name.writer}"


def _chunks(found: Inspection) -> str:
    assert found.header is not None
    if found.header.inline:
        where = "beside the header, in its key"
    else:
        where = f"of {size_text(found.header.chunk_size)} each"
    codecs = ", ".join(f"{count:,} {codec}" for codec, count in found.codecs().items())
    return f"{len(found.header.chunks):,} {where}" + (f": {codecs}" if codecs else "")


def _problem(text: str) -> str:
    label = "problem".ljust(_LABEL)
    return click.style(label, fg="red", bold=True) + wrapped(text, first=label)[_LABEL:]


def _chunk_table(found: Inspection, chunk: int | None) -> Iterator[str]:
    assert found.header is not None
    columns = [">chunk", ">data", ">stored", "codec", "XXH3-64"]
    if found.tier == "valkey":
        columns.append("on the server")
    rows: list[Sequence[str] | str] = []
    before = -1
    for number in shown_chunks(len(found.header.chunks), chunk):
        if number != before + 1:
            rows.append("…")
        stored, codec, digest = found.header.chunks[number]
        span = found.header.span(number)
        cells = [
            f"{number:,}",
            f"{span.stop - span.start:,}",
            f"{stored:,}",
            codec.name.lower(),
            _NONE if found.header.seal else f"{digest:016x}",
            _presence(found, number, stored),
        ]
        rows.append(cells[: len(columns)])
        before = number
    yield from table(columns, rows)


def _presence(found: Inspection, number: int, stored: int) -> str:
    if number >= len(found.found):
        return _NONE
    actual = found.found[number]
    if actual == stored:
        return click.style("there", fg="green")
    return click.style(f"{actual:,} bytes" if actual else "gone", fg="red")


def shown_chunks(count: int, chunk: int | None) -> list[int]:
    """Return the numbers of the chunks to show: the first and last few, and `chunk`."""
    numbers = {*range(count)[:_FIRST_CHUNKS], *range(count)[-_LAST_CHUNKS:]}
    return sorted(numbers if chunk is None or chunk >= count else numbers | {chunk})


# --- gc ---


def note(text: str) -> str:
    """Return a note of `CleanUp`, with the ids of nodes as short as in tables."""
    return wrapped(re.sub(rf"(?<=:)([0-9a-f]{{{_NODE}}})[0-9a-f]{{44}}\b", r"\1", text), first="")


def remains_table(remains: Sequence[Remains]) -> Iterator[str]:
    """Yield a row for each dead node, with the columns in which any has something."""
    shown = [each for each in remains if _has_data(each)]
    columns = {
        "objects": [_objects(each) for each in shown],
        "in Valkey": [_usage(each).stored for each in shown],
        "half-written": [each.pending for each in shown],
        "files": [each.files for each in shown],
        "in the overflow": [each.file_bytes for each in shown],
    }
    columns = {title: amounts for title, amounts in columns.items() if any(amounts)}
    in_bytes = ("in Valkey", "in the overflow")
    rows: list[Sequence[str] | str] = []
    session = None
    for number, each in enumerate(shown):
        if each.node_name.session != session:
            session = each.node_name.session
            state = "is dead" if each.session_is_dead else "runs, and has lost nodes"
            rows.append(f"{click.style(session, fg='cyan')} {state}")
        rows.append(
            [
                f"  {each.node_name.node[:_NODE]}",
                *(
                    size_text(amounts[number]) if title in in_bytes else f"{amounts[number]:,}"
                    for title, amounts in columns.items()
                ),
            ]
        )
    if rows:
        yield from table(["node", *(f">{title}" for title in columns)], rows)


def summary(remains: Sequence[Remains]) -> str:
    """Say how much all of it is, in one phrase."""
    nodes = amount(len(remains), "dead node")
    if not any(map(_has_data, remains)):
        return f"the metadata of {nodes}, which had nothing stored"
    objects = sum(map(_objects, remains))
    stored = sum(_usage(each).stored for each in remains)
    half_written = sum(each.pending for each in remains)
    files = sum(each.files for each in remains)
    file_bytes = sum(each.file_bytes for each in remains)
    parts = [
        f"{amount(objects, 'object')} ({size_text(stored)})" if objects else "",
        amount(half_written, "half-written object") if half_written else "",
        f"{amount(files, 'file')} ({size_text(file_bytes)})" if files else "",
    ]
    *first, last = filter(None, parts)
    return f"{', '.join(first)} and {last} of {nodes}" if first else f"{last} of {nodes}"


def unseen(sessions: Sequence[str], overflow_uri: str | None) -> Iterator[str]:
    """Say which sessions have files in an overflow that is not given, or not mounted."""
    if sessions:
        first, others = sessions[0], amount(len(sessions) - 1, "other session")
        whose = first if len(sessions) == 1 else f"{first} and {others}"
        fix = "give its --overflow-uri" if overflow_uri is None else "it is not there now"
        yield wrapped(f"Not counted: what {whose} may have in an overflow: {fix}.", first="")


def outcome(
    remains: Sequence[Remains], removed: Sequence[Remains], *, dry_run: bool, is_all: bool = True
) -> Iterator[str]:
    """Say what was done about what was found; `is_all` is false if more was found, and kept."""
    if not remains:
        yield "Nothing to remove." if is_all else "Nothing else to remove."
    elif dry_run:
        yield wrapped(f"Would remove {summary(remains)}.", first="")
    elif not removed:
        yield wrapped(f"Removed nothing. Left: {summary(remains)}.", first="")
    else:
        yield wrapped(f"Removed {summary(removed)}.", first="")
        if len(removed) < len(remains):
            kept = amount(len(remains) - len(removed), "node")
            yield wrapped(f"Kept {kept}: their sessions have renewed leases meanwhile.", first="")


def reclaimed(objects: int, stored: int) -> Iterator[str]:
    """Say how much of dead nodes of running sessions nobody needed any more, if any."""
    if objects:
        what = f"{amount(objects, 'object')} ({size_text(stored)})"
        yield wrapped(f"Removed {what} of dead nodes that nobody needed any more.", first="")


def stays(session: str, referenced: int, unknown: int) -> str:
    """Say why objects of dead nodes stay whose owners were asked."""
    parts = [
        f"{amount(referenced, 'object')} that somebody references" if referenced else "",
        f"{amount(unknown, 'object')} whose owners gave no answer or are not known"
        if unknown
        else "",
    ]
    return f"Kept of dead nodes of {session}, which runs: {', and '.join(filter(None, parts))}"


def _has_data(remains: Remains) -> bool:
    return bool(_objects(remains) or remains.pending or remains.files)


def _objects(remains: Remains) -> int:
    return _usage(remains).objects


def _usage(remains: Remains) -> Usage:
    """Of a session that runs, stored objects are not removed."""
    return remains.usage if remains.session_is_dead else Usage()
