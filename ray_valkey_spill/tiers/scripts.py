"""The ledger's Lua scripts. The comment above each lists its KEYS and ARGV.

Scripts that account for objects or grants share the same keys: pending, index, usage, writers,
totals. Invariant: every script is safe to repeat, because a link may send it twice. So a script
sets whole values, or acts only on the present members of a set.

The time of a script does not depend on the number of nodes. The exception is a server without
totals, as version 0.1 leaves it: the first script adds them up once.
"""

from __future__ import annotations

__all__ = [
    "ADD",
    "ADD_ADDRESSES",
    "ADJUST",
    "AGREE",
    "CORRECT",
    "FORGET",
    "FORGET_OVERFLOW",
    "NODES",
    "PENDING",
    "RELEASE",
    "RENEW",
    "RESERVE",
    "SETTLE",
    "SIZES",
    "TOTALS",
]


def _script(*parts: str) -> str:
    lines = [line.strip() for part in parts for line in part.splitlines()]
    return "#!lua flags=allow-oom\n" + "\n".join(filter(None, lines))


# `find` returns the entry of an object in the index.
_FIND = """
local function find(name)
    local entries = redis.call('ZRANGEBYLEX', KEYS[2], '[' .. name .. '.', '(' .. name .. '/')
    for _, entry in ipairs(entries) do
        if entry:sub(#name + 1):match('^%.%d+%.%d+$') then return entry end
    end
end
"""

# `totals` reads the sums over all nodes; `keep_totals` writes what `take_totals` took away. What
# is missing is added up again: a script that is refused a command half-way leaves no wrong sums.
_TOTALS = """
local PATTERN = '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$'
local function text(...) return string.format(('%.0f '):rep(select('#', ...)), ...):sub(1, -2) end
-- Longer numbers are not ours, and cannot be added up exactly.
local function sane(...)
    for i = 1, select('#', ...) do
        if #select(i, ...) > 16 then return false end
    end
    return true
end
local function change_number()
    local now = redis.call('TIME')
    return now[1] * 1000000 + now[2]
end
local function totals()
    local t = {(redis.call('GET', KEYS[5]) or ''):match(PATTERN)}
    if t[1] and sane(unpack(t)) then
        for i = 1, 6 do t[i] = tonumber(t[i]) end
        return t
    end
    t = {0, 0, 0, 0, 0, change_number()}
    for _, value in ipairs(redis.call('HVALS', KEYS[3])) do
        local objects, size, stored = value:match('^(%d+) (%d+) (%d+) %d+$')
        if objects and sane(objects, size, stored) then
            t[1], t[2], t[3] = t[1] + objects, t[2] + size, t[3] + stored
        end
    end
    for _, value in ipairs(redis.call('HVALS', KEYS[4])) do
        for granted, written in value:gmatch('[^ =]+=(%d+)/(%d+)') do
            if sane(granted, written) then t[4], t[5] = t[4] + granted, t[5] + written end
        end
    end
    return t
end
local function take_totals()
    local t = totals()
    redis.call('UNLINK', KEYS[5])
    return t
end
local function keep_totals(t)
    for i = 1, 5 do t[i] = math.max(0, t[i]) end
    if t[1] + t[3] + t[4] > 0 then
        redis.call('SET', KEYS[5], text(t[1], t[2], t[3], t[4], t[5], t[6] + 1))
    end
end
"""

# `change` adds to the usage of a node, and to the totals.
_CHANGE = """
local function change(t, node, objects, size, stored)
    local was = redis.call('HGET', KEYS[3], node) or ''
    local o, z, s, c = was:match('^(%d+) (%d+) (%d+) (%d+)$')
    if not (o and sane(o, z, s, c)) then o, z, s, c = 0, 0, 0, change_number() end
    local left = o + objects > 0
    local size_now, stored_now = math.max(0, z + size), math.max(0, s + stored)
    if not left then
        redis.call('HDEL', KEYS[3], node)
        t[1], t[2], t[3] = t[1] - o, t[2] - z, t[3] - s
    else
        redis.call('HSET', KEYS[3], node, text(o + objects, size_now, stored_now, c + 1))
        t[1], t[2], t[3] = t[1] + objects, t[2] + size_now - z, t[3] + stored_now - s
    end
end
"""

# `grant_of` returns the granted and written bytes of a writer; `set_grant` replaces both.
_GRANTS = """
local function grant_of(node, writer)
    for name, granted, written in
            (redis.call('HGET', KEYS[4], node) or ''):gmatch('([^ =]+)=(%d+)/(%d+)') do
        if name == writer and sane(granted, written) then
            return tonumber(granted), tonumber(written)
        end
    end
    return 0, 0
end
local function set_grant(t, node, writer, granted, written)
    local others, was = {}, redis.call('HGET', KEYS[4], node)
    for name, g, w in (was or ''):gmatch('([^ =]+)=(%d+)/(%d+)') do
        if name == writer then
            if sane(g, w) then t[4], t[5] = t[4] - g, t[5] - w end
        elseif sane(g, w) then others[#others + 1] = name .. '=' .. g .. '/' .. w end
    end
    if granted > 0 then
        t[4], t[5] = t[4] + granted, t[5] + written
        others[#others + 1] = writer .. '=' .. text(granted) .. '/' .. text(written)
    end
    if #others > 0 then redis.call('HSET', KEYS[4], node, table.concat(others, ' '))
    elseif was then redis.call('HDEL', KEYS[4], node) end
end
"""

