#!lua flags=allow-oom
-- Count a start of the work on a photo, and put off when it is overdue. Return 0 if it is done.
local id, start, overdue = unpack(ARGV)
local photo = 'faces:photo:' .. id
if not redis.call('ZSCORE', 'faces:jobs', id) then return 0 end
redis.call('ZADD', 'faces:jobs', redis.call('TIME')[1] + overdue, id)
-- When Redis answers late, a worker asks again: that is the same start, and counts once.
local is_new = redis.call('HSETNX', photo, start, '')
return redis.call('HINCRBY', photo, 'starts', is_new)
