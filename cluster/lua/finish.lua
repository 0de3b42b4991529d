#!lua flags=allow-oom
-- Publish what came of a photo, and let go of the photo, in one step and once.
local jobs, starts, bytes = unpack(KEYS)
local id, photo, stream, news = unpack(ARGV)
local most_news = 1000  -- by which a web process may be late
if not redis.call('ZSCORE', jobs, id) then return end
redis.call('XADD', stream, 'MAXLEN', most_news, '*', 'json', news)
redis.call('DECRBY', bytes, redis.call('HSTRLEN', photo, 'photo'))
redis.call('DEL', photo)
redis.call('HDEL', starts, id)
redis.call('ZREM', jobs, id)
