#!lua flags=allow-oom
-- Count a start of the work on a photo. Return the count (0 if the photo is done), the seconds since it was posted,
-- its filename as JSON, and its bytes.
local jobs, starts, bytes, queue, images, errors, photo_key = unpack(KEYS)
local id, overdue = unpack(ARGV)
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
if not redis.call('ZSCORE', jobs, id) then return {0, '', '', ''} end
redis.call('ZADD', jobs, now + overdue, id)
local photo, filename, at = unpack(redis.call('HMGET', photo_key, 'photo', 'filename', 'at'))
return {redis.call('HINCRBY', starts, id, 1), tostring(now - (at or now)), filename or 'null', photo}
