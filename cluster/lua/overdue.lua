#!lua flags=allow-oom
-- Return the photos to send again. A photo needs one message: while there are as many as photos, more are no help.
local seconds = unpack(ARGV)
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
if redis.call('LLEN', 'faces:queue') >= redis.call('ZCARD', 'faces:jobs') then return {} end
local ids = redis.call('ZRANGE', 'faces:jobs', '-inf', now, 'BYSCORE', 'LIMIT', 0, 100)
for _, id in ipairs(ids) do redis.call('ZADD', 'faces:jobs', now + seconds, id) end
return ids
