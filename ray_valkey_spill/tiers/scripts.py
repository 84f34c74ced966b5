"""The ledger's Lua scripts. The comment above each lists its KEYS and ARGV."""

from __future__ import annotations

__all__ = ["AGREE", "CORRECT", "FORGET", "FORGET_OVERFLOW", "PENDING", "RENEW", "RESERVE", "SETTLE"]


def _script(body: str) -> str:
    return "#!lua flags=allow-oom\n" + body.strip()


_FIND = """
local function find(name)
    local entries = redis.call('ZRANGEBYLEX', KEYS[2], '[' .. name .. '.', '(' .. name .. '/')
    for _, entry in ipairs(entries) do
        if entry:sub(#name + 1):match('^%.%d+%.%d+$') then return entry end
    end
end
"""

_CHANGE = """
local function change(owner, objects, size, stored)
    local was = redis.call('HGET', KEYS[3], owner) or ''
    local o, z, s, c = was:match('^(%d+) (%d+) (%d+) (%d+)$')
    if not o then
        local now = redis.call('TIME')
        o, z, s, c = 0, 0, 0, now[1] * 1000000 + now[2]
    end
    if o + objects <= 0 then
        redis.call('HDEL', KEYS[3], owner)
    else
        redis.call('HSET', KEYS[3], owner, string.format('%.0f %.0f %.0f %.0f',
            o + objects, math.max(0, z + size), math.max(0, s + stored), c + 1))
    end
end
"""

# KEYS: pending, index, usage. ARGV: owner, then for each object its name and ".<size>.<stored>".
# Returns how many are in the index now.
SETTLE = _script(
    _FIND
    + _CHANGE
    + """
local settled, objects, size, stored = 0, 0, 0, 0
for i = 2, #ARGV, 2 do
    local was_pending = redis.call('ZREM', KEYS[1], ARGV[i]) == 1
    if find(ARGV[i]) then
        settled = settled + 1
    elseif was_pending then
        redis.call('ZADD', KEYS[2], 0, ARGV[i] .. ARGV[i + 1])
        local z, s = ARGV[i + 1]:match('^%.(%d+)%.(%d+)$')
        objects, size, stored = objects + 1, size + z, stored + s
        settled = settled + 1
    end
end
if objects > 0 then change(ARGV[1], objects, size, stored) end
return settled
"""
)

# KEYS: pending, index, usage. ARGV: names.
FORGET = _script(
    _FIND
    + _CHANGE
    + """
local owners = {}
for _, name in ipairs(ARGV) do
    redis.call('ZREM', KEYS[1], name)
    local entry = find(name)
    if entry then
        redis.call('ZREM', KEYS[2], entry)
        local owner = name:match('^[^:]+:[^:]+')
        local z, s = entry:match('%.(%d+)%.(%d+)$')
        local sums = owners[owner] or {0, 0, 0}
        owners[owner] = {sums[1] - 1, sums[2] - z, sums[3] - s}
    end
end
for owner, sums in pairs(owners) do change(owner, sums[1], sums[2], sums[3]) end
"""
)

# KEYS: pending, index. ARGV: start, stop, count. Returns the last member looked at, and those that
# are pending: a member that is in the index too came over a connection that had broken.
PENDING = _script(
    _FIND
    + """
local page = redis.call('ZRANGEBYLEX', KEYS[1], ARGV[1], ARGV[2], 'LIMIT', 0, ARGV[3])
local left = {}
for _, name in ipairs(page) do
    if not find(name) then table.insert(left, name) end
end
return {page[#page] or '', left}
"""
)

# KEYS: usage, grants. ARGV: writer, granted and written so far, at least, at most, budget, room.
# Budget is what may be stored, and room what may be written beside what is; both in bytes, or -1.
# Returns what is granted on top, or 0, how much of the budget was used, and how much all may still
# write.
RESERVE = _script(
    """
local used, unwritten = 0, 0
for _, value in ipairs(redis.call('HVALS', KEYS[1])) do
    used = used + (value:match('^%d+ %d+ (%d+) %d+$') or 0)
end
-- Its own may not be there yet: a writer asks for nothing while there are no limits.
used, unwritten = used + ARGV[2], ARGV[2] - ARGV[3]
local grants = redis.call('HGETALL', KEYS[2])
for i = 1, #grants, 2 do
    local granted, written = grants[i + 1]:match('^(%d+) (%d+)$')
    if granted and grants[i] ~= ARGV[1] then
        used, unwritten = used + granted, unwritten + granted - written
    end
end
local budget, room = tonumber(ARGV[6]), tonumber(ARGV[7])
local most = tonumber(ARGV[5])
if budget >= 0 then most = math.min(most, budget - used) end
if room >= 0 then most = math.min(most, room - unwritten) end
if most < tonumber(ARGV[4]) then return {0, used, unwritten} end
redis.call('HSET', KEYS[2], ARGV[1], string.format('%.0f %.0f', ARGV[2] + most, ARGV[3]))
return {most, used, unwritten + most}
"""
)

# KEYS: leases. ARGV: member, "1" if it may be new. Returns whether there is one.
RENEW = _script(
    """
if ARGV[2] ~= '1' and not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
local now = redis.call('TIME')
redis.call('ZADD', KEYS[1], string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000)),
           ARGV[1])
return 1
"""
)

# KEYS: usage. ARGV: owner, what its usage was, and what it is to be. Returns whether it was that.
CORRECT = _script(
    """
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then return 0 end
if ARGV[3] == '' then redis.call('HDEL', KEYS[1], ARGV[1])
else redis.call('HSET', KEYS[1], ARGV[1], ARGV[3]) end
return 1
"""
)

# KEYS: overflows. ARGV: session, token. Returns the token that the session has now.
AGREE = _script(
    """
redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
local agreed = redis.call('HGET', KEYS[1], ARGV[1])
if agreed:match('^[ -%.0-~]+$') then return agreed end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return ARGV[2]
"""
)

# KEYS: overflows, leases. ARGV: session, and "<session>:". Returns whether its token is forgotten:
# not if a node of the session has a lease.
FORGET_OVERFLOW = _script(
    """
for _, member in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
    if member:sub(1, #ARGV[2]) == ARGV[2] then return 0 end
end
redis.call('HDEL', KEYS[1], ARGV[1])
return 1
"""
)
