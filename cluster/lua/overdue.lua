#!lua flags=allow-oom
-- Return the photos to send again. A photo needs one message: while there are as many as photos, more are no help.
local jobs, starts, bytes, queue = unpack(KEYS)
local id, seconds = unpack(ARGV)
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
if redis.call('LLEN', queue) >= redis.call('ZCARD', jobs) then return {} end
local ids = redis.call('ZRANGE', jobs, '-inf', now, 'BYSCORE', 'LIMIT', 0, 100)
for _, id in ipairs(ids) do redis.call('ZADD', jobs, now + seconds, id) end
return ids
