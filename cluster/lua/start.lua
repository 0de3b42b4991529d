#!lua flags=allow-oom
-- Count a start of the work on a photo, and return the count and the time; 0 if it is done.
local jobs, starts = unpack(KEYS)
local id, seconds = unpack(ARGV)
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
if not redis.call('ZSCORE', jobs, id) then return {0, ''} end
redis.call('ZADD', jobs, now + seconds, id)
return {redis.call('HINCRBY', starts, id, 1), tostring(now)}
