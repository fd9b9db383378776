-- One call of one gateway, as helixflow/limits/store.py describes it.
-- KEYS: all gateways (sorted set), this gateway (hash), then the counters (hashes), one for each item.
-- ARGV: now (ms), gateway, sequence, batch, how long holds last (ms), how long a gateway is remembered (ms); then for
-- each item: limit, floor, need, want, held, spent, how long the counter is kept (ms).
-- Returns -1 alone for a call that a later one has overtaken; else the number of gateways, then granted and room of each item.
-- A counter's fields: `used`, and for each gateway that holds something `amount:lapses`.

local now, gateway, hold = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[5])

local last = redis.call('HMGET', KEYS[2], 'sequence', 'batch')
if last[1] and tonumber(last[1]) >= tonumber(ARGV[3]) then
    return {-1}
end
local fresh = not last[2] or tonumber(last[2]) < tonumber(ARGV[4])
redis.call('HSET', KEYS[2], 'sequence', ARGV[3], 'batch', ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
redis.call('ZADD', KEYS[1], ARGV[1], gateway)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now - hold))
redis.call('PEXPIRE', KEYS[1], ARGV[6])

local answer = {redis.call('ZCARD', KEYS[1])}
local lapses = string.format(':%.0f', now + hold)

for n = 3, #KEYS do
    local key, at = KEYS[n], (n - 3) * 7 + 6
    local limit, floor, need = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
    local want, held, spent = tonumber(ARGV[at + 4]), tonumber(ARGV[at + 5]), tonumber(ARGV[at + 6])

    local used, others, known = 0, 0, false
    local fields = redis.call('HGETALL', key)
    for f = 1, #fields, 2 do
        local name, value = fields[f], fields[f + 1]
        if name == 'used' then
            used = tonumber(value)
        elseif name == gateway then
            known = true
        else
            local amount, until_ms = string.match(value, '^(%d+):(%d+)$')
            if tonumber(until_ms) > now then
                others = others + tonumber(amount)
            else
                redis.call('HDEL', key, name)
            end
        end
    end
    if fresh and spent > 0 then
        redis.call('HINCRBY', key, 'used', ARGV[at + 6])
        used = used + spent
    end

    local room, granted = math.max(0, limit - used - others - held), 0
    if room >= need then
        granted = math.max(need, math.min(want, math.floor(room / 16)))
    elseif floor > 0 and room >= floor then
        granted = room
    end
    if held + granted > 0 then
        redis.call('HSET', key, gateway, string.format('%.0f', held + granted) .. lapses)
    elseif known then
        redis.call('HDEL', key, gateway)
    end
    redis.call('PEXPIRE', key, ARGV[at + 7])

    answer[#answer + 1] = granted
    answer[#answer + 1] = room - granted
end

return answer
