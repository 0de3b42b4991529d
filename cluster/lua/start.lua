#!lua flags=allow-oom
-- Count a start of the work on a photo. Return the count (0 if the photo is done), the seconds since it was posted,
-- its filename as JSON, and its bytes.
local id, overdue = unpack(ARGV)
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
if not redis.call('ZSCORE', 'faces:jobs', id) then return {0, '', '', ''} end
redis.call('ZADD', 'faces:jobs', now + overdue, id)
local count = redis.call('HINCRBY', 'faces:starts', id, 1)
local photo, filename, at = unpack(redis.call('HMGET', 'faces:photo:' .. id, 'photo', 'filename', 'at'))
return {count, tostring(now - (at or now)), filename or 'null', photo}
