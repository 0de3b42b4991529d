#!lua flags=allow-oom
-- Keep and publish what came of a photo, and let go of the photo, in one step and once.
local jobs, starts, bytes, queue, images, errors, photo_key, image_key = unpack(KEYS)
local id, json, jpeg = unpack(ARGV)
local most_news = 1000  -- by which a web process may be late
local stream, seconds = images, redis.call('HGET', photo_key, 'keep_seconds')
if jpeg == '' then stream, seconds = errors, 60 end
if not redis.call('ZSCORE', jobs, id) then return end
redis.call('HSET', image_key, 'json', json, 'jpeg', jpeg)
redis.call('EXPIRE', image_key, seconds)
redis.call('XADD', stream, 'MAXLEN', most_news, '*', 'json', json)
redis.call('DECRBY', bytes, redis.call('HSTRLEN', photo_key, 'photo'))
redis.call('DEL', photo_key)
redis.call('HDEL', starts, id)
redis.call('ZREM', jobs, id)