# ARGV: node, writer, or ''; how much of its grant it has written that is left, how much it may keep
# for its next objects, how much all writers may keep together, and the budget, or -1; then the
# entry of each object. What is not settled is left, too: a grant stands for it until it is removed.
# Further KEYS are those of the objects' values, in order, if these are to be looked for. They are
# declared, because what looks like one server may be a proxy before several.
# Returns how many are in the index now, what the writer is granted, what all may still write.
SETTLE = _script(
    _TOTALS,
    _CHANGE,
    _GRANTS,
    """
local node, writer, left, first = ARGV[1], ARGV[2], tonumber(ARGV[3]), 6
local all_are_there = #KEYS == 5 or redis.call('EXISTS', unpack(KEYS, 6)) == #KEYS - 5
local function is_there(name)
    if all_are_there then return true end
    local last = first + name:match('%.(%d+)$')
    local found = redis.call('EXISTS', unpack(KEYS, first, last))
    local count = last - first + 1
    first = last + 1
    return found == count
end
local t = take_totals()
local settled, objects, size, stored = 0, 0, 0, 0
for i = 7, #ARGV do
    local name, z, s = ARGV[i]:match('^(.+)%.(%d+)%.(%d+)$')
    if is_there(name) and redis.call('ZREM', KEYS[1], name) == 1 then
        if redis.call('ZADD', KEYS[2], 0, ARGV[i]) == 1 then
            objects, size, stored = objects + 1, size + z, stored + s
        end
        settled = settled + 1
    elseif redis.call('ZSCORE', KEYS[2], ARGV[i]) then
        settled = settled + 1
    else
        left = left + s
    end
end
if objects > 0 then change(t, node, objects, size, stored) end
local granted = 0
if writer ~= '' then
    local budget = tonumber(ARGV[6])
    local others = t[4] - grant_of(node, writer)
    local kept = math.min(tonumber(ARGV[4]), ARGV[5] - others)
    if budget >= 0 then kept = math.min(kept, budget - t[3] - others - left) end
    granted = left + math.max(0, kept)
    set_grant(t, node, writer, granted, left)
end
keep_totals(t)
return {settled, granted, t[4] - t[5]}
""",
)

# ARGV: names. Nothing is forgotten for a user who may not UNLINK: the values are still there.
FORGET = _script(
    _FIND,
    _TOTALS,
    _CHANGE,
    """
local t = take_totals()
local nodes = {}
for _, name in ipairs(ARGV) do
    redis.call('ZREM', KEYS[1], name)
    local entry = find(name)
    if entry then
        redis.call('ZREM', KEYS[2], entry)
        local node = name:match('^[^:]+:[^:]+')
        local z, s = entry:match('%.(%d+)%.(%d+)$')
        local sums = nodes[node] or {0, 0, 0}
        nodes[node] = {sums[1] - 1, sums[2] - z, sums[3] - s}
    end
end
for node, sums in pairs(nodes) do change(t, node, sums[1], sums[2], sums[3]) end
keep_totals(t)
""",
)

# KEYS: a sorted set. ARGV: members. A script, because a full server refuses a ZADD, and could take
# the values that follow a registration before its client reads of that.
ADD = _script(
    """
local scored = {}
for i, member in ipairs(ARGV) do scored[2 * i - 1], scored[2 * i] = 0, member end
redis.call('ZADD', KEYS[1], unpack(scored))
return #ARGV
"""
)

# ARGV: start, stop, count. Returns the last member of the page, and its pending members. A member
# that is in the index too is not pending: a repeated ZADD arrived after the object was settled.
PENDING = _script(
    _FIND,
    """
local page = redis.call('ZRANGEBYLEX', KEYS[1], ARGV[1], ARGV[2], 'LIMIT', 0, ARGV[3])
local left = {}
for _, name in ipairs(page) do
    if not find(name) then table.insert(left, name) end
end
return {page[#page] or '', left}
""",
)

# ARGV: node, writer, granted and written so far, least, most, budget, room. Budget limits the bytes
# stored or granted, room the bytes still to write; both may be -1.
# Returns the added grant, or 0; the used bytes of the budget; the bytes that all writers may still
# write; the number of stored objects, their size, and the bytes counted for them.
RESERVE = _script(
    _TOTALS,
    _GRANTS,
    """
local node, writer, granted, written = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local t = take_totals()
local own_granted, own_written = grant_of(node, writer)
-- What the writer has been granted may not be here yet, nor what it has written of that.
local used = t[3] + t[4] - own_granted + granted
local unwritten = t[4] - own_granted + granted - (t[5] - own_written + written)
local budget, room, most = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[6])
if budget >= 0 then most = math.min(most, budget - used) end
if room >= 0 then most = math.min(most, room - unwritten) end
if most < tonumber(ARGV[5]) then most = 0 end
set_grant(t, node, writer, granted + most, written)
keep_totals(t)
return {most, used, unwritten + most, t[1], t[2], t[3]}
""",
)

