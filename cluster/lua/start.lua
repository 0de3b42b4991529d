#!lua flags=allow-oom
-- Count a start of the work on a photo, and put off when it is overdue. Return the count and for
-- how many milliseconds the photo has waited; or 0, 0 if it is done.
local id, start, overdue = unpack(ARGV)
local photo, time = 'faces:photo:' .. id, redis.call('TIME')
if not redis.call('ZSCORE', 'faces:jobs', id) then return {0, 0} end
redis.call('ZADD', 'faces:jobs', time[1] + overdue, id)
-- When Redis answers late, a worker asks again: that is the same start, and counts once.
local is_new = redis.call('HSETNX', photo, start, '')
local starts = redis.call('HINCRBY', photo, 'starts', is_new)
local posted = redis.call('HGET', photo, 'posted')
return {starts, (time[1] + time[2] / 1e6 - posted) * 1000}
