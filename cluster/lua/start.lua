#!lua flags=allow-oom
-- Count a start of the work on a photo, and put off when it is overdue. Return 0 if it is done.
local id, overdue = unpack(ARGV)
if not redis.call('ZSCORE', 'faces:jobs', id) then return 0 end
redis.call('ZADD', 'faces:jobs', redis.call('TIME')[1] + overdue, id)
return redis.call('HINCRBY', 'faces:photo:' .. id, 'starts', 1)