# ARGV: node, writers; without any, all that the node has.
RELEASE = _script(
    _TOTALS,
    _GRANTS,
    """
local t = take_totals()
for i = 2, #ARGV do set_grant(t, ARGV[1], ARGV[i], 0, 0) end
if #ARGV == 1 then
    local was = redis.call('HGET', KEYS[4], ARGV[1]) or ''
    for granted, written in was:gmatch('[^ =]+=(%d+)/(%d+)') do
        if sane(granted, written) then t[4], t[5] = t[4] - granted, t[5] - written end
    end
    redis.call('HDEL', KEYS[4], ARGV[1])
end
keep_totals(t)
""",
)

# Returns the totals.
TOTALS = _script(
    _TOTALS,
    """
return totals()
""",
)

# ARGV: the number of changes of the totals when all nodes were added up, then what came of that.
# Returns whether the totals are that now: nothing had changed since, or they were right.
ADJUST = _script(
    _TOTALS,
    """
local t = take_totals()
local counted, are_right = {0, 0, 0, 0, 0, t[6]}, true
for i = 1, 5 do
    counted[i] = tonumber(ARGV[i + 1])
    are_right = are_right and t[i] == counted[i]
end
local is_current = are_right or t[6] == tonumber(ARGV[1])
-- Totals that could not be read are added up by now, and have a number of changes from here on.
keep_totals(is_current and counted or t)
return is_current and 1 or 0
""",
)

# ARGV: node, its old usage, its new one. Returns whether the old one matched.
CORRECT = _script(
    _TOTALS,
    """
if (redis.call('HGET', KEYS[3], ARGV[1]) or '') ~= ARGV[2] then return 0 end
local t = take_totals()
local function add(usage, sign)
    local o, z, s = usage:match('^(%d+) (%d+) (%d+) %d+$')
    if o then t[1], t[2], t[3] = t[1] + sign * o, t[2] + sign * z, t[3] + sign * s end
end
add(ARGV[2], -1)
add(ARGV[3], 1)
if ARGV[3] == '' then redis.call('HDEL', KEYS[3], ARGV[1])
else redis.call('HSET', KEYS[3], ARGV[1], ARGV[3]) end
keep_totals(t)
return 1
""",
)

# KEYS: a sorted set. ARGV: start, count. Returns one member of each of the next `count` nodes.
NODES = _script(
    """
local found, start = {}, ARGV[1]
for _ = 1, ARGV[2] do
    local member = redis.call('ZRANGEBYLEX', KEYS[1], start, '+', 'LIMIT', 0, 1)[1]
    if not member then break end
    table.insert(found, member)
    local node = member:match('^[^:]+:[^:]+')
    start = node and '[' .. node .. ';' or '(' .. member
end
return found
"""
)

# KEYS: chunks of objects. Returns the length of each, or 0 if it is missing.
SIZES = """
local sizes = {}
for i, key in ipairs(KEYS) do
    local size = redis.pcall('STRLEN', key)
    sizes[i] = type(size) == 'number' and size or 0
end
return table.concat(sizes, ' ')
"""

# KEYS: leases. ARGV: member, "1" if it may be new. Returns whether the lease exists now. A lease is
# a score and not a `SET` with `PX`: no key may have a TTL, or `volatile-*` could evict it.
RENEW = _script(
    """
if ARGV[2] ~= '1' and not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
local now = redis.call('TIME')
redis.call('ZADD', KEYS[1], string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000)),
           ARGV[1])
return 1
"""
)

# KEYS: leases. ARGV: members, each followed by another one for the same node, with an address more.
# That gets the time of the first, if it exists.
ADD_ADDRESSES = _script(
    """
for i = 1, #ARGV, 2 do
    local renewed = redis.call('ZSCORE', KEYS[1], ARGV[i])
    if renewed then redis.call('ZADD', KEYS[1], 'NX', renewed, ARGV[i + 1]) end
end
return 0
"""
)

# KEYS: overflows. ARGV: session, token. Returns the session's token.
AGREE = _script(
    """
redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
local agreed = redis.call('HGET', KEYS[1], ARGV[1])
if agreed:match('^[ -%.0-~]+$') then return agreed end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return ARGV[2]
"""
)

# KEYS: overflows, leases. ARGV: session, "<session>:", and a time. Returns whether the session's
# token is forgotten: not if a node of it has taken or renewed its lease since.
FORGET_OVERFLOW = _script(
    """
for _, member in ipairs(redis.call('ZRANGE', KEYS[2], ARGV[3], '+inf', 'BYSCORE')) do
    if member:sub(1, #ARGV[2]) == ARGV[2] then return 0 end
end
redis.call('HDEL', KEYS[1], ARGV[1])
return 1
"""
)
