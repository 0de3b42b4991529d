#!lua flags=allow-oom
-- Let go of a photo, and keep, publish and list what came of it: in one step, and once.
local id, json, keep_seconds, jpeg = unpack(ARGV)
local photo, image = 'faces:photo:' .. id, 'faces:image:' .. id
if jpeg then redis.call('HSET', image, 'jpeg', jpeg) end  -- else it is there already
redis.call('EXPIRE', image, keep_seconds)
if redis.call('ZREM', 'faces:jobs', id) == 0 then return end
redis.call('DECRBY', 'faces:bytes', redis.call('HSTRLEN', photo, 'photo'))
redis.call('DEL', photo)
redis.call('HSET', image, 'json', json)
redis.call('XADD', 'faces:news', 'MAXLEN', '~', 1000, '*', 'id', id, 'json', json)
if redis.call('HSTRLEN', image, 'jpeg') > 0 then  -- it is no error
  redis.call('LPUSH', 'faces:newest', id)
  redis.call('LTRIM', 'faces:newest', 0, 99)
end
