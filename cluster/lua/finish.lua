#!lua flags=allow-oom
-- Keep and publish what came of a photo, and let go of the photo, in one step and once.
local id, json, jpeg = unpack(ARGV)
local photo, image = 'faces:photo:' .. id, 'faces:image:' .. id
local stream, seconds = 'faces:images', redis.call('HGET', photo, 'keep_seconds')
local most_news = 1000  -- by which a web process may be late
if jpeg == '' then stream, seconds = 'faces:errors', 60 end
if not redis.call('ZSCORE', 'faces:jobs', id) then return end
redis.call('HSET', image, 'json', json, 'jpeg', jpeg)
redis.call('EXPIRE', image, seconds)
redis.call('XADD', stream, 'MAXLEN', most_news, '*', 'json', json)
redis.call('DECRBY', 'faces:bytes', redis.call('HSTRLEN', photo, 'photo'))
redis.call('DEL', photo)
redis.call('HDEL', 'faces:starts', id)
redis.call('ZREM', 'faces:jobs', id)
